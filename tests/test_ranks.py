"""The benchmark of edits and training steps in several processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from benchmarks import ranks
from lit_moeedit.planning import empty_model
from lit_moeedit.planning.simulated_fsdp2 import weights_together
from lit_moeedit.pretrained import build_config


def test_bytes_sent_are_those_that_were_written_to_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        other, _ = server.accept()
        with other:
            before = ranks.bytes_sent()
            client.sendall(bytes(10_000))
            received = 0
            while received < 10_000:
                received += len(other.recv(10_000))
            assert ranks.bytes_sent() - before == 10_000


def test_runs_differ_by_their_largest_relative_difference() -> None:
    one = {"losses": [2.0, 4.0], "nll": [1.0], "changes": [0.5]}
    assert ranks.difference([one, {**one, "nll": [1.25]}], [one]) == 0.25
    assert ranks.difference([one, one], [one]) == 0.0


@pytest.mark.slow
def test_a_small_run_makes_the_same_edit_and_sends_what_fsdp2_gathers(tmp_path: Path) -> None:
    ranks.main(["--small", "--repeats", "1", "--cases", "FSDP2, 2", "--output", str(tmp_path)])
    cases = json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))["cases"]
    assert list(cases) == ["no sharding, 1", "FSDP2, 2"]
    with empty_model(build_config(ranks.CONFIG | ranks.SMALL), torch.float32) as model:
        sizes = [sum(weight.nbytes for weight in weights) for _, weights in weights_together(model)]
    # layers are gathered again for the backward pass, and gloo reduces by all_reduce, which sends all of it on 2 ranks
    expected = (sizes[0] + 2 * sum(sizes[1:])) / 2 + sum(sizes)
    for phases in cases["FSDP2, 2"]["runs"][0]:
        # besides, losses and the messages of the store
        assert phases[ranks.STEP]["sent"] == pytest.approx(expected, rel=0.02)
        assert 0 < phases["commit"]["sent"] < 10_000
        assert all(phases[name]["processor"] > 0 and phases[name]["wall"] > 0 for name in phases)
    assert all(found["sent"] == 0 for found in cases["no sharding, 1"]["runs"][0][0].values())
    text = (tmp_path / "ranks.md").read_text(encoding="utf-8")
    assert "| FSDP2 | 2 |" in text and "share the two cores" in text
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
