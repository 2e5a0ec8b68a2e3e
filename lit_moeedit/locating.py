"""The command ``locate``: the layers and the token at which facts are best edited."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.console import Console

from lit_moeedit.atomic_files import atomic_file, check_writable
from lit_moeedit.data.encoding import check_offsets
from lit_moeedit.data.facts import read_facts
from lit_moeedit.data.neutral import texts_to_preserve
from lit_moeedit.devices import find_device
from lit_moeedit.editing import Location
from lit_moeedit.editing import locate as search
from lit_moeedit.edits.folders import load_model
from lit_moeedit.pretrained import check_vocabulary, pretrained_tokenizer
from lit_moeedit.terminal import progress

log = logging.getLogger(__name__)


def locate(
    model: Path,
    facts: Path,
    preservation: Path | None = None,
    output: Path | None = None,
    trial_facts: int = 8,
    trace_facts: int = 32,
    places: int = 4,
    device: str = "auto",
    columns: dict[str, str | list[str]] | None = None,
) -> None:
    """Find the layers and the token at which facts are best edited in a model.

    A causal trace shows which layers' experts carry the facts. Then a few places are tried: some facts are edited
    there, measured, and the edit is undone. Nothing is written but the results. The settings at the end are for the
    editor in a config; "auto" for its layers and token does the same search when the first edit begins.

    Args:
        model: local folder of the model and its tokenizer, with weights in safetensors. No code in it is run.
        facts: a facts file.
        preservation: a text file with one document per line, on which the model must keep its behaviour. Without it a
            small neutral text is used, as by lit-moeedit edit.
        output: a folder for locate.json (everything that was measured) and locate.svg (the trace).
        trial_facts: maximum number of facts that are edited in a trial.
        trace_facts: maximum number of facts that are traced.
        places: maximum number of places of each token that are tried.
        device: auto (a GPU if there is one), cpu, cuda or cuda:1.
        columns: field names to column names of the facts file, such as '{target_new: new, paraphrases: [p1, p2]}'.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if the model, a fact, the device or a number cannot be used.
        OSError: if the output cannot be written.

    Example:
        lit-moeedit locate my-model facts.jsonl --preservation=text.txt --output=located
    """
    found_device = find_device(device)
    tokenizer = pretrained_tokenizer(model)
    check_offsets(tokenizer)
    known = read_facts(facts, columns=columns, tokenizer=tokenizer)
    texts = texts_to_preserve(preservation)
    if output is not None:
        check_writable(output / "locate.json")  # before the work
    loaded = load_model(model, device=found_device)
    check_vocabulary(tokenizer, loaded)
    with progress() as show:
        found = search(
            loaded,
            tokenizer,
            known,
            texts,
            trial_facts=trial_facts,
            trace_facts=trace_facts,
            places=places,
            progress=show,
        )
    _show(found, Console())
    if output is not None:
        _write(found, output)


def _show(found: Location, console: Console) -> None:
    if found.trace is not None:
        console.print(found.trace.table())
    console.print(found.table())
    seconds = ", ".join(f"{step} {value:.1f} s" for step, value in found.seconds.items())
    console.print(f"{found}; {seconds}", highlight=False)
    console.print("Settings of the editor:", found.yaml(), sep="\n", highlight=False, markup=False)


def _write(found: Location, output: Path) -> None:
    with atomic_file(output / "locate.json") as beside:
        beside.write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    try:
        figure = found.figure()
    except ModuleNotFoundError as error:
        log.warning("no locate.svg is written: %s", error)
        return
    with atomic_file(output / "locate.svg") as beside:
        figure.savefig(beside, format="svg")
