"""Settings of a module in a checkpoint, for a run that resumes: the user's come first, and nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
from typing_extensions import override

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.read import check_counts, read_checkpoint


def saved_settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Read a module's class path, ``None`` without one, and its settings from a checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its config is of another model.
    """
    checkpoint = read_checkpoint(path)
    settings = {str(name): value for name, value in checkpoint.hyper_parameters.items()}
    settings.pop("_instantiator", None)
    name = settings.pop("_class_path", None)
    if isinstance(settings.get("config"), Mapping):
        check_counts(path, settings["config"], checkpoint.tensors)
    return (None if name is None else str(name)), settings


def imported_class(path: Path, name: str) -> type:
    """Find a LightningModule that a checkpoint names, among the classes of what is imported already.

    Raises:
        CheckpointError: it is not there.
    """
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, L.LightningModule)):
        raise CheckpointError(
            f"{path}: field 'hyper_parameters' names the class {name[:200]!r}, which this run does not use; nothing "
            "was imported. Name the class with --model, if you trust it"
        )
    return found


@contextmanager
def no_imports_by(path: Path, settings: Any) -> Iterator[None]:
    """Refuse to import, within this block, a module that a text in a checkpoint's settings names.

    A parser imports what it takes for the path of a class or function.

    Raises:
        CheckpointError: an import was tried.
    """
    texts = set(_texts(settings))

    class Refuse(MetaPathFinder):
        @override
        def find_spec(
            self, fullname: str, path_: Sequence[str] | None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            name = next((text for text in texts if text == fullname or text.startswith(f"{fullname}.")), None)
            if name is not None:
                refused.append(name)
                raise ImportError(f"{name} is not imported for a checkpoint")
            return None

    refused: list[str] = []
    finder = Refuse()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if refused:
            raise CheckpointError(
                f"{path}: field 'hyper_parameters' names {refused[0][:200]!r}, whose module would have to be imported; "
                "nothing was imported. Give the setting yourself, if you trust it"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
