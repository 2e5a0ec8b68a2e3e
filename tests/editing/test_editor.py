"""The editor: what it changes is what the solver said, nothing else changes, and a failure changes nothing at all."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, encode, join
from lit_moeedit.data.facts import Fact, FactError, FactsError
from lit_moeedit.editing import Editor, SecondMoments, TargetOptimizer, score, second_moments
from lit_moeedit.models.experts import check_editable, expert_layers
from lit_moeedit.models.keys import routed_keys
from lit_moeedit.preservation.shaping import CovariancePenalty, NullSpace, OutputPenalty, Shaping
from lit_moeedit.solvers import BlockCoordinateDescent, Tucker, Woodbury
from tests.editing.recording import QUICK, Recording, edited_weights, preservation

PRESERVE = ["output", "nullspace", "covariance", "none"]


def at_edit_tokens(model: PreTrainedModel, plain_hidden, layer: int, encoded: list[Encoding]) -> Tensor:
    """Output ``[n, d_model]`` of a layer at the edit tokens, from plain forwards."""
    return torch.stack([plain_hidden(model, layer, e.ids)[e.edit_token] for e in encoded])


class TestOneLayer:
    @pytest.mark.parametrize("preserve", PRESERVE)
    @pytest.mark.parametrize("token", ["subject_last", "last"])
    def test_output_moves_by_the_prediction(
        self, model, plain_hidden, tokenizer, facts, texts, preserve, token
    ) -> None:
        encoded = encode(tokenizer, [f.prompt for f in facts], [""] * 4, [f.subject for f in facts], token)
        before = at_edit_tokens(model, plain_hidden, 1, encoded)
        solver = Recording()
        editor = Editor([1], solver, QUICK, preservation(preserve), ridge=0.1, token=token, target_tokens="first")
        result = editor.edit(model, tokenizer, facts, texts)
        (problem,), (solution,) = solver.problems, solver.solutions
        torch.testing.assert_close(problem.residuals, result.targets.deltas, rtol=1e-4, atol=1e-4)
        moved = at_edit_tokens(model, plain_hidden, 1, encoded) - before
        assert float(moved.norm()) > 0.01 * float(problem.residuals.norm())
        # differences of float32 hidden states, through two layers
        error = float((moved - problem.prediction(solution)).norm())
        assert error <= 1e-4 * float(before.norm())
        assert error <= 1e-3 * float(moved.norm())

    @pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
    def test_output_moves_by_the_prediction_in_other_families(
        self, make_model, plain_hidden, tokenizer, facts, texts, encoded, model_type: str
    ) -> None:
        model = make_model(model_type)
        before = at_edit_tokens(model, plain_hidden, 1, encoded)
        solver = Recording()
        result = Editor([1], solver, QUICK, OutputPenalty(10.0), ridge=0.1).edit(model, tokenizer, facts, texts)
        moved = at_edit_tokens(model, plain_hidden, 1, encoded) - before
        torch.testing.assert_close(solver.problems[0].residuals, result.targets.deltas, rtol=1e-4, atol=1e-4)
        error = float((moved - solver.problems[0].prediction(solver.solutions[0])).norm())
        assert error <= 1e-4 * float(before.norm())
        assert error <= 1e-3 * float(moved.norm())

    def test_without_a_ridge_the_target_is_reached(self, model, plain_hidden, tokenizer, facts, encoded) -> None:
        before = at_edit_tokens(model, plain_hidden, 1, encoded)
        result = Editor([1], targets=QUICK, preserve="none", ridge=0.0).edit(model, tokenizer, facts)
        goal = before + result.targets.deltas
        # the exact solution in float32
        torch.testing.assert_close(at_edit_tokens(model, plain_hidden, 1, encoded), goal, rtol=1e-3, atol=1e-3)

    def test_the_new_targets_become_more_likely(self, model, tokenizer, facts) -> None:
        prompts, new = [f.prompt for f in facts], [f.target_new for f in facts]
        before = score(model, tokenizer, prompts, new).log_prob
        targets = TargetOptimizer(steps=15, learning_rate=0.3, stop=0.0)
        result = Editor([1], targets=targets, preserve="none", token="last").edit(model, tokenizer, facts)
        after = score(model, tokenizer, prompts, new).log_prob
        assert bool((after > before + 0.5).all())
        # what the targets promised, but for the target's own tokens, which visit the changed experts too
        torch.testing.assert_close(-after, result.targets.nll, rtol=0.5, atol=0.5)

    def test_deltas_lie_in_the_null_space(self, model, tokenizer, facts, texts) -> None:
        layers = list(expert_layers(model).values())
        moments = second_moments(model, tokenizer, layers, texts)
        threshold = float(torch.linalg.eigvalsh(moments[1].mean(torch.arange(6))).quantile(0.7))
        editor = Editor([0, 1], targets=QUICK, preserve=NullSpace(threshold), ridge=0.01)
        result = editor.edit(model, tokenizer, facts, moments=moments)
        assert set(result.deltas) == {0, 1}
        for index, deltas in result.deltas.items():
            changed = 0.0
            for expert in deltas.experts:
                values, vectors = torch.linalg.eigh(moments[index].mean(torch.tensor([expert]))[0])
                kept = vectors[:, values > threshold]
                delta = deltas.dense(expert)
                assert kept.shape[1] > 0
                # float32 eigenvectors
                assert float((delta @ kept).norm(dim=0).max()) <= 1e-4 * float(delta.norm())
                changed += float(delta.norm())
            assert changed > 1e-3


class TestSeveralLayers:
    def test_each_layer_takes_its_share_of_what_is_left(self, model, plain_hidden, tokenizer, facts, texts) -> None:
        """Replayed on a copy: after each commit, the distance to the goal is measured by plain forwards."""
        replay = copy.deepcopy(model)
        solver = Recording()
        # the last token, because behind the last layer no other token reads an edit of the subject
        editor = Editor([2, 0, 1], solver, QUICK, OutputPenalty(10.0), ridge=0.1, token="last", target_tokens="first")
        encoded = encode(tokenizer, [f.prompt for f in facts], [""] * 4, [f.subject for f in facts], "last")
        result = editor.edit(model, tokenizer, facts, texts)
        assert list(result.deltas) == [0, 1, 2]
        caught: list[Tensor] = []
        replay.model.layers[2].register_forward_hook(lambda module, args, output: caught.append(output[0]))

        def hidden() -> Tensor:
            caught.clear()
            for encoding in encoded:
                plain_hidden(replay, 0, encoding.ids)
            return torch.stack([seen[e.edit_token] for seen, e in zip(caught, encoded, strict=True)])

        goal = hidden() + result.targets.deltas
        assert float(result.targets.deltas.norm()) > 1.0
        for number, (index, deltas) in enumerate(result.deltas.items()):
            expected = (goal - hidden()) / (3 - number)
            scale = float(goal.norm())  # differences of hidden states in float32
            assert float((solver.problems[number].residuals - expected).norm()) <= 1e-5 * scale
            with torch.no_grad():
                for expert in deltas.experts:
                    expert_layers(replay)[index].down_proj[expert] += deltas.dense(expert)
        for name, weight in edited_weights(replay).items():
            torch.testing.assert_close(weight, dict(model.named_parameters())[name].detach(), msg=name)

    @pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
    def test_only_the_edited_down_projections_change(self, make_model, tokenizer, facts, texts, model_type) -> None:
        model = make_model(model_type)
        before = edited_weights(model)
        result = Editor([0, 2], targets=QUICK, token="last").edit(model, tokenizer, facts, texts)
        assert result.kept
        layers = expert_layers(model)
        for name, parameter in model.named_parameters():
            owner = next((i for i in result.deltas if name == f"{layers[i].name}.down_proj"), None)
            if owner is None:
                assert torch.equal(parameter, before[name]), name
                continue
            changed, old = result.deltas[owner], before[name]
            norm, whole = 0.0, 0.0
            for expert in range(len(parameter)):
                delta = changed.dense(expert)
                assert torch.equal(parameter[expert], old[expert] + (delta.T if layers[owner].is_transposed else delta))
                if expert in changed.experts:
                    norm += float(delta.double().square().sum())
                    whole += float(old[expert].double().square().sum())
            # the low-rank norm is of float32 factors
            assert result.relative_change[owner] == pytest.approx((norm / whole) ** 0.5, rel=1e-5)
            assert result.relative_change[owner] > 1e-5
        assert set(result.relative_change) == {0, 2}


class TestContexts:
    def test_every_fact_is_solved_for_in_every_context(self, model, plain_hidden, tokenizer, facts) -> None:
        contexts = ("", "Here is a fact.", "As they say:")
        solver = Recording()
        editor = Editor([1], solver, QUICK, "none", contexts=contexts)
        result = editor.edit(copy.deepcopy(model), tokenizer, facts)
        assert result.targets.deltas.shape == (4, 32)
        problem = solver.problems[0]
        assert problem.num_edits == 12
        assert problem.num_pairs == 12 * 2
        # every context of a fact asks for the fact's own target vector
        expected = result.targets.deltas.repeat_interleave(3, 0)
        torch.testing.assert_close(problem.residuals, expected, rtol=1e-4, atol=1e-4)
        texts = [join(context, fact.prompt) if context else fact.prompt for fact in facts for context in contexts]
        encoded = encode(tokenizer, texts, [""] * 12, [fact.subject for fact in facts for _ in contexts])
        experts = expert_layers(model)[1].experts
        inputs: dict[str, Any] = {}
        experts.register_forward_hook(lambda module, args, output: inputs.update(args=args))
        for row, encoding in enumerate(encoded):
            plain_hidden(model, 0, encoding.ids)
            chosen = inputs["args"][1][encoding.edit_token]
            assert set(problem.expert_index[problem.edit_index == row].tolist()) == set(chosen.tolist())

    def test_contexts_change_the_targets(self, model, tokenizer, facts) -> None:
        one, two = (
            Editor([1], targets=QUICK, preserve="none", contexts=contexts).edit(copy.deepcopy(model), tokenizer, facts)
            for contexts in (("",), ("", "Here is a fact."))
        )
        assert not torch.allclose(one.targets.deltas, two.targets.deltas, atol=1e-2)

    def test_neutral_prompt_can_be_left_out(self, model, tokenizer, facts) -> None:
        strong = TargetOptimizer(steps=3, stop=0.0, kl=100.0)
        results = [
            Editor([1], targets=targets, preserve="none", neutral=neutral).edit(copy.deepcopy(model), tokenizer, facts)
            for targets, neutral in (
                (strong, "{} is a"),
                (strong, ""),
                (TargetOptimizer(steps=3, stop=0.0, kl=0.0), "{} is a"),
            )
        ]
        kept, without, zero = (result.targets.deltas for result in results)
        assert not torch.allclose(kept, without, atol=1e-2)
        torch.testing.assert_close(without, zero, rtol=1e-3, atol=1e-3)  # other padding, a few steps of Adam


class TestPreservation:
    def test_known_moments_take_the_place_of_texts(self, model, tokenizer, facts, texts) -> None:
        other = copy.deepcopy(model)
        layers = list(expert_layers(model).values())[:2]
        moments = second_moments(model, tokenizer, layers, texts, gated=True)
        editor = Editor([0, 1], targets=QUICK)
        given = editor.edit(model, tokenizer, facts, moments=moments)
        computed = editor.edit(other, tokenizer, facts, texts)
        assert given.seconds["statistics"] == 0.0
        assert computed.seconds["statistics"] > 0.0
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize("preserve", [NullSpace(), CovariancePenalty(), OutputPenalty()])
    def test_nothing_to_preserve_is_refused(self, model, tokenizer, facts, unchanged, preserve) -> None:
        unchanged(model)
        with pytest.raises(ValueError, match=f"{type(preserve).__name__} needs preservation text"):
            Editor([1], preserve=preserve).edit(model, tokenizer, facts)

    @pytest.mark.parametrize("preserve", ["nullspace", "covariance", "output"])
    def test_energy_kept_is_reported(self, model, tokenizer, facts, texts, caplog, preserve) -> None:
        with caplog.at_level(logging.INFO):
            Editor([1], targets=QUICK, preserve=preserve).edit(model, tokenizer, facts, texts)
        line = next(record for record in caplog.records if "preserved energy" in record.getMessage())
        index, experts, mean, least = line.args
        assert (index, experts in range(1, 7)) == (1, True)
        assert 0.5 < least <= mean <= 1.0

    @pytest.mark.parametrize("solver", [Woodbury(), Tucker(energy=0.9, carry=False)], ids=["Woodbury", "Tucker"])
    @pytest.mark.parametrize("preserve", PRESERVE)
    def test_a_result_says_how_much_energy_each_changed_expert_keeps(
        self, model, tokenizer, facts, texts, preserve, solver
    ) -> None:
        layers = list(expert_layers(model).values())[:2]
        editor = Editor([0, 1], solver, QUICK, preservation(preserve), ridge=0.1)
        moments = second_moments(model, tokenizer, layers, texts, gated=editor.gated)
        result = editor.edit(model, tokenizer, facts, texts, moments=moments)
        assert list(result.energy_kept) == ([] if preserve == "none" else [0, 1])
        for index, kept in result.energy_kept.items():
            assert list(kept) == result.deltas[index].experts
            moment = moments[index].mean(torch.tensor(list(kept))).double()
            identity = torch.eye(20, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(moment)
            if preserve == "nullspace":
                shaped = vectors @ ((values <= 2.0)[:, :, None] * vectors.mT)
            else:  # S Sᵀ of either root has this for its trace with C
                shaped = torch.linalg.inv(identity + editor.preserve.penalty(layers[index].shape, 0.1) * moment)
            reached = (shaped * moment).sum((1, 2)) / moment.diagonal(dim1=1, dim2=2).sum(1)
            # float32 moments, of which float32 or float64 roots are taken
            torch.testing.assert_close(
                torch.tensor(list(kept.values()), dtype=torch.float64), 1 - reached, rtol=1e-4, atol=1e-5
            )

    def test_the_default_strength_has_the_unit_it_says(self, make_model, tokenizer, texts) -> None:
        """In the mean over the text ``x = Σ_j φ_jᵀ (λ I + μ C_j)⁻¹ φ_j`` of gated keys is ``1 / strength``: an edit
        alone, whose keys are like those of a token of the text, moves by ``x / (1 + x)`` of what is wanted.

        The mean is ``Σ_j tr(C_j (λ I + μ C_j)⁻¹)``, that is, ``1 / μ`` for each of the ``E · d_hidden`` eigenvalues but
        for a share of ``λ / (λ + μ c)``, with ``μ = strength · E · d_hidden``.
        """
        model = make_model("qwen3_moe").eval()
        layer = expert_layers(model)[1]
        inputs: list[tuple[Tensor, ...]] = []
        handle = layer.experts.register_forward_hook(lambda module, args, output: inputs.append(args))
        with torch.no_grad():
            for text in texts:
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
            handle.remove()
            seen = [routed_keys(layer, *arguments) for arguments in inputs]
        moment = torch.zeros(6, 20, 20, dtype=torch.float64)
        tokens = sum(int(keys.token.max()) + 1 for keys in seen)
        expert = torch.cat([keys.expert for keys in seen])
        features = torch.cat([keys.gate.double()[:, None] * keys.key.double() for keys in seen])
        moment.index_add_(0, expert, features[:, :, None] * features[:, None, :] / tokens)
        for strength in (0.3, 2.0):
            editor = Editor([1], preserve=OutputPenalty(strength), ridge=1e-9)
            sums = SecondMoments(moment * tokens, torch.bincount(expert), torch.tensor([tokens]), gated=True)
            shaping = Shaping.of(
                sums, torch.arange(6), editor.preserve, editor.preserve.penalty(layer.shape, editor.ridge)
            )
            mean = float(shaping.features(features, expert).square().sum()) / tokens / editor.ridge
            lost = editor.ridge / (strength * 6 * 20 * float(torch.linalg.eigvalsh(moment).min()))
            assert lost < 0.05
            assert (1 - lost) / strength <= mean <= (1 + 1e-6) / strength  # float64

    def test_preserved_text_is_disturbed_less(self, model, plain_hidden, tokenizer, facts, texts) -> None:
        """What preservation is for: the layer's output on the preserved text moves less than without."""
        ids = [tokenizer(text)["input_ids"] for text in texts]
        before = [plain_hidden(model, 1, row) for row in ids]
        moved = {}
        for preserve in PRESERVE:
            edited = copy.deepcopy(model)
            strength = 1.0 if preserve == "output" else 1000.0
            Editor([1], targets=QUICK, preserve=preservation(preserve, 0.02, strength), ridge=1e-3).edit(
                edited, tokenizer, facts, texts
            )
            after = [plain_hidden(edited, 1, row) for row in ids]
            moved[preserve] = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
        for preserve in PRESERVE[:3]:
            assert moved[preserve] < 0.5 * moved["none"], preserve


def test_token_budget_does_not_matter(model, tokenizer, facts, texts) -> None:
    other = copy.deepcopy(model)
    small = TargetOptimizer(steps=3, stop=0.0, token_budget=30)
    one = Editor([0, 1], targets=QUICK, preserve=OutputPenalty(10.0), ridge=0.1).edit(model, tokenizer, facts, texts)
    two = Editor([0, 1], targets=small, preserve=OutputPenalty(10.0), ridge=0.1, token_budget=30).edit(
        other, tokenizer, facts, texts
    )
    for layer, deltas in one.deltas.items():
        for expert in deltas.experts:
            delta = deltas.dense(expert)
            # forwards of other shapes, a few steps of Adam, and a solve
            torch.testing.assert_close(
                two.deltas[layer].dense(expert), delta, rtol=0, atol=2e-3 * float(delta.abs().max())
            )


def test_any_solver_will_do(model, tokenizer, facts) -> None:
    other = copy.deepcopy(model)
    exact = Editor([1], Woodbury(), QUICK, "none", ridge=30.0).edit(model, tokenizer, facts)
    descended = Editor([1], BlockCoordinateDescent(passes=100), QUICK, "none", ridge=30.0).edit(other, tokenizer, facts)
    for expert in exact.deltas[1].experts:
        delta = exact.deltas[1].dense(expert)
        # block coordinate descent comes close at a linear rate
        torch.testing.assert_close(
            descended.deltas[1].dense(expert), delta, rtol=0, atol=1e-2 * float(delta.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model, tokenizer, facts, texts, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.config._experts_implementation = "eager"  # grouped_mm knows no float64, and no bfloat16 of these sizes
    before = expert_layers(model)[1].down_proj.detach().clone()
    result = Editor([1], targets=QUICK, preserve=OutputPenalty(10.0), ridge=0.1).edit(model, tokenizer, facts, texts)
    weight = expert_layers(model)[1].down_proj
    assert weight.dtype == dtype
    for expert in result.deltas[1].experts:
        assert torch.equal(weight[expert], (before[expert].to(torch.promote_types(dtype, torch.float32))
                                            + result.deltas[1].dense(expert)).to(dtype))  # fmt: skip


def test_seconds_and_progress(model, tokenizer, facts, texts) -> None:
    seen: list[tuple[str, int, int]] = []
    result = Editor([0, 1], targets=QUICK).edit(model, tokenizer, facts, texts, progress=lambda *at: seen.append(at))
    assert set(result.seconds) == {"statistics", "targets", "features", "solve", "commit", "edit"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert sum(result.seconds.values()) <= 2 * result.seconds["edit"]  # the phases are parts of the whole
    assert ("statistics", len(texts), len(texts)) in seen
    assert ("targets", len(facts), len(facts)) in seen
    assert seen[-2:] == [("layers", 1, 2), ("layers", 2, 2)]
    assert result.facts == facts


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layers": []}, "layers must be distinct layer indices, at least one, got []"),
            ({"layers": [1, 1]}, "layers must be distinct layer indices, at least one, got [1, 1]"),
            ({"layers": [-1]}, "layers must be distinct layer indices, at least one, got [-1]"),
            ({"layers": 1}, "layers must be distinct layer indices, at least one, got 1"),
            ({"layers": [0, [1]]}, "layers must be distinct layer indices, at least one, got [0, [1]]"),
            ({"preserve": "hard"}, "a Preservation or one of output, covariance, nullspace, none, got 'hard'"),
            ({"ridge": -1.0}, "ridge must be at least 0 and finite, got -1.0"),
            ({"ridge": float("nan")}, "ridge must be at least 0 and finite, got nan"),
            ({"preserve": "output", "ridge": 0.0}, "OutputPenalty needs a ridge above 0, got 0.0"),
            ({"ridge": float("inf")}, "ridge must be at least 0 and finite, got inf"),
            ({"solver": "Woodbury"}, "solver must be a Solver, got 'Woodbury'"),
            ({"token": "first"}, "token must be 'subject_last', 'last' or 'auto', got 'first'"),
            ({"contexts": ()}, "contexts needs at least one text"),
            ({"neutral": "It is a"}, "neutral must contain {} for the subject, got 'It is a'"),
            ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ],
    )
    def test_wrong_settings(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            Editor(**{"layers": [1], **arguments})

    def test_frozen_experts(self, make_model, tokenizer, facts) -> None:
        one, other = make_model("qwen3_moe"), make_model("qwen3_moe")
        other.requires_grad_(False)
        for model in (one, other):
            Editor([0, 1], preserve="none").edit(model, tokenizer, facts)
        for first, second in zip(expert_layers(one).values(), expert_layers(other).values(), strict=True):
            # frozen, the changes are added in float64, which is one rounding of a float32 sum apart
            torch.testing.assert_close(first.down_proj, second.down_proj, rtol=1e-5, atol=1e-6)
            assert not second.down_proj.requires_grad

    def test_layers_of_another_model_or_other_layers(self, make_model, model, tokenizer, facts, unchanged) -> None:
        other = make_model("qwen3_moe")
        unchanged(model)
        editor = Editor([0, 1], preserve="none")
        for layers in (editor.check(other), editor.check(model)[:1], check_editable(model, [0, 1]), []):
            with pytest.raises(ValueError, match=r"layers must be the result of Editor.check for this model"):
                editor.edit(model, tokenizer, facts, layers=layers)

    def test_no_facts(self, model, tokenizer) -> None:
        with pytest.raises(FactError, match="holds no facts"):
            Editor([1], preserve="none").edit(model, tokenizer, [])

    def test_facts_that_contradict_each_other(self, model, tokenizer, unchanged) -> None:
        unchanged(model)
        pair = [Fact("Rome", "Rome lies in", "Spain"), Fact("Rome", "Rome lies in", "Peru")]
        with pytest.raises(FactsError, match="one target per prompt"):
            Editor([1], preserve="none").edit(model, tokenizer, pair)


class TestNoGradient:
    """Without a gradient a target vector stays 0, and an edit would "succeed" without any change."""

    def test_a_module_that_passes_no_gradient(self, model, tokenizer, facts, texts, unchanged) -> None:
        model.model.norm.register_forward_hook(lambda module, args, output: output.detach())
        unchanged(model)
        with pytest.raises(ValueError, match=r"no gradient reaches .* 4 of 4 edits \('.*'\): after layer 1"):
            Editor([0, 1], targets=QUICK).edit(model, tokenizer, facts, texts)

    def test_only_some_edits(self, model, tokenizer, facts, texts, unchanged) -> None:
        """After the last layer only a subject that ends its prompt is read."""
        ends = dataclasses.replace(facts[0], prompt="The city of Rome")
        unchanged(model)
        with pytest.raises(ValueError, match="of 3 of 4 edits"):
            Editor([2], targets=QUICK).edit(model, tokenizer, [ends, *facts[1:]], texts)
