"""All edits renewed at the last step, in two processes: the same under every strategy, and undone on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lit_moeedit.callbacks import EditReplay, KnowledgeEditing
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.backends import settle
from tests.callbacks.test_fsdp2_runs import full
from tests.callbacks.test_fsdp2_runs import strategy as fsdp2_or_ddp
from tests.callbacks.test_sharded_runs import distance, same, whole_weights
from tests.processes import run_ranks

STRATEGIES = ["ddp", "deepspeed_cpu_stage_3", "fsdp2"]
AT_END = {"renew_at": "end", "renewal": "all"}

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


def fit(strategy: str, folder: str, **settings: Any) -> dict[str, Any]:
    """Train for four epochs of four steps with replay, and edit before the second."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    torch.use_deterministic_algorithms(True)
    editing = KnowledgeEditing(
        _editor(steps=12), at={"epoch": 1}, on_failure="keep", survival_every_n_steps=1000, **settings
    )
    chosen = strategy if strategy.startswith("deepspeed") else fsdp2_or_ddp(strategy)
    trainer = _trainer(folder, [editing, EditReplay(share=0.1)], strategy=chosen, devices=2, max_epochs=4)
    module = _module()
    trainer.fit(module, _data(batch_size=4))
    settle(find_model(module))
    weights = whole_weights(module) if strategy.startswith("deepspeed") else dict(module.named_parameters())
    return {
        "weights": {name: full(weight) for name, weight in weights.items()},
        "points": [(point.step, point.after, point.generated) for point in editing.survival.points],
        "renewals": editing.renewals,
    }


def fits(folder: str) -> dict[str, dict[str, Any]]:
    """Runs under each strategy; ``undone`` are those whose renewal seems to lose a fact."""
    found = {}
    for strategy in STRATEGIES:
        found[strategy] = {"plain": fit(strategy, f"{folder}/{strategy}"), "all": fit(strategy, folder, **AT_END)}
        found[strategy]["replace"] = fit(strategy, folder, **{**AT_END, "renewal": "replace"})
        with mock.patch.object(KnowledgeEditing, "_lost", side_effect=[[], ["a fact"], ["a fact"]]) as lost:
            found[strategy]["undone"] = fit(strategy, folder, **AT_END) | {"asked": lost.call_count}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    folder: Path = tmp_path_factory.mktemp("renewals")
    return run_ranks(fits, 2, str(folder), group=False)


@pytest.mark.parametrize("renewal", ["all", "replace"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_edits_are_renewed_on_all_ranks(found: Any, strategy: str, renewal: str) -> None:
    first, second = (rank[strategy][renewal] for rank in found)
    assert first["renewals"] == 1 and first["points"] == second["points"]
    assert [after for _, after, _ in first["points"]] == ["edit", None, "renewal"]
    assert same(first["weights"], second["weights"])
    assert distance(first["weights"], found[0][strategy]["plain"]["weights"]) > 1e-4  # what a renewal changes
    assert first["points"] == found[0]["ddp"][renewal]["points"]
    # float32, summed in another order, and what training and two edits make of it
    assert distance(first["weights"], found[0]["ddp"][renewal]["weights"]) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_renewal_that_loses_more_is_undone_on_all_ranks(found: Any, strategy: str) -> None:
    for rank in found:
        undone, plain = rank[strategy]["undone"], rank[strategy]["plain"]
        assert undone["asked"] >= 2  # before the renewal and after it
        assert undone["renewals"] == 0 and same(undone["weights"], plain["weights"])
