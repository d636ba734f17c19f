"""Memory laid out once: pieces, words relative to them, and words that only a call knows."""

from __future__ import annotations

import numpy as np

from numlstm.kernels.cpu.blueprint import Blueprint, Relative


def laid_out() -> tuple[Blueprint, np.ndarray, np.ndarray]:
    words = [7, Relative("a"), Relative("b", 8), Relative("x"), Relative("stride", 4), Relative("a", 4)]
    blueprint = Blueprint({"a": 3}, {"b": 40, "c": 0}, words)
    return blueprint, blueprint.slab(), np.full(len(words), -1, np.int64)


def test_words_become_addresses() -> None:
    blueprint, slab, table = laid_out()
    x = np.zeros(5, np.float32)
    blueprint.write(table, slab, {"x": x, "stride": 100})
    a, b = (blueprint.piece(slab, name, -1) for name in "ab")
    assert table.tolist() == [7, a.ctypes.data, b.ctypes.data + 8, x.ctypes.data, 104, a.ctypes.data + 4]


def test_pieces_lie_apart_on_cache_lines_and_begin_at_zero() -> None:
    blueprint, slab, _ = laid_out()
    a, b, c = (blueprint.piece(slab, name, -1) for name in "abc")
    assert (a.size, b.size, c.size) == (3, 40, 0) and not a.any()
    assert a.ctypes.data % 64 == b.ctypes.data % 64 == 0
    assert not np.shares_memory(a, b)
    assert blueprint.piece(slab, "b", 4, 10).shape == (4, 10)


def test_a_second_call_gets_memory_of_its_own() -> None:
    blueprint, slab, table = laid_out()
    other = blueprint.slab()
    assert not np.shares_memory(slab, other)
    blueprint.write(table, slab, {"x": 0, "stride": 0})
    first = table.copy()
    blueprint.write(table, other, {"x": 0, "stride": 0})
    moved = other.ctypes.data - slab.ctypes.data
    assert (table - first).tolist() == [0, moved, moved, 0, 0, moved]


def test_words_added_to_a_table_leave_the_others() -> None:
    _, _, table = laid_out()
    later = Blueprint({}, {"d": 1}, [Relative("d"), 5], where=[4, 0])
    slab = later.slab()
    later.write(table, slab, {})
    assert table.tolist() == [5, -1, -1, -1, slab.ctypes.data, -1]
