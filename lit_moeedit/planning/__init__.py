"""What a run would take, computed before it: memory, communication and work of every phase."""

from lit_moeedit.planning.dry_run import Workload, empty_model, rehearse
from lit_moeedit.planning.fake_tensors import Cost, Numberless, Tally

__all__ = ["Cost", "Numberless", "Tally", "Workload", "empty_model", "rehearse"]
