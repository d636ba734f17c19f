"""What surrounds the sequences, fused, float32: cross-entropy over rows, random masks, optimizers' updates.

The formulas are those of ../reference_pointwise.py, whose docstrings name their sources; the tests hold the two together.
"""

from __future__ import annotations

from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from . import threads
from .cache import compile_kernel
from .isa import LANES
from .math import exp, log, maximum, sqrt
from .plan import SIGNATURE, get, make_plan, share
from .simd import (
    JIT_OPTIONS,
    VECTOR_BYTES,
    K,
    horizontal_max,
    horizontal_sum,
    keep_n,
    load_int,
    load_n,
    load_n_else,
    load_scalar,
    splat,
    store_n,
    store_scalar,
)
from .workspace import aligned

__all__ = ["adam_update", "dropout_mask", "rmsprop_update", "sgd_update", "softmax_cross_entropy"]

ONE_THREAD_BELOW = 1 << 17  # elements


def _shards(elements: int) -> int:
    return 1 if elements < ONE_THREAD_BELOW else threads.get_num_threads()


# Softmax cross-entropy


class Rows(IntEnum):
    """Places in the plan of a kernel over rows."""

    M = 0
    V = auto()
    X = auto()
    X_ROW = auto()  # bytes between rows
    LABELS = auto()
    LOSSES = auto()
    D = auto()


def _softmax_cross_entropy(p, shard, shards):
    V, x_row = get(p, Rows.V), get(p, Rows.X_ROW)
    first, last = share(get(p, Rows.M), shard, shards)
    for r in range(first, last):
        x, d = get(p, Rows.X) + r * x_row, get(p, Rows.D) + r * V * 4
        top = K(-np.inf)
        for v in range(0, V, LANES):
            top = maximum(top, load_n_else(x + v * 4, V - v, K(-np.inf)))
        largest = splat(horizontal_max(top))
        total = K(0.0)
        for v in range(0, V, LANES):
            e = keep_n(exp(load_n(x + v * 4, V - v) - largest), V - v)
            total = total + e
            store_n(d + v * 4, e, V - v)
        whole = splat(horizontal_sum(total))
        label = load_int(get(p, Rows.LABELS) + 8 * r)
        loss = log(whole) - (splat(load_scalar(x + label * 4)) - largest)
        store_n(get(p, Rows.LOSSES) + r * 4, loss, 1)
        for v in range(0, V, LANES):
            store_n(d + v * 4, load_n(d + v * 4, V - v) / whole, V - v)
        store_scalar(d + label * 4, load_scalar(d + label * 4) - np.float32(1))


@cache
def _softmax_kernel() -> Any:
    return compile_kernel(_softmax_cross_entropy, "softmax_cross_entropy", "", SIGNATURE)


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses (M,) of logits (M, V) against integer labels (M,), and their gradient (M, V).

    Raises:
        ValueError: a label is not in 0..V-1, or the shapes do not fit.

    >>> import numpy as np
    >>> losses, d = softmax_cross_entropy(np.zeros((1, 4), np.float32), np.array([2]))
    >>> round(float(losses[0]), 4), d.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape (M, V), got {logits.shape}")
    M, V = logits.shape
    if labels.shape != (M,) or labels.dtype.kind not in "iub":
        raise ValueError(
            f"labels: expected whole numbers of shape {(M,)}, got {labels.dtype} of {labels.shape}"
        )
    labels = np.ascontiguousarray(labels, np.int64)
    if M and (labels.min() < 0 or labels.max() >= V):
        raise ValueError(f"labels: expected whole numbers in 0..{V - 1}, got {labels.min()}..{labels.max()}")
    if logits.dtype != np.float32 or (V > 1 and logits.strides[1] != 4):
        logits = np.ascontiguousarray(logits, np.float32)
    losses, d = aligned((M,)), aligned((M, V))
    arrays = {Rows.X: logits, Rows.LABELS: labels, Rows.LOSSES: losses, Rows.D: d}
    plan = make_plan(Rows, {Rows.M: M, Rows.V: V, Rows.X_ROW: logits.strides[0]}, arrays)
    threads.run(_softmax_kernel(), plan.ctypes.data, _shards(M * V))
    return losses, d


# Random masks


class Mask(IntEnum):
    """Places in the plan of the mask kernel."""

    SIZE = 0
    OUT = auto()
    SEED_LOW = auto()
    SEED_HIGH = auto()
    STREAM_LOW = auto()
    STREAM_HIGH = auto()
    BELOW = auto()  # a word below this gives 0
    SCALE = auto()  # address of the value of an element kept


def _dropout_mask(p, shard, shards):
    size, out, below, scale = (
        get(p, Mask.SIZE),
        get(p, Mask.OUT),
        get(p, Mask.BELOW),
        load_scalar(get(p, Mask.SCALE)),
    )
    first, last = share((size + 3) // 4, shard, shards)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(first, last):
        c0, c1 = np.uint64(i) & low, np.uint64(i) >> shift
        c2, c3 = np.uint64(get(p, Mask.STREAM_LOW)), np.uint64(get(p, Mask.STREAM_HIGH))
        k0, k1 = np.uint64(get(p, Mask.SEED_LOW)), np.uint64(get(p, Mask.SEED_HIGH))
        for _ in range(10):
            p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        for j in range(min(4, size - 4 * i)):
            word = c0 if j == 0 else c1 if j == 1 else c2 if j == 2 else c3
            store_scalar(out + (4 * i + j) * 4, scale if np.int64(word) >= below else np.float32(0))


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
    out = aligned(shape)
    scale = np.array([1 / (1 - rate)], np.float32)
    sizes = {
        Mask.SIZE: out.size, Mask.BELOW: round(rate * 2**32),
        Mask.SEED_LOW: seed & 0xFFFFFFFF, Mask.SEED_HIGH: seed >> 32,
        Mask.STREAM_LOW: stream & 0xFFFFFFFF, Mask.STREAM_HIGH: stream >> 32,
    }  # fmt: skip
    plan = make_plan(Mask, sizes, {Mask.OUT: out, Mask.SCALE: scale})
    threads.run(_mask_kernel(), plan.ctypes.data, _shards(out.size))
    return out


# Optimizers' updates


class Slots(IntEnum):
    """Places in the plan of an update: the variable, its gradient, up to three slots (0: absent), the settings."""

    SIZE = 0
    W = auto()
    G = auto()
    S0 = auto()
    S1 = auto()
    S2 = auto()
    SETTINGS = auto()  # float32
    NESTEROV = auto()


@njit(**JIT_OPTIONS)
def _setting(p, k):
    return splat(load_scalar(get(p, Slots.SETTINGS) + 4 * k))


@njit(**JIT_OPTIONS)
def _part(p, shard, shards):
    """This shard's elements: whole vectors, so that no two threads write one."""
    size = get(p, Slots.SIZE)
    first, last = share((size + LANES - 1) // LANES, shard, shards)
    return first * VECTOR_BYTES, last * VECTOR_BYTES, size


def _sgd(p, shard, shards):
    """Settings: lr, momentum. S0: velocity."""
    first, last, size = _part(p, shard, shards)
    w, g, v, nesterov = get(p, Slots.W), get(p, Slots.G), get(p, Slots.S0), get(p, Slots.NESTEROV)
    lr, momentum = _setting(p, 0), _setting(p, 1)
    for q in range(first, last, VECTOR_BYTES):
        n = size - q // 4
        step = lr * load_n(g + q, n)
        if v != 0:
            velocity = momentum * load_n(v + q, n) - step
            store_n(v + q, velocity, n)
            change = velocity
            if nesterov != 0:
                change = momentum * velocity - step
        else:
            change = -step
        store_n(w + q, load_n(w + q, n) + change, n)


def _rmsprop(p, shard, shards):
    """Settings: lr, rho, momentum, eps, 1 - rho. S0: mean square, S1: mean (centred), S2: momentum."""
    first, last, size = _part(p, shard, shards)
    w, g, ms, mg, mom = get(p, Slots.W), get(p, Slots.G), get(p, Slots.S0), get(p, Slots.S1), get(p, Slots.S2)
    lr, rho, momentum, eps, rest = (
        _setting(p, 0),
        _setting(p, 1),
        _setting(p, 2),
        _setting(p, 3),
        _setting(p, 4),
    )
    for q in range(first, last, VECTOR_BYTES):
        n = size - q // 4
        d = load_n(g + q, n)
        square = rho * load_n(ms + q, n) + rest * (d * d)
        store_n(ms + q, square, n)
        variance = square
        if mg != 0:
            mean = rho * load_n(mg + q, n) + rest * d
            store_n(mg + q, mean, n)
            variance = square - mean * mean
        step = lr * d / sqrt(variance + eps)
        if mom != 0:
            step = momentum * load_n(mom + q, n) + step
            store_n(mom + q, step, n)
        store_n(w + q, load_n(w + q, n) - step, n)


def _adam(p, shard, shards):
    """Settings: lr_t, 1 - beta1, 1 - beta2, eps, weight decay times lr. S0: m, S1: v, S2: largest v (AMSGrad)."""
    first, last, size = _part(p, shard, shards)
    w, g, m, v, vhat = get(p, Slots.W), get(p, Slots.G), get(p, Slots.S0), get(p, Slots.S1), get(p, Slots.S2)
    lr, r1, r2, eps, decay = _setting(p, 0), _setting(p, 1), _setting(p, 2), _setting(p, 3), _setting(p, 4)
    for q in range(first, last, VECTOR_BYTES):
        n = size - q // 4
        d, mean, square, weight = load_n(g + q, n), load_n(m + q, n), load_n(v + q, n), load_n(w + q, n)
        mean = mean + r1 * (d - mean)
        square = square + r2 * (d * d - square)
        store_n(m + q, mean, n)
        store_n(v + q, square, n)
        if vhat != 0:
            square = maximum(load_n(vhat + q, n), square)
            store_n(vhat + q, square, n)
        weight = weight - decay * weight
        store_n(w + q, weight - lr * mean / (sqrt(square) + eps), n)


_UPDATES = {"sgd": _sgd, "rmsprop": _rmsprop, "adam": _adam}


@cache
def _update_kernel(name: str) -> Any:
    return compile_kernel(_UPDATES[name], name, "", SIGNATURE)


def _update(
    name: str, w: np.ndarray, g: np.ndarray, slots: tuple[np.ndarray | None, ...], settings: tuple[float, ...],
    nesterov: bool = False,
) -> None:  # fmt: skip
    arrays: dict[Any, np.ndarray] = {Slots.W: w}
    for k, slot in enumerate(slots):
        if slot is not None:
            arrays[Slots.S0 + k] = slot
    for array in arrays.values():
        flags = array.flags
        if (
            array.dtype != np.float32
            or array.shape != w.shape
            or not (flags.c_contiguous and flags.writeable)
        ):
            raise ValueError(
                f"{name}: variable and slots must be contiguous writeable float32 arrays of one shape"
            )
    if g.shape != w.shape:
        raise ValueError(f"{name}: gradient of shape {g.shape} for a variable of shape {w.shape}")
    arrays[Slots.G] = np.ascontiguousarray(g, np.float32)
    arrays[Slots.SETTINGS] = np.array(settings, np.float32)
    plan = make_plan(Slots, {Slots.SIZE: w.size, Slots.NESTEROV: nesterov}, arrays)
    threads.run(_update_kernel(name), plan.ctypes.data, _shards(w.size))


def sgd_update(
    w: np.ndarray, g: np.ndarray, v: np.ndarray | None, lr: float, momentum: float, nesterov: bool
) -> None:
    """One step of SGD, in place; `v` holds the momentum."""
    _update("sgd", w, g, (v,), (lr, momentum), nesterov)


def rmsprop_update(
    w: np.ndarray, g: np.ndarray, ms: np.ndarray, mg: np.ndarray | None, mom: np.ndarray | None,
    lr: float, rho: float, momentum: float, eps: float,
) -> None:  # fmt: skip
    """One step of RMSprop, in place; `mg` for the centred form, `mom` for momentum."""
    _update("rmsprop", w, g, (ms, mg, mom), (lr, rho, momentum, eps, 1 - rho))


def adam_update(
    w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, vhat: np.ndarray | None,
    lr_t: float, beta1: float, beta2: float, eps: float, weight_decay_times_lr: float,
) -> None:  # fmt: skip
    """One step of Adam or AdamW, in place; `vhat` for AMSGrad. `lr_t` holds the step's bias corrections."""
    _update("adam", w, g, (m, v, vhat), (lr_t, 1 - beta1, 1 - beta2, eps, weight_decay_times_lr))
