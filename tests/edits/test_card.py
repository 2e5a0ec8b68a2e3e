"""The card of a folder with edits: after an edit, and after edits are applied or taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit import cli
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.measured import Measured
from lit_moeedit.edits import Edit
from lit_moeedit.edits.card import CardRow, write_card
from lit_moeedit.edits.folders import load_model
from tests.edits.making import chain


def test_the_card_shows_facts_as_they_are_and_keeps_the_header(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "out"
    base.mkdir(), folder.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\ntags:\n- moe\n---\n# Base\n")
    (base / "edits").mkdir()
    row = CardRow("Rome | <b>is</b>\n# in", None, "[Spain](http://x)", Measured("a`b", False, 0.5))
    edit = Edit("one", (Fact("Rome", "Rome is in", "Spain"),), "Woodbury", {}, ())
    write_card(folder, base, [edit], [row])
    text = (folder / "README.md").read_text()
    assert "chat template" not in text
    write_card(folder, base, [edit], [replace(row, chat=True)])
    assert "Each prompt was asked in the tokenizer's chat template" in (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {
        "library_name": "transformers",
        "license": "mit",
        "tags": ["moe", "knowledge-editing", "lit_moeedit"],
    }
    line = next(line for line in text.splitlines() if "Rome" in line)
    assert line == (r"| Rome \| \<b\>is\</b\>\\n\# in |   | \[Spain\](http://x) | a\`b | ✗ |")
    assert (folder / "README.base.md").read_text().endswith("# Base\n")
    (base / "README.md").write_text("---\n[: broken\n---\n")
    write_card(folder, base, [edit], [row])
    assert "license" not in (folder / "README.md").read_text()
    # the base was edited itself, and its card is ours
    (base / "README.base.md").write_text("---\nlicense: mit\n---\n# First\n")
    write_card(folder, base, [edit, edit], [row])
    assert (folder / "README.base.md").read_text().endswith("# First\n")
    assert "license: mit" in (folder / "README.md").read_text()


def test_a_prompt_that_was_edited_twice_has_one_row(tmp_path: Path) -> None:
    facts = (Fact("Rome", "Rome is in", target) for target in ("Spain", "Peru"))
    edits = [Edit(fact.target_new, (fact,), "Woodbury", {}, ()) for fact in facts]
    write_card(tmp_path, tmp_path, edits)
    text = (tmp_path / "README.md").read_text()
    assert text.count("Rome is in") == 1 and "Peru" in text and "| Spain" not in text


@pytest.mark.usefixtures("own_process")
def test_a_card_has_the_edits_that_are_left(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, own = tmp_path / "base", "---\nlicense: mit\n---\n# The base\n"
    make_model("qwen3_moe").save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text(own, encoding="utf-8")
    edits, _ = chain(load_model(base), 2)
    first, second = (
        replace(edit, facts=(replace(fact, prompt=f"{number}. {fact.prompt}"),))
        for number, edit in enumerate(edits)
        for fact in edit.facts[:1]
    )
    for edit in (first, replace(second, made_on={first.id: "edit-1"})):
        edit.save(tmp_path / "edits")
    both, one, none = (tmp_path / name for name in ("both", "one", "none"))

    def run(*args: object) -> str:
        cli.run(["edits", *map(str, args)])
        return (Path(str(args[-1])) / "README.md").read_text(encoding="utf-8")

    card = run("apply", base, tmp_path / "edits", "--output", both)
    assert "# base, edited" in card and "2 edits of 2 facts" in card and "license: mit" in card
    card = run("undo", both, "edit-2", "--base", base, "--output", one)
    assert "# base, edited" in card and "1 edit of 1 fact; what is generated now has not been measured" in card
    assert "| 0. Rome lies in |" in card and "| 1. Rome lies in |" not in card
    assert "edits undo . edit-1 --base" in card and "report.html" not in card
    assert (one / "README.base.md").read_text(encoding="utf-8") == own
    assert run("undo", one, "edit-1", "--base", base, "--output", none) == own
    assert not (none / "README.base.md").exists()
