"""A GPU that is not there: tensors in main memory that say they are on ``cuda:0``, and refuse what CUDA refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it notes what functions of torch.cuda are: before these are replaced
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_device_constructors()  # likewise, what functions make tensors: it is asked once and kept

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

PEAK = 2**20
"""Peak of the memory allocated there, in bytes."""

INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._unsafe_index_put,
            aten._index_put_impl_)  # fmt: skip
"""Operations that take indices from the CPU into a tensor that is elsewhere."""
VALUES = (aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_)
"""Operations whose last tensor is one number, wherever it is."""


class DeviceMismatchError(RuntimeError):
    """An operation on tensors of several devices."""


_real_device: Any = torch._C.TensorBase.device
_real_to, _real_tensor, _real_deepcopy = Tensor.to, torch.tensor, Tensor.__deepcopy__


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor says that it is; views say what their storage says."""
    return _label_of(tensor) or CPU


def _label_of(tensor: Tensor) -> torch.device | None:
    """Likewise; ``None`` for a tensor that can still be anywhere."""
    real = _real_device.__get__(tensor)
    return real if real.type != "cpu" else getattr(tensor.untyped_storage(), "pretended_device", CPU)


def _label(tensor: Tensor, device: torch.device | None) -> Tensor:
    tensor.untyped_storage().pretended_device = device  # type: ignore[attr-defined]
    return tensor


def _normal(device: Any) -> torch.device:
    device = torch.device(device)
    return CUDA if device.type == "cuda" else device


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        ctx.origin = device_of(tensor), tensor.dtype
        return _label(_real_to(tensor, dtype=dtype or tensor.dtype, copy=True), device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        device, dtype = ctx.origin
        return _to(gradients[0], device, dtype), None, None


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``: of a device and a dtype, of a dtype, or of a tensor."""
    if "other" in kwargs:
        args = (kwargs.pop("other"), *args)
    if args and isinstance(args[0], Tensor):
        args = (device_of(args[0]), args[0].dtype, *args[1:])
    elif args and isinstance(args[0], torch.dtype):
        args = (None, *args)
    names = ("device", "dtype", "non_blocking", "copy")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    device = given.pop("device", None)
    device = device_of(tensor) if device is None else _normal(device)
    options = {name: value for name, value in given.items() if value is not None}
    if device == device_of(tensor):
        return _real_to(tensor, **options) if options else tensor
    if device.type not in ("cpu", "cuda"):
        return _real_to(tensor, device, **options)
    return _Moved.apply(tensor, device, options.get("dtype"))


def _tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
    """``torch.tensor``."""
    made = _real_tensor(data, **kwargs)
    made = made if device is None else _to(made, device)
    return made.requires_grad_(requires_grad)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """``torch.as_tensor``."""
    made = data if isinstance(data, Tensor) else _real_tensor(data)
    return _to(made, **({} if device is None else {"device": device}), **({} if dtype is None else {"dtype": dtype}))


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    copied = _real_deepcopy(tensor, memo)
    return _label(copied, device_of(tensor))


def _placing(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor where another is, or on ``device``."""

    def call(tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = real(tensor, *args, **kwargs)
        return made if device is None else _label(made, _normal(device))

    return call


def _refusing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Something that only a tensor in main memory has."""

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if device_of(tensor).type != "cpu":
            raise TypeError(f"can't convert {device_of(tensor)} device type tensor to numpy. Use Tensor.cpu() first")
        return real(tensor, *args, **kwargs)

    return call


class _Checked(TorchDispatchMode):
    """Refuses operations that mix devices as PyTorch does, and says of every result where it is.

    PyTorch's rules: all tensors are on one device, but for the numbers (tensors without dimensions) of the CPU in
    pointwise operations, whose result is elsewhere; indices from the CPU; and copies.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func._overloadpacket
        if packet is aten.set_:  # the tensor is where its new storage is
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device: torch.device | None = None if kwargs.get("device") is None else _normal(kwargs["device"])
        if device is not None and device.type == "cuda":
            kwargs["device"] = CPU
        elif tensors and (device is None or device.type == "cpu"):
            device = self._device(func, packet, tensors, args, kwargs)
        elif device is not None and device.type == "cpu" and "pin_memory" not in kwargs:
            # PyTorch's own code asks for the device of a tensor that it has at hand, and finds the CPU
            device = None
        else:
            device = CPU if device is None else device
        if kwargs.get("generator") is not None and device is not None and device.type != "cpu":
            raise DeviceMismatchError(f"{func}: expected a generator on {device}, found one on the CPU")
        known = {tensor.untyped_storage()._cdata for tensor in tensors if _real_device.__get__(tensor).type == "cpu"}
        if packet is aten.histc and device is not None and device.type == "cuda":
            # CUDA counts integers, too; up to 2^24 of them float32 is exact
            result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in tensors:
            if _label_of(tensor) is None:
                _label(tensor, device)
        if device is None or device.type == "cuda":
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                    _label(leaf, device)
        return result

    def _device(self, func: Any, packet: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> torch.device | None:
        """Where the result of an operation on tensors is."""
        tensors = [tensor for tensor in tensors if _label_of(tensor) is not None]
        devices = {device_of(tensor) for tensor in tensors}
        if len(devices) <= 1:
            return devices.pop() if devices else None
        first = device_of(tensors[0])
        if packet in (aten.copy_, aten._to_copy, aten._copy_from):
            return first
        if packet in INDEXING:
            indices = [index for index in args[1] if index is not None]
            wrong = [index for index in indices if _label_of(index) not in (CPU, first, None)]
            values = [value for value in args[2:] if isinstance(value, Tensor) and value.ndim]
            if not wrong and all(_label_of(value) in (first, None) for value in values):
                return first
        elif packet in VALUES:
            if all(device_of(tensor) == first for tensor in tensors[:-1]) and tensors[-1].ndim == 0:
                return first
        elif torch.Tag.pointwise in func.tags or packet.__name__.startswith("_foreach"):
            # a number of the CPU goes along, but is not written to
            rest = {device_of(tensor) for tensor in tensors if tensor.ndim or device_of(tensor) != CPU}
            written = kwargs.get("out", args[0] if func._schema.is_mutable else None)
            places = {device_of(leaf) for leaf in tree_leaves(written) if isinstance(leaf, Tensor)}
            if len(rest) == 1 and places <= rest:
                return rest.pop()
        found = ", ".join(f"{list(tensor.shape)} on {device_of(tensor)}" for tensor in tensors)
        raise DeviceMismatchError(f"{func}: expected all tensors to be on the same device, got {found}")


class _Autocast(torch.autocast):
    """The tensors are in main memory, where autocast looks for them under another name."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _rest(*args: Any, **kwargs: Any) -> None:
    """A call of the driver."""


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """A block in which ``cuda:0`` is a device: its tensors are in main memory and have their numbers.

    An operation that mixes devices raises :class:`DeviceMismatchError` where PyTorch with CUDA raises. Only tensors
    that the block moves or makes there are on it. Neither collectives nor streams are modelled, nor what a kernel of
    CUDA does otherwise than that of the CPU: the dtypes that it takes, and rounding.
    """
    methods: dict[str, Any] = {
        "device": property(device_of),
        "is_cuda": property(lambda tensor: device_of(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: device_of(tensor).type == "cpu"),
        "get_device": lambda tensor: -1 if device_of(tensor).index is None else device_of(tensor).index,
        "to": _to,
        "cuda": lambda tensor, device=CUDA, *args, **kwargs: _to(tensor, device),
        "cpu": lambda tensor, *args, **kwargs: _to(tensor, CPU),
        "type_as": lambda tensor, other: _to(tensor, other),
        "new_tensor": lambda tensor, data, device=None, **kwargs: _tensor(
            data, device=device_of(tensor) if device is None else device, **{"dtype": tensor.dtype, **kwargs}
        ),
        "numpy": _refusing(Tensor.numpy),
        "__array__": _refusing(Tensor.__array__),
        "__deepcopy__": _deepcopy,
    }
    driver: dict[str, Any] = {
        "_lazy_init": _rest,
        "get_rng_state": lambda device=CUDA: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _rest,
        "synchronize": _rest,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=CUDA: (9, 0),
        "mem_get_info": lambda device=CUDA: (2**36, 2**36),
        "memory_reserved": lambda device=CUDA: 0,
        "memory_allocated": lambda device=CUDA: 0,
        "reset_peak_memory_stats": _rest,
        "max_memory_allocated": lambda device=CUDA: PEAK,
        "empty_cache": _rest,
    }
    methods |= {name: _placing(getattr(Tensor, name)) for name in ("new_empty", "new_full", "new_ones", "new_zeros")}
    alike = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
    functions: dict[str, Any] = {name: _placing(getattr(torch, name)) for name in alike}
    with (
        mock.patch.multiple(Tensor, **methods),
        mock.patch.multiple(torch.cuda, **driver),
        mock.patch.multiple(torch, tensor=_tensor, as_tensor=_as_tensor, autocast=_Autocast, **functions),
        _Checked(),
    ):
        yield CUDA
