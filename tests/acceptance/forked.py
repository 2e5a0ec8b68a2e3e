"""The command in a forked process, as a console script runs it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_moeedit.cli import main as command


def run_and_exit(
    folder: Path, args: Sequence[str], environment: dict[str, str], prepare: Callable[[], object]
) -> NoReturn:
    """Run the command in this process, a forked one, and end it with the code of a console script.

    Args:
        folder: to run in.
        args: of the command.
        environment: variables to set.
        prepare: called before the command; what it raises ends the process as an error of the command does.
    """
    os.environ.update({"HF_HUB_OFFLINE": "1", **environment})
    os.chdir(folder)
    sys.argv = ["lit-moeedit", *args]
    code: Any = 0
    try:
        prepare()
        command()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        # nothing of the process that this one was forked from may run in it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))
