"""What trained models are edited and trained on with in the benchmark of survival: continuations and conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from lit_moeedit.callbacks import EditEvent, EditHold, EditListener, EditReplay, KnowledgeEditing
from lit_moeedit.models.experts import find_model

CONTRADICTED = 8
"""Number of edited facts whose old answers stay in the text that contradicts."""
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
    """The training after the edit: its learning rate, its text, and the weights that learn.

    The rate is in units of the one at the end of the configs' schedules. Several processes share the weights by a
    strategy, which are arguments of the command line.
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
    "hold, renewed at the end": Condition(RENEWED, lambda: [EditHold()], unrenewed="hold"),
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
