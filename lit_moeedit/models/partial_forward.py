"""Forwards of a frozen model without the layers whose output is known or not needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError
from lit_moeedit.models.quantised import no_repacking
from lit_moeedit.sharding.backends import find_backend, refuse_parallelism, skipping


def decoder_layers(model: PreTrainedModel, layer: ExpertLayer) -> list[nn.Module]:
    """Return all decoder layers of the stack that ``layer`` belongs to, with or without experts, in order."""
    return list(_stack(model, layer)[1])


def _stack(model: PreTrainedModel, layer: ExpertLayer) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that runs ``layer`` and the other layers of its stack, and the list of these layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(other is layer.layer for other in child):
                return module, child
    raise UnsupportedModelError(f"layer {layer.index} is not in a ModuleList of {type(model).__name__}")


@contextmanager
def inference(model: PreTrainedModel, gradients: bool = False) -> Iterator[None]:
    """Set the model to evaluation mode inside the context; its parameters get no gradients.

    Modes, ``requires_grad`` and random states are restored afterwards. Modules that ``torch.compile`` compiled run
    eagerly: compiled code does not check whether a module has got a hook or another ``forward`` since.

    Args:
        model: the model.
        gradients: true to allow gradients inside, which must be with respect to tensors other than parameters.

    Raises:
        UnsupportedShardingError: if a rank holds or computes only a part of the model, in a way that is unsupported.
    """
    refuse_parallelism(model)
    with held(Undo()) as undo:
        undo.by(torch.set_grad_enabled, torch.is_grad_enabled())
        # Lightning evaluates in inference mode, whose tensors could not be differentiated
        undo.enter_context(torch.inference_mode(False))
        torch.set_grad_enabled(gradients)
        undo.enter_context(evaluating(model))
        undo.enter_context(find_backend(model).beside_training(model, gradients))
        yield


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Set the model to evaluation mode inside the context, with parameters that get gradients as before.

    Modes and random states are restored afterwards. Modules that ``torch.compile`` compiled run eagerly.
    """
    with held(Undo()) as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.by(torch.set_rng_state, torch.get_rng_state())
        if model.device.type == "cuda":
            undo.by(torch.cuda.set_rng_state, torch.cuda.get_rng_state(model.device), model.device)
            # cuDNN's attention makes a plan for each new shape of a batch, which takes longer than the forward
            undo.by(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
            torch.backends.cuda.enable_cudnn_sdp(False)
        undo.enter_context(no_repacking(model))
        undo.by(_set_modes, {module: module.training for module in model.modules()})
        model.train(False)  # eval() has no type annotations
        yield


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    """Register a forward hook, or a forward pre-hook if ``before``, inside the context."""
    with held(Undo()) as undo:
        undo.by(_remove, module._forward_pre_hooks if before else module._forward_hooks, hook)
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(hook)
        yield


def _remove(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    # an interrupt can leave a registered hook without its handle
    for key in [key for key, other in hooks.items() if other is hook]:
        hooks.pop(key, None)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module inside the context."""
    # an attribute of the instance hides the class's method; deleting it brings the method back
    own = module.__dict__
    with held(Undo()) as undo:
        if "forward" in own:
            undo.by(own.__setitem__, "forward", own["forward"])
        else:
            undo.by(own.pop, "forward", None)
        own["forward"] = forward
        yield


class LayerOutput(NamedTuple):
    """The output of a decoder layer.

    Attributes:
        hidden: hidden states, ``[batch, length, d_model]``.
        others: further outputs in some families, such as the choice of an indexer or the state of a router, each
            ``[batch, length, …]``; ``None`` if the layer returns the hidden states alone.
    """

    hidden: Tensor
    others: tuple[Tensor | None, ...] | None = None

    @classmethod
    def of(cls, returned: Any) -> LayerOutput:
        """Make an output from the return value of a layer."""
        return cls(returned[0], tuple(returned[1:])) if isinstance(returned, tuple) else cls(returned)

    def at(self, *index: Any) -> LayerOutput:
        """Index rows, or rows and positions, of all outputs."""
        others = self.others and tuple(None if other is None else other[index] for other in self.others)
        return LayerOutput(self.hidden[index], others)

    def returned(self) -> Any:
        """Convert the output to the form that the layer returns."""
        return self.hidden if self.others is None else (self.hidden, *self.others)


@contextmanager
def skipped(layers: Sequence[nn.Module], like: Callable[[], LayerOutput | None] = lambda: None) -> Iterator[None]:
    """Skip the given decoder layers inside the context: they return their input, at no cost.

    Args:
        layers: the layers.
        like: returns the output of a neighbouring layer; the skipped layers return its form and its ``others``.
    """

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden, other = args[0] if args else kwargs["hidden_states"], like()
        return hidden if other is None else other._replace(hidden=hidden).returned()

    with held(Undo()) as undo:
        undo.enter_context(skipping(layers))
        for layer in layers:
            undo.enter_context(forward_replaced(layer, pass_through))
        yield


@contextmanager
def output_replaced(layer: nn.Module, output: Callable[[], LayerOutput]) -> Iterator[None]:
    """Replace the output of a decoder layer by ``output()`` inside the context, without computing the layer."""
    with held(Undo()) as undo:
        undo.enter_context(skipping([layer]))
        undo.enter_context(forward_replaced(layer, lambda *args, **kwargs: output().returned()))
        yield


def experts_run_on(layers: Sequence[ExpertLayer], tokens: Tensor) -> AbstractContextManager[None]:
    """Compute the routed experts of the given layers for selected tokens only; their output for others is 0.

    Args:
        layers: the layers.
        tokens: the selection, bool ``[batch, length]``.
    """
    return experts_run_at(layers, tokens.flatten().nonzero().squeeze(-1), tokens.numel())


@contextmanager
def experts_run_at(layers: Sequence[ExpertLayer], chosen: Tensor, count: int) -> Iterator[None]:
    """Compute the routed experts for selected tokens only, as :func:`experts_run_on` does, without a GPU sync.

    Args:
        layers: the layers.
        chosen: indices of the selected tokens, int64 ``[n]``. A mask would need a sync to count its true elements.
        count: number of tokens.
    """
    with held(Undo()) as undo:
        for layer in layers:

            def run(
                hidden: Tensor, *routing: Tensor, forward: Callable[..., Tensor] = layer.experts.forward, **kwargs: Any
            ) -> Tensor:
                if any(len(part) != count for part in (hidden, *routing)):  # rows are not tokens
                    return forward(hidden, *routing, **kwargs)
                output = forward(hidden[chosen], *(part[chosen] for part in routing), **kwargs)
                return output.new_zeros(hidden.shape).index_copy(0, chosen, output)

            undo.enter_context(forward_replaced(layer.experts, run))
        yield


def layer_output(
    model: PreTrainedModel, layer: ExpertLayer, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> LayerOutput:
    """Compute the output of a decoder layer, without the layers above it and without the head.

    Args:
        model: the model.
        layer: the layer.
        input_ids: token ids, int64 ``[batch, length]``.
        attention_mask: int64 ``[batch, length]``.
        positions: position ids, int64 ``[batch, length]``.
    """
    stack, layers = _stack(model, layer)
    above = list(layers)[next(i for i, other in enumerate(layers) if other is layer.layer) + 1 :]
    outputs: list[LayerOutput] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(LayerOutput.of(output))

    backend = find_backend(model)
    # not the whole model, if that can be: ZeRO-3 would gather the head for every batch
    called = backend.entry(model, stack)
    with hooked(layer.layer, record), skipped(above, lambda: outputs[0]), backend.forward(model):
        called(**_inputs(called, input_ids, attention_mask, positions, keep=1))
    return outputs[0]


def logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    keep: int,
    cache: Cache | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Compute the logits of the last positions, ``[batch, keep, vocabulary]``.

    Args:
        model: the model.
        input_ids: token ids, int64 ``[batch, length]``.
        attention_mask: int64 ``[batch, length]``.
        positions: position ids, int64 ``[batch, length]``.
        keep: number of positions; 0 for all.
        cache: keys and values of the positions before ``input_ids``.
        weights: tensors that replace the parameters of these names.
    """
    inputs = _inputs(model, input_ids, attention_mask, positions, keep)
    if cache is not None:
        inputs |= {"past_key_values": cache, "use_cache": True}
    with find_backend(model).forward(model):
        outputs = model(**inputs) if weights is None else functional_call(model, dict(weights), (), inputs)
    scores: Tensor = outputs.logits
    return scores[:, -keep:]


def _inputs(
    module: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, keep: int
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    further = {"position_ids": positions, "logits_to_keep": keep}
    known = inspect.signature(module.forward).parameters
    return inputs | {name: value for name, value in further.items() if name in known}
