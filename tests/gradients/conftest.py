"""Collects the relative errors that the gradient tests measure, and prints them as one matrix at the end.

`pytest tests/gradients -s` shows every row; any other run shows one line with the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

# row name -> column -> largest relative error
MATRIX = pytest.StashKey[dict[str, dict[str, float]]]()
NUMERIC = ("input", "weights", "state")
FLOAT32 = ("output", "input", "weights", "state")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, str, float], None]:
    """record(row, "numeric", "cpu" or "cuda", column, error) enters one cell; the largest error of a cell is kept."""
    matrix = request.config.stash.setdefault(MATRIX, {})

    def enter(row: str, against: str, column: str, error: float) -> None:
        cells = matrix.setdefault(row, {})
        key = f"{against} {column}"
        cells[key] = max(error, cells.get(key, 0.0))

    return enter


def table(matrix: dict[str, dict[str, float]]) -> Iterator[str]:
    """The matrix as lines: rows are layers, losses and options; a dot where there is nothing to
    differentiate."""
    blocks = {"numeric": NUMERIC, "cpu": FLOAT32, "cuda": FLOAT32}
    titles = {
        "numeric": "reference, numerical",
        "cpu": "cpu float32, reference",
        "cuda": "cuda float32, reference",
    }
    width = max(len(row) for row in matrix) + 1
    yield f"{'':{width}}" + "  ".join(f"{titles[k]:^{9 * len(c)}}" for k, c in blocks.items())
    yield f"{'':{width}}" + "  ".join("".join(f"{c:>9}" for c in columns) for columns in blocks.values())
    for row, cells in matrix.items():
        shown = {
            kind: [
                f"{cells[f'{kind} {c}']:>9.0e}" if f"{kind} {c}" in cells else f"{'.':>9}" for c in columns
            ]
            for kind, columns in blocks.items()
        }
        yield f"{row:{width}}" + "  ".join("".join(entries) for entries in shown.values())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    matrix = config.stash.get(MATRIX, {})
    if not matrix:
        return
    worst = {
        kind: max(
            (e for cells in matrix.values() for c, e in cells.items() if c.startswith(kind)), default=0.0
        )
        for kind in ("numeric", "cpu", "cuda")
    }
    terminalreporter.section("gradients: largest relative errors")
    if config.option.capture == "no":
        for line in table(matrix):
            terminalreporter.write_line(line)
    terminalreporter.write_line(
        f"{len(matrix)} rows; worst: reference against numerical {worst['numeric']:.0e}, "
        f"float32 against reference: cpu {worst['cpu']:.0e}, cuda {worst['cuda']:.0e} (all rows: pytest tests/gradients -s)"
    )
