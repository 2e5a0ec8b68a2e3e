"""The command ``plan``: what a run would take, before anything of it is there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_moeedit.planning.costs import plan_costs
from lit_moeedit.planning.passes import empty_model, model_size, run_passes
from lit_moeedit.planning.reading import edit_size, read_run
from lit_moeedit.planning.sizes import Cost, ModelSize
from lit_moeedit.sharding.rehearsal import Sharding

log = logging.getLogger(__name__)


def plan(
    config: Path | None = None,
    ranks: int | None = None,
    edits: int = 50,
    prompt_tokens: int = 24,
    target_tokens: int = 4,
    texts: int = 100_000,
    text_tokens: int = 512,
    train_tokens: int = 64,
    model: Path | None = None,
    json: Path | None = None,
) -> None:
    """Tell what a run would take: memory, bytes sent between ranks, and floating-point operations, phase by phase.

    Nothing is loaded or downloaded: the model is run with tensors that have shapes and no numbers. Counted is what
    tensors hold; a process needs more for its libraries, communication and the allocator. Targets are counted with all
    of their steps.

    Args:
        config: a config of lit-moeedit fit.
        ranks: number of processes; by default as many as the config says.
        edits: number of facts to edit.
        prompt_tokens: length of a prompt with its context, at most.
        target_tokens: length of a target, at most.
        texts: number of preservation texts.
        text_tokens: length of each.
        train_tokens: length of a row of a training batch.
        model: a config.json of transformers, or a folder with one, in place of the config's model.
        json: where to write the numbers, too.

    Raises:
        ValueError: if the config cannot be planned; the message says why.
        FileNotFoundError: if there is no such config.

    Example:
        lit-moeedit plan --config=configs/atlas.yaml --ranks=1 --edits=32
    """
    if config is None:
        raise ValueError("give --config, a config of lit-moeedit fit")
    run = read_run(config, ranks, model, train_tokens, target_tokens)
    edit = edit_size(run.editor, edits, prompt_tokens, target_tokens, texts, text_tokens)
    with empty_model(run.model, run.dtype) as empty:
        sizes = model_size(empty, edit.layers, run.pretrained)
        log.info("running %.1f billion parameters without numbers", sizes.parameters / 1e9)
        passes = run_passes(empty, run.sharding, run.training, edit)
    costs = plan_costs(sizes, run.sharding, run.training, edit, passes)
    Console().print(table(costs, sizes, run.sharding))
    if json is not None:
        content = {
            "model": asdict(sizes),
            "sharding": asdict(run.sharding),
            "training": asdict(run.training),
            "edit": asdict(edit),
            "phases": {cost.phase: asdict(cost) for cost in costs},
        }
        json.write_text(dumps(content, indent=1) + "\n", encoding="utf-8")


def table(costs: Sequence[Cost], model: ModelSize, sharding: Sharding) -> Table:
    """Costs as a table, one row for each phase."""
    stage = "no ZeRO" if sharding.stage is None else f"ZeRO stage {sharding.stage}"
    title = f"{model.parameters / 1e9:.2f} billion parameters, {sharding.ranks} rank(s), {stage}; per rank"
    columns = ["phase", "peak memory", "held before", "sent", "TFLOP", "main memory", "written"]
    if sharding.on_cpu:
        columns.remove("main memory")
    result = Table(title=title)
    for column in columns:
        result.add_column(column, justify="left" if column == "phase" else "right")
    for cost in costs:
        cells = {
            "phase": cost.phase,
            "peak memory": size(cost.peak),
            "held before": size(cost.held),
            "sent": size(cost.sent),
            "TFLOP": f"{cost.flops / 1e12:.3g}" if cost.flops else "-",
            "main memory": size(cost.host),
            "written": size(cost.written),
        }
        result.add_row(*(cells[column] for column in columns))
    return result


def size(count: int) -> str:
    """A number of bytes for people.

    Example:
        >>> size(0), size(1500), size(61_000_000_000)
        ('-', '1.5 kB', '61.0 GB')
    """
    if not count:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}"
