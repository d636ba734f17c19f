"""`LSTMAnomalyDetector`: what a network that has learned the usual course of things did not expect.

A network reads the rows before each row and forecasts it; a row is as abnormal as its forecast is wrong, in units of the
errors that are usual (median and median absolute deviation, which anomalies in the training data hardly move). After
Malhotra et al. 2015, "Long short term memory networks for anomaly detection in time series".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import OutlierMixin
from sklearn.utils.validation import check_is_fitted

from numlstm.data.batches import pad
from numlstm.data.tables import Scaler
from numlstm.estimators.base import RecurrentEstimator
from numlstm.estimators.panels import Panel, read_panel

__all__ = ["LSTMAnomalyDetector"]

FAR = 10.0
"""Scaled inputs beyond this are cut: one spike must not decide what the network hears for the rows after it."""

LEAST = 1e-3
"""The least usual error, in units of the feature's scale: what was forecast without any must not be infinitely abnormal."""

NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class LSTMAnomalyDetector(OutlierMixin, RecurrentEstimator):
    """Which rows of a series, or which of many sequences, are unlike those of the training data.

    A pandas table (oldest row first) is one series, and every row gets a label and a score; a list or dict of tables
    likewise. Arrays put samples first: of (samples, time), (samples, time, columns) or a list of (time, columns) each
    sequence gets one label and one score, the root mean square of its rows' scores. `rows="steps"` reads a 1-D or 2-D array
    as one table.

    Arguments:
        window: of a series, every row is forecast from at least so many rows before it (the first ones from fewer), and
            at most twice as many. Sequences are read whole.
        contamination: share of the training data to call outliers; "auto": what lies more than one and a half
            interquartile ranges beyond the quartile (Tukey 1977, "outside"; of normal errors about 1.5 %).
        early_stopping: hold out the last `validation_fraction` of each series (or of the sequences), keep the best epoch.
        rows: "auto", or "steps" (an array is one table). The others as in `LSTMClassifier`.

    Attributes: `offset_` (`decision_function` is `score_samples - offset_`); `feature_center_`, `feature_scale_`,
    `error_center_`, `error_scale_`; `model_`, `history_`, `n_iter_`, `n_features_in_`.

    Raises:
        ValueError: data that do not fit, or hold gaps; training that diverges.

    >>> x = np.sin(np.arange(600) / 4)
    >>> x[300] += 1.5
    >>> detector = LSTMAnomalyDetector(rows="steps", contamination=0.01, units=16, epochs=20, random_state=0).fit(x)
    >>> int(detector.score_samples(x).argmin()), int((detector.predict(x) == -1).sum())
    (300, 6)
    """

    feature_center_: np.ndarray
    feature_scale_: np.ndarray
    error_center_: np.ndarray

    def __init__(
        self,
        window: int = 24,
        *,
        contamination: Any = 0.01,
        rows: str = "auto",
        units: Any = 32,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        learning_rate: float = 0.005,
        epochs: int = 50,
        batch_size: int = 32,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        random_state: Any = None,
        backend: str | None = None,
        verbose: Any = 0,
    ) -> None:
        self.window = window
        self.contamination = contamination
        self.rows = rows
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
        self.random_state = random_state
        self.backend = backend
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    # Learning

    def fit(self, X: Any, y: Any = None) -> LSTMAnomalyDetector:
        """Learn the usual course of X; y is not used."""
        self._check_options()
        panel = self._panel(X, reset=True)
        blocks = _blocks(panel)
        pooled = np.concatenate(blocks)
        self.feature_center_, self.feature_scale_ = _robust(pooled)
        seed = self._seed()
        scaled = [self._scaled(block) for block in blocks]
        train, held = self._parts(panel, scaled, seed)
        features = pooled.shape[1]
        validation = None
        if held:
            x, targets, lengths = _padded(held)
            validation = {"x": x, "y": targets, "lengths": lengths}
        x, targets, lengths = _padded(train)
        self._train(
            features, features, "huber", seed, validation=validation,
            options={"sequences": True, "zeros": True}, x=x, y=targets, lengths=lengths,
        )  # fmt: skip
        errors = self._errors(panel, scaled)
        self.error_center_, spread = _robust(np.concatenate(errors), constant=LEAST)
        self.error_scale_: np.ndarray = np.maximum(spread, LEAST)
        scores = np.concatenate([np.atleast_1d(s) for s in self._scores(panel, errors)])
        if self.contamination == "auto":
            low, high = np.percentile(scores, [25, 75])
            self.offset_: float = float(low - 1.5 * (high - low))
        else:
            self.offset_ = float(np.percentile(scores, 100 * self.contamination))
        return self

    def _check_options(self) -> None:
        if self.bidirectional:
            raise ValueError(
                "bidirectional: a network that has read a row can't be surprised by it; expected False"
            )
        if isinstance(self.window, bool) or not isinstance(self.window, int | np.integer) or self.window < 1:
            raise ValueError(f"window: expected an integer >= 1, got {self.window!r}")
        share = self.contamination
        if share != "auto" and not (isinstance(share, int | float | np.number) and 0 < share <= 0.5):
            raise ValueError(
                f"contamination: expected 'auto' or a number above 0, at most 0.5; got {share!r}"
            )

    def _panel(self, X: Any, *, reset: bool) -> Panel:
        panel = read_panel(self, X, self.rows, reset=reset, allow_nan=False)
        kind = "series" if panel.by_row else "sequences"
        if reset:
            self.input_kind_ = kind
        elif kind != self.input_kind_:
            raise ValueError(f"X: {kind} came, but fit got {self.input_kind_}")
        return panel

    def _scaled(self, block: np.ndarray) -> np.ndarray:
        scaled = Scaler(self.feature_center_, self.feature_scale_).transform(block)
        return np.clip(scaled, -FAR, FAR).astype(np.float32)

    def _parts(self, panel: Panel, scaled: list[np.ndarray], seed: int) -> tuple[list[Any], list[Any]]:
        """What is trained on, and held out if there is early stopping: pairs (inputs, targets), (time, features) each."""
        if not panel.by_row:
            pairs = [(_before(block), block) for block in scaled]
            if not self.early_stopping:
                return pairs, []
            order = np.random.default_rng(seed).permutation(len(pairs))
            count = max(1, round(self._fraction() * len(pairs)))
            if count >= len(pairs):
                raise ValueError(f"early_stopping: needs sequences to hold out, got n_samples = {len(pairs)}")
            return [pairs[k] for k in order[count:]], [pairs[k] for k in order[:count]]
        train, held = [], []
        for block in scaled:
            share = max(1, round(self._fraction() * len(block))) if self.early_stopping else 0
            if share >= len(block):
                raise ValueError(f"early_stopping: needs rows to hold out, got n_samples = {len(block)}")
            inputs, cut = _before(block), len(block) - share
            train += self._pieces(inputs[:cut], block[:cut])
            if share:
                held.append((inputs[max(0, cut - self.window) :], block[max(0, cut - self.window) :]))
        return train, held

    def _pieces(self, inputs: np.ndarray, targets: np.ndarray) -> list[Any]:
        """Pieces of two windows, each half a window after the one before."""
        length, stride = 2 * self.window, max(1, self.window // 2)
        starts = range(0, max(1, len(inputs) - length + stride), stride)
        return [(inputs[s : s + length], targets[s : s + length]) for s in starts]

    # Judging

    def _errors(self, panel: Panel, scaled: list[np.ndarray]) -> list[np.ndarray]:
        """What each row differs from its forecast by (time, features), for each table."""
        if not panel.by_row:
            x, _, lengths = _padded([(_before(block), block) for block in scaled])
            made = self._forecast(x, lengths)
            return [block - out[: len(block)] for block, out in zip(scaled, made, strict=True)]
        errors = []
        for block in scaled:
            # The network answers for the second half of each piece, so that it has read a window before. The first
            # piece is answered for from its start: nothing comes before it.
            inputs, size = _before(block), self.window
            spans = [(max(0, s - size), s, min(len(block), s + size)) for s in range(0, len(block), size)]
            x, _, lengths = _padded([(inputs[first:stop],) * 2 for first, _, stop in spans])
            made = self._forecast(x, lengths)
            parts = [
                out[start - first : stop - first]
                for out, (first, start, stop) in zip(made, spans, strict=True)
            ]
            errors.append(block - np.concatenate(parts))
        return errors

    def _forecast(self, x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.asarray(self._output(x, lengths=lengths))

    def _scores(self, panel: Panel, errors: list[np.ndarray]) -> list[Any]:
        """`score_samples` of each table: of its rows, or one number."""
        found = []
        for error in errors:
            surprise = np.mean(
                ((error - self.error_center_) / self.error_scale_) ** 2, axis=1, dtype=np.float64
            )
            found.append(-np.sqrt(surprise) if panel.by_row else -np.sqrt(surprise.mean()))
        return found

    def score_samples(self, X: Any) -> Any:
        """How normal each row of a series (or each sequence) is: the negative of its surprise, so lower is more abnormal.

        Returns for pandas a Series with the table's index, for arrays an array.
        """
        return self._judge(X, lambda scores: scores, "score")

    def decision_function(self, X: Any) -> Any:
        """`score_samples` less `offset_`: below 0 for outliers."""
        return self._judge(X, lambda scores: scores - self.offset_, "decision")

    def predict(self, X: Any) -> Any:
        """-1 for outliers, 1 for the rest."""
        return self._judge(X, lambda scores: np.where(scores < self.offset_, -1, 1), "label")

    def _judge(self, X: Any, finish: Any, name: str) -> Any:
        check_is_fitted(self)
        panel = self._panel(X, reset=False)
        scores = self._scores(panel, self._errors(panel, [self._scaled(block) for block in _blocks(panel)]))
        if not panel.by_row:
            return finish(np.array(scores))
        values = [finish(score) for score in scores]
        if panel.index is not None:
            import pandas as pd

            values = [pd.Series(v, index, name=name) for v, index in zip(values, panel.index, strict=True)]
        return panel.give(values)


def _blocks(panel: Panel) -> list[np.ndarray]:
    """Each table as an array (time, features)."""
    return [np.stack([table.numbers(name) for name in panel.names], axis=1) for table in panel.tables]


def _before(block: np.ndarray) -> np.ndarray:
    """Each row's predecessor; before the first, zeros, which stand for the usual."""
    return np.concatenate([np.zeros_like(block[:1]), block[:-1]])


def _padded(pairs: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs side by side: inputs, targets (B, T, F) and lengths (B,)."""
    x, lengths = pad([inputs for inputs, _ in pairs])
    return x, pad([targets for _, targets in pairs])[0], lengths


def _robust(values: np.ndarray, constant: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Median and scale of each column: from the median absolute deviation, or, where more than half of the values are
    one and the same, the standard deviation; `constant` for a constant."""
    center = np.median(values, axis=0)
    scale = NORMAL * np.median(np.abs(values - center), axis=0)
    deviation = np.std(values, axis=0)
    scale = np.where(scale > 1e-9 * np.maximum(1, np.abs(center)), scale, deviation)
    return center, np.where(scale > 1e-9 * np.maximum(1, np.abs(center)), scale, constant)
