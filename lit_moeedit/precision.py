"""Products of float32 numbers in full, whatever precision a run has chosen for its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """A block whose float32 products have all 23 bits; as ``@full_precision()``, a function that is such a block.

    ``torch.set_float32_matmul_precision("high")``, which Lightning advises on GPUs with tensor cores, makes them
    products of 10 bits there, and ``"medium"`` of 7 on some CPUs. A model bears that. The objective of an edit would
    end 1e-3 above its least, and the bounds by which exact solvers decide whether float32 will do would not hold.

    The setting belongs to the process: other threads compute in full meanwhile, too. Afterwards it is as before, also
    on an exception. Inside, the older ``torch.backends.cuda.matmul.allow_tf32`` cannot be read if the run has set it.

    Example:
        >>> with full_precision():
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
    """
    with _products_in("ieee"):
        yield


@contextmanager
def tensor_core_precision() -> Iterator[None]:
    """A block whose float32 products on a GPU keep 10 bits of each factor (TF32), and all bits of their sums.

    Exact for factors that have no more bits: those of bfloat16 and float16, and what :func:`rounded` gives.

    Example:
        >>> with tensor_core_precision():
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    with _products_in("tf32"):
        yield


def rounded(numbers: Tensor) -> Tensor:
    """Round float32 numbers to the nearest with 10 bits of significand, half-way cases to even.

    Tensor cores would cut the other bits off, and make every sum of squares too small.

    Example:
        >>> rounded(torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-11, 1.0 - 2**-13])).tolist()
        [1.0, 1.0009765625, 1.0, 1.0]
    """
    bits = numbers.view(torch.int32)
    result = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(numbers.isfinite(), result, numbers)  # of a GPU's NaN all bits are set, and would overflow


@contextmanager
def _products_in(precision_on_gpu: str) -> Iterator[None]:
    backends: Any = torch.backends  # some of whose attributes exist at run time only
    # What products obey; the older torch.set_float32_matmul_precision writes here, too. It is not used, because its
    # getter raises if somebody used both. What is equal to the setting of the whole backend is taken to be inherited
    # from there ("none"), and will follow it when that is changed.
    settings = [(backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn)]
    before = [own.fp32_precision for own, _ in settings]
    before = ["none" if own == every.fp32_precision else own for own, (_, every) in zip(before, settings, strict=True)]
    try:
        for (own, _), precision in zip(settings, (precision_on_gpu, "ieee"), strict=True):
            own.fp32_precision = precision
        yield
    finally:
        for (own, _), precision in zip(settings, before, strict=True):
            own.fp32_precision = precision
