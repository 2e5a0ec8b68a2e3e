"""Tests of full precision: the settings inside and afterwards, and its use by everything that solves an edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lit_moeedit.editing import EditMemory, Editor, SecondMoments
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.precision import full_precision, round_to_tf32, tensor_core_precision
from lit_moeedit.preservation.shaping import CovariancePenalty, NullSpace, Shaping
from lit_moeedit.sharding.commit import delta_slice
from lit_moeedit.solvers import (
    BlockCoordinateDescent,
    EditProblem,
    ExpertDeltas,
    PerExpertRidge,
    Solver,
    Tucker,
    TuckerFactors,
    Woodbury,
)
from tests.editing.recording import QUICK

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
PRODUCTS = {"mm", "mm_", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "vdot"}


def now() -> tuple[str, ...]:
    backends = torch.backends
    own = (CUDA.fp32_precision, CPU.fp32_precision)
    return (*own, backends.fp32_precision, backends.cudnn.fp32_precision, backends.mkldnn.fp32_precision)


def legacy() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = CUDA.fp32_precision = CPU.fp32_precision = "none"


class Coarse(TorchDispatchMode):
    """A simulated device whose float32 products have 8 bits, except in full precision; it counts both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.coarse = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if function.overloadpacket.__name__ in PRODUCTS and all(x.dtype == torch.float32 for x in tensors):
            if (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee"):
                self.full += 1
            else:
                self.coarse += 1
                # not the first of three: it is added to
                first = len(tensors) - 2
                rounded = [x if i < first else x.bfloat16().float() for i, x in enumerate(tensors)]
                args = (*rounded, *args[len(tensors) :])
        return function(*args, **(kwargs or {}))


class TestSetting:
    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize(
        "choose",
        [
            lambda: None,
            lambda: torch.set_float32_matmul_precision("highest"),
            lambda: torch.set_float32_matmul_precision("high"),
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: setattr(CUDA, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
            lambda: setattr(torch.backends, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends, "fp32_precision", "bf16"),
            lambda: (torch.set_float32_matmul_precision("high"), setattr(CUDA, "fp32_precision", "ieee")),
            lambda: (setattr(torch.backends, "fp32_precision", "tf32"), setattr(CUDA, "fp32_precision", "ieee")),
        ],
        ids=[
            "untouched",
            "highest",
            "high",
            "medium",
            "cuda",
            "allow_tf32",
            "all",
            "all-bf16",
            "mixed",
            "all-but-cuda",
        ],
    )
    def test_comes_back(self, choose: Callable[[], Any], fails: bool) -> None:
        choose()
        before = (now(), legacy())
        try:
            with full_precision():
                assert now()[:2] == ("ieee", "ieee")
                with full_precision():
                    pass
                assert now()[:2] == ("ieee", "ieee")
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert (now(), legacy()) == before

    def test_what_was_inherited_still_is(self) -> None:
        with full_precision():
            pass
        torch.backends.fp32_precision = "tf32"
        assert now()[:2] == ("tf32", "tf32")


@contextmanager
def coarse() -> Iterator[Coarse]:
    torch.set_float32_matmul_precision("medium")
    with Coarse() as mode:
        yield mode
    assert now()[:2] == ("tf32", "bf16")


def factors() -> TuckerFactors:
    return TuckerFactors.hosvd(torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0)))


SOLVERS: dict[str, Callable[[], Any]] = {
    "Woodbury": Woodbury,
    "BlockCoordinateDescent": lambda: BlockCoordinateDescent(passes=200),
    "PerExpertRidge": PerExpertRidge,
    "Tucker": lambda: Tucker().with_factors(factors()),
    "Tucker without factors": Tucker,
}


def random_problem(dtype: torch.dtype = torch.float32) -> EditProblem:
    """Make 60 edits that are each routed to about half of five experts."""
    generator = torch.Generator().manual_seed(0)
    edit, expert = (torch.rand(60, 5, generator=generator) < 0.5).nonzero(as_tuple=True)
    features, residuals = (torch.randn(n, d, generator=generator) for n, d in ((len(edit), 6), (60, 7)))
    return EditProblem(edit, expert, features.to(dtype), residuals.to(dtype), 5, ridge=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_compute_in_full(name: str) -> None:
    problem, exact = random_problem(), random_problem(torch.float64)
    solver: Solver = SOLVERS[name]()
    expected = solver.solve(problem)
    with coarse() as mode:
        found = solver.solve(problem)
    assert mode.full > 0 and mode.coarse == 0
    if name not in ("PerExpertRidge", "Tucker"):
        # what exact solvers promise; with products of 8 bits it is some 1e-3
        assert problem.objective(found) <= (1 + 1e-5) * exact.objective(Woodbury().solve(exact))
    assert all(torch.equal(found.dense(j), expected.dense(j)) for j in range(5))


def test_a_solver_that_fails_leaves_the_precision(monkeypatch) -> None:
    monkeypatch.setattr("lit_moeedit.solvers.woodbury.solve_ridge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), coarse():
        Woodbury().solve(random_problem())
    assert now()[:2] == ("tf32", "bf16")


def parts() -> dict[str, Callable[[], Any]]:
    """Make the other computations of an edit, ready to be called."""
    generator = torch.Generator().manual_seed(1)
    keys, index = torch.randn(40, 6, generator=generator), torch.arange(40)
    three = torch.full((3,), 40)
    moments = SecondMoments(torch.zeros(3, 6, 6), three, three[:1])
    moments.add(0, keys, keys[:, 0])
    experts = torch.arange(3)
    shaping = Shaping.of(moments, experts, CovariancePenalty(), 1e3)
    problem = EditProblem(index, index % 5, keys, torch.randn(40, 7, generator=generator), 5)
    core = Tucker().with_factors(factors()).carry(problem)
    deltas = ExpertDeltas(index % 5, index, torch.ones(40, 7), keys, 5)
    memory, rows = EditMemory(limit=3), GatedKeys(torch.arange(2), torch.zeros(2, dtype=torch.long), keys[:2])
    for i in range(4):
        memory.remember({0: rows}, [f"{i} {row}" for row in range(2)])
    return {
        "moments": lambda: moments.add(1, keys, keys[:, 0]),
        "a null space": lambda: Shaping.of(moments, experts, NullSpace()),
        "a symmetric root": lambda: Shaping.of(moments, experts, CovariancePenalty(), 1e3, symmetric=True),
        "features": lambda: shaping.features(keys, index % 3),
        "what is applied": lambda: shaping.applied(keys, index % 3),
        "factors": factors,
        "a core": lambda: Tucker().with_factors(factors()).carry(problem),
        "deltas of a core": lambda: core.deltas(factors()),
        "a renewed fact": lambda: memory.extend(0, rows, torch.ones(2, 7), ["0 0", "0 1"]),
        "a commit": lambda: delta_slice(deltas, 2, 0, 42),
    }


@pytest.mark.parametrize("name", parts())
def test_parts_of_an_edit_compute_in_full(name: str) -> None:
    call = parts()[name]
    with coarse() as mode:
        call()
    assert mode.full > 0 and mode.coarse == 0


@pytest.mark.parametrize("preserve", ["output", "nullspace"])
@pytest.mark.parametrize("solver", [Woodbury(), Tucker(energy=0.9)], ids=["Woodbury", "Tucker"])
def test_an_edit_solves_in_full_and_runs_the_model_as_the_run_does(
    model, tokenizer, facts, texts, preserve: str, solver: Solver
) -> None:
    seen: dict[str, Coarse] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with seen.setdefault(name, Coarse()):
            yield

    torch.set_float32_matmul_precision("medium")
    Editor([0, 1], solver, QUICK, preserve, ridge=0.1).edit(model, tokenizer, facts, texts, phase=phase)
    assert now()[:2] == ("tf32", "bf16")
    for name in ("solve", "commit"):
        assert seen[name].full > 0 and seen[name].coarse == 0, name
    assert seen["targets"].coarse > 0 and seen["targets"].full == 0
    assert seen["statistics"].coarse > 0 and seen["statistics"].full > 0


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_rounding_gives_the_nearest_number_that_tensor_cores_keep(value: float) -> None:
    number = torch.tensor([value])
    found = round_to_tf32(number)
    assert int(found.view(torch.int32)) % 2**13 == 0
    if bool(found.isfinite()):
        # half of the last of 10 bits
        assert abs(float(found) - float(number)) <= abs(float(number)) * 2.0**-11
    assert torch.equal(round_to_tf32(found), found)


def test_half_precision_is_not_rounded() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
        assert torch.equal(round_to_tf32(numbers), numbers)


def test_products_on_tensor_cores_are_asked_for_in_the_block_only() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with full_precision(), tensor_core_precision():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # a CPU has no sums in full for it
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000, 0x7F800000, -0x800000])
def test_rounding_keeps_what_is_not_finite(bits: int) -> None:
    """A NaN of a GPU, two of a CPU, and infinities."""
    number = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    found = round_to_tf32(number)
    assert torch.equal(found, number) or bool(found.isnan() & number.isnan())
