"""Metrics of edits and of routing: torchmetrics classes and their functional counterparts."""

from lit_moeedit.metrics.bootstrap import bootstrap_interval
from lit_moeedit.metrics.copying import CopyAccuracy, copy_accuracy
from lit_moeedit.metrics.edit_success import EditSuccess, edit_success
from lit_moeedit.metrics.gap import ProbabilityGap, probability_gap
from lit_moeedit.metrics.generation import Fluency, GenerationMatch, generation_match, ngram_entropy
from lit_moeedit.metrics.growth import WeightGrowth, weight_growth
from lit_moeedit.metrics.load import ExpertLoad, expert_load
from lit_moeedit.metrics.probes import ProbeAccuracy, probe_accuracy
from lit_moeedit.metrics.routing import RoutingDivergence, RoutingSimilarity, routing_divergence, routing_similarity

__all__ = [
    "CopyAccuracy",
    "EditSuccess",
    "ExpertLoad",
    "Fluency",
    "GenerationMatch",
    "ProbabilityGap",
    "ProbeAccuracy",
    "RoutingDivergence",
    "RoutingSimilarity",
    "WeightGrowth",
    "bootstrap_interval",
    "copy_accuracy",
    "edit_success",
    "expert_load",
    "generation_match",
    "ngram_entropy",
    "probability_gap",
    "probe_accuracy",
    "routing_divergence",
    "routing_similarity",
    "weight_growth",
]
