"""The runs in which statements of edited facts cannot be trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.replaced_step import check_further_forward

if TYPE_CHECKING:
    from lit_moeedit.callbacks.edit_replay import EditReplay


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
