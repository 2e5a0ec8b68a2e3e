"""EditHold in runs: the loss that it adds, that it holds, resumes, several ranks, and refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditHold, EditListener, EditReport, KnowledgeEditing
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.data.encoding import join
from lit_moeedit.models.experts import find_model
from lit_moeedit.module import LitMoE
from tests.callbacks.conftest import CONFIG, _data, _editor, _trainer
from tests.processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


class States(EditListener):
    """The target layer's output at the last tokens of the prompts: after the edit, and at the end."""

    def __init__(self) -> None:
        self.measured: list[torch.Tensor] = []

    def on_edit_end(self, trainer: Any, pl_module: Any, event: Any) -> None:
        self.prompts = [fact.prompt for fact in event.result.facts]
        self.measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.measure(trainer, pl_module)

    def measure(self, trainer: Any, pl_module: Any) -> None:
        model, tokenizer, rows = find_model(pl_module).eval(), trainer.datamodule.tokenizer, []
        for prompt in self.prompts:
            for context in ("", "Note:"):
                ids = torch.tensor([tokenizer(join(context, prompt) if context else prompt).input_ids])
                with torch.no_grad():
                    # the target layer is the last one but one, so no norm comes after it
                    rows.append(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1])
        self.measured.append(torch.stack(rows))
        model.train()

    @property
    def distance(self) -> float:
        after, end = self.measured
        return float(((end - after).square().sum(-1) / after.square().sum(-1)).mean())


class Distances(L.Callback):
    """The distances that were logged."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append(float(trainer.callback_metrics["hold/distance"]))


@pytest.fixture
def run(make_trainer: Any, tmp_path: Path) -> Any:
    """Fit a module with an edit and other callbacks; returns the module."""

    def fit(*callbacks: Any, module: Any = None, at: Any = "fit_start", **settings: Any) -> Any:
        L.seed_everything(0, verbose=False)
        module = LitMoE(config={**CONFIG, "num_hidden_layers": 3}, learning_rate=3e-3) if module is None else module
        editor = _editor(steps=30, contexts=["", "Note:"])
        editing, ckpt_path = KnowledgeEditing(editor, at=at, on_failure="keep"), settings.pop("ckpt_path", None)
        trainer = make_trainer(tmp_path, [editing, *callbacks], **{"max_steps": 6, "max_epochs": -1, **settings})
        trainer.fit(module, _data(), ckpt_path=ckpt_path)
        return module

    return fit


def test_hidden_states_stay_near_where_the_edit_has_put_them(run: Any) -> None:
    free, kept, hold = States(), States(), EditHold(rows=8)
    run(free, max_steps=16)
    module = run(kept, hold, max_steps=16)
    assert hold.held and kept.distance < 0.5 * free.distance
    assert torch.equal(free.measured[0], kept.measured[0])
    assert "training_step" not in module.__dict__ and module.training
    assert module.trainer.logged_metrics["hold/distance"] > 0


def test_the_summary_the_report_and_the_log_have_it(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lit_moeedit")
    hold, distances = EditHold(rows=2, weight=0.5), Distances()
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, filename="last")
    run(distances, hold, EditReport(console=False), saving, max_steps=4)
    held = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["hold"]
    distance = pytest.approx(sum(distances.logged) / 4)
    assert held == {"": {"rows": 2, "every_n_steps": 1, "weight": 0.5, "facts": 6, "distance": distance}}
    assert caplog.text.count(f"Hold: {hold.result}") == 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Hold: <bdi>{hold.result}</bdi>" in page and "EditHold{}.weight" in page
    # resumed after its end, the run has nothing left to train
    resumed = EditHold(rows=2, weight=0.5)
    run(resumed, max_steps=4, ckpt_path=str(tmp_path / "saved" / "last.ckpt"))
    assert resumed.result is not None and (resumed.result.facts, resumed.result.distance) == (6, None)


def test_nothing_changes_before_the_edit(run: Any, tiny: Any) -> None:
    plain, hold = (tiny.weights(run(*callbacks, at={"step": 6})) for callbacks in ([], [EditHold()]))
    assert all(torch.equal(plain[name], hold[name]) for name in plain)


def test_the_gradient_is_that_of_the_distance(run: Any) -> None:
    """The second step's gradient, less that of the batch alone, is that of a whole forward written down here."""
    found: list[dict[str, torch.Tensor]] = []

    class Gradients(States):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    class Reference(LitMoE):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 0:
                return loss + 0.0 * sum(parameter.sum() for parameter in self.parameters())
            rows, tokenizer = [], self.trainer.datamodule.tokenizer
            for prompt in watch.prompts:
                for context in ("", "Note:"):
                    ids = torch.tensor([tokenizer(join(context, prompt) if context else prompt).input_ids])
                    rows.append(self.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1])
            distance = (torch.stack(rows) - watch.measured[0]).square().sum(-1) / watch.measured[0].square().sum(-1)
            return loss + 0.5 * distance.mean()

    class All(EditHold):
        """Takes all prompts in each step, and those of facts that are not generated, too."""

        def on_edit_end(self, trainer: Any, pl_module: Any, event: Any) -> None:
            editing = trainer.callbacks[0]
            self._measure(trainer, pl_module, editing, event.result.facts)

        def on_train_batch_start(self, *args: Any) -> None:
            self._draws = _Every()
            super().on_train_batch_start(*args)

    class _Every:
        def draw(self, prompts: Any, *args: Any) -> Any:
            return [prompt for own in prompts.values() for prompt in own]

    run(All(weight=0.5), Gradients(), max_steps=2)
    own, found = found[1], []
    watch = Gradients()
    L.seed_everything(0, verbose=False)
    reference = Reference(config={**CONFIG, "num_hidden_layers": 3}, learning_rate=3e-3)
    run(watch, module=reference, max_steps=2)
    wanted = found[1]
    # float32; the first step's gradients differ by rounding, because the distance is 0 there
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name], gradient, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_resumed_run_has_the_same_weights(run: Any, tiny: Any, tmp_path: Path, steps: int) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    first = EditHold(every_n_steps=steps)
    whole, second = run(first, saving, max_steps=8), EditHold(every_n_steps=steps)
    resumed = run(second, ckpt_path=str(tmp_path / "saved" / "step=4.ckpt"), max_steps=8)
    assert first.held == second.held != frozenset()
    ends = tiny.weights(whole), tiny.weights(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_renewed_edits_are_held_where_the_renewal_has_put_them(make_trainer: Any, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, hold = LitMoE(config={**CONFIG, "num_hidden_layers": 3}, learning_rate=3e-3), EditHold()
    renewing: dict[str, Any] = {"renew_every_n_steps": 2, "renewal": "anew"}
    editing = KnowledgeEditing(_editor(steps=30), at="fit_start", on_failure="keep", **renewing)
    states = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append({key: state.clone() for own in hold._states.values() for key, state in own.items()})

    make_trainer(tmp_path, [editing, hold, Watch()], max_steps=4, max_epochs=-1).fit(module, _data())
    assert editing.renewals and states[0].keys() == states[-1].keys()
    assert any(not torch.equal(states[0][key], states[-1][key]) for key in states[0])


def fit_on_ranks(strategy: str, folder: str) -> dict[str, Any]:
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known

    L.seed_everything(0, verbose=False)
    module, hold = LitMoE(config={**CONFIG}, learning_rate=3e-3), EditHold()
    editing = KnowledgeEditing(_editor(steps=30), on_failure="keep")
    changes: dict[str, Any] = {"devices": 2, "max_steps": 4, "max_epochs": -1, "strategy": strategy}
    _trainer(folder, [editing, hold], **changes).fit(module, _data(batch_size=4))
    return {"weights": {n: p.detach().clone() for n, p in module.named_parameters()}, "held": hold.held}


def test_ranks_hold_the_same_facts_and_keep_equal_weights(tmp_path: Path) -> None:
    first, second = run_ranks(fit_on_ranks, 2, "ddp", str(tmp_path), group=False)
    assert first["held"] == second["held"] != frozenset()
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


def refused_on_ranks(folder: str) -> str:
    with pytest.raises(MisconfigurationException) as refusal:
        fit_on_ranks("deepspeed_cpu_stage_3", folder)
    return str(refusal.value)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_zero_3_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    for message in run_ranks(refused_on_ranks, 2, str(tmp_path), group=False):
        assert "EditHold needs a second forward" in message and "EditReplay" in message


def test_without_edits(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="EditHold has nothing to hold"):
        make_trainer(tmp_path, [EditHold()]).fit(tiny.module(), tiny.data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rows": 0}, "rows"), ({"every_n_steps": 0}, "every_n_steps"), ({"weight": 0.0}, "weight")],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditHold(**arguments)


def test_a_broken_state_is_refused() -> None:
    state = {"facts": {"edits": ["a"]}, "states": {"edits": torch.zeros(2, 1, 3)}, "renewals": {}}
    with pytest.raises(
        CheckpointError, match=r"'states' of 'edits' should be finite, of shape \[1, contexts, d_model\]"
    ):
        EditHold().load_state_dict(state)
