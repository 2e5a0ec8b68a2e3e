"""Parameters and ranks: reading and writing sharded weights, and passes under ZeRO stage 3."""

from lit_moeedit.sharding.zero3_passes import regathering

__all__ = ["regathering"]
