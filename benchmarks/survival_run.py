"""One run of the benchmark of survival: a trained model is edited, trained on, and measured."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from benchmarks.editing import editors
from benchmarks.survival_cases import CONDITIONS, CONTINUATIONS, FSDP2, STATED, Condition
from benchmarks.training import command_line, digest, shares_by_fact, weights_file
from lit_moeedit.callbacks import EditEvent, EditListener, EditReplay, KnowledgeEditing
from lit_moeedit.data import Atlas, Corpus, FactsCorpus, FactsDataModule
from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.editing.evaluation import Evaluation, perplexity
from lit_moeedit.models.experts import find_model
from lit_moeedit.models.partial_forward import inference

BATCH = 32
"""Rows of a batch of all processes."""
RATE = 4e-5
"""Learning rate at the end of the configs' schedules."""
BY_FACT = ("efficacy_accuracy", "generalization", "specificity_retained")
"""Metrics that have intervals over facts."""


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
