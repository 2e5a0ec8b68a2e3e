"""Systems of ridge regressions, solved in float32 if a bound on the effect of rounding allows it, else in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 5e-6
"""Share of the least objective that rounding may add to it: half of what exact solvers promise, as it is estimated."""
INVERSE_TOLERANCE = TOLERANCE / 100
"""Share of the least objective that rounding of an inverse may add.

A product with an inverse rounds once more than solving does, and an error counts in the first order where the objective
still has a slope, as in a descent that is not finished.
"""


def solve_ridge(
    system: Callable[[torch.dtype], tuple[Tensor, Tensor]],
    ridge: float,
    dtype: torch.dtype,
    what: str,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Solve ``(K + λI) X = B``, the system of the ridge regression ``min ‖R − ΦW‖² + λ‖W‖²``.

    In the dual form ``K = ΦΦᵀ``, ``B = R`` and ``W = ΦᵀX``. In the primal form ``K = ΦᵀΦ``, ``B = ΦᵀR`` and ``W = X``.

    The system is solved in float32 if a bound on what rounding can add to the objective (see :func:`_is_negligible`) is
    below :data:`TOLERANCE` times the objective, and in float64 otherwise. Refining the float32 solution would cost the
    same: its residual has to be computed in float64, which with many right-hand sides is as much work as to solve.

    Args:
        system: makes ``K [n, n]``, which is overwritten, and ``B [n, m]`` in a dtype. They are made anew for float64,
            because rounding to float32 has already lost the small eigenvalues.
        ridge: ``λ``.
        dtype: dtype to try first, float32 or float64.
        what: name of the system, for errors.
        energy: ``‖R‖²`` in the primal form; ``None`` in the dual form.

    Returns:
        ``X [n, m]`` in the dtype it was computed in, and the Cholesky factor of ``K + λI``.

    Raises:
        torch.linalg.LinAlgError: if the system is singular in float64, too.
    """
    if dtype == torch.float32 and ridge:
        matrix, right_hand = system(dtype)
        factor, info = _factorize(matrix, ridge)
        if not int(info):
            solution = solve_factored(factor, right_hand)
            if energy is None:
                reached = (right_hand * solution).sum()
            else:
                reached = energy - (right_hand.double() * solution).sum()
            if bool(_is_negligible(matrix, solution.norm().double().square(), ridge * reached)):
                return solution, factor
        del matrix, right_hand, factor
    matrix, right_hand = system(torch.float64)
    factor, info = _factorize(matrix, ridge)
    _check_sound(matrix[None], factor[None], info[None], [what])
    return solve_factored(factor, right_hand), factor


def invert_ridge(
    systems: Callable[[torch.dtype, list[int] | None], Tensor],
    ridge: float,
    dtype: torch.dtype,
    names: Sequence[str],
    sizes: Tensor | None = None,
) -> list[Tensor]:
    """Invert a batch of matrices ``K + λI``, each in float32 if that does for any right-hand side, else in float64.

    Args:
        systems: makes ``K [b, n, n]``, which are overwritten, in a dtype; with a list, only those of these positions.
        ridge: ``λ``.
        dtype: dtype to try first, float32 or float64.
        names: names of the systems, for errors.
        sizes: ``[b]``, sizes of the matrices, if they are padded to ``n`` with the largest entries of their diagonals.

    Returns:
        The inverses ``[n, n]``, each in the dtype it was computed in.

    Raises:
        torch.linalg.LinAlgError: if a system is singular in float64, too.
    """
    inverses: list[Tensor] = []
    again = list(range(len(names)))
    if dtype == torch.float32 and ridge:
        matrix = systems(dtype, None)
        factor, info = _factorize(matrix, ridge)
        # what has no factor must not stop the others
        failed = (info != 0)[:, None, None]
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse = torch.cholesky_inverse(torch.where(failed, identity, factor))
        negligible = _is_negligible(matrix, inverse.abs().sum(-1).amax(-1), ridge, INVERSE_TOLERANCE)
        fine = (negligible & ~failed[:, 0, 0]).tolist()
        inverses, again = list(inverse), [i for i in again if not fine[i]]
    if again:
        matrix = systems(torch.float64, again if inverses else None)
        factor, info = _factorize(matrix, ridge)
        if sizes is not None:
            sizes = sizes[torch.tensor(again, device=sizes.device)]
        _check_sound(matrix, factor, info, [names[i] for i in again], sizes)
        exact = torch.cholesky_inverse(factor)
        if not inverses:
            return list(exact)
        for i, own in zip(again, exact, strict=True):
            inverses[i] = own
    return inverses


def solve_factored(factor: Tensor, right_hand: Tensor) -> Tensor:
    """Solve ``L Lᵀ X = B``.

    From the right, on the transposed: rows stay rows then, where ``torch.cholesky_solve`` copies ``B`` to columns and
    back, and takes 1.3 to 2.7 times as long on a CPU.

    Args:
        factor: ``L [n, n]``, lower triangular.
        right_hand: ``B [n, m]``.
    """
    half: Tensor = torch.linalg.solve_triangular(factor.mT, right_hand.mT, upper=True, left=False)
    solution: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False).mT
    return solution


def _factorize(matrix: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Add the ridge to matrices ``[..., n, n]`` in place; return their Cholesky factors, and where these failed."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor, info


def _is_negligible(matrix: Tensor, squares: Tensor, limit: Tensor | float, tolerance: float = TOLERANCE) -> Tensor:
    r"""Tell whether rounding adds at most the tolerated share of the least objective, ``ε² ‖M‖² squares ≤ τ limit``.

    Rounding acts like a change ``E``, ``‖E‖ ≤ ε ‖M‖``, of the matrix ``M = K + λI``. To the objective that adds

    - in the dual form ``tr(Xᵀ E M⁻¹ K E X) ≤ ‖E‖² ‖X‖²``, of ``λ tr(BᵀX)``;
    - in the primal form ``tr(Xᵀ E M⁻¹ E X) ≤ ‖E‖² ‖X‖² / λ``, of ``‖R‖² − tr(BᵀX)``;
    - in both, whatever the right-hand side is, at most ``‖E‖² ‖M⁻¹‖ / λ`` of the objective.

    Args:
        matrix: ``M [..., n, n]``.
        squares: ``‖X‖²``, or ``‖M⁻¹‖``.
        limit: ``λ`` times ``tr(BᵀX)``, times ``‖R‖² − tr(BᵀX)``, or times 1.
        tolerance: ``τ``.
    """
    change = torch.finfo(matrix.dtype).eps * matrix.abs().sum(-1).amax(-1).double()
    return change.square() * squares <= tolerance * limit


def _check_sound(
    matrix: Tensor, factor: Tensor, info: Tensor, names: Sequence[str], sizes: Tensor | None = None
) -> None:
    """Raise if a matrix of a batch is singular.

    A factor can "succeed" and still be useless, if rounding left pivots of the size of the noise.

    Args:
        matrix: ``[b, n, n]``.
        factor: the Cholesky factors.
        info: what ``torch.linalg.cholesky_ex`` returned beside them.
        names: names of the matrices.
        sizes: sizes of the matrices, if they are padded to ``n`` with the largest entries of their diagonals.
    """
    size = matrix.shape[-1]
    largest = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    noise = torch.finfo(matrix.dtype).eps * (size if sizes is None else sizes) * largest
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # not "<= noise": with NaN both comparisons are false
    singular = ((info != 0) | ~(pivots.square().amin(-1) > noise)).tolist()
    if any(singular):
        first = singular.index(True)
        pivot = int(info[first]) or int(pivots[first].abs().argmin()) + 1
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{names[first]} is singular (pivot {pivot} of {size if sizes is None else int(sizes[first])}): "
            "edits share the same features; use a larger ridge"
        )
