"""What keeps an edit from changing what an expert does elsewhere: one symmetric matrix per expert."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Preserve = Literal["nullspace", "covariance", "none"]


def check_preserve(preserve: str, threshold: float, strength: float) -> None:
    """Raise ``ValueError`` if the settings of :func:`shaping_matrices` make no sense."""
    if preserve not in get_args(Preserve):
        raise ValueError(f"preserve must be one of {', '.join(get_args(Preserve))}, got {preserve!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")


def shaping_matrices(
    second_moment: Tensor, preserve: Preserve, threshold: float = 0.02, strength: float = 1000.0
) -> Tensor:
    r"""Matrices ``S_j`` that shape keys into features, ``φ = g S_j k``, and deltas into what is applied, ``ΔŴ_j S_j``.

    - ``nullspace`` (AlphaEdit 2410.02355, per expert in MoEEdit 2602.10965): the projector ``P_j`` onto the
      eigenvectors of ``C_j`` with eigenvalue ``≤ τ``. What lies in the others does not change at all.
    - ``covariance`` (MEMIT 2210.07229, here per expert inside the joint problem): the penalty becomes
      ``λ tr(ΔW_j (I + β C_j) ΔW_jᵀ)``, and with ``M_j = (I + β C_j)^{-1/2}`` the substitution ``ΔW_j = ΔŴ_j M_j``
      brings it back to a ridge. A direction changes the less, the more the preserved text uses it.
    - ``none``: the identity.

    Args:
        second_moment: ``C_j`` of ``n`` experts, ``[n, d_hidden, d_hidden]``, symmetric, positive semi-definite.
        preserve: which form.
        threshold: ``τ``, in units of squared activations.
        strength: ``β``, in units of one over squared activations.

    Returns:
        ``[n, d_hidden, d_hidden]``, symmetric, dtype of ``second_moment``.

    Raises:
        ValueError: if the settings make no sense or ``second_moment`` is not square.

    Example:
        >>> shaping_matrices(torch.diag(torch.tensor([1.0, 0.0]))[None], "nullspace")[0]
        tensor([[0., 0.],
                [0., 1.]])
    """
    check_preserve(preserve, threshold, strength)
    if second_moment.ndim != 3 or second_moment.shape[1] != second_moment.shape[2]:
        raise ValueError(f"second_moment must be [n, d_hidden, d_hidden], got {list(second_moment.shape)}")
    if preserve == "none":
        return torch.eye(second_moment.shape[1]).to(second_moment).expand_as(second_moment)
    values, vectors = torch.linalg.eigh(second_moment)
    if preserve == "nullspace":
        scale = (values <= threshold).to(values)
    else:
        scale = (1 + strength * values.clamp_min(0)).rsqrt()
    return (vectors * scale[:, None, :]) @ vectors.mT


def shape_rows(rows: Tensor, expert_index: Tensor, experts: Tensor, matrices: Tensor) -> Tensor:
    """``S_j x`` for every row ``x`` of ``rows [N, d_hidden]`` with expert ``expert_index [N]``.

    ``matrices[i]`` belongs to ``experts[i]``; ``experts`` is ascending and holds every value of ``expert_index``.
    """
    shaped = torch.empty_like(rows)
    for matrix, expert in zip(matrices, experts, strict=True):
        pairs = expert_index == expert
        shaped[pairs] = rows[pairs] @ matrix.to(rows)
    return shaped
