"""The device that a command runs on."""

from __future__ import annotations

import os

import torch

_ALIASES = {"gpu": "cuda", "nvidia": "cuda"}
"""Names that people use for a device, by which torch does not know it."""


def find_device(name: str = "auto") -> torch.device:
    """Return the device of this process: a GPU of its own if there is one, unless another is named.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, or ``cuda:1`` for one of several.

    Raises:
        ValueError: if there is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("it holds no values")
    except (RuntimeError, AssertionError, ValueError) as error:
        kind, colon, index = name.lower().partition(":")
        meant = f" (did you mean '{_ALIASES[kind]}{colon}{index}'?)" if kind in _ALIASES else ""
        raise ValueError(f"there is no device {name!r} here{meant}: expected auto, cpu, cuda or cuda:1") from error
    return device
