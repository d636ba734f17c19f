"""`numlstm train forecast`: a table in, a model, its error beside the trivial forecast's, and a picture out.

The rows are cut in time order into training, validation and test. Everything learned, scaling included,
comes from the training rows; the validation rows choose the epoch; the test rows are looked at once. The
model reads `window` rows and forecasts the next `horizon` values of the target, all at once: the values, or,
where the last known value tells most of what comes, how much they will have changed since.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from numlstm.cli.common import (
    Backend,
    Json,
    Out,
    Overwrite,
    Resume,
    Run,
    Seed,
    command,
    duration,
    picture,
    resumed_or_new,
    train_run,
)

if TYPE_CHECKING:
    from numlstm.data.series import Series
    from numlstm.data.tables import Table, Windows
    from numlstm.models import Model

KIND = "forecast"
"""How a model file's preprocessing says that it is one of these."""


@dataclass(frozen=True)
class ForecastSettings:
    """Everything that decides what a forecasting model becomes; `run.json` keeps it."""

    file: str
    target: str = ""
    horizon: int = 1
    window: int = 24
    features: str = ""
    time: str = ""
    season: int = 1
    split: str = "0.7,0.1,0.2"
    predict: str = "auto"
    units: int = 64
    layers: int = 1
    dropout: float = 0.0
    loss: str = "mse"
    epochs: int = 200
    patience: int = 15
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


def train_forecast(
    context: typer.Context,
    file: Annotated[str | None, typer.Argument(help="A CSV file (.gz too), or the bundled sunspots.")] = None,
    target: Annotated[
        str, typer.Option(help="The column to forecast; may be left out when there is only one.")
    ] = "",
    horizon: Annotated[int, typer.Option(min=1, help="How many rows ahead to forecast (all of them).")] = 1,
    window: Annotated[int, typer.Option(min=1, help="How many rows the model reads.")] = 24,
    features: Annotated[
        str, typer.Option(help="Columns to read, with commas between; 'all'; or the target alone.")
    ] = "",
    time_column: Annotated[
        str, typer.Option("--time", help="Column that gives the rows' times; found when left out.")
    ] = "",
    season: Annotated[
        int, typer.Option(min=1, help="Rows in a season: the trivial forecast then also repeats it.")
    ] = 1,
    split: Annotated[
        str, typer.Option(help="Training, validation, test: shares that sum to 1, or counts of rows.")
    ] = "0.7,0.1,0.2",
    predict: Annotated[
        str, typer.Option(help="What the model puts out: 'change' since the last value, 'value', or 'auto'.")
    ] = "auto",
    units: Annotated[int, typer.Option(min=1, help="Units of each LSTM layer.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Number of LSTM layers.")] = 1,
    dropout: Annotated[float, typer.Option(min=0, max=0.95, help="Dropout before the output.")] = 0.0,
    loss: Annotated[str, typer.Option(help="mse, mae or huber.")] = "mse",
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the training windows.")] = 200,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many epochs without a better one.")
    ] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Adam's.")] = 2e-3,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Train a forecasting model on a table of equally spaced rows, oldest first."""
    given = context.params | {"time": time_column}
    settings, run = resumed_or_new("train forecast", ForecastSettings, context, given, resume)
    with command(as_json, settings.seed, backend) as result:
        task = _Task(settings)
        # Before anything is written: bad input is refused here.
        model = _build(task.parts["training"].x.shape[2], settings)
        if run is None:
            inputs = [Path(task.table.source)]
            stem = Path(settings.file).name.split(".")[0]
            run = Run.start(
                "train forecast", asdict(settings), inputs, out=out, stem=stem, overwrite=overwrite
            )
        result |= _train(run, settings, task, model)


class _Task:
    """The table as windows: what is learned from, what is judged on, and how to undo the scaling."""

    def __init__(self, settings: ForecastSettings) -> None:
        from numlstm.data import tables
        from numlstm.data.series import Series

        self.table = tables.read_csv(settings.file)
        self.notes: list[str] = []
        self.target = settings.target or self._only_column()
        self.time = self.table.time_column(settings.time or None)
        bounds = tables.split_rows(len(self.table), _split(settings.split))
        names = self._features(settings, bounds[0])
        series = Series.fit(
            self.table,
            self.target,
            names,
            bounds[0],
            window=settings.window,
            horizon=settings.horizon,
            season=settings.season,
            predict=settings.predict,
        )
        self.series = series
        self.notes += series.features.notes
        self.parts: dict[str, Windows] = {}
        windows = series.windows(self.table)
        edges = (0, *bounds, len(self.table))
        for name, start, stop in zip(("training", "validation", "test"), edges, edges[1:], strict=False):
            self.parts[name] = windows.part(start, stop)
            if len(self.parts[name].y) == 0:
                raise ValueError(
                    f"the {name} part (rows {start + 1} to {stop}) holds no whole window: it takes "
                    f"--horizon {settings.horizon} rows of known values with --window {settings.window} rows "
                    "before them; change --split, --window or --horizon"
                )

    def _only_column(self) -> str:
        numeric = [name for name, values in self.table.columns.items() if values.dtype.kind == "f"]
        numeric = [name for name in numeric if name != self.table.time_column()]
        if len(numeric) != 1:
            raise ValueError(
                f"which column? give --target, one of: {', '.join(numeric) or 'none is numeric'}"
            )
        return numeric[0]

    def _features(self, settings: ForecastSettings, rows: int) -> list[str]:
        from numlstm.data.tables import default_features

        self.table.numbers(self.target)
        if settings.features == "all":
            names, notes = default_features(self.table, self.target, rows)
            self.notes += notes
            return names
        names = [name.strip() for name in settings.features.split(",") if name.strip()]
        return names or [self.target]


def _split(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--split must be three numbers with commas between, got {text!r}") from None


def _forecast(series: Series, model: Model, table: Table, x: np.ndarray, origin: np.ndarray) -> np.ndarray:
    return series.decode(model.predict(x, batch_size=256, verbose=0), table, origin)


def judge(series: Series, model: Model, table: Table, part: Windows) -> dict[str, Any]:
    """The model's and the trivial forecasts' errors over a part, and the forecasts themselves."""
    from numlstm.data.tables import forecast_errors

    forecasts = {
        "LSTM": _forecast(series, model, table, part.x, part.origin),
        **series.trivial(table, part.origin),
    }
    errors = {name: forecast_errors(part.y, forecast) for name, forecast in forecasts.items()}
    trivial = min((name for name in errors if name != "LSTM"), key=lambda name: errors[name]["rmse"])
    gain = 1 - errors["LSTM"]["rmse"] / errors[trivial]["rmse"] if errors[trivial]["rmse"] else -np.inf
    return {
        "errors": errors,
        "best_trivial": trivial,
        "gain": gain,
        "beats_trivial": gain > 0,
        "forecasts": forecasts,
        "windows": len(part.y),
    }


def print_judgement(judgement: dict[str, Any], title: str) -> None:
    """The errors as a small table, and in words whether the model is of any use."""
    print(f"\n{title} ({judgement['windows']:,} forecasts), in the unit of the data:")
    for name, errors in judgement["errors"].items():
        print(f"  {name:<28} RMSE {errors['rmse']:10.4g}   MAE {errors['mae']:10.4g}")
    trivial, percent = judgement["best_trivial"], abs(judgement["gain"]) * 100
    if judgement["beats_trivial"]:
        print(f"The LSTM's RMSE is {percent:.1f} % below the trivial forecast's ({trivial}).")
    else:
        print(f"The LSTM does NOT beat the trivial forecast ({trivial}): its RMSE is {percent:.1f} % above.")


def _build(inputs: int, settings: ForecastSettings) -> Model:
    """The model, compiled."""
    import numlstm as nl

    layers: list[Any] = []
    for number in range(settings.layers):
        shape = {"input_shape": (settings.window, inputs)} if number == 0 else {}
        layers.append(nl.layers.LSTM(settings.units, return_sequences=number < settings.layers - 1, **shape))
    if settings.dropout:
        layers.append(nl.layers.Dropout(settings.dropout))
    # Zeros at the start: the untrained model forecasts no change, or the mean.
    layers.append(nl.layers.Dense(settings.horizon, kernel_initializer="zeros"))
    model = nl.Sequential(layers)
    model.compile(optimizer=nl.optimizers.Adam(settings.learning_rate), loss=settings.loss)
    return model


def _train(run: Run, settings: ForecastSettings, task: _Task, model: Model) -> dict[str, Any]:
    """Train, keep the best epoch, judge it on the test part, save the model and the pictures."""
    import numlstm as nl
    from numlstm.data import plots

    began = time.perf_counter()
    series, table, parts = task.series, task.table, task.parts
    _introduce(task)
    y = {name: series.encode(table, part) for name, part in parts.items()}
    history = train_run(
        run,
        model,
        preprocessing={"kind": KIND, "series": series.to_dict()},
        patience=settings.patience,
        x=parts["training"].x,
        y=y["training"],
        validation_data=(parts["validation"].x, y["validation"]),
        batch_size=settings.batch,
        epochs=settings.epochs,
    )
    model = nl.load(run.model)
    seconds = time.perf_counter() - began
    best = int(np.argmin(history["val_loss"])) + 1
    print(f"\nTrained in {duration(seconds)}; epoch {best} of {len(history['loss'])} was best on validation.")
    part = parts["test"]
    judgement = judge(series, model, table, part)
    print_judgement(judgement, "Test part")
    forecasts = judgement.pop("forecasts")
    times = table[task.time] if task.time else np.arange(1.0, len(table) + 1)
    pictures = [
        picture(
            lambda: plots.forecast_figure(
                part.y,
                forecasts["LSTM"],
                forecasts[judgement["best_trivial"]],
                times[part.origin + series.horizon],
                target=series.target,
                trivial_name=judgement["best_trivial"],
                time_name=task.time or "row",
            ),
            run.folder / "forecast.png",
        ),
        picture(
            lambda: plots.learning_curve(history, title="Learning curve", unit=f"{settings.loss} (scaled)"),
            run.folder / "curve.png",
        ),
    ]
    written = [run.model, *(path for path in pictures if path)]
    print("Written: " + ", ".join(str(path) for path in written))
    result = {
        "model": run.model,
        "pictures": [path for path in pictures if path],
        "target": series.target,
        "epochs": len(history["loss"]),
        "best_epoch": best,
        "seconds": seconds,
        "notes": task.notes,
        "test": judgement,
    }
    run.finish(result)
    return result


def _introduce(task: _Task) -> None:
    """What will be learned from what, and what was done to the data."""
    series, counts = task.series, {name: len(part.y) for name, part in task.parts.items()}
    ahead = "the next row" if series.horizon == 1 else f"the next {series.horizon} rows"
    print(f"{task.table.source}: {len(task.table):,} rows; forecasting {series.target}, {ahead},")
    print(f"from the last {series.window} rows of: {', '.join(series.features.names)}.")
    since = " since the last known value" if series.predict == "change" else ""
    print(f"The model puts out the {series.predict}{since}.")
    print("Windows: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + ".")
    missing = int(np.isnan(task.table.numbers(series.target)).sum())
    if missing:
        task.notes.append(f"{series.target}: {missing:,} missing values are never a forecast's target")
    for note in task.notes:
        print(f"  - {note}")
    print()


def judge_file(model: Model, preprocessing: dict[str, Any], file: str) -> dict[str, Any]:
    """`numlstm evaluate`: every window of a table."""
    from numlstm.data.series import Series
    from numlstm.data.tables import read_csv

    series, table = Series.from_dict(preprocessing["series"]), read_csv(file)
    windows = series.windows(table)
    if len(windows.y) == 0:
        raise ValueError(f"{file}: {series.target} has no stretch of {series.horizon} known values to judge")
    judgement = judge(series, model, table, windows)
    print_judgement(judgement, f"All of {file}")
    del judgement["forecasts"]
    return {"target": series.target, **judgement}


def forecast_rows(
    model: Model, preprocessing: dict[str, Any], file: str, *, every: bool
) -> tuple[list[str], list[list[Any]]]:
    """`numlstm predict`: the rows after the table's end, or, from each row on, what was to be expected.

    Raises:
        ValueError: the table is shorter than the window, or the target has no known value to start from.
    """
    from numlstm.data.series import Series
    from numlstm.data.tables import read_csv

    series, table = Series.from_dict(preprocessing["series"]), read_csv(file)
    inputs = series.features.transform(table)
    if len(table) < series.window:
        raise ValueError(f"{file} has {len(table)} rows; the model reads {series.window}")
    origin = np.arange(series.window - 1, len(table))
    slide = np.lib.stride_tricks.sliding_window_view(inputs, series.window, axis=0).transpose(0, 2, 1)
    known = ~np.isnan(series.base(table, origin)[:, 0])
    chosen = known if every else known & (origin == len(table) - 1)
    if not chosen.any():
        raise ValueError(f"{file}: {series.target} has no known value to start from")
    forecasts = _forecast(series, model, table, slide[chosen], origin[chosen])
    if not every:
        steps = enumerate(forecasts[0], 1)
        return ["steps_ahead", series.target], [[step, float(value)] for step, value in steps]
    header = ["after_row", *(f"{series.target}+{step}" for step in range(1, series.horizon + 1))]
    rows = zip(origin[chosen], forecasts, strict=True)
    return header, [[int(row) + 1, *map(float, values)] for row, values in rows]
