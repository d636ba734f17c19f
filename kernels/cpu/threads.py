"""The threads that kernels run on: one gang of long-lived Python threads, one dispatch a sequence, a barrier inside.

A kernel is called as kernel(plan, shard, shards) with the GIL released, once on each of `shards` threads, the caller's
included. Kernels that meet at barriers need all their shards running at once, so only one gang works at a time (a lock);
a kernel with a single shard needs no gang and no lock, so that servers may call from many threads. After a fork the child
builds its own gang.
"""

from __future__ import annotations

import ctypes
import operator
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from llvmlite import ir

from . import isa
from .simd import I32, I64, call, operation, pointer

__all__ = ["barrier", "get_num_threads", "run", "run_all", "set_num_threads"]

Kernel = Callable[[int, int, int], None]  # (plan, shard, shards)

SPINS = 200  # pauses before a waiting shard offers its core to others
FLAG_BYTES = 64  # one cache line a shard


def _default_threads() -> int:
    given = os.environ.get("NUMLSTM_NUM_THREADS")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdigit() or int(given) < 1:
        raise ValueError(f"NUMLSTM_NUM_THREADS is {given!r}; expected a whole number of threads, 1 or more")
    return int(given)


_num_threads = _default_threads()


def get_num_threads() -> int:
    """How many threads a kernel may use."""
    return _num_threads


def set_num_threads(n: int) -> None:
    """Let kernels use up to `n` threads; results do not depend on it, bit for bit.

    Raises:
        ValueError: n is not a whole number of at least 1.

    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(before)
    """
    global _num_threads
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"number of threads: expected a whole number of at least 1, got {n!r}")
    _num_threads = n


def _current_cpu() -> Callable[[], int]:
    """The processor that the calling thread is on, where the system tells; else always -1."""
    if sys.platform.startswith("linux"):
        try:
            return ctypes.CDLL(None).sched_getcpu
        except (OSError, AttributeError):
            pass  # a C library without it
    return lambda: -1


current_cpu = _current_cpu()


def leave_cpu(cpu: int) -> None:
    """Move the calling thread off `cpu` if it is there and may run elsewhere.

    A woken thread may start on its waker's core (seen after an idle spell, for as long as short calls went on). The two
    would then take turns at every barrier: four times slower than one thread alone.
    """
    if cpu >= 0 and current_cpu() == cpu:
        allowed = os.sched_getaffinity(0)
        if len(allowed) > 1:
            os.sched_setaffinity(0, allowed - {cpu})
            os.sched_setaffinity(0, allowed)


Call = tuple[Kernel, int, int, int]  # kernel, plan, shard, shards


class _Job:
    """One dispatch: its calls, one a thread, and which of those on workers have finished, with what error."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls, self.cpu = calls, current_cpu()
        self.finished: list[BaseException | None] = []
        self.bell: SimpleQueue[None] = SimpleQueue()  # rung whenever one more has finished

    def run(self, k: int) -> None:
        error: BaseException | None = None
        try:
            leave_cpu(self.cpu)
            kernel, *arguments = self.calls[k]
            kernel(*arguments)
        except BaseException as raised:  # the caller's to raise
            error = raised
        self.finished.append(error)
        self.bell.put(None)


class _Worker:
    """A thread that runs the shards it is handed."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue[tuple[_Job, int]] = SimpleQueue()
        threading.Thread(target=self._loop, name="numlstm", daemon=True).start()

    def _loop(self) -> None:
        while True:
            job, k = self.inbox.get()
            job.run(k)
            del job


class _Gang:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: list[_Worker] = []

    def run(self, work: list[Call]) -> None:
        """Make every call at once, the first of them on this thread."""
        others = len(work) - 1
        with self.lock:
            while len(self.workers) < others:
                self.workers.append(_Worker())
            job, errors, started = _Job(work), [], []
            calls = [partial(w.inbox.put, (job, k)) for k, w in enumerate(self.workers[:others], 1)]
            calls += [partial(started.append, True), partial(*work[0])]
            try:
                # One call of C code, in which Python raises no KeyboardInterrupt: all shards start, or none.
                deque(map(operator.call, calls), maxlen=0)
            finally:
                # Whatever happens, the arrays must outlive every shard, also when Ctrl-C arrives here.
                while started and len(job.finished) < others:
                    try:
                        job.bell.get()
                    except BaseException as raised:
                        errors.append(raised)
        errors += [error for error in job.finished if error is not None]
        if errors:
            raise errors[0]


_gang = _Gang()


def run(kernel: Kernel, plan: int, shards: int) -> None:
    """Call kernel(plan, shard, shards) for each shard, at the same time, and return when all are done."""
    if shards == 1:
        kernel(plan, 0, 1)
    else:
        _gang.run([(kernel, plan, k, shards) for k in range(shards)])


def run_all(jobs: Sequence[tuple[Kernel, int, int]]) -> None:
    """`run` each of the jobs (kernel, plan, shards): all at the same time if there are threads enough, else in turn."""
    if len(jobs) > 1 and sum(shards for _, _, shards in jobs) <= _num_threads:
        _gang.run([(kernel, plan, k, shards) for kernel, plan, shards in jobs for k in range(shards)])
    else:
        for job in jobs:
            run(*job)


def _new_gang() -> None:
    global _gang
    _gang = _Gang()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_gang)


@operation("0(iiii)")
def barrier(b, flags, shard, shards, step):
    """Wait until all shards have come to `step` (which counts up); flags: one zeroed cache line a shard."""
    address = lambda k: pointer(b, b.add(flags, b.mul(k, I64(FLAG_BYTES))), I64)
    announce, outer, spin, wait, pause, give_way, following, done = (b.append_basic_block() for _ in range(8))
    b.cbranch(b.icmp_signed(">", shards, I64(1)), announce, done)
    b.position_at_end(announce)
    b.store_atomic(step, address(shard), "release", 8)
    b.branch(outer)
    b.position_at_end(outer)
    other = b.phi(I64)
    other.add_incoming(I64(0), announce)
    b.branch(spin)
    b.position_at_end(spin)
    count = b.phi(I64)
    count.add_incoming(I64(0), outer)
    arrived = b.icmp_signed(">=", b.load_atomic(address(other), "acquire", 8), step)
    b.cbranch(arrived, following, wait)
    b.position_at_end(wait)
    next_count = b.add(count, I64(1))
    b.cbranch(b.icmp_signed("<", next_count, I64(SPINS)), pause, give_way)
    b.position_at_end(pause)
    if isa.IS_X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType())
    count.add_incoming(next_count, pause)
    b.branch(spin)
    b.position_at_end(give_way)
    if os.name == "posix":
        call(b, "sched_yield", I32)
    else:
        call(b, "SwitchToThread", I32)
    count.add_incoming(next_count, give_way)
    b.branch(spin)
    b.position_at_end(following)
    next_other = b.add(other, I64(1))
    other.add_incoming(next_other, following)
    b.cbranch(b.icmp_signed("<", next_other, shards), outer, done)
    b.position_at_end(done)
