"""`LSTMForecaster`: what comes next in one series or many, with intervals.

The network reads the last `window` rows of every column and puts out all `horizon` steps of every target at once: the
value, or how much it will have changed since the last known one. With columns known ahead of time (a calendar, a plan)
it reads on over the rows ahead, and answers at each. Intervals are quantiles, learned by the pinball loss beside the
point forecast (Koenker & Bassett 1978; Wen et al. 2017, "A multi-horizon quantile recurrent forecaster").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.validation import check_is_fitted

from numlstm.data.sliding import SlidingWindows
from numlstm.data.tables import Features, Scaler, Table, carry_forward, forecast_errors, trivial_forecast
from numlstm.estimators.base import RecurrentEstimator
from numlstm.estimators.panels import Panel, continuation, continued, is_pandas, read_panel
from numlstm.estimators.supervised import REGRESSION_LOSSES
from numlstm.losses import Pinball

__all__ = ["Backtest", "LSTMForecaster"]

ENOUGH = 100
"""Training windows that must be left for `early_stopping="auto"` to hold the last rows out."""


class _Encoded(NamedTuple):
    """Tables one behind the other: scaled inputs (N, F), targets (N, K), and the last known target (N, K)."""

    inputs: np.ndarray
    targets: np.ndarray
    last: np.ndarray
    starts: np.ndarray  # first row of each table, and the end
    mean: np.ndarray  # (tables, K)
    scale: np.ndarray


@dataclass(frozen=True)
class Backtest:
    """Forecasts from many rows of known series, beside what came: `truth`, `forecast` (M, horizon, targets).

    `bounds`: coverage to (M, horizon, targets, 2), the lower and upper ends. `trivial`: forecasts that need no model, by
    name. `table` and `origin` (M,): the table and its last row that the forecast knew. `targets`: the names.
    """

    truth: np.ndarray
    forecast: np.ndarray
    bounds: dict[float, np.ndarray]
    trivial: dict[str, np.ndarray]
    table: np.ndarray
    origin: np.ndarray
    targets: list[str]

    def errors(self) -> dict[str, dict[str, float]]:
        """RMSE and MAE in the data's unit: the model's ("LSTM") and the trivial forecasts'."""
        return {
            name: forecast_errors(self.truth, made)
            for name, made in {"LSTM": self.forecast, **self.trivial}.items()
        }

    def coverage(self) -> dict[float, float]:
        """The share of true values inside the interval, by the share that was meant."""
        inside = {c: (self.truth >= b[..., 0]) & (self.truth <= b[..., 1]) for c, b in self.bounds.items()}
        return {c: float(np.mean(hit)) for c, hit in inside.items()}

    def width(self) -> dict[float, float]:
        """The mean width of the intervals, in the data's unit."""
        return {c: float(np.mean(b[..., 1] - b[..., 0])) for c, b in self.bounds.items()}


class LSTMForecaster(RecurrentEstimator):
    """The next rows of a series, or of several, with intervals.

    X is a table whose rows are time steps, equally spaced, oldest first: a pandas DataFrame or Series. Several tables
    (a list or dict of them) train one network; each is then scaled by its own statistics. Arrays put samples first, as
    everywhere in scikit-learn: (series, time), (series, time, columns), or a list of (time, columns);
    `rows="steps"` reads a 1-D or 2-D array as one table. Gaps (NaN) are allowed: inputs hold the last known value, and
    no window is trained or judged on a made-up target. Text columns become one input a category.

    Arguments:
        horizon: how many rows ahead. window: how many rows are read; None: 24, or as many as shorter series let be.
        target: column or columns to forecast; None: all that are not in `known_future`.
        known_future: columns that are known ahead of time; `predict` is given their values in `future`.
        coverage: of the prediction intervals, numbers between 0 and 1; () for none.
        predict_change: forecast the change since the last known value (True), the value (False), or, for each target,
            what varies less (None: the change, where the last value explains three quarters of what comes).
        loss: of the point forecast: "squared_error", "absolute_error" or "huber".
        early_stopping: hold out the last `validation_fraction` of the rows of each table, stop after `n_iter_no_change`
            epochs without a better one, keep the best; "auto": when that leaves 100 windows or more.
        calibrate: where rows are held out for early stopping, move the intervals' ends so that they hold their share of
            those rows (Romano, Patterson & Candes 2019); quantiles of the training rows alone are too narrow.
        rows: "auto", or "steps" (an array is one table), or "samples" (as "auto", but pandas tables are refused).
        The others as in `LSTMClassifier`.

    Attributes: `window_`, `targets_` (names), `model_`, `history_`, `n_iter_`, `n_features_in_`.

    Raises:
        ValueError: data that do not fit, too short series, unknown columns, naming what came and what was expected.

    >>> t = np.arange(300.0)
    >>> wave = np.sin(t / 5) + 0.001 * t
    >>> forecaster = LSTMForecaster(horizon=5, rows="steps", units=16, epochs=20, random_state=0).fit(wave)
    >>> forecaster.predict().shape, forecaster.predict_interval(coverage=0.9).shape
    ((5,), (5, 2))
    >>> forecaster.score(wave) > 0.5  # of the last value's squared error, more than half is gone
    True
    """

    came_as_: dict[str, Any]
    continuations_: list[dict[str, Any]] | None

    def __init__(
        self,
        horizon: int = 1,
        window: int | None = None,
        *,
        target: Any = None,
        known_future: Any = (),
        coverage: Any = (0.8, 0.9),
        predict_change: bool | None = None,
        rows: str = "auto",
        units: Any = 32,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        loss: str = "squared_error",
        learning_rate: float = 0.003,
        epochs: int = 100,
        batch_size: int = 32,
        early_stopping: Any = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        calibrate: bool = True,
        random_state: Any = None,
        backend: str | None = None,
        verbose: Any = 0,
    ) -> None:
        self.horizon = horizon
        self.window = window
        self.target = target
        self.known_future = known_future
        self.coverage = coverage
        self.predict_change = predict_change
        self.rows = rows
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
        self.calibrate = calibrate
        self.random_state = random_state
        self.backend = backend
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        return tags

    # Learning

    def fit(self, X: Any, y: Any = None) -> LSTMForecaster:
        """Train on the tables X; y is not used, it is there for scikit-learn's pipelines."""
        self._check_options()
        panel = self._panel(X, reset=True)
        self.single_: bool = panel.single
        self._choose_columns(panel)
        lengths = np.array([len(table) for table in panel.tables])
        held = np.maximum(self.horizon, np.round(self._fraction() * lengths).astype(int))
        early = self.early_stopping
        if early == "auto":
            early = int(np.maximum(lengths - held - self.horizon, 0).sum()) >= ENOUGH
        training = lengths - held if early else lengths
        self._choose_window(int(training.max()))
        self._fit_inputs(panel, training)
        encoded = self._encode(panel.tables, self._statistics(panel.tables, training))
        train = self._origins(encoded, stop=encoded.starts[:-1] + training)
        self._choose_outputs(encoded, train)
        after = self._origins(encoded, start=encoded.starts[:-1] + training) if early else train[:0]
        if early and not len(after):
            raise ValueError(
                "early_stopping: the rows held out have no window with all its target values: too many gaps"
            )
        loss = REGRESSION_LOSSES[self.loss]
        self._train(
            encoded.inputs.shape[1] + bool(self.known_),
            len(self.targets_) * self._width * (1 if self.known_ else self.horizon),
            Pinball(self._quantiles, point=loss) if self._quantiles else loss,
            self._seed(),
            validation=self._windows(encoded, after) if early else None,
            options={"sequences": bool(self.known_), "zeros": True},
            x=self._windows(encoded, train),
        )
        self.margins_: np.ndarray = np.zeros((len(self.targets_), len(self._quantiles)))
        if early and self.calibrate and self._quantiles:
            self._calibrate(encoded, after)
        self._remember(panel)
        return self

    def _check_options(self) -> None:
        for name, value in (("horizon", self.horizon), ("window", self.window)):
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "window" and value is None):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.loss not in REGRESSION_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(REGRESSION_LOSSES)}; got {self.loss!r}")
        if self.early_stopping not in (True, False, "auto"):
            raise ValueError(f"early_stopping: expected True, False or 'auto', got {self.early_stopping!r}")
        if not all(0 < c < 1 for c in self._coverages):
            raise ValueError(f"coverage: expected numbers between 0 and 1, got {self.coverage!r}")

    @property
    def _coverages(self) -> list[float]:
        return [float(c) for c in np.atleast_1d(np.asarray(self.coverage, np.float64))]

    @property
    def _quantiles(self) -> list[float]:
        """The ends of all intervals, in order."""
        return sorted({round(q, 9) for c in self._coverages for q in ((1 - c) / 2, (1 + c) / 2)})

    @property
    def _width(self) -> int:
        """Outputs a target and step: the point forecast, then the quantiles."""
        return 1 + len(self._quantiles)

    def _panel(self, X: Any, *, reset: bool) -> Panel:
        if self.rows == "samples" and is_pandas(X):
            raise ValueError("X: a pandas table's rows are time steps; with rows='samples' give an array")
        return read_panel(self, X, self.rows, reset=reset, allow_nan=True)

    def _choose_columns(self, panel: Panel) -> None:
        def named(option: str, given: Any) -> list[str]:
            several = [given] if isinstance(given, str | int) else list(given)
            unknown = [str(c) for c in several if str(c) not in panel.names]
            if unknown:
                raise ValueError(
                    f"{option}: X has no column {unknown[0]!r}; it has: {', '.join(panel.names)}"
                )
            return [str(c) for c in several]

        self.known_: list[str] = named("known_future", self.known_future)
        rest = [name for name in panel.names if name not in self.known_]
        self.targets_: list[str] = rest if self.target is None else named("target", self.target)
        if not self.targets_ or set(self.targets_) & set(self.known_):
            raise ValueError(f"target: expected columns that are not in known_future, got {self.targets_}")
        for table in panel.tables:
            for name in self.targets_:
                table.numbers(name)  # raises for text

    def _choose_window(self, rows: int) -> None:
        self.window_: int = int(min(24, max(1, rows - self.horizon)) if self.window is None else self.window)
        if rows < self.window_ + self.horizon:
            raise ValueError(
                f"X: {rows} rows to train on (n_samples = {rows} with n_features = 1 a step, where arrays are read as one "
                f"series a row) are too few: window {self.window_} and horizon {self.horizon} need "
                f"{self.window_ + self.horizon}; a table whose rows are time steps is given as pandas, or with rows='steps'"
            )

    def _fit_inputs(self, panel: Panel, training: np.ndarray) -> None:
        """How columns become inputs, by the training rows of all tables."""
        tables = panel.tables
        if len(tables) == 1:
            pooled, rows = tables[0], int(training[0])
        else:
            cut = {n: [t[n][:r] for t, r in zip(tables, training, strict=True)] for n in panel.names}
            pooled, rows = Table({n: np.concatenate(v) for n, v in cut.items()}, "X"), int(training.sum())
        features = Features.fit(pooled, panel.names, rows)
        self.inputs_: list[dict[str, Any]] = features.to_dict()
        self.known_inputs_: np.ndarray = np.array([
            column["name"] in self.known_
            for column in features.columns
            for _ in range(len(column["categories"]) if "categories" in column else 1 + column["gaps"])
        ])  # fmt: skip

    def _statistics(self, tables: Sequence[Table], rows: Any = None) -> list[list[dict[str, Any]]]:
        """The inputs' description for each table: the fitted one, or, of several tables, with each one's own statistics
        (of its first `rows` rows; all of them in prediction)."""
        if self.single_:
            return [self.inputs_] * len(tables)
        described = []
        for number, table in enumerate(tables):
            own = []
            for column in self.inputs_:
                values = table[column["name"]][: None if rows is None else rows[number]]
                if "mean" in column and not np.isnan(values).all():
                    scaler = Scaler.fit(values[:, None])
                    column = column | {"mean": scaler.mean[0], "deviation": scaler.deviation[0]}
                own.append(column)
            described.append(own)
        return described

    def _encode(self, tables: Sequence[Table], statistics: Sequence[list[dict[str, Any]]]) -> _Encoded:
        inputs, targets, last, mean, scale = [], [], [], [], []
        for table, described in zip(tables, statistics, strict=True):
            inputs.append(Features(described).transform(table))
            by_name = {column["name"]: column for column in described}
            mean.append([by_name[n]["mean"] for n in self.targets_])
            scale.append([by_name[n]["deviation"] for n in self.targets_])
            values = np.stack([table[n] for n in self.targets_], axis=1)
            targets.append((values - mean[-1]) / scale[-1])
            last.append(np.stack([carry_forward(v) for v in targets[-1].T], axis=1))
        starts = np.cumsum([0, *(len(t) for t in tables)])
        return _Encoded(
            np.concatenate(inputs),
            np.concatenate(targets),
            np.concatenate(last),
            starts,
            np.array(mean),
            np.array(scale),
        )

    def _origins(self, encoded: _Encoded, start: Any = None, stop: Any = None) -> np.ndarray:
        """Rows that windows end at, whose targets are known and lie in rows start .. stop - 1 of their table."""
        starts, ends = encoded.starts[:-1], encoded.starts[1:]
        first = np.maximum(starts + self.window_ - 1, (starts if start is None else start) - 1)
        behind = (ends if stop is None else stop) - self.horizon
        origins = np.concatenate([np.arange(a, max(a, b)) for a, b in zip(first, behind, strict=True)])
        gap = np.isnan(encoded.targets).any(axis=1)
        ahead = np.concatenate([[0], np.cumsum(gap)])
        known = ahead[origins + 1 + self.horizon] == ahead[origins + 1]
        return origins[known & ~np.isnan(encoded.last[origins]).any(axis=1)]

    def _choose_outputs(self, encoded: _Encoded, origins: np.ndarray) -> None:
        """For each target: the change or the value, and how much it varies over the training windows."""
        if len(origins) == 0:
            raise ValueError("X: no training window has all its target values: too many gaps (NaN)")
        ahead = encoded.targets[origins[:, None] + np.arange(1, self.horizon + 1)]
        change = ahead - encoded.last[origins][:, None]
        if self.predict_change is None:
            self.change_: np.ndarray = change.std(axis=(0, 1)) <= ahead.std(axis=(0, 1)) / 2
        else:
            self.change_ = np.full(len(self.targets_), bool(self.predict_change))
        spread = np.where(self.change_, change.std(axis=(0, 1)), ahead.std(axis=(0, 1)))
        self.spread_: np.ndarray = np.where(spread > 1e-9, spread, 1.0)

    def _calibrate(self, encoded: _Encoded, origins: np.ndarray) -> None:
        """Move the ends of each interval, for each target by one amount, so that it holds its share of held-out values.

        Conformalized quantile regression (Romano, Patterson & Candes 2019, equations 6 to 8), all steps ahead together.
        """
        made = self._made(encoded, origins)
        truth = self._windows(encoded, origins).relative(origins)
        for coverage in self._coverages:
            low, high = self._bounds(coverage)
            beyond = np.maximum(made[..., low] - truth, truth - made[..., high]).reshape(
                -1, len(self.targets_)
            )
            rank = min(len(beyond), int(np.ceil(coverage * (len(beyond) + 1))))
            margin = np.sort(beyond, axis=0)[rank - 1]
            self.margins_[:, low - 1], self.margins_[:, high - 1] = -margin, margin

    def _windows(self, encoded: _Encoded, origins: np.ndarray, *, targets: bool = True) -> SlidingWindows:
        return SlidingWindows(
            encoded.inputs,
            origins,
            window=self.window_,
            horizon=self.horizon,
            targets=encoded.targets if targets else None,
            base=encoded.last * self.change_,
            spread=self.spread_,
            known=self.known_inputs_ if self.known_ else None,
            batch_size=self.batch_size,
        )

    def _remember(self, panel: Panel) -> None:
        """What `predict` without X needs: the last rows of each table, and how its index goes on."""
        self.tails_: list[Any] = []
        for table in panel.tables:
            first = max(0, len(table) - self.window_ - 1)
            tail = {name: values[first:].copy() for name, values in table.columns.items()}
            for name, values in tail.items():  # gaps are filled from before the tail
                if values.dtype != object:
                    values[0] = carry_forward(table[name])[first]
            self.tails_.append(tail)
        self.tail_statistics_: list[list[dict[str, Any]]] = self._statistics(panel.tables)
        self.came_as_ = {"kind": panel.kind, "single": panel.single, "keys": panel.keys, "ndim": panel.ndim}
        self.continuations_ = None if panel.index is None else [continuation(index) for index in panel.index]

    # Forecasting

    def predict(self, X: Any = None, horizon: int | None = None, future: Any = None) -> Any:
        """What comes after the end of X, or of the tables of `fit` when X is not given.

        Arguments:
            X: tables like those of `fit`, at least `window_` rows each; an integer is taken for `horizon`.
            horizon: how many rows, at most those of `fit` (the default).
            future: the columns of `known_future` in the rows that follow, in the form of X.

        Returns for a DataFrame a DataFrame of the targets (for a Series a Series) that goes on with its index; for an
        array of series (series, horizon); for (series, time, columns) (series, horizon, targets); for `rows="steps"`
        (horizon, targets), or (horizon,); lists and dicts of these for lists and dicts.
        """
        panel, horizon, out, ends = self._ahead(X, horizon, future)
        return self._given(panel, [o[:horizon, :, 0] for o in out], ends)

    def predict_interval(
        self, X: Any = None, horizon: int | None = None, future: Any = None, *, coverage: float | None = None
    ) -> Any:
        """The lower and upper end of the interval that should hold a share `coverage` of what comes.

        `coverage` is one of those given to the constructor, by default the first. Arrays get a last axis of two; a
        DataFrame has the columns "lower" and "upper", for several targets below their names. The others as `predict`.
        """
        check_is_fitted(self)
        which = self._bounds(self._coverages[0] if coverage is None and self._coverages else coverage)
        panel, horizon, out, ends = self._ahead(X, horizon, future)
        return self._given(panel, [o[:horizon][..., which] for o in out], ends, bounds=True)

    def _bounds(self, coverage: float | None) -> list[int]:
        """Where the two ends of an interval stand among the outputs."""
        if coverage is None or not any(np.isclose(coverage, c) for c in self._coverages):
            raise ValueError(f"coverage: expected one that was trained ({self.coverage!r}), got {coverage!r}")
        ends = ((1 - coverage) / 2, (1 + coverage) / 2)
        return [1 + int(np.argmin(np.abs(np.array(self._quantiles) - q))) for q in ends]

    def _ahead(self, X: Any, horizon: int | None, future: Any) -> tuple[Panel, int, list[np.ndarray], Any]:
        """All outputs (horizon, K, width) after the end of each table, and how their indices go on."""
        check_is_fitted(self)
        if isinstance(X, int | np.integer) and not isinstance(X, bool):
            if horizon is not None:
                raise ValueError("horizon: came twice, as X and by name")
            X, horizon = None, int(X)
        horizon = self.horizon if horizon is None else horizon
        if not isinstance(horizon, int | np.integer) or not 1 <= horizon <= self.horizon:
            raise ValueError(f"horizon: expected 1 to {self.horizon}, which fit was told, got {horizon!r}")
        if X is None:
            panel = Panel([Table(dict(tail), "X") for tail in self.tails_], **self.came_as_)
            statistics, ends = self.tail_statistics_, self.continuations_
        else:
            panel = self._panel(X, reset=False)
            statistics = self._statistics(panel.tables)
            ends = None if panel.index is None else [continuation(index) for index in panel.index]
        self._long_enough(panel)
        tables = self._extended(panel, future)
        encoded = self._encode(tables, statistics)
        origins = encoded.starts[1:] - 1 - (self.horizon if self.known_ else 0)
        return panel, int(horizon), list(self._outputs(encoded, origins)), ends

    def _long_enough(self, panel: Panel) -> None:
        shortest = min(len(table) for table in panel.tables)
        if shortest < self.window_:
            raise ValueError(f"X: a table of {shortest} rows came; the network reads {self.window_}")

    def _extended(self, panel: Panel, future: Any) -> list[Table]:
        """The tables with the known columns of the rows ahead; the others are gaps there, which nothing reads."""
        if not self.known_:
            if future is not None:
                raise ValueError("future: came, but known_future names no columns")
            return panel.tables
        if future is None:
            raise ValueError(f"future: needed for the {self.horizon} rows ahead of: {', '.join(self.known_)}")
        ahead = self._future(panel, future)
        tables = []
        for table, rows in zip(panel.tables, ahead, strict=True):
            blank = {
                n: np.full(self.horizon, "" if v.dtype == object else np.nan, v.dtype)
                for n, v in table.columns.items()
            }
            rows = {n: (blank | rows)[n] for n in table.columns}
            tables.append(Table({n: np.concatenate([v, rows[n]]) for n, v in table.columns.items()}, "X"))
        return tables

    def _future(self, panel: Panel, future: Any) -> list[dict[str, np.ndarray]]:
        """The known columns, `horizon` rows a table."""
        if panel.kind in ("frame", "series"):
            given = (
                [future] if panel.single else list(future.values() if isinstance(future, dict) else future)
            )
            for frame in given:
                missing = [n for n in self.known_ if not is_pandas(frame) or n not in map(str, frame.columns)]
                if missing:
                    raise ValueError(
                        f"future: expected pandas tables with the column {missing[0]!r}, got {type(frame).__name__}"
                    )
            text = {c["name"] for c in self.inputs_ if "categories" in c}
            columns = [
                {str(c): f[c].astype(str).to_numpy(object) if str(c) in text else f[c].to_numpy(np.float64)
                 for c in f.columns if str(c) in self.known_}
                for f in given
            ]  # fmt: skip
        else:
            block = np.asarray(future, np.float64)
            block = block[None] if panel.single else block
            block = block[..., None] if block.ndim == 2 else block
            if block.ndim != 3 or block.shape[2] != len(self.known_):
                raise ValueError(
                    f"future: shape {np.shape(future)} came, expected {len(self.known_)} known columns"
                )
            columns = [dict(zip(self.known_, rows.T, strict=True)) for rows in block]
        if len(columns) != len(panel.tables):
            raise ValueError(f"future: {len(columns)} tables came, expected {len(panel.tables)}")
        for table in columns:
            for name, values in table.items():
                if len(values) < self.horizon:
                    raise ValueError(f"future: {len(values)} rows of {name!r} came, expected {self.horizon}")
        return [{name: values[: self.horizon] for name, values in table.items()} for table in columns]

    def _outputs(self, encoded: _Encoded, origins: np.ndarray) -> np.ndarray:
        """Forecasts in the data's unit (M, horizon, K, width): the point forecast, then the quantiles in order."""
        last = encoded.last[origins] * self.change_
        if np.isnan(last).any():
            target = self.targets_[int(np.isnan(last).any(axis=0).argmax())]
            raise ValueError(f"X: {target} has no known value to start from")
        made = self._made(encoded, origins)
        table = np.searchsorted(encoded.starts, origins, side="right") - 1
        scaled = made * self.spread_[:, None] + last[:, None, :, None]
        return scaled * encoded.scale[table][:, None, :, None] + encoded.mean[table][:, None, :, None]

    def _made(self, encoded: _Encoded, origins: np.ndarray) -> np.ndarray:
        """The network's outputs (M, horizon, K, width) as float64, in its own units, intervals calibrated."""
        made = np.asarray(self._output(self._windows(encoded, origins, targets=False)), np.float64)
        if self.known_:
            made = made[:, -self.horizon :]
        made = made.reshape(len(origins), self.horizon, len(self.targets_), self._width)
        made[..., 1:] = np.sort(np.sort(made[..., 1:], axis=-1) + self.margins_, axis=-1)  # none cross
        return made

    def _given(self, panel: Panel, values: list[np.ndarray], ends: Any, *, bounds: bool = False) -> Any:
        """Forecasts (horizon, K[, 2]) in the form that the tables came in."""
        if panel.kind in ("frame", "series"):
            return panel.give(
                [self._frame(v, how, panel.kind, bounds) for v, how in zip(values, ends, strict=True)]
            )
        if panel.kind == "samples" or (panel.kind == "steps" and panel.ndim == 1):
            values = [v[:, 0] for v in values]
        return values[0] if panel.single else np.stack(values)

    def _frame(self, values: np.ndarray, how: dict[str, Any], kind: str, bounds: bool) -> Any:
        import pandas as pd

        index = continued(how, len(values))
        if not bounds and kind == "series":
            return pd.Series(values[:, 0], index, name=self.targets_[0])
        if not bounds:
            return pd.DataFrame(values, index, self.targets_)
        ends = ["lower", "upper"]
        if len(self.targets_) == 1:
            return pd.DataFrame(values[:, 0], index, ends)
        return pd.DataFrame(
            values.reshape(len(values), -1), index, pd.MultiIndex.from_product([self.targets_, ends])
        )

    # Judging

    def backtest(self, X: Any, *, start: int = 0, stride: int = 1, season: int | None = None) -> Backtest:
        """Forecasts from the rows of known tables X, beside what came and what needs no model.

        Arguments:
            X: tables as in `fit`. start: the first row that is forecast; those before it are only read.
            stride: forecast from every so many rows. season: rows in a season; then "SEASON rows before", the value a
                whole season earlier, is a trivial forecast too (where no season is known yet, the last value).

        Raises ValueError when no row of X can be forecast.
        """
        check_is_fitted(self)
        if stride < 1 or start < 0:
            raise ValueError(f"start, stride: expected start >= 0 and stride >= 1, got {start!r}, {stride!r}")
        panel = self._panel(X, reset=False)
        encoded = self._encode(panel.tables, self._statistics(panel.tables))
        origins = self._origins(encoded, start=encoded.starts[:-1] + start)[::stride]
        if len(origins) == 0:
            raise ValueError(
                f"X: no row can be forecast: it takes {self.window_} rows to read and {self.horizon} known ones after them"
            )
        out = self._outputs(encoded, origins)
        table = np.searchsorted(encoded.starts, origins, side="right") - 1
        mean, scale = encoded.mean[table][:, None], encoded.scale[table][:, None]
        truth = encoded.targets[origins[:, None] + np.arange(1, self.horizon + 1)] * scale + mean
        trivial = {"last value": np.broadcast_to(encoded.last[origins][:, None] * scale + mean, truth.shape)}
        if season is not None and season > 1:
            before = (
                np.stack(
                    [trivial_forecast(v, origins, self.horizon, season) for v in encoded.targets.T], axis=2
                )
                * scale
                + mean
            )
            # rows of the table before it are no season of this one
            fits = (origins - encoded.starts[table])[:, None] >= season - 1 - (
                np.arange(self.horizon) % season
            )
            trivial[f"{season} rows before"] = np.where(
                fits[..., None] & ~np.isnan(before), before, trivial["last value"]
            )
        return Backtest(
            truth,
            out[..., 0],
            {c: out[..., self._bounds(c)] for c in self._coverages},
            trivial,
            table,
            origins - encoded.starts[table],
            list(self.targets_),
        )

    def score(self, X: Any, y: Any = None) -> float:
        """The share of the last value's squared error that the forecasts of X avoid: 1 is perfect, 0 no better."""
        result = self.backtest(X)
        ours = np.mean((result.truth - result.forecast) ** 2)
        trivial = np.mean((result.truth - result.trivial["last value"]) ** 2)
        if trivial == 0:
            return 1.0 if ours == 0 else 0.0
        return float(1 - ours / trivial)
