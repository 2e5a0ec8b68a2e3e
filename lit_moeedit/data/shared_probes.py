"""Probes of rows with several facts, which follow from all of these together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from lit_moeedit.data.fact import Fact
from lit_moeedit.data.probes import PROBE_LIMIT, TOO_MANY, Probe, ProbeFields, ProbeKind
from lit_moeedit.data.rows import Row

Found = list[tuple[Row, Fact | None, bool]]
"""Rows of single facts, each with its fact, ``None`` after a problem, and whether no earlier row has it."""


class SharedProbes:
    """The choice of the fact that gets the probes of a row: the last one to be edited, so that all of them are."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}  # prompt -> position of its fact in the file
        self._late: dict[str, tuple[Probe, ...]] = {}  # prompt of a fact of an earlier row -> its further probes

    def share(self, read: Callable[[Row], tuple[ProbeFields, ...]], whole: Row, found: Found) -> Found:
        """Give the probes that ``read`` finds in a whole row to one of its facts.

        If that is a fact of an earlier row, it gets them in :meth:`complete`. Problems are those of a row of their own.
        Nobody gets them if one of the facts cannot be used: without that edit, the answers are others.
        """
        for _, fact, is_new in found:
            if fact is not None and is_new:
                self._places[fact.prompt] = len(self._places)
        probes = tuple(Probe(cast(ProbeKind, kind), prompt, answers) for kind, prompt, answers in read(whole))
        facts = [fact for _, fact, _ in found if fact is not None]
        if whole.problems or not probes or len(facts) < len(found):
            return [*found, (whole, None, False)]
        last = max(facts, key=lambda fact: self._places[fact.prompt])
        is_late = True
        for i, (row, fact, is_new) in enumerate(found):
            if fact is last and is_new:
                found[i], is_late = (row, replace(fact, probes=probes), is_new), False
        if is_late:
            self._late[last.prompt] = (*self._late.get(last.prompt, ()), *probes)
        return [*found, (whole, None, False)]

    def complete(self, facts: Sequence[Fact], remarks: Counter[str]) -> list[Fact]:
        """Return facts with the probes that later rows have for them."""
        completed = []
        for fact in facts:
            probes = tuple(dict.fromkeys((*fact.probes, *self._late.get(fact.prompt, ()))))
            if len(probes) > PROBE_LIMIT:
                remarks[TOO_MANY] += len(probes) - PROBE_LIMIT
            completed.append(replace(fact, probes=probes[:PROBE_LIMIT]) if fact.prompt in self._late else fact)
        return completed

    @property
    def late(self) -> Counter[str]:
        """Numbers of probes by kind that facts of earlier rows get in the end."""
        return Counter(probe.kind for probes in self._late.values() for probe in probes)
