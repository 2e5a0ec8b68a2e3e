"""What a layer makes of its experts' output: constants are found, everything else is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import encode
from lit_moeedit.editing import Editor
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.models.experts import UnsupportedModelError, expert_layers
from lit_moeedit.models.output_scale import _gain, asked_of_experts, output_gains
from lit_moeedit.planning.family_catalog import small_model
from lit_moeedit.solvers import Solver, Tucker, Woodbury
from tests.editing.recording import QUICK


@pytest.fixture
def changed(model: PreTrainedModel) -> Callable[[Callable[[Tensor], Tensor], torch.dtype], PreTrainedModel]:
    """The model, with a function of what layer 1 makes of its experts' output, ``[tokens, d_model]``."""

    def change(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        layer = expert_layers(model)[1]
        layer.layer.mlp.register_forward_hook(lambda module, args, output: function(output))
        # the others want keys of 16 bytes in bfloat16
        model.set_experts_implementation("eager")
        return model.to(dtype)

    return change


def gains(model: PreTrainedModel) -> dict[int, Tensor]:
    return output_gains(model, list(expert_layers(model).values()))


def test_it_is_exactly_one_where_nothing_is_done(model: PreTrainedModel, unchanged) -> None:
    unchanged(model)
    found = gains(model)
    assert list(found) == [0, 1, 2]
    assert all(torch.equal(gain, torch.ones(32)) for gain in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", [0.22, -1.7, 16.0])
def test_a_constant(changed, dtype: torch.dtype, constant: float) -> None:
    found = gains(changed(lambda said: constant * said, dtype))
    assert torch.equal(found[0], torch.ones(32))
    assert len(found[1].unique()) == 1
    # of outputs that are rounded to 2⁻⁸ of themselves, the mean over all entries
    torch.testing.assert_close(
        found[1], torch.full((32,), constant), rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_for_each_entry_and_a_shift(changed, dtype: torch.dtype) -> None:
    constants = torch.linspace(-1, 2, 32)
    found = gains(changed(lambda said: constants.to(said.dtype) * said + 3, dtype))
    torch.testing.assert_close(found[1], constants, rtol=0, atol=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda said: F.rms_norm(said, (32,)), "normalises"),
        (lambda said: F.layer_norm(said, (32,)), "normalises"),
        (torch.tanh, "normalises"),
        (lambda said: said * said.mean(-1, keepdim=True), "normalises"),
        (lambda said: said.flip(-1), "normalises"),
        (lambda said: said + said.roll(1, 1), "mixes what its experts say of different tokens"),
        (lambda said: 0 * said, "does not depend on what its experts say"),
    ],
    ids=["rms norm", "layer norm", "tanh", "product", "permutation", "convolution", "nothing"],
)
def test_what_no_delta_can_undo_is_refused(changed, function, reason: str, dtype: torch.dtype, unchanged) -> None:
    model = changed(function, dtype)
    unchanged(model)
    with pytest.raises(UnsupportedModelError, match=rf"layer 1 of Qwen3MoeForCausalLM .*{reason}"):
        Editor([0, 1]).check(model)
    assert Editor([0]).check(model)


def test_rounding_of_large_numbers_is_no_reason(model: PreTrainedModel) -> None:
    """In bfloat16 one token may be so large that its last bit is a hundred times what an ordinary token has."""
    layer, d_model = expert_layers(model)[1], 64
    before = torch.randn(2, 4, d_model).bfloat16()
    before[:, 0, 5] = 3000.0
    shift = torch.full((2, d_model), 8.0)
    after = before.clone()
    after[:, 2] = before[:, 2] + shift.bfloat16()
    after[:, 0, 5] += 16.0  # one unit in the last place
    after[:, 2, 7] = before[:, 2, 7] + torch.tensor([4.0, 16.0])  # something large was added and taken away again
    assert torch.equal(
        _gain(model, layer, before, after, (after - before)[:, 2].index_fill(1, torch.tensor(7), 8.0)),
        torch.ones(d_model),
    )
    after[:, 1, 3] += 4.0
    with pytest.raises(UnsupportedModelError, match="mixes"):
        _gain(model, layer, before, after, shift)


def test_a_model_that_is_not_finite(model: PreTrainedModel) -> None:
    expert_layers(model)[1].down_proj.detach().fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the output of layer 1 of Qwen3MoeForCausalLM is not finite"):
        gains(model)


def test_what_is_asked_of_the_experts_gives_the_residual() -> None:
    gain, residuals = torch.tensor([0.5, -2.0, 1e-3, 0.0]), torch.randn(3, 4)
    asked = asked_of_experts(residuals, gain)
    torch.testing.assert_close((asked * gain)[:, :2], residuals[:, :2])
    assert not asked[:, 2:].any()
    assert torch.equal(asked_of_experts(residuals, torch.ones(4)), residuals)


@pytest.mark.parametrize(
    ("layers", "solver"),
    [([1], Woodbury()), ([0, 1], Woodbury()), ([1], Tucker(energy=1.0, whiten=False))],
    ids=["one layer", "two layers", "a carried core"],
)
def test_an_edit_reaches_its_targets_behind_a_constant(tokenizer, facts, layers: list[int], solver: Solver) -> None:
    model = small_model("granitemoe", vocab_size=420)
    subjects = [fact.subject for fact in facts]
    prompts = encode(tokenizer, [fact.prompt for fact in facts], [""] * len(facts), subjects, "last")
    target = expert_layers(model)[1]
    before = edit_tokens(model, prompts, target, target, 0).hidden
    result = Editor(layers, solver, QUICK, "none", ridge=1e-7, token="last", neutral="").edit(model, tokenizer, facts)
    step = edit_tokens(model, prompts, target, target, 0).hidden - before
    # fewer facts than a key has entries, and hardly a ridge
    torch.testing.assert_close(
        step, result.targets.deltas, rtol=0, atol=0.01 * float(result.targets.deltas.abs().max())
    )
