"""The process that each side of a comparison lives in, and what is asked of it.

Started once, told over a pipe what to prepare and what to time, silent in between: no shared allocator, no shared
OpenMP runtime, and `settle()` before each answer makes sure that none of its threads spins on into another's turn.
It may use the first so many cores and no others, which is the one way to hold every side, JAX included, to the same
count of threads, and it gets its environment before anything is imported, so that instruction sets can be held back.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

# where cores can't be assigned (macOS), these are what sides are held by; none asks for more than it has cores
THREADS = ("NUMLSTM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Unavailable(Exception):
    """What was asked for is not to be had here; the text says why. The row or the peer is left out."""


@dataclass
class Prepared:
    """A contender's case.

    Attributes:
        call: what to time.
        result: a part of what it computes, for the comparison of the sides.
        about: facts for the report, such as which of two ways was the faster.
    """

    call: Callable[[], Any]
    result: Callable[[], np.ndarray]
    about: dict[str, Any] | None = None


Preparation = Callable[[Any], Prepared]  # a function of a module's top level: its name crosses the pipe


def memory_growth(prepare: Preparation, small: Any, case: Any, steps: int = 3) -> dict[str, float]:
    """MiB by which the resident memory rises at its highest during the first steps of `case`, counted from where
    model and data exist. `small` runs before: it brings in code and kernels, which are not the step's."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise Unavailable("peak memory is read from /proc/self, which only Linux has")
    prepare(small).call()
    call = prepare(case).call
    gc.collect()
    clear.write_text("5")  # sets the highest mark back to what is resident now
    before = _status("VmRSS")
    for _ in range(steps):
        call()
    return {"growth_mib": _status("VmHWM") - before, "before_mib": before}


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise Unavailable(f"/proc/self/status does not say {field}")


def serve(pipe: Any, prepare: Preparation) -> None:
    """Answer until None: ("prepare", key, case) with a part of the result and what is told about it, ("measure", key,
    seconds) with a Window, ("memory", key, (small, case)) with `memory_growth`, ("ask", key, function) with what
    the function returns, ("forget", ...) by freeing everything."""
    calls: dict[str, Callable[[], Any]] = {}
    while (message := pipe.recv()) is not None:
        what, key, value = message
        answer: Any = None
        try:
            if what == "prepare":
                calls.pop(key, None)
                prepared = prepare(value)
                # the first call compiles; it is never timed
                answer = np.array(prepared.result()), prepared.about or {}
                calls[key] = prepared.call
                del prepared
            elif what == "measure":
                answer = common.measure(calls[key], value)
            elif what == "memory":
                answer = memory_growth(prepare, *value)
            elif what == "ask":
                answer = value()
            else:
                calls.clear()
                gc.collect()
            common.settle()
        except Unavailable as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(answer)


class Side:
    """A side's process, which keeps several calls ready under their keys. Use it as a context manager.

    Arguments:
        name: what messages call it.
        prepare: makes a case ready, in that process.
        threads: how many cores it may use.
        window: seconds of a `turn`.
        environment: variables that it starts with, beside those of this process and the counts of threads.
    """

    def __init__(
        self,
        name: str,
        prepare: Preparation,
        threads: int,
        window: float = 0.06,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.window = name, window
        self.pipe, theirs = context.Pipe()
        # not daemonic: a side may have a process of its own
        self.process = context.Process(target=serve, args=(theirs, prepare))
        counts = dict.fromkeys(THREADS, str(threads))
        with _surroundings(threads, {**counts, **(environment or {})}):
            self.process.start()
        theirs.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():  # in the middle of a long call, when the run was interrupted
            self.process.terminate()
            self.process.join()

    def send(self, what: str, key: str = "", value: Any = None) -> None:
        """Tell it something without waiting; `receive` takes the answer."""
        with contextlib.suppress(BrokenPipeError):  # it ended: receive says so
            self.pipe.send((what, key, value))

    def receive(self) -> Any:
        """The answer. Raises Unavailable, or RuntimeError with the other process's error."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise RuntimeError(f"{self.name}: its process ended with {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise type(answer)(f"{self.name}: {answer}")
        return answer

    def ask(self, what: str, key: str = "", value: Any = None) -> Any:
        self.send(what, key, value)
        return self.receive()

    def prepare(self, key: str, case: Any) -> np.ndarray:
        """Make a case ready under a key; a part of its result."""
        return self.ask("prepare", key, case)[0]

    def forget(self) -> None:
        self.ask("forget")

    def turn(self, key: str) -> Callable[[], common.Window]:
        """What times the case for one window."""
        return lambda: self.ask("measure", key, self.window)


@contextlib.contextmanager
def _surroundings(threads: int, environment: Mapping[str, str]) -> Iterator[None]:
    """This process's cores and environment as the one to be started shall inherit them."""
    before = {name: os.environ.get(name) for name in environment}
    pinned = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if pinned else set()
    try:
        os.environ.update(environment)
        if pinned:
            os.sched_setaffinity(0, sorted(allowed)[:threads])
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if pinned:
            os.sched_setaffinity(0, allowed)
