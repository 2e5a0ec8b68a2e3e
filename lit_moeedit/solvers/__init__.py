"""Solvers of the edit problem: pure tensors, no model."""

from lit_moeedit.solvers.bcd import BlockCoordinateDescent
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.per_expert import PerExpertRidge
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.solver import LayerWeights, Solver
from lit_moeedit.solvers.tucker import Tucker, TuckerFactors
from lit_moeedit.solvers.woodbury import Woodbury

__all__ = [
    "BlockCoordinateDescent",
    "EditProblem",
    "ExpertDeltas",
    "LayerWeights",
    "PerExpertRidge",
    "Solver",
    "Tucker",
    "TuckerFactors",
    "Woodbury",
]
