"""Rung 3, fused gates: four sums in registers, and the cell on them before they ever reach memory.

For a vector of units the pre-activations of all four gates are summed up side by side, in four registers, and the cell's
equations follow at once, with exp and tanh on whole vectors (kernels/cpu/math.py; `vec` is a register full of float32).
z is gone: per multiply-add there is one load of a weight and nothing else.

What is left to gain: each weight is loaded for one multiply-add only. A processor that does one of each a cycle from L1
gets half that from L2 or less, and the weights of a layer do not fit in L1. And they are read down the columns, a row of
4 H floats apart: with H a multiple of 256 all of a vector's weights fall into one set of the L1 cache and push each other
out, where rung 2 ran along the rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from numlstm.kernels.cpu.isa import LANES
from numlstm.kernels.cpu.math import sigmoid, tanh
from numlstm.kernels.cpu.simd import JIT_OPTIONS, load_n, load_scalar, splat, store_n

TITLE = "fused gates"
THREADED = False
TOLERANCE = 1e-5


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


@njit(**JIT_OPTIONS)
def steps(T, B, I, H, x, kernel, recurrent_kernel, bias, h, c):
    """All arrays by their addresses: x [T][B][I], h [T + 1][B][H], c [B][H]."""
    gate, row = 4 * H, 16 * H  # bytes from gate to gate, and of a row of weights
    for t in range(T):
        for b in range(B):
            x_row, h_row = x + (t * B + b) * I * 4, h + (t * B + b) * gate
            for u in range(0, H, LANES):
                at, n = u * 4, H - u  # the last vector may be cut short
                i, f = load_n(bias + at, n), load_n(bias + gate + at, n)
                g, o = load_n(bias + 2 * gate + at, n), load_n(bias + 3 * gate + at, n)
                for k in range(I):
                    a, w = splat(load_scalar(x_row + 4 * k)), kernel + k * row + at
                    i, f = i + a * load_n(w, n), f + a * load_n(w + gate, n)
                    g, o = g + a * load_n(w + 2 * gate, n), o + a * load_n(w + 3 * gate, n)
                for k in range(H):
                    a, w = splat(load_scalar(h_row + 4 * k)), recurrent_kernel + k * row + at
                    i, f = i + a * load_n(w, n), f + a * load_n(w + gate, n)
                    g, o = g + a * load_n(w + 2 * gate, n), o + a * load_n(w + 3 * gate, n)
                c_at = c + b * gate + at
                new = sigmoid(f) * load_n(c_at, n) + sigmoid(i) * tanh(g)
                store_n(c_at, new, n)
                store_n(h_row + B * gate + at, sigmoid(o) * tanh(new), n)


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, I), H = x.shape, recurrent_kernel.shape[0]
    h, c = np.zeros((T + 1, B, H), np.float32), np.zeros((B, H), np.float32)
    steps(T, B, I, H, *(a.ctypes.data for a in (x, kernel, recurrent_kernel, bias, h, c)))
    return h[1:]
