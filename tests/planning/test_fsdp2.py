"""Plans of FSDP2: against runs of two processes, and by formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning.metered_run import differences


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_plan_says_what_a_run_takes(precision: str, tmp_path: Path) -> None:
    assert not (wrong := differences(None, precision, str(tmp_path))), "\n".join(wrong)
