"""The picture of benchmarks.gpu: one panel a precision and mode, a dot for each shape, cell and number of directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"lstm": "#0072B2", "gru": "#D55E00"}  # Okabe and Ito's, told apart by the colour-blind

TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)


def picture(report: dict[str, Any], path: Path) -> Path:
    """Draw the table's ratios to cuDNN on a logarithmic axis, with 1 and the goals as lines; write `path`."""
    from matplotlib.figure import Figure

    rows = [r for r in report.get("table", {}).get("rows", []) if r.get("ratio") is not None]
    panels = sorted({(r["precision"], r["mode"]) for r in rows}) or [("", "nothing measured")]
    labels = list(dict.fromkeys(r["place"] for r in rows))
    ratios = [r["ratio"] for r in rows]
    figure = Figure(figsize=(4.2 * len(panels), 1.6 + 0.32 * max(len(labels), 4)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (precision, mode) in zip(all_axes, panels, strict=True):
        axes.set_title(f"{mode}, {precision}", fontsize=10)
        axes.axvline(1, color="black", linewidth=0.8)
        for r in rows:
            if (r["precision"], r["mode"]) != (precision, mode):
                continue
            y = labels.index(r["place"])
            axes.plot([r["goal"]] * 2, [y - 0.35, y + 0.35], color="#999999", linewidth=1)
            axes.plot(
                r["ratio"],
                y,
                marker="o" if r["directions"] == 1 else "s",
                color=COLOURS[r["cell"]],
                fillstyle="full" if r.get("tier", "").startswith("persistent") else "none",
                linestyle="none",
            )
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
        axes.minorticks_off()
        axes.set_xlim(min([0.5, *ratios]) / 1.15, max([1.2, *ratios]) * 1.15)
        axes.set_xlabel("our time / cuDNN's")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    all_axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    all_axes[0].invert_yaxis()
    device = report.get("machine", {}).get("device", "?")
    figure.suptitle(
        f"numlstm against cuDNN on {device}: left of 1 is faster; grey: goal; filled: persistent kernel; "
        "blue LSTM, orange GRU; square: both directions",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
