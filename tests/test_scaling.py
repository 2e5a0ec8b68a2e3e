"""The benchmark of an edit on up to 512 ranks, with small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling

SMALL = ["--models", "30B", "--shrink", "16"]


@pytest.mark.deepspeed
def test_shards_of_more_ranks_than_experts_are_padded(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    scaling.main([*SMALL, "--output", str(tmp_path), "--ranks"])
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["shapes"]["30B"]
    # 8 experts, of which 512 ranks hold one each
    per_rank = {backend: [found[backend][ranks]["held"] for ranks in ("8", "512")] for backend in found}
    # the embeddings are divided further
    assert per_rank["FSDP2"][1] > 5 * 8 / 512 * per_rank["FSDP2"][0] and found["FSDP2"]["1"]["sent for a forward"] == 0
    sent = {backend: [found[backend][ranks]["sent for a forward"] for ranks in ("8", "512")] for backend in found}
    assert sent["FSDP2"][1] > 5 * sent["FSDP2"][0]
    assert sent["ZeRO-3"][1] / sent["ZeRO-3"][0] == pytest.approx(511 / 512 * 8 / 7, rel=1e-6)
    # 8 owners send no expert, and hold as much as under FSDP2, which pads nothing here
    assert found["EP"]["8"]["held"] == found["FSDP2"]["8"]["held"] and found["EP"]["1"] == found["FSDP2"]["1"]
    experts = 48 * 3 * 8 * 128 * 48  # layers, projections, experts, and their shapes; in bfloat16
    assert sent["FSDP2"][0] - found["EP"]["8"]["sent for a forward"] == 2 * experts * 7 // 8
    assert "Nothing here is measured" in (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.deepspeed
def test_edits_are_simulated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    arguments = [*SMALL, "--output", str(tmp_path), "--ranks", "2"]
    scaling.main(arguments)
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["edits"]["30B"]
    assert all(0 < found[backend]["2"]["sent: commit"] < 100 < found[backend]["2"]["sent"] for backend in found)
    monkeypatch.setattr(scaling, "scaled", pytest.fail)
    scaling.main(arguments)
