"""DeepSpeed's handling of weights and gradients during a pass, simulated with a model of fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_moeedit.models.experts import find_model
from lit_moeedit.planning.sharding import Send, Sharding
from lit_moeedit.planning.simulated_fsdp2 import sharded_fully


def is_leaf(module: nn.Module) -> bool:
    """Tell if DeepSpeed gathers the weights of a module and of all modules in it together."""
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

    return f"{type(module).__module__}.{type(module).__name__}" in DEFAULT_LEAF_MODULE_CLASSES


def gathered_together(model: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the modules that ZeRO stage 3 gathers weights for, each with these weights."""
    found, inside = [], set[nn.Module]()
    for module in model.modules():
        if module in inside:
            continue
        # gated delta nets read the weights of their convolutions without calling them, which DeepSpeed notices
        read = (child for child in module.children() if isinstance(child, nn.Conv1d))
        used = list(module.modules()) if is_leaf(module) else [module, *read]
        inside |= set(used)
        weights = list(dict.fromkeys(weight for part in used for weight in part.parameters(recurse=False)))
        if weights:
            found.append((module, weights))
    return found


class Gradients:
    """The reduction of gradients from the backward pass to the ranks that own them.

    A gradient that fits is moved to a bucket, which is reduced when it is full. A larger one is reduced alone. See
    ``reduce_independent_p_g_buckets_and_remove_grads`` of DeepSpeed's optimizers.
    """

    def __init__(self, model: nn.Module, sharding: Sharding, send: Send) -> None:
        self.sharding, self.send = sharding, send
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self._waiting = 0
        self._large: list[Tensor] = []
        self._kept: list[Tensor] = []

    def take(self, weight: nn.Parameter) -> None:
        """Take over the gradient of a weight."""
        # a pass may not use all weights of a leaf module
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        elements = gradient.numel()
        if self._waiting and self._waiting + elements > self.sharding.bucket:
            self.reduce()
        if self.sharding.stage != 3 and not self._kept:
            buckets = 2 if self.sharding.overlap else 1  # stage 3 keeps its bucket from step to step
            self._kept += [gradient.new_empty(self.sharding.bucket) for _ in range(buckets)]
        if elements > self.sharding.bucket:
            self._large.append(gradient)
        self._waiting += elements
        weight.grad = None

    def reduce(self) -> None:
        """Average the waiting gradients over the ranks, for their owners."""
        if not self._waiting:
            return
        size, ranks = self._waiting * self.sharding.itemsize, self.sharding.ranks
        if self.sharding.stage == 3:
            # a single gradient is reduced in place; gloo reduces a copy
            copies = (not self._large) + self.sharding.on_cpu
            torch.empty(copies * size, dtype=torch.uint8)
            self.send(self.sharding.part(size))
        else:
            if len(self._kept) < 3:
                owned = -(-self.parameters // ranks) * self.sharding.itemsize
                self._kept.append(torch.empty(owned, dtype=torch.uint8))
            # an all_reduce, of whose result an owner keeps its part
            self.send(2 * self.sharding.part(size))
        self._large.clear()
        self._waiting = 0


_AVAILABLE, _NOT_AVAILABLE = SimpleNamespace(name="AVAILABLE"), SimpleNamespace(name="NOT_AVAILABLE")


@contextmanager
def gathering(model: nn.Module, sharding: Sharding, send: Send, gradients: Gradients | None) -> Iterator[None]:
    """Gather a module's weights before its forward and backward, and drop them after it, as ZeRO stage 3 does.

    DeepSpeed can also keep weights for the backward pass and gather the next ones in advance, but only while modules
    run in the order of the last step. In a run with edits they do not.
    """
    every: list[Any] = list(model.parameters())
    with ExitStack() as stack:
        for number, weight in enumerate(every):
            # as DeepSpeed marks them
            weight.ds_id, weight.ds_shape = number, weight.shape
            _drop(weight)
            stack.callback(_restore, weight)
        for module, weights in gathered_together(model):
            for hook in _hooks(module, weights, sharding, send, gradients):
                stack.callback(hook.remove)
        yield


def _hooks(
    module: nn.Module, weights: Sequence[Any], sharding: Sharding, send: Send, gradients: Gradients | None
) -> list[RemovableHandle]:
    """Register the hooks of a module with the weights that are gathered for it."""

    def gather(*_: Any) -> None:
        missing = [weight for weight in weights if weight.ds_status is not _AVAILABLE]
        elements = sum(weight.ds_shape.numel() for weight in missing)
        # an all_gather of several weights goes through one buffer
        buffer = missing[0].new_empty(elements) if len(missing) > 1 else None
        for weight in missing:
            weight.data, weight.ds_status = weight.new_empty(weight.ds_shape), _AVAILABLE
        del buffer
        send(sharding.part(elements * sharding.itemsize))

    def drop(*_: Any) -> None:
        for weight in weights:
            _drop(weight)

    def take(weight: Any) -> None:
        assert gradients is not None
        gradients.take(weight)
        _drop(weight)

    def backward_end(_: nn.Module, inputs: Any, outputs: Any) -> None:
        if gradients is not None:
            for weight in weights:
                take(weight)
        # like this hook, DeepSpeed sees only positional inputs; the weights of a module without any it drops with the
        # next forward
        elif any(isinstance(gradient, Tensor) for gradient in inputs):
            drop()

    before = [module.register_forward_pre_hook(gather), module.register_full_backward_pre_hook(gather)]
    after = [module.register_forward_hook(drop)]
    if gradients is None or is_leaf(module):
        after.append(module.register_full_backward_hook(backward_end))
    else:
        after += [weight.register_post_accumulate_grad_hook(take) for weight in weights]
    return before + after


def _drop(weight: Any) -> None:
    """Drop a weight. Autograd keeps what it has saved of it, mostly views."""
    weight.data, weight.ds_status = weight.new_empty(0), _NOT_AVAILABLE


def _restore(weight: Any) -> None:
    weight.data = weight.new_empty(weight.ds_shape)
    del weight.ds_id, weight.ds_shape, weight.ds_status


@contextmanager
def sharded(model: nn.Module, sharding: Sharding, send: Send, gradients: bool = False) -> Iterator[Callable[[], None]]:
    """Shard a model's weights and gradients within this block.

    Args:
        model: a model of fake tensors.
        sharding: sharding of the model.
        send: called with the bytes that are sent.
        gradients: whether gradients of the weights are computed. They are dropped at the end of the block.

    Yields:
        A function to call after a backward pass, which reduces the gradients that still wait in a bucket.
    """
    reducer = Gradients(model, sharding, send) if gradients and sharding.stage in (1, 2, 3) else None
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        # regathering() compares the addresses of a weight and its view; those of all fake tensors are equal
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        if gradients:
            stack.callback(model.zero_grad, set_to_none=True)
        if sharding.fsdp2:
            stack.enter_context(sharded_fully(find_model(model), sharding, send, gradients))
        elif sharding.stage == 3:
            stack.enter_context(gathering(model, sharding, send, reducer))
        # without overlap, stage 1 leaves all gradients where they are until the backward pass has ended
        elif reducer is not None and (sharding.stage == 2 or sharding.overlap):
            for weight in model.parameters():
                stack.callback(weight.register_post_accumulate_grad_hook(reducer.take).remove)
        yield (lambda: None) if reducer is None else reducer.reduce
