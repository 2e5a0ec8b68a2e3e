"""Solvers of the edit problem: pure tensors, no model."""

from lit_moeedit.solvers.auto import Auto
from lit_moeedit.solvers.bcd import BlockCoordinateDescent
from lit_moeedit.solvers.conjugate import ConjugateGradients
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.normal import NormalEquations
from lit_moeedit.solvers.per_expert import PerExpertRidge
from lit_moeedit.solvers.problem import EditProblem, Solver
from lit_moeedit.solvers.tucker import Tucker, TuckerFactors
from lit_moeedit.solvers.woodbury import Woodbury

__all__ = [
    "Auto",
    "BlockCoordinateDescent",
    "ConjugateGradients",
    "EditProblem",
    "ExpertDeltas",
    "NormalEquations",
    "PerExpertRidge",
    "Solver",
    "Tucker",
    "TuckerFactors",
    "Woodbury",
]
