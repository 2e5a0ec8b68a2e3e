"""Material of `benchmarks.gpu`: random models by their configs, facts in any number, and text in any amount."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from lit_moeedit.data import Atlas, Corpus, Fact
from lit_moeedit.data.atlas import TEMPLATES, read_table
from lit_moeedit.data.encoding import join, token_ids
from lit_moeedit.pretrained import build_config

VOCABULARY = 2624
"""Of the tokenizer, which is trained on the spot; the models' own vocabularies are those of the published ones."""
MARGIN = 15e9
"""Bytes of a card that are kept free beside the weights: sums, activations, what an edit of 1,000 facts needs."""


class LeftOutError(Exception):
    """Raised for what cannot be done here, with the reason."""


class Case(NamedTuple):
    """A model's config, and which of its layers are edited."""

    config: dict[str, Any]
    layers: tuple[int, ...]


_SMALL_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN3 = Case(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
    (3, 4, 5, 6, 7),
)
GPT_OSS = Case(
    {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        **_SPECIAL,
    },
    (0,),
)
QWEN36 = Case(
    {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        **_SPECIAL,
    },
    (0,),
)
_TINY_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, **_SMALL_ATTENTION}
TINY = {
    id(QWEN3): Case(
        {**QWEN3.config, **_TINY_SHAPE, "num_hidden_layers": 4, "moe_intermediate_size": 24,
         "num_experts": 6, "num_experts_per_tok": 2},
        (1, 2),
    ),
    id(GPT_OSS): Case({**GPT_OSS.config, **_TINY_SHAPE, "intermediate_size": 24, "num_local_experts": 5,
                       "num_experts_per_tok": 2}, (0,)),
    id(QWEN36): Case(
        {**QWEN36.config, **_TINY_SHAPE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
         "num_experts": 6, "num_experts_per_tok": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        (0,),
    ),
}  # fmt: skip


def case_of(case: Case, tiny: bool) -> Case:
    """A case, or a tiny one of the same family."""
    return TINY[id(case)] if tiny else case


def random_model(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, deviation: float = 0.02
) -> PreTrainedModel:
    """A model whose weights are drawn where they stay; matrices have the given standard deviation."""
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(build_config(config), dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, deviation if parameter.ndim > 1 else min(deviation, 0.1), generator=generator)
            if "norm" in name:
                parameter += 1
    model.tie_weights()
    return model


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of the same model with so many of its layers."""
    found = {**config, "num_hidden_layers": layers}
    if "layer_types" in config:
        found["layer_types"] = config["layer_types"][:layers]
    return found


def parameters_of(config: dict[str, Any], layers: int) -> int:
    """Number of parameters of the model with so many layers."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(build_config(with_layers(config, layers)))
    return sum(parameter.numel() for parameter in model.parameters())


def layers_that_fit(config: dict[str, Any], wanted: int, room: float, bytes_per_parameter: float) -> int:
    """Number of the layers that have room in so many bytes; 0 if not even the embeddings have."""
    one, two = (parameters_of(config, layers) * bytes_per_parameter for layers in (1, 2))
    return max(0, min(wanted, math.floor((room - one) / (two - one)) + 1))


def free_memory(device: torch.device) -> float:
    """Bytes that a card has left; a CPU is taken to have enough."""
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def tokenizer() -> PreTrainedTokenizerFast:
    """The same one at every call."""
    return Atlas(seed=0).train_tokenizer(VOCABULARY)


def facts(count: int) -> list[Fact]:
    """Facts of the atlas, each in one phrasing, with another answer of the same relation; 5,000 at most."""
    entries = read_table()
    random.Random(0).shuffle(entries)
    answers = {relation: sorted({e.answer for e in entries if e.relation == relation}) for relation in TEMPLATES}
    found = []
    for phrasing in range(min(map(len, TEMPLATES.values()))):
        for entry in entries[: count - len(found)]:
            others = answers[entry.relation]
            new = others[(others.index(entry.answer) + 1) % len(others)]
            prompt = TEMPLATES[entry.relation][phrasing].format(entry.subject)
            found.append(Fact(entry.subject, prompt, new, entry.answer))
    return found


def statements(count: int | None = None) -> list[str]:
    """Sentences of the atlas, all or some of them."""
    found = [join(statement.prompt, statement.target) + "." for statement in Atlas(seed=0).train]
    return found if count is None else random.Random(0).sample(found, count)


def texts(words: PreTrainedTokenizerFast, tokens: int) -> list[str]:
    """Documents of 10 to 400 tokens or so, with ``tokens`` tokens in all, or a few more."""
    every = statements()
    lengths = [len(ids) - 1 for ids in token_ids(words, every)]  # without what is put before a text
    draw, count = random.Random(0), 0
    found: list[str] = []
    while count < tokens:
        chosen = draw.choices(range(len(every)), k=draw.randint(1, 40))
        found.append(" ".join(every[i] for i in chosen))
        count += 1 + sum(lengths[i] for i in chosen)
    return found


def small_corpus(edits: int) -> Corpus:
    """Some of the atlas, to train on for a few steps."""
    atlas = Atlas(edits=edits, neighbours=1, seed=0)
    return Corpus(atlas.train[:400], atlas.validation[:32], atlas.edits)
