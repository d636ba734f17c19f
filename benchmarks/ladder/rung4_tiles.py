"""Rung 4, packed tiles: one load of a weight serves several rows, and the weights lie in the order they are read in.

A tile is ROWS rows of the batch by the four gates of one vector of units: with 32 registers 6 x 4 sums, a row of four
weights and one broadcast. Per k it loads 4 weights and 6 inputs and does 24 multiply-adds, so the multiply-adds are what
limits it, no longer the loads. The weights are packed once a call, [block of units][k][gate][lane], a stream that the
processor fetches ahead; padded with zeros to whole vectors, so that no load is masked. The tile's sums go to a scratch
array in L1, where the cell meets them.

The tile is emitted as text, one name for each sum: LLVM keeps names in registers. (kernels/cpu/microkernel.py builds the
same at the level below, for any number of gates and rows.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from numlstm.kernels.cpu.isa import LANES, REGISTERS
from numlstm.kernels.cpu.math import sigmoid, tanh
from numlstm.kernels.cpu.simd import JIT_OPTIONS, VECTOR_BYTES, load, load_scalar, splat, store
from numlstm.kernels.cpu.workspace import aligned

TITLE = "packed tiles"
THREADED = False
TOLERANCE = 1e-5

ROWS = (REGISTERS - 5) // 4  # rows x 4 sums, 4 weights, 1 broadcast
BLOCK = 4 * VECTOR_BYTES  # a row of packed weights, or of the tile


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


def tile_source(rows: int, add: str) -> str:
    """tile(x, x_row, nx, h, h_row, nh, w, bias, out); `add` is the sum s with the product of a and w added."""
    o = ["def tile(x, x_row, nx, h, h_row, nh, w, bias, out):"]
    o += [f"    s{m}_{g} = load(bias + {g * VECTOR_BYTES})" for m in range(rows) for g in range(4)]
    for a in ("x", "h"):
        o.append(f"    for k in range(n{a}):")
        o += [f"        w{g} = load(w + {g * VECTOR_BYTES})" for g in range(4)]
        for m in range(rows):
            o.append(f"        a = splat(load_scalar({a} + {m} * {a}_row + 4 * k))")
            o += [f"        s{m}_{g} = " + add.format(s=f"s{m}_{g}", w=f"w{g}") for g in range(4)]
        o.append(f"        w += {BLOCK}")
    o += [f"    store(out + {m * BLOCK + g * VECTOR_BYTES}, s{m}_{g})" for m in range(rows) for g in range(4)]
    return "\n".join(o) + "\n"


@cache
def tile(rows: int, add: str = "{s} + a * {w}", **more: Any) -> Any:
    """The tile, compiled."""
    scope = {"load": load, "store": store, "splat": splat, "load_scalar": load_scalar, **more}
    exec(tile_source(rows, add), scope)
    return njit(**JIT_OPTIONS)(scope["tile"])


@njit(**JIT_OPTIONS)
def cell(s, c, h):
    """One row of a tile: its gates at s, a vector of the cell state and of the output."""
    i, f = sigmoid(load(s)), sigmoid(load(s + VECTOR_BYTES))
    g, o = tanh(load(s + 2 * VECTOR_BYTES)), sigmoid(load(s + 3 * VECTOR_BYTES))
    new = f * load(c) + i * g
    store(c, new)
    store(h, o * tanh(new))


@cache
def _steps() -> Any:
    many, one = tile(ROWS), tile(1)

    @njit(**JIT_OPTIONS)
    def steps(T, B, I, H, blocks, x, w, bias, h, c, s):
        row = blocks * VECTOR_BYTES  # of h and c, padded
        for t in range(T):
            b = 0
            while b < B:
                m = ROWS if B - b >= ROWS else 1
                at = t * B + b
                for u in range(blocks):
                    panel, start = w + u * (I + H) * BLOCK, bias + u * BLOCK
                    if m == 1:
                        one(x + at * I * 4, I * 4, I, h + at * row, row, H, panel, start, s)
                    else:
                        many(x + at * I * 4, I * 4, I, h + at * row, row, H, panel, start, s)
                    for k in range(m):
                        place = k * row + u * VECTOR_BYTES
                        cell(s + k * BLOCK, c + b * row + place, h + (at + B) * row + place)
                b += m

    return steps


def packed(weights: np.ndarray, H: int) -> np.ndarray:
    """(K, 4 H) as [block][K][gate][lane], padded with zeros."""
    blocks = -(-H // LANES)
    out = aligned((blocks, len(weights), 4, LANES), zero=True)
    for u in range(blocks):
        columns = weights.reshape(-1, 4, H)[:, :, u * LANES : (u + 1) * LANES]
        out[u, :, :, : columns.shape[2]] = columns
    return out


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, I), H = x.shape, recurrent_kernel.shape[0]
    w, start = packed(np.concatenate([kernel, recurrent_kernel]), H), packed(bias[None], H)
    h, c = aligned((T + 1, B, len(w) * LANES)), aligned((B, len(w) * LANES), zero=True)
    h[0] = 0
    s = aligned((ROWS, 4, LANES))
    _steps()(T, B, I, H, len(w), *(a.ctypes.data for a in (x, w, start, h, c, s)))
    return h[1:, :, :H]
