"""The processes of an edit without a Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lit_moeedit.devices import find_device
from lit_moeedit.sharding.ranks import Ranks

PATIENCE = timedelta(days=7)
"""Maximum time that a process waits for another one that lives: the first one may write a large model for hours."""


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Join the other processes that ``torchrun`` has started, if it has; each holds the whole model."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(find_device())
    dist.init_process_group()
    try:
        Ranks(timeout=PATIENCE)  # the current ones of all that follows
        yield
    finally:
        dist.destroy_process_group()
