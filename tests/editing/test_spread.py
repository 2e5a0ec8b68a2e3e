"""Edits in Tucker form: the factors of the layers, their cache, and the spread that carries one core to all layers."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import EditToken, Encoding, encode, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, second_moments
from lit_moeedit.editing import spread as spread_module
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.models.experts import ExpertLayer, check_editable, expert_layers
from lit_moeedit.preservation import CovariancePenalty, OutputPenalty
from lit_moeedit.solvers import EditProblem, Tucker, TuckerFactors, Woodbury
from tests.editing.recording import QUICK, edited_weights, preservation

WHOLE = {"energy": 1.0, "carry": False}


def experts(layer: ExpertLayer) -> Tensor:
    """``[E, d_model, d_hidden]``."""
    weight = layer.down_proj.detach().clone()
    return weight.mT if layer.is_transposed else weight


def prompts(tokenizer: Any, facts: list[Fact], token: EditToken = "subject_last") -> list[Encoding]:
    """What the editor runs to see the keys: prompts as they are tokenized before their targets."""
    subjects = [fact.subject for fact in facts]
    encoded = encode(tokenizer, [f.prompt for f in facts], [f.target_new for f in facts], subjects, token)
    return [Encoding(e.ids[: e.target_start], e.target_start, e.edit_token) for e in encoded]


class TestEachLayer:
    @pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
    @pytest.mark.parametrize("preserve", ["output", "covariance", "nullspace", "none"])
    def test_with_whole_modes_the_edit_is_the_exact_one(
        self, make_model, tokenizer, facts, texts, model_type, preserve
    ) -> None:
        """On transposed experts too, and through the keys' shaping of all experts."""
        changed = []
        for solver in (Woodbury(), Tucker(whiten=False, **WHOLE)):
            model = make_model(model_type)
            before = edited_weights(model)
            edit = Editor([0, 1], solver, QUICK, preservation(preserve), ridge=0.1)
            edit.edit(model, tokenizer, facts, texts)
            changed.append({name: weight - before[name] for name, weight in edited_weights(model).items()})
        for name, exact in changed[0].items():
            # differences of float32 weights; the second layer's edit depends on the first's
            assert float((changed[1][name] - exact).norm()) <= 1e-3 * float(exact.norm()), name

    def test_whitening_of_a_covariance_penalty_is_its_own_metric(self, model, tokenizer, facts, texts) -> None:
        """Where all experts have the same second moment, whole whitened modes change nothing."""
        moments = second_moments(model, tokenizer, check_editable(model, [1]), texts)
        moments[1].total[:], moments[1].count[:] = moments[1].total.sum(0), moments[1].count.sum()
        changed = []
        for solver in (Woodbury(), Tucker(**WHOLE)):
            result = Editor([1], solver, QUICK, CovariancePenalty(10.0), ridge=0.1).edit(
                copy.deepcopy(model), tokenizer, facts, moments=moments
            )
            changed.append(torch.stack([result.deltas[1].dense(j) for j in range(6)]))
        assert float((changed[1] - changed[0]).norm()) <= 1e-3 * float(changed[0].norm())

    def test_whitening_alone_is_a_covariance_penalty(self, model, tokenizer, facts, texts) -> None:
        """Without any preservation, whole modes whitened by C penalise ``tr(ΔW C ΔWᵀ)``, C pooled over all experts."""
        layer = check_editable(model, [1])[0]
        moments = second_moments(model, tokenizer, [layer], texts)
        found = Editor([1], Tucker(**WHOLE), QUICK, "none", ridge=0.1).edit(
            copy.deepcopy(model), tokenizer, facts, moments=moments
        )
        pooled = (moments[1].total.sum(0) / moments[1].count.sum()).double()
        values, vectors = torch.linalg.eigh(pooled)
        shaping = ((vectors * values.clamp_min(1e-3 * values.mean()).rsqrt()) @ vectors.T).float()
        encoded = encode(
            tokenizer, [f.prompt for f in facts], [f.target_new for f in facts], [f.subject for f in facts]
        )
        prompts = [type(e)(e.ids[: e.target_start], e.target_start, e.edit_token) for e in encoded]
        keys = edit_tokens(model, prompts, layer, layer, pad_id(tokenizer)).keys
        features = keys.gate[:, None] * keys.key @ shaping
        exact = Woodbury().solve(EditProblem(keys.token, keys.expert, features, found.targets.deltas, 6, 0.1))
        for expert in range(6):
            wanted = exact.dense(expert) @ shaping
            torch.testing.assert_close(found.deltas[1].dense(expert), wanted, rtol=1e-2, atol=1e-4)

    @pytest.mark.parametrize("carry", [True, False])
    def test_whitening_needs_text(self, model, tokenizer, facts, carry: bool, unchanged) -> None:
        unchanged(model)
        with pytest.raises(ValueError, match="Tucker needs preservation text"):
            Editor([1], Tucker(carry=carry), QUICK, "none").edit(model, tokenizer, facts)
        assert not Editor([1], Tucker(whiten=False), preserve="none").needs_moments


class TestCarried:
    def test_one_core_from_one_collection(self, model, tokenizer, facts, monkeypatch) -> None:
        """Replayed: the core is solved at the last layer, unfolded by each layer's own factors, shares 1/3, 1/2, 1."""
        original = copy.deepcopy(model)
        measured: list[int] = []

        def counted(model: Any, prompts: Any, target: Any, layer: ExpertLayer, *rest: Any) -> Any:
            measured.append(layer.index)
            return edit_tokens(model, prompts, target, layer, *rest)

        monkeypatch.setattr(spread_module, "edit_tokens", counted)
        solver = Tucker((3, 8, 6), whiten=False)
        result = Editor([2, 0, 1], solver, QUICK, "none", ridge=0.1, token="last", target_tokens="first").edit(
            model, tokenizer, facts
        )
        assert measured == [2, 2]  # the second measures what is left
        assert list(result.deltas) == [0, 1, 2]
        layers = expert_layers(original)
        seen = edit_tokens(original, prompts(tokenizer, facts, "last"), layers[2], layers[2], pad_id(tokenizer))
        keys = seen.keys
        problem = EditProblem(keys.token, keys.expert, keys.gate[:, None] * keys.key, result.targets.deltas, 6, 0.1)
        factors = [TuckerFactors.hosvd(experts(layers[i]), ranks=(3, 8, 6)) for i in range(3)]
        core = solver.with_factors(factors[2]).carry(problem)
        for index, share in enumerate((1 / 3, 1 / 2, 1.0)):
            expected = core.deltas(factors[index], share)
            assert result.deltas[index].experts == list(range(6))
            for expert in range(6):
                torch.testing.assert_close(
                    result.deltas[index].dense(expert), expected.dense(expert), rtol=1e-3, atol=1e-5
                )
                weight = experts(expert_layers(model)[index])[expert]
                torch.testing.assert_close(
                    weight, experts(layers[index])[expert] + expected.dense(expert), rtol=1e-3, atol=1e-4
                )

    def test_lower_layers_take_the_ranks_of_the_last(self, model, tokenizer, facts, texts, monkeypatch) -> None:
        found: list[TuckerFactors] = []
        hosvd = TuckerFactors.hosvd

        def kept(*arguments: Any) -> TuckerFactors:
            found.append(hosvd(*arguments))
            return found[-1]

        monkeypatch.setattr(TuckerFactors, "hosvd", kept)
        Editor([0, 1, 2], Tucker(energy=0.6), QUICK, token="last").edit(model, tokenizer, facts, texts)
        assert len(found) == 3
        assert len({factors.ranks for factors in found}) == 1
        assert min(found[0].energy) >= 0.6 > min(f.energy[1] - 0.2 for f in found)

    @pytest.mark.parametrize("preserve", ["output", "nullspace", "covariance"])
    def test_what_is_preserved_in_the_experts_that_change(self, model, tokenizer, facts, texts, preserve) -> None:
        """Lower layers are shaped by their own second moments, in every expert."""
        layers = check_editable(model, [0, 1])
        moments = second_moments(model, tokenizer, layers, texts, gated=preserve == "output")
        threshold = float(torch.linalg.eigvalsh(moments[0].mean(torch.arange(6))).quantile(0.7))
        strength = 1.0 if preserve == "output" else 1e6
        edit = Editor([0, 1], Tucker(), QUICK, preservation(preserve, threshold, strength), ridge=0.01)
        result = edit.edit(model, tokenizer, facts, moments=moments)
        for index, deltas in result.deltas.items():
            for expert in deltas.experts:
                values, vectors = torch.linalg.eigh(moments[index].mean(torch.tensor([expert]))[0])
                kept, free = vectors[:, values > threshold], vectors[:, values <= threshold]
                delta = deltas.dense(expert)
                assert float(delta.norm()) > 0
                if preserve == "nullspace":
                    assert float((delta @ kept).norm()) <= 1e-4 * float(delta.norm())
                else:
                    assert float((delta @ kept).norm()) < float((delta @ free).norm())

    @pytest.mark.parametrize("preserve", ["output", pytest.param("nullspace", marks=pytest.mark.slow)])
    def test_with_whole_modes_the_target_layer_gets_the_exact_solution(
        self, model, tokenizer, facts, texts, preserve
    ) -> None:
        """That of ``Woodbury`` for the target layer alone; the layers below get it in their own bases."""
        solutions = []
        for layers, solver in (([0, 1, 2], Tucker(energy=1.0)), ([2], Woodbury())):
            own = Editor(layers, solver, QUICK, preservation(preserve), ridge=0.1, token="last")
            # a null space is no metric of the keys, so whitening is another objective
            solver.whiten = solver.needs_moments = preserve == "output" and len(layers) > 1
            result = own.edit(copy.deepcopy(model), tokenizer, facts, texts)
            solutions.append(torch.stack([result.deltas[2].dense(j) for j in range(6)]))
        changed = solutions[1].flatten(1).any(1)
        # float32 factors and cores
        assert float((solutions[0] - solutions[1])[changed].norm()) <= 1e-3 * float(solutions[1].norm()) > 0

    @pytest.mark.parametrize(
        "what",
        ["experts", pytest.param("hidden units of all experts", marks=pytest.mark.slow), "hidden units of each expert"],
    )
    def test_a_carried_edit_depends_on_bases_and_not_on_numbers(self, model, tokenizer, facts, what: str) -> None:
        """A lower layer whose experts are numbered otherwise computes the same, and is changed the same.

        Solutions that are carried by number, expert to expert and hidden unit to hidden unit, are not: without bases
        there is no carried solution. The bases of hidden units are common to all experts, so their numbers have to
        agree between the experts of a layer.
        """
        other = copy.deepcopy(model)
        order, mlp = torch.tensor([3, 0, 5, 1, 4, 2]), other.model.layers[0].mlp
        units = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            if what == "experts":
                for weight in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
                    weight.copy_(weight[order].clone())
            else:
                for expert, (up, down) in enumerate(zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)):
                    own = units.roll(expert) if "each" in what else units
                    up.copy_(up[torch.cat([own, 20 + own])].clone())
                    down.copy_(down[:, own].clone())
        ids = torch.tensor([tokenizer(fact.prompt)["input_ids"][:5] for fact in facts])
        before = [m.eval()(input_ids=ids).logits.detach() for m in (model, other)]
        torch.testing.assert_close(before[0], before[1], rtol=1e-4, atol=1e-4)  # float32 sums in another order
        by_number = [copy.deepcopy(m) for m in (model, other)]
        carried = Tucker(energy=1.0, whiten=False)
        for m in (model, other):
            Editor([0, 2], carried, QUICK, "none", ridge=0.1, token="last").edit(m, tokenizer, facts)
        exact = Editor([2], Woodbury(), QUICK, "none", ridge=0.1, token="last")
        deltas = exact.edit(copy.deepcopy(by_number[0]), tokenizer, facts).deltas[2]
        with torch.no_grad():
            for m, expert in itertools.product(by_number, deltas.experts):
                m.model.layers[0].mlp.experts.down_proj[expert] += deltas.dense(expert) / 2
                m.model.layers[2].mlp.experts.down_proj[expert] += deltas.dense(expert)
        apart = []
        for pair in ((model, other), by_number):
            after = [m.eval()(input_ids=ids).logits.detach() for m in pair]
            apart.append(float((after[0] - after[1]).norm() / (after[0] - before[0]).norm()))
        assert apart[1] > 0.1
        # float32 eigenvectors, of which some are of near eigenvalues
        assert apart[0] > 0.1 if "each" in what else apart[0] < 1e-2

    def test_undone_bit_by_bit(self, model, tokenizer, facts, texts, unchanged) -> None:
        unchanged(model)
        result = Editor([0, 1], Tucker(), QUICK).edit(model, tokenizer, facts, texts, guard=lambda: False)
        assert not result.kept and all(change > 0 for change in result.relative_change.values())


class TestCache:
    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        facts: Any,
        texts: Any,
        solver: Tucker,
        strength: float | None = 10.0,
    ) -> Any:
        """An edit that is undone, so that the weights stay those that the factors were made of."""
        edit = Editor([0, 1], solver, QUICK, preserve=OutputPenalty(strength) if strength is not None else "none")
        return edit.edit(model, tokenizer, facts, texts, guard=lambda: False).deltas

    def test_is_used_only_for_the_same_weights_and_settings(
        self, model, tokenizer, facts, texts, tmp_path: Path, monkeypatch
    ) -> None:
        computed = 0
        hosvd = TuckerFactors.hosvd

        def counted(*arguments: Any) -> TuckerFactors:
            nonlocal computed
            computed += 1
            return hosvd(*arguments)

        monkeypatch.setattr(TuckerFactors, "hosvd", counted)
        folder = tmp_path / "new" / "factors"

        def changed(solver: Tucker, strength: float = 10.0) -> tuple[int, Any]:
            before = computed
            deltas = self.edit(model, tokenizer, facts, texts, solver, strength)
            return computed - before, deltas

        first, deltas = changed(Tucker(cache=folder))
        assert first == 2
        assert sorted(path.name for path in folder.iterdir()) == ["layer_0.safetensors", "layer_1.safetensors"]
        again, same = changed(Tucker(cache=folder))
        assert again == 0
        for index in deltas:
            assert all(torch.equal(deltas[index].dense(j), same[index].dense(j)) for j in range(6))
        assert changed(Tucker(energy=0.9, cache=folder))[0] == 2
        assert changed(Tucker(energy=0.9, whiten=False, cache=folder))[0] == 2
        assert changed(Tucker(energy=0.9, whiten=False, cache=folder))[0] == 0
        assert changed(Tucker(cache=folder))[0] == 2
        assert changed(Tucker(cache=folder), strength=20.0)[0] == 2
        with torch.no_grad():
            expert_layers(model)[0].down_proj[4] *= 1.001
        # the text's keys in layer 1 depend on the weights of layer 0, and so does its metric
        assert changed(Tucker(cache=folder), strength=20.0)[0] == 2
        (folder / "layer_1.safetensors").write_text("cut off")
        assert changed(Tucker(cache=folder), strength=20.0)[0] == 1
        path = folder / "layer_0.safetensors"
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        for name, wrong in (("input", torch.ones(3, 2)), ("expert", torch.ones(6)), ("energy", torch.ones(2))):
            save_file({**load_file(path), name: wrong}, path, metadata)
            assert changed(Tucker(cache=folder), strength=20.0)[0] == 1, name

    def test_factors_that_cannot_be_kept_cost_a_warning(
        self, model, tokenizer, facts, texts, tmp_path: Path, caplog
    ) -> None:
        (tmp_path / "file").write_text("")
        plain = self.edit(model, tokenizer, facts, texts, Tucker())
        found = self.edit(model, tokenizer, facts, texts, Tucker(cache=tmp_path / "file"))
        assert all(torch.equal(found[i].dense(j), plain[i].dense(j)) for i in plain for j in range(6))
        assert "the factors of layer 1 are not kept" in caplog.text

    def test_other_weights_of_the_same_keys_are_other_weights(self, model, tokenizer, facts, tmp_path: Path) -> None:
        """An edit by another way leaves no trace in the settings."""
        solver = Tucker(whiten=False, carry=False, cache=tmp_path)
        self.edit(model, tokenizer, facts, None, solver, None)
        Editor([1], Woodbury(), QUICK, "none").edit(model, tokenizer, facts)
        found = self.edit(model, tokenizer, facts, None, solver, None)
        fresh = self.edit(model, tokenizer, facts, None, Tucker(whiten=False, carry=False), None)
        for index in found:
            assert all(torch.equal(found[index].dense(j), fresh[index].dense(j)) for j in range(6))
