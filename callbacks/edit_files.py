"""Edits as files: written when an edit or a renewal is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import lightning as L

from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.resources import on_first_rank
from lit_moeedit.callbacks.run_folder import run_folder
from lit_moeedit.editing import EditMethod, EditResult
from lit_moeedit.edits import Edit, EditFileError, SavedEdits, State, layers_by_parameter, states
from lit_moeedit.edits.files import HEADER
from lit_moeedit.edits.order import left_by
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)


class EditFiles:
    """The edit files of one callback.

    Each edit is recorded as made on top of those before it, of all callbacks of the trainer that write files, as long
    as nothing else has changed the experts. Experts that train are another base for every edit.

    Args:
        to: the folder; ``True`` for ``edits`` in the run's own folder, ``False`` for none.
        heading: beginning of messages.
    """

    def __init__(self, to: bool | str, heading: str = "") -> None:
        self.to, self._heading = to, heading
        self._known: dict[str, Edit] = {}  # by folder

    def states(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Iterable[int]) -> dict[str, State]:
        """Return the states of layers before an edit; none if no files are written. Every rank calls this."""
        if not self.to:
            return {}
        chosen = set(layers)
        found = {name: layer for name, layer in layers_by_parameter(pl_module).items() if layer.index in chosen}
        return states(found, Ranks.current())

    def save(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        kind: str,
        method: EditMethod,
        result: EditResult,
        before: Mapping[str, State],
        written: Sequence[str],
        metrics: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
    ) -> list[str]:
        """Write a change that was kept. Every rank calls this.

        Args:
            trainer: the trainer.
            pl_module: the module.
            kind: beginning of the edit's name: ``edit`` or ``renewal``.
            method: the method that made it.
            result: its result.
            before: the states before it.
            written: the folders of the edits in the weights, in their order.
            metrics: metrics before and after it.

        Returns:
            The folders of the edits in the weights now.

        Raises:
            OSError: on every rank, if the file cannot be written. The change is in the weights all the same.
        """
        if not self.to or not result.kept:
            return list(written)
        earlier = self._earlier(trainer, written, before)
        folder = Path(run_folder(trainer), "edits") if self.to is True else Path(str(self.to))
        if isinstance(method, SavedEdits) and not method.any_base:
            new = _made_after(earlier, method.edits_of(result.facts))
        else:
            finite = [{name: float(value) for name, value in part.items() if value == value} for part in metrics]
            edit = Edit.record(
                kind,
                pl_module,
                result,
                before,
                method=method,
                made_on=earlier,
                metrics_before=finite[0],
                metrics_after=finite[1],
                ranks=Ranks.current(),
            )
            new = [edit]
        names: list[str] = []
        on_first_rank(trainer, lambda: names.extend(_write(folder, kind, new, earlier, written)))
        names = list(trainer.strategy.broadcast(names))
        log.info("%swrote %s", self._heading, first_few(folder / name for name in names[len(earlier) :]))
        if written and not earlier:
            self._remark_gap(pl_module, folder / names[0], written, before)
        paths = [str(folder / name) for name in names]
        self._known |= {
            path: replace(own, name=name) for path, own, name in zip(paths, (*earlier, *new), names, strict=True)
        }
        return paths

    def _earlier(self, trainer: L.Trainer, written: Sequence[str], before: Mapping[str, State]) -> list[Edit]:
        """Return the edits of all callbacks that are in the weights; none if the experts have changed since."""
        others = (folder for editing in callbacks_of(trainer, EditState) for folder in editing._written)
        for folders in (list(dict.fromkeys((*written, *others))), written):
            try:
                edits = [self._known.get(folder) or Edit.load(folder) for folder in folders]
            except (OSError, EditFileError) as error:
                text = "%sthe next edit file is not recorded as made on top of earlier ones, which cannot be read: %s"
                log.warning(text, self._heading, error)
                continue
            # callbacks with folders of their own have copies of each other's
            edits = sorted({edit.id: edit for edit in reversed(edits)}.values(), key=lambda edit: edit.order)
            left = left_by(edits)
            if all(left.get(name, state) == state for name, state in before.items()):
                return edits
        return []

    def _remark_gap(
        self, pl_module: L.LightningModule, path: Path, written: Sequence[str], before: Mapping[str, State]
    ) -> None:
        """Tell that an edit is not part of the chain of earlier ones, as is expected of experts that train."""
        layers = layers_by_parameter(pl_module)
        is_frozen = any(name in layers and not layers[name].down_proj.requires_grad for name in before)
        log.log(
            logging.WARNING if is_frozen else logging.INFO,
            "%s%s is not part of the chain of %s: the experts were changed in between by something that has no edit "
            "file, so it belongs to the weights of this moment",
            self._heading,
            path,
            first_few(written),
        )


def _made_after(earlier: Sequence[Edit], edits: Sequence[Edit]) -> list[Edit]:
    """Return edits from files as they are in weights that have earlier ones."""
    before = {edit.id: edit.name for edit in earlier}
    made = ((edit, {**before, **edit.made_on}) for edit in edits)
    return [replace(edit, made_on=names, order=len(names) + 1) for edit, names in made]


def _write(folder: Path, kind: str, new: Sequence[Edit], earlier: Sequence[Edit], written: Sequence[str]) -> list[str]:
    """Write edits, with those that they were made on; returns the names of these, and their own.

    An edit that is there already is not written again: a run that is resumed from before it makes it once more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for own in (*earlier, *new):
        is_known = str(folder / own.name) in written and (folder / own.name).exists()
        name = own.name if is_known and own not in new else _name_there(folder, own)
        if name is None:
            is_free = own.name != kind and not (folder / own.name).exists()
            name = own.name if is_free else _free_name(folder, own.name.partition("-")[0])
            replace(own, name=name).save(folder)
        names.append(name)
    beside = [name for own in new for name in _rivals(folder, own) if name not in names]
    if beside:
        log.warning(
            "%s has %s beside %s, made on the same weights, by another run or by the part of this one that a resume "
            "has left behind. The edits in the weights are %s",
            folder,
            first_few(beside),
            first_few(names[len(earlier) :]),
            first_few(names, 20),
        )
    return names


def _rivals(folder: Path, edit: Edit) -> list[str]:
    """Return the names of the edits in a folder that were made on the same weights as an edit."""
    found = []
    for path in sorted(folder.glob(f"*/{HEADER}")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of foreign files
            header = json.loads(path.read_text(encoding="utf-8"))
            states = {layer["parameter"]: layer["before"]["exact"] for layer in header["layers"]}
            if any(states.get(change.parameter) == change.before.exact for change in edit.layers):
                found.append(path.parent.name)
    return found


def _name_there(folder: Path, edit: Edit) -> str | None:
    """Return the name under which an edit is in a folder, made on the same weights; ``None`` if it is not there."""
    with suppress(OSError):
        for path in sorted(folder.glob(f"*/{HEADER}")):
            if edit.id in path.read_text(encoding="utf-8", errors="replace"):
                with suppress(EditFileError):
                    found = Edit.load(path.parent)
                    is_same = found.id == edit.id and found.made_on.keys() == edit.made_on.keys()
                    if is_same and _states(found) == _states(edit):
                        return found.name
    return None


def _states(edit: Edit) -> list[tuple[State, State, State]]:
    return [(change.base, change.before, change.after) for change in edit.layers]


def _free_name(folder: Path, kind: str) -> str:
    """Return a name with the next number."""
    taken = [number for path in folder.iterdir() if (number := path.name.rpartition("-")[2]).isdigit()]
    start = max((int(number) for number in taken if len(number) < 10), default=0) + 1
    return next(name for number in count(start) if not (folder / (name := f"{kind}-{number:04d}")).exists())
