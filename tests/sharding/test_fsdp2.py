"""Edits under FSDP2: what one process would edit, in the shards that the optimizer trains, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from lit_moeedit.editing import evaluate
from lit_moeedit.models.experts import check_editable
from lit_moeedit.models.partial_forward import (
    LayerOutput,
    inference,
    layer_output,
    logits,
    output_replaced,
    skipped,
)
from lit_moeedit.models.parts import stored_tensors
from lit_moeedit.sharding.backends import settle
from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.fingerprint import Part, fingerprints
from lit_moeedit.sharding.lending import exchanged
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.sharding.replacement import replace_experts
from lit_moeedit.sharding.shards import Window
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import BlockCoordinateDescent, ExpertDeltas, Tucker
from tests.processes import run_ranks
from tests.sharding.engines import dense, some_deltas
from tests.sharding.fsdp2_models import Case, all_full, check_idle, full, prepared, run, train, whole_model
from tests.sharding.small_edits import FACTS, LAYERS, TEXTS, editor, tokenizer

BF16 = torch.bfloat16
CASES = {
    "even": Case(),
    "uneven": Case(experts=5),
    "an empty shard": Case(experts=1),
    "bfloat16": Case(dtype=BF16),
    "policy": Case(policy=True),
    "root only": Case(layout="root only"),
    "stack, layers and root": Case(layout="stack, layers and root"),
    "kept gathered": Case(layout="kept gathered"),
    "plan of transformers": Case(layout="plan of transformers"),
    "loaded by transformers": Case(layout="loaded by transformers"),
    "rows": Case(layout="rows", experts=5),
    "columns": Case(layout="columns", experts=5, editor={"solver": Tucker()}),
    "replicas": Case(layout="replicas"),
    "replicated shards": Case(layout="replicated shards", experts=5),
    "descent": Case(editor={"solver": BlockCoordinateDescent(passes=2, seed=0)}),
    "Tucker": Case(editor={"solver": Tucker()}),
}


def added(before: list[Tensor], deltas: dict[int, ExpertDeltas]) -> list[Tensor]:
    """The weights with deltas, as a transaction writes them on a rank that holds all of them."""
    after = []
    for weight, index in zip(before, LAYERS, strict=True):
        whole = nn.Parameter(weight.clone())
        with Transaction() as transaction:
            transaction.commit(whole, deltas[index])
        after.append(whole.detach())
    return after


def edited(case: Case, begun: bool) -> dict[str, Any]:
    """An edit and two further steps at learning rate 0, before the first forward or after a step and an evaluation."""
    model, optimizer = prepared(case, steps=int(begun))
    if begun:
        run(model)
    before = full(model)
    result = editor(**case.editor).edit(model, tokenizer(), FACTS, TEXTS, optimizers=[optimizer])
    check_idle(model)
    after, expected = full(model), added(before, result.deltas)
    train(model, optimizer, 2)
    # the gathered copies of the next forward are those of the edit, too
    scores = evaluate(model, tokenizer(), FACTS).metrics
    return {"after": after, "expected": expected, "kept": full(model), "scores": scores}


def all_edited(names: list[str]) -> dict[str, Any]:
    return {name: edited(CASES[name], begun=number % 2 == 0) for number, name in enumerate(names)}


def alone(case: Case) -> tuple[list[Tensor], dict[str, float]]:
    model = whole_model(case)
    editor(**case.editor).edit(model, tokenizer(), FACTS, TEXTS)
    weights = [layer.down_proj.detach() for layer in check_editable(model, LAYERS)]
    return weights, evaluate(model, tokenizer(), FACTS).metrics


SOME = ["uneven"]


@pytest.mark.parametrize(
    "names",
    [SOME, pytest.param([name for name in CASES if name not in (*SOME, "replicated shards")], marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_an_edit_is_that_of_one_process_and_stays(names: list[str]) -> None:
    found = run_ranks(all_edited, 2, names)
    for name in names:
        case = CASES[name]
        for rank in found:
            result = rank[name]
            for after, expected, kept in zip(result["after"], result["expected"], result["kept"], strict=True):
                assert torch.equal(after, expected), name
                assert torch.equal(kept, after), name
        if case.dtype == torch.float32 and not case.policy:
            weights, scores = alone(case)
            for weight, after in zip(weights, found[0][name]["after"], strict=True):
                # float32 in batches of other sizes; Tucker's deltas are larger
                torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
            assert found[0][name]["scores"] == pytest.approx(scores, rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_four_ranks_some_with_empty_shards_or_as_replicas() -> None:
    for rank in run_ranks(all_edited, 4, ["uneven", "an empty shard", "replicated shards"]):
        for name, result in rank.items():
            for after, expected, kept in zip(result["after"], result["expected"], result["kept"], strict=True):
                assert torch.equal(after, expected) and torch.equal(kept, after), name


# -- shards of every form ---------------------------------------------------------------------------------------------


COMMON, OTHERS = ["uneven", "columns"], ["even", "an empty shard", "rows", "replicas"]


def read_and_written(names: list[str]) -> dict[str, Any]:
    """What is read of sharded weights in several ways, and what is left when others were lent to them."""
    found = {}
    ranks = Ranks.current()
    for name in names:
        model, _ = prepared(CASES[name])
        other = {key: -value for key, value in whole_tensors(CASES[name]).items()}
        run(model)
        prints = fingerprints(stored_tensors(model), ranks)
        layer = check_editable(model, LAYERS)[1]
        reader = ExpertReader(layer.down_proj, layer.is_transposed, ranks)
        blocks = [reader[0].clone(), reader[:, 3:8].clone()]
        parts = {key: Part.of(value) for key, value in other.items()}
        with exchanged(stored_tensors(model), parts, ranks) as movement:
            run(model)
            lent = fingerprints(stored_tensors(model), ranks)
        with Transaction(ranks=ranks, model=model) as transaction:
            source = nn.Parameter(other[f"{layer.name}.down_proj"])
            replace_experts(transaction, layer.down_proj, source, [0])
        found[name] = {
            "prints": prints,
            "blocks": blocks,
            "lent": lent,
            "moved": movement.relative,
            "replaced": full(model)[1],
        }
    return found


def whole_tensors(case: Case) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in stored_tensors(whole_model(case)).items()}


@pytest.mark.parametrize("names", [COMMON, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["common", "others"])
def test_shards_are_read_and_written_as_the_whole(names: list[str]) -> None:
    for rank in run_ranks(read_and_written, 2, names):
        for name, result in rank.items():
            whole = whole_tensors(CASES[name])
            down = whole[f"model.layers.{LAYERS[1]}.mlp.experts.down_proj"]
            assert result["prints"] == fingerprints(whole, Ranks()), name
            assert torch.equal(result["blocks"][0], down[0]) and torch.equal(result["blocks"][1], down[:, 3:8]), name
            assert result["lent"] == fingerprints({key: -value for key, value in whole.items()}, Ranks()), name
            assert result["moved"] == pytest.approx(2.0), name
            assert torch.equal(result["replaced"], torch.cat([-down[:1], down[1:]])), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_deltas_of_a_window_are_those_of_the_whole_there(dim: int, transposed: bool) -> None:
    deltas = some_deltas()
    whole = dense(deltas, transposed)
    window = Window(whole.shape, dim, 1, 3)
    narrowed = dense(window.narrowed(deltas, transposed), transposed)
    # a product of fewer columns may be summed in another order
    torch.testing.assert_close(narrowed.flatten(), window.of(whole.contiguous()), rtol=1e-6, atol=1e-6)


# -- nothing else changes ---------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


def fail(*args: Any) -> bool:
    raise Failure("injected")


def fail_on_the_second_rank() -> bool:
    run_in = torch.distributed.get_rank()
    return fail() if run_in == 1 else True


def trained(case: Case, way: str) -> dict[str, Tensor]:
    """The weights after two steps, with one of several things before and between them that change nothing."""
    model, optimizer = prepared(case, lr=1e-2)
    for _ in range(2):
        something(model, optimizer, way)
        train(model, optimizer, 1)
    return all_full(model)


def something(model: Any, optimizer: Any, way: str) -> None:
    method = editor()

    def edit(guard: Any) -> None:
        method.edit(model, tokenizer(), FACTS, TEXTS, optimizers=[optimizer], guard=guard)

    def refuse() -> bool:
        run(model)  # the root stays gathered, with the edited weights
        return False

    before = None if way == "nothing" else full(model)
    if way == "checked":
        method.check(model, Ranks.current())
        evaluate(model, tokenizer(), FACTS)
    elif way == "refused":
        edit(refuse)
    elif way == "failed on one rank":
        with pytest.raises(Failure if torch.distributed.get_rank() == 1 else RankError):
            edit(fail_on_the_second_rank)
    elif way == "failed in a forward":
        handle = model.model.layers[1].mlp.experts.register_forward_hook(fail)
        with pytest.raises(Failure):
            edit(None)
        handle.remove()
    if before is not None:
        check_idle(model)
        assert all(torch.equal(one, other) for one, other in zip(full(model), before, strict=True))


WAYS = ["checked", "refused", "failed on one rank", "failed in a forward"]
FORMS = {"policy": Case(policy=True), "kept gathered": Case(layout="kept gathered"), "usual": Case()}


def trainings(names: list[str]) -> dict[str, dict[str, bool]]:
    """By form and way: whether the training ended as one in which nothing happened, bit for bit."""
    found: dict[str, dict[str, bool]] = {}
    for name in names:
        whole = trained(FORMS[name], "nothing")
        ends = {way: trained(FORMS[name], way) for way in WAYS}
        found[name] = {way: all(torch.equal(end[x], whole[x]) for x in whole) for way, end in ends.items()}
    return found


@pytest.mark.parametrize(
    "names", [["policy"], pytest.param(["kept gathered", "usual"], marks=pytest.mark.slow)], ids=["policy", "others"]
)
def test_the_training_is_that_of_a_run_without_the_edit(names: list[str]) -> None:
    for rank in run_ranks(trainings, 2, names):
        assert rank == {name: dict.fromkeys(WAYS, True) for name in names}


# -- what is gathered -------------------------------------------------------------------------------------------------


def gathered(model: Any, work: Callable[[], Any]) -> list[str]:
    """The names of the parts whose weights some work gathers."""
    found: list[str] = []
    unshard = FSDPParamGroup.unshard

    def watched(group: Any, *args: Any, **kwargs: Any) -> Any:
        if not group.is_unsharded and group._all_gather_result is None:
            found.append(group._module_fqn)
        return unshard(group, *args, **kwargs)

    with mock.patch.object(FSDPParamGroup, "unshard", watched):
        work()
    return found


def gatherings() -> dict[str, list[str]]:
    model, _ = prepared(Case())
    layers = check_editable(model, [0, 1])
    ids = torch.tensor([[5, 6, 7]])
    mask, positions = torch.ones_like(ids), torch.arange(3)[None]
    run(model)

    def upper() -> None:
        output = layer_output(model, layers[1], ids, mask, positions)
        settle(model)
        found["upper"] = gathered(model, lambda: above(output))

    def above(output: LayerOutput) -> None:
        with skipped([layers[0].layer], lambda: output), output_replaced(layers[1].layer, lambda: output):
            logits(model, ids, mask, positions, keep=1)

    found: dict[str, list[str]] = {}
    with inference(model):
        found["lower"] = gathered(model, lambda: layer_output(model, layers[0], ids, mask, positions))
    with inference(model):
        upper()
    return found


def test_layers_that_are_skipped_are_not_gathered() -> None:
    for rank in run_ranks(gatherings, 2):
        # the root's own group, which has the embeddings and the head, has no name
        assert rank == {"lower": ["", "model.layers.0"], "upper": ["", "model.layers.2"]}
