"""Callbacks of runs under expert parallelism of transformers: replay, memory, renewals, survival and routing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_moeedit.callbacks import EditHold, EditReplay, KnowledgeEditing, RoutingMonitor
from lit_moeedit.editing import EditMemory
from lit_moeedit.replay import Draws
from tests.callbacks.conftest import _editor
from tests.callbacks.test_expert_parallel_runs import fit, saved, weights
from tests.callbacks.test_fsdp2_runs import full, same
from tests.processes import run_ranks

EPOCHS: dict[str, Any] = {"max_steps": -1, "max_epochs": 4}
PROBE = ["The capital of Italy is Rome."]


def editing(steps: int, limit: int = 8192, **settings: Any) -> KnowledgeEditing:
    """Two facts before each of the second, third and fourth epoch of two steps, with a memory."""
    at = {"every_n_epochs": 1, "batch": 2}
    editor = _editor(steps=steps, memory=EditMemory(limit), contexts=("", "Note:"))
    settings = {"at": at, "on_failure": "keep", "survival_every_n_steps": 1, **settings}
    return KnowledgeEditing(editor, **settings)


def averages(module: Any) -> dict[str, Tensor]:
    """Adam's averages of the gradients."""
    state = module.trainer.optimizers[0].state
    return {name: full(state[weight]["exp_avg"]) for name, weight in module.named_parameters()}


def seen(callback: KnowledgeEditing, module: Any) -> dict[str, Any]:
    return {
        "weights": weights(module),
        "averages": averages(module),
        "survival": [vars(point) for point in callback.survival.points],
        "renewals": callback.renewals,
        "memory": callback.editor.memory.state_dict(),
    }


def steady(path: str, folder: str) -> dict[str, Any]:
    """A run at learning rate 0, whose edits fail at first, so that renewals come; statements do not depend on ranks."""
    callback = editing(1, renew_every_n_steps=1, max_renewals=2)
    replay = EditReplay(share=0.25, by_need=False, contexts=[""], gradient_limit=None)
    monitor = RoutingMonitor(probe=PROBE)
    module = fit(path, folder, [callback, replay, monitor], **EPOCHS)
    replayed = replay.replayed
    assert replayed is not None
    return {**seen(callback, module), "statements": replayed.statements, "routing": monitor.last_edit}


def training(path: str, folder: str, checkpoint: str | None = None) -> dict[str, Any]:
    """A run that trains, with a memory that is compressed and statements by need."""
    callback, replay = editing(6, 20, renew_every_n_steps=1, max_renewals=2), EditReplay(share=0.5)
    monitor = RoutingMonitor(probe=PROBE)
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    module = fit(path, folder, [callback, replay, monitor, kept], lr=1e-3, checkpoint=checkpoint, **EPOCHS)
    found = seen(callback, module)
    return {**found, "replay": replay.state_dict(), "routing": monitor.last_edit, "calls": len(callback.editor.calls)}


def resumed(path: str, folder: str) -> tuple[Any, Any]:
    checkpoint = f"{folder}/whole/kept/epoch=1.ckpt"
    return training(path, f"{folder}/whole"), training(path, f"{folder}/rest", checkpoint)


class InTurn(Draws):
    """The next prompts of all, whatever the rank."""

    def draw(self, prompts: Any, count: int, start: int, *args: Any, **kwargs: Any) -> list[Any]:
        first = [own[0] for own in prompts.values()]
        return [first[place % len(first)] for place in range(start, start + count)]


class First(Draws):
    """The same two statements on all ranks."""

    def draw(self, prompts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [own[0] for own in prompts.values()][:2]


def with_a_further_forward(path: str, folder: str, shares_experts: bool) -> dict[str, Any]:
    """Runs at learning rate 0 with a second forward in each step, whose rows do not depend on the number of ranks."""
    hold = EditHold(rows=4 // int(os.environ.get("WORLD_SIZE", 1)), weight=1.0)
    replay = EditReplay(weight=1.0, by_need=False, contexts=[""])
    hold._draws, replay._draws = InTurn(), First()
    found = {}
    for name, extra in {"hold": hold, "replay": replay}.items():
        callback = editing(6)
        module = fit(path, f"{folder}/{name}", [callback, extra], shares_experts=shares_experts, **EPOCHS)
        found[name] = seen(callback, module)
    return found


def equal(one: Any, other: Any) -> bool:
    """Bit by bit, within dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other or (one != one and other != other))


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        # float32 in batches of other sizes
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=name)


@pytest.mark.slow
def test_renewals_memory_and_replay_are_those_of_one_process(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    found = run_ranks(steady, 2, path, f"{tmp_path}/two", group=False)
    one = steady(path, f"{tmp_path}/one")
    assert one["renewals"] == 2 and one["statements"] > 0
    for own in found:
        for name in ("weights", "averages"):
            check_close(own[name], one[name])
        for name in ("renewals", "statements"):
            assert own[name] == one[name]
        assert own["routing"] == pytest.approx(one["routing"], abs=1e-3)
        kinds = ("step", "after", "generated")
        assert [[x[y] for y in kinds] for x in own["survival"]] == [[x[y] for y in kinds] for x in one["survival"]]
        assert own["memory"][0]["facts"] == one["memory"][0]["facts"]
    assert equal(found[0]["memory"], found[1]["memory"])


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    for whole, rest in run_ranks(resumed, 2, path, str(tmp_path), group=False):
        assert same(whole["weights"], rest["weights"])
        assert (whole["calls"], rest["calls"]) == (5, 4)
        for name in ("averages", "survival", "renewals", "memory", "replay", "routing"):
            assert equal(whole[name], rest[name]), name
        assert whole["memory"][0]["sketched"] == [] and whole["renewals"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("shares_experts", [True, False], ids=["expert parallelism", "FSDP2"])
def test_gradients_of_a_second_forward_are_those_of_one_process(tmp_path: Path, shares_experts: bool) -> None:
    path = saved(tmp_path / "model")
    found = run_ranks(with_a_further_forward, 2, path, f"{tmp_path}/two", shares_experts, group=False)
    one = with_a_further_forward(path, f"{tmp_path}/one", shares_experts)
    for own in found:
        for name, expected in one.items():
            check_close(own[name]["weights"], expected["weights"])
            check_close(own[name]["averages"], expected["averages"])
    # the losses differ from each other, and so from that of the batch alone
    assert not same(one["hold"]["averages"], one["replay"]["averages"])
