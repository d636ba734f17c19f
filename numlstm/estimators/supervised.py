"""`LSTMClassifier` and `LSTMRegressor`: a label or numbers for each sequence.

X is (samples, time, features), a list of arrays (time, features) of unequal length, or a 2-D table (samples, columns),
one sequence a row: by default each column is a step of one feature, `features_per_step` tells otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import column_or_1d, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted

from numlstm.data.tables import Scaler
from numlstm.estimators.base import RecurrentEstimator
from numlstm.estimators.inputs import Samples, read_samples, scale
from numlstm.losses import SparseCategoricalCrossentropy

__all__ = ["LSTMClassifier", "LSTMRegressor"]

REGRESSION_LOSSES = {"squared_error": "mse", "absolute_error": "mae", "huber": "huber"}
"""scikit-learn's names of losses, and ours."""


class _Supervised(RecurrentEstimator):
    """What classifier and regressor share: reading and scaling X, the validation part."""

    features_per_step: Any
    scale: bool
    feature_mean_: np.ndarray
    feature_scale_: np.ndarray

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    def _read(self, X: Any, *, reset: bool = False) -> Samples:
        return read_samples(self, X, reset=reset, features_per_step=self.features_per_step)

    def _scaler(self) -> Scaler | None:
        return Scaler(self.feature_mean_, self.feature_scale_) if self.scale else None

    def _fit_scaler(self, samples: Samples) -> None:
        if self.scale:
            scaler = Scaler.fit(np.concatenate([np.reshape(s, (-1, np.shape(s)[-1])) for s in samples]))
            self.feature_mean_, self.feature_scale_ = scaler.mean, scaler.deviation

    def _parts(self, rows: int, seed: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows to train on, and those to validate on if there is early stopping."""
        if not self.early_stopping:
            return np.arange(rows), None
        if rows < 2:
            raise ValueError("early_stopping: needs samples to hold out, got n_samples = 1")
        train, held = train_test_split(
            np.arange(rows), test_size=self._fraction(), random_state=seed, stratify=labels
        )
        return np.sort(train), np.sort(held)

    def _learn(self, samples: Samples, y: np.ndarray, train: np.ndarray, held: np.ndarray | None, seed: int,
               outputs: int, loss: Any, weights: np.ndarray | None = None) -> None:  # fmt: skip
        """Scale and train. `y` as the loss takes it."""
        x = scale(self._scaler(), samples)
        validation = None
        if held is not None:
            validation = {"x": _rows(x, held), "y": y[held]}
            if weights is not None:
                validation["sample_weight"] = weights[held]
        data: dict[str, Any] = {"x": _rows(x, train), "y": y[train]}
        if weights is not None:
            data["sample_weight"] = weights[train]
        self._train(np.shape(samples[0])[-1], outputs, loss, seed, validation=validation, options={}, **data)

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self._output(scale(self._scaler(), self._read(X)))


def _rows(samples: Samples, rows: np.ndarray) -> Samples:
    if isinstance(samples, list):
        return [samples[row] for row in rows]
    return samples if len(rows) == len(samples) else samples[rows]


class LSTMClassifier(ClassifierMixin, _Supervised):
    """A class for each sequence, by a recurrent network whose last state is classified.

    Arguments:
        units: of the recurrent layer, or a tuple, one entry a layer.
        cell: "lstm", "gru", "rnn", "slstm" or "indrnn". bidirectional: also read from the end.
        dropout: share of each layer's outputs that is dropped in training.
        learning_rate: Adam's; gradients are clipped to norm 1. epochs: passes over the data. batch_size: samples a step.
        early_stopping: hold out `validation_fraction` of the samples (stratified), stop after `n_iter_no_change` epochs
            without a better one, keep the best.
        class_weight: None, "balanced", or `{class: weight}`.
        features_per_step: columns of a 2-D X that make a time step; "all": a row is a single step.
        scale: bring features to mean 0 and deviation 1, by the training samples.
        random_state: an integer makes `fit` repeatable, to the bit. backend: as `nl.use_backend`. verbose: as
            `Model.fit`.

    Attributes: `classes_`; `n_features_in_` (columns of a table, features of sequences); `model_`, `history_`,
    `n_iter_`; `feature_mean_` and `feature_scale_` with `scale`.

    Raises:
        ValueError: data that do not fit, naming what came and what was expected; training that diverges.

    >>> rng = np.random.default_rng(0)
    >>> X = [rng.normal(sign, 1, (rng.integers(5, 15), 2)) for sign in (-1, 1) * 20]  # lengths differ
    >>> y = ["falling", "rising"] * 20
    >>> classifier = LSTMClassifier(units=8, epochs=20, random_state=0).fit(X, y)
    >>> classifier.predict(X[:2]).tolist(), bool(classifier.score(X, y) > 0.95)
    (['falling', 'rising'], True)
    """

    classes_: np.ndarray

    def __init__(
        self,
        units: Any = 32,
        *,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        learning_rate: float = 0.005,
        epochs: int = 100,
        batch_size: int = 32,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        class_weight: Any = None,
        features_per_step: Any = 1,
        scale: bool = True,
        random_state: Any = None,
        backend: str | None = None,
        verbose: Any = 0,
    ) -> None:
        self.units = units
        self.cell = cell
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.class_weight = class_weight
        self.features_per_step = features_per_step
        self.scale = scale
        self.random_state = random_state
        self.backend = backend
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> LSTMClassifier:
        """Train on sequences X and their labels y (samples,)."""
        samples = self._read(X, reset=True)
        labels = column_or_1d(_target(self, y, dtype=None), warn=True)
        check_classification_targets(labels)
        check_consistent_length(samples, labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        seed = self._seed()
        train, held = self._parts(len(numbers), seed, numbers)
        self._fit_scaler(_rows(samples, train))
        weights = None
        if self.class_weight is not None:
            if not isinstance(self.class_weight, str | Mapping):
                raise ValueError(
                    f"class_weight: expected None, 'balanced' or a dict, got {self.class_weight!r}"
                )
            weights = compute_sample_weight(self.class_weight, labels)
            weights = weights / weights.mean()  # the learning rate keeps its meaning
        loss = SparseCategoricalCrossentropy(from_logits=True)
        self._learn(samples, numbers, train, held, seed, len(self.classes_), loss, weights)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The classes' probabilities (samples, classes), in the order of `classes_`."""
        logits = self._scores(X).astype(np.float64)
        grown = np.exp(logits - logits.max(axis=1, keepdims=True))
        return grown / grown.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each sequence."""
        best = self._scores(X).argmax(axis=1)
        return self.classes_[best]


class LSTMRegressor(RegressorMixin, _Supervised):
    """A number, or several, for each sequence.

    Arguments:
        loss: "squared_error", "absolute_error" or "huber", of targets scaled to deviation 1.
        scale: bring features and targets to mean 0 and deviation 1, by the training samples.
        The others as in `LSTMClassifier`; `early_stopping` holds out random samples.

    Attributes: `target_mean_` and `target_scale_` with `scale`, and those of `LSTMClassifier` but for `classes_`.

    Raises:
        ValueError: data that do not fit, naming what came and what was expected; training that diverges.

    >>> X = np.random.default_rng(0).normal(size=(200, 6, 1))
    >>> y = np.column_stack([X[:, :, 0].sum(1), X[:, -1, 0]])  # two outputs
    >>> regressor = LSTMRegressor(units=16, epochs=30, random_state=0).fit(X, y)
    >>> regressor.predict(X[:3]).shape, bool(regressor.score(X, y) > 0.9)
    ((3, 2), True)
    """

    target_mean_: np.ndarray
    target_scale_: np.ndarray

    def __init__(
        self,
        units: Any = 32,
        *,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        loss: str = "squared_error",
        learning_rate: float = 0.005,
        epochs: int = 100,
        batch_size: int = 32,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        features_per_step: Any = 1,
        scale: bool = True,
        random_state: Any = None,
        backend: str | None = None,
        verbose: Any = 0,
    ) -> None:
        self.units = units
        self.cell = cell
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.loss = loss
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.features_per_step = features_per_step
        self.scale = scale
        self.random_state = random_state
        self.backend = backend
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> LSTMRegressor:
        """Train on sequences X and their targets y, (samples,) or (samples, outputs)."""
        if self.loss not in REGRESSION_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(REGRESSION_LOSSES)}; got {self.loss!r}")
        samples = self._read(X, reset=True)
        targets = _target(self, y, dtype=np.float64)
        check_consistent_length(samples, targets)
        self.target_ndim_: int = targets.ndim
        targets = targets.reshape(len(targets), -1)
        seed = self._seed()
        train, held = self._parts(len(targets), seed, None)
        self._fit_scaler(_rows(samples, train))
        if self.scale:
            scaler = Scaler.fit(targets[train])
            self.target_mean_, self.target_scale_ = scaler.mean, scaler.deviation
            targets = scaler.transform(targets)
        y32 = targets.astype(np.float32)
        self._learn(samples, y32, train, held, seed, y32.shape[1], REGRESSION_LOSSES[self.loss])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The numbers for each sequence, in the shape that y had in `fit`."""
        out = self._scores(X).astype(np.float64)
        if self.scale:
            out = Scaler(self.target_mean_, self.target_scale_).inverse(out)
        return out[:, 0] if self.target_ndim_ == 1 else out


def _target(estimator: Any, y: Any, dtype: Any) -> np.ndarray:
    """y, checked: there, finite, not sparse, of one or two axes."""
    if y is None:
        raise ValueError(
            f"This {type(estimator).__name__} estimator requires y to be passed, but the target y is None."
        )
    targets = check_array(y, ensure_2d=False, dtype=dtype, input_name="y", ensure_min_samples=0)
    if targets.ndim not in (1, 2) or 0 in targets.shape[1:]:
        raise ValueError(f"y: shape {targets.shape} came, expected (samples,) or (samples, outputs)")
    return targets
