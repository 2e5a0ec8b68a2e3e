"""A run that resumes has the user's settings, says where the checkpoint has others, and imports nothing for it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_moeedit import cli
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.module import LitMoE
from tests.checkpoints.test_export_folder import CONFIG, weights

pytestmark = [pytest.mark.usefixtures("own_process"), pytest.mark.filterwarnings("ignore:.*ckpt_path")]

MODULE = (
    "import lightning as L\nfrom pathlib import Path\nPath({mark!r}).touch()\nclass Mine(L.LightningModule): pass\n"
)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported, and leaves a mark when it is."""
    mark = tmp_path / "was-imported"
    (tmp_path / "planted_module.py").write_text(MODULE.format(mark=str(mark)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    return mark


def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Any, path: Path, *options: str) -> Any:
    """The settings of the module that ``fit`` would run with."""
    monkeypatch.setattr(cli.EditingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(cli.EditingCLI, "_run_subcommand", lambda *_: None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    args = ["fit", f"--config={tmp_path / 'run.yaml'}", f"--ckpt_path={path}", *options]
    monkeypatch.setattr(sys, "argv", ["lit-moeedit", *args])
    command = cli.run()
    assert command is not None
    return command.config.fit.model


def run_config(**settings: Any) -> dict[str, Any]:
    corpus = {"class_path": "lit_moeedit.data.Atlas"}
    return {
        "model": {"class_path": "lit_moeedit.module.LitMoE", "init_args": settings},
        "data": {"class_path": "lit_moeedit.data.FactsDataModule", "init_args": {"corpus": corpus}},
    }


def checkpoint(tmp_path: Path, **settings: Any) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights(CONFIG), "hyper_parameters": settings}, path)
    return path


def test_a_class_of_the_checkpoint_is_not_imported(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, _class_path="planted_module.Mine", learning_rate=0.1, config=CONFIG)
    config = run_config(config=CONFIG)
    with pytest.raises(CheckpointError, match=r"names the class 'planted_module\.Mine', which this run does not use"):
        parsed(monkeypatch, tmp_path, config, path)
    assert not planted.exists() and "planted_module" not in sys.modules


class Wide(LitMoE):
    """Has settings that a parser imports classes and functions for."""

    def __init__(
        self, inner: L.LightningModule | None = None, activation: type[L.LightningModule] | None = None
    ) -> None:
        super().__init__(config=CONFIG)


@pytest.mark.parametrize(
    "settings",
    [{"inner": {"class_path": "planted_module.Mine"}}, {"activation": "planted_module.Mine"}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_class_in_a_setting_is_not_imported(
    settings: dict[str, Any], planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{Wide.__module__}.Wide"
    sys.modules.setdefault(Wide.__module__, sys.modules[__name__])
    path, config = checkpoint(tmp_path, _class_path=name, **settings), run_config()
    config["model"] = {"class_path": name}
    with pytest.raises(CheckpointError, match=r"names 'planted_module\.Mine', whose module would have to be imported"):
        parsed(monkeypatch, tmp_path, config, path)
    assert not planted.exists() and "planted_module" not in sys.modules
    # what the user names is imported
    config["model"]["init_args"] = settings
    parsed(monkeypatch, tmp_path, config, path)
    assert planted.exists()


def test_what_the_user_gives_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"learning_rate": 0.004, "weight_decay": 0.3, "warmup": 0.2, "betas": [0.8, 0.9], "config": CONFIG}
    path = checkpoint(tmp_path, _class_path="lit_moeedit.module.LitMoE", _instantiator="x", **saved)
    config = run_config(config=CONFIG, warmup=0.1)
    model = parsed(monkeypatch, tmp_path, config, path, "--model.init_args.learning_rate=1e-9")
    assert model.class_path == "lit_moeedit.module.LitMoE"
    found = {name: model.init_args[name] for name in ("learning_rate", "weight_decay", "warmup", "label_smoothing")}
    # of the command line, the checkpoint, the config, and nobody
    assert found == {"learning_rate": 1e-9, "weight_decay": 0.3, "warmup": 0.1, "label_smoothing": 0.0}
    assert list(model.init_args.betas) == [0.8, 0.9] and model.init_args.config == CONFIG

    config["model"]["class_path"] = "lit_moeedit.LitMoE"  # another name of the same class
    model = parsed(monkeypatch, tmp_path, config, path)
    assert model.init_args.learning_rate == 0.004


def test_the_settings_of_another_class_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sys.modules.setdefault(Wide.__module__, sys.modules[__name__])
    path = checkpoint(tmp_path, _class_path=f"{Wide.__module__}.Wide", learning_rate=0.004)
    model = parsed(monkeypatch, tmp_path, run_config(config=CONFIG), path)
    assert model.init_args.learning_rate == 0.001
    assert "Wide; LitMoE has only the settings of this run" in caplog.text


def test_weights_from_elsewhere_are_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, _class_path="lit_moeedit.module.LitMoE", config=CONFIG, pretrained=None, warmup=0.2)
    model = parsed(monkeypatch, tmp_path, run_config(pretrained="some/model"), path)
    assert (model.init_args.pretrained, model.init_args.config, model.init_args.warmup) == ("some/model", None, 0.2)


def test_a_config_of_very_many_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = {**CONFIG, "num_hidden_layers": 10**7}
    path = checkpoint(tmp_path, _class_path="lit_moeedit.module.LitMoE", config=huge)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the config has num_hidden_layers 10,000,000"):
        parsed(monkeypatch, tmp_path, run_config(), path)


# -- the state of the optimizer ---------------------------------------------------------------------------------------


def train(root: Path, start: Path | None = None, kind: type[LitMoE] = LitMoE, **settings: Any) -> LitMoE:
    """Train a small model for two epochs of four steps, or from a checkpoint on, and keep one after each epoch."""
    L.seed_everything(0, verbose=False)
    model = kind(config=CONFIG, router_loss=0.0, **settings)
    ids = torch.randint(3, 60, (8, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(root, filename="{epoch}", save_top_k=-1, enable_version_counter=False)],
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows, batch_size=2), ckpt_path=start, weights_only=True)
    assert trainer.global_step == 8
    return model


def rate_and_decay(path: Path) -> tuple[float, float, float, tuple[float, float]]:
    contents = torch.load(path, weights_only=True)
    (state,), (scheduler,) = contents["optimizer_states"], contents["lr_schedulers"]
    group = state["param_groups"][0]
    assert group["lr"] == scheduler["_last_lr"][0]
    return group["lr"], scheduler["base_lrs"][0], group["weight_decay"], tuple(group["betas"])


def test_an_unchanged_run_resumes_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.004, "weight_decay": 0.3}
    whole = train(tmp_path / "whole", **settings)
    resumed = train(tmp_path / "part", tmp_path / "whole" / "epoch=0.ckpt", **settings)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert rate_and_decay(tmp_path / "part" / "epoch=1.ckpt") == rate_and_decay(tmp_path / "whole" / "epoch=1.ckpt")
    assert "the checkpoint has" not in caplog.text


def test_changed_settings_reach_the_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, learning_rate=0.004, weight_decay=0.3)
    start = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        model = train(tmp_path, tmp_path / "epoch=0.ckpt", learning_rate=1e-9, weight_decay=0.0, betas=(0.5, 0.6))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lit_moeedit")]
    assert lines == [
        "learning_rate: the checkpoint has 0.004, but 1e-09 is used, as this run says",
        "weight_decay: the checkpoint has 0.3, but 0.0 is used, as this run says",
        "betas: the checkpoint has (0.9, 0.95), but (0.5, 0.6) is used, as this run says",
    ]
    rate, base, decay, betas = rate_and_decay(tmp_path / "epoch=1.ckpt")
    assert 0 < rate < base == 1e-9 and decay == 0.0 and betas == (0.5, 0.6)
    moved = max(float((value - start[name]).abs().max()) for name, value in model.state_dict().items())
    assert moved < 1e-6  # four steps of AdamW, each of about the learning rate, and rounding


class Watched(LitMoE):
    """Keeps the learning rate of every step."""

    rates: list[float]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.rates = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def test_a_changed_schedule_holds_from_the_first_step(tmp_path: Path) -> None:
    train(tmp_path / "other", learning_rate=0.004, final_learning_rate=0.1)
    settings: dict[str, Any] = {"learning_rate": 0.002, "final_learning_rate": 0.9, "cosine_until": 0.7}
    whole = train(tmp_path / "whole", kind=Watched, **settings)
    resumed = train(tmp_path / "part", tmp_path / "other" / "epoch=0.ckpt", Watched, **settings)
    assert isinstance(whole, Watched) and isinstance(resumed, Watched)
    assert resumed.rates == whole.rates[4:] and len(set(whole.rates)) > 3


def test_a_key_of_a_config_that_only_one_of_them_has_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "norm_topk_prob"}
    saved = LitMoE(config=config | {"norm_topk_prob": True}, learning_rate=0.1)
    for module, line in (
        (LitMoE(config=config, learning_rate=0.1), "the checkpoint has True, but its default is used"),
        (
            LitMoE(config=config | {"norm_topk_prob": True, "rms_norm_eps": 0.5}, learning_rate=0.1),
            "config.rms_norm_eps: the checkpoint has its default, but 0.5 is used",
        ),
    ):
        caplog.clear()
        module.on_load_checkpoint({"hyper_parameters": dict(saved.hparams)})
        (message,) = caplog.messages
        assert line in message
