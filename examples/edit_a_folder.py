"""Edit facts in a model's folder, and read the report.

python examples/edit_a_folder.py my-model facts.jsonl my-edited-model
"""

import sys

from lit_moeedit import edit

model, facts, output = sys.argv[1:]
report = edit(model, facts, output)
for row in report.rows:
    before, after = row.measured["before"], row.measured["after"]
    mark = "yes" if after.holds else "no "
    sys.stdout.write(f"{mark} {row.prompt}: {before.generated!r} -> {after.generated!r} {row.reason or ''}\n")
