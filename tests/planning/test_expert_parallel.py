"""What a rank holds and sends under expert parallelism: by formulas, and counted in runs of real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_moeedit.planning.expert_parallel import COUNT, ExpertParallelCost
from lit_moeedit.sharding.clipping import local_part
from tests.processes import run_ranks
from tests.sharding.expert_parallel_models import parallel_model, whole_model

TOKENS, TOP_K, OWNERS = 512, 2, 2


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends: weights in all_gathers, hidden states and their numbers in all_to_alls."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.weights, self.states = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rank = func._schema.name, torch.distributed.get_rank() % OWNERS
        if name == "c10d::_allgather_base_":
            whole, shard = args[0].nbytes, args[1].nbytes
            self.gathered, self.weights = max(self.gathered, whole), self.weights + whole - shard
        elif name == "c10d::alltoall_base_":
            assert args[1].shape[0] == OWNERS
            self.states += args[1].nbytes * (OWNERS - 1) // OWNERS
        elif name == "_c10d_functional::all_to_all_single":
            rows: Tensor = args[0]
            self.states += sum(count for owner, count in enumerate(args[2]) if owner != rank) * rows[:1].nbytes
        return func(*args, **(kwargs or {}))


def counted(folder: str, ranks: int) -> dict[str, int]:
    model = parallel_model(folder, {"ep_size": OWNERS, "fsdp_size": ranks})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    ids = torch.randint(5, 100, (4, TOKENS // 4), generator=generator)
    with Sent() as sent, torch.no_grad():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = 0
    for weight in model.parameters():
        assert weight.grad is not None
        moments = (optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq"))
        held += sum(local_part(tensor).nbytes for tensor in (weight, weight.grad, *moments))
    return {"held": held, "gathered": sent.gathered, "sent": sent.weights, "dispatched": sent.states}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_cost_is_that_of_a_run(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(counted, ranks, str(tmp_path), ranks)
    cost = ExpertParallelCost.of(whole_model(), ranks, OWNERS, TOKENS, TOP_K)
    for rank in found:
        assert rank["gathered"] == cost.gathered
        assert rank["sent"] == cost.sent
        # an owner's three experts are two and one on four ranks, of which the cost has the larger part, and padding of
        # the other weights
        assert rank["held"] == cost.held if ranks == OWNERS else rank["held"] <= cost.held
    assert max(rank["held"] for rank in found) == cost.held
    # a random router prefers some experts, and which ranks have them differs: as exact as other figures of a plan
    assert sum(rank["dispatched"] for rank in found) == pytest.approx(ranks * cost.dispatched, rel=0.2)


def test_hidden_states_are_those_of_all_layers_there_and_back() -> None:
    model = whole_model()
    cost = ExpertParallelCost.of(model, 2, OWNERS, TOKENS, TOP_K)
    config = model.config
    a_layer = 2 * TOKENS * TOP_K * config.hidden_size * 4 + config.num_experts * COUNT
    assert cost.dispatched == config.num_hidden_layers * a_layer // 2
    # without tokens the ranks still exchange their numbers
    without = config.num_hidden_layers * config.num_experts * COUNT // 2
    assert ExpertParallelCost.of(model, 2, OWNERS) == replace(cost, dispatched=without)


@pytest.mark.parametrize(
    ("ranks", "owners", "message"),
    [(4, 1, "at least 2"), (4, 3, "divide the 4 ranks"), (8, 4, "4 owners cannot share 6 experts")],
)
def test_what_transformers_refuses_has_no_cost(ranks: int, owners: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertParallelCost.of(whole_model(), ranks, owners)
