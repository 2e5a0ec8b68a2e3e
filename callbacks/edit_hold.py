"""The callback that holds edits where text cannot be replayed: hidden states at the edit tokens stay where they are."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.kept import in_blocks, of_blocks
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.replaced_step import ReplacedStep, Step, add_loss, check_further_forward
from lit_moeedit.callbacks.resources import check_parallelism, find_tokenizer
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.encoding import EditToken, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.held_states import edit_prompts, edit_states, measure_states, relative_distance
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.replay import Draws
from lit_moeedit.reports import Held
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

TOKEN_BUDGET = 4096
"""Maximum number of tokens of a batch when hidden states are measured after an edit."""
REPORTED = 32
"""Number of steps over which the distance is averaged for reports."""


class HeldPrompt(NamedTuple):
    """A prompt up to its edit token, and the output of a layer there right after the edit, ``[d_model]``."""

    layer: int
    ids: Sequence[int]
    state: Tensor


class EditHold(StateOfWeights, EditListener):
    """Hold the hidden states at the edit tokens where edits have put them, so that edits outlive the rest of training.

    From the first edit on, each step has a further forward of some prompts of edited facts, up to the highest edited
    layer. The loss grows by ``weight`` times the squared distance of its output at the edit tokens from what it was
    right after the edit, over the squared norm of the latter. No text of the new targets is trained on, and batches may
    have any form; where rows can be added to them, :class:`~lit_moeedit.callbacks.EditReplay` keeps more of the edits
    and costs less. Facts of all :class:`~lit_moeedit.callbacks.KnowledgeEditing` of the trainer are held that are
    generated right after their edit, while it is in the weights.

    Checkpoints get ``4 · contexts · d_model`` bytes for each edit token of a fact. Which prompts a step takes depends
    on the seed, the batch and the rank alone.

    Args:
        rows: number of prompts of a step, on each rank.
        every_n_steps: add the loss in every so many optimizer steps only.
        weight: factor of the loss.
        seed: seed of the draws.
        tokenizer: a path or hub id; ``None`` takes that of the module or the data module.
        name: log ``hold_<name>/…``.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: when the run starts, if there is no KnowledgeEditing callback, or the module cannot
            be used: under manual optimization and DeepSpeed ZeRO stage 3.

    Example:
        >>> EditHold(rows=8).rows
        8
    """

    groups = ("hold",)
    state_names = ("_states", "_renewals")

    def __init__(
        self,
        rows: int = 4,
        every_n_steps: int = 1,
        weight: float = 1.0,
        seed: int = 0,
        tokenizer: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        for label, value in (("rows", rows), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise ValueError(f"{label} must be at least 1, got {value}")
        if not 0.0 < weight < math.inf:
            raise ValueError(f"weight must be above 0, got {weight}")
        self.rows, self.every_n_steps, self.weight = rows, every_n_steps, weight
        self._draws, self._tokenizer_source = Draws(seed), tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prompts: dict[str, list[HeldPrompt]] = {}
        self._seen: Sequence[Any] | None = None
        self._step = ReplacedStep()
        self._distances: deque[Tensor] = deque(maxlen=REPORTED)

    @override
    def begin_state(self) -> None:
        # by label of a callback and fact key, [prompts, d_model]
        self._states: dict[str, dict[str, Tensor]] = {}
        self._renewals: dict[str, int] = {}

    @property
    def held(self) -> frozenset[str]:
        """Keys of the facts that are held now."""
        return frozenset(self._prompts)

    @property
    def result(self) -> Held | None:
        """The facts that are held now, for reports; ``None`` if no fact has been held."""
        # a run that is resumed at its end has no batch for which prompts are taken
        facts = self._prompts if self._seen is not None else {key for own in self._states.values() for key in own}
        if not facts:
            return None
        distance = float(torch.stack(list(self._distances)).mean()) if self._distances else None
        return Held(self.rows, self.every_n_steps, self.weight, len(facts), distance)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, for reports."""
        names = ("rows", "every_n_steps", "weight")
        return {**{name: getattr(self, name) for name in names}, "seed": self._draws.seed}

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_parallelism(trainer, pl_module, type(self).__name__)
        self._tokenizer, self._seen, self._prompts = None, None, {}
        self._distances.clear()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        own = type(self).__name__
        if not callbacks_of(trainer, EditState):
            raise MisconfigurationException(f"{own} has nothing to hold: give the Trainer a KnowledgeEditing callback")
        check_further_forward(pl_module, own, "EditReplay without weight needs none")
        self._find_tokenizer(trainer, pl_module)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        if event.result.kept and trainer.state.fn == TrainerFn.FITTING:
            missed = {fact.key for fact in event.missed}
            facts = [fact for fact in event.result.facts if fact.key not in missed]
            editing = next(own for own in callbacks_of(trainer, EditState) if own.name == event.name)
            for other in callbacks_of(trainer, EditState):
                self._forget_replaced(other)
            self._measure(trainer, pl_module, editing, facts)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()  # if the last batch was skipped, its end was not told
        self._take_prompts(trainer, pl_module)
        if self._prompts and trainer.global_step % self.every_n_steps == 0:
            number = trainer.fit_loop.epoch_loop.total_batch_idx
            start = (number * trainer.world_size + trainer.global_rank) * self.rows
            drawn = self._draws.draw(self._prompts, self.rows, start, number, trainer.global_rank)

            def step(original: Step, *args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                return output if output is None else add_loss(output, self.weight * self._distance(pl_module, drawn))

            self._step.put(pl_module, step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step.restore()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step.restore()
        if self.result is not None:
            log.info("%s%s", self.heading, f"Hold: {self.result}")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._step.restore()

    @override
    def state_dict(self) -> dict[str, Any]:
        known = {label: in_blocks(own) for label, own in self._states.items() if own}
        return {
            "facts": {label: facts for label, (facts, _) in known.items()},
            "states": {label: states for label, (_, states) in known.items()},
            "renewals": dict(self._renewals),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where = "the state of EditHold in the checkpoint"
        check_fields(where, state_dict, facts={str: list}, states={str: Tensor}, renewals={str: int})
        found: dict[str, dict[str, Tensor]] = {}
        for label, keys in state_dict["facts"].items():
            states = state_dict["states"].get(label)
            if states is None or states.ndim != 3 or len(states) != len(keys) or not bool(states.isfinite().all()):
                raise CheckpointError(
                    f"{where}: field 'states' of {label!r} should be finite, of shape [{len(keys)}, contexts, d_model]"
                )
            found[label] = of_blocks([str(key) for key in keys], states.float().cpu())
        self._states, self._renewals = found, dict(state_dict["renewals"])
        self._seen = None

    # -- the work -----------------------------------------------------------------------------------------------------

    def _find_tokenizer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, type(self).__name__)
        return self._tokenizer

    def _encode(
        self, trainer: L.Trainer, pl_module: L.LightningModule, editing: EditState, facts: Sequence[Fact]
    ) -> dict[str, list[list[int]]]:
        contexts = getattr(editing.editor, "contexts", ("",))
        token: EditToken = editing.place["token"] or "last"
        every = getattr(editing.editor, "edits_every_token", False)
        return edit_prompts(self._find_tokenizer(trainer, pl_module), facts, contexts, token, every)

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, editing: EditState, facts: Sequence[Fact]
    ) -> None:
        """Measure where the hidden states of facts are now. Every rank calls this."""
        with Ranks.current().together():
            model, prompts = find_model(pl_module), self._encode(trainer, pl_module, editing, facts)
            rows = [ids for own in prompts.values() for ids in own]
            layer = expert_layers(model)[max(editing.place["layers"])]
            padding = pad_id(self._find_tokenizer(trainer, pl_module))
            states = measure_states(model, layer, rows, padding, TOKEN_BUDGET).split([len(p) for p in prompts.values()])
        self._states = {
            **self._states,
            editing.label: {**self._states.get(editing.label, {}), **dict(zip(prompts, states, strict=True))},
        }
        self._renewals = {**self._renewals, editing.label: editing.renewals}

    def _forget_replaced(self, editing: EditState) -> None:
        """Forget the states of facts that another edit of their prompts has replaced."""
        known = self._states.get(editing.label, {})
        left = {key: states for key, states in known.items() if key in editing.neighbours_before}
        if len(left) < len(known):
            self._states = {**self._states, editing.label: left}

    def _take_prompts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the prompts of the facts that are edited now, if these have changed."""
        editings = callbacks_of(trainer, EditState)
        for editing in editings:
            if editing.renewals != self._renewals.get(editing.label, editing.renewals):
                known = self._states.get(editing.label, {})
                facts = [fact for fact in editing.recorded_facts if fact.key in known]
                self._measure(trainer, pl_module, editing, facts)
        seen = [self._states, *(editing.neighbours_before for editing in editings)]
        if self._seen is not None and all(a is b for a, b in zip(seen, self._seen, strict=True)):
            return
        self._seen, found = seen, dict[str, dict[str, list[HeldPrompt]]]()
        for editing in editings:
            states = self._states.get(editing.label, {})
            facts = [fact for fact in editing.recorded_facts if fact.key in states]
            prompts = self._encode(trainer, pl_module, editing, facts) if facts else {}
            for fact in facts:
                self._check_shape(pl_module, editing, prompts[fact.key], states[fact.key])
                layer, rows = max(editing.place["layers"]), zip(prompts[fact.key], states[fact.key], strict=True)
                # of two edits of one prompt the later one is held
                found[fact.prompt] = {fact.key: [HeldPrompt(layer, ids, state) for ids, state in rows]}
        self._prompts = {key: held for own in found.values() for key, held in own.items()}
        if self._prompts:
            log.info("%sthe hidden states of %d edited facts are held from now on", self.heading, len(self._prompts))

    def _check_shape(
        self, pl_module: L.LightningModule, editing: EditState, prompts: Sequence[Any], states: Tensor
    ) -> None:
        shape = [len(prompts), find_model(pl_module).config.get_text_config().hidden_size]
        if list(states.shape) != shape:
            raise CheckpointError(
                f"the checkpoint has hidden states of shape {list(states.shape)} for each fact of {editing.label}, but "
                f"{shape} are needed; resume with the contexts and target_tokens of the editor that it was written with"
            )

    def _distance(self, pl_module: L.LightningModule, drawn: Sequence[HeldPrompt]) -> Tensor:
        """Compute the mean distance of the drawn prompts."""
        model, by_layer = find_model(pl_module), dict[int, list[HeldPrompt]]()
        for prompt in drawn:
            by_layer.setdefault(prompt.layer, []).append(prompt)
        assert self._tokenizer is not None
        layers, total = expert_layers(model), torch.zeros((), device=pl_module.device)
        for index, own in by_layer.items():
            states = edit_states(model, layers[index], [prompt.ids for prompt in own], pad_id(self._tokenizer))
            distance = relative_distance(states, torch.stack([prompt.state for prompt in own]))
            total = total + distance * (len(own) / len(drawn))
        self._distances.append(total.detach())
        pl_module.log(f"{self.metrics_prefix}/distance", total.detach())
        return total
