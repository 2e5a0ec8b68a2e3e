"""A small stack of experts that one process holds whole, and changes of some of them."""

from __future__ import annotations

import torch
from torch import nn

from lit_moeedit.solvers import ExpertDeltas

EXPERTS, D_MODEL, D_HIDDEN = 4, 3, 5


def weight(dtype: torch.dtype = torch.float32, transposed: bool = False) -> nn.Parameter:
    shape = (EXPERTS, D_HIDDEN, D_MODEL) if transposed else (EXPERTS, D_MODEL, D_HIDDEN)
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def some_deltas(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> ExpertDeltas:
    """Deltas of experts 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    return ExpertDeltas(
        torch.tensor([3, 1, 3]),
        torch.tensor([0, 0, 1]),
        scale * torch.randn(2, D_MODEL, generator=generator, dtype=dtype),
        torch.randn(3, D_HIDDEN, generator=generator, dtype=dtype),
        EXPERTS,
    )
