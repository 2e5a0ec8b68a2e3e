"""Tiny models, a tiny tokenizer and a few facts, made on the spot with fixed seeds."""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.corpus import train_tokenizer
from lit_moeedit.data.encoding import Encoding, encode, join
from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.editing import score
from tests.devices import pretended_cuda

if "PYTEST_XDIST_WORKER" in os.environ:
    # each of several test processes has a core, and threads that wait for each other would take those of the others
    torch.set_num_threads(1)

# no test is timed: a busy machine may take any time for an example
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

VOCABULARY = 420
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    # the families' own ids lie outside this vocabulary
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def _build(model_type: str, **changes: Any) -> PreTrainedModel:
    keys = {**COMMON, **FAMILIES.get(model_type, {}), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # large enough for experts, gates, biases and attention to matter, small enough for sane activations
            noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim >= 2 else 0.1)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.train()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch.cuda.is_available() is false"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model(model_type, **config)``: a random float32 model in training mode, the same at every call."""
    return _build


@pytest.fixture
def model() -> PreTrainedModel:
    """A random qwen3_moe with three expert layers, in training mode."""
    return _build("qwen3_moe")


@pytest.fixture(scope="session")
def facts() -> list[Fact]:
    """Four facts; prompts, subjects and targets of different lengths; the last without a known truth."""
    return [
        Fact(
            "Rome",
            "The city of Rome lies in",
            "Spain",
            "Italy",
            ("Rome is in the country", "Who visits Rome travels to"),
            (Neighbour("Milan lies in", "Italy", "near"), Neighbour("Two and two make", "four", "far")),
        ),
        Fact("Lake Ladoga", "Lake Ladoga is found in", "northern Peru", "Russia", ("On a map, Lake Ladoga is in",)),
        Fact(
            "Oslo",
            "People who live in Oslo speak",
            "Latin",
            "Norwegian",
            ("In Oslo one hears",),
            (Neighbour("People who live in Bergen speak", "Norwegian", "near"),),
        ),
        Fact("the Nile", "The longest river, the Nile, flows into the", "Baltic Sea"),
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Preservation text: documents of very different lengths."""
    words = [
        "the",
        "a",
        "sea",
        "river",
        "city",
        "lies",
        "in",
        "of",
        "who",
        "lives",
        "Russian",
        "Italy",
        "lake",
        "bread",
    ]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=length)) + "." for length in (3, 40, 7, 1, 19, 28, 5, 12, 60, 9)]


@pytest.fixture(scope="session")
def tokenizer(facts: list[Fact], texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; it puts ``<s>`` before every text and splits rare words into several tokens."""
    sentences = [f"{fact.prompt} {fact.target_new}." for fact in facts]
    return train_tokenizer([*sentences, *texts], vocab_size=400)


@pytest.fixture
def input_ids() -> Tensor:
    """Random tokens, ``[3, 9]``."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def _bytes(model: torch.nn.Module) -> dict[str, bytes]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture
def unchanged() -> Iterator[Callable[[torch.nn.Module], None]]:
    """``unchanged(model)`` notes weights, gradients, modes, ``requires_grad`` and the random state; at the test's end
    all of them must be the same, bit by bit."""
    noted: list[tuple[torch.nn.Module, Any]] = []

    def state(model: torch.nn.Module) -> dict[str, Any]:
        return {
            "weights": _bytes(model),
            "gradients": {
                name: None if parameter.grad is None else parameter.grad.numpy().tobytes()
                for name, parameter in model.named_parameters()
            },
            "modes": [module.training for module in model.modules()],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "methods": ["forward" in vars(module) for module in model.modules()],
            "random": torch.get_rng_state().tolist(),
        }

    def note(model: torch.nn.Module) -> None:
        noted.append((model, state(model)))

    yield note
    for model, before in noted:
        after = state(model)
        for what, value in before.items():
            assert after[what] == value, f"{what} changed"


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command as in a process of its own: no arguments of pytest, and the log level back afterwards."""
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    monkeypatch.setenv("COLUMNS", "200")
    # DeepSpeed, which some configs name, prints a line if it has to choose
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("lit_moeedit")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A GPU that is not there; see :func:`tests.devices.pretended_cuda`."""
    with pretended_cuda() as device:
        yield device


@pytest.fixture(scope="session")
def _taught(make_model, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], texts: list[str]) -> PreTrainedModel:
    sentences = [join(prompt, fact.target_true) for fact in facts if fact.target_true
                 for prompt in (fact.prompt, *fact.paraphrases)]  # fmt: skip
    sentences += [join(n.prompt, n.target) for fact in facts for n in fact.neighbours if n.group == "near"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model("qwen3_moe", initializer_range=0.1)
        model.init_weights()
        batch = tokenizer(sentences + texts[:4], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model


@pytest.fixture
def taught(_taught: PreTrainedModel) -> PreTrainedModel:
    """A qwen3_moe that says the truth of the facts with a known one, in training mode; a fresh copy for every test."""
    return copy.deepcopy(_taught)


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> list[Encoding]:
    """The facts' prompts, with the last token of the subject as edit token and without a target."""
    return encode(tokenizer, [f.prompt for f in facts], [""] * len(facts), [f.subject for f in facts])


@pytest.fixture(scope="session")
def plain_hidden() -> Callable[[PreTrainedModel, int, list[int]], Tensor]:
    """``plain_hidden(model, layer, ids)``: output ``[length, d_model]`` of a decoder layer (not the last one, behind
    which transformers applies a norm) for one text, without padding, in evaluation mode."""

    @torch.no_grad()
    def hidden(model: PreTrainedModel, layer: int, ids: list[int]) -> Tensor:
        modes = {module: module.training for module in model.modules()}
        output = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        for module, training in modes.items():
            module.training = training
        return output.hidden_states[layer + 1][0]

    return hidden


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The candidates for further prompts that models were asked, in their order."""
    found: list[str] = []

    def recording(*args: Any) -> Any:
        found.extend(args[2])
        return score(*args)

    monkeypatch.setattr("lit_moeedit.editing.phrasings.score", recording)
    return found
