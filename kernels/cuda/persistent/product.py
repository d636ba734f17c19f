"""The recurrent product's lines of a persistent kernel: wait for the other blocks' words, multiply, leave partial sums.

Layout. A word is a float32 or a pair of bfloat16; a row's words are dealt to the warps in equal parts, those to chunks of
16. Of a chunk, lane (g, q) = (lane // 4, lane % 4) loads words 4q to 4q+3 of row g with one instruction. A matrix tile
(8 words deep) wants from that lane words q and q+4 of its depth; nothing but the packing of the weights says which words
those are, so the lane's words 2s and 2s+1 serve as them in tile s of the chunk's two. Thus what was loaded from L2 is the
instruction's operand as it is: no shared memory, no shuffle. `pack` orders weights to match.

Waiting. A word that has not been published reads as ABSENT, all bits set, which no published word is. A lane loads all its
words of a group, and again until none is absent; the loads of the next group are on their way meanwhile. One that has looked
`limit` times, or sees that another block has given up, notes its step and leaves at the next barrier with its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from .plan import CHUNK, WORDS, Plan

ABSENT = 0xFFFFFFFF  # the word that stands for "not published yet"; ptx.py has it too

__all__ = ["Text", "declare", "load_weights", "pack", "unpack", "wait_and_multiply"]

EVERY = 64  # looks between glances at the other blocks' trouble


class Text:
    """Lines of a kernel with their indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 1

    def __call__(self, *lines: str) -> Text:
        self.lines += ["    " * self.depth + line for line in lines]
        return self

    def block(self, head: str) -> _Block:
        self(head)
        return _Block(self)


class _Block:
    def __init__(self, text: Text) -> None:
        self.text = text

    def __enter__(self) -> None:
        self.text.depth += 1

    def __exit__(self, *_: Any) -> None:
        self.text.depth -= 1


def pack(plan: Plan, weights: Any, xp: Any, *, back: bool) -> Any:
    """Weights as words (K, columns), in the order in which the kernels' lanes hold them; a flat uint32 array.

    Arguments:
        weights: float32. Forward (padded units, padded units x nh): from a fed unit to a unit's recurrent gates, gate by
            gate within a unit. Backward its transpose: from a gate's gradient to a unit.
    """
    K, columns = weights.shape
    depth = WORDS[plan.precision]  # elements a word
    warps, chunks = (plan.back_warps, plan.back_chunks) if back else (plan.warps, plan.chunks)
    width = plan.U if back else plan.M  # columns of a block, padded
    whole = xp.zeros((warps * chunks * CHUNK * depth, plan.blocks, width), np_float32(xp))
    whole[:K, :, : columns // plan.blocks] = weights.reshape(K, plan.blocks, -1)
    # K = warp, chunk, lane q, tile s, half of the depth r, element of the word e
    whole = whole.reshape(warps, chunks, 4, 2, 2, depth, plan.blocks, width)
    if back:  # columns = block, tile of 8 n, g; the lane's four words are (s, r)
        whole = whole.reshape(warps, chunks, 4, 2, 2, depth, plan.blocks, width // 8, 8)
        whole = whole.transpose(6, 0, 1, 7, 8, 2, 3, 4, 5)
    else:  # columns = block, tile of 16 m, half h, g; the lane's four words are (r, h)
        whole = whole.reshape(warps, chunks, 4, 2, 2, depth, plan.blocks, width // 16, 2, 8)
        whole = whole.transpose(6, 0, 1, 3, 7, 9, 2, 4, 8, 5)
    return words(whole, plan.precision, xp).reshape(-1)


def unpack(plan: Plan, packed: Any, xp: Any, *, back: bool) -> Any:
    """What `pack` was given, with its padding, and rounded: (K, blocks, columns of a block)."""
    depth = WORDS[plan.precision]
    warps, chunks = (plan.back_warps, plan.back_chunks) if back else (plan.warps, plan.chunks)
    values = numbers(packed, plan.precision, xp)
    if back:
        values = values.reshape(plan.blocks, warps, chunks, plan.U // 8, 8, 4, 2, 2, depth)
        values = values.transpose(1, 2, 5, 6, 7, 8, 0, 3, 4)
    else:
        values = values.reshape(plan.blocks, warps, chunks, 2, plan.M // 16, 8, 4, 2, 2, depth)
        values = values.transpose(1, 2, 6, 3, 7, 9, 0, 4, 8, 5)
    return values.reshape(warps * chunks * CHUNK * depth, plan.blocks, -1)


def np_float32(xp: Any) -> Any:
    return xp.float32


def words(a: Any, precision: str, xp: Any) -> Any:
    """float32 values as operands' words, uint32; in bfloat16 two neighbours of the last axis make one."""
    a = xp.ascontiguousarray(a)
    whole = a.view(xp.uint32)
    if precision == "float32":
        return whole
    if precision == "tf32":  # to nearest, ties away from zero, as cvt.rna does
        return xp.where(xp.isnan(a), xp.uint32(0x7FFFE000), (whole + 0x1000) & 0xFFFFE000).astype(xp.uint32)
    return bfloat16(a, xp).view(xp.uint32)


def bfloat16(a: Any, xp: Any) -> Any:
    """float32 values rounded to bfloat16, as uint16: to nearest, ties to even (rounding.py, on any array module)."""
    whole = xp.ascontiguousarray(a).view(xp.uint32)
    rounded = whole + (xp.uint32(0x7FFF) + ((whole >> 16) & 1))
    return (xp.where(xp.isnan(a), xp.uint32(0x7FFF0000), rounded) >> 16).astype(xp.uint16)


def numbers(a: Any, precision: str, xp: Any) -> Any:
    """Words as float32 values; of bfloat16 twice as many."""
    if precision != "bfloat16":
        return a.view(xp.float32)
    return (a.view(xp.uint16).astype(xp.uint32) << 16).view(xp.float32)


def _groups(tiles: int, chunks: int, at_once: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The first tile and chunk of each group of loads; all chunks of some tiles before the next tiles."""
    for tile in range(0, tiles, at_once[0]):
        for chunk in range(0, chunks, at_once[1]):
            yield tile, chunk


def declare(text: Text, plan: Plan, *, back: bool) -> None:
    """Registers of the product: weights, sums, words on their way."""
    chunks = plan.back_chunks if back else plan.chunks
    wide = plan.U // 8 if back else plan.M // 16 * 2
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    per = (4 if plan.half else 8) if back else 4
    sums = plan.U // 8 if back else plan.M // 16
    all_tiles = plan.back_tiles if back else plan.tile // 8
    text(f"a = cuda.local.array({chunks * wide * 4}, uint32)")
    text(f"acc = cuda.local.array({tiles * sums * 4}, float32)")
    groups = len(list(_groups(all_tiles, chunks, (tiles, depth))))
    for k in range(min(2, groups)):
        text(f"words{k} = cuda.local.array({tiles * depth * per}, uint32)")
    text("failed = 0", "spins = 0")


def load_weights(text: Text, plan: Plan, *, back: bool) -> None:
    warps, chunks = (plan.back_warps, plan.back_chunks) if back else (plan.warps, plan.chunks)
    loads = chunks * (plan.U // 8 if back else plan.M // 16 * 2)
    text(f"at = ((d * {plan.blocks} + j) * {warps} + w) * {loads * 128} + lane * 4")
    text(*(f"weights4(a, {4 * i}, W, at + {128 * i})" for i in range(loads)))


def _load(text: Text, plan: Plan, group: tuple[int, int], buffer: str, source: str, *, back: bool) -> None:
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    row_words, rows = (plan.back_row_words, 16) if back else (plan.row_words, 8)
    per = _loads_per_chunk(plan, back)
    for i, (n, k, r) in enumerate(product(range(tiles), range(depth), range(per))):
        place = (group[0] + n) * rows * row_words + r * 8 * row_words + (group[1] + k) * CHUNK
        text(f"poll4({buffer}, {4 * i}, {source}, at + {place})")


def _loads_per_chunk(plan: Plan, back: bool) -> int:
    """Loads of a tile's chunk: rows g, and backward rows g + 8 too."""
    return 2 if back and not plan.half else 1


def wait_and_multiply(text: Text, plan: Plan, source: str, *, back: bool) -> None:
    """From the words at `source[at...]` to partial sums in shared memory at `pool[red...]`.

    Forward the sums lie as [warp][row of weights][row of the batch], backward as [warp][row of the batch][unit].
    """
    chunks = plan.back_chunks if back else plan.chunks
    all_tiles = plan.back_tiles if back else plan.tile // 8
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    count = tiles * depth * _loads_per_chunk(plan, back) * 4
    groups = list(_groups(all_tiles, chunks, (tiles, depth)))
    sums = plan.U // 8 if back else plan.M // 16
    _load(text, plan, groups[0], "words0", source, back=back)
    for number, (tile, chunk) in enumerate(groups):
        buffer = f"words{number % 2}"
        if number + 1 < len(groups):
            _load(text, plan, groups[number + 1], f"words{(number + 1) % 2}", source, back=back)
        if chunk == 0:
            text(*(f"acc[{i}] = float32(0)" for i in range(tiles * sums * 4)))
        text("spins = 0")
        with text.block(f"while absent({buffer}, {count}) != 0:"):
            text("# spin")
            text("spins += 1")
            with (
                text.block(f"if spins % {EVERY} == 0 or spins >= limit:"),
                text.block("if failed != 0 or spins >= limit or peek(E, 0) != 0:"),
            ):
                text("publish1(E, 1 + block, step * 64 + w + 1)", "publish1(E, 0, 1)", "failed = 1", "break")
            _load(text, plan, (tile, chunk), buffer, source, back=back)
        _multiply(text, plan, chunk, buffer, back=back)
        if chunk + depth == chunks:
            _leave(text, plan, tile, back=back)


def _multiply(text: Text, plan: Plan, chunk: int, buffer: str, *, back: bool) -> None:
    """One group's products. The two halves of a chunk are two matrix tiles; forward the weights are the first operand."""
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    sums, per = plan.U // 8 if back else plan.M // 16, _loads_per_chunk(plan, back)
    for k, m, s, n in product(range(depth), range(sums), range(2), range(tiles)):
        at, o = (n * depth + k) * per * 4 + 2 * s, (n * sums + m) * 4
        if back:
            upper = (-1, -1) if plan.half else (at + 4, at + 5)
            weights = ((chunk + k) * sums + m) * 4 + 2 * s
            operands = f"{buffer}, {at}, {upper[0]}, {at + 1}, {upper[1]}, a, {weights}, {weights + 1}"
        else:
            weights = (((chunk + k) * 2 + s) * sums + m) * 4
            operands = f"a, {weights}, {weights + 1}, {weights + 2}, {weights + 3}, {buffer}, {at}, {at + 1}"
        text(f"mma_{plan.precision}(acc, {o}, {operands})")


def _leave(text: Text, plan: Plan, tile: int, *, back: bool) -> None:
    """The sums of a group of tiles into shared memory; lane (g, q) has rows g and g + 8, columns 2q and 2q + 1."""
    tiles = (plan.back_groups_of_loads() if back else plan.groups_of_loads())[0]
    sums = plan.U // 8 if back else plan.M // 16
    pitch = plan.U + 1 if back else plan.tile + 1
    row = f"w * {plan.tile} + {tile * 16} + g" if back else f"w * {plan.M} + g"
    text(f"p = red + ({row}) * {pitch} + q * 2" + ("" if back else f" + {tile * 8}"))
    for n, m in product(range(tiles), range(sums)):
        o = (n * sums + m) * 4
        place = n * 16 * pitch + m * 8 if back else m * 16 * pitch + n * 8
        text(f"pool[p + {place}] = acc[{o}]", f"pool[p + {place + 1}] = acc[{o + 1}]")
        if not (back and plan.half):
            place += 8 * pitch
            text(f"pool[p + {place}] = acc[{o + 2}]", f"pool[p + {place + 1}] = acc[{o + 3}]")
