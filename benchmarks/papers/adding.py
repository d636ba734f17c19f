"""The adding problem at 1,000 steps (Hochreiter & Schmidhuber 1997, section 5.4): LSTM against Elman's network.

A sequence of 1,000 to 1,100 pairs: a number from [-1, 1] and a marker. The marker is -1 at the first and the
last pair, 1 at two others, the first of them among the first ten and the second among the first 499 (half of 1,000,
less one), else 0. At the end the net must give 0.5 + (X1 + X2) / 4 for the two marked numbers; a first pair that is
marked counts as 0. A sequence is solved when the error at its end is below 0.04; the test is 2,560 new sequences, of
which 99 % must be solved (the paper reports 1 wrong of 2,560 after 853,000 training sequences).

That is the paper's task and criterion. Unlike the paper: one layer of more units, gradients through the whole
sequence in place of the truncated ones, batches, Adam with the gradient's norm held at 1, and biases that start
where Tallec & Ollivier 2018 ("chrono" initialisation, equation 16) put them: forget gates at log u with u uniform
between 1 and the longest delay, input gates at minus that. There is no curriculum. Elman's network gets the same
data, units, optimizer and number of training sequences. Sequences of training are drawn anew for each batch; whether
to stop is decided on 512 others, on neither training nor test sequences.
"""

from __future__ import annotations

import argparse
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

SOLVED = 0.04  # absolute error at the sequence's end
SHARE = 0.99  # of the test sequences
PAPER = {"test_wrong": 1, "test_sequences": 2560, "training_sequences": 853_000}


@dataclass(frozen=True)
class Recipe:
    """How both cells are trained. `length` is the shortest sequence; the longest has a tenth more."""

    length: int = 1000
    units: int = 64
    batch: int = 32
    steps: int = 3000
    rate: float = 1e-2
    seed: int = 0
    every: int = 100
    validation: int = 512
    test: int = 2560


def sequences(draw: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x (rows, time, 2), lengths (rows,), targets (rows, 1)); steps after a row's length are zeros.

    >>> x, lengths, y = sequences(np.random.default_rng(0), 100, 20)
    >>> x.shape, int(lengths.min()), int(lengths.max()), y.shape
    ((100, 22, 2), 20, 22, (100, 1))
    """
    lengths = draw.integers(length, length + length // 10 + 1, rows)
    x = np.zeros((rows, lengths.max(), 2), np.float32)
    row = np.arange(rows)
    x[..., 0] = draw.uniform(-1, 1, x.shape[:2])
    first = draw.integers(0, 10, rows)
    second = draw.integers(0, length // 2 - 2, rows)  # one place less: that of the first is taken
    second += second >= first
    x[row, 0, 1] = x[row, lengths - 1, 1] = -1
    x[row, first, 1] = x[row, second, 1] = 1
    x[np.arange(x.shape[1]) >= lengths[:, None]] = 0
    values = x[..., 0].copy()
    values[:, 0] = 0  # the first pair counts as 0 if it is marked
    y = 0.5 + (values[row, first] + values[row, second]) / 4
    return x, lengths, y[:, None].astype(np.float32)


def build(cell: str, recipe: Recipe) -> nl.Sequential:
    """The layer and a linear output, compiled; the LSTM's biases start at memories of every length up to the
    sequence's."""
    nl.set_seed(recipe.seed)
    kind = {"lstm": nl.LSTM, "elman": nl.SimpleRNN}[cell]
    layer = kind(recipe.units, input_shape=(None, 2))
    model = nl.Sequential([layer, nl.Dense(1)])
    if cell == "lstm":
        H = recipe.units
        draw = np.random.default_rng(recipe.seed)
        forget = np.log(draw.uniform(1, recipe.length - 1, H))
        bias = layer.bias.numpy().copy()
        bias[:H], bias[H : 2 * H] = -forget, forget  # gates i f g o
        layer.bias.assign(bias)
    # the rate goes down late: large steps find the way, small ones the last digit
    rate = nl.schedules.CosineDecay(recipe.rate, recipe.steps, alpha=0.01)
    model.compile(optimizer=nl.optimizers.Adam(rate, global_clipnorm=1.0), loss="mse")
    return model


def errors(model: nl.Sequential, x: np.ndarray, lengths: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The absolute error at each sequence's end."""
    return np.abs(model.predict(x, lengths=lengths, batch_size=256, verbose=0) - y)[:, 0]


def train(cell: str, recipe: Recipe, display: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Train until the held-out sequences are solved twice in a row, or the steps are used up; then test."""
    model = build(cell, recipe)
    draw, apart = np.random.default_rng((recipe.seed, 1)), np.random.default_rng((recipe.seed, 2))
    held_out = sequences(apart, recipe.validation, recipe.length)
    test = sequences(apart, recipe.test, recipe.length)
    started, curve, recent, good = time.perf_counter(), [], [], 0
    display.begin(cell, recipe.steps)
    for step in range(1, recipe.steps + 1):
        x, lengths, y = sequences(draw, recipe.batch, recipe.length)
        recent.append(float(model.train_on_batch(x, y, lengths=lengths)))
        if step % recipe.every == 0:
            error = errors(model, *held_out)
            point = {
                "sequences": step * recipe.batch,
                "training_mse": float(np.mean(recent)),
                "mse": float(np.mean(error**2)),
                "solved": float(np.mean(error < SOLVED)),
                "seconds": time.perf_counter() - started,
            }
            curve.append(point)
            recent = []
            good = good + 1 if point["solved"] >= 0.998 else 0
            say(
                f"{cell}: {point['sequences']:>7,} sequences, {point['seconds']:>4.0f} s: held-out MSE "
                f"{point['mse']:.5f}, solved {point['solved']:.1%}"
            )
            if good == 2:
                break
        display.step(step, lambda: curve[-1] if curve else {})
    error = errors(model, *test)
    display.end({})
    return {
        "cell": cell,
        "weights": model.count_params(),
        "training_sequences": step * recipe.batch,
        "steps": step,
        "seconds": time.perf_counter() - started,
        "test_mse": float(np.mean(error**2)),
        "test_solved": int(np.sum(error < SOLVED)),
        "test_share": float(np.mean(error < SOLVED)),
        "meets_criterion": bool(np.mean(error < SOLVED) >= SHARE),
        "test_largest_error": float(error.max()),
        "curve": curve,
    }


def run(recipe: Recipe, cells: tuple[str, ...], display: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and test each cell; the report."""
    about, found = common.machine(), []
    for cell in cells:
        result = train(cell, recipe, display, say)
        say(
            f"{cell}: {result['test_solved']:,} of {recipe.test:,} test sequences solved ({result['test_share']:.2%}), "
            f"MSE {result['test_mse']:.5f}, after {result['training_sequences']:,} training sequences in "
            f"{result['seconds']:.0f} s: {'meets' if result['meets_criterion'] else 'does not meet'} the criterion"
        )
        found.append(result)
    return {
        "what": f"the adding problem of 1997 at {recipe.length} steps: error below {SOLVED} for {SHARE:.0%} of the test",
        "machine": about,
        "recipe": recipe,
        "paper": PAPER,
        "variance_of_targets": 1 / 24,  # the error of a net that always says 0.5
        "results": found,
    }


def picture(report: dict[str, Any], path: Path) -> Path:
    """Held-out error and share of solved sequences by training sequences, both cells."""
    figure, (left, right) = pictures.panels(2, 10.0, 4.4)
    colours = {"lstm": pictures.BLUE, "elman": pictures.ORANGE}
    names = {"lstm": "LSTM", "elman": "Elman"}
    for result in report["results"]:
        seen = [p["sequences"] for p in result["curve"]]
        style = {"color": colours[result["cell"]], "label": names[result["cell"]]}
        left.plot(seen, [p["mse"] for p in result["curve"]], **style)
        right.plot(seen, [100 * p["solved"] for p in result["curve"]], **style)
        right.annotate(
            f"test: {result['test_share']:.1%}",
            (seen[-1], 100 * result["curve"][-1]["solved"]),
            xytext=(0, -14 if result["meets_criterion"] else 8),
            textcoords="offset points",
            ha="right",
            color=colours[result["cell"]],
        )
    variance = report["variance_of_targets"]
    left.axhline(variance, color=pictures.GREY, linestyle="--", linewidth=1)
    left.annotate("always 0.5", (0.99, variance), xycoords=("axes fraction", "data"), ha="right", va="top",
                  color=pictures.GREY, fontsize=8)  # fmt: skip
    left.set(yscale="log", xlabel="training sequences", ylabel="mean squared error, held-out sequences")
    right.axhline(100 * SHARE, color=pictures.GREY, linestyle="--", linewidth=1)
    right.set(
        ylim=(-3, 103), xlabel="training sequences", ylabel=f"% with error below {SOLVED}, held-out sequences"
    )
    left.legend(frameon=False, loc="lower left")
    recipe = report["recipe"]
    length, units = (
        recipe[k] if isinstance(recipe, dict) else getattr(recipe, k) for k in ("length", "units")
    )
    figure.suptitle(f"Adding problem (1997), {length:,} to {length + length // 10:,} steps, {units} units")
    return pictures.save(figure, path, report["machine"])


def main(argv: list[str] | None = None) -> int:
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.adding", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    for name in ("length", "units", "batch", "steps", "seed", "validation", "test", "every"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--rate", type=float, default=default.rate, help="Adam's first learning rate")
    parser.add_argument("--cells", choices=["both", "lstm", "elman"], default="both")
    parser.add_argument("--out", type=Path, help="folder for adding.json and adding.png")
    options = parser.parse_args(argv)
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    if (
        min(recipe.length, recipe.validation, recipe.test) < 20
        or min(recipe.units, recipe.batch, recipe.every) < 1
    ):
        parser.error(
            "expected at least 20 steps and sequences, and at least 1 unit, row and step between tests"
        )
    if recipe.steps < recipe.every:
        parser.error(f"--steps: expected at least --every, {recipe.every}, got {recipe.steps}")
    say = common.speaker(options.json)
    display = progress(0 if options.json else "auto", quiet_off_terminal=True)
    cells = ("lstm", "elman") if options.cells == "both" else (options.cells,)
    try:
        report = run(recipe, cells, display, say)
    finally:
        display.close()
    whole = recipe == default and options.cells == "both"
    common.deliver("adding", report, picture, whole=whole, out=options.out, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
