"""Fine-tuning as an editor: what it changes is what plain gradient steps change, as one transaction."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data.encoding import join
from lit_moeedit.data.facts import FactError
from lit_moeedit.editing import FineTuning, fine_tuning, score
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError
from tests.editing.recording import edited_weights
from tests.processes import run_each, run_ranks

RATE = 0.01


def plainly_trained(model: PreTrainedModel, tokenizer: Any, texts: list[tuple[str, str]], steps: int) -> list[Tensor]:
    """Down-projections of layers 0 and 1 after steps of Adam on the targets' tokens, one text after the other."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    weights = [expert_layers(model)[i].down_proj.requires_grad_(True) for i in (0, 1)]
    optimizer = torch.optim.Adam(weights, RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        for prompt, target in texts:
            ids = tokenizer(join(prompt, target), return_tensors="pt")["input_ids"]
            length = ids.shape[1] - len(tokenizer(prompt)["input_ids"])
            logits = model(input_ids=ids).logits[0, -length - 1 : -1]
            (F.cross_entropy(logits, ids[0, -length:]) / len(texts)).backward()
        optimizer.step()
    return [weight.detach() for weight in weights]


class TestDescent:
    @pytest.mark.parametrize(("contexts", "token_budget"), [(("",), 20), (("", "Note:"), 16384)])
    def test_equals_plain_training(self, model, tokenizer, facts, contexts, token_budget: int) -> None:
        texts = [(join(c, fact.prompt) if c else fact.prompt, fact.target_new) for fact in facts for c in contexts]
        expected = plainly_trained(model, tokenizer, texts, steps=4)
        before = edited_weights(model)
        editor = FineTuning([0, 1], 4, RATE, stop=0.0, contexts=contexts, token_budget=token_budget)
        result = editor.edit(model, tokenizer, facts)
        for i, weight in enumerate(expected):
            # Adam's first steps are of the learning rate's size wherever the gradient is not exactly 0, so rounding
            # can turn a few of them round
            close = torch.isclose(expert_layers(model)[i].down_proj, weight, rtol=0, atol=1e-3 * RATE)
            assert float(close.float().mean()) > 0.999
            assert float((weight - before[f"{expert_layers(model)[i].name}.down_proj"]).abs().max()) > 2 * RATE
        assert result.targets.steps.tolist() == [4] * 4
        assert result.targets.deltas.shape == (4, 0)

    @pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
    def test_only_the_chosen_down_projections_change(self, make_model, tokenizer, facts, model_type: str) -> None:
        model = make_model(model_type)
        before = edited_weights(model)
        result = FineTuning([0, 2], 3, RATE).edit(model, tokenizer, facts)
        assert result.kept
        layers = expert_layers(model)
        for name, parameter in model.named_parameters():
            owner = next((i for i in result.deltas if name == f"{layers[i].name}.down_proj"), None)
            if owner is None:
                assert torch.equal(parameter, before[name]), name
                continue
            for expert in range(len(parameter)):
                delta = result.deltas[owner].dense(expert)
                delta = delta.T if layers[owner].is_transposed else delta
                torch.testing.assert_close(parameter[expert], before[name][expert] + delta, rtol=0, atol=0)
        assert all(change > 1e-4 for change in result.relative_change.values())

    def test_experts_that_no_text_visits_are_left_out(self, model, tokenizer, facts) -> None:
        result = FineTuning([1], 2, RATE).edit(model, tokenizer, facts[:1])
        assert 0 < len(result.deltas[1].experts) <= 6
        for expert in range(6):
            assert bool(result.deltas[1].dense(expert).any()) is (expert in result.deltas[1].experts)

    def test_stops_when_the_loss_is_low(self, taught, tokenizer, facts) -> None:
        editor = FineTuning([0, 1, 2], 100, RATE, stop=0.5, contexts=("", "Note:"))
        result = editor.edit(taught, tokenizer, facts)
        assert 1 < int(result.targets.steps[0]) < 100
        found = score(taught, tokenizer, [f.prompt for f in facts], [f.target_new for f in facts])
        behind = score(taught, tokenizer, [f"Note: {f.prompt}" for f in facts], [f.target_new for f in facts])
        # the loss that is reported is what the edited model has: the deltas were added in float32
        mean = -(found.log_prob + behind.log_prob) / 2
        torch.testing.assert_close(result.targets.nll, mean, rtol=1e-3, atol=1e-4)
        assert float(result.targets.nll.mean()) <= 0.5

    def test_the_bound_holds_and_is_reached(self, model, tokenizer, facts) -> None:
        result = FineTuning([0, 1], 6, RATE, norm_constraint=0.015).edit(model, tokenizer, facts)
        for deltas in result.deltas.values():
            largest = max(float(deltas.dense(expert).abs().max()) for expert in deltas.experts)
            assert largest == torch.tensor(0.015).item()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, model, tokenizer, facts, dtype: torch.dtype) -> None:
        model.to(dtype)
        model.config._experts_implementation = "eager"  # grouped_mm knows no float64, and no bfloat16 of these sizes
        before = expert_layers(model)[1].down_proj.detach().clone()
        result = FineTuning([1], 3, RATE).edit(model, tokenizer, facts)
        weight = expert_layers(model)[1].down_proj
        assert weight.dtype == dtype
        for expert in result.deltas[1].experts:
            assert torch.equal(weight[expert], (before[expert].to(torch.promote_types(dtype, torch.float32))
                                                + result.deltas[1].dense(expert)).to(dtype))  # fmt: skip


class TestTransaction:
    def test_a_guard_undoes_everything(self, model, tokenizer, facts, unchanged) -> None:
        unchanged(model)
        before = edited_weights(model)
        seen: list[bool] = []

        def guard() -> bool:
            seen.append(
                torch.equal(expert_layers(model)[1].down_proj, before[f"{expert_layers(model)[1].name}.down_proj"])
            )
            return False

        assert not FineTuning([0, 1], 2, RATE).edit(model, tokenizer, facts, guard=guard).kept
        assert seen == [False]

    @pytest.mark.parametrize("done", [0, 1, 3])
    def test_an_exception_changes_nothing(self, model, tokenizer, facts, unchanged, done: int) -> None:
        unchanged(model)

        def progress(phase: str, now: int, total: int) -> None:
            if now == done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            FineTuning([0, 1], 3, RATE, stop=0.0).edit(model, tokenizer, facts, progress=progress)

    def test_a_loss_that_is_not_finite_is_refused(self, model, tokenizer, facts, unchanged) -> None:
        model.get_parameter("lm_head.weight").data.fill_(torch.nan)
        unchanged(model)
        with pytest.raises(FloatingPointError, match="loss of fine-tuning is not finite"):
            FineTuning([1], 2).edit(model, tokenizer, facts)

    @pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
    def test_works_where_lightning_evaluates(self, model, tokenizer, facts, outer) -> None:
        other = copy.deepcopy(model)
        FineTuning([0], 2, RATE).edit(model, tokenizer, facts)
        with outer():
            FineTuning([0], 2, RATE).edit(other, tokenizer, facts)
        assert torch.equal(expert_layers(model)[0].down_proj, expert_layers(other)[0].down_proj)


def tuned(own: list[str]) -> list[Tensor]:
    from tests.sharding.small_edits import FACTS, model, tokenizer

    whole = model()
    FineTuning([0, 1], 3, RATE, stop=0.0, token_budget=20).edit(whole, tokenizer(), FACTS, ranks=Ranks())
    return [expert_layers(whole)[i].down_proj.detach() for i in (0, 1)]


def failing_alone(rank: int) -> str:
    """What is said where a rank fails before all of them take the first one's numbers."""
    from tests.sharding.small_edits import FACTS, model, tokenizer

    ranks, factors = Ranks(), fine_tuning._factors

    def fail(*args: Any) -> Any:
        raise MemoryError("no room for factors")

    if ranks.rank == rank:
        fine_tuning._factors = fail
    try:
        FineTuning([0, 1], 1, RATE, token_budget=20).edit(model(), tokenizer(), FACTS, ranks=ranks)
    except (MemoryError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        fine_tuning._factors = factors
    return ""


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    """What the functions of this file found on two ranks."""
    return run_each({"tuned": (tuned, []), "failing": (failing_alone, 0)}, 2)


def test_a_failure_on_one_rank_is_one_on_all(two: dict[str, Any]) -> None:
    first, second = two["failing"]
    assert first == "MemoryError: no room for factors"
    assert second == f"RankError: rank 0 failed: {first}"


def test_the_result_does_not_depend_on_the_number_of_ranks(two: dict[str, Any]) -> None:
    from tests.sharding.small_edits import model

    (alone,), (one, other) = run_ranks(tuned, 1, []), two["tuned"]
    for i, weight in enumerate(alone):
        assert torch.equal(one[i], other[i])
        assert not torch.equal(weight, expert_layers(model())[i].down_proj)
        # sums in another order; see test_equals_plain_training
        assert float(torch.isclose(one[i], weight, rtol=0, atol=1e-3 * RATE).float().mean()) > 0.999


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layers": []}, "layers must be distinct layer indices, at least one, got []"),
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
            ({"norm_constraint": 0.0}, "norm_constraint must be positive, or None for no bound, got 0.0"),
            ({"stop": float("nan")}, "stop must be at least 0, got nan"),
            ({"contexts": ()}, "contexts needs at least one text"),
        ],
    )
    def test_wrong_settings(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            FineTuning(**{"layers": [1], **arguments})

    def test_partitioned_weights(self, model, tokenizer, facts, unchanged) -> None:
        unchanged(model)
        model.lm_head.weight.ds_id = 0  # what DeepSpeed puts on a partitioned parameter
        with pytest.raises(UnsupportedShardingError, match="FineTuning needs whole weights"):
            FineTuning([1]).edit(model, tokenizer, facts)

    def test_no_facts(self, model, tokenizer) -> None:
        with pytest.raises(FactError, match="holds no facts"):
            FineTuning([1]).edit(model, tokenizer, [])

    def test_frozen_experts(self, model, tokenizer, facts) -> None:
        weight = expert_layers(model)[1].down_proj.requires_grad_(False)
        before = weight.clone()
        FineTuning([1]).edit(model, tokenizer, facts)
        assert not torch.equal(weight, before)


def test_the_callback_takes_it_from_a_config_and_needs_no_text() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(KnowledgeEditing, "callback")
    settings = {"layers": [0, 1], "norm_constraint": 0.001, "contexts": ["", "Note:"]}
    editor = {"class_path": "lit_moeedit.editing.FineTuning", "init_args": settings}
    made = parser.instantiate_classes(parser.parse_object({"callback": {"editor": editor}})).callback.editor
    assert isinstance(made, FineTuning)
    assert (made.layers, made.norm_constraint, made.contexts) == ((0, 1), 0.001, ("", "Note:"))
    assert not made.needs_moments
