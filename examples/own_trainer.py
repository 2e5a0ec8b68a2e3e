"""A module, a loop and data of one's own, with facts edited before the second epoch.

python examples/own_trainer.py my-model facts.jsonl
"""

import sys

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moeedit import Editor, EditReport, KnowledgeEditing
from lit_moeedit.data import neutral_texts


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
editing = KnowledgeEditing(
    Editor(layers="auto", token="auto"), facts=facts, at={"epoch": 1}, preservation=texts, on_failure="keep"
)
trainer = L.Trainer(max_epochs=2, callbacks=[editing, EditReport()], accelerator="cpu", logger=False)
trainer.fit(module, loader)
sys.stdout.write(f"{len(editing.applied_facts)} facts edited\n")
