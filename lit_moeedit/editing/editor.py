"""The editor: target vectors, second moments, and the spread of an edit over the layers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.data.encoding import EditToken, encode, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.job import EditJob
from lit_moeedit.editing.memory import EditMemory
from lit_moeedit.editing.phrasings import further_prompts, neutral_prompts
from lit_moeedit.editing.place import Tune
from lit_moeedit.editing.place_finding import PlaceFinding
from lit_moeedit.editing.spread import CarriedSpread, Spread
from lit_moeedit.editing.target_rows import EncodedFacts, TargetRow
from lit_moeedit.editing.targets import TargetOptimizer, Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments
from lit_moeedit.preservation.shaping import Preservation, PreservationName
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import Solver, Woodbury
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)

TargetTokens = Literal["auto", "first", "every"]
"""Values of the setting ``target_tokens`` of :class:`Editor`."""
ResidualOf = Literal["target_layer", "each_layer"]
"""Values of the setting ``residual_of`` of :class:`Editor`."""
ResidualShare = Literal["layers_left", "root_of_layers_left"]
"""Values of the setting ``residual_share`` of :class:`Editor`."""


class Editor(PlaceFinding):
    r"""Edits facts by changing the down-projections of routed experts in some layers.

    The method of MEMIT and MoEEdit: target vectors are found at the highest edited layer. Then the layers are edited
    upwards, and each takes ``1 / (layers left)`` of the residual that is left. With a solver that carries its solution,
    such as :class:`~lit_moeedit.solvers.Tucker`, :class:`~lit_moeedit.editing.spread.CarriedSpread` does this instead.

    At the ``i``-th of ``L`` edited layers ``l_1 < … < l_L`` with the output ``h_t^l`` of layer ``l`` at an edit token,

    .. math:: z_t = h_t^{l_L} + \delta_t, \qquad r_t^{(i)} = \frac{z_t - h_t^{m_i}}{s_i}, \qquad
              s_i = L - i + 1 \;\text{or}\; \sqrt{L - i + 1}, \qquad m_i = l_L \;\text{or}\; l_i,

    where ``z_t`` is measured before the edit, and ``h_t`` after the layers below have been edited. ``residual_of``
    chooses ``m_i``, ``residual_share`` chooses ``s_i``.

    Args:
        layers: indices of the decoder layers to edit; the highest is the target layer. ``auto`` finds them when the
            first edit begins, see :func:`~lit_moeedit.editing.locating.locate`.
        solver: solves the joint problem over a layer's experts.
        targets: finds the target vectors.
        preserve: a :class:`~lit_moeedit.preservation.Preservation`, or the name of one with its default settings:
            ``output``, ``covariance``, ``nullspace`` or ``none``.
        ridge: ``λ``.
        token: the token to edit, ``subject_last`` or ``last``; ``auto`` finds it like the layers.
        contexts: texts put before the prompts. Every fact is edited after each of them. The first should be empty.
        neutral: a prompt with ``{}`` for the subject, whose next token must stay the same (the divergence term of the
            targets); empty to leave it out.
        neutral_prompts: maximum number of further neutral prompts of each fact, see
            :func:`~lit_moeedit.editing.phrasings.neutral_prompts`: other facts' prompts with its subject that the model
            does not answer with the fact's truth, which it knows. At ``subject_last`` all questions about a subject
            read the edited state, and half of the answers to others may be lost without them. Never a text by which a
            fact is measured.
        token_budget: maximum number of tokens (with padding) in one forward. ``auto`` chooses it for each phase from
            the free memory, 16384 at most. If memory runs out, the phase continues with half of it. Target vectors have
            a setting of their own in ``targets``.
        reset_moments: whether to reset Adam's moments of the edited experts; see
            :class:`~lit_moeedit.sharding.transaction.Transaction`.
        cache: a folder for second moments, see :class:`~lit_moeedit.preservation.MomentsCache`. An interrupted pass
            over the text is resumed from there. ``None`` for no cache.
        memory: keeps later edits from undoing earlier ones. An edit that is kept is added to it. ``None`` for no
            memory.
        max_tokens: maximum number of tokens of preservation text used for second moments, sampled from all of it;
            ``None`` for all. `benchmarks/results/moment_tokens.md` shows the effect of less text.
        target_tokens: ``first`` for one row ``(k_t, r_t)`` per fact and context, at the edit token. ``every`` for
            further ones at each token of the target but its last, with the preceding tokens fed: token ``i`` of a
            target ``y`` gets the key ``k_{t,i} = k(prompt, y_1 … y_i)`` and a vector ``δ_{t,i}`` of its own, which
            makes ``y_{i+1}`` likely. All rows are solved in one system. For targets of one token both are the same.
            ``auto`` is ``every`` at the token ``last``, where one row steers the first token of the target only, and
            ``first`` at ``subject_last``, where later tokens can read the edit again. With ``loss_tokens="first"`` of
            the targets ``auto`` is ``first``, and ``every`` is refused.
        residual_of: the layer whose output is compared with ``z_t``: ``target_layer``, as in MEMIT and the papers after
            it, or ``each_layer`` its own, as in the code released with MoEEdit. That counts what the layers in between
            add anyway as missing, and takes another forward up to the target layer. A solver that carries its solution
            measures nothing at the lower layers, so it is refused with one.
        residual_share: what a layer takes of its residual: one over ``layers_left``, as in MEMIT, or one over the
            ``root_of_layers_left``, as in the code released with MoEEdit. The target layer takes the whole in any case.
        phrasings: maximum number of further prompts of each fact that enter as rows, with the target vectors of its own
            prompt; see :func:`~lit_moeedit.editing.phrasings.further_prompts`. They are other facts' prompts with its
            subject, so that a single fact has none, and never a text by which a fact is measured. The rows of a fact
            share the weight that it has without them.
        tune: choose the strength of the preservation, whether all layers or the target layer alone are edited,
            ``phrasings``, and the ``stop`` of ``targets`` when the first edit begins: by edits of some facts that are
            measured and undone, see :func:`~lit_moeedit.editing.locating.tune`. These settings then are what is tried
            first. ``True`` chooses by the score; ``"neighbours"`` by generalization, of the settings only that retain
            at most 1 % fewer neighbours than the given ones. It needs a preservation with a strength, and facts with
            paraphrases and neighbours.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> from lit_moeedit.preservation import NullSpace
        >>> Editor(layers=[1, 2], preserve=NullSpace(threshold=0.02)).layers
        (1, 2)
    """

    def __init__(
        self,
        layers: Sequence[int] | Literal["auto"],
        solver: Solver | None = None,
        targets: TargetOptimizer | None = None,
        preserve: Preservation | PreservationName = "output",
        ridge: float = 1e-3,
        token: EditToken | Literal["auto"] = "subject_last",
        contexts: Sequence[str] = ("",),
        neutral: str = "{} is a",
        token_budget: Budget = "auto",
        reset_moments: bool = False,
        cache: str | None = None,
        memory: EditMemory | None = None,
        max_tokens: int | None = None,
        target_tokens: TargetTokens = "auto",
        residual_of: ResidualOf = "target_layer",
        residual_share: ResidualShare = "layers_left",
        phrasings: int = 0,
        tune: Tune = False,
        neutral_prompts: int = 0,
    ) -> None:
        super().__init__(layers, token, preserve, phrasings, tune, contexts, token_budget, reset_moments)
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge must be at least 0 and finite, got {ridge}")
        if not isinstance(solver, Solver | None):
            raise ValueError(f"solver must be a Solver, got {solver!r}")
        if neutral and "{}" not in neutral:
            raise ValueError(f"neutral must contain {{}} for the subject, got {neutral!r}")
        if neutral_prompts < 0:
            raise ValueError(f"neutral_prompts must be at least 0, got {neutral_prompts}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None for all, got {max_tokens}")
        for name, value, kind in (
            ("target_tokens", target_tokens, TargetTokens),
            ("residual_of", residual_of, ResidualOf),
            ("residual_share", residual_share, ResidualShare),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        self.solver = solver if solver is not None else Woodbury()
        self.targets = targets if targets is not None else TargetOptimizer()
        if self.solver.carries and residual_of != "target_layer":
            name = type(self.solver).__name__
            raise ValueError(f"{name} carries its solution, so residual_of must be 'target_layer', got {residual_of!r}")
        if self.targets.loss_tokens == "first":
            if target_tokens == "every":
                raise ValueError("with loss_tokens='first' target_tokens must be 'first' or 'auto', got 'every'")
            target_tokens = "first"
        if self.preserve is not None:
            self.preserve.check(ridge)
        self.ridge, self.neutral, self.neutral_prompts = ridge, neutral, neutral_prompts
        self.cache = None if cache is None else MomentsCache(cache)
        self.memory, self.max_tokens, self.target_tokens = memory, max_tokens, target_tokens
        self.residual_of, self.residual_share = residual_of, residual_share

    @property
    def needs_moments(self) -> bool:  # type: ignore[override]
        """``True`` if the preservation or the solver needs second moments."""
        return self.preserve is not None or self.solver.needs_moments

    @property
    def gated(self) -> bool:
        """``True`` if the second moments are those of gated keys."""
        return self.preserve is not None and self.preserve.gated

    @property
    def edits_every_token(self) -> bool:
        """``True`` if the tokens of a target are edit tokens, too; as ``target_tokens`` says."""
        return self.target_tokens == "every" or (self.target_tokens == "auto" and self.token == "last")

    @property
    @override
    def name(self) -> str:
        return type(self.solver).__name__

    @override
    def find_layers(self, model: PreTrainedModel) -> list[ExpertLayer]:
        layers = super().find_layers(model)
        for layer in layers:
            self.solver.check(layer.shape)
            if self.memory is not None:
                self.memory.check(layer.index, layer.shape[2])
        return layers

    @override
    def check_facts(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> None:
        self.encode(tokenizer, facts)

    @override
    def check(self, model: PreTrainedModel, ranks: Ranks | None = None) -> list[ExpertLayer]:
        layers = super().check(model, ranks)
        if (
            self.is_resolved
            and self.token == "subject_last"
            and decoder_layers(model, layers[-1])[-1] is layers[-1].layer
        ):
            log.warning(
                "layer %d is the last layer: no later token reads the subject's hidden state after it, so a fact whose "
                "prompt continues after the subject cannot be edited there; use lower layers or token='last'",
                layers[-1].index,
            )
        return layers

    @override
    def prepare(self, job: EditJob) -> Spread:
        """Compute second moments of the preservation text and optimise the target vectors."""
        if self.memory is not None:
            self.memory.switch(job.model)
        moments = job.moments
        if self.needs_moments and moments is None:
            with job.clock("statistics"):
                moments = self.moments(
                    job.model,
                    job.tokenizer,
                    job.layers,
                    job.preservation,
                    progress=lambda done, total: job.report("statistics", done, total),
                    ranks=job.ranks,
                )
        encoded = self.encode(job.tokenizer, job.facts)
        targets = self._find_targets(job, encoded)
        if self.phrasings:
            encoded = self._with_phrasings(job, encoded)
        spread = CarriedSpread if self.solver.carries else Spread
        return spread(self, job, encoded, targets, moments)

    def _find_targets(self, job: EditJob, encoded: EncodedFacts) -> Targets:
        """Optimise the target vectors of the facts without known goals; those of the others are 0 here."""
        searched = [t for t, fact in enumerate(job.facts) if fact.key not in job.goals]
        count, device, wanted = len(job.facts), job.model.device, set(searched)
        width, rows = job.layers[-1].shape[1], Counter(encoded.fact_index)
        for t, fact in enumerate(job.facts):
            goal = job.goals.get(fact.key)
            if goal is not None and goal.shape != (rows[t], width):
                shapes = f"{[rows[t], width]}, but it is {list(goal.shape)}"
                raise ValueError(f"goals[{fact.key!r}] should be of shape {shapes}")
        of_vector = torch.tensor(encoded.vector_fact, device=device)
        whole = Targets(
            torch.zeros(len(of_vector), width, device=device),
            torch.full((count,), torch.nan, device=device),
            torch.zeros(count, dtype=torch.long, device=device),
            of_vector if len(of_vector) > count else None,
        )
        if not searched:
            return whole
        with job.clock("targets"):
            own, measured = {t: job.facts[t] for t in searched}, [*job.facts, *job.measured]
            encoded = self.with_neutral_prompts(job.model, job.tokenizer, own, encoded, measured, job.ranks)
            targets = self.targets.optimize(
                job.model,
                job.layers[-1],
                [row for row in encoded.rows if row.edit in wanted],
                pad_id(job.tokenizer),
                progress=lambda done, total: job.report("targets", done, total),
                ranks=job.ranks,
            )
        if not targets.are_finite:
            raise FloatingPointError(
                "target vectors are not finite: the model's loss is not, or the learning rate is too high"
            )
        stuck = targets.stuck.tolist()
        if any(stuck):
            prompts = first_few(
                repr(job.facts[t].prompt) for t, is_stuck in zip(searched, stuck, strict=True) if is_stuck
            )
            raise ValueError(
                f"no gradient reaches the target vectors of {sum(stuck)} of {len(stuck)} edits ({prompts}): after "
                f"layer {job.layers[-1].index} nothing that predicts a target reads its edit token, or a module passes "
                "no gradient, as quantised ones of some libraries. Use lower layers or token='last'"
            )
        if len(searched) == count:
            return targets
        facts = torch.tensor(searched, device=device)
        vectors = torch.isin(of_vector, facts).nonzero().squeeze(-1)
        return Targets(
            whole.deltas.index_copy(0, vectors, targets.deltas),
            whole.nll.index_copy(0, facts, targets.nll),
            whole.steps.index_copy(0, facts, targets.steps),
            whole.edit,
        )

    def _with_phrasings(self, job: EditJob, encoded: EncodedFacts) -> EncodedFacts:
        """Add further prompts of the facts without known goals, which say where a fact's own prompts go only."""
        facts = {t: fact for t, fact in enumerate(job.facts) if fact.key not in job.goals}
        token = cast("EditToken", self.token)
        with job.clock("features"):
            measured = [*job.facts, *job.measured]
            found = self.find_phrasings(job.model, job.tokenizer, [*facts.values()], measured, job.ranks)
            rows = [(t, text, fact) for (t, fact), own in zip(facts.items(), found, strict=True) for text in own]
            texts, targets = [text for _, text, _ in rows], [fact.target_new for *_, fact in rows]
            encodings = encode(job.tokenizer, texts, targets, [fact.subject for *_, fact in rows], token)
            if self.edits_every_token:
                encodings = [encoding.with_every_token() for encoding in encodings]
        log.info("further prompts of %d facts: %.1f each", len(facts), len(rows) / max(1, len(facts)))
        return encoded.with_prompts([(t, encoding) for (t, *_), encoding in zip(rows, encodings, strict=True)])

    def find_phrasings(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        measured: Sequence[Fact] = (),
        ranks: Ranks | None = None,
    ) -> list[list[str]]:
        """Find further prompts of some facts of an edit, see :func:`~.phrasings.further_prompts`."""
        token = cast("EditToken", self.token)
        return further_prompts(model, tokenizer, facts, self.phrasings, token, self.token_budget, ranks, measured)

    def with_neutral_prompts(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Mapping[int, Fact],
        encoded: EncodedFacts,
        measured: Sequence[Fact] = (),
        ranks: Ranks | None = None,
    ) -> EncodedFacts:
        """Add as many neutral prompts of facts, given by their indices, as :attr:`neutral_prompts` allows."""
        if not self.neutral_prompts:
            return encoded
        found = self.find_neutral_prompts(model, tokenizer, [*facts.values()], measured, ranks)
        first = {t: self.neutral.replace("{}", fact.subject) for t, fact in facts.items()}
        of_text = [(t, text) for t, own in zip(facts, found, strict=True) for text in own if text != first[t]]
        subjects = [facts[t].subject for t, _ in of_text]
        encodings = encode(tokenizer, [text for _, text in of_text], [""] * len(of_text), subjects, "subject_last")
        log.info("further neutral prompts of %d facts: %.1f each", len(facts), len(of_text) / max(1, len(facts)))
        return encoded.with_neutral([TargetRow(t, own) for (t, _), own in zip(of_text, encodings, strict=True)])

    def find_neutral_prompts(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        measured: Sequence[Fact] = (),
        ranks: Ranks | None = None,
    ) -> list[list[str]]:
        """Find further neutral prompts of some facts, see :func:`~.phrasings.neutral_prompts`."""
        return neutral_prompts(model, tokenizer, facts, self.neutral_prompts, self.token_budget, ranks, measured)

    def encode(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> EncodedFacts:
        """Encode facts in all contexts, and their neutral prompts."""
        # as long as it is not known, this checks one of the two
        token: EditToken = "subject_last" if self.token == "auto" else self.token
        return EncodedFacts.of(tokenizer, facts, self.contexts, self.neutral, token, self.edits_every_token)

    @override
    def count_rows(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[int]:
        rows = Counter(self.encode(tokenizer, facts).fact_index)
        return [rows[t] for t in range(len(facts))]

    def moments(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[ExpertLayer],
        preservation: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> Mapping[int, SecondMoments]:
        """Compute second moments of preservation text, as the settings need them.

        Raises:
            ValueError: if there is no text, or not the same on all ranks.
        """
        ranks = ranks or Ranks.current()
        if not preservation:
            what = type(self.solver if self.preserve is None else self.preserve).__name__
            raise ValueError(f"{what} needs preservation text (or second moments)")
        ranks.check_same("the preservation texts", preservation)
        return second_moments(
            model,
            tokenizer,
            layers,
            preservation,
            token_budget=self.token_budget,
            progress=progress,
            ranks=ranks,
            cache=self.cache,
            gated=self.gated,
            max_tokens=self.max_tokens,
        )
