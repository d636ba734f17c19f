"""Tables whose rows are time steps, in the forms people have them, and the way back to those forms.

A pandas DataFrame or Series is one table, oldest row first; a list, tuple or dict of them is several. Arrays put samples
first, as everywhere in scikit-learn: 2-D is one series of one column a row, 3-D is (tables, time, columns), a list of
2-D arrays tables of unequal length. With `rows="steps"` a 1-D or 2-D array is one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.validation import check_array, validate_data

from numlstm.data.tables import Table
from numlstm.estimators.inputs import is_sequences

__all__ = ["Panel", "continuation", "is_pandas", "read_panel"]

ROWS = ("auto", "steps", "samples")


@dataclass(frozen=True)
class Panel:
    """Tables of the same columns, and what they came as.

    `kind`: "frame" or "series" (pandas), "steps" (an array that is one table, `ndim` its axes), "samples" (a 2-D array,
    one series a row) or "arrays" (3-D, or a list of 2-D). `single`: one table, not a collection of them. `keys`: those
    of a dict. `index`: each table's pandas index.
    """

    tables: list[Table]
    kind: str
    single: bool
    keys: list[Any] | None = None
    index: list[Any] | None = None
    ndim: int = 2

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self.tables[0].columns)

    @property
    def by_row(self) -> bool:
        """Are rows time steps, for the user too?"""
        return self.kind in ("frame", "series", "steps")

    def give(self, values: Sequence[Any]) -> Any:
        """One value a table, in the collection that the tables came in."""
        if self.single:
            return values[0]
        return dict(zip(self.keys, values, strict=True)) if self.keys is not None else list(values)


def is_pandas(X: Any) -> bool:
    """A DataFrame or Series, told without importing pandas."""
    return type(X).__module__.partition(".")[0] == "pandas" and hasattr(X, "iloc")


def read_panel(estimator: Any, X: Any, rows: str, *, reset: bool, allow_nan: bool, name: str = "X") -> Panel:
    """X as a panel, checked; sets `n_features_in_` (and names) of the estimator if `reset`, else compares.

    Raises ValueError for what is empty or infinite, for columns of dates or other ones than `fit` had, and for an index
    that does not grow.
    """
    if rows not in ROWS:
        raise ValueError(f"rows: expected one of {', '.join(ROWS)}; got {rows!r}")
    mapping = isinstance(X, Mapping) and not issparse(X)  # sparse matrices of one kind are mappings
    several = X.values() if mapping else X
    if is_pandas(X):
        return _frames(estimator, [X], reset, allow_nan, name, single=True)
    if (mapping or isinstance(X, list | tuple)) and len(X) and all(is_pandas(item) for item in several):
        keys = list(X) if mapping else None
        return _frames(estimator, list(several), reset, allow_nan, name, single=False, keys=keys)
    if mapping:
        kinds = ", ".join(sorted({type(v).__name__ for v in several}))
        raise ValueError(f"{name}: a dict must hold pandas tables, got {kinds or 'none'}")
    return _arrays(estimator, X, rows, reset, allow_nan, name)


def _frames(
    estimator: Any,
    frames: list[Any],
    reset: bool,
    allow_nan: bool,
    name: str,
    *,
    single: bool,
    keys: Any = None,
) -> Panel:
    kind = "series" if all(frame.ndim == 1 for frame in frames) else "frame"
    # a Series is a column; its name may be missing, and need not be a string
    frames = [f.to_frame("value" if f.name is None else f.name) if f.ndim == 1 else f for f in frames]
    tables = []
    for frame in frames:
        if reset and not tables:
            validate_data(estimator, frame, reset=True, skip_check_array=True)
        else:
            validate_data(estimator, frame, reset=False, skip_check_array=True)
        if len(frame) == 0:
            raise ValueError(
                f"{name}: Found array with 0 sample(s) (shape={frame.shape}) while a minimum of 1 is required"
            )
        _check_index(frame.index, name)
        columns = {
            str(column): _column(frame.iloc[:, k], str(column), allow_nan, name)
            for k, column in enumerate(frame.columns)
        }
        if len(columns) != frame.shape[1]:
            raise ValueError(f"{name}: names a column twice: {', '.join(map(str, frame.columns))}")
        tables.append(Table(columns, name))
    return Panel(tables, kind, single, keys, [frame.index for frame in frames])


def _check_index(index: Any, name: str) -> None:
    if (index.dtype.kind in "iufmM" or hasattr(index, "freq")) and not (
        index.is_monotonic_increasing and index.is_unique
    ):
        raise ValueError(f"{name}: its index must grow from row to row (rows are time steps, oldest first)")


def _column(column: Any, label: str, allow_nan: bool, name: str) -> np.ndarray:
    """A column as float64, or as text with gaps ""."""
    kind = getattr(column.dtype, "kind", "O")
    if kind in "mM" or hasattr(column.dtype, "tz"):
        raise ValueError(f"{name}: column {label!r} holds times; make them the index, or leave them out")
    if kind in "iufb":
        return _finite(column.to_numpy(dtype=np.float64, na_value=np.nan), label, allow_nan, name)
    missing = column.isna().to_numpy()
    if kind == "O" and all(isinstance(v, int | float | np.number) for v in column[~missing]):
        return _finite(column.to_numpy(dtype=np.float64, na_value=np.nan), label, allow_nan, name)
    if not allow_nan:
        raise ValueError(f"{name}: column {label!r} holds text, expected numbers")
    return np.array(["" if gap else str(v) for v, gap in zip(column, missing, strict=True)], dtype=object)


def _finite(values: np.ndarray, label: str, allow_nan: bool, name: str) -> np.ndarray:
    bad = np.isinf(values) if allow_nan else ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{name}: column {label!r} contains {'infinity' if np.isinf(values[row]) else 'NaN'} in row {row}"
        )
    return values


def _arrays(estimator: Any, X: Any, rows: str, reset: bool, allow_nan: bool, name: str) -> Panel:
    options: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan" if allow_nan else True}
    if is_sequences(X):
        items = [X[k] for k in range(len(X))]
        blocks = [check_array(np.reshape(b, (-1, 1)) if np.ndim(b) == 1 else b, input_name=f"{name}[{k}]", **options)
                  for k, b in enumerate(items)]  # fmt: skip
        widths = {block.shape[1] for block in blocks}
        if len(widths) > 1:
            raise ValueError(
                f"{name}: its tables have {', '.join(map(str, sorted(widths)))} columns, expected one number"
            )
        if reset:
            estimator.n_features_in_ = blocks[0].shape[1]
        elif widths != {estimator.n_features_in_}:
            raise ValueError(
                f"{name} has {blocks[0].shape[1]} features, but {type(estimator).__name__} is expecting "
                f"{estimator.n_features_in_} features as input"
            )
        return Panel([_table(block, name) for block in blocks], "arrays", False)
    ndim = np.ndim(X) if isinstance(X, np.ndarray | list | tuple) else 2
    if ndim == 1:
        if rows != "steps" or (not reset and estimator.n_features_in_ != 1):
            raise ValueError(
                f"{name}: Expected 2D array, got 1D array instead. Reshape your data: X[None] is one series of one column "
                "a row; X[:, None] with rows='steps', or a pandas Series, is one table"
            )
        X = np.reshape(X, (-1, 1))
    X = validate_data(estimator, X, reset=reset, **options)  # type: ignore[arg-type]
    if rows == "steps":
        return Panel([_table(X, name)], "steps", True, ndim=ndim)
    return Panel([_table(row[:, None], name) for row in X], "samples", False)


def _table(block: np.ndarray, name: str) -> Table:
    return Table({str(k): column for k, column in enumerate(block.T)}, name)


def continuation(index: Any) -> dict[str, Any]:
    """How a pandas index goes on after its end, as plain values: see `continued`."""
    import pandas as pd

    names = {"name": None if index.name is None else str(index.name)}
    if isinstance(index, pd.PeriodIndex):
        return {**names, "kind": "period", "last": str(index[-1]), "freq": index.freqstr}
    if isinstance(index, pd.DatetimeIndex):
        freq = index.freqstr or (pd.infer_freq(index) if len(index) > 2 else None)
        if freq is None and len(index) > 1 and len(set(np.diff(index[-3:].asi8))) == 1:
            freq = pd.tseries.frequencies.to_offset(index[-1] - index[-2]).freqstr  # type: ignore[arg-type]
        if freq is not None:
            return {**names, "kind": "datetime", "last": index[-1].isoformat(), "freq": freq}  # type: ignore[attr-defined]
    elif index.dtype.kind in "iuf" and len(index) > 1:
        steps = np.diff(np.asarray(index[-25:], np.float64))
        if np.allclose(steps, steps[0]):
            whole = index.dtype.kind in "iu"
            return {
                **names,
                "kind": "number",
                "last": np.asarray(index[-1]).item(),
                "step": int(steps[0]) if whole else float(steps[0]),
            }
    return {**names, "kind": "count"}


def continued(how: Mapping[str, Any], count: int) -> Any:
    """The next `count` entries of the index that `continuation` described; 1, 2, ... if it has no rule."""
    import pandas as pd

    name = how["name"]
    if how["kind"] == "datetime":
        return pd.date_range(pd.Timestamp(how["last"]), periods=count + 1, freq=how["freq"], name=name)[1:]
    if how["kind"] == "period":
        return pd.period_range(pd.Period(how["last"], how["freq"]), periods=count + 1, name=name)[1:]
    if how["kind"] == "number":
        return pd.Index([how["last"] + how["step"] * k for k in range(1, count + 1)], name=name)
    return pd.RangeIndex(1, count + 1, name=name or "step")
