"""Success of edits: efficacy, generalization and specificity.

The definitions follow MEMIT (arXiv 2210.07229): a prompt counts if the right answer is more likely than the other
answer, here by mean token log-probability. The ``_accuracy`` rates are stricter: greedy decoding must generate the
whole right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics._means import check_vector
from lit_moeedit.metrics._plots import plot_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["edit", "paraphrase", "neighbour"]
_RATES: dict[Kind, str] = {"edit": "efficacy", "paraphrase": "generalization", "neighbour": "specificity"}
_KINDS: tuple[Kind, ...] = tuple(_RATES)


def _edit_success_update(
    kind: Kind,
    log_prob_new: Tensor,
    log_prob_true: Tensor,
    exact: Tensor,
    exact_before: Tensor | None,
    groups: Sequence[str] | None,
    known_groups: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """Count the prompts of one kind.

    Args:
        kind: Kind of the prompts.
        log_prob_new: ``[N]``, floating point.
        log_prob_true: ``[N]``, floating point; NaN rows are not compared.
        exact: ``[N]``, bool.
        exact_before: ``[N]``, bool, only for neighbours.
        groups: N group names, only for neighbours.
        known_groups: The G names that ``groups`` may hold.

    Returns:
        ``counts [4]``, long: prompts whose right answer is preferred, prompts compared, exact matches, prompts;
        ``retention [2, 1 + G]``, long: neighbours exact before and now, neighbours exact before. Column 0 counts all
        neighbours, and each further column those of one group.

    Raises:
        ValueError: As :func:`edit_success`, and if ``groups`` holds a name outside ``known_groups``.

    """
    _check_prompts(kind, log_prob_new, log_prob_true, exact)
    _check_neighbours(kind, exact, exact_before, groups, known_groups)
    # A comparison with NaN is false, so prompts that are not compared are never preferred either.
    preferred = log_prob_true > log_prob_new if kind == "neighbour" else log_prob_new > log_prob_true
    counts = torch.stack([preferred.sum(), (~log_prob_true.isnan()).sum(), exact.sum(), torch.ones_like(exact).sum()])

    retention = counts.new_zeros(2, 1 + len(known_groups))
    if exact_before is not None:
        outcome = torch.stack([exact_before & exact, exact_before])
        retention[:, 0] = outcome.sum(1)
        for column, group in enumerate(known_groups if groups is not None else (), start=1):
            members = torch.tensor([name == group for name in groups or ()], dtype=torch.bool, device=exact.device)
            retention[:, column] = (outcome & members).sum(1)
    return counts, retention


def _edit_success_compute(
    kind: Kind, counts: Tensor, retention: Tensor, known_groups: tuple[str, ...]
) -> dict[str, Tensor]:
    """Turn the counts of one kind into rates.

    Args:
        kind: Kind of the prompts.
        counts: ``[4]``, from :func:`_edit_success_update`, possibly summed.
        retention: ``[2, 1 + G]``, from :func:`_edit_success_update`, possibly summed; only used for neighbours.
        known_groups: The G group names.

    Returns:
        Scalars in [0, 1], NaN where nothing was counted.

    """
    # Explicit float32: half-precision training changes torch's default dtype.
    preferred, compared, exact, prompts = counts.float()
    rates = {_RATES[kind]: preferred / compared, f"{_RATES[kind]}_accuracy": exact / prompts}
    if kind == "neighbour":
        names = ("specificity_retained", *(f"specificity_retained_{group}" for group in known_groups))
        rates |= dict(zip(names, retention[0].float() / retention[1], strict=True))
    return rates


def edit_success(
    kind: Kind,
    log_prob_new: Tensor,
    log_prob_true: Tensor,
    exact: Tensor,
    exact_before: Tensor | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Compute the rates of prompts of one kind whose right answer is preferred, and whose right answer is generated.

    The right answer of an edit prompt or paraphrase is the fact's ``target_new``, that of a neighbour its own true
    answer. Preferred means a strictly higher mean token log-probability; a tie is not preferred.

    Args:
        kind: ``"edit"``, ``"paraphrase"`` or ``"neighbour"``.
        log_prob_new: Mean token log-probability (nats) of the fact's ``target_new``, ``[N]``, floating point. NaN
            counts as not preferred.
        log_prob_true: The same of the fact's ``target_true``, or of a neighbour's own true answer, ``[N]``. Rows with
            NaN (facts without ``target_true``) count for the accuracy only.
        exact: True if greedy decoding generates the whole right answer, ``[N]``, bool.
        exact_before: The same before the edit, ``[N]``, bool; only for neighbours. ``None``: not measured.
        groups: Group name of each of the N neighbours; only for neighbours.

    Returns:
        Scalars in [0, 1], NaN where nothing was counted. For edits ``efficacy`` and ``efficacy_accuracy``; for
        paraphrases ``generalization`` and ``generalization_accuracy``; for neighbours ``specificity``,
        ``specificity_accuracy`` and ``specificity_retained`` (the share of the neighbours exact before that are exact
        now), and ``specificity_retained_{group}`` for each name in ``groups``, sorted.

    Raises:
        ValueError: If ``kind`` is unknown, a tensor is not ``[N]`` or has the wrong dtype, lengths differ, or
            ``exact_before`` or ``groups`` come with a kind other than ``"neighbour"``.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import edit_success
        >>> log_prob_new, log_prob_true = tensor([-0.1, -0.2, -3.0]), tensor([-2.0, float("nan"), -1.0])
        >>> edit_success("edit", log_prob_new, log_prob_true, exact=tensor([True, True, False]))
        {'efficacy': tensor(0.5000), 'efficacy_accuracy': tensor(0.6667)}

    """
    known_groups = tuple(sorted(set(groups or ())))
    counts, retention = _edit_success_update(
        kind, log_prob_new, log_prob_true, exact, exact_before, groups, known_groups
    )
    return _edit_success_compute(kind, counts, retention, known_groups)


class EditSuccess(Metric):
    """Efficacy, generalization and specificity of edits, their stricter ``_accuracy`` rates, and two summaries.

    ``compute`` returns scalars in [0, 1], averaged over prompts (not over facts) and NaN where nothing was counted:

    - ``efficacy``, ``generalization``, ``specificity``: share of the edit prompts, paraphrases and neighbours whose
      right answer has a strictly higher mean token log-probability than the other answer. Prompts without another
      answer (facts whose truth is unknown) do not count; NaN if there are only such prompts;
    - ``efficacy_accuracy``, ``generalization_accuracy``, ``specificity_accuracy``: share of the same prompts for which
      greedy decoding generates the whole right answer;
    - ``specificity_retained``, ``specificity_retained_{group}``: share of the neighbours (of one group) with the right
      answer before the edit that still have it;
    - ``score``, ``utility``: harmonic and arithmetic mean of efficacy, generalization and specificity. The score is 0
      if one of them is 0; both are NaN if one of them is NaN.

    Args:
        groups: Names of the groups that neighbours may belong to.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``groups`` is a single string or repeats a name.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import EditSuccess
        >>> metric = EditSuccess(groups=["same_relation"])
        >>> yes, no = tensor([-0.1, -0.2]), tensor([-2.0, -1.0])
        >>> metric.update("edit", log_prob_new=yes, log_prob_true=no, exact=tensor([True, True]))
        >>> metric.update("paraphrase", log_prob_new=yes, log_prob_true=no, exact=tensor([True, False]))
        >>> metric.update("neighbour", log_prob_new=no, log_prob_true=tensor([-0.1, -1.5]), exact=tensor([True, False]),
        ...               exact_before=tensor([True, True]), groups=["same_relation", "same_relation"])
        >>> rates = metric.compute()
        >>> rates["efficacy"], rates["generalization_accuracy"], rates["specificity_retained_same_relation"]
        (tensor(1.), tensor(0.5000), tensor(0.5000))
        >>> rates["score"], rates["utility"]
        (tensor(0.7500), tensor(0.8333))

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: Tensor
    retention: Tensor

    def __init__(self, groups: Sequence[str] = (), **kwargs: object) -> None:
        super().__init__(**kwargs)
        if isinstance(groups, str) or len(set(groups)) != len(groups):
            raise ValueError(f"Expected `groups` to be a sequence of distinct names, got {groups!r}.")
        self.groups = tuple(groups)
        # Integers, so that sums over batches and processes are exact.
        self.add_state("counts", torch.zeros(len(_KINDS), 4, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("retention", torch.zeros(2, 1 + len(self.groups), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        kind: Kind,
        log_prob_new: Tensor,
        log_prob_true: Tensor,
        exact: Tensor,
        exact_before: Tensor | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        """Add prompts of one kind.

        Args:
            kind: ``"edit"``, ``"paraphrase"`` or ``"neighbour"``.
            log_prob_new: Mean token log-probability (nats) of the fact's ``target_new``, ``[N]``, floating point. NaN
                counts as not preferred.
            log_prob_true: The same of the fact's ``target_true``, or of a neighbour's own true answer, ``[N]``. Rows
                with NaN (facts without ``target_true``) count for the accuracy only.
            exact: True if greedy decoding generates the whole right answer, ``[N]``, bool.
            exact_before: The same before the edit, ``[N]``, bool; only for neighbours. ``None``: this update does not
                count for ``specificity_retained``.
            groups: Group name of each of the N neighbours; only for neighbours. ``None``: of no group.

        Raises:
            ValueError: As :func:`edit_success`, and if ``groups`` holds a name that the metric was not built for.

        """
        counts, retention = _edit_success_update(
            kind, log_prob_new, log_prob_true, exact, exact_before, groups, self.groups
        )
        self.counts[_KINDS.index(kind)] += counts.to(self.counts.device)
        self.retention += retention.to(self.retention.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the rates of all three kinds, ``score`` and ``utility``."""
        rates: dict[str, Tensor] = {}
        for kind, counts in zip(_KINDS, self.counts, strict=True):
            rates |= _edit_success_compute(kind, counts, self.retention, self.groups)
        three = torch.stack([rates[name] for name in _RATES.values()])
        # 1 / 0 is infinite, which correctly makes the harmonic mean 0.
        return rates | {"score": len(three) / (1 / three).sum(), "utility": three.mean()}

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot one bar per rate, or lines over time.

        Args:
            val: A result of ``compute`` or ``forward``, or a sequence of them; ``None`` computes now.
            ax: Axes to draw into; ``None`` makes a figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        """
        val = self.compute() if val is None else val
        return plot_bars(val, "share of prompts", ax, (self.plot_lower_bound, self.plot_upper_bound))


def _check_prompts(kind: Kind, log_prob_new: Tensor, log_prob_true: Tensor, exact: Tensor) -> None:
    if kind not in _KINDS:
        raise ValueError(f"Expected `kind` to be one of {_KINDS}, got {kind!r}.")
    for name, values in (("log_prob_new", log_prob_new), ("log_prob_true", log_prob_true)):
        check_vector(name, values, "floating point", values.is_floating_point())
    check_vector("exact", exact, "bool", exact.dtype == torch.bool)
    if not len(log_prob_new) == len(log_prob_true) == len(exact):
        lengths = f"{len(log_prob_new)}, {len(log_prob_true)} and {len(exact)}"
        raise ValueError(f"Expected `log_prob_new`, `log_prob_true` and `exact` of the same length, got {lengths}.")


def _check_neighbours(
    kind: Kind, exact: Tensor, exact_before: Tensor | None, groups: Sequence[str] | None, known_groups: tuple[str, ...]
) -> None:
    for name, values in (("exact_before", exact_before), ("groups", groups)):
        if values is None:
            continue
        if kind != "neighbour":
            raise ValueError(f"Expected `{name}` only for kind 'neighbour', got it for {kind!r}.")
        if len(values) != len(exact):
            raise ValueError(f"Expected `{name}` to hold {len(exact)} values like `exact`, got {len(values)}.")
    if exact_before is not None:
        check_vector("exact_before", exact_before, "bool", exact_before.dtype == torch.bool)
    unknown = sorted(set(groups or ()) - set(known_groups))
    if unknown:
        raise ValueError(f"Expected `groups` to hold names of {list(known_groups)}, got {unknown}.")
