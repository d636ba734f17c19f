"""Collects the relative errors that the gradient tests measure, and prints them as one matrix at the end.

`pytest tests/gradients -s` shows every row; any other run shows one line with the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

# row name -> column -> largest relative error
MATRIX = pytest.StashKey[dict[str, dict[str, float]]]()
NUMERIC = ("input", "weights", "state")
CPU = ("output", "input", "weights", "state")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, str, float], None]:
    """record(row, "numeric" or "cpu", column, error) enters one cell; the largest error of a cell is kept."""
    matrix = request.config.stash.setdefault(MATRIX, {})

    def enter(row: str, against: str, column: str, error: float) -> None:
        cells = matrix.setdefault(row, {})
        key = f"{against} {column}"
        cells[key] = max(error, cells.get(key, 0.0))

    return enter


def table(matrix: dict[str, dict[str, float]]) -> Iterator[str]:
    """The matrix as lines: rows are layers, losses and options; a dot where there is nothing to
    differentiate."""
    columns = [f"numeric {c}" for c in NUMERIC] + [f"cpu {c}" for c in CPU]
    width = max(len(row) for row in matrix) + 1
    half = 9 * len(NUMERIC)
    yield f"{'':{width}}{'reference, numerical':^{half}}  {'cpu float32, reference':^{9 * len(CPU)}}"
    yield f"{'':{width}}" + "".join(f"{c:>9}" for c in NUMERIC) + "  " + "".join(f"{c:>9}" for c in CPU)
    for row, cells in matrix.items():
        shown = [f"{cells[c]:>9.0e}" if c in cells else f"{'.':>9}" for c in columns]
        yield f"{row:{width}}" + "".join(shown[: len(NUMERIC)]) + "  " + "".join(shown[len(NUMERIC) :])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    matrix = config.stash.get(MATRIX, {})
    if not matrix:
        return
    worst = {
        kind: max(
            (e for cells in matrix.values() for c, e in cells.items() if c.startswith(kind)), default=0.0
        )
        for kind in ("numeric", "cpu")
    }
    terminalreporter.section("gradients: largest relative errors")
    if config.option.capture == "no":
        for line in table(matrix):
            terminalreporter.write_line(line)
    terminalreporter.write_line(
        f"{len(matrix)} rows; worst: reference against numerical {worst['numeric']:.0e}, "
        f"cpu float32 against reference {worst['cpu']:.0e} (all rows: pytest tests/gradients -s)"
    )
