"""The operations of attention, reached as `ops.attend`, `ops.masked_softmax` and `ops.additive_scores`.

`attend` is scaled dot-product attention (Vaswani et al. 2017, equation 1) as one operation: it keeps the
weights and nothing else of the size of the scores, and its gradient takes the softmax's row sums from the
output (Dao et al. 2022, section 3.1: the sum of P dP over a row is that of O dO). Batched products go to the
backend, whose bits do not depend on the number of threads. A query that may look nowhere gets zeros, and
hands on no gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numlstm import ops, random
from numlstm.autograd import Array, Tensor, TensorLike, apply, apply_joint

__all__ = ["additive_scores", "attend", "masked_softmax"]


def attend(
    query: TensorLike,
    key: TensorLike,
    value: TensorLike,
    mask: Array | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale query key^T) value: each query's mean of the values, weighted by how well their keys
    match.

    Arguments:
        query: (..., Tq, D).
        key: (..., Tv, D), with the query's leading axes, as has
        value: (..., Tv, V).
        mask: bool, broadcasts to (..., Tq, Tv): False where a query may not look. One that may look nowhere
            gets 0.
        scale: of the scores.
        dropout: fraction of the weights dropped on their way to the values; the weights returned are whole.
        seed: of the dropout, instead of the library's.

    Returns the result (..., Tq, V) and the weights (..., Tq, Tv).

    Raises:
        ValueError: shapes that do not fit, no key at all, or a fraction out of range.

    >>> y, weights = attend([[[0.0]]], [[[1.0], [2.0]]], [[[3.0], [5.0]]])
    >>> y.item(), weights.numpy().tolist()
    (4.0, [[[0.5, 0.5]]])
    """
    query = ops._floating(query)
    key, value = ops.astype(key, query.dtype), ops.astype(value, query.dtype)
    shape = _check(query, key, value)
    backend, query, key, value = ops._serving(query, key, value)
    product = backend.batched_matmul
    k, v, factor = key.data, value.data, query.dtype.type(scale)
    q = query.data if scale == 1 else query.data * factor
    weights = _softmax(product(q, k.swapaxes(-1, -2)), _fitting(mask, shape, q))
    kept = None
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout!r} came, expected a number from 0 up to, not including, 1")
    if dropout:
        kept = backend.dropout_mask(
            shape, dropout, random.seed() if seed is None else seed, random.next_stream(), query.dtype
        )
    used = weights if kept is None else weights * kept
    out = product(used, v)

    def vjp(dout: Array | None, dweights: Array | None) -> list[Array | None]:
        # 1. through the mean: to the values, and to the weights
        dvalue = d = None
        if dout is not None:
            dvalue = product(used.swapaxes(-1, -2), dout)
            d = product(dout, v.swapaxes(-1, -2))
            if kept is not None:
                d *= kept
        # 2. through the softmax: P (dP - sum of P dP)
        if dweights is None:
            total = (dout * out).sum(axis=-1, keepdims=True)
        else:
            d = dweights.copy() if d is None else d + dweights
            total = (d * weights).sum(axis=-1, keepdims=True)
        d -= total
        d *= weights
        # 3. through the product
        dquery, dkey = product(d, k), product(d.swapaxes(-1, -2), q)
        return [dquery if scale == 1 else dquery * factor, dkey, dvalue]

    return apply_joint((out, weights), (query, key, value), vjp)  # type: ignore[return-value]


def masked_softmax(scores: TensorLike, mask: Array | None = None) -> Tensor:
    """exp(scores) over its sum along the last axis, where the mask is True; 0 elsewhere, rows without any
    included.

    Raises:
        ValueError: a mask that does not broadcast to the scores.

    >>> masked_softmax([[0.0, 0.0, 9.0], [1.0, 1.0, 1.0]], np.array([[True, True, False], [False] * 3]))
    Tensor([[0.5, 0.5, 0. ],
            [0. , 0. , 0. ]], dtype=float32)
    """
    scores = ops._floating(scores)
    y = _softmax(scores.data.copy(), _fitting(mask, scores.shape, scores.data))
    return apply(y, (scores, lambda dy: y * (dy - (dy * y).sum(axis=-1, keepdims=True))))


def additive_scores(query: TensorLike, key: TensorLike, weight: TensorLike) -> Tensor:
    """The sum of weight * tanh(query + key) for every query and key: Bahdanau et al. 2015, appendix A.1.2.

    Arguments:
        query: (B, Tq, D).
        key: (B, Tv, D).
        weight: (D,).

    Returns the scores (B, Tq, Tv); B * Tq * Tv * D numbers are kept for the gradient.

    Raises:
        ValueError: shapes that do not fit.

    >>> additive_scores(np.zeros((1, 2, 3)), np.zeros((1, 4, 3)), np.ones(3)).shape
    (1, 2, 4)
    """
    weight = ops._floating(weight)
    query, key = ops.astype(query, weight.dtype), ops.astype(key, weight.dtype)
    D = weight.shape[-1:]
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2] or query.shape[2:] != D:
        raise ValueError(
            f"additive_scores: query {query.shape}, key {key.shape} and weight {weight.shape} came, "
            f"expected (B, Tq, D), (B, Tv, D) and (D,)"
        )
    backend, weight, query, key = ops._serving(weight, query, key)
    product, w = backend.matmul, weight.data
    t = np.tanh(query.data[:, :, None] + key.data[:, None])
    rows = t.reshape(-1, *D)

    def vjp(dy: Array) -> list[Array]:
        dz = (1 - t * t) * w
        dz *= dy[..., None]
        dweight = product(rows.T, dy.reshape(-1, 1))[:, 0]
        return [dz.sum(axis=2), dz.sum(axis=1), dweight]

    return apply_joint((product(rows, w[:, None]).reshape(t.shape[:-1]),), (query, key, weight), vjp)[0]


def _softmax(scores: Array, mask: Array | None) -> Array:
    """In place, along the last axis."""
    if mask is not None:
        np.copyto(scores, -np.inf, where=~mask)
    top = scores.max(axis=-1, keepdims=True)
    top[np.isneginf(top)] = 0  # nowhere to look: exp(-inf - 0) is 0, where -inf - -inf would be NaN
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    total[total == 0] = 1
    scores /= total
    return scores


def _fitting(mask: Any, shape: tuple[int, ...], like: Array) -> Array | None:
    """The mask as a bool array that broadcasts to `shape`, where `like` lies."""
    if mask is None:
        return None
    mask = ops._boolean(mask, like, "mask")
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask: shape {mask.shape} came, which does not broadcast to the scores' {shape}")
    return mask


def _check(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The scores' shape. Raises ValueError when there are none."""
    fit = (
        query.ndim >= 2
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and query.shape[-1:] == key.shape[-1:]
        and key.shape[-2] == value.shape[-2] > 0
    )
    if not fit:
        raise ValueError(
            f"attend: query {query.shape}, key {key.shape} and value {value.shape} came, "
            f"expected (..., Tq, D), (..., Tv, D) and (..., Tv, V) with Tv of at least 1"
        )
    return (*query.shape[:-1], key.shape[-2])
