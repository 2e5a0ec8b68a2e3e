"""The documentation: its examples run, its links lead somewhere, and the README has its two commands."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Language, number of lines before, and content of every fenced block that names a language."""
    for match in BLOCK.finditer(text):
        yield match[1], text[: match.start(2)].count("\n"), match[2]


def run(page: Path, languages: set[str]) -> dict[str, Any]:
    """Run the examples of a page from the first to the last in one namespace, and return it."""
    text, names = page.read_text(encoding="utf-8"), dict[str, Any](__name__=page.stem)
    runner, parser = doctest.DocTestRunner(verbose=False), doctest.DocTestParser()
    for language, line, code in blocks(text):
        if language == "pycon" and language in languages:
            example = parser.get_doctest(code, names, page.name, str(page), line)
            found: list[str] = []
            runner.run(example, out=found.append, clear_globs=False)
            assert not found, "".join(found)
            names |= example.globs
        elif language == "python" and language in languages:
            exec(compile("\n" * line + code, str(page), "exec"), names)
    return names


def anchors(text: str) -> set[str]:
    """Names of the headings, as links have them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


SHOWN = [page for page in PAGES if "```pycon" in page.read_text() and page.stem != "extending"]


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_examples_give_what_the_page_shows(page: Path) -> None:
    run(page, {"pycon"})


def test_the_page_on_extending_runs_as_it_stands() -> None:
    names = run(ROOT / "docs" / "extending.md", {"python", "pycon"})
    assert {names[name].__module__ for name in ("EachEditAlone", "DiagonalPenalty")} == {"extending"}


def test_a_solver_has_four_lines_and_a_preservation_six() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = "".join(code for language, _, code in blocks(text) if language == "python")
    found = {node.name: node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)}
    (solve,) = found["EachEditAlone"].body
    assert isinstance(solve, ast.FunctionDef) and len(solve.body) == 4
    assert sum(1 for line in ast.unparse(found["DiagonalPenalty"]).splitlines() if line) == 6


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_links_lead_somewhere(text: Path) -> None:
    for link in LINK.findall(text.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = text.parent / path if path else text
        assert target.exists(), f"{text.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{text.name} links to {link}"


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name, command in (("demo", "fit --config configs/atlas.yaml"), ("tests", "pytest")):
        (block,) = re.findall(rf"^<!-- {name} -->\n```bash\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
        assert command in block and "\n" not in block


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)$", index, re.MULTILINE))
    assert listed == {page.stem for page in PAGES} - {"index"}
