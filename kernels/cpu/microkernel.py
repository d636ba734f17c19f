"""The product tile: C[m, :] = start[m, :] + sum over one or two products of A[m, k] B[k, :], in registers.

`rows` x `columns` vectors of accumulators (isa.py); B is packed, k after k; A is broadcast from memory at any strides, so
one tile serves A B and A^T B. A tile may add two products that cover different windows of its columns, as the input's
and the recurrent product of a GRU do. Each shape is one noinline function: inlined beside the gates, their constants would
push the accumulators out of the registers.

In bfloat16 the tile is the same with half as many k: A and B are 32-bit words of two values each, for k and k + 1, and the
multiply-add is a product of pairs (simd.py: dot_pairs); sums stay float32.

A family is the tiles of one column shape for 1 to TILE_ROWS rows, compiled once and called through a table of addresses,
so that kernels that use it stay small. Where the precision is one of amx.py's, they are its tiles, for 1 to 32 rows.
linkonce_odr functions of one name are merged across the process, so shape, lanes and VERSION stand in the name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from . import amx
from .cache import compile_kernel
from .isa import DOT_BF16, LANES, ROW_COLUMNS, TILE_COLUMNS, TILE_ROWS
from .simd import (
    F32,
    I64,
    VECTOR,
    VECTOR_BYTES,
    VECTOR_INT,
    broadcast,
    caller,
    dot_pairs,
    fma,
    high_of_pairs,
    load_again,
    low_of_pairs,
    operation,
    pointer,
)

__all__ = [
    "TRANSPOSE",
    "Windows",
    "fused_family",
    "plain_families",
    "row_family",
    "rows_of",
    "tile1",
    "tile2",
    "transpose",
]

VERSION = 2
TRANSPOSE = (
    8 * TILE_COLUMNS
)  # where its address is in the table of `plain_families`: so many bytes times `rows_of`
Windows = tuple[tuple[int, int], ...]  # for each product, the columns it adds to: first and one past the last

PRODUCT_ARGUMENTS = 6  # A, bytes between its rows, bytes between its k, how many k, B, bytes between its k
LAST_ARGUMENTS = 4  # start, bytes between its rows, C, bytes between its rows


def _tile(
    module: ir.Module, rows: int, columns: int, windows: Windows, precision: str = "float32"
) -> ir.Function:
    shape = "_".join(f"{a}to{z}" for a, z in windows)
    kind = precision + "_dot" * (precision == "bfloat16" and DOT_BF16)
    name = f"numlstm_tile_{kind}_{rows}x{columns}_{shape}_l{LANES}_v{VERSION}"
    if name in module.globals:
        return module.globals[name]
    count = PRODUCT_ARGUMENTS * len(windows) + LAST_ARGUMENTS
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
    f.linkage = "linkonce_odr"
    f.attributes.add("noinline")
    start, start_step, out, out_step = f.args[-LAST_ARGUMENTS:]
    b = ir.IRBuilder(f.append_basic_block())

    def at(base: Any, step: Any, m: int, n: int) -> Any:
        return pointer(b, b.add(b.add(base, b.mul(step, I64(m))), I64(n * VECTOR_BYTES)), VECTOR)

    sums = {(m, n): b.load(at(start, start_step, m, n), align=4) for m in range(rows) for n in range(columns)}
    for k, window in enumerate(windows):
        product = f.args[PRODUCT_ARGUMENTS * k : PRODUCT_ARGUMENTS * (k + 1)]
        _add_product(f, b, sums, rows, window, precision, *product)
    for (m, n), value in sums.items():
        b.store(value, at(out, out_step, m, n), align=4)
    b.ret_void()
    return f


def _add_product(
    f: ir.Function, b: ir.IRBuilder, sums: dict, rows: int, window: tuple[int, int], precision: str,
    a: Any, a_row: Any, a_k: Any, k_end: Any, weights: Any, weights_step: Any,
) -> None:  # fmt: skip
    """Emit the loop over k; `sums` is updated to the values after it."""
    first, last = window
    if first == last:
        return
    live = [(m, n) for m in range(rows) for n in range(first, last)]
    before = b.block
    row_base = [b.add(a, b.mul(a_row, I64(m))) for m in range(rows)]
    loop, end = f.append_basic_block(), f.append_basic_block()
    b.cbranch(b.icmp_signed(">", k_end, I64(0)), loop, end)
    b.position_at_end(loop)
    k, offset, position = b.phi(I64), b.phi(I64), b.phi(I64)
    accumulators = {key: b.phi(VECTOR) for key in live}
    new: dict = dict(accumulators)

    def steps(part: Any, multiply: Any) -> None:
        """For every sum, the product of what `part` makes of the loaded words."""
        row = [
            part(b.load(pointer(b, b.add(position, I64((n - first) * VECTOR_BYTES)), VECTOR), align=4))
            for n in range(first, last)
        ]
        for m in range(rows):
            x = part(broadcast(b, b.load(pointer(b, b.add(row_base[m], offset), F32), align=4)))
            for n in range(first, last):
                new[m, n] = multiply(b, x, row[n - first], new[m, n])

    whole = lambda word: word
    if precision == "float32":
        steps(whole, fma)
    elif DOT_BF16:
        steps(whole, dot_pairs)
    else:  # the low halves of all words, then the high ones; expanded side by side they would not fit the registers
        steps(lambda word: low_of_pairs(b, word), fma)
        load_again(b)
        steps(lambda word: high_of_pairs(b, word), fma)
    k_next = b.add(k, I64(1))
    for phi, initial, following in (
        (k, I64(0), k_next),
        (offset, I64(0), b.add(offset, a_k)),
        (position, weights, b.add(position, weights_step)),
        *((accumulators[key], sums[key], new[key]) for key in live),
    ):
        phi.add_incoming(initial, before)
        phi.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", k_next, k_end), loop, end)
    b.position_at_end(end)
    for key in live:
        phi = b.phi(VECTOR)
        phi.add_incoming(sums[key], before)
        phi.add_incoming(new[key], loop)
        sums[key] = phi


def _transpose(module: ir.Module) -> ir.Function:
    """LANES rows of LANES floats, a step of bytes apart, to their transpose: at stage s, rows s apart swap lanes s apart."""
    name = f"numlstm_transpose_l{LANES}_v{VERSION}"
    if name in module.globals:
        return module.globals[name]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), name)
    f.linkage = "linkonce_odr"
    f.attributes.add("noinline")
    source, source_step, target, target_step = f.args
    b = ir.IRBuilder(f.append_basic_block())
    at = lambda base, step, k: pointer(b, b.add(base, b.mul(step, I64(k))), VECTOR)
    rows = [b.load(at(source, source_step, k), align=4) for k in range(LANES)]
    s = LANES // 2
    while s:
        first = ir.Constant(VECTOR_INT, [k if not k & s else LANES + k - s for k in range(LANES)])
        second = ir.Constant(VECTOR_INT, [k + s if not k & s else LANES + k for k in range(LANES)])
        for k in range(LANES):
            if not k & s:
                x, y = rows[k], rows[k + s]
                rows[k], rows[k + s] = b.shuffle_vector(x, y, first), b.shuffle_vector(x, y, second)
        s //= 2
    for k, row in enumerate(rows):
        b.store(row, at(target, target_step, k), align=4)
    b.ret_void()
    return f


def rows_of(precision: str) -> int:
    """The most rows of a tile."""
    return amx.ROWS if amx.tiled(precision) else TILE_ROWS


def _table(
    name: str,
    shapes: tuple[tuple[int, Windows], ...],
    precision: str,
    rows: int,
    with_transpose: bool = False,
) -> np.ndarray:
    """Compile the tiles of each (columns, windows) for 1 to `rows` rows; their addresses (int64), a row a shape, and if
    asked for that of the transposition, in one row more."""
    form = amx.form_of(precision)

    @operation("0(i)")
    def write(b, table):
        if with_transpose:
            address = b.ptrtoint(_transpose(b.module), I64)
            b.store(address, pointer(b, b.add(table, I64(8 * len(shapes) * rows)), I64), align=8)
        for s, (columns, windows) in enumerate(shapes):
            for m in range(rows):
                if form is None:
                    tile = _tile(b.module, m + 1, columns, windows, precision)
                else:
                    tile = amx.product_tile(b.module, form, m + 1, columns, windows)
                place = pointer(b, b.add(table, I64(8 * (s * rows + m))), I64)
                b.store(b.ptrtoint(tile, I64), place, align=8)

    def fill(table):
        write(table)

    table = np.zeros((len(shapes) + 1, rows), np.int64)
    text = repr((shapes, with_transpose, precision, rows))
    kernel = compile_kernel(fill, name, text, types.void(types.int64))
    kernel(table.ctypes.data)
    _KEEP_LOADED.append(kernel)
    return table


_KEEP_LOADED: list[Any] = []  # the addresses in a table are good while their library is loaded


def fused_family(
    columns: int, windows: Windows, precision: str = "float32", rows: int | None = None
) -> np.ndarray:
    """Tiles of two products: entry m - 1 has m rows, up to `rows`, by default all that there are."""
    return _fused(columns, windows, precision, rows or rows_of(precision))


def plain_families(precision: str = "float32") -> np.ndarray:
    """Tiles of one product: entry [n - 1, m - 1] has m rows and n columns, n up to TILE_COLUMNS; then, in a row more, the
    transposition."""
    return _plain(precision)


@cache
def row_family() -> np.ndarray:
    """Tiles of one product and one row, in float32: entry [n - 1, 0] has n columns, up to ROW_COLUMNS."""
    shapes = tuple((n, ((0, n),)) for n in range(1, ROW_COLUMNS + 1))
    return _table("tiles_row", shapes, "float32", 1)


@cache
def _fused(columns: int, windows: Windows, precision: str, rows: int) -> np.ndarray:
    return _table("tiles_fused", ((columns, windows),), precision, rows)[0]


@cache
def _plain(precision: str) -> np.ndarray:
    shapes = tuple((n, ((0, n),)) for n in range(1, TILE_COLUMNS + 1))
    return _table("tiles_plain", shapes, precision, rows_of(precision), with_transpose=True)


# Calls of what stands in the tables, by address.
transpose: Any = caller(4)  # source, bytes between its rows, target, bytes between its rows
tile1: Any = caller(PRODUCT_ARGUMENTS + LAST_ARGUMENTS)  # a tile of one product
tile2: Any = caller(2 * PRODUCT_ARGUMENTS + LAST_ARGUMENTS)  # of two
