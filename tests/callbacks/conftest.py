"""A tiny corpus, a tiny model and a trainer that leaves nothing to chance."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data import Corpus, Fact, FactsDataModule, Neighbour, Statement
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.editing import editor as editor_module
from lit_moeedit.module import LitMoE

COUNTRIES = {
    "Italy": ("Rome", "Italian"),
    "Spain": ("Madrid", "Spanish"),
    "Norway": ("Oslo", "Norwegian"),
    "Peru": ("Lima", "Quechua"),
    "Japan": ("Tokyo", "Japanese"),
    "Kenya": ("Nairobi", "Swahili"),
    "Chile": ("Santiago", "Spanish"),
    "Ghana": ("Accra", "English"),
}
CAPITAL = ("The capital of {} is", "In {}, the capital is", "{} is governed from")
LANGUAGE = ("The language of {} is", "In {}, people speak")
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 420,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _corpus() -> Corpus:
    statements = []
    for country, (capital, language) in COUNTRIES.items():
        statements += [Statement(t.format(country), capital, f"{country}|capital") for t in CAPITAL]
        statements += [Statement(t.format(country), language, f"{country}|language") for t in LANGUAGE]
    names = list(COUNTRIES)
    edits = []
    for i, country in enumerate(names[:6]):
        other = names[6 + i % 2]
        edits.append(
            Fact(
                country,
                CAPITAL[0].format(country),
                COUNTRIES[names[(i + 1) % 6]][0],
                COUNTRIES[country][0],
                (CAPITAL[1].format(country),),
                (
                    Neighbour(LANGUAGE[0].format(country), COUNTRIES[country][1], "same_subject"),
                    Neighbour(CAPITAL[0].format(other), COUNTRIES[other][0], "same_relation"),
                ),
            )
        )
    held_out = [s for s in statements if s.prompt.startswith("In ") and s.fact.endswith("language")]
    train = [s for s in statements if s not in held_out]
    return Corpus(train, held_out, edits, prefixes=("", "Note:"))


class CountingEditor(Editor):
    """Remembers the facts of every call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[list[str]] = []

    def edit(self, model: Any, tokenizer: Any, facts: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append([fact.key for fact in facts])
        return super().edit(model, tokenizer, facts, *args, **kwargs)


def _editor(layers: Any = (0, 1), steps: int = 6, **changes: Any) -> CountingEditor:
    targets = TargetOptimizer(steps=steps, learning_rate=0.5, clamp=2.0, weight_decay=0.05)
    return CountingEditor(**{"layers": layers, "targets": targets, "token": "last", **changes})


def _module(**changes: Any) -> LitMoE:
    L.seed_everything(0, verbose=False)
    config = {**CONFIG, **changes.pop("config", {})}
    return LitMoE(**{"config": config, "learning_rate": 3e-3, **changes})


def _data(**changes: Any) -> FactsDataModule:
    keys = {"vocab_size": 420, "batch_size": 8, "samples_per_epoch": 32, **changes}
    return FactsDataModule(_corpus(), **keys)


def _trainer(folder: Any, callbacks: Any, **changes: Any) -> L.Trainer:
    keys: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "deterministic": True,
        "logger": CSVLogger(folder, name=None, version="logs"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        "log_every_n_steps": 1,
        **changes,
    }
    return L.Trainer(callbacks=list(callbacks), **keys)


def _weights(module: L.LightningModule) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Makers of everything a run needs: ``corpus``, ``editor``, ``module``, ``data``, and ``weights`` to compare."""
    return SimpleNamespace(
        corpus=_corpus, editor=_editor, module=_module, data=_data, weights=_weights, config=dict(CONFIG)
    )


@pytest.fixture
def make_trainer() -> Any:
    """``make_trainer(tmp_path, callbacks, **trainer_arguments)``: one CPU, no bars, deterministic, CSV logs."""
    return _trainer


@pytest.fixture
def renewing(tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``renewing(folder, …)``: edits in a run of four epochs of 4 steps; counts searches and passes of text."""
    searched: list[int] = []
    passes: list[int] = []
    optimize, moments = TargetOptimizer.optimize, editor_module.second_moments

    def search(self: Any, model: Any, layer: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        searched.append(len({row.edit for row in rows}))
        return optimize(self, model, layer, rows, *args, **kwargs)

    def read(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return moments(*args, **kwargs)

    monkeypatch.setattr(TargetOptimizer, "optimize", search)
    monkeypatch.setattr(editor_module, "second_moments", read)

    def fit(folder: str = "run", callbacks: Any = (), ckpt: Any = None, editor: Any = None, **settings: Any) -> Any:
        searched.clear(), passes.clear()
        keys = {"renew_below": 0.95, "survival_every_n_steps": 4, **settings}
        editing = KnowledgeEditing(editor or tiny.editor(steps=12), at={"epoch": 1}, **keys)
        module, trainer = tiny.module(), make_trainer(tmp_path / folder, [editing, *callbacks], max_epochs=4)
        trainer.fit(module, tiny.data(), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        weights = tiny.weights(module)
        return SimpleNamespace(editing=editing, searched=list(searched), passes=len(passes), weights=weights)

    return fit


@pytest.fixture(autouse=True)
def reports_without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures in reports, which take long beside a small run, except in the tests of reports and survival."""
    if request.path.stem not in ("test_report", "test_survival"):
        monkeypatch.setattr("lit_moeedit.reports.figures.has_matplotlib", lambda: False)
