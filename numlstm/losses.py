"""Losses: how far predictions are from targets, with Keras' names, defaults and formulas.

A loss is computed in two steps. `call` gives one value a sample (and time step): shape (B,) or (B, T), the
last axis of the predictions being averaged or summed away. The reduction then weighs and averages these
values: by default their sum over their number; under a mask, over the number of unmasked ones; sample weights
multiply the values, not the number (Keras' `sum_over_batch_size`). Strings name them in Keras' and
TensorFlow.js' spellings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from numlstm import ops
from numlstm.autograd import Tensor, apply
from numlstm.backend import adopt, beside, ranges
from numlstm.registry import Configurable, Registry, serialize, snake_case

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "CategoricalHinge",
    "CosineSimilarity",
    "FunctionLoss",
    "Hinge",
    "Huber",
    "KLDivergence",
    "LogCosh",
    "Loss",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "Pinball",
    "Poisson",
    "SparseCategoricalCrossentropy",
    "SquaredHinge",
    "deserialize",
    "get",
    "serialize",
]

_registry: Registry[type["Loss"]] = Registry("loss")
_functions: Registry[Callable[..., Any]] = Registry("function")  # a user's own: what `custom_objects` holds
_EPSILON = 1e-7  # Keras' epsilon

Reduction = Literal["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none"] | None
_REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None)


class Loss(Configurable):
    """Base of all losses: write `call(y_true, y_pred)`, one value a sample; reduction and weights are done
    here.

    Arguments:
        reduction: "sum_over_batch_size" (or "mean": the mean of all values), "sum", "mean_with_sample_weight"
            (the sum over the sum of the weights), "none" or None (no reduction).
        name: a label.

    Raises ValueError for another reduction.

    >>> class Furthest(Loss):
    ...     def call(self, y_true, y_pred):
    ...         return ops.max(ops.abs(y_pred - y_true), axis=-1)
    >>> float(Furthest()(np.zeros((2, 2), np.float32), np.array([[1, -3], [5, 0]], np.float32)))
    4.0
    """

    #: How labels are written, for class weights: "number", "one_hot" (last axis), or "value" (no classes).
    labels: str = "value"

    def __init__(self, reduction: Reduction = "sum_over_batch_size", name: str | None = None) -> None:
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {', '.join(map(str, _REDUCTIONS))}; got {reduction!r}"
            )
        self.reduction = reduction
        self.name: str = name or snake_case(type(self).__name__)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        """One value a sample (and step). `y_true` comes as the user gave it, `y_pred` as a Tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define call(y_true, y_pred)")

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> Tensor:
        """The reduced loss, a scalar Tensor (or all values if the reduction is None).

        `sample_weight` has the shape of the values, or its first axes; `mask` likewise; if None, that of
        `y_pred` (`y_pred.mask`) is used. Raises ValueError for shapes that do not fit.
        """
        y_pred = y_pred if isinstance(y_pred, Tensor) else Tensor(y_pred)
        mask = y_pred.mask if mask is None else mask
        return self.reduce(self.call(y_true, y_pred), sample_weight, self.valid(y_true, mask))

    def valid(self, y_true: Any, mask: Any) -> Any:
        """The mask of the values that count, or None for all. Losses that ignore some labels narrow it."""
        return mask

    def reduce(self, values: Tensor, sample_weight: Any = None, mask: Any = None) -> Tensor:
        """Weigh and average `values`, what `call` gave."""
        weights = None if sample_weight is None else _fit("sample_weight", sample_weight, values)
        if weights is None and mask is None and self.reduction in ("sum_over_batch_size", "mean"):
            return weighted_sum(values, None, 1.0 / values.size if values.size else 0.0)
        # A function that gives one number in all has seen to its mask itself.
        counted = None if mask is None or not values.ndim else _fit("mask", mask, values)
        divisor: Any = values.size  # on a device a number there, which nobody waits for
        if counted is not None:
            divisor = _sum(counted) * (values.size / counted.size)
            weights = counted if weights is None else weights * counted
        if self.reduction == "mean_with_sample_weight" and weights is not None:
            divisor = _sum(weights) * (values.size / weights.size)
        if self.reduction == "sum":
            divisor = 1.0
        if self.reduction in (None, "none"):
            return values if weights is None else values * weights
        if isinstance(divisor, (int, float)):
            return weighted_sum(values, weights, 1.0 / divisor if divisor else 0.0)
        none = divisor == 0
        return weighted_sum(values, weights, np.where(none, 0.0, 1.0 / (divisor + none)))


def _sum(a: Any) -> Any:
    """The sum of all elements in float64, a number; that of a device's array stays there."""
    total = a.sum(dtype=np.float64)
    return float(total) if type(a) is np.ndarray else total


def weighted_sum(values: Tensor, weights: np.ndarray | None, scale: Any) -> Tensor:
    """`scale * sum(values * weights)` as one operation: the end of every loss, so it should cost little."""
    data = values.data
    shape, here = data.shape, type(data) is np.ndarray
    factor = data.dtype.type(scale) if isinstance(scale, float) else scale.astype(data.dtype)
    if weights is not None:
        data = data * weights

    def vjp(dy: Any) -> Any:
        if weights is None:
            each = dy * factor
            if not here:
                return np.broadcast_to(each, shape)
            d = np.empty(shape, each.dtype)
            d.fill(each)  # np.full takes three times as long for the few numbers of a batch
            return d
        return np.broadcast_to(weights * (dy * factor), shape)

    return apply((np.add.reduce(data, None) if here else data.sum()) * factor, (values, vjp))


def _fit(name: str, weights: Any, values: Tensor) -> np.ndarray:
    """`weights` as an array of the values' dtype that broadcasts over their trailing axes."""
    w = weights.data if isinstance(weights, Tensor) else weights
    here = type(values.data) is np.ndarray and type(w) is np.ndarray
    w = np.asarray(w, values.dtype) if here else beside(w, values.data, name, values.dtype)
    if w.ndim == values.ndim + 1 and w.shape[-1] == 1:
        w = w[..., 0]
    if w.ndim > values.ndim or any(n not in (1, m) for n, m in zip(w.shape, values.shape, strict=False)):
        raise ValueError(f"{name}: shape {w.shape} came, expected {values.shape} or its first axes")
    return w.reshape(w.shape + (1,) * (values.ndim - w.ndim)) if w.ndim else w


def pair(y_true: Any, y_pred: Any) -> tuple[Tensor, Tensor]:
    """Both as Tensors of one dtype and shape; a missing last axis of length 1 is put in where it lacks."""
    if not isinstance(y_pred, Tensor):
        y_pred = Tensor(y_pred)
    dtype = y_pred.data.dtype
    if dtype.kind != "f":
        y_pred = y_pred.astype(np.float32)
        dtype = y_pred.data.dtype
    if not isinstance(y_true, Tensor):
        if type(y_true) is not np.ndarray or y_true.dtype is not dtype:
            y_true = adopt(y_true)
            y_true = y_true if y_true.dtype == dtype else y_true.astype(dtype)
        y_true = Tensor(y_true)
    elif y_true.dtype != dtype:
        y_true = y_true.astype(dtype)
    if type(y_true.data) is not type(y_pred.data):
        y_true = Tensor(beside(y_true.data, y_pred.data, "y"))
    if y_true.shape != y_pred.shape:
        if (*y_true.shape, 1) == y_pred.shape:
            y_true = y_true.reshape(y_pred.shape)
        elif y_true.shape == (*y_pred.shape, 1):
            y_pred = y_pred.reshape(y_true.shape)
        else:
            raise ValueError(
                f"y: targets of shape {y_true.shape} came for predictions of shape {y_pred.shape}; "
                f"both must have the same shape (but for a last axis of length 1)"
            )
    if y_pred.ndim == 0:
        raise ValueError("y_pred: a single number came, expected at least one axis")
    return y_true, y_pred


# The functions: values a sample, as in keras.losses


def mean_squared_error(y_true: Any, y_pred: Any) -> Tensor:
    """`mean((y_true - y_pred)**2)` over the last axis.

    >>> mean_squared_error([[1.0, 2.0]], [[3.0, 2.0]])
    Tensor([2.], dtype=float32)
    """
    y_true, y_pred = pair(y_true, y_pred)
    error = y_pred.data - y_true.data
    width = error.shape[-1]
    slope = error.dtype.type(2 / width)
    if width == 1:  # the usual regression: nothing to average
        flat = error.reshape(error.shape[:-1])
        values = flat * flat
    else:
        values = np.einsum("...i,...i->...", error, error) * error.dtype.type(1 / width)

    def vjp(dy: Any) -> Any:
        d = slope * error
        d *= dy[..., None]
        return d

    return apply(values, (y_pred, vjp), (y_true, lambda dy: -vjp(dy)))


def mean_absolute_error(y_true: Any, y_pred: Any) -> Tensor:
    """`mean(|y_true - y_pred|)` over the last axis.

    >>> mean_absolute_error([[1.0, 2.0]], [[4.0, 1.0]])
    Tensor([2.], dtype=float32)
    """
    y_true, y_pred = pair(y_true, y_pred)
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


def mean_absolute_percentage_error(y_true: Any, y_pred: Any) -> Tensor:
    """`100 * mean(|y_true - y_pred| / max(|y_true|, 1e-7))` over the last axis.

    >>> mean_absolute_percentage_error([[2.0, 4.0]], [[1.0, 4.0]])
    Tensor([25.], dtype=float32)
    """
    y_true, y_pred = pair(y_true, y_pred)
    return 100.0 * ops.mean(ops.abs(y_true - y_pred) / ops.maximum(ops.abs(y_true), _EPSILON), axis=-1)


def mean_squared_logarithmic_error(y_true: Any, y_pred: Any) -> Tensor:
    """`mean((log(1 + y_true) - log(1 + y_pred))**2)` over the last axis; both at least 1e-7.

    >>> round(float(mean_squared_logarithmic_error([[0.0, 0.0]], [[1.0, 1.0]])[0]), 4)
    0.4805
    """
    y_true, y_pred = pair(y_true, y_pred)
    first = ops.log1p(ops.maximum(y_pred, _EPSILON))
    second = ops.log1p(ops.maximum(y_true, _EPSILON))
    return ops.mean(ops.square(first - second), axis=-1)


def huber(y_true: Any, y_pred: Any, delta: float = 1.0) -> Tensor:
    """Squared near, linear beyond `delta`: mean of `e**2 / 2`, or `delta * |e| - delta**2 / 2`. Huber 1964.

    >>> huber([[0.0, 0.0]], [[1.0, 3.0]])
    Tensor([1.5], dtype=float32)
    """
    y_true, y_pred = pair(y_true, y_pred)
    error = ops.abs(y_true - y_pred)
    near = ops.minimum(error, delta)  # e**2/2 up to delta, then delta * e - delta**2/2, without a branch
    return ops.mean(near * (error - 0.5 * near), axis=-1)


def log_cosh(y_true: Any, y_pred: Any) -> Tensor:
    """`mean(log(cosh(y_pred - y_true)))` over the last axis, computed without overflow.

    >>> round(float(log_cosh([[0.0]], [[100.0]])[0]), 4)
    99.3069
    """
    y_true, y_pred = pair(y_true, y_pred)
    error = y_pred - y_true
    return ops.mean(error + ops.softplus(-2.0 * error) - float(np.log(2.0)), axis=-1)


def kl_divergence(y_true: Any, y_pred: Any) -> Tensor:
    """`sum(y_true * log(y_true / y_pred))` over the last axis; both clipped to [1e-7, 1].

    >>> round(float(kl_divergence([[0.5, 0.5]], [[0.25, 0.75]])[0]), 4)
    0.1438
    """
    y_true, y_pred = (ops.clip(y, _EPSILON, 1.0) for y in pair(y_true, y_pred))
    return ops.sum(y_true * ops.log(y_true / y_pred), axis=-1)


def poisson(y_true: Any, y_pred: Any) -> Tensor:
    """`mean(y_pred - y_true * log(y_pred + 1e-7))` over the last axis.

    >>> print(poisson([[2.0]], [[1.0]]).numpy().round(4))
    [1.]
    """
    y_true, y_pred = pair(y_true, y_pred)
    return ops.mean(y_pred - y_true * ops.log(y_pred + _EPSILON), axis=-1)


def cosine_similarity(y_true: Any, y_pred: Any) -> Tensor:
    """Minus the cosine of the angle between both, over the last axis: -1 is best.

    >>> print(cosine_similarity([[0.0, 2.0]], [[3.0, 3.0]]).numpy().round(4))
    [-0.7071]
    """
    y_true, y_pred = (_unit(y) for y in pair(y_true, y_pred))
    return -ops.sum(y_true * y_pred, axis=-1)


def _unit(x: Tensor) -> Tensor:
    return x / ops.sqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), _EPSILON**2))


def _signs(y_true: Tensor) -> Tensor:
    """Labels 0 and 1 become -1 and 1; -1 and 1 stay."""
    labels = y_true.data
    if type(labels) is np.ndarray:
        return 2.0 * y_true - 1.0 if np.isin(labels, (0, 1)).all() else y_true
    return ops.where(((labels == 0) | (labels == 1)).all(), 2.0 * y_true - 1.0, y_true)


def hinge(y_true: Any, y_pred: Any) -> Tensor:
    """`mean(max(1 - y_true * y_pred, 0))` over the last axis; labels -1 and 1, or 0 and 1.

    >>> print(hinge([[0.0, 1.0]], [[0.6, 0.4]]).numpy().round(4))
    [1.1]
    """
    y_true, y_pred = pair(y_true, y_pred)
    return ops.mean(ops.maximum(1.0 - _signs(y_true) * y_pred, 0.0), axis=-1)


def squared_hinge(y_true: Any, y_pred: Any) -> Tensor:
    """`mean(max(1 - y_true * y_pred, 0)**2)` over the last axis; labels -1 and 1, or 0 and 1.

    >>> print(squared_hinge([[0.0, 1.0]], [[0.6, 0.4]]).numpy().round(4))
    [1.46]
    """
    y_true, y_pred = pair(y_true, y_pred)
    return ops.mean(ops.square(ops.maximum(1.0 - _signs(y_true) * y_pred, 0.0)), axis=-1)


def categorical_hinge(y_true: Any, y_pred: Any) -> Tensor:
    """`max(1 + max((1 - y_true) * y_pred) - sum(y_true * y_pred), 0)` over the last axis; one-hot labels.

    >>> print(categorical_hinge([[0.0, 1.0]], [[0.6, 0.4]]).numpy().round(4))
    [1.2]
    """
    y_true, y_pred = pair(y_true, y_pred)
    right = ops.sum(y_true * y_pred, axis=-1)
    wrong = ops.max((1.0 - y_true) * y_pred, axis=-1)
    return ops.maximum(wrong - right + 1.0, 0.0)


def binary_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """`-mean(y log p + (1 - y) log(1 - p))` over the last axis.

    Predictions are probabilities, or any numbers if `from_logits`; labels are 0 to 1, pulled towards a half
    by `label_smoothing`. Raises ValueError for labels outside [0, 1].

    >>> print(binary_crossentropy([[1.0, 0.0]], [[0.5, 0.5]]).numpy().round(4))
    [0.6931]
    """
    y_true, y_pred = pair(y_true, y_pred)
    _check_probabilities("y", y_true.data)
    if label_smoothing:
        y_true = y_true * (1.0 - label_smoothing) + 0.5 * label_smoothing
    values = ops.binary_crossentropy(y_true, y_pred, from_logits=from_logits)
    return ops.mean(values, axis=-1) if values.shape[-1] > 1 else values.reshape(values.shape[:-1])


def categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """`-sum(y log p)` over the last axis: one-hot (or any) distributions `y_true` (..., V).

    Predictions are probabilities, or any numbers if `from_logits`. Raises ValueError unless V > 1.

    >>> print(categorical_crossentropy([[0.0, 1.0]], [[0.5, 0.5]]).numpy().round(4))
    [0.6931]
    """
    y_true, y_pred = pair(y_true, y_pred)
    if y_pred.shape[-1] < 2:
        raise ValueError(
            f"y_pred: shape {y_pred.shape} has one class; use binary_crossentropy for a single output"
        )
    if label_smoothing:
        y_true = y_true * (1.0 - label_smoothing) + label_smoothing / y_pred.shape[-1]
    return ops.categorical_crossentropy(y_true, y_pred, from_logits=from_logits)


def sparse_categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, ignore_class: int | None = None
) -> Tensor:
    """`-log p[y]`: labels are class numbers (...) or (..., 1), predictions (..., V).

    Predictions are probabilities, or any numbers if `from_logits`; values of `ignore_class` are 0. Raises
    ValueError for labels that are no integers from 0 to V - 1.

    >>> print(sparse_categorical_crossentropy([1], [[0.5, 0.5]]).numpy().round(4))
    [0.6931]
    """
    y_pred = y_pred if isinstance(y_pred, Tensor) else Tensor(y_pred)
    labels, kept = class_numbers(y_true, y_pred, ignore_class)
    values = ops.sparse_categorical_crossentropy(labels, y_pred, from_logits=from_logits)
    return values if kept is None else values * kept


def class_numbers(
    y_true: Any, y_pred: Tensor, ignore_class: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels as integers (...), checked, and which of them count (None: all)."""
    labels = beside(y_true.data if isinstance(y_true, Tensor) else y_true, y_pred.data, "y")
    classes = y_pred.shape[-1]
    if labels.ndim == y_pred.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape != y_pred.shape[:-1]:
        raise ValueError(
            f"y: labels of shape {labels.shape} came for predictions of shape {y_pred.shape}; "
            f"expected {y_pred.shape[:-1]}: one class number each"
        )
    if labels.dtype.kind not in "iu":
        whole = labels.astype(np.int64)
        if not (whole == labels).all():
            raise ValueError(
                f"y: class numbers must be integers, got {labels.dtype} such as {labels.ravel()[0]}"
            )
        labels = whole
    kept, given, low, high = None, labels, 0, classes - 1
    if ignore_class is not None:
        kept = labels != ignore_class
        labels = np.where(kept, labels, 0)
        kept = kept.astype(y_pred.dtype)
        low, high = (-1 if ignore_class == -1 else low), (classes if ignore_class == classes else high)
    if labels.size and _outside(given, low, high) and (kept is None or _outside(labels, 0, classes - 1)):
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(
            f"y: class number {wrong} came, expected 0 to {classes - 1}: predictions have {classes} classes"
        )
    if type(labels) is not np.ndarray:
        ranges.remember(labels, 0, classes - 1)
    return labels, kept


def _outside(values: Any, low: float, high: float) -> bool:
    """Is any of the values, of which there are some, below `low` or above `high`?"""
    least, most = ranges.bounds(values)
    if least >= low and most <= high:
        return False
    least, most = ranges.exact(values)
    return not (least >= low and most <= high)


def _check_probabilities(name: str, values: np.ndarray) -> None:
    if values.size and _outside(values, 0, 1):
        wrong = values[(values < 0) | (values > 1)].ravel()[0]
        raise ValueError(f"{name}: {wrong} came, expected labels from 0 to 1")


# The classes: a function, its options, and the reduction


class FunctionLoss(Loss):
    """A loss made of any function `(y_true, y_pred) -> values`; what `compile(loss=function)` builds.

    The function gets `y_true` as a Tensor of the predictions' dtype, and gives a value a sample, or one in
    all.

    >>> loss = FunctionLoss(lambda y_true, y_pred: ops.abs(y_true - y_pred))
    >>> float(loss([1.0, 2.0], [2.0, 4.0]))
    1.5
    """

    def __init__(
        self, fn: Callable[..., Any], reduction: Reduction = "sum_over_batch_size", name: str | None = None
    ) -> None:
        super().__init__(reduction, name or getattr(fn, "__name__", None))
        self.fn = fn

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        if not isinstance(y_true, Tensor):
            y_true = Tensor(beside(y_true, y_pred.data, "y", y_pred.dtype))
        values = self.fn(y_true, y_pred)
        if not isinstance(values, Tensor):
            raise ValueError(f"loss {self.name}: gave a {type(values).__name__}, expected a Tensor")
        return values

    def get_config(self) -> dict[str, Any]:
        """The function goes by its name."""
        return {"fn": function_name(self.fn), "reduction": self.reduction, "name": self.name}

    @classmethod
    def from_config(cls, config: Any) -> "FunctionLoss":
        """Rebuilds from the function's name, which must be among `custom_objects`."""
        return cls(**{**config, "fn": named_function("loss", config["fn"])})


@_registry.register("mse")
class MeanSquaredError(Loss):
    """Mean of squared differences. See `mean_squared_error`.

    >>> float(MeanSquaredError()([[1.0, 9.0, 2.0], [-5.0, -2.0, 6.0]], [[4.0, 8.0, 12.0], [8.0, 1.0, 3.0]]))
    49.5
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return mean_squared_error(y_true, y_pred)


@_registry.register("mae")
class MeanAbsoluteError(Loss):
    """Mean of absolute differences. See `mean_absolute_error`.

    >>> float(MeanAbsoluteError()([[1.0, 9.0, 2.0], [-5.0, -2.0, 6.0]], [[4.0, 8.0, 12.0], [8.0, 1.0, 3.0]]))
    5.5
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return mean_absolute_error(y_true, y_pred)


@_registry.register("mape")
class MeanAbsolutePercentageError(Loss):
    """Mean of absolute differences in percent of the target. See `mean_absolute_percentage_error`.

    >>> float(MeanAbsolutePercentageError()([2.0, 4.0], [1.0, 4.0]))
    25.0
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return mean_absolute_percentage_error(y_true, y_pred)


@_registry.register("msle")
class MeanSquaredLogarithmicError(Loss):
    """Mean of squared differences of logarithms. See `mean_squared_logarithmic_error`.

    >>> round(float(MeanSquaredLogarithmicError()([0.0], [1.0])), 4)
    0.4805
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return mean_squared_logarithmic_error(y_true, y_pred)


@_registry.register("huber_loss")
class Huber(Loss):
    """Squared near, linear beyond `delta` > 0. See `huber`.

    >>> float(Huber(delta=2.0)([0.0], [3.0]))
    4.0
    """

    def __init__(
        self, delta: float = 1.0, reduction: Reduction = "sum_over_batch_size", name: str | None = None
    ) -> None:
        super().__init__(reduction, name)
        if not delta > 0:
            raise ValueError(f"delta: expected a number > 0, got {delta!r}")
        self.delta = delta

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return huber(y_true, y_pred, self.delta)


@_registry.register("logcosh")
class LogCosh(Loss):
    """Mean of the logarithm of the hyperbolic cosine of the difference. See `log_cosh`.

    >>> round(float(LogCosh()([0.0], [1.0])), 4)
    0.4338
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return log_cosh(y_true, y_pred)


@_registry.register("kld", "kullback_leibler_divergence")
class KLDivergence(Loss):
    """Kullback-Leibler divergence of two distributions. See `kl_divergence`.

    >>> round(float(KLDivergence()([[0.5, 0.5]], [[0.25, 0.75]])), 4)
    0.1438
    """

    labels = "one_hot"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return kl_divergence(y_true, y_pred)


@_registry.register()
class Poisson(Loss):
    """Negative log likelihood of counts, up to a constant. See `poisson`.

    >>> round(float(Poisson()([2.0], [1.0])), 4)
    1.0
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return poisson(y_true, y_pred)


@_registry.register("quantile")
class Pinball(Loss):
    """Outputs learn quantiles of the target: of `error = y_true - y_pred`, `max(q * error, (q - 1) * error)`.

    It is least in the mean where a share q of the targets lies below the output (Koenker & Bassett 1978, "Regression
    quantiles"). For each of the n targets in the last axis the model has one output a quantile, side by side: `y_true`
    (..., n), `y_pred` (..., n * outputs).

    Arguments:
        quantiles: numbers between 0 and 1.
        point: also, before the quantiles, an output for one value: "mse" (which learns the mean), "mae" (the median)
            or "huber"; None for none. Its loss is added to the quantiles' mean.

    Raises ValueError for quantiles outside 0 to 1 or none at all, another `point`, shapes that do not fit.

    >>> float(Pinball([0.75])([[1.0]], [[0.0]])), float(Pinball([0.75])([[0.0]], [[1.0]]))  # below, above the truth
    (0.75, 0.25)
    >>> float(Pinball([0.1, 0.9], point="mse")([[2.0]], [[0.0, 2.0, 2.0]]))
    4.0
    """

    def __init__(
        self,
        quantiles: Sequence[float] = (0.5,),
        point: str | None = None,
        reduction: Reduction = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(reduction, name)
        self.quantiles: list[float] = [float(q) for q in np.atleast_1d(np.asarray(quantiles, np.float64))]
        if not self.quantiles or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError(f"quantiles: expected numbers between 0 and 1, got {quantiles!r}")
        if point not in (None, *_POINTS):
            raise ValueError(f"point: expected one of {', '.join(_POINTS)} or None, got {point!r}")
        self.point = point

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        first = 0 if self.point is None else 1
        width = first + len(self.quantiles)
        truth = beside(y_true.data if isinstance(y_true, Tensor) else y_true, y_pred.data, "y", y_pred.dtype)
        if truth.ndim == y_pred.ndim - 1:
            truth = truth[..., None]
        if (*truth.shape[:-1], truth.shape[-1] * width) != y_pred.shape:
            raise ValueError(
                f"y: targets of shape {truth.shape} came for predictions of shape {y_pred.shape}; "
                f"expected {width} outputs a target"
            )
        outputs = y_pred.reshape((*truth.shape, width))
        shares = beside(np.array(self.quantiles, y_pred.dtype), y_pred.data, "quantiles")
        error = Tensor(truth[..., None]) - outputs[..., first:]
        values = ops.mean(ops.maximum(shares * error, (shares - 1) * error), axis=(-2, -1))
        return values if self.point is None else values + _POINTS[self.point](truth, outputs[..., 0])


_POINTS: dict[str, Callable[[Any, Any], Tensor]] = {
    "mse": mean_squared_error,
    "mae": mean_absolute_error,
    "huber": huber,
}


@_registry.register("cosine_proximity", "cosine")
class CosineSimilarity(Loss):
    """Minus the cosine between target and prediction. See `cosine_similarity`.

    >>> round(float(CosineSimilarity()([[0.0, 2.0]], [[3.0, 3.0]])), 4)
    -0.7071
    """

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return cosine_similarity(y_true, y_pred)


@_registry.register()
class Hinge(Loss):
    """The margin loss of support vector machines. See `hinge`.

    >>> round(float(Hinge()([[0.0, 1.0], [0.0, 0.0]], [[0.6, 0.4], [0.4, 0.6]])), 4)
    1.3
    """

    labels = "number"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return hinge(y_true, y_pred)


@_registry.register()
class SquaredHinge(Loss):
    """The square of the margin loss. See `squared_hinge`.

    >>> round(float(SquaredHinge()([[0.0, 1.0], [0.0, 0.0]], [[0.6, 0.4], [0.4, 0.6]])), 4)
    1.86
    """

    labels = "number"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return squared_hinge(y_true, y_pred)


@_registry.register()
class CategoricalHinge(Loss):
    """The margin loss of one class against the strongest other. See `categorical_hinge`.

    >>> round(float(CategoricalHinge()([[0.0, 1.0], [0.0, 0.0]], [[0.6, 0.4], [0.4, 0.6]])), 4)
    1.4
    """

    labels = "one_hot"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return categorical_hinge(y_true, y_pred)


class _Crossentropy(Loss):
    """What the smoothed cross-entropies share: their options."""

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: Reduction = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(reduction, name)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
        self.from_logits: bool = bool(from_logits)
        self.label_smoothing = label_smoothing


@_registry.register("bce")
class BinaryCrossentropy(_Crossentropy):
    """Cross-entropy of independent yes/no outputs. See `binary_crossentropy`.

    >>> round(float(BinaryCrossentropy(from_logits=True)([[1.0], [0.0]], [[0.0], [0.0]])), 4)
    0.6931
    """

    labels = "number"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return binary_crossentropy(y_true, y_pred, self.from_logits, self.label_smoothing)


@_registry.register("cce")
class CategoricalCrossentropy(_Crossentropy):
    """Cross-entropy of one-hot classes. See `categorical_crossentropy`.

    >>> round(float(CategoricalCrossentropy()([[0.0, 1.0]], [[0.5, 0.5]])), 4)
    0.6931
    """

    labels = "one_hot"

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return categorical_crossentropy(y_true, y_pred, self.from_logits, self.label_smoothing)


@_registry.register("scce")
class SparseCategoricalCrossentropy(Loss):
    """Cross-entropy of class numbers. See `sparse_categorical_crossentropy`.

    Labels equal to `ignore_class` neither add to the loss nor count in its mean.

    >>> loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    >>> round(float(loss([1, -1], [[0.0, 0.0], [0.0, 9.0]])), 4)
    0.6931
    """

    labels = "number"

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: Reduction = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(reduction, name)
        self.from_logits: bool = bool(from_logits)
        self.ignore_class = ignore_class

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return sparse_categorical_crossentropy(y_true, y_pred, self.from_logits, self.ignore_class)

    def valid(self, y_true: Any, mask: Any) -> Any:
        if self.ignore_class is None:
            return mask
        labels = adopt(y_true.data if isinstance(y_true, Tensor) else y_true)
        kept = labels != self.ignore_class
        return kept if mask is None else kept & beside(mask, kept, "mask", bool).reshape(kept.shape)


def get(identifier: Any) -> Loss | None:
    """A loss from its name in any spelling, its class, its saved form, a function, or itself; None stays
    None.

    Raises ValueError for an unknown name, listing the known ones.

    >>> get("meanSquaredError").name, get("sparse_categorical_crossentropy").name
    ('mean_squared_error', 'sparse_categorical_crossentropy')
    """
    if isinstance(identifier, Mapping) and identifier.get("class_name") == "FunctionLoss":
        return FunctionLoss.from_config(identifier["config"])
    loss = _registry.get(identifier)
    if loss is None or isinstance(loss, Loss):
        return loss
    if callable(loss):
        return FunctionLoss(loss)
    raise ValueError(
        f"loss: got {identifier!r} of type {type(identifier).__name__}; expected a name, function or Loss"
    )


deserialize = get


def function_name(fn: Callable[..., Any]) -> str:
    """How a user's function is called in a file."""
    return getattr(fn, "__name__", type(fn).__name__)


def named_function(kind: str, name: Any) -> Callable[..., Any]:
    """The function that a file names. Raises ValueError saying how to give it, when it is not known here."""
    if callable(name):
        return name
    if name not in _functions:
        raise ValueError(
            f"{kind}: the function {name!r} of this model is not known here: give it in custom_objects, "
            f"or load with compile=False"
        )
    return _functions.find(name)


mse = MSE = mean_squared_error
mae = MAE = mean_absolute_error
mape = MAPE = mean_absolute_percentage_error
msle = MSLE = mean_squared_logarithmic_error
kld = KLD = kl_divergence
logcosh = log_cosh
