"""Rung 5, blocked and threaded: a block's weights are read once for all rows, and the rows are shared out.

Rung 4 goes through all weights for each tile of rows, so that a matrix larger than L2 comes from L3 for every six rows.
Here the blocks of units are the outer loop: the weights of one block, 16 units wide, stay near while all rows go by.

And threads: the rows of a batch are independent, so each thread runs all steps of its own rows and nobody waits for
anybody. (Where the batch is small or the matrix large, kernels/cpu/sequence.py splits the units instead: then every step
ends at a barrier, since the next one reads all units.) The threads are Python's, with the interpreter's lock released;
the library keeps its own awake (kernels/cpu/threads.py), since waking one takes as long as a short sequence. The order of
every sum is that of rung 4, so the bits are the same on any number of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from benchmarks.ladder.rung4_tiles import BLOCK, ROWS, cell, packed, tile
from numlstm.kernels.cpu import threads
from numlstm.kernels.cpu.isa import LANES
from numlstm.kernels.cpu.simd import JIT_OPTIONS, VECTOR_BYTES
from numlstm.kernels.cpu.workspace import aligned

TITLE = "blocked and threaded"
THREADED = True
TOLERANCE = 1e-5


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


@cache
def _steps() -> Any:
    many, one = tile(ROWS), tile(1)

    @njit(**JIT_OPTIONS)
    def steps(T, B, I, H, blocks, x, w, bias, h, c, s, b0, b1):
        row = blocks * VECTOR_BYTES
        for t in range(T):
            for u in range(blocks):  # outside, and the rows inside
                panel, start = w + u * (I + H) * BLOCK, bias + u * BLOCK
                b = b0
                while b < b1:
                    m = ROWS if b1 - b >= ROWS else 1
                    at = t * B + b
                    if m == 1:
                        one(x + at * I * 4, I * 4, I, h + at * row, row, H, panel, start, s)
                    else:
                        many(x + at * I * 4, I * 4, I, h + at * row, row, H, panel, start, s)
                    for k in range(m):
                        place = k * row + u * VECTOR_BYTES
                        cell(s + k * BLOCK, c + b * row + place, h + (at + B) * row + place)
                    b += m

    return steps


def in_threads(share, count):
    """share(0, k, count) for each k, at the same time."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda k: share(0, k, count), range(count)))


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, I), H = x.shape, recurrent_kernel.shape[0]
    w, start = packed(np.concatenate([kernel, recurrent_kernel]), H), packed(bias[None], H)
    h, c = aligned((T + 1, B, len(w) * LANES)), aligned((B, len(w) * LANES), zero=True)
    h[0] = 0
    shards = min(threads.get_num_threads(), B)
    s = aligned((shards, ROWS, 4, LANES))  # scratch for each thread
    addresses = [a.ctypes.data for a in (x, w, start, h, c)]
    steps = _steps()

    def share(_, k, n):  # what thread k of n does
        steps(T, B, I, H, len(w), *addresses, s[k].ctypes.data, B * k // n, B * (k + 1) // n)

    in_threads(share, shards)
    return h[1:, :, :H]
