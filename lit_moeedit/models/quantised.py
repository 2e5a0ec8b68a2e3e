"""Quantised models: experts that no change fits into, and layers around them that pass no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.errors import UnsupportedModelError

_LOAD = (
    "load the model with from_pretrained(..., dtype='bfloat16', quantization_config={}(dequantize=True)); save it so "
    "once to give that folder as 'pretrained'"
)
FORMATS = {
    "Mxfp4GptOssExperts": ("MXFP4", _LOAD.format("Mxfp4Config")),
    "FP8Experts": ("FP8", _LOAD.format("FineGrainedFP8Config")),
    "FbgemmFp8Llama4TextExperts": ("FBGEMM FP8", "load a model whose weights are bfloat16"),
}
"""By the class of the experts, the format and what to do."""


def quantised_experts(model: PreTrainedModel) -> dict[int, str]:
    """Find the layers whose experts are quantised, by the classes that transformers loads them into.

    Args:
        model: the model; nothing of it is read.

    Returns:
        By layer index what they are, and what to do about it.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in FORMATS), None)
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if kind is not None and index is not None:
            stored, remedy = FORMATS[kind]
            found[index] = (
                f"the experts of layer {index} of {type(model).__name__} are quantised ({stored}), so that a change "
                f"would be lost in rounding; {remedy}"
            )
    return found


_REPACKS = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer of bitsandbytes that lets its first forward without gradients repack the weights."""


@contextmanager
def no_repacking(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers of bitsandbytes from repacking their weights on a CPU, which ends gradients, within this block.

    Args:
        model: the model.
    """
    with held(Undo()) as undo:
        for module in model.modules():
            if getattr(module, _REPACKS, False):
                undo.by(setattr, module, _REPACKS, getattr(module, _REPACKS))
                setattr(module, _REPACKS, False)
        yield


def refuse_repacked(model: nn.Module) -> None:
    """Refuse a model with 4-bit layers of bitsandbytes that were repacked for inference: they pass no gradient.

    Raises:
        UnsupportedModelError: naming the first of them, and what to do.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"the 4-bit layer {name} was repacked for inference when it ran without gradients on this CPU, and "
                f"bitsandbytes passes no gradient through it now; load the model again and set {_REPACKS} = False of "
                "its bitsandbytes.nn.Linear4bit modules before it runs, or edit it on a GPU"
            )
