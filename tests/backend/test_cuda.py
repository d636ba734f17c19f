"""What is said about a GPU that can't be used: the part that is missing, each by name."""

import ctypes
import re

import pytest

from numlstm.backend import cuda


class Driver:
    """The two calls of the CUDA driver that count devices."""

    def __init__(self, count=0, status=0):
        self.count, self.status = count, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.count
        return 0


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    cuda._devices.cache_clear()
    yield
    cuda._devices.cache_clear()


def driver(monkeypatch, found):
    def load(name):
        if found is None:
            raise OSError(name)
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)


def package(monkeypatch, installed):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object() if installed else None)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, r"no NVIDIA driver \(.*does not load\)"),
        (Driver(status=100), "no CUDA device$"),
        (Driver(count=0), "no CUDA device$"),
        (Driver(status=999), "the NVIDIA driver reports error 999"),
    ],
)
def test_the_driver_and_the_devices(monkeypatch, found, expected):
    driver(monkeypatch, found)
    assert re.search(expected, cuda.unavailable())


def test_a_device_number_beyond_those_there(monkeypatch):
    driver(monkeypatch, Driver(count=2))
    assert "no CUDA device 2: the driver finds 2" in cuda.unavailable(2)
    assert "no CUDA device" not in cuda.unavailable(1)


@pytest.mark.parametrize("installed", [True, False])
def test_the_package(monkeypatch, installed):
    package(monkeypatch, installed)
    assert ("no CuPy package" in cuda.unavailable()) is not installed


def test_the_simulator_is_mentioned(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert "NUMBA_ENABLE_CUDASIM is set" in cuda.unavailable()
