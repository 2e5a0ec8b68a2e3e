"""Generated text: whether it is, or has in it, the right answer, and how fluent it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_moeedit.metrics._means import Means, means

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, Japanese and Chinese letters: no space separates their words."""
_TOKEN = re.compile(r"\w+|[^\w\s]")
FLUENCY_WEIGHTS = {2: 1 / 3, 3: 2 / 3}
"""Weights of the entropies of n-grams: those of MEMIT (2/3 and 4/3, of which it takes the mean), divided by 2."""


def _generation_match_update(generated: Sequence[str], targets: Sequence[str]) -> Tensor:
    """Compare texts with targets.

    Args:
        generated: N texts.
        targets: N texts.

    Returns:
        ``[2, N]`` bool: the text is the target; the target is in the text, as whole words.

    Raises:
        ValueError: As :func:`generation_match`.

    """
    if isinstance(generated, str) or isinstance(targets, str) or len(generated) != len(targets):
        kinds = ", ".join(repr(x) if isinstance(x, str) else f"{len(x)} texts" for x in (generated, targets))
        raise ValueError(f"Expected `generated` and `targets` to be sequences of the same length, got {kinds}.")
    if not all(target.strip() for target in targets):
        raise ValueError("Expected `targets` to hold no empty text, got one.")
    pairs = [(_stripped(text), _stripped(target)) for text, target in zip(generated, targets, strict=True)]
    return torch.tensor(
        [[text == target for text, target in pairs], [_contains(text, target) for text, target in pairs]],
        dtype=torch.bool,
    )


def _generation_match_compute(matches: Tensor, prompts: Tensor) -> dict[str, Tensor]:
    """Turn numbers of matches ``[2]`` and the numbers of texts ``[2]`` into shares, NaN without a text."""
    return means(GenerationMatch.names, matches, prompts)


def generation_match(generated: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    r"""Compute the shares of texts that are their target, and that have it in them.

    .. math::

        \text{exact} = \frac1N \sum_i [g_i = y_i] \qquad \text{contained} = \frac1N \sum_i [y_i \subseteq g_i]

    White space around a text and a full stop at its end do not count. The target is contained if it stands in the text
    as whole words: no letter or digit continues it on either side, except in scripts that do not separate words.

    Args:
        generated: N texts, each up to a natural stop, see :func:`lit_moeedit.editing.answers`.
        targets: N texts, none of them empty.

    Returns:
        ``generation_exact`` and ``generation_contained``, scalars in [0, 1], NaN without a text.

    Raises:
        ValueError: If the arguments are not of the same length, or a target is empty.

    Example:
        >>> from lit_moeedit.metrics import generation_match
        >>> generation_match(["Rome.", "the old town of Rome", "Romelia", "Oslo"], ["Rome"] * 4)
        {'generation_exact': tensor(0.2500), 'generation_contained': tensor(0.5000)}

    """
    matches = _generation_match_update(generated, targets)
    return _generation_match_compute(matches.sum(1), torch.full((2,), matches.shape[1]))


class GenerationMatch(Means):
    """Shares of generated texts that are their target, or have it in them; see :func:`generation_match`.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from lit_moeedit.metrics import GenerationMatch
        >>> metric = GenerationMatch()
        >>> metric.update(["Rome", "in Rome"], ["Rome", "Rome"])
        >>> metric.compute()
        {'generation_exact': tensor(0.5000), 'generation_contained': tensor(1.)}

    """

    names = ("generation_exact", "generation_contained")
    unit = "share of prompts"

    def update(self, generated: Sequence[str], targets: Sequence[str]) -> None:
        """Add texts; arguments and errors are those of :func:`generation_match`."""
        matches = _generation_match_update(generated, targets)
        self.add(matches.sum(1), torch.full((2,), matches.shape[1]))


def _ngram_entropy_update(texts: Sequence[str]) -> Tensor:
    """Return the weighted entropy of the n-grams of each text, ``[N]`` float64, in bits."""
    if isinstance(texts, str):
        raise ValueError(f"Expected `texts` to be a sequence of texts, got {texts!r}.")
    return torch.tensor([_entropy(_TOKEN.findall(text)) for text in texts], dtype=torch.float64)


def _ngram_entropy_compute(total: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Turn a sum ``[1]`` over texts, and their number ``[1]``, into the mean."""
    return means(Fluency.names, total, texts)


def ngram_entropy(texts: Sequence[str]) -> dict[str, Tensor]:
    r"""Compute the fluency of texts as MEMIT does (arXiv 2210.07229, after ROME and Zhang et al., 2018).

    .. math::

        \text{fluency} = -\frac1N \sum_i \left( \tfrac13 \sum_k f_{2,i}(k) \log_2 f_{2,i}(k)
        + \tfrac23 \sum_k f_{3,i}(k) \log_2 f_{3,i}(k) \right)

    where :math:`f_{n,i}(k)` is the share of the n-gram :math:`k` among those of text i. A text that repeats itself has
    a low entropy. Words and single punctuation marks are the tokens; MEMIT takes those of NLTK, which splits
    contractions, too. A text too short for an n-gram has no entropy (0) for that n.

    Args:
        texts: N texts. Their length bounds the entropy: compare texts of the same maximum number of tokens only.

    Returns:
        ``fluency``, a scalar ≥ 0 in bits, NaN without a text.

    Raises:
        ValueError: If ``texts`` is a single text.

    Example:
        >>> from lit_moeedit.metrics import ngram_entropy
        >>> ngram_entropy(["a b c d e"])["fluency"], ngram_entropy(["a a a a a"])["fluency"]
        (tensor(1.7233), tensor(0.))

    """
    found = _ngram_entropy_update(texts)
    return _ngram_entropy_compute(found.sum()[None], torch.tensor([len(found)]))


class Fluency(Means):
    """Weighted entropy of bigrams and trigrams of generated texts, in bits; see :func:`ngram_entropy`.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from lit_moeedit.metrics import Fluency
        >>> metric = Fluency()
        >>> metric.update(["a b c d e", "a a a a a"])
        >>> metric.compute()
        {'fluency': tensor(0.8617)}

    """

    higher_is_better = None  # up to that of the unedited model
    plot_upper_bound = None
    names = ("fluency",)
    unit = "entropy of n-grams (bits)"

    def update(self, texts: Sequence[str]) -> None:
        """Add texts; arguments and errors are those of :func:`ngram_entropy`."""
        found = _ngram_entropy_update(texts)
        self.add(found.sum()[None], torch.tensor([len(found)]))


def _stripped(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _contains(text: str, target: str) -> bool:
    before, after = (f"[^\\W{_UNSPACED}]" if edge.isalnum() else "(?!)" for edge in (target[0], target[-1]))
    return re.search(rf"(?<!{before}){re.escape(target)}(?!{after})", text) is not None


def _entropy(tokens: Sequence[str]) -> float:
    total = 0.0
    for n, weight in FLUENCY_WEIGHTS.items():
        counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
        shares = torch.tensor(list(counts.values()), dtype=torch.float64) / counts.total()
        total -= weight * float((shares * shares.log2()).sum())
    return max(0.0, total)  # and not −0.0
