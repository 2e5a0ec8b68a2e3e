"""Parts that benchmarks share: what they write, and a memory of a form that only a benchmark has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import (
    atlas,
    baselines,
    editing,
    further_facts,
    lifelong,
    long_targets,
    measures,
    memory_forms,
    moment_tokens,
    preservation,
    sequential,
    strength,
    survival_run,
    tucker,
)
from benchmarks.locate import points_below
from benchmarks.survival_report import table, tables
from benchmarks.training import (
    RESULTS,
    WEAK,
    Trained,
    Unmeasured,
    command_line,
    corpus_options,
    finish,
    interval,
    mean_of,
    only,
    weights_file,
)
from lit_moeedit.data import Fact
from lit_moeedit.editing import EditMemory, FineTuning
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.preservation import OutputPenalty


def test_a_benchmark_ends_with_its_files_and_prints_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Any] = []
    finish("some", "`command`", "a table\n", lambda *given: drawn.append(given), {"value": 1}, tmp_path / "out")
    assert (tmp_path / "out" / "some.md").read_text(encoding="utf-8") == "`command`\n\na table\n"
    assert json.loads((tmp_path / "out" / "some.json").read_text(encoding="utf-8")) == {"value": 1}
    assert drawn == [({"value": 1}, tmp_path / "out" / "some.png")] and capsys.readouterr().out == "a table\n"


def test_a_memory_per_expert_keeps_the_second_moments_of_each() -> None:
    generator, limit, edits = torch.Generator().manual_seed(0), 10**6, 3
    memories = [EditMemory(limit), lifelong.PerExpert(limit)]
    for edit in range(edits):
        row, expert = torch.arange(20), torch.randint(3, (20,), generator=generator)
        keys = GatedKeys(row, expert, torch.randn(20, 5, generator=generator))
        for memory in memories:
            memory.remember({4: keys}, [f"{edit} {number}" for number in range(20)])
    rows, sketch = (memory.state_dict()[4] for memory in memories)
    assert memories[1].size(4) == (3 * 5, 3 * 5)  # as many vectors as dimensions, of each expert
    assert sketch["facts"] == [] and sketch["sketched"] == sorted(rows["facts"])
    for j in range(3):
        whole, kept = (state["key"][state["expert"] == j].double() for state in (rows, sketch))
        # decompositions in float32, one after each edit
        torch.testing.assert_close(kept.T @ kept, whole.T @ whole, rtol=0, atol=1e-4)


def test_a_stream_made_anew_edits_all_facts_again_from_the_first_weights() -> None:
    class Recorder:
        """Notes what is edited, from which weight and with which memory, and adds 1 to the weight."""

        def __init__(self) -> None:
            self.edits: list[tuple[list[int], float, EditMemory]] = []
            self.memory, self.preserve, self.layers = EditMemory(), OutputPenalty(), [0]

        def edit(self, model: nn.Linear, tokenizer: None, facts: list[int], moments: object) -> None:
            self.edits.append((facts.copy(), model.weight.item(), self.memory))
            assert self.preserve.strength == 2.0
            with torch.no_grad():
                model.weight += 1

    model, recorder = nn.Linear(1, 1, bias=False), Recorder()
    before, stream = model.weight.item(), object.__new__(lifelong.Stream)
    vars(stream).update(
        own=SimpleNamespace(model=model, tokenizer=None),
        facts=[*range(5)],
        editor=recorder,
        moments={},
        said=lambda model, facts: torch.zeros(len(facts)),
        measure=lambda model, facts, right_after, whole: {"edits": [*facts]},
        _ability=lambda model: {},
    )
    points = stream.run(lifelong.Variant(EditMemory, size=1, replaced=2, strength=2.0))
    assert points[-1]["edits"] == [*range(5)] and model.weight.item() == before
    facts, weights, memories = zip(*recorder.edits, strict=True)
    assert [*facts] == [[0], [1], [0, 1], [2], [3], [0, 1, 2, 3], [4]]
    assert [*weights] == pytest.approx([before + n for n in (0, 1, 0, 1, 2, 0, 1)], abs=1e-6)
    assert [memories.index(memory) for memory in memories] == [0, 0, 2, 2, 2, 5, 5]


def test_facts_without_further_paraphrases_have_a_row_of_survival() -> None:
    metrics = {"efficacy_accuracy": 1.0, "generalization": 0.5, "specificity_retained": 1.0}
    run = {
        "model": "counterfact", "seed": 0, "edits": 100, "continuation": "1x", "weights": "x",
        "condition": "replay 5 % with paraphrases", "after": metrics, "end": metrics, "contradicted": None,
        "unstated": {"after": None, "end": None}, "train_loss": 1.0, "perplexity": 1.0, "seconds": 1.0, "processor": "",
    }  # fmt: skip
    assert "0.50 to 0.50" in table([run])
    # a run that preserves no neighbour is not averaged with one that may
    both = tables([run, {**run, "neighbours_preserved": False}])
    assert both.count("0.50 to 0.50") == 2 and both.index("in the preserved text") > both.index("0.50 to 0.50")


@pytest.mark.slow
def test_a_run_with_a_renewal_at_the_end_measures_what_is_there_before_it(tmp_path: Path) -> None:
    """That is what a run without the renewal ends with."""
    small = ("--data.init_args.samples_per_epoch=256", *corpus_options(edits=4))
    cli, _ = command_line("atlas", 0, *small)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    weights = {name: tensor.contiguous() for name, tensor in cli.model.model.state_dict().items()}
    save_file(weights, weights_file("atlas", 0, tmp_path))
    renewed, replay = "replay 5 %, renewed at the end", "replay 5 %"
    before, end = survival_run.run("atlas", 0, "10x", renewed, tmp_path, None, *small)
    (alone,) = survival_run.run("atlas", 0, "10x", replay, tmp_path, None, *small)
    assert [(found["condition"], found["renewals"]) for found in (before, end, alone)] == [
        (replay, 0),
        (renewed, 1),
        (replay, 0),
    ]
    for name in ("train_loss", "perplexity"):
        # the same sums, which threads may add up in another order
        assert before[name] == pytest.approx(alone[name], rel=1e-5)
    for name in ("after", "end"):
        # means of a few probabilities, likewise; NaN where nothing was right before
        assert before[name] == pytest.approx(alone[name], rel=1e-3, nan_ok=True)
    for name in ("by_fact", "conflicts", "others", "edits", "weights"):
        assert before[name] == alone[name]
    assert before["perplexity"] != end["perplexity"] and before["seconds"] > 0


def test_a_fact_that_two_seeds_edit_is_one_fact_of_an_interval() -> None:
    """The same facts again make no interval narrower, and other facts do."""
    one = {"by_fact": {"keys": "a b c d", "efficacy": "1/1 0/1 1/1 0/1"}}
    other = {"by_fact": {"keys": "e f g h", "efficacy": "1/1 0/1 1/1 0/1"}}
    (low, high), (again_low, again_high), (wide_low, wide_high) = (
        interval(found, "efficacy") or (0.0, 0.0) for found in ([one], [one, one], [one, other])
    )
    assert (low, high) == (again_low, again_high) == (0.0, 1.0)
    assert wide_high - wide_low < high - low
    assert interval([one], "routing") is None and interval([{}], "efficacy") is None


def test_a_cell_has_the_interval_over_facts_and_the_range_of_seeds() -> None:
    facts = {"keys": "a b c d", "efficacy": "1/1 0/1 1/1 0/1", "generalization": "2/2 2/2 2/2 2/2"}
    one, other = (
        {"efficacy": 0.5, "generalization": 1.0, "routing": routing, "by_fact": facts} for routing in (0.5, 1)
    )
    assert mean_of([one, {**other, "efficacy": 0.25}], "efficacy") == "0.375 (0.000–1.000) [0.250–0.500]"
    assert mean_of([one, other], "routing") == "0.750 [0.500–1.000]" and mean_of([one], "routing") == "0.500"
    assert mean_of([{"routing": None}, one], "routing") == "0.500"
    assert mean_of([{"routing": None}, {"routing": None}], "routing") == "–"
    # of results that do not tell their facts nothing is taken for an interval
    assert mean_of([one, {"efficacy": 0.25}], "efficacy") == "0.375 [0.250–0.500]"
    kept = only(one, ["efficacy", "routing"])
    assert kept == {"efficacy": 0.5, "routing": 0.5, "by_fact": {name: facts[name] for name in ("keys", "efficacy")}}
    assert mean_of([kept], "efficacy") == "0.500 (0.000–1.000)"


@pytest.fixture(scope="module")
def untrained() -> Trained:
    """The atlas with chains, and a model with small layers, before its training."""
    sizes = {"hidden_size": 24, "num_experts": 4, "moe_intermediate_size": 8, "num_attention_heads": 2, "head_dim": 8}
    shape = [f"--model.init_args.config.{name}={size}" for name, size in sizes.items()]
    few = ["--data.init_args.corpus.init_args.edits=12", "--data.init_args.corpus.init_args.neighbours=1"]
    cli, editing = command_line("atlas, chains", 0, *shape, "--model.init_args.config.num_key_value_heads=2", *few)
    torch.manual_seed(0)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    return Trained(cli.model.model.eval(), cli.datamodule, editing.editor, 0.0, "of no training")


def test_nothing_that_is_measured_is_preserved(untrained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    data, facts = untrained.data, untrained.data.edit_facts()
    assert type(data) is Unmeasured
    asked = {question.prompt for fact in facts for question in (*fact.neighbours, *fact.probes)}
    every = super(Unmeasured, data).preservation_texts()  # the class that a run has
    assert any(prompt in text for prompt in asked for text in every)
    texts = data.preservation_texts()
    assert len(texts) == data.preservation_samples
    assert not [text for text in texts if any(prompt in text for prompt in asked) or text in data.probe_texts()]
    monkeypatch.setattr(data, "measured", [])
    assert any(prompt in text for prompt in asked for text in data.preservation_texts())


def test_adapters_begin_alike_whatever_was_drawn_before(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    trained = []
    for seed in (1, 2):
        model = make_model("qwen3_moe")
        torch.manual_seed(seed)
        baselines.train_adapters(model, tokenizer, facts, FineTuning([0], steps=2, learning_rate=0.1))
        trained.append(model.state_dict())
    before, name = make_model("qwen3_moe").state_dict(), "model.layers.0.self_attn.q_proj.weight"
    assert trained[0].keys() == trained[1].keys() == before.keys()
    assert not torch.equal(trained[0][name], before[name])
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_measures_take_probes_apart_and_compare_with_no_edit(
    untrained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrained.editor.targets, "steps", 2)
    monkeypatch.setattr(measures, "EDITORS", ("Woodbury, null space",))
    found = dict(measures.edits(untrained, known=["LoRA"]))
    assert list(found) == [measures.UNEDITED, editing.IN_CONTEXT, "Woodbury, null space"]
    chained, facts = untrained.data.corpus.chained, untrained.data.edit_facts()
    is_read = [fact.subject not in chained.asked_countries for fact in facts]
    assert 0 < sum(is_read) < len(facts)
    for result in found.values():
        for kind in measures.KINDS:
            counts = {group: result["by_fact"][f"{kind}, {group}"].split() for group in measures.GROUPS}
            assert [own.endswith("/1") for own in counts["read"]] == is_read
            assert [own.endswith("/1") for own in counts["not read"]] == [not own for own in is_read]
    edited = found["Woodbury, null space"]
    assert edited["weight_growth_max"] > 0 and edited["null_space_rank_mean"] > 0
    assert "specificity_retained" not in found[measures.UNEDITED]
    results = {measures.CHAINS: {"0": {"questions": measures.questions(untrained), "editors": found}}}
    text = measures.table(results)
    assert all(f"{subject}: {measures.CHAINS}" in text for subject in measures.TABLES) and "nan" not in text


def test_the_difference_of_two_scores_has_an_interval() -> None:
    best = torch.ones(3, 2, 40, dtype=torch.float64)
    chosen = best.clone()
    chosen[1, 0, :10] = 0.0  # a quarter of the paraphrases: the score is 3 / (1 + 1 + 4 / 3), 10 points lower
    low, high = points_below(chosen, best) or (0.0, 0.0)
    assert 2 < low < 10 < high < 20
    assert points_below(best, best) == (0.0, 0.0)
    chosen[2], best[2] = 0.0, 0.0  # no neighbour was right before
    low, high = points_below(chosen, best) or (0.0, 0.0)
    assert 4 < low < 100 * (1 - 2 / (1 + 4 / 3)) < high < 30
    assert points_below(torch.zeros(3, 2, 40), torch.zeros(3, 2, 40)) is None


def test_rows_of_some_seeds_name_them() -> None:
    point = {"form": "output", "strength": 0.3, "ridge": 1e-3, "gated": True, "by_fact": {}}
    known = point | dict.fromkeys(preservation.SHOWN, 0.5)
    text = preservation.table({"atlas": {"0": [known, {**known, "strength": 1.0}], "1": [known]}})
    assert "| output | 0.3 |" in text and "| output (seed 0) | 1 |" in text
    tuned = {**vars(strength.AUTO[0]), **dict.fromkeys(strength.SHOWN, 0.5), "chosen": "layer 2"}
    given = {**tuned, **vars(strength.GIVEN)}
    cases = {"atlas, seed 0": [given], "atlas, seed 1": [given, tuned], f"{WEAK}, seed 1": [given, tuned]}
    text = strength.table(cases)
    assert "Means over the 3 models" in text and text.count("layer 2 (seed 1)") == 2 and "layer 2 (seed 0)" not in text
    assert text.count("**tune: true** (seed 1)") == 1  # of the other model there is no other seed


def test_a_picture_of_some_settings_is_drawn(tmp_path: Path) -> None:
    given = {**vars(strength.GIVEN), **dict.fromkeys(strength.SHOWN, 0.5)}
    strength.picture({"atlas, seed 0": [given]}, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("editing", editing.tables),
        ("long_targets", lambda results: f"{long_targets.table(results)}\n\n{long_targets.NOTES}"),
        ("preservation", preservation.table),
        ("strength", strength.table),
        ("tucker", tucker.table),
        ("moment_tokens", moment_tokens.table),
        ("sequential", sequential.table),
        ("further_facts", further_facts.table),
        ("atlas", atlas.table),
        ("lifelong", lifelong.table),
        ("memory_forms", memory_forms.table),
        ("measures", measures.table),
        ("survival", tables),
    ],
)
def test_a_table_is_of_the_results_beside_it(name: str, text: Callable[[Any], str]) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)[1] == f"{text(results).rstrip()}\n"
