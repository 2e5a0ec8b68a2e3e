"""Configs, tokenizers and messages of others: read as data, never as code, and blamed by name for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def brief(error: BaseException) -> str:
    r"""What libraries say in many lines, in one.

    Example:
        >>> brief(ValueError("first\n  second"))
        'first second'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def printable(text: str) -> str:
    r"""Text for a terminal: control characters, and those that turn the direction of writing, are spelt out.

    Example:
        >>> printable("\x1b[31mRome\u202e\nis")
        '\\x1b[31mRome\\u202e\nis'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Make whatever a library raises over foreign input a ``ValueError`` that says whose fault it is.

    ``OSError`` stays what it is, since nothing was read at all, and so does the end of the memory.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # there is no telling where foreign input fails
        raise ValueError(f"{what}: {brief(error)}") from error


def check_path(path: str | Path) -> None:
    """Raise ``FileNotFoundError`` for a path that can only be local, and is not there."""
    if (Path(path).is_absolute() or str(path).startswith((".", "~"))) and not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder {path}")


def config_of(keys: dict[str, Any]) -> PretrainedConfig:
    """A transformers config of its keys, ``model_type`` among them.

    Raises:
        ValueError: if transformers does not know the type, or refuses a value.
    """
    with blamed_on(f"the model's config (model_type {keys.get('model_type')!r}) cannot be used"):
        return AutoConfig.for_model(**keys)


def pretrained_config(path: str | Path, **options: Any) -> PretrainedConfig:
    """The config at a local path or hub id; no code that comes with it is run.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be used.
    """
    check_path(path)
    with blamed_on(f"the config of {path} cannot be used"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **options)


def pretrained_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer at a local path or hub id; no code that comes with it is run.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be used.
    """
    check_path(path)
    with blamed_on(f"the tokenizer of {path} cannot be used"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # of a config alone transformers makes a tokenizer without a vocabulary
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
