"""The interface of a sharding backend: how the ranks of a run hold, gather and release the weights of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from lit_moeedit.sharding.parallelism import Parallelism
from lit_moeedit.sharding.shards import Own, Shard


class Backend:
    """One way in which ranks hold a model.

    The methods of this class do nothing, which is right for whole modules that may be run at any time. A backend
    overrides what is different: :meth:`holds`, by marks that models and parameters keep; :meth:`shard` and :meth:`own`
    for parameters that a rank holds in part; the others for weights that are gathered for a pass and released after it.

    Attributes:
        handles: kinds of parallelism that are refused without the backend.
        is_exclusive: whether a model of this backend has no parameters of other backends. A parameter that the backend
            does not recognise is then not what the optimizer trains, and is refused.
    """

    handles: frozenset[Parallelism] = frozenset()
    is_exclusive: bool = False

    # -- models -------------------------------------------------------------------------------------------------------

    def holds(self, model: nn.Module) -> bool:
        """Tell if this backend holds the model, or a module of it. Nothing is run, read or communicated."""
        return False

    def check(self, model: nn.Module) -> None:
        """Check that a model that this backend holds can be run and edited. Nothing is run or communicated.

        Raises:
            UnsupportedShardingError: naming what cannot.
        """

    def settle(self, model: nn.Module) -> None:
        """Release all weights that are gathered, so that the parameters of the modules are those that are trained.

        It sends nothing, so that single ranks may call it. Not within a forward or backward pass.
        """

    def beside_training(self, model: nn.Module, gradients: bool) -> AbstractContextManager[object]:
        """Have passes within the block leave the training as it is: no gradients of weights, nothing kept gathered.

        Args:
            model: the model. All ranks must enter the block.
            gradients: whether there are backward passes, with respect to tensors other than parameters.
        """
        return nullcontext()

    def forward(self, model: nn.Module) -> AbstractContextManager[object]:
        """Have one forward in the block find all weights that it reads."""
        return nullcontext()

    def entry(self, model: nn.Module, part: nn.Module) -> nn.Module:
        """Return the module to call so that a part of the model is run: the part itself, or the model."""
        return part

    def skipping(self, layer: nn.Module) -> AbstractContextManager[object]:
        """Do not gather the weights of a decoder layer, whose ``forward`` is replaced within the block."""
        return nullcontext()

    # -- parameters ---------------------------------------------------------------------------------------------------

    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        """Return this rank's shard of a parameter; ``None`` for a parameter that is not of this backend.

        Args:
            weight: the parameter.
            optimizers: the optimizers that train it now.

        Raises:
            UnsupportedShardingError: if the parameter is of this backend, and cannot be read and written.
        """
        return None

    def own(self, tensor: Tensor) -> Own | None:
        """Return this rank's model weights of a parameter or buffer; ``None`` for one that is not of this backend.

        Raises:
            UnsupportedShardingError: if they cannot be read.
        """
        return None

    def release(self, weight: nn.Parameter) -> None:
        """Release the gathered copy of a parameter, which no longer equals the shards."""
