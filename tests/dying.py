"""A rank that dies in the middle of a commit."""

from __future__ import annotations

import os
import signal
from typing import Any

from lit_moeedit.sharding.commit import Commit


def rank_1_dies_in_the_second_layer() -> None:
    """Let rank 1 die when it has changed the first of its experts in the second layer of a commit."""
    original, written = Commit._add_block, []

    def write(commit: Any, *args: Any) -> None:
        original(commit, *args)
        written.append(commit.weight)
        if os.environ["RANK"] == "1" and len({id(weight) for weight in written}) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Commit._add_block = write  # type: ignore[method-assign]
