"""Plans of a run before it starts: memory, communication and work of every phase."""

from lit_moeedit.planning.dry_run import Workload, empty_model, simulate
from lit_moeedit.planning.expert_parallel import ExpertParallelCost
from lit_moeedit.planning.fake_tensors import Cost, CostCounter, FakeFloatMode

__all__ = ["Cost", "CostCounter", "ExpertParallelCost", "FakeFloatMode", "Workload", "empty_model", "simulate"]
