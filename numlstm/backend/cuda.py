"""The CUDA backend's place: says why a GPU can't be used here. Its kernels are not part of this version.

Looks without importing CUDA packages: whether CuPy is installed, whether the driver's library loads, whether
it finds a device (cuInit and cuDeviceGetCount of the CUDA driver API).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache

__all__ = ["unavailable"]


@cache
def _devices() -> int | str:
    """The number of CUDA devices, or what stopped the count."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} does not load)"
    count = ctypes.c_int(0)
    for call in (lambda: driver.cuInit(0), lambda: driver.cuDeviceGetCount(ctypes.byref(count))):
        status = call()
        if status == 100:  # CUDA_ERROR_NO_DEVICE
            return 0
        if status:
            return f"the NVIDIA driver reports error {status}"
    return count.value


def unavailable(index: int = 0) -> str:
    """Why the backend "cuda" (device `index`) can't be used: one line, what is there and what is missing.

    >>> "CUDA kernels are not part of this version" in unavailable()
    True
    """
    reasons = ["the CUDA kernels are not part of this version of numlstm"]
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        reasons.append("NUMBA_ENABLE_CUDASIM is set, but the simulator has nothing to run yet")
        return "; ".join(reasons)
    if importlib.util.find_spec("cupy") is None:
        reasons.append("no CuPy package (pip install cupy-cuda12x or cupy-cuda13x)")
    devices = _devices()
    if isinstance(devices, str):
        reasons.append(devices)
    elif devices <= index:
        reasons.append(f"no CUDA device {index}: the driver finds {devices}" if devices else "no CUDA device")
    return "; ".join(reasons)
