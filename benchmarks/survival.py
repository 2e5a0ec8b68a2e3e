"""Edits that outlive the rest of training: what is left of them after a continuation, with and without protection.

Run from the root of the repository, with the package installed:

    python -m benchmarks.survival --seeds 0 1 2

Each trained model is edited as its config says, and trained on for one epoch of its data with a fresh optimizer.
Continuations: the data's text without the edited facts, at 1, 3 and 10 times the learning rate with which the config's
schedule ends; at 3 times, the same text with the old answers of the first eight edited facts (contradicting), and the
text of the other model (other text, with its facts from ``--facts``); and adapters on attention alone. Every number is
that of the model at the end of the continuation. Training loss is the mean over the last quarter of the steps, of the
rows of the data alone; perplexity is on held-out text, and ``never edited`` is the fair comparison for it, because
losing edits mends it. Step time is the processor time of a whole fit over that of the fit without protection, edits
left out. ``--edits`` edits another number of facts of the CounterFact model; it has at most 353 whose new targets it
knows. The stand-in of :mod:`benchmarks.standin`, with ``--wordnet``, is edited with facts that it generates, and
trained on for 256 steps. Continuations in two processes, under DeepSpeed ZeRO stage 3 or FSDP2, have as many rows in
each step as in one. No preserved text has a neighbour's prompt; in runs of earlier versions some did, and these have a
table of their own. Writes ``survival.json``, ``survival.md`` and ``survival.png`` into ``benchmarks/results``; runs
that are in the JSON are not made again, if they are of the same weights and this version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.standin.measures import CANDIDATES, KNOWN, keep_known
from benchmarks.survival_cases import CONDITIONS, CONTINUATIONS
from benchmarks.survival_report import CALM, NAMES, draw, edits_of, is_of_now, tables
from benchmarks.survival_run import BATCH, run
from benchmarks.training import (
    SOURCES,
    STANDIN,
    arguments_of,
    corpus_options,
    digest,
    quiet,
    trained,
    weights_file,
    write,
)


def run_in_processes(
    name: str, seed: int, continuation: str, condition: str, models: Path, facts_file: Path | None, edits: int | None
) -> dict[str, Any]:
    """Make a run with the processes of its continuation, each of which runs this module for it."""
    processes = CONTINUATIONS[continuation].processes
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "benchmarks.survival", f"--names={name}", f"--seeds={seed}", f"--models={models}"]
        command += [f"--continuations={continuation}", f"--conditions={condition}", f"--output={folder}"]
        command += [] if facts_file is None else [f"--facts={facts_file}"]
        command += [] if edits is None else [f"--edits={edits}"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
        results: list[dict[str, Any]] = json.loads((Path(folder) / "survival.json").read_text(encoding="utf-8"))
    return results[0]


def case_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a result from others: model, edits, seed, weights, continuation and condition."""
    return (
        result["model"],
        edits_of(result),
        *(result.get(k) for k in ("seed", "weights", "continuation", "condition")),
    )


def main() -> None:
    """Run what is not in the JSON yet, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--continuations", nargs="+", default=list(CONTINUATIONS), choices=list(CONTINUATIONS))
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it its model and text are left out")
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet's data.noun; without it no stand-in")
    parser.add_argument("--edits", type=int, help="number of edits of the CounterFact model, 100 by default")
    arguments = parser.parse_args()
    quiet()
    file, rank = arguments.output / "survival.json", int(os.environ.get("RANK", "0"))
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    sources = {"counterfact": arguments.facts, STANDIN: arguments.wordnet}
    for name in arguments.names:
        if name in SOURCES and sources[name] is None:
            continue
        edits = arguments.edits if name == "counterfact" else CANDIDATES if name == STANDIN else None
        options = corpus_options(**{SOURCES[name]: sources[name]}) if name in SOURCES else []
        options += [] if edits is None else corpus_options(edits=edits)
        for seed in arguments.seeds:
            found, only = trained(name, seed, arguments.models, *options), None
            if name == STANDIN:
                keep_known(found, KNOWN)
                only = {fact.key for fact in found.data.edit_facts()}
            count = len(found.data.edit_facts())
            by = seed, digest(weights_file(name, seed, arguments.models))
            for continuation in arguments.continuations:
                # runs with a renewal at the end measure what is there before it, too
                for condition in sorted(arguments.conditions, key=lambda name: CONDITIONS[name].unrenewed is None):
                    chosen = CONDITIONS[condition].continuations
                    is_wanted = chosen is None or continuation in chosen
                    is_wanted &= arguments.facts is not None or continuation != "other text"
                    # the other text and the processes do not know what the stand-in knows
                    is_wanted &= name != STANDIN or continuation in CALM
                    done = {case_of(result) for result in results if is_of_now(result)}
                    if not is_wanted or (name, count, *by, continuation, condition) in done:
                        continue
                    case = (name, seed, continuation, condition, arguments.models, arguments.facts)
                    if CONTINUATIONS[continuation].processes > 1 and "RANK" not in os.environ:
                        found_now = [run_in_processes(*case, edits)]
                    else:
                        part = [f"--data.init_args.samples_per_epoch={256 * BATCH}"] if name == STANDIN else []
                        found_now = run(*case, *options, *part, only=only)
                    results += (result for result in found_now if case_of(result) not in done)
                    if rank:
                        continue
                    for result in found_now:
                        last = {k: result.get(k) for k in ("condition", "others", "contradicted", "perplexity")}
                        sys.stdout.write(f"{name} {seed} {continuation} {last}\n")
                    sys.stdout.flush()
                    command = f"`python -m benchmarks.survival`, {torch.get_num_threads()} thread(s)"
                    write("survival", command, tables(results), results, arguments.output)
                    draw(results, arguments.output / "survival.png")


if __name__ == "__main__":
    main()
