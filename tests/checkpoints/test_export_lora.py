"""Exports of runs with LoRA adapters: folded into the weights, or beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import read_checkpoint
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from tests.processes import run_ranks
from tests.small_module import CONFIG

peft = pytest.importorskip("peft", reason="needs peft")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
OF_TRAINER = {"strategy", "precision", "devices", "max_steps"}
ATTENTION = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "experts": {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns and a whole module": {
        **ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}, "modules_to_save": ["lm_head"],
    },
    "dora and an embedding": {"target_modules": ["o_proj", "embed_tokens"], "use_dora": True},
}  # fmt: skip


def trained(
    root: Path, adapter: dict[str, Any], name: str = "last.ckpt", path: Path | None = None, **settings: Any
) -> LitMoE:
    """Two steps, after which no LoRA matrix is zero."""
    options = {"max_steps": 2, **{key: settings.pop(key) for key in OF_TRAINER & settings.keys()}}
    L.seed_everything(0, verbose=False)
    module = LitMoE(**{"config": CONFIG, "adapter": adapter, "learning_rate": 0.1, "warmup": 0.0, **settings})
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in IDS]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=2 // trainer.world_size), ckpt_path=path)
    trainer.save_checkpoint(root / name)
    return module


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def load(folder: Path) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    return model  # type: ignore[no-any-return]


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    L.seed_everything(1, verbose=False)
    tokenizer.save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG | {"vocab_size": len(tokenizer)})).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_folded(adapter: str, tmp_path: Path) -> None:
    module = trained(tmp_path, ADAPTERS[adapter])
    export(tmp_path / "last.ckpt", tmp_path / "out", max_shard_size="10KB")
    merged = copy.deepcopy(module.model).merge_and_unload()
    exported = load(tmp_path / "out")
    for name, value in merged.state_dict().items():
        # the products are the same, but may be summed in another order
        torch.testing.assert_close(exported.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert (logits(exported) - logits(module.model)).abs().max() < 1e-4  # float32, two layers
    with module.model.disable_adapter():  # the adapter is not nothing
        assert (logits(exported) - logits(module.model)).abs().max() > 1e-2


def test_folded_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    module = trained(tmp_path, ADAPTERS["experts"], dtype="bfloat16")
    export(tmp_path / "last.ckpt", tmp_path / "out")
    wide = copy.deepcopy(module.model).float().merge_and_unload()
    saved = load(tmp_path / "out").state_dict()
    for name, value in wide.state_dict().items():
        assert saved[name].dtype == torch.bfloat16
        # a sum in another order may be rounded to a neighbour
        differing = (saved[name] != value.bfloat16()).float().mean()
        assert differing < 1e-3, name


@pytest.mark.parametrize("adapter", ["experts", "all-linear", "patterns and a whole module"])
def test_separate(adapter: str, tmp_path: Path) -> None:
    module = trained(tmp_path, ADAPTERS[adapter])
    export(tmp_path / "last.ckpt", tmp_path / "out", adapter="separate")
    exported = load(tmp_path / "out")
    with module.model.disable_adapter():
        assert torch.equal(logits(exported), logits(module.model))
    loaded = peft.PeftModel.from_pretrained(exported, tmp_path / "out" / "adapter")
    assert torch.equal(logits(loaded), logits(module.model))
    text = (tmp_path / "out" / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and json.loads(text)["init_lora_weights"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_the_adapter_alone(dtype: str, base: Path, tmp_path: Path) -> None:
    settings = {"config": None, "pretrained": str(base), "adapter_only_checkpoints": True, "dtype": dtype}
    module = trained(tmp_path, ATTENTION, **settings)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    export(tmp_path / "last.ckpt", tmp_path / "out", adapter="separate")
    exported = load(tmp_path / "out")
    assert exported.dtype == getattr(torch, dtype)
    loaded = peft.PeftModel.from_pretrained(exported, tmp_path / "out" / "adapter")
    assert torch.equal(logits(loaded), logits(module.model))
    export(tmp_path / "last.ckpt", tmp_path / "folded", model=str(base))
    # bfloat16: a folded weight is rounded once more than base and adapter
    difference = (logits(load(tmp_path / "folded")) - logits(module.model)).abs().max()
    assert difference < (1e-4 if dtype == "float32" else 0.3)


# -- DeepSpeed --------------------------------------------------------------------------------------------------------

SHARDED = [(1, "bf16-mixed", False), (2, "32-true", True), (3, "32-true", True), (3, "32-true", False)]
SHARDED += [(3, "bf16-true", True)]


def train_sharded(root: str, base: str) -> dict[int, dict[str, Tensor]]:
    """Train under DeepSpeed and resume; return the weights in half of the steps, and how a refusal reads."""
    import deepspeed

    found = {}
    for number, (stage, precision, alone) in enumerate(SHARDED):
        settings = {"config": None, "pretrained": base, "adapter_only_checkpoints": alone}
        for path in (None, Path(root) / f"{number}.ckpt"):
            strategy = DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=0)
            module = trained(
                Path(root), ATTENTION, f"{number}.ckpt" if path is None else f"{number}_again.ckpt", path,
                strategy=strategy, precision=precision, devices=2, max_steps=2 if path is None else 3, **settings,
            )  # fmt: skip
            assert strategy.exclude_frozen_parameters is alone
            sharded = [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
            assert bool(sharded) is (stage == 3)
            if path is None:
                with deepspeed.zero.GatheredParameters(sharded):
                    found[number] = {name: value.detach().clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="LoRA on experts does not train under ZeRO stage 3"):
        trained(Path(root), ADAPTERS["experts"], strategy=DeepSpeedCPUStrategy(stage=3), devices=2)
    return found


@pytest.mark.slow
@pytest.mark.deepspeed
def test_checkpoints_of_deepspeed(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    found = run_ranks(train_sharded, 2, str(tmp_path), str(base), group=False)[0]
    alike = trained(tmp_path, ATTENTION, config=None, pretrained=str(base))
    for number, (_, precision, alone) in enumerate(SHARDED):
        path = tmp_path / f"{number}.ckpt"
        # the same start and the same steps as in one process; sums of float32 in another order, lr 0.1
        if precision == "32-true":
            for name, value in alike.state_dict().items():
                torch.testing.assert_close(found[number][name], value, rtol=1e-3, atol=1e-3)
        names = read_checkpoint(path).tensors.keys()
        assert all("lora_" in name for name in names) is alone
        export(path, tmp_path / f"{number}", adapter="separate")
        loaded = peft.PeftModel.from_pretrained(load(tmp_path / f"{number}"), tmp_path / f"{number}" / "adapter")
        for name, value in loaded.state_dict().items():
            # masters are read where there are some
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if precision != "32-true" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(value.float(), found[number][f"model.{name}"].float(), **tolerance)
        export(path, tmp_path / f"{number}_folded")
        assert (tmp_path / f"{number}_again.ckpt").is_dir()


# -- what is refused --------------------------------------------------------------------------------------------------


def changed(checkpoint: Path, **fields: Any) -> Path:
    contents = torch.load(checkpoint, weights_only=True)
    for name, value in fields.items():
        contents[name] = contents.get(name, {}) | value if isinstance(value, dict) else value
    path = checkpoint.with_name("changed.ckpt")
    torch.save(contents, path)
    return path


def test_edits_that_would_be_lost(base: Path, tmp_path: Path) -> None:
    trained(tmp_path, ATTENTION, config=None, pretrained=str(base), adapter_only_checkpoints=True)
    path = changed(tmp_path / "last.ckpt", callbacks={"KnowledgeEditing{'at': 1}": {"applied": {"a": [True]}}})
    with pytest.raises(
        CheckpointError, match=r"not the experts in which KnowledgeEditing.* an export of it would lose"
    ):
        export(path, tmp_path / "out")
    path = changed(tmp_path / "last.ckpt", hyper_parameters={"pretrained": None, "config": CONFIG})
    with pytest.raises(CheckpointError, match=r"holds trained weights only; name the model .* with --model"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    trained(tmp_path, ATTENTION)
    cases: dict[str, Any] = {
        "has no 'adapter' with their settings": None,
        "should be a peft.LoraConfig or a dict of its settings": 3,
        "should have names of modules or parameters, but has '\\(a\\+\\)\\+": {"target_modules": "(a+)+"},
        "megatron_core of LoraConfig is not supported": {**ATTENTION, "megatron_core": "os"},
        "changes the weights of the base": {**ATTENTION, "init_lora_weights": "pissa"},
        "peft cannot put LoRA into Qwen3MoeForCausalLM": {"target_modules": ["nowhere"]},
        "of another shape": {**ATTENTION, "r": 5},
        "is missing|are missing": {**ATTENTION, "target_modules": ["q_proj", "k_proj"]},
    }
    for message, adapter in cases.items():
        path = changed(tmp_path / "last.ckpt", hyper_parameters={"adapter": adapter})
        with pytest.raises(CheckpointError, match=message):
            export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_that_could_be_separate(tmp_path: Path) -> None:
    weights = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": {"config": CONFIG}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="has no adapter that could be separate"):
        export(tmp_path / "a.ckpt", tmp_path / "out", adapter="separate")
