"""FSDP2's handling of weights and gradients during a pass, simulated with a model of fake tensors.

Hooks gather, release and reduce as ``FSDPParamGroup`` of torch 2.13 does. The gathered copies are stood in for by
buffers of their size, so that what autograd saves of a weight does not count: FSDP2 frees the storage itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from typing_extensions import override

from lit_moeedit.planning.sharding import Send, Sharding
from lit_moeedit.sharding.backends import Backend, extra_backend
from lit_moeedit.sharding.backends.fsdp2 import without_hooks
from lit_moeedit.sharding.loading import layers_to_shard


def shard_size(weight: Tensor, ranks: int) -> int:
    """Return the number of elements of a rank's shard of a weight: whole rows, and padding on ranks that get less.

    Example:
        >>> shard_size(torch.empty(5, 3), ranks=4)
        6
    """
    return -(-weight.shape[0] // ranks) * weight.shape[1:].numel()


def weights_together(model: PreTrainedModel) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the modules that ``LitMoE`` shards, the model first, each with the weights that are gathered for it."""
    layers = [(layer, list(layer.parameters())) for layer in layers_to_shard(model)]
    below = {weight for _, weights in layers for weight in weights}
    return [(model, [weight for weight in model.parameters() if weight not in below]), *layers]


class _Group:
    """The weights that are gathered for a module, with the buffers that they take."""

    def __init__(self, module: nn.Module, weights: Sequence[nn.Parameter], sharding: Sharding) -> None:
        self.module, self.weights = module, weights
        shards = sum(shard_size(weight, sharding.ranks) for weight in weights)
        self.size = sharding.ranks * shards * sharding.itemsize
        self.coming: Tensor | None = None  # the result of an all_gather
        self.gathered: Tensor | None = None
        self.forwards: list[int] = []
        self.is_in_backward = self.is_done = False


class _AfterBackward(torch.autograd.Function):
    """The identity, whose backward calls a function first."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.then()
        return (None, *gradients)


class Passes(Backend):
    """The forward and backward passes of a model that is sharded layer by layer, and the backend that holds it.

    Args:
        model: a model of fake tensors.
        sharding: sharding of the model.
        send: called with the bytes that are sent.
        reduces: whether gradients of the weights are reduced to the ranks that own them.
    """

    def __init__(self, model: PreTrainedModel, sharding: Sharding, send: Send, reduces: bool) -> None:
        self._sharding, self._send, self._reduces = sharding, send, reduces
        self._groups = [_Group(module, weights, sharding) for module, weights in weights_together(model)]
        self._modules = set(model.modules())
        self._order: list[_Group] = []
        self._last: Tensor | None = None  # is freed when the next module has been gathered
        self._reducing: Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Gather and release the weights of each module that is run within this block."""
        with ExitStack() as stack:
            for group in self._groups:
                for hook in self._register(group):
                    stack.callback(hook.remove)
            yield

    # -- the backend --------------------------------------------------------------------------------------------------

    @override
    def holds(self, model: nn.Module) -> bool:
        return not self._modules.isdisjoint(model.modules())

    @override
    def settle(self, model: nn.Module) -> None:
        for group in self._groups:
            group.gathered = None

    @override
    @contextmanager
    def beside_training(self, model: nn.Module, gradients: bool) -> Iterator[None]:
        self.settle(model)
        yield
        self.settle(model)

    @override
    def entry(self, model: nn.Module, part: nn.Module) -> nn.Module:
        return model

    @override
    def skipping(self, layer: nn.Module) -> AbstractContextManager[object]:
        return without_hooks(layer)

    # -- passes -------------------------------------------------------------------------------------------------------

    def _register(self, group: _Group) -> list[Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._start(group)
            self._wait(group, is_forward=True)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not given or not torch.is_grad_enabled():
                return args, kwargs
            apply: Any = _AfterBackward.apply
            passed = iter(apply(lambda: self._after_backward(group), *given))
            return tree_map_only(Tensor, lambda leaf: next(passed) if leaf.requires_grad else leaf, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if group is self._groups[0]:
                self._last = None
            else:
                group.gathered = None
            group.forwards.append(len(self._order))
            self._order.append(group)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: self._before_backward(group))

        module = group.module
        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    def _start(self, group: _Group) -> None:
        """Start an all_gather, unless there is one, or the weights are gathered."""
        if group.coming is None and group.gathered is None:
            group.coming = _bytes(group.size if self._sharding.ranks > 1 else 0)
            self._send(self._sharding.part(group.size))

    def _wait(self, group: _Group, is_forward: bool) -> None:
        """Copy the result of an all_gather to the weights."""
        if group.coming is not None:
            if is_forward:
                self._last = None
            group.gathered = _bytes(group.size)
            if is_forward:
                self._last = group.coming
            group.coming = None

    def _before_backward(self, group: _Group) -> None:
        if not any(other.is_in_backward for other in self._groups):
            Variable._execution_engine.queue_callback(self._end_backward)
        if group.is_in_backward:
            return
        group.is_in_backward = True
        self._start(group)
        self._wait(group, is_forward=False)
        if group.forwards:
            index = group.forwards.pop()
            if index > 0:
                self._start(self._order[index - 1])

    def _after_backward(self, group: _Group) -> None:
        group.gathered, group.is_done = None, True
        self._reducing = None
        if self._reduces and any(weight.grad is not None for weight in group.weights):
            # the results take the place of the gradients of the last step
            self._reducing = _bytes(group.size)
            for weight in group.weights:
                weight.grad = None
            self._send(self._sharding.part(group.size))

    def _end_backward(self) -> None:
        for group in self._groups:
            if not group.is_done:
                self._after_backward(group)
            group.is_in_backward = group.is_done = False
            group.coming = None
            group.forwards.clear()
        self._order.clear()
        self._reducing = None


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


@contextmanager
def sharded_fully(model: PreTrainedModel, sharding: Sharding, send: Send, gradients: bool) -> Iterator[None]:
    """Run a model within this block as the first of several ranks under FSDP2.

    Args:
        model: a model of fake tensors.
        sharding: sharding of the model.
        send: called with the bytes that are sent.
        gradients: whether gradients of the weights are computed.
    """
    passes = Passes(model, sharding, send, gradients)
    with passes.hooks(), extra_backend(passes):
        yield
