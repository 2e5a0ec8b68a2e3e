"""Pretrained configs and tokenizers: read as data, never as code, with errors that name the file or setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.text import MissingFileError, brief


def read_lines(path: str | Path, kind: str) -> list[str]:
    """Read the lines of a text file that are not blank.

    Args:
        path: the file.
        kind: what it is, for errors.

    Raises:
        MissingFileError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    with as_value_error(f"the {kind} {path} cannot be read as UTF-8"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingFileError(path, kind) from error
    return [line for line in text.splitlines() if line.strip()]


@contextmanager
def as_value_error(message: str) -> Iterator[None]:
    """Turn any exception that a library raises on untrusted input into a ``ValueError`` that begins with ``message``.

    ``OSError`` (nothing could be read) and errors about memory are not changed.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # untrusted input may fail anywhere in a library
        raise ValueError(f"{message}: {brief(error)}") from error


def check_path(path: str | Path) -> None:
    """Raise ``MissingFileError`` for a path that can only be local, and does not exist; no hub is asked.

    A hub id has at most one slash. One slash may be either, and is taken for a path if its first part is a folder here.
    """
    text, parts = str(path), Path(path).parts
    is_local = Path(path).is_absolute() or text.startswith((".", "~")) or len(parts) > 2 or text.endswith("/")
    if (is_local or (len(parts) == 2 and Path(parts[0]).is_dir())) and not Path(path).exists():
        raise MissingFileError(path, "file or folder")


def build_config(keys: dict[str, Any]) -> PretrainedConfig:
    """Make a transformers config of its keys, which include ``model_type``.

    Raises:
        ValueError: transformers does not know the type, or refuses a value.
    """
    with as_value_error(f"the model's config (model_type {keys.get('model_type')!r}) cannot be used"):
        return AutoConfig.for_model(**keys)


def pretrained_config(path: str | Path, **options: Any) -> PretrainedConfig:
    """Read the config at a local path or hub id, without running code that comes with it.

    Raises:
        OSError: there is none.
        ValueError: it cannot be used.
    """
    check_path(path)
    with as_value_error(f"the config of {path} cannot be used"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        return config


def pretrained_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer at a local path or hub id, without running code that comes with it.

    Raises:
        OSError: there is none.
        ValueError: it cannot be used.
    """
    check_path(path)
    with as_value_error(f"the tokenizer of {path} cannot be used"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # transformers makes a tokenizer without a vocabulary from a config alone
        if len(tokenizer) <= len(tokenizer.get_added_vocab()):
            raise ValueError("it has no vocabulary")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if the tokenizer has tokens that the model does not embed."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds only {vocabulary}; "
            "set vocab_size of the model's config to at least that many"
        )
