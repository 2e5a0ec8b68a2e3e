"""The command ``lit-moeedit``: LightningCLI with the module, data and callbacks of this package at hand."""

from __future__ import annotations

import logging
import os

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.logging import RichHandler

import lit_moeedit.callbacks  # noqa: F401 - makes callbacks and strategies known by their short names
from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE


class EditingCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data module, ours by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: CSV logs, one device, and results in ``runs``."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.devices": 1,
                "seed_everything": 0,
            }
        )


def run(args: ArgsType = None) -> EditingCLI:
    """Run the command line and return what it made.

    Args:
        args: arguments instead of those of the process.
    """
    handler = RichHandler(show_path=False, omit_repeated_times=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    # what all ranks would say, the first one says
    level = "INFO" if getattr(rank_zero_only, "rank", 0) in (None, 0) else "WARNING"
    logging.getLogger("lit_moeedit").setLevel(os.environ.get("LIT_MOEEDIT_LOG", level).upper())
    return EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def main() -> None:
    """The command ``lit-moeedit``; what a console script returns becomes the exit code, so nothing is returned."""
    run()


if __name__ == "__main__":
    main()
