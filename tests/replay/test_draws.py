"""Draws: the same in every process and after a resume, fair on average, and by need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.data.encoding import Encoding
from lit_moeedit.replay import Draws


def statements(count: int, each: int = 1) -> dict[str, list[Encoding]]:
    return {f"fact {i}": [Encoding([i, j], 1) for j in range(each)] for i in range(count)}


def drawn(draws: Draws, count: int, batches: int, own: dict[str, list[Encoding]], **kwargs: object) -> Counter[int]:
    found: Counter[int] = Counter()
    for batch in range(batches):
        rows = draws.draw(own, count, batch * count, batch, **kwargs)  # type: ignore[arg-type]
        found.update(row.ids[0] for row in rows)
    return found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 7), st.integers(1, 40))
def test_a_draw_depends_on_its_arguments_alone(seed: int, batch: int, rank: int, facts: int) -> None:
    own = statements(facts, 3)
    first, second = (Draws(seed).draw(own, 5, 7 * batch, batch, rank, {"fact 0": 1.0}) for _ in range(2))
    assert first == second and len(first) == 5


def test_ranks_draw_others() -> None:
    own = statements(50, 3)
    ranks = [Draws().draw(own, 8, 8 * rank, 0, rank) for rank in range(4)]
    assert len({row.ids[0] for rows in ranks for row in rows}) == 32


def test_without_needs_every_fact_is_stated_equally_often() -> None:
    found = drawn(Draws(3), 4, 50, statements(20))
    assert set(found.values()) == {10}


def test_by_need_no_fact_waits_and_a_lost_one_comes_more_often() -> None:
    needs = dict.fromkeys(statements(20), 0.25) | {"fact 7": 1.0}
    found = drawn(Draws(), 4, 100, statements(20), needs=needs)
    # half of 400 draws go round, 10 of each; of the others fact 7 has the share 1 / (1 + 19 * 0.25) = 0.17
    assert min(found.values()) >= 10 and 30 <= found[7] <= 60


def test_safe_facts_are_left_out_and_unknown_ones_are_not() -> None:
    needs = dict.fromkeys(statements(20), 0.1) | {"fact 7": 1.0}
    del needs["fact 3"]
    found = drawn(Draws(), 4, 100, statements(20), needs=needs)
    # half of 400 draws go round; of the others fact 7 has the share 1 / (1 + 0.5 + 18 * 0.1) = 0.30
    assert found.keys() == {3, 7} and found[3] >= 10 and 50 <= found[7] <= 90
    safe = dict.fromkeys(statements(20), 0.0)
    assert [len(Draws().draw(statements(20), 4, 0, 0, 0, safe, least)) for least in (0, 1)] == [0, 1]


def test_the_number_of_rows_is_right_on_average_and_the_same_on_all_ranks() -> None:
    counts = [Draws(1).count(3.2, batch) for batch in range(2000)]
    assert set(counts) == {3, 4} and abs(sum(counts) / 2000 - 3.2) < 0.03  # three standard errors
    assert Draws().count(2.0, 5) == 2


def test_all_statements_of_a_fact_come() -> None:
    rows = Draws().draw(statements(1, 4), 40, 0, 0)
    assert {row.ids[1] for row in rows} == {0, 1, 2, 3}
    assert Draws().draw({}, 3, 0, 0) == []
