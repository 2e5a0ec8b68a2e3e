"""Every phase of a run, rehearsed: the code of the run itself, with a model that has no numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_moeedit.data import Fact, Neighbour
from lit_moeedit.data.encoding import IGNORED_LABEL, pad_id, token_batches
from lit_moeedit.editing import PHASES, Editor, evaluate
from lit_moeedit.editing.evaluation import scoring_cost
from lit_moeedit.editing.targets import TargetRow, batch_cost
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.token_budget import LARGEST, Budget, fitting, forward_cost
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.fake_tensors import Cost, Numberless, Tally
from lit_moeedit.planning.simulated_ranks import RehearsedRanks, rehearsed_shards
from lit_moeedit.planning.simulated_zero import Sharding, sharded
from lit_moeedit.planning.zero_costs import ModelSize, building_cost, checkpoint_cost, held_in_training, training_cost
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments
from lit_moeedit.solvers import Tucker


@dataclass(frozen=True)
class Workload:
    """What a run works on.

    Attributes:
        edits: facts to edit.
        prompt_tokens: length of a fact's prompt; contexts come on top.
        target_tokens: length of a target.
        questions: prompts that an evaluation asks for each fact: its own, its paraphrases', its neighbours'.
        texts: preservation texts.
        text_tokens: length of each.
        rows: rows of a training batch of one rank.
        row_tokens: length of each.
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
        """Facts whose words are tokens of :class:`Words`."""
        rest = " is" * (self.prompt_tokens - 1)
        new, true = " new" * self.target_tokens, " true" * self.target_tokens
        facts = []
        for i in range(self.edits):
            others = [Neighbour(f"other{i}-{j}{rest}", true[1:]) for j in range(1, self.questions)]
            facts.append(Fact(f"fact{i}", f"fact{i}{rest}", new[1:], true[1:], neighbours=tuple(others)))
        return facts


@dataclass(frozen=True)
class Budgets:
    """Largest numbers of tokens in one forward, as a run has them.

    Attributes:
        forward: of statistics and features.
        targets: of batches of edits.
        evaluation: of prompts that are scored.
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
        """The numbers in the settings of an editor, or those that ``auto`` chooses.

        Args:
            editor: of the run.
            model: with or without numbers.
            layer: the target layer.
            rows: of each edit, for its target.
            work: what the run works on.
            free: bytes that a device has free; ``None`` for as many as are wanted.
        """

        def chosen(given: Budget, cost: float) -> int:
            if isinstance(given, int):
                return given
            return LARGEST if free is None else fitting(cost, free)

        scored = work.target_tokens / (work.prompt_tokens + work.target_tokens)
        return cls(
            chosen(editor.token_budget, forward_cost(model, layer)),
            chosen(editor.targets.token_budget, batch_cost(model, layer, rows)),
            chosen(editor.token_budget, scoring_cost(model, scored)),
        )


class Words:
    """A tokenizer to which every word is a token."""

    is_fast = True
    pad_token_id = 0

    def __len__(self) -> int:
        return 2

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """Ids and offsets, as tokenizers of transformers give them."""
        if isinstance(texts, str):
            return {name: rows[0] for name, rows in self([texts]).items()}
        spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
        ids = [[1] * len(row) for row in spans]
        return {"input_ids": ids, "offset_mapping": spans, "special_tokens_mask": [[0] * len(row) for row in spans]}


@contextmanager
def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """A causal language model whose weights have shapes and no numbers, to be used in this block.

    Args:
        config: of transformers.
        dtype: of the weights.
    """
    with Numberless(), no_init_weights():
        yield AutoModelForCausalLM.from_config(config, dtype=dtype)


def rehearse(
    module: LitMoE, editor: Editor, sharding: Sharding, work: Workload, card: float | None = None
) -> tuple[list[Cost], Budgets]:
    """Run every phase of a run that edits after some training step, as one of its ranks, without numbers.

    Args:
        module: with a ``model`` that :func:`empty_model` made, within its block.
        editor: of the run.
        sharding: how it is sharded.
        work: what it works on.
        card: bytes of memory of a device, by which token budgets that are ``auto`` are chosen; ``None`` for no limit.

    Returns:
        what each phase takes, in order; and the token budgets of the edit.

    Raises:
        UnsupportedModelError: if a layer cannot be edited.
    """
    model = module.model
    assert model is not None
    layers = editor.check(model)
    size = ModelSize.of(model, sharding)
    with rehearsed_shards([layer.down_proj for layer in layers], sharding, lambda size: tally.send(size)) as held:
        tally = Tally([*model.parameters(), *model.buffers(), *held], held_in_training(size, sharding), sharding.on_cpu)
        with tally:
            _train(module, sharding, work, tally)
            with sharded(model, sharding, tally.send):
                budgets = _edit(model, layers, editor, sharding, work, tally, card)
    passes = tally.phases.pop("training step")
    costs = [
        building_cost(size, sharding, module.hparams["pretrained"] is not None),
        training_cost(size, sharding, passes),
        *(tally.phases[name] for name in (*PHASES, "evaluation") if name in tally.phases),
        checkpoint_cost(size, sharding),
    ]
    return costs, budgets


def _train(module: LitMoE, sharding: Sharding, work: Workload, tally: Tally) -> None:
    """The forward and the backward pass of a training step."""
    ids = torch.zeros(work.rows, work.row_tokens, dtype=torch.long)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED_LABEL)
    mask[0, -1] = 0  # rows have different lengths, so that masks are needed
    labels[:, -work.target_tokens :] = 0
    # what the step asks of a trainer
    trainer = SimpleNamespace(world_size=sharding.ranks)
    vars(module).update({"_trainer": trainer, "log": _nothing, "_total": lambda tensor: tensor})
    module.train()
    with sharded(module, sharding, tally.send, gradients=True) as reduce, tally.phase("training step"):
        module.training_step({"input_ids": ids, "attention_mask": mask, "labels": labels}, 0).backward()
        reduce()


def _nothing(*args: Any, **options: Any) -> None:
    return


def _edit(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    editor: Editor,
    sharding: Sharding,
    work: Workload,
    tally: Tally,
    card: float | None = None,
) -> Budgets:
    def ranks(rounds: int | None = None) -> RehearsedRanks:
        return RehearsedRanks(sharding, tally.send, tally.repeated, rounds)

    tokenizer: Any = Words()
    facts = work.facts()
    editor = copy(editor)
    editor.memory, editor.solver = None, copy(editor.solver)
    if isinstance(editor.solver, Tucker):
        editor.solver.cache = None
    rows = editor._encode(tokenizer, facts, model)[0]
    by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
    # a run has its second moments before it asks what is free
    held = sum(4 * layer.num_experts * layer.shape[2] ** 2 for layer in layers) if editor.needs_moments else 0
    free = None if card is None else max(0.0, card - tally.alive - (0 if editor.moments_on_cpu else held))
    budgets = Budgets.of(editor, model, layers[-1], by_edit, work, free)
    steps, editor.targets = editor.targets.steps, copy(editor.targets)
    editor.token_budget, editor.targets.token_budget = budgets.forward, budgets.targets
    moments: dict[int, SecondMoments] | None = None
    if editor.needs_moments:
        texts = work.texts
        if editor.max_tokens is not None:
            texts = min(texts, -(-editor.max_tokens // work.text_tokens))
        batches = list(token_batches([work.text_tokens] * texts, budgets.forward))
        batch = [" ".join(["word"] * work.text_tokens)] * len(batches[0])
        rounds = -(-len(batches) // sharding.ranks)
        with tally.phase("statistics"):
            moments = second_moments(
                model,
                tokenizer,
                layers,
                batch,
                budgets.forward,
                ranks=ranks(rounds),
                gated=editor.gated,
                grouped=not sharding.on_cpu,
            )
            if editor.moments_on_cpu and not sharding.on_cpu:
                tally.offload(sum(summed.total.nbytes for summed in moments.values()))

    def guard() -> bool:
        with tally.phase("evaluation"):
            evaluate(model, tokenizer, facts, token_budget=budgets.evaluation, ranks=ranks())
        return True

    editor.targets.steps = 1
    with tally.phase("targets"):
        editor.targets.optimize(model, layers[-1], rows, pad_id(tokenizer), ranks=ranks())
    one = tally.phases.pop("targets")
    editor.targets.steps = 2
    options: Any = {"optimizers": ["Adam"], "ranks": ranks(), "phase": tally.phase}
    editor.edit(model, tokenizer, facts, moments=moments, guard=guard, **options)
    # every step is like the second
    two = tally.phases["targets"]
    sent, flops = one.sent + (steps - 1) * (two.sent - one.sent), one.flops + (steps - 1) * (two.flops - one.flops)
    tally.phases["targets"] = replace(two, sent=sent, flops=flops)
    return budgets
