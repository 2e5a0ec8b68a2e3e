"""Every family of the installed transformers: what is read off its experts and what an edit does to it, against the
same computed by hand; and why some are refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from lit_moeedit.data.encoding import Encoding, encode
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, EditResult, TargetOptimizer
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.editing.target_rows import TargetRow, UpperLayers, lay_out
from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError, expert_layers, experts_per_token
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import decoder_layers, inference, logits
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import family_catalog as module
from lit_moeedit.planning.family_catalog import Family, moe_families, small_model
from lit_moeedit.preservation import NullSpace

pytestmark = pytest.mark.families

SUPPORTED = [
    "aria_text", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba",
    "kimi_linear", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "solar_open", "zaya",
]  # fmt: skip
NORM = "normalises the output of its experts"
STREAMS = "several streams"
CONVOLUTION = "mixes the experts' outputs of different tokens"
REFUSED = {
    "afmoe": NORM,
    "axk1": NORM,
    "beam": NORM,
    "deepseek_v4": STREAMS,
    "flex_olmo": NORM,
    "gemma4_text": NORM,
    "hy_v4": STREAMS,
    "inkling2_text": CONVOLUTION,
    "inkling_text": CONVOLUTION,
    "kolibri1": NORM,
    "qwen4_exp_text": STREAMS,
}
UNDECLARED = ["dbrx", "doge", "jetmoe", "llama4", "llama4_text", "longcat_flash"]
VOCABULARY = 420
K = {"phimoe": 2, "zaya": 1}
"""Experts for each token, where a family does not allow three."""


def test_all_families_are_here() -> None:
    found = moe_families()
    assert [family.model_type for family in found if family.is_declared] == sorted([*SUPPORTED, *REFUSED])
    assert [family.model_type for family in found if not family.is_declared] == UNDECLARED


def test_a_family_whose_config_wants_arguments_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("num_experts is missing")

    monkeypatch.setattr(module, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ["mixtral", "qwen3_moe"])
    monkeypatch.setattr(module, "CONFIG_MAPPING", {"mixtral": refuse, "qwen3_moe": Qwen3MoeConfig})
    assert moe_families() == [Family("mixtral", True), Family("qwen3_moe", True)]


@dataclass
class Seen:
    """What hooks saw of one layer in forwards that nothing else watches, for each prompt; rows are tokens."""

    hidden: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def look(model: PreTrainedModel, layer: ExpertLayer, prompts: list[list[int]]) -> Seen:
    """Run the prompts, each by itself, and note what goes into the experts, comes out of them and out of the layer."""
    seen = Seen()

    def at_experts(module: nn.Module, args: Any, said: Tensor) -> None:
        for name, value in zip(("hidden", "experts", "gates", "said"), (*args, said), strict=True):
            getattr(seen, name).append(value)

    def at_layer(module: nn.Module, args: Any, output: Any) -> None:
        seen.output.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.experts.register_forward_hook(at_experts), layer.layer.register_forward_hook(at_layer)]
    with inference(model):
        for ids in prompts:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def key_by_hand(model_type: str, experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """Activation of one expert before its down-projection for one token, in float64, from the family's formula."""
    weight = (experts.up_proj if model_type == "nemotron_h" else experts.gate_up_proj)[expert].double()
    if model_type == "nemotron_h":  # squared ReLU, no gate
        return F.relu(weight @ hidden).square()
    if model_type == "aria_text":
        weight = weight.T
    if model_type == "gpt_oss":  # stored transposed, gate and up interleaved, both clamped
        both = weight.T @ hidden + experts.gate_up_proj_bias[expert].double()
        gate, up = both[0::2], both[1::2]
    else:
        gate, up = (weight @ hidden).chunk(2)
    if model_type in ("gpt_oss", "minimax_m3_vl_text"):
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return F.silu(gate) * up


def down_by_hand(model_type: str, experts: nn.Module, expert: int, key: Tensor) -> Tensor:
    """What one expert says, in float64."""
    weight = experts.down_proj[expert].double()
    said = (weight.T if model_type in ("gpt_oss", "aria_text") else weight) @ key
    return said + experts.down_proj_bias[expert].double() if model_type == "gpt_oss" else said


@dataclass
class Case:
    """A small model of a family with random weights, in training mode, and a layer in its middle.

    That layer is the highest with experts that has another layer above it, if there is one.
    """

    model_type: str
    model: PreTrainedModel
    prompts: list[list[int]]

    @property
    def index(self) -> int:
        layers = list(expert_layers(self.model).values())
        last = decoder_layers(self.model, layers[0])[-1]
        return [layer.index for layer in layers if layer.layer is not last or layer is layers[0]][-1]

    @property
    def layer(self) -> ExpertLayer:
        return expert_layers(self.model)[self.index]

    def copy(self, dtype: torch.dtype = torch.float32) -> Case:
        return Case(self.model_type, copy.deepcopy(self.model).to(dtype), self.prompts)


# transformers takes a second for every copy of this one's config
SLOW = {"dots3_note_text"}
FEW = {"bailing_hybrid", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "qwen3_moe"}
"""Layers of several kinds, shared experts, transposed weights with biases, a gain, Mamba in between, and none of it."""


def some(names: set[str], *values: Any) -> list[Any]:
    """Parameters for every family; those of families that are not named are slow."""
    return [pytest.param(name, *values, marks=[] if name in names else [pytest.mark.slow]) for name in SUPPORTED]


every_family_in_float32 = pytest.mark.parametrize(
    ("case", "dtype"),
    [*some({*SUPPORTED} - SLOW, torch.float32), *some(FEW, torch.bfloat16)],
    indirect=["case"],
    scope="module",
)
every_family = pytest.mark.parametrize("case", some({*SUPPORTED} - SLOW), indirect=True, scope="module")
few_families = pytest.mark.parametrize("case", some(FEW), indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    model = small_model(request.param, vocab_size=VOCABULARY).train()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    return Case(
        request.param, model, [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (6, 1)]
    )


def keys_of(case: Case, implementation: str) -> dict[int, RoutedKeys]:
    case.model.set_experts_implementation(implementation)
    seen: dict[int, RoutedKeys] = {}
    layers = list(expert_layers(case.model).values())
    with inference(case.model), watch_keys(layers, lambda: None, lambda x, k: seen.update({x.index: k})):
        case.model(input_ids=torch.tensor(case.prompts[:1]), use_cache=False)
    case.model.set_experts_implementation("eager")
    return seen


@every_family_in_float32
@torch.no_grad()
def test_keys_gates_and_output_equal_those_computed_by_hand(case: Case, dtype: torch.dtype) -> None:
    case = case.copy(dtype)
    # float32: sums of some dozens of products; bfloat16: rounded keys, and a sum of rounded products
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    watched = keys_of(case, "eager")
    for index, layer in expert_layers(case.model).items():
        seen, keys = look(case.model, layer, case.prompts[:1]), watched[index]
        hidden, experts, gates, said = (part[0] for part in (seen.hidden, seen.experts, seen.gates, seen.said))
        assert experts.shape == gates.shape == (6, K.get(case.model_type, 3))
        pairs = [(t, int(j)) for t, row in enumerate(experts) for j in row]
        assert sorted(pairs) == sorted(zip(keys.token.tolist(), keys.expert.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert bool(keys.gate.isfinite().all() and (keys.gate > 0).all())
        output = torch.zeros_like(said, dtype=torch.float64)
        for token, expert, gate, key in zip(keys.token, keys.expert, keys.gate, keys.key, strict=True):
            assert gate == gates[token][experts[token] == expert]
            expected = key_by_hand(case.model_type, layer.experts, int(expert), hidden[token].double())
            torch.testing.assert_close(
                key.double(), expected, rtol=0, atol=tolerance * (1 + float(expected.abs().max()))
            )
            output[token] += gate.double() * down_by_hand(case.model_type, layer.experts, int(expert), expected)
        torch.testing.assert_close(said.double(), output, rtol=0, atol=tolerance * float(output.abs().max()))


@few_families
def test_features_do_not_depend_on_the_implementation(case: Case) -> None:
    eager = keys_of(case, "eager")
    for implementation in ("grouped_mm", "batched_mm"):
        for index, other in keys_of(case, implementation).items():
            assert torch.equal(other.token, eager[index].token)
            assert torch.equal(other.expert, eager[index].expert)
            # keys of the second layer on stand behind the first's output, which is summed in another order
            torch.testing.assert_close(other.gate, eager[index].gate, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(other.key, eager[index].key, rtol=1e-4, atol=1e-4)


@every_family
@torch.no_grad()
def test_the_upper_layers_say_what_the_whole_model_says(case: Case) -> None:
    """Target vectors are optimised through layers that are given the target layer's output, the others left out."""
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 6)]
    rows = [[TargetRow(t, Encoding(ids, len(ids) - 2, len(ids) - 4))] for t, ids in enumerate(draws)]
    with inference(case.model):
        batch = lay_out(case.model, case.layer, rows, 0)
        deltas = torch.randn(2, batch.output.hidden.shape[-1], generator=generator)
        said = UpperLayers(case.model, case.layer).log_probabilities(batch, deltas)

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[torch.arange(len(hidden)), batch.token] += deltas[batch.edit].to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = case.layer.layer.register_forward_hook(add)
        whole = logits(case.model, batch.ids, batch.mask, batch.positions, 0)[batch.row, batch.column].log_softmax(-1)
        handle.remove()
    torch.testing.assert_close(said, whole, rtol=1e-4, atol=1e-4)  # float32 through some layers


def edit(
    case: Case, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], texts: list[str], **settings: Any
) -> EditResult:
    targets = TargetOptimizer(steps=2, stop=0.0)
    editor = Editor(
        [case.index], targets=targets, ridge=1e-7, token="last", target_tokens="first", neutral="", **settings
    )
    return editor.edit(case.model, tokenizer, facts, texts)


def moved(case: Case, before: Seen, after: Seen) -> Tensor:
    """How far the layer's output moved at the last token of each prompt, ``[n, d_model]`` float64."""
    ends = [new[-1].double() - old[-1].double() for old, new in zip(before.output, after.output, strict=True)]
    return torch.stack(ends)


def predicted(case: Case, seen: Seen, result: EditResult) -> Tensor:
    """``Σ_j g_j ΔW_j k_j`` at the last token of each prompt, ``[n, d_model]`` float64, keys by hand."""
    rows = []
    for hidden, experts, gates in zip(seen.hidden, seen.experts, seen.gates, strict=True):
        row = torch.zeros(case.layer.shape[1], dtype=torch.float64)
        for expert, gate in zip(experts[-1].tolist(), gates[-1].double(), strict=True):
            key = key_by_hand(case.model_type, case.layer.experts, expert, hidden[-1].double())
            row += gate * (result.deltas[case.index].dense(expert).double() @ key)
        rows.append(row)
    return torch.stack(rows)


def gain_by_hand(case: Case) -> Tensor | float:
    """What the family multiplies its experts' output by, from its code."""
    config = case.model.config
    factors = {
        "cohere2_moe": 0.5,  # the mean of the routed and the shared experts
        "minimax": 0.7,
        "laguna": 1.7,
        "minimax_m3_vl_text": 1.7,
        **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), 0.3),
    }
    if case.model_type == "zaya":
        return case.layer.layer.post_mlp_residual_scale.hidden_states_scale.detach().double()
    assert case.model_type in factors or not getattr(config, "residual_multiplier", None)
    return factors.get(case.model_type, 1.0)


@every_family_in_float32
def test_an_edit_moves_the_layer_by_what_the_solver_predicted(case: Case, dtype, tokenizer, facts, texts) -> None:
    case = case.copy(dtype)
    prompts = [e.ids for e in encode(tokenizer, [fact.prompt for fact in facts], [""] * len(facts))]
    before = look(case.model, case.layer, prompts)
    result = edit(case, tokenizer, facts, [], preserve="none")
    expected = predicted(case, before, result) if dtype == torch.float32 else None
    step = moved(case, before, look(case.model, case.layer, prompts))
    # bfloat16 rounds weights and outputs by up to 1/256 of them
    size = float(torch.stack([row[-1].double() for row in before.output]).abs().max())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * size
    if expected is not None:
        torch.testing.assert_close(step, expected * gain_by_hand(case), rtol=1e-4, atol=tolerance)
    # fewer facts than a key has entries, hardly a ridge: the solver reaches the targets
    torch.testing.assert_close(step, result.targets.deltas.double(), rtol=1e-2, atol=max(tolerance, 1e-2 * size))
    assert float(result.targets.deltas.norm(dim=-1).min()) > 0.1


@few_families
def test_a_null_space_edit_leaves_preserved_inputs_alone_and_is_saved(
    case: Case, tokenizer, facts, tmp_path: Path
) -> None:
    case, preserved = case.copy(), ["who lives in the sea"]
    prompts = [tokenizer(preserved[0])["input_ids"]]
    before = look(case.model, case.layer, prompts)
    assert len(prompts[0]) < case.layer.shape[2], "all directions of the keys would be taken"
    result = edit(case, tokenizer, facts, preserved, preserve=NullSpace(1e-7))
    after = look(case.model, case.layer, prompts)
    torch.testing.assert_close(after.said[0], before.said[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.output[0], before.output[0], rtol=1e-4, atol=1e-4)
    assert result.relative_change[case.index] > 1e-3

    case.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in case.model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@few_families
def test_it_trains_and_its_routing_is_traced(case: Case, tokenizer, texts, monkeypatch) -> None:
    case = case.copy()
    module, logged = LitMoE(config={"model_type": case.model_type}), {}
    module.model = case.model
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    loss = module.training_step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 0)
    loss.backward()
    assert 0 < logged["train/loss"] < 20
    assert all(value > 0 for value in logged.values())
    assert float(case.layer.down_proj.grad.abs().max()) > 0

    trace = trace_routing(case.model, tokenizer, texts[:2])
    for index, layer in expert_layers(case.model).items():
        experts, probabilities = trace.experts[index], trace.probabilities[index]
        # phimoe takes two, whatever its config says
        assert experts.shape[1] == (2 if case.model_type == "phimoe" else experts_per_token(case.model))
        assert all(len(set(row)) == len(row) for row in experts.tolist())
        assert int(experts.min()) >= 0
        assert int(experts.max()) < layer.num_experts
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(probabilities)))


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items(), ids=str)
def test_a_family_is_refused_by_name_with_the_reason(model_type: str, reason: str, unchanged) -> None:
    model = small_model(model_type)
    unchanged(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"layer \d of {type(model).__name__} .*{reason}.*lit-moeedit families"
    ):
        Editor(list(expert_layers(model))).check(model)


def test_experts_outside_of_the_interface_are_refused() -> None:
    model = small_model("llama4_text", moe_layers=[0, 1, 2], intermediate_size_mlp=24)
    with pytest.raises(
        UnsupportedModelError, match=r"Llama4ForCausalLM has no layer .* declares the experts interface"
    ):
        Editor([1]).check(model)
