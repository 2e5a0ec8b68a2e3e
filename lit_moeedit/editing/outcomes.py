"""The outcome of an edit, fact by fact: what was measured, and why a new target is not generated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.facts import Fact
from lit_moeedit.data.function_words import is_function_word
from lit_moeedit.editing.evaluation import Evaluation, evaluate
from lit_moeedit.editing.generation import MAX_ANSWER_TOKENS, answers
from lit_moeedit.editing.job import EditResult
from lit_moeedit.editing.measured import Measured
from lit_moeedit.editing.method import EditMethod
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import printable

Code = Literal[
    "function_word",
    "target_not_found",
    "layers_moved_too_little",
    "another_answer",
    "undone_by_training",
    "contradicted_by_training_text",
]
OnFailure = Literal["raise", "undo", "keep"]

FOUND_NLL = math.log(2)
"""Maximum loss per token (nats) of a target that counts as found: its tokens have a probability of one half on average,
so no other token is likelier."""
REACHED = 0.5
"""Maximum share of a target vector that may be left where the layers count as having moved enough."""
FAILED_SHARE = 0.5
"""An edit fails if more than this share of its facts are not generated."""


class FailedEditError(RuntimeError):
    """Raised for an edit of which most facts failed; the weights are bit-identical to before."""


@dataclass(frozen=True)
class Reason:
    """The reason why a new target is not generated.

    Attributes:
        code: kind of the reason.
        text: what happened, with figures.
        advice: what to try.
    """

    code: Code
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text}: {self.advice}"


_ADVICE: dict[Code, str] = {
    "function_word": "name the subject by a word of its own, or edit the token 'last'",
    "target_not_found": "try more steps, a higher learning rate or clamp of the targets, or lower layers",
    "layers_moved_too_little": "try more layers, a smaller ridge, or less preservation",
    "another_answer": "try lower layers, the other token, or more contexts",
    "undone_by_training": "try renew_every_n_steps, a later edit, or a lower learning rate",
    "contradicted_by_training_text": "leave such statements out of the training text after the edit",
}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    baseline: dict[str, list[bool]] | None = None,
    ranks: Ranks | None = None,
    tokens: int = MAX_ANSWER_TOKENS,
    evaluation: Evaluation | None = None,
    token_budget: Budget = "auto",
) -> list[Measured]:
    """Measure each fact: what is generated, probabilities, and how many paraphrases and neighbours hold.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts.
        baseline: ``neighbours_exact`` of these facts before the edit; ``None`` before it.
        ranks: the processes that share the work. Each calls this with the same facts and gets the same result.
        tokens: maximum number of tokens to generate.
        evaluation: the evaluation of these facts with the present weights, if there is one; nothing is scored twice.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.

    Raises:
        TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
    """
    if evaluation is None:
        evaluation = evaluate(model, tokenizer, facts, baseline, token_budget=token_budget, ranks=ranks)
    generated = answers(model, tokenizer, [fact.prompt for fact in facts], tokens, token_budget, ranks)
    return measured_of(facts, evaluation, generated, baseline)


def measured_of(
    facts: Sequence[Fact],
    evaluation: Evaluation,
    generated: Sequence[str],
    baseline: Mapping[str, list[bool]] | None = None,
) -> list[Measured]:
    """Collect what an evaluation knows of each fact.

    Args:
        facts: the facts.
        evaluation: their evaluation.
        generated: the text that is generated after each prompt.
        baseline: ``neighbours_exact`` of these facts before the edit; ``None`` before it.
    """
    found = []
    for t, (fact, text) in enumerate(zip(facts, generated, strict=True)):
        paraphrases, now = evaluation.paraphrases_exact[fact.key], evaluation.neighbours_exact[fact.key]
        before = now if baseline is None else baseline[fact.key]
        held = sum(was and is_exact for was, is_exact in zip(before, now, strict=True))
        p_true = math.exp(float(evaluation.log_true[t]))
        found.append(
            Measured(
                generated=text,
                holds=bool(evaluation.edits_exact[t]),
                p_new=math.exp(float(evaluation.log_new[t])),
                p_true=None if math.isnan(p_true) else p_true,
                paraphrases=(sum(paraphrases), len(paraphrases)),
                neighbours=(held, sum(before)),
            )
        )
    return found


def has_failed(after: Evaluation) -> bool:
    """Tell if more than half of the new targets are not generated after an edit."""
    return float((~after.edits_exact).float().mean()) > FAILED_SHARE


def reasons(
    result: EditResult, after: Evaluation, method: EditMethod, generated: Mapping[str, str] | None = None
) -> dict[str, Reason]:
    """Find out why new targets are not generated just after an edit, by fact key.

    Args:
        result: the result of the edit.
        after: the evaluation of its facts with the edited weights.
        method: the method that made it.
        generated: what is generated instead, by fact key, if it is known.
    """
    facts = zip(result.facts, after.edits_exact.tolist(), strict=True)
    return {
        fact.key: _reason(t, fact, result, after, method, (generated or {}).get(fact.key))
        for t, (fact, holds) in enumerate(facts)
        if not holds
    }


def _reason(
    t: int, fact: Fact, result: EditResult, after: Evaluation, method: EditMethod, generated: str | None
) -> Reason:
    nll, steps = float(result.targets.nll[t]), int(result.targets.steps[t])
    left = math.nan if result.residual is None else float(result.residual[t])
    layer = max(method.layers)
    if getattr(method, "token", None) == "subject_last" and is_function_word(fact.subject):
        text = f"the subject {_short(fact.subject)!r} is a function word, whose token is not read as the fact's subject"
        return _made("function_word", text)
    if nll > FOUND_NLL:
        text = f"no target vector was found at layer {layer}: {nll:.2f} nats per token after {_count(steps, 'step')}"
        reason = _made("target_not_found", text)
        is_last = getattr(method, "token", None) == "last"
        return reason if is_last else replace(reason, advice=f"{reason.advice}; or token: last")
    found = f"a target vector was found ({nll:.2f} nats after {_count(steps, 'step')})"
    if left > REACHED:
        moved = f"the layers moved the output of layer {layer} only {max(0.0, 1 - left):.0%} of the way"
        return _made("layers_moved_too_little", f"{found}, but {moved}")
    reached = f" and reached by {max(0.0, 1 - left):.0%}" if left == left else ""
    instead = "another answer" if generated is None else repr(_short(generated))
    text = f"{found}{reached}, but the layers above give {instead}: p(new) is {math.exp(float(after.log_new[t])):.2f}"
    return _made("another_answer", text)


def undone_reason(since: int | None, until: int) -> Reason:
    """Describe the fate of an edit that held, and no longer does.

    Args:
        since: optimizer step at which the new target was last generated.
        until: optimizer step at which it was found not to be.
    """
    when = f"by step {until}" if since is None else f"after step {since} and by step {until}"
    return _made("undone_by_training", f"training has undone the edit {when}")


def contradicted_reason(statement: str, edited_at: int | None = None) -> Reason:
    """Describe the fate of an edit that the training text contradicts.

    Args:
        statement: a training text with the old answer, or its part around that.
        edited_at: optimizer step of the edit.
    """
    since = "" if edited_at is None else f" since the edit at step {edited_at}"
    text = f"the training text contradicts it{since}, as by {_short(statement, 160)!r}"
    return _made("contradicted_by_training_text", text)


def describe_failure(result: EditResult, found: Mapping[str, Reason]) -> str:
    """Describe an edit of which most facts failed: the three most frequent reasons with an example, and what to try."""
    prompts = {fact.key: _short(fact.prompt) for fact in result.facts}
    lines = [f"{len(found)} of {len(result.facts)} facts are not generated after the edit:"]
    for code, count in Counter(reason.code for reason in found.values()).most_common(3):
        key, reason = next((key, reason) for key, reason in found.items() if reason.code == code)
        lines.append(f"  {count}x {code.replace('_', ' ')}, such as {prompts[key]!r}: {reason.text}; {reason.advice}")
    return "\n".join(lines)


def _made(code: Code, text: str) -> Reason:
    return Reason(code, text, _ADVICE[code])


def _short(text: str, length: int = 60) -> str:
    shown = printable(text)
    return shown if len(shown) <= length else f"{shown[:length]}…"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
