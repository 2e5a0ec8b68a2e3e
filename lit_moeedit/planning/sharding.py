"""Sharding of a model over the ranks, as a plan describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Send = Callable[[int], None]
"""Called with the bytes that a rank sends."""


@dataclass(frozen=True)
class Sharding:
    """Sharding of weights, gradients and the optimizer's state over the ranks.

    Attributes:
        ranks: number of processes.
        stage: stage of DeepSpeed ZeRO; ``None`` without DeepSpeed.
        itemsize: bytes of an element of the model weights.
        sub_group: number of elements that a rank's optimizer updates at once (``sub_group_size``).
        bucket: number of elements whose gradients are averaged at once (``reduce_bucket_size``).
        overlap: whether gradients are averaged during the backward pass (``overlap_comm``).
        on_cpu: whether the model is in main memory and the ranks communicate through gloo.
        fsdp2: whether FSDP2 shards the model, layer by layer; ``stage`` is ``None`` then.
    """

    ranks: int = 1
    stage: int | None = None
    itemsize: int = 4
    sub_group: int = 10**12
    bucket: int = 200_000_000
    overlap: bool = True
    on_cpu: bool = False
    fsdp2: bool = False

    @property
    def has_master(self) -> bool:
        """True if the optimizer has float32 master weights; in stages 1 to 3 float32 weights have some, too."""
        return self.stage in (1, 2, 3) or (self.stage == 0 and self.itemsize < 4)

    @property
    def shards(self) -> int:
        """Number of parts that the optimizer's state is partitioned into."""
        return self.ranks if self.stage in (1, 2, 3) or self.fsdp2 else 1

    @property
    def has_shards(self) -> bool:
        """True if a rank holds only a shard of the model weights."""
        return self.stage == 3 or self.fsdp2

    @property
    def name(self) -> str:
        """Name for people."""
        if self.fsdp2:
            return "FSDP2"
        return "no DeepSpeed" if self.stage is None else f"ZeRO stage {self.stage}"

    def part(self, size: int) -> int:
        """Return the bytes that a rank sends in an all_gather, a reduce_scatter or a broadcast of ``size`` bytes."""
        return size * (self.ranks - 1) // self.ranks
