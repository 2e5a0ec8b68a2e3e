"""Folders of FSDP2's checkpoints: resumed and exported as plain data; hostile ones are refused, and nothing is run."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.atomic import save_atomically
from lit_moeedit.checkpoints.limits import find_globals
from lit_moeedit.checkpoints.read import check_harmless, read_checkpoint
from tests.payload import Payload
from tests.processes import run_ranks


def save(folder: str) -> dict[str, Tensor]:
    """Train a step under FSDP2 and save a checkpoint; returns the whole weights."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.callbacks.conftest import _data, _module, _trainer

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = _trainer(folder, [], strategy=strategy, devices=2, max_steps=1, logger=False)
    module = _module(config={"num_experts": 5})
    trainer.fit(module, _data(batch_size=4))
    trainer.save_checkpoint(f"{folder}/it.ckpt")
    return {name: weight.detach().full_tensor() for name, weight in module.named_parameters()}


@pytest.mark.slow
def test_weights_and_settings_of_a_run_are_read(tmp_path: Path) -> None:
    weights, path = run_ranks(save, 2, str(tmp_path), group=False)[0], tmp_path / "it.ckpt"
    check_harmless(path)
    found = read_checkpoint(path)
    assert found.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found.tensors[name].read(), weight), name
    assert found.hyper_parameters["config"]["num_experts"] == 5


def save_again(folder: str) -> str:
    """Save a checkpoint, change the weights, and fail on the second rank while it is saved again."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.checkpoint import FileSystemWriter

    from tests.callbacks.conftest import _data, _module, _trainer

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer, module = _trainer(folder, [], strategy=strategy, devices=2, max_steps=1, logger=False), _module()
    save_atomically(strategy)
    trainer.fit(module, _data(batch_size=4))
    trainer.save_checkpoint(f"{folder}/it.ckpt")
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    original = FileSystemWriter.write_data

    def write(*args: Any) -> Any:
        found = original(*args)
        if torch.distributed.get_rank() == 1:
            raise OSError("injected")
        return found

    with mock.patch.object(FileSystemWriter, "write_data", write), pytest.raises(CheckpointException) as caught:
        trainer.save_checkpoint(f"{folder}/it.ckpt")
    torch.distributed.barrier()
    return str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_stays_until_the_next_one_is_complete(tmp_path: Path) -> None:
    for message in run_ranks(save_again, 2, str(tmp_path), group=False):
        assert "injected" in message
    assert [path.name for path in tmp_path.iterdir() if "ckpt" in path.name] == ["it.ckpt"]
    check_harmless(tmp_path / "it.ckpt")
    for name, tensor in read_checkpoint(tmp_path / "it.ckpt").tensors.items():
        assert tensor.read().abs().sum() > 0, name


WEIGHT = torch.arange(24.0).view(4, 3, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder as a run of one process leaves it."""
    folder = tmp_path / "it.ckpt"
    contents = {"state_dict": {"weight": WEIGHT}, "optimizer_0": {"param_groups": {"lr": 0.1}}}
    dcp.save(contents, checkpoint_id=folder, no_dist=True)
    torch.save({"hyper_parameters": {"lr": 0.1}}, folder / "meta.pt")
    return folder


def test_weights_and_settings_are_read(path: Path) -> None:
    check_harmless(path)
    found = read_checkpoint(path)
    assert found.tensors.keys() == {"weight"} and torch.equal(found.tensors["weight"].read(), WEIGHT)
    assert found.hyper_parameters == {"lr": 0.1}


def test_metadata_that_name_something_else_are_refused(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    for hostile in (Payload(mark), {"state_dict_metadata": Payload(mark)}):
        (path / ".metadata").write_bytes(pickle.dumps(hostile))
        for read in (check_harmless, read_checkpoint):
            with pytest.raises(CheckpointError, match=r"it names io\.open, whose code would have to run"):
                read(path)
    assert not mark.exists()


def test_values_that_would_run_code_are_refused(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    metadata = _metadata(path)
    index = next(one for one in metadata.storage_data if one.fqn.endswith(".lr"))
    contents = io.BytesIO()
    torch.save(Payload(mark), contents)
    place = metadata.storage_data[index]
    file = path / place.relative_path
    place.offset, place.length = file.stat().st_size, len(contents.getvalue())
    file.write_bytes(file.read_bytes() + contents.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"lr' holds objects of io\.open"):
        check_harmless(path)
    place.offset = 0
    file.write_bytes(pickle.dumps(Payload(mark)).ljust(place.length, b" "))  # what torch reads without an archive
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"has no value of torch\.save at 0"):
        check_harmless(path)
    assert not mark.exists()


def _metadata(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as file:
        found: Metadata = pickle.load(file)
    return found


@pytest.mark.parametrize(
    "chunks",
    [
        [((0, 0, 0), (2, 3, 2)), ((0, 0, 0), (2, 3, 2))],
        [((-1, 0, 0), (4, 3, 2))],
        [((1, 0, 0), (4, 3, 2))],
        [((0, 0, 0), (3, 3, 2))],
        [((0, 0), (4, 6))],
    ],
)
def test_chunks_that_are_not_the_whole_tensor_are_refused(path: Path, chunks: list[Any]) -> None:
    metadata = _metadata(path)
    own = metadata.state_dict_metadata["state_dict.weight"]
    assert isinstance(own, TensorStorageMetadata)
    own.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    (index,) = (one for one in metadata.storage_data if one.fqn == "state_dict.weight")
    for offsets, _ in chunks:
        metadata.storage_data[MetadataIndex(index.fqn, torch.Size(offsets))] = metadata.storage_data[index]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"chunks of state_dict\.weight are not all of it"):
        read_checkpoint(path)


def test_a_compressed_chunk_is_refused(path: Path) -> None:
    metadata = _metadata(path)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "state_dict.weight")
    file = path / place.relative_path
    stored = io.BytesIO(file.read_bytes()[place.offset : place.offset + place.length])
    contents = io.BytesIO()
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(contents, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    place.offset, place.length = file.stat().st_size, len(contents.getvalue())
    file.write_bytes(file.read_bytes() + contents.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    weight = read_checkpoint(path).tensors["weight"]
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save does not do"):
        weight.read()


def test_files_out_of_the_folder_are_refused(path: Path) -> None:
    metadata = _metadata(path)
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere' should be a file of the folder"):
        check_harmless(path)


def test_further_metadata_are_refused(path: Path) -> None:
    # torch reads a file of each rank if it is there
    (path / "__0.metadata").write_bytes((path / ".metadata").read_bytes())
    with pytest.raises(CheckpointError, match=r"__0\.metadata is a pickle"):
        check_harmless(path)


class Named:
    """Reduces to a call, as pickles of many classes do."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def test_names_are_found_wherever_they_are() -> None:
    assert find_globals(pickle.dumps({"a": [torch.Size([2]), torch.float32]})) == {"torch Size", "torch float32"}
    assert find_globals(pickle.dumps(Named(len, Named(print, 1)))) == {"builtins len", "builtins print"}
    # the memo, of which the name is taken again
    text = pickle.dumps(["builtins", "eval", ("builtins", "eval")])
    assert find_globals(text) == set()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04cbuiltins\neval\n.", "instruction GLOBAL"),
        (b"\x80\x04\x8c\x01a\x8c\x01b0\x93.", "pop|instruction POP"),
        (b"\x80\x04K\x01K\x01\x93.", "by what is not a text"),
        (b"\x80\x04\x8c\x08builtins\x8c\x03int\x93}b.", "changes what it names"),
        (b"\x80\x04K\x01)R.", "calls what it does not name"),
        (b"\x80\x04" + b"(" * 3 + b"0.", "instruction POP"),
    ],
)
def test_pickles_of_another_form_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_globals(data)


def test_a_small_pickle_of_very_many_values_is_refused() -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    with pytest.raises(ValueError, match="more than 20,000,000 values"):
        find_globals(pickle.dumps(nested))
