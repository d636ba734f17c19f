"""The CUDA backend: NVIDIA GPUs through CuPy and Numba; and why one can't be used, where that is so.

`unavailable` looks without importing CUDA packages for as long as something else is missing: whether the driver's library
loads, finds the device and is new enough (CUDA driver API: cuInit, cuDeviceGetCount, ...), whether CuPy and numba-cuda are
there, for one and the same CUDA, and whether CuPy finds cuBLAS. With NUMBA_ENABLE_CUDASIM=1 the backend runs in Numba's
simulator on NumPy arrays, where a CUDA thread costs a tenth of a millisecond: for tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from .base import Backend, lookup, register

__all__ = ["CudaBackend", "describe", "finish", "present", "simulated", "unavailable"]

OLDEST = {12: (6, 0), 13: (7, 5)}  # the least compute capability, by CUDA's major version
_INSTALL = "pip install 'numlstm[cuda13]', or 'numlstm[cuda12]' for a driver of CUDA 12"


def simulated() -> bool:
    """Whether Numba's CUDA simulator is on: NUMBA_ENABLE_CUDASIM, as Numba reads it.

    >>> simulated()
    False
    """
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0").strip() not in ("", "0")


class _Driver(NamedTuple):
    """What the driver says: the newest CUDA it serves, such as (12, 4), and each device's compute capability."""

    cuda: tuple[int, int]
    devices: tuple[tuple[int, int], ...]


@functools.cache
def _devices() -> _Driver | str:
    """The driver's answers, or what stopped them."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} does not load)"

    def ask(call: str, *arguments: Any) -> int:
        answer = ctypes.c_int(0)
        status = getattr(driver, call)(ctypes.byref(answer), *arguments)
        if status:
            raise OSError(f"the NVIDIA driver reports error {status}")
        return answer.value

    status = driver.cuInit(0)
    if status == 100:  # CUDA_ERROR_NO_DEVICE
        return "no CUDA device"
    if status:
        return f"the NVIDIA driver reports error {status}"
    try:
        version = ask("cuDriverGetVersion")
        handles = [ask("cuDeviceGet", k) for k in range(ask("cuDeviceGetCount"))]
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        capabilities = tuple(
            (ask("cuDeviceGetAttribute", 75, d), ask("cuDeviceGetAttribute", 76, d)) for d in handles
        )
    except OSError as error:
        return str(error)
    return _Driver((version // 1000, version % 1000 // 10), capabilities)


def present() -> bool:
    """Whether this machine has an NVIDIA device that its driver sees.

    >>> present() in (True, False)
    True
    """
    found = _devices()
    return not isinstance(found, str) and bool(found.devices)


def unavailable(index: int = 0) -> str | None:
    """Why the backend "cuda" (device `index`) can't be used: what is there and what is missing. None where it can.

    >>> unavailable(10**6) is None
    False
    """
    if simulated():
        return f"the simulator has one device, and {index} was asked for" if index else None
    reasons = []
    found = _devices()
    if isinstance(found, str):
        reasons.append(found)
    elif len(found.devices) <= index:
        what = f"no CUDA device {index}: the driver finds {len(found.devices)}"
        reasons.append(what if found.devices else "no CUDA device")
    reasons += _missing_packages()
    if reasons:
        return "; ".join(reasons)
    assert not isinstance(found, str)
    return _misfit(found, index) or _does_not_load()


def _missing_packages() -> list[str]:
    wanted = {"CuPy": "cupy", "numba-cuda": "numba_cuda"}
    missing = [name for name, module in wanted.items() if importlib.util.find_spec(module) is None]
    return [f"no {' and no '.join(missing)} package ({_INSTALL})"] if missing else []


def _misfit(driver: _Driver, index: int) -> str | None:
    """What does not fit: the packages to each other, the driver or the device to the packages."""
    cupy, numba_cuda = _cuda_of_cupy(), _cuda_of_numba()
    if cupy is not None and numba_cuda is not None and cupy != numba_cuda:
        return (
            f"CuPy is made for CUDA {cupy} and numba-cuda's packages for CUDA {numba_cuda}: both must be of one "
            f"({_INSTALL})"
        )
    major = cupy or numba_cuda
    if major is not None and driver.cuda[0] < major:
        served = ".".join(map(str, driver.cuda))
        return f"the NVIDIA driver serves CUDA up to {served}, the packages need {major}: update it, or {_INSTALL}"
    least = OLDEST.get(major or 12, OLDEST[max(OLDEST)])
    if driver.devices[index] < least:
        have, want = (".".join(map(str, c)) for c in (driver.devices[index], least))
        return f"CUDA device {index} has compute capability {have}, with CUDA {major or 12} at least {want} is needed"
    return None


def _cuda_of_cupy() -> int | None:
    """CUDA's major version in the name of CuPy's package; None where it was built from source."""
    for distribution in metadata.packages_distributions().get("cupy", []):
        if name := re.fullmatch(r"cupy[-_]cuda(\d+)x", distribution.lower()):
            return int(name[1])
    return None


def _cuda_of_numba() -> int | None:
    """CUDA's major version of the packages that numba-cuda compiles by."""
    try:
        return int(metadata.version("cuda-bindings").partition(".")[0])
    except (metadata.PackageNotFoundError, ValueError):
        return None


@functools.cache
def _does_not_load() -> str | None:
    """What CuPy says when it is imported, with cuBLAS."""
    try:
        importlib.import_module("cupy")
    except Exception as error:  # an ImportError of some library, or a runtime error of CUDA's
        return f"CuPy does not import ({type(error).__name__}: {_first_line(error)})"
    try:
        importlib.import_module("cupy_backends.cuda.libs.cublas")
    except ImportError as error:
        return f"CuPy finds no cuBLAS ({_first_line(error)}): {_INSTALL}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def describe(index: int = 0) -> str:
    """The device by its name and compute capability; it must be usable."""
    if simulated():
        return "Numba's simulator on NumPy arrays"
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else name
    return f"{name}, compute capability {properties['major']}.{properties['minor']}"


class CudaBackend(Backend):
    """One NVIDIA GPU: CuPy's arrays, float32 and float64. Every operation runs on this device, whichever is CuPy's
    current one, and on CuPy's current stream.

    Arguments:
        index: the device's number.
        strict, precision: as for every backend; "tf32" is multiplied by tensor cores.

    Raises:
        RuntimeError: the device can't be used; the message says why. ValueError: an unknown precision.
    """

    device = "cuda"

    def __init__(self, index: int = 0, *, strict: bool = False, precision: str = "float32") -> None:
        super().__init__(strict=strict, precision=precision)
        self.index = index
        self.name: str = "cuda" if index == 0 else f"cuda:{index}"  # type: ignore[misc]
        if reason := unavailable(index):
            raise RuntimeError(f"the backend {self.name!r} can't be used here: {reason}")
        self._simulated = simulated()
        if self._simulated:
            self.xp: Any = np
        else:
            import cupy

            self.xp = cupy

    def __str__(self) -> str:
        return f"{super().__str__()} ({describe(self.index)})"

    @contextlib.contextmanager
    def here(self, operation: str = "", arguments: Any = ()) -> Iterator[None]:
        """The `with` block that operations run in: this device is CuPy's current one, and running out of memory says what
        asked for it."""
        with self.current():
            try:
                yield
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                traceback.clear_frames(
                    error.__traceback__
                )  # what the unfinished operation held is free again
                error.__traceback__, what = None, _first_line(error)
            else:
                return
            if not self._simulated:
                self.xp.get_default_memory_pool().free_all_blocks()
            asked = ", ".join(_shapes(arguments))
            raise MemoryError(
                f"{self}: out of memory in {operation or 'an operation'}{' on ' + asked if asked else ''} ({what}). Try a "
                'smaller batch_size, remat_steps on recurrent layers, precision="bfloat16", or bptt_steps for long '
                "sequences"
            )

    def functions(self, operation: str, option: str, dtype: Any, gradient: bool = False) -> Any:
        """The module of the kernel that serves this key here; where only NumPy does, by way of the host's memory.

        Raises:
            RuntimeError: under `strict`, where only a fallback serves.
        """
        key = (operation, option, dtype, gradient)
        if key not in self._found:
            found = super().functions(operation, option, dtype, gradient)
            if lookup(operation, option, dtype, self.device, gradient=gradient).fallback:
                self._found[key] = _OnHost(found, self)
        return self._found[key]

    # Arrays
    def room(self) -> int | None:
        """Bytes that the device has free, and those that CuPy's pool keeps for use; None in the simulator."""
        if self._simulated:
            return None
        with self.here("room"):
            return self.xp.cuda.runtime.memGetInfo()[0] + self.xp.get_default_memory_pool().free_bytes()

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which CuPy makes arrays, and computes with them, on this device."""
        return contextlib.nullcontext() if self._simulated else self.xp.cuda.Device(self.index)

    def asarray(self, a: Any, dtype: Any = None) -> Any:
        """`a` as an array of this device: as it is where it is one already, without a copy where its memory is this
        device's (a PyTorch or JAX array, or what else speaks DLPack or CUDA's array interface), else copied here."""
        if self._simulated:
            return np.asarray(self.to_numpy(a), dtype)
        with self.here("asarray", (a,)):
            return self.xp.asarray(self._from_elsewhere(a), dtype)

    def _from_elsewhere(self, a: Any) -> Any:
        """An array that CuPy takes without a copy, where there is such a way."""
        if isinstance(a, (self.xp.ndarray, np.ndarray, np.generic)) or not hasattr(a, "__dlpack__"):
            return a
        if getattr(a, "requires_grad", False):  # PyTorch refuses to hand those over
            a = a.detach()
        kind, number = a.__dlpack_device__()
        if int(kind) in (2, 13):  # kDLCUDA, kDLCUDAManaged
            with self.xp.cuda.Device(int(number)):
                return self.xp.from_dlpack(a)
        return np.asarray(a)

    def to_numpy(self, a: Any) -> np.ndarray:
        """`a` as a NumPy array: copied from a device, as it is where it is one already.

        Raises:
            RuntimeError: a kernel that ran before made no progress and gave up, so that the numbers are void.
        """
        if self._simulated or not isinstance(a, self.xp.ndarray):
            self.finish()
            return np.asarray(a)
        with a.device:
            found = a.get()
            finish(a.device.id)
        return found

    def finish(self) -> None:
        """As every backend's; it waits for the persistent kernels that run."""
        finish(self.index)

    # Ways to run a sequence
    def ways(self, cell: Any, units: int, dtype: Any, directions: int = 1) -> str:
        """By batch, which tier's kernels run a cell's sequences."""
        from numlstm.kernels.cuda import sequence

        with self.current():
            return sequence.batches(cell, units, np.dtype(dtype).name, self.precision, directions)

    def dispatch_table(self) -> str | None:
        """The sizes at which persistent kernels run an LSTM here, as text; None where none can."""
        from numlstm.kernels import cells
        from numlstm.kernels.cuda import sequence

        with self.current():
            return sequence.dispatch_table(cells.lstm())

    def updates(
        self,
        rule: str,
        variables: Sequence[tuple[Any, tuple[Any, ...]]],
        decays: Sequence[bool] | None = None,
    ) -> Callable[..., None]:
        """The steps of an optimizer; see `Backend.updates`. They run on this device too."""
        with self.here("updates"):
            step = super().updates(rule, variables, decays)

        def take(gradients: Sequence[Any], options: tuple[Any, ...], decay: float = 0.0) -> None:
            with self.here(f"the step of {rule}", gradients):
                step(gradients, options, decay)

        return take


def finish(index: int = 0) -> None:
    """Wait for the persistent kernels of a device, and raise what went wrong in them; it need not be usable.

    Raises:
        RuntimeError: a kernel made no progress and gave up, so that what came after it is void.

    >>> finish()
    """
    if sequence := sys.modules.get("numlstm.kernels.cuda.sequence"):
        sequence.finish(index)


def _shapes(arguments: Any) -> Iterator[str]:
    """The shapes of the arrays among some arguments."""
    for a in arguments:
        if isinstance(a, (tuple, list)):
            yield from _shapes(a)
        elif isinstance(a, dict):
            yield from _shapes(a.values())
        elif getattr(a, "shape", ()):
            yield f"{tuple(a.shape)}"


def _is_out_of_memory(error: Exception) -> bool:
    """CuPy's OutOfMemoryError is a MemoryError; CUDA and cuBLAS name theirs."""
    named = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(name in str(error) for name in named)


class _OnHost:
    """A module of NumPy kernels for arrays of a device: they are copied to the host and the results back."""

    def __init__(self, module: Any, backend: CudaBackend) -> None:
        self.module, self.backend, self.__name__ = module, backend, module.__name__

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            given, named = (self._moved(v, self._down) for v in (arguments, options))
            return self._moved(function(*given, **named), self._up)

        return call

    def _down(self, a: Any) -> Any:
        return self.backend.to_numpy(a) if type(a) is self.backend.xp.ndarray else a

    def _up(self, a: Any) -> Any:
        return self.backend.asarray(a) if type(a) is np.ndarray else a

    def _moved(self, value: Any, move: Callable[[Any], Any]) -> Any:
        """The arrays in a value, or in its tuples and dictionaries, moved."""
        if isinstance(value, tuple):
            parts = [self._moved(v, move) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, dict):
            return {k: self._moved(v, move) for k, v in value.items()}
        return move(value)


def _on_device(name: str) -> Callable[..., Any]:
    method = getattr(Backend, name)

    @functools.wraps(method)
    def run(self: CudaBackend, *arguments: Any, **options: Any) -> Any:
        with self.here(name, (arguments, options)):
            return method(self, *arguments, **options)

    return run


for _name in (
    "sequence_forward", "sequence_backward", "sequence_forward_pair", "sequence_backward_pair", "matmul", "batched_matmul",
    "embedding", "embedding_gradient", "softmax", "softmax_gradient", "softmax_cross_entropy",
    "softmax_cross_entropy_gradient", "layer_norm", "layer_norm_gradient", "dropout_mask",
):  # fmt: skip
    setattr(CudaBackend, _name, _on_device(_name))

_KERNELS = {  # operation: module of numlstm.kernels.cuda, why
    "sequence": (
        "sequence",
        "the input's product at once; then all steps in one launch, or by step a product and one fused kernel a stage",
    ),
    "matmul": ("pointwise", "cuBLAS"),
    "batched_matmul": ("pointwise", "cuBLAS, all products in one call"),
    "softmax": ("pointwise", "one kernel, a block a row"),
    "softmax_cross_entropy": ("pointwise", "one kernel for the losses, a block a row, one for the gradient"),
    "embedding": ("pointwise", "a gather; sums of the rows that were taken, in the order of the ids"),
    "layer_norm": ("pointwise", "one kernel, a block a row; sums over rows in two rounds of fixed order"),
    "dropout_mask": ("pointwise", "Philox, the same bits as every backend's"),
    "optimizer": ("pointwise", "one kernel a variable"),
}
for _operation, (_module, _why) in _KERNELS.items():
    for _dtype in ("float32", "float64"):
        register(_operation, f"numlstm.kernels.cuda.{_module}", _why, dtype=_dtype, device="cuda")
