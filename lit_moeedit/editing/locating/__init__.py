"""Locating: the layers and the token at which facts are best edited, and how strongly the rest is preserved there."""

from lit_moeedit.editing.locating.location import Location
from lit_moeedit.editing.locating.search import PERSISTENT, locate
from lit_moeedit.editing.locating.tracing import Trace, trace
from lit_moeedit.editing.locating.trials import Trial
from lit_moeedit.editing.locating.tuning import tune
from lit_moeedit.editing.place import Place

__all__ = ["PERSISTENT", "Location", "Place", "Trace", "Trial", "locate", "trace", "tune"]
