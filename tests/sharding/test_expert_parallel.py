"""Edits under expert parallelism of transformers: what one process would edit, by the ranks that own the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_moeedit.editing import evaluate
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.models.experts import check_editable, expert_layers
from lit_moeedit.models.keys import Routing, watch_keys, watch_routing
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.preservation import NullSpace, OutputPenalty
from lit_moeedit.sharding.backends import own_elements
from lit_moeedit.sharding.clipping import clip_gradient_norm, clip_gradient_values, local_part
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import BlockCoordinateDescent, Tucker
from tests.processes import run_ranks
from tests.sharding.expert_parallel_models import parallel_model, whole_model
from tests.sharding.fsdp2_models import check_idle, full, run, train
from tests.sharding.small_edits import FACTS, LAYERS, TEXTS, editor, tokenizer
from tests.sharding.test_fsdp2 import added

EDITORS: dict[str, dict[str, Any]] = {
    "Woodbury": {},
    "descent": {"solver": BlockCoordinateDescent(passes=2, seed=0), "preserve": NullSpace(0.5)},
    "Tucker": {"solver": Tucker()},
    "gated": {"preserve": OutputPenalty(10.0)},
    "bfloat16": {},
}


# -- what is seen -----------------------------------------------------------------------------------------------------


def texts_of(rank: int) -> Tensor:
    """A batch of its own for each rank; the second is shorter, so that ranks send different numbers of rows."""
    return [torch.arange(5, 45).view(2, 20), torch.tensor([[7, 8, 9]])][rank]


def loads(model: Any, ids: Tensor, gradients: bool) -> dict[int, list[int]]:
    """How many tokens each expert of each layer gets, by watching."""
    found: dict[int, list[int]] = {}
    layers = list(expert_layers(model).values())

    def observe(layer: Any, routing: Routing) -> None:
        found[layer.index] = torch.bincount(routing.experts.flatten(), minlength=layer.num_experts).tolist()
        assert routing.gates.sum(-1).allclose(torch.ones(len(routing.gates)))  # Qwen3 normalises them

    with torch.set_grad_enabled(gradients), watch_routing(layers, observe):
        model(input_ids=ids)
    return found


def keys_of(model: Any, ids: Tensor, positions: list[int]) -> list[Tensor]:
    found: list[Tensor] = []

    def observe(layer: Any, keys: Any) -> None:
        found.extend((keys.token, keys.expert, keys.gate, keys.key))

    with (
        inference(model),
        watch_keys([expert_layers(model)[1]], lambda: torch.tensor(positions, dtype=torch.long), observe),
    ):
        model(input_ids=ids)
    return found


POSITIONS: list[list[int]] = [[1, 3, 17, 30], []]
TENSOR_PARALLEL = {"ep_size": 2, "tp_size": 2}
HEADS = {"num_key_value_heads": 2}


def seen(folder: str) -> dict[str, Any]:
    model, rank = parallel_model(f"{folder}/fsdp"), dist.get_rank()
    found = {str(gradients): loads(model, texts_of(rank), gradients) for gradients in (False, True)}
    trace = trace_routing(model, tokenizer(), TEXTS)
    own = {"loads": found, "keys": keys_of(model, texts_of(rank), POSITIONS[rank]), "trace": vars(trace)}
    # all ranks have one batch: all-reduced without gradients, and exchanged with them
    shared = parallel_model(f"{folder}/tp", TENSOR_PARALLEL, **HEADS)
    own["shared"] = {str(gradients): loads(shared, texts_of(0), gradients) for gradients in (False, True)}
    return own


def test_the_routing_and_the_keys_are_those_of_the_whole_model(both: Any) -> None:
    found = [rank["seen"] for rank in both]
    model = whole_model()
    trace = trace_routing(model, tokenizer(), TEXTS)
    shared = loads(whole_model(**HEADS), texts_of(0), gradients=False)
    for rank, own in enumerate(found):
        expected = loads(model, texts_of(rank), gradients=False)
        assert own["loads"] == {"False": expected, "True": expected}
        assert own["shared"] == {"False": shared, "True": shared}
        for key, other in zip(own["keys"], keys_of(model, texts_of(rank), POSITIONS[rank]), strict=True):
            torch.testing.assert_close(key, other)
        assert all(torch.equal(own["trace"]["experts"][index], trace.experts[index]) for index in trace.experts)


# -- edits ------------------------------------------------------------------------------------------------------------


def edited(folder: str, name: str, begun: bool) -> dict[str, Any]:
    """An edit and two further steps at learning rate 0, before the first forward or after a step and an evaluation."""
    model = parallel_model(folder, dtype=torch.bfloat16 if name == "bfloat16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    if begun:
        train(model, optimizer, 1)
        run(model)
    before = full(model)
    result = editor(**EDITORS[name]).edit(model, tokenizer(), FACTS, TEXTS, optimizers=[optimizer])
    check_idle(model)
    after, expected = full(model), added(before, result.deltas)
    train(model, optimizer, 2)
    scores = evaluate(model, tokenizer(), FACTS).metrics
    return {"after": after, "expected": expected, "kept": full(model), "scores": scores}


def all_edited(folder: str, names: list[str]) -> dict[str, Any]:
    return {name: edited(folder, name, begun=number % 2 == 0) for number, name in enumerate(names)}


SOME = ["Woodbury", "descent", "Tucker"]


def seen_and_edited(folder: str) -> dict[str, Any]:
    return {"seen": seen(folder), "edited": all_edited(folder, SOME)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(seen_and_edited, 2, str(tmp_path_factory.mktemp("both")))


def test_an_edit_is_that_of_one_process_and_stays(both: Any) -> None:
    check_edited([rank["edited"] for rank in both], SOME)


@pytest.mark.slow
def test_other_edits_are_those_of_one_process_and_stay(tmp_path: Path) -> None:
    names = ["gated", "bfloat16"]
    check_edited(run_ranks(all_edited, 2, str(tmp_path), names), names)


def check_edited(found: list[Any], names: list[str]) -> None:
    for name in names:
        model = whole_model()
        editor(**EDITORS[name]).edit(model, tokenizer(), FACTS, TEXTS)
        weights = [layer.down_proj.detach() for layer in check_editable(model, LAYERS)]
        scores = evaluate(model, tokenizer(), FACTS).metrics
        for rank in found:
            own = rank[name]
            for after, expected, kept, weight in zip(
                *(own[x] for x in ("after", "expected", "kept")), weights, strict=True
            ):
                assert torch.equal(after, expected), name
                assert torch.equal(kept, after), name
                if name == "bfloat16":  # targets and keys are rounded in other batches
                    continue
                # float32 in batches of other sizes; Tucker's deltas are larger
                torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
            if name != "bfloat16":
                assert own["scores"] == pytest.approx(scores, rel=1e-4, nan_ok=True)


# -- several ranks with the same experts ------------------------------------------------------------------------------


def with_replicas(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    model = parallel_model(folder, sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    before = full(model)
    result = editor().edit(model, tokenizer(), FACTS, TEXTS, optimizers=[optimizer])
    train(model, optimizer, 1)
    parameters = dict(model.named_parameters())
    norm = float(clip_gradient_norm_after_a_step(model))
    clip_gradient_values(model.parameters(), 1e-4)
    gradients = [local_part(x.grad) for x in model.parameters() if x.grad is not None]
    return {
        "largest": max(float(gradient.abs().max()) for gradient in gradients if gradient.numel()),
        "after": full(model),
        "expected": added(before, result.deltas),
        "starts": own_elements(parameters["model.layers.1.mlp.experts.down_proj"]).start,
        "norm": norm,
        "fingerprint": fingerprints({"": parameters["model.layers.1.mlp.experts.down_proj"]}, Ranks.current()),
    }


def clip_gradient_norm_after_a_step(model: Any) -> Tensor:
    """The norm of the gradients of one batch, the same on all ranks."""
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return clip_gradient_norm(model.parameters(), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"ep_size": 2, "fsdp_size": 4}, {"ep_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}]
)
def test_ranks_with_the_same_experts_share_or_repeat_them(sizes: dict[str, int], tmp_path: Path) -> None:
    found = run_ranks(with_replicas, 4, str(tmp_path), sizes)
    model = whole_model()
    editor().edit(model, tokenizer(), FACTS, TEXTS)
    layers = check_editable(model, LAYERS)
    size = layers[0].down_proj[0].numel()
    norm = float(clip_gradient_norm_after_a_step(model))
    weights = [layer.down_proj.detach() for layer in layers]
    # the three experts of an owner are cut into two and one
    starts = [0, 3, 2, 5] if sizes["fsdp_size"] == 4 else [0, 3, 0, 3]
    for rank, own in enumerate(found):
        assert own["starts"] == starts[rank] * size
        assert own["norm"] == pytest.approx(norm, rel=1e-5)
        assert own["largest"] == pytest.approx(1e-4)
        assert own["fingerprint"] == found[0]["fingerprint"]
        for after, expected, weight in zip(own["after"], own["expected"], weights, strict=True):
            assert torch.equal(after, expected)
            torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
    assert found[0]["fingerprint"] == fingerprints({"": nn.Parameter(found[0]["after"][1])}, Ranks.current())
