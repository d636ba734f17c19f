"""What surrounds the sequences, fused, float32: cross-entropy over rows, the gradient of an embedding, random masks,
optimizers' updates.

The formulas are those of ../reference_pointwise.py, whose docstrings name their sources; the tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum, auto
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit

from . import threads
from .cache import compile_kernel
from .isa import LANES
from .math import exp, log, maximum, sqrt
from .plan import SIGNATURE, get, make_plan, share
from .simd import (
    F32,
    I32,
    I64,
    INNER_OPTIONS,
    VECTOR,
    VECTOR_BYTES,
    K,
    horizontal_max,
    horizontal_sum,
    keep_n,
    load_int,
    load_n,
    load_n_else,
    load_scalar,
    operation,
    pointer,
    splat,
    store_n,
    store_scalar,
    zero_bytes,
)
from .threads import barrier
from .workspace import address, aligned

__all__ = [
    "Updates",
    "dropout_mask",
    "embedding",
    "embedding_gradient",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_gradient",
    "softmax_gradient",
]

ONE_THREAD_BELOW = 1 << 17  # elements


def _shards(elements: int) -> int:
    return 1 if elements < ONE_THREAD_BELOW else threads.get_num_threads()


# Softmax cross-entropy


class Rows(IntEnum):
    """Places in the plan of the kernels over rows."""

    M = 0
    V = auto()
    X = auto()
    X_ROW = auto()  # bytes between rows
    LABELS = auto()
    LOSSES = auto()
    STATS = auto()  # for each row the largest logit, and the sum of exp(logit - largest)
    DLOSSES = auto()
    D = auto()


def _softmax_cross_entropy(p, shard, shards):
    V, x_row = get(p, Rows.V), get(p, Rows.X_ROW)
    first, last = share(get(p, Rows.M), shard, shards)
    for r in range(first, last):
        x, stats = get(p, Rows.X) + r * x_row, get(p, Rows.STATS) + 8 * r
        top = K(-np.inf)
        for v in range(0, V, LANES):
            top = maximum(top, load_n_else(x + v * 4, V - v, K(-np.inf)))
        largest = splat(horizontal_max(top))
        total = K(0.0)
        for v in range(0, V, LANES):
            total = total + keep_n(exp(load_n(x + v * 4, V - v) - largest), V - v)
        whole = splat(horizontal_sum(total))
        label = load_int(get(p, Rows.LABELS) + 8 * r)
        loss = log(whole) - (splat(load_scalar(x + label * 4)) - largest)
        store_n(get(p, Rows.LOSSES) + r * 4, loss, 1)
        store_n(stats, largest, 1)
        store_n(stats + 4, whole, 1)


def _softmax_cross_entropy_gradient(p, shard, shards):
    V, x_row = get(p, Rows.V), get(p, Rows.X_ROW)
    first, last = share(get(p, Rows.M), shard, shards)
    for r in range(first, last):
        x, d, stats = get(p, Rows.X) + r * x_row, get(p, Rows.D) + r * V * 4, get(p, Rows.STATS) + 8 * r
        upstream = load_scalar(get(p, Rows.DLOSSES) + 4 * r)
        if upstream == 0:  # a row that does not count: padding, or a class to ignore
            zero_bytes(d, V * 4)
        else:
            largest, scale = splat(load_scalar(stats)), splat(upstream) / splat(load_scalar(stats + 4))
            for v in range(0, V, LANES):
                store_n(d + v * 4, exp(load_n(x + v * 4, V - v) - largest) * scale, V - v)
            at = d + load_int(get(p, Rows.LABELS) + 8 * r) * 4
            store_scalar(at, load_scalar(at) - upstream)


@cache
def _softmax_kernel(backward: bool) -> Any:
    function = _softmax_cross_entropy_gradient if backward else _softmax_cross_entropy
    return compile_kernel(function, function.__name__.lstrip("_"), "", SIGNATURE)


class CrossEntropy(NamedTuple):
    """What `softmax_cross_entropy` keeps for the gradient: its arguments, and two numbers a row."""

    logits: np.ndarray
    labels: np.ndarray
    stats: np.ndarray


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, CrossEntropy]:
    """Losses (M,) of logits (M, V) against integer labels (M,), and what the gradient needs.

    Of the probabilities only each row's largest logit and sum are kept: computing them a second time takes less than
    writing and reading (M, V) of them.

    Raises:
        ValueError: a label is not in 0..V-1, or the shapes do not fit.

    >>> import numpy as np
    >>> losses, residual = softmax_cross_entropy(np.zeros((1, 4), np.float32), np.array([2]))
    >>> round(float(losses[0]), 4)
    1.3863
    >>> softmax_cross_entropy_gradient(residual, np.ones(1, np.float32)).tolist()
    [[0.25, 0.25, -0.75, 0.25]]
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape (M, V), got {logits.shape}")
    M, V = logits.shape
    if labels.shape != (M,) or labels.dtype.kind not in "iub":
        raise ValueError(
            f"labels: expected whole numbers of shape {(M,)}, got {labels.dtype} of {labels.shape}"
        )
    if M and (labels.min() < 0 or labels.max() >= V):
        raise ValueError(f"labels: expected whole numbers in 0..{V - 1}, got {labels.min()}..{labels.max()}")
    labels = np.ascontiguousarray(labels, np.int64)
    if logits.dtype != np.float32 or (V > 1 and logits.strides[1] != 4):
        logits = np.ascontiguousarray(logits, np.float32)
    losses, stats = aligned((M,)), aligned((M, 2))
    arrays = {Rows.X: logits, Rows.LABELS: labels, Rows.LOSSES: losses, Rows.STATS: stats}
    plan = make_plan(Rows, {Rows.M: M, Rows.V: V, Rows.X_ROW: logits.strides[0]}, arrays)
    threads.run(_softmax_kernel(False), address(plan), _shards(M * V))
    return losses, CrossEntropy(logits, labels, stats)


def softmax_cross_entropy_gradient(residual: CrossEntropy, dlosses: np.ndarray) -> np.ndarray:
    """The gradient of the logits (M, V) from that of the losses (M,). A loss whose gradient is 0 gives a row of zeros.

    Raises:
        ValueError: `dlosses` has another shape than the losses.
    """
    logits, labels, stats = residual
    M, V = logits.shape
    if dlosses.shape != (M,):
        raise ValueError(f"dlosses: expected shape {(M,)}, got {dlosses.shape}")
    dlosses, d = np.ascontiguousarray(dlosses, np.float32), aligned((M, V))
    arrays = {Rows.X: logits, Rows.LABELS: labels, Rows.STATS: stats, Rows.DLOSSES: dlosses, Rows.D: d}
    plan = make_plan(Rows, {Rows.M: M, Rows.V: V, Rows.X_ROW: logits.strides[0]}, arrays)
    threads.run(_softmax_kernel(True), address(plan), _shards(M * V))
    return d


# Softmax


class Softmax(IntEnum):
    """Places in the plan of a softmax over rows, all of V floats one after the other."""

    M = 0
    V = auto()
    X = auto()  # the rows; in the backward pass the probabilities' gradient
    Y = auto()  # the probabilities
    D = auto()  # the rows' gradient


def _softmax(p, shard, shards):
    V = get(p, Softmax.V)
    first, last = share(get(p, Softmax.M), shard, shards)
    for r in range(first, last):
        x, y = get(p, Softmax.X) + r * V * 4, get(p, Softmax.Y) + r * V * 4
        top = K(-np.inf)
        for v in range(0, V, LANES):
            top = maximum(top, load_n_else(x + v * 4, V - v, K(-np.inf)))
        largest, total = splat(horizontal_max(top)), K(0.0)
        for v in range(0, V, LANES):
            e = keep_n(exp(load_n(x + v * 4, V - v) - largest), V - v)
            total = total + e
            store_n(y + v * 4, e, V - v)
        whole = splat(horizontal_sum(total))
        for v in range(0, V, LANES):
            store_n(y + v * 4, load_n(y + v * 4, V - v) / whole, V - v)


def _softmax_gradient(p, shard, shards):
    V = get(p, Softmax.V)
    first, last = share(get(p, Softmax.M), shard, shards)
    for r in range(first, last):
        dy, y, d = get(p, Softmax.X) + r * V * 4, get(p, Softmax.Y) + r * V * 4, get(p, Softmax.D) + r * V * 4
        total = K(0.0)
        for v in range(0, V, LANES):
            total = total + load_n(dy + v * 4, V - v) * load_n(y + v * 4, V - v)
        along = splat(horizontal_sum(total))
        for v in range(0, V, LANES):
            store_n(d + v * 4, load_n(y + v * 4, V - v) * (load_n(dy + v * 4, V - v) - along), V - v)


@cache
def _softmax_rows(backward: bool) -> Any:
    function = _softmax_gradient if backward else _softmax
    return compile_kernel(function, function.__name__.lstrip("_"), "", SIGNATURE)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) over its sum, along the rows of x (M, V).

    >>> softmax(np.zeros((1, 4), np.float32)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    (M, V), x = x.shape, np.ascontiguousarray(x, np.float32)
    y = aligned((M, V))
    plan = make_plan(Softmax, {Softmax.M: M, Softmax.V: V}, {Softmax.X: x, Softmax.Y: y})
    threads.run(_softmax_rows(False), address(plan), _shards(M * V))
    return y


def softmax_gradient(y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The gradient of x (M, V) from that of y = softmax(x), y (dy - the sum of y dy)."""
    if y.shape != dy.shape:
        raise ValueError(f"dy: expected shape {y.shape}, got {dy.shape}")
    M, V = y.shape
    y, dy, d = np.ascontiguousarray(y, np.float32), np.ascontiguousarray(dy, np.float32), aligned((M, V))
    plan = make_plan(Softmax, {Softmax.M: M, Softmax.V: V}, {Softmax.X: dy, Softmax.Y: y, Softmax.D: d})
    threads.run(_softmax_rows(True), address(plan), _shards(M * V))
    return d


# Embeddings: the gradient of the rows that were taken


class Taken(IntEnum):
    """Places in the plan of the embedding's gradient."""

    M = 0
    E = auto()
    IDS = auto()
    DY = auto()
    DY_ROW = auto()  # bytes between rows
    INDEX = auto()  # for each row of the table its place among VALUES, or -1
    SLOTS = auto()  # for each id the place of its row, or -1 - place where it is the first to take it
    COUNT = auto()  # address: how many different rows
    VALUES = auto()
    FLAGS = auto()


@operation("0(ii)")
def _store_int(b, place, value):
    b.store(value, pointer(b, place, I64), align=8)


def _embedding_gradient(p, shard, shards):
    M, E, values, slots = get(p, Taken.M), get(p, Taken.E), get(p, Taken.VALUES), get(p, Taken.SLOTS)
    if shard == 0:
        count, index = 0, get(p, Taken.INDEX)
        for m in range(M):
            at = index + 8 * load_int(get(p, Taken.IDS) + 8 * m)
            slot = load_int(at)
            if slot < 0:
                _store_int(at, count)
                _store_int(slots + 8 * m, -1 - count)
                count += 1
            else:
                _store_int(slots + 8 * m, slot)
        _store_int(get(p, Taken.COUNT), count)
    barrier(get(p, Taken.FLAGS), shard, shards, 1)
    # A thread owns columns, so that every sum goes in the order of the ids whatever the threads.
    first, last = share((E + LANES - 1) // LANES, shard, shards)
    for m in range(M):
        slot, dy = load_int(slots + 8 * m), get(p, Taken.DY) + m * get(p, Taken.DY_ROW)
        if slot < 0:
            out = values + (-1 - slot) * E * 4
            for v in range(first, last):
                n, q = E - v * LANES, v * VECTOR_BYTES
                store_n(out + q, load_n(dy + q, n), n)
        else:
            out = values + slot * E * 4
            for v in range(first, last):
                n, q = E - v * LANES, v * VECTOR_BYTES
                store_n(out + q, load_n(out + q, n) + load_n(dy + q, n), n)


@cache
def _embedding_kernel() -> Any:
    return compile_kernel(_embedding_gradient, "embedding_gradient", "", SIGNATURE)


def embedding(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of `table` (V, E) by integer `ids` of any shape: (*ids.shape, E).

    Raises:
        ValueError: an id is not in 0..V-1.
    """
    V, E = table.shape
    flat = np.ascontiguousarray(ids, np.int64).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= V):
        raise ValueError(f"ids: expected whole numbers in 0..{V - 1}, got {flat.min()}..{flat.max()}")
    out = aligned((flat.size, E))
    # The ids are in range; "clip" spares a buffer that NumPy else fills first.
    return table.take(flat, axis=0, out=out, mode="clip").reshape(*ids.shape, E)


def embedding_gradient(ids: np.ndarray, dy: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of a table of `rows` rows from `dy` (M, E) and the `ids` (M,) that took them.

    Returns `index` (rows,), for each row its place among `values` or -1 if nobody took it, and `values` (U, E), the sums,
    in the order in which the rows were first taken. Each sum goes in the order of the ids.

    >>> import numpy as np
    >>> index, values = embedding_gradient(np.array([2, 0, 2]), np.ones((3, 1), np.float32), 4)
    >>> index.tolist(), values.tolist()
    ([1, -1, 0, -1], [[2.0], [1.0]])
    """
    M, E = dy.shape
    ids = np.ascontiguousarray(ids, np.int64)
    if ids.shape != (M,) or (M and (ids.min() < 0 or ids.max() >= rows)):
        raise ValueError(f"ids: expected {M} whole numbers in 0..{rows - 1}, got shape {ids.shape}")
    if dy.dtype != np.float32 or (E > 1 and dy.strides[1] != 4):
        dy = np.ascontiguousarray(dy, np.float32)
    index, slots, count = np.full(rows, -1, np.int64), np.empty(M, np.int64), np.zeros(1, np.int64)
    values, shards = aligned((min(M, rows), E)), _shards(M * E)
    arrays = {
        Taken.IDS: ids, Taken.DY: dy, Taken.INDEX: index, Taken.SLOTS: slots, Taken.COUNT: count, Taken.VALUES: values,
        Taken.FLAGS: aligned((shards, threads.FLAG_BYTES // 4), zero=True),
    }  # fmt: skip
    plan = make_plan(Taken, {Taken.M: M, Taken.E: E, Taken.DY_ROW: dy.strides[0]}, arrays)
    threads.run(_embedding_kernel(), address(plan), shards)
    return index, values[: count[0]]


# Random masks


class Mask(IntEnum):
    """Places in the plan of the mask kernel."""

    SIZE = 0
    OUT = auto()  # with room for a whole multiple of AT_ONCE
    SEED_LOW = auto()
    SEED_HIGH = auto()
    STREAM_LOW = auto()
    STREAM_HIGH = auto()
    BELOW = auto()  # a word below this gives 0
    SCALE = auto()  # address of the value of an element kept


PHILOX_ROUNDS, PHILOX_FACTORS, PHILOX_STEPS = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
BLOCKS = LANES // 2  # of four words, at once: a product of two words takes 64 bits
AT_ONCE = 4 * BLOCKS


@operation("0(iiiiiiif)")
def store_blocks(b, out, block, stream_low, stream_high, seed_low, seed_high, below, kept):
    """What BLOCKS blocks of Philox make of an array from `out`: 0 where the word is below `below`, else `kept`."""
    wide, values = ir.VectorType(I64, BLOCKS), ir.VectorType(F32, BLOCKS)
    order = lambda places: ir.Constant(ir.VectorType(I32, len(places)), list(places))

    def everywhere(scalar: Any, kind: Any = wide) -> Any:
        one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return b.shuffle_vector(one, one, order([0] * BLOCKS))

    of_all = lambda number: ir.Constant(wide, [number] * BLOCKS)
    low, shift = of_all(0xFFFFFFFF), of_all(32)
    index = b.add(everywhere(block), ir.Constant(wide, list(range(BLOCKS))))
    c0, c1, c2, c3 = b.and_(index, low), b.lshr(index, shift), everywhere(stream_low), everywhere(stream_high)
    for r in range(PHILOX_ROUNDS):
        k0, k1 = (
            everywhere(b.and_(b.add(seed, I64(r * step)), I64(0xFFFFFFFF)))
            for seed, step in zip((seed_low, seed_high), PHILOX_STEPS, strict=True)
        )
        p0, p1 = b.mul(of_all(PHILOX_FACTORS[0]), c0), b.mul(of_all(PHILOX_FACTORS[1]), c2)
        c0, c2 = (b.xor(b.xor(b.lshr(p, shift), c), k) for p, c, k in ((p1, c1, k0), (p0, c3, k1)))
        c1, c3 = b.and_(p1, low), b.and_(p0, low)
    limit, zero = everywhere(below), ir.Constant(values, [0.0] * BLOCKS)
    parts = [
        b.select(b.icmp_signed(">=", c, limit), everywhere(kept, values), zero) for c in (c0, c1, c2, c3)
    ]
    # A block's four words stand one after the other: pairs side by side first, then pairs of pairs.
    zipped = order([k + BLOCKS * second for k in range(BLOCKS) for second in (0, 1)])
    pairs = [b.shuffle_vector(x, y, zipped) for x, y in (parts[:2], parts[2:])]
    for half in range(2):
        blocks = range(half * BLOCKS // 2, (half + 1) * BLOCKS // 2)
        places = [2 * k + other for k in blocks for other in (0, 1, LANES, LANES + 1)]
        at = pointer(b, b.add(out, I64(half * VECTOR_BYTES)), VECTOR)
        b.store(b.shuffle_vector(*pairs, order(places)), at, align=4)


def _dropout_mask(p, shard, shards):
    size, out, below, scale = (
        get(p, Mask.SIZE),
        get(p, Mask.OUT),
        get(p, Mask.BELOW),
        load_scalar(get(p, Mask.SCALE)),
    )
    stream_low, stream_high = get(p, Mask.STREAM_LOW), get(p, Mask.STREAM_HIGH)
    seed_low, seed_high = get(p, Mask.SEED_LOW), get(p, Mask.SEED_HIGH)
    first, last = share((size + AT_ONCE - 1) // AT_ONCE, shard, shards)
    for k in range(first, last):
        store_blocks(
            out + k * AT_ONCE * 4, k * BLOCKS, stream_low, stream_high, seed_low, seed_high, below, scale
        )


@cache
def _mask_kernel() -> Any:
    return compile_kernel(_dropout_mask, "dropout_mask", "", SIGNATURE)


def dropout_mask(
    shape: tuple[int, ...], rate: float, seed: int, stream: int, dtype: Any = np.float32
) -> np.ndarray:
    """0 with probability `rate`, else 1 / (1 - rate); the same bits as ../reference_pointwise.py gives.

    >>> sorted(set(dropout_mask((100,), 0.5, 0, 0).tolist()))
    [0.0, 2.0]
    """
    if np.dtype(dtype) != np.float32:
        raise ValueError(f"dtype: this kernel makes float32 masks, not {np.dtype(dtype).name}")
    size = math.prod(shape)
    out = aligned((-(-size // AT_ONCE) * AT_ONCE,))[:size].reshape(shape)
    scale = np.array([1 / (1 - rate)], np.float32)
    sizes = {
        Mask.SIZE: size, Mask.BELOW: round(rate * 2**32),
        Mask.SEED_LOW: seed & 0xFFFFFFFF, Mask.SEED_HIGH: seed >> 32,
        Mask.STREAM_LOW: stream & 0xFFFFFFFF, Mask.STREAM_HIGH: stream >> 32,
    }  # fmt: skip
    plan = make_plan(Mask, sizes, {Mask.OUT: out, Mask.SCALE: scale})
    threads.run(_mask_kernel(), address(plan), _shards(size))
    return out


# Optimizers' updates: one dispatch for all variables of a step


class Slots(IntEnum):
    """Places in a variable's row of the table: itself, its gradient, up to three slots (0: absent), the settings."""

    SIZE = 0
    W = auto()
    G = auto()  # 0: none, the variable stays as it is
    S0 = auto()
    S1 = auto()
    S2 = auto()
    SETTINGS = auto()  # float32
    NESTEROV = auto()
    INDEX = auto()  # 0, or for each row of the variable the row of G that is its gradient, -1 for zeros
    WIDTH = auto()  # elements of such a row
    ZEROS = auto()  # as many zeros; 0 where a gradient of zeros changes nothing


class Table(IntEnum):
    """Places in the plan of an update."""

    COUNT = 0
    ROWS = auto()


@njit(**INNER_OPTIONS)
def _setting(row, k):
    return splat(load_scalar(get(row, Slots.SETTINGS) + 4 * k))


# An update is update(row, g, at, count): of `count` elements from byte `at` of the variable and its slots, the gradient at
# g. Settings begin with what the variable keeps of itself, 1 - lr * weight decay (Adam's comes last, and is lr * weight
# decay).


def _sgd(row, g, at, count):
    """Settings: keep, lr, momentum. S0: velocity."""
    w, v, nesterov = get(row, Slots.W) + at, get(row, Slots.S0), get(row, Slots.NESTEROV)
    keep, lr, momentum = _setting(row, 0), _setting(row, 1), _setting(row, 2)
    for q in range(0, 4 * count, VECTOR_BYTES):
        n = count - q // 4
        step = lr * load_n(g + q, n)
        if v != 0:
            velocity = momentum * load_n(v + at + q, n) - step
            store_n(v + at + q, velocity, n)
            change = velocity
            if nesterov != 0:
                change = momentum * velocity - step
        else:
            change = -step
        store_n(w + q, load_n(w + q, n) * keep + change, n)


def _rmsprop(row, g, at, count):
    """Settings: keep, lr, rho, momentum, eps, 1 - rho. S0: mean square, S1: mean (centred), S2: momentum."""
    w, ms, mg, mom = get(row, Slots.W) + at, get(row, Slots.S0) + at, get(row, Slots.S1), get(row, Slots.S2)
    keep, lr, rho = _setting(row, 0), _setting(row, 1), _setting(row, 2)
    momentum, eps, rest = _setting(row, 3), _setting(row, 4), _setting(row, 5)
    for q in range(0, 4 * count, VECTOR_BYTES):
        n = count - q // 4
        d = load_n(g + q, n)
        square = rho * load_n(ms + q, n) + rest * (d * d)
        store_n(ms + q, square, n)
        variance = square
        if mg != 0:
            mean = rho * load_n(mg + at + q, n) + rest * d
            store_n(mg + at + q, mean, n)
            variance = square - mean * mean
        step = lr * d / sqrt(variance + eps)
        if mom != 0:
            step = momentum * load_n(mom + at + q, n) + step
            store_n(mom + at + q, step, n)
        store_n(w + q, load_n(w + q, n) * keep - step, n)


def _adam(row, g, at, count):
    """Settings: lr_t, 1 - beta1, 1 - beta2, eps, weight decay times lr. S0: m, S1: v, S2: largest v (AMSGrad)."""
    w, m, v = get(row, Slots.W) + at, get(row, Slots.S0) + at, get(row, Slots.S1) + at
    vhat, lr, r1, r2 = get(row, Slots.S2), _setting(row, 0), _setting(row, 1), _setting(row, 2)
    eps, decay = _setting(row, 3), _setting(row, 4)
    for q in range(0, 4 * count, VECTOR_BYTES):
        n = count - q // 4
        d, mean, square, weight = load_n(g + q, n), load_n(m + q, n), load_n(v + q, n), load_n(w + q, n)
        mean = mean + r1 * (d - mean)
        square = square + r2 * (d * d - square)
        store_n(m + q, mean, n)
        store_n(v + q, square, n)
        if vhat != 0:
            square = maximum(load_n(vhat + at + q, n), square)
            store_n(vhat + at + q, square, n)
        weight = weight - decay * weight
        store_n(w + q, weight - lr * mean / (sqrt(square) + eps), n)


_RULES = {"sgd": _sgd, "rmsprop": _rmsprop, "adam": _adam}
_ROW_BYTES = 8 * len(Slots)


def _over_table(update: Any) -> Any:
    """The kernel that runs `update` on all variables of a table, each shared out by whole vectors, or by rows."""
    update = njit(**INNER_OPTIONS)(update)

    def step(p, shard, shards):
        for k in range(get(p, Table.COUNT)):
            row = get(p, Table.ROWS) + k * _ROW_BYTES
            g, size, index = get(row, Slots.G), get(row, Slots.SIZE), get(row, Slots.INDEX)
            if g != 0 and index == 0:
                first, last = share((size + LANES - 1) // LANES, shard, shards)
                if last > first:
                    at = first * VECTOR_BYTES
                    update(row, g + at, at, min(last * LANES, size) - first * LANES)
            elif g != 0:
                width, zeros = get(row, Slots.WIDTH), get(row, Slots.ZEROS)
                first, last = share(size // width, shard, shards)
                for r in range(first, last):
                    slot, start = load_int(index + 8 * r), zeros
                    if slot >= 0:
                        start = g + slot * width * 4
                    if start != 0:
                        update(row, start, r * width * 4, width)

    return step


@cache
def _update_kernel(rule: str) -> Any:
    return compile_kernel(_over_table(_RULES[rule]), rule, "", SIGNATURE)


_FLOAT32 = np.dtype(np.float32)


def _settings(rule: str, options: tuple[Any, ...], decay: float) -> tuple[float, ...]:
    """A variable's settings in the order of its rule, from the arguments that the reference's function takes."""
    if rule == "sgd":
        lr, momentum, _ = options
        return 1 - decay, lr, momentum
    if rule == "rmsprop":
        lr, rho, momentum, eps = options
        return 1 - decay, lr, rho, momentum, eps, 1 - rho
    lr_t, beta1, beta2, eps = options
    return lr_t, 1 - beta1, 1 - beta2, eps, decay


class Updates:
    """An optimizer's step over many variables, ready to be taken again and again: a table of addresses.

    Arguments:
        rule: "sgd", "rmsprop" or "adam".
        variables: for each its array and its slots, in the order of the reference's function, None where one is not used.
            They stay in place.
        decays: for each whether weight decay is for it; none if not given.

    Raises:
        ValueError: an array that is not contiguous, writeable and float32, or a slot of another shape.

    >>> import numpy as np
    >>> w = np.ones(2, np.float32)
    >>> Updates("sgd", [(w, (None,))])([np.array([1, 3], np.float32)], (0.5, 0.0, False))
    >>> w.tolist()
    [0.5, -0.5]
    """

    rule: str
    kept: list[tuple[np.ndarray, tuple[np.ndarray | None, ...]]]
    at: int
    kernel: Any

    def __init__(
        self,
        rule: str,
        variables: Sequence[tuple[np.ndarray, tuple[np.ndarray | None, ...]]],
        decays: Sequence[bool] | None = None,
    ) -> None:
        self.rule, self.kept = rule, list(variables)  # kept alive: the table holds their addresses
        self.decays: list[bool] = list(decays) if decays is not None else [False] * len(self.kept)
        self.shapes: list[tuple[int, ...]] = [w.shape for w, _ in variables]
        self.elements: int = sum(w.size for w, _ in variables)
        self.settings: np.ndarray = np.zeros((2, 16), np.float32)  # without and with weight decay
        self.table: np.ndarray = np.zeros((len(self.kept), len(Slots)), np.int64)
        for row, (w, slots), decay in zip(self.table, self.kept, self.decays, strict=True):
            for a in (w, *(s for s in slots if s is not None)):
                fits = a.dtype == np.float32 and a.shape == w.shape
                if not (fits and a.flags.c_contiguous and a.flags.writeable):
                    raise ValueError(
                        f"{rule}: variable and slots must be contiguous writeable float32 arrays of one shape"
                    )
            row[Slots.SIZE], row[Slots.W] = w.size, address(w)
            row[Slots.S0 : Slots.S0 + len(slots)] = [0 if s is None else address(s) for s in slots]
            row[Slots.SETTINGS] = address(self.settings[int(decay)])
        self.plan: np.ndarray = np.array([len(self.kept), address(self.table)], np.int64)
        self.gradients: np.ndarray = self.table[:, Slots.G]
        self.sparse: bool = False  # does the table hold the index of a gradient of rows?
        self.at, self.kernel = address(self.plan), _update_kernel(rule)

    def __call__(self, gradients: Sequence[Any], options: tuple[Any, ...], decay: float = 0.0) -> None:
        """Take the step, in place.

        Arguments:
            gradients: for each variable an array of its shape; or a pair (index, values) as `embedding_gradient` gives it,
                the rows that are not zero; or None to leave it as it is.
            options: what the reference's function takes after the slots.
            decay: learning rate times weight decay.

        Raises:
            ValueError: a gradient of another shape.
        """
        if self.sparse:
            self.table[:, Slots.INDEX] = 0
            self.sparse = False
        places, kept = [], []
        for k, (g, shape) in enumerate(zip(gradients, self.shapes, strict=True)):
            if g is None:
                places.append(0)
                continue
            if type(g) is tuple:
                g = self._rows(k, *g, shape, decay, kept)
            elif g.shape != shape:
                raise ValueError(f"{self.rule}: gradient of shape {g.shape} for a variable of shape {shape}")
            if type(g) is not np.ndarray or g.dtype is not _FLOAT32 or not g.flags.c_contiguous:
                g = np.ascontiguousarray(g, np.float32)
                kept.append(g)
            places.append(address(g))
        self.gradients[:] = places
        plain = _settings(self.rule, options, 0.0)
        self.settings[0, : len(plain)] = plain
        if decay:
            plain = _settings(self.rule, options, decay)
        self.settings[1, : len(plain)] = plain
        if self.rule == "sgd":
            self.table[:, Slots.NESTEROV] = options[2]
        threads.run(self.kernel, self.at, _shards(self.elements))

    def __reduce__(self) -> Any:
        """A copy has addresses of its own."""
        return type(self), (self.rule, self.kept, self.decays)

    def _rows(
        self,
        k: int,
        index: np.ndarray,
        values: np.ndarray,
        shape: tuple[int, ...],
        decay: float,
        kept: list[Any],
    ) -> np.ndarray:
        """Enter the gradient (index, values) of the variable `k`, which the table reads row by row."""
        if len(shape) != 2 or index.shape != shape[:1] or values.shape[1:] != shape[1:]:
            raise ValueError(
                f"{self.rule}: gradient of {index.shape} rows, of which {values.shape} are not zero, for a variable of "
                f"shape {shape}"
            )
        row, slots = self.table[k], self.kept[k][1]
        row[Slots.INDEX], row[Slots.WIDTH], row[Slots.ZEROS] = address(index), shape[1], 0
        if any(s is not None for s in slots) or (decay and self.decays[k]):
            zeros = np.zeros(shape[1], np.float32)
            row[Slots.ZEROS] = address(zeros)
            kept.append(zeros)
        self.sparse = True
        return values
