"""Batches of experts with similar numbers of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lit_moeedit.solvers.problem import EditProblem

BUDGET = 2**21
"""Maximum number of elements in a batch of several experts; a larger expert is a batch of its own."""


@dataclass(frozen=True)
class ExpertBatch:
    """Pairs of ``B`` experts, padded to the ``M`` of the one with the most.

    Attributes:
        members: ``B`` positions of the experts in ``problem.experts()``.
        pairs: ``[B, M]`` positions of the pairs in the problem; any position where ``valid`` is false.
        edits: ``[B, M]`` the edits of these pairs.
        valid: ``[B, M]``, or ``None`` if nothing is padded.
    """

    members: Sequence[int]
    pairs: Tensor
    edits: Tensor
    valid: Tensor | None

    def features(self, problem: EditProblem, dtype: torch.dtype) -> Tensor:
        """Return the features ``[B, M, d_hidden]``, zero where padded."""
        features = problem.features.index_select(0, self.pairs.flatten()).view(*self.pairs.shape, -1).to(dtype)
        return features if self.valid is None else features.mul_(self.valid[..., None])

    def part(self, rows: list[int]) -> ExpertBatch:
        """Return some of the experts, with the same padding."""
        index = torch.tensor(rows, device=self.pairs.device)
        valid = None if self.valid is None else self.valid[index]
        return ExpertBatch([self.members[row] for row in rows], self.pairs[index], self.edits[index], valid)


def expert_batches(problem: EditProblem) -> Iterator[ExpertBatch]:
    """Yield all visited experts in batches, those with most pairs first, padded by at most a quarter.

    Where few edits visit an expert, a step of Python costs more than its products.
    """
    groups = [pairs for _, pairs in problem.experts()]
    for members in similar([len(pairs) for pairs in groups], problem.features.shape[1], BUDGET):
        chosen = [groups[member] for member in members]
        longest = len(chosen[0])
        if len(chosen[-1]) == longest:
            pairs, valid = torch.stack(chosen), None
        else:
            # one copy and an index: on a GPU pad_sequence starts a kernel for each expert
            sizes = [len(pairs) for pairs in chosen]
            ends = torch.tensor([sizes, list(accumulate(sizes))], device=chosen[0].device)[:, :, None]
            places = torch.arange(longest, device=ends.device)
            valid = places < ends[0]
            pairs = torch.cat(chosen)[torch.where(valid, ends[1] - ends[0] + places, 0)]
        yield ExpertBatch(members, pairs, problem.edit_index[pairs], valid)


def similar(lengths: Sequence[int], width: int, budget: int, least_share: float = 0.8) -> Iterator[list[int]]:
    """Yield batches of indices of rows of similar lengths, the longest first.

    Args:
        lengths: lengths of the rows, positive.
        width: elements of each entry; a row of length ``n`` counts as ``n · max(n, width)`` elements.
        budget: maximum number of elements in a batch of several rows, padded to the longest.
        least_share: least length of a row as a share of the longest in its batch.

    Example:
        >>> list(similar([9, 1, 10, 5], width=1, budget=1000))
        [[2, 0], [3], [1]]
        >>> list(similar([9, 1, 10, 5], width=1, budget=1000, least_share=0.5))
        [[2, 0, 3], [1]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        most = max(1, budget // (longest * max(longest, width)))
        stop = start + 1
        while stop < min(len(order), start + most) and lengths[order[stop]] >= least_share * longest:
            stop += 1
        yield order[start:stop]
        start = stop
