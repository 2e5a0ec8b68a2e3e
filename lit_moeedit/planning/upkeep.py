"""Upkeep of edits after they are made: renewals, and training steps that state or hold edited facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lit_moeedit.callbacks import EditHold, EditReplay
from lit_moeedit.callbacks.needs import MEASURE_EVERY, MEASURED
from lit_moeedit.callbacks.renewals import RenewalSettings
from lit_moeedit.callbacks.survival import SurvivalCurve, asked_at_a_point
from lit_moeedit.data import Fact
from lit_moeedit.editing import PHASES
from lit_moeedit.planning.fake_tensors import Cost

TRAINING, REPLAYED, HELD, RENEWAL = "training step", "replayed step", "held step", "renewal"
"""Names of phases."""
GENERATED, POINT, NEED = "generated", "survival point", "need"
"""Names of measurements that are parts of these phases."""
TIMES_GENERATED = 4
"""Times that a renewal asks which edits are generated: first, in its guard, of the edits that it keeps, and last."""


@dataclass(frozen=True)
class Upkeep:
    """Settings of a run that keep its edits.

    Attributes:
        renewal: settings of the renewals.
        curve: settings of the survival curve, of which a renewal measures a point.
        replay: the callback that states edited facts; ``None`` for none.
        hold: the callback that holds the hidden states at edit tokens; ``None`` for none.
        steps: number of optimizer steps after the first edit; ``None`` if it is not known.
    """

    renewal: RenewalSettings = field(default_factory=RenewalSettings)
    curve: SurvivalCurve = field(default_factory=SurvivalCurve)
    replay: EditReplay | None = None
    hold: EditHold | None = None
    steps: int | None = None

    @property
    def renewals(self) -> int | None:
        """Maximum number of renewals; ``None`` if it is not known."""
        settings = self.renewal
        if not settings.are_wanted:
            return 0
        by_steps = None
        if settings.every_n_steps is not None and self.steps is not None:
            by_steps = self.steps // settings.every_n_steps
        at_end = 1 if settings.at == "end" else None
        return min((limit for limit in (by_steps, at_end, settings.maximum) if limit is not None), default=None)

    def expected(self, rows: int, row_tokens: int, statement_tokens: float) -> float:
        """Return the maximum number of statements of a rank's batch, on average over the batches that get some.

        Args:
            rows: number of rows of the batch.
            row_tokens: length of a row.
            statement_tokens: length of a statement, on average.
        """
        if self.replay is None:
            return 0.0
        if self.replay.weight is None:
            return self.replay.share * rows
        # ranks with batches of other lengths must all make the forward or none
        return max(1.0, self.replay.share * rows * row_tokens / statement_tokens)

    def measurements(self, facts: Sequence[Fact], statements: float, ranks: int) -> dict[str, list[Fact]]:
        """Return the facts that each measurement asks about, with what it asks.

        Args:
            facts: the edited facts.
            statements: number of statements of a rank's batch.
            ranks: number of processes.
        """
        found: dict[str, list[Fact]] = {}
        if self.renewal.are_wanted:
            found[GENERATED] = [replace(fact, paraphrases=(), neighbours=()) for fact in facts]
            if self.curve.is_on:
                found[POINT] = [asked_at_a_point(fact) for fact in self.curve.choose(facts)]
        if self.replay is not None and self.replay.by_need:
            count = min(len(facts), math.ceil(MEASURED * statements * self._replays * ranks))
            found[NEED] = [replace(fact, target_true=None, paraphrases=(), neighbours=()) for fact in facts[:count]]
        return found

    @property
    def _replays(self) -> int:
        """Number of optimizer steps with statements between two measurements of what facts need."""
        return 1 if self.replay is None else max(1, MEASURE_EVERY // self.replay.every_n_steps)

    def renewal_cost(self, phases: Mapping[str, Cost]) -> Cost:
        """Add up the cost of a renewal that brings all edits back at its first attempt.

        It edits all facts again. With ``reuse`` and ``all``, targets and second moments are those of the edit.

        Args:
            phases: the costs of the edit and of the measurements.
        """
        known = ("statistics", "targets") if self.renewal.keeps_goals else ()
        times = {name: 1 for name in PHASES if name not in known} | {GENERATED: TIMES_GENERATED, POINT: 1}
        parts = [(phases[name], number) for name, number in times.items() if name in phases]
        return Cost(
            RENEWAL,
            # before the second moments are there
            held=min(cost.held for name, cost in phases.items() if name in PHASES),
            peak=max(cost.peak for cost, _ in parts),
            host=max(cost.host for cost, _ in parts),
            sent=sum(cost.sent * number for cost, number in parts),
            flops=sum(cost.flops * number for cost, number in parts),
        )

    def replayed_cost(self, step: Cost, phases: Mapping[str, Cost]) -> Cost:
        """Add to a step with statements its share of the measurements of what facts need."""
        if NEED not in phases:
            return step
        need = phases[NEED]
        return replace(
            step,
            peak=max(step.peak, need.peak),
            sent=step.sent + need.sent // self._replays,
            flops=step.flops + need.flops // self._replays,
        )

    def remarks(self, phases: Mapping[str, Cost], expected: float) -> list[str]:
        """Compare replay, hold and renewals with training steps, in a line each.

        Args:
            phases: the costs of the run.
            expected: number of statements of a rank's batch that gets some, on average.
        """
        lines, step = [], phases[TRAINING]
        if self.replay is not None:
            every = self.replay.every_n_steps
            # the simulated step has the next larger number of statements
            part = expected / math.ceil(expected) / every
            added = part * (phases[REPLAYED].flops / step.flops - 1)
            how = "in a forward of their own" if self.replay.weight is not None else "as rows of the batch"
            when = "each step" if every == 1 else f"every {every} steps"
            lines.append(
                f"Replay: at most {expected:.3g} statement(s) on average, {when}, {how}: {100 * added:.2g} % more work "
                f"than training without, on average."
            )
        if self.hold is not None:
            every = self.hold.every_n_steps
            added = (phases[HELD].flops / phases[TRAINING].flops - 1) / every
            when = "each step" if every == 1 else f"every {every} steps"
            lines.append(f"Hold: {self.hold.rows} prompt(s), {when}: {100 * added:.2g} % more work than without.")
        if self.renewal.are_wanted:
            kind, each = self.renewal.kind, phases[RENEWAL].flops / step.flops
            means = (
                "if known targets bring all edits back"
                if self.renewal.keeps_goals
                else "with targets and statistics anew"
            )
            work = f"the work of {each:,.3g} training steps, {means}"
            lines.append(f"A renewal ({kind}): {work}; {self._times(each)}.")
        return lines

    def _times(self, each: float) -> str:
        """Describe the number of renewals, each of which is the work of ``each`` training steps."""
        number, every, below = self.renewals, self.renewal.every_n_steps, self.renewal.below
        when = f"as soon as less than {below} of the edits hold" if every is None else f"every {every} steps"
        if self.renewal.at == "end":
            return "at the last step" + (f", if less than {below} of the edits hold" if below is not None else "")
        if number is None:
            return f"{when}, without a known limit"
        return f"{when}, at most {number} times: {number * each:,.3g} training steps"
