"""Renewals that are undone or never due: what is logged, recorded and tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.callbacks import KnowledgeEditing


@pytest.fixture
def fit(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    def fit(trainer: dict[str, Any] | None = None, **settings: Any) -> KnowledgeEditing:
        editing = KnowledgeEditing(tiny.editor(steps=12), **{"at": {"epoch": 1}, **settings})
        make_trainer(tmp_path, [editing], **{"max_epochs": 4, **(trainer or {})}).fit(tiny.module(), tiny.data())
        return editing

    return fit


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have one fact be lost before each renewal and all of them in it; returns the steps of the attempts."""
    lost, make, inside, steps = KnowledgeEditing._lost, KnowledgeEditing._make_anew, list[int](), list[int]()

    def make_anew(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(trainer.global_step), inside.append(1)
        try:
            return make(self, trainer, *args, **kwargs)
        finally:
            inside.pop()

    def found(self: Any, module: Any, facts: Any) -> list[str]:
        return [fact.key for fact in facts] if inside else lost(self, module, facts)[:1]

    monkeypatch.setattr(KnowledgeEditing, "_make_anew", make_anew)
    monkeypatch.setattr(KnowledgeEditing, "_lost", found)
    return steps


def test_an_undone_renewal_is_tried_again_after_the_interval(fit: Any, attempts: list[int]) -> None:
    editing = fit(renew_every_n_steps=4, renewal="anew")
    assert editing.renewals == 0 and attempts == [8, 12, 16]


def test_an_undone_renewal_is_none_in_the_log_and_on_the_curve(fit: Any, attempts: list[int], caplog: Any) -> None:
    with caplog.at_level("INFO", "lit_moeedit"):
        editing = fit(renew_at="end", renewal="all")
    assert editing.renewals == 0 and "a renewal was undone" in caplog.text
    assert "renewed edits at step" not in caplog.text
    assert not any(point.after == "renewal" for point in editing.survival.points)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"at": {"step": 16}}, 4),
        ({"at": "validation"}, 1),
        ({"min_routing_similarity": 1.0, "on_failure": "undo"}, 4),
    ],
    ids=["edited at the last step", "edited after the last step", "no edit is kept"],
)
def test_a_run_with_nothing_to_renew_does_not_warn_of_it(fit: Any, caplog: Any, settings: Any, epochs: int) -> None:
    fit({"max_epochs": epochs}, renew_at="end", renewal="all", **settings)
    assert "not renewed at the end" not in caplog.text
