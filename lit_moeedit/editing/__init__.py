"""Editing facts into the weights of routed experts."""

from lit_moeedit.editing.editor import Editor
from lit_moeedit.editing.evaluation import Evaluation, evaluate, neighbour_groups, perplexity, score
from lit_moeedit.editing.fine_tuning import FineTuning
from lit_moeedit.editing.generation import answers
from lit_moeedit.editing.job import EditResult
from lit_moeedit.editing.locating import Location, Place, Trace, locate, trace
from lit_moeedit.editing.measured import Measured, Moment
from lit_moeedit.editing.memory import EditMemory
from lit_moeedit.editing.method import EditMethod
from lit_moeedit.editing.outcomes import FailedEditError
from lit_moeedit.editing.phases import PHASES
from lit_moeedit.editing.targets import TargetOptimizer, Targets
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments

__all__ = [
    "PHASES",
    "EditMemory",
    "EditMethod",
    "EditResult",
    "Editor",
    "Evaluation",
    "FailedEditError",
    "FineTuning",
    "Location",
    "Measured",
    "Moment",
    "MomentsCache",
    "Place",
    "SecondMoments",
    "TargetOptimizer",
    "Targets",
    "Trace",
    "answers",
    "evaluate",
    "locate",
    "neighbour_groups",
    "perplexity",
    "score",
    "second_moments",
    "trace",
]
