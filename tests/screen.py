"""A terminal of 80 columns that tests can look at: what stays on its screen after all cursor movements."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

COLUMNS, ROWS = 80, 50
_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|(.)", re.DOTALL)


def visible(output: str) -> list[str]:
    """Return the lines that a terminal shows after this output, those that have scrolled away included.

    It knows what progress bars use: carriage return, line feed, cursor up and down, and erasing.
    """
    lines, row, column, top = [""], 0, 0, 0

    def extend() -> None:
        nonlocal top
        while len(lines) <= row:
            lines.append("")
        top = max(top, len(lines) - ROWS)

    for match in _TOKEN.finditer(output):
        parameters, command, character = match.groups()
        count = int(parameters) if parameters and parameters.isdigit() else None
        if command == "A":
            row = max(top, row - (count or 1))
        elif command == "B":
            row += count or 1
        elif command == "G":
            column = (count or 1) - 1
        elif command == "K":
            lines[row] = "" if count == 2 else lines[row][:column]
        elif command == "J":
            lines[row:] = [lines[row][:column]]
        elif character == "\r":
            column = 0
        elif character == "\n":
            row += 1
        elif character is not None and character >= " ":
            if column == COLUMNS:
                row, column = row + 1, 0
                extend()
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
        extend()
    return [line.rstrip() for line in lines]


@contextmanager
def terminal() -> Iterator[list[str]]:
    """Let stdout and stderr of this process be a terminal; afterwards the list holds what was written to it."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    written, found = bytearray(), []

    def drain() -> None:
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # the other end is closed
                return
            written.extend(part)

    reader = threading.Thread(target=drain)
    reader.start()
    environment = {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    try:
        with (
            os.fdopen(child, "w", encoding="utf-8", buffering=1) as file,
            mock.patch.dict(os.environ, environment),
            mock.patch.multiple(sys, stdout=file, stderr=file),
        ):
            yield found
    finally:
        reader.join()
        os.close(parent)
        found.append(written.decode("utf-8", "replace"))
