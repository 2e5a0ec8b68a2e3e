"""The callback that keeps edits through the rest of training: statements of edited facts are trained on."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.charts import log_now
from lit_moeedit.callbacks.conflicts import ConflictWatch, OnConflict
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.replaced_step import ReplacedStep, Step
from lit_moeedit.callbacks.resources import check_parallelism, find_tokenizer, from_datamodule
from lit_moeedit.checkpoint_fields import check_fields
from lit_moeedit.data.encoding import Encoding, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import score
from lit_moeedit.edits import read_edits
from lit_moeedit.models.experts import find_model
from lit_moeedit.replay import (
    BatchFormError,
    Draws,
    Statements,
    append_rows,
    as_batch,
    check_form,
    find_parts,
    with_parts,
)
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import is_partitioned

log = logging.getLogger(__name__)

MEASURE_EVERY = 16
"""Optimizer steps between two measurements of what facts need."""
MEASURED = 0.5
"""Facts that are measured, as a share of the statements drawn since the last measurement."""
LONG = 8
"""A batch whose rows are this many times as long as the longest statement wastes rows on statements."""


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
        share: number of statements in proportion to the rows of a batch, on average; with ``weight`` the number of
            their tokens in proportion to the tokens of the batch.
        every_n_steps: add statements to the batches of every so many optimizer steps only.
        weight: ``None`` makes the statements rows of the batch. A number gives them a forward of their own, after that
            of the batch, and adds their loss times ``weight``. That suits long rows, of which a statement would waste
            one, and batches of any form. The loss is ``pl_module.replay_loss(batch)`` if there is such a method, else
            that of the model.
        paraphrases: maximum number of paraphrases of a fact that are stated besides its prompt.
        by_need: draw every other statement by need: now and then the probabilities of some facts' new targets are
            measured, and those that are nearly lost are stated more often.
        on_conflict: treatment of training text that contradicts an edit: ``warn``; ``mask`` its old answer, which gets
            no loss; ``yield``: state that fact no longer; ``refuse``: end the run with an error.
        contexts: texts put before the prompts; ``None`` takes those of the editors.
        edits: an edit, or a folder of edits (see :mod:`lit_moeedit.edits`), whose facts are stated from the start, such
            as those that the base model came with.
        seed: seed of the draws.
        tokenizer: a path or hub id; ``None`` takes that of the module or the data module.
        name: log ``replay_<name>/…``.

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
    state_names = ("_needs", "watch")

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
    ) -> None:
        self.on_conflict = on_conflict
        super().__init__(name)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if weight is not None and not 0.0 < weight < math.inf:
            raise ValueError(f"weight must be above 0, or None for rows of the batch, got {weight}")
        if paraphrases < 0:
            raise ValueError(f"paraphrases must be at least 0, got {paraphrases}")
        if contexts is not None and not contexts:
            raise ValueError("contexts needs at least one text (an empty one for the prompt alone)")
        self.share, self.every_n_steps, self.weight = share, every_n_steps, weight
        self.paraphrases, self.by_need, self.contexts = paraphrases, by_need, contexts
        self.edits = edits
        self._draws, self._tokenizer_source = Draws(seed), tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._statements: Statements | None = None
        self._filed: tuple[Fact, ...] = ()
        self._seen: Sequence[Mapping[str, Any]] = ()  # the applied facts of each callback, as they were last taken
        self._is_checked = False
        self._step = ReplacedStep()
        self._has_warned = False
        self._seen_step = 0

    @override
    def begin_state(self) -> None:
        self._needs: dict[str, float] = {}
        self.watch = ConflictWatch(self.on_conflict, self.heading)
        """Findings of text that contradicts edits."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts that are stated now."""
        return () if self._statements is None else self._statements.facts

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
        part, statements = next(find_parts(batch)), self._statements
        assert statements is not None
        if self.weight is None:
            return self.share * len(part["input_ids"])
        mask = part.get("attention_mask")
        tokens = part["input_ids"].numel() if mask is None else int((mask > 0).sum())
        lengths = [len(encoding.ids) for own in statements.values() for encoding in own]
        return self.share * tokens * len(lengths) / sum(lengths)

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parallelism(trainer, pl_module, type(self).__name__)
        self._tokenizer = self._statements = None
        self._is_checked, self._seen = False, ()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        with Ranks.current().together():  # files may be missing on one rank only
            self._check_run(trainer, pl_module)
            self._filed = () if self.edits is None else tuple(_facts_of(self.edits))
            self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, type(self).__name__)
            contexts = self.contexts
            if contexts is None:
                known = (getattr(e.editor, "contexts", ("",)) for e in callbacks_of(trainer, EditState))
                contexts = list(dict.fromkeys(text for own in known for text in own)) or [""]
            self._statements = Statements(self._tokenizer, contexts, self.paraphrases, self._filed)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()  # if the last batch was skipped, its end was not told
        if not self._is_checked:
            self._check_first(batch)
        self._take_facts(trainer)
        masked = self._look(trainer, batch)
        is_due = bool(self.facts) and trainer.global_step % self.every_n_steps == 0
        rows = self._draw(trainer, batch) if is_due else []
        if rows or masked:
            self._replace_step(pl_module, rows, masked)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()
        has_stepped, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        if not self._seen or not has_stepped or trainer.global_step % self._measure_every:
            return
        self.watch.exchange(Ranks.current())
        log_now(trainer, self.watch.metrics)
        if self.by_need and self.facts:
            self._measure(trainer, pl_module, self.count_rows(batch))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step.restore()
        self.watch.exchange(Ranks.current())

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._step.restore()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"needs": dict(self._needs), "conflicts": self.watch.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_fields("the state of EditReplay in the checkpoint", state_dict, needs={str: (int, float)}, conflicts=dict)
        self._needs = dict(state_dict["needs"])
        self.watch.load_state_dict(state_dict["conflicts"])

    # -- the work -----------------------------------------------------------------------------------------------------

    def _check_run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        own = type(self).__name__
        if self.edits is None and not callbacks_of(trainer, EditState):
            raise MisconfigurationException(
                f"{own} has nothing to state: give the Trainer a KnowledgeEditing callback, or {own} the argument "
                "'edits' (a folder of edits)"
            )
        if self.weight is not None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{own}: weight needs automatic optimization, which {type(pl_module).__name__} does not use; leave "
                "weight out to add statements as rows of the batch"
            )
        if self.weight is not None and any(is_partitioned(weight) for weight in pl_module.parameters()):
            raise MisconfigurationException(
                f"{own}: weight needs a second forward in each step, after which DeepSpeed ZeRO stage 3 reduces "
                "gradients twice and fails; leave weight out to add statements as rows of the batch"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{own} adds rows to batches, but training_step of {type(pl_module).__name__} takes dataloader_iter"
            )

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
        assert self._statements is not None and self._tokenizer is not None
        editings = callbacks_of(trainer, EditState)
        applied = [editing.neighbours_before for editing in editings]
        is_same = len(applied) == len(self._seen) and all(a is b for a, b in zip(applied, self._seen, strict=True))
        if is_same and not (self.watch.given_up & self._statements.keys()):
            return
        facts = [*self._filed, *(fact for editing in editings for fact in editing.recorded_facts)]
        if not is_same:
            self._seen = applied
            self.watch.protect(facts, self._tokenizer)
            texts = from_datamodule(trainer, "training_texts") if facts else None
            if texts is not None:
                self.watch.look_ahead(texts)
        self._statements = self._statements.of(fact for fact in facts if fact.key not in self.watch.given_up)
        self._needs = {key: need for key, need in self._needs.items() if key in self._statements}
        if facts:
            log.info("%s%d edited facts are stated from now on", self.heading, len(self._statements))

    def _look(self, trainer: L.Trainer, batch: Any) -> list[Mapping[str, Any]]:
        """Look for text that contradicts edits; returns the parts of the batch if some of their labels are masked."""
        if not self._seen and not self._filed:
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
        assert self._statements is not None
        expected, number = self.count_rows(batch), trainer.fit_loop.epoch_loop.total_batch_idx
        self._warn_of_long_rows(batch)
        count = self._draws.count(expected, number)
        if self.weight is not None:
            count = max(1, count)  # ranks with batches of other lengths must all make the forward or none
        start = math.floor(expected * number / self.every_n_steps) * trainer.world_size + trainer.global_rank * count
        needs = self._needs if self.by_need else None
        return self._draws.draw(self._statements, count, start, number, trainer.global_rank, needs)

    def _warn_of_long_rows(self, batch: Any) -> None:
        part = next(find_parts(batch), None)
        if self.weight is not None or part is None or self._statements is None or self._has_warned:
            return
        length, longest = part["input_ids"].shape[1], self._statements.longest
        if length >= LONG * longest:
            self._has_warned = True
            log.warning(
                "%sthe rows of the batches have %d tokens, and each statement of at most %d takes a whole row; "
                "weight: 1.0 gives statements a forward of their own, which costs less",
                self.heading,
                length,
                longest,
            )

    def _replace_step(
        self, pl_module: L.LightningModule, rows: Sequence[Encoding], masked: Sequence[Mapping[str, Any]]
    ) -> None:
        """Let the next ``training_step`` train on statements, too, and on the labels of ``masked``, if there is any."""

        def step(original: Step, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if masked:
                parts = zip(find_parts(batch), masked, strict=True)
                batch = with_parts(batch, iter([_with_labels(part, own) for part, own in parts]))
            if rows and self.weight is None:
                batch = self.add_rows(batch, rows)
            output = original(batch, *args, **kwargs)
            if not rows or self.weight is None or output is None:
                return output
            return self._added(output, self._loss(pl_module, rows))

        self._step.put(pl_module, step)

    def _loss(self, pl_module: L.LightningModule, rows: Sequence[Encoding]) -> Tensor:
        """Compute the loss of the statements in a forward of their own."""
        assert self._tokenizer is not None
        own = as_batch(rows, pad_id(self._tokenizer))
        batch = {name: tensor.to(pl_module.device) for name, tensor in own.items() if name != "position_ids"}
        loss_of = getattr(pl_module, "replay_loss", None)
        loss: Tensor = loss_of(batch) if callable(loss_of) else find_model(pl_module)(**batch, use_cache=False).loss
        pl_module.log(f"{self.metrics_prefix}/loss", loss.detach())
        return loss

    def _added(self, output: Any, loss: Tensor) -> Any:
        """Add the loss of the statements to what ``training_step`` returned."""
        assert self.weight is not None
        if isinstance(output, Tensor):
            return output + self.weight * loss
        return {**output, "loss": output["loss"] + self.weight * loss}

    @property
    def _measure_every(self) -> int:
        """Optimizer steps between two measurements, a multiple of those between two replays."""
        return self.every_n_steps * max(1, MEASURE_EVERY // self.every_n_steps)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, expected: float) -> None:
        """Measure the probabilities of the new targets of some facts, in turn."""
        assert self._statements is not None
        facts = self._statements.facts
        replays = self._measure_every // self.every_n_steps * trainer.world_size
        # the batches of two ranks may have other numbers of rows
        count = Ranks.current().least(min(len(facts), max(1, math.ceil(MEASURED * expected * replays))))
        start = trainer.global_step // self._measure_every * count
        chosen = [facts[(start + i) % len(facts)] for i in range(count)]
        with Ranks.current().together():
            found = score(
                find_model(pl_module),
                self._statements.tokenizer,
                [fact.prompt for fact in chosen],
                [fact.target_new for fact in chosen],
            )
        needs = torch.where(found.exact, 1.0 - found.log_prob.exp(), 1.0).tolist()
        self._needs |= {fact.key: need for fact, need in zip(chosen, needs, strict=True)}
        log_now(trainer, {f"{self.metrics_prefix}/need": sum(self._needs.values()) / len(self._needs)})


def _with_labels(part: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    if "labels" not in other:
        return part
    changed = copy.copy(part)
    changed["labels"] = other["labels"]  # type: ignore[index]
    return changed


def _facts_of(edits: str) -> list[Fact]:
    """Return the facts of an edit or of a folder of edits, in the order of the edits."""
    return [fact for edit in read_edits(edits) for fact in edit.facts]
