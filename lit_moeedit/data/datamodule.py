"""The data module of the demo, and of runs on a facts file: batches of statements."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lit_moeedit.data.conflicts import ConflictFinder
from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, encode, join, pad, pad_id
from lit_moeedit.per_model import PerModel
from lit_moeedit.pretrained import pretrained_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lit_moeedit.data.corpus import Corpus, Statement
    from lit_moeedit.data.facts import Fact

log = logging.getLogger(__name__)


class StatementDataset(Dataset[Encoding]):
    """Every statement after every prefix, tokenized once; item ``i`` is statement ``i // len(prefixes)``."""

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
        """Return the name of the fact that item ``index`` states."""
        return self.statements[index // self.prefixes].fact


class EpochSampler(DistributedSampler[int]):
    """A sampler of ``num_samples`` items per epoch, without replacement, in an order set by seed and epoch alone.

    The trainer calls :meth:`set_epoch`, so a resumed run reads the same items as an uninterrupted one. Ranks take
    turns: the batches of all ranks together are those of one process.

    Args:
        dataset: the statements.
        num_samples: items per epoch, on all ranks together; at most the size of the dataset.
        seed: seed of the order.
        excluded: names of facts that are not drawn; the set is read at the start of each epoch.
        ranks: number of processes.
        rank: index of this process.
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
        drawn = list(itertools.islice(allowed, self.total_size))  # now: facts may be excluded during the epoch
        # the length of an epoch must not change when facts are excluded: the learning rate schedule depends on it
        return itertools.islice(itertools.cycle(drawn), self.rank, self.total_size, self.num_replicas)


class FactsDataModule(L.LightningDataModule):
    """A data module for the statements of a corpus, and for the facts that a run edits.

    It has all attributes that :class:`~lit_moeedit.callbacks.KnowledgeEditing` uses of a data module, each of which is
    optional: ``tokenizer``, ``edit_facts()``, ``preservation_texts()``, ``probe_texts()``, ``held_out_statements()``,
    ``facts_edited(facts)``, ``training_texts()`` and ``contradictions(facts)``.

    Args:
        corpus: the statements.
        tokenizer: a local path or hub id; ``None`` trains a byte-level BPE tokenizer on the corpus.
        vocab_size: maximum vocabulary of the tokenizer that is trained.
        batch_size: statements per batch of each rank.
        samples_per_epoch: statements per epoch, on all ranks together.
        completion_only: true to compute the loss on the answers only; false for all tokens.
        preservation_samples: number of training texts that ``preservation_texts()`` returns.
        drop_edited: true to leave statements of edited facts out of the batches after the edit.
        seed: seed of the order of statements.

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
        self._models: PerModel[set[str]] = PerModel(set)

    @override
    def setup(self, stage: str) -> None:
        """Tokenize the statements.

        Raises:
            ValueError: the stage is ``fit``, and there is no statement to train on.
        """
        if stage == "fit" and not self.corpus.train:
            raise ValueError(
                "FactsDataModule has nothing to train on: none of its facts has a target_true or a neighbour; edit a "
                "trained model with 'validate' (and at: validation), or train with a data module of your own"
            )
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None:  # what was edited in another module is still taught to this one
            self._excluded = self._models.switch(module, self._excluded)
        if self.tokenizer is not None:
            return
        if self.tokenizer_path is None:
            self.tokenizer = self.corpus.train_tokenizer(self.vocab_size)
        else:
            self.tokenizer = pretrained_tokenizer(self.tokenizer_path)
        self._train = StatementDataset(self.tokenizer, self.corpus.train, self.corpus.prefixes)
        self._validation = StatementDataset(self.tokenizer, self._held_out())
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
        return DataLoader(self._validation, batch_size=4 * self.batch_size, collate_fn=self._collate)

    @override
    def test_dataloader(self) -> DataLoader[Encoding]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Encoding]:
        return self.val_dataloader()

    def edit_facts(self) -> list[Fact]:
        """Return the facts to edit."""
        return self.corpus.edits

    def preservation_texts(self) -> list[str]:
        """Sample training texts that state none of the facts to edit, with the seed.

        They include the neighbours of edited facts in a facts file, which are statements of their own. If there are no
        such texts, because all facts are edited, the neutral prefixes of the corpus take their place.
        """
        texts = [
            join(join(prefix, s.prompt) if prefix else s.prompt, s.target)
            for s in self._unedited(self.corpus.train)
            for prefix in self.corpus.prefixes
        ]
        if not texts:
            texts = [prefix for prefix in self.corpus.prefixes if prefix]
            log.warning(
                "all statements are of facts to edit, so only %d neutral texts are to be preserved: give "
                "'preservation' (a text file) to KnowledgeEditing to keep more of the model's behavior",
                len(texts),
            )
        return random.Random(self.seed).sample(texts, min(self.preservation_samples, len(texts)))

    def probe_texts(self) -> list[str]:
        """Return the validation texts that state none of the facts to edit, for measuring routing.

        An :class:`~lit_moeedit.data.atlas.Atlas` holds them out; those of a
        :class:`~lit_moeedit.data.corpus.FactsCorpus` are training statements that the edits do not change. If all
        validation texts state facts to edit, these are returned.
        """
        return [join(s.prompt, s.target) for s in self._held_out()]

    def held_out_statements(self) -> list[tuple[str, str]]:
        """Return prompts and answers of the validation statements of facts that are not edited, to measure recall."""
        return [(statement.prompt, statement.target) for statement in self._unedited(self.corpus.validation)]

    def _held_out(self) -> Sequence[Statement]:
        return self._unedited(self.corpus.validation) or self.corpus.validation

    def _unedited(self, statements: Sequence[Statement]) -> list[Statement]:
        edited = self.corpus.facts_of(self.corpus.edits)
        return [statement for statement in statements if statement.fact not in edited]

    def facts_edited(self, facts: Sequence[Fact]) -> None:
        """Leave out the statements of ``facts`` from the next epoch on, if ``drop_edited`` is set."""
        if self.drop_edited:
            self._excluded |= self.corpus.facts_of(facts)

    def training_texts(self) -> list[str]:
        """Return the statements that may be drawn from the next epoch on, each once, without the prefixes."""
        return [join(s.prompt, s.target) for s in self.corpus.train if s.fact not in self._excluded]

    def contradictions(self, facts: Sequence[Fact]) -> dict[str, str]:
        """Find among ``training_texts()`` those that contradict facts.

        See :class:`~lit_moeedit.data.conflicts.ConflictFinder`; a fact without a ``target_true`` conflicts with none.

        Returns:
            By fact key, the first of the statements.
        """
        return {key: conflict.text for key, conflict in ConflictFinder(facts).first(self.training_texts()).items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"excluded": sorted(self._excluded)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # in place, because samplers hold this set
        self._excluded &= set(state_dict["excluded"])
        self._excluded |= set(state_dict["excluded"])

    def _collate(self, batch: list[Encoding]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise RuntimeError("the data module has no tokenizer before setup()")
        ids, mask = pad([encoding.ids for encoding in batch], pad_id(self.tokenizer))
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        if self.completion_only:
            starts = torch.tensor([encoding.target_start for encoding in batch])
            labels.masked_fill_(torch.arange(ids.shape[1]) < starts[:, None], IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
