"""The loops around tiles: how rows are cut into tiles, and last blocks of every width against the reference."""

from __future__ import annotations

import pytest
from numba import njit
from questions import ask, check

from numlstm.kernels import cells
from numlstm.kernels.cpu import parts
from numlstm.kernels.cpu.isa import LANES, TILE_COLUMNS, TILE_ROWS
from numlstm.kernels.cpu.layout import Layout, place_in_group


@pytest.fixture(scope="module")
def cut():
    return njit(lambda left, most: parts.tile_rows(left, most))


@pytest.fixture(scope="module")
def place():
    return njit(
        lambda column, before, columns, group, rows: place_in_group(column, before, columns, group, rows)
    )


def test_rows_are_all_taken_and_no_tile_is_thin(cut) -> None:
    assert [int(cut(left, 32)) for left in (1, 17, 32, 33, 100)] == [1, 17, 32, 32, 32]  # amx.py's tiles
    for rows in range(1, 3 * TILE_ROWS + 2):
        found, left = [], rows
        while left:
            found.append(int(cut(left, TILE_ROWS)))
            left -= found[-1]
        assert sum(found) == rows and max(found) <= TILE_ROWS
        assert rows < TILE_ROWS or min(found) >= TILE_ROWS // 2, (rows, found)


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize(("columns", "before"), [(4, 0), (3, 1), (1, 3), (5, 0), (6, 4), (12, 0)])
def test_packed_columns_lie_group_by_group(place, columns: int, before: int, group: int) -> None:
    """Every place is taken once, and each of a group's rows is one run."""
    rows, taken = 5, []
    groups: dict[int, list[int]] = {}
    for column in range(columns):
        groups.setdefault((column + before) // group, []).append(column)
    for members in groups.values():
        for column in members:
            first, between = place(column, before, columns, group, rows)
            assert between == len(members)
            assert first == members[0] * rows + members.index(column)
            taken += [first + k * between for k in range(rows)]
    assert sorted(taken) == list(range(columns * rows))


def test_a_narrow_block_saves_vectors() -> None:
    layout = Layout.of(cells.lstm().stages[0])
    for units in range(1, 3 * LANES + 1):
        last = units - (layout.blocks(units) - 1) * layout.width
        wide, narrow = 4 * layout.blocks_vectors, layout.narrow(units)
        needed = -(-4 * last // LANES)
        assert narrow == (needed if needed < min(wide, TILE_COLUMNS + 1) else 0)


@pytest.mark.parametrize("units", [1, *range(LANES - 1, 2 * LANES + 1)])
@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru()], ids=lambda cell: cell.name)
def test_last_blocks_of_every_width(cell, units: int) -> None:
    """Whole, or narrow with its gates side by side: outputs, states and all gradients within 1e-5."""
    check(ask(cell, 3, TILE_ROWS + 1, 5, units, "holes"))
