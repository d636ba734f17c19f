"""Weights in eight bits, and products with them: what every backend's int8 kernels must give, in plain NumPy.

A matrix w (K, N) is kept as whole numbers q from -127 to 127 and one scale a column: w = q scale, with scale the column's
largest magnitude over 127 (symmetric, per channel: Jacob et al. 2018, Krishnamoorthi 2018). The rows that meet it are
brought to eight bits as they come, each by its own largest magnitude. A product is then a sum of whole numbers, exact in
32 bits, and float32 only at its end:
    (x w)[m, n] = float32(sum over k of qx[m, k] qw[k, n]) * x_scale[m] * w_scale[n]
The whole numbers are defined to the bit (`quantize_rows`), so that all processors and backends agree on the sums.

Error: a value is off by at most half a scale, so a product's is at most sum over k of
(|x[m, k]| w_scale[n] + |w[k, n]| x_scale[m]) / 2 + K x_scale[m] w_scale[n] / 4, about 1 % of the row's and column's norms
multiplied, and in the mean far less (`bound`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["DEEPEST", "LEVELS", "Quantized", "bound", "quantize_rows"]

LEVELS = 127  # the largest whole number; -128 stays unused, so that both signs reach equally far
DEEPEST = (2**31 - 1) // LEVELS**2  # rows of a matrix whose sums still fit 32 bits
STEP = np.float32(1 / LEVELS)
SMALLEST = np.float32(
    1e-30
)  # a row whose largest value is not above this counts as zeros: 127 / it would overflow


class Quantized:
    """A matrix (K, N) in eight bits; `x @ matrix` is the product above. It can't be written to.

    Arguments:
        values: int8 (K, N), from -127 to 127.
        scale: float32 (N,).

    Raises:
        ValueError: other shapes or dtypes, a value of -128, or more rows than `DEEPEST`.

    >>> w = Quantized.of(np.array([[1.0, -0.5], [0.0, 0.25]]))
    >>> w.values.tolist(), w.dequantized().tolist()
    ([[127, -127], [0, 64]], [[1.0, -0.5], [0.0, 0.25196850299835205]])
    """

    __slots__ = ("packed", "scale", "values")

    scale: np.ndarray
    values: np.ndarray

    __array_ufunc__ = None  # x @ matrix comes to __rmatmul__
    dtype: np.dtype[Any] = np.dtype(np.float32)  # of what it stands for
    ndim = 2

    def __init__(self, values: np.ndarray, scale: np.ndarray) -> None:
        if values.dtype != np.int8 or values.ndim != 2:
            raise ValueError(f"values: expected int8 of rank 2, got {values.dtype} of shape {values.shape}")
        if scale.dtype != np.float32 or scale.shape != values.shape[1:]:
            raise ValueError(
                f"scale: expected float32 of shape {values.shape[1:]}, got {scale.dtype} of shape {scale.shape}"
            )
        if len(values) > DEEPEST:
            raise ValueError(f"values: sums over more than {DEEPEST} rows overflow, got {len(values)} rows")
        if values.size and values.min() < -LEVELS:
            raise ValueError(f"values: expected from -{LEVELS} to {LEVELS}, got {values.min()}")
        self.values, self.scale = values, scale
        self.packed: dict[Any, Any] = {}  # what a backend has made of it, to be used again

    @classmethod
    def of(cls, matrix: np.ndarray) -> Quantized:
        """The eight-bit form of a matrix (K, N). Raises ValueError where it holds NaN or infinity."""
        matrix = np.asarray(matrix, np.float32)
        largest = np.max(np.abs(matrix), axis=0, initial=0)
        if not np.isfinite(largest).all():
            raise ValueError("matrix: expected finite values, got NaN or infinity")
        scale = (largest / np.float32(LEVELS)).astype(np.float32)
        divisor = np.where(largest > SMALLEST, scale, np.float32(np.inf))
        values = np.clip(np.rint(matrix / divisor), -LEVELS, LEVELS).astype(np.int8)
        return cls(values, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.values.shape

    def dequantized(self) -> np.ndarray:
        """The float32 matrix that it stands for."""
        return self.values * self.scale

    def __getitem__(self, index: tuple[slice, Any]) -> Quantized:
        """Columns, as a matrix: `matrix[:, columns]`."""
        rows, columns = index
        if rows != slice(None):
            raise ValueError(f"index: expected [:, columns], got rows {rows}")
        return Quantized(self.values[:, columns], self.scale[columns])

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """x (..., K) times the matrix: (..., N), in x's dtype."""
        q, scale = quantize_rows(x)
        sums = q.astype(np.float64) @ self.values.astype(np.float64)  # whole numbers below 2^53: exact
        return sums.astype(x.dtype) * scale[..., None].astype(x.dtype) * self.scale.astype(x.dtype)


@np.errstate(all="ignore")
def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows x (..., K) in eight bits: int8 (..., K) and their scales, float32 (...).

    In float32 whatever x is: x times 127 over the row's largest magnitude, rounded to the nearest, half to even.
    A row that holds NaN or infinity gets a scale of NaN, so that it stays in sight.

    >>> q, scale = quantize_rows(np.array([[0.5, -1.0], [0.0, 0.0]]))
    >>> q.tolist(), [round(float(s), 5) for s in scale]
    ([[64, -127], [0, 0]], [0.00787, 0.0])
    """
    x = np.asarray(x, np.float32)
    largest = np.max(np.abs(x), axis=-1, initial=0)
    inverse = np.where(largest > SMALLEST, np.float32(LEVELS) / largest, np.float32(0))
    scaled = np.rint(x.astype(np.float64) * inverse[..., None])  # an exact product, rounded once
    q = np.where(np.isfinite(scaled), scaled, 0).astype(np.int8)
    return q, largest * STEP + (largest - largest)


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """How far `x @ Quantized.of(w)` can be from x @ w, for x (M, K) and w (K, N): an (M, N) array."""
    x_scale = np.abs(x).max(-1, keepdims=True) / LEVELS
    w_scale = np.abs(w).max(0) / LEVELS
    sums = np.abs(x).sum(-1, keepdims=True) * w_scale + x_scale * np.abs(w).sum(0)
    return sums / 2 + len(w) * x_scale * w_scale / 4
