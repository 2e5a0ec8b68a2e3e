"""Forward passes under ZeRO stage 3 keep no views of gathered weights, and the backward pass is the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_moeedit.editing.target_rows
import lit_moeedit.module
from lit_moeedit.data.encoding import Encoding
from lit_moeedit.editing.targets import TargetOptimizer, TargetRow
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.fake_tensors import CostCounter
from lit_moeedit.sharding.zero3_passes import regathering
from tests.conftest import COMMON, FAMILIES
from tests.large_models import SMALL_QWEN
from tests.processes import run_ranks

# -- without DeepSpeed ------------------------------------------------------------------------------------------------


def sharded(shape: tuple[int, ...]) -> Any:
    """A weight as DeepSpeed marks it, gathered."""
    weight: Any = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 0, torch.Size(shape)
    return weight


def gather(weight: Any, values: Tensor, offset: int) -> None:
    """Put the values into the middle of a buffer, as DeepSpeed does when it gathers several weights at once."""
    buffer = torch.full((values.numel() + offset + 3,), torch.nan)
    weight.data = buffer.narrow(0, offset, values.numel()).view(values.shape).copy_(values)
    weight.ds_status = SimpleNamespace(name="AVAILABLE")


def drop(weight: Any) -> None:
    weight.data = torch.empty(0)
    weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")


def test_views_are_taken_again_from_wherever_the_weight_is() -> None:
    values, inputs = torch.randn(3, 4, 5), torch.randn(2, 5, requires_grad=True)
    module, plain = nn.Module(), values.clone().requires_grad_()
    module.weight = sharded((3, 4, 5))
    (expected, for_weight) = torch.autograd.grad((inputs @ plain[2].T * plain[1, 0, 0]).sum(), (inputs, plain))
    gather(module.weight, values, 7)
    with regathering(module):
        loss = (inputs @ module.weight[2].T * module.weight[1, 0, 0]).sum()
    drop(module.weight)
    gather(module.weight, values, 2)
    found = torch.autograd.grad(loss, (inputs, module.weight))
    torch.testing.assert_close(found, (expected, for_weight))


def test_a_weight_that_is_not_gathered_is_named() -> None:
    module = nn.Module()
    module.weight = sharded((3, 5))
    gather(module.weight, torch.randn(3, 5), 0)
    with regathering(module):
        loss = (torch.randn(2, 5, requires_grad=True) @ module.weight.T).sum()
    drop(module.weight)
    with pytest.raises(RuntimeError, match=r"needs a weight of shape \[3, 5\] that DeepSpeed has not gathered"):
        loss.backward()


def test_a_graph_that_is_not_run_backwards_is_let_go() -> None:
    module = nn.Module()
    module.weight = sharded((3, 5))
    gather(module.weight, torch.randn(3, 5), 0)
    inputs = torch.randn(2, 5, requires_grad=True)
    alive = []
    with CostCounter() as memory:
        for _ in range(3):
            with regathering(module):
                output = (inputs @ module.weight.T).exp()  # which saves its own output
            del output
            alive.append(memory.alive)  # inputs and weights, which are known after their first use
    assert alive[0] == alive[1] == alive[2]


def test_a_view_from_before_a_new_gathering_is_kept() -> None:
    module, inputs, values = nn.Module(), torch.randn(2, 5, requires_grad=True), torch.randn(3, 5)
    module.weight = sharded((3, 5)).requires_grad_(False)
    gather(module.weight, values, 1)
    view = module.weight.T
    gather(module.weight, -values, 1)
    with regathering(module):
        loss = (inputs @ view).sum()
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], values.sum(0).expand(2, 5))


def test_without_sharding_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", None)
    for module in (nn.Linear(2, 2), nn.Module()):
        with regathering(module):
            pass


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A run of two steps under ZeRO stage 3, and some steps of a target optimisation behind them."""

    family: str
    changes: dict[str, Any]
    precision: str = "32-true"
    experts: str = "eager"
    checkpointing: bool = False
    measured: bool = False
    zero: dict[str, Any] = field(default_factory=dict)


DEEP = {"num_hidden_layers": 6, "moe_intermediate_size": 64, "num_experts": 8, "vocab_size": 60}
CASES = {
    "leaf modules": Case("qwen3_moe", DEEP, measured=True),
    # norms stay gathered
    "grouped": Case(
        "qwen3_moe", {"moe_intermediate_size": 24}, "bf16-true", "grouped_mm",
        zero={"stage3_param_persistence_threshold": 100},
    ),
    "transposed, with biases": Case("gpt_oss", {}, "bf16-mixed", checkpointing=True),
    "weights that are read by other modules": Case(
        "qwen3_5_moe_text", SMALL_QWEN, zero={f"offload_{what}": {"device": "cpu"} for what in ("param", "optimizer")}
    ),
}  # fmt: skip
OFTEN = ["leaf modules"]
"""The cases of the default suite."""


class Module(LitMoE):
    case: Case

    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        self.model.set_experts_implementation(self.case.experts)
        if self.case.checkpointing:
            self.model.gradient_checkpointing_enable()


class Steps(L.Callback):
    """Losses, and how far live memory rises in each step."""

    def __init__(self, meter: CostCounter) -> None:
        self.meter = meter
        self.losses: list[float] = []
        self.rises: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.held, *_ = self.meter.begin()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rises.append(self.meter.peak - self.held)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def own_part(weight: Any, rank: int) -> Tensor:
    """This rank's shard without its padding, which is whatever memory held."""
    shard: Tensor = weight.ds_tensor.flatten()
    return shard[: max(0, weight.ds_numel - rank * len(shard))]


def train(case: Case, active: bool) -> dict[str, Any]:
    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

    block: Any = regathering if active else nullcontext
    lit_moeedit.module.regathering = lit_moeedit.editing.target_rows.regathering = block  # type: ignore[attr-defined]
    L.seed_everything(0, verbose=False)
    module = Module(
        config={"model_type": case.family, **COMMON, **FAMILIES.get(case.family, {}), **case.changes},
        dtype="float32" if case.precision == "32-true" else "bfloat16", learning_rate=0.01,
    )  # fmt: skip
    module.case = case
    ids = torch.randint(3, 60, (8, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    meter = CostCounter()
    steps = Steps(meter)
    # few gradients are averaged and copied at once, so that nothing needs more than the passes
    small = {"sub_group_size": 10_000, "reduce_bucket_size": 10_000}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **small, **case.zero}
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, precision=case.precision, logger=False, callbacks=[steps],
        strategy=DeepSpeedCPUStrategy(config={"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with meter if case.measured else nullcontext():
        trainer.fit(module, DataLoader(rows, batch_size=2))
        model: Any = module.model
        wanted = [TargetRow(edit, Encoding([5 + edit, 6, 7, 8, 9], 3, 2)) for edit in range(4)]
        with meter.phase("targets"):
            targets = TargetOptimizer(steps=2, stop=0.0).optimize(model, expert_layers(model)[0], wanted, 0)
    rise = meter.phases["targets"]
    return {
        "losses": steps.losses,
        "weights": [own_part(weight, trainer.global_rank) for weight in model.parameters()],
        "targets": targets.deltas,
        "rises": {"step": steps.rises[-1], "targets": rise.peak - rise.held},
        "experts": sum(w.ds_numel * w.element_size() for n, w in model.named_parameters() if ".experts." in n),
        "partitioned": all(w.ds_status.name == "NOT_AVAILABLE" for w in model.parameters() if not w.ds_persist),
        "persistent": sum(w.ds_persist for w in model.parameters()),
    }


def train_both(names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        without, within = train(CASES[name], False), train(CASES[name], True)
        weights = zip(without.pop("weights"), within.pop("weights"), strict=True)
        found[name] = without, within, all(torch.equal(one, other) for one, other in weights)
    return found


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return run_ranks(train_both, 2, OFTEN, group=False)


def check(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        without, within, equal = rank[name]
        assert equal
        assert without["losses"] == within["losses"] and len(set(within["losses"])) == 2
        assert torch.equal(without["targets"], within["targets"]) and within["targets"].abs().sum(-1).min() > 0
        assert within["partitioned"]
        assert bool(within["persistent"]) == (name == "grouped")


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", OFTEN)
def test_training_and_targets_are_the_same(runs: list[dict[str, Any]], name: str) -> None:
    check(runs, name)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("name", [name for name in CASES if name not in OFTEN])
def test_training_and_targets_are_the_same_in_other_cases(name: str) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    check(run_ranks(train_both, 2, [name], group=False), name)


@pytest.mark.deepspeed
def test_no_rank_holds_all_experts(runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        without, within, _ = rank["leaf modules"]
        for what in ("step", "targets"):
            # those of all layers but one or two (of six), and in the targets of the one that they lie behind
            saved = without["rises"][what] - within["rises"][what]
            assert saved > 0.6 * without["experts"], (what, without["rises"], within["rises"])
