"""Ctrl-C at every line of what changes weights or modes, and once more while it is undone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_moeedit.editing.kv_prefix import logits_at
from lit_moeedit.interrupts import Undo, held, uninterrupted
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import stream_keys, watch_keys, watch_routing
from lit_moeedit.models.output_scale import with_output_scale
from lit_moeedit.models.partial_forward import experts_run_on, inference, layer_output, skipped
from lit_moeedit.precision import autocast, full_precision
from lit_moeedit.sharding.backends import Backend, extra_backend, locate
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.sharding.zero3_passes import beside_training, gathering_on_use, regathering
from tests.interrupting import Interrupts, bits, by_exception, by_signal, interrupt_everywhere, modes
from tests.sharding.whole_weights import some_deltas, weight
from tests.small_module import CONFIG

# a second interrupt can hit what is undone by the collector of an interrupted generator, which only reports it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FILES = ("lit_moeedit/",)
HOW = {"exception": by_exception, "signal": by_signal}
IDS = torch.tensor([[1, 5, 9, 3]])
MASK, POSITIONS = torch.ones_like(IDS), torch.arange(4)[None]


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestUndo:
    def test_the_last_change_is_undone_first(self) -> None:
        undone: list[int] = []
        with held(Undo()) as undo:
            for i in range(3):
                undo.by(undone.append, i)
            assert not undone
        assert undone == [2, 1, 0]

    def test_it_starts_again_after_any_number_of_interrupts(self) -> None:
        undone: list[str] = []

        def slow() -> None:
            undone.append("begun")
            if len(undone) < 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), held(Undo()) as undo:
            undo.by(undone.append, "first")
            undo.by(slow)
        assert undone == ["begun"] * 9 + ["first"]

    def test_what_cannot_be_undone_keeps_nothing_else(self) -> None:
        undone: list[str] = []
        with pytest.raises(ZeroDivisionError), held(Undo()) as undo:
            undo.by(undone.append, "first")
            undo.by(lambda: 1 / 0)
        assert undone == ["first"]

    def test_the_error_of_the_block_is_raised(self) -> None:
        undone: list[str] = []
        with pytest.raises(ValueError, match="of the block"), held(Undo()) as undo:
            undo.by(undone.append, "first")
            raise ValueError("of the block")
        assert undone == ["first"]


class TestUninterrupted:
    def test_the_interrupt_waits(self) -> None:
        done = []
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        assert done == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
    def test_whose_handler_it_is_decides(self, handler: Any) -> None:
        signal.signal(signal.SIGINT, handler)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler

    def test_other_threads_are_left_alone(self) -> None:
        seen: list[Any] = []

        def run() -> None:
            with uninterrupted():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == [signal.default_int_handler]


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model in training, with a frozen part, a part in evaluation mode, and hooks and a forward of somebody else."""
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    made.train()
    made.model.embed_tokens.weight.requires_grad_(False)
    made.model.layers[1].eval()
    made.model.layers[0].register_forward_hook(lambda module, args, output: None)
    made.model.layers[0].mlp.forward = made.model.layers[0].mlp.forward
    made.model.layers[0]._z3_leaf = True
    return made


def _layers(model: PreTrainedModel) -> list[ExpertLayer]:
    return list(expert_layers(model).values())


def _forward(model: PreTrainedModel, context: AbstractContextManager[Any]) -> None:
    with inference(model), context:
        torch.rand(1)
        with gathering_on_use(model):
            model(input_ids=IDS, use_cache=False)


@contextmanager
def _saved_elsewhere(model: PreTrainedModel) -> Iterator[None]:
    next(model.parameters()).ds_id = 1  # type: ignore[attr-defined]
    try:
        with regathering(model):
            yield
    finally:
        del next(model.parameters()).ds_id


PASSES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "inference": lambda m: _forward(m, inference(m, gradients=True)),
    "keys": lambda m: _forward(m, watch_keys(_layers(m), lambda: None, lambda layer, keys: None)),
    "stream": lambda m: _forward(m, stream_keys(_layers(m), lambda: None, lambda layer, keys: None)),
    "routing": lambda m: _forward(m, watch_routing(_layers(m)[:1], lambda layer, routing: None)),
    "skipped": lambda m: _forward(m, skipped([_layers(m)[0].layer])),
    "selected tokens": lambda m: _forward(m, experts_run_on(_layers(m), MASK.bool())),
    "precision": lambda m: _forward(m, full_precision()),
    "autocast": lambda m: _forward(m, autocast(torch.device("cpu"), torch.bfloat16)),
    "beside training": lambda m: _forward(m, beside_training(m)),
    "saved tensors": lambda m: _forward(m, _saved_elsewhere(m)),
    "backend": lambda m: _forward(m, extra_backend(Backend())),
    "layer output": lambda m: layer_output(m, _layers(m)[0], IDS, MASK, POSITIONS),
    "logits": lambda m: logits_at(m, IDS, MASK, POSITIONS, torch.tensor([0]), torch.tensor([1])),
    "output scale": lambda m: with_output_scale(m, _layers(m)[:1]),
}


def interrupt_passes(model: PreTrainedModel, name: str, singles: int | None, pairs: int | None, how: str) -> int:
    before = modes(model)
    backend = locate(model.lm_head.weight)

    def check(interrupts: Interrupts, done: bool) -> None:
        now = modes(model)
        assert {key: now[key] for key in now if now[key] != before[key]} == {}, interrupts.raised
        assert type(locate(model.lm_head.weight)) is type(backend)
        torch.set_rng_state(state)

    state = torch.get_rng_state()
    before["random"] = bits(state)
    return interrupt_everywhere(lambda: lambda: PASSES[name](model), check, FILES, singles, pairs, HOW[how])


@pytest.mark.parametrize("name", PASSES)
def test_an_interrupted_pass_leaves_all_modes(model: PreTrainedModel, name: str) -> None:
    # eight, and a second one where lines are left: an interrupt before anything has changed ends the pass at once
    assert interrupt_passes(model, name, 8, 1, "exception") > 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_interrupted_twice_leaves_all_modes(model: PreTrainedModel, name: str, how: str) -> None:
    # the shortest one takes 271
    assert interrupt_passes(model, name, 250, 4, how) > 250


# -- weights ----------------------------------------------------------------------------------------------------------


def interrupt_commits(singles: int | None, pairs: int | None, how: str, is_held: bool) -> int:
    """Two commits of a weight with Adam's moments, and a record that belongs to them."""
    state: dict[str, Any] = {}

    def everything() -> list[bytes]:
        moments = [value for value in state["optimizer"].state[state["weight"]].values() if value.ndim]
        return [bits(tensor) for tensor in (state["weight"], *moments)]

    def start() -> Callable[[], None]:
        parameter = weight()
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state.update(weight=parameter, optimizer=optimizer, record=[])
        state["before"] = everything()

        def commits(transaction: Transaction) -> None:
            transaction.commit(parameter, some_deltas())
            transaction.by(state["record"].clear)
            state["record"].append("first")
            transaction.commit(parameter, some_deltas(1))

        def run() -> None:
            with held(Transaction([optimizer], reset_moments=True)) as transaction:
                commits(transaction)
                transaction.keep()

        def run_bare() -> None:
            with Transaction([optimizer], reset_moments=True) as transaction:
                commits(transaction)

        return run if is_held else run_bare

    def check(interrupts: Interrupts, done: bool) -> None:
        after = state.setdefault("after", everything())  # of the run without an interrupt
        found = (everything(), state["record"])
        whole, none = (after, ["first"]), (state["before"], [])
        assert found in ((whole,) if done else (none, whole)), interrupts.raised

    return interrupt_everywhere(start, check, FILES, singles, pairs, HOW[how])


@pytest.mark.parametrize("is_held", [True, False])
def test_interrupted_commits_are_made_wholly_or_not_at_all(is_held: bool) -> None:
    assert interrupt_commits(60, 1, "exception", is_held) > 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_commits_interrupted_twice_are_made_wholly_or_not_at_all(how: str, is_held: bool) -> None:
    assert interrupt_commits(None, 4, how, is_held) > 4000


def test_an_interrupt_of_the_block_itself_does_not_wait() -> None:
    """Only undoing waits: what runs inside of a block stops at once."""
    layer, ran = nn.Linear(2, 2), []
    with pytest.raises(KeyboardInterrupt), held(Undo()) as undo:
        undo.by(ran.append, "undone")
        layer(torch.ones(2))
        signal.raise_signal(signal.SIGINT)
        ran.append("not reached")
    assert ran == ["undone"]
