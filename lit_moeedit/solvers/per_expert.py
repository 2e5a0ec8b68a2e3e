"""Ridge regression for each expert by itself, as MEMIT on a Mixture-of-Experts layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.bcd import BlockCoordinateDescent
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import in_bases, widened
from lit_moeedit.solvers.solver import Solver


class PerExpertRidge(Solver):
    r"""Gives every expert a share of each residual, and solves its ridge regression as if there were no other expert.

    With a covariance penalty this is MEMIT (2210.07229, equation 14) in each expert, with the expert's own second
    moment. MEMIT has one down-projection, so the share is our choice: that of the norms of the features,

    .. math:: s_{tj} = \frac{\|\varphi_{tj}\|}{\sum_i \|\varphi_{ti}\|}, \qquad
              \Delta W_j = \arg\min_{\Delta W} \sum_{t \in j} \| s_{tj} r_t - \Delta W \varphi_{tj} \|^2
                           + \lambda \|\Delta W\|_F^2,

    which is the share of the gates where the keys are of one length, and asks less of an expert that has much to
    preserve.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> PerExpertRidge().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Return the experts' own minimisers.

        Raises:
            torch.linalg.LinAlgError: if an expert's system is singular, as it may be with a ridge of 0.
        """
        wide = widened(problem)
        norms = wide.features.norm(dim=-1)
        sums = norms.new_zeros(wide.num_edits).index_add_(0, wide.edit_index, norms)
        share = norms / sums[wide.edit_index].clamp_min(torch.finfo(norms.dtype).tiny)
        wanted = share[:, None] * wide.residuals[wide.edit_index]
        # if every pair is an edit of its own, no two experts share one, and each block is final
        pairs = torch.arange(wide.num_pairs, device=wide.edit_index.device)
        deltas = BlockCoordinateDescent(passes=1).solve(replace(wide, edit_index=pairs, residuals=wanted))
        return deltas if wide is problem else in_bases(deltas, problem.residuals.dtype)
