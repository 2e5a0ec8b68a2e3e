"""The callback that keeps edits through the rest of training: statements of edited facts are trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.charts import log_now
from lit_moeedit.callbacks.conflicts import ConflictWatch, OnConflict
from lit_moeedit.callbacks.limited_rows import LimitedRows
from lit_moeedit.callbacks.needs import measure_needs, steps_between
from lit_moeedit.callbacks.replaced_step import ReplacedStep, Step, add_loss
from lit_moeedit.callbacks.replay_checks import check_run, warn_of_long_rows
from lit_moeedit.callbacks.replay_loss import loss_of_statements
from lit_moeedit.callbacks.replayed import Tally
from lit_moeedit.callbacks.resources import check_parallelism, find_tokenizer
from lit_moeedit.callbacks.stated import StatedFacts, contexts_of
from lit_moeedit.checkpoint_fields import check_fields
from lit_moeedit.data.encoding import Encoding, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.edits import read_edits
from lit_moeedit.replay import (
    BatchFormError,
    Draws,
    Statements,
    append_rows,
    check_form,
    find_parts,
    with_labels,
    with_parts,
)
from lit_moeedit.reports import Replayed
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class EditReplay(StateOfWeights):
    """Train on statements of the edited facts, so that edits outlive the rest of training.

    Training undoes edits by moving the keys of the edited experts, and hardly their down-projections. From the first
    edit on, some rows of each batch state edited facts: a prompt after one of the editor's contexts, and the new
    target, whose tokens alone count in the loss. No weight is touched. Facts of all
    :class:`~lit_moeedit.callbacks.KnowledgeEditing` of the trainer are stated, while their edit is in the weights, and
    those of ``edits``. Of two facts with the same prompt the later one is stated.

    Rows are added to a batch before ``training_step`` sees it; other callbacks see the batch as it was. Batches are
    dicts of ``input_ids``, ``labels`` and possibly ``attention_mask`` and ``position_ids``, padded on any side, or
    collections of such dicts, of which the first gets the rows. Other forms are refused by name at the first batch;
    override :meth:`check_batch` and :meth:`add_rows` to support them. The rows depend on the seed, the batch and the
    rank alone, so a resumed run trains on the same ones.

    Text that still states the old answer works against an edit, and against the other edits, too. It is looked for in
    the data module's ``training_texts()``, if it has such a method, and in every batch, see
    :class:`~lit_moeedit.callbacks.conflicts.ConflictWatch`. What was found is in :attr:`watch`.

    Args:
        share: maximum number of statements in proportion to the rows of a batch, on average; with ``weight`` the
            number of their tokens in proportion to the tokens of the batch.
        every_n_steps: add statements to the batches of every so many optimizer steps only.
        weight: ``None`` makes the statements rows of the batch. A number gives them a forward of their own, after that
            of the batch, and adds their loss times ``weight``. That suits long rows, of which a statement would waste
            one, and batches of any form. The loss is ``pl_module.replay_loss(batch)`` if there is such a method, else
            that of the model.
        paraphrases: maximum number of paraphrases of a fact that are stated besides its prompt.
        by_need: draw every other statement by need: now and then the probabilities of some facts' new targets are
            measured. Facts that are nearly lost are stated more often, and those that are safe are left out.
        on_conflict: treatment of training text that contradicts an edit: ``warn``; ``mask`` its old answer, which gets
            no loss; ``yield``: state that fact no longer; ``refuse``: end the run with an error.
        contexts: texts put before the prompts; ``None`` takes those of the editors.
        edits: an edit, or a folder of edits (see :mod:`lit_moeedit.edits`), whose facts are stated from the start, such
            as those that the base model came with.
        seed: seed of the draws.
        tokenizer: a path or hub id; ``None`` takes that of the module or the data module.
        name: log ``replay_<name>/…``.
        gradient_limit: maximum norm of the gradient of the logits of a statement that is a row of the batch, in
            proportion to the mean of the batch's own rows: that of a statement whose target has the probability 0, and
            others have less in proportion. ``None`` for no limit. A statement that the model has nearly lost has a
            gradient many times as long as those of text that the model knows, and without a limit disturbs what is
            like the edited facts.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: when the run starts, if there is nothing to state, or the module cannot be used; at
            the first batch, if rows cannot be added to it.
        ContradictionError: with ``on_conflict: refuse``, at the first text that contradicts an edit.

    Example:
        >>> EditReplay(share=0.1).share
        0.1
    """

    groups = ("replay",)
    state_names = ("_needs", "_tally", "watch")

    def __init__(
        self,
        share: float = 0.05,
        every_n_steps: int = 1,
        weight: float | None = None,
        paraphrases: int = 0,
        by_need: bool = True,
        on_conflict: OnConflict = "warn",
        contexts: list[str] | None = None,
        edits: str | None = None,
        seed: int = 0,
        tokenizer: str | None = None,
        name: str | None = None,
        gradient_limit: float | None = 4.0,
    ) -> None:
        self.on_conflict = on_conflict
        super().__init__(name)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if weight is not None and not 0.0 < weight < math.inf:
            raise ValueError(f"weight must be above 0, or None for rows of the batch, got {weight}")
        if gradient_limit is not None and not 0.0 < gradient_limit < math.inf:
            raise ValueError(f"gradient_limit must be above 0, or None for no limit, got {gradient_limit}")
        if paraphrases < 0:
            raise ValueError(f"paraphrases must be at least 0, got {paraphrases}")
        if contexts is not None and not contexts:
            raise ValueError("contexts needs at least one text (an empty one for the prompt alone)")
        self.share, self.every_n_steps, self.weight = share, every_n_steps, weight
        self.paraphrases, self.by_need, self.contexts = paraphrases, by_need, contexts
        self.edits = edits
        self._draws, self._tokenizer_source = Draws(seed), tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stated: StatedFacts | None = None
        self._drawn = 0  # statements of the batch that is trained on now
        self._is_checked = False
        self._step = ReplacedStep()
        self._rows = LimitedRows(gradient_limit, self.heading)
        self._has_warned = False
        self._seen_step = 0

    @override
    def begin_state(self) -> None:
        self._needs: dict[str, float] = {}
        self._tally = Tally()
        self.watch = ConflictWatch(self.on_conflict, self.heading)
        """Findings of text that contradicts edits."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts that are stated now."""
        return () if self._stated is None else self._stated.statements.facts

    @property
    def replayed(self) -> Replayed | None:
        """The statements that were trained on so far; ``None`` if no fact has been stated."""
        tally = self._tally
        if not tally.statements and not tally.facts and not tally.given_up:
            return None
        return Replayed(
            self.share,
            "rows" if self.weight is None else "tokens",
            self.every_n_steps,
            tally.statements,
            tally.facts,
            self.on_conflict,
            int(self.watch.metrics["edit/conflicts"]),
            tally.given_up,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, for reports."""
        names = ("share", "every_n_steps", "weight", "paraphrases", "by_need", "on_conflict", "contexts", "edits")
        others = {"gradient_limit": self._rows.limit, "seed": self._draws.seed}
        return {**{name: getattr(self, name) for name in names}, **others}

    # -- what may be overridden ---------------------------------------------------------------------------------------

    def check_batch(self, batch: Any) -> None:
        """Check the first batch of the run.

        Raises:
            ValueError: if statements cannot be added to such batches.
        """
        if self.weight is None:
            check_form(batch)
        elif next(find_parts(batch), None) is None:
            raise BatchFormError("the batch has no input_ids, by which the number of statements is found")

    def add_rows(self, batch: Any, rows: Sequence[Encoding]) -> Any:
        """Return a batch with further rows; the batch itself stays as it is.

        Args:
            batch: the batch, on the device of the module.
            rows: the statements.
        """
        assert self._tokenizer is not None
        first, *others = find_parts(batch)
        return with_parts(batch, iter([append_rows(first, rows, pad_id(self._tokenizer)), *others]))

    def count_rows(self, batch: Any) -> float:
        """Return the number of statements for a batch, on average."""
        part = next(find_parts(batch))
        if self.weight is None:
            return self.share * len(part["input_ids"])
        mask = part.get("attention_mask")
        tokens = part["input_ids"].numel() if mask is None else int((mask > 0).sum())
        lengths = [len(encoding.ids) for own in self._statements.values() for encoding in own]
        return self.share * tokens * len(lengths) / sum(lengths)

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parallelism(trainer, pl_module, type(self).__name__)
        self._tokenizer = self._stated = None
        self._is_checked = False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        with Ranks.current().together():  # files may be missing on one rank only
            check_run(self, trainer, pl_module)
            filed = () if self.edits is None else [fact for edit in read_edits(self.edits) for fact in edit.facts]
            self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, type(self).__name__)
            contexts = contexts_of(trainer) if self.contexts is None else self.contexts
            self._stated = StatedFacts(Statements(self._tokenizer, contexts, self.paraphrases, filed))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()  # if the last batch was skipped, its end was not told
        self._drawn = 0
        if not self._is_checked:
            self._check_first(batch)
        self._take_facts(trainer)
        masked = self._look(trainer, batch)
        is_due = bool(self.facts) and trainer.global_step % self.every_n_steps == 0
        rows = self._draw(trainer, batch) if is_due else []
        self._drawn = len(rows)
        if rows or masked:
            self._replace_step(pl_module, rows, masked)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()
        self._tally.add(self._drawn, trainer.world_size)
        has_stepped, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        is_due = has_stepped and trainer.global_step % steps_between(self.every_n_steps) == 0
        if not is_due or self._stated is None or not self._stated.protected:
            return
        self._exchange()
        log_now(trainer, self.watch.metrics)
        if self.by_need and self.facts:
            expected = self.count_rows(batch)
            self._needs |= measure_needs(trainer, pl_module, self._statements, expected, self.every_n_steps)
            log_now(trainer, {f"{self.metrics_prefix}/need": sum(self._needs.values()) / len(self._needs)})

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step.restore()
        self._exchange()
        if self.replayed is not None:
            log.info("%sReplay: %s", self.heading, self.replayed)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._step.restore()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"needs": dict(self._needs), "conflicts": self.watch.state_dict(), "replayed": self._tally.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where, shapes = "the state of EditReplay in the checkpoint", {"conflicts": dict, "replayed": dict}
        # that of an earlier version has no count
        check_fields(where, state_dict, ("replayed",), needs={str: (int, float)}, **shapes)
        tally = Tally.of_state(where, state_dict.get("replayed") or {})
        self.watch.load_state_dict(state_dict["conflicts"])
        self._needs, self._tally = dict(state_dict["needs"]), tally

    # -- the work -----------------------------------------------------------------------------------------------------

    @property
    def _statements(self) -> Statements:
        """The statements of all facts that are stated now."""
        assert self._stated is not None
        return self._stated.statements

    def _check_first(self, batch: Any) -> None:
        """Check the form of the batches, on all ranks together."""
        with Ranks.current().together():
            try:
                self.check_batch(batch)
            except ValueError as error:
                own = type(self).__name__
                advice = f"override check_batch, add_rows and count_rows of {own}"
                if self.weight is None:
                    advice = f"weight: 1.0 gives statements a forward of their own, or {advice}"
                raise MisconfigurationException(f"{own}: {error}; {advice}") from error
        self._is_checked = True

    def _take_facts(self, trainer: L.Trainer) -> None:
        """Take the facts that are edited now, if they have changed."""
        assert self._stated is not None
        if not self._stated.update(trainer, self.watch):
            return
        self._needs = {key: need for key, need in self._needs.items() if key in self._statements}
        self._count_facts()
        if self._stated.protected:
            log.info("%s%d edited facts are stated from now on", self.heading, len(self._statements))

    def _count_facts(self) -> None:
        if self._stated is None or not self._stated.protected:
            return  # what is known of an earlier run stays
        given_up = self.watch.given_up
        self._tally.facts = sum(fact.key not in given_up for fact in self.facts)
        self._tally.given_up = tuple(fact.subject for fact in self._stated.protected if fact.key in given_up)

    def _exchange(self) -> None:
        """Make all counts those of all ranks; every rank calls this at the same moment."""
        ranks = Ranks.current()
        self.watch.exchange(ranks)
        self._tally.exchange(ranks)
        self._count_facts()

    def _look(self, trainer: L.Trainer, batch: Any) -> list[Mapping[str, Any]]:
        """Look for text that contradicts edits; returns the parts of the batch if some of their labels are masked."""
        if self._stated is None or not self._stated.protected:
            return []
        parts = list(find_parts(batch))
        if self.on_conflict == "mask":  # the labels may belong to the data
            parts = [{**part, "labels": part["labels"].clone()} if "labels" in part else part for part in parts]
        before = self.watch.metrics
        for part in parts:
            where = f"step {trainer.global_step}"
            self.watch.look(part["input_ids"], part.get("attention_mask"), part.get("labels"), where)
        if self.watch.given_up:
            self._take_facts(trainer)
        return parts if self.on_conflict == "mask" and self.watch.metrics != before else []

    def _draw(self, trainer: L.Trainer, batch: Any) -> list[Encoding]:
        expected, number = self.count_rows(batch), trainer.fit_loop.epoch_loop.total_batch_idx
        if self.weight is None and not self._has_warned:
            self._has_warned = warn_of_long_rows(batch, self._statements.longest, self.heading)
        count = self._draws.count(expected, number)
        if self.weight is not None:
            count = max(1, count)  # ranks with batches of other lengths must all make the forward or none
        start = math.floor(expected * number / self.every_n_steps) * trainer.world_size + trainer.global_rank * count
        needs, least = self._needs if self.by_need else None, int(self.weight is not None)
        return self._draws.draw(self._statements, count, start, number, trainer.global_rank, needs, least)

    def _replace_step(
        self, pl_module: L.LightningModule, rows: Sequence[Encoding], masked: Sequence[Mapping[str, Any]]
    ) -> None:
        """Let the next ``training_step`` train on statements, too, and on the labels of ``masked``, if there is any."""

        def step(original: Step, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if masked:
                parts = zip(find_parts(batch), masked, strict=True)
                batch = with_parts(batch, iter([with_labels(part, own) for part, own in parts]))
            if rows and self.weight is None:
                own, batch = batch, self.add_rows(batch, rows)
                first, labels = len(next(find_parts(own))["input_ids"]), next(find_parts(batch))["labels"]
                with self._rows.of(pl_module, labels, first):
                    return original(batch, *args, **kwargs)
            output = original(batch, *args, **kwargs)
            if not rows or self.weight is None or output is None:
                return output
            assert self._tokenizer is not None
            loss = loss_of_statements(pl_module, rows, self._tokenizer)
            pl_module.log(f"{self.metrics_prefix}/loss", loss.detach())
            return add_loss(output, self.weight * loss)

        self._step.put(pl_module, step)
