"""Pooled memory: aligned, used again when its last view is gone, never shared before that."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from numlstm.kernels.cpu import workspace
from numlstm.kernels.cpu.workspace import ALIGNMENT, POOLED_FROM, aligned, carve, release

LARGE = (3, POOLED_FROM)  # floats: well above the size from which memory is pooled


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    gc.collect()
    release()
    yield
    release()


def address(a: np.ndarray) -> int:
    return a.ctypes.data


def test_addresses_of_views() -> None:
    whole = np.arange(24, dtype="f").reshape(4, 6)
    whole.flags.writeable = False
    for a in (
        whole,
        whole[1:, 2:],
        whole[::-1, ::-2],
        whole.T,
        whole[2, 3:4].reshape(()),
        whole.view(np.uint8)[:, 3:],
    ):
        assert workspace.address(a) == workspace._from_ctypes(a) == a.ctypes.data


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (0,), (0, 5), (7,), (3, 5, 7), (POOLED_FROM // 4,), (POOLED_FROM // 4 - 1,), LARGE],
    ids=str,
)
def test_alignment_shape_and_type(shape: tuple[int, ...]) -> None:
    for zero in (False, True):
        a = aligned(shape, zero=zero)
        assert a.shape == shape and a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable
        assert not a.size or address(a) % ALIGNMENT == 0
        assert not (zero and a.any())
        a[...] = 1


def test_memory_comes_back_with_the_last_view() -> None:
    a = aligned(LARGE)
    where, view = address(a), a[1:, ::2].T
    deep = view[3:].reshape(-1)[:0].base if view[3:].base is not None else view
    del a
    assert address(aligned(LARGE)) != where  # a view still stands in it
    del view, deep
    assert address(aligned(LARGE)) == where


def test_memory_used_again_is_zeroed_on_request() -> None:
    a = aligned(LARGE)
    a[...] = 5
    where = address(a)
    del a
    b = aligned(LARGE, zero=True)
    assert address(b) == where and not b.any()


def test_sizes_near_each_other_share_memory() -> None:
    a = aligned((1_000_001,))
    where = address(a)
    del a
    b = aligned((1_000_002,))
    assert address(b) == where


def test_a_larger_block_serves_if_it_is_not_much_larger() -> None:
    small, large, huge = (aligned((n,)) for n in (100_000, 150_000, 250_000))
    where = {address(a): a.size for a in (small, large, huge)}
    kept = small
    del small, large, huge
    first, second = aligned((100_000,)), aligned((100_000,))
    assert where.get(address(first)) == 150_000  # the least that will do
    assert address(second) not in where  # more than twice as much is left alone
    assert where[address(aligned((240_000,)))] == 250_000
    assert address(kept) not in (address(first), address(second))


def test_no_two_living_arrays_overlap() -> None:
    draw, alive = np.random.default_rng(0), []
    for _ in range(300):
        if alive and draw.random() < 0.4:
            alive.pop(draw.integers(len(alive)))
        alive.append(aligned((int(draw.integers(1, 30_000)),)))
        alive[-1][...] = 0
    spans = sorted((address(a), address(a) + a.nbytes) for a in alive)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_pool_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "POOL_LIMIT", 1)
    arrays = [aligned(LARGE) for _ in range(3)]
    del arrays
    workspace._take_back()
    assert sum(map(len, workspace._free.values())) == 1
    release()
    assert not workspace._free


def test_arrays_from_many_threads() -> None:
    failures: list[str] = []

    def work(mark: int) -> None:
        for k in range(300):
            a = aligned((20_000 + k % 3,))
            a[...] = mark
            if not (a == mark).all():
                failures.append(f"thread {mark} lost its array")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failures


def test_an_array_alive_at_exit_makes_no_noise(python) -> None:
    source = "from numlstm.kernels.cpu.workspace import aligned; a = [aligned((100000,))]; a.append(a)"
    assert python(source).stderr == ""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers there")
def test_no_interrupt_is_lost(python) -> None:
    """An exception that a signal raises in a finalizer of Python code is printed and forgotten."""
    source = """
import signal
from numlstm.kernels.cpu.workspace import aligned

class Interrupt(Exception):
    pass

raised = caught = 0

def interrupt(*_):
    global raised
    raised += 1
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
for k in range(400):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-7 * k)
        n = raised
        while raised == n:
            aligned((100_000,))
    except Interrupt:
        caught += 1
print(raised - caught)
"""
    done = python(source)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_carved_pieces() -> None:
    plan = [0] * 5
    slab, offsets = carve(plan, {0: 3, 2: 17}, {4: 40_000, 1: 0})
    sizes = {0: 3, 2: 17, 4: 40_000, 1: 0}
    assert plan[3] == 0 and not any(offset % 16 for offset in offsets.values())
    for place, size in sizes.items():
        assert plan[place] == address(slab) + 4 * offsets[place] and plan[place] % ALIGNMENT == 0
        assert offsets[place] + size <= slab.size
    assert not slab[: offsets[4]].any()
    spans = sorted((offsets[k], offsets[k] + n) for k, n in sizes.items() if n)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
