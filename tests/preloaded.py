"""Imported once by the process that tests' ranks are forked from, so that no rank imports it again.

DeepSpeed, Lightning and torch import much of this when it is first used, and DeepSpeed collects garbage whenever it
makes an engine: that alone was half of what ranks did.

A fork takes only the thread that forks: nothing here may start another one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from pathlib import Path

import pytest  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import lit_moeedit.callbacks
import lit_moeedit.module
import lit_moeedit.sharding.cpu_strategy  # noqa: F401
import tests.conftest  # noqa: F401
from tests.processes import die_with_parent

die_with_parent()
for _name in (
    "accelerate",
    "deepspeed",
    "deepspeed.module_inject.auto_tp",
    "deepspeed.runtime.zero.muon.original_muon",
    "matplotlib.pyplot",
    "transformers.integrations.deepspeed",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
# what is here stays, and need not be looked at by any rank's collector
gc.collect()
gc.freeze()
_threads = len(list(Path("/proc/self/task").iterdir()))
if _threads > 1:
    raise RuntimeError(f"a process that is to be forked has {_threads} threads")
