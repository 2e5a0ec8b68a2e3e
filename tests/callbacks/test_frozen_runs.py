"""Runs that train adapters on a frozen base: edits of the base are in no weights that train, and are not lost."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.callbacks.frozen import FrozenEdits
from lit_moeedit.edits import EditConflictError
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.history import EditSum
from tests.callbacks.conftest import _data, _editor, _module, _trainer
from tests.processes import run_ranks
from tests.sharding.test_history import some_deltas

peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {"model_type": "mixtral", "intermediate_size": 16, "num_local_experts": 6},
    "gpt_oss": {"model_type": "gpt_oss", "intermediate_size": 16, "num_local_experts": 6, "sliding_window": 16},
}


class Adapted(LitMoE):
    """LoRA on the attention of a frozen base; checkpoints can be without the base."""

    is_pruned = False
    targets: Any = ("q_proj", "v_proj")

    @override
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            assert self.model is not None
            torch.manual_seed(1)
            adapter = peft.LoraConfig(r=2, target_modules=list(self.targets), init_lora_weights=False)
            # DeepSpeed wants one dtype, and peft would make adapters of half precision float32
            self.model = peft.get_peft_model(self.model, adapter, autocast_adapter_dtype=False)
            self.strict_loading = not self.is_pruned

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        weights = super().state_dict(*args, **kwargs)
        return {name: value for name, value in weights.items() if not self.is_pruned or "lora_" in name}


class Undone(KnowledgeEditing):
    """Undoes its second edit."""

    @override
    def should_keep(self, before: Any, after: Any) -> bool:
        return self._edits_made != 1


def adapted(pruned: bool, **changes: Any) -> Adapted:
    module = _module(**changes)
    module.__class__ = Adapted
    module.is_pruned = pruned
    return module


def whole_weights(module: L.LightningModule) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    if not sharded:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def fit(
    folder: Path,
    checkpoint: Path | None = None,
    *,
    strategy: Any = "auto",
    precision: Any = "32-true",
    pruned: bool = False,
    kind: type[KnowledgeEditing] = KnowledgeEditing,
    family: str = "qwen3_moe",
    module: Adapted | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train for three epochs, edit three facts before the second, and three before the third; keep all checkpoints."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known

    torch.use_deterministic_algorithms(True)
    editing = kind(_editor(steps=3), at={"every_n_epochs": 1, "batch": 3}, on_failure="keep")
    kept = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    trainer = _trainer(
        folder, [editing, kept], strategy=strategy, devices=size, precision=precision, max_epochs=3, **changes
    )
    module, start = adapted(pruned, config=FAMILIES[family]) if module is None else module, {}

    class Looking(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            start.update(whole_weights(pl_module))

    trainer.callbacks.append(Looking())
    trainer.fit(module, _data(batch_size=8 // size, samples_per_epoch=16), ckpt_path=checkpoint, weights_only=False)
    frozen = next(callback for callback in trainer.callbacks if isinstance(callback, FrozenEdits))
    return {
        "weights": whole_weights(module),
        "start": start,
        "state": editing.state_dict(),
        "calls": len(editing.editor.calls),
        "edits": {name: [len(own.deltas) for own in sums] for name, sums in frozen.histories.items()},
        "metrics": editing.evaluate(module).metrics,
        "module": module,
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def experts_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if "down_proj" in name}


@pytest.mark.parametrize(
    ("precision", "pruned"),
    [
        ("32-true", True),
        ("bf16-true", True),
        ("bf16-true", False),
        pytest.param("bf16-mixed", True, marks=pytest.mark.slow),
        pytest.param("32-true", False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_edits_of_its_frozen_base(tmp_path: Path, precision: Any, pruned: bool) -> None:
    whole = fit(tmp_path / "whole", precision=precision, pruned=pruned)
    assert whole["calls"] == 2 and not same(experts_of(whole["start"]), experts_of(whole["weights"]))
    for epoch, calls in ((0, 2), (1, 1), (2, 0)):
        checkpoint = tmp_path / "whole" / "kept" / f"epoch={epoch}.ckpt"
        held = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert any("experts" in name for name in held) is not pruned
        resumed = fit(tmp_path / str(epoch), checkpoint, precision=precision, pruned=pruned)
        assert resumed["calls"] == calls
        assert same(resumed["weights"], whole["weights"]), epoch
        assert resumed["state"] == whole["state"]
        assert resumed["metrics"] == pytest.approx(whole["metrics"], nan_ok=True)


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run in bfloat16 whose checkpoints hold adapters only, and what it ended with."""
    folder = tmp_path_factory.mktemp("pruned")
    return folder, fit(folder, precision="bf16-true", pruned=True)


def test_another_base_is_refused(pruned_run: Any, tmp_path: Path) -> None:
    folder, _ = pruned_run
    with pytest.raises(EditConflictError, match=r"layers\.0\.mlp\.experts\.down_proj are neither the base of"):
        fit(tmp_path, folder / "kept" / "epoch=1.ckpt", precision="32-true", pruned=True)  # of another dtype


def test_a_checkpoint_has_all_changes_of_each_layer(pruned_run: Any) -> None:
    folder, whole = pruned_run
    state = torch.load(folder / "kept" / "epoch=2.ckpt", weights_only=True)
    saved = state["callbacks"]["FrozenEdits"]["layers"]
    assert {name: [len(own["deltas"]) for own in sums] for name, sums in saved.items()} == whole["edits"]
    assert set(whole["edits"]) == {f"model.layers.{index}.mlp.experts.down_proj" for index in (0, 1)}
    assert all(counts == [2] for counts in whole["edits"].values())


def test_a_module_that_was_edited_since_is_another_base(pruned_run: Any, tmp_path: Path) -> None:
    folder, whole = pruned_run
    for epoch, reason in ((0, "not those that the checkpoint's run had"), (1, "neither the base of")):
        checkpoint, module = folder / "kept" / f"epoch={epoch}.ckpt", whole["module"]
        with pytest.raises(EditConflictError, match=f"{reason}.* make a new one, which loads the base anew"):
            fit(tmp_path, checkpoint, precision="bf16-true", pruned=True, module=module)
        assert same(experts_of(whole_weights(module)), experts_of(whole["weights"]))
    resumed = fit(tmp_path, folder / "kept" / "epoch=2.ckpt", precision="bf16-true", pruned=True, module=module)
    assert same(resumed["weights"], whole["weights"])


def test_whole_checkpoints_take_the_place_of_a_base_that_was_edited_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tmp_path, precision="bf16-true")
    for epoch in (0, 1):
        checkpoint = tmp_path / "kept" / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path / str(epoch), checkpoint, precision="bf16-true", module=whole["module"])
        assert same(resumed["weights"], whole["weights"])
    assert "begins another sum" not in caplog.text
    other = adapted(False)
    other.configure_model()
    with torch.no_grad():
        for layer in expert_layers(find_model(other)).values():
            layer.down_proj.add_(1)
    with caplog.at_level("INFO", "lit_moeedit"):
        resumed = fit(tmp_path / "other", checkpoint, precision="bf16-true", module=other)
    assert caplog.text.count("begins another sum") == 1
    assert resumed["calls"] == 1 and all(counts == [1, 1] for counts in resumed["edits"].values())


def test_edits_stay_with_a_model_in_a_run_of_other_callbacks(pruned_run: Any, tmp_path: Path) -> None:
    folder, _ = pruned_run
    module = adapted(True)
    fit(tmp_path / "one", folder / "kept" / "epoch=2.ckpt", precision="bf16-true", pruned=True, module=module)
    later = fit(tmp_path / "two", precision="bf16-true", pruned=True, module=module)
    # many changes are joined to one
    assert later["calls"] == 2 and all(len(counts) == 1 for counts in later["edits"].values())
    checkpoint = tmp_path / "two" / "kept" / "epoch=2.ckpt"
    again = fit(tmp_path / "three", checkpoint, precision="bf16-true", pruned=True)
    assert again["calls"] == 0 and same(again["weights"], later["weights"])


def damaged(state: dict[str, Any], kind: str) -> None:
    layers = state["callbacks"]["FrozenEdits"]["layers"]
    own = layers["model.layers.0.mlp.experts.down_proj"][0]
    if kind == "index":
        own["deltas"][0]["row_index"] = own["deltas"][0]["row_index"] + 10**6
    elif kind == "expert":
        own["deltas"][0]["expert_index"][0] = -1
    elif kind == "shape":
        own["deltas"][0]["left"] = own["deltas"][0]["left"][0]
    elif kind == "number":
        own["after"].pop()
    elif kind == "layer":
        del layers["model.layers.0.mlp.experts.down_proj"]
    elif kind == "name":
        layers["model.layers.7.mlp.experts.down_proj"] = layers.pop("model.layers.0.mlp.experts.down_proj")
    else:
        own["deltas"][1]["right"] *= 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("index", r"layers\['model.layers.0.mlp.experts.down_proj'\]\[0\], deltas\[0\]: expected the low-rank factors"),
        ("expert", r"deltas\[0\]: expected the low-rank factors"),
        ("shape", r"deltas\[0\]: expected the low-rank factors"),
        ("number", "'deltas' and 'after' should have one entry for each edit, but have 2 and 1"),
        ("name", r"the frozen experts model\.layers\.7\.mlp\.experts\.down_proj, which this model does not have"),
        ("values", "cannot be made again bit for bit"),
        ("layer", r"the frozen experts model\.layers\.0\.mlp\.experts\.down_proj are not those that the checkpoint's"),
    ],
)
def test_a_damaged_state_is_refused(pruned_run: Any, tmp_path: Path, kind: str, message: str) -> None:
    state = torch.load(pruned_run[0] / "kept" / "epoch=2.ckpt", weights_only=True)
    damaged(state, kind)
    torch.save(state, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tmp_path / "damaged.ckpt", precision="bf16-true", pruned=True)


def test_an_evaluation_has_the_edits_too(pruned_run: Any, tmp_path: Path) -> None:
    folder, whole = pruned_run
    editing, module = (
        KnowledgeEditing(_editor(steps=3), at={"every_n_epochs": 1, "batch": 3}, on_failure="keep"),
        adapted(True),
    )
    trainer = _trainer(tmp_path, [editing], precision="bf16-true")
    trainer.validate(module, _data(), ckpt_path=folder / "kept" / "epoch=2.ckpt", weights_only=False)
    assert same(whole_weights(module), whole["weights"])
    assert trainer.callback_metrics["edit/efficacy"] == pytest.approx(whole["metrics"]["efficacy"])


def test_an_edit_of_a_frozen_base_is_undone_bit_by_bit(pruned_run: Any, tmp_path: Path) -> None:
    undone = fit(tmp_path, precision="bf16-true", pruned=True, kind=Undone)
    assert [len(undone["state"][name]) for name in ("applied", "undone")] == [3, 3]
    assert all(counts == [1] for counts in undone["edits"].values())
    first = fit(tmp_path / "again", pruned_run[0] / "kept" / "epoch=1.ckpt", precision="bf16-true", pruned=True)
    assert same(experts_of(first["start"]), experts_of(undone["weights"]))


class Unfreezing(L.Callback):
    """Trains the experts from the second epoch on."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            experts = [layer.down_proj for layer in expert_layers(find_model(pl_module)).values()]
            trainer.optimizers[0].add_param_group({"params": [p.requires_grad_(True) for p in experts]})


def test_experts_that_train_after_their_edit_are_in_checkpoints_alone(tmp_path: Path) -> None:
    editing, module = KnowledgeEditing(_editor(steps=3), at="fit_start", on_failure="keep"), adapted(False)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    trainer = _trainer(tmp_path, [editing, Unfreezing()], max_epochs=2)
    trainer.fit(module, _data())
    frozen = next(callback for callback in trainer.callbacks if isinstance(callback, FrozenEdits))
    assert len(editing.applied_facts) == 6 and not frozen.histories
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["callbacks"]["FrozenEdits"] == {"layers": {}, "fingerprints": {}}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_later_trainer_with_another_callback_keeps_what_is_known_of_a_model(tmp_path: Path, is_new: bool) -> None:
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    trainer = _trainer(tmp_path, [L.Callback(), L.Callback()])
    first, second = FrozenEdits(), FrozenEdits()
    first.take_up(model)
    first.histories["layer"] = history = (EditSum("base", (some_deltas(),), ("after",)),)
    if not is_new:
        second.take_up(other)
    assert second.add_to(trainer) is first.add_to(trainer) is second
    second.take_up(model)
    assert second.histories == {"layer": history} and not first.histories
    second.take_up(other)
    assert not second.histories


# -- two ranks --------------------------------------------------------------------------------------------------------


def whole_and_resumed(folder: str, strategy: Any, precision: Any, pruned: bool, family: str) -> list[dict[str, Any]]:
    """An uninterrupted run, and those that begin with its checkpoints, from before, between and after its edits."""
    if pruned and str(strategy).startswith("deepspeed"):
        from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

        strategy = DeepSpeedCPUStrategy(
            stage=int(strategy[-1]), exclude_frozen_parameters=True, param_persistence_threshold=0
        )
    settings = {"precision": precision, "pruned": pruned, "family": family}
    runs = [fit(Path(folder) / "whole", strategy=deepcopy(strategy), **settings)]
    for epoch in (0, 1, 2):
        checkpoint = Path(folder) / "whole" / "kept" / f"epoch={epoch}.ckpt"
        runs.append(fit(Path(folder) / str(epoch), checkpoint, strategy=deepcopy(strategy), **settings))
    for run in runs:
        del run["module"]  # engines cannot be sent
    return runs


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("strategy", "precision", "pruned", "family"),
    [
        pytest.param("deepspeed_cpu_stage_3", "bf16-true", True, "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_3", "bf16-true", False, "gpt_oss", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_3", "32-true", True, "mixtral", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_2", "bf16-true", True, "gpt_oss", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_2", "bf16-mixed", False, "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_1", "bf16-true", True, "mixtral", marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_0", "bf16-mixed", True, "qwen3_moe", marks=pytest.mark.slow),
        ("ddp", "32-true", True, "mixtral"),
        pytest.param("ddp", "bf16-true", False, "gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_several_ranks_resume_with_the_edits_of_their_frozen_base(
    tmp_path: Path, strategy: str, precision: Any, pruned: bool, family: str
) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    found = run_ranks(whole_and_resumed, 2, str(tmp_path), strategy, precision, pruned, family, group=False)
    for whole, *others in found:
        assert same(whole["weights"], found[0][0]["weights"])
        assert whole["calls"] == 2 and not same(experts_of(whole["start"]), experts_of(whole["weights"]))
        for resumed, calls in zip(others, (2, 1, 0), strict=True):
            assert resumed["calls"] == calls
            assert resumed["state"] == whole["state"]
            assert same(resumed["weights"], whole["weights"]), calls
