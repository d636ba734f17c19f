"""Operands in bfloat16: rounding and packing for products of pairs (simd.py: dot_pairs), and how many words they take.

A product over k reads 32-bit words of two bfloat16 values, k and k + 1, the low half first; where there are an odd number,
the last word's upper half is zero, and in amx.py's tiles a row ends with words of zeros. So every operand is laid out as its
float32 counterpart is (layout.py), with half as many k, and the same tiles' loops walk over both:
    rows      x and h: [T B][I / 2] words, rounded once
    weights   [block][group][I / 2][its columns] words, and transposed in panels of columns
              [panel][gates H / 2][vectors LANES]
    pairs of rows    for sums over rows (the weights' gradients): [rows / 2][columns] words, the rows 2 r and 2 r + 1;
                     for amx.py's tiles, which want A in rows, x's and h's transposed: [columns][rows / 2]
Sums, states, gates and master weights stay float32.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from .amx import ROWS, UNIT
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .layout import Layout, P, place_in_group, words
from .microkernel import TRANSPOSE, tile1, transpose
from .plan import get, share
from .simd import (
    CACHE_LINE,
    INNER_OPTIONS,
    VECTOR_BYTES,
    K,
    join_pairs,
    load,
    load_int,
    load_n,
    load_scalar,
    store,
    store_bf16,
    store_bf16_n,
    store_scalar,
    zero_bytes,
    zip_bf16,
)

__all__ = [
    "clear_words",
    "closing_pairs",
    "closing_tiles",
    "line_step",
    "pack_back_pairs",
    "pack_pairs",
    "pack_transposed_pairs",
    "pair_columns",
    "pairs_bytes",
    "round_rows",
    "transposing_bytes",
    "turn_words",
]

PACKED_WORDS = 8  # of two rows of the weights, at a time
PAIRED_ROWS = 256  # of time and batch in a block of the weight gradients' products


@njit(**INNER_OPTIONS)
def round_rows(
    source: int, source_step: int, count: int, out: int, out_step: int, first: int, last: int
) -> None:
    """Rows first to last of `count` floats each to bfloat16, a zero after an odd count; steps in bytes."""
    for r in range(first, last):
        a, z = source + r * source_step, out + r * out_step
        for k in range(0, count - LANES + 1, LANES):
            store_bf16(z + k * 2, load(a + k * 4))
        k = count // LANES * LANES
        if k < count:
            left = count - k
            store_bf16_n(z + k * 2, load_n(a + k * 4, left), left + (left & 1))


@njit(**INNER_OPTIONS)
def clear_words(out: int, out_step: int, used: int, words: int, first: int, last: int) -> None:
    """Zeros from word `used` to `words` of rows first to last."""
    if used < words:
        for r in range(first, last):
            zero_bytes(out + r * out_step + used * 4, (words - used) * 4)


def line_step(words: int) -> int:
    """Bytes from row to row of so many words: an odd number of cache lines, since rows a power of two apart would all
    want the same few places in the cache."""
    return ((words * 4 + CACHE_LINE - 1) // CACHE_LINE | 1) * CACHE_LINE


pair_step: Callable[[int], int] = njit(**INNER_OPTIONS)(line_step)


def transposing_bytes(H: int) -> int:
    """Bytes of scratch that `pack_transposed_pairs` needs: LANES rounded rows of H values."""
    return LANES * line_step((H + 1) // 2)


@njit(**INNER_OPTIONS)
def pack_transposed_pairs(
    source: int,
    row: int,
    rows: int,
    H: int,
    deep: int,
    gates: int,
    columns: int,
    out: int,
    by_block: int,
    scratch: int,
    shard: int,
    shards: int,
) -> None:
    """The weights transposed, in pairs: (rows, row) -> panels [panel][gates deep][vectors LANES] words, padded with 0;
    `deep`: words of a gate's H values."""
    vectors = (rows + LANES - 1) // LANES
    panels = (vectors + TILE_COLUMNS - 1) // TILE_COLUMNS
    words = (H + 1) // 2
    step = pair_step(words)
    first, last = share(panels, shard, shards)
    for j in range(first, last):
        v0 = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, vectors - v0) * LANES
        panel = out + v0 * LANES * gates * deep * 4
        for g in range(gates):
            for c in range(0, width, LANES):
                here = min(LANES, rows - v0 * LANES - c)
                a = source + ((v0 * LANES + c) * row + load_int(columns + 8 * g) * H) * 4
                round_rows(a, row * 4, H, scratch, step, 0, here)
                if here < LANES:
                    zero_bytes(scratch + here * step, (LANES - here) * step)
                z = panel + (g * deep * width + c) * 4
                if words >= LANES:
                    for k in range(0, words, LANES):
                        u = min(k, words - LANES)  # the last block may overlap the one before
                        transpose(by_block, scratch + u * 4, step, z + u * width * 4, width * 4)
                else:
                    for k in range(LANES):
                        for u in range(words):
                            store_scalar(z + (u * width + k) * 4, load_scalar(scratch + k * step + u * 4))
            if words < deep:
                zero_bytes(panel + (g * deep + words) * width * 4, (deep - words) * width * 4)


@njit(**INNER_OPTIONS)
def pair_columns(
    source: int, step: int, depth: int, count: int, out: int, out_step: int, first: int, last: int
) -> None:
    """Words first to last along k of `count` columns of floats: (depth, count), `step` bytes from k to k, to rows of words
    `out_step` bytes apart, whole vectors of them, padded with 0."""
    for w in range(first, last):
        a, z = source + 2 * w * step, out + w * out_step
        for q in range(0, count, LANES):
            low, high = K(0.0), K(0.0)
            if 2 * w < depth:
                low = load_n(a + q * 4, count - q)
            if 2 * w + 1 < depth:
                high = load_n(a + step + q * 4, count - q)
            store(z + q * 4, join_pairs(low, high))


@njit(**INNER_OPTIONS)
def pair_rows(source: int, step: int, rows: int, out: int) -> None:
    """`rows` rows of `step` bytes of floats to words of two rows each, of as many bytes."""
    for r in range(0, rows - 1, 2):
        for q in range(0, step, VECTOR_BYTES):
            a = source + r * step + q
            store(out + r // 2 * step + q, join_pairs(load(a), load(a + step)))
    if rows & 1 != 0:
        for q in range(0, step, VECTOR_BYTES):
            a = source + (rows - 1) * step + q
            store(out + rows // 2 * step + q, join_pairs(load(a), K(0.0)))


@njit(**INNER_OPTIONS)
def zip_rows(source: int, step: int, count: int, rows: int, zeros: int, out: int, out_step: int) -> None:
    """`rows` rows of `count` bfloat16 values to words of two rows each; whole vectors are read and written.

    `zeros`: so many bytes of them stand for the row after an odd number.
    """
    for r in range(0, rows, 2):
        a, z = source + r * step, out + r // 2 * out_step
        for k in range(0, count, LANES):
            low = a + k * 2
            high = low + step
            if r + 1 == rows:
                high = zeros
            store(z + k * 4, zip_bf16(low, high))


def pack_pairs(p: int, shard: int, shards: int) -> None:
    """parts.pack in pairs: (rows, row) -> [block][group][rows / 2][its columns] words; and x rounded, in every pass."""
    I, x_row = get(p, P.I), words(p, P.I) * 4
    first, last = share(get(p, P.X_ROWS), shard, shards)
    round_rows(get(p, P.X_SOURCE), I * 4, I, get(p, P.X), x_row, first, last)
    clear_words(get(p, P.X), x_row, (I + 1) // 2, words(p, P.I), first, last)
    if get(p, P.PACKED) != 0:
        return
    H, width, blocks = get(p, P.H), get(p, P.WIDTH), get(p, P.BLOCKS)
    u0, u1 = share(blocks, shard, shards)
    source, row, rows, gates = get(p, P.KERNEL), get(p, P.X_ROW), get(p, P.I), get(p, P.X_GATES)
    of_gate, out, deep = get(p, P.X_COLUMN), get(p, P.WP), words(p, P.I)
    group, before = get(p, P.X_GROUP), 0
    for _ in range(2):
        for first in range(0, deep, PACKED_WORDS):  # as in parts.pack
            last = min(first + PACKED_WORDS, deep)
            for u in range(u0, u1):
                block = out + u * deep * gates * width * 4
                for g in range(gates):
                    column = source + (load_int(of_gate + 8 * g) * H + u * width) * 4
                    for q in range(0, width, LANES):
                        n = H - u * width - q
                        z, between = place_in_group(
                            (g * width + q) * 4, before, gates * width * 4, group, deep
                        )
                        for k in range(first, last):
                            a = column + (2 * k * row + q) * 4
                            low, high = K(0.0), K(0.0)
                            if 2 * k < rows:
                                low = load_n(a, n)
                            if 2 * k + 1 < rows:
                                high = load_n(a + row * 4, n)
                            store(block + z + k * between, join_pairs(low, high))
        source, row, rows, gates = get(p, P.RECURRENT), get(p, P.H_ROW), get(p, P.K), get(p, P.H_GATES)
        of_gate, out, deep = get(p, P.H_COLUMN), get(p, P.RP), words(p, P.K)
        group, before = get(p, P.H_GROUP), (get(p, P.PRE) - gates) * width * 4
    if get(p, P.BIAS) != 0:
        for u in range(u0, u1):
            for g in range(get(p, P.X_GATES)):
                a = get(p, P.BIAS) + (load_int(get(p, P.X_COLUMN) + 8 * g) * H + u * width) * 4
                z = get(p, P.BP) + (u * get(p, P.PRE) + g) * width * 4
                for q in range(0, width, LANES):
                    store(z + q * 4, load_n(a + q * 4, H - u * width - q))


def pack_back_pairs(p: int, shard: int, shards: int) -> None:
    """parts.pack_back in pairs."""
    H, deep, by_block = (
        get(p, P.H),
        words(p, P.H),
        load_int(get(p, P.PLAIN) + TRANSPOSE * get(p, P.TILE_ROWS)),
    )
    scratch = get(p, P.PAIRS) + shard * get(p, P.PAIRS_BYTES)
    source, row, rows, gates = get(p, P.RECURRENT), get(p, P.H_ROW), get(p, P.K), get(p, P.H_GATES)
    of_gate, out = get(p, P.H_COLUMN), get(p, P.RT)
    for _ in range(2 if get(p, P.DX) != 0 else 1):
        pack_transposed_pairs(
            source, row, rows, H, deep, gates, of_gate, out, by_block, scratch, shard, shards
        )
        source, row, rows, gates = get(p, P.KERNEL), get(p, P.X_ROW), get(p, P.I), get(p, P.X_GATES)
        of_gate, out = get(p, P.X_COLUMN), get(p, P.WT)


def closing_pairs(p: int, shard: int, shards: int) -> None:
    """parts.closing in pairs along the rows, made a block of rows at a time."""
    TB, I, K, blocks = get(p, P.T) * get(p, P.B), get(p, P.I), get(p, P.K), get(p, P.BLOCKS)
    gates, plain, zeros, width = get(p, P.GATES), get(p, P.PLAIN), get(p, P.ZEROS), get(p, P.WIDTH) * 4
    row, gates_x, gates_h = get(p, P.PRE) * width, get(p, P.X_GATES) * width, get(p, P.H_GATES) * width
    x_tiles, h_tiles = (I + TILE_ROWS - 1) // TILE_ROWS, (K + TILE_ROWS - 1) // TILE_ROWS
    per_block = x_tiles + h_tiles
    first, last = share(blocks * per_block, shard, shards)
    left = get(p, P.PAIRS) + shard * get(p, P.PAIRS_BYTES)
    step = pair_step((I + LANES - 1) // LANES * LANES + (K + LANES - 1) // LANES * LANES)
    of_h, right = (I + LANES - 1) // LANES * VECTOR_BYTES, left + PAIRED_ROWS // 2 * step
    x_row, fed_row = (I + 1) // 2 * 4, get(p, P.FED_B)
    if first == last:
        return
    for k in range(0, TB, PAIRED_ROWS):
        rows = min(PAIRED_ROWS, TB - k)
        depth = (rows + 1) // 2
        zip_rows(get(p, P.X) + k * x_row, x_row, I, rows, zeros, left, step)
        zip_rows(get(p, P.FED) + k * fed_row, fed_row, K, rows, zeros, left + of_h, step)
        for u in range(first // per_block, blocks):
            if u * per_block >= last:
                break
            panel = gates + (u * TB + k) * row
            pair_rows(panel, row, rows, right)
            for i in range(max(first - u * per_block, 0), min(last - u * per_block, per_block)):
                if i == 0:
                    for c in range(0, gates_x, VECTOR_BYTES):
                        a = get(p, P.DBP) + u * row + c
                        total = load(a)
                        for q in range(panel + c, panel + c + rows * row, row):
                            total = total + load(q)
                        store(a, total)
                m, M, out_row, source, out, start = i * TILE_ROWS, I, gates_x, left, get(p, P.DWP), right
                if i >= x_tiles:
                    m, M, out_row = (i - x_tiles) * TILE_ROWS, K, gates_h
                    source, out, start = left + of_h, get(p, P.DRP), right + row - gates_h
                out += (u * M + m) * out_row
                for c in range(0, out_row, TILE_COLUMNS * VECTOR_BYTES):
                    n = min(TILE_COLUMNS, (out_row - c) // VECTOR_BYTES)
                    tile1(
                        load_int(plain + ((n - 1) * TILE_ROWS + min(TILE_ROWS, M - m) - 1) * 8),
                        source + m * 4, 4, step, depth, start + c, row, out + c, out_row, out + c, out_row,
                    )  # fmt: skip


@njit(**INNER_OPTIONS)
def turn_words(by_block: int, source: int, source_step: int, columns: int, out: int, out_step: int) -> None:
    """UNIT rows of `columns` words, transposed: `columns`, in whole blocks of LANES, become rows of UNIT words."""
    for c in range(0, columns, LANES):
        transpose(by_block, source + c * 4, source_step, out + c * out_step, out_step)


def closing_tiles(p: int, shard: int, shards: int) -> None:
    """closing_pairs for amx.py's tiles: x's and h's pairs are transposed to rows, UNIT words at a time, and a tile that has
    not a whole number of UNITs of rows goes through memory of the thread's own."""
    TB, I, K, blocks = get(p, P.T) * get(p, P.B), get(p, P.I), get(p, P.K), get(p, P.BLOCKS)
    gates, plain, zeros, width = get(p, P.GATES), get(p, P.PLAIN), get(p, P.ZEROS), get(p, P.WIDTH) * 4
    row, gates_x, gates_h = get(p, P.PRE) * width, get(p, P.X_GATES) * width, get(p, P.H_GATES) * width
    x_tiles, per_block = (I + ROWS - 1) // ROWS, (I + ROWS - 1) // ROWS + (K + ROWS - 1) // ROWS
    first, last = share(blocks * per_block, shard, shards)
    if first == last:
        return
    by_block = load_int(plain + TRANSPOSE * ROWS)
    of_x, of_h = (I + UNIT - 1) // UNIT * UNIT, (K + UNIT - 1) // UNIT * UNIT
    step, across = pair_step(PAIRED_ROWS // 2), pair_step(of_x + of_h)
    left = get(p, P.PAIRS) + shard * get(p, P.PAIRS_BYTES)
    zipped = left + (of_x + of_h) * step
    right = zipped + UNIT * across
    edge = right + PAIRED_ROWS // 2 * row
    x_row, fed_row = words(p, P.I) * 4, get(p, P.FED_B)
    for k in range(0, TB, PAIRED_ROWS):
        rows = min(PAIRED_ROWS, TB - k)
        depth = (rows + 2 * UNIT - 1) // (2 * UNIT) * UNIT
        for w in range(0, depth, UNIT):
            here = min(rows - 2 * w, 2 * UNIT)
            zip_rows(get(p, P.X) + (k + 2 * w) * x_row, x_row, I, here, zeros, zipped, across)
            zip_rows(
                get(p, P.FED) + (k + 2 * w) * fed_row, fed_row, K, here, zeros, zipped + of_x * 4, across
            )
            clear = (here + 1) // 2
            zero_bytes(zipped + clear * across, (UNIT - clear) * across)
            turn_words(by_block, zipped, across, of_x + of_h, left + w * 4, step)
        for u in range(first // per_block, blocks):
            if u * per_block >= last:
                break
            panel = gates + (u * TB + k) * row
            pair_rows(panel, row, rows, right)
            clear = (rows + 1) // 2
            zero_bytes(right + clear * row, (depth - clear) * row)
            for i in range(max(first - u * per_block, 0), min(last - u * per_block, per_block)):
                if i == 0:
                    for c in range(0, gates_x, VECTOR_BYTES):
                        a = get(p, P.DBP) + u * row + c
                        total = load(a)
                        for q in range(panel + c, panel + c + rows * row, row):
                            total = total + load(q)
                        store(a, total)
                m, M, out_row, source, out, start = i * ROWS, I, gates_x, left, get(p, P.DWP), right
                if i >= x_tiles:
                    m, M, out_row = (i - x_tiles) * ROWS, K, gates_h
                    source, out, start = left + of_x * step, get(p, P.DRP), right + row - gates_h
                out += (u * M + m) * out_row
                m_rows = min(ROWS, M - m)
                for c in range(0, out_row, TILE_COLUMNS * VECTOR_BYTES):
                    n = min(TILE_COLUMNS, (out_row - c) // VECTOR_BYTES)
                    sums, sums_row = out + c, out_row
                    if m_rows % UNIT != 0:
                        sums, sums_row = edge, n * VECTOR_BYTES
                        for r in range(m_rows):
                            for q in range(0, n * VECTOR_BYTES, VECTOR_BYTES):
                                store(edge + r * sums_row + q, load(out + c + r * out_row + q))
                    tile1(
                        load_int(plain + ((n - 1) * ROWS + m_rows - 1) * 8),
                        source + m * step, step, 4, depth, start + c, row, sums, sums_row, sums, sums_row,
                    )  # fmt: skip
                    if m_rows % UNIT != 0:
                        for r in range(m_rows):
                            for q in range(0, n * VECTOR_BYTES, VECTOR_BYTES):
                                store(out + c + r * out_row + q, load(edge + r * sums_row + q))


def pairs_bytes(lay: Layout, I: int, K: int, H: int) -> int:
    """Bytes of scratch a thread for packing pairs in the backward pass."""
    if lay.unit > 1:
        columns = -(-I // UNIT) * UNIT - (-K // UNIT) * UNIT
        rows = columns * line_step(PAIRED_ROWS // 2) + UNIT * line_step(columns)
        right, edge = PAIRED_ROWS // 2 * lay.pre * lay.width * 4, ROWS * TILE_COLUMNS * VECTOR_BYTES
        return max(rows + right + edge, transposing_bytes(H))
    step = line_step(-(-I // LANES) * LANES + -(-K // LANES) * LANES)
    return max(PAIRED_ROWS // 2 * (step + lay.pre * lay.width * 4), transposing_bytes(H))
