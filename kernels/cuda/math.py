"""The functions of the cell language on a CUDA thread, for one float type.

Emitted equations (derive.py) and the kernels of this package find them by name. NaN and infinity travel as in NumPy:
`maximum` and `minimum` hand a NaN on, `sigmoid` and `softplus` overflow on neither side. In Numba's simulator, where a
thread is Python's, the same names are bound to NumPy's functions.

`K` turns a number into one of the float type, `real` is Numba's name of that, `u64` a number into 64 unsigned bits.
`round_bits` gives the bits of the nearest bfloat16, ties to even, `round_bfloat16` and `round_tf32` the nearest value with
8 and 11 significant bits (kernels/rounding.py).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import config, cuda, float32, float64, int32, int64, uint16, uint64

from ..reference import NAMES as NUMPY_NAMES
from ..rounding import bfloat16_bits, operand

__all__ = ["functions"]

REAL: dict[str, Any] = {"float32": float32, "float64": float64}
SIMULATED = bool(config.ENABLE_CUDASIM)


@cache
def functions(dtype: str) -> dict[str, Any]:
    """The names that kernels of float type `dtype` may use.

    >>> sorted(functions("float32"))[:4]
    ['K', 'exp', 'log', 'maximum']
    """
    return _simulated(dtype) if SIMULATED else _compiled(dtype)


def _simulated(dtype: str) -> dict[str, Any]:
    scalar = np.dtype(dtype).type

    def typed(function: Any) -> Any:
        return lambda *a: scalar(function(*a))

    names = {name: typed(f) for name, f in NUMPY_NAMES.items()}
    names |= {
        "shared_part": np.empty(1024, dtype),
        "real": REAL[dtype],
        "u64": np.uint64,
        "round_bits": lambda x: bfloat16_bits(x)[0],
        "round_bfloat16": lambda x: operand(np.full(1, x, dtype), "bfloat16")[0],
        "round_tf32": lambda x: operand(np.full(1, x, dtype), "tf32")[0],
    }
    return names


def _compiled(dtype: str) -> dict[str, Any]:
    from numba.cuda import libdevice

    K = REAL[dtype]

    @cuda.jit(device=True)
    def exp(x):
        return math.exp(x)

    @cuda.jit(device=True)
    def log(x):
        return math.log(x)

    @cuda.jit(device=True)
    def sqrt(x):
        return math.sqrt(x)

    @cuda.jit(device=True)
    def tanh(x):
        return math.tanh(x)

    @cuda.jit(device=True)
    def sigmoid(x):
        t = math.exp(-abs(x))
        r = K(1) / (K(1) + t)
        return r if x >= K(0) else t * r

    @cuda.jit(device=True)
    def softplus(x):
        t = math.log1p(math.exp(-abs(x)))
        return x + t if x > K(0) else t

    @cuda.jit(device=True)
    def maximum(a, b):
        return a if a > b or a != a else b

    @cuda.jit(device=True)
    def minimum(a, b):
        return a if a < b or a != a else b

    @cuda.jit(device=True)
    def where(c, a, b):
        return a if c else b

    @cuda.jit(device=True)
    def round_bits(x):
        w = int64(libdevice.float_as_int(float32(x))) & 0xFFFFFFFF
        if w & 0x7FFFFFFF > 0x7F800000:  # a NaN stays one
            return uint16((w >> 16) | 0x40)
        return uint16((w + 0x7FFF + ((w >> 16) & 1)) >> 16)

    @cuda.jit(device=True)
    def round_bfloat16(x):
        return K(libdevice.int_as_float(int32(int64(round_bits(x)) << 16)))

    @cuda.jit(device=True)
    def round_tf32(x):
        w = int64(libdevice.float_as_int(float32(x))) & 0xFFFFFFFF
        if w & 0x7FFFFFFF < 0x7F800000:
            w = (w + 0xFFF + ((w >> 13) & 1)) & 0xFFFFE000
        return K(libdevice.int_as_float(int32(w)))

    return {
        "K": K, "real": K, "u64": uint64, "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh,
        "sigmoid": sigmoid, "softplus": softplus, "maximum": maximum, "minimum": minimum, "where": where,
        "round_bits": round_bits, "round_bfloat16": round_bfloat16, "round_tf32": round_tf32,
    }  # fmt: skip
