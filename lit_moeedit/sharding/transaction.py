"""Transactions on expert weights, sharded or not: the one place that writes parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from lit_moeedit.interrupts import Undo, uninterrupted
from lit_moeedit.sharding.backends import locate, settle
from lit_moeedit.sharding.commit import Commit
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.history import EditSum, History
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.rollback import Saved, Store

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas


class Transaction(Undo):
    r"""A set of weight changes that is applied as a whole, on all ranks, or not at all.

    A commit changes everything that holds the weights as one act: the model weights, be they whole or a ZeRO-3
    partition, and the optimizer's float32 master weights, if there are any. (A change of only one of them is lost with
    the optimizer's next step, or seen only after it.) The sum is taken in the precision of the master weights, and the
    model weights are ``round(master + delta)``, which is what the optimizer itself would write.

    Each rank computes the slice of ``Σ_t a_t φ_tjᵀ`` that falls in its own range. Under ZeRO stage 3 nothing is sent.
    Under stages 1 and 2, where every rank holds all model weights, the rounded weights are all-reduced once.

    Before an expert is changed, this rank's elements of it are copied, see
    :class:`~lit_moeedit.sharding.rollback.Store`. :meth:`rollback` puts them back bit by bit, and needs no other rank
    for it. Leaving the ``with`` block by any exception rolls back. What changes together with the weights can be part
    of the transaction, too: say by :meth:`by` how to undo a change before making it.

    Inside :func:`~lit_moeedit.interrupts.held`, no interrupt, and no second one while the weights are put back, leaves
    a part of the changes.

    Args:
        optimizers: the optimizers that train the weights now, as ``trainer.optimizers`` has them. None outside of
            training.
        ranks: the processes that commit together. Each calls every method with the same deltas.
        reset_moments: whether to set Adam's moments of the edited experts to zero. Kept (the default), the next steps
            push the edited weights where the gradients of the last steps pointed, as if nothing had happened. Reset,
            they forget that direction. Since the step count goes on, the first steps on those experts are then of a
            size like ``(1 - β₁) / sqrt(1 - β₂)`` times the learning rate, whatever the gradients' size.
        copies: further copies of parameters, such as averages of the weights that another part of the run keeps. The
            delta of a parameter is added to each of them in the same commit, and undone with it. Each has the
            parameter's shape, and any dtype and device.
        histories: the changes of frozen parameters so far, by names of parameters; kept up to date.
        model: the model that has the weights, if it is run while the transaction is open: its gathered weights are
            released before a commit and after an undo.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 3, 4))
        >>> with Transaction() as transaction:
        ...     transaction.touched
        0
    """

    def __init__(
        self,
        optimizers: Sequence[Any] = (),
        ranks: Ranks | None = None,
        reset_moments: bool = False,
        copies: Mapping[nn.Parameter, Sequence[nn.Parameter]] | None = None,
        histories: dict[str, History] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.optimizers = list(optimizers)
        self.ranks = ranks or Ranks.current()
        self.reset_moments = reset_moments
        self.copies = copies or {}
        self.histories = {} if histories is None else histories
        self.model = model
        # what each commit has changed, by expert
        self._journal: list[dict[int, Saved]] = []
        self._starts: list[int] = []  # number of changes before each commit
        self._inseparable: list[tuple[int, int]] = []  # after the first change, and at the second, of the same experts
        self._store = Store()

    @property
    def touched(self) -> int:
        """Number of experts changed so far."""
        return sum(map(len, self._journal))

    @torch.no_grad()
    def commit(
        self,
        weight: nn.Parameter,
        deltas: ExpertDeltas | Sequence[ExpertDeltas],
        transposed: bool = False,
        name: str | None = None,
        exact: bool | None = None,
        begins: bool = False,
    ) -> float:
        """Add deltas to the experts of one parameter.

        The sum is taken in float32 (or float64, if either is) and rounded once to each copy's dtype.

        Several deltas, and those of a frozen parameter, are added up in float64, in their order. The result is rounded
        once, together with the earlier changes of a frozen parameter that :attr:`histories` has: see
        :class:`~lit_moeedit.sharding.history.EditSum`.

        Args:
            weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
            deltas: the deltas to add, at least one.
            transposed: whether the experts are stored transposed.
            name: name of the parameter in :attr:`histories`; ``None`` to leave these alone.
            exact: whether to take the sum in float64. By default that depends on the deltas and the parameter, as said
                above. It is given to make a change again as it was made in weights that were frozen, or were not.
            begins: whether a frozen parameter begins another sum, based on its rounded state, even if its last one
                could be continued.

        Returns:
            ``‖ΔW‖_F / ‖W‖_F`` over the experts that changed; 0 if none did.

        Raises:
            FloatingPointError: if a delta or a changed weight is not finite; nothing of this parameter has changed.
            UnsupportedShardingError: if the parameter cannot be written here.
            RuntimeError: if the optimizer's master weights are not those of the model.
            RankError: if another rank failed.
        """
        done, known = len(self._undos), len(self._journal)
        changes = list(deltas) if isinstance(deltas, Sequence) else [deltas]
        is_frozen = not weight.requires_grad
        try:
            before, earlier = self._begin(weight, name) if is_frozen and name is not None else (None, None)
            earlier = None if begins else earlier
            # a copy that is equal stays equal
            equal = {id(copy) for copy in self.copies.get(weight, ()) if earlier and self._fingerprint(copy) == before}
            with self.ranks.together():
                self._settle()
                if not all(change.is_finite() for change in changes):
                    raise FloatingPointError("a delta has values that are not finite")
                shard = locate(weight, self.optimizers, self.model)
                # DeepSpeed may hold master weights all the same
                is_frozen = is_frozen and shard.model is None
                is_exact = (is_frozen or len(changes) > 1) if exact is None else exact
                earlier = earlier if is_exact else None
                commit = Commit(weight, shard, changes, transposed, self._store, is_exact, earlier)
                further = [commit.of_copy(copy, is_equal=id(copy) in equal) for copy in self.copies.get(weight, ())]
                # known before anything is written
                self.by(_restore, commit.saved)
                self._journal.append(commit.saved)
                self._starts.append(done)
                for change in (commit, *further):
                    held = sum(saved.held(change.device) for entry in self._journal for saved in entry.values())
                    self._store.begin(change.device, change.size_of_copies(self.reset_moments), held)
                    change.change_own_range()
                if self.reset_moments:
                    commit.reset_moments()
            if commit.is_replicated():
                with self.ranks.together():
                    commit.all_reduce_model_weights(self.ranks)
            relative_change = commit.relative_change()
            self.ranks.check_errors()
            if name is not None:
                self._note(name, commit, before if is_frozen else None, earlier)
        except BaseException:
            self.undo(done)
            raise
        # an expert that was changed before goes back to what it was at first, which saves a second copy
        for start, entry in zip(self._starts[:known], self._journal[:known], strict=True):
            again = [expert for expert in commit.saved if expert in entry and entry[expert].weight is weight]
            if again:
                self._inseparable.append((start + 1, done))
            for expert in again:
                del commit.saved[expert]
        return relative_change

    @override
    def undo(self, down_to: int = 0) -> None:
        """Undo the changes now, but for the first ``down_to`` of them; see :meth:`~lit_moeedit.interrupts.Undo.undo`.

        Raises:
            ValueError: if that would undo one of two commits of the same expert, and not the other: its state between
                them is not kept. Nothing has changed.
        """
        if any(first <= down_to <= second for first, second in self._inseparable):
            raise ValueError(
                f"the first {down_to} changes cannot be kept alone: experts were committed before and after them, and "
                "what they were in between is not kept; undo both commits, or use two transactions"
            )
        super().undo(down_to)
        self._settle()
        self._inseparable = [pair for pair in self._inseparable if pair[1] < down_to]

    def _settle(self) -> None:
        if self.model is not None:
            settle(self.model)

    def _begin(self, weight: nn.Parameter, name: str) -> tuple[str, EditSum | None]:
        """Return the fingerprint of a frozen parameter, and the sum that a change of it continues, if there is one."""
        now = self._fingerprint(weight)
        last = next(iter(self.histories.get(name, ())[-1:]), None)
        if last is not None and last.after[-1] != now:  # trained or loaded since
            self._set_history(name, ())
            return now, None
        is_known = last is not None and last.is_exact and last.elements is not None
        return now, last.joined() if last is not None and is_known else None

    def _note(self, name: str, commit: Commit, before: str | None, earlier: EditSum | None) -> None:
        """Add a change to the histories; one of weights that train (``before`` is ``None``) ends a history."""
        if before is None:
            self._set_history(name, ())
            return
        deltas, after = [change.to("cpu") for change in commit.given], self._fingerprint(commit.weight)
        history = self.histories.get(name, ())
        if earlier is not None:
            self._set_history(name, (*history[:-1], earlier.extended(deltas, after, commit.before)))
            return
        elements = commit.before if commit.is_exact else None
        own = EditSum(before, tuple(deltas), (after,) * len(deltas), elements, commit.is_exact)
        self._set_history(name, (*history, own))

    def _fingerprint(self, weight: nn.Parameter) -> str:
        return fingerprints({"": weight}, self.ranks)[""]

    def _set_history(self, name: str, history: History) -> None:
        known = self.histories.get(name, ())
        self.by(self.histories.__setitem__, name, known)
        self.histories[name] = history

    @torch.no_grad()
    def rollback(self) -> None:
        """Put back what every changed expert held before, bit by bit; an interrupt waits until that is done."""
        self.undo()
        self._forget()

    def keep(self) -> None:
        """Make the changes final, on all ranks, or on none of them if one has failed.

        Raises:
            RankError: if another rank failed.
        """
        # a rank that is interrupted in between would undo what the others keep
        with uninterrupted():
            self.ranks.check_errors()
            self._forget()

    @override
    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.rollback()
        self._forget()

    def _forget(self) -> None:
        self._undos.clear()
        self._journal.clear()
        self._starts.clear()
        self._inseparable.clear()
        self._store = Store()


@torch.no_grad()
def _restore(changed: dict[int, Saved]) -> None:
    """Put back what experts held. To do so twice does no harm."""
    for saved in changed.values():
        saved.restore()
    changed.clear()
