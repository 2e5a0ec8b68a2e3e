"""What a run would take, computed before it: memory, communication and work of every phase."""

from lit_moeedit.planning.costs import plan_costs
from lit_moeedit.planning.passes import empty_model, model_size, run_passes
from lit_moeedit.planning.report import plan
from lit_moeedit.planning.sizes import Cost, EditSize, ModelSize, Pass, Passes, TrainingSize
from lit_moeedit.sharding.rehearsal import Sharding

__all__ = [
    "Cost",
    "EditSize",
    "ModelSize",
    "Pass",
    "Passes",
    "Sharding",
    "TrainingSize",
    "empty_model",
    "model_size",
    "plan",
    "plan_costs",
    "run_passes",
]
