"""Histories of frozen experts in a checkpoint, and the edits that they tell of made again in a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.edits.edit import FACTORS
from lit_moeedit.edits.order import EditConflictError
from lit_moeedit.edits.states import keep_in, layers_by_parameter
from lit_moeedit.interrupts import held
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.history import EditSum, History, missing
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

STATE_KEY = "FrozenEdits"
"""The key of the histories among the states of callbacks in a checkpoint."""
_FACTOR_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WHERE = f"the state of {STATE_KEY} in the checkpoint"


# -- the state of a checkpoint ----------------------------------------------------------------------------------------


def state_of(histories: Mapping[str, History], unedited: Mapping[str, str]) -> dict[str, Any]:
    """Return what is known of frozen experts as plain data and tensors, for a checkpoint.

    Args:
        histories: the histories of those that were edited, by names of parameters.
        unedited: fingerprints of those that were not edited yet.
    """
    edited = {name: sums for name, sums in histories.items() if sums}
    return {
        "layers": {name: [_saved(own) for own in sums] for name, sums in edited.items()},
        "fingerprints": {**unedited, **{name: sums[-1].after[-1] for name, sums in edited.items()}},
    }


def histories_of(state: Mapping[str, Any], where: str = WHERE) -> tuple[dict[str, History], dict[str, str]]:
    """Return the histories and the fingerprints of unedited experts that :func:`state_of` made a state of.

    Args:
        state: the state, which is untrusted.
        where: where it is, for errors.

    Raises:
        CheckpointError: naming the field and what was expected.
    """
    check_fields(where, state, ("fingerprints",), layers={str: [dict]}, fingerprints={str: str})
    histories = {
        name: tuple(_loaded(f"{where}, layers[{name!r}][{number}]", own) for number, own in enumerate(sums))
        for name, sums in state["layers"].items()
    }
    left = dict(state.get("fingerprints") or {})  # states of earlier versions have none
    for name in left.keys() & histories.keys():
        if histories[name] and histories[name][-1].after[-1] != left.pop(name):
            raise CheckpointError(f"{where}: an edit of {name} is missing, after which it had another fingerprint")
    return histories, left


def _saved(own: EditSum) -> dict[str, Any]:
    factors = ({name: getattr(change, name) for name in FACTORS} for change in own.deltas)
    deltas = [{"num_experts": own.deltas[0].num_experts, **tensors} for tensors in factors]
    return {"base": own.base, "after": list(own.after), "deltas": deltas, "is_exact": own.is_exact}


def _loaded(where: str, saved: dict[str, Any]) -> EditSum:
    check_fields(where, saved, ("is_exact",), base=str, after=[str], deltas=[dict], is_exact=bool)
    if not saved["deltas"] or len(saved["deltas"]) != len(saved["after"]):
        counts = f"{len(saved['deltas'])} and {len(saved['after'])}"
        raise CheckpointError(f"{where}: 'deltas' and 'after' should have one entry for each edit, but have {counts}")
    deltas = [_loaded_change(f"{where}, deltas[{number}]", change) for number, change in enumerate(saved["deltas"])]
    is_exact = saved.get("is_exact") is not False  # states of earlier versions do not tell
    return EditSum(saved["base"], tuple(deltas), tuple(saved["after"]), is_exact=is_exact)


def _loaded_change(where: str, change: dict[str, Any]) -> ExpertDeltas:
    check_fields(where, change, (), num_experts=int, **dict.fromkeys(FACTORS, Tensor))
    # before anything is copied or read: a short file may stand for any number of elements
    is_stored = all(_is_stored(change[name]) for name in FACTORS)
    tensors = {name: change[name].cpu() if is_stored else change[name] for name in FACTORS}
    experts, rows, left, right = tensors.values()
    is_sound = (
        is_stored
        and experts.dtype == rows.dtype == torch.int64
        and {left.dtype, right.dtype} <= _FACTOR_DTYPES
        and (experts.ndim, rows.ndim, left.ndim, right.ndim) == (1, 1, 2, 2)
        and len(experts) == len(rows) == len(right)
        and _is_index(experts, change["num_experts"])
        and _is_index(rows, len(left))
    )
    if not is_sound:
        raise CheckpointError(f"{where}: expected the low-rank factors of a change, found others")
    return ExpertDeltas(**tensors, num_experts=change["num_experts"])


def _is_stored(tensor: Tensor) -> bool:
    """Tell if all elements of a tensor are in memory, and none of them repeated."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return is_plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _is_index(index: Tensor, count: int) -> bool:
    return not index.numel() or (int(index.min()) >= 0 and int(index.max()) < count)


# -- edits that are missing -------------------------------------------------------------------------------------------


def find_missing(
    layers: Mapping[str, ExpertLayer], histories: Mapping[str, History], unedited: Mapping[str, str], ranks: Ranks
) -> dict[str, list[EditSum] | None]:
    """Find the changes that frozen experts lack.

    Unedited experts lack nothing. In another dtype they are not compared.

    Args:
        layers: the model's layers by the names of their parameters.
        histories: the histories.
        unedited: fingerprints of the experts that were not edited yet.
        ranks: the processes that hold the model. Each calls this.

    Returns:
        By parameter the sums that are missing; ``None`` for one that is in no state of its history, or not the
        unedited one.

    Raises:
        EditConflictError: if the model does not have a parameter, or one of another shape.
    """
    for name in (*histories, *unedited):
        sizes = {(change.num_experts, *change.shape) for own in histories.get(name, ()) for change in own.deltas}
        if name not in layers or sizes - {layers[name].shape}:
            raise EditConflictError(
                f"the checkpoint is of a model with the frozen experts {name}, which this model does not have (or in "
                "another shape); start from the base model that the run began with"
            )
    now = fingerprints({name: layers[name].down_proj for name in (*histories, *unedited)}, ranks)
    found = {name: missing(history, now[name]) for name, history in histories.items()}
    for name, wanted in unedited.items():
        is_same = wanted == now[name] or _kind(wanted) != _kind(now[name])
        found[name] = [] if is_same else None
    return found


def _kind(fingerprint: str) -> str:
    """Return the shape and the dtype in a fingerprint."""
    return fingerprint.rpartition(" ")[0]


def refuse_base(name: str, is_unedited: bool = False) -> EditConflictError:
    """Return the error of experts that are in no state of their history, or should be unedited and are not."""
    wanted = (
        "not those that the checkpoint's run had"
        if is_unedited
        else "neither the base of the checkpoint's edits nor what these have left"
    )
    return EditConflictError(
        f"the frozen experts {name} are {wanted}. The checkpoint does not hold the experts themselves, so start from "
        "the base model that the run began with, in the same dtype. A module in memory that was edited since is "
        "another: make a new one, which loads the base anew"
    )


def make(layer: ExpertLayer, sums: Sequence[EditSum], transaction: Transaction) -> list[EditSum]:
    """Make missing changes of a layer again; return them with what the changed experts were before.

    Raises:
        EditConflictError: if the result is not that of the history, bit for bit.
    """
    made = []
    for own in sums:
        name = layer.weight_name
        transaction.commit(layer.down_proj, own.deltas, layer.is_transposed, name, exact=own.is_exact, begins=True)
        # none of experts that train now
        again = next(iter(transaction.histories[name][-1:]), None)
        if fingerprints({"": layer.down_proj}, transaction.ranks)[""] != own.after[-1]:
            raise EditConflictError(
                f"the checkpoint's edits of the frozen experts {layer.weight_name} cannot be made again bit for bit on "
                "this machine; save and load checkpoints that hold the frozen weights, too"
            )
        made.append(replace(own, elements=None if again is None else again.elements))
    return made


def make_all(model: nn.Module, histories: Mapping[str, History], unedited: Mapping[str, str]) -> int:
    """Make all missing edits of frozen experts in a model in memory; return the number of changes.

    Args:
        model: the model, or a module that holds it. Histories travel with it from now on.
        histories: the histories.
        unedited: fingerprints of the experts that were not edited yet.

    Raises:
        EditConflictError: if the model is not the base of the edits; nothing has changed.
    """
    ranks, layers = Ranks.current(), layers_by_parameter(model)
    for layer in layers.values():
        layer.down_proj.requires_grad_(False)
    todo = find_missing(layers, histories, unedited, ranks)
    count, kept = 0, dict(histories)
    with held(Transaction((), ranks)) as transaction:
        for name, sums in todo.items():
            if sums is None:
                raise refuse_base(name, name in unedited)
            if sums:
                kept[name] = (*histories[name][: -len(sums)], *make(layers[name], sums, transaction))
            count = max(count, sum(len(own.deltas) for own in sums))
        transaction.keep()
    keep_in(find_model(model), kept)
    return count
