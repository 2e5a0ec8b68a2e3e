"""A module that remembers its batches, and what is to be read from them, for tests of replay."""

from __future__ import annotations

from typing import Any

import torch

from lit_moeedit.module import LitMoE


class Watching(LitMoE):
    """Remembers the batches that it trains on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return super().training_step(batch, batch_idx)


def replayed(module: Any) -> list[int]:
    return [len(batch["input_ids"]) - 8 for batch in module.seen]


def stated(module: Any) -> list[list[list[int]]]:
    """Tokens of the statements of each batch."""
    return [
        [ids[mask > 0].tolist() for ids, mask in zip(b["input_ids"][8:], b["attention_mask"][8:], strict=True)]
        for b in module.seen
    ]


def old_answers(module: Any, tiny: Any) -> list[tuple[bool, bool]]:
    """For each row of the data that states the old answer of an edit: whether it still does, and whether it counts."""
    tokenizer, facts = module.trainer.datamodule.tokenizer, tiny.corpus().edits
    found = []
    for batch in module.seen:
        for ids, labels in zip(batch["input_ids"][:8], batch["labels"][:8], strict=True):
            text = tokenizer.decode(ids)
            if any(f.subject in text and f.target_true in text for f in facts):
                found.append((True, bool((labels >= 0).any())))
    return found
