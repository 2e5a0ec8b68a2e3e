"""Check that weights and buffers are numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import zero_3_partition

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALL_RANGE = "float16 holds numbers up to 65504, bfloat16 larger ones: "


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
            shown = ", ".join([*wrong][:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            reason = _SMALL_RANGE if torch.float16 in wrong.values() else ""
            raise FloatingPointError(
                f"{reason}the model has weights or buffers that are not finite (NaN or infinity): {shown}"
            )


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of the state dict, such as the biases of a router."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _not_finite(tensors: Iterable[tuple[str, Any]]) -> dict[str, torch.dtype]:
    """Names and dtypes of those with values that are not finite, looked at together: each look waits for the device."""
    dtypes: dict[str, torch.dtype] = {}
    extremes: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
    for name, weight in tensors:
        numbers = zero_3_partition(weight)[1] if hasattr(weight, "ds_id") else weight
        # each rank looks at its own shard
        numbers = numbers.to_local() if isinstance(numbers, DTensor) else numbers
        if numbers.dtype in _CHECKED and numbers.numel():
            names, found = extremes.setdefault((numbers.device, numbers.dtype), ([], []))
            names.append(name)
            # NaN is the least and the greatest of what it is among, and no tensor of the weights' size is made
            found += [numbers.amin(), numbers.amax()]
            dtypes[name] = numbers.dtype
    wrong: set[str] = set()
    for names, found in extremes.values():
        finite = torch.stack(found).isfinite().view(-1, 2).all(1).tolist()
        wrong |= {name for name, is_finite in zip(names, finite, strict=True) if not is_finite}
    return {name: dtype for name, dtype in dtypes.items() if name in wrong}
