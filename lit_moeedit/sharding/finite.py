"""The check that weights and buffers are finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.sharding.backends import own_elements, settle
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALL_RANGE = "float16 holds numbers up to 65504, bfloat16 larger ones: "


@torch.no_grad()
def check_finite(model: nn.Module, ranks: Ranks) -> None:
    """Refuse a model with a weight or a buffer that is NaN or infinite, with which no result would mean anything.

    This is one pass over the memory. Of sharded parameters each rank reads its own shard. Buffers that are
    not saved are not checked, because masks hold infinities.

    Args:
        model: the model.
        ranks: the processes that hold it. Each calls this.

    Raises:
        FloatingPointError: naming the weights and buffers, on the ranks that hold them.
        RankError: on the other ranks.

    Example:
        >>> check_finite(nn.Linear(2, 2), Ranks())
    """
    with ranks.together():
        settle(model)
        wrong = _not_finite(itertools.chain(model.named_parameters(), _saved_buffers(model)))
        if wrong:
            reason = _SMALL_RANGE if torch.float16 in wrong.values() else ""
            raise FloatingPointError(
                f"{reason}the model has weights or buffers that are not finite (NaN or infinity): {first_few(wrong)}"
            )


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of the state dict, such as the biases of a router."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _not_finite(tensors: Iterable[tuple[str, Any]]) -> dict[str, torch.dtype]:
    """Return names and dtypes of the tensors that are not finite, read together: each read waits for the device."""
    dtypes: dict[str, torch.dtype] = {}
    extremes: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
    for name, weight in tensors:
        elements = own_elements(weight).elements
        if elements.dtype in _CHECKED and elements.numel():
            names, found = extremes.setdefault((elements.device, elements.dtype), ([], []))
            names.append(name)
            # the minimum and the maximum of anything with NaN are NaN; no tensor of the weights' size is allocated
            found += [elements.amin(), elements.amax()]
            dtypes[name] = elements.dtype
    wrong: set[str] = set()
    for names, found in extremes.values():
        finite = torch.stack(found).isfinite().view(-1, 2).all(1).tolist()
        wrong |= {name for name, is_finite in zip(names, finite, strict=True) if not is_finite}
    return {name: dtype for name, dtype in dtypes.items() if name in wrong}
