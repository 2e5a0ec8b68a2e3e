"""Low-rank deltas against their dense sums, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lit_moeedit.solvers import ExpertDeltas


def some_deltas(terms: int = 9, rows: int = 4, d_model: int = 3, d_hidden: int = 5) -> ExpertDeltas:
    generator = torch.Generator().manual_seed(terms)
    return ExpertDeltas(
        torch.randint(1, 5, (terms,), generator=generator),  # of 6 experts, 0 and 5 do not change
        torch.randint(0, rows, (terms,), generator=generator),  # rows are shared
        torch.randn(rows, d_model, generator=generator),
        torch.randn(terms, d_hidden, generator=generator),
        6,
    )


def test_dense_is_the_sum_of_outer_products() -> None:
    deltas = some_deltas()
    for expert in range(6):
        expected = torch.zeros(3, 5)
        for j, row, right in zip(deltas.expert_index, deltas.row_index, deltas.right, strict=True):
            if j == expert:
                expected += torch.outer(deltas.left[row], right)
        torch.testing.assert_close(deltas.dense(expert), expected)
    assert deltas.experts == sorted(set(deltas.expert_index.tolist()))
    assert deltas.rows(0) is None
    assert deltas.shape == (3, 5)


@pytest.mark.parametrize(("d_model", "d_hidden"), [(3, 5), (5, 3), (4, 4)])
def test_dense_deltas_as_terms_of_the_smaller_dimension(d_model: int, d_hidden: int) -> None:
    dense = torch.randn(2, d_model, d_hidden, generator=torch.Generator().manual_seed(0))
    deltas = ExpertDeltas.from_dense(torch.tensor([4, 1]), dense, 6)
    assert deltas.experts == [1, 4]
    assert deltas.shape == (d_model, d_hidden)
    assert len(deltas.right) == 2 * min(d_model, d_hidden)
    # products with ones and zeros are exact
    assert torch.equal(deltas.dense(4), dense[0])
    assert torch.equal(deltas.dense(1), dense[1])
    assert not deltas.dense(0).any()


@pytest.mark.parametrize("expert", [-1, 6])
def test_there_is_no_such_expert(expert: int) -> None:
    with pytest.raises(IndexError, match=rf"expert must be in \[0, 6\), got {expert}"):
        some_deltas().dense(expert)


@pytest.mark.parametrize("terms", [0, 2, 9, 60])  # few terms and many, for both ways to compute the norm
def test_square_norm_equals_the_dense_one(terms: int) -> None:
    deltas = some_deltas(terms)
    expected = sum(float(deltas.dense(expert).double().square().sum()) for expert in range(6))
    assert deltas.square_norm() == pytest.approx(expected, rel=1e-5)  # dense() sums in float32


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="one entry per term, got 2, 1 and 2"):
        ExpertDeltas(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1, 3), torch.ones(2, 4), 2)


def test_with_right_replaces_only_the_right_factors() -> None:
    deltas = some_deltas()
    doubled = deltas.with_right(2 * deltas.right)
    for expert in range(6):
        torch.testing.assert_close(doubled.dense(expert), 2 * deltas.dense(expert))


def test_is_finite() -> None:
    deltas = some_deltas()
    assert deltas.is_finite()
    for value in (torch.nan, torch.inf, -torch.inf):
        right, left = deltas.right.clone(), deltas.left.clone()
        right[0, 0] = left[0, 0] = value
        assert not deltas.with_right(right).is_finite()
        assert not ExpertDeltas(deltas.expert_index, deltas.row_index, left, deltas.right, 6).is_finite()


@pytest.mark.parametrize("terms", [0, 9])
def test_a_file_gives_back_the_same_deltas(tmp_path: Path, terms: int) -> None:
    deltas = some_deltas(terms)
    path = tmp_path / "layer.safetensors"
    deltas.save(path)
    loaded = ExpertDeltas.load(path)
    for name in ("expert_index", "row_index", "left", "right"):
        saved, read = getattr(deltas, name), getattr(loaded, name)
        assert torch.equal(saved, read)
        assert saved.dtype == read.dtype
    assert loaded.num_experts == 6
    assert loaded.experts == deltas.experts
    assert [file.name for file in tmp_path.iterdir()] == ["layer.safetensors"]


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    some_deltas().save(path)
    with safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == ["expert_index", "left", "right", "row_index"]
    # every format that runs code on loading is a zip archive or a pickle, and starts otherwise
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.read_bytes()[8 : 8 + length].startswith(b"{")


def test_other_files_are_refused(tmp_path: Path) -> None:
    text, other, pickled = tmp_path / "a.txt", tmp_path / "b.safetensors", tmp_path / "c.pt"
    text.write_text("no tensors here, but more than eight bytes")
    save_file({"weight": torch.ones(2)}, other)
    torch.save({"left": torch.ones(2)}, pickled)
    for path in (text, other, pickled):
        with pytest.raises(ValueError, match="does not hold expert deltas"):
            ExpertDeltas.load(path)
    with pytest.raises(FileNotFoundError):
        ExpertDeltas.load(tmp_path / "nothing.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.safetensors"
    deltas = some_deltas()
    deltas.save(path)
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lit_moeedit.atomic_files.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        deltas.with_right(3 * deltas.right).save(path)
    assert path.read_bytes() == before
