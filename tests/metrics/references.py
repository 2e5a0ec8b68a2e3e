"""Slow references of all metrics, in plain Python, and batches for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.metrics.test_edit_success import GROUPS, brute

LAYERS, EXPERTS, TOKENS, BATCHES = (3, 5), 6, 8, 6
KINDS = ("edit", "paraphrase", "neighbour")
RANKS = 2


def tables(seed: int, sides: int) -> list[dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{i: torch.randn(TOKENS, EXPERTS, generator=generator) for i in LAYERS} for _ in range(sides)]


def experts(seed: int, sides: int) -> list[Any]:
    return [{i: table.topk(2).indices for i, table in side.items()} for side in tables(seed, sides)]


def distributions(seed: int) -> list[Any]:
    return [{i: table.softmax(1) for i, table in side.items()} for side in tables(seed, 2)]


def prompts(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    new, true, exact, before = torch.randint(0, 4, (4, TOKENS), generator=generator).tolist()
    return [
        {
            "kind": KINDS[seed % 3],
            "new": -float(new[n]),
            "true": math.nan if n == seed else -float(true[n]),
            "exact": exact[n] > 1,
            "exact_before": before[n] > 0,
            "group": GROUPS[n % 2],
        }
        for n in range(TOKENS)
    ]


def texts(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    words = ["Rome", "Oslo", "New York", "in", "the", "York"]
    picked = torch.randint(len(words), (TOKENS, 4), generator=generator).tolist()
    return {
        "generated": [" ".join(words[i] for i in row[:length]) for length, row in enumerate(picked, start=-3)],
        "targets": [words[row[-1] % 3] for row in picked],
    }


def gaps(seed: int) -> dict[str, Any]:
    new, true = -torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(seed)) * 5
    true[seed] = math.nan
    return {"log_prob_new": new, "log_prob_true": true}


def asked(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    facts = torch.randint(3, (TOKENS,), generator=generator)
    right = torch.rand(TOKENS, generator=generator) < 0.4
    return {"kind": ("portability", "multi_hop", "reversed")[seed % 3], "right": right, "facts": facts}


def copies(seed: int) -> dict[str, Any]:
    predicted, expected = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(seed))
    return {"predicted": predicted, "expected": expected}


def norms(seed: int) -> dict[str, Any]:
    before, after = 1 + torch.rand(2, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return {"before": before, "after": after}


# --- references ------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_layer(values: dict[int, float], prefix: str = "") -> dict[str, float]:
    named = {f"{prefix}layer_{i}": value for i, value in values.items()}
    return {f"{prefix}mean": mean(list(values.values())), **named}


def slow_similarity(batches: list[Any]) -> dict[str, float]:
    def overlap(layer: int) -> float:
        rows = [
            (set(a), set(b))
            for one, two in batches
            for a, b in zip(one[layer].tolist(), two[layer].tolist(), strict=True)
        ]
        return mean([len(a & b) / len(a | b) for a, b in rows])

    return by_layer({i: overlap(i) for i in LAYERS})


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_divergence(batches: list[Any]) -> dict[str, float]:
    def rows(layer: int) -> list[tuple[list[float], list[float]]]:
        return [(a, b) for one, two in batches for a, b in zip(one[layer].tolist(), two[layer].tolist(), strict=True)]

    def js(p: list[float], q: list[float]) -> float:
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (divergence(p, middle) + divergence(q, middle)) / 2

    kl = {i: mean([divergence(p, q) for p, q in rows(i)]) for i in LAYERS}
    return by_layer(kl, "kl/") | by_layer({i: mean([js(p, q) for p, q in rows(i)]) for i in LAYERS}, "js/")


def slow_load(batches: list[Any]) -> dict[str, float]:
    found: dict[str, dict[int, float]] = {"entropy/": {}, "max_share/": {}, "dead/": {}}
    for layer in LAYERS:
        counts = Counter(expert for (table,) in batches for row in table[layer].tolist() for expert in row)
        shares = [counts[expert] / counts.total() for expert in range(EXPERTS)]
        found["entropy/"][layer] = -sum(s * math.log(s) for s in shares if s) / math.log(EXPERTS)
        found["max_share/"][layer] = EXPERTS * max(shares)
        found["dead/"][layer] = shares.count(0) / EXPERTS
    return {name: value for prefix, values in found.items() for name, value in by_layer(values, prefix).items()}


def slow_success(batches: list[Any]) -> dict[str, float]:
    return brute([row for rows in batches for row in rows])


def slow_match(batches: list[Any]) -> dict[str, float]:
    pairs = [pair for batch in batches for pair in zip(batch["generated"], batch["targets"], strict=True)]

    def contains(text: str, target: str) -> bool:
        # the words are separated by single spaces, and the longest target has two
        return f" {target} " in f" {text} "

    exact, contained = ([text == target for text, target in pairs], [contains(*pair) for pair in pairs])
    return {"generation_exact": mean(exact), "generation_contained": mean(contained)}


def slow_fluency(batches: list[Any]) -> dict[str, float]:
    def entropy(items: list[Any]) -> float:
        return sum(-items.count(x) / len(items) * math.log2(items.count(x) / len(items)) for x in set(items))

    def of_text(text: str) -> float:
        words = text.split()
        bigrams, trigrams = ([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for n in (2, 3))
        return mean([2 / 3 * entropy(bigrams), 4 / 3 * entropy(trigrams)])

    return {"fluency": mean([of_text(text) for batch in batches for text in batch["texts"]])}


def slow_gap(batches: list[Any]) -> dict[str, float]:
    pairs = [
        (new, true)
        for batch in batches
        for new, true in zip(batch["log_prob_new"].tolist(), batch["log_prob_true"].tolist(), strict=True)
        if not math.isnan(true)
    ]
    gaps = [math.exp(new) - math.exp(true) for new, true in pairs]
    return {"probability_gap": mean(gaps), "log_probability_gap": mean([new - true for new, true in pairs])}


def slow_probes(batches: list[Any]) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {"portability": [], "multi_hop": [], "reversed": []}
    for batch in batches:
        rows = list(zip(batch["facts"].tolist(), batch["right"].tolist(), strict=True))
        for fact in {fact for fact, _ in rows}:
            by_kind[batch["kind"]].append(mean([right for other, right in rows if other == fact]))
    return {kind: mean(values) if values else math.nan for kind, values in by_kind.items()}


def slow_copies(batches: list[Any]) -> dict[str, float]:
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch["predicted"].flatten().tolist(), batch["expected"].flatten().tolist(), strict=True)
    ]
    return {"copy_accuracy": mean([a == b for a, b in pairs])}


def slow_growth(batches: list[Any]) -> dict[str, float]:
    pairs = [pair for batch in batches for pair in zip(batch["before"].tolist(), batch["after"].tolist(), strict=True)]
    growth = [(b - a) / a for a, b in pairs]
    return {"weight_growth_max": max(growth), "weight_growth_mean": mean(growth)}
