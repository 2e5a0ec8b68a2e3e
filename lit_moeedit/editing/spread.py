"""The order in which layers are edited, and what each of them is given to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moeedit.editing.edit_tokens import EditTokens
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.output_scale import asked_of_experts
from lit_moeedit.preservation.shaping import Shaping
from lit_moeedit.solvers import EditProblem, ExpertDeltas, Solver, Tucker, TuckerFactors


@dataclass(frozen=True)
class Site:
    """What there is to edit.

    Attributes:
        layers: the layers, ascending; the last is the target layer.
        aim: ``[n, d_model]``, how far the target layer's output is to move at the edit token of each prompt.
        measure: keys of a layer, and the target layer's output, with the weights as they are now.
        gains: by layer index, how far a layer's output moves where its experts' output moves by one; see
            :func:`~lit_moeedit.models.output_scale.output_gains`.
        problem: of a layer, for what was measured, the residuals ``[n, d_model]`` that its experts are asked for, the
            experts that the edit changes, and the shaping of their keys.
        shaping: of some experts of a layer, by what they must preserve; ``None`` if that is nothing.
        factors: Tucker factors of a layer, with the given ranks or those that the solver chooses.
        clock: measures a phase.
    """

    layers: Sequence[ExpertLayer]
    aim: Tensor
    measure: Callable[[ExpertLayer], EditTokens]
    gains: Mapping[int, Tensor]
    problem: Callable[[ExpertLayer, EditTokens, Tensor, Tensor, Shaping | None], EditProblem]
    shaping: Callable[[ExpertLayer, Tensor], Shaping | None]
    factors: Callable[[ExpertLayer, Sequence[int] | None], TuckerFactors]
    clock: Callable[[str], AbstractContextManager[None]]


def walk(solver: Solver, site: Site) -> Iterator[tuple[ExpertLayer, ExpertDeltas]]:
    """Layers and their changes, in the order in which they are to be committed: each before the next is asked for."""
    return carried(solver, site) if isinstance(solver, Tucker) and solver.carry else upwards(solver, site)


def upwards(solver: Solver, site: Site) -> Iterator[tuple[ExpertLayer, ExpertDeltas]]:
    """The walk of MEMIT: each layer takes ``1 / (layers left)`` of what is missing once those below have changed."""
    goal: Tensor | None = None
    for number, layer in enumerate(site.layers):
        with site.clock("features"):
            seen = site.measure(layer)
        if goal is None:
            goal = seen.hidden + site.aim
        with site.clock("solve"):
            chosen = solver.with_factors(site.factors(layer, None)) if isinstance(solver, Tucker) else solver
            experts = _changing(solver, layer, seen)
            shaping = site.shaping(layer, experts)
            share = (goal - seen.hidden) / (len(site.layers) - number)
            residuals = asked_of_experts(share, site.gains[layer.index])
            solution = chosen.solve(site.problem(layer, seen, residuals, experts, shaping))
        yield layer, _applied(solution, shaping)


def carried(solver: Tucker, site: Site) -> Iterator[tuple[ExpertLayer, ExpertDeltas]]:
    """The walk of MoTE: activations are collected once, at the last layer, and its core is carried to those below.

    Where the published text is silent: the core is solved for the whole residual; each layer unfolds it by the factors
    of its own experts, and takes the share ``1 / (layers left)`` of that. So the last layer is changed by its own
    solution in full. Nothing is measured at the lower layers, whose gains are taken to be those of the last, and what
    their changes do is not corrected.
    """
    top = site.layers[-1]
    with site.clock("features"):
        seen = site.measure(top)
    with site.clock("solve"):
        factors = site.factors(top, None)
        experts = _changing(solver, top, seen)
        shaping = site.shaping(top, experts)
        residuals = asked_of_experts(site.aim, site.gains[top.index])
        core = solver.with_factors(factors).core(site.problem(top, seen, residuals, experts, shaping))
    for number, layer in enumerate(site.layers):
        with site.clock("solve"):
            own = factors if layer is top else site.factors(layer, factors.ranks)
            share = 1 / (len(site.layers) - number)
            its = shaping if layer is top else site.shaping(layer, _changing(solver, layer, seen))
            deltas = _applied(core.deltas(own, share), its)
        yield layer, deltas


def _changing(solver: Solver, layer: ExpertLayer, seen: EditTokens) -> Tensor:
    """The experts that an edit changes: those that it visits, or all if they share factors."""
    visited = torch.unique(seen.keys.expert)
    return torch.arange(layer.num_experts, device=visited.device) if isinstance(solver, Tucker) else visited


def _applied(solution: ExpertDeltas, shaping: Shaping | None) -> ExpertDeltas:
    """The problem was solved for keys shaped by ``S_j``, the layer sees keys as they are: apply ``ΔŴ_j S_j``."""
    if shaping is None:
        return solution
    return solution.with_right(shaping.applied(solution.right, solution.expert_index))
