"""Expert parallelism of transformers (``DistributedConfig(ep_size=…, fsdp_size=…)``): experts stay with their owners.

A forward sends each token to the ranks that have its experts. FSDP2 shards everything else, and the experts of a rank
that further ranks have, too. Keys and gates are taken in front of the dispatch, see :mod:`lit_moeedit.models.keys`.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from typing_extensions import override

from lit_moeedit.sharding.backends.fsdp2 import FSDP2
from lit_moeedit.sharding.owners import is_expert_parallel
from lit_moeedit.sharding.parallelism import Parallelism
from lit_moeedit.sharding.shards import UnsupportedShardingError


class ExpertParallel(FSDP2):
    """Whole experts on each rank, in a model that FSDP2 shards over the same ranks."""

    handles = frozenset({Parallelism.EXPERT})

    @override
    def holds(self, model: nn.Module) -> bool:
        return any(is_expert_parallel(module) for module in model.modules())

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
            return  # the routing of a layer can be watched in any case
        for name, module in model.named_modules():
            if is_expert_parallel(module) and not isinstance(module, FSDPModule):
                raise UnsupportedShardingError(
                    f"{name or 'the module'} is under expert parallelism without FSDP2, where all ranks have the same "
                    "batch; give both: DistributedConfig(ep_size=N, fsdp_size=N)"
                )
