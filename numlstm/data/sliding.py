"""Windows over long series as a source of batches: gathered when a batch is drawn, never all in memory at once.

A window ends at row `origin`; its target is the `horizon` rows after it. Several series lie one behind the other in one
array, and the origins are those rows whose window and target stay inside one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from numlstm import random
from numlstm.data.batches import Batch, Batches

__all__ = ["SlidingWindows"]


class SlidingWindows(Batches):
    """Windows of `inputs` (N, F) that end at rows `origins`, with what follows in `targets` (N, K).

    Arguments:
        inputs: (N, F) float32. origins: (M,) rows. window, horizon: rows read, rows that are targets.
        targets: (N, K), or None for prediction. base: (N, K), what the targets of an origin's row are relative to.
        spread: (K,), what they are divided by.
        known: (F,) True for inputs known ahead of time; then x is (B, window + horizon, F + 1): behind the window come
            the known inputs of the rows ahead, the others zero, and the last input says which is which; y is
            (B, window + horizon, K) and counts, by its sample weights, in the rows ahead. Else y is (B, horizon * K).
        batch_size: windows a batch.

    >>> rows = np.arange(5.0)[:, None]
    >>> windows = SlidingWindows(rows, np.array([1, 2]), window=2, horizon=1, targets=rows, base=rows)
    >>> batch = next(windows.epoch())
    >>> batch.x[..., 0].tolist(), batch.y.tolist()
    ([[0.0, 1.0], [1.0, 2.0]], [[1.0], [1.0]])
    """

    origins: np.ndarray
    window: int
    horizon: int
    targets: np.ndarray | None
    base: np.ndarray | None
    spread: np.ndarray
    known: np.ndarray | None
    rows: int
    steps: int

    def __init__(
        self,
        inputs: np.ndarray,
        origins: np.ndarray,
        *,
        window: int,
        horizon: int,
        targets: np.ndarray | None = None,
        base: np.ndarray | None = None,
        spread: Any = 1.0,
        known: np.ndarray | None = None,
        batch_size: int = 32,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        self.inputs: np.ndarray = np.asarray(inputs, np.float32)
        self.origins, self.window, self.horizon = np.asarray(origins), window, horizon
        self.targets, self.base, self.spread, self.known = targets, base, np.asarray(spread), known
        self.batch_size: int = int(batch_size)
        self.count: int = len(self.origins)
        self.rows, self.steps = self.count, math.ceil(self.count / self.batch_size)

    def epoch(
        self, *, shuffle: bool = False, chunk: int | None = None, timed: bool = True
    ) -> Iterator[Batch]:
        if chunk is not None:
            raise ValueError("bptt_steps: windows are whole; they can't be cut along time")
        origins = self.origins[random.generator().permutation(self.count)] if shuffle else self.origins
        for start in range(0, self.count, self.batch_size):
            yield self._gather(origins[start : start + self.batch_size])

    def relative(self, origins: np.ndarray) -> np.ndarray:
        """The targets (B, horizon, K) of the windows that end at `origins`, as a network is to put them out."""
        if self.targets is None:
            raise ValueError("targets: none were given to these windows")
        base = 0.0 if self.base is None else self.base[origins][:, None]
        return (self.targets[origins[:, None] + np.arange(1, self.horizon + 1)] - base) / self.spread

    def _gather(self, origins: np.ndarray) -> Batch:
        ahead = origins[:, None] + np.arange(1, self.horizon + 1)
        x = self.inputs[origins[:, None] + np.arange(1 - self.window, 1)]
        y = None if self.targets is None else self.relative(origins).astype(np.float32)
        if self.known is None:
            return Batch(x, None if y is None else y.reshape(len(y), -1))
        rows, features = len(origins), self.inputs.shape[1]
        whole = np.zeros((rows, self.window + self.horizon, features + 1), np.float32)
        whole[:, : self.window, :features] = x
        whole[:, self.window :, :features] = self.inputs[ahead] * self.known
        whole[:, self.window :, features] = 1.0
        if y is None:
            return Batch(whole)
        silent = np.zeros((rows, self.window, y.shape[2]), np.float32)
        weight = np.zeros((rows, self.window + self.horizon), np.float32)
        weight[:, self.window :] = 1.0
        return Batch(whole, np.concatenate([silent, y], axis=1), weight, timed=True)
