"""What tests of the editor share: quick targets, a solver that can be watched, and what a memory holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.editing import EditMemory, TargetOptimizer
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty
from lit_moeedit.solvers import EditProblem, ExpertDeltas, Solver, Woodbury

QUICK = TargetOptimizer(steps=3, stop=0.0)


def preservation(name: str, threshold: float = 2.0, strength: float = 10.0) -> Any:
    """A preservation by its name, with the setting that it has; ``none`` as it is."""
    kinds = {"output": OutputPenalty, "covariance": CovariancePenalty}
    if name in kinds:
        return kinds[name](strength)
    return NullSpace(threshold) if name == "nullspace" else name


class Recording(Solver):
    """A solver that keeps what it was asked and what it answered, and can be told to fail at one of its calls."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = ZeroDivisionError) -> None:
        self.problems: list[EditProblem] = []
        self.solutions: list[ExpertDeltas] = []
        self.fail_at, self.error = fail_at, error

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        if len(self.problems) == self.fail_at:
            raise self.error
        self.problems.append(problem)
        self.solutions.append(Woodbury().solve(problem))
        return self.solutions[-1]


def edited_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def held(memory: EditMemory) -> GatedKeys:
    """All rows of the memory's layer 0."""
    state = memory.state_dict()[0]
    return GatedKeys(state["row"], state["expert"], state["key"])


def bits(memory: EditMemory) -> list[object]:
    return [
        value.numpy().tobytes() if isinstance(value, Tensor) else value
        for layer, state in memory.state_dict().items()
        for value in (layer, *state.values())
    ]
