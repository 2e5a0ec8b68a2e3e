"""Models of which parts are compiled are edited as if nothing was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lit_moeedit.editing import Editor, FineTuning, TargetOptimizer, evaluate
from lit_moeedit.editing.routing_trace import trace_routing


def _compile(model: Any, part: str, in_place: bool, backend: str) -> None:
    for index, layer in enumerate(model.model.layers):
        place = {"block": (layer, "mlp"), "experts": (layer.mlp, "experts"), "layer": (model.model.layers, str(index))}
        owner, name = place.get(part, (model, "model"))
        if in_place:
            getattr(owner, name).compile(backend=backend)
        elif not isinstance(getattr(owner, name), torch._dynamo.OptimizedModule):
            setattr(owner, name, torch.compile(getattr(owner, name), backend=backend))


def _cases() -> list[Any]:
    default = [("block", False)]
    others = [("block", True), ("experts", False), ("experts", True), ("layer", False), ("layer", True)]
    others += [("model", False), ("model", True)]
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in others]
    return [*default, *slow]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "in_place"), _cases())
@pytest.mark.parametrize("method", ["editor", pytest.param("fine_tuning", marks=pytest.mark.slow)])
def test_a_compiled_part(
    make_model: Any, tokenizer: Any, facts: Any, texts: Any, part: str, in_place: bool, method: str
):
    torch._dynamo.reset()
    model = make_model("qwen3_moe", num_hidden_layers=2)
    targets = TargetOptimizer(steps=3, learning_rate=0.5)
    editor = Editor([0], targets=targets) if method == "editor" else FineTuning([0], steps=3)
    plain = copy.deepcopy(model)
    _compile(model, part, in_place, "eager")
    # code is compiled for the mode and the shape of an edit's first forward, before there is any hook
    ids = torch.arange(3, 7).repeat(2, 1)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.train().requires_grad_(True)
    found = {}
    for name, network in (("plain", plain), ("compiled", model)):
        editor.edit(network, tokenizer, facts, texts)
        metrics = evaluate(network, tokenizer, facts).metrics
        routing = trace_routing(network, tokenizer, texts)
        found[name] = metrics, routing
    assert found["plain"][0] == pytest.approx(found["compiled"][0], nan_ok=True)
    for index, chosen in found["plain"][1].experts.items():
        assert torch.equal(chosen, found["compiled"][1].experts[index])
    # the same operations in the same order
    for (name, weight), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, other), name
