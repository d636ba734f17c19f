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
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..derive import NORM_EPSILON, Cell, Norm, Stage
from ..sequence import Forward, Gradients
from . import threads
from .cache import compile_kernel, unique_name
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .layout import (
    Layout,
    P,
    Prepared,
    Residual,
    by_step,
    columns,
    field,
    loops,
    state_gradients,
    tile_addresses,
    tile_rows,
)
from .math import sqrt
from .microkernel import plain_families, tile1
from .plan import SIGNATURE, get, share
from .simd import (
    JIT_OPTIONS,
    VECTOR_BYTES,
    K,
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
from .tiles import aux_rows, inline, tile_functions
from .workspace import aligned, carve

__all__ = ["prepare", "prepare_back"]

ROW_UNITS = 4 * LANES  # a row's length is a multiple of the widest block
PLAN_BYTES = 8 * len(P)

# A vector in a table: its address, bytes between steps, bytes between rows, what is added to the step and then kept of it;
# for one that is written, also where it goes times the recurrent mask (0: nowhere), and the bytes between steps and rows.
VECTOR_FIELDS = 8
# A gradient: its address, bytes between the two parities of a step, bytes between rows, what is added to the step.
GRADIENT_FIELDS = 4
# A normalised vector: input and output as above (5 of the fields), then both gradients.
NORM_FIELDS = 18
NORM_HEAD = 3  # before them: how many there are, units, the address of the rows' factors [T][B]


# Tiles


def tile_source(cell: Cell, stage: Stage) -> str:
    """The text of a stage's two tile functions."""
    lay = Layout.of(stage)
    return _forward_tile(cell, stage, lay) + "\n" + _backward_tile(cell, stage, lay)


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


def _forward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """forward_tile(p, s, s_step, rows, t, b, u): the stage on `rows` rows from b and block u; s: pre-activations."""
    wb, given, old = lay.width * 4, len(stage.given), _old(cell, stage)
    fed = {j for j, name in enumerate(stage.made) if (_state(cell, name) or name) in _sources(cell)}
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
            f"    mask_row = {field(P.MASK_B)}; fed{j} = {f(5)} + {step_of(j)} * {f(6)} + b * fed{j}_row + at",
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
    for j in fed:
        o += [
            f"        if masked{j}:",
            f"            for q in range(0, {wb}, {VECTOR_BYTES}):",
            f"{indent}thinned = load(out{j} + m * out{j}_row + q) * load_n(mask{j} + q, H - first - q // 4)",
            f"{indent}store(fed{j} + m * fed{j}_row + q, thinned)",
            f"        mask{j} += mask_row",
        ]
    o.append(f"        s += s_step; e += {lay.extra * wb}")
    return "\n".join(o) + "\n"


def _backward_tile(cell: Cell, stage: Stage, lay: Layout) -> str:
    """backward_tile(p, rows, t, b, u): gradients of step t on rows from b and block u."""
    wb, given, old = lay.width * 4, len(stage.given), _old(cell, stage)
    uses = set(stage.backward_args)
    o = [
        "def backward_tile(p, rows, t, b, u):",
        f"    B = {field(P.B)}; r = t * B + b; at = u * {wb}; first = u * {lay.width}; H = {field(P.H)}; h4 = H * 4",
        f"    valid = {field(P.VALID)}; vectors = {field(P.VECTORS)}; gradients = {field(P.GRADIENTS)}",
        f"    g = {field(P.GATES)} + (u * {field(P.T)} * B + r) * {lay.pre * wb}; d_row = h4 * {lay.pre}",
        f"    e = {field(P.EXTRA)} + (u * {field(P.T)} * B + r) * {lay.extra * wb}; aux = {field(P.AUX)}",
        f"    w = {field(P.PARAMS)} + at; w_row = {field(P.PARAM_B)}; d = {field(P.D)} + b * d_row + at",
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
    for k, g in enumerate(stage.pre):
        o.append(f"{indent}store(g + {k * wb} + q, _g_{g}); store_n(d + {k} * h4 + q, _g_{g}, n)")
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
    o += [
        f"{indent}store(g + {k * wb} + q, K(0.0)); store_n(d + {k} * h4 + q, K(0.0), n)"
        for k in range(lay.pre)
    ]
    o.append(f"        g += {lay.pre * wb}; e += {lay.extra * wb}; d += d_row")
    return "\n".join(o) + "\n"


# Rows normalised


@njit(**JIT_OPTIONS)
def place(entry, t, b):
    """The address of row b of a vector's step t."""
    at = ((t + load_int(entry + 24)) & load_int(entry + 32)) * load_int(entry + 8)
    return load_int(entry) + at + b * load_int(entry + 16)


@njit(**JIT_OPTIONS)
def gradient_place(entry, t, b):
    """The address of row b of a vector's gradient at step t."""
    return load_int(entry) + ((t + load_int(entry + 24)) & 1) * load_int(entry + 8) + b * load_int(entry + 16)


@njit(**JIT_OPTIONS)
def normalize_rows(table, t, b0, b1, B):
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


@njit(**JIT_OPTIONS)
def normalize_rows_back(table, t, b0, b1, B):
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


def _products_back(lay: Layout, text: str) -> Any:
    """source_step(p, t, b0, b1, v0, v1, s): the gradients of a stage's recurrent product, added to its source's."""
    NP, GH, VB, COLUMNS = lay.pre, lay.h_gates, VECTOR_BYTES, TILE_COLUMNS
    NH = NP - GH

    def source_step(p, t, b0, b1, v0, v1, s):
        H, units, d, rt, zeros = get(p, P.H), get(p, P.K), get(p, P.D), get(p, P.RT), get(p, P.ZEROS)
        d_row, mask, mask_row = NP * H * 4, get(p, P.D_MASK), get(p, P.MASK_B)
        row, into = get(p, P.D_SOURCE_B), get(p, P.D_SOURCE) + (t & 1) * get(p, P.D_SOURCE_T)
        masked = mask != 0
        mask += t * get(p, P.MASK_T)
        for v in range(v0, v1, COLUMNS):
            n = min(COLUMNS, v1 - v)
            b = b0
            while b < b1:
                m = tile_rows(b1 - b)
                tile1(
                    load_int(get(p, P.PLAIN) + ((n - 1) * TILE_ROWS + m - 1) * 8),
                    d + b * d_row + NH * H * 4, d_row, 4, GH * H, rt + v * VB * (GH * H), n * VB, zeros, 0, s, n * VB,
                )  # fmt: skip
                for k in range(m):
                    for q in range(n):
                        value, a = load(s + (k * n + q) * VB), into + (b + k) * row + (v + q) * VB
                        if masked:
                            value = value * load_n(
                                mask + (b + k) * mask_row + (v + q) * VB, units - (v + q) * LANES
                            )
                        store(a, load(a) + value)
                b += m

    source_step.__qualname__ = unique_name("source_step", repr(lay) + text)
    return njit(**JIT_OPTIONS)(source_step)


def _driver_text(cell: Cell) -> str:
    """Both passes over time: the loops around stages, with barriers where threads share a row's units."""
    meet = "            if units_split: step += 1; barrier(flags, shard, shards, step)"
    head = [
        f"    T = {field(P.T)}; B = {field(P.B)}; flags = {field(P.FLAGS)}; units_split = {field(P.UNITS_SPLIT)} != 0",
        f"    s = {field(P.SCRATCH)} + shard * SCRATCH; step = 1; r0, r1 = share(B, shard, shards); b0, b1 = r0, r1",
        "    if units_split: b0, b1 = 0, B",
    ]
    stages = list(enumerate(cell.stages))
    for k, _ in stages:
        head += [
            f"    p{k} = p + {k * PLAN_BYTES}; u{k} = 0; e{k} = load_int(p{k} + {8 * P.BLOCKS})",
            f"    if units_split: u{k}, e{k} = share(e{k}, shard, shards)",
        ]
    forward = ["def forward(p, shard, shards):", *head]
    forward += [f"    pack{k}(p{k}, shard, shards)" for k, s in stages if s.pre]
    forward += ["    barrier(flags, shard, shards, step)"]
    forward += [
        f"    if load_int(p{k} + {8 * P.APART}) != 0: input_product{k}(p{k}, u{k}, e{k})"
        for k, s in stages
        if s.x_gates
    ]
    forward.append("    for t in range(T):")
    for k, stage in stages:
        for n in range(len(stage.norms)):
            table = f"load_int(load_int(p{k} + {8 * P.NORMS}) + {8 * n})"
            forward.append(f"        normalize_rows({table}, t, r0, r1, B)")
        if stage.norms:
            forward.append(meet[4:])
        forward += [f"        forward_step{k}(p{k}, t, b0, b1, u{k}, e{k}, s)", meet[4:]]
    backward = ["def backward(p, shard, shards):", *head]
    backward += [f"    pack_back{k}(p{k}, shard, shards)" for k, s in stages if s.pre]
    for k, stage in stages:
        if stage.pre:
            backward += [
                f"    v{k} = 0; w{k} = (load_int(p{k} + {8 * P.K}) + {LANES - 1}) // {LANES}",
                f"    x{k} = 0; z{k} = (load_int(p{k} + {8 * P.I}) + {LANES - 1}) // {LANES}",
                f"    if units_split: v{k}, w{k} = share_panels(w{k}, shard, shards)",
                f"    if units_split: x{k}, z{k} = share_panels(z{k}, shard, shards)",
            ]
    backward += ["    barrier(flags, shard, shards, step)", "    for t in range(T - 1, -1, -1):"]
    for k, stage in reversed(stages):
        backward += [
            f"        for u in range(u{k}, e{k}):",
            "            b = b0",
            "            while b < b1:",
            "                m = tile_rows(b1 - b)",
            f"                backward_tile{k}(p{k}, m, t, b, u)",
            "                b += m",
            meet[4:],
        ]
        if stage.h_gates:
            backward.append(f"        source_step{k}(p{k}, t, b0, b1, v{k}, w{k}, s)")
        if stage.x_gates:
            dx = f"load_int(p{k} + {8 * P.DX}) != 0"
            d = f"load_int(p{k} + {8 * P.D})"
            backward.append(f"        if {dx}: dx_step{k}(p{k}, t, {d}, b0, b1, x{k}, z{k}, s)")
        if stage.pre:
            backward.append(meet[4:])
        for n in range(len(stage.norms)):
            table = f"load_int(load_int(p{k} + {8 * P.NORMS}) + {8 * n})"
            backward.append(f"        normalize_rows_back({table}, t, r0, r1, B)")
        if stage.norms:
            backward.append(meet[4:])
    backward.append("    step += 1; barrier(flags, shard, shards, step)")
    backward += [f"    closing{k}(p{k}, shard, shards)" for k, s in stages if s.pre]
    backward.append("    step += 1; barrier(flags, shard, shards, step)")
    backward += [f"    unpack{k}(p{k}, shard, shards)" for k, s in stages if s.pre]
    return "\n".join(forward) + "\n\n" + "\n".join(backward) + "\n"


@njit(**JIT_OPTIONS)
def share_panels(vectors, shard, shards):
    """A thread's share of so many vectors, in whole panels of TILE_COLUMNS."""
    first, last = share((vectors + TILE_COLUMNS - 1) // TILE_COLUMNS, shard, shards)
    return first * TILE_COLUMNS, min(last * TILE_COLUMNS, vectors)


def _scratch_floats(cell: Cell) -> int:
    """Floats of scratch memory a thread."""
    return TILE_ROWS * max(TILE_COLUMNS * LANES, *(len(s.pre) * Layout.of(s).width for s in cell.stages))


@cache
def _functions(cell: Cell) -> tuple[str, Any, Any]:
    """The text that a cell's kernels are made from, and the two passes, not yet compiled."""
    text = _driver_text(cell)
    sources = [tile_source(cell, stage) for stage in cell.stages]
    scope: dict[str, Any] = {
        "load_int": load_int, "share": share, "share_panels": share_panels, "barrier": barrier, "tile_rows": tile_rows,
        "normalize_rows": normalize_rows, "normalize_rows_back": normalize_rows_back, "SCRATCH": 4 * _scratch_floats(cell),
    }  # fmt: skip
    for k, (stage, source) in enumerate(zip(cell.stages, sources, strict=True)):
        lay = Layout.of(stage)
        forward_tile, scope[f"backward_tile{k}"] = tile_functions(cell.name, source)
        scope |= {f"{name}{k}": f for name, f in loops(lay, forward_tile, source)._asdict().items()}
        scope[f"source_step{k}"] = _products_back(lay, source)
    exec(compile(text, f"<stages of {cell.name}>", "exec"), scope)
    return text + "".join(sources), scope["forward"], scope["backward"]


@cache
def forward_kernel(cell: Cell) -> Any:
    text, function, _ = _functions(cell)
    return compile_kernel(function, f"{cell.name}_forward", text, SIGNATURE)


@cache
def backward_kernel(cell: Cell) -> Any:
    text, _, function = _functions(cell)
    return compile_kernel(function, f"{cell.name}_backward", text, SIGNATURE)


@cache
def _tables(stage: Stage) -> np.ndarray:
    return tile_addresses(stage)


# Laying out memory


def row_units(units: int) -> int:
    """Floats of a row of so many units."""
    return -(-units // ROW_UNITS) * ROW_UNITS


class _Memory:
    """Vectors by name, with their strides: where each is written and read, and where its gradient is."""

    def __init__(self, cell: Cell, T: int, B: int, H: int, Q: int, training: bool) -> None:
        self.cell, self.T, self.B, self.training = cell, T, B, training
        self.units = {s: H for s in cell.state} | {v: H for v in cell.vectors} | {cell.state[0]: Q}
        self.values: dict[str, np.ndarray] = {}
        for name, units in self.units.items():
            if name not in cell.state:
                slots = T if training else 1
            else:
                slots = T + 1 if training or name == cell.state[0] else 2
            self.values[name] = aligned((slots, B, row_units(units)))
        self.fed: dict[str, np.ndarray] = {}  # what goes times the recurrent mask into a product
        self.gradients: dict[str, np.ndarray] = {}
        self.norms: list[tuple[Norm, np.ndarray, np.ndarray]] = []  # with its table and the rows' factors

    def base(self, vector: str) -> tuple[str, int]:
        """A vector's array, and 1 where it is a new state: one step on."""
        if vector[-1] == "1" and vector[:-1] in self.cell.state:
            return vector[:-1], 1
        return vector, 0

    def value(self, vector: str) -> tuple[int, int, int, int, int]:
        """The first five fields of a vector's place in a table."""
        name, later = self.base(vector)
        a = self.values[name]
        slots = len(a)
        step = a.strides[0] if slots > 1 else 0
        kept = (
            1
            if slots == 2 and name in self.cell.state and not (self.training or name == self.cell.state[0])
            else -1
        )
        return a.ctypes.data, step, a.strides[1], later, kept

    def gradient(self, vector: str) -> tuple[int, int, int, int]:
        """A vector's gradient in a table."""
        name, later = self.base(vector)
        a = self.gradients[name]
        return a.ctypes.data, a.strides[0] if len(a) > 1 else 0, a.strides[1], later

    def normalized(self, norm: Norm) -> np.ndarray:
        """The table of a normalisation; the places of gradients in it are written by `make_gradients`."""
        pairs = zip(norm.inputs, norm.outputs, strict=True)
        rows = [(*self.value(a), *self.value(z), *(0,) * 2 * GRADIENT_FIELDS) for a, z in pairs]
        factors = aligned((self.T, self.B))
        units = self.units[self.base(norm.inputs[0])[0]]
        table = np.array([len(rows), units, factors.ctypes.data, *sum(rows, ())], np.int64)
        self.norms.append((norm, table, factors))
        return table

    def make_gradients(self) -> None:
        for name, units in self.units.items():
            slots = 2 if name in self.cell.state else 1
            self.gradients[name] = aligned((slots, self.B, row_units(units)), zero=True)
        for norm, table, _ in self.norms:
            entries = table[NORM_HEAD:].reshape(-1, NORM_FIELDS)
            for entry, a, z in zip(entries, norm.inputs, norm.outputs, strict=True):
                entry[10:] = *self.gradient(a), *self.gradient(z)


def _place(plan: np.ndarray, values: dict[Any, Any]) -> None:
    """Write into a stage's plan: numbers as they are, arrays as their addresses."""
    for place_of, value in values.items():
        plan[place_of] = value.ctypes.data if isinstance(value, np.ndarray) else value


def prepare(
    cell: Cell, shape: tuple[int, int, int, int, int], x: np.ndarray, kernel: np.ndarray, recurrent_kernel: np.ndarray,
    bias: np.ndarray | None, params: tuple[Any, ...], state: tuple[Any, ...] | None, valid: np.ndarray | None,
    training: bool, aux: tuple[Any, ...], recurrent_mask: Any, projection: np.ndarray | None,
    shards: int, units: bool, apart: bool, at_once: int,
) -> Prepared:  # fmt: skip
    """A forward pass on arrays of the right shapes and dtypes, shared by `shards` threads, by units or by the batch."""
    T, B, I, H, Q = shape
    memory = _Memory(cell, T, B, H, Q, training)
    for k, s in enumerate(cell.state):
        first, n = memory.values[s][0], memory.units[s]
        first[:, n:] = 0
        first[:, :n] = 0 if state is None else state[k]
    param_rows = aligned((len(params), row_units(H)), zero=True)
    for row, param in zip(param_rows, params, strict=True):
        row[:H] = param
    kept: list[Any] = [x, kernel, recurrent_kernel, bias, projection, valid, param_rows]
    common = {
        P.T: T, P.B: B, P.UNITS_SPLIT: int(units), P.TRAINING: int(training), P.PARAMS: param_rows,
        P.PARAM_B: 4 * row_units(H), P.PLAIN: plain_families(),
    }  # fmt: skip
    if valid is not None:
        common[P.VALID] = valid
    if aux:
        widths = {a: Q if any(s.projects and a in s.aux for s in cell.stages) else H for a in cell.aux}
        steps = [by_step(a, (T, B, widths[name])) for name, a in zip(cell.aux, aux, strict=True)]
        common[P.AUX] = np.array([(a.ctypes.data, *a.strides[:2]) for a in steps], np.int64)
        kept += steps
    if recurrent_mask is not None:
        mask = by_step(recurrent_mask, (T, B, Q))
        kept.append(mask)
        common |= {P.MASK: mask, P.MASK_T: mask.strides[0], P.MASK_B: mask.strides[1]}
        for name in _sources(cell):
            memory.fed[name] = aligned((T, B, row_units(Q)))
            if name in cell.state:
                memory.fed[name][0, :, :Q] = memory.values[name][0, :, :Q] * mask[0]
    plans, slabs = np.zeros((len(cell.stages), len(P)), np.int64), []
    flags = aligned((shards * threads.FLAG_BYTES // 4,), zero=True)
    scratch = aligned((shards, _scratch_floats(cell)))
    zeros = aligned((TILE_COLUMNS * LANES,), zero=True)
    for plan, stage in zip(plans, cell.stages, strict=True):
        lay = Layout.of(stage)
        made, features = (Q if stage.projects else H), (I if stage.x_gates else 0)
        blocks, depth = -(-made // lay.width), memory.units[stage.source]
        sizes = {
            P.BP: blocks * lay.pre * lay.width,
            P.WP: blocks * features * lay.x_gates * lay.width,
            P.RP: blocks * depth * lay.h_gates * lay.width if lay.h_gates else 0,
        }
        here_apart = apart and bool(stage.x_gates)
        if training or here_apart:
            sizes[P.GATES] = blocks * T * B * lay.pre * lay.width
        if training:
            sizes[P.EXTRA] = blocks * T * B * lay.extra * lay.width
        pieces = [0] * len(P)
        slab, _ = carve(pieces, {P.BP: sizes.pop(P.BP)}, sizes)
        slabs.append(slab)
        plan[:] = pieces
        fed = memory.fed.get(stage.source) if not stage.projects else None
        fed_at, fed_step, fed_row, _, _ = memory.value(stage.source)
        if fed is not None:
            fed_at, fed_step, fed_row = fed.ctypes.data, *fed.strides[:2]
        x_column, h_column = columns(cell, stage)
        vectors, norms = _vector_table(cell, stage, memory), [memory.normalized(norm) for norm in stage.norms]
        norm_addresses = np.array([t.ctypes.data for t in norms], np.int64)
        kept += [vectors, x_column, h_column, norm_addresses]
        _place(plan, common | {
            P.I: features, P.H: made, P.K: depth, P.HP: blocks * lay.width, P.BLOCKS: blocks, P.APART: int(here_apart),
            P.FLAGS: flags, P.SCRATCH: scratch, P.ZEROS: zeros, P.X: x, P.KERNEL: kernel,
            P.RECURRENT: projection if stage.projects else recurrent_kernel,
            P.X_ROW: kernel.shape[1], P.H_ROW: Q if stage.projects else recurrent_kernel.shape[1],
            P.X_COLUMN: x_column, P.H_COLUMN: h_column, P.FUSED: _tables(stage), P.VECTORS: vectors, P.NORMS: norm_addresses,
            P.FED: fed_at, P.FED_T: fed_step, P.FED_B: fed_row,
        })  # fmt: skip
        if bias is not None and stage.x_gates:
            plan[P.BIAS] = bias.ctypes.data
        if not stage.projects:  # nothing is dropped on the way into a projection
            plan[P.D_MASK] = plan[P.MASK]
    kept += [*common.values(), flags, scratch, zeros, slabs, memory]

    def finish() -> Forward:
        values = [memory.values[s] for s in cell.state]
        last = [a[T] if len(a) == T + 1 else a[T & 1] for a in values]
        final = tuple(a[:, : memory.units[s]].copy() for a, s in zip(last, cell.state, strict=True))
        h = values[0][1:, :, :Q]
        if not training:
            kept.clear()
            return Forward(h, final, None, None)
        residual = Residual(
            cell=cell, shape=(T, B, H, Q), features=I, plans=plans, kept=kept, memory=memory, flags=flags,
            has_bias=bias is not None, shards=shards, at_once=at_once,
        )  # fmt: skip
        return Forward(h, final, tuple(a[1:, :, :H] for a in values[1:]), residual)

    return Prepared(forward_kernel(cell), plans, shards, finish)


def _vector_table(cell: Cell, stage: Stage, memory: _Memory) -> np.ndarray:
    """The stage's given vectors, those it makes, and the old states of the new ones among these."""
    rows = [(*memory.value(v), 0, 0, 0) for v in stage.given]
    for v in stage.made:
        fed = memory.fed.get(_state(cell, v) or v)
        rows.append((*memory.value(v), *((0, 0, 0) if fed is None else (fed.ctypes.data, *fed.strides[:2]))))
    rows += [(*memory.value(stage.made[j][:-1]), 0, 0, 0) for j in _old(cell, stage)]
    return np.array(rows, np.int64).reshape(-1, VECTOR_FIELDS)


def prepare_back(
    residual: Residual,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    need_dx: bool,
    dstates: tuple[Any, ...] | None,
) -> Prepared:
    """The backward pass of what `prepare` prepared."""
    cell, plans, memory, (T, B, H, Q) = residual.cell, residual.plans, residual.memory, residual.shape
    I, G, R = residual.features, len(cell.gates), len(cell.recurrent)
    memory.make_gradients()
    for s, d in zip(cell.state, dfinal, strict=True):
        if d is not None:
            memory.gradients[s][T & 1, :, : memory.units[s]] = d
    dkernel, drecurrent = aligned((I, G * H), zero=True), aligned((Q, R * H), zero=True)
    dprojection = aligned((H, Q)) if cell.projects else None
    dx = aligned((T, B, I)) if need_dx else None
    dparams = aligned((len(cell.params), B, row_units(H)), zero=True)
    upstream = state_gradients((dh, *(dstates or (None,) * (len(cell.state) - 1))), len(cell.state))
    kept: list[Any] = [dparams, *upstream]
    slabs, biases, begun = [], [], False
    for plan, stage in reversed(list(zip(plans, cell.stages, strict=True))):
        lay = Layout.of(stage)
        made, features, depth, blocks = (int(plan[place_of]) for place_of in (P.H, P.I, P.K, P.BLOCKS))
        zeroed = {
            P.DBP: blocks * lay.pre * lay.width,
            P.DWP: blocks * features * lay.x_gates * lay.width,
            P.DRP: blocks * depth * lay.h_gates * lay.width,
        }
        rest = {P.D: B * lay.pre * made, P.RT: lay.h_gates * made * -(-depth // LANES) * LANES}
        if need_dx:
            rest[P.WT] = lay.x_gates * made * -(-features // LANES) * LANES
        pieces = [0] * len(P)
        slab, at = carve(pieces, zeroed, rest)
        slabs.append(slab)
        _place(plan, {place_of: pieces[place_of] for place_of in (*zeroed, *rest)})
        biases.append((stage, slab[at[P.DBP] : at[P.DBP] + zeroed[P.DBP]], blocks))
        old = [stage.made[j][:-1] for j in _old(cell, stage)]
        gradients = np.array([memory.gradient(v) for v in (*stage.given, *stage.made, *old)], np.int64)
        place_of_up = [cell.state.index(memory.base(v)[0]) if memory.base(v)[1] else None for v in stage.made]
        up = np.array([upstream[0][k] if k is not None else (0, 0, 0) for k in place_of_up], np.int64)
        kept += [gradients, up]
        source_at, source_step, source_row, _ = memory.gradient(stage.source)
        _place(plan, {
            P.GRADIENTS: gradients, P.UPSTREAM: up, P.DPARAMS: dparams, P.DKERNEL: dkernel,
            P.DRECURRENT: dprojection if stage.projects else drecurrent,
            P.D_SOURCE: source_at, P.D_SOURCE_T: source_step, P.D_SOURCE_B: source_row,
        })  # fmt: skip
        if dx is not None and stage.x_gates:
            _place(plan, {P.DX: dx, P.DX_ADD: int(begun)})
            begun = True
    residual.flags[:] = 0

    def finish() -> Gradients:
        dbias = np.zeros((G, H), np.float32) if residual.has_bias else None
        for stage, packed, blocks in biases:
            if dbias is not None and stage.x_gates:
                lay = Layout.of(stage)
                rows = packed.reshape(blocks, lay.pre, lay.width).transpose(1, 0, 2).reshape(lay.pre, -1)
                dbias[columns(cell, stage)[0]] = rows[: lay.x_gates, :H]
        first = memory.gradients
        state = tuple(first[s][0, :, : memory.units[s]].copy() for s in cell.state)
        of_params = tuple(dparams.sum(1)[:, :H]) if cell.params else ()
        kept.clear()
        slabs.clear()
        del residual.kept, residual.memory, residual.plans  # their memory is free for the next step
        return Gradients(
            dx,
            dkernel,
            drecurrent,
            None if dbias is None else dbias.reshape(-1),
            of_params,
            state,
            dprojection,
        )

    return Prepared(backward_kernel(cell), plans, residual.shards, finish)
