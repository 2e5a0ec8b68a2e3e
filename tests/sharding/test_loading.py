"""A model that is sharded while it is made has the weights of one that is not."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer import call
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_moeedit.module import LitMoE
from tests.conftest import COMMON, FAMILIES
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"model_type": name, **COMMON, **keys} for name, keys in FAMILIES.items()},
    "tied": {"model_type": "qwen3_moe", **COMMON, **FAMILIES["qwen3_moe"], "tie_word_embeddings": True},
    "yarn": {
        "model_type": "gpt_oss",
        **COMMON,
        **FAMILIES["gpt_oss"],
        "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
}


def trainer_with(stage: int, precision: Any = "32-true", **settings: Any) -> L.Trainer:
    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

    strategy = DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=0, logging_batch_size_per_gpu=1)
    return L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def sharded(precision: str = "32-true", **arguments: Any) -> LitMoE:
    """As far as the Trainer goes before it makes the engine."""
    module, trainer = LitMoE(**arguments), trainer_with(3, precision)
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    call._call_configure_model(trainer)
    return module


def whole(**arguments: Any) -> LitMoE:
    module = LitMoE(**arguments)
    module.configure_model()
    return module


def differences(expected: nn.Module, found: nn.Module, dtype: torch.dtype) -> list[str]:
    """Names of parameters and buffers of which a bit, the dtype or the shape is not as expected."""
    import deepspeed

    wrong = []
    parameters, buffers = dict(found.named_parameters()), dict(found.named_buffers())
    if list(parameters) != [name for name, _ in expected.named_parameters()]:
        return ["the names of the parameters"]
    if list(buffers) != [name for name, _ in expected.named_buffers()]:
        return ["the names of the buffers"]
    for name, weight in expected.named_parameters():
        assert parameters[name].ds_shape == weight.shape and not parameters[name].numel(), name
        with deepspeed.zero.GatheredParameters([parameters[name]]):
            if not same(weight.to(dtype), parameters[name].data):
                wrong.append(name)
    wrong += [name for name, buffer in expected.named_buffers() if not same(buffer, buffers[name])]
    return wrong


def same(expected: Tensor, found: Tensor) -> bool:
    return expected.dtype == found.dtype and torch.equal(expected, found)


# -- weights ----------------------------------------------------------------------------------------------------------

# of the weights, of the training; and what the shards are then
EQUAL = [("float32", "32-true", torch.float32), ("bfloat16", "bf16-true", torch.bfloat16)]
MIXED = [("float32", "bf16-mixed", torch.bfloat16), ("bfloat16", "32-true", torch.float32)]


OFTEN = ("tied", "yarn")
"""The models of the default suite: a qwen3_moe and a gpt_oss."""


def builds(folder: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], str, torch.dtype]]:
    for name, config in ((name, CONFIGS[name]) for name in names):
        for dtype, precision, kept in EQUAL + MIXED * (name in ("deepseek_v3", "yarn")):
            yield name, {"config": config, "dtype": dtype}, precision, kept
            yield name, {"pretrained": f"{folder}/{name}", "dtype": dtype}, precision, kept
        yield name, {"pretrained": f"{folder}/{name}-3d"}, "32-true", torch.float32


def build_all(folder: str, names: Sequence[str]) -> list[str]:
    wrong = []
    for name, arguments, precision, kept in builds(folder, names):
        where = f"{name}, {precision}, {arguments}"
        # the sharded model is the first of its family: nothing of the context it is made in may stay
        torch.manual_seed(100 * dist.get_rank())
        found = sharded(precision, **arguments)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        expected = whole(**arguments)
        wrong += [f"{where}: {which}" for which in differences(expected, found, kept)]
        if not torch.equal(state, torch.get_rng_state()):
            wrong.append(f"{where}: the random state")
        if not found.model.training:
            wrong.append(f"{where}: the mode")
        if name == "tied" and found.model.lm_head.weight is not found.model.model.embed_tokens.weight:
            wrong.append(f"{where}: embeddings are not tied")
    return wrong


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in the format of the hub (single experts, where it is so) and in that of transformers >= 5."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = whole(config=config).model
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_()
        model.save_pretrained(folder / name, max_shard_size="50KB")
        model.save_pretrained(folder / f"{name}-3d", save_original_format=False)
    return folder


@pytest.mark.parametrize(
    "names",
    [OFTEN, pytest.param([name for name in CONFIGS if name not in OFTEN], marks=pytest.mark.slow)],
    ids=["often", "others"],
)
def test_every_rank_has_its_shard_of_the_same_weights(checkpoints: Path, names: Sequence[str]) -> None:
    files = json.loads((checkpoints / "qwen3_moe" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 2 and any(".experts.0." in name for name in files)
    first, second = run_ranks(build_all, 2, str(checkpoints), names)
    assert first == [] and second == []


# -- errors -----------------------------------------------------------------------------------------------------------


def fail_all(folder: str) -> list[str]:
    messages = []
    for name in ("incomplete", "misshaped", "nowhere", "half" if dist.get_rank() else "good"):
        try:
            sharded(pretrained=f"{folder}/{name}")
            messages.append("no error")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    # nothing is left of what went wrong
    sharded(pretrained=f"{folder}/good")
    whole(config=CONFIGS["qwen3_moe"])(input_ids=torch.tensor([[1, 2]]))
    return messages


@pytest.mark.slow
def test_a_bad_checkpoint_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = whole(config=CONFIGS["qwen3_moe"]).model
    for name in ("good", "incomplete", "misshaped"):
        model.save_pretrained(tmp_path / name)
    path = tmp_path / "incomplete" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    path = tmp_path / "misshaped" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 8}))

    first, second = run_ranks(fail_all, 2, str(tmp_path))
    for incomplete in (first[0], second[0]):
        assert "lacks 1 weights of the model: model.layers.1.self_attn.o_proj.weight" in incomplete
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model: model\.layers\.1\.self_attn"):
        whole(pretrained=str(tmp_path / "incomplete"))
    assert "size mismatch" in first[1] and "rank 0 failed" in second[1] and "size mismatch" in second[1]
    assert all(message.startswith("MissingFileError") and "nowhere" in message for message in (first[2], second[2]))
    assert "rank 1 failed" in first[3] and second[3].startswith("MissingFileError")


# -- memory -----------------------------------------------------------------------------------------------------------

BIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 4000,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {**BIG, "num_hidden_layers": 1, "hidden_size": 16, "num_experts": 4, "vocab_size": 50}
MIB = 2**20


def held() -> int:
    """Bytes of this process that no file holds, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not say what a process holds")


@contextmanager
def growth(found: dict[str, float]) -> Iterator[None]:
    """How much more the process holds at most, and at the end, in MiB."""
    gc.collect()
    before, done, highest = held(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], held() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    gc.collect()
    found |= {"peak": highest[0] / MIB, "kept": (held() - before) / MIB}


def measure(source: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    # what is imported, connected and compiled once is not the model's
    sharded(**before)
    torch.manual_seed(0)
    found: dict[str, float] = {}
    with growth(found):
        module = sharded(**source)

    def size(*parts: nn.Module) -> float:
        return sum(weight.ds_numel * 4 / MIB for part in parts for weight in part.parameters(recurse=False))

    largest = max(size(block, *block.children()) for block in module.modules())
    return {**found, "largest": largest, "model": size(*module.modules())}


@pytest.mark.parametrize(
    "how",
    [pytest.param("fresh", marks=pytest.mark.slow), "hub format", pytest.param("3-D format", marks=pytest.mark.slow)],
)
def test_no_rank_ever_holds_the_model(how: str, tmp_path: Path) -> None:
    big: dict[str, Any] = {"config": BIG}
    small: dict[str, Any] = {"config": SMALL}
    if how != "fresh":
        for name, config in (("big", BIG), ("small", SMALL)):
            whole(config=config).model.save_pretrained(
                tmp_path / name, save_original_format=how == "hub format", max_shard_size="40MB"
            )
        big, small = {"pretrained": str(tmp_path / "big")}, {"pretrained": str(tmp_path / "small")}
    for rank, found in enumerate(run_ranks(measure, 2, big, small)):
        print(f"{how}, rank {rank}: {found}")
        assert found["model"] > 150
        # its half, the weights that are gathered around one module, and copies of these that are sent and rounded
        assert found["peak"] < found["model"] / 2 + 3 * found["largest"] + 8, found
        assert found["peak"] < 0.8 * found["model"], found
        assert found["kept"] < found["model"] / 2 + 16, found


# -- experts without tokens -------------------------------------------------------------------------------------------


def whole_on_rank_0(*weights: nn.Parameter) -> AbstractContextManager[None]:
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0)


class Steered(LitMoE):
    """Sends token 3 to the experts 0 and 1, token 4 to 2 and 3, and nothing to 4 and 5."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        tokens, router = self.model.model.embed_tokens.weight, self.model.model.layers[0].mlp.gate.weight
        with whole_on_rank_0(tokens, router), torch.no_grad():
            if tokens.numel():
                tokens[3, 0], tokens[4, 0] = 100.0, -100.0
                router.zero_()
                router[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])


def steer(family: str, ranks: int) -> dict[str, Any]:
    """Losses of the ranks' batches, the experts that each used, and the down-projections before and after."""
    L.seed_everything(0, verbose=False)
    config = {**CONFIGS[family], "num_hidden_layers": 1, "num_experts_per_tok": 2, "num_experts": 6}
    module = Steered(config=config, learning_rate=0.01, weight_decay=0.0, router_loss=0.0)
    ids = torch.tensor([[3] * 5, [4] * 5])
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids] * 3
    found: dict[str, Any] = {"losses": [], "weights": []}

    def note(trainer: L.Trainer, *args: Any) -> None:
        found["losses"] += [float(trainer.callback_metrics["train/loss"])] if args else []
        weight = module.model.model.layers[0].mlp.experts.down_proj
        with whole_on_rank_0(weight):
            found["weights"].append(weight.detach().clone())

    callback = L.pytorch.callbacks.LambdaCallback(
        on_train_start=lambda trainer, module: note(trainer), on_train_batch_end=note
    )
    settings: dict[str, Any] = {"max_epochs": 1, "callbacks": [callback], "use_distributed_sampler": False}
    if ranks == 1:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **settings,
        )  # fmt: skip
    else:
        trainer = trainer_with(3, **settings)
    trainer.fit(module, DataLoader(rows[trainer.global_rank :: ranks], batch_size=2 // ranks))
    with torch.no_grad():
        logits = module(input_ids=rows[trainer.global_rank]["input_ids"][None], output_router_logits=True).router_logits
    return {
        **found,
        "experts": sorted(set(logits[0].topk(2).indices.flatten().tolist())),
        "leaves": sum(getattr(part, "_z3_leaf", False) for part in module.modules()),
    }


def steer_all() -> list[dict[str, Any]]:
    return [steer(family, 2) for family in ("qwen3_moe", "olmoe")]


def test_ranks_may_need_other_experts_and_some_none() -> None:
    for family, first, second in zip(("qwen3_moe", "olmoe"), *run_ranks(steer_all, 2, group=False), strict=True):
        one = steer(family, 1)
        assert first["experts"] == [0, 1] and second["experts"] == [2, 3]
        # with and without what DeepSpeed does for families with experts that are modules of their own
        assert first["leaves"] == (family == "qwen3_moe")
        losses = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        assert losses == pytest.approx(one["losses"], rel=1e-5) and len(losses) == 3
        for (before, after), expected in zip(pairwise(first["weights"]), one["weights"][1:], strict=True):
            torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
            changed = (before != after).flatten(1).any(-1).tolist()
            assert changed == [True] * 4 + [False] * 2
