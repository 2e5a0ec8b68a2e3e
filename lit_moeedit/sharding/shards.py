"""One rank's shard of a parameter: of the master weights, the model weights and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas


class UnsupportedShardingError(RuntimeError):
    """Raised for a parameter that no backend can read and write."""


def is_partitioned(weight: Tensor) -> bool:
    """Tell if a rank holds only a part of the model weights (ZeRO stage 3, FSDP2)."""
    return hasattr(weight, "ds_id") or isinstance(weight, DTensor)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, of which this rank may hold a part."""
    # DeepSpeed replaces the data of a partitioned parameter by an empty tensor; a DTensor has the shape of the whole
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Own(NamedTuple):
    """The elements of a parameter or buffer that this rank holds.

    Attributes:
        shape: shape of the whole parameter.
        is_whole: whether every rank holds all of it.
        start: index of the first element in the flattened parameter; of the first entry of ``dim`` if that is not 0.
        elements: the elements, ``[n]``.
        is_first: whether no rank before this one holds the same elements of a shard.
        dim: dimension along which the parameter is cut. If it is 0, the elements are a range of the flattened
            parameter; otherwise they are all elements of some entries of ``dim``.
    """

    shape: Sequence[int]
    is_whole: bool
    start: int
    elements: Tensor
    is_first: bool = True
    dim: int = 0


@dataclass(frozen=True)
class Window:
    """The part of each expert that a rank holds of a parameter ``[E, n, m]`` that is cut along its rows or columns.

    Attributes:
        shape: shape of the whole parameter.
        dim: 1 if it is cut along the rows of the experts, 2 for columns.
        start: index of the first row or column.
        stop: index after the last one.
    """

    shape: torch.Size
    dim: int
    start: int
    stop: int

    def of(self, whole: Tensor) -> Tensor:
        """Return the elements of the whole parameter, flattened, that are in the window, flattened."""
        return whole.view(self.shape).narrow(self.dim, self.start, self.stop - self.start).reshape(-1)

    def narrowed(self, deltas: ExpertDeltas, transposed: bool) -> ExpertDeltas:
        """Return the deltas of the window."""
        part = slice(self.start, self.stop)
        if (self.dim == 1) != transposed:
            return replace(deltas, left=deltas.left[:, part])
        return replace(deltas, right=deltas.right[:, part])


@dataclass(frozen=True)
class Copy:
    """A contiguous range of a flattened parameter, as its owner (the model or the optimizer) holds it on this rank.

    Attributes:
        start: index of the first element in the flattened parameter.
        read: returns the elements, ``[n]``: a view where that is possible.
        write: writes back what ``read`` returned, after it was changed in place. A view needs none.
    """

    start: int
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None] = lambda elements: None


@dataclass(frozen=True)
class Shard:
    """One parameter as this rank holds it.

    A rank *owns* one range of the elements: all of them, unless the parameter or its master weights are partitioned.
    The master weights are the owned range in the highest precision there is. All other copies are rounded from them.

    Attributes:
        shape: shape of the whole parameter; of the window, if there is one, which then stands for the parameter.
        dtype: dtype of the model weights.
        start: index of the first owned element in the flattened parameter.
        stop: index after the last owned element.
        master: the master weights, exactly the owned range.
        model: the model weights, with which the forward computes: the owned range, or the whole parameter. ``None``
            if the master weights are the model weights.
        moments: the owned range of each of the optimizer's moments.
        group: the processes whose owned ranges make up the parameter. ``None`` if this rank owns all of it.
        window: the window of each expert to which everything here refers; ``None`` for whole experts.
        block: maximum number of elements that a commit changes at once; ``None`` for the choice of the device.
    """

    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int
    master: Copy
    model: Copy | None = None
    moments: list[Copy] = field(default_factory=list)
    group: dist.ProcessGroup | None = None
    window: Window | None = None
    block: int | None = None

    @property
    def whole_shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return self.shape if self.window is None else self.window.shape

    def all_reduce(self, elements: Tensor) -> None:
        """Fill in the elements that other ranks own, which are zero here. Exact, because bytes are added to zeros."""
        if self.group is not None:
            dist.all_reduce(elements.view(torch.uint8), group=self.group)
