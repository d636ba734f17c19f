"""The recurrent product's lines of a persistent kernel: wait for the other blocks' words, multiply, leave partial sums.

Layout. A word is a float32 or a pair of bfloat16; a row's words are dealt to the warps in equal parts, those to chunks of
16. Of a chunk, lane (g, q) = (lane // 4, lane % 4) loads words 4q to 4q+3 of row g with one instruction. A matrix tile
(8 words deep) wants from that lane words q and q+4 of its depth; nothing but the packing of the weights says which words
those are, so the lane's words 2s and 2s+1 serve as them in tile s of the chunk's two. Thus what was loaded from L2 is the
instruction's operand as it is: no shared memory, no shuffle. `pack` orders weights to match.

Waiting. A word that has not been published reads as ABSENT, all bits set, which no published word is. A lane loads all its
words of a group, and again until none is absent; the loads of the next group are on their way meanwhile. One that has looked
`limit` times, or sees that another block has given up, waits no more, notes its step and leaves at the next barrier with its
block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...rounding import bfloat16_bits, tf32_bits
from .places import CHUNK
from .plan import WORDS, Plan

ABSENT = 0xFFFFFFFF  # the word that stands for "not published yet"; ptx.py has it too

__all__ = ["Text", "declare", "load_weights", "pack", "unpack", "wait_and_multiply"]

_CONSTANT = re.compile(r"\b(?:K|float32)\([^()]*\)")


class Text:
    """Lines of a kernel with their indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 1

    def __str__(self) -> str:
        """The whole, with every constant made once, in front: each costs Numba about what an operation costs."""
        head, *body = self.lines
        constants: dict[str, str] = {}
        name = lambda found: constants.setdefault(found[0], f"constant{len(constants)}")
        body = [_CONSTANT.sub(name, line) for line in body]
        return "\n".join([head, *(f"    {n} = {value}" for value, n in constants.items()), *body]) + "\n"

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
    whole = xp.zeros((warps * chunks * CHUNK * depth, plan.blocks, width), xp.float32)
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


def words(a: Any, precision: str, xp: Any) -> Any:
    """float32 values as operands' words, uint32; in bfloat16 two neighbours of the last axis make one."""
    if precision == "bfloat16":
        return bfloat16_bits(a, xp).view(xp.uint32)
    return tf32_bits(a, xp) if precision == "tf32" else xp.ascontiguousarray(a).view(xp.uint32)


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
    text(f"weights(a, {loads}, W, at)")


def _load(text: Text, plan: Plan, group: tuple[int, int], buffer: str, source: str, *, back: bool) -> None:
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    row_words, rows = (plan.back_row_words, 16) if back else (plan.row_words, 8)
    first = group[0] * rows * row_words + group[1] * CHUNK
    text(f"poll({buffer}, {source}, at + {first}, {tiles}, {depth}, {_halves(plan, back)}, {row_words})")


def _halves(plan: Plan, back: bool) -> int:
    """As places.py has it: loads of a tile's chunk backward, rows g and g + 8; 0 forward."""
    return 0 if not back else 1 if plan.half else 2


def wait_and_multiply(text: Text, plan: Plan, source: str, *, back: bool) -> None:
    """From the words at `source[at...]` to partial sums in shared memory at `pool[red...]`.

    Forward the sums lie as [warp][row of weights][row of the batch], backward as [warp][row of the batch][unit].
    """
    chunks = plan.back_chunks if back else plan.chunks
    all_tiles = plan.back_tiles if back else plan.tile // 8
    tiles, depth = plan.back_groups_of_loads() if back else plan.groups_of_loads()
    halves = _halves(plan, back)
    count = tiles * depth * max(1, halves) * 4
    groups = list(_groups(all_tiles, chunks, (tiles, depth)))
    sums = plan.U // 8 if back else plan.M // 16
    _load(text, plan, groups[0], "words0", source, back=back)
    for number, (tile, chunk) in enumerate(groups):
        buffer = f"words{number % 2}"
        if number + 1 < len(groups):
            _load(text, plan, groups[number + 1], f"words{(number + 1) % 2}", source, back=back)
        if chunk == 0:
            text(f"zero(acc, {tiles * sums * 4})")
        text("spins = 0")
        with text.block(f"while absent({buffer}, {count}) != 0:"):
            text("# spin")
            text("spins += 1")
            with text.block("if weary(spins, limit, failed, E) != 0:"):
                text("failed = 1", "break")
            _load(text, plan, (tile, chunk), buffer, source, back=back)
        text(f"mma_{plan.precision}(acc, a, {buffer}, {chunk}, {depth}, {sums}, {tiles}, {halves})")
        if chunk + depth == chunks:
            _leave(text, plan, tile, back=back)
    with text.block("if failed != 0:"):
        text("publish1(E, 1 + block, step * 64 + w + 1)", "publish1(E, 0, 1)")


def _leave(text: Text, plan: Plan, tile: int, *, back: bool) -> None:
    """The sums of a group of tiles into shared memory."""
    tiles = (plan.back_groups_of_loads() if back else plan.groups_of_loads())[0]
    sums = plan.U // 8 if back else plan.M // 16
    pitch = plan.U + 1 if back else plan.tile + 1
    row = f"w * {plan.tile} + {tile * 16} + g" if back else f"w * {plan.M} + g"
    text(f"p = red + ({row}) * {pitch} + q * 2" + ("" if back else f" + {tile * 8}"))
    text(f"leave(pool, p, acc, {tiles}, {sums}, {pitch}, {_halves(plan, back)})")
