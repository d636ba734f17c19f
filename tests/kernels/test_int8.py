"""Matrices and rows in eight bits, in NumPy: what all int8 kernels are held to."""

from __future__ import annotations

import numpy as np
import pytest

from numlstm.kernels.int8 import DEEPEST, LEVELS, Quantized, bound, quantize_rows


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("f")


def test_a_matrix_is_within_half_a_step_and_its_largest_entry_exact() -> None:
    w = draw(50, 7)
    q = Quantized.of(w)
    assert q.values.dtype == np.int8 and q.scale.dtype == np.float32
    assert np.abs(q.values).max(0).tolist() == [LEVELS] * 7
    assert np.all(np.abs(q.dequantized() - w) <= 0.5001 * q.scale)
    rows = np.abs(w).argmax(0)
    assert np.allclose(q.dequantized()[rows, range(7)], w[rows, range(7)], rtol=1e-6)


def test_quantizing_again_changes_nothing() -> None:
    q = Quantized.of(draw(31, 5))
    again = Quantized.of(q.dequantized())
    assert np.array_equal(again.values, q.values) and np.allclose(again.scale, q.scale, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45])
def test_columns_of_almost_nothing_are_zeros(value: float) -> None:
    q = Quantized.of(np.full((3, 2), value, "f"))
    assert not q.values.any() and np.all(np.abs(q.dequantized()) <= value)


def test_rows_are_rounded_half_to_even_by_their_own_largest() -> None:
    q, scale = quantize_rows(np.array([[127.0, 2.5, 3.5, -2.5, 0.49], [0.0, 0.0, 0.0, 0.0, -0.1]]))
    assert q.tolist() == [[127, 2, 4, -2, 0], [0, 0, 0, 0, -127]]
    assert np.allclose(scale, [1.0, 0.1 / 127], rtol=1e-6)


def test_rows_that_are_not_finite_show() -> None:
    x = np.zeros((4, 3))
    x[1, 1], x[2, 0], x[3, 2] = np.nan, np.inf, -np.inf
    _, scale = quantize_rows(x)
    assert np.isnan(scale).tolist() == [False, True, True, True]
    assert np.isnan(x @ Quantized.of(draw(3, 2))).any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("depth", [1, 7, 50, 193])
def test_a_product_is_exact_in_whole_numbers_and_within_the_documented_bound(depth: int) -> None:
    x, w = draw(9, depth), draw(depth, 11)
    q, matrix = quantize_rows(x), Quantized.of(w)
    whole = q[0].astype(np.int64) @ matrix.values.astype(np.int64)
    found = x.astype("d") @ matrix
    assert np.allclose(found, whole * q[1][:, None].astype("d") * matrix.scale, rtol=1e-12, atol=0)
    off = np.abs(found - x.astype("d") @ w.astype("d"))
    assert np.all(off <= bound(x, w) * (1 + 1e-5) + 1e-7)
    assert depth < 50 or np.all(off < bound(x, w) / 3)  # errors of both signs: far below the worst case
    assert (x @ matrix).dtype == np.float32 and np.allclose(x @ matrix, found, rtol=1e-5, atol=1e-6)


def test_columns_can_be_chosen() -> None:
    matrix, x = Quantized.of(draw(5, 6)), draw(2, 5)
    assert np.array_equal(x @ matrix[:, [4, 0]], (x @ matrix)[:, [4, 0]])
    with pytest.raises(ValueError, match="index: expected"):
        matrix[1:, [0]]


def test_refusals() -> None:
    good = Quantized.of(draw(3, 2))
    with pytest.raises(ValueError, match="values: expected int8 of rank 2, got int16"):
        Quantized(good.values.astype("i2"), good.scale)
    with pytest.raises(ValueError, match=r"scale: expected float32 of shape \(2,\), got float64"):
        Quantized(good.values, good.scale.astype("d"))
    with pytest.raises(ValueError, match="values: expected from -127 to 127, got -128"):
        Quantized(np.full((3, 2), -128, np.int8), good.scale)
    with pytest.raises(ValueError, match="matrix: expected finite values"):
        Quantized.of(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="overflow"):
        Quantized(np.zeros((DEEPEST + 1, 1), np.int8), np.ones(1, "f"))
