"""Recurrent sequences of cells with one stage, fused: forward and backward, one dispatch each.

A step's pre-activations are one product tile (input and recurrence together, microkernel.py); the cell's emitted equations
run on the tile while it is in L1. The backward pass is the same in reverse: a tile of dh = dgates R^T, then the emitted
gradient on it. The weights' gradients are products over all steps at the end.

Beside what layout.py describes:
    h       [T + 1][B][HP]       outputs, h[0] the initial state; the other states likewise (one slot in inference)
    D       [2][B][NP H]         the gates' gradients of this step and the one after it, row-major, for the product
In bfloat16 each gate's part of D begins at a word, and FED holds, for each step (two in inference), what the recurrent
product reads: h, times the recurrent mask if there is one, rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from ..derive import Cell, Stage
from ..rounding import bfloat16_bits
from ..sequence import Forward, Gradients, Prepacked
from . import threads
from .amx import begin_tiles, end_tiles
from .bfloat16 import pairs_bytes
from .cache import compile_address, compile_kernel
from .isa import LANES, ROW_COLUMNS
from .layout import (
    PLAN_BYTES,
    Layout,
    P,
    Prepared,
    Residual,
    by_step,
    columns,
    field,
    state_gradients,
    tile_words,
    words,
)
from .microkernel import tile1
from .parts import (
    backward_parts,
    call_dx_step,
    call_forward_step,
    call_part,
    forward_parts,
    packed_rows,
    share_panels,
    tile_rows,
)
from .plan import SIGNATURE, get, share
from .simd import (
    CACHE_LINE,
    INNER_OPTIONS,
    VECTOR_BYTES,
    caller,
    load,
    load_int,
    load_n,
    prefetch,
    store,
    zero_bytes,
)
from .threads import barrier
from .tiles import aux_rows, compile_tile, inline, store_rows
from .workspace import address, aligned, lay_out

__all__ = ["forward_tile", "prepare", "prepare_back"]

call_backward_tile: Any = caller(8)  # p, s, s_step, rows, t, b, v, vectors
call_steps: Any = caller(4)  # p, shard, shards, met


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
        f"    masked = mask != 0 and t + 1 < {field(P.MASK_STEPS)}; mask_row = {field(P.MASK_B)}",
        f"    mask += (t + 1) * {field(P.MASK_T)} + b * mask_row + at; fed_row = {field(P.FED_B)}",
        f"    fed = {_fed_step(lay)} + b * fed_row + at // {lay.per_word}",
        *aux_rows(cell, "+ at"),
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
    o += inline(stage.forward_source, stage.forward_args, results, indent)
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
    if lay.precision == "float32":
        o += [
            "        if masked:",
            f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
            f"{indent}store(fed + q, load(ho + q) * load_n(mask + q, H - first - q // 4))",
        ]
    else:  # zeros for padded units, whose values may be NaN: an odd H's last word holds one
        o += [
            f"        for q in range(0, {wb}, {VECTOR_BYTES}):",
            "            n = H - first - q // 4; thinned = load(ho + q)",
            "            if masked: thinned = thinned * load_n(mask + q, n)",
            f"            if n < {LANES}: thinned = keep_n(thinned, n)",
            "            store_bf16(fed + q // 2, thinned)",
        ]
    o += [
        f"        s += s_step; e += {lay.extra * wb}; mask += mask_row",
        "        hi += hp4; ho += hp4; ci += hp4; co += hp4; fed += fed_row",
    ]
    return "\n".join(o) + "\n"


def _fed_step(lay: Layout) -> str:
    """Where what the step after t reads lies."""
    step = "(t + 1)" if lay.precision == "float32" else f"((t + 1) & {field(P.FED_KEPT)})"
    return f"{field(P.FED)} + {step} * {field(P.FED_T)}"


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
        f"    h4 = {lay.row_bytes('H')}; d_row = h4 * {lay.pre}",
        f"    d0 = {field(P.D)} + ((t & 1) * B + b) * d_row",
        f"    mask = {field(P.MASK)}; masked = mask != 0 and t + 1 < {field(P.T)}",
        f"    mask_row = {field(P.MASK_B)}; mask += (t + 1) * {field(P.MASK_T)} + b * mask_row",
        f"    aux = {field(P.AUX)}; later = {field(P.DSTATES)}; close = {field(P.CLOSE_GATES)}",
        *aux_rows(cell, ""),
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
        f"            g = g0 + (block * TB + r + m) * {row} + sub; ds = ds0 + m * hp4 + q",
        f"            d = d0 + m * d_row + q // {lay.per_word}; gate = {wb}",
        f"            if close != 0 and n < {LANES}: gate = n * 4",
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
    o += inline(stage.backward_source, stage.backward_args, results, indent)
    o.append(f"{indent}if n < {LANES}:")  # a padded unit's gradient may be NaN, and 0 * NaN would spread
    o += [f"{indent}    _g_{g} = keep_n(_g_{g}, n)" for g in stage.pre]
    o += [f"{indent}store(g + {k} * gate, _g_{g})" for k, g in enumerate(stage.pre)]
    o += store_rows(lay, [f"_g_{g}" for g in stage.pre], "0", indent)
    o += [f"{indent}store(ds + {k} * dslot, _s_{s})" for k, s in enumerate(cell.state)]
    for k, n in enumerate(cell.params):
        o.append(f"{indent}dp = dp0 + {k} * dslot + m * hp4 + q; store(dp, load(dp) + _p_{n})")
    o.append("            else:")  # the states' gradients pass on; the gates get none
    o += [f"{indent}store(ds + {k} * dslot, _d_{name})" for k, name in enumerate(cell.state)]
    o += [f"{indent}store(g + {k} * gate, K(0.0))" for k in range(lay.pre)]
    o += store_rows(lay, ["K(0.0)"] * lay.pre, "0", indent)
    o.append("        s += s_step")
    return "\n".join(o) + "\n"


def _steps(p, shard, shards, met):
    """All steps of the plan at p, forward; `met` counts the barriers that a thread has passed, one a step more where
    threads share the units."""
    T, B, blocks, flags = get(p, P.T), get(p, P.B), get(p, P.BLOCKS), get(p, P.FLAGS)
    scratch = get(p, P.SCRATCH) + shard * get(p, P.SCRATCH_BYTES)
    b0, b1 = share(B, shard, shards)
    u0, u1 = 0, blocks
    units_split = get(p, P.UNITS_SPLIT)
    if units_split != 0:
        b0, b1 = 0, B
        u0, u1 = share(blocks, shard, shards)
    if get(p, P.START) != 0:  # each thread copies the states that it alone will read
        hp4, width = get(p, P.HP) * 4, get(p, P.WIDTH) * 4
        for k in range(get(p, P.OTHERS)):
            for b in range(b0, b1):
                source = get(p, P.START) + k * get(p, P.START_SLOT) + b * hp4
                target = get(p, P.STATES) + k * get(p, P.STATE_SLOT) + b * hp4
                for q in range(u0 * width, u1 * width, VECTOR_BYTES):
                    store(target + q, load(source + q))
    if get(p, P.APART) != 0:
        call_part(get(p, P.INPUT_PRODUCT), p, u0, u1)
    for t in range(T):
        call_forward_step(get(p, P.FORWARD_STEP), p, t, b0, b1, u0, u1, scratch)
        if units_split != 0:
            met += 1
            barrier(flags, shard, shards, met)


def _forward(p, shard, shards):
    met = 1
    begin_tiles(get(p, P.TILES))
    call_part(get(p, P.PACK), p, shard, shards)
    barrier(get(p, P.FLAGS), shard, shards, met)
    for piece in range(p, p + get(p, P.PIECES) * PLAN_BYTES, PLAN_BYTES):
        call_steps(get(p, P.STEPS), piece, shard, shards, met)
        met += get(piece, P.T) * get(p, P.UNITS_SPLIT)
    end_tiles(get(p, P.TILES))


@njit(**INNER_OPTIONS)
def fetch_saved(p: int, t: int, b: int, rows: int, v: int, vectors: int) -> None:
    """Have what a backward tile will read come nearer while its product is made."""
    r, TB = t * get(p, P.B) + b, get(p, P.T) * get(p, P.B)
    row, extra, width = get(p, P.PRE) * get(p, P.WIDTH) * 4, get(p, P.EXTRA_ROW), get(p, P.WIDTH) // LANES
    for u in range(v // width, (v + vectors - 1) // width + 1):
        values, more = get(p, P.GATES) + (u * TB + r) * row, get(p, P.EXTRA) + (u * TB + r) * extra
        for a in range(values, values + rows * row, CACHE_LINE):
            prefetch(a)
        for a in range(more, more + rows * extra, CACHE_LINE):
            prefetch(a)
    hp4 = get(p, P.HP) * 4
    for k in range(1 - get(p, P.READS_H), 1 + get(p, P.OTHERS)):
        state = get(p, P.STATE_H) + r * hp4
        if k > 0:
            state = get(p, P.STATES) + (k - 1) * get(p, P.STATE_SLOT) + t * get(p, P.STATE_STEP) + b * hp4
        state += v * VECTOR_BYTES
        for m in range(rows):
            for a in range(state + m * hp4, state + m * hp4 + vectors * VECTOR_BYTES, CACHE_LINE):
                prefetch(a)


def _steps_back(p, shard, shards, met):
    """All steps of the plan at p, last to first; at t = -1 only what leaves the first step is left to do. Then the
    weights' gradients. Passes T + 1 barriers where threads share the units, and two."""
    T, B, I, H, HP = get(p, P.T), get(p, P.B), get(p, P.I), get(p, P.H), get(p, P.HP)
    hp4, flags, rt, dx, d, mask = (
        HP * 4,
        get(p, P.FLAGS),
        get(p, P.RT),
        get(p, P.DX),
        get(p, P.D),
        get(p, P.MASK),
    )
    tiles, zeros, ds, tile = get(p, P.PANEL_TILES), get(p, P.ZEROS), get(p, P.DSTATE), get(p, P.BACKWARD_TILE)
    d_row, depth = get(p, P.PRE) * words(p, P.H) * 4, get(p, P.H_GATES) * words(p, P.H)
    s = get(p, P.SCRATCH) + shard * get(p, P.SCRATCH_BYTES)
    b0, b1 = share(B, shard, shards)
    v0, v1 = 0, HP // LANES
    x0, x1 = 0, (I + LANES - 1) // LANES
    units_split = get(p, P.UNITS_SPLIT)
    if units_split != 0:
        b0, b1 = 0, B
        v0, v1 = share_panels(v1, get(p, P.PANEL), shard, shards)
        x0, x1 = share_panels(x1, get(p, P.PANEL), shard, shards)
    most, panel = get(p, P.PANEL_ROWS), get(p, P.PANEL)
    real = (H + LANES - 1) // LANES  # vectors that hold a unit; a block's other vectors are padding
    for t in range(T - 1, -2, -1):
        after = d + ((t + 1) & 1) * B * d_row
        for k in range(v0, v1, panel):
            v = k
            if t & 1 != 0:  # back and forth, as in forward_step
                v = v0 + (v1 - v0 - 1) // panel * panel - (k - v0)
            n = min(panel, v1 - v)
            width = min(panel, real - v)
            b = b0
            while b < b1:
                m = tile_rows(b1 - b, most)
                if t == T - 1 or width < n:
                    zero_bytes(s, m * n * VECTOR_BYTES)
                if t >= 0:
                    fetch_saved(p, t, b, m, v, n)
                if t < T - 1 and width > 0:
                    tile1(
                        load_int(tiles + ((width - 1) * most + m - 1) * 8),
                        after + b * d_row + d_row - depth * 4, d_row, 4, depth,
                        rt + v * VECTOR_BYTES * depth, width * VECTOR_BYTES, zeros, 0, s, n * VECTOR_BYTES,
                    )  # fmt: skip
                if t >= 0:
                    call_backward_tile(tile, p, s, n * VECTOR_BYTES, m, t, b, v, n)
                else:
                    for k in range(m):
                        for q in range(n):
                            a = ds + (b + k) * hp4 + (v + q) * VECTOR_BYTES
                            through = load(s + (k * n + q) * VECTOR_BYTES)
                            if mask != 0:
                                row = mask + (b + k) * get(p, P.MASK_B) + (v + q) * VECTOR_BYTES
                                through = through * load_n(row, H - (v + q) * LANES)
                            store(a, load(a) + through)
                b += m
        if dx != 0 and t < T - 1:
            call_dx_step(get(p, P.DX_STEP), p, t + 1, after, b0, b1, x0, x1, s)
        if units_split != 0:
            met += 1
            barrier(flags, shard, shards, met)
    met += 1
    barrier(flags, shard, shards, met)
    call_part(get(p, P.CLOSING), p, shard, shards)
    barrier(flags, shard, shards, met + 1)


def _backward(p, shard, shards):
    begin_tiles(get(p, P.TILES))
    call_part(get(p, P.PACK_BACK), p, shard, shards)
    barrier(get(p, P.FLAGS), shard, shards, 1)
    call_steps(get(p, P.STEPS_BACK), p, shard, shards, 1)
    end_tiles(get(p, P.TILES))
    call_part(get(p, P.UNPACK), p, shard, shards)


def _backward_again(p, shard, shards):
    """Each piece is run forward before it goes back, but for the last, whose values `_forward` has saved."""
    met, flags = 1, get(p, P.FLAGS)
    begin_tiles(get(p, P.TILES))
    call_part(get(p, P.PACK_BACK), p, shard, shards)
    barrier(flags, shard, shards, met)
    for piece in range(p + (get(p, P.PIECES) - 1) * PLAN_BYTES, p - PLAN_BYTES, -PLAN_BYTES):
        T, units_split = get(piece, P.T), get(p, P.UNITS_SPLIT)
        if get(piece, P.SAVED) == 0:
            call_steps(get(p, P.STEPS), piece, shard, shards, met)
            met += T * units_split + 1
            barrier(flags, shard, shards, met)
        call_steps(get(p, P.STEPS_BACK), piece, shard, shards, met)
        met += (T + 1) * units_split + 2
    end_tiles(get(p, P.TILES))
    call_part(get(p, P.UNPACK), p, shard, shards)


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """One of the passes above, for all cells."""
    return compile_kernel(function, f"fused{function.__name__}", "", SIGNATURE)


@cache
def _address(steps: Callable[..., None]) -> int:
    return compile_address(steps, f"fused{steps.__name__}", "", types.void(*[types.int64] * 4))


class Columns(NamedTuple):
    """A cell's columns in the weights."""

    x_column: np.ndarray
    h_column: np.ndarray
    of_bias: np.ndarray  # for each gate fed by the input, the tile's row that is its bias


@cache
def _columns(cell: Cell) -> Columns:
    (stage,) = cell.stages
    of_x, of_h = columns(cell, stage)
    return Columns(of_x, of_h, np.argsort(of_x))


@cache
def _tile(cell: Cell, emit: Callable[..., str], precision: str) -> int:
    """The address of one of a cell's two tiles."""
    (stage,) = cell.stages
    return compile_tile(emit(cell, stage, Layout.of(stage, precision)), cell.name)


def forward_tile(cell: Cell) -> int:
    """The address of a cell's tile of float32 pre-activations, for whoever makes them otherwise."""
    return _tile(cell, _forward_tile, "float32")


class Arrangement(NamedTuple):
    """A pass's memory and plan as far as they are the same for every call of one shape."""

    words: np.ndarray  # the plan, without addresses of what comes with a call
    places: np.ndarray  # where it holds addresses in the slab, of which `words` has the offsets
    offset: dict[P, int]  # where each piece of the slab begins
    size: dict[P, int]  # how long it is
    zeroed: int  # what of the slab must be 0 at first
    floats: int  # and all of it

    def slab(self) -> np.ndarray:
        """Memory for the pieces."""
        memory = aligned((self.floats,))
        memory[: self.zeroed] = 0
        return memory

    def piece(self, slab: np.ndarray, place: P, *shape: int) -> np.ndarray:
        """One piece of a slab."""
        start = self.offset[place]
        return slab[start : start + self.size[place]].reshape(shape)

    def packed_weights(self, slab: np.ndarray) -> np.ndarray:
        """WP and RP, one behind the other."""
        return slab[self.offset[P.WP] : self.offset[P.RP] + self.size[P.RP]]


class Shared(NamedTuple):
    """One piece of memory that serves several purposes, one after the other."""

    places: np.ndarray  # where a plan holds its address
    floats: int

    @classmethod
    def of(cls, uses: list[tuple[P, int]]) -> Shared:
        """For these places in the plan, of so many floats each."""
        return cls(np.array([place for place, _ in uses], np.intp), max(floats for _, floats in uses))

    def array(self, plan: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """New memory, which the plan is told of, as the array (rows, columns) that it will be in the end."""
        memory = aligned((self.floats,))
        plan[self.places] = address(memory)
        return memory[: rows * columns].reshape(rows, columns)


def _arrange(words: dict[P, int], zeroed: dict[P, int], rest: dict[P, int]) -> tuple[Arrangement, np.ndarray]:
    """Lay out pieces one after the other, each from the start of a cache line; and the places that `words` fills."""
    offset, start, end = lay_out(zeroed, rest)
    words = words | {place: 4 * at for place, at in offset.items()}
    where = np.array(list(words), np.intp)
    places = np.array([list(words).index(place) for place in offset], np.intp)
    return Arrangement(
        np.array(list(words.values()), np.int64), places, offset, zeroed | rest, start, end
    ), where


def _weights(lay: Layout, I: int, H: int) -> dict[P, int]:
    """Floats of the packed biases and weights."""
    blocks = lay.blocks(H)
    return {
        P.BP: blocks * lay.pre * lay.width,
        P.WP: blocks * lay.words(I) * lay.x_gates * lay.width,
        P.RP: blocks * lay.words(H) * lay.h_gates * lay.width,
    }


class PackedWeights(NamedTuple):
    """Packed biases and weights that serve many passes, and what a plan says of them at the places _KEPT."""

    memory: np.ndarray
    words: np.ndarray

    @classmethod
    def room(cls, lay: Layout, I: int, H: int) -> PackedWeights:
        """For a first pass to fill."""
        weights = _weights(lay, I, H)
        offsets, _, end = lay_out({}, weights)
        memory = aligned((end,))
        memory[: weights[P.BP]] = 0
        return cls(
            memory, np.array([0, *(address(memory) + 4 * offsets[place] for place in weights)], np.int64)
        )


@lru_cache(1024)
def _arrangement(
    cell: Cell, T: int, B: int, I: int, H: int, training: bool, steps: int | None, shards: int, units: bool, apart: bool,
    precision: str, kept: bool,
) -> Arrangement:  # fmt: skip
    """The forward pass; its `words` are the whole plan. `kept`: packed weights lie elsewhere."""
    lay, paired = Layout.of(cell.stages[0], precision), precision != "float32"
    W, blocks, S = lay.width, lay.blocks(H), len(cell.state)
    again = training and steps is not None
    length = min(steps, T) if again else T
    HP, slots = blocks * W, length + 1 if training else 1
    own = _columns(cell)
    weights = _weights(lay, I, H)
    zeroed = {
        P.FLAGS: shards * threads.FLAG_BYTES // 4,
        P.BP: 0 if kept else weights[P.BP],
        P.ZEROS: ROW_COLUMNS * LANES,
        P.PARAMS: len(cell.params) * HP,
    }
    rest = {
        P.SCRATCH: shards * lay.scratch(),
        P.WP: 0 if kept else weights[P.WP],
        P.RP: 0 if kept else weights[P.RP],
        P.STATES: (S - 1) * slots * B * HP,
    }
    fed_row = lay.words(HP)
    if paired:  # their rows are read in whole vectors, which may reach past the last row
        rest[P.X] = (T * B + lay.rows_read) * lay.words(I) + LANES
        # Where a row has room beside the blocks', no tile writes there.
        fed = ((T + 1 if training else 2) * B + lay.rows_read) * fed_row
        (rest if 2 * fed_row == HP else zeroed)[P.FED] = fed
    if training or apart:
        rest[P.GATES] = blocks * length * B * lay.pre * W
    if training:
        rest[P.EXTRA] = blocks * length * B * lay.extra * W
    if again:
        pieces = -(-T // length)
        rest[P.STARTS] = (S - 1) * pieces * B * HP
    words = {
        P.T: T, P.B: B, P.I: I, P.H: H, P.K: H, P.HP: HP, P.BLOCKS: blocks, P.UNITS_SPLIT: int(units), P.APART: int(apart),
        P.FED_T: B * fed_row * 4, P.FED_B: fed_row * 4, P.PIECES: 1, **lay.plan(),
        P.FED_KEPT: 1 if paired and not training else -1, P.X_ROWS: T * B,
        P.WIDTH: W, P.PRE: lay.pre, P.X_GATES: lay.x_gates,
        P.H_GATES: lay.h_gates, P.OTHERS: S - 1, P.NARROW: lay.narrow(H),
        P.FORWARD_TILE: _tile(cell, _forward_tile, precision),
        P.SCRATCH_BYTES: 4 * lay.scratch(), P.X_ROW: len(cell.gates) * H, P.H_ROW: len(cell.recurrent) * H,
        P.TRAINING: int(training), P.MASK_STEPS: T, P.STATE_SLOT: slots * B * HP * 4,
        P.STATE_STEP: B * HP * 4 * training, P.START_SLOT: pieces * B * HP * 4 if again else 0,
        **forward_parts(precision), P.STEPS: _address(_steps),
        **tile_words(cell.stages[0], precision, B, H, shards if units else 1, apart),
        P.X_COLUMN: address(own.x_column), P.H_COLUMN: address(own.h_column),
    }  # fmt: skip
    made, where = _arrange(words, zeroed, rest)
    whole = np.zeros(len(P), np.int64)
    whole[where] = made.words
    return made._replace(words=whole, places=where[made.places])


@lru_cache(1024)
def _arrangement_back(
    cell: Cell, T: int, B: int, I: int, H: int, need_dx: bool, length: int | None, shards: int, precision: str
) -> tuple[Arrangement, np.ndarray, np.ndarray, tuple[Shared, Shared]]:
    """The backward pass, where its words go in the plan, a table of no gradients of states, and the memory of the weights'
    gradients. `length`: of the pieces that are computed again."""
    lay, S, paired = Layout.of(cell.stages[0], precision), len(cell.state), precision != "float32"
    blocks = lay.blocks(H)
    HP = blocks * lay.width
    zeroed = {
        P.DSTATE: S * B * HP,
        P.DBP: blocks * lay.pre * lay.width,
        P.DPARAMS: len(cell.params) * B * HP,
    }
    if paired or length is not None:  # else they take the packed weights' place, which have had their turn
        zeroed[P.DWP] = blocks * I * lay.x_gates * lay.width
        zeroed[P.DRP] = blocks * H * lay.h_gates * lay.width
    rest: dict[P, int] = {}
    words = backward_parts(precision) | {
        P.STEPS_BACK: _address(_steps_back), P.BACKWARD_TILE: _tile(cell, _backward_tile, precision),
        P.CLOSE_GATES: int(lay.close_gates(H)), P.EXTRA_ROW: 4 * lay.extra * lay.width,
        P.READS_H: int(cell.state[0] in cell.stages[0].backward_args),
    }  # fmt: skip
    # The weights' gradients are written last of all. Until then their memory serves for what only the steps read, and,
    # where no steps follow it, for what the products over all steps pack.
    padded = lambda n: -(-n // LANES) * LANES
    kernel = [(P.DKERNEL, I * len(cell.gates) * H)]
    recurrent = [(P.DRECURRENT, H * len(cell.recurrent) * H), (P.RT, lay.h_gates * lay.words(H) * padded(H))]
    if need_dx:
        kernel.append((P.WT, lay.x_gates * lay.words(H) * padded(I)))
    # In bfloat16 an odd H's last word holds nothing beside its unit, and must not hold NaN.
    (zeroed if paired else rest)[P.D] = (2 * B + lay.rows_read) * lay.pre * lay.words(H)
    if paired:
        words[P.PAIRS_BYTES] = pairs_bytes(lay, I, H, H)
        rest[P.PAIRS] = shards * words[P.PAIRS_BYTES] // 4
    elif length is None and packed_rows(I, H) <= recurrent[0][1]:
        recurrent.append((P.ROWS, packed_rows(I, H)))
    else:
        rest[P.ROWS] = packed_rows(I, H)
    none = np.zeros((S - 1, 3), np.int64)
    return *_arrange(words, zeroed, rest), none, (Shared.of(kernel), Shared.of(recurrent))


_GROUPED = np.array([P.X_GROUP, P.H_GROUP], np.intp)
_KEPT = np.array([P.PACKED, P.BP, P.WP, P.RP], np.intp)
_WITH_CALL = np.array([P.KERNEL, P.RECURRENT, P.BIAS, P.VALID, P.STATE_H], np.intp)
_IN_PLACE = np.array([P.X, P.X_T, P.X_B, P.FED], np.intp)
_PACKED_WEIGHTS, _WEIGHTS_GRADIENTS = np.array([P.WP, P.RP], np.intp), np.array([P.DWP, P.DRP], np.intp)
_SAVING = np.array([P.TRAINING, P.STATE_STEP], np.intp)
_STEPPED = np.array([P.T, P.B, P.I, P.HP, P.X_T, P.MASK_T, P.FED_T, P.DY_T, P.START_SLOT], np.intp)
_MOVING = np.array([P.X, P.VALID, P.MASK, P.FED, P.STATE_H, P.DX, P.DY], np.intp)
_WITH_CALL_BACK = np.array([P.DX, P.DY, P.DY_T, P.DY_B], np.intp)


def prepare(
    cell: Cell, shape: tuple[int, int, int, int, int], x: np.ndarray, kernel: np.ndarray, recurrent_kernel: np.ndarray,
    bias: np.ndarray | None, params: tuple[Any, ...], state: tuple[Any, ...] | None, valid: np.ndarray | None,
    training: bool, aux: tuple[Any, ...], recurrent_mask: Any, projection: None,
    shards: int, units: bool, apart: bool, at_once: int, steps: int | None, precision: str,
    as_it_lies: tuple[int, int], prepacked: Prepacked | None,
) -> Prepared:  # fmt: skip
    """A forward pass on arrays of the right shapes and dtypes, shared by `shards` threads, by units or by the batch.
    `as_it_lies`: bytes from a step of x to the next, and from a row to the next.

    With `steps`, training keeps the states at every so many steps only, and the backward pass runs the pieces again.
    """
    T, B, I, H, _ = shape
    lay, paired = Layout.of(cell.stages[0], precision), precision != "float32"
    kept = prepacked is not None and not training
    own = _arrangement(cell, T, B, I, H, training, steps, shards, units, apart, precision, kept)
    S, again = len(cell.state), training and steps is not None
    slab = own.slab()
    plan = own.words.copy()
    plan[own.places] += address(slab)
    if kept:
        key = (cell, I, H, bias is None, precision, *plan[_GROUPED].tolist())
        packed_weights = prepacked.kept.get(key) or PackedWeights.room(lay, I, H)
        plan[_KEPT] = packed_weights.words
    HP = int(plan[P.HP])
    hs = aligned((T + 1, B, HP))
    cs = own.piece(slab, P.STATES, S - 1, -1, B, HP) if S > 1 else ()
    starts = own.piece(slab, P.STARTS, S - 1, -1, B, HP) if S > 1 and again else cs
    hs[0] = 0
    if S > 1:
        starts[:, 0] = 0
    if state is not None:
        hs[0, :, :H] = state[0]
        for k in range(1, S):
            starts[k - 1, 0, :, :H] = state[k]
    inputs = [x, kernel, recurrent_kernel, bias, valid]
    if params:
        own.piece(slab, P.PARAMS, len(params), HP)[:, :H] = params
    fed = hs
    first = hs[0]
    if recurrent_mask is not None:
        mask = by_step(recurrent_mask, (T, B, H))
        inputs.append(mask)
        plan[P.MASK], plan[P.MASK_T], plan[P.MASK_B] = address(mask), *mask.strides[:2]
        first = np.zeros((B, HP), np.float32)
        first[:, :H] = hs[0, :, :H] * mask[0]
        if not paired:
            fed = aligned((T, B, HP))
            fed[0] = first
            inputs.append(fed)
    tables: dict[P, np.ndarray] = {}
    if aux:
        by_steps = [by_step(a, (T, B, H)) for a in aux]
        table = np.array([(address(a), *a.strides[:2]) for a in by_steps], np.int64)
        inputs += by_steps
        tables[P.AUX], plan[P.AUX] = table, address(table)
    plan[_WITH_CALL] = (
        address(kernel), address(recurrent_kernel), 0 if bias is None else address(bias),
        0 if valid is None else address(valid), address(hs),
    )  # fmt: skip
    rounded: tuple[Any, ...] = ()
    if paired:  # X and FED are memory of ours
        row = 2 * lay.words(HP)
        copy = own.piece(slab, P.FED, -1).view(np.uint16)[: B * row].reshape(B, row)
        copy[:, :HP] = bfloat16_bits(first)
        rounded = ((0, copy),)
        plan[P.X_SOURCE] = address(x)
        plan[P.X_T], plan[P.X_B] = 4 * B * lay.words(I), 4 * lay.words(I)
    else:
        plan[_IN_PLACE] = address(x), *as_it_lies, address(fed)
    packed = plan
    if again:
        length = min(steps, T)
        packed, moved = _pieces(
            plan.tobytes(), length, tuple((p, t.tobytes()) for p, t in tables.items()), False
        )
        inputs.append(moved)
        last = T - (len(packed) - 1) * length
    else:
        last = -1

    def finish() -> Forward:
        final = (hs[T, :, :H].copy(), *[c[last, :, :H].copy() for c in cs])
        if not training:
            if kept:
                packed_weights.words[0] = 1  # filled now
                prepacked.kept[key] = packed_weights
            inputs.clear()  # they were in use until here
            return Forward(hs[1:, :, :H], final, None, None)
        residual = Residual(
            cell=cell, lay=lay, shape=(T, B, H, H), plan=plan, inputs=inputs, tables=tables, slab=slab, hs=hs,
            flags=own.piece(slab, P.FLAGS, -1), packed_weights=own.packed_weights(slab), has_bias=bias is not None,
            has_state=state is not None, shards=shards, at_once=at_once, inner=(I, HP), length=length if again else None,
        )  # fmt: skip
        states = None if again else tuple([c[1:, :, :H] for c in cs])
        return Forward(hs[1:, :, :H], final, states, residual)

    def places() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return ((hs[0], hs[T]), *((start[0], c[last]) for start, c in zip(starts, cs, strict=True)))

    return Prepared(compiled(_forward), packed, shards, finish, places, rounded)


@lru_cache(64)
def _pieces(
    plan: bytes, length: int, tables: tuple[tuple[P, bytes], ...], back: bool
) -> tuple[np.ndarray, list[Any]]:
    """A plan for each piece of `length` steps: what lies at the sequence's first step moves on to the piece's.

    Training asks the same again and again, as memory is used again: hence the cache, and a plan as bytes, its key.

    Arguments:
        tables: by place in the plan, those whose rows are an address, bytes between steps and bytes between rows; the
            pieces' own are given back, to be kept alive.
        back: of a backward pass.
    """
    whole = np.frombuffer(plan, np.int64)
    T, B, I, HP, x_step, mask_t, fed_t, dy_t, slot = whole[_STEPPED].tolist()
    first = np.arange(0, T, length)
    bytes_a_step = np.zeros(len(P), np.int64)
    bytes_a_step[_MOVING] = (
        x_step,
        B,
        mask_t,
        fed_t,
        4 * B * HP,
        4 * B * I,
        dy_t,
    )
    bytes_a_step[whole == 0] = 0  # what a call does not have
    bytes_a_step[P.MASK_STEPS] = -1  # steps left
    plans = whole + first[:, None] * bytes_a_step
    plans[:, P.START] = whole[P.STARTS] + np.arange(len(first)) * (4 * B * HP)
    plans[:, P.T], plans[:, P.PIECES] = length, len(first)
    plans[-1, P.T] = T - first[-1]
    # The last piece's values are saved on the way forward, for it is the first to go back. The others leave nothing but
    # the next one's start.
    if back:
        plans[-1, P.SAVED] = 1
    else:
        plans[:-1, _SAVING] = 0
        plans[:-1, P.STATES], plans[:-1, P.STATE_SLOT] = plans[1:, P.START], slot
    kept = []
    for place, rows in tables:
        table = np.frombuffer(rows, np.int64).reshape(-1, 3)
        moved = np.repeat(table[None], len(first), axis=0)
        moved[:, :, 0] += np.where(table[:, 0] != 0, first[:, None] * table[:, 1], 0)
        plans[:, place] = moved.ctypes.data + np.arange(len(first)) * table.nbytes
        kept.append(moved)
    plans.flags.writeable = False
    return plans, kept


def prepare_back(
    residual: Residual,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    need_dx: bool,
    dstates: tuple[Any, ...] | None,
) -> Prepared:
    """The backward pass of what `prepare` prepared."""
    cell, plan, (T, B, H, _), (I, HP) = residual.cell, residual.plan, residual.shape, residual.inner
    length, lay = residual.length, residual.lay
    own, where, no_states, (of_kernel, of_recurrent) = _arrangement_back(
        cell, T, B, I, H, need_dx, length, residual.shards, lay.precision
    )
    slab = own.slab()
    plan[where] = own.words
    plan[where[own.places]] += address(slab)
    if P.DWP not in own.size:
        residual.packed_weights[:] = 0
        plan[_WEIGHTS_GRADIENTS] = plan[_PACKED_WEIGHTS]
    ds = own.piece(slab, P.DSTATE, len(cell.state), B, HP)
    for k, d in enumerate(dfinal):
        if d is not None:
            ds[k, :, :H] = d
    dkernel = of_kernel.array(plan, I, len(cell.gates) * H)
    drecurrent = of_recurrent.array(plan, H, len(cell.recurrent) * H)
    dx = aligned((T, B, I)) if need_dx else None
    plan[_WITH_CALL_BACK] = (
        address(dx) if need_dx else 0,
        *((0, 0, 0) if dh is None else (address(dh), *dh.strides[:2])),
    )  # fmt: skip
    later, *others = (no_states,) if dstates is None else state_gradients(dstates, len(cell.state) - 1)
    kept = [dh, later, *others]  # what the plan points into
    plan[P.DSTATES] = address(later)
    residual.flags[:] = 0
    packed = plan  # a residual serves once
    if length is not None:
        tables = {**residual.tables, P.DSTATES: later}
        packed, moved = _pieces(
            plan.tobytes(), length, tuple((p, t.tobytes()) for p, t in tables.items()), True
        )
        kept += moved

    def finish() -> Gradients:
        kept.clear()
        dbias, NP = None, len(cell.params)
        if residual.has_bias:
            width, pre = int(plan[P.WIDTH]), int(plan[P.PRE])
            blocks = own.piece(slab, P.DBP, -1, pre, width)
            if plan[P.CLOSE_GATES]:
                left = H % width
                blocks[-1, :, :left] = blocks[-1].ravel()[: pre * left].reshape(pre, left).copy()
            rows = blocks.transpose(1, 0, 2).reshape(pre, HP)
            dbias = rows[_columns(cell).of_bias, :H].reshape(-1)
        dparams = own.piece(slab, P.DPARAMS, NP, B, HP).sum(1)[:, :H] if NP else ()
        # Without initial states nobody keeps their gradients; else these should not keep all memory with them.
        dstate = ds[:, :, :H].copy() if residual.has_state else ds[:, :, :H]
        del (
            residual.slab,
            residual.hs,
            residual.inputs,
            residual.flags,
            residual.packed_weights,
        )  # their memory is free for the next step
        return Gradients(dx, dkernel, drecurrent, dbias, tuple(dparams), tuple(dstate))

    return Prepared(
        compiled(_backward if length is None else _backward_again), packed, residual.shards, finish
    )
