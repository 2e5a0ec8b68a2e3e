"""Cost of second moments beside the bare forward pass over the same text, and cost of shaping matrices.

Run from the root of the repository, with the package installed:

    python -m benchmarks.moments

Everything that is compared is run in turns, and the fastest of some rounds counts. Writes ``moments.json`` and
``moments.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.commit_memory import peak
from lit_moeedit.data import Atlas
from lit_moeedit.data.encoding import encode, pad, position_ids, token_batches
from lit_moeedit.editing import SecondMoments, second_moments
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.shaping import Shaping

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 2624
SHAPES: dict[str, tuple[dict[str, Any], list[int], int]] = {
    # sizes, watched layers, tokens
    "atlas demo: E=16, k=4, d_hidden=192, d_model=128, 4 layers, watched 0–2": (
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "hidden_size": 128,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
        [0, 1, 2], 32768,
    ),
    "E=64, k=8, d_hidden=256, d_model=512, 6 layers, watched 2–4": (
        {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "hidden_size": 512,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        [2, 3, 4], 8192,
    ),
    "E=128, k=8, d_hidden=768, d_model=2048, 2 layers, watched 0–1": (
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "hidden_size": 2048,
         "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        [0, 1], 2048,
    ),
}  # fmt: skip
BUDGET = 8192


def documents(tokenizer: PreTrainedTokenizerFast, statements: list[str], tokens: int) -> list[str]:
    """Texts of 10 to 400 tokens out of the atlas's statements, so many that they have ``tokens`` tokens."""
    draw, texts, count = random.Random(0), [], 0
    while count < tokens:
        texts.append(" ".join(draw.choices(statements, k=draw.randint(1, 40))))
        count += len(tokenizer(texts[-1])["input_ids"])
    return texts


def fastest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, in turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


class Passes:
    """Ways to run the same batches of text through a model."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, watched: list[int], texts: list[str]
    ):
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.layers = [expert_layers(model)[index] for index in watched]
        rows = [encoding.ids[:512] for encoding in encode(tokenizer, texts, [""] * len(texts))]
        batches = token_batches([len(row) for row in rows], BUDGET)
        self.batches = [pad([rows[i] for i in batch], 0) for batch in batches]

    def forward(self, implementation: str) -> None:
        """Up to the highest watched layer, all of that one included."""
        self.model.set_experts_implementation(implementation)
        with inference(self.model):
            for ids, mask in self.batches:
                layer_output(self.model, self.layers[-1], ids, mask, position_ids(mask))

    def whole_forward(self, implementation: str) -> None:
        """All layers, and the logits of all positions."""
        self.model.set_experts_implementation(implementation)
        with inference(self.model):
            for ids, mask in self.batches:
                self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)

    def recomputed(self, implementation: str) -> dict[int, SecondMoments]:
        """As before: the keys of a batch are computed beside the forward, all at once, and then added up."""
        self.model.set_experts_implementation(implementation)
        moments = {layer.index: SecondMoments.zeros(layer) for layer in self.layers}
        chosen = torch.empty(0)

        def observe(layer: ExpertLayer, keys: RoutedKeys) -> None:
            counts = torch.bincount(keys.expert, minlength=layer.num_experts).tolist()
            for expert, rows in enumerate(keys.key.split(counts)):
                moments[layer.index].add(expert, rows, torch.ones(len(rows)))

        with inference(self.model), watch_keys(self.layers, lambda: chosen, observe):
            for ids, mask in self.batches:
                chosen = mask.flatten().nonzero().squeeze(-1)
                layer_output(self.model, self.layers[-1], ids, mask, position_ids(mask))
        return moments

    def streamed(self, cache: MomentsCache | None = None) -> dict[int, SecondMoments]:
        """As it is: tokenizing and padding included."""
        return second_moments(self.model, self.tokenizer, self.layers, self.texts, BUDGET, cache=cache)


def statistics(name: str, rounds: int) -> dict[str, float]:
    sizes, watched, tokens = SHAPES[name]
    corpus = Atlas(seed=0)
    tokenizer = corpus.train_tokenizer(VOCABULARY)
    texts = documents(tokenizer, [f"{s.prompt} {s.target}." for s in corpus.train], tokens)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=VOCABULARY, norm_topk_prob=True, **sizes)
    passes = Passes(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, watched, texts)
    calls: dict[str, Callable[[], object]] = {}
    for kind in ("eager", "grouped_mm"):
        calls[f"forward, {kind}"] = lambda kind=kind: passes.forward(kind)
        calls[f"whole forward, {kind}"] = lambda kind=kind: passes.whole_forward(kind)
        calls[f"before, {kind}"] = lambda kind=kind: passes.recomputed(kind)
    calls["now"] = passes.streamed
    seconds = fastest(calls, rounds)
    found = {kind: min(seconds[f"{kind}, eager"], seconds[f"{kind}, grouped_mm"])
             for kind in ("forward", "whole forward", "before")}  # fmt: skip
    found["now"] = seconds["now"]
    with tempfile.TemporaryDirectory() as folder:
        cache = MomentsCache(folder)
        passes.streamed(cache)
        found["cached"] = fastest({"cached": lambda: passes.streamed(cache)}, rounds)["cached"]
    best = min(("eager", "grouped_mm"), key=lambda kind: seconds[f"before, {kind}"])
    for kind, call in (("before", lambda: passes.recomputed(best)), ("now", passes.streamed)):
        with torch.profiler.profile(profile_memory=True) as profile:
            sums = call()
        held = sum(x.nbytes for part in sums.values() for x in part.tensors().values())
        found[f"{kind}, MiB besides the sums"] = (peak(profile) - held) / 2**20
    found["tokens"] = sum(int(mask.sum()) for _, mask in passes.batches)
    return found


def products(experts: int, d_hidden: int, pairs: int, rounds: int) -> dict[str, float]:
    """Ways to add up ``k kᵀ`` of pairs that are sorted by expert, on unevenly used experts."""
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.full((experts,), 5.0)).sample()
    counts = (shares * pairs).long()
    keys = torch.randn(int(counts.sum()), d_hidden)
    moments = SecondMoments(
        torch.zeros(experts, d_hidden, d_hidden), torch.zeros(experts, dtype=torch.long), torch.zeros(1)
    )
    expert = torch.repeat_interleave(torch.arange(experts), counts)
    place = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[expert]

    def loop() -> None:
        for j, rows in enumerate(keys.split(counts.tolist())):
            moments.add(j, rows, torch.ones(len(rows)))

    def padded() -> None:
        batch = torch.zeros(experts, int(counts.max()), d_hidden)
        batch[expert, place] = keys
        moments.total.baddbmm_(batch.mT, batch)

    def grouped() -> None:
        moments.total.add_(torch.nn.functional.grouped_mm(keys.T, keys, offs=counts.cumsum(0).int()))

    return fastest({"loop": loop, "padded bmm": padded, "grouped_mm": grouped}, rounds)


def roots(experts: int, d_hidden: int, rounds: int) -> dict[str, float]:
    """Matrices for ``covariance`` at strength 10⁴, as in the demo, of moments with eigenvalues from 10 to 10⁻⁵."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(experts, d_hidden, d_hidden)).Q
    moment = (basis * torch.logspace(1, -5, d_hidden)) @ basis.mT
    moments = SecondMoments((moment + moment.mT) / 2, torch.ones(experts, dtype=torch.long), torch.ones(1))
    exact = torch.linalg.inv(torch.eye(d_hidden, dtype=torch.float64) + 1e4 * moments.total.double())

    def shaping(symmetric: bool) -> Tensor:
        return Shaping.of(moments, torch.arange(experts), CovariancePenalty(), 1e4, symmetric).matrices

    def error(matrices: Tensor) -> float:
        return float((matrices.double().mT @ matrices.double() - exact).norm() / exact.norm())

    seconds = fastest({"eigenvectors": lambda: shaping(True), "Cholesky": lambda: shaping(False)}, rounds)
    return {**seconds, "error of eigenvectors": error(shaping(True)), "error of Cholesky": error(shaping(False))}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| shape | tokens | forward s | whole forward s | before s | now s | now / forward | now / whole | cached s "
        "| before MiB | now MiB |",
        "|" + " --- |" * 11,
    ]
    for name, x in results["statistics"].items():
        values = [x["forward"], x["whole forward"], x["before"], x["now"]]
        ratios = [x["now"] / x["forward"], x["now"] / x["whole forward"], x["cached"]]
        cells = [f"{x['tokens']:.0f}", *(f"{v:.2f}" for v in values), *(f"{v:.2f}" for v in ratios)]
        cells += [f"{x[f'{kind}, MiB besides the sums']:.0f}" for kind in ("before", "now")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for title, part in (("products", "products"), ("shaping matrices", "roots")):
        columns = list(next(iter(results[part].values())))
        lines += ["", f"| {title} | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
        for name, x in results[part].items():
            lines.append(f"| {name} | " + " | ".join(f"{x[column]:.2g}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    results = {
        "statistics": {name: statistics(name, rounds) for name in SHAPES},
        "products": {
            f"E={experts}, d_hidden={d_hidden}, {pairs} pairs": products(experts, d_hidden, pairs, rounds)
            for experts, d_hidden, pairs in ((16, 192, 32768), (64, 256, 65536), (128, 768, 32768))
        },
        "roots": {
            f"{experts} experts, d_hidden={d_hidden}": roots(experts, d_hidden, rounds)
            for experts, d_hidden in ((16, 192), (64, 256), (8, 768), (1, 2880))
        },
    }
    text = table(results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "moments.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "moments.md").write_text(
        f"`python -m benchmarks.moments --rounds {rounds}`\n\n{text}", encoding="utf-8"
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
