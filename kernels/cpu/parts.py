"""The loops around a stage's tiles: packing weights, the products of a step, the products over all steps at the end.

A cell's own code is two tiles, its equations and their gradient (fused.py, staged.py), called by address; everything here
takes its numbers from the plan and is compiled once for all cells. What these loops cost beside the tiles they call does
not show; compiled for each cell, with its numbers as constants, they took three quarters of its compilation. They
are kernels of their own, called by address too: inlined into a pass, LLVM would work through each twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit, types

from . import amx
from .bfloat16 import closing_pairs, closing_tiles, pack_back_pairs, pack_pairs
from .cache import compile_address
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .layout import P, place_in_group, words
from .microkernel import TRANSPOSE, tile1, tile2, transpose
from .plan import get, share
from .simd import (
    CACHE_LINE,
    INNER_OPTIONS,
    VECTOR_BYTES,
    caller,
    load,
    load_int,
    load_n,
    load_scalar,
    prefetch,
    store,
    store_n,
    store_scalar,
    zero_bytes,
)
from .tiles import call_forward_tile

__all__ = [
    "backward_parts",
    "call_dx_step",
    "call_forward_step",
    "call_part",
    "forward_parts",
    "packed_rows",
    "share_panels",
    "tile_rows",
]

call_part: Any = caller(3)  # the plan, and the caller's share of the work
call_forward_step: Any = caller(7)
call_dx_step: Any = caller(8)
PACKED_ROWS = 16  # of the weights, at a time
GRADIENT_ROWS = 192  # of time and batch in a block of the weight gradients' products


@njit(**INNER_OPTIONS)
def tile_rows(left: int, most: int) -> int:
    """Rows of the next tile of up to `most` when `left` remain: the last two share evenly, so that none is thin; but in
    amx.py's, whose rows come in UNITs, the last one has what is left."""
    if most != TILE_ROWS:
        return min(left, most)
    if left >= 2 * TILE_ROWS or left == TILE_ROWS:
        return TILE_ROWS
    return min(left, TILE_ROWS) if left < TILE_ROWS else (left + 1) // 2


@njit(**INNER_OPTIONS)
def group_bytes(rows: int) -> int:
    """Bytes of a row of `product_tiles`: addresses, then four numbers."""
    return 8 * (rows + 4)


@njit(**INNER_OPTIONS)
def share_panels(vectors: int, panel: int, shard: int, shards: int) -> tuple[int, int]:
    """A thread's share of so many vectors, in whole panels."""
    first, last = share((vectors + panel - 1) // panel, shard, shards)
    return first * panel, min(last * panel, vectors)


def pack(p: int, shard: int, shards: int) -> None:
    """The weights in the order of the forward tiles, the gates' columns of each block of units side by side, padded with
    0, a tile's columns together: (rows, row) -> [block][group][rows][its columns]. (Side by side over all groups, the
    processor would fetch what lies beside a tile's columns, too.) And the biases, [block][gates width]. In a narrow last
    block the recurrent weights' gates stand closer, as many floats apart as the block has units, and are one group. Nothing
    is done where a pass before this one has done it."""
    if get(p, P.PACKED) != 0:
        return
    H, width, blocks, narrow = get(p, P.H), get(p, P.WIDTH), get(p, P.BLOCKS), get(p, P.NARROW) * LANES
    units = H - (blocks - 1) * width  # of the last block
    u0, u1 = share(blocks, shard, shards)
    source, row, rows, gates = get(p, P.KERNEL), get(p, P.X_ROW), get(p, P.I), get(p, P.X_GATES)
    of_gate, out, step = get(p, P.X_COLUMN), get(p, P.WP), gates * width * 4
    group, before = get(p, P.X_GROUP), 0
    for kind in range(3):  # one body in a loop: LLVM would work through three of them three times
        for first in range(0, rows, PACKED_ROWS):  # all blocks take their part of some rows, then of the next
            last = min(first + PACKED_ROWS, rows)
            for u in range(u0, u1):
                narrowed = kind == 1 and narrow != 0 and u == blocks - 1
                block = out + u * rows * step
                for g in range(gates):
                    a = source + (load_int(of_gate + 8 * g) * H + u * width) * 4
                    for q in range(0, width, LANES):
                        left, room = H - u * width - q, LANES
                        z, between = place_in_group((g * width + q) * 4, before, step, group, rows)
                        if narrowed:  # the zeros after a gate's units are overwritten by the next gate
                            z, between, room = (g * units + q) * 4, narrow * 4, narrow - g * units - q
                        for k in range(first, last):
                            store_n(block + z + k * between, load_n(a + (k * row + q) * 4, left), room)
        if kind == 0:
            source, row, rows, gates = get(p, P.RECURRENT), get(p, P.H_ROW), get(p, P.K), get(p, P.H_GATES)
            of_gate, out, step = get(p, P.H_COLUMN), get(p, P.RP), gates * width * 4
            group, before = get(p, P.H_GROUP), get(p, P.PRE) * width * 4 - step
        else:
            source, gates, out = get(p, P.BIAS), get(p, P.X_GATES), get(p, P.BP)
            of_gate, step, rows = get(p, P.X_COLUMN), get(p, P.PRE) * width * 4, 1 if source != 0 else 0


def input_product(p: int, u0: int, u1: int) -> None:
    """The input's part of all pre-activations: tall tiles read the input's weights once for many steps. Not in amx.py's
    tiles, which would write past the last row."""
    TB, I, x, fused, bp = get(p, P.T) * get(p, P.B), words(p, P.I), get(p, P.X), get(p, P.FUSED), get(p, P.BP)
    row, x_row = get(p, P.PRE) * get(p, P.WIDTH) * 4, get(p, P.X_GATES) * get(p, P.WIDTH) * 4
    group_row, x_step = group_bytes(get(p, P.TILE_ROWS)), get(p, P.X_B)
    for u in range(u0, u1):
        gates, wp = get(p, P.GATES) + u * TB * row, get(p, P.WP) + u * I * x_row
        for r in range(0, TB, TILE_ROWS):
            for group in range(fused, fused + get(p, P.GROUPS) * group_row, group_row):
                first = load_int(group + group_row - 16)
                tile2(
                    load_int(group + (min(TILE_ROWS, TB - r) - 1) * 8),
                    x + r * x_step, x_step, 4, I, wp + first * I, load_int(group + group_row - 32),
                    0, 0, 0, 0, 0, 0,
                    bp + u * row + first, 0, gates + r * row + first, row,
                )  # fmt: skip


def forward_step(p: int, t: int, b0: int, b1: int, u0: int, u1: int, scratch: int) -> None:
    """Step t on rows b0 to b1 and blocks u0 to u1: the products of a tile, then the stage's equations on it.

    A last block of few units has its recurrent product in a narrow tile, spread over the gates' places afterwards.
    Pre-activations that are kept are made where they stay, unless the tile would write past its rows there."""
    B, I, K, apart, fused = get(p, P.B), words(p, P.I), words(p, P.K), get(p, P.APART), get(p, P.STEP_TILES)
    row, x_row = get(p, P.PRE) * get(p, P.WIDTH) * 4, get(p, P.X_GATES) * get(p, P.WIDTH) * 4
    h_row, groups, tile = (
        get(p, P.H_GATES) * get(p, P.WIDTH) * 4,
        get(p, P.STEP_GROUPS),
        get(p, P.FORWARD_TILE),
    )
    fed_row, in_memory, TB, depth = get(p, P.FED_B), get(p, P.TRAINING) + apart, get(p, P.T) * B, I
    x_step = get(p, P.X_B)
    fed, x = get(p, P.FED) + (t & get(p, P.FED_KEPT)) * get(p, P.FED_T), get(p, P.X) + t * get(p, P.X_T)
    if apart != 0:
        depth = 0
    most, unit, group_row = get(p, P.STEP_ROWS), get(p, P.UNIT), group_bytes(get(p, P.STEP_ROWS))
    narrow, width, narrow_tile = get(p, P.NARROW), get(p, P.WIDTH), scratch + most * row
    h_first = (get(p, P.PRE) - get(p, P.H_GATES)) * width * 4
    for k in range(u0, u1):
        u = k if t & 1 == 0 else u0 + u1 - 1 - k  # back and forth: what the last step used last is still near
        units = get(p, P.H) - u * width if narrow != 0 and u == get(p, P.BLOCKS) - 1 else 0
        K_here = 0 if units != 0 else K
        wp, rp = get(p, P.WP) + u * I * x_row, get(p, P.RP) + u * K * h_row
        bias, gates = get(p, P.BP) + u * row, get(p, P.GATES) + (u * TB + t * B) * row
        b = b0
        while b < b1:
            m = tile_rows(b1 - b, most)
            s, start, start_step, moves = scratch, bias, 0, in_memory != 0 and m & (unit - 1) != 0
            if in_memory != 0 and not moves:
                s = gates + b * row
                for a in range(s, s + m * row, CACHE_LINE):
                    prefetch(a)
            if apart != 0:
                start, start_step = s, row
            for group in range(fused, fused + groups * group_row, group_row):
                first = load_int(group + group_row - 16)
                tile2(
                    load_int(group + (m - 1) * 8),
                    x + b * x_step, x_step, 4, depth, wp + first * I, load_int(group + group_row - 32),
                    fed + b * fed_row, fed_row, 4, K_here,
                    rp + load_int(group + group_row - 8) * K, load_int(group + group_row - 24),
                    start + first, start_step, s + first, row,
                )  # fmt: skip
            if units != 0:
                step = narrow * VECTOR_BYTES
                tile1(
                    load_int(get(p, P.PLAIN) + ((narrow - 1) * TILE_ROWS + m - 1) * 8),
                    fed + b * fed_row, fed_row, 4, K, rp, step, get(p, P.ZEROS), 0, narrow_tile, step,
                )  # fmt: skip
                for k in range(m):
                    for g in range(h_row // (width * 4)):
                        a, z = narrow_tile + k * step + g * units * 4, s + k * row + h_first + g * width * 4
                        for q in range(0, units, LANES):
                            store(z + q * 4, load(z + q * 4) + load_n(a + q * 4, units - q))
            if moves:
                s = gates + b * row
                for q in range(0, m * row, VECTOR_BYTES):
                    store(s + q, load(scratch + q))
            call_forward_tile(tile, p, s, row, m, t, b, u)
            b += m


def pack_back(p: int, shard: int, shards: int) -> None:
    """The weights transposed: (rows, row) -> panels of up to PANEL vectors of `rows`: [panel][gates H][vectors
    LANES], padded with 0. In blocks of LANES by LANES: float by float it took a fifth of a short sequence's backward
    pass."""
    H, by_block, most = get(p, P.H), load_int(get(p, P.PLAIN) + TRANSPOSE * TILE_ROWS), get(p, P.PANEL)
    source, row, rows, gates = get(p, P.RECURRENT), get(p, P.H_ROW), get(p, P.K), get(p, P.H_GATES)
    of_gate, out = get(p, P.H_COLUMN), get(p, P.RT)
    for _ in range(2 if get(p, P.DX) != 0 else 1):
        vectors, depth = (rows + LANES - 1) // LANES, gates * H
        first, last = share_panels(vectors, most, shard, shards)
        for v0 in range(first, last, most):
            width = min(most, vectors - v0) * LANES
            panel, here = out + v0 * LANES * depth * 4, min(width, rows - v0 * LANES)
            if here < width:
                zero_bytes(panel, depth * width * 4)
            whole = here // LANES * LANES if H >= LANES else 0  # columns of the panel that go in blocks
            for g in range(gates):
                a = source + (v0 * LANES * row + load_int(of_gate + 8 * g) * H) * 4
                z = panel + g * H * width * 4
                for c in range(0, whole, LANES):
                    for k in range(0, H, LANES):
                        u = min(k, H - LANES)  # the last block may overlap the one before
                        transpose(
                            by_block, a + (c * row + u) * 4, row * 4, z + (u * width + c) * 4, width * 4
                        )
                for c in range(whole, here):
                    for u in range(H):
                        store_scalar(z + (u * width + c) * 4, load_scalar(a + (c * row + u) * 4))
        source, row, rows, gates = get(p, P.KERNEL), get(p, P.X_ROW), get(p, P.I), get(p, P.X_GATES)
        of_gate, out = get(p, P.X_COLUMN), get(p, P.WT)


def dx_step(p: int, t: int, d: int, b0: int, b1: int, x0: int, x1: int, s: int) -> None:
    """Step t's gradient of the input, rows b0 to b1 and vectors x0 to x1, of the gates' gradients at `d`."""
    B, I, depth = get(p, P.B), get(p, P.I), get(p, P.X_GATES) * words(p, P.H)
    d_row, add, most = get(p, P.PRE) * words(p, P.H) * 4, get(p, P.DX_ADD), get(p, P.PANEL_ROWS)
    for v in range(x0, x1, get(p, P.PANEL)):
        n = min(get(p, P.PANEL), x1 - v)
        b = b0
        while b < b1:
            m = tile_rows(b1 - b, most)
            tile1(
                load_int(get(p, P.PANEL_TILES) + ((n - 1) * most + m - 1) * 8),
                d + b * d_row, d_row, 4, depth, get(p, P.WT) + v * VECTOR_BYTES * depth, n * VECTOR_BYTES,
                get(p, P.ZEROS), 0, s, n * VECTOR_BYTES,
            )  # fmt: skip
            for k in range(m):
                out = get(p, P.DX) + ((t * B + b + k) * I + v * LANES) * 4
                for q in range(0, n * VECTOR_BYTES, VECTOR_BYTES):
                    value, left = load(s + k * n * VECTOR_BYTES + q), I - v * LANES - q // 4
                    if add != 0:
                        value = value + load_n(out + q, left)
                    store_n(out + q, value, left)
            b += m


@njit(**INNER_OPTIONS)
def gate_bytes(p: int, u: int) -> int:
    """Bytes from one gate's gradients to the next's in block u."""
    if get(p, P.CLOSE_GATES) != 0 and u == get(p, P.BLOCKS) - 1:
        return (get(p, P.H) - u * get(p, P.WIDTH)) * 4
    return get(p, P.WIDTH) * 4


@njit(**INNER_OPTIONS)
def whole_vectors(n: int) -> int:
    """n bytes, rounded up to whole vectors."""
    return (n + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES


def closing(p: int, shard: int, shards: int) -> None:
    """The weights' gradients, packed: dW = x^T dgates, dR = h^T dgates, db = sum of dgates.

    Threads share the tiles of dW and dR, by rows of the weights. Blocks of time and batch are outermost: their rows of x and
    h are packed, for a column of a wide matrix lies in few sets of the cache, and serve all gates."""
    B, I, K, blocks = get(p, P.B), get(p, P.I), get(p, P.K), get(p, P.BLOCKS)
    TB = get(p, P.T) * B
    gates, plain, width, pre = get(p, P.GATES), get(p, P.PLAIN), get(p, P.WIDTH) * 4, get(p, P.PRE)
    row, x_gates, h_gates = pre * width, get(p, P.X_GATES), get(p, P.H_GATES)
    x_tiles, h_tiles = (I + TILE_ROWS - 1) // TILE_ROWS, (K + TILE_ROWS - 1) // TILE_ROWS
    first, last = share(x_tiles + h_tiles, shard, shards)
    packed = get(p, P.ROWS) + first * GRADIENT_ROWS * TILE_ROWS * 4
    for k in range(0, TB, GRADIENT_ROWS):
        rows = min(GRADIENT_ROWS, TB - k)
        for i in range(first, last):
            M, step, row_step, source, m = I, get(p, P.X_T), get(p, P.X_B), get(p, P.X), i * TILE_ROWS
            if i >= x_tiles:
                M, step, row_step, source = K, get(p, P.FED_T), get(p, P.FED_B), get(p, P.FED)
                m = (i - x_tiles) * TILE_ROWS
            b = k % B
            source += k // B * step + b * row_step + m * 4
            out = packed + (i - first) * GRADIENT_ROWS * TILE_ROWS * 4
            for _ in range(rows):
                for q in range(0, TILE_ROWS, LANES):
                    store_n(out + q * 4, load_n(source + q * 4, M - m - q), TILE_ROWS - q)
                out += TILE_ROWS * 4
                source += row_step
                b += 1
                if b == B:
                    b, source = 0, source + step - B * row_step
        for u in range(blocks):
            panel, gate = gates + (u * TB + k) * row, gate_bytes(p, u)
            if shard == 0:
                for c in range(0, whole_vectors(x_gates * gate), VECTOR_BYTES):
                    a = get(p, P.DBP) + u * row + c
                    total = load(a)
                    for q in range(panel + c, panel + c + rows * row, row):
                        total = total + load(q)
                    store(a, total)
            next_panel = panel + TB * row  # comes nearer while this one is worked through, a share a turn
            if u == blocks - 1:
                next_panel = gates + (k + GRADIENT_ROWS) * row
            a_turn = rows * row // (last - first + 1) // CACHE_LINE * CACHE_LINE + CACHE_LINE
            for i in range(first, last):
                for a in range(next_panel, next_panel + a_turn, CACHE_LINE):
                    prefetch(a)
                next_panel += a_turn
                m, M, many, out, start = i * TILE_ROWS, I, x_gates, get(p, P.DWP), panel
                if i >= x_tiles:
                    m, M, many, out = (i - x_tiles) * TILE_ROWS, K, h_gates, get(p, P.DRP)
                    start = panel + (pre - h_gates) * gate
                out_row = whole_vectors(many * gate)
                out += u * M * many * width + m * out_row
                source = packed + (i - first) * GRADIENT_ROWS * TILE_ROWS * 4
                for c in range(0, out_row, TILE_COLUMNS * VECTOR_BYTES):
                    n = min(TILE_COLUMNS, (out_row - c) // VECTOR_BYTES)
                    tile1(
                        load_int(plain + ((n - 1) * TILE_ROWS + min(TILE_ROWS, M - m) - 1) * 8),
                        source, 4, TILE_ROWS * 4, rows, start + c, row, out + c, out_row, out + c, out_row,
                    )  # fmt: skip


def unpack(p: int, shard: int, shards: int) -> None:
    """The packed gradients of the weights in the weights' own order: the reverse of `pack`."""
    H, blocks, width = get(p, P.H), get(p, P.BLOCKS), get(p, P.WIDTH)
    packed, rows, gates, of_gate = get(p, P.DWP), get(p, P.I), get(p, P.X_GATES), get(p, P.X_COLUMN)
    out, row = get(p, P.DKERNEL), get(p, P.X_ROW)
    for _ in range(2):
        first, last = share(rows, shard, shards)
        for k in range(first, last):
            for u in range(blocks):
                gate = gate_bytes(p, u)
                for g in range(gates):
                    a = packed + u * rows * gates * width * 4 + k * whole_vectors(gates * gate) + g * gate
                    z = out + (k * row + load_int(of_gate + 8 * g) * H + u * width) * 4
                    for q in range(0, width, LANES):
                        store_n(z + q * 4, load(a + q * 4), H - u * width - q)
        packed, rows, gates, of_gate = get(p, P.DRP), get(p, P.K), get(p, P.H_GATES), get(p, P.H_COLUMN)
        out, row = get(p, P.DRECURRENT), get(p, P.H_ROW)


@cache
def _addresses(*functions: Callable[..., None]) -> dict[P, int]:
    """The functions compiled: their places in the plan, and their addresses."""
    arguments = lambda f: f.__code__.co_argcount
    return {
        P[f.__name__.removesuffix("_pairs").removesuffix("_tiles").upper()]: compile_address(
            f, f.__name__, "", types.void(*[types.int64] * arguments(f))
        )
        for f in functions
    }


def forward_parts(precision: str) -> dict[P, int]:
    """What a plan needs for a forward pass."""
    return _addresses(pack if precision == "float32" else pack_pairs, input_product, forward_step)


def packed_rows(I: int, K: int) -> int:
    """Floats that `closing` packs rows into."""
    return GRADIENT_ROWS * TILE_ROWS * (-(-I // TILE_ROWS) - (-K // TILE_ROWS))


def backward_parts(precision: str) -> dict[P, int]:
    """What a plan needs beside those for a backward pass."""
    if precision != "float32":
        closing_of = closing_tiles if amx.tiled(precision) else closing_pairs
        return _addresses(pack_back_pairs, dx_step, closing_of, unpack)
    return _addresses(pack_back, dx_step, closing, unpack)
