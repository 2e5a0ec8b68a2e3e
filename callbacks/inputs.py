"""The inputs of an edit that a run provides (tokenizer, facts, preservation texts, layers), found and checked once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks.averages import refuse_averages
from lit_moeedit.callbacks.belonging import StateOfWeights, model_of
from lit_moeedit.callbacks.charts import log_place
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.foresight import is_restored_late
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.resources import (
    check_model,
    check_parallelism,
    check_structure,
    find_facts,
    find_texts,
    find_tokenizer,
    from_datamodule,
    keep_experts_together,
    optimizers_of,
    refuse_contradictions,
)
from lit_moeedit.callbacks.schedule import Schedule
from lit_moeedit.data.encoding import check_offsets
from lit_moeedit.data.facts import CheckedFacts, Fact
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.editing import EditMethod
from lit_moeedit.editing.evaluation import check_queries
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.preservation.second_moments import MAX_TEXT_TOKENS
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class EditInputs(EditState):
    """A callback that finds and checks its inputs when a run starts, together with the others of the trainer.

    Args:
        editor: the editing method.
        facts: as for :class:`~lit_moeedit.callbacks.KnowledgeEditing`; likewise the others.
        at: the moment of the edit.
        preservation: source of the preservation texts.
        tokenizer: source of the tokenizer.
        strict: whether a bad row is an error.
        name: name of the callback.
        columns: names of the columns of a facts file.
    """

    def __init__(
        self,
        editor: EditMethod,
        facts: str | list[dict[str, Any]] | list[Fact] | None,
        at: str | dict[str, int],
        preservation: str | list[str] | None,
        tokenizer: str | None,
        strict: bool,
        name: str | None,
        columns: dict[str, str | list[str]] | None,
    ) -> None:
        source = facts if facts is None or isinstance(facts, str) else sha256(repr(facts).encode()).hexdigest()[:8]
        layers = "auto" if editor.finds_place else list(editor.layers)
        super().__init__(editor, name, facts=source, at=at, layers=layers)
        self.schedule = Schedule.parse(at)
        self.strict = strict
        self._facts_source, self._columns = editor.facts if facts is None else facts, columns
        self.preservation_source = preservation
        self._tokenizer_source = tokenizer
        self._texts: list[str] | None = None  # while an edit may still need them
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._layers: list[ExpertLayer] | None = None  # as checked, while the weights are what they were then
        self._is_place_logged = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            check_parallelism(trainer, pl_module, "KnowledgeEditing")
        self._refuse_shared_place(trainer)
        # the next run may have another model, tokenizer or data module
        self.facts, self._texts, self._tokenizer, self._layers = CheckedFacts(()), None, None, None
        self._is_place_logged = False
        refuse_averages(trainer)
        keep_experts_together(trainer, pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._texts = self._layers = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prepare(trainer, pl_module)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, known once the run has started."""
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is not known before the run starts")
        return self._tokenizer

    def preservation_texts(self, trainer: L.Trainer) -> list[str]:
        """Find the texts on which the experts must keep their behavior, once per run; empty if none are needed."""
        return find_texts(trainer, self.preservation_source) if self.editor.needs_moments else []

    def _check_start(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Sequence[ExpertLayer]) -> None:
        """Check before any forward what else the edits need; every rank calls this, and the facts are known."""
        raise NotImplementedError

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check everything for all callbacks of this kind: the first of them may edit before the next one's hook."""
        if self._tokenizer is not None:
            return
        ranks, editings = Ranks.current(), callbacks_of(trainer, EditInputs)
        for callback in callbacks_of(trainer, StateOfWeights):
            callback.take_up(model_of(pl_module))
        # files may be missing on one rank only
        with ranks.together():
            editors = [editing.editor for editing in editings]
            found = check_structure(trainer, pl_module, editors)
            for editing, layers in zip(editings, found, strict=True):
                editing._find(trainer, pl_module, ranks)
                editing._check_start(trainer, pl_module, layers)
            refuse_contradictions({editing.label: editing.facts for editing in editings})
            for editing, layers in zip(editings, check_model(pl_module, editors, ranks), strict=True):
                editing._layers = layers
            recognised = [editing.recognise(pl_module) for editing in editings]
            if not all(recognised) and not any(editing._applied for editing in editings):
                for callback in callbacks_of(trainer, StateOfWeights):  # no report or trace is of these weights
                    callback.begin_state()
            for editing in editings:
                if editing.applied_facts:  # the data module may be another than that of the edit
                    from_datamodule(trainer, "facts_edited", editing.applied_facts)

    def _find(self, trainer: L.Trainer, pl_module: L.LightningModule, ranks: Ranks) -> None:
        self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, "KnowledgeEditing")
        check_offsets(self._tokenizer)
        self.facts = find_facts(trainer, self._facts_source, self._tokenizer, self.strict, self._columns)
        ranks.check_same("the facts", [repr(fact) for fact in self.facts])
        self.editor.check_facts(self._tokenizer, self.facts)
        check_queries(self._tokenizer, self.facts)
        self.editor.remark_long_facts(find_model(pl_module), self._tokenizer, self.facts)
        if self.schedule.moment == "validation" or trainer.training:
            ranks.check_same("the preservation texts", self._take_texts(trainer))
        if is_restored_late(trainer):
            log.info(
                "%s%d facts; those that the checkpoint has edited are not edited again", self.heading, len(self.facts)
            )
        else:
            done = len(self.applied_facts)
            log.info("%s%d facts to edit, %d of them already edited", self.heading, len(self.facts), done)
        missing = len(self._applied) + len(self._undone) - len(self.edited_facts)
        if missing:
            text = "%s%d facts that were edited before are not among the facts now: nothing measures or renews them"
            log.warning(text, self.heading, missing)

    def _find_place(self, trainer: L.Trainer, pl_module: L.LightningModule, **kwargs: Any) -> None:
        """Let the editor find the layers and the token that were given as ``auto``, before the first edit."""
        if not self.editor.is_resolved:
            model, facts = find_model(pl_module), self.pending_facts or self.facts
            texts, optimizers = self._take_texts(trainer), optimizers_of(trainer)
            with Ranks.current().together():
                self.editor.resolve(model, self.tokenizer, facts, texts, optimizers=optimizers, **kwargs)
            self._layers = None  # these were all that could have been chosen
        if self.editor.finds_place and not self._is_place_logged:
            log_place(trainer, self.metrics_prefix, self.place)
            self._is_place_logged = True

    def _refuse_shared_place(self, trainer: L.Trainer) -> None:
        """Check that no other callback would edit at the place that the editor finds for the facts of this one.

        Raises:
            MisconfigurationException: naming both.
        """
        for other in callbacks_of(trainer, EditState):
            if other is not self and other.editor is self.editor and self.editor.finds_place:
                raise MisconfigurationException(
                    f"KnowledgeEditing: {self.label} and {other.label} share one {type(self.editor).__name__} object "
                    "with layers or token 'auto', or tune, which finds one place only; give each an editor of its own"
                )

    def _take_texts(self, trainer: L.Trainer) -> list[str]:
        """Return the preservation texts, which are cut once, so that no edit tokenizes what it does not use."""
        if self._texts is None:
            self._texts = cut_texts(self.tokenizer, self.preservation_texts(trainer), MAX_TEXT_TOKENS)
        return self._texts

    def _take_layers(self, trainer: L.Trainer) -> list[ExpertLayer] | None:
        """Return the layers as they were checked, once; all callbacks forget theirs, because the weights change."""
        layers = self._layers
        for editing in callbacks_of(trainer, EditInputs):
            editing._layers = None
        return layers
