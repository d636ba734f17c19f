"""Measuring spike delays (Gers & Schmidhuber 2000; Gers, Schraudolph & Schmidhuber 2002, JMLR 3:115-143, "MSD"):
LSTM with peepholes against LSTM without.

The input is a stream of spikes, 1 at a spike and 0 else. Spike n comes F + I(n) steps after the one before it (the
first so long after the start), I(n) is 0 or 1 with equal chance, and at each spike the net must say which. An answer
is right when its error is below 0.49. A run is a success when the net gets through 1,000 spikes of a new stream
without a wrong answer. As in the paper: one memory block of one cell that squashes neither its input nor its output,
a sigmoid output unit, F = 10 among the delays, ten runs. (The task and its set-up as told by the paper's abstract and
by published notes on its text.) F = 20 is asked of four cells.

What differs, for both sides alike: Adam on batches of streams of ten spikes, with gradients through whole streams and
through the peepholes, in place of stochastic descent (rate 1e-5, momentum 0.9999) on streams of up to 100 spikes that
end at the first wrong answer, with truncated gradients that stop at the peepholes; weights and biases start as this
library's do (Glorot, orthogonal, forget gates at 1, peepholes at 0), not between -0.1 and 0.1 with gate biases of 0,
-2 and 2, from where neither side left the level of guessing within 10,000 steps; a run is given 4,000 steps of 32
streams in place of up to 1e8 streams; the loss is the mean squared error over the spikes. Nothing was chosen for one
side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import numlstm as nl
from benchmarks import common
from benchmarks.papers import pictures
from numlstm.progress import progress

RIGHT = 0.49  # absolute error below which an answer counts
TASKS = [(10, 1), (20, 4)]  # the paper's F, and how many cells
SIDES = {"plain": False, "peephole": True}


@dataclass(frozen=True)
class Recipe:
    """How both sides are trained. A `spikes`-spike stream has about `spikes * (delay + 0.5)` steps."""

    spikes: int = 10
    batch: int = 32
    steps: int = 4000
    rate: float = 1e-2
    every: int = 100
    test_spikes: int = 1000
    runs: int = 10


def streams(
    draw: np.random.Generator, rows: int, spikes: int, delay: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x (rows, time, 1), targets (rows, time, 1), weights (rows, time): 1 at spikes). `delay` is the paper's F.

    >>> x, y, at = streams(np.random.default_rng(0), 2, 3, 10)
    >>> x.sum(axis=1).ravel().tolist(), bool((at == x[..., 0]).all()), float(y.max())
    ([3.0, 3.0], True, 1.0)
    """
    extra = draw.integers(0, 2, (rows, spikes))
    times = np.cumsum(
        delay + extra, axis=1
    )  # the first step is number 1, so that index 0 is its place less one
    x = np.zeros((rows, times.max(), 1), np.float32)
    y = np.zeros_like(x)
    row = np.arange(rows)[:, None]
    x[row, times - 1, 0], y[row, times - 1, 0] = 1, extra
    return x, y, x[..., 0].copy()


def build(peephole: bool, cells: int, seed: int, rate: float) -> nl.Sequential:
    """The memory cells, which squash nothing, and a sigmoid output, compiled."""
    nl.set_seed(seed)
    layer = nl.LSTM(cells, "linear", peephole=peephole, return_sequences=True, input_shape=(None, 1))
    model = nl.Sequential([layer, nl.Dense(1, activation="sigmoid")])
    model.compile(optimizer=nl.optimizers.Adam(rate, global_clipnorm=1.0), loss="mse")
    return model


def answers(model: nl.Sequential, x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The absolute errors at the spikes, (rows, spikes). A cell that squashes nothing may grow without bound over a
    stream longer than those of training: its answers are then as wrong as can be, NaN included."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.nan_to_num(model.predict(x, batch_size=len(x), verbose=0), nan=np.inf)
    return np.minimum(np.abs(out - y), 1)[at == 1].reshape(len(x), -1)


def one_run(side: str, delay: int, cells: int, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train until a whole test stream is answered, or the steps are used up."""
    model = build(SIDES[side], cells, seed, recipe.rate)
    draw, apart = np.random.default_rng((seed, delay, 1)), np.random.default_rng((seed, delay, 2))
    started, curve, solved = time.perf_counter(), [], None
    for step in range(1, recipe.steps + 1):
        x, y, at = streams(draw, recipe.batch, recipe.spikes, delay)
        model.train_on_batch(x, y, sample_weight=at * np.float32(at.size / at.sum()))
        if step % recipe.every == 0:
            # a new stream each time, as the paper tests after each training stream
            error = answers(model, *streams(apart, 1, recipe.test_spikes, delay))[0]
            wrong = np.flatnonzero(error >= RIGHT)
            curve.append(
                {"step": step, "wrong": float(np.mean(error >= RIGHT)), "mse": float(np.mean(error**2))}
            )
            if not len(wrong):
                solved = step
                break
    return {
        "side": side,
        "delay": delay,
        "cells": cells,
        "seed": seed,
        "solved": solved is not None,
        "training_streams": (solved or recipe.steps) * recipe.batch,
        "steps": solved or recipe.steps,
        "right_in_a_row": int(wrong[0]) if len(wrong) else recipe.test_spikes,
        "wrong_share": curve[-1]["wrong"],
        "mse": curve[-1]["mse"],
        "largest_error": float(error.max()),
        "seconds": time.perf_counter() - started,
        "curve": curve,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each delay and side: successes, and what the runs needed and reached."""
    found = []
    for key in dict.fromkeys((r["delay"], r["cells"], r["side"]) for r in rows):
        group = [r for r in rows if (r["delay"], r["cells"], r["side"]) == key]
        done = [r["training_streams"] for r in group if r["solved"]]
        found.append(
            {
                **dict(zip(("delay", "cells", "side"), key, strict=True)),
                "runs": len(group),
                "solved": len(done),
                "median_training_streams": statistics.median(done) if done else None,
                "median_mse": statistics.median(r["mse"] for r in group),
                "median_wrong_share": statistics.median(r["wrong_share"] for r in group),
                "seconds": sum(r["seconds"] for r in group),
            }
        )
    return found


def named(delay: int, cells: int) -> str:
    """What a task is called."""
    return f"F {delay}, {cells} cell{'s' * (cells > 1)}"


def summary_line(s: dict[str, Any]) -> str:
    needed = f", after {s['median_training_streams']:,.0f} streams (their median)" if s["solved"] else ""
    return (
        f"{named(s['delay'], s['cells'])}, {s['side']}: {s['solved']} of {s['runs']} runs solved{needed}; "
        f"median of all runs: MSE {s['median_mse']:.4f}, wrong {s['median_wrong_share']:.1%} ({s['seconds']:.0f} s)"
    )


def run(
    recipe: Recipe, tasks: list[tuple[int, int]], display: Any, say: Callable[[str], None]
) -> dict[str, Any]:
    """All runs, both sides in turn; the report."""
    about, rows = common.machine(), []
    turns = [(*task, seed, side) for task in tasks for seed in range(recipe.runs) for side in SIDES]
    display.begin("spike delays", len(turns))
    for done, (delay, cells, seed, side) in enumerate(turns, 1):
        r = one_run(side, delay, cells, seed, recipe)
        rows.append(r)
        outcome = "solved" if r["solved"] else f"not solved, {r['wrong_share']:.1%} wrong"
        name = f"{named(delay, cells)}, seed {seed}, {side}"
        say(f"{name}: {outcome} after {r['steps']:,} steps, MSE {r['mse']:.4f} ({r['seconds']:.0f} s)")
        display.step(done, dict)
    display.end({})
    found = summary(rows)
    say("\n".join(summary_line(s) for s in found))
    return {
        "what": f"measuring spike delays, I in {{0, 1}}: errors below {RIGHT} at {recipe.test_spikes:,} spikes in a row",
        "machine": about,
        "recipe": recipe,
        "summary": found,
        "runs": rows,
    }


def picture(report: dict[str, Any], path: Path) -> Path:
    """One panel a task: the test error by training step, a line a run."""
    tasks = list(dict.fromkeys((s["delay"], s["cells"]) for s in report["summary"]))
    figure, axes = pictures.panels(len(tasks), 4.6 * len(tasks) + 0.8, 4.4)
    colours = {"plain": pictures.ORANGE, "peephole": pictures.BLUE}
    for panel, (delay, cells) in zip(axes, tasks, strict=True):
        for side, colour in colours.items():
            key = (delay, cells, side)
            (s,) = (s for s in report["summary"] if (s["delay"], s["cells"], s["side"]) == key)
            label = f"{side}: {s['solved']} of {s['runs']} solved"
            for r in (r for r in report["runs"] if (r["delay"], r["cells"], r["side"]) == key):
                steps = [p["step"] for p in r["curve"]]
                error = [p["mse"] for p in r["curve"]]
                panel.plot(steps, error, color=colour, alpha=0.55, linewidth=1.2, label=label)
                if r["solved"]:
                    panel.plot(steps[-1], error[-1], "o", color=colour, markersize=6, zorder=3)
                label = None
        panel.set(title=named(delay, cells), xlabel="training step", xlim=(0, None))
        panel.annotate("guessing", (0.99, 0.252), xycoords=("axes fraction", "data"), ha="right", fontsize=8,
                       color=pictures.GREY)  # fmt: skip
        panel.set(ylim=(0, 0.34))  # guessing gives 0.25; the little above leaves room for the legend
        panel.legend(frameon=True, framealpha=0.95, edgecolor="none", loc="upper right", fontsize=9)
    axes[0].set_ylabel("mean squared error at the spikes of a test stream")
    figure.suptitle(
        "Measuring spike delays: LSTM with and without peepholes (a dot: 1,000 spikes without an error)"
    )
    return pictures.save(figure, path, report["machine"])


def task_list(text: str) -> list[tuple[int, int]]:
    """ "10,1;20,4" as (delay, cells).

    >>> task_list("10,1; 20,4")
    [(10, 1), (20, 4)]
    """
    try:
        tasks = [tuple(int(v) for v in part.split(",")) for part in text.split(";") if part.strip()]
    except ValueError:
        tasks = []
    if not tasks or any(len(task) != 2 or task[0] < 2 or task[1] < 1 for task in tasks):
        raise argparse.ArgumentTypeError(
            f"expected F,cells[;F,cells...], F at least 2, cells at least 1, got {text!r}"
        )
    return tasks


def main(argv: list[str] | None = None) -> int:
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.spike_delays", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument(
        "--tasks", type=task_list, default=TASKS, help="F,cells;F,cells... in place of the set ones"
    )
    for name in ("spikes", "batch", "steps", "every", "test_spikes", "runs"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--rate", type=float, default=default.rate, help="Adam's learning rate")
    parser.add_argument("--out", type=Path, help="folder for spike-delays.json and spike-delays.png")
    options = parser.parse_args(argv)
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    sizes = [getattr(recipe, name) for name in Recipe.__dataclass_fields__]
    if min(sizes) <= 0 or recipe.steps < recipe.every:
        parser.error("expected sizes above 0, and at least as many --steps as --every")
    say = common.speaker(options.json)
    display = progress(0 if options.json else "auto", quiet_off_terminal=True)
    try:
        report = run(recipe, options.tasks, display, say)
    finally:
        display.close()
    whole = recipe == default and options.tasks == TASKS
    common.deliver("spike-delays", report, picture, whole=whole, out=options.out, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
