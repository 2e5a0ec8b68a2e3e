"""Plans of FSDP2: against runs of two processes, and by formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import Workload, empty_model, simulate
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.simulated_fsdp2 import shard_size, weights_together
from lit_moeedit.planning.zero_costs import ModelSize, held_in_training
from lit_moeedit.pretrained import build_config
from lit_moeedit.sharding.commit import BLOCK
from tests.planning.metered_run import CONFIG, differences

RANKS = 3


def test_layers_are_gathered_unless_an_edit_skips_them() -> None:
    sharding = Sharding(RANKS, None, 2, fsdp2=True)
    keys, module = CONFIG | {"num_hidden_layers": 3}, LitMoE(config=CONFIG)
    editor = Editor((1,), targets=TargetOptimizer(steps=2, stop=0.0), contexts=("",), preserve="none")
    work = Workload(edits=6, prompt_tokens=8, target_tokens=2, questions=1, texts=1, rows=2, row_tokens=8)
    with empty_model(AutoConfig.for_model(keys.pop("model_type"), **keys), torch.bfloat16) as module.model:
        size = ModelSize.of(module.model, sharding)
        groups = [
            sharding.part(2 * RANKS * sum(shard_size(weight, RANKS) for weight in weights))
            for _, weights in weights_together(module.model)
        ]
        plan = {cost.phase: cost for cost in simulate(module, editor, sharding, work)[0]}
        for part in module.model.modules():
            assert not part._forward_pre_hooks
    root, *layers = groups
    # eight experts on three ranks are padded to nine
    assert size.parameters < RANKS * size.shard < 1.13 * size.parameters
    # weights, gradients and two moments, and no master weights
    assert held_in_training(size, sharding) == 4 * 2 * size.shard
    # the backward pass gathers the layers again, and reduces all
    assert plan["training step"].sent == 2 * root + 3 * sum(layers)
    # at first a forward of all layers; a step goes forward and back through those above the edited one only
    passes = plan["targets"].sent
    assert passes < 4 * root + 2 * sum(layers) + 3 * 2 * layers[2], (passes, root, layers)
    # two norms, whatever the layer's size
    assert plan["commit"].sent == 2 * 2 * sharding.part(8)


@pytest.mark.slow
def test_a_commit_on_gpus_changes_larger_blocks_than_on_cpus() -> None:
    keys = CONFIG | {"num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 4}
    editor = Editor((0,), targets=TargetOptimizer(steps=2, stop=0.0), contexts=("",), preserve="none")
    work = Workload(edits=4, prompt_tokens=4, target_tokens=1, questions=1, texts=1, rows=2, row_tokens=4)
    module = LitMoE(config=keys)
    with empty_model(build_config(keys), torch.float32) as module.model:
        costs = simulate(module, editor, Sharding(2, None, 4, fsdp2=True), work)[0]
    rise = next(cost.peak - cost.held for cost in costs if cost.phase == "commit")
    # the change of a whole expert, of which a CPU changes one half after the other
    assert BLOCK["cpu"] * 2 == 1024**2
    assert rise >= 4 * 1024**2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_plan_says_what_a_run_takes(precision: str, tmp_path: Path) -> None:
    assert not (wrong := differences(None, precision, str(tmp_path))), "\n".join(wrong)
