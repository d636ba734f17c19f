"""The operations around the sequence on the device against NumPy's, and what they do at their edges; the surface that all
backends share is held to the truth in tests/backend/test_surface.py."""

from __future__ import annotations

import numpy as np
import pytest
from device_questions import on_host

from numlstm.kernels import reference_pointwise as right
from numlstm.kernels.cuda import pointwise
from numlstm.kernels.cuda.device import current

NEAR = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "float64": {"rtol": 1e-12, "atol": 1e-13}}


@pytest.fixture(params=NEAR)
def dtype(request):
    return request.param


def draw(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def near(dtype, found, expected):
    found = on_host(found)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, **NEAR[dtype])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tf32"])
def test_matmul_takes_any_layout(dtype, precision):
    x, w, bias = draw(dtype, (5, 7), (7, 4), 4)
    for a in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        for b in (w, np.asfortranarray(w)):
            expected = right.matmul(a, b, bias=bias, precision=precision)
            near(dtype, pointwise.matmul(a, b, bias=bias, precision=precision), expected)
    near(dtype, pointwise.matmul(x, w, precision=precision), right.matmul(x, w, precision=precision))


def test_matmul_of_nothing(dtype):
    a, b, bias = draw(dtype, (3, 0), (0, 4), 4)
    assert on_host(pointwise.matmul(a, b, bias=bias)).tolist() == [bias.tolist()] * 3
    assert not on_host(pointwise.matmul(a, b)).any()
    assert pointwise.matmul(a[:0], b).shape == (0, 4)


def test_matmul_names_what_does_not_fit():
    x, w, bias = draw("float32", (5, 7), (7, 4), 3)
    with pytest.raises(ValueError, match=r"expected shapes \(M, K\) and \(K, N\)"):
        pointwise.matmul(x, w.T)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(3,\)"):
        pointwise.matmul(x, w, bias=bias)
    with pytest.raises(ValueError, match="a: expected float32 or float64, got float16"):
        pointwise.matmul(x.astype(np.float16), w)


def test_rows_without_end_or_number(dtype):
    """Infinities and NaN come out as from NumPy, and a row keeps to itself."""
    (x,) = draw(dtype, (4, 6))
    x[0, 2], x[1, 1], x[2, 3] = np.nan, np.inf, -np.inf
    with np.errstate(all="ignore"):
        near(dtype, pointwise.softmax(x), right.softmax(x))
        labels = np.array([1, 2, 3, 0])
        near(dtype, pointwise.softmax_cross_entropy(x, labels)[0], right.softmax_cross_entropy(x, labels)[0])


@pytest.mark.parametrize(("gamma", "beta"), [(True, True), (True, False), (False, False)])
def test_layer_norm_and_its_gradients(dtype, gamma, beta, monkeypatch):
    monkeypatch.setattr(pointwise, "_CHUNKS", 3)  # partial sums, fewer than rows
    x, g, b, dy = draw(dtype, (8, 3), 3, 3, (8, 3))
    given = x, g if gamma else None, b if beta else None, 1e-3
    (y, kept), (y_right, kept_right) = (m.layer_norm(*given) for m in (pointwise, right))
    near(dtype, y, y_right)
    found, expected = pointwise.layer_norm_gradient(kept, dy), right.layer_norm_gradient(kept_right, dy)
    for a, c in zip(found, expected, strict=True):
        np.testing.assert_allclose(on_host(a), c, rtol=1e-4 if dtype == "float32" else 1e-11, atol=1e-5)


def test_an_embeddings_gradient_sums_in_the_order_of_the_ids():
    (dy,) = draw("float32", (60, 2))
    ids = np.random.default_rng(1).integers(0, 4, 60)
    found, expected = (m.embedding_gradient(ids, dy, 6) for m in (pointwise, right))
    assert on_host(found[0]).tolist() == expected[0].tolist()
    assert on_host(found[1]).tobytes() == expected[1].tobytes()
    assert on_host(pointwise.embedding(dy, ids[:6].reshape(2, 3))).shape == (2, 3, 2)


def test_updates_hold_their_arrays_to_shape():
    device = current()
    w, g, other = (device.array(a, "float32") for a in draw("float32", (3, 2), (3, 2), (2, 3)))
    with pytest.raises(ValueError, match="rule: expected sgd, rmsprop, adam, got 'lion'"):
        pointwise.Updates("lion", [])
    with pytest.raises(ValueError, match="contiguous arrays of one type and shape"):
        pointwise.Updates("sgd", [(w, (other,))])
    with pytest.raises(ValueError, match="contiguous arrays of one type and shape"):
        pointwise.Updates("sgd", [(w.T, (None,))])
    with pytest.raises(ValueError, match=r"gradient of shape \(2, 3\)"):
        pointwise.Updates("sgd", [(w, (None,))])([other], (0.1, 0.0, False))
    before = on_host(w).copy()
    pointwise.Updates("sgd", [(w, (None,)), (other, (None,))])([g, None], (0.5, 0.0, False))
    np.testing.assert_allclose(on_host(w), before - 0.5 * on_host(g), rtol=1e-6)
