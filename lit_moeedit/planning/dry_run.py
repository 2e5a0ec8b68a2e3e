"""A dry run of every phase: the code of the run itself, with a model of fake tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_moeedit.data import Fact, Neighbour
from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, pad_id, token_batches
from lit_moeedit.editing import PHASES, Editor, evaluate
from lit_moeedit.editing.evaluation import scoring_cost
from lit_moeedit.editing.held_states import edit_prompts, edit_states, relative_distance
from lit_moeedit.editing.phrasings import candidate_prompts
from lit_moeedit.editing.target_rows import TargetRow
from lit_moeedit.editing.targets import batch_cost
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.models.token_budget import GPU_TOKENS, MAX_TOKENS, Budget, forward_cost, tokens_that_fit
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.fake_tensors import Cost, CostCounter, FakeFloatMode
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.simulated_ranks import SimulatedRanks, simulated_shards
from lit_moeedit.planning.simulated_zero import sharded
from lit_moeedit.planning.upkeep import HELD, REPLAYED, TRAINING, Upkeep
from lit_moeedit.planning.zero_costs import ModelSize, building_cost, checkpoint_cost, held_in_training, training_cost
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments, sums_fit
from lit_moeedit.replay import Statements, append_rows, as_batch

Step = Callable[[LitMoE, Any], Tensor]
"""Computes the loss of a batch, from the module and the batch."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a run's data.

    Attributes:
        edits: number of facts to edit.
        prompt_tokens: length of a fact's prompt, without a context.
        target_tokens: length of a target.
        questions: number of prompts that an evaluation scores for each fact: its own, its paraphrases, its neighbours.
        texts: number of preservation texts.
        text_tokens: length of a preservation text.
        rows: number of rows of one rank's training batch.
        row_tokens: length of a row.
    """

    edits: int = 50
    prompt_tokens: int = 20
    target_tokens: int = 3
    questions: int = 13
    texts: int = 100_000
    text_tokens: int = 512
    rows: int = 16
    row_tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def facts(self) -> list[Fact]:
        """Make facts whose words are tokens of :class:`Words`. Each asks in its own words, for further prompts."""
        rest = " is" * (self.prompt_tokens - 1)
        new, true = " new" * self.target_tokens, " true" * self.target_tokens
        # CounterFact has two paraphrases and ten neighbours
        paraphrases = min(2, (self.questions - 1) // 2)
        facts = []
        for i in range(self.edits):
            again = tuple(f"again{i}-{j}{rest}" for j in range(paraphrases))
            others = [Neighbour(f"other{i}-{j}{rest}", true[1:]) for j in range(1 + paraphrases, self.questions)]
            facts.append(Fact(f"fact{i}", f"fact{i}.{i}{rest}", new[1:], true[1:], again, tuple(others)))
        return facts


@dataclass(frozen=True)
class Budgets:
    """A run's maximum numbers of tokens in one forward.

    Attributes:
        forward: number of tokens for statistics and features.
        targets: number of tokens of a batch of edits.
        evaluation: number of tokens of prompts that are scored.
    """

    forward: int
    targets: int
    evaluation: int

    @classmethod
    def of(
        cls,
        editor: Editor,
        model: PreTrainedModel,
        layer: ExpertLayer,
        rows: Sequence[Sequence[TargetRow]],
        work: Workload,
        free: float | None,
    ) -> Budgets:
        """Take the budgets from an editor's settings, or choose those that are ``auto``.

        Args:
            editor: the run's editor.
            model: the model, real or fake.
            layer: the target layer.
            rows: rows for the target of each edit.
            work: sizes of the run's data.
            free: bytes of free memory of a device; ``None`` for no limit.
        """

        def chosen(given: Budget, cost: float, maximum: int = MAX_TOKENS) -> int:
            if isinstance(given, int):
                return given
            return MAX_TOKENS if free is None else tokens_that_fit(cost, free, maximum)

        scored = work.target_tokens / (work.prompt_tokens + work.target_tokens)
        return cls(
            chosen(editor.token_budget, forward_cost(model, layer), GPU_TOKENS),
            chosen(editor.targets.token_budget, batch_cost(model, layer, rows)),
            chosen(editor.token_budget, scoring_cost(model, scored)),
        )


class Words:
    """A tokenizer that makes a token of every word."""

    is_fast = True
    pad_token_id = 0

    def __len__(self) -> int:
        return 2

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """Return ids and offsets, as tokenizers of transformers do."""
        if isinstance(texts, str):
            return {name: rows[0] for name, rows in self([texts]).items()}
        spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
        ids = [[1] * len(row) for row in spans]
        return {"input_ids": ids, "offset_mapping": spans, "special_tokens_mask": [[0] * len(row) for row in spans]}


@contextmanager
def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """Make a causal language model of fake weights, which can be used within this block.

    Args:
        config: a config of transformers.
        dtype: dtype of the weights.
    """
    with FakeFloatMode(), no_init_weights():
        yield AutoModelForCausalLM.from_config(config, dtype=dtype)


def simulate(
    module: LitMoE,
    editor: Editor,
    sharding: Sharding,
    work: Workload,
    card: float | None = None,
    upkeep: Upkeep | None = None,
) -> tuple[list[Cost], Budgets]:
    """Simulate every phase of a run that edits after some training step, as one of its ranks, with fake tensors.

    Args:
        module: a module with a ``model`` from :func:`empty_model`, within its block.
        editor: the run's editor.
        sharding: sharding of the model.
        work: sizes of the run's data.
        card: bytes of a device's memory, from which token budgets that are ``auto`` are chosen; ``None`` for no limit.
        upkeep: what keeps the edits afterwards; ``None`` for nothing.

    Returns:
        The costs of the phases, in order, and the token budgets of the edit. Training steps that state edited facts or
        hold them follow that without, and a renewal the evaluation.

    Raises:
        UnsupportedModelError: if a layer cannot be edited.
    """
    model, upkeep = find_model(module), upkeep or Upkeep()
    layers = editor.check(model)
    size = ModelSize.of(model, sharding)
    with simulated_shards([layer.down_proj for layer in layers], sharding, lambda size: counter.send(size)) as held:
        counter = CostCounter(
            [*model.parameters(), *model.buffers(), *held], held_in_training(size, sharding), sharding.on_cpu
        )
        with counter:
            _train(module, sharding, work, counter)
            if upkeep.replay is not None:
                rows = statements(work, editor, upkeep)[0]
                _train(module, sharding, work, counter, REPLAYED, _stating(rows, upkeep.replay.weight))
            if upkeep.hold is not None:
                holding = _holding(layers[-1], editor, work, upkeep.hold.rows)
                _train(module, sharding, work, counter, HELD, holding)
            with sharded(model, sharding, counter.send):
                budgets = _edit(model, layers, editor, sharding, work, counter, card, upkeep)
    phases = counter.phases
    steps = [training_cost(size, sharding, phases[name]) for name in (TRAINING, REPLAYED, HELD) if name in phases]
    costs = [
        building_cost(size, sharding, module.hparams["pretrained"] is not None),
        steps[0],
        *(upkeep.replayed_cost(step, phases) if step.phase == REPLAYED else step for step in steps[1:]),
        *(phases[name] for name in (*PHASES, "evaluation") if name in phases),
        *([upkeep.renewal_cost(phases)] if upkeep.renewal.are_wanted else ()),
        checkpoint_cost(size, sharding),
    ]
    return costs, budgets


def statements(work: Workload, editor: Editor, upkeep: Upkeep) -> tuple[list[Encoding], float]:
    """Return the statements of a rank's batch in a step that has some, the longest first, and their average number.

    Args:
        work: sizes of the run's data.
        editor: the run's editor, whose contexts are put before the prompts.
        upkeep: settings of the replay.
    """
    if upkeep.replay is None:
        return [], 0.0
    contexts = editor.contexts if upkeep.replay.contexts is None else upkeep.replay.contexts
    tokenizer: Any = Words()
    (own,) = Statements(tokenizer, contexts, facts=work.facts()[:1]).values()
    own = sorted(own, key=lambda encoding: -len(encoding.ids))
    expected = upkeep.expected(work.rows, work.row_tokens, sum(len(encoding.ids) for encoding in own) / len(own))
    return [own[number % len(own)] for number in range(ceil(expected))], expected


def _training_loss(module: LitMoE, batch: Any) -> Tensor:
    return module.training_step(batch, 0)


def _stating(rows: Sequence[Encoding], weight: float | None) -> Step:
    """Return a step with statements of edited facts.

    Args:
        rows: the statements.
        weight: weight of their loss in a forward of their own; ``None`` makes them rows of the batch.
    """

    def step(module: LitMoE, batch: Any) -> Tensor:
        if weight is None:
            return module.training_step(dict(append_rows(batch, rows, Words.pad_token_id)), 0)
        loss = module.training_step(batch, 0)
        return loss + weight * module.replay_loss(as_batch(rows, Words.pad_token_id))

    return step


def _holding(layer: ExpertLayer, editor: Editor, work: Workload, rows: int) -> Step:
    """Return a step that holds the hidden states at the edit tokens of edited facts.

    Args:
        layer: the highest edited layer.
        editor: the run's editor.
        work: sizes of the run's data.
        rows: number of prompts.
    """
    tokenizer: Any = Words()
    # whole prompts are an upper bound of those up to the subject
    every = editor.edits_every_token
    (own,) = edit_prompts(tokenizer, work.facts()[:1], editor.contexts, "last", every).values()
    own = sorted(own, key=len, reverse=True)
    prompts = [own[number % len(own)] for number in range(rows)]

    def step(module: LitMoE, batch: Any) -> Tensor:
        loss = module.training_step(batch, 0)
        states = edit_states(find_model(module), layer, prompts, Words.pad_token_id)
        return loss + relative_distance(states, torch.ones_like(states, device="cpu"))

    return step


def _train(
    module: LitMoE,
    sharding: Sharding,
    work: Workload,
    counter: CostCounter,
    name: str = TRAINING,
    step: Step = _training_loss,
) -> None:
    """Run the forward and the backward pass of a training step.

    Args:
        module: the module.
        sharding: sharding of the model.
        work: sizes of the run's data.
        counter: counts the step.
        name: name of the phase.
        step: computes the loss of a batch.
    """
    ids = torch.zeros(work.rows, work.row_tokens, dtype=torch.long)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED_LABEL)
    mask[0, -1] = 0  # rows differ in length, so that masks are needed
    labels[:, -work.target_tokens :] = 0
    # the parts of a Trainer that the step uses
    trainer = SimpleNamespace(world_size=sharding.ranks)
    vars(module).update({"_trainer": trainer, "log": lambda *_, **__: None, "_all_reduce": lambda tensor: tensor})
    module.train()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with sharded(module, sharding, counter.send, gradients=True) as reduce, counter.phase(name):
        torch.autograd.backward(step(module, batch))
        reduce()


def _find_all_prompts(editor: Editor, token_budget: int | None = None) -> None:
    """Have an editor take as many further prompts as it may, because no fake model knows one.

    Args:
        editor: the editor.
        token_budget: maximum number of tokens with which a model is asked for them; ``None`` if it is not asked.
    """
    asking = copy(editor)
    asking.token_budget = token_budget or "auto"

    def further(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], *args: Any) -> list[list[str]]:
        if token_budget is not None:
            Editor.find_phrasings(asking, model, tokenizer, facts, *args)
        return candidate_prompts(facts, editor.phrasings)

    def neutral(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], *args: Any) -> list[list[str]]:
        if token_budget is not None:
            Editor.find_neutral_prompts(asking, model, tokenizer, facts, *args)
        return candidate_prompts(facts, editor.neutral_prompts)

    vars(editor).update(find_phrasings=further, find_neutral_prompts=neutral)


def _edit(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    editor: Editor,
    sharding: Sharding,
    work: Workload,
    counter: CostCounter,
    card: float | None = None,
    upkeep: Upkeep | None = None,
) -> Budgets:
    def ranks(rounds: int | None = None) -> SimulatedRanks:
        return SimulatedRanks(sharding, counter.send, counter.repeated, rounds)

    tokenizer: Any = Words()
    facts = work.facts()
    editor = copy(editor)
    editor.memory, editor.solver = None, copy(editor.solver)
    editor.solver.cache = None
    _find_all_prompts(editor)
    encoded = editor.encode(tokenizer, facts)
    numbered = dict(enumerate(facts))
    rows = editor.with_neutral_prompts(model, tokenizer, numbered, encoded).rows
    by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
    # a run holds its second moments when it measures its free memory
    held = sum(4 * layer.num_experts * layer.shape[2] ** 2 for layer in layers) if editor.needs_moments else 0
    on_cpu = card is not None and not sums_fit(layers, card - counter.alive)
    free = None if card is None else max(0.0, card - counter.alive - (0 if on_cpu else held))
    budgets = Budgets.of(editor, model, layers[-1], by_edit, work, free)
    steps, editor.targets = editor.targets.steps, copy(editor.targets)
    _find_all_prompts(editor, budgets.evaluation)
    editor.token_budget, editor.targets.token_budget = budgets.forward, budgets.targets
    moments: dict[int, SecondMoments] | None = None
    if editor.needs_moments:
        texts = work.texts
        if editor.max_tokens is not None:
            texts = min(texts, -(-editor.max_tokens // work.text_tokens))
        batches = list(token_batches([work.text_tokens] * texts, budgets.forward))
        batch = [" ".join(["word"] * work.text_tokens)] * len(batches[0])
        rounds = -(-len(batches) // sharding.ranks)
        with counter.phase("statistics"):
            moments = second_moments(
                model,
                tokenizer,
                layers,
                batch,
                budgets.forward,
                ranks=ranks(rounds),
                device=model.device,
                gated=editor.gated,
                grouped=not sharding.on_cpu,
            )
            if on_cpu and not sharding.on_cpu:
                counter.offload(sum(summed.total.nbytes for summed in moments.values()))

    def guard() -> bool:
        with counter.phase("evaluation"):
            evaluate(model, tokenizer, facts, token_budget=budgets.evaluation, ranks=ranks())
        return True

    editor.targets.steps = 1
    with counter.phase("targets"):  # as an edit has it, which asks for neutral prompts once
        editor.with_neutral_prompts(model, tokenizer, numbered, encoded, ranks=ranks())
        editor.targets.optimize(model, layers[-1], rows, pad_id(tokenizer), ranks=ranks())
    one = counter.phases.pop("targets")
    editor.targets.steps = 2
    options: Any = {"optimizers": ["Adam"], "ranks": ranks(), "phase": counter.phase}
    editor.edit(model, tokenizer, facts, moments=moments, guard=guard, **options)
    # every step is like the second
    two = counter.phases["targets"]
    sent, flops = one.sent + (steps - 1) * (two.sent - one.sent), one.flops + (steps - 1) * (two.flops - one.flops)
    counter.phases["targets"] = replace(two, sent=sent, flops=flops)
    upkeep = upkeep or Upkeep()
    expected = statements(work, editor, upkeep)[1]
    for name, asked in upkeep.measurements(facts, ceil(expected), sharding.ranks).items():
        with counter.phase(name):
            evaluate(model, tokenizer, asked, token_budget=budgets.evaluation, ranks=ranks())
    return budgets
