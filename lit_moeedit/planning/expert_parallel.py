"""Bytes that a rank holds and sends under expert parallelism of transformers with FSDP2, by the shapes of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from lit_moeedit.models.experts import find_model
from lit_moeedit.planning.simulated_fsdp2 import shard_size

COUNT = 8
"""Bytes of the number of rows for an expert, which the ranks exchange before the rows."""


@dataclass(frozen=True)
class ExpertParallelCost:
    """Bytes of one rank under expert parallelism.

    Attributes:
        held: weights, gradients and Adam's two moments, all in the dtype of the weights.
        gathered: the largest group of weights that is gathered at once; 0 if none is.
        sent: weights that the rank sends, so that all ranks can run one forward.
        dispatched: hidden states that the rank sends in one forward, to the owners of their experts and back, if the
            router sends the same number of tokens to each expert.
    """

    held: int
    gathered: int
    sent: int
    dispatched: int

    @classmethod
    def of(cls, model: nn.Module, ranks: int, owners: int, tokens: int = 0, experts: int = 1) -> ExpertParallelCost:
        """Compute the cost of a model, real or fake, that is not sharded.

        Args:
            model: the model.
            ranks: number of processes.
            owners: number of ranks that share the experts of a layer (``expert_parallel_size``).
            tokens: number of tokens in the rank's batch.
            experts: number of experts that a router chooses for a token.

        Raises:
            ValueError: if ``owners`` does not divide the ranks, or the experts of a layer, or is 1.
        """
        if owners < 2 or ranks % owners:
            raise ValueError(f"owners must be at least 2 and divide the {ranks} ranks, got {owners}")
        shards = sent = dispatched = 0
        gathered = [0]
        whole = find_model(model)
        shared, groups = _groups(whole, ranks, owners)
        for weights, is_shared in groups:
            # owners of the same experts shard these among them
            parts, own = (ranks // owners, owners) if is_shared else (ranks, 1)
            if any(is_shared and weight.shape[0] % owners for weight in weights):
                raise ValueError(f"{owners} owners cannot share {weights[0].shape[0]} experts; give a divisor of that")
            size = sum(shard_size(weight[: len(weight) // own], parts) * weight.element_size() for weight in weights)
            shards, sent = shards + size, sent + (parts - 1) * size
            gathered.append(parts * size if parts > 1 else 0)
        for module in shared:
            down = module.down_proj
            assert isinstance(down, torch.Tensor)
            width = whole.config.get_text_config().hidden_size
            rows = 2 * tokens * experts * width * down.element_size() + len(down) * COUNT
            dispatched += rows * (owners - 1) // owners
        return cls(4 * shards, max(gathered), sent, dispatched)


def _groups(
    model: PreTrainedModel, ranks: int, owners: int
) -> tuple[list[nn.Module], list[tuple[list[nn.Parameter], bool]]]:
    """Return the modules with experts, and the groups that are gathered together, each with whether it is of experts.

    A group has the weights of its modules that no deeper group has, see ``apply_fully_sharded_data_parallelism`` of
    transformers.
    """
    config = DistributedConfig(ep_size=owners, fsdp_size=ranks)
    _, expert_plan, plan = model._resolve_parallel_plans(config)
    modules = dict(model.named_modules())
    shared = [modules[name] for name, style in expert_plan.items() if style == "ep_dispatch_experts"]
    kept = [modules[name] for name, style in plan.items() if style == "keep_full_weight"]
    # the last norm and the head
    tail = [kept] if len(kept) == 2 else [[module] for module in kept]
    others = [[modules[name]] for name, style in plan.items() if style != "keep_full_weight"]
    known: set[nn.Parameter] = set()
    groups = []
    for together, is_shared in (
        *(([module], True) for module in shared),
        *((part, False) for part in (*others, *tail, [model])),
    ):
        weights = [weight for module in together for weight in module.parameters() if weight not in known]
        known.update(weights)
        if weights:
            groups.append((list(dict.fromkeys(weights)), is_shared))
    return shared, groups
