"""The scale of the experts' output in a layer's output: constants are found, everything else is refused."""

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
from lit_moeedit.models.output_scale import expert_residuals, output_scales
from lit_moeedit.planning.family_catalog import small_model
from lit_moeedit.solvers import Solver, Tucker, Woodbury
from tests.editing.recording import QUICK


@pytest.fixture
def changed(model: PreTrainedModel) -> Callable[[Callable[[Tensor], Tensor], torch.dtype], PreTrainedModel]:
    """Make a model whose layer 1 applies a function to its experts' output ``[tokens, d_model]``."""

    def change(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        layer = expert_layers(model)[1]
        layer.layer.mlp.register_forward_hook(lambda module, args, output: function(output))
        # the others want keys of 16 bytes in bfloat16
        model.set_experts_implementation("eager")
        return model.to(dtype)

    return change


def scales(model: PreTrainedModel) -> dict[int, Tensor]:
    return output_scales(model, list(expert_layers(model).values()))


def test_it_is_exactly_one_where_nothing_is_done(model: PreTrainedModel, unchanged) -> None:
    unchanged(model)
    found = scales(model)
    assert list(found) == [0, 1, 2]
    assert all(torch.equal(scale, torch.ones(32)) for scale in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", [0.22, -1.7, 16.0])
def test_a_constant(changed, dtype: torch.dtype, constant: float) -> None:
    found = scales(changed(lambda output: constant * output, dtype))
    assert torch.equal(found[0], torch.ones(32))
    assert len(found[1].unique()) == 1
    # of outputs that are rounded to 2⁻⁸ of themselves, the mean over all entries
    torch.testing.assert_close(
        found[1], torch.full((32,), constant), rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_for_each_entry_and_a_shift(changed, dtype: torch.dtype) -> None:
    constants = torch.linspace(-1, 2, 32)
    found = scales(changed(lambda output: constants.to(output.dtype) * output + 3, dtype))
    torch.testing.assert_close(found[1], constants, rtol=0, atol=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda output: F.rms_norm(output, (32,)), "normalises"),
        (lambda output: F.layer_norm(output, (32,)), "normalises"),
        (torch.tanh, "normalises"),
        (lambda output: output * output.mean(-1, keepdim=True), "normalises"),
        (lambda output: output.flip(-1), "normalises"),
        (lambda output: output + output.roll(1, 1), "mixes the experts' outputs of different tokens"),
        (lambda output: 0 * output, "does not depend on its experts"),
    ],
    ids=["rms norm", "layer norm", "tanh", "product", "permutation", "convolution", "nothing"],
)
def test_what_no_delta_can_undo_is_refused(changed, function, reason: str, dtype: torch.dtype, unchanged) -> None:
    model = changed(function, dtype)
    unchanged(model)
    with pytest.raises(UnsupportedModelError, match=rf"layer 1 of Qwen3MoeForCausalLM .*{reason}"):
        Editor([0, 1]).check(model)
    assert Editor([0]).check(model)


@pytest.mark.parametrize(
    ("other_token", "gain"), [(0.0, 1.0), (8.0, None)], ids=["one unit in the last place", "another token moves"]
)
def test_rounding_of_large_numbers_is_no_reason(make_model, other_token: float, gain: float | None) -> None:
    """In bfloat16 one token may be so large that its last bit is a hundred times what an ordinary token has."""
    model = make_model("qwen3_moe", hidden_size=64).to(torch.bfloat16)
    model.set_experts_implementation("eager")
    layer, forwards = expert_layers(model)[1], list[Tensor]()

    def add(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        forwards.append(output.clone())
        output = output.clone()
        output[:, 0, 5] += 3000.0
        if len(forwards) == 2:  # the one in which the experts' output is moved
            output[:, 0, 5] += 16.0  # one unit in the last place
            output[:, 2, 7] *= torch.tensor([0.5, 2.0])  # something large was added and taken away again
            output[:, 1, 3] += other_token
        return output

    layer.layer.mlp.register_forward_hook(add)
    if gain is None:
        with pytest.raises(UnsupportedModelError, match="mixes"):
            output_scales(model, [layer])
    else:
        assert torch.equal(output_scales(model, [layer])[1], torch.full((64,), gain))
    assert len(forwards) == 2


def test_a_model_that_is_not_finite(model: PreTrainedModel) -> None:
    expert_layers(model)[1].down_proj.detach().fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the output of layer 1 of Qwen3MoeForCausalLM is not finite"):
        scales(model)


def test_the_residual_of_the_experts_gives_the_residual_of_the_layer() -> None:
    scale, residuals = torch.tensor([0.5, -2.0, 1e-3, 0.0]), torch.randn(3, 4)
    wanted = expert_residuals(residuals, scale)
    torch.testing.assert_close((wanted * scale)[:, :2], residuals[:, :2])
    assert not wanted[:, 2:].any()
    assert torch.equal(expert_residuals(residuals, torch.ones(4)), residuals)


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
    result = Editor(layers, solver, QUICK, "none", ridge=1e-7, token="last", target_tokens="first", neutral="").edit(
        model, tokenizer, facts
    )
    step = edit_tokens(model, prompts, target, target, 0).hidden - before
    # fewer facts than a key has entries, and hardly a ridge
    torch.testing.assert_close(
        step, result.targets.deltas, rtol=0, atol=0.01 * float(result.targets.deltas.abs().max())
    )
