"""The memory of past edits: what a later edit must not undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, field
from lit_moeedit.models.keys import RoutedKeys
from lit_moeedit.precision import full_precision
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.deltas import group_positions

SPANNED = 1e-2
"""A direction counts as spanned by a fact's keys if its singular value has at least this share of the largest.

The sketch can hold back what a fact asks for only by directions in which its keys are large. One below this share has
1e-4 of their energy at most: to leave it in costs next to nothing, to take it out, where it may be rounding or the
noise between contexts, would wipe what other facts have there.
"""


@dataclass(frozen=True)
class GatedKeys:
    """Gated keys ``g_tj k_tj`` of the rows of one layer's problem, not yet shaped by what is to be preserved.

    Attributes:
        row: ``[N]`` int64, the row of each (row, expert) pair.
        expert: ``[N]`` int64.
        key: ``[N, d_hidden]``, at least float32.
    """

    row: Tensor
    expert: Tensor
    key: Tensor

    @classmethod
    def of(cls, keys: RoutedKeys) -> Self:
        """Keys times gates; a row for each token."""
        return cls(keys.token, keys.expert, keys.gate.float()[:, None] * keys.key.float())

    def select(self, pairs: Tensor) -> GatedKeys:
        """Some pairs (``pairs [N]`` bool), their rows numbered anew from 0 in the same order."""
        _, row = torch.unique(self.row[pairs], return_inverse=True)
        return GatedKeys(row, self.expert[pairs], self.key[pairs])


@dataclass(frozen=True)
class _Remembered:
    """The memory of one layer, on the CPU.

    Attributes:
        rows: its rows; the first ones are the sketch, with one expert each, the others belong to a fact.
        facts: for each row that belongs to a fact, its key; in the order of the edits.
        sketched: keys of the facts that went into the sketch.
    """

    rows: GatedKeys
    facts: tuple[str, ...] = ()
    sketched: frozenset[str] = frozenset()

    @property
    def sketch(self) -> Tensor:
        """``[N]`` bool, the pairs of the sketch."""
        return self.rows.row < self.first

    @property
    def first(self) -> int:
        """Number of the first row that belongs to a fact."""
        count = int(self.rows.row.max()) + 1 if len(self.rows.row) else 0
        return count - len(self.facts)

    @full_precision()
    def without(self, now: GatedKeys, facts: Sequence[str]) -> _Remembered:
        """The memory less what it holds of ``facts`` (one for each row), whose gated keys are ``now``."""
        key, again = self.rows.key, torch.tensor([fact in self.sketched for fact in facts])
        if bool(again.any()):
            # their rows cannot be told apart any more, but what they are now can: behind this, an expert's output for
            # them may change
            key, again = key.clone(), again[now.row]
            for j, pairs in group_positions(now.expert[again]):
                held = self.sketch & (self.rows.expert == j)
                _, size, directions = torch.linalg.svd(now.key[again][pairs], full_matrices=False)
                # strictly: keys that are all zero span nothing
                basis = directions[size > SPANNED * size[0]]
                key[held] -= key[held] @ basis.T @ basis
        gone = set(facts)
        stays = torch.tensor([True] * self.first + [fact not in gone for fact in self.facts])
        rows = GatedKeys(self.rows.row, self.rows.expert, key).select(stays[self.rows.row])
        return _Remembered(rows, tuple(fact for fact in self.facts if fact not in gone), self.sketched - gone)

    def and_then(self, new: GatedKeys, facts: Sequence[str]) -> _Remembered:
        """The memory with rows of an edit behind its own; ``facts`` says whose each row is."""
        first = self.first + len(self.facts)
        row = torch.cat([self.rows.row, new.row + first])
        rows = GatedKeys(row, torch.cat([self.rows.expert, new.expert]), torch.cat([self.rows.key, new.key]))
        return _Remembered(rows, (*self.facts, *facts), self.sketched)


class EditMemory:
    r"""The features of past edits, which enter every later edit as rows with residual 0.

    An edit then minimises, over the new rows ``t`` and the remembered rows ``s``,

    .. math:: \sum_t \Big\| r_t - \sum_j \Delta W_j \varphi_{tj} \Big\|^2
              + w \sum_s \Big\| \sum_j \Delta W_j \varphi_{sj} \Big\|^2 + \lambda \sum_j \| \Delta W_j \|_F^2

    so that batch ``n`` leaves alone what batches 1 to ``n − 1`` wrote. Kept are the gated keys ``g k`` of each edited
    layer, and shaped anew for each edit, since what is to be preserved may change. Only experts that the edit changes
    count. These are those that its rows visit: another expert could only make up for what they do to past edits, and
    would cost its second moment's decomposition and a commit. A :class:`~lit_moeedit.solvers.Tucker` changes all.

    **A carried core** is solved for the keys of the highest layer, so there is a memory of that layer only. What its
    shares at the lower layers do to past edits is not held back.

    **Bounded.** A layer's memory holds at most ``limit`` keys (vectors of ``d_hidden`` numbers, one per row and
    expert). Beyond that it is compressed by singular vectors, that is, by the eigenvectors of its second moment:

    1. The rows of one fact (one for each context of the editor) become one row, their first singular vector in the
       joint space of all experts. Of three contexts next to nothing is lost.
    2. If that is not enough, the newest facts keep half of the limit, and all older ones become a sketch: per expert
       the largest singular vectors of its own keys, as many in all as there is room. Between experts the sketch knows
       no sums: it holds each expert's part of an output where the rows held their sum. At equal bytes it is still far
       closer to the exact objective than singular vectors of the joint space, which are dense in all experts: with a
       quarter of the keys of 180 facts of the atlas, in the demo's first layer, the objective of the next edit is
       1.4 times the exact one (10 times with joint ones, 16 times without a memory).

    **Facts that are edited again** (a renewal, say) are left out of the memory for that edit and are in it once
    afterwards, with their new features. Rows in the sketch belong to nobody any more; there, what the fact's keys
    span *now* (see :data:`SPANNED`) is taken out of the sketch of the experts that it visits.

    **Staleness.** The keys are those of the moment of the edit. Training changes them, later edits of lower layers do a
    little, and the memory does not see it. Editing the past facts again (``renew_every_n_steps`` of
    :class:`~lit_moeedit.callbacks.KnowledgeEditing`) measures all of them anew.

    The memory is deterministic and the same on all ranks. Without compression it does not depend on the order of the
    edits, to rounding.

    Args:
        limit: most keys per layer; each takes ``4 d_hidden`` bytes, here and in checkpoints. A vector of the sketch is
            a row of its own, so the system of an edit has up to this many more rows.
        weight: ``w``, how much past edits count against new ones.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> memory = EditMemory(limit=8192)
        >>> edit = GatedKeys(torch.tensor([0, 0]), torch.tensor([1, 3]), torch.eye(2))
        >>> memory.remember({5: edit}, ["a fact"])
        >>> rows, residuals = memory.extend(5, edit, torch.ones(1, 2), ["another fact"])
        >>> rows.row.tolist(), rows.expert.tolist(), residuals.tolist()
        ([0, 0, 1, 1], [1, 3, 1, 3], [[1.0, 1.0], [0.0, 0.0]])
    """

    def __init__(self, limit: int = 8192, weight: float = 1.0) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight must be positive, got {weight}")
        self.limit, self.weight = limit, weight
        self._layers: dict[int, _Remembered] = {}

    def size(self, layer: int) -> tuple[int, int]:
        """Rows and keys that the memory holds of a layer."""
        known = self._layers.get(layer)
        return (0, 0) if known is None else (known.first + len(known.facts), len(known.rows.row))

    def extend(
        self,
        layer: int,
        rows: GatedKeys,
        residuals: Tensor,
        facts: Sequence[str],
        changed: Tensor | None = None,
    ) -> tuple[GatedKeys, Tensor]:
        """Put the memory's rows behind those of an edit.

        Args:
            layer: index of the layer.
            rows: gated keys of the edit's ``T`` rows.
            residuals: ``[T, d_model]``.
            facts: for each row the key of its fact; what is remembered of these facts is left out.
            changed: ``[n]`` int64, the experts that the edit changes; ``None`` for those that its rows visit. What is
                remembered of others is left out.

        Returns:
            gated keys of all rows, and their residuals.

        Raises:
            ValueError: if the memory is one of another model.
        """
        known = self._layers.get(layer)
        if known is None:
            return rows, residuals
        if known.rows.key.shape[1] != rows.key.shape[1]:
            raise ValueError(
                f"the memory of layer {layer} holds keys of d_hidden={known.rows.key.shape[1]}, "
                f"the model has {rows.key.shape[1]}: it was made with another model"
            )
        now = _on_cpu(rows)
        past = known.without(now, facts).rows
        past = past.select(torch.isin(past.expert, now.expert if changed is None else changed.cpu()))
        count = int(past.row.max()) + 1 if len(past.row) else 0
        joined = GatedKeys(
            torch.cat([rows.row, past.row.to(rows.row.device) + len(residuals)]),
            torch.cat([rows.expert, past.expert.to(rows.expert.device)]),
            torch.cat([rows.key, self.weight**0.5 * past.key.to(rows.key)]),
        )
        return joined, torch.cat([residuals, residuals.new_zeros(count, residuals.shape[1])])

    def remember(self, edit: Mapping[int, GatedKeys], facts: Sequence[str], ranks: Ranks | None = None) -> None:
        """Remember an edit; on an exception the memory is what it was.

        Args:
            edit: gated keys of its rows, by layer.
            facts: for each row the key of its fact.
            ranks: the processes that edit together; each calls this with the same rows.
        """
        ranks = ranks if ranks is not None else Ranks()
        layers = dict(self._layers)
        for layer, rows in edit.items():
            new = _on_cpu(rows)
            known = self._layers.get(layer)
            known = _Remembered(new.select(new.row < 0)) if known is None else known.without(new, facts)
            layers[layer] = _compress(known.and_then(new, facts), self.limit)
        ranks.check_errors()
        for layer in edit:
            # singular vectors that are computed twice may differ in the last bit
            ranks.broadcast(layers[layer].rows.row, layers[layer].rows.expert, layers[layer].rows.key)
        self._layers = layers

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What is remembered: tensors and texts, by layer."""
        return {
            layer: {
                "row": known.rows.row,
                "expert": known.rows.expert,
                "key": known.rows.key,
                "facts": list(known.facts),
                "sketched": sorted(known.sketched),
            }
            for layer, known in self._layers.items()
        }

    def load_state_dict(self, state_dict: Mapping[int, Mapping[str, Any]]) -> None:
        """The inverse of :meth:`state_dict`; on an exception the memory is what it was.

        Raises:
            ValueError: if this is not the state of a memory.
        """
        self._layers = {layer: _read(layer, state) for layer, state in state_dict.items()}


def _read(layer: Any, state: Mapping[str, Any]) -> _Remembered:
    """One layer's part of a state, checked: it may come from anybody's checkpoint."""
    where = f"the memory of layer {layer!r} in the checkpoint"
    if not isinstance(layer, int) or not isinstance(state, Mapping):
        raise CheckpointError(f"{where} should be a dict by the layer's index, but is a {type(state).__name__}")
    row, expert, key = (field(where, state, name, Tensor) for name in ("row", "expert", "key"))
    facts, sketched = (field(where, state, name, list) for name in ("facts", "sketched"))
    rows = _on_cpu(GatedKeys(row, expert, key))
    whole = row.dtype == expert.dtype == torch.long and key.is_floating_point() and bool(key.isfinite().all())
    if not whole or row.ndim != 1 or row.shape != expert.shape or key.ndim != 2 or len(key) != len(row):
        shapes = [(tuple(x.shape), str(x.dtype)) for x in (row, expert, key)]
        raise CheckpointError(
            f"{where} should hold row [N], expert [N] (int64) and finite key [N, d_hidden], got {shapes}"
        )
    numbers = torch.unique(rows.row)
    if not torch.equal(numbers, torch.arange(len(numbers))) or len(facts) > len(numbers) or bool((expert < 0).any()):
        raise CheckpointError(f"{where}: its rows should be numbered from 0, each of its {len(facts)} facts having one")
    if not all(isinstance(fact, str) for fact in (*facts, *sketched)):
        raise CheckpointError(f"{where}: 'facts' and 'sketched' should hold keys of facts")
    return _Remembered(rows, tuple(facts), frozenset(sketched))


def _on_cpu(rows: GatedKeys) -> GatedKeys:
    return GatedKeys(rows.row.cpu(), rows.expert.cpu(), rows.key.cpu())


def _compress(known: _Remembered, limit: int) -> _Remembered:
    """At most ``limit`` keys; see :class:`EditMemory`."""
    if len(known.rows.row) > limit:
        known = _merge_facts(known)
    if len(known.rows.row) > limit:
        known = _sketch_oldest(known, limit)
    return known


def _merge_facts(known: _Remembered) -> _Remembered:
    """One row for each fact: the first singular vector of its rows, over all experts that they visit."""
    rows, sketch = known.rows, known.sketch
    facts = {fact: number for number, fact in enumerate(dict.fromkeys(known.facts))}
    number = torch.tensor([facts[fact] for fact in known.facts], dtype=torch.long)
    # a number for each row; those of the sketch stay as they are
    number = torch.cat([torch.full((known.first,), -1), number])
    parts = [rows.select(sketch)]
    for i, pairs in group_positions(number[rows.row]):
        if i < 0:
            continue
        own = rows.select(pairs)
        if bool(own.row.any()):
            experts, column = torch.unique(own.expert, return_inverse=True)
            matrix = own.key.new_zeros(int(own.row.max()) + 1, len(experts), own.key.shape[1])
            matrix[own.row, column] = own.key
            _, size, vectors = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
            own = GatedKeys(torch.zeros_like(experts), experts, (size[0] * vectors[0]).view(len(experts), -1))
        parts.append(GatedKeys(own.row + known.first + i, own.expert, own.key))
    return _Remembered(_concatenate(parts), tuple(facts), known.sketched)


def _sketch_oldest(known: _Remembered, limit: int) -> _Remembered:
    """The newest facts as they are in half of ``limit``, all else as the largest singular vectors of each expert."""
    rows = known.rows
    sizes = torch.bincount(rows.row, minlength=known.first + len(known.facts))[known.first :]
    kept = int((sizes.flip(0).cumsum(0) <= limit // 2).sum())
    oldest = len(known.facts) - kept
    new = rows.row >= known.first + oldest
    vectors, experts = [], []
    for j, pairs in group_positions(rows.expert[~new]):
        _, size, directions = torch.linalg.svd(rows.key[~new][pairs], full_matrices=False)
        vectors.append(size[:, None] * directions)
        experts.append(torch.full((len(size),), j))
    sketch, expert = torch.cat(vectors), torch.cat(experts)
    largest = torch.argsort(sketch.norm(dim=1), descending=True, stable=True)[: limit - int(new.sum())].sort().values
    part = GatedKeys(torch.arange(len(largest)), expert[largest], sketch[largest])
    newest = rows.select(new)
    joined = _concatenate([part, GatedKeys(newest.row + len(largest), newest.expert, newest.key)])
    return _Remembered(joined, known.facts[oldest:], known.sketched | set(known.facts[:oldest]))


def _concatenate(parts: Sequence[GatedKeys]) -> GatedKeys:
    return GatedKeys(*(torch.cat([getattr(part, name) for part in parts]) for name in ("row", "expert", "key")))
