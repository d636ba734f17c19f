"""The surface that every backend has: NumPy's float64 results are the truth, the others must agree.

The random generator is held against the known answers that its authors publish (Random123, kat_vectors).
"""

import math

import numpy as np
import pytest

from numlstm.backend import cuda, get_backend
from numlstm.kernels import cells
from numlstm.kernels.reference_pointwise import dense_rows, erf, philox4x32

BACKENDS = [("reference", np.float32), ("reference", np.float64), ("cpu", np.float32), ("cpu", np.float64)]
if cuda.simulated():  # tests/kernels/test_simulator.py runs these so
    BACKENDS += [("cuda", np.float32), ("cuda", np.float64)]


@pytest.fixture(params=BACKENDS, ids=[f"{name}-{np.dtype(d).name}" for name, d in BACKENDS])
def case(request):
    """A backend, a dtype to ask it for, and how near it must come."""
    name, dtype = request.param
    return get_backend(name), dtype, {"rtol": 2e-5, "atol": 2e-6} if dtype == np.float32 else {"rtol": 1e-12}


def draw(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def test_arrays(case):
    b, dtype, _ = case
    a = b.asarray([1, 2], dtype)
    assert a.dtype == dtype and b.asarray(a) is a and b.to_numpy(a) is a and b.xp is np


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (65, 33, 50), (128, 64, 96)])
def test_matmul(case, shape):
    b, dtype, near = case
    (m, k, n) = shape
    x, w, bias = draw(dtype, (m, k), (k, n), n)
    near = near | {"atol": 1e-4 if dtype == np.float32 else 1e-12}
    truth = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(b.matmul(x, w), truth, **near)
    np.testing.assert_allclose(b.matmul(x, w, bias), truth + bias, **near)
    np.testing.assert_allclose(b.matmul(np.asfortranarray(x), np.ascontiguousarray(w.T).T), truth, **near)
    assert b.matmul(x, w).dtype == dtype


@pytest.mark.parametrize("lead", [(4,), (3, 2), (1, 2, 3)])
def test_batched_matmul(case, lead):
    b, dtype, near = case
    x, y = draw(dtype, (*lead, 20, 33), (lead[-1], 33, 17))
    near = near | {"atol": 1e-4 if dtype == np.float32 else 1e-12}
    found = b.batched_matmul(x, y)
    np.testing.assert_allclose(found, x.astype(np.float64) @ y.astype(np.float64), **near)
    assert found.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 2), (7, 65), (33, 3), (5, 1)])
def test_softmax(case, shape):
    b, dtype, near = case
    z, dy = draw(dtype, shape, shape)
    p = np.exp(z.astype(np.float64) * 5)
    p /= p.sum(axis=1, keepdims=True)
    y = b.softmax(z * 5)
    near = near | {"atol": 1e-6 if dtype == np.float32 else 1e-12}
    np.testing.assert_allclose(y, p, **near)
    d = b.softmax_gradient(y, dy)
    np.testing.assert_allclose(d, p * (dy - (p * dy).sum(axis=1, keepdims=True)), **near)
    assert y.dtype == d.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 2), (7, 65), (33, 3), (5, 1)])
def test_softmax_cross_entropy(case, shape):
    b, dtype, near = case
    (z,) = draw(dtype, shape)
    z *= 5
    labels = np.arange(shape[0]) % shape[1]
    losses, residual = b.softmax_cross_entropy(z, labels)
    (dlosses,) = draw(dtype, shape[:1], seed=1)
    dlosses[0] = 0
    d = b.softmax_cross_entropy_gradient(residual, dlosses)
    p = np.exp(z.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    near = near | {"atol": 1e-5 if dtype == np.float32 else 1e-12}
    np.testing.assert_allclose(losses, -np.log(p[rows, labels]), **near)
    np.testing.assert_allclose(d, (p - np.eye(shape[1])[labels]) * dlosses[:, None], **near)
    assert not d[0].any()
    assert losses.dtype == d.dtype == dtype


def test_embedding_and_its_gradient(case):
    b, dtype, near = case
    table, dy = draw(dtype, (6, 3), (40, 3))
    ids = np.random.default_rng(1).integers(0, 5, 40)  # row 5 is never taken
    np.testing.assert_array_equal(b.embedding(table, ids.reshape(4, 10)), table[ids].reshape(4, 10, 3))
    expected = np.zeros((6, 3))
    np.add.at(expected, ids, dy)
    index, values = b.embedding_gradient(ids, dy, 6)
    first = list(dict.fromkeys(ids.tolist()))
    assert index.tolist() == [first.index(k) if k in first else -1 for k in range(6)]
    assert values.dtype == dtype and values.shape == (len(first), 3)
    np.testing.assert_allclose(dense_rows(index, values), expected, **(near | {"atol": 1e-6}))
    index, values = b.embedding_gradient(ids[:0], dy[:0], 6)
    assert (index == -1).all() and values.shape == (0, 3)


def test_layer_norm(case):
    b, dtype, near = case
    x, gamma, beta = draw(dtype, (7, 20), 20, 20)
    y, residual = b.layer_norm(x, gamma, beta, 1e-3)
    x64 = x.astype(np.float64)
    normal = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(
        y, normal * gamma + beta, **(near | {"atol": 1e-5 if dtype == np.float32 else 1e-12})
    )
    dx, dgamma, dbeta = b.layer_norm_gradient(residual, np.ones_like(y))
    assert y.dtype == dx.dtype == dgamma.dtype == dbeta.dtype == dtype


def test_sequence_and_its_gradient(case):
    b, dtype, _ = case
    x, w, r, bias, h, c, dh = draw(dtype, (6, 3, 4), (4, 20), (5, 20), 20, (3, 5), (3, 5), (6, 3, 5))
    valid = np.random.default_rng(2).random((6, 3)) < 0.7
    arguments = (w, r, bias, (), (h, c), valid)
    out = b.sequence_forward(cells.lstm(), x, *arguments, training=True)
    plain = b.sequence_forward(cells.lstm(), x, *arguments, training=False)
    assert plain.residual is None and out.h.dtype == dtype
    np.testing.assert_allclose(plain.h, out.h, rtol=1e-5, atol=1e-6)
    gradients = b.sequence_backward(out.residual, dh, (None, dh[0]))

    truth = get_backend("reference")
    wide = [a.astype(np.float64) for a in (x, w, r, bias, h, c, dh)]
    exact = truth.sequence_forward(
        cells.lstm(), wide[0], *wide[1:4], (), tuple(wide[4:6]), valid, training=True
    )  # fmt: skip
    expected = truth.sequence_backward(exact.residual, wide[6], (None, wide[6][0]))
    np.testing.assert_allclose(out.h, exact.h, rtol=1e-5, atol=1e-5)
    assert gradients.projection is None and expected.projection is None
    for name, g, e in zip(expected._fields[:-1], gradients[:-1], expected[:-1], strict=True):
        for have, want in zip(*((v,) if isinstance(v, np.ndarray) else v for v in (g, e)), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5, err_msg=name)
            assert have.dtype == dtype


# Random masks

KNOWN_ANSWERS = [  # counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    counter, key = ([int(w, 16) for w in text.split()] for text in (counter, key))
    result = philox4x32(tuple(np.array([c], np.uint64) for c in counter), tuple(key))
    assert " ".join(f"{int(w[0]):08x}" for w in result) == words


def test_masks_are_the_same_bits_everywhere(case):
    b, dtype, _ = case
    for shape, rate, seed, stream in (
        ((1001, 3), 0.3, 2**63 + 11, 2**40 + 5),
        ((5,), 0.5, 0, 0),
        ((0, 3), 0.5, 0, 0),
    ):
        mask = b.dropout_mask(shape, rate, seed, stream, dtype)
        truth = get_backend("reference").dropout_mask(shape, rate, seed, stream, np.float64)
        assert mask.shape == shape and mask.dtype == dtype
        np.testing.assert_array_equal(mask != 0, truth != 0)
        np.testing.assert_array_equal(mask[mask != 0], np.dtype(dtype).type(1 / (1 - rate)))


def test_an_element_of_a_mask_depends_on_its_place_alone(case):
    b, dtype, _ = case
    long, short = (b.dropout_mask((n,), 0.4, 7, 3, dtype) for n in (1000, 333))
    np.testing.assert_array_equal(long[:333], short)
    np.testing.assert_array_equal(long.reshape(10, 100), b.dropout_mask((10, 100), 0.4, 7, 3, dtype))
    assert (long != b.dropout_mask((1000,), 0.4, 7, 4, dtype)).any()
    assert (long != b.dropout_mask((1000,), 0.4, 8, 3, dtype)).any()
    assert abs((long == 0).mean() - 0.4) < 0.06


def test_the_mask_of_the_first_words_is_known(case):
    b, dtype, _ = case  # words of the first known answer, as fractions: 0.40, 0.88, 0.74, 0.61
    assert (b.dropout_mask((4,), 0.5, 0, 0, dtype) != 0).tolist() == [False, True, True, True]
    assert (b.dropout_mask((4,), 0.7, 0, 0, dtype) != 0).tolist() == [False, True, True, False]


# Optimizers' updates, against the formulas written out in float64


def updated(b, rule, dtype, slots, options, decay=0.0, steps=3, shape=(3, 7)):
    """The variable and slots after some steps; slots: how many, None for one left out."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(dtype)
    state = [None if s is None else np.full(shape, s, dtype) for s in slots]
    update = b.updates(rule, [(w, state)], [True])
    for _ in range(steps):
        g = rng.normal(size=shape).astype(dtype)
        assert update([g], options, decay) is None
    return w, state


@pytest.mark.parametrize(
    ("slots", "momentum", "nesterov"), [([None], 0.0, False), ([0.0], 0.9, False), ([0.0], 0.9, True)]
)
def test_sgd(case, slots, momentum, nesterov):
    b, dtype, near = case
    w, (v,) = updated(b, "sgd", dtype, slots, (0.1, momentum, nesterov))
    rng = np.random.default_rng(0)
    x, velocity = rng.normal(size=(3, 7)).astype(dtype).astype(np.float64), np.zeros((3, 7))
    for _ in range(3):
        g = rng.normal(size=(3, 7)).astype(dtype)
        velocity = momentum * velocity - 0.1 * g
        x += momentum * velocity - 0.1 * g if nesterov else velocity
    np.testing.assert_allclose(w, x, **near)
    if v is not None:
        np.testing.assert_allclose(v, velocity, **near)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop(case, centred, momentum):
    b, dtype, near = case
    slots = [0.0, 0.0 if centred else None, 0.0 if momentum else None]
    w, _ = updated(b, "rmsprop", dtype, slots, (0.01, 0.9, momentum, 1e-7))
    rng = np.random.default_rng(0)
    x, ms, mg, mom = rng.normal(size=(3, 7)).astype(dtype).astype(np.float64), 0.0, 0.0, 0.0
    for _ in range(3):
        g = rng.normal(size=(3, 7)).astype(dtype).astype(np.float64)
        ms = 0.9 * ms + 0.1 * g * g
        mg = 0.9 * mg + 0.1 * g
        mom = momentum * mom + 0.01 * g / np.sqrt(ms - (mg * mg if centred else 0) + 1e-7)
        x -= mom
    np.testing.assert_allclose(w, x, **near)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam(case, amsgrad, decay):
    b, dtype, near = case
    slots = [0.0, 0.0, 0.0 if amsgrad else None]
    w, _ = updated(b, "adam", dtype, slots, (0.01, 0.9, 0.999, 1e-7), decay)
    rng = np.random.default_rng(0)
    x, m, v, top = rng.normal(size=(3, 7)).astype(dtype).astype(np.float64), 0.0, 0.0, 0.0
    for _ in range(3):
        g = rng.normal(size=(3, 7)).astype(dtype).astype(np.float64)
        x -= decay * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        top = np.maximum(top, v)
        x -= 0.01 * m / (np.sqrt(top if amsgrad else v) + 1e-7)
    np.testing.assert_allclose(w, x, **(near | {"atol": 1e-5 if dtype == np.float32 else 1e-12}))


RULES = {
    "sgd": ([None], (0.1, 0.0, False)),
    "momentum": ([0.1], (0.1, 0.9, True)),
    "rmsprop": ([0.1, 0.1, 0.1], (0.01, 0.9, 0.5, 1e-3)),
    "adam": ([0.1, 0.1, 0.1], (0.01, 0.9, 0.999, 1e-7)),
}


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("name", RULES)
def test_a_step_over_many_variables(case, name, decay):
    """Those without a gradient stay as they are; a gradient of rows is the whole gradient with its zeros, and so is
    whoever weight decay is not for."""
    b, dtype, _ = case
    rule, (slots, options) = name.replace("momentum", "sgd"), RULES[name]
    shapes = [(5, 3), (4,), (20, 33), (20, 33)]
    ids = np.random.default_rng(0).integers(0, 12, 30)
    found = []
    for rows in (True, False):
        rng = np.random.default_rng(1)
        variables = [
            (rng.normal(size=s).astype(dtype), [None if k is None else np.full(s, k, dtype) for k in slots])
            for s in shapes
        ]
        before = variables[1][0].copy()
        update = b.updates(rule, variables, [True, True, True, False])
        for _ in range(3):
            g = [rng.normal(size=shapes[0]).astype(dtype), None]
            for k in range(2):
                table = b.embedding_gradient(ids[k:], rng.normal(size=(30 - k, 33)).astype(dtype), 20)
                g.append(table if rows else dense_rows(*table))
            update(g, options, decay)
        np.testing.assert_array_equal(variables[1][0], before)
        update(
            [np.zeros(s, dtype) for s in shapes], options, decay
        )  # no rows are remembered from the step before
        found.append(variables)
    for (w, kept), (w2, kept2) in zip(*found, strict=True):
        for a, c in zip([w, *kept], [w2, *kept2], strict=True):
            np.testing.assert_array_equal(a, c)


def test_erf_against_the_standard_library():
    x = np.linspace(-7, 7, 2001)
    truth = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf(x), truth, rtol=0, atol=5e-16)
    assert erf(x.astype(np.float32)).dtype == np.float32 and np.isnan(erf(np.array([np.nan])))
