"""Edit files as an editing method: a run applies them where it would edit facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from typing_extensions import override

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.job import EditJob, LayerEdits
from lit_moeedit.editing.method import EditMethod
from lit_moeedit.editing.targets import Targets
from lit_moeedit.edits.edit import Edit, in_sums
from lit_moeedit.edits.files import EditFileError, read_edits
from lit_moeedit.edits.order import EditConflictError, Sequel, check_order, linked
from lit_moeedit.edits.plans import find_positions
from lit_moeedit.edits.states import states
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from lit_moeedit.solvers.compression import join


class SavedEdits(EditMethod):
    """Applies edits from files, with the evaluation, the guards and the schedule of any other edit.

    The weights must be those on which the edits were made: a frozen base, or a model before it is trained. They get the
    bits of the model in which the edits were made.

    Args:
        edits: the folder of one edit or of several, see :func:`~lit_moeedit.edits.read_edits`; or edits.
        any_base: whether to add the changes to other weights, too, such as those that have been trained since. The
            changes were not solved for these, so their effect may be weaker.

    Attributes:
        edits: the edits in their order.
        facts: their facts. Of several with one prompt, such as those of renewals, it has the last.

    Raises:
        FileNotFoundError: if there is no such folder.
        EditFileError: if a file is not an edit.
        EditConflictError: if the edits do not fit together. When they are applied, if the weights are others.
    """

    can_renew = False

    def __init__(self, edits: str | Sequence[Edit], any_base: bool = False) -> None:
        self.edits = linked(read_edits(edits) if isinstance(edits, str | Path) else edits)
        check_order(self.edits)
        self.any_base = any_base
        super().__init__(sorted({_layer(change.parameter) for edit in self.edits for change in edit.layers}))
        self.facts: list[Fact] = list({fact.prompt: fact for edit in self.edits for fact in edit.facts}.values())

    def edits_of(self, facts: Sequence[Fact]) -> list[Edit]:
        """Return the edits that edit any of these facts, in their order."""
        prompts = {fact.prompt for fact in facts}
        return [edit for edit in self.edits if any(fact.prompt in prompts for fact in edit.facts)]

    @override
    def prepare(self, job: EditJob) -> _Changes:
        """Choose the edits of the given facts, and check that they can be applied to the weights as they are."""
        prompts, chosen = {fact.prompt for fact in job.facts}, self.edits_of(job.facts)
        of_chosen = {fact.prompt for edit in chosen for fact in edit.facts}
        if prompts != of_chosen:
            left = len(of_chosen - prompts) or len(prompts - of_chosen)
            raise ValueError(
                f"edit files are applied as a whole, but {left} of their facts are not due now, or are of no file; "
                "choose a batch with the number of facts of each file, or none"
            )
        check_order(chosen)
        return _Changes(job, chosen, self.any_base)


class _Changes(LayerEdits):
    """The changes of edit files."""

    def __init__(self, job: EditJob, edits: Sequence[Edit], any_base: bool) -> None:
        super().__init__(job)
        job.ranks.check_same("the edits", [edit.id for edit in edits])
        self._sequels, self._any_base = Sequel.of(edits), any_base
        present = {layer.weight_name: layer for layer in job.layers if layer.weight_name in self._sequels}
        for name, sequel in self._sequels.items():
            for edit, change in zip(sequel.edits, sequel.changes, strict=True):
                if name not in present or present[name].shape != change.sizes:
                    raise EditConflictError(f"edit {edit.name!r} changes {name}, which is not so in this model")
        if not any_base:
            done = find_positions(self._sequels, states(present, job.ranks))
            already = next((name for name, (count, _) in done.items() if count), None)
            if already is not None:
                name = self._sequels[already].edits[done[already][0] - 1].name
                raise EditConflictError(f"{already} has the edit {name!r} already")
        device, count = job.model.device, len(job.facts)
        nothing = torch.zeros(count, device=device)
        self.targets = Targets(nothing[:, None][:, :0], nothing, torch.zeros(count, dtype=torch.long, device=device))

    @override
    def solve(self, layer: ExpertLayer) -> ExpertDeltas:
        sequel = self._sequels.get(layer.weight_name)
        if sequel is not None:
            return join([change.deltas for change in sequel.changes])
        rows, columns = layer.shape[1:]
        return ExpertDeltas.from_rows([], [], (torch.zeros(0, rows), torch.zeros(0, columns)), layer.num_experts)

    @override
    def commit(self, layer: ExpertLayer, deltas: ExpertDeltas, transaction: Transaction) -> None:
        """Write the changes of a layer, so that the weights have the bits of those in which they were made."""
        name = layer.weight_name
        sequel = self._sequels.get(name)
        if sequel is None:
            return
        histories = self.job.histories
        expected = None if self._any_base else sequel.state(len(sequel.edits))
        changes = []
        for own in [sequel.changes] if self._any_base else in_sums(sequel.changes):
            last = next(iter((histories or {}).get(name, ())[-1:]), None)
            with self.job.clock("commit"):
                change = transaction.commit(
                    layer.down_proj,
                    [one.deltas for one in own],
                    layer.is_transposed,
                    None if histories is None else name,
                    exact=self._any_base or own[0].is_exact,
                    begins=not self._any_base and (last is None or last.base != own[0].sum_base),
                )
            changes.append(change)
        after = states({name: layer}, self.job.ranks)[name]
        if expected is not None and after != expected and after.kind == expected.kind:
            raise EditConflictError(
                f"{name} would not have the bits that the file of {sequel.edits[-1].name!r} tells of"
            )
        # of several sums an upper bound
        self.deltas[layer.index], self.relative_change[layer.index] = deltas, sum(changes)


def _layer(parameter: str) -> int:
    """Return the index of the decoder layer in the name of a parameter."""
    index = next((part for part in parameter.split(".") if part.isdigit()), None)
    if index is None:
        raise EditFileError(f"no decoder layer can be found in the parameter's name {parameter!r}")
    return int(index)
