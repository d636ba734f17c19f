"""Batched float32 products: right at any shape and stride, the same bits on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest

from numlstm.kernels.cpu import batched, threads
from numlstm.kernels.cpu.batched import batched_matmul

SHAPES = [
    ((3, 5, 7, 9), (3, 5, 9, 4)),
    ((2, 1, 33, 100), (4, 100, 65)),  # leading axes broadcast
    ((5, 1, 1), (5, 1, 300)),
    ((2, 513, 70), (2, 70, 17)),
    ((2, 3, 2, 20, 30), (30, 40)),
    ((20, 30), (30, 40)),
]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype("f")


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes_strides_and_threads(shapes, keep_threads: None, monkeypatch) -> None:
    monkeypatch.setattr(batched, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(batched, "SMALL", 0)
    a, b = (draw(*s) for s in shapes)
    right = a.astype("d") @ b.astype("d")
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(batched_matmul(a, b))
    assert found[0].shape == right.shape and found[0].dtype == np.float32
    assert np.max(np.abs(found[0] - right)) <= 2e-6 * np.max(np.abs(right))
    lay = lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    for other in (*found[1:], batched_matmul(lay(a), b), batched_matmul(a, lay(b))):
        assert np.array_equal(found[0], other)


def test_nothing_to_sum_and_nothing_to_do() -> None:
    assert not batched_matmul(np.zeros((2, 3, 0), "f"), np.zeros((2, 0, 4), "f")).any()
    assert batched_matmul(np.zeros((0, 3, 5), "f"), np.zeros((0, 5, 4), "f")).shape == (0, 3, 4)
    with pytest.raises(ValueError, match="expected"):
        batched_matmul(np.zeros((2, 3, 5), "f"), np.zeros((2, 4, 4), "f"))
