"""Averages of the weights get every edit, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim.swa_utils import AveragedModel

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor, averages
from lit_moeedit.callbacks.summary import without_nan
from lit_moeedit.editing import Evaluation
from lit_moeedit.module import LitMoE
from tests.callbacks.conftest import CONFIG, _data, _editor, _module, _trainer
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "model that overrides the configure_model", "not resumable")
]

WEIGHT = "model.layers.1.mlp.experts.down_proj"


def ema(**changes: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(**{"decay": 0.999, **changes})


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-3, swa_epoch_start=1)


def averaged(average: Any) -> Any:
    """The average's copy of the transformers model."""
    held = average._average_model
    return (held.module if isinstance(held, AveragedModel) else held).model


class Watch(L.Callback):
    """Remembers a weight at the start of each epoch: in training, and in the average."""

    def __init__(self, average: Any) -> None:
        self.average = average
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        models = (pl_module.model, pl_module.model if self.average is None else averaged(self.average))
        first, second = (model.get_parameter(WEIGHT).detach().clone() for model in models)
        self.seen.append((first, second))


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    def fit(average: Any, folder: str = "run", last: bool = False, **settings: Any) -> SimpleNamespace:
        more, keys = settings.pop("callbacks", []), {"max_epochs": 3, **settings.pop("trainer", {})}
        ckpt, made = settings.pop("ckpt", None), settings.pop("module", {})
        editing = KnowledgeEditing(settings.pop("editor", tiny.editor(steps=12)), **{"at": {"epoch": 1}, **settings})
        before, after = (Watch(average) for _ in range(2))
        ours = [before, editing, RoutingMonitor(), EditReport(console=False), after]
        kept = [] if average is None else [average]
        callbacks = [*ours, *kept, *more] if last else [*kept, *ours, *more]
        module, trainer = tiny.module(**made), make_trainer(tmp_path / folder, callbacks, **keys)
        module.configure_model()
        trainer.fit(module, tiny.data(samples_per_epoch=16), **({"ckpt_path": ckpt} if ckpt else {}))
        changes = [
            tuple(new - old for new, old in zip(*pair, strict=True))
            for pair in zip(after.seen, before.seen, strict=True)
        ]
        summary = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))
        return SimpleNamespace(
            editing=editing, module=module, trainer=trainer, summary=summary, changes=changes, watch=after,
            final=editing.evaluate(module).metrics if editing.applied_facts else {},
        )  # fmt: skip

    return fit


# -- Lightning's averages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [ema, swa, lambda: None], ids=["ema", "swa", "none"])
@pytest.mark.parametrize("renewals", [{"renew_at": "end"}, {"renew_at": "end", "max_renewals": 0}, {}], ids=str)
def test_renewals_at_the_end_that_never_come_are_told_when_training_starts(
    tiny: Any,
    make_trainer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    average: Any,
    renewals: dict[str, Any],
) -> None:
    told: list[str] = []

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> int:
            told.append(caplog.text)
            trainer.should_stop = True
            return -1  # no step is needed

    averaging, module = average(), tiny.module()
    editing = KnowledgeEditing(tiny.editor(), at={"epoch": 1}, renew_below=0.9, **renewals)
    callbacks = [editing, Stop(), *([] if averaging is None else [averaging])]
    module.configure_model()
    make_trainer(tmp_path, callbacks, max_epochs=2).fit(module, tiny.data())
    name = type(averaging).__name__
    warning = f"renew_at: end: no renewal comes, because {name} may still change"
    assert (warning in told[0]) is (averaging is not None and renewals == {"renew_at": "end"})


@pytest.mark.slow
def test_edits_of_an_average_are_renewed_at_points_and_not_at_the_end(run: Any) -> None:
    found = {}
    for moment in ("points", "end"):
        editing = run(ema(decay=0.5), moment, renew_below=0.99, renew_at=moment, survival_every_n_steps=2).editing
        found[moment] = editing.renewals, editing.survivors.generated < 6
    assert found["points"][0] > 0 and found["end"] == (0, True)


@pytest.mark.parametrize("at", [{"epoch": 1}, "validation"], ids=str)
def test_an_edit_is_in_the_average_and_measured_there_in_any_order(run: Any, at: Any, tmp_path: Path) -> None:
    found = {}
    for last in (False, True):
        folder = f"{last}"
        kept = ModelCheckpoint(tmp_path / folder / "kept", save_last=True)
        one = found[last] = run(ema(), folder, last, at=at, callbacks=[kept])
        # what is kept: in the final weights, and in the checkpoint
        assert one.final["efficacy_accuracy"] >= 5 / 6
        assert one.summary["after_training"] == pytest.approx(without_nan(one.final))
        logged = {name: float(value) for name, value in one.trainer.callback_metrics.items()}
        assert logged["edit/efficacy_accuracy"] == one.final["efficacy_accuracy"]
        checkpoint = torch.load(tmp_path / folder / "kept" / "last.ckpt", weights_only=True)
        again = LitMoE(config=dict(CONFIG))
        again.configure_model()
        again.load_state_dict(checkpoint["state_dict"])
        assert without_nan(one.editing.evaluate(again).metrics) == without_nan(one.final)
        again.load_state_dict(checkpoint["current_model_state"])
        assert one.editing.evaluate(again).metrics["efficacy"] >= 3 / 6
    first, second = found.values()
    for moment in ("before", "after", "after_training", "perplexity", "routing"):
        assert str(first.summary[moment]) == str(second.summary[moment])
    assert first.trainer.callback_metrics.keys() == second.trainer.callback_metrics.keys()
    for name, value in first.trainer.callback_metrics.items():
        assert torch.equal(value, second.trainer.callback_metrics[name]), name
    for weight, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("average", [ema, swa, lambda: ema(device="cpu", use_buffers=False)])
def test_weights_in_training_and_average_get_the_same_change(run: Any, average: Any) -> None:
    one = run(average())
    (training, mean) = one.changes[1]
    assert training.norm() > 0.1
    # each sum is rounded to float32
    assert torch.allclose(training, mean, atol=1e-6)
    assert not any(bool(change.any()) for pair in (one.changes[0], one.changes[2]) for change in pair)
    assert not torch.equal(*one.watch.seen[1])


def test_stochastic_weight_averaging_ends_with_the_edit_in_any_order(run: Any) -> None:
    for last in (False, True):
        one = run(swa(), str(last), last)
        assert one.final["efficacy_accuracy"] >= 3 / 6
        assert one.summary["after_training"] == pytest.approx(without_nan(one.final))


@pytest.mark.parametrize("last", [False, True])
def test_stochastic_weight_averaging_renews_edits_in_both_and_measures_the_average_last(
    run: Any, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    average, renew, changes = swa(), KnowledgeEditing._renew, []

    class Forget(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:  # the last step of the epoch with which the average begins
                for weight in (layer.mlp.experts.down_proj for layer in pl_module.model.model.layers):
                    weight.data.zero_()

    def weights(pl_module: Any) -> list[torch.Tensor]:
        models = (pl_module.model, averaged(average))
        return [model.get_parameter(WEIGHT).detach().clone() for model in models]

    def watched(self: Any, trainer: L.Trainer, pl_module: Any) -> None:
        before = weights(pl_module)
        renew(self, trainer, pl_module)
        changes.extend(new - old for new, old in zip(weights(pl_module), before, strict=True))

    monkeypatch.setattr(KnowledgeEditing, "_renew", watched)
    settings = {"renew_every_n_steps": 2, "max_renewals": 1, "survival_every_n_steps": 1}
    one = run(average, "run", last, callbacks=[Forget()], **settings)
    points = one.editing.survival.points
    assert [(point.step, point.after) for point in points] == [
        (2, "edit"), (3, None), (4, None), (4, "renewal"), (5, None), (6, None), (6, None),
    ]  # fmt: skip
    assert points[2].generated < points[3].generated
    training, mean = changes
    # each sum is rounded to float32
    assert training.norm() > 0.1 and torch.allclose(training, mean, atol=1e-6)
    # the last point is that of the average, which becomes the weights
    for name in ("efficacy", "efficacy_accuracy"):
        assert points[-1].metrics[name] == pytest.approx(one.final[name])
    assert one.editing.survivors.generated == round(6 * one.final["efficacy_accuracy"])


def test_stochastic_weight_averaging_that_ends_early_keeps_the_weights_in_training(run: Any) -> None:
    for last in (False, True):
        one = run(swa(), str(last), last, trainer={"max_steps": 5, "max_epochs": 9})
        assert one.trainer.global_step == 5
        assert one.summary["after_training"] == pytest.approx(without_nan(one.final))


def test_an_average_of_a_module_without_its_model_is_refused(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [swa(), KnowledgeEditing(tiny.editor())])
    message = r"StochasticWeightAveraging copied the module before configure_model\(\) made its model"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(tiny.module(), tiny.data())


def test_a_rejected_edit_is_undone_in_both(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Reject(KnowledgeEditing):
        def should_keep(self, before: Evaluation, after: Evaluation) -> bool:
            assert after.metrics["efficacy"] > 0.5
            return False

    for number, average in enumerate((ema(), swa())):
        before, after, module = Watch(average), Watch(average), tiny.module()
        module.configure_model()
        editing = Reject(tiny.editor(steps=12), at={"epoch": 1})
        trainer = make_trainer(tmp_path / str(number), [before, editing, after, average], max_epochs=2)
        trainer.fit(module, tiny.data(samples_per_epoch=16))
        assert len(editing.editor.calls) == 1 and editing.edited_facts
        for old, new in zip(before.seen[1], after.seen[1], strict=True):
            assert torch.equal(old, new)


def test_an_average_that_begins_later_has_the_edit(run: Any) -> None:
    """Until then Lightning validates a copy that it will replace, so the weights in training are edited."""
    plain = run(None, trainer={"max_epochs": 2})
    one = run(ema(update_every_n_steps=0, update_starting_at_epoch=1), "late", trainer={"max_epochs": 2})
    training, mean = one.changes[1]
    assert training.norm() > 0.1 and torch.allclose(training, mean, atol=1e-6)
    for weight, other in zip(one.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_renewals_are_made_in_the_average(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    average, seen = ema(), []

    class Forget(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:  # lose the edit in the average alone
                held = averaged(average)
                seen.append(held.get_parameter(WEIGHT).detach().clone())
                for weight in (layer.mlp.experts.down_proj for layer in held.model.layers):
                    weight.data.zero_()

    one = run(average, renew_every_n_steps=1, callbacks=[Forget()])
    assert len(seen) == 1 and one.editing.renewals >= 1
    assert one.final["efficacy_accuracy"] >= 4 / 6


def test_a_run_resumed_in_the_middle_of_it_ends_as_the_whole_one(run: Any, tmp_path: Path) -> None:
    def every(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    whole = run(ema(decay=0.9), callbacks=[every("kept")])
    again = run(ema(decay=0.9), "again", callbacks=[every("other")], ckpt=tmp_path / "kept" / "epoch=1.ckpt")
    assert len(whole.editing.editor.calls) == 1 and again.editing.editor.calls == []
    assert without_nan(again.final) == without_nan(whole.final)
    for weight, other in zip(again.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_an_average_in_bfloat16(run: Any) -> None:
    one = run(ema(), module={"dtype": "bfloat16"}, trainer={"max_epochs": 2})
    assert one.final["efficacy_accuracy"] >= 4 / 6
    assert one.summary["after_training"] == pytest.approx(without_nan(one.final))


def test_an_average_in_higher_precision_is_not_rounded_by_an_edit(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    module = tiny.module()
    module.configure_model()
    average = ema()
    trainer = make_trainer(tmp_path, [average])
    average.setup(trainer, module, "fit")
    average._average_model.n_averaged += 1  # type: ignore[union-attr]
    module.bfloat16()
    before = averaged(average).get_parameter("model.embed_tokens.weight").clone()
    own = [weight.clone() for weight in module.parameters()]
    trainer.state.fn = "fit"  # type: ignore[assignment]
    with averages.edited_weights(trainer, module) as copies:
        assert len(copies) == 2
        # what is written to the copy of the weights in training is what they are afterwards
        copies[1][WEIGHT][0] += 1.0
    assert torch.equal(averaged(average).get_parameter("model.embed_tokens.weight"), before)
    for weight, other, name in zip(module.parameters(), own, dict(module.named_parameters()), strict=True):
        if name.endswith(WEIGHT):
            other[0] += 1.0
        assert torch.equal(weight, other)


def test_averages_under_deepspeed_and_several_averages_are_refused() -> None:
    def refuse(strategy: Any, *callbacks: Any) -> None:
        averages.refuse_averages(SimpleNamespace(strategy=strategy, callbacks=callbacks))  # type: ignore[arg-type]

    sharded = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    refuse(sharded)
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging averages weights under DeepSpeedStrategy"):
        refuse(sharded, ema())
    single = L.Trainer(accelerator="cpu", logger=False).strategy
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging and StochasticWeightAveraging would put"):
        refuse(single, ema(), swa())


def _fit_under_ddp(folder: str) -> Any:
    average = ema()
    watch, after = Watch(average), Watch(average)
    editing = KnowledgeEditing(_editor(steps=12), at={"epoch": 1})
    report = EditReport(console=False)
    keys = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    trainer, module = _trainer(folder, [watch, editing, report, average, after], **keys), _module()
    module.configure_model()
    trainer.fit(module, _data(samples_per_epoch=16))
    change = [new - old for new, old in zip(after.seen[1], watch.seen[1], strict=True)]
    return change, module.model.get_parameter(WEIGHT).detach(), editing.evaluate(module).metrics["efficacy_accuracy"]


@pytest.mark.slow
def test_averages_of_all_ranks_get_the_edit(tmp_path: Path) -> None:
    first, second = run_ranks(_fit_under_ddp, 2, str(tmp_path))
    for change, weight, efficacy in (first, second):
        assert change[0].norm() > 0.1 and torch.allclose(*change, atol=1e-6)
        assert torch.equal(weight, first[1]) and efficacy >= 4 / 6
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["after_training"]["efficacy_accuracy"] == first[2]


def test_every_averaging_callback_of_lightning_is_known() -> None:
    kinds = [value for name, value in vars(L.pytorch.callbacks).items() if "Averag" in name]
    assert all(issubclass(kind, WeightAveraging | StochasticWeightAveraging) for kind in kinds)
    assert len(kinds) == 3
