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
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks.averages import edited_weights, validated_weights
from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.charts import log_curves, log_figures, log_summary, shows_figures
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.resources import check_parallelism, find_tokenizer, from_datamodule
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.facts import Fact
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.editing.routing_trace import MAX_PROBE_TOKENS, RoutingTrace, compare_traces, trace_routing
from lit_moeedit.interrupts import uninterrupted
from lit_moeedit.metrics import ExpertLoad, RoutingSimilarity
from lit_moeedit.metrics._plots import plot_heat_map
from lit_moeedit.models.experts import expert_layers, find_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MAX_HISTORY = 200
"""Maximum number of validations in the state, and so in a heat map."""


_QUANTITIES: dict[str, tuple[str, str, tuple[float, float] | None]] = {
    "similarity": ("Routing similarity", "Jaccard overlap of top-k sets", (0.0, 1.0)),
    "kl": ("KL divergence of routing", "nats", None),
    "js": ("Jensen-Shannon divergence of routing", "nats", None),
    "load_entropy": ("Entropy of the experts' load", "share of the maximum", (0.0, 1.0)),
}
"""Title, unit and possible values of each quantity."""


class RoutingMonitor(StateOfWeights, EditListener):
    """Measure on a probe text how the routers' choices change: by every edit, and since the run's start.

    Around an edit it logs ``routing_edit/…``, at every validation (compared with the run's start) ``routing/…``:
    ``similarity`` (Jaccard overlap of the top-k expert sets), ``kl``, ``js`` (nats) and ``load_entropy``, for each
    layer with experts (``…/layer_3``) and as the mean over them. Other callbacks and CSV files have all of it; other
    loggers have charts of the means, and, if they show images, a heat map of each by layer and step when training ends.
    A trainer may have several monitors, each with a name.

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
    state_names = ("_start", "_digest", "last_edit", "history", "edited_layers")

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
        self.history: list[dict[str, float]] = []
        """Routing metrics of each validation, compared with the run's start, and its optimizer ``step``."""
        self.edited_layers: list[int] = []
        """Layers that edits have changed."""

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
        log_curves(trainer, pl_module, self.metrics_prefix, shift)
        if trainer.state.fn == TrainerFn.FITTING:
            self.history.append({"step": trainer.global_step, **shift})
            if len(self.history) > MAX_HISTORY:  # every other one tells enough
                self.history = self.history[::2]

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._prepare(trainer, pl_module)
        self._before_edit = self._trace(pl_module)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        assert self._before_edit is not None
        self.last_edit = self.compare(pl_module, self._before_edit, self._trace(pl_module))
        self._before_edit = None
        self.edited_layers = sorted({*self.edited_layers, *event.result.deltas})
        log_summary(trainer, {f"{self.metrics_prefix}_edit/{name}": value for name, value in self.last_edit.items()})
        log.info(
            "%srouting similarity %.3f, KL %.4f nats over the edit",
            self.heading,
            self.last_edit["similarity/mean"],
            self.last_edit["kl/mean"],
        )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if shows_figures(trainer) and trainer.is_global_zero:
            with uninterrupted():  # matplotlib may lose an interrupt
                log_figures(trainer, self.heat_maps())

    def compare(self, pl_module: L.LightningModule, before: RoutingTrace, after: RoutingTrace) -> dict[str, float]:
        """Compute all routing metrics of two traces of the same text."""
        layers = expert_layers(find_model(pl_module))
        load = ExpertLoad(max(x.num_experts for x in layers.values()), list(layers), sync_on_compute=False)
        load.update(after.experts)
        entropy = {name: value for name, value in load.compute().items() if name.startswith("entropy/")}
        return compare_traces(before, after) | {f"load_{name}": float(value) for name, value in entropy.items()}

    def figure(self) -> Figure | None:
        """Plot the latest edit's routing similarity by layer; ``None`` without an edit or without matplotlib."""
        split = ((name.partition("/"), value) for name, value in self.last_edit.items())
        shown = {name: torch.tensor(value) for (kind, _, name), value in split if kind == "similarity"}
        if not shown or find_spec("matplotlib") is None:
            return None
        layers = [int(name.removeprefix("layer_")) for name in shown if name != "mean"]
        return RoutingSimilarity(layers).plot(shown)[0]

    def heat_maps(self) -> dict[str, Figure]:
        """Plot each quantity by layer and validation; empty before the first validation or without matplotlib."""
        if not self.history or find_spec("matplotlib") is None:
            return {}
        found = {}
        for kind, (title, unit, span) in _QUANTITIES.items():
            names = [name for name in self.history[0] if name.startswith(f"{kind}/layer_")]
            found[f"{self.metrics_prefix}/{kind}_by_layer"] = plot_heat_map(
                [[row.get(name, float("nan")) for name in names] for row in self.history],
                [int(name.rpartition("_")[2]) for name in names],
                [int(row["step"]) for row in self.history],
                f"{self.heading}{title} since the start of the run",
                unit,
                self.edited_layers,
                span,
            )
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._start is None:
            return {}
        # the run's start cannot be measured again after a resume; small dtypes keep it small
        experts: Mapping[int, Tensor] = {i: x.to(torch.int16) for i, x in self._start.experts.items()}
        probabilities: Mapping[int, Tensor] = {i: x.half() for i, x in self._start.probabilities.items()}
        return {
            "experts": experts,
            "probabilities": probabilities,
            "probe": self._digest,
            "last_edit": self.last_edit,
            "history": list(self.history),
            "edited_layers": list(self.edited_layers),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        where = "the state of RoutingMonitor in the checkpoint"
        traced = {int: Tensor}
        numbers = {str: (int, float)}
        check_fields(where, state_dict, probe=str, last_edit=numbers, experts=traced, probabilities=traced)
        # checkpoints of earlier versions do not have them
        later: dict[str, Any] = {"history": [numbers], "edited_layers": [int]}
        check_fields(where, state_dict, tuple(later), **later)
        experts, probabilities = state_dict["experts"], state_dict["probabilities"]
        is_same = experts.keys() == probabilities.keys()
        if not is_same or not all(_is_routing(experts[i], probabilities[i]) for i in experts):
            raise CheckpointError(
                f"{where}: fields 'experts' and 'probabilities' should hold experts [N, k] and finite probabilities "
                "[N, E] of the same layers"
            )
        self._digest, self.last_edit = state_dict["probe"], dict(state_dict["last_edit"])
        self.history = [dict(row) for row in state_dict.get("history") or () if "step" in row]
        self.edited_layers = list(state_dict.get("edited_layers") or ())
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
