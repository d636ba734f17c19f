"""The CUDA backend: what is said about a GPU that can't be used, each missing part by name; what "auto" makes of it; and, in
Numba's simulator, what the backend does with arrays and with memory that runs out."""

from __future__ import annotations

import ctypes
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from numlstm import backend
from numlstm.backend import cuda, get_backend, lookup
from numlstm.kernels import cells
from numlstm.kernels.int8 import Quantized


class Driver:
    """The calls of the CUDA driver that look for devices."""

    def __init__(self, devices=(), status=0, cuda=13000):
        self.devices, self.status, self.cuda = devices, status, cuda

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.cuda
        return 0

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, pointer, index):
        pointer._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, pointer, attribute, device):
        pointer._obj.value = self.devices[device][attribute - 75]
        return 0


H200, OLD, VOLTA = (9, 0), (5, 2), (7, 0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    clear = [cuda._devices, cuda._does_not_load, backend._auto]
    for cached in clear:
        cached.cache_clear()
    yield
    for cached in clear:
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, cupy=13, numba=13, load=None): a machine with such a driver, packages of these CUDA versions
    (None: not there), and what CuPy says when it is loaded."""

    def make(driver, cupy=13, numba=13, load=None):
        def open_library(name):
            if driver is None:
                raise OSError(name)
            return driver

        there = {"cupy": cupy, "numba_cuda": numba}
        monkeypatch.setattr(ctypes, "CDLL", open_library)
        monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: there[name])
        monkeypatch.setattr(cuda, "_cuda_of_cupy", lambda: cupy)
        monkeypatch.setattr(cuda, "_cuda_of_numba", lambda: numba)
        monkeypatch.setattr(cuda, "_does_not_load", lambda: load)

    yield make
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (None, r"no NVIDIA driver \(.*does not load\)$"),
        (Driver(status=100), "no CUDA device$"),
        (Driver(), "no CUDA device$"),
        (Driver(status=999), "the NVIDIA driver reports error 999$"),
        (Driver([OLD]), r"CUDA device 0 has compute capability 5\.2, with CUDA 13 at least 7\.5 is needed"),
        (Driver([VOLTA]), r"compute capability 7\.0, with CUDA 13 at least 7\.5"),
        (
            Driver([H200], cuda=12040),
            r"the NVIDIA driver serves CUDA up to 12\.4, the packages need 13: update it, or pip",
        ),
    ],
)
def test_the_driver_and_the_devices(machine, driver, expected):
    machine(driver)
    assert re.search(expected, cuda.unavailable())


def test_a_usable_machine(machine):
    machine(Driver([H200]))
    assert cuda.unavailable() is None and cuda.present()
    machine(Driver([VOLTA], cuda=12080), cupy=12, numba=12)
    cuda._devices.cache_clear()
    assert cuda.unavailable() is None


def test_a_device_number_beyond_those_there(machine):
    machine(Driver([H200, OLD]))
    assert "no CUDA device 2: the driver finds 2" in cuda.unavailable(2)
    assert "device 1 has compute capability 5.2" in cuda.unavailable(1)
    assert cuda.unavailable(0) is None


@pytest.mark.parametrize(
    ("cupy", "numba", "expected"),
    [
        (None, 13, "no CuPy package"),
        (13, None, "no numba-cuda package"),
        (None, None, "no CuPy and no numba-cuda package"),
        (12, 13, "CuPy is made for CUDA 12 and numba-cuda's packages for CUDA 13: both must be of one"),
    ],
)
def test_the_packages(machine, cupy, numba, expected):
    machine(Driver([H200]), cupy, numba)
    assert expected in cuda.unavailable() and "pip install 'numlstm[cuda13]'" in cuda.unavailable()


def test_what_cupy_says_when_it_is_loaded(machine):
    machine(Driver([H200]), load="CuPy finds no cuBLAS (libcublas.so.13)")
    assert cuda.unavailable() == "CuPy finds no cuBLAS (libcublas.so.13)"


def test_packages_are_of_the_cuda_in_their_names(monkeypatch):
    names = {"cupy": ["cupy-cuda12x"]}
    monkeypatch.setattr(cuda.metadata, "packages_distributions", lambda: names)
    monkeypatch.setattr(cuda.metadata, "version", lambda name: "13.0.1")
    assert (cuda._cuda_of_cupy(), cuda._cuda_of_numba()) == (12, 13)
    names["cupy"] = ["cupy"]
    assert cuda._cuda_of_cupy() is None


# auto


def test_auto_takes_the_cpu_and_says_why_once_where_there_is_a_device(machine):
    machine(Driver([OLD]))
    with pytest.warns(
        RuntimeWarning, match=r"on the CPU, CUDA can't be used: CUDA device 0 has compute capability 5\.2"
    ):
        assert get_backend().name == "cpu"
    assert (
        get_backend().name == get_backend("auto").name == "cpu"
    )  # and not a second time: warnings are errors here


@pytest.mark.parametrize("driver", [None, Driver(), Driver(status=100)])
def test_auto_is_silent_without_a_device(machine, driver):
    machine(driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend().name == "cpu"


def test_auto_takes_a_usable_device(machine, monkeypatch):
    machine(Driver([H200]))
    asked = []
    monkeypatch.setattr(backend, "_instance", lambda name, *how: asked.append(name))
    get_backend()
    get_backend("auto")
    get_backend("cuda:0")
    assert asked == ["cuda", "cuda", "cuda"]


def test_a_named_device_raises_with_the_reason(machine):
    machine(Driver([H200, OLD]))
    with pytest.raises(
        RuntimeError, match=r"backend: the backend 'cuda:1' can't be used here: CUDA device 1 has"
    ):
        get_backend("cuda:1")


# In the simulator, which holds NumPy arrays: nothing of it is imported before a kernel runs


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    return cuda.CudaBackend()


def test_the_simulator_is_usable_and_never_chosen_unasked(simulated):
    assert cuda.unavailable() is None and get_backend().name == "cpu"
    assert "the simulator has one device, and 1 was asked for" in cuda.unavailable(1)
    assert str(simulated) == "cuda (Numba's simulator on NumPy arrays)" and simulated.xp is np
    with pytest.raises(RuntimeError, match="the backend 'cuda:1' can't be used here"):
        cuda.CudaBackend(1)


def test_arrays(simulated):
    a = np.ones(3, np.float32)
    assert simulated.asarray(a) is a and simulated.to_numpy(a) is a
    assert simulated.asarray([1, 2], np.float64).dtype == np.float64


def test_out_of_memory_names_the_sizes_and_what_to_try(simulated, monkeypatch):
    def too_large(*arguments, **options):
        raise MemoryError(
            "Out of memory allocating 8,589,934,592 bytes (allocated so far: 140,000,000,000 bytes)."
        )

    module = SimpleNamespace(
        __name__="kernels", matmul=too_large, forward=too_large, Updates=lambda *a: too_large
    )
    monkeypatch.setattr(simulated, "functions", lambda *key: module)
    x, w = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    expected = r"out of memory in matmul on \(3, 4\), \(4, 5\) \(Out of memory allocating 8,589,934,592 bytes.*batch_size"
    with pytest.raises(MemoryError, match=expected):
        simulated.matmul(x, w)
    with pytest.raises(MemoryError, match=r"sequence_forward on \(2, 3, 4\).*remat_steps.*bptt_steps"):
        simulated.sequence_forward(
            cells.elman(), np.ones((2, 3, 4)), w, np.ones((5, 5)), None, (), None, None, training=True
        )
    with pytest.raises(MemoryError, match="out of memory in the step of sgd"):
        simulated.updates("sgd", [(x, (None,))])([x], (0.1, 0.0, False))
    monkeypatch.undo()


def test_other_errors_pass(simulated, monkeypatch):
    def wrong(*arguments, **options):
        raise ValueError("shapes")

    monkeypatch.setattr(simulated, "functions", lambda *key: SimpleNamespace(matmul=wrong))
    with pytest.raises(ValueError, match=r"^shapes$"):
        simulated.matmul(np.ones((1, 1)), np.ones((1, 1)))


def test_int8_runs_on_the_host_and_says_so(simulated):
    w = Quantized.of(np.array([[1.0, -0.5], [0.0, 0.25]]))
    x = np.ones((1, 2), np.float32)
    assert simulated.matmul(x, w).tolist() == (x @ w).tolist()
    kernel = lookup("quantized_matmul", dtype="float32", device="cuda")
    assert kernel.fallback and kernel.why.startswith("cuda has no float32 kernel for this")
    out = simulated.sequence_forward(
        cells.elman(), np.ones((2, 1, 2), np.float32), w, w, None, (), None, None, training=False
    )
    assert out.h.shape == (2, 1, 2)
    strict = cuda.CudaBackend(strict=True)
    with pytest.raises(RuntimeError, match="strict: quantized_matmul"):
        strict.matmul(x, w)
