"""The disk cache: it saves compilations, and is never wrong: about edited cells, other processes, damaged
files.

Every case is a fresh interpreter with a cache directory of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from numlstm.kernels.cpu import cache, isa
from numlstm.kernels.cpu.plan import SIGNATURE

# Counts what Numba compiles.
COUNT = """
from numba.core import compiler
compiled, compile_extra = [], compiler.compile_extra
def counting(context, library, function, *rest, **options):
    compiled.append(function.__qualname__)
    return compile_extra(context, library, function, *rest, **options)
compiler.compile_extra = counting
"""
# A kernel that writes a number; made by a factory, as all are: only its text tells it from others.
LIGHT = """
import numpy as np
from numlstm.kernels.cpu.cache import compile_kernel
from numlstm.kernels.cpu.plan import SIGNATURE
from numlstm.kernels.cpu.simd import store_scalar

def run(number):
    def kernel(p, shard, shards):
        store_scalar(p, np.float32(number))
    out = np.zeros(1, "f")
    compile_kernel(kernel, "light", repr(number), SIGNATURE)(out.ctypes.data, 0, 1)
    assert out[0] == number, (out[0], number)
"""
# A cell called `edited` of the given equation, held to the reference.
CELL = """
import numpy as np
from numlstm.kernels import reference
from numlstm.kernels.cpu import sequence
from numlstm.kernels.derive import Cell

def run(expression):
    scope = {}
    exec(f"def edited(a, h):\\n    return {expression}", scope)
    cell = Cell(scope["edited"], ("a",))
    weights = np.ones((1, 19), "f"), np.zeros((19, 19), "f")
    arguments = cell, np.full((1, 1, 1), 0.5, "f"), *weights, None, (), None, None
    h, right = (kernels.forward(*arguments, training=False).h for kernels in (sequence, reference))
    assert np.allclose(h, right, rtol=1e-5), (expression, h, right)
"""


def job(kind: str, *what: object) -> str:
    """Runs kernels, then prints how many functions were compiled."""
    return COUNT + kind + "".join(f"run({w!r})\n" for w in what) + "print(len(compiled))\n"


@pytest.fixture
def count(python: Callable, tmp_path: Path) -> Callable[..., int]:
    """count(number, ...): how many functions a fresh process with this test's cache directory compiles."""

    def run(*numbers: float, directory: str | None = None) -> int:
        where = str(tmp_path / "kernels") if directory is None else directory
        return int(python(job(LIGHT, *numbers), NUMLSTM_CACHE_DIR=where).stdout)

    return run


def test_the_second_process_compiles_nothing_and_an_edit_is_seen(count, tmp_path: Path) -> None:
    assert count(1.0) == 1
    files = sorted((tmp_path / "kernels").iterdir())
    assert count(1.0) == 0
    assert sorted((tmp_path / "kernels").iterdir()) == files
    assert count(2.0) == 1  # the same name, another text
    assert count(2.0, 1.0) == 0  # made by two processes, loaded by one: each is itself


def test_whether_a_kernel_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path / "kernels"))
    assert not cache.is_cached("light", "1")

    def kernel(p, shard, shards):
        pass

    cache.compile_kernel(kernel, "light", "1", SIGNATURE)
    assert cache.is_cached("light", "1") and not cache.is_cached("light", "2")
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", "")
    assert not cache.is_cached("light", "1")


def test_two_processes_at_once(tmp_path: Path) -> None:
    """They compile different cells of one name at once; later processes find both, in either order."""
    # One seed of hashes and tiles made beforehand: then Numba counts and names the functions of both alike.
    env = {**os.environ, "NUMLSTM_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    both = ("a * 3", "a * 5")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    subprocess.run([sys.executable, "-c", job(CELL, "a * 7")], env=env, check=True, capture_output=True)
    started = [subprocess.Popen([sys.executable, "-c", job(CELL, e)], env=env, **pipes) for e in both]
    for process in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert int(out) > 0
    for order in (both, both[::-1]):
        done = subprocess.run([sys.executable, "-c", job(CELL, *order)], env=env, **pipes)
        assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("keep", [0, 40])
def test_damaged_files_are_replaced(keep: int, count, tmp_path: Path) -> None:
    count(1.0)
    for kind in ("nbi", "nbc"):  # index and code
        (path,) = (tmp_path / "kernels").glob(f"*.{kind}")
        path.write_bytes(path.read_bytes()[:keep])
        assert count(1.0) == 1
    assert count(1.0) == 0


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/no/such/place"])
def test_nowhere_to_write_costs_time_only(place: str, count, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert count(1.0, directory=str(tmp_path / place)) == 1
    assert (tmp_path / "file").read_text() == "not a directory"


def test_an_empty_name_switches_caching_off(count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert count(1.0, directory="") == 1
    assert not list(tmp_path.iterdir())


# The directory


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path / "a"))
    assert cache.directory() == tmp_path / "a"
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", "")
    assert cache.directory() is None
    monkeypatch.delenv("NUMLSTM_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "numlstm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "numlstm"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.directory() == tmp_path / "Library" / "Caches" / "numlstm"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.directory() == tmp_path / "local" / "numlstm"


def test_what_keeps_kernels_from_being_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path / "new"))
    assert cache.problem() is None and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path / "file"))
    assert "can't be written" in cache.problem()
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", "")
    assert "NUMLSTM_CACHE_DIR is empty" in cache.problem()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMLSTM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "expanduser", none)
    assert cache.directory() is None


def test_options_have_one_text_in_every_process(python) -> None:
    """A set prints in an order that changes from process to process."""
    source = "from numlstm.kernels.cpu import cache; print(cache._stable(cache.JIT_OPTIONS))"
    assert len({python(source, PYTHONHASHSEED=str(seed)).stdout for seed in (1, 2, 3)}) == 1


def test_names_mean_one_content() -> None:
    assert cache.unique_name("tile", "a") != cache.unique_name("tile", "b")
    assert cache.unique_name("tile", "a") == cache.unique_name("tile", "a") != cache.unique_name("other", "a")


# Other processors


@pytest.mark.skipif(not isa.IS_X86, reason="the features named are x86's")
@pytest.mark.parametrize(
    ("lanes", "environment"),
    [
        (
            8,
            {
                "NUMBA_CPU_NAME": "haswell",
                "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt,+f16c",
            },
        ),
        (4, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": None}),
    ],
    ids=["AVX2", "SSE"],
)
def test_narrower_vectors(lanes: int, environment: dict, python, tmp_path: Path) -> None:
    """The same kernels at 8 and 4 lanes: right, the same bits whatever the split, not mixed in the cache."""
    source = f"""
import zoo
from numlstm.kernels.cpu import gemm, isa, sequence
from questions import answer, ask, assert_same_bits, check
import numpy as np
assert isa.LANES == {lanes}
for size in ((5, 7, 3, 37), (2, 14, 9, 21)):
    question = ask(zoo.CELLS["gru"], *size, "holes")
    found = []
    for split in ((1, False), (2, False), (2, True)):
        sequence._split = lambda *_: split
        found.append(check(question))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
a, b = (np.random.default_rng(k).standard_normal((50, 50)).astype("f") for k in (0, 1))
assert np.abs(gemm.matmul(a, b.T) - a.astype("d") @ b.T).max() < 1e-4
"""
    python(source, **{"NUMBA_CPU_FEATURES": None} | environment)
