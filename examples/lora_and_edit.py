"""LoRA adapters of the attention are trained, and facts edited in the frozen experts in between.

Checkpoints hold the adapter and the edit only. The export has both folded in.

    python examples/lora_and_edit.py my-model facts.jsonl output
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lit_moeedit import Editor, KnowledgeEditing, LitMoE
from lit_moeedit.checkpoints.export import export
from lit_moeedit.data import neutral_texts
from lit_moeedit.editing import TargetOptimizer

folder, facts, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
module = LitMoE(pretrained=folder, adapter=adapter, adapter_only_checkpoints=True, learning_rate=1e-4)


def collate(rows: list[str]) -> dict[str, Any]:
    """Tokenize texts, all of whose tokens are learned."""
    batch = module.tokenizer(rows, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"]}


texts = neutral_texts()
# small models need more than the settings of the papers, which are the default; lit-moeedit locate finds out
targets = TargetOptimizer(steps=60, learning_rate=0.5, clamp=2.0, weight_decay=0.05)
editing = KnowledgeEditing(
    Editor(layers="auto", token="auto", targets=targets),
    facts=facts,
    at={"epoch": 1},
    preservation=texts,
    save_edits=str(output / "edits"),
)
trainer = L.Trainer(max_epochs=2, callbacks=[editing], accelerator="cpu", logger=False, default_root_dir=output)
trainer.fit(module, DataLoader(texts[:16], batch_size=1, collate_fn=collate))
trainer.save_checkpoint(output / "adapter.ckpt")
export(output / "adapter.ckpt", output / "model", tokenizer=folder)
sys.stdout.write(f"{(output / 'adapter.ckpt').stat().st_size:,} bytes in the checkpoint\n")
