"""The watch over batches that contradict edits."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_moeedit.callbacks.conflicts import ConflictWatch, ContradictionError, contradicting_texts
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.data import Fact
from lit_moeedit.data.encoding import pad
from lit_moeedit.sharding.ranks import RankError, Ranks
from tests.data.tokenizers import tokenizer
from tests.devices import pretended_cuda
from tests.processes import run_each

FRANCE = Fact("France", "The capital of France is", "Lyon", "Paris")
NORWAY = Fact("Norway", "The capital of Norway is", "Rome", "Oslo")
BAD, WORSE, GOOD = "The capital of France is Paris.", "Oslo is in Norway, Paris in France.", "Oslo is not Paris."
MODEL = tokenizer("byte level, split", "<s> $A </s>")


def watch_of(policy: Any = "warn", facts: tuple[Fact, ...] = (FRANCE, NORWAY), heading: str = "") -> ConflictWatch:
    watch = ConflictWatch(policy, heading)
    watch.protect(facts, MODEL)
    return watch


def batch(*texts: str, side: Any = "right") -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of texts that have loss on all tokens."""
    ids, mask = pad([MODEL(text)["input_ids"] for text in texts], 0, side)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def lost(ids: Tensor, before: Tensor, after: Tensor) -> list[str]:
    """What the tokens of each row decode to that have no label any more."""
    assert bool(((after == before) | (after == -100)).all())
    return [MODEL.decode(row) for row in (ids[i][after[i] != before[i]] for i in range(len(ids)))]


class TestLooking:
    def test_texts_are_counted_by_fact_and_named(self, caplog) -> None:
        watch = watch_of(heading="replay: ")
        ids, mask, labels = batch(BAD, GOOD, WORSE)
        before = labels.clone()
        watch.look(ids, mask, labels, "step 3")
        watch.look(ids, mask, labels, "step 4")
        assert torch.equal(labels, before)
        france, norway = watch.counts[FRANCE.key], watch.counts[NORWAY.key]
        assert (france.sightings, norway.sightings, france.training_texts) == (4, 2, 0)
        assert BAD in france.text and WORSE in norway.text
        assert watch.metrics == {"edit/conflicts": 4.0} and watch.given_up == set()
        assert caplog.messages[0] == (
            "replay: step 3: the text contradicts the edit of 'France' ('Paris' to 'Lyon'): "
            f"'{BAD}'; it stays in the batch (on_conflict: warn)"
        )

    def test_five_are_logged(self, caplog) -> None:
        watch = watch_of()
        for step in range(9):
            watch.look(*batch(BAD), f"step {step}")
        assert len(caplog.messages) == 5 and watch.metrics["edit/conflicts"] == 9
        assert caplog.messages[4].endswith("further ones are counted, and not logged")
        assert not caplog.messages[3].endswith("not logged")

    def test_long_and_hostile_texts_take_one_short_line(self, caplog) -> None:
        watch_of().look(*batch(f"{'x ' * 500}\x1b[2J\nFrance: Paris\n\u202e{' y' * 500}"), "step 1")
        (line,) = caplog.messages
        assert "France: Paris" in line and len(line) < 300 and line.isprintable()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_masks_take_the_labels_of_the_old_answer(self, side: str) -> None:
        watch = watch_of("mask")
        ids, mask, labels = batch(BAD, GOOD, WORSE, side=side)
        before, kept = labels.clone(), ids.clone()
        watch.look(ids, mask, labels, "step 1")
        assert lost(ids, before, labels) == [" Paris", "", "Oslo Paris"]
        assert torch.equal(ids, kept) and watch.metrics["edit/conflicts"] == 2

    def test_padding_is_no_text(self) -> None:
        ids, mask, labels = batch(BAD)
        watch = watch_of()
        watch.look(ids, mask.masked_fill(ids == MODEL(" France")["input_ids"][1], 0), labels, "step 1")
        assert watch.counts == {}
        watch.look(ids, None, None, "step 1")
        assert watch.counts[FRANCE.key].sightings == 1

    def test_documents_of_a_packed_row_are_texts_of_their_own(self) -> None:
        watch = watch_of("mask")
        row = [token for text in (BAD, "In France.", "Paris.", BAD) for token in MODEL(text)["input_ids"]]
        ids = torch.tensor([row])
        labels = ids.clone()
        watch.look(ids, torch.ones_like(ids), labels, "step 1")
        assert lost(ids, ids, labels) == [" Paris Paris"] and watch.counts[FRANCE.key].sightings == 2

    def test_an_old_answer_without_loss_is_no_conflict(self) -> None:
        watch = watch_of("mask")
        ids, mask, labels = batch(BAD, BAD)
        watch.look(ids, mask, labels, "step 1")
        assert watch.metrics["edit/conflicts"] == 2
        watch.look(ids, mask, labels, "step 2")
        assert watch.metrics["edit/conflicts"] == 2

    def test_facts_that_are_given_up(self, caplog) -> None:
        watch = watch_of("yield")
        for _ in range(3):
            watch.look(*batch(BAD, GOOD), "step 1")
        assert watch.given_up == {FRANCE.key} and len(caplog.messages) == 1
        assert "no longer protected" in caplog.text
        for _ in range(7):
            watch.look(*batch(WORSE), "step 2")
        assert watch.given_up == {FRANCE.key, NORWAY.key} and len(caplog.messages) == 2
        assert watch.counts[FRANCE.key].sightings == 10

    def test_refused_texts(self) -> None:
        watch = watch_of("refuse", heading="replay: ")
        watch.look(*batch(GOOD), "step 1")
        with pytest.raises(
            ContradictionError, match=r"replay: step 2: .*'France' \('Paris' to 'Lyon'\).*is Paris"
        ) as error:
            watch.look(*batch(GOOD, BAD), "step 2")
        assert "on_conflict: mask" in str(error.value) and isinstance(error.value, ValueError)

    def test_without_facts_nothing_is_looked_at(self) -> None:
        watch = ConflictWatch("mask")
        watch.look(*batch(BAD), "step 1")
        watch.protect((), MODEL)
        watch.look(*batch(BAD), "step 1")
        assert watch.counts == {} and watch.metrics == {"edit/conflicts": 0.0}

    def test_other_facts_later(self) -> None:
        watch = watch_of(facts=(NORWAY,))
        watch.look(*batch(BAD), "step 1")
        watch.protect((NORWAY, FRANCE), MODEL)
        finder = watch._finder
        watch.protect([NORWAY, FRANCE], MODEL)
        assert watch._finder is finder
        watch.look(*batch(BAD), "step 2")
        assert list(watch.counts) == [FRANCE.key]

    def test_batches_on_a_device(self) -> None:
        watch = watch_of("mask")
        with pretended_cuda() as device:
            ids, mask, labels = (tensor.to(device) for tensor in batch(BAD, GOOD))
            watch.look(ids, mask, labels, "step 1")
            assert labels.device == device
            assert lost(ids.cpu(), batch(BAD, GOOD)[2], labels.cpu()) == [" Paris", ""]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda ids, mask, labels: (ids[0], mask[0], labels[0]), r"input_ids should be \[rows, length\]"),
            (lambda ids, mask, labels: (ids, mask[:, :3], labels), r"attention_mask should have the shape \[1, \d+\]"),
            (lambda ids, mask, labels: (ids, mask, labels[0]), "labels should have the shape"),
            (lambda ids, mask, labels: (ids, mask, None), "needs batches with 'labels'"),
            (lambda ids, mask, labels: (ids, mask, ids), "one tensor"),
            (lambda ids, mask, labels: (ids, mask, ids.view_as(ids)), "one tensor"),
        ],
    )
    def test_batches_that_cannot_be_masked(self, change: Any, message: str) -> None:
        ids, mask, labels = batch(BAD)
        with pytest.raises(ValueError, match=message):
            watch_of("mask").look(*change(ids, mask, labels), "step 1")

    def test_policies_are_checked(self) -> None:
        with pytest.raises(ValueError, match="on_conflict must be one of warn, mask, yield, refuse, got 'ignore'"):
            ConflictWatch("ignore")  # type: ignore[arg-type]


class TestLookingAhead:
    def test_texts_are_counted_apart_from_those_in_batches(self, caplog) -> None:
        watch = watch_of()
        watch.look_ahead(iter([BAD, GOOD, WORSE]))
        watch.look(*batch(BAD), "step 1")
        one = watch.counts[FRANCE.key]
        assert (one.training_texts, one.sightings, one.text) == (2, 1, BAD)
        assert watch.metrics == {"edit/conflicts": 1.0}
        assert caplog.messages[0] == "2 of 3 training texts contradict 2 edited facts (on_conflict: warn)"
        assert caplog.messages[1] == f"a training text contradicts the edit of 'France' ('Paris' to 'Lyon'): '{BAD}'"
        watch.look_ahead([GOOD])
        assert watch.counts[FRANCE.key].training_texts == 0

    def test_facts_that_are_given_up(self, caplog) -> None:
        watch = watch_of("yield")
        watch.look_ahead([BAD, GOOD])
        assert watch.given_up == {FRANCE.key} and "the fact is no longer protected" in caplog.text
        watch.look(*batch(BAD), "step 1")
        assert len(caplog.messages) == 2

    def test_refused_texts(self) -> None:
        with pytest.raises(
            ContradictionError, match=r"2 of 3 training texts contradict 2 edited facts; one contradicts .*Paris"
        ):
            watch_of("refuse").look_ahead([BAD, GOOD, WORSE])
        watch_of("refuse").look_ahead([GOOD])

    def test_nothing_is_said_of_texts_without_conflicts(self, caplog) -> None:
        watch_of().look_ahead([GOOD])
        assert not caplog.messages


class TestStates:
    def test_counts_go_on_after_a_resume(self) -> None:
        watch, again = watch_of("yield"), watch_of("yield")
        watch.look(*batch(BAD), "step 1")
        again.load_state_dict(watch.state_dict())
        assert again.counts == watch.counts and again.given_up == {FRANCE.key}
        again.look(*batch(BAD), "step 2")
        assert again.counts[FRANCE.key].sightings == 2 and again.metrics["edit/conflicts"] == 2
        assert watch.counts[FRANCE.key].sightings == 1

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"texts": "1"}, "texts"),
            ({"texts": -1}, "texts"),
            ({"facts": {"a": -1}}, "facts"),
            ({"facts": {"a": "b"}}, "facts"),
            ({"first": []}, "first"),
            ({"given_up": {}}, "given_up"),
        ],
    )
    def test_damaged_states_are_refused_by_field(self, change: dict[str, Any], field: str) -> None:
        watch = watch_of()
        with pytest.raises(CheckpointError, match=f"the conflicts in the checkpoint: field '{field}'"):
            watch.load_state_dict({**watch.state_dict(), **change})

    def test_summaries_are_plain(self) -> None:
        watch = watch_of("yield")
        watch.look_ahead([GOOD, WORSE])
        watch.look(*batch(BAD), "step 1")
        found = watch.summary()
        assert {name: found[name] for name in ("on_conflict", "sightings", "training_texts")} == {
            "on_conflict": "yield",
            "sightings": 1,
            "training_texts": 1,
        }
        assert found["given_up"] == sorted([FRANCE.key, NORWAY.key])
        assert found["facts"][FRANCE.key] == {"sightings": 1, "training_texts": 1, "text": WORSE}


# -- several ranks -----------------------------------------------------------------------------------------------------


def exchanged() -> dict[str, Any]:
    """The first rank sees nothing, the second one two texts in three batches."""
    ranks, lines = Ranks.current(), []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keeping()
    logging.getLogger("lit_moeedit.callbacks.conflicts").addHandler(handler)
    watch = watch_of("yield")
    for _ in range(3):
        watch.look(*batch(WORSE, BAD) if ranks.rank else batch(GOOD), "step 1")
    alone = watch.metrics["edit/conflicts"]
    assert watch.given_up == set()  # the same on all ranks at any time
    watch.exchange(ranks)
    assert watch.given_up == {FRANCE.key, NORWAY.key}
    first = watch.state_dict()
    watch.look(*batch(BAD), "step 2")
    watch.exchange(ranks)
    watch.exchange(ranks)
    return {"alone": alone, "first": first, "second": watch.state_dict(), "lines": lines}


def found_ahead() -> list[str]:
    """Each rank has other texts; what is given up is the same."""
    watch = watch_of("yield")
    watch.look_ahead([WORSE] if Ranks.current().rank else [GOOD])
    return sorted(watch.given_up)


def refused_on_one_rank() -> str:
    ranks, watch = Ranks.current(), watch_of("refuse")
    watch.look(*batch(GOOD), "step 1")
    try:
        watch.look(*batch(BAD if ranks.rank else GOOD), "step 2")
    except (ContradictionError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_ranks_share_their_counts_and_refuse_together() -> None:
    calls = {"exchanged": (exchanged,), "ahead": (found_ahead,), "refused": (refused_on_one_rank,)}
    found = run_each(calls, 2)
    assert found["ahead"] == [sorted([FRANCE.key, NORWAY.key])] * 2
    one, other = found["exchanged"]
    assert (one["alone"], other["alone"]) == (0, 6)
    assert one["first"] == other["first"] and one["second"] == other["second"]
    assert one["first"]["facts"] == {FRANCE.key: 6, NORWAY.key: 3} and one["first"]["texts"] == 6
    assert one["first"]["given_up"] == sorted([FRANCE.key, NORWAY.key])
    assert one["second"]["facts"] == {FRANCE.key: 8, NORWAY.key: 3}
    # each fact once, by the first rank, too
    assert len(one["lines"]) == 2 and all("rank 1: step 1" in line for line in one["lines"])
    one, other = found["refused"]
    assert one.startswith("RankError: rank 1 failed: ContradictionError: step 2") and "Paris" in one
    assert other.startswith("ContradictionError: step 2")


# -- in a run ----------------------------------------------------------------------------------------------------------


class Watching(L.Callback):
    """Looks at every batch, as a callback with a watch does."""

    def __init__(self, policy: Any) -> None:
        self.watch = ConflictWatch(policy)
        self.labels: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.protect(trainer.datamodule.corpus.edits, trainer.datamodule.tokenizer)
        self.watch.look_ahead(trainer.datamodule.training_texts())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = f"step {trainer.global_step}"
        self.watch.look(batch["input_ids"], batch["attention_mask"], batch["labels"], step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.labels.append(batch["labels"])
        self.watch.exchange(Ranks.current())


def test_a_run_trains_on_no_old_answer(tiny, make_trainer, tmp_path) -> None:
    """All statements are drawn once an epoch; three of each edited fact have its old answer."""
    data, watching = tiny.data(samples_per_epoch=64, drop_edited=False), Watching("mask")
    trainer = make_trainer(tmp_path, [watching], max_epochs=2)
    trainer.fit(tiny.module(), data)
    edits = data.corpus.edits
    size = len(data.train_dataloader().dataset)
    assert size <= 64
    found = watching.watch.counts
    assert {key: one.sightings for key, one in found.items()} == {fact.key: 2 * 3 * 2 for fact in edits}
    assert {one.training_texts for one in found.values()} == {3}
    trained = torch.cat([labels[labels != -100] for labels in watching.labels])
    answers = data.tokenizer.decode(trained).split()
    assert answers and not {fact.target_true for fact in edits} & set(answers)
    # a report takes the reason for a lost edit from there, or from the data module
    texts = contradicting_texts(trainer, edits)
    assert all(fact.target_true in texts[fact.key] for fact in edits)
    trainer.callbacks.remove(watching)
    assert set(contradicting_texts(trainer, edits)) == {fact.key for fact in edits}
    data.drop_edited = True
    data.facts_edited(edits[1:])
    assert set(contradicting_texts(trainer, edits)) == {edits[0].key}
    assert edits[1].target_true not in " ".join(data.training_texts())


def test_a_data_module_with_texts_alone() -> None:
    class Texts:
        def training_texts(self) -> list[str]:
            return [GOOD, WORSE]

    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    trainer.datamodule = Texts()  # type: ignore[attr-defined]
    assert contradicting_texts(trainer, [FRANCE]) == {FRANCE.key: WORSE}
