"""Guards: limits that an edit must meet to be kept, and the trial of an edit against them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_moeedit.callbacks.resources import find_texts, from_datamodule
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation, Measured, Moment, answers
from lit_moeedit.editing.further import Further
from lit_moeedit.editing.outcomes import Reason, has_failed, measured_of, reasons
from lit_moeedit.editing.phases import EVALUATION, Meter
from lit_moeedit.editing.probe import Probe, ProbeState
from lit_moeedit.models.experts import find_model
from lit_moeedit.reports.meanings import MEANINGS
from lit_moeedit.sharding.ranks import Ranks

if TYPE_CHECKING:
    from lit_moeedit.callbacks.edit_making import EditMaking


@dataclass(frozen=True)
class GuardFigure:
    """The figure that a guard measured of an edit.

    Attributes:
        name: name of the guard's setting, such as ``min_efficacy``.
        limit: value of the setting.
        value: the measured value; NaN if there was nothing to measure.
    """

    name: str
    limit: float
    value: float

    @property
    def meaning(self) -> str:
        """The measured quantity in plain words; empty for those that their names explain."""
        return MEANINGS.get(self.name.removeprefix("min_"), "")

    @property
    def is_broken(self) -> bool:
        """``True`` if the edit must be undone."""
        # a perplexity that is not a number is that of a broken model
        return self.value < self.limit if self.name.startswith("min_") else not self.value <= self.limit

    def __str__(self) -> str:
        relation = "below" if self.name.startswith("min_") else "above"
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{self.name}{meaning}: {self.value:.3f} is {relation} the limit {self.limit:g}"


@dataclass(frozen=True)
class Guards:
    """The limits, with the meaning that they have for :class:`~lit_moeedit.callbacks.KnowledgeEditing`.

    Raises:
        ValueError: if a limit is out of range.
    """

    min_efficacy: float = 0.0
    min_specificity_retained: float = 0.0
    max_perplexity_ratio: float | None = None
    min_routing_similarity: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("min_") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name} is a fraction in [0, 1], got {value}")
        ratio = self.max_perplexity_ratio
        if ratio is not None and not 0.0 < ratio < math.inf:
            raise ValueError(f"max_perplexity_ratio must be positive and finite, or None for no limit, got {ratio}")

    def of_facts(self, after: Evaluation) -> list[GuardFigure]:
        """Return what the guards that look at the facts measure; none for those that are not set."""
        values = {
            "min_efficacy": float(after.edits_succeeded.float().mean()),
            "min_specificity_retained": after.metrics["specificity_retained"],
        }
        return self._figures(values)

    def of_probe(self, before: ProbeState, after: ProbeState) -> list[GuardFigure]:
        """Return what the guards that look at the probe text measure; none for those that are not set."""
        values = {
            "max_perplexity_ratio": after.perplexity_ratio(before),
            "min_routing_similarity": after.routing_similarity(before),
        }
        return self._figures({name: value for name, value in values.items() if value is not None})

    def _figures(self, values: dict[str, float]) -> list[GuardFigure]:
        limits = {name: getattr(self, name) for name in values}
        return [GuardFigure(name, limits[name], value) for name, value in values.items() if limits[name]]

    def probe(self, trainer: L.Trainer, editing: EditMaking) -> Probe | None:
        """Return the probe of these guards; ``None`` if no guard needs one.

        Raises:
            MisconfigurationException: if there is no text.
        """
        wants = self.max_perplexity_ratio is not None, self.min_routing_similarity > 0
        if not any(wants):
            return None
        texts = from_datamodule(trainer, "probe_texts")
        if not texts:
            try:
                texts = find_texts(trainer, editing.preservation_source)
            except MisconfigurationException as error:
                raise MisconfigurationException(
                    "KnowledgeEditing: max_perplexity_ratio and min_routing_similarity need text that is not edited: "
                    "give a data module with probe_texts(), or 'preservation'"
                ) from error
        Ranks.current().check_same("the probe texts", list(texts))
        return Probe(editing.tokenizer, texts, *wants)


class Trial:
    """The measurements of an edit just before and just after it, and the decision to keep it.

    Args:
        editing: the callback that edits.
        pl_module: the module, before the edit.
        facts: the facts of the edit.
        wants_answers: whether to generate the answers to the prompts.
        meter: measures what the measurements cost.

    Attributes:
        before: evaluation of the facts before the edit.
        figures: what the guards measured.
        has_failed: whether the guards would keep the edit, but most facts failed.
        measured: measurements of each fact by moment; empty if answers are not generated.
    """

    def __init__(
        self,
        editing: EditMaking,
        pl_module: L.LightningModule,
        facts: Sequence[Fact],
        wants_answers: bool,
        meter: Meter,
    ) -> None:
        self._editing, self._module, self._facts = editing, pl_module, facts
        self._wants_answers, self._meter = wants_answers, meter
        self._after: Evaluation | None = None
        self.figures: list[GuardFigure] = []
        self.has_failed = False
        self.measured: dict[Moment, list[Measured]] = {}
        with meter(EVALUATION):
            self.before = editing.evaluate(pl_module, facts)
            self._probed = self._measure_probe()
            generated, layers = self._generate("before", self.before), editing.editor.layers
            self._further = editing.measure_further(pl_module, facts, self.before, layers, generated=generated)
            self.before = self._further.add_to(self.before)
            self._further_after = Further()

    @property
    def after(self) -> Evaluation:
        """Evaluation of the facts just after the edit."""
        assert self._after is not None
        return self._after

    def passes(self) -> bool:
        """Measure the edit, which is in the weights now, and decide whether to keep it. Every rank calls this."""
        with self._meter(EVALUATION):
            return self._passes()

    def _passes(self) -> bool:
        editing, guards = self._editing, self._editing.guards
        self._after = editing.evaluate(self._module, self._facts, self.before.neighbours_exact)
        self.figures = guards.of_facts(self.after)
        kept = editing.should_keep(self.before, self.after)
        if kept and self._probed is not None:
            probed = self._measure_probe()
            assert probed is not None
            found = guards.of_probe(self._probed, probed)
            self.figures += found
            kept = not any(figure.is_broken for figure in found)
        self.has_failed = kept and editing.on_failure != "keep" and has_failed(self.after)
        self._wants_answers |= self.has_failed
        moment = editing.editor.layers, self._further, self._generate("after", self.after)
        self._further_after = editing.measure_further(self._module, self._facts, self.after, *moment)
        self._after = self._further_after.add_to(self.after)
        return kept and not self.has_failed

    def complete(self, result: EditResult) -> None:
        """Add what can only be measured with the result of the edit."""
        if self._editing.further is not None:
            found = self._editing.further.of_result(result, self._further, self._further_after)
            self._after = replace(self.after, further={**self.after.further, **found})

    def reasons(self, result: EditResult) -> dict[str, Reason]:
        """Return the reasons of the facts that are not generated, by their keys."""
        generated = [found.generated for found in self.measured.get("after", ())]
        texts = dict(zip((fact.key for fact in result.facts), generated, strict=False))
        return reasons(result, self.after, self._editing.editor, texts)

    def _measure_probe(self) -> ProbeState | None:
        probe = self._editing.probe
        return None if probe is None else probe.measure(find_model(self._module), Ranks.current())

    def _generate(self, moment: Moment, evaluation: Evaluation) -> list[str] | None:
        if not self._wants_answers:
            return None
        editor, prompts = self._editing.editor, [fact.prompt for fact in self._facts]
        model = find_model(self._module)
        generated = answers(model, self._editing.tokenizer, prompts, token_budget=editor.token_budget)
        self.measured[moment] = measured_of(self._facts, evaluation, generated, self.before.neighbours_exact)
        return generated
