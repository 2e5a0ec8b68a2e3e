"""The base class of editing methods, which change the weights in one transaction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.data.lengths import remark_long_facts
from lit_moeedit.editing.job import EditJob, EditResult, LayerEdits
from lit_moeedit.editing.phases import Clock, Progress
from lit_moeedit.editing.place import Place, Tune
from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import ExpertLayer, check_editable, expert_layers
from lit_moeedit.models.output_scale import with_output_scale
from lit_moeedit.models.quantised import refuse_repacked
from lit_moeedit.models.token_budget import Budget, check_budget
from lit_moeedit.pretrained import check_vocabulary
from lit_moeedit.sharding.backends import locate, refuse_parallelism
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction

if TYPE_CHECKING:
    from lit_moeedit.editing.memory import EditMemory
    from lit_moeedit.preservation.second_moments import SecondMoments
    from lit_moeedit.solvers import ExpertDeltas

# what a method of others imports from here


class EditMethod(ABC):
    """A method of editing facts in the weights of routed experts.

    A subclass implements :meth:`prepare`. This class checks the facts, keeps the ranks together, changes the weights in
    a transaction, and undoes it if a guard rejects the edit.

    Args:
        layers: indices of the decoder layers to edit, or ``auto`` if the method finds them.
        contexts: texts put before the prompts. Every fact is edited after each of them. The first should be empty.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto`` for as many as fit into
            memory.
        reset_moments: whether to reset Adam's moments of the edited experts; see
            :class:`~lit_moeedit.sharding.transaction.Transaction`.

    Attributes:
        layers: indices of the layers to edit, ascending; empty until they are found, where ``auto`` was given.
        can_find_layers: whether the method takes ``auto`` for its layers, which :meth:`resolve` then finds.
        needs_moments: whether :meth:`edit` needs preservation text (or second moments of it).
        memory: keeps later edits from undoing earlier ones; ``None`` for no memory.
        facts: the facts of a method that brings its own; ``None`` for any other.
        can_renew: whether edits that have faded can be made again.
        tune: whether, and how, :meth:`resolve` chooses further settings, too; see
            :class:`~lit_moeedit.editing.Editor`.

    Raises:
        ValueError: if a setting is out of range.
    """

    can_find_layers: bool = False
    needs_moments: bool = False
    memory: EditMemory | None = None
    facts: Sequence[Fact] | None = None
    can_renew: bool = True
    tune: Tune = False

    def __init__(
        self,
        layers: Sequence[int] | Literal["auto"],
        contexts: Sequence[str] = ("",),
        token_budget: Budget = "auto",
        reset_moments: bool = False,
    ) -> None:
        if layers == "auto" and self.can_find_layers:
            layers = ()
        elif isinstance(layers, str):
            raise ValueError(f"layers of {type(self).__name__} must be layer indices, got {layers!r}")
        elif not _are_indices(layers):
            raise ValueError(f"layers must be distinct layer indices, at least one, got {layers!r}")
        if not contexts:
            raise ValueError("contexts needs at least one text (an empty one for the prompt alone)")
        check_budget(token_budget)
        self.layers = tuple(sorted(layers))
        self.contexts = tuple(contexts)
        self.token_budget: Budget = token_budget
        self.reset_moments = reset_moments

    @property
    def name(self) -> str:
        """The method's name in reports."""
        return type(self).__name__

    @abstractmethod
    def prepare(self, job: EditJob) -> LayerEdits:
        """Do the work that comes before the first layer is changed."""

    @property
    def finds_place(self) -> bool:
        """``True`` if layers or token were given as ``auto``, or further settings are chosen at the first edit."""
        return False

    @property
    def finds_layers(self) -> bool:
        """``True`` if any layer may be edited, because layers or token were given as ``auto``."""
        return self.finds_place

    @property
    def place(self) -> Place | None:
        """The place that is edited; ``None`` as long as it is not known. Setting ``None`` forgets what was found."""
        return Place(self.layers, None) if self.layers else None

    @place.setter
    def place(self, place: Place | None) -> None:
        """Take a place instead of finding one; without effect on a method that was given its place."""
        return

    @property
    def is_resolved(self) -> bool:
        """``True`` if it is known what is edited; ``False`` if :meth:`resolve` has to find it."""
        return bool(self.layers)

    def resolve(  # noqa: B027 - most methods know what they edit
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        preservation: Sequence[str] = (),
        *,
        optimizers: Sequence[Any] = (),
        histories: dict[str, History] | None = None,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Find what was given as ``auto``, once; the arguments are those of :meth:`edit`, which calls this."""

    def find_layers(self, model: PreTrainedModel) -> list[ExpertLayer]:
        """Return the layers to edit, ascending, after all checks that need no forward.

        As long as the layers are not known, these are all layers that may be chosen.

        Raises:
            UnsupportedModelError: if a layer cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            ValueError: if a setting does not fit the layers.
        """
        refuse_parallelism(model)
        refuse_repacked(model)
        layers = check_editable(model, self.layers or list(expert_layers(model)))
        for layer in layers:
            locate(layer.down_proj, model=model)
        return layers

    def check_facts(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> None:  # noqa: B027
        """Check that facts can be encoded as :meth:`edit` encodes them, with the contexts of this method.

        Raises:
            ValueError: if one of them cannot.
        """

    def count_rows(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[int]:
        """Return the number of rows of the ``goals`` of each fact: one for each context and edit token."""
        return [len(self.contexts)] * len(facts)

    def check(self, model: PreTrainedModel, ranks: Ranks | None = None) -> list[ExpertLayer]:
        """Return the layers to edit, ascending, with their output scales.

        Args:
            model: the model.
            ranks: the processes that edit together. If one of them fails, all fail before any forward.

        Raises:
            UnsupportedModelError: if a layer cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            FloatingPointError: if the model is not finite.
        """
        # before a forward, which may fail for the same reason with a less clear message
        layers = self.find_layers(model)
        if ranks is not None:
            ranks.check_errors()
        return with_output_scale(model, layers)

    def remark_long_facts(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> None:
        """Log a warning about facts that are longer than the model's context window."""
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        remark_long_facts(tokenizer, facts, window, self.contexts)

    @torch.inference_mode(False)
    @torch.no_grad()
    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact | Mapping[str, Any]],
        preservation: Sequence[str] = (),
        *,
        moments: Mapping[int, SecondMoments] | None = None,
        guard: Callable[[], bool] | None = None,
        record: Callable[[bool, Undo], None] | None = None,
        progress: Progress | None = None,
        optimizers: Sequence[Any] = (),
        ranks: Ranks | None = None,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        layers: Sequence[ExpertLayer] | None = None,
        copies: Sequence[Mapping[str, Tensor]] = (),
        histories: dict[str, History] | None = None,
        goals: Mapping[str, Tensor | None] | None = None,
        measured: Sequence[Fact] = (),
        replaced: Mapping[int, Sequence[ExpertDeltas]] | None = None,
    ) -> EditResult:
        """Edit the facts in the model's weights, all of them or none.

        Modes, gradients, ``requires_grad`` and random states are restored afterwards. On any exception the weights are
        bit-identical to before. With several ranks, texts, prompts and edits are sharded over them, each rank solves
        the same system, and an exception on one of them fails the edit on all.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            facts: the facts to edit, or objects with the keys of a row of a facts file.
            preservation: text on which the experts must keep their behavior; needed if :attr:`needs_moments`.
            moments: second moments by layer index, if they are known already; taken as they are, also with
                ``replaced``.
            guard: called after the last commit, with the edited weights in place; ``False`` undoes the edit.
            record: called last, with whether the edit is kept, and with the transaction. What it changes is part of the
                edit if it says first, by :meth:`~lit_moeedit.interrupts.Undo.by`, how to undo it.
            progress: called with a phase's name, the number of steps done, and their total number.
            optimizers: the optimizers that train the weights. Those of DeepSpeed hold master weights, which are edited,
                too.
            ranks: the processes that edit together. Each calls this with the same arguments.
            phase: ``phase(name)`` is a context manager in which every part of a phase runs, for measurements.
            layers: the result of :meth:`check` for this model, if its weights have not changed since.
            copies: further copies of the model's weights, by the names of its parameters, such as the ``state_dict()``
                of an averaged model. They get the same change of the edited layers, in the same transaction.
            histories: the changes of frozen experts so far, by names of parameters, with which the new ones are added
                up before they are rounded; brought up to date in the same transaction. See
                :class:`~lit_moeedit.sharding.history.EditSum`.
            goals: by fact key, the ``goals`` of an earlier result, so that no target vector is searched for; ``None``
                for a fact that is to stay as it is. The other facts are edited as usual. Methods without target vectors
                do not use them.
            measured: other facts that are measured, such as those of other edits, or these with other paraphrases. A
                method that makes up prompts (``phrasings`` and ``neutral_prompts`` of
                :class:`~lit_moeedit.editing.Editor`) makes none that is a prompt, a paraphrase, a neighbour or a probe
                of these facts.
            replaced: changes of earlier edits by layer index, as the ``deltas`` of their results have them, which are
                subtracted first. The edit is made on the weights without them, in the same transaction.

        Raises:
            UnsupportedModelError: if the model cannot be edited.
            UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
            FactError: if a fact cannot be edited.
            ValueError: if preservation text is needed, and there is none; if ``layers`` are others; if a copy has no
                edited weight, or one of another shape; if ``replaced`` has another layer, or deltas of another shape;
                or if no gradient reaches a target vector.
            FloatingPointError: if the model or the result is not finite.
            TooLittleMemoryError: if memory does not suffice for a single row.
            RankError: if another rank failed.
        """
        ranks = ranks or Ranks.current()
        clock = Clock(phase, model.device)
        # if a rank fails anywhere in this block, the others learn of it at their next check: before each forward and
        # before each collective operation
        with ranks.together():
            if not self.is_resolved:
                self.resolve(
                    model,
                    tokenizer,
                    validate_facts(facts, tokenizer=tokenizer),
                    preservation,
                    optimizers=optimizers,
                    histories=histories,
                    ranks=ranks,
                    progress=progress,
                )
            self.find_layers(model)
            if layers is None:
                with clock("features"):
                    layers = self.check(model, ranks)
            elif list(layers) != check_editable(model, self.layers) or any(x.output_scale is None for x in layers):
                raise ValueError(f"layers must be the result of {type(self).__name__}.check for this model")
            further = _further_copies(layers, copies)
            check_vocabulary(tokenizer, model)
            given, facts = facts, validate_facts(facts, tokenizer=tokenizer)
            if facts is not given:  # of checked facts this has been said
                self.remark_long_facts(model, tokenizer, facts)
            ranks.check_same("the facts", [repr(fact) for fact in facts])
            report = progress or (lambda phase, done, total: None)
            known, earlier = goals or {}, _changes_of(layers, replaced or {})
            with held(Transaction(optimizers, ranks, self.reset_moments, further, histories, model)) as transaction:
                if earlier:
                    with clock("commit"):
                        for layer, changes in earlier:
                            name = None if histories is None else layer.weight_name
                            gone = [_negated(change.to(model.device)) for change in changes]
                            transaction.commit(layer.down_proj, gone, layer.is_transposed, name)
                    with clock("features"):
                        layers = self.check(model, ranks)
                job = EditJob(
                    model, tokenizer, facts, layers, preservation, moments, ranks, clock, report, histories, known,
                    measured,
                )  # fmt: skip
                edits = self.prepare(job)
                for number, layer in enumerate(layers, 1):
                    edits.commit(layer, edits.solve(layer), transaction)
                    report("layers", number, len(layers))
                residual = edits.residual()
                kept = not ranks.any(guard is not None and not guard())
                if not kept:
                    transaction.rollback()
                elif self.memory is None:
                    edits.keep()
                else:
                    transaction.by(self.memory.restore, self.memory.content)
                    edits.keep()
                if record is not None:
                    record(kept, transaction)
                transaction.keep()
        return EditResult(
            list(facts),
            edits.deltas,
            edits.targets,
            clock.seconds(),
            edits.relative_change,
            kept,
            edits.energy_kept,
            residual,
            edits.goals(),
            edits.moments,
            edits.null_ranks,
        )


def _negated(change: ExpertDeltas) -> ExpertDeltas:
    return change.with_right(-change.right)


def _changes_of(
    layers: Sequence[ExpertLayer], replaced: Mapping[int, Sequence[ExpertDeltas]]
) -> list[tuple[ExpertLayer, Sequence[ExpertDeltas]]]:
    """Find the layers that have earlier changes.

    Raises:
        ValueError: if these are of other layers, or of another shape.
    """
    edited = {layer.index: layer for layer in layers}
    if others := sorted(replaced.keys() - edited.keys()):
        raise ValueError(f"replaced has changes of layers {others}, but the edit is one of layers {sorted(edited)}")
    for index, changes in replaced.items():
        shape = edited[index].shape
        for change in changes:
            if (change.num_experts, *change.shape) != tuple(shape):
                raise ValueError(
                    f"replaced has a change of shape {[change.num_experts, *change.shape]} in layer {index}, whose "
                    f"experts are {list(shape)}"
                )
    return [(edited[index], changes) for index, changes in replaced.items() if changes]


def _further_copies(
    layers: Sequence[ExpertLayer], copies: Sequence[Mapping[str, Tensor]]
) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Find the edited weights in further copies of the model.

    Raises:
        ValueError: if a copy has none of them, or one in another shape.
    """
    weights = {f"{layer.name}.down_proj": layer.down_proj for layer in layers}
    further: dict[nn.Parameter, list[nn.Parameter]] = {}
    for number, copy in enumerate(copies):
        found = {name: copy[name] for name in weights if name in copy}
        if not found:
            raise ValueError(f"copies[{number}] has none of the edited weights, such as {next(iter(weights))!r}")
        for name, tensor in found.items():
            if tensor.shape != weights[name].shape:
                shapes = f"{list(weights[name].shape)}, but it is {list(tensor.shape)}"
                raise ValueError(f"copies[{number}][{name!r}] should be of shape {shapes}")
            # a parameter of the same memory
            further.setdefault(weights[name], []).append(nn.Parameter(tensor.detach(), requires_grad=False))
    return further


def _are_indices(layers: object) -> bool:
    if not isinstance(layers, Sequence) or not all(isinstance(layer, Integral) and int(layer) >= 0 for layer in layers):
        return False
    return 0 < len(layers) == len(set(layers))
