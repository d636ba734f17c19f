"""The product tile: every shape, windows, strides of both signs, no k at all, one fixed order of sums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numba import njit

from numlstm.kernels.cpu import microkernel, sequence
from numlstm.kernels.cpu.isa import LANES, ROW_COLUMNS, TILE_COLUMNS, TILE_ROWS
from numlstm.kernels.cpu.microkernel import (
    fused_family,
    plain_families,
    row_family,
    tile1,
    tile2,
    transpose,
)
from numlstm.kernels.cpu.simd import JIT_OPTIONS

DEPTHS = (0, 1, 2, 37)


@njit(**JIT_OPTIONS)
def call1(address, a, a_row, a_k, k, b, b_k, start, start_row, c, c_row):
    tile1(address, a, a_row, a_k, k, b, b_k, start, start_row, c, c_row)


@njit(**JIT_OPTIONS)
def call2(address, a, a_row, a_k, k, b, b_k, e, e_row, e_k, n, f, f_k, start, start_row, c, c_row):
    tile2(address, a, a_row, a_k, k, b, b_k, e, e_row, e_k, n, f, f_k, start, start_row, c, c_row)


def shapes() -> Iterator[tuple[int, int]]:
    return ((m, n) for m in range(1, TILE_ROWS + 1) for n in range(1, TILE_COLUMNS + 1))


def draw(*shape: int) -> np.ndarray:
    """Small whole numbers: every sum is exact in any order, so that results compare by equality."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype("f")


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_product(depth: int) -> None:
    table = plain_families()
    assert table.shape == (TILE_COLUMNS + 1, TILE_ROWS)  # in the last row the transposition
    assert np.unique(table[:-1]).size == TILE_COLUMNS * TILE_ROWS
    for m, n in shapes():
        a, b, start = draw(m, depth), draw(depth, n * LANES), draw(m, n * LANES)
        for left in (a, np.asfortranarray(a), a[:, ::-1].copy()[:, ::-1]):
            c = np.full((m + 2, n * LANES + 3), 7, "f")  # what stands around the tile must stay
            call1(
                table[n - 1, m - 1], left.ctypes.data, *left.strides, depth, b.ctypes.data, n * LANES * 4,
                start.ctypes.data, n * LANES * 4, c.ctypes.data, c.strides[0],
            )  # fmt: skip
            assert np.array_equal(c[:m, : n * LANES], start + a @ b), (m, n)
            assert np.all(c[m:] == 7) and np.all(c[:, n * LANES :] == 7)


@njit(**JIT_OPTIONS)
def call_transpose(address, source, source_row, target, target_row):
    transpose(address, source, source_row, target, target_row)


def test_transposition() -> None:
    source, target = draw(LANES + 2, LANES + 5), np.full((LANES + 1, LANES + 3), 7, "f")
    address = plain_families().ravel()[microkernel.TRANSPOSE * microkernel.rows_of("float32") // 8]
    call_transpose(address, source.ctypes.data, source.strides[0], target.ctypes.data, target.strides[0])
    assert np.array_equal(target[:LANES, :LANES], source[:LANES, :LANES].T)
    assert np.all(target[LANES:] == 7) and np.all(target[:, LANES:] == 7)


def test_one_start_for_all_rows_and_adding_in_place() -> None:
    table, depth = plain_families(), 5
    for m, n in shapes():
        a, b, bias = draw(m, depth), draw(depth, n * LANES), draw(n * LANES)
        c = np.empty((m, n * LANES), "f")
        where, step = table[n - 1, m - 1], n * LANES * 4
        product = (where, a.ctypes.data, *a.strides, depth, b.ctypes.data, step)
        call1(*product, bias.ctypes.data, 0, c.ctypes.data, step)
        call1(*product, c.ctypes.data, step, c.ctypes.data, step)
        assert np.array_equal(c, bias + 2 * (a @ b))


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman", "minimal", "wide"])
def test_two_products_over_windows(cell: str) -> None:
    import zoo

    for _, columns, windows in sequence.Layout.of(zoo.CELLS[cell].stages[0]).groups():
        (x0, x1), (h0, h1) = windows
        assert (x0, h1) == (0, columns)
        table = fused_family(columns, windows)
        for m in range(1, TILE_ROWS + 1):
            for K, L in ((3, 5), (0, 4), (4, 0)):
                a, e = draw(m, K), draw(m, L + 1)[:, :L]
                b, f = draw(K, (x1 - x0) * LANES), draw(L, (h1 - h0) * LANES)
                start, c = draw(columns * LANES), np.empty((m, columns * LANES), "f")
                call2(
                    table[m - 1], a.ctypes.data, *a.strides, K, b.ctypes.data, (x1 - x0) * LANES * 4,
                    e.ctypes.data, *e.strides, L, f.ctypes.data, (h1 - h0) * LANES * 4,
                    start.ctypes.data, 0, c.ctypes.data, columns * LANES * 4,
                )  # fmt: skip
                right = np.tile(start, (m, 1))
                right[:, x0 * LANES : x1 * LANES] += a @ b
                right[:, h0 * LANES : h1 * LANES] += e @ f
                assert np.array_equal(c, right), (m, windows)


def test_a_row_has_the_same_bits_in_every_tile() -> None:
    """One fused multiply-add after another over k, however many rows and columns go with it."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((TILE_ROWS, 50)).astype("f"),
        rng.standard_normal((50, TILE_COLUMNS * LANES)).astype("f"),
    )
    zero, rows = np.zeros(TILE_COLUMNS * LANES, "f"), []
    for m, n in shapes():
        c = np.empty((m, n * LANES), "f")
        call1(
            plain_families()[n - 1, m - 1], a.ctypes.data, *a.strides, 50, b.ctypes.data, b.strides[0],
            zero.ctypes.data, 0, c.ctypes.data, n * LANES * 4,
        )  # fmt: skip
        rows.append(c[0, :LANES])
    wide = rng.standard_normal((50, ROW_COLUMNS * LANES)).astype("f")
    wide[:, : b.shape[1]] = b
    for n in range(1, ROW_COLUMNS + 1):  # a batch of one row has tiles of its own
        c, zero = np.empty((1, n * LANES), "f"), np.zeros(n * LANES, "f")
        call1(
            row_family()[n - 1, 0], a.ctypes.data, *a.strides, 50, wide.ctypes.data, wide.strides[0],
            zero.ctypes.data, 0, c.ctypes.data, n * LANES * 4,
        )  # fmt: skip
        rows.append(c[0, :LANES])
        assert np.allclose(c[0], a[0] @ wide[:, : n * LANES], atol=1e-4)
    assert all(np.array_equal(r, rows[0]) for r in rows)


def test_names_carry_shape_lanes_and_version() -> None:
    """Functions of one name are merged across the process, so a name must mean one thing."""
    from llvmlite import ir

    module = ir.Module()
    names = {
        microkernel._tile(module, m, n, w).name
        for m, n in shapes()
        for w in (((0, n),), ((0, n), (0, n)), ((0, n), (n, n)))
    }
    assert len(names) == 3 * TILE_ROWS * TILE_COLUMNS
    assert all(f"_l{LANES}_v{microkernel.VERSION}" in name for name in names)
