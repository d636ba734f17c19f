"""Many float32 matrix products in one dispatch: what attention is made of, a product for each row and head.

Whole products are shared out among the threads, and each is `gemm`'s own product run by one of them, with
packing space of its own. So every element is one sum in one order, whatever the number of threads, which a
BLAS called once a matrix does not promise; and a hundred small products cost one dispatch.
"""

from __future__ import annotations

from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from . import threads
from .cache import compile_kernel
from .gemm import DEPTH, ONE_THREAD_BELOW, WIDTH, P, _product
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .microkernel import plain_families
from .plan import SIGNATURE, get, make_plan, share
from .simd import I64, JIT_OPTIONS, operation, pointer
from .workspace import address, aligned

__all__ = ["batched_matmul"]

SMALL = 32768  # multiply-adds in all: below, NumPy (whose BLAS uses one thread there) beats a dispatch


class Q(IntEnum):
    """Places in the plan."""

    OUTER = 0  # the products are numbered outer * INNER + inner
    INNER = auto()
    A = auto()
    A_OUTER = auto()  # bytes from product to product
    A_INNER = auto()
    B = auto()
    B_OUTER = auto()
    B_INNER = auto()
    C = auto()
    C_EACH = auto()
    PLANS = auto()  # gemm's plan, one for each shard
    PLAN_BYTES = auto()


@operation("0(ii)")
def _store_int(b, address, value):
    b.store(value, pointer(b, address, I64), align=8)


@cache
def _kernel() -> Any:
    product = njit(**JIT_OPTIONS)(_product)

    def products(p, shard, shards):
        own = get(p, Q.PLANS) + shard * get(p, Q.PLAN_BYTES)
        inner = get(p, Q.INNER)
        first, last = share(get(p, Q.OUTER) * inner, shard, shards)
        for k in range(first, last):
            row, column = k // inner, k % inner
            _store_int(own + P.A * 8, get(p, Q.A) + row * get(p, Q.A_OUTER) + column * get(p, Q.A_INNER))
            _store_int(own + P.B * 8, get(p, Q.B) + row * get(p, Q.B_OUTER) + column * get(p, Q.B_INNER))
            _store_int(own + P.C * 8, get(p, Q.C) + k * get(p, Q.C_EACH))
            product(own, 0, 1)

    return compile_kernel(products, "batched_matmul", repr((DEPTH, WIDTH)), SIGNATURE)


def batched_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (..., M, K) times b (..., K, N) in float32, leading axes broadcast; any strides are welcome.

    Raises:
        ValueError: the shapes do not fit.

    >>> import numpy as np
    >>> batched_matmul(np.ones((2, 5, 3, 4), np.float32), np.ones((5, 4, 2), np.float32)).shape
    (2, 5, 3, 2)
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"batched_matmul: expected (..., M, K) and (..., K, N), got {a.shape} and {b.shape}")
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    count = int(np.prod(lead, dtype=np.int64))
    work = count * M * N * K
    if work <= SMALL:
        return np.matmul(a, b, dtype=np.float32)
    u, v = (_two_leading_axes(np.asarray(x, np.float32), lead) for x in (a, b))
    shards = 1 if work < ONE_THREAD_BELOW else min(threads.get_num_threads(), count)
    c = aligned((count, M, N))
    vectors = -(-N // LANES)
    spaces = [  # of each shard, alive until the run is over
        {
            P.BIAS: aligned((vectors * LANES,), zero=True),
            P.PACKED: aligned((min(vectors, WIDTH) * LANES, min(K, DEPTH))),
            P.SCRATCH: aligned((TILE_ROWS, TILE_COLUMNS * LANES)),
            P.PLAIN: plain_families(),
            P.FLAGS: aligned((threads.FLAG_BYTES // 4,), zero=True),
        }
        for _ in range(shards)
    ]
    sizes = {
        P.M: M, P.N: N, P.DEPTH_K: K, P.A_ROW: u.strides[2], P.A_K: u.strides[3],
        P.B_K: v.strides[2], P.B_COLUMN: v.strides[3], P.C_ROW: 4 * N,
    }  # fmt: skip
    plans = np.stack([make_plan(P, sizes, space) for space in spaces])
    places = {
        Q.OUTER: u.shape[0], Q.INNER: u.shape[1], Q.A_OUTER: u.strides[0], Q.A_INNER: u.strides[1],
        Q.B_OUTER: v.strides[0], Q.B_INNER: v.strides[1], Q.C_EACH: 4 * M * N, Q.PLAN_BYTES: plans.strides[0],
    }  # fmt: skip
    plan = make_plan(Q, places, {Q.A: u, Q.B: v, Q.C: c, Q.PLANS: plans})
    threads.run(_kernel(), address(plan), shards)
    return c.reshape(*lead, M, N)


def _two_leading_axes(x: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """(..., R, C) as (outer, inner, R, C): a view for up to two leading axes, broadcast ones included."""
    x = np.broadcast_to(x, lead + x.shape[-2:])
    if len(lead) > 2:
        return x.reshape(-1, *x.shape[-3:])
    return x[(None,) * (2 - len(lead))]
