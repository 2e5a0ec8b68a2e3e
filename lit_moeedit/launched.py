"""Ranks that the first one has launched, and that must not outlive it."""

from __future__ import annotations

import logging
import os
import threading
import time

log = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two looks."""
LAUNCHER = "LIT_MOEEDIT_LAUNCHER"
"""Environment variable with the process id of the first rank, for those that it launches."""


def end_with_launcher() -> None:
    """End this process when the process of the first rank that launched it has ended, however that ended.

    A launcher that is killed while its ranks start would leave them waiting for it for half an hour. Only ranks that
    Lightning launched from the command of this package are watched: those of other launchers may outlive them.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LAUNCHER] = str(os.getpid())
    elif os.environ.get(LAUNCHER) == str(os.getppid()):
        threading.Thread(target=_look, args=(os.getppid(),), name="lit_moeedit-launcher", daemon=True).start()


def _look(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    log.critical("the process that launched this rank has ended; this one ends, too")
    os._exit(1)
