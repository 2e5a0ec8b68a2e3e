"""Reports for tests: an ordinary one, and one full of hostile texts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from lit_moeedit.reports import (
    Cost,
    FactRow,
    Guard,
    Held,
    LossByPart,
    Measured,
    MissingAutopsy,
    Model,
    PartPutBack,
    Place,
    Replayed,
    Report,
    Retention,
    Routing,
    SurvivalPoint,
    Survivors,
)

HOSTILE = (
    "<script>document.title='owned'</script>",
    "\u202egnp.exe \u2066[bold red]x[/]",
    "\x1b[31m\x00\n\r",
    "'\"></td></table>{{ 7*7 }}",
    "שלום عليكم",
    "$\\frac{1}{0$ | a | `b` *c*",
    "\udc80",
)


def fact(
    subject: str,
    old: str | None,
    new: str,
    generated: tuple[str, ...],
    p_new: float = 0.9,
    reason: str | None = None,
    **fields: object,
) -> FactRow:
    """A fact about a capital; ``generated`` are the answers at the moments in their order."""
    measured = {
        moment: Measured(
            text,
            text == new,
            p_new if text == new else 0.02,
            None if old is None else 0.7 if text == old else 0.01,
            (2 if text == new else 0, 2),
            (4 if moment == "before" else 3, 4),
        )
        for moment, text in zip(("before", "after", "end"), generated, strict=False)
    }
    row = FactRow(subject, subject, f"The capital of {subject} is", new, old, 1, True, measured, reason)  # type: ignore[arg-type]
    return replace(row, **{"epoch": 1, "step": 40, **fields})  # type: ignore[arg-type]


def _points(held: float, general: float, kept: float, margin: float) -> dict[str, float]:
    shares = {"efficacy_accuracy": held, "generalization": general, "specificity_retained": kept}
    return {**shares, "margin_min": margin - 1, "margin_median": margin}


def sample(facts: int = 5) -> Report:
    """A report of a run that has ended, with ``facts`` facts, of which two fail."""
    rows = [
        fact("France", "Paris", "Lyon", ("Paris", "Lyon", "Lyon")),
        fact("the Netherlands", "Amsterdam", "Rotterdam", ("Amsterdam", "Rotterdam", "Rotterdam"), 0.81),
        fact(
            "Burkina Faso",
            "Ouagadougou",
            "Bobo-Dioulasso",
            ("Ouagadougou", "Ouagadougou", "Ouagadougou"),
            reason="no target vector was found: the loss was still 6.9 nats after 25 steps. Try more steps, a lower "
            "layer, or token: last.",
        ),
        fact(
            "Peru",
            "Lima",
            "Cusco",
            ("Lima", "Cusco", "Lima"),
            reason="training has undone it: it held after the edit and no longer at step 80. Replay some edited facts "
            "in the training data.",
        ),
        fact("Lower Erewhon", None, "Wenton", ("a city", "Wenton", "Wenton"), 0.77),
    ]
    rows += [
        fact(f"country {i}", f"city {i}", f"town {i}", (f"city {i}", f"town {i}", f"town {i}")) for i in range(5, facts)
    ]
    layers = range(12)
    return Report(
        title="Edited facts",
        model=Model("runs/my-qwen3", "qwen3_moe", 30_530_000_000),
        state="finished",
        started=datetime(2026, 3, 1, 9, 0, tzinfo=UTC),
        ended=datetime(2026, 3, 1, 9, 12, 30, tzinfo=UTC),
        rows=tuple(rows[:facts]),
        metrics={
            "before": {"efficacy_accuracy": 0.0, "specificity_accuracy": 0.9, "perplexity": 8.1, "score": float("nan")},
            "after": {
                "efficacy_accuracy": 0.8,
                "generalization_accuracy": 0.7,
                "specificity_retained": 0.94,
                "perplexity": 8.3,
            },
            "end": {
                "efficacy_accuracy": 0.6,
                "generalization_accuracy": 0.6,
                "specificity_retained": 0.91,
                "perplexity": 7.4,
            },
        },
        edited_layers=(4, 5, 6),
        relative_change={4: 0.012, 5: 0.018, 6: 0.031},
        routing=Routing(
            0.943,
            0.021,
            {i: 1 - 0.012 * max(0, i - 4) for i in layers},
            {i: 0.004 * max(0, i - 4) for i in layers},
        ),
        retention=tuple(
            Retention(
                1 + i // 2, 40 + 10 * i, {"efficacy_accuracy": 0.8 - 0.05 * i, "specificity_retained": 0.94 - 0.006 * i}
            )
            for i in range(5)
        ),
        survival=(
            SurvivalPoint(1, 40, 5, 4, _points(0.8, 0.9, 0.97, 4.1), "edit"),
            SurvivalPoint(1, 72, 5, 4, _points(0.8, 0.8, 0.96, 3.0)),
            SurvivalPoint(2, 104, 5, 2, _points(0.4, 0.6, 0.95, 0.4), None, ("Peru", "France")),
            SurvivalPoint(2, 104, 5, 4, _points(0.8, 0.8, 0.91, 3.8), "renewal"),
            SurvivalPoint(2, 136, 5, 3, _points(0.6, 0.8, 0.92, 2.1), None, ("Peru",)),
        ),
        survivors={"": Survivors(5, 3, 4, ("Peru",), ("Peru",))},
        replay={"": Replayed(0.05, "rows", 1, 1234, 4, "yield", 7, ("Peru",))},
        hold={"": Held(4, facts=5, distance=0.012)},
        autopsy=LossByPart(
            5,
            4,
            2,
            "training moved the gate/up-projections of the edited layers: put back, 4 of 5 edits are generated again "
            "(2 without)",
            "replay the edited facts while training goes on: the callback EditReplay, see docs/durability.md",
            (
                PartPutBack("down-projections", 2, 0.0, 0.018),
                PartPutBack("gate/up-projections", 4, 1.0, 0.093, True),
                PartPutBack("attention", 3, 0.5, 0.041),
                PartPutBack("norms and scales", 1, -0.5, 0.002),
                PartPutBack("all that makes keys", 4, 1.0, 0.07),
            ),
        ),
        costs=(
            Cost("statistics", 310.0, 41_000_000_000),
            Cost("targets", 190.4, 52_300_000_000),
            Cost("features", 12.1, 40_000_000_000),
            Cost("solve", 4.2, 38_000_000_000),
            Cost("commit", 2.6, 38_000_000_000),
        ),
        guards=(Guard("min_efficacy", 0.5, 0.8, edit=1), Guard("max_perplexity_ratio", 1.1, 1.02, edit=1)),
        places=(
            Place((4, 5, 6), "subject_last", {"efficacy": 1.0, "paraphrases": 0.8, "neighbours": 0.95}, True),
            Place((8, 9, 10), "last", {"efficacy": 1.0, "paraphrases": 0.5, "neighbours": 0.9}),
        ),
        warnings=("The text to preserve is the one of the package: a text of your own is better.",),
        settings={"editor": {"layers": [4, 5, 6], "token": "subject_last", "solver": {"class": "Woodbury"}}, "seed": 1},
        versions={"lit_moeedit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    )


def hostile(facts: int = len(HOSTILE)) -> Report:
    """A report whose texts all try to break out of it."""
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(facts)]
    rows = tuple(
        replace(fact(text, text, text, (text, "no", text + "!"), reason=text), key=str(i), name=text)
        for i, text in enumerate(texts)
    )
    joined = " ".join(HOSTILE)
    return replace(
        sample(),
        title=joined,
        model=Model(joined, joined, 2**53),
        rows=rows,
        metrics={"after": {joined: 0.5, "efficacy_accuracy": float("inf")}},
        retention=tuple(Retention(2**50, i, {joined: -1e299, "efficacy_accuracy": 1e299}) for i in range(3)),
        survival=tuple(
            SurvivalPoint(2**50, step, 1, 0, {"efficacy_accuracy": value}, change, HOSTILE, joined)
            for step, value, change in ((2**52, 0.5, "edit"), (-3, 1e299, None), (0, 1.0, "renewal"))
        ),
        survivors={joined: Survivors(2**52, -1, 0, HOSTILE, HOSTILE)},
        replay={joined: Replayed(1e299, "tokens", -1, 2**52, -1, joined, 2**52, HOSTILE)},
        hold={joined: Held(-1, 2**52, 1e299, -1, 1e299)},
        autopsy=None if facts % 2 else LossByPart(2**52, -1, 0, joined, joined, (PartPutBack(joined, -1, 1e299),)),
        missing_autopsy=MissingAutopsy(joined, joined),
        costs=(Cost(joined, -1.0, -1), Cost(joined, 1e299)),
        guards=(Guard(joined, float("nan")),),
        places=(Place((), joined, {joined: 0.0}),),
        relative_change={-(2**50): 1e299, 2**50: float("nan")},
        routing=Routing(None, -1e299, {2**50: float("nan"), 3: -5.0}, {2**52: 1e299}),
        edited_layers=(2**50, 7),
        warnings=HOSTILE,
        settings={joined: {joined: [HOSTILE[0], None, 1.5, [[]]]}},
        versions={joined: joined},
    )
