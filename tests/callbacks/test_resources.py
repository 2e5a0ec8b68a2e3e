"""What callbacks find in a run, and do for all ranks of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.callbacks.resources import on_first_rank
from lit_moeedit.models import output_scale


def trainer(rank: int, sent: list[Any]) -> Any:
    """Of one of two ranks; what the first one sends, the other gets."""

    def broadcast(message: Any) -> Any:
        if rank == 0:
            sent.append(message)
        return sent[0]

    return SimpleNamespace(is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=broadcast))


@pytest.mark.parametrize("error", [OSError("no room"), ValueError("no number"), RuntimeError("no idea")])
def test_what_fails_on_the_first_rank_fails_on_all(error: Exception) -> None:
    sent: list[Any] = []

    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        on_first_rank(trainer(0, sent), work)
    assert caught.value is error
    with pytest.raises(OSError, match=f"the first rank failed: {type(error).__name__}: {error}"):
        on_first_rank(trainer(1, sent), work)


def test_only_the_first_rank_works() -> None:
    sent: list[Any] = []
    done: list[int] = []
    for rank in (0, 1):
        on_first_rank(trainer(rank, sent), lambda rank=rank: done.append(rank))
    assert done == [0] and sent == [None]


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        (["fit_start"], 1),
        (["fit_start", "fit_start"], 3),  # the second edit comes after the first one
        ([{"epoch": 1}], 2),  # the edit comes after optimizer steps
    ],
)
def test_layers_are_measured_again_only_if_weights_changed(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: list[Any], expected: int
) -> None:
    measured: list[Any] = []
    original = output_scale.output_scales
    monkeypatch.setattr(output_scale, "output_scales", lambda *args: measured.append(args) or original(*args))
    facts = tiny.corpus().edits
    editings = [
        KnowledgeEditing(tiny.editor(steps=1), [fact], at=at, name=f"editor_{i}", on_failure="keep")
        for i, (at, fact) in enumerate(zip(moments, facts, strict=False))
    ]
    make_trainer(tmp_path, editings, max_epochs=2, limit_train_batches=1).fit(tiny.module(), tiny.data())
    assert all(editing.applied_facts for editing in editings)
    assert len(measured) == expected
