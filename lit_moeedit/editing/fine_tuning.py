"""What editing is compared with: fine-tuning, free or within a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.data.encoding import Encoding, encode, join, pad_id, token_batches
from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.editing.editor import Editor, EditResult
from lit_moeedit.editing.evaluation import score_batch
from lit_moeedit.editing.phases import Clock, Progress, no_progress
from lit_moeedit.editing.targets import Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError, is_partitioned
from lit_moeedit.sharding.transaction import Transaction, Way
from lit_moeedit.solvers import ExpertDeltas


class FineTuning(Editor):
    r"""Gradient steps on the down-projections of some layers until the model says the new targets.

    FT of ROME (2202.05262); with ``norm_constraint`` FT+L, where no weight may move by more than ``ε``
    (Zhu et al., 2012.00363):

    .. math:: \min_{\Delta W} \overline{-\log p(\text{target}_t \mid W + \Delta W)}, \qquad
              \|\Delta W\|_\infty \le \varepsilon

    All edits are one batch, as they are for :class:`Editor`. Nothing is preserved, so no text is needed. Adam moves
    dense changes beside the weights; these change once, at the end, as one transaction.

    Args:
        layers: indices of the decoder layers to change.
        steps: largest number of Adam steps.
        learning_rate: of Adam, in units of the weights.
        norm_constraint: ``ε``, in units of the weights; ``None`` for no bound.
        stop: done when the mean negative log-likelihood per token (nats) is below this.
        contexts: texts put before the prompts; every fact is trained behind each of them.
        token_budget: largest number of tokens (with padding) in one forward.
        way: as for :class:`Editor`, and
        reset_moments: likewise.

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
        way: Way = "local",
        reset_moments: bool = False,
    ) -> None:
        super().__init__(
            layers,
            preserve="none",
            token="last",
            contexts=contexts,
            neutral="",
            token_budget=token_budget,
            way=way,
            reset_moments=reset_moments,
        )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if norm_constraint is not None and not norm_constraint > 0:
            raise ValueError(f"norm_constraint must be positive, or None for no bound, got {norm_constraint}")
        if not stop >= 0:
            raise ValueError(f"stop must be at least 0, got {stop}")
        self.steps, self.learning_rate, self.norm_constraint, self.stop = steps, learning_rate, norm_constraint, stop
        self.batch_tokens = token_budget

    @override
    def check(self, model: PreTrainedModel) -> list[ExpertLayer]:
        """The layers to change, ascending.

        Raises:
            UnsupportedModelError: if one of them cannot be edited.
            UnsupportedShardingError: if the weights are partitioned.
        """
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            raise UnsupportedShardingError(
                "FineTuning needs whole weights on every rank, and these are partitioned; "
                "use Editor, or DeepSpeed ZeRO at a stage below 3"
            )
        return super().check(model)

    @override
    @torch.inference_mode(False)
    @torch.no_grad()
    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        preservation: Sequence[str] = (),
        *,
        moments: Mapping[int, SecondMoments] | None = None,
        guard: Callable[[], bool] | None = None,
        progress: Progress | None = None,
        optimizers: Sequence[Any] = (),
        ranks: Ranks | None = None,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> EditResult:
        """Edit the facts as :meth:`Editor.edit` does; ``preservation`` and ``moments`` have no effect.

        There are no target vectors, so ``deltas`` of the result's targets is ``[T, 0]``; the steps count as the phase
        ``solve``.

        Raises:
            UnsupportedModelError: if the model cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            FactError: if a fact cannot be edited.
            FloatingPointError: if the model or the result is not finite.
            RankError: if another rank failed.
        """
        ranks = ranks if ranks is not None else Ranks()
        report = progress if progress is not None else no_progress
        clock = Clock(phase, model.device)
        with ranks.together():
            layers = self.check(model)
            facts = validate_facts(facts, tokenizer=tokenizer)
            ranks.check_same("the facts", [repr(fact) for fact in facts])
            pairs = [(fact, context) for fact in facts for context in self.contexts]
            prompts = [join(context, fact.prompt) if context else fact.prompt for fact, context in pairs]
            texts = encode(tokenizer, prompts, [fact.target_new for fact, _ in pairs])
            with clock("solve"):
                descent = _Descent(self, model, layers, texts, pad_id(tokenizer))
                steps = descent.run(ranks, lambda done: report("solve", done, self.steps))
                nll = descent.nll.view(len(facts), -1).mean(-1)
            deltas: dict[int, ExpertDeltas] = {}
            change: dict[int, float] = {}
            with Transaction(optimizers, ranks, self.way, self.reset_moments) as transaction:
                for layer, dense in zip(layers, descent.deltas, strict=True):
                    with clock("commit"):
                        deltas[layer.index] = solved = _factors(layer, dense)
                        ranks.check_errors()
                        ranks.broadcast(solved.left, solved.right)
                        change[layer.index] = transaction.commit(layer.down_proj, solved, layer.is_transposed)
                kept = not ranks.any(guard is not None and not guard())
                if not kept:
                    transaction.rollback()
        targets = Targets(nll.new_zeros(len(facts), 0), nll, torch.full_like(nll, steps, dtype=torch.long))
        return EditResult(list(facts), deltas, targets, clock.seconds(), change, kept)


class _Descent:
    """Gradient steps on changes that are kept beside the weights.

    Attributes:
        deltas: the changes, by layer, as the layers store their weights.
        nll: ``[n]``, negative log-likelihood of each text's target at the last step.
    """

    def __init__(
        self,
        settings: FineTuning,
        model: PreTrainedModel,
        layers: Sequence[ExpertLayer],
        texts: Sequence[Encoding],
        pad_token: int,
    ) -> None:
        self.settings, self.model, self.texts, self.pad_token = settings, model, texts, pad_token
        self.weights = {f"{layer.name}.down_proj": layer.down_proj.detach() for layer in layers}
        self.deltas = [torch.zeros_like(w, dtype=torch.float32, requires_grad=True) for w in self.weights.values()]
        self.nll = torch.zeros(len(texts), device=model.device)
        self.batches = list(token_batches([len(text.ids) for text in texts], settings.batch_tokens))

    def run(self, ranks: Ranks, report: Callable[[int], None]) -> int:
        """Descend until the loss is low enough; return the number of steps that it took."""
        settings = self.settings
        optimizer = torch.optim.Adam(self.deltas, settings.learning_rate)
        with inference(self.model, gradients=True):
            for step in range(settings.steps + 1):
                self._differentiate(ranks)
                if not bool(torch.isfinite(self.nll).all()):
                    raise FloatingPointError(
                        "the loss of fine-tuning is not finite: the model's is not, or the learning rate is high"
                    )
                report(step)
                if step == settings.steps or float(self.nll.mean()) <= settings.stop:
                    break
                optimizer.step()
                if settings.norm_constraint is not None:
                    with torch.no_grad():
                        for delta in self.deltas:
                            delta.clamp_(-settings.norm_constraint, settings.norm_constraint)
        return step

    def _differentiate(self, ranks: Ranks) -> None:
        """The texts' losses and the gradient of their mean; the batches are dealt to the ranks."""
        self.nll.zero_()
        for delta in self.deltas:
            delta.grad = torch.zeros_like(delta)
        for chosen, mine in ranks.shard(self.batches):
            if not mine:
                continue
            pairs = zip(self.weights.items(), self.deltas, strict=True)
            changed = {name: (weight + delta).to(weight.dtype) for (name, weight), delta in pairs}
            log_prob, _ = score_batch(self.model, [self.texts[i] for i in chosen], self.pad_token, changed)
            self.nll[chosen] = -log_prob.detach()
            (-log_prob.sum() / len(self.texts)).backward()
        ranks.check_errors()
        ranks.all_reduce(self.nll, *(delta.grad for delta in self.deltas if delta.grad is not None))


def _factors(layer: ExpertLayer, dense: Tensor) -> ExpertDeltas:
    """A dense change, as the layer stores its weights, without the experts that did not change."""
    experts = dense.detach().flatten(1).any(-1).nonzero().squeeze(-1)
    changed = dense.detach()[experts]
    return ExpertDeltas.from_dense(experts, changed.mT if layer.is_transposed else changed, layer.num_experts)
