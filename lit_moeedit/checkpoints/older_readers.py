"""Exported folders for readers older than transformers 5, such as inference servers: both spellings of what it renamed.

Such a reader takes its defaults for settings whose names it does not know, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

NEW_TOKENIZER_CLASS = "TokenizersBackend"
"""Name that transformers 5 gives to what was ``PreTrainedTokenizerFast``, and still reads under that name."""


def add_older_spellings(folder: Path, config: PretrainedConfig) -> list[str]:
    """Add the older names of settings to the ``config.json`` in a folder, where it stays the same config.

    Args:
        folder: a folder with the saved config.
        config: the config that was saved there.

    Returns:
        Names of the settings that an older reader does not find, because adding them would change the config.
    """
    file = folder / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    meant = AutoConfig.from_pretrained(folder).to_dict()
    lost = []
    for name, added in _older_spellings(config, saved):
        trial = _merged(saved, added)
        file.write_text(_as_json(trial), encoding="utf-8")
        if added and _reads_as(folder, meant):
            saved = trial
        else:
            lost.append(name)
    file.write_text(_as_json(saved), encoding="utf-8")
    return lost


def add_older_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the settings of a saved tokenizer under the names that older readers know, too.

    An older reader does not know the new name of the class. Under the older name it sets ``add_prefix_space`` to
    ``False`` where ``tokenizer_config.json`` lacks it, whatever ``tokenizer.json`` says.
    """
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == NEW_TOKENIZER_CLASS:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # tokenizers in Python have no backend
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())["pre_tokenizer"] or {}
    for step in (state, *state.get("pretokenizers", ())):
        if "add_prefix_space" in step:
            settings.setdefault("add_prefix_space", step["add_prefix_space"])
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(_as_json(settings), encoding="utf-8")


def write_card(folder: Path, lost: list[str]) -> None:
    """Write a card that says which readers the folder is for."""
    text = (
        "---\nlibrary_name: transformers\n---\n\n"
        f"This model was exported with transformers {transformers.__version__} and is **for transformers >= 5**. Older "
        f"versions, and servers that use them, read their own defaults for {', '.join(lost)} in its `config.json`.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _older_spellings(config: PretrainedConfig, saved: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each renamed setting with its older spellings, nested like the config; empty if it has none."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig) and isinstance(saved.get(name), dict):
            for setting, added in _older_spellings(inner, saved[name]):
                yield f"{name}.{setting}", {name: added} if added else {}
    names = {**config.attribute_map, "torch_dtype": "dtype"}
    for older, newer in names.items():
        if newer in saved and older not in saved:
            yield newer, {older: saved[newer]}
    rope = saved.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        yield "rope_parameters", _older_rope(rope)


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older spelling of rotary embeddings; empty for those that differ between layers, which had none."""
    if "rope_theta" not in rope or any(isinstance(value, dict) for value in rope.values()):
        return {}
    single = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    others = {name: value for name, value in rope.items() if name not in single}
    # null and not left out: the default of some families scales
    return {**single, "rope_scaling": None if rope.get("rope_type", "default") == "default" else others}


def _merged(saved: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _merged(saved[name], value) for name, value in added.items() if isinstance(saved.get(name), dict)}
    return {**saved, **added, **nested}


def _reads_as(folder: Path, meant: Mapping[str, Any]) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(folder).to_dict() == meant)
    except Exception:  # a family's config may refuse a setting with any error
        return False


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
