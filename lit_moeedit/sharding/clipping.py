"""Clipping of gradients that ranks hold in different ways, which torch does not clip together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks


def clip_over_meshes(optimizer: torch.optim.Optimizer, limit: float | None, algorithm: str | None = None) -> bool:
    """Clip the gradients of an optimizer, if its parameters are sharded over more than one device mesh.

    Args:
        optimizer: the optimizer.
        limit: largest norm of all gradients together, or largest absolute value of an element; ``None`` or 0 for none.
        algorithm: ``"value"``, or anything else for the norm.

    Returns:
        whether that was so; otherwise nothing was done.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # the same on all ranks, unlike which of them have gradients
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not limit or len(meshes) < 2:
        return False
    if algorithm == "value":
        clip_gradient_values(parameters, limit)
    else:
        clip_gradient_norm(parameters, limit)
    return True


@torch.no_grad()
def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks | None = None) -> Tensor:
    """Scale gradients, however they are sharded, so that their norm is at most ``max_norm``.

    Each rank adds up the squares of the elements that it holds, and one number per device is all-reduced.
    ``torch.nn.utils.clip_grad_norm_`` fails under expert parallelism, where experts have another mesh than the rest.

    Args:
        parameters: the parameters, the same on all ranks, after the backward pass.
        max_norm: largest 2-norm of all gradients together.
        ranks: the ranks that train the model. All call this together.

    Returns:
        The norm before the clipping, float32.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradient_norm([weight], 1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    ranks = ranks or Ranks.current()
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [Part.of(gradient) for gradient in gradients]
    # the same on all ranks, of which one may have no gradient
    device = local_part(parameters[0]).device if parameters else torch.device("cpu")
    squares = torch.zeros((), device=device)
    for part in parts:
        if part.is_counted(ranks):
            squares += torch.linalg.vector_norm(part.elements, dtype=torch.float32).square().to(device)
    ranks.all_reduce(squares)
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for gradient in gradients:
        local_part(gradient).mul_(factor.to(gradient.device))
    return norm


@torch.no_grad()
def clip_gradient_values(parameters: Iterable[nn.Parameter], max_value: float) -> None:
    """Clip each element of the gradients, however they are sharded, to ``[-max_value, max_value]``."""
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).clamp_(-max_value, max_value)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
