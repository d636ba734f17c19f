"""Pictures of what happens inside a model, and of the model itself, in the style of numlstm/data/plots.py.

Each function gives a matplotlib `Figure`; `save` writes one. Needs matplotlib (`pip install numlstm[plot]`), which is
imported only when a picture is drawn; its global state stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm.data.plots import (
    BLUE,
    GREY,
    KINDS,
    ORANGE,
    forecast_figure,
    learning_curve,
    panels,
    save,
    whole_numbers,
)
from numlstm.layers.base import Layer
from numlstm.layers.bidirectional import Bidirectional
from numlstm.layers.recurrent import Recurrent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from numlstm.inspect.tracing import Trace

__all__ = ["KINDS", "forecast_figure", "gates", "gradients", "learning_curve", "model_graph", "save"]


def gates(
    found: Trace,
    layer: str | None = None,
    *,
    names: Sequence[str] | None = None,
    row: int = 0,
    units: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Heat maps of a layer's gates and states over time, one below the other: a row a unit, a column a step.

    What lies between 0 and 1 is drawn from blue (closed) over white (half open) to orange (open), all else around zero.

    Arguments:
        found: from `trace`.
        layer: its path; the first if not given.
        names: which arrays; all gates and states if not given.
        row: of the batch.
        units: which, in which order; all if not given.
        tokens: the input as text: written below where there is room, up to 120 steps.
        title: what stands above.

    Raises:
        ValueError: no such layer, array, row or unit.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.colors import LinearSegmentedColormap

    path = next(iter(found.layers)) if layer is None else layer
    if path not in found.layers:
        raise ValueError(f"layer: expected one of {', '.join(found.layers)}, got {layer!r}")
    arrays = found.layers[path].arrays()
    states, gate_names = found.layers[path].states, found.layers[path].gates
    names = list(names) if names is not None else [*gate_names, *states]
    if unknown := [n for n in names if n not in arrays]:
        raise ValueError(f"names: expected some of {', '.join(arrays)}, got {unknown[0]!r}")
    batch, steps, _ = arrays[names[0]].shape
    if not 0 <= row < batch:
        raise ValueError(f"row: expected a number from 0 to {batch - 1}, got {row!r}")
    blue_to_orange = LinearSegmentedColormap.from_list("closed to open", [BLUE, "#ffffff", ORANGE])
    colours = blue_to_orange.with_extremes(bad="#c8c8c8")  # a masked step has no gates
    tall = 1.5 if units is None else max(1.5, 0.145 * len(units))
    figure, axes = panels(len(names), 9.0, 1.2 + tall * len(names))
    for axis, name in zip(axes, names, strict=True):
        values = arrays[name][row].T
        if units is not None:
            wrong = [u for u in units if not 0 <= u < len(values)]
            if wrong:
                raise ValueError(f"units: expected numbers from 0 to {len(values) - 1}, got {wrong[0]!r}")
            values = values[list(units)]
        known = values[np.isfinite(values)]
        open_closed = name in gate_names and known.size and known.min() >= 0 and known.max() <= 1
        largest = float(np.abs(known).max(initial=0.0)) or 1.0
        low, high = (0.0, 1.0) if open_closed else (-largest, largest)
        image = axis.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            cmap=colours,
            vmin=low,
            vmax=high,
            interpolation="nearest",
        )
        axis.grid(False)
        axis.set_ylabel(f"{name}\nunit")
        if units is None:
            whole_numbers(axis.yaxis)
        else:
            axis.set_yticks(range(len(units)), [str(u) for u in units], fontsize=7)
        figure.colorbar(image, ax=axis, pad=0.01, aspect=8)
        if axis is not axes[-1]:
            axis.set_xticklabels([])
    if tokens is not None and len(tokens) == steps <= 120:
        shown = [{"\n": "↵", " ": "·", "\t": "⇥"}.get(t, t) for t in tokens]
        axes[-1].set_xticks(range(steps), shown, fontsize=8, family="monospace")
        axes[-1].tick_params(axis="x", length=0)
        if max(map(len, tokens)) > 1:
            axes[-1].tick_params(axis="x", rotation=90)
    else:
        whole_numbers(axes[-1].xaxis)
        axes[-1].set_xlabel("time step")
    figure.suptitle(title if title is not None else f"{path}: gates and states over time")
    return figure


def gradients(found: Trace, *, title: str = "Gradient by time step") -> Figure:
    """The norm of the loss's gradient by each state of each layer, by time step, on a log scale; the mean of the rows.

    `GradientNorms.plot` draws that of the outputs alone, from `gradient_norms`.

    Raises:
        ValueError: a trace without gradients.
        ImportError: matplotlib is not installed.
    """
    if found.loss is None:
        raise ValueError("found: expected a trace with gradients: trace(model, x, y)")
    figure, (axes,) = panels(1, 7.0, 4.2)
    styles = ("-", "--", ":", "-.")
    for path, layer in found.layers.items():
        for style, name in zip(styles, layer.states, strict=False):
            norms = np.linalg.norm(layer.gradients[name].astype(np.float64), axis=-1).mean(axis=0)
            axes.plot(np.where(norms > 0, norms, np.nan), style, label=f"{path}: d{name}")
    axes.set_yscale("log")
    axes.set(title=title, xlabel="time step t", ylabel="norm of dLoss/d state(t), mean of the rows")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False)
    return figure


def model_graph(model: Layer, *, title: str | None = None) -> Figure:
    """The layers of a model as boxes with their shapes and weights, in the order in which they were made.

    Of a `Sequential` the order is that of the data, and arrows say so; a model with a `call` of its own goes its own way
    through its layers, which no picture can know, so there are none. Models inside a model are drawn as groups.

    Raises:
        ValueError: not a model, or one without layers.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.patches import FancyBboxPatch

    from numlstm.models import Model, Sequential

    if not isinstance(model, Model) or not model.layers:
        raise ValueError(f"model: expected a model with layers, got {type(model).__name__}")
    boxes = list(_boxes(model, 0))
    figure, (axes,) = panels(1, 7.0, 0.9 + 0.78 * len(boxes))
    axes.set_axis_off()
    for k, (layer, depth, from_above) in enumerate(boxes):
        y, left = -k, 0.35 * depth
        recurrent = isinstance(layer, Recurrent | Bidirectional)
        inner = isinstance(layer, Model)
        edge = BLUE if recurrent else GREY
        axes.add_patch(
            FancyBboxPatch(
                (left, y - 0.3), 7 - left, 0.6, boxstyle="round,pad=0.02,rounding_size=0.08", linewidth=1.6,
                edgecolor=edge, facecolor="none" if inner else "#eaf3f9" if recurrent else "#f6f6f6",
            )
        )  # fmt: skip
        axes.text(left + 0.15, y + 0.1, layer.name, weight="bold", va="center", fontsize=10)
        axes.text(left + 0.15, y - 0.16, _described(layer), va="center", fontsize=8.5, color="#444444")
        axes.text(6.9, y + 0.1, _shape(layer), va="center", ha="right", fontsize=9, family="monospace")
        count = f"{layer.count_params():,} weights" if layer.built else "not built"
        axes.text(6.9, y - 0.16, count, va="center", ha="right", fontsize=8.5, color="#444444")
        if from_above and isinstance(model, Sequential):
            axes.annotate(
                "", (3.5, y + 0.32), (3.5, y + 0.68), arrowprops={"arrowstyle": "-|>", "color": "#444444"}
            )
    axes.set(xlim=(-0.1, 7.1), ylim=(-len(boxes) + 0.5, 0.6))
    total = sum(v.size for v in model.weights)
    axes.set_title(title if title is not None else f"{type(model).__name__} {model.name}: {total:,} weights")
    return figure


def _boxes(model: Any, depth: int) -> Any:
    """Every layer with its depth, and whether data come to it from the box above."""
    from numlstm.models import Model

    for k, layer in enumerate(model.layers):
        yield layer, depth, k > 0
        if isinstance(layer, Model):
            yield from _boxes(layer, depth + 1)


def _described(layer: Any) -> str:
    """What a layer is, in a few words."""
    if isinstance(layer, Bidirectional):
        return f"Bidirectional({_described(layer.layer)}), merged by {layer.merge_mode}"
    kind = type(layer).__name__
    if isinstance(layer, Recurrent):
        more = f", projection {layer.projection}" if layer.projection else ""
        return f"{kind}, {layer.units} units{more}: gates {' '.join(layer.cell.gates)}"
    activation = getattr(layer, "activation", None)
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", None)
    return kind if name in (None, "linear") else f"{kind}, {name}"


def _shape(layer: Any) -> str:
    from numlstm.models import output_shape

    return output_shape(layer)
