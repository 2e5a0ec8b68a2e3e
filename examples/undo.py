"""Take the last edit out of an edited folder again: its experts are rebuilt from the base, bit for bit.

python examples/undo.py my-model my-edited-model
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from lit_moeedit.edits import read_edits, undo, verify

base, folder = sys.argv[1:]
edits = read_edits(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
assert all(presence.status == "applied" for presence in verify(model, edits))

left = undo(model, edits, [edits[-1].name], base=base)
sys.stdout.write(f"without {edits[-1].name}: {len(left)} edits are left\n")

if not left:
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    sys.stdout.write(f"equal to the base, bit for bit: {all(torch.equal(a, b) for a, b in pairs)}\n")
