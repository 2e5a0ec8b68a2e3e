"""The reason why edits were lost: parts of the just-edited model put back into the final one, and measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import Evaluation, evaluate
from lit_moeedit.editing.phases import Progress
from lit_moeedit.models.parts import EDITED_LAYERS, KEY_MAKERS, ModelPart, find_parts, stored_tensors
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.sharding.backends import refuse_parallelism
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.lending import exchanged
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)

CARRIES = 0.5
"""Share of the loss from which on a part counts as the one that carries it."""
ADVICE = "replay the edited facts while training goes on: the callback EditReplay, see docs/durability.md"
_JOINED = (KEY_MAKERS, EDITED_LAYERS)


@dataclass(frozen=True)
class Score:
    """The edited facts in one model.

    Attributes:
        generated: number of facts whose new target is generated.
        efficacy: share of facts whose new target is likelier than the true one; NaN if no true one is known.
        generalization: the same of their paraphrases; NaN if there are none.
    """

    generated: int
    efficacy: float
    generalization: float

    @classmethod
    def of(cls, evaluation: Evaluation) -> Self:
        """Return the score of an evaluation."""
        metrics = evaluation.metrics
        return cls(int(evaluation.edits_exact.sum()), metrics["efficacy"], metrics["generalization"])


@dataclass(frozen=True)
class PutBack:
    """A part of the just-edited model, put back into the final one.

    Attributes:
        name: name of the part.
        parameters: number of its elements.
        moved: distance from the just-edited to the final one, as a share of the norm of the just-edited one.
        score: the edited facts with this part put back.
        explained: share of the loss that this part explains: the facts that it brings back, net of those that it
            loses, of those that were lost. ``None`` if nothing was lost.
    """

    name: str
    parameters: int
    moved: float
    score: Score
    explained: float | None


@dataclass(frozen=True)
class Autopsy:
    """The reason why edits were lost.

    Attributes:
        facts: number of edited facts.
        layers: indices of the edited layers.
        edited: the facts in the just-edited model.
        final: the facts in the final one.
        parts: the parts put back one at a time: disjoint ones first, then larger ones that are made of them.
        lost: prompts of the facts that were generated right after the edit and are not in the end.
    """

    facts: int
    layers: tuple[int, ...]
    edited: Score
    final: Score
    parts: tuple[PutBack, ...]
    lost: tuple[str, ...]

    @property
    def has_lost(self) -> bool:
        """True if fewer facts are generated than right after the edit."""
        return self.final.generated < self.edited.generated

    @property
    def carrier(self) -> PutBack | None:
        """The part that carries the loss: a disjoint one if there is one, else a larger one."""
        for group in (False, True):
            found = [part for part in self.parts if (part.name in _JOINED) is group and part.explained is not None]
            best = max(found, key=lambda part: (part.explained, -part.parameters), default=None)
            if best is not None and best.explained is not None and best.explained >= CARRIES:
                return best
        return None

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        known, best = f"{self.final.generated} of {self.facts}", self.carrier
        if not self.has_lost:
            return f"nothing was lost: {known} edits are generated, right after the edit {self.edited.generated}"
        if best is None:
            return (
                f"{known} edits are generated, right after the edit {self.edited.generated}, and no part alone brings "
                f"back half of what was lost: it was moved by several together"
            )
        text = (
            f"training moved {_in_words(best.name)}: put back, {best.score.generated} of {self.facts} edits are "
            f"generated again ({self.final.generated} without)"
        )
        whole = next((part for part in self.parts if part.name == KEY_MAKERS), None)
        if whole is not None and best.name != KEY_MAKERS and whole.score.generated > best.score.generated:
            text += f"; with {_in_words(KEY_MAKERS)}, {whole.score.generated}"
        return text

    @property
    def advice(self) -> str | None:
        """The remedy; ``None`` if nothing was lost."""
        return ADVICE if self.has_lost else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types; ``None`` stands for NaN."""
        result: dict[str, Any] = _without_nan(asdict(self))
        carrier = None if self.carrier is None else self.carrier.name
        return result | {"verdict": self.verdict, "advice": self.advice, "carrier": carrier}


def autopsy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    layers: Sequence[int],
    edited: Mapping[str, Part],
    just_edited: Evaluation | None = None,
    *,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Autopsy:
    """Put parts of the just-edited model back into the final one, one at a time, and measure the edited facts.

    The model has its own weights afterwards, bit by bit, also if this fails or is interrupted. Memory is needed for the
    model, for one part in main memory, and for one more weight. Works in one process, under DDP and under DeepSpeed
    ZeRO, where each rank exchanges what it holds.

    Args:
        model: the final model.
        tokenizer: its tokenizer.
        facts: the edited facts.
        layers: indices of the edited layers.
        edited: the weights of the just-edited model by their names, see
            :func:`~lit_moeedit.models.parts.stored_tensors`. Parts of which it lacks a weight are left out.
        just_edited: the evaluation of these facts in the just-edited model. Without it all weights are exchanged at
            once, which needs memory for a second model.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that hold the model. Each calls this with the same arguments.
        progress: called with a phase's name, the number of parts done, and their total number.

    Raises:
        ValueError: if there are no facts, a weight has another shape, or weights that are needed are missing.
        UnsupportedModelError: if a layer has no routed experts.
        UnsupportedShardingError: if the model is sharded in a way that cannot be read.
        RankError: if another rank failed.
    """
    refuse_parallelism(model)
    if not facts:
        raise ValueError("there are no facts to measure; give those that were edited")
    ranks = ranks or Ranks.current()
    known = [replace(fact, neighbours=()) for fact in facts]  # they tell nothing of what was lost
    tensors = stored_tensors(model)

    def measure() -> Evaluation:
        return evaluate(model, tokenizer, known, token_budget=token_budget, ranks=ranks)

    final = measure()
    if just_edited is None:
        lacking = [name for name in tensors if name not in edited]
        if lacking:
            raise ValueError(f"the just-edited model lacks {first_few(lacking)}: give its evaluation, too")
        with exchanged(tensors, edited, ranks):
            just_edited = measure()
    before, now = Score.of(just_edited), Score.of(final)
    found = [part for part in find_parts(model, layers) if all(name in edited for name in part.weights)]
    parts = []
    for number, part in enumerate(found):
        if progress is not None:
            progress("parts", number, len(found))
        parts.append(_put_back(part, tensors, edited, measure, before, now, ranks))
    gone = just_edited.edits_exact & ~final.edits_exact
    lost = tuple(fact.prompt for fact, is_gone in zip(known, gone.tolist(), strict=True) if is_gone)
    return Autopsy(len(known), tuple(sorted(layers)), before, now, tuple(parts), lost)


def _put_back(
    part: ModelPart,
    tensors: Mapping[str, Tensor],
    edited: Mapping[str, Part],
    measure: Callable[[], Evaluation],
    before: Score,
    now: Score,
    ranks: Ranks,
) -> PutBack:
    with exchanged({name: tensors[name] for name in part.weights}, edited, ranks) as movement:
        score = Score.of(measure()) if movement.distance else now  # what did not move changes nothing
    lost = before.generated - now.generated
    explained = (score.generated - now.generated) / lost if lost > 0 else None
    return PutBack(part.name, movement.elements, movement.relative, score, explained)


def _in_words(name: str) -> str:
    """Return a part's name as a sentence has it."""
    if name in (KEY_MAKERS, "embeddings", "above and head", "other layers below"):
        return {"above and head": "the layers above and the head", "embeddings": "the embeddings"}.get(name, name)
    return f"the {name}" + ("" if name == EDITED_LAYERS else " of the edited layers")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
