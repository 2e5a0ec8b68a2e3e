"""What is exported is what was trained, bit by bit, whatever the checkpoint looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import read_checkpoint
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from tests.processes import run_code, run_ranks

COMMON: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    # experts are cut apart, weights are tied
    "qwen3_moe": {"moe_intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    # experts stay together; 5 biases and 2 sinks
    "gpt_oss": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # buffers in the state dict, which transformers keeps in float32
    "deepseek_v3": {
        "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


class Partly(LitMoE):
    """A model with frozen weights, an odd number of them among them, and buffers that are not zero."""

    def configure_model(self) -> None:
        made = self.model is None
        super().configure_model()
        assert self.model is not None
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(
                not name.endswith(("0.self_attn.q_proj.weight", "router.bias", "0.input_layernorm.weight"))
            )
        for number, (name, buffer) in enumerate(self.model.named_buffers()):
            if made and name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(0.1, 0.3, buffer.numel()) + number)


def module(family: str, kind: type[LitMoE] = LitMoE, **settings: Any) -> LitMoE:
    L.seed_everything(0, verbose=False)
    config = {"model_type": family, **COMMON, **FAMILIES[family]}
    return kind(config=config, learning_rate=0.01, router_loss=0.0, **settings)


def train(model: LitMoE, root: Path, name: str, **settings: Any) -> L.Trainer:
    """Two steps, and the checkpoint ``name``."""
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows, batch_size=2))
    trainer.save_checkpoint(root / name)
    return trainer


def check(checkpoint: Path, state: dict[str, Tensor], config: dict[str, Any], **options: Any) -> None:
    """Check an export, and what ``from_pretrained`` makes of it, against the weights in training."""
    output, reference = checkpoint.with_suffix(".out"), checkpoint.with_suffix(".reference")
    export(checkpoint, output, max_shard_size="10KB", **options)
    expected = {name: value.clone() for name, value in state.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.load_state_dict(expected, assign=True)
    model.tie_weights()
    model.save_pretrained(reference)
    assert not list(output.parent.glob(".*.part"))

    index = json.loads((output / "model.safetensors.index.json").read_text(encoding="utf-8"))
    saved = {name: load_file(output / file)[name] for name, file in index["weight_map"].items()}
    wanted = load_file(reference / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert {path.name for path in output.glob("*.safetensors")} == set(index["weight_map"].values())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    for name, value in wanted.items():
        assert saved[name].dtype == value.dtype and torch.equal(saved[name], value), name
    file = "generation_config.json"
    assert (output / file).read_text(encoding="utf-8") == (reference / file).read_text(encoding="utf-8")
    first, second = (AutoConfig.from_pretrained(folder).to_dict() for folder in (output, reference))
    assert {**first, "_name_or_path": ""} == {**second, "_name_or_path": ""}

    loaded: PreTrainedModel
    loaded, found = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(found.values())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_one_process(family: str, dtype: str, tmp_path: Path) -> None:
    model = module(family, Partly, dtype=dtype)
    train(model, tmp_path, "last.ckpt")
    assert model.model is not None
    check(tmp_path / "last.ckpt", model.model.state_dict(), model.hparams["config"])


def test_the_model_that_training_started_from(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    start = make_model("qwen3_moe")
    start.generation_config.temperature = 0.25
    start.generation_config.do_sample = True
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    L.seed_everything(0, verbose=False)
    model = LitMoE(pretrained=str(tmp_path / "start"))
    train(model, tmp_path, "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "out", dtype="bfloat16")
    for file in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "start" / file).read_text(), file
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded.state_dict()[name], value.bfloat16()), name


def test_the_tokenizer_of_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: Any) -> None:
    model = LitMoE(config={"model_type": "qwen3_moe", **COMMON, **FAMILIES["qwen3_moe"], "vocab_size": len(tokenizer)})
    model._tokenizer = tokenizer
    train(model, tmp_path, "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "out")
    text = "The capital of France is Rome."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tokenizer(text).input_ids

    contents = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name, text in (("../out.json", "{}"), ("config.py", "x"), ("a/b.json", "{}"), ("tokenizer.json", b"{}")):
        torch.save({**contents, "tokenizer": {name: text}}, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match=r"bad\.ckpt: field 'tokenizer' should hold texts of files, but has"):
            export(tmp_path / "bad.ckpt", tmp_path / "bad")
    torch.save({**contents, "tokenizer": {**contents["tokenizer"], "tokenizer.json": "{"}}, tmp_path / "bad.ckpt")
    export(tmp_path / "bad.ckpt", tmp_path / "bad")
    assert "the tokenizer of the checkpoint is not written" in caplog.text
    assert {path.name for path in (tmp_path / "bad").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip


class Wrapper(L.LightningModule):
    """Somebody else's module: it says nothing about its model, and has more than that."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.student = model
        self.teacher = teacher
        self.scale = torch.nn.Parameter(torch.ones(3))


def save(wrapped: L.LightningModule, path: Path) -> None:
    torch.save({"state_dict": wrapped.state_dict(), "pytorch-lightning_version": "2.6.6"}, path)


def test_other_modules_say_their_model(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    model, path = make_model("qwen3_moe"), tmp_path / "other.ckpt"
    model.config.save_pretrained(tmp_path / "config")
    said = str(tmp_path / "config")
    save(Wrapper(model), path)
    with pytest.raises(
        CheckpointError, match=r"'hyper_parameters' should have .* but has \[\]; name the model with --model"
    ):
        export(path, tmp_path / "out")
    export(path, tmp_path / "out", model=said)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    # a config alone is no tokenizer, although transformers makes one of it
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with pytest.raises(ValueError, match=r"--tokenizer: .* cannot be used: it has no vocabulary"):
        export(path, tmp_path / "out2", model=said, tokenizer=said)
    with pytest.raises(ValueError, match="max_shard_size should be a size such as 5GB or 500MB"):
        export(path, tmp_path / "out2", model=said, max_shard_size="5 parsecs")

    save(Wrapper(model, make_model("qwen3_moe")), path)
    with pytest.raises(CheckpointError, match=r"several such models; choose one with --prefix: student\., teacher\."):
        export(path, tmp_path / "out2", model=said)
    export(path, tmp_path / "out2", model=said, prefix="teacher.")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["config", "other.ckpt", "out", "out2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"layers\.3\..* more are missing"),
        ({"num_hidden_layers": 2}, r"layers\.2\..* more are not of that model"),
        ({"hidden_size": 64}, r"embed_tokens\.weight \(420, 32\) instead of \(420, 64\),.* are of another shape"),
        ({"model_type": "no_such_family"}, "no causal language model can be made of .*no_such_family"),
        ({"num_hidden_layers": "many"}, "no causal language model can be made of .*got str"),
        ({"model_type": "vit"}, "no causal language model can be made of .*ViTConfig"),
    ],
)
def test_a_config_that_does_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model("qwen3_moe")
    (tmp_path / "config").mkdir()
    text = json.dumps({**json.loads(model.config.to_json_string(use_diff=False)), **changes})
    (tmp_path / "config" / "config.json").write_text(text, encoding="utf-8")
    save(Wrapper(model), tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "it.ckpt", tmp_path / "out", model=str(tmp_path / "config"))
    assert not (tmp_path / "out").exists()


# -- DeepSpeed --------------------------------------------------------------------------------------------------------

RUNS = [
    (0, "bf16-true", "qwen3_moe", LitMoE),
    (1, "bf16-mixed", "deepseek_v3", LitMoE),
    (2, "32-true", "gpt_oss", Partly),
    (2, "bf16-true", "qwen3_moe", Partly),
    (3, "32-true", "qwen3_moe", LitMoE),
    (3, "bf16-true", "deepseek_v3", Partly),
    (3, "bf16-mixed", "gpt_oss", Partly),
]


def train_all(root: str) -> None:
    """Train under DeepSpeed, and save checkpoints and the weights they are of: as they are, and their master copies."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for number, (stage, precision, family, kind) in enumerate(RUNS):
        # 100 keeps some weights whole on every rank
        strategy = DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=100 * (number % 2))
        trainer = train(
            module(family, kind), Path(root), f"{number}.ckpt", devices=2, strategy=strategy, precision=precision
        )
        model: Any = trainer.lightning_module.model
        parameters = list(model.parameters())
        whole = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else nullcontext()
        with whole:
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and stage}
        masters = {name: safe_get_full_fp32_param(weight).clone() for name, weight in trained.items()}
        if trainer.global_rank == 0:
            torch.save({"state": state, "masters": masters}, Path(root) / f"{number}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    root = tmp_path_factory.mktemp("deepspeed")
    run_ranks(train_all, 2, str(root), group=False)
    return root


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "number", range(len(RUNS)), ids=[f"stage {stage}, {precision}, {family}" for stage, precision, family, _ in RUNS]
)
def test_a_checkpoint_of_deepspeed(number: int, trained: Path) -> None:
    family = RUNS[number][2]
    found = torch.load(trained / f"{number}.pt", weights_only=True)
    path = trained / f"{number}.ckpt"
    assert path.is_dir()
    check(path, found["state"], {"model_type": family, **COMMON, **FAMILIES[family]})
    # asked for float32, the masters come as they are
    tensors = read_checkpoint(path).tensors
    for name, value in found["masters"].items():
        assert torch.equal(tensors[f"model.{name}"].read(torch.float32), value), name
    assert tensors.keys() >= {f"model.{name}" for name in found["state"]}


@pytest.mark.slow
@pytest.mark.deepspeed
def test_deepspeed_is_not_needed_to_export(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None; from pathlib import Path; "
        "from lit_moeedit.checkpoints.export import export; "
        f"[export(Path({str(trained)!r}, f'{{n}}.ckpt'), Path({str(tmp_path)!r}, str(n))) for n in range({len(RUNS)})]"
    )
    run_code(code)
    assert len(list(tmp_path.glob("*/model.safetensors"))) == len(RUNS)
