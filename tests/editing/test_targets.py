"""Target vectors against a plain optimisation: one edit at a time, each text by itself, all layers, torch's Adam."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.encoding import EditToken, encode, join
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import targets as targets_module
from lit_moeedit.editing.targets import TargetOptimizer, TargetRow, Targets
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.sharding.ranks import Ranks
from tests.processes import run_ranks
from tests.sharding import small_edits

CONTEXTS = ("", "Here is a fact.")
# float32 through three layers, then a few steps of Adam, whose first steps are of the size of the learning rate
# however small the gradient is
STEPS = {"rtol": 1e-3, "atol": 1e-3}


def rows_of(
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[Fact],
    contexts: Sequence[str] = CONTEXTS,
    neutral: bool = True,
    token: EditToken = "subject_last",
) -> list[TargetRow]:
    rows = []
    for number, fact in enumerate(facts):
        texts = [join(context, fact.prompt) if context else fact.prompt for context in contexts]
        wanted = encode(tokenizer, texts, [fact.target_new] * len(texts), [fact.subject] * len(texts), token)
        rows += [TargetRow(number, encoding) for encoding in wanted]
        if neutral:
            rows += [TargetRow(number, *encode(tokenizer, [f"{fact.subject} is a"], [""], [fact.subject]))]
    return rows


def plain_logits(model: PreTrainedModel, layer: int, row: TargetRow, delta: Tensor) -> Tensor:
    """Logits ``[length, vocabulary]`` of one text, with ``delta`` added behind a layer at the edit token."""

    def add(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, row.encoding.edit_token] += delta
        return output

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        return model(input_ids=torch.tensor([row.encoding.ids]), use_cache=False).logits[0]
    finally:
        handle.remove()


def plain_target(
    model: PreTrainedModel, layer: int, rows: Sequence[TargetRow], settings: TargetOptimizer, norm: float
) -> tuple[Tensor, float, int]:
    """``δ`` of one edit, its final loss per token, and the steps it took."""
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    wanted = [row for row in rows if not row.is_neutral]
    with torch.no_grad():
        reference = {id(row): plain_logits(model, layer, row, delta)[-1].softmax(-1) for row in rows if row.is_neutral}
    for step in range(settings.steps + 1):
        nll = torch.zeros(())
        for row in wanted:
            start, ids = row.encoding.target_start, torch.tensor(row.encoding.ids)
            scores = plain_logits(model, layer, row, delta)[start - 1 : -1]
            nll = nll + torch.nn.functional.cross_entropy(scores, ids[start:]) / len(wanted)
        if nll.item() <= settings.stop or step == settings.steps:
            break
        loss = nll + settings.weight_decay * (delta.square().sum() + 1e-12).sqrt() / norm**2
        for row in rows:
            if row.is_neutral:
                before, now = reference[id(row)], plain_logits(model, layer, row, delta)[-1].log_softmax(-1)
                loss = loss + settings.kl * (before * (before.log() - now)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, settings.clamp * norm / float(delta.norm()))
    return delta.detach(), nll.item(), step


def norms(model: PreTrainedModel, plain_hidden, layer: int, rows: Sequence[TargetRow]) -> Tensor:
    """``‖h_t‖``: at the edit token of each edit's first row."""
    first = {row.edit: row.encoding for row in reversed(rows)}
    return torch.stack([plain_hidden(model, layer, first[t].ids)[first[t].edit_token].norm() for t in sorted(first)])


@pytest.mark.parametrize(
    ("token", "arguments"),
    [
        ("subject_last", {"steps": 6, "stop": 0.0}),
        ("subject_last", {"steps": 6, "stop": 0.0, "kl": 0.0, "weight_decay": 0.0}),
        ("subject_last", {"steps": 5, "stop": 0.0, "kl": 5.0, "weight_decay": 50.0}),  # the other terms decide
        ("subject_last", {"steps": 6, "stop": 0.0, "clamp": 0.1}),  # the clamp decides
        ("last", {"steps": 12, "stop": 3.0, "learning_rate": 0.3}),  # edits stop at different steps, or not at all
    ],
)
def test_equals_plain_optimisation(
    model, plain_hidden, tokenizer, facts, token: EditToken, arguments: dict[str, Any]
) -> None:
    settings = TargetOptimizer(**arguments)
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts, token=token)
    targets = settings.optimize(model, layer, rows, 0)
    assert settings.stop == 0.0 or len(set(targets.steps.tolist())) > 1
    model.eval().requires_grad_(False)
    for edit, norm in enumerate(norms(model, plain_hidden, 1, rows).tolist()):
        own = [row for row in rows if row.edit == edit]
        delta, nll, steps = plain_target(model, 1, own, settings, norm)
        assert int(targets.steps[edit]) == steps
        assert float(delta.norm()) > 0.05
        torch.testing.assert_close(targets.deltas[edit], delta, **STEPS)
        assert float(targets.nll[edit]) == pytest.approx(nll, rel=1e-3)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
def test_equals_plain_optimisation_in_other_families(make_model, plain_hidden, tokenizer, facts, model_type) -> None:
    model = make_model(model_type)
    settings = TargetOptimizer(steps=3, stop=0.0)
    rows = rows_of(tokenizer, facts[:2])
    targets = settings.optimize(model, expert_layers(model)[1], rows, 0)
    model.eval().requires_grad_(False)
    for edit, norm in enumerate(norms(model, plain_hidden, 1, rows).tolist()):
        delta, _, _ = plain_target(model, 1, [row for row in rows if row.edit == edit], settings, norm)
        torch.testing.assert_close(targets.deltas[edit], delta, **STEPS)


def test_the_model_is_left_alone(model: PreTrainedModel, tokenizer, facts, unchanged) -> None:
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].eval()
    model.lm_head.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)  # a model that draws numbers
    reached: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: reached.append(name))
    unchanged(model)  # among others: no parameter has a gradient, neither before nor after
    TargetOptimizer(steps=2).optimize(model, expert_layers(model)[1], rows_of(tokenizer, facts), 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not reached  # none was computed either


def test_autocast(model: PreTrainedModel, tokenizer, facts) -> None:
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    seen: set[torch.dtype] = set()
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    exact, cast = (
        TargetOptimizer(steps=25, stop=0.0, autocast=dtype).optimize(model, layer, rows, 0)
        for dtype in (None, "bfloat16")
    )
    assert seen == {torch.float32, torch.bfloat16}
    assert cast.deltas.dtype == cast.nll.dtype == torch.float32
    # bfloat16 has 8 bits, and sends some tokens to other experts
    assert float(cast.nll.mean()) == pytest.approx(float(exact.nll.mean()), rel=0.2)


def test_a_model_in_bfloat16(make_model, tokenizer, facts, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("qwen3_moe", moe_intermediate_size=24).bfloat16()
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    targets = TargetOptimizer(steps=25, stop=0.0).optimize(model, layer, rows, 0)
    start = TargetOptimizer(stop=1e3).optimize(model, layer, rows, 0)
    assert targets.deltas.dtype == torch.float32
    assert bool((targets.nll < start.nll).all())
    assert not caplog.records  # rounding alone does not look like a model that kept keys and values do not suffice for


def test_clamp_bounds_every_vector(model: PreTrainedModel, plain_hidden, tokenizer, facts) -> None:
    rows = rows_of(tokenizer, facts)
    targets = TargetOptimizer(steps=8, learning_rate=1.0, clamp=0.2, stop=0.0).optimize(
        model, expert_layers(model)[1], rows, 0
    )
    share = targets.deltas.norm(dim=-1) / norms(model, plain_hidden, 1, rows)
    assert bool((share <= 0.2 * (1 + 1e-4)).all())  # float32 norms of two forwards
    assert bool((share > 0.19).any())


def test_loss_falls(model: PreTrainedModel, tokenizer, facts) -> None:
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    losses = [TargetOptimizer(steps=steps, stop=0.0).optimize(model, layer, rows, 0).nll for steps in (1, 5, 25)]
    assert bool((losses[1] < losses[0]).all())
    assert bool((losses[2] < losses[1]).all())


@pytest.mark.parametrize("clamp", [0.5, 0.6, 0.7])
def test_edits_that_are_done_do_not_move(model: PreTrainedModel, tokenizer, facts, clamp: float) -> None:
    """The clamp is reached too: applying it again to a vector on the bound would move the vector by rounding."""
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts, token="last")

    def optimize(steps: int) -> Targets:
        settings = TargetOptimizer(steps=steps, learning_rate=0.5, clamp=clamp, stop=3.5)
        return settings.optimize(model, layer, rows, 0)

    final = optimize(30)
    first = int(final.steps.min())
    assert 0 < first < int(final.steps.max())
    done = final.steps == first
    short = optimize(first)
    assert torch.equal(short.steps[done], final.steps[done])
    # bit by bit: the batch of the first steps is the same
    assert torch.equal(short.deltas[done], final.deltas[done])
    assert torch.equal(short.nll[done], final.nll[done])
    assert bool((final.nll[done] <= 3.5).all())
    assert bool((short.nll[~done] > 3.5).all())


def test_edits_that_are_done_are_not_run(model: PreTrainedModel, tokenizer, facts) -> None:
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts, token="last")
    ran: list[int] = []
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    steps = TargetOptimizer(steps=30, learning_rate=0.5, clamp=0.6, stop=3.5).optimize(model, layer, rows, 0).steps
    per_edit = len(rows) // len(facts)
    # the unedited model, then each step with the edits that are left, and once more to see the last one's loss
    left = [per_edit * int((steps >= step).sum()) for step in range(int(steps.max()) + 1)]
    assert ran == [len(rows), *left]
    assert len(set(left)) > 2


def test_edits_that_need_nothing_get_nothing(model: PreTrainedModel, tokenizer, facts) -> None:
    targets = TargetOptimizer(stop=1e3).optimize(model, expert_layers(model)[1], rows_of(tokenizer, facts), 0)
    assert not targets.deltas.any()
    assert not targets.steps.any()
    assert bool((targets.nll > 0).all())


@pytest.mark.parametrize("token_budget", [1, 120])
def test_batches_do_not_matter(model: PreTrainedModel, tokenizer, facts, token_budget: int) -> None:
    """Edits alone or together, so with other padding on the left."""
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    batches: list[tuple[int, int]] = []
    settings = {"steps": 5, "stop": 0.0}
    parted = TargetOptimizer(**settings, token_budget=token_budget).optimize(
        model, layer, rows, 0, progress=lambda *at: batches.append(at)
    )
    assert batches[-1] == (len(facts), len(facts))
    assert len(batches) > 1
    together = TargetOptimizer(**settings).optimize(model, layer, rows, 0)
    torch.testing.assert_close(parted.deltas, together.deltas, **STEPS)
    torch.testing.assert_close(parted.nll, together.nll, rtol=1e-3, atol=1e-4)
    assert torch.equal(parted.steps, together.steps)


def padded(rows: list[TargetRow]) -> int:
    """Tokens of a batch whose rows are padded on both sides of the edit token."""
    return len(rows) * sum(max(len(row.parts[side]) for row in rows) for side in (0, 1))


@pytest.mark.parametrize(("token_budget", "sizes"), [(1, [1] * 8), (150, None), (10**6, [8])])
def test_batches_are_as_large_as_the_budget(
    model: PreTrainedModel, tokenizer, facts, token_budget: int, sizes: list[int] | None
) -> None:
    """Every edit is in one batch, with others of similar length."""
    rows = rows_of(tokenizer, [*facts, *facts], contexts=("",))
    by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
    # from the edit token on, then before it
    extents = [tuple(max(len(row.parts[side]) for row in own) for side in (1, 0)) for own in by_edit]
    ordered = [by_edit[edit] for edit in sorted(range(len(by_edit)), key=extents.__getitem__)]
    done, ran = [0], list[int]()
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    optimizer = TargetOptimizer(steps=1, stop=0.0, token_budget=token_budget)
    optimizer.optimize(model, expert_layers(model)[1], rows, 0, progress=lambda some, _: done.append(some))
    assert done[-1] == len(by_edit) == 8
    batches = [ordered[first:last] for first, last in pairwise(done)]
    assert sizes is None or [len(batch) for batch in batches] == sizes
    assert sizes is not None or 1 < len(batches) < 8
    for number, batch in enumerate(batches):
        together = [row for own in batch for row in own]
        assert len(batch) == 1 or padded(together) <= token_budget
        if number + 1 < len(batches):  # there was no room for one more
            assert padded([*together, *batches[number + 1][0]]) > token_budget
        assert len(together) in ran


def rows_of_this_rank() -> int:
    """Rows of the first batch that this rank runs."""
    whole, ran = small_edits.model(), list[int]()
    whole.model.layers[2].self_attn.q_proj.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    rows = rows_of(small_edits.tokenizer(), small_edits.FACTS)
    TargetOptimizer(steps=1, stop=0.0).optimize(whole, expert_layers(whole)[1], rows, 0, ranks=Ranks())
    return ran[0]


def test_every_rank_gets_edits_to_work_on() -> None:
    assert sorted(run_ranks(rows_of_this_rank, 2)) == [3, 6]  # three rows for each of three edits


def test_padding_token_does_not_matter(model: PreTrainedModel, tokenizer, facts) -> None:
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    one, other = (TargetOptimizer(steps=3, stop=0.0).optimize(model, layer, rows, pad) for pad in (0, 77))
    # masked out, so it takes part in nothing but the batches of the experts
    torch.testing.assert_close(one.deltas, other.deltas, **STEPS)


def test_without_contexts_and_neutral_prompts(model: PreTrainedModel, plain_hidden, tokenizer, facts) -> None:
    settings = TargetOptimizer(steps=3, stop=0.0)
    rows = rows_of(tokenizer, facts, contexts=("",), neutral=False)
    targets = settings.optimize(model, expert_layers(model)[1], rows, 0)
    norm = norms(model, plain_hidden, 1, rows).tolist()
    model.eval().requires_grad_(False)
    for edit in range(len(facts)):
        delta, _, _ = plain_target(model, 1, [rows[edit]], settings, norm[edit])
        torch.testing.assert_close(targets.deltas[edit], delta, **STEPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"clamp": -1.0}, "clamp must be positive, got -1.0"),
        ({"clamp": float("nan")}, "clamp must be positive, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"kl": -1.0}, "kl must be at least 0, got -1.0"),
        ({"autocast": "float16"}, "autocast must be 'bfloat16' or None, got 'float16'"),
        ({"stop": float("nan")}, "stop must be at least 0, got nan"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TargetOptimizer(**arguments)


class Waiting(TorchDispatchMode):
    """Notes the operations for whose result a GPU has to be waited for, or which move data between devices."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "lift_fresh", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        masks = [i for i in (args[1] if name == "index" else ()) if i is not None and i.dtype is torch.bool]
        if masks or any(name.startswith(part) or name.startswith(f"_{part}") for part in self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe"])
def test_a_step_waits_for_nothing(make_model, tokenizer, facts, monkeypatch, model_type: str) -> None:
    """So that it can be recorded as a CUDA graph; of the mask transformers does not ask while it is recorded."""
    model = make_model(model_type)
    model.set_experts_implementation("grouped_mm")
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
    with inference(model, gradients=True):
        batch = targets_module._Batch(TargetOptimizer(steps=1), model, layer, by_edit, 0)
        deltas = torch.zeros(len(by_edit), 32)
        batch.whole_step(deltas)  # places are found once
        with Waiting() as waiting:
            batch.whole_step(deltas)
    assert not waiting.found


def test_recorded_steps_are_replayed_until_half_of_the_rows_are_done(model, tokenizer, facts, monkeypatch) -> None:
    recorded: list[int] = []

    def record(step, example):
        recorded.append(len(example))
        return step

    monkeypatch.setattr(targets_module, "can_record", lambda model, layer: True)
    monkeypatch.setattr(targets_module, "record", record)
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    settings = {"steps": 12, "learning_rate": 0.5, "clamp": 4.0, "weight_decay": 0.0, "stop": 1.5}
    expected = TargetOptimizer(**settings).optimize(model, layer, rows, 0)
    assert not recorded
    found = TargetOptimizer(**settings, cuda_graphs=True).optimize(model, layer, rows, 0)
    assert 1 <= len(recorded) < int(expected.steps.max())
    assert torch.equal(found.steps, expected.steps)
    # rows of finished edits run along, which changes the order of sums
    torch.testing.assert_close(found.deltas, expected.deltas, rtol=1e-3, atol=1e-4)


def test_a_step_that_cannot_be_recorded_is_run_as_ever(model, tokenizer, facts, monkeypatch) -> None:
    monkeypatch.setattr(targets_module, "can_record", lambda model, layer: True)
    monkeypatch.setattr(targets_module, "record", lambda step, example: None)
    layer, rows = expert_layers(model)[1], rows_of(tokenizer, facts)
    expected = TargetOptimizer(steps=3, stop=0.0).optimize(model, layer, rows, 0)
    found = TargetOptimizer(steps=3, stop=0.0, cuda_graphs=True).optimize(model, layer, rows, 0)
    assert torch.equal(found.deltas, expected.deltas)
