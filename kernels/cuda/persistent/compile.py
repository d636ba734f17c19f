"""From a kernel's text to a cubin: Numba makes PTX, nvJitLink machine code. Needs no GPU and no driver.

So the tests compile on any machine what a GPU will run. The public interfaces only: `numba.cuda.compile` and
`cuda.core.Linker`. Machine code is linked and kept as that of all CUDA kernels (../compiler.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..compiler import kept, linked

__all__ = ["Built", "build", "kinds"]


class Built(NamedTuple):
    """Machine code, and the kernel's name in it."""

    cubin: bytes
    name: str


def kinds(names: list[str]) -> str:
    """One letter for each of a kernel's arguments (emit.py): pointers to "u" uint32, "f" float32, "b" uint8; "i" numbers."""
    words = ("W", "F", "DG", "DX", "E")
    letter = lambda n: "u" if n in words else "b" if n == "VALID" else "f"
    return "".join("i" if n in ("T", "B", "groups", "limit") or "_" in n else letter(n) for n in names)


@cache
def build(text: str, arguments: str, warps: int, capability: tuple[int, int]) -> Built:
    """Compile the function `kernel` in `text`, for blocks of `warps` warps; `arguments` as `kinds` gives them. On 9.0 with
    that architecture's own instructions, as Numba compiles there.

    Raises:
        ImportError: numba-cuda or cuda-core is missing.
    """
    arch = (*capability, "a") if capability == (9, 0) else capability
    what = (text, arguments, warps, arch)
    name, cubin = kept("persistent", what, lambda: linked(_ptx(text, arguments, warps, capability), arch))
    return Built(cubin, name)


def _ptx(text: str, arguments: str, warps: int, capability: tuple[int, int]) -> str:
    from numba import cuda
    from numba.cuda import types

    from .. import ptx

    scope: dict[str, Any] = {name: getattr(ptx, name) for name in ptx.__all__}
    scope |= {"cuda": cuda, "float32": np.float32, "uint32": np.uint32, "K": np.float32}
    exec(compile(text, "<persistent kernel>", "exec"), scope)
    pointers = {"u": types.uint32, "f": types.float32, "b": types.uint8}
    signature = types.void(
        *(types.CPointer(pointers[k]) if k in pointers else types.int64 for k in arguments)
    )
    code, _ = cuda.compile(
        scope["kernel"], signature, device=False, abi="numba", cc=capability, output="ptx", launch_bounds=(32 * warps, 1)
    )  # fmt: skip
    return code
