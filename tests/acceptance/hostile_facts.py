"""Run ``lit-moeedit facts check`` on broken and hostile files, and measure what memory large ones take.

On Linux, from the root of the repository, with the package installed (three minutes, 0.6 GB of disk):

    python -m tests.acceptance.hostile_facts

Writes ``hostile_facts.json`` and ``hostile_facts.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_moeedit.cli import run
from lit_moeedit.data.corpus import train_tokenizer
from lit_moeedit.text import printable

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

ROW: dict[str, Any] = {"subject": "Rome", "prompt": "Rome lies in", "target_new": "Spain", "target_true": "Italy"}
LINE = json.dumps(ROW)
TEXT = f"[\n{LINE},\n{LINE.replace('Rome', 'Oslo')}\n]\n"


def subject(name: str, **others: str) -> str:
    return json.dumps([{**ROW, "subject": name, "prompt": f"{name} lies in", **others}], ensure_ascii=False)


FILES: list[tuple[str, str, str | bytes | Callable[[Path], Any]]] = [
    ("truncated JSON", "cut.json", TEXT[:90]),
    ("truncated JSON Lines", "cut.jsonl", f"{LINE}\n{LINE[:40]}"),
    ("a comma too many", "comma.json", f"[{LINE},]"),
    ("text behind the list", "behind.json", f"[{LINE}] and more"),
    ("JSON Lines named .json", "lines.json", f"{LINE}\n{LINE}\n"),
    ("an object at the top", "object.json", '{"data": []}'),
    ("empty file", "empty.json", b""),
    ("no rows", "none.json", "[]"),
    ("100,000 nested lists", "deep.json", "[" * 100_000),
    ("a number of 10,000 digits", "digits.json", "[" + "9" * 10_000 + "]"),
    ("a name twice in an object", "twice.jsonl", LINE[:-1] + ', "subject": "Oslo"}'),
    ("NaN as a target", "nan.json", f"[{LINE.replace(chr(34) + 'Spain' + chr(34), 'NaN')}]"),
    ("Latin-1", "latin.json", TEXT.replace("Oslo", "Malmö").encode("latin-1")),
    ("UTF-16 with its mark", "utf16.json", TEXT.encode("utf-16")),
    ("UTF-16 without a mark", "utf16le.json", TEXT.encode("utf-16-le")),
    ("UTF-8 with a mark", "mark.json", TEXT.encode("utf-8-sig")),
    ("half of a surrogate pair", "half.json", '[{"subject": "\\ud83d", "prompt": "\\ud83d is", "target_new": "a"}]'),
    ("zeros", "zeros.json", b"\0" * 1000),
    ("a NUL byte in a subject", "nul.json", subject("Ro\\u0000me").replace("\\\\u", "\\u")),
    ("a raw NUL byte in JSON", "raw.jsonl", LINE.replace("Rome", "Ro\0me")),
    ("terminal codes in a subject", "ansi.json", subject("Ro\\u001b[2Jme").replace("\\\\u", "\\u")),
    ("terminal codes in a field's name", "ansi_field.json", '[{"\\u001b[2J": 1}]'),
    ("direction overrides in a subject", "override.json", subject("\u202eemoR\u202c")),
    ("HTML in a subject", "html.json", subject("<script>alert(1)</script>")),
    ("BOS and EOS in a subject", "bos.json", subject("<s>Rome</s>")),
    ("EOS as a target", "eos.json", subject("Rome", target_new="</s>")),
    ("right-to-left text", "arabic.json", subject("القاهرة")),
    ("emoji of several parts", "emoji.json", subject("👩🏽\u200d🚀")),
    ("a subject that is not in its prompt", "absent.json", json.dumps([{**ROW, "subject": "Oslo"}])),
    ("a subject in another normalisation", "nfd.json", json.dumps([{**ROW, "subject": "é", "prompt": "e\u0301 is"}])),
    ("a target that is true", "true.json", json.dumps([{**ROW, "target_new": "Italy "}])),
    ("contradicting rows", "contradiction.json", json.dumps([ROW, {**ROW, "target_new": "Peru"}])),
    ("texts of a million letters", "long.json", subject("x" * 10**6)),
    ("a row of 5 MiB", "row.json", json.dumps([{**ROW, "paraphrases": ["x"] * 10**6}])),
    ("a million broken values", "values.jsonl", json.dumps({**ROW, "paraphrases": [0] * 10**6})),
    ("unknown fields only", "unknown.json", '[{"question": "?", "answer": "!"}]'),
    ("CSV with an open quote", "quote.csv", 'subject,prompt,target_new\n"Rome,Rome lies in,Spain\n'),
    ("CSV with semicolons", "semicolon.csv", "subject;prompt;target_new\nRome;Rome lies in;Spain\n"),
    ("CSV with a column twice", "columns.csv", "subject,prompt,prompt\na,b,c\n"),
    ("CSV with a short row", "short.csv", "subject,prompt,target_new\nRome,Rome lies in\nOslo,Oslo is,Peru\n"),
    ("Parquet", "facts.parquet", b"PAR1"),
    ("gzip named .jsonl", "facts.jsonl", b"\x1f\x8b\x08\x00" + bytes(range(256))),
    ("no such file", "missing.json", lambda path: None),
    ("a directory", "directory.json", Path.mkdir),
    ("a pipe", "pipe.json", os.mkfifo),
    ("a link to itself", "link.json", lambda path: path.symlink_to(path.name)),
    ("a file that may not be read", "secret.json", lambda path: (path.write_text(TEXT), path.chmod(0))),
    ("terminal codes in the file's name", "\x1b[2J.txt", b""),
    ("a NUL byte in the file's name", "a\0.json", lambda path: None),
]


def say(name: str, options: list[str]) -> tuple[int, list[str]]:
    """Exit code and what was said: the last error line, or else problems and remarks."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            run(["facts", "check", name, *options])
            code, error = 0, ""
        except SystemExit as exit:
            code, error = (1, exit.code) if isinstance(exit.code, str) else (int(exit.code or 0), "")
    lines = [line.strip() for line in out.getvalue().splitlines()]
    told = [f"{a} {b}" for a, b in itertools.pairwise(lines) if a.startswith("Problem")]
    told += [line for line in lines if line.startswith("Remark")]
    usable = next((line for line in lines if "usable facts" in line), "")
    said = [error.removeprefix("lit-moeedit facts check: ")] if error else [usable]
    return code, [*said, *told]


WATCHED = """
import sys
from pathlib import Path
from lit_moeedit.data.row_files import load_rows
def peak():  # the highest since it was reset, in KiB
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
rows = problems = 0
for _, row in load_rows(Path(sys.argv[1])):
    rows += 1
    problems += not isinstance(row, dict)
sys.stdout.write(f"{rows} {problems} {(peak() - before) / 1024}")
"""


def large(kind: str, path: Path, size: int) -> dict[str, Any]:
    """Write a file of about ``size`` bytes and read it in a process of its own; memory in MiB above that before."""
    table = path.suffix == ".csv"
    with path.open("wb") as stream:
        if kind == "one line":
            stream.write(b'{"subject": "')
            stream.truncate(size)  # zeros, which take no place on the disk
            stream.seek(size)
            stream.write(f"\n{LINE}\n".encode())
        else:
            stream.write(b"subject,prompt,target_new\n" if table else b"[" * (path.suffix == ".json"))
            row = ",".join(["Rome", f"Rome {'x' * 1000}", "Spain"]) if table else json.dumps({**ROW, "x": "x" * 1000})
            comma = b"," if path.suffix == ".json" else b""
            block = (comma + row.encode() + b"\n") * 1000
            stream.write(block[len(comma) :])
            while stream.tell() < size:
                stream.write(block)
            stream.write(b"]" * (path.suffix == ".json"))
    written = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", WATCHED, str(path)], capture_output=True, text=True, check=True)
    rows, problems, grown = done.stdout.split()
    path.unlink()
    return {"kind": kind, "suffix": path.suffix, "MiB": written / 2**20, "rows": int(rows), "problems": int(problems),
            "memory MiB": float(grown)}  # fmt: skip


def check_files() -> list[dict[str, Any]]:
    """Write every hostile file into a folder of its own and check it; returns exit codes and messages."""
    os.environ["COLUMNS"] = "200"
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        train_tokenizer([TEXT, "القاهرة 👩🏽\u200d🚀 é"] * 3, 400).save_pretrained("tokenizer")
        for title, name, content in FILES:
            if name == "secret.json" and os.geteuid() == 0:  # who may read everything
                continue
            path = Path(name)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
            code, said = say(name, ["--tokenizer", "tokenizer"])
            found.append({"input": title, "exit": code, "said": said})
    return found


def measure_memory(size: int) -> list[dict[str, Any]]:
    """Read large files of every format; one of a single line has twice the ``size`` in bytes."""
    rows = [
        ("one line", ".jsonl", 2 * size),
        *(("rows of 1 kB", suffix, size) for suffix in (".json", ".jsonl", ".csv")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        return [large(kind, Path(folder) / f"large{suffix}", length) for kind, suffix, length in rows]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--size", type=int, default=2**29, help="bytes of a large file; a line has twice as many")
    arguments = parser.parse_args()
    found, memory = check_files(), measure_memory(arguments.size)
    lines = ["| input | exit code | what is said |", "| --- | --- | --- |"]
    for one in found:
        said = "<br>".join(f"`{printable(line).replace('|', '¦')[:230]}`" for line in one["said"])
        lines.append(f"| {one['input']} | {one['exit']} | {said} |")
    lines += ["", "| large file | MiB | rows | of them unusable | memory for reading, MiB |", "|" + " --- |" * 5]
    lines += [
        f"| {one['suffix']}, {one['kind']} | {one['MiB']:,.0f} | {one['rows']:,} | {one['problems']:,} "
        f"| {one['memory MiB']:.1f} |"
        for one in memory
    ]
    text = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = json.dumps({"inputs": found, "memory": memory}, indent=2)
    (arguments.output / "hostile_facts.json").write_text(results + "\n", encoding="utf-8")
    title = "`python -m tests.acceptance.hostile_facts`\n\n"
    (arguments.output / "hostile_facts.md").write_text(title + text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
