"""The watch over batches that contradict edits."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from lit_moeedit.callbacks.resources import from_datamodule
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.conflicts import Conflict, ConflictFinder
from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.data.fact import Fact
from lit_moeedit.replay.conflicts import documents, old_answer_tokens, texts_of
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import printable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OnConflict = Literal["warn", "mask", "yield", "refuse"]
"""Treatment of training text that contradicts an edit."""
SHOWN = 5
"""Number of contradicting texts that are logged with their words."""
_ADVICE = (
    "take such texts out of the data, or give on_conflict: mask (their old answers get no loss), yield (these facts "
    "are no longer protected) or warn (nothing but a message)"
)
_DONE: dict[OnConflict, str] = {
    "warn": "it stays in the batch (on_conflict: warn)",
    "mask": "its old answer gets no loss",
    "yield": "the fact is no longer protected",
    "refuse": "it is refused",
}


class ContradictionError(ValueError):
    """A training text that contradicts an edit, in a run that refuses such texts."""


@dataclass(frozen=True, slots=True)
class Sightings:
    """The texts that contradict one fact.

    Attributes:
        sightings: number of texts in batches so far; a text that comes in two epochs is two sightings.
        training_texts: number of texts that were found before they came in a batch.
        text: the first one, cut around the old answer.
    """

    sightings: int
    training_texts: int
    text: str


@dataclass
class _Tally:
    """Counts of contradicting texts: of all ranks, or of this one since the ranks last exchanged theirs."""

    texts: int = 0
    facts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)

    def add(self, other: _Tally) -> None:
        self.texts += other.texts
        self.facts.update(other.facts)
        self.first = other.first | self.first
        self.given_up |= other.given_up

    def state(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "facts": dict(self.facts),
            "first": self.first,
            "given_up": sorted(self.given_up),
        }

    @classmethod
    def of_state(cls, where: str, state: dict[str, Any]) -> _Tally:
        check_fields(where, state, texts=int, facts={str: int}, first={str: str}, given_up=[str])
        for name, number in (("texts", state["texts"]), *(("facts", count) for count in state["facts"].values())):
            if number < 0:
                raise CheckpointError(f"{where}: field {name!r} should have counts of at least 0, but has {number}")
        return cls(state["texts"], Counter(state["facts"]), dict(state["first"]), set(state["given_up"]))


class ConflictWatch:
    """Look for training text that contradicts edits, count it, name it, and act on it.

    A text contradicts an edit if it has the subject and the old target of the fact as whole words; see
    :class:`~lit_moeedit.data.conflicts.ConflictFinder`. Text in which the old answer gets no loss does not count. Only
    the text tells: a batch of token ids is decoded. On a GPU this waits for the copy of the batch to the CPU.

    Every rank looks at its own batches. Counts are those of all ranks up to the last :meth:`exchange`, and of this rank
    since then. ``given_up`` changes at an exchange only, so that it is the same on all ranks; in one process at once.

    Args:
        policy: ``warn`` logs a warning; ``mask`` sets the labels of the old answer's tokens to -100, too; ``yield``
            adds the fact to ``given_up`` instead; ``refuse`` raises an error, on all ranks.
        heading: beginning of messages.

    Raises:
        ValueError: the policy is none of these.
    """

    def __init__(self, policy: OnConflict = "warn", heading: str = "") -> None:
        if policy not in get_args(OnConflict):
            raise ValueError(f"on_conflict must be one of {', '.join(get_args(OnConflict))}, got {policy!r}")
        self.policy, self.heading = policy, heading
        self._facts: tuple[Fact, ...] = ()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._finder = ConflictFinder(())
        self._all, self._own, self._ahead = _Tally(), _Tally(), _Tally()
        self._lines: list[tuple[str, str]] = []  # key and message, of this rank since the last exchange
        self._shown, self._told = 0, set[str]()

    def protect(self, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the facts that are edited now, and the tokenizer of the batches; every rank calls this."""
        if self._facts != tuple(facts):
            self._facts = tuple(facts)
            self._finder = ConflictFinder(self._facts)
        self._tokenizer = tokenizer

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, where: str) -> None:
        """Look at a batch of this rank before the model does, and change its labels under ``mask``.

        Under ``refuse`` every rank calls this at the same moment: they tell each other of their findings, so that all
        of them stop. The other policies need no exchange.

        Args:
            input_ids: ``[rows, length]``, on any device.
            attention_mask: likewise, 0 for padding, on any side; ``None`` without padding.
            labels: likewise; ``None`` if the module makes its own.
            where: place of the batch for messages, such as ``step 12``.

        Raises:
            ContradictionError: under ``refuse``, naming fact, text and place.
            RankError: under ``refuse``, if the text was found on another rank.
            ValueError: a shape is another one, or ``mask`` cannot be done.
        """
        if not self._facts or self._tokenizer is None:
            return
        with Ranks.current().together() if self.policy == "refuse" else nullcontext():
            self._check(input_ids, attention_mask, labels)
            masked = []
            for found in self._conflicts(self._tokenizer, input_ids, attention_mask, labels):
                self._own.texts += 1
                for conflict, places in found:
                    self._note(self._own, conflict, where)
                    masked += places
            if self.policy == "mask" and masked and labels is not None:
                rows, columns = torch.tensor(masked, device=labels.device).T
                labels[rows, columns] = IGNORED_LABEL
        if self._own.texts and Ranks.current().size == 1:
            self._take(self._own)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids should be [rows, length], but has the shape {list(input_ids.shape)}")
        for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
            if tensor is not None and tensor.shape != input_ids.shape:
                shapes = f"{list(input_ids.shape)} as input_ids, but is {list(tensor.shape)}"
                raise ValueError(f"{name} should have the shape {shapes}")
        if self.policy != "mask":
            return
        if labels is None:
            raise ValueError("on_conflict: mask needs batches with 'labels'; add them, or choose warn, yield or refuse")
        if labels.untyped_storage().data_ptr() == input_ids.untyped_storage().data_ptr():
            raise ValueError(
                "on_conflict: mask changes labels, but the batch's 'labels' and 'input_ids' are one tensor; make it "
                "labels = input_ids.clone()"
            )

    def _conflicts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
    ) -> Iterator[list[tuple[Conflict, list[tuple[int, int]]]]]:
        """Yield for each text of a batch that has conflicts these, with rows and columns of the old answer's tokens."""
        ids = input_ids.tolist()
        kept = [range(input_ids.shape[1])] * len(ids) if attention_mask is None else _places(attention_mask)
        texts = [
            (row, [columns[i] for i in document])
            for row, columns in enumerate(kept)
            for document in documents(tokenizer, [ids[row][column] for column in columns])
        ]
        rows = [[ids[row][column] for column in columns] for row, columns in texts]
        for (row, columns), tokens, text in zip(texts, rows, texts_of(tokenizer, rows), strict=True):
            if not self._finder.find(text):
                continue
            own = None if labels is None else labels[row].tolist()
            found = []
            for conflict, places in old_answer_tokens(tokenizer, tokens, self._finder):
                if own is None or any(own[columns[i]] != IGNORED_LABEL for i in places):
                    found.append((conflict, [(row, columns[i]) for i in places]))
            if found:
                yield found

    def look_ahead(self, texts: Iterable[str]) -> None:
        """Look at the training texts that may still come; every rank calls this, with the same texts.

        The result replaces that of an earlier call. The labels of these texts are masked when they come.

        Args:
            texts: the texts, such as those of the data module's ``training_texts()``.

        Raises:
            ContradictionError: under ``refuse``, naming the first of them.
            RankError: under ``refuse``, if the text was found on another rank.
        """
        with Ranks.current().together():
            total, ahead, firsts = 0, _Tally(), []
            for text in texts:
                total += 1
                conflicts = self._finder.find(text)
                ahead.texts += bool(conflicts)
                for conflict in conflicts:
                    if conflict.fact.key not in ahead.facts:
                        firsts.append(_described(conflict))
                    self._count(ahead, conflict)
            self._ahead = ahead
            # a data module may have other texts on each rank
            ahead.given_up = set().union(*_all_gather(Ranks.current(), sorted(ahead.given_up)))
            if not firsts:
                return
            counts = f"{ahead.texts:,} of {total:,} training texts contradict {len(ahead.facts):,} edited facts"
            if self.policy == "refuse":
                raise ContradictionError(f"{self.heading}{counts}; one contradicts {firsts[0]}; {_ADVICE}")
            _warn(f"{self.heading}{counts} (on_conflict: {self.policy})")
            for described in firsts[: None if self.policy == "yield" else SHOWN]:
                given_up = f"; {_DONE['yield']}" if self.policy == "yield" else ""
                _warn(f"{self.heading}a training text contradicts {described}{given_up}")

    def _note(self, tally: _Tally, conflict: Conflict, where: str) -> None:
        """Count a conflict of a batch, and tell of it."""
        if self.policy == "refuse":
            raise ContradictionError(f"{self.heading}{where}: the text contradicts {_described(conflict)}; {_ADVICE}")
        line = f"{self.heading}{where}: the text contradicts {_described(conflict)}; {_DONE[self.policy]}"
        if self._tell(conflict.fact.key, line):
            self._lines.append((conflict.fact.key, line))
        self._count(tally, conflict)

    def _tell(self, key: str, line: str) -> bool:
        """Log one of the first conflicts, or the first of a fact that is given up by it; false for any other."""
        yields = self.policy == "yield"
        if key in self._told | self.given_up if yields else self._shown >= SHOWN:
            return False
        self._shown += 1
        self._told.add(key)
        is_last = self._shown == SHOWN and not yields
        _warn(line + ("; further ones are counted, and not logged" if is_last else ""))
        return True

    def _count(self, tally: _Tally, conflict: Conflict) -> None:
        key = conflict.fact.key
        tally.facts[key] += 1
        tally.first.setdefault(key, conflict.excerpt())
        if self.policy == "yield":
            tally.given_up.add(key)

    # -- what was found -----------------------------------------------------------------------------------------------

    def exchange(self, ranks: Ranks) -> None:
        """Make counts and ``given_up`` the same on all ranks; every rank calls this at the same moment.

        It is one collective operation of a few bytes per conflict. It is due before counts are logged or saved.
        """
        for rank, (state, lines) in enumerate(_all_gather(ranks, [self._own.state(), self._lines])):
            # those of the first rank have been logged, and this one knows its own
            for key, text in lines if rank not in (0, ranks.rank) else ():
                self._tell(key, f"rank {rank}: {text}")
            self._take(_Tally.of_state(f"the conflicts of rank {rank}", state))

    def _take(self, tally: _Tally) -> None:
        """Add what all ranks know to the counts, and begin anew with those of this rank."""
        self._all.add(tally)
        self._own, self._lines = _Tally(), []

    @property
    def _total(self) -> _Tally:
        total = _Tally()
        for part in (self._all, self._own):
            total.add(part)
        return total

    @property
    def given_up(self) -> set[str]:
        """Keys of the facts that are no longer protected, because the text contradicts them."""
        return self._all.given_up | self._ahead.given_up

    @property
    def counts(self) -> dict[str, Sightings]:
        """By fact key, the texts that contradict it."""
        total = self._total
        first = total.first | self._ahead.first
        return {key: Sightings(total.facts[key], self._ahead.facts[key], text) for key, text in first.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """``edit/conflicts``: number of sightings of contradicting texts so far."""
        return {"edit/conflicts": float(self._all.texts + self._own.texts)}

    def summary(self) -> dict[str, Any]:
        """Summarise the conflicts for ``summary.json``, as plain values."""
        return {
            "on_conflict": self.policy,
            "sightings": self._all.texts + self._own.texts,
            "training_texts": self._ahead.texts,
            "given_up": sorted(self.given_up),
            "facts": {
                key: {"sightings": one.sightings, "training_texts": one.training_texts, "text": one.text}
                for key, one in self.counts.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far as plain values; those of all ranks after :meth:`exchange`."""
        return self._total.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts of an earlier run.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        self._all = _Tally.of_state("the state of the conflicts in the checkpoint", state_dict)
        self._own, self._lines = _Tally(), []


def contradicting_texts(trainer: L.Trainer, facts: Sequence[Fact]) -> dict[str, str]:
    """Find training texts that contradict edits: of the data module, or seen by a callback's ``watch``.

    The data module is asked for ``contradictions(facts)``, or else for ``training_texts()``; both are optional.

    Returns:
        By fact key, one of the texts.
    """
    found = from_datamodule(trainer, "contradictions", facts)
    if found is None:
        first = ConflictFinder(facts).first(from_datamodule(trainer, "training_texts") or ())
        found = {key: conflict.excerpt() for key, conflict in first.items()}
    watches = [getattr(callback, "watch", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    seen = {key: one.text for watch in watches if isinstance(watch, ConflictWatch) for key, one in watch.counts.items()}
    return {**found, **{fact.key: seen[fact.key] for fact in facts if fact.key in seen}}


def _all_gather(ranks: Ranks, value: Any) -> list[Any]:
    """Return the values of all ranks, which are made of JSON types; every rank calls this."""
    if ranks.size == 1:
        return [value]
    ranks.check_errors()
    line = (json.dumps(value) + "\n").encode("ascii")
    gathered = ranks.all_gather(torch.tensor(list(line), dtype=torch.uint8))
    return [json.loads(own) for own in bytes(gathered.tolist()).splitlines()]


def _places(mask: Tensor) -> list[list[int]]:
    """Return the columns of each row that are no padding."""
    return [[column for column, is_kept in enumerate(row) if is_kept] for row in mask.tolist()]


def _described(conflict: Conflict) -> str:
    fact = conflict.fact
    texts = (fact.subject, fact.target_true or "", fact.target_new, conflict.excerpt())
    subject, old, new, text = (f"'{printable(text)}'" for text in texts)
    return f"the edit of {subject} ({old} to {new}): {text}"


@rank_zero_only
def _warn(line: str) -> None:
    log.warning("%s", line)
