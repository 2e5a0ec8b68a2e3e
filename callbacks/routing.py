"""The callback that measures how routing shifts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks.averages import edited_weights, validated_weights
from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.resources import check_parallelism, find_tokenizer, from_datamodule, log_metrics
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.facts import Fact
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.editing.routing_trace import MAX_PROBE_TOKENS, RoutingTrace, trace_routing
from lit_moeedit.metrics import ExpertLoad, RoutingDivergence, RoutingSimilarity
from lit_moeedit.models.experts import expert_layers, find_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class RoutingMonitor(StateOfWeights, EditListener):
    """Measure on a probe text how the routers' choices change: by every edit, and since the run's start.

    Around an edit it logs ``routing_edit/…``, at every validation (compared with the run's start) ``routing/…``:
    ``similarity`` (Jaccard overlap of the top-k expert sets), ``kl``, ``js`` (nats) and ``load_entropy``, for each
    layer with experts (``…/layer_3``) and as the mean over them. A trainer may have several monitors, each with a name.

    Args:
        probe: texts; ``None`` asks the data module's ``probe_texts()``, then ``preservation_texts()``.
        tokenizer: a path or hub id; ``None`` takes the ``tokenizer`` attribute of the module or the data module.
        max_texts: use at most this many texts.
        name: log ``routing_<name>_edit/…`` and ``routing_<name>/…`` instead.

    Raises:
        ValueError: if ``max_texts`` is less than 1, or the name has other than letters, digits, ``_``, ``-`` and ``.``.
        MisconfigurationException: when the run starts, if there is no probe text or no tokenizer, another monitor has
            the same name, or the model is sharded in a way that is not supported, see
            :class:`~lit_moeedit.callbacks.KnowledgeEditing`.
    """

    groups = ("routing", "routing_edit")
    state_names = ("_start", "_digest", "last_edit")

    def __init__(
        self,
        probe: list[str] | None = None,
        tokenizer: str | None = None,
        max_texts: int = 256,
        name: str | None = None,
    ) -> None:
        super().__init__(name, probe=None if probe is None else _digest(probe)[:8], max_texts=max_texts)
        if max_texts < 1:
            raise ValueError(f"max_texts must be at least 1, got {max_texts}")
        self.max_texts = max_texts
        self._probe_source = probe
        self._tokenizer_source = tokenizer
        self._probe: list[str] = []
        self._has_begun = False
        self._tokenizer: Any = None
        self._before_edit: RoutingTrace | None = None

    @override
    def begin_state(self) -> None:
        self._start: RoutingTrace | None = None
        self._digest = ""
        self.last_edit: dict[str, float] = {}
        """Routing metrics of the latest edit, named as they are logged, without the prefix."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            check_parallelism(trainer, pl_module, "RoutingMonitor")
        self._probe, self._has_begun = [], False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._find(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after all callbacks have checked the run, and DeepSpeed has restored weights and states
        super().on_train_start(trainer, pl_module)
        self._begin(pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking and not self._has_begun:
            with edited_weights(trainer, pl_module):
                self._prepare(trainer, pl_module)

    on_test_start = on_validation_start

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self._start is None:
            return
        with validated_weights(trainer, pl_module, self):
            shift = self.compare(pl_module, self._start, self._trace(pl_module))
        named = {f"{self.metrics_prefix}/{name}": value for name, value in shift.items()}
        pl_module.log_dict(named, sync_dist=trainer.world_size > 1)

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._prepare(trainer, pl_module)
        self._before_edit = self._trace(pl_module)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        assert self._before_edit is not None
        self.last_edit = self.compare(pl_module, self._before_edit, self._trace(pl_module))
        self._before_edit = None
        log_metrics(trainer, {f"{self.metrics_prefix}_edit/{name}": value for name, value in self.last_edit.items()})
        log.info(
            "%srouting similarity %.3f, KL %.4f nats over the edit",
            self.heading,
            self.last_edit["similarity/mean"],
            self.last_edit["kl/mean"],
        )

    def compare(self, pl_module: L.LightningModule, before: RoutingTrace, after: RoutingTrace) -> dict[str, float]:
        """Compute all routing metrics of two traces of the same text."""
        layers = expert_layers(find_model(pl_module))
        # every rank traces the whole probe, so there is nothing to add up
        similarity = RoutingSimilarity(list(layers), sync_on_compute=False)
        divergence = RoutingDivergence(list(layers), sync_on_compute=False)
        load = ExpertLoad(max(x.num_experts for x in layers.values()), list(layers), sync_on_compute=False)
        similarity.update(before.experts, after.experts)
        divergence.update(before.probabilities, after.probabilities)
        load.update(after.experts)
        found = {f"similarity/{name}": float(value) for name, value in similarity.compute().items()}
        found |= {name: float(value) for name, value in divergence.compute().items()}
        entropy = {name: value for name, value in load.compute().items() if name.startswith("entropy/")}
        return found | {f"load_{name}": float(value) for name, value in entropy.items()}

    def figure(self) -> Figure | None:
        """Plot the latest edit's routing similarity by layer; ``None`` without an edit or without matplotlib."""
        split = ((name.partition("/"), value) for name, value in self.last_edit.items())
        shown = {name: torch.tensor(value) for (kind, _, name), value in split if kind == "similarity"}
        if not shown or find_spec("matplotlib") is None:
            return None
        layers = [int(name.removeprefix("layer_")) for name in shown if name != "mean"]
        return RoutingSimilarity(layers).plot(shown)[0]

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._start is None:
            return {}
        # the run's start cannot be measured again after a resume; small dtypes keep it small
        experts: Mapping[int, Tensor] = {i: x.to(torch.int16) for i, x in self._start.experts.items()}
        probabilities: Mapping[int, Tensor] = {i: x.half() for i, x in self._start.probabilities.items()}
        return {"experts": experts, "probabilities": probabilities, "probe": self._digest, "last_edit": self.last_edit}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        where = "the state of RoutingMonitor in the checkpoint"
        traced = {int: Tensor}
        check_fields(where, state_dict, probe=str, last_edit={str: (int, float)}, experts=traced, probabilities=traced)
        experts, probabilities = state_dict["experts"], state_dict["probabilities"]
        is_same = experts.keys() == probabilities.keys()
        if not is_same or not all(_is_routing(experts[i], probabilities[i]) for i in experts):
            raise CheckpointError(
                f"{where}: fields 'experts' and 'probabilities' should hold experts [N, k] and finite probabilities "
                "[N, E] of the same layers"
            )
        self._digest, self.last_edit = state_dict["probe"], dict(state_dict["last_edit"])
        self._start = RoutingTrace(
            {i: x.long() for i, x in experts.items()}, {i: x.float() for i, x in probabilities.items()}
        )

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find(trainer, pl_module)
        self._begin(pl_module)

    def _find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the probe and the tokenizer, once in a run."""
        if self._probe:
            return
        check_parallelism(trainer, pl_module, "RoutingMonitor")
        self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, "RoutingMonitor")
        texts = (
            self._probe_source
            or from_datamodule(trainer, "probe_texts")
            or from_datamodule(trainer, "preservation_texts")
        )
        if not texts:
            raise MisconfigurationException(
                "RoutingMonitor needs texts to watch: give 'probe', or a data module with probe_texts()"
            )
        # cut now, so that no trace tokenizes what it does not use
        self._probe = cut_texts(self._tokenizer, list(texts)[: self.max_texts], MAX_PROBE_TOKENS)

    def _begin(self, pl_module: L.LightningModule) -> None:
        """Trace the run's start, once, unless a checkpoint brought one that can be compared with."""
        if self._has_begun:
            return
        self._has_begun = True
        digest = _digest(self._probe)
        if self._start is not None and not (self._digest == digest and _is_of(self._start, pl_module)):
            log.warning("probe text or model are not those of the checkpoint; routing is compared with now instead")
            self._start = None
        self._digest = digest
        if self._start is None:
            self._start = self._trace(pl_module)

    def _trace(self, pl_module: L.LightningModule) -> RoutingTrace:
        return trace_routing(find_model(pl_module), self._tokenizer, self._probe)


def _digest(texts: Sequence[str]) -> str:
    return sha256("\0".join(texts).encode()).hexdigest()


def _is_routing(experts: Tensor, probabilities: Tensor) -> bool:
    return (
        experts.ndim == probabilities.ndim == 2
        and len(experts) == len(probabilities)
        and not experts.is_floating_point()
        and probabilities.is_floating_point()
        and bool(((experts >= 0) & (experts < probabilities.shape[1])).all())
        and bool(probabilities.isfinite().all())
    )


def _is_of(trace: RoutingTrace, pl_module: L.LightningModule) -> bool:
    """Tell whether a trace is of a model with these layers and experts."""
    layers = expert_layers(find_model(pl_module))
    return {i: x.num_experts for i, x in layers.items()} == {i: x.shape[1] for i, x in trace.probabilities.items()}
