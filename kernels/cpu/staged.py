"""Recurrent sequences of cells with several stages: a second product in a step, a projection, normalised values.

Each stage is run like a cell of one stage is (fused.py): a product tile, then the stage's emitted equations on it while it
is in L1. What a stage hands on is a vector in memory; before the next one reads across its units, the threads that share a
row's units meet at a barrier. In the backward pass a vector's gradient is a buffer that every reader adds to; its maker
takes it, and leaves zeros for the step before.

Each stage has a plan of its own (layout.py), one after the other. Beside what is described there:
    states     [T + 1][B][row]    h always, the others in training; two slots, by the parity of the step, in inference
    vectors    [T][B][row]        what stages hand on, in training; one slot in inference
    gradients  [2][B][row]        a state's: at step t, slot t & 1 is the old one's and the other the new one's
               [B][row]           a vector's
    D          [B][NP H]          the gradients of a stage's pre-activations, row-major, for the products
A row has as many floats as its units need in blocks of the widest kind, so that every stage's blocks fit.
In bfloat16 each gate's part of D begins at a word, and every vector that a product reads has a rounded copy, a place for
each step, made as the vector is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..derive import NORM_EPSILON, Cell, Stage
from ..rounding import bfloat16_bits
from ..sequence import Forward, Gradients, aux_columns
from . import threads
from .amx import begin_tiles, end_tiles
from .bfloat16 import pairs_bytes
from .blueprint import Blueprint, Relative, Word
from .cache import compile_kernel
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
    tile_words,
    words,
)
from .math import sqrt
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
    INNER_OPTIONS,
    VECTOR_BYTES,
    K,
    caller,
    horizontal_sum,
    keep_n,
    load,
    load_int,
    load_n,
    load_scalar,
    splat,
    store,
    store_n,
)
from .threads import barrier
from .tiles import aux_rows, compile_tile, inline, store_rows
from .workspace import aligned

__all__ = ["prepare", "prepare_back"]

ROW_UNITS = 4 * LANES  # a row's length is a multiple of the widest block

# A vector in a table: its address, bytes between steps, bytes between rows, what is added to the step and then kept of it;
# for one that is written, also where it goes times the recurrent mask (0: nowhere), and the bytes between steps and rows.
VECTOR_FIELDS = 8
# A gradient: its address, bytes between the two parities of a step, bytes between rows, what is added to the step.
GRADIENT_FIELDS = 4
# A normalised vector: input and output as above (5 of the fields), then both gradients.
NORM_FIELDS = 18
NORM_HEAD = 3  # before them: how many there are, units, the address of the rows' factors [T][B]


# Tiles

call_backward_tile: Any = caller(5)  # p, rows, t, b, u


def _vector(name: str, table: str, k: int, at: str) -> str:
    """Statements that set `name` to a vector's step t and row b, and `name`_row to the bytes between its rows."""
    f = lambda n: f"load_int({table} + {8 * (VECTOR_FIELDS * k + n)})"
    return (
        f"    {name}_row = {f(2)}; {name} = {f(0)} + ((t + {f(3)}) & {f(4)}) * {f(1)} + b * {name}_row + {at}"
    )


def _gradient(name: str, table: str, k: int, at: str) -> str:
    """The same of a vector's gradient."""
    f = lambda n: f"load_int({table} + {8 * (GRADIENT_FIELDS * k + n)})"
    return f"    {name}_row = {f(2)}; {name} = {f(0)} + ((t + {f(3)}) & 1) * {f(1)} + b * {name}_row + {at}"


def _old(cell: Cell, stage: Stage) -> dict[int, int]:
    """For each new state among what the stage makes, the place of the old one in its tables: after all the others."""
    made = [j for j, name in enumerate(stage.made) if _state(cell, name) is not None]
    return {j: len(stage.given) + len(stage.made) + k for k, j in enumerate(made)}


def _state(cell: Cell, made: str) -> str | None:
    """The state that a made vector is the new value of."""
    return made[:-1] if made[-1] == "1" and made[:-1] in cell.state else None


def _sources(cell: Cell) -> set[str]:
    """The vectors that recurrent products read, old states among them: what the recurrent mask is for."""
    return {s.source for s in cell.stages if s.h_gates and not s.projects}


def _copied(cell: Cell, precision: str) -> set[str]:
    """The vectors of which tiles make what products read: thinned by the recurrent mask, rounded, or both.

    Raises:
        ValueError: in bfloat16, a vector that a recurrent product and a projection read.
    """
    thinned = _sources(cell)
    if precision == "float32":
        return thinned
    projected = {s.source for s in cell.stages if s.h_gates and s.projects}
    if projected & thinned:
        both = ", ".join(sorted(projected & thinned))
        raise ValueError(
            f"precision: {cell.name} projects and feeds back the same {both}, which bfloat16 can't do"
        )
    return thinned | projected


def _forward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """forward_tile(p, s, s_step, rows, t, b, u): the stage on `rows` rows from b and block u; s: pre-activations."""
    wb, given, old = lay.width * 4, len(stage.given), _old(cell, stage)
    copied, sources = _copied(cell, lay.precision), _sources(cell)
    fed = {j: _state(cell, v) or v for j, v in enumerate(stage.made) if (_state(cell, v) or v) in copied}
    uses = set(stage.forward_args)
    step_of = lambda j: "(t + 1)" if j in old else "t"
    o = [
        "def forward_tile(p, s, s_step, rows, t, b, u):",
        f"    B = {field(P.B)}; r = t * B + b; at = u * {wb}; first = u * {lay.width}; H = {field(P.H)}",
        f"    valid = {field(P.VALID)}; training = {field(P.TRAINING)}; vectors = {field(P.VECTORS)}",
        f"    e = {field(P.EXTRA)} + (u * {field(P.T)} * B + r) * {lay.extra * wb}; aux = {field(P.AUX)}",
        f"    w = {field(P.PARAMS)} + at; w_row = {field(P.PARAM_B)}; mask0 = {field(P.MASK)}",
        *(_vector(f"in{k}", "vectors", k, "at") for k in range(given)),
        *(_vector(f"out{j}", "vectors", given + j, "at") for j in range(len(stage.made))),
        *(_vector(f"old{j}", "vectors", k, "at") for j, k in old.items()),
        *aux_rows(cell, "+ at"),
    ]
    for j in fed:
        f = lambda n, j=j: f"load_int(vectors + {8 * (VECTOR_FIELDS * (given + j) + n)})"
        o += [
            f"    masked{j} = mask0 != 0 and {step_of(j)} < {field(P.T)}; fed{j}_row = {f(7)}",
            f"    mask_row = {field(P.MASK_B)}",
            f"    fed{j} = {f(5)} + {step_of(j)} * {f(6)} + b * fed{j}_row + at // {lay.per_word}",
            f"    mask{j} = mask0 + {step_of(j)} * {field(P.MASK_T)} + b * mask_row + at",
        ]
    o += [
        "    for m in range(rows):",
        "        if valid == 0 or load_byte(valid + r + m) != 0:",
        f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
    ]
    indent = " " * 16
    o += [f"{indent}_{g} = load(s + {k * wb} + q)" for k, g in enumerate(stage.pre) if g in uses]
    o += [f"{indent}_{v} = load(in{k} + m * in{k}_row + q)" for k, v in enumerate(stage.given) if v in uses]
    o += [f"{indent}_{n} = load(w + {k} * w_row + q)" for k, n in enumerate(cell.params) if n in stage.params]
    o += [
        f"{indent}_{n} = load_n(x{k} + m * x_row{k} + q, H - first - q // 4)"
        for k, n in enumerate(cell.aux)
        if n in stage.aux
    ]
    results = [*(f"m_{v}" for v in stage.made), *(f"y{k}" for k in range(stage.saved))]
    o += inline(stage.forward_source, stage.forward_args, results, indent)
    o += [f"{indent}store(out{j} + m * out{j}_row + q, _m_{v})" for j, v in enumerate(stage.made)]
    if stage.saved:
        o.append(f"{indent}if training != 0:")
        for k in range(stage.saved):
            where = f"s + {k * wb}" if k < lay.pre else f"e + {(k - lay.pre) * wb}"
            o.append(f"{indent}    store({where} + q, _y{k})")
    o += ["        else:", f"            for q in range(0, {wb}, {VECTOR_BYTES}):"]
    for j in range(len(stage.made)):
        value = f"load(old{j} + m * old{j}_row + q)" if j in old else "K(0.0)"
        o.append(f"{indent}store(out{j} + m * out{j}_row + q, {value})")
    for j, source in fed.items():
        if lay.precision == "float32":
            o += [
                f"        if masked{j}:",
                f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
                f"{indent}thinned = load(out{j} + m * out{j}_row + q) * load_n(mask{j} + q, H - first - q // 4)",
                f"{indent}store(fed{j} + m * fed{j}_row + q, thinned)",
            ]
        else:  # zeros for padded units, whose values may be NaN: the last word of an odd number of units holds one
            o += [
                f"        for q in range(0, {wb}, {VECTOR_BYTES}):",
                f"            n = H - first - q // 4; thinned = load(out{j} + m * out{j}_row + q)",
            ]
            if source in sources:  # nothing is dropped on the way into a projection
                o.append(f"            if masked{j}: thinned = thinned * load_n(mask{j} + q, n)")
            o += [
                f"            if n < {LANES}: thinned = keep_n(thinned, n)",
                f"            store_bf16(fed{j} + m * fed{j}_row + q // 2, thinned)",
            ]
        o.append(f"        mask{j} += mask_row")
    o.append(f"        s += s_step; e += {lay.extra * wb}")
    return "\n".join(o) + "\n"


def _backward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """backward_tile(p, rows, t, b, u): gradients of step t on rows from b and block u."""
    wb, given, old = lay.width * 4, len(stage.given), _old(cell, stage)
    uses = set(stage.backward_args)
    o = [
        "def backward_tile(p, rows, t, b, u):",
        f"    B = {field(P.B)}; r = t * B + b; at = u * {wb}; first = u * {lay.width}; H = {field(P.H)}",
        f"    h4 = {lay.row_bytes('H')}",
        f"    valid = {field(P.VALID)}; vectors = {field(P.VECTORS)}; gradients = {field(P.GRADIENTS)}",
        f"    g = {field(P.GATES)} + (u * {field(P.T)} * B + r) * {lay.pre * wb}; d_row = h4 * {lay.pre}",
        f"    e = {field(P.EXTRA)} + (u * {field(P.T)} * B + r) * {lay.extra * wb}; aux = {field(P.AUX)}",
        f"    w = {field(P.PARAMS)} + at; w_row = {field(P.PARAM_B)}; d = {field(P.D)} + b * d_row + at // {lay.per_word}",
        f"    dp_slot = B * w_row; dp = {field(P.DPARAMS)} + b * w_row + at; upstream = {field(P.UPSTREAM)}",
        *(_vector(f"in{k}", "vectors", k, "at") for k, v in enumerate(stage.given) if v in uses),
        *(_vector(f"out{j}", "vectors", given + j, "at") for j, v in enumerate(stage.made) if v in uses),
        *(_gradient(f"d_in{k}", "gradients", k, "at") for k in range(given)),
        *(_gradient(f"d_out{j}", "gradients", given + j, "at") for j in range(len(stage.made))),
        *(_gradient(f"d_old{j}", "gradients", k, "at") for j, k in old.items()),
        *aux_rows(cell, "+ at"),
    ]
    for j in old:
        f = lambda n, j=j: f"load_int(upstream + {24 * j + 8 * n})"
        o.append(f"    up{j} = {f(0)}; up{j}_row = {f(2)}")
        o.append(f"    if up{j} != 0: up{j} += t * {f(1)} + b * up{j}_row + at")
    o += [
        "    for m in range(rows):",
        "        live = valid == 0 or load_byte(valid + r + m) != 0",
        f"        for q in range(0, {wb}, {VECTOR_BYTES}):",
        "            n = H - first - q // 4",
    ]
    indent = " " * 12
    for j, v in enumerate(stage.made):
        name = "_" + stage.gradient_of[v]
        o.append(f"{indent}{name} = load(d_out{j} + m * d_out{j}_row + q)")
        o.append(f"{indent}store(d_out{j} + m * d_out{j}_row + q, K(0.0))")
        if j in old:
            o.append(f"{indent}if up{j} != 0: {name} = {name} + load_n(up{j} + m * up{j}_row + q, n)")
    o.append(f"{indent}if live:")
    indent = " " * 16
    o += [
        f"{indent}_{v} = load(in{k} + m * in{k}_row + q)"
        for k, v in enumerate(stage.given)
        if v in uses
    ]  # fmt: skip
    o += [f"{indent}_{v} = load(out{j} + m * out{j}_row + q)" for j, v in enumerate(stage.made) if v in uses]
    o += [f"{indent}_{n} = load(w + {k} * w_row + q)" for k, n in enumerate(cell.params) if n in uses]
    o += [f"{indent}_{n} = load_n(x{k} + m * x_row{k} + q, n)" for k, n in enumerate(cell.aux) if n in uses]
    o += [
        f"{indent}_y{k} = load({f'g + {k * wb}' if k < lay.pre else f'e + {(k - lay.pre) * wb}'} + q)"
        for k in range(stage.saved)
    ]
    results = [
        *(f"g_{n}" for n in stage.pre),
        *(f"s_{n}" for n in stage.given),
        *(f"p_{n}" for n in stage.params),
    ]
    o += inline(stage.backward_source, stage.backward_args, results, indent)
    if stage.pre:
        o.append(f"{indent}if n < {LANES}:")  # a padded unit's gradient may be NaN, and 0 * NaN would spread
        o += [f"{indent}    _g_{g} = keep_n(_g_{g}, n)" for g in stage.pre]
    o += [f"{indent}store(g + {k * wb} + q, _g_{g})" for k, g in enumerate(stage.pre)]
    o += store_rows(lay, [f"_g_{g}" for g in stage.pre], f"q // {lay.per_word}", indent)
    for k, v in enumerate(stage.given):
        o.append(f"{indent}a = d_in{k} + m * d_in{k}_row + q; store(a, load(a) + _s_{v})")
    for k, n in enumerate(cell.params):
        if n in stage.params:
            o.append(f"{indent}a = dp + {k} * dp_slot + m * w_row + q; store(a, load(a) + _p_{n})")
    o.append("            else:")  # the states' gradients pass on; the gates get none
    o.append(f"{indent}a = 0")
    for j in old:
        name = "_" + stage.gradient_of[stage.made[j]]
        o.append(f"{indent}a = d_old{j} + m * d_old{j}_row + q; store(a, load(a) + {name})")
    o += [f"{indent}store(g + {k * wb} + q, K(0.0))" for k in range(lay.pre)]
    o += store_rows(lay, ["K(0.0)"] * lay.pre, f"q // {lay.per_word}", indent)
    o.append(f"        g += {lay.pre * wb}; e += {lay.extra * wb}; d += d_row")
    return "\n".join(o) + "\n"


# Rows normalised


@njit(**INNER_OPTIONS)
def place(entry: int, t: int, b: int) -> int:
    """The address of row b of a vector's step t."""
    at = ((t + load_int(entry + 24)) & load_int(entry + 32)) * load_int(entry + 8)
    return load_int(entry) + at + b * load_int(entry + 16)


@njit(**INNER_OPTIONS)
def gradient_place(entry: int, t: int, b: int) -> int:
    """The address of row b of a vector's gradient at step t."""
    return load_int(entry) + ((t + load_int(entry + 24)) & 1) * load_int(entry + 8) + b * load_int(entry + 16)


@njit(**INNER_OPTIONS)
def normalize_rows(table: int, t: int, b0: int, b1: int, B: int) -> None:
    """Rows b0 to b1 of a group of vectors to mean 0 and variance 1 over all its units, in sums of one fixed order."""
    count, units, factors = load_int(table), load_int(table + 8), load_int(table + 16)
    first = table + NORM_HEAD * 8
    share_of_one = splat(np.float32(1.0) / np.float32(count * units))
    for b in range(b0, b1):
        total = K(0.0)
        for k in range(count):
            a = place(first + k * NORM_FIELDS * 8, t, b)
            for q in range(0, units, LANES):
                total = total + load_n(a + q * 4, units - q)
        mean = splat(horizontal_sum(total)) * share_of_one
        total = K(0.0)
        for k in range(count):
            a = place(first + k * NORM_FIELDS * 8, t, b)
            for q in range(0, units - LANES + 1, LANES):
                off = load(a + q * 4) - mean
                total = total + off * off
            q = units // LANES * LANES
            if q < units:
                off = load_n(a + q * 4, units - q) - mean
                total = total + keep_n(off * off, units - q)
        factor = K(1.0) / sqrt(splat(horizontal_sum(total)) * share_of_one + K(NORM_EPSILON))
        store_n(factors + (t * B + b) * 4, factor, 1)
        for k in range(count):
            entry = first + k * NORM_FIELDS * 8
            a, z = place(entry, t, b), place(entry + 40, t, b)
            for q in range(0, units, LANES):
                store(z + q * 4, (load_n(a + q * 4, units - q) - mean) * factor)


@njit(**INNER_OPTIONS)
def normalize_rows_back(table: int, t: int, b0: int, b1: int, B: int) -> None:
    """From the gradients of normalised rows to those of what was normalised: d = f (d' - mean(d') - y mean(d' y))."""
    count, units, factors = load_int(table), load_int(table + 8), load_int(table + 16)
    first = table + NORM_HEAD * 8
    share_of_one = splat(np.float32(1.0) / np.float32(count * units))
    for b in range(b0, b1):
        total, along = K(0.0), K(0.0)
        for k in range(count):
            entry = first + k * NORM_FIELDS * 8
            y, d = place(entry + 40, t, b), gradient_place(entry + 112, t, b)
            for q in range(0, units, LANES):
                value = load_n(d + q * 4, units - q)
                total = total + value
                along = along + value * load_n(y + q * 4, units - q)
        mean = splat(horizontal_sum(total)) * share_of_one
        slope = splat(horizontal_sum(along)) * share_of_one
        factor = splat(load_scalar(factors + (t * B + b) * 4))
        for k in range(count):
            entry = first + k * NORM_FIELDS * 8
            y, d, z = (
                place(entry + 40, t, b),
                gradient_place(entry + 112, t, b),
                gradient_place(entry + 80, t, b),
            )
            for q in range(0, units, LANES):
                value = factor * (load(d + q * 4) - mean - load(y + q * 4) * slope)
                if z == d:
                    store(z + q * 4, value)
                else:
                    store(d + q * 4, K(0.0))
                    store(z + q * 4, load(z + q * 4) + value)


# The passes over time


@njit(**INNER_OPTIONS)
def source_step(p: int, t: int, b0: int, b1: int, v0: int, v1: int, s: int) -> None:
    """The gradients of a stage's recurrent product, added to its source's."""
    units, depth, zeros = get(p, P.K), get(p, P.H_GATES) * words(p, P.H), get(p, P.ZEROS)
    d_row, mask, mask_row = get(p, P.PRE) * words(p, P.H) * 4, get(p, P.D_MASK), get(p, P.MASK_B)
    row, into = get(p, P.D_SOURCE_B), get(p, P.D_SOURCE) + (t & 1) * get(p, P.D_SOURCE_T)
    d, masked, most = get(p, P.D) + d_row - depth * 4, mask != 0, get(p, P.PANEL_ROWS)
    mask += t * get(p, P.MASK_T)
    for v in range(v0, v1, get(p, P.PANEL)):
        n = min(get(p, P.PANEL), v1 - v)
        b = b0
        while b < b1:
            m = tile_rows(b1 - b, most)
            tile1(
                load_int(get(p, P.PANEL_TILES) + ((n - 1) * most + m - 1) * 8),
                d + b * d_row, d_row, 4, depth, get(p, P.RT) + v * VECTOR_BYTES * depth, n * VECTOR_BYTES,
                zeros, 0, s, n * VECTOR_BYTES,
            )  # fmt: skip
            for k in range(m):
                for q in range(v, v + n):
                    value = load(s + (k * n + q - v) * VECTOR_BYTES)
                    a = into + (b + k) * row + q * VECTOR_BYTES
                    if masked:
                        at = mask + (b + k) * mask_row + q * VECTOR_BYTES
                        value = value * load_n(at, units - q * LANES)
                    store(a, load(a) + value)
            b += m


def _forward(p, shard, shards):
    T, B, flags, units_split = get(p, P.T), get(p, P.B), get(p, P.FLAGS), get(p, P.UNITS_SPLIT) != 0
    s, met, end = get(p, P.SCRATCH) + shard * get(p, P.SCRATCH_BYTES), 1, p + get(p, P.STAGES) * PLAN_BYTES
    r0, r1 = share(B, shard, shards)
    b0, b1 = (0, B) if units_split else (r0, r1)
    begin_tiles(get(p, P.TILES))
    for stage in range(p, end, PLAN_BYTES):
        call_part(get(p, P.PACK), stage, shard, shards)
    barrier(flags, shard, shards, met)
    for stage in range(p, end, PLAN_BYTES):
        if get(stage, P.APART) != 0:
            blocks = get(stage, P.BLOCKS)
            u0, u1 = share(blocks, shard, shards) if units_split else (0, blocks)
            call_part(get(p, P.INPUT_PRODUCT), stage, u0, u1)
    for t in range(T):
        for stage in range(p, end, PLAN_BYTES):
            norms = get(stage, P.NORM_COUNT)
            for n in range(norms):
                normalize_rows(load_int(get(stage, P.NORMS) + 8 * n), t, r0, r1, B)
            if norms != 0 and units_split:
                met += 1
                barrier(flags, shard, shards, met)
            blocks = get(stage, P.BLOCKS)
            u0, u1 = share(blocks, shard, shards) if units_split else (0, blocks)
            call_forward_step(get(p, P.FORWARD_STEP), stage, t, b0, b1, u0, u1, s)
            if units_split:
                met += 1
                barrier(flags, shard, shards, met)
    end_tiles(get(p, P.TILES))


def _backward(p, shard, shards):
    T, B, flags, units_split = get(p, P.T), get(p, P.B), get(p, P.FLAGS), get(p, P.UNITS_SPLIT) != 0
    s, met, end = get(p, P.SCRATCH) + shard * get(p, P.SCRATCH_BYTES), 1, p + get(p, P.STAGES) * PLAN_BYTES
    r0, r1 = share(B, shard, shards)
    b0, b1 = (0, B) if units_split else (r0, r1)
    begin_tiles(get(p, P.TILES))
    for stage in range(p, end, PLAN_BYTES):
        call_part(get(p, P.PACK_BACK), stage, shard, shards)
    barrier(flags, shard, shards, met)
    for t in range(T - 1, -1, -1):
        for stage in range(end - PLAN_BYTES, p - PLAN_BYTES, -PLAN_BYTES):
            tile, blocks, pre = get(stage, P.BACKWARD_TILE), get(stage, P.BLOCKS), get(stage, P.PRE)
            u0, u1 = share(blocks, shard, shards) if units_split else (0, blocks)
            for u in range(u0, u1):
                b = b0
                while b < b1:
                    m = tile_rows(b1 - b, get(p, P.TILE_ROWS))
                    call_backward_tile(tile, stage, m, t, b, u)
                    b += m
            if units_split:
                met += 1
                barrier(flags, shard, shards, met)
            if pre != 0:
                v0, v1 = 0, (get(stage, P.K) + LANES - 1) // LANES
                x0, x1 = 0, (get(stage, P.I) + LANES - 1) // LANES
                if units_split:
                    v0, v1 = share_panels(v1, get(stage, P.PANEL), shard, shards)
                    x0, x1 = share_panels(x1, get(stage, P.PANEL), shard, shards)
                if get(stage, P.H_GATES) != 0:
                    source_step(stage, t, b0, b1, v0, v1, s)
                if get(stage, P.DX) != 0:
                    call_dx_step(get(p, P.DX_STEP), stage, t, get(stage, P.D), b0, b1, x0, x1, s)
                if units_split:
                    met += 1
                    barrier(flags, shard, shards, met)
            norms = get(stage, P.NORM_COUNT)
            for n in range(norms):
                normalize_rows_back(load_int(get(stage, P.NORMS) + 8 * n), t, r0, r1, B)
            if norms != 0 and units_split:
                met += 1
                barrier(flags, shard, shards, met)
    met += 1
    barrier(flags, shard, shards, met)
    for stage in range(p, end, PLAN_BYTES):
        call_part(get(p, P.CLOSING), stage, shard, shards)
    end_tiles(get(p, P.TILES))
    met += 1
    barrier(flags, shard, shards, met)
    for stage in range(p, end, PLAN_BYTES):
        call_part(get(p, P.UNPACK), stage, shard, shards)


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """One of the passes above, for all cells."""
    return compile_kernel(function, f"staged{function.__name__}", "", SIGNATURE)


@cache
def _tiles(cell: Cell, emit: Callable[..., str], precision: str) -> list[int]:
    """The addresses of one of the two tiles of each stage."""
    sources = [emit(cell, stage, Layout.of(stage, precision)) for stage in cell.stages]
    return [compile_tile(source, f"{cell.name}_{k}") for k, source in enumerate(sources)]


def _scratch_floats(cell: Cell, precision: str) -> int:
    """Floats of scratch memory a thread."""
    return max(Layout.of(s, precision).scratch() for s in cell.stages)


# Laying out memory


def row_units(units: int) -> int:
    """Floats of a row of so many units."""
    return -(-units // ROW_UNITS) * ROW_UNITS


class Shape(NamedTuple):
    """What a sequence's memory depends on, its cell aside."""

    T: int
    B: int
    I: int
    H: int
    Q: int  # units of the output
    training: bool
    masked: bool  # there is a recurrent mask
    shards: int
    units: bool  # the threads share the units, else the batch
    apart: bool
    precision: str
    packed: bool = False  # the weights come packed, so that no room is needed to pack them


class _Vectors:
    """Where each vector and its gradient lies, as words of tables."""

    def __init__(self, cell: Cell, shape: Shape) -> None:
        self.cell, self.shape, self.paired = cell, shape, shape.precision != "float32"
        self.layout = Layout.of(cell.stages[0], shape.precision)  # for what is the same for all stages
        self.units = (
            {s: shape.H for s in cell.state} | {v: shape.H for v in cell.vectors} | {cell.state[0]: shape.Q}
        )

    def base(self, vector: str) -> tuple[str, int]:
        """The vector's memory, and 1 where it is a new state: one step on."""
        state = _state(self.cell, vector)
        return (vector, 0) if state is None else (state, 1)

    def slots(self, name: str) -> int:
        T, training = self.shape.T, self.shape.training
        if name in self.cell.state:
            return T + 1 if training or name == self.cell.state[0] else 2
        return T if training else 1

    def floats(self, name: str) -> int:
        """Of one slot."""
        return self.shape.B * row_units(self.units[name])

    def value(self, vector: str) -> list[Word]:
        """The first five fields of a vector's place in a table."""
        name, later = self.base(vector)
        of_state = name in self.cell.state
        by_parity = of_state and not self.shape.training and name != self.cell.state[0]
        step = 4 * self.floats(name) if of_state or self.shape.training else 0
        return [
            Relative(f"value {name}"),
            step,
            4 * row_units(self.units[name]),
            later,
            1 if by_parity else -1,
        ]

    def fed(self, vector: str) -> list[Word]:
        """Where what a recurrent product reads lies, times the mask if there is one: address, by step, by row."""
        if vector not in self.copied():
            return self.value(vector)[:3]
        per_word = 2 if self.paired else 1
        step, row = 4 * self.floats(vector) // per_word, 4 * row_units(self.units[vector]) // per_word
        return [Relative(f"fed {vector}"), step, row]

    def copied(self) -> set[str]:
        """The vectors of which products read a copy.

        Raises:
            ValueError: no tile makes one of them, as it is normalised and goes into the product as it is.
        """
        if not (self.paired or self.shape.masked):
            return set()
        copied = _copied(self.cell, self.shape.precision)
        if lacking := copied - {self.base(v)[0] for stage in self.cell.stages for v in stage.made}:
            asked = "precision: bfloat16" if self.paired else "recurrent_mask: it"
            raise ValueError(
                f"{asked} can't be had for {self.cell.name}, where a product reads what `normalize` gives "
                f"({', '.join(sorted(lacking))}) with nothing in between"
            )
        return copied

    def pieces_fed(self) -> dict[str, int]:
        """Floats of each copy: all steps, and in bfloat16 a state's last value, which a tile rounds like the others."""
        T = self.shape.T
        past = lambda v: self.layout.rows_read * row_units(self.units[v])
        of = lambda v: ((T + 1) * self.floats(v) + past(v)) // 2 if self.paired else T * self.floats(v)
        return {f"fed {v}": of(v) for v in sorted(self.copied())}

    def gradient(self, vector: str) -> list[Word]:
        """A vector's gradient in a table."""
        name, later = self.base(vector)
        by_parity = 4 * self.floats(name) if name in self.cell.state else 0
        return [Relative(f"gradient {name}"), by_parity, 4 * row_units(self.units[name]), later]


class _Tables:
    """Words of plans and tables, and where in the one array of all of them each table begins."""

    def __init__(self, stages: int) -> None:
        self.words: list[Word] = [0] * (stages * len(P))
        self.at: dict[str, int] = {}

    def add(self, name: str, words: Sequence[Word]) -> Relative:
        """Append a table; its address."""
        self.at[name] = len(self.words)
        self.words += words
        return Relative("table", 8 * self.at[name])

    def plan(self, stage: int, values: Mapping[P, Word]) -> None:
        for place_of, value in values.items():
            self.words[stage * len(P) + place_of] = value


@lru_cache(maxsize=128)
def _forward_blueprint(cell: Cell, shape: Shape) -> tuple[Blueprint, dict[str, int]]:
    """The forward pass's memory, and where its tables begin."""
    T, B, I, H, Q = shape[:5]
    vectors, tables = _Vectors(cell, shape), _Tables(len(cell.stages))
    zeroed = {
        "flags": shape.shards * threads.FLAG_BYTES // 4, "zeros": ROW_COLUMNS * LANES,
        "params": len(cell.params) * row_units(H),
    }  # fmt: skip
    lay = vectors.layout
    rest = {
        "scratch": shape.shards * _scratch_floats(cell, shape.precision),
    }
    # A tile's blocks need not fill the words of a row that its products read.
    (zeroed if lay.unit > 1 else rest).update(vectors.pieces_fed())
    rest |= {f"value {v}": vectors.slots(v) * vectors.floats(v) for v in vectors.units if v != cell.state[0]}
    if vectors.paired:  # rows are read in whole vectors, which may reach past the last row
        rest["x rounded"] = (T * B + lay.rows_read) * lay.words(I) + LANES
    aux = [
        w
        for k in range(len(cell.aux))
        for w in (Relative(f"aux {k}"), Relative(f"aux {k} t"), Relative(f"aux {k} b"))
    ]
    common: dict[P, Word] = {
        P.T: T, P.B: B, P.UNITS_SPLIT: int(shape.units), P.TRAINING: int(shape.training), P.PARAMS: Relative("params"),
        P.PARAM_B: 4 * row_units(H), P.VALID: Relative("valid"),
        P.AUX: tables.add("aux", aux), P.FLAGS: Relative("flags"), P.SCRATCH: Relative("scratch"),
        P.ZEROS: Relative("zeros"), P.X: Relative("x rounded" if vectors.paired else "x"),
        P.KERNEL: Relative("kernel"), P.X_ROW: len(cell.gates) * H,
        P.MASK: Relative("mask"), P.MASK_T: Relative("mask t"), P.MASK_B: Relative("mask b"),
        P.STAGES: len(cell.stages), P.SCRATCH_BYTES: 4 * _scratch_floats(cell, shape.precision), P.FED_KEPT: -1,
        **forward_parts(shape.precision), **lay.plan(),
    }  # fmt: skip
    if vectors.paired:
        common |= {P.X_SOURCE: Relative("x")}
    x_rows = T * B  # the first stage that reads x rounds it
    forward_tiles = _tiles(cell, _forward_tile, shape.precision)
    for k, stage in enumerate(cell.stages):
        lay = Layout.of(stage, shape.precision)
        made, features, depth = (
            (Q if stage.projects else H),
            (I if stage.x_gates else 0),
            vectors.units[stage.source],
        )
        blocks, apart = lay.blocks(made), shape.apart and bool(stage.x_gates)
        zeroed[f"bp {k}"] = blocks * lay.pre * lay.width
        rest[f"wp {k}"] = 0 if shape.packed else blocks * lay.words(features) * lay.x_gates * lay.width
        rest[f"rp {k}"] = 0 if shape.packed else blocks * lay.words(depth) * lay.h_gates * lay.width
        rest[f"gates {k}"] = blocks * T * B * lay.pre * lay.width if shape.training or apart else 0
        rest[f"extra {k}"] = blocks * T * B * lay.extra * lay.width if shape.training else 0
        norms: list[Word] = []
        for n, norm in enumerate(stage.norms):
            rest[f"factors {k} {n}"] = T * B
            head = [
                len(norm.inputs),
                vectors.units[vectors.base(norm.inputs[0])[0]],
                Relative(f"factors {k} {n}"),
            ]
            words: list[Word] = list(head)
            for a, z in zip(norm.inputs, norm.outputs, strict=True):
                words += [
                    *vectors.value(a),
                    *vectors.value(z),
                    *[0] * 2 * GRADIENT_FIELDS,
                ]  # the backward pass's
            norms.append(tables.add(f"norm {k} {n}", words))
        table = [w for v in stage.given for w in (*vectors.value(v), 0, 0, 0)]
        for v in stage.made:
            source = _state(cell, v) or v
            fed = vectors.fed(source) if source in vectors.copied() else [0, 0, 0]
            table += [*vectors.value(v), *fed]
        for j in _old(cell, stage):
            table += [*vectors.value(stage.made[j][:-1]), 0, 0, 0]
        fed = vectors.fed(stage.source)
        x_column, h_column = columns(cell, stage)
        tables.plan(k, common | {
            P.I: features, P.X_T: 4 * B * lay.words(features), P.X_B: 4 * lay.words(features),
            P.H: made, P.K: depth, P.HP: blocks * lay.width,
            P.BLOCKS: blocks, P.APART: int(apart),
            P.BP: Relative(f"bp {k}"), P.WP: Relative(f"wp {k}"), P.RP: Relative(f"rp {k}"),
            P.GATES: Relative(f"gates {k}"), P.EXTRA: Relative(f"extra {k}"),
            P.RECURRENT: Relative("projection" if stage.projects else "recurrent"),
            P.H_ROW: Q if stage.projects else len(cell.recurrent) * H,
            P.X_COLUMN: tables.add(f"x column {k}", x_column.tolist()),
            P.X_GATES: lay.x_gates, P.H_GATES: lay.h_gates,
            P.H_COLUMN: tables.add(f"h column {k}", h_column.tolist()),
            **tile_words(stage, shape.precision, B, depth, shape.shards if shape.units else 1, apart),
            P.WIDTH: lay.width, P.PRE: lay.pre,
            P.NARROW: lay.narrow(made), P.X_ROWS: x_rows if stage.x_gates else 0,
            P.FORWARD_TILE: forward_tiles[k], P.NORM_COUNT: len(norms), P.VECTORS: tables.add(f"vectors {k}", table),
            P.NORMS: tables.add(f"norms {k}", norms), P.FED: fed[0], P.FED_T: fed[1], P.FED_B: fed[2],
            P.BIAS: Relative("bias") if stage.x_gates else 0,
            P.D_MASK: 0 if stage.projects else Relative("mask"),  # nothing is dropped on the way into a projection
        })  # fmt: skip
        x_rows = 0 if stage.x_gates else x_rows
        if shape.training:
            among = len(stage.given) + len(stage.made) + len(_old(cell, stage))
            tables.add(f"gradients {k}", [0] * among * GRADIENT_FIELDS)
            tables.add(f"upstream {k}", [0] * 3 * len(stage.made))
    return Blueprint(zeroed, rest, tables.words), tables.at


@lru_cache(maxsize=128)
def _backward_blueprint(cell: Cell, shape: Shape, need_dx: bool) -> Blueprint:
    """The backward pass's memory, and what it adds to the tables of the forward pass."""
    B, H = shape.B, shape.H
    vectors, at = _Vectors(cell, shape), _forward_blueprint(cell, shape)[1]
    zeroed = {f"gradient {v}": (2 if v in cell.state else 1) * vectors.floats(v) for v in vectors.units}
    layouts = [Layout.of(stage, shape.precision) for stage in cell.stages]
    zeroed["dparams"] = len(cell.params) * B * row_units(H)
    rest: dict[str, int] = {}
    added: dict[int, Word] = {}

    def table(name: str, words: Sequence[Word], offset: int = 0) -> Relative:
        added.update(enumerate(words, at[name] + offset))
        return Relative("table", 8 * at[name])

    pairs = 0  # bytes of scratch a thread for packing pairs
    for stage, lay in zip(cell.stages, layouts, strict=True):
        if vectors.paired and stage.pre:
            features, made = (shape.I if stage.x_gates else 0), (shape.Q if stage.projects else H)
            pairs = max(pairs, pairs_bytes(lay, features, vectors.units[stage.source], made))
    rest["pairs"] = shape.shards * pairs // 4
    begun, tiles = False, _tiles(cell, _backward_tile, shape.precision)
    for k, stage in reversed(list(enumerate(cell.stages))):
        lay = layouts[k]
        made, features = (shape.Q if stage.projects else H), (shape.I if stage.x_gates else 0)
        depth, blocks = vectors.units[stage.source], lay.blocks(made)
        zeroed[f"dbp {k}"] = blocks * lay.pre * lay.width
        zeroed[f"dwp {k}"] = blocks * features * lay.x_gates * lay.width
        zeroed[f"drp {k}"] = blocks * depth * lay.h_gates * lay.width
        rest[f"rows {k}"] = 0 if vectors.paired else packed_rows(features, depth)
        # In bfloat16 the last word of an odd number of units holds nothing beside its unit, and must not hold NaN.
        (zeroed if vectors.paired else rest)[f"d {k}"] = (B + lay.rows_read) * lay.pre * lay.words(made)
        rest[f"rt {k}"] = lay.h_gates * lay.words(made) * -(-depth // LANES) * LANES
        rest[f"wt {k}"] = lay.x_gates * lay.words(made) * -(-features // LANES) * LANES if need_dx else 0
        among = [*stage.given, *stage.made, *(stage.made[j][:-1] for j in _old(cell, stage))]
        upstream: list[Word] = []
        for v in stage.made:
            name, of_state = vectors.base(v)
            s = cell.state.index(name) if of_state else None
            upstream += (
                [0, 0, 0]
                if s is None
                else [Relative(f"up {s}"), Relative(f"up {s} t"), Relative(f"up {s} b")]
            )
        source, parity, row, _ = vectors.gradient(stage.source)
        has_dx = need_dx and bool(stage.x_gates)
        plan: dict[P, Word] = {
            P.GRADIENTS: table(f"gradients {k}", [w for v in among for w in vectors.gradient(v)]),
            P.UPSTREAM: table(f"upstream {k}", upstream), P.DPARAMS: Relative("dparams"), P.DBP: Relative(f"dbp {k}"),
            P.DWP: Relative(f"dwp {k}"), P.DRP: Relative(f"drp {k}"), P.D: Relative(f"d {k}"),
            P.ROWS: Relative(f"rows {k}"), P.RT: Relative(f"rt {k}"),
            P.WT: Relative(f"wt {k}"), P.DKERNEL: Relative("dkernel"),
            P.DRECURRENT: Relative("dprojection" if stage.projects else "drecurrent"),
            P.D_SOURCE: source, P.D_SOURCE_T: parity, P.D_SOURCE_B: row,
            P.DX: Relative("dx") if has_dx else 0, P.DX_ADD: int(begun), P.BACKWARD_TILE: tiles[k],
            **backward_parts(shape.precision),
            P.PAIRS: Relative("pairs"), P.PAIRS_BYTES: pairs,
        }  # fmt: skip
        begun = begun or has_dx
        added.update({k * len(P) + place_of: word for place_of, word in plan.items()})
        for n, norm in enumerate(stage.norms):
            for j, (a, z) in enumerate(zip(norm.inputs, norm.outputs, strict=True)):
                words = [*vectors.gradient(a), *vectors.gradient(z)]
                table(f"norm {k} {n}", words, NORM_HEAD + j * NORM_FIELDS + 10)
    return Blueprint(zeroed, rest, list(added.values()), list(added))


def prepare(
    cell: Cell, shape: tuple[int, int, int, int, int], x: np.ndarray, kernel: np.ndarray, recurrent_kernel: np.ndarray,
    bias: np.ndarray | None, params: tuple[Any, ...], state: tuple[Any, ...] | None, valid: np.ndarray | None,
    training: bool, aux: tuple[Any, ...], recurrent_mask: Any, projection: np.ndarray | None,
    shards: int, units: bool, apart: bool, at_once: int, steps: None, precision: str,
) -> Prepared:  # fmt: skip
    """A forward pass on arrays of the right shapes and dtypes, shared by `shards` threads, by units or by the batch."""
    known = Shape(*shape, training, recurrent_mask is not None, shards, units, apart, precision)
    weights = (kernel, recurrent_kernel, projection)
    table, finish, places, rounded = laid_out(
        cell, known, x, weights, bias, params, state, valid, aux, recurrent_mask, at_once
    )
    return Prepared(compiled(_forward), table, shards, finish, lambda: places, rounded)


def laid_out(
    cell: Cell, known: Shape, x: np.ndarray, weights: tuple[Any, Any, Any], bias: np.ndarray | None,
    params: tuple[Any, ...], state: tuple[Any, ...] | None, valid: np.ndarray | None, aux: tuple[Any, ...],
    recurrent_mask: Any, at_once: int,
) -> tuple[np.ndarray, Any, Any, Any]:  # fmt: skip
    """The stages' plans and tables, in one array, what makes a `Forward` of them once they have run, where each state
    lies before and after, and the rounded copies of states (layout.Prepared).

    weights: kernel, recurrent kernel and projection, or zeros where they come packed.
    """
    T, B, H, Q, training, precision = known.T, known.B, known.H, known.Q, known.training, known.precision
    kernel, recurrent_kernel, projection = weights
    blueprint, _ = _forward_blueprint(cell, known)
    slab, table, output = blueprint.slab(), np.empty(len(blueprint.words), np.int64), cell.state[0]
    hs = aligned((T + 1, B, row_units(Q)))
    values: dict[str, Any] = {
        "table": table, f"value {output}": hs, "x": x, "kernel": kernel, "recurrent": recurrent_kernel,
        "projection": projection, "bias": 0 if bias is None else bias, "valid": 0 if valid is None else valid,
        "mask": 0, "mask t": 0, "mask b": 0,
    }  # fmt: skip
    for k, (name, a) in enumerate(zip(cell.aux, aux, strict=True)):
        rows = by_step(a, (T, B, aux_columns(cell, name, H, Q)))
        values |= {f"aux {k}": rows, f"aux {k} t": rows.strides[0], f"aux {k} b": rows.strides[1]}
    if recurrent_mask is not None:
        mask = by_step(recurrent_mask, (T, B, Q))
        values |= {"mask": mask, "mask t": mask.strides[0], "mask b": mask.strides[1]}
    blueprint.write(table, slab, values)
    sequences = [hs]
    for name in cell.state[1:]:
        sequences.append(blueprint.piece(slab, f"value {name}", -1, B, row_units(H)))
    rounded = []
    for k, (name, sequence) in enumerate(zip(cell.state, sequences, strict=True)):
        n = H if k else Q
        sequence[0, :, n:] = 0
        sequence[0, :, :n] = 0 if state is None else state[k]
        thinned = sequence[0, :, :n]
        if recurrent_mask is not None and name in _sources(cell):
            thinned = thinned * mask[0]
        if precision != "float32" and name in _copied(cell, precision):
            first = blueprint.piece(slab, f"fed {name}", -1)[: B * row_units(n) // 2].view(np.uint16)
            first[:] = 0
            first = first.reshape(B, -1)
            first[:, :n] = bfloat16_bits(thinned)
            rounded.append((k, first))
        elif recurrent_mask is not None and name in _sources(cell):
            blueprint.piece(slab, f"fed {name}", T, B, row_units(n))[0, :, :n] = thinned
    if params:
        rows = blueprint.piece(slab, "params", len(params), row_units(H))
        for row, param in zip(rows, params, strict=True):
            row[:H] = param

    last = [s[T] if len(s) == T + 1 else s[T & 1] for s in sequences]

    def finish() -> Forward:
        final = tuple(s[:, : H if k else Q].copy() for k, s in enumerate(last))
        if not training:
            values.clear()  # it kept the inputs in memory
            return Forward(hs[1:, :, :Q], final, None, None)
        residual = Residual(
            cell=cell, shape=(T, B, H, Q), known=known, table=table, slab=slab, inputs=values, has_bias=bias is not None,
            shards=known.shards, at_once=at_once,
        )  # fmt: skip
        return Forward(hs[1:, :, :Q], final, tuple(s[1:, :, :H] for s in sequences[1:]), residual)

    places = tuple((s[0], end) for s, end in zip(sequences, last, strict=True))
    return table, finish, places, tuple(rounded)


def prepare_back(
    residual: Residual,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    need_dx: bool,
    dstates: tuple[Any, ...] | None,
) -> Prepared:
    """The backward pass of what `prepare` prepared."""
    cell, (T, B, H, Q), table = residual.cell, residual.shape, residual.table
    G, R, I = len(cell.gates), len(cell.recurrent), residual.known.I
    blueprint = _backward_blueprint(cell, residual.known, need_dx)
    slab = blueprint.slab()
    values: dict[str, Any] = {
        "table": table,
        "dkernel": aligned((I, G * H)),
        "drecurrent": aligned((Q, R * H)),
    }
    values["dprojection"] = aligned((H, Q)) if cell.projects else None
    values["dx"] = aligned((T, B, I)) if need_dx else None
    for k, d in enumerate((dh, *(dstates or (None,) * (len(cell.state) - 1)))):
        if d is None:
            values |= {f"up {k}": 0, f"up {k} t": 0, f"up {k} b": 0}
        else:
            d = d if k == 0 else np.ascontiguousarray(d, np.float32)
            values |= {f"up {k}": d, f"up {k} t": d.strides[0], f"up {k} b": d.strides[1]}
    blueprint.write(table, slab, values)
    gradients = [
        blueprint.piece(slab, f"gradient {s}", 2, B, row_units(H if k else Q))
        for k, s in enumerate(cell.state)
    ]
    for k, d in enumerate(dfinal):
        if d is not None:
            gradients[k][T & 1, :, : H if k else Q] = d
    start = _forward_blueprint(cell, residual.known)[0]
    start.piece(residual.slab, "flags", -1)[:] = 0

    def finish() -> Gradients:
        dbias = None
        if residual.has_bias:
            dbias = np.empty((G, H), np.float32)
            for k, stage in enumerate(cell.stages):
                if stage.x_gates:
                    lay = Layout.of(stage)
                    rows = blueprint.piece(slab, f"dbp {k}", -1, lay.pre, lay.width).transpose(1, 0, 2)
                    dbias[columns(cell, stage)[0]] = rows[: lay.x_gates].reshape(lay.x_gates, -1)[:, :H]
            dbias = dbias.reshape(-1)
        of_params: tuple[Any, ...] = ()
        if cell.params:
            of_params = tuple(blueprint.piece(slab, "dparams", len(cell.params), B, -1).sum(1)[:, :H])
        state = tuple(d[0, :, : H if k else Q].copy() for k, d in enumerate(gradients))
        found = Gradients(
            values["dx"],
            values["dkernel"],
            values["drecurrent"],
            dbias,
            of_params,
            state,
            values["dprojection"],
        )
        values.clear()
        del residual.slab, residual.inputs  # their memory is free for the next step
        return found

    return Prepared(compiled(_backward), table, residual.shards, finish)
