"""The spread of an edit over its layers: at each, activations are measured, keys shaped, and a problem is solved."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_moeedit.data.encoding import pad_id
from lit_moeedit.editing.edit_tokens import EditTokens, edit_tokens
from lit_moeedit.editing.job import EditJob, LayerEdits
from lit_moeedit.editing.layer_weights import layer_weights
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.editing.target_rows import EncodedFacts
from lit_moeedit.editing.targets import Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.output_scale import expert_residuals
from lit_moeedit.preservation.owned_shaping import OwnedShaping, shaping_of
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import Shaping
from lit_moeedit.solvers import EditProblem, ExpertDeltas, Solver

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_moeedit.editing.editor import Editor

log = logging.getLogger(__name__)


class Spread(LayerEdits):
    """MEMIT's spread: each layer takes ``1 / (layers left)`` of the residual that the layers below have left.

    The editor's settings ``residual_of`` and ``residual_share`` change both, see
    :class:`~lit_moeedit.editing.Editor`.

    Args:
        editor: the settings.
        job: the arguments of the edit.
        encoded: the facts as token ids.
        targets: the target vectors.
        moments: second moments by layer index, if they are needed.
    """

    def __init__(
        self,
        editor: Editor,
        job: EditJob,
        encoded: EncodedFacts,
        targets: Targets,
        moments: Mapping[int, SecondMoments] | None,
    ) -> None:
        super().__init__(job)
        self.editor, self.encoded, self.targets, self.moments = editor, encoded, targets, moments
        # change of the target layer's output that is wanted at each edit token of each prompt
        self.wanted = targets.deltas[torch.tensor(encoded.vector_index, device=job.model.device)]
        self.keys = [job.facts[t].key for t in encoded.fact_index]
        self.names = [job.facts[t].prompt_key for t in encoded.fact_index]
        known = {fact.key: goal for fact in job.facts if (goal := job.goals.get(fact.key)) is not None}
        self._known = [row for row, key in enumerate(self.keys) if key in known]
        self._known_goals = torch.cat([self.wanted[:0], *(goal.to(self.wanted) for goal in known.values())])
        self._goal: Tensor | None = None
        self._keys: dict[int, GatedKeys] = {}

    @override
    def solve(self, layer: ExpertLayer) -> ExpertDeltas:
        top = self.job.layers[-1]
        measured = layer if self.editor.residual_of == "each_layer" else top
        tokens = self.observe(layer, measured)
        if self._goal is None:
            self._goal = self._aim(tokens.hidden if measured is top else self.observe(top).hidden)
        with self.job.clock("solve"):
            solver = self.solver_at(layer)
            shaping = self.shape(layer, tokens)
            share = (self._goal - tokens.hidden) / self.divisor(layer)
            return unshaped(solver.solve(self.problem(layer, tokens, share, shaping)), shaping)

    @override
    def residual(self) -> Tensor:
        assert self._goal is not None
        left, wanted = self._goal - self.observe(self.job.layers[-1]).hidden, self.wanted
        fact = torch.tensor(self.encoded.fact_index, device=left.device)
        squares = torch.stack([left.square().sum(-1), wanted.square().sum(-1)])
        sums = squares.new_zeros(2, len(self.job.facts)).index_add(1, fact, squares)
        return (sums[0] / sums[1]).sqrt().where(sums[1] > 0, torch.nan)

    @override
    def goals(self) -> dict[str, Tensor]:
        assert self._goal is not None
        # further prompts are chosen anew by each edit
        facts, count = self.job.facts, len(self._goal) - self.encoded.further
        rows = Counter(self.encoded.fact_index[:count])
        own = self._goal[:count].split([rows[t] for t in range(len(facts))])
        stay = {key for key, goal in self.job.goals.items() if goal is None}
        return {fact.key: goal for fact, goal in zip(facts, own, strict=True) if fact.key not in stay}

    def _aim(self, hidden: Tensor) -> Tensor:
        """Return the target layer's output ``[n, d_model]`` that is wanted, from what it is before the edit.

        Known goals are absolute. Training may have moved the hidden states far from them, so they are approached by no
        more than a target vector may be long.
        """
        if self._known:
            way = self._known_goals - hidden[self._known]
            longest = self.editor.targets.clamp * hidden[self._known].norm(dim=-1)
            self.wanted[self._known] = way * (longest / way.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[:, None]
        return hidden + self.wanted

    @override
    def keep(self) -> None:
        if self.editor.memory is None:
            return
        # not the further prompts: renewals have none, and would take them out again
        own = len(self.names) - self.encoded.further
        keys = {index: keys.select(keys.row < own) for index, keys in self._keys.items()}
        self.editor.memory.remember(keys, self.names[:own], self.job.ranks, self.encoded.token_index[:own])

    def divisor(self, layer: ExpertLayer) -> float:
        """Return what the residual is divided by at a layer: the number of layers left, or its root."""
        left = len(self.job.layers) - self.job.layers.index(layer)
        return left**0.5 if self.editor.residual_share == "root_of_layers_left" else left

    def observe(self, layer: ExpertLayer, measured: ExpertLayer | None = None) -> EditTokens:
        """Measure the keys of a layer, and the output of one (the target layer by default), with the present weights.

        Args:
            layer: the layer of the keys.
            measured: the layer of the output, not below ``layer``.
        """
        job = self.job
        with job.clock("features"):
            return edit_tokens(
                job.model,
                self.encoded.prompts,
                job.layers[-1] if measured is None else measured,
                layer,
                pad_id(job.tokenizer),
                self.editor.token_budget,
                job.ranks,
            )

    def shape(self, layer: ExpertLayer, tokens: EditTokens) -> Shaping | OwnedShaping | None:
        """Compute the shaping of the experts that the edit changes; ``None`` if nothing is preserved."""
        preservation = self.editor.preserve
        if preservation is None:
            return None
        assert self.moments is not None
        # factors that experts share are in the coordinates of the keys
        symmetric = self.editor.solver.changes_all_experts
        experts = self.changing(layer, tokens)
        moments, penalty = self.moments[layer.index], self._penalty(layer)
        shaping = shaping_of(moments, experts, preservation, penalty, symmetric, self.job.ranks)
        shares = shaping.energy_kept
        self.energy_kept[layer.index] = dict(zip(shaping.experts.tolist(), shares.tolist(), strict=True))
        if shaping.free is not None:
            self.null_ranks[layer.index] = dict(zip(shaping.experts.tolist(), shaping.free.tolist(), strict=True))
        log.info(
            "layer %d: share of the preserved energy that is kept, over %d experts: %.4f on average, %.4f at least",
            layer.index,
            len(shares),
            float(shares.mean()),
            float(shares.min()),
        )
        return shaping

    def problem(
        self, layer: ExpertLayer, tokens: EditTokens, share: Tensor, shaping: Shaping | OwnedShaping | None
    ) -> EditProblem:
        """Build the problem of a layer whose output is to change by ``share [n, d_model]``."""
        assert layer.output_scale is not None
        editor, residuals = self.editor, expert_residuals(share, layer.output_scale)
        keys = self._keys[layer.index] = GatedKeys.of(tokens.keys)
        if self.encoded.further:
            root = torch.tensor(self.encoded.row_weight, device=residuals.device).sqrt()[:, None]
            keys, residuals = GatedKeys(keys.row, keys.expert, root[keys.row] * keys.key), root * residuals
        if editor.memory is not None:
            experts = self.changing(layer, tokens)
            keys, residuals = editor.memory.extend(layer.index, keys, residuals, self.names, experts)
        features = keys.key if shaping is None else shaping.features(keys.key, keys.expert)
        return EditProblem(keys.row, keys.expert, features, residuals, layer.num_experts, editor.ridge)

    def solver_at(self, layer: ExpertLayer, like: Solver | None = None) -> Any:
        """Return the solver for a layer, see :meth:`~lit_moeedit.solvers.Solver.at_layer`."""
        solver = self.editor.solver
        moments = self.moments[layer.index] if self.moments is not None and solver.needs_moments else None
        return solver.at_layer(layer_weights(layer, moments, self._penalty(layer), self.job.ranks), like)

    def changing(self, layer: ExpertLayer, tokens: EditTokens) -> Tensor:
        """Return the experts that the edit changes: those that it visits, or all if they share parameters."""
        visited: Tensor = torch.unique(tokens.keys.expert)
        if self.editor.solver.changes_all_experts:
            return torch.arange(layer.num_experts, device=visited.device)
        return visited

    def _penalty(self, layer: ExpertLayer) -> float | None:
        preservation = self.editor.preserve
        return None if preservation is None else preservation.penalty(layer.shape, self.editor.ridge)


class CarriedSpread(Spread):
    """MoTE's spread: activations are measured once, at the last layer, and its solution is carried to those below.

    The published text leaves some choices open. Here the core is solved for the whole residual. Each layer unfolds it
    by the factors of its own experts and takes the share of ``residual_share`` of the result, so the last layer is
    changed by its whole solution. Nothing is measured at the lower layers: their output scales are assumed to be that
    of the last layer, and the effect of their changes is not corrected.

    Experts and hidden units of two layers have nothing in common but numbers, which are arbitrary: to number those of a
    layer otherwise leaves the model as it is. So a solution can be carried only in bases that follow the numbers, as
    the factors do (those of hidden units if all experts are numbered the same way). ``Woodbury`` has no bases. Its
    solution is carried by :class:`~lit_moeedit.solvers.Tucker` with whole modes (``energy=1``).
    """

    @override
    def solve(self, layer: ExpertLayer) -> ExpertDeltas:
        layers, (tokens, solver, shaping, carried) = self.job.layers, self._top
        with self.job.clock("solve"):
            if layer is not layers[-1]:
                solver, shaping = self.solver_at(layer, solver), self.shape(layer, tokens)
            return unshaped(solver.unfold(carried, 1 / self.divisor(layer)), shaping)

    @cached_property
    def _top(self) -> tuple[EditTokens, Any, Shaping | OwnedShaping | None, Any]:
        """The last layer: its tokens, solver and shaping, and the solution that is carried down."""
        top = self.job.layers[-1]
        tokens = self.observe(top)
        self._goal = self._aim(tokens.hidden)
        with self.job.clock("solve"):
            solver, shaping = self.solver_at(top), self.shape(top, tokens)
            return tokens, solver, shaping, solver.carry(self.problem(top, tokens, self.wanted, shaping))


def unshaped(solution: ExpertDeltas, shaping: Shaping | OwnedShaping | None) -> ExpertDeltas:
    """Return ``ΔŴ_j S_j``, because the problem was solved for shaped keys, and the layer's keys are not shaped."""
    if shaping is None:
        return solution
    return solution.with_right(shaping.applied(solution.right, solution.expert_index))
