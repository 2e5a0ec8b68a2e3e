"""Facts, corpora and data modules."""

from lit_moeedit.data.atlas import Atlas
from lit_moeedit.data.corpus import Corpus, FactsCorpus, Statement
from lit_moeedit.data.datamodule import FactsDataModule
from lit_moeedit.data.facts import (
    CheckedFacts,
    Fact,
    FactError,
    FactsError,
    Neighbour,
    Probe,
    read_facts,
    validate_facts,
)
from lit_moeedit.data.neutral import neutral_texts

__all__ = [
    "Atlas",
    "CheckedFacts",
    "Corpus",
    "Fact",
    "FactError",
    "FactsCorpus",
    "FactsDataModule",
    "FactsError",
    "Neighbour",
    "Probe",
    "Statement",
    "neutral_texts",
    "read_facts",
    "validate_facts",
]
