"""From a kernel's Python text to a cubin in the cache, by Numba's CUDA compiler and NVIDIA's linker; no driver is needed.

Numba's own disk cache keys a function by its file, and refuses text that is not in one; what is made from a cell has none.
So the linked binary is kept here, in a file whose name hashes all that it is made from: the text, the signature, the
architecture, this package's sources, the versions of Python and of the compilers. A start that finds its kernels loads
them through CuPy and imports no compiler. The folder is that of the CPU's kernels (cpu/cache.py: NUMLSTM_CACHE_DIR); where
it can't be written kernels are compiled again each time.

A kernel takes addresses (`real`, `operand`, ...: one 8-byte parameter an array, where a Numba array takes seven) and
numbers; `Parameter` names the kinds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ..cpu.cache import directory, made
from .math import functions

__all__ = ["Kernel", "Parameter", "compile_cubin", "cubin", "from_text", "kept", "linked", "parameters"]


class Parameter(NamedTuple):
    """A kernel's argument: `kind` is "real", "flag" (uint8), "int64", "bits" (uint16), all addresses; or the numbers
    "int", "index" (64 bits), "number" (of the kernel's float type) and "word" (uint32)."""

    name: str
    kind: str


class Kernel(NamedTuple):
    """What to compile: `make` gives the kernel's Python function, and `text` is all that it depends on besides this
    package's sources, its name, its parameters and `dtype`, the float type it is for."""

    name: str
    parameters: tuple[Parameter, ...]
    dtype: str
    make: Callable[[], Callable[..., Any]]
    text: str = ""


def from_text(name: str, source: str, parameters: tuple[Parameter, ...], dtype: str) -> Kernel:
    """A kernel made of text: functions, marked `@jit` where the last of them, called `kernel`, uses them."""

    def make() -> Callable[..., Any]:
        from numba import cuda

        scope = {"__name__": __name__, "cuda": cuda, "jit": cuda.jit(device=True), **functions(dtype)}
        exec(compile(source, f"<kernel {name}>", "exec"), scope)
        return scope["kernel"]

    return Kernel(name, parameters, dtype, make, source)


def _signature(kernel: Kernel) -> Any:
    from numba import types

    real = {"float32": types.float32, "float64": types.float64}[kernel.dtype]
    kinds = {
        "real": types.CPointer(real), "flag": types.CPointer(types.uint8), "bits": types.CPointer(types.uint16),
        "int64": types.CPointer(types.int64), "int": types.int32, "index": types.int64, "number": real,
        "word": types.uint32,
    }  # fmt: skip
    return types.void(*(kinds[p.kind] for p in kernel.parameters))


def compile_cubin(kernel: Kernel, arch: tuple[Any, ...]) -> tuple[str, bytes]:
    """The kernel's name in its binary, and the binary, for an architecture such as (8, 0) or (9, 0, "a")."""
    from numba import cuda

    ptx, _ = cuda.compile(kernel.make(), _signature(kernel), cc=arch, output="ptx", device=False, abi="numba")
    return linked(ptx, arch)


def linked(ptx: str, arch: tuple[Any, ...]) -> tuple[str, bytes]:
    """The name of the one kernel in some PTX, and its binary for an architecture.

    Raises:
        ImportError: cuda-core is missing.
    """
    try:
        from cuda.core import Linker, LinkerOptions, ObjectCode
    except ImportError as error:
        raise ImportError(
            f"kernels for CUDA need cuda-core: pip install 'numlstm[cuda13]' ({error})"
        ) from error
    (entry,) = re.findall(r"\.visible \.entry (\w+)\(", ptx)
    options = LinkerOptions(arch="sm_" + "".join(map(str, arch)))
    return entry, bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


def _hash_of_sources() -> str:
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), *(here / "persistent" / n for n in ("compile.py", "places.py"))]
    files.append(here.parent / "derive.py")
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


_SOURCES = _hash_of_sources()  # at import, as in cpu/cache.py


@cache
def _surroundings() -> str:
    """Everything besides a kernel's text that its binary is made from."""
    compilers = {}
    for package in (
        "numba",
        "numba-cuda",
        "cuda-core",
        "nvidia-nvvm",
        "nvidia-cuda-nvcc-cu12",
        "nvidia-nvjitlink",
        "nvidia-nvjitlink-cu12",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            compilers[package] = metadata.version(package)
    return repr((_SOURCES, sys.version, compilers))


def cubin(kernel: Kernel, arch: tuple[Any, ...]) -> tuple[str, bytes]:
    """`compile_cubin`, or what an earlier process compiled."""
    what = (kernel.name, kernel.parameters, kernel.dtype, kernel.text, arch)
    return kept(kernel.name, what, lambda: compile_cubin(kernel, arch))


def kept(label: str, what: Any, make: Callable[[], tuple[str, bytes]]) -> tuple[str, bytes]:
    """A kernel's name in its binary, and the binary, as `make` gives them, or as an earlier process kept them.

    Arguments:
        label: for people, in the file's name.
        what: all that the binary is made from, besides this package's sources and the compilers; its repr is hashed.
    """
    key = hashlib.sha256(repr((_surroundings(), what)).encode()).hexdigest()
    folder = directory()
    path = None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9_]', '_', label)}-{key[:24]}.cubin"
    if path is not None:
        found = _read(path)
        if found is not None:
            made.loaded += 1
            return found
    entry, binary = make()
    made.compiled += 1
    if path is not None:
        with contextlib.suppress(OSError):  # nowhere to write: the binary serves this process
            _write(path, entry, binary)
    return entry, binary


def _read(path: Path) -> tuple[str, bytes] | None:
    """What a file holds; None if it is not there, or not whole."""
    try:
        head, _, binary = path.read_bytes().partition(b"\n")
        entry, digest = head.decode("ascii").split(" ")
    except (OSError, ValueError):
        return None
    return (entry, binary) if hashlib.sha256(binary).hexdigest() == digest else None


def _write(path: Path, entry: str, binary: bytes) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(f"{entry} {hashlib.sha256(binary).hexdigest()}\n".encode("ascii") + binary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def parameters(**kinds: Sequence[str] | str) -> tuple[Parameter, ...]:
    """Parameters by kind, in order: parameters(real="x y", int="n") gives x, y and n."""
    return tuple(
        Parameter(name, kind)
        for kind, names in kinds.items()
        for name in (names.split() if isinstance(names, str) else names)
    )
