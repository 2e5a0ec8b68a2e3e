"""The configs for models too large to run here: parsed, and held against models of the real sizes without weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from lit_moeedit.cli import run
from lit_moeedit.editing import Editor, TargetOptimizer, evaluate
from lit_moeedit.models.experts import check_editable, expert_layers
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.planning.run_config import read_run
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.sharding.loading import pretrained_model
from tests.large_models import REAL, SMALL_QWEN
from tests.parsed_config import parsed
from tests.processes import run_ranks

ROOT = Path(__file__).parents[1]
SHAPES = {
    "qwen3_30b_a3b_zero3": (128, 2048, 768),
    "gpt_oss_20b_zero3": (32, 2880, 2880),
    "qwen3_6_35b_a3b_zero3": (256, 2048, 512),
}
every_config = pytest.mark.parametrize("name", list(REAL))


def empty(keys: dict[str, Any]) -> PreTrainedModel:
    keys = dict(keys)
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def editor_settings(name: str) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = config["edit"]["editor"]["init_args"]
    return settings


@every_config
def test_it_parses(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a line if it has to choose
    with pytest.raises(SystemExit) as exit:
        run(args=["fit", f"--config={ROOT / 'configs' / name}.yaml", "--print_config"])
    assert exit.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["accelerator"] == "gpu" and printed["trainer"]["devices"] == 8
    assert printed["trainer"]["strategy"]["init_args"]["stage"] == 3
    assert printed["model"]["init_args"]["dtype"] == "bfloat16"


@pytest.mark.usefixtures("own_process")
def test_fsdp2_takes_the_place_of_zero_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = "qwen3_30b_a3b_zero3", "qwen3_30b_a3b_fsdp"
    printed = parsed(capsys, *(f"recipe:{name}" for name in names))
    strategy = printed["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    # nothing is left of DeepSpeed's settings
    sizes = {"data_parallel_size": 16, "tensor_parallel_size": 1}
    assert strategy["init_args"] | sizes == strategy["init_args"] and "stage" not in strategy["init_args"]
    assert printed["model"]["init_args"]["dtype"] == "float32"
    assert printed["edit"]["editor"]["init_args"]["layers"] == editor_settings(names[0])["layers"]
    AutoConfig.for_model(**REAL[names[0]][0]).save_pretrained(tmp_path)
    found = read_run([ROOT / "configs" / f"{name}.yaml" for name in names], model=tmp_path)
    assert found.sharding == Sharding(16, None, 4, fsdp2=True) and found.dtype == torch.float32


@pytest.mark.usefixtures("own_process")
def test_ranks_share_the_experts_in_the_place_of_zero_3(capsys: pytest.CaptureFixture[str]) -> None:
    names = "qwen3_30b_a3b_zero3", "qwen3_30b_a3b_ep"
    printed = parsed(capsys, *(f"recipe:{name}" for name in names))
    sizes, model = printed["trainer"]["strategy"]["init_args"], printed["model"]["init_args"]
    ranks = printed["trainer"]["devices"] * printed["trainer"]["num_nodes"]
    # nothing is left of DeepSpeed's settings
    assert (sizes["data_parallel_size"], sizes["tensor_parallel_size"], "stage" in sizes) == (ranks, 1, False)
    assert model["pretrained"] == "Qwen/Qwen3-30B-A3B" and model["adapter"] is None and model["dtype"] == "float32"
    owners = model["expert_parallel_size"]
    assert owners > 1 and ranks % owners == SHAPES[names[0]][0] % owners == 0
    assert printed["edit"]["editor"]["init_args"]["layers"] == editor_settings(names[0])["layers"]


@every_config
def test_the_model_has_the_layers_to_edit(name: str) -> None:
    keys, billions = REAL[name]
    model = empty(keys)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
    layers = check_editable(model, editor_settings(name)["layers"])
    assert [layer.index for layer in layers] == editor_settings(name)["layers"]
    for layer in layers:
        experts: Any = layer.experts
        assert layer.shape == SHAPES[name]
        assert layer.is_transposed == experts.has_bias == (keys["model_type"] == "gpt_oss")
        assert experts.has_gate and callable(experts._apply_gate)
        # what finds the family's own forward, where no other is configured
        assert callable(type(experts).forward.__wrapped__)
        inputs, outputs = (1, 2) if layer.is_transposed else (2, 1)
        assert experts.gate_up_proj.shape[inputs] == layer.shape[1]
        assert experts.gate_up_proj.shape[outputs] == 2 * layer.shape[2]
        assert hasattr(experts.config, "_experts_implementation")
    # an edit at subject_last is read by the layers above
    assert layers[-1].index < len(expert_layers(model)) - 1


def test_the_papers_settings() -> None:
    qwen, oss, other = (editor_settings(name) for name in REAL)
    for settings in (qwen, oss, other):
        targets = settings["targets"]["init_args"]
        null_space = {"class_path": "lit_moeedit.preservation.NullSpace", "init_args": {"threshold": 0.02}}
        assert (settings["preserve"], settings["ridge"]) == (null_space, 1.0)
        assert (targets["clamp"], targets["weight_decay"], targets["kl"]) == (0.75, 0.5, 0.0625)
    # what a card of 80 GB has room for is not the papers'
    del other["token_budget"], other["targets"]["init_args"]["token_budget"]
    assert qwen == other and qwen["layers"] == [3, 4, 5, 6, 7] and oss["layers"] == [5]
    assert [s["solver"]["init_args"]["passes"] for s in (qwen, oss)] == [4, 10]
    assert [(s["targets"]["init_args"]["steps"], s["targets"]["init_args"]["learning_rate"]) for s in (qwen, oss)] == [
        (25, 0.1),
        (50, 0.2),
    ]


def test_one_gpu_edits_a_model_that_is_not_trained(
    tmp_path: Path, make_model: Any, facts: Any, texts: list[str], tokenizer: Any, own_process: None
) -> None:
    """The config for a single card, on a CPU with a small model of the family."""
    small = make_model("qwen3_moe", moe_intermediate_size=24)
    small.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [dataclasses.asdict(fact) for fact in facts[:3]]
    (tmp_path / "facts.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    config = yaml.safe_load((ROOT / "configs" / "qwen3_30b_a3b_one_gpu.yaml").read_text(encoding="utf-8"))
    config["trainer"] |= {"accelerator": "cpu", "default_root_dir": str(tmp_path / "run"), "enable_progress_bar": False}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "run")
    editing = config["edit"]
    editing["preservation"] = str(tmp_path / "text.txt")
    # a small random model needs other settings than a trained one
    editor = editing["editor"]["init_args"]
    editor |= {"layers": [0, 1], "token": "last", "ridge": 1e-3}
    editor["targets"]["init_args"] |= {"learning_rate": 0.5, "clamp": 8.0, "weight_decay": 0.0}
    config["model"]["init_args"]["pretrained"] = str(tmp_path / "model")
    data = config["data"]["init_args"]
    data["tokenizer"] = str(tmp_path / "model")
    data["corpus"]["init_args"] |= {"path": str(tmp_path / "facts.json"), "edits": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run(args=["validate", f"--config={tmp_path / 'config.yaml'}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 3 and summary["after"]["efficacy"] > summary["before"]["efficacy"]


# -- GPT-OSS: weights as they are published ---------------------------------------------------------------------------


def recipe() -> str:
    """The program in the config's comment."""
    lines = (ROOT / "configs" / "gpt_oss_20b_zero3.yaml").read_text(encoding="utf-8").splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.endswith(what)) for what in ("<<END", "#   END"))
    return "\n".join(line.removeprefix("#   ") for line in lines[start + 1 : end])


def quantised(folder: Path) -> PreTrainedModel:
    """A small GPT-OSS whose experts are MXFP4, as in the published checkpoint: blocks of 32 numbers with a scale."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 16}
    sizes = {"vocab_size": 420, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **small, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def test_quantised_weights_become_editable_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    quantised(tmp_path / "published")
    tokenizer.save_pretrained(tmp_path / "published")
    program = recipe().replace("openai/gpt-oss-20b", str(tmp_path / "published"))
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    config = yaml.safe_load((ROOT / "configs" / "gpt_oss_20b_zero3.yaml").read_text(encoding="utf-8"))
    assert config["model"]["init_args"]["pretrained"] == config["data"]["init_args"]["tokenizer"]
    folder = config["model"]["init_args"]["pretrained"]
    model = pretrained_model(folder, torch.bfloat16)
    (layer,) = check_editable(model, [1])
    assert layer.down_proj.dtype == torch.bfloat16 and layer.shape == (4, 64, 96)
    # the first number of the first block: four bits by a table, times a power of two
    stored = load_file(tmp_path / "published" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    block, scale = int(stored[f"{name}_blocks"][0, 0, 0, 0]), int(stored[f"{name}_scales"][0, 0, 0])
    magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][block & 7]
    assert layer.down_proj[0, 0, 0].item() == (-magnitude if block & 8 else magnitude) * 2.0 ** (scale - 127)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)


# -- Qwen3.6: layers of two kinds, and a text model inside another -----------------------------------------------------


def test_the_text_part_of_a_multimodal_checkpoint_is_read(tmp_path: Path) -> None:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5_moe", text_config=SMALL_QWEN, vision_config=vision)
    whole: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    (layer,) = check_editable(pretrained_model(str(tmp_path), torch.float32), [1])
    stored = dict(whole.named_parameters())["model.language_model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(layer.down_proj, stored)


def test_experts_beside_linear_attention_are_watched_and_edited(make_model, facts, texts, tokenizer) -> None:
    model = make_model("qwen3_5_moe_text", **SMALL_QWEN)
    kinds = model.config.layer_types
    assert set(kinds[:-1]) == {"linear_attention"} and kinds[-1] == "full_attention"
    layers, seen, outputs = check_editable(model, [0, 1]), dict[int, RoutedKeys](), dict[int, torch.Tensor]()
    for layer in layers:
        layer.experts.register_forward_hook(lambda _, args, output, i=layer.index: outputs.update({i: output}))
    with watch_keys(layers, lambda: None, lambda layer, keys: seen.update({layer.index: keys})), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]]))
    for layer in layers:
        keys, output = seen[layer.index], torch.zeros(8, 32)
        for token, expert, gate, key in zip(keys.token, keys.expert, keys.gate, keys.key, strict=True):
            output[token] += gate * (layer.down_proj[expert] @ key)
        # relative to the largest output: single entries cancel
        largest = float(output.detach().abs().max())
        torch.testing.assert_close(output, outputs[layer.index], rtol=0, atol=1e-5 * largest)
    editor = Editor(
        [0, 1], targets=TargetOptimizer(steps=20, learning_rate=0.5, clamp=4.0), token="last", preserve="none"
    )
    before = evaluate(model, tokenizer, facts).metrics["efficacy_accuracy"]
    editor.edit(model, tokenizer, facts)
    assert evaluate(model, tokenizer, facts).metrics["efficacy_accuracy"] > before


def train_and_edit(root: str) -> int:
    """Facts edited behind the first epoch under ZeRO stage 3."""
    import lightning as L

    from lit_moeedit.callbacks import EditReport, KnowledgeEditing
    from lit_moeedit.data import Atlas, FactsDataModule
    from lit_moeedit.module import LitMoE
    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

    data = FactsDataModule(Atlas(edits=4), vocab_size=420, batch_size=4, samples_per_epoch=16, preservation_samples=32)
    module = LitMoE(config={"model_type": "qwen3_5_moe_text", **SMALL_QWEN}, router_loss=0.0)
    editor = Editor([0, 1], targets=TargetOptimizer(steps=2), token="last")
    editing = KnowledgeEditing(editor, at={"epoch": 1}, on_failure="keep")
    strategy = DeepSpeedCPUStrategy(stage=3, param_persistence_threshold=0)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[editing, EditReport(console=False)],
        num_sanity_val_steps=0, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(module, data)
    return len(editing.applied_facts)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_experts_beside_linear_attention_are_edited_sharded(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert run_ranks(train_and_edit, 2, str(tmp_path), group=False) == [4, 4]
