"""Checks and norms of the weights that a commit changes, computed without waiting for their device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Checks:
    """Results of checks, block by block, that stay on their device until :meth:`verify` or :meth:`squares` is called.

    Reading a value from a GPU waits until all queued work is done.

    Args:
        dtype: dtype of the model weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._extremes: list[tuple[Sequence[int], Tensor]] = []
        self._equal: list[tuple[Sequence[int], Tensor]] = []
        self._norms: list[Tensor] = []

    def measure(self, delta: Tensor, before: Tensor) -> None:
        """Take the norms of a change and of the weights that it is added to."""
        self._norms += [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in (delta, before)]

    def change(self, experts: Sequence[int], after: Tensor) -> None:
        """Check that new weights ``[n, k]`` of ``n`` experts, or of a range of one, are finite."""
        # the minimum and the maximum of anything with NaN are NaN; no tensor of the weights' size is allocated
        self._extremes += [(experts, after.amin(1)), (experts, after.amax(1))]

    def compare(self, experts: Sequence[int], master: Tensor, model: Tensor) -> None:
        """Check that master weights and model weights ``[n, k]`` of ``n`` experts are equal."""
        self._equal.append((experts, (master == model).view(torch.uint8).amin(1)))

    def verify(self) -> None:
        """Read the results of the checks.

        Raises:
            FloatingPointError: naming the first expert whose new weights are not finite.
            RuntimeError: naming the first expert whose master weights are not the model weights.
        """
        expert = _first_failed(self._extremes, torch.isfinite)
        if expert is not None:
            raise FloatingPointError(f"the changed weights of expert {expert} are not finite in {self._dtype}")
        expert = _first_failed(self._equal, torch.Tensor.bool)
        if expert is not None:
            raise RuntimeError(
                f"the optimizer's master weights of expert {expert} are not those of the model; "
                "give the optimizers that train them now"
            )

    def squares(self, device: torch.device) -> Tensor:
        """Return the squared norms ``[2]`` of all changes, and of the weights that they were added to, float64."""
        if not self._norms:
            return torch.zeros(2, dtype=torch.float64, device=device)
        return torch.stack(self._norms).to(device).square().view(-1, 2).sum(0)


def _first_failed(checks: Sequence[tuple[Sequence[int], Tensor]], passes: Callable[[Tensor], Tensor]) -> int | None:
    """Return the first expert whose value does not pass. Each check has experts and a value for each of them."""
    if not checks:
        return None
    experts = [expert for several, _ in checks for expert in several]
    passed = passes(torch.cat([values for _, values in checks])).tolist()
    return min((expert for expert, has_passed in zip(experts, passed, strict=True) if not has_passed), default=None)
