"""Second moments of an edit, kept for its renewals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, sums_device
from lit_moeedit.sharding.ranks import Ranks


@dataclass(frozen=True)
class KeptMoments:
    """Second moments that an edit has used: in the editor's cache if it has one, else in main memory.

    In main memory the first rank alone holds them, ``E · d_hidden² · 4`` bytes for each layer. They are not part of a
    checkpoint; their keys in the cache are.

    Attributes:
        keys: keys in the cache, by layer index.
        held: the moments that are in no cache, by layer index; empty on all ranks but the first.
    """

    keys: dict[int, str] = field(default_factory=dict)
    held: Mapping[int, SecondMoments] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, moments: Mapping[int, SecondMoments], ranks: Ranks) -> KeptMoments:
        """Keep moments."""
        keys = {index: found.key for index, found in moments.items() if found.key is not None}
        if len(keys) == len(moments):
            return cls(keys)
        return cls({}, {index: _to(found, "cpu") for index, found in moments.items()} if ranks.rank == 0 else {})

    def load(
        self,
        model: PreTrainedModel,
        layers: Sequence[ExpertLayer],
        cache: MomentsCache | None,
        gated: bool,
        ranks: Ranks,
    ) -> dict[int, SecondMoments] | None:
        """Return the moments of layers on the device on which an edit computes them. Every rank calls this.

        Args:
            model: the model.
            layers: the layers.
            cache: the editor's cache.
            gated: whether the moments are those of gated keys.
            ranks: the processes that edit together.

        Returns:
            The moments by layer index; ``None`` if those of a layer are neither here nor in the cache.
        """
        is_here = ranks.any(ranks.rank == 0 and all(layer.index in self.held for layer in layers))
        if not is_here and (cache is None or any(layer.index not in self.keys for layer in layers)):
            return None
        device, found = sums_device(model, layers, ranks), {}
        for layer in layers:
            if is_here and ranks.rank == 0:
                own = _to(self.held[layer.index], str(device or layer.down_proj.device))
            else:
                own = SecondMoments.zeros(layer, device, gated)
            if is_here:
                ranks.broadcast(*own.tensors().values())
            elif cache is None or not cache.load(self.keys[layer.index], own.tensors(), ranks):
                return None
            found[layer.index] = own if is_here else replace(own, key=self.keys[layer.index])
        return found


def _to(moments: SecondMoments, device: str) -> SecondMoments:
    """Move moments to a device; those that are there already are not copied."""
    total, count, tokens = (tensor.to(device) for tensor in moments.tensors().values())
    return replace(moments, total=total, count=count, tokens=tokens)
