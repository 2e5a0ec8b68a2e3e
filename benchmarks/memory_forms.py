"""What a memory of past edits must keep: rows, their sketch, or second moments, at equal bytes.

Run from the root of the repository, with the package installed, and a file of CounterFact:

    python -m benchmarks.memory_forms --facts counterfact.json

The model of ``benchmarks/lifelong.py`` remembers the gated keys of some past facts in its first edited layer, 50 at a
time, in several forms. Then 50 further facts are edited with each of them. Measured is the exact objective, with the
row of every past fact, of the change that is solved for: as a multiple of its minimum; its two parts, the share of the
residuals that is left, and the squared change of past outputs as a share of the squared residuals; and the processor
time of the solution. Preserved are 1,024 texts.

Second moments of each expert take the bytes of ``E d_hidden`` keys, 4,096 here, however few facts there are; the table
has the number of their singular vectors. A joint singular vector takes the bytes of ``E`` keys. Writes
``memory_forms.json`` and ``memory_forms.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.lifelong import PerExpert, known_facts
from benchmarks.training import arguments_of, cell, corpus_options, header, quiet, row, trained, write
from lit_moeedit.data import Fact
from lit_moeedit.editing import EditMemory, Editor, second_moments
from lit_moeedit.editing.job import EditJob
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.editing.spread import Spread
from lit_moeedit.solvers import ExpertDeltas

SIZE = 50
PAST = (200, 500, 1000, 1900)
WITHOUT_LIMIT = 10**9


def joint(rows: GatedKeys, experts: int, rank: int) -> GatedKeys:
    """Keep the largest singular vectors over all experts; each has a key of every expert."""
    matrix = rows.key.new_zeros(int(rows.row.max()) + 1, experts, rows.key.shape[1])
    matrix[rows.row, rows.expert] = rows.key
    _, size, directions = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    kept = min(rank, len(size))
    key = (size[:kept, None] * directions[:kept]).reshape(kept * experts, -1)
    return GatedKeys(torch.arange(kept).repeat_interleave(experts), torch.arange(experts).repeat(kept), key)


class _Measured(Exception):
    """Ends an edit before it changes anything."""


class Comparing(Editor):
    """Solves its first layer with several memories, and measures the solutions."""

    past: Sequence[Fact]
    found: dict[str, dict[str, float]]

    def prepare(self, job: EditJob) -> Spread:
        encoded = self.encode(job.tokenizer, job.facts)
        return _Comparison(self, job, encoded, self._find_targets(job, encoded), job.moments)


class _Comparison(Spread):
    def solve(self, layer: Any) -> ExpertDeltas:
        editor, job = self.editor, self.job
        assert isinstance(editor, Comparing)
        encoded = editor.encode(job.tokenizer, editor.past)
        own, self.encoded = self.encoded, encoded
        rows = GatedKeys.of(self.observe(layer).keys)
        self.encoded = own
        tokens = self.observe(layer)
        share, shaping = self.wanted / len(job.layers), self.shape(layer, tokens)

        def solved(memory: EditMemory | None) -> tuple[ExpertDeltas, float, Any]:
            editor.memory, start = memory, time.process_time()
            problem = self.problem(layer, tokens, share, shaping)
            return editor.solver.solve(problem), time.process_time() - start, problem

        limit = layer.num_experts * layer.shape[2]  # keys that take the bytes of all second moments
        exact = filled(EditMemory(WITHOUT_LIMIT), rows, layer.index)
        memories: dict[str, EditMemory | None] = {"all rows": exact, "no memory": None}
        memories |= {f"rows and sketch, {n:,} keys": filled(EditMemory(n), rows, layer.index) for n in _limits(limit)}
        memories["second moments of each expert"] = filled(PerExpert(WITHOUT_LIMIT), rows, layer.index)
        factor = EditMemory(WITHOUT_LIMIT)
        vectors = joint(rows, layer.num_experts, limit // layer.num_experts)
        factor.remember({layer.index: vectors}, [f"{i}" for i in range(int(vectors.row.max()) + 1)])
        memories["joint singular vectors"] = factor
        _, _, whole = solved(exact)
        wanted = float(whole.residuals.square().sum())
        for name, memory in memories.items():
            deltas, seconds, _ = solved(memory)
            misfit = (whole.residuals.double() - whole.prediction(deltas, torch.float64)).square().sum(1)
            parts = misfit[: len(share)].sum() / wanted, misfit[len(share) :].sum() / wanted
            keys = 0 if memory is None else memory.size(layer.index)[1]
            editor.found[name] = {
                "keys": keys,
                "objective": whole.objective(deltas),
                "left": float(parts[0]),
                "moved": float(parts[1]),
                "seconds": seconds,
            }
        raise _Measured


def _limits(largest: int) -> list[int]:
    return [largest // 8, largest // 4, largest // 2, largest]


def filled(memory: EditMemory, rows: GatedKeys, layer: int) -> EditMemory:
    """Remember rows of a layer, of one fact each, some at a time."""
    for start in range(0, int(rows.row.max()) + 1, SIZE):
        part = rows.select((rows.row >= start) & (rows.row < start + SIZE))
        memory.remember({layer: part}, [f"{start + i}" for i in range(int(part.row.max()) + 1)])
    return memory


def compare(own: Any, facts: Sequence[Fact], past: int) -> dict[str, dict[str, float]]:
    """Measure all forms with some past facts."""
    editor = Comparing(own.editor.layers)
    editor.__dict__ |= {**vars(own.editor), "contexts": ("",), "past": facts[SIZE : SIZE + past], "found": {}}
    moments = second_moments(
        own.model, own.tokenizer, editor.check(own.model), own.data.preservation_texts()[:1024], gated=editor.gated
    )
    with suppress(_Measured):
        editor.edit(own.model, own.tokenizer, facts[:SIZE], moments=moments)
    found: dict[str, dict[str, float]] = editor.found
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Markdown: a row for each form and number of past facts, means over the seeds with their range."""
    columns = ["past facts", "memory", "keys", "objective", "residuals left", "past outputs moved", "s"]
    lines = header(columns)
    by_seed = [*results.values()]
    for past, forms in by_seed[0].items():
        for name in forms:
            found = [own[past][name] for own in by_seed if past in own]
            least = [own[past]["all rows"]["objective"] for own in by_seed if past in own]
            ratios = [own["objective"] / low for own, low in zip(found, least, strict=True)]
            values = (ratios, *([own[part] for own in found] for part in ("left", "moved")))
            spreads = [(min(own), max(own)) if len(own) > 1 else None for own in values]
            shown = [cell(statistics.mean(own), spread=s, digits=4) for own, s in zip(values, spreads, strict=True)]
            keys, seconds = (statistics.mean(own[part] for own in found) for part in ("keys", "seconds"))
            lines.append(row([past, name, f"{keys:,.0f}", *shown, f"{seconds:.2f}"]))
    return "\n".join(lines)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--facts", type=Path, required=True, help="a file of CounterFact")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for seed in arguments.seeds:
        own = trained("counterfact", seed, arguments.models, *corpus_options(path=arguments.facts))
        facts = known_facts(arguments.facts, own)
        for past in PAST:
            results.setdefault(str(seed), {})[str(past)] = compare(own, facts, past)
        command = (
            f"`python -m benchmarks.memory_forms --facts counterfact.json --seeds {' '.join(results)}`, one thread: "
            "means over the seeds, in brackets their range; nothing here is a mean over facts"
        )
        write("memory_forms", command, table(results), results, arguments.output)


if __name__ == "__main__":
    main()
