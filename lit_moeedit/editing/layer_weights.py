"""A solver's view of a layer's weights, whole or sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.preservation.moments_cache import digest
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.solver import LayerWeights


def layer_weights(
    layer: ExpertLayer, moments: SecondMoments | None, penalty: float | None, ranks: Ranks
) -> LayerWeights:
    """Return a view of a layer's weights with the metric of its keys.

    The metric is one second moment ``C`` for all experts: the mean over all routed tokens or, with gated moments, the
    mean of the experts' ``C_j``. With a penalty it is ``I + β C``.

    Args:
        layer: the layer.
        moments: its second moments, if the solver needs them.
        penalty: ``β``, if a penalty shapes the keys.
        ranks: the processes that hold the weights.
    """
    metric = None
    if moments is not None:
        total, count = moments.total.sum(0), moments.count.sum()
        if moments.part.owners > 1:
            ranks.check_errors()
            parts = (total, count) if moments.part.is_first else (total.zero_(), count.zero_())
            ranks.all_reduce(*parts)
        metric = total / (layer.num_experts * moments.tokens if moments.gated else count).clamp_min(1)
        if penalty is not None:
            metric = torch.eye(len(metric)).to(metric) + penalty * metric

    def key(metric: Tensor | None, settings: object) -> str:
        parts = {"weights": layer.down_proj, **({} if metric is None else {"metric": metric})}
        return digest(fingerprints(parts, ranks), repr(settings))

    def broadcast(*tensors: Tensor) -> None:
        ranks.check_errors()
        ranks.broadcast(*tensors)

    return LayerWeights(
        ExpertReader(layer.down_proj, layer.is_transposed, ranks),
        index=layer.index,
        metric=metric,
        is_whitened=penalty is not None,
        device=layer.down_proj.device,
        key=key,
        any_rank=ranks.any,
        broadcast=broadcast,
        is_first=ranks.rank == 0,
    )
