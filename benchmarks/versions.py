"""One version of the package against another on a CPU: seconds of an edit's phases, and its effect.

Run from the root of the repository, with the package installed, and another version of it in another environment:

    python -m benchmarks.versions --before path/to/other/bin/python

The versions take turns, each in a process of its own, and the fastest of some rounds counts. Writes ``versions.json``
and ``versions.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.training import MODELS, RESULTS, header, quiet, row, trained, write

SLOWER = 1.05
"""No phase may take more than so many times as long."""
CHILD = r"""
import inspect, json, random, sys, time
import torch, yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from lit_moeedit.data import Atlas
from lit_moeedit.editing import Editor, TargetOptimizer, evaluate, second_moments
from lit_moeedit.models.experts import expert_layers

config_file, weights, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = {"seconds": {}}


def fastest(name, work):
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        found["seconds"][name] = min(found["seconds"].get(name, 1e9), time.perf_counter() - start)
    return result


corpus = Atlas(edits=50, seed=1)
tokenizer = corpus.train_tokenizer(2624)
statements, draw = [f"{s.prompt} {s.target}." for s in corpus.train], random.Random(0)
texts = [" ".join(draw.choices(statements, k=draw.randint(1, 40))) for _ in range(160)]
shape = yaml.safe_load(open(config_file, encoding="utf-8"))["model"]["init_args"]["config"]
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
model.load_state_dict(load_file(weights))
layers = list(expert_layers(model).values())
fastest("statistics, demo, long texts", lambda: second_moments(model, tokenizer, layers[:3], texts, 8192, gated=True))
targets = TargetOptimizer(steps=60, learning_rate=0.5, clamp=2.0, weight_decay=0.05, stop=0.05)
settings = {"token": "last", "contexts": ("", "Note:", "As we know,"), "token_budget": 4096, "targets": targets}
# earlier versions edit at the first token of a target only
if "target_tokens" in inspect.signature(Editor.__init__).parameters:
    settings["target_tokens"] = "first"
editor = Editor([2], **settings)
# versions before 0.2 have a method of another name
rows = (editor.encode(tokenizer, corpus.edits).rows if hasattr(editor, "encode")
        else editor._encode(tokenizer, corpus.edits, model)[0])
nll = fastest("targets, demo, 50 edits", lambda: targets.optimize(model, layers[2], rows, 0)).nll
kept = statements[:4096]
before = evaluate(model, tokenizer, corpus.edits)
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
for _ in range(repeats):
    model.load_state_dict(state)
    result = Editor([0, 1, 2], **settings).edit(model, tokenizer, corpus.edits, kept)
    for phase, seconds in result.seconds.items():
        name = f"edit of 50 facts, {phase}" if phase != "edit" else "edit of 50 facts, whole"
        found["seconds"][name] = min(found["seconds"].get(name, 1e9), seconds)
metrics = evaluate(model, tokenizer, corpus.edits, before.neighbours_exact).metrics
names = ("efficacy", "efficacy_accuracy", "generalization", "specificity", "specificity_retained", "utility")
found["metrics"] = {"targets' NLL": float(nll.mean()), **{name: metrics[name] for name in names}}
wide = {"model_type": "qwen3_moe", "vocab_size": 2624, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 256, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64}
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**wide), dtype=torch.float32)
layers = list(expert_layers(model).values())
fastest("statistics, 64 experts of 256", lambda: second_moments(model, tokenizer, layers[1:3], texts[:40], 8192))
print(json.dumps(found))
"""
"""Program that each version runs; it uses nothing but what both have."""


def measured(python: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a version where the source of the other is not found; give what it printed."""
    command = [python, "-c", CHILD, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="Python of an environment with the other version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="in each process")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps trained weights")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    trained("atlas", 1, arguments.models)
    config = Path(__file__).resolve().parents[1] / "configs/atlas.yaml"
    given = [str(config), str((arguments.models / "atlas, seed 1.safetensors").resolve()), str(arguments.repeats)]
    # not resolved: the link belongs to its environment
    pythons = {"before": os.path.abspath(arguments.before), "now": sys.executable}  # noqa: PTH100
    results: dict[str, dict[str, Any]] = {name: {"seconds": {}} for name in pythons}
    for _ in range(arguments.rounds):
        for name, python in pythons.items():
            found = measured(python, given, arguments.models.resolve())
            results[name]["metrics"] = found["metrics"]
            for phase, seconds in found["seconds"].items():
                results[name]["seconds"][phase] = min(results[name]["seconds"].get(phase, seconds), seconds)
    lines = header(["phase", "before, s", "now, s", "now / before", ""])
    for phase, seconds in results["before"]["seconds"].items():
        now = results["now"]["seconds"][phase]
        # hundredths of a second are not resolved
        verdict = "slower" if now > SLOWER * seconds + 0.01 else ""
        lines.append(row([phase, f"{seconds:.3f}", f"{now:.3f}", f"{now / max(seconds, 1e-9):.2f}", verdict]))
    lines += ["", *header(["metric of the edit", "before", "now"])]
    for name, value in results["before"]["metrics"].items():
        lines.append(row([name, f"{value:.4f}", f"{results['now']['metrics'][name]:.4f}"]))
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    write("versions", f"`python -m benchmarks.versions --rounds {arguments.rounds}`", text, results, arguments.output)


if __name__ == "__main__":
    main()
