"""The model of the demo as it is just before its edit, with its tokenizer, as a folder for ``from_pretrained``.

Run from the root of the repository, with the package installed:

    python benchmarks/demo_model.py FOLDER --seed 1
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lightning as L

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.cli import EditingCLI
from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE

ROOT = Path(__file__).resolve().parents[1]


class StopAt(L.Callback):
    """Ends the training when an epoch would begin."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


def train(folder: Path, seed: int) -> None:
    """Train the demo's model up to its edit and save it."""
    arguments = ["--config", str(ROOT / "configs/atlas.yaml"), "--seed_everything", str(seed)]
    arguments += ["--data.init_args.seed", str(seed), "--data.init_args.corpus.init_args.seed", str(seed)]
    arguments += ["--trainer.default_root_dir", str(folder), "--trainer.logger", "false"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    cli = EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=arguments,
        run=False,
    )
    editing = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KnowledgeEditing))
    cli.trainer.callbacks[:] = [StopAt(editing.schedule.number)]
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.model.model.save_pretrained(folder)
    cli.datamodule.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
