"""What the CPU's recurrent sequences share: the plan's places, a stage's tile layout, what a pass keeps.

Shapes. A stage (derive.py; most cells are one) has NP pre-activations a unit; the first GX of them are fed by the input,
the last GH by a recurrent product over K units. Units come in blocks of W = UB vectors, HP is the number of units rounded
up to whole blocks.
    gates   [block][T B][NP W]   pre-activations, then saved values, then gradients, each over the last: the closing
                                 products stream it as if it were packed (gradients of a last block of few units with
                                 no gap between its gates, where CLOSE_GATES says so)
    wp, rp  [block][group of columns][I or K][the group's columns]    packed weights, GX W and GH W columns a block, those
            of one tile together;   rt, wt    the same, transposed, in panels of columns
In bfloat16 the products' operands are words of two values each, and K, I and H above half as many (bfloat16.py); what is
said here of x and of what the recurrent product reads then means rounded copies of them. In the tiles of amx.py, too, and
each row's words are rounded up to a whole number of amx.UNIT by zeros.
Padded units (H..HP) hold whatever their cell gives for zeros; products never read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..derive import Cell, Stage
from . import amx
from .isa import LANES, ROW_COLUMNS, TILE_COLUMNS
from .microkernel import Windows, fused_family, plain_families, row_family, rows_of
from .plan import get
from .simd import INNER_OPTIONS, VECTOR_BYTES
from .workspace import address, aligned

__all__ = [
    "PLAN_BYTES",
    "Layout",
    "P",
    "Prepared",
    "Residual",
    "by_step",
    "columns",
    "field",
    "place_in_group",
    "product_tiles",
    "state_gradients",
    "steps_and_rows",
    "tile_words",
    "words",
]


ALIASED = 1 << 14  # bytes: an eighth of what a way of the second-level caches of today holds


class P(IntEnum):
    """A kernel's only argument is an int64 array of addresses, sizes and strides: the places of each in it."""

    T = 0
    B = auto()
    I = auto()
    H = auto()  # units of what this stage makes
    K = auto()  # units of what its recurrent product reads
    HP = auto()
    BLOCKS = auto()
    UNITS_SPLIT = auto()  # 1: threads share the units; 0: the batch
    APART = auto()  # 1: the input product of all steps comes first; 0: it is part of each step's tile
    PACKED = auto()  # 1: a pass before this one has packed the weights, and the biases
    FLAGS = auto()  # barrier flags
    SCRATCH = auto()
    ZEROS = auto()
    X = auto()
    X_T = auto()  # bytes between its steps, between its rows
    X_B = auto()
    KERNEL = auto()
    RECURRENT = auto()
    BIAS = auto()  # 0: none
    PARAMS = auto()  # [param][HP]
    VALID = auto()  # bytes [T B]; 0: all steps are valid
    X_COLUMN = auto()  # for each gate fed by the input, its place among the weights' columns
    H_COLUMN = auto()
    X_GATES = auto()  # how many of each
    H_GATES = auto()
    X_ROW = auto()  # columns of the whole weights
    H_ROW = auto()
    WP = auto()
    RP = auto()
    BP = auto()
    STATE_H = auto()
    FED = auto()  # what the recurrent product reads: h, or h times the recurrent mask
    FED_T = auto()  # bytes between its steps, between its rows
    FED_B = auto()
    MASK = auto()  # 0: none
    MASK_T = auto()  # bytes between its steps, between its rows
    MASK_B = auto()
    AUX = auto()  # [aux](address, bytes between steps, bytes between rows)
    STATES = auto()  # the states after h: slot k at STATES + k STATE_SLOT, step t at t STATE_STEP
    STATE_SLOT = auto()
    STATE_STEP = auto()
    TRAINING = auto()
    GATES = auto()
    EXTRA = auto()  # saved values beyond the NP that fit over the gates
    EXTRA_ROW = auto()  # bytes of a row of them
    READS_H = auto()  # whether the gradient reads h of the step before
    # 1: in the last block, of few units, the gates' gradients stand as far apart as it has units
    CLOSE_GATES = auto()
    FUSED = auto()  # the table of `product_tiles`
    GROUPS = auto()  # its rows
    STEP_TILES = auto()  # the same two for the products of a step, and the most rows of a tile there
    STEP_GROUPS = auto()
    STEP_ROWS = auto()
    # Bytes of a group's columns in packed weights, pre-activations that a product leaves out included
    X_GROUP = auto()
    H_GROUP = auto()
    PLAIN = auto()
    # Vectors of a panel of transposed weights, its tiles as PLAIN has them, and their most rows
    PANEL = auto()
    PANEL_TILES = auto()
    PANEL_ROWS = auto()
    WIDTH = auto()  # units a block
    PRE = auto()  # pre-activations a unit
    NARROW = auto()  # vectors of the last block's recurrent product with its gates side by side; 0: no fewer
    FORWARD_TILE = auto()  # addresses of the stage's equations, compiled
    BACKWARD_TILE = auto()
    SCRATCH_BYTES = auto()  # a shard's
    PACK = auto()  # addresses of the functions of parts.py
    INPUT_PRODUCT = auto()
    FORWARD_STEP = auto()
    PACK_BACK = auto()
    DX_STEP = auto()
    CLOSING = auto()
    UNPACK = auto()
    STEPS = auto()  # and of fused.py
    STEPS_BACK = auto()
    DY = auto()  # 0: no gradient comes from the outputs
    DY_T = auto()  # bytes between its steps
    DY_B = auto()  # bytes between its rows
    DSTATE = auto()  # [state][B][HP], in place
    DSTATES = auto()  # for each state after the first: 0 or its sequence's gradient, bytes by step, by row
    D = auto()
    RT = auto()
    WT = auto()
    DX = auto()  # 0: not asked for
    ROWS = auto()  # what `closing` packs
    DWP = auto()
    DRP = auto()
    DBP = auto()
    DKERNEL = auto()
    DRECURRENT = auto()
    DPARAMS = auto()  # [param][B][HP]
    MASK_STEPS = auto()  # how many steps from this plan's first one the recurrent mask goes on
    PER_WORD = auto()  # values in a 32-bit word of a product's operands
    UNIT = auto()  # words of a row of them, and rows of memory that a tile writes, are whole multiples of it
    TILE_ROWS = auto()  # the most rows of a product's tile
    TILES = auto()  # for amx.begin_tiles
    FED_KEPT = auto()  # which bits of a step's number FED has a place for: -1 all, 1 two places in turn
    # Only in bfloat16:
    X_SOURCE = auto()  # x in float32, of which X is the rounded copy
    X_ROWS = auto()  # of the whole sequence
    PAIRS = auto()  # scratch for packing, PAIRS_BYTES a shard
    PAIRS_BYTES = auto()
    # Only where saved values are computed again (fused.py), with a plan for each piece of the sequence:
    PIECES = auto()
    STARTS = auto()  # the states after h as each piece begins: slot k at STARTS + k START_SLOT
    START = auto()  # and as this one does
    START_SLOT = auto()
    SAVED = auto()  # whether the pass before has left the piece's saved values
    OTHERS = auto()  # how many states there are beside h
    # Only for sequences of several stages (staged.py), each with a plan of its own:
    VECTORS = auto()  # table of the vectors that the stage reads, then of those it writes
    GRADIENTS = auto()  # table of their gradients
    UPSTREAM = auto()  # for each vector written: 0 or a gradient from outside, bytes by step, by row
    NORMS = auto()  # addresses of the tables of what is normalised before the stage
    NORM_COUNT = auto()
    PARAM_B = auto()  # bytes between params
    D_SOURCE = auto()  # the gradient of what the recurrent product reads: address, bytes by parity, by row
    D_SOURCE_T = auto()
    D_SOURCE_B = auto()
    D_MASK = auto()  # 0, or the mask that multiplied it on its way in
    DX_ADD = auto()  # 1: another stage has begun dx
    STAGES = auto()  # how many there are; their plans lie one after the other


PLAN_BYTES = 8 * len(P)


@dataclass(frozen=True)
class Layout:
    """The constants of a cell's kernels; see the head of this file."""

    pre: int
    x_gates: int
    h_gates: int
    blocks_vectors: int  # UB
    extra: int  # saved values beside those over the gates
    precision: str = "float32"  # of the products' operands

    @classmethod
    @lru_cache(1024)  # asked for in every call
    def of(cls, stage: Stage, precision: str = "float32") -> Layout:
        pre = len(stage.pre)
        blocks_vectors, extra = max(1, 4 // max(pre, 1)), max(0, stage.saved - pre)
        return cls(pre, len(stage.x_gates), len(stage.h_gates), blocks_vectors, extra, precision)

    @property
    def per_word(self) -> int:
        """Values in 32 bits of a product's operand."""
        return 1 if self.precision == "float32" else 2

    @property
    def unit(self) -> int:
        """A row of a product's operand has a whole multiple of so many words."""
        return amx.UNIT if amx.tiled(self.precision) else 1

    @property
    def tile_rows(self) -> int:
        """The most rows of a product's tile."""
        return rows_of(self.precision)

    @property
    def rows_read(self) -> int:
        """How many rows past the last one a product's tile may read."""
        return self.unit - 1

    def words(self, n: int) -> int:
        """32-bit words that n values of a product's operand take."""
        return -(-n // (self.per_word * self.unit)) * self.unit

    def row_bytes(self, units: str) -> str:
        """The bytes of a row's words for so many units, in emitted text."""
        values = self.per_word * self.unit
        return f"({units} + {values - 1}) // {values} * {4 * self.unit}"

    def plan(self) -> dict[P, int]:
        """What a plan says of the operands and the tiles."""
        return {
            P.PER_WORD: self.per_word, P.UNIT: self.unit, P.TILE_ROWS: self.tile_rows,
            P.TILES: amx.state_of(amx.form_of(self.precision)),
        }  # fmt: skip

    @property
    def width(self) -> int:
        """W, units a block."""
        return self.blocks_vectors * LANES

    def blocks(self, units: int) -> int:
        """How many blocks so many units take."""
        return -(-units // self.width)

    def narrow(self, units: int) -> int:
        """Vectors of the last block's recurrent product with its gates side by side; 0 where that saves none, and in
        bfloat16.

        With 50 units, a fourth block of an LSTM has 2: 8 of 64 lanes."""
        vectors = -(-self.h_gates * (units - (self.blocks(units) - 1) * self.width) // LANES)
        if self.precision != "float32":
            return 0
        return vectors if vectors < min(self.h_gates * self.blocks_vectors, TILE_COLUMNS + 1) else 0

    def close_gates(self, units: int) -> bool:
        """Whether the products over all steps take fewer vectors if the last block's gradients stand close together."""
        left = units % self.width
        return (
            self.precision == "float32"
            and self.blocks_vectors == 1
            and 0 < left * self.pre <= (self.pre - 1) * LANES
        )

    def scratch(self) -> int:
        """Floats that a thread needs for a tile beside the gates' memory, and for a narrow one."""
        return self.tile_rows * (max(self.pre * self.width, TILE_COLUMNS * LANES) + TILE_COLUMNS * LANES)

    def groups(self, most: int = TILE_COLUMNS) -> list[tuple[int, int, Windows]]:
        """The tile's columns in groups of up to `most`: first column, how many, windows of the two products."""
        ub, total = self.blocks_vectors, self.pre * self.blocks_vectors
        x_end, h_start = self.x_gates * ub, (self.pre - self.h_gates) * ub
        out = []
        for first in range(0, total, most):
            last = min(first + most, total)
            clip = lambda c, first=first, last=last: min(max(c, first), last) - first
            out.append((first, last - first, ((0, clip(x_end)), (clip(h_start), last - first))))
        return out


def field(place: P) -> str:
    """The plan's value at `place`, in emitted text."""
    return f"load_int(p + {8 * place})"


@cache
def product_tiles(stage: Stage, precision: str = "float32", one_row: bool = False) -> np.ndarray:
    """The stage's fused tiles, a row for each group of columns: addresses for 1 to `tile_rows` rows (with `one_row` only
    for 1, of wider groups), then in bytes the group's columns that the input feeds and those that the recurrence does, the
    block's columns before them, and those before its recurrent ones. Plans point here."""
    lay, table = Layout.of(stage), []
    apart = (lay.pre - lay.h_gates) * lay.blocks_vectors  # columns that the recurrence does not feed
    for first, count, windows in lay.groups(ROW_COLUMNS if one_row else TILE_COLUMNS):
        words = [*(last - start for start, last in windows), first, max(0, first - apart)]
        tiles = fused_family(count, windows, precision, 1 if one_row else None)
        table.append([*tiles, *(VECTOR_BYTES * n for n in words)])
    return np.array(table, np.int64)


def tile_words(stage: Stage, precision: str, B: int, K: int, shards: int, apart: bool) -> dict[P, int]:
    """What a plan says of the product tiles. A row by itself has wider ones, of the same bits.

    Arguments:
        B: rows of the batch.
        K: units of what the recurrent product reads.
        shards: among how many threads they are divided.
        apart: whether the input product comes first, in tall tiles.
    """
    tiles, plain = product_tiles(stage, precision), plain_families(precision)
    of_step, panel, of_panel = tiles, TILE_COLUMNS, plain
    of_step_rows = of_panel_rows = rows_of(precision)
    x_group = h_group = TILE_COLUMNS
    if B == 1 and precision == "float32":
        if len(tiles) > 1:
            of_step, of_step_rows = product_tiles(stage, precision, one_row=True), 1
            x_group, h_group = TILE_COLUMNS if apart else ROW_COLUMNS, ROW_COLUMNS
        share = -(-K // (LANES * shards))  # of the vectors: as few panels as there can be, all of a size
        panel, of_panel, of_panel_rows = -(-share // -(-share // ROW_COLUMNS)), row_family(), 1
    return {
        P.FUSED: address(tiles), P.GROUPS: len(tiles), P.PLAIN: address(plain),
        P.STEP_TILES: address(of_step), P.STEP_GROUPS: len(of_step), P.STEP_ROWS: of_step_rows,
        P.PANEL: panel, P.PANEL_TILES: address(of_panel), P.PANEL_ROWS: of_panel_rows,
        P.X_GROUP: x_group * VECTOR_BYTES, P.H_GROUP: h_group * VECTOR_BYTES,
    }  # fmt: skip


@njit(**INNER_OPTIONS)
def words(p: int, place: int) -> int:
    """How many words of a row of a product's operand as many values take as stand at `place`; per word and unit are powers
    of two."""
    per_word = get(p, P.PER_WORD)
    values = per_word * get(p, P.UNIT)
    return ((get(p, place) + values - 1) & -values) >> (per_word - 1)


@njit(**INNER_OPTIONS)
def place_in_group(column: int, before: int, columns: int, group: int, rows: int) -> tuple[int, int]:
    """Where packed weights [group of columns][rows][the group's columns] have a column: the bytes from their start to its
    first row, and from row to row.

    Arguments, but for `rows` in bytes:
        column: among the product's own `columns`; the groups count those that it leaves out, too, `before` its first one.
        group: of a whole group, a power of two.
    """
    begin = ((column + before) & -group) - before
    first, last = max(begin, 0), min(begin + group, columns)
    return first * rows + column - first, last - first


def columns(cell: Cell, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """The places of a stage's gates among the weights' columns: those fed by the input, those by the recurrence."""
    place = lambda names, part: {n: k for k, g in enumerate(names) for n in (g, g + part)}
    of_x, of_h = place(cell.gates, "_x"), place(cell.recurrent, "_h") | {"projection": 0}
    return (
        np.array([of_x[g] for g in stage.x_gates], np.int64),
        np.array([of_h[g] for g in stage.h_gates], np.int64),
    )


class Residual:
    """What a forward pass keeps: the module that ran it, its plan, and the arrays that the plan's addresses point into."""

    def __init__(self, **kept: Any) -> None:
        self.used = False
        self.__dict__.update(kept)


class Prepared(NamedTuple):
    """A pass that is ready to run: a compiled kernel, its plan, on how many threads, and what makes its result of it.

    A forward pass also tells who asks where each state lies before and after it, (B, row) each; in inference they may be one
    place. And in bfloat16 which of these have a rounded copy that the pass reads, (B, row) of uint16: by the state's number.
    """

    kernel: Any
    plan: np.ndarray
    shards: int
    finish: Callable[[], Any]
    states: Callable[[], tuple[tuple[np.ndarray, np.ndarray], ...]] = tuple
    rounded: tuple[tuple[int, np.ndarray], ...] = ()


def by_step(a: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`a` as a float32 view of `shape` whose rows are contiguous; axes of length 1 are repeated by a stride of 0."""
    whole = *a.shape[:2], shape[2]
    if a.dtype != np.float32 or a.shape != whole or not a.flags.c_contiguous:
        rows = aligned(whole)
        rows[...] = a
        a = rows
    return np.broadcast_to(a, shape)


def steps_and_rows(x: np.ndarray, regular: bool) -> tuple[int, int] | None:
    """Bytes from a step of x (T, B, I) to the next and from a row to the next, where kernels can read it as it lies:
    float32, number after number. None where a copy is better, which is also where rows lie so far apart that many of them
    would fall into the same few places of a cache.

    `regular`: whether a step's rows must come behind those of the step before.
    """
    T, B, I = x.shape
    step, row, each = x.strides
    if B == 1:
        row = step if T > 1 else 4 * I
    if T == 1:
        step = B * row
    aliased = B > 1 and row % ALIASED == 0 and row != 4 * I  # without gaps a copy would lie no better
    if x.dtype != np.float32 or (I > 1 and each != 4) or aliased:
        return None
    return None if regular and step != B * row else (step, row)


def state_gradients(dstates: tuple[Any, ...] | None, count: int) -> list[np.ndarray]:
    """The table of the plan's DSTATES, then the arrays that it points into."""
    table, kept = np.zeros((count, 3), np.int64), []
    for k, d in enumerate(dstates or ()):
        if d is not None:
            d = np.ascontiguousarray(d, np.float32)
            table[k] = d.ctypes.data, *d.strides[:2]
            kept.append(d)
    return [table, *kept]
