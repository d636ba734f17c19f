"""What the CPU's recurrent sequences share: the plan's places, a cell's tile layout, and the loops around its tiles.

Shapes. A stage (derive.py; most cells are one) has NP pre-activations a unit; the first GX of them are fed by the input,
the last GH by a recurrent product over K units. Units come in blocks of W = UB vectors, HP is the number of units rounded
up to whole blocks.
    gates   [block][T B][NP W]   pre-activations, then saved values, then gradients, each over the last: the closing
                                 products stream it as if it were packed
    wp, rp  [block][I or K][GX W or GH W]    packed weights;   rt, wt    the same, transposed, in panels of columns
Padded units (H..HP) hold whatever their cell gives for zeros; products never read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..derive import Cell, Stage
from .cache import unique_name
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .microkernel import TRANSPOSE, Windows, fused_family, tile1, tile2, transpose
from .plan import get, share
from .simd import (
    INNER_OPTIONS,
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

__all__ = [
    "Layout",
    "Loops",
    "P",
    "Prepared",
    "Residual",
    "by_step",
    "columns",
    "field",
    "loops",
    "state_gradients",
    "tile_addresses",
    "tile_rows",
]

GRADIENT_ROWS = 128  # rows of gates that a block of the weight gradients' products covers: 32 KiB, in L1


class P(IntEnum):
    """A kernel's only argument is an int64 array of addresses, sizes and strides: the places of each in it."""

    T = 0
    B = auto()
    I = auto()
    H = auto()  # units of what this stage makes
    K = auto()  # units of what its recurrent product reads
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
    X_GATES = auto()  # how many of each; to unroll loops over them costs LLVM a second, and gains nothing
    H_GATES = auto()
    X_ROW = auto()  # columns of the whole weights
    H_ROW = auto()
    WP = auto()
    RP = auto()
    BP = auto()
    STATE_H = auto()
    FED = auto()  # what the recurrent product reads: h, or h times the recurrent mask
    FED_T = auto()  # bytes between its steps, between its rows
    FED_B = auto()
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
    MASK_STEPS = auto()  # how many steps from this plan's first one the recurrent mask goes on
    # Only where saved values are computed again (fused.py), with a plan for each piece of the sequence:
    PIECES = auto()
    START = auto()  # the states after h as the piece begins, and bytes between them
    START_SLOT = auto()
    # Only for sequences of several stages (staged.py), each with a plan of its own:
    VECTORS = auto()  # table of the vectors that the stage reads, then of those it writes
    GRADIENTS = auto()  # table of their gradients
    UPSTREAM = (
        auto()
    )  # for each vector written: 0 or the address of a gradient from outside, bytes by step, by row
    NORMS = auto()  # addresses of the tables of what is normalised before the stage
    PARAM_B = auto()  # bytes between params
    D_SOURCE = (
        auto()
    )  # the gradient of what the recurrent product reads: address, bytes by parity, bytes by row
    D_SOURCE_T = auto()
    D_SOURCE_B = auto()
    D_MASK = auto()  # 0, or the mask that multiplied it on its way in
    DX_ADD = auto()  # 1: another stage has begun dx


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
        return cls(
            pre, len(stage.x_gates), len(stage.h_gates), max(1, 4 // max(pre, 1)), max(0, stage.saved - pre)
        )

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


def field(place: P) -> str:
    """The plan's value at `place`, in emitted text."""
    return f"load_int(p + {8 * place})"


@cache
def tile_addresses(stage: Stage) -> np.ndarray:
    """Addresses of the stage's fused tiles, a row for each group of columns; none without a product. Plans point here."""
    families = [fused_family(columns, windows) for _, columns, windows in Layout.of(stage).groups()]
    return np.ascontiguousarray(families, np.int64)


def columns(cell: Cell, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """The places of a stage's gates among the weights' columns: those fed by the input, those by the recurrence."""
    place = lambda names, part: {n: k for k, g in enumerate(names) for n in (g, g + part)}
    of_x, of_h = place(cell.gates, "_x"), place(cell.recurrent, "_h") | {"projection": 0}
    return (
        np.array([of_x[g] for g in stage.x_gates], np.int64),
        np.array([of_h[g] for g in stage.h_gates], np.int64),
    )


@njit(**INNER_OPTIONS)
def tile_rows(left):
    """Rows of the next tile when `left` remain: the last two share evenly, so that none is thin."""
    if left >= 2 * TILE_ROWS or left == TILE_ROWS:
        return TILE_ROWS
    return min(left, TILE_ROWS) if left < TILE_ROWS else (left + 1) // 2


@njit(**INNER_OPTIONS)
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


@njit(**INNER_OPTIONS)
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


@njit(**INNER_OPTIONS)
def pack_transposed(source, row, rows, H, gates, columns, out, by_block, shard, shards):
    """(rows, row) -> panels of up to TILE_COLUMNS vectors of `rows`: [panel][gates H][vectors LANES], padded with 0.

    In blocks of LANES by LANES: float by float it took a fifth of a short sequence's backward pass."""
    vectors = (rows + LANES - 1) // LANES
    panels = (vectors + TILE_COLUMNS - 1) // TILE_COLUMNS
    depth = gates * H
    first, last = share(panels, shard, shards)
    for j in range(first, last):
        v0 = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, vectors - v0) * LANES
        panel, here = out + v0 * LANES * depth * 4, min(width, rows - v0 * LANES)
        if here < width:
            zero_bytes(panel, depth * width * 4)
        whole = here // LANES * LANES if H >= LANES else 0  # columns of the panel that go in blocks
        for g in range(gates):
            a = source + (v0 * LANES * row + load_int(columns + 8 * g) * H) * 4
            z = panel + g * H * width * 4
            for c in range(0, whole, LANES):
                for k in range(0, H, LANES):
                    u = min(k, H - LANES)  # the last block may overlap the one before
                    transpose(by_block, a + (c * row + u) * 4, row * 4, z + (u * width + c) * 4, width * 4)
            for c in range(whole, here):
                for u in range(H):
                    store_scalar(z + (u * width + c) * 4, load_scalar(a + (c * row + u) * 4))


class Loops(NamedTuple):
    """The compiled loops of one layout; each takes the plan and a thread's share of the work."""

    pack: Any  # (p, shard, shards): the weights in the order of the forward tiles
    input_product: Any  # (p, b0, b1, u0, u1): the input's part of all pre-activations
    forward_step: Any  # (p, t, b0, b1, u0, u1, scratch)
    pack_back: Any  # (p, shard, shards): the weights, transposed
    dx_step: Any  # (p, t, gradients of the gates, b0, b1, x0, x1, scratch)
    closing: Any  # (p, shard, shards): the weights' gradients, packed; then a barrier, then
    unpack: Any  # (p, shard, shards)


def loops(lay: Layout, forward_tile: Any, text: str) -> Loops:
    """The loops around a stage's tiles. `text` is all that `forward_tile` was made from."""
    W, NP, GX, GH = lay.width, lay.pre, lay.x_gates, lay.h_gates
    UB = lay.blocks_vectors
    WB, ROW, VB, COLUMNS = W * 4, NP * W * 4, VECTOR_BYTES, TILE_COLUMNS
    GROUPS = len(lay.groups())
    # For each group of columns: its first column, and where its part of a packed row of wp and rp starts.
    FIRST = tuple(first for first, _, _ in lay.groups()) or (0,)
    R_FIRST = tuple(max(0, first - (NP - GH) * UB) for first in FIRST)
    NH = NP - GH  # pre-activations that the recurrence does not feed

    def pack(p, shard, shards):
        I, H, K, blocks = get(p, P.I), get(p, P.H), get(p, P.K), get(p, P.BLOCKS)
        x_row, h_row, bp = get(p, P.X_ROW), get(p, P.H_ROW), get(p, P.BP)
        pack_columns(
            get(p, P.KERNEL), x_row, I, H, blocks, GX, W, get(p, P.X_COLUMN), get(p, P.WP), shard, shards
        )
        pack_columns(
            get(p, P.RECURRENT), h_row, K, H, blocks, GH, W, get(p, P.H_COLUMN), get(p, P.RP), shard, shards
        )
        if get(p, P.BIAS) != 0 and shard == 0:
            for u in range(blocks):
                for g in range(GX):
                    a = get(p, P.BIAS) + (load_int(get(p, P.X_COLUMN) + 8 * g) * H + u * W) * 4
                    for q in range(0, W, LANES):
                        store(bp + u * ROW + g * WB + q * 4, load_n(a + q * 4, H - u * W - q))

    def input_product(p, u0, u1):  # tall tiles read the input's weights once for many steps
        TB, I = get(p, P.T) * get(p, P.B), get(p, P.I)
        x, wp, bp, fused, gates = get(p, P.X), get(p, P.WP), get(p, P.BP), get(p, P.FUSED), get(p, P.GATES)
        for u in range(u0, u1):
            for r in range(0, TB, TILE_ROWS):
                for k in range(GROUPS):
                    tile2(
                        load_int(fused + (k * TILE_ROWS + min(TILE_ROWS, TB - r) - 1) * 8),
                        x + r * I * 4, I * 4, 4, I, wp + u * I * (GX * WB) + FIRST[k] * VB, GX * WB,
                        0, 0, 0, 0, 0, 0,
                        bp + u * ROW + FIRST[k] * VB, 0, gates + (u * TB + r) * ROW + FIRST[k] * VB, ROW,
                    )  # fmt: skip

    def forward_step(p, t, b0, b1, u0, u1, scratch):
        B, I, K, x, apart = get(p, P.B), get(p, P.I), get(p, P.K), get(p, P.X), get(p, P.APART)
        wp, rp, bp, fused, gates = get(p, P.WP), get(p, P.RP), get(p, P.BP), get(p, P.FUSED), get(p, P.GATES)
        fed_row, in_memory, TB, depth = get(p, P.FED_B), get(p, P.TRAINING) + apart, get(p, P.T) * B, I
        fed = get(p, P.FED) + t * get(p, P.FED_T)
        if apart != 0:
            depth = 0
        for u in range(u0, u1):
            b = b0
            while b < b1:
                m = tile_rows(b1 - b)
                r = t * B + b
                s, start, start_step = scratch, bp + u * ROW, 0
                if in_memory != 0:
                    s = gates + (u * TB + r) * ROW
                if apart != 0:
                    start, start_step = s, ROW
                for k in range(GROUPS):
                    tile2(
                        load_int(fused + (k * TILE_ROWS + m - 1) * 8),
                        x + r * I * 4, I * 4, 4, depth, wp + u * I * (GX * WB) + FIRST[k] * VB, GX * WB,
                        fed + b * fed_row, fed_row, 4, K, rp + u * K * (GH * WB) + R_FIRST[k] * VB, GH * WB,
                        start + FIRST[k] * VB, start_step, s + FIRST[k] * VB, ROW,
                    )  # fmt: skip
                forward_tile(p, s, ROW, m, t, b, u)
                b += m

    def pack_back(p, shard, shards):
        I, H, by_block = get(p, P.I), get(p, P.H), load_int(get(p, P.PLAIN) + TRANSPOSE)
        # One call in a loop: LLVM would work through two of them twice.
        source, row, rows, gates = get(p, P.RECURRENT), get(p, P.H_ROW), get(p, P.K), get(p, P.H_GATES)
        of_gate, out = get(p, P.H_COLUMN), get(p, P.RT)
        for _ in range(2 if get(p, P.DX) != 0 else 1):
            pack_transposed(source, row, rows, H, gates, of_gate, out, by_block, shard, shards)
            source, row, rows, gates = get(p, P.KERNEL), get(p, P.X_ROW), I, get(p, P.X_GATES)
            of_gate, out = get(p, P.X_COLUMN), get(p, P.WT)

    def dx_step(p, t, d, b0, b1, x0, x1, s):
        B, I, H, dx, wt, zeros = (
            get(p, P.B),
            get(p, P.I),
            get(p, P.H),
            get(p, P.DX),
            get(p, P.WT),
            get(p, P.ZEROS),
        )
        d_row, add = NP * H * 4, get(p, P.DX_ADD)
        for v in range(x0, x1, COLUMNS):
            n = min(COLUMNS, x1 - v)
            b = b0
            while b < b1:
                m = tile_rows(b1 - b)
                tile1(
                    load_int(get(p, P.PLAIN) + ((n - 1) * TILE_ROWS + m - 1) * 8),
                    d + b * d_row, d_row, 4, GX * H, wt + v * VB * (GX * H), n * VB, zeros, 0, s, n * VB,
                )  # fmt: skip
                for k in range(m):
                    out = dx + ((t * B + b + k) * I + v * LANES) * 4
                    for q in range(n):
                        value, left = load(s + (k * n + q) * VB), I - (v + q) * LANES
                        if add != 0:
                            value = value + load_n(out + q * VB, left)
                        store_n(out + q * VB, value, left)
                b += m

    def closing(p, shard, shards):
        # dW = x^T dgates, dR = h^T dgates, db = sum of dgates: output tiles shared out, blocks of rows outermost, so that
        # these rows stay in cache for every tile
        TB, I, K, blocks = get(p, P.T) * get(p, P.B), get(p, P.I), get(p, P.K), get(p, P.BLOCKS)
        gates, plain = get(p, P.GATES), get(p, P.PLAIN)
        x_tiles, h_tiles = (I + TILE_ROWS - 1) // TILE_ROWS, (K + TILE_ROWS - 1) // TILE_ROWS
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
                        for c in range(GX * UB):
                            a = get(p, P.DBP) + u * ROW + c * VB
                            total = load(a)
                            for q in range(rows):
                                total = total + load(panel + q * ROW + c * VB)
                            store(a, total)
                    if i < x_tiles:
                        m, M, step, G = i * TILE_ROWS, I, I * 4, GX
                        source, out, start = get(p, P.X), get(p, P.DWP), 0
                    else:
                        m, M, step, G = (i - x_tiles) * TILE_ROWS, K, get(p, P.FED_B), GH
                        source, out, start = get(p, P.FED), get(p, P.DRP), NH * WB
                    c0 = out + (u * M + m) * (G * WB)
                    for c in range(0, G * UB, COLUMNS):
                        n = min(COLUMNS, G * UB - c)
                        tile1(
                            load_int(plain + ((n - 1) * TILE_ROWS + min(TILE_ROWS, M - m) - 1) * 8),
                            source + k * step + m * 4, 4, step, rows, panel + start + c * VB, ROW,
                            c0 + c * VB, G * WB, c0 + c * VB, G * WB,
                        )  # fmt: skip

    def unpack(p, shard, shards):
        I, H, K, blocks = get(p, P.I), get(p, P.H), get(p, P.K), get(p, P.BLOCKS)
        x_row, h_row = get(p, P.X_ROW), get(p, P.H_ROW)
        unpack_columns(
            get(p, P.DWP), I, H, blocks, GX, W, get(p, P.X_COLUMN), get(p, P.DKERNEL), x_row, shard, shards
        )
        unpack_columns(
            get(p, P.DRP), K, H, blocks, GH, W, get(p, P.H_COLUMN), get(p, P.DRECURRENT), h_row, shard, shards
        )

    made = []
    for function in (pack, input_product, forward_step, pack_back, dx_step, closing, unpack):
        function.__qualname__ = unique_name(function.__name__, repr(lay) + text)
        made.append(njit(**INNER_OPTIONS)(function))
    return Loops(*made)


class Residual:
    """What a forward pass keeps: the module that ran it, its plan, and the arrays that the plan's addresses point into."""

    def __init__(self, **kept: Any) -> None:
        self.used = False
        self.__dict__.update(kept)


class Prepared(NamedTuple):
    """A pass that is ready to run: a compiled kernel, its plan, on how many threads, and what makes its result of it."""

    kernel: Any
    plan: np.ndarray
    shards: int
    finish: Callable[[], Any]


def by_step(a: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`a` as a float32 view of `shape` whose rows are contiguous; axes of length 1 are repeated by a stride of 0."""
    rows = np.ascontiguousarray(np.broadcast_to(a, (*a.shape[:2], shape[2])), np.float32)
    return np.broadcast_to(rows, shape)


def state_gradients(dstates: tuple[Any, ...] | None, count: int) -> list[np.ndarray]:
    """The table of the plan's DSTATES, then the arrays that it points into."""
    table, kept = np.zeros((count, 3), np.int64), []
    for k, d in enumerate(dstates or ()):
        if d is not None:
            d = np.ascontiguousarray(d, np.float32)
            table[k] = d.ctypes.data, *d.strides[:2]
            kept.append(d)
    return [table, *kept]
