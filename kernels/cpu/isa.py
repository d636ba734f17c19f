"""What the processor offers: floats a vector, vector registers, and the product tile that follows from them.

Read from the features that Numba compiles for, never from a model name: those of the host, less AVX where Numba avoids it
(NUMBA_ENABLE_AVX), or what NUMBA_CPU_FEATURES or NUMBA_CPU_NAME=generic say. A vector wider than that would not compile.
"""

from __future__ import annotations

import platform

from numba.core import config
from numba.core.codegen import get_host_cpu_features

__all__ = ["DOT_BF16", "FEATURES", "LANES", "REGISTERS", "TILE_COLUMNS", "TILE_ROWS", "describe"]


def _features() -> frozenset[str]:
    text = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset(f[1:] for f in text.split(",") if f.startswith("+"))


FEATURES = _features()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

if "avx512f" in FEATURES:
    LANES, REGISTERS = 16, 32
elif "avx" in FEATURES:
    LANES, REGISTERS = 8, 16
else:  # NEON has 32 registers of 4 lanes, plain SSE 16
    LANES, REGISTERS = 4, 16 if IS_X86 else 32

# Products of bfloat16 pairs in one instruction (VDPBF16PS); elsewhere they are float32 multiply-adds on expanded values.
DOT_BF16 = LANES == 16 and "avx512bf16" in FEATURES

# A tile of the product is TILE_ROWS x TILE_COLUMNS accumulators; beside them one row of weights and one broadcast must fit.
TILE_COLUMNS = 4 if REGISTERS >= 32 else 2
TILE_ROWS = (REGISTERS - TILE_COLUMNS - 1) // TILE_COLUMNS


def describe() -> str:
    """One line for `numlstm info`.

    >>> "lanes" in describe()
    True
    """
    name = {16: "AVX-512", 8: "AVX2" if "avx2" in FEATURES else "AVX", 4: "SSE" if IS_X86 else "NEON"}[LANES]
    dot = ", bfloat16 products" if DOT_BF16 else ""
    return f"{name}: {LANES} lanes, {REGISTERS} registers, tile {TILE_ROWS} x {TILE_COLUMNS} vectors{dot}"
