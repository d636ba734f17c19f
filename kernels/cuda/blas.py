"""Products of matrices by cuBLAS, through CuPy: the one place that knows its constants and its order.

cuBLAS reads columns: a row-major c = a b is its c' = b' a', with each matrix as it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Operand", "Run", "lying", "product"]

# Of cuBLAS' and CUDA's headers (cublas_api.h, library_types.h): operations, types of elements and of sums.
_AS_IT_LIES, _TRANSPOSED = 0, 1
_ELEMENT = {"float32": 0, "float64": 1, "uint16": 14}  # CUDA_R_32F, CUDA_R_64F, CUDA_R_16BF
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70
_DEFAULT_ALGORITHM = -1
_SCALARS = {
    d: (np.zeros(1, d), np.ones(1, d)) for d in ("float32", "float64")
}  # beta and alpha, read from the host

Run = Callable[[int, int], None]


class Operand(NamedTuple):
    """A row-major matrix: its address, its elements' type, elements from a row to the next, and whether it is the product's
    operand transposed. uint16 are the bits of bfloat16."""

    address: int
    dtype: str
    step: int
    turned: bool = False


def lying(a: Any) -> Operand:
    """A matrix (M, N) of the device whose rows or columns are contiguous, as an operand.

    Raises:
        ValueError: neither are.
    """
    size = a.dtype.itemsize
    if a.strides[1] == size or a.shape[1] == 1:
        return Operand(a.data.ptr, a.dtype.name, max(a.strides[0] // size, a.shape[1]))
    if a.strides[0] == size or a.shape[0] == 1:
        return Operand(a.data.ptr, a.dtype.name, max(a.strides[1] // size, a.shape[0]), True)
    raise ValueError(f"a product's operand: expected contiguous rows or columns, got strides {a.strides}")


def product(
    gemm: Callable[..., Any], handle: int, sizes: tuple[int, int, int], a: Operand, b: Operand, c: Operand, *,
    accumulate: bool = False, tf32: bool = False,
) -> Run:  # fmt: skip
    """A function of (i, j): c = a b, or c += a b, with a and c so many bytes behind their addresses.

    Arguments:
        gemm: CuPy's `cublas.gemmEx`, called with `handle`.
        sizes: (M, N, K) of a (M, K) and b (K, N) as they enter.
        tf32: operands of float32 may lose their last 13 bits.
    """
    M, N, K = sizes
    compute = _COMPUTE_64F if c.dtype == "float64" else _COMPUTE_32F
    if tf32 and a.dtype == "float32":
        compute = _COMPUTE_32F_FAST_TF32
    zero, one = (s.ctypes.data for s in _SCALARS[c.dtype])
    beta = one if accumulate else zero
    turn_a, turn_b = (_TRANSPOSED if m.turned else _AS_IT_LIES for m in (a, b))
    types = tuple(_ELEMENT[m.dtype] for m in (a, b, c))

    def run(i: int, j: int) -> None:
        gemm(
            handle, turn_b, turn_a, N, M, K, one, b.address, types[1], b.step, a.address + i, types[0], a.step, beta,
            c.address + j, types[2], c.step, compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip

    return run
