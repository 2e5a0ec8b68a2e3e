"""Memory that is free, on a GPU and beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that new tensors may take on a device.

    Args:
        device: a GPU, whose caches count as free, or the CPU.
        processes: number of processes that share a CPU's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available() // max(1, processes)


def _available() -> int:
    """Bytes of main memory that are free, or are when caches of files are dropped."""
    table = Path("/proc/meminfo")
    if table.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
