"""Where kernels run: a GPU, through CuPy, or NumPy arrays under Numba's simulator (NUMBA_ENABLE_CUDASIM=1).

`current()` is the device that CuPy has chosen for this thread. What differs between the two is here and nowhere else:
arrays (`xp`), how a kernel is loaded and launched (`launcher`), and products of matrices (`product`). Work goes to CuPy's
current stream, in order; nothing here waits for it.

A launch and a product are prepared once a sequence: their arrays, sizes and types are looked at then, and each step costs
one call into CuPy with addresses.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..rounding import operand
from . import blas
from . import math as cuda_math
from .compiler import Kernel, cubin

__all__ = ["ROW_THREADS", "Device", "current"]

SIMULATED = cuda_math.SIMULATED
ROW_THREADS = 4 if SIMULATED else 256  # of a block that reduces a row; the simulator's are threads of Python
_WIDTH = 128  # threads of a block over the columns of a row
_MOST_ROWS = 65535  # a grid's limit in its second dimension; kernels stride over what lies beyond

Launch = Callable[..., None]
Product = Callable[[int, int], None]


class Device:
    """What kernels need of the place where they run.

    Attributes:
        xp: the module of its arrays, cupy or numpy.
        index: the device's number.
        capability: its compute capability, such as (9, 0).
        name: for people.
        persistent: whether it can run persistent kernels (persistent/), which are inline PTX.
    """

    xp: Any
    index: int
    capability: tuple[int, int]
    name: str
    persistent: bool

    def __init__(self) -> None:
        self._constants: dict[tuple[str, float], Any] = {}
        self._kernels: dict[tuple[Any, ...], Any] = {}

    def array(self, a: Any, dtype: Any) -> Any:
        """`a` on this device, contiguous, as it is where it is so already."""
        return self.xp.ascontiguousarray(self.xp.asarray(a, dtype))

    def constant(self, value: float, dtype: str) -> Any:
        """One element, for a kernel that reads it with a stride of 0 in place of an array that was not given."""
        key = (dtype, value)
        if key not in self._constants:
            self._constants[key] = self.xp.full(1, value, dtype)
        return self._constants[key]

    def over_rows(self, kernel: Kernel, rows: int, columns: int, arguments: Sequence[Any]) -> Launch:
        """A launch with a thread a column and a line of blocks a row (`blockIdx.y`); see `launcher`."""
        width = min(columns, _WIDTH) if SIMULATED else min(_WIDTH, -(-columns // 32) * 32)
        return self.launcher(kernel, (-(-columns // width), min(rows, _MOST_ROWS)), width, arguments)

    def by_row(self, kernel: Kernel, rows: int, arguments: Sequence[Any]) -> Launch:
        """A launch with a block of ROW_THREADS a row; see `launcher`."""
        return self.launcher(kernel, (min(rows, 2**20), 1), ROW_THREADS, arguments)

    def flat(self, kernel: Kernel, elements: int, arguments: Sequence[Any]) -> Launch:
        """A launch with a thread an element, up to a number that fills any GPU; see `launcher`."""
        threads = ROW_THREADS
        blocks = min(-(-elements // threads), 2 if SIMULATED else 4096)
        return self.launcher(kernel, (max(blocks, 1), 1), threads, arguments)

    def launcher(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, arguments: Sequence[Any]
    ) -> Launch:
        """A function that launches `kernel` on the leading `arguments`, which it keeps, and on the numbers it is given."""
        raise NotImplementedError

    def _check(self, arguments: Sequence[Any]) -> None:
        """Kernels count on arrays of this device without gaps."""
        for a in arguments:
            if (
                hasattr(a, "shape")
                and a.shape != ()
                and not (type(a) is self.xp.ndarray and a.flags.c_contiguous)
            ):
                raise ValueError(
                    f"kernel: expected contiguous {self.xp.__name__} arrays, got {type(a).__name__}"
                )

    def product(
        self, a: Any, b: Any, c: Any, *, ta: bool = False, tb: bool = False, accumulate: bool = False, tf32: bool = False
    ) -> Product:  # fmt: skip
        """A function of (i, j): c[j] = a[i] b, or c[j] += a[i] b.

        a (S, M, K), or (S, K, M) with `ta`; b (K, N), or (N, K) with `tb`; c (S', M, N); contiguous. Operands of uint16 are
        the bits of bfloat16. `tf32`: operands of float32 may lose their last 13 bits.
        """
        raise NotImplementedError


class Simulator(Device):
    """NumPy arrays, and kernels that Numba's simulator runs, a Python thread for each of CUDA's."""

    xp = np
    index: int = 0
    capability: tuple[int, int] = (9, 0)
    name: str = "Numba's CUDA simulator on NumPy arrays"
    persistent = False
    _one_at_a_time = threading.RLock()  # the simulator knows one kernel at a time

    def __init__(self) -> None:
        super().__init__()
        sys.setswitchinterval(
            1e-5
        )  # it polls its threads: at Python's 5 ms each barrier would take that long

    def launcher(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, arguments: Sequence[Any]
    ) -> Launch:
        from numba import cuda

        key = (kernel.name, kernel.dtype, kernel.text)
        if key not in self._kernels:
            body = kernel.make()
            # The simulator puts its own module in the place of `cuda` in a kernel's globals: so they must be the body's.
            scope = body.__globals__
            scope |= {"body": body, "errstate": np.errstate}
            exec(_QUIETLY, scope)
            self._kernels[key] = cuda.jit(scope["quietly"])
        compiled = self._kernels[key]
        self._check(arguments)
        by_address: dict[
            Any, Any
        ] = {}  # the simulator copies NumPy arrays in and out; these it takes as they are
        kept = [
            by_address.setdefault(id(a), self._view(a.reshape(-1))) if isinstance(a, np.ndarray) else a
            for a in arguments
        ]

        def launch(*numbers: Any) -> None:
            with self._one_at_a_time:
                compiled[grid, threads](*kept, *numbers)

        return launch

    @staticmethod
    def _view(a: np.ndarray) -> Any:
        return _simulated_array()(a)

    def product(
        self, a: Any, b: Any, c: Any, *, ta: bool = False, tb: bool = False, accumulate: bool = False, tf32: bool = False
    ) -> Product:  # fmt: skip
        def value(m: np.ndarray) -> np.ndarray:
            if m.dtype == np.uint16:
                return (m.astype(np.uint32) << 16).view(np.float32)
            return operand(m, "tf32") if tf32 else m

        def run(i: int, j: int) -> None:
            left, right = value(a[i]), value(b)
            with np.errstate(all="ignore"):
                result = (left.T if ta else left) @ (right.T if tb else right)
                c[j] = c[j] + result if accumulate else result

        return run


# As on a GPU, NaN and infinity travel without a word.
_QUIETLY = """
def quietly(*values):
    with errstate(all="ignore"):
        body(*values)
"""


@cache
def _simulated_array() -> Any:
    """The simulator's class of device arrays: made of a NumPy array it shares its memory."""
    from numba import cuda

    return type(cuda.to_device(np.zeros(1)))


_NUMBERS = {"int": np.int32, "index": np.int64, "word": np.uint32}


class Gpu(Device):
    """A CUDA device by its number, through CuPy. It must be CuPy's current device whenever it is used."""

    persistent = True

    def __init__(self, index: int) -> None:
        import cupy

        super().__init__()
        self.xp: Any = cupy
        self.index: int = index
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self.capability: tuple[int, int] = (properties["major"], properties["minor"])
        name = properties["name"]
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)

    def constant(self, value: float, dtype: str) -> Any:
        """As everywhere; whole before another stream can read it."""
        known = (dtype, value) in self._constants
        found = super().constant(value, dtype)
        if not known:
            self.xp.cuda.get_current_stream().synchronize()
        return found

    def launcher(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, arguments: Sequence[Any]
    ) -> Launch:
        key = (kernel.name, kernel.dtype, kernel.text)
        if key not in self._kernels:
            entry, binary = cubin(kernel, self.capability)
            self.xp.cuda.Device(
                self.index
            ).use()  # Numba may have made another device's context this thread's
            module = self.xp.cuda.Module()
            module.load(binary)
            self._kernels[key] = module.get_function(entry)
        self._check(arguments)
        function, shape, block = self._kernels[key], (*grid, 1), (threads, 1, 1)
        kinds = {**_NUMBERS, "number": np.dtype(kernel.dtype).type}
        # CuPy hands a NumPy scalar over as its bytes: its type must be the parameter's.
        kept = tuple(
            kinds[p.kind](a) if p.kind in kinds else a
            for p, a in zip(kernel.parameters, arguments, strict=False)
        )
        rest = tuple(kinds[p.kind] for p in kernel.parameters[len(kept) :])

        def launch(*numbers: Any) -> None:
            given = tuple(kind(n) for kind, n in zip(rest, numbers, strict=True))
            function(shape, block, kept + given)

        return launch

    def product(
        self, a: Any, b: Any, c: Any, *, ta: bool = False, tb: bool = False, accumulate: bool = False, tf32: bool = False
    ) -> Product:  # fmt: skip
        from cupy.cuda import cublas

        for m in (a, b, c):
            assert m.flags.c_contiguous
        _, M, N = c.shape
        K = a.shape[1] if ta else a.shape[2]
        found = blas.product(
            cublas.gemmEx, self.xp.cuda.get_cublas_handle(), (M, N, K),
            blas.Operand(a.data.ptr, a.dtype.name, a.shape[2], ta), blas.Operand(b.data.ptr, b.dtype.name, b.shape[1], tb),
            blas.Operand(c.data.ptr, c.dtype.name, N), accumulate=accumulate, tf32=tf32,
        )  # fmt: skip
        a_step, c_step = a.strides[0], c.strides[0]

        def run(i: int, j: int) -> None:
            found(i * a_step, j * c_step)

        run.keeps = (a, b, c)  # type: ignore[attr-defined] # an address is good while its array lives
        return run


_SIMULATOR: Simulator | None = None
_GPUS: dict[int, Gpu] = {}


def current() -> Device:
    """The device of this thread: CuPy's current one, or the simulator."""
    global _SIMULATOR
    if SIMULATED:
        if _SIMULATOR is None:
            _SIMULATOR = Simulator()
        return _SIMULATOR
    import cupy

    index = cupy.cuda.get_device_id()
    if index not in _GPUS:
        _GPUS[index] = Gpu(index)
    return _GPUS[index]
