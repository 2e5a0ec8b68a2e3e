"""Several ranks edit together what one process would edit, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_moeedit.editing import TargetOptimizer, evaluate
from lit_moeedit.editing.outcomes import measure
from lit_moeedit.models.experts import check_editable
from lit_moeedit.preservation import OutputPenalty
from lit_moeedit.sharding import commit
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.solvers import Woodbury
from tests.processes import run_ranks
from tests.sharding.small_edits import FACTS, LAYERS, STAGES, TEXTS, editor, model, prepared, tokenizer

needs_deepspeed = pytest.mark.deepspeed


@dataclass(frozen=True)
class Form:
    """How an edit differs from that of :func:`editor`, of all facts in float32."""

    settings: dict[str, Any] = field(default_factory=dict)
    facts: int = len(FACTS)
    dtype: torch.dtype = torch.float32


FORMS = {
    "covariance": Form(),
    "output": Form({"preserve": OutputPenalty()}),
    # a rank has nothing to do
    "one fact": Form({"contexts": ("",)}, facts=1),
    "bfloat16": Form(dtype=torch.bfloat16),
}


def alone(form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before and after the edit of one process."""
    whole, edits = model(form.dtype), []
    for _ in range(2):
        edits.append([layer.down_proj.detach().clone() for layer in check_editable(whole, LAYERS)])
        if len(edits) < 2:
            editor(**form.settings).edit(whole, tokenizer(), FACTS[: form.facts], TEXTS)
    return edits[0], edits[1]


def together(kind: str, form: Form) -> dict[str, Any]:
    whole, optimizers, read = prepared(kind, form.dtype)
    ranks, before, facts = Ranks(), read(), FACTS[: form.facts]
    scores = evaluate(whole, tokenizer(), facts, ranks=ranks).metrics
    measured = measure(whole, tokenizer(), facts, ranks=ranks)
    result = editor(**form.settings).edit(whole, tokenizer(), facts, TEXTS, optimizers=optimizers, ranks=ranks)
    return {"before": before, "after": read(), "change": result.relative_change, "scores": scores, "measured": measured}


def all_cases(cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    return {(kind, name): together(kind, FORMS[name]) for kind, name in cases}


def check(found: list[dict[tuple[str, str], Any]]) -> None:
    for name in {name for _, name in found[0]}:
        form = FORMS[name]
        before, after = alone(form)
        # rounding differs with the padding of batches, and four steps of Adam multiply it
        close = 1e-4
        if form.dtype == torch.bfloat16:
            # so much that tokens go to other experts: compared with as many ranks that hold all of the weights
            after, close = found[0]["replicated", name]["after"], 1e-3
        scores = evaluate(model(form.dtype), tokenizer(), FACTS[: form.facts]).metrics
        measured = measure(model(form.dtype), tokenizer(), FACTS[: form.facts])
        for kind in (kind for kind, other in found[0] if other == name):
            for result in (results[kind, name] for results in found):
                for layer in range(len(LAYERS)):
                    assert torch.equal(result["before"][layer], before[layer])
                    size = (after[layer] - before[layer]).float().norm()
                    error = (result["after"][layer] - after[layer]).float().norm()
                    assert size > 0 and error / size < close, (kind, name)
                    assert torch.equal(result["after"][layer], found[0][kind, name]["after"][layer])
                assert result["change"] == found[0][kind, name]["change"]
                if form.dtype == torch.float32:  # summed in another order
                    torch.testing.assert_close(result["scores"], scores, rtol=1e-4, atol=1e-6, equal_nan=True)
                    assert [one.generated for one in result["measured"]] == [one.generated for one in measured]
                    found_p, expected_p = ([one.p_new for one in part] for part in (result["measured"], measured))
                    assert found_p == pytest.approx(expected_p, rel=1e-4)


USUAL = [(kind, "covariance") for kind in STAGES if kind != "zero 0"]
MORE = [("replicated", "output"), ("zero 3", "output"), ("zero 3", "one fact")]
FURTHER = [
    ("zero 0", "covariance"),
    ("zero 2", "one fact"),
    *((kind, "bfloat16") for kind in STAGES),
]


@needs_deepspeed
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, USUAL + MORE),
        pytest.param(2, FURTHER, marks=pytest.mark.slow),
        # four ranks are more than there are edits
        pytest.param(4, [("replicated", "covariance"), ("zero 3", "covariance")], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks, further forms", "4 ranks"],
)
def test_the_edit_does_not_depend_on_the_number_of_ranks(size: int, cases: list[tuple[str, str]]) -> None:
    check(run_ranks(all_cases, size, cases))


# -- failing together -------------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Failure("injected")


def failing_edits(kind: str) -> dict[str, str]:
    """Edits that fail on rank 1 in one phase each; by phase, what each rank says."""
    from lit_moeedit.editing import editor as module
    from lit_moeedit.editing import spread

    whole, optimizers, read = prepared(kind)
    ranks, before, said = Ranks(), read(), {}
    functions: dict[str, tuple[Any, str]] = {
        "statistics": (module, "second_moments"),
        "targets": (TargetOptimizer, "optimize"),
        "features": (spread, "edit_tokens"),
        "solve": (Woodbury, "solve"),
        "commit": (commit, "delta_slice"),
    }

    def attempt(phase: str, progress: Callable[..., None] | None = None) -> None:
        try:
            editor().edit(whole, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks, progress=progress)
        except (Failure, RankError) as error:
            said[phase] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(old, new) for old, new in zip(before, read(), strict=True)), phase

    for phase, (owner, name) in functions.items():
        original = getattr(owner, name)
        if ranks.rank == 1:
            setattr(owner, name, fail)
        try:
            attempt(f"in {phase}")
        finally:
            setattr(owner, name, original)
    for moment in ("statistics", "targets", "layers"):  # between two forwards, and between two commits

        def progress(phase: str, done: int, total: int, moment: str = moment) -> None:
            if ranks.rank == 1 and phase == moment:
                fail()

        attempt(f"at {moment}", progress)
    # a guard that says no on one rank undoes the edit on all
    result = editor().edit(
        whole, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks, guard=lambda: ranks.rank == 0
    )
    assert not result.kept
    assert all(torch.equal(old, new) for old, new in zip(before, read(), strict=True))
    try:
        editor().edit(whole, tokenizer(), FACTS[ranks.rank :], TEXTS, optimizers=optimizers, ranks=ranks)
    except ValueError as error:
        said["different facts"] = str(error)
    return said


@needs_deepspeed
@pytest.mark.parametrize("kind", [pytest.param("replicated", marks=pytest.mark.slow), "zero 3"])
def test_a_failure_on_one_rank_fails_the_edit_on_all(kind: str) -> None:
    first, second = run_ranks(failing_edits, 2, kind)
    assert len(first) == len(second) == 9
    for phase in first.keys() - {"different facts"}:
        assert first[phase] == "RankError: rank 1 failed: Failure: injected", phase
        assert second[phase] == "Failure: injected", phase
    assert "the facts must be the same on all ranks" in first["different facts"]
