"""Tucker factors against singular value decompositions, and the solver against least squares over all cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lit_moeedit.solvers import EditProblem, ExpertDeltas, Solver, Tucker, TuckerFactors, Woodbury

TOLERANCE = 1e-4  # what float32 keeps of its 7 digits in a system whose condition number is up to about 1e3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int = 0) -> Tensor:
    """A second moment whose directions differ a hundredfold in size."""
    vectors = torch.linalg.qr(random(size, size, seed=seed))[0]
    return (vectors * torch.logspace(-1, 1, size, dtype=torch.float64)) @ vectors.T


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    return tensor.movedim(mode, 0).flatten(1)


def multilinear(core: Tensor, factors: TuckerFactors) -> Tensor:
    """``G ×₁ U_e ×₂ U_out ×₃ U_in``, ``[E, d_model, d_hidden]``; the core is ``[r_e, r_out, r_in]``."""
    bases = (u.to(core) for u in (factors.expert, factors.output, factors.input))
    return torch.einsum("eoi,je,do,hi->jdh", core, *bases)


def orthonormal(*ranks: int, shape: tuple[int, int, int], seed: int = 0) -> TuckerFactors:
    sizes = zip(shape, ranks, strict=True)
    bases = [torch.linalg.qr(random(n, n, seed=seed + i))[0][:, :r] for i, (n, r) in enumerate(sizes)]
    return TuckerFactors(*(basis.float() for basis in bases), energy=(1.0, 1.0, 1.0))


def brute_force(problem: EditProblem, factors: TuckerFactors) -> Tensor:
    """The core ``[r_e, r_out, r_in]`` of least squares over every number of it, in float64."""
    columns = []
    count = problem.num_edits * problem.residuals.shape[1]
    for place in range(torch.Size(factors.ranks).numel()):
        core = torch.zeros(factors.ranks, dtype=torch.float64)
        core.view(-1)[place] = 1
        changes = multilinear(core, factors)
        moved = torch.zeros(problem.num_edits, problem.residuals.shape[1], dtype=torch.float64)
        for edit, expert, feature in zip(problem.edit_index, problem.expert_index, problem.features, strict=True):
            moved[edit] += changes[expert] @ feature.double()
        columns.append(moved.flatten())
    design = torch.stack(columns, 1)
    system = torch.cat([design, problem.ridge**0.5 * torch.eye(design.shape[1], dtype=torch.float64)])
    wanted = torch.cat([problem.residuals.double().flatten(), torch.zeros(design.shape[1], dtype=torch.float64)])
    assert len(wanted) == count + design.shape[1]
    return torch.linalg.lstsq(system, wanted).solution.view(factors.ranks)


class TestFactors:
    @pytest.mark.parametrize("shape", [(6, 9, 5), (3, 4, 8), (7, 2, 3)])
    @pytest.mark.parametrize("whitened", [False, True])
    def test_equal_singular_vectors_of_the_unfoldings(self, shape, whitened: bool) -> None:
        weights, metric = random(*shape), moment(shape[2]) if whitened else None
        ranks = (2, 2, 2)
        factors = TuckerFactors.hosvd(weights, metric, ranks)
        seen = weights if metric is None else weights @ power(metric, 0.5)
        bases = [factors.expert, factors.output, factors.input]
        if metric is not None:
            bases[2] = power(metric, 0.5) @ factors.input
        for mode, basis in enumerate(bases):
            left, values, _ = torch.linalg.svd(unfolded(seen, mode), full_matrices=False)
            torch.testing.assert_close(basis @ basis.T, left[:, :2] @ left[:, :2].T)
            # the order, and the sign that is agreed on
            assert bool(((basis * left[:, :2]).sum(0).abs() > 1 - 1e-9).all())
            assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
            torch.testing.assert_close(factors.energy[mode], float((values[:2] ** 2).sum() / (values**2).sum()))

    @settings(derandomize=True, max_examples=30)
    @given(
        shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
        energy=st.floats(0.05, 1.0),
        whitened=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_keep_the_energy_asked_for_and_no_direction_more(self, shape, energy, whitened, seed) -> None:
        weights, metric = random(*shape, seed=seed), moment(shape[2], seed) if whitened else None
        factors = TuckerFactors.hosvd(weights, metric, energy=energy)
        root = torch.eye(shape[2], dtype=torch.float64) if metric is None else power(metric, 0.5)
        bases = (factors.expert, factors.output, root @ factors.input)
        seen = weights @ root
        for mode, (basis, kept) in enumerate(zip(bases, factors.energy, strict=True)):
            # orthonormal, in the metric of the whitening
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
            share = [float((basis[:, :r].T @ unfolded(seen, mode)).square().sum() / seen.square().sum())
                     for r in (basis.shape[1] - 1, basis.shape[1])]  # fmt: skip
            assert share[1] == pytest.approx(kept)
            assert share[0] < energy + 1e-9 and share[1] > energy - 1e-9
        # what three truncations lose together is at most the sum of what each loses
        core = torch.einsum("jdh,je,do,hi->eoi", seen, *bases)
        error = float((seen - torch.einsum("eoi,je,do,hi->jdh", core, *bases)).square().sum() / seen.square().sum())
        assert error <= sum(1 - kept for kept in factors.energy) + 1e-9

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        weights = random(5, 8, 6).to(dtype)
        factors, exact = (
            TuckerFactors.hosvd(weights, ranks=(2, 3, 4)),
            TuckerFactors.hosvd(weights.double(), None, (2, 3, 4)),
        )
        assert {u.dtype for u in (factors.expert, factors.output, factors.input)} == {torch.float32}
        # random weights have singular values close to each other, so directions turn by more than a rounding error
        torch.testing.assert_close(
            factors.output @ factors.output.T, (exact.output @ exact.output.T).float(), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(factors.energy, exact.energy, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("whitened", [False, True])
    def test_the_weights_are_read_block_by_block(self, whitened: bool) -> None:
        weights, metric = random(6, 20, 5), moment(5) if whitened else None
        read: list[Tensor] = []

        class Blocks:
            shape = weights.shape

            def __getitem__(self, block: Any) -> Tensor:
                read.append(weights[block])
                return read[-1]

        factors, whole = TuckerFactors.hosvd(Blocks(), metric), TuckerFactors.hosvd(weights, metric)
        assert all(torch.equal(getattr(factors, name), getattr(whole, name)) for name in ("expert", "output", "input"))
        assert max(block.numel() for block in read) <= 20 * 5
        assert sum(block.numel() for block in read) == 2 * weights.numel()

    def test_a_direction_that_no_key_takes_is_whitened_with_care(self) -> None:
        metric = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        factors = TuckerFactors.hosvd(random(4, 5, 3).float(), metric, energy=1.0)
        assert bool(torch.isfinite(factors.input).all())
        # a thousandth of the mean of the second moment's eigenvalues
        assert float(factors.input.norm(dim=1)[2]) == pytest.approx((2 / 3 * 1e-3) ** -0.5, rel=1e-3)

    def test_save_and_load(self, tmp_path: Path) -> None:
        factors = TuckerFactors.hosvd(random(4, 5, 3).float(), energy=0.7)
        factors.save(tmp_path / "factors", key="one")
        for loaded in (TuckerFactors.load(tmp_path / "factors"), TuckerFactors.load(tmp_path / "factors", "one")):
            assert all(torch.equal(getattr(factors, n), getattr(loaded, n)) for n in ("expert", "output", "input"))
            assert loaded.energy == pytest.approx(factors.energy)
        with pytest.raises(ValueError, match="Tucker factors of other weights or settings"):
            TuckerFactors.load(tmp_path / "factors", "another")
        save_file({"expert": torch.ones(2)}, tmp_path / "other")
        (tmp_path / "text").write_text("no")
        for name in ("other", "text"):
            with pytest.raises(ValueError, match=f"{name} does not hold Tucker factors"):
                TuckerFactors.load(tmp_path / name)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"ranks": (1, 2)}, "ranks must be three numbers"),
            ({"ranks": (1, 0, 2)}, "ranks must be three numbers"),
            ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
            ({"energy": 1.1}, r"energy must be in \(0, 1\]"),
        ],
    )
    def test_settings_are_checked(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Tucker(**arguments)
        with pytest.raises(ValueError, match=message):
            TuckerFactors.hosvd(random(3, 4, 5), **arguments)

    def test_weights_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"ranks must be at most \(3, 4, 5\), got \(3, 5, 5\)"):
            TuckerFactors.hosvd(random(3, 4, 5), ranks=(3, 5, 5))
        with pytest.raises(ValueError, match="not finite"):
            TuckerFactors.hosvd(random(3, 4, 5).index_fill(0, torch.tensor([1]), torch.nan))


class TestSolver:
    @pytest.mark.parametrize(("edits", "ranks"), [(3, (2, 4, 3)), (9, (2, 3, 2)), (5, (4, 5, 6)), (20, (1, 1, 1))])
    @pytest.mark.parametrize("whitened", [False, True])
    def test_equals_least_squares_over_the_core(self, make_problem, stacked, edits, ranks, whitened) -> None:
        problem = make_problem(edits, 4, 6, ridge=0.3)
        weights = random(4, 5, 6).float()
        factors = TuckerFactors.hosvd(weights, moment(6).float() if whitened else None, ranks)
        expected = brute_force(problem, factors)
        core = Tucker().with_factors(factors).carry(problem)
        assert len(core.left) <= min(edits, ranks[1])
        found = torch.einsum("ko,kei->eoi", core.left, core.right).double()
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE
        # and the deltas are the dense multilinear product
        deltas = stacked(Tucker().with_factors(factors).solve(problem))
        torch.testing.assert_close(deltas, multilinear(found, factors), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stacked(core.deltas(factors, 0.25)), 0.25 * deltas, rtol=1e-4, atol=1e-6)

    @settings(derandomize=True, max_examples=40)
    @given(
        edits=st.integers(1, 12),
        experts=st.integers(1, 5),
        d_hidden=st.integers(1, 7),
        ridge=st.sampled_from([0.1, 1.0]),
        share=st.sampled_from([0.3, 1.0]),
        seed=st.integers(0, 1000),
    )
    def test_with_whole_modes_it_is_the_exact_solution(
        self, make_problem, stacked, edits, experts, d_hidden, ridge, share, seed
    ) -> None:
        problem = make_problem(edits, experts, d_hidden, 5, ridge, seed, share)
        factors = orthonormal(experts, 5, d_hidden, shape=(experts, 5, d_hidden), seed=seed)
        exact = Woodbury().solve(problem)
        deltas = Tucker().with_factors(factors).solve(problem)
        torch.testing.assert_close(stacked(deltas), stacked(exact), rtol=1e-3, atol=1e-4)
        assert problem.objective(deltas) == pytest.approx(problem.objective(exact), rel=1e-4, abs=1e-4)

    def test_is_the_minimum_of_the_objective_among_its_kind(self, make_problem) -> None:
        problem = make_problem(9, 4, 6, ridge=0.5)
        factors = orthonormal(3, 4, 4, shape=(4, 5, 6))
        core = Tucker().with_factors(factors).carry(problem)
        best = problem.objective(core.deltas(factors))
        for seed in range(10):
            nudge = replace(core, left=core.left + 0.05 * random(*core.left.shape, seed=seed).float())
            assert problem.objective(nudge.deltas(factors)) > best

    def test_larger_ranks_never_fit_worse(self, make_problem) -> None:
        problem = make_problem(12, 4, 6, ridge=0.5)
        weights = random(4, 5, 6).float()
        objectives = [
            problem.objective(Tucker().with_factors(TuckerFactors.hosvd(weights, ranks=ranks)).solve(problem))
            for ranks in ((1, 1, 1), (2, 2, 3), (3, 4, 5), (4, 5, 6))
        ]
        assert objectives == sorted(objectives, reverse=True)
        assert objectives[-1] == pytest.approx(problem.objective(Woodbury().solve(problem)), rel=1e-4)

    def test_whitening_penalises_what_keys_would_notice(self, make_problem, stacked) -> None:
        """The ridge is ``λ Σ_j tr(ΔW_j C ΔW_jᵀ)``: with whole modes, the covariance penalty of MEMIT."""
        problem, metric = make_problem(9, 4, 6, ridge=2.0), moment(6)
        weights = random(4, 5, 6)
        whitened = TuckerFactors.hosvd(weights, metric, (4, 5, 6))
        shaping = power(metric, -0.5).float()
        shaped = replace(problem, features=problem.features @ shaping)
        exact = Woodbury().solve(shaped)
        deltas = Tucker().with_factors(whitened).solve(problem)
        torch.testing.assert_close(
            stacked(deltas), stacked(exact.with_right(exact.right @ shaping)), rtol=1e-3, atol=1e-4
        )

        def objective(found: ExpertDeltas) -> tuple[float, float]:
            misfit = float((problem.residuals - problem.prediction(found)).square().sum())
            noticed = float(torch.einsum("jdh,hg,jdg->", stacked(found), metric, stacked(found)))
            return misfit + problem.ridge * noticed, noticed

        for ranks in ((4, 5, 6), (2, 3, 3)):
            factors = TuckerFactors.hosvd(weights, metric, ranks)
            core = Tucker().with_factors(factors).carry(problem)
            found = core.deltas(factors)
            norm = float(torch.einsum("ko,kei->eoi", core.left, core.right).square().sum())
            assert objective(found)[1] == pytest.approx(norm, rel=1e-4)
            # the same directions without the whitening, at any ridge, do no better by this measure
            plain = replace(factors, input=torch.linalg.qr(factors.input)[0])
            for ridge in (0.1, 1.0, 10.0):
                other = Tucker().with_factors(plain).solve(replace(problem, ridge=ridge))
                assert objective(other)[0] > objective(found)[0]

    def test_all_experts_change(self, make_problem) -> None:
        problem = make_problem(4, 6, 5, share=0.2)
        assert len(problem.experts()) < 6
        factors = TuckerFactors.hosvd(random(6, 5, 5).float())
        assert Tucker().with_factors(factors).solve(problem).experts == list(range(6))

    def test_without_factors_the_modes_are_whole(self, make_problem, stacked) -> None:
        problem = make_problem(8, 4, 5)
        assert isinstance(Tucker(), Solver)
        assert torch.equal(stacked(Tucker().solve(problem)), stacked(Woodbury().solve(problem)))
        with pytest.raises(ValueError, match="a core needs factors"):
            Tucker().carry(problem)

    def test_with_factors_leaves_the_solver_as_it_was(self, make_problem) -> None:
        solver, factors = Tucker(carry=False), TuckerFactors.hosvd(random(4, 5, 5).float())
        assert solver.with_factors(factors).factors is factors
        assert solver.factors is None and not solver.with_factors(factors).carries

    def test_no_edit(self) -> None:
        empty = torch.empty(0, dtype=torch.long)
        factors = orthonormal(2, 2, 3, shape=(2, 3, 4))
        deltas = (
            Tucker().with_factors(factors).solve(EditProblem(empty, empty, torch.empty(0, 4), torch.empty(0, 3), 2))
        )
        assert torch.equal(deltas.dense(1), torch.zeros(3, 4))

    def test_what_cannot_be_solved(self, make_problem) -> None:
        factors = orthonormal(2, 2, 3, shape=(4, 5, 6))
        with pytest.raises(ValueError, match=r"factors of experts \(4, 5, 6\) do not fit .* \(3, 5, 6\)"):
            Tucker().with_factors(factors).solve(make_problem(4, 3, 6))
        edits = torch.arange(3)
        equal = EditProblem(edits, torch.ones_like(edits), torch.ones(3, 6), torch.ones(3, 5), 4, ridge=0.0)
        with pytest.raises(torch.linalg.LinAlgError, match="the system of 3 edits at ridge 0 is singular"):
            Tucker().with_factors(factors).solve(equal)
