"""Tests that need a card: the same edit as on the CPU, nothing left of one that is broken off, a run, exact sums."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.data.encoding import pad, pad_id, position_ids, token_batches, token_ids
from lit_moeedit.editing import Editor, TargetOptimizer, second_moments
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import inference, layer_output

pytestmark = pytest.mark.gpu

LAYERS = (0, 1)


def editor() -> Editor:
    return Editor(LAYERS, targets=TargetOptimizer(steps=4, stop=0.0))


def down_projections(model: PreTrainedModel) -> Tensor:
    layers = expert_layers(model)
    return torch.cat([layers[index].down_proj.detach().cpu().flatten() for index in LAYERS])


def test_an_edit_is_that_of_the_cpu(model: Any, tokenizer: Any, facts: Any, texts: Any) -> None:
    after = []
    for device in ("cpu", "cuda"):
        edited = copy.deepcopy(model).to(device)
        editor().edit(edited, tokenizer, facts, texts)
        after.append(down_projections(edited))
    scale = (after[0] - down_projections(model)).abs().max()
    assert scale > 0
    # rounding of float32 in another order, through the steps of the targets and the solution of the system
    assert (after[1] - after[0]).abs().max() < 1e-3 * scale


def test_an_edit_that_is_broken_off_leaves_all_bits(model: Any, tokenizer: Any, facts: Any, texts: Any) -> None:
    model = model.to("cuda")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed: list[str] = []

    def guard() -> bool:
        changed.extend(name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name]))
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        editor().edit(model, tokenizer, facts, texts, guard=guard)
    assert len(changed) == len(LAYERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_edit_in_the_middle_of_fit_with_mixed_precision_and_clipping(tmp_path: Path) -> None:
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    devices: list[str] = []

    class Where(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            devices.append(pl_module.device.type)

    trainer = _trainer(
        tmp_path,
        [
            KnowledgeEditing(_editor(), at={"epoch": 1}, on_failure="keep"),
            RoutingMonitor(),
            EditReport(console=False),
            Where(),
        ],
        accelerator="gpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_epochs=2,
        # some kernels of a card have no deterministic form
        deterministic=False,
    )
    trainer.fit(_module(), _data())
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert devices == ["cuda"]
    assert summary["edits"] == 6
    assert summary["perplexity"]["after_training"] is not None
    assert summary["after_training"]["efficacy"] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_second_moments_are_those_of_float64(
    make_model: Any, tokenizer: Any, texts: Any, dtype: torch.dtype, gated: bool
) -> None:
    budget = 128
    # kernels for bfloat16 want rows of a multiple of 16 bytes
    model = make_model("qwen3_moe", moe_intermediate_size=24).to("cuda", dtype)
    # what reaches the first layer does not depend on how experts are run
    layer = expert_layers(model)[0]
    measured = second_moments(model, tokenizer, [layer], texts, budget, gated=gated)[0].total.double()
    exact = torch.zeros_like(measured)
    chosen = torch.empty(0)

    def observe(_: ExpertLayer, seen: RoutedKeys) -> None:
        keys = seen.key.double() * (seen.gate.double()[:, None] if gated else 1)
        for expert, rows in enumerate(keys.split(torch.bincount(seen.expert, minlength=len(exact)).tolist())):
            exact[expert].addmm_(rows.T, rows)

    rows = token_ids(tokenizer, texts)
    with inference(model), watch_keys([layer], lambda: chosen, observe):
        for batch in token_batches([len(ids) for ids in rows], budget):
            ids, mask = (x.to("cuda") for x in pad([rows[i] for i in batch], pad_id(tokenizer)))
            chosen = mask.flatten().nonzero().squeeze(-1)
            layer_output(model, layer, ids, mask, position_ids(mask))
    # float32 sums stay far below; products of 10 or 7 bits do not
    assert (measured - exact).norm() < 1e-4 * exact.norm()
