"""Perplexity on whatever a user validates with: measured as the Trainer would, or left out with one warning."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.callbacks.measurements import Measurements
from lit_moeedit.callbacks.measuring import Measuring
from lit_moeedit.editing import perplexity
from lit_moeedit.module import LitMoE
from tests.processes import run_ranks


def _batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 400, (2, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


class Anything(LitMoE):
    """Validates with whatever it gets."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


class MeasuringTwice(L.Callback):
    """Measures twice when a validation begins, as a report would around an edit."""

    def __init__(self) -> None:
        self.measured = Measurements()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measuring = Measuring()
        for moment in ("before", "after"):
            measuring.perplexity(self.measured, trainer, pl_module, moment)


class Loader:
    """Batches that can be read again and again."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        yield from _batches()


@pytest.fixture
def measure(tiny: Any, make_trainer: Any, tmp_path: Any) -> Any:
    """Returns a module of the class, and the perplexities that a report measures on loaders."""

    def run(loaders: Any, kind: type[LitMoE] = Anything, data: Any = None, **keys: Any) -> Any:
        L.seed_everything(0, verbose=False)
        module, measuring = kind(config=tiny.config), MeasuringTwice()
        trainer = make_trainer(tmp_path, [EditReport(console=False), measuring], logger=False, **keys)
        trainer.validate(module, data or loaders, verbose=False)
        assert trainer.state.finished
        return module, measuring.measured.perplexity

    return run


def _without(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != name}


ODD: dict[str, tuple[Any, str]] = {
    "tuples": (lambda: Loader([tuple(b.values()) for b in _batches()]), "but is a tuple"),
    "tensors": (lambda: Loader([b["input_ids"] for b in _batches()]), "but is a Tensor"),
    "no labels": (lambda: Loader([_without(b, "labels") for b in _batches()]), "labels NoneType"),
    "no mask": (lambda: Loader([_without(b, "attention_mask") for b in _batches()]), "attention_mask NoneType"),
    "a label for a text": (lambda: Loader([{**b, "labels": torch.ones(2)} for b in _batches()]), r"labels \[2\]"),
    "floats": (lambda: Loader([{**b, "input_ids": torch.rand(2, 6)} for b in _batches()]), "integer ids below"),
    "ids of another model": (lambda: Loader([{**b, "input_ids": b["labels"] + 420} for b in _batches()]), "size 420"),
    "no label at all": (lambda: Loader([{**b, "labels": b["labels"] * 0 - 100} for b in _batches()]), "has a label"),
    "a second loader of tuples": (lambda: [Loader(_batches()), Loader([(1, 2)])], "but is a tuple"),
    "a loader that is read once": (lambda: iter(_batches()), "read only once"),
    "a broken file": (lambda: Broken(_batches()), "OSError: the disk is gone"),
}


class Broken(Loader):
    """Breaks when it is read besides the Trainer, which validates in inference mode."""

    def __iter__(self) -> Iterator[Any]:
        yield self.batches[0]
        if not torch.is_inference_mode_enabled():
            raise OSError("the disk is gone")


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_measured_is_left_out_with_one_warning(measure: Any, caplog: Any, kind: str) -> None:
    make, message = ODD[kind]
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        _, found = measure(make())
    assert found == {}
    (warning,) = [record.getMessage() for record in caplog.records if "could not" in record.getMessage()]
    assert warning.startswith("EditReport could not measure perplexity before: ")
    assert re.search(message, warning)


def test_training_goes_on_without_a_perplexity(tiny: Any, make_trainer: Any, tmp_path: Any, caplog: Any) -> None:
    editing, report = (
        KnowledgeEditing(tiny.editor(steps=1), at={"epoch": 0}, on_failure="keep"),
        EditReport(console=False),
    )
    trainer = make_trainer(tmp_path, [report, editing])
    data = tiny.data(samples_per_epoch=16)
    data.val_dataloader = lambda: Loader([(1, 2), (3, 4)])
    module = Anything(config=tiny.config)
    trainer.fit(module, data)
    assert trainer.state.finished and trainer.global_step == 2
    summary = report.summary(trainer)
    assert summary["perplexity"] == {"before": None, "after": None, "after_training": None}
    assert summary["after_training"]["efficacy"] is not None
    assert caplog.text.count("could not measure") == 1


@pytest.mark.parametrize(
    "loaders",
    [
        pytest.param(lambda: [Loader(_batches(2)), Loader(_batches()[2:])], id="a list"),
        pytest.param(lambda: {"a": Loader(_batches(2)), "b": Loader(_batches()[2:])}, id="a dict"),
        pytest.param(lambda: DataLoader(Stream(), batch_size=None), id="an iterable dataset"),
    ],
)
def test_all_loaders_are_measured(measure: Any, loaders: Any) -> None:
    module, found = measure(loaders())
    assert found["before"] == found["after"] == pytest.approx(perplexity(module.model, _batches()), rel=1e-5)


@pytest.mark.parametrize("limits", [{"limit_val_batches": 2}, {"limit_val_batches": 0.5}, {"fast_dev_run": True}])
def test_the_trainers_limits_are_kept(measure: Any, limits: dict[str, Any]) -> None:
    batches = _batches(4)
    module, found = measure(DataLoader(batches, batch_size=None), **limits)
    count = 1 if "fast_dev_run" in limits else 2
    assert found["before"] == pytest.approx(perplexity(module.model, batches[:count]), rel=1e-5)


def test_overfitting_limits_what_is_measured(tiny: Any, make_trainer: Any, tmp_path: Any) -> None:
    report = EditReport(console=False)
    trainer = make_trainer(
        tmp_path, [report, KnowledgeEditing(tiny.editor(steps=1), on_failure="keep")], overfit_batches=1
    )
    data = tiny.data(samples_per_epoch=16)
    batches = _batches(3)
    data.val_dataloader = lambda: DataLoader(batches, batch_size=None)
    module = Anything(config=tiny.config)
    trainer.fit(module, data)
    measured = report.summary(trainer)["perplexity"]["after_training"]
    assert measured == pytest.approx(perplexity(module.model, batches[:1]), rel=1e-5)


def test_batches_are_transferred_as_the_trainer_transfers_them(measure: Any, tiny: Any) -> None:
    stages = set()

    class Unpacking(Anything):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            stages.add(self.trainer.state.stage)
            ids, labels = batch
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    class Shifting(L.LightningDataModule):
        def val_dataloader(self) -> Any:
            return Loader([(b["input_ids"] - 1, b["labels"]) for b in _batches()])

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

    module, found = measure(None, Unpacking, data=Shifting())
    assert found["before"] == pytest.approx(perplexity(module.model, _batches()), rel=1e-5)
    assert stages == {"validate"}


def test_workers_that_persist_go_on_reading_for_the_trainer(measure: Any) -> None:
    seen = []

    class Counting(Anything):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(batch["input_ids"])

    loader = DataLoader(_batches(), batch_size=None, num_workers=1, persistent_workers=True)
    module, found = measure(loader, Counting)
    assert found["before"] == pytest.approx(perplexity(module.model, _batches()), rel=1e-5)
    assert len(seen) == 3


def odd_on_one_rank() -> str:
    """Rank 1 has batches that cannot be measured; its model's forward would be a collective."""
    from lit_moeedit.sharding.ranks import Ranks
    from tests.callbacks.conftest import _module

    module = _module()
    module.configure_model()
    calls = []
    module.model.register_forward_pre_hook(lambda *_: calls.append(1))
    batches: list[Any] = _batches() if os.environ["RANK"] == "0" else [(1, 2)]
    try:
        with Ranks.current().together():
            perplexity(module.model, batches, Ranks.current())
    except Exception as error:
        return f"{len(calls)} forwards, {type(error).__name__}: {error}"
    return "measured"


def test_no_rank_begins_a_forward_that_another_cannot_make() -> None:
    first, second = run_ranks(odd_on_one_rank, 2, seconds=60)
    assert first.startswith("0 forwards, RankError: rank 1 failed: ValueError: a batch should be a mapping")
    assert second.startswith("0 forwards, ValueError: a batch should be a mapping")
