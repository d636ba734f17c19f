"""Fused recurrent sequences on the CPU, for any derived cell: forward and backward, one dispatch each.

A step's pre-activations are one product tile (input and recurrence together, microkernel.py); the cell's emitted equations
run on the tile while it is in L1. The backward pass is the same in reverse: a tile of dh = dgates R^T, then the emitted
gradient on it. The weights' gradients are products over all steps at the end.

Shapes. A cell has NP pre-activations a unit; the first GX of them are fed by the input, the last GH by the recurrence.
Units come in blocks of W = UB vectors, HP is the number of units rounded up to whole blocks.
    gates   [block][T B][NP W]   pre-activations, then saved values, then gradients, each over the last: the closing
                                 products stream it as if it were packed
    h       [T + 1][B][HP]       outputs, h[0] the initial state; the other states likewise (one slot in inference)
    D       [2][B][NP H]         the gates' gradients of this step and the one after it, row-major, for the product
    wp, rp  [block][I or H][GX W or GH W]    packed weights;   rt, wt    the same, transposed, in panels of columns
Padded units (H..HP) hold whatever their cell gives for zeros; products never read them.

Threads either split the batch (nothing shared but weights) or, where the recurrent weights outgrow a core's cache or the
batch is small, the units, with a barrier a step. Every sum has one fixed order, so neither choice changes a bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..derive import Cell, Stage
from ..sequence import Forward, Gradients, check_backward, check_forward
from . import math as vector_math
from . import threads
from .cache import compile_kernel, unique_name
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .microkernel import Windows, fused_family, plain_families, tile1, tile2
from .plan import SIGNATURE, get, share
from .simd import (
    JIT_OPTIONS,
    VECTOR_BYTES,
    K,
    keep_n,
    load,
    load_byte,
    load_int,
    load_n,
    load_scalar,
    store,
    store_n,
    store_scalar,
    zero_bytes,
)
from .threads import barrier
from .workspace import aligned, carve

__all__ = ["backward", "forward"]

# The rule that picks how threads share a sequence; read from the measurements in docs/decisions.md.
ONE_THREAD_BELOW = (
    2e7  # floating-point operations of a forward pass; a second thread costs about 45 us to start
)
CACHE_BYTES = 1 << 20  # packed weights above this are split over the threads
ROWS_FOR_BATCH_SPLIT = 4  # rows a thread
APART_FROM = 16  # inputs from which few rows have their input product computed apart
GRADIENT_ROWS = 128  # rows of gates that a block of the weight gradients' products covers: 32 KiB, in L1


class P(IntEnum):
    """A kernel's only argument is an int64 array of addresses, sizes and strides: the places of each in it."""

    T = 0
    B = auto()
    I = auto()
    H = auto()
    HP = auto()
    BLOCKS = auto()
    UNITS_SPLIT = auto()  # 1: threads share the units; 0: the batch
    APART = auto()  # 1: the input product of all steps comes first; 0: it is part of each step's tile
    FLAGS = auto()  # barrier flags
    SCRATCH = auto()  # SCRATCH_BYTES a shard
    ZEROS = auto()
    X = auto()
    KERNEL = auto()
    RECURRENT = auto()
    BIAS = auto()  # 0: none
    PARAMS = auto()  # [param][HP]
    VALID = auto()  # bytes [T B]; 0: all steps are valid
    X_COLUMN = auto()  # for each gate fed by the input, its place among the weights' columns
    H_COLUMN = auto()
    X_ROW = auto()  # columns of the whole weights
    H_ROW = auto()
    WP = auto()
    RP = auto()
    BP = auto()
    STATE_H = auto()
    FED = auto()  # what the recurrent product reads: h, or h times the recurrent mask
    MASK = auto()  # 0: none
    MASK_T = auto()  # bytes between its steps, between its rows
    MASK_B = auto()
    AUX = auto()  # [aux](address, bytes between steps, bytes between rows)
    STATES = auto()  # the states after h: slot k at STATES + k STATE_SLOT, step t at t STATE_STEP
    STATE_SLOT = auto()
    STATE_STEP = auto()
    TRAINING = auto()
    GATES = auto()
    EXTRA = auto()  # saved values beyond the NP that fit over the gates
    FUSED = auto()  # table of tile addresses
    PLAIN = auto()
    DY = auto()  # 0: no gradient comes from the outputs
    DY_T = auto()  # bytes between its steps
    DY_B = auto()  # bytes between its rows
    DSTATE = auto()  # [state][B][HP], in place
    DSTATES = (
        auto()
    )  # for each state after the first: 0 or the address of its sequence's gradient, bytes between its
    # steps and between its rows
    D = auto()
    RT = auto()
    WT = auto()
    DX = auto()  # 0: not asked for
    DWP = auto()
    DRP = auto()
    DBP = auto()
    DKERNEL = auto()
    DRECURRENT = auto()
    DPARAMS = auto()  # [param][B][HP]


@dataclass(frozen=True)
class Layout:
    """The constants of a cell's kernels; see the head of this file."""

    pre: int
    x_gates: int
    h_gates: int
    blocks_vectors: int  # UB
    extra: int  # saved values beside those over the gates

    @classmethod
    def of(cls, stage: Stage) -> Layout:
        pre = len(stage.pre)
        return cls(pre, len(stage.x_gates), len(stage.h_gates), max(1, 4 // pre), max(0, stage.saved - pre))

    @property
    def width(self) -> int:
        """W, units a block."""
        return self.blocks_vectors * LANES

    def groups(self) -> list[tuple[int, int, Windows]]:
        """The tile's columns in groups that fit the registers: first column, how many, windows of the two products."""
        ub, total = self.blocks_vectors, self.pre * self.blocks_vectors
        x_end, h_start = self.x_gates * ub, (self.pre - self.h_gates) * ub
        out = []
        for first in range(0, total, TILE_COLUMNS):
            last = min(first + TILE_COLUMNS, total)
            clip = lambda c, first=first, last=last: min(max(c, first), last) - first
            out.append((first, last - first, ((0, clip(x_end)), (clip(h_start), last - first))))
        return out


def tile_source(cell: Cell) -> str:
    """The text of a cell's two tile functions: its emitted equations between loads and stores."""
    (stage,) = cell.stages
    lay = Layout.of(stage)
    return _forward_tile(cell, stage, lay) + "\n" + _backward_tile(cell, stage, lay)


def field(place: P) -> str:
    """The plan's value at `place`, in emitted text."""
    return f"load_int(p + {8 * place})"


def _inline(source: str, arguments: tuple[str, ...], results: list[str], indent: str) -> list[str]:
    """The body of an emitted function as statements that assign its results, all names prefixed by `_`, so that a cell's
    names can't meet the loop's. (Calling the function instead costs Numba a second of inlining.)"""

    def prefixed(match: re.Match[str]) -> str:
        name = match[0]
        return "_" + name if name in arguments or re.fullmatch(r"v\d+", name) else name

    body = [re.sub(r"\b[A-Za-z_]\w*", prefixed, line.strip()) for line in source.splitlines()[1:]]
    *statements, result = body
    targets = "".join(f"_{r}, " for r in results)
    values = result.removeprefix("return ").removesuffix(",") + ","
    return [*(indent + line for line in statements), f"{indent}{targets}= {values}"]


def _forward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """forward_tile(p, s, s_step, rows, t, b, u): the cell on `rows` rows from b and block u; s addresses pre-activations."""
    wb = lay.width * 4
    uses = set(stage.forward_args)
    o = [
        "def forward_tile(p, s, s_step, rows, t, b, u):",
        f"    hp4 = {field(P.HP)}; B = {field(P.B)}; TB = {field(P.T)} * B; r = t * B + b",
        f"    valid = {field(P.VALID)}; training = {field(P.TRAINING)}; hp4 = hp4 * 4; at = u * {wb}",
        f"    hi = {field(P.STATE_H)} + r * hp4 + at; ho = hi + B * hp4",
        f"    slot = {field(P.STATE_SLOT)}; step = {field(P.STATE_STEP)}",
        f"    ci = {field(P.STATES)} + t * step + b * hp4 + at; co = ci + step",
        f"    e = {field(P.EXTRA)} + (u * TB + r) * {lay.extra * wb}; w = {field(P.PARAMS)} + at",
        f"    H = {field(P.H)}; first = u * {lay.width}; aux = {field(P.AUX)}; mask = {field(P.MASK)}",
        f"    masked = mask != 0 and t + 1 < {field(P.T)}; mask_row = {field(P.MASK_B)}",
        f"    mask += (t + 1) * {field(P.MASK_T)} + b * mask_row + at; fed = {field(P.FED)} + (r + B) * hp4 + at",
        *_aux_rows(cell, "+ at"),
        "    for m in range(rows):",
        "        if valid == 0 or load_byte(valid + r + m) != 0:",
        f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
    ]
    indent = " " * 16
    o += [f"{indent}_{g} = load(s + {k * wb} + q)" for k, g in enumerate(stage.pre) if g in uses]
    for k, s in enumerate(cell.state):
        if s in uses:
            o.append(f"{indent}_{s} = load({'hi' if k == 0 else f'ci + {k - 1} * slot'} + q)")
    o += [f"{indent}_{n} = load(w + {k} * hp4 + q)" for k, n in enumerate(cell.params)]
    o += [
        f"{indent}_{n} = load_n(x{k} + m * x_row{k} + q, H - first - q // 4)" for k, n in enumerate(cell.aux)
    ]
    results = [s + "1" for s in cell.state] + [f"y{k}" for k in range(cell.saved)]
    o += _inline(stage.forward_source, stage.forward_args, results, indent)
    o += [
        f"{indent}store({'ho' if k == 0 else f'co + {k - 1} * slot'} + q, _{s}1)"
        for k, s in enumerate(cell.state)
    ]
    if cell.saved:
        o.append(f"{indent}if training != 0:")
        for k in range(cell.saved):
            where = f"s + {k * wb}" if k < lay.pre else f"e + {(k - lay.pre) * wb}"
            o.append(f"{indent}    store({where} + q, _y{k})")
    o += [
        "        else:",
        f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
        f"{indent}store(ho + q, load(hi + q))",
    ]
    o += [
        f"{indent}store(co + {k} * slot + q, load(ci + {k} * slot + q))" for k in range(len(cell.state) - 1)
    ]
    o += [
        "        if masked:",
        f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
        f"{indent}store(fed + q, load(ho + q) * load_n(mask + q, H - first - q // 4))",
        f"        s += s_step; e += {lay.extra * wb}; mask += mask_row",
        "        hi += hp4; ho += hp4; ci += hp4; co += hp4; fed += hp4",
    ]
    return "\n".join(o) + "\n"


def _aux_rows(cell: Cell, place: str) -> list[str]:
    """Statements that set x0, x_row0, x1, ...: an aux array's step t and row b, and the bytes to the next row."""
    at = lambda k, n: f"load_int(aux + {24 * k + 8 * n})"
    return [
        f"    x_row{k} = {at(k, 2)}; x{k} = {at(k, 0)} + t * {at(k, 1)} + b * x_row{k} {place}"
        for k in range(len(cell.aux))
    ]


def _backward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """backward_tile(p, s, s_step, rows, t, b, v, vectors): gradients of step t on rows from b, unit vectors from v.

    s addresses what comes from the step after through the recurrence, (rows, vectors LANES).
    """
    wb, row = lay.width * 4, lay.pre * lay.width * 4
    uses = set(stage.backward_args)
    o = [
        "def backward_tile(p, s, s_step, rows, t, b, v, vectors):",
        f"    HP = {field(P.HP)}; B = {field(P.B)}; TB = {field(P.T)} * B; r = t * B + b",
        f"    hp4 = HP * 4; valid = {field(P.VALID)}; H = {field(P.H)}; dslot = B * hp4",
        f"    slot = {field(P.STATE_SLOT)}; step = {field(P.STATE_STEP)}",
        f"    hi0 = {field(P.STATE_H)} + r * hp4; ci0 = {field(P.STATES)} + t * step + b * hp4",
        f"    w0 = {field(P.PARAMS)}; g0 = {field(P.GATES)}; e0 = {field(P.EXTRA)}",
        f"    dy0 = {field(P.DY)}; ds0 = {field(P.DSTATE)} + b * hp4",
        f"    if dy0 != 0: dy0 += t * {field(P.DY_T)} + b * {field(P.DY_B)}",
        f"    dy_step = {field(P.DY_B)}; dp0 = {field(P.DPARAMS)} + b * hp4",
        f"    h4 = H * 4; d_row = h4 * {lay.pre}; d0 = {field(P.D)} + ((t & 1) * B + b) * d_row",
        f"    mask = {field(P.MASK)}; masked = mask != 0 and t + 1 < {field(P.T)}",
        f"    mask_row = {field(P.MASK_B)}; mask += (t + 1) * {field(P.MASK_T)} + b * mask_row",
        f"    aux = {field(P.AUX)}; later = {field(P.DSTATES)}",
        *_aux_rows(cell, ""),
        *(
            f"    dc{k} = load_int(later + {24 * k}); dc_row{k} = load_int(later + {24 * k + 16})\n"
            f"    if dc{k} != 0: dc{k} += t * load_int(later + {24 * k + 8}) + b * dc_row{k}"
            for k in range(len(cell.state) - 1)
        ),
        "    for m in range(rows):",
        "        live = valid == 0 or load_byte(valid + r + m) != 0",
        "        for j in range(vectors):",
        f"            q = (v + j) * {VECTOR_BYTES}; block = (v + j) // {lay.blocks_vectors}",
        f"            sub = (v + j - block * {lay.blocks_vectors}) * {VECTOR_BYTES}; n = H - (v + j) * {LANES}",
        f"            g = g0 + (block * TB + r + m) * {row} + sub; d = d0 + m * d_row + q; ds = ds0 + m * hp4 + q",
        f"            through = load(s + j * {VECTOR_BYTES})",
        "            if masked: through = through * load_n(mask + m * mask_row + q, n)",
        f"            _d_{cell.state[0]} = through + load(ds)",
        f"            if dy0 != 0: _d_{cell.state[0]} = _d_{cell.state[0]} + load_n(dy0 + m * dy_step + q, n)",
    ]
    for k, name in enumerate(cell.state[1:]):
        o.append(f"            _d_{name} = load(ds + {k + 1} * dslot)")
        o.append(f"            if dc{k} != 0: _d_{name} = _d_{name} + load_n(dc{k} + m * dc_row{k} + q, n)")
    o.append("            if live:")
    indent = " " * 16
    for k, s in enumerate(cell.state):
        before = "hi0 + m * hp4 + q" if k == 0 else f"ci0 + m * hp4 + {k - 1} * slot + q"
        if s in uses:
            o.append(f"{indent}_{s} = load({before})")
        if s + "1" in uses:
            o.append(f"{indent}_{s}1 = load({before} + {'B * hp4' if k == 0 else 'step'})")
    o += [f"{indent}_{n} = load(w0 + {k} * hp4 + q)" for k, n in enumerate(cell.params) if n in uses]
    o += [f"{indent}_{n} = load_n(x{k} + m * x_row{k} + q, n)" for k, n in enumerate(cell.aux) if n in uses]
    for k in range(cell.saved):
        if k < lay.pre:
            o.append(f"{indent}_y{k} = load(g + {k * wb})")
        else:
            extra = f"e0 + (block * TB + r + m) * {lay.extra * wb} + sub + {(k - lay.pre) * wb}"
            o.append(f"{indent}_y{k} = load({extra})")
    results = [
        *(f"g_{n}" for n in stage.pre),
        *(f"s_{n}" for n in cell.state),
        *(f"p_{n}" for n in cell.params),
    ]
    o += _inline(stage.backward_source, stage.backward_args, results, indent)
    o.append(f"{indent}if n < {LANES}:")  # a padded unit's gradient may be NaN, and 0 * NaN would spread
    o += [f"{indent}    _g_{g} = keep_n(_g_{g}, n)" for g in stage.pre]
    for k, g in enumerate(stage.pre):
        o.append(f"{indent}store(g + {k * wb}, _g_{g}); store_n(d + {k} * h4, _g_{g}, n)")
    o += [f"{indent}store(ds + {k} * dslot, _s_{s})" for k, s in enumerate(cell.state)]
    for k, n in enumerate(cell.params):
        o.append(f"{indent}dp = dp0 + {k} * dslot + m * hp4 + q; store(dp, load(dp) + _p_{n})")
    o.append("            else:")  # the states' gradients pass on; the gates get none
    o += [f"{indent}store(ds + {k} * dslot, _d_{name})" for k, name in enumerate(cell.state)]
    o += [f"{indent}store(g + {k * wb}, K(0.0)); store_n(d + {k} * h4, K(0.0), n)" for k in range(lay.pre)]
    o.append("        s += s_step")
    return "\n".join(o) + "\n"


@njit(**JIT_OPTIONS)
def tile_rows(left):
    """Rows of the next tile when `left` remain: the last two share evenly, so that none is thin."""
    if left >= 2 * TILE_ROWS or left == TILE_ROWS:
        return TILE_ROWS
    return min(left, TILE_ROWS) if left < TILE_ROWS else (left + 1) // 2


@njit(**JIT_OPTIONS)
def pack_columns(source, row, rows, H, blocks, gates, width, columns, out, shard, shards):
    """(rows, row) -> [block][rows][gates width]: the gates' columns of each block of units side by side, padded with 0."""
    first, last = share(blocks, shard, shards)
    for u in range(first, last):
        for k in range(rows):
            for g in range(gates):
                a = source + (k * row + load_int(columns + 8 * g) * H + u * width) * 4
                z = out + ((u * rows + k) * gates + g) * width * 4
                for q in range(0, width, LANES):
                    store(z + q * 4, load_n(a + q * 4, H - u * width - q))


@njit(**JIT_OPTIONS)
def unpack_columns(packed, rows, H, blocks, gates, width, columns, out, row, shard, shards):
    """The reverse of `pack_columns`."""
    first, last = share(rows, shard, shards)
    for k in range(first, last):
        for u in range(blocks):
            for g in range(gates):
                a = packed + ((u * rows + k) * gates + g) * width * 4
                z = out + (k * row + load_int(columns + 8 * g) * H + u * width) * 4
                for q in range(0, width, LANES):
                    store_n(z + q * 4, load(a + q * 4), H - u * width - q)


@njit(**JIT_OPTIONS)
def pack_transposed(source, row, rows, H, gates, columns, out, shard, shards):
    """(rows, row) -> panels of up to TILE_COLUMNS vectors of `rows`: [panel][gates H][vectors LANES], padded with 0."""
    vectors = (rows + LANES - 1) // LANES
    panels = (vectors + TILE_COLUMNS - 1) // TILE_COLUMNS
    depth = gates * H
    first, last = share(panels, shard, shards)
    for j in range(first, last):
        v0 = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, vectors - v0) * LANES
        panel = out + v0 * LANES * depth * 4
        zero_bytes(panel, depth * width * 4)
        for c in range(min(width, rows - v0 * LANES)):
            for g in range(gates):
                a = source + ((v0 * LANES + c) * row + load_int(columns + 8 * g) * H) * 4
                z = panel + (g * H * width + c) * 4
                for u in range(H):
                    store_scalar(z + u * width * 4, load_scalar(a + u * 4))


def _drivers(lay: Layout, forward_tile: Any, backward_tile: Any) -> tuple[Any, Any]:
    """The loops over time, blocks and rows that a cell's tiles stand in, and the closing products."""
    W, NP, GX, GH = lay.width, lay.pre, lay.x_gates, lay.h_gates
    UB = lay.blocks_vectors
    WB, ROW, VB, COLUMNS = W * 4, NP * W * 4, VECTOR_BYTES, TILE_COLUMNS
    GROUPS = len(lay.groups())
    # For each group of columns: its first column, and where its part of a packed row of wp and rp starts.
    FIRST = tuple(first for first, _, _ in lay.groups())
    R_FIRST = tuple(max(0, first - (NP - GH) * UB) for first in FIRST)
    NH = NP - GH  # pre-activations that the recurrence does not feed

    def forward(p, shard, shards):
        T, B, I, H = get(p, P.T), get(p, P.B), get(p, P.I), get(p, P.H)
        blocks, x, hp4, training = get(p, P.BLOCKS), get(p, P.X), get(p, P.HP) * 4, get(p, P.TRAINING)
        wp, rp, bp, fused, flags = get(p, P.WP), get(p, P.RP), get(p, P.BP), get(p, P.FUSED), get(p, P.FLAGS)
        gates, fed, scratch = get(p, P.GATES), get(p, P.FED), get(p, P.SCRATCH) + shard * (TILE_ROWS * ROW)
        # 1. pack the weights, each thread its blocks
        x_row, h_row = get(p, P.X_ROW), get(p, P.H_ROW)
        pack_columns(get(p, P.KERNEL), x_row, I, H, blocks, GX, W, get(p, P.X_COLUMN), wp, shard, shards)
        pack_columns(get(p, P.RECURRENT), h_row, H, H, blocks, GH, W, get(p, P.H_COLUMN), rp, shard, shards)
        if get(p, P.BIAS) != 0 and shard == 0:
            for u in range(blocks):
                for g in range(GX):
                    a = get(p, P.BIAS) + (load_int(get(p, P.X_COLUMN) + 8 * g) * H + u * W) * 4
                    for q in range(0, W, LANES):
                        store(bp + u * ROW + g * WB + q * 4, load_n(a + q * 4, H - u * W - q))
        barrier(flags, shard, shards, 1)
        # 2. the steps
        b0, b1 = share(B, shard, shards)
        u0, u1 = 0, blocks
        units_split = get(p, P.UNITS_SPLIT)
        if units_split != 0:
            b0, b1 = 0, B
            u0, u1 = share(blocks, shard, shards)
        apart, TB, depth = get(p, P.APART), T * B, I
        if apart != 0:  # tall tiles read the input's weights once for many steps
            depth = 0
            for u in range(u0, u1):
                for r in range(0, TB, TILE_ROWS):
                    for k in range(GROUPS):
                        tile2(
                            load_int(fused + (k * TILE_ROWS + min(TILE_ROWS, TB - r) - 1) * 8),
                            x + r * I * 4, I * 4, 4, I, wp + u * I * (GX * WB) + FIRST[k] * VB, GX * WB,
                            0, 0, 0, 0, 0, 0,
                            bp + u * ROW + FIRST[k] * VB, 0, gates + (u * TB + r) * ROW + FIRST[k] * VB, ROW,
                        )  # fmt: skip
        for t in range(T):
            for u in range(u0, u1):
                b = b0
                while b < b1:
                    m = tile_rows(b1 - b)
                    r = t * B + b
                    s, start, start_step = scratch, bp + u * ROW, 0
                    if training != 0 or apart != 0:
                        s = gates + (u * TB + r) * ROW
                    if apart != 0:
                        start, start_step = s, ROW
                    for k in range(GROUPS):
                        tile2(
                            load_int(fused + (k * TILE_ROWS + m - 1) * 8),
                            x + r * I * 4, I * 4, 4, depth, wp + u * I * (GX * WB) + FIRST[k] * VB, GX * WB,
                            fed + r * hp4, hp4, 4, H, rp + u * H * (GH * WB) + R_FIRST[k] * VB, GH * WB,
                            start + FIRST[k] * VB, start_step, s + FIRST[k] * VB, ROW,
                        )  # fmt: skip
                    forward_tile(p, s, ROW, m, t, b, u)
                    b += m
            if units_split != 0:
                barrier(flags, shard, shards, t + 2)

    def backward(p, shard, shards):
        T, B, I, H, HP = get(p, P.T), get(p, P.B), get(p, P.I), get(p, P.H), get(p, P.HP)
        blocks, hp4, TB, flags = (
            get(p, P.BLOCKS),
            get(p, P.HP) * 4,
            get(p, P.T) * get(p, P.B),
            get(p, P.FLAGS),
        )
        rt, wt, dx, d, plain = get(p, P.RT), get(p, P.WT), get(p, P.DX), get(p, P.D), get(p, P.PLAIN)
        zeros, ds, gates, d_row = get(p, P.ZEROS), get(p, P.DSTATE), get(p, P.GATES), NP * H * 4
        s, mask = get(p, P.SCRATCH) + shard * (TILE_ROWS * max(ROW, COLUMNS * VB)), get(p, P.MASK)
        # 1. pack the transposed weights
        x_row, h_row = get(p, P.X_ROW), get(p, P.H_ROW)
        pack_transposed(get(p, P.RECURRENT), h_row, H, H, GH, get(p, P.H_COLUMN), rt, shard, shards)
        if dx != 0:
            pack_transposed(get(p, P.KERNEL), x_row, I, H, GX, get(p, P.X_COLUMN), wt, shard, shards)
        barrier(flags, shard, shards, 1)
        # 2. the steps, last to first; at t = -1 only what leaves the first step is left to do
        b0, b1 = share(B, shard, shards)
        v0, v1 = 0, HP // LANES
        x0, x1 = 0, (I + LANES - 1) // LANES
        units_split = get(p, P.UNITS_SPLIT)
        if units_split != 0:
            b0, b1 = 0, B
            v0, v1 = share((v1 + COLUMNS - 1) // COLUMNS, shard, shards)
            x0, x1 = share((x1 + COLUMNS - 1) // COLUMNS, shard, shards)
            v0, v1 = v0 * COLUMNS, min(v1 * COLUMNS, HP // LANES)
            x0, x1 = x0 * COLUMNS, min(x1 * COLUMNS, (I + LANES - 1) // LANES)
        real = (H + LANES - 1) // LANES  # vectors that hold a unit; a block's other vectors are padding
        for t in range(T - 1, -2, -1):
            after = d + ((t + 1) & 1) * B * d_row
            for v in range(v0, v1, COLUMNS):
                n = min(COLUMNS, v1 - v)
                width = min(COLUMNS, real - v)
                b = b0
                while b < b1:
                    m = tile_rows(b1 - b)
                    if t == T - 1 or width < n:
                        zero_bytes(s, m * n * VB)
                    if t < T - 1 and width > 0:
                        tile1(
                            load_int(plain + ((width - 1) * TILE_ROWS + m - 1) * 8),
                            after + b * d_row + NH * H * 4, d_row, 4, GH * H,
                            rt + v * VB * (GH * H), width * VB, zeros, 0, s, n * VB,
                        )  # fmt: skip
                    if t >= 0:
                        backward_tile(p, s, n * VB, m, t, b, v, n)
                    else:
                        for k in range(m):
                            for q in range(n):
                                a, through = ds + (b + k) * hp4 + (v + q) * VB, load(s + (k * n + q) * VB)
                                if mask != 0:
                                    row = mask + (b + k) * get(p, P.MASK_B)
                                    through = through * load_n(row + (v + q) * VB, H - (v + q) * LANES)
                                store(a, load(a) + through)
                    b += m
            if dx != 0 and t < T - 1:
                for v in range(x0, x1, COLUMNS):
                    n = min(COLUMNS, x1 - v)
                    b = b0
                    while b < b1:
                        m = tile_rows(b1 - b)
                        tile1(
                            load_int(plain + ((n - 1) * TILE_ROWS + m - 1) * 8),
                            after + b * d_row, d_row, 4, GX * H,
                            wt + v * VB * (GX * H), n * VB, zeros, 0, s, n * VB,
                        )  # fmt: skip
                        for k in range(m):
                            out = dx + (((t + 1) * B + b + k) * I + v * LANES) * 4
                            for q in range(n):
                                store_n(out + q * VB, load(s + (k * n + q) * VB), I - (v + q) * LANES)
                        b += m
            if units_split != 0:
                barrier(flags, shard, shards, 2 + T - 1 - t)
        barrier(flags, shard, shards, T + 4)
        # 3. dW = x^T dgates, dR = h^T dgates, db = sum of dgates: output tiles shared out, blocks of rows outermost, so
        # that these rows stay in cache for every tile
        x_tiles, h_tiles = (I + TILE_ROWS - 1) // TILE_ROWS, (H + TILE_ROWS - 1) // TILE_ROWS
        per_block = x_tiles + h_tiles
        first, last = share(blocks * per_block, shard, shards)
        for k in range(0, TB, GRADIENT_ROWS):
            rows = min(GRADIENT_ROWS, TB - k)
            for u in range(first // per_block, blocks):
                if u * per_block >= last:
                    break
                panel = gates + (u * TB + k) * ROW
                for i in range(max(first - u * per_block, 0), min(last - u * per_block, per_block)):
                    if i == 0:
                        for c in range(NP * UB):
                            a = get(p, P.DBP) + u * ROW + c * VB
                            total = load(a)
                            for q in range(rows):
                                total = total + load(panel + q * ROW + c * VB)
                            store(a, total)
                    if i < x_tiles:
                        m, M, step, G = i * TILE_ROWS, I, I * 4, GX
                        source, out, start = get(p, P.X), get(p, P.DWP), 0
                    else:
                        m, M, step, G = (i - x_tiles) * TILE_ROWS, H, hp4, GH
                        source, out, start = get(p, P.FED), get(p, P.DRP), NH * WB
                    c0 = out + (u * M + m) * (G * WB)
                    for c in range(0, G * UB, COLUMNS):
                        n = min(COLUMNS, G * UB - c)
                        tile1(
                            load_int(plain + ((n - 1) * TILE_ROWS + min(TILE_ROWS, M - m) - 1) * 8),
                            source + k * step + m * 4, 4, step, rows, panel + start + c * VB, ROW,
                            c0 + c * VB, G * WB, c0 + c * VB, G * WB,
                        )  # fmt: skip
        barrier(flags, shard, shards, T + 5)
        unpack_columns(
            get(p, P.DWP), I, H, blocks, GX, W, get(p, P.X_COLUMN), get(p, P.DKERNEL), x_row, shard, shards
        )
        unpack_columns(
            get(p, P.DRP), H, H, blocks, GH, W, get(p, P.H_COLUMN), get(p, P.DRECURRENT), h_row, shard, shards
        )

    return forward, backward


@cache
def _functions(cell: Cell) -> tuple[str, Any, Any]:
    """Tile source and the two driver functions, not yet compiled."""
    lay, source = Layout.of(cell.stages[0]), tile_source(cell)
    scope = dict(
        vector_math.NAMES,
        K=K,
        load=load,
        store=store,
        load_n=load_n,
        store_n=store_n,
        keep_n=keep_n,
        load_int=load_int,
        load_byte=load_byte,
    )
    exec(compile(source, f"<cell {cell.name}>", "exec"), scope)
    for name in ("forward_tile", "backward_tile"):
        scope[name].__qualname__ = unique_name(name, source)
    tiles = [njit(**JIT_OPTIONS)(scope[name]) for name in ("forward_tile", "backward_tile")]
    return source, *_drivers(lay, *tiles)


@cache
def forward_kernel(cell: Cell) -> Any:
    source, function, _ = _functions(cell)
    return compile_kernel(function, f"{cell.name}_forward", source, SIGNATURE)


@cache
def backward_kernel(cell: Cell) -> Any:
    source, _, function = _functions(cell)
    return compile_kernel(function, f"{cell.name}_backward", source, SIGNATURE)


@cache
def _tables(cell: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Addresses of the cell's fused tiles (a row a group of columns), and the weights' columns of its two kinds of gates."""
    (stage,) = cell.stages
    fused = np.stack([fused_family(columns, windows) for _, columns, windows in Layout.of(stage).groups()])
    return np.ascontiguousarray(fused), *columns(cell, stage)


def columns(cell: Cell, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """The places of a stage's gates among the weights' columns: those fed by the input, those by the recurrence."""
    place = lambda names, part: {n: k for k, g in enumerate(names) for n in (g, g + part)}
    of_x, of_h = place(cell.gates, "_x"), place(cell.recurrent, "_h") | {"projection": 0}
    return (
        np.array([of_x[g] for g in stage.x_gates], np.int64),
        np.array([of_h[g] for g in stage.h_gates], np.int64),
    )


def _split(lay: Layout, T: int, B: int, I: int, H: int) -> tuple[int, bool]:
    """How many threads share the sequence, and whether by units (else by batch)."""
    n, blocks = threads.get_num_threads(), -(-H // lay.width)
    weights = (lay.x_gates * I + lay.h_gates * H) * H
    operations = 2.0 * T * B * weights
    if n == 1 or operations < ONE_THREAD_BELOW:
        return 1, False
    if ROWS_FOR_BATCH_SPLIT * n <= B and 4 * weights <= CACHE_BYTES:
        return n, False
    if blocks >= n:
        return n, True
    return min(n, B), False


def _apart(shards: int, units: bool, B: int, I: int) -> bool:
    """Whether the input product of all steps is worth a pass of its own: where a step's tile would be thin.

    A thread must own all rows of its units. The sums are the same either way, bit for bit.
    """
    return (units or shards == 1) and 2 * B <= TILE_ROWS and I >= APART_FROM


def explain(cell: Cell, T: int, B: int, I: int, H: int) -> str:
    """Which kernel runs this shape, in words."""
    shards, units = _split(Layout.of(cell.stages[0]), T, B, I, H)
    how = "one thread" if shards == 1 else f"{shards} threads over the {'units' if units else 'batch'}"
    return f"fused {cell.name}, {TILE_ROWS} x {TILE_COLUMNS} vectors of {LANES}, {how}"


class Residual:
    """What a forward pass keeps for its backward pass: its plan, and the arrays that the plan's addresses point into."""

    def __init__(self, **kept: Any) -> None:
        self.used = False
        self.__dict__.update(kept)


def _float32(a: Any) -> np.ndarray:
    return np.ascontiguousarray(a, np.float32)


def _steps(a: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`a` as a float32 view of (T, B, H) whose rows are contiguous; axes of length 1 are repeated by a stride of 0."""
    rows = np.ascontiguousarray(np.broadcast_to(a, (*a.shape[:2], shape[2])), np.float32)
    return np.broadcast_to(rows, shape)


def forward(
    cell: Cell,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    params: tuple[np.ndarray, ...],
    state: tuple[np.ndarray, ...] | None,
    valid: np.ndarray | None,
    *,
    training: bool,
    aux: tuple[np.ndarray, ...] = (),
    recurrent_mask: np.ndarray | None = None,
    projection: np.ndarray | None = None,
) -> Forward:
    """Run the sequence in float32; see ../sequence.py for arguments, shapes and meaning.

    Raises:
        ValueError: an array's shape does not fit the others.

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, kernel, recurrent_kernel = np.ones((3, 1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    >>> out = forward(cells.elman(), x, kernel, recurrent_kernel, None, (), None, None, training=False)
    >>> [round(float(h), 4) for h in out.h.ravel()]
    [0.7616, 0.7616, 0.7616]
    """
    T, B, I, H, _ = check_forward(
        cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, recurrent_mask, projection
    )
    if min(T, B, I, H) < 1:
        raise ValueError(
            f"sequence: steps, batch, inputs and units must all be at least 1, got {(T, B, I, H)}"
        )
    if len(cell.stages) > 1:
        raise NotImplementedError(f"{cell.name}: cells of several stages are not on the cpu yet")
    lay = Layout.of(cell.stages[0])
    W, blocks, S = lay.width, -(-H // lay.width), len(cell.state)
    HP, slots = blocks * W, T + 1 if training else 1
    fused, x_column, h_column = _tables(cell)
    shards, units = _split(lay, T, B, I, H)
    apart = _apart(shards, units, B, I)
    x, kernel = _float32(x), _float32(kernel)
    recurrent_kernel = _float32(recurrent_kernel)
    inputs = [x, kernel, recurrent_kernel]
    plan = [0] * len(P)
    zeroed = {
        P.FLAGS: shards * threads.FLAG_BYTES // 4,
        P.BP: blocks * lay.pre * W,
        P.ZEROS: TILE_COLUMNS * LANES,
        P.PARAMS: len(params) * HP,
    }
    rest = {
        P.SCRATCH: shards * TILE_ROWS * max(lay.pre * W, TILE_COLUMNS * LANES),
        P.WP: blocks * I * lay.x_gates * W,
        P.RP: blocks * H * lay.h_gates * W,
        P.STATES: (S - 1) * slots * B * HP,
    }
    if training or apart:
        rest[P.GATES] = blocks * T * B * lay.pre * W
    if training:
        rest[P.EXTRA] = blocks * T * B * lay.extra * W
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
    fed = hs
    if recurrent_mask is not None:
        mask = _steps(recurrent_mask, (T, B, H))
        inputs.append(mask)
        plan[P.MASK], plan[P.MASK_T], plan[P.MASK_B] = mask.ctypes.data, *mask.strides[:2]
        fed = aligned((T, B, HP))
        fed[0, :, :H] = hs[0, :, :H] * mask[0]
        inputs.append(fed)
    if aux:
        steps = [_steps(a, (T, B, H)) for a in aux]
        table = np.array([(a.ctypes.data, *a.strides[:2]) for a in steps], np.int64)
        inputs += [*steps, table]
        plan[P.AUX] = table.ctypes.data
    plan[: P.APART + 1] = T, B, I, H, HP, blocks, units, apart
    plan[P.X_ROW], plan[P.H_ROW] = kernel.shape[1], recurrent_kernel.shape[1]
    plan[P.TRAINING], plan[P.STATE_SLOT], plan[P.STATE_STEP] = (
        training,
        slots * B * HP * 4,
        B * HP * 4 * training,
    )
    if bias is not None:
        bias = _float32(bias)
        inputs.append(bias)
        plan[P.BIAS] = bias.ctypes.data
    if valid is not None:
        valid = np.ascontiguousarray(valid, np.bool_)
        inputs.append(valid)
        plan[P.VALID] = valid.ctypes.data
    for place, array in (
        (P.X, x), (P.KERNEL, kernel), (P.RECURRENT, recurrent_kernel), (P.STATE_H, hs), (P.FED, fed), (P.FUSED, fused),
        (P.PLAIN, plain_families()), (P.X_COLUMN, x_column), (P.H_COLUMN, h_column),
    ):  # fmt: skip
        plan[place] = array.ctypes.data
    packed = np.array(plan, np.int64)
    threads.run(forward_kernel(cell), packed.ctypes.data, shards)
    final = (hs[T, :, :H].copy(), *(cs[k, -1, :, :H].copy() for k in range(S - 1)))
    if not training:
        return Forward(hs[1:, :, :H], final, None, None)
    residual = Residual(
        cell=cell, plan=plan, inputs=inputs, slab=slab, hs=hs, flags=at[P.FLAGS], has_bias=bias is not None,
        shape=(T, B, I, H, HP, blocks), shards=shards,
    )  # fmt: skip
    return Forward(hs[1:, :, :H], final, tuple(cs[k, 1:, :, :H] for k in range(S - 1)), residual)


def _gradients_of_states(dstates: tuple[Any, ...] | None, count: int) -> list[np.ndarray]:
    """The table of the plan's DSTATES, then the arrays that it points into."""
    table, kept = np.zeros((count, 3), np.int64), []
    for k, d in enumerate(dstates or ()):
        if d is not None:
            d = np.ascontiguousarray(d, np.float32)
            table[k] = d.ctypes.data, *d.strides[:2]
            kept.append(d)
    return [table, *kept]


def backward(
    residual: Residual,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    *,
    need_dx: bool = True,
    dstates: tuple[Any, ...] | None = None,
) -> Gradients:
    """Gradients of `forward`; see ../sequence.py for arguments, shapes and meaning.

    Raises:
        ValueError: the residual has been used (its saved values have become gradients).
    """
    if residual.used:
        raise ValueError("residual: a forward pass serves one backward pass, and this one has had it")
    cell, plan, (T, B, I, H, HP, blocks) = residual.cell, residual.plan, residual.shape
    check_backward(cell, (T, B, H, H), dh, dfinal, dstates)
    residual.used = True
    lay, S, G, NP = Layout.of(cell.stages[0]), len(cell.state), len(cell.gates), len(cell.params)
    zeroed = {
        P.DSTATE: S * B * HP,
        P.DBP: blocks * lay.pre * lay.width,
        P.DWP: blocks * I * lay.x_gates * lay.width,
        P.DRP: blocks * H * lay.h_gates * lay.width,
        P.DPARAMS: NP * B * HP,
    }
    rest = {P.D: 2 * B * lay.pre * H, P.RT: lay.h_gates * H * -(-H // LANES) * LANES}
    if need_dx:
        rest[P.WT] = lay.x_gates * H * -(-I // LANES) * LANES
    slab, at = carve(plan, zeroed, rest)
    piece = lambda place, *shape: slab[at[place] : at[place] + zeroed[place]].reshape(shape)
    ds = piece(P.DSTATE, S, B, HP)
    for k, d in enumerate(dfinal):
        if d is not None:
            ds[k, :, :H] = d
    dkernel, drecurrent = aligned((I, G * H)), aligned((H, len(cell.recurrent) * H))
    plan[P.DKERNEL], plan[P.DRECURRENT] = dkernel.ctypes.data, drecurrent.ctypes.data
    dx = None
    if need_dx:
        dx = aligned((T, B, I))
        plan[P.DX] = dx.ctypes.data
    if dh is not None:
        if dh.dtype != np.float32 or (H > 1 and dh.strides[2] != 4):
            dh = np.ascontiguousarray(dh, np.float32)
        plan[P.DY], plan[P.DY_T], plan[P.DY_B] = dh.ctypes.data, *dh.strides[:2]
    later = _gradients_of_states(dstates, S - 1)
    plan[P.DSTATES] = later[0].ctypes.data
    flags = residual.flags
    residual.slab[flags : flags + residual.shards * threads.FLAG_BYTES // 4] = 0
    packed = np.array(plan, np.int64)
    threads.run(backward_kernel(cell), packed.ctypes.data, residual.shards)
    dbias = None
    if residual.has_bias:
        rows = piece(P.DBP, blocks, lay.pre, lay.width).transpose(1, 0, 2).reshape(lay.pre, HP)
        dbias = np.empty((G, H), np.float32)
        dbias[_tables(cell)[1]] = rows[: lay.x_gates, :H]
        dbias = dbias.reshape(-1)
    dparams = piece(P.DPARAMS, NP, B, HP).sum(1)[:, :H] if NP else ()
    del residual.slab, residual.hs, residual.inputs  # their memory is free for the next step
    return Gradients(dx, dkernel, drecurrent, dbias, tuple(dparams), tuple(ds[:, :, :H].copy()))
