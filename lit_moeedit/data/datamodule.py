"""Statements as batches: the data module of the demo and of runs on a facts file."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, encode, join, pad
from lit_moeedit.pretrained import pretrained_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lit_moeedit.data.corpus import Corpus, Statement
    from lit_moeedit.data.facts import Fact

log = logging.getLogger(__name__)


class StatementDataset(Dataset[Encoding]):
    """Every statement behind every prefix, tokenized once; item ``i`` is statement ``i // len(prefixes)``."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, statements: Sequence[Statement], prefixes: Sequence[str] = ("",)
    ) -> None:
        self.statements = list(statements)
        self.prefixes = len(prefixes)
        prompts = [join(prefix, s.prompt) if prefix else s.prompt for s in self.statements for prefix in prefixes]
        targets = [s.target for s in self.statements for _ in prefixes]
        self._encodings = encode(tokenizer, prompts, targets)

    def __len__(self) -> int:
        return len(self._encodings)

    @override
    def __getitem__(self, index: int) -> Encoding:
        return self._encodings[index]

    def fact(self, index: int) -> str:
        """The fact that item ``index`` states."""
        return self.statements[index // self.prefixes].fact


class EpochSampler(DistributedSampler[int]):
    """Draws ``num_samples`` items an epoch without putting back, in an order that seed and epoch alone decide.

    The trainer calls :meth:`set_epoch`, so a resumed run reads what the uninterrupted one would have read. The ranks
    of a run take turns: the batches of all ranks together are those of one process.

    Args:
        dataset: what to draw from.
        num_samples: items per epoch, on all ranks together; at most all of them.
        seed: of the order.
        excluded: names of facts that are not drawn (the set is read anew at the start of each epoch).
        ranks: number of processes.
        rank: which of them this one is.
    """

    def __init__(
        self, dataset: StatementDataset, num_samples: int, seed: int, excluded: set[str], ranks: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=ranks, rank=rank, seed=seed)
        self.statements, self.excluded = dataset, excluded
        # the same number on every rank
        self.total_size = min(num_samples, len(dataset)) // ranks * ranks
        self.num_samples = self.total_size // ranks

    @override
    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.statements)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        allowed = (i for i in order if self.statements.fact(i) not in self.excluded)
        drawn = [i for i, _ in zip(allowed, range(self.total_size), strict=False)]
        # the length of an epoch must not change when facts are excluded: the schedule of the learning rate counts on it
        while drawn and len(drawn) < self.total_size:
            drawn += drawn[: self.total_size - len(drawn)]
        yield from drawn[self.rank :: self.num_replicas]


class FactsDataModule(L.LightningDataModule):
    """Trains on a corpus of statements, validates on some that it names, and knows what the run will edit.

    The data module offers what :class:`~lit_moeedit.callbacks.KnowledgeEditing` looks for in any data module, all of
    it optional: ``tokenizer``, ``edit_facts()``, ``preservation_texts()``, ``probe_texts()`` and
    ``facts_edited(facts)``.

    Args:
        corpus: where the statements come from.
        tokenizer: a local path or hub id; ``None`` trains a byte-level BPE tokenizer from the corpus.
        vocab_size: largest vocabulary of the tokenizer that is trained.
        batch_size: statements per batch of each rank.
        samples_per_epoch: statements per epoch, on all ranks together.
        completion_only: whether the loss counts the answers only (otherwise every token).
        preservation_samples: how many training texts ``preservation_texts()`` returns.
        drop_edited: whether statements of edited facts are left out of the batches after the edit.
        seed: of the order of statements.

    Each batch is a dict of ``input_ids``, ``attention_mask`` and ``labels``, all int64 ``[batch, length]``, padded on
    the right.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: str | None = None,
        vocab_size: int = 6000,
        batch_size: int = 128,
        samples_per_epoch: int = 16384,
        completion_only: bool = True,
        preservation_samples: int = 4096,
        drop_edited: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("samples_per_epoch", samples_per_epoch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.corpus = corpus
        self.tokenizer_path = tokenizer
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.samples_per_epoch = samples_per_epoch
        self.completion_only = completion_only
        self.preservation_samples = preservation_samples
        self.drop_edited = drop_edited
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._excluded: set[str] = set()

    @override
    def setup(self, stage: str) -> None:
        if self.tokenizer is not None:
            return
        if self.tokenizer_path is None:
            self.tokenizer = self.corpus.train_tokenizer(self.vocab_size)
        else:
            self.tokenizer = pretrained_tokenizer(self.tokenizer_path)
        self._train = StatementDataset(self.tokenizer, self.corpus.train, self.corpus.prefixes)
        self._validation = StatementDataset(self.tokenizer, self.corpus.validation)
        log.info(
            "%d training statements in %d contexts, %d to validate on, %d facts to edit, %d tokens in the vocabulary",
            len(self.corpus.train),
            len(self.corpus.prefixes),
            len(self.corpus.validation),
            len(self.corpus.edits),
            len(self.tokenizer),
        )

    @override
    def train_dataloader(self) -> DataLoader[Encoding]:
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EpochSampler(self._train, self.samples_per_epoch, self.seed, self._excluded, ranks, rank)
        return DataLoader(self._train, self.batch_size, sampler=sampler, collate_fn=self._collate)

    @override
    def val_dataloader(self) -> DataLoader[Encoding]:
        edited = self.corpus.facts_of(self.corpus.edits)
        kept = [i for i in range(len(self._validation)) if self._validation.fact(i) not in edited]
        subset = torch.utils.data.Subset(self._validation, kept)
        return DataLoader(subset, batch_size=4 * self.batch_size, collate_fn=self._collate)

    @override
    def test_dataloader(self) -> DataLoader[Encoding]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Encoding]:
        return self.val_dataloader()

    def edit_facts(self) -> list[Fact]:
        """The facts to edit."""
        return self.corpus.edits

    def preservation_texts(self) -> list[str]:
        """Training texts that state none of the facts to edit, drawn by the seed.

        What a facts file names as neighbours of the edited facts is among them: these are statements of their own.
        """
        edited = self.corpus.facts_of(self.corpus.edits)
        texts = [
            join(join(prefix, s.prompt) if prefix else s.prompt, s.target)
            for s in self.corpus.train
            if s.fact not in edited
            for prefix in self.corpus.prefixes
        ]
        return random.Random(self.seed).sample(texts, min(self.preservation_samples, len(texts)))

    def probe_texts(self) -> list[str]:
        """The validation texts that state none of the facts to edit: what routing is watched on.

        An :class:`~lit_moeedit.data.atlas.Atlas` holds them out; those of a
        :class:`~lit_moeedit.data.corpus.FactsCorpus` are training statements that the edits leave alone.
        """
        edited = self.corpus.facts_of(self.corpus.edits)
        return [join(s.prompt, s.target) for s in self.corpus.validation if s.fact not in edited]

    def facts_edited(self, facts: Sequence[Fact]) -> None:
        """From the next epoch on, leave out the statements of ``facts`` (with ``drop_edited``)."""
        if self.drop_edited:
            self._excluded |= self.corpus.facts_of(facts)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"excluded": sorted(self._excluded)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._excluded |= set(state_dict["excluded"])

    def _collate(self, batch: list[Encoding]) -> dict[str, Tensor]:
        ids, mask = pad([encoding.ids for encoding in batch], self._pad_id)
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        if self.completion_only:
            starts = torch.tensor([encoding.target_start for encoding in batch])
            labels.masked_fill_(torch.arange(ids.shape[1]) < starts[:, None], IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @property
    def _pad_id(self) -> int:
        from lit_moeedit.data.encoding import pad_id

        if self.tokenizer is None:
            raise RuntimeError("the data module has no tokenizer before setup()")
        return pad_id(self.tokenizer)
