"""The memory of past edits: its rows against dense solutions in float64, and what it keeps when it must shrink."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.editing import EditMemory
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.solvers import EditProblem, Tucker, TuckerFactors, Woodbury
from tests.editing.recording import bits, held

EXPERTS, D_HIDDEN, D_MODEL = 4, 12, 5
RIDGE = 0.01


def edit(rows: int, seed: int, experts: int = EXPERTS, noise: float = 1.0, contexts: int = 1) -> GatedKeys:
    """Rows that visit two experts each, ``contexts`` of them alike but for noise."""
    generator = torch.Generator().manual_seed(seed)
    visited = torch.stack([torch.randperm(experts, generator=generator)[:2].sort().values for _ in range(rows)])
    key = torch.randn(rows, 2, D_HIDDEN, generator=generator, dtype=torch.float64)
    visited, key = visited.repeat_interleave(contexts, 0), key.repeat_interleave(contexts, 0)
    if contexts > 1:
        key = key + noise * torch.randn(key.shape, generator=generator, dtype=torch.float64)
    row = torch.arange(rows * contexts).repeat_interleave(2)
    return GatedKeys(row, visited.flatten(), key.flatten(0, 1))


def names(first: int, rows: int, contexts: int = 1) -> list[str]:
    return [f"fact {first + i}" for i in range(rows) for _ in range(contexts)]


def wanted(rows: int, seed: int = 99) -> Tensor:
    return torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(keys: GatedKeys) -> Tensor:
    """``[rows, E · d_hidden]``."""
    matrix = torch.zeros(int(keys.row.max()) + 1, EXPERTS, D_HIDDEN, dtype=torch.float64)
    matrix[keys.row, keys.expert] = keys.key
    return matrix.flatten(1)


def moments(keys: GatedKeys) -> Tensor:
    """``Σ k kᵀ`` of each expert, ``[E, d_hidden, d_hidden]``."""
    rows = dense(keys).view(-1, EXPERTS, D_HIDDEN)
    return torch.einsum("tej,tek->ejk", rows, rows)


def filled(limit: int = 10_000, batches: int = 3, rows: int = 4, contexts: int = 1, **keys: float) -> EditMemory:
    memory = EditMemory(limit)
    for i in range(batches):
        memory.remember({0: edit(rows, i, contexts=contexts, **keys)}, names(i * rows, rows, contexts))  # type: ignore[arg-type]
    return memory


def solve(keys: GatedKeys, residuals: Tensor) -> Tensor:
    """The edit's deltas, stacked to ``[E · d_hidden, d_model]``."""
    problem = EditProblem(keys.row, keys.expert, keys.key, residuals, EXPERTS, RIDGE)
    deltas = Woodbury().solve(problem)
    return torch.cat([deltas.dense(j).T for j in range(EXPERTS)])


# -- exact ------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=30)
@given(seed=st.integers(10, 10_000), rows=st.integers(1, 4), weight=st.sampled_from([0.5, 1.0, 4.0]))
def test_an_edit_is_the_minimum_over_new_and_past_rows_among_the_experts_it_visits(seed, rows, weight) -> None:
    memory = EditMemory(weight=weight)
    past = [edit(3, seed + i) for i in range(2)]
    for i, keys in enumerate(past):
        memory.remember({0: keys}, names(3 * i, 3))
    new, residuals = edit(rows, seed + 2), wanted(rows, seed)
    got = solve(*memory.extend(0, new, residuals, names(100, rows)))
    visited = torch.isin(torch.arange(EXPERTS), new.expert).repeat_interleave(D_HIDDEN)
    design = torch.cat([dense(new), *(weight**0.5 * dense(keys) for keys in past)])[:, visited]
    goal = torch.cat([residuals, residuals.new_zeros(6, D_MODEL)])
    expected = torch.linalg.solve(design.T @ design + RIDGE * torch.eye(design.shape[1]), design.T @ goal)
    # float64, in systems of condition up to 1e5
    torch.testing.assert_close(got[visited], expected, rtol=1e-8, atol=1e-9)
    assert not got[~visited].any()


def test_past_outputs_move_less() -> None:
    new, residuals = edit(3, 50), wanted(3)
    past = torch.cat([dense(edit(4, i)) for i in range(3)])
    alone = float((past @ solve(new, residuals)).square().sum())
    moved = []
    for weight in (1.0, 16.0):
        memory = EditMemory(weight=weight)
        memory.load_state_dict(filled(rows=4).state_dict())
        moved.append(float((past @ solve(*memory.extend(0, new, residuals, names(100, 3)))).square().sum()))
    assert moved[0] < 0.1 * alone
    assert moved[1] < 0.5 * moved[0]


@settings(derandomize=True, max_examples=10)
@given(seed=st.integers(0, 10_000), ranks=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12)))
def test_where_experts_share_factors_all_past_rows_count(seed: int, ranks: tuple[int, int, int]) -> None:
    """The edit is the least objective, among all changes with these factors, over the new and all the past rows."""
    memory = EditMemory()
    past, new, residuals = edit(4, seed), edit(1, seed + 1), wanted(1, seed)
    memory.remember({0: past}, names(0, 4))
    weights = torch.randn(EXPERTS, D_MODEL, D_HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
    factors = TuckerFactors.hosvd(weights, ranks=ranks)
    rows, goal = memory.extend(0, new, residuals, ["new"], torch.arange(EXPERTS))
    problem = EditProblem(rows.row, rows.expert, rows.key, goal, EXPERTS, RIDGE)
    deltas = Tucker().with_factors(factors).solve(problem)
    # orthonormal factors: a change is its core, of as large a norm
    basis = torch.einsum("je,di->jdei", factors.expert, factors.input).reshape(EXPERTS * D_HIDDEN, -1)
    design, goal = torch.cat([dense(new), dense(past)]) @ basis, torch.cat([residuals, residuals.new_zeros(4, D_MODEL)])
    core = torch.linalg.solve(design.T @ design + RIDGE * torch.eye(len(design.T)), design.T @ goal @ factors.output)
    expected = (basis @ core @ factors.output.T).reshape(EXPERTS, D_HIDDEN, D_MODEL)
    for expert in range(EXPERTS):
        # float64, in systems of condition up to 1e5
        torch.testing.assert_close(deltas.dense(expert).T, expected[expert], rtol=1e-8, atol=1e-9)


def test_past_edits_of_other_experts_stay_where_experts_share_factors() -> None:
    experts, d_hidden, d_model = 8, 14, 10
    generator = torch.Generator().manual_seed(0)

    def keys(pair: list[int]) -> GatedKeys:
        key = torch.randn(6, d_hidden, generator=generator, dtype=torch.float64)
        return GatedKeys(torch.arange(3).repeat_interleave(2), torch.tensor(pair).repeat(3), key)

    past, new = keys([6, 7]), keys([0, 1])
    residuals = torch.randn(3, d_model, generator=generator, dtype=torch.float64)
    factors = TuckerFactors.hosvd(
        torch.randn(experts, d_model, d_hidden, generator=generator, dtype=torch.float64), ranks=(3, 9, 11)
    )
    memory = EditMemory()
    memory.remember({0: past}, names(0, 3))
    moved = {}
    for name, extended in (
        ("without", (new, residuals)),
        ("with", memory.extend(0, new, residuals, names(3, 3), torch.arange(experts))),
    ):
        rows, goal = extended
        problem = EditProblem(rows.row, rows.expert, rows.key, goal, experts, 1e-3)
        deltas = Tucker().with_factors(factors).solve(problem)
        old = EditProblem(past.row, past.expert, past.key, torch.zeros_like(residuals), experts)
        moved[name] = float(old.prediction(deltas).norm() / residuals.norm())
    assert moved["without"] > 0.05
    # the ridge is small
    assert moved["with"] < 1e-2 * moved["without"]


def test_the_order_of_edits_does_not_matter() -> None:
    new, residuals = edit(3, 50), wanted(3)
    solutions = []
    for order in ([0, 1, 2], [2, 0, 1]):
        memory = EditMemory()
        for i in order:
            memory.remember({0: edit(4, i)}, names(4 * i, 4))
        solutions.append(solve(*memory.extend(0, new, residuals, names(100, 3))))
    together = EditMemory()
    batches = [edit(4, i) for i in range(3)]
    row = torch.cat([keys.row + 4 * i for i, keys in enumerate(batches)])
    joined = GatedKeys(row, torch.cat([k.expert for k in batches]), torch.cat([k.key for k in batches]))
    together.remember({0: joined}, names(0, 12))
    solutions.append(solve(*together.extend(0, new, residuals, names(100, 3))))
    for other in solutions[1:]:
        torch.testing.assert_close(other, solutions[0], rtol=1e-9, atol=1e-10)  # float64


@settings(derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10_000), batches=st.integers(2, 5))
def test_batches_with_memory_are_one_batch(seed: int, batches: int) -> None:
    """With keys that stay, where every batch visits every expert, each asking for what the earlier ones have left."""
    every = torch.arange(EXPERTS)
    parts = [edit(4, 7 * seed + i) for i in range(batches)]
    # one row that visits all experts, in each batch
    everywhere = torch.randn(batches, EXPERTS, D_HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
    parts = [
        GatedKeys(torch.cat([k.row, every * 0 + 4]), torch.cat([k.expert, every]), torch.cat([k.key, own]))
        for k, own in zip(parts, everywhere, strict=True)
    ]
    goals, memory = [wanted(5, seed + i) for i in range(batches)], EditMemory()
    total = torch.zeros(EXPERTS * D_HIDDEN, D_MODEL, dtype=torch.float64)
    for i, (keys, goal) in enumerate(zip(parts, goals, strict=True)):
        left = goal - dense(keys) @ total
        total = total + solve(*memory.extend(0, keys, left, names(5 * i, 5)))
        memory.remember({0: keys}, names(5 * i, 5))
    row = torch.cat([keys.row + 5 * i for i, keys in enumerate(parts)])
    joined = GatedKeys(row, torch.cat([k.expert for k in parts]), torch.cat([k.key for k in parts]))
    # float64, in systems of condition up to 1e5, one after the other
    torch.testing.assert_close(total, solve(joined, torch.cat(goals)), rtol=1e-7, atol=1e-8)


def test_a_layer_without_memory_is_left_alone() -> None:
    keys, residuals = edit(2, 0), wanted(2)
    assert filled().extend(1, keys, residuals, names(0, 2)) == (keys, residuals)


# -- facts that are edited again --------------------------------------------------------------------------------------


def test_what_is_edited_again_is_left_out_and_is_in_once_afterwards() -> None:
    memory = filled(batches=2)
    again = edit(4, 77)
    rows, residuals = memory.extend(0, again, wanted(4), names(2, 4))  # the last two of batch 0, the first two of 1
    assert len(residuals) == 8
    expected = torch.cat([dense(again), dense(edit(4, 0))[:2], dense(edit(4, 1))[2:]])
    assert torch.equal(dense(rows), expected)
    memory.remember({0: again}, names(2, 4))
    assert memory.state_dict()[0]["facts"] == [f"fact {i}" for i in (0, 1, 6, 7, 2, 3, 4, 5)]
    assert torch.equal(dense(held(memory)), torch.cat([expected[4:], expected[:4]]))


def test_facts_get_other_names_in_rows_and_sketch() -> None:
    memory = EditMemory(limit=24)
    for i in range(8):
        memory.remember({0: edit(4, i)}, names(4 * i, 4))
    before = memory.state_dict()[0]
    assert "fact 0" in before["sketched"] and "fact 31" in before["facts"]
    memory.rename({"fact 0": "a", "fact 31": "b", "unknown": "c"})
    state = memory.state_dict()[0]
    assert state["facts"] == [*before["facts"][:-1], "b"]
    assert set(state["sketched"]) == {*before["sketched"], "a"} - {"fact 0"}
    assert torch.equal(state["key"], before["key"])


def test_a_fact_in_the_sketch_is_not_held_back_when_it_is_edited_again() -> None:
    memory, again = EditMemory(limit=24), edit(1, 500)
    strong = GatedKeys(again.row, again.expert, 10 * again.key)  # so that the sketch surely holds it
    memory.remember({0: strong}, ["old"])
    for i in range(8):
        memory.remember({0: edit(4, i)}, names(4 * i, 4))
    assert "old" in memory.state_dict()[0]["sketched"]
    residuals = wanted(1)

    def missed(fact: str) -> float:
        keys, goal = memory.extend(0, again, residuals, [fact])
        assert len(goal) > 1
        return float((residuals - dense(again) @ solve(keys, goal)).norm() / residuals.norm())

    assert missed("another with the same keys") > 0.9
    assert missed("old") < 0.05
    roomy = EditMemory()  # does not compress again
    roomy.load_state_dict(memory.state_dict())
    roomy.remember({0: again}, ["old"])
    state = roomy.state_dict()[0]
    assert "old" not in state["sketched"] and state["facts"].count("old") == 1
    keys = held(roomy)
    part = keys.select(keys.row <= int(keys.row.max()) - len(state["facts"]))
    for expert, key in zip(again.expert, again.key, strict=True):
        assert bool((part.expert == expert).any())
        assert float((part.key[part.expert == expert] @ key).abs().max()) < 1e-9  # float64


@pytest.mark.parametrize("between", [0.0, 1e-3, "a zero key"])
def test_other_facts_in_the_sketch_survive_what_contexts_hardly_span(between) -> None:
    """Three contexts of a fact that differ by next to nothing, and just by that along another fact's keys."""
    own = edit(1, 500)
    key = torch.randn(2, D_HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    key -= own.key * (key * own.key).sum(1, keepdim=True) / own.key.square().sum(1, keepdim=True)
    other = GatedKeys(own.row, own.expert, key)
    memory = EditMemory(limit=24)
    strong = (GatedKeys(keys.row, keys.expert, 10 * keys.key) for keys in (own, other))
    for name, keys in zip(("own", "other"), strong, strict=True):
        memory.remember({0: keys}, [name])
    for i in range(8):
        memory.remember({0: edit(4, i)}, names(4 * i, 4))
    assert {"own", "other"} <= set(memory.state_dict()[0]["sketched"])
    first = own.key
    if between == "a zero key":
        rest = (torch.zeros_like(first), first)
    else:
        rest = (first + between * key, first - between * key)
    again = GatedKeys(torch.arange(3).repeat_interleave(2), own.expert.repeat(3), torch.cat([first, *rest]))

    def missed(memory: EditMemory, fact: str, keys: GatedKeys) -> float:
        residuals = wanted(1).repeat(int(keys.row.max()) + 1, 1)
        changed = dense(keys) @ solve(*memory.extend(0, keys, residuals, [fact] * len(residuals)))
        return float((residuals - changed)[0].norm() / residuals[0].norm())

    roomy = EditMemory()  # does not compress again
    roomy.load_state_dict(memory.state_dict())
    assert missed(roomy, "a new fact", again) > 0.7  # three rows ask for it
    assert missed(roomy, "own", again) < 0.05
    held_back = missed(roomy, "a new fact", other)
    roomy.remember({0: again}, ["own"] * 3)
    assert held_back > 0.8
    # its keys are orthogonal to those of the other fact
    assert missed(roomy, "a new fact", other) > 0.98 * held_back


# -- compression ------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=25)
@given(limit=st.integers(1, 120), contexts=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_memory_is_bounded_and_deterministic(limit, contexts, seed) -> None:
    memories = [EditMemory(limit) for _ in range(2)]
    for i in range(5):
        for memory in memories:
            memory.remember({0: edit(4, seed + i, contexts=contexts)}, names(4 * i, 4, contexts))
        rows, keys = memories[0].size(0)
        assert keys <= limit and keys == len(held(memories[0]).row) and rows == len(held(memories[0]).row.unique())
        state = memories[0].state_dict()[0]
        assert sorted({*state["facts"], *state["sketched"]}) == sorted(set(names(0, 4 * (i + 1))))
        assert set(state["facts"]).isdisjoint(state["sketched"])
    assert bits(memories[0]) == bits(memories[1])


def test_contexts_of_a_fact_become_their_first_singular_vector() -> None:
    memory = filled(limit=10, batches=1, rows=4, contexts=3, noise=0.3)
    assert memory.size(0) == (4, 8)
    found, rows = dense(held(memory)), dense(edit(4, 0, contexts=3, noise=0.3))
    for i in range(4):
        exact = rows[3 * i : 3 * i + 3]
        values = torch.linalg.eigvalsh(exact @ exact.T)
        error = torch.linalg.matrix_norm(exact.T @ exact - torch.outer(found[i], found[i]), ord=2)
        torch.testing.assert_close(error, values[-2], rtol=1e-8, atol=1e-9)  # Eckart and Young
    lossless = filled(limit=10, batches=1, rows=4, contexts=3, noise=0.0)
    torch.testing.assert_close(moments(held(lossless)), moments(edit(4, 0, contexts=3, noise=0.0)))


def test_the_sketch_has_the_largest_eigenvalues_of_all_experts() -> None:
    rows, limit = 30, 20
    memory = filled(limit=limit, batches=1, rows=rows)
    new = names(0, rows)[-5:]  # five rows of two keys: half of the limit
    assert memory.state_dict()[0]["facts"] == new
    keys = edit(rows, 0)
    oldest, part = keys.select(keys.row < rows - 5), held(memory).select(held(memory).row < 10)
    exact, found = moments(oldest), moments(part)
    values = torch.linalg.eigvalsh(exact).flatten().sort(descending=True).values
    torch.testing.assert_close(torch.einsum("ejj->", exact - found), values[10:].sum())
    assert float(torch.linalg.eigvalsh(exact - found).min()) > -1e-9  # nothing is held that was not there


def test_the_newest_facts_stay_as_they_are() -> None:
    memory = EditMemory(limit=12)
    for i in range(10):  # eight facts of one key, and two of four
        experts = torch.arange(1 if i < 8 else 4)
        key = edit(2, i).key[: len(experts)]
        memory.remember({0: GatedKeys(torch.zeros_like(experts), experts, key)}, [f"fact {i}"])
    state = memory.state_dict()[0]
    assert state["facts"] == ["fact 9"] and state["sketched"] == sorted(names(0, 9))
    last = held(memory).row == int(held(memory).row.max())
    assert torch.equal(held(memory).key[last], edit(2, 9).key)


def test_a_sketch_of_few_directions_is_exact() -> None:
    """Keys that lie in two directions per expert need two vectors per expert, however many edits they come from."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(EXPERTS, 2, D_HIDDEN, generator=generator, dtype=torch.float64)
    memory, exact = EditMemory(limit=16), torch.zeros(EXPERTS, D_HIDDEN, D_HIDDEN, dtype=torch.float64)
    for i in range(6):
        keys = edit(4, i)
        mixed = torch.randn(len(keys.key), 1, 2, generator=generator, dtype=torch.float64) @ basis[keys.expert]
        keys = GatedKeys(keys.row, keys.expert, mixed[:, 0])
        exact += moments(keys)
        memory.remember({0: keys}, names(4 * i, 4))
    assert memory.size(0)[1] == 16
    torch.testing.assert_close(moments(held(memory)), exact, rtol=1e-8, atol=1e-8)


def test_a_compressed_memory_is_nearer_to_the_exact_objective_than_the_newest_facts_in_as_many_keys() -> None:
    def memory(limit: int, first: int = 0) -> EditMemory:
        made = EditMemory(limit)
        for i in range(first, 3):
            made.remember({0: edit(8, i, contexts=3, noise=0.1)}, names(8 * i, 8, 3))
        return made

    new, residuals = edit(3, 50), wanted(3)
    exact = dense(memory(10_000).extend(0, new, residuals, names(100, 3))[0])
    goal = torch.cat([residuals, residuals.new_zeros(len(exact) - 3, D_MODEL)])

    def objective(known: EditMemory) -> float:
        deltas = solve(*known.extend(0, new, residuals, names(100, 3)))
        return float((goal - exact @ deltas).square().sum() + RIDGE * deltas.square().sum())

    best, without = objective(memory(10_000)), objective(EditMemory())
    third, sixth = memory(48), memory(32)
    assert (third.size(0)[1], sixth.size(0)[1]) == (48, 32)
    # 3 contexts of 24 facts are one row each and some noise
    assert best <= objective(third) < best + 0.02 * (without - best)
    newest = memory(32, first=1)
    assert newest.size(0)[1] == 32 and not newest.state_dict()[0]["sketched"]
    assert best < objective(sixth) < objective(newest)


# -- state and settings -----------------------------------------------------------------------------------------------


def test_state_survives_a_checkpoint_bit_by_bit(tmp_path) -> None:
    memory = filled(limit=24, batches=8)
    torch.save(memory.state_dict(), tmp_path / "state")
    other = EditMemory(limit=24)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert bits(other) == bits(memory)
    for one in (memory, other):
        one.remember({0: edit(4, 60)}, names(1, 4))
    assert bits(other) == bits(memory)


def test_settings_and_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        EditMemory(limit=0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be positive"):
            EditMemory(weight=weight)
    keys = edit(2, 0)
    narrow = GatedKeys(keys.row, keys.expert, keys.key[:, 1:])
    with pytest.raises(ValueError, match="d_hidden=12, the model has 11: it was made with another model"):
        filled().extend(0, narrow, wanted(2), names(0, 2))
