"""An edit as a value: its facts, its weight changes, and the states of the weights that it leads from and to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

import lit_moeedit
from lit_moeedit.data.facts import Fact
from lit_moeedit.edits.states import State, histories_in, layers_by_parameter, states
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.solvers import ExpertDeltas

if TYPE_CHECKING:
    from lit_moeedit.editing import EditMethod, EditResult
    from lit_moeedit.sharding.ranks import Ranks

NAME = re.compile(r"\w[\w.-]{0,99}")
"""Names of edits, which are names of folders."""
FACTORS = ("expert_index", "row_index", "left", "right")
"""The tensors of a layer's deltas."""


@dataclass(frozen=True, eq=False)
class LayerChange:
    """The change of one layer's down-projections.

    Attributes:
        parameter: name of the parameter in a model without adapters.
        is_transposed: whether an expert is stored as ``[d_hidden, d_model]``.
        deltas: the change.
        base: state of the parameter before the first edit of the layer.
        before: state before this edit.
        after: state after this edit.
        sum_base: fingerprint of the parameter before the first of the changes that were added up and rounded together
            with this one; that of ``before`` if this is the first of them.
        is_exact: whether they were added up in float64. If not, this one was added in float32 and rounded by itself.
    """

    parameter: str
    is_transposed: bool
    deltas: ExpertDeltas
    base: State
    before: State
    after: State
    sum_base: str
    is_exact: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes ``(E, d_model, d_hidden)``."""
        return (self.deltas.num_experts, *self.deltas.shape)


def in_sums(changes: Sequence[LayerChange]) -> list[list[LayerChange]]:
    """Split changes of one parameter, in their order, into sums that were rounded together."""
    found: list[list[LayerChange]] = []
    for change in changes:
        last = found[-1][-1] if found else None
        if last is not None and last.is_exact and change.is_exact and last.sum_base == change.sum_base:
            found[-1].append(change)
        else:
            found.append([change])
    return found


@dataclass(frozen=True)
class Placement:
    """Weights other than those in which an edit was made, to which it was applied.

    Attributes:
        on: ids of the edits that were in the weights before it.
        states: states after it, by parameter, of those that no later edit has changed at the same time.
    """

    on: tuple[str, ...]
    states: Mapping[str, State]


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a model's facts, independent of the model in memory.

    Attributes:
        name: name among other edits; letters, digits, ``_``, ``.`` and ``-``.
        facts: the edited facts.
        method: name of the editing method.
        settings: its settings, made of JSON types.
        layers: the changes, by layer.
        made_on: names, by id, of the edits that were in the weights when this one was made, in their order.
        order: position among the edits of the weights, from 1 on.
        metrics_before: metrics before the edit, by name.
        metrics_after: metrics after it.
        versions: versions of the packages that made it.
        placement: other weights to which it was applied; ``None`` if they are those in which it was made.
    """

    name: str
    facts: tuple[Fact, ...]
    method: str
    settings: Mapping[str, Any]
    layers: tuple[LayerChange, ...]
    made_on: Mapping[str, str] = field(default_factory=dict)
    order: int = 1
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    placement: Placement | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    @cached_property
    def id(self) -> str:
        """64 hex digits that identify the facts and the weight changes, and not the weights that they are added to."""
        digest = sha256()
        sizes = [[change.parameter, *change.sizes, change.is_transposed] for change in self.layers]
        digest.update(json.dumps([[fact.to_dict() for fact in self.facts], sizes], sort_keys=True).encode("ascii"))
        for change in self.layers:
            for name in FACTORS:
                tensor = getattr(change.deltas, name).detach().cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode("ascii"))
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def changes(self) -> dict[str, LayerChange]:
        """The changes by parameter."""
        return {change.parameter: change for change in self.layers}

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write this as the folder ``folder/NAME``, see :func:`~lit_moeedit.edits.files.save_edit`."""
        from lit_moeedit.edits.files import save_edit

        return save_edit(self, folder, overwrite)

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read and check the folder of one edit, see :func:`~lit_moeedit.edits.files.load_edit`."""
        from lit_moeedit.edits.files import load_edit

        return load_edit(path)

    @classmethod
    def record(
        cls,
        name: str,
        model: nn.Module,
        result: EditResult,
        before: Mapping[str, State],
        *,
        method: EditMethod,
        made_on: Sequence[Edit] = (),
        metrics_before: Mapping[str, float] | None = None,
        metrics_after: Mapping[str, float] | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Record an edit that was just made. With several ranks, each calls this.

        Args:
            name: name of the edit.
            model: the edited model, or a module that holds it.
            result: the result of the edit.
            before: states before the edit of all layers that it has changed, by :func:`~lit_moeedit.edits.states`.
            method: the method that made it.
            made_on: earlier edits that were in the weights, in their order.
            metrics_before: metrics before the edit, by name; those that are not finite are left out.
            metrics_after: metrics after it, likewise.
            ranks: the processes that edit together.

        Raises:
            ValueError: if the edit was not kept, the name cannot be one, or a state before it is missing.
        """
        if not result.kept:
            raise ValueError(f"the edit {name!r} was not kept: there is nothing to record")
        names = {layer.index: parameter for parameter, layer in layers_by_parameter(model).items()}
        layers = {name: layer for name, layer in layers_by_parameter(model).items() if layer.index in result.deltas}
        missing = layers.keys() - before.keys()
        if missing:
            raise ValueError(f"the states before the edit lack {', '.join(sorted(missing))}")
        bases = {name: change.base for edit in reversed(made_on) for name, change in edit.changes.items()}
        after = states(layers, ranks)
        changes = []
        for index, deltas in sorted(result.deltas.items()):
            parameter = names[index]
            layer, start, end = layers[parameter], before[parameter], after[parameter]
            base, own = bases.get(parameter, start), _sum_of(model, layer, start, end)
            changes.append(LayerChange(parameter, layer.is_transposed, _on_cpu(deltas), base, start, end, *own))
        return cls(
            name=name,
            facts=tuple(result.facts),
            method=method.name,
            settings=settings_of(method),
            layers=tuple(changes),
            made_on={edit.id: edit.name for edit in made_on},
            order=len(made_on) + 1,
            metrics_before=_finite(metrics_before or {}),
            metrics_after=_finite(metrics_after or {}),
            versions={"lit_moeedit": lit_moeedit.__version__}
            | {package: metadata.version(package) for package in ("torch", "transformers")},
        )


def check_name(name: str) -> None:
    """Check the name of an edit, which is that of a folder, too.

    Raises:
        ValueError: if it has other characters than such a name may have.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"an edit's name may have letters, digits, '_', '.' and '-', got {name[:120]!r}")


def _sum_of(model: nn.Module, layer: ExpertLayer, before: State, after: State) -> tuple[str, bool]:
    """Return the base of the sum that the last change of a layer belongs to, and whether that is taken in float64."""
    histories = histories_in(find_model(model))
    last = next(iter(histories.get(layer.weight_name, ())[-1:]), None)
    if last is not None and last.after[-1] == after.exact:
        return last.base, last.is_exact
    # without a history an edit is rounded by itself
    return before.exact, not layer.down_proj.requires_grad


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _on_cpu(deltas: ExpertDeltas) -> ExpertDeltas:
    return ExpertDeltas(
        deltas.expert_index.cpu(),
        deltas.row_index.cpu(),
        deltas.left.detach().cpu(),
        deltas.right.detach().cpu(),
        deltas.num_experts,
    )


def settings_of(value: Any) -> Any:
    """Describe an object by its class and the attributes that its constructor takes, made of JSON types.

    Paths, caches and memories of earlier edits belong to a machine or a run, and are left out.

    Example:
        >>> from lit_moeedit.solvers import Woodbury
        >>> settings_of(Woodbury())["class"]
        'lit_moeedit.solvers.woodbury.Woodbury'
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [settings_of(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): settings_of(item) for key, item in value.items()}
    if isinstance(value, Edit):
        return value.id
    if isinstance(value, torch.dtype | Path) or hasattr(value, "__qualname__"):
        return getattr(value, "__qualname__", None) or (value.name if isinstance(value, Path) else str(value))
    kind = type(value)
    names = [name for name in signature(kind).parameters if name not in ("cache", "memory") and hasattr(value, name)]
    return {"class": f"{kind.__module__}.{kind.__qualname__}"} | {
        name: settings_of(getattr(value, name)) for name in names
    }
