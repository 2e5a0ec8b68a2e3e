"""Argument checks and result names of the metrics with one value per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    layers = tuple(layers)
    valid = all(isinstance(layer, int) and layer >= 0 for layer in layers)
    if not layers or not valid or len(set(layers)) != len(layers):
        raise ValueError(f"Expected `layers` to hold at least one layer index, each >= 0 and once, got {layers}.")
    return layers


def check_present(layers: tuple[int, ...], **arguments: Mapping[int, Tensor]) -> None:
    for name, mapping in arguments.items():
        missing = [layer for layer in layers if layer not in mapping]
        if missing:
            raise ValueError(f"Expected `{name}` to hold layers {list(layers)}, got {list(mapping)}: no {missing}.")


def check_indices(indices: Tensor, what: str) -> None:
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"Expected {what} to hold integer expert indices, got {indices.dtype}.")
    if indices.ndim != 2 or indices.shape[1] < 1:
        raise ValueError(f"Expected {what} of shape [N, k] with k >= 1, got {list(indices.shape)}.")


def by_layer(values: Tensor, layers: tuple[int, ...], prefix: str = "") -> dict[str, Tensor]:
    """Name the entries of ``values [L]`` by layer, with their mean first."""
    names = (f"{prefix}layer_{layer}" for layer in layers)
    return {f"{prefix}mean": values.mean(), **dict(zip(names, values, strict=True))}
