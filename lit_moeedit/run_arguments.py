"""Arguments of a run: any module and data module, ours by default, and the edit under a key of its own."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from lit_moeedit.arguments import RunParser
from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data import FactsDataModule
from lit_moeedit.editing import Editor
from lit_moeedit.module import LitMoE

EDIT = "edit"
"""The key of the edit's settings: those of ``KnowledgeEditing``."""


class RunArguments(LightningCLI):
    """A CLI whose ``model``, ``data`` and ``edit`` may name any class, and need not name ours.

    ``edit`` is optional: without it a run has no such callback. The settings of a class that is not named are those of
    ``LitMoE``, ``FactsDataModule`` and ``Editor``.
    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"parser_class": RunParser} | kwargs))

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.add_class_arguments(KnowledgeEditing, EDIT, fail_untyped=False, instantiate=False, sub_configs=True)
        if isinstance(parser, RunParser):
            classes: dict[str, type] = {f"{EDIT}.editor": Editor}
            classes |= {"model": LitMoE} if self.model_class is None else {}
            classes |= {"data": FactsDataModule} if self.datamodule_class is None else {}
            parser.set_default_classes(classes, optional=EDIT)

    @property
    def settings(self) -> Any:
        """The arguments of the subcommand, or of a CLI without subcommands; empty before they are parsed."""
        config: Any = getattr(self, "config", {})
        return config if "subcommand" not in config else config.get(config.get("subcommand") or "") or {}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = self.settings
        edit = settings.get(EDIT)
        if edit is None:
            return
        if edit.get("editor") is None:
            # the settings of a class with its defaults, or an error that names those that it needs
            path = f"{Editor.__module__}.{Editor.__qualname__}"
            made: Any = {EDIT: {"editor": {"class_path": path}}}
            subcommand = self.config.get("subcommand")
            self.config = parser.parse_object({subcommand: made} if subcommand else made, self.config)
            settings = self.settings
        own = self._parser(self.config.get("subcommand"))
        if isinstance(own, RunParser):
            settings[EDIT] = Namespace({**own.defaults_of(EDIT), **settings[EDIT].as_dict()})
