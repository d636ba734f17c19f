"""Tiles as text: a stage's emitted equations between loads and stores, and their compilation.

A compiled tile is called by its address, which plans hold: so the loops around tiles are compiled once for all cells."""

from __future__ import annotations

import re
from typing import Any

from numba import types

from ..derive import Cell
from . import math as vector_math
from .cache import compile_address
from .isa import LANES
from .layout import Layout
from .simd import (
    K,
    caller,
    keep_n,
    load,
    load_byte,
    load_int,
    load_n,
    store,
    store_bf16,
    store_bf16_n,
    store_n,
)

__all__ = ["aux_rows", "call_forward_tile", "compile_tile", "inline", "store_rows"]

call_forward_tile: Any = caller(7)  # p, s, s_step, rows, t, b, u


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


def store_rows(lay: Layout, values: list[str], at: str, indent: str) -> list[str]:
    """Statements that store the gates' gradients row-major at d, h4 bytes apart: of each its first n lanes."""
    place = [f"d + {k} * h4 + {at}" for k in range(len(values))]
    if lay.precision == "float32":
        return [f"{indent}store_n({z}, {value}, n)" for z, value in zip(place, values, strict=True)]
    whole = [f"{indent}    store_bf16({z}, {value})" for z, value in zip(place, values, strict=True)]
    part = [f"{indent}    store_bf16_n({z}, {value}, n)" for z, value in zip(place, values, strict=True)]
    return [f"{indent}if n >= {LANES}:", *whole, f"{indent}else:", *part] if values else []


def compile_tile(source: str, name: str) -> int:
    """Compile the tile function that is the text `source`, all of whose arguments are int64; its address."""
    scope = dict(
        vector_math.NAMES,
        __name__=__name__,  # without a module Numba would pickle all of these, and the builtins too
        K=K,
        load=load,
        store=store,
        load_n=load_n,
        store_n=store_n,
        store_bf16=store_bf16,
        store_bf16_n=store_bf16_n,
        keep_n=keep_n,
        load_int=load_int,
        load_byte=load_byte,
    )
    tile = source.split("(", 1)[0].removeprefix("def ")
    exec(compile(source, f"<{tile} of {name}>", "exec"), scope)
    arguments = source.split(")", 1)[0].count(",") + 1
    return compile_address(scope[tile], f"{name}_{tile}", source, types.void(*[types.int64] * arguments))
