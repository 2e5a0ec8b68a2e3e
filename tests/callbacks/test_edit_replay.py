"""EditReplay in runs: what is trained on, that nothing else changes, resumes, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditReplay, KnowledgeEditing
from lit_moeedit.callbacks.conflicts import ContradictionError
from lit_moeedit.module import LitMoE
from tests.callbacks.conftest import CONFIG, _data, _editor, _module, _trainer
from tests.callbacks.replaying import Watching, old_answers, replayed, stated
from tests.processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


class Shapes(L.Callback):
    """Remembers how many rows other callbacks see."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(len(batch["input_ids"]))


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Fit a module with an edit and possibly a replay; returns the module."""

    def fit(*callbacks: Any, module: Any = None, data: Any = None, at: Any = "fit_start", **settings: Any) -> Any:
        L.seed_everything(0, verbose=False)
        if module is None:
            module = Watching(config=tiny.config, learning_rate=3e-3)
        editing, ckpt_path = KnowledgeEditing(tiny.editor(), at=at, on_failure="keep"), settings.pop("ckpt_path", None)
        trainer = make_trainer(tmp_path, [editing, *callbacks], **{"max_steps": 6, "max_epochs": -1, **settings})
        trainer.fit(module, data or tiny.data(), ckpt_path=ckpt_path)
        return module

    return fit


def test_rows_are_trained_on_from_the_edit_on(run: Any, tiny: Any) -> None:
    replay, shapes = EditReplay(share=0.25), Shapes()
    module = run(replay, shapes, at={"step": 2})
    assert replayed(module) == [0, 0, 2, 2, 2, 2] and shapes.rows == [8] * 6
    assert [fact.key for fact in replay.facts] == [fact.key for fact in tiny.corpus().edits]
    tokenizer = module.trainer.datamodule.tokenizer
    texts = {
        (tokenizer.decode(ids[(mask > 0) & (labels < 0)][1:]).strip(), tokenizer.decode(ids[labels >= 0]).strip())
        for batch in module.seen[2:]
        for ids, mask, labels in zip(*(batch[n][8:] for n in ("input_ids", "attention_mask", "labels")), strict=True)
    }
    facts = {(fact.prompt, fact.target_new) for fact in tiny.corpus().edits}
    assert texts <= facts and len(texts) > 2
    assert "training_step" not in module.__dict__


def test_a_run_without_an_edit_is_that_without_the_callback(run: Any, tiny: Any) -> None:
    plain, replay = (run(*callbacks, at={"step": 6}) for callbacks in ([], [EditReplay()]))
    first, second = tiny.weights(plain), tiny.weights(replay)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_measuring_needs_does_not_change_what_is_trained(run: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_moeedit.callbacks.needs.MEASURE_EVERY", 2)
    replay = EditReplay(share=0.25)
    module = run(replay)
    assert set(replay.state_dict()["needs"]) <= {fact.key for fact in replay.facts}
    assert all(0.0 <= need <= 1.0 for need in replay.state_dict()["needs"].values()) and replay.state_dict()["needs"]
    monkeypatch.setattr("lit_moeedit.replay.draws.Draws.draw", lambda *args, **kwargs: [])
    weights = [tiny.weights(run(EditReplay(by_need=by_need))) for by_need in (True, False)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert module.training


@pytest.mark.parametrize("steps", [3, 4])  # in the middle of an epoch, and at its end
def test_a_resumed_run_has_the_same_weights(
    run: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr("lit_moeedit.callbacks.needs.MEASURE_EVERY", 2)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    replays = [EditReplay(share=0.3, paraphrases=1) for _ in range(2)]
    whole = run(replays[0], saving)
    ckpt = str(tmp_path / "saved" / f"step={steps}.ckpt")
    resumed = run(replays[1], ckpt_path=ckpt)
    first, second = tiny.weights(whole), tiny.weights(resumed)
    if steps == 4:  # in the middle of an epoch Lightning does not read the rest of the data that the run would read
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert stated(resumed) == stated(whole)[steps:] != []
    assert replays[0].replayed == replays[1].replayed
    assert replays[0].replayed is not None and replays[0].replayed.statements == sum(replayed(whole))


def test_a_forward_of_their_own(run: Any, tiny: Any) -> None:
    """The gradient is that of the batch's loss plus the weight times that of the statements."""
    module, found = run(EditReplay(share=0.2, weight=0.5), max_steps=1), {}
    assert replayed(module) == [0]
    metrics = module.trainer.logged_metrics
    assert metrics["replay/loss"] > 0

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found[len(found)] = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    class Reference(LitMoE):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 0.5 * self.replay_loss(rows[0])

    rows: list[Any] = []

    class Recording(LitMoE):
        def replay_loss(self, batch: Any) -> torch.Tensor:
            rows.append(batch)
            return super().replay_loss(batch)

    for kind, callbacks in ((Recording, [EditReplay(share=0.2, weight=0.5)]), (Reference, [])):
        L.seed_everything(0, verbose=False)
        run(Gradients(), *callbacks, module=kind(config=tiny.config, learning_rate=3e-3), max_steps=1)
    assert len(rows[0]["input_ids"]) >= 1
    # sums of gradients in another order, float32
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-7) for name in found[1])


def test_steps_and_accumulation(run: Any) -> None:
    module = run(EditReplay(share=0.25, every_n_steps=2), max_steps=4, accumulate_grad_batches=2)
    assert replayed(module) == [2, 2, 0, 0, 2, 2, 0, 0]


def test_facts_of_edit_files(run: Any, tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    editing = KnowledgeEditing(tiny.editor(), on_failure="keep", save_edits=str(tmp_path / "edits"))
    make_trainer(tmp_path, [editing], max_steps=1).fit(tiny.module(), tiny.data())
    replay, module = EditReplay(share=0.25, edits=str(tmp_path / "edits")), Watching(config=tiny.config)
    make_trainer(tmp_path, [replay], max_steps=2).fit(module, tiny.data())
    assert [fact.key for fact in replay.facts] == [fact.key for fact in tiny.corpus().edits]
    assert replayed(module) == [2, 2]


class Nested(L.LightningDataModule):
    """Two loaders at once."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data
        self.tokenizer = self.edit_facts = self.preservation_texts = None

    def setup(self, stage: str) -> None:
        self.data.setup(stage)
        self.tokenizer, self.edit_facts = self.data.tokenizer, self.data.edit_facts
        self.preservation_texts = self.data.preservation_texts

    def train_dataloader(self) -> Any:
        return {"web": self.data.train_dataloader(), "code": self.data.train_dataloader()}


def test_the_first_of_several_loaders(run: Any, tiny: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Both(LitMoE):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((len(batch["web"]["input_ids"]), len(batch["code"]["input_ids"])))
            return super().training_step(batch["web"], batch_idx) + super().training_step(batch["code"], batch_idx)

    run(EditReplay(share=0.25), module=Both(config=tiny.config), data=Nested(tiny.data()), max_steps=2)
    assert seen == [(10, 8), (10, 8)]


# -- text that contradicts edits --------------------------------------------------------------------------------------


def test_contradicting_text_is_told_of(run: Any, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    replay = EditReplay(share=0.25)
    module = run(replay, data=tiny.data(drop_edited=False), max_steps=4)
    assert replay.watch.metrics == {"edit/conflicts": len(old_answers(module, tiny))} and old_answers(module, tiny)
    assert "training texts contradict" in caplog.text and ": the text contradicts the edit of" in caplog.text
    assert replay.watch.state_dict()["texts"] == replay.state_dict()["conflicts"]["texts"]


def test_old_answers_are_masked_for_the_module_alone(run: Any, tiny: Any) -> None:
    class Labels(L.Callback):
        def __init__(self) -> None:
            self.counted: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.counted.append(int((batch["labels"] >= 0).any(-1).sum()))

    labels = Labels()
    module = run(EditReplay(share=0.25, on_conflict="mask"), labels, data=tiny.data(drop_edited=False), max_steps=4)
    found = old_answers(module, tiny)
    assert found and not any(counts for _, counts in found)
    assert labels.counted == [8] * 4


def test_contradicted_facts_are_given_up(run: Any, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    replay = EditReplay(share=0.25, on_conflict="yield")
    run(replay, data=tiny.data(drop_edited=False), max_steps=4)
    assert len(replay.watch.given_up) + len(replay.facts) == len(tiny.corpus().edits) and replay.watch.given_up
    assert "the fact is no longer protected" in caplog.text


def test_contradicting_text_is_refused(run: Any, tiny: Any) -> None:
    with pytest.raises(
        ContradictionError, match="training texts contradict 6 edited facts; one contradicts the edit of 'Italy'"
    ):
        run(EditReplay(on_conflict="refuse"), data=tiny.data(drop_edited=False))
    run(EditReplay(on_conflict="refuse"), max_steps=2)  # the edited facts are dropped from the text


# -- ranks, and modules of others -------------------------------------------------------------------------------------


def fit_on_ranks(strategies: list[str], folder: str) -> dict[str, Any]:
    """Fit with replay of both kinds under several strategies; returns weights, needs, and what was stated."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known

    found = {}
    for strategy in strategies:
        # under ZeRO-3 a forward of their own is refused
        for weight in (None, 0.5) if strategy == "ddp" else (None,):
            replay = EditReplay(share=0.3, weight=weight)
            L.seed_everything(0, verbose=False)
            module = Watching(config={**CONFIG}, learning_rate=3e-3)
            size = 2
            changes = {"devices": size, "max_steps": 4, "max_epochs": -1, "strategy": strategy}
            editing = KnowledgeEditing(_editor(steps=3), on_failure="keep")
            trainer = _trainer(f"{folder}/{strategy}-{weight}", [editing, replay], **changes)
            trainer.fit(module, _data(batch_size=8 // size))
            needs, counted = replay.state_dict()["needs"], replay.replayed
            rows = [ids.tolist() for batch in module.seen for ids in batch["input_ids"][8 // size :]]
            found[f"{strategy} {weight}"] = {
                "needs": needs,
                "rows": rows,
                "loss": float(trainer.logged_metrics["train/loss"]),
                "statements": 0 if counted is None else counted.statements,
            }
    return found


@pytest.mark.parametrize(
    "strategies",
    [["ddp"], pytest.param(["deepspeed_cpu_stage_3"], marks=[pytest.mark.slow, pytest.mark.deepspeed])],
)
def test_ranks_state_others_and_know_the_same(strategies: list[str], tmp_path: Path) -> None:
    first, second = run_ranks(fit_with_short_measures, 2, strategies, str(tmp_path), group=False)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name]["needs"] == second[name]["needs"] != {}
        assert first[name]["statements"] == second[name]["statements"] > 0
        assert first[name]["loss"] == second[name]["loss"] and first[name]["loss"] == first[name]["loss"]
        if "None" in name:
            assert first[name]["rows"] and second[name]["rows"] and first[name]["rows"] != second[name]["rows"]
            assert first[name]["statements"] == len(first[name]["rows"]) + len(second[name]["rows"])
        else:
            assert not first[name]["rows"] and not second[name]["rows"]


def fit_with_short_measures(strategies: list[str], folder: str) -> dict[str, Any]:
    """Fit with measurements after every other step."""
    with mock.patch("lit_moeedit.callbacks.needs.MEASURE_EVERY", 2):
        return fit_on_ranks(strategies, folder)


def edits_left(folder: str, share: float | None, strategy: str = "auto", ranks: int = 1) -> tuple[int, int]:
    """Return how many of six edits are generated right after the edit, and 32 steps later."""
    replays = [] if share is None else [EditReplay(share=share)]
    editing = KnowledgeEditing(_editor(steps=30), at={"step": 32}, on_failure="keep", survival_every_n_steps=32)
    settings = {"max_steps": 64, "max_epochs": -1, "limit_val_batches": 0, "devices": ranks, "strategy": strategy}
    _trainer(folder, [editing, *replays], **settings).fit(_module(), _data(batch_size=8 // ranks))
    first, *_, last = editing.survival.points
    return first.generated, last.generated


@pytest.mark.slow
@pytest.mark.deepspeed
def test_under_zero_3_as_many_edits_are_kept_as_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    after, lost = edits_left(f"{tmp_path}/nothing", None)
    assert after == 6 and lost <= 3
    assert edits_left(f"{tmp_path}/one", 0.25) == (6, 6)
    sharded = (f"{tmp_path}/two", 0.25, "deepspeed_cpu_stage_3", 2)
    assert run_ranks(edits_left, 2, *sharded, group=False) == [(6, 6), (6, 6)]


class Plain(L.LightningModule):
    """A module of somebody who has never heard of this package."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.network(**batch).loss, "rows": len(batch["input_ids"])}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_other_modules_and_lora(run: Any, tiny: Any, weight: float | None) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
    module = tiny.module()
    module.configure_model()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    other, outputs = Plain(peft.get_peft_model(module.model, settings)), []

    class Outputs(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, out: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(out["rows"])

    run(EditReplay(share=0.25, weight=weight), Outputs(), module=other, max_steps=2)
    assert outputs == [8 if weight else 10] * 2


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": 1.5}, "share"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"weight": 0.0}, "weight must be above 0"),
        ({"weight": float("nan")}, "weight must be above 0"),
        ({"paraphrases": -1}, "paraphrases must be at least 0, got -1"),
        ({"gradient_limit": 0.0}, "gradient_limit must be above 0, or None for no limit, got 0.0"),
        ({"contexts": []}, "contexts needs at least one text"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditReplay(**arguments)


def test_nothing_to_state(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="EditReplay has nothing to state: give the Trainer a Knowledge"
    ):
        make_trainer(tmp_path, [EditReplay()], max_steps=1).fit(tiny.module(), tiny.data())


def test_a_batch_of_another_form_is_refused_at_the_first_batch(run: Any, tiny: Any) -> None:
    data = tiny.data()
    collate = data._collate
    data._collate = lambda batch: {**collate(batch), "weights": torch.ones(len(batch))}
    with pytest.raises(MisconfigurationException, match=r"'weights'.*; weight: 1.0 gives .* override check_batch"):
        run(EditReplay(), data=data, at={"step": 5})
    module = run(EditReplay(weight=1.0), data=data, max_steps=2)
    assert replayed(module) == [0, 0]


def test_weight_with_manual_optimization(run: Any, tiny: Any) -> None:
    class Manual(LitMoE):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="weight needs automatic optimization, which Manual does not"):
        run(EditReplay(weight=1.0), module=Manual(config=tiny.config))


def test_long_rows_are_told_of(run: Any, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.data()
    collate = data._collate

    def long(batch: Any) -> Any:
        return {
            n: torch.nn.functional.pad(t, (0, 200), value=-100 * (n == "labels")) for n, t in collate(batch).items()
        }

    data._collate = long
    run(EditReplay(share=0.25), data=data, max_steps=3)
    assert caplog.text.count("takes a whole row; weight: 1.0") == 1


def test_an_edit_that_is_undone_is_not_stated(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    replay = EditReplay(share=0.5)
    editing = KnowledgeEditing(tiny.editor(), on_failure="undo", min_specificity_retained=1.0, min_efficacy=1.0)
    module = Watching(config=tiny.config)
    make_trainer(tmp_path, [editing, replay], max_steps=2).fit(module, tiny.data())
    assert not editing.applied_facts and replay.facts == () and replayed(module) == [0, 0]
