"""`LSTMForecaster` on real series: errors beside the trivial forecasts', and how much its intervals hold.

Yearly sunspots (bundled), 1 and 5 years ahead, and Beijing's hourly PM2.5 with the weather (Liang et al. 2015; the file is
given), 1 and 24 hours ahead. The last fifth of the rows is judged, from every row on, and looked at by nothing before;
scaling, training, early stopping and the calibration of the intervals see the rows before it. The intervals are meant
to hold 80 and 90 % of what comes; what they hold is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.papers import pictures
from numlstm.data.tables import Features, carry_forward, read_csv

COVERAGE = (0.8, 0.9)
TEST = 0.2
WEATHER = ["pm2.5", "DEWP", "TEMP", "PRES", "Iws", "Is", "Ir", "cbwd"]

# Those of `numlstm train forecast` for yearly rows; a batch of 64, wider windows and less patience for five years of hours.
YEARLY = {
    "window": 24,
    "units": 64,
    "learning_rate": 0.002,
    "epochs": 200,
    "n_iter_no_change": 15,
    "validation_fraction": 0.125,
}
HOURLY = YEARLY | {
    "learning_rate": 0.001,
    "dropout": 0.2,
    "epochs": 20,
    "batch_size": 64,
    "n_iter_no_change": 3,
}

# name, source, horizon, season, options of the forecaster
TASKS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("sunspots, 1 year ahead", "sunspots", 1, 11, YEARLY),
    ("sunspots, 1 to 5 years ahead", "sunspots", 5, 11, YEARLY),
    ("Beijing PM2.5, 1 hour ahead", "beijing", 1, 24, HOURLY),
    ("Beijing PM2.5, 1 to 24 hours ahead", "beijing", 24, 24, HOURLY | {"window": 48}),
)


def beijing(path: Path) -> np.ndarray:
    """The rows (N, 13): PM2.5 first, with its gaps, then weather, the wind's direction by category, hour and day of year as
    points on circles."""
    table = read_csv(path)
    rows = len(table)
    numbers = [table.numbers(name) for name in WEATHER[:-1]]
    wind = Features.fit(table, ["cbwd"], rows).transform(table)
    hour = table.numbers("hour") * (2 * np.pi / 24)
    start = np.datetime64(f"{int(table.numbers('year')[0])}-01-01")
    year = np.arange(rows) / 24 * (2 * np.pi / 365.25)
    if start != np.datetime64("2010-01-01"):
        raise ValueError(f"{path}: begins in {start}, expected 2010-01-01, hour by hour")
    return np.column_stack([*numbers, wind, np.sin(hour), np.cos(hour), np.sin(year), np.cos(year)])


def judge(
    task: tuple[str, str, int, int, dict[str, Any]], rows: np.ndarray, seed: int, epochs: int | None
) -> dict[str, Any]:
    """Train on all but the last fifth of `rows`, and judge on that."""
    from numlstm.estimators import LSTMForecaster

    name, source, horizon, season, options = task
    began = time.perf_counter()
    cut = round(len(rows) * (1 - TEST))
    options = options | ({"epochs": epochs} if epochs else {})
    forecaster = LSTMForecaster(
        horizon, target=0, rows="steps", coverage=COVERAGE, early_stopping=True, random_state=seed, **options
    ).fit(rows[:cut])
    result = forecaster.backtest(rows, start=cut, season=season)
    # for the picture: whole horizons, one behind the other
    shown = slice(None, 14 * 24 if horizon == 24 else 200, horizon)
    return {
        "name": name,
        "source": source,
        "horizon": horizon,
        "test_forecasts": len(result.truth),
        "epochs": forecaster.n_iter_,
        "seconds": time.perf_counter() - began,
        "errors": result.errors(),
        "coverage": {str(c): v for c, v in result.coverage().items()},
        "width": {str(c): v for c, v in result.width().items()},
        "shown": {
            "truth": result.truth[shown].ravel().tolist(),
            "forecast": result.forecast[shown].ravel().tolist(),
            "bounds": {str(c): b[shown].reshape(-1, 2).tolist() for c, b in result.bounds.items()},
        },
    }


def line(found: dict[str, Any]) -> str:
    """A task's figures for people."""
    errors = "; ".join(
        f"{name} RMSE {e['rmse']:.4g}, MAE {e['mae']:.4g}" for name, e in found["errors"].items()
    )
    held = ", ".join(
        f"{float(c):.0%}: {v:.1%} (mean width {found['width'][c]:.4g})" for c, v in found["coverage"].items()
    )
    return f"{found['name']} ({found['test_forecasts']:,} forecasts)\n  {errors}\n  intervals meant to hold {held}"


def run(path: Path | None, seed: int, epochs: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All tasks whose data are there; the report."""
    started, about, found = time.perf_counter(), common.machine(), []
    sources = {"sunspots": carry_forward(read_csv("sunspots").numbers("SUNACTIVITY"))[:, None]}
    if path is not None:
        sources["beijing"] = beijing(path)
    for task in TASKS:
        if task[1] not in sources:
            say(f"{task[0]}: left out, as its file is not given (--beijing FILE)")
            continue
        found.append(judge(task, sources[task[1]], seed, epochs))
        say(line(found[-1]))
    return {
        "what": "errors in the data's unit, and the share of what came that the intervals hold, last fifth of the rows",
        "machine": about,
        "settings": {"seed": seed, "test": TEST, "tasks": {t[0]: t[4] for t in TASKS}},
        "seconds": time.perf_counter() - started,
        "results": found,
    }


def picture(report: dict[str, Any], path: Path) -> Path:
    """Truth, forecast and intervals of every task, at the beginning of its test part."""
    figure, panels = pictures.panels(len(report["results"]), 4.6 * len(report["results"]), 4.2)
    for axes, found in zip(panels, report["results"], strict=True):
        shown = found["shown"]
        x = np.arange(len(shown["truth"]))
        for coverage, shade in (("0.9", 0.15), ("0.8", 0.25)):
            low, high = np.array(shown["bounds"][coverage]).T
            label = f"meant {float(coverage):.0%}, holds {found['coverage'][coverage]:.0%}"
            axes.fill_between(x, low, high, color=pictures.BLUE, alpha=shade, linewidth=0, label=label)
        axes.plot(x, shown["truth"], color="black", linewidth=1.2, label="truth")
        axes.plot(x, shown["forecast"], color=pictures.ORANGE, linewidth=1.2, label="forecast")
        rmse = {name: e["rmse"] for name, e in found["errors"].items()}
        trivial = min((n for n in rmse if n != "LSTM"), key=rmse.__getitem__)
        axes.set(
            title=f"{found['name']}\nRMSE {rmse['LSTM']:.3g} ({trivial}: {rmse[trivial]:.3g})",
            xlabel="row of the test part",
        )
        axes.legend(frameon=False, fontsize=7)
    return pictures.save(figure, path, report["machine"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.forecasting", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--beijing", type=Path, help="PRSA_data_2010.1.1-2014.12.31.csv[.gz], from the UCI repository"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--epochs", type=int, help="at most so many epochs, in place of each task's own number"
    )
    parser.add_argument("--out", type=Path, help="folder for forecasting.json and forecasting.png")
    options = parser.parse_args(argv)
    if options.seed < 0 or (options.epochs is not None and options.epochs < 1):
        parser.error("expected --seed of at least 0 and --epochs of at least 1")
    if options.beijing is not None and not options.beijing.is_file():
        parser.error(f"no file {options.beijing}")
    report = run(options.beijing, options.seed, options.epochs, common.speaker(options.json))
    whole = options.seed == 0 and options.epochs is None and options.beijing is not None
    common.deliver("forecasting", report, picture, whole=whole, out=options.out, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
