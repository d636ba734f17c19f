"""Rung 6, bfloat16: half the bytes, and two multiply-adds a lane in one instruction.

bfloat16 is float32 without its lower 16 bits: the same range, 8 bits of precision. Weights, inputs and the outputs that go
into the next step are rounded to it; sums, gates and the cell state stay float32. AVX-512's `vdpbf16ps` takes two pairs a
lane, s + a0 w0 + a1 w1, so the weights are packed in pairs of k and the tile is rung 5's with another instruction inside:
the same loads carry twice the numbers, and the same number of instructions does twice the work.

The answer is no longer the reference's to 1e-5: an output may be off by some thousandths, which training and prediction
hardly notice. Processors with AMX (Sapphire Rapids on) have a whole matrix product of such numbers in one instruction,
`tdpbf16ps`: 16 rows by 16 units by 32 k, 256 times this one's work. The run says whether yours is one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from benchmarks.ladder.rung4_tiles import BLOCK, ROWS, cell, packed, tile
from benchmarks.ladder.rung5_threads import in_threads
from numlstm.kernels.cpu import isa, simd, threads
from numlstm.kernels.cpu.isa import LANES
from numlstm.kernels.cpu.simd import JIT_OPTIONS, VECTOR, VECTOR_BYTES, VECTOR_INT, load, operation
from numlstm.kernels.cpu.workspace import aligned

TITLE = "bfloat16"
THREADED = True
TOLERANCE = 3e-2


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None if "avx512bf16" in isa.FEATURES else "the processor has no bfloat16 dot product (AVX512_BF16)"


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@operation("v(vvv)")
def dot(b, s, x, w):
    """s + x0 w0 + x1 w1 in each lane, x and w being pairs of bfloat16."""
    pairs = ir.VectorType(BFloat(), 2 * LANES)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    return simd.call(b, name, VECTOR, s, b.bitcast(x, pairs), b.bitcast(w, pairs))


@operation("0(iv)")
def store_bf16(b, address, value):
    """The upper halves of the lanes, rounded to nearest, ties to even."""
    bits = b.bitcast(value, VECTOR_INT)
    odd = b.and_(b.lshr(bits, simd.int_const(16)), simd.int_const(1))
    halves = ir.VectorType(ir.IntType(16), LANES)
    rounded = b.lshr(b.add(bits, b.add(odd, simd.int_const(0x7FFF))), simd.int_const(16))
    b.store(b.trunc(rounded, halves), simd.pointer(b, address, halves), align=2)


@cache
def _steps() -> Any:
    many, one = (tile(rows, "dot({s}, a, {w})", dot=dot) for rows in (ROWS, 1))

    @njit(**JIT_OPTIONS)
    def steps(T, B, I, H, blocks, x, w, bias, y, h, c, s, b0, b1):
        row = blocks * VECTOR_BYTES
        for t in range(T):  # I and H in pairs; h holds bfloat16, y the outputs in float32
            old, new = h + (t & 1) * B * row, h + (1 - (t & 1)) * B * row
            for u in range(blocks):
                panel, start = w + u * (I + H) * BLOCK, bias + u * BLOCK
                b = b0
                while b < b1:
                    m = ROWS if b1 - b >= ROWS else 1
                    if m == 1:
                        one(x + (t * B + b) * I * 4, I * 4, I, old + b * row, row, H, panel, start, s)
                    else:
                        many(x + (t * B + b) * I * 4, I * 4, I, old + b * row, row, H, panel, start, s)
                    for k in range(m):
                        place = (b + k) * row + u * VECTOR_BYTES
                        cell(s + k * BLOCK, c + place, y + t * B * row + place)
                        store_bf16(new + place - u * VECTOR_BYTES // 2, load(y + t * B * row + place))
                    b += m

    return steps


def rounded(a: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def even(a: np.ndarray, axis: int) -> np.ndarray:
    """With a zero more along `axis` where its length is odd."""
    return a if a.shape[axis] % 2 == 0 else np.pad(a, [(0, int(k == axis % a.ndim)) for k in range(a.ndim)])


def paired(weights: np.ndarray, H: int) -> np.ndarray:
    """(K, 4 H), K even, as [block][K / 2][gate][lane][two of k], padded with zeros."""
    blocks = -(-H // LANES)
    out = np.zeros((blocks, len(weights) // 2, 4, LANES, 2), np.uint16)
    gates = rounded(weights).reshape(-1, 2, 4, H).transpose(0, 2, 3, 1)
    for u in range(blocks):
        columns = gates[:, :, u * LANES : (u + 1) * LANES]
        out[u, :, :, : columns.shape[2]] = columns
    return out


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, _), H = x.shape, recurrent_kernel.shape[0]
    x, kernel, recurrent_kernel = even(x, 2), even(kernel, 0), even(recurrent_kernel, 0)
    inputs, w = rounded(x), paired(np.concatenate([kernel, recurrent_kernel]), H)
    blocks, I, H2 = len(w), x.shape[2] // 2, len(recurrent_kernel) // 2
    start = packed(bias[None], H)
    y, c = aligned((T, B, blocks * LANES)), aligned((B, blocks * LANES), zero=True)
    h = aligned(
        (2, B, blocks * LANES), zero=True
    )  # the state before and after a step; half of each row is used
    shards = min(threads.get_num_threads(), B)
    s = aligned((shards, ROWS, 4, LANES))
    addresses, steps = [a.ctypes.data for a in (inputs, w, start, y, h, c)], _steps()

    def share(_, k, n):
        steps(T, B, I, H2, blocks, *addresses, s[k].ctypes.data, B * k // n, B * (k + 1) // n)

    in_threads(share, shards)
    return y[:, :, :H]
