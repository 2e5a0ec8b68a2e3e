"""One number that is none is enough, wherever it stands, and the expert that has it is named."""

from __future__ import annotations

import pytest
import torch

from lit_moeedit.sharding.checks import Checks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 50, 99])
def test_one_number_names_its_expert(dtype: torch.dtype, value: float, place: int) -> None:
    checks, after = Checks(dtype), torch.randn(3, 100).to(dtype)
    after[1, place] = value
    checks.change([2, 5, 6], torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype))
    checks.verify()
    checks.change([7, 9, 11], after)
    with pytest.raises(FloatingPointError, match=f"weights of expert 9 are not finite in {dtype}"):
        checks.verify()


def test_copies_that_differ_name_their_expert() -> None:
    checks, working = Checks(torch.float32), torch.zeros(3, 4)
    checks.compare([1, 2, 3], -working, working)  # the same number with another sign bit
    checks.verify()
    checks.compare([4, 6, 8], working + torch.tensor([0, 0, 1e-30])[:, None], working)
    with pytest.raises(RuntimeError, match="master weights of expert 8 are not those"):
        checks.verify()


def test_squares_are_those_of_all_blocks() -> None:
    checks, cpu = Checks(torch.float32), torch.device("cpu")
    assert checks.squares(cpu).tolist() == [0.0, 0.0]
    checks.measure(torch.ones(4), torch.full((4,), 3.0))
    checks.measure(torch.ones(2, 3), torch.zeros(0))
    # roots and squares in float64
    assert checks.squares(cpu).tolist() == pytest.approx([10.0, 36.0], rel=1e-14)
