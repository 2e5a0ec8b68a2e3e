"""Second moments of an edit, kept for its renewals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from transformers import PreTrainedModel

from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, sums_device
from lit_moeedit.sharding.ranks import Ranks

KEPT_FILES, KEPT_EDITS = 32, 4
"""Number of files, and of the latest edits with all of their layers, that a run's folder keeps; the larger counts."""


@dataclass(frozen=True)
class KeptMoments:
    """Second moments of all experts that an edit has used, on disk, ``E · d_hidden² · 4`` bytes for each layer.

    Attributes:
        keys: their keys in a :class:`~lit_moeedit.preservation.MomentsCache`, by layer index.
        folder: path of its folder.
    """

    keys: dict[int, str] = field(default_factory=dict)
    folder: str = ""

    @classmethod
    def of(
        cls, moments: Mapping[int, SecondMoments], cache: MomentsCache | None, folder: str, ranks: Ranks
    ) -> KeptMoments:
        """Keep moments. Every rank calls this.

        Args:
            moments: the moments by layer index.
            cache: the cache in which they are already, if there is one.
            folder: path of a folder for them if there is none.
            ranks: the processes that edit together.
        """
        keys = {index: found.key for index, found in moments.items() if found.key is not None}
        if cache is not None and len(keys) == len(moments) <= cache.keep:
            return cls(keys, str(cache.folder))
        # those of some edits, because other callbacks keep theirs in the same folder
        cache, keys = MomentsCache(folder, keep=max(KEPT_FILES, KEPT_EDITS * len(moments))), {}
        for index, found in moments.items():
            keys[index] = _digest(found, ranks)
            cache.save(keys[index], found.tensors(), ranks, found.parts())
        return cls(keys, folder)

    def load(
        self, model: PreTrainedModel, layers: Sequence[ExpertLayer], gated: bool, ranks: Ranks
    ) -> dict[int, SecondMoments] | None:
        """Return the moments of layers, on the device on which an edit computes them. Every rank calls this.

        Args:
            model: the model.
            layers: the layers.
            gated: whether the moments are those of gated keys.
            ranks: the processes that edit together.

        Returns:
            The moments by layer index; ``None`` if those of a layer are not there.
        """
        if any(layer.index not in self.keys for layer in layers):
            return None
        device, cache = sums_device(model, layers, ranks), MomentsCache(self.folder)
        found = {layer.index: SecondMoments.zeros(layer, device, gated) for layer in layers}
        for index, moments in found.items():
            if not cache.load(self.keys[index], moments.tensors(), ranks, moments.parts()):
                return None
        return found


def _digest(moments: SecondMoments, ranks: Ranks) -> str:
    digest = sha256()
    for tensor in moments.tensors().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    if moments.part.owners == 1:  # the ranks' sums are the same
        return digest.hexdigest()
    ranks.check_errors()
    of_all = ranks.all_gather(torch.tensor(list(digest.digest()), dtype=torch.uint8))
    return sha256(bytes(of_all.tolist())).hexdigest()
