"""Products of float32 numbers in full, whatever precision a run has chosen for its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
    backends: Any = torch.backends  # some of whose attributes exist at run time only
    # What products obey; the older torch.set_float32_matmul_precision writes here, too. It is not used, because its
    # getter raises if somebody used both. What is equal to the setting of the whole backend is taken to be inherited
    # from there ("none"), and will follow it when that is changed.
    settings = [(backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn)]
    before = [own.fp32_precision for own, _ in settings]
    before = ["none" if own == every.fp32_precision else own for own, (_, every) in zip(before, settings, strict=True)]
    try:
        for own, _ in settings:
            own.fp32_precision = "ieee"
        yield
    finally:
        for (own, _), precision in zip(settings, before, strict=True):
            own.fp32_precision = precision
