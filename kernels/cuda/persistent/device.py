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

from .. import blas
from .compile import build, kinds

__all__ = ["Device"]

LEGACY_STREAM = 1  # cudaStreamLegacy: CuPy's default stream by a handle that is not null


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
        self._driver, self._core, self._gemm = driver, cuda.core, cublas.gemmEx
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
        handle, sizes = self.xp.cuda.device.get_cublas_handle(), (*out.shape, a.shape[1])
        whole = blas.Operand(out.data.ptr, "float32", out.shape[1])
        tf32 = precision == "tf32"
        blas.product(self._gemm, handle, sizes, blas.lying(a), blas.lying(b), whole, tf32=tf32)(0, 0)

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
