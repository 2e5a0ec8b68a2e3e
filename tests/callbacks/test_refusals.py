"""What an edit would stumble over is refused when the run starts, before any forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_moeedit.callbacks import KnowledgeEditing, RoutingMonitor
from lit_moeedit.data import Neighbour
from lit_moeedit.editing import EditMemory, Editor, FineTuning
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.solvers import Tucker
from tests.callbacks.test_foreign_modules import TEXTS, PlainModule

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("in eval mode at the start", "logs directory")
]


class Slow:
    """A tokenizer written in Python: no offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)


class Claiming(Slow):
    """One that claims to be fast and has no offsets."""

    is_fast = True

    def __call__(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        if return_offsets_mapping:
            raise NotImplementedError("return_offset_mapping is not available")
        return self.tokenizer(*args, **kwargs)


class Without(Slow):
    """One that returns none."""

    is_fast = True

    def __call__(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)


class Empty(Slow):
    """One whose offsets are all empty."""

    is_fast = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.tokenizer(*args, **kwargs)
        if "offset_mapping" in batch:
            batch["offset_mapping"] = [[(0, 0) for _ in row] for row in batch["offset_mapping"]]
        return batch


@pytest.fixture
def refuse(make_trainer: Any, tmp_path: Any, make_model: Any, tokenizer: Any, facts: Any) -> Any:
    """``refuse(message, …)``: a run with an edit in a later epoch refuses to start, without a single forward."""

    def check(message: str, editor: Any = None, words: Any = None, error: Any = ValueError, **changes: Any) -> None:
        model = make_model("qwen3_moe")
        forwards: list[Any] = []
        model.register_forward_hook(lambda *_: forwards.append("model"))
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: forwards.append("layer"))
        arguments = {"facts": facts, "preservation": TEXTS, "at": {"epoch": 1}, **changes}
        module = PlainModule(model, tokenizer if words is None else words(tokenizer))
        editing = KnowledgeEditing(editor or Editor([1]), on_failure="keep", **arguments)
        # the monitor stands first, and has a forward of its own to make
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, [RoutingMonitor(TEXTS), editing], max_epochs=2).fit(module)
        assert not forwards

    return check


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (Slow, "Slow has no character offsets; a fast tokenizer is needed"),
        (Claiming, r"Claiming returns no character offsets \(NotImplementedError: return_offset_mapping is not avail"),
        (Without, r"Without returns no character offsets \(KeyError: 'offset_mapping'\)"),
        (Empty, "Empty returns empty character offsets"),
    ],
)
def test_a_tokenizer_without_offsets(refuse: Any, words: Any, message: str) -> None:
    refuse(message, words=words)


def test_settings_that_do_not_fit_the_layers(refuse: Any, make_model: Any) -> None:
    refuse(
        r"KnowledgeEditing: ranks must be at most \(6, 32, 20\), got \(7, 1, 1\)",
        Editor([1], solver=Tucker(ranks=[7, 1, 1])),
        error=MisconfigurationException,
    )
    memory = EditMemory()
    memory.remember({1: GatedKeys(torch.tensor([0]), torch.tensor([1]), torch.ones(1, 24))}, ["a fact"])
    refuse(
        "KnowledgeEditing: the memory of layer 1 holds keys of d_hidden=24, the model has 20",
        Editor([1], memory=memory),
        error=MisconfigurationException,
    )
    refuse("layer 7 of Qwen3MoeForCausalLM has no routed experts", Editor([7]), error=MisconfigurationException)
    refuse("the editor needs text whose behaviour", preservation=[], error=MisconfigurationException)
    refuse("KnowledgeEditing has no facts to edit", facts=[], error=MisconfigurationException)
    refuse("too late for 4 of 4 facts", at={"epoch": 2}, error=MisconfigurationException)
    refuse("there is no preservation text no_such_file.txt", preservation="no_such_file.txt", error=OSError)


def test_texts_around_facts_that_cannot_be_encoded(refuse: Any, facts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # whatever the tokenizer cannot split: contexts, paraphrases and neighbours are tried, not the prompts alone
    from lit_moeedit.data import encoding

    tokenized = encoding._tokenized

    def glued(tokenizer: Any, texts: Any, **options: Any) -> Any:
        batch = tokenized(tokenizer, texts, **options)
        for row, text in enumerate(texts):
            if "xyz" in text and "offset_mapping" in batch:
                batch["offset_mapping"][row] = [(0, len(text)) for _ in batch["offset_mapping"][row]]
        return batch

    monkeypatch.setattr(encoding, "_tokenized", glued)
    message = "one token holds the end of the prompt .*xyz"
    refuse(message, facts=[replace(facts[0], paraphrases=("A xyz is in",))])
    refuse(message, facts=[replace(facts[0], neighbours=(Neighbour("A xyz lies in", "Italy", "near"),))])
    refuse(message, Editor([1], contexts=("", "A xyz.")))
    refuse(message, FineTuning([1], contexts=("", "A xyz.")))


# -- frozen layers ----------------------------------------------------------------------------------------------------


class Staged(BaseFinetuning):
    """Trains the experts from an epoch on, or until then."""

    def __init__(self, epoch: int, freezes: bool = False) -> None:
        super().__init__()
        self.epoch, self.freezes = epoch, freezes

    def freeze_before_training(self, pl_module: Any) -> None:
        if not self.freezes:
            self.freeze(pl_module.network.model.layers[1].mlp.experts)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.epoch and self.freezes:
            self.freeze(pl_module.network.model.layers[1].mlp.experts)
        elif epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.network.model.layers[1].mlp.experts, optimizer)


@pytest.fixture
def fit(tiny: Any, make_trainer: Any, tmp_path: Any, make_model: Any, tokenizer: Any, facts: Any) -> Any:
    def start(*callbacks: Any, at: Any, fn: str = "fit", renew: int | None = None, frozen: bool = False) -> Any:
        module = PlainModule(make_model("qwen3_moe"), tokenizer)
        module.network.model.layers[1].mlp.experts.down_proj.requires_grad_(not frozen)
        editor = tiny.editor(layers=[1], steps=1, preserve="none")
        editing = KnowledgeEditing(editor, facts=facts, at=at, renew_every_n_steps=renew, on_failure="keep")
        trainer = make_trainer(tmp_path, [*callbacks, editing], max_epochs=3)
        trainer.fit(module)
        return editing

    return start


@pytest.mark.parametrize(
    ("trains_from", "at", "frozen"),
    [
        (1, {"epoch": 1}, False),
        (1, {"step": 5}, False),
        (0, "fit_start", False),
        (2, {"epoch": 1}, False),
        (None, {"step": 1}, True),
        (None, "fit_start", True),
    ],
    ids=str,
)
def test_layers_that_are_frozen_before_or_while_they_are_edited(
    fit: Any, trains_from: int | None, at: Any, frozen: bool
) -> None:
    callbacks = () if trains_from is None else (Staged(trains_from),)
    assert len(fit(*callbacks, at=at, frozen=frozen).applied_facts) == 4


def test_edits_of_layers_that_are_frozen_later_are_renewed(fit: Any) -> None:
    editing = fit(Staged(1, freezes=True), at="fit_start", renew=1)
    assert len(editing.applied_facts) == 4
    assert editing.renewals > 2  # the two steps of the first epoch, and later ones
