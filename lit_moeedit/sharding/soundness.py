"""Check that weights and buffers are numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import zero_3_partition

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def check_finite(model: nn.Module, ranks: Ranks) -> None:
    """Refuse a model with a weight or a buffer that is NaN or infinite: nothing computed with it means anything.

    One pass over the memory; under DeepSpeed ZeRO-3 each rank reads its own part. Buffers that are not saved are left
    alone: masks hold infinities.

    Args:
        model: the model.
        ranks: the processes that hold it; each calls this.

    Raises:
        FloatingPointError: naming the weights and buffers, on the ranks that hold the part.
        RankError: on the others.

    Example:
        >>> check_finite(nn.Linear(2, 2), Ranks())
    """
    with ranks.together():
        wrong = _not_finite(itertools.chain(model.named_parameters(), _saved_buffers(model)))
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise FloatingPointError(f"the model has weights or buffers that are not finite (NaN or infinity): {shown}")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of the state dict, such as the biases of a router."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _not_finite(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of those with values that are not finite, looked at together: each look waits for the device."""
    names: list[str] = []
    extremes: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for name, weight in tensors:
        numbers = zero_3_partition(weight)[1] if hasattr(weight, "ds_id") else weight
        if numbers.dtype in _CHECKED and numbers.numel():
            places, found = extremes.setdefault((numbers.device, numbers.dtype), ([], []))
            places.append(len(names))
            # NaN is the least and the greatest of what it is among, and no tensor of the weights' size is made
            found += [numbers.amin(), numbers.amax()]
            names.append(name)
    wrong: list[int] = []
    for places, found in extremes.values():
        finite = torch.stack(found).isfinite().view(-1, 2).all(1).tolist()
        wrong += [place for place, is_finite in zip(places, finite, strict=True) if not is_finite]
    return [names[place] for place in sorted(wrong)]
