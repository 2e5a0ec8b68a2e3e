"""MoTE: the change of all experts of a layer as one tensor in Tucker form, along the directions of the experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_moeedit.atomic_files import read_tensors, write_tensors
from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky
from lit_moeedit.solvers.woodbury import Woodbury

FLOOR = 1e-3
"""A direction with less than this share of the mean energy per direction is whitened as if it had that much."""


class Weights(Protocol):
    """The experts ``[E, d_model, d_hidden]``: a tensor, or anything that gives blocks of them as one does."""

    @property
    def shape(self) -> Sequence[int]:
        """``(E, d_model, d_hidden)``."""
        ...

    def __getitem__(self, block: Any) -> Tensor:
        """``[j]``, one expert ``[d_model, d_hidden]``; ``[:, first:last]``, output rows of all ``[E, n, d_hidden]``."""
        ...


@dataclass(frozen=True)
class TuckerFactors:
    r"""Bases ``U_e``, ``U_out`` and ``U_in`` of the three modes of a layer's experts (MoTE, arXiv 2605.16686).

    Args:
        expert: ``[E, r_e]``, orthonormal columns.
        output: ``[d_model, r_out]``, orthonormal columns.
        input: ``[d_hidden, r_in]``; orthonormal columns, in the metric ``C`` of the whitening if there was one:
            ``U_inᵀ C U_in = I``.
        energy: share of the (whitened) weights' squared norm that each of the three bases keeps.

    Example:
        >>> factors = TuckerFactors.hosvd(torch.ones(4, 3, 2), energy=0.9)
        >>> factors.ranks, factors.expert[:, 0]
        ((1, 1, 1), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """

    expert: Tensor
    output: Tensor
    input: Tensor
    energy: tuple[float, float, float]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """``(r_e, r_out, r_in)``."""
        return self.expert.shape[1], self.output.shape[1], self.input.shape[1]

    @classmethod
    @full_precision()
    def hosvd(
        cls,
        weights: Weights,
        second_moment: Tensor | None = None,
        ranks: Sequence[int] | None = None,
        energy: float = 0.99,
    ) -> TuckerFactors:
        r"""Leading left singular vectors of the three unfoldings of the experts, by their Gram matrices.

        With a second moment ``C`` the input mode is whitened: the tensor is that of ``W_j C^{1/2}``, whose norm is the
        output that keys of such a second moment cause, and ``U_in`` is taken back to the keys by ``C^{-1/2}``. Then
        truncation keeps what matters for those keys, and the norm of a core is ``\sum_j tr(ΔW_j C ΔW_jᵀ)``.

        The weights are read twice, in blocks of one expert and in blocks of rows of all experts, none of them larger
        than one expert (or one row of all); no unfolding is made. Memory ``O(E² + d_model² + d_hidden²)``.

        Args:
            weights: the experts, ``[E, d_model, d_hidden]``.
            second_moment: ``C``, ``[d_hidden, d_hidden]``, symmetric, positive semi-definite.
            ranks: ``(r_e, r_out, r_in)``; ``None`` to go by ``energy``.
            energy: keep the fewest directions of each mode that hold this share of the squared norm.

        Raises:
            ValueError: if the ranks do not fit, the energy is not in (0, 1], or a weight is not finite.
        """
        check_size(ranks, energy)
        experts, d_model, d_hidden = weights.shape
        if ranks is not None and any(r > n for r, n in zip(ranks, weights.shape, strict=True)):
            raise ValueError(f"ranks must be at most {tuple(weights.shape)}, got {tuple(ranks)}")
        root = inverse = None
        if second_moment is not None:
            root, inverse = whitening_roots(second_moment)

        def whitened(block: Tensor) -> Tensor:
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            return block if root is None else block @ root.to(block)

        first = whitened(weights[0])
        grams = [first.new_zeros(n, n) for n in (experts, d_model, d_hidden)]
        for expert in range(experts):
            block = first if expert == 0 else whitened(weights[expert])
            grams[1].addmm_(block, block.T)
            grams[2].addmm_(block.T, block)
        rows = max(1, d_model // experts)
        for start in range(0, d_model, rows):
            block = whitened(weights[:, start : start + rows]).flatten(1)
            grams[0].addmm_(block, block.T)
        if not all(bool(torch.isfinite(gram).all()) for gram in grams):
            raise ValueError("the experts' weights are not finite, or too large to be squared")
        bases, shares = zip(
            *(_leading(g, r, energy) for g, r in zip(grams, ranks or (None,) * 3, strict=True)), strict=True
        )
        expert_basis, output, inner = bases
        return cls(expert_basis, output, inner if inverse is None else inverse.to(inner) @ inner, shares)

    def save(self, path: str | Path, key: str = "") -> None:
        """Write the factors as safetensors, under a key that says what they were made of; complete or not at all."""
        tensors = {name: getattr(self, name) for name in _FIELDS} | {"energy": torch.tensor(self.energy)}
        write_tensors(path, tensors, {"format": _FORMAT, "key": key})

    @classmethod
    def load(cls, path: str | Path, key: str | None = None) -> TuckerFactors:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not one of factors, or they were saved under another key than the one given.
        """
        tensors, metadata = read_tensors(path, (*_FIELDS, "energy"), _FORMAT, "Tucker factors")
        if key is not None and metadata.get("key") != key:
            raise ValueError(f"{path} holds Tucker factors of other weights or settings")
        energies = tensors.pop("energy")
        if energies.shape != (3,) or not all(
            basis.ndim == 2 and basis.is_floating_point() for basis in tensors.values()
        ):
            raise ValueError(f"{path} holds no matrices of Tucker factors")
        expert, output, inner = energies.tolist()
        return cls(**tensors, energy=(expert, output, inner))


_FIELDS = ("expert", "output", "input")
_FORMAT = "lit_moeedit.tucker.1"


def check_size(ranks: Sequence[int] | None, energy: float) -> None:
    """Raise ``ValueError`` if these are not three ranks, or not a share."""
    if ranks is not None and (len(ranks) != 3 or min(ranks) < 1):
        raise ValueError(f"ranks must be three numbers of at least 1 (experts, output, input), got {ranks}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")


def whitening_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric ``C^{1/2}`` and ``C^{-1/2}`` in float64; small eigenvalues are raised to the floor."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(max(FLOOR * float(values.mean()), torch.finfo(torch.float32).tiny))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _leading(gram: Tensor, rank: int | None, energy: float) -> tuple[Tensor, float]:
    """Leading eigenvectors ``[n, r]`` of a Gram matrix, and the share of its trace that they hold.

    A direction and its opposite are as good; that with its largest number positive is taken, so that a core means the
    same in every run.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    shares = values.flip(0).clamp_min(0).cumsum(0)
    shares = shares / shares[-1].clamp_min(torch.finfo(torch.float64).tiny)
    if rank is None:
        # rounding must not ask for more directions than there are
        rank = min(int((shares < energy - 1e-12).sum()) + 1, len(shares))
    basis = vectors.flip(1)[:, :rank]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return (basis * signs).to(gram.dtype).contiguous(), min(1.0, float(shares[rank - 1]))


@dataclass(frozen=True)
class TuckerCore:
    """The core ``G = Σ_i left_i ⊗ right_i`` of a change in Tucker form, in ``K ≤ min(T, r_out)`` terms.

    Args:
        left: ``[K, r_out]``.
        right: ``[K, r_e, r_in]``.
    """

    left: Tensor
    right: Tensor

    @full_precision()
    def deltas(self, factors: TuckerFactors, scale: float = 1.0) -> ExpertDeltas:
        """``scale · G ×₁ U_e ×₂ U_out ×₃ U_in``: ``K`` terms for each expert, with left factors common to all.

        Args:
            factors: of any layer, with the ranks of the core.
            scale: of the change.
        """
        experts, terms = len(factors.expert), len(self.left)
        right = torch.einsum("je,kei->jki", factors.expert.to(self.right), self.right)
        device = self.left.device
        return ExpertDeltas(
            torch.arange(experts, device=device).repeat_interleave(terms),
            torch.arange(terms, device=device).repeat(experts),
            scale * self.left @ factors.output.to(self.left).T,
            (right @ factors.input.to(right).T).flatten(0, 1),
            experts,
        )


class Tucker:
    r"""MoTE (arXiv 2605.16686): the change of a layer is a tensor ``G ×₁ U_e ×₂ U_out ×₃ U_in`` with given factors.

    The factors are those of the pretrained experts, so an edit moves along directions that the experts share. With the
    feature ``ψ_t`` of each edit the core is the ridge regression of its residuals, through one ``T × T`` system:

    .. math:: \psi_t = \sum_j U_e[j, :] \otimes U_{in}^\top \varphi_{tj}, \qquad
              A = (\Psi \Psi^\top + \lambda I)^{-1} R U_{out}, \qquad G = \sum_t a_t \otimes \psi_t

    With orthonormal factors ``‖G‖_F² = Σ_j ‖ΔW_j‖_F²``: it is the minimiser of the problem's own objective among all
    changes of this form, and with whole modes that of :class:`Woodbury`. With a whitened input mode the ridge is
    ``λ Σ_j tr(ΔW_j C ΔW_jᵀ)``: what keys of second moment ``C`` would notice.

    *All* experts change, visited by an edit or not, because the form couples them. What unvisited experts get does
    nothing at the edit tokens; it is not left out, because nobody knows which experts an edit visits at lower layers.

    An editor finds the factors of each layer, and with ``carry`` it collects activations at the highest edited layer
    only; see :func:`lit_moeedit.editing.spread.carried` for what the lower layers then get. Without factors
    (:meth:`with_factors`) the modes are whole.

    Args:
        ranks: ``(r_e, r_out, r_in)`` of the factors; ``None`` to go by ``energy``.
        energy: share of the squared norm that each mode keeps, in (0, 1].
        whiten: whether the input mode is whitened by the second moments. That favours directions that many keys take;
            a null space takes just those out of the keys, and keeps more of an edit if the input mode is plain.
        carry: whether one core, solved at the highest edited layer, serves all layers, as published; otherwise a
            core is solved at each layer, as other solvers do.
        cache: folder to keep the layers' factors in.

    Raises:
        ValueError: if ranks or energy make no sense.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> factors = TuckerFactors.hosvd(torch.ones(3, 2, 4))
        >>> Tucker().with_factors(factors).solve(problem).experts
        [0, 1, 2]
    """

    def __init__(
        self,
        ranks: tuple[int, int, int] | None = None,
        energy: float = 0.99,
        whiten: bool = True,
        carry: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        check_size(ranks, energy)
        self.ranks, self.energy, self.whiten, self.carry = ranks, energy, whiten, carry
        self.cache = None if cache is None else Path(cache)
        self.factors: TuckerFactors | None = None

    def with_factors(self, factors: TuckerFactors) -> Tucker:
        """The same solver for a layer with these factors."""
        other = copy.copy(self)
        other.factors = factors
        return other

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser among all changes with this solver's factors; among all there are, if it has none.

        Raises:
            ValueError: if the factors are of another shape than the problem.
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        if self.factors is None:
            return Woodbury().solve(problem)
        return self.core(problem).deltas(self.factors)

    @full_precision()
    def core(self, problem: EditProblem) -> TuckerCore:
        """The core of the minimiser.

        Raises:
            ValueError: if there are no factors, or of another shape than the problem.
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        factors = self.factors
        if factors is None:
            raise ValueError("a core needs factors: use with_factors()")
        wanted = (problem.num_experts, problem.residuals.shape[1], problem.features.shape[1])
        shape = (len(factors.expert), len(factors.output), len(factors.input))
        if shape != wanted:
            raise ValueError(f"factors of experts {shape} do not fit a problem of experts {wanted}")
        features = problem.features
        expert, output, inner = (u.to(features) for u in (factors.expert, factors.output, factors.input))
        psi = features.new_zeros(problem.num_edits, *(expert.shape[1], inner.shape[1]))
        for j, pairs in problem.experts():
            psi.index_add_(0, problem.edit_index[pairs], expert[j, :, None] * (features[pairs] @ inner)[:, None])
        flat, residuals = psi.flatten(1), problem.residuals @ output
        if not problem.num_edits:
            return TuckerCore(residuals, psi)

        def system(dtype: torch.dtype) -> Tensor:
            matrix = flat.to(dtype) @ flat.to(dtype).T
            matrix.diagonal().add_(problem.ridge)
            return matrix

        factor = cholesky(system, flat.dtype, f"the system of {problem.num_edits} edits at ridge {problem.ridge:g}")
        left = torch.cholesky_solve(residuals.to(factor.dtype), factor).to(residuals.dtype)
        core = TuckerCore(left, psi)
        if len(left) <= left.shape[1]:
            return core
        # more edits than output directions: one term for each of these is less
        return TuckerCore(torch.eye(left.shape[1]).to(left), torch.einsum("to,tei->oei", left, psi))
