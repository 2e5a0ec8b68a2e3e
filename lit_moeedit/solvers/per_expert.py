"""Every expert by itself: the baseline that MEMIT is on a Mixture-of-Experts layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky


class PerExpertRidge:
    r"""Gives every expert a share of each residual, and solves its ridge regression as if there were no other expert.

    With ``preserve="covariance"`` this is MEMIT (2210.07229, equation 14) in each expert, with the expert's own second
    moment. MEMIT knows one down-projection, so the share is our choice: that of the norms of the features,

    .. math:: s_{tj} = \frac{\|\varphi_{tj}\|}{\sum_i \|\varphi_{ti}\|}, \qquad
              \Delta W_j = \arg\min_{\Delta W} \sum_{t \in j} \| s_{tj} r_t - \Delta W \varphi_{tj} \|^2
                           + \lambda \|\Delta W\|_F^2,

    which is the share of the gates where the keys are of one length, and asks less of an expert that has much to
    preserve. Solved in the dual form, of the size of the expert's edits.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> PerExpertRidge().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The experts' own minimisers.

        Raises:
            torch.linalg.LinAlgError: if an expert's system is singular, which only a ridge of 0 allows.
        """
        norms = problem.features.norm(dim=-1)
        sums = norms.new_zeros(problem.num_edits).index_add_(0, problem.edit_index, norms)
        share = norms / sums[problem.edit_index].clamp_min(torch.finfo(norms.dtype).tiny)
        wanted = share[:, None] * problem.residuals[problem.edit_index]
        left = torch.zeros_like(wanted)
        for expert, pairs in problem.experts():
            features = problem.features[pairs]

            def system(dtype: torch.dtype, features: Tensor = features) -> Tensor:
                matrix = features.to(dtype) @ features.T.to(dtype)
                matrix.diagonal().add_(problem.ridge)
                return matrix

            factor = cholesky(system, features.dtype, f"the system of expert {expert} at ridge {problem.ridge:g}")
            left[pairs] = torch.cholesky_solve(wanted[pairs].to(factor.dtype), factor).to(left.dtype)
        rows = torch.arange(len(left), device=left.device)
        return ExpertDeltas(problem.expert_index, rows, left, problem.features, problem.num_experts)
