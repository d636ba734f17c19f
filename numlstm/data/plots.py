"""Pictures of a training run: the learning curve, and a forecast beside what came true.

Needs matplotlib (`pip install numlstm[plot]`), which is imported only here and only when a picture is drawn.
Nothing touches matplotlib's global state, so that a notebook's own figures stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from numlstm.io.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "KINDS",
    "anomaly_figure",
    "available",
    "forecast_figure",
    "learning_curve",
    "panels",
    "save",
    "whole_numbers",
]

# Okabe and Ito's palette: told apart by people with every kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"

KINDS = (".png", ".svg", ".pdf")
"""What `save` writes."""


def available() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def learning_curve(
    history: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Loss by epoch, training and validation; `reference` is a named level to beat.

    Raises:
        ValueError: a history without "loss", or of unequal lengths.
        ImportError: matplotlib is not installed.
    """
    if not history.get("loss"):
        raise ValueError(f"history must hold 'loss', got {sorted(history)}")
    figure, axes = panels(1, 7.0, 4.2)
    axes = axes[0]
    epochs = np.arange(1, len(history["loss"]) + 1)
    marker = "o" if len(epochs) <= 30 else ""
    for key, label, colour in (("loss", "training", GREY), ("val_loss", "validation", BLUE)):
        if history.get(key):
            if len(history[key]) != len(epochs):
                raise ValueError(f"history has {len(epochs)} values of loss but {len(history[key])} of {key}")
            axes.plot(epochs, history[key], color=colour, marker=marker, markersize=4, label=label)
    if reference is not None:
        axes.axhline(
            reference[1],
            color=ORANGE,
            linestyle="--",
            linewidth=1,
            label=f"{reference[0]}: {reference[1]:.4g}",
        )
    best = history.get("val_loss") or history["loss"]
    at = int(np.argmin(best))
    axes.annotate(
        f"{best[at]:.4g}", (epochs[at], best[at]), xytext=(0, -14), textcoords="offset points", ha="center"
    )
    axes.margins(y=0.12)
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False)
    return figure


def anomaly_figure(
    times: np.ndarray,
    values: np.ndarray,
    surprise: np.ndarray,
    abnormal: np.ndarray,
    *,
    names: Sequence[str],
    time_name: str,
    most: int = 4,
) -> Figure:
    """The first `most` columns of `values` (N, F) with the rows `abnormal` (M,) marked, and the surprise (N,) below.

    Raises:
        ValueError: arrays that do not fit together.
        ImportError: matplotlib is not installed.
    """
    if values.ndim != 2 or not len(times) == len(values) == len(surprise) or len(names) != values.shape[1]:
        raise ValueError(
            f"times, values (N, F), surprise (N,) and F names must fit; got {len(times)}, {values.shape}, "
            f"{surprise.shape}, {len(names)} names"
        )
    shown = min(most, values.shape[1])
    figure, axes = panels(shown + 1, 9.0, 2.0 * (shown + 1))
    for axis, name, column in zip(axes, names, values.T, strict=False):
        axis.plot(times, column, color="black", linewidth=0.8)
        axis.plot(times[abnormal], column[abnormal], "o", color=ORANGE, markersize=4, label="abnormal")
        axis.set(ylabel=name)
    axes[0].legend(frameon=False)
    axes[shown].plot(times, surprise, color=BLUE, linewidth=0.8)
    axes[shown].set(ylabel="surprise", xlabel=time_name)
    return figure


def forecast_figure(
    truth: np.ndarray,
    forecast: np.ndarray,
    trivial: np.ndarray,
    times: np.ndarray,
    *,
    target: str,
    trivial_name: str,
    time_name: str,
    shown: int = 400,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    interval_name: str = "interval",
) -> Figure:
    """What came true against what was forecast, and, beyond one step, the error by how far ahead.

    All of `truth`, `forecast` and `trivial` are (M, horizon); `times` (M,) is when the last step of each row
    came true. Only the last `shown` rows are drawn; the errors are over all of them. `interval`, the lower and the
    upper bounds of the forecast, both (M, horizon), is a band behind it, called `interval_name`.

    Raises:
        ValueError: arrays that do not fit together.
        ImportError: matplotlib is not installed.
    """
    if not truth.shape == forecast.shape == trivial.shape or len(times) != len(truth) or truth.size == 0:
        raise ValueError(
            f"truth, forecast and trivial must have one shape (M, horizon) and times M entries; "
            f"got {truth.shape}, {forecast.shape}, {trivial.shape}, {len(times)}"
        )
    if interval is not None and any(np.shape(bound) != truth.shape for bound in interval):
        raise ValueError(
            f"interval must hold two bounds of shape {truth.shape}, got {[np.shape(bound) for bound in interval]}"
        )
    horizon = truth.shape[1]
    figure, axes = panels(1 if horizon == 1 else 2, 9.0, 4.2 if horizon == 1 else 7.0)
    top = axes[0]
    drawn, gaps = times[-shown:], _gaps(times[-shown:])
    x = np.insert(drawn, gaps, drawn[gaps - 1])
    if interval is not None:
        low, high = (np.insert(np.asarray(b)[-shown:, -1], gaps, np.nan) for b in interval)
        top.fill_between(x, low, high, color=BLUE, alpha=0.22, linewidth=0, label=interval_name)
    steps = "one step" if horizon == 1 else f"{horizon} steps"
    top.plot(
        x,
        np.insert(trivial[-shown:, -1], gaps, np.nan),
        color=ORANGE,
        linewidth=1,
        alpha=0.7,
        label=trivial_name,
    )
    top.plot(x, np.insert(truth[-shown:, -1], gaps, np.nan), color="black", linewidth=1.4, label="truth")
    top.plot(
        x, np.insert(forecast[-shown:, -1], gaps, np.nan), color=BLUE, linewidth=1.4, label="LSTM forecast"
    )
    of = "" if len(truth) <= shown else f" (last {shown:,} of {len(truth):,} test forecasts)"
    top.set(title=f"{target}, forecast {steps} ahead{of}", xlabel=time_name, ylabel=target)
    top.legend(frameon=False, ncols=3 if interval is None else 4, loc="upper left")
    top.margins(x=0.01)
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.12 * (high - low))  # room for the legend
    if times.dtype.kind == "M":
        _short_dates(top)
    if horizon > 1:
        _error_by_step(axes[1], truth, forecast, trivial, target, trivial_name)
    return figure


def _error_by_step(
    axes: Axes, truth: np.ndarray, forecast: np.ndarray, trivial: np.ndarray, target: str, trivial_name: str
) -> None:
    steps = np.arange(1, truth.shape[1] + 1)
    for values, label, colour in ((trivial, trivial_name, ORANGE), (forecast, "LSTM", BLUE)):
        rmse = np.sqrt(np.mean((values - truth) ** 2, axis=0))
        axes.plot(steps, rmse, color=colour, marker="o", markersize=4, label=label)
    axes.set(
        title="Error by how far ahead, whole test part", xlabel="steps ahead", ylabel=f"RMSE of {target}"
    )
    axes.set_ylim(bottom=0)
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False)


def _gaps(times: np.ndarray) -> np.ndarray:
    """Where rows are left out (their truth is missing): there the lines are broken, not drawn through."""
    steps = np.diff(times)
    return np.flatnonzero(steps > 1.5 * np.median(steps)) + 1 if len(steps) else np.array([], dtype=np.int64)


def _short_dates(axes: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def panels(rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with `rows` panels below each other, in this library's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def whole_numbers(axis: Axis) -> None:
    """Ticks of an axis at whole numbers only: epochs, steps, units."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a .png, .svg or .pdf file, whole or not at all.

    Raises:
        ValueError: another kind of file.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ValueError(f"path must end in .png, .svg or .pdf, got {path.name!r}")
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)
    return path
