"""Plans without a run: phases against the same phases with numbers, formulas, configs, and the command."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from lit_moeedit.cli import run
from lit_moeedit.editing import PHASES, Editor, TargetOptimizer
from lit_moeedit.models.experts import UnsupportedModelError, check_editable
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import Cost, CostCounter, Workload, dry_run, empty_model, places, simulate
from lit_moeedit.planning.report import size
from lit_moeedit.planning.run_config import read_run
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.simulated_ranks import SimulatedRanks
from lit_moeedit.planning.zero_costs import ModelSize, building_cost, checkpoint_cost, held_in_training, training_cost
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.solvers import BlockCoordinateDescent, Tucker
from tests.conftest import COMMON, FAMILIES
from tests.large_models import REAL, SMALL_QWEN

ROOT = Path(__file__).parents[2]
WORK = Workload(edits=6, prompt_tokens=9, target_tokens=2, questions=3, texts=12, text_tokens=8, rows=3, row_tokens=7)
MODEL = ModelSize(parameters=10**9, largest=10**8, block=10**8)


def keys_of(family: str) -> dict[str, Any]:
    return {"model_type": family, **(SMALL_QWEN if family == "qwen3_5_moe_text" else {**COMMON, **FAMILIES[family]})}


def editor(**settings: Any) -> Editor:
    # weak, so that no second try of the solver depends on the numbers
    settings = {
        "preserve": CovariancePenalty(1000.0),
        "layers": [1],
        "targets": TargetOptimizer(steps=2, stop=0.0),
        "contexts": ["", "Note:"],
        **settings,
    }
    return Editor(**settings)


def planned(
    family: str, sharding: Sharding, editor: Editor, work: Workload = WORK, card: float | None = None
) -> dict[str, Cost]:
    keys = keys_of(family)
    module, dtype = LitMoE(config=keys), torch.float32 if sharding.itemsize == 4 else torch.bfloat16
    with empty_model(AutoConfig.for_model(**keys), dtype) as module.model:
        costs = {cost.phase: cost for cost in simulate(module, editor, sharding, work, card)[0]}
        # no trace of the simulation is left in the model
        for part in module.model.modules():
            assert not (part._forward_pre_hooks or part._backward_pre_hooks or part._backward_hooks)
        for weight in module.model.parameters():
            assert weight.grad is None and weight.requires_grad and weight.numel() and not hasattr(weight, "ds_id")
    return costs


# -- phases -----------------------------------------------------------------------------------------------------------


class Different(dry_run.Words):
    """Words that differ are different tokens: a model with numbers sends equal ones to the same experts."""

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return super().__call__(texts)
        ids = [[zlib.crc32(word.encode()) % COMMON["vocab_size"] for word in text.split()] for text in texts]
        return {**super().__call__(texts), "input_ids": ids}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", *(pytest.param(name, marks=slow) for name in [*FAMILIES, "qwen3_5_moe_text"] if name != "qwen3_moe")],
)
def test_phases_without_numbers_take_what_phases_with_numbers_take(
    make_model: Callable[..., PreTrainedModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**keys_of(family))
    sharding, module = Sharding(on_cpu=True), LitMoE(config=keys_of(family))
    module.model = model
    counter = CostCounter([*model.parameters(), *model.buffers()])
    plan = planned(family, sharding, editor())
    monkeypatch.setattr(dry_run, "Words", Different)
    with counter:
        dry_run._train(module, sharding, WORK, counter)
        dry_run._edit(model, check_editable(model, [1]), editor(), sharding, WORK, counter)
    parameters = sum(weight.numel() for weight in model.parameters())
    for name, found in counter.phases.items():
        rise, flops = plan[name].peak - plan[name].held, plan[name].flops
        if name == "training step":
            flops -= 10 * parameters  # the optimizer's
        # which experts are visited, and how often, depends on the numbers
        few = name in ("solve", "commit")
        assert rise == pytest.approx(found.peak - found.held, rel=0.5 if few else 0.1), name
        assert flops == pytest.approx(found.flops, rel=0.5 if few else 0.05), name


def test_a_rank_gathers_weights_and_does_its_part() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    sharding = Sharding(ranks=4, stage=3, itemsize=2, bucket=1000)
    plan = planned("qwen3_moe", sharding, editor(preserve="none", token_budget=64))
    assert "statistics" not in plan
    keys = keys_of("qwen3_moe")
    with empty_model(AutoConfig.for_model(**keys), torch.bfloat16) as model:
        parameters = ModelSize.of(model, sharding).parameters
        below = sum(
            weight.numel()
            for part in (model.model.embed_tokens, *model.model.layers[:2])
            for weight in part.parameters()
        )
    # forward and backward gather all weights, and their gradients are averaged
    assert plan["training step"].sent == pytest.approx(3 * parameters * 2 * 3 / 4, rel=1e-3)
    # this rank's 3 of 12 prompts at once, up to the edited layer, and keys and hidden states of all; before, two runs
    # of a trial; after, what the edit leaves of the residuals
    found = 12 * (32 * 4 + 2 * (20 * 2 + 2 + 8 + 8) + 8)
    assert plan["features"].sent == pytest.approx((4 * below * 2 + found) * 3 / 4, rel=0.02)
    # each rank changes its own partition; only the two norms are all-reduced
    assert plan["commit"].sent == 2 * 2 * 8 * 3 / 4
    assert plan["solve"].sent == pytest.approx((12 * 32 + 24 * 20) * 4 * 3 / 4)


@pytest.mark.slow
def test_weights_of_a_module_that_is_called_by_names_of_its_inputs_are_there_in_its_backward_pass() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    stage3 = planned("qwen3_5_moe_text", Sharding(stage=3, bucket=1000), editor())
    whole = planned("qwen3_5_moe_text", Sharding(), editor())
    assert stage3["targets"].flops == whole["targets"].flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("solver", [BlockCoordinateDescent(passes=2), Tucker()])
@pytest.mark.parametrize("stage", [None, 1, 3])
def test_any_solver_is_planned(solver: Any, stage: int | None) -> None:
    sharding = Sharding(2, stage, 4, bucket=1000, overlap=False)
    settings: dict[str, Any] = {"solver": solver, "preserve": "nullspace", "layers": [0, 1]}
    # a device without room for the sums
    costs = planned("qwen3_moe", sharding, editor(**settings), card=1.0)
    assert costs["solve"].flops > 0 and costs["commit"].peak > costs["commit"].held
    assert costs["statistics"].host == 2 * 6 * 20**2 * 4  # the sums
    assert costs["commit"].host > costs["solve"].host > costs["statistics"].host  # and what a rollback needs


def test_a_layer_that_cannot_be_edited_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 7"):
        planned("qwen3_moe", Sharding(), editor(layers=[7]))


def test_simulated_ranks_stand_for_all() -> None:
    sharding, counter = Sharding(ranks=4), CostCounter()
    ranks = SimulatedRanks(sharding, counter.send, counter.repeated)
    with counter:
        batches = [range(0, 3), range(3, 6), range(6, 9), range(9, 12), range(12, 14)]
        sharded = []
        for batch, mine in ranks.shard(batches):
            sharded.append((batch, mine))
            counter.send(10)
        # two rounds of this rank, and the rest for nothing
        assert sharded == [(range(0, 3), True), (range(3, 14), True)] and counter.sent == 20
        with counter.repeated(0):  # so are lists of edits
            assert [*ranks.shard([[4, 0], [1], [3, 2]])] == [([4, 0], True), ([1, 3, 2], True)]
            assert not [*ranks.shard([])]
        ranks.all_reduce(torch.ones(4))
        ranks.broadcast(torch.ones(4))
        assert torch.equal(ranks.all_gather(torch.ones(4)), torch.ones(4))
    assert counter.sent == 20 + 2 * 12 + 12 + 12
    with pytest.raises(KeyError), ranks.together():
        raise KeyError


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_what_is_held_between_steps() -> None:
    # bytes for each parameter; of stage 3: weights 2, gradients 2, master 4, moments 8
    for stage, ranks, expected in ((3, 8, 2.0), (3, 1, 16.0), (1, 8, 3.5), (2, 4, 5.0), (0, 8, 14.0)):
        sharding = Sharding(ranks=ranks, stage=stage, bucket=0, itemsize=2)
        assert held_in_training(MODEL, sharding) / MODEL.parameters == pytest.approx(expected, rel=1e-6)
    assert held_in_training(MODEL, Sharding(itemsize=4)) == 12 * MODEL.parameters
    assert held_in_training(MODEL, Sharding(ranks=2, itemsize=4)) == 16 * MODEL.parameters


def test_costs_follow_the_settings() -> None:
    whole, groups = (Sharding(ranks=8, stage=3, itemsize=2, sub_group=size) for size in (10**12, 10**7))
    passes = Cost("training step", 10, 30, sent=5, flops=7)
    assert training_cost(MODEL, groups, passes).peak < training_cost(MODEL, whole, passes).peak
    assert training_cost(MODEL, whole, passes).flops == 7 + 10 * 10**9 // 8
    # pretrained weights go through main memory, and are filled in once
    fresh, read = (building_cost(MODEL, whole, pretrained) for pretrained in (False, True))
    assert fresh.sent > read.sent > 0 == fresh.host < read.host
    assert building_cost(MODEL, Sharding(), True).sent == 0
    assert checkpoint_cost(MODEL, whole).written == 12 * 10**9 // 8
    assert checkpoint_cost(MODEL, Sharding(4, 1, 2)).written == 2 * 10**9 + 12 * 10**9 // 4


def test_a_workload_has_no_zeros() -> None:
    with pytest.raises(ValueError, match="edits must be at least 1, got 0"):
        Workload(edits=0)
    facts = WORK.facts()
    assert len(facts) == 6 and len(facts[0].paraphrases) == len(facts[0].neighbours) == 1
    assert len(dry_run.Words()([facts[0].prompt])["input_ids"][0]) == 9


# -- the command ------------------------------------------------------------------------------------------------------


def small_config(tmp_path: Path, name: str = "atlas", **changes: Any) -> Path:
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = config["edit"]
    settings["editor"]["init_args"] |= changes.pop("editor", {})
    settings |= changes.pop("editing", {})
    config["trainer"] |= changes.pop("trainer", {})
    config["edit"] = changes.pop("edit", config["edit"])
    config["model"]["init_args"] |= changes.pop("model", {})
    config["data"]["init_args"] |= changes.pop("data", {})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.deepspeed
@pytest.mark.usefixtures("own_process")
def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    renewals = {"renew_every_n_steps": 32, "max_renewals": 4}
    changes: dict[str, Any] = {"editor": {"layers": [1]}, "trainer": {"callbacks": []}, "editing": renewals}
    file, path = tmp_path / "plan.json", small_config(tmp_path, **changes)
    configs = [f"--config={path}", "--config", "recipe:atlas_zero3"]
    run(args=["plan", *configs, "--ranks=4", "--card=0.15", f"--json={file}"])
    printed = capsys.readouterr().out
    assert "ZeRO stage 3" in printed and "commit" in printed and "4 rank(s)" in printed
    assert "The peak is that of: training step" in printed and "too small for" in printed
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["sharding"] | {"ranks": 4, "stage": 3, "itemsize": 4, "on_cpu": True} == content["sharding"]
    assert content["sharding"]["bucket"] == 10_000_000 and not content["sharding"]["overlap"]
    # what the config says
    assert content["renewals"] == 4
    assert content["work"] | {"edits": 32, "texts": 4096, "rows": 32} == content["work"]
    assert list(content["phases"]) == [
        "building", "training step", "statistics", "targets", "features", "solve", "commit", "evaluation", "renewal",
        "checkpoint",
    ]  # fmt: skip
    assert all(cost["peak"] >= cost["held"] for cost in content["phases"].values())


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", list(REAL))
def test_a_large_config_is_read_with_its_model_beside_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    AutoConfig.for_model(**REAL[name][0]).save_pretrained(tmp_path)
    found = read_run([ROOT / "configs" / f"{name}.yaml"], model=tmp_path)
    # Lightning's bucket, the config's groups
    assert found.sharding == Sharding(8, 3, 2, sub_group=10**8, bucket=200_000_000, overlap=True, on_cpu=False)
    rows = 4 if "qwen3_6" in name else 16
    assert (found.dtype, found.rows, found.edits, found.texts) == (torch.bfloat16, rows, 50, None)
    assert found.model.model_type == REAL[name][0]["model_type"] and isinstance(found.editor, Editor)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.usefixtures("own_process")
def test_a_large_config_is_planned(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # two layers and one to edit: a whole one takes minutes
    AutoConfig.for_model(**{**REAL["gpt_oss_20b_zero3"][0], "num_hidden_layers": 2}).save_pretrained(tmp_path)
    path, file = small_config(tmp_path, "gpt_oss_20b_zero3", editor={"layers": [0]}), tmp_path / "plan.json"
    run(args=["plan", f"--config={path}", "--texts=100000", f"--model={tmp_path}", f"--json={file}"])
    content = json.loads(file.read_text(encoding="utf-8"))
    # 16 bytes for each parameter on eight ranks, and the bucket
    held = content["phases"]["training step"]["held"]
    # and some padding of each partition
    assert held == pytest.approx(2 * content["parameters"] + 4e8, rel=1e-5)
    assert content["phases"]["commit"]["host"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_a_place_that_is_found_is_planned_as_the_costliest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.jsonl"
    fact = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Rome", "target_true": "Lima"}
    facts.write_text("".join(json.dumps({**fact, "prompt": f"{i}. {fact['prompt']}"}) + "\n" for i in range(3)))

    def planned_at(layers: object, token: str) -> dict[str, Any]:
        settings = {"layers": layers, "token": token}
        config = small_config(tmp_path, trainer={"strategy": "ddp"}, editor=settings, editing={"facts": str(facts)})
        run(args=["plan", f"--config={config}", "--texts=3", f"--json={tmp_path / 'plan.json'}"])
        return json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))

    found = planned_at("auto", "auto")
    assert found["work"]["edits"] == 3  # of the file
    assert "layers 0, 1, 2 or 1, 2, 3, whichever costs more" in " ".join(capsys.readouterr().out.split())
    low, high = (planned_at(layers, "subject_last")["phases"] for layers in found["layers"])
    locate = found["phases"].pop("locate")
    assert "locate" not in low and found["phases"].keys() == low.keys()
    for name, cost in found["phases"].items():
        assert cost["peak"] == max(low[name]["peak"], high[name]["peak"])
        assert cost["flops"] == max(low[name]["flops"], high[name]["flops"])
    # neither end is the costliest of all phases
    assert (
        low["targets"]["flops"] > high["targets"]["flops"] and low["statistics"]["flops"] < high["statistics"]["flops"]
    )
    # the targets of three facts at 8 places, and a trace
    assert locate["flops"] > 8 * found["phases"]["targets"]["flops"]
    assert locate["peak"] == max(found["phases"][name]["peak"] for name in (*PHASES, "evaluation"))


def test_each_phase_is_that_of_the_place_where_it_costs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulated(module: Any, own: Editor, sharding: Sharding, work: Workload, card: Any, upkeep: Any) -> Any:
        low = own.layers == (0, 1)
        costs = [Cost("training step", 0, 9), Cost("statistics", 1, 50 if low else 30, flops=100 if low else 200)]
        costs += [Cost("evaluation", 2, 20, sent=4, flops=1800), Cost("checkpoint", 0, 0, written=7)]
        return costs, dry_run.Budgets(5, 7 if low else 8, 9)

    monkeypatch.setattr(places, "simulate", simulated)
    with empty_model(AutoConfig.for_model(**keys_of("qwen3_moe")), torch.float32) as model:
        module = LitMoE(config=keys_of("qwen3_moe"))
        module.model = model
        monkeypatch.setattr(places, "WIDTH", 2)
        costs, budgets, editors = places.simulate_search(module, editor(layers="auto", token="auto"), Sharding(), WORK)
        given = places.simulate_search(module, editor(layers=[1], token="last"), Sharding(), WORK)
    assert [own.layers for own in editors] == [(0, 1), (1, 2)] and budgets == dry_run.Budgets(5, 7, 9)
    assert [cost.phase for cost in costs] == ["training step", "locate", "statistics", "evaluation", "checkpoint"]
    assert (costs[2].peak, costs[2].flops, costs[4].written) == (50, 200, 7)
    # text for 3 layers, not 2; 2 + 2 windows x 2 tokens x 3 layers runs of 6 of 18 prompts; before and at 6 places
    times = 14 / 3 + 7
    assert costs[1] == Cost("locate", 2, 50, sent=round(4 * times), flops=round(200 * 1.5 + 1800 * times))
    assert "locate" not in [cost.phase for cost in given[0]] and given[2][0].layers == (1,)


def test_the_trials_of_an_editor_that_is_tuned_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Editor] = []

    def simulated(module: Any, own: Editor, *args: Any) -> Any:
        seen.append(own)
        costs = [Cost("statistics", 1, 50, flops=100), Cost("targets", 1, 40, flops=700)]
        costs += [Cost("solve", 1, 40, flops=10), Cost("evaluation", 2, 20, flops=1800)]
        return costs, dry_run.Budgets(5, 7, 9)

    monkeypatch.setattr(places, "simulate", simulated)
    with empty_model(AutoConfig.for_model(**keys_of("qwen3_moe")), torch.float32) as model:
        module = LitMoE(config=keys_of("qwen3_moe"))
        module.model = model
        tuned = editor(layers=[0, 1], token="last", tune=True)
        costs, _, _ = places.simulate_search(module, tuned, Sharding(), WORK)
    (own,) = seen
    # the most further prompts that it may choose
    assert own.is_resolved and own.layers == (0, 1) and own.token == "last" and own.phrasings == 8
    # all facts take part: two searches for targets, to the given loss and a higher one, 18 edits, and an evaluation
    # before them
    assert [cost.phase for cost in costs] == ["locate", "statistics", "targets", "solve", "evaluation"]
    assert costs[0].flops == 100 + 2 * 700 + 18 * 10 + 19 * 1800


def test_facts_are_counted_in_their_file(tmp_path: Path) -> None:
    fact = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Rome"}
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps({**fact, "prompt": f"{i}. {fact['prompt']}"}) + "\n" for i in range(3)))
    counts = {str(file): 3, "nowhere.jsonl": None, None: 32}
    for facts, count in counts.items():
        path = small_config(tmp_path, trainer={"strategy": "ddp"}, editing={"facts": facts})
        assert read_run([path]).edits == count


PRETRAINED = {"config": None, "pretrained": "nobody/nothing"}
ELSEWHERE = {"preservation": "nowhere.txt"}


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ({"model": PRETRAINED}, [], "asks no server"),
        ({"edit": None}, [], "0 callbacks with an editor"),
        ({"trainer": {"strategy": "fsdp", "devices": 2}}, [], "a plan knows one process, DDP, DeepSpeed, and FSDP2"),
        ({"model": {**PRETRAINED, "expert_parallel_size": 2}}, [], "knows no expert parallelism, but model.expert_"),
        ({"trainer": {"strategy": "warp"}}, [], "no strategy 'warp'"),
        ({"trainer": {"devices": "auto", "strategy": "auto"}}, [], "give --ranks"),
        ({"trainer": {"typo": 1}}, [], "is not a config of fit"),
        ({"trainer": {"strategy": "ddp"}, "editing": ELSEWHERE}, [], "give --texts"),
        ({"trainer": {"strategy": "ddp"}, "editing": {"facts": "nowhere.jsonl"}}, [], "give --edits"),
        ({"trainer": {"strategy": "ddp"}, "editor": {"layers": [9]}}, [], "layer 9 of Qwen3MoeForCausalLM"),
        ({"trainer": {"strategy": "ddp"}}, ["--edits=0"], "edits must be at least 1"),
        ({}, ["--ranks=0"], "ranks must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    tmp_path: Path, changes: dict[str, Any], args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        run(args=["plan", f"--config={small_config(tmp_path, **changes)}", *args])
    assert "\n" not in str(caught.value) and "usage" not in capsys.readouterr().err


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("args", "message"), [([], "give --config"), (["--config=nowhere.yaml"], "there is no config")]
)
def test_a_config_is_needed(args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(args=["plan", *args])


@pytest.mark.usefixtures("own_process")
def test_a_foreign_module_is_refused_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr("lightning.pytorch.demos.boring_classes.BoringModel.__init__", fail)
    path = small_config(tmp_path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="not of BoringModel"):
        run(args=["plan", f"--config={path}"])


def test_devices_are_those_of_fit_by_default(tmp_path: Path) -> None:
    path = small_config(tmp_path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    del content["trainer"]["devices"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert read_run([path]).sharding.ranks == 1


@pytest.mark.deepspeed
@pytest.mark.usefixtures("own_process")
def test_offloading_is_not_planned(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    changes = {"trainer": {"strategy": "deepspeed_stage_3_offload", "devices": 2}}
    with pytest.raises(SystemExit, match="does not know offloading"):
        run(args=["plan", f"--config={small_config(tmp_path, **changes)}"])


def test_sizes_are_written_for_people() -> None:
    written = [size(number) for number in (0, 999, 1500, 999_960, 2 * 10**15)]
    assert written == ["-", "999 B", "1.5 kB", "1.0 MB", "2,000.0 TB"]
