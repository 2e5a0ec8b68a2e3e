"""The base class of solvers, and the view of a layer's weights that some of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem


class Weights(Protocol):
    """The experts ``[E, d_model, d_hidden]``: a tensor, or anything that gives blocks of them as one does."""

    @property
    def shape(self) -> Sequence[int]:
        """``(E, d_model, d_hidden)``."""
        ...

    def __getitem__(self, block: Any) -> Tensor:
        """``[j]``, one expert ``[d_model, d_hidden]``; ``[:, first:last]``, output rows of all ``[E, n, d_hidden]``."""
        ...


@dataclass(frozen=True)
class LayerWeights:
    r"""The weights of one layer's experts, the metric of their keys, and the processes that hold them.

    With the default values there is one process, and nothing is cached.

    Args:
        weights: the down-projections; reading a block may be a collective, which all ranks call in the same order.
        index: number of the layer.
        metric: ``[d_hidden, d_hidden]`` floating point, the second moment ``C`` of all experts' keys together, or
            ``I + βC`` if a penalty of strength ``β`` shapes the keys; ``None`` if there are no moments.
        is_whitened: whether the keys of problems have been multiplied by ``metric^{-1/2}`` already.
        device: where the problems of the layer are solved.
        key: digest of the weights, a metric and settings (an object whose ``repr`` says all), as the key of a cache.
            All ranks call it together.
        any_rank: returns true on all ranks if its argument is true on one of them.
        broadcast: overwrites tensors with those of the first rank. It raises if another rank failed.
        is_first: whether this process is the first rank, which writes files.
    """

    weights: Weights
    index: int = 0
    metric: Tensor | None = None
    is_whitened: bool = False
    device: torch.device | str = "cpu"
    key: Callable[[Tensor | None, object], str] | None = None
    any_rank: Callable[[bool], bool] = bool
    broadcast: Callable[..., None] = lambda *tensors: None
    is_first: bool = True


class Solver(ABC):
    """Turns an :class:`EditProblem` into :class:`ExpertDeltas`; a subclass implements :meth:`solve`.

    Attributes:
        changes_all_experts: whether experts that no edit visits change, too, because all of them share parameters.
            Second moments of all experts are needed then, and one shaping of keys serves all of them.
        carries: whether one solution, at the highest edited layer, serves all layers: :meth:`carry` is called there
            in place of :meth:`solve`, and :meth:`unfold` at each layer.
        needs_moments: whether second moments are needed even if nothing is preserved.
        cache: folder for what the solver computes from a layer's weights; ``None`` keeps nothing.

    Example:
        >>> class LeastSquares(Solver):
        ...     def solve(self, problem):
        ...         experts = problem.expert_index.unique()
        ...         dense = [(torch.linalg.pinv(problem.features) @ problem.residuals).T for _ in experts]
        ...         return ExpertDeltas.from_dense(experts, torch.stack(dense), problem.num_experts)
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3)
        >>> LeastSquares().solve(problem).dense(1)[:, 0]
        tensor([1., 1.])
    """

    changes_all_experts: bool = False
    carries: bool = False
    needs_moments: bool = False
    cache: Path | None = None

    def check(self, shape: Sequence[int]) -> None:  # noqa: B027 - most solvers take any
        """Check that the solver can be used for experts of a shape, before any of the work of an edit.

        Args:
            shape: ``(E, d_model, d_hidden)``.

        Raises:
            ValueError: if a setting does not fit the shape.
        """

    @abstractmethod
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Solve the problem, exactly or not.

        Raises:
            torch.linalg.LinAlgError: if a system of equations is singular.
        """

    def at_layer(self, layer: LayerWeights, like: Self | None = None) -> Self:
        """Return the solver for one layer, which by default is this one.

        Args:
            layer: the weights of the layer's experts.
            like: the solver of another layer, whose solution is to be unfolded at this one.
        """
        return self

    def carry(self, problem: EditProblem) -> Any:
        """Solve the problem of the highest edited layer in a form that :meth:`unfold` takes at every layer."""
        raise NotImplementedError(f"{type(self).__name__} solves every layer by itself")

    def unfold(self, carried: Any, share: float) -> ExpertDeltas:
        """Return ``share`` times what was carried, as the change of this solver's layer."""
        raise NotImplementedError(f"{type(self).__name__} solves every layer by itself")
