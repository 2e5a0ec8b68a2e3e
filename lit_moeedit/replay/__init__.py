"""Replay: statements of edited facts among the rows of training batches."""

from lit_moeedit.replay.batches import (
    BatchFormError,
    append_rows,
    as_batch,
    check_form,
    find_parts,
    with_labels,
    with_parts,
)
from lit_moeedit.replay.draws import Draws
from lit_moeedit.replay.statements import Statements

__all__ = [
    "BatchFormError",
    "Draws",
    "Statements",
    "append_rows",
    "as_batch",
    "check_form",
    "find_parts",
    "with_labels",
    "with_parts",
]
