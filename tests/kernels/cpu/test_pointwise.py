"""Cross-entropy, masks and optimizer updates beside their NumPy twins: tails, threads, odd input."""

from __future__ import annotations

import copy
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


def loss_and_gradient(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The losses, and their sum's gradient."""
    losses, residual = pointwise.softmax_cross_entropy(logits, labels)
    return losses, pointwise.softmax_cross_entropy_gradient(residual, np.ones(len(losses), "f"))


@pytest.mark.parametrize("size", [(1, 1), (10, 65), (3, 7), (700, 33), (2, 1000), (5, LANES), (0, 3)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy(size, scale: float, all_threads: None) -> None:
    logits, upstream = draw(*size) * np.float32(scale), draw(size[0])
    upstream[::3] = 0
    labels = np.random.default_rng(0).integers(0, size[1], size[0])
    right, d = np.zeros(0), np.zeros(size)
    if size[0]:
        right, residual = reference.softmax_cross_entropy(logits.astype("d"), labels)
        d = reference.softmax_cross_entropy_gradient(residual, upstream.astype("d"))
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        losses, residual = pointwise.softmax_cross_entropy(logits, labels)
        found.append((losses, pointwise.softmax_cross_entropy_gradient(residual, upstream)))
        assert all(np.array_equal(a, b) for a, b in zip(found[0], found[-1], strict=True))
    assert_allclose(found[0][0], right, rtol=2e-6, atol=2e-6)
    assert_allclose(found[0][1], d, rtol=5e-6, atol=2e-6)
    assert not found[0][1][::3].any()


def test_cross_entropy_far_from_zero() -> None:
    """Only differences count; -infinity is a class that can't be; a row that does not count may hold anything."""
    logits = np.array([[1e4, 1e4 - 1, -1e4], [-3e38, 0, 3e38], [0, -np.inf, 0], [5, np.nan, 1]], "f")
    labels = np.array([0, 2, 0, 0])
    losses, d = loss_and_gradient(logits, labels)
    assert_allclose(losses, [np.log1p(np.exp(-1)), 0, np.log(2), np.nan], rtol=1e-6, atol=1e-7)
    assert_allclose(d[2], [-0.5, 0, 0.5], atol=1e-6)
    assert np.isnan(d[3]).any() and np.isfinite(d[:3]).all()
    assert loss_and_gradient(logits[2:3], np.array([1]))[0][0] == np.inf
    _, residual = pointwise.softmax_cross_entropy(logits, labels)
    assert not pointwise.softmax_cross_entropy_gradient(residual, np.array([1, 1, 1, 0], "f"))[3].any()


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", "uint64", "bool"])
def test_labels_of_any_whole_type(kind: str) -> None:
    logits, labels = draw(4, 3), np.array([0, 1, 1, 0])
    right = loss_and_gradient(logits, labels)
    found = loss_and_gradient(logits, labels.astype(kind))
    assert all(np.array_equal(a, b) for a, b in zip(right, found, strict=True))


def test_cross_entropy_of_views() -> None:
    logits, labels = draw(6, 20), np.arange(6)
    right = loss_and_gradient(logits, labels)
    for view in (
        logits.astype("d"),
        np.asfortranarray(logits),
        logits[::-1].copy()[::-1],
        np.repeat(logits, 2, 0)[::2],
    ):
        found = loss_and_gradient(view, np.repeat(labels, 2)[::2])
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


def test_upstream_gradient_of_another_shape() -> None:
    _, residual = pointwise.softmax_cross_entropy(draw(3, 4), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"dlosses: expected shape \(3,\), got \(3, 1\)"):
        pointwise.softmax_cross_entropy_gradient(residual, np.ones((3, 1), "f"))


# Softmax


@pytest.mark.parametrize("size", [(1, 1), (10, 65), (5, LANES), (2, 1000), (0, 3)])
def test_softmax(size, all_threads: None) -> None:
    x, dy = draw(*size) * np.float32(20), draw(*size[::-1]).T  # not contiguous
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        y = pointwise.softmax(x)
        found.append((y, pointwise.softmax_gradient(y, dy)))
    right = reference.softmax(x.astype("d")) if size[0] else np.zeros(size)
    assert_allclose(found[0][0], right, rtol=1e-5, atol=1e-7)
    assert_allclose(found[0][1], reference.softmax_gradient(right, dy), rtol=1e-5, atol=1e-6)
    for one in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], one, strict=True))


def test_softmax_far_from_zero_and_refused() -> None:
    y = pointwise.softmax(np.array([[1e4, -1e4, 1e4], [-np.inf, 0, -np.inf]], "f"))
    assert y.tolist() == [[0.5, 0, 0.5], [0, 1, 0]]
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 3\), got \(2,\)"):
        pointwise.softmax_gradient(y, np.ones(2, "f"))


# Embeddings


@pytest.mark.parametrize(
    ("rows", "width", "taken"), [(1, 1, 5), (50, 7, 200), (50, LANES, 30), (9, 3 * LANES + 1, 0)]
)
def test_gradient_of_an_embedding(rows: int, width: int, taken: int, all_threads: None) -> None:
    ids, dy = np.random.default_rng(0).integers(0, rows, taken), draw(taken, 2 * width)[:, :width]
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(pointwise.embedding_gradient(ids, dy, rows))
    right = reference.embedding_gradient(ids, dy, rows)
    for index, values in found:
        assert np.array_equal(index, right[0])
        assert np.array_equal(values, right[1])  # the same sums in the same order


def test_rows_by_ids_of_any_whole_type() -> None:
    table = draw(6, 5)
    for kind in ("int8", "uint16", "int64", "uint64"):
        ids = np.array([[5, 0, 3], [3, 3, 1]], kind)
        assert np.array_equal(pointwise.embedding(table, ids.T), table[ids.T.astype(int)])
    assert pointwise.embedding(table, ids[:0]).shape == (0, 3, 5)
    for wrong in (6, -1):
        with pytest.raises(ValueError, match=r"ids: expected whole numbers in 0\.\.5, got"):
            pointwise.embedding(table, np.array([0, wrong]))


def test_ids_outside_the_table() -> None:
    for ids in ([0, 4], [-1, 0], [0]):
        with pytest.raises(ValueError, match=r"ids: expected 2 whole numbers in 0\.\.3, got"):
            pointwise.embedding_gradient(np.array(ids), draw(2, 3), 4)


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
    "adam": ("adam", (0, 1), (0.01, 0.9, 0.999, 1e-7), 3),
    "amsgrad": ("adam", (0, 1, 2), (0.01, 0.9, 0.999, 1e-7), 3),
}


def step(module, rule: str, w: np.ndarray, g: np.ndarray, slots, options, decay: float = 0.0) -> None:
    """One step of one variable."""
    module.Updates(rule, [(w, slots)], [True])([g], options, decay)


@pytest.mark.parametrize("decay", [0.0, 0.004])
@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("shape", [(), (1,), (33, 5), (LANES,), (3, LANES + 1), (0,)], ids=str)
def test_updates(case: str, shape, decay: float, all_threads: None) -> None:
    name, given, settings, slots = UPDATES[case]
    found = []
    for n in (1, 2):
        threads.set_num_threads(n)
        w, w64 = draw(*shape, 2)[..., 0].copy(), draw(*shape, 2)[..., 0].astype("d")
        mine = [np.zeros(shape, "f") if k in given else None for k in range(slots)]
        right = [np.zeros(shape) if k in given else None for k in range(slots)]
        for k in range(4):
            g = draw(k + 1, *shape, 3)[0, ..., 0]
            step(pointwise, name, w, g, mine, settings, decay)
            step(reference, name, w64, g.astype("d"), right, settings, decay)
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
        step(pointwise, "sgd", v, gradient, (None,), (0.5, 0.0, False))
        assert_allclose(v, right, rtol=1e-6)


def test_gradient_of_a_single_number() -> None:
    """A scalar's gradient may be a NumPy number, which is no array."""
    w = np.array(2, "f")
    step(pointwise, "sgd", w, np.float32(3), (None,), (0.5, 0.0, False))
    assert w == 0.5


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
    "gradient of other rows": (
        lambda w, g, v: (w, (np.zeros(4, np.int64), g), v),
        r"gradient of \(4,\) rows, of which \(3, 4\) are not zero, for a variable of shape \(3, 4\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_updates_refused(case: str) -> None:
    change, message = WRONG[case]
    arguments = change(draw(3, 4), draw(3, 4), np.zeros((3, 4), "f"))
    before = [np.copy(a) for a in arguments if type(a) is not tuple]
    with pytest.raises(ValueError, match=message):
        step(pointwise, "sgd", arguments[0], arguments[1], arguments[2:], (0.1, 0.9, False))
    arrays = [a for a in arguments if type(a) is not tuple]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_a_copy_updates_its_own_variables() -> None:
    w = np.ones(3, "f")
    mine = pointwise.Updates("sgd", [(w, (None,))])
    theirs, other = copy.deepcopy((mine, w))
    theirs([np.ones(3, "f")], (0.5, 0.0, False))
    assert w.tolist() == [1, 1, 1] and other.tolist() == [0.5, 0.5, 0.5]


def test_nan_reaches_the_weights() -> None:
    w = np.ones(40, "f")
    g = np.zeros(40, "f")
    g[3] = np.nan
    slots = (np.zeros(40, "f"), np.zeros(40, "f"), None)
    step(pointwise, "adam", w, g, slots, (0.1, 0.9, 0.999, 1e-7))
    assert np.isnan(w[3]) and np.isfinite(np.delete(w, 3)).all()
