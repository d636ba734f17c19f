"""Which backend runs an operation, chosen openly: argument, `with use_backend(...)`, NUMLSTM_BACKEND, the
array's own device, else CUDA when it is usable, else the CPU.

There is no silent fallback: naming a backend that can't be used raises with the reason, `lookup` says which
kernel serves an operation and why (`numlstm.explain` prints it layer by layer), and `strict` turns every
slower substitute into an error.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import cuda, ranges
from .base import IN_PRECISION, PRECISIONS, Backend, Kernel, lookup, register  # type: ignore[attr-defined]
from .cpu import CpuBackend

__all__ = [
    "IN_PRECISION",
    "PRECISIONS",
    "Backend",
    "Kernel",
    "adopt",
    "backend_of",
    "backends",
    "beside",
    "chosen_backend",
    "get_backend",
    "lookup",
    "moved",
    "namespace",
    "place_of",
    "register",
    "scalar",
    "to_numpy",
    "use_backend",
]

Array = Any

_CLASSES: dict[str, type[Backend]] = {"cpu": CpuBackend, "reference": Backend}
_INSTANCES: dict[tuple[str, bool, str], Backend] = {}
# The backend of the innermost `with use_backend(...)`, ready to use: an operation pays for one look at it.
_CHOSEN: ContextVar[Backend | None] = ContextVar("numlstm_backend", default=None)


def _instance(name: str, strict: bool = False, precision: str = "float32") -> Backend:
    key = name, strict, precision
    if key not in _INSTANCES:
        how: dict[str, Any] = {"strict": strict, "precision": precision}
        if name.startswith("cuda"):
            _INSTANCES[key] = cuda.CudaBackend(int(name.partition(":")[2] or 0), **how)
        else:
            _INSTANCES[key] = _CLASSES[name](**how)
    return _INSTANCES[key]


@functools.cache
def _auto() -> str:
    """What "auto" means here: CUDA where it is usable, else the CPU. A device that is there and can't be used is worth a
    word, once; a machine without one is not. Numba's simulator is for tests and never chosen unasked."""
    if cuda.simulated():
        return "cpu"
    reason = cuda.unavailable()
    if reason is None:
        return "cuda"
    if cuda.present():
        warnings.warn(f"numlstm runs on the CPU, CUDA can't be used: {reason}", RuntimeWarning, stacklevel=4)
    return "cpu"


def _resolve(name: str, source: str, strict: bool = False, precision: str = "float32") -> Backend:
    """The backend called `name`; `source` says who asked, for the error."""
    cuda_device = re.fullmatch(r"cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if cuda_device:
        index = int(cuda_device[1] or 0)
        if reason := cuda.unavailable(index):
            raise RuntimeError(f"{source}: the backend {name!r} can't be used here: {reason}")
        return _instance(f"cuda:{index}" if index else "cuda", strict, precision)
    if name == "auto":
        name = _auto()
        if name == "cuda":
            return _instance(name, strict, precision)
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
    if like is not None and type(like) is not np.ndarray and (place := place_of(like)) is not None:
        return _at(place)
    return _instance(_auto())


def chosen_backend() -> Backend | None:
    """The backend of the innermost `with use_backend(...)`, or None: for who asks often and keeps the answer of
    `get_backend`.

    >>> chosen_backend() is None
    True
    """
    return _CHOSEN.get()


@contextmanager
def use_backend(
    name: str | None = "auto", strict: bool = False, precision: str | None = None, *, like: Any = None
) -> Iterator[Backend]:
    """Run everything inside the `with` block on one backend; blocks nest, and threads do not see each
    other's. A block inside a strict one is strict.

    Arguments:
        name: as in `get_backend`; None keeps what is chosen already (to add `strict`).
        strict: raise where the backend has no kernel of its own (float64 on the CPU, say) instead of using
            NumPy.
        precision: of products of matrices (in recurrent and dense layers, `ops.matmul`): "float32"; "bfloat16"
            (operands rounded to 8 bits of mantissa, sums in float32); on a GPU "tf32" (11 bits); None keeps what is
            chosen already.
        like: an array whose device counts where nothing else decides.

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
    backend = (
        _instance(get_backend(like=like).name, **how) if name is None else _resolve(name, "backend", **how)
    )
    token = _CHOSEN.set(backend)
    try:
        if backend.xp is np:
            yield backend
        else:
            with backend.current():
                yield backend
    finally:
        _CHOSEN.reset(token)


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can be used or else the reason why not.

    >>> backends()["cpu"] is None
    True
    """
    return {"cpu": None, "cuda": cuda.unavailable(), "reference": None}


# Arrays and where they lie. Host memory is NumPy's; every other place has the name of the backend that works there.

# Arrays that are not NumPy's, by the package of their type.
_PLACES: dict[str, Callable[[Any], str]] = {"cupy": lambda a: f"cuda:{a.device.id}"}
_DLPACK = {2: "cuda", 13: "cuda"}  # its devices: kDLCUDA, kDLCUDAManaged
_BY_PLACE: dict[str, Backend] = {}


def place_of(a: Any) -> str | None:
    """The backend in whose memory an array lies, such as "cuda:0"; None for host memory, and for what is no array.

    >>> place_of(np.zeros(2)) is None
    True
    """
    kind = type(a)
    if kind is np.ndarray:
        return None
    named = _PLACES.get(kind.__module__.partition(".")[0])
    return None if named is None else named(a)


def _at(place: str) -> Backend:
    backend = _BY_PLACE.get(place)
    if backend is None:
        backend = _BY_PLACE[place] = _resolve(place, f"an array of {place}")
    return backend


def backend_of(a: Any) -> Backend:
    """The backend in whose memory an array lies; the CPU's for NumPy arrays.

    >>> backend_of(np.zeros(2)).name
    'cpu'
    """
    place = place_of(a)
    return _instance("cpu") if place is None else _at(place)


def namespace(a: Any) -> Any:
    """The module whose functions make and take arrays like this one: NumPy, or its backend's `xp`.

    >>> namespace(np.zeros(2)) is np
    True
    """
    return np if type(a) is np.ndarray else backend_of(a).xp


def adopt(a: Any) -> Array:
    """An array of any library as one of ours: a torch or JAX array on a GPU where it lies, by DLPack without a copy;
    everything else as a NumPy array.

    >>> adopt([1.0, 2.0])
    array([1., 2.])
    """
    if isinstance(a, np.ndarray) or place_of(a) is not None:
        return a
    if hasattr(a, "__dlpack_device__"):
        kind, index = a.__dlpack_device__()
        if kind in _DLPACK:
            return _at(f"{_DLPACK[kind]}:{index}").asarray(a)
    return np.asarray(a)


def moved(a: Any, backend: Backend, name: str) -> Array:
    """An array in the memory that `backend` works in; itself if it lies there. Arrays of the host go to every device,
    and every device's to the host.

    Arguments:
        a: an array of ours.
        backend: where to.
        name: the argument it came as, for the error.

    Raises:
        ValueError: the array lies on another device.

    >>> moved(np.ones(2), get_backend("cpu"), "x")
    array([1., 1.])
    """
    place = place_of(a)
    if place is None:
        if backend.xp is np:
            return a
        there = backend.asarray(a)
        if a.dtype.kind in "iu" and a.size:
            ranges.remember(there, *ranges.bounds(np.asarray(a)))
        return there
    if backend.xp is np:
        return to_numpy(a)
    if place != backend.place:
        raise ValueError(
            f"{name}: an array in the memory of {place} came, expected one of {backend.place} (or of NumPy): "
            f"arrays of two devices do not mix"
        )
    return a


def beside(a: Any, other: Array, name: str, dtype: Any = None) -> Array:
    """`a` in the memory in which `other` lies, and of this dtype if one is named; itself where it is so already.

    Arguments:
        a: an array of ours, a number, or a list of numbers.
        other: an array of ours.
        name: the argument that `a` came as, for the error.
        dtype: to convert to.

    Raises:
        ValueError: both lie on devices, and not on the same.

    >>> beside([1, 2], np.zeros(1), "mask", bool)
    array([ True,  True])
    """
    if type(other) is np.ndarray and type(a) is np.ndarray:
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    a = moved(adopt(a), backend_of(other), name)
    return a if dtype is None or a.dtype == dtype else a.astype(dtype)


def to_numpy(a: Any) -> np.ndarray:
    """An array of any device as a NumPy array.

    Raises:
        RuntimeError: what was to compute it went wrong on its device.
    """
    if type(a) is np.ndarray:
        return a
    place = place_of(a)
    if place is None:
        return np.asarray(a)
    found = a.get()
    _finish(place)
    return found


def scalar(a: Any) -> Any:
    """The one value that an array of any device holds, as a Python number.

    Raises:
        RuntimeError: what was to compute it went wrong on its device.

    >>> scalar(np.ones(1))
    1.0
    """
    found, place = a.item(), place_of(a)
    if place is not None:
        _finish(place)
    return found


def _finish(place: str) -> None:
    """Raise what went wrong where an array came from. This machine's backend for it need not be usable."""
    device, _, index = place.partition(":")
    if device == "cuda":
        cuda.finish(int(index))
