"""The further metrics at their edges: texts of other scripts, nothing to count, arguments that are refused, plots."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import tensor

from lit_moeedit.data.probes import PROBE_KINDS
from lit_moeedit.metrics import (
    CopyAccuracy,
    Fluency,
    GenerationMatch,
    ProbabilityGap,
    ProbeAccuracy,
    WeightGrowth,
    copy_accuracy,
    generation_match,
    ngram_entropy,
    probability_gap,
    probe_accuracy,
    weight_growth,
)


@pytest.mark.parametrize(
    ("text", "target", "exact", "contained"),
    [
        ("Rome.", "Rome", 1, 1),
        (" Rome ", "Rome.", 1, 1),
        ("rome", "Rome", 0, 0),
        ("Rome, of course", "Rome", 0, 1),
        ("Romeo", "Rome", 0, 0),
        ("in R2-D2", "D2", 0, 1),
        ("C++11", "C++", 0, 1),
        ("3.50", "3.5", 0, 0),
        ("it costs $5", "$5", 0, 1),
        ("a.b", "a+b", 0, 0),
        ("它是北京的", "北京", 0, 1),
        ("αβγ", "β", 0, 0),
        ("", "Rome", 0, 0),
    ],
)
def test_matches(text: str, target: str, exact: int, contained: int) -> None:
    found = generation_match([text], [target])
    assert (found["generation_exact"], found["generation_contained"]) == (exact, contained)


def test_fluency_is_that_of_memit() -> None:
    """By hand: of `a b a b c` two of four bigrams are equal, and all three trigrams differ."""
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    # the mean of 2/3 and 4/3 of the entropies
    expected = (2 / 3 * bigrams + 4 / 3 * math.log2(3)) / 2
    # the precision of float32
    assert float(ngram_entropy(["a b a b c"])["fluency"]) == pytest.approx(expected, rel=1e-6)
    words = [ngram_entropy([text])["fluency"] for text in ("a, b. a, b.", "a , b . a , b .")]
    assert words[0] == words[1] > 0
    assert ngram_entropy(["a", "a b", ""])["fluency"] == 0


def test_kinds_of_probes_are_those_of_facts() -> None:
    assert ProbeAccuracy.names == PROBE_KINDS


def test_nothing_counted_is_nan() -> None:
    empty = torch.zeros(0)
    for found in (
        generation_match([], []),
        ngram_entropy([]),
        probability_gap(empty, empty),
        probability_gap(tensor([-1.0]), tensor([math.nan])),
        {"": probe_accuracy(empty.bool(), empty.long())},
        copy_accuracy(torch.zeros(0, 3).long(), torch.zeros(0, 3).long()),
        weight_growth(empty, empty),
    ):
        assert all(value.isnan() for value in found.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generation_match("Rome", "Rome"), "sequences of the same length, got 'Rome', 'Rome'"),
        (lambda: generation_match(["a"], []), "of the same length, got 1 texts, 0 texts"),
        (lambda: generation_match(["a"], [" "]), "no empty text"),
        (lambda: ngram_entropy("text"), "a sequence of texts, got 'text'"),
        (
            lambda: probability_gap(tensor([1]), tensor([1.0])),
            r"`log_prob_new` to be floating point \[N\], got torch.int",
        ),
        (lambda: probability_gap(tensor([1.0]), tensor([])), "same length, got 1 and 0"),
        (lambda: probe_accuracy(tensor([1]), tensor([1])), r"`right` to be bool \[N\]"),
        (lambda: probe_accuracy(tensor([True]), tensor([1.0])), r"`facts` to be integer \[N\]"),
        (lambda: probe_accuracy(tensor([True]), tensor([1, 2])), "same length, got 1 and 2"),
        (lambda: ProbeAccuracy().update("other", tensor([True]), tensor([1])), "`kind` to be one of"),  # type: ignore[arg-type]
        (lambda: copy_accuracy(tensor([1]), tensor([1])), r"`predicted` to be integer \[N, length\]"),
        (lambda: copy_accuracy(tensor([[1]]), tensor([[1, 2]])), r"same shape, got \[1, 1\] and \[1, 2\]"),
        (lambda: weight_growth(tensor([0.0]), tensor([1.0])), "norms > 0 in `before`, got 0.0"),
        (lambda: weight_growth(tensor([1.0]), tensor([])), "same length, got 1 and 0"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "metric", [GenerationMatch, Fluency, ProbabilityGap, ProbeAccuracy, CopyAccuracy, WeightGrowth]
)
def test_plots_show_every_result(metric: Any) -> None:
    names = list(metric().compute())
    value = {name: tensor(0.25) for name in names}
    _, ax = metric().plot(value)
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert [bar.get_width() for bar in ax.patches] == [0.25] * len(names)
    _, ax = metric().plot([value, value])
    assert len(ax.lines) == len(names) and ax.get_ylabel() == metric.unit
    plt.close("all")
