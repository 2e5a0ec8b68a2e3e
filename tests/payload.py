"""A pickle that proves whether it was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Payload:
    """An object that makes a file when its pickle is loaded.

    Args:
        mark: The file.
    """

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")
