"""Every operation: its values against NumPy, its gradient against central differences, what it refuses.

`GRADIENTS` holds one row for each operation (and each way of calling it that has its own gradient).
"""

import math
import zlib

import numpy as np
import pytest

from numlstm import ops, random
from numlstm.autograd import GradientTape, Tensor, Variable
from numlstm.backend import get_backend, use_backend
from numlstm.kernels import cells


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def normal(*shape):
    return lambda rng: rng.normal(size=shape)


def positive(*shape):
    return lambda rng: rng.uniform(0.5, 2.0, shape)


def apart(*shape):
    """Values at least 0.1 from each other and from 0: no kink or tie within a difference's step."""
    return lambda rng: (rng.permutation(math.prod(shape)) - math.prod(shape) / 2 + 0.5).reshape(shape) * 0.2


def probabilities(*shape):
    def make(rng):
        p = rng.uniform(0.2, 1.0, shape)
        return p / p.sum(axis=-1, keepdims=True)

    return make


IDS = np.array([[0, 2, 2], [1, 0, 2]])
LABELS = np.array([[1, 0, 3], [2, 3, 3]])
CHOSEN = np.array([[True, False, True], [False, False, True]])
MASK = np.array([[True, True, False, True], [False, True, True, False], [False, False, False, False]])
STATES = (normal(3, 2), normal(3, 2))


def lstm(part, **options):
    """One output of `recurrent` with an LSTM of 2 units over (3, 4, 5), initial state included."""

    def f(x, kernel, recurrent_kernel, bias, h, c):
        weights = kernel, recurrent_kernel, bias
        y, finals, _ = ops.recurrent(cells.lstm(), x, *weights, state=(h, c), **options)
        return (y, *finals)[part]

    return f


def lstm_all(x, kernel, recurrent_kernel, bias, h, c):
    """All outputs at once."""
    y, (last, cell), _ = ops.recurrent(
        cells.lstm(), x, kernel, recurrent_kernel, bias, state=(h, c), mask=MASK
    )
    return ops.concatenate([y.reshape(-1), last.reshape(-1), cell.reshape(-1)])


def every_state(cell, reverse=False, remat_steps=None):
    """The sequences of all the states of a cell of 2 units, one beside the other."""

    def f(x, kernel, recurrent_kernel, bias, *params):
        y, _, states = ops.recurrent(
            cell, x, kernel, recurrent_kernel, bias, params, mask=MASK, reverse=reverse, training=True,
            remat_steps=remat_steps,
        )  # fmt: skip
        return ops.concatenate([y, *states])

    return f


def projected(x, kernel, recurrent_kernel, bias, projection, h, c, **options):
    """All outputs of an LSTM of 4 units, projected to 2."""
    y, (last, c), _ = ops.recurrent(
        cells.lstm(projection=True), x, kernel, recurrent_kernel, bias, state=(h, c), mask=MASK,
        projection=projection, **options,
    )  # fmt: skip
    return ops.concatenate([y.reshape(-1), last.reshape(-1), c.reshape(-1)])


def pair(x, kernel, recurrent_kernel, bias, k, r):
    """Both ways over one input, by an LSTM and a simple network."""
    first = {"cell": cells.lstm(), "kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
    second = {"cell": cells.elman(), "kernel": k, "recurrent_kernel": r, "mask": MASK, "reverse": True}
    (y, (_, c), _), (z, _, _) = ops.recurrent_pair({"x": x, **first}, {"x": x, **second})
    return ops.concatenate([y.reshape(-1), c.reshape(-1), z.reshape(-1)])


LSTM = (normal(3, 4, 5), normal(5, 8), normal(2, 8), normal(8), *STATES)
PROJECTED = (
    *(normal(3, 4, 5), normal(5, 16), normal(2, 16), normal(16), normal(4, 2)),
    *(normal(3, 2), normal(3, 4)),
)

# name, function, inputs that get a gradient
GRADIENTS = [
    ("add", ops.add, (normal(2, 3), normal(3))),
    ("subtract", ops.subtract, (normal(2, 1), normal(2, 3))),
    ("multiply", ops.multiply, (normal(2, 3), normal(2, 1))),
    ("multiply scalar", ops.multiply, (normal(), normal(2, 3))),
    ("divide", ops.divide, (normal(2, 3), positive(3))),
    ("negative", ops.negative, (normal(2, 3),)),
    ("power", ops.power, (positive(2, 3), normal(3))),
    ("power number", lambda x: ops.power(x, 3), (normal(2, 3),)),
    ("number power", lambda x: ops.power(2.0, x), (normal(2, 3),)),
    ("matmul", ops.matmul, (normal(2, 3), normal(3, 4))),
    ("matmul batched", ops.matmul, (normal(2, 3, 4), normal(4, 5))),
    ("matmul broadcast", ops.matmul, (normal(2, 1, 3, 4), normal(5, 4, 2))),
    ("matmul vector matrix", ops.matmul, (normal(3), normal(3, 4))),
    ("matmul matrix vector", ops.matmul, (normal(2, 3, 4), normal(4))),
    ("matmul vectors", ops.matmul, (normal(3), normal(3))),
    ("exp", ops.exp, (normal(2, 3),)),
    ("log", ops.log, (positive(2, 3),)),
    ("log1p", ops.log1p, (positive(2, 3),)),
    ("sqrt", ops.sqrt, (positive(2, 3),)),
    ("square", ops.square, (normal(2, 3),)),
    ("abs", ops.abs, (apart(2, 3),)),
    ("sin", ops.sin, (normal(2, 3),)),
    ("cos", ops.cos, (normal(2, 3),)),
    ("tanh", ops.tanh, (normal(2, 3),)),
    ("sigmoid", ops.sigmoid, (normal(2, 3),)),
    ("relu", ops.relu, (apart(2, 3),)),
    ("leaky_relu", ops.leaky_relu, (apart(2, 3),)),
    ("leaky_relu slope", lambda x: ops.leaky_relu(x, 0.01), (apart(2, 3),)),
    ("elu", lambda x: ops.elu(x, 0.7), (apart(2, 3),)),
    ("selu", ops.selu, (apart(2, 3),)),
    ("gelu", ops.gelu, (normal(2, 3),)),
    ("gelu approximate", lambda x: ops.gelu(x, True), (normal(2, 3),)),
    ("silu", ops.silu, (normal(2, 3),)),
    ("softplus", ops.softplus, (normal(2, 3),)),
    ("softsign", ops.softsign, (apart(2, 3),)),
    ("hard_sigmoid", lambda x: ops.hard_sigmoid(3 * x + 0.1), (normal(4, 5),)),
    ("softmax", ops.softmax, (normal(2, 3),)),
    ("softmax axis", lambda x: ops.softmax(x, axis=1), (normal(2, 3, 2),)),
    ("masked_softmax", lambda x: ops.masked_softmax(x, CHOSEN), (normal(2, 3),)),
    ("attend", lambda q, k, v: ops.attend(q, k, v)[0], (normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 6))),
    ("additive_scores", ops.additive_scores, (normal(2, 3, 4), normal(2, 5, 4), normal(4))),
    ("log_softmax", ops.log_softmax, (normal(2, 3),)),
    ("maximum", ops.maximum, (apart(2, 3), lambda rng: rng.normal(size=(2, 3)) + 0.05)),
    ("minimum", ops.minimum, (apart(2, 3), lambda rng: rng.normal(size=3) + 0.05)),
    ("where", lambda a, b: ops.where(CHOSEN, a, b), (normal(2, 3), normal(3))),
    ("clip", lambda x: ops.clip(x, -0.4, 0.4), (apart(2, 3),)),
    ("sum", ops.sum, (normal(2, 3),)),
    ("sum axis", lambda x: ops.sum(x, axis=(0, -1)), (normal(2, 3, 4),)),
    ("sum keepdims", lambda x: ops.sum(x, axis=1, keepdims=True), (normal(2, 3, 4),)),
    ("mean", ops.mean, (normal(2, 3),)),
    ("mean axis", lambda x: ops.mean(x, axis=-2), (normal(2, 3, 4),)),
    ("max", ops.max, (apart(2, 3),)),
    ("max axis", lambda x: ops.max(x, axis=1), (apart(2, 3, 4),)),
    ("min axes", lambda x: ops.min(x, axis=(0, 2), keepdims=True), (apart(2, 3, 4),)),
    ("var", lambda x: ops.var(x, axis=0), (normal(4, 3),)),
    ("reshape", lambda x: ops.reshape(x, (3, -1)), (normal(2, 3),)),
    ("transpose", ops.transpose, (normal(2, 3, 4),)),
    ("transpose axes", lambda x: ops.transpose(x, (1, 2, 0)), (normal(2, 3, 4),)),
    ("transpose negative", lambda x: x.transpose(-1, 0, 1), (normal(2, 3, 4),)),
    ("expand_dims", lambda x: ops.expand_dims(x, -2), (normal(2, 3),)),
    ("squeeze", lambda x: ops.squeeze(x, 1), (normal(2, 1, 3),)),
    ("squeeze all", ops.squeeze, (normal(2, 1, 3, 1),)),
    ("concatenate",
     lambda *parts: ops.concatenate(parts, axis=1), (normal(2, 1), normal(2, 3), normal(2, 2))),
    ("concatenate one twice", lambda a: ops.concatenate([a, a]), (normal(2, 2),)),
    ("stack", lambda a, b: ops.stack([a, b], axis=1), (normal(2, 3), normal(2, 3))),
    ("stack last", lambda a, b: ops.stack([a, b], axis=-1), (normal(2, 3), normal(2, 3))),
    ("flip", lambda x: ops.flip(x, 1), (normal(2, 3),)),
    ("flip all", ops.flip, (normal(2, 3),)),
    ("pad", lambda x: ops.pad(x, [(1, 0), (2, 3)], 5.0), (normal(2, 3),)),
    ("broadcast_to", lambda x: ops.broadcast_to(x, (4, 2, 3)), (normal(2, 1),)),
    ("repeat", lambda x: ops.repeat(x, 3, axis=1), (normal(2, 3, 2),)),
    ("astype", lambda x: ops.astype(x, np.float64), (normal(2, 3),)),
    ("getitem slice", lambda x: x[1:, ::-2], (normal(3, 4),)),
    ("getitem number", lambda x: x[..., -1], (normal(3, 4),)),
    ("getitem none", lambda x: x[:, None, 1], (normal(3, 4),)),
    ("getitem rows", lambda x: x[IDS], (normal(3, 4),)),
    ("getitem pairs", lambda x: x[[0, 0, 2], [1, 1, 3]], (normal(3, 4),)),
    ("getitem mixed", lambda x: x[1:, [0, 0, 2]], (normal(3, 4),)),
    ("getitem mask", lambda x: x[CHOSEN], (normal(2, 3),)),
    ("linear", ops.linear, (normal(2, 3), normal(3, 4), normal(4))),
    ("linear no bias", ops.linear, (normal(2, 3), normal(3, 4))),
    ("linear vector", ops.linear, (normal(3), normal(3, 4), normal(4))),
    ("linear rank 4", ops.linear, (normal(2, 2, 2, 3), normal(3, 4), normal(4))),
    ("linear time-major",
     lambda x, w, b: ops.linear(x.transpose(1, 0, 2), w, b), (normal(4, 2, 3), normal(3, 5), normal(5))),
    ("linear strided", lambda x, w: ops.linear(x[:, ::2, ::-1], w), (normal(2, 4, 3), normal(3, 5))),
    ("embedding", lambda t: ops.embedding(t, IDS), (normal(4, 3),)),
    ("embedding time-major", lambda t: ops.embedding(t, IDS.T), (normal(4, 3),)),
    ("layer_norm",
     lambda x, g, b: ops.layer_norm(x, g, b, 1e-3), (normal(2, 3, 4), normal(4), normal(4))),
    ("layer_norm bare", ops.layer_norm, (normal(3, 4),)),
    ("layer_norm beta", lambda x, b: ops.layer_norm(x, beta=b), (normal(3, 4), normal(4))),
    ("layer_norm time-major",
     lambda x, g: ops.layer_norm(x.transpose(1, 0, 2), g), (normal(2, 3, 4), normal(4))),
    ("dropout", lambda x: ops.dropout(x, 0.4), (normal(4, 5),)),
    ("dropout shape", lambda x: ops.dropout(x, 0.4, shape=(None, 1, 5)), (normal(4, 2, 5),)),
    ("recurrent y", lstm(0), LSTM),
    ("recurrent h", lstm(1), LSTM),
    ("recurrent c", lstm(2), LSTM),
    ("recurrent masked", lstm(0, mask=MASK), LSTM),
    ("recurrent reverse", lstm(0, mask=MASK, reverse=True), LSTM),
    ("recurrent all", lstm_all, LSTM),
    ("recurrent every state of an lstm", every_state(cells.lstm()), LSTM[:4]),
    ("recurrent every state of an slstm", every_state(cells.slstm(), reverse=True), LSTM[:4]),
    ("recurrent every state, remat", every_state(cells.lstm(peephole=True), remat_steps=3),
     (*LSTM[:4], normal(2), normal(2), normal(2))),
    ("recurrent projection", projected, PROJECTED),
    ("recurrent projection, remat",
     lambda *a: projected(*a, remat_steps=3, recurrent_mask=np.full((1, 4, 1), 0.7)), PROJECTED),
    ("recurrent_pair", pair, (*LSTM[:4], normal(5, 3), normal(3, 3))),
    ("recurrent elman",
     lambda x, w, r: ops.recurrent(cells.elman(), x, w, r)[0],
     (normal(2, 4, 3), normal(3, 5), normal(5, 5))),
    ("sparse crossentropy logits",
     lambda z: ops.sparse_categorical_crossentropy(LABELS, z, True), (normal(2, 3, 4),)),
    ("sparse crossentropy",
     lambda p: ops.sparse_categorical_crossentropy(LABELS, p), (probabilities(2, 3, 4),)),
    ("sparse crossentropy time-major",
     lambda z: ops.sparse_categorical_crossentropy(LABELS.T, z.transpose(1, 0, 2), True),
     (normal(2, 3, 4),)),
    ("categorical crossentropy logits",
     lambda y, z: ops.categorical_crossentropy(y, z, True), (probabilities(2, 4), normal(2, 4))),
    ("categorical crossentropy", ops.categorical_crossentropy, (probabilities(2, 4), probabilities(2, 4))),
    ("binary crossentropy logits",
     lambda y, z: ops.binary_crossentropy(y, z, True), (probabilities(2, 4), apart(2, 4))),
    ("binary crossentropy", ops.binary_crossentropy, (probabilities(2, 4), probabilities(2, 4))),
]  # fmt: skip


def numerical(loss, values, k, step=1e-6):
    """Central differences of a scalar function of several arrays, with respect to the k-th."""
    g = np.zeros_like(values[k])
    for i in np.ndindex(g.shape):
        moved = [v.copy() for v in values]
        moved[k][i] += step
        up = loss(moved)
        moved[k][i] -= 2 * step
        g[i] = (up - loss(moved)) / (2 * step)
    return g


@pytest.mark.parametrize(("name", "f", "inputs"), GRADIENTS, ids=[row[0] for row in GRADIENTS])
def test_gradient_against_central_differences(name, f, inputs):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = [make(rng) for make in inputs]

    def run(arrays):
        random.set_seed(1)  # the same dropout mask every time
        return f(*arrays)

    direction = rng.normal(size=run([Tensor(v) for v in values]).shape)
    variables = [Variable(v) for v in values]
    with GradientTape() as tape:
        loss = (run(variables) * direction).sum()
    gradients = tape.gradient(loss, variables)
    for k, g in enumerate(gradients):
        expected = numerical(lambda vs: float((run([Tensor(v) for v in vs]) * direction).sum()), values, k)
        assert g.dtype == np.float64 and g.shape == values[k].shape
        np.testing.assert_allclose(g, expected, rtol=1e-6, atol=1e-7, err_msg=f"{name}: input {k}")


def test_every_operation_has_a_row():
    rows = {name.split()[0] for name, _, _ in GRADIENTS} | {"stop_gradient", "tensor"}
    rows |= {"dropout_mask"}  # of no tensor: there is nothing to differentiate by
    rows |= {f"{kind}_crossentropy" for kind in ("sparse_categorical", "categorical", "binary")}
    assert set(ops.__all__) <= rows


# Values


X = np.linspace(-4, 4, 17).reshape(1, 17)
ERF = np.vectorize(math.erf)

VALUES = [
    ("sigmoid", ops.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    ("relu", ops.relu, lambda x: np.maximum(x, 0)),
    ("leaky_relu", ops.leaky_relu, lambda x: np.where(x > 0, x, 0.2 * x)),
    ("elu", ops.elu, lambda x: np.where(x > 0, x, np.exp(x) - 1)),
    (
        "selu",
        ops.selu,
        lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
    ),
    ("gelu", ops.gelu, lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2)))),
    ("silu", ops.silu, lambda x: x / (1 + np.exp(-x))),
    ("softplus", ops.softplus, lambda x: np.log(1 + np.exp(x))),
    ("softsign", ops.softsign, lambda x: x / (1 + abs(x))),
    ("hard_sigmoid", ops.hard_sigmoid, lambda x: np.clip((x + 3) / 6, 0, 1)),
    ("softmax", ops.softmax, lambda x: np.exp(x) / np.exp(x).sum()),
    ("log_softmax", ops.log_softmax, lambda x: np.log(np.exp(x) / np.exp(x).sum())),
    ("var", ops.var, np.var),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "f", "expected"), VALUES, ids=[row[0] for row in VALUES])
def test_values(name, f, expected, dtype):
    y = f(X.astype(dtype))
    assert isinstance(y, Tensor) and y.dtype == dtype
    np.testing.assert_allclose(y.data, expected(X), rtol=2e-6 if dtype == np.float32 else 1e-12, atol=1e-7)


@pytest.mark.parametrize(
    "f", [ops.sigmoid, ops.softplus, ops.softmax, ops.log_softmax, ops.elu, ops.gelu, ops.silu]
)
def test_large_inputs_overflow_nowhere(f):
    x = Variable(np.array([-1e4, -100, 0, 100, 1e4], np.float32))
    with GradientTape() as tape:
        y = f(x)
        loss = ops.sum(y)
    assert np.isfinite(y.data).all() and np.isfinite(tape.gradient(loss, [x])[0]).all()


@pytest.mark.parametrize(
    "f",
    [
        ops.exp,
        ops.tanh,
        ops.sigmoid,
        ops.relu,
        ops.softplus,
        ops.gelu,
        lambda x: ops.maximum(x, 0.0),
        ops.softmax,
    ],
)
def test_nan_stays_nan(f):
    assert np.isnan(f(np.array([np.nan, 1.0], np.float32)).data[0])


def test_gradients_at_kinks_are_those_of_the_cells():
    x = Variable(np.zeros(1))
    for f in (ops.relu, ops.abs, lambda x: ops.maximum(x, 0.0), lambda x: ops.clip(x, 0.0, 1.0)):
        with GradientTape() as tape:
            loss = ops.sum(f(x))
        assert tape.gradient(loss, [x])[0] == 0


def test_equals_share_the_gradient_of_a_maximum():
    x = Variable(np.array([[1.0, 3.0, 3.0]]))
    with GradientTape() as tape:
        loss = ops.sum(ops.max(x, axis=1))
    assert tape.gradient(loss, [x])[0].tolist() == [[0, 0.5, 0.5]]


def test_power_at_zero():
    x = Variable(np.array([0.0, 2.0]))
    with GradientTape() as tape:
        loss = ops.sum(x**0 + x**1 + x**2)
    assert tape.gradient(loss, [x])[0].tolist() == [1, 5]


# Memory order


def test_linear_takes_a_time_major_view_without_a_copy(monkeypatch):
    seen = []
    backend = get_backend()
    product = backend.matmul

    def spy(a, b, bias=None):
        seen.append(a)
        return product(a, b, bias)

    monkeypatch.setattr(backend, "matmul", spy, raising=False)
    time_major = np.random.default_rng(0).normal(size=(7, 3, 4))
    w = np.ones((4, 2))
    view = Tensor(time_major).transpose(1, 0, 2)
    y = ops.linear(view, w)
    assert np.shares_memory(seen[0], time_major)
    assert y.shape == (3, 7, 2) and y.data.transpose(1, 0, 2).flags.c_contiguous
    np.testing.assert_allclose(y.data, time_major.transpose(1, 0, 2) @ w)


def test_stacked_recurrent_layers_hand_time_major_memory_on(monkeypatch):
    backend, seen = get_backend(), []
    forward = backend.sequence_forward

    def spy(cell, x, *args, **kwargs):
        seen.append(x)
        return forward(cell, x, *args, **kwargs)

    monkeypatch.setattr(backend, "sequence_forward", spy, raising=False)
    rng = np.random.default_rng(0)
    y, _, _ = ops.recurrent(
        cells.elman(), rng.normal(size=(3, 5, 2)), rng.normal(size=(2, 4)), rng.normal(size=(4, 4))
    )
    ops.recurrent(cells.elman(), y, rng.normal(size=(4, 4)), rng.normal(size=(4, 4)))
    assert seen[1].flags.c_contiguous and np.shares_memory(seen[1], y.data)


# Weights decide the dtype


def test_operations_with_weights_compute_in_the_weights_dtype():
    x, w = np.ones((2, 3, 4)), np.ones((4, 4), np.float32)
    assert ops.linear(x, w).dtype == np.float32
    assert ops.linear(np.ones((2, 4), np.int64), w).dtype == np.float32
    assert ops.layer_norm(x, np.ones(4, np.float32)).dtype == np.float32
    assert ops.recurrent(cells.elman(), x, w, w)[0].dtype == np.float32


# Recurrent


def weights(dtype=np.float64, features=5, units=2):
    rng = np.random.default_rng(0)
    shapes = ((3, 4, features), (features, 4 * units), (units, 4 * units), (4 * units,))
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def test_recurrent_outputs():
    x, *w = weights()
    y, (h, c), states = ops.recurrent(cells.lstm(), x, *w)
    assert y.shape == (3, 4, 2) and h.shape == c.shape == (3, 2) and states is None
    np.testing.assert_array_equal(y.data[:, -1], h.data)


def test_recurrent_gives_cell_states_when_asked_or_taped():
    x, *w = weights()
    _, (_, c), states = ops.recurrent(cells.lstm(), x, *w, training=True)
    np.testing.assert_array_equal(states[0].data[:, -1], c.data)
    with GradientTape():
        assert ops.recurrent(cells.lstm(), x, Variable(w[0]), *w[1:])[2] is not None
        assert ops.recurrent(cells.lstm(), x, *w)[2] is None  # the tape follows none of these


def test_recurrent_reverse_gives_outputs_in_the_order_they_were_made():
    x, *w = weights()
    y, finals, _ = ops.recurrent(cells.lstm(), x, *w, mask=MASK, reverse=True)
    z, ends, _ = ops.recurrent(cells.lstm(), x[:, ::-1], *w, mask=MASK[:, ::-1])
    np.testing.assert_array_equal(y.data, z.data)
    np.testing.assert_array_equal(finals[1].data, ends[1].data)


def test_recurrent_carries_states_over_masked_steps():
    x, *w = weights()
    state = np.ones((3, 2)), np.full((3, 2), 2.0)
    y, (h, c), _ = ops.recurrent(cells.lstm(), x, *w, state=state, mask=MASK)
    np.testing.assert_array_equal(y.data[0, 2], y.data[0, 1])
    np.testing.assert_array_equal(h.data[2], state[0][2])  # a row without a valid step
    np.testing.assert_array_equal(c.data[2], state[1][2])


def test_recurrent_in_pieces_is_the_same_and_keeps_states_only_when_asked():
    x, *w = weights()
    w = [Variable(v) for v in w]
    found = []
    for options in ({}, {"remat_steps": 3}):
        with GradientTape() as tape:
            y, (h, c), states = ops.recurrent(cells.lstm(), x, *w, mask=MASK, **options)
            loss = ops.sum(y * y) + ops.sum(c)
        found.append((y.data, h.data, c.data, *tape.gradient(loss, w)))
        assert (states is None) == bool(options)
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        if k < 3:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    with GradientTape():
        _, _, states = ops.recurrent(cells.lstm(), x, *w, training=True, remat_steps=3)
    assert states[0].shape == (3, 4, 2)
    with pytest.raises(ValueError, match="remat_steps: expected an integer of at least 1, got 0"):
        ops.recurrent(cells.lstm(), x, *w, remat_steps=0)


def test_a_pair_is_two_sequences_in_one_call_each_way(monkeypatch):
    backend, calls = get_backend(), []
    for name in ("sequence_forward_pair", "sequence_backward_pair"):
        served = getattr(backend, name)
        spy = lambda asked, name=name, served=served: (calls.append((name, len(asked))), served(asked))[1]
        monkeypatch.setattr(backend, name, spy, raising=False)
    x, *w = weights()
    w, v = [Variable(a) for a in w], [Variable(a * 0.5) for a in w]
    arguments = [
        {"cell": cells.lstm(), "x": x, "kernel": k, "recurrent_kernel": r, "bias": b, "reverse": back}
        for (k, r, b), back in ((w, False), (v, True))
    ]
    with GradientTape(persistent=True) as tape:
        together = ops.recurrent_pair(*arguments)
        loss = sum(ops.sum(y * y) + ops.sum(c) for y, (_, c), _ in together)
    gradients = tape.gradient(loss, [*w, *v])
    assert calls == [("sequence_forward_pair", 2), ("sequence_backward_pair", 2)]
    with GradientTape() as tape:
        apart = [ops.recurrent(**a) for a in arguments]
        loss = sum(ops.sum(y * y) + ops.sum(c) for y, (_, c), _ in apart)
    for a, b in zip(gradients, tape.gradient(loss, [*w, *v]), strict=True):
        np.testing.assert_array_equal(a, b)
    for (y, final, states), (z, ends, others) in zip(together, apart, strict=True):
        for a, b in zip((y, *final, *states), (z, *ends, *others), strict=True):
            np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("followed", [0, 1])
def test_of_a_pair_only_what_the_loss_uses_has_a_gradient(followed):
    x, *w = weights()
    pairs = [[Variable(a) for a in w], [Variable(a) for a in w]]
    arguments = [
        {"cell": cells.lstm(), "x": x, "kernel": k, "recurrent_kernel": r, "bias": b} for k, r, b in pairs
    ]
    with GradientTape() as tape:
        loss = ops.sum(ops.recurrent_pair(*arguments)[followed][0])
    gradients = tape.gradient(loss, pairs[0] + pairs[1])
    assert [bool(np.abs(g).max()) for g in gradients] == [followed == 0] * 3 + [followed == 1] * 3


def test_a_pair_is_run_together_where_the_kernel_can(monkeypatch):
    """`forward_all` and `backward_all` of the serving module get every sequence's arguments at once."""
    serving, asked = get_backend().functions("sequence", "lstm", np.dtype(np.float64), True), []

    def forward_all(calls):
        asked.append(("forward", [(len(places), sorted(options)) for places, options in calls]))
        return [serving.forward(*places, **options) for places, options in calls]

    def backward_all(calls):
        asked.append(("backward", [(len(places), sorted(options)) for places, options in calls]))
        return [serving.backward(*places, **options) for places, options in calls]

    monkeypatch.setattr(serving, "forward_all", forward_all, raising=False)
    monkeypatch.setattr(serving, "backward_all", backward_all, raising=False)
    x, *w = weights()
    w = [Variable(a) for a in w]
    call = dict(zip(("x", "kernel", "recurrent_kernel", "bias"), (x, *w), strict=True)) | {
        "cell": cells.lstm()
    }
    with GradientTape() as tape:
        (y, _, _), (_, (_, c), states) = ops.recurrent_pair(call, {**call, "reverse": True})
        loss = ops.sum(y) + ops.sum(c) + ops.sum(states[0])
    found = tape.gradient(loss, w)
    options = ["aux", "projection", "recurrent_mask", "training"]
    assert asked == [
        ("forward", [(8, options)] * 2),
        ("backward", [(3, ["need_dx"]), (3, ["dstates", "need_dx"])]),
    ]
    monkeypatch.undo()
    with GradientTape() as tape:
        (y, _, _), (_, (_, c), states) = ops.recurrent_pair(call, {**call, "reverse": True})
        loss = ops.sum(y) + ops.sum(c) + ops.sum(states[0])
    for a, b in zip(found, tape.gradient(loss, w), strict=True):
        np.testing.assert_array_equal(a, b)
    with GradientTape() as tape:  # in pieces each sequence is run by itself
        loss = sum(ops.sum(r[0]) for r in ops.recurrent_pair({**call, "remat_steps": 2}, call))
    assert len(tape.gradient(loss, w)) == 3 and len(asked) == 2


def test_recurrent_computes_dx_only_for_those_who_need_it(monkeypatch):
    asked = []
    backend = get_backend()
    backward = backend.sequence_backward

    def spy(*args, need_dx):
        asked.append(need_dx)
        return backward(*args, need_dx=need_dx)

    monkeypatch.setattr(backend, "sequence_backward", spy, raising=False)
    x, *w = weights()
    for source in (w[0], x):
        with GradientTape() as tape:
            watched = Tensor(source)
            tape.watch(watched)
            args = (x, watched, *w[1:]) if source is w[0] else (watched, *w)
            loss = ops.sum(ops.recurrent(cells.lstm(), *args)[0])
        tape.gradient(loss, [watched])
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((3, 5))}, r"x: shape \(3, 5\) came, expected rank 3"),
        ({"kernel": np.ones((4, 8))}, r"kernel: shape \(4, 8\) came, expected \(5, 8\)"),
        ({"recurrent_kernel": np.ones((2, 6))}, r"recurrent_kernel: shape \(2, 6\) came, expected \(2, 8\)"),
        ({"bias": np.ones(7)}, r"bias: shape \(7,\) came, expected \(8,\)"),
        ({"params": [np.ones(2)]}, "params: 1 came, expected 0"),
        ({"state": [np.ones((3, 2))]}, "state: 1 came, expected 2: h, c"),
        (
            {"state": [np.ones((3, 2)), np.ones((2, 2))]},
            r"state\[c\]: shape \(2, 2\) came, expected \(3, 2\)",
        ),
        ({"mask": np.ones((4, 3), bool)}, r"mask: shape \(4, 3\) came, expected \(3, 4\)"),
        ({"projection": np.ones(2)}, r"projection: shape \(2,\) came, expected rank 2: \(units, outputs\)"),
        ({"projection": np.ones((3, 2))}, r"kernel: shape \(5, 8\) came, expected \(5, 12\)"),
        ({"projection": np.ones((2, 1))}, r"recurrent_kernel: shape \(2, 8\) came, expected \(1, 8\)"),
        ({"projection": np.ones((2, 2))}, "projection: expected None for the cell lstm"),
    ],
)
def test_recurrent_refuses_shapes_that_do_not_fit(change, message):
    arguments = dict(zip(("x", "kernel", "recurrent_kernel", "bias"), weights(), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.recurrent(cells.lstm(), **(arguments | change))


# Dropout


def test_dropout_keeps_the_mean_and_scales():
    random.set_seed(0)
    y = ops.dropout(np.ones((100, 100), np.float32), 0.25).data
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.02


def test_dropout_draws_anew_each_time_and_again_after_set_seed():
    x = np.ones((10, 10), np.float32)
    random.set_seed(0)
    a, b = ops.dropout(x, 0.5).data, ops.dropout(x, 0.5).data
    random.set_seed(0)
    assert (a != b).any() and (ops.dropout(x, 0.5).data == a).all()
    random.set_seed(1)
    seeded = ops.dropout(x, 0.5, seed=0).data
    assert (seeded == a).all()


def test_dropout_of_nothing_is_the_same_tensor():
    x = Tensor(np.ones(3, np.float32))
    assert ops.dropout(x, 0) is x


def test_dropout_refuses():
    for rate in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            ops.dropout(np.ones(3), rate)
    with pytest.raises(ValueError, match=r"shape: \(2, 2\) came for the mask"):
        ops.dropout(np.ones((2, 3)), 0.5, shape=(2, 2))
    with pytest.raises(ValueError, match=r"shape: \(2,\) came for the mask"):
        ops.dropout(np.ones((2, 3)), 0.5, shape=(2,))


# Losses


def test_sparse_crossentropy_agrees_with_categorical():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 3, 4))
    one_hot = np.eye(4)[LABELS]
    for from_logits in (True, False):
        p = z if from_logits else ops.softmax(z)
        sparse = ops.sparse_categorical_crossentropy(LABELS, p, from_logits)
        np.testing.assert_allclose(
            sparse.data, ops.categorical_crossentropy(one_hot, p, from_logits).data, rtol=1e-6
        )
    expected = -np.log(np.take_along_axis(ops.softmax(z).data, LABELS[..., None], -1))[..., 0]
    np.testing.assert_allclose(sparse.data, expected, rtol=1e-6)


def test_crossentropies_are_finite_far_out():
    z = np.array([[1e4, -1e4]], np.float32)
    assert ops.sparse_categorical_crossentropy([1], z, from_logits=True).data[0] == 2e4
    assert ops.binary_crossentropy([[0.0, 1.0]], z, from_logits=True).data.tolist() == [[1e4, 1e4]]
    certain = np.array([[1.0, 0.0]], np.float32)
    for f in (ops.binary_crossentropy, ops.categorical_crossentropy):
        assert np.isfinite(f([[0.0, 1.0]], certain).data).all()
    assert np.isfinite(ops.sparse_categorical_crossentropy([1], certain).data).all()


def test_sparse_crossentropy_takes_whole_floats_as_labels():
    z = np.zeros((2, 3), np.float32)
    assert ops.sparse_categorical_crossentropy([1.0, 2.0], z, from_logits=True).shape == (2,)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "labels: 3 came, expected 0 to 2"),
        ([0, -1], "labels: -1 came"),
        ([0.5, 1], "integers"),
        ([np.nan, 1], "integers"),
        ([[0], [1]], r"labels: shape \(2, 1\) came for predictions of shape \(2, 3\), expected \(2,\)"),
    ],
)
def test_sparse_crossentropy_refuses(labels, message):
    with pytest.raises(ValueError, match=message):
        ops.sparse_categorical_crossentropy(np.array(labels), np.zeros((2, 3)), from_logits=True)


@pytest.mark.parametrize("f", [ops.categorical_crossentropy, ops.binary_crossentropy])
def test_crossentropies_refuse_other_shapes(f):
    with pytest.raises(ValueError, match=r"labels: shape \(2,\) came, expected the predictions' \(2, 3\)"):
        f(np.zeros(2), np.zeros((2, 3)))


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.linear(np.ones((2, 3)), np.ones((4, 5))),
         r"x of shape \(2, 3\) and w of shape \(4, 5\)"),
        (lambda: ops.linear(np.ones((2, 3)), np.ones((3, 5)), np.ones(4)),
         r"b of shape \(4,\) came, expected \(5,\)"),
        (lambda: ops.matmul(np.ones((2, 3)), np.ones((2, 3))), "do not fit"),
        (lambda: ops.matmul(np.ones((2, 3)), 2.0), "do not fit"),
        (lambda: ops.embedding(np.ones((4, 2)), [0.5]), "ids: dtype float32 came"),
        (lambda: ops.embedding(np.ones((4, 2)), [4]), "ids: 4 came, expected 0 to 3"),
        (lambda: ops.embedding(np.ones((4, 2)), [-1]), "ids: -1 came"),
        (lambda: ops.embedding(np.ones(4), [1]), r"table: shape \(4,\) came"),
        (lambda: ops.layer_norm(np.ones((2, 3)), np.ones(2)),
         r"gamma of shape \(2,\) came, expected \(3,\)"),
        (lambda: ops.sum(np.ones((2, 3)), axis=2), "axis: 2 came"),
        (lambda: ops.mean(np.ones((2, 0))), "no elements"),
        (lambda: ops.max(np.ones((2, 0)), axis=1), "no elements"),
        (lambda: ops.clip(np.ones(2), 1.0, 0.0), "low 1.0 came above high 0.0"),
        (lambda: ops.concatenate([]), "empty list"),
        (lambda: ops.stack([]), "empty list"),
        (lambda: ops.pad(np.ones((2, 3)), [(1, 1)]), "widths: 1 pairs came"),
        (lambda: ops.repeat(np.ones(2), 1.5, 0), "repeats: 1.5 came"),
    ],
)  # fmt: skip
def test_refusals_name_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_embedding_of_no_ids():
    table = Variable(np.ones((4, 2)))
    with GradientTape() as tape:
        loss = ops.sum(ops.embedding(table, np.zeros((0, 3), int)))
    assert (tape.gradient(loss, [table])[0] == 0).all()


# Inside a cell


def test_operations_of_the_cell_language_take_traced_scalars():
    from numlstm.kernels.derive import cell

    @cell(gates="ab")
    def mixed(a, b, h):
        a = ops.sigmoid(a) * ops.tanh(b) + ops.relu(h) + ops.exp(ops.minimum(a, 0.0)) + ops.softplus(b)
        b = ops.sqrt(ops.maximum(b, 0.5)) + ops.log(ops.clip(a, 0.1, 2.0)) + ops.hard_sigmoid(a)
        return ops.where(a > 0, a, b)

    rng = np.random.default_rng(0)
    x, w, r = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 6)), rng.normal(size=(3, 6))
    y, _, _ = ops.recurrent(mixed, x, w, r)
    a, b = np.split(x[:, 0] @ w, 2, axis=-1)
    first = ops.sigmoid(a) * np.tanh(b) + np.exp(np.minimum(a, 0)) + np.log1p(np.exp(b))
    second = np.sqrt(np.maximum(b, 0.5)) + ops.log(ops.clip(first, 0.1, 2.0)) + ops.hard_sigmoid(first)
    np.testing.assert_allclose(y.data[:, 0], ops.where(first > 0, first, second).data, rtol=1e-10)
