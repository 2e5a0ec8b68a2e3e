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
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from benchmarks.editing import editors
from benchmarks.standin.measures import CANDIDATES, KNOWN, keep_known
from benchmarks.survival_report import CALM, NAMES, draw, edits_of, is_of_now, tables
from benchmarks.training import (
    SOURCES,
    STANDIN,
    arguments_of,
    command_line,
    corpus_options,
    digest,
    quiet,
    shares_by_fact,
    trained,
    weights_file,
    write,
)
from lit_moeedit.callbacks import EditEvent, EditHold, EditListener, EditReplay, KnowledgeEditing
from lit_moeedit.data import Atlas, Corpus, FactsCorpus, FactsDataModule
from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.editing.evaluation import Evaluation, perplexity
from lit_moeedit.models.experts import find_model
from lit_moeedit.models.partial_forward import inference

BATCH = 32
"""Rows of a batch of all processes."""
RATE = 4e-5
"""Learning rate at the end of the configs' schedules."""
CONTRADICTED = 8
"""Number of edited facts whose old answers stay in the text that contradicts."""
BY_FACT = ("efficacy_accuracy", "generalization", "specificity_retained")
"""Metrics that have intervals over facts."""
STATED = 2
"""Number of paraphrases of a fact that are stated, where any are; how the others fare is measured apart."""
ATTENTION = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

FSDP2 = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.data_parallel_size=2",
    "--trainer.strategy.init_args.tensor_parallel_size=1",
)


@dataclass(frozen=True)
class Continuation:
    """The training after the edit: its learning rate in units of ``RATE``, its text, and the weights that learn.

    Several processes share the weights by a strategy, which are arguments of the command line.
    """

    rate: float
    contradicted: int = 0
    is_other_text: bool = False
    adapter: Mapping[str, Any] | None = None
    processes: int = 1
    strategy: Sequence[str] = ()


@dataclass(frozen=True)
class Condition:
    """Protection of the edits: arguments and other callbacks; and the editor, by its name in ``benchmarks.editing``.

    ``unrenewed`` is the name of the condition that differs only in that edits are not renewed at the last step. Where
    one process trains, it is measured in the same run, just before the renewal.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    editor: str | None = None
    is_edited: bool = True
    continuations: Sequence[str] | None = None
    unrenewed: str | None = None


def replay(**settings: Any) -> Callable[[], list[L.Callback]]:
    """Return a function that makes the callback anew for each run."""
    return lambda: [EditReplay(**settings)]


CONTINUATIONS = {
    "1x": Continuation(1.0),
    "3x": Continuation(3.0),
    "10x": Continuation(10.0),
    "contradicting": Continuation(3.0, contradicted=CONTRADICTED),
    "other text": Continuation(3.0, is_other_text=True),
    "adapters": Continuation(125.0, adapter=ATTENTION),
    "10x, ZeRO-3": Continuation(10.0, processes=2, strategy=("--trainer.strategy=deepspeed_cpu_stage_3",)),
    "10x, FSDP2": Continuation(10.0, processes=2, strategy=FSDP2),
}
RENEWED = {"renew_at": "end", "renewal": "all", "survival_every_n_steps": 10**6}
"""All edits are brought back at the last step; nothing is measured on the way."""
REPLACED = {**RENEWED, "renewal": "replace"}
"""All edits are taken out at the last step, and made anew."""
CONDITIONS = {
    "never edited": Condition(is_edited=False),
    "nothing": Condition(),
    "replay 1 %": Condition(callbacks=replay(share=0.01)),
    "replay 5 %": Condition(callbacks=replay(share=0.05)),
    "replay 5 %, not by need": Condition(callbacks=replay(share=0.05, by_need=False)),
    "replay 5 %, mask": Condition(callbacks=replay(share=0.05, on_conflict="mask"), continuations=("contradicting",)),
    "replay 5 %, yield": Condition(callbacks=replay(share=0.05, on_conflict="yield"), continuations=("contradicting",)),
    "replay 1 %, renewed at the end": Condition(RENEWED, replay(share=0.01), unrenewed="replay 1 %"),
    "replay 2 %, renewed at the end": Condition(RENEWED, replay(share=0.02)),
    "replay 5 %, renewed at the end": Condition(RENEWED, replay(share=0.05), unrenewed="replay 5 %"),
    "replay 5 % with paraphrases": Condition(callbacks=replay(share=0.05, paraphrases=STATED)),
    "replay 5 % with paraphrases, renewed at the end": Condition(
        RENEWED, replay(share=0.05, paraphrases=STATED), unrenewed="replay 5 % with paraphrases"
    ),
    "renewed at the end": Condition(RENEWED, unrenewed="nothing"),
    "replay 1 %, replaced at the end": Condition(REPLACED, replay(share=0.01)),
    "replay 5 %, replaced at the end": Condition(REPLACED, replay(share=0.05)),
    "replaced at the end": Condition(REPLACED),
    "hold": Condition(callbacks=lambda: [EditHold()]),
    "renewals every 32 steps": Condition({"renew_every_n_steps": 32, "max_renewals": None}),
    "renewals below 0.95": Condition({"renew_below": 0.95, "survival_every_n_steps": 32}),
    "freeze down-projections": Condition(callbacks=lambda: [Frozen()]),
    "nothing, MEMIT per expert": Condition(editor="MEMIT per expert", continuations=("10x",)),
    "nothing, MoEEdit": Condition(editor="BCD, null space (MoEEdit)", continuations=("10x",)),
    "nothing, Woodbury, null space": Condition(editor="Woodbury, null space", continuations=("10x",)),
}


class Frozen(EditListener):
    """Takes the down-projections of the edited layers out of training when they are edited."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        editing = next(c for c in trainer.callbacks if isinstance(c, KnowledgeEditing))  # type: ignore[attr-defined]
        for index in editing.editor.layers:
            layer = find_model(pl_module).model.layers[index]
            layer.mlp.experts.down_proj.requires_grad_(False)


class Watch(EditListener):
    """Losses of the data's rows, and the processor time of the steps, edits and measurements left out."""

    def __init__(self, rows: int, excluded: Iterable[str]) -> None:
        self.rows, self.excluded, self.losses = rows, excluded, list[float]()
        self.start = self.left_out = self.seconds = 0.0
        self.after: dict[str, float] = {}
        self.unstated: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.datamodule.load_state_dict({"excluded": self.excluded})  # type: ignore[attr-defined]

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Any) -> None:
        self.left_out -= time.process_time()

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.left_out += time.process_time()
        self.after, self.unstated = dict(event.after.metrics), unstated(event.after)

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
        mean = trainer.strategy.reduce(torch.tensor(self.losses), reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        self.losses = mean.tolist()


class BeforeRenewal(L.Callback):
    """Measures what a run has after its last step, before edits are renewed there."""

    def __init__(self, watch: Watch, measure: Callable[[], dict[str, Any]]) -> None:
        self.watch, self.measure, self.found = watch, measure, dict[str, Any]()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            begin = time.process_time()
            self.watch.seconds = begin - self.watch.start - self.watch.left_out
            with inference(find_model(pl_module)):
                self.found = self.measure()
            self.watch.left_out += time.process_time() - begin


class Load(L.Callback):
    """Reads the weights of a trained model into one that FSDP2 shards."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = load_file(self.file)
        set_model_state_dict(find_model(pl_module), weights, options=StateDictOptions(full_state_dict=True))


def load(model: torch.nn.Module, file: Path) -> None:
    """Load the weights of a trained model, also if adapters are around some of its modules."""
    weights = load_file(file)
    for name, tensor in model.state_dict().items():
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if original in weights:
            tensor.copy_(weights.pop(original))
    if weights:
        raise ValueError(f"{file}: the model has no {', '.join(weights)}")


def other_text(data: FactsDataModule, corpus: Corpus, folder: Path) -> FactsDataModule:
    """Return the data with another training text, in the tokens and with the facts and held-out text of the first."""
    assert data.tokenizer is not None
    data.tokenizer.save_pretrained(folder)
    return FactsDataModule(
        Corpus(corpus.train, data.corpus.validation, data.corpus.edits, corpus.prefixes),
        tokenizer=str(folder),
        batch_size=data.batch_size,
        samples_per_epoch=data.samples_per_epoch,
        seed=data.seed,
    )


def run(
    name: str,
    seed: int,
    continuation: str,
    condition: str,
    models: Path,
    facts_file: Path | None,
    *options: str,
    protection: Condition | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Edit a trained model, train it on, and measure: first what is there before a renewal at the end, if it is wanted.

    Args:
        name: name of the model.
        seed: its seed.
        continuation: name of the training after the edit.
        condition: name of the protection.
        models: folder of the trained models.
        facts_file: a CounterFact file; ``None`` if it is not needed.
        options: further arguments of the command line.
        protection: another protection than that of this name.
        only: keys of the facts to edit; by default those that the config edits.
    """
    then, protection = CONTINUATIONS[continuation], protection or CONDITIONS[condition]
    cli, editing = command_line(
        name,
        seed,
        f"--model.init_args.learning_rate={then.rate * RATE}",
        "--model.init_args.warmup=0.0",
        "--model.init_args.cosine_until=1.0",
        "--model.init_args.final_learning_rate=1.0",
        f"--model.init_args.adapter={json.dumps(then.adapter)}",
        "--data.init_args.drop_edited=false",  # the text is the same, edited or not
        f"--data.init_args.batch_size={BATCH // then.processes}",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0",
        f"--trainer.devices={then.processes}",
        *then.strategy,
        *options,
    )
    data, module = cli.datamodule, cli.model
    data.setup("fit")
    facts, texts = [fact for fact in data.edit_facts() if only is None or fact.key in only], data.preservation_texts()
    excluded = data.corpus.facts_of(facts[then.contradicted :])
    watch, callbacks = Watch(data.batch_size, excluded), protection.callbacks()
    editor = editing.editor if protection.editor is None else editors(editing.editor, name)[protection.editor]
    arguments: dict[str, Any] = {"survival_every_n_steps": None, **protection.arguments}
    arguments |= {"facts": None if only is None else facts, "preservation": texts}
    own = KnowledgeEditing(editor, at="fit_start", on_failure="keep", tokenizer=None, **arguments)
    weights = weights_file(name, seed, models)

    def measured(condition: str) -> dict[str, Any]:
        found = {
            "model": name, "seed": seed, "continuation": continuation, "condition": condition, "edits": len(facts),
            "weights": digest(weights), "after": watch.after, "neighbours_preserved": False,
            "train_loss": statistics.mean(watch.losses[-len(watch.losses) // 4 :]),
            "perplexity": perplexity(module.model, list(data.val_dataloader())[:8]),
            "seconds": watch.seconds, "processor": processor(),
            "renewals": own.renewals,
        }  # fmt: skip
        if protection.is_edited:
            evaluation = own.evaluate(module)
            exact = dict(zip((fact.key for fact in own.applied_facts), evaluation.edits_exact.tolist(), strict=True))
            found["end"] = dict(evaluation.metrics)
            found["by_fact"] = shares_by_fact(evaluation, own.applied_facts, BY_FACT)
            found["unstated"] = {"after": watch.unstated, "end": unstated(evaluation)}
            contradicted = {fact.key for fact in facts[: then.contradicted]}
            for group, keys in (("contradicted", contradicted), ("others", exact.keys() - contradicted)):
                found[group] = statistics.mean(exact[key] for key in keys) if keys else None
            watches = [callback.watch for callback in callbacks if isinstance(callback, EditReplay)]
            found["conflicts"] = watches[0].metrics["edit/conflicts"] if watches else None
        return found

    unrenewed = protection.unrenewed if then.processes == 1 else None
    before = BeforeRenewal(watch, lambda: measured(unrenewed or ""))
    cli.trainer.callbacks[:] = [
        *([before] if unrenewed else []), *([own] if protection.is_edited else []), *callbacks, watch,
    ]  # fmt: skip
    if then.strategy == FSDP2:  # the module shards its model in the run
        cli.trainer.callbacks.insert(0, Load(weights))
    else:
        module.configure_model()
        load(module.model, weights)
    with TemporaryDirectory() as folder:
        if then.is_other_text:
            other = Atlas(edits=1, seed=seed) if name == "counterfact" else FactsCorpus(facts_file, 1, 500, False, 8)
            data = other_text(data, other, Path(folder))
        cli.trainer.fit(module, data)
    module.model.eval()
    end = measured(condition)
    # replay counts conflicts of the last steps only after the renewal
    return [*([before.found | {"conflicts": end["conflicts"]}] if unrenewed else []), end]


def unstated(evaluation: Evaluation) -> float | None:
    """Return the generalization to paraphrases that no condition states; ``None`` if facts have no more than those."""
    exact = [is_exact for own in evaluation.paraphrases_exact.values() for is_exact in own[STATED:]]
    return statistics.mean(exact) if exact else None


def processor() -> str:
    """Return the name of the processor, without which seconds are not compared."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


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
                    results += [result for result in found_now if case_of(result) not in done]
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
