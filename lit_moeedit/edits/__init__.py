"""Edits as files: saved, applied to other copies of the same base, taken out, and found in weights; autopsies."""

from lit_moeedit.edits.adapters import to_peft
from lit_moeedit.edits.apply import Presence, apply, undo, verify
from lit_moeedit.edits.autopsy import Autopsy, autopsy
from lit_moeedit.edits.edit import Edit, LayerChange, Placement
from lit_moeedit.edits.files import EditFileError, read_edits
from lit_moeedit.edits.method import SavedEdits
from lit_moeedit.edits.order import EditConflictError
from lit_moeedit.edits.states import State, layers_by_parameter, states

__all__ = [
    "Autopsy",
    "Edit",
    "EditConflictError",
    "EditFileError",
    "LayerChange",
    "Placement",
    "Presence",
    "SavedEdits",
    "State",
    "apply",
    "autopsy",
    "layers_by_parameter",
    "read_edits",
    "states",
    "to_peft",
    "undo",
    "verify",
]
