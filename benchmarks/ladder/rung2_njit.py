"""Rung 2, plain @njit: the same loops written out, and compiled by Numba.

Nothing is allocated any more and Python is gone. The inner loop runs along a row of weights, so LLVM makes vector
instructions of it. Yet it may well be slower than rung 1, and that is worth seeing: the sums z go through memory (L1) at
every k, one load, one multiply-add and one store each, where BLAS keeps them in registers; and exp and tanh are calls of C
functions, one number at a time. A compiler removes interpreters, not memory traffic.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

TITLE = "plain @njit"
THREADED = False
TOLERANCE = 1e-5


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


@njit(nogil=True)
def sigmoid(x):
    return np.float32(1) / (np.float32(1) + math.exp(-x))


@njit(nogil=True, error_model="numpy")
def steps(x, kernel, recurrent_kernel, bias, h, c, z):
    T, B, I = x.shape
    H = c.shape[1]
    for t in range(T):
        for b in range(B):
            for j in range(4 * H):
                z[j] = bias[j]
            for k in range(I):
                for j in range(4 * H):
                    z[j] += x[t, b, k] * kernel[k, j]
            for k in range(H):
                for j in range(4 * H):
                    z[j] += h[t, b, k] * recurrent_kernel[k, j]
            for u in range(H):
                i, f, g, o = sigmoid(z[u]), sigmoid(z[H + u]), math.tanh(z[2 * H + u]), sigmoid(z[3 * H + u])
                c[b, u] = f * c[b, u] + i * g
                h[t + 1, b, u] = o * math.tanh(c[b, u])


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, _), H = x.shape, recurrent_kernel.shape[0]
    h = np.zeros((T + 1, B, H), np.float32)  # h[0]: the initial state
    steps(x, kernel, recurrent_kernel, bias, h, np.zeros((B, H), np.float32), np.empty(4 * H, np.float32))
    return h[1:]
