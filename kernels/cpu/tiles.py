"""Tiles as text: a stage's emitted equations between loads and stores, and their compilation into functions."""

from __future__ import annotations

import re
from typing import Any

from numba import njit

from ..derive import Cell
from . import math as vector_math
from .cache import unique_name
from .simd import INNER_OPTIONS, K, keep_n, load, load_byte, load_int, load_n, store, store_n

__all__ = ["aux_rows", "inline", "tile_functions"]


def inline(source: str, arguments: tuple[str, ...], results: list[str], indent: str) -> list[str]:
    """The body of an emitted function as statements that assign its results, all names prefixed by `_`, so that a cell's
    names can't meet the loop's. (Calling the function instead costs Numba a second of inlining.)"""

    def prefixed(match: re.Match[str]) -> str:
        name = match[0]
        return "_" + name if name in arguments or re.fullmatch(r"v\d+", name) else name

    body = [re.sub(r"\b[A-Za-z_]\w*", prefixed, line.strip()) for line in source.splitlines()[1:]]
    *statements, result = body
    targets = "".join(f"_{r}, " for r in results)
    values = result.removeprefix("return ").removesuffix(",") + ","
    return [*(indent + line for line in statements), f"{indent}{targets}= {values}"]


def aux_rows(cell: Cell, place: str) -> list[str]:
    """Statements that set x0, x_row0, x1, ...: an aux array's step t and row b, and the bytes to the next row."""
    at = lambda k, n: f"load_int(aux + {24 * k + 8 * n})"
    return [
        f"    x_row{k} = {at(k, 2)}; x{k} = {at(k, 0)} + t * {at(k, 1)} + b * x_row{k} {place}"
        for k in range(len(cell.aux))
    ]


def tile_functions(name: str, source: str) -> list[Any]:
    """`forward_tile` and `backward_tile` of the text `source`, ready to be compiled into a kernel."""
    scope = dict(
        vector_math.NAMES,
        K=K,
        load=load,
        store=store,
        load_n=load_n,
        store_n=store_n,
        keep_n=keep_n,
        load_int=load_int,
        load_byte=load_byte,
    )
    exec(compile(source, f"<cell {name}>", "exec"), scope)
    tiles = [scope["forward_tile"], scope["backward_tile"]]
    for tile in tiles:
        tile.__qualname__ = unique_name(tile.__name__, source)
    return [njit(**INNER_OPTIONS)(tile) for tile in tiles]
