"""What a rank holds or computes only in part is refused by name, before any forward; real sharding on two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from transformers import PreTrainedModel

from lit_moeedit.editing import Editor, FineTuning, answers, evaluate, perplexity, score, second_moments
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.models.keys import stream_keys, watch_keys, watch_routing
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.backends import Backend, extra_backend, refuse_parallelism
from lit_moeedit.sharding.parallelism import Parallelism, find_parallelism
from lit_moeedit.sharding.shards import UnsupportedShardingError
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from tests.processes import run_ranks

SUPPORTED = "supported are one process, DDP, DeepSpeed ZeRO stages 0 to 3, FSDP2 of the whole model, and expert "

# -- marks and strategies ---------------------------------------------------------------------------------------------


def marked(name: str, value: Any = True) -> nn.Module:
    layer = nn.Linear(2, 2)
    setattr(layer, name, value)
    return nn.Sequential(nn.Linear(2, 2), layer)


def made_of(base: type[nn.Module]) -> nn.Module:
    """A module of a class that needs more than this to be made."""
    made = base.__new__(base)
    nn.Module.__init__(made)
    return nn.ModuleDict({"inner": made})


def of_deepspeed() -> dict[Parallelism, nn.Module]:
    deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.module_inject.layers import LinearAllreduce
    from deepspeed.sequence.layer import DistributedAttention

    return {
        Parallelism.AUTO_EP: made_of(AutoEPMoELayer),
        Parallelism.DEEPSPEED_EXPERT: made_of(deepspeed.moe.layer.MoE),
        Parallelism.DEEPSPEED_TENSOR: made_of(LinearAllreduce),
        Parallelism.DEEPSPEED_SEQUENCE: made_of(DistributedAttention),
        Parallelism.PIPELINE: made_of(deepspeed.pipe.PipelineModule),
    }


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (marked("_hf_hook", object()), Parallelism.DEVICE_MAP),
        (marked("_pp_stage", object()), Parallelism.PIPELINE),
        (marked("_tp_size", 2), Parallelism.TENSOR),
        (marked("_tp_size", 1), Parallelism.MESH),
    ],
)
def test_a_mark_on_any_module_is_found(module: nn.Module, kind: Parallelism) -> None:
    assert find_parallelism(module) == {kind: "1 is a Linear"}
    with pytest.raises(UnsupportedShardingError) as refusal:
        refuse_parallelism(module)
    assert kind.value in str(refusal.value) and SUPPORTED in str(refusal.value)


def test_a_part_of_a_model_under_fsdp2_is_found() -> None:
    module = marked("_is_fsdp_managed_module")
    assert find_parallelism(module) == {Parallelism.FSDP2: "1 is a Linear"}
    refuse_parallelism(module)


@pytest.mark.parametrize(
    "module", [marked("_is_expert_parallel", False), marked("_tp_size", None), marked("_device_mesh", object())]
)
def test_what_a_class_only_declares_is_no_mark(module: nn.Module) -> None:
    refuse_parallelism(module)


@pytest.mark.deepspeed
def test_deepspeed_modules_that_split_the_model_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for kind, module in of_deepspeed().items():
        assert list(find_parallelism(module)) == [kind]


@pytest.mark.deepspeed
def test_auto_ep_is_not_taken_for_a_dense_model(make_model: Any, tokenizer: Any, facts: Any) -> None:
    layers = pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="needs DeepSpeed")
    model = make_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp = made_of(layers.AutoEPMoELayer)["inner"]
    for use in uses(model, tokenizer, facts):
        with pytest.raises(UnsupportedShardingError, match=r"AutoEP\) \(model\.layers\.0\.mlp is a AutoEPMoELayer"):
            use()


def test_the_reason_for_no_model_is_its_distribution() -> None:
    with pytest.raises(UnsupportedShardingError, match="pipeline parallelism"):
        find_model(marked("_pp_stage", object()))


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        (ModelParallelStrategy(), Parallelism.FSDP2),
        (FSDPStrategy(), Parallelism.FSDP1),
        (DDPStrategy(), None),
        (SingleDeviceStrategy(), None),
        (None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_strategies_that_shard_modules_are_found(strategy: Any, kind: Parallelism | None) -> None:
    assert list(find_parallelism(nn.Linear(2, 2), strategy)) == ([] if kind is None else [kind])


@pytest.mark.deepspeed
def test_deepspeed_is_supported() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    refuse_parallelism(nn.Linear(2, 2), object.__new__(DeepSpeedStrategy))


def test_a_strategy_that_nobody_knows_is_refused() -> None:
    class Unknown(ParallelStrategy):
        pass

    Unknown.__abstractmethods__ = frozenset()  # none of them is called
    with pytest.raises(UnsupportedShardingError, match=r"a strategy that is not known .*Unknown"):
        refuse_parallelism(strategy=object.__new__(Unknown))


def test_a_backend_can_handle_a_kind() -> None:
    class Hooked(Backend):
        handles = frozenset({Parallelism.DEVICE_MAP})

    module = marked("_hf_hook", object())
    with extra_backend(Hooked()):
        refuse_parallelism(module)
        with pytest.raises(UnsupportedShardingError, match=r"FullyShardedDataParallel.*use ModelParallelStrategy"):
            refuse_parallelism(module, FSDPStrategy())
    with pytest.raises(UnsupportedShardingError):
        refuse_parallelism(module)


# -- everything that runs or reads a model ----------------------------------------------------------------------------


def uses(model: PreTrainedModel, tokenizer: Any, facts: Any) -> list[Callable[[], Any]]:
    """Every public way to run a model."""
    texts = [fact.prompt for fact in facts]
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(1, 4, dtype=torch.long))
    return [
        lambda: Editor([1]).check(model),
        lambda: Editor([1], preserve="none").edit(model, tokenizer, facts),
        lambda: FineTuning([1]).check(model),
        lambda: FineTuning([1]).edit(model, tokenizer, facts),
        lambda: evaluate(model, tokenizer, facts),
        lambda: score(model, tokenizer, texts, texts),
        lambda: answers(model, tokenizer, texts),
        lambda: perplexity(model, [batch]),
        lambda: trace_routing(model, tokenizer, texts),
        lambda: second_moments(model, tokenizer, [], texts),
    ]


def watches(model: PreTrainedModel) -> list[Callable[[], Any]]:
    layers = list(expert_layers(model).values())
    return [
        lambda: watch_routing(layers, print).__enter__(),
        lambda: watch_keys(layers, lambda: None, print).__enter__(),
        lambda: stream_keys(layers, lambda: None, print).__enter__(),
    ]


def refusals(model: PreTrainedModel, ways: list[Callable[[], Any]]) -> list[str]:
    """What each use of the model raises; an assertion error if there was a forward of any module."""
    ran: list[str] = []
    handles = [m.register_forward_pre_hook(lambda m, args: ran.append(type(m).__name__)) for m in model.modules()]
    found = []
    for way in ways:
        try:
            way()
            found.append("nothing")
        except UnsupportedShardingError as error:
            found.append(str(error))
    for handle in handles:
        handle.remove()
    assert not ran, ran
    return found


def a_model() -> tuple[PreTrainedModel, Any, Any]:
    from tests.callbacks.conftest import _corpus, _data, _module

    module, data = _module(), _data()
    data.setup("fit")
    module.configure_model()
    assert module.model is not None
    return module.model, data.tokenizer, _corpus().edits


def begun_from_above(model: Any) -> None:
    outer: Any = nn.Sequential(model)
    fully_shard(model)
    fully_shard(outer)
    outer._get_fsdp_state()._lazy_init()


LAYOUTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layers and stack": (
        lambda model: [fully_shard(part) for part in (*model.model.layers, model.model)],
        "the Qwen3MoeForCausalLM under FSDP2 (fully_shard) is not sharded itself",
    ),
    "stack only": (lambda model: fully_shard(model.model), "is not sharded itself"),
    "experts only": (
        lambda model: [fully_shard(layer.mlp.experts) for layer in model.model.layers],
        "is not sharded itself",
    ),
    "a weight left out": (
        lambda model: fully_shard(model, ignored_params={model.model.norm.weight}),
        "model.norm.weight is trained, but not sharded",
    ),
    "offloaded": (
        lambda model: fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "FSDP2 with CPUOffloadPolicy is not supported",
    ),
    "a mesh of one rank": (
        lambda model: fully_shard(
            model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))["data"]
        ),
        "shards the model over 1 of 2 ranks",
    ),
    "begun from above": (begun_from_above, "is inside of another module that is sharded"),
}


def fsdp2() -> dict[str, list[str]]:
    found = {}
    for name, (layout, _) in LAYOUTS.items():
        model, tokenizer, facts = a_model()
        layout(model)
        found[name] = refusals(model, uses(model, tokenizer, facts))
    return found


def commit_on_gathered() -> list[str]:
    """A commit with the optimizer on a parameter that FSDP2 has gathered."""
    model, *_ = a_model()
    fully_shard(model, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]]))
    weight = model.model.layers[1].mlp.experts.down_proj
    experts, rows, columns = weight.shape
    deltas = ExpertDeltas(torch.tensor([0]), torch.tensor([0]), torch.ones(1, rows), torch.ones(1, columns), experts)
    said = []
    for one in (weight, dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]):
        try:
            with Transaction([optimizer]) as transaction:
                transaction.commit(one, deltas)
            said.append("committed")
        except UnsupportedShardingError as error:
            said.append(str(error))
    return said


def of_transformers(folder: str) -> dict[str, list[str]]:
    """Tensor parallelism of transformers, alone and with expert parallelism on the same ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model, tokenizer, facts = a_model()
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    found = {}
    for sizes in ({"ep_size": 2, "tp_size": 2}, {"tp_size": 2}):
        config = DistributedConfig(**sizes)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
        found[str(sizes)] = refusals(model, [*uses(model, tokenizer, facts), *watches(model)])
    return found


def tensor_parallel() -> list[str]:
    """torch's own plan, which leaves no mark but the parameters."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, tokenizer, facts = a_model()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"lm_head": ColwiseParallel()})
    return refusals(model, uses(model, tokenizer, facts))


class Replicating(LitMoE):
    """Overrides the hook, and leaves the sharding out."""

    def configure_model(self) -> None:
        super().configure_model()


class ReplicatingOther(Replicating):
    """Does not check what it should."""

    def on_fit_start(self) -> None:
        pass


def runs(folder: str) -> dict[str, str]:
    """How runs under ModelParallelStrategy end."""
    from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
    from tests.callbacks.conftest import CONFIG, _data, _editor, _trainer

    cases: dict[str, tuple[type[L.LightningModule], list[Any]]] = {
        "replicas": (Replicating, []),
        "editing": (ReplicatingOther, [KnowledgeEditing(_editor())]),
        "monitor": (ReplicatingOther, [RoutingMonitor(probe=["The capital of Italy is Rome."])]),
        "report": (ReplicatingOther, [EditReport()]),
    }
    found = {}
    for name, (kind, callbacks) in cases.items():
        L.seed_everything(0, verbose=False)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = _trainer(f"{folder}/{name}", callbacks, strategy=strategy, devices=2, max_steps=1, logger=False)
        module = kind(config=CONFIG)
        try:
            trainer.fit(module, _data())
            found[name] = "trained"
        except MisconfigurationException as error:
            found[name] = str(error)
    return found


def defaults(folder: str) -> str:
    """How a run of LitMoE ends under ModelParallelStrategy with its own sizes."""
    from tests.callbacks.conftest import _data, _module, _trainer

    trainer = _trainer(folder, [], strategy=ModelParallelStrategy(), devices=2, max_steps=1, logger=False)
    try:
        trainer.fit(_module(), _data())
    except MisconfigurationException as error:
        return str(error)
    return "trained"


def real(folder: str) -> dict[str, Any]:
    return {
        "fsdp2": fsdp2(),
        "commit": commit_on_gathered(),
        "transformers": of_transformers(f"{folder}/model"),
        "tensor": tensor_parallel(),
        "runs": runs(folder),
        "defaults": defaults(f"{folder}/defaults"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(real, 2, str(tmp_path_factory.mktemp("real")))


def test_other_layouts_of_fsdp2_are_refused_before_any_forward(found: Any) -> None:
    for rank in found:
        assert rank["fsdp2"].keys() == LAYOUTS.keys()
        for layout, messages in rank["fsdp2"].items():
            assert len(messages) == 10
            assert all(LAYOUTS[layout][1] in message for message in messages), (layout, messages)


def test_a_gathered_parameter_of_fsdp2_is_not_written(found: Any) -> None:
    for rank in found:
        assert len(rank["commit"]) == 2
        assert all("while the optimizer trains shards" in message for message in rank["commit"])


def test_parallelism_of_transformers_is_refused_before_any_forward(found: Any) -> None:
    for rank in found:
        for sizes in ({"ep_size": 2, "tp_size": 2}, {"tp_size": 2}):
            *messages, routing, keys, streamed = rank["transformers"][str(sizes)]
            assert all("tensor parallelism" in message for message in messages), sizes
            assert all("leave tp_size at 1, and give fsdp_size, or ep_size" in message for message in messages), sizes
            # single layers are watched, which tensor parallelism of other layers does not concern
            if "ep_size" in sizes:
                assert routing == "nothing"  # its routing is whole
                assert all("but not the keys of its experts" in message for message in (keys, streamed))
            else:
                assert all("cannot be run, read or edited" in message for message in (routing, keys, streamed))


def test_tensor_parallelism_of_torch_is_refused_before_any_forward(found: Any) -> None:
    for rank in found:
        assert all("sharded parameters (DTensor) (lm_head is a Linear)" in message for message in rank["tensor"])


def test_model_parallel_strategy_is_tensor_parallelism_by_default_and_refused(found: Any) -> None:
    for rank in found:
        assert "ModelParallelStrategy has tensor_parallel_size 2, as by default; give it data_paral" in rank["defaults"]


def test_model_parallel_strategy_without_sharding_is_refused_when_the_run_starts(found: Any) -> None:
    for rank in found:
        said = rank["runs"]
        assert all("ModelParallelStrategy, but no module is sharded" in message for message in said.values())
        assert said["replicas"].startswith("LitMoE: ")
        for name, callback in (
            ("editing", "KnowledgeEditing"),
            ("monitor", "RoutingMonitor"),
            ("report", "EditReport"),
        ):
            assert said[name].startswith(f"{callback}: ")
