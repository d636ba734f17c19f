"""What the processor offers: floats a vector, vector registers, and the product tile that follows from them.

Read from the features LLVM reports for the host (or from NUMBA_CPU_FEATURES, as Numba does), never from a model name.
"""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm

__all__ = ["FEATURES", "LANES", "REGISTERS", "TILE_COLUMNS", "TILE_ROWS", "describe"]


def _features() -> frozenset[str]:
    given = os.environ.get("NUMBA_CPU_FEATURES")
    if given is not None:
        return frozenset(f[1:] for f in given.split(",") if f.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


FEATURES = _features()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

if "avx512f" in FEATURES:
    LANES, REGISTERS = 16, 32
elif "avx" in FEATURES:
    LANES, REGISTERS = 8, 16
else:  # NEON has 32 registers of 4 lanes, plain SSE 16
    LANES, REGISTERS = 4, 16 if IS_X86 else 32

# A tile of the product is TILE_ROWS x TILE_COLUMNS accumulators; beside them one row of weights and one broadcast must fit.
TILE_COLUMNS = 4 if REGISTERS >= 32 else 2
TILE_ROWS = (REGISTERS - TILE_COLUMNS - 1) // TILE_COLUMNS


def describe() -> str:
    """One line for `numlstm info`.

    >>> "lanes" in describe()
    True
    """
    name = {16: "AVX-512", 8: "AVX2" if "avx2" in FEATURES else "AVX", 4: "SSE" if IS_X86 else "NEON"}[LANES]
    return f"{name}: {LANES} lanes, {REGISTERS} registers, tile {TILE_ROWS} x {TILE_COLUMNS} vectors"
