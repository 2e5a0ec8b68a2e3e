"""What a run would take, computed before it: memory, communication and work of every phase."""

from lit_moeedit.planning.numberless import Cost, Numberless, Tally
from lit_moeedit.planning.phases import Workload, empty_model, rehearse

__all__ = ["Cost", "Numberless", "Tally", "Workload", "empty_model", "rehearse"]
