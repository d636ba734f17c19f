"""A table as a forecasting task: which columns go in, which one comes out, how outputs become values.

A `Series` is what a forecasting model needs beside its weights; `to_dict` and `from_dict` keep it in the
model's file. Inputs are (M, window, features), outputs (M, horizon), scaled so that an untrained model's
zeros mean "no change" (or the training mean, with predict="value").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from numlstm.data.tables import Features, Table, Windows, carry_forward, trivial_forecast, windows

__all__ = ["Series"]


@dataclass(frozen=True)
class Series:
    """How a table becomes a forecasting model's inputs, and its outputs become values again.

    Arguments:
        target: the column that is forecast. features: the columns that are read.
        mean, scale: of the outputs, from the training rows.
        window, horizon: rows that are read, rows that are forecast.
        season: rows in a season, for the trivial forecast.
        predict: "change" since the last known value, or "value"; `fit` takes "auto" too.

    Raises:
        ValueError: another `predict`.

    >>> from numlstm.data.tables import read_csv
    >>> table = read_csv("sunspots")
    >>> series = Series.fit(table, "SUNACTIVITY", ["SUNACTIVITY"], rows=200, window=11, horizon=2)
    >>> part = series.windows(table)
    >>> part.x.shape, series.encode(table, part).shape
    ((297, 11, 1), (297, 2))
    """

    target: str
    features: Features
    mean: float
    scale: float
    window: int
    horizon: int
    season: int = 1
    predict: str = "change"

    def __post_init__(self) -> None:
        if self.predict not in ("change", "value"):
            raise ValueError(f"predict must be 'change' or 'value', got {self.predict!r}")
        if self.season < 1:
            raise ValueError(f"season must be at least 1, got {self.season}")

    @classmethod
    def fit(cls, table: Table, target: str, names: Sequence[str], rows: int, **options: Any) -> Series:
        """The series of the columns `names`, with all statistics from the first `rows` rows.

        With predict="auto" the change is forecast where it varies less than half as much as the values do,
        that is where the last value explains three quarters of what comes.

        Raises:
            ValueError: columns that cannot be used, or too few training rows for one window.
        """
        values = table.numbers(target)
        features = Features.fit(table, names, rows)
        known = values[:rows][~np.isnan(values[:rows])]
        if len(known) == 0:
            raise ValueError(
                f"column {target!r} of {table.source} has no known value in the {rows} training rows"
            )
        auto = options.get("predict") == "auto"
        options |= {"predict": "change"} if auto else {}
        series = cls(target, features, float(known.mean()), 1.0, **options)
        training = series.windows(table).part(0, rows)
        if (
            len(training.y)
            and auto
            and np.std(training.y - series.base(table, training.origin)) > known.std() / 2
        ):
            series = replace(series, predict="value")
        spread = float(np.std(training.y - series.base(table, training.origin))) if len(training.y) else 0.0
        return replace(series, scale=spread or 1.0)  # a constant series has no spread, and needs none

    def windows(self, table: Table) -> Windows:
        """Inputs and, in the data's unit, true values."""
        return windows(self.features.transform(table), table.numbers(self.target), self.window, self.horizon)

    def base(self, table: Table, origin: np.ndarray) -> np.ndarray:
        """What the outputs are relative to (M, 1): the last known value, or the training mean."""
        if self.predict == "value":
            return np.full((len(origin), 1), self.mean)
        return carry_forward(table.numbers(self.target))[origin, None]

    def encode(self, table: Table, part: Windows) -> np.ndarray:
        """What the model is to put out (M, horizon) for a part's true values."""
        return ((part.y - self.base(table, part.origin)) / self.scale).astype(np.float32)

    def decode(self, output: np.ndarray, table: Table, origin: np.ndarray) -> np.ndarray:
        """Forecasts (M, horizon) in the data's unit, from what the model put out."""
        return np.asarray(output, dtype=np.float64) * self.scale + self.base(table, origin)

    def trivial(self, table: Table, origin: np.ndarray) -> dict[str, np.ndarray]:
        """The forecasts that need no model, by name; where no whole season is known yet, the last value."""
        values = table.numbers(self.target)
        last = trivial_forecast(values, origin, self.horizon)
        if self.season == 1:
            return {"last value": last}
        seasonal = trivial_forecast(values, origin, self.horizon, self.season)
        return {
            "last value": last,
            f"{self.season} rows before": np.where(np.isnan(seasonal), last, seasonal),
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, for the model file's metadata."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"features": self.features.to_dict()}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Series:
        """What `to_dict` described."""
        return cls(**{**description, "features": Features.from_dict(description["features"])})
