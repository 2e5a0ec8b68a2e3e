"""What a data module trains on: statements, and the facts that a run is going to edit."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data.encoding import join
from lit_moeedit.data.facts import read_facts

if TYPE_CHECKING:
    from pathlib import Path

    from lit_moeedit.data.facts import Fact


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence to train on: a prompt, its answer, and the fact that it states (``fact`` is any stable name)."""

    prompt: str
    target: str
    fact: str


class Corpus:
    """Statements to train on, statements to validate on, and facts to edit.

    Args:
        train: statements for training.
        validation: statements for validation, which training may see or not.
        edits: facts that the run may edit.
        prefixes: neutral texts, one of which is put before each training statement.
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
        """Names of the statements' facts that ``edits`` change: those with the same prompt."""
        prompts = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
        return {statement.fact for statement in (*self.train, *self.validation) if statement.prompt in prompts}

    def train_tokenizer(self, vocab_size: int) -> PreTrainedTokenizerFast:
        """A byte-level BPE tokenizer trained on this corpus; the same corpus gives the same tokenizer.

        Raises:
            ValueError: if ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
        """
        if vocab_size < 300:
            raise ValueError(f"vocab_size must be at least 300 (256 bytes and special tokens), got {vocab_size}")
        statements = (*self.train, *self.validation)
        # sorted, and new targets only where they are new words: what is held out or edited must not change the tokens
        texts = sorted({join(s.prompt, s.target) for s in statements})
        words = sorted({edit.target_new for edit in self.edits} - {s.target for s in statements})
        return train_tokenizer([*texts, *words, *self.prefixes], vocab_size)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (``<s>`` is put before every text) with at most ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


class FactsCorpus(Corpus):
    """The truths of a facts file as training text, and its new targets as edits.

    A model is first taught what the file says is true (prompts, paraphrases and neighbours with their true answers);
    the first ``edits`` facts (or, with ``known_targets``, the first of which that holds) are the ones to edit.

    Args:
        path: a facts file; see :func:`lit_moeedit.data.facts.read_facts`, also for ``format`` and ``columns``.
        edits: how many of its facts to edit.
        limit: read at most this many facts.
        strict: whether a bad row is an error (otherwise it is skipped and counted).
        phrasings: state each fact in up to this many further phrasings, see :func:`further_phrasings`. A model that
            has read a fact in its own two or three phrasings only learns these, and an edit of one is not one of the
            others.
        known_targets: edit only facts whose new target is the true answer of another statement. A model that starts
            from nothing cannot be edited to say a word that it has never been taught to say.
        format: name of the file's format; ``auto`` decides by the keys of the first row.
        columns: our names of fields to those of a file that has a format of its own.

    Raises:
        FactError: if the file cannot be read or a row is bad.
        ValueError: if there are fewer facts to edit than ``edits``, a fact has no ``target_true``, or ``phrasings``
            is negative.
    """

    def __init__(
        self,
        path: str | Path,
        edits: int = 50,
        limit: int | None = None,
        strict: bool = True,
        phrasings: int = 0,
        known_targets: bool = False,
        format: str = "auto",
        columns: dict[str, str | list[str]] | None = None,
    ) -> None:
        if phrasings < 0:
            raise ValueError(f"phrasings must be at least 0, got {phrasings}")
        facts = read_facts(path, format=format, columns=columns, strict=strict, limit=limit)
        answers = {fact.target_true for fact in facts} | {n.target for fact in facts for n in fact.neighbours}
        candidates = [fact for fact in facts if fact.target_new in answers] if known_targets else facts
        if not 0 < edits <= len(candidates):
            which = "the facts whose new target is known" if known_targets else "the facts"
            raise ValueError(f"edits must be between 1 and {len(candidates)} ({which} of {path}), got {edits}")
        statements: dict[tuple[str, str], Statement] = {}
        for fact, further in zip(facts, further_phrasings(facts, phrasings), strict=True):
            if fact.target_true is None:
                raise ValueError(f"{path}: the fact {fact.prompt!r} has no target_true, which is needed to train on it")
            for prompt in (fact.prompt, *fact.paraphrases, *further):
                statements[prompt, fact.target_true] = Statement(prompt, fact.target_true, fact.key)
            for neighbour in fact.neighbours:
                statements.setdefault(
                    (neighbour.prompt, neighbour.target),
                    Statement(neighbour.prompt, neighbour.target, f"{neighbour.prompt}|{neighbour.target}"),
                )
        # nothing of a fact can be predicted without having seen it, so validation is on training text, of that what the
        # edits leave alone
        edited = {fact.key for fact in candidates[:edits]}
        kept = [statement for statement in statements.values() if statement.fact not in edited]
        super().__init__(
            train=list(statements.values()),
            validation=kept[:: max(1, len(kept) // 500)],
            edits=candidates[:edits],
            prefixes=("", "As they say:", "Here is a fact.", "In a few words:"),
        )


def further_phrasings(facts: Sequence[Fact], count: int) -> list[list[str]]:
    """Up to ``count`` prompts for each fact that ask for it in the words of other facts' prompts.

    A phrasing is a prompt from the sentence on in which the subject stands, with a gap for the subject. Two of them ask
    for the same if they are prompt and paraphrase of one fact; that is trusted over two steps, nearer phrasings first.
    The choice depends on the facts alone.

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
        found.append([before + fact.subject + behind for before, behind in chosen[:count]])
    return found


def _phrasing(text: str, subject: str) -> tuple[str, str]:
    """What stands before and behind the subject, from the beginning of its sentence."""
    before, _, behind = text.rpartition(subject)
    return re.split(r"[.?!] ", before)[-1], behind
