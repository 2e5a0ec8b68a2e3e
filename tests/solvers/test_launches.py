"""What solvers ask of a GPU: kernels to start, and numbers to wait for. Both are counted on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_moeedit.preservation.shaping import Shaping
from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, Solver, Woodbury
from lit_moeedit.solvers.batches import expert_batches
from lit_moeedit.solvers.per_expert import PerExpertRidge

aten = torch.ops.aten
FREE = {aten.detach, aten.view, aten._unsafe_view, aten.split, aten.split_with_sizes, aten.slice, aten.select, aten.t,
        aten.transpose, aten.expand, aten.unsqueeze, aten.squeeze, aten.alias, aten.diagonal, aten.unbind,
        aten.empty, aten.new_empty, aten.empty_like, aten.lift_fresh, aten.as_strided, aten.permute}  # fmt: skip
"""Operations that start no kernel."""
DEVICE = torch.device("cuda", 0)


class Far(Tensor):
    """A tensor that says it is on a GPU; its numbers are :attr:`near`."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, near: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device="meta"
        )
        made.near = near
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:  # PyTorch's own refuses subclasses
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Gpu()")


class Gpu(TorchDispatchMode):
    """A block with a device that computes as the CPU does, and takes no tensors from there but by a copy.

    Attributes:
        kernels: how often each operation ran on it.
        waits: how often a number of it, or a tensor, was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Any] = Counter()
        self.waits = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # in it nobody looks for a real device

    def __enter__(self) -> Self:
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        owners = {id(tensor.near): tensor for tensor in tensors if isinstance(tensor, Far)}
        device = kwargs.get("device")
        far = bool(owners) if device is None else device.type != "cpu"
        if func._overloadpacket not in (aten._to_copy, aten.copy_, aten._local_scalar_dense):
            strangers = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.ndim]
            assert not (far and strangers), f"{func} mixes tensors of the CPU with those of the device"
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        near_args, near_kwargs = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs))
        with unset_fake_temporarily():
            result = func(*near_args, **near_kwargs)
        if owners and (not far or func is aten._local_scalar_dense.default):
            self.waits += 1
        elif far and func._overloadpacket not in FREE:
            self.kernels[func._overloadpacket] += 1
        if not far:
            return result
        return tree_map(lambda leaf: owners.get(id(leaf), Far(leaf)) if isinstance(leaf, Tensor) else leaf, result)


def moved(problem: EditProblem) -> EditProblem:
    """The same problem on the device."""
    tensors = (problem.edit_index, problem.expert_index, problem.features, problem.residuals)
    return EditProblem(*(tensor.to(DEVICE) for tensor in tensors), problem.num_experts, problem.ridge)


def counted(work: Callable[[EditProblem], Any], problem: EditProblem) -> tuple[Any, int, int]:
    """What ``work`` gives for the problem on the device; its kernels and its waits."""
    with Gpu() as gpu:
        far = moved(problem)
        gpu.kernels.clear()
        gpu.waits = 0
        result = work(far)
    return result, gpu.kernels.total(), gpu.waits


def nearly_dependent(problem: EditProblem) -> EditProblem:
    """The same problem, but in every other expert the features of two edits all but repeat each other."""
    features = problem.features.clone()
    for _, pairs in problem.experts()[::2]:
        features[pairs[-1]] = 1.0001 * features[pairs[0]]
    return EditProblem(
        problem.edit_index, problem.expert_index, features, problem.residuals, problem.num_experts, ridge=1e-5
    )


@pytest.mark.parametrize(("edits", "d_hidden", "each"), [(20, 40, 5), (40, 6, 6)])  # dual, primal
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_a_pass_of_block_coordinate_descent(make_problem, edits: int, d_hidden: int, each: int, tolerance) -> None:
    """A few kernels per block and nothing to wait for, unless there is a tolerance: then one number per pass."""
    problem = make_problem(edits, 9, d_hidden)
    (_, kernels, waits), (_, more_kernels, more_waits) = (
        counted(BlockCoordinateDescent(passes=passes, tolerance=tolerance).solve, problem) for passes in (2, 5)
    )
    assert more_waits - waits == (3 if tolerance else 0)
    if not tolerance:
        assert more_kernels - kernels == 3 * each * len(problem.experts())


def test_inverses_take_kernels_and_waits_per_batch(make_problem) -> None:
    problem = make_problem(20, 60, 40, share=0.4)
    batches = len(list(expert_batches(problem)))
    assert 1 < batches < 12
    _, kernels, waits = counted(BlockCoordinateDescent(passes=1).solve, problem)
    assert waits <= batches
    # a copy of each inverse besides, without its padding; and a little before and after
    assert kernels <= (5 + 1) * 60 + 35 * batches + 20
    # where float32 will not do, the systems are made a second time, and rows are put into orthonormal bases
    nearly = nearly_dependent(problem)
    _, kernels, waits = counted(BlockCoordinateDescent(passes=1).solve, nearly)
    assert waits <= 2 * batches
    assert kernels <= (7 + 9) * 60 + 60 * batches + 20


@pytest.mark.parametrize("edits", [6, 30])  # experts in dual and in primal form
@pytest.mark.parametrize(
    "solver",
    [
        BlockCoordinateDescent(passes=2),
        BlockCoordinateDescent(passes=9, tolerance=1e-3),
        Woodbury(),
        PerExpertRidge(),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("float32_will_do", [True, False])
def test_everything_is_on_the_device(make_problem, solver: Solver, edits: int, float32_will_do: bool) -> None:
    problem = make_problem(edits, 4, 10)
    problem = problem if float32_will_do else nearly_dependent(problem)
    found, _, _ = counted(solver.solve, problem)
    expected = solver.solve(problem)
    for name in ("expert_index", "row_index", "left", "right"):
        assert getattr(found, name).device == DEVICE
        assert torch.equal(getattr(found, name).near, getattr(expected, name)), name


def test_norms_wait_once(make_problem) -> None:
    problem = make_problem(12, 9, 10)
    deltas = Woodbury().solve(problem)
    _, _, waits = counted(lambda far: Woodbury().solve(far), problem)
    norm, _, waits_for_norm = counted(lambda far: Woodbury().solve(far).square_norm(), problem)
    assert norm == deltas.square_norm()
    assert waits_for_norm - waits <= 2  # once to group the experts
    finite, _, waits_if_finite = counted(lambda far: Woodbury().solve(far).is_finite(), problem)
    assert finite
    assert waits_if_finite - waits == 1


def test_an_expert_s_rows_are_one_product(make_problem) -> None:
    problem = make_problem(12, 40, 6)
    experts = torch.unique(problem.expert_index)
    matrices = torch.randn(len(experts), 6, 6, generator=torch.Generator().manual_seed(0))

    def shaped(problem: EditProblem) -> Tensor:
        device = problem.features.device
        shaping = Shaping(experts.to(device), matrices.to(device), torch.ones(len(experts)))
        return shaping.features(problem.features, problem.expert_index)

    found, kernels, waits = counted(shaped, problem)
    assert torch.equal(found.near, shaped(problem))
    assert kernels <= len(experts) + 12
    assert waits <= 2
