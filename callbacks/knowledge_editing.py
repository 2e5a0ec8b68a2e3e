"""The callback that edits facts of a model while the Trainer runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lit_moeedit.callbacks.averages import final_weights
from lit_moeedit.callbacks.copies import CopyPolicy, OtherCopies
from lit_moeedit.callbacks.edit_files import EditFiles
from lit_moeedit.callbacks.ending import EndTogether
from lit_moeedit.callbacks.foresight import Foresight, is_restored_late, tell_of_averages
from lit_moeedit.callbacks.frozen import FrozenEdits
from lit_moeedit.callbacks.guards import Guards
from lit_moeedit.callbacks.measures import find_measures
from lit_moeedit.callbacks.renewals import EditRenewing, Renewal, RenewalMoment, RenewalSettings
from lit_moeedit.callbacks.survival import SurvivalCurve
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMethod
from lit_moeedit.editing.further import check_measures
from lit_moeedit.editing.outcomes import OnFailure
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class KnowledgeEditing(EditRenewing):
    """Edit facts in the routed experts of the model between epochs or steps, and measure what is left of them.

    It works with any ``LightningModule`` that holds one transformers MoE model, in ``fit``, ``validate`` and ``test``.
    Everything is checked when the run starts: the model's layers, the tokenizer, and every fact. An edit is a
    transaction; gradients, modes and random states are as they were afterwards, and an edited run can be stopped
    and resumed without repeating or losing an edit.

    After an edit, every validation logs ``edit/efficacy``, ``edit/generalization``, ``edit/specificity_retained`` and
    the other metrics of :class:`~lit_moeedit.metrics.EditSuccess` for all facts edited so far. What a monitor names is
    logged before the first edit, too. The edit itself logs ``edit_before/…`` and ``edit_after/…``. To decide otherwise
    when to edit or what to keep, override :meth:`due` or :meth:`should_keep`.

    Where Lightning's ``WeightAveraging`` or ``StochasticWeightAveraging``, or an ``AveragedModel`` of torch, keeps an
    average of the weights, the average gets every edit, too. With ``WeightAveraging`` the average is what is validated
    and kept, so facts are edited and measured there, and the weights in training get the same change.

    The state belongs to the model: a fit of another model with the same callback edits that model.

    A trainer may have several of these callbacks, each with a name and with facts of its own. Only editors that share
    an :class:`~lit_moeedit.editing.EditMemory` hold back what they do to each other's edits.

    Args:
        editor: the editing method.
        facts: a facts file (see :func:`~lit_moeedit.data.read_facts`), facts, or objects with the keys of a row of a
            facts file; ``None`` takes those of the editor, if it brings its own
            (:class:`~lit_moeedit.edits.SavedEdits`), or asks the data module's ``edit_facts()``.
        at: the moment: ``fit_start``, ``validation`` (also in ``validate`` and ``test``), ``{epoch: N}`` (before epoch
            N, counted from 0), ``{step: N}`` (after N optimizer steps, those of all optimizers as in
            ``trainer.global_step``), or ``{every_n_epochs: N, batch: M}``.
        preservation: a text file with one document per line, or texts, on which the experts must keep their behavior;
            ``None`` asks the data module's ``preservation_texts()``.
        renew_every_n_steps: edit what training has undone again, every this many optimizer steps after an edit: facts
            that the model no longer generates are brought back, the others enter with residual 0, so that they stay
            (see ``renewal``). ``None`` leaves the edits to what training makes of them.
        renew_below: renew when, at a point of the survival curve, less than this share of the edits that were generated
            just after their edit are still generated, such as 0.95. Not with ``renew_every_n_steps``.
        renew_at: ``points`` for every point of the curve, of which the last planned step of the training is one, or
            ``end`` for that step alone, so that the training text is learned as without renewals. At the end edits are
            renewed by need, too, or without ``renew_below`` in any case; with ``reuse`` and ``anew`` if any are lost.
        renewal: ``reuse`` brings lost facts back to the hidden states that their edit aimed for, with the second
            moments of the edit; facts that stay lost get a target vector by search. ``all`` brings facts back that are
            still generated, too, because their paraphrases are lost before they are. ``anew`` searches all target
            vectors and computes the moments again, which costs as much as an edit. ``replace`` does so with all edits,
            after it has taken their earlier changes out of the weights: training on text that is unlike the preserved
            one moves keys, so that these changes reach what they left alone. Not with ``save_edits``.
        max_renewals: stop renewing after this many times.
        tokenizer: a path or hub id; ``None`` takes the ``tokenizer`` attribute of the module or the data module.
        on_failure: treatment of an edit that the guards below would keep, but after which more than half of the facts
            are not generated: ``raise`` undoes it and ends the run with the reasons; ``undo`` undoes it, warns, and
            goes on without these facts; ``keep`` keeps it.
        min_efficacy: smallest share of edited prompts for which the new answer is more likely than the old one; an edit
            with less is undone. (Of ``lit-moeedit edit`` it is the share that the model continues with the new answer.)
            A fact without ``target_true`` counts if the model generates its new target.
        min_specificity_retained: undo an edit that keeps less of its neighbours than this. Without a neighbour that was
            answered right before the edit there is nothing to compare, and the edit is kept.
        max_perplexity_ratio: undo an edit after which the perplexity of the probe text is more than this times that
            before. The probe are the data module's ``probe_texts()``, or else the preservation texts; 256 at most.
        min_routing_similarity: undo an edit after which the routing of the probe text is less similar than this, on
            average over the layers, see :class:`~lit_moeedit.callbacks.RoutingMonitor`.
        strict: whether a bad row of a facts file is an error (otherwise it is skipped and counted).
        other_copies: treatment of other copies of the edited weights that callbacks, attributes of the module or
            optimizers hold, because an edit is lost where they take the place of the weights: ``refuse`` modules and
            tensors of optimizers, and warn of loose tensors, which may be snapshots; ``edit`` all of them, too; or
            ``ignore`` them, such as a teacher.
        name: log ``edit_<name>/…``, ``edit_<name>_before/…`` and so on instead.
        columns: field names to column names, for a facts file with other names.
        survival_every_n_steps: measure what is left of the edits every this many optimizer steps, see
            :class:`~lit_moeedit.callbacks.listener.SurvivalEvent`. ``auto`` measures just after an edit or renewal, 32
            steps later, and then at twice as many steps each time, with at most 1024 steps in between; ``None`` or 0
            never.
        survival_facts: maximum number of facts measured then: those with the lowest keys, which is a fixed random
            sample. Two paraphrases and two neighbours of each are measured at most.
        save_edits: write each kept edit and renewal as a file (see :mod:`lit_moeedit.edits`) into this folder, or
            (``True``) into ``edits`` in the run's own folder.
        measure: further measures around each edit and, by an :class:`~lit_moeedit.callbacks.EditReport`, when training
            ends, beside the metrics above: some of ``generation``, ``fluency``, ``portability``, ``multi_hop``,
            ``reversed``, ``probability_gap``, ``general_ability``, ``weight_growth``, ``null_space_rank`` and
            ``template_routing``, see :mod:`lit_moeedit.editing.further`.

    Raises:
        ValueError: if an argument is out of range.
        FailedEditError: after an edit of which most facts failed, with ``on_failure: raise``.
        MisconfigurationException: when the run starts, if there is no tokenizer, no facts or no preservation text, the
            model or a layer cannot be edited, or the parameters are sharded in a way that is not supported (supported
            are one process, DDP, and DeepSpeed ZeRO stages 0 to 3); if there is a copy of the weights that edits would
            not reach; if two of these callbacks would log under the same names, or have different targets for a prompt;
            if the fit ends before the first edit.
        FactError: when the run starts, if a fact cannot be edited.

    Example:
        >>> from lit_moeedit.editing import Editor
        >>> callback = KnowledgeEditing(Editor(layers=[3, 4]), facts="facts.jsonl", at={"epoch": 1})
        >>> callback.schedule.moment
        'epoch'
    """

    def __init__(
        self,
        editor: EditMethod,
        facts: str | list[dict[str, Any]] | list[Fact] | None = None,
        at: str | dict[str, int] = "fit_start",
        preservation: str | list[str] | None = None,
        renew_every_n_steps: int | None = None,
        max_renewals: int | None = None,
        tokenizer: str | None = None,
        min_efficacy: float = 0.0,
        min_specificity_retained: float = 0.0,
        strict: bool = True,
        name: str | None = None,
        columns: dict[str, str | list[str]] | None = None,
        other_copies: OtherCopies = "refuse",
        save_edits: bool | str = False,
        max_perplexity_ratio: float | None = None,
        min_routing_similarity: float = 0.0,
        on_failure: OnFailure = "raise",
        renew_below: float | None = None,
        renewal: Renewal = "reuse",
        survival_every_n_steps: int | Literal["auto"] | None = "auto",
        survival_facts: int = 64,
        measure: list[str] | None = None,
        renew_at: RenewalMoment = "points",
    ) -> None:
        super().__init__(editor, facts, at, preservation, tokenizer, strict, name, columns)
        self.guards = Guards(min_efficacy, min_specificity_retained, max_perplexity_ratio, min_routing_similarity)
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure must be one of {', '.join(get_args(OnFailure))}, got {on_failure!r}")
        self.on_failure = on_failure
        self.measures = check_measures(measure or ())
        self.curve = SurvivalCurve(survival_every_n_steps, survival_facts)
        self.renewal = RenewalSettings(renew_every_n_steps, renew_below, max_renewals, renewal, renew_at)
        self.renewal.check(editor, self.curve, bool(save_edits))
        self.other_copies = other_copies
        self._copies = CopyPolicy(other_copies, self.heading)
        self._seen_step, self._has_stepped = 0, False
        self._frozen = FrozenEdits()
        self._edit_files = EditFiles(save_edits, self.heading)

    # -- what the run is about ----------------------------------------------------------------------------------------

    def due(self, trainer: L.Trainer, moment: str) -> Sequence[Fact]:
        """Select the facts to edit now.

        Args:
            trainer: the trainer, for its epoch and step.
            moment: ``"epoch"`` (before a training epoch), ``"step"`` (after a training batch; by default facts are due
                only if its gradients were used in an optimizer step) or ``"validation"`` (before a validation or test
                run).
        """
        if moment == "epoch":
            is_due = self.schedule.due_at_epoch(trainer.current_epoch, self._edits_made)
            is_due = is_due or (trainer.global_step == 0 and self.schedule.due_at_step(0))
        elif moment == "step":
            is_due = self._has_stepped and self.schedule.due_at_step(trainer.global_step)
        else:
            is_due = self.schedule.moment == "validation"
        return self.pending_facts[: self.schedule.batch] if is_due else []

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._copies = CopyPolicy(self.other_copies, self.heading)
        EndTogether.add_to(trainer)
        self._frozen = self._frozen.add_to(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._frozen.begin(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and trainer.ckpt_path is None:  # a new trainer counts epochs and steps anew
            self._last_step = self._edits_made = 0
        # these weights were not there yet when the fit started; one callback checks them for all
        if is_restored_late(trainer) and self._take_layers(trainer) is not None:
            check_finite(find_model(pl_module), Ranks.current())
        self._seen_step = trainer.global_step
        if (foresight := self._foresight) is not None:
            edited_at = self._last_step if self._applied else None
            foresight.check_loaded(trainer, self.renew_every_n_steps, edited_at)
        if self.renewal.at == "end" and self.may_renew:
            tell_of_averages(trainer, self.heading)
        if trainer.fit_loop.restarted_mid_epoch:  # there is no start of this epoch
            self.on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._edit(trainer, pl_module, self.due(trainer, "epoch"))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._layers = None
        # not after a batch whose gradients are accumulated
        self._has_stepped, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        self._follow(trainer, pl_module)
        self._edit(trainer, pl_module, self.due(trainer, "step"))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.pending_facts:
            text = "%sthe run has ended at epoch %d, step %d, before %d of %d facts were edited (at: %s)"
            counts = len(self.pending_facts), len(self.facts)
            log.warning(text, self.heading, trainer.current_epoch, trainer.global_step, *counts, self.schedule)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._applied:
            log.warning("%s'predict' edits no facts; it can take a checkpoint with edited weights", self.heading)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._prepare(trainer, pl_module)
            self._edit(trainer, pl_module, self.due(trainer, "validation"))

    on_test_start = on_validation_start

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_retention(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_curve(trainer, pl_module)
        with final_weights(trainer, pl_module):
            self.take_leave(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.take_leave(trainer, pl_module)

    on_test_end = on_validation_end

    @property
    def _foresight(self) -> Foresight | None:
        """Outlook of the schedule on the edits to come; ``None`` if :meth:`due` decides otherwise."""
        if type(self).due is not KnowledgeEditing.due:
            return None
        return Foresight(self.schedule, len(self.pending_facts), self._edits_made, self.heading)

    @override
    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._frozen.make_missing(trainer, pl_module)
        super()._prepare(trainer, pl_module)

    @override
    def _check_start(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Sequence[ExpertLayer]) -> None:
        if (foresight := self._foresight) is not None:
            foresight.check_start(trainer)
        self.probe = self.guards.probe(trainer, self)
        budget = self.editor.token_budget
        self.further = find_measures(trainer, self.measures, self.facts, self.tokenizer, budget, self.heading)
        self._copies.find(trainer, pl_module, [layer.index for layer in layers], at_start=True)
