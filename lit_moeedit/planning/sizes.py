"""What a plan is computed from: sizes of the model, how it is sharded, how it is trained, and what is edited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model.

    Attributes:
        parameters: numbers in all weights.
        largest: numbers in the largest weight.
        block: numbers in the weights that are gathered together, at most.
        experts: ``E`` of the edited layers.
        d_model: of the hidden state.
        d_hidden: of a key.
        active: experts that a token is sent to.
        layers: number of decoder layers.
        pretrained: whether the weights are read, and not fresh.
    """

    parameters: int
    largest: int
    block: int
    experts: int
    d_model: int
    d_hidden: int
    active: int
    layers: int
    pretrained: bool = False


@dataclass(frozen=True)
class TrainingSize:
    """One training step of a rank: ``rows`` texts of ``tokens`` tokens, ``counted`` of which the loss counts."""

    rows: int
    tokens: int
    counted: int
    router_loss: bool = True


@dataclass(frozen=True)
class EditSize:
    """One edit.

    Attributes:
        edits: number of facts.
        contexts: texts that each fact is put behind.
        neutral: whether there is a neutral prompt for each fact.
        prompt_tokens: length of a prompt with its context, at most.
        target_tokens: length of a target, at most.
        layers: indices of the layers to edit, ascending.
        preserve: whether second moments are measured and keys shaped by them.
        texts: preservation texts.
        text_tokens: length of each.
        token_budget: largest number of tokens in a forward of statistics and features.
        target_budget: largest number of tokens in a batch of targets.
        steps: of the targets' optimisation; fewer are run if all edits are done.
        passes: of block coordinate descent; 0 for the exact solution.
        visited: experts that the edits visit in a layer; ``None`` for all that they can.
        reset_moments: whether moments of the edited experts are set to zero, and so kept for a rollback.
    """

    edits: int
    contexts: int
    neutral: bool
    prompt_tokens: int
    target_tokens: int
    layers: tuple[int, ...]
    preserve: bool
    texts: int
    text_tokens: int
    token_budget: int
    target_budget: int
    steps: int
    passes: int = 0
    visited: int | None = None
    reset_moments: bool = False

    @property
    def prompts(self) -> int:
        """Prompts to solve for, ``T`` of the edit problem."""
        return self.edits * self.contexts

    def changed(self, model: ModelSize) -> int:
        """Experts that change in a layer."""
        possible = min(model.experts, self.prompts * model.active)
        return possible if self.visited is None else min(self.visited, possible)

    def target_batch(self, ranks: int) -> int:
        """Edits whose targets are optimised at once, as :meth:`~lit_moeedit.editing.TargetOptimizer.optimize` does."""
        per_edit = self.contexts + self.neutral
        longest = self.prompt_tokens + self.target_tokens
        return max(1, min(self.target_budget // (longest * per_edit), -(-self.edits // ranks)))

    def feature_batch(self, ranks: int) -> int:
        """Prompts in a forward for features, as :func:`~lit_moeedit.editing.features.edit_tokens` has them."""
        return max(1, min(self.token_budget // self.prompt_tokens, -(-self.prompts // ranks)))

    def text_batch(self) -> int:
        """Texts in a forward for statistics, as :func:`~lit_moeedit.data.encoding.token_batches` groups them."""
        return min(self.texts, max(1, self.token_budget // self.text_tokens))


@dataclass(frozen=True)
class Pass:
    """What one pass through a model, or a part of it, takes on one rank.

    Attributes:
        peak: bytes of all tensors that the pass makes and that are alive at the same time, at most; under ZeRO stage 3
            gathered weights among them.
        sent: bytes that the rank sends to others.
        flops: floating-point operations of matrix products.
    """

    peak: int
    sent: int
    flops: int


@dataclass(frozen=True)
class Passes:
    """The passes of a run: of a training step, of statistics and features (one batch each), and of targets.

    ``before`` finds the hidden states and the unedited model's answers for a batch of targets, ``forward`` is one
    evaluation of their loss, ``step`` one with its gradient.
    """

    training: Pass
    statistics: Pass
    features: Pass
    before: Pass
    forward: Pass
    step: Pass


@dataclass(frozen=True)
class Cost:
    """What a phase takes on one rank.

    Attributes:
        phase: its name.
        held: bytes that are there when it begins.
        peak: most bytes at a time, ``held`` included, where the model computes.
        host: bytes in main memory besides, for a model that computes elsewhere.
        sent: bytes that the rank sends to others.
        flops: floating-point operations.
        written: bytes that the rank writes to the disk.
    """

    phase: str
    held: int
    peak: int
    host: int = 0
    sent: int = 0
    flops: int = 0
    written: int = 0
