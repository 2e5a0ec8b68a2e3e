"""Edits applied, taken out, and found: bit by bit, in every allowed order, or refused with nothing changed."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lit_moeedit.edits import Edit, EditConflictError, apply, layers_by_parameter, undo, verify
from lit_moeedit.models.experts import UnsupportedModelError
from lit_moeedit.sharding.transaction import Transaction
from tests.conftest import _build
from tests.edits.making import chain, equal, make, siblings, some_deltas, weights

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return _build("qwen3_moe").to(request.param)


@pytest.fixture(scope="module")
def single() -> nn.Module:
    """A base in float32."""
    return _build("qwen3_moe")


@pytest.fixture(scope="module")
def made(single: nn.Module) -> tuple[list[Edit], list[nn.Module]]:
    return chain(single)


def refused(model: nn.Module, call: Callable[[], Any], message: str, kind: type[Exception] = EditConflictError) -> None:
    """The call is refused with a message, and no weight of the model has changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        call()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- every allowed order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["together", "alone"])
def test_a_chain_in_every_order(base: nn.Module, rounding: str) -> None:
    """Each state is reached from each other one, by one edit at a time or by several, bit by bit."""
    edits, models = chain(base, rounding=rounding)
    at = [base, *models]
    for start, end in itertools.permutations(range(4), 2):
        model = copy.deepcopy(at[start])
        if start < end:
            placed = apply(model, edits[:end], base=base)
        else:
            placed = undo(model, edits[:start], [edit.name for edit in edits[end:start]], base=base)
        assert equal(model, at[end]), (start, end)
        assert [edit.id for edit in placed] == [edit.id for edit in edits[:end]]
        assert all(edit.placement is None for edit in placed)


def test_edits_of_edited_weights_whose_edits_they_do_not_name(base: nn.Module) -> None:
    """A run that begins with edited weights rounds its edits in sums of its own; the states tell, in one command."""
    first, models = chain(base, 2)
    second, further = chain(models[-1], 3, terms=9)
    second = [replace(edit, name=f"later-{number}") for number, edit in enumerate(second)]
    edits = [*first, *second]
    model = copy.deepcopy(base)
    placed = apply(model, edits)
    assert equal(model, further[-1])
    assert [list(edit.made_on.values()) for edit in placed] == [[e.name for e in edits[:n]] for n in range(5)]
    assert all(edit.placement is None for edit in placed)
    model = copy.deepcopy(models[-1])
    apply(model, edits)
    assert equal(model, further[-1])
    undo(model, edits, ["later-2"], base=base)
    assert equal(model, further[1])
    refused(model, lambda: undo(model, edits[:4], ["edit-2"], base=base), "'later-0', 'later-1' were built on 'edit-2'")
    assert all(presence.status == "applied" for presence in verify(model, edits[:4]))


def test_siblings_in_every_order(base: nn.Module) -> None:
    """All subsets in all orders: what was done before leaves no trace."""
    edits, _ = siblings(base)
    known: dict[frozenset[str], nn.Module] = {frozenset(): base}
    for order in itertools.permutations(edits):
        model, present = copy.deepcopy(base), list[Edit]()
        for edit in order:
            present = apply(model, [*present, edit], base=base, allow_siblings=True)
            key = frozenset(other.name for other in present)
            assert equal(model, known.setdefault(key, copy.deepcopy(model)))
        for edit in order[:2]:
            present = undo(model, present, [edit.name], base=base)
            assert equal(model, known.setdefault(frozenset(o.name for o in present), copy.deepcopy(model)))
            assert all(found.status == "applied" for found in verify(model, present))
        undo(model, present, [order[2].name], base=base)
        assert equal(model, base)
    assert len(known) == 8


def test_a_chain_on_disjoint_layers(single: nn.Module) -> None:
    one, _ = make("one", single, layers=[0])
    two, model = make("two", single, [one], layers=[2])
    other = copy.deepcopy(single)
    apply(other, [one, two])
    assert equal(other, model)
    undo(other, [one, two], ["two"], base=single)
    assert [found.status for found in verify(other, [one, two])] == ["applied", "missing"]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_other_families(family: str) -> None:
    base = _build(family)
    edits, models = chain(base, 2)
    model = copy.deepcopy(base)
    apply(model, edits)
    assert equal(model, models[1])
    undo(model, edits, ["edit-2"], base=base)
    assert equal(model, models[0])


def test_the_next_edit_of_weights_that_were_rounded_alone(single: nn.Module) -> None:
    """No base is needed, nor the edits before."""
    edits, models = chain(single, rounding="alone")
    model = copy.deepcopy(models[1])
    apply(model, edits[2:])
    assert equal(model, models[2])


def test_the_base_as_a_folder(tmp_path, made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    edits, models = made
    single.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(models[2])
    undo(model, edits, ["edit-3"], base=tmp_path / "base")
    assert equal(model, models[1])


def test_frozen_experts_and_adapters_of_peft(made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
    edits, models = made
    targets = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    wrapped = peft.get_peft_model(copy.deepcopy(single), config)
    apply(wrapped, edits)
    wanted = weights(models[2])
    assert all(torch.equal(value, wanted[name]) for name, value in weights(wrapped).items())
    assert {found.status for found in verify(wrapped, edits)} == {"applied"}
    wrapped.merge_adapter()
    refused(wrapped, lambda: verify(wrapped, edits), "adapters are merged into the weights", UnsupportedModelError)


# -- already, approximately, up to rounding ---------------------------------------------------------------------------


def test_already_applied(made: tuple[list[Edit], list[nn.Module]], caplog: pytest.LogCaptureFixture) -> None:
    edits, models = made
    model = copy.deepcopy(models[2])
    with caplog.at_level(logging.INFO, "lit_moeedit"):
        assert apply(model, edits) == edits
    assert "already in the weights: edit-1, edit-2, edit-3" in caplog.text
    assert equal(model, models[2])


def test_an_approximate_undo_says_what_it_does(base: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    edits, models = chain(base)
    model = copy.deepcopy(models[2])
    left = undo(model, edits, ["edit-3"], approximate=True)
    experts = [edit.deltas.experts for edit in edits[2].layers]
    assert f"up to {sum(map(len, experts)) * 32 * 20:,} elements" in caplog.text
    for name, value in weights(models[1]).items():
        # the sum and the difference are each rounded to a unit in the last place of the larger of both weights
        found = weights(model)[name]
        unit = torch.finfo(value.dtype).eps * torch.maximum(value.abs(), weights(models[2])[name].abs())
        assert bool(((found - value).abs() <= 2 * unit).all())
    assert {found.status for found in verify(model, left)} == {"applied"}


@pytest.mark.parametrize("back", [False, True], ids=["bfloat16", "bfloat16 and back"])
def test_a_copy_in_another_dtype(
    back: bool, single: nn.Module, made: tuple[list[Edit], list[nn.Module]], caplog: pytest.LogCaptureFixture
) -> None:
    edits, models = made
    half = copy.deepcopy(single).bfloat16()
    half = half.float() if back else half
    model = copy.deepcopy(half)
    placed = apply(model, edits)
    assert "up to rounding only" in caplog.text
    for name, value in weights(model).items():
        # two roundings to bfloat16, of the base and of the sum
        wanted = weights(models[2])[name]
        largest = torch.maximum(wanted.abs(), weights(single)[name].abs())
        assert bool(((value.float() - wanted).abs() <= 2**-7 * largest).all())
    assert all(found.status == "applied" for found in verify(model, placed))
    left = undo(model, placed, ["edit-2", "edit-3"], base=half)
    again = copy.deepcopy(half)
    apply(again, edits[:1])
    assert equal(model, again)
    assert all(found.status == "applied" for found in verify(model, left))


def test_verify_tells_which_edits_are_there(made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    edits, models = made
    for count, model in enumerate([single, *models]):
        for found in verify(model, edits):
            assert found.status == ("applied" if edits.index(found.edit) < count else "missing")
            assert found.is_exact
    trained = copy.deepcopy(models[1])
    with torch.no_grad():
        next(iter(layers_by_parameter(trained).values())).down_proj[0, 0, 0] += 1
    status = {(found.parameter.split(".")[2], found.status) for found in verify(trained, edits)}
    assert status == {("0", "unknown"), ("1", "applied"), ("1", "missing")}


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_order_and_missing_edits(made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    edits, models = made
    one, two, three = edits
    model = copy.deepcopy(single)
    refused(model, lambda: apply(model, []), "no edit was given")
    refused(
        model, lambda: apply(model, [one, three, two]), "'edit-3' was made on top of 'edit-2': apply 'edit-2' before"
    )
    refused(model, lambda: apply(model, [one, three]), r"'edit-3' was made on top of 'edit-2' \(id .*which is missing")
    refused(
        model,
        lambda: apply(model, [two]),
        "is that of the base, but edit 'edit-2' was made on top of 'edit-1', so apply",
    )
    refused(model, lambda: apply(model, [one, one]), "edit 'edit-1' is given twice")
    refused(model, lambda: apply(model, [one, replace(two, name="edit-1")]), "two edits have the name 'edit-1'")
    refused(model, lambda: apply(model, [two, one]), "'edit-2' was made on top of 'edit-1': apply 'edit-1' before")
    only = copy.deepcopy(models[0])
    refused(only, lambda: apply(only, [two, three]), "give the base, too")
    refused(only, lambda: apply(only, [two], base=single), "was made on top of others: with a base, give all edits")


def test_siblings_are_refused_unless_allowed(single: nn.Module) -> None:
    (one, two), (first, second) = siblings(single, 2)
    model = copy.deepcopy(single)
    refused(model, lambda: apply(model, [one, two]), "'sibling-2' was made without 'sibling-1'.*not solved jointly")
    apply(model, [one, two], allow_siblings=True)
    has_one = copy.deepcopy(first)
    refused(has_one, lambda: apply(has_one, [two]), "or has other edits")
    refused(has_one, lambda: apply(has_one, [one, two], allow_siblings=True), "give the base, too")
    has_two = copy.deepcopy(second)
    refused(has_two, lambda: apply(has_two, [one, two], allow_siblings=True), "has the edit 'sibling-2' and not those")


def test_another_base_or_model(made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    edits, models = made
    other = copy.deepcopy(single)
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[0, 0, 0] += 1
    refused(other, lambda: apply(other, edits), r"layers\.1\..* is neither that of the base of edit 'edit-1' nor")
    model = copy.deepcopy(models[2])
    refused(
        model, lambda: undo(model, edits, ["edit-3"], base=other), "of the base is not the one on which edit 'edit-1'"
    )
    half = copy.deepcopy(single).bfloat16()
    refused(model, lambda: undo(model, edits, ["edit-3"], base=half), "load both in one dtype")
    wide = _build("qwen3_moe", moe_intermediate_size=24)
    refused(wide, lambda: apply(wide, edits), r"\(6, 32, 20\), but the model's is \(6, 32, 24\)")
    mixtral = _build("mixtral", num_local_experts=6, intermediate_size=20)
    refused(mixtral, lambda: apply(mixtral, edits), r"changes model\.layers\.0\.mlp\.experts\.down_proj, which|neither")
    elsewhere, _ = make("elsewhere", other, layers=[1], seed=3)
    refused(model, lambda: verify(model, [edits[0], elsewhere]), "were made on different bases")


def test_undo_is_refused(made: tuple[list[Edit], list[nn.Module]], single: nn.Module) -> None:
    edits, models = made
    model = copy.deepcopy(models[2])
    refused(model, lambda: undo(model, edits, ["edit-2"], base=single), "'edit-3' was built on 'edit-2': undo it, too")
    refused(model, lambda: undo(model, edits, ["edit-1"], base=single), "'edit-2', 'edit-3' were built on 'edit-1'")
    refused(
        model, lambda: undo(model, edits, ["edit-9"], base=single), "there is no edit 'edit-9'; the edits are edit-1"
    )
    refused(model, lambda: undo(model, edits, ["edit-3"]), "give the base", ValueError)
    earlier = copy.deepcopy(models[1])
    refused(earlier, lambda: undo(earlier, edits, ["edit-3"], base=single), "does not have the edit 'edit-3'")


def test_another_result_than_that_of_the_file(
    single: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose sums differ in the last place."""
    edit, made_in = make("one", single)
    commit = Transaction.commit

    def a_little_more(self: Transaction, weight: nn.Parameter, deltas: Any, *args: Any, **options: Any) -> float:
        changes = deltas if isinstance(deltas, list) else [deltas]
        return commit(self, weight, [*changes, some_deltas((6, 32, 20), 1, scale=1e-6)], *args, **options)

    monkeypatch.setattr(Transaction, "commit", a_little_more)
    model = copy.deepcopy(single)
    refused(model, lambda: apply(model, [edit]), "is not that of the files, bit by bit.*allow_rounding accepts")
    placed = apply(model, [edit], allow_rounding=True)
    assert "differ from those of the files in last places" in caplog.text
    assert not equal(model, made_in)
    assert all(found.status == "applied" and found.is_exact for found in verify(model, placed))


def test_a_failure_half_way_changes_nothing(
    single: nn.Module, made: tuple[list[Edit], list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, models = made
    model, commit = copy.deepcopy(models[2]), Transaction.commit
    last = model.model.layers[1].mlp.experts.down_proj

    def failing(self: Transaction, weight: nn.Parameter, *args: Any, **options: Any) -> float:
        if weight is last:
            raise MemoryError("no room")
        return commit(self, weight, *args, **options)

    monkeypatch.setattr(Transaction, "commit", failing)
    refused(model, lambda: undo(model, edits, ["edit-3"], base=single), "no room", MemoryError)
