"""Metrics of edits and of routing: torchmetrics classes and their functional counterparts."""

from lit_moeedit.metrics.edit_success import EditSuccess, edit_success
from lit_moeedit.metrics.load import ExpertLoad, expert_load
from lit_moeedit.metrics.routing import RoutingDivergence, RoutingSimilarity, routing_divergence, routing_similarity

__all__ = [
    "EditSuccess",
    "ExpertLoad",
    "RoutingDivergence",
    "RoutingSimilarity",
    "edit_success",
    "expert_load",
    "routing_divergence",
    "routing_similarity",
]
