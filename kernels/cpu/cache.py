"""Numba's disk cache under our own key: the text a kernel is made from, never the place where its factory stands.

Numba keys a cached function by its name and its file's date. A kernel here is a factory's product over emitted text, and
under Numba's key an edited cell is served its old kernel, and two processes that build different cells at once can get
each other's. So file name and index key are a hash of the emitted text, the compiler options and the sources of this
package, the versions of Python and Numba, and the processor. One name always means one content, whoever writes it.

The directory: NUMLSTM_CACHE_DIR (empty: no cache), else the platform's user cache directory. Where it can't be written,
kernels compile in memory: it costs time, nothing else. The classes extended are private to Numba (`numba.core.caching`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core import caching
from numba.core.registry import cpu_target

from .simd import JIT_OPTIONS

__all__ = ["compile_address", "compile_kernel", "directory", "is_cached", "made", "problem"]


def directory() -> Path | None:
    """Where compiled kernels are kept, or None when there is to be no caching."""
    given = os.environ.get("NUMLSTM_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "numlstm"
    except RuntimeError:  # the user has no home directory
        return None


def problem() -> str | None:
    """Why compiled kernels can't be kept, or None where they can."""
    path = directory()
    if path is None:
        return "there is no cache directory (NUMLSTM_CACHE_DIR is empty, or the user has no home)"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return f"{path} can't be written ({error.strerror or error})"


class _Made:
    """How many kernels this process has compiled, and how many it has loaded from the cache."""

    compiled: int = 0
    loaded: int = 0


made: _Made = _Made()


def _hash_of_sources() -> str:
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "derive.py"]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


_SOURCES = (
    _hash_of_sources()
)  # at import: later the files may be those of an upgrade that this process does not run


@cache
def _surroundings() -> str:
    """Everything besides a cell's text that kernels are made from: this package's sources, the compiler, the processor."""
    processor = cpu_target.target_context.codegen().magic_tuple()
    return repr((_SOURCES, sys.version, numba.__version__, llvmlite.__version__, processor))


def _stable(options: dict[str, Any]) -> str:
    """The options as text; sets sorted, since a set's repr changes from process to process."""
    return repr(sorted((k, sorted(v) if isinstance(v, set) else v) for k, v in options.items()))


def unique_name(name: str, text: str) -> str:
    """A name that means one content, for functions made by a factory.

    Numba makes a symbol of a function's name and a count within its process, and of two symbols with one name loaded from
    the cache the first serves both: two cells first compiled by two processes would run one's equations for both.
    """
    return f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _key(name: str, text: str) -> str:
    return hashlib.sha256("\0".join((_surroundings(), _stable(JIT_OPTIONS), name, text)).encode()).hexdigest()


def _file_name(name: str, key: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}-{key[:24]}"


def is_cached(name: str, text: str) -> bool:
    """Whether `compile_kernel` would find the kernel in the cache, for all that its file's name tells."""
    path = directory()
    return path is not None and any(path.glob(f"{_file_name(name, _key(name, text))}*.nbi"))


class _KeyedCache(caching.FunctionCache):
    def __init__(self, function: Callable[..., Any], name: str, key: str, path: str) -> None:
        self._key = key

        class Locator(caching._CacheLocator):
            _py_file = name

            def get_cache_path(self) -> str:
                return path

            def get_source_stamp(self) -> str:
                return key

            def get_disambiguator(self) -> str:
                return key[:16]

            @classmethod
            def from_function(cls, py_func: Any, py_file: Any) -> Any:
                return cls()

        class Implementation(caching.CompileResultCacheImpl):
            _locator_classes = [Locator]  # noqa: RUF012 (Numba's own protocol)

            def __init__(self, py_func: Any) -> None:
                super().__init__(py_func)
                self._filename_base = _file_name(name, key)

        self._impl_class = Implementation
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self._key

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # what a damaged file raises is not bounded; it is a miss
            with contextlib.suppress(OSError):
                self.flush()  # a damaged index could not take the new entry
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # nowhere to write: the compiled kernel serves this process
            super().save_overload(sig, data)


def compile_kernel(function: Callable[..., Any], name: str, text: str, signature: Any) -> Any:
    """Compile `function` for `signature`, or load it from the cache.

    Args:
        function: what to compile; it may close over vector operations and emitted functions.
        name: for file names and error messages.
        text: all that the function depends on besides this package's sources: emitted source and constants.
        signature: Numba types of the result and of the arguments.

    Returns what can be called from Python; its `address` is that of the same function by C's calling convention.
    """
    key = _key(name, text)
    function.__qualname__ = unique_name(name, key)
    dispatcher = njit(**JIT_OPTIONS)(function)
    path = directory()
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            dispatcher._cache = _KeyedCache(function, name, key, str(path))
        except OSError:
            pass  # the directory can't be made: compile in memory
    dispatcher.compile(signature)
    if dispatcher.stats.cache_hits:
        made.loaded += 1
    else:
        made.compiled += 1
    dispatcher.disable_compile()
    (compiled,) = dispatcher.overloads.values()
    dispatcher.address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return dispatcher


_KEEP_LOADED: list[Any] = []  # an address is good while its library is loaded


def compile_address(function: Callable[..., Any], name: str, text: str, signature: Any) -> int:
    """`compile_kernel`, for a function that only other kernels call: its address."""
    kernel = compile_kernel(function, name, text, signature)
    _KEEP_LOADED.append(kernel)
    return kernel.address
