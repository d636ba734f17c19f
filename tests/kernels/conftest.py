"""What the tests of the kernels share: the choice of how threads split, and fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from numlstm.kernels.cpu import sequence, threads

HERE = Path(__file__).parent


@pytest.fixture
def share_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """share_by(threads, units) makes every sequence run on so many threads, split by units or by batch."""

    def choose(shards: int, units: bool) -> None:
        monkeypatch.setattr(sequence, "_split", lambda *_: (shards, units))

    return choose


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = threads.get_num_threads()
    yield
    threads.set_num_threads(before)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """python(source, NAME=value, ...) runs source in a fresh interpreter; None takes a variable away."""

    def run(source: str, check: bool = True, timeout: float = 120, **environment: str | None):
        env = {**os.environ, "PYTHONPATH": str(HERE), **environment}
        env = {k: v for k, v in env.items() if v is not None}
        command = [sys.executable, "-W", "error", "-c", source]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
        return done

    return run
