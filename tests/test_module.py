from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_moeedit.module import LitMoE
from lit_moeedit.optimizers import adam_epsilon, may_be_fused
from tests.small_module import CONFIG


def _module(**changes):
    torch.manual_seed(0)
    module = LitMoE(**{"config": CONFIG, **changes})
    module.configure_model()
    return module


def _batch(size=3, length=7, seed=0):
    ids = torch.randint(3, 60, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    mask[0, 5:], ids[0, 5:], labels[0, 5:] = 0, 0, -100
    labels[1, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _fit(module, tmp_path, epochs=1, batches=4, tokenizer=None, **changes):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader([_batch(seed=seed) for seed in range(batches)], batch_size=None)

        def val_dataloader(self):
            return DataLoader([_batch(2, seed=8), _batch(3, 8, seed=9)], batch_size=None)

        test_dataloader = val_dataloader

    data = Data()
    data.tokenizer = tokenizer
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **changes,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of 'pretrained'"),
        ({"pretrained": "somewhere", "config": CONFIG}, "exactly one of 'pretrained'"),
        ({"config": {"hidden_size": 3}}, r"config needs 'model_type' .*\['hidden_size'\]"),
        ({"config": CONFIG, "dtype": "float33"}, "dtype must name a torch dtype .* got 'float33'"),
        ({"config": CONFIG, "dtype": "nn"}, "dtype must name a torch dtype"),
        ({"config": CONFIG, "warmup": 1.0}, r"warmup is a share of all steps, in \[0, 1\), got 1.0"),
        ({"config": CONFIG, "label_smoothing": -0.1}, "label_smoothing must be"),
        ({"config": CONFIG, "expert_parallel_size": 2}, r"above 1 it needs 'pretrained'.*; got 2"),
        ({"pretrained": "somewhere", "expert_parallel_size": 0}, r"must be at least 1.*; got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LitMoE(**arguments)


def test_the_model_is_made_once():
    module = _module()
    model = module.model
    module.configure_model()
    assert module.model is model and model.training
    with pytest.raises(AssertionError, match="configure_model"):
        LitMoE(config=CONFIG)(input_ids=torch.tensor([[1]]))


def test_dtype_and_config_stay_as_given():
    config = dict(CONFIG)
    module = _module(config=config, dtype="bfloat16")
    assert config == CONFIG
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())


def test_pretrained_gives_the_same_logits(tmp_path, tokenizer):
    first = _module(config={**CONFIG, "vocab_size": 420})
    first.model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    tokenizer.save_pretrained(tmp_path)
    second = LitMoE(pretrained=str(tmp_path))
    second.configure_model()
    assert second.model.training
    ids = _batch()["input_ids"]
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    text = "The city of Rome lies in Italy"
    assert second.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert second.tokenizer is second.tokenizer
    assert first.tokenizer is None


def test_pickled_weights_are_refused(tmp_path):
    model = _module().model
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        LitMoE(pretrained=str(tmp_path)).configure_model()


# -- losses -----------------------------------------------------------------------------------------------------------


def _by_hand(module, batch, smoothing):
    """Sum the losses of the counted tokens, one after the other."""
    with torch.no_grad():
        logits = module.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    losses = []
    for row in range(len(logits)):
        for position in range(logits.shape[1] - 1):
            label = int(batch["labels"][row, position + 1])
            if label != -100:
                log_prob = logits[row, position].log_softmax(-1)
                losses.append(-(1 - smoothing) * log_prob[label] - smoothing * log_prob.mean())
    return torch.stack(losses)


def _step(module, batch):
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    return module.training_step(batch, 0), logged


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_by_hand(smoothing):
    module, batch = _module(router_loss=0.0, label_smoothing=smoothing), _batch()
    loss, logged = _step(module, batch)
    torch.testing.assert_close(loss.detach(), _by_hand(module, batch, smoothing).mean())
    assert logged.keys() == {"train/loss"}


def test_the_router_loss_is_added():
    module, batch = _module(router_loss=0.5, label_smoothing=0.1), _batch()
    loss, logged = _step(module, batch)
    auxiliary = module.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss
    assert auxiliary > 0.1
    torch.testing.assert_close(logged["train/router_loss"], auxiliary)
    torch.testing.assert_close(logged["train/loss"].detach(), _by_hand(module, batch, 0.1).mean())
    torch.testing.assert_close(loss, logged["train/loss"] + 0.5 * auxiliary)
    loss.backward()
    assert module.model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stage", ["val", "test"])
def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path, stage):
    module = _module()
    trainer = _fit(module, tmp_path)
    if stage == "test":
        trainer.test(module, trainer.datamodule, verbose=False)
    module.eval()
    losses = torch.cat([_by_hand(module, batch, 0.0) for batch in trainer.datamodule.val_dataloader()])
    metrics = trainer.callback_metrics
    assert metrics[f"{stage}/perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert metrics[f"{stage}/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert 0 <= metrics[f"{stage}/accuracy"] <= 1


def test_predict_gives_the_most_likely_tokens(tmp_path):
    module, batch = _module().eval(), _batch()
    tokens = module.predict_step(batch, 0)
    assert tokens.shape == batch["input_ids"].shape and tokens.dtype == torch.long
    with torch.no_grad():
        expected = module.model(input_ids=batch["input_ids"][2:]).logits[0, -1].argmax()
    assert tokens[2, -1] == expected


def test_training_lowers_the_loss(tmp_path):
    module = _module(learning_rate=0.02)
    before = _by_hand(module, _batch(), 0.0).mean()
    _fit(module, tmp_path, epochs=8)
    assert _by_hand(module, _batch(), 0.0).mean() < 0.7 * before


# -- optimizer --------------------------------------------------------------------------------------------------------


def test_warm_up_and_cosine(tmp_path):
    rates = []

    class Reader(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = _module(learning_rate=0.01, warmup=0.2, final_learning_rate=0.1)
    _fit(module, tmp_path, epochs=5, batches=4, callbacks=[Reader()])
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    expected = [0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 16)) / 2) for step in range(16)]
    assert rates[4:] == pytest.approx(expected)


def test_without_vectors_to_train_there_is_one_group(tmp_path):
    module = _module(weight_decay=0.3)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim >= 2)
    [group] = _fit(module, tmp_path).optimizers[0].param_groups
    assert group["weight_decay"] == 0.3
    assert len(group["params"]) == sum(p.ndim >= 2 for p in module.parameters())


def test_only_matrices_decay(tmp_path):
    module = _module(weight_decay=0.3, betas=(0.8, 0.9))
    module.model.model.embed_tokens.weight.requires_grad_(False)
    trainer = _fit(module, tmp_path)
    [optimizer] = trainer.optimizers
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert decayed["betas"] == (0.8, 0.9)
    names = {id(p): name for name, p in module.named_parameters()}
    assert all("norm" in names[id(p)] for p in others["params"]) and others["params"]
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert "model.model.layers.0.mlp.experts.down_proj" in decayed_names
    assert "model.model.embed_tokens.weight" not in decayed_names
    assert len(decayed["params"]) + len(others["params"]) == len(names) - 1


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"the tokenizer has {len(tokenizer)} tokens, but the model embeds only 60"):
        _fit(_module(), tmp_path, tokenizer=tokenizer)
    module = _module(config={**CONFIG, "vocab_size": len(tokenizer)})
    _fit(module, tmp_path, tokenizer=tokenizer)
    assert module.tokenizer is tokenizer


def test_a_checkpoint_restores_the_module(tmp_path):
    module = _module(learning_rate=0.5)
    trainer = _fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LitMoE.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams["learning_rate"] == 0.5
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_fresh_model_is_a_model_of_transformers():
    assert type(_module().model) is type(AutoModelForCausalLM.from_config(_module().model.config))


class _Clipping(LitMoE):
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


@pytest.mark.parametrize(
    ("plugin", "clip", "kind", "fused"),
    [
        (Precision(), 1.0, LitMoE, True),
        (HalfPrecision("bf16-true"), 1.0, LitMoE, True),
        (DeepSpeedPrecision("bf16-mixed"), 1.0, LitMoE, True),
        (MixedPrecision("bf16-mixed", "cpu"), None, LitMoE, True),
        (MixedPrecision("bf16-mixed", "cpu"), 0.0, LitMoE, True),
        (MixedPrecision("bf16-mixed", "cpu"), 1.0, LitMoE, False),
        (MixedPrecision("bf16-mixed", "cpu"), None, _Clipping, False),
        (MixedPrecision("16-mixed", "cpu"), None, LitMoE, False),
        (MixedPrecision("16-mixed", "cpu"), 1.0, LitMoE, False),
    ],
)
def test_what_may_be_fused(plugin, clip, kind, fused):
    module = kind(config=CONFIG)
    module._trainer = SimpleNamespace(precision_plugin=plugin, gradient_clip_val=clip)
    assert may_be_fused(module) is fused


def test_a_loss_scale_is_taken_off_before_gradients_are_clipped(tmp_path):
    # what a GPU does under 16-mixed, with the scaler of a CPU and bfloat16 in its place
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(max(float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None))

    module = _module(learning_rate=1e-3)
    before = [weight.detach().clone() for weight in module.parameters()]
    trainer = _fit(module, tmp_path, epochs=2, gradient_clip_val=0.5, callbacks=[Look()], plugins=[plugin])
    assert not trainer.optimizers[0].param_groups[0]["fused"]
    # gradients of a loss of about 4 are far below the scale
    assert seen and max(seen) < 2.0**5
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_the_metric_follows_the_logits():
    module = _module()
    module.perplexity.set_dtype(torch.bfloat16)
    assert module._perplexity_on(torch.device("cpu")).count.dtype == torch.float32
    moved = module._perplexity_on(torch.device("meta"))
    assert moved is module.perplexity and moved.count.device.type == "meta" and moved.count.dtype == torch.float32


def test_epsilon_is_not_nothing_in_float16():
    for dtype, epsilon in ((torch.float16, 1e-4), (torch.bfloat16, 1e-8), (torch.float32, 1e-8)):
        weight = torch.ones(1, dtype=dtype)
        assert adam_epsilon(SingleDeviceStrategy("cpu"), [weight]) == epsilon
        assert torch.tensor(epsilon, dtype=dtype) > 0
