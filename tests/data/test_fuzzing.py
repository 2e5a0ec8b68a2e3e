"""Tests with random bytes as facts files and prompts: a few of them each time, many with -m slow.

`tests/data/fuzzing.py` runs the same checks for as long as wished. What it has found is kept here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fuzzing import find_token, mutated, one_file, one_prompt, seeds


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], bool]:
    return one_file(tmp_path_factory.mktemp("fuzzing"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x06[1$]",  # a number before something else, at the end of the file: the "$" was skipped
        b'\x03\x05a\tb\n"x"y\tz',  # the module csv quotes a tab in its message
    ],
)
def test_files_that_were_found(read: Callable[[bytes], bool], data: bytes) -> None:
    assert read(data)


@pytest.mark.parametrize(
    ("kind", "before", "subject", "after", "target"),
    [
        # unknown letters that stand together are one piece, and every byte had the offsets of all of it
        ("unigram", "", "ירושלים", ": where is it?", "Quito"),
        ("unigram", "n", "Peru\x05é", "C\u0301x", "½ʬ"),
    ],
)
def test_prompts_that_were_found(kind: str, before: str, subject: str, after: str, target: str) -> None:
    assert find_token(kind, "$A", before, subject, after, target)


@settings(max_examples=150)
@given(data=st.binary(min_size=3, max_size=60))
def test_any_bytes_are_read_or_refused(read: Callable[[bytes], bool], data: bytes) -> None:
    assert read(data)


@pytest.mark.parametrize("target", ["readers", "tokens"])
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_facts(read: Callable[[bytes], bool], target: str, count: int) -> None:
    draw, pool = random.Random(count), seeds(target)
    run = read if target == "readers" else one_prompt
    assert sum(run(mutated(draw, pool)) for _ in range(count)) > count // 2
