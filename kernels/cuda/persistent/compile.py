"""From a kernel's text to a cubin: Numba makes PTX, nvJitLink machine code. Needs no GPU and no driver.

So the tests compile on any machine what a GPU will run. The public interfaces only: `numba.cuda.compile` and
`cuda.core.Linker`. Machine code is kept where compiled CPU kernels are (cpu/cache.py), under a hash of the text, of ptx.py,
of the arguments' types, the architecture and the compilers' versions; a file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...cpu.cache import directory

__all__ = ["Built", "build", "kinds"]

ENTRY = re.compile(r"\.visible \.entry (\w+)\(")


class Built(NamedTuple):
    """Machine code, and the kernel's name in it."""

    cubin: bytes
    name: str


def kinds(names: list[str]) -> str:
    """One letter for each of a kernel's arguments (emit.py): pointers to "u" uint32, "f" float32, "b" uint8; "i" numbers."""
    words = ("W", "F", "DG", "DX", "E")
    letter = lambda n: "u" if n in words else "b" if n == "VALID" else "f"
    return "".join("i" if n in ("T", "B", "limit") or "_" in n else letter(n) for n in names)


def architecture(capability: tuple[int, int]) -> str:
    """The target's name: on 9.0 with its own instructions, as Numba compiles there."""
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")


@cache
def _versions() -> str:
    names = (
        "numba-cuda",
        "cuda-core",
        "nvidia-nvjitlink",
        "nvidia-nvvm",
        "nvidia-cuda-nvcc-cu12",
        "nvidia-nvjitlink-cu12",
    )
    found = []
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


@cache
def build(text: str, arguments: str, warps: int, capability: tuple[int, int]) -> Built:
    """Compile the function `kernel` in `text`, for blocks of `warps` warps; `arguments` as `kinds` gives them.

    Raises:
        ImportError: numba-cuda or cuda-core is missing.
    """
    source = Path(__file__).parent.parent / "ptx.py"
    described = repr((text, arguments, warps, capability, _versions())).encode()
    key = hashlib.sha256(source.read_bytes() + described).hexdigest()
    folder = directory()
    path = None if folder is None else folder / f"persistent-{architecture(capability)}-{key[:32]}.cubin"
    if path is not None:
        with suppress(OSError):
            whole = path.read_bytes()
            digest, name, cubin = whole.split(b"\n", 2)
            if digest.decode() == hashlib.sha256(cubin).hexdigest():
                return Built(cubin, name.decode())
    built = _compile(text, arguments, warps, capability)
    if path is not None:
        content = (
            hashlib.sha256(built.cubin).hexdigest().encode()
            + b"\n"
            + built.name.encode()
            + b"\n"
            + built.cubin
        )
        with suppress(OSError):  # nowhere to write: what is compiled serves this process
            _write(path, content)
    return built


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _compile(text: str, arguments: str, warps: int, capability: tuple[int, int]) -> Built:
    try:
        from cuda.core import Linker, LinkerOptions, ObjectCode
        from numba import cuda
        from numba.cuda import types
    except ImportError as error:
        needed = "numba-cuda and cuda-core: pip install numlstm[cuda13]"
        raise ImportError(f"kernels for CUDA need {needed} ({error})") from error
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
    found = ENTRY.findall(code)
    assert len(found) == 1, found
    options = LinkerOptions(arch=architecture(capability))
    linked = Linker(ObjectCode.from_ptx(code.encode()), options=options).link("cubin")
    return Built(linked.code, found[0])
