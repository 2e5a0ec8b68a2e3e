"""Checks and norms of the weights that a commit changes, taken without waiting for their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Checks:
    """Findings, block by block, that stay where they are computed until :meth:`verify` or :meth:`squares` is called.

    To ask a GPU for a number is to wait until it has done all that it was given.

    Args:
        dtype: of the weights that the model computes with.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._changed: list[int] = []
        self._extremes: list[Tensor] = []
        self._compared: list[int] = []
        self._equal: list[Tensor] = []
        self._norms: list[Tensor] = []

    def measure(self, delta: Tensor, before: Tensor) -> None:
        """Note what is added, and what it is added to."""
        self._norms += [torch.linalg.vector_norm(numbers, dtype=torch.float64) for numbers in (delta, before)]

    def change(self, experts: Sequence[int], after: Tensor) -> None:
        """Note what must be finite: new weights ``[n, k]`` of ``n`` experts, or of a run of one."""
        self._changed += experts
        # NaN is the least and the greatest of what it is among, and no tensor of the weights' size is made
        self._extremes += [after.amin(1), after.amax(1)]

    def compare(self, experts: Sequence[int], master: Tensor, working: Tensor) -> None:
        """Note what must be equal: weights ``[n, k]`` of ``n`` experts, as the optimizer and the model hold them."""
        self._compared += experts
        self._equal.append((master == working).view(torch.uint8).amin(1))

    def verify(self) -> None:
        """Look at what was noted.

        Raises:
            FloatingPointError: naming the first expert whose new weights are not finite.
            RuntimeError: naming the first expert of which the two copies differ.
        """
        if self._changed:
            least, greatest = torch.cat(self._extremes[::2]), torch.cat(self._extremes[1::2])
            expert = _first(self._changed, (least.isfinite() & greatest.isfinite()).tolist())
            if expert is not None:
                raise FloatingPointError(f"the changed weights of expert {expert} are not finite in {self._dtype}")
        if self._compared:
            expert = _first(self._compared, torch.cat(self._equal).tolist())
            if expert is not None:
                raise RuntimeError(
                    f"the optimizer's master copy of expert {expert} is not that of the weights; "
                    "give the optimizers that train them now"
                )

    def squares(self, device: torch.device) -> Tensor:
        """Squared norms ``[2]`` of all that was added, and of what it was added to, float64."""
        if not self._norms:
            return torch.zeros(2, dtype=torch.float64, device=device)
        return torch.stack(self._norms).to(device).square().view(-1, 2).sum(0)


def _first(experts: Sequence[int], fine: Sequence[int | bool]) -> int | None:
    return next((expert for expert, is_fine in zip(experts, fine, strict=True) if not is_fine), None)
