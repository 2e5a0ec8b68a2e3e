"""The corpus of a data module: statements to train on, and the facts that a run edits."""

from __future__ import annotations

import logging
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data.encoding import join
from lit_moeedit.data.facts import read_facts

if TYPE_CHECKING:
    from lit_moeedit.data.facts import Fact


log = logging.getLogger(__name__)

DEFAULT_EDITS = 50
"""Number of facts of a file that are edited where none is given."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence to train on.

    Attributes:
        prompt: the beginning of the sentence.
        target: its end, the answer.
        fact: a stable name of the fact that it states.
    """

    prompt: str
    target: str
    fact: str


class Corpus:
    """Statements to train on, statements to validate on, and facts to edit.

    Args:
        train: statements for training.
        validation: statements for validation, which may be among those for training.
        edits: facts that the run may edit.
        prefixes: neutral texts; each training statement follows one of them.
    """

    def __init__(
        self,
        train: Sequence[Statement],
        validation: Sequence[Statement],
        edits: Sequence[Fact],
        prefixes: Sequence[str] = ("",),
    ) -> None:
        self.train = list(train)
        self.validation = list(validation)
        self.edits = list(edits)
        self.prefixes = tuple(prefixes)

    def facts_of(self, edits: Sequence[Fact]) -> set[str]:
        """Find the names of the facts that ``edits`` change: those with a statement that has the same prompt."""
        prompts = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
        return {statement.fact for statement in (*self.train, *self.validation) if statement.prompt in prompts}

    def train_tokenizer(self, vocab_size: int) -> PreTrainedTokenizerFast:
        """Train a byte-level BPE tokenizer on this corpus; the same corpus gives the same tokenizer.

        Raises:
            ValueError: ``vocab_size`` is too small for the 256 bytes and the special tokens.
        """
        if vocab_size < 300:
            raise ValueError(f"vocab_size must be at least 300 (256 bytes and special tokens), got {vocab_size}")
        statements = (*self.train, *self.validation)
        # sorted, with only those new targets that are new words: held-out and edited facts must not change the tokens
        texts = sorted({join(s.prompt, s.target) for s in statements})
        words = sorted({edit.target_new for edit in self.edits} - {s.target for s in statements})
        return train_tokenizer([*texts, *words, *self.prefixes], vocab_size)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most ``vocab_size`` tokens, which puts ``<s>`` before every text."""
    trained = ByteLevelBPETokenizer(add_prefix_space=True, trim_offsets=True)
    special: list[str | AddedToken] = ["<pad>", "<s>", "</s>"]
    trained.train_from_iterator(iter(texts), vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer = Tokenizer.from_str(trained.to_str())
    before = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, before])
    fast_tokenizer: Any = PreTrainedTokenizerFast  # its constructor has no type annotations
    wrapped: PreTrainedTokenizerFast = fast_tokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    return wrapped


class FactsCorpus(Corpus):
    """The true answers of a facts file as training text, and its new targets as edits.

    The model first learns the prompts, paraphrases and neighbours of the file with their true answers. Then the first
    ``edits`` facts are edited. A fact without a true answer is new knowledge: nothing states it in the training text.

    Args:
        path: a facts file, or a list of facts or of objects with the keys of a row; see
            :func:`lit_moeedit.data.facts.read_facts`, also for ``format`` and ``columns``.
        edits: number of facts to edit, all of them if the file has fewer; ``None`` for at most 50.
        limit: maximum number of facts to read.
        strict: true to refuse a file with a bad row; false to skip bad rows with a warning.
        phrasings: maximum number of further phrasings of each fact in the training text, see
            :func:`further_phrasings`. A model that has read a fact in only two or three phrasings learns each of them
            separately, and an edit of one does not change the others.
        known_targets: true to edit only facts whose new target is the true answer of another statement. A model that is
            trained from scratch cannot be edited to generate a word that is not in its training text.
        format: name of the file's format; ``auto`` chooses it by the keys of the first row.
        columns: field names to column names, for a file with other names.

    Raises:
        FactError: the file cannot be read, or a row is bad.
        ValueError: ``edits`` is below 1, ``phrasings`` is negative, or ``known_targets`` leaves no fact to edit.
    """

    def __init__(
        self,
        path: str | Path | list[dict[str, Any]] | list[Fact],
        edits: int | None = None,
        limit: int | None = None,
        strict: bool = True,
        phrasings: int = 0,
        known_targets: bool = False,
        format: str = "auto",
        columns: dict[str, str | list[str]] | None = None,
    ) -> None:
        for name, value, least in (("phrasings", phrasings, 0), ("edits", edits, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        source = str(path) if isinstance(path, str | Path) else "facts"
        facts = read_facts(path, format=format, columns=columns, strict=strict, limit=limit)
        answers = {fact.target_true for fact in facts} | {n.target for fact in facts for n in fact.neighbours}
        candidates = [fact for fact in facts if fact.target_new in answers] if known_targets else facts
        if not candidates:
            raise ValueError(
                f"{source}: no new target of its {len(facts)} facts is the true answer of another statement; give "
                "known_targets: false to edit them nevertheless (a model trained from scratch has not seen the targets)"
            )
        if edits is None:
            edits = min(DEFAULT_EDITS, len(candidates))
        if edits > len(candidates):
            which = "facts with a known target" if known_targets else "facts"
            log.warning(
                "%s: edits is %d, but there are %d %s; all of them are edited", source, edits, len(candidates), which
            )
        statements: dict[tuple[str, str], Statement] = {}
        for fact, further in zip(facts, further_phrasings(facts, phrasings), strict=True):
            if (truth := fact.target_true) is not None:
                for prompt in (fact.prompt, *fact.paraphrases, *further):
                    statements[prompt, truth] = Statement(prompt, truth, fact.key)
            for prompt, target in ((neighbour.prompt, neighbour.target) for neighbour in fact.neighbours):
                statements.setdefault((prompt, target), Statement(prompt, target, f"{prompt}|{target}"))
        if unknown := sum(fact.target_true is None for fact in facts):
            text = "%s: %d of %d facts have no target_true, so the training text does not state them"
            log.warning(text, source, unknown, len(facts))
        # a fact cannot be predicted without training on it, so validation uses training text, without the edited facts
        edited = {fact.key for fact in candidates[:edits]}
        kept = [statement for statement in statements.values() if statement.fact not in edited]
        if not kept:
            log.warning("%s: validation is on the edited facts, because there are no other facts or neighbours", source)
            kept = list(statements.values()) or [Statement(fact.prompt, fact.target_new, fact.key) for fact in facts]
        super().__init__(
            train=list(statements.values()),
            validation=kept[:: max(1, len(kept) // 500)],
            edits=candidates[:edits],
            prefixes=("", "As they say:", "Here is a fact.", "In a few words:"),
        )


def further_phrasings(facts: Sequence[Fact], count: int) -> list[list[str]]:
    """Find up to ``count`` further prompts for each fact, in the phrasings of other facts.

    A phrasing is the part of a prompt from the sentence with the subject on, with a gap for the subject. Two phrasings
    are equivalent if they are prompt and paraphrase of one fact. Equivalence is followed over two steps, with nearer
    phrasings first. The choice depends on the facts alone.

    Example:
        >>> from lit_moeedit.data.facts import Fact
        >>> lies = Fact("Rome", "Rome lies in", "Spain", paraphrases=("A map. Rome is a city of",))
        >>> further_phrasings([lies, Fact("Oslo", "Oslo lies in", "Peru")], 3)
        [[], ['Oslo is a city of']]
    """
    own = [
        {_phrasing(text, fact.subject) for text in (fact.prompt, *fact.paraphrases) if fact.subject in text}
        for fact in facts
    ]
    linked: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for phrasings in own:
        for phrasing in phrasings:
            linked[phrasing] |= phrasings
    found = []
    for fact, phrasings in zip(facts, own, strict=True):
        near = {other for phrasing in phrasings for other in linked[phrasing]}
        far = {other for phrasing in near for other in linked[phrasing]}
        draw = random.Random(fact.key)
        chosen = [p for part in (near - phrasings, far - near) for p in draw.sample(sorted(part), len(part))]
        found.append([before + fact.subject + after for before, after in chosen[:count]])
    return found


def _phrasing(text: str, subject: str) -> tuple[str, str]:
    """Split a text into the parts before and after the subject, from the beginning of the subject's sentence on."""
    before, _, after = text.rpartition(subject)
    return re.split(r"[.?!] ", before)[-1], after
