"""Whether weights are numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import zero_3_partition

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def check_finite(model: nn.Module, ranks: Ranks) -> None:
    """Refuse a model with a weight that is NaN or infinite: nothing that is computed with it means anything.

    One pass over the memory; under DeepSpeed ZeRO-3 each rank reads its own part.

    Args:
        model: the model.
        ranks: the processes that hold it; each calls this.

    Raises:
        FloatingPointError: naming the weight, on the ranks that hold its part.
        RankError: on the others.

    Example:
        >>> check_finite(nn.Linear(2, 2), Ranks())
    """
    with ranks.together():
        wrong = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise FloatingPointError(f"the model has weights that are not finite (NaN or infinity): {shown}")


def _is_finite(weight: Any) -> bool:
    numbers = zero_3_partition(weight)[1] if hasattr(weight, "ds_id") else weight
    if numbers.dtype not in _CHECKED or not numbers.numel():
        return True
    # the largest magnitude, of which NaN is one: no tensor of the weights' size is made
    return bool(torch.linalg.vector_norm(numbers, float("inf")).isfinite())
