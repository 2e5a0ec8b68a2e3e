"""Damaged checkpoints are refused by name, and hostile ones take neither memory nor time."""

from __future__ import annotations

import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints import limits
from lit_moeedit.checkpoints.atomic import AtomicCheckpointIO
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import check_undamaged, read_checkpoint
from lit_moeedit.checkpoints.torch_file import TorchFile
from tests.checkpoints.test_export_folder import CONFIG, weights
from tests.checkpoints.zero_files import write_checkpoint

OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def overwrite(path: Path, record: str, count: int = 100) -> None:
    """Overwrite bytes in the middle of a record."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith(f"/{record}")]
    data = bytearray(path.read_bytes())
    start = data.index(record.encode(), entry.header_offset) + len(record)
    start += struct.unpack("<H", data[entry.header_offset + 28 : entry.header_offset + 30])[0] + entry.file_size // 3
    data[start : start + count] = bytes(byte ^ 1 for byte in data[start : start + count])
    path.write_bytes(data)


def repacked(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again, with other contents of its records; ``None`` leaves one out."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            new = change(name.partition("/")[2], data)
            if new is not None:
                archive.writestr(name, new)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    contents = {"state_dict": weights(CONFIG), "hyper_parameters": {"config": CONFIG}, "spare": torch.ones(1000)}
    torch.save(contents, path)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: overwrite(path, "data/3"), r"last\.ckpt: the record 'data/3' is damaged: its checksum is"),
        (lambda path: overwrite(path, "data/3", 1), r"the record 'data/3' is damaged: its checksum is"),
        (lambda path: overwrite(path, "data.pkl", 1), r"the record 'data\.pkl' is damaged"),
        (
            lambda path: repacked(path, lambda name, data: data[:-4] if name == "data/3" else data),
            r"last\.ckpt cannot be read .*the record 'data/3' has [\d,]+ bytes, but [\d,]+ elements of .* have [\d,]+",
        ),
        (lambda path: repacked(path, lambda name, data: None if name == "data/3" else data), "'data/3' is missing"),
        (lambda path: repacked(path, lambda name, data: None if name == "data.pkl" else data), r"'data\.pkl' is missi"),
        (lambda path: repacked(path, lambda _, data: data, zipfile.ZIP_DEFLATED), "is compressed, which torch.save do"),
        (lambda path: repacked(path, lambda name, data: b"big" if name == "byteorder" else data), "byte order 'big'"),
    ],
    ids=["100 bytes", "1 byte", "pickle", "shortened", "missing", "no pickle", "compressed", "byte order"],
)
def test_a_damaged_checkpoint_is_not_exported(
    damage: Callable[[Path], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    if "byte order" not in message:  # which torch.load can swap
        with pytest.raises((CheckpointError, RuntimeError)):
            AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)


def test_only_what_is_needed_is_read(checkpoint: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(checkpoint) as archive:
        last = max(int(name.rpartition("/")[2]) for name in archive.namelist() if "/data/" in name)
    overwrite(checkpoint, f"data/{last}")
    export(checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"'data/{last}' is damaged"):
        check_undamaged(checkpoint)


def test_a_file_without_checksums(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents, checkpoint)
    finally:
        torch.serialization.set_crc32_options(True)
    with caplog.at_level(logging.INFO, "lit_moeedit"):
        export(checkpoint, tmp_path / "out")
    assert "last.ckpt was saved without checksums; only the sizes of its records are checked" in caplog.text


@pytest.mark.parametrize("stage", [2, 3])
def test_a_damaged_shard(stage: int, tmp_path: Path) -> None:
    fields = {"hyper_parameters": {"config": CONFIG}}
    path, record = tmp_path / "it", f"data/{0 if stage == 3 else 1}"
    write_checkpoint(path, weights(CONFIG), stage, 2, working=torch.float32, **fields)
    check_undamaged(path, 0)
    overwrite(path / "checkpoint" / OPTIMIZER, record)
    check_undamaged(path, 0)  # it is another rank's
    with pytest.raises(CheckpointError, match=rf"{OPTIMIZER}: the record '{record}' is damaged"):
        check_undamaged(path, 1)
    with pytest.raises(CheckpointError, match=rf"{OPTIMIZER}: the record '{record}' is damaged"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- limits -----------------------------------------------------------------------------------------------------------


def with_pickle(path: Path, data: bytes) -> Path:
    torch.save({"state_dict": {}}, path)
    repacked(path, lambda name, old: data if name == "data.pkl" else old)
    return path


def test_a_pickle_that_stands_for_very_many_values(tmp_path: Path) -> None:
    inner: Any = []
    for _ in range(40):
        inner = [inner, inner]
    torch.save({"state_dict": {}, "hyper_parameters": {"a": inner}}, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"it\.ckpt cannot be read .*holds more than 20,000,000 values"):
        read_checkpoint(tmp_path / "it.ckpt")
    key: Any = ()
    for _ in range(40):
        key = (key, key)
    # hashing such a key would never end, so another one is replaced by it in the pickle
    torch.save({"state_dict": {}, "a": key}, tmp_path / "it.ckpt")
    with zipfile.ZipFile(tmp_path / "it.ckpt") as archive:
        data = archive.read("it/data.pkl")
    assert data.endswith(b"u.")
    data = data[:-2] + b"h" + data[-4:-3] + b"K\x01u."
    with pytest.raises(CheckpointError, match=r"holds more than 20,000,000 values"):
        read_checkpoint(with_pickle(tmp_path / "it.ckpt", data))


def test_levels_and_cycles(tmp_path: Path) -> None:
    deep: Any = ()
    for _ in range(300):
        deep = (deep,)
    torch.save({"state_dict": {}, "deep": deep}, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"it is nested deeper than 100 levels"):
        read_checkpoint(tmp_path / "it.ckpt")
    # tuples in tuples, without a list in them, 1,000,000 levels deep, as the key of a dict
    data = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."
    with pytest.raises(CheckpointError, match=r"it is nested deeper than 100 levels"):
        read_checkpoint(with_pickle(tmp_path / "it.ckpt", data))
    itself: dict[str, Any] = {"state_dict": {}}
    itself["itself"] = [itself]
    torch.save(itself, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"it is nested deeper than 100 levels"):
        read_checkpoint(tmp_path / "it.ckpt")


def test_very_many_values_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VALUES", 10_000)
    torch.save({"state_dict": {}, "many": [[] for _ in range(10_000)]}, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"it holds more than 10,000 values"):
        read_checkpoint(tmp_path / "it.ckpt")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


CALLS = {
    "another encoding": (
        b"c_codecs\nencode\n" + text("a") + text("punycode") + b"\x86R",
        "it calls _codecs.encode with arg",
    ),
    "the encoding as errors": (
        b"c_codecs\nencode\n" + text("a") + text("punycode") + text("latin1") + b"\x87R",
        "it calls _codecs.encode with arguments",
    ),
    "through another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c_codecs\nencode\nN" + text("a") + text("punycode") + b"\x86NtR",
        "a function is the argument of another one",
    ),
    "a length": (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x0f\x85R", "it calls __builtin__.bytearray with arguments"),
    "a copy": (b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R", "of a device other than cpu or cuda"),
    "many copies of a text": (
        text("a" * 32_000) + b"q\x00" + text("latin1") + b"q\x01" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 30,
        "it holds more than 10,000 values",
    ),
    "many copies of a list": (
        b"](" + b"K\x01K\x02\x86" * 600 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 10,
        "it holds more than 10,000 values",
    ),
}


@pytest.mark.parametrize(("calls", "message"), CALLS.values(), ids=CALLS)
def test_calls_that_take_memory_or_time(
    calls: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_VALUES", 10_000)
    data = b"\x80\x02" + calls + b"}" + text("state_dict") + b"}s."
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(with_pickle(tmp_path / "it.ckpt", data))


def test_bytes_are_plain_data(tmp_path: Path) -> None:
    values = {"a": b"\xff" * 10, "b": bytearray(b"\xff" * 10), "c": bytearray(), "d": {1, 2}, "e": 1j}
    torch.save({"state_dict": {}, "hyper_parameters": values}, tmp_path / "it.ckpt")
    assert read_checkpoint(tmp_path / "it.ckpt").hyper_parameters == values


def test_a_weight_of_repeated_elements(checkpoint: Path, tmp_path: Path) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    name = "model.lm_head.weight"
    contents["state_dict"][name] = torch.zeros(()).expand(contents["state_dict"][name].shape)
    torch.save(contents, checkpoint)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is made of repeated elements"):
        export(checkpoint, tmp_path / "out")


def test_a_pickle_that_inflates(tmp_path: Path) -> None:
    """64 MiB of zeros, of which the file has 64 KiB."""
    path = tmp_path / "it.ckpt"
    torch.save({"state_dict": {}}, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("it/data.pkl", "w") as pickle:
        for _ in range(4):
            pickle.write(bytes(2**24))
    with pytest.raises(CheckpointError, match=r"the record 'data\.pkl' is compressed"):
        read_checkpoint(path)


def test_a_pickle_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_moeedit.checkpoints.torch_file.MAX_PICKLE", 1000)
    torch.save({"state_dict": {}, "text": "x" * 1000}, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"the record 'data\.pkl' has 1,\d+ bytes; at most 1,000 are read"):
        read_checkpoint(tmp_path / "it.ckpt")


def test_records_in_the_place_of_others(tmp_path: Path) -> None:
    """Two entries of the archive's list for the same bytes."""
    path = tmp_path / "it.ckpt"
    torch.save({"state_dict": {"a": torch.ones(50)}}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first, second = archive.infolist()[:2]
        at = data.index(b"PK\x01\x02", archive.start_dir + 1)
    data[at + 42 : at + 46] = struct.pack("<I", first.header_offset)
    path.write_bytes(data)
    assert second.header_offset != first.header_offset
    with pytest.raises(CheckpointError, match=r"is not where the list of records says|cannot be read"):
        TorchFile(path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "num_labels"])
@pytest.mark.parametrize("where", ["checkpoint", "--model"])
def test_a_config_of_very_many_layers(key: str, where: str, checkpoint: Path, tmp_path: Path) -> None:
    huge = {**CONFIG, key: 10**9}
    contents = torch.load(checkpoint, weights_only=True)
    if where == "checkpoint":
        contents["hyper_parameters"] = {"config": huge}
        torch.save(contents, checkpoint)
        options: dict[str, Any] = {}
    else:
        AutoConfig.for_model(**CONFIG).save_pretrained(tmp_path / "config")
        text = (tmp_path / "config" / "config.json").read_text(encoding="utf-8")
        (tmp_path / "config" / "config.json").write_text(text.replace("{", f'{{"{key}": {10**9},', 1), encoding="utf-8")
        options = {"model": str(tmp_path / "config")}
        if key != "num_labels":  # the same key stands there a second time
            text = (tmp_path / "config" / "config.json").read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if not line.startswith(f'  "{key}"')]
            (tmp_path / "config" / "config.json").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=rf"the config has {key} 1,000,000,000, but the checkpoint holds only \d+"
    ):
        export(checkpoint, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "types",
    [{"layers_block_type": ["moe"] * 10**5}, {"hybrid_override_pattern": "ME" * 10**5}],
    ids=lambda d: next(iter(d)),
)
def test_a_config_with_very_many_types_of_layers(types: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    contents["hyper_parameters"] = {"config": {"model_type": "nemotron_h", **types}}
    torch.save(contents, checkpoint)
    with pytest.raises(
        CheckpointError, match=rf"the config has {next(iter(types))} [12]00,000, but the checkpoint holds"
    ):
        export(checkpoint, tmp_path / "out")


def test_checksums_are_those_of_zip() -> None:
    """What is compared is what ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file)
    with zipfile.ZipFile(file) as archive:
        assert all(zlib.crc32(archive.read(entry)) == entry.CRC for entry in archive.infolist())
        assert archive.testzip() is None


def test_large_models_are_within_the_limits() -> None:
    """A checkpoint with a tensor for each of 16 experts of 48 layers, with the states of Adam."""
    state = {f"model.layers.{i // 16}.experts.{i % 16}.weight": torch.zeros(()) for i in range(48 * 16)}
    moments = {i: {"step": x, "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(state.values())}
    file = io.BytesIO()
    torch.save({"state_dict": state, "optimizer_states": [{"state": moments}]}, file)
    with zipfile.ZipFile(file) as archive:
        limits.check_pickle(archive.read("archive/data.pkl"))
