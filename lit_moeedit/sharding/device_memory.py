"""Free memory of a GPU, and of the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

UNLIMITED = 2**62
"""More bytes than any machine has."""


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that new tensors may take on a device.

    Args:
        device: a GPU, where PyTorch's cached blocks count as free, or the CPU.
        processes: number of processes that share a CPU's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # of main memory what is free, file caches included, within a container's limit
    return min(_available_of_machine(), _left_of_container(Path("/sys/fs/cgroup"))) // max(1, processes)


def _left_of_container(folder: Path) -> int:
    """Return the bytes that a control group may still take; :data:`UNLIMITED` without a limit."""
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            # a group without a limit holds "max" here, or a number beyond all memory
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            # cached files count as used, and are dropped when memory is needed
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
