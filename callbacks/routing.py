"""The callback that watches how routing shifts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks import states
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.resources import find_tokenizer, from_datamodule, ranks_of
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.routing_trace import RoutingTrace, trace_routing
from lit_moeedit.metrics import ExpertLoad, RoutingDivergence, RoutingSimilarity
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.sharding.ranks import Ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class RoutingMonitor(EditListener):
    """Measures on a probe text how the routers' choices change: by every edit, and since the run's start.

    Around an edit it logs ``routing_edit/…``, at every validation (compared with the run's start) ``routing/…``:
    ``similarity`` (Jaccard overlap of the top-k expert sets), ``kl``, ``js`` (nats) and ``load_entropy``, for each
    layer with experts (``…/layer_3``) and as mean over them.

    Args:
        probe: texts; ``None`` asks the data module's ``probe_texts()``, then ``preservation_texts()``.
        tokenizer: a path or hub id; ``None`` takes the ``tokenizer`` attribute of the module or the data module.
        max_texts: use at most this many texts.

    Raises:
        ValueError: if ``max_texts`` is less than 1.
        MisconfigurationException: when the run starts, if there is no probe text or no tokenizer.
    """

    def __init__(
        self,
        probe: list[str] | None = None,
        tokenizer: str | None = None,
        max_texts: int = 256,
    ) -> None:
        super().__init__()
        if max_texts < 1:
            raise ValueError(f"max_texts must be at least 1, got {max_texts}")
        self.max_texts = max_texts
        self._probe_source = probe
        self._tokenizer_source = tokenizer
        self._probe: list[str] = []
        self._has_begun = False
        self.ranks: Ranks | None = None
        """The processes, known once routing has been traced."""
        self._tokenizer: Any = None
        self._start: RoutingTrace | None = None
        self._digest = ""
        self._before_edit: RoutingTrace | None = None
        self.last_edit: dict[str, float] = {}
        """Routing metrics of the latest edit, named as they are logged, without the prefix."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._probe, self._has_begun, self.ranks = [], False, None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find(trainer, pl_module)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # DeepSpeed restores weights and states between the start of the fit and here
        self._begin(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._prepare(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prepare(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self._start is None:
            return
        shift = self.compare(pl_module, self._start, self._trace(trainer, pl_module))
        named = {f"routing/{name}": value for name, value in shift.items()}
        pl_module.log_dict(named, sync_dist=trainer.world_size > 1)

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._prepare(trainer, pl_module)
        self._before_edit = self._trace(trainer, pl_module)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        assert self._before_edit is not None
        self.last_edit = self.compare(pl_module, self._before_edit, self._trace(trainer, pl_module))
        self._before_edit = None
        for logger in trainer.loggers:
            metrics = {f"routing_edit/{name}": value for name, value in self.last_edit.items()}
            logger.log_metrics(metrics, step=trainer.global_step)
        log.info(
            "routing similarity %.3f, KL %.4f nats over the edit",
            self.last_edit["similarity/mean"],
            self.last_edit["kl/mean"],
        )

    def compare(self, pl_module: L.LightningModule, before: RoutingTrace, after: RoutingTrace) -> dict[str, float]:
        """All routing metrics of two traces of the same text."""
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
        """Bars of the latest edit's routing similarity by layer; ``None`` without an edit or without matplotlib."""
        layers = {name: value for name, value in self.last_edit.items() if name.startswith("similarity/layer_")}
        if not layers or find_spec("matplotlib") is None:
            return None
        indices = [int(name.rpartition("_")[2]) for name in layers]
        shown = {f"layer_{index}": torch.tensor(value) for index, value in zip(indices, layers.values(), strict=True)}
        mean = torch.tensor(self.last_edit["similarity/mean"])
        return RoutingSimilarity(indices).plot({"mean": mean, **shown})[0]

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._start is None:
            return {}
        # the run's start cannot be measured again after a resume; small types keep it small
        experts: Mapping[int, Tensor] = {i: x.to(torch.int16) for i, x in self._start.experts.items()}
        probabilities: Mapping[int, Tensor] = {i: x.half() for i, x in self._start.probabilities.items()}
        return {"experts": experts, "probabilities": probabilities, "probe": self._digest, "last_edit": self.last_edit}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            state = states.routing(state_dict)
            self._digest, self.last_edit = state["probe"], dict(state["last_edit"])
            self._start = RoutingTrace(
                {i: x.long() for i, x in state["experts"].items()},
                {i: x.float() for i, x in state["probabilities"].items()},
            )

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find(trainer, pl_module)
        self._begin(trainer, pl_module)

    def _find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the probe and the tokenizer, once in a run."""
        if self._probe:
            return
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
        self._probe = list(texts)[: self.max_texts]

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Trace the run's start, once, unless a checkpoint brought one that can be compared with."""
        if self._has_begun:
            return
        self._has_begun = True
        digest = sha256("\0".join(self._probe).encode()).hexdigest()
        if self._start is not None and not (self._digest == digest and _is_of(self._start, pl_module)):
            log.warning("probe text or model are not those of the checkpoint; routing is compared with now instead")
            self._start = None
        self._digest = digest
        if self._start is None:
            self._start = self._trace(trainer, pl_module)

    def _trace(self, trainer: L.Trainer, pl_module: L.LightningModule) -> RoutingTrace:
        # making ranks is a collective operation, and leaves a process group behind
        self.ranks = self.ranks if self.ranks is not None else ranks_of(trainer)
        return trace_routing(find_model(pl_module), self._tokenizer, self._probe, ranks=self.ranks)


def _is_of(trace: RoutingTrace, pl_module: L.LightningModule) -> bool:
    """Whether a trace is of a model with these layers and experts."""
    layers = expert_layers(find_model(pl_module))
    return {i: x.num_experts for i, x in layers.items()} == {i: x.shape[1] for i, x in trace.probabilities.items()}
