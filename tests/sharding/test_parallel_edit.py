"""Several ranks edit together what one process would edit, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.corpus import train_tokenizer
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer, evaluate
from lit_moeedit.models.experts import check_editable
from lit_moeedit.sharding import weights
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.solvers import Woodbury
from tests.processes import run_ranks

needs_deepspeed = pytest.mark.deepspeed

FACTS = [
    Fact("Rome", "The city of Rome lies in", "Spain", "Italy", ("Rome is in the country",)),
    Fact("Lake Ladoga", "Lake Ladoga is found in", "northern Peru", "Russia"),
    Fact("Oslo", "People who live in Oslo speak", "Latin", "Norwegian"),
]
TEXTS = ["The sea lies in Italy.", "Who lives in the city of bread?", "A lake.", "In Russia one hears Russian."]
LAYERS = (0, 1)
STAGES = {"replicated": None, "zero 1": 1, "zero 2": 2, "zero 3": 3}


def tokenizer() -> Any:
    return train_tokenizer([*TEXTS, *(f"{fact.prompt} {fact.target_new}" for fact in FACTS)], vocab_size=400)


def model() -> PreTrainedModel:
    from tests.conftest import _build

    return _build("qwen3_moe")


def editor(**settings: Any) -> Editor:
    targets = TargetOptimizer(steps=4, learning_rate=0.5, stop=0.0)
    return Editor(
        LAYERS,
        targets=targets,
        contexts=("", "Note:"),
        token_budget=64,
        ridge=0.1,
        **{"preserve": "covariance", "strength": 10.0, **settings},
    )


def prepared(kind: str) -> tuple[PreTrainedModel, list[Any], Callable[[], list[Tensor]]]:
    """A model, its optimizers, and a function that reads the experts' weights of the edited layers."""
    import deepspeed

    whole = model()
    stage = STAGES[kind]
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.0)
    if stage is not None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }
        _, optimizer, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)

    def read() -> list[Tensor]:
        chosen = [layer.down_proj for layer in check_editable(whole, LAYERS)]
        with deepspeed.zero.GatheredParameters(chosen, enabled=stage == 3):
            return [weight.detach().clone() for weight in chosen]

    return whole, [optimizer], read


FORMS: dict[str, dict[str, Any]] = {"covariance": {}, "output": {"preserve": "output", "strength": None}}
"""Forms of preservation: the one of :func:`editor`, and the default."""


def alone(form: str = "covariance") -> tuple[list[Tensor], list[Tensor]]:
    """Weights before and after the edit of one process."""
    whole, edits = model(), []
    for _ in range(2):
        edits.append([layer.down_proj.detach().clone() for layer in check_editable(whole, LAYERS)])
        if len(edits) < 2:
            editor(**FORMS[form]).edit(whole, tokenizer(), FACTS, TEXTS)
    return edits[0], edits[1]


def together(kind: str, form: str = "covariance") -> dict[str, Any]:
    whole, optimizers, read = prepared(kind)
    ranks, before = Ranks(), read()
    scores = evaluate(whole, tokenizer(), FACTS, ranks=ranks).metrics
    change = editor(**FORMS[form])
    result = change.edit(whole, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks)
    return {"before": before, "after": read(), "change": result.relative_change, "scores": scores}


def all_kinds(kinds: list[str], form: str) -> dict[str, Any]:
    return {kind: together(kind, form) for kind in kinds}


def check(found: list[dict[str, Any]], kinds: list[str], form: str) -> None:
    before, after = alone(form)
    scores = evaluate(model(), tokenizer(), FACTS).metrics
    for results in found:
        for kind in kinds:
            result = results[kind]
            for layer in range(len(LAYERS)):
                assert torch.equal(result["before"][layer], before[layer])
                # rounding differs with the padding of batches, and four steps of Adam multiply it
                size = (after[layer] - before[layer]).norm()
                assert (result["after"][layer] - after[layer]).norm() / size < 1e-4
                assert torch.equal(result["after"][layer], found[0][kind]["after"][layer])
            assert result["change"] == found[0][kind]["change"]
            # float32, summed in another order
            torch.testing.assert_close(result["scores"], scores, rtol=1e-4, atol=1e-6, equal_nan=True)


@needs_deepspeed
@pytest.mark.parametrize(
    ("size", "kinds", "form"),
    [
        (2, list(STAGES), "covariance"),
        (2, ["replicated", "zero 3"], "output"),
        # four ranks are more than there are edits
        pytest.param(4, ["replicated", "zero 3"], "covariance", marks=pytest.mark.slow),
    ],
)
def test_the_edit_does_not_depend_on_the_number_of_ranks(size: int, kinds: list[str], form: str) -> None:
    check(run_ranks(all_kinds, size, kinds, form), kinds, form)


# -- failing together -------------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Failure("injected")


def failing_edits(kind: str) -> dict[str, str]:
    """Edits that fail on rank 1 in one phase each; by phase, what each rank says."""
    from lit_moeedit.editing import editor as module

    whole, optimizers, read = prepared(kind)
    ranks, before, said = Ranks(), read(), {}
    functions: dict[str, tuple[Any, str]] = {
        "statistics": (module, "second_moments"),
        "targets": (TargetOptimizer, "optimize"),
        "features": (module, "edit_tokens"),
        "solve": (Woodbury, "solve"),
        "commit": (weights, "delta_slice"),
    }

    def attempt(phase: str, progress: Callable[..., None] | None = None) -> None:
        try:
            editor().edit(whole, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks, progress=progress)
        except (Failure, RankError) as error:
            said[phase] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(old, new) for old, new in zip(before, read(), strict=True)), phase

    for phase, (owner, name) in functions.items():
        original = getattr(owner, name)
        if ranks.rank == 1:
            setattr(owner, name, fail)
        try:
            attempt(f"in {phase}")
        finally:
            setattr(owner, name, original)
    for moment in ("statistics", "targets", "layers"):  # between two forwards, and between two commits

        def progress(phase: str, done: int, total: int, moment: str = moment) -> None:
            if ranks.rank == 1 and phase == moment:
                fail()

        attempt(f"at {moment}", progress)
    # a guard that says no on one rank undoes the edit on all
    result = editor().edit(
        whole, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks, guard=lambda: ranks.rank == 0
    )
    assert not result.kept
    assert all(torch.equal(old, new) for old, new in zip(before, read(), strict=True))
    try:
        editor().edit(whole, tokenizer(), FACTS[ranks.rank :], TEXTS, optimizers=optimizers, ranks=ranks)
    except ValueError as error:
        said["different facts"] = str(error)
    return said


@needs_deepspeed
@pytest.mark.parametrize("kind", [pytest.param("replicated", marks=pytest.mark.slow), "zero 3"])
def test_a_failure_on_one_rank_fails_the_edit_on_all(kind: str) -> None:
    first, second = run_ranks(failing_edits, 2, kind)
    assert len(first) == len(second) == 9
    for phase in first.keys() - {"different facts"}:
        assert first[phase] == "RankError: rank 1 failed: Failure: injected", phase
        assert second[phase] == "Failure: injected", phase
    assert "the facts must be the same on all ranks" in first["different facts"]
