"""A module, a loop and data of one's own, with facts edited before the second epoch.

python examples/own_trainer.py my-model facts.jsonl
"""

import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moeedit import Editor, EditReport, KnowledgeEditing
from lit_moeedit.data import neutral_texts
from lit_moeedit.editing import TargetOptimizer
from lit_moeedit.reports import read_rows


class Module(L.LightningModule):
    """Any module that holds a model of transformers."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of the next tokens."""
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


folder, facts = sys.argv[1:]
module, texts = Module(folder), neutral_texts()
loader = DataLoader(texts[:16], batch_size=1, collate_fn=lambda rows: module.tokenizer(rows, return_tensors="pt"))
# small models need more than the settings of the papers, which are the default; lit-moeedit locate finds out
targets = TargetOptimizer(steps=60, learning_rate=0.5, clamp=2.0, weight_decay=0.05)
editing = KnowledgeEditing(
    Editor(layers="auto", token="auto", targets=targets), facts=facts, at={"epoch": 1}, preservation=texts
)
trainer = L.Trainer(max_epochs=2, callbacks=[editing, EditReport()], accelerator="cpu", logger=False)
trainer.fit(module, loader)
rows = read_rows(Path(trainer.default_root_dir, "edits.jsonl"))
generated = sum(row.measured["end"].holds for row in rows)
sys.stdout.write(f"{generated} of {len(rows)} new answers are generated at the end\n")
