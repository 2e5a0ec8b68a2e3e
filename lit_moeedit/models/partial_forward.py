"""Running part of a model: frozen, without the layers whose result is known or not needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError
from lit_moeedit.sharding.zero3_passes import gathering_on_use


def decoder_layers(model: PreTrainedModel, layer: ExpertLayer) -> list[nn.Module]:
    """All decoder layers of the stack that ``layer`` belongs to, with or without experts, in order."""
    return list(_stack(model, layer)[1])


def _stack(model: PreTrainedModel, layer: ExpertLayer) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs ``layer`` and its neighbours, and these."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(other is layer.layer for other in child):
                return module, child
    raise UnsupportedModelError(f"layer {layer.index} is not in a ModuleList of {type(model).__name__}")


@contextmanager
def inference(model: PreTrainedModel, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode with frozen parameters; modes, ``requires_grad`` and random states come back afterwards.

    Args:
        model: the model.
        gradients: whether gradients (with respect to something other than parameters) are wanted inside.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [model.device] if model.device.type == "cuda" else []
    # Lightning evaluates in inference mode, whose tensors could not be differentiated
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, training in modes.items():
                module.training = training


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # an attribute of the instance hides the class's method; deleting it brings the method back
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class LayerOutput(NamedTuple):
    """What a decoder layer returns.

    Attributes:
        hidden: ``[batch, length, d_model]``.
        others: what some families hand on to the next layer besides (what an indexer chose, a router's state), each
            ``[batch, length, …]``; ``None`` where the hidden states stand alone.
    """

    hidden: Tensor
    others: tuple[Tensor | None, ...] | None = None

    @classmethod
    def of(cls, returned: Any) -> LayerOutput:
        """Take what a layer returned apart."""
        return cls(returned[0], tuple(returned[1:])) if isinstance(returned, tuple) else cls(returned)

    def at(self, *index: Any) -> LayerOutput:
        """Some rows, or some rows' positions."""
        others = self.others
        if others is not None:
            others = tuple(other if other is None else other[index] for other in others)
        return LayerOutput(self.hidden[index], others)

    def returned(self) -> Any:
        """As the layer returns it."""
        return self.hidden if self.others is None else (self.hidden, *self.others)


@contextmanager
def skipped(layers: Sequence[nn.Module], like: Callable[[], LayerOutput | None] = lambda: None) -> Iterator[None]:
    """While open, the given decoder layers hand their input on unchanged and cost nothing.

    Args:
        layers: the layers.
        like: an output of a layer next to them, whose form and ``others`` theirs has.
    """

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden, other = args[0] if args else kwargs["hidden_states"], like()
        return hidden if other is None else other._replace(hidden=hidden).returned()

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_forward_replaced(layer, pass_through))
        yield


@contextmanager
def output_replaced(layer: nn.Module, output: Callable[[], LayerOutput]) -> Iterator[None]:
    """While open, the given decoder layer returns ``output()`` instead of being run."""
    with _forward_replaced(layer, lambda *args, **kwargs: output().returned()):
        yield


@contextmanager
def experts_run_on(layers: Sequence[ExpertLayer], tokens: Tensor) -> Iterator[None]:
    """While open, the routed experts of some layers are run on some tokens only; for the others they give zero.

    Args:
        layers: the layers.
        tokens: bool ``[batch, length]``, which ones.
    """
    with experts_run_at(layers, tokens.flatten().nonzero().squeeze(-1), tokens.numel()):
        yield


@contextmanager
def experts_run_at(layers: Sequence[ExpertLayer], chosen: Tensor, count: int) -> Iterator[None]:
    """Run the routed experts at some places ``[n]`` among ``count`` tokens only, as :func:`experts_run_on` does.

    Places are known beforehand: to count true values in a mask, a GPU has to be waited for.
    """
    with ExitStack() as stack:
        for layer in layers:

            def run(
                hidden: Tensor, *routing: Tensor, forward: Callable[..., Tensor] = layer.experts.forward, **kwargs: Any
            ) -> Tensor:
                if any(len(part) != count for part in (hidden, *routing)):  # not one row per token
                    return forward(hidden, *routing, **kwargs)
                output = forward(hidden[chosen], *(part[chosen] for part in routing), **kwargs)
                return output.new_zeros(hidden.shape).index_copy(0, chosen, output)

            stack.enter_context(_forward_replaced(layer.experts, run))
        yield


def layer_output(
    model: PreTrainedModel, layer: ExpertLayer, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> LayerOutput:
    """Output of a decoder layer; neither the layers above nor the head are run.

    Args:
        model: the model.
        layer: the layer whose output is wanted.
        input_ids: int64 ``[batch, length]``.
        attention_mask: int64 ``[batch, length]``.
        positions: int64 ``[batch, length]``, position ids.
    """
    stack, layers = _stack(model, layer)
    above = list(layers)[next(i for i, other in enumerate(layers) if other is layer.layer) + 1 :]
    caught: list[LayerOutput] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(LayerOutput.of(output))

    handle = layer.layer.register_forward_hook(catch)
    try:
        with skipped(above, lambda: caught[0]), gathering_on_use(model):
            # not through the head, which under ZeRO-3 would be gathered for every batch
            stack(**_inputs(stack, input_ids, attention_mask, positions))
    finally:
        handle.remove()
    return caught[0]


def hidden_states(
    model: PreTrainedModel, layer: ExpertLayer, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """The hidden states of :func:`layer_output`, ``[batch, length, d_model]``."""
    return layer_output(model, layer, input_ids, attention_mask, positions).hidden


def logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    keep: int,
    cache: Cache | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits of the last ``keep`` positions (0: of all), ``[batch, keep, vocabulary]``.

    With a ``cache``, its positions stand before those given; ``weights`` stand in for parameters of these names.
    """
    inputs = _inputs(model, input_ids, attention_mask, positions)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = keep
    if cache is not None:
        inputs |= {"past_key_values": cache, "use_cache": True}
    with gathering_on_use(model):
        outputs = model(**inputs) if weights is None else functional_call(model, dict(weights), (), inputs)
    return outputs.logits[:, -keep:]


def _inputs(module: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(module.forward).parameters:
        inputs["position_ids"] = positions
    return inputs
