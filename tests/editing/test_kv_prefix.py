"""Rows from the edit token on, behind kept keys and values, against the same rows whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.editing.kv_prefix import Prefix, logits_at, prefix_for
from lit_moeedit.editing.target_rows import TargetRow, UpperLayers, lay_out
from lit_moeedit.editing.targets import TargetOptimizer
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import logits

PASSES = {"rtol": 1e-4, "atol": 1e-4}  # float32 through two layers, with other batch shapes

MOE = {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
LINEAR = {
    **MOE,
    "head_dim": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0}
LFM2 = {
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 0,
    "layer_types": ["conv", "full_attention", "conv"],
}


def text(edit: int, length: int, token: int, target_start: int) -> TargetRow:
    ids = torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(97 * edit + length))
    return TargetRow(edit, Encoding(ids.tolist(), target_start, token))


@pytest.fixture
def by_edit() -> list[list[TargetRow]]:
    """Edit tokens at the first and last token and between, neutral rows, targets of one to four tokens."""
    return [
        [text(0, 12, 3, 9), text(0, 17, 8, 14), text(0, 6, 4, 6)],
        [text(1, 10, 8, 9), text(1, 14, 9, 10), text(1, 5, 4, 5)],
        [text(2, 7, 0, 4), text(2, 4, 3, 4)],
    ]


def plainly(model: PreTrainedModel, layer: int, by_edit: Sequence[Sequence[TargetRow]], deltas: Tensor) -> Tensor:
    """Log-probabilities ``[m, vocabulary]`` at the predictions, each row by itself, whole, through all layers."""
    found = []
    for row in (row for own in by_edit for row in own):

        def add(module: Any, args: Any, output: Tensor, row: TargetRow = row) -> Tensor:
            where = (torch.tensor(0), torch.tensor(row.encoding.edit_token))
            return output.index_put(where, deltas[row.edit], accumulate=True)

        handle = model.model.layers[layer].register_forward_hook(add)
        scores = model(input_ids=torch.tensor([row.encoding.ids]), use_cache=False).logits[0].log_softmax(-1)
        handle.remove()
        found.append(scores[-1:] if row.is_neutral else scores[row.encoding.target_start - 1 : -1])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"attn_implementation": "eager"}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
        ("gpt_oss", {"sliding_window": 4}),
        ("mixtral", {"sliding_window": 3}),
        ("olmoe", {}),
        ("deepseek_v3", {}),
        ("granitemoe", GRANITE),
    ],
)
def test_rows_from_the_edit_token_on_say_the_same(make_model, by_edit, model_type: str, config: dict[str, Any]) -> None:
    model = make_model(model_type, **config).eval().requires_grad_(False)
    layer = next(iter(expert_layers(model).values()))  # most families: with two layers above it
    upper = UpperLayers(model, layer)
    deltas = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    with torch.no_grad():
        whole = lay_out(model, layer, by_edit, 0)
        prefix = prefix_for(model, whole.before)
        assert prefix is not None
        before = upper.log_probabilities(whole, record=prefix)
    torch.testing.assert_close(before, plainly(model, layer.index, by_edit, torch.zeros(3, 32)), **PASSES)
    cut, expected = whole.after(prefix), plainly(model, layer.index, by_edit, deltas)
    assert cut.ids.shape[1] < whole.ids.shape[1] == whole.mask.shape[1] == cut.mask.shape[1]
    found = upper.log_probabilities(cut, deltas)
    torch.testing.assert_close(upper.log_probabilities(whole, deltas), expected, **PASSES)
    torch.testing.assert_close(found, expected, **PASSES)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((weights * output).sum(), deltas)[0] for output in (expected, found)]
    assert gradients[0].abs().max() > 1
    torch.testing.assert_close(gradients[1], gradients[0], **PASSES)
    # and again with fewer rows: nothing of the forwards before was kept
    rows, predictions = cut.select(torch.tensor([True, False, True, False, True, False, True, True]))
    torch.testing.assert_close(upper.log_probabilities(rows, deltas), found[predictions], **PASSES)


def test_the_layers_above_see_the_edit_token_and_what_follows(model: PreTrainedModel, by_edit) -> None:
    above, below = [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: below.append(0))
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: above.append(args[0].shape[:2]))
    heads: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape))
    rows = [row for own in by_edit for row in own]
    TargetOptimizer(steps=4, stop=0.0).optimize(model, expert_layers(model)[1], rows, 0)
    # whole rows once: 9 positions before the longest prefix's end, 8 from there on
    assert above == [(8, 17)] + 5 * [(8, 8)]
    assert len(below) == 1
    # the layers up to the target ask for one position each; then targets of 3, 3, 1, 4, 3 tokens and 3 neutral rows
    assert heads == 6 * [(1, 17, 420)]


@pytest.mark.parametrize(
    ("model_type", "config"), [("qwen3_next", LINEAR), ("qwen3_5_moe_text", LINEAR), ("lfm2_moe", LFM2)]
)
def test_models_with_other_states_run_whole_rows(make_model, by_edit, model_type: str, config: dict[str, Any]) -> None:
    model = make_model(model_type, **config)
    model.eval().requires_grad_(False)
    assert prefix_for(model, 3) is None
    layer, deltas = expert_layers(model)[1], torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    whole = lay_out(model, layer, by_edit, 0)
    found = UpperLayers(model, layer).log_probabilities(whole, deltas)
    torch.testing.assert_close(found, plainly(model, 1, by_edit, deltas), **PASSES)
    ran: list[torch.Size] = []
    expert_layers(model)[2].experts.register_forward_hook(lambda module, args, output: ran.append(output.shape))
    rows = [row for own in by_edit for row in own]
    assert TargetOptimizer(steps=3, stop=0.0).optimize(model, layer, rows, 0).steps.tolist() == [3, 3, 3]
    # padded on the right only, so that a batch is as long as its longest row
    assert ran == 5 * [(8 * 16, 32)]


def test_a_model_that_answers_otherwise_behind_kept_keys_runs_whole_rows(
    model: PreTrainedModel, by_edit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, rows = expert_layers(model)[1], [row for own in by_edit for row in own]
    settings = TargetOptimizer(steps=4, stop=0.0)
    with caplog.at_level(logging.WARNING):
        expected = settings.optimize(model, layer, rows, 0)
    assert not caplog.records
    fix = Prefix.fix

    def forget(self: Prefix) -> None:
        fix(self)
        for part in self.layers[2:]:
            part.values.zero_()

    monkeypatch.setattr(Prefix, "fix", forget)
    with caplog.at_level(logging.WARNING):
        found = settings.optimize(model, layer, rows, 0)
    assert "Qwen3MoeForCausalLM computes other log-probabilities" in caplog.text
    torch.testing.assert_close(found.deltas, expected.deltas, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("model_type", "config"), [("qwen3_moe", {}), ("granitemoe", GRANITE)])
def test_logits_at_single_positions(make_model, model_type: str, config: dict[str, Any]) -> None:
    """What a family does behind the output embeddings, such as dividing logits, is done here too."""
    model = make_model(model_type, **config).eval()
    ids, mask = pad([[5, 6, 7, 8], [9, 10]], 0)
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 1])
    expected = logits(model, ids, mask, position_ids(mask), keep=4)[rows, columns]
    torch.testing.assert_close(logits_at(model, ids, mask, position_ids(mask), rows, columns), expected, **PASSES)
    assert not model.lm_head._forward_pre_hooks


def test_logits_of_a_model_that_does_not_call_its_head(model: PreTrainedModel, monkeypatch) -> None:
    ids, mask = pad([[5, 6, 7, 8], [9, 10]], 0)
    rows, columns = torch.tensor([0, 1]), torch.tensor([1, 1])
    expected = logits(model.eval(), ids, mask, position_ids(mask), keep=0)[rows, columns]
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert torch.equal(logits_at(model, ids, mask, position_ids(mask), rows, columns), expected)
