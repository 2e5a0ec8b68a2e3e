"""Second moments and their shaping under expert parallelism: a rank has those of its own experts, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lit_moeedit.editing import second_moments
from lit_moeedit.models.experts import check_editable
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.preservation.kept_moments import KeptMoments
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.owned_shaping import OwnedShaping, shaping_of
from lit_moeedit.preservation.second_moments import SecondMoments, sums_fit
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import Tucker
from tests.processes import run_ranks
from tests.sharding.expert_parallel_models import parallel_model, whole_model
from tests.sharding.fsdp2_models import full
from tests.sharding.small_edits import FACTS, LAYERS, editor, tokenizer
from tests.sharding.small_edits import TEXTS as SOME

EXPERTS, D_HIDDEN = 6, 24
TEXTS = [f"{text} {other}" for text in SOME for other in SOME]


class Largest(TorchDispatchMode):
    """The most matrices ``[d_hidden, d_hidden]`` that a tensor has which an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.shape[1:] == (D_HIDDEN, D_HIDDEN):
                self.count = max(self.count, len(tensor))
        return found


def largest(model: Any, name: str) -> int:
    """The most matrices of a tensor in an edit with the default preservation, or by Tucker's method."""
    settings: dict[str, Any] = {"output": {"preserve": "output"}, "Tucker": {"solver": Tucker(ranks=(2, 4, 4))}}[name]
    with Largest() as seen:
        editor(**settings).edit(model, tokenizer(), FACTS, TEXTS)
    return seen.count


def sums(model: Any, folder: Path | None = None, **changes: Any) -> tuple[dict[int, SecondMoments], int]:
    """Second moments, and the number of forwards that they took."""
    forwards: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    cache = None if folder is None else MomentsCache(folder, save_every=0.0)
    try:
        layers = check_editable(model, LAYERS)
        return second_moments(model, tokenizer(), layers, TEXTS, 16, cache=cache, **changes), len(forwards)
    finally:
        handle.remove()


def plain(moments: dict[int, SecondMoments]) -> dict[int, dict[str, Tensor]]:
    return {index: found.tensors() for index, found in moments.items()}


class Broken(Exception):
    pass


def broken_off(model: Any, folder: Path) -> int:
    """How many texts were done in a pass that breaks off after its second save."""
    done: list[int] = []

    def fail(number: int, total: int) -> None:
        done.append(number)
        if len(done) == 3:
            raise Broken

    with pytest.raises(Broken):
        sums(model, folder, progress=fail)
    return done[1]


def kept(model: Any, folder: Path) -> bool:
    """Tell if moments that an edit keeps come back as they were."""
    moments, layers, ranks = sums(model)[0], check_editable(model, LAYERS), Ranks.current()
    found = KeptMoments.of(moments, None, str(folder), ranks).load(model, layers, False, ranks)
    assert found is not None
    return all(
        torch.equal(one, other)
        for index in moments
        for one, other in zip(moments[index].tensors().values(), found[index].tensors().values(), strict=True)
    )


def shaped(model: Any) -> dict[str, Any]:
    moments, experts = sums(model)[0][0], torch.tensor([1, 2, 4])
    found = shaping_of(moments, experts, CovariancePenalty(10.0), 10.0, False, Ranks.current())
    rows = torch.arange(4.0 * D_HIDDEN).view(4, D_HIDDEN).sin()
    index = torch.tensor([4, 1, 1, 2])
    own = found.own if isinstance(found, OwnedShaping) else found
    with pytest.raises(ValueError, match=r"no edit visits experts 5"):
        found.features(rows, torch.tensor([4, 1, 5, 2]))
    # the first rank's rows count in what is applied
    changed = rows + (dist.get_rank() if dist.is_initialized() else 0)
    return {
        "own": own.experts.tolist(),
        "kept": found.energy_kept,
        "features": found.features(rows, index),
        "applied": found.applied(changed, index),
    }


class FailsOnTheSecondRank(CovariancePenalty):
    """Whose matrices cannot be computed on one of the ranks."""

    @override
    def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
        if dist.get_rank() == 1:
            raise Broken("there is no root")
        return super().root(moments, penalty, symmetric)


def failed(model: Any) -> tuple[str, bool]:
    """How an edit ends whose owners cannot all shape, and whether the weights are as before."""
    before = full(model)
    with pytest.raises(Exception, match="there is no root") as caught:
        editor(preserve=FailsOnTheSecondRank(10.0)).edit(model, tokenizer(), FACTS, TEXTS)
    return type(caught.value).__name__, all(torch.equal(a, b) for a, b in zip(before, full(model), strict=True))


def on_ranks(folder: str) -> dict[str, Any]:
    path, rank = Path(folder), dist.get_rank()
    model = parallel_model(str(path / "model"))
    found, forwards = sums(model, path / "ranks")
    seen = {"sums": plain(found), "forwards": forwards, "first": found[0].part.first}
    seen["again"] = sums(model, path / "ranks")[1]
    seen["of one process"] = sums(model, path / "one")[1]
    seen["damaged"] = sums(model, path / "damaged")[1]
    done = broken_off(model, path / "broken")
    rest, forwards_left = sums(model, path / "broken")
    seen["resumed"] = {"done": done, "forwards": forwards_left, "sums": plain(rest)}
    seen["kept"], seen["shaped"] = kept(model, path / "kept"), shaped(model)
    seen["largest"] = {name: largest(model, name) for name in ("output", "Tucker")}
    seen["failed alone"] = failed(model)
    size = 4 * EXPERTS * D_HIDDEN**2 * len(LAYERS)  # of all experts
    seen["fit"] = [sums_fit(check_editable(model, LAYERS), free) for free in (size, size - 1)]
    if rank == 1:  # a key that is not finite
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.to_local().fill_(torch.nan)
    with pytest.raises(Exception, match="not finite on the preservation text") as caught:
        sums(model)
    seen["failed"] = type(caught.value).__name__
    return seen


def loaded(folder: Path) -> Any:
    """The model in one process; its config has what a config has that was read."""
    return AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("owned")
    whole_model().save_pretrained(folder / "model")
    one = sums(loaded(folder), folder / "one")[0]
    sums(loaded(folder), folder / "damaged")
    for path in (folder / "damaged").iterdir():  # files of a rank's own experts
        tensors = {name: x if name == "tokens" else x[:3].clone() for name, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "lit_moeedit.moments.1"})
    assert one[0].part.owners == 1
    return folder, run_ranks(on_ranks, 2, str(folder))


def test_each_rank_has_the_sums_of_its_own_experts(both: Any) -> None:
    _, found = both
    one, forwards = sums(whole_model())
    assert [own["first"] for own in found] == [0, 3]
    for own in found:
        assert own["forwards"] == forwards / 2
        mine = slice(own["first"], own["first"] + 3)
        for index, whole in plain(one).items():
            for name, tensor in own["sums"][index].items():
                expected = whole[name] if name == "tokens" else whole[name][mine]
                # float32, in batches of other sizes
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_no_tensor_has_matrices_of_more_than_a_ranks_experts(both: Any) -> None:
    _, found = both
    one = {name: largest(whole_model(), name) for name in ("output", "Tucker")}
    assert one == {"output": EXPERTS, "Tucker": EXPERTS}
    for own in found:
        assert own["largest"] == {"output": EXPERTS // 2, "Tucker": EXPERTS // 2}
        assert own["fit"] == [True, False]


def test_files_are_those_of_all_experts(both: Any) -> None:
    folder, found = both
    for own in found:
        assert (own["again"], own["of one process"]) == (0, 0)
        assert own["damaged"] == own["forwards"]  # computed again
        assert own["kept"]
    moments, forwards = sums(loaded(folder), folder / "ranks")
    assert forwards == 0
    for index, whole in plain(moments).items():
        for name in ("total", "count"):
            assert torch.equal(whole[name], torch.cat([own["sums"][index][name] for own in found]))
    assert sums(loaded(folder), folder / "damaged")[1] == 0  # they have been written anew


def test_a_pass_that_was_broken_off_goes_on(both: Any) -> None:
    _, found = both
    for own in found:
        assert 0 < own["resumed"]["done"] < len(TEXTS)
        assert own["resumed"]["forwards"] < own["forwards"]
        for index, sums_of in own["sums"].items():
            for name, tensor in sums_of.items():
                # float32, in another order
                torch.testing.assert_close(own["resumed"]["sums"][index][name], tensor, rtol=1e-5, atol=1e-5)


def test_rows_are_shaped_by_the_owners(both: Any) -> None:
    _, found = both
    one = shaped(whole_model())
    assert [own["shaped"]["own"] for own in found] == [[1, 2], [4]]
    for own in found:
        for name in ("kept", "features", "applied"):
            # float32 sums in another order, of which a root is taken
            torch.testing.assert_close(own["shaped"][name], one[name], rtol=1e-4, atol=1e-5)


def test_a_rank_that_cannot_shape_ends_the_edit_on_all(both: Any) -> None:
    _, found = both
    assert [own["failed alone"] for own in found] == [("RankError", True), ("Broken", True)]


def test_keys_that_are_not_finite_fail_on_all_ranks(both: Any) -> None:
    _, found = both
    # the sums of the first rank's experts are finite
    assert [own["failed"] for own in found] == ["FloatingPointError"] * 2


def with_peers(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    path = Path(folder)
    model = parallel_model(str(path / "model"), sizes)
    done = broken_off(model, path / "files")
    rest, _ = sums(model, path / "files")
    return {"done": done, "first": rest[0].part.first, "sums": plain(rest), "kept": kept(model, path / "kept")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"ep_size": 2, "fsdp_size": 4}, {"ep_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}]
)
def test_ranks_with_the_same_experts_sum_together(sizes: dict[str, int], tmp_path: Path) -> None:
    whole_model().save_pretrained(tmp_path / "model")
    found, one = run_ranks(with_peers, 4, str(tmp_path), sizes), plain(sums(whole_model())[0])
    assert [own["first"] for own in found] == [0, 3, 0, 3]
    for own in found:
        assert 0 < own["done"] < len(TEXTS)
        assert own["kept"]
        for index, whole in one.items():
            for name, tensor in own["sums"][index].items():
                expected = whole[name] if name == "tokens" else whole[name][own["first"] : own["first"] + 3]
                # float32, in batches of other sizes
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert sums(loaded(tmp_path), tmp_path / "files")[1] == 0
