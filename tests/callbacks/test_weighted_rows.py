"""The weight of some rows in the gradient, against the loss of these rows alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lit_moeedit.callbacks.weighted_rows import WeightedRows

ROWS, FIRST = 5, 3


def losses(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy by row and token, over the number of tokens."""
    logits, labels = module.model(input_ids=batch["input_ids"]).logits[:, :-1], batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") / labels.numel()


def gradients(module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.fixture
def module(tiny: Any) -> Any:
    made = tiny.module()
    made.configure_model()
    return made


@pytest.fixture
def batch(module: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 100, (ROWS, 6), generator=generator)}


def test_the_gradient_of_the_last_rows_has_the_weight_and_the_loss_does_not(module: Any, batch: Any) -> None:
    rows = WeightedRows(0.25, "")
    with rows.of(module, ROWS, FIRST):
        loss = losses(module, batch).sum()
    found = gradients(module, loss)
    each = losses(module, batch)
    assert loss.item() == pytest.approx(each.sum().item())
    expected = gradients(module, each[:FIRST].sum() + 0.25 * each[FIRST:].sum())
    full = gradients(module, losses(module, batch).sum())
    for name, gradient in expected.items():
        # float32, summed in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    head = "model.lm_head.weight"
    assert not torch.allclose(found[head], full[head], rtol=1e-2)
    assert not module.model.get_output_embeddings()._forward_hooks


def test_a_forward_of_another_number_of_rows_is_left_alone(
    module: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    rows = WeightedRows(0.25, "")
    for _ in range(2):
        with rows.of(module, ROWS + 1, FIRST):
            loss = losses(module, batch).sum()
    found, expected = gradients(module, loss), gradients(module, losses(module, batch).sum())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert caplog.text.count("statements of edited facts count as much as other rows") == 1


@pytest.mark.parametrize(("weight", "first"), [(1.0, FIRST), (0.25, ROWS)])
def test_nothing_is_hooked_where_nothing_is_weighted(
    module: Any, weight: float, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    with WeightedRows(weight, "").of(module, ROWS, first):
        assert not module.model.get_output_embeddings()._forward_hooks
    assert not caplog.text


def test_a_module_whose_model_has_no_output_embeddings(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    module.model.get_output_embeddings = lambda: None
    with WeightedRows(0.5, "early: ").of(module, ROWS, FIRST):
        pass
    assert "early: statements of edited facts count as much" in caplog.text
