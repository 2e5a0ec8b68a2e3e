"""A sweep over settings of the editor, with W&B offline: every setting is an option of the command line.

With an account, ``wandb sweep`` makes the options of parameters such as ``edit.editor.ridge``.

    python examples/sweep.py my-model facts.jsonl runs
"""

import os
import subprocess
import sys
from pathlib import Path

from lit_moeedit.data import neutral_texts

folder, facts, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
output.mkdir(parents=True, exist_ok=True)
(output / "texts.txt").write_text("\n".join(neutral_texts()), encoding="utf-8")
options = [
    f"--model.pretrained={folder}",
    "--data.corpus=FactsCorpus",
    f"--data.corpus.path={facts}",
    f"--data.tokenizer={folder}",
    "--edit.at=validation",
    f"--edit.preservation={output / 'texts.txt'}",
    "--edit.editor.token=last",
    "--edit.on_failure=keep",
    "--trainer.accelerator=cpu",
    "--trainer.logger=WandbLogger",
    f"--trainer.logger.save_dir={output}",
    f"--trainer.default_root_dir={output}",
]
for layers in ("[0]", "[0,1]"):
    command = [sys.executable, "-m", "lit_moeedit", "validate", *options, f"--edit.editor.layers={layers}"]
    subprocess.run(command, env={**os.environ, "WANDB_MODE": "offline"}, check=True)
