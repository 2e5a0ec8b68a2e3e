"""The precision of float32 matrix products, whatever a run has chosen for its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_moeedit.interrupts import Undo, held


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products with all 23 bits of the significand, as a context manager or decorator.

    ``torch.set_float32_matmul_precision("high")``, which Lightning advises on GPUs with tensor cores, reduces them to
    10 bits there, and ``"medium"`` to 7 bits on some CPUs. A model tolerates that. The objective of an edit would be
    1e-3 above its minimum, and the error bounds by which exact solvers choose float32 would not hold.

    The setting applies to the whole process, so other threads compute in full precision meanwhile, too. It is restored
    afterwards, also on an exception. Inside, the older ``torch.backends.cuda.matmul.allow_tf32`` cannot be read if the
    run has set it.

    Example:
        >>> with full_precision():
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
    """
    with _products_in("ieee"):
        yield


@contextmanager
def tensor_core_precision() -> Iterator[None]:
    """Compute float32 products on a GPU with 10 bits of each factor (TF32), and sums in full precision.

    Products are exact if the factors have no more bits: those from bfloat16 or float16, and the results of
    :func:`round_to_tf32`.

    Example:
        >>> with tensor_core_precision():
        ...     torch.backends.cuda.matmul.fp32_precision
        'tf32'
    """
    with _products_in("tf32"):
        yield


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute matrix products in another dtype inside the context; ``None`` for the tensors' own.

    Unlike ``torch.autocast``, it cannot be left on by an interrupt.
    """
    with held(Undo()) as undo:
        undo.enter_context(torch.autocast(device.type, dtype, enabled=dtype is not None))
        yield


def round_to_tf32(values: Tensor) -> Tensor:
    """Round float32 values to the nearest with 10 bits of the significand, ties to even.

    Tensor cores would truncate the other bits, which makes every sum of squares too small.

    Example:
        >>> round_to_tf32(torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-11, 1.0 - 2**-13])).tolist()
        [1.0, 1.0009765625, 1.0, 1.0]
    """
    bits = values.view(torch.int32)
    result = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(values.isfinite(), result, values)  # all bits of a GPU's NaN are set: the sum overflows


@contextmanager
def _products_in(precision_on_gpu: str) -> Iterator[None]:
    backends: Any = torch.backends  # some of its attributes exist at run time only
    # torch.set_float32_matmul_precision writes these settings, too. It is not used here, because its getter raises if
    # both ways were used. A setting that equals that of the whole backend is restored as inherited ("none"), so that it
    # follows later changes of the backend's setting.
    settings = [(backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn)]
    before = ["none" if own.fp32_precision == whole.fp32_precision else own.fp32_precision for own, whole in settings]
    with held(Undo()) as undo:
        for (own, _), old, new in zip(settings, before, (precision_on_gpu, "ieee"), strict=True):
            undo.by(setattr, own, "fp32_precision", old)
            own.fp32_precision = new
        yield
