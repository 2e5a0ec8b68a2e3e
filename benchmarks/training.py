"""Trained models for benchmarks to edit: each is trained once by its config, up to the config's edit, and then kept.

What a config edits has no influence on what it trains on before, so the weights serve any number of edits.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import logging
import math
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.cli import EditingCLI
from lit_moeedit.data import Atlas, Fact, FactsDataModule
from lit_moeedit.data.atlas import PREFIXES, read_table
from lit_moeedit.data.corpus import Corpus
from lit_moeedit.editing import Editor, Evaluation, evaluate
from lit_moeedit.editing.by_fact import intervals
from lit_moeedit.editing.evaluation import perplexity
from lit_moeedit.editing.routing_trace import RoutingTrace, trace_routing
from lit_moeedit.metrics import RoutingSimilarity
from lit_moeedit.module import LitMoE

T = TypeVar("T")
BY_FACT = "in parentheses 95 % bootstrap intervals over the facts of these models, in brackets the range of the seeds"
"""What :func:`mean_of` formats."""
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
MODELS = ROOT / "runs/models"
QUALITY = ("efficacy", "generalization", "specificity", "specificity_retained", "utility", "routing", "perplexity")
"""Results of :meth:`Trained.quality`, besides the other metrics of :func:`~lit_moeedit.editing.evaluate`."""

_SHAPE = "--model.init_args.config"
CONFIGS: Mapping[str, tuple[str, Sequence[str]]] = {
    "atlas": ("atlas.yaml", ()),
    "atlas, 32 experts": (
        "atlas.yaml",
        (f"{_SHAPE}.num_experts=32", f"{_SHAPE}.num_experts_per_tok=6", f"{_SHAPE}.moe_intermediate_size=128"),
    ),
    "atlas, Mixtral": (
        "atlas.yaml",
        (f"{_SHAPE}.model_type=mixtral", f"{_SHAPE}.num_local_experts=16", f"{_SHAPE}.intermediate_size=192"),
    ),
    "counterfact": ("counterfact.yaml", ()),
    "atlas, chains": (
        "atlas.yaml",
        (
            "--data.init_args.corpus.init_args.chains=true",
            "--data.init_args.corpus.init_args.asked=0.5",
            "--data.init_args.samples_per_epoch=16384",
        ),
    ),
}
"""Configs of the models by name, and what is different from them."""
WEAK = "atlas, 30 countries"
"""Name of a model that has seen little: 256 steps on the statements of 30 countries. It generalizes poorly."""
_WEAK = (
    "atlas.yaml",
    (
        "--data.init_args.corpus.class_path=benchmarks.training.FewCountries",
        "--data.init_args.corpus.init_args.edits=30",
        "--data.init_args.samples_per_epoch=4096",
        "--edit.at={epoch: 4}",
        "--trainer.max_epochs=4",
        "--model.init_args.cosine_until=1.0",
    ),
)
STANDIN = "standin"
"""Name of the model that is nearer to a real language model, see :mod:`benchmarks.standin`."""
_STANDIN = ("../benchmarks/standin/standin.yaml", ())
SOURCES: Mapping[str, str] = {"counterfact": "path", STANDIN: "wordnet"}
"""Models whose corpus needs a file or a folder, and its setting that names it."""


class FewCountries(Atlas):
    """The atlas of some countries: nothing is stated of the others, and no edit or neighbour is about them.

    Args:
        countries: number of countries.
        edits: number of facts to edit, at most one per country.
        seed: seed of the choice of countries, and otherwise as for :class:`~lit_moeedit.data.Atlas`.
    """

    def __init__(self, countries: int = 30, edits: int = 30, seed: int = 0) -> None:
        rng, table = random.Random(seed), read_table()
        kept = set(rng.sample(sorted({entry.subject for entry in table}), countries))
        self.entries = [entry for entry in table if entry.subject in kept]
        self._by_subject, self._by_relation = defaultdict(list), defaultdict(list)
        for entry in self.entries:
            self._by_subject[entry.subject].append(entry)
            self._by_relation[entry.relation].append(entry)
        chosen = [rng.choice(self._by_subject[subject]) for subject in rng.sample(sorted(kept), edits)]
        train, validation = self._split(0.1, random.Random(f"{seed}/held out"))
        facts = [self._edit(entry, set(chosen), 4, rng) for entry in chosen]
        Corpus.__init__(self, train=train, validation=validation, edits=facts, prefixes=PREFIXES)


class Unmeasured(FactsDataModule):
    """Data whose texts to preserve have no prompt of a neighbour or a probe, and are no texts of the probe of routing.

    A run preserves any text that states none of the edited facts. What an edit does to a neighbour that was preserved
    word for word, or to a text on which routing and perplexity are watched, says little of others. There are as many
    texts as the config says, or all that there are.

    Attributes:
        measured: the facts whose neighbours and probes are measured; ``None`` for those to edit.
    """

    measured: Sequence[Fact] | None = None

    def preservation_texts(self) -> list[str]:
        """Return the texts, in the order of the data's."""
        facts = self.edit_facts() if self.measured is None else self.measured
        asked = {question.prompt for fact in facts for question in (*fact.neighbours, *fact.probes)}
        asked |= set(self.probe_texts())
        measured = re.compile("|".join(map(re.escape, sorted(asked, key=len, reverse=True))))
        every = copy.copy(self)
        every.preservation_samples = sys.maxsize
        texts = (text for text in FactsDataModule.preservation_texts(every) if not measured.search(text))
        return list(itertools.islice(texts, self.preservation_samples))


def command_line(name: str, seed: int, *arguments: str) -> tuple[EditingCLI, KnowledgeEditing]:
    """A config, ready to be run without a logger, and its callback that edits."""
    config, different = {**CONFIGS, WEAK: _WEAK, STANDIN: _STANDIN}[name]
    seeds = ["--seed_everything", "--data.init_args.seed"]
    if config in ("atlas.yaml", _STANDIN[0]):
        seeds.append("--data.init_args.corpus.init_args.seed")
    cli = EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=[
            *("--config", str(ROOT / "configs" / config), *different),
            *(f"{option}={seed}" for option in seeds),
            *("--trainer.logger=false", "--trainer.enable_progress_bar=false", *arguments),
        ],
        run=False,
    )
    assert type(cli.datamodule) is FactsDataModule
    cli.datamodule.__class__ = Unmeasured  # another class on the command line would forget the config's corpus
    return cli, next(callback for callback in cli.trainer.callbacks if isinstance(callback, KnowledgeEditing))


def corpus_options(**settings: Any) -> list[str]:
    """Arguments of the command line with settings of the corpus."""
    return [f"--data.init_args.corpus.init_args.{name}={value}" for name, value in settings.items()]


def arguments_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments of every benchmark: seeds, and the folders of models and results."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps trained weights")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def quiet() -> None:
    """Log errors only; a benchmark reports its results itself."""
    for name in ("lightning.pytorch", "lit_moeedit"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _StopAt(L.Callback):
    """Ends the training where an epoch would begin."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


@dataclass
class Trained:
    """A model just before its edit, what the run would edit it with, the seconds of its training, and its digest."""

    model: PreTrainedModel
    data: Unmeasured
    editor: Editor
    seconds: float
    weights: str = ""
    _before: dict[tuple[Any, ...], tuple[Evaluation, RoutingTrace, float]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.data.tokenizer is not None
        return self.data.tokenizer

    def quality(
        self,
        edit: Callable[[PreTrainedModel, Sequence[Fact]], dict[str, float]],
        facts: Sequence[Fact] | None = None,
        probe: int = 256,
    ) -> dict[str, Any]:
        """Edit a copy of the model, and measure the effect.

        Args:
            edit: edits a model and returns seconds by phase.
            facts: what to edit; by default what the config edits.
            probe: number of held-out texts on which routing is watched.

        Returns:
            The metrics of ``evaluate``; ``routing``, the mean similarity of the layers above the lowest edited one;
            ``perplexity`` after the edit over that before; ``recalled_before``, the share of truths said before;
            ``by_fact``, what holds of what counts of each fact, for :func:`interval`; ``seconds``, whatever ``edit``
            returned.
        """
        model, tokenizer = copy.deepcopy(self.model), self.tokenizer
        facts = self.data.edit_facts() if facts is None else facts
        texts, batches = self.data.probe_texts()[:probe], list(self.data.val_dataloader())[:8]
        case = (probe, *(fact.key for fact in facts))
        if case not in self._before:
            routes = trace_routing(model, tokenizer, texts)
            self._before[case] = evaluate(model, tokenizer, facts), routes, perplexity(model, batches)
        before, routing, confusion = self._before[case]
        seconds = edit(model, facts)
        evaluation = evaluate(model, tokenizer, facts, before.neighbours_exact)
        similarity = RoutingSimilarity(list(routing.experts))
        similarity.update(routing.experts, trace_routing(model, tokenizer, texts).experts)
        lowest = self.editor.layers[0]
        overlap = {name.removeprefix("layer_"): float(value) for name, value in similarity.compute().items()}
        return {
            **evaluation.metrics,
            "by_fact": shares_by_fact(evaluation, facts),
            "routing": statistics.mean(v for name, v in overlap.items() if name.isdigit() and int(name) > lowest),
            "perplexity": perplexity(model, batches) / confusion,
            "recalled_before": before.metrics["truth_recalled"],
            "seconds": seconds,
        }


def shares_by_fact(
    evaluation: Evaluation, facts: Sequence[Fact], shown: Sequence[str] = ("efficacy", "generalization", "specificity")
) -> dict[str, str]:
    """Write down the metrics that are means over facts: ``3/4 0/4`` of two facts, and their keys.

    Args:
        evaluation: with the metrics.
        facts: what was evaluated.
        shown: beginnings of the metrics' names.
    """
    sums = {name: own.tolist() for name, own in evaluation.by_fact.items() if name.startswith(tuple(shown))}
    found = {name: " ".join(f"{a:g}/{b:g}" for a, b in zip(*own, strict=True)) for name, own in sums.items()}
    return {"keys": " ".join(fact.key[:16] for fact in facts), **found}


def interval(results: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float] | None:
    """Compute the 95 % bootstrap interval over the facts of all results; ``None`` of what is no mean over facts.

    A fact that several seeds have edited is one fact.
    """
    sums: dict[str, list[float]] = {}
    for result in results:
        own = result.get("by_fact", {})
        if metric not in own:
            return None
        for key, shares in zip(own["keys"].split(), own[metric].split(), strict=True):
            holds, counts = map(float, shares.split("/"))
            before = sums.get(key, [0.0, 0.0])
            sums[key] = [before[0] + holds, before[1] + counts]
    return intervals({metric: torch.tensor([*sums.values()], dtype=torch.float64).T}).get(metric)


def only(result: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Keep some metrics of a result of :meth:`Trained.quality`, and what their intervals are made of."""
    by_fact = {name: shares for name, shares in result["by_fact"].items() if name in {"keys", *metrics}}
    return {**{metric: result[metric] for metric in metrics}, "by_fact": by_fact}


def mean_of(results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Format a metric of a table: its mean over seeds, its :func:`interval`, and its range over seeds.

    The interval tells how much another choice of facts would change it on the same models, and the range how much other
    models do. What is no mean over facts has no interval.
    """
    values = [result[metric] for result in results if result[metric] is not None]
    spread = (min(values), max(values)) if len(values) > 1 else None
    return cell(statistics.mean(values), interval(results, metric), spread) if values else "–"


def cell(
    mean: float,
    between: tuple[float, float] | None = None,
    spread: tuple[float, float] | None = None,
    digits: int = 3,
) -> str:
    """Format a mean of a table, with its interval and its range if it has them.

    Example:
        >>> cell(0.5), cell(0.5, (0.42, 0.58)), cell(0.5, (0.42, 0.58), (0.4, 0.6))
        ('0.500', '0.500 (0.420–0.580)', '0.500 (0.420–0.580) [0.400–0.600]')
    """
    bounds = zip(("({})", "[{}]"), (between, spread), strict=True)
    shown = (
        form.format("–".join(f"{value:.{digits}f}" for value in pair)) for form, pair in bounds if pair is not None
    )
    return " ".join([f"{mean:.{digits}f}", *shown])


def whiskers(axes: Any, results: Sequence[Mapping[str, Any]], x: str, y: str, color: str) -> None:
    """Draw the :func:`interval` of two metrics around the point of their means over seeds."""
    for metric, other in ((x, y), (y, x)):
        low, high = interval(results, metric) or (math.nan, math.nan)
        at = statistics.mean(result[other] for result in results)
        (axes.hlines if metric == x else axes.vlines)(at, low, high, color=color, lw=1, alpha=0.6, zorder=1)


def title_of(metric: str) -> str:
    """Return the name of a metric as the head of a column."""
    return metric.replace("_", " ")


def label_of(label: str, seeds: Iterable[str], all_seeds: Iterable[str]) -> str:
    """Return the label of a row, with its seeds if it has not all of them.

    Example:
        >>> label_of("BCD", ["0", "1"], ["0", "1"]), label_of("BCD", ["1"], ["0", "1"])
        ('BCD', 'BCD (seed 1)')
    """
    own = [*seeds]
    return label if own == [*all_seeds] else f"{label} (seed {', '.join(own)})"


def trained(name: str, seed: int, models: Path, *arguments: str) -> Trained:
    """Train a config's model up to its edit, or take it from the folder ``models``.

    Args:
        name: one of :data:`CONFIGS`, or :data:`WEAK` or :data:`STANDIN`.
        seed: of everything.
        models: folder that keeps weights and the seconds of their training.
        arguments: of the command line; nothing that changes the training.
    """
    cli, editing = command_line(name, seed, *arguments)
    module, data = cli.model, cli.datamodule
    file = weights_file(name, seed, models)
    if not file.exists():
        cli.trainer.callbacks[:] = [_StopAt(editing.schedule.number)]
        start = time.perf_counter()
        cli.trainer.fit(module, data)
        seconds = time.perf_counter() - start
        models.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in module.model.state_dict().items()}, file)
    data.setup("fit")
    module.configure_model()
    module.model.load_state_dict(load_file(file))
    seconds = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["seconds"]
    return Trained(module.model.eval(), data, editing.editor, seconds, digest(file))


def weights_file(name: str, seed: int, models: Path) -> Path:
    """Return the file with the weights of a trained model."""
    return models / f"{name}, seed {seed}.safetensors"


def digest(file: Path) -> str:
    """Return the beginning of the SHA-256 of a file: another machine trains other weights from the same seed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def changed(settings_of: T, **settings: Any) -> T:
    """The editor, or its target optimizer, with other settings."""
    other = copy.copy(settings_of)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


class Once:
    """Target vectors that all variants of an editor share."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.found = optimizer, None

    def optimize(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the first call."""
        if self.found is None:
            self.found = self.optimizer.optimize(*args, **kwargs)
        return self.found


def write(name: str, command: str, text: str, results: Any, output: Path) -> None:
    """Write ``NAME.md``, the text below its command, and ``NAME.json`` into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / f"{name}.md").write_text(f"{command}\n\n{text.rstrip()}\n", encoding="utf-8")


def finish(name: str, command: str, text: str, picture: Callable[[T, Path], None], results: T, output: Path) -> None:
    """Write ``NAME.md``, ``NAME.json`` and ``NAME.png``, which ``picture(results, path)`` draws, and print the text."""
    write(name, command, text, results, output)
    picture(results, output / f"{name}.png")
    sys.stdout.write(text)


def row(cells: Sequence[object]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def header(cells: Sequence[object]) -> list[str]:
    """The first two rows of a table in Markdown."""
    return [row(cells), "|" + " --- |" * len(cells)]
