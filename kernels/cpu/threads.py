"""The threads that kernels run on: one gang of long-lived helpers, one dispatch a sequence, a barrier inside.

A kernel is called as kernel(plan, shard, shards) without the GIL, once on each of `shards` threads, the caller's included.
Kernels that meet at barriers need all their shards running at once, so only one gang works at a time (a lock); a kernel
with a single shard needs no gang and no lock, so that servers may call from many threads. After a fork the child builds
its own gang.

A helper that has finished looks out for more work for about half a millisecond before it sleeps, in compiled code, without
the GIL. While it does, a dispatch is one native call that costs about a microsecond; waking it costs fifty. What passes
between the two is the helper's slot, a cache line or two: its state, and the call that it is to make.
"""

from __future__ import annotations

import atexit
import ctypes
import operator
import os
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from queue import SimpleQueue
from typing import Any

from llvmlite import ir
from numba import njit, types

from . import isa
from .cache import compile_kernel, is_cached
from .simd import I32, I64, INNER_OPTIONS, call, caller, load_int, operation, pointer

__all__ = ["barrier", "get_num_threads", "prepare", "ready", "run", "run_all", "set_num_threads"]

Call = tuple[Any, int, int, int]  # kernel, plan, shard, shards

MOST_HELPERS = 255
SOON = 2e-3  # seconds
# So many questions whether helpers are awake come before the first is made for them: little calls are a tenth of a
# millisecond shorter each then, but what a helper runs is compiled first, which takes a second, or loaded from the cache.
ASKED_TO_COMPILE, ASKED_TO_LOAD = 1000, 100
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


current_cpu: Callable[[], int] = _current_cpu()


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


# The states of a helper, in its slot; only the holder of the gang's lock hands out work.
ASLEEP, WAITING, RESERVED, WORKING = range(4)
SLOT_BYTES = 128  # two cache lines: processors fetch pairs
LOOKOUT = 30_000  # pauses; about half a millisecond


@operation("i(i)")
def load_acquire(b, address):
    return b.load_atomic(pointer(b, address, I64), "acquire", 8)


@operation("0(ii)")
def store_release(b, address, value):
    b.store_atomic(value, pointer(b, address, I64), "release", 8)


@operation("i(iii)")
def exchange_if(b, address, expected, new):
    """Store `new` where `expected` stands; whether it did."""
    pair = b.cmpxchg(pointer(b, address, I64), expected, new, "acq_rel", "acquire")
    return b.zext(b.extract_value(pair, 1), I64)


@operation("i(ii)")
def exchange(b, address, new):
    """Store `new`; what stood there."""
    return b.atomic_rmw("xchg", pointer(b, address, I64), new, "acq_rel")


@operation("0()")
def pause(b):
    if isa.IS_X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


@operation("0()")
def give_way(b):
    """Offer the core to other threads."""
    call(b, "sched_yield" if os.name == "posix" else "SwitchToThread", I32)


@operation("i()")
def this_cpu(b):
    """The processor that this thread is on, or -1 where the system does not tell."""
    return b.sext(call(b, "sched_getcpu", I32), I64) if sys.platform.startswith("linux") else I64(-1)


call_kernel: Any = caller(3)


def serve(slot: int, _: int, __: int) -> int:
    """What a helper does from its waking until it sleeps (the result is -1), or finds itself on the processor of who gives
    it work (the result)."""
    waited = 0
    while True:
        state = load_acquire(slot)
        if state == WORKING:
            call_kernel(load_int(slot + 8), load_int(slot + 16), load_int(slot + 24), load_int(slot + 32))
            cpu, waited = load_int(slot + 40), 0
            store_release(slot, WAITING)
            if cpu >= 0 and cpu == this_cpu():
                return cpu
        elif state == ASLEEP:
            exchange_if(slot, ASLEEP, WAITING)
        elif waited < LOOKOUT:
            waited += 1
            pause()
            if waited % SPINS == 0:
                give_way()
        elif exchange_if(slot, WAITING, ASLEEP) != 0:
            return -1


@njit(**INNER_OPTIONS)
def _hand_out(work, slots, others):
    for k in range(others):
        slot, row = slots + k * SLOT_BYTES, work + (k + 1) * 32
        for n in range(0, 32, 8):
            store_release(slot + 8 + n, load_int(row + n))
        store_release(slot + 40, this_cpu())
        exchange(slot, WORKING)


@njit(**INNER_OPTIONS)
def _lead(work, slots, others):
    call_kernel(load_int(work), load_int(work + 8), load_int(work + 16), load_int(work + 24))
    for k in range(others):
        waited = 0
        while load_acquire(slots + k * SLOT_BYTES) == WORKING:
            waited += 1
            pause()
            if waited % SPINS == 0:
                give_way()


def at_once(work: int, slots: int, others: int) -> int:
    """Make all calls if every helper is waiting: whether it did. work: (kernel, plan, shard, shards) for each thread."""
    for k in range(others):
        if exchange_if(slots + k * SLOT_BYTES, WAITING, RESERVED) == 0:
            for j in range(k):
                store_release(slots + j * SLOT_BYTES, WAITING)
            return 0
    _hand_out(work, slots, others)
    _lead(work, slots, others)
    return 1


def hand_out(work: int, slots: int, others: int) -> int:
    """Give the helpers their work, asleep or not."""
    _hand_out(work, slots, others)
    return 1


def lead(work: int, slots: int, others: int) -> int:
    """The caller's part: its own call, then to wait for the others'."""
    _lead(work, slots, others)
    return 1


HELPERS_RUN = serve, at_once, hand_out, lead


@cache
def _native(function: Callable[..., Any]) -> Any:
    return compile_kernel(function, function.__name__, "", types.int64(types.int64, types.int64, types.int64))


class _Helper:
    """A thread that serves its slot, and sleeps on its bell; the bell says which core it must not wake on."""

    def __init__(self, slot: int) -> None:
        self.slot, self.bell = slot, SimpleQueue[int]()
        threading.Thread(target=self._loop, name="numlstm", daemon=True).start()

    def _loop(self) -> None:
        while True:
            cpu, awake = self.bell.get(), True
            while awake:
                leave_cpu(cpu)
                cpu = _native(serve)(self.slot, 0, 0)
                awake = cpu >= 0


class _Gang:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.helpers: list[_Helper] = []
        self.stirred, self.asked = 0.0, 0
        self.at_hand: bool | None = None  # whether what helpers run is in the cache; nobody has looked yet
        # Never freed: a helper may look at its slot while the interpreter is going down.
        self.board = (ctypes.c_int64 * ((MOST_HELPERS + 1) * SLOT_BYTES // 8))()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.board))
        self.slots = -(-ctypes.addressof(self.board) // SLOT_BYTES) * SLOT_BYTES

    def run(self, work: list[Call]) -> None:
        """Make every call at once, the first of them on this thread."""
        others = len(work) - 1
        table = array("q", [word for kernel, *rest in work for word in (kernel.address, *rest)])
        arguments = table.buffer_info()[0], self.slots, others
        with self.lock:
            self.grow(others)
            if _native(at_once)(*arguments):
                return
            cpu, helpers = current_cpu(), self.helpers[:others]
            calls = [partial(_native(hand_out), *arguments), *(partial(h.bell.put, cpu) for h in helpers)]
            calls.append(partial(_native(lead), *arguments))
            # One call of C code, in which Python raises no KeyboardInterrupt: all shards start, or none.
            deque(map(operator.call, calls), maxlen=0)

    def grow(self, count: int) -> None:
        if count > MOST_HELPERS:
            raise ValueError(
                f"number of threads: at most {MOST_HELPERS + 1} can work together, got {count + 1}"
            )
        if len(self.helpers) < count:
            prepare()  # here: a helper that compiles would hold up everybody's Python
        while len(self.helpers) < count:
            self.helpers.append(_Helper(self.slots + len(self.helpers) * SLOT_BYTES))

    def state(self, k: int) -> int:
        return ctypes.c_int64.from_address(self.slots + k * SLOT_BYTES).value

    def ready(self) -> bool:
        """Whether a dispatch would cost next to nothing. If not, but this is asked again soon, helpers wake meanwhile."""
        others = _num_threads - 1
        if len(self.helpers) >= others and all(self.state(k) != ASLEEP for k in range(others)):
            return True
        now = time.perf_counter()
        often, self.stirred = now - self.stirred < SOON, now
        self.asked += 1
        if not self.helpers and not self.worth_making():
            return False
        if often and others <= MOST_HELPERS and self.lock.acquire(blocking=False):
            try:
                self.grow(others)
                for helper in self.helpers[:others]:
                    if helper.bell.empty():  # or it would wake as often as it was asked for
                        helper.bell.put(current_cpu())
            finally:
                self.lock.release()
        return False

    def worth_making(self) -> bool:
        """Whether helpers have been asked for often enough that the first is made."""
        if self.asked >= ASKED_TO_LOAD and self.at_hand is None:
            self.at_hand = all(is_cached(function.__name__, "") for function in HELPERS_RUN)
        return self.asked >= (ASKED_TO_LOAD if self.at_hand else ASKED_TO_COMPILE)

    def rest(self) -> None:
        """Wait until no helper is in compiled code, a second at most."""
        until = time.perf_counter() + 1
        while any(self.state(k) != ASLEEP for k in range(len(self.helpers))) and time.perf_counter() < until:
            time.sleep(1e-4)


_gang = _Gang()
atexit.register(lambda: _gang.rest())  # compiled code must not outlive what it reads


def ready() -> bool:
    """Whether the helpers are awake, so that little work is worth sharing too; results do not depend on it."""
    return _num_threads > 1 and _gang.ready()


def prepare() -> None:
    """Compile what a dispatch to several threads takes."""
    for function in HELPERS_RUN:
        _native(function)


def run(kernel: Any, plan: int, shards: int) -> None:
    """Call kernel(plan, shard, shards) for each shard, at the same time, and return when all are done.

    `kernel` is what `compile_kernel` gave.
    """
    if shards == 1:
        kernel(plan, 0, 1)
    else:
        _gang.run([(kernel, plan, k, shards) for k in range(shards)])


def run_all(jobs: Sequence[tuple[Any, int, int]]) -> None:
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
