"""Plans against runs of two processes that train and edit with DeepSpeed.

Memory is what :class:`~lit_moeedit.planning.passes.Tally` counts in the run: storages from the operation that makes
them until they die. The allocator's own events (``torch.profiler``) are those of one thread, and tensors that gloo's
threads let go of would count for ever; the resident memory of the process holds libraries, what the allocator keeps,
and oneDNN's kernels for every shape it has seen, which in bfloat16 are more than what an edit allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from lit_moeedit.planning import EditSize, Sharding, TrainingSize, empty_model, model_size, plan_costs, run_passes
from lit_moeedit.planning.costs import EIGH
from lit_moeedit.planning.passes import Tally
from tests.processes import run_ranks

pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

RANKS, LAYERS, EDITS, CONTEXTS, STEPS = 2, (1, 2), 32, ("", "Note:"), 2
BUCKET, BUDGET = 10_000_000, 2048
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 2000,
    "hidden_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 768,
    # few experts, so that the edits visit all of them: which ones they do depends on the weights
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""53 million parameters: in bfloat16 with master copies and moments 430 MB for each of two ranks."""

COLLECTIVES = {"_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2, "broadcast_": 1}
"""How often a rank sends its share of the largest tensor."""


class Meter(Tally):
    """By phase: bytes held when it began the last time, the peak then, bytes sent, and operations."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, dict[str, int]] = {}
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name != "barrier":
            given = args[0] if name == "allgather_" else args
            sizes = [leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            whole = sum(sizes) if name == "allgather_" else max(sizes)
            self.sent += COLLECTIVES[name] * whole * (RANKS - 1) // RANKS
        if name == "aten::_linalg_eigh":
            self.flops += EIGH * args[0].numel() * args[0].shape[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin()
        yield
        self.end(name)

    def begin(self) -> None:
        self.peak = self.held = self.alive
        self.before = (self.sent, self.flops)

    def end(self, name: str) -> None:
        sent, flops = self.before
        last = self.phases.get(name, {"sent": 0, "flops": 0})
        if name == "training step":  # the only one that is not a part of one edit
            last = {"sent": 0, "flops": 0}
        sent, flops = self.sent - sent + last["sent"], self.flops - flops + last["flops"]
        self.phases[name] = {"held": self.held, "peak": self.peak, "sent": sent, "flops": flops}


def measured(stage: int, way: str, root: str) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """What the phases of a run took on this rank, and the lengths of its texts."""
    import lightning as L

    from lit_moeedit.callbacks import KnowledgeEditing
    from lit_moeedit.data import Atlas, FactsDataModule
    from lit_moeedit.editing import Editor, TargetOptimizer
    from lit_moeedit.editing import editor as module_of_editor
    from lit_moeedit.module import LitMoE
    from lit_moeedit.sharding.strategy import DeepSpeedCPUStrategy

    meter, lengths = Meter(), dict[str, int]()
    clock = module_of_editor._Clock.__call__

    @contextmanager
    def timed(self: Any, phase: str) -> Iterator[None]:
        with clock(self, phase), meter.phase(phase):
            yield

    module_of_editor._Clock.__call__ = timed  # type: ignore[method-assign]

    class Phases(L.Callback):
        def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
            meter.begin()

        def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            meter.end("loading")

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
            meter.begin()

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            meter.end("training step")
            if index == 2:
                labels = batch["labels"]
                lengths.update(train=labels.shape[1], counted=int((labels >= 0).sum()))

    settings: dict[str, Any] = {"contexts": CONTEXTS, "token_budget": BUDGET, "way": way}
    editor = Editor(LAYERS, targets=TargetOptimizer(steps=STEPS, stop=0.0), **settings)
    # all training steps of the run but the last are before the edit
    editing = KnowledgeEditing(editor, at={"step": 3})
    encode = Editor._encode

    def noted(self: Editor, *args: Any) -> Any:
        rows, prompts, owner = encode(self, *args)
        lengths["prompt"] = max(len(prompt.ids) for prompt in prompts)
        # the longest prompt need not have the longest target
        lengths["target"] = max(len(row.encoding.ids) for row in rows) - lengths["prompt"]
        return rows, prompts, owner

    Editor._encode = noted  # type: ignore[method-assign]
    data = FactsDataModule(
        Atlas(edits=EDITS, seed=0), vocab_size=2000, batch_size=16, samples_per_epoch=RANKS * 16 * 3,
        preservation_samples=1024,
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    module = LitMoE(config=CONFIG, dtype="bfloat16")
    strategy = DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=0, reduce_bucket_size=BUCKET)
    # the callback that measures is the first to see a batch's end
    trainer = L.Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_steps=3, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, callbacks=[Phases(), editing], default_root_dir=root,
    )  # fmt: skip
    with meter:
        trainer.fit(module, data)
        with meter.phase("checkpoint"):
            trainer.save_checkpoint(str(Path(root) / "checkpoint"))
    texts = data.preservation_texts()
    assert data.tokenizer is not None
    lengths["text"] = round(sum(len(ids) for ids in data.tokenizer(texts).input_ids) / len(texts))
    folder = Path(root) / "checkpoint"
    lengths["written"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // RANKS
    meter.phases[f"commit ({way})"] = meter.phases.pop("commit")
    return meter.phases, lengths


def planned(stage: int, lengths: dict[str, int]) -> dict[str, Any]:
    sharding = Sharding(RANKS, stage, itemsize=2, bucket=BUCKET, overlap=False, on_cpu=True)
    training = TrainingSize(16, lengths["train"], lengths["counted"])
    edit = EditSize(
        edits=EDITS, contexts=len(CONTEXTS), neutral=True, prompt_tokens=lengths["prompt"],
        target_tokens=lengths["target"], layers=LAYERS, preserve=True, texts=1024, text_tokens=lengths["text"],
        token_budget=BUDGET, target_budget=16384, steps=STEPS,
    )  # fmt: skip
    keys = dict(CONFIG)
    with empty_model(AutoConfig.for_model(keys.pop("model_type"), **keys), torch.bfloat16) as model:
        sizes = model_size(model, LAYERS)
        costs = plan_costs(sizes, sharding, training, edit, run_passes(model, sharding, training, edit))
    return {cost.phase: cost for cost in costs}


@pytest.mark.parametrize(("stage", "way"), [(3, "local"), (3, "gather"), (1, "local")])
def test_a_plan_says_what_a_run_takes(stage: int, way: str, tmp_path: Path) -> None:
    ranks = run_ranks(measured, RANKS, stage, way, str(tmp_path), group=False, seconds=300)
    lengths = ranks[0][1]
    plan = planned(stage, lengths)
    lines, wrong = [], []
    for phase in ranks[0][0]:
        cost, found = plan[phase], [phases[phase] for phases, _ in ranks]
        # a plan is for the rank that needs most
        pairs = {
            "peak": (cost.peak, max(numbers["peak"] for numbers in found)),
            "rise": (cost.peak - cost.held, max(numbers["peak"] - numbers["held"] for numbers in found)),
            "sent": (cost.sent, max(numbers["sent"] for numbers in found)),
            "flops": (cost.flops, max(numbers["flops"] for numbers in found)),
        }
        for what, (expected, actual) in pairs.items():
            lines.append(f"{phase:16s} {what:6s} {expected / 1e6:12.2f} {actual / 1e6:12.2f}")
            wrong += [lines[-1]] if abs(expected - actual) > 0.2 * actual + 1e5 else []
    print("\n".join(lines))
    print(plan["checkpoint"].written / 1e6, lengths["written"] / 1e6)
    assert not wrong, "\n".join(wrong)
