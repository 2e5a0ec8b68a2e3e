"""Several ranks edit together what one process would edit, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
STAGES = {"replicated": None, "zero 0": 0, "zero 1": 1, "zero 2": 2, "zero 3": 3}


def tokenizer() -> Any:
    return train_tokenizer([*TEXTS, *(f"{fact.prompt} {fact.target_new}" for fact in FACTS)], vocab_size=400)


def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from tests.conftest import _build

    whole = _build("qwen3_moe").to(dtype)
    if dtype == torch.bfloat16:
        whole.set_experts_implementation("eager")  # grouped_mm knows no bfloat16 of these sizes
    return whole


def editor(**settings: Any) -> Editor:
    usual = {
        "targets": TargetOptimizer(steps=4, learning_rate=0.5, stop=0.0),
        "contexts": ("", "Note:"),
        "token_budget": 64,
        "ridge": 0.1,
        "preserve": "covariance",
        "strength": 10.0,
    }
    return Editor(LAYERS, **{**usual, **settings})


@dataclass(frozen=True)
class Form:
    """How an edit differs from that of :func:`editor`, of all facts in float32."""

    settings: dict[str, Any] = field(default_factory=dict)
    facts: int = len(FACTS)
    dtype: torch.dtype = torch.float32


FORMS = {
    "covariance": Form(),
    "output": Form({"preserve": "output", "strength": None}),
    # a rank has nothing to do
    "one fact": Form({"contexts": ("",)}, facts=1),
    "gather": Form({"way": "gather"}),
    "bfloat16": Form(dtype=torch.bfloat16),
    "bfloat16, gather": Form({"way": "gather"}, dtype=torch.bfloat16),
}


def prepared(
    kind: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, list[Any], Callable[[], list[Tensor]]]:
    """A model, its optimizers, and a function that reads the experts' weights of the edited layers."""
    import deepspeed

    whole = model(dtype)
    stage = STAGES[kind]
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.0)
    if stage is not None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        _, optimizer, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)

    def read() -> list[Tensor]:
        chosen = [layer.down_proj for layer in check_editable(whole, LAYERS)]
        with deepspeed.zero.GatheredParameters(chosen, enabled=stage == 3):
            return [weight.detach().clone() for weight in chosen]

    return whole, [optimizer], read


def alone(form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before and after the edit of one process."""
    whole, edits = model(form.dtype), []
    for _ in range(2):
        edits.append([layer.down_proj.detach().clone() for layer in check_editable(whole, LAYERS)])
        if len(edits) < 2:
            editor(**form.settings).edit(whole, tokenizer(), FACTS[: form.facts], TEXTS)
    return edits[0], edits[1]


def together(kind: str, form: Form) -> dict[str, Any]:
    whole, optimizers, read = prepared(kind, form.dtype)
    ranks, before, facts = Ranks(), read(), FACTS[: form.facts]
    scores = evaluate(whole, tokenizer(), facts, ranks=ranks).metrics
    result = editor(**form.settings).edit(whole, tokenizer(), facts, TEXTS, optimizers=optimizers, ranks=ranks)
    return {"before": before, "after": read(), "change": result.relative_change, "scores": scores}


def all_cases(cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    return {(kind, name): together(kind, FORMS[name]) for kind, name in cases}


def check(found: list[dict[tuple[str, str], Any]]) -> None:
    for name in {name for _, name in found[0]}:
        form = FORMS[name]
        before, after = alone(form)
        # rounding differs with the padding of batches, and four steps of Adam multiply it
        close = 1e-4
        if form.dtype == torch.bfloat16:
            # so much that tokens go to other experts: compared with as many ranks that hold all of the weights
            after, close = found[0]["replicated", name]["after"], 1e-3
        scores = evaluate(model(form.dtype), tokenizer(), FACTS[: form.facts]).metrics
        for kind in (kind for kind, other in found[0] if other == name):
            for result in (results[kind, name] for results in found):
                for layer in range(len(LAYERS)):
                    assert torch.equal(result["before"][layer], before[layer])
                    size = (after[layer] - before[layer]).float().norm()
                    error = (result["after"][layer] - after[layer]).float().norm()
                    assert size > 0 and error / size < close, (kind, name)
                    assert torch.equal(result["after"][layer], found[0][kind, name]["after"][layer])
                assert result["change"] == found[0][kind, name]["change"]
                if form.dtype == torch.float32:  # summed in another order
                    torch.testing.assert_close(result["scores"], scores, rtol=1e-4, atol=1e-6, equal_nan=True)


USUAL = [(kind, "covariance") for kind in STAGES if kind != "zero 0"]
MORE = [("replicated", "output"), ("zero 3", "output"), ("zero 3", "one fact")]
FURTHER = [
    ("zero 0", "covariance"),
    ("zero 2", "one fact"),
    *((kind, "gather") for kind in STAGES),
    *((kind, name) for kind in STAGES for name in ("bfloat16", "bfloat16, gather")),
]


@needs_deepspeed
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, USUAL + MORE),
        pytest.param(2, FURTHER, marks=pytest.mark.slow),
        # four ranks are more than there are edits
        pytest.param(4, [("replicated", "covariance"), ("zero 3", "covariance")], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks, further forms", "4 ranks"],
)
def test_the_edit_does_not_depend_on_the_number_of_ranks(size: int, cases: list[tuple[str, str]]) -> None:
    check(run_ranks(all_cases, size, cases))


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
