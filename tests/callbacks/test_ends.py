"""How runs end: no weight is needed after the strategy's teardown, and a measurement that fails costs itself only."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor, measuring
from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE
from tests.processes import run_ranks


class Poisoned(RuntimeError):
    """A weight was used after the teardown."""


class Weight(torch.nn.Parameter):
    """One that cannot be used any more."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Poisoned(f"{function} after the teardown")


class Poisoning(SingleDeviceStrategy):
    """Leaves weights that raise, whoever uses them."""

    poisoned = 0

    def teardown(self) -> None:
        super().teardown()
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            module.forward = _raise  # type: ignore[method-assign]
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = weight.data.as_subclass(Weight)
                    self.poisoned += 1


def _raise(*_: Any, **__: Any) -> None:
    raise Poisoned("a forward after the teardown")


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Run with all callbacks; returns the trainer and the module."""

    def start(*more: L.Callback, fn: str = "fit", at: Any = None, ckpt: Any = None, **keys: Any) -> Any:
        at = {"epoch": 0} if at is None and fn == "fit" else at or "validation"
        made = [KnowledgeEditing(tiny.editor(), at=at), RoutingMonitor(), EditReport(console=False), *more]
        trainer, module = make_trainer(keys.pop("folder", tmp_path), made, **keys), tiny.module()
        resumed = {"ckpt_path": ckpt, "weights_only": True} if ckpt else {}
        getattr(trainer, fn)(module, datamodule=tiny.data(samples_per_epoch=16), **resumed)
        return trainer, module

    return start


# -- after the teardown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", ["fit", "validate", "test", "predict"])
def test_nothing_needs_a_weight_after_the_teardown(run: Any, tmp_path: Path, fn: str) -> None:
    strategy = Poisoning(device=torch.device("cpu"))
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    _, module = run(kept, fn=fn, strategy=strategy)
    assert strategy.poisoned > 10
    with pytest.raises(Poisoned):
        module.model(torch.ones(1, 2, dtype=torch.long))
    for weight in module.parameters():
        with pytest.raises(Poisoned):
            weight + 1
    if fn == "predict":
        assert not (tmp_path / "summary.json").exists()
        return
    summary = _read(tmp_path)
    assert summary["edits"] == 6 and "failed" not in summary
    assert (summary["after_training"] is not None) == (fn == "fit")


def test_what_needs_a_weight_after_the_teardown_is_found(run: Any) -> None:
    class Late(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            next(iter(pl_module.parameters())).sum()

    with pytest.raises(Poisoned):
        run(Late(), strategy=Poisoning(device=torch.device("cpu")))


# -- other ends of a run ----------------------------------------------------------------------------------------------


def test_a_run_that_stops_early_is_measured_at_its_end(run: Any, tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", patience=0, min_delta=100.0)
    trainer, _ = run(stop, max_epochs=9)
    assert trainer.current_epoch < 9
    found = _read(tmp_path)["after_training"]
    assert found["efficacy"] == pytest.approx(float(trainer.callback_metrics["edit/efficacy"]))


@pytest.mark.parametrize("max_epochs", [1, 0])
def test_a_run_that_is_resumed_after_its_last_epoch_measures_its_end(run: Any, tmp_path: Path, max_epochs: int) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="it", save_on_train_epoch_end=True)
    run(kept)
    whole = _read(tmp_path)
    # as if the process had been killed after its last checkpoint: Lightning trains nothing then, and calls few hooks
    run(folder=tmp_path / "again", ckpt=tmp_path / "kept" / "it.ckpt", max_epochs=max_epochs)
    again = _read(tmp_path / "again")
    assert whole["after_training"]["efficacy"] is not None and whole["perplexity"]["after_training"] > 1
    assert again["seconds"]["fit"] > again["seconds"]["edit"]
    for summary in (whole, again):
        del summary["seconds"]["fit"]
    assert again.pop("perplexity") == pytest.approx(whole.pop("perplexity"))
    assert again == whole


def _ends_under_zero(folder: str) -> None:
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    for name, ckpt in (("run", None), ("again", f"{folder}/kept/it.ckpt")):
        # before the editing callback, whose state is the later one to be restored
        kept = ModelCheckpoint(f"{folder}/kept", filename="it", save_on_train_epoch_end=True)
        callbacks = [EditReport(console=False), KnowledgeEditing(_editor(), at={"epoch": 0}), RoutingMonitor(), kept]
        trainer = _trainer(f"{folder}/{name}", callbacks, strategy="deepspeed_cpu_stage_3", devices=2)
        trainer.fit(_module(), _data(batch_size=4, samples_per_epoch=16), ckpt_path=ckpt)


@pytest.mark.deepspeed
@pytest.mark.slow
def test_the_end_is_measured_under_zero_3_too(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    run_ranks(_ends_under_zero, 2, str(tmp_path), group=False, seconds=100)
    whole, again = _read(tmp_path / "run"), _read(tmp_path / "again")
    assert whole["after_training"]["efficacy"] is not None
    for name in ("edits", "before", "after", "after_training", "routing"):
        assert again[name] == whole[name], name
    assert again["perplexity"] == pytest.approx(whole["perplexity"])


def test_averaged_weights_are_what_is_measured(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    average = WeightAveraging(avg_fn=lambda mean, new, _: mean * 0.5 + new * 0.5)
    editing = KnowledgeEditing(tiny.editor(), at={"epoch": 0})
    trainer, module = make_trainer(tmp_path, [average, editing, EditReport(console=False)], max_epochs=2), tiny.module()
    module.configure_model()  # WeightAveraging copies what is there at the setup
    trainer.fit(module, tiny.data(samples_per_epoch=16))
    perplexity = trainer.validate(module, tiny.data(samples_per_epoch=16), verbose=False)[0]["val/perplexity"]
    assert _read(tmp_path)["perplexity"]["after_training"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("where", ["training", "measuring"])
def test_an_interrupt_goes_through(run: Any, tmp_path: Path, where: str) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Stop(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    try:
        with pytest.raises(SystemExit) as exit, _failing("perplexity", KeyboardInterrupt(), only="after_training"):
            run(*([Stop()] if where == "training" else []))
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert exit.value.code == 1
    assert not (tmp_path / "summary.json").exists()


def test_a_run_that_raises_writes_no_summary(run: Any, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise ValueError("it ends here")

    with pytest.raises(ValueError, match="it ends here"):
        run(Stop())
    assert not (tmp_path / "summary.json").exists()


# -- measurements that fail -------------------------------------------------------------------------------------------


def _failing(what: str, error: BaseException, only: str | None = None) -> Any:
    """The function ``what`` of the measuring raises, at one moment only if that is given."""
    original, moments = getattr(measuring, what), iter(("before", "after", "after_training"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if only in (None, next(moments, None)):
            raise error
        return original(*args, **kwargs)

    return patch.object(measuring, what, fail)


def test_a_failed_measurement_is_named_and_costs_nothing_else(run: Any, tmp_path: Path, caplog: Any) -> None:
    _, untouched = run(folder=tmp_path / "whole", max_epochs=2)
    original = KnowledgeEditing.evaluate

    def evaluate(self: KnowledgeEditing, pl_module: Any, *args: Any) -> Any:
        if pl_module.trainer.fit_loop.done:
            raise MemoryError("no room to evaluate")
        return original(self, pl_module, *args)

    failing = _failing("perplexity", ZeroDivisionError("no tokens"), only="after_training")
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with patch.object(KnowledgeEditing, "evaluate", evaluate), failing:
        trainer, module = run(kept, max_epochs=2)
    assert trainer.state.finished
    whole, summary = _read(tmp_path / "whole"), _read(tmp_path)
    assert summary["failed"] == {
        "perplexity after_training": "ZeroDivisionError: no tokens",
        "after_training": "MemoryError: no room to evaluate",
    }
    assert summary["after_training"] is None and summary["perplexity"]["after_training"] is None
    assert "failed" not in whole
    for name in ("edits", "before", "after", "routing"):
        assert summary[name] == whole[name]
    assert summary["perplexity"]["after"] == whole["perplexity"]["after"]
    for text in ("could not measure after_training: MemoryError: no room", "ZeroDivisionError: no tokens"):
        assert text in caplog.text
    for weight, other in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert (tmp_path / "kept" / "last.ckpt").exists()


def test_a_failure_beside_an_edit_is_named_in_a_resumed_run_too(run: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="it", save_on_train_epoch_end=True)
    with _failing("perplexity", MemoryError("no room"), only="before"):
        run(kept)
    assert _read(tmp_path)["failed"] == {"perplexity before": "MemoryError: no room"}
    run(folder=tmp_path / "again", ckpt=tmp_path / "kept" / "it.ckpt", max_epochs=2)
    again = _read(tmp_path / "again")
    # what was before the edit cannot be measured after it
    assert again["failed"] == {"perplexity before": "MemoryError: no room"}
    assert again["perplexity"]["before"] is None and again["perplexity"]["after_training"] > 1


def test_several_validation_loaders_are_measured_together(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Several(LitMoE):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    one = FactsDataModule.val_dataloader
    found = []
    for loaders in (one, lambda data: [one(data), one(data)]):
        monkeypatch.setattr(FactsDataModule, "val_dataloader", loaders)
        L.seed_everything(0, verbose=False)
        trainer = make_trainer(tmp_path, [KnowledgeEditing(tiny.editor()), EditReport(console=False)])
        trainer.fit(Several(config=tiny.config), tiny.data(samples_per_epoch=16))
        found.append(_read(tmp_path)["perplexity"]["after_training"])
    # twice the same: sums of float32
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def ends(folder: str) -> dict[str, Any]:
    """Runs of two ranks in which rank 1 fails at the end: in a measurement, reading a batch, and by an interrupt."""
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    rank, said = int(os.environ["RANK"]), {}

    class Bad(KnowledgeEditing):
        def evaluate(self, pl_module: Any, *args: Any) -> Any:
            if rank == 1 and pl_module.trainer.fit_loop.done:
                raise MemoryError("no room on one rank")
            return super().evaluate(pl_module, *args)

    original = measuring.perplexity
    error: BaseException = OSError("the disk is gone")

    def batches(loader: Any) -> Any:
        yield from list(loader)[:1]
        raise error

    def perplexity(model: Any, loader: Any, ranks: Any) -> float:
        broken = rank == 1 and editing.applied_facts and trainer.fit_loop.done
        return original(model, batches(loader) if broken else loader, ranks)

    for name, strategy in (("failure", "deepspeed_cpu_stage_3"), ("interrupt", "ddp")):
        editing = Bad(_editor(), at={"epoch": 0})
        trainer = _trainer(f"{folder}/{name}", [editing, EditReport(console=False)], strategy=strategy, devices=2)
        try:
            with patch.object(measuring, "perplexity", perplexity):
                trainer.fit(_module(), _data(batch_size=4, samples_per_epoch=16))
            said[name] = "finished"
        except BaseException as caught:
            said[name] = f"{type(caught).__name__}: {caught}"
        error = KeyboardInterrupt("stop")
    return said


@pytest.mark.deepspeed
def test_what_fails_on_one_rank_fails_on_all_and_nobody_waits(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    first, second = run_ranks(ends, 2, str(tmp_path), group=False, seconds=60)
    assert first["failure"] == second["failure"] == "finished"
    summary = _read(tmp_path / "failure")
    assert summary["failed"] == {
        "perplexity after_training": "RankError: rank 1 failed: OSError: the disk is gone",
        "after_training": "RankError: rank 1 failed: MemoryError: no room on one rank",
    }
    assert summary["after"]["efficacy"] > 0 and not math.isnan(summary["perplexity"]["after"])
    assert second["interrupt"].startswith("SystemExit")
    assert first["interrupt"] == "RankError: rank 1 failed: KeyboardInterrupt: stop"
    assert not (tmp_path / "interrupt" / "summary.json").exists()
