"""The command ``plan``: a report of the memory, communication and work of a run, without running it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.editing import Editor
from lit_moeedit.editing.phrasings import CANDIDATES
from lit_moeedit.planning.dry_run import Budgets, Workload, empty_model, statements
from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.places import simulate_search
from lit_moeedit.planning.run_config import Run, read_run
from lit_moeedit.text import count


def plan(
    config: list[Path] | None = None,
    ranks: int | None = None,
    edits: int | None = None,
    card: float | None = None,
    prompt_tokens: int = 20,
    target_tokens: int = 3,
    questions: int = 13,
    texts: int | None = None,
    text_tokens: int = 512,
    train_tokens: int = 64,
    model: Path | None = None,
    json: Path | None = None,
) -> None:
    """Report what a run would take, phase by phase: memory, bytes sent between ranks, and floating-point operations.

    Nothing is loaded or downloaded. The run's own code runs with fake tensors, which have shapes and no elements, as
    the first of its ranks. Only tensors are counted. Memory of libraries, buffers of the allocator and of NCCL, and
    work space of kernels come on top. Copies for a rollback are counted as main memory, though a GPU keeps them while
    it has room. The report assumes that all experts get the same number of tokens, that targets need all of their
    steps, and that systems are solved without the float64 fallback. Renewals of edits and training steps with replay of
    edited facts (EditReplay) are phases of their own, compared with training steps.

    Args:
        config: a config of lit-moeedit fit; given several times, later ones overlay earlier ones.
        ranks: number of processes; by default that of the config.
        edits: number of facts to edit; by default that of the config's facts file or data.
        card: memory of a device in GB, to report which phases do not fit, and which token budgets auto would choose.
        prompt_tokens: length of a fact's prompt.
        target_tokens: length of a target.
        questions: number of prompts that an evaluation scores for each fact (CounterFact has 13).
        texts: number of preservation texts; by default that of the config's data.
        text_tokens: length of a preservation text, of which at most 512 tokens are read.
        train_tokens: length of a row of a training batch.
        model: a config.json of transformers, or a folder with one, in place of the config's model.
        json: path of a file for the same report as JSON.

    Raises:
        ValueError: if the config cannot be planned. The message gives the reason.
        FileNotFoundError: if there is no such config.

    Example:
        lit-moeedit plan --config=configs/atlas.yaml --text_tokens=12
    """
    if not config:
        raise ValueError("give --config, a config of lit-moeedit fit")
    # a plan computes on the CPU; DeepSpeed, which would otherwise look for devices, reads this when it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run = read_run(config, ranks, model)
    work = Workload(
        edits=_known(edits, run.edits, "edits", "a number of facts to edit"),
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        questions=questions,
        texts=_known(texts, run.texts if run.editor.needs_moments else 1, "texts", "a number of preservation texts"),
        text_tokens=text_tokens,
        rows=_known(None, run.rows, "data.init_args.batch_size", "a batch size"),
        row_tokens=train_tokens,
    )
    with ExitStack() as stack:
        # the editor would log values that fake tensors do not have
        logger = logging.getLogger("lit_moeedit.editing")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.WARNING)
        empty = stack.enter_context(empty_model(run.model, run.dtype))
        parameters = empty.num_parameters()
        run.module.model = empty
        room = None if card is None else card * 1e9
        costs, budgets, editors = simulate_search(run.module, run.editor, run.sharding, work, room, run.upkeep)
    console = Console()
    console.print(table(costs, run, parameters))
    for line in remarks(costs, run, work, budgets, editors, card):
        console.print(line, highlight=False)
    if json is not None:
        content = {
            "parameters": parameters,
            "sharding": asdict(run.sharding),
            "work": asdict(work),
            "layers": [list(editor.layers) for editor in editors],
            "token_budgets": asdict(budgets),
            "phases": {cost.phase: asdict(cost) for cost in costs},
            "renewals": run.upkeep.renewals,
        }
        with atomic_file(json) as beside:
            beside.write_text(dumps(content, indent=1) + "\n", encoding="utf-8")


def _known(given: int | None, configured: int | None, option: str, what: str) -> int:
    """Return a number from the command line or else the config."""
    number = configured if given is None else given
    if number is None:
        raise ValueError(f"the config does not have {what}: give --{option}")
    return number


def table(costs: Sequence[Cost], run: Run, parameters: int) -> Table:
    """Format costs as a table with a row for each phase."""
    sharding = run.sharding
    dtype = str(run.dtype).removeprefix("torch.")
    how = f"{sharding.ranks} rank(s), {sharding.name}"
    result = Table(title=f"{count(parameters)} parameters in {dtype}, {how}; per rank")
    columns = {
        "peak": [size(cost.peak) for cost in costs],
        "held before": [size(cost.held) for cost in costs],
        "main memory": [size(cost.host) for cost in costs],
        "sent": [size(cost.sent) for cost in costs],
        "TFLOP": [f"{cost.flops / 1e12:,.3g}" if cost.flops else "-" for cost in costs],
        "written": [size(cost.written) for cost in costs],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    result.add_column("phase", overflow="fold")
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    for cost, *cells in zip(costs, *columns.values(), strict=True):
        result.add_row(cost.phase, *cells)
    return result


def remarks(
    costs: Sequence[Cost],
    run: Run,
    work: Workload,
    budgets: Budgets,
    editors: Sequence[Editor],
    card: float | None = None,
) -> list[str]:
    """Describe the assumptions, the phase with the peak, and the phases that do not fit a device of ``card`` GB."""
    editor = run.editor
    texts = f"{work.texts:,} texts of {work.text_tokens} tokens" if editor.needs_moments else "no texts"
    layers = " or ".join(", ".join(map(str, editor.layers)) for editor in editors)
    if not run.editor.is_resolved:
        what = "tunes its editor" if editor.tune and editor.layers and editor.token != "auto" else "finds its place"
        layers += f"{', whichever costs more' if len(editors) > 1 else ''} (the run {what}; locate is an estimate)"
    highest = max(costs, key=lambda cost: cost.peak)
    lines = [
        f"Assumed: batches of {work.rows} x {work.row_tokens} tokens; {work.edits} facts of {work.prompt_tokens} + "
        f"{work.target_tokens} tokens after {len(editor.contexts)} context(s), {editor.targets.steps} steps for their "
        f"targets, {work.questions} questions each; {texts}; layers {layers}.",
        _budgets_line(budgets, run, card),
        f"The peak is that of: {highest.phase}, {size(highest.peak)} per rank.",
    ]
    for name, wanted, limited in (
        ("Further prompts", editors[0].phrasings, "features, solve and commit, and with them locate and renewals"),
        ("Further neutral prompts", editors[0].neutral_prompts, "targets, and with them locate and renewals"),
    ):
        if wanted:
            most, asked = (min(work.edits - 1, number) for number in (wanted, CANDIDATES * wanted))
            lines.append(
                f"{name}: at most {most} for each fact, of {asked} candidates. Only the model can tell how many there "
                f"are, so these are an upper limit: {limited}."
            )
    lines += run.upkeep.remarks({cost.phase: cost for cost in costs}, statements(work, editors[0], run.upkeep)[1])
    if card is not None:
        missing = [f"{cost.phase} ({size(cost.peak)})" for cost in costs if cost.peak > card * 1e9]
        fits = f"all phases fit ({highest.peak / card / 1e7:.0f} % of it)"
        verdict = f"too small for {', '.join(missing)}" if missing else fits
        lines.append(f"A device with {card:g} GB: {verdict}.")
    return lines


def _budgets_line(budgets: Budgets, run: Run, card: float | None) -> str:
    """List the token budgets, and which of them were chosen automatically."""
    given = {"forward": run.editor.token_budget, "targets": run.editor.targets.token_budget}
    parts = {"statistics and features": "forward", "targets": "targets", "evaluation": "evaluation"}
    named = [
        f"{name} {getattr(budgets, field):,}{' (auto)' if given.get(field, given['forward']) == 'auto' else ''}"
        for name, field in parts.items()
    ]
    hint = " Give --card for what auto would choose on a device." if card is None and "auto" in given.values() else ""
    return f"Tokens at a time: {', '.join(named)}.{hint}"


def size(number: int) -> str:
    """Format a number of bytes.

    Example:
        >>> size(0), size(1500), size(61_000_000_000)
        ('-', '1.5 kB', '61.0 GB')
    """
    if not number:
        return "-"
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
