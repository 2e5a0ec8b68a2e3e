"""Folders of edits: what was saved is read, and whatever else they hold is refused by file and field."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lit_moeedit.data.facts import Probe
from lit_moeedit.edits import Edit, EditFileError, Placement, State, files, read_edits
from lit_moeedit.edits.edit import FACTORS
from tests.conftest import _build
from tests.edits.making import chain, make

LAYER = "model.layers.0.mlp.experts.down_proj"
JSON, TENSORS = "edit.json", "deltas.safetensors"


@pytest.fixture(scope="module")
def edit() -> Edit:
    return chain(_build("qwen3_moe"), 2)[0][1]


@pytest.fixture(scope="module")
def saved(edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact folder, not to be changed."""
    return edit.save(tmp_path_factory.mktemp("edits"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / saved.name)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header, with a checksum that fits: as a hostile file would have it."""
    header = json.loads((folder / JSON).read_text())
    del header["checksum"]
    change(header)
    header["checksum"] = sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (folder / JSON).write_text(json.dumps(header))


def repack(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": files.FORMAT, **metadata})


# -- what was saved is read -------------------------------------------------------------------------------------------


def test_everything_comes_back(edit: Edit, folder: Path) -> None:
    found = Edit.load(folder)
    for name in ("name", "id", "facts", "method", "settings", "made_on", "order", "versions", "placement"):
        assert getattr(found, name) == getattr(edit, name), name
    assert (found.metrics_before, found.metrics_after) == ({}, {"efficacy": 1.0})
    assert found.settings["class"].endswith("FineTuning") and found.settings["layers"] == [0, 1]
    assert set(found.versions) == {"lit_moeedit", "torch", "transformers"}
    for one, other in zip(found.layers, edit.layers, strict=True):
        assert (one.parameter, one.sizes, one.is_transposed) == (other.parameter, other.sizes, other.is_transposed)
        assert (one.base, one.before, one.after) == (other.base, other.before, other.after)
        assert all(torch.equal(getattr(one.deltas, name), getattr(other.deltas, name)) for name in FACTORS)


def test_probes_of_facts_come_back_and_are_checked(edit: Edit, tmp_path: Path) -> None:
    first, *others = edit.facts
    probes = (Probe("multi_hop", "Who?", ("a", "b")),)
    made = replace(edit, facts=(replace(first, probes=probes), *others))
    path = made.save(tmp_path)
    found = Edit.load(path)
    assert (found.facts, found.id) == (made.facts, made.id) and made.id != edit.id
    reseal(path, lambda header: header["facts"][0]["probes"][0].update(kind="other"))
    with pytest.raises(EditFileError, match=r"probes\[0\].*kind"):
        Edit.load(path)


def test_a_placement_comes_back(edit: Edit, tmp_path: Path) -> None:
    state = State("[2] torch.float16 -1f", "[2] torch.bfloat16 0")
    placed = replace(edit, placement=Placement(("a" * 64,), {LAYER: state}), order=7)
    found = Edit.load(placed.save(tmp_path))
    assert (found.placement, found.order, found.id) == (placed.placement, 7, edit.id)


def test_edits_are_read_in_their_order(tmp_path: Path) -> None:
    base = _build("qwen3_moe")
    edits, _ = chain(base, 2)
    first, _ = make("zz-first", base)
    for one in (edits[1], first):
        one.save(tmp_path / "model" / "edits")
    assert [one.name for one in read_edits(tmp_path / "model")] == ["zz-first", "edit-2"]
    assert [one.name for one in read_edits(tmp_path / "model" / "edits")] == ["zz-first", "edit-2"]
    assert [one.name for one in read_edits(tmp_path / "model" / "edits" / "edit-2")] == ["edit-2"]
    (tmp_path / "model" / "edits" / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"notes/edit\.json is missing"):
        read_edits(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditFileError, match="empty has no edits"):
        read_edits(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_edits(tmp_path / "nothing")


def test_an_edit_is_not_replaced_by_accident(edit: Edit, folder: Path) -> None:
    before = (folder / JSON).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        edit.save(folder.parent)
    assert (folder / JSON).read_bytes() == before
    edit.save(folder.parent, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, JSON]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "x" * 101, "a\n"])
def test_names(name: str) -> None:
    with pytest.raises(ValueError, match="an edit's name may have"):
        Edit(name, (), "", {}, ())


def test_the_id_is_that_of_facts_and_changes(edit: Edit) -> None:
    from dataclasses import replace

    assert replace(edit, name="other", order=5, made_on={}, metrics_after={}).id == edit.id
    assert replace(edit, facts=edit.facts[:1]).id != edit.id
    assert replace(edit, layers=edit.layers[:1]).id != edit.id
    moved = replace(edit.layers[0], parameter="model.layers.2.mlp.experts.down_proj")
    assert replace(edit, layers=(moved, edit.layers[1])).id != edit.id


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(saved: Path) -> Iterator[Path]:
    """A folder for many damaged copies, one at a time."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / saved.name


@settings(derandomize=True, max_examples=60)
@given(data=st.data(), name=st.sampled_from([JSON, TENSORS]), kind=st.sampled_from(["truncate", "flip", "insert"]))
def test_damage_anywhere_is_found(saved: Path, scratch: Path, data: st.DataObject, name: str, kind: str) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(saved, scratch)
    content = bytearray((scratch / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "truncate":
        # the last byte of the JSON is a line break
        del content[min(place, len(content) - 2) :]
    elif kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8).filter(lambda b: b.strip() == b))
    (scratch / name).write_bytes(content)
    try:
        found = Edit.load(scratch)
    except EditFileError as error:
        assert str(scratch / name) in str(error) and len(str(error)) < 700
    else:
        # white space between the fields of the JSON, or another spelling of the header of safetensors
        assert found.id == Edit.load(saved).id and kind != "truncate"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format="lit_moeedit.edit.3"), "written by a later version; update lit_moeedit"),
        (
            lambda h: h.update(format="lit_moeedit.edit.1"),
            "earlier version, and does not tell how its .*; make it again",
        ),
        (lambda h: h["layers"][0].update(sum_base="x"), r"field 'layers\[0\].sum_base' should be a fingerprint"),
        (lambda h: h["made_on"].append({"id": h["id"], "name": "x"}), "field 'made_on' should be ids of other edits"),
        (lambda h: h.update(format="lora"), "it is no edit"),
        (lambda h: h.pop("format"), "'format' should be 'lit_moeedit.edit.2', but is None"),
        (lambda h: h.pop("layers"), "field 'layers' should be a list, but is missing"),
        (lambda h: h.update(layers=[]), "'layers' should be a list of 1 to 10,000 layers"),
        (lambda h: h.update(layers=h["layers"][:1] * 2), "'layers' should be different parameters"),
        (lambda h: h["layers"][0].update(num_experts=0), r"'layers\[0\]\.num_experts' should be from 1 to 65,536"),
        (lambda h: h["layers"][0].update(d_hidden=10**9), r"'layers\[0\]\.d_hidden' should be from 1 to"),
        (lambda h: h["layers"][0].update(d_model=True), r"'layers\[0\]\.d_model' should be from 1 to"),
        (lambda h: h["layers"][0].update(d_model=31), rf"'{LAYER}\.left' should be \[3, 31\], but is \[3, 32\]"),
        (lambda h: h["layers"][0].update(num_experts=2), rf"'{LAYER}\.expert_index' should be in \[0, 2\)"),
        (lambda h: h["layers"][0].update(is_transposed=True), "'id' should be tensors with the id"),
        (lambda h: h["layers"][0].update(parameter="../../x"), r"'layers\[0\]\.parameter' should be the name of a par"),
        (lambda h: h["layers"][0].update(parameter="model.x"), "they differ in model"),
        (lambda h: h["layers"][0]["after"].update(exact="x"), r"'layers\[0\]\.after\.exact' should be a fingerprint"),
        (lambda h: h["layers"][0].update(base=[]), r"layers\[0\]: field 'base' should be a dict, but is a list"),
        (lambda h: h.update(facts=[{"prompt": 1}]), r"field 'facts\[0\]'"),
        (lambda h: h["facts"].pop(), "'id' should be tensors with the id"),
        (lambda h: h.update(order=0), "'order' should be a number from 1 on"),
        (lambda h: h.update(order=2.5), "'order' should be a int|'order' should be an? int"),
        (lambda h: h["made_on"][0].update(id="abc"), r"'made_on\[0\]\.id' should be 64 hex digits"),
        (lambda h: h["made_on"][0].update(name="../x"), r"'made_on\[0\]\.name' should be the name of an edit"),
        (lambda h: h.update(made_on=h["made_on"] * 2), "'made_on' should be a list of different edits"),
        (lambda h: h["metrics"].update(after={"a": "b"}), "metrics: field 'after' should be"),
        (lambda h: h.update(placement={"on": ["a"], "states": {}}), r"'placement\.on' should be ids"),
        (lambda h: h.update(versions={"torch": 2}), "field 'versions' should be"),
        (lambda h: h.update(id="0" * 64), "'id' should be tensors with the id 000000000000"),
    ],
)
def test_hostile_headers(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    reseal(folder, change)
    with pytest.raises(EditFileError, match=message) as caught:
        Edit.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON"),
        ("[]", "it should hold the fields of an edit"),
        ("[" * 100_000, "it is not JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1' + "0" * 5000 + "}", "it is not JSON"),
    ],
    ids=range(5),
)
def test_hostile_json(folder: Path, text: str, message: str) -> None:
    (folder / JSON).write_text(text)
    with pytest.raises(EditFileError, match=message):
        Edit.load(folder)


def test_a_header_that_was_changed_by_hand(folder: Path) -> None:
    (folder / JSON).write_text((folder / JSON).read_text().replace('"efficacy": 1.0', '"efficacy": 0.5'))
    with pytest.raises(EditFileError, match=r"edit\.json: field 'checksum' should be .* or was changed by hand"):
        Edit.load(folder)


def test_a_header_of_any_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_HEADER", 1000)
    with pytest.raises(EditFileError, match="at most 1,000 are read"):
        Edit.load(folder)


def set_to(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    key = f"{LAYER}.{name}"
    return lambda tensors: tensors.update({key: value(tensors[key])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("expert_index", lambda t: t + 6), r"expert_index' should be in \[0, 6\)"),
        (set_to("expert_index", lambda t: t - 6), r"expert_index' should be in \[0, 6\)"),
        (set_to("row_index", lambda t: t + 1), r"row_index' should be in \[0, 3\)"),
        (set_to("row_index", lambda t: t[:-1].clone()), r"row_index' should be \[5\], but is \[4\]"),
        (set_to("row_index", lambda t: t.int()), "row_index' should be I64, but is I32"),
        (set_to("left", lambda t: t * torch.inf), "left' should be finite"),
        (set_to("right", lambda t: t * torch.nan), "right' should be finite"),
        (set_to("right", lambda t: t.to(torch.int8)), "right' should be F64 or F32"),
        (set_to("left", lambda t: t[0].clone()), r"left' should be \[32, 32\], but is \[32\]"),
        (set_to("left", lambda t: -t), "'id' should be tensors with the id"),
        (lambda tensors: tensors.pop(f"{LAYER}.left"), "they differ in"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "they differ in more"),
    ],
)
def test_hostile_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    repack(folder, change)
    with pytest.raises(EditFileError, match=message) as caught:
        Edit.load(folder)
    assert str(folder / TENSORS) in str(caught.value)


def test_foreign_files(folder: Path) -> None:
    save_file({"weight": torch.ones(2)}, folder / TENSORS)
    with pytest.raises(EditFileError, match=r"deltas\.safetensors: field 'format' should be .* but is None"):
        Edit.load(folder)
    (folder / TENSORS).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(EditFileError, match="it is not a safetensors file, or not all of it"):
        Edit.load(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"deltas\.safetensors is missing"):
        Edit.load(folder)
    (folder / JSON).unlink()
    os.mkfifo(folder / JSON)  # reading it would wait for ever
    with pytest.raises(FileNotFoundError, match=r"edit\.json is missing"):
        Edit.load(folder)


@pytest.mark.parametrize("value", [10**400, "1e999"], ids=["integer", "decimal"])
def test_a_number_that_no_file_can_hold_again(folder: Path, value: Any) -> None:
    """Else the folder could be listed and shown in part, and applied until the very end."""
    reseal(folder, lambda header: header["metrics"]["after"].update(efficacy=value))
    text = (folder / JSON).read_text().replace('"1e999"', "1e999")
    (folder / JSON).write_text(text)
    with pytest.raises(EditFileError, match=r"edit\.json: .*(below 1e300|no number that fits)"):
        Edit.load(folder)
