"""Matrix products in float32 from the same tile as the sequences (microkernel.py): one dispatch, any strides.

The right operand is packed into panels of columns by all threads, a block at a time, and the output's tiles are shared
out. Every element is one sum over k in one order, so the result has the same bits whatever the number of threads; that is
why the library's dense layers come here and not to BLAS, whose threads also spin on after a call and would slow the
sequences.

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
from . import amx, threads
from .amx import begin_tiles, end_tiles
from .bfloat16 import (
    clear_words,
    line_step,
    pack_transposed_pairs,
    pair_columns,
    round_rows,
    transposing_bytes,
    turn_words,
)
from .cache import compile_kernel
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .microkernel import TRANSPOSE, plain_families, rows_of, tile1
from .plan import SIGNATURE, get, share
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
from .workspace import address, aligned

__all__ = ["matmul"]

SMALL = (
    8192  # multiply-adds below which NumPy's own product (one thread at that size) is quicker than a dispatch
)
ONE_THREAD_BELOW = 2e6  # multiply-adds
_FLOAT32 = np.dtype(np.float32)
DEPTH = 256  # k a pass: a panel's part stays in cache while the rows' tiles go by
WIDTH = 4 * 48  # vectors of columns packed at once: what is packed stays in cache, and takes little memory


class P(IntEnum):
    """Places in the plan, in the order in which `matmul` writes them."""

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
    PACKED = auto()  # room for a block of B
    SCRATCH = auto()
    PLAIN = auto()
    FLAGS = auto()
    # Only in bfloat16:
    ROUNDED = auto()  # A in words, as an array of its own
    ROUNDED_STEP = auto()  # bytes between its rows, or where A's columns lie together, between its k
    PAIRS = auto()  # scratch for packing, PAIRS_BYTES a shard
    PAIRS_BYTES = auto()
    ZEROS = auto()
    UNIT = auto()  # as in layout.P
    TILE_ROWS = auto()
    TILES = auto()


@njit(**JIT_OPTIONS)
def _pack(p, k0, depth, v0, v1, shard, shards):
    """Rows k0 on and vectors of columns from v0 to v1 of B into panels [panel][depth][vectors LANES], padded with 0; each
    thread its part of the rows."""
    N, b, b_k, b_column = get(p, P.N), get(p, P.B), get(p, P.B_K), get(p, P.B_COLUMN)
    first, last = share(depth, shard, shards)
    for v in range(v0, v1, TILE_COLUMNS):
        n = min(TILE_COLUMNS, v1 - v)
        panel = get(p, P.PACKED) + (v - v0) * VECTOR_BYTES * depth
        for k in range(first, last):
            out = panel + k * n * VECTOR_BYTES
            row = b + (k0 + k) * b_k + v * LANES * b_column
            if b_column == 4:
                for q in range(n):
                    store(out + q * VECTOR_BYTES, load_n(row + q * VECTOR_BYTES, N - (v + q) * LANES))
            else:
                zero_bytes(out, n * VECTOR_BYTES)
                for q in range(min(n * LANES, N - v * LANES)):
                    store_scalar(out + q * 4, load_scalar(row + q * b_column))


@njit(**JIT_OPTIONS)
def _pack_pairs(p, shard, shards):
    """All of B into panels [panel][K / 2][vectors LANES] of words, and A into words; either may be transposed. For amx.py's
    tiles K is padded, and A comes in rows."""
    M, N, K, a, b = get(p, P.M), get(p, P.N), get(p, P.DEPTH_K), get(p, P.A), get(p, P.B)
    unit, out, rounded, step = get(p, P.UNIT), get(p, P.PACKED), get(p, P.ROUNDED), get(p, P.ROUNDED_STEP)
    words = (K + 2 * unit - 1) // (2 * unit) * unit
    scratch = get(p, P.PAIRS) + shard * get(p, P.PAIRS_BYTES)
    by_block = load_int(get(p, P.PLAIN) + TRANSPOSE * get(p, P.TILE_ROWS))
    if get(p, P.A_K) == 4:
        first, last = share(M, shard, shards)
        round_rows(a, get(p, P.A_ROW), K, rounded, step, first, last)
        clear_words(rounded, step, (K + 1) // 2, words, first, last)
    elif unit > 1:
        first, last = share(words // unit, shard, shards)
        across = (M + LANES - 1) // LANES * VECTOR_BYTES
        for w in range(first * unit, last * unit, unit):
            pair_columns(a, get(p, P.A_K), K, M, scratch - w * across, across, w, w + unit)
            turn_words(by_block, scratch, across, M, rounded + w * 4, step)
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
        row = get(p, P.B_COLUMN) // 4
        pack_transposed_pairs(b, row, N, K, words, 1, get(p, P.ZEROS), out, by_block, scratch, shard, shards)


@njit(**JIT_OPTIONS)
def _tile(p, a, a_row, a_k, m, rows, v, n, k, depth, packed, scratch, most, unit):
    """The tile of `rows` rows from m and `n` vectors of columns from v: to C is added the product over `depth` k from k,
    or to the bias at k = 0. `packed`: the panel's part for these k. A tile has up to `most` rows, in whole `unit`s."""
    N, c_row = get(p, P.N), get(p, P.C_ROW)
    c = get(p, P.C) + m * c_row + v * VECTOR_BYTES
    out, step, whole = c, c_row, (v + n) * LANES <= N and rows % unit == 0
    if not whole:  # the last vector is not full, or rows are lacking: the tile goes through scratch
        out, step = scratch, n * VECTOR_BYTES
        if k > 0:
            for r in range(rows):
                for q in range(n):
                    at = c + r * c_row + q * VECTOR_BYTES
                    store(out + r * step + q * VECTOR_BYTES, load_n(at, N - (v + q) * LANES))
    start, start_step = out, step
    if k == 0:
        start, start_step = get(p, P.BIAS) + v * VECTOR_BYTES, 0
    tile1(
        load_int(get(p, P.PLAIN) + ((n - 1) * most + rows - 1) * 8),
        a + m * a_row + k * a_k, a_row, a_k, depth, packed, n * VECTOR_BYTES, start, start_step, out, step,
    )  # fmt: skip
    if not whole:
        for r in range(rows):
            for q in range(n):
                at = c + r * c_row + q * VECTOR_BYTES
                store_n(at, load(out + r * step + q * VECTOR_BYTES), N - (v + q) * LANES)


def _product_pairs(p, shard, shards):
    """The product in bfloat16."""
    M, N, most, unit = get(p, P.M), get(p, P.N), get(p, P.TILE_ROWS), get(p, P.UNIT)
    words = (get(p, P.DEPTH_K) + 2 * unit - 1) // (2 * unit) * unit
    scratch = get(p, P.SCRATCH) + shard * (most * TILE_COLUMNS * VECTOR_BYTES)
    begin_tiles(get(p, P.TILES))
    _pack_pairs(p, shard, shards)
    a, a_row, a_k = get(p, P.ROUNDED), 4, get(p, P.ROUNDED_STEP)
    if get(p, P.A_K) == 4 or unit > 1:
        a_row, a_k = a_k, 4
    barrier(get(p, P.FLAGS), shard, shards, 1)
    vectors, down = (N + LANES - 1) // LANES, (M + most - 1) // most
    first, last = share((vectors + TILE_COLUMNS - 1) // TILE_COLUMNS * down, shard, shards)
    for k in range(0, words, DEPTH):
        depth = min(DEPTH, words - k)
        for i in range(first, last):
            v, m = i // down * TILE_COLUMNS, i % down * most
            n, rows = min(TILE_COLUMNS, vectors - v), min(most, M - m)
            packed = get(p, P.PACKED) + (v * words + k * n) * VECTOR_BYTES
            _tile(p, a, a_row, a_k, m, rows, v, n, k, depth, packed, scratch, most, unit)
    end_tiles(get(p, P.TILES))


def _product(p, shard, shards):
    M, N, K, flags, met = get(p, P.M), get(p, P.N), get(p, P.DEPTH_K), get(p, P.FLAGS), 0
    a, a_row, a_k = get(p, P.A), get(p, P.A_ROW), get(p, P.A_K)
    scratch = get(p, P.SCRATCH) + shard * (TILE_ROWS * TILE_COLUMNS * VECTOR_BYTES)
    vectors, down = (N + LANES - 1) // LANES, (M + TILE_ROWS - 1) // TILE_ROWS
    for v0 in range(0, vectors, WIDTH):
        v1 = min(v0 + WIDTH, vectors)
        panels = (v1 - v0 + TILE_COLUMNS - 1) // TILE_COLUMNS
        first, last = share(panels * down, shard, shards)
        for k in range(0, K, DEPTH):
            depth = min(DEPTH, K - k)
            if met > 0:  # nobody reads any more what is overwritten
                met += 1
                barrier(flags, shard, shards, met)
            _pack(p, k, depth, v0, v1, shard, shards)
            met += 1
            barrier(flags, shard, shards, met)
            for i in range(first, last):
                v, m = v0 + i // down * TILE_COLUMNS, i % down * TILE_ROWS
                n, rows = min(TILE_COLUMNS, v1 - v), min(TILE_ROWS, M - m)
                packed = get(p, P.PACKED) + (v - v0) * VECTOR_BYTES * depth
                _tile(p, a, a_row, a_k, m, rows, v, n, k, depth, packed, scratch, TILE_ROWS, 1)


@cache
def _kernel(paired: bool) -> Any:
    function = _product_pairs if paired else _product
    return compile_kernel(function, "matmul", repr((DEPTH, WIDTH, paired)), SIGNATURE)


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
    check_precision(precision, ("float32", "bfloat16"))
    (M, depth), N = a.shape, b.shape[1]
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"matmul: expected a bias of shape {(N,)}, got {bias.shape}")
    work, paired = M * N * depth, precision == "bfloat16"
    if a.dtype is not _FLOAT32 or b.dtype is not _FLOAT32:
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if work <= SMALL:
        c = np.matmul(operand(a, precision), operand(b, precision))
        if bias is not None:
            c += bias
        return c
    precision, width = amx.precision_of(precision, M), -(-N // LANES) * LANES
    shards = 1 if work < ONE_THREAD_BELOW else threads.get_num_threads()
    # One piece of memory for all that a call needs beside its result; the bias padded to whole vectors.
    flags, tile = shards * threads.FLAG_BYTES // 4, shards * rows_of(precision) * TILE_COLUMNS * LANES
    flags, packed = -(-flags // 16) * 16, min(width, WIDTH * LANES) * min(depth, DEPTH)
    unit = amx.UNIT if amx.tiled(precision) else 1
    if paired:
        packed = width * (-(-depth // (2 * unit)) * unit)
    space, c = aligned((flags + width + tile + packed,)), aligned((M, N))
    space[: flags + width] = 0
    if bias is not None:
        space[flags : flags + N] = bias
    at = address(space)
    scratch = at + 4 * (flags + width)
    words: list[int] = []
    if paired:
        a, b, words, _kept = _pairs(a, b, shards, unit)  # alive until the call returns
        words += [unit, rows_of(precision), amx.state_of(amx.form_of(precision))]
    (a_row, a_k), (b_k, b_column) = a.strides, b.strides
    plan = np.array(
        [
            M, N, depth, address(a), a_row, a_k, address(b), b_k, b_column, address(c), 4 * N,
            at + 4 * flags, scratch + 4 * tile, scratch, address(plain_families(precision)), at, *words,
        ],
        np.int64,
    )  # fmt: skip
    threads.run(_kernel(paired), address(plan), shards)
    return c


def _pairs(
    a: np.ndarray, b: np.ndarray, shards: int, unit: int
) -> tuple[np.ndarray, np.ndarray, list[int], list[np.ndarray]]:
    """What bfloat16 adds: operands with one axis that is contiguous, the plan's last words but for those of the tiles, and
    what those point to."""
    (M, depth), words = a.shape, -(-a.shape[1] // (2 * unit)) * unit
    if 4 not in a.strides:
        a = np.ascontiguousarray(a)
    if 4 not in b.strides or any(s % 4 for s in b.strides):
        b = np.ascontiguousarray(b)
    whole = -(-M // LANES) * LANES
    by_rows, scratch = a.strides[1] == 4, transposing_bytes(depth)
    if unit > 1 and not by_rows:  # turned to rows, UNIT words of them at a time
        by_rows, scratch = True, max(scratch, unit * whole * 4)
    step = line_step(words if by_rows else whole)
    rounded = aligned((whole if by_rows else words, step // 4))
    pairs, zeros = aligned((shards, scratch // 4)), aligned((2,), zero=True)
    at = [address(rounded), step, address(pairs), scratch, address(zeros)]
    return a, b, at, [rounded, pairs, zeros]
