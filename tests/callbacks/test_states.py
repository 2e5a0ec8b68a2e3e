"""States of callbacks in a checkpoint that somebody else made: one clear error, and the callback stays as it was."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

from lit_moeedit.callbacks import EditReplay, EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.history import History
from lit_moeedit.callbacks.survival import Survival
from lit_moeedit.editing import PHASES, EditMemory, Editor, Measured
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.reports import FactRow, Guard, Retention, SurvivalPoint

SECONDS = dict.fromkeys((*PHASES, "edit"), 1.0)
EDIT = {"facts": 2, "kept": True, "before": {"efficacy": 0.0}, "after": {"efficacy": 1.0}, "seconds": SECONDS}
SUMS = {"efficacy": [2, 0.0]}
TOTALS = {
    "name": None,
    "facts": 2,
    "before": SUMS,
    "after": {"efficacy": [2, 2.0]},
    "seconds": SECONDS,
    "memory": {"solve": 9},
    "by_fact": {"after": {"efficacy": [[1.0, 1.0], [1.0, 1.0]]}},
}
MEASURED = Measured("Rome", True, 0.5, None, (1, 2), (0, 1))
HISTORY = History(
    rows=(FactRow("a", "A", "A is", "Rome", None, 1, True, {"before": MEASURED}),),
    retention=(Retention(1, 2, {"efficacy": 0.5}),),
    guards=(Guard("min_efficacy", 0.5, 1.0),),
    relative_change={3: 0.5},
    held_at={"/a": 4},
    lost_at={"/a": 6},
    edits=1,
)
CURVE = Survival((SurvivalPoint(1, 2, 1, 0, {"margin_min": -0.5}, None, ("A",)),), ("a",), (), {"a": -0.5})
GOALS = {"facts": ["a"], "goals": torch.ones(1, 2, 3), "moments": {3: "digest"}, "folder": "moments"}
DELTAS = {
    "expert_index": torch.tensor([1]), "row_index": torch.tensor([0]), "left": torch.ones(1, 3),
    "right": torch.ones(1, 2), "num_experts": 4,
}  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "KnowledgeEditing": {
        "applied": {"a": [True, False]}, "undone": ["b"], "edits_made": 1, "last_step": 3, "renewals": 0,
        "memory": {0: {"row": torch.tensor([0, 0]), "expert": torch.tensor([0, 1]), "key": torch.eye(2),
                       "facts": ["a"], "sketched": []}},
        "facts": {"a": {"prompt": "A is", "target_new": "b"}}, "edit_files": ["edits/edit-0001"],
        "place": {"layers": [0], "token": "subject_last"},
        "survival": CURVE.state(),
        "kept": {**GOALS, "changes": [{"facts": ["a"], "layers": {3: DELTAS}}]},
    },
    "EditReport": {
        "totals": [TOTALS], "final": {"a": {"efficacy": 1.0}}, "final_by_fact": {"a": {"efficacy": [[1.0], [1.0]]}},
        "history": HISTORY.state(),
        "perplexity": {"before": 9.5}, "seconds": 7.0,
    },
    "EditReplay": {
        "needs": {"a": 0.5}, "conflicts": {"texts": 1, "facts": {"b": 1}, "first": {"b": "B is"}, "given_up": ["b"]},
        "replayed": {"statements": 7, "facts": 1, "given_up": ["B"]},
    },
    "RoutingMonitor": {
        "experts": {0: torch.zeros(3, 2, dtype=torch.int16)}, "probabilities": {0: torch.full((3, 4), 0.25).half()},
        "probe": "digest", "last_edit": {"similarity/mean": 1.0}, "history": [], "edited_layers": [],
    },
}  # fmt: skip


def made(name: str) -> Any:
    editor = Editor([0], memory=EditMemory())
    return {"KnowledgeEditing": lambda: KnowledgeEditing(editor), "EditReport": EditReport,
            "EditReplay": EditReplay, "RoutingMonitor": RoutingMonitor}[name]()  # fmt: skip


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)


def plain(value: Any) -> Any:
    """Tensors as lists, so that states can be compared."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(own) for own in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", STATES)
def test_a_sound_state_comes_back(name: str) -> None:
    callback = made(name)
    callback.load_state_dict(copy.deepcopy(STATES[name]))
    assert plain(callback.state_dict()) == plain(STATES[name])


def test_a_state_with_each_edit_by_itself_is_read_as_their_sums() -> None:
    callback = EditReport()
    other = {**EDIT, "facts": 1, "kept": False, "before": {"efficacy": float("nan")}, "after": {"efficacy": 0.5}}
    old = {"edits": [EDIT, other, {**EDIT, "name": "b"}], "answers": {}, "perplexity": {"before": 9.5}}
    callback.load_state_dict(copy.deepcopy(old))
    first, second = callback.state_dict()["totals"]
    twice = {name: 2.0 for name in SECONDS}
    bare = {name: value for name, value in TOTALS.items() if name != "by_fact"}
    assert first == {**bare, "after": {"efficacy": [3, 2.5]}, "seconds": twice, "memory": {}}
    assert second == {**bare, "name": "b", "memory": {}}


GONE = object()
BROKEN: list[tuple[str, str, Any, str]] = [
    ("KnowledgeEditing", "applied", GONE, "field 'applied' should be a dict, but is missing"),
    ("KnowledgeEditing", "applied", ["a"], "field 'applied' should be a dict, but is a list"),
    ("KnowledgeEditing", "applied", {1: [True]}, "'applied' should be a dict of str to list of bool"),
    ("KnowledgeEditing", "applied", {"a": ["yes"]}, "'applied' should be a dict of str to list of bool"),
    ("KnowledgeEditing", "undone", [7], "'undone' should be a list of str"),
    ("KnowledgeEditing", "edits_made", "one", "'edits_made' should be a int, but is a str"),
    ("KnowledgeEditing", "last_step", -1, "'last_step' should be at least 0, but is -1"),
    ("KnowledgeEditing", "renewals", GONE, "'renewals' should be a int, but is missing"),
    ("KnowledgeEditing", "memory", [1], "'memory' should be a dict, but is a list"),
    ("KnowledgeEditing", "survival", [1], "'survival' should be a dict, but is a list"),
    ("KnowledgeEditing", "survival", {"margins": {"a": "x"}}, r"survival.margins.a should be a number, but is 'x'"),
    ("KnowledgeEditing", "survival", {"points": [{"step": 1}]}, r"survival.points\[0\] lacks the field 'epoch'"),
    ("KnowledgeEditing", "kept", {"facts": ["a"]}, "kept: field 'goals' should be a Tensor, but is missing"),
    (
        "KnowledgeEditing",
        "kept",
        {"facts": ["a"], "goals": torch.ones(2, 2, 3), "moments": {}, "folder": ""},
        r"field 'goals' should be finite float32 of shape \[1, contexts, d_model\], but is .* of shape \[2, 2, 3\]",
    ),
    (
        "KnowledgeEditing",
        "kept",
        {"facts": ["a"], "goals": torch.full((1, 2, 3), torch.nan), "moments": {}, "folder": ""},
        "field 'goals' should be finite",
    ),
    *(
        (
            "KnowledgeEditing",
            "kept",
            {**GOALS, "changes": [{"facts": ["a"], "layers": {3: {**DELTAS, **wrong}}}]},
            message,
        )
        for wrong, message in (
            ({"left": [1.0]}, "changes, layer 3: field 'left' should be a Tensor, but is a list"),
            ({"expert_index": torch.tensor([4])}, r"changes, layer 3: expected finite factors .* of 4 experts"),
            ({"row_index": torch.tensor([-1])}, "changes, layer 3: expected finite factors"),
            ({"row_index": torch.tensor([0.0])}, "changes, layer 3: expected finite factors"),
            ({"right": torch.ones(2, 2)}, r"changes, layer 3: expected finite factors .* found .* right \[2, 2\]"),
            ({"left": torch.full((1, 3), torch.nan)}, "changes, layer 3: expected finite factors"),
        )
    ),
    ("KnowledgeEditing", "kept", {**GOALS, "changes": [{"facts": ["a"]}]}, "changes: field 'layers' should be a dict"),
    ("EditReplay", "needs", {"a": "x"}, "field 'needs' should be a dict of str to int or float"),
    ("EditReplay", "replayed", [1], "field 'replayed' should be a dict, but is a list"),
    ("EditReplay", "replayed", {"statements": -1}, "replayed: field 'statements' should be at least 0, but is -1"),
    ("EditReplay", "replayed", {"facts": "two"}, "replayed.facts should be an integer, but is 'two'"),
    ("EditReport", "edits", GONE, "'edits' should be a list, but is missing"),
    ("EditReport", "edits", [1], "'edits' should be a list of dict"),
    ("EditReport", "edits", [{**EDIT, "facts": "two"}], r"edits\[0\]: field 'facts' should be a int"),
    (
        "EditReport",
        "edits",
        [EDIT, {**EDIT, "after": []}],
        r"edits\[1\]: field 'after' should be a dict, but is a list",
    ),
    ("EditReport", "edits", [{**EDIT, "name": 1}], r"edits\[0\]: field 'name' should be a str, but is a int"),
    (
        "EditReport",
        "edits",
        [{**EDIT, "before": {"efficacy": "x"}}],
        r"field 'before' should be a dict of str to int or float",
    ),
    ("EditReport", "edits", [{**EDIT, "seconds": {}}], r"should hold the seconds of statistics, "),
    ("EditReport", "totals", [{**TOTALS, "facts": None}], r"totals\[0\]: field 'facts' should be a int"),
    ("EditReport", "totals", [{**TOTALS, "after": {"a": [1]}}], "a number of facts and a sum each"),
    (
        "EditReport",
        "totals",
        [{**TOTALS, "after": {"a": 1}}],
        "'after' should be a dict of str to list of int or float",
    ),
    ("EditReport", "totals", [{**TOTALS, "seconds": {}}], r"should hold the seconds of statistics, "),
    (
        "EditReport",
        "totals",
        [{**TOTALS, "by_fact": {"after": {"a": [[1], ["x"]]}}}],
        "'by_fact' should be a dict of str",
    ),
    (
        "EditReport",
        "totals",
        [{**TOTALS, "by_fact": {"after": {"a": [[1.0], []]}}}],
        "two lists of the same length each",
    ),
    ("EditReport", "final_by_fact", {"a": {"b": [[1.0]]}}, "two lists of the same length each"),
    ("EditReport", "final_by_fact", [1], "'final_by_fact' should be a dict, but is a list"),
    ("EditReport", "final", {"a": 1}, "'final' should be a dict of str to dict of str to int or float"),
    ("EditReport", "seconds", "7", "'seconds' should be a int or float, but is a str"),
    ("EditReport", "history", ["x"], "'history' should be a dict, but is a list"),
    ("EditReport", "history", {"rows": [{"key": 1}]}, r"history\.rows\[0\] lacks the field"),
    ("EditReport", "history", {"held_at": {"/a": "x"}}, r"history\.held_at\./a should be an integer, but is 'x'"),
    ("EditReport", "history", {"code": "x"}, "history has the unknown field 'code'"),
    ("EditReport", "perplexity", {"before": None}, "'perplexity' should be a dict of str to int or float"),
    ("EditReport", "failed", ["x"], "'failed' should be a dict, but is a list"),
    ("EditReport", "failed", {"after_training": 1}, "'failed' should be a dict of str to str"),
    ("RoutingMonitor", "probe", 7, "'probe' should be a str, but is a int"),
    ("RoutingMonitor", "last_edit", GONE, "'last_edit' should be a dict, but is missing"),
    ("RoutingMonitor", "experts", GONE, "'experts' should be a dict, but is missing"),
    ("RoutingMonitor", "experts", {1: torch.zeros(3, 2, dtype=torch.int16)}, "of the same layers"),
    ("RoutingMonitor", "experts", {0: torch.full((3, 2), 30_000, dtype=torch.int16)}, "should hold experts"),
    ("RoutingMonitor", "experts", {0: torch.full((3, 2), -1, dtype=torch.int16)}, "should hold experts"),
    ("RoutingMonitor", "experts", {0: torch.zeros(3, 2)}, "should hold experts"),
    ("RoutingMonitor", "experts", {0: [1]}, "'experts' should be a dict of int to Tensor"),
    ("RoutingMonitor", "probabilities", {0: torch.full((3, 4), torch.nan)}, "finite probabilities"),
    ("RoutingMonitor", "probabilities", {0: torch.ones(2, 4)}, "finite probabilities"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), BROKEN, ids=[f"{b[0]} {b[1]} {b[3]}" for b in BROKEN])
def test_a_broken_state_is_named(name: str, field: str, value: Any, message: str) -> None:
    callback = made(name)
    callback.load_state_dict(copy.deepcopy(STATES[name]))
    state = {**copy.deepcopy(STATES[name]), field: value}
    if field == "edits":  # as it was before there were sums
        del state["totals"]
    if value is GONE:
        del state[field]
    with pytest.raises(ValueError, match=f"the state of {name} in the checkpoint.*{message}"):
        callback.load_state_dict(state)
    assert plain(callback.state_dict()) == plain(STATES[name])


MEMORY = STATES["KnowledgeEditing"]["memory"][0]
LONG = torch.tensor


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("0", {}, "the memory of layer '0' in the checkpoint should be a dict by the layer's index"),
        (0, {"row": GONE}, "field 'row' should be a Tensor, but is missing"),
        (0, {"key": [[1.0]]}, "field 'key' should be a Tensor, but is a list"),
        (0, {"row": LONG([0.0, 0.0])}, r"should hold row \[N\], expert \[N\] \(int64\) and finite key"),
        (0, {"row": LONG([[0], [0]])}, r"should hold row \[N\]"),
        (0, {"expert": LONG([0])}, r"should hold row \[N\]"),
        (0, {"key": torch.ones(3, 2)}, r"should hold row \[N\]"),
        (0, {"key": torch.full((2, 2), torch.inf)}, r"should hold row \[N\]"),
        (0, {"row": LONG([0, 2**40])}, "rows should be numbered from 0"),
        (0, {"row": LONG([-1, 0])}, "rows should be numbered from 0"),
        (0, {"expert": LONG([0, -1])}, "rows should be numbered from 0"),
        (0, {"facts": ["a", "b"]}, "each of its 2 facts having one"),
        (0, {"facts": [1]}, "'facts' and 'sketched' should hold keys of facts"),
        (0, {"sketched": "ab"}, "field 'sketched' should be a list, but is a str"),
        (0, {"tokens": [0, 1]}, "'tokens' should hold the number of an edit token"),
        (0, {"tokens": [-1]}, "'tokens' should hold the number of an edit token"),
    ],
)
def test_a_broken_memory_is_named(layer: Any, change: dict[str, Any], message: str) -> None:
    memory = EditMemory()
    memory.load_state_dict({0: MEMORY})
    state = {name: value for name, value in {**MEMORY, **change}.items() if value is not GONE}
    with pytest.raises(ValueError, match=message):
        memory.load_state_dict({1: MEMORY, layer: state})
    assert plain(memory.state_dict()) == plain({0: MEMORY})


def test_a_memory_tells_the_edit_tokens_of_facts_that_have_several() -> None:
    memory, several = EditMemory(), {**MEMORY, "row": LONG([0, 1]), "facts": ["a", "a"], "tokens": [0, 1]}
    for state in (several, MEMORY):
        memory.load_state_dict({0: state})
        assert plain(memory.state_dict()) == plain({0: state})


def test_a_memory_on_its_own_survives(tmp_path: Any) -> None:
    memory, other = EditMemory(), EditMemory()
    memory.remember({2: GatedKeys(LONG([0, 0, 1]), LONG([1, 3, 0]), torch.randn(3, 4))}, ["a", "b"])
    torch.save(memory.state_dict(), tmp_path / "it")
    other.load_state_dict(torch.load(tmp_path / "it", weights_only=True))
    assert plain(other.state_dict()) == plain(memory.state_dict())
