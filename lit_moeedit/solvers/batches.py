"""Experts with about equally many pairs, side by side in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moeedit.solvers.problem import EditProblem

BUDGET = 2**21
"""Numbers that a batch of several experts may hold; a larger expert is a batch of its own."""


@dataclass(frozen=True)
class ExpertBatch:
    """Pairs of ``B`` experts, padded to the ``M`` of the one with the most.

    Attributes:
        pairs: ``[B, M]`` positions of the pairs in the problem; any position where ``valid`` is false.
        edits: ``[B, M]`` the edits of these pairs.
        valid: ``[B, M]``, or ``None`` if nothing is padded.
    """

    pairs: Tensor
    edits: Tensor
    valid: Tensor | None

    def features(self, problem: EditProblem, dtype: torch.dtype) -> Tensor:
        """Features ``[B, M, d_hidden]``, zero where padded."""
        features = problem.features.index_select(0, self.pairs.flatten()).view(*self.pairs.shape, -1).to(dtype)
        return features if self.valid is None else features.mul_(self.valid[..., None])


def expert_batches(problem: EditProblem) -> Iterator[ExpertBatch]:
    """All visited experts, those with most pairs first; padding makes no batch more than a quarter longer.

    A Python step per expert costs more than the products of experts that few edits visit: they go together.
    """
    groups = sorted((pairs for _, pairs in problem.experts()), key=len, reverse=True)
    start = 0
    while start < len(groups):
        longest = len(groups[start])
        most = max(1, BUDGET // (longest * max(longest, problem.features.shape[1])))
        stop = start + 1
        while stop < min(len(groups), start + most) and 5 * len(groups[stop]) >= 4 * longest:
            stop += 1
        chosen = groups[start:stop]
        start = stop
        if len(chosen[-1]) == longest:
            pairs, valid = torch.stack(chosen), None
        else:
            counts = torch.tensor([len(pairs) for pairs in chosen], device=chosen[0].device)
            pairs = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            valid = torch.arange(longest, device=counts.device) < counts[:, None]
        yield ExpertBatch(pairs, problem.edit_index[pairs], valid)
