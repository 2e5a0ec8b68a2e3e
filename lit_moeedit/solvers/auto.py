"""Picks the fastest of the exact solvers from the size of the problem."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.conjugate import ConjugateGradients, Operator, iterate
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.normal import NormalEquations
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import TOLERANCE, probes
from lit_moeedit.solvers.woodbury import Woodbury

log = logging.getLogger(__name__)

PRODUCT, CHOLESKY, SOLVE = 150e9, 65e9, 110e9
"""Floating-point operations per second in matrix products, Cholesky factors, and solving with them."""
MOVE = 1.4e-9
"""Seconds to gather, add or scatter one number."""
STEP = 30e-6
"""Seconds of a step over one expert."""
DOUBLE = 3.0
"""How much longer :class:`Woodbury` takes if float32 turns out not to do."""
PROBED = 4
"""Random combinations of right-hand sides on which conjugate gradients are tried."""
WASTE = 0.15
"""Share of the time of :class:`Woodbury` that may be spent to find out whether conjugate gradients are faster; and
nothing is tried if that is expected to take less than:"""
WORTH = 2e-3
"""Seconds."""
FEW = 16
"""With no more edits than these all of :class:`Woodbury` takes about as long as the cost model."""


@dataclass(frozen=True)
class Costs:
    """Expected seconds of each solver.

    Attributes:
        woodbury: of :class:`Woodbury`.
        normal: of :class:`NormalEquations`.
        setup: of conjugate gradients, before and after the iterations; and
        iteration: of each of them; and
        probe: of an iteration with only :data:`PROBED` right-hand sides.
    """

    woodbury: float
    normal: float
    setup: float
    iteration: float
    probe: float

    @classmethod
    def of(cls, problem: EditProblem) -> Costs:
        """The cost model: operations over the rates above, which ``benchmarks/solvers.py costs`` measures."""
        edits, d_model = problem.residuals.shape
        d_hidden, pairs = problem.features.shape[1], problem.num_pairs
        counts = [len(positions) for _, positions in problem.experts()]
        stacked = len(counts) * d_hidden
        squares = sum(count**2 for count in counts)

        def solving(size: int) -> float:
            return size**3 / 3 / CHOLESKY + 2 * size**2 * d_model / SOLVE

        # of edits that outnumber the dimensions, some combinations have no features at all: there (G + λI)⁻¹ is 1 / λ
        slower = 1.0
        if stacked < edits:
            slower = math.inf if not problem.ridge else DOUBLE if _rounding(problem) > TOLERANCE**0.5 else 1.0
        gram = 2 * squares * d_hidden / PRODUCT + pairs * d_hidden * MOVE
        reached = sum(count * min(count, 2 * d_hidden) for count in counts)
        iteration = 2 * reached * d_model / PRODUCT + (2 * pairs + 8 * edits) * d_model * MOVE
        return cls(
            woodbury=slower * (gram + squares * MOVE + solving(edits)),
            normal=len(counts) * STEP
            + 2 * pairs * d_hidden * (stacked + d_model) / PRODUCT
            + (pairs + edits) * stacked * MOVE
            + solving(stacked),
            setup=gram + 3 * pairs * d_hidden * MOVE,
            iteration=iteration,
            probe=iteration * PROBED / d_model,
        )

    def iterations(self) -> int:
        """How many iterations are faster than :class:`Woodbury`, and can be tried at little cost."""
        if self.woodbury < WORTH:
            return 0
        return int(
            min((self.woodbury - self.setup) / self.iteration, (WASTE * self.woodbury - self.setup) / self.probe)
        )


def _rounding(problem: EditProblem) -> float:
    """At least so much is lost of what float32 keeps: ``ε ‖G‖ / λ``, by ``‖G‖ ≥ 1ᵀG1 / T = Σ_j ‖Σ_t φ_tj‖² / T``."""
    sums = problem.features.new_zeros(problem.num_experts, problem.features.shape[1], dtype=torch.float32)
    sums.index_add_(0, problem.expert_index, problem.features.float())
    size = float(sums.square().sum()) / problem.num_edits
    return torch.finfo(torch.float32).eps * size / problem.ridge


class Auto:
    """Solves exactly (to 1e-5 of the objective) in the way that a cost model expects to be the fastest.

    :class:`Woodbury`, whose system is ``T × T``; :class:`NormalEquations`, where all visited experts together have
    fewer dimensions than there are edits; :class:`ConjugateGradients`, where these need few iterations, which is tried
    on a few random combinations of the right-hand sides if that costs little.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> Auto().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        if problem.ridge and problem.num_edits <= FEW:
            return Woodbury().solve(problem)
        costs = Costs.of(problem)
        if costs.normal < costs.woodbury:
            return NormalEquations().solve(problem)
        most = costs.iterations() if problem.ridge and problem.num_pairs else 0
        if most > 1:
            operator, solver = Operator(problem), ConjugateGradients(iterations=most)
            sketch = problem.residuals.to(operator.dtype) @ probes(problem, operator.dtype, PROBED)
            _, needed = iterate(operator, sketch, solver.tolerance, most)
            log.debug("conjugate gradients need %s iterations, %d are affordable", needed, most)
            if needed is not None:
                return solver.solve_with(operator, problem)
        return Woodbury().solve(problem)
