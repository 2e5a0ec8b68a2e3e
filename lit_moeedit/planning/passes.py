"""The passes of a run through a model without numbers: what they allocate, send and compute.

The model is the one that transformers makes, and runs as it would; its tensors have shapes and no memory. So whatever
an architecture allocates is counted, and nothing has to be known of it here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_moeedit.data.encoding import position_ids
from lit_moeedit.editing.running import decoder_layers, hidden_states, logits, output_replaced, skipped
from lit_moeedit.models.experts import ExpertLayer, check_editable, expert_layers
from lit_moeedit.planning.sizes import EditSize, ModelSize, Pass, Passes, TrainingSize
from lit_moeedit.sharding.rehearsal import Gradients, Sharding, gathered_together, sharded


class Tally(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as these are alive, and matrix products.

    What kernels and other libraries allocate for themselves is not seen.

    Attributes:
        alive: bytes now.
        peak: most bytes so far.
        flops: floating-point operations of matrix products, attention and convolutions.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            result = _grouped_mm(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._note(value)
        return result

    def _note(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        size = storage.nbytes() if counts else 0
        self._sizes[storage._cdata] = size
        weakref.finalize(storage, self._drop, storage._cdata)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _drop(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Products of runs of rows: with one weight each, or, for the weights' gradient, with runs of other rows.

    PyTorch's own function for the shape refuses float32, which its products take.
    """
    groups = () if right.ndim == 3 else (len(offs),)
    return left.new_empty(*groups, left.shape[0], right.shape[-1])


def _grouped_mm_flops(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """Of the product for all experts at once: rows times weights, or, for the weights' gradient, rows times rows."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[-1]


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
}


@contextmanager
def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """A causal language model whose weights have shapes and no numbers; in the block all other tensors are like that.

    Args:
        config: of transformers.
        dtype: of the weights.
    """
    with FakeTensorMode(), torch.device("cpu"), no_init_weights():
        yield AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_size(model: PreTrainedModel, layers: Sequence[int], pretrained: bool = False) -> ModelSize:
    """Sizes of a model, after a check that the given layers can be edited.

    Args:
        model: a model within the block of :func:`empty_model`.
        layers: the layers to edit.
        pretrained: whether the run reads its weights.

    Raises:
        UnsupportedModelError: if a layer cannot be edited.
    """
    edited = check_editable(model, layers)
    experts, d_model, d_hidden = edited[-1].shape
    active: list[int] = []
    handle = edited[0].experts.register_forward_pre_hook(lambda _, inputs: active.append(inputs[1].shape[-1]))
    one = torch.ones(1, 1, dtype=torch.long)
    with handle, Tally(), torch.no_grad():
        hidden_states(model, edited[0], one, one, one)
    weights = list(model.parameters())
    return ModelSize(
        parameters=sum(weight.numel() for weight in weights),
        largest=max(weight.numel() for weight in weights),
        block=max(sum(weight.numel() for weight in together) for _, together in gathered_together(model)),
        experts=experts,
        d_model=d_model,
        d_hidden=d_hidden,
        active=active[0],
        layers=len(decoder_layers(model, edited[-1])),
        pretrained=pretrained,
    )


def run_passes(model: PreTrainedModel, sharding: Sharding, training: TrainingSize, edit: EditSize) -> Passes:
    """Run every pass of a run once on :func:`empty_model`, within its block.

    Args:
        model: the model.
        sharding: how it is sharded; ``model`` is whole.
        training: the training step.
        edit: the edit.
    """
    layers = [expert_layers(model)[index] for index in edit.layers]
    top = layers[-1]

    def measured(run: Callable[[], Any], gradients: bool = False) -> Pass:
        reducer = Gradients(sharding, sum(w.numel() for w in model.parameters())) if gradients else None
        tally = Tally([*model.parameters(), *model.buffers()])
        with tally, sharded(model, sharding, reducer) as gathering:
            run()
            if reducer is not None:
                reducer.reduce()
            peak, sent = (
                tally.peak,
                (gathering.sent if gathering is not None else 0) + (reducer.sent if reducer is not None else 0),
            )
        model.zero_grad(set_to_none=True)
        return Pass(peak, sent, tally.flops)

    model.train()
    step = measured(lambda: _training_step(model, training), gradients=True)
    # an edit freezes the weights
    model.eval()
    model.requires_grad_(False)
    batch = _TargetBatch(model, top, edit, edit.target_batch(sharding.ranks))
    return Passes(
        training=step,
        statistics=measured(lambda: _statistics(model, layers, edit)),
        features=measured(lambda: _features(model, layers, edit, edit.feature_batch(sharding.ranks))),
        before=measured(batch.before),
        forward=measured(batch.forward),
        step=measured(batch.step),
    )


def _training_step(model: PreTrainedModel, size: TrainingSize) -> None:
    """Forward and backward pass of :meth:`lit_moeedit.module.LitMoE.training_step`."""
    ids = torch.zeros(size.rows, size.tokens, dtype=torch.long)
    options = {"output_router_logits": True} if size.router_loss else {}
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    # which positions count is not known: so many rows of all
    rows = outputs.logits[:, :-1].flatten(0, 1)[torch.zeros(size.counted, dtype=torch.long)]
    loss = F.cross_entropy(rows.float(), torch.zeros(size.counted, dtype=torch.long))
    if size.router_loss and getattr(outputs, "aux_loss", None) is not None:
        loss = loss + outputs.aux_loss
    loss.backward()


def _statistics(model: PreTrainedModel, layers: Sequence[ExpertLayer], size: EditSize) -> None:
    """A batch of :func:`lit_moeedit.editing.second_moments`, if the edit needs them."""
    if size.preserve:
        _run_to(model, layers, layers[-1], size.text_batch(), size.text_tokens)


def _features(model: PreTrainedModel, layers: Sequence[ExpertLayer], size: EditSize, rows: int) -> None:
    """A batch of :func:`lit_moeedit.editing.features.edit_tokens`."""
    hidden = _run_to(model, (), layers[-1], rows, size.prompt_tokens)
    hidden.flatten(0, 1)[torch.zeros(rows, dtype=torch.long)].float()


@torch.no_grad()
def _run_to(model: PreTrainedModel, watched: Sequence[ExpertLayer], top: ExpertLayer, rows: int, tokens: int) -> Tensor:
    """Output of a layer, and beside it all keys of the watched layers."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, inputs, layer=layer: _keys(layer, inputs[0], inputs[1]))
        for layer in watched
    ]
    try:
        return hidden_states(model, top, ids, mask, position_ids(mask))
    finally:
        for handle in handles:
            handle.remove()


def _keys(layer: ExpertLayer, hidden: Tensor, chosen: Tensor) -> None:
    """What :func:`lit_moeedit.models.experts.routed_keys` and ``SecondMoments.add`` allocate for all tokens."""
    module: Any = layer.experts
    pairs = chosen.numel()

    def keys() -> Tensor:
        inputs = hidden[torch.zeros(pairs, dtype=torch.long)]
        up = module.gate_up_proj if module.has_gate else module.up_proj
        # each expert has some of the rows, and one and the same product for all is as much work
        parts = inputs @ (up[0] if layer.is_transposed else up[0].T)
        projected = torch.cat([parts])
        return module._apply_gate(projected) if module.has_gate else module.act_fn(projected)

    key = keys()
    rows = key.float()
    rows.T @ rows


class _TargetBatch:
    """The passes of :class:`lit_moeedit.editing.TargetOptimizer` for one batch of edits."""

    def __init__(self, model: PreTrainedModel, layer: ExpertLayer, size: EditSize, edits: int) -> None:
        self.model, self.layer, self.edits, self.keep = model, layer, edits, size.target_tokens
        self.neutral = edits if size.neutral else 0
        rows = edits * size.contexts + self.neutral
        self.ids = torch.zeros(rows, size.prompt_tokens + size.target_tokens - 1, dtype=torch.long)
        self.mask = torch.ones_like(self.ids)
        layers: list[nn.Module] = decoder_layers(model, layer)
        self.below = layers[: next(i for i, other in enumerate(layers) if other is layer.layer)]

    def before(self) -> None:
        """The layers up to the target layer, and the unedited model's answers."""
        with torch.no_grad():
            hidden = hidden_states(self.model, self.layer, self.ids, self.mask, position_ids(self.mask))
            self._answers(hidden, None)[:, -1].log_softmax(-1)

    def forward(self) -> Tensor:
        """The loss; hidden states and the unedited model's answers are there from before."""
        return self._loss()[0]

    def step(self) -> None:
        """The loss and its gradient."""
        loss, variable = self._loss()
        torch.autograd.grad(loss, variable)

    def _loss(self) -> tuple[Tensor, Tensor]:
        rows = len(self.ids)
        embeddings: Any = self.model.get_input_embeddings()
        hidden = torch.empty(*self.ids.shape, embeddings.embedding_dim, dtype=self.model.dtype)
        reference = torch.empty(rows, embeddings.num_embeddings)
        variable = torch.zeros(self.edits, hidden.shape[-1], requires_grad=True)
        output = self._answers(hidden, variable).log_softmax(-1)
        labels = torch.zeros(rows, self.keep, 1, dtype=torch.long)
        loss = -output.gather(-1, labels).sum()
        if self.neutral:
            # which rows are neutral is not known: so many
            some = torch.zeros(self.neutral, dtype=torch.long)
            change = F.kl_div(output[some, -1], reference[some], log_target=True, reduction="none")
            loss = loss + change.sum()
        return loss + variable.square().sum(), variable

    def _answers(self, hidden: Tensor, deltas: Tensor | None) -> Tensor:
        rows = torch.arange(len(self.ids))
        start = hidden[rows]
        if deltas is not None:
            edits = torch.zeros(len(self.ids), dtype=torch.long)
            start = start.index_put((rows, edits), deltas[edits].to(start.dtype), accumulate=True)
        with skipped(self.below), output_replaced(self.layer.layer, lambda: start):
            return logits(self.model, self.ids, self.mask, position_ids(self.mask), self.keep).float()
