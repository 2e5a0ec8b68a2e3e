"""The survival of edits in a run, and their renewals: edits that training has undone are brought back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks.attempts import attempt
from lit_moeedit.callbacks.averages import Copies, averaging_callbacks, edited_weights, final_weights
from lit_moeedit.callbacks.charts import log_now
from lit_moeedit.callbacks.edit_making import EditMaking
from lit_moeedit.callbacks.kept_changes import Change, by_layer
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.run_folder import run_folder
from lit_moeedit.callbacks.survival import SurvivalCurve
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMethod, Editor, EditResult, SecondMoments
from lit_moeedit.interrupts import Undo
from lit_moeedit.models.experts import find_model
from lit_moeedit.preservation.kept_moments import KeptMoments
from lit_moeedit.reports import Survivors
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

Renewal = Literal["reuse", "all", "anew", "replace"]
RenewalMoment = Literal["points", "end"]


@dataclass(frozen=True)
class RenewalSettings:
    """The settings of renewals, with the meaning that they have for :class:`~lit_moeedit.callbacks.KnowledgeEditing`.

    Raises:
        ValueError: if a setting is out of range.
    """

    every_n_steps: int | None = None
    below: float | None = None
    maximum: int | None = None
    kind: Renewal = "reuse"
    at: RenewalMoment = "points"

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"renew_every_n_steps must be at least 1, or None for never, got {self.every_n_steps}")
        if self.below is not None and not 0 < self.below <= 1:
            raise ValueError(f"renew_below is a share in (0, 1], or None for never, got {self.below}")
        if self.every_n_steps is not None and self.below is not None:
            raise ValueError(
                "give renew_every_n_steps or renew_below, not both: renewals come at an interval or by need"
            )
        if self.maximum is not None and self.maximum < 0:
            raise ValueError(f"max_renewals must be at least 0, or None for no limit, got {self.maximum}")
        if self.kind not in get_args(Renewal):
            raise ValueError(f"renewal must be one of {', '.join(get_args(Renewal))}, got {self.kind!r}")
        if self.at not in get_args(RenewalMoment):
            raise ValueError(f"renew_at must be one of {', '.join(get_args(RenewalMoment))}, got {self.at!r}")
        if self.at == "end" and self.every_n_steps is not None:
            raise ValueError("give renew_every_n_steps or renew_at: end, not both: an interval or the last step")
        if self.takes_all and not self._have_moment:
            raise ValueError(f"renewal: {self.kind} needs a moment: renew_at: end, renew_below or renew_every_n_steps")

    @property
    def are_wanted(self) -> bool:
        """``True`` if edits are renewed at all."""
        return self._have_moment and self.maximum != 0

    @property
    def _have_moment(self) -> bool:
        return self.every_n_steps is not None or self.below is not None or self.at == "end"

    @property
    def keeps_goals(self) -> bool:
        """``True`` if renewals bring edits back to the hidden states that they aimed for."""
        return self.kind in ("reuse", "all")

    @property
    def takes_all(self) -> bool:
        """``True`` if renewals are also of edits that are still generated."""
        return self.kind in ("all", "replace")

    def check(self, editor: EditMethod, curve: SurvivalCurve, writes_files: bool = False) -> None:
        """Check that the editor, the survival curve and edit files allow renewals.

        Raises:
            ValueError: if they do not.
        """
        for name, value in (("renew_every_n_steps", self.every_n_steps), ("renew_below", self.below)):
            if value is not None and not editor.can_renew:
                raise ValueError(f"{name} must be None: {editor.name} cannot make edits anew")
        if self.at == "end" and not editor.can_renew:
            raise ValueError(f"renew_at must be points: {editor.name} cannot make edits anew")
        name = "renew_at: end" if self.below is None else "renew_below"
        if (self.at == "end" or self.below is not None) and not curve.is_on:
            raise ValueError(f"{name} is due at points of the survival curve: give survival_every_n_steps")
        if self.kind == "replace" and writes_files:
            raise ValueError("renewal: replace takes changes out, which no edit file can say: leave out save_edits")


class EditRenewing(EditMaking):
    """A callback that follows what training leaves of its edits, and makes those anew that it has undone.

    Attributes:
        renewal: settings of the renewals.
        survivors: the edits that were left when the latest training ended; ``None`` if they were not measured.
    """

    renewal: RenewalSettings
    survivors: Survivors | None = None

    @property
    def renew_every_n_steps(self) -> int | None:
        """Optimizer steps from an edit to its renewal; ``None`` for no fixed interval."""
        return self.renewal.every_n_steps

    @property
    def max_renewals(self) -> int | None:
        """Maximum number of renewals; ``None`` for no limit."""
        return self.renewal.maximum

    @property
    @override
    def may_renew(self) -> bool:
        return self.renewal.are_wanted and self.renewals != self.renewal.maximum

    def _follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure a point of the survival curve, and renew edits, if either is due after this batch."""
        if not self._applied or not self._has_stepped:
            return
        is_due, needs_point = self._renewal_due(trainer), self.curve.is_due(self.survival, trainer.global_step)
        is_last = _is_last_step(trainer)
        # a resumed run may have none of the facts that are edited
        if not (is_due or needs_point or is_last) or not self.applied_facts:
            return
        if needs_point or is_last:
            errors: list[BaseException] = []  # on all ranks or on none
            # the last point is tried again when training ends, which then tells why it failed
            with edited_weights(trainer, pl_module), nullcontext() if needs_point else attempt(errors.append):
                self.curve.measure(self, trainer, pl_module)
            for error in errors:
                level = logging.WARNING if self.renewal.at == "end" else logging.DEBUG
                log.log(level, "%sthe last point of the survival curve failed: %s", self.heading, error)
            is_due |= not errors and self._is_needed and (is_last or self.renewal.at == "points")
        if is_due:
            self._renew(trainer, pl_module)

    @property
    def _is_needed(self) -> bool:
        """``True`` if less is left at the last point than edits are renewed at, or if they are anyhow at the end."""
        below, share = self.renewal.below, self.survival.share
        return self.may_renew and (self.renewal.at == "end" if below is None else share < below)

    def _renewal_due(self, trainer: L.Trainer) -> bool:
        every = self.renewal.every_n_steps
        return every is not None and self.may_renew and trainer.global_step - self._last_step >= every

    def _renew(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        facts = self.applied_facts
        with edited_weights(trainer, pl_module) as copies, Ranks.current().together():
            lost = self._lost(pl_module, facts)
            if not lost and not self.renewal.takes_all:
                self._last_step = trainer.global_step
                return
            self._find_place(trainer, pl_module, histories=self._frozen.histories)
            goals, made = self._goals(facts, lost), self.renewals
            unknown = sum(goal is None for goal in goals.values())
            if unknown and self.renewal.kind == "all":
                text = "%s%d of %d edits are not brought back: their hidden states are not known, as without renewals"
                log.warning(text, self.heading, unknown, len(facts))
                if unknown == len(facts):
                    self._last_step = trainer.global_step
                    return
            taken = self._changes_to_take_out(pl_module, facts)
            stale = self._make_anew(trainer, pl_module, facts, copies, goals, taken, len(lost))
            if stale:
                # after much training, old hidden states may no longer give the answer; the attempt has been undone
                goals = {key: goal for key, goal in goals.items() if key not in stale}
                goals |= self._stay(fact for fact in facts if fact.key in stale and fact.key not in lost)
                self._make_anew(trainer, pl_module, facts, copies, goals, taken, len(lost), is_last=True)
            if self.renewals == made:
                self._last_step = trainer.global_step
                log.warning("%sa renewal was undone: more facts were lost after it than before", self.heading)
                return
            known = sum(goal is not None for goal in goals.values())
            searched = sum(fact.key not in goals for fact in facts)
            self._log_renewal(trainer, len(facts), len(lost), len(self._lost(pl_module, facts)), known, searched)
            self.curve.measure(self, trainer, pl_module, "renewal")
        self._release_texts()

    def end_curve(self, trainer: L.Trainer, pl_module: L.LightningModule, end: tuple[int, int] | None = None) -> None:
        """Measure the last point of the survival curve, with the weights that training ends with.

        A measurement that fails, on whichever rank, is logged and costs nothing else. Every rank calls this.

        Args:
            trainer: the trainer.
            pl_module: the module.
            end: epoch and optimizer step at which training ended; ``None`` for those of the trainer.
        """
        end = end or (trainer.current_epoch, trainer.global_step)

        def warn(error: BaseException) -> None:
            text = "%sthe survival of the edits at the end could not be measured: %s: %s"
            log.warning(text, self.heading, type(error).__name__, error)
            log.debug("", exc_info=error)

        self.survivors = None
        points = self.survival.points
        # an average of this kind takes the place of the weights only now
        is_new = callbacks_of(trainer, StochasticWeightAveraging) or not points
        is_new = is_new or points[-1].step != end[1]
        with final_weights(trainer, pl_module), attempt(warn):
            if self._applied and is_new:
                self.curve.measure(self, trainer, pl_module, end=end)
            self.survivors = self.curve.finish(self, trainer, pl_module)
            are_lost = self.renewal.takes_all or bool(self.survivors and self.survivors.lost)
            # edited or renewed, or tried to, with these weights
            is_recent = self._last_step == end[1]
            if self.renewal.at == "end" and self._applied and self._is_needed and are_lost and not is_recent:
                text = (
                    "%sedits are not renewed at the end: the run has not ended with its last planned step, averages "
                    "its weights, or could not measure them there"
                )
                log.warning(text, self.heading)

    def _log_renewal(
        self, trainer: L.Trainer, facts: int, before: int, after: int, brought: int, searched: int
    ) -> None:
        renewed = f"{self.metrics_prefix}_renewed"
        log_now(trainer, {f"{renewed}/before": before, f"{renewed}/after": after})
        text = "%srenewed edits at step %d: of %d facts %d were lost, now %d (known targets %d, searched anew %d)"
        log.info(text, self.heading, trainer.global_step, facts, before, after, brought, searched)

    def _lost(self, pl_module: L.LightningModule, facts: Sequence[Fact]) -> list[str]:
        """Return the keys of the facts whose new target is not generated."""
        generated = set(self.generated(pl_module, facts))
        return [fact.key for fact in facts if fact.key not in generated]

    def _goals(self, facts: Sequence[Fact], lost: Sequence[str]) -> dict[str, Tensor | None]:
        """Return the goals of a renewal: known ones, of lost facts or of all, and ``None`` of those that are to stay.

        Lost facts without a known goal are not among them, and get a target vector by search.
        """
        if not self.renewal.keeps_goals:  # of an edit that still holds the search ends at once
            return {}
        known = self._kept.goals
        brought = [fact for fact in facts if self.renewal.kind == "all" or fact.key in lost]
        # those of a checkpoint may be of an editor with other contexts or edit tokens
        rows = zip(brought, self.editor.count_rows(self.tokenizer, brought), strict=True)
        goals = {fact.key: known[fact.key] for fact, n in rows if len(known.get(fact.key, ())) == n}
        return self._stay(fact for fact in facts if fact.key not in lost) | goals

    @staticmethod
    def _stay(facts: Iterable[Fact]) -> dict[str, Tensor | None]:
        """Return the goals of facts whose hidden states are to stay as they are."""
        return {fact.key: None for fact in facts}

    def _make_anew(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        facts: Sequence[Fact],
        copies: Copies,
        goals: Mapping[str, Tensor | None],
        taken: Sequence[Change],
        most: int,
        is_last: bool = False,
    ) -> list[str]:
        """Edit facts again, in one transaction that takes earlier changes out first.

        An edit that is to stay is a row with residual 0, which keeps it.

        If more than ``most`` facts are lost then, the edit is undone.

        Returns:
            The keys of the facts that are still lost although their goals are known. If there are any, the edit is
            undone, unless it is the last attempt.
        """
        stale: list[str] = []

        def guard() -> bool:
            lost = self._lost(pl_module, facts)
            stale.extend(key for key in lost if goals.get(key) is not None)
            return len(lost) <= most and (is_last or not stale)

        states = self._edit_files.states(trainer, pl_module, self.editor.layers)
        moments, record = self._kept_moments(pl_module), partial(self._record_renewal, trainer, taken)
        result = self._change(
            trainer,
            pl_module,
            facts,
            copies,
            goals=goals,
            moments=moments,
            replaced=by_layer(taken),
            guard=guard,
            record=record,
        )
        if result.kept:
            found: list[str] = []
            if self.renewal.keeps_goals:
                # known goals stay, even where a limit has not let the edit reach them
                found = [key for key in self.generated(pl_module, facts) if goals.get(key) is None]
            self._keep(trainer, result, found, moments is not None)
        self._written = self._edit_files.save(trainer, pl_module, "renewal", self.editor, result, states, self._written)
        return stale

    def _changes_to_take_out(self, pl_module: L.LightningModule, facts: Sequence[Fact]) -> tuple[Change, ...]:
        """Return the changes that a renewal takes out: those of its own facts alone, in the layers that it edits."""
        if self.renewal.kind != "replace":
            return ()
        keys, changes = {fact.key for fact in facts}, self._kept.changes
        shapes = {layer.index: layer.shape for layer in self.editor.find_layers(find_model(pl_module))}
        taken = tuple(change for change in changes if keys.issuperset(change.facts) and change.fits(shapes))
        known = {key for change in taken for key in change.facts}
        if len(taken) < len(changes) or known < keys:
            text = (
                "%sthe changes of some edits (%d of %d facts) stay in the weights, and others are added: they are not "
                "known, or not those of the facts and the layers of this renewal alone"
            )
            staying = {key for change in changes if change not in taken for key in change.facts} | (keys - known)
            log.warning(text, self.heading, len(staying), len(keys | staying))
        return taken

    def _kept_moments(self, pl_module: L.LightningModule) -> Mapping[int, SecondMoments] | None:
        editor = self.editor
        if not self.renewal.keeps_goals or not isinstance(editor, Editor) or not editor.needs_moments:
            return None
        model = find_model(pl_module)
        layers = editor.find_layers(model)
        found = self._kept.moments.load(model, layers, editor.gated, Ranks.current())
        if found is None:
            text = "%sthe second moments of the edit are not in %s; they are computed anew, with the present weights"
            log.warning(text, self.heading, self._kept.moments.folder or "any folder")
        return found

    @override
    def _keep(
        self, trainer: L.Trainer, result: EditResult, generated: Sequence[str], has_moments: bool = False
    ) -> None:
        if not self.may_renew:
            return
        if self.renewal.kind == "replace":
            self._kept = replace(self._kept, changes=(*self._kept.changes, Change.of(result)))
        if not self.renewal.keeps_goals:
            return
        self._kept = self._kept.with_goals(result, generated)
        if result.moments is not None and not has_moments:
            cache = getattr(self.editor, "cache", None)
            folder = str(Path(run_folder(trainer), "moments"))
            self._kept = self._kept.with_moments(KeptMoments.of(result.moments, cache, folder, Ranks.current()))

    def _record_renewal(self, trainer: L.Trainer, taken: Sequence[Change], kept: bool, undo: Undo) -> None:
        if not kept:
            return
        # another kind of renewal adds changes that are not kept, so that the weights have others than are known
        is_known = self.renewal.kind == "replace"
        changes = tuple(change for change in self._kept.changes if is_known and change not in taken)
        self._change_state(undo, last_step=trainer.global_step, kept=replace(self._kept, changes=changes))
        undo.by(setattr, self, "renewals", self.renewals)
        self.renewals += 1


def _is_last_step(trainer: L.Trainer) -> bool:
    """Tell if training ends with this batch as planned; its last point is then in the checkpoints that follow.

    A run that is resumed from one of them trains no more, and gets no ``on_train_end``.
    """
    if averaging_callbacks(trainer):  # the average may still change in hooks after this one
        return False
    is_last_epoch = trainer.max_epochs == trainer.current_epoch + 1
    # two optimizers may step over the last one
    return 0 <= trainer.max_steps <= trainer.global_step or (is_last_epoch and trainer.is_last_batch)
