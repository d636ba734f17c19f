"""One seed and a counter of streams: where every random number of the library comes from.

Nothing draws from a hidden generator. Whoever needs randomness (an initializer, a shuffle, a dropout mask)
takes the next stream number; (seed, stream) then fixes all its numbers, by the counter-based generator Philox
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whatever the backend and the number of
threads. The state is two integers, so that a training run can be taken up where it stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

__all__ = ["generator", "get_state", "next_stream", "seed", "set_seed", "set_state", "within"]

_LOCK = threading.Lock()
_LIMIT = 2**64


class _State:
    """The seed, once somebody needs one, and the number of the next stream."""

    seed: int | None = None
    stream: int = 0


_STATE = _State()
_WITHIN: ContextVar[_State | None] = ContextVar("numlstm_random", default=None)


def _state() -> _State:
    return _WITHIN.get() or _STATE


def _check(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < _LIMIT:
        raise ValueError(f"{name}: {value!r} came, expected an integer from 0 to 2**64 - 1")
    return int(value)


def set_seed(seed: int) -> None:
    """Start all randomness of the library over: same seed, same backend, same bits.

    Without it a seed is taken from the operating system when the first random number is drawn.

    Raises:
        ValueError: not an integer from 0 to 2**64 - 1.

    >>> set_seed(0)
    >>> a = generator().random()
    >>> set_seed(0)
    >>> a == generator().random()
    True
    """
    seed = _check("seed", seed)
    state = _state()
    with _LOCK:
        state.seed, state.stream = seed, 0


@contextmanager
def within(seed: int) -> Iterator[None]:
    """Inside, all randomness comes from `seed` alone, and outside goes on as if nothing had been drawn.

    Each thread (each context) has its own, so that two models trained side by side don't draw from each other's numbers.

    Raises:
        ValueError: not an integer from 0 to 2**64 - 1.

    >>> def draw():
    ...     with within(3):
    ...         return generator().random()
    >>> draw() == draw()
    True
    """
    state = _State()
    state.seed = _check("seed", seed)
    token = _WITHIN.set(state)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def _seed() -> int:  # under the lock
    state = _state()
    if state.seed is None:
        state.seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    return state.seed


def seed() -> int:
    """The seed in use: what `set_seed` was given, or what the operating system gave.

    >>> set_seed(7)
    >>> seed()
    7
    """
    with _LOCK:
        return _seed()


def next_stream() -> int:
    """A stream number that has not been used since `set_seed`: 0, 1, 2, ...

    >>> set_seed(0)
    >>> next_stream(), next_stream()
    (0, 1)
    """
    state = _state()
    with _LOCK:
        stream = state.stream
        state.stream += 1
        return stream


def generator(stream: int | None = None) -> np.random.Generator:
    """A NumPy generator over one stream of the seed; the next unused stream if none is named.

    >>> set_seed(0)
    >>> bool(generator(5).random() == generator(5).random())
    True
    """
    stream = next_stream() if stream is None else _check("stream", stream)
    return np.random.Generator(np.random.Philox(key=np.array([seed(), stream], np.uint64)))


def get_state() -> dict[str, int]:
    """The state as a dict that JSON can hold; `set_state` takes it back.

    >>> set_seed(3)
    >>> get_state()
    {'seed': 3, 'stream': 0}
    """
    with _LOCK:
        return {"seed": _seed(), "stream": _state().stream}


def set_state(state: dict[str, int]) -> None:
    """Go on from where `get_state` was called.

    Raises:
        ValueError: not such a dict.
    """
    if not isinstance(state, dict) or set(state) != {"seed", "stream"}:
        raise ValueError(f"state: {state!r} came, expected a dict with the integers 'seed' and 'stream'")
    seed, stream = _check("state['seed']", state["seed"]), _check("state['stream']", state["stream"])
    target = _state()
    with _LOCK:
        target.seed, target.stream = seed, stream
