"""The problems on which solvers are measured, and the least objective of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_moeedit.solvers import EditProblem

MODELS = {
    "Qwen3-30B-A3B": (128, 8, 768, 2048),
    "GPT-OSS-20B": (32, 4, 2880, 2880),
    "Qwen3.6-35B-A3B": (256, 8, 512, 2048),
}
"""Experts, experts per token, ``d_hidden``, ``d_model``."""
EDITS = (1, 10, 100, 1000, 4000)
PASSES = 4
BLOCKS = 2
"""How many blocks of the published form are timed where all of them would take too long."""
LATENT = 32

BASE = {"T": 1000, "E": 128, "k": 8}
GROWTH = {"T": (250, 500, 1000, 2000, 4000), "E": (32, 64, 128, 256, 512), "k": (1, 2, 4, 8, 16)}

FORMS = ((16, 4, 128, 256), (8, 2, 64, 256), (8, 8, 64, 256), (1, 1, 64, 64), (64, 2, 16, 256), (4, 2, 256, 1024))
"""Experts, experts per token, ``d_hidden``, ``d_model``, with few dimensions together."""


def make(edits: int, experts: int, active: int, d_hidden: int, d_model: int, ridge: float = 1.0) -> EditProblem:
    """Edits that resemble each other: keys, routing and residuals are low rank plus as much noise.

    A key has a squared norm of about 10; gates are a softmax over the active experts, as in Qwen3.
    """
    generator = torch.Generator().manual_seed(edits)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latent = (normal(edits, LATENT) + normal(LATENT)) / math.sqrt(2 * LATENT)
    logits = latent @ normal(LATENT, experts) + normal(edits, experts)
    best, expert = logits.topk(active, dim=1)
    gate, expert = best.softmax(1).flatten(), expert.flatten()
    edit = torch.arange(edits).repeat_interleave(active)
    features = normal(len(edit), d_hidden)
    for j in range(experts):
        pairs = (expert == j).nonzero()[:, 0]
        features[pairs] += latent[edit[pairs]] @ normal(LATENT, d_hidden)
    features *= math.sqrt(5 / d_hidden) * gate[:, None]
    residuals = latent @ normal(LATENT, d_model) + normal(edits, d_model)
    return EditProblem(edit, expert, features, residuals, experts, ridge)


def tucker_ranks(experts: int, d_model: int, d_hidden: int) -> tuple[int, int, int]:
    """A quarter of each mode."""
    return max(1, experts // 4), max(1, d_model // 4), max(1, d_hidden // 4)


def optimum(problem: EditProblem) -> float:
    """The least objective, ``λ tr(Rᵀ (G + λ I)⁻¹ R)``, in float64."""
    system = problem.ridge * torch.eye(problem.num_edits, dtype=torch.float64)
    for j in range(problem.num_experts):
        pairs = (problem.expert_index == j).nonzero()[:, 0]
        edits, features = problem.edit_index[pairs], problem.features[pairs].double()
        system[edits[:, None], edits] += features @ features.T
    residuals = problem.residuals.double()
    left = torch.cholesky_solve(residuals, torch.linalg.cholesky(system))
    return problem.ridge * float((residuals * left).sum())
