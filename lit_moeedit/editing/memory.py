"""The memory of past edits, which keeps later edits from undoing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_moeedit.checkpoint_fields import CheckpointError, field
from lit_moeedit.models.keys import RoutedKeys
from lit_moeedit.per_model import PerModel
from lit_moeedit.precision import full_precision
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.deltas import group_positions

SPANNED = 1e-2
"""Smallest singular value, relative to the largest, of a direction that a fact's keys span.

The sketch can oppose an edit of a fact only along directions in which the fact's keys are large. A direction below this
share has at most 1e-4 of their energy, so leaving it in the sketch costs next to nothing. It may be rounding, or noise
between contexts; removing it would erase what the sketch holds of other facts along it.
"""


@dataclass(frozen=True)
class GatedKeys:
    """Gated keys ``g_tj k_tj`` of the rows of one layer's problem, before they are shaped for preservation.

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
        """Multiply keys by their gates, with one row for each token."""
        return cls(keys.token, keys.expert, keys.gate.float()[:, None] * keys.key.float())

    def select(self, pairs: Tensor) -> GatedKeys:
        """Select pairs by a mask ``[N]``, and renumber their rows from 0 in the same order."""
        _, row = torch.unique(self.row[pairs], return_inverse=True)
        return GatedKeys(row, self.expert[pairs], self.key[pairs])

    def shift(self, rows: int) -> GatedKeys:
        """Add a number to all row indices."""
        return GatedKeys(self.row + rows, self.expert, self.key)


@dataclass(frozen=True)
class _Remembered:
    """The memory of one layer, on the CPU.

    Attributes:
        rows: the rows. The first ones are the sketch, with one expert each. Each of the others belongs to a fact.
        facts: the name of the fact of each row that belongs to one, in the order of the edits.
        tokens: number of each of these rows' edit token among those of its prompt.
        sketched: names of the facts that are in the sketch.
    """

    rows: GatedKeys
    facts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    sketched: frozenset[str] = frozenset()

    @property
    def sketch(self) -> Tensor:
        """Mask ``[N]`` of the pairs of the sketch."""
        return self.rows.row < self.first

    @property
    def first(self) -> int:
        """Index of the first row that belongs to a fact."""
        count = int(self.rows.row.max()) + 1 if len(self.rows.row) else 0
        return count - len(self.facts)

    @full_precision()
    def without(self, new: GatedKeys, facts: Sequence[str]) -> _Remembered:
        """Remove facts from the memory.

        Args:
            new: gated keys of the facts in the present edit.
            facts: the name of the fact of each row of ``new``.
        """
        key, in_sketch = self.rows.key, torch.tensor([fact in self.sketched for fact in facts])
        if bool(in_sketch.any()):
            # rows of the sketch belong to no single fact, so the span of the present keys is removed: afterwards the
            # experts' outputs for these keys may change
            key, in_sketch = key.clone(), in_sketch[new.row]
            for j, pairs in group_positions(new.expert[in_sketch]):
                own = self.sketch & (self.rows.expert == j)
                _, size, directions = torch.linalg.svd(new.key[in_sketch][pairs], full_matrices=False)
                # a strict comparison, because keys that are all zero span nothing
                basis = directions[size > SPANNED * size[0]]
                key[own] -= key[own] @ basis.T @ basis
        stay = [fact not in set(facts) for fact in self.facts]
        kept = torch.tensor([True] * self.first + stay)
        rows = GatedKeys(self.rows.row, self.rows.expert, key).select(kept[self.rows.row])
        left = tuple(compress(self.facts, stay)), tuple(compress(self.tokens, stay))
        return _Remembered(rows, *left, self.sketched - set(facts))

    def append(self, new: GatedKeys, facts: Sequence[str], tokens: Sequence[int]) -> _Remembered:
        """Append the rows of an edit, with the name of the fact of each row, and the number of its edit token."""
        rows = _concatenate([self.rows, new.shift(self.first + len(self.facts))])
        return _Remembered(rows, (*self.facts, *facts), (*self.tokens, *tokens), self.sketched)

    def renamed(self, names: Mapping[str, str]) -> _Remembered:
        """Replace names of facts."""
        facts, sketched = ([names.get(fact, fact) for fact in own] for own in (self.facts, self.sketched))
        return replace(self, facts=tuple(facts), sketched=frozenset(sketched))


class EditMemory:
    r"""Gated keys of past edits, which enter every later edit as rows with residual 0.

    An edit then minimises, over the new rows ``t`` and the remembered rows ``s``,

    .. math:: \sum_t \Big\| r_t - \sum_j \Delta W_j \varphi_{tj} \Big\|^2
              + w \sum_s \Big\| \sum_j \Delta W_j \varphi_{sj} \Big\|^2 + \lambda \sum_j \| \Delta W_j \|_F^2

    so that batch ``n`` does not undo batches 1 to ``n − 1``. The memory stores the gated keys ``g k`` of each edited
    layer. They are shaped again for each edit, because the preservation may change. Only the experts that an edit
    changes take part, which are those that its rows visit. Other experts could only compensate for what these do to
    past edits, and would cost a decomposition of their second moments and a commit. A
    :class:`~lit_moeedit.solvers.Tucker` changes all experts.

    **Carried core.** A carried core is solved for the keys of the highest layer, so only that layer has a memory. The
    effect of the core's shares at lower layers on past edits is not limited.

    **Compression.** A layer's memory holds at most ``limit`` keys (vectors of ``d_hidden`` elements, one per row and
    expert). A larger memory is compressed by singular vectors, that is, by eigenvectors of its second moment:

    1. The rows of one edit token of a fact (one for each context of the editor) become one row, their first singular
       vector in the joint space of all experts. With three contexts this loses next to nothing.
    2. If that is not enough, the newest facts keep half of the limit, and all older ones become a sketch: for each
       expert the largest singular vectors of its own keys, as many in total as there is room for. The sketch keeps the
       contribution of each expert to an output separately, where the rows keep the sum over experts. At equal size it
       is still far closer to the exact objective than singular vectors of the joint space, which are dense in all
       experts. With a quarter of the keys of 180 facts of the atlas, in the demo's first layer, the objective of the
       next edit is 1.4 times the exact one (10 times with joint vectors, 16 times without a memory).

    **Facts that are edited again**, by a renewal or to another target, are left out of the memory during that edit,
    because their rows would hold the old answer in place. Afterwards they are in it once, with their new keys. Facts
    are told apart by names; the editor names them by their prompts (:attr:`~lit_moeedit.data.Fact.prompt_key`). Rows of
    the sketch belong to no single fact. There, the span of the fact's *present* keys (see :data:`SPANNED`) is removed
    from the sketch of the experts that it visits.

    **Staleness.** The keys are those at the time of the edit. Training changes them, and so do later edits of lower
    layers, a little; the memory is not updated. Editing the past facts again (``renew_every_n_steps`` of
    :class:`~lit_moeedit.callbacks.KnowledgeEditing`) measures all keys again.

    **Several models.** What is remembered belongs to the model that was edited. An edit of another model begins with an
    empty memory, and does not change that of the first. A restored memory belongs to the model that is edited next. The
    memory is the same on all ranks. Without compression it does not depend on the order of the edits, up to rounding.

    Args:
        limit: maximum number of keys per layer. Each takes ``4 d_hidden`` bytes, here and in checkpoints. A vector of
            the sketch is a row of its own, so the system of an edit has up to this many more rows.
        weight: ``w``, the weight of past edits relative to new ones.

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
        self._layers: Mapping[int, _Remembered] = {}
        self._models: PerModel[Mapping[int, _Remembered]] = PerModel(dict)

    def switch(self, model: nn.Module | None) -> None:
        """Turn to what is remembered of a model; nothing, if it was not edited with this memory.

        Args:
            model: the model; ``None`` for an empty memory, which the model that comes next takes over.
        """
        self._layers = self._models.switch(model, self._layers)

    @property
    def model(self) -> nn.Module | None:
        """The model that is remembered now, while it exists."""
        return self._models.model

    def size(self, layer: int) -> tuple[int, int]:
        """Return the number of rows and the number of keys in the memory of a layer."""
        known = self._layers.get(layer)
        return (0, 0) if known is None else (known.first + len(known.facts), len(known.rows.row))

    def check(self, layer: int, d_hidden: int) -> None:
        """Raise ``ValueError`` if the memory of a layer holds keys of another width, those of another model."""
        known = self._layers.get(layer)
        if known is not None and known.rows.key.shape[1] != d_hidden:
            raise ValueError(
                f"the memory of layer {layer} holds keys of d_hidden={known.rows.key.shape[1]}, "
                f"the model has {d_hidden}: it was made with another model"
            )

    def extend(
        self,
        layer: int,
        rows: GatedKeys,
        residuals: Tensor,
        facts: Sequence[str],
        changed: Tensor | None = None,
    ) -> tuple[GatedKeys, Tensor]:
        """Append the memory's rows to those of an edit.

        Args:
            layer: index of the layer.
            rows: gated keys of the edit's ``T`` rows.
            residuals: ``[T, d_model]``.
            facts: the name of the fact of each row. Remembered keys of these facts are left out.
            changed: ``[n]`` int64, the experts that the edit changes; ``None`` for those that its rows visit.
                Remembered keys of other experts are left out.

        Returns:
            Gated keys of all rows, and their residuals.

        Raises:
            ValueError: if the memory was made with another model.
        """
        self.check(layer, rows.key.shape[1])
        known = self._layers.get(layer)
        if known is None:
            return rows, residuals
        new = _on_cpu(rows)
        past = known.without(new, facts).rows
        past = past.select(torch.isin(past.expert, new.expert if changed is None else changed.cpu()))
        count = int(past.row.max()) + 1 if len(past.row) else 0
        weighted = self.weight**0.5 * past.key.to(rows.key)
        past = GatedKeys(past.row.to(rows.row), past.expert.to(rows.expert), weighted).shift(len(residuals))
        return _concatenate([rows, past]), torch.cat([residuals, residuals.new_zeros(count, residuals.shape[1])])

    def remember(
        self,
        edit: Mapping[int, GatedKeys],
        facts: Sequence[str],
        ranks: Ranks | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Add an edit to the memory; on an exception the memory does not change.

        Args:
            edit: gated keys of the edit's rows, by layer.
            facts: the name of the fact of each row.
            ranks: the processes that edit together. Each calls this with the same rows.
            tokens: number of each row's edit token among those of its prompt; ``None`` if each prompt has one.
        """
        ranks = ranks or Ranks.current()
        layers, tokens = dict(self._layers), tokens or [0] * len(facts)
        for layer, rows in edit.items():
            new = _on_cpu(rows)
            known = self._layers.get(layer)
            known = _Remembered(new.select(new.row < 0)) if known is None else known.without(new, facts)
            layers[layer] = _compress(known.append(new, facts, tokens), self.limit)
        ranks.check_errors()
        for layer in edit:
            # the ranks' singular vectors may differ in the last bit
            ranks.broadcast(layers[layer].rows.row, layers[layer].rows.expert, layers[layer].rows.key)
        self._layers = layers

    @property
    def content(self) -> Mapping[int, _Remembered]:
        """The memory as it is now, for :meth:`restore`. It is shared, not copied, and never changes."""
        return self._layers

    def restore(self, content: Mapping[int, _Remembered]) -> None:
        """Return to an earlier :attr:`content`."""
        self._layers = content

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the remembered tensors and names of facts, by layer."""
        return {
            layer: {
                "row": known.rows.row,
                "expert": known.rows.expert,
                "key": known.rows.key,
                "facts": list(known.facts),
                "sketched": sorted(known.sketched),
            }
            # where each prompt has one edit token, an older version can read the state, too
            | ({"tokens": list(known.tokens)} if any(known.tokens) else {})
            for layer, known in self._layers.items()
        }

    def load_state_dict(self, state_dict: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore a state of :meth:`state_dict`; on an exception the memory does not change.

        Raises:
            ValueError: if this is not the state of a memory.
        """
        self._layers = {layer: _read(layer, state) for layer, state in state_dict.items()}

    def rename(self, facts: Mapping[str, str]) -> None:
        """Give facts new names, by old ones; states of earlier versions name them by their prompts and targets."""
        self._layers = {layer: known.renamed(facts) for layer, known in self._layers.items()}


def _read(layer: Any, state: Mapping[str, Any]) -> _Remembered:
    """Read and check one layer's part of a state, which may come from an untrusted checkpoint."""
    where = f"the memory of layer {layer!r} in the checkpoint"
    if not isinstance(layer, int) or not isinstance(state, Mapping):
        raise CheckpointError(f"{where} should be a dict by the layer's index, but is a {type(state).__name__}")
    row, expert, key = (field(where, state, name, Tensor) for name in ("row", "expert", "key"))
    facts, sketched = (field(where, state, name, list) for name in ("facts", "sketched"))
    tokens = field(where, {"tokens": [0] * len(facts)} | dict(state), "tokens", list)
    rows = _on_cpu(GatedKeys(row, expert, key))
    whole = row.dtype == expert.dtype == torch.long and key.is_floating_point() and bool(key.isfinite().all())
    if not whole or row.ndim != 1 or row.shape != expert.shape or key.ndim != 2 or len(key) != len(row):
        shapes = [(tuple(x.shape), str(x.dtype)) for x in (row, expert, key)]
        raise CheckpointError(
            f"{where} should hold row [N], expert [N] (int64) and finite key [N, d_hidden], got {shapes}"
        )
    indices = torch.unique(rows.row)
    if not torch.equal(indices, torch.arange(len(indices))) or len(facts) > len(indices) or bool((expert < 0).any()):
        raise CheckpointError(f"{where}: its rows should be numbered from 0, each of its {len(facts)} facts having one")
    if not all(isinstance(fact, str) for fact in (*facts, *sketched)):
        raise CheckpointError(f"{where}: 'facts' and 'sketched' should hold keys of facts")
    if len(tokens) != len(facts) or not all(type(token) is int and token >= 0 for token in tokens):
        raise CheckpointError(f"{where}: 'tokens' should hold the number of an edit token for each of its facts' rows")
    return _Remembered(rows, tuple(facts), tuple(tokens), frozenset(sketched))


def _on_cpu(rows: GatedKeys) -> GatedKeys:
    return GatedKeys(rows.row.cpu(), rows.expert.cpu(), rows.key.cpu())


def _compress(known: _Remembered, limit: int) -> _Remembered:
    """Compress a memory to at most ``limit`` keys; see :class:`EditMemory`."""
    if len(known.rows.row) > limit:
        known = _merge_contexts(known)
    if len(known.rows.row) > limit:
        known = _sketch_oldest(known, limit)
    return known


def _merge_contexts(known: _Remembered) -> _Remembered:
    """Merge the rows of each fact's edit token into their first singular vector, over all experts that they visit."""
    rows, sketch, places = known.rows, known.sketch, [*zip(known.facts, known.tokens, strict=True)]
    number = {place: i for i, place in enumerate(dict.fromkeys(places))}
    # -1 for rows of the sketch, which stay as they are
    owner = torch.tensor([-1] * known.first + [number[place] for place in places], dtype=torch.long)
    parts = [rows.select(sketch)]
    for i, pairs in group_positions(owner[rows.row]):
        if i < 0:
            continue
        own = rows.select(pairs)
        if bool(own.row.any()):
            experts, column = torch.unique(own.expert, return_inverse=True)
            matrix = own.key.new_zeros(int(own.row.max()) + 1, len(experts), own.key.shape[1])
            matrix[own.row, column] = own.key
            _, size, vectors = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
            own = GatedKeys(torch.zeros_like(experts), experts, (size[0] * vectors[0]).view(len(experts), -1))
        parts.append(own.shift(known.first + i))
    facts, tokens = zip(*number, strict=True) if number else ((), ())
    return _Remembered(_concatenate(parts), facts, tokens, known.sketched)


def _sketch_oldest(known: _Remembered, limit: int) -> _Remembered:
    """Keep the newest facts in half of ``limit``; reduce all others to the largest singular vectors of each expert."""
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
    joined = _concatenate([part, rows.select(new).shift(len(largest))])
    sketched = known.sketched | set(known.facts[:oldest])
    return _Remembered(joined, known.facts[oldest:], known.tokens[oldest:], sketched)


def _concatenate(parts: Sequence[GatedKeys]) -> GatedKeys:
    return GatedKeys(*(torch.cat([getattr(part, name) for part in parts]) for name in ("row", "expert", "key")))
