"""Free memory, of a machine and of a container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_moeedit.sharding import device_memory
from lit_moeedit.sharding.device_memory import UNLIMITED, free_memory


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 7\n"}, 600),
        ({"memory.max": "1000\n", "memory.current": "1400\n", "memory.stat": ""}, 0),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "inactive_file 50\nactive_file 30\n"}, 180),
        ({"memory.max": "max\n", "memory.current": "400\n"}, UNLIMITED),
        (
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "total_inactive_file 9\ninactive_file 1\n",
            },
            4001,
        ),
        ({}, UNLIMITED),
    ],
)
def test_a_container_may_have_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert device_memory._left_of_container(tmp_path) == left
    monkeypatch.setattr(device_memory, "_left_of_container", lambda folder: left)
    assert free_memory(torch.device("cpu")) <= left
