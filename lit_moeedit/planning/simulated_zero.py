"""What DeepSpeed does to weights and gradients during a pass, done to a model without numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Send = Callable[[int], None]
"""Called with the bytes that a rank sends."""


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and the optimizer's state are spread over the ranks.

    Attributes:
        ranks: number of processes.
        stage: of DeepSpeed ZeRO; ``None`` without DeepSpeed.
        itemsize: bytes of a number that the model computes with.
        sub_group: numbers that a rank's optimizer updates at once (``sub_group_size``).
        bucket: numbers whose gradients are averaged at once (``reduce_bucket_size``).
        overlap: whether gradients are averaged beside the backward pass (``overlap_comm``).
        on_cpu: whether the model is in main memory and the ranks talk through gloo.
    """

    ranks: int = 1
    stage: int | None = None
    itemsize: int = 4
    sub_group: int = 10**12
    bucket: int = 200_000_000
    overlap: bool = True
    on_cpu: bool = False

    @property
    def has_master(self) -> bool:
        """Whether the optimizer has a float32 copy of the weights; stages 1 to 3 have one of float32 weights, too."""
        return self.stage in (1, 2, 3) or (self.stage == 0 and self.itemsize < 4)

    @property
    def shards(self) -> int:
        """Parts that the optimizer's state is split into."""
        return self.ranks if self.stage in (1, 2, 3) else 1

    def part(self, size: int) -> int:
        """What each rank sends in an all-gather or a reduce-scatter of ``size`` bytes, or hands on in a broadcast."""
        return size * (self.ranks - 1) // self.ranks


def is_leaf(module: nn.Module) -> bool:
    """Whether DeepSpeed gathers the weights of a module and of all modules in it together."""
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

    return f"{type(module).__module__}.{type(module).__name__}" in DEFAULT_LEAF_MODULE_CLASSES


def gathered_together(model: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules that ZeRO stage 3 gathers the weights of, each with these weights."""
    found, inside = [], set[nn.Module]()
    for module in model.modules():
        if module in inside:
            continue
        whole = is_leaf(module)
        weights = list(module.parameters(recurse=whole))
        # gated delta nets take the weights of their convolutions and do not call these; DeepSpeed finds out
        used = module.modules() if whole else [child for child in module.children() if isinstance(child, nn.Conv1d)]
        inside |= set(used)
        weights += [] if whole else [weight for child in used for weight in child.parameters()]
        if weights:
            found.append((module, weights))
    return found


class Gradients:
    """The way of gradients from the backward pass to their owners.

    A gradient that fits is moved to a bucket, which is reduced when it is full; a larger one is reduced by itself
    (``reduce_independent_p_g_buckets_and_remove_grads`` of DeepSpeed's optimizers).
    """

    def __init__(self, model: nn.Module, sharding: Sharding, send: Send) -> None:
        self.sharding, self.send = sharding, send
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self._waiting = 0
        self._large: list[Tensor] = []
        self._kept: list[Tensor] = []

    def take(self, weight: nn.Parameter) -> None:
        """Take over the gradient of a weight."""
        gradient = weight.grad
        if gradient is None:
            gradient = torch.zeros_like(weight)  # of a leaf module's weight that had no part in the pass
        numbers = gradient.numel()
        if self._waiting and self._waiting + numbers > self.sharding.bucket:
            self.reduce()
        if self.sharding.stage != 3 and not self._kept:
            buckets = 2 if self.sharding.overlap else 1  # stage 3 keeps its one from step to step
            self._kept += [gradient.new_empty(self.sharding.bucket) for _ in range(buckets)]
        if numbers > self.sharding.bucket:
            self._large.append(gradient)
        self._waiting += numbers
        weight.grad = None

    def reduce(self) -> None:
        """Average what waits over the ranks; the owners keep it."""
        if not self._waiting:
            return
        size, ranks = self._waiting * self.sharding.itemsize, self.sharding.ranks
        copies = []
        if self.sharding.stage == 3:
            if not self._large:  # a single gradient is reduced where it is
                copies.append(torch.empty(size, dtype=torch.uint8))
            if self.sharding.on_cpu:  # gloo reduces a copy
                copies.append(torch.empty(size, dtype=torch.uint8))
            self.send(self.sharding.part(size))
        else:
            if len(self._kept) < 3:
                owned = -(-self.parameters // ranks) * self.sharding.itemsize
                self._kept.append(torch.empty(owned, dtype=torch.uint8))
            # an all-reduce, of which an owner takes its part
            self.send(2 * self.sharding.part(size))
        copies.clear()
        self._large.clear()
        self._waiting = 0


class Gathering:
    """ZeRO stage 3: a module's weights are gathered before it runs, forward and backward, and dropped behind it.

    That is what happens in a run: DeepSpeed can also keep weights for the backward pass and gather the next ones in
    advance, but only while module after module runs in the order of the last step.
    """

    def __init__(self, model: nn.Module, sharding: Sharding, send: Send, gradients: Gradients | None) -> None:
        self.sharding, self.send, self.gradients = sharding, send, gradients
        self._weights: list[Any] = list(model.parameters())
        self._handles: list[Any] = []
        for number, weight in enumerate(self._weights):
            # as DeepSpeed marks them
            weight.ds_id, weight.ds_shape = number, weight.shape
            self._drop(weight)
        for module, weights in gathered_together(model):
            self._watch(module, weights, is_leaf(module))

    def _watch(self, module: nn.Module, weights: list[Any], together: bool) -> None:
        def gather(*_: Any) -> None:
            missing = [weight for weight in weights if weight.ds_status is not _AVAILABLE]
            numbers = sum(weight.ds_shape.numel() for weight in missing)
            # an all-gather of several weights goes through one buffer
            buffer = missing[0].new_empty(numbers) if len(missing) > 1 else None
            for weight in missing:
                weight.data, weight.ds_status = weight.new_empty(weight.ds_shape), _AVAILABLE
            del buffer
            self.send(self.sharding.part(numbers * self.sharding.itemsize))

        def drop(*_: Any) -> None:
            for weight in weights:
                self._drop(weight)

        def backward_end(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if self.gradients is None:
                # like this hook, DeepSpeed sees only inputs without a name; behind a module that has none of these it
                # lets go of the weights with the next forward
                if any(isinstance(gradient, Tensor) for gradient in inputs):
                    drop()
            elif together:
                for weight in weights:
                    self._take(weight)

        self._handles += [
            module.register_forward_pre_hook(gather),
            module.register_forward_hook(drop),
            module.register_full_backward_pre_hook(gather),
            module.register_full_backward_hook(backward_end),
        ]
        if self.gradients is not None and not together:
            self._handles += [weight.register_post_accumulate_grad_hook(self._take) for weight in weights]

    def _take(self, weight: Any) -> None:
        assert self.gradients is not None
        self.gradients.take(weight)
        self._drop(weight)

    @staticmethod
    def _drop(weight: Any) -> None:
        """Let go of a weight; what autograd has saved of it, views above all, it keeps."""
        weight.data, weight.ds_status = weight.new_empty(0), _NOT_AVAILABLE

    def close(self) -> None:
        """Take the hooks off and give the weights their shapes back."""
        for handle in self._handles:
            handle.remove()
        for weight in self._weights:
            weight.data = weight.new_empty(weight.ds_shape)
            del weight.ds_id, weight.ds_shape, weight.ds_status


_AVAILABLE, _NOT_AVAILABLE = SimpleNamespace(name="AVAILABLE"), SimpleNamespace(name="NOT_AVAILABLE")


@contextmanager
def sharded(model: nn.Module, sharding: Sharding, send: Send, gradients: bool = False) -> Iterator[Callable[[], None]]:
    """A block in which a model's weights and gradients are where ``sharding`` has them.

    Args:
        model: a model without numbers.
        sharding: how it is sharded.
        send: called with the bytes that are sent.
        gradients: whether gradients of the weights are wanted; they are gone behind the block.

    Returns:
        a function to call after a backward pass, for the gradients that still wait to be averaged.
    """
    reducer = Gradients(model, sharding, send) if gradients and sharding.stage in (1, 2, 3) else None
    gathering, handles = None, []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        # regathering() compares where tensors are; those without numbers are all in one place, as it would find them
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        if sharding.stage == 3:
            gathering = Gathering(model, sharding, send, reducer)
        # without overlap, stage 1 leaves all gradients where they are until the backward pass has ended
        elif reducer is not None and (sharding.stage == 2 or sharding.overlap):
            handles = [weight.register_post_accumulate_grad_hook(reducer.take) for weight in model.parameters()]
        try:
            yield (lambda: None) if reducer is None else reducer.reduce
        finally:
            for handle in handles:
                handle.remove()
            if gathering is not None:
                gathering.close()
            if gradients:
                model.zero_grad(set_to_none=True)
