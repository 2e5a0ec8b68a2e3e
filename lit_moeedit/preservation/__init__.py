"""Preservation of a model's behavior on other text: second moments of keys, and the shaping of keys by them."""

from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import (
    CovariancePenalty,
    NullSpace,
    OutputPenalty,
    Preservation,
    Shaping,
)

__all__ = [
    "CovariancePenalty",
    "MomentsCache",
    "NullSpace",
    "OutputPenalty",
    "Preservation",
    "SecondMoments",
    "Shaping",
]
