"""Second moments on disk: what is found again, what is not, and what is done about damaged files."""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.editing import Editor, TargetOptimizer, second_moments
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.sharding.ranks import Ranks


class BrokenOffError(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads may sum in another order in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "moments"


@pytest.fixture
def run(model, tokenizer, texts, folder: Path) -> Callable[..., tuple[dict, int]]:
    """``run(**changes)``: second moments of layers 0 and 1 with a cache, and the number of forwards that took."""

    def call(**changes):
        arguments = {"model": model, "tokenizer": tokenizer, "texts": texts, "token_budget": 64, **changes}
        found = expert_layers(arguments["model"])
        layers = [found[i] for i in arguments.pop("layers", (0, 1))]
        arguments.setdefault("cache", MomentsCache(folder))
        forwards: list[int] = []
        embedding = arguments["model"].get_input_embeddings()
        handle = embedding.register_forward_hook(lambda *_: forwards.append(1))
        try:
            return second_moments(layers=layers, **arguments), len(forwards)
        finally:
            handle.remove()

    return call


def assert_equal(one: dict, two: dict) -> None:
    assert list(one) == list(two)
    for index in one:
        assert torch.equal(one[index].total, two[index].total)
        assert torch.equal(one[index].count, two[index].count)


def test_what_was_computed_is_found_again(run, folder: Path) -> None:
    plain, forwards = run(cache=None)
    first, some = run()
    second, none = run(token_budget=1000)  # how the texts are batched is not part of the key
    assert (some, none) == (forwards, 0)
    assert_equal(first, plain)
    assert_equal(second, plain)
    assert len(list(folder.iterdir())) == 2  # a file for each layer, nothing of the pass
    third, forwards = run(layers=(0, 2))  # only what is missing is computed
    assert forwards == some
    assert_equal({0: third[0]}, {0: plain[0]})
    assert torch.equal(third[2].total, run(layers=(2,), cache=None)[0][2].total)


def test_another_process_finds_it(run, make_model, tokenizer, texts, monkeypatch) -> None:
    first, _ = run()
    copied = copy.deepcopy(tokenizer)
    copied(texts[0], truncation=True, max_length=4, padding="max_length")  # leaves its settings in the tokenizer
    again, forwards = run(model=make_model("qwen3_moe"), tokenizer=copied)
    assert forwards == 0
    assert_equal(again, first)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "missed"),
    [
        ("model.embed_tokens.weight", {0, 1}),
        ("model.layers.0.self_attn.q_proj.weight", {0, 1}),
        ("model.layers.0.mlp.experts.down_proj", {1}),  # what comes behind a layer's keys does not change them
        ("model.layers.1.mlp.gate.weight", {1}),
        ("model.layers.1.mlp.experts.gate_up_proj", {1}),
        ("model.layers.1.mlp.experts.down_proj", set()),
        ("model.layers.2.mlp.experts.gate_up_proj", set()),
    ],
)
def test_changed_weights_are_missed(run, model, name: str, missed: set[int]) -> None:
    first, _ = run()
    weight = model.get_parameter(name)
    weight.view(-1)[weight.numel() // 3] += 1e-3
    for layer in (0, 1):
        found, forwards = run(layers=(layer,))
        assert bool(forwards) == (layer in missed)
        expected, _ = run(layers=(layer,), cache=None)
        assert_equal(found, expected)
        assert layer in missed or torch.equal(found[layer].total, first[layer].total)


def test_other_texts_settings_and_tokenizers_are_missed(run, make_model, tokenizer, texts) -> None:
    run()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    silent = copy.deepcopy(tokenizer)
    silent.backend_tokenizer.post_processor = None  # no <s> before a text
    changes = [
        {"texts": [*texts[:-1], texts[-1] + " Sea."]},
        {"texts": texts[:-1]},
        {"max_length": 10},
        {"tokenizer": other},
        {"tokenizer": silent},
        {"model": make_model("qwen3_moe").to(torch.bfloat16)},
        {"model": make_model("qwen3_moe", rms_norm_eps=1e-3)},
    ]
    for change in changes:
        assert run(**change)[1] > 0, change
        assert run(**change)[1] == 0, change
    assert run()[1] == 0


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        data[-5] ^= 1
        path.write_bytes(data)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "not finite":
        tensors = load_file(path)
        tensors["total"][0, 0, 0] = torch.nan
        # written as a whole file is, so that nothing but the value is wrong
        MomentsCache(path.parent).save(path.stem.removeprefix("moments-"), tensors, Ranks())
    elif how == "another's":
        tensors = load_file(path)
        save_file(tensors, path, metadata={"format": "pt"})
    elif how == "another layer's":
        other = next(other for other in path.parent.iterdir() if other != path)
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "a folder", "not finite", "another's", "another layer's"])
def test_damaged_files_are_ignored_with_a_warning(run, folder: Path, caplog, how: str) -> None:
    first, forwards = run()
    damaged(sorted(folder.iterdir())[0], how)
    with caplog.at_level(logging.WARNING):
        again, repeated = run()
    assert repeated == forwards
    assert_equal(again, first)
    assert "is ignored, and computed again" in caplog.text
    if how != "a folder":
        assert run()[1] == 0  # the file has been written anew


def test_a_folder_that_cannot_be_written_costs_a_warning(run, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    plain, _ = run(cache=None)
    found, _ = run(cache=MomentsCache(tmp_path / "file"))
    assert_equal(found, plain)
    assert "second moments are not kept in" in caplog.text


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_pass_that_was_broken_off_goes_on(run, folder: Path, at: int, caplog) -> None:
    plain, forwards = run(cache=None)

    def fail(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > at:
            raise BrokenOffError

    cache, seen = MomentsCache(folder, save_every=0.0), list[int]()
    with pytest.raises(BrokenOffError):
        run(cache=cache, progress=fail)
    assert len(list(folder.glob("*"))) == min(at, 1)
    progress: list[int] = []
    found, left = run(cache=cache, progress=lambda done, total: progress.append(done))
    assert left == forwards - at
    assert progress[0] == seen[at]
    assert_equal(found, plain)
    assert len(list(folder.iterdir())) == 2
    assert run()[1] == 0


def test_an_unfinished_pass_goes_on_in_other_batches(run, folder: Path) -> None:
    cache, seen = MomentsCache(folder, save_every=0.0), list[int]()

    def fail(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        run(cache=cache, progress=fail)
    plain, forwards = run(cache=None, token_budget=50)
    found, again = run(cache=cache, token_budget=50)
    assert again < forwards
    for one, other in zip(found.values(), plain.values(), strict=True):
        assert torch.equal(one.count, other.count)
        # float32 sums in another order
        torch.testing.assert_close(one.total, other.total, rtol=1e-4, atol=1e-5 * float(other.total.abs().max()))


def test_nothing_is_saved_before_its_time(run, folder: Path) -> None:
    def look(done: int, total: int) -> None:
        assert not folder.exists()

    run(progress=look)
    assert len(list(folder.iterdir())) == 2


def test_the_files_longest_unused_go_first(run, folder: Path) -> None:
    cache = MomentsCache(folder, keep=2)
    for layer in (0, 1):
        run(layers=(layer,), cache=cache)
    for age, path in enumerate(folder.iterdir()):
        os.utime(path, (1000.0 + age, 1000.0 + age))
    assert run(layers=(0,), cache=cache)[1] == 0  # used now
    (folder / "notes.txt").write_text("not ours")
    run(layers=(2,), cache=cache)
    assert len(list(folder.glob("moments-*"))) == 2
    assert run(layers=(0,), cache=cache)[1] == 0
    assert run(layers=(1,), cache=cache)[1] > 0
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(("setting", "message"), [({"keep": 0}, "keep must be"), ({"save_every": -1.0}, "save_every")])
def test_wrong_settings_are_refused(folder: Path, setting, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentsCache(folder, **setting)


def test_the_editor_uses_it(model, tokenizer, facts, texts, folder: Path) -> None:
    """The same edit of the same weights, with moments from disk; the edited model has others above the edit."""
    other, targets = copy.deepcopy(model), TargetOptimizer(steps=2)
    phases: list[str] = []
    editor = Editor([0, 1], targets=targets, cache=str(folder))
    editor.edit(model, tokenizer, facts, texts)
    editor.edit(other, tokenizer, facts, texts, progress=lambda phase, *_: phases.append(phase))
    assert "statistics" not in phases
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert len(list(folder.iterdir())) == 2
    editor.edit(model, tokenizer, facts, texts)
    assert len(list(folder.iterdir())) == 3  # layer 0 stands below the edit


def test_what_a_killed_writer_left_is_removed_when_files_are_read(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with atomic_file(tmp_path / "moments-it.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir())
    assert not MomentsCache(tmp_path).load("other", {"a": torch.ones(2)}, Ranks.current())
    assert not list(tmp_path.iterdir())
