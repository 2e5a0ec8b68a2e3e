"""One edit: its arguments, its changes layer by layer, and its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.phases import Clock, Progress
from lit_moeedit.editing.targets import Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

if TYPE_CHECKING:
    from lit_moeedit.preservation.second_moments import SecondMoments


@dataclass(frozen=True)
class EditResult:
    """The result of an edit.

    Attributes:
        facts: the edited facts.
        deltas: weight changes by layer index.
        targets: the target vectors, with the loss that each reached.
        seconds: by phase (``statistics``, ``targets``, ``features``, ``solve``, ``commit``) and in total (``edit``).
            Trial forwards that measure the layers' output scales count as ``features``.
        relative_change: ``‖ΔW‖_F / ‖W‖_F`` by layer index, over the experts that changed.
        kept: ``False`` if a guard rejected the edit, which was then undone.
        energy_kept: share of the preservation text's energy that an expert's change cannot reach, by layer index and
            expert, see :class:`~lit_moeedit.preservation.shaping.Shaping`. It has every expert that the edit may
            change, and is empty if nothing is preserved.
        residual: ``[T]``, share of each edit's target vectors that the changed layers have left, ``‖r_t‖ / ‖δ_t‖`` at
            the target layer: 0 if its output is what it should be, 1 or more if the edit brought it no nearer. NaN for
            target vectors of 0; ``None`` for a method without target vectors.
        goals: by fact key, ``[rows, d_model]``, the target layer's output that the edit aimed for at each edit token
            after the first context, then at those after the second one, and so on; without facts that were to stay as
            they are. A later edit can take them, see
            :meth:`~lit_moeedit.editing.method.EditMethod.edit`.
        moments: the second moments that were used, by layer index; ``None`` if none were.
        null_ranks: dimension of the null space in which an expert may change, by layer index and expert, at most
            ``d_hidden``; empty unless a :class:`~lit_moeedit.preservation.shaping.NullSpace` preserves the text.
    """

    facts: list[Fact]
    deltas: dict[int, ExpertDeltas]
    targets: Targets
    seconds: dict[str, float]
    relative_change: dict[int, float] = field(default_factory=dict)
    kept: bool = True
    energy_kept: dict[int, dict[int, float]] = field(default_factory=dict)
    residual: Tensor | None = None
    goals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    moments: Mapping[int, SecondMoments] | None = field(default=None, repr=False)
    null_ranks: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class EditJob:
    """The arguments of one edit, checked.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts to edit.
        layers: the layers to edit, ascending, with their output scales.
        preservation: text on which the experts must keep their behavior.
        moments: second moments by layer index, if they are known already.
        ranks: the processes that edit together.
        clock: measures the phases.
        report: called with a phase's name, the number of steps done, and their total number.
        histories: the changes of frozen experts so far, by :attr:`~lit_moeedit.models.experts.ExpertLayer.weight_name`;
            ``None`` to keep none.
        goals: known goals, see :meth:`~lit_moeedit.editing.method.EditMethod.edit`.
        measured: other facts that are measured, likewise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: Sequence[Fact]
    layers: Sequence[ExpertLayer]
    preservation: Sequence[str]
    moments: Mapping[int, SecondMoments] | None
    ranks: Ranks
    clock: Clock
    report: Progress
    histories: dict[str, History] | None = None
    goals: Mapping[str, Tensor | None] = field(default_factory=dict)
    measured: Sequence[Fact] = ()


class LayerEdits(ABC):
    """The changes of one edit, layer by layer.

    Args:
        job: the arguments of the edit.

    Attributes:
        targets: the target vectors.
        deltas: the committed changes, by layer index.
        relative_change: see :class:`EditResult`.
        energy_kept: see :class:`EditResult`.
        null_ranks: see :class:`EditResult`.
        moments: see :class:`EditResult`.
    """

    targets: Targets
    moments: Mapping[int, SecondMoments] | None = None

    def __init__(self, job: EditJob) -> None:
        self.job = job
        self.deltas: dict[int, ExpertDeltas] = {}
        self.relative_change: dict[int, float] = {}
        self.energy_kept: dict[int, dict[int, float]] = {}
        self.null_ranks: dict[int, dict[int, int]] = {}

    @abstractmethod
    def solve(self, layer: ExpertLayer) -> ExpertDeltas:
        """Compute the change of a layer, after those of the layers below have been committed."""

    def commit(self, layer: ExpertLayer, deltas: ExpertDeltas, transaction: Transaction) -> None:
        """Broadcast the first rank's change of a layer and write it into the weights."""
        ranks, clock = self.job.ranks, self.job.clock
        with clock("solve"):
            ranks.check_errors()
            ranks.broadcast(deltas.left, deltas.right)
        with clock("commit"):
            name = None if self.job.histories is None else layer.weight_name
            change = transaction.commit(layer.down_proj, deltas, layer.is_transposed, name)
        self.deltas[layer.index], self.relative_change[layer.index] = deltas, change

    def residual(self) -> Tensor | None:
        """Measure what the changes have left of the target vectors, see :class:`EditResult`."""
        return None

    def goals(self) -> dict[str, Tensor]:
        """Return what the changes aimed for, see :class:`EditResult`."""
        return {}

    def keep(self) -> None:  # noqa: B027 - most methods have nothing to remember
        """Remember the edit, after it has been kept."""
