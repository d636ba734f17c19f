"""Cross-entropy, masks and optimizer updates beside their NumPy twins: tails, threads, odd input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose

from numlstm.kernels import reference_pointwise as reference
from numlstm.kernels.cpu import pointwise, threads
from numlstm.kernels.cpu.isa import LANES


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype("f")


@pytest.fixture
def all_threads(monkeypatch: pytest.MonkeyPatch, keep_threads: None) -> None:
    """Share everything out, however small."""
    monkeypatch.setattr(pointwise, "ONE_THREAD_BELOW", 0)


# Softmax cross-entropy


@pytest.mark.parametrize("size", [(1, 1), (10, 65), (3, 7), (700, 33), (2, 1000), (5, LANES), (0, 3)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy(size, scale: float, all_threads: None) -> None:
    logits = draw(*size) * np.float32(scale)
    labels = np.random.default_rng(0).integers(0, size[1], size[0])
    right = (
        reference.softmax_cross_entropy(logits.astype("d"), labels)
        if size[0]
        else (np.zeros(0), np.zeros(size))
    )
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(pointwise.softmax_cross_entropy(logits, labels))
        assert all(np.array_equal(a, b) for a, b in zip(found[0], found[-1], strict=True))
    assert_allclose(found[0][0], right[0], rtol=2e-6, atol=2e-6)
    assert_allclose(found[0][1], right[1], rtol=5e-6, atol=1e-6)


def test_cross_entropy_far_from_zero() -> None:
    """Only differences count; -infinity is a class that can't be."""
    logits = np.array([[1e4, 1e4 - 1, -1e4], [-3e38, 0, 3e38], [0, -np.inf, 0], [5, np.nan, 1]], "f")
    labels = np.array([0, 2, 0, 0])
    losses, d = pointwise.softmax_cross_entropy(logits, labels)
    assert_allclose(losses, [np.log1p(np.exp(-1)), 0, np.log(2), np.nan], rtol=1e-6, atol=1e-7)
    assert_allclose(d[2], [-0.5, 0, 0.5], atol=1e-6)
    assert np.isnan(d[3]).any() and np.isfinite(d[:3]).all()
    assert pointwise.softmax_cross_entropy(logits[2:3], np.array([1]))[0][0] == np.inf


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", "uint64", "bool"])
def test_labels_of_any_whole_type(kind: str) -> None:
    logits, labels = draw(4, 3), np.array([0, 1, 1, 0])
    right = pointwise.softmax_cross_entropy(logits, labels)
    found = pointwise.softmax_cross_entropy(logits, labels.astype(kind))
    assert all(np.array_equal(a, b) for a, b in zip(right, found, strict=True))


def test_cross_entropy_of_views() -> None:
    logits, labels = draw(6, 20), np.arange(6)
    right = pointwise.softmax_cross_entropy(logits, labels)
    for view in (
        logits.astype("d"),
        np.asfortranarray(logits),
        logits[::-1].copy()[::-1],
        np.repeat(logits, 2, 0)[::2],
    ):
        found = pointwise.softmax_cross_entropy(view, np.repeat(labels, 2)[::2])
        assert all(np.array_equal(a, b) for a, b in zip(right, found, strict=True))


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 3), [0, 3], r"labels: expected whole numbers in 0\.\.2, got 0\.\.3"),
        ((2, 3), [-1, 0], r"labels: .*got -1\.\.0"),
        ((2, 3), [0, 1, 2], r"labels: expected .* of shape \(2,\), got int64 of \(3,\)"),
        ((2, 3), [[0], [1]], r"labels: .*\(2, 1\)"),
        ((2, 3), [0.0, 1.0], r"labels: expected whole numbers .*float64"),
        ((2, 3), np.array([0, 2**63], np.uint64), r"labels: expected whole numbers in"),
        ((6,), [0], r"logits: expected shape \(M, V\), got \(6,\)"),
        ((2, 0), [0, 0], r"labels: "),
    ],
)
def test_cross_entropy_refused(shape, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pointwise.softmax_cross_entropy(np.zeros(shape, "f"), np.asarray(labels))


# Random masks


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1000,), (7, 13), (2, 3, 5), (0,), (4, 0)])
@pytest.mark.parametrize(
    ("rate", "seed", "stream"),
    [(0.3, 1, 5), (0.5, 2**40 + 3, 2**33 + 1), (0.999, 2**64 - 1, 2**64 - 1), (0.0, 0, 0)],
)
def test_masks_are_the_reference_ones(shape, rate: float, seed: int, stream: int, all_threads: None) -> None:
    right = reference.dropout_mask(shape, rate, seed, stream)
    for n in (1, 3):
        threads.set_num_threads(n)
        found = pointwise.dropout_mask(shape, rate, seed, stream)
        assert found.dtype == right.dtype and found.shape == right.shape == shape
        assert found.tobytes() == right.tobytes()


def test_an_element_depends_on_its_place_alone() -> None:
    long = pointwise.dropout_mask((1000,), 0.4, 7, 3)
    assert np.array_equal(pointwise.dropout_mask((37,), 0.4, 7, 3), long[:37])
    assert np.array_equal(pointwise.dropout_mask((10, 100), 0.4, 7, 3).ravel(), long)
    assert (
        abs(np.count_nonzero(pointwise.dropout_mask((100000,), 0.4, 7, 3)) - 60000) < 800
    )  # 5 standard deviations
    assert not np.array_equal(pointwise.dropout_mask((1000,), 0.4, 8, 3), long)
    assert not np.array_equal(pointwise.dropout_mask((1000,), 0.4, 7, 4), long)


def test_masks_are_float32() -> None:
    with pytest.raises(ValueError, match=r"dtype: .*float64"):
        pointwise.dropout_mask((3,), 0.5, 0, 0, np.float64)


# Optimizers' updates

# name, how many slots, which of them are given, the settings after them
UPDATES = {
    "sgd": ("sgd", (), (0.1, 0.0, False), 1),
    "momentum": ("sgd", (0,), (0.1, 0.9, False), 1),
    "nesterov": ("sgd", (0,), (0.1, 0.9, True), 1),
    "rmsprop": ("rmsprop", (0,), (0.01, 0.9, 0.0, 1e-7), 3),
    "rmsprop momentum": ("rmsprop", (0, 2), (0.01, 0.9, 0.5, 1e-7), 3),
    "rmsprop centred": ("rmsprop", (0, 1, 2), (0.01, 0.9, 0.5, 1e-3), 3),
    "adam": ("adam", (0, 1), (0.01, 0.9, 0.999, 1e-7, 0.0), 3),
    "amsgrad": ("adam", (0, 1, 2), (0.01, 0.9, 0.999, 1e-7, 0.0), 3),
    "adamw": ("adam", (0, 1), (0.01, 0.9, 0.999, 1e-7, 0.004), 3),
}


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("shape", [(), (1,), (33, 5), (LANES,), (3, LANES + 1), (0,)], ids=str)
def test_updates(case: str, shape, all_threads: None) -> None:
    name, given, settings, slots = UPDATES[case]
    found = []
    for n in (1, 2):
        threads.set_num_threads(n)
        w, w64 = draw(*shape, 2)[..., 0].copy(), draw(*shape, 2)[..., 0].astype("d")
        mine = [np.zeros(shape, "f") if k in given else None for k in range(slots)]
        right = [np.zeros(shape) if k in given else None for k in range(slots)]
        for step in range(4):
            g = draw(step + 1, *shape, 3)[0, ..., 0]
            getattr(pointwise, name + "_update")(w, g, *mine, *settings)
            getattr(reference, name + "_update")(w64, g.astype("d"), *right, *settings)
        assert_allclose(w, w64, rtol=1e-5, atol=2e-6)
        for a, b in zip(mine, right, strict=True):
            if b is not None:
                assert_allclose(a, b, rtol=1e-5, atol=2e-6)
        found.append(w)
    assert np.array_equal(found[0], found[1])


def test_gradients_of_any_layout() -> None:
    w, g = draw(8, 9), draw(9, 8)
    right = w - np.float32(0.5) * g.T
    for gradient in (g.T, g.T.copy(), g.T.astype("d"), g.T[::-1].copy()[::-1]):
        v = w.copy()
        pointwise.sgd_update(v, gradient, None, 0.5, 0.0, False)
        assert_allclose(v, right, rtol=1e-6)


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


WRONG: dict[str, tuple[Callable, str]] = {
    "float64 variable": (lambda w, g, v: (w.astype("d"), g, v), "contiguous writeable float32"),
    "variable of a view": (lambda w, g, v: (w.T, g.T, v.T.copy()), "contiguous"),
    "read-only variable": (lambda w, g, v: (read_only(w), g, v), "writeable"),
    "float64 slot": (lambda w, g, v: (w, g, v.astype("d")), "float32"),
    "slot of another shape": (lambda w, g, v: (w, g, v[:2].copy()), "one shape"),
    "gradient of another shape": (
        lambda w, g, v: (w, g[0], v),
        r"gradient of shape \(4,\) for a variable of shape \(3, 4\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_updates_refused(case: str) -> None:
    change, message = WRONG[case]
    arguments = change(draw(3, 4), draw(3, 4), np.zeros((3, 4), "f"))
    before = [a.copy() for a in arguments]
    with pytest.raises(ValueError, match=message):
        pointwise.sgd_update(*arguments, 0.1, 0.9, False)
    assert all(np.array_equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_nan_reaches_the_weights() -> None:
    w = np.ones(40, "f")
    g = np.zeros(40, "f")
    g[3] = np.nan
    pointwise.adam_update(w, g, np.zeros(40, "f"), np.zeros(40, "f"), None, 0.1, 0.9, 0.999, 1e-7, 0.0)
    assert np.isnan(w[3]) and np.isfinite(np.delete(w, 3)).all()
