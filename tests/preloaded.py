"""Imported once by the process that tests' ranks are forked from, so that no rank imports it again.

A fork takes only the thread that forks: nothing here may start another one.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest  # noqa: F401
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

from tests.processes import die_with_parent

die_with_parent()
for _name in ("deepspeed", "accelerate", "transformers.integrations.deepspeed"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
_threads = len(list(Path("/proc/self/task").iterdir()))
if _threads > 1:
    raise RuntimeError(f"a process that is to be forked has {_threads} threads")
