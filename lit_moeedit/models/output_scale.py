"""The factors between the output of a layer's experts and the output of the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import position_ids
from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import FAMILIES_HINT, ExpertLayer, UnsupportedModelError
from lit_moeedit.models.partial_forward import LayerOutput, hooked, inference, layer_output

LENGTH, TOKEN = 4, 2
"""Length of the two test prompts, and the position at which the experts' output is shifted."""
LINEAR_SHARE = 0.98
"""Minimum share of the entries that must respond linearly."""


def expert_residuals(residuals: Tensor, scale: Tensor) -> Tensor:
    """Compute the change of the experts' output that changes the layer's output by ``residuals``.

    Entries with hardly any dependence on the experts get 0, because they would dominate the solution.

    Args:
        residuals: changes of the layer's output, ``[n, d_model]``.
        scale: from :func:`output_scales`, ``[d_model]``.

    Returns:
        Changes of the experts' output, ``[n, d_model]``.

    Example:
        >>> expert_residuals(torch.tensor([[1.0, 1.0]]), torch.tensor([0.5, 0.0]))
        tensor([[2., 0.]])
    """
    is_reachable = scale.abs() > 1e-2 * scale.abs().amax()
    return torch.where(is_reachable, residuals / scale, 0.0)


def with_output_scale(model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> list[ExpertLayer]:
    """Measure the output scale of the layers; see :func:`output_scales`."""
    scales = output_scales(model, layers)
    return [replace(layer, output_scale=scales[layer.index]) for layer in layers]


def output_scales(model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> dict[int, Tensor]:
    """Measure how a layer scales the output of its experts.

    The factor is 1 in most families. Some multiply the experts' output by a constant, or by a vector; the delta of an
    edit is divided by it. A layer that is not linear in its experts' output (because of a norm), or that mixes tokens,
    cannot be edited.

    No family declares this factor, so it is measured: two prompts are run up to the highest layer, once as they are
    and once with shifted outputs of the experts. The shift of the second prompt is twice that of the first.

    Args:
        model: the model. All ranks must call this function.
        layers: the layers, ascending.

    Returns:
        The change of the layer's output for a unit change of its experts' output, ``[d_model]``, by layer index.

    Raises:
        UnsupportedModelError: a layer is not linear in its experts' output; the message names the layer and the reason.
        FloatingPointError: if a layer's output is not finite.
    """
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 2 * LENGTH)
    prompts = torch.arange(2 * LENGTH, device=model.device).view(2, LENGTH) % vocabulary
    # a pair of rows for each layer, so that shifts in lower layers do not reach it
    rows = {layer.index: slice(2 * number, 2 * number + 2) for number, layer in enumerate(layers)}
    ids = prompts.repeat(len(layers), 1)
    experts_before, before = _run(model, layers, ids, {})
    shifts: dict[int, Tensor] = {}
    for layer in layers:
        own, hidden = experts_before[layer.index], before[layer.index]
        _check_shapes(model, layer, ids, own, hidden)
        old = own.view(*ids.shape, -1)[rows[layer.index], TOKEN].float()
        # as large as the values it is added to, entry by entry, so that rounding loses little of it
        parts = (old, hidden[rows[layer.index], TOKEN].float())
        size = sum(part.abs() + part.square().mean(-1, keepdim=True).sqrt() for part in parts)
        sign = 1.0 - 2.0 * (torch.arange(old.shape[-1], device=old.device) * 7 % 3 == 1)
        new = (old + sign * size * torch.tensor([[1.0], [2.0]], device=old.device)).to(own.dtype)
        shifts[layer.index] = torch.zeros_like(own).view(*ids.shape, -1)
        shifts[layer.index][rows[layer.index], TOKEN] = new - old.to(own.dtype)
    _, after = _run(model, layers, ids, shifts)
    scales = {}
    for index, own_rows in rows.items():
        name = f"layer {index} of {type(model).__name__}"
        shift = shifts[index][own_rows, TOKEN]
        scales[index] = scale_from_shift(name, before[index][own_rows], after[index][own_rows], shift)
    return scales


def _run(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], ids: Tensor, shifts: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the (shifted) outputs of the experts and the outputs of the layers, by layer index."""
    expert_outputs: dict[int, Tensor] = {}
    layer_outputs: dict[int, Tensor] = {}
    with held(Undo()) as undo, inference(model):
        for layer in layers:

            def shift(module: nn.Module, args: Any, output: Tensor, index: int = layer.index) -> Tensor:
                expert_outputs[index] = output + shifts[index].view_as(output) if index in shifts else output
                return expert_outputs[index]

            def record(module: nn.Module, args: Any, output: Any, index: int = layer.index) -> None:
                layer_outputs[index] = LayerOutput.of(output).hidden

            for module, hook in ((layer.experts, shift), (layer.layer, record)):
                undo.enter_context(hooked(module, hook))
        mask = torch.ones_like(ids)
        layer_output(model, layers[-1], ids, mask, position_ids(mask))
    return expert_outputs, layer_outputs


def _check_shapes(
    model: PreTrainedModel, layer: ExpertLayer, ids: Tensor, expert_output: Tensor, output: Tensor
) -> None:
    name, d_model = type(model).__name__, layer.shape[1]
    if output.shape != (*ids.shape, d_model):
        raise UnsupportedModelError(
            f"layer {layer.index} of {name} returns {list(output.shape[2:])} for each token, its experts [{d_model}]: "
            "a model whose layers return several streams, or project the output of the experts, cannot be edited; "
            f"{FAMILIES_HINT}"
        )
    if expert_output.shape != (ids.numel(), d_model):
        raise UnsupportedModelError(
            f"the experts of layer {layer.index} of {name} must return [tokens, d_model] = {[ids.numel(), d_model]}, "
            f"got {list(expert_output.shape)}"
        )


def scale_from_shift(name: str, before: Tensor, after: Tensor, shift: Tensor) -> Tensor:
    """Compute the scale ``[d_model]`` of one layer from its response to a shift of its experts' output.

    Args:
        name: the layer, for messages.
        before: output of the layer, ``[2, LENGTH, d_model]``.
        after: output of the layer with the shift, ``[2, LENGTH, d_model]``.
        shift: shift of the experts' output at position ``TOKEN``, ``[2, d_model]``.

    Raises:
        UnsupportedModelError: the response is zero, is not linear, or reaches other tokens.
        FloatingPointError: an output is not finite.
    """
    # float32: sums of some dozens of elements; bfloat16: two rounded outputs about as large as the shift
    tolerance = max(1e-3, *(8 * torch.finfo(tensor.dtype).eps for tensor in (after, shift)))
    change = (after - before).float()
    if not bool(change.isfinite().all()):
        raise FloatingPointError(f"the output of {name} is not finite")
    scales = change[:, TOKEN] / shift.float()
    scale = scales.mean(0)
    if not bool(scales.any()):
        raise UnsupportedModelError(f"the output of {name} does not depend on its experts")
    # a norm shows in nearly every entry; a single entry may have been rounded when a large value was added to it
    linear = ((scales - scale).abs() <= tolerance * torch.maximum(scale.abs().median(), scale.abs())).all(0)
    if float(linear.float().mean()) < LINEAR_SHARE:
        raise UnsupportedModelError(
            f"{name} normalises the output of its experts, or changes it by more than a constant factor: "
            f"a change of the down-projection does not act linearly there; {FAMILIES_HINT}"
        )
    # rounding errors of other tokens grow with their hidden states, which are very large for some tokens
    allowed = tolerance * (change[:, TOKEN].abs().amax() + before.float().abs())
    others = [position for position in range(LENGTH) if position != TOKEN]
    if not bool((change.abs() <= allowed)[:, others].all()):
        raise UnsupportedModelError(
            f"{name} mixes the experts' outputs of different tokens, as a convolution does: "
            f"a change of the down-projection at the edit token does not act on that token alone; {FAMILIES_HINT}"
        )
    constant = scale[linear].mean()
    if bool(((scale - constant).abs() <= tolerance * constant.abs())[linear].all()):
        scale = constant.expand_as(scale)
    return torch.where((scale - 1).abs() <= tolerance / 4, 1.0, scale)
