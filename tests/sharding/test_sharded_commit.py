"""Edits of weights that DeepSpeed trains: seen at once, still there after the next step, undone bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_moeedit.sharding.commit import Commit
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from tests.processes import run_each, run_ranks
from tests.sharding.engines import (
    EXPERTS,
    Model,
    bits,
    commit,
    dense,
    import_deepspeed,
    make,
    master,
    model_weights,
    moments,
    some_deltas,
    step,
)
from tests.sharding.looking import peak_memory

pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
pytestmark = pytest.mark.deepspeed

CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in (torch.float32, torch.bfloat16)]


# -- the edit is what one process would do, and stays -----------------------------------------------------------------


def check_commit(engine: Any, ranks: Ranks, dtype: torch.dtype) -> None:
    before, deltas = master(engine), some_deltas()
    commit(engine, ranks, deltas)
    after = before + dense(deltas)
    # one product and one sum in float32
    torch.testing.assert_close(master(engine), after, rtol=1e-5, atol=1e-6)
    # two bfloat16 next to each other differ by at most 2⁻⁷
    close = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model_weights(engine), after.to(dtype), **close)
    assert torch.equal(model_weights(engine), master(engine).to(dtype))
    kept = bits(model_weights(engine), master(engine))
    for _ in range(2):
        step(engine)  # the learning rate is 0
        assert bits(model_weights(engine), master(engine)) == kept


def check_rollback(engine: Any, ranks: Ranks) -> None:
    step(engine)
    before = bits(model_weights(engine), master(engine), *moments(engine))
    with Transaction([engine.optimizer], ranks, reset_moments=True) as transaction:
        for seed in range(2):
            transaction.commit(engine.module.experts, some_deltas(seed))
            engine(torch.tensor(1.0, dtype=next(engine.module.buffers()).dtype))  # leaves it gathered, perhaps
        first, second = (moment.view(EXPERTS, -1) for moment in moments(engine))
        for moment in (first, second):
            assert not moment[[0, 2, 3]].any()
            assert moment[[1, 4]].any(-1).all()
        assert bits(model_weights(engine)) != before[:1]
        transaction.rollback()
        assert bits(model_weights(engine), master(engine), *moments(engine)) == before
    step(engine)
    assert bits(model_weights(engine), master(engine)) == before[:2]


def all_cases(cases: list[tuple[int, torch.dtype]]) -> None:
    ranks = Ranks()
    for stage, dtype in cases:
        try:
            check_commit(make(stage, dtype), ranks, dtype)
            check_rollback(make(stage, dtype), ranks)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, {dtype}: {error}") from error


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_edits_equal_those_of_one_process_and_stay(size: int) -> None:
    run_ranks(all_cases, size, CASES)


def test_edits_of_two_ranks_do_so_too(two: dict[str, Any]) -> None:
    assert "cases" in two


# -- why both copies have to be written -------------------------------------------------------------------------------


def gathered_only(engine: Any, ranks: Ranks, deltas: ExpertDeltas) -> None:
    import deepspeed

    weight, after = engine.module.experts, master(engine) + dense(deltas)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
        if ranks.rank == 0:
            weight.copy_(after)


def gathered_and_master(engine: Any, ranks: Ranks, deltas: ExpertDeltas) -> None:
    """What a commit does with a slice of each, done with all of both."""
    gathered_only(engine, ranks, deltas)
    master_only(engine, ranks, deltas)


def master_only(engine: Any, ranks: Ranks, deltas: ExpertDeltas) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(engine.module.experts, master(engine) + dense(deltas))


def survival(edit: Callable[[Any, Ranks, ExpertDeltas], None], dtype: torch.dtype) -> tuple[bool, bool]:
    """Under ZeRO-3: whether an edit is seen at once, and whether it is there after the next step."""
    # an even number of weights: DeepSpeed's function for the whole of them does not know padded partitions
    ranks, engine, deltas = Ranks(), make(3, dtype, model=Model(d_hidden=4)), some_deltas(d_hidden=4)
    wanted = (master(engine) + dense(deltas)).to(dtype)
    edit(engine, ranks, deltas)
    seen = torch.allclose(model_weights(engine), wanted, rtol=1e-5)
    step(engine)
    return seen, torch.allclose(model_weights(engine), wanted, rtol=1e-5)


def all_survivals() -> dict[str, tuple[bool, bool]]:
    return {
        edit.__name__: survival(edit, torch.bfloat16)
        for edit in (commit, gathered_only, master_only, gathered_and_master)
    }


def test_a_commit_is_seen_and_stays_and_half_of_one_does_not(two: dict[str, Any]) -> None:
    for found in two["survivals"]:
        assert found == {
            "commit": (True, True),
            "gathered_only": (True, False),
            "master_only": (False, True),
            "gathered_and_master": (True, True),
        }


# -- training goes on as if the weights had always been there ---------------------------------------------------------


def differences_after_a_step(lr: float) -> list[float]:
    """By case: how far an edited and an unedited run, given the same gradients, are from differing by the delta."""
    ranks, errors = Ranks(), []
    for stage, dtype in CASES:
        edited, unedited = make(stage, dtype, lr), make(stage, dtype, lr)
        commit(edited, ranks, some_deltas())
        start = master(unedited)
        for engine in (edited, unedited):
            step(engine)
        assert not torch.equal(master(unedited), start)
        error = master(edited) - master(unedited) - dense(some_deltas())
        errors.append(float(error.abs().max() / dense(some_deltas()).abs().max()))
    return errors


def test_the_next_step_adds_to_the_edit(two: dict[str, Any]) -> None:
    for errors in two["next step"]:
        assert max(errors) < 1e-5  # the weights are about 1, the deltas 0.1, and float32 has 1e-7


# -- moments after a resume -------------------------------------------------------------------------------------------


def reset_after_a_resume(folder: str) -> dict[str, Any]:
    """By case: edited and other experts' moments after an edit that comes before the first step of a resumed run."""
    ranks, found = Ranks(), {}
    for stage, dtype in ((stage, dtype) for stage, dtype in CASES if stage in (1, 2)):
        path = f"{folder}/{stage}-{dtype}"
        make(stage, dtype).save_checkpoint(path)
        for name, engine in (("new", make(stage, dtype, steps=0)), ("trained", make(stage, dtype))):
            engine.load_checkpoint(path)
            before = linked_moments(engine)
            engine.load_checkpoint(path)  # and the links are gone again
            kept = Transaction([engine.optimizer], ranks, reset_moments=True)
            kept.commit(engine.module.experts, some_deltas())
            after = linked_moments(engine)
            kept.rollback()
            found[f"stage {stage}, {dtype}, {name}"] = before, after, linked_moments(engine)
    return found


def linked_moments(engine: Any) -> list[Tensor]:
    """What the next step of a new engine links."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    return moments(engine)


def test_moments_are_reset_in_an_edit_right_after_a_resume(two: dict[str, Any]) -> None:
    for cases in two["resume"]:
        assert len(cases) == 8
        for case, (before, after, undone) in cases.items():
            assert len(before) == 2, case
            for old, new, again in zip(before, after, undone, strict=True):
                assert old.any(-1).all() and torch.equal(old, again), case
                assert not new[[0, 2, 3]].any() and torch.equal(new[[1, 4]], old[[1, 4]]), case


# -- memory -----------------------------------------------------------------------------------------------------------


WIDTHS = (256, 512, 1024)
"""``d_model`` and ``d_hidden``: of 16 experts 4, 16 and 64 MiB in float32."""


class Square(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = torch.nn.Parameter(torch.randn(16, width, width))

    def forward(self, scale: Tensor) -> Tensor:
        return scale * self.experts.sum()


def memory_ratio(width: int, dtype: torch.dtype) -> float:
    """The most that a commit holds, as a multiple of this rank's shard (model and master weights)."""
    from deepspeed.utils import safe_get_local_fp32_param

    engine = make(3, dtype, model=Square(width), steps=0)
    weight, terms = engine.module.experts, 32
    expert, row = torch.arange(16).repeat_interleave(terms), torch.arange(terms).repeat(16)
    deltas = ExpertDeltas(expert, row, torch.randn(terms, width), torch.randn(16 * terms, width), 16)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (weight.ds_tensor, safe_get_local_fp32_param(weight))}
    with torch.profiler.profile(profile_memory=True) as profile:
        commit(engine, Ranks(), deltas)
    return peak_memory(profile) / sum(held.values())


def memory() -> list[float]:
    return [memory_ratio(width, dtype) for dtype in (torch.float32, torch.bfloat16) for width in WIDTHS]


def test_a_local_commit_needs_the_shard_once_more_and_little_else(two: dict[str, Any]) -> None:
    for ratios in two["memory"]:
        assert all(1.0 <= ratio <= 2.0 for ratio in ratios)
        for same_dtype in (ratios[: len(WIDTHS)], ratios[len(WIDTHS) :]):
            # a layer of sixteen times the size: the ratio may only fall, by what does not grow with the layer
            assert max(same_dtype) - min(same_dtype) < 0.3
            assert same_dtype[-1] <= same_dtype[0]


# -- layouts ----------------------------------------------------------------------------------------------------------


def layouts() -> None:
    ranks = Ranks()
    # transposed experts
    for stage in (1, 3):
        engine = make(stage, torch.float32, model=Model(transposed=True))
        before = master(engine)
        commit(engine, ranks, some_deltas(), transposed=True)
        torch.testing.assert_close(model_weights(engine), before + dense(some_deltas(), transposed=True))
    # parameters that stay gathered, of which a forward has just left a copy
    engine = make(3, torch.bfloat16, stage3_param_persistence_threshold=10**6)
    check_commit(engine, ranks, torch.bfloat16)
    check_rollback(engine, ranks)
    # the optimizer, and with it the parameters, in the memory of the CPU
    for stage, zero in ((2, {}), (3, {}), (3, {"offload_param": {"device": "cpu"}})):
        engine = make(stage, torch.bfloat16, offload_optimizer={"device": "cpu"}, **zero)
        check_commit(engine, ranks, torch.bfloat16)
        check_rollback(engine, ranks)


def test_transposed_persistent_and_offloaded_parameters(two: dict[str, Any]) -> None:
    assert "layouts" in two


def without_optimizer() -> None:
    deepspeed = import_deepspeed()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=Model(), config=config)
    before, ranks = model_weights(engine), Ranks()
    with Transaction((), ranks) as transaction:
        transaction.commit(engine.module.experts, some_deltas())
        torch.testing.assert_close(model_weights(engine), before + dense(some_deltas()))
        transaction.rollback()
    assert bits(model_weights(engine)) == bits(before)


def test_evaluation_has_no_optimizer(two: dict[str, Any]) -> None:
    assert "no optimizer" in two


# -- all or nothing ---------------------------------------------------------------------------------------------------


class Broken(ExpertDeltas):
    """Deltas that cannot be computed for expert 3."""

    def rows(self, expert: int) -> tuple[Tensor, Tensor] | None:
        if expert == 3:
            raise MemoryError("no room for expert 3")
        return super().rows(expert)


def failing(rank: int) -> list[str]:
    """Messages of commits that fail on one rank, after which nothing has changed on any."""
    ranks, messages = Ranks(), []
    for stage, dtype in CASES:
        engine = make(stage, dtype)
        before = bits(model_weights(engine), master(engine))
        good = some_deltas(1)
        bad = Broken(good.expert_index, good.row_index, good.left, good.right, EXPERTS)
        try:
            with Transaction([engine.optimizer], ranks) as transaction:
                transaction.commit(engine.module.experts, some_deltas())
                transaction.commit(engine.module.experts, bad if ranks.rank == rank else good)
        except (MemoryError, RankError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        assert bits(model_weights(engine), master(engine)) == before, (stage, dtype)
        step(engine)
        assert bits(model_weights(engine), master(engine)) == before, (stage, dtype)
    return messages


def test_a_failure_on_one_rank_changes_nothing_on_any(two: dict[str, Any]) -> None:
    first, second = two["failing"]
    assert first == ["RankError: rank 1 failed: MemoryError: no room for expert 3"] * len(CASES)
    assert second == ["MemoryError: no room for expert 3"] * len(CASES)


def failing_while_sending(rank: int) -> list[str]:
    """The same, where one rank fails between two exchanges, with what another one has sent."""
    ranks, messages, write = Ranks(), [], Commit._write_others

    def fail(self: Commit, expert: int, *args: Any) -> None:
        if expert == 2 and ranks.rank == rank:
            raise MemoryError("no room for expert 2")
        write(self, expert, *args)

    for stage in (1, 2):
        engine = make(stage, torch.bfloat16)
        before = bits(model_weights(engine), master(engine))
        Commit._write_others = fail  # type: ignore[method-assign]
        try:
            commit(engine, ranks, some_deltas())
        except (MemoryError, RankError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        finally:
            Commit._write_others = write  # type: ignore[method-assign]
        assert bits(model_weights(engine), master(engine)) == before, stage
    return messages


def test_a_failure_between_two_exchanges_does_so_neither(two: dict[str, Any]) -> None:
    first, second = two["failing while sending"]
    assert first == ["RankError: rank 1 failed: MemoryError: no room for expert 2"] * 2
    assert second == ["MemoryError: no room for expert 2"] * 2


def wrong_optimizer() -> str:
    engine = make(2, torch.bfloat16)
    engine.module.experts.data.zero_()  # as if other weights had been loaded behind the optimizer's back
    try:
        commit(engine, Ranks(), some_deltas())
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_master_copy_of_other_weights_is_refused(two: dict[str, Any]) -> None:
    assert all("are not those of the model" in message for message in two["wrong optimizer"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the functions of this file found on two ranks."""
    calls = {
        "cases": (all_cases, CASES),
        "survivals": (all_survivals,),
        "next step": (differences_after_a_step, 0.01),
        "resume": (reset_after_a_resume, str(tmp_path_factory.mktemp("resume"))),
        "memory": (memory,),
        "layouts": (layouts,),
        "no optimizer": (without_optimizer,),
        "failing": (failing, 1),
        "wrong optimizer": (wrong_optimizer,),
        # last: ranks that do not fail together leave their group unusable
        "failing while sending": (failing_while_sending, 1),
    }
    return run_each(calls, 2)
