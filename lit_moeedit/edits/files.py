"""Edits as folders, ``edit.json`` beside ``deltas.safetensors``: written atomically, read as untrusted input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_moeedit.atomic_files import atomic_folder, write_tensors
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.errors import FactsError
from lit_moeedit.data.facts import Fact
from lit_moeedit.edits.edit import FACTORS, NAME, Edit, LayerChange, Placement
from lit_moeedit.edits.states import State
from lit_moeedit.solvers import ExpertDeltas
from lit_moeedit.text import brief, first_few, printable

FORMAT = "lit_moeedit.edit.2"
HEADER, TENSORS = "edit.json", "deltas.safetensors"
MAX_HEADER = 2**26
"""Maximum size of ``edit.json`` in bytes; a fact with its neighbours takes some 3,000."""
MAX_SIZES = (2**16, 2**20, 2**20)
"""Maximum values of ``E``, ``d_model`` and ``d_hidden``."""
MAX_LAYERS = 10_000

_FINGERPRINT = re.compile(r"\[\d+(, \d+)*\] torch\.\w+ -?[0-9a-f]{1,16}")
_ID = re.compile(r"[0-9a-f]{64}")
_PARAMETER = re.compile(r"[A-Za-z_]\w*(\.\w+){0,50}")
_FIELDS: dict[str, Any] = {
    "format": str,
    "id": str,
    "order": int,
    "made_on": [dict],
    "facts": [dict],
    "method": str,
    "settings": dict,
    "versions": {str: str},
    "metrics": dict,
    "layers": [dict],
    "placement": dict,
    "checksum": str,
}


class EditFileError(ValueError):
    """A file or folder of edits that cannot be used; the message names the file, the field and the expected value."""


# -- writing ----------------------------------------------------------------------------------------------------------


def save_edit(edit: Edit, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an edit as the folder ``folder/NAME``, which appears complete or not at all.

    Args:
        edit: the edit.
        folder: folder of several edits; it is made if it is missing.
        overwrite: whether to replace an edit of that name.

    Returns:
        The folder of the edit.

    Raises:
        OSError: if it cannot be written, or exists already.
    """
    path = Path(folder) / edit.name
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists already; give the edit another name, or replace it with overwrite")
    with atomic_folder(path, overwrite) as beside:
        header = json.dumps(_sealed(_header(edit)), indent=1, allow_nan=False) + "\n"
        (beside / HEADER).write_text(header, encoding="ascii")
        tensors = {
            f"{change.parameter}.{name}": getattr(change.deltas, name) for change in edit.layers for name in FACTORS
        }
        write_tensors(beside / TENSORS, tensors, {"format": FORMAT, "id": edit.id})
    return path


def _header(edit: Edit) -> dict[str, Any]:
    placement = edit.placement
    return {
        "format": FORMAT,
        "id": edit.id,
        "order": edit.order,
        "made_on": [{"id": key, "name": name} for key, name in edit.made_on.items()],
        "facts": [fact.to_dict() for fact in edit.facts],
        "method": edit.method,
        "settings": dict(edit.settings),
        "versions": dict(edit.versions),
        "metrics": {"before": dict(edit.metrics_before), "after": dict(edit.metrics_after)},
        "layers": [_layer_header(change) for change in edit.layers],
        "placement": placement
        and {"on": list(placement.on), "states": {k: vars(v) for k, v in placement.states.items()}},
    }


def _layer_header(change: LayerChange) -> dict[str, Any]:
    sizes = dict(zip(("num_experts", "d_model", "d_hidden"), change.sizes, strict=True))
    return {
        "parameter": change.parameter,
        **sizes,
        "is_transposed": change.is_transposed,
        **{name: vars(getattr(change, name)) for name in ("base", "before", "after")},
        "sum_base": change.sum_base,
        "is_exact": change.is_exact,
    }


def _sealed(header: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of all other fields, so that damage anywhere is found."""
    return {**header, "checksum": sha256(json.dumps(header, sort_keys=True).encode("ascii")).hexdigest()}


# -- reading ----------------------------------------------------------------------------------------------------------


def load_edit(path: str | Path) -> Edit:
    """Read the folder of one edit, whose name is that of the edit. Everything in it is checked, and nothing executed.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        EditFileError: if it is not an edit, is damaged, or was written by a later version. The message names the file
            and the field.
    """
    folder = Path(path).resolve()
    with _in_file(folder / HEADER):
        header = _read_header(folder / HEADER)
        check_fields(folder / HEADER, header, ("placement",), **_FIELDS)
        expected = _sealed({name: value for name, value in header.items() if name != "checksum"})
        _check(header == expected, "checksum", "that of the other fields; the file is damaged, or was changed by hand")
        _check(
            NAME.fullmatch(folder.name) is not None, "name", "letters, digits, '_', '.' and '-' as the folder's name"
        )
        made_on = _made_on(folder / HEADER, header["made_on"])
        _check(1 <= header["order"] <= 10**6 and header["order"] is not True, "order", "a number from 1 on")
        layers = _layers(folder / HEADER, header["layers"])
        metrics = header["metrics"]
        check_fields(f"{folder / HEADER}, metrics", metrics, before=dict, after=dict)
        check_fields(f"{folder / HEADER}, metrics", metrics, before={str: (int, float)}, after={str: (int, float)})
        numbers = [*metrics["before"].values(), *metrics["after"].values()]
        _check(all(abs(number) < 1e300 for number in numbers), "metrics", "numbers below 1e300")
        placement = header.get("placement")
        edit = {
            "name": folder.name,
            "facts": tuple(_fact(number, data) for number, data in enumerate(header["facts"])),
            "method": printable(header["method"][:200]),
            "settings": header["settings"],
            "made_on": made_on,
            "order": header["order"],
            "metrics_before": metrics["before"],
            "metrics_after": metrics["after"],
            "versions": header["versions"],
            "placement": placement and _placement(folder / HEADER, placement),
        }
    with _in_file(folder / TENSORS):
        deltas = _read_deltas(folder / TENSORS, layers)
        found = Edit(layers=tuple(_change(layer, deltas[layer["parameter"]]) for layer in layers), **edit)
        _check(found.id == header["id"], "id", f"tensors with the id {header['id'][:12]}… of {HEADER}")
    with _in_file(folder / HEADER):
        _check(found.id not in found.made_on, "made_on", "ids of other edits than this one")
    return found


def read_edits(folder: str | Path) -> list[Edit]:
    """Read one edit, or all edits in a folder, in their order.

    Args:
        folder: the folder of an edit or its ``edit.json``, a folder of such folders, or one that has a folder ``edits``
            of them (a model).

    Raises:
        FileNotFoundError: if there is no such folder.
        EditFileError: if there is no edit in it, or one of its folders is not an edit.
    """
    root = Path(folder)
    root = root.parent if root.name == HEADER and root.is_file() else root
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if (root / HEADER).exists():
        return [load_edit(root)]
    if (root / "config.json").exists() and not (root / "edits").is_dir():
        raise EditFileError(f"{root} has no edits: it is a model without a folder 'edits'")
    root = root / "edits" if (root / "edits").is_dir() else root
    # temporary folders of writers are hidden
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise EditFileError(f"{root} has no edits: expected folders with {HEADER} and {TENSORS}")
    return sorted(map(load_edit, found), key=lambda edit: (edit.order, edit.name))


def edits_of(model: str | Path) -> list[Edit]:
    """Read the edits in a model's folder, in their order; none if it has no folder ``edits``, or an empty one.

    Raises:
        EditFileError: if a folder in ``edits`` is not an edit.
    """
    folder = Path(model) / "edits"
    is_empty = not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir())
    return [] if is_empty else read_edits(model)


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Name the file in every error."""
    try:
        yield
    except CheckpointError as error:
        raise EditFileError(str(error)) from error
    except _FieldError as error:
        raise EditFileError(f"{path}: {error}") from error
    except FactsError as error:
        raise EditFileError(f"{path}: field 'facts': {brief(error)}") from error
    except RecursionError as error:
        raise EditFileError(f"{path}: field 'settings' should have fewer nested levels") from error


class _FieldError(ValueError):
    """A field of a file that is not as expected."""


def _check(holds: bool, field: str, expected: str) -> None:
    if not holds:
        raise _FieldError(f"field {field!r} should be {expected}")


def _read_header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not the folder of an edit, or not all of it")
    if path.stat().st_size > MAX_HEADER:
        raise _FieldError(f"it has {path.stat().st_size:,} bytes; at most {MAX_HEADER:,} are read")
    try:
        header = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise _FieldError(f"it is not JSON, or not all of it ({brief(error)})") from error
    if not isinstance(header, dict):
        raise _FieldError("it should hold the fields of an edit")
    form = header.get("format")
    if form != FORMAT:
        what = "is no edit"
        if form == "lit_moeedit.edit.1":
            what = "was written by an earlier version, and does not tell how its changes were rounded; make it again"
        elif isinstance(form, str) and form.startswith("lit_moeedit.edit."):
            what = "was written by a later version; update lit_moeedit"
        raise _FieldError(f"field 'format' should be {FORMAT!r}, but is {form!r:.80}: it {what}")
    return header


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is no number that fits")


def _made_on(path: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    for number, entry in enumerate(entries):
        check_fields(f"{path}, made_on[{number}]", entry, id=str, name=str)
        _check(_ID.fullmatch(entry["id"]) is not None, f"made_on[{number}].id", "64 hex digits")
        _check(NAME.fullmatch(entry["name"]) is not None, f"made_on[{number}].name", "the name of an edit")
    found = {entry["id"]: entry["name"] for entry in entries}
    _check(len(found) == len(entries), "made_on", "a list of different edits")
    return found


def _fact(number: int, data: Mapping[str, Any]) -> Fact:
    try:
        return Fact.from_dict(data)
    except FactsError as error:
        raise _FieldError(f"field 'facts[{number}]': {brief(error)}") from error


def _layers(path: Path, layers: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Check the headers of the layers."""
    _check(1 <= len(layers) <= MAX_LAYERS, "layers", f"a list of 1 to {MAX_LAYERS:,} layers")
    for number, layer in enumerate(layers):
        where = f"layers[{number}]"
        sizes = dict(zip(("num_experts", "d_model", "d_hidden"), MAX_SIZES, strict=True))
        fields: dict[str, Any] = {name: int for name in sizes} | {name: dict for name in ("base", "before", "after")}
        flags = dict.fromkeys(("is_transposed", "is_exact"), bool)
        check_fields(f"{path}, {where}", layer, (), parameter=str, sum_base=str, **flags, **fields)
        _check(_FINGERPRINT.fullmatch(layer["sum_base"][:200]) is not None, f"{where}.sum_base", "a fingerprint")
        _check(_PARAMETER.fullmatch(layer["parameter"]) is not None, f"{where}.parameter", "the name of a parameter")
        for name, most in sizes.items():
            _check(layer[name] is not True and 1 <= layer[name] <= most, f"{where}.{name}", f"from 1 to {most:,}")
        for name in ("base", "before", "after"):
            _state(path, f"{where}.{name}", layer[name])
    names = [layer["parameter"] for layer in layers]
    _check(len(set(names)) == len(names), "layers", "different parameters")
    return layers


def _state(path: Path, where: str, data: Mapping[str, Any]) -> State:
    check_fields(f"{path}, {where}", data, exact=str, rounded=str)
    for name in ("exact", "rounded"):
        _check(_FINGERPRINT.fullmatch(data[name][:200]) is not None, f"{where}.{name}", "a fingerprint")
    return State(data["exact"], data["rounded"])


def _placement(path: Path, data: Mapping[str, Any]) -> Placement:
    check_fields(f"{path}, placement", data, on=[str], states={str: dict})
    _check(all(map(_ID.fullmatch, data["on"])), "placement.on", "ids of 64 hex digits")
    found = {name: _state(path, f"placement.states[{name[:80]!r}]", state) for name, state in data["states"].items()}
    return Placement(tuple(data["on"]), found)


def _change(layer: Mapping[str, Any], deltas: ExpertDeltas) -> LayerChange:
    base, before, after = (State(layer[x]["exact"], layer[x]["rounded"]) for x in ("base", "before", "after"))
    own = (layer["sum_base"], layer["is_exact"])
    return LayerChange(layer["parameter"], layer["is_transposed"], deltas, base, before, after, *own)


def _read_deltas(path: Path, layers: Sequence[Mapping[str, Any]]) -> dict[str, ExpertDeltas]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not all of an edit")
    try:
        with safe_open(str(path), framework="pt") as file:
            form = (file.metadata() or {}).get("format")
            _check(form == FORMAT, "format", f"{FORMAT!r} in the metadata, but is {form!r:.80}")
            wanted = {f"{layer['parameter']}.{name}" for layer in layers for name in FACTORS}
            found = set(file.keys())
            if found != wanted:
                differing = first_few(sorted(found ^ wanted))
                raise _FieldError(f"its tensors should be those of the layers in {HEADER}; they differ in {differing}")
            return {layer["parameter"]: _read_layer(file, layer) for layer in layers}
    except SafetensorError as error:
        raise _FieldError(f"it is not a safetensors file, or not all of it ({brief(error)})") from error


def _read_layer(file: Any, layer: Mapping[str, Any]) -> ExpertDeltas:
    """Read and check the deltas of one layer: shapes before elements, then the elements."""
    parameter, experts = layer["parameter"], layer["num_experts"]
    slices = {name: file.get_slice(f"{parameter}.{name}") for name in FACTORS}
    shapes = {name: list(part.get_shape()) for name, part in slices.items()}
    terms, rows = (shapes[name][0] if shapes[name] else 0 for name in ("expert_index", "left"))
    expected = {
        "expert_index": [terms],
        "row_index": [terms],
        "left": [rows, layer["d_model"]],
        "right": [terms, layer["d_hidden"]],
    }
    for name in FACTORS:
        _check(shapes[name] == expected[name], f"{parameter}.{name}", f"{expected[name]}, but is {shapes[name]}")
        kinds = ("I64",) if name.endswith("index") else ("F64", "F32", "F16", "BF16")
        kind = slices[name].get_dtype()
        _check(kind in kinds, f"{parameter}.{name}", f"{' or '.join(kinds)}, but is {kind}")
    tensors: dict[str, Tensor] = {name: file.get_tensor(f"{parameter}.{name}") for name in FACTORS}
    for name, limit in (("expert_index", experts), ("row_index", rows)):
        index = tensors[name]
        inside = not len(index) or bool((index.amin() >= 0) & (index.amax() < limit))
        _check(inside, f"{parameter}.{name}", f"in [0, {limit})")
    for name in ("left", "right"):
        _check(bool(torch.isfinite(tensors[name]).all()), f"{parameter}.{name}", "finite")
    return ExpertDeltas(**tensors, num_experts=experts)
