"""Runs of LitMoE with LoRA on experts, and with checkpoints of the adapter alone, and an edit in their middle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.checkpoints.export import export
from lit_moeedit.edits import EditConflictError
from lit_moeedit.module import LitMoE
from lit_moeedit.solvers import Tucker
from tests.callbacks.conftest import CONFIG, _data, _editor, _trainer
from tests.processes import run_ranks

peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "experts": {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def weights_of(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def fit(
    folder: Path, adapter: dict[str, Any], checkpoint: Path | None = None, base: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Train for three epochs; edit before the second, and renew the edit four steps later."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known

    torch.use_deterministic_algorithms(True)
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    solver, renewal = changes.pop("solver", None), changes.pop("renewal", "reuse")
    editing = KnowledgeEditing(
        _editor(steps=3, solver=solver), at={"epoch": 1}, renew_every_n_steps=3, on_failure="keep", renewal=renewal
    )
    kept = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [editing, RoutingMonitor(), EditReport(), kept]
    trainer = _trainer(folder, callbacks, devices=size, max_epochs=3, **changes)
    L.seed_everything(0, verbose=False)
    source = {"config": CONFIG} if base is None else {"pretrained": base, "adapter_only_checkpoints": True}
    module = LitMoE(**source, adapter=adapter, learning_rate=3e-3)
    start: dict[str, Tensor] = {}

    class Looking(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            start.update(weights_of(pl_module))

    trainer.callbacks.append(Looking())
    trainer.fit(module, _data(batch_size=8 // size, samples_per_epoch=16), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    changes_kept = editing._kept.changes
    return {
        "start": start, "weights": weights_of(module), "calls": len(editing.editor.calls), "changes": changes_kept,
    }  # fmt: skip


def changed(found: dict[str, Any]) -> set[str]:
    return {name for name, weight in found["weights"].items() if not torch.equal(weight, found["start"][name])}


def check(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    trained = {name for name in whole["weights"] if ".lora_" in name}
    edited = changed(whole) - trained
    assert trained <= changed(whole) and whole["calls"] == 2
    assert len(edited) == 2 and all(name.endswith(".experts.base_layer.base_layer.down_proj") for name in edited)
    assert resumed["calls"] == 1  # the renewal
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize(
    ("adapter", "solver"), [("all-linear", None), pytest.param("experts", Tucker, marks=pytest.mark.slow)]
)
def test_lora_on_experts(adapter: str, solver: Any, tmp_path: Path) -> None:
    made = {"solver": solver and solver()}
    whole = fit(tmp_path, ADAPTERS[adapter], **made)
    resumed = fit(tmp_path / "again", ADAPTERS[adapter], tmp_path / "kept" / "epoch=1.ckpt", **made)
    check(whole, resumed)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 6 and summary["routing"]["per_layer"]


def test_a_replaced_edit_of_a_frozen_base_leaves_no_trace(tmp_path: Path) -> None:
    """Its changes are rounded once, as those of the new edit alone would be."""
    whole = fit(tmp_path, ADAPTERS["all-linear"], renewal="replace")
    edited = {name for name in changed(whole) if ".lora_" not in name}
    assert whole["calls"] == 2 and len(edited) == 2
    (change,) = whole["changes"]
    for name in edited:
        index = int(name.partition(".layers.")[2].partition(".")[0])
        dense = torch.stack([change.deltas[index].to(torch.float64).dense(expert) for expert in range(6)])
        assert torch.equal(whole["weights"][name], (whole["start"][name].double() + dense).float())


RUNS = [("ddp", "32-true", "all-linear"), ("deepspeed_cpu_stage_2", "bf16-true", "experts")]


def run_all(folder: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = []
    for number, (strategy, precision, adapter) in enumerate(RUNS):
        path, settings = Path(folder) / str(number), {"strategy": strategy, "precision": precision}
        whole = fit(path, ADAPTERS[adapter], **settings)
        resumed = fit(path / "again", ADAPTERS[adapter], path / "kept" / "epoch=1.ckpt", **settings)
        found.append((whole, resumed))
    return found


@pytest.mark.slow
@pytest.mark.deepspeed
def test_lora_on_experts_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    for results in run_ranks(run_all, 2, str(tmp_path), group=False):
        for whole, resumed in results:
            check(whole, resumed)


def test_checkpoints_of_the_adapter_alone_keep_the_edit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    base.save_pretrained(tmp_path / "base")
    data = _data()
    data.setup("fit")
    data.tokenizer.save_pretrained(tmp_path / "base")
    attention = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    whole = fit(tmp_path, attention, base=str(tmp_path / "base"))
    saved = torch.load(tmp_path / "kept" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert saved and all(".lora_" in name for name in saved)
    resumed = fit(tmp_path / "again", attention, tmp_path / "kept" / "epoch=1.ckpt", base=str(tmp_path / "base"))
    assert resumed["calls"] == 1 and len(changed(whole)) == 8 + 2
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for checkpoint in (tmp_path / "kept" / "epoch=2.ckpt", tmp_path / "weights.ckpt"):
        loaded = weights_of(LitMoE.load_from_checkpoint(checkpoint, weights_only=True))
        assert all(torch.equal(loaded[name], weight) for name, weight in whole["weights"].items())
        module = LitMoE(pretrained=str(tmp_path / "base"), adapter=attention, adapter_only_checkpoints=True)
        assert loaded.keys() == whole["weights"].keys()
        with pytest.raises(MisconfigurationException, match="give the Trainer the KnowledgeEditing callback of that"):
            _trainer(tmp_path, []).validate(module, _data(), ckpt_path=checkpoint, weights_only=True)
    # a later run with that module knows the edits of the base
    module = LitMoE.load_from_checkpoint(tmp_path / "kept" / "epoch=2.ckpt", weights_only=True)
    trainer = _trainer(tmp_path / "later", [KnowledgeEditing(_editor(steps=3))], max_epochs=1)
    trainer.fit(module, _data())
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    loaded = weights_of(LitMoE.load_from_checkpoint(tmp_path / "later.ckpt", weights_only=True))
    assert all(torch.equal(loaded[name], weight) for name, weight in weights_of(module).items())
    with pytest.raises(MisconfigurationException, match="WeightAveraging cannot load its average from checkpoints"):
        _trainer(tmp_path, [EMAWeightAveraging()]).fit(module, _data())
    export(tmp_path / "kept" / "epoch=2.ckpt", tmp_path / "out", adapter="separate")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    edited = {name.removeprefix("model.base_model.model."): weight for name, weight in whole["weights"].items()}
    experts = {name: weight for name, weight in exported.named_parameters() if name.endswith("experts.down_proj")}
    assert len(experts) == 2 and all(torch.equal(weight, edited[name]) for name, weight in experts.items())

    export(tmp_path / "kept" / "epoch=2.ckpt", tmp_path / "folded")
    adapted = peft.PeftModel.from_pretrained(exported, str(tmp_path / "out" / "adapter")).eval()
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        # folded in, the adapter's change is rounded together with the weight
        torch.testing.assert_close(folded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=5e-5)

    lacking = torch.load(tmp_path / "kept" / "epoch=2.ckpt", weights_only=True)
    del lacking["callbacks"]["FrozenEdits"]["layers"]["model.layers.0.mlp.experts.down_proj"]
    torch.save(lacking, tmp_path / "lacking.ckpt")
    with pytest.raises(EditConflictError, match=r"layers\.0\.mlp\.experts\.down_proj are not those that"):
        export(tmp_path / "lacking.ckpt", tmp_path / "wrong")

    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(EditConflictError, match="neither the base of the checkpoint's edits nor"):
        export(tmp_path / "kept" / "epoch=2.ckpt", tmp_path / "wrong", model=str(tmp_path / "other"))
    assert not (tmp_path / "wrong").exists()
