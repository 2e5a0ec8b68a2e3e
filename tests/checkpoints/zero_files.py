"""Checkpoints in the layout of DeepSpeed, written without it: for any number of ranks, and to be damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    stage: int,
    ranks: int,
    groups: Sequence[Sequence[str]] = (),
    frozen: Sequence[str] = (),
    buffers: Sequence[str] = (),
    shared: Mapping[str, str] | None = None,
    working: torch.dtype = torch.bfloat16,
    alignment: int = 1,
    padded: bool = False,
    change: Callable[[str, dict[str, Any]], None] = lambda _, contents: None,
    **fields: Any,
) -> None:
    """Write what ``save_checkpoint`` of an engine writes.

    Args:
        path: of the checkpoint, a folder.
        weights: master copies, float32, and all others.
        stage: of ZeRO.
        ranks: how many files of the optimizer there are.
        groups: names of trainable weights in the optimizer's groups; by default one of all that are left.
        frozen: names of weights that are not trained.
        buffers: names of buffers.
        shared: other names of weights.
        working: dtype of the copy in training.
        alignment: weights begin at multiples of it in stages 1 and 2.
        padded: whether the padding at the end stays in the files, as in old versions.
        change: gets the name of every file and what is to be written into it.
        fields: of the model's file.
    """
    folder = path / "checkpoint"
    folder.mkdir(parents=True)
    (path / "latest").write_text("checkpoint", encoding="utf-8")
    others = {*frozen, *buffers, *(shared or {})}
    groups = groups or [[name for name in weights if name not in others]]

    def flat(name: str) -> Tensor:
        """A weight with the padding that makes it divisible."""
        value = weights[name].reshape(-1)
        return torch.nn.functional.pad(value, (0, -value.numel() % ranks))

    def save(name: str, contents: dict[str, Any]) -> None:
        change(name, contents)
        torch.save(contents, folder / name)

    module = {name: value.to(working) if value.is_floating_point() else value for name, value in weights.items()}
    if stage == 3:
        module = {name: value if name in buffers else value.new_empty(0) for name, value in module.items()}
    model = {
        "module": module,
        "buffer_names": list(buffers),
        "param_shapes": [{name: weights[name].shape for name in group} for group in groups],
        "shared_params": dict(shared or {}),
        "global_steps": 2,
        **fields,
    }
    paddings = []
    for group in groups:
        offset, paddings_of_group = 0, []
        for number, name in enumerate(group):
            offset += weights[name].numel()
            paddings_of_group.append(0 if number == len(group) - 1 else -offset % alignment)
            offset += paddings_of_group[-1]
        paddings.append(paddings_of_group)

    for rank in range(ranks):

        def part(value: Tensor, rank: int = rank) -> Tensor:
            width = ceil(value.numel() / ranks)
            return value[rank * width : (rank + 1) * width].clone()

        state: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks] * len(groups)}
        steps = {"state": {0: {"step": torch.tensor(2.0)}}}
        if stage == 3:
            state["fp32_flat_groups"] = [torch.cat([part(flat(name)) for name in group]) for group in groups]
            state["optimizer_state_dict"] = steps
        else:
            state["base_optimizer_state"] = steps
            if alignment > 1:
                state["param_alignment_paddings"] = paddings
            state["single_partition_of_fp32_groups"] = []
            for group, paddings_of_group in zip(groups, paddings, strict=True):
                pieces = zip(group, paddings_of_group, strict=True)
                whole = torch.cat([torch.nn.functional.pad(weights[n].reshape(-1), (0, p)) for n, p in pieces])
                size = ceil(whole.numel() / (2 * ranks)) * 2
                piece = whole[rank * size : (rank + 1) * size].clone()
                piece = torch.nn.functional.pad(piece, (0, size - piece.numel())) if padded else piece
                state["single_partition_of_fp32_groups"].append(piece)
        prefix = "bf16_" if working == torch.bfloat16 else ""
        save(f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": state})
        if stage == 3:
            model["frozen_param_shapes"] = {name: weights[name].shape for name in frozen}
            model["frozen_param_fragments"] = {name: part(flat(name).to(working)) for name in frozen}
            save(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
    if stage < 3:
        save("mp_rank_00_model_states.pt", model)
