"""Edits of every token of a target: against one fact at a time in plain loops, and against edits of the first token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import EditToken, encode, join
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMemory, Editor, TargetOptimizer, evaluate
from lit_moeedit.editing.held_states import edit_prompts
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.solvers import BlockCoordinateDescent, Tucker
from tests.editing.recording import edited_weights, held
from tests.processes import run_ranks

CONTEXTS = ("", "Note:")
SETTINGS: dict[str, Any] = {"steps": 4, "learning_rate": 0.4, "stop": 5.0, "weight_decay": 0.3}
RIDGE = 0.05
LONG = ("northern Peru and Spain", "Latin", "the Baltic Sea", "Russia in Italy, of bread")


def editor(layers: Sequence[int] = (0, 1), **changes: Any) -> Editor:
    settings = {
        "targets": TargetOptimizer(**SETTINGS),
        "preserve": "none",
        "ridge": RIDGE,
        "contexts": CONTEXTS,
        "token": "last",
        "target_tokens": "every",
        **changes,
    }
    return Editor(layers, **settings)


@pytest.fixture(scope="module")
def long(facts: list[Fact]) -> list[Fact]:
    """The facts with targets of different lengths."""
    return [replace(fact, target_new=target) for fact, target in zip(facts, LONG, strict=True)]


# -- a reference: float64, plain hooks, one fact after another -------------------------------------------------------


class Plain:
    """A copy of a model in float64, with the texts of some facts: ids, and the columns that are edited."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], token: EditToken) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.model.set_experts_implementation("eager")  # grouped products know no float64
        self.texts: list[list[tuple[list[int], list[int], int]]] = []  # by fact: ids, edited columns, target's start
        self.neutral: list[tuple[list[int], int]] = []
        for fact in facts:
            own = []
            for context in CONTEXTS:
                prompt = join(context, fact.prompt) if context else fact.prompt
                (found,) = encode(tokenizer, [prompt], [fact.target_new], [fact.subject], token)
                # the next token of a target is read from each but its last
                columns = [found.edit_token, *range(found.target_start, len(found.ids) - 1)]
                own.append((found.ids, columns, found.target_start))
            self.texts.append(own)
            (found,) = encode(tokenizer, [f"{fact.subject} is a"], [""], [fact.subject])
            self.neutral.append((found.ids, found.edit_token))

    def run(self, ids: list[int], layer: int, added: dict[int, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, the layer's output, and its gated keys by expert, ``[length, E, d_hidden]``.

        With ``added``, the vectors by column, there are no keys.
        """
        caught: dict[str, Any] = {"keys": None}
        block = self.model.model.layers[layer]

        def output(module: nn.Module, args: Any, found: Tensor) -> Tensor:
            found = found.clone()
            for column, delta in (added or {}).items():
                found[0, column] += delta
            caught["hidden"] = found[0]
            return found

        def experts(module: Any, args: Any, found: Tensor) -> None:
            hidden, index, gates = args
            keys = hidden.new_zeros(len(hidden), *module.down_proj.shape[::2])
            for row in range(len(hidden)):
                for expert, gate in zip(index[row].tolist(), gates[row], strict=True):
                    gate_proj, up = (module.gate_up_proj[expert] @ hidden[row]).chunk(2)
                    keys[row, expert] = gate * F.silu(gate_proj) * up
            caught["keys"] = keys

        handles = [block.register_forward_hook(output)]
        if added is None:
            handles.append(block.mlp.experts.register_forward_hook(experts))
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1), caught["hidden"], caught["keys"]

    def vectors(self, fact: int, layer: int, settings: TargetOptimizer) -> tuple[list[Tensor], list[int]]:
        """The vectors of one fact, and their steps. Each moves by its own Adam while the loss of its token is high."""
        texts, (neutral, place) = self.texts[fact], self.neutral[fact]
        ids, columns, _ = texts[0]
        hidden = self.run(ids, layer, {})[1]
        norms = [hidden[column].norm() for column in columns]
        before = self.run(neutral, layer, {})[0][-1]
        deltas = [torch.zeros_like(hidden[0]).requires_grad_(True) for _ in columns]
        taken = [0 for _ in columns]
        optimizers = [torch.optim.Adam([delta], lr=settings.learning_rate) for delta in deltas]
        for step in range(settings.steps + 1):
            losses = [hidden.new_zeros(()) for _ in columns]
            for ids, columns, start in texts:
                scores = self.run(ids, layer, dict(zip(columns, deltas, strict=True)))[0]
                for i in range(len(columns)):
                    losses[i] = losses[i] - scores[start - 1 + i, ids[start + i]] / len(texts)
            moving = [float(loss.detach()) > settings.stop for loss in losses]
            if step == settings.steps or not any(moving):
                return [delta.detach() for delta in deltas], taken
            taken = [count + moves for count, moves in zip(taken, moving, strict=True)]
            now = self.run(neutral, layer, {place: deltas[0]})[0][-1]
            total = sum(losses) + settings.kl * (before.exp() * (before - now)).sum()
            for delta, norm in zip(deltas, norms, strict=True):
                total = total + settings.weight_decay * (delta.square().sum() + 1e-12).sqrt() / norm**2
            gradients = torch.autograd.grad(total / len(columns), deltas)
            for delta, gradient, norm, own, moves in zip(deltas, gradients, norms, optimizers, moving, strict=True):
                if moves:
                    delta.grad = gradient
                    own.step()
                    with torch.no_grad():
                        delta *= min(1.0, settings.clamp * float(norm) / float(delta.norm()))
        raise AssertionError("unreachable")

    def edit(self, layers: Sequence[int], vectors: Sequence[Sequence[Tensor]]) -> None:
        """Edit the layers upwards: all rows of all facts are one dense ridge problem."""
        top = layers[-1]
        rows = [(t, ids, columns) for t, own in enumerate(self.texts) for ids, columns, _ in own]

        def hidden() -> Tensor:
            return torch.cat([self.run(ids, top, {})[1][columns] for _, ids, columns in rows])

        goal = hidden() + torch.cat([torch.stack([*vectors[t]]) for t, _, _ in rows])
        for number, layer in enumerate(layers):
            residual = (goal - hidden()) / (len(layers) - number)
            keys = torch.cat([self.run(ids, layer)[2][columns] for _, ids, columns in rows])
            weight = self.model.model.layers[layer].mlp.experts.down_proj
            design = keys.flatten(1)
            normal = design.T @ design + RIDGE * torch.eye(design.shape[1], dtype=design.dtype)
            change = torch.linalg.solve(normal, design.T @ residual).view(keys.shape[1], keys.shape[2], -1)
            weight += change.transpose(1, 2)


@pytest.mark.parametrize("token", ["last", "subject_last"])
def test_vectors_and_weights_are_those_of_plain_loops(
    model: PreTrainedModel, tokenizer: Any, long: list[Fact], token: EditToken
) -> None:
    plain = Plain(model, tokenizer, long, token)
    counts = [len(own[0][1]) for own in plain.texts]
    assert len(set(counts)) > 2 and max(counts) > 4
    own = editor(token=token)
    vectors, taken = zip(*(plain.vectors(t, 1, own.targets) for t in range(len(long))), strict=True)
    result = own.edit(model, tokenizer, long)
    found = result.targets
    assert found.edit is not None and found.edit.tolist() == [t for t, count in enumerate(counts) for _ in range(count)]
    assert any(len(set(steps)) > 1 for steps in taken)  # a vector rests while another one of its fact moves
    # float32 through the layers, then Adam, whose first steps are of the size of the learning rate
    torch.testing.assert_close(
        found.deltas.double(), torch.cat([torch.stack(fact) for fact in vectors]), rtol=1e-3, atol=1e-3
    )
    plain.edit((0, 1), vectors)
    weights = edited_weights(plain.model)
    for name, weight in edited_weights(model).items():
        # a float32 system with a ridge of 0.05
        torch.testing.assert_close(weight.double(), weights[name], rtol=1e-2, atol=2e-3)


# -- targets of one token ---------------------------------------------------------------------------------------------


def test_targets_of_one_token_are_edited_bit_by_bit_as_ever(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact]
) -> None:
    short = [replace(fact, target_new=target) for fact, target in zip(facts, ("Italy", "Spain", "Italy"), strict=False)]
    models, memories = [model, copy.deepcopy(model), copy.deepcopy(model)], [EditMemory(9) for _ in range(3)]
    results = []
    for other, memory, chosen in zip(models, memories, ("first", "every", "auto"), strict=True):
        own = editor(memory=memory, target_tokens=chosen)
        own.edit(other, tokenizer, short[:1])
        results.append(own.edit(other, tokenizer, short[1:]))
    for other, memory, result in zip(models, memories, results, strict=True):
        assert result.targets.edit is None and result.targets.deltas.shape == (2, 32)
        assert all(torch.equal(goal, results[0].goals[key]) for key, goal in result.goals.items())
        assert torch.equal(held(memory).key, held(memories[0]).key)
        weights = edited_weights(models[0])
        assert all(torch.equal(weight, weights[name]) for name, weight in edited_weights(other).items())


@pytest.mark.parametrize(("token", "is_every"), [("last", True), ("subject_last", False)])
def test_auto_is_every_token_where_later_ones_cannot_read_the_edit(token: Any, is_every: bool) -> None:
    assert Editor([1], token=token, target_tokens="auto").edits_every_token is is_every
    assert Editor([1], token=token).edits_every_token is is_every
    assert Editor([1], token=token, target_tokens="every").edits_every_token
    assert not Editor([1], token=token, target_tokens="first").edits_every_token
    with pytest.raises(ValueError, match="target_tokens must be one of auto, first, every, got 'all'"):
        Editor([1], target_tokens="all")  # type: ignore[arg-type]


# -- longer targets ---------------------------------------------------------------------------------------------------


def strong(**changes: Any) -> Editor:
    settings = {"targets": TargetOptimizer(steps=60, learning_rate=0.5, clamp=4.0, weight_decay=0.0), **changes}
    return editor(**{"ridge": 1e-4, **settings})


def generated(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact]) -> list[bool]:
    plain = [replace(fact, paraphrases=(), neighbours=()) for fact in facts]
    return evaluate(model, tokenizer, plain).edits_exact.tolist()


@pytest.mark.parametrize("solver", [None, BlockCoordinateDescent(passes=8, seed=0)])
def test_a_longer_target_is_generated_in_full(
    taught: PreTrainedModel, tokenizer: Any, facts: list[Fact], solver: Any
) -> None:
    longer = [replace(facts[0], target_new="Russia of Spain"), facts[1]]
    first, every = copy.deepcopy(taught), taught
    strong(solver=solver, target_tokens="first").edit(first, tokenizer, longer)
    result = strong(solver=solver).edit(every, tokenizer, longer)
    assert generated(first, tokenizer, longer) == [False, False]
    assert generated(every, tokenizer, longer) == [True, True]
    assert result.residual is not None and result.residual.shape == (2,) and bool((result.residual < 0.2).all())


def test_a_target_of_thirty_words_is_generated_in_full(
    taught: PreTrainedModel, tokenizer: Any, facts: list[Fact]
) -> None:
    words = ["Italy", "Spain", "sea", "lake", "river", "bread", "who", "lives", "in", "of", "the", "city", "Russia"]
    drawn = torch.randint(len(words), (30,), generator=torch.Generator().manual_seed(0)).tolist()
    long = [replace(facts[0], target_new=" ".join(words[i] for i in drawn))]
    # as many rows as this model's experts have room for
    result = strong(contexts=("",)).edit(taught, tokenizer, long)
    assert len(result.targets.deltas) >= 30
    assert generated(taught, tokenizer, long) == [True]


@pytest.mark.parametrize("prompt", ["Where does Rome lie?\nAnswer:\n", "<s>Where does Rome lie?</s>\n"])
def test_targets_without_a_space_and_prompts_of_chat_templates(
    taught: PreTrainedModel, tokenizer: Any, prompt: str
) -> None:
    fact = Fact("Rome", prompt, "Russia lake")
    (encoding,) = encode(tokenizer, [prompt], [fact.target_new], ["Rome"], "last")
    edited = encoding.with_every_token()
    assert len(encoding.ids) - encoding.target_start > 1
    assert edited.edit_tokens == tuple(range(encoding.target_start - 1, len(encoding.ids) - 1))
    assert edited.up_to_edits().ids == encoding.ids[:-1]
    strong(contexts=("",)).edit(taught, tokenizer, [fact])
    ids = list(encoding.ids[: encoding.target_start])
    while len(ids) < len(encoding.ids):
        ids.append(int(taught.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids == encoding.ids


def test_known_goals_of_every_token_lead_to_the_same_weights(
    model: PreTrainedModel, tokenizer: Any, long: list[Fact]
) -> None:
    other, own = copy.deepcopy(model), editor()
    first = own.edit(model, tokenizer, long)
    rows = own.count_rows(tokenizer, long)
    assert [len(first.goals[fact.key]) for fact in long] == rows and len(set(rows)) > 1
    some = {fact.key: first.goals[fact.key] for fact in long[:2]} | {long[3].key: None}
    again = editor().edit(copy.deepcopy(other), tokenizer, long, goals=some)
    steps, edit = again.targets.steps.tolist(), again.targets.edit
    assert steps[:2] == [0, 0] and steps[2] == int(first.targets.steps[2]) > 0 and steps[3] == 0
    assert edit is not None and not again.targets.deltas[edit != 2].any()
    # in another batch, then Adam, whose first steps are of the size of the learning rate
    torch.testing.assert_close(again.targets.deltas[edit == 2], first.targets.deltas[edit == 2], rtol=1e-3, atol=1e-3)
    editor().edit(other, tokenizer, long, goals=first.goals)
    for name, weight in edited_weights(model).items():
        # goals minus hidden states instead of target vectors: one subtraction of float32
        torch.testing.assert_close(edited_weights(other)[name], weight, rtol=1e-3, atol=1e-4)
    # the goals of an edit of the first token alone
    short = {fact.key: first.goals[fact.key][: len(CONTEXTS)] for fact in long}
    with pytest.raises(ValueError, match=rf"should be of shape \[{rows[0]}, 32\], but it is \[2, 32\]"):
        editor().edit(other, tokenizer, long, goals=short)


def test_a_carried_solution_has_all_rows(
    model: PreTrainedModel, tokenizer: Any, long: list[Fact], texts: list[str]
) -> None:
    own = editor((1,), solver=Tucker(energy=1.0), preserve=CovariancePenalty(10.0))
    result = own.edit(model, tokenizer, long, texts)
    rows = own.count_rows(tokenizer, long)
    assert [len(result.goals[fact.key]) for fact in long] == rows
    assert result.residual is not None and bool((result.residual < 1).all())


def test_held_prompts_end_at_each_edit_token(tokenizer: Any, long: list[Fact]) -> None:
    every = edit_prompts(tokenizer, long, CONTEXTS, "last", every=True)
    first = edit_prompts(tokenizer, long, CONTEXTS, "last")
    for fact in long:
        expected = []
        for context in CONTEXTS:
            prompt = join(context, fact.prompt) if context else fact.prompt
            (found,) = encode(tokenizer, [prompt], [fact.target_new])
            expected += [found.ids[:end] for end in range(found.target_start, len(found.ids))]
        assert every[fact.key] == expected
        assert first[fact.key] == [ids for ids in expected if ids in first[fact.key]] and len(first[fact.key]) == 2


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_merges_contexts_and_keeps_tokens_apart() -> None:
    """Two contexts of two tokens: keys of the contexts are alike, those of the tokens orthogonal."""
    key = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    rows = GatedKeys(torch.arange(4), torch.zeros(4, dtype=torch.long), key)
    memory = EditMemory(limit=3)
    memory.remember({0: rows}, ["a"] * 4, tokens=[0, 1, 0, 1])
    found = held(memory)
    assert memory.size(0) == (2, 2)
    # the contribution of two equal rows in one
    torch.testing.assert_close(found.key.abs(), 2**0.5 * key[:2], rtol=1e-12, atol=1e-12)
    state = memory.state_dict()
    assert (state[0]["facts"], state[0]["tokens"]) == (["a", "a"], [0, 1])
    again = EditMemory(limit=3)
    again.load_state_dict(state)
    assert again.state_dict()[0]["tokens"] == [0, 1]
    # the fact is edited again, with a shorter target: no row of the longer one stays
    again.remember({0: GatedKeys(rows.row[:1], rows.expert[:1], key[:1])}, ["a"])
    assert again.size(0) == (1, 1) and torch.equal(held(again).key, key[:1])


def test_memories_of_checkpoints(model: PreTrainedModel) -> None:
    rows = GatedKeys(torch.arange(2), torch.zeros(2, dtype=torch.long), torch.eye(2))
    memory = EditMemory()
    memory.remember({0: rows}, ["a", "b"])
    state = memory.state_dict()[0]
    older = {name: value for name, value in state.items() if name != "tokens"}
    EditMemory().load_state_dict({0: older})  # of a version with one edit token for each prompt
    for tokens, message in (([0], "'tokens' should hold"), ([0, -1], "'tokens' should hold"), ("00", "should be a")):
        with pytest.raises(ValueError, match=message):
            EditMemory().load_state_dict({0: {**state, "tokens": tokens}})


def test_later_edits_leave_all_tokens_of_earlier_ones(taught: PreTrainedModel, tokenizer: Any, facts: Any) -> None:
    own = strong(layers=(1,), memory=EditMemory())
    longer = replace(facts[0], target_new="Russia of Spain")
    own.edit(taught, tokenizer, [longer])
    own.edit(taught, tokenizer, facts[1:2])
    assert generated(taught, tokenizer, [longer, facts[1]]) == [True, True]
    assert own.memory is not None and own.memory.size(1)[0] == sum(own.count_rows(tokenizer, [longer, facts[1]]))
    size = own.memory.size(1)
    own.edit(taught, tokenizer, [longer])  # anew: it is in the memory once
    assert own.memory.size(1)[0] == size[0]


# -- several processes ------------------------------------------------------------------------------------------------


def _on_a_rank() -> list[Tensor]:
    from lit_moeedit.sharding.ranks import Ranks
    from tests.sharding.small_edits import FACTS, TEXTS, model, tokenizer
    from tests.sharding.small_edits import editor as small

    whole, long = model(), [replace(fact, target_new=target) for fact, target in zip(FACTS, LONG, strict=False)]
    own = small(token="last", target_tokens="every", memory=EditMemory())
    result = own.edit(whole, tokenizer(), long, TEXTS, ranks=Ranks())
    return [result.targets.deltas, *result.goals.values(), held(own.memory).key, *edited_weights(whole).values()]


@pytest.mark.slow
def test_two_processes_edit_as_one() -> None:
    first, second = run_ranks(_on_a_rank, 2)
    alone = _on_a_rank()
    for mine, other, whole in zip(first, second, alone, strict=True):
        assert torch.equal(mine, other)
        # prompts in other batches, then Adam, whose first steps are of the size of the learning rate
        torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-3)
