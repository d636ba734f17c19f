"""The operations of a model: functions of Tensors (or arrays, or numbers) that give Tensors, with gradients.

Element-wise work and reductions are NumPy calls (which a device's arrays answer with their own, by
`__array_ufunc__` and `__array_function__`; what is made anew comes from `namespace(array)`); products, recurrent
sequences, losses and random masks go to the chosen backend. Operations with weights (`linear`,
`recurrent`, `embedding`, `layer_norm`) compute in the weights' dtype. Broadcasting needs no care in a
gradient: the tape sums it away.

Sequences are (batch, time, features) for the caller, and lie time-major in memory after `recurrent`:
transposed views, never copies.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from numlstm import random
from numlstm.autograd import (
    Array,
    QuantizedVariable,
    RowGradient,
    Tensor,
    TensorLike,
    apply,
    apply_joint,
    needs_gradient,
    transfer,
)
from numlstm.backend import backend_of, beside, get_backend, namespace, place_of, ranges
from numlstm.kernels.int8 import Quantized
from numlstm.kernels.reference_pointwise import erf as _erf
from numlstm.kernels.reference_pointwise import sigmoid as _logistic
from numlstm.kernels.sequence import Prepacked

__all__ = [
    "abs",
    "add",
    "additive_scores",
    "astype",
    "attend",
    "binary_crossentropy",
    "broadcast_to",
    "categorical_crossentropy",
    "clip",
    "concatenate",
    "cos",
    "divide",
    "dropout",
    "dropout_mask",
    "elu",
    "embedding",
    "exp",
    "expand_dims",
    "flip",
    "gelu",
    "getitem",
    "hard_sigmoid",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log",
    "log1p",
    "log_softmax",
    "masked_softmax",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "multiply",
    "negative",
    "pad",
    "power",
    "recurrent",
    "recurrent_pair",
    "relu",
    "repeat",
    "reshape",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "softmax",
    "softplus",
    "softsign",
    "sparse_categorical_crossentropy",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "stop_gradient",
    "subtract",
    "sum",
    "tanh",
    "tensor",
    "transpose",
    "var",
    "where",
]

Axis = int | Sequence[int] | None
F = TypeVar("F", bound=Callable[..., Any])  # an operation that is decorated: it keeps its type


# Arguments


def tensor(x: TensorLike) -> Tensor:
    """`x` as a Tensor: itself if it is one."""
    return x if isinstance(x, Tensor) else Tensor(x)


def _floating(x: TensorLike) -> Tensor:
    """`x` as a Tensor of floats; integers and booleans become float32."""
    x = x if isinstance(x, Tensor) else Tensor(x)
    return x if x.data.dtype.kind == "f" else Tensor(x.data.astype(np.float32))


def _pair(a: TensorLike, b: TensorLike) -> tuple[Tensor, Tensor]:
    """Two operands as Tensors. A plain number or an integer takes the dtype of the floats it meets."""
    a, b = _number(a, b), _number(b, a)
    p, q = a.data.dtype.kind, b.data.dtype.kind
    if p != q:
        if p == "f":
            b = astype(b, a.dtype)
        elif q == "f":
            a = astype(a, b.dtype)
    if type(a.data) is not type(b.data):
        return _on_one_device(a, b)
    return a, b


def _on_one_device(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands, of which a number becomes a plain scalar where the other is a device's array."""
    places = place_of(a.data), place_of(b.data)
    if places[0] == places[1]:  # a memmap, say
        return a, b
    if None in places:
        host = a if places[0] is None else b
        if not host.ndim:
            scalar = stop_gradient(host)
            scalar.data = host.data[()]
            return (scalar, b) if host is a else (a, scalar)
    raise ValueError(_two_places("b", b.data, a.data))


def _two_places(name: str, x: Array, other: Array) -> str:
    return (
        f"{name}: an array of shape {x.shape} in the memory of {place_of(x) or 'the host (NumPy)'} came, expected one of "
        f"{place_of(other) or 'the host (NumPy)'}, where the others are: arrays of two devices do not mix"
    )


def _number(x: TensorLike, other: Any) -> Tensor:
    """`x` as a Tensor; a plain number of the other's kind takes its dtype."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, (int, float, np.generic)) and hasattr(other, "dtype"):
        kind = other.dtype.kind
        if kind == "f" or (kind in "iu" and isinstance(x, (int, np.integer)) and not isinstance(x, bool)):
            return Tensor(np.asarray(x, other.dtype))
    return Tensor(x)


def _floating_pair(a: TensorLike, b: TensorLike) -> tuple[Tensor, Tensor]:
    a, b = _pair(a, b)
    a, b = _floating(a), _floating(b)
    return (a, b) if type(a.data) is type(b.data) else _on_one_device(a, b)


@overload
def _serving(a: Tensor, /) -> tuple[Any, Tensor]: ...
@overload
def _serving(a: Tensor, b: Tensor, /) -> tuple[Any, Tensor, Tensor]: ...
@overload
def _serving(a: Tensor, b: Tensor, c: Tensor, /) -> tuple[Any, Tensor, Tensor, Tensor]: ...
@overload
def _serving(a: Tensor, /, *operands: Tensor | None) -> tuple[Any, Tensor, *tuple[Tensor | None, ...]]: ...
def _serving(*operands: Tensor | None) -> tuple[Any, ...]:
    """The backend to run on, and the operands where it works. In use around a call it may be another one than where the
    arrays lie: then they go there, and their gradients come back."""
    like = None
    for t in operands:
        if t is not None and (like is None or type(t.data) is not np.ndarray):
            like = t.data
    backend = get_backend(like=like)
    if backend.xp is np and type(like) is np.ndarray:
        return (backend, *operands)
    return (backend, *(t if t is None else transfer(t, backend, "x") for t in operands))


def _boolean(x: Any, like: Array, name: str) -> Array:
    """A mask or condition, an array, a Tensor or a list, as a bool array where `like` lies."""
    x = x.data if isinstance(x, Tensor) else x
    return (
        np.asarray(x, bool)
        if type(like) is np.ndarray and place_of(x) is None
        else beside(x, like, name, bool)
    )


def _constant(x: Any, dtype: Any, like: Array, name: str) -> Array:
    """An array without a gradient in this dtype, where `like` lies."""
    return (
        np.asarray(x, dtype)
        if type(like) is np.ndarray and place_of(x) is None
        else beside(x, like, name, dtype)
    )


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes of a reduction as non-negative numbers."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis: {axis} came, but the tensor has {ndim} dimensions")
    return tuple(a % ndim for a in axes)


def _in_cells(function: F) -> F:
    """Let an operation be called in a cell's equations too: on a traced scalar it is the cell language's."""

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        derive = sys.modules.get("numlstm.kernels.derive")  # not imported: nothing is being traced
        if derive is not None and any(isinstance(a, derive.Symbol) for a in args):
            return derive.LANGUAGE[function.__name__](*args, **kwargs)
        return function(*args, **kwargs)

    return either  # type: ignore[return-value]


# Arithmetic


def add(a: TensorLike, b: TensorLike) -> Tensor:
    """a + b."""
    a, b = _pair(a, b)
    return apply(a.data + b.data, (a, _same), (b, _same))


def _same(dy: Array) -> Array:
    return dy


def _opposite(dy: Array) -> Array:
    return -dy


def subtract(a: TensorLike, b: TensorLike) -> Tensor:
    """a - b."""
    a, b = _pair(a, b)
    return apply(a.data - b.data, (a, _same), (b, _opposite))


def multiply(a: TensorLike, b: TensorLike) -> Tensor:
    """a * b, element by element."""
    a, b = _pair(a, b)
    u, v = a.data, b.data
    return apply(u * v, (a, lambda dy: dy * v), (b, lambda dy: dy * u))


def divide(a: TensorLike, b: TensorLike) -> Tensor:
    """a / b."""
    a, b = _floating_pair(a, b)
    v = b.data
    y = a.data / v
    return apply(y, (a, lambda dy: dy / v), (b, lambda dy: -dy * y / v))


def negative(x: TensorLike) -> Tensor:
    """-x."""
    x = tensor(x)
    return apply(-x.data, (x, _opposite))


def power(a: TensorLike, b: TensorLike) -> Tensor:
    """a ** b. The gradient of the exponent takes log(a), and 0 where a is 0 or less."""
    if isinstance(b, (int, float)) and b == 2:
        return square(_floating(a))  # what most losses ask for, and a general power is slow
    a, b = _floating_pair(a, b)
    u, v = a.data, b.data
    y = u**v

    def base(dy: Array) -> Array:
        lower = u ** np.where(v == 0, 1, v - 1)[()]  # x**0 is flat, at 0 too, where 0 * 0**-1 would be NaN
        return dy * v * lower

    return apply(y, (a, base), (b, lambda dy: dy * y * np.log(np.where(u > 0, u, 1))))


def matmul(a: TensorLike, b: TensorLike) -> Tensor:
    """The matrix product of the last two axes, the others broadcast; vectors as in NumPy."""
    a, b = _floating_pair(a, b)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(
            f"matmul: shapes {a.shape} and {b.shape} do not fit: a's last axis meets b's last but one"
        )
    if a.ndim == 1:
        return squeeze(matmul(expand_dims(a, 0), b), -1 if b.ndim == 1 else -2)
    if b.ndim == 1:
        return squeeze(matmul(a, expand_dims(b, 1)), -1)
    backend, a, b = _serving(a, b)
    product = backend.matmul if a.ndim == b.ndim == 2 else backend.batched_matmul
    if a.dtype != b.dtype:
        product = operator.matmul
    u, v = a.data, b.data
    return apply(
        product(u, v),
        (a, lambda dy: product(dy, np.swapaxes(v, -1, -2))),
        (b, lambda dy: product(np.swapaxes(u, -1, -2), dy)),
    )


# Element by element


@_in_cells
def exp(x: TensorLike) -> Tensor:
    """e ** x."""
    x = _floating(x)
    y = np.exp(x.data)
    return apply(y, (x, lambda dy: dy * y))


@_in_cells
def log(x: TensorLike) -> Tensor:
    """The natural logarithm."""
    x = _floating(x)
    u = x.data
    return apply(np.log(u), (x, lambda dy: dy / u))


def log1p(x: TensorLike) -> Tensor:
    """log(1 + x), exact for small x."""
    x = _floating(x)
    u = x.data
    return apply(np.log1p(u), (x, lambda dy: dy / (1 + u)))


@_in_cells
def sqrt(x: TensorLike) -> Tensor:
    """The square root."""
    x = _floating(x)
    y = np.sqrt(x.data)
    return apply(y, (x, lambda dy: dy / (2 * y)))


def square(x: TensorLike) -> Tensor:
    """x * x."""
    x = tensor(x)
    u = x.data
    return apply(u * u, (x, lambda dy: dy * (2 * u)))


def abs(x: TensorLike) -> Tensor:
    """The absolute value; its gradient at 0 is 0."""
    x = tensor(x)
    u = x.data
    return apply(np.abs(u), (x, lambda dy: dy * np.sign(u)))


def sin(x: TensorLike) -> Tensor:
    """The sine."""
    x = _floating(x)
    u = x.data
    return apply(np.sin(u), (x, lambda dy: dy * np.cos(u)))


def cos(x: TensorLike) -> Tensor:
    """The cosine."""
    x = _floating(x)
    u = x.data
    return apply(np.cos(u), (x, lambda dy: -dy * np.sin(u)))


@_in_cells
def tanh(x: TensorLike) -> Tensor:
    """The hyperbolic tangent."""
    x = _floating(x)
    y = np.tanh(x.data)
    return apply(y, (x, lambda dy: dy * (1 - y * y)))


@_in_cells
def sigmoid(x: TensorLike) -> Tensor:
    """1 / (1 + exp(-x))."""
    x = _floating(x)
    y = _logistic(x.data)
    return apply(y, (x, lambda dy: dy * (y * (1 - y))))


@_in_cells
def relu(x: TensorLike) -> Tensor:
    """max(x, 0); its gradient at 0 is 0."""
    x = tensor(x)
    u = x.data
    return apply(np.maximum(u, 0), (x, lambda dy: dy * (u > 0)))


def leaky_relu(x: TensorLike, negative_slope: float = 0.2) -> Tensor:
    """x where it is positive, `negative_slope` times x elsewhere."""
    x = _floating(x)
    slope = np.where(x.data > 0, x.dtype.type(1), x.dtype.type(negative_slope))
    return apply(x.data * slope, (x, lambda dy: dy * slope))


def elu(x: TensorLike, alpha: float = 1.0) -> Tensor:
    """x where it is positive, alpha (exp(x) - 1) elsewhere: Clevert et al. 2015."""
    x = _floating(x)
    u = x.data
    low = alpha * np.expm1(np.minimum(u, 0))
    return apply(np.where(u > 0, u, low), (x, lambda dy: dy * np.where(u > 0, 1, low + alpha)))


def selu(x: TensorLike) -> Tensor:
    """The self-normalising scaled elu: Klambauer et al. 2017."""
    return elu(x, 1.6732632423543772848170429916717) * 1.0507009873554804934193349852946


def gelu(x: TensorLike, approximate: bool = False) -> Tensor:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016); `approximate`: by tanh."""
    x = _floating(x)
    u = x.data
    if approximate:
        scale = math.sqrt(2 / math.pi)
        t = np.tanh(scale * (u + 0.044715 * u**3))
        cdf, density = 0.5 * (1 + t), 0.5 * (1 - t * t) * scale * (1 + 3 * 0.044715 * u * u)
    else:
        cdf, density = 0.5 * (1 + _erf(u / math.sqrt(2))), np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return apply(u * cdf, (x, lambda dy: dy * (cdf + u * density)))


def silu(x: TensorLike) -> Tensor:
    """x sigmoid(x)."""
    x = _floating(x)
    u, s = x.data, _logistic(x.data)
    return apply(u * s, (x, lambda dy: dy * (s * (1 + u * (1 - s)))))


@_in_cells
def softplus(x: TensorLike) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    x = _floating(x)
    u = x.data
    return apply(np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))), (x, lambda dy: dy * _logistic(u)))


def softsign(x: TensorLike) -> Tensor:
    """x / (1 + |x|)."""
    x = _floating(x)
    below = 1 + np.abs(x.data)
    return apply(x.data / below, (x, lambda dy: dy / (below * below)))


@_in_cells
def hard_sigmoid(x: TensorLike) -> Tensor:
    """x / 6 + 1/2, held between 0 and 1 (Keras 3)."""
    x = _floating(x)
    u = x.data
    return apply(np.clip(u / 6 + 0.5, 0, 1), (x, lambda dy: dy * ((np.abs(u) < 3) * u.dtype.type(1 / 6))))


@_in_cells
def maximum(a: TensorLike, b: TensorLike) -> Tensor:
    """The larger of two, element by element; a tie's gradient goes to `b`."""
    a, b = _pair(a, b)
    first = a.data > b.data
    return apply(np.maximum(a.data, b.data), (a, lambda dy: dy * first), (b, lambda dy: dy * ~first))


@_in_cells
def minimum(a: TensorLike, b: TensorLike) -> Tensor:
    """The smaller of two, element by element; a tie's gradient goes to `b`."""
    a, b = _pair(a, b)
    first = a.data < b.data
    return apply(np.minimum(a.data, b.data), (a, lambda dy: dy * first), (b, lambda dy: dy * ~first))


@_in_cells
def where(condition: TensorLike, a: TensorLike, b: TensorLike) -> Tensor:
    """a where the condition holds, b elsewhere."""
    a, b = _pair(a, b)
    chosen = _boolean(condition, b.data if type(a.data) is np.ndarray else a.data, "condition")
    return apply(
        np.where(chosen, a.data, b.data),
        (a, lambda dy: np.where(chosen, dy, 0)),
        (b, lambda dy: np.where(chosen, 0, dy)),
    )


@_in_cells
def clip(x: TensorLike, low: float, high: float) -> Tensor:
    """x held between two numbers; the gradient passes strictly between them."""
    x = tensor(x)
    if low > high:
        raise ValueError(f"clip: low {low} came above high {high}")
    u = x.data
    return apply(np.clip(u, low, high), (x, lambda dy: dy * ((u > low) & (u < high))))


def softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """exp(x) over its sum along an axis."""
    x = _floating(x)
    u = x.data
    if u.size and axis in (-1, u.ndim - 1):
        backend, x = _serving(x)
        u = x.data
        rows = _Rows(u)
        p = backend.softmax(rows.of(u))
        return apply(rows.home(p), (x, lambda dy: rows.home(backend.softmax_gradient(p, rows.of(dy)))))
    y = np.exp(u - u.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return apply(y, (x, lambda dy: y * (dy - (dy * y).sum(axis=axis, keepdims=True))))


def log_softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """The logarithm of softmax, exact where the probability is tiny."""
    x = _floating(x)
    y = x.data - x.data.max(axis=axis, keepdims=True)
    y = y - np.log(np.exp(y).sum(axis=axis, keepdims=True))
    return apply(y, (x, lambda dy: dy - np.exp(y) * dy.sum(axis=axis, keepdims=True)))


# Reductions


def _widen(dy: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The gradient of a reduction over `axes` as a view of its input's shape."""
    kept = tuple(1 if k in axes else n for k, n in enumerate(shape))
    return np.broadcast_to(np.reshape(dy, kept), shape)


def sum(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over some axes; all, if none is named."""
    x = tensor(x)
    axes, shape = _axes(axis, x.ndim), x.shape
    return apply(x.data.sum(axis=axes, keepdims=keepdims), (x, lambda dy: _widen(dy, shape, axes)))


def mean(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over some axes; all, if none is named.

    Raises:
        ValueError: there is nothing to take the mean of.
    """
    x = _floating(x)
    axes, shape = _axes(axis, x.ndim), x.shape
    count = math.prod(shape[k] for k in axes)
    if not count:
        raise ValueError(f"mean: a tensor of shape {shape} has no elements along axis {axis}")
    count = x.data.dtype.type(count)
    return apply(
        x.data.sum(axis=axes, keepdims=keepdims) / count, (x, lambda dy: _widen(dy / count, shape, axes))
    )


def var(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The variance (of the population) over some axes."""
    x = _floating(x)
    return mean(square(x - mean(x, axis, keepdims=True)), axis, keepdims)


def _extreme(x: TensorLike, axis: Axis, keepdims: bool, reduce: Callable[..., Array]) -> Tensor:
    x = tensor(x)
    axes, u = _axes(axis, x.ndim), x.data
    if not math.prod(u.shape[k] for k in axes):
        raise ValueError(f"max or min: a tensor of shape {x.shape} has no elements along axis {axis}")
    y = reduce(u, axis=axes, keepdims=True)

    def vjp(dy: Array) -> Array:
        hit = u == y
        return hit * (_widen(dy, u.shape, axes) / hit.sum(axis=axes, keepdims=True))

    return apply(y if keepdims else np.squeeze(y, axes), (x, vjp))


def max(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest over some axes; equals share the gradient."""
    return _extreme(x, axis, keepdims, np.max)


def min(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest over some axes; equals share the gradient."""
    return _extreme(x, axis, keepdims, np.min)


# Shapes


def getitem(x: TensorLike, index: Any) -> Tensor:
    """x[index]: numbers, slices, None, `...`, integer and boolean arrays."""
    x = tensor(x)
    if isinstance(index, tuple):
        index = tuple(i.data if isinstance(i, Tensor) else i for i in index)
    elif isinstance(index, Tensor):
        index = index.data
    parts = index if isinstance(index, tuple) else (index,)
    basic = all(i is None or i is Ellipsis or isinstance(i, (int, np.integer, slice)) for i in parts)
    like = x.data
    if not basic and type(like) is not np.ndarray:  # on a device indices lie there too
        there = tuple(_index(i, like) for i in parts)
        index = there if isinstance(index, tuple) else there[0]

    def vjp(dy: Array) -> Array:
        if not basic and type(dy) is not np.ndarray:
            return _scattered(like.shape, index, dy)
        dx = namespace(dy).zeros(like.shape, dy.dtype)
        if basic:
            dx[index] = dy
        else:
            np.add.at(dx, index, dy)  # the same element may be taken more than once
        return dx

    return apply(x.data[index], (x, vjp))


def _index(i: Any, like: Array) -> Any:
    """An index of a device's array: integer and boolean arrays where it lies."""
    if i is None or i is Ellipsis or isinstance(i, (int, np.integer, slice)):
        return i
    return beside(i, like, "index")


def _scattered(shape: tuple[int, ...], index: Any, dy: Array) -> Array:
    """Zeros of this shape with `dy` added at `index`, on a device: each sum in the order of `dy`, as atomic additions
    would not have it."""
    count = math.prod(shape)
    places = namespace(dy).arange(count).reshape(shape)[index]
    found = backend_of(dy).embedding_gradient(places.reshape(-1), dy.reshape(-1, 1), count)
    return RowGradient(*found).dense().reshape(shape)


def reshape(x: TensorLike, shape: int | Sequence[int]) -> Tensor:
    """The same elements in another shape; one length may be -1."""
    x = tensor(x)
    before = x.shape
    return apply(np.reshape(x.data, shape), (x, lambda dy: np.reshape(dy, before)))


def transpose(x: TensorLike, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in another order; reversed if none is given. A view."""
    x = tensor(x)
    back = None if axes is None else tuple(int(k) for k in np.argsort(_axes(axes, x.ndim)))
    return apply(np.transpose(x.data, axes), (x, lambda dy: np.transpose(dy, back)))


def expand_dims(x: TensorLike, axis: int) -> Tensor:
    """A new axis of length 1."""
    x = tensor(x)
    before = x.shape
    return apply(np.expand_dims(x.data, axis), (x, lambda dy: np.reshape(dy, before)))


def squeeze(x: TensorLike, axis: Axis = None) -> Tensor:
    """Without axes of length 1: those named, or all."""
    x = tensor(x)
    before = x.shape
    axes = None if axis is None else _axes(axis, x.ndim)
    return apply(np.squeeze(x.data, axes), (x, lambda dy: np.reshape(dy, before)))


def concatenate(xs: Sequence[TensorLike], axis: int = -1) -> Tensor:
    """Tensors one after another along an axis."""
    ts = [tensor(x) for x in xs]
    if not ts:
        raise ValueError("concatenate: an empty list came, expected at least one tensor")
    (axis,) = _axes(axis, ts[0].ndim)
    _check_one_device("xs", ts)
    data = np.concatenate([t.data for t in ts], axis=axis)
    edges, start = [], 0
    for t in ts:
        stop = start + t.shape[axis]
        edges.append((t, functools.partial(_part, (slice(None),) * axis + (slice(start, stop),))))
        start = stop
    return apply(data, *edges)


def _check_one_device(name: str, ts: Sequence[Tensor]) -> None:
    first = ts[0].data
    for k, t in enumerate(ts):
        if type(t.data) is not type(first) and place_of(t.data) != place_of(first):
            raise ValueError(_two_places(f"{name}[{k}]", t.data, first))


def _part(index: tuple[Any, ...], dy: Array) -> Array:
    return dy[index]


def stack(xs: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    ts = [tensor(x) for x in xs]
    if not ts:
        raise ValueError("stack: an empty list came, expected at least one tensor")
    (axis,) = _axes(axis, ts[0].ndim + 1)
    _check_one_device("xs", ts)
    data = np.stack([t.data for t in ts], axis=axis)
    return apply(
        data, *((t, functools.partial(_part, (slice(None),) * axis + (k,))) for k, t in enumerate(ts))
    )


def flip(x: TensorLike, axis: Axis = None) -> Tensor:
    """The elements in reverse order along some axes. A view."""
    x = tensor(x)
    axes = _axes(axis, x.ndim)
    return apply(np.flip(x.data, axes), (x, lambda dy: np.flip(dy, axes)))


def pad(x: TensorLike, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`value` put before and after along each axis: one (before, after) an axis."""
    x = tensor(x)
    if len(widths) != x.ndim:
        raise ValueError(f"widths: {len(widths)} pairs came, expected one for each of {x.ndim} axes")
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return apply(np.pad(x.data, widths, constant_values=value), (x, functools.partial(_part, inside)))


def broadcast_to(x: TensorLike, shape: Sequence[int]) -> Tensor:
    """x seen in a larger shape. A view that can't be written to."""
    x = tensor(x)
    return apply(np.broadcast_to(x.data, tuple(shape)), (x, _same))


def repeat(x: TensorLike, repeats: int, axis: int) -> Tensor:
    """Every element `repeats` times in a row along an axis."""
    x = tensor(x)
    if isinstance(repeats, bool) or not isinstance(repeats, (int, np.integer)) or repeats < 0:
        raise ValueError(f"repeats: {repeats!r} came, expected an integer of 0 or more")
    (axis,) = _axes(axis, x.ndim)
    apart = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
    return apply(np.repeat(x.data, repeats, axis), (x, lambda dy: np.reshape(dy, apart).sum(axis=axis + 1)))


def astype(x: TensorLike, dtype: Any) -> Tensor:
    """Converted to another dtype; the gradient is converted back. Itself if it has that dtype."""
    if isinstance(x, Tensor) and x.data.dtype is dtype:
        return x
    x = tensor(x)
    if x.dtype == dtype:
        return x
    if np.dtype(dtype).kind != "f":
        return Tensor(x.data.astype(dtype))  # integers and booleans have no gradient
    before = x.dtype
    return apply(x.data.astype(dtype), (x, lambda dy: dy.astype(before)))


def stop_gradient(x: TensorLike) -> Tensor:
    """The same values as a constant."""
    return Tensor(tensor(x).data)


# Rows: operations on the last axis, whatever the others are and however they lie in memory


class _Rows:
    """How to see an array (..., F) as rows (M, F) in the order of memory, and come back.

    A sequence that `recurrent` made is a (B, T, H) view of a (T, B, H) array: its rows are taken time first,
    without a copy.
    """

    __slots__ = ("back", "lead", "order")

    def __init__(self, a: Array) -> None:
        n = a.ndim - 1
        self.order = self.back = None
        if n > 1 and not a.flags.c_contiguous:
            order = sorted(range(n), key=lambda k: -a.strides[k])
            if order != list(range(n)):
                self.order = order
                self.back = [*np.argsort(order).tolist(), n]
        self.lead = a.shape[:-1] if self.order is None else tuple(a.shape[k] for k in self.order)

    def of(self, a: Array) -> Array:
        """Rows of an array that has the same leading axes."""
        if a.ndim == 2:
            return a
        return self.flat(a, (a.shape[-1],))

    def flat(self, a: Array, last: tuple[int, ...] = ()) -> Array:
        """The same for an array with the leading axes only, or with trailing axes of shape `last`."""
        if self.order is not None:
            a = a.transpose(*self.order, *range(len(self.order), a.ndim))
        return a.reshape(math.prod(self.lead), *last)

    def home(self, rows: Array) -> Array:
        """Rows (M, F), or values (M,), with the leading axes of the array they came from."""
        a = rows.reshape(self.lead + rows.shape[1:])
        if self.back is None:
            return a
        return a.transpose(self.back if rows.ndim > 1 else self.back[:-1])


def linear(x: TensorLike, w: TensorLike, b: TensorLike | None = None) -> Tensor:
    """x (..., I) times w (I, O), plus b (O,): a dense layer. Any rank of x from 1.

    Raises:
        ValueError: the shapes do not fit; w is a `QuantizedVariable` and a tape follows x or b.

    >>> linear([[1.0, 2.0]], [[1.0], [1.0]], [0.5])
    Tensor([[3.5]], dtype=float32)
    """
    quantized = isinstance(w, QuantizedVariable)
    w = w if quantized else _floating(w)
    weights = w.data
    x = astype(x, np.float32 if quantized else weights.dtype)
    backend = get_backend(like=weights if type(weights) is not np.ndarray else x.data)
    if backend.xp is not np or type(weights) is not np.ndarray or type(x.data) is not np.ndarray:
        x, w = transfer(x, backend, "x"), transfer(w, backend, "w")
        b = None if b is None else transfer(tensor(b), backend, "b")
        weights = w.data
    u, offsets = x.data, None
    if weights.ndim != 2 or not u.ndim or u.shape[-1] != weights.shape[0]:
        raise ValueError(
            f"linear: x of shape {x.shape} and w of shape {w.shape} came, expected (..., I) and (I, O)"
        )
    if b is not None:
        b = astype(b, u.dtype)
        offsets = b.data
        if offsets.shape != weights.shape[1:]:
            raise ValueError(f"linear: b of shape {b.shape} came, expected {w.shape[1:]}")
    product = backend.matmul
    if quantized:
        _refuse_gradient(x, *(() if b is None else (b,)))
        weights = w.matrix  # type: ignore[attr-defined]
    if u.ndim == 2:
        of = home = _same
    else:
        rows = _Rows(u)
        of, home, u = rows.of, rows.home, rows.of(u)
    y = home(product(u, weights, offsets))
    edges = [
        (x, lambda dy: home(product(of(dy), weights.T))),
        (w, lambda dy: product(u.T, of(dy))),
    ]
    if b is not None:
        here = type(u) is np.ndarray
        edges.append((b, lambda dy: np.add.reduce(of(dy), 0) if here else of(dy).sum(axis=0)))
    return apply(y, *edges)


def embedding(table: TensorLike, ids: TensorLike) -> Tensor:
    """Rows of table (V, E) by integer ids of any shape: (*ids.shape, E).

    Raises:
        ValueError: ids that are not integers, or outside the table.

    >>> embedding([[0.0, 1.0], [2.0, 3.0]], np.array([1, 1, 0])).shape
    (3, 2)
    """
    table = _floating(table)
    backend, table = _serving(table)
    places = tensor(ids).data
    if type(places) is not np.ndarray or type(table.data) is not np.ndarray:
        places = beside(places, table.data, "ids")
    if places.dtype.kind not in "iu":
        raise ValueError(f"ids: dtype {places.dtype} came, expected integers")
    if table.ndim != 2:
        raise ValueError(f"table: shape {table.shape} came, expected (rows, features)")
    _check_range("ids", places, table.shape[0], "the table's rows")
    count, width = table.shape
    if places.ndim == 2:  # time-major, as `recurrent` reads it
        y = backend.embedding(table.data, places.T).swapaxes(0, 1)
    else:
        y = backend.embedding(table.data, places)

    def vjp(dy: Array) -> RowGradient:
        rows = _Rows(dy)
        return RowGradient(*backend.embedding_gradient(rows.flat(places), rows.flat(dy, (width,)), count))

    return apply(y, (table, vjp))


def _check_range(name: str, values: Array, count: int, what: str) -> None:
    if values.size:
        low, high = ranges.bounds(values)
        if low < 0 or high >= count:
            low, high = ranges.exact(values)
        if low < 0 or high >= count:
            raise ValueError(
                f"{name}: {low if low < 0 else high} came, expected 0 to {count - 1}: {what} number {count}"
            )


def layer_norm(
    x: TensorLike, gamma: TensorLike | None = None, beta: TensorLike | None = None, eps: float = 1e-3
) -> Tensor:
    """x (..., F) with mean 0 and variance 1 along its last axis, times gamma (F,), plus beta (F,).

    Ba, Kiros and Hinton 2016, equation 4.

    Raises:
        ValueError: gamma or beta of another shape.
    """
    x = _floating(x)
    given = [None if p is None else _floating(p) for p in (gamma, beta)]
    for name, p in zip(("gamma", "beta"), given, strict=True):
        if p is not None:
            x = astype(x, p.dtype)
            if p.shape != x.shape[-1:]:
                raise ValueError(f"layer_norm: {name} of shape {p.shape} came, expected {x.shape[-1:]}")
    backend, x, *given = _serving(x, *given)
    rows = _Rows(x.data)
    y, residual = backend.layer_norm(rows.of(x.data), *(None if p is None else p.data for p in given), eps)

    def vjp(dy: Array) -> list[Array]:
        dx, dgamma, dbeta = backend.layer_norm_gradient(residual, rows.of(dy))
        return [rows.home(dx)] + [d for d, p in zip((dgamma, dbeta), given, strict=True) if p is not None]

    return apply_joint((rows.home(y),), (x, *(p for p in given if p is not None)), vjp)[0]


def dropout(
    x: TensorLike, rate: float, *, shape: Sequence[int | None] | None = None, seed: int | None = None
) -> Tensor:
    """x with a random part of it, `rate`, set to 0 and the rest scaled by 1 / (1 - rate).

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".

    Arguments:
        x: any shape.
        rate: from 0 up to, not including, 1.
        shape: of the mask, broadcast against x (Keras' noise_shape); None in it means x's length.
        seed: instead of the library's; the stream number is the library's in any case.

    Raises:
        ValueError: a rate out of range, or a mask that does not broadcast to x.
    """
    x = _floating(x)
    if not 0 <= rate < 1:
        raise ValueError(f"rate: {rate!r} came, expected a number from 0 up to, not including, 1")
    of_mask: Any = x.shape if shape is None else tuple(shape)
    if len(of_mask) == x.ndim:
        of_mask = tuple(n if m is None else m for m, n in zip(of_mask, x.shape, strict=True))
    if len(of_mask) != x.ndim or any(m not in (1, n) for m, n in zip(of_mask, x.shape, strict=True)):
        raise ValueError(f"shape: {of_mask} came for the mask, which does not broadcast to x's {x.shape}")
    if not rate:
        return x
    _, x = _serving(x)
    mask = dropout_mask(of_mask, rate, x.dtype, seed=seed, like=x.data)
    return apply(x.data * mask, (x, lambda dy: dy * mask))


def dropout_mask(
    shape: Sequence[int], rate: float, dtype: Any, *, seed: int | None = None, like: Array | None = None
) -> Array:
    """What dropout multiplies by: 0 with probability `rate`, else 1 / (1 - rate); the library's next random numbers.

    >>> dropout_mask((2, 3), 0.5, "float32").shape
    (2, 3)
    """
    stream = random.next_stream()
    backend = get_backend(like=like)
    return backend.dropout_mask(tuple(shape), rate, random.seed() if seed is None else seed, stream, dtype)


# Recurrent sequences

Sequences = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]


def recurrent(
    cell: Any,
    x: TensorLike,
    kernel: TensorLike,
    recurrent_kernel: TensorLike,
    bias: TensorLike | None = None,
    params: Sequence[TensorLike] = (),
    state: Sequence[TensorLike] | None = None,
    mask: Array | None = None,
    reverse: bool = False,
    training: bool | None = None,
    aux: Sequence[Array] = (),
    recurrent_mask: Array | None = None,
    projection: TensorLike | None = None,
    remat_steps: int | None = None,
    prepacked: Prepacked | None = None,
) -> Sequences:
    """A recurrent cell over a batch of sequences, in one kernel.

    Arguments:
        cell: from numlstm.kernels.cells, with G gates, R of which the recurrence feeds (all, if it does not say
            which), and H units. Its output, the first state, has P = H columns, or those of `projection`.
        x: (B, T, I).
        kernel: (I, G * H), columns in the cell's gate order.
        recurrent_kernel: (P, R * H). It, kernel and projection may be `QuantizedVariable`s: int8, for inference.
        bias: (G * H,) or None.
        params: one (H,) tensor for each of `cell.params`.
        state: one (B, H) tensor for each of `cell.state`, (B, P) for the first; None for zeros.
        mask: (B, T), False where a step is skipped: every state is carried over, and the output repeats.
        reverse: run from the last step to the first; outputs come in the order they were made.
        training: True keeps the states' sequences even if no tape is recording. What a gradient needs is kept
            if and only if a tape follows one of the inputs.
        aux: one array for each of `cell.aux`, of a shape that broadcasts to (B, T, H), (B, T, P) for the first
            state's; no gradient. In the order of processing, as is:
        recurrent_mask: multiplies the output on its way into the next step's recurrent product (recurrent dropout);
            (B, 1, P) for one mask a sequence, (B, T, P) for one a step.
        projection: (H, P), for a cell that projects its output.
        remat_steps: where a tape records, keep the states at every so many steps only, and compute what else
            the gradient needs again: less memory, more time. The states' sequences are then kept only with
            `training=True`.
        prepacked: room in which kernels keep packed weights between calls of inference. Who hands the same one
            over again says that kernel, recurrent_kernel and bias are what they were.

    Returns the outputs (B, T, P); the last of each state, (B, H); and the sequences of the states other than
    the output, (B, T, H) each, or None where they were not kept. Gradients flow through all of them.
    A fused kernel turns what it kept into gradients, so that even a persistent tape passes back here once.

    Raises:
        ValueError: shapes that do not fit; int8 weights where a tape follows an input.
    """
    return _run_sequence(
        _Sequence(
            cell, x, kernel, recurrent_kernel, bias, params, state, mask, reverse, training, aux, recurrent_mask,
            projection, remat_steps, prepacked,
        )
    )  # fmt: skip


def recurrent_pair(first: dict[str, Any], second: dict[str, Any]) -> tuple[Sequences, Sequences]:
    """Two independent sequences, such as both directions over one input, in one call of the backend.

    Arguments:
        first, second: the arguments of `recurrent`, by name.

    Returns what `recurrent` returns, for each.

    Raises:
        ValueError: shapes that do not fit.
    """
    a, b = _run_together([_Sequence(**first), _Sequence(**second)])
    return a, b


class Watcher(Protocol):
    """Who looks on while recurrent sequences run: see `watched`. Arrays are the backend's, time-major."""

    def forward(self, kernel: Tensor, arguments: dict[str, Any], reverse: bool, out: Any) -> Any:
        """A sequence has run: its kernel as it was given (a layer's own variable), the arguments of the backend's
        `sequence_forward`, whether they are in reverse order of time, and its `Forward`, with every state's
        sequence. What is returned comes back in `backward`. Arrays may change afterwards: copy."""

    def backward(self, seen: Any, dh: Any, dfinal: Sequence[Any], dstates: Sequence[Any] | None) -> None:
        """The gradients that reach its results are known; its backward pass comes next."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("sequence_watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within the block, `watcher` sees every recurrent sequence that runs; its backward pass too, whenever it comes.

    >>> class Printer:
    ...     def forward(self, kernel, arguments, reverse, out):
    ...         print(arguments["cell"].name, out.h.shape)
    >>> from numlstm.layers import GRU
    >>> with watched(Printer()):
    ...     y = GRU(4)(np.zeros((2, 5, 3)))
    gru (5, 2, 4)
    """
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class _Sequence:
    """The arguments of one `recurrent`, checked and time-major, and the way back of its results."""

    def __init__(
        self,
        cell: Any,
        x: TensorLike,
        kernel: TensorLike,
        recurrent_kernel: TensorLike,
        bias: TensorLike | None = None,
        params: Sequence[TensorLike] = (),
        state: Sequence[TensorLike] | None = None,
        mask: Array | None = None,
        reverse: bool = False,
        training: bool | None = None,
        aux: Sequence[Array] = (),
        recurrent_mask: Array | None = None,
        projection: TensorLike | None = None,
        remat_steps: int | None = None,
        prepacked: Prepacked | None = None,
    ) -> None:
        self.watcher = _WATCHER.get()
        quantized = isinstance(kernel, QuantizedVariable)
        self.kernel = kernel = kernel if quantized else _floating(kernel)
        dtype = np.dtype(np.float32) if quantized else kernel.data.dtype
        of_weights = (lambda w, _: w) if quantized else astype  # int8 weights have their own dtype
        x, recurrent_kernel = astype(x, dtype), of_weights(recurrent_kernel, dtype)
        inputs = [x, kernel, recurrent_kernel]
        if bias is not None:
            bias = astype(bias, dtype)
            inputs.append(bias)
        if params:
            params = tuple([astype(p, dtype) for p in params])
            inputs += params
        if state is not None:
            state = tuple([astype(s, dtype) for s in state])
            inputs += state
        if projection is not None:
            projection = of_weights(projection, dtype)
            inputs.append(projection)
        backend = get_backend(like=kernel.data if type(kernel.data) is not np.ndarray else x.data)
        if backend.xp is not np or type(kernel.data) is not np.ndarray or type(x.data) is not np.ndarray:
            there = functools.partial(transfer, backend=backend)
            x, kernel = there(x, name="x"), there(kernel, name="kernel")
            recurrent_kernel = there(recurrent_kernel, name="recurrent_kernel")
            bias = None if bias is None else there(bias, name="bias")
            params = tuple(there(p, name="params") for p in params)  # type: ignore[arg-type]
            state = None if state is None else tuple(there(s, name="state") for s in state)
            projection = None if projection is None else there(projection, name="projection")
            self.kernel = kernel
            given = (x, kernel, recurrent_kernel, bias, *params, *(state or ()), projection)
            inputs = [t for t in given if t is not None]
        valid = None if mask is None else _boolean(mask, x.data, "mask")
        _check_recurrent(cell, x, kernel, recurrent_kernel, bias, params, state, valid, projection)  # type: ignore[arg-type]

        self.backend, self.inputs = backend, inputs
        self.has_bias, self.has_state, self.projects = (
            bias is not None,
            state is not None,
            projection is not None,
        )
        self.recorded = needs_gradient(*inputs)
        self.need_dx = self.recorded and needs_gradient(x)
        self.direction, self.finals = -1 if reverse else 1, len(cell.state)
        steps = x.data.swapaxes(0, 1)
        if valid is not None:
            valid = valid.T
        if reverse:
            steps, valid = steps[::-1], None if valid is None else valid[::-1]
        self.arguments: dict[str, Any] = {
            "cell": cell,
            "x": steps,
            "kernel": kernel.data,
            "recurrent_kernel": recurrent_kernel.data,
            "bias": None if bias is None else bias.data,
            "params": tuple([p.data for p in params]) if params else (),  # type: ignore[union-attr]
            "state": None if state is None else tuple([s.data for s in state]),
            "valid": valid,
            "training": self.recorded or bool(training) or self.watcher is not None,
            "aux": tuple([_constant(a, dtype, x.data, "aux").swapaxes(0, 1) for a in aux]) if aux else (),
            "recurrent_mask": (
                None
                if recurrent_mask is None
                else _constant(recurrent_mask, dtype, x.data, "recurrent_mask").swapaxes(0, 1)
            ),
            "projection": None if projection is None else projection.data,
        }
        if quantized:
            _refuse_gradient(*self.inputs)
            self.arguments |= {"kernel": kernel.matrix, "recurrent_kernel": _quantized(recurrent_kernel)}  # type: ignore[attr-defined]
            if projection is not None:
                self.arguments["projection"] = _quantized(projection)
        elif remat_steps is not None:
            self.arguments |= {
                "remat_steps": remat_steps,
                "keep_states": bool(training) or self.watcher is not None,
            }
        elif prepacked is not None and not self.arguments["training"]:
            self.arguments["prepacked"] = prepacked

    def keep(self, out: Any) -> list[Array]:
        """The results, batch-major: every output, the last states, the other states' sequences."""
        self.residual, self.kept = out.residual, out.states is not None
        if self.watcher is not None:
            self.seen = self.watcher.forward(self.kernel, self.arguments, self.direction < 0, out)
        del self.arguments  # what the backward pass needs of them, the residual holds
        results = [out.h.swapaxes(0, 1), *out.final]
        if self.kept:
            results += [s.swapaxes(0, 1) for s in out.states]
        return results

    def upstream(self, d: Sequence[Array | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the backward pass, from the gradients that arrive at the results."""
        last = 1 + self.finals
        dh = d[0]
        options: dict[str, Any] = {"need_dx": self.need_dx}
        dstates = tuple([None if g is None else g.swapaxes(0, 1) for g in d[last:]])
        for g in dstates:
            if g is not None:
                options["dstates"] = dstates
                break
        if dh is not None:
            dh = dh.swapaxes(0, 1)
        if self.watcher is not None:
            self.watcher.backward(self.seen, dh, d[1:last], options.get("dstates"))
        return (self.residual, dh, d[1:last]), options

    def gradients(self, g: Any) -> list[Array | None]:
        """The kernel's gradients in the order of `inputs`."""
        found = [
            g.x[:: self.direction].swapaxes(0, 1) if self.need_dx else None,
            g.kernel,
            g.recurrent_kernel,
        ]
        if self.has_bias:
            found.append(g.bias)
        found += g.params
        if self.has_state:
            found += g.state
        if self.projects:
            found.append(g.projection)
        return found


def _quantized(weights: Any) -> Quantized:
    """Weights that go with an int8 kernel: int8 too, or none at all, for a cell without a recurrent product."""
    if isinstance(weights, QuantizedVariable):
        return weights.matrix
    if weights.shape[1]:
        raise ValueError(
            f"recurrent_kernel, projection: expected int8, as the kernel is, got {weights.dtype} (from "
            f"recurrent_dropconnect in training? int8 weights serve inference only)"
        )
    return Quantized(np.zeros(weights.shape, np.int8), np.zeros(0, np.float32))


def _refuse_gradient(*inputs: Tensor) -> None:
    """Int8 weights have no gradient and hand none on. Raises ValueError where a tape asks for one."""
    if needs_gradient(*inputs):
        raise ValueError(
            "a tape follows an input of int8 weights, which serve inference only: differentiate the float32 "
            "model, and quantize it again"
        )


def _run_together(sequences: list[_Sequence]) -> list[Sequences]:
    """Run several sequences as one operation: one call of the backend each way."""
    backend = sequences[0].backend
    outs = backend.sequence_forward_pair([s.arguments for s in sequences])
    results = [s.keep(out) for s, out in zip(sequences, outs, strict=True)]
    stops = np.cumsum([len(r) for r in results]).tolist()
    places = [slice(stop - len(r), stop) for r, stop in zip(results, stops, strict=True)]

    def vjp(*d: Array | None) -> list[Array | None]:
        pieces = [d[place] for place in places]
        found: list[list[Array | None]] = [[None] * len(s.inputs) for s in sequences]
        reached = [  # a direction that the loss does not use, or that nobody follows, has no gradients
            k for k, s in enumerate(sequences) if s.recorded and any(g is not None for g in pieces[k])
        ]
        asked = [sequences[k].upstream(pieces[k]) for k in reached]
        if len(asked) == 1:
            (upstream, options) = asked[0]
            gradients = [backend.sequence_backward(*upstream, **options)]
        else:
            names = ("residual", "dh", "dfinal")
            gradients = backend.sequence_backward_pair(
                [dict(zip(names, upstream, strict=True)) | options for upstream, options in asked]
            )
        for k, g in zip(reached, gradients, strict=True):
            found[k] = sequences[k].gradients(g)
        return [g for one in found for g in one]

    inputs = [t for s in sequences for t in s.inputs]
    outputs = apply_joint([a for r in results for a in r], inputs, vjp)
    return [_given(s, outputs[place]) for s, place in zip(sequences, places, strict=True)]


def _run_sequence(sequence: _Sequence) -> Sequences:
    """Run one sequence."""
    backend = sequence.backend

    def vjp(*d: Array | None) -> list[Array | None]:
        upstream, options = sequence.upstream(d)
        return sequence.gradients(backend.sequence_backward(*upstream, **options))

    results = sequence.keep(backend.sequence_forward(**sequence.arguments))
    return _given(sequence, apply_joint(results, sequence.inputs, vjp))


def _given(sequence: _Sequence, outputs: tuple[Tensor, ...]) -> Sequences:
    """What `recurrent` returns, of all the results of a sequence."""
    last = 1 + sequence.finals
    return outputs[0], outputs[1:last], outputs[last:] if sequence.kept else None


def _check_recurrent(
    cell: Any,
    x: Tensor,
    kernel: Tensor,
    recurrent_kernel: Tensor,
    bias: Tensor | None,
    params: tuple[Tensor, ...],
    state: tuple[Tensor, ...] | None,
    valid: Array | None,
    projection: Tensor | None,
) -> None:
    """Every shape against the others, before a kernel that trusts them."""
    if x.data.ndim != 3:
        raise ValueError(f"x: shape {x.shape} came, expected rank 3: (batch, time, features)")
    if projection is not None and projection.ndim != 2:
        raise ValueError(f"projection: shape {projection.shape} came, expected rank 2: (units, outputs)")
    shape = recurrent_kernel.data.shape
    P = shape[0] if shape else 0
    (B, T, I), H = x.data.shape, P
    if projection is not None:
        H, P = projection.shape
    columns = len(cell.gates) * H
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("kernel", kernel, (I, columns)),
        ("recurrent_kernel", recurrent_kernel, (P, len(cell.recurrent) * H)),
    ]
    if bias is not None:
        expected.append(("bias", bias, (columns,)))
    if len(params) != len(cell.params):
        raise ValueError(
            f"params: {len(params)} came, expected {len(cell.params)}: {', '.join(cell.params) or 'none'}"
        )
    if params:
        expected += [(f"params[{name}]", p, (H,)) for name, p in zip(cell.params, params, strict=True)]
    if state is not None:
        if len(state) != len(cell.state):
            raise ValueError(f"state: {len(state)} came, expected {len(cell.state)}: {', '.join(cell.state)}")
        expected += [
            (f"state[{name}]", s, (B, H if k else P))
            for k, (name, s) in enumerate(zip(cell.state, state, strict=True))
        ]
    for name, t, shape in expected:
        if t.data.shape != shape:
            raise ValueError(f"{name}: shape {t.shape} came, expected {shape}")
    if valid is not None and valid.shape != (B, T):
        raise ValueError(f"mask: shape {valid.shape} came, expected {(B, T)}: (batch, time)")


# Losses: one value a sample (or element); what to do with them is losses.py's business

_TINY = 1e-7  # probabilities are held this far from 0 and 1, as in Keras


def sparse_categorical_crossentropy(
    labels: TensorLike, predictions: TensorLike, from_logits: bool = False
) -> Tensor:
    """-log of the probability of the right class: predictions (..., V), integer labels (...), losses (...).

    Raises:
        ValueError: shapes that do not fit, or labels that are not integers from 0 to V - 1.

    >>> sparse_categorical_crossentropy(np.array([0]), [[0.0, 0.0]], from_logits=True)
    Tensor([0.6931472], dtype=float32)
    """
    backend, predictions = _serving(_floating(predictions))
    right = beside(tensor(labels).data, predictions.data, "labels")
    if not predictions.ndim or right.shape != predictions.shape[:-1]:
        raise ValueError(
            f"labels: shape {right.shape} came for predictions of shape {predictions.shape}, "
            f"expected {predictions.shape[:-1]}: one class number a row"
        )
    if right.dtype.kind not in "iu":
        if right.dtype.kind != "f" or (right != np.floor(right)).any():
            raise ValueError(
                f"labels: expected class numbers, integers; dtype {right.dtype} came, or fractions"
            )
        right = right.astype(np.int64)
    _check_range("labels", right, predictions.shape[-1], "the classes")
    if not from_logits:
        return _right_probability(predictions, right)
    rows = _Rows(predictions.data)
    losses, residual = backend.softmax_cross_entropy(rows.of(predictions.data), rows.flat(right))

    def vjp(dy: Array) -> Array:
        return rows.home(backend.softmax_cross_entropy_gradient(residual, rows.flat(dy)))

    return apply(rows.home(losses), (predictions, vjp))


def _right_probability(predictions: Tensor, right: Array) -> Tensor:
    """-log of `_probabilities` at the right class, in one operation: of a large vocabulary's (..., V) values it makes no
    more than their gradient."""
    rows = _Rows(predictions.data)
    p, labels = rows.of(predictions.data), rows.flat(right)
    at = namespace(p).arange(len(labels)), labels
    whole = p.sum(axis=-1)
    share = p[at] / whole
    held = np.clip(share, _TINY, 1 - _TINY)

    def vjp(dy: Array) -> Array:
        d = np.where((share > _TINY) & (share < 1 - _TINY), rows.flat(dy) / (held * whole), 0).astype(p.dtype)
        dp = np.empty_like(p)
        dp[...] = (d * share)[:, None]
        dp[at] -= d
        return rows.home(dp)

    return apply(rows.home(-np.log(held)), (predictions, vjp))


def _probabilities(p: Tensor) -> Tensor:
    """Predictions scaled to sum to 1 along the last axis and held away from 0 and 1, as Keras does."""
    return clip(p / sum(p, -1, keepdims=True), _TINY, 1 - _TINY)


def _matched(labels: TensorLike, predictions: TensorLike) -> tuple[Tensor, Tensor]:
    """Labels in the predictions' dtype, and the predictions; both must have one shape."""
    predictions = _floating(predictions)
    labels = astype(labels, predictions.dtype)
    if type(labels.data) is not type(predictions.data):
        labels = Tensor(beside(labels.data, predictions.data, "labels"))
    if labels.shape != predictions.shape:
        raise ValueError(f"labels: shape {labels.shape} came, expected the predictions' {predictions.shape}")
    return labels, predictions


def categorical_crossentropy(
    labels: TensorLike, predictions: TensorLike, from_logits: bool = False
) -> Tensor:
    """-sum of labels times log probability over the last axis: labels and predictions (..., V), losses (...).

    Raises:
        ValueError: the shapes differ.
    """
    labels, predictions = _matched(labels, predictions)
    logarithms = log_softmax(predictions) if from_logits else log(_probabilities(predictions))
    return negative(sum(labels * logarithms, -1))


def binary_crossentropy(labels: TensorLike, predictions: TensorLike, from_logits: bool = False) -> Tensor:
    """-(y log p + (1 - y) log(1 - p)), element by element; with logits, computed from them without overflow.

    Raises:
        ValueError: the shapes differ.
    """
    labels, predictions = _matched(labels, predictions)
    if from_logits:
        u, y = predictions.data, labels.data
        losses = np.maximum(u, 0) - u * y + np.log1p(np.exp(-np.abs(u)))
        return apply(losses, (predictions, lambda dy: dy * (_logistic(u) - y)), (labels, lambda dy: -dy * u))
    p = clip(predictions, _TINY, 1 - _TINY)
    return negative(labels * log(p) + (1 - labels) * log(1 - p))


# NumPy's names for the operations above: what `np.exp(tensor)` and `array * tensor` call
UFUNCS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        add, subtract, multiply, divide, negative, power, matmul, exp, log, log1p, sqrt, square, sin, cos,
        tanh, maximum, minimum,
    )
} | {"absolute": abs, "true_divide": divide}  # fmt: skip


# Last, because they are made of the functions above
from numlstm.ops_attention import additive_scores, attend, masked_softmax  # noqa: E402
