"""Metrics: figures that are watched but not trained on, accumulated over batches, with Keras' names and
formulas.

`update_state(y_true, y_pred, sample_weight)` takes a batch of NumPy arrays (or Tensors), `result()` gives the
figure for all batches since `reset_state()`. Sums are kept in float64. A mask of the predictions reaches a
metric as sample weights of 0 and 1, so padded steps never count (in Keras they do, unless sample weights are
given).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from numlstm import losses
from numlstm.autograd import Tensor
from numlstm.backend import adopt, beside, namespace, place_of, scalar, to_numpy
from numlstm.losses import Loss, class_numbers, function_name, named_function, pair
from numlstm.registry import Configurable, Registry, serialize, snake_case

__all__ = [
    "AUC",
    "Accuracy",
    "BinaryAccuracy",
    "CategoricalAccuracy",
    "CosineSimilarity",
    "LossMetric",
    "Mean",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanMetricWrapper",
    "MeanSquaredError",
    "Metric",
    "Perplexity",
    "Precision",
    "R2Score",
    "Recall",
    "RootMeanSquaredError",
    "SparseCategoricalAccuracy",
    "SparseTopKCategoricalAccuracy",
    "Sum",
    "TopKCategoricalAccuracy",
    "deserialize",
    "get",
    "resolve",
    "serialize",
]

_registry: Registry[type["Metric"]] = Registry("metric")


class Metric(Configurable):
    """Base of all metrics: write `reset_state`, `update_state` and `result`.

    >>> class Largest(Metric):
    ...     def reset_state(self):
    ...         self.largest = -math.inf
    ...     def update_state(self, y_true, y_pred, sample_weight=None):
    ...         self.largest = max(self.largest, float(np.max(y_pred)))
    ...     def result(self):
    ...         return self.largest
    >>> Largest()([0.0, 0.0], [3.0, 2.0])
    3.0
    """

    state_names: ClassVar[tuple[str, ...]] = ()  # what `reset_state` sets, for runs that are taken up again

    def __init__(self, name: str | None = None) -> None:
        self.name: str = name or snake_case(type(self).__name__)
        self.reset_state()

    def reset_state(self) -> None:
        """Forget every batch."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_state()")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Take in a batch: targets and predictions; weights of the first axes of the predictions."""
        raise NotImplementedError(f"{type(self).__name__} must define update_state()")

    def result(self) -> float:
        """The figure for all batches so far."""
        raise NotImplementedError(f"{type(self).__name__} must define result()")

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        self.update_state(*args, **kwargs)
        return self.result()

    def get_state(self) -> dict[str, Any]:
        """The sums so far, JSON-able: the attributes in `state_names`."""
        return {name: serialize(_read(getattr(self, name))) for name in self.state_names}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        for name, value in state.items():
            setattr(self, name, np.asarray(value, np.float64) if isinstance(value, list) else value)


class _Average(Metric):
    """A metric that is a weighted mean of values."""

    state_names: ClassVar[tuple[str, ...]] = ("total", "count")

    def reset_state(self) -> None:
        self.total: float = 0.0
        self.count: float = 0.0

    def add(self, values: Any, sample_weight: Any = None) -> None:
        """Take in `values`; `sample_weight` has their shape, or their first axes."""
        values = _array(values)
        if sample_weight is None:
            self.total = self.total + _sum(values)
            self.count = self.count + values.size
            return
        values, weights = _weighed(values, sample_weight)
        self.total = self.total + _sum(values * weights)
        self.count = self.count + _sum(weights)

    def result(self) -> float:
        self.total, self.count = _read(self.total), _read(self.count)
        return self.total / self.count if self.count else 0.0


@_registry.register()
class Mean(_Average):
    """The weighted mean of all values seen.

    >>> mean = Mean()
    >>> mean.update_state([1, 3, 5, 7], sample_weight=[1, 1, 0, 0])
    >>> mean.result()
    2.0
    """

    def update_state(self, values: Any, sample_weight: Any = None) -> None:  # type: ignore[override]
        self.add(values, sample_weight)


@_registry.register()
class Sum(Metric):
    """The weighted sum of all values seen.

    >>> Sum()([1, 3, 5, 7])
    16.0
    """

    state_names: ClassVar[tuple[str, ...]] = ("total",)

    def reset_state(self) -> None:
        self.total: float = 0.0

    def update_state(self, values: Any, sample_weight: Any = None) -> None:  # type: ignore[override]
        values = _array(values)
        if sample_weight is not None:
            values, weights = _weighed(values, sample_weight)
            values = values * weights
        self.total = self.total + _sum(values)

    def result(self) -> float:
        self.total = _read(self.total)
        return self.total


class MeanMetricWrapper(_Average):
    """The mean of what a function `(y_true, y_pred) -> values` gives; what `compile(metrics=[function])`
    builds.

    >>> within = MeanMetricWrapper(lambda y_true, y_pred: np.abs(y_true - y_pred) < 1, name="within_1")
    >>> within([1.0, 2.0], [1.5, 4.0])
    0.5
    """

    def __init__(self, fn: Callable[..., Any], name: str | None = None) -> None:
        self.fn = fn
        super().__init__(name or getattr(fn, "__name__", None))

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.add(self.fn(_array(y_true), _array(y_pred)), sample_weight)

    def get_config(self) -> dict[str, Any]:
        """The function goes by its name."""
        return {"fn": function_name(self.fn), "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "MeanMetricWrapper":
        """Rebuilds from the function's name, which must be among `custom_objects`."""
        return cls(named_function("metric", config["fn"]), config["name"])


class LossMetric(_Average):
    """A loss as a metric: the mean of its values, one a sample and step.

    Within training, where the loss that is trained on is the same, its values are taken over instead of
    computed again.

    >>> LossMetric("huber")([[0.0, 0.0]], [[1.0, 3.0]])
    1.5
    """

    def __init__(self, loss: Any, name: str | None = None) -> None:
        self.loss: Any = losses.get(loss)
        super().__init__(name or self.loss.name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.add_loss(self.loss.call(_array(y_true), _tensor(y_pred)).data, _array(y_true), sample_weight)

    def add_loss(self, values: np.ndarray, y_true: Any, sample_weight: Any) -> None:
        """Take in values of the loss, computed elsewhere; labels that it ignores do not count."""
        kept = self.loss.valid(y_true, None)
        if kept is not None:
            kept = beside(kept, values, "y", values.dtype).reshape(values.shape)
            sample_weight = kept if sample_weight is None else _weighed(kept, sample_weight)[1] * kept
        self.add(values, sample_weight)


@_registry.register("mse")
class MeanSquaredError(LossMetric):
    """Mean of squared differences.

    >>> MeanSquaredError()([[0, 1], [0, 0]], [[1, 1], [0, 0]])
    0.25
    """

    def __init__(self, name: str = "mean_squared_error") -> None:
        super().__init__("mse", name)


@_registry.register("mae")
class MeanAbsoluteError(LossMetric):
    """Mean of absolute differences.

    >>> MeanAbsoluteError()([[0, 1], [0, 0]], [[1, 1], [0, 0]], sample_weight=[1, 0])
    0.5
    """

    def __init__(self, name: str = "mean_absolute_error") -> None:
        super().__init__("mae", name)


@_registry.register("mape")
class MeanAbsolutePercentageError(LossMetric):
    """Mean of absolute differences in percent of the target.

    >>> MeanAbsolutePercentageError()([[2.0], [4.0]], [[1.0], [4.0]])
    25.0
    """

    def __init__(self, name: str = "mean_absolute_percentage_error") -> None:
        super().__init__("mape", name)


@_registry.register()
class CosineSimilarity(_Average):
    """The mean cosine between targets and predictions over the last axis: 1 is best.

    >>> round(CosineSimilarity()([[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]), 4)
    0.5
    """

    def __init__(self, name: str = "cosine_similarity") -> None:
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.add(-losses.cosine_similarity(_array(y_true), _tensor(y_pred)).data, sample_weight)


@_registry.register("rmse")
class RootMeanSquaredError(_Average):
    """The root of the mean of squared differences.

    >>> round(RootMeanSquaredError()([[0, 1], [0, 0]], [[1, 1], [0, 0]]), 4)
    0.5
    """

    def __init__(self, name: str = "root_mean_squared_error") -> None:
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.add(losses.mean_squared_error(_array(y_true), _tensor(y_pred)).data, sample_weight)

    def result(self) -> float:
        return math.sqrt(super().result())


@_registry.register("r2")
class R2Score(Metric):
    """The coefficient of determination: 1 - squared error over the targets' variance, averaged over the
    outputs.

    `class_aggregation` is "uniform_average" or "variance_weighted_average" (how outputs are weighed).

    >>> round(R2Score()([[1], [4], [3]], [[2], [4], [4]]), 6)
    0.571429
    """

    state_names: ClassVar[tuple[str, ...]] = ("_sums",)

    def __init__(
        self,
        class_aggregation: Literal["uniform_average", "variance_weighted_average"] = "uniform_average",
        name: str = "r2_score",
    ) -> None:
        if class_aggregation not in ("uniform_average", "variance_weighted_average"):
            raise ValueError(
                f"class_aggregation: got {class_aggregation!r}; "
                f"expected uniform_average or variance_weighted_average"
            )
        self.class_aggregation = class_aggregation
        super().__init__(name)

    def reset_state(self) -> None:
        self._sums = np.zeros((4, 1))  # weights, y, y^2, squared error; one column an output

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = pair(_array(y_true), _array(y_pred))
        width = truth.shape[-1]
        y = truth.data.astype(np.float64)
        error = y - predicted.data
        if sample_weight is None:
            weights = namespace(y).ones(y.shape[:-1])
        else:
            weights = _weighed(y[..., 0], sample_weight)[1]
        w = np.broadcast_to(weights, y.shape[:-1]).reshape(-1, 1)
        y, error = y.reshape(-1, width), error.reshape(-1, width)
        sums = np.stack([np.broadcast_to(w, y.shape), w * y, w * y**2, w * error**2]).sum(axis=1)
        self._sums = beside(self._sums, sums, "state") + sums

    def result(self) -> float:
        self._sums = _read(self._sums)
        count, total, squares, residual = self._sums
        if not count.any():
            return 0.0
        spread = squares - total**2 / count
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.where(spread > 0, 1 - residual / spread, np.where(residual > 0, 0.0, 1.0))
        if self.class_aggregation == "uniform_average" or not spread.any():
            return float(scores.mean())
        return float((scores * spread).sum() / spread.sum())


# Accuracy


@_registry.register()
class Accuracy(_Average):
    """How often predictions equal the labels.

    >>> Accuracy()([[1], [2], [3], [4]], [[0], [2], [3], [4]])
    0.75
    """

    def __init__(self, name: str = "accuracy") -> None:
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = pair(_array(y_true), _array(y_pred))
        self.add((truth.data == predicted.data).mean(axis=-1), sample_weight)


@_registry.register()
class BinaryAccuracy(_Average):
    """How often `y_pred > threshold` agrees with labels 0 and 1. For logits the threshold is 0.

    >>> BinaryAccuracy()([[1], [1], [0], [0]], [[0.98], [1], [0], [0.6]])
    0.75
    """

    def __init__(self, name: str = "binary_accuracy", threshold: float = 0.5) -> None:
        self.threshold = threshold
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = pair(_array(y_true), _array(y_pred))
        self.add((truth.data == (predicted.data > self.threshold)).mean(axis=-1), sample_weight)


@_registry.register()
class CategoricalAccuracy(_Average):
    """How often the largest prediction is that of the one-hot label.

    >>> CategoricalAccuracy()([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0]])
    0.5
    """

    def __init__(self, name: str = "categorical_accuracy") -> None:
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = pair(_array(y_true), _array(y_pred))
        self.add(truth.data.argmax(axis=-1) == predicted.data.argmax(axis=-1), sample_weight)


@_registry.register()
class SparseCategoricalAccuracy(_Average):
    """How often the largest prediction is that of the class number.

    >>> SparseCategoricalAccuracy()([2, 1], [[0.1, 0.6, 0.3], [0.05, 0.95, 0]])
    0.5
    """

    def __init__(self, name: str = "sparse_categorical_accuracy") -> None:
        super().__init__(name)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        predicted = _tensor(y_pred)
        labels, _ = class_numbers(_array(y_true), predicted, None)
        self.add(labels == predicted.data.argmax(axis=-1), sample_weight)


class _TopK(_Average):
    def __init__(self, k: int = 5, name: str | None = None) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {k!r}")
        self.k = k
        super().__init__(name)

    def _add_labels(self, labels: np.ndarray, predicted: np.ndarray, sample_weight: Any) -> None:
        of_label = np.take_along_axis(predicted, beside(labels, predicted, "y")[..., None], axis=-1)
        self.add((predicted > of_label).sum(axis=-1) < self.k, sample_weight)


@_registry.register("top_k_accuracy")
class TopKCategoricalAccuracy(_TopK):
    """How often fewer than `k` classes are predicted above the one-hot label's.

    >>> TopKCategoricalAccuracy(k=1)([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0]])
    0.5
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = pair(_array(y_true), _array(y_pred))
        self._add_labels(truth.data.argmax(axis=-1), predicted.data, sample_weight)


@_registry.register("sparse_top_k_accuracy")
class SparseTopKCategoricalAccuracy(_TopK):
    """How often fewer than `k` classes are predicted above the class number's.

    >>> SparseTopKCategoricalAccuracy(k=2)([2, 1], [[0.1, 0.9, 0.8], [0.05, 0.95, 0]])
    1.0
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        predicted = _tensor(y_pred)
        labels, _ = class_numbers(_array(y_true), predicted, None)
        self._add_labels(labels, predicted.data, sample_weight)


@_registry.register()
class Perplexity(LossMetric):
    """The exponential of the mean cross-entropy, in nats, of class numbers.

    `from_logits`: whether predictions are logits (as a string in `compile`, "perplexity" takes it from the
    loss).

    >>> round(Perplexity()([1, 0], [[0.5, 0.5], [0.25, 0.75]]), 4)
    2.8284
    """

    from_logits: bool
    ignore_class: int | None

    def __init__(
        self, from_logits: bool = False, ignore_class: int | None = None, name: str = "perplexity"
    ) -> None:
        self.from_logits, self.ignore_class = from_logits, ignore_class
        super().__init__(losses.SparseCategoricalCrossentropy(from_logits, ignore_class), name)

    def result(self) -> float:
        mean = super().result()
        return math.exp(mean) if mean < 700 else math.inf


# Yes and no: precision, recall, area under the curve


class _Thresholded(Metric):
    """Counts of true and false positives and false negatives at each threshold."""

    thresholds: float | Sequence[float] | None
    top_k: int | None
    class_id: int | None

    state_names: ClassVar[tuple[str, ...]] = ("true_positives", "false_positives", "false_negatives")

    def __init__(
        self,
        thresholds: float | Sequence[float] | None = None,
        top_k: int | None = None,
        class_id: int | None = None,
        name: str | None = None,
    ) -> None:
        self.thresholds, self.top_k, self.class_id = thresholds, top_k, class_id
        default = 0.5 if top_k is None else -math.inf
        self._limits = np.atleast_1d(np.asarray(default if thresholds is None else thresholds, np.float64))
        if thresholds is not None and not ((self._limits >= 0) & (self._limits <= 1)).all():
            raise ValueError(f"thresholds: expected numbers from 0 to 1, got {thresholds!r}")
        super().__init__(name)

    def reset_state(self) -> None:
        self.true_positives: np.ndarray = np.zeros(len(self._limits))
        self.false_positives: np.ndarray = np.zeros(len(self._limits))
        self.false_negatives: np.ndarray = np.zeros(len(self._limits))

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = (t.data for t in pair(_array(y_true), _array(y_pred)))
        weights: Any = 1.0 if sample_weight is None else _weighed(truth, sample_weight)[1]
        if self.top_k is not None:  # all but the k largest of the last axis are "no"
            at = predicted.shape[-1] - self.top_k
            kth = np.sort(predicted, axis=-1)[..., at : at + 1]
            predicted = np.where(predicted >= kth, predicted, -math.inf)
        if self.class_id is not None:
            if sample_weight is not None:
                weights = weights[..., self.class_id]
            truth, predicted = truth[..., self.class_id], predicted[..., self.class_id]
        yes = truth.astype(bool)
        for name in self.state_names:
            setattr(self, name, beside(getattr(self, name), predicted, "state"))
        for at, limit in enumerate(self._limits):
            said = predicted > limit
            self.true_positives[at] += ((said & yes) * weights).sum()
            self.false_positives[at] += ((said & ~yes) * weights).sum()
            self.false_negatives[at] += ((~said & yes) * weights).sum()

    def _ratio(self, name: str) -> Any:
        self.true_positives, others = _read(self.true_positives), _read(getattr(self, name))
        setattr(self, name, others)
        whole = self.true_positives + others
        ratio = np.divide(self.true_positives, whole, out=np.zeros_like(whole), where=whole != 0)
        return float(ratio[0]) if len(ratio) == 1 else ratio.tolist()


@_registry.register()
class Precision(_Thresholded):
    """Which part of what was predicted as "yes" (above a threshold, 0.5 unless said) is "yes".

    Several `thresholds` give a list. `top_k`: only the k largest of the last axis count as predicted;
    `class_id`: only this entry of the last axis is looked at.

    >>> round(Precision()([0, 1, 1, 1], [1, 0, 1, 1]), 4)
    0.6667
    """

    def result(self) -> Any:
        return self._ratio("false_positives")


@_registry.register()
class Recall(_Thresholded):
    """Which part of what is "yes" was predicted as "yes". Options as in `Precision`.

    >>> round(Recall()([0, 1, 1, 1], [1, 0, 1, 1]), 4)
    0.6667
    """

    def result(self) -> Any:
        return self._ratio("false_negatives")


@_registry.register()
class AUC(Metric):
    """Area under the receiver-operating ("ROC") or precision-recall ("PR") curve, by thresholds evenly spread
    in [0, 1].

    `summation_method`: "interpolation" (trapezoids; for PR the interpolation of Davis & Goadrich 2006),
    "minoring" or "majoring" (the lower or higher end of each interval). Predictions must lie in [0, 1], or be
    logits (`from_logits`).

    >>> AUC(num_thresholds=3)([0, 0, 1, 1], [0, 0.5, 0.3, 0.9])
    0.75
    """

    num_thresholds: int

    state_names: ClassVar[tuple[str, ...]] = ("_counts",)

    def __init__(
        self,
        num_thresholds: int = 200,
        curve: Literal["ROC", "PR"] = "ROC",
        summation_method: Literal["interpolation", "minoring", "majoring"] = "interpolation",
        name: str = "auc",
        thresholds: Sequence[float] | None = None,
        from_logits: bool = False,
    ) -> None:
        if thresholds is None and (not isinstance(num_thresholds, int) or num_thresholds < 2):
            raise ValueError(f"num_thresholds: expected an integer > 1, got {num_thresholds!r}")
        if curve not in ("ROC", "PR"):
            raise ValueError(f"curve: expected ROC or PR, got {curve!r}")
        if summation_method not in ("interpolation", "minoring", "majoring"):
            raise ValueError(
                f"summation_method: expected interpolation, minoring or majoring; got {summation_method!r}"
            )
        self.num_thresholds, self.curve, self.summation_method = num_thresholds, curve, summation_method
        self.thresholds: list[float] | None = None if thresholds is None else list(thresholds)
        self.from_logits = from_logits
        inner = np.linspace(0, 1, num_thresholds)[1:-1] if thresholds is None else np.sort(thresholds)
        self._limits = np.concatenate([[-1e-7], inner, [1 + 1e-7]])
        super().__init__(name)

    def reset_state(self) -> None:
        # Weight of positives and negatives by the number of thresholds below their prediction.
        self._counts = np.zeros((2, len(self._limits) + 1))
        self._outside: Any = False  # on a device: whether a prediction outside [0, 1] came

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        truth, predicted = (t.data for t in pair(_array(y_true), _array(y_pred)))
        predicted = predicted.astype(np.float64)
        if self.from_logits:
            predicted = 0.5 * (1 + np.tanh(0.5 * predicted))
        here = type(predicted) is np.ndarray
        if here:
            self._check(predicted.size and not (predicted.min() >= 0 and predicted.max() <= 1))
        else:
            self._outside = self._outside | ~((predicted >= 0) & (predicted <= 1)).all()
        ones = namespace(predicted).ones
        weights = ones(truth.shape) if sample_weight is None else _weighed(truth, sample_weight)[1]
        weights = np.broadcast_to(weights, truth.shape).ravel()
        limits = beside(self._limits, predicted, "thresholds")
        below = np.searchsorted(limits, predicted.ravel(), side="left")
        yes = truth.ravel().astype(bool)
        if here:
            for row, chosen in enumerate((yes, ~yes)):
                self._counts[row] += np.bincount(below[chosen], weights[chosen], self._counts.shape[1])
            return
        self._limits = limits
        self._counts = beside(self._counts, predicted, "state")
        namespace(predicted).add.at(self._counts, (1 - yes.astype(np.int64), below), weights)

    def _check(self, outside: Any) -> None:
        if outside:
            raise ValueError(
                "y_pred: predictions outside [0, 1] came; AUC takes probabilities, or from_logits=True"
            )

    def result(self) -> float:
        self._counts, self._limits = _read(self._counts), _read(self._limits)
        self._check(_read(self._outside))
        # Predicted "yes" at threshold i: everything above it.
        above = self._counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        tp, fp = above
        positives, negatives = self._counts.sum(axis=1)
        recall = _divide(tp, positives)
        if self.curve == "PR" and self.summation_method == "interpolation":
            return self._interpolated_pr(tp, fp, positives)
        x, y = (_divide(fp, negatives), recall) if self.curve == "ROC" else (recall, _divide(tp, tp + fp))
        heights = {
            "interpolation": (y[:-1] + y[1:]) / 2,
            "minoring": np.minimum(y[:-1], y[1:]),
            "majoring": np.maximum(y[:-1], y[1:]),
        }[self.summation_method]
        return float(((x[:-1] - x[1:]) * heights).sum())

    def _interpolated_pr(self, tp: np.ndarray, fp: np.ndarray, positives: float) -> float:
        """Between two thresholds true positives grow linearly with all predicted positives (Davis & Goadrich,
        eq. 1)."""
        said = tp + fp
        slope = _divide(tp[:-1] - tp[1:], np.maximum(said[:-1] - said[1:], 0))
        intercept = tp[1:] - slope * said[1:]
        both = (said[:-1] > 0) & (said[1:] > 0)
        growth = np.where(both, _divide(said[:-1], np.maximum(said[1:], 0)), 1.0)
        areas = slope * (tp[:-1] - tp[1:] + intercept * np.log(growth))
        return float(_divide(areas, np.full_like(areas, max(positives, 0.0))).sum())


_WRAPPERS = {
    "LossMetric": LossMetric,
    "MeanMetricWrapper": MeanMetricWrapper,
}  # in files, but no names of metrics


def get(identifier: Any) -> Metric:
    """A metric from its name in any spelling, its class, its saved form, a function, or itself. Losses are
    metrics too.

    Raises ValueError for an unknown name, listing the known ones.

    >>> get("mae").name, get("poisson").name
    ('mean_absolute_error', 'poisson')
    """
    if isinstance(identifier, str) and identifier not in _registry and identifier in losses._registry:
        return LossMetric(identifier)
    if isinstance(identifier, Mapping) and identifier.get("class_name") in _WRAPPERS:
        return _WRAPPERS[identifier["class_name"]].from_config(identifier["config"])
    metric = LossMetric(identifier) if isinstance(identifier, Loss) else _registry.get(identifier)
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return MeanMetricWrapper(metric)
    raise ValueError(f"metric: got {identifier!r}; expected a name, a function or a Metric")


deserialize = get


def resolve(identifier: Any, loss: Any, y_true: np.ndarray, y_pred: np.ndarray) -> Metric:
    """`get` for `compile`: "accuracy" (or "acc") and "crossentropy" (or "ce") by the shapes of the first
    batch.

    As in Keras: one output is binary; labels with an axis less, or a last axis of 1, are class numbers; else
    one-hot. What a string names takes `from_logits` from the loss, and the string is the metric's name in the
    logs.
    """
    if not isinstance(identifier, str):
        return get(identifier)
    word = identifier.lower()
    logits = bool(getattr(loss, "from_logits", False))
    kind = "binary" if y_pred.shape[-1] == 1 else "categorical"
    if kind == "categorical" and (y_true.ndim < y_pred.ndim or y_true.shape[-1] == 1):
        kind = "sparse_categorical"
    if word in ("accuracy", "acc"):
        metric: Any = get(f"{kind}_accuracy")
    elif word in ("crossentropy", "ce"):
        metric = get(f"{kind}_crossentropy")
    else:
        metric = get(identifier)
    inner: Any = getattr(metric, "loss", metric)
    if logits and hasattr(inner, "from_logits"):
        inner.from_logits = True
        metric.from_logits = True
    if isinstance(metric, BinaryAccuracy) and logits:
        metric.threshold = 0.0
    if isinstance(inner, losses.SparseCategoricalCrossentropy) and type(loss) is type(inner):
        inner.ignore_class = loss.ignore_class
    metric.name = identifier
    return metric


def _array(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else adopt(x)


def _sum(a: Any) -> Any:
    """The sum of all elements in float64; that of a device's array stays there until it is read."""
    total = a.sum(dtype=np.float64)
    return float(total) if type(a) is np.ndarray else total


def _read(state: Any) -> Any:
    """A sum, or an array of them, on the host."""
    if place_of(state) is None:
        return state
    return to_numpy(state) if state.ndim else scalar(state)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


def _divide(a: np.ndarray, b: Any) -> np.ndarray:
    """a / b, 0 where b is 0."""
    b = np.broadcast_to(np.asarray(b, np.float64), a.shape)
    return np.divide(a, b, out=np.zeros_like(a, np.float64), where=b != 0)


def _weighed(values: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of one shape; values are averaged over axes that the weights do not have (as in
    Keras)."""
    weights = beside(_array(sample_weight), values, "sample_weight", np.float64)
    if weights.ndim == values.ndim + 1 and weights.shape[-1] == 1:
        weights = weights[..., 0]
    if weights.ndim > values.ndim or any(
        n not in (1, m) for n, m in zip(weights.shape, values.shape, strict=False)
    ):
        raise ValueError(
            f"sample_weight: shape {weights.shape} came, expected {values.shape} or its first axes"
        )
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    return values, np.broadcast_to(weights, values.shape)
