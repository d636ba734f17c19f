"""The vanishing and the exploding gradient, measured: dLoss/dh(t) by time step, over 200 steps.

Four untrained networks of 64 units read 200 steps of noise, and the loss depends on the last output alone. What
reaches step t went through the product of all later steps' Jacobians (Hochreiter 1991; Bengio, Simard & Frasconi
1994). Elman's network, with orthogonal recurrent weights times a gain: with 0.8 the product vanishes; with 2.5 it
explodes, tanh's slopes notwithstanding. LSTM with a forget gate that starts at sigmoid(1), as this library's does, and
with one that starts at sigmoid(6), whose gradient through the cell is nearly kept. Computed by `numlstm.inspect`, in
double precision, as float32 ends at 1e-45. The norm at each step is given relative to that at the last.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import numlstm as nl
from benchmarks import common
from benchmarks.papers import pictures
from numlstm.inspect import gradient_norms

# name, layer, its gain (Elman) or forget bias (LSTM)
NETWORKS = (
    ("Elman, recurrent gain 0.8", "elman", 0.8),
    ("Elman, recurrent gain 2.5", "elman", 2.5),
    ("LSTM, forget bias 1", "lstm", 1.0),
    ("LSTM, forget bias 6", "lstm", 6.0),
)


def build(kind: str, value: float, units: int, features: int) -> nl.Sequential:
    """The network, compiled in double precision."""
    nl.set_seed(0)
    if kind == "elman":
        orthogonal = nl.initializers.Orthogonal(gain=value)
        layer = nl.SimpleRNN(
            units, recurrent_initializer=orthogonal, name="layer", input_shape=(None, features)
        )
    else:
        layer = nl.LSTM(units, name="layer", input_shape=(None, features))
        bias = layer_bias(units, value)
    model = nl.Sequential([layer, nl.Dense(1)])
    if kind == "lstm":
        layer.bias.assign(bias)
    model.compile("sgd", "mse", precision="float64")
    return model


def layer_bias(units: int, forget: float) -> np.ndarray:
    """Zeros but for the forget gate, the second of i f g o."""
    return np.repeat([0.0, forget, 0.0, 0.0], units)


def run(steps: int, units: int, batch: int, features: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The norms of every network; the report."""
    started, about, found = time.perf_counter(), common.machine(), []
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((batch, steps, features)), draw.standard_normal((batch, 1))
    for name, kind, value in NETWORKS:
        norms = gradient_norms(build(kind, value, units, features), x, y).norms["layer"]
        relative = norms / norms[-1]
        # the factor a step, over the half of the sequence that is far from the end
        factor = float((relative[0] / relative[steps // 2]) ** (1 / (steps // 2)))
        say(f"{name:26} first step / last: {relative[0]:.1e}, a factor of {factor:.3f} for each step back")
        found.append(
            {"name": name, "cell": kind, "value": value, "factor_per_step": factor, "last": norms[-1],
             "relative": relative.tolist()}
        )  # fmt: skip
    return {
        "what": f"norm of dLoss/dh(t) relative to the last step's, {steps} steps, untrained, loss from the last output",
        "machine": about,
        "settings": {"steps": steps, "units": units, "batch": batch, "features": features},
        "seconds": time.perf_counter() - started,
        "networks": found,
    }


def picture(report: dict[str, Any], path: Path) -> Path:
    """All networks' norms by time step, on a log scale, each line labelled where it begins."""
    figure, (axes,) = pictures.panels(1, 8.6, 5.2)
    colours = (pictures.ORANGE, pictures.PURPLE, pictures.GREEN, pictures.BLUE)
    steps = report["settings"]["steps"]
    for network, colour in zip(report["networks"], colours, strict=True):
        relative = np.array(network["relative"])
        axes.plot(np.arange(1, steps + 1), relative, color=colour, linewidth=1.8)
        # each label on the side of its line that stays free: above one that explodes, below one that vanishes
        above = relative[0] > 1e3
        at = int(steps * (0.2 if above or relative[0] > 1e-25 else 0.5))
        first = f"{relative[0]:.1f}" if 0.1 < relative[0] < 10 else f"{relative[0]:.0e}"
        axes.annotate(
            f"{network['name']}\nfirst step: {first}",
            (at + 1, relative[at]),
            xytext=(10, 4 if above else -6),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="bottom" if above else "top",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        yscale="log",
        xlim=(1, steps),
        xlabel="time step t (the loss comes after the last)",
        ylabel="‖dLoss/dh(t)‖ relative to the last step's",
        title=f"How much of the gradient reaches a step: {steps} steps, {report['settings']['units']} units, untrained",
    )
    return pictures.save(figure, path, report["machine"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.gradient_by_step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    settings = {"steps": 200, "units": 64, "batch": 16, "features": 8}
    for name, value in settings.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="folder for gradient-by-step.json and gradient-by-step.png")
    options = parser.parse_args(argv)
    chosen = {name: getattr(options, name) for name in settings}
    if min(chosen.values()) < 1 or options.steps < 4:
        parser.error("expected sizes of at least 1 and at least 4 --steps")
    say = common.speaker(options.json)
    report = run(**chosen, say=say)
    whole = chosen == settings
    common.deliver("gradient-by-step", report, picture, whole=whole, out=options.out, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
