"""Further measures in runs of two processes with sharded weights: those of a run in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.data.facts import Probe
from lit_moeedit.editing import further
from lit_moeedit.editing.further import MEASURES
from lit_moeedit.preservation import NullSpace
from tests.processes import run_ranks

pytestmark = pytest.mark.slow


def fit(strategy: str, folder: str, devices: int = 2) -> dict[str, Any] | None:
    """Edit at the start of a fit, with all measures; the summary of the rank that writes it."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import _corpus, _data, _editor, _module, _trainer

    torch.use_deterministic_algorithms(True)
    facts = [
        # of an odd number of facts, with an odd number of answers
        replace(fact, probes=(Probe("multi_hop", f"{fact.subject} and", ("the", fact.subject, fact.target_new)),))
        for fact in _corpus().edits[:5]
    ]
    editor = _editor(preserve=NullSpace(0.5))
    editing = KnowledgeEditing(editor, facts, measure=list(MEASURES), on_failure="keep", survival_every_n_steps=None)
    chosen: Any = ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy
    # the learning rate keeps what follows the edit out of the comparison
    trainer = _trainer(folder, [editing, EditReport(console=False)], strategy=chosen, devices=devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(further, "FLUENCY_TOKENS", 8)
        trainer.fit(_module(learning_rate=1e-9), _data(batch_size=8 // devices, samples_per_epoch=16))
    path = Path(folder, "summary.json")
    return json.loads(path.read_text(encoding="utf-8")) if trainer.is_global_zero else None


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["deepspeed_cpu_stage_3", "fsdp2"])
def test_a_sharded_run_measures_what_one_process_does(strategy: str, tmp_path: Path) -> None:
    alone = fit("auto", str(tmp_path / "alone"), devices=1)
    found, nothing = run_ranks(fit, 2, strategy, str(tmp_path / strategy), group=False)
    assert nothing is None and alone is not None
    for moment in ("before", "after", "after_training"):
        assert alone[moment]["fluency"] > 1 and 0 <= alone[moment]["multi_hop"] <= 1
        # forwards of other shapes round otherwise, and an edit and training multiply that
        one, other = ({k: v for k, v in s[moment].items() if v is not None} for s in (found, alone))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6), moment
        assert found["intervals"][moment].keys() == alone["intervals"][moment].keys()
        for name, bounds in alone["intervals"][moment].items():
            assert found["intervals"][moment][name] == pytest.approx(bounds, rel=1e-3, abs=1e-6), name
