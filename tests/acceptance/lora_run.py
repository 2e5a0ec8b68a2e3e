"""A LoRA run on new text with an edit in its middle, exported and tried with plain transformers and plain peft.

The demo's model is trained as the demo trains it, without edits, and exported as the base. Then only LoRA adapters
of its attention train, on phrasings that the base has not seen; facts are edited before the second of two epochs.
Checkpoints hold the adapter alone. The run is exported in both ways, and ``generate`` completes each edited prompt::

    python -m tests.acceptance.lora_run --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.checkpoints.export import export
from lit_moeedit.cli import run as command
from lit_moeedit.data import Atlas, Corpus, Fact, FactsDataModule, Statement
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.preservation import OutputPenalty

EDITS = 16
METRICS = ("perplexity before training", "edit/efficacy_accuracy", "edit/specificity_retained", "val/perplexity")


def train_base(folder: Path, *changes: str) -> Path:
    """Train the demo's model for its first four epochs, and export it; ``changes`` are options of the command."""
    options = ("edit=null", "trainer.callbacks=null", "trainer.max_epochs=4", f"trainer.default_root_dir={folder}")
    quiet = ("trainer.enable_progress_bar=false", f"trainer.logger.init_args.save_dir={folder}")
    cli = command(["fit", "--config=recipe:atlas", *(f"--{option}" for option in (*options, *quiet, *changes))])
    assert cli is not None
    cli.trainer.save_checkpoint(folder / "base.ckpt")
    export(folder / "base.ckpt", folder / "base")
    return folder / "base"


def new_text(atlas: Atlas) -> Corpus:
    """Statements in phrasings that the base has not seen, none of them of an edited fact."""
    edited = {(fact.subject, fact.target_true) for fact in atlas.edits}
    statements = [
        Statement(
            f"A quiz says that the {entry.relation} of {entry.subject} is",
            entry.answer,
            f"{entry.subject}|{entry.relation}",
        )
        for entry in atlas.entries
        if (entry.subject, entry.answer) not in edited
    ]
    return Corpus(statements, statements[::10], atlas.edits)


def fit(
    base: Path, folder: Path, facts: Sequence[Fact], corpus: Corpus, texts: list[str]
) -> tuple[Path, dict[str, Any]]:
    """Train adapters for two epochs with an edit between them; returns the last checkpoint and the metrics."""
    L.seed_everything(0, verbose=False)
    targets = TargetOptimizer(steps=60, learning_rate=0.5, clamp=2.0, weight_decay=0.05, stop=0.05)
    editor = Editor([0, 1, 2], targets=targets, token="last", preserve=OutputPenalty(strength=0.3), ridge=0.001,
                    contexts=["", "Note:", "As we know,"])  # fmt: skip
    editing = KnowledgeEditing(editor, list(facts), {"epoch": 1}, preservation=texts, save_edits=str(folder / "edits"))
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    module = LitMoE(pretrained=str(base), adapter=adapter, adapter_only_checkpoints=True, learning_rate=5e-3)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=[editing], default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = FactsDataModule(corpus, batch_size=64, samples_per_epoch=4096, seed=0)
    quiet = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = quiet.validate(module, data, verbose=False)[0]["val/perplexity"]
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return folder / "last.ckpt", {"perplexity before training": before, **metrics}


def generated(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> float:
    """Return the share of facts whose new target plain ``generate`` puts after the prompt."""
    hits = 0
    for fact in facts:
        ids = tokenizer(fact.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        wanted = tokenizer(f" {fact.target_new}", add_special_tokens=False)["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False)
        hits += tokenizer.decode(made[0, ids.shape[1] :]).strip().startswith(fact.target_new)
    return hits / len(facts)


def main() -> None:
    """Run it, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for lora_run.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = train_base(folder)
        atlas = Atlas(edits=EDITS, seed=1)
        facts = atlas.edits
        texts = [f"{statement.prompt} {statement.target}." for statement in atlas.train[::20]]
        checkpoint, metrics = fit(base, folder, facts, new_text(atlas), texts)
        sizes = {path.name: path.stat().st_size for path in (checkpoint, base / "model.safetensors")}
        export(checkpoint, folder / "folded")
        export(checkpoint, folder / "separate", adapter="separate")
        tokenizer = AutoTokenizer.from_pretrained(folder / "folded")
        load = AutoModelForCausalLM.from_pretrained
        models = {
            "the base": load(base),
            "exported, adapter folded in, plain transformers": load(folder / "folded"),
            "exported, base alone, plain transformers": load(folder / "separate"),
            "exported, base and adapter, plain peft": peft.PeftModel.from_pretrained(
                load(folder / "separate"), str(folder / "separate" / "adapter")
            ),
        }
        shares = {name: generated(model.eval(), tokenizer, facts) for name, model in models.items()}
    rows = [f"| {name} | {share:.2f} |" for name, share in shares.items()]
    text = "\n".join(
        [
            f"{EDITS} facts edited in the middle of a LoRA run on new text: `python -m tests.acceptance.lora_run`",
            "",
            "| model | share of new targets that `generate` puts after the prompt |",
            "| --- | --- |",
            *rows,
            "",
            f"Bytes: {json.dumps(sizes)}. At the end of the run: "
            + ", ".join(f"`{name}` {metrics[name]:.2f}" for name in METRICS),
        ]
    )
    sys.stdout.write(text + "\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "lora_run.md").write_text(text + "\n", encoding="utf-8")
    if min(share for name, share in shares.items() if name != "the base") < 0.75:
        raise SystemExit("an exported model does not generate the edited facts")


if __name__ == "__main__":
    main()
