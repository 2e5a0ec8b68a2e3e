"""Models that ranks read as shards for FSDP2: the same weights as a whole model, which no rank ever holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from lit_moeedit.module import LitMoE
from tests.conftest import COMMON, FAMILIES
from tests.processes import run_ranks
from tests.sharding.fsdp2_models import Case, prepared
from tests.sharding.small_edits import FACTS, TEXTS, editor, tokenizer
from tests.sharding.test_loading import BIG, CONFIGS, MIB, SMALL, growth, whole

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def sharded(precision: Any = "32-true", **arguments: Any) -> LitMoE:
    """As far as the Trainer goes before it moves the model to its device."""
    size = dist.get_world_size()
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=size, strategy=strategy, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = LitMoE(**arguments)
    module.trainer = trainer
    strategy.connect(module)
    strategy.setup_environment()
    call._call_configure_model(trainer)
    return module


def differences(expected: LitMoE, found: LitMoE) -> list[str]:
    """Names of parameters and buffers of which a bit, the dtype, the training or the place is not as expected."""
    wrong = []
    parameters, buffers = dict(found.named_parameters()), dict(found.named_buffers())
    if list(parameters) != [name for name, _ in expected.named_parameters()]:
        return ["the names of the parameters"]
    for name, weight in expected.named_parameters():
        own = parameters[name]
        assert isinstance(own, DTensor), name
        value = own.detach().full_tensor()
        same = value.dtype == weight.dtype and own.requires_grad == weight.requires_grad and torch.equal(value, weight)
        wrong += [] if same else [name]
    wrong += [name for name, buffer in expected.named_buffers() if not torch.equal(buffers[name], buffer)]
    return wrong


def load_all(folder: str, names: Sequence[str], **further: Any) -> list[str]:
    wrong = []
    for name in names:
        for path, dtype in ((name, "float32"), (name, "bfloat16"), (f"{name}-3d", "float32")):
            arguments = {"pretrained": f"{folder}/{path}", "dtype": dtype, **further}
            torch.manual_seed(dist.get_rank())
            found = sharded(**arguments)
            torch.manual_seed(0)
            expected = whole(**arguments)
            wrong += [f"{path}, {dtype}: {which}" for which in differences(expected, found)]
            if dtype == "float32":
                ids = torch.arange(2, 12)[None]
                wrong += [] if torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits) else [name]
            assert found.model is not None and not hasattr(found.model.config, "distributed_config")
            tied = name != "tied" or found.model.lm_head.weight is found.model.model.embed_tokens.weight
            wrong += [] if tied else [f"{name}: embeddings are not tied"]
    return wrong


def save(folder: Path, name: str) -> None:
    """Save a model in the format of the hub (single experts, where it is so) and in that of transformers >= 5."""
    torch.manual_seed(1)
    model = whole(config=CONFIGS[name]).model
    assert model is not None
    model.save_pretrained(folder / name, max_shard_size="50KB")
    model.save_pretrained(folder / f"{name}-3d", save_original_format=False)


# in the default suite test_fsdp2_adapters reads a model and exports it
@pytest.mark.slow
def test_every_rank_has_its_shard_of_the_same_weights(tmp_path: Path) -> None:
    for name in CONFIGS:
        save(tmp_path, name)
    assert run_ranks(load_all, 2, str(tmp_path), list(CONFIGS)) == [[], []]


@pytest.mark.slow
def test_four_ranks_some_without_experts(tmp_path: Path) -> None:
    for name in ("qwen3_moe", "gpt_oss"):  # of 6 experts, of which the last rank has none, and 5
        save(tmp_path, name)
    assert run_ranks(load_all, 4, str(tmp_path), ["qwen3_moe", "gpt_oss"]) == [[]] * 4


PACKED = {
    "model_type": "kimi_linear", **COMMON, **FAMILIES["deepseek_v3"], "q_lora_rank": None, "num_local_experts": 8,
    "linear_head_dim": 16, "linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
"""Of each linear attention, the files have three convolutions, and the model has one."""


def load_packed(folder: str) -> tuple[list[str], str]:
    expected = whole(pretrained=folder)
    try:
        sharded(pretrained=folder, expert_parallel_size=2)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return differences(expected, sharded(pretrained=folder)), refusal


@pytest.mark.slow
def test_rows_of_weights_that_files_have_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = whole(config={**PACKED, "num_hidden_layers": 4}).model
    assert model is not None
    model.save_pretrained(tmp_path)
    for wrong, refusal in run_ranks(load_packed, 2, str(tmp_path)):
        assert wrong == []
        # transformers concatenates the rows that it reads of each part
        assert "parts of the weights self_attn.conv1d.weight" in refusal


def with_adapters(folder: str) -> list[str]:
    adapters = (LORA, LORA | {"modules_to_save": ["lm_head"], "use_dora": True}, LORA | {"bias": "all"})
    return [wrong for adapter in adapters for wrong in load_all(folder, ["qwen3_moe", "gpt_oss"], adapter=adapter)]


@pytest.mark.slow
def test_adapters_are_those_of_the_first_rank(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
    for name in ("qwen3_moe", "gpt_oss"):
        save(tmp_path, name)
    assert run_ranks(with_adapters, 2, str(tmp_path)) == [[], []]


def fail_all(folder: str) -> list[str]:
    messages = []
    for name in ("incomplete", "misshaped", "nowhere", "half" if dist.get_rank() else "qwen3_moe"):
        with pytest.raises(Exception) as caught:
            sharded(pretrained=f"{folder}/{name}")
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    # nothing is left of what went wrong
    return [*messages, *load_all(folder, ["qwen3_moe"])]


@pytest.mark.slow
def test_a_bad_checkpoint_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    for name in ("incomplete", "misshaped"):
        shutil.copytree(tmp_path / "qwen3_moe-3d", tmp_path / name)
    weights = load_file(tmp_path / "incomplete" / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, tmp_path / "incomplete" / "model.safetensors", {"format": "pt"})
    config = tmp_path / "misshaped" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 8}))
    first, second = run_ranks(fail_all, 2, str(tmp_path))
    for found in (first, second):
        assert len(found) == 4
        assert "lacks 1 weights of the model: model.layers.1.self_attn.o_proj.weight" in found[0]
        assert "other shapes" in found[1]
        assert found[2].startswith("MissingFileError") and "nowhere" in found[2]
    assert "rank 1 failed" in first[3] and second[3].startswith("MissingFileError")


# -- memory -----------------------------------------------------------------------------------------------------------


def measure(big: str, small: str, further: dict[str, Any]) -> dict[str, float]:
    # what is imported, connected and compiled once is not the model's
    sharded(pretrained=small, **further)
    found: dict[str, float] = {}
    with growth(found):
        module = sharded(pretrained=big, **further)
    sizes = {name: weight.numel() * 4 / MIB for name, weight in module.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    return {**found, "layer": layer, "model": sum(sizes.values())}


@pytest.mark.slow
@pytest.mark.parametrize("further", [{}, {"adapter": LORA}], ids=["all weights train", "adapter"])
@pytest.mark.parametrize("original", [True, False], ids=["hub format", "3-D format"])
def test_no_rank_ever_holds_the_model(tmp_path: Path, original: bool, further: dict[str, Any]) -> None:
    for name, config in (("big", BIG), ("small", SMALL)):
        model = whole(config=config).model
        assert model is not None
        model.save_pretrained(tmp_path / name, save_original_format=original, max_shard_size="40MB")
    for found in run_ranks(measure, 2, str(tmp_path / "big"), str(tmp_path / "small"), further):
        assert found["model"] > 150
        # its half, and the experts of a layer as they are read and stacked, for both projections
        assert found["peak"] < found["model"] / 2 + 2 * found["layer"] + 8, found
        assert found["peak"] < 0.8 * found["model"], found
        assert found["kept"] < found["model"] / 2 + 16, found


def most_gathered(work: Callable[[], Any], model: Any) -> set[frozenset[str]]:
    """The sets of groups that are gathered at the same time, by names."""
    found: set[frozenset[str]] = set()
    unshard = FSDPParamGroup.wait_for_unshard

    def watched(group: Any) -> None:
        unshard(group)
        groups = [own for part in model.modules() if isinstance(part, FSDPModule)
                  for own in part._get_fsdp_state()._fsdp_param_groups]  # fmt: skip
        found.add(frozenset(own._module_fqn for own in groups if own.is_unsharded))

    with mock.patch.object(FSDPParamGroup, "wait_for_unshard", watched):
        work()
    return found


def gathered_in_an_edit() -> set[frozenset[str]]:
    model, optimizer = prepared(Case(), steps=1)
    return most_gathered(lambda: editor().edit(model, tokenizer(), FACTS, TEXTS, optimizers=[optimizer]), model)


def test_an_edit_gathers_one_layer_at_a_time() -> None:
    for found in run_ranks(gathered_in_an_edit, 2):
        # the root's own group, which has the embeddings and the head, has no name
        layers = {name for names in found for name in names if name}
        assert layers == {f"model.layers.{index}" for index in range(3)}
        assert all(len(names - {""}) <= 1 for names in found)
