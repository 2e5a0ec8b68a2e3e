"""The search for a model's weights in a checkpoint, by their names in the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.read import Checkpoint
from lit_moeedit.checkpoints.tensors import Readable
from lit_moeedit.text import first_few


def saved_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that ``save_pretrained`` would write, by their names in the state dict."""
    known = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    ignored = model._keys_to_ignore_on_save or ()
    saved = {name: value for name, value in known.items() if name not in ignored}
    wanted: dict[str, Tensor] = remove_tied_weights_from_state_dict(saved, model)
    return wanted


def find_weights(
    source: Checkpoint,
    kind: str,
    wanted: Mapping[str, Tensor],
    known: Collection[str],
    prefix: str | None,
    optional: Collection[str] = (),
) -> dict[str, Readable]:
    """Find weights in a checkpoint.

    Args:
        source: the checkpoint.
        kind: the model's class, for errors.
        wanted: the weights to find; only their shapes are used.
        known: names of all weights of the model.
        prefix: prefix of the names in the checkpoint; ``None`` to find it.
        optional: names of wanted weights that may be missing, all of them or none.

    Raises:
        CheckpointError: a weight is missing, of another shape or of another model.
    """
    needed = [name for name in wanted if name not in optional]
    start = _prefix(source, needed or list(wanted)) if prefix is None else prefix
    where = f"{source.path}, read as {kind} after the prefix {start!r}"
    missing = [name for name in wanted if start + name not in source.tensors]
    if missing and set(missing) != set(optional):
        raise CheckpointError(
            f"{where}: {_some(missing)} missing (frozen weights are, if they were excluded when it was saved)"
        )
    unknown = [name for name in source.tensors if name.startswith(start) and name[len(start) :] not in known]
    if unknown:
        raise CheckpointError(f"{where}: {_some(unknown)} not of that model; is it another one, or a prefix missing?")
    found = {name: source.tensors[start + name] for name in wanted if start + name in source.tensors}
    wrong = [
        f"{name} {tuple(weight.shape)} instead of {tuple(wanted[name].shape)}"
        for name, weight in found.items()
        if weight.shape != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: {_some(wrong)} of another shape")
    # such a weight, however short in the file, would be written in its whole length
    repeated = [name for name, weight in found.items() if weight.is_repeated]
    if repeated:
        raise CheckpointError(f"{where}: {_some(repeated)} made of repeated elements (as expand() does)")
    return found


def _prefix(source: Checkpoint, wanted: list[str]) -> str:
    """Find the prefix of the model's names in the checkpoint."""
    starts = {
        key.removesuffix(name) for name in wanted[:1] + wanted[-1:] for key in source.tensors if key.endswith(name)
    }
    counts = {
        start: sum(start + name in source.tensors for name in wanted)
        for start in sorted(starts)
        if start == "" or start.endswith(".")
    }
    best = [start for start, count in counts.items() if count == max(counts.values())]
    if len(best) > 1:
        raise CheckpointError(f"{source.path} holds several such models; choose one with --prefix: {', '.join(best)}")
    return best[0] if best else ""


def _some(names: Sequence[str]) -> str:
    """Join the first names, with a verb after them."""
    return f"{first_few(names)} {'is' if len(names) == 1 else 'are'}"
