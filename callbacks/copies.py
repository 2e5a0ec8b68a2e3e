"""The search for copies of the edited weights in callbacks, in the module and in the optimizers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_moeedit.callbacks.averages import Copies, averaging_callbacks
from lit_moeedit.callbacks.belonging import StateOfWeights, expert_weights
from lit_moeedit.callbacks.resources import optimizers_of
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.shards import is_partitioned

log = logging.getLogger(__name__)

OtherCopies = Literal["refuse", "edit", "ignore"]
"""Treatment of copies of the edited weights whose purpose is not known."""

NEAR = 0.5
"""Distance from a weight, relative to its norm, below which a tensor is taken for a copy of it.

Averages, teachers and slow weights are much closer. The moments of an optimizer are much further away.
"""
DEPTH = 6
"""Maximum number of attributes and indices on the way to a copy."""
ENTRIES = 100_000
"""Maximum number of entries of a container that are looked at."""
_OPAQUE = (str, bytes, int, float, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, torch.dtype)


Kind = Literal["average", "module", "optimizer", "tensor"]


@dataclass(frozen=True)
class _Found:
    """A copy of a weight.

    Attributes:
        name: name of the weight in the model.
        path: the way to the copy, such as ``MyCallback.shadow[3]``.
        tensor: the copy.
        kind: its holder: torch's ``AveragedModel``, another module, an optimizer, or none of them.
    """

    name: str
    path: str
    tensor: Tensor
    kind: Kind

    def __str__(self) -> str:
        return (
            f"{self.path} is a copy of the weight {self.name}, which an edit does not reach: where it takes the place "
            "of the model's weights, the edit is lost. Use Lightning's WeightAveraging or torch's AveragedModel, which "
            "get every edit, or set other_copies: edit (to write edits into it, too) or other_copies: ignore (a "
            "teacher, for example, stays as it is)"
        )


class CopyPolicy:
    """Treatment of the copies of the edited weights that a run holds.

    Args:
        choice: one of :data:`OtherCopies`, for copies whose purpose is not known.
        heading: beginning of messages.

    Raises:
        ValueError: if the choice is not known.
    """

    def __init__(self, choice: OtherCopies, heading: str) -> None:
        if choice not in get_args(OtherCopies):
            raise ValueError(f"other_copies must be one of {', '.join(get_args(OtherCopies))}; got {choice!r}")
        self.choice, self.heading = choice, heading
        self._named: set[str] = set()

    def find(
        self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Collection[int], at_start: bool = False
    ) -> Copies:
        """Find the copies that get every edit, but for Lightning's averages; refuse others, or name each once.

        A tensor in no module may be a snapshot, and a module that turns up later, too: these are named.

        Args:
            trainer: the trainer.
            pl_module: the module.
            layers: indices of the edited layers.
            at_start: true when the run starts.

        Raises:
            MisconfigurationException: if there is a copy that an edit would not reach.
        """
        found = _find_copies(trainer, pl_module, expert_weights(find_model(pl_module), layers))
        if self.choice == "refuse":
            others = [copy for copy in found if copy.kind != "average"]
            kinds = ("module", "optimizer") if at_start else ("optimizer",)
            if wrong := [copy for copy in others if copy.kind in kinds]:
                raise MisconfigurationException(f"KnowledgeEditing: {wrong[0]}")
            for copy in others:
                if copy.path not in self._named:
                    log.warning("%s%s", self.heading, copy)
                self._named.add(copy.path)
        return [{copy.name: copy.tensor} for copy in found if copy.kind == "average" or self.choice == "edit"]


def _find_copies(trainer: L.Trainer, pl_module: L.LightningModule, weights: Mapping[str, nn.Parameter]) -> list[_Found]:
    """Find tensors of the shape of a weight, and near to it, that are not the weight itself."""
    averaging = averaging_callbacks(trainer)
    seen = {id(x) for x in (trainer, trainer.strategy, getattr(trainer, "datamodule", None), *weights.values())}
    seen |= {id(callback._average_model) for callback in averaging}
    callbacks = [x for x in trainer.callbacks if not isinstance(x, StateOfWeights)]  # type: ignore[attr-defined]
    # DeepSpeed's optimizers hold the master weights, which get every edit
    optimizers = [x for x in optimizers_of(trainer) if not type(x).__module__.startswith("deepspeed.")]
    owners: Sequence[Any] = (*callbacks, pl_module, *optimizers)
    whole = {name: weight for name, weight in weights.items() if not is_partitioned(weight)}
    found = []
    for owner in owners:
        kind: Kind = "tensor" if isinstance(owner, L.Callback | L.LightningModule) else "optimizer"
        for where, tensor, held in _tensors(owner, type(owner).__name__, seen, DEPTH, kind):
            name = next((name for name, weight in whole.items() if _is_copy(tensor, weight)), None)
            if name is not None:
                found.append(_Found(name, where, tensor, held))
    return found


def _is_copy(tensor: Tensor, weight: Tensor) -> bool:
    if tensor.shape != weight.shape or not tensor.is_floating_point() or tensor.is_meta:
        return False
    if tensor.data_ptr() == weight.data_ptr():  # another name of the weight
        return False
    # the first expert tells
    own = weight[0].detach().float()
    distance = torch.linalg.vector_norm(tensor[0].detach().to(own) - own)
    return bool(distance <= NEAR * torch.linalg.vector_norm(own)) and bool(own.any())


def _tensors(owner: Any, path: str, seen: set[int], depth: int, kind: Kind) -> Iterator[tuple[str, Tensor, Kind]]:
    """Yield all tensors that an object holds, with their paths and the kind of their holder."""
    if owner is None or isinstance(owner, _OPAQUE) or id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        yield path, owner, kind
        return
    if isinstance(owner, AveragedModel):
        kind = "average"
    elif isinstance(owner, nn.Module) and not isinstance(owner, L.LightningModule) and kind == "tensor":
        kind = "module"
    for step, value in islice(_parts(owner), ENTRIES) if depth else ():
        # modules are nested deeply
        further = depth if isinstance(owner, nn.Module) else depth - 1
        yield from _tensors(value, f"{path}{step}", seen, further, kind)


def _parts(owner: Any) -> Iterable[tuple[str, Any]]:
    """Return what an object holds, with the step to it."""
    if isinstance(owner, Mapping):
        return ((f"[{_key(key)}]", value) for key, value in list(owner.items()))
    if isinstance(owner, list | tuple | set | frozenset):
        return ((f"[{index}]", value) for index, value in enumerate(owner))
    held = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, nn.Module):
        inner = chain.from_iterable(held.pop(kind, {}).items() for kind in ("_modules", "_parameters", "_buffers"))
        return ((f".{name}", value) for name, value in chain(list(inner), held.items()))
    return ((f".{name}", value) for name, value in held.items())


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, str | int) else type(key).__name__
