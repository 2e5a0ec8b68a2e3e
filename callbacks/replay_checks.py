"""The runs in which statements of edited facts cannot be trained on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.replaced_step import check_further_forward
from lit_moeedit.replay import find_parts

if TYPE_CHECKING:
    from lit_moeedit.callbacks.edit_replay import EditReplay

log = logging.getLogger(__name__)

LONG = 8
"""A batch whose rows are this many times as long as the longest statement wastes rows on statements."""


def check_run(replay: EditReplay, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Check when a run starts that there is something to state, and that the module can be trained on it.

    Raises:
        MisconfigurationException: naming what is missing or what does not go together.
    """
    own = type(replay).__name__
    if replay.edits is None and not callbacks_of(trainer, EditState):
        raise MisconfigurationException(
            f"{own} has nothing to state: give the Trainer a KnowledgeEditing callback, or {own} the argument "
            "'edits' (a folder of edits)"
        )
    if replay.weight is not None:
        advice = "leave weight out to add statements as rows of the batch"
        check_further_forward(pl_module, f"{own}: weight", advice)
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{own} adds rows to batches, but training_step of {type(pl_module).__name__} takes dataloader_iter"
        )


def warn_of_long_rows(batch: Any, longest: int, heading: str) -> bool:
    """Warn if statements would waste rows of a batch.

    Args:
        batch: the batch.
        longest: number of tokens of the longest statement.
        heading: beginning of the message.

    Returns:
        ``True`` if it has warned.
    """
    part = next(find_parts(batch), None)
    length = 0 if part is None else part["input_ids"].shape[1]
    if length < LONG * max(1, longest):
        return False
    log.warning(
        "%sthe rows of the batches have %d tokens, and each statement of at most %d takes a whole row; weight: 1.0 "
        "gives statements a forward of their own, which costs less",
        heading,
        length,
        longest,
    )
    return True
