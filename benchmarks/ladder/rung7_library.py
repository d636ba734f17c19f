"""Rung 7, the library: what became of rung 5 in `kernels/cpu`.

The same tiles, packing, blocks and threads, and beside them what a library needs. The cell is not written out: its
equations are traced, differentiated and pasted into the loop (kernels/derive.py, kernels/cpu/tiles.py), so that every cell
gets such a kernel and a backward pass. Tiles exist for every number of rows and are compiled once for all cells. Units are
split over threads where that is better than rows (kernels/cpu/sequence.py says when), the input product of all steps goes
first where a step's rows are few, weights are packed by the threads that read them, memory is used again. Masks, unequal
lengths, initial states and dropout are all inside.
"""

from __future__ import annotations

from numlstm.kernels import cells
from numlstm.kernels.cpu import sequence

TITLE = "the library's kernel"
THREADED = True
TOLERANCE = 1e-5


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    return sequence.forward(cells.lstm(), x, kernel, recurrent_kernel, bias, (), None, None, training=False).h
