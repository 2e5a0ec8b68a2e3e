"""The config that the command would run with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_moeedit.cli import run


def parsed(capsys: pytest.CaptureFixture[str], *configs: str | Path) -> Any:
    """The config that ``fit`` would run with."""
    with pytest.raises(SystemExit) as exit:
        run(args=["fit", *(f"--config={config}" for config in configs), "--print_config"])
    assert exit.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)
