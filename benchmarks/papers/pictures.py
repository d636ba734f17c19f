"""What the papers' pictures share: the frame, the colours, a footnote on the machine, the file written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numlstm.data import plots

# Okabe and Ito's palette, told apart by people with every kind of colour vision
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#888888"

OWN = ("numlstm", "numpy", "numba", "llvmlite")  # what every script runs on


def panels(count: int, width: float = 8.0, height: float = 4.6) -> tuple[Any, list[Any]]:
    """A figure with so many panels side by side, grid on, no frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, count, k + 1) for k in range(count)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def save(figure: Any, path: Path, about: dict[str, Any], packages: Sequence[str] = OWN) -> Path:
    """Write the figure, with the machine and the versions of the packages that had a part in small print below."""
    named = ", ".join(f"{name} {about['packages'][name]}" for name in packages if name in about["packages"])
    figure.supxlabel(
        f"{about['cpu']}, {about['cores']} cores; {named}; {about['date']}", fontsize=6, color=GREY
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return plots.save(figure, path)
