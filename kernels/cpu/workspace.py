"""Memory for kernels: cache-line-aligned arrays whose pages are used again.

A training step wants the same tens of megabytes as the step before. From the system they come as fresh pages, each costing
a page fault (measured here: up to three times a small layer's whole inference), so an array's memory comes back to a free
list when the last view of it is gone, and the next array of about its size takes it. 64-byte alignment: NumPy promises 16,
and a vector load that straddles two cache lines costs two.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["address", "aligned", "carve", "lay_out", "release"]

ALIGNMENT = 64
POOLED_FROM = 1 << 15  # bytes; smaller blocks the C library keeps by itself
POOL_LIMIT = 1 << 30  # bytes kept at most; beyond it memory goes back to the system

Raw = tuple[np.ndarray, int]  # a piece of memory, and the address of its first aligned byte

_free: dict[int, list[Raw]] = {}  # by size
_kept = 0

_read = ctypes.c_ssize_t.from_address
_HEADER = object.__basicsize__


def _from_struct(a: np.ndarray) -> int:
    return _read(id(a) + _HEADER).value


def _from_ctypes(a: np.ndarray) -> int:
    return a.ctypes.data


def _pick() -> Callable[[Any], int]:
    """The quicker way where it gives the right answer: a view's address, too."""
    whole = np.empty(8, np.float32)
    right = all(_from_struct(a) == a.ctypes.data for a in (whole, whole[3:], whole[::-2]))
    return _from_struct if right else _from_ctypes


# The address of an array's first element. NumPy's C interface fixes that an array object holds it right behind the header
# of every Python object; read there it takes a quarter of the microsecond that `a.ctypes.data` takes, of which a short
# training step would need some fifty.
address: Callable[[Any], int] = _pick()


class _Block:
    """Owner of one piece of memory: arrays made from it keep it alive."""

    __slots__ = ("__array_interface__", "__weakref__", "raw")

    def __init__(self, raw: Raw, shape: tuple[int, ...]) -> None:
        self.raw = raw
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": shape, "data": (raw[1], False)}


# The memory of every block, by a weak reference to it. One whose block is gone comes to `_ended`, and the next request for
# memory takes it from there. By `list.append` and not by a function of ours or `__del__`: Python delivers Ctrl-C where a
# Python function begins, and in those it would be printed and forgotten. No lock: each operation on a list or a dictionary
# is atomic.
_lent: dict[weakref.ref[_Block], Raw] = {}
_ended: list[weakref.ref[_Block]] = []
_refer, _end = weakref.ref, _ended.append


def _take_back() -> None:
    """Put the memory of blocks that are gone on the free list."""
    global _kept
    while True:
        try:
            raw = _lent.pop(_ended.pop(0))  # in their order: the last to end is used again first, still warm
        except IndexError:
            return
        size = len(raw[0])
        if _kept < POOL_LIMIT:
            _kept += size
            try:
                _free[size].append(raw)
            except KeyError:
                _free.setdefault(size, []).append(raw)


def _size_class(n: int) -> int:
    """n rounded up to a sixteenth of its power of two: unequal lengths share blocks."""
    step = 1 << max(12, n.bit_length() - 4)
    return -(-n // step) * step + ALIGNMENT


def _from_system(size: int) -> Raw:
    memory = np.empty(size, np.uint8)
    start = address(memory)
    return memory, start + -start % ALIGNMENT


def _larger(size: int) -> Raw | None:
    """The smallest free block of more than `size` bytes, but of no more than twice as many: whoever keeps a small array
    should not keep much more memory with it."""
    global _kept
    for other in sorted(_free.copy()):  # another thread may add a size meanwhile
        if size < other <= 2 * size:
            try:
                raw = _free[other].pop()
            except IndexError:
                continue
            _kept -= other
            return raw
    return None


def aligned(shape: tuple[int, ...], *, zero: bool = False) -> np.ndarray:
    """A float32 array that starts on a cache line; its contents are arbitrary unless `zero`."""
    global _kept
    n = math.prod(shape)
    if n < POOLED_FROM // 4:
        raw = np.empty(n + ALIGNMENT // 4, np.float32)  # NumPy's own alignment is a multiple of a float's
        start = -address(raw) % ALIGNMENT // 4
        array: np.ndarray = raw[start : start + n]
        if len(shape) != 1:
            array = array.reshape(shape)
    else:
        if _ended:
            _take_back()
        size = _size_class(4 * n)
        try:
            raw = _free[size].pop()
            _kept -= size
        except (KeyError, IndexError):
            raw = _larger(size) or _from_system(size)
        block = _Block(raw, shape)
        _lent[_refer(block, _end)] = raw
        array = np.asarray(block)
    if zero:
        array[...] = 0
    return array


def lay_out(zeroed: Mapping[Any, int], rest: Mapping[Any, int]) -> tuple[dict[Any, int], int, int]:
    """Pieces of so many floats one after the other, each from the start of a cache line: where each begins, where those of
    `zeroed` end, and where all do."""
    offsets, end, start = {}, 0, 0
    for pieces in (zeroed, rest):
        for place, floats in pieces.items():
            offsets[place] = end
            end += (floats + 15) & ~15
        if pieces is zeroed:
            start = end
    return offsets, start, end


def carve(plan: list[int], zeroed: dict[int, int], rest: dict[int, int]) -> tuple[np.ndarray, dict[int, int]]:
    """One array for many pieces: `plan[place]` becomes the address of each piece, given as {place: floats}.

    Returns the array, whose owner must outlive the plan's use, and each piece's offset in it. The pieces of `zeroed` are
    filled with 0.
    """
    offsets, start, end = lay_out(zeroed, rest)
    array = aligned((end,))
    array[:start] = 0
    base = address(array)
    for place, offset in offsets.items():
        plan[place] = base + 4 * offset
    return array, offsets


def release() -> None:
    """Give the memory that is waiting for reuse back to the system."""
    global _kept
    _take_back()
    _free.clear()
    _kept = 0
