"""LitMoE with LoRA adapters: what is trained, saved and loaded, and which settings are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_moeedit.adapters import lora_settings
from lit_moeedit.cli import EditingCLI, run
from lit_moeedit.models.experts import find_model
from lit_moeedit.module import LitMoE
from tests.small_module import CONFIG

peft = pytest.importorskip("peft", reason="needs peft")
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def fit(module: LitMoE, root: Path, path: Path | None = None, steps: int = 2, **settings: Any) -> L.Trainer:
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, use_distributed_sampler=False, **{"enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=2), ckpt_path=path, weights_only=True)
    return trainer


def module(adapter: Any = ATTENTION, **settings: Any) -> LitMoE:
    L.seed_everything(0, verbose=False)
    return LitMoE(
        **{
            "config": CONFIG,
            "adapter": adapter,
            "learning_rate": 0.1,
            "warmup": 0.0,
            "final_learning_rate": 1.0,
            **settings,
        }
    )


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    L.seed_everything(1, verbose=False)
    config = AutoConfig.for_model(**CONFIG | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (ATTENTION, 8),
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, 4),
        ({"target_modules": "all-linear"}, 28),  # four of attention, two of experts and the router, in two layers
    ],
)
def test_only_the_adapter_is_trained(adapter: dict[str, Any], count: int, tmp_path: Path) -> None:
    plain = module(None)
    plain.configure_model()
    adapted = module(adapter)
    trainer = fit(adapted, tmp_path)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trained) == count and all(".lora_" in name for name in trained)
    groups = trainer.optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == count
    assert all(bool(weight.any()) for name, weight in adapted.named_parameters() if name in trained)  # B began with 0
    bases = dict(find_model(plain).named_parameters())
    kept = [weight for weight in adapted.parameters() if not weight.requires_grad]
    assert len(kept) == len(bases) and all(torch.equal(one, two) for one, two in zip(kept, bases.values(), strict=True))


def test_a_model_begins_as_its_base() -> None:
    ids, outputs = torch.tensor([[3, 4, 5]]), []
    for adapter in (None, ATTENTION):
        made = module(adapter)
        made.configure_model()
        outputs.append(made.eval()(input_ids=ids).logits)
    assert torch.equal(*outputs)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_resumed_runs(alone: bool, base: str, tmp_path: Path) -> None:
    settings = {"config": None, "pretrained": base, "adapter_only_checkpoints": alone}
    whole = module(**settings)
    kept = ModelCheckpoint(
        tmp_path, filename="half", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False
    )
    fit(whole, tmp_path, steps=3, callbacks=[kept], enable_checkpointing=True)
    contents = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert contents["hyper_parameters"]["adapter"] == ATTENTION
    names = contents["state_dict"].keys()
    assert (len(names) == 8) is alone and (names == whole.state_dict().keys()) is not alone
    resumed = module(**settings)
    fit(resumed, tmp_path, tmp_path / "half.ckpt", steps=3)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_missing_weight_of_the_adapter(base: str, tmp_path: Path) -> None:
    settings = {"config": None, "pretrained": base, "adapter_only_checkpoints": True}
    fit(module(**settings), tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    for change, message in (
        (lambda state: state.popitem(), "missing or of another model: .*v_proj.lora_B"),
        (lambda state: state.update(other=torch.zeros(1)), "missing or of another model: other"),
    ):
        contents = torch.load(tmp_path / "last.ckpt", weights_only=True)
        change(contents["state_dict"])
        torch.save(contents, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=message):
            fit(module(**settings), tmp_path, tmp_path / "changed.ckpt", steps=4)


def test_a_checkpoint_of_the_adapter_alone_needs_the_setting(base: str, tmp_path: Path) -> None:
    path, settings = tmp_path / "last.ckpt", {"config": None, "pretrained": base}
    written = module(**settings, adapter_only_checkpoints=True)
    fit(written, tmp_path).save_checkpoint(path)
    message = (
        "weights of an adapter alone.*adapter_only_checkpoints of this module is False.*set adapter_only_checkpoints "
        "to True, and 'adapter' and 'pretrained'"
    )
    for adapter in (ATTENTION, None):
        with pytest.raises(ValueError, match=message):
            fit(module(adapter, **settings), tmp_path, path, steps=4)
    with pytest.raises(ValueError, match=message):
        LitMoE.load_from_checkpoint(path, weights_only=True, adapter_only_checkpoints=False)
    # who asks for no strictness gets the adapter
    given = LitMoE.load_from_checkpoint(path, weights_only=True, adapter_only_checkpoints=False, strict=False)
    assert all(torch.equal(value, written.state_dict()[name]) for name, value in given.state_dict().items())
    # other weights that are missing are told by their names
    contents = torch.load(path, weights_only=True)
    contents["state_dict"] = {name: value for name, value in given.state_dict().items() if "norm" not in name}
    torch.save(contents, path)
    with pytest.raises(ValueError, match=r"not one of this model: .*Missing key.*norm"):
        fit(module(**settings), tmp_path, path, steps=4)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_config_as_users_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 2, "target_modules": r".*self_attn\.[qk]_proj", "task_type": "CAUSAL_LM"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"config": CONFIG, "adapter": adapter}}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    made = EditingCLI(LitMoE, run=False, save_config_callback=None, args=[f"--config={path}"]).model
    fit(made, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    # what matched is saved by its name, and nothing that would have to be imported
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kq"]
    expected = {"r": 2, "target_modules": names, "task_type": "CAUSAL_LM"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["adapter"] == expected


def test_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a line if it has to choose
    with pytest.raises(SystemExit, match="0"):
        run(args=["fit", "--config=recipe:qwen3_30b_a3b_zero3", "--config=recipe:lora", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["pretrained"] == "Qwen/Qwen3-30B-A3B" and settings["adapter_only_checkpoints"] is True
    given = {name: value for name, value in settings["adapter"]["init_args"].items() if value is not None}
    assert lora_settings(peft.LoraConfig(**given))["r"] == 16


def test_plain_settings() -> None:
    config = peft.LoraConfig(r=3, target_modules={"b", "a"}, task_type=peft.TaskType.CAUSAL_LM)
    settings = lora_settings(config)
    assert settings == {"r": 3, "target_modules": ["a", "b"], "task_type": "CAUSAL_LM"}
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings and lora_settings(settings) == settings


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (3, "adapter should be a peft.LoraConfig or a dict of its settings, but is a int"),
        (peft.LoHaConfig(), "but is a LoHaConfig"),
        ({"rank": 3}, "adapter: rank of LoraConfig is not supported; supported are r,"),
        (peft.LoraConfig(lora_bias=True), "lora_bias of LoraConfig is not supported"),
        (peft.LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weights of the base"),
        (
            {"target_modules": ".*_proj"},
            "target_modules should have names of modules or parameters, but has '\\.\\*_proj'",
        ),
        (peft.LoraConfig(rank_pattern={"(a+)+": 1}), "rank_pattern should have names"),
        ({"lora_alpha": float("nan")}, "adapter: lora_alpha should be finite, but is nan"),
        (peft.LoraConfig(alpha_pattern={"q_proj": float("inf")}), "adapter: alpha_pattern should be finite"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, r"peft.LoraConfig refuses the settings"),
    ],
)
def test_settings_that_are_refused(adapter: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(adapter)


def test_targets_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"peft cannot put LoRA into Qwen3MoeForCausalLM: .*nowhere"):
        module({"target_modules": ["nowhere"]}).configure_model()


@pytest.mark.parametrize("settings", [{"adapter": None, "config": None, "pretrained": "x"}, {}])
def test_checkpoints_from_which_nothing_could_be_loaded(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="adapter_only_checkpoints needs 'adapter', and 'pretrained'"):
        module(**{"adapter": ATTENTION, **settings}, adapter_only_checkpoints=True)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"adapters need peft: pip install 'lit-moeedit\[peft\]'"):
        module()
    module(None).configure_model()


def test_a_config_without_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
    model = {"class_path": "lit_moeedit.module.LitMoE", "init_args": {"config": CONFIG, "adapter": adapter}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        run(args=["fit", f"--config={tmp_path / 'config.yaml'}"])
    assert "Adapters need peft: pip install 'lit-moeedit[peft]'" in capsys.readouterr().err


def test_a_whole_checkpoint_is_loaded_after_the_base_is_unfrozen() -> None:
    whole = module()
    whole.configure_model()
    whole.requires_grad_(True)
    whole.load_state_dict(whole.state_dict())
