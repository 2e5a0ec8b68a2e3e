"""Tests of token budgets: chosen by free memory, and halved when it runs out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedModel

from lit_moeedit.data.encoding import Encoding, encode
from lit_moeedit.editing import Editor, TargetOptimizer, evaluate, second_moments
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.models import token_budget as budgets
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.token_budget import (
    MAX_TOKENS,
    MEMORY_SHARE,
    TokenBudget,
    TooLittleMemoryError,
    forward_cost,
    free_memory,
    tokens_that_fit,
)
from lit_moeedit.planning.dry_run import Words, empty_model
from lit_moeedit.planning.fake_tensors import CostCounter
from lit_moeedit.sharding.ranks import RankError, RankOutOfMemoryError, Ranks, is_out_of_memory
from tests.processes import run_ranks


@contextmanager
def memory_for(model: PreTrainedModel, tokens: int, layer: int = 0) -> Iterator[list[int]]:
    """Let forwards of more tokens run out of memory in a layer, and list the numbers of tokens tried."""
    tried: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tried.append(hidden.shape[0] * hidden.shape[1])
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has …")

    handle = model.model.layers[layer].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


def phases(model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any) -> dict[str, Callable[[Any], Any]]:
    """Make each phase with a budget, by name, as a function from the budget to tensors."""
    layers = list(expert_layers(model).values())
    encoded = encode(tokenizer, [f.prompt for f in facts], [""] * 4, [f.subject for f in facts], "subject_last")
    prompts = [Encoding(e.ids, len(e.ids), e.edit_token) for e in encoded]
    rows = Editor([0, 1]).encode(tokenizer, facts).rows

    def statistics(budget: Any) -> Any:
        found = second_moments(model, tokenizer, layers[:2], texts, budget)
        return [x for moments in found.values() for x in (moments.total, moments.count, moments.tokens)]

    def targets(budget: Any) -> Any:
        optimizer = TargetOptimizer(steps=3, stop=0.0, token_budget=budget)
        found = optimizer.optimize(model, layers[1], rows, 0)
        return [found.deltas, found.nll, found.steps]

    def features(budget: Any) -> Any:
        found = edit_tokens(model, prompts, layers[1], layers[0], 0, budget)
        return [found.hidden, found.keys.key, found.keys.gate, found.keys.expert, found.keys.token]

    def evaluation(budget: Any) -> Any:
        return list(evaluate(model, tokenizer, facts, token_budget=budget).success.compute().values())

    def routing(budget: Any) -> Any:
        trace = trace_routing(model, tokenizer, texts, budget)
        return [*trace.experts.values(), *trace.probabilities.values()]

    local = locals()
    return {name: local[name] for name in ("statistics", "targets", "features", "evaluation", "routing")}


@pytest.mark.parametrize("budget", ["auto", 10_000])
@pytest.mark.parametrize("phase", ["statistics", "targets", "features", "evaluation", "routing"])
def test_a_phase_goes_on_with_fewer_tokens_where_memory_runs_out(
    model, tokenizer, facts, texts, unchanged, caplog, phase: str, budget: Any
) -> None:
    work = phases(model, tokenizer, facts, texts)[phase]
    expected = work(100_000)
    # of the largest batch about a third; targets need the rows of one edit
    with memory_for(model, 10**9) as tried:
        work(100_000)
    room = max(tried) // 3 if phase != "targets" else 45
    unchanged(model)
    with caplog.at_level(logging.WARNING), memory_for(model, room, layer=1 if phase == "statistics" else 0) as tried:
        found = work(budget)
    assert max(tried) > room >= min(tried)
    assert f"{phase}: memory ran out; going on with at most" in caplog.text
    for one, other in zip(found, expected, strict=True):
        # float32 sums over other batches
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("phase", ["statistics", "targets", "features", "evaluation", "routing"])
def test_where_one_row_is_too_much_the_phase_says_what_is_missing(
    model, tokenizer, facts, texts, unchanged, phase: str
) -> None:
    work = phases(model, tokenizer, facts, texts)[phase]
    work("auto")  # the hooks by which transformers catches what routers say stay there from the first time on
    unchanged(model)
    message = rf"{phase}: cpu has no room for the smallest batch, \d+ tokens \(3.50 GiB were requested, .* GiB are free"
    with memory_for(model, 1), pytest.raises(TooLittleMemoryError, match=message):
        work("auto")


def test_an_edit_that_lacks_memory_for_a_row_changes_nothing(model, tokenizer, facts, texts, unchanged) -> None:
    unchanged(model)
    with memory_for(model, 20), pytest.raises(TooLittleMemoryError, match="no room for the smallest batch"):
        Editor([0, 1], targets=TargetOptimizer(steps=2)).edit(model, tokenizer, facts, texts)


def test_other_errors_are_raised_at_once(model) -> None:
    calls = []

    def fail(tokens: int) -> None:
        calls.append(tokens)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        TokenBudget(64, 1.0, model.device, Ranks()).run("features", fail, 1, 64)
    assert calls == [64]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RankOutOfMemoryError("rank 1 failed: OutOfMemoryError"), True),
        (RankError("rank 1 failed: KeyError"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_less_work_at_a_time_may_not_meet(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


@given(cost=st.floats(1, 1e12), free=st.floats(0, 1e13))
def test_what_auto_chooses_fits(cost: float, free: float) -> None:
    tokens = tokens_that_fit(cost, free)
    assert 1 <= tokens <= MAX_TOKENS
    assert tokens == 1 or tokens * cost <= MEMORY_SHARE * free * (1 + 1e-9)
    assert tokens == MAX_TOKENS or (tokens + 1) * cost > MEMORY_SHARE * free * (1 - 1e-9)


def test_a_number_is_obeyed_and_auto_follows_free_memory(model, monkeypatch) -> None:
    monkeypatch.setattr(budgets, "free_memory", lambda device, processes=1: 2_000_000)
    assert TokenBudget(99_999, 1e3, model.device, Ranks()).tokens == 99_999
    assert TokenBudget("auto", 1e3, model.device, Ranks()).tokens == 1600
    with pytest.raises(ValueError, match="token_budget must be a whole number or 'auto', got 'all'"):
        TokenBudget("all", 1.0, model.device, Ranks())  # type: ignore[arg-type]


def test_free_memory_of_a_cpu_is_shared_by_its_processes() -> None:
    free = free_memory(torch.device("cpu"))
    assert free > 2**20
    assert free_memory(torch.device("cpu"), 4) < free / 2


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("qwen3_moe", {"hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 32, "head_dim": 64}),
        ("gpt_oss", {"hidden_size": 640, "intermediate_size": 640, "num_local_experts": 8, "num_attention_heads": 8}),
        ("mixtral", {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_covers_what_a_token_takes(model_type: str, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """Count the bytes of tensors at the peak on fake tensors, with all experts at once."""
    tokens, tokenizer = 4096, Words()
    with empty_model(AutoConfig.for_model(model_type, num_hidden_layers=3, **sizes), dtype) as model:
        layers = list(expert_layers(model).values())
        counter = CostCounter([*model.parameters(), *model.buffers()])
        with counter, counter.phase("statistics"):
            texts = [" ".join(["word"] * 64)] * (tokens // 64)
            moments = second_moments(model, tokenizer, layers, texts, tokens, gated=True, grouped=True)
        sums = sum(x.nbytes for own in moments.values() for x in own.tensors().values())
        # masks and what does not grow with the tokens count, too
        taken = (counter.phases["statistics"].peak - counter.phases["statistics"].held - sums) / tokens
        estimate = forward_cost(model, layers[-1])
    # above by what MEMORY_SHARE leaves at least; a budget of a fourth of what fits would waste a card
    assert MEMORY_SHARE * taken <= estimate <= 4 * taken


def _one_rank_lacks_memory(failing: int) -> tuple[list[int], list[int]]:
    ranks, tried = Ranks(), []

    def work(tokens: int) -> list[int]:
        tried.append(tokens)
        for number, (_, mine) in enumerate(ranks.shard(list(range(5)))):
            if ranks.rank == failing and tokens > 20 and number == 1 and mine:
                raise torch.OutOfMemoryError("out of memory")
        ranks.check_errors()
        return [tokens]

    budget = TokenBudget("auto", 1.0, torch.device("cpu"), ranks)
    return budget.run("statistics", work, 10, 100), tried


def _another_fails_otherwise() -> str:
    ranks = Ranks()

    def work(tokens: int) -> None:
        raise torch.OutOfMemoryError("out of memory") if ranks.rank else KeyError("a key")

    try:
        TokenBudget(64, 1.0, torch.device("cpu"), ranks).run("statistics", work, 1, 64)
    except (RankError, KeyError) as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def _all_fail(*errors: BaseException | None) -> str:
    try:
        Ranks.current().check_errors(errors[Ranks.current().rank])
    except (RankError, FloatingPointError) as error:
        Ranks.current().forget()
        return f"{type(error).__name__} {error}"
    return "nothing"


def _all_three() -> tuple[Any, str, list[str]]:
    nan = FloatingPointError("a NaN")
    pairs = ((nan, None), (nan, torch.OutOfMemoryError("no room")), (nan, FloatingPointError("an inf")))
    return _one_rank_lacks_memory(1), _another_fails_otherwise(), [_all_fail(*pair) for pair in pairs]


def test_all_ranks_go_on_with_fewer_tokens_together() -> None:
    found = run_ranks(_all_three, 2)
    assert [result for result, *_ in found] == [([12], [MAX_TOKENS, 50, 25, 12])] * 2
    # the rank that lacked memory does not try again alone
    assert found[0][1] == "KeyError 'a key'"
    assert found[1][1].startswith("RankError rank 0 failed: KeyError: 'a key'; rank 1 failed: OutOfMemoryError")
    # values that are not finite are told from other errors, and both kinds at once are neither
    both = "RankError rank 0 failed: FloatingPointError: a NaN; rank 1 failed: OutOfMemoryError: no room"
    assert found[0][2] == ["FloatingPointError a NaN", both, "FloatingPointError a NaN"]
    of_other = "RankFloatingPointError rank 0 failed: FloatingPointError: a NaN"
    assert found[1][2] == [of_other, both, "FloatingPointError an inf"]


def test_what_a_failed_try_has_filled_memory_with_is_free_before_the_next(model) -> None:
    ranks, alive = Ranks(), []
    tensors: list[weakref.ref[torch.Tensor]] = []

    def work(tokens: int) -> int:
        alive.append(sum(tensor() is not None for tensor in tensors))
        large = torch.zeros(1000)
        tensors.append(weakref.ref(large))
        if tokens > 20:
            raise torch.OutOfMemoryError("no room")
        return tokens

    assert TokenBudget(64, 1.0, model.device, ranks).run("features", work, 1, 64) == 16
    assert alive == [0, 0, 0]
    assert not any(tensor() is not None for tensor in tensors)
