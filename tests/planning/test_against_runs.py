"""Plans against runs of two processes that train and edit with DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning.metered_run import differences

pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("stage", "precision", "keeps"),
    [
        (3, "bf16-mixed", False),
        (3, "bf16-mixed", True),
        (3, "32-true", False),
        (2, "bf16-mixed", False),
        (1, "bf16-mixed", False),
        (1, "32-true", False),
        (0, "bf16-mixed", False),
    ],
)
def test_a_plan_says_what_a_run_takes(stage: int, precision: str, keeps: bool, tmp_path: Path) -> None:
    assert not (wrong := differences(stage, precision, str(tmp_path), keeps)), "\n".join(wrong)
