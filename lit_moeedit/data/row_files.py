"""Rows of facts files: JSON lists, JSON lines and tables, read piece by piece in bounded memory.

Files are untrusted and may be larger than memory. At most a few rows are in memory, and a row may have at most
`ROW_LIMIT` bytes (in a table on all its lines together). Reading stops when the caller asks for no more rows.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import stat
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lit_moeedit.data.errors import FactError, short
from lit_moeedit.data.rows import Number
from lit_moeedit.text import MissingFileError, printable

ROW_LIMIT = 4 * 2**20
"""Maximum bytes of a row (characters in a `.json` list). The largest rows of published files have some 100 kB; a parsed
row may take thirty times its size in memory."""
_PIECE = 2**18
_LIMIT_TEXT = f"at most {ROW_LIMIT / 2**20:g} MiB in a row"
_SPACE = " \t\n\r"
_SOLID = re.compile(f"[^{_SPACE}]")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def load_rows(path: Path) -> Generator[tuple[int, object], None, None]:
    """Read a `.json` list, a `.jsonl`, `.csv` or `.tsv` file row by row.

    Yields:
        The number of a row and the row. Numbers count from 1; in files of lines they are the line where the row
        begins, so blank lines count. If a row cannot be read but later rows can, its `FactError` takes its place. A
        row of a table is an object with the names of the first line as keys: an empty cell is `None`, and columns
        without a name and rows of empty cells are left out.

    Raises:
        FactError: The kind, suffix, encoding or syntax of the file is not as expected, or it holds no rows. Earlier
            rows have been yielded by then, because a file is read only once.
        MissingFileError: There is no such file.
        OSError: The file cannot be opened or read.
    """
    file, suffix = str(path), path.suffix.lower()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise MissingFileError(path, "facts file") from error
    except ValueError as error:  # a NUL byte
        raise FactError(file, None, None, f"is not a path ({error}); expected the name of a file") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
        raise FactError(file, None, None, f"is {kind}; expected a regular file")
    if suffix not in (".json", ".jsonl", *_DELIMITERS):
        expected = "expected '.json', '.jsonl', '.csv' or '.tsv'"
        raise FactError(file, None, None, f"has the suffix {short(path.suffix)}; {expected}")
    with path.open("rb", buffering=2**18) as stream:
        _skip_mark(file, stream)
        if suffix == ".json":
            rows = _Elements(file, stream).rows()
        elif suffix == ".jsonl":
            rows = _read_lines(file, stream)
        else:
            rows = _read_table(file, stream, _DELIMITERS[suffix])
        number = 0
        for number, row in rows:
            yield number, row
    if not number:
        raise FactError(file, None, None, "holds no rows; expected at least one fact")


def _skip_mark(file: str, stream: BinaryIO) -> None:
    """Skip the byte order mark of UTF-8, and refuse a file that begins like one of another encoding."""
    start = stream.read(4)
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            raise FactError(file, None, None, f"begins with the byte order mark of {encoding}; expected a UTF-8 file")
    if b"\0" in start:
        raise FactError(
            file, None, None, "begins with NUL bytes, as UTF-16 without a mark would; expected a UTF-8 file"
        )
    stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)


def _not_utf8(file: str, row: int | None, line: int, error: UnicodeDecodeError) -> FactError:
    found = f"byte {error.object[error.start]:#04x} in line {line}"
    return FactError(file, row, None, f"is not valid UTF-8 ({found}); expected a UTF-8 file")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):  # otherwise the last one would win silently
        raise ValueError(f"the name {short(_repeated([name for name, _ in pairs]))} occurs twice in an object")
    return content


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=Number)


def _json_problem(error: ValueError | RecursionError, line: int | None = None) -> str:
    """Describe why a text is not JSON; `line` is the line of the error, if rows are not lines."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}" if line is None else f"{error.msg} at line {line}"
    # integers of thousands of digits, deeply nested lists, repeated names
    return str(error) if line is None else f"{error}, from line {line} on"


class _Elements:
    """The elements of a JSON list, decoded one by one from a buffer of little more than one element."""

    def __init__(self, file: str, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._buffer = ""
        self._position = 0
        self._line = 1  # of the buffer's first character
        self._number: int | None = None

    def rows(self) -> Iterator[tuple[int, object]]:
        """Yield every element with its number, from 1."""
        first = self._next()
        if first != "[":
            found = f"begins with {first!r}" if first else "is empty"
            hint = " (one object per line needs the suffix '.jsonl')" if first == "{" else ""
            raise FactError(self._file, None, None, f"{found}; expected a list of objects{hint}")
        number, last = 0, first
        while last != "]":
            self._position += 1
            if self._next() == "]" and last == "[":
                break
            number += 1
            self._number = number
            yield number, self._element()
            last = self._next()
            if last not in (",", "]"):
                found = f"{last!r} after an element" if last else "the file ends within the list"
                raise self._error(f"is not valid JSON ({found} at line {self._line_at(self._position)})")
        self._position += 1
        self._number = None
        if last := self._next():
            raise self._error(f"holds {last!r} after the list, at line {self._line_at(self._position)}", "nothing")

    def _error(self, message: str, expected: str = "a list of objects") -> FactError:
        return FactError(self._file, self._number, None, f"{message}; expected {expected}")

    def _line_at(self, position: int) -> int:
        return self._line + self._buffer.count("\n", 0, position)

    def _more(self) -> bool:
        """Drop decoded text, and read at least as many bytes as characters are left; false at the end of the file."""
        self._line = self._line_at(self._position)
        rest = self._buffer[self._position :]
        data = self._stream.read(max(_PIECE, len(rest)))
        try:
            self._buffer, self._position = rest + self._decode(data, not data), 0
        except UnicodeDecodeError as error:
            lines = rest.count("\n") + error.object[: error.start].count(b"\n")
            raise _not_utf8(self._file, None, self._line + lines, error) from error
        return bool(data)

    def _next(self) -> str:
        """Move to the next character that is not white space and return it; `""` at the end of the file."""
        while True:
            found = _SOLID.search(self._buffer, self._position)
            self._position = found.start() if found else len(self._buffer)
            if found or not self._more():
                return found[0] if found else ""

    def _element(self) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
                problem = None
                # a number may continue after the end of the buffer
                cut = isinstance(value, int | float | Number) and self._buffer[end : end + 1] not in (*_SPACE, ",", "]")
            except json.JSONDecodeError as error:
                # an error at the end of the buffer may vanish with more text; the longest literal is -Infinity
                end = len(self._buffer)
                cut = error.msg.startswith("Unterminated string") or error.pos > end - len("-Infinity ")
                problem = _json_problem(error, self._line_at(error.pos))
            except (ValueError, RecursionError) as error:
                raise self._error(
                    f"is not valid JSON ({_json_problem(error, self._line_at(self._position))})"
                ) from error
            length = end - self._position
            if length > ROW_LIMIT and (cut or problem is None):
                found = f"is longer than {ROW_LIMIT / 2**20:g} MiB (from line {self._line_at(self._position)} on)"
                raise self._error(found, _LIMIT_TEXT)
            if cut and self._more():
                continue
            if problem is not None:
                raise self._error(f"is not valid JSON ({problem})")
            self._position += length  # not `end`: _more() may have moved the position
            return value


def _read_lines(file: str, stream: BinaryIO) -> Iterator[tuple[int, object]]:
    for number, line in _lines(file, stream):
        if isinstance(line, FactError):
            yield number, line
        elif line.strip():
            try:
                yield number, _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                found = f"is not valid JSON ({_json_problem(error)}); expected one object per line"
                yield number, FactError(file, number, None, found)


def _lines(file: str, stream: BinaryIO) -> Iterator[tuple[int, str | FactError]]:
    """Yield numbered lines, split at line feeds only: texts may contain other line ends of Unicode."""
    number = 0
    while data := stream.readline(ROW_LIMIT + 1):
        number += 1
        if len(data) > ROW_LIMIT:
            size = len(data)
            while not data.endswith(b"\n") and (data := stream.readline(_PIECE)):
                size += len(data)
            found = f"is a line of {size / 2**20:,.1f} MiB; expected {_LIMIT_TEXT}"
            yield number, FactError(file, number, None, found)
            continue
        try:
            yield number, data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, number, number, error) from error


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_table(file: str, stream: BinaryIO, delimiter: str) -> Iterator[tuple[int, object]]:
    def lines() -> Iterator[str]:
        for _, line in _lines(file, stream):
            if isinstance(line, FactError):
                raise line
            # a quoted cell may continue over any number of lines
            if stream.tell() - start > ROW_LIMIT:
                found = (
                    f"is longer than {ROW_LIMIT / 2**20:g} MiB (a quote that is not closed?); expected {_LIMIT_TEXT}"
                )
                raise FactError(file, number, None, found)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: Sequence[str] = ()
    while True:
        number, start = reader.line_num + 1, stream.tell()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = (
                f"is not valid CSV ({printable(str(error))}); expected cells separated by {delimiter!r}, quoted by '\"'"
            )
            raise FactError(file, number, None, found) from error
        if not any(map(str.strip, cells)):
            continue
        if not header:
            header = [name.strip() for name in cells]
            if (wrong := _repeated([name for name in header if name])) is not None:
                found = f"has the column {short(wrong)} twice"
                raise FactError(file, number, None, f"{found}; expected the names of the columns, each once")
            if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
                found = f"has a single column {short(header[0])}; expected cells separated by {delimiter!r}"
                raise FactError(file, number, None, found)
        elif len(cells) != len(header):
            found = f"has {len(cells)} cells; expected {len(header)} as in the first line"
            yield number, FactError(file, number, None, found)
        else:
            yield number, {name: cell or None for name, cell in zip(header, cells, strict=True) if name}
