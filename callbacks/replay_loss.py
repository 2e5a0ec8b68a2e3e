"""The loss of statements that get a forward of their own."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_moeedit.data.encoding import Encoding, pad_id
from lit_moeedit.models.experts import find_model
from lit_moeedit.replay import as_batch


def loss_of_statements(
    pl_module: L.LightningModule, rows: Sequence[Encoding], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Compute the loss of statements: that of the module's ``replay_loss``, if it has one, else that of its model.

    Args:
        pl_module: the module.
        rows: the statements.
        tokenizer: the model's tokenizer.

    Returns:
        A scalar with a gradient.
    """
    own = as_batch(rows, pad_id(tokenizer))
    batch = {name: tensor.to(pl_module.device) for name, tensor in own.items() if name != "position_ids"}
    loss_of = getattr(pl_module, "replay_loss", None)
    loss: Tensor = loss_of(batch) if callable(loss_of) else find_model(pl_module)(**batch, use_cache=False).loss
    return loss
