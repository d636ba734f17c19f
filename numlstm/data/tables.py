"""Tables of a time series as the windows a recurrent model learns from.

`read_csv` reads a file (gzip too) into columns; `Features` turns columns into numbers from the statistics of
the training rows only; `windows` cuts them into inputs (M, window, features) and targets (M, horizon);
`trivial_forecast` is what any model must beat. Row t is always older than row t+1, rows are equally spaced.
Nothing here looks forward in time: a gap is filled with the value known before it, never with a later one.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "BUNDLED_TABLES",
    "Features",
    "Scaler",
    "Table",
    "Windows",
    "carry_forward",
    "forecast_errors",
    "read_csv",
    "split_rows",
    "trivial_forecast",
    "windows",
]

BUNDLED_TABLES = {"sunspots": Path(__file__).parent / "files" / "sunspots_yearly.csv"}
"""Tables that come with the library, by name (origin and licence: data/files/SOURCES.md)."""

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-", "--"})
"""Cells that count as missing, in lower case."""

MAX_CATEGORIES = 50
"""A text column with more different values than this is no category."""

_DATE = re.compile(r"\d{4}-\d{1,2}(-\d{1,2}([ T]\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?)?)?(Z|[+-]00:?00)?")


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name: float64 (gaps: NaN), datetime64 (gaps: NaT) or text (gaps: "")."""

    columns: dict[str, np.ndarray]
    source: str = "the table"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has: {', '.join(self.columns)}")
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """A numeric column, checked.

        Raises:
            ValueError: no such column, a column of text or dates, or infinite values.
        """
        values = self[name]
        if values.dtype.kind != "f":
            example = next((str(value) for value in values if str(value) not in ("", "NaT")), "")
            raise ValueError(f"column {name!r} of {self.source} is not numeric: it holds {example!r}")
        if np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise ValueError(f"column {name!r} of {self.source} is infinite in data row {row + 1}")
        return values

    def time_column(self, name: str | None = None) -> str | None:
        """The name of the column that gives the rows' times, or None when the table has none.

        Without a `name`: the first column of dates, else a growing column that is called year, date or time.

        Raises:
            ValueError: the column does not grow from row to row (unsorted rows, or several series mixed).
        """
        if name is None:
            name = next((key for key, values in self.columns.items() if values.dtype.kind == "M"), None)
        if name is None:
            called = ("year", "date", "time", "timestamp", "datetime", "month")
            grows = [key for key in self.columns if key.lower() in called and self._disorder(key) is None]
            return grows[0] if grows else None
        if self[name].dtype.kind not in "Mf":
            raise ValueError(f"time column {name!r} of {self.source} holds neither dates nor numbers")
        row = self._disorder(name)
        if row is not None:
            values = self[name]
            raise ValueError(
                f"time column {name!r} of {self.source} must grow from row to row, but data row {row + 2} "
                f"({values[row + 1]}) does not follow row {row + 1} ({values[row]}): sort the rows, oldest "
                "first, and keep one series a file"
            )
        return name

    def _disorder(self, name: str) -> int | None:
        """The first row whose successor is not later, or None."""
        values = self[name]
        if values.dtype.kind not in "Mf":
            return 0
        later = values[1:] > values[:-1]
        return None if later.all() else int((~later).argmax())


def read_csv(source: str | Path) -> Table:
    """Read a CSV file (or .csv.gz, or a bundled table by name) whose first line names the columns.

    The separator is a comma, semicolon, tab or bar, whichever the first line uses. A column is numeric when
    every cell is a number or missing, a date when every cell is an ISO date or time, and text otherwise.

    Raises:
        ValueError: no rows, a line with too many or too few cells, repeated column names, bad UTF-8.
        FileNotFoundError: no such file, and no bundled table of that name.

    >>> table = read_csv("sunspots")
    >>> list(table.columns), len(table)
    (['YEAR', 'SUNACTIVITY'], 309)
    """
    path = Path(source)
    if not path.exists():
        if str(source) not in BUNDLED_TABLES:
            raise FileNotFoundError(f"no file {str(source)!r}; bundled tables: {', '.join(BUNDLED_TABLES)}")
        path = BUNDLED_TABLES[str(source)]
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a CSV file was expected")
    return parse_csv(_decompress(path), str(path))


def _decompress(path: Path) -> str:
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
        ) from None
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None


def parse_csv(text: str, source: str = "the text") -> Table:
    """`read_csv` for text already in memory; `source` names it in error messages."""
    first_line = text.split("\n", 1)[0]
    separator = max(",;\t|", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    names = [name or f"column_{number}" for number, name in enumerate(header, 1)]
    _check_header(names, source)
    rows = []
    for row in reader:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(
                f"{source}, line {reader.line_num}: {len(row)} cells, but the header names {len(names)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{source} has a header but no data rows")
    return Table(
        {name: _column(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}, source
    )


def _check_header(names: list[str], source: str) -> None:
    if not names:
        raise ValueError(f"{source} is empty; a CSV file with a header line was expected")
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{source} names the column {sorted(repeated)[0]!r} more than once")
    if all(_is_number(name) for name in names):
        raise ValueError(
            f"{source} begins with numbers ({', '.join(names[:3])}); its first line must name the columns"
        )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(cells: Sequence[str]) -> np.ndarray:
    """The cells of one column as numbers when all are numbers, else dates when all are dates, else text."""
    values = [cell.strip() for cell in cells]
    values = ["" if value.lower() in MISSING else value for value in values]
    try:
        return np.array([float(value) if value else np.nan for value in values])
    except ValueError:
        pass
    dates = [value.replace("/", "-") for value in values]
    if all(_DATE.fullmatch(value) for value in dates if value):
        try:
            return np.array([_date(value) for value in dates], dtype="datetime64[s]")
        except ValueError:  # shaped like a date but none, such as a 31st of February
            pass
    return np.array(values, dtype=object)


def _date(value: str) -> np.datetime64:
    if not value:
        return np.datetime64("NaT", "s")
    value = re.sub(r"(Z|[+-]00:?00)$", "", value)
    date, _, clock = value.replace(" ", "T").partition("T")
    date = "-".join(part.zfill(2) for part in date.split("-"))
    return np.datetime64(
        f"{date}T{clock.zfill(5) if clock.count(':') == 1 else clock.zfill(8)}" if clock else date, "s"
    )


class Scaler:
    """Numbers to zero mean and unit deviation, by the statistics of the rows it was fitted on.

    Missing values (NaN) count for nothing and stay NaN; a constant column is only shifted.

    >>> scaler = Scaler.fit(np.array([[1.0], [3.0], [np.nan]]))
    >>> scaler.transform(np.array([[5.0]])).tolist()
    [[3.0]]
    >>> scaler.inverse(np.array([[3.0]])).tolist()
    [[5.0]]
    """

    def __init__(self, mean: Iterable[float], deviation: Iterable[float]) -> None:
        self.mean: np.ndarray = np.asarray(list(mean), dtype=np.float64)
        self.deviation: np.ndarray = np.asarray(list(deviation), dtype=np.float64)
        if self.mean.shape != self.deviation.shape:
            raise ValueError(
                f"mean and deviation must be equally long, got {len(self.mean)}, {len(self.deviation)}"
            )
        if not (self.deviation > 0).all():
            raise ValueError(f"deviation must be positive, got {self.deviation.tolist()}")

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaler:
        """Statistics of `values` (N, F).

        Raises:
            ValueError: values that are not 2-D, or a column without a single known value.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2:
            raise ValueError(f"values must have shape (rows, features), got {values.shape}")
        known = ~np.isnan(values)
        empty = ~known.any(axis=0)
        if empty.any():
            raise ValueError(f"column {int(empty.argmax())} of the training rows has no known value")
        counts = known.sum(axis=0)
        mean = np.where(known, values, 0.0).sum(axis=0) / counts
        deviation = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / counts)
        # Rounding can leave a constant column a deviation of 1e-17; dividing by that would make noise of it.
        constant = deviation <= 1e-12 * np.maximum(1.0, np.abs(mean))
        return cls(mean, np.where(constant, 1.0, deviation))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Scaled `values` (..., F)."""
        return (np.asarray(values, dtype=np.float64) - self.mean) / self.deviation

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """What `transform` was given."""
        return np.asarray(values, dtype=np.float64) * self.deviation + self.mean

    def to_dict(self) -> dict[str, list[float]]:
        """A JSON-able description, for a model file's metadata."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Scaler:
        """The scaler that `to_dict` described."""
        return cls(description["mean"], description["deviation"])


def carry_forward(values: np.ndarray) -> np.ndarray:
    """Fill every gap (NaN) of a series (N,) with the last value known before it; leading gaps stay NaN.

    >>> carry_forward(np.array([np.nan, 1.0, np.nan, np.nan, 4.0])).tolist()
    [nan, 1.0, 1.0, 1.0, 4.0]
    """
    values = np.asarray(values, dtype=np.float64)
    last_known = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[last_known]


class Features:
    """The model's inputs: which columns of a table, and how each becomes numbers.

    A numeric column is scaled; where it has gaps in the training rows, each gap holds the last known value
    and a second input says "missing here". A text column becomes one input for each value it takes in the
    training rows (a value never seen there is all zeros). `notes` says, for people, what was done.

    >>> table = parse_csv("wind,sky\\n1,clear\\n,cloudy\\n3,clear\\n")
    >>> features = Features.fit(table, ["wind", "sky"], rows=3)
    >>> features.names
    ['wind', 'wind missing', 'sky=clear', 'sky=cloudy']
    >>> features.transform(table).tolist()
    [[-1.0, 0.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
        self.columns: list[dict[str, Any]] = [dict(column) for column in columns]
        self.notes: list[str] = list(notes)

    @classmethod
    def fit(cls, table: Table, names: Sequence[str], rows: int) -> Features:
        """Describe the columns `names` from the first `rows` rows, the training part.

        Raises:
            ValueError: an unknown column, a date column, a text column with too many values, no known value.
        """
        if not names:
            raise ValueError("names is empty; a model needs at least one feature")
        described, notes = [], []
        for name in names:
            column = cls._describe(table, name, rows)
            described.append(column)
            if column.get("gaps"):
                gaps = int(np.isnan(table[name]).sum())
                notes.append(
                    f"{name}: {gaps:,} missing of {len(table):,}; filled with the last known value, "
                    "and an extra input says where"
                )
        return cls(described, notes)

    @staticmethod
    def _describe(table: Table, name: str, rows: int) -> dict[str, Any]:
        values = table[name]
        if values.dtype == object:
            categories = sorted(set(values[:rows]) - {""})
            if not 1 <= len(categories) <= MAX_CATEGORIES:
                raise ValueError(
                    f"column {name!r} of {table.source} is text with {len(categories)} different values in "
                    f"the training rows; a category may have 1 to {MAX_CATEGORIES}"
                )
            return {"name": name, "categories": categories}
        training = table.numbers(name)[:rows]
        if np.isnan(training).all():
            raise ValueError(
                f"column {name!r} of {table.source} has no known value in the {rows} training rows"
            )
        scaler = Scaler.fit(training[:, None])
        gaps = bool(np.isnan(training).any())
        return {"name": name, "mean": scaler.mean[0], "deviation": scaler.deviation[0], "gaps": gaps}

    @property
    def names(self) -> list[str]:
        """One name for each input, in order."""
        names: list[str] = []
        for column in self.columns:
            name = column["name"]
            if "categories" in column:
                names += [f"{name}={category}" for category in column["categories"]]
            else:
                names += [name, f"{name} missing"] if column["gaps"] else [name]
        return names

    def transform(self, table: Table) -> np.ndarray:
        """The inputs (rows, features) float32 of a table, the training one or a later one.

        Raises:
            ValueError: a column is missing or of another kind than it was.
        """
        parts: list[np.ndarray] = []
        for column in self.columns:
            name = column["name"]
            if "categories" in column:
                parts += [table[name] == category for category in column["categories"]]
                continue
            values = table.numbers(name)
            missing = np.isnan(values)
            known = (carry_forward(values) - column["mean"]) / column["deviation"]
            parts.append(np.nan_to_num(known, nan=0.0))  # before the first known value: the mean
            if column["gaps"]:
                parts.append(missing)
        return np.stack(parts, axis=1).astype(np.float32)

    def to_dict(self) -> list[dict[str, Any]]:
        """A JSON-able description, for a model file's metadata."""
        return [{key: _plain(value) for key, value in column.items()} for column in self.columns]

    @classmethod
    def from_dict(cls, description: Sequence[Mapping[str, Any]]) -> Features:
        """The features that `to_dict` described."""
        return cls(description)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def default_features(table: Table, target: str, rows: int) -> tuple[list[str], list[str]]:
    """Every usable column, the target first, and one note for each column left out.

    Left out are dates, constants, text that is no category, and counters: a column that only ever grows in
    the training rows takes values later that the model has never seen.
    """
    chosen, notes = [target], []
    for name, values in table.columns.items():
        if name == target:
            continue
        training = values[:rows]
        if values.dtype.kind == "M":
            notes.append(f"{name}: left out, it holds times")
        elif values.dtype == object:
            count = len(set(training) - {""})
            if 2 <= count <= MAX_CATEGORIES:
                chosen.append(name)
            else:
                notes.append(f"{name}: left out, text with {count} different values")
        else:
            known = training[~np.isnan(training)]
            if len(known) == 0 or known.min() == known.max():
                notes.append(f"{name}: left out, it does not change in the training rows")
            elif (np.diff(known) >= 0).all():
                notes.append(f"{name}: left out, it only grows (a counter)")
            else:
                chosen.append(name)
    return chosen, notes


class Windows(NamedTuple):
    """`x` (M, window, F) ends at row `origin[m]`; `y` (M, horizon) are the target's rows after it."""

    x: np.ndarray
    y: np.ndarray
    origin: np.ndarray

    def part(self, start: int, stop: int) -> Windows:
        """The windows all of whose targets lie in rows start .. stop-1 (inputs may reach further back)."""
        inside = (self.origin + 1 >= start) & (self.origin + self.y.shape[1] < stop)
        first, last = np.flatnonzero(inside)[[0, -1]] if inside.any() else (0, -1)
        if inside[first : last + 1].all():
            return Windows(*(array[first : last + 1] for array in self))  # a view: nothing is copied
        return Windows(*(array[inside] for array in self))


def windows(features: np.ndarray, target: np.ndarray, window: int, horizon: int) -> Windows:
    """Every `window` rows of `features` (N, F), with the `horizon` values of `target` (N,) that follow.

    Windows with a missing target value, or before the first known one, are left out: no model is trained or
    judged on a made-up number.

    Raises:
        ValueError: window or horizon below 1, arrays of unequal length, or too few rows for one window.

    >>> values = np.arange(6.0)
    >>> x, y, origin = windows(values[:, None], values, window=3, horizon=2)
    >>> x[..., 0].tolist(), y.tolist(), origin.tolist()
    ([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [[3.0, 4.0], [4.0, 5.0]], [2, 3])
    """
    for name, value in (("window", window), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if features.ndim != 2 or target.ndim != 1 or len(features) != len(target):
        raise ValueError(
            f"features (N, F) and target (N,) are expected, got {features.shape} and {target.shape}"
        )
    if len(target) < window + horizon:
        raise ValueError(
            f"{len(target)} rows are too few: window {window} and horizon {horizon} need {window + horizon}"
        )
    slide = np.lib.stride_tricks.sliding_window_view
    x = slide(features, window, axis=0)[:-horizon].transpose(0, 2, 1)
    y = slide(target[window:], horizon)
    origin = np.arange(window - 1, len(target) - horizon)
    known = ~np.isnan(y).any(axis=1) & ~np.isnan(carry_forward(target)[origin])
    if known.all():
        return Windows(x, y, origin)
    return Windows(x[known], y[known], origin[known])


def split_rows(rows: int, split: Sequence[float]) -> tuple[int, int]:
    """Where validation and test begin, in time order, for shares that sum to 1 or for three counts of rows.

    Raises:
        ValueError: not three numbers, a negative one, no training part, shares that miss 1, too many rows.

    >>> split_rows(200, (0.7, 0.1, 0.2)), split_rows(200, (100, 20, 80))
    ((140, 160), (100, 120))
    """
    shown = ",".join(f"{part:g}" for part in split)
    if len(split) != 3 or min(split) < 0 or split[0] <= 0:
        raise ValueError(
            f"split must be three numbers (training, validation, test), the first above 0; got {shown}"
        )
    if abs(sum(split) - 1) < 1e-6:
        return round(rows * split[0]), round(rows * (split[0] + split[1]))
    if any(part != int(part) for part in split) or sum(split) > rows:
        raise ValueError(f"split must be shares that sum to 1, or counts of at most {rows} rows; got {shown}")
    return int(split[0]), int(split[0] + split[1])


def trivial_forecast(target: np.ndarray, origin: np.ndarray, horizon: int, season: int = 1) -> np.ndarray:
    """The forecast (M, horizon) that needs no model: the last known value, or the one a whole season before.

    Raises:
        ValueError: a season below 1.

    >>> trivial_forecast(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3]), horizon=3, season=2).tolist()
    [[3.0, 4.0, 3.0]]
    """
    if season < 1:
        raise ValueError(f"season must be at least 1, got {season}")
    steps = np.arange(1, horizon + 1)
    back = season * -(-steps // season) - steps  # rows before the origin: the smallest that lies in the past
    rows = origin[:, None] - back
    return np.where(rows >= 0, carry_forward(target)[np.maximum(rows, 0)], np.nan)


def forecast_errors(truth: np.ndarray, forecast: np.ndarray) -> dict[str, float]:
    """Root mean squared and mean absolute error, in the unit of the data.

    >>> forecast_errors(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))["mae"]
    1.0
    """
    if truth.shape != forecast.shape or truth.size == 0:
        raise ValueError(
            f"truth and forecast must have one shape, not empty; got {truth.shape}, {forecast.shape}"
        )
    difference = np.asarray(forecast, dtype=np.float64) - truth
    return {"rmse": float(np.sqrt(np.mean(difference**2))), "mae": float(np.mean(np.abs(difference)))}
