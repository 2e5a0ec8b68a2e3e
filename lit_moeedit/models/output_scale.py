"""What becomes of the experts' output on its way to the layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moeedit.models.experts import LISTED, ExpertLayer, UnsupportedModelError
from lit_moeedit.models.partial_forward import hidden_states, inference

LENGTH, TOKEN = 4, 2
"""Length of the two prompts that are run, and the position at which the experts' output is moved."""
LINEAR = 0.98
"""So many of the entries must move with what moves them."""


def asked_of_experts(residuals: Tensor, gain: Tensor) -> Tensor:
    """How far the experts' output must move for the layer's to move by ``residuals``, ``[n, d_model]`` each.

    Entries in which the layer hardly depends on its experts are given up: they would take all of the change.

    Example:
        >>> asked_of_experts(torch.tensor([[1.0, 1.0]]), torch.tensor([0.5, 0.0]))
        tensor([[2., 0.]])
    """
    reached = gain.abs() > 1e-2 * gain.abs().amax()
    return torch.where(reached, residuals / gain, 0.0)


def output_gains(model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> dict[int, Tensor]:
    """How far a layer's output moves where that of its experts moves by one: ``[d_model]``, by layer index.

    It is 1 in most families. Some multiply what the experts say by a constant, or by one for each entry; a delta then
    has to be as much larger. Where the way is not linear, as through a norm, or mixes tokens, no delta does what a
    solver expects of it.

    That is found by trying, since no family declares it: two prompts are run up to the highest layer, and again with
    experts' outputs that are moved, in one of the prompts twice as far as in the other.

    Args:
        model: the model. All ranks must call this.
        layers: the layers, ascending.

    Raises:
        UnsupportedModelError: naming the layer and the reason.
        FloatingPointError: if a layer's output is not finite.
    """
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 2 * LENGTH)
    prompts = torch.arange(2 * LENGTH, device=model.device).view(2, LENGTH) % vocabulary
    # a pair of rows for each layer, so that it does not see what is moved below it
    rows = {layer.index: slice(2 * number, 2 * number + 2) for number, layer in enumerate(layers)}
    ids = prompts.repeat(len(layers), 1)
    said, before = _run(model, layers, ids, {})
    shifts: dict[int, Tensor] = {}
    for layer in layers:
        own, hidden = said[layer.index], before[layer.index]
        _check_shapes(model, layer, ids, own, hidden)
        old = own.view(*ids.shape, -1)[rows[layer.index], TOKEN].float()
        # as large as what it is added to, entry by entry, so that little of it is lost by rounding
        parts = (old, hidden[rows[layer.index], TOKEN].float())
        size = sum(part.abs() + part.square().mean(-1, keepdim=True).sqrt() for part in parts)
        sign = 1.0 - 2.0 * (torch.arange(old.shape[-1], device=old.device) * 7 % 3 == 1)
        new = (old + sign * size * torch.tensor([[1.0], [2.0]], device=old.device)).to(own.dtype)
        shifts[layer.index] = torch.zeros_like(own).view(*ids.shape, -1)
        shifts[layer.index][rows[layer.index], TOKEN] = new - old.to(own.dtype)
    _, after = _run(model, layers, ids, shifts)
    return {
        layer.index: _gain(
            model,
            layer,
            before[layer.index][rows[layer.index]],
            after[layer.index][rows[layer.index]],
            shifts[layer.index][rows[layer.index], TOKEN],
        )
        for layer in layers
    }


def _run(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], ids: Tensor, shifts: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Outputs of the experts, as they are handed on, and of the layers, by layer index."""
    said: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack, inference(model):
        for layer in layers:

            def speak(module: nn.Module, args: Any, output: Tensor, index: int = layer.index) -> Tensor:
                said[index] = output + shifts[index].view_as(output) if index in shifts else output
                return said[index]

            def catch(module: nn.Module, args: Any, output: Any, index: int = layer.index) -> None:
                outputs[index] = output[0] if isinstance(output, tuple) else output

            for module, hook in ((layer.experts, speak), (layer.layer, catch)):
                stack.callback(module.register_forward_hook(hook).remove)
        mask = torch.ones_like(ids)
        hidden_states(model, layers[-1], ids, mask, mask.cumsum(1) - 1)
    return said, outputs


def _check_shapes(model: PreTrainedModel, layer: ExpertLayer, ids: Tensor, said: Tensor, output: Tensor) -> None:
    name, d_model = type(model).__name__, layer.shape[1]
    if output.shape != (*ids.shape, d_model):
        raise UnsupportedModelError(
            f"layer {layer.index} of {name} puts out {list(output.shape[2:])} for each token, its experts [{d_model}]: "
            f"a model whose layers hand on several streams, or project what the experts say, cannot be edited; {LISTED}"
        )
    if said.shape != (ids.numel(), d_model):
        raise UnsupportedModelError(
            f"the experts of layer {layer.index} of {name} must put out [tokens, d_model] = {[ids.numel(), d_model]}, "
            f"got {list(said.shape)}"
        )


def _gain(model: PreTrainedModel, layer: ExpertLayer, before: Tensor, after: Tensor, shift: Tensor) -> Tensor:
    """The gain of one layer: its outputs ``[2, LENGTH, d_model]`` before and after its experts moved by ``shift``."""
    which = f"layer {layer.index} of {type(model).__name__}"
    # float32: sums of some dozens of numbers; bfloat16: two rounded outputs about as large as the shift
    tolerance = max(1e-3, *(8 * torch.finfo(tensor.dtype).eps for tensor in (after, shift)))
    moved = (after - before).float()
    if not bool(moved.isfinite().all()):
        raise FloatingPointError(f"the output of {which} is not finite")
    gains = moved[:, TOKEN] / shift.float()
    gain = gains.mean(0)
    scale = gain.abs().median()
    if not bool((gains.abs() > 0).any()):
        raise UnsupportedModelError(f"the output of {which} does not depend on what its experts say")
    # a norm shows in nearly every entry; a single one may have been rounded when something large was added to it
    linear = ((gains - gain).abs() <= tolerance * torch.maximum(scale, gain.abs())).all(0)
    if float(linear.float().mean()) < LINEAR:
        raise UnsupportedModelError(
            f"{which} normalises what its experts say, or changes it otherwise than by a constant: "
            f"a change of the down-projection does not act linearly there; {LISTED}"
        )
    # the sums of another token are rounded as far as they are large, which some tokens' are beyond all others
    allowed = tolerance * (moved[:, TOKEN].abs().amax() + before.float().abs())
    others = [position for position in range(LENGTH) if position != TOKEN]
    if not bool((moved.abs() <= allowed)[:, others].all()):
        raise UnsupportedModelError(
            f"{which} mixes what its experts say of different tokens (as by a convolution): "
            f"a change of the down-projection at the edit token does not act on that token alone; {LISTED}"
        )
    constant = gain[linear].mean()
    if bool(((gain - constant).abs() <= tolerance * constant.abs())[linear].all()):
        gain = constant.expand_as(gain)
    return torch.where((gain - 1).abs() <= tolerance / 4, 1.0, gain)
