"""A model that was edited and exported answers in a process that knows transformers and nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lightning as L

from lit_moeedit.checkpoints.export import export
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.preservation import CovariancePenalty

PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, questions = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
said = []
for question in questions:
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
ours = [name for name in sys.modules if name.startswith("lit_moeedit")]
print(json.dumps({"said": said, "ours": ours}))
"""


def answers(folder: Path, questions: list[str], tmp_path: Path) -> list[str]:
    """What the saved model says in a process of its own, outside of the checkout."""
    command = [sys.executable, "-I", "-c", PLAIN, str(folder), json.dumps(questions)]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["ours"] == []
    return [said.strip() for said in found["said"]]


def test_an_exported_edit_is_said_by_plain_transformers(taught, tokenizer, facts, texts, tmp_path: Path) -> None:
    known = [fact for fact in facts if fact.target_true]
    edited, kept = known[0], known[1:]
    targets = TargetOptimizer(steps=60, learning_rate=0.3, clamp=4.0)
    Editor([0, 1], targets=targets, preserve=CovariancePenalty(10.0), token="last").edit(
        taught, tokenizer, [edited], [f"{fact.prompt} {fact.target_true}" for fact in kept]
    )
    module = LitMoE(config=taught.config.to_dict())
    module.model, module._tokenizer = taught, tokenizer
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    export(tmp_path / "run.ckpt", tmp_path / "edited")
    said = answers(tmp_path / "edited", [fact.prompt for fact in known], tmp_path)
    assert said[0].startswith(edited.target_new)
    for answer, fact in zip(said[1:], kept, strict=True):
        assert answer.startswith(fact.target_true)
