"""What keeps an edit from changing what an expert does elsewhere: one matrix per expert that an edit touches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.solvers.deltas import group_positions

Preserve = Literal["output", "covariance", "nullspace", "none"]

BLOCK = 2**22
"""Numbers of second moments that are decomposed at a time: what is needed besides the result does not grow with E."""

EIGH_ON_CPU = 512
"""Eigenvectors of matrices up to this size are computed on the CPU, wherever the model is.

On a GPU torch solves a batch of matrices larger than 32 one by one, up to 512 by Jacobi's method (pytorch pull request
53040): 500 matrices of size 100 took 0.9 s there (pytorch issue 174674), about what one CPU core needs.
"""


def check_preserve(preserve: str, threshold: float, strength: float) -> None:
    """Raise ``ValueError`` if the settings of :meth:`Shaping.of` make no sense."""
    if preserve not in get_args(Preserve):
        raise ValueError(f"preserve must be one of {', '.join(get_args(Preserve))}, got {preserve!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")


@dataclass(frozen=True)
class Shaping:
    r"""Matrices ``S_j`` that shape keys into features, ``φ = g S_j k``, and deltas into what is applied, ``ΔŴ_j S_j``.

    Attributes:
        experts: ``[n]`` int64, ascending: the experts that have a matrix.
        matrices: ``[n, d_hidden, d_hidden]``, dtype of the second moments.
        energy_kept: ``[n]``, the share of the preserved text's energy ``tr C_j`` that lies where a delta cannot reach,
            ``1 − tr(S_j C_j S_jᵀ) / tr C_j``; 1 for an expert that saw no text.
    """

    experts: Tensor
    matrices: Tensor
    energy_kept: Tensor

    @classmethod
    @full_precision()
    def of(
        cls,
        moments: SecondMoments,
        experts: Tensor,
        preserve: Preserve,
        threshold: float = 0.02,
        strength: float = 1000.0,
        symmetric: bool = False,
    ) -> Shaping:
        r"""The matrices of some experts of a layer.

        - ``nullspace`` (AlphaEdit 2410.02355, per expert in MoEEdit 2602.10965): the projector ``P_j`` onto the
          eigenvectors of ``C_j`` with eigenvalue ``≤ τ``. What lies in the others does not change at all.
        - ``covariance`` (MEMIT 2210.07229, here per expert inside the joint problem): the penalty becomes
          ``λ tr(ΔW_j (I + β C_j) ΔW_jᵀ)``, and with ``S_jᵀ S_j = (I + β C_j)^{-1}`` the substitution
          ``ΔW_j = ΔŴ_j S_j`` brings it back to a ridge. A direction changes the less, the more the preserved text uses
          it. Of all such roots the solution is the same, as long as the solver treats no coordinate of an expert
          specially; the inverse of the Cholesky factor is the cheapest.
        - ``output`` (ours): the penalty is ``λ ‖ΔW_j‖² + μ tr(ΔW_j C_j ΔW_jᵀ)`` with the *gated* second moment
          ``C_j = mean g² k kᵀ`` over all tokens. Summed over the experts, the second term is the mean square by which
          the layer's output moves on the preserved text (but for products between experts): an expert that few tokens
          go to, or with small gates, is freer to change. Both terms of the objective are squared distances of outputs
          then, so ``μ`` has no unit: it counts how many edits the text weighs. The form is that of ``covariance`` with
          ``β = μ / λ``. (An ``Editor`` sets ``μ = strength · E · d_hidden``.)

        Args:
            moments: of the layer.
            experts: ``[n]`` int64, ascending. The matrices are on its device.
            preserve: ``output``, ``covariance`` or ``nullspace``.
            threshold: ``τ``, in units of squared activations.
            strength: ``β``, in units of one over squared activations; ``μ / λ`` for ``output``.
            symmetric: whether to take the symmetric root, ``(I + β C_j)^{-1/2}``, whose coordinates are those of the
                keys; only a solver that shares factors between experts needs it.

        Raises:
            ValueError: if the settings make no sense.

        Example:
            >>> three = torch.tensor([3])
            >>> moments = SecondMoments(torch.diag(torch.tensor([3.0, 0.0]))[None], count=three, tokens=three)
            >>> Shaping.of(moments, torch.tensor([0]), "nullspace").matrices[0]
            tensor([[0., 0.],
                    [0., 1.]])
        """
        check_preserve(preserve, threshold, strength)
        if preserve == "none":
            raise ValueError("with preserve='none' there is nothing to shape")
        if moments.gated != (preserve == "output"):
            raise ValueError(f"preserve={preserve!r} needs second moments with gated={not moments.gated}")
        d_hidden = moments.total.shape[-1]
        matrices = moments.total.new_empty(len(experts), d_hidden, d_hidden, device=experts.device)
        reached, trace = torch.zeros(2, len(experts), dtype=torch.float64, device=experts.device)
        for rows in torch.arange(len(experts), device=experts.device).split(max(1, BLOCK // d_hidden**2)):
            moment = moments.mean(experts[rows])
            trace[rows] = moment.diagonal(dim1=1, dim2=2).sum(1).to(trace)
            if preserve == "nullspace":
                root, energy = _by_eigenvectors(moment, experts.device, lambda values: (values <= threshold).to(values))
            elif symmetric:
                root, energy = _symmetric_root(moment, experts.device, strength)
            else:
                root, energy = _triangular_root(moment.to(experts.device), strength)
            matrices[rows], reached[rows] = root, energy.to(reached)
        kept = torch.where(trace > 0, 1 - reached / trace.where(trace > 0, 1), 1).clamp(0, 1)
        return cls(experts, matrices, kept)

    def features(self, keys: Tensor, expert_index: Tensor) -> Tensor:
        """``S_j x`` for every row ``x`` of ``keys [N, d_hidden]``, with ``j`` from ``expert_index [N]``."""
        return self._rows(keys, expert_index, self.matrices.mT)

    def applied(self, right: Tensor, expert_index: Tensor) -> Tensor:
        """``S_jᵀ y`` for every row ``y`` of ``right [N, d_hidden]``: right factors of what is applied."""
        return self._rows(right, expert_index, self.matrices)

    @full_precision()
    def _rows(self, rows: Tensor, expert_index: Tensor, matrices: Tensor) -> Tensor:
        place = {expert: i for i, expert in enumerate(self.experts.tolist())}
        groups = list(group_positions(expert_index))
        # sorted once, so that an expert is a slice and one product: all that a GPU has to start for it
        order = torch.cat([expert_index[:0], *(positions for _, positions in groups)])
        given = rows[order]
        shaped, sizes = torch.empty_like(given), [len(positions) for _, positions in groups]
        for (expert, _), own, result in zip(groups, given.split(sizes), shaped.split(sizes), strict=True):
            torch.mm(own, matrices[place[expert]].to(rows), out=result)
        given[order] = shaped
        return given


def _by_eigenvectors(moment: Tensor, device: torch.device, scale: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """``V diag(s(λ)) Vᵀ`` and ``Σ s(λ)² λ`` for eigenvectors and eigenvalues of ``C_j [n, d_hidden, d_hidden]``."""
    values, vectors = torch.linalg.eigh(moment.to("cpu" if moment.shape[1] <= EIGH_ON_CPU else device))
    scales = scale(values)
    vectors *= scales.sqrt()[:, None, :]
    return (vectors @ vectors.mT).to(device), (scales**2 * values).sum(1)


def _symmetric_root(moment: Tensor, device: torch.device, strength: float) -> tuple[Tensor, Tensor]:
    return _by_eigenvectors(moment, device, lambda values: (1 + strength * values.clamp_min(0)).rsqrt())


def _triangular_root(moment: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The inverse of the Cholesky factor of ``I + β C_j``, and the energy ``tr(S_j C_j S_jᵀ)``.

    In float64: the condition numbers of ``I + β C_j`` leave float32 two or three digits, and what this costs is still
    less than eigenvectors in float32.
    """
    identity = torch.eye(moment.shape[1], dtype=torch.float64, device=moment.device)
    factor, failed = torch.linalg.cholesky_ex(identity + strength * moment.double())
    root = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    # S (I + β C) Sᵀ = I, so that β S C Sᵀ = I − S Sᵀ
    squares = root.square().sum((1, 2))
    energy = (len(identity) - squares) / strength if strength else moment.diagonal(dim1=1, dim2=2).sum(1).double()
    if bool(failed.any()):  # sums in float32 may have eigenvalues that are below zero by more than 1 / β
        rows = failed.nonzero().squeeze(-1)
        symmetric, lost = _symmetric_root(moment[rows], moment.device, strength)
        root[rows], energy[rows] = symmetric.double(), lost.to(energy)
    return root.to(moment.dtype), energy
