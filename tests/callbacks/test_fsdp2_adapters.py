"""LoRA on a frozen base under ``ModelParallelStrategy``: checkpoints without the base, which is edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import check_harmless, read_checkpoint
from lit_moeedit.edits import EditConflictError
from lit_moeedit.models.experts import find_model
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.backends import settle
from tests.callbacks.conftest import CONFIG, _data, _editor, _trainer
from tests.callbacks.test_fsdp2_runs import full, same
from tests.processes import run_ranks

peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
ATTENTION: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


class RootAlone(LitMoE):
    """Shards the model in one group, which stays gathered after an evaluation, rounded to bfloat16."""

    @override
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            assert self.device_mesh is not None
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            fully_shard(find_model(self), mesh=self.device_mesh["data_parallel"], mp_policy=policy)
            self._is_sharded = True


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(tmp_path / "base")
    data = _data()
    data.setup("fit")
    assert data.tokenizer is not None
    data.tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def fit(
    folder: str,
    base: str,
    checkpoint: str | None = None,
    is_folder: bool = True,
    kind: type[LitMoE] = LitMoE,
    precision: Any = "32-true",
    adapter: Any = None,
    alone: bool = True,
) -> dict[str, Any]:
    """Train for three epochs, edit half of the facts before the second and half before the third; keep checkpoints."""
    torch.use_deterministic_algorithms(True)
    editing = KnowledgeEditing(_editor(steps=3), at={"every_n_epochs": 1, "batch": 3}, on_failure="keep")
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy: Any = ModelParallelStrategy(2, 1, save_distributed_checkpoint=is_folder)
    trainer = _trainer(folder, [editing, kept], strategy=strategy, devices=2, max_epochs=3, precision=precision)
    L.seed_everything(0, verbose=False)
    module = kind(pretrained=base, adapter=adapter or ATTENTION, adapter_only_checkpoints=alone, learning_rate=3e-3)
    trainer.fit(module, _data(batch_size=4, samples_per_epoch=16), ckpt_path=checkpoint, weights_only=True)
    settle(find_model(module))
    return {
        "weights": {name: full(weight) for name, weight in module.named_parameters()},
        "state": editing.state_dict(),
        "calls": len(editing.editor.calls),
    }


def resumed(folder: str, base: str, epochs: list[int], **settings: Any) -> list[dict[str, Any]]:
    """A run to its end, and those that begin with its checkpoints."""
    runs = [fit(f"{folder}/whole", base, **settings)]
    for epoch in epochs:
        runs.append(fit(f"{folder}/from_{epoch}", base, f"{folder}/whole/kept/epoch={epoch}.ckpt", **settings))
    return runs


def check(runs: list[dict[str, Any]], calls: list[int], base: str, dtype: torch.dtype = torch.float32) -> None:
    whole, *others = runs
    original = AutoModelForCausalLM.from_pretrained(base).to(dtype).float().state_dict()
    weights = {name.removeprefix("model.base_model.model."): value for name, value in whole["weights"].items()}
    changed = {name for name, value in original.items() if name in weights and not torch.equal(weights[name], value)}
    assert changed == {f"model.layers.{index}.mlp.experts.down_proj" for index in (0, 1)}
    assert whole["calls"] == 2
    for run, expected in zip(others, calls, strict=True):
        assert run["calls"] == expected
        assert run["state"] == whole["state"]
        assert same(run["weights"], whole["weights"])


def test_a_run_resumes_and_exports_from_folders_without_the_base(tmp_path: Path, base: str) -> None:
    for runs in run_ranks(resumed, 2, str(tmp_path), base, [1], group=False):
        check(runs, [1], base)
    path, weights = tmp_path / "whole" / "kept" / "epoch=2.ckpt", runs[0]["weights"]
    check_harmless(path)
    assert read_checkpoint(path).tensors.keys() == {name for name in weights if ".lora_" in name}
    check_export(path, weights, tmp_path)

    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(EditConflictError, match="neither the base of the checkpoint's edits nor"):
        export(path, tmp_path / "wrong", model=str(tmp_path / "other"))
    assert not (tmp_path / "wrong").exists()


def check_export(path: Path, weights: dict[str, Tensor], folder: Path) -> None:
    """Check the base with its edits, the adapter beside it, and the adapter folded in."""
    export(path, folder / "out", adapter="separate")
    exported = AutoModelForCausalLM.from_pretrained(folder / "out")
    edited = {name: value for name, value in exported.named_parameters() if name.endswith("experts.down_proj")}
    assert len(edited) == 2
    for name, value in edited.items():
        assert torch.equal(value, weights[f"model.base_model.model.{name}"]), name
    adapted = peft.PeftModel.from_pretrained(exported, str(folder / "out" / "adapter")).eval()
    found = {name: value for name, value in adapted.named_parameters() if ".lora_" in name}
    assert len(found) == 8 and all(torch.equal(value, weights[f"model.{name}"]) for name, value in found.items())
    export(path, folder / "folded")
    folded = AutoModelForCausalLM.from_pretrained(folder / "folded").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        # folded in, the adapter's change is rounded together with the weight
        torch.testing.assert_close(folded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=5e-5)


OTHERS: dict[str, dict[str, Any]] = {
    "file": {"is_folder": False},
    "root alone": {"kind": RootAlone},
    "bfloat16": {"precision": "bf16-true"},
}


def all_resumed(folder: str, base: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    found = {name: resumed(f"{folder}/{name}", base, [0, 1, 2], **settings) for name, settings in OTHERS.items()}
    lacking = Path(folder, "lacking.ckpt")
    if dist.get_rank() == 0:
        contents = torch.load(f"{folder}/file/whole/kept/epoch=1.ckpt", weights_only=True)
        contents["state_dict"].popitem()
        torch.save(contents, lacking)
    dist.barrier()
    with pytest.raises(ValueError) as caught:
        fit(f"{folder}/lacking", base, str(lacking), is_folder=False)
    return found, str(caught.value)


@pytest.mark.slow
def test_other_checkpoints_without_the_base(tmp_path: Path, base: str) -> None:
    for found, message in run_ranks(all_resumed, 2, str(tmp_path), base, group=False):
        assert "lacking.ckpt is not a checkpoint of this model: it lacks model.base_model" in message
        for name, runs in found.items():
            check(runs, [2, 1, 0], base, torch.bfloat16 if name == "bfloat16" else torch.float32)
    path = tmp_path / "file" / "whole" / "kept" / "epoch=2.ckpt"
    assert path.is_file()
    check_export(path, found["file"][0]["weights"], tmp_path)


OTHER_ADAPTERS: dict[str, Any] = {
    "it also has model.base_model.model.model.layers.0.self_attn.v_proj.lora_A": {"target_modules": ["q_proj"]},
    "it lacks model.base_model.model.model.layers.0.self_attn.o_proj.lora_A": {
        "target_modules": ["q_proj", "v_proj", "o_proj"]
    },
    "of other shapes are model.base_model.model.model.layers.0.self_attn.q_proj.lora_A": {"r": 4},
}


def resumed_with_others(folder: str, base: str) -> None:
    for is_folder in (True, False):
        path = f"{folder}/{is_folder}"
        fit(path, base, is_folder=is_folder)
        for message, changes in OTHER_ADAPTERS.items():
            with pytest.raises(ValueError, match=f"epoch=1.ckpt is not a checkpoint of this model: {message}"):
                fit(f"{path}/other", base, f"{path}/kept/epoch=1.ckpt", is_folder, adapter={**ATTENTION, **changes})
        with pytest.raises(ValueError, match="adapter_only_checkpoints of this module is False"):
            fit(f"{path}/other", base, f"{path}/kept/epoch=1.ckpt", is_folder, alone=False)


@pytest.mark.slow
def test_checkpoints_of_another_adapter_are_refused(tmp_path: Path, base: str) -> None:
    run_ranks(resumed_with_others, 2, str(tmp_path), base, group=False)
