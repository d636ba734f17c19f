"""Sequences and dense layers on int8 weights, for inference: ../int8.py says what they compute, to the bit.

The product tile is that of microkernel.py with k in fours: four bytes of A are broadcast as one 32-bit group, B is packed
[k / 4][lanes][4], and one `vpdpbusd` adds four products to each 32-bit sum (AVX-512-VNNI, or AVX-VNNI at eight lanes;
elsewhere pairs of 16-bit products, or plain multiplications: the same sums, as they are whole numbers; and where there are a
few rows, the tiles of amx.py, with k padded to a whole number of its units). That instruction
takes unsigned bytes on one side, so A holds q + 128, and the sums start at -128 times the column's sum. The tile ends in
float32 pre-activations, on which the cell's emitted equations run as ever (fused.py's tile, staged.py's for a stage).

A sequence's inputs are brought to eight bits first, all rows. Then, a few steps at a time, their product for these steps (in
tall tiles, in memory that stays in cache), and step by step h in eight bits and its product (in a cell of several stages,
what each stage's product reads). Weights are packed at their first use and kept. Whole numbers add up in any order, so the
bits depend on no thread count.

Memory, beside what layout.py describes:
    wp, rp  int8 [block][group of columns][k / 4][vectors of the group][LANES][4]
    pre     [block][CHUNK B][NP W]   pre-activations of CHUNK steps
    xq, hq  bytes [row][K rounded up to whole vectors]; their rows' scales beside them
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, auto
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types

from ..derive import Cell
from ..int8 import LEVELS, SMALLEST, STEP, Quantized
from ..sequence import Forward, check_forward
from . import amx, fused, isa, staged, threads
from .amx import begin_tiles, end_tiles
from .cache import compile_kernel
from .isa import FEATURES, IS_X86, LANES, TILE_COLUMNS, TILE_ROWS
from .layout import PLAN_BYTES, Layout, P, Prepared, by_step, columns
from .parts import tile_rows
from .plan import SIGNATURE, get, make_plan, share
from .sequence import run
from .simd import (
    F32,
    I8,
    I32,
    I64,
    INNER_OPTIONS,
    VECTOR,
    VECTOR_BYTES,
    VECTOR_INT,
    broadcast,
    call,
    const,
    fma,
    horizontal_max,
    int_const,
    load,
    load_int,
    load_n,
    operation,
    pointer,
    splat,
    store,
    store_n,
)
from .threads import barrier
from .tiles import call_forward_tile
from .workspace import aligned, carve

__all__ = ["FORM", "explain", "forward", "forward_all", "matmul", "prepare_step"]

VERSION = 2  # of the tiles: stands in their names, as in microkernel.py
CHUNK_ROWS = 64  # rows of pre-activations that are computed ahead, at least
# Multiply-adds of a sequence below which one thread does it: where the others must be woken first, and where they are awake.
ONE_THREAD_BELOW, ONE_AWAKE_BELOW = 3e7, 5e6
MATMUL_ONE_THREAD_BELOW = 8e6
CACHE_BYTES = 1 << 20  # packed weights above this are split over the threads
ROWS_FOR_BATCH_SPLIT = 4  # rows a thread

CONSTANTS = repr(
    (LEVELS, float(SMALLEST), float(STEP))
)  # in kernels' keys: ../int8.py is not among the sources hashed

# How four products are added to a sum: "vnni" one instruction, "pairs" two of 16 bits, "plain" four of 32.
_DOT = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
_PAIRS = {
    16: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512"),
    8: ("avx2", "llvm.x86.avx2.pmadd.wd"),
    4: ("sse2", "llvm.x86.sse2.pmadd.wd"),
}


def _form() -> str:
    """The quickest form that this processor has at this vector width."""
    if IS_X86 and {16: "avx512vnni", 8: "avxvnni"}.get(LANES) in FEATURES:
        return "vnni"
    return "pairs" if IS_X86 and _PAIRS[LANES][0] in FEATURES else "plain"


FORM = _form()


def form_for(rows: int) -> str:
    """The form of a product of so many rows."""
    return (isa.tiles("int8") if rows >= amx.LEAST_ROWS else None) or FORM


def _amx(form: str) -> str | None:
    """The form where it is one of amx.py's."""
    return form if form in amx.FORMS else None


def _unit(form: str) -> int:
    """Groups of four k are packed in whole multiples of so many."""
    return 1 if _amx(form) is None else amx.UNIT


def _most(form: str) -> int:
    """The most rows of a tile."""
    return TILE_ROWS if _amx(form) is None else amx.ROWS


# The tile

TILE_ARGUMENTS = 12


def _dot(b: ir.IRBuilder, form: str, group: Any, weights: Any) -> Any:
    """A function from a sum to the sum plus four products in each lane. group: unsigned bytes; weights: signed."""
    if form == "vnni":
        return lambda total: call(b, _DOT[LANES], VECTOR_INT, total, group, weights)
    if form == "pairs":
        halves = ir.VectorType(ir.IntType(16), 2 * LANES)
        eight = ir.Constant(halves, [8] * (2 * LANES))
        low, high = int_const(0x00FF00FF), int_const(8)
        a = [b.and_(group, low), b.and_(b.lshr(group, high), low)]
        w = b.bitcast(weights, halves)
        signed = [b.ashr(b.shl(w, eight), eight), b.ashr(w, eight)]
        pairs = [(b.bitcast(x, halves), y) for x, y in zip(a, signed, strict=True)]

        def add(total: Any) -> Any:
            for x, y in pairs:
                total = b.add(total, call(b, _PAIRS[LANES][1], VECTOR_INT, x, y))
            return total

        return add
    parts = []
    for k in range(4):
        byte = b.and_(b.lshr(group, int_const(8 * k)), int_const(255))
        parts.append((byte, b.ashr(b.shl(weights, int_const(24 - 8 * k)), int_const(24))))

    def add_each(total: Any) -> Any:
        for x, y in parts:
            total = b.add(total, b.mul(x, y))
        return total

    return add_each


def _tile(module: ir.Module, rows: int, columns: int, form: str) -> ir.Function:
    """C[m, :] = start[m, :] + float(sums[m, :]) scale_a[m] scale_b[:], sums over `quads` groups of four.

    Arguments: A, bytes between its rows, quads, B, what the sums start at, B's scales, A's scales, start, bytes between its
    rows, C, bytes between its rows, and how many rows there are, which only the tiles of amx.py do not know before.
    """
    name = f"numlstm_dot_{form}_{rows}x{columns}_l{LANES}_v{VERSION}"
    if name in module.globals:
        return module.globals[name]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * TILE_ARGUMENTS), name)
    f.linkage = "linkonce_odr"
    f.attributes.add("noinline")
    a, a_row, quads, weights, first, scale_b, scale_a, start, start_step, out, out_step, _ = f.args
    b = ir.IRBuilder(f.append_basic_block())
    at = lambda base, n, kind: pointer(b, b.add(base, I64(n * VECTOR_BYTES)), kind)
    keys = [(m, n) for m in range(rows) for n in range(columns)]
    begun = [b.load(at(first, n, VECTOR_INT), align=4) for n in range(columns)]
    row_base = [b.add(a, b.mul(a_row, I64(m))) for m in range(rows)]
    before, loop, end = b.block, f.append_basic_block(), f.append_basic_block()
    b.cbranch(b.icmp_signed(">", quads, I64(0)), loop, end)

    b.position_at_end(loop)
    k, offset, position = b.phi(I64), b.phi(I64), b.phi(I64)
    sums = {key: b.phi(VECTOR_INT) for key in keys}
    panel = [b.load(at(position, n, VECTOR_INT), align=4) for n in range(columns)]
    new = {}
    for m in range(rows):
        bytes4 = b.load(pointer(b, b.add(row_base[m], offset), I32), align=1)
        group = broadcast(b, bytes4, VECTOR_INT)
        for n in range(columns):
            new[m, n] = _dot(b, form, group, panel[n])(sums[m, n])
    k_next = b.add(k, I64(1))
    for phi, initial, following in (
        (k, I64(0), k_next),
        (offset, I64(0), b.add(offset, I64(4))),
        (position, weights, b.add(position, I64(columns * VECTOR_BYTES))),
        *((sums[m, n], begun[n], new[m, n]) for m, n in keys),
    ):
        phi.add_incoming(initial, before)
        phi.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", k_next, quads), loop, end)

    b.position_at_end(end)
    totals = {}
    for m, n in keys:
        totals[m, n] = b.phi(VECTOR_INT)
        totals[m, n].add_incoming(begun[n], before)
        totals[m, n].add_incoming(new[m, n], loop)
    of_column = [b.load(at(scale_b, n, VECTOR), align=4) for n in range(columns)]
    for m in range(rows):
        of_row = broadcast(b, b.load(pointer(b, b.add(scale_a, I64(4 * m)), F32), align=4))
        for n in range(columns):
            scaled = b.fmul(b.sitofp(totals[m, n], VECTOR), of_row)
            base = b.load(at(b.add(start, b.mul(start_step, I64(m))), n, VECTOR), align=4)
            value = fma(b, scaled, of_column[n], base)
            b.store(value, at(b.add(out, b.mul(out_step, I64(m))), n, VECTOR), align=4)
    b.ret_void()
    return f


@cache
def tiles(form: str = FORM) -> np.ndarray:
    """Addresses of the tiles, int64: entry [n - 1, m - 1] has m rows and n columns."""
    most = _most(form)

    @operation("0(i)")
    def write(b, table):
        for n in range(TILE_COLUMNS):
            for m in range(most):
                if _amx(form) is None:
                    tile = _tile(b.module, m + 1, n + 1, form)
                else:
                    tile = amx.int8_tile(b.module, form, n + 1)
                place = pointer(b, b.add(table, I64(8 * (n * most + m))), I64)
                b.store(b.ptrtoint(tile, I64), place, align=8)

    def fill(table):
        write(table)

    table = np.zeros((TILE_COLUMNS, most), np.int64)
    kernel = compile_kernel(fill, "tiles_dot", form, types.void(types.int64))
    kernel(table.ctypes.data)
    _KEEP_LOADED.append(kernel)
    return table


_KEEP_LOADED: list[Any] = []  # the addresses in a table are good while their library is loaded


@operation("0(" + "i" * (1 + TILE_ARGUMENTS) + ")")
def dot_tile(b, address, *args):
    """Call the tile at `address`."""
    function_type = ir.FunctionType(ir.VoidType(), [I64] * TILE_ARGUMENTS)
    b.call(b.inttoptr(address, function_type.as_pointer()), args)


# Rows to eight bits


@operation("v(vv)")
def larger(b, largest, x):
    """The larger of `largest` and |x|, compared as whole numbers: in that order infinity is large, and NaN larger."""
    x = b.and_(b.bitcast(x, VECTOR_INT), int_const(0x7FFFFFFF))
    largest = b.bitcast(largest, VECTOR_INT)
    return b.bitcast(b.select(b.icmp_signed(">", x, largest), x, largest), VECTOR)


@operation("f(if)")
def store_scale(b, address, largest):
    """Store a row's scale, from its largest magnitude; what its values are multiplied by."""
    levels, zero = ir.Constant(F32, float(LEVELS)), ir.Constant(F32, 0.0)
    step = ir.Constant(
        F32, float(STEP)
    )  # a factor: a division by a constant may become one, rounded otherwise
    scale = b.fadd(b.fmul(largest, step), b.fsub(largest, largest))  # NaN where it is not finite
    b.store(scale, pointer(b, address, F32), align=4)
    holds = b.fcmp_ordered(">", largest, ir.Constant(F32, float(SMALLEST)))
    return b.select(holds, b.fdiv(levels, largest), zero)


@operation("0(ivf)")
def store_bytes(b, address, x, inverse):
    """Store x inverse, rounded to whole numbers (half to even), plus 128, as bytes.

    Added to 1.5 2^23 a small number's rounded value stands in the sum's last bits. An explicit `fma`: the product and the
    sum apart might be fused or not, by processor.
    """
    shifted = fma(b, x, broadcast(b, inverse), const(1.5 * 2**23 + 128))
    kind = ir.VectorType(I8, LANES)
    b.store(b.trunc(b.bitcast(shifted, VECTOR_INT), kind), pointer(b, address, kind), align=1)


@njit(**INNER_OPTIONS)
def quantize_row(x: int, n: int, out: int, scale: int) -> None:
    """n floats to bytes and a scale; `out` has room for whole vectors."""
    largest = splat(np.float32(0))
    whole = n // LANES * LANES
    for q in range(0, whole, LANES):
        largest = larger(largest, load(x + q * 4))
    if whole < n:
        largest = larger(largest, load_n(x + whole * 4, n - whole))
    inverse = store_scale(scale, horizontal_max(largest))
    for q in range(0, whole, LANES):
        store_bytes(out + q, load(x + q * 4), inverse)
    if whole < n:
        store_bytes(out + whole, load_n(x + whole * 4, n - whole), inverse)


# Weights in the tiles' order


class Packed(NamedTuple):
    """A matrix in the order of the tiles: bytes, and by column, padded, what the sums start at and the scales."""

    values: np.ndarray
    first: np.ndarray
    scale: np.ndarray

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.values.ctypes.data, self.first.ctypes.data, self.scale.ctypes.data


def pack(weights: Quantized, order: np.ndarray, widths: tuple[int, ...], unit: int = 1) -> Packed:
    """Pack the columns `order` (vectors, LANES), -1 for a column of zeros, in groups of `widths` vectors, over and over;
    k padded with zeros to a whole number of `unit` groups of four."""
    K, N = weights.shape
    vectors, quads = len(order), _quads(K, unit)
    padded = np.zeros((4 * quads, N + 1), np.int8)
    padded[:K, :N] = weights.values
    flat = order.reshape(-1)
    out = aligned((-(-vectors * quads * VECTOR_BYTES // 4),)).view(np.int8)
    place = vector = 0
    while vector < vectors:
        for width in widths:
            width = min(width, vectors - vector)
            chosen = padded[:, flat[vector * LANES : (vector + width) * LANES]]
            size = quads * width * VECTOR_BYTES
            target = out[place : place + size].reshape(quads, width * LANES, 4)
            target[...] = chosen.reshape(quads, 4, width * LANES).transpose(0, 2, 1)
            place, vector = place + size, vector + width
    sums = np.append(weights.values.sum(0, dtype=np.int32), np.int32(0))
    first, scale = aligned((vectors * LANES,)).view(np.int32), aligned((vectors * LANES,))
    np.multiply(sums[flat], -128, out=first)
    scale[...] = np.append(weights.scale, np.float32(0))[flat]
    return Packed(out, first, scale)


def _quads(k: int, unit: int) -> int:
    """Groups of four that so many k take."""
    return -(-k // (4 * unit)) * unit


def _widths(total: int) -> tuple[int, ...]:
    """`total` vectors in groups that fit the tile."""
    return tuple(min(TILE_COLUMNS, total - first) for first in range(0, total, TILE_COLUMNS))


def _packed_gates(weights: Quantized, gates: tuple[int, ...], H: int, lay: Layout, unit: int) -> Packed:
    """The columns of these gates for the blocks of a sequence; kept with the weights."""
    key = (gates, H, lay.blocks_vectors, unit)
    found = weights.packed.get(key)
    if found is None:
        blocks = -(-H // lay.width)
        units = np.arange(blocks * lay.width).reshape(blocks, 1, lay.blocks_vectors, LANES)
        first = np.array(gates, np.int64)[:, None, None] * H
        order = np.where(units < H, first + units, -1)
        found = pack(weights, order.reshape(-1, LANES), _widths(len(gates) * lay.blocks_vectors), unit)
        weights.packed[key] = found
    return found


# Sequences


class Q(IntEnum):
    """Places in a stage's second plan; those of all stages lie just before the first of the plans of layout.P."""

    X = 0  # the inputs: address, bytes between steps, between rows, features
    X_T = auto()
    X_B = auto()
    I = auto()
    XQ = auto()
    XQ_ROW = auto()
    X_SCALE = auto()
    X_QUADS = auto()
    HQ = auto()
    HQ_ROW = auto()
    HQ_SHARD = auto()  # bytes between the threads' own, 0 where each has rows of its own
    H_SCALE = auto()
    H_SCALE_SHARD = auto()
    H_QUADS = auto()
    WP = auto()
    W_FIRST = auto()
    W_SCALE = auto()
    RP = auto()
    R_FIRST = auto()
    R_SCALE = auto()
    PRE = auto()
    CHUNK = auto()
    TILES = auto()
    TILE_ROWS = auto()  # the most rows of a tile
    STATE = auto()  # for amx.begin_tiles


PRODUCTS_BYTES = 8 * len(Q)


@njit(**INNER_OPTIONS)
def copy_bias(p: int) -> None:
    if get(p, P.PACKED) != 0:
        return
    H, width = get(p, P.H), get(p, P.WIDTH)
    for u in range(get(p, P.BLOCKS)):
        for g in range(get(p, P.X_GATES)):
            a = get(p, P.BIAS) + (load_int(get(p, P.X_COLUMN) + 8 * g) * H + u * width) * 4
            z = get(p, P.BP) + (u * get(p, P.PRE) + g) * width * 4
            for k in range(0, width, LANES):
                store(z + k * 4, load_n(a + k * 4, H - u * width - k))


@njit(**INNER_OPTIONS)
def input_product(p: int, q: int, t0: int, t1: int, b0: int, b1: int, u0: int, u1: int) -> None:
    """The input's part of the pre-activations of steps t0 to t1; zeros in place of what only the recurrence feeds."""
    B, quads, bp, rows = get(p, P.B), get(q, Q.X_QUADS), get(p, P.BP), get(q, Q.CHUNK) * get(p, P.B)
    xq, xq_row, scales, table = get(q, Q.XQ), get(q, Q.XQ_ROW), get(q, Q.X_SCALE), get(q, Q.TILES)
    row, fed = get(p, P.PRE) * get(p, P.WIDTH) * 4, get(p, P.X_GATES) * get(p, P.WIDTH) * 4
    most = get(q, Q.TILE_ROWS)
    together = t1 - t0  # steps whose rows follow each other
    if b1 - b0 < B:
        together = 1
    for u in range(u0, u1):
        for t in range(t0, t1, together):
            r, last = t * B + b0, (t + together - 1) * B + b1
            while r < last:
                m = tile_rows(last - r, most)
                out = get(q, Q.PRE) + (u * rows + r - t0 * B) * row
                for c in range(0, fed, TILE_COLUMNS * VECTOR_BYTES):
                    n, column = min(TILE_COLUMNS, (fed - c) // VECTOR_BYTES), u * fed + c
                    dot_tile(
                        load_int(table + ((n - 1) * most + m - 1) * 8),
                        xq + r * xq_row, xq_row, quads, get(q, Q.WP) + column * quads,
                        get(q, Q.W_FIRST) + column, get(q, Q.W_SCALE) + column, scales + r * 4,
                        bp + u * row + c, 0, out + c, row, m,
                    )  # fmt: skip
                for j in range(m):
                    for c in range(fed, row, VECTOR_BYTES):
                        store(out + j * row + c, splat(np.float32(0)))
                r += m


@njit(**INNER_OPTIONS)
def step(p: int, q: int, t: int, ahead: int, b0: int, b1: int, u0: int, u1: int, shard: int) -> None:
    """Step t, the `ahead`-th of those whose input products are there: h in eight bits, its product, the equations."""
    B, quads, rows, table = get(p, P.B), get(q, Q.H_QUADS), get(q, Q.CHUNK) * get(p, P.B), get(q, Q.TILES)
    hq, hq_row = get(q, Q.HQ) + shard * get(q, Q.HQ_SHARD), get(q, Q.HQ_ROW)
    scales = get(q, Q.H_SCALE) + shard * get(q, Q.H_SCALE_SHARD)
    row, fed = get(p, P.PRE) * get(p, P.WIDTH) * 4, get(p, P.H_GATES) * get(p, P.WIDTH) * 4
    most = get(q, Q.TILE_ROWS)
    if fed > 0:
        source = get(p, P.FED) + t * get(p, P.FED_T)
        for b in range(b0, b1):
            quantize_row(source + b * get(p, P.FED_B), get(p, P.K), hq + b * hq_row, scales + b * 4)
    for u in range(u0, u1):
        b = b0
        while b < b1:
            m = tile_rows(b1 - b, most)
            s = get(q, Q.PRE) + (u * rows + ahead * B + b) * row
            for c in range(0, fed, TILE_COLUMNS * VECTOR_BYTES):
                n, column, at = min(TILE_COLUMNS, (fed - c) // VECTOR_BYTES), u * fed + c, s + row - fed + c
                dot_tile(
                    load_int(table + ((n - 1) * most + m - 1) * 8),
                    hq + b * hq_row, hq_row, quads, get(q, Q.RP) + column * quads,
                    get(q, Q.R_FIRST) + column, get(q, Q.R_SCALE) + column, scales + b * 4,
                    at, row, at, row, m,
                )  # fmt: skip
            call_forward_tile(get(p, P.FORWARD_TILE), p, s, row, m, t, b, u)
            b += m


@njit(**INNER_OPTIONS)
def quantize_inputs(q: int, T: int, B: int, shard: int, shards: int) -> None:
    """A thread's share of the inputs' rows."""
    first, last = share(T * B, shard, shards)
    for r in range(first, last):
        x = get(q, Q.X) + r // B * get(q, Q.X_T) + r % B * get(q, Q.X_B)
        quantize_row(x, get(q, Q.I), get(q, Q.XQ) + r * get(q, Q.XQ_ROW), get(q, Q.X_SCALE) + r * 4)


def _forward(p, shard, shards):
    """The pass over time: the loops around stages, with barriers where threads share a row's units."""
    T, B, flags, units_split = get(p, P.T), get(p, P.B), get(p, P.FLAGS), get(p, P.UNITS_SPLIT) != 0
    stages, met = get(p, P.STAGES), 1
    first = p - stages * PRODUCTS_BYTES
    r0, r1 = share(B, shard, shards)
    b0, b1 = (0, B) if units_split else (r0, r1)
    for k in range(stages):
        stage = p + k * PLAN_BYTES
        if shard == 0 and get(stage, P.X_GATES) != 0 and get(stage, P.BIAS) != 0:
            copy_bias(stage)
    quantize_inputs(first, T, B, shard, shards)
    barrier(flags, shard, shards, met)
    begin_tiles(get(first, Q.STATE))
    chunk = get(first, Q.CHUNK)
    for t0 in range(0, T, chunk):
        t1 = min(t0 + chunk, T)
        for k in range(stages):
            stage = p + k * PLAN_BYTES
            blocks = get(stage, P.BLOCKS)
            u0, u1 = share(blocks, shard, shards) if units_split else (0, blocks)
            input_product(stage, first + k * PRODUCTS_BYTES, t0, t1, b0, b1, u0, u1)
        for t in range(t0, t1):
            for k in range(stages):
                stage = p + k * PLAN_BYTES
                norms, blocks = get(stage, P.NORM_COUNT), get(stage, P.BLOCKS)
                for n in range(norms):
                    staged.normalize_rows(load_int(get(stage, P.NORMS) + 8 * n), t, r0, r1, B)
                if norms != 0 and units_split:
                    met += 1
                    barrier(flags, shard, shards, met)
                u0, u1 = share(blocks, shard, shards) if units_split else (0, blocks)
                step(stage, first + k * PRODUCTS_BYTES, t, t - t0, b0, b1, u0, u1, shard)
                if units_split:
                    met += 1
                    barrier(flags, shard, shards, met)
    end_tiles(get(first, Q.STATE))


@cache
def compiled() -> Any:
    """The kernel, for all cells."""
    return compile_kernel(_forward, "int8_forward", CONSTANTS, SIGNATURE)


def _multiply_adds(cell: Cell, T: int, B: int, I: int, H: int) -> float:
    return float(T) * B * (len(cell.gates) * I + len(cell.recurrent) * H) * H


def _split(cell: Cell, T: int, B: int, I: int, H: int, at_once: int = 1) -> tuple[int, bool]:
    """How many threads share the sequence, one of `at_once`, and whether by units (else by batch)."""
    n, blocks = max(1, threads.get_num_threads() // at_once), -(-H // Layout.of(cell.stages[0]).width)
    work = _multiply_adds(cell, T, B, I, H)
    if n == 1 or work < ONE_AWAKE_BELOW or (work < ONE_THREAD_BELOW and not threads.ready()):
        return 1, False
    if ROWS_FOR_BATCH_SPLIT * n <= B and work / (T * B) <= CACHE_BYTES:
        return n, False
    if blocks >= n:
        return n, True
    return min(n, B), False


def explain(cell: Cell, T: int, B: int, I: int, H: int) -> str:
    """Which kernel runs this shape, in words."""
    shards, units = _split(cell, T, B, I, H)
    form = form_for(B)
    how = "one thread" if shards == 1 else f"{shards} threads over the {'units' if units else 'batch'}"
    return f"int8 {cell.name}, {form}, {_most(form)} x {TILE_COLUMNS} vectors of {LANES}, {how}"


def forward(
    cell: Cell,
    x: np.ndarray,
    kernel: Quantized,
    recurrent_kernel: Quantized,
    bias: np.ndarray | None,
    params: tuple[np.ndarray, ...],
    state: tuple[np.ndarray, ...] | None,
    valid: np.ndarray | None,
    *,
    training: bool,
    aux: tuple[np.ndarray, ...] = (),
    recurrent_mask: np.ndarray | None = None,
    projection: Quantized | None = None,
) -> Forward:
    """Run the sequence; see ../sequence.py for arguments, shapes and meaning.

    `training` keeps the other states' sequences; there is no residual and no backward pass.

    Raises:
        ValueError: an array's shape does not fit the others; a recurrent mask, which belongs to training.

    >>> from numlstm.kernels import cells
    >>> x, kernel, recurrent_kernel = np.ones((3, 1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    >>> weights = Quantized.of(kernel), Quantized.of(recurrent_kernel)
    >>> out = forward(cells.elman(), x, *weights, None, (), None, None, training=False)
    >>> [round(float(h), 4) for h in out.h.ravel()]
    [0.7616, 0.7616, 0.7616]
    """
    options = {"aux": aux, "recurrent_mask": recurrent_mask, "projection": projection}
    arguments = (cell, x, kernel, recurrent_kernel, bias, params, state, valid)
    return run([_prepare(*arguments, training=training, **options)])[0]


def forward_all(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Forward]:
    """Several sequences at once, such as the two directions of a layer: `forward(*args, **options)` of each call."""
    shapes = [(args[0], *args[1].shape, args[3].shape[0]) for args, _ in calls]
    together = len(calls) > 1 and sum(_multiply_adds(*shape) for shape in shapes) >= ONE_THREAD_BELOW
    at_once = len(calls) if together else 1
    return run([_prepare(*args, **options, at_once=at_once) for args, options in calls], together)


def _prepare(
    cell: Cell, x: Any, kernel: Quantized, recurrent_kernel: Quantized, bias: Any, params: Any, state: Any, valid: Any,
    *, training: bool, aux: Any = (), recurrent_mask: Any = None, projection: Quantized | None = None, at_once: int = 1,
    alone: bool = False,
) -> Prepared:  # fmt: skip
    """A pass on arrays held to their shapes: memory laid out, weights packed if they are not yet, the plans written;
    `alone`: for one thread."""
    if recurrent_mask is not None:
        raise ValueError("recurrent_mask: it belongs to training, which int8 weights do not serve")
    T, B, I, H, O = check_forward(
        cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, None, projection
    )
    shards, units = (1, False) if alone else _split(cell, T, B, I, H, at_once)
    if x.dtype != np.float32 or (I > 1 and x.strides[2] != 4):
        x = np.ascontiguousarray(x, np.float32)
    bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
    valid = None if valid is None else np.ascontiguousarray(valid, np.bool_)
    arguments = (bias, params, state, valid, aux)
    if len(cell.stages) == 1:
        plan, finish, places = _one_stage(cell, (T, B, I, H), arguments, training, shards, units)
    else:
        known = staged.Shape(T, B, I, H, O, training, False, shards, units, False, "float32", packed=True)
        plan, finish, places, _ = staged.laid_out(cell, known, x, (0, 0, 0), *arguments, None, at_once)
    weights = (kernel, recurrent_kernel, projection)
    both, kept = _with_products(cell, plan, x, weights, (T, B, I, H, O), shards if units else 1)
    kept += [x, bias, valid]

    def finished() -> Forward:
        kept.clear()  # they were in use until here
        return finish()._replace(residual=None)

    return Prepared(compiled(), both, shards, finished, lambda: places)


def prepare_step(
    cell: Cell, x: Any, kernel: Quantized, recurrent_kernel: Quantized, bias: Any, params: Any, valid: Any, *, aux: Any,
    projection: Quantized | None,
) -> Prepared:  # fmt: skip
    """One step of inference from states of zero, on one thread, ready to run, as in sequence.py."""
    arguments = (cell, x, kernel, recurrent_kernel, bias, params, None, valid)
    return _prepare(*arguments, training=False, aux=aux, projection=projection, alone=True)


def _with_products(
    cell: Cell, plan: np.ndarray, x: np.ndarray, weights: tuple[Any, Any, Any], shape: tuple[int, int, int, int, int],
    copies: int,
) -> tuple[np.ndarray, list[Any]]:  # fmt: skip
    """The plans of layout.P with those of Q before them (the first of the former is where the array given begins), and
    what they point into. `copies`: how many threads need all rows of h in eight bits for themselves."""
    (T, B, I, H, O), (kernel, recurrent_kernel, projection) = shape, weights
    chunk, form = max(1, min(T, CHUNK_ROWS // B)), form_for(B)
    unit = _unit(form)
    whole = max(LANES, 4 * unit)
    x_row, h_row = (-(-n // whole) * whole for n in (I, max(H, O)))
    memory: list[int] = [0] * len(Q)
    rest = {
        Q.XQ: -(-(T * B + unit - 1) * x_row // 4),
        Q.X_SCALE: T * B,
        Q.HQ: -(-(copies * B + unit - 1) * h_row // 4),
        Q.H_SCALE: copies * B,
    }
    common = {
        Q.X: x.ctypes.data, Q.X_T: x.strides[0], Q.X_B: x.strides[1], Q.I: I, Q.XQ_ROW: x_row,
        Q.X_QUADS: _quads(I, unit), Q.HQ_ROW: h_row, Q.CHUNK: chunk, Q.TILES: tiles(form).ctypes.data,
        Q.TILE_ROWS: _most(form), Q.STATE: amx.state_of(_amx(form)),
    }  # fmt: skip
    if copies > 1:
        common |= {Q.HQ_SHARD: B * h_row, Q.H_SCALE_SHARD: B * 4}
    sizes = []
    for stage in cell.stages:
        lay = Layout.of(stage)
        sizes.append(-(-(O if stage.projects else H) // lay.width) * chunk * B * lay.pre * lay.width)
    rest[Q.PRE] = sum(sizes)
    slab, _ = carve(memory, {}, rest)
    kept: list[Any] = [slab]
    both = np.empty(len(cell.stages) * len(Q) + len(plan), np.int64)
    pre, (gates, _) = memory[Q.PRE], _columns(cell)
    for k, stage in enumerate(cell.stages):
        lay, made = Layout.of(stage), O if stage.projects else H
        x_column, h_column = gates[k]
        w = _packed_gates(kernel, x_column, made, lay, unit)
        recurrent = projection if stage.projects else recurrent_kernel
        r = _packed_gates(recurrent, h_column, made, lay, unit)
        kept += [w, r]
        row = list(memory)
        for place, value in common.items():
            row[place] = value
        row[Q.PRE], row[Q.H_QUADS] = pre, _quads(recurrent.shape[0], unit)
        row[Q.WP], row[Q.W_FIRST], row[Q.W_SCALE] = w.addresses
        row[Q.RP], row[Q.R_FIRST], row[Q.R_SCALE] = r.addresses
        both[k * len(Q) : (k + 1) * len(Q)] = row
        pre += 4 * sizes[k]
    both = both[len(cell.stages) * len(Q) :]
    both[:] = plan
    return both, kept


@cache
def _columns(cell: Cell) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], np.ndarray]:
    """For each stage the places of its gates among the columns of the input's and of the recurrent weights; and once more,
    for the plan of a cell of one stage, its first ones."""
    found = [columns(cell, stage) for stage in cell.stages]
    return [(tuple(x.tolist()), tuple(h.tolist())) for x, h in found], found[0][0]


def _one_stage(
    cell: Cell, shape: tuple[int, int, int, int], arguments: tuple[Any, Any, Any, Any, Any], training: bool, shards: int,
    units: bool,
) -> tuple[np.ndarray, Any, Any]:  # fmt: skip
    """The plan of a cell of one stage for its emitted tile, what makes a `Forward` of it once it has run, and where each
    state lies before and after."""
    (T, B, I, H), (bias, params, state, valid, aux) = shape, arguments
    lay, S = Layout.of(cell.stages[0]), len(cell.state)
    blocks = -(-H // lay.width)
    HP, slots = blocks * lay.width, T + 1 if training else 1
    plan = [0] * len(P)
    zeroed = {
        P.FLAGS: shards * threads.FLAG_BYTES // 4,
        P.BP: blocks * lay.pre * lay.width,
        P.PARAMS: len(params) * HP,
    }
    rest = {P.STATES: (S - 1) * slots * B * HP}
    slab, at = carve(plan, zeroed, rest)
    hs = aligned((T + 1, B, HP))
    cs = slab[at[P.STATES] : at[P.STATES] + rest[P.STATES]].reshape(S - 1, slots, B, HP)
    for k in range(S):
        first = hs[0] if k == 0 else cs[k - 1, 0]
        first[:, H:] = 0
        first[:, :H] = 0 if state is None else state[k]
    for k, param in enumerate(params):
        start = at[P.PARAMS] + k * HP
        slab[start : start + H] = param
    kept: list[Any] = []
    if aux:
        kept = [by_step(a, (T, B, H)) for a in aux]
        table = np.array([(a.ctypes.data, *a.strides[:2]) for a in kept], np.int64)
        kept.append(table)
        plan[P.AUX] = table.ctypes.data
    plan[: P.UNITS_SPLIT + 1] = T, B, I, H, H, HP, blocks, units
    plan[P.FED_T], plan[P.FED_B] = B * HP * 4, HP * 4
    plan[P.STATE_SLOT], plan[P.STATE_STEP] = slots * B * HP * 4, B * HP * 4 * training
    plan[P.BIAS] = 0 if bias is None else bias.ctypes.data
    plan[P.VALID] = 0 if valid is None else valid.ctypes.data
    plan[P.STATE_H] = plan[P.FED] = hs.ctypes.data
    plan[P.X_COLUMN] = _columns(cell)[1].ctypes.data
    plan[P.WIDTH], plan[P.PRE], plan[P.X_GATES], plan[P.H_GATES] = (
        lay.width,
        lay.pre,
        lay.x_gates,
        lay.h_gates,
    )
    plan[P.STAGES], plan[P.FORWARD_TILE] = 1, fused.forward_tile(cell)

    def finish() -> Forward:
        kept.clear()  # they were in use until here
        final = (hs[T, :, :H].copy(), *(cs[k, -1, :, :H].copy() for k in range(S - 1)))
        states = tuple(cs[k, 1:, :, :H] for k in range(S - 1)) if training else None
        return Forward(hs[1:, :, :H], final, states, None)

    places = ((hs[0], hs[T]), *((c[0], c[-1]) for c in cs))
    return np.array(plan, np.int64), finish, places


# Dense layers


class M(IntEnum):
    """Places in a product's plan."""

    ROWS = 0
    N = auto()
    K = auto()
    A = auto()
    A_ROW = auto()  # bytes between rows
    AQ = auto()
    AQ_ROW = auto()
    A_SCALE = auto()
    B = auto()
    B_FIRST = auto()
    B_SCALE = auto()
    BIAS = auto()  # padded to whole vectors; zeros where there is none
    C = auto()
    C_ROW = auto()
    SCRATCH = auto()
    TILES = auto()
    FLAGS = auto()
    QUADS = auto()
    TILE_ROWS = auto()  # as in Q
    STATE = auto()


def _product(p, shard, shards):
    rows, N, K, quads, most = get(p, M.ROWS), get(p, M.N), get(p, M.K), get(p, M.QUADS), get(p, M.TILE_ROWS)
    aq, aq_row, scales, table = get(p, M.AQ), get(p, M.AQ_ROW), get(p, M.A_SCALE), get(p, M.TILES)
    scratch = get(p, M.SCRATCH) + shard * (most * TILE_COLUMNS * VECTOR_BYTES)
    first, last = share(rows, shard, shards)
    for r in range(first, last):
        quantize_row(get(p, M.A) + r * get(p, M.A_ROW), K, aq + r * aq_row, scales + r * 4)
    barrier(get(p, M.FLAGS), shard, shards, 1)
    vectors = (N + LANES - 1) // LANES
    panels, down = (vectors + TILE_COLUMNS - 1) // TILE_COLUMNS, (rows + most - 1) // most
    begin_tiles(get(p, M.STATE))
    first, last = share(panels * down, shard, shards)
    for i in range(first, last):
        v, r = i // down * TILE_COLUMNS, i % down * most
        n, m = min(TILE_COLUMNS, vectors - v), min(most, rows - r)
        column, left = v * VECTOR_BYTES, N - v * LANES
        out, step = get(p, M.C) + r * get(p, M.C_ROW) + column, get(p, M.C_ROW)
        target, target_step = out, step
        if left < n * LANES:  # the last vector is not full: the tile goes through scratch
            target, target_step = scratch, n * VECTOR_BYTES
        dot_tile(
            load_int(table + ((n - 1) * most + m - 1) * 8),
            aq + r * aq_row, aq_row, quads, get(p, M.B) + column * quads, get(p, M.B_FIRST) + column,
            get(p, M.B_SCALE) + column, scales + r * 4, get(p, M.BIAS) + column, 0, target, target_step, m,
        )  # fmt: skip
        if left < n * LANES:
            for j in range(m):
                for q in range(n):
                    value = load(scratch + (j * n + q) * VECTOR_BYTES)
                    store_n(out + j * step + q * VECTOR_BYTES, value, left - q * LANES)
    end_tiles(get(p, M.STATE))


@cache
def _matmul_kernel() -> Any:
    return compile_kernel(_product, "matmul_int8", CONSTANTS, SIGNATURE)


def matmul(a: np.ndarray, b: Quantized, *, bias: np.ndarray | None = None) -> np.ndarray:
    """a (M, K) times b (K, N), plus bias (N,).

    Raises:
        ValueError: the shapes do not fit.

    >>> matmul(np.ones((1, 3)), Quantized.of(np.ones((3, 2))), bias=np.array([0, 1])).tolist()
    [[3.0, 4.0]]
    """
    if a.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: expected (M, K) and (K, N), got {a.shape} and {b.shape}")
    (rows, K), N = a.shape, b.shape[1]
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"matmul: expected a bias of shape {(N,)}, got {bias.shape}")
    c = aligned((rows, N))
    if not c.size:
        return c
    if a.dtype != np.float32 or (K > 1 and a.strides[1] != 4):
        a = np.ascontiguousarray(a, np.float32)
    vectors = -(-N // LANES)
    form = form_for(rows)
    unit = _unit(form)
    packed = b.packed.get(("columns", unit))
    if packed is None:
        order = np.arange(vectors * LANES).reshape(vectors, LANES)
        packed = pack(b, np.where(order < N, order, -1), (TILE_COLUMNS,), unit)
        b.packed["columns", unit] = packed
    start = aligned((vectors * LANES,), zero=True)
    if bias is not None:
        start[:N] = bias
    shards = 1 if rows * N * K < MATMUL_ONE_THREAD_BELOW else threads.get_num_threads()
    whole = max(LANES, 4 * unit)
    row = -(-K // whole) * whole
    arrays = {
        M.A: a,
        M.AQ: aligned((-(-(rows + unit - 1) * row // 4),)),
        M.A_SCALE: aligned((rows,)),
        M.B: packed.values,
        M.B_FIRST: packed.first,
        M.B_SCALE: packed.scale,
        M.BIAS: start,
        M.C: c,
        M.SCRATCH: aligned((shards, _most(form), TILE_COLUMNS * LANES)),
        M.TILES: tiles(form),
        M.FLAGS: aligned((shards, threads.FLAG_BYTES // 4), zero=True),
    }
    sizes = {
        M.ROWS: rows, M.N: N, M.K: K, M.A_ROW: a.strides[0], M.AQ_ROW: row, M.C_ROW: 4 * N,
        M.QUADS: _quads(K, unit), M.TILE_ROWS: _most(form), M.STATE: amx.state_of(_amx(form)),
    }  # fmt: skip
    plan = make_plan(M, sizes, arrays)
    threads.run(_matmul_kernel(), plan.ctypes.data, shards)
    return c
