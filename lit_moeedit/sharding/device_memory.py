"""Memory that is free, on a GPU and beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

UNLIMITED = 2**62
"""Bytes that no machine has."""


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
    """Bytes of main memory that are free, or are when caches of files are dropped, within a container's limit."""
    return min(_available_of_machine(), _left_of_container(Path("/sys/fs/cgroup")))


def _left_of_container(folder: Path) -> int:
    """Bytes that a control group may still take; more than any machine has without a limit."""
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            # a group without a limit says "max", or a number beyond all memory
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            # files that were read count as used, and make room when it is wanted
            files = re.findall(r"^(?:in)?active_file (\d+)$", (folder / statistics).read_text(), re.MULTILINE)
            return max(0, left + sum(map(int, files)))
        except (OSError, ValueError):
            continue
    return UNLIMITED


def _available_of_machine() -> int:
    table = Path("/proc/meminfo")
    if table.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
