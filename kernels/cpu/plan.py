"""What kernels share: reading the plan, dividing work, and the aligned plan itself.

A kernel's only data argument is the address of an int64 array, its plan: addresses, sizes and strides, whose places an
IntEnum names. One argument of one type compiles fast and costs nothing to pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numba import njit, types

from .simd import I64, INNER_OPTIONS, operation, pointer
from .workspace import address

__all__ = ["SIGNATURE", "get", "make_plan", "share"]

SIGNATURE = types.void(types.int64, types.int64, types.int64)  # kernel(plan, shard, shards)


@operation("i(ii)")
def get(b, plan, place):
    """The plan's value at `place`."""
    return b.load(pointer(b, b.add(plan, b.mul(place, I64(8))), I64), align=8)


@njit(**INNER_OPTIONS)
def share(total: int, shard: int, shards: int) -> tuple[int, int]:
    """First and one past the last of this shard's part of range(total)."""
    return total * shard // shards, total * (shard + 1) // shards


def make_plan(
    places: type[IntEnum], sizes: Mapping[Any, int], arrays: Mapping[Any, np.ndarray]
) -> np.ndarray:
    """A plan with `sizes` and the addresses of `arrays`, which the caller keeps alive; what neither names is 0."""
    plan = [0] * len(places)
    for place, value in sizes.items():
        plan[place] = value
    for place, array in arrays.items():
        plan[place] = address(array)
    return np.array(plan, np.int64)
