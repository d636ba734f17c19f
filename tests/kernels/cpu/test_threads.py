"""Who may call, and from where: many threads at once, after a fork, in spawned processes, under Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from questions import answer, ask, assert_same_bits

from numlstm.kernels import cells
from numlstm.kernels.cpu import gemm, pointwise, threads

WORK = """
import os, signal, sys, threading, time
from multiprocessing import get_context
import numpy as np
from numlstm.kernels import cells
from numlstm.kernels.cpu import sequence, threads
from questions import answer, ask, assert_same_bits

sequence._split = lambda *_: (2, True)  # two threads, a barrier at every step
question = ask(cells.elman(), 20, 6, 4, 70).cast("f")

def work(_=None):
    return answer(question)
"""


@pytest.mark.parametrize("units", [False, True])
def test_callers_from_four_threads(units: bool, share_by) -> None:
    share_by(2, units)
    questions = [ask(cells.lstm(), 12, 6, 4, 70, seed=k).cast("f") for k in range(4)]
    alone = [answer(q) for q in questions]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for right, found in zip(alone, pool.map(answer, questions), strict=True):
                assert_same_bits(right, found)


def test_different_kernels_at_once(share_by, monkeypatch: pytest.MonkeyPatch, keep_threads: None) -> None:
    share_by(2, True)
    threads.set_num_threads(2)
    monkeypatch.setattr(gemm, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(pointwise, "ONE_THREAD_BELOW", 0)
    a = np.random.default_rng(0).standard_normal((60, 60)).astype("f")
    question = ask(cells.elman(), 12, 6, 4, 70).cast("f")
    jobs = [
        lambda: answer(question)["dkernel"],
        lambda: gemm.matmul(a, a),
        lambda: pointwise.softmax_cross_entropy(a, np.arange(60))[1].stats,
        lambda: pointwise.dropout_mask((999,), 0.3, 1, 2),
    ]
    right = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for want, found in zip(right, pool.map(lambda job: job(), jobs), strict=True):
                assert np.array_equal(want, found)


class Kernel:
    """A Python function in the place of a compiled kernel."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self.function = function
        self.native = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(function)
        self.address = ctypes.cast(self.native, ctypes.c_void_p).value

    def __call__(self, *arguments: int) -> None:
        self.function(*arguments)


def test_more_shards_than_before_and_fewer() -> None:
    seen: list[tuple[int, int, int]] = []
    kernel = Kernel(lambda *arguments: seen.append(arguments))
    for shards in (1, 3, 2, 5):
        seen.clear()
        threads.run(kernel, 7, shards)
        assert sorted(seen) == [(7, k, shards) for k in range(shards)]


def test_the_caller_runs_the_first_shard() -> None:
    where: dict[int, int] = {}
    kernel = Kernel(lambda plan, shard, shards: where.update({shard: threading.get_ident()}))
    threads.run(kernel, 0, 1)
    assert where == {0: threading.get_ident()}
    threads.run(kernel, 0, 3)
    assert where[0] == threading.get_ident() and len(set(where.values())) == 3


def test_helpers_wait_for_more_work_and_then_sleep() -> None:
    gang, seen = threads._Gang(), []
    kernel = Kernel(lambda *arguments: seen.append(arguments))
    rested = [gang.run([(kernel, 0, k, 3) for k in range(3)]) or gang.rest() for _ in range(3)]
    assert len(rested) == 3 and len(seen) == 9
    assert [gang.state(k) for k in range(2)] == [threads.ASLEEP] * 2
    assert gang.state(2) == threads.ASLEEP  # never started
    assert len(gang.helpers) == 2


def test_whoever_asks_often_finds_helpers_awake(keep_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_gang", threads._Gang())
    monkeypatch.setattr(threads, "SOON", 10.0)
    threads.set_num_threads(2)
    assert not threads.ready() and not threads._gang.helpers  # once is not often
    until = time.monotonic() + 10
    while not threads.ready():
        assert time.monotonic() < until
    threads._gang.rest()
    assert not threads._gang.state(0)


@pytest.mark.parametrize(("at_hand", "asked"), [(True, 100), (False, 1000)])
def test_helpers_are_made_sooner_where_what_they_run_need_only_be_loaded(
    at_hand: bool, asked: int, keep_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_gang", threads._Gang())
    monkeypatch.setattr(threads, "is_cached", lambda *_: at_hand)
    monkeypatch.setattr(threads, "SOON", 10.0)
    threads.set_num_threads(2)
    for _ in range(asked - 1):
        assert not threads.ready()
    assert not threads._gang.helpers
    threads.ready()
    assert len(threads._gang.helpers) == 1


def test_more_threads_than_slots_are_refused() -> None:
    kernel = Kernel(lambda *_: None)
    with pytest.raises(ValueError, match="number of threads: at most 256 can work together, got 300"):
        threads.run(kernel, 0, 300)


# The number of threads


@pytest.mark.parametrize("n", [0, -1, 2.0, "2", None, True])
def test_numbers_refused(n: object, keep_threads: None) -> None:
    before = threads.get_num_threads()
    with pytest.raises(ValueError, match="number of threads: expected a whole number of at least 1"):
        threads.set_num_threads(n)
    assert threads.get_num_threads() == before


@pytest.mark.parametrize("given", ["0", "-2", "two", "", "1.5", " 2"])
def test_environment_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMLSTM_NUM_THREADS", given)
    with pytest.raises(ValueError, match=f"NUMLSTM_NUM_THREADS is '{given}'; expected a whole number"):
        threads._default_threads()


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMLSTM_NUM_THREADS", "7")
    assert threads._default_threads() == 7
    monkeypatch.delenv("NUMLSTM_NUM_THREADS")
    assert 1 <= threads._default_threads() <= (os.cpu_count() or 1)


# Other processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use(python) -> None:
    """A child has none of its parent's threads and must build its own, also while those are at work."""
    source = (
        WORK
        + """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside threads
right = work()
busy = threading.Thread(target=lambda: [work() for _ in range(30)])
busy.start()
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        assert_same_bits(right, work())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
busy.join()
assert_same_bits(right, work())
"""
    )
    python(source)


def test_spawn(python, tmp_path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        WORK + "if __name__ == '__main__':\n"
        "    right = work()\n"
        "    with get_context('spawn').Pool(1) as pool:\n"
        "        for found in pool.map(work, range(2)):\n"
        "            assert_same_bits(right, found)\n"
    )
    python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupts_leave_a_working_gang(python) -> None:
    """Ctrl-C at any moment: no hang, no result of another call, no memory given back too early."""
    source = (
        WORK
        + """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
signal.alarm(40)
right, done, caught = work(), False, 0
def interrupt():
    draw = np.random.default_rng(0)
    while not done:
        time.sleep(draw.uniform(0.0005, 0.004))
        os.kill(os.getpid(), signal.SIGINT)
pest = threading.Thread(target=interrupt, daemon=True)
until = time.monotonic() + 2
while True:
    try:
        if not pest.ident:
            pest.start()
        while time.monotonic() < until:
            out = question.forward(training=True)
            assert np.array_equal(out.h, right["h"])
        done = True
        pest.join()
        break
    except KeyboardInterrupt:
        caught += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert_same_bits(right, work())
print(caught)
"""
    )
    assert int(python(source).stdout) > 20
