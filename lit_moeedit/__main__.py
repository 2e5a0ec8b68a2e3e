"""The command ``lit-moeedit``, also as ``python -m lit_moeedit``."""

from __future__ import annotations

import signal
import sys

import lit_moeedit
from lit_moeedit.launched import end_with_launcher


def main() -> None:
    """Run the command, or print the version without the slow imports."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"lit-moeedit {lit_moeedit.__version__}\n")
        return
    end_with_launcher()
    try:
        from lit_moeedit import cli

        cli.main()
    except KeyboardInterrupt:  # while it is imported, which takes seconds
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
