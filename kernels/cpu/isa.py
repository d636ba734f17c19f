"""What the processor offers: floats a vector, vector registers, and the product tile that follows from them.

Read from the features that Numba compiles for, never from a model name: those of the host, less AVX where Numba avoids it
(NUMBA_ENABLE_AVX), or what NUMBA_CPU_FEATURES or NUMBA_CPU_NAME=generic say. A vector wider than that would not compile.

AMX's tiles stand beside the vectors, in Intel's servers since 2023. Linux gives them to a process that asks for them
(Documentation/arch/x86/xstate.rst of its sources), once, for all its threads and the processes it forks. NUMLSTM_AMX=0 does
without them; NUMLSTM_AMX=emulated runs their kernels on AVX-512 by functions in place of the instructions, hundreds of times
slower, for tests.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

from numba.core import config
from numba.core.codegen import get_host_cpu_features

__all__ = [
    "DOT_BF16",
    "FEATURES",
    "LANES",
    "REGISTERS",
    "ROW_COLUMNS",
    "TILE_COLUMNS",
    "TILE_ROWS",
    "describe",
    "tiles",
    "why_no_tiles",
]


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
# A row by itself has a sum a vector, each waiting for the one before (4 cycles, two begun in each): so many keep them busy.
ROW_COLUMNS = 8

AMX_SWITCH = os.environ.get("NUMLSTM_AMX", "1")
if AMX_SWITCH not in ("0", "1", "emulated"):
    raise ValueError(
        f"NUMLSTM_AMX is {AMX_SWITCH!r}; expected 1 (where the processor has AMX), 0 or emulated"
    )
if AMX_SWITCH == "emulated" and LANES != 16:
    raise ValueError(f"NUMLSTM_AMX is 'emulated', which needs AVX-512's 16 lanes; this process has {LANES}")
AMX_PARTS = ("bf16", "int8")  # the kinds of products


@cache
def _permitted() -> bool:
    """Ask the system for the tiles' registers: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). Other systems have
    other ways, and count as refusing."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def _amx(part: str) -> tuple[str | None, str]:
    """How products of `part` run in tiles, and in words why they do not, where that is not plain."""
    if AMX_SWITCH == "emulated":
        return "emulated", ""
    # The code around tiles has a register's 16 columns in a vector.
    if LANES != 16 or not {"amx-tile", f"amx-{part}"} <= FEATURES:
        return None, ""
    if AMX_SWITCH == "0":
        return None, "AMX switched off (NUMLSTM_AMX)"
    return ("amx", "") if _permitted() else (None, "AMX not permitted by the system")


def tiles(part: str) -> str | None:
    """How products of "bf16" or "int8" run in AMX's tiles: "amx", "emulated", or None where they do not."""
    return _amx(part)[0]


def why_no_tiles(part: str) -> str:
    """Why `tiles` gives None, where the processor has them; else nothing."""
    return _amx(part)[1]


def describe() -> str:
    """One line for `numlstm info`.

    >>> "lanes" in describe()
    True
    """
    name = {16: "AVX-512", 8: "AVX2" if "avx2" in FEATURES else "AVX", 4: "SSE" if IS_X86 else "NEON"}[LANES]
    dot = ", bfloat16 products" if DOT_BF16 else ""
    forms = {part: tiles(part) for part in AMX_PARTS}
    parts = ", ".join(part for part, form in forms.items() if form is not None)
    amx = ", " + why_no_tiles("bf16") if why_no_tiles("bf16") else ""
    if parts:
        amx = f", AMX tiles{' emulated' if 'emulated' in forms.values() else ''} ({parts})"
    return (
        f"{name}: {LANES} lanes, {REGISTERS} registers, tile {TILE_ROWS} x {TILE_COLUMNS} vectors{dot}{amx}"
    )
