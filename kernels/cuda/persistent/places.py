"""Which words and registers the recurrent product's intrinsics touch, one after another: for ptx.py, which makes
instructions of them, and for the tests' emulator.

`halves` is 0 forward, and backward the loads that a chunk of a tile takes: 1 where a tile has 8 rows, 2 where it has 16.
Forward a tile is 8 rows of the batch, which stand in a product's columns; backward up to 16, in its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

__all__ = ["CHUNK", "left", "multiplied", "polled"]

CHUNK = 16  # words of a row that four lanes load at once


def polled(tiles: int, chunks: int, halves: int, row_words: int) -> Iterator[int]:
    """Offsets of a lane's loads of four words, from its first row and word, in the order of their registers."""
    rows = 16 if halves else 8
    for n, k, half in product(range(tiles), range(chunks), range(max(1, halves))):
        yield (n * rows + half * 8) * row_words + k * CHUNK


def multiplied(
    first: int, chunks: int, sums: int, tiles: int, halves: int
) -> Iterator[tuple[int, tuple[int, int, int, int], tuple[int, int]]]:
    """(first of four sums, registers of the first operand, of the second) of each matrix product of some tiles and chunks.

    Arguments:
        first: number of the first chunk among the warp's, whose weights it meets; sums: matrix tiles that stand in the
            product's rows (forward) or columns (backward) of a block.

    The two halves of a chunk are two matrix tiles. Forward the weights are the first operand, backward the words.
    """
    per = 4 * max(1, halves)  # registers of a tile's chunk
    for k, m, s, n in product(range(chunks), range(sums), range(2), range(tiles)):
        at, o = (n * chunks + k) * per + 2 * s, (n * sums + m) * 4
        if halves:
            upper = (at + 4, at + 5) if halves == 2 else (-1, -1)
            w = ((first + k) * sums + m) * 4 + 2 * s
            yield o, (at, upper[0], at + 1, upper[1]), (w, w + 1)
        else:
            w = (((first + k) * 2 + s) * sums + m) * 4
            yield o, (w, w + 1, w + 2, w + 3), (at, at + 1)


def left(tiles: int, sums: int, pitch: int, halves: int) -> Iterator[tuple[int, int]]:
    """(offset in shared memory, number of the sum) of what a lane leaves there; lane (g, q) has rows g and g + 8, columns
    2q and 2q + 1, and `pitch` words lie between rows."""
    for n, m in product(range(tiles), range(sums)):
        o = (n * sums + m) * 4
        place = n * 16 * pitch + m * 8 if halves else m * 16 * pitch + n * 8
        yield place, o
        yield place + 1, o + 1
        if halves != 1:
            yield place + 8 * pitch, o + 2
            yield place + 8 * pitch + 1, o + 3
