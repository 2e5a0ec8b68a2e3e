"""Edits as an adapter of peft."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_moeedit.atomic_files import atomic_folder, write_tensors
from lit_moeedit.edits.edit import Edit
from lit_moeedit.edits.order import Sequel, check_order, linked
from lit_moeedit.solvers.compression import cut, join

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas

log = logging.getLogger(__name__)

OLDEST = "0.19"
"""The first version of peft that reads ``[E, d_model, d_hidden]`` parameters the right way round."""


def to_peft(
    edits: Sequence[Edit],
    folder: str | Path,
    rank: int | None = None,
    *,
    allow_siblings: bool = False,
    allow_square: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write edits as a LoRA adapter on the experts' parameters, for ``PeftModel.from_pretrained`` on the base.

    At full rank, logits equal those of the edited model to 1e-5 in float32. In lower precision peft rounds the factors.
    Every expert is padded to the rank of the one with most terms, so an adapter of many edits may be larger than the
    dense change. Inference servers may ignore such adapters: give them the edited model.

    Args:
        edits: the edits in their order. Those that the first of them was made on must be in the base's weights.
        folder: the folder to write. It appears when it is complete.
        rank: maximum rank of an expert's change; ``None`` for all of it.
        allow_siblings: whether to add up edits that were made without each other.
        allow_square: whether to write an adapter where ``d_model = d_hidden``. A peft older than 0.19 loads it without
            an error, and transposes it.
        overwrite: whether to replace an existing folder.

    Returns:
        The folder.

    Raises:
        EditConflictError: if the edits do not fit together.
        ValueError: if the rank is below 1, or ``d_model = d_hidden``.
        ImportError: if peft is not installed.
        OSError: if the folder cannot be written, or exists already.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"an adapter needs peft >= {OLDEST}: pip install 'lit-moeedit[peft]'") from error
    edits = linked(edits)
    check_order(edits, allow_siblings)
    sequels = Sequel.of(edits)
    square = [name for name, sequel in sequels.items() if sequel.changes[0].sizes[1] == sequel.changes[0].sizes[2]]
    if square and not allow_square:
        raise ValueError(
            f"d_model = d_hidden in {square[0]}: a peft older than {OLDEST} would load the adapter without an error, "
            "and transpose it; allow_square writes it all the same"
        )
    changes = {name: cut(join([c.deltas for c in sequel.changes]), rank) for name, sequel in sequels.items()}
    longest = max(int(change.expert_index.bincount().amax()) if len(change.right) else 1 for change in changes.values())
    config = LoraConfig(
        r=longest,
        lora_alpha=longest,
        target_modules=[],
        target_parameters=sorted(changes),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        experts = f"base_model.model.{name.rpartition('.')[0]}"
        tensors[f"{experts}.lora_A.weight"], tensors[f"{experts}.lora_B.weight"] = _factors(change, longest)
    _remark_size(sequels, tensors, longest)
    if Path(folder).exists() and not overwrite and any(Path(folder).iterdir()):
        raise FileExistsError(f"{folder} is not empty; overwrite replaces it")
    with atomic_folder(folder, overwrite) as beside:
        write_tensors(beside / "adapter_model.safetensors", tensors, {"format": "pt"})
        config.save_pretrained(str(beside))
    return Path(folder)


def _factors(deltas: ExpertDeltas, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``lora_A [E·r, d_hidden]``, expert by expert, and ``lora_B [d_model, r·E]``, rank by rank, for peft."""
    d_model, d_hidden = deltas.shape
    first = deltas.right.new_zeros(deltas.num_experts, rank, d_hidden)
    second = deltas.left.new_zeros(d_model, rank, deltas.num_experts)
    for expert in deltas.experts:
        rows = deltas.rows(expert)
        assert rows is not None
        left, right = rows
        first[expert, : len(right)] = right
        second[:, : len(left), expert] = left.T
    return first.view(-1, d_hidden).to(torch.float32), second.reshape(d_model, -1).to(torch.float32)


def _remark_size(sequels: Mapping[str, Sequel], tensors: Mapping[str, Tensor], rank: int) -> None:
    """Tell the size of the adapter, and warn if the dense change would be smaller."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    dense = 0
    for sequel in sequels.values():
        _, d_model, d_hidden = sequel.changes[0].sizes
        dense += len({e for change in sequel.changes for e in change.deltas.experts}) * d_model * d_hidden
    facts: tuple[Any, ...] = (rank, len(sequels), elements * 4 / 1e6)
    if elements > dense:
        log.warning(
            "an adapter of rank %d on %d layers: %.1f MB, more than the %.1f MB of the changed experts themselves, "
            "because every expert is padded to the largest rank; a lower rank or the edited model is smaller",
            *facts,
            dense * 4 / 1e6,
        )
    else:
        log.info("an adapter of rank %d on %d layers: %.1f MB", *facts)
