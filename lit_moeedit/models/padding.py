"""Batches whose padding changes nothing, for models whose attention depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedModel


def longest_padded(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of a row that may be padded; ``None`` if any row may be.

    Padding belongs on the right in all models: compressed and block-sparse attention counts its blocks from the first
    column. In models with a sparse-attention indexer (DeepSeek V3.2, GLM-MoE-DSA, …) that is not enough. There, a token
    attends to the ``index_topk`` tokens with the highest scores. The scores are sums of rectified products, and many of
    them are exactly zero. Which of these are chosen depends on the number of columns. In a row with at most
    ``index_topk`` tokens there is nothing to choose.

    Args:
        model: the model.
    """
    limit = getattr(model.config.get_text_config(), "index_topk", None)
    return limit if isinstance(limit, int) else None


def unpadded(batches: Iterable[Sequence[int]], lengths: Sequence[int], longest: int | None) -> Iterator[Sequence[int]]:
    """Split batches so that no row with more than ``longest`` tokens is padded.

    Args:
        batches: indices of the rows of each batch.
        lengths: length of each row, in tokens.
        longest: maximum length of a row that may be padded, see :func:`longest_padded`; ``None`` for any.

    Yields:
        The indices of the rows of a batch. Rows that may be padded stay together and come first, then longer rows, in
        ascending order of their lengths.

    Example:
        >>> list(unpadded([[0, 1, 2, 3]], [2, 9, 3, 9], longest=4)), list(unpadded([[0, 1]], [2, 9], longest=None))
        ([[0, 2], [1, 3]], [[0, 1]])
    """
    for batch in batches:
        groups: dict[int, list[int]] = {}
        for index in batch:
            groups.setdefault(0 if longest is None or lengths[index] <= longest else lengths[index], []).append(index)
        # a range stays one
        yield from (groups[length] for length in sorted(groups)) if len(groups) > 1 else (batch,)
