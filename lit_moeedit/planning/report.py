"""The command ``plan``: what a run would take, before anything of it is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_moeedit.atomic_files import appearing
from lit_moeedit.planning.dry_run import Budgets, Workload, empty_model, rehearse
from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.run_config import Run, read_run


def plan(
    config: Path | None = None,
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
    """Tell what a run would take, phase by phase: memory, bytes sent between ranks, and floating-point operations.

    Nothing is loaded or downloaded: the run's own code runs with tensors that have shapes and no numbers, as the first
    of its ranks. Counted is what tensors hold; libraries, the allocator's and NCCL's buffers, and kernels' work space
    come on top. Copies for a rollback are counted as main memory; a GPU keeps them while it has room. Every expert is
    taken to get as many tokens as any other, targets to need all of their steps, and a system to be solved at the first
    try, without the float64 that rounding may ask for.

    Args:
        config: a config of lit-moeedit fit.
        ranks: number of processes; by default as many as the config says.
        edits: number of facts to edit; by default as many as the config's data has.
        card: memory of a device in GB, to say what does not fit, and which token budgets auto would choose there.
        prompt_tokens: length of a fact's prompt.
        target_tokens: length of a target.
        questions: prompts that an evaluation asks for each fact, with its paraphrases and neighbours (CounterFact: 13).
        texts: number of preservation texts; by default as many as the config's data has.
        text_tokens: length of each; more than 512 tokens are not read.
        train_tokens: length of a row of a training batch.
        model: a config.json of transformers, or a folder with one, in place of the config's model.
        json: where to write the numbers, too.

    Raises:
        ValueError: if the config cannot be planned; the message says why.
        FileNotFoundError: if there is no such config.

    Example:
        lit-moeedit plan --config=configs/atlas.yaml --text_tokens=12
    """
    if config is None:
        raise ValueError("give --config, a config of lit-moeedit fit")
    # a plan computes on the CPU; DeepSpeed, which would otherwise look for devices, reads this when it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run = read_run(config, ranks, model)
    work = Workload(
        edits=_known(edits, run.edits, "edits", "how many facts it edits"),
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        questions=questions,
        texts=_known(texts, 1 if run.editor.preserve == "none" else run.texts, "texts", "how many texts it preserves"),
        text_tokens=text_tokens,
        rows=_known(None, run.rows, "data.init_args.batch_size", "the rows of a batch"),
        row_tokens=train_tokens,
    )
    with _silent(), empty_model(run.model, run.dtype) as empty:
        parameters = empty.num_parameters()
        run.module.model = empty
        room = None if card is None else card * 1e9
        costs, budgets = rehearse(run.module, run.editor, run.sharding, work, room)
    console = Console()
    console.print(table(costs, run, parameters))
    for line in remarks(costs, run, work, budgets, card):
        console.print(line, highlight=False)
    if json is not None:
        content = {
            "parameters": parameters,
            "sharding": asdict(run.sharding),
            "work": asdict(work),
            "token_budgets": asdict(budgets),
            "phases": {cost.phase: asdict(cost) for cost in costs},
        }
        with appearing(json) as beside:
            beside.write_text(dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _silent() -> Iterator[None]:
    """What the editor tells of its numbers is not true where there are none."""
    logger = logging.getLogger("lit_moeedit.editing")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _known(given: int | None, said: int | None, option: str, what: str) -> int:
    """A number from the command or the config."""
    number = said if given is None else given
    if number is None:
        raise ValueError(f"the config does not say {what}: give --{option}")
    return number


def table(costs: Sequence[Cost], run: Run, parameters: int) -> Table:
    """Costs as a table, one row for each phase."""
    sharding = run.sharding
    how = "no DeepSpeed" if sharding.stage is None else f"ZeRO stage {sharding.stage}"
    dtype = str(run.dtype).removeprefix("torch.")
    result = Table(title=f"{count(parameters)} parameters in {dtype}, {sharding.ranks} rank(s), {how}; per rank")
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


def remarks(costs: Sequence[Cost], run: Run, work: Workload, budgets: Budgets, card: float | None = None) -> list[str]:
    """Say what was assumed, which phase decides the peak, and whether a device with ``card`` GB has room for all."""
    editor = run.editor
    texts = "no texts" if editor.preserve == "none" else f"{work.texts:,} texts of {work.text_tokens} tokens"
    most = max(costs, key=lambda cost: cost.peak)
    lines = [
        f"Taken: batches of {work.rows} x {work.row_tokens} tokens; {work.edits} facts of {work.prompt_tokens} + "
        f"{work.target_tokens} tokens behind {len(editor.contexts)} context(s), {editor.targets.steps} steps for their "
        f"targets, {work.questions} questions each; {texts}; layers {', '.join(map(str, editor.layers))}; "
        f"commit {editor.way}.",
        _budgets_line(budgets, run, card),
        f"The peak is that of: {most.phase}, {size(most.peak)} per rank.",
    ]
    if card is not None:
        missing = [f"{cost.phase} ({size(cost.peak)})" for cost in costs if cost.peak > card * 1e9]
        fits = f"all phases fit ({most.peak / card / 1e7:.0f} % of it)"
        lines.append(
            f"A device with {card:g} GB: " + (f"too small for {', '.join(missing)}." if missing else f"{fits}.")
        )
    return lines


def _budgets_line(budgets: Budgets, run: Run, card: float | None) -> str:
    """Name the token budgets, and who chose them."""
    given = {"forward": run.editor.token_budget, "targets": run.editor.targets.token_budget}
    parts = {"statistics and features": "forward", "targets": "targets", "evaluation": "evaluation"}
    named = [
        f"{name} {getattr(budgets, field):,}{' (auto)' if given.get(field, given['forward']) == 'auto' else ''}"
        for name, field in parts.items()
    ]
    hint = " Give --card for what auto would choose on a device." if card is None and "auto" in given.values() else ""
    return f"Tokens at a time: {', '.join(named)}.{hint}"


def size(number: int) -> str:
    """A number of bytes for people.

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


def count(number: int) -> str:
    """A number of parameters for people.

    Example:
        >>> count(1500), count(52_500_000), count(30_530_000_000)
        ('1,500', '52.5 million', '30.5 billion')
    """
    if number >= 10**9:
        return f"{number / 1e9:.1f} billion"
    return f"{number / 1e6:.1f} million" if number >= 10**6 else f"{number:,}"
