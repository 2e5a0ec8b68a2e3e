"""LoRA adapters of peft around a model: their settings as plain data, and the names that peft gives to weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_moeedit.pretrained import as_value_error

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
"""The name of the only adapter, which peft gives to it."""
SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "bias",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
)
"""Settings of a ``LoraConfig`` that may differ from their defaults."""
_OF_PEFT = ("peft_type", "peft_version", "base_model_name_or_path", "auto_mapping", "revision", "runtime_config")
"""Fields that peft writes into a config by itself."""
_INITIAL = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the weights of the base as they are."""
_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_pattern", "target_parameters", "modules_to_save")
_NAME = re.compile(r"[\w.\-]{1,500}")
ALL_LINEAR = "all-linear"


def lora_settings(adapter: Any, source: str = "adapter") -> dict[str, Any]:
    """Return the settings of an adapter that differ from peft's defaults, as plain data.

    Args:
        adapter: a ``peft.LoraConfig``, or its settings. These may come from a checkpoint, which is untrusted: their
            targets must be names. peft takes others for regular expressions, whose matching has no bound.
        source: where it comes from, for errors.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: peft refuses a setting, or it is one that is not supported.

    Example:
        >>> lora_settings({"r": 4, "target_modules": ["v_proj", "q_proj"]})
        {'r': 4, 'target_modules': ['q_proj', 'v_proj']}
    """
    config = adapter
    if isinstance(adapter, Mapping):
        _check_known(source, adapter)
        for name in ("target_modules", "exclude_modules"):
            _check_names(f"{source}: {name}", adapter.get(name))
        config = _config({name: value for name, value in adapter.items() if name in SETTINGS}, source)
    lora_config = _peft().LoraConfig
    if type(config) is not lora_config:
        raise ValueError(
            f"{source} should be a peft.LoraConfig or a dict of its settings, but is a {type(adapter).__name__}"
        )
    default = lora_config()
    changed = {
        name: _plain(value)
        for name, value in vars(config).items()
        if not name.startswith("_") and name not in _OF_PEFT and _plain(value) != _plain(getattr(default, name, None))
    }
    _check_known(source, changed)
    if changed.get("init_lora_weights", True) not in _INITIAL:
        raise ValueError(
            f"{source}: init_lora_weights={changed['init_lora_weights']!r} changes the weights of the base, which "
            f"nothing could edit or load again; expected one of {_INITIAL}"
        )
    for name in _PATTERNS:
        _check_names(f"{source}: {name}", changed.get(name))
    for name, value in changed.items():
        of_modules = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in of_modules):
            raise ValueError(f"{source}: {name} should be finite, but is {str(value)[:80]}")
    return {name: changed[name] for name in SETTINGS if name in changed}


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any], in_float32: bool = True) -> PeftModel:
    """Put LoRA adapters into a model, whose own weights are then frozen.

    Args:
        model: the model, which is changed.
        settings: from :func:`lora_settings`.
        in_float32: whether adapters of weights in half precision are float32. DeepSpeed, which has master weights of
            its own, wants one dtype for all.

    Raises:
        ValueError: peft cannot put them into this model.
    """
    with as_value_error(f"adapter: peft cannot put LoRA into {type(model).__name__}"):
        adapted: PeftModel = _peft().get_peft_model(
            model, _config(settings, "adapter"), adapter_name=ADAPTER, autocast_adapter_dtype=in_float32
        )
    return adapted


def resolved(settings: Mapping[str, Any], model: PeftModel) -> dict[str, Any]:
    """Replace regular expressions for modules by the names of the modules that they matched.

    Names need no matching when the settings are read from a checkpoint, which is untrusted.
    """
    patterns = [settings.get(name) for name in ("target_modules", "exclude_modules")]
    if not any(isinstance(pattern, str) and pattern != ALL_LINEAR for pattern in patterns):
        return dict(settings)
    tuner: Any = model.base_model
    kept = {name: value for name, value in settings.items() if name != "exclude_modules"}
    return kept | {"target_modules": sorted(tuner.targeted_module_names)}


def module_names(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's modules by ``id``, for :class:`BaseNames`, before it gets adapters."""
    return {id(module): name for name, module in model.named_modules()}


@dataclass(frozen=True)
class BaseNames:
    """Names of the weights of a model with adapters in its base. Adapters rename modules, and put others around them.

    Attributes:
        own: the base's own weights: name in the base's state dict, by the name in that of the model with adapters.
        saved: trained copies of whole modules (``modules_to_save``), likewise.
        tuners: peft's module that changes a weight, by the weight's name in the base.
    """

    own: dict[str, str]
    saved: dict[str, str]
    tuners: dict[str, Any]

    @classmethod
    def of(cls, adapted: PeftModel, before: Mapping[int, str]) -> BaseNames:
        """Find the names.

        Args:
            adapted: the model with adapters.
            before: :func:`module_names` of the model before it got them.
        """
        own: dict[str, str] = {}
        saved: dict[str, str] = {}
        tuners: dict[str, Any] = {}
        copies: dict[int, str] = {}
        modules: list[Any] = list(adapted.modules())
        for module in modules:
            if hasattr(module, "lora_A") and id(base := module.get_base_layer()) in before:
                tuners[_joined(before[id(base)], getattr(module, "parameter_name", "weight"))] = module
            elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                root, inner = before[id(module.original_module)], module.modules_to_save[ADAPTER].named_modules()
                copies |= {id(copy): _joined(root, name) for name, copy in inner}
        for name in adapted.state_dict():
            path, _, leaf = name.rpartition(".")
            owner = id(adapted.get_submodule(path))
            if owner in before:
                own[name] = _joined(before[owner], leaf)
            elif owner in copies:
                saved[name] = _joined(copies[owner], leaf)
        return cls(own, saved, tuners)


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def frozen_names(module: nn.Module) -> set[str]:
    """Return the names in the state dict of all parameters that do not train."""
    return {name for name, weight in module.named_parameters(remove_duplicate=False) if not weight.requires_grad}


def refuse_adapter_alone(module: nn.Module, names: Iterable[str], adapts: bool) -> None:
    """Check that a checkpoint has weights of the base, for a module that expects them.

    Args:
        module: the module.
        names: names of the checkpoint's weights.
        adapts: true if the module has adapters.

    Raises:
        ValueError: if it has those of an adapter alone.
    """
    found = {name for name in names if isinstance(name, str)}  # a checkpoint is untrusted
    # around a module with an adapter, peft renames the weights of the base
    frozen = frozen_names(module)  # none if the base is trained, too
    has_base = not (frozen and frozen.isdisjoint(found)) if adapts else any(".base_layer." in name for name in found)
    if has_base or not any(".lora_" in name for name in found):
        return
    raise ValueError(
        "the checkpoint has the weights of an adapter alone, as adapter_only_checkpoints=True writes them, but "
        "adapter_only_checkpoints of this module is False, so it expects those of the base, too; set "
        "adapter_only_checkpoints to True, and 'adapter' and 'pretrained' as in the run that wrote it"
    )


def _check_known(source: str, settings: Mapping[Any, Any]) -> None:
    unknown = [str(name)[:80] for name in settings if name not in (*SETTINGS, *_OF_PEFT)]
    if unknown:
        raise ValueError(
            f"{source}: {', '.join(unknown)} of LoraConfig is not supported; supported are {', '.join(SETTINGS)}"
        )


def _check_names(where: str, given: Any) -> None:
    """Refuse anything that peft would take for a regular expression."""
    names = (
        [given] if isinstance(given, str) else list(given) if isinstance(given, Mapping | list | tuple | set) else ()
    )
    wrong = [name for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)]
    if wrong:
        raise ValueError(
            f"{where} should have names of modules or parameters, but has {str(wrong[0])[:80]!r} (in a LoraConfig, "
            "target_modules and exclude_modules may be a regular expression)"
        )


def _config(settings: Mapping[str, Any], source: str) -> LoraConfig:
    kind = _peft().LoraConfig
    with as_value_error(f"{source}: peft.LoraConfig refuses the settings {sorted(settings)}"):
        config: LoraConfig = kind(**settings)
    return config


def _plain(value: Any) -> Any:
    """Convert a setting to what YAML and a checkpoint of plain data hold."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    # an enumeration of texts
    return str(value.value) if isinstance(getattr(value, "value", None), str) else value


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("adapters need peft: pip install 'lit-moeedit[peft]'", name="peft") from error
    return peft
