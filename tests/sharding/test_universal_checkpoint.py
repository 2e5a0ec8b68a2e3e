"""What DeepSpeed's universal checkpoints lose comes back, and nothing else changes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lit_moeedit.sharding.universal_checkpoint import mend_optimizer


def trained() -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    step(weights, optimizer)
    return weights, optimizer


def step(weights: list[nn.Parameter], optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    for weight in weights:
        weight.grad = weight.detach().sin()
    optimizer.step()
    return [weight.detach().clone() for weight in weights]


def test_a_shared_step_and_the_first_group_s_settings_are_mended() -> None:
    whole = step(*trained())
    weights, optimizer = trained()
    shared = optimizer.state[weights[0]]["step"]
    optimizer.state[weights[1]]["step"] = shared
    optimizer.param_groups[1]["weight_decay"] = 0.1
    mend_optimizer(optimizer, [0.1, 0.0])
    assert optimizer.state[weights[0]]["step"] is shared
    assert all(torch.equal(*pair) for pair in zip(step(weights, optimizer), whole, strict=True))


def test_an_optimizer_that_lost_nothing_stays() -> None:
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    mend_optimizer(optimizer, [])
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
