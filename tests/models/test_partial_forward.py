"""Tests of partial forwards: their outputs, and that the model is unchanged afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.models.experts import UnsupportedModelError, expert_layers
from lit_moeedit.models.partial_forward import (
    LayerOutput,
    decoder_layers,
    experts_run_on,
    inference,
    layer_output,
    logits,
    output_replaced,
    skipped,
)

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3"]
PASSES = {"rtol": 1e-4, "atol": 1e-4}  # float32 through some layers, with other batch shapes and masks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_and_logits_equal_a_plain_forward(
    make_model, plain_hidden, encoded: list[Encoding], model_type: str, side
) -> None:
    model = make_model(model_type).eval()
    layer = expert_layers(model)[1]
    ids, mask = pad([e.ids for e in encoded], 0, side)
    assert not mask.all()
    with inference(model):
        hidden = layer_output(model, layer, ids, mask, position_ids(mask)).hidden
        scores = logits(model, ids, mask, position_ids(mask), keep=ids.shape[1])
        last = logits(model, ids, mask, position_ids(mask), keep=2)
    torch.testing.assert_close(last, scores[:, -2:])
    for row, encoding in enumerate(encoded):
        real = mask[row].bool()
        torch.testing.assert_close(hidden[row, real], plain_hidden(model, 1, encoding.ids), **PASSES)
        alone = model(input_ids=torch.tensor([encoding.ids])).logits[0]
        torch.testing.assert_close(scores[row, real], alone, **PASSES)


def test_positions_are_passed_on(model: PreTrainedModel, encoded: list[Encoding]) -> None:
    """A shift by the padding changes no output with rotary positions, which are relative; with others it does."""
    seen: list[torch.Tensor] = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1]),
        with_kwargs=True,
    )
    ids, mask = pad([e.ids for e in encoded], 0, "left")
    positions = position_ids(mask)
    logits(model, ids, mask, positions, keep=1)
    assert torch.equal(seen[0], positions)
    for row, encoding in zip(positions, encoded, strict=True):
        assert row[-len(encoding.ids) :].tolist() == list(range(len(encoding.ids)))


def test_neither_layers_above_nor_the_head_are_run(model: PreTrainedModel, encoded: list[Encoding]) -> None:
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.lm_head.register_forward_hook(lambda *_: ran.append(-1))
    ids, mask = pad([e.ids for e in encoded], 0)
    layer_output(model, expert_layers(model)[1], ids, mask, position_ids(mask))
    assert ran == [0, 1]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("token_budget", [1, 25, 16384])
def test_edit_tokens(make_model, plain_hidden, encoded: list[Encoding], model_type: str, token_budget: int) -> None:
    model = make_model(model_type).eval()
    layers = expert_layers(model)
    seen = edit_tokens(model, encoded, layers[1], layers[1], 0, token_budget)
    inputs = {}
    handle = layers[1].experts.register_forward_hook(lambda module, args, output: inputs.update(args=args))
    expected = set()
    for number, encoding in enumerate(encoded):
        hidden = plain_hidden(model, 1, encoding.ids)
        torch.testing.assert_close(seen.hidden[number], hidden[encoding.edit_token], **PASSES)
        _, experts, gates = inputs["args"]
        for expert, gate in zip(experts[encoding.edit_token], gates[encoding.edit_token], strict=True):
            expected.add((number, int(expert)))
            row = (seen.keys.token == number) & (seen.keys.expert == expert)
            torch.testing.assert_close(seen.keys.gate[row], gate[None], **PASSES)
    handle.remove()
    assert {(int(t), int(j)) for t, j in zip(seen.keys.token, seen.keys.expert, strict=True)} == expected
    assert seen.keys.expert.tolist() == sorted(seen.keys.expert.tolist())


def test_keys_of_a_lower_layer_do_not_depend_on_the_batch(model: PreTrainedModel, encoded: list[Encoding]) -> None:
    layers = expert_layers(model)
    together, alone = (edit_tokens(model, encoded, layers[2], layers[0], 0, budget).keys for budget in (16384, 1))
    assert torch.equal(together.expert, alone.expert)
    assert torch.equal(together.token, alone.token)
    torch.testing.assert_close(together.key, alone.key, **PASSES)


class TestInference:
    def test_everything_comes_back(self, model: PreTrainedModel, unchanged) -> None:
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[1].eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        unchanged(model)
        with inference(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not torch.is_grad_enabled()
            torch.rand(3)
        assert torch.is_grad_enabled()
        with pytest.raises(ZeroDivisionError), inference(model, gradients=True):
            torch.rand(3)
            raise ZeroDivisionError

    @pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
    def test_gradients_are_possible_inside(self, model: PreTrainedModel, outer) -> None:
        """Lightning validates and tests under one of these."""
        with outer():
            with inference(model, gradients=True):
                variable = torch.ones(2, requires_grad=True)
                (gradient,) = torch.autograd.grad((variable**2).sum(), variable)
                assert gradient.tolist() == [2.0, 2.0]
            assert not torch.is_grad_enabled()


class TestReplacing:
    def test_skipped_layers_hand_on_their_input(self, model: PreTrainedModel) -> None:
        layers = list(model.model.layers)
        hidden = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
        with skipped(layers[:2]):
            assert layers[0](hidden, attention_mask=None) is hidden
            assert layers[1](hidden_states=hidden) is hidden
        assert all("forward" not in vars(layer) for layer in layers)

    def test_they_hand_it_on_in_the_form_of_their_neighbour(self, model: PreTrainedModel) -> None:
        layers, hidden, state = list(model.model.layers), torch.ones(2, 3, 32), torch.zeros(2, 3, 5)
        neighbour = LayerOutput.of((torch.zeros(2, 3, 32), state, None))
        with skipped(layers[:1], lambda: neighbour), output_replaced(layers[1], lambda: neighbour.at(slice(0, 1))):
            returned, other, nothing = layers[0](hidden)
            assert returned is hidden
            assert other is state
            assert nothing is None
            assert [part if part is None else part.shape[0] for part in layers[1](hidden)] == [1, 1, None]
        assert LayerOutput.of(hidden).returned() is hidden

    def test_forwards_come_back_after_an_exception(self, model: PreTrainedModel) -> None:
        layers = list(model.model.layers)
        with (
            pytest.raises(ZeroDivisionError),
            skipped(layers),
            output_replaced(layers[0], lambda: LayerOutput(torch.zeros(1))),
        ):
            raise ZeroDivisionError
        assert all("forward" not in vars(layer) for layer in layers)

    def test_a_forward_that_was_replaced_before_comes_back(self) -> None:
        module = nn.Linear(2, 2)
        other = lambda x: x + 1  # noqa: E731
        module.forward = other
        with skipped([module]):
            assert module(torch.ones(2)).tolist() == [1.0, 1.0]
        assert module.forward is other

    def test_hook_is_removed_after_an_exception(self, model: PreTrainedModel) -> None:
        layer = expert_layers(model)[0]
        with pytest.raises(IndexError):
            layer_output(model, layer, torch.tensor([[10**6]]), torch.ones(1, 1), torch.zeros(1, 1).long())
        assert not layer.layer._forward_hooks
        assert all("forward" not in vars(other) for other in model.model.layers)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_run_on_some_tokens(make_model, model_type: str) -> None:
    model = make_model(model_type).eval()
    layer = expert_layers(model)[1]
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    expert = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [0, 3], [2, 0]])
    gate = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[True, False, True], [False, False, True]])
    expected = layer.experts(hidden, expert, gate)
    forward, ran = layer.experts.forward, []
    layer.experts.forward = lambda *inputs: ran.append(len(inputs[0])) or forward(*inputs)
    with experts_run_on([layer], tokens):
        found = layer.experts(hidden, expert, gate)
        other = layer.experts(hidden[:4], expert[:4], gate[:4])  # not these tokens: run as ever
    layer.experts(hidden, expert, gate)
    assert ran == [3, 4, 6]
    torch.testing.assert_close(found[tokens.flatten()], expected[tokens.flatten()], **PASSES)
    assert not found[~tokens.flatten()].any()
    torch.testing.assert_close(other, expected[:4], **PASSES)


def test_decoder_layers_include_those_without_experts(make_model) -> None:
    model = make_model("deepseek_v3")
    assert decoder_layers(model, expert_layers(model)[2]) == list(model.model.layers)
    other = make_model("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="layer 2 is not in a ModuleList"):
        decoder_layers(other, expert_layers(model)[2])


def test_the_tokenizer_splits_subjects_and_marks_the_start(
    tokenizer: PreTrainedTokenizerFast, encoded: list[Encoding]
) -> None:
    """The other tests rely on several lengths, special tokens, and edit tokens that are not all the last."""
    assert len({len(e.ids) for e in encoded}) > 1
    assert all(e.ids[0] == tokenizer.bos_token_id for e in encoded)
    assert any(e.edit_token < len(e.ids) - 1 for e in encoded)
