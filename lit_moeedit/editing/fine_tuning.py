"""Fine-tuning, with or without a bound, as a baseline for editing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.data.encoding import Encoding, pad_id, token_batches
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import score_batch
from lit_moeedit.editing.job import EditJob, LayerEdits
from lit_moeedit.editing.method import EditMethod
from lit_moeedit.editing.target_rows import EncodedFacts
from lit_moeedit.editing.targets import Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.sharding.shards import UnsupportedShardingError, is_partitioned
from lit_moeedit.solvers import ExpertDeltas


class FineTuning(EditMethod):
    r"""Takes gradient steps on the down-projections of some layers until the model outputs the new targets.

    FT of ROME (2202.05262); with ``norm_constraint`` FT+L, where no weight may move by more than ``ε``
    (Zhu et al., 2012.00363):

    .. math:: \min_{\Delta W} \overline{-\log p(\text{target}_t \mid W + \Delta W)}, \qquad
              \|\Delta W\|_\infty \le \varepsilon

    All edits are one batch, as in :class:`~lit_moeedit.editing.Editor`. Nothing is preserved, so no text is needed.
    Adam optimises dense changes that are kept apart from the weights. The weights change once, at the end, in one
    transaction.

    Args:
        layers: indices of the decoder layers to change.
        steps: maximum number of Adam steps.
        learning_rate: learning rate of Adam, in units of the weights.
        norm_constraint: ``ε``, in units of the weights; ``None`` for no bound.
        stop: training ends when the mean negative log-likelihood per token (nats) is at most this.
        contexts: texts put before the prompts. Every fact is trained after each of them.
        token_budget: maximum number of tokens (with padding) in one forward.
        reset_moments: as for :class:`~lit_moeedit.editing.Editor`.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> FineTuning(layers=[1, 2], norm_constraint=1e-3).layers
        (1, 2)
    """

    def __init__(
        self,
        layers: Sequence[int],
        steps: int = 25,
        learning_rate: float = 5e-4,
        norm_constraint: float | None = None,
        stop: float = 0.01,
        contexts: Sequence[str] = ("",),
        token_budget: int = 16384,
        reset_moments: bool = False,
    ) -> None:
        super().__init__(layers, contexts, token_budget, reset_moments)
        if not isinstance(token_budget, int):
            raise ValueError("token_budget of FineTuning must be a number of tokens")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if norm_constraint is not None and not norm_constraint > 0:
            raise ValueError(f"norm_constraint must be positive, or None for no bound, got {norm_constraint}")
        if not stop >= 0:
            raise ValueError(f"stop must be at least 0, got {stop}")
        self.steps, self.learning_rate, self.norm_constraint, self.stop = steps, learning_rate, norm_constraint, stop

    @override
    def find_layers(self, model: PreTrainedModel) -> list[ExpertLayer]:
        """Return the layers to change, ascending.

        Raises:
            UnsupportedModelError: if one of them cannot be edited.
            UnsupportedShardingError: if the weights are partitioned.
        """
        layers = super().find_layers(model)
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            raise UnsupportedShardingError(
                "FineTuning needs whole weights on every rank, but these are partitioned; "
                "use Editor, or DeepSpeed ZeRO at a stage below 3"
            )
        return layers

    @override
    def check_facts(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> None:
        self._encode(tokenizer, facts)

    def _encode(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[Encoding]:
        encoded = EncodedFacts.of(tokenizer, facts, self.contexts, neutral="", token="last")
        return [row.encoding for row in encoded.rows]

    @override
    def prepare(self, job: EditJob) -> _Changes:
        """Optimise the changes.

        There are no target vectors, so ``deltas`` of the result's targets is ``[T, 0]``. The steps are timed as the
        phase ``solve``.
        """
        changes = _Changes(self, job, self._encode(job.tokenizer, job.facts))
        with job.clock("solve"):
            steps = changes.optimize()
            nll = changes.nll.view(len(job.facts), -1).mean(-1)
        changes.targets = Targets(nll.new_zeros(len(nll), 0), nll, torch.full_like(nll, steps, dtype=torch.long))
        return changes


class _Changes(LayerEdits):
    """Dense changes of the layers, which Adam optimises apart from the weights, in the layout of the stored weights.

    Attributes:
        nll: ``[n]``, negative log-likelihood of each text's target at the last step.
    """

    def __init__(self, settings: FineTuning, job: EditJob, texts: Sequence[Encoding]) -> None:
        super().__init__(job)
        self.settings, self.texts, self.nll = settings, texts, torch.zeros(len(texts), device=job.model.device)
        self._weights = {f"{layer.name}.down_proj": layer.down_proj.detach() for layer in job.layers}
        dense = (torch.zeros_like(w, dtype=torch.float32, requires_grad=True) for w in self._weights.values())
        self._dense = {layer.index: change for layer, change in zip(job.layers, dense, strict=True)}
        assert isinstance(settings.token_budget, int)
        lengths = [len(text.ids) for text in texts]
        batches = token_batches(lengths, settings.token_budget)
        self._batches = list(unpadded(batches, lengths, longest_padded(job.model)))

    @override
    def solve(self, layer: ExpertLayer) -> ExpertDeltas:
        with self.job.clock("commit"):
            return _factors(layer, self._dense[layer.index])

    def optimize(self) -> int:
        """Take steps until the loss is low enough; return their number."""
        settings = self.settings
        optimizer = torch.optim.Adam(self._dense.values(), settings.learning_rate)
        with inference(self.job.model, gradients=True):
            for step in range(settings.steps + 1):
                self._differentiate()
                if not bool(torch.isfinite(self.nll).all()):
                    raise FloatingPointError(
                        "the loss of fine-tuning is not finite: that of the model is not, or the learning rate is high"
                    )
                self.job.report("solve", step, settings.steps)
                if step == settings.steps or float(self.nll.mean()) <= settings.stop:
                    break
                optimizer.step()
                if settings.norm_constraint is not None:
                    with torch.no_grad():
                        for delta in self._dense.values():
                            delta.clamp_(-settings.norm_constraint, settings.norm_constraint)
        return step

    def _differentiate(self) -> None:
        """Compute the texts' losses and the gradient of their mean; the batches are sharded over the ranks."""
        model, ranks, deltas = self.job.model, self.job.ranks, list(self._dense.values())
        self.nll.zero_()
        for delta in deltas:
            delta.grad = torch.zeros_like(delta)
        for chosen, mine in ranks.shard(self._batches):
            if not mine:
                continue
            # parameters, not sums that depend on the deltas: peft could not put its adapters around these
            pairs = zip(self._weights.items(), deltas, strict=True)
            changed = {
                name: nn.Parameter((weight + delta.detach()).to(weight.dtype)) for (name, weight), delta in pairs
            }
            log_prob, _ = score_batch(model, [self.texts[i] for i in chosen], pad_id(self.job.tokenizer), changed)
            self.nll[chosen] = -log_prob.detach()
            loss = -log_prob.sum() / len(self.texts)
            for delta, gradient in zip(deltas, torch.autograd.grad(loss, list(changed.values())), strict=True):
                assert delta.grad is not None
                delta.grad += gradient
        ranks.check_errors()
        ranks.all_reduce(self.nll, *(delta.grad for delta in deltas if delta.grad is not None))


def _factors(layer: ExpertLayer, dense: Tensor) -> ExpertDeltas:
    """Return a dense change as deltas of the experts that it changes."""
    experts = dense.detach().flatten(1).any(-1).nonzero().squeeze(-1)
    changed = dense.detach()[experts]
    return ExpertDeltas.from_dense(experts, changed.mT if layer.is_transposed else changed, layer.num_experts)
