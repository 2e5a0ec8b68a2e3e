"""An edit is made wholly or not at all, and touches nothing but weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.editing import Editor
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import EditProblem, ExpertDeltas
from tests.editing.recording import QUICK, Recording, edited_weights


def prepared(model: PreTrainedModel, unchanged: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    """A model in the middle of a training: with gradients, a frozen part, a part in evaluation mode, random layers."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = None
    model.model.layers[2].self_attn.eval()
    model.lm_head.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)
    unchanged(model)
    return model


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    @pytest.mark.parametrize(
        "stage", ["statistics", "targets", "features", "solve", "second solve", "second commit", "last report", "guard"]
    )
    def test_an_exception_changes_nothing(
        self, model, tokenizer, facts, texts, unchanged, monkeypatch, stage: str, error: type[BaseException]
    ) -> None:
        prepared(model, unchanged)
        before = edited_weights(model)
        reached: list[bool] = []

        def fail() -> Any:
            changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            reached.append(bool(changed))
            raise error

        def progress(phase: str, done: int, total: int) -> None:
            if phase == stage or (stage == "last report" and phase == "layers" and done == total):
                fail()

        class Failing(Recording):
            def solve(self, problem: EditProblem) -> ExpertDeltas:
                if (stage, len(self.problems)) in {("solve", 0), ("second solve", 1)}:
                    fail()
                return super().solve(problem)

        if stage == "features":
            monkeypatch.setattr("lit_moeedit.editing.spread.edit_tokens", lambda *_: fail())
        if stage == "second commit":
            commits: list[int] = []
            commit = Transaction.commit

            def failing(self: Transaction, *args: Any) -> None:
                commits.append(1)
                if len(commits) == 2:
                    fail()
                commit(self, *args)

            monkeypatch.setattr(Transaction, "commit", failing)
        editor = Editor([0, 1], Failing(), QUICK)
        with pytest.raises(error):
            editor.edit(
                model, tokenizer, facts, texts, progress=progress, guard=fail if stage == "guard" else lambda: True
            )
        # the weights had changed where they should have by then, so that there was something to undo
        assert reached == [stage in ("second solve", "second commit", "last report", "guard")]

    def test_the_edit_leaves_everything_but_weights(self, model, tokenizer, facts, texts, unchanged) -> None:
        """A guard that refuses undoes the weights; with them back, all else must be as before too."""
        prepared(model, unchanged)
        before = edited_weights(model)
        layers = expert_layers(model)
        seen: list[list[int]] = []

        def guard() -> bool:
            seen.append([i for i, x in layers.items() if not torch.equal(x.down_proj, before[f"{x.name}.down_proj"])])
            return False

        result = Editor([0, 1], targets=QUICK).edit(model, tokenizer, facts, texts, guard=guard)
        assert not result.kept
        assert seen == [[0, 1]]
        assert list(result.deltas) == [0, 1]

    def test_gradients_modes_and_random_state_survive_an_edit_that_is_kept(
        self, model, tokenizer, facts, texts, unchanged
    ) -> None:
        prepared(model, unchanged)
        before = edited_weights(model)
        assert Editor([1], targets=QUICK).edit(model, tokenizer, facts, texts, guard=lambda: True).kept
        weight = expert_layers(model)[1].down_proj
        name = f"{expert_layers(model)[1].name}.down_proj"
        assert not torch.equal(weight, before[name])
        weight.data.copy_(before[name])  # so that only what an edit must not touch is compared

    @pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
    def test_works_where_lightning_evaluates(self, model, tokenizer, facts, texts, outer) -> None:
        other = copy.deepcopy(model)
        editor = Editor([0, 1], targets=QUICK)
        editor.edit(model, tokenizer, facts, texts)
        with outer():
            editor.edit(other, tokenizer, facts, texts)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
        ids = torch.tensor([[1, 5, 9]])
        other(input_ids=ids, labels=ids).loss.backward()  # the weights can still be trained
        assert expert_layers(other)[1].down_proj.grad is not None

    @pytest.mark.parametrize("where", ["model.layers.0.mlp.experts.gate_up_proj", "lm_head.weight"])
    def test_a_model_that_is_not_finite_is_refused(self, model, tokenizer, facts, unchanged, where: str) -> None:
        model.get_parameter(where).data.fill_(torch.nan)
        unchanged(model)
        with pytest.raises(FloatingPointError, match="not finite"):
            Editor([1], targets=QUICK, preserve="none").edit(model, tokenizer, facts)

    def test_deltas_that_are_not_finite_are_refused(self, model, tokenizer, facts, unchanged) -> None:
        class Broken(Recording):
            def solve(self, problem: EditProblem) -> ExpertDeltas:
                solution = super().solve(problem)
                return solution.with_right(solution.right * (torch.nan if len(self.problems) == 2 else 1.0))

        unchanged(model)
        with pytest.raises(FloatingPointError, match="a delta has values that are not finite"):
            Editor([0, 1], Broken(), QUICK, "none").edit(model, tokenizer, facts)
