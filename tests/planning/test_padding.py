"""Results of a text do not depend on the texts beside it, in any family: alone, in a batch, by transformers itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.encoding import encode, pad, position_ids
from lit_moeedit.editing import TargetOptimizer, answers, perplexity, score, second_moments
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.editing.target_rows import TargetRow
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.padding import longest_padded
from lit_moeedit.planning.family_catalog import small_model
from tests.planning.test_family_catalog import REFUSED, SLOW, SUPPORTED, VOCABULARY

pytestmark = pytest.mark.families

INDEXERS = ["axk2", "deepseek_v32", "dots3_note_text", "hy_v4", "glm_moe_dsa"]
"""Families with a sparse-attention indexer; the small models choose 16 tokens."""
COMPRESSED = {
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
    },
}
"""Settings for layers that the smallest configs of these families leave out."""
TOLERANCE = 5e-4
"""In nats: chunked linear attention (qwen3_next) sums float32 in blocks whose edges depend on the batch's length."""


DEFAULT = [*INDEXERS, "minimax_m3_vl_text", "deepseek_v4", "qwen3_moe", "qwen3_next", "gpt_oss", "mixtral"]
"""Families of the default suite, with one for each type of attention; the slow suite has all of them."""


def marks(name: str, slow: bool = False) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] * (slow or name in SLOW))


def family(model_type: str) -> PreTrainedModel:
    return small_model(model_type, vocab_size=VOCABULARY, **COMPRESSED.get(model_type, {})).train()


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """Prompts of 3 to 24 words and their targets, of one word to five."""
    words = [
        "who",
        "lives",
        "in",
        "the",
        "sea",
        "people",
        "speak",
        "Latin",
        "is",
        "capital",
        "of",
        "Rome",
        "Oslo",
        "one",
    ]
    generator = torch.Generator().manual_seed(0)
    picked = [torch.randint(len(words), (n,), generator=generator).tolist() for n in (3, 11, 15, 15, 24)]
    targets = [" ".join(words[i] for i in row[: 1 + n % 5]) for n, row in enumerate(picked)]
    return [" ".join(words[i] for i in row) for row in picked], targets


@torch.no_grad()
def plainly(model: PreTrainedModel, tokenizer: Any, prompt: str, target: str) -> float:
    """The score of one text by a forward of it alone."""
    (encoding,) = encode(tokenizer, [prompt], [target])
    ids = torch.tensor([encoding.ids])
    output = model.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(encoding.target_start, ids.shape[1])
    return sum(float(output[i - 1, encoding.ids[i]]) for i in places) / len(places)


@pytest.mark.parametrize("model_type", [marks(name, name not in DEFAULT) for name in sorted([*SUPPORTED, *REFUSED])])
def test_scores_do_not_depend_on_the_batch(
    model_type: str, tokenizer: PreTrainedTokenizerFast, pairs: tuple[list[str], list[str]]
) -> None:
    model = family(model_type)
    lengths = [len(row) for row in tokenizer(pairs[0])["input_ids"]]
    assert min(lengths) < 16 < sorted(lengths)[1] and max(lengths) < 58  # of 64 positions
    expected = torch.tensor([plainly(model, tokenizer, *pair) for pair in zip(*pairs, strict=True)])
    together = score(model, tokenizer, *pairs, token_budget=10_000).log_prob
    alone = score(model, tokenizer, *pairs, token_budget=1).log_prob
    torch.testing.assert_close(together, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(alone, expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 10 * TOLERANCE


@pytest.mark.parametrize(
    "model_type",
    [marks(name, name != "glm_moe_dsa") for name in (*INDEXERS, "minimax_m3_vl_text", "qwen3_next")],
)
def test_nothing_else_depends_on_the_batch(
    model_type: str, tokenizer: PreTrainedTokenizerFast, pairs: tuple[list[str], list[str]]
) -> None:
    model, (prompts, _) = family(model_type), pairs
    assert longest_padded(model) == (16 if model_type in INDEXERS else None)
    layers = list(expert_layers(model).values())
    assert answers(model, tokenizer, prompts) == [answers(model, tokenizer, [text])[0] for text in prompts]

    encodings = encode(tokenizer, prompts, [""] * len(prompts), prompts, "last")
    together = edit_tokens(model, encodings, layers[-1], layers[0], 0, 10_000)
    alone = edit_tokens(model, encodings, layers[-1], layers[0], 0, 1)
    torch.testing.assert_close(together.hidden, alone.hidden, rtol=1e-3, atol=1e-3)
    assert torch.equal(together.keys.token, alone.keys.token) and torch.equal(together.keys.expert, alone.keys.expert)
    torch.testing.assert_close(together.keys.key, alone.keys.key, rtol=1e-3, atol=1e-3)

    routing = [trace_routing(model, tokenizer, prompts, budget).probabilities for budget in (10_000, 1)]
    sums = [second_moments(model, tokenizer, layers, prompts, budget) for budget in (10_000, 1)]
    for layer in layers:
        torch.testing.assert_close(*(found[layer.index] for found in routing), rtol=0, atol=1e-3)
        first, second = (found[layer.index].total for found in sums)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-3 * float(second.abs().max()))

    if model_type not in REFUSED:  # as hy_v4, whose hidden states have several streams
        rows = [TargetRow(t, one) for t, one in enumerate(encode(tokenizer, *pairs, prompts, "last"))]
        settings = (TargetOptimizer(steps=2, stop=0.0, token_budget=budget) for budget in (10_000, 1))
        first, second = (one.optimize(model, layers[0], rows, 0).nll for one in settings)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)

    ids, mask = pad([encoding.ids for encoding in encodings], 0)
    batches = [batch_of(ids, mask)], [batch_of(*pad([encoding.ids], 0)) for encoding in encodings]
    together_too, one_by_one = (perplexity(model, part) for part in batches)
    assert together_too == pytest.approx(one_by_one, rel=1e-3)


def test_a_mask_with_holes_keeps_its_batch() -> None:
    """Columns after a masked one are not cut."""
    model = family("glm_moe_dsa")
    ids, mask = torch.randint(3, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0)), torch.ones(1, 30)
    mask[0, 5:10] = 0
    batch = batch_of(ids, mask.long())
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask.long())).logits
    labels = batch["labels"][0, 1:]
    expected = torch.nn.functional.cross_entropy(output[0, :-1], labels, ignore_index=-100).exp()
    assert perplexity(model, [batch]) == pytest.approx(float(expected), rel=1e-3)


def batch_of(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("model_type", [marks(name) for name in (*INDEXERS, "minimax_m3_vl_text", "deepseek_v4")])
@torch.no_grad()
def test_padding_matters_here(model_type: str) -> None:
    """Else the tests above show nothing: texts are padded on the left."""
    model = family(model_type).eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (25, 40)]
    ids, mask = pad(rows, 0, side="left")
    padded = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[0, 15:]
    alone = model(input_ids=torch.tensor(rows[:1])).logits[0]
    assert float((padded - alone).abs().max()) > 100 * TOLERANCE
