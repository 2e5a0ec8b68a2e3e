"""MoTE: the change of all experts of a layer as one tensor in Tucker form, along the directions of the experts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from lit_moeedit.atomic_files import read_tensors, write_tensors
from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import working_dtype
from lit_moeedit.solvers.solver import LayerWeights, Solver, Weights
from lit_moeedit.solvers.woodbury import Woodbury, minimiser

log = logging.getLogger(__name__)

FLOOR = 1e-3
"""A direction with less than this share of the mean energy per direction is whitened as if it had that much."""


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, d_model, d_hidden)`` of the experts."""
        return len(self.expert), len(self.output), len(self.input)

    @classmethod
    @full_precision()
    def hosvd(
        cls,
        weights: Weights,
        second_moment: Tensor | None = None,
        ranks: Sequence[int] | None = None,
        energy: float = 0.99,
    ) -> TuckerFactors:
        r"""Compute the leading left singular vectors of the three unfoldings of the experts, by their Gram matrices.

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
        check_size(ranks, energy, weights.shape)
        experts, d_model, d_hidden = weights.shape
        root, inverse = (None, None) if second_moment is None else whitening_roots(second_moment)

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
        """Write the factors as safetensors under a key for their origin; the file appears complete or not at all."""
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


def check_size(ranks: Sequence[int] | None, energy: float, shape: Sequence[int] | None = None) -> None:
    """Raise ``ValueError`` unless there are three ranks (at most those of a shape) or none, and energy is a share."""
    if ranks is not None and (len(ranks) != 3 or min(ranks) < 1):
        raise ValueError(f"ranks must be three numbers of at least 1 (experts, output, input), got {ranks}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if ranks is not None and shape is not None and any(r > n for r, n in zip(ranks, shape, strict=True)):
        raise ValueError(f"ranks must be at most {tuple(shape)}, got {tuple(ranks)}")


def whitening_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the symmetric ``C^{1/2}`` and ``C^{-1/2}`` in float64, with small eigenvalues raised to the floor."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(max(FLOOR * float(values.mean()), torch.finfo(torch.float32).tiny))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _leading(gram: Tensor, rank: int | None, energy: float) -> tuple[Tensor, float]:
    """Compute the leading eigenvectors ``[n, r]`` of a Gram matrix, and the share of its trace that they hold.

    Of a direction and its opposite, the one with a positive largest element is taken, so that a core means the same in
    every run.
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
        """Return ``scale · G ×₁ U_e ×₂ U_out ×₃ U_in`` in ``K`` terms per expert, with left factors common to all.

        Args:
            factors: factors of any layer, with the ranks of the core.
            scale: scale of the change.
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


class Tucker(Solver):
    r"""Changes a layer by a tensor ``G ×₁ U_e ×₂ U_out ×₃ U_in`` with given factors (MoTE, arXiv 2605.16686).

    The factors are those of the pretrained experts, so an edit moves along directions that the experts share. With the
    feature ``ψ_t`` of each edit the core is the ridge regression of its residuals, solved as :class:`Woodbury` does:

    .. math:: \psi_t = \sum_j U_e[j, :] \otimes U_{in}^\top \varphi_{tj}, \qquad
              A = (\Psi \Psi^\top + \lambda I)^{-1} R U_{out}, \qquad G = \sum_t a_t \otimes \psi_t

    With orthonormal factors ``‖G‖_F² = Σ_j ‖ΔW_j‖_F²``: it is the minimiser of the problem's own objective among all
    changes of this form, and with whole modes that of :class:`Woodbury`. With a whitened input mode the ridge is
    ``λ Σ_j tr(ΔW_j C ΔW_jᵀ)``: what keys of second moment ``C`` would notice.

    *All* experts change, visited by an edit or not, because the form couples them. The changes of unvisited experts
    have no effect at the edit tokens; they are kept, because edits may visit other experts at lower layers.

    An editor asks for the solver of each layer (:meth:`at_layer`). With ``carry`` it collects activations at the
    highest edited layer only, and each layer below unfolds the core with the factors of its own experts. Without
    factors the modes are whole.

    Args:
        ranks: ``(r_e, r_out, r_in)`` of the factors; ``None`` to go by ``energy``.
        energy: share of the squared norm that each mode keeps, in (0, 1].
        whiten: whether the input mode is whitened by the second moments. That favours directions that many keys take.
            A null space removes just those from the keys, and keeps more of an edit if the input mode is plain.
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

    changes_all_experts = True

    def __init__(
        self,
        ranks: tuple[int, int, int] | None = None,
        energy: float = 0.99,
        whiten: bool = True,
        carry: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        check_size(ranks, energy)
        self.ranks, self.energy, self.whiten = ranks, energy, whiten
        self.carries, self.needs_moments = carry, whiten
        self.cache = None if cache is None else Path(cache)
        self.factors: TuckerFactors | None = None

    @override
    def check(self, shape: Sequence[int]) -> None:
        check_size(self.ranks, self.energy, shape)

    def with_factors(self, factors: TuckerFactors) -> Self:
        """Return the same solver for a layer with these factors."""
        other = copy.copy(self)
        other.factors = factors
        return other

    def at_layer(self, layer: LayerWeights, like: Self | None = None) -> Self:
        r"""Return the solver with the factors of a layer's experts, which are computed or found in the cache.

        Whitening takes one second moment for all experts. Where the published text is silent: a covariance penalty
        with ``S_j = (I + β C_j)^{-1/2}`` has whitened the keys already, so the metric is its ``I + β C``, and ``U_in``
        is taken to the coordinates of shaped keys by ``(I + β C)^{1/2}``; whitening twice would no longer minimise the
        objective. (With whole modes the edit is that of the exact solver then.) Keys that a null space shapes are
        whitened by ``C`` itself.

        All ranks get the same factors, and hold one block of the weights at a time besides their shard.

        Args:
            layer: the weights of the layer's experts.
            like: the solver of another layer, whose ranks are taken.

        Raises:
            ValueError: if the input mode is to be whitened and there is no metric, or a weight is not finite.
        """
        metric = layer.metric if self.whiten else None
        if self.whiten and metric is None:
            raise ValueError("a whitened input mode needs second moments")
        ranks = self.ranks if like is None or like.factors is None else like.factors.ranks
        path, key = None, ""
        if self.cache is not None and layer.key is not None:
            path = self.cache / f"layer_{layer.index}.safetensors"
            key = layer.key(metric, (ranks and tuple(ranks), self.energy))
        factors = None
        if path is not None and path.is_file():
            try:
                factors = TuckerFactors.load(path, key)
                if factors.shape != tuple(layer.weights.shape):
                    shape, factors = factors.shape, None
                    raise ValueError(f"{path} holds factors of {shape}, the layer is {tuple(layer.weights.shape)}")
            except (OSError, ValueError) as error:
                log.info("computing the factors of layer %d anew: %s", layer.index, error)
        if layer.any_rank(factors is None):
            factors = TuckerFactors.hosvd(layer.weights, metric, ranks, self.energy)
            if path is not None and layer.is_first:
                try:
                    factors.save(path, key)
                except OSError as error:
                    log.warning("the factors of layer %d are not kept: %s", layer.index, error)
        assert factors is not None
        log.info("layer %d: ranks %s keep %s of its experts", layer.index, factors.ranks, factors.energy)
        expert, output, inner = (u.to(layer.device) for u in (factors.expert, factors.output, factors.input))
        layer.broadcast(expert, output, inner)
        if metric is not None and layer.is_whitened:
            # the very inverse of what took the factors out of whitened coordinates: they are orthonormal there
            root, _ = whitening_roots(metric)
            inner = (root.to(inner.device) @ inner.double()).to(inner)
        return self.with_factors(replace(factors, expert=expert, output=output, input=inner))

    def unfold(self, carried: TuckerCore, share: float) -> ExpertDeltas:
        """Return ``share`` times the change with this core and the factors of this solver's layer."""
        assert self.factors is not None
        return carried.deltas(self.factors, share)

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Return the minimiser among all changes with this solver's factors; among all there are, if it has none.

        Raises:
            ValueError: if the factors are of another shape than the problem.
            torch.linalg.LinAlgError: if the system is singular, as it may be with a ridge of 0.
        """
        if self.factors is None:
            return Woodbury().solve(problem)
        deltas, dtype = self.unfold(self.carry(problem), 1.0), problem.residuals.dtype
        return replace(deltas, left=deltas.left.to(dtype), right=deltas.right.to(dtype))

    @full_precision()
    def carry(self, problem: EditProblem) -> TuckerCore:
        """Return the core of the minimiser.

        Raises:
            ValueError: if there are no factors, or of another shape than the problem.
            torch.linalg.LinAlgError: if the system is singular, as it may be with a ridge of 0.
        """
        factors = self.factors
        if factors is None:
            raise ValueError("a core needs factors: use with_factors()")
        wanted = (problem.num_experts, problem.residuals.shape[1], problem.features.shape[1])
        if factors.shape != wanted:
            raise ValueError(f"factors of experts {factors.shape} do not fit a problem of experts {wanted}")
        make = cache(partial(_core_problem, problem, factors))
        deltas = minimiser(make, problem.residuals.dtype)
        working = working_dtype(deltas.left.dtype)
        left, right = (rows.to(working) for rows in deltas.rows(0) or (deltas.left, deltas.right))
        if len(left) > left.shape[1]:
            # more terms than output directions: one term for each of these is less
            left, right = torch.eye(left.shape[1]).to(left), left.T @ right
        return TuckerCore(left, right.view(-1, factors.ranks[0], factors.ranks[2]))


def _core_problem(problem: EditProblem, factors: TuckerFactors, dtype: torch.dtype) -> EditProblem:
    """Return the problem of a core in a dtype: that of one expert with features ``ψ`` and residuals ``U_outᵀ r``."""
    features = problem.features.to(dtype)
    expert, output, inner = (u.to(features) for u in (factors.expert, factors.output, factors.input))
    psi = features.new_zeros(problem.num_edits, expert.shape[1], inner.shape[1])
    for j, pairs in problem.experts():
        psi.index_add_(0, problem.edit_index[pairs], expert[j, :, None] * (features[pairs] @ inner)[:, None])
    edits = torch.arange(problem.num_edits, device=features.device)
    residuals = problem.residuals.to(dtype) @ output
    return EditProblem(edits, torch.zeros_like(edits), psi.flatten(1), residuals, 1, problem.ridge)
