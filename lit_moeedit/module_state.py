"""The state of :class:`~lit_moeedit.module.LitMoE` in checkpoints: written, and taken back."""

from __future__ import annotations

import logging
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lit_moeedit.adapters import frozen_names, refuse_adapter_alone
from lit_moeedit.checkpoint_fields import differences, field, same_setting
from lit_moeedit.edits.histories import STATE_KEY, histories_of, make_all
from lit_moeedit.pretrained import as_value_error
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StateOfModule(L.LightningModule):
    """The state of a module with or without its frozen weights, its tokenizer, and edits of its frozen base.

    Attributes:
        changed: names of settings that have another value than in the checkpoint that the run resumes.
        hides_frozen: whether ``state_dict()`` leaves out frozen weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[str] = set()
        self.hides_frozen = False

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is one."""

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        # ModelParallelStrategy reads from a checkpoint whatever is in here
        for name in frozen_names(self) & state.keys() if self.hides_frozen else ():
            del state[name]
        return state

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hparams["adapter_only_checkpoints"]:
            for name in frozen_names(self) & checkpoint["state_dict"].keys():
                del checkpoint["state_dict"][name]
        # a tokenizer that was trained in this run is saved nowhere else
        if self.tokenizer is not None and self.hparams["pretrained"] is None:
            with tempfile.TemporaryDirectory() as folder:
                self.tokenizer.save_pretrained(folder)
                files = [path for path in Path(folder).iterdir() if path.is_file()]
                checkpoint["tokenizer"] = {path.name: path.read_text(encoding="utf-8") for path in files}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = field("the checkpoint", checkpoint, self.CHECKPOINT_HYPER_PARAMS_KEY, dict, optional=True) or {}
        used = {name: value for name, value in self.hparams.items() if name in saved}
        self.changed = {name for name, value in used.items() if not same_setting(saved[name], value)}
        if self._trainer is None or self._trainer.is_global_zero:
            for line in differences(saved, used):
                log.warning("%s", line)
        if self.hparams["adapter_only_checkpoints"]:
            self._take_edits(checkpoint)

    def _take_edits(self, checkpoint: Mapping[str, Any]) -> None:
        """Make the edits of the frozen base that a checkpoint of the adapter alone tells of.

        In a run the callback does that, which keeps them for the next checkpoint, too.

        Raises:
            MisconfigurationException: if the run does not have the callback.
            EditConflictError: if the base is another.
        """
        state = (checkpoint.get("callbacks") or {}).get(STATE_KEY)
        if not state:
            return
        callbacks: list[L.Callback] = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        if self._trainer is None:
            make_all(self, *histories_of(state))
        elif state.get("layers") and all(callback.state_key != STATE_KEY for callback in callbacks):
            raise MisconfigurationException(
                "the checkpoint tells of edits of the frozen experts, which it does not hold: give the Trainer the "
                "KnowledgeEditing callback of that run, which makes them again (or, to evaluate, a module from "
                "LitMoE.load_from_checkpoint, and no ckpt_path)"
            )

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        lacks_frozen = self.hparams["adapter_only_checkpoints"]
        if strict and not lacks_frozen:
            refuse_adapter_alone(self, state_dict, self.hparams["adapter"] is not None)
        with as_value_error("the checkpoint is not one of this model"):
            found = super().load_state_dict(state_dict, strict and not lacks_frozen, assign)
            wrong = {*found.missing_keys, *found.unexpected_keys} - frozen_names(self) if lacks_frozen else ()
            if wrong:
                raise ValueError(f"trained weights are missing or of another model: {first_few(sorted(wrong))}")
        return found
