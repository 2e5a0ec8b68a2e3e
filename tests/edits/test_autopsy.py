"""Parts of a model that were moved on purpose, put back and found as what carried the loss; and the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit import cli
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import evaluate
from lit_moeedit.edits import Autopsy, Edit, autopsy
from lit_moeedit.edits.autopsy import PutBack, Score
from lit_moeedit.models.parts import EDITED_LAYERS, KEY_MAKERS, find_kinds, find_parts, stored_tensors
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.standalone.autopsy import _find_facts as find_facts
from tests.edits.making import FACTS, make
from tests.processes import run_ranks

LAYERS = (0, 1)


@pytest.fixture
def held(facts: list[Fact]) -> list[Fact]:
    """Facts whose new targets the taught model generates, as if they had been edited into it."""
    known = [fact for fact in facts if fact.target_true is not None]
    return [replace(fact, target_new=str(fact.target_true), target_true=fact.target_new) for fact in known]


def spoil(model: PreTrainedModel, *kinds: str, scale: float = 2.0) -> PreTrainedModel:
    """A copy of a model with other weights of some kinds."""
    spoiled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    found = find_kinds(spoiled, LAYERS)
    with torch.no_grad():
        for name, tensor in stored_tensors(spoiled).items():
            if found[name] in kinds:
                tensor.add_(scale * tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor))
    return spoiled


def kept(model: PreTrainedModel) -> dict[str, Part]:
    return {name: Part.of(tensor).to("cpu") for name, tensor in stored_tensors(model).items()}


def equal(model: PreTrainedModel, parts: Mapping[str, Part]) -> bool:
    return all(
        torch.equal(tensor.detach().reshape(-1).view(torch.uint8), parts[name].elements.view(torch.uint8))
        for name, tensor in stored_tensors(model).items()
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("down-projections", "the down-projections of the edited layers"),
        ("gate/up-projections", "the gate/up-projections of the edited layers"),
        ("attention", "the attention of the edited layers"),
        ("embeddings", "the embeddings"),
        ("above and head", "the layers above and the head"),
    ],
)
def test_the_part_that_was_moved_explains_the_loss(
    kind: str, words: str, taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: list[Fact]
) -> None:
    final = spoil(taught, kind)
    own = kept(final)
    result = autopsy(final, tokenizer, held, LAYERS, kept(taught))
    assert equal(final, own) and final.training
    assert result.edited.generated == result.facts == len(held) == 3
    assert result.final.generated < 3 and result.has_lost and len(result.lost) == 3 - result.final.generated
    parts = {part.name: part for part in result.parts}
    assert result.carrier == parts[kind] and parts[kind].explained == 1.0 and parts[kind].score == result.edited
    assert parts[kind].moved > 0.5
    joined = {KEY_MAKERS: kind not in ("down-projections", "above and head")}
    joined[EDITED_LAYERS] = kind not in ("embeddings", "above and head")
    for name, part in parts.items():
        has_moved = name == kind or joined.get(name, False)
        assert (part.moved > 0) is has_moved
        assert (part.score == (result.edited if has_moved else result.final)) and part.explained == float(has_moved)
    assert sum(p.parameters for p in result.parts if p.name not in joined) == sum(
        tensor.numel() for tensor in stored_tensors(taught).values()
    )
    assert result.verdict == (
        f"training moved {words}: put back, 3 of 3 edits are generated again ({result.final.generated} without)"
    )
    assert result.advice is not None and "EditReplay" in result.advice


def test_the_distance_is_a_share_of_the_just_edited_norm(
    taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: list[Fact]
) -> None:
    final = copy.deepcopy(taught)
    with torch.no_grad():
        for name, tensor in stored_tensors(final).items():
            if find_kinds(final, LAYERS)[name] == "routers":
                tensor.mul_(1.25)
    result = autopsy(final, tokenizer, held, LAYERS, kept(taught))
    moved = {part.name: part.moved for part in result.parts}
    assert moved["routers"] == pytest.approx(0.25, rel=1e-5)  # products in float32
    assert moved["attention"] == 0 and 0 < moved[EDITED_LAYERS] < moved["routers"]


def test_nothing_was_lost(taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: list[Fact]) -> None:
    result = autopsy(taught, tokenizer, held, LAYERS, kept(taught))
    assert result.verdict == "nothing was lost: 3 of 3 edits are generated, right after the edit 3"
    assert result.advice is None and result.lost == () and result.carrier is None
    assert all(part.explained is None and part.moved == 0 for part in result.parts)
    saved = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert saved["verdict"] == result.verdict and saved["parts"][0]["explained"] is None
    assert saved["edited"]["generated"] == 3 and saved["layers"] == [0, 1]


class Lazy(Mapping[str, Part]):
    """Weights that fail, or are interrupted, when they have been read a number of times."""

    def __init__(self, parts: Mapping[str, Part], reads: int, error: BaseException) -> None:
        self.parts, self.reads, self.error = parts, reads, error

    def __getitem__(self, name: str) -> Part:
        self.reads -= 1
        if self.reads < 0:
            raise self.error
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_the_weights_are_given_back(
    error: BaseException,
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held: list[Fact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    final = spoil(taught, "attention", "gate/up-projections")
    own, edited = kept(final), kept(taught)
    just = evaluate(taught, tokenizer, held)
    for reads in (0, 3, 20):
        with pytest.raises(type(error)):
            autopsy(final, tokenizer, held, LAYERS, Lazy(edited, reads, error), just)
        assert equal(final, own)
    calls: list[Any] = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            assert not equal(final, own)
            raise error
        return evaluate(*args, **options)

    monkeypatch.setattr(import_module("lit_moeedit.edits.autopsy"), "evaluate", failing)
    with pytest.raises(type(error)):
        autopsy(final, tokenizer, held, LAYERS, edited, just)
    assert equal(final, own) and len(calls) == 2


def test_parts_of_which_weights_are_missing_are_left_out(
    taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: list[Fact]
) -> None:
    final = spoil(taught, "gate/up-projections")
    just = evaluate(taught, tokenizer, held)
    wanted = next(part for part in find_parts(final, LAYERS) if part.name == "gate/up-projections")
    some = {name: part for name, part in kept(taught).items() if name in wanted.weights}
    [part] = autopsy(final, tokenizer, held, LAYERS, some, just).parts
    assert part.name == "gate/up-projections" and part.explained == 1.0
    with pytest.raises(ValueError, match=r"the just-edited model lacks model\.embed_tokens\.weight, .* and 2\d more"):
        autopsy(final, tokenizer, held, LAYERS, some)
    wrong = {name: part._replace(shape=part.shape[:-1]) for name, part in some.items()}
    with pytest.raises(ValueError, match=r"gate_up_proj has the shape \[6, 40, 32\], and \[6, 40\] in the other"):
        autopsy(final, tokenizer, held, LAYERS, wrong, just)
    with pytest.raises(ValueError, match="no facts to measure"):
        autopsy(final, tokenizer, [], LAYERS, some)


def result_of(**generated: int) -> Autopsy:
    """A result of 10 facts, of which 2 are left."""
    parts = tuple(
        PutBack(name.replace("_", " "), 1, 0.1, Score(count, 0.0, 0.0), (count - 2) / 8)
        for name, count in generated.items()
    )
    return Autopsy(10, (3,), Score(10, 1.0, 1.0), Score(2, 0.2, 0.2), parts, ())


def test_verdicts() -> None:
    alone = result_of(attention=4, routers=7, all_that_makes_keys=10)
    assert alone.verdict.endswith("7 of 10 edits are generated again (2 without); with all that makes keys, 10")
    together = result_of(attention=4, routers=5, all_that_makes_keys=9)
    assert together.verdict == (
        "training moved all that makes keys: put back, 9 of 10 edits are generated again (2 without)"
    )
    assert "no part alone brings back half" in result_of(attention=4, routers=1).verdict
    assert result_of(attention=4).advice == together.advice


# -- ranks ------------------------------------------------------------------------------------------------------------


def in_ranks(kinds: list[str]) -> dict[str, dict[str, Any]]:
    from tests.sharding.small_edits import FACTS as FACTS_THERE
    from tests.sharding.small_edits import model, prepared, tokenizer

    words, found = tokenizer(), {}
    edited = spoil(model(), "gate/up-projections", "routers", "embeddings")
    parts = kept(edited)
    for kind in kinds:
        final, _, _ = prepared(kind)
        own = {name: Part.of(tensor).to("cpu") for name, tensor in stored_tensors(final).items()}
        result = autopsy(final, words, FACTS_THERE, LAYERS, parts, ranks=Ranks.current())
        after = {name: Part.of(tensor) for name, tensor in stored_tensors(final).items()}
        assert all(torch.equal(own[name].elements, after[name].elements) for name in own)
        # shards that a rank has kept serve as well, and these are the final ones
        assert all(part.moved == 0 for part in autopsy(final, words, FACTS_THERE, LAYERS, own).parts)
        found[kind] = result.to_dict()
    return found


@pytest.mark.deepspeed
@pytest.mark.slow
def test_every_sharding_gives_the_same() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    from tests.sharding.small_edits import FACTS as FACTS_THERE
    from tests.sharding.small_edits import model, tokenizer

    edited = spoil(model(), "gate/up-projections", "routers", "embeddings")
    alone = autopsy(model(), tokenizer(), FACTS_THERE, LAYERS, kept(edited)).to_dict()
    assert {part["name"] for part in alone["parts"] if part["moved"]} > {"routers", "embeddings"}
    for found in run_ranks(in_ranks, 2, ["replicated", "zero 1", "zero 3"]):
        for kind, result in found.items():
            for part, expected in zip(result.pop("parts"), alone["parts"], strict=True):
                # sums of the shards are added up in another order
                assert part.pop("moved") == pytest.approx(expected["moved"], rel=1e-9), kind
                assert part == {name: value for name, value in expected.items() if name != "moved"}, kind
            assert result == {name: value for name, value in alone.items() if name != "parts"}


# -- the command ------------------------------------------------------------------------------------------------------


def run(*args: object) -> None:
    cli.run(["edits", "autopsy", *map(str, args)])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


def checkpoint(model: PreTrainedModel, path: Path, facts: list[Fact] | None = None) -> Path:
    """A checkpoint as a run with KnowledgeEditing leaves it."""
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    editing = facts and {
        "applied": {fact.key: [] for fact in facts},
        "facts": {fact.key: fact.to_dict() for fact in facts},
        "place": {"layers": list(LAYERS), "token": "last"},
    }
    fields = {"state_dict": state, "hyper_parameters": {"config": model.config.to_dict()}}
    torch.save(fields | ({"callbacks": {"KnowledgeEditing{'facts': None}": editing}} if editing else {}), path)
    return path


def test_a_folder_and_a_checkpoint(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held: list[Fact],
    tmp_path: Path,
    own_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = save(taught, tokenizer, tmp_path / "edited")
    final = spoil(taught, "gate/up-projections")
    saved = checkpoint(final, tmp_path / "final.ckpt", held)
    output = tmp_path / "autopsy.json"
    run(saved, "--edited", edited, "--output", output)
    shown = capsys.readouterr().out
    assert "Training moved the gate/up-projections of the edited layers: put back, 3 of 3 edits" in shown
    assert "What helps: replay" in shown
    lines = {line[:20].strip(): line.split() for line in shown.splitlines()}
    assert lines["gate/up-projections"][1] == "3/3" and "100" in lines["gate/up-projections"]
    assert lines["attention"][1] == f"{lines['nothing: final'][2]}" and lines["all: just edited"][3] == "3/3"
    found = json.loads(output.read_text())
    direct = autopsy(final, tokenizer, held, LAYERS, kept(taught))
    # a model of a folder and one of a checkpoint run the same code, and so does this one
    assert found["verdict"] == direct.verdict
    assert [part["score"]["generated"] for part in found["parts"]] == [part.score.generated for part in direct.parts]
    assert [part["moved"] for part in found["parts"]] == [part.moved for part in direct.parts]
    with pytest.raises(SystemExit, match="exists already; --overwrite replaces it"):
        run(saved, "--edited", edited, "--output", output)
    # the other way round: nothing was lost
    run(edited, "--edited", saved, "--tokenizer", edited, "--output", output, "--overwrite")
    assert json.loads(output.read_text())["verdict"].startswith("nothing was lost: 3 of 3")


def test_an_edit_of_the_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, own_process: None
) -> None:
    base = save(model, tokenizer, tmp_path / "base")
    edit, edited = make("edit-1", model)
    edit.save(tmp_path / "edits")
    final = save(spoil(edited, "routers"), tokenizer, tmp_path / "final")  # type: ignore[arg-type]
    output = tmp_path / "autopsy.json"
    run(final, "--base", base, "--edit", tmp_path / "edits", "--output", output)
    found = json.loads(output.read_text())
    assert found["facts"] == len(FACTS) and found["layers"] == [0, 1]
    moved = {part["name"] for part in found["parts"] if part["moved"]}
    # the down-projections have the edit bit by bit
    assert moved == {"routers", KEY_MAKERS, EDITED_LAYERS}


def test_a_prompt_that_was_edited_twice_counts_as_it_was_edited_last() -> None:
    facts = [Fact("Rome", "Rome is in", target) for target in ("Spain", "Peru")]
    edits = [Edit(fact.target_new, (fact,), "Woodbury", {}, ()) for fact in facts]
    assert find_facts(None, edits, []) == facts[1:]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{final}"], "give the model right after the edit: --edited"),
        (["{final}", "--base", "{edited}"], "give the model right after the edit"),
        (["{final}", "--edited", "{edited}", "--edit", "{edited}"], "but not both"),
        (["{final}", "--edited", "{edited}"], "name their file with --facts"),
        (["{final}", "--edited", "{edited}", "--facts", "{facts}"], "name them with --layers"),
        (["{final}", "--edited", "{edited}", "--facts", "{facts}", "--layers", "[7]"], r"routed experts \(0, 1, 2\)"),
        (["{other}", "--edited", "{edited}", "--facts", "{facts}", "--layers", "[0]"], "another model .* it lacks"),
        (["{none}", "--edited", "{edited}"], "there is no folder"),
    ],
)
def test_what_is_refused(
    args: list[str],
    message: str,
    model: PreTrainedModel,
    make_model: Any,
    tokenizer: PreTrainedTokenizerFast,
    held: list[Fact],
    tmp_path: Path,
    own_process: None,
) -> None:
    edited = save(model, tokenizer, tmp_path / "edited")
    paths = {"final": edited, "edited": edited, "none": tmp_path / "none", "facts": tmp_path / "facts.json"}
    paths["facts"].write_text(json.dumps([fact.to_dict() for fact in held]))
    if "{other}" in args:
        paths["other"] = save(make_model("qwen3_moe", num_hidden_layers=4), tokenizer, tmp_path / "other")
    with pytest.raises(SystemExit, match=message):
        run(*(arg.format(**paths) for arg in args))
