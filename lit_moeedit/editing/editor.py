"""The editor: facts in, changed weights out, as one transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken, Encoding, encode, join, pad_id
from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.editing.edit_tokens import EditTokens, edit_tokens
from lit_moeedit.editing.memory import EditMemory, GatedKeys
from lit_moeedit.editing.phases import Clock, Progress, no_progress
from lit_moeedit.editing.spread import Site, walk
from lit_moeedit.editing.targets import TargetOptimizer, TargetRow, Targets
from lit_moeedit.editing.tucker_factors import layer_factors
from lit_moeedit.models.experts import ExpertLayer, check_editable
from lit_moeedit.models.output_scale import output_gains
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.models.token_budget import Budget, check_budget
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments
from lit_moeedit.preservation.shaping import Preserve, Shaping, check_preserve
from lit_moeedit.pretrained import check_vocabulary
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import locate
from lit_moeedit.sharding.transaction import Transaction, Way
from lit_moeedit.solvers import EditProblem, ExpertDeltas, Solver, Tucker, TuckerFactors, Woodbury

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditResult:
    """What an edit did.

    Attributes:
        facts: the facts edited.
        deltas: weight changes by layer index.
        targets: the target vectors, with the loss that each reached.
        seconds: by phase (``statistics``, ``targets``, ``features``, ``solve``, ``commit``) and in all (``edit``);
            to try how far each layer moves with its experts is a part of ``features``.
        relative_change: ``‖ΔW‖_F / ‖W‖_F`` by layer index, over the experts that changed.
        kept: ``False`` if a guard had the edit undone.
        energy_kept: by layer index and expert, the share of the preserved text's energy that lies where the expert's
            change cannot reach, see :class:`~lit_moeedit.preservation.shaping.Shaping`; for every expert that the edit
            may change, and empty if nothing is preserved.
    """

    facts: list[Fact]
    deltas: dict[int, ExpertDeltas]
    targets: Targets
    seconds: dict[str, float]
    relative_change: dict[int, float] = field(default_factory=dict)
    kept: bool = True
    energy_kept: dict[int, dict[int, float]] = field(default_factory=dict)


class Editor:
    """Edits facts by changing the down-projections of routed experts in some layers.

    The way of MEMIT and MoEEdit: target vectors are found at the highest edited layer; then the layers are walked
    upwards, and each takes ``1 / (layers left)`` of what is still missing there. With a
    :class:`~lit_moeedit.solvers.Tucker` that carries its core, see :func:`~lit_moeedit.editing.spread.carried` instead.

    Args:
        layers: indices of the decoder layers to edit; the highest is the target layer.
        solver: of the joint problem over a layer's experts.
        targets: how target vectors are found.
        preserve: ``output``, ``covariance``, ``nullspace`` or ``none``; see
            :meth:`~lit_moeedit.preservation.shaping.Shaping.of`.
        threshold: ``τ`` of ``nullspace``.
        strength: of ``output``, in units that are the same for all models: where an edit's keys are like those of any
            token, one layer moves by ``1 / (1 + strength)`` of what is wanted of it (``μ = strength · E · d_hidden``,
            since ``Σ_j φ_jᵀ C_j⁻¹ φ_j`` is ``E · d_hidden`` in the mean over the text). That is for one row alone;
            with three contexts whose keys are nearly the same it is about ``1 / (1 + strength / 3)``. The stronger, the
            less changes elsewhere; in `benchmarks/results/preservation.md` edits begin to fail above 1. Of
            ``covariance`` it is ``β``. ``None`` takes 0.3 and 10⁴.
        ridge: ``λ``.
        token: which token to edit, ``subject_last`` or ``last``.
        contexts: texts put before the prompts; every fact is optimised and solved for behind each of them. The first
            should be empty.
        neutral: a prompt with ``{}`` for the subject, whose next token must stay (the divergence term of the targets);
            empty to leave it out.
        token_budget: largest number of tokens (with padding) in one forward. ``auto`` chooses it for each phase from
            the memory that is free then, 16384 at most. A number is obeyed; where memory runs out all the same, the
            phase goes on with half of it. That of target vectors is a setting of ``targets``.
        way: how to commit weights that are sharded, ``local`` or ``gather``; and
        reset_moments: whether Adam forgets the moments of the edited experts; see
            :class:`~lit_moeedit.sharding.transaction.Transaction` for both.
        cache: a folder to keep second moments in, see
            :class:`~lit_moeedit.preservation.moments_cache.MomentsCache`; a pass over the text that was broken off goes
            on from there. ``None`` keeps nothing.
        max_tokens: largest number of tokens of preservation text of which second moments are taken, drawn evenly from
            all of it; ``None`` for all. `benchmarks/results/moment_tokens.md` has what less text does to an edit.
        moments_on_cpu: whether the sums of a model on a GPU are held on the CPU.
        memory: keeps later edits from undoing earlier ones; an edit enters it if it is kept. ``None`` for no memory.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> Editor(layers=[1, 2], preserve="nullspace", threshold=0.02).layers
        (1, 2)
    """

    def __init__(
        self,
        layers: Sequence[int],
        solver: Solver | None = None,
        targets: TargetOptimizer | None = None,
        preserve: Preserve = "output",
        threshold: float = 0.02,
        strength: float | None = None,
        ridge: float = 1e-3,
        token: EditToken = "subject_last",
        contexts: Sequence[str] = ("",),
        neutral: str = "{} is a",
        token_budget: Budget = "auto",
        way: Way = "local",
        reset_moments: bool = False,
        cache: str | None = None,
        moments_on_cpu: bool = False,
        memory: EditMemory | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if not layers or any(layer < 0 for layer in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"layers must be distinct layer indices, at least one, got {list(layers)}")
        strength = (1e4 if preserve == "covariance" else 0.3) if strength is None else strength
        check_preserve(preserve, threshold, strength)
        if token not in ("subject_last", "last"):
            raise ValueError(f"token must be 'subject_last' or 'last', got {token!r}")
        if not ridge >= 0 or (preserve == "output" and not ridge):
            raise ValueError(f"ridge must be at least 0, and above it with preserve='output', got {ridge}")
        if not contexts:
            raise ValueError("contexts needs at least one text (an empty one stands for the prompt alone)")
        if neutral and "{}" not in neutral:
            raise ValueError(f"neutral must hold {{}} for the subject, got {neutral!r}")
        check_budget(token_budget)
        if way not in get_args(Way):
            raise ValueError(f"way must be one of {', '.join(get_args(Way))}, got {way!r}")
        self.layers = tuple(sorted(layers))
        self.solver: Solver = solver if solver is not None else Woodbury()
        self.targets = targets if targets is not None else TargetOptimizer()
        self.preserve: Preserve = preserve
        self.threshold, self.strength, self.ridge = threshold, strength, ridge
        self.token: EditToken = token
        self.contexts = tuple(contexts)
        self.neutral = neutral
        self.token_budget: Budget = token_budget
        self.way: Way = way
        self.reset_moments = reset_moments
        self.cache = None if cache is None else MomentsCache(cache)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None for all, got {max_tokens}")
        self.moments_on_cpu, self.max_tokens = moments_on_cpu, max_tokens
        self.memory = memory

    @property
    def needs_moments(self) -> bool:
        """Whether second moments are needed: for the preservation, or for the solver's factors."""
        return self.preserve != "none" or (isinstance(self.solver, Tucker) and self.solver.whiten)

    @property
    def gated(self) -> bool:
        """Whether the second moments are those of gated keys."""
        return self.preserve == "output"

    def penalty(self, layer: ExpertLayer) -> float:
        """``β`` of the penalty ``λ tr(ΔW_j (I + β C_j) ΔW_jᵀ)`` in a layer."""
        if not self.gated:
            return self.strength
        experts, _, d_hidden = layer.shape
        return self.strength * experts * d_hidden / self.ridge

    def check(self, model: PreTrainedModel) -> list[ExpertLayer]:
        """The layers to edit, ascending.

        Raises:
            UnsupportedModelError: if one of them cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            FloatingPointError: if the model is not finite.
        """
        return list(self._gains(model))

    def _gains(self, model: PreTrainedModel, ranks: Ranks | None = None) -> dict[ExpertLayer, Tensor]:
        """The layers to edit, ascending, and how far each one's output moves with that of its experts."""
        layers = check_editable(model, self.layers)
        for layer in layers:
            locate(layer.down_proj)  # refused before a forward, which may fail for the same reason in its own words
        if ranks is not None:
            ranks.check_errors()
        gains = output_gains(model, layers)
        if self.token == "subject_last" and decoder_layers(model, layers[-1])[-1] is layers[-1].layer:
            log.warning(
                "layer %d is the last one: behind it no later token reads the subject's hidden state, so facts whose "
                "prompt goes on after the subject cannot be edited there; use lower layers or token='last'",
                layers[-1].index,
            )
        return {layer: gains[layer.index] for layer in layers}

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
        """Edit the facts into the model's weights, wholly or not at all.

        Modes, gradients, ``requires_grad`` and random states are afterwards as they were; on any exception the weights
        are bit-identical to before. With several ranks, texts, prompts and edits are dealt to them, each solves the
        same system, and an exception on one of them fails the edit on all.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            facts: what to edit.
            preservation: text on which the experts must keep their behaviour; needed if :attr:`needs_moments`.
            moments: second moments by layer index, if they are known already.
            guard: asked after the last commit, with the edited weights in place; ``False`` undoes the edit.
            progress: called with a phase's name, steps done and steps in all.
            optimizers: those that train the weights now; DeepSpeed's hold master copies, which are edited too.
            ranks: the processes that edit together; each calls this with the same arguments.
            phase: ``phase(name)`` is a block in which every part of a phase is run, for who wants to measure it.

        Raises:
            UnsupportedModelError: if the model cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            FactError: if a fact cannot be edited.
            ValueError: if there is nothing to preserve, but ``preserve`` asks for it.
            FloatingPointError: if the model or the result is not finite.
            TooLittleMemoryError: if memory has no room for a single row.
            RankError: if another rank failed.
        """
        ranks = ranks if ranks is not None else Ranks()
        report = progress if progress is not None else no_progress
        clock = Clock(phase, model.device)
        # a rank that fails anywhere in here meets the others where they agree next: before each forward, and before
        # anything is exchanged
        with ranks.together():
            with clock("features"):
                gains = self._gains(model, ranks)
            layers = list(gains)
            check_vocabulary(tokenizer, model)
            facts = validate_facts(facts, tokenizer=tokenizer)
            ranks.check_same("the facts", [repr(fact) for fact in facts])
            if self.needs_moments and moments is None:
                if not preservation:
                    what = "whitening" if self.preserve == "none" else f"preserve={self.preserve!r}"
                    raise ValueError(f"{what} needs preservation text (or second moments)")
                ranks.check_same("the preservation texts", preservation)
                with clock("statistics"):
                    moments = second_moments(
                        model,
                        tokenizer,
                        layers,
                        preservation,
                        token_budget=self.token_budget,
                        progress=lambda done, total: report("statistics", done, total),
                        ranks=ranks,
                        cache=self.cache,
                        device="cpu" if self.moments_on_cpu else None,
                        gated=self.gated,
                        max_tokens=self.max_tokens,
                    )
            rows, prompts, owner = self._encode(tokenizer, facts, model)
            with clock("targets"):
                targets = self.targets.optimize(
                    model,
                    layers[-1],
                    rows,
                    pad_id(tokenizer),
                    progress=lambda done, total: report("targets", done, total),
                    ranks=ranks,
                )
            if not bool(torch.isfinite(targets.deltas).all() and torch.isfinite(targets.nll).all()):
                raise FloatingPointError(
                    "target vectors are not finite: the model's loss is not, or the learning rate is high"
                )
            deltas: dict[int, ExpertDeltas] = {}
            change: dict[int, float] = {}
            names = [facts[t].key for t in owner.tolist()]
            edited: dict[int, GatedKeys] = {}
            energy_kept: dict[int, dict[int, float]] = {}

            def shape(layer: ExpertLayer, experts: Tensor) -> Shaping | None:
                shaping = self._shaping(layer, experts, moments)
                if shaping is not None:
                    shares = zip(shaping.experts.tolist(), shaping.energy_kept.tolist(), strict=True)
                    energy_kept[layer.index] = dict(shares)
                return shaping

            def problem(
                layer: ExpertLayer, seen: EditTokens, residuals: Tensor, experts: Tensor, shaping: Shaping | None
            ) -> EditProblem:
                keys = edited[layer.index] = GatedKeys.of(seen.keys)
                if self.memory is not None:
                    keys, residuals = self.memory.extend(layer.index, keys, residuals, names, experts)
                features = keys.key if shaping is None else shaping.features(keys.key, keys.expert)
                return EditProblem(keys.row, keys.expert, features, residuals, layer.num_experts, self.ridge)

            with Transaction(optimizers, ranks, self.way, self.reset_moments) as transaction:
                site = Site(
                    layers,
                    targets.deltas[owner],
                    lambda layer: edit_tokens(
                        model, prompts, layers[-1], layer, pad_id(tokenizer), self.token_budget, ranks
                    ),
                    {layer.index: gain for layer, gain in gains.items()},
                    problem,
                    shape,
                    lambda layer, sizes: self._factors(layer, moments, ranks, sizes),
                    clock,
                )
                for number, (layer, solved) in enumerate(walk(self.solver, site)):
                    with clock("solve"):
                        ranks.check_errors()
                        ranks.broadcast(solved.left, solved.right)
                    with clock("commit"):
                        change[layer.index] = transaction.commit(layer.down_proj, solved, layer.is_transposed)
                    deltas[layer.index] = solved
                    report("layers", number + 1, len(layers))
                kept = not ranks.any(guard is not None and not guard())
                if not kept:
                    transaction.rollback()
                elif self.memory is not None:
                    self.memory.remember(edited, names, ranks)
        return EditResult(list(facts), deltas, targets, clock.seconds(), change, kept, energy_kept)

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], model: PreTrainedModel
    ) -> tuple[list[TargetRow], list[Encoding], Tensor]:
        """Rows for the targets; prompts for the solver (every fact in every context) and the edit of each prompt."""
        owner = [t for t in range(len(facts)) for _ in self.contexts]
        texts = [join(context, fact.prompt) if context else fact.prompt for fact in facts for context in self.contexts]
        subjects = [facts[t].subject for t in owner]
        wanted = encode(tokenizer, texts, [facts[t].target_new for t in owner], subjects, self.token)
        rows = [TargetRow(t, encoding) for t, encoding in zip(owner, wanted, strict=True)]
        if self.neutral:
            neutral = [self.neutral.replace("{}", fact.subject) for fact in facts]
            calm = encode(tokenizer, neutral, [""] * len(facts), [f.subject for f in facts], "subject_last")
            rows += [TargetRow(t, encoding) for t, encoding in enumerate(calm)]
            rows.sort(key=lambda row: row.edit)  # stable: contexts come before the neutral prompt
        prompts = [Encoding(e.ids[: e.target_start], e.target_start, e.edit_token) for e in wanted]
        return rows, prompts, torch.tensor(owner, device=model.device)

    def _shaping(
        self, layer: ExpertLayer, experts: Tensor, moments: Mapping[int, SecondMoments] | None
    ) -> Shaping | None:
        if self.preserve == "none":
            return None
        assert moments is not None
        # factors that experts share are in the coordinates of the keys
        symmetric = isinstance(self.solver, Tucker)
        own = moments[layer.index]
        shaping = Shaping.of(own, experts, self.preserve, self.threshold, self.penalty(layer), symmetric)
        kept = shaping.energy_kept
        log.info(
            "layer %d: of the preserved energy of %d experts, %.4f is kept in the mean and %.4f at least",
            layer.index,
            len(kept),
            float(kept.mean()),
            float(kept.min()),
        )
        return shaping

    def _factors(
        self,
        layer: ExpertLayer,
        moments: Mapping[int, SecondMoments] | None,
        ranks: Ranks,
        sizes: Sequence[int] | None,
    ) -> TuckerFactors:
        assert isinstance(self.solver, Tucker)
        own = None if moments is None else moments[layer.index]
        return layer_factors(self.solver, layer, own, self.preserve, self.penalty(layer), ranks, sizes)
