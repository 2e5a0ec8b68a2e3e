"""Checkpoints are put together for any number of ranks, and nothing that is wrong with one goes unsaid."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.read import read_checkpoint
from tests.checkpoints.zero_files import write_checkpoint

OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def numbers() -> dict[str, Tensor]:
    """Weights of all kinds of sizes; a rank may hold parts of several or nothing at all."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 3), "b": (1,), "c": (2, 3, 5), "d": (), "e": (4,), "frozen": (3, 3), "f": (13,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**weights, "count": torch.tensor([3, 4]), "bias": torch.randn(5, generator=generator)}


LAYOUTS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2, "alignment": 4, "groups": [["a", "c", "d", "f"], ["b", "e"]]},
    {"stage": 2, "padded": True},
    {"stage": 3},
    {"stage": 3, "groups": [["a", "c", "d"], ["b", "e"], ["f"]]},
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_ranks(ranks: int, layout: dict[str, Any], working: torch.dtype, tmp_path: Path) -> None:
    if layout.get("padded") and ranks == 40:
        pytest.skip("more padding than such versions can have had")
    weights = numbers()
    write_checkpoint(
        tmp_path / "it", {**weights, "alias": weights["a"]}, ranks=ranks, working=working, frozen=["frozen"],
        buffers=["count", "bias"], shared={"alias": "a"}, hyper_parameters={"some": 1}, **layout,
    )  # fmt: skip
    found = read_checkpoint(tmp_path / "it")
    assert found.hyper_parameters == {"some": 1}
    assert found.tensors.keys() == {*weights, "alias"}
    for name, value in {**weights, "alias": weights["a"]}.items():
        stored, dtype = found.tensors[name], working if value.is_floating_point() else value.dtype
        assert stored.shape == value.shape and stored.dtype == dtype
        assert torch.equal(stored.read(), value.to(dtype)) and stored.read().dtype == dtype
        kept = name in ("frozen", "bias")  # there is no master copy of what is not trained
        assert torch.equal(stored.read(torch.float64), value.to(dtype if kept else value.dtype).double())


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(6.0).view(2, 3).T, "note": "text"}}, tmp_path / "it.ckpt")
    stored = read_checkpoint(tmp_path / "it.ckpt").tensors
    assert stored.keys() == {"a"} and torch.equal(stored["a"].read(), torch.arange(6.0).view(2, 3).T)
    weights = {"a": torch.randn(64)}
    write_checkpoint(tmp_path / "it", weights, stage=2, ranks=1, working=torch.float32)
    stored = read_checkpoint(tmp_path / "it").tensors
    assert stored["a"].read().data_ptr() == stored["a"].pieces[0].tensor.data_ptr()


# -- what is wrong ----------------------------------------------------------------------------------------------------


def forget(name: str, field: str) -> Callable[[str, dict[str, Any]], None]:
    return put(name, field, None, only=False)


def put(name: str, field: str, value: Any, only: bool = True) -> Callable[[str, dict[str, Any]], None]:
    """Change a field, or one of the optimizer's, in one file."""

    def change(file: str, contents: dict[str, Any]) -> None:
        if file == name:
            inner = contents.get("optimizer_state_dict", contents)
            inner[field] = value
            if not only:
                del inner[field]

    return change


CHANGES: list[tuple[int, Callable[[str, dict[str, Any]], None], str]] = [
    (3, forget(MODEL.format(0), "module"), "field 'module' should be a dict, but is missing"),
    (3, put(MODEL.format(0), "param_shapes", [["a"]]), "field 'param_shapes' should hold shapes of parameters"),
    (3, put(MODEL.format(0), "param_shapes", [{"a": (-3, 1)}]), "field 'param_shapes' should hold shapes of param"),
    (
        3,
        put(MODEL.format(1), "global_steps", 7),
        r"rank_1.* does not belong to .*rank_0.*: their fields 'global_steps'",
    ),
    (
        3,
        put(MODEL.format(1), "frozen_param_fragments", {}),
        "'frozen_param_fragments' should hold tensors, but holds a",
    ),
    (2, put(OPTIMIZER.format(1), "zero_stage", 1), r"rank_1.* does not belong to .*: ZeRO stage 1, not 2"),
    (3, put(OPTIMIZER.format(1), "partition_count", 4), "number of ranks 4, not 3"),
    (3, put(OPTIMIZER.format(0), "partition_count", 5), r"is of 5 rank\(s\), but lacks .*rank_3_.*, .*rank_4_"),
    (3, put(OPTIMIZER.format(0), "partition_count", 10**12), r"is of 10{12} rank\(s\), but lacks"),
    (3, put(OPTIMIZER.format(0), "partition_count", "two"), "'partition_count' should be a int or list, but is a str"),
    (3, put(OPTIMIZER.format(2), "fp32_flat_groups", [torch.ones(3)]), "'fp32_flat_groups' holds 3 elements, but"),
    (3, put(OPTIMIZER.format(2), "fp32_flat_groups", []), "holds 0 groups of weights, not 1"),
    (
        3,
        put(OPTIMIZER.format(2), "fp32_flat_groups", [1.0]),
        "'fp32_flat_groups' should hold tensors, but holds a float",
    ),
    (3, put(OPTIMIZER.format(2), "fp32_flat_groups", [torch.ones(1).expand(29)]), "one that is not contiguous"),
    (3, put(OPTIMIZER.format(2), "fp32_flat_groups", [torch.ones(29, device="meta")]), "but holds one that is not"),
    (3, put(OPTIMIZER.format(1), "optimizer_state_dict", {"state": {0: {"step": 1}}}), r"optimizer step \{1.0\}, not"),
    (3, put(OPTIMIZER.format(0), "zero_stage", 9), "shards of ZeRO stage 9 in groups of ranks are not supported"),
    (2, put(OPTIMIZER.format(0), "param_alignment_paddings", [[-9] * 6]), "'param_alignment_paddings' does not fit"),
    (2, put(OPTIMIZER.format(1), "single_partition_of_fp32_groups", [torch.ones(1)]), "elements, but 70 are expected"),
    (2, put("mp_rank_00_model_states.pt", "param_shapes", [{}, {}]), "holds 1 groups of weights, the model's 2"),
]


@pytest.mark.parametrize(("stage", "change", "message"), CHANGES, ids=[message for _, _, message in CHANGES])
def test_a_file_that_does_not_fit(stage: int, change: Any, message: str, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "it", numbers(), stage, 3, frozen=["frozen"], buffers=["count", "bias"], alignment=1, change=change
    )
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "it")


def test_names_that_are_none(tmp_path: Path) -> None:
    def change(_: str, contents: dict[str, Any]) -> None:
        contents |= {"shared_params": {1: ["a"]}, "buffer_names": [["count"], "bias"]} if "module" in contents else {}

    write_checkpoint(tmp_path / "it", numbers(), 3, 1, buffers=["count", "bias"], change=change)
    assert read_checkpoint(tmp_path / "it").tensors.keys() == numbers().keys() - {"count"}


def test_files_that_are_missing_or_too_many(tmp_path: Path) -> None:
    path, buffers = tmp_path / "it", ["count", "bias"]
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*it"):
        read_checkpoint(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no file \*_model_states\.pt; expected is a checkpoint file of"):
        read_checkpoint(path)
    path.rmdir()
    write_checkpoint(path, numbers(), 3, 3, buffers=buffers)
    folder = path / "checkpoint"
    assert read_checkpoint(folder).tensors.keys() == read_checkpoint(path).tensors.keys()

    def refuses(name: str, message: str) -> None:
        """Check what is said without this file, and put it back."""
        kept = (folder / name).rename(tmp_path / "kept")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
        kept.rename(folder / name)

    for rank in range(3):
        refuses(OPTIMIZER.format(rank), rf"is of \d rank\(s\), but lacks {OPTIMIZER.format(rank)}")
        refuses(MODEL.format(rank), rf"is of \d rank\(s\), but lacks {MODEL.format(rank)}")

    def with_one_more(name: str, message: str) -> None:
        (folder / name).touch()
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
        (folder / name).unlink()

    with_one_more(
        OPTIMIZER.format(0).removeprefix("bf16_"), "files of two runs: bf16_zero_pp_rank_0.* and zero_pp_rank"
    )
    with_one_more("mp_rank_00_model_states.pt", "files of two runs: mp_rank_00_model_states.pt and zero_pp_rank_0")
    with_one_more("mp_rank_01_model_states.pt", "several tensor-parallel parts")
    with_one_more("layer_0_expert_3_mp_rank_00_model_states.pt", "experts of DeepSpeed's own MoE layers")
    # what a larger run has left behind
    (folder / OPTIMIZER.format(3)).touch()
    assert read_checkpoint(path).tensors.keys() == {*numbers()}

    for rank in range(3):
        (folder / MODEL.format(rank)).rename(tmp_path / MODEL.format(rank))
    (tmp_path / MODEL.format(0)).rename(folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"is of ZeRO stage 3, which does not go with mp_rank_00"):
        read_checkpoint(path)
    for tag in ("", ".", "..", "../it/checkpoint", str(folder), "other", "x" * 1000):
        (path / "latest").write_text(tag, encoding="utf-8")
        with pytest.raises(CheckpointError, match="latest should name a folder beside it, but holds"):
            read_checkpoint(path)


# -- what is hostile --------------------------------------------------------------------------------------------------


class Evil:
    """Makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Unknown:
    pass


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "it.ckpt"
    known = set(torch.serialization.get_safe_globals())
    path.write_bytes(pickle.dumps({"state_dict": {}, "evil": Evil(mark)}))
    with pytest.raises(CheckpointError, match=r"it is not a file of torch\.save.*; nothing in it was executed"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "evil": Evil(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "evil": Evil(mark)}, path)
    with pytest.raises(CheckpointError, match=r"it\.ckpt holds objects of .*Path.*; nothing was executed"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "note": Unknown()}, path)
    with pytest.raises(CheckpointError, match=r"it\.ckpt holds objects of .*\.Unknown, whose code would have to run"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match=r"it\.ckpt should hold a dict, but holds a list"):
        read_checkpoint(path)
    for number, name in enumerate((OPTIMIZER.format(1), MODEL.format(1))):
        write_checkpoint(tmp_path / str(number), numbers(), 3, 2, change=put(name, "evil", Evil(mark)))
        with pytest.raises(CheckpointError, match=rf"{name} holds objects of .*Path.*; nothing was executed"):
            read_checkpoint(tmp_path / str(number))
    assert not mark.exists()
    # what is taken for DeepSpeed's own is not left behind
    assert set(torch.serialization.get_safe_globals()) == known


def test_damaged_files(tmp_path: Path) -> None:
    """Cut off anywhere or with bytes changed: a plain error or, where none of the weights is hit, the same weights."""
    path = tmp_path / "it"
    write_checkpoint(path, numbers(), 3, 2, buffers=["count", "bias"])
    files = [path / "checkpoint" / name for name in (OPTIMIZER.format(1), MODEL.format(0))]
    whole_weights = {name: stored.read(torch.float32) for name, stored in read_checkpoint(path).tensors.items()}
    draw = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for share in (0.0, 0.1, 0.5, 0.99):
            file.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(
                CheckpointError, match=rf"{file.name} cannot be read .*it is not a file of torch\.save, or an inc"
            ):
                read_checkpoint(path)
        said = set()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.choice((1, 8, 64))):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
            file.write_bytes(damaged)
            try:
                found = read_checkpoint(path).tensors
                assert all(torch.equal(found[name].read(value.dtype), value) for name, value in whole_weights.items())
            except CheckpointError as error:
                said.add(str(error))
        assert said
        file.write_bytes(whole)
    assert read_checkpoint(path).tensors.keys() == {*numbers()}
