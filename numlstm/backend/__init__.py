"""Which backend runs an operation, chosen openly: argument, `with use_backend(...)`, NUMLSTM_BACKEND, the
array's own device, else CUDA when it is usable, else the CPU.

There is no silent fallback: naming a backend that can't be used raises with the reason, `lookup` says which
kernel serves an operation and why (`numlstm.explain` prints it layer by layer), and `strict` turns every
slower substitute into an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import cuda
from .base import IN_PRECISION, PRECISIONS, Backend, Kernel, lookup, register
from .cpu import CpuBackend

__all__ = [
    "IN_PRECISION",
    "PRECISIONS",
    "Backend",
    "Kernel",
    "backends",
    "chosen_backend",
    "get_backend",
    "lookup",
    "register",
    "to_numpy",
    "use_backend",
]

_CLASSES: dict[str, type[Backend]] = {"cpu": CpuBackend, "reference": Backend}
_INSTANCES: dict[tuple[str, bool, str], Backend] = {}
# The backend of the innermost `with use_backend(...)`, ready to use: an operation pays for one look at it.
_CHOSEN: ContextVar[Backend | None] = ContextVar("numlstm_backend", default=None)


def _instance(name: str, strict: bool = False, precision: str = "float32") -> Backend:
    key = name, strict, precision
    if key not in _INSTANCES:
        _INSTANCES[key] = _CLASSES[name](strict=strict, precision=precision)
    return _INSTANCES[key]


def _resolve(name: str, source: str, strict: bool = False, precision: str = "float32") -> Backend:
    """The backend called `name`; `source` says who asked, for the error."""
    cuda_device = re.fullmatch(r"cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if cuda_device:
        reason = cuda.unavailable(int(cuda_device[1] or 0))
        raise RuntimeError(f"{source}: the backend {name!r} can't be used here: {reason}")
    if name == "auto":
        name = "cpu"  # CUDA would come first; it is never usable in this version
    if name not in _CLASSES:
        raise ValueError(f"{source}: {name!r} came, expected auto, cpu, cuda, cuda:N or reference")
    return _instance(name, strict, precision)


def get_backend(name: str | None = None, *, like: Any = None) -> Backend:
    """The backend to run on.

    Arguments:
        name: "cpu", "reference", "cuda", "cuda:1" or "auto"; None to choose in the order above.
        like: an array whose device counts where nothing else decides.

    Raises:
        ValueError: an unknown name, in the argument or in NUMLSTM_BACKEND.
        RuntimeError: CUDA is named and can't be used; the message says why.

    >>> get_backend("reference").name
    'reference'
    """
    chosen = _CHOSEN.get()
    if name is not None:
        how = {} if chosen is None else {"strict": chosen.strict, "precision": chosen.precision}
        return _resolve(name, "backend", **how)
    if chosen is not None:
        return chosen
    from_environment = os.environ.get("NUMLSTM_BACKEND")
    if from_environment:
        return _resolve(from_environment, "NUMLSTM_BACKEND")
    if like is not None and type(like).__module__.partition(".")[0] == "cupy":
        return _resolve("cuda", "an array on a CUDA device")
    return _instance("cpu")


def chosen_backend() -> Backend | None:
    """The backend of the innermost `with use_backend(...)`, or None: for who asks often and keeps the answer of
    `get_backend`.

    >>> chosen_backend() is None
    True
    """
    return _CHOSEN.get()


@contextmanager
def use_backend(
    name: str | None = "auto", strict: bool = False, precision: str | None = None
) -> Iterator[Backend]:
    """Run everything inside the `with` block on one backend; blocks nest, and threads do not see each
    other's. A block inside a strict one is strict.

    Arguments:
        name: as in `get_backend`; None keeps what is chosen already (to add `strict`).
        strict: raise where the backend has no kernel of its own (float64 on the CPU, say) instead of using
            NumPy.
        precision: of products of matrices (in recurrent and dense layers, `ops.matmul`): "float32", or "bfloat16"
            (operands rounded to 8 bits of mantissa, sums in float32); None keeps what is chosen already.

    Raises:
        ValueError, RuntimeError: as `get_backend`; ValueError also for an unknown precision.

    >>> with use_backend("reference") as b:
    ...     get_backend() is b
    True
    """
    outer = _CHOSEN.get()
    strict = strict or (outer is not None and outer.strict)
    if precision is None:
        precision = "float32" if outer is None else outer.precision
    how = {"strict": strict, "precision": precision}
    backend = _instance(get_backend().name, **how) if name is None else _resolve(name, "backend", **how)
    token = _CHOSEN.set(backend)
    try:
        yield backend
    finally:
        _CHOSEN.reset(token)


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can be used or else the reason why not.

    >>> backends()["cpu"] is None
    True
    """
    return {"cpu": None, "cuda": cuda.unavailable(), "reference": None}


def to_numpy(a: Any) -> np.ndarray:
    """An array of any device as a NumPy array."""
    return a.get() if type(a).__module__.partition(".")[0] == "cupy" else np.asarray(a)
