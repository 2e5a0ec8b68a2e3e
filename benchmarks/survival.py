"""Edits that outlive the rest of training: what is left of them after a continuation, with and without protection.

Run from the root of the repository, with the package installed:

    python -m benchmarks.survival --seeds 0 1 2

Each trained model is edited as its config says, and trained on for one epoch of its data with a fresh optimizer.
Continuations: the data's text without the edited facts, at 1, 3 and 10 times the learning rate with which the config's
schedule ends; and, at 3 times, the whole text, which still states the old answers of the edited facts. Every number is
that of the model at the end of the continuation. Training loss is the mean over the last quarter of the steps, of the
rows of the data alone; perplexity is on held-out text, and ``never edited`` is the fair comparison for it, because
losing edits mends it. Step time is the processor time of a whole fit over that of the fit without protection, edits
left out. Writes ``survival.json`` and ``survival.md`` into ``benchmarks/results``; runs that are in the JSON are not
made again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file

from benchmarks.training import arguments_of, command_line, header, quiet, row, trained, write
from lit_moeedit.callbacks import EditEvent, EditListener, EditReplay, KnowledgeEditing
from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.editing.evaluation import perplexity
from lit_moeedit.models.experts import find_model

NAMES = ("atlas", "counterfact")
RATE = 4e-5
"""Learning rate at the end of the configs' schedules."""
CONTINUATIONS: Mapping[str, tuple[float, bool]] = {
    "1x": (1.0, True),
    "3x": (3.0, True),
    "10x": (10.0, True),
    "contradicting": (3.0, False),
}
"""By name, the learning rate in units of ``RATE``, and whether the edited facts are left out of the text."""
CONDITIONS: Mapping[str, Callable[[], tuple[dict[str, Any], list[L.Callback]]]] = {
    "never edited": lambda: ({"edit": False}, []),
    "nothing": lambda: ({}, []),
    "replay 1 %": lambda: ({}, [EditReplay(share=0.01)]),
    "replay 5 %": lambda: ({}, [EditReplay(share=0.05)]),
    "replay 5 %, not by need": lambda: ({}, [EditReplay(share=0.05, by_need=False)]),
    "replay 5 %, mask": lambda: ({}, [EditReplay(share=0.05, on_conflict="mask")]),
    "replay 5 %, yield": lambda: ({}, [EditReplay(share=0.05, on_conflict="yield")]),
    "renewals every 32 steps": lambda: ({"renew_every_n_steps": 32, "max_renewals": None}, []),
    "renewals below 0.95": lambda: ({"renew_below": 0.95}, []),
    "freeze down-projections": lambda: ({}, [Frozen()]),
}
ONLY_CONTRADICTED = {"replay 5 %, mask", "replay 5 %, yield"}


class Frozen(EditListener):
    """Takes the down-projections of the edited layers out of training when they are edited."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        editing = next(c for c in trainer.callbacks if isinstance(c, KnowledgeEditing))  # type: ignore[attr-defined]
        for index in editing.editor.layers:
            layer = find_model(pl_module).model.layers[index]
            layer.mlp.experts.down_proj.requires_grad_(False)


class Watch(EditListener):
    """Losses of the data's rows, and the processor time of the steps, edits and measurements left out."""

    def __init__(self, rows: int) -> None:
        self.rows, self.losses = rows, list[float]()
        self.start = self.left_out = self.seconds = 0.0
        self.after: dict[str, float] = {}

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Any) -> None:
        self.left_out -= time.process_time()

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.left_out += time.process_time()
        self.after = dict(event.after.metrics)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.process_time()
        own = pl_module._run  # type: ignore[operator]

        def run(batch: Any, **settings: Any) -> Any:
            outputs = own(batch, **settings)
            if pl_module.training and torch.is_grad_enabled():
                logits, labels = outputs.logits[: self.rows, :-1], batch["labels"][: self.rows, 1:]
                counted = labels != IGNORED_LABEL
                loss = torch.nn.functional.cross_entropy(logits[counted].detach().float(), labels[counted])
                self.losses.append(float(loss))
            return outputs

        pl_module._run = run  # type: ignore[assignment]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.process_time() - self.start - self.left_out


def run(name: str, seed: int, continuation: str, condition: str, models: Path, *options: str) -> dict[str, Any]:
    """Edit a trained model, train it on, and measure."""
    times, drop = CONTINUATIONS[continuation]
    settings, callbacks = CONDITIONS[condition]()
    cli, editing = command_line(
        name,
        seed,
        f"--model.init_args.learning_rate={times * RATE}",
        "--model.init_args.warmup=0.0",
        "--model.init_args.cosine_until=1.0",
        "--model.init_args.final_learning_rate=1.0",
        f"--data.init_args.drop_edited={str(drop).lower()}",
        "--data.init_args.batch_size=32",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0",
        *options,
    )
    is_edited = settings.pop("edit", True)
    arguments = {"at": "fit_start", "on_failure": "keep", "tokenizer": None, **settings}
    data, module = cli.datamodule, cli.model
    watch = Watch(data.batch_size)
    own = KnowledgeEditing(
        editing.editor, survival_every_n_steps=None if "renew_below" not in settings else 32, **arguments
    )
    cli.trainer.callbacks[:] = [*([own] if is_edited else []), *callbacks, watch]
    data.setup("fit")
    module.configure_model()
    module.model.load_state_dict(load_file(models / f"{name}, seed {seed}.safetensors"))
    cli.trainer.fit(module, data)
    model, batches = module.model.eval(), list(data.val_dataloader())[:8]
    facts, contradicted = data.edit_facts(), set[str]()
    if not drop:
        contradicted = set(data.contradictions(facts))
    found = {
        "model": name, "seed": seed, "continuation": continuation, "condition": condition,
        "after": watch.after,
        "train_loss": statistics.mean(watch.losses[-len(watch.losses) // 4 :]),
        "perplexity": perplexity(model, batches),
        "seconds": watch.seconds,
        "renewals": own.renewals,
    }  # fmt: skip
    if is_edited:
        evaluation = own.evaluate(module)
        exact = dict(zip((fact.key for fact in own.applied_facts), evaluation.edits_exact.tolist(), strict=True))
        found["end"] = dict(evaluation.metrics)
        for group, keys in (("contradicted", contradicted), ("others", exact.keys() - contradicted)):
            known = [exact[key] for key in keys if key in exact]
            found[group] = statistics.mean(known) if known else None
        watches = [callback.watch for callback in callbacks if isinstance(callback, EditReplay)]
        found["conflicts"] = watches[0].metrics["edit/conflicts"] if watches else None
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown: means over seeds, with 95 % intervals of the edits that are generated."""
    names = ("model", "continuation", "condition", "seeds", "generated after the edit", "at the end", "generalization",
             "neighbours retained", "training loss", "perplexity", "step time")  # fmt: skip
    lines = header(names)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["continuation"], result["condition"]), []).append(result)
    for (name, continuation, condition), own in sorted(groups.items()):
        base = {r["seed"]: r for r in groups.get((name, continuation, "nothing"), [])}
        never = {r["seed"]: r for r in groups.get((name, continuation, "never edited"), [])}
        pairs = [(r, base[r["seed"]], never[r["seed"]]) for r in own if r["seed"] in base and r["seed"] in never]
        if not pairs:
            continue
        is_edited = condition != "never edited"
        loss = 100 * (statistics.mean(r["train_loss"] / n["train_loss"] for r, n, _ in pairs) - 1)
        worse = 100 * (statistics.mean(r["perplexity"] / v["perplexity"] for r, _, v in pairs) - 1)
        time_of = statistics.mean(r["seconds"] / n["seconds"] for r, n, _ in pairs)
        end = [r["end"]["efficacy_accuracy"] for r in own] if is_edited else []
        shown = f"{interval(end)}" if end else "-"
        if is_edited and own[0].get("contradicted") is not None:
            parts = [statistics.mean(r[group] for r in own) for group in ("contradicted", "others")]
            shown += f" (contradicted {parts[0]:.2f}, others {parts[1]:.2f})"
        lines.append(
            row(
                (
                    name, continuation, condition, len(own),
                    f"{mean_of(own, 'after', 'efficacy_accuracy'):.2f}" if is_edited else "-",
                    shown,
                    f"{mean_of(own, 'after', 'generalization'):.2f} to {mean_of(own, 'end', 'generalization'):.2f}"
                    if is_edited else "-",
                    f"{mean_of(own, 'end', 'specificity_retained'):.3f}" if is_edited else "-",
                    f"{loss:+.2f} %", f"{worse:+.2f} %", f"{time_of:.2f}",
                )
            )
        )  # fmt: skip
    return "\n".join(lines)


def mean_of(results: list[dict[str, Any]], moment: str, metric: str) -> float:
    """Return the mean of a metric over seeds."""
    return statistics.mean(result[moment][metric] for result in results)


def interval(values: list[float]) -> str:
    """Format a mean with its 95 % interval over seeds (Student's t; none for one seed)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return f"{mean:.2f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    """Run what is not in the JSON yet, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--continuations", nargs="+", default=list(CONTINUATIONS), choices=list(CONTINUATIONS))
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it that model is left out")
    parser.add_argument("--edits", type=int, help="number of edits of the CounterFact model, 100 by default")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "survival.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    done = {tuple(result[key] for key in ("model", "seed", "continuation", "condition")) for result in results}
    for name in arguments.names:
        if name == "counterfact" and arguments.facts is None:
            continue
        options = [f"--data.init_args.corpus.init_args.path={arguments.facts}"] if name == "counterfact" else []
        options += [f"--data.init_args.corpus.init_args.edits={arguments.edits}"] if arguments.edits else []
        for seed in arguments.seeds:
            trained(name, seed, arguments.models, *options)
            for continuation in arguments.continuations:
                for condition in arguments.conditions:
                    is_wanted = condition not in ONLY_CONTRADICTED or continuation == "contradicting"
                    if is_wanted and (name, seed, continuation, condition) not in done:
                        results.append(run(name, seed, continuation, condition, arguments.models, *options))
                        last = {k: results[-1].get(k) for k in ("condition", "others", "contradicted", "perplexity")}
                        sys.stdout.write(f"{name} {seed} {continuation} {last}\n")
                        sys.stdout.flush()
                        command = f"`python -m benchmarks.survival`, {torch.get_num_threads()} thread(s)"
                        write("survival", command, table(results), results, arguments.output)


if __name__ == "__main__":
    main()
