"""Arbitrary bytes as facts files and as prompts, compared with a simpler reader of the whole file.

Run from the root of the repository for as long as wished, coverage-guided where atheris is installed:

    python -m tests.data.fuzzing readers --seconds 300 --engine atheris
    python -m tests.data.fuzzing tokens --seconds 300 --engine mutation
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "atheris" in sys.argv:
    import atheris

    instrumented: Any = atheris.instrument_imports(include=["lit_moeedit.data"])
else:
    instrumented = nullcontext()
with instrumented:
    from lit_moeedit.data import check, row_files
    from lit_moeedit.data.encoding import encode, join, subject_span
    from lit_moeedit.data.facts import Checker, FactError, read_facts
    from lit_moeedit.data.rows import Number
from tests.data.rows import ROWS
from tests.data.tokenizers import KINDS, tokenizer

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SPECIAL = ("$A", "<s> $A", "<s> $A </s>")
_UNDECIDED = object()


@contextmanager
def pieces_of(size: int) -> Iterator[None]:
    """Read files in pieces of ``size`` bytes, to cut texts, numbers and letters at every place."""
    before = row_files._PIECE
    row_files._PIECE = size
    try:
        yield
    finally:
        row_files._PIECE = before


def read_bytes(path: Path, data: bytes, piece: int) -> None:
    """Write `data` to a facts file and read it in every way; fail on anything but facts and named problems."""
    path.write_bytes(data)
    with pieces_of(piece):
        rows, problem = [], None
        try:
            with closing(row_files.load_rows(path)) as loaded:
                rows = list(loaded)
        except FactError as error:
            problem = error
            named(error, path)
        compare(path.suffix, data, [row for _, row in rows], problem)
        facts = []
        try:
            facts = read_facts(path, strict=False)
        except FactError as error:
            named(error, path)
        for fact in facts:
            assert fact.subject and fact.subject in fact.prompt and fact.target_new != fact.target_true
            assert subject_span(fact.prompt, fact.subject)[0] >= 0
            for remark in check.remarks(fact):
                assert remark.isprintable()
        checker, summary = Checker(str(path), None, None), check.Summary()
        try:
            for number, row in rows:
                summary.rows += 1
                summary.add(number, list(checker.check(number, row)))
        except FactError as error:
            named(error, path)
        for line in summary.lines(checker):
            assert line.isprintable(), line
        if problem is None and facts:
            assert summary.facts == len(facts)


def named(error: FactError, path: Path) -> None:
    """Check that an error names the file and the expected value, in printable lines."""
    message = str(error)
    assert str(path) in message and all(line.isprintable() for line in message.split("\n")), message
    for problem in getattr(error, "problems", [error]):
        assert "; expected " in problem.message and len(problem.message) < 1500, problem


def compare(suffix: str, data: bytes, rows: list[object], problem: FactError | None) -> None:
    """Compare the rows with those of the whole file read at once."""
    expected = whole(suffix, data)
    if expected is _UNDECIDED:
        return
    if expected is None:
        assert problem is not None, "something else than what the file should hold was read"
    else:
        assert isinstance(expected, list)
        good = [row for row in rows if not isinstance(row, FactError)]
        assert repr(good) == repr(expected), (good, expected)  # repr: nan is not nan
        assert (problem is None) == bool(rows), problem


def whole(suffix: str, data: bytes) -> object:
    """Read the rows of a file with the standard library alone; `None` if there is no such file."""
    if b"\0" in data[:4]:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if suffix == ".json":
        try:
            content = json.loads(text, object_pairs_hook=once, parse_float=Number)
        except (ValueError, RecursionError):
            return None
        return content if isinstance(content, list) else None
    if suffix == ".jsonl":
        found = []
        for line in text.split("\n"):
            try:
                found += [json.loads(line, object_pairs_hook=once, parse_float=Number)] if line.strip() else []
            except (ValueError, RecursionError):
                continue
        return found
    try:
        table = list(
            csv.reader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t", strict=True)
        )
    except csv.Error:
        return None
    table = [cells for cells in table if any(cell.strip() for cell in cells)]
    header = [name.strip() for name in table[0]] if table else []
    names = [name for name in header if name]
    if len(set(names)) < len(names) or (len(header) == 1 and set(header[0]) & set(",;|\t")):
        return None
    # a carriage return alone ends a line for the module's own reader of files, but not for ours
    if "\r" in text.replace("\r\n", ""):
        return _UNDECIDED
    return [
        {name: cell or None for name, cell in zip(header, cells, strict=True) if name}
        for cells in table[1:]
        if len(cells) == len(header)
    ]


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def find_token(kind: str, special: str, before: str, subject: str, after: str, target: str) -> bool:
    """Hold the edit token against a definition without offsets; whether there was something to compare.

    With the edit token, the text that the ids decode to has all of the subject; without it, not.
    """
    tok = tokenizer(kind, special)
    subject, prompt, target = subject.strip(), f"{before}{subject.strip()}{after}".strip(), target.strip()
    # what begins with a mark is a part of the letter before it, see the tests of what is refused
    if not subject or not normal(tok, subject).strip() or unicodedata.category(subject[0]).startswith("M"):
        return False
    text = join(prompt, target)
    if set(tok.all_special_ids) & set(tok(text, add_special_tokens=False)["input_ids"]):
        return False
    try:
        (found,) = encode(tok, [prompt], [target], [subject])
    except ValueError as error:
        message = str(error)
        # a tokenizer without words may leave the target no beginning of its own, one that folds letters no target
        shares = message.startswith("one token holds the end of the prompt") and kind == "byte level, joined"
        mixed = message.startswith("the tokenizer does not separate the last token") and kind == "unigram"
        assert shares or mixed or ("has no token of its own" in message and not normal(tok, target).strip()), message
        return False
    _, end = subject_span(prompt, subject)
    assert found.edit_token is not None and found.edit_token < max(found.target_start, 1)
    wanted = normal(tok, text[:end])
    # elsewhere the end of the subject is in the middle of a composed letter
    if wanted + normal(tok, text[end:]) != normal(tok, text) or decoded(tok, found.ids) != normal(tok, text):
        return False
    assert decoded(tok, found.ids[: found.edit_token + 1]).startswith(wanted)
    assert not decoded(tok, found.ids[: found.edit_token]).startswith(wanted)
    return True


def normal(tok: Any, text: str) -> str:
    """Normalize the text as the tokenizer does, with spaces instead of ▁."""
    normaliser = tok.backend_tokenizer.normalizer
    if normaliser is None:
        return text
    changed = normaliser.normalize_str(text)
    return changed.removeprefix("▁").replace("▁", " ") if "▁" in changed else changed


def decoded(tok: Any, ids: list[int]) -> str:
    """Decode ids, without the space before the text and without an incomplete last character."""
    text = tok.decode(ids, skip_special_tokens=True)
    if getattr(tok.backend_tokenizer.pre_tokenizer, "add_prefix_space", False):
        text = text.removeprefix(" ")
    return text.rstrip("\ufffd")


# --- engines ---------------------------------------------------------------------------------------------------------


def one_file(folder: Path) -> Callable[[bytes], bool]:
    """Make a function that takes bytes as a file; the first two choose the suffix and the size of the pieces."""

    def run(data: bytes) -> bool:
        if len(data) > 2:
            read_bytes(folder / f"facts{SUFFIXES[data[0] % 4]}", data[2:], 1 + data[1] % 40)
        return len(data) > 2

    return run


def one_prompt(data: bytes) -> bool:
    """Take bytes as texts around a subject; the first two choose the tokenizer."""
    if len(data) < 3:
        return False
    texts = data[2:].decode("utf-8", "ignore").replace("▁", "").replace("\ufffd", "").split("|")
    before, subject, after, target = [*texts, "", "", "", ""][:4]
    return find_token(
        list(KINDS)[data[0] % len(KINDS)], SPECIAL[data[1] % len(SPECIAL)], before, subject, after, target
    )


def seeds(target: str) -> list[bytes]:
    """Make the initial inputs of the engines: a file of every format and suffix, or prompts."""
    if target == "tokens":
        texts = ["The |Oslo| lies in|Peru", "|👩\u200d🚀|👩🏽|a", "é|Co\u0302te|\u0301x|½ﬁ", "|ירושלים|: القاهرة|東"]
        return [bytes([kind, kind]) + text.encode() for text in texts for kind in range(len(KINDS))]
    found = []
    for row in ROWS.values():
        found.append(b"\0\5" + json.dumps([row, row], ensure_ascii=False).encode())
        found.append(b"\1\5" + "\n".join([json.dumps(row)] * 2).encode())
    table = (
        'subject,prompt,target_new,target_true,paraphrases\nRome,"Rome, it\nis in",Spain,Italy,\nOslo,{} is,Peru,,x\n'
    )
    return [
        *found,
        b"\2\3" + table.encode(),
        b"\3\3" + table.replace(",", "\t").encode(),
        b'\0\0\xef\xbb\xbf[1.5e3,"\\ud83d\\ude00"]',
    ]


def mutated(draw: random.Random, pool: list[bytes]) -> bytes:
    """Change, remove, repeat or insert a few bytes."""
    data = bytearray(draw.choice(pool))
    words = [
        b"\0",
        b"\xff",
        b"\x1b[2J",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\\u",
        b"\\",
        b"\n",
        b"\xe2\x80\xae",
        b"|",
    ]
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[at : at + draw.randint(1, 8)] = b""
            case 1:
                data[at:at] = draw.choice(words)
            case 2:
                data[at:at] = data[at : at + draw.randint(1, 30)]
            case 3:
                other = draw.choice(pool)
                start = draw.randrange(len(other))
                data[at:at] = other[start : start + draw.randint(1, 30)]
            case 4 if at < len(data):
                data[at] = draw.randrange(256)
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=["readers", "tokens"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--engine", choices=["atheris", "mutation"], default="mutation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = one_file(folder) if arguments.target == "readers" else one_prompt
        pool = seeds(arguments.target)
        if arguments.engine == "atheris":
            corpus = folder / "corpus"
            corpus.mkdir()
            for number, data in enumerate(pool):
                (corpus / str(number)).write_bytes(data)
            options = [
                f"-max_total_time={arguments.seconds}",
                f"-seed={arguments.seed + 1}",
                "-max_len=4096",
                f"-artifact_prefix={folder}/",
            ]

            def without_result(data: bytes) -> None:
                run(data)

            atheris.Setup([sys.argv[0], *options, str(corpus)], without_result)
            atheris.Fuzz()
        draw, ran, compared, end = random.Random(arguments.seed), 0, 0, time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            data = mutated(draw, pool)
            try:
                compared += run(data)
            except BaseException:
                sys.stderr.write(f"after {ran} inputs: {data!r}\n")
                raise
            ran += 1
        sys.stdout.write(
            f"{arguments.target}: {ran} inputs in {arguments.seconds} s, {compared} compared, nothing found\n"
        )


if __name__ == "__main__":
    main()
