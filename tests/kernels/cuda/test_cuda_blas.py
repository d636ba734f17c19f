"""Calls of cuBLAS, answered by a BLAS of contiguous columns that is written out here and works on addresses as it does."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from numlstm.kernels.cuda.blas import Operand, lying, product
from numlstm.kernels.rounding import bfloat16_bits, operand

# Of library_types.h: CUDA_R_32F, CUDA_R_64F, CUDA_R_16BF.
TYPES = {0: np.dtype("f"), 1: np.dtype("d"), 14: np.dtype(np.uint16)}


def gemm(
    handle, turn_a, turn_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, compute, how
):
    """cublasGemmEx: C (m, n) = alpha op(A) op(B) + beta C, columns contiguous, leading dimensions `ld`."""
    assert handle == 7 and how == -1
    scalar = TYPES[1] if compute == 70 else TYPES[0]  # CUBLAS_COMPUTE_64F; the others' scalars are float32

    def matrix(address: int, kind: int, rows: int, columns: int, ld: int) -> np.ndarray:
        assert ld >= rows
        size = TYPES[kind].itemsize * ((columns - 1) * ld + rows)
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), TYPES[kind])
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (flat.itemsize, flat.itemsize * ld))

    def values(x: np.ndarray) -> np.ndarray:
        if x.dtype == np.uint16:
            return (x.astype(np.uint32) << 16).view("f")
        return operand(x, "tf32") if compute == 77 else x  # CUBLAS_COMPUTE_32F_FAST_TF32

    one, zero = (float(matrix(p, {"f": 0, "d": 1}[scalar.char], 1, 1, 1)[0, 0]) for p in (alpha, beta))
    A = matrix(a, type_a, *((k, m) if turn_a else (m, k)), lda)
    B = matrix(b, type_b, *((n, k) if turn_b else (k, n)), ldb)
    C = matrix(c, type_c, m, n, ldc)
    left, right = values(A), values(B)
    old = C * zero if zero else 0
    C[...] = one * ((left.T if turn_a else left) @ (right.T if turn_b else right)) + old


def on_device(a: np.ndarray) -> SimpleNamespace:
    """An array as CuPy's look."""
    data = SimpleNamespace(ptr=a.ctypes.data)
    return SimpleNamespace(data=data, dtype=a.dtype, shape=a.shape, strides=a.strides)


@pytest.mark.parametrize(("M", "N", "K"), [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1)])
@pytest.mark.parametrize(("turn_a", "turn_b"), list(itertools.product([False, True], repeat=2)))
def test_operands_as_they_lie(M: int, N: int, K: int, turn_a: bool, turn_b: bool) -> None:
    """Rows or columns contiguous, also of parts of wider matrices."""
    draw = np.random.default_rng(0)

    def made(rows: int, columns: int, turn: bool) -> np.ndarray:
        whole = draw.standard_normal((columns, rows + 2) if turn else (rows, columns + 2)).astype("f")
        return whole[:, :rows].T if turn else whole[:, :columns]

    a, b, c = made(M, K, turn_a), made(K, N, turn_b), np.full((M, N), np.nan, "f")
    left, right = lying(on_device(a)), lying(on_device(b))
    product(gemm, 7, (M, N, K), left, right, Operand(c.ctypes.data, "float32", N))(0, 0)
    np.testing.assert_allclose(c, a @ b, atol=1e-5)


def test_an_operand_without_contiguous_rows_or_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"contiguous rows or columns, got strides \(48, 8\)"):
        lying(on_device(np.zeros((4, 12), "f")[:, ::2]))


@pytest.mark.parametrize("how", ["float64", "float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_steps_of_a_sequence(how: str, accumulate: bool) -> None:
    """c[j] = a[i] b, or += , in each type, with operands that lie transposed."""
    draw = np.random.default_rng(1)
    dtype = "d" if how == "float64" else "f"
    a, b = draw.standard_normal((3, 5, 2)).astype(dtype), draw.standard_normal((4, 5)).astype(dtype)
    c = draw.standard_normal((3, 2, 4)).astype(dtype)
    before = c.copy()
    x, y = (bfloat16_bits(m) if how == "bfloat16" else m for m in (a, b))
    run = product(
        gemm, 7, (2, 4, 5), Operand(x.ctypes.data, x.dtype.name, 2, True),
        Operand(y.ctypes.data, y.dtype.name, 5, True), Operand(c.ctypes.data, c.dtype.name, 4),
        accumulate=accumulate, tf32=how == "tf32",
    )  # fmt: skip
    run(2 * x.strides[0], c.strides[0])
    seen = (lambda m: operand(m, how)) if how in ("tf32", "bfloat16") else (lambda m: m)
    expected = seen(a)[2].T @ seen(b).T + (before[1] if accumulate else 0)
    np.testing.assert_allclose(
        c[1], expected, rtol=1e-5 if dtype == "f" else 1e-12, atol=1e-5 if dtype == "f" else 1e-12
    )
    np.testing.assert_array_equal(c[[0, 2]], before[[0, 2]])
