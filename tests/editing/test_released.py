"""Settings of the code released with MoEEdit: against one fact after another in plain float64 loops."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks import reference
from lit_moeedit.data.encoding import Encoding, encode
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation import NullSpace
from lit_moeedit.solvers import BlockCoordinateDescent, Tucker
from tests.editing.recording import QUICK, Recording, edited_weights
from tests.processes import run_ranks

SETTINGS: dict[str, Any] = {"steps": 4, "learning_rate": 0.4, "stop": 0.0, "weight_decay": 0.3}
THRESHOLD, RIDGE = 0.5, 0.05
LONG = ("northern Peru and Spain", "Latin", "the Baltic Sea", "Russia in Italy, of bread")
CHOICES = [
    ("every", "target_layer", "root_of_layers_left"),
    ("every", "each_layer", "layers_left"),
    ("first", "target_layer", "layers_left"),
    ("first", "each_layer", "root_of_layers_left"),
]
"""Each setting of the released code by itself, and all of them together."""


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model with a layer above the edited ones, where later tokens read the edit."""
    return make_model("qwen3_moe", num_hidden_layers=4)


@pytest.fixture(scope="module")
def long(facts: list[Fact]) -> list[Fact]:
    """The facts with targets of different lengths."""
    return [replace(fact, target_new=target) for fact, target in zip(facts, LONG, strict=True)]


def editor(loss_tokens: Any, residual_of: Any, residual_share: Any, layers: Sequence[int] = (0, 1, 2)) -> Editor:
    return Editor(
        layers,
        targets=TargetOptimizer(**SETTINGS, loss_tokens=loss_tokens),
        preserve=NullSpace(THRESHOLD, unused=False),
        ridge=RIDGE,
        neutral="",
        target_tokens="auto",
        residual_of=residual_of,
        residual_share=residual_share,
    )


class Plain:
    """A copy of a model in float64 that is edited by plain loops."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.model.set_experts_implementation("eager")  # grouped products know no float64

    def run(self, ids: list[int], layer: int, column: int = 0, delta: Tensor | None = None) -> dict[str, Any]:
        """Log-probabilities, the layer's output, its keys and gates, of one text."""
        caught: dict[str, Any] = {}

        def output(module: nn.Module, args: Any, found: Tensor) -> Tensor:
            found = found.clone()
            if delta is not None:
                found[0, column] += delta
            caught["hidden"] = found[0]
            return found

        def experts(module: Any, args: Any, found: Tensor) -> None:
            hidden, index, gates = args
            keys, gated = (hidden.new_zeros(len(hidden), *module.down_proj.shape[::2]) for _ in range(2))
            for row in range(len(hidden)):
                for expert, gate in zip(index[row].tolist(), gates[row], strict=True):
                    gate_proj, up = (module.gate_up_proj[expert] @ hidden[row]).chunk(2)
                    keys[row, expert] = F.silu(gate_proj) * up
                    gated[row, expert] = gate * keys[row, expert]
            caught["keys"], caught["gated"] = keys, gated

        block = self.model.model.layers[layer]
        handles = [block.register_forward_hook(output)]
        if delta is None:
            handles.append(block.mlp.experts.register_forward_hook(experts))
        caught["log"] = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return caught

    def projectors(self, tokenizer: Any, texts: Sequence[str], layer: int) -> Tensor:
        keys = torch.cat([self.run(tokenizer(text)["input_ids"], layer)["keys"] for text in texts])
        found = []
        for own in keys.unbind(1):
            own = own[own.any(-1)]
            values, vectors = torch.linalg.eigh(own.T @ own / max(len(own), 1))
            vectors = vectors[:, values <= THRESHOLD] if len(own) else vectors[:, :0]
            found.append(vectors @ vectors.T)
        return torch.stack(found)

    def vector(self, text: Encoding, layer: int, settings: TargetOptimizer) -> Tensor:
        column, start = text.edit_token, text.target_start
        assert column is not None
        counted = text.ids[start : start + 1] if settings.loss_tokens == "first" else text.ids[start:]
        norm = self.run(text.ids, layer)["hidden"][column].norm()
        delta = torch.zeros(32, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
        for _ in range(settings.steps):
            log = self.run(text.ids[:start] + counted, layer, column, delta)["log"]
            nll = sum(-log[start - 1 + i, label] for i, label in enumerate(counted)) / len(counted)
            loss = nll + settings.weight_decay * (delta.square().sum() + 1e-12).sqrt() / norm**2
            (delta.grad,) = torch.autograd.grad(loss, delta)
            optimizer.step()
            with torch.no_grad():
                delta *= min(1.0, settings.clamp * float(norm) / float(delta.norm()))
        return delta.detach()

    def edit(self, own: Editor, texts: Sequence[Encoding], vectors: Sequence[Tensor], projectors: Sequence[Tensor]):
        """Edit the layers upwards: each is one dense ridge problem, or some passes over its experts."""
        top, layers = own.layers[-1], own.layers

        def hidden(layer: int) -> Tensor:
            return torch.stack([self.run(e.ids[: e.target_start], layer)["hidden"][e.edit_token] for e in texts])

        goal = hidden(top) + torch.stack([*vectors])
        for i, layer in enumerate(layers):
            left = len(layers) - i
            residual = goal - hidden(layer if own.residual_of == "each_layer" else top)
            residual = residual / (left**0.5 if own.residual_share == "root_of_layers_left" else left)
            gated = torch.stack([self.run(e.ids[: e.target_start], layer)["gated"][e.edit_token] for e in texts])
            features = torch.einsum("jde,tje->tjd", projectors[i], gated)
            change = solved(features, residual, own.solver, gated.any(-1).any(0))
            weight = self.model.model.layers[layer].mlp.experts.down_proj
            weight += change.transpose(1, 2) @ projectors[i]


def solved(features: Tensor, residual: Tensor, solver: Any, is_visited: Tensor) -> Tensor:
    """Solve for the change ``[E, d_hidden, d_model]``, at once or block by block as MoEEdit's paper prints it."""
    ridge = RIDGE * torch.eye(features[0].numel(), dtype=features.dtype)
    if not isinstance(solver, BlockCoordinateDescent):
        design = features.flatten(1)
        return torch.linalg.solve(design.T @ design + ridge, design.T @ residual).view(*features.shape[1:], -1)
    change = features.new_zeros(*features.shape[1:], residual.shape[1])
    visited, generator = is_visited.nonzero()[:, 0], torch.Generator().manual_seed(solver.seed)
    for _ in range(solver.passes):
        for j in visited[torch.randperm(len(visited), generator=generator)].tolist():
            own, size = features[:, j], features.shape[2]
            missing = residual - torch.einsum("tjd,jdo->to", features, change) + own @ change[j]
            change[j] = torch.linalg.solve(own.T @ own + ridge[:size, :size], own.T @ missing)
    return change


@pytest.mark.parametrize(
    ("loss_tokens", "residual_of", "residual_share"),
    [*(pytest.param(*choice, marks=pytest.mark.slow) for choice in CHOICES[:-1]), CHOICES[-1]],
)
def test_an_edit_is_that_of_plain_loops(
    model: PreTrainedModel, tokenizer: Any, long: list[Fact], texts: list[str], loss_tokens, residual_of, residual_share
) -> None:
    own, plain = editor(loss_tokens, residual_of, residual_share), Plain(model)
    prompts, targets = [fact.prompt for fact in long], [fact.target_new for fact in long]
    encoded = encode(tokenizer, prompts, targets, [fact.subject for fact in long])
    assert min(len(e.ids) - e.target_start for e in encoded) < max(len(e.ids) - e.target_start for e in encoded)
    if loss_tokens == "every":  # one row for each fact: the mean over all tokens, as in the paper
        own.target_tokens = "first"
    before = edited_weights(model)
    texts = texts[2:4]
    projectors = [plain.projectors(tokenizer, texts, layer) for layer in own.layers]
    assert not all(bool(projector.any()) for own_layer in projectors for projector in own_layer)  # without text
    vectors = [plain.vector(text, 2, own.targets) for text in encoded]
    result = own.edit(model, tokenizer, long, texts)
    assert set(result.deltas) == {0, 1, 2}
    # float32 through the layers, then Adam, whose first steps are of the size of the learning rate
    torch.testing.assert_close(result.targets.deltas.double(), torch.stack(vectors), rtol=1e-3, atol=1e-3)
    plain.edit(own, encoded, vectors, projectors)
    wanted = edited_weights(plain.model)
    for name, weight in edited_weights(model).items():
        change, reference = weight.double() - before[name], wanted[name] - before[name]
        # of float32 weights, keys and projectors; other settings differ by a tenth and more, see below
        assert float((change - reference).norm()) <= 1e-2 * float(reference.norm()), name


@pytest.mark.parametrize("passes", [1, 3])
def test_block_coordinate_descent_as_released_gives_the_deltas_of_plain_loops(
    model: PreTrainedModel, tokenizer: Any, long: list[Fact], texts: list[str], passes: int
) -> None:
    """With the same target vectors, order of experts and walk up the layers; all settings as released."""
    own, plain = editor(*CHOICES[-1]), Plain(model)
    own.solver = BlockCoordinateDescent(passes=passes, seed=5)
    encoded = encode(tokenizer, [f.prompt for f in long], [f.target_new for f in long], [fact.subject for fact in long])
    texts = texts[2:4]
    projectors = [plain.projectors(tokenizer, texts, layer) for layer in own.layers]
    assert not all(bool(projector.any()) for own_layer in projectors for projector in own_layer)  # without text
    before = edited_weights(model)
    result = own.edit(model, tokenizer, long, texts)
    plain.edit(own, encoded, list(result.targets.deltas.double()), projectors)
    changes = {name: weight.double() - before[name] for name, weight in edited_weights(model).items()}
    wanted = {name: weight - before[name] for name, weight in edited_weights(plain.model).items()}
    for name, change in changes.items():
        # float32 states and projectors through three layers: 4e-6 here
        assert float((change - wanted[name]).norm()) <= 5e-5 * float(wanted[name].norm()), name
    other = Plain(model)  # another order of experts is no rounding
    missing, unexpected = other.model.load_state_dict(before, strict=False)
    assert not unexpected and not {*missing} & {*before}
    own.solver = BlockCoordinateDescent(passes=passes, seed=6)
    other.edit(own, encoded, list(result.targets.deltas.double()), projectors)
    lowest = f"model.layers.{own.layers[0]}.mlp.experts.down_proj"
    unlike = edited_weights(other.model)[lowest] - before[lowest]
    assert float((changes[lowest] - unlike).norm()) > 5e-2 * float(unlike.norm())


def test_each_setting_makes_a_difference(model, tokenizer, long, texts) -> None:
    """By far more than the tolerance above; the shares and residuals in the lowest layer."""
    changes = []
    for choice in [("every", "target_layer", "layers_left"), *CHOICES]:
        own, other = editor(*choice), copy.deepcopy(model)
        own.target_tokens = "first"
        own.edit(other, tokenizer, long, texts[2:4])
        changes.append((expert_layers(other)[0].down_proj - expert_layers(model)[0].down_proj).detach())
    for one, two in itertools.combinations(changes, 2):
        assert float((one - two).norm()) > 0.1 * float(one.norm())


def test_the_shares_of_the_paper_are_the_default(model, tokenizer, facts) -> None:
    models = [copy.deepcopy(model) for _ in range(2)]
    told = {"residual_of": "target_layer", "residual_share": "layers_left"}
    for other, settings in zip(models, ({}, told), strict=True):
        targets = TargetOptimizer(steps=3, stop=0.0, **({"loss_tokens": "every"} if settings else {}))
        Editor([0, 1], targets=targets, preserve="none", **settings).edit(other, tokenizer, facts)
    weights = edited_weights(models[0])
    assert all(torch.equal(weight, weights[name]) for name, weight in edited_weights(models[1]).items())


@pytest.mark.parametrize(
    ("share", "divisors"), [("layers_left", (3, 2, 1)), ("root_of_layers_left", (3**0.5, 2**0.5, 1))]
)
def test_carried_solutions_take_the_same_shares(model, tokenizer, facts, share: Any, divisors) -> None:
    """The core is the same at each layer, and so are the factors of layers with the same weights."""
    layers = expert_layers(model)
    with torch.no_grad():
        for index in (0, 1):
            layers[index].down_proj.copy_(layers[2].down_proj)
    solver = Tucker(energy=1.0, whiten=False)
    own = Editor([0, 1, 2], solver, QUICK, "none", ridge=0.1, residual_share=share)
    result = own.edit(model, tokenizer, facts)
    last = result.deltas[2].dense(0)
    for index, divisor in enumerate(divisors):
        # factors and cores are float32
        torch.testing.assert_close(result.deltas[index].dense(0) * divisor, last, rtol=1e-4, atol=1e-6)


def test_one_layer_is_the_same_with_all_of_them(model, tokenizer, facts) -> None:
    residuals = []
    for _, residual_of, residual_share in CHOICES:
        solver = Recording()
        own = Editor([1], solver, QUICK, "none", residual_of=residual_of, residual_share=residual_share)
        own.edit(copy.deepcopy(model), tokenizer, facts)
        residuals.append(solver.problems[0].residuals)
    assert all(torch.equal(residual, residuals[0]) for residual in residuals)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Editor([1], residual_of="layer"), "residual_of must be one of target_layer, each_layer, got 'layer'"),
        (
            lambda: Editor([1], residual_share="all"),
            "residual_share must be one of layers_left, root_of_layers_left, got 'all'",
        ),
        (lambda: TargetOptimizer(loss_tokens="last"), "loss_tokens must be one of every, first, got 'last'"),
        (
            lambda: Editor([1], Tucker(), residual_of="each_layer"),
            "Tucker carries its solution, so residual_of must be 'target_layer', got 'each_layer'",
        ),
        (
            lambda: Editor([1], targets=TargetOptimizer(loss_tokens="first"), target_tokens="every"),
            "with loss_tokens='first' target_tokens must be 'first' or 'auto', got 'every'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_vectors_of_several_tokens_are_refused_where_the_first_alone_counts(model, tokenizer, long, unchanged) -> None:
    unchanged(model)
    own = Editor([1], targets=QUICK, preserve="none", token="last", target_tokens="every")
    own.targets = TargetOptimizer(loss_tokens="first")
    with pytest.raises(ValueError, match="loss_tokens must be 'every', got 'first'"):
        own.edit(model, tokenizer, long)


def _on_a_rank(kind: str) -> list[Tensor]:
    """The edited experts' weights after an edit with all settings as released."""
    from tests.sharding.small_edits import FACTS, LAYERS, TEXTS, model, prepared, tokenizer

    whole, optimizers, read = (None, [], None) if kind == "one process" else prepared(kind)
    whole = model() if whole is None else whole
    facts = [replace(fact, target_new=target) for fact, target in zip(FACTS, LONG, strict=False)]
    own = editor(*CHOICES[-1], layers=LAYERS)
    own.edit(whole, tokenizer(), facts, TEXTS, optimizers=optimizers)
    if read is not None:
        return read()
    return [layer.down_proj.detach() for layer in expert_layers(whole).values()][: len(LAYERS)]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_processes_with_sharded_weights_edit_as_one() -> None:
    """The outputs of lower layers are measured by forwards that end there, on all ranks."""
    alone = _on_a_rank("one process")
    for found in run_ranks(_on_a_rank, 2, "zero 3"):
        for weight, whole in zip(found, alone, strict=True):
            # prompts in other batches, then Adam, whose first steps are of the size of the learning rate
            torch.testing.assert_close(weight, whole, rtol=1e-3, atol=1e-3)


def test_weights_of_bfloat16_are_edited(model, tokenizer, facts, texts) -> None:
    """The two outputs whose difference is a residual are float32."""
    model.to(torch.bfloat16).set_experts_implementation("eager")  # grouped_mm knows no bfloat16 of these sizes
    before = edited_weights(model)
    solver = Recording()
    own = editor(*CHOICES[-1], layers=(0, 1))
    own.solver = solver
    own.edit(model, tokenizer, facts, texts)
    assert all(problem.residuals.dtype == torch.float32 for problem in solver.problems)
    changed = {name for name, weight in edited_weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{index}.mlp.experts.down_proj" for index in (0, 1)}


def test_the_reference_of_benchmarks_follows_the_settings(model, tokenizer, long, texts) -> None:
    """One fact and one expert after another, in float32."""
    own, other = editor(*CHOICES[-1]), copy.deepcopy(model)
    own.solver = BlockCoordinateDescent(passes=2)
    before = edited_weights(model)
    # text for every expert: two passes over others without projector would be in another order
    own.edit(model, tokenizer, long, texts)
    reference.edit(other, tokenizer, long, texts, own)
    wanted = edited_weights(other)
    for name, weight in edited_weights(model).items():
        # steps of Adam from gradients of other batches, then features of float32 states that were edited below
        assert float((weight - wanted[name]).norm()) <= 1e-2 * float((wanted[name] - before[name]).norm()), name
