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
}
"""The meaning of each metric. All but the perplexity are shares."""

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
    return metric != "perplexity" and metric.startswith(tuple(MEANINGS))
