"""The weights of a run right after its last edit, kept in memory for an autopsy when training ends."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Evaluation, evaluate
from lit_moeedit.edits import Autopsy, autopsy
from lit_moeedit.models.experts import find_model
from lit_moeedit.models.parts import find_kinds, stored_tensors
from lit_moeedit.reports import MissingAutopsy
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

_RESUMED = "the run was resumed after its last edit, and checkpoints do not hold the weights from right after it"


class JustEdited:
    """The weights of this rank right after the last edit, up to the last edited layer, in main memory.

    Frozen weights are not kept, but for the down-projections that a later edit may change.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Part] = {}
        self._evaluation: Evaluation | None = None
        self._facts: Sequence[Fact] = ()
        self._layers: tuple[int, ...] = ()
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights as they are now, in the place of earlier ones, and measure all facts edited so far.

        Every rank calls this after an edit.
        """
        editings = [editing for editing in callbacks_of(trainer, KnowledgeEditing) if editing.applied_facts]
        if not editings:
            return
        model, self._kept = find_model(pl_module), {}
        self._layers = tuple(sorted({index for editing in editings for index in editing.editor.layers}))
        self._tokenizer = editings[0].tokenizer
        # neighbours tell nothing of what was lost
        self._facts = [replace(fact, neighbours=()) for editing in editings for fact in editing.applied_facts]
        self._evaluation = evaluate(model, self._tokenizer, self._facts)
        kinds, kept = find_kinds(model, self._layers), {}
        for name, tensor in stored_tensors(model).items():
            is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if kinds[name] != "above and head" and (not is_frozen or kinds[name] == "down-projections"):
                kept[name] = Part.of(tensor).to("cpu")
        self._kept = kept
        size = sum(part.elements.nbytes for part in kept.values())
        log.info("%.3g GB of just-edited weights are kept in main memory for the autopsy", size / 1e9)

    def examine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Autopsy | MissingAutopsy | None:
        """Find which part carried the loss since the last edit.

        Every rank calls this.

        Returns:
            The result; if this process has seen no edit, but the weights have some, the reason why there is none.
        """
        if self._evaluation is None or self._tokenizer is None:
            editings = [editing for editing in callbacks_of(trainer, KnowledgeEditing) if editing.applied_facts]
            return MissingAutopsy(_RESUMED, _command(trainer, pl_module)) if editings else None
        model = find_model(pl_module)
        kinds = find_kinds(model, self._layers)
        frozen = {
            name: Part.of(tensor)
            for name, tensor in stored_tensors(model).items()
            if name not in self._kept and kinds[name] != "above and head"
        }
        known = {**frozen, **self._kept}
        return autopsy(
            model, self._tokenizer, self._facts, self._layers, known, self._evaluation, ranks=Ranks.current()
        )


def _command(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Return the command that examines checkpoints, with what is known of its arguments.

    The checkpoint that the run was resumed from stands for the model right after the edit; an earlier one covers more.
    """
    final, resumed = "FINAL", trainer.ckpt_path
    for callback in callbacks_of(trainer, ModelCheckpoint):
        # without a monitor, the best is the latest
        latest = callback.last_model_path or ("" if callback.monitor else callback.best_model_path)
        final = latest or final
    edited = str(resumed) if resumed is not None and Path(str(resumed)).exists() else "EDITED"
    words = ["lit-moeedit", "edits", "autopsy", final, "--edited", edited]
    source = getattr(pl_module, "hparams", {}).get("pretrained")
    if source is not None and Path(str(source)).is_dir():
        words += ["--base", str(source)]  # for the config and the tokenizer
    return shlex.join(words)
