"""Callbacks for the Lightning Trainer."""

import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies for CPUs known by their names
from lit_moeedit.callbacks.edit_hold import EditHold
from lit_moeedit.callbacks.edit_replay import EditReplay
from lit_moeedit.callbacks.ending import EndTogether
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.report import EditReport
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.schedule import Schedule

__all__ = [
    "EditEvent",
    "EditHold",
    "EditListener",
    "EditReplay",
    "EditReport",
    "EndTogether",
    "KnowledgeEditing",
    "RoutingMonitor",
    "Schedule",
]
