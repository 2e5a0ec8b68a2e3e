"""Metrics in plain words."""

from __future__ import annotations

_RETAINED = "specificity_retained"
MEANINGS = {
    "efficacy_accuracy": "edited prompts that the model continues with the new answer",
    "efficacy": "edited prompts for which the new answer is more likely than the old one",
    "generalization_accuracy": "the same questions in other words that the model continues with the new answer",
    "generalization": "the same questions in other words for which the new answer is more likely than the old one",
    _RETAINED: "other questions answered right before the edit that still are",
    "specificity_accuracy": "other questions that the model continues with their true answer",
    "specificity": "other questions for which their true answer is more likely than the new one",
    "score": "harmonic mean of efficacy, generalization and specificity",
    "utility": "arithmetic mean of efficacy, generalization and specificity",
    "perplexity": "how surprised the model is by ordinary text; lower is better",
    "generation_exact": "edited prompts after which the model generates the new answer and nothing else",
    "generation_contained": "edited prompts after which the new answer is in what the model generates",
    "portability": "questions that follow from the facts by a step of reasoning, or by another name, answered right",
    "multi_hop": "questions over several facts answered right",
    "reversed": "questions the other way round answered right",
    "held_out_accuracy": "statements about other facts that the model completes",
    "copy_accuracy": "tokens of a random text that the model copies when it is repeated",
    "template_routing_similarity": "overlap of the experts chosen after the prompts without their subjects, before and "
    "after the edit",
    "fluency": "variety of the words that the model generates (bits); far below its value before, it repeats itself",
    "probability_gap": "probability of the new answer minus that of the old one",
    "log_probability_gap": "log-probability of the new answer minus that of the old one (nats)",
    "other_style_perplexity": "how surprised the model is by text of another style; lower is better",
    "weight_growth_max": "growth of the edited expert's weights that grew most, on average over edits; 0 is none",
    "weight_growth_mean": "growth of the edited experts' weights on average; 0 is none",
    "null_space_rank_mean": "directions in which an expert was free to change, on average",
    "null_space_rank_min": "directions in which the most bound expert was free to change, on average over edits",
}
"""The meaning of each metric."""

_NO_SHARES = frozenset(
    {
        "perplexity",
        "fluency",
        "probability_gap",
        "log_probability_gap",
        "other_style_perplexity",
        "weight_growth_max",
        "weight_growth_mean",
        "null_space_rank_mean",
        "null_space_rank_min",
    }
)

UNSHOWN = frozenset({"truth_recalled"})
"""Metrics that a page leaves out: the true answers that are generated include those that were to change."""

_GROUPS = {
    "same_subject": "about the subjects of the facts",
    "same_relation": "that ask the same about other subjects",
    "unrelated": "that have nothing to do with the facts",
}


def meaning_of(metric: str) -> str:
    """Explain a metric in plain words; an empty text for an unknown one.

    Example:
        >>> meaning_of("specificity_retained_same_subject")
        'other questions about the subjects of the facts, answered right before the edit, that still are'
    """
    group = metric.removeprefix(f"{_RETAINED}_")
    if group == metric:
        return MEANINGS.get(metric, "")
    kind = _GROUPS.get(group, f"of the group {label_of(group)}")
    return f"other questions {kind}, answered right before the edit, that still are"


def label_of(metric: str) -> str:
    """Return the name of a metric as people write it.

    Example:
        >>> label_of("specificity_retained_same_subject")
        'specificity retained same subject'
    """
    return metric.replace("_", " ")


def is_share(metric: str) -> bool:
    """Tell if the values of a metric are shares in [0, 1]."""
    return metric not in _NO_SHARES and metric.startswith(tuple(MEANINGS))
