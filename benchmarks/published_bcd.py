"""A plain transcription of the block coordinate descent of MoEEdit (arXiv 2602.10965), to measure others against."""

from __future__ import annotations

import torch

from lit_moeedit.solvers import EditProblem


class Published:
    """The equations of MoEEdit as they are printed: each block sums over all other experts again.

    ``ΔW_j = (R − Σ_{l≠j} ΔW_l Φ_l) Φ_jᵀ (Φ_j Φ_jᵀ + λ I)⁻¹``, with ``Φ_j [d_hidden, T]`` zero where an edit does not
    visit the expert. With ``routed`` the sum leaves those zeros out, which is kinder than the printed form.
    """

    def __init__(self, problem: EditProblem, routed: bool = False) -> None:
        self.problem, self.routed = problem, routed
        self.deltas = torch.zeros(problem.num_experts, problem.residuals.shape[1], problem.features.shape[1])
        self.pairs = [(problem.expert_index == j).nonzero()[:, 0] for j in range(problem.num_experts)]
        if not routed:
            self.features = torch.zeros(problem.num_experts, problem.num_edits, problem.features.shape[1])
            self.features[problem.expert_index, problem.edit_index] = problem.features

    def block(self, j: int) -> None:
        problem, missing = self.problem, self.problem.residuals.clone()
        for other in range(problem.num_experts):
            if other != j and self.routed:
                pairs = self.pairs[other]
                predicted = problem.features[pairs] @ self.deltas[other].T
                missing.index_add_(0, problem.edit_index[pairs], predicted, alpha=-1)
            elif other != j:
                missing -= self.features[other] @ self.deltas[other].T
        features = problem.features[self.pairs[j]]
        system = features.T @ features + problem.ridge * torch.eye(features.shape[1])
        self.deltas[j] = torch.linalg.solve(system, features.T @ missing[problem.edit_index[self.pairs[j]]]).T

    def solve(self, passes: int, seed: int = 0) -> None:
        """All passes, in the order of :class:`BlockCoordinateDescent`."""
        visited = [j for j, pairs in enumerate(self.pairs) if len(pairs)]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(passes):
            for i in torch.randperm(len(visited), generator=generator).tolist():
                self.block(visited[i])

    def objective(self) -> float:
        missing = self.problem.residuals.double()
        for j, pairs in enumerate(self.pairs):
            predicted = self.problem.features[pairs].double() @ self.deltas[j].double().T
            missing.index_add_(0, self.problem.edit_index[pairs], predicted, alpha=-1)
        return float(missing.square().sum() + self.problem.ridge * self.deltas.double().square().sum())
