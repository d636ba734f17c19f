"""A GPU as the persistent sequences see it: memory and products by CuPy, launches by cuda.core.

A launch is cooperative, which makes the driver refuse a grid that can't be resident at once; `launch` asks for the
occupancy first and says so in words. The kernels' error words are looked at later, when their event has passed: by the next
launch, or by `finish`, which waits. Whoever hands results to the host calls `finish` first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from .compile import build, kinds

__all__ = ["Device", "blas_order"]

# Constants of cuBLAS and of the CUDA runtime's library_types.h.
REAL_32, REAL_BFLOAT16, DEFAULT_ALGORITHM = 0, 14, -1
LEGACY_STREAM = 1  # cudaStreamLegacy: CuPy's default stream by a handle that is not null
COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 68}  # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32


class Device:
    """The GPU `index`. Every method works on the current CuPy stream of that device, which the caller has made current.

    Raises:
        ImportError: CuPy, cuBLAS or cuda-core is missing.
    """

    def __init__(self, index: int = 0) -> None:
        import cuda.core
        import cupy
        from cuda.bindings import driver
        from cupy.cuda import cublas

        self.index: int = index
        self.xp: Any = cupy
        self._driver, self._core, self._cublas = driver, cuda.core, cublas
        cuda.core.Device(index).set_current()
        attributes = cupy.cuda.Device(index).attributes
        self.sms: int = attributes["MultiProcessorCount"]
        self.shared_per_block: int = attributes["MaxSharedMemoryPerBlockOptin"]
        self.capability: tuple[int, int] = (
            attributes["ComputeCapabilityMajor"],
            attributes["ComputeCapabilityMinor"],
        )
        self._kernel = cache(self._load)
        # A copy on the stream that works would wait for all that was queued since.
        self._reading = cupy.cuda.Stream(non_blocking=True)
        self._pending: deque[tuple[Any, Any, Callable[[np.ndarray], None]]] = deque()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.xp.empty(shape, dtype)

    def product(self, a: Any, b: Any, out: Any, precision: str) -> None:
        """out (M, N) = a (M, K) b (K, N): float32, or uint16 holding bfloat16; rows or columns of a and b are contiguous."""
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        kind = REAL_BFLOAT16 if precision == "bfloat16" else REAL_32
        (turn_b, step_b), (turn_a, step_a), (n, m, k) = blas_order(a, b)
        self._cublas.gemmEx(
            self.xp.cuda.device.get_cublas_handle(), turn_b, turn_a, n, m, k, one.ctypes.data, b.data.ptr, kind, step_b,
            a.data.ptr, kind, step_a, zero.ctypes.data, out.data.ptr, REAL_32, n, COMPUTE[precision], DEFAULT_ALGORITHM,
        )  # fmt: skip

    def _load(self, text: str, arguments: str, warps: int, shared: int) -> tuple[Any, int]:
        """A kernel ready to launch, and how many of its blocks a multiprocessor holds."""
        built = build(text, arguments, warps, self.capability)
        driver = self._driver
        kernel = self._core.ObjectCode.from_cubin(built.cubin).get_kernel(built.name)
        what = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(what, shared, driver.CUkernel(int(kernel.handle)), self.index)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{shared} bytes of shared memory a block: the driver answers {status.name}")
        return kernel, kernel.occupancy.max_active_blocks_per_multiprocessor(32 * warps, shared)

    def launch(
        self, text: str, arguments: list[tuple[str, Any]], grid: int, warps: int, shared: int, label: str,
        look: Callable[[np.ndarray], None],
    ) -> None:  # fmt: skip
        """Run the kernel in `text`; `look` is handed its error words, on the host, once it has run.

        Raises:
            RuntimeError: not all of its blocks can be resident at once; or an earlier kernel has given up.
        """
        self._look(wait=False)
        names = [n for n, _ in arguments]
        kernel, resident = self._kernel(text, kinds(names), warps, shared)
        if resident * self.sms < grid:
            raise RuntimeError(
                f"{label}: {grid} blocks must be resident at once, but this GPU holds {resident} on each of its "
                f"{self.sms} multiprocessors"
            )
        stream, core = self.xp.cuda.get_current_stream(), self._core
        values = [a.data.ptr if isinstance(a, self.xp.ndarray) else int(a) for _, a in arguments]
        config = core.LaunchConfig(grid=grid, block=(32, warps, 1), shmem_size=shared, is_cooperative=True)
        core.launch(
            core.Stream.from_handle(stream.ptr or LEGACY_STREAM), config, kernel, *map(np.int64, values)
        )
        errors = dict(arguments)["E"]
        event = self.xp.cuda.Event(disable_timing=True)
        event.record(stream)
        self._pending.append((event, errors, look))

    def finish(self) -> None:
        """Wait for all launches and raise what went wrong in them.

        Raises:
            RuntimeError: a kernel made no progress and gave up.
        """
        with self.xp.cuda.Device(self.index):
            self._look(wait=True)

    def _look(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][0].done):
            event, errors, look = self._pending.popleft()
            event.synchronize()
            look(errors.get(stream=self._reading))


def blas_order(a: Any, b: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int]]:
    """How cuBLAS, to which columns are contiguous, computes a (M, K) b (K, N): as b' a', giving the result's transpose.

    Returns (turn, step) of b and of a, whether it must transpose what it sees and the distance of that one's columns, and
    (N, M, K).

    >>> a, b = np.zeros((2, 3), "f"), np.zeros((5, 3), "f").T
    >>> blas_order(a, b)
    ((1, 3), (0, 3), (5, 2, 3))
    """

    def seen(x: Any) -> tuple[int, int]:
        size = x.dtype.itemsize
        if x.strides[1] == size or x.shape[1] == 1:
            return 0, max(x.strides[0] // size, x.shape[1])
        if x.strides[0] == size or x.shape[0] == 1:
            return 1, max(x.strides[1] // size, x.shape[0])
        raise ValueError(f"a product's operand: expected contiguous rows or columns, got strides {x.strides}")

    return seen(b), seen(a), (b.shape[1], *a.shape)
