"""Everything around the recurrent sequence in plain NumPy, for any float dtype: losses, normalisation, random
masks, optimizers' updates.

The oracle for the fused versions in cpu/pointwise.py, and what serves where those do not. Rows are (M, F).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .rounding import operand

__all__ = [
    "Updates",
    "adam_update",
    "batched_matmul",
    "dense_rows",
    "dropout_mask",
    "embedding",
    "embedding_gradient",
    "erf",
    "layer_norm",
    "layer_norm_gradient",
    "matmul",
    "philox4x32",
    "rmsprop_update",
    "sgd_update",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_gradient",
    "softmax_gradient",
]

Array = Any


# Products and lookups


def matmul(a: Array, b: Array, *, bias: Array | None = None, precision: str = "float32") -> Array:
    """a (M, K) times b (K, N), plus bias (N,); in "bfloat16" a and b are rounded first (kernels/sequence.py)."""
    c = operand(a, precision) @ operand(b, precision)
    if bias is not None:
        c += bias
    return c


def batched_matmul(a: Array, b: Array) -> Array:
    """a (..., M, K) times b (..., K, N), leading axes broadcast."""
    return np.matmul(a, b)


def embedding(table: Array, ids: Array) -> Array:
    """Rows of `table` (V, E) by integer `ids` of any shape: (*ids.shape, E)."""
    return table[ids]


def embedding_gradient(ids: Array, dy: Array, rows: int) -> tuple[Array, Array]:
    """The gradient of a table of `rows` rows from `dy` (M, E) and the `ids` (M,) that took them.

    Returns `index` (rows,), for each row its place among `values` or -1 if nobody took it, and `values` (U, E), the sums,
    in the order in which the rows were first taken. Each sum goes in the order of the ids.
    """
    index = np.full(rows, -1, np.int64)
    taken, first, slots = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    index[taken[order]] = place = np.arange(len(taken))
    values = np.zeros((len(taken), dy.shape[1]), dy.dtype)
    np.add.at(values, place[np.argsort(order, kind="stable")][slots.reshape(-1)], dy)
    return index, values


# Functions


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow on either side."""
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, t) / (1 + t)


# Cody 1969, "Rational Chebyshev approximations for the error function", highest power first. His formula for
# the middle interval serves beyond it too: erfc itself is lost there to the rounding of 1 - erfc.
_ERF_SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)  # fmt: skip
_ERFC_MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
     3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip


def erf(x: Array) -> Array:
    """The error function, to about 1e-15 (float64) or rounding (float32)."""
    z = np.minimum(np.abs(x), 6.0)  # 1 - erf(6) is 2e-17; a NaN stays one
    square = z * z
    near = _polynomial(_ERF_SMALL[0], square) / _polynomial(_ERF_SMALL[1], square) * z
    far = 1 - np.exp(-square) * _polynomial(_ERFC_MIDDLE[0], z) / _polynomial(_ERFC_MIDDLE[1], z)
    return np.copysign(np.where(z <= 0.46875, near, far), x).astype(x.dtype, copy=False)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """By Horner's rule in float64, the highest power first."""
    y = np.float64(coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float64(c)
    return y


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Any]:
    """Losses (M,) of `logits` (M, V) against integer `labels` (M,), and what the gradient needs."""
    top = logits.max(axis=1, keepdims=True)
    shifted = logits - top
    right = shifted[np.arange(len(labels)), labels]
    total = np.exp(shifted, out=shifted).sum(axis=1, keepdims=True)
    return np.log(total[:, 0]) - right, (logits, labels, top, total)


def softmax_cross_entropy_gradient(residual: Any, dlosses: Array) -> Array:
    """The gradient of the logits (M, V) from that of the losses (M,). A loss whose gradient is 0 gives a row of zeros."""
    logits, labels, top, total = residual
    d = logits - top
    np.exp(d, out=d)
    d *= dlosses[:, None] / total
    d[np.arange(len(labels)), labels] -= dlosses
    d[dlosses == 0] = 0
    return d


def softmax(x: Array) -> Array:
    """exp(x) over its sum, along the rows of x (M, V)."""
    y = np.exp(x - x.max(axis=1, keepdims=True))
    y /= y.sum(axis=1, keepdims=True)
    return y


def softmax_gradient(y: Array, dy: Array) -> Array:
    """The gradient of x (M, V) from that of y = softmax(x), y (dy - the sum of y dy)."""
    return y * (dy - (dy * y).sum(axis=1, keepdims=True))


# Layer normalisation: Ba, Kiros and Hinton 2016, equation 4


def layer_norm(x: Array, gamma: Array | None, beta: Array | None, eps: float) -> tuple[Array, Any]:
    """Rows of `x` (M, F) to mean 0 and variance 1, times gamma (F,) plus beta (F,); what the gradient
    needs."""
    centred = x - x.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt(np.mean(centred * centred, axis=1, keepdims=True) + x.dtype.type(eps))
    normal = centred * inverse
    y = normal if gamma is None else normal * gamma
    return (y if beta is None else y + beta), (normal, inverse, gamma)


def layer_norm_gradient(residual: Any, dy: Array) -> tuple[Array, Array, Array]:
    """The gradients of x (M, F), gamma (F,) and beta (F,)."""
    normal, inverse, gamma = residual
    dgamma, dbeta = (dy * normal).sum(axis=0), dy.sum(axis=0)
    d = dy if gamma is None else dy * gamma
    # Both statistics depend on the whole row: take out what moves its mean and what scales its deviation.
    dx = d - d.mean(axis=1, keepdims=True) - normal * np.mean(d * normal, axis=1, keepdims=True)
    return dx * inverse, dgamma, dbeta


# Random masks: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3")

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # the golden ratio, and sqrt(3) - 1
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Four random words for each counter of four 32-bit words, held in uint64 arrays, under a key of two.

    >>> words = philox4x32(tuple(np.zeros(1, np.uint64) for _ in range(4)), (0, 0))
    >>> [f"{int(w[0]):08x}" for w in words]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 x 32 bits fit in 64
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW,
        )  # fmt: skip
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_mask(
    shape: tuple[int, ...], rate: float, seed: int, stream: int, dtype: Any = np.float32
) -> Array:
    """A mask of 0 (with probability `rate`) or 1 / (1 - rate), fixed by (seed, stream, place) alone.

    Element i, counted in C order, is word i % 4 of Philox at counter (i // 4, stream) and key `seed`, each of
    64 bits, low word first; it is 0 where that word is below rate * 2**32.
    """
    size = int(np.prod(shape, dtype=np.int64))
    block = np.arange((size + 3) // 4, dtype=np.uint64)
    high = tuple(np.full_like(block, word) for word in (stream & 0xFFFFFFFF, stream >> 32))
    words = philox4x32((block & _LOW, block >> _SHIFT, *high), (seed & 0xFFFFFFFF, seed >> 32))
    words = np.stack(words, axis=1).reshape(-1)[:size]
    keep = words >= np.uint64(round(rate * 2**32))
    return (keep * np.dtype(dtype).type(1 / (1 - rate))).astype(dtype, copy=False).reshape(shape)


# Optimizers' updates, in place, by Keras' formulas: `lr_t` holds bias corrections, eps is outside the root


def sgd_update(w: Array, g: Array, v: Array | None, lr: float, momentum: float, nesterov: bool) -> None:
    """w -= lr g; with momentum, v = momentum v - lr g and w += v; `nesterov`: Sutskever et al. 2013."""
    if v is None:
        w -= lr * g
        return
    v *= momentum
    v -= lr * g
    w += momentum * v - lr * g if nesterov else v


def rmsprop_update(
    w: Array, g: Array, ms: Array, mg: Array | None, mom: Array | None,
    lr: float, rho: float, momentum: float, eps: float,
) -> None:  # fmt: skip
    """Divide by the running root mean square `ms` (Tieleman and Hinton 2012), centred by `mg`; momentum
    `mom`."""
    ms *= rho
    ms += (1 - rho) * (g * g)
    variance = ms
    if mg is not None:
        mg *= rho
        mg += (1 - rho) * g
        variance = ms - mg * mg
    step = lr * g / np.sqrt(variance + eps)
    if mom is not None:
        mom *= momentum
        mom += step
        step = mom
    w -= step


def adam_update(
    w: Array, g: Array, m: Array, v: Array, vhat: Array | None,
    lr_t: float, beta1: float, beta2: float, eps: float, weight_decay_times_lr: float,
) -> None:  # fmt: skip
    """Kingma and Ba 2015, the form before section 2.1; `vhat` for AMSGrad, decay for AdamW (Loshchilov
    2019)."""
    if weight_decay_times_lr:
        w -= weight_decay_times_lr * w
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    if vhat is not None:
        np.maximum(vhat, v, out=vhat)
        v = vhat
    w -= lr_t * m / (np.sqrt(v) + eps)


_RULES = {"sgd": sgd_update, "rmsprop": rmsprop_update, "adam": adam_update}


class Updates:
    """An optimizer's step over many variables, ready to be taken again and again.

    Arguments:
        rule: "sgd", "rmsprop" or "adam".
        variables: for each its array and its slots, in the order of the rule's function, None where one is not used.
        decays: for each whether weight decay is for it; none if not given.
    """

    rule: str
    variables: list[Any]

    def __init__(self, rule: str, variables: Any, decays: Any = None) -> None:
        self.rule, self.variables = rule, list(variables)
        self.decays: list[bool] = [False] * len(self.variables) if decays is None else list(decays)

    def __call__(self, gradients: Any, options: tuple[Any, ...], decay: float = 0.0) -> None:
        """Take the step, in place.

        Arguments:
            gradients: for each variable an array of its shape; or a pair (index, values) as `embedding_gradient` gives it,
                the rows that are not zero; or None to leave it as it is.
            options: what the rule's function takes after the slots (Adam's but for the weight decay).
            decay: learning rate times weight decay.

        Raises:
            ValueError: a gradient of another shape.
        """
        for (w, slots), g, decays in zip(self.variables, gradients, self.decays, strict=True):
            if g is None:
                continue
            if type(g) is tuple:
                g = dense_rows(*g)
            if g.shape != w.shape:
                raise ValueError(
                    f"{self.rule}: gradient of shape {g.shape} for a variable of shape {w.shape}"
                )
            amount = decay if decays else 0.0
            if self.rule == "adam":
                adam_update(w, g, *slots, *options, amount)
                continue
            if amount:
                w *= w.dtype.type(1 - amount)
            _RULES[self.rule](w, g, *slots, *options)


def dense_rows(index: Array, values: Array) -> Array:
    """The whole gradient that (index, values) stand for, as `embedding_gradient` gives them."""
    if type(values) is not np.ndarray:  # on a device, where to count those taken would wait for it
        if not len(values):
            return np.zeros_like(values, shape=(len(index), *values.shape[1:]))
        return np.where((index >= 0)[:, None], values[np.maximum(index, 0)], 0).astype(
            values.dtype, copy=False
        )
    whole = np.zeros((len(index), *values.shape[1:]), values.dtype)
    taken = index >= 0
    whole[taken] = values[index[taken]]
    return whole
