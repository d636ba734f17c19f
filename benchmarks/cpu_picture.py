"""The picture of `python -m benchmarks.cpu`: every row as a dot, our time over the best peer's, section by section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.papers import pictures

TITLES = {
    "float32": "float32, over the best of all peers",
    "avx2": "AVX2 on both sides, over PyTorch",
    "bf16": "bfloat16, over PyTorch's bfloat16",
    "int8": "int8 weights, over PyTorch's int8",
    "memory": "peak memory, over PyTorch's",
}
COLOURS = {"lstm": pictures.BLUE, "gru": pictures.ORANGE, "rnn": pictures.GREEN}
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn": "simple RNN"}
MARKS = {1: "o", 2: "s"}
TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]


def picture(report: dict[str, Any], path: Path) -> Path:
    """Two panels a row of the figure. A dot is a row of the table: colour the cell, shape the thread count, hollow if
    other processes disturbed it. Lines are the geometric means and their goals."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = _panels(report)
    heights = [max(len(_labels(g)) for g in groups[k : k + 2]) for k in range(0, len(groups), 2)]
    figure = Figure(figsize=(11, sum(0.25 * h + 0.9 for h in heights) + 1.3), layout="constrained")
    grid = figure.add_gridspec(1 + len(heights), 2, height_ratios=[1.0, *(h + 2.5 for h in heights)])
    for number, group in enumerate(groups):
        _panel(figure.add_subplot(grid[1 + number // 2, number % 2]), group, report["summary"])
    dot = {"color": "black", "linestyle": "", "fillstyle": "none"}
    handles = [
        *(
            Line2D([], [], color=colour, marker="o", linestyle="", label=NAMES[c])
            for c, colour in COLOURS.items()
        ),
        *(Line2D([], [], marker=m, label=f"{n} thread{'s' * (n > 1)}", **dot) for n, m in MARKS.items()),
        Line2D([], [], color="black", linewidth=1.2, linestyle=":", label="geometric mean, LSTM and GRU"),
        Line2D([], [], color=pictures.PURPLE, linewidth=1.2, linestyle="--", label="its goal"),
    ]
    head = figure.add_subplot(grid[0, :])
    head.axis("off")
    head.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=8)
    figure.suptitle(
        "Our time (or memory) over the peer's: left of 1 is faster (smaller); hollow: disturbed by other work\n"
        "rows: time, batch, input, hidden; x2: two layers; bi: both directions",
        fontsize=10,
    )
    return pictures.save(figure, path, report["machine"], common.PACKAGES)


def _panels(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of each panel: a section's mode, and the streamed step against each of its peers."""
    rows = [r for r in report["rows"] if r["ratio"] is not None]
    keys = sorted(
        {(r["section"], r["mode"]) for r in rows if r["section"] in TITLES},
        key=lambda key: (list(TITLES).index(key[0]), key[1]),
    )
    found = [[r for r in rows if (r["section"], r["mode"]) == key] for key in keys]
    steps = [
        r | {"ratio": value, "label": name}
        for r in rows
        if r["section"] == "stream"
        for name, value in r["ratios"].items()
        if not name.startswith("ours")
    ]
    return found + ([steps] if steps else [])


def _labels(group: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["label"] for r in group))


def _panel(axes: Any, group: list[dict[str, Any]], summaries: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    section, mode = group[0]["section"], group[0]["mode"]
    labels = _labels(group)
    series = sorted(
        {(r["cell"], r["threads"]) for r in group}, key=lambda s: (list(COLOURS).index(s[0]), s[1])
    )
    for r in group:
        place = series.index((r["cell"], r["threads"])) - (len(series) - 1) / 2
        axes.plot(
            r["ratio"],
            labels.index(r["label"]) + 0.7 * place / max(len(series), 2),
            MARKS.get(r["threads"], "^"),
            color=COLOURS[r["cell"]],
            markersize=4.5,
            fillstyle="none" if r["noisy"] else "full",
        )
    for s in summaries:
        if (s["section"], s["mode"]) == (section, mode) and s["cell"] is None:
            axes.axvline(s["geometric_mean"], color="black", linewidth=1.2, linestyle=":")
            axes.axvline(s["goals"][0], color=pictures.PURPLE, linewidth=1.2, linestyle="--")
    axes.axvline(1, color="black", linewidth=1)
    low, high = min(r["ratio"] for r in group), max(r["ratio"] for r in group)
    axes.set(xscale="log", xlim=(min(0.2, 0.8 * low), max(1.5, 1.25 * high)), ylim=(len(labels) - 0.4, -0.6))
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if section == "stream":
        axes.set_title("one streamed step, batch 1, over each peer's", fontsize=10)
    else:
        what = "training step" if mode == "training" else mode
        axes.set_title(f"{what}, {TITLES[section]}", fontsize=10)
