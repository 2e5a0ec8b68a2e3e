"""Tests of reading YAML: unchanged results, and errors for texts that would take all memory or the stack."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, get_loader

from lit_moeedit import safe_yaml
from lit_moeedit.safe_yaml import OutsizeError, check

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=20,
)


def size(value: Any) -> int:
    """Count the values in a value, with keys, and with the values of an alias at each of its places."""
    if isinstance(value, dict):
        return 1 + sum(1 + size(item) for item in value.values())
    return 1 + sum(map(size, value)) if isinstance(value, list) else 1


@settings(max_examples=40)
@given(VALUES, st.integers(0, 3), st.integers(1, 400))
def test_values_are_counted_with_aliases_written_out(value: Any, doublings: int, most: int) -> None:
    for _ in range(doublings):
        value = [value, value]  # the same object, which YAML writes once, with an alias
    text = yaml.safe_dump(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_yaml, "MAX_VALUES", most)
        if size(yaml.safe_load(text)) > most:
            with pytest.raises(OutsizeError, match=f"more than {most} values"):
                check(text)
        else:
            check(text)


LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 200,000 values"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("{a: " * 5000, "nested deeper than 100 levels"),
        ("- " * 5000, "nested deeper than 100 levels"),
        ("value: &a [*a, *a]", r"*a refers to no anchor, or to a value that contains it"),
        ("value: [&a 1, &a [*a]]", r"*a refers to no anchor, or to a value that contains it"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1", "while parsing a flow sequence"),
        ("\0", "unacceptable character"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_command_line_says(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = get_loader("yaml")
    safe_yaml.install()
    try:
        parser = ArgumentParser(prog="it")
        parser.add_argument("--value", type=list[int])
        with pytest.raises(SystemExit):
            parser.parse_string(text)
    finally:
        safe_yaml.set_loader("yaml", before, exceptions=(yaml.YAMLError,))
    assert message in capsys.readouterr().err


def test_a_config_is_read_as_it_always_was() -> None:
    text = "a: &x {b: [1, 2.5, null]}\nc: *x\nd: 1e-3\n"
    before = get_loader("yaml")(text)
    assert safe_yaml.load(text) == before == {"a": {"b": [1, 2.5, None]}, "c": {"b": [1, 2.5, None]}, "d": 1e-3}
