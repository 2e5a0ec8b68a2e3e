"""The limit of the gradient of some rows, against the gradients of rows alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lit_moeedit.callbacks import EditReplay, KnowledgeEditing
from lit_moeedit.callbacks.limited_rows import LimitedRows, longest_gradients

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


def norms(module: Any, batch: Any, weights: torch.Tensor) -> torch.Tensor:
    """Norms of the gradients of the logits by row, if the losses of rows have weights."""
    logits = module.model(input_ids=batch["input_ids"]).logits.detach().requires_grad_()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    (gradient,) = torch.autograd.grad((weights[:, None] * losses).sum() / losses.numel(), logits)
    return gradient.flatten(1).norm(dim=1)


@pytest.mark.parametrize("limit", [0.25, 1.0])
def test_statements_pull_in_proportion_to_the_limit_and_the_loss_is_the_same(
    module: Any, batch: Any, limit: float
) -> None:
    own = torch.tensor([0.5, 0.0, 1.0, 1.0, 1.0])  # as if rows were of known and unknown text; one has no loss
    with LimitedRows(limit, "").of(module, batch["input_ids"], FIRST):
        loss = (own[:, None] * losses(module, batch)).sum()
    found = gradients(module, loss)
    assert loss.item() == pytest.approx((own[:, None] * losses(module, batch)).sum().item())
    each = norms(module, batch, own)
    tokens = batch["input_ids"].shape[1] - 1
    factor = float(limit * each[:FIRST].sum() / 2 / ((2 * tokens) ** 0.5 / (ROWS * tokens)))
    assert factor < 1
    weights = own * torch.tensor([1.0, 1.0, 1.0, factor, factor])
    expected = gradients(module, (weights[:, None] * losses(module, batch)).sum())
    for name, gradient in expected.items():
        # float32, summed in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert not module.model.get_output_embeddings()._forward_hooks


def test_the_longest_gradient_is_that_of_a_label_without_probability() -> None:
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[3, 5, 7, -100], [-100, -100, 2, -100], [-100, -100, -100, -100]])
    loss = 8.0 * F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    found = longest_gradients(gradient, logits.detach(), F.pad(labels, (1, 0))[:, :4])
    # float32, from probabilities that were computed anew
    torch.testing.assert_close(found[:2], 8.0 * torch.tensor([6.0, 2.0]).sqrt(), rtol=1e-4, atol=0)
    assert 0 < found[2] < 1e-20
    with torch.no_grad():
        logits[1, 2] = torch.where(torch.arange(50) == 9, 40.0, 0.0)
    (gradient,) = torch.autograd.grad(8.0 * F.cross_entropy(logits[1:2, 2], labels[1:2, 2]), logits)
    assert gradient[1].norm() == pytest.approx(8.0 * 2**0.5, rel=1e-4)


@pytest.mark.parametrize("known", [0, 3, 4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
def test_a_gradient_is_never_lengthened_nor_beyond_the_limit(limit: float, label_smoothing: float, known: int) -> None:
    rows = LimitedRows(limit, "")
    logits = torch.randn(ROWS, 5, 50, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 50, (ROWS, 5), generator=torch.Generator().manual_seed(2))
    # with smoothing, what is known too well is pulled back
    logits[FIRST:, :known].scatter_(-1, labels[FIRST:, 1 : known + 1, None], 30.0)
    logits[:FIRST].scatter_(-1, F.pad(labels[:FIRST, 1:], (0, 1))[..., None], 6.0)
    logits.requires_grad_()
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], label_smoothing=label_smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    limited = rows._limited(gradient.clone(), logits.detach()[FIRST:], labels[FIRST:])
    before, after = (each.flatten(1).norm(dim=1) for each in (gradient, limited))
    assert torch.equal(before[:FIRST], after[:FIRST]) and bool((after[FIRST:] <= before[FIRST:]).all())
    assert bool((after[FIRST:] <= limit * before[:FIRST].mean() * 1.001).all())


def test_a_gradient_of_repeated_values_is_not_changed_in_place() -> None:
    logits = torch.randn(ROWS, 5, 50, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 50, (ROWS, 5), generator=torch.Generator().manual_seed(2))
    value = torch.tensor(0.5)
    limited = LimitedRows(1e-3, "")._limited(value.expand(logits.shape), logits[FIRST:], labels[FIRST:])
    assert value.item() == 0.5 and bool((limited[:FIRST] == 0.5).all()) and bool((limited[FIRST:] < 0.5).all())


def test_a_batch_without_losses_of_its_own_sets_no_limit(module: Any, batch: Any) -> None:
    pulls = torch.tensor([0.0, 0.0, 0.0, 0.01, 3.0])[:, None]
    with LimitedRows(1.0, "").of(module, batch["input_ids"], FIRST):
        found = gradients(module, (pulls * losses(module, batch)).sum())
    expected = gradients(module, (pulls * losses(module, batch)).sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_forward_of_another_number_of_rows_is_left_alone(
    module: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    rows = LimitedRows(0.25, "")
    for _ in range(2):
        with rows.of(module, torch.cat([batch["input_ids"], batch["input_ids"][:1]]), FIRST):
            loss = losses(module, batch).sum()
    found, expected = gradients(module, loss), gradients(module, losses(module, batch).sum())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert caplog.text.count("gradient of statements of edited facts has no limit") == 1


@pytest.mark.parametrize(("limit", "first"), [(None, FIRST), (0.25, ROWS)])
def test_nothing_is_hooked_where_nothing_is_limited(
    module: Any, batch: Any, limit: float | None, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    with LimitedRows(limit, "").of(module, batch["input_ids"], first):
        assert not module.model.get_output_embeddings()._forward_hooks
    assert not caplog.text


def test_a_module_whose_model_has_no_output_embeddings(
    module: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lit_moeedit")
    module.model.get_output_embeddings = lambda: None
    with LimitedRows(0.5, "early: ").of(module, batch["input_ids"], FIRST):
        pass
    assert "early: the gradient of statements of edited facts has no limit" in caplog.text


@pytest.mark.parametrize("limit", [2.0, None])
def test_replay_limits_its_statements_alone(tiny: Any, make_trainer: Any, tmp_path: Path, limit: float | None) -> None:
    class Noted(LimitedRows):
        def __init__(self) -> None:
            super().__init__(limit, "")
            self.calls: list[tuple[int, int]] = []
            self.limited: list[int] = []

        def of(self, pl_module: Any, labels: torch.Tensor, first: int) -> Any:
            self.calls.append((len(labels), first))
            return super().of(pl_module, labels, first)

        def _limited(self, gradient: torch.Tensor, last: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.limited.append(len(last))
            return super()._limited(gradient, last, labels)

    replay = EditReplay(share=0.25, gradient_limit=limit)
    assert replay.settings["gradient_limit"] == limit
    replay._rows = noted = Noted()
    editing = KnowledgeEditing(tiny.editor(), at={"step": 1}, on_failure="keep")
    make_trainer(tmp_path, [editing, replay], max_steps=3, max_epochs=-1).fit(tiny.module(), tiny.data())
    assert noted.calls == [(10, 8), (10, 8)]
    assert noted.limited == ([2, 2] if limit else [])
