"""Checkpoint folders of runs under expert parallelism: exported, and resumed with as many ranks or others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import check_harmless, read_checkpoint
from lit_moeedit.cli import run
from lit_moeedit.editing import Editor
from lit_moeedit.module import LitMoE
from tests.callbacks.conftest import _corpus
from tests.callbacks.test_expert_parallel_runs import saved, weights
from tests.callbacks.test_fsdp2_runs import distance, same
from tests.processes import run_ranks
from tests.sharding.expert_parallel_models import parallel_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_process")]


def config(folder: Path) -> Path:
    """A run of three epochs of two steps, which edits three facts before the second and three before the third."""
    model, facts = saved(folder / "model"), [fact.to_dict() for fact in _corpus().edits]
    targets = {"steps": 3, "learning_rate": 0.5, "clamp": 2.0, "weight_decay": 0.05}
    editor = {
        "layers": [0, 1],
        "token": "last",
        "targets": {"class_path": "lit_moeedit.editing.TargetOptimizer", "init_args": targets},
        "memory": {"class_path": "lit_moeedit.editing.EditMemory"},
    }
    kept = {"filename": "{epoch}", "save_top_k": -1, "save_on_train_epoch_end": True}
    corpus = {"class_path": "lit_moeedit.data.Atlas", "init_args": {"edits": 6, "seed": 1}}
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "deterministic": True,
            "logger": False,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": 0.5,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}],
        },
        "edit": {
            "facts": facts,
            "at": {"every_n_epochs": 1, "batch": 3},
            "on_failure": "keep",
            "editor": {"class_path": "lit_moeedit.editing.Editor", "init_args": editor},
        },
        "model": {
            "class_path": "lit_moeedit.module.LitMoE",
            "init_args": {"pretrained": model, "learning_rate": 1e-3, "warmup": 0.0, "weight_decay": 0.0},
        },
        "data": {
            "class_path": "lit_moeedit.data.FactsDataModule",
            "init_args": {"corpus": corpus, "tokenizer": model, "samples_per_epoch": 16},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


Run = tuple[str, str | None]
"""The folder of a run, and the checkpoint that it begins with."""


def commands(path: str, size: int, runs: list[Run]) -> list[tuple[int, dict[str, Tensor]]]:
    """Run the command several times on ranks that share the experts.

    Returns:
        For each run the number of its edits, and the whole weights at the end.
    """
    edit, edits, ends = Editor.edit, list[int](), list[dict[str, Tensor]]()

    def edited(self: Editor, *args: Any, **kwargs: Any) -> Any:
        edits.append(1)
        return edit(self, *args, **kwargs)

    Editor.edit = edited  # type: ignore[method-assign]
    LitMoE.on_train_end = lambda self: ends.append(weights(self))  # type: ignore[method-assign]
    found = []
    for folder, checkpoint in runs:
        edits.clear()
        command(path, folder, size, checkpoint)
        found.append((len(edits), ends[-1]))
    return found


def command(path: str, folder: str, size: int, checkpoint: str | None) -> None:
    options = {
        "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
        "trainer.strategy.init_args.data_parallel_size": size,
        "trainer.strategy.init_args.tensor_parallel_size": 1,
        "trainer.devices": size,
        "trainer.default_root_dir": folder,
        "trainer.callbacks.init_args.dirpath": f"{folder}/kept",
        "model.init_args.expert_parallel_size": size,
        "data.init_args.batch_size": 8 // size,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    run(args=["fit", f"--config={path}", *given, *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])


def memory(checkpoint: Path) -> dict[int, Any]:
    states = read_checkpoint(checkpoint).callbacks
    (state,) = (state for name, state in states.items() if name.startswith("KnowledgeEditing"))
    found: dict[int, Any] = state["memory"]
    return found


def test_a_folder_is_exported_and_resumed(tmp_path: Path) -> None:
    path = str(config(tmp_path))

    def kept(name: str, epoch: int = 1) -> Path:
        return tmp_path / name / "kept" / f"epoch={epoch}.ckpt"

    def ranks(size: int, *runs: tuple[str, str | None]) -> list[Any]:
        """Runs with the name of each, and that of the one that it goes on from; of all ranks, which agree."""
        named = [(str(tmp_path / name), before and str(kept(before))) for name, before in runs]
        first, *others = run_ranks(commands, size, path, size, named, group=False, seconds=300)
        for other in others:
            for (edits, end), (as_many, same_end) in zip(first, other, strict=True):
                assert edits == as_many
                assert same(end, same_end)
        return first

    two, again = ranks(2, ("2", None), ("2 to 2", "2"))
    one, fewer = ranks(1, ("1", None), ("2 to 1", "2"))
    (more,) = ranks(2, ("1 to 2", "1"))
    # the first of the two edits is not repeated
    assert [edits for edits, _ in (two, again, one, fewer, more)] == [2, 1, 2, 1, 1]
    assert same(again[1], two[1])
    for resumed, whole in ((fewer, two), (more, one)):
        # float32 in another order, in two steps
        assert distance(resumed[1], whole[1]) < 1e-4
    begun = {name: tensor.read() for name, tensor in read_checkpoint(kept("1")).tensors.items()}
    assert distance(one[1], begun) > 1e-2
    for name, whole in (("2 to 2", "2"), ("2 to 1", "2"), ("1 to 2", "1")):
        remembered = memory(kept(name, 2))
        for layer, own in memory(kept(whole, 2)).items():
            assert own["facts"] == remembered[layer]["facts"]
    check_harmless(kept("2", 2))
    tensors = read_checkpoint(kept("2", 2)).tensors
    assert same({name: tensor.read() for name, tensor in tensors.items()}, two[1])
    export(kept("2", 2), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert same({f"model.{name}": weight.detach() for name, weight in exported.named_parameters()}, two[1])


def stored(folder: str, sizes: dict[str, int]) -> tuple[dict[str, Tensor], bool]:
    """The whole weights of a model in a folder, and whether loading brings back a shard of experts that was lost."""
    model = parallel_model(f"{folder}/model", sizes)
    whole = {name: weight.detach().full_tensor() for name, weight in model.named_parameters()}
    dcp.save({"state_dict": model.state_dict()}, checkpoint_id=f"{folder}/it.ckpt")
    lost = dict(model.named_parameters())["model.layers.1.mlp.experts.down_proj"].to_local()
    before = lost.detach().clone()
    with torch.no_grad():
        lost.zero_()
    dcp.load({"state_dict": model.state_dict()}, checkpoint_id=f"{folder}/it.ckpt")
    return whole, torch.equal(lost, before) and bool(before.any())


@pytest.mark.parametrize(
    "sizes", [{"ep_size": 2, "fsdp_size": 4}, {"ep_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}]
)
def test_a_folder_of_ranks_with_the_same_experts_is_read(sizes: dict[str, int], tmp_path: Path) -> None:
    found = run_ranks(stored, 4, str(tmp_path), sizes)
    torch.save({"hyper_parameters": {}}, tmp_path / "it.ckpt" / "meta.pt")
    tensors = read_checkpoint(tmp_path / "it.ckpt").tensors
    for whole, is_loaded in found:
        assert is_loaded
        assert same({name: tensors[name].read() for name in whole}, whole)
