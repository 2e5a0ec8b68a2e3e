"""The runs in which statements of edited facts cannot be trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.sharding.shards import is_partitioned

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
    if replay.weight is not None and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{own}: weight needs automatic optimization, which {type(pl_module).__name__} does not use; leave "
            "weight out to add statements as rows of the batch"
        )
    if replay.weight is not None and any(is_partitioned(weight) for weight in pl_module.parameters()):
        raise MisconfigurationException(
            f"{own}: weight needs a second forward in each step, after which DeepSpeed ZeRO stage 3 reduces "
            "gradients twice and fails; leave weight out to add statements as rows of the batch"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{own} adds rows to batches, but training_step of {type(pl_module).__name__} takes dataloader_iter"
        )
