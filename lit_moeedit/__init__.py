"""Edit facts in the weights of a Mixture-of-Experts language model inside a Lightning run.

The names below are imported when they are first used: ``import lit_moeedit`` alone imports neither PyTorch nor anything
else that takes time.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # fmt: off
    # isort: off
    from lit_moeedit.callbacks import (EditEvent as EditEvent, EditHold as EditHold, EditListener as EditListener,
        EditReplay as EditReplay,
        EditReport as EditReport, KnowledgeEditing as KnowledgeEditing, RoutingMonitor as RoutingMonitor,
        Schedule as Schedule)
    from lit_moeedit.data import (Atlas as Atlas, Corpus as Corpus, Fact as Fact, FactsCorpus as FactsCorpus,
        FactsDataModule as FactsDataModule, FactsError as FactsError, Neighbour as Neighbour, read_facts as read_facts,
        validate_facts as validate_facts)
    from lit_moeedit.editing import (EditMemory as EditMemory, EditMethod as EditMethod, Editor as Editor,
        EditResult as EditResult, evaluate as evaluate, Evaluation as Evaluation, FineTuning as FineTuning,
        TargetOptimizer as TargetOptimizer)
    from lit_moeedit.edits import Edit as Edit, read_edits as read_edits
    from lit_moeedit.metrics import (EditSuccess as EditSuccess, ExpertLoad as ExpertLoad,
        RoutingDivergence as RoutingDivergence, RoutingSimilarity as RoutingSimilarity)
    from lit_moeedit.module import LitMoE as LitMoE
    from lit_moeedit.preservation import (CovariancePenalty as CovariancePenalty, NullSpace as NullSpace,
        OutputPenalty as OutputPenalty, Preservation as Preservation)
    from lit_moeedit.sharding import regathering as regathering
    from lit_moeedit.solvers import (BlockCoordinateDescent as BlockCoordinateDescent, EditProblem as EditProblem,
        ExpertDeltas as ExpertDeltas, PerExpertRidge as PerExpertRidge, Solver as Solver, Tucker as Tucker,
        Woodbury as Woodbury)
    from lit_moeedit.standalone import edit as edit
    # isort: on
    # fmt: on

    __version__: str

_MODULES = {
    name: module
    for module, names in {
        "callbacks": "EditEvent EditHold EditListener EditReplay EditReport KnowledgeEditing RoutingMonitor Schedule",
        "data": "Atlas Corpus Fact FactsCorpus FactsDataModule FactsError Neighbour read_facts validate_facts",
        "editing": "EditMemory EditMethod Editor EditResult evaluate Evaluation FineTuning TargetOptimizer",
        "edits": "Edit read_edits",
        "metrics": "EditSuccess ExpertLoad RoutingDivergence RoutingSimilarity",
        "module": "LitMoE",
        "preservation": "CovariancePenalty NullSpace OutputPenalty Preservation",
        "sharding": "regathering",
        "standalone": "edit",
        "solvers": "BlockCoordinateDescent EditProblem ExpertDeltas PerExpertRidge Solver Tucker Woodbury",
    }.items()
    for name in names.split()
}
"""The public names, and the modules that have them."""

__all__ = [*_MODULES, "__version__"]

_BESIDE = ("callbacks", "configs")


class _Checkout:
    """Finds the folders that are inside of this package where it is installed, and beside it in a checkout.

    An editable install knows of them, too. But Python started in a checkout takes this package from there, whichever
    version is installed; its other parts have to come from the same place.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Look for a module; the import system calls this."""
        package, _, part = name.rpartition(".")
        if package != __name__ or part not in _BESIDE:
            return None
        return PathFinder.find_spec(name, [str(_FOLDER.parent)])


_FOLDER = Path(__file__).parent
if not (_FOLDER / "callbacks").exists() and (_FOLDER.parent / "callbacks" / "__init__.py").exists():
    # __path__ cannot do it: with the checkout in it, lit_moeedit.lit_moeedit and lit_moeedit.tests would exist, too
    sys.meta_path.insert(0, _Checkout)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("lit-moeedit")
        except metadata.PackageNotFoundError:  # sources that are not installed
            return "0+unknown"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
