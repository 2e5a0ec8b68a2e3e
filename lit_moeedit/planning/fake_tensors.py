"""Fake tensors, which have shapes and no elements, and the costs of code that runs on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isinf, prod
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

LARGEST = 2**22
"""Maximum number of elements of a real integer tensor. Larger ones are fake, too."""
CHOICES = (aten.topk, aten.sort, aten.argsort, aten.argmax, aten.argmin, aten.max, aten.min)
"""Operations whose integer results are indices into the last dimension."""


class FakeFloatMode(TorchDispatchMode):
    """A mode in which floating-point tensors are fake and take no memory, and integer and Boolean tensors are real.

    Code whose control flow depends on lengths, indices and masks runs as usual, at any size. Where it depends on
    elements that do not exist, the mode makes up results that let it go on. Comparisons are true (all values are
    finite, no loss is low enough), ``item()`` is 1, and indices chosen by values are spread evenly, so that a router
    sends about the same number of tokens to every expert.

    Example:
        >>> with FakeFloatMode():
        ...     chosen = torch.rand(1 << 40, 8)[:100].topk(2).indices
        >>> chosen.unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Self:
        self._fake.__enter__()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if _is_real(func._overloadpacket, tensors, args, kwargs):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        elif func is aten.equal.default:
            return True
        elif func is aten._grouped_mm.default:
            return _grouped_mm(*args, **kwargs)
        elif func is aten.index.Tensor:
            args = (args[0], _without_masks(args[1]))
        return tree_map_only(
            FakeTensor, lambda result: self._answer(func._overloadpacket, result, args), func(*args, **kwargs)
        )

    def _answer(self, packet: Any, result: FakeTensor, args: Any) -> Tensor:
        """Return the result of an operation on fake tensors, with real integers in the place of fake ones."""
        if result.is_floating_point() or result.is_complex() or result.numel() > LARGEST:
            return result
        with unset_fake_temporarily():
            if result.dtype is torch.bool:
                return torch.full(result.shape, not _asks_for_non_finite(packet, args))
            if packet is aten.amin and result.dtype is torch.uint8:
                # of a comparison, seen as bytes, that is too large to be real
                return torch.ones(result.shape, dtype=result.dtype)
            if packet in CHOICES:
                return _spread(result.shape, args[0].shape)
            return torch.zeros(result.shape, dtype=result.dtype)


def _spread(shape: torch.Size, chosen_from: torch.Size) -> Tensor:
    """Return distinct indices into the last dimension of ``chosen_from``, from a random start in every row."""
    choices, count = max(1, chosen_from[-1:].numel()), shape[-1] if len(shape) == len(chosen_from) > 0 else 1
    starts = torch.randint(choices, (shape.numel() // max(1, count), 1), generator=torch.Generator().manual_seed(0))
    return ((starts + torch.arange(count)) % choices).reshape(shape)


def _is_real(packet: Any, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
    """Tell if the result of an operation without fake inputs is real: integers, and few of them."""
    if tensors:
        try:
            shape: torch.Size = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
            return shape.numel() <= LARGEST
        except RuntimeError:
            return True
    dtype = kwargs.get("dtype")
    if dtype is None or dtype.is_floating_point:
        return packet in (aten.arange, aten.randperm)
    return not isinstance(args[0], Sequence) or prod(args[0]) <= LARGEST


def _asks_for_non_finite(packet: Any, args: Any) -> bool:
    """Tell if an operation asks for values that are not finite: ``x != x`` asks for NaN."""
    asked = args[1] if len(args) > 1 else None
    infinite = packet is aten.eq and isinstance(asked, float) and isinf(asked)
    return infinite or packet in (aten.isnan, aten.isinf) or (packet is aten.ne and asked is args[0])


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace the masks in an index of a fake tensor by integers, because the result's shape depends on them."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
            found.append(index)
        else:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
    return found


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a fake product of groups of rows with a weight each, or, for the gradient, with groups of other rows.

    PyTorch's own shape function refuses float32, which the operation supports.
    """
    groups = () if right.ndim == 3 else (len(offs),)
    return left.new_empty(*groups, left.shape[0], right.shape[-1])


# -- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Memory, communication and work of a phase on one rank.

    Attributes:
        phase: name of the phase.
        held: bytes that are allocated when it begins.
        peak: maximum of allocated bytes, ``held`` included, on the device that the model is on.
        host: bytes in main memory, for a model on another device.
        sent: bytes that the rank sends to others.
        flops: number of floating-point operations.
        written: bytes that the rank writes to the disk.
    """

    phase: str
    held: int
    peak: int
    host: int = 0
    sent: int = 0
    flops: int = 0
    written: int = 0


class CostCounter(TorchDispatchMode):
    """A mode that counts the memory of all storages that operations create, and floating-point operations, by phase.

    It works with real and with fake tensors. Memory that kernels and other libraries allocate for themselves is not
    counted.

    Attributes:
        alive: bytes that are allocated now.
        host: bytes of these that are in main memory, for a model on another device.
        peak: maximum of ``alive`` in this phase.
        sent: bytes sent to other ranks.
        flops: floating-point operations of products, decompositions, attention and convolutions.
        phases: costs of every phase that has ended.

    Args:
        known: tensors that are not counted.
        held: bytes that are allocated from the beginning.
        on_cpu: whether all tensors are in main memory. Otherwise only copies to the CPU are.
    """

    def __init__(self, known: Sequence[Tensor] = (), held: int = 0, on_cpu: bool = True) -> None:
        TorchDispatchMode.__init__(self)
        self.alive = self.peak = held
        self.host = self.sent = self.flops = 0
        self.phases: dict[str, Cost] = {}
        self._on_cpu = on_cpu
        self._sizes: dict[int, tuple[int, bool]] = {}
        for tensor in known:
            self._note(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        # a conversion to the device that a tensor is on is no operation, so this is a copy to another device
        to_host = not self._on_cpu and func is aten._to_copy.default and result.dtype == args[0].dtype
        for leaf in tree_leaves(result):
            value = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            if isinstance(value, Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                self._note(storage, storage.nbytes(), to_host)
        return result

    def send(self, size: int) -> None:
        """Count bytes sent to other ranks."""
        self.sent += size

    def offload(self, size: int) -> None:
        """Count bytes that this phase has allocated as main memory."""
        self.host += size
        self.alive -= size
        self.peak -= size

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count this block as a phase or a part of one: the sum of the parts' work, and the highest peak of memory."""
        held, sent, flops = self.begin()
        yield
        self.end(name, held, sent, flops)

    def begin(self) -> tuple[int, int, int]:
        """Begin a phase, and return the arguments that :meth:`end` takes."""
        self.peak = self.alive
        return self.alive, self.sent, self.flops

    def end(self, name: str, held: int, sent: int, flops: int) -> None:
        """End a phase."""
        cost = Cost(name, held, self.peak, self.host, self.sent - sent, self.flops - flops)
        last = self.phases.get(name)
        if last is not None:
            highest = max(last, cost, key=lambda part: part.peak)
            work = {"sent": last.sent + cost.sent, "flops": last.flops + cost.flops}
            cost = Cost(name, highest.held, highest.peak, max(last.host, cost.host), **work)
        self.phases[name] = cost

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Count this block ``times`` times, as if it were repeated; 0 counts nothing."""
        sent, flops, peak = self.sent, self.flops, self.peak
        yield
        self.peak = self.peak if times else peak
        self.sent += (times - 1) * (self.sent - sent)
        self.flops += (times - 1) * (self.flops - flops)

    def _note(self, storage: Any, size: int, to_host: bool = False) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = (size, to_host)
            weakref.finalize(storage, self._drop, key)
            self._change(size, to_host)
            self.peak = max(self.peak, self.alive)

    def _drop(self, key: int) -> None:
        size, on_host = self._sizes.pop(key)
        self._change(-size, on_host)

    def _change(self, size: int, on_host: bool) -> None:
        if on_host:
            self.host += size
        else:
            self.alive += size


def _grouped_mm_flops(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """Count the product of all experts at once: rows times weights, or, for the gradient, rows times rows."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[-1]


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._grouped_mm: _grouped_mm_flops,
    # Golub and Van Loan, Matrix Computations: sections 8.3 and 4.2
    aten._linalg_eigh: lambda matrix, *args, **kwargs: 9 * matrix.numel() * matrix.shape[-1],
    aten.linalg_cholesky_ex: lambda matrix, *args, **kwargs: matrix.numel() * matrix.shape[-1] // 3,
    aten.cholesky_solve: lambda right, *args, **kwargs: 2 * right.numel() * right.shape[-2],
}
