"""Matrix products in float32 from the same tile as the sequences (microkernel.py): one dispatch, any strides.

The right operand is packed into panels of columns by all threads, then output tiles are shared out. Every element is one
sum over k in one order, so the result has the same bits whatever the number of threads; that is why the library's dense
layers come here and not to BLAS, whose threads also spin on after a call and would slow the sequences.

In bfloat16 both operands are rounded and packed as words of two values (bfloat16.py); sums and the result are float32.
"""

from __future__ import annotations

from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..rounding import operand
from ..sequence import check_precision
from . import threads
from .bfloat16 import line_step, pack_transposed_pairs, pair_columns, round_rows, transposing_bytes
from .cache import compile_kernel, unique_name
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .microkernel import TRANSPOSE, plain_families, tile1
from .plan import SIGNATURE, get, make_plan, share
from .simd import (
    JIT_OPTIONS,
    VECTOR_BYTES,
    load,
    load_int,
    load_n,
    load_scalar,
    store,
    store_n,
    store_scalar,
    zero_bytes,
)
from .threads import barrier
from .workspace import aligned

__all__ = ["matmul"]

SMALL = (
    8192  # multiply-adds below which NumPy's own product (one thread at that size) is quicker than a dispatch
)
ONE_THREAD_BELOW = 2e6  # multiply-adds
DEPTH = 256  # k a pass: a panel's part stays in cache while the rows' tiles go by


class P(IntEnum):
    """Places in the plan."""

    M = 0
    N = auto()
    DEPTH_K = auto()
    A = auto()
    A_ROW = auto()  # bytes between rows, between columns
    A_K = auto()
    B = auto()
    B_K = auto()
    B_COLUMN = auto()
    C = auto()
    C_ROW = auto()
    BIAS = auto()  # padded to whole vectors; zeros where there is none
    PACKED = auto()
    SCRATCH = auto()
    PLAIN = auto()
    FLAGS = auto()
    # Only in bfloat16:
    ROUNDED = auto()  # A in words, as an array of its own
    ROUNDED_STEP = auto()  # bytes between its rows, or where A's columns lie together, between its k
    PAIRS = auto()  # scratch for packing, PAIRS_BYTES a shard
    PAIRS_BYTES = auto()
    ZEROS = auto()


@njit(**JIT_OPTIONS)
def _pack(p, shard, shards):
    """B (K, N) into panels [panel][K][vectors LANES], padded with 0; each thread its part of k."""
    N, K, b, b_k, b_column = get(p, P.N), get(p, P.DEPTH_K), get(p, P.B), get(p, P.B_K), get(p, P.B_COLUMN)
    vectors = (N + LANES - 1) // LANES
    first, last = share(K, shard, shards)
    for v in range(0, vectors, TILE_COLUMNS):
        n = min(TILE_COLUMNS, vectors - v)
        panel = get(p, P.PACKED) + v * VECTOR_BYTES * K
        for k in range(first, last):
            out = panel + k * n * VECTOR_BYTES
            row = b + k * b_k + v * LANES * b_column
            if b_column == 4:
                for q in range(n):
                    store(out + q * VECTOR_BYTES, load_n(row + q * VECTOR_BYTES, N - (v + q) * LANES))
            else:
                zero_bytes(out, n * VECTOR_BYTES)
                for q in range(min(n * LANES, N - v * LANES)):
                    store_scalar(out + q * 4, load_scalar(row + q * b_column))


@njit(**JIT_OPTIONS)
def _pack_pairs(p, shard, shards):
    """B into panels [panel][K / 2][vectors LANES] of words, and A into words; either may be transposed."""
    M, N, K, a, b = get(p, P.M), get(p, P.N), get(p, P.DEPTH_K), get(p, P.A), get(p, P.B)
    words, out, rounded, step = (K + 1) // 2, get(p, P.PACKED), get(p, P.ROUNDED), get(p, P.ROUNDED_STEP)
    if get(p, P.A_K) == 4:
        first, last = share(M, shard, shards)
        round_rows(a, get(p, P.A_ROW), K, rounded, step, first, last)
    else:
        first, last = share(words, shard, shards)
        pair_columns(a, get(p, P.A_K), K, M, rounded, step, first, last)
    if get(p, P.B_COLUMN) == 4:
        vectors = (N + LANES - 1) // LANES
        first, last = share(words, shard, shards)
        for v in range(0, vectors, TILE_COLUMNS):
            n, panel = min(TILE_COLUMNS, vectors - v) * LANES, out + v * VECTOR_BYTES * words
            here = min(n, N - v * LANES)
            pair_columns(b + v * VECTOR_BYTES, get(p, P.B_K), K, here, panel, n * 4, first, last)
    else:
        scratch = get(p, P.PAIRS) + shard * get(p, P.PAIRS_BYTES)
        by_block = load_int(get(p, P.PLAIN) + TRANSPOSE)
        row = get(p, P.B_COLUMN) // 4
        pack_transposed_pairs(b, row, N, K, 1, get(p, P.ZEROS), out, by_block, scratch, shard, shards)


def _product_of(precision: str) -> Any:
    """product(p, shard, shards), not yet compiled."""
    PAIRED = precision == "bfloat16"  # a constant: only one precision is compiled
    pack = _pack_pairs if PAIRED else _pack

    def product(p, shard, shards):
        M, N, K = get(p, P.M), get(p, P.N), get(p, P.DEPTH_K)
        a, a_row, a_k, c, c_row = get(p, P.A), get(p, P.A_ROW), get(p, P.A_K), get(p, P.C), get(p, P.C_ROW)
        plain, bias = get(p, P.PLAIN), get(p, P.BIAS)
        scratch = get(p, P.SCRATCH) + shard * (TILE_ROWS * TILE_COLUMNS * VECTOR_BYTES)
        pack(p, shard, shards)
        if PAIRED:
            by_rows = a_k == 4
            a, a_row, a_k, K = get(p, P.ROUNDED), 4, get(p, P.ROUNDED_STEP), (K + 1) // 2
            if by_rows:
                a_row, a_k = a_k, 4
        barrier(get(p, P.FLAGS), shard, shards, 1)
        vectors = (N + LANES - 1) // LANES
        panels = (vectors + TILE_COLUMNS - 1) // TILE_COLUMNS
        down = (M + TILE_ROWS - 1) // TILE_ROWS
        first, last = share(panels * down, shard, shards)
        for k in range(0, K, DEPTH):
            depth = min(DEPTH, K - k)
            for i in range(first, last):
                v, m = i // down * TILE_COLUMNS, i % down * TILE_ROWS
                n, rows = min(TILE_COLUMNS, vectors - v), min(TILE_ROWS, M - m)
                out, step = c + m * c_row + v * VECTOR_BYTES, c_row
                whole = (v + n) * LANES <= N
                if not whole:  # the last vector is not full: the tile goes through scratch
                    out, step = scratch, n * VECTOR_BYTES
                    if k > 0:
                        for r in range(rows):
                            for q in range(n):
                                at = c + (m + r) * c_row + (v + q) * VECTOR_BYTES
                                store(out + r * step + q * VECTOR_BYTES, load_n(at, N - (v + q) * LANES))
                start, start_step = out, step
                if k == 0:
                    start, start_step = bias + v * VECTOR_BYTES, 0
                tile1(
                    load_int(plain + ((n - 1) * TILE_ROWS + rows - 1) * 8),
                    a + m * a_row + k * a_k, a_row, a_k, depth,
                    get(p, P.PACKED) + v * VECTOR_BYTES * K + k * n * VECTOR_BYTES, n * VECTOR_BYTES,
                    start, start_step, out, step,
                )  # fmt: skip
                if not whole:
                    for r in range(rows):
                        for q in range(n):
                            at = c + (m + r) * c_row + (v + q) * VECTOR_BYTES
                            store_n(at, load(out + r * step + q * VECTOR_BYTES), N - (v + q) * LANES)

    product.__qualname__ = unique_name("product", precision)
    return product


_product = _product_of("float32")


@cache
def _kernel(precision: str) -> Any:
    return compile_kernel(_product_of(precision), "matmul", repr((DEPTH, precision)), SIGNATURE)


def matmul(
    a: np.ndarray, b: np.ndarray, *, bias: np.ndarray | None = None, precision: str = "float32"
) -> np.ndarray:
    """a (M, K) times b (K, N), plus bias (N), in float32; transposed views are welcome.

    With `precision` "bfloat16" a and b are rounded; sums stay float32.

    Raises:
        ValueError: the shapes do not fit, or an unknown precision.

    >>> import numpy as np
    >>> matmul(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32), bias=np.array([0, 1], np.float32)).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: expected (M, K) and (K, N), got {a.shape} and {b.shape}")
    check_precision(precision)
    (M, depth), N = a.shape, b.shape[1]
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"matmul: expected a bias of shape {(N,)}, got {bias.shape}")
    if M * N * depth <= SMALL:
        a, b = operand(a, precision), operand(b, precision)
        c = np.matmul(a, b, dtype=np.float32)
        if bias is not None:
            c += bias
        return c
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    vectors = -(-N // LANES)
    start = aligned((vectors * LANES,), zero=True)
    if bias is not None:
        start[:N] = bias
    shards = 1 if M * N * depth < ONE_THREAD_BELOW else threads.get_num_threads()
    c = aligned((M, N))
    arrays = {
        P.A: a,
        P.B: b,
        P.C: c,
        P.BIAS: start,
        P.PACKED: aligned((vectors * LANES, depth if precision == "float32" else (depth + 1) // 2)),
        P.SCRATCH: aligned((shards, TILE_ROWS, TILE_COLUMNS * LANES)),
        P.PLAIN: plain_families(precision),
        P.FLAGS: aligned((shards, threads.FLAG_BYTES // 4), zero=True),
    }
    sizes = {
        P.M: M, P.N: N, P.DEPTH_K: depth, P.A_ROW: a.strides[0], P.A_K: a.strides[1],
        P.B_K: b.strides[0], P.B_COLUMN: b.strides[1], P.C_ROW: 4 * N,
    }  # fmt: skip
    if precision == "bfloat16":
        _prepare_pairs(a, b, shards, sizes, arrays)
    plan = make_plan(P, sizes, arrays)
    threads.run(_kernel(precision), plan.ctypes.data, shards)
    return c


def _prepare_pairs(
    a: np.ndarray, b: np.ndarray, shards: int, sizes: dict[P, int], arrays: dict[P, np.ndarray]
) -> None:
    """What bfloat16 adds to a plan: operands with one axis that is contiguous, and memory for words."""
    (M, depth), words = a.shape, (a.shape[1] + 1) // 2
    if 4 not in a.strides:
        a = np.ascontiguousarray(a)
        arrays[P.A], sizes[P.A_ROW], sizes[P.A_K] = a, *a.strides
    if 4 not in b.strides or any(s % 4 for s in b.strides):
        b = np.ascontiguousarray(b)
        arrays[P.B], sizes[P.B_K], sizes[P.B_COLUMN] = b, *b.strides
    by_rows = a.strides[1] == 4
    step = line_step(words if by_rows else -(-M // LANES) * LANES)
    sizes[P.ROUNDED_STEP], sizes[P.PAIRS_BYTES] = step, transposing_bytes(depth)
    arrays[P.ROUNDED] = aligned((M if by_rows else words, step // 4))
    arrays[P.PAIRS] = aligned((shards, transposing_bytes(depth) // 4))
    arrays[P.ZEROS] = aligned((2,), zero=True)
