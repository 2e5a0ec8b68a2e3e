"""Preservation of an expert's behavior on other text, by one matrix per expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lit_moeedit.precision import full_precision
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.solvers.deltas import group_positions
from lit_moeedit.text import first_few

PreservationName = Literal["output", "covariance", "nullspace", "none"]
"""Short names of the preservations with their default settings; ``none`` preserves nothing."""

BLOCK = 2**22
"""Maximum number of elements of second moments that are decomposed at a time, which bounds the memory used."""

EIGH_ON_CPU = 512
"""Maximum size of matrices whose eigenvectors are computed on the CPU, even if the model is on a GPU.

On a GPU torch decomposes matrices larger than 32 one by one, up to 512 by Jacobi's method (pytorch pull request 53040).
500 matrices of size 100 took 0.9 s there (pytorch issue 174674), about as long as on one CPU core.
"""


class Preservation(ABC):
    r"""Turns an expert's second moment ``C_j`` into the matrix ``S_j`` that shapes its keys and its delta.

    Features are ``φ = g S_j k``, and the applied delta is ``ΔŴ_j S_j``. A subclass implements :meth:`root`, and
    overrides other methods where the defaults do not fit.

    Attributes:
        gated: whether second moments are those of gated keys, averaged over all tokens of the text. Otherwise they are
            those of keys, averaged over the tokens that were routed to the expert.

    Example:
        >>> class KeepLargest(Preservation):
        ...     def root(self, moments, penalty, symmetric):
        ...         values, vectors = eigenvectors(moments)
        ...         return (vectors * (values < values[:, -1:] / 2)[:, None]) @ vectors.mT
        >>> KeepLargest().root(torch.diag(torch.tensor([3.0, 1.0]))[None], None, False)[0]
        tensor([[0., 0.],
                [0., 1.]])
    """

    gated: bool = False

    def check(self, ridge: float) -> None:  # noqa: B027 - nothing to check by default
        """Check that the preservation works with the ridge ``λ`` of the edit problem.

        Raises:
            ValueError: if it does not.
        """

    def penalty(self, shape: tuple[int, int, int], ridge: float) -> float | None:
        """Return ``β`` if this is a penalty ``λ tr(ΔW_j (I + β C_j) ΔW_jᵀ)``, so that ``S_jᵀ S_j = (I + β C_j)⁻¹``.

        Args:
            shape: ``(E, d_model, d_hidden)`` of the layer's experts.
            ridge: ``λ``.
        """
        return None

    @abstractmethod
    def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
        """Return the matrices ``S_j [n, d_hidden, d_hidden]``.

        Args:
            moments: ``C_j [n, d_hidden, d_hidden]``, symmetric, positive semi-definite up to rounding.
            penalty: the value of :meth:`penalty` for the layer.
            symmetric: whether the matrices must be symmetric. A solver whose experts share factors needs shaped keys in
                the coordinates of the keys.
        """

    def reached(self, moments: Tensor, root: Tensor, penalty: float | None) -> Tensor:
        """Return the energy ``tr(S_j C_j S_jᵀ) [n]`` that a delta can reach."""
        return ((root @ moments.to(root)) * root).sum((1, 2))

    def free(self, root: Tensor) -> Tensor | None:
        """Return the number of directions ``[n]``, int64, in which a delta is free; ``None`` if none is forbidden."""
        return None


class NullSpace(Preservation):
    """Keeps the output unchanged along the largest directions (AlphaEdit 2410.02355; MoEEdit 2602.10965).

    ``S_j`` is the projector ``P_j`` onto the eigenvectors of ``C_j`` with eigenvalue ``≤ τ``.

    Args:
        threshold: ``τ``, in units of squared activations.
        unused: whether experts that no token of the text was routed to are edited. Nothing is known of what they must
            keep, so that ``P_j`` is the identity; with ``False`` it is 0, as in the code released with MoEEdit.

    Raises:
        ValueError: if the threshold is negative.
    """

    def __init__(self, threshold: float = 0.02, unused: bool = True) -> None:
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self.threshold, self.unused = threshold, unused

    @override
    def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
        values, vectors = eigenvectors(moments)
        vectors = vectors * (values <= self.threshold)[:, None]
        projectors = vectors @ vectors.mT
        if not self.unused:
            projectors *= moments.diagonal(dim1=1, dim2=2).any(1)[:, None, None]
        return projectors

    @override
    def reached(self, moments: Tensor, root: Tensor, penalty: float | None) -> Tensor:
        # tr(P C Pᵀ) = tr(P C), since P is symmetric and idempotent
        return (root * moments).sum((1, 2))

    @override
    def free(self, root: Tensor) -> Tensor:
        return root.diagonal(dim1=1, dim2=2).double().sum(1).round().long()


class CovariancePenalty(Preservation):
    """Penalizes the change of an expert's output on the text routed to it (MEMIT 2210.07229, here in each expert).

    The penalty of the joint problem becomes ``λ tr(ΔW_j (I + β C_j) ΔW_jᵀ)``. With ``S_jᵀ S_j = (I + β C_j)⁻¹`` the
    substitution ``ΔW_j = ΔŴ_j S_j`` turns it into a ridge again. The larger the text's keys are along a direction, the
    less the edit changes it. All such roots give the same solution, as long as the solver treats no coordinate of an
    expert specially; the inverse of the Cholesky factor is the cheapest.

    Args:
        strength: ``β``, in units of one over squared activations.

    Raises:
        ValueError: if the strength is negative.
    """

    def __init__(self, strength: float = 1e4) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be at least 0 and finite, got {strength}")
        self.strength = strength

    @override
    def penalty(self, shape: tuple[int, int, int], ridge: float) -> float | None:
        return self.strength

    @override
    def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
        assert penalty is not None
        return _symmetric_root(moments, penalty) if symmetric else _triangular_root(moments, penalty)

    @override
    def reached(self, moments: Tensor, root: Tensor, penalty: float | None) -> Tensor:
        if not penalty:
            return moments.diagonal(dim1=1, dim2=2).sum(1)
        # S (I + β C) Sᵀ = I, so that β S C Sᵀ = I − S Sᵀ
        return (moments.shape[1] - root.double().square().sum((1, 2))) / penalty


class OutputPenalty(CovariancePenalty):
    r"""Penalizes the change of the layer's output on the text (this project's own; the default).

    The penalty is ``λ ‖ΔW_j‖² + μ tr(ΔW_j C_j ΔW_jᵀ)`` with the *gated* second moment ``C_j = mean g² k kᵀ`` over all
    tokens. Summed over the experts, the second term is the mean square change of the layer's output on the preservation
    text, without the products between experts. So an expert with few tokens or small gates may change more. Both terms
    of the objective are squared distances between outputs, so ``μ`` has no unit; it is the weight of the text relative
    to one edit. The form is that of :class:`CovariancePenalty` with ``β = μ / λ``.

    Args:
        strength: ``μ / (E · d_hidden)``, which has the same scale for all models. ``Σ_j φ_jᵀ C_j⁻¹ φ_j`` is
            ``E · d_hidden`` on average over the text, so if an edit's keys are like those of the text, a layer's output
            changes by ``1 / (1 + strength)`` of the residual. This holds for a single row; with three contexts whose
            keys are nearly the same the share is about ``1 / (1 + strength / 3)``. The larger the strength, the less
            changes elsewhere. In `benchmarks/results/preservation.md` edits begin to fail above 1.

    Raises:
        ValueError: if the strength is negative.
    """

    gated = True

    def __init__(self, strength: float = 0.3) -> None:
        super().__init__(strength)

    @override
    def check(self, ridge: float) -> None:
        if not ridge > 0:
            raise ValueError(f"OutputPenalty needs a ridge above 0, got {ridge}")

    @override
    def penalty(self, shape: tuple[int, int, int], ridge: float) -> float | None:
        experts, _, d_hidden = shape
        return self.strength * experts * d_hidden / ridge


def preservation_of(preserve: Preservation | str) -> Preservation | None:
    """Return a preservation, or the one with a name of :data:`PreservationName`; ``None`` for ``none``.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(preserve, Preservation):
        return preserve
    if preserve not in get_args(PreservationName):
        names = ", ".join(get_args(PreservationName))
        raise ValueError(f"preserve must be a Preservation or one of {names}, got {preserve!r}")
    kinds = {"output": OutputPenalty, "covariance": CovariancePenalty, "nullspace": NullSpace}
    return None if preserve == "none" else kinds[preserve]()


@dataclass(frozen=True)
class Shaping:
    """The matrices ``S_j`` of some experts of a layer.

    Attributes:
        experts: ``[n]`` int64, ascending, the experts that have a matrix.
        matrices: ``[n, d_hidden, d_hidden]``, dtype of the second moments.
        energy_kept: ``[n]``, the share of the preservation text's energy ``tr C_j`` that no delta can reach,
            ``1 − tr(S_j C_j S_jᵀ) / tr C_j``; 1 for an expert without tokens of the text.
        free: ``[n]`` int64, number of directions in which a delta is free, at most ``d_hidden``; ``None`` if the
            preservation forbids none.
    """

    experts: Tensor
    matrices: Tensor
    energy_kept: Tensor
    free: Tensor | None = None

    @classmethod
    @full_precision()
    def of(
        cls,
        moments: SecondMoments,
        experts: Tensor,
        preservation: Preservation,
        penalty: float | None = None,
        symmetric: bool = False,
    ) -> Shaping:
        """Compute the matrices of some experts of a layer.

        Args:
            moments: second moments of the layer.
            experts: ``[n]`` int64, ascending. The matrices are on its device.
            preservation: the preservation that defines the matrices.
            penalty: the value of :meth:`Preservation.penalty` for the layer.
            symmetric: whether the matrices must be symmetric.

        Raises:
            ValueError: if the preservation needs gated second moments and these are not, or the reverse.

        Example:
            >>> three = torch.tensor([3])
            >>> moments = SecondMoments(torch.diag(torch.tensor([3.0, 0.0]))[None], count=three, tokens=three)
            >>> Shaping.of(moments, torch.tensor([0]), NullSpace()).matrices[0]
            tensor([[0., 0.],
                    [0., 1.]])
        """
        if moments.gated != preservation.gated:
            raise ValueError(f"{type(preservation).__name__} needs second moments with gated={preservation.gated}")
        d_hidden = moments.total.shape[-1]
        matrices = moments.total.new_empty(len(experts), d_hidden, d_hidden, device=experts.device)
        reached, trace = torch.zeros(2, len(experts), dtype=torch.float64, device=experts.device)
        size = max(1, BLOCK // d_hidden**2)
        for start in range(0, len(experts), size):
            rows = slice(start, start + size)
            moment = moments.mean(experts[rows]).to(experts.device)
            root = preservation.root(moment, penalty, symmetric)
            if root.shape != moment.shape:
                name = type(preservation).__name__
                raise ValueError(f"{name}.root must return {list(moment.shape)}, got {list(root.shape)}")
            trace[rows] = moment.diagonal(dim1=1, dim2=2).sum(1).to(trace)
            matrices[rows], reached[rows] = root.to(matrices), preservation.reached(moment, root, penalty).to(reached)
        kept = torch.where(trace > 0, 1 - reached / trace.where(trace > 0, 1), 1).clamp(0, 1)
        return cls(experts, matrices, kept, preservation.free(matrices))

    def features(self, keys: Tensor, expert_index: Tensor) -> Tensor:
        """Return ``S_j x`` for every row ``x`` of ``keys [N, d_hidden]``, with ``j`` from ``expert_index [N]``."""
        return self._rows(keys, expert_index, self.matrices.mT)

    def applied(self, right: Tensor, expert_index: Tensor) -> Tensor:
        """Return ``S_jᵀ y`` for every row ``y`` of ``right [N, d_hidden]``, the right factors of the applied delta."""
        return self._rows(right, expert_index, self.matrices)

    @full_precision()
    def _rows(self, rows: Tensor, expert_index: Tensor, matrices: Tensor) -> Tensor:
        place = {expert: i for i, expert in enumerate(self.experts.tolist())}
        groups = list(group_positions(expert_index))
        missing = [expert for expert, _ in groups if expert not in place]
        if missing:
            raise ValueError(f"no edit visits experts {first_few(missing)}: its solver must set changes_all_experts")
        # sorted once, so that each expert is a slice and needs a single launch on a GPU
        order = torch.cat([expert_index[:0], *(positions for _, positions in groups)])
        ordered = rows[order]
        shaped, sizes = torch.empty_like(ordered), [len(positions) for _, positions in groups]
        for (expert, _), own, result in zip(groups, ordered.split(sizes), shaped.split(sizes), strict=True):
            torch.mm(own, matrices[place[expert]].to(rows), out=result)
        ordered[order] = shaped
        return ordered


def eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues ``[n, d]`` and eigenvectors ``[n, d, d]`` of symmetric matrices."""
    found = torch.linalg.eigh(matrices.cpu() if matrices.shape[1] <= EIGH_ON_CPU else matrices)
    return found.eigenvalues.to(matrices.device), found.eigenvectors.to(matrices.device)


def _symmetric_root(moments: Tensor, penalty: float) -> Tensor:
    values, vectors = eigenvectors(moments)
    vectors = vectors * (1 + penalty * values.clamp_min(0)).pow(-0.25)[:, None, :]
    return vectors @ vectors.mT


def _triangular_root(moments: Tensor, penalty: float) -> Tensor:
    """Invert the Cholesky factor of ``I + β C_j`` in float64.

    The condition numbers of ``I + β C_j`` leave float32 two or three digits, and float64 still takes less time than
    eigenvectors in float32.
    """
    identity = torch.eye(moments.shape[1], dtype=torch.float64, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(identity + penalty * moments.double())
    root: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    if bool(failed.any()):  # sums in float32 may have eigenvalues that are below zero by more than 1 / β
        rows = failed.nonzero().squeeze(-1)
        root[rows] = _symmetric_root(moments[rows], penalty).double()
    return root
