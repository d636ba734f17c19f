"""Recurrent layers against hand-written NumPy loops, and their options: states, masks, directions."""

from copy import deepcopy

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops
from numlstm.autograd import GradientTape, Tensor
from numlstm.kernels import cells

B, T, I, H = 3, 7, 5, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(w, x, state=None, mask=None):
    """Every h, and the last (h, c), by the equations."""
    kernel, recurrent, bias = w
    h, c = (np.zeros((len(x), H)), np.zeros((len(x), H))) if state is None else state
    ys, cs = [], []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        new_h = sigmoid(o) * np.tanh(new_c)
        valid = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(valid, new_h, h), np.where(valid, new_c, c)
        ys.append(h)
        cs.append(c)
    return np.stack(ys, 1), (h, c), np.stack(cs, 1)


def gru(w, x, mask=None):
    kernel, recurrent, (b_x, b_h) = w
    h, ys = np.zeros((len(x), H)), []
    for t in range(x.shape[1]):
        xr, xz, xn = np.split(x[:, t] @ kernel + b_x, 3, axis=1)
        hr, hz, hn = np.split(h @ recurrent + b_h, 3, axis=1)
        z, n = sigmoid(xz + hz), np.tanh(xn + sigmoid(xr + hr) * hn)
        new = (1 - z) * n + z * h
        h = new if mask is None else np.where(mask[:, t, None], new, h)
        ys.append(h)
    return np.stack(ys, 1)


def elman(w, x):
    kernel, recurrent, bias = w
    h, ys = np.zeros((len(x), H)), []
    for t in range(x.shape[1]):
        h = np.tanh(x[:, t] @ kernel + h @ recurrent + bias)
        ys.append(h)
    return np.stack(ys, 1)


def made(cls, x, **options):
    """A layer with weights that are not the tidy initial ones, and these weights in float64."""
    nl.set_seed(0)
    layer = cls(H, return_sequences=True, **options)
    layer.ensure_built(x.shape)
    generator = np.random.default_rng(2)
    layer.set_weights([generator.standard_normal(w.shape) * 0.5 for w in layer.weights])
    return layer, [w.astype(np.float64) for w in layer.get_weights()]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("cls", "reference"), [(nl.LSTM, lambda w, x: lstm(w, x)[0]), (nl.GRU, gru), (nl.SimpleRNN, elman)]
)
def test_numbers(x, cls, reference):
    layer, w = made(cls, x)
    close(layer(x), reference(w, x))


@pytest.mark.parametrize(("cls", "gates"), [(nl.LSTM, 4), (nl.GRU, 3), (nl.SimpleRNN, 1)])
def test_weights_have_keras_names_shapes_and_order(x, cls, gates):
    layer, _ = made(cls, x)
    bias = (2, 3 * H) if cls is nl.GRU else (gates * H,)
    assert [w.name for w in layer.weights] == ["kernel", "recurrent_kernel", "bias"]
    assert [w.shape for w in layer.weights] == [(I, gates * H), (H, gates * H), bias]
    bare = cls(H, use_bias=False)
    bare(x)
    assert [w.name for w in bare.weights] == ["kernel", "recurrent_kernel"]


def test_initial_weights_are_keras(x):
    nl.set_seed(0)
    layer = nl.LSTM(H)
    layer(x)
    kernel, recurrent, bias = layer.get_weights()
    assert bias.tolist() == [0.0] * H + [1.0] * H + [0.0] * 2 * H
    assert np.abs(kernel).max() <= np.sqrt(6 / (I + 4 * H))
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(H), atol=1e-6)
    plain = nl.LSTM(H, unit_forget_bias=False, bias_initializer="ones")
    plain(x)
    assert (plain.get_weights()[2] == 1).all()


def test_gru_without_bias(x):
    layer, (kernel, recurrent) = made(nl.GRU, x, use_bias=False)
    close(layer(x), gru((kernel, recurrent, np.zeros((2, 3 * H))), x))


def test_gru_bias_gradient_reaches_both_rows(x):
    layer, w = made(nl.GRU, x)
    with GradientTape() as tape:
        loss = (layer(x) ** 2).sum()
    (gradient,) = tape.gradient(loss, [layer.bias])
    step, numeric = 1e-5, np.zeros((2, 3 * H))
    for index in np.ndindex(2, 3 * H):
        up, down = w[2].copy(), w[2].copy()
        up[index] += step
        down[index] -= step
        numeric[index] = ((gru((*w[:2], up), x) ** 2).sum() - (gru((*w[:2], down), x) ** 2).sum()) / (
            2 * step
        )
    np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=1e-3)


def test_last_output_and_states(x):
    layer, w = made(nl.LSTM, x)
    ys, (h, c), cs = lstm(w, x)
    layer.return_sequences = False
    close(layer(x), ys[:, -1])
    layer.return_state = True
    for ours, theirs in zip(layer(x), (ys[:, -1], h, c), strict=True):
        close(ours, theirs)
    layer.return_cell_sequence = True
    assert len(layer(x)) == 4
    close(layer(x)[3], cs)


def test_initial_state(x):
    layer, w = made(nl.LSTM, x)
    state = [np.full((B, H), 0.3), np.full((B, H), -0.2)]
    close(layer(x, initial_state=state), lstm(w, x, state)[0])
    with GradientTape() as tape:
        start = [Tensor(s.astype(np.float32)) for s in state]
        for s in start:
            tape.watch(s)
        loss = layer(x, initial_state=start).sum()
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, start))


@pytest.mark.parametrize("sequences", [True, False])
def test_masks_with_holes(x, holes, sequences):
    layer, w = made(nl.LSTM, x)
    ys, _, _ = lstm(w, x, mask=holes)
    layer.return_sequences = sequences
    y = layer(x, mask=holes)
    close(y, ys if sequences else ys[:, -1])
    assert (np.asarray(y)[1] == 0).all()  # the row without a valid step keeps its initial state
    assert y.mask is holes if sequences else y.mask is None


def test_mask_on_the_gru(x, holes):
    layer, w = made(nl.GRU, x)
    close(layer(x, mask=holes), gru(w, x, holes))


def test_lengths_are_a_mask(x):
    layer, _ = made(nl.LSTM, x)
    lengths = [T, 0, 3]
    mask = np.arange(T) < np.array(lengths)[:, None]
    assert np.array_equal(layer(x, lengths=lengths).numpy(), layer(x, mask=mask).numpy())


def test_a_mask_travels_with_the_tensor(x, holes):
    x = x * holes[..., None]
    masked = nl.Masking()(x)
    first, w = made(nl.LSTM, x)
    second = nl.LSTM(2)
    h = first(masked)
    close(h, lstm(w, x, mask=holes)[0])
    assert np.array_equal(h.mask, holes)
    assert np.array_equal(second(h).numpy(), second(np.asarray(h), mask=holes).numpy())


def test_go_backwards(x, holes):
    layer, w = made(nl.LSTM, x, go_backwards=True)
    close(layer(x), lstm(w, x[:, ::-1])[0])
    y = layer(x, mask=holes)
    close(y, lstm(w, x[:, ::-1], mask=holes[:, ::-1])[0])
    assert np.array_equal(
        y.mask, holes[:, ::-1]
    )  # the outputs come in the order of processing, and so does their mask


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "make", [nl.LSTM, nl.GRU, nl.SimpleRNN, nl.IndRNN, nl.SLSTM, lambda n, **o: nl.RNN(cells.elman("tanh"), n, **o)]
)  # fmt: skip
def test_masked_outputs_of_zero(x, holes, make, backwards):
    options = {"return_sequences": True, "return_state": True, "go_backwards": backwards}
    repeating, zeroed = make(4, **options), make(4, **options, zero_output_for_mask=True)
    y, *states = repeating(x, mask=holes)
    zeroed.ensure_built(x.shape)
    zeroed.set_weights(repeating.get_weights())
    found, *others = zeroed(x, mask=holes)
    read = holes[:, ::-1] if backwards else holes  # the outputs are in the order of processing
    assert np.array_equal(found.numpy(), np.where(read[..., None], y.numpy(), 0))
    assert y.numpy()[~read].any() and np.array_equal(found.mask, read)
    for a, b in zip(states, others, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    assert np.array_equal(zeroed(x)[0].numpy(), repeating(x)[0].numpy())  # no mask, nothing to leave out


def test_the_last_output_stays_where_masked_ones_are_zero(x):
    """As Keras says: the option counts with `return_sequences` only."""
    layer, w = made(nl.LSTM, x, zero_output_for_mask=True)
    layer.return_sequences = False
    mask = np.arange(x.shape[1]) < np.array([2, 3, 1])[:, None]
    close(layer(x, mask=mask), lstm(w, x, mask=mask)[0][:, -1])


def test_reset_state_is_reset_states(x):
    """Keras 3's name."""
    layer, _ = made(nl.LSTM, x, stateful=True)
    layer(x)
    layer.reset_state([1])
    assert not layer.states[0][1].any() and layer.states[0][0].any()
    layer.reset_state()
    assert layer.states is None


def test_stateful_goes_on_where_it_stopped(x):
    layer, w = made(nl.LSTM, x, stateful=True)
    ys = lstm(w, x)[0]
    close(layer(x[:, :3]), ys[:, :3])
    close(layer(x[:, 3:]), ys[:, 3:])
    layer.reset_states()
    close(layer(x[:, :3]), ys[:, :3])


@pytest.mark.parametrize("rows", [1, [1], np.array([False, True, False]), [-2]])
def test_reset_of_single_rows(x, rows):
    layer, w = made(nl.LSTM, x, stateful=True)
    layer(x[:, :3])
    layer.reset_states(rows)
    y = layer(x[:, 3:]).numpy()
    whole, fresh = lstm(w, x)[0][:, 3:], lstm(w, x[:, 3:])[0]
    close(y[[0, 2]], whole[[0, 2]])
    close(y[1], fresh[1])


def test_states_are_cut_off_from_the_tape(x):
    layer, _ = made(nl.LSTM, x, stateful=True)
    for _ in range(2):
        with GradientTape() as tape:
            loss = layer(x).sum()
        assert len(tape.gradient(loss, layer.trainable_weights)) == 3
    assert all(type(s) is np.ndarray and s.base is None for s in layer.states)


def test_another_batch_size_needs_a_reset(x):
    layer, _ = made(nl.LSTM, x, stateful=True)
    layer(x)
    with pytest.raises(ValueError, match=r"keeps states for 3 rows, got a batch of 2: call reset_states"):
        layer(x[:2])
    layer.reset_states()
    layer(x[:2])
    with pytest.raises(ValueError, match="rows: expected numbers of the 2 rows"):
        layer.reset_states([2])


def test_dropout_is_one_mask_for_all_steps(x):
    nl.set_seed(0)
    layer = nl.SimpleRNN(I, activation="linear", use_bias=False, dropout=0.5, return_sequences=True)
    layer.ensure_built((None, None, I))
    layer.set_weights([np.eye(I), np.zeros((I, I))])  # the output is the thinned-out input
    ones = np.ones((B, T, I), np.float32)
    assert np.array_equal(layer(ones).numpy(), ones)
    y = layer(ones, training=True).numpy()
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y == y[:, :1]).all()


def test_recurrent_dropout_thins_out_what_is_handed_on(x):
    nl.set_seed(0)
    layer = nl.SimpleRNN(40, activation="linear", recurrent_dropout=0.5, return_sequences=True)
    layer.ensure_built(x.shape)
    kernel = np.zeros((I, 40))
    layer.set_weights([kernel, np.eye(40), np.ones(40)])  # h = 1 + mask * h, so 1, 1 + m, 1 + m + m^2, ...
    steps = np.arange(1, T + 1)[None, :, None]
    close(layer(x), np.broadcast_to(steps, (B, T, 40)))
    y = layer(x, training=True).numpy()
    mask = y[:, 1] - 1
    assert set(np.unique(mask)) == {0.0, 2.0} and 0.3 < (mask == 0).mean() < 0.7
    close(y[:, -1], np.where(mask == 0, 1, 2**T - 1))  # one mask for all steps
    assert not np.array_equal(layer(x, training=True).numpy(), y)


def test_recurrent_dropout_gradient(x):
    nl.set_seed(0)
    layer = nl.LSTM(H, recurrent_dropout=0.5, dtype="float64")
    layer.ensure_built(x.shape)

    def loss():
        nl.random.set_state({"seed": 5, "stream": 0})  # the same mask each time
        return ops.square(layer(x, training=True)).sum()

    with GradientTape() as tape:
        value = loss()
    (gradient,) = tape.gradient(value, [layer.recurrent_kernel])
    numeric, w = np.zeros_like(gradient), layer.recurrent_kernel.writable()
    for index in np.ndindex(*w.shape):
        at = w[index]
        w[index] = at + 1e-6
        up = float(loss())
        w[index] = at - 1e-6
        numeric[index] = (up - float(loss())) / 2e-6
        w[index] = at
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["relu", "hard_sigmoid", "softsign", "linear"])
def test_other_activations(x, name):
    layer, (kernel, recurrent, bias) = made(nl.LSTM, x, activation=name)
    act = lambda v: np.asarray(nl.activations.get(name)(Tensor(v)))
    h, c = np.zeros((B, H)), np.zeros((B, H))
    for t in range(T):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * act(g)
        h = sigmoid(o) * act(c)
    close(layer(x)[:, -1], h)


def test_a_cell_of_ones_own(x):
    @nl.cell(gates="zg", state=("h",))
    def leaky(z, g, h, decay):
        return nl.sigmoid(z + decay) * h + nl.tanh(g)

    nl.set_seed(0)
    layer = nl.RNN(leaky, H, return_sequences=True, parameter_initializer="ones")
    layer(x)
    kernel, recurrent, bias, decay = layer.get_weights()
    assert [w.name for w in layer.weights][3] == "decay" and (decay == 1).all()
    h = np.zeros((B, H))
    for t in range(T):
        z, g = np.split(x[:, t] @ kernel + h @ recurrent + bias, 2, axis=1)
        h = sigmoid(z + decay) * h + np.tanh(g)
    close(layer(x)[:, -1], h)
    again = nl.layers.from_config(nl.layers.to_config(layer))
    assert again.cell is leaky


def test_a_cell_is_found_by_its_name_once_it_is_made():
    with pytest.raises(ValueError, match="unknown cell 'nobody'"):
        nl.RNN("nobody", 4)
    with pytest.raises(
        ValueError, match=r"cell: expected a cell made by nl\.cell, or the name of one, got 3"
    ):
        nl.RNN(3, 4)
    with pytest.raises(ValueError, match=r"@nl.cell\(gates=...\), got the function itself"):
        nl.cell(lambda a: a)

    with pytest.raises(ValueError, match="takes z_h at every step"):
        nl.RNN(cells.zoneout(cells.elman()), 4)

    @nl.cell(gates=1)
    def somebody(a):
        return nl.tanh(a)

    assert nl.RNN("somebody", 4).cell is somebody


def test_float64_runs_in_float64(x):
    layer = nl.LSTM(H, dtype="float64", return_sequences=True)
    y = layer(x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y.numpy(), lstm(layer.get_weights(), x.astype(np.float64))[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 0}, "units: expected an integer of at least 1, got 0"),
        ({"units": 2.5}, "units"),
        ({"units": 4, "dropout": 1.0}, "dropout: expected a number from 0"),
        ({"units": 4, "recurrent_dropout": -0.2}, "recurrent_dropout: expected a number from 0"),
        ({"units": 4, "activation": "tan"}, "unknown activation 'tan'"),
        ({"units": 4, "activation": "softmax"}, "softmax"),
        (
            {"units": 4, "return_sequence": True},
            "unknown option 'return_sequence': did you mean 'return_sequences'",
        ),
        ({"units": 4, "kernel_initializer": "gloro"}, "unknown initializer"),
        ({"units": 4, "dtype": "float16"}, "dtype: expected one of"),
        ({"units": 4, "input_shape": (0, 3)}, "input_shape: expected sizes > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nl.LSTM(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda layer, x: layer(x[:, 0]),
            r"expected an input of rank 3, \(batch, time, features\), got shape \(3, 5\)",
        ),
        (lambda layer, x: layer(x[:, 0]), r"use x\[:, :, None\]"),
        (
            lambda layer, x: layer(x[..., :2]),
            r"expected inputs with 5 features \(last axis\), got shape \(3, 7, 2\)",
        ),
        (lambda layer, x: layer(x[:0]), "at least one row"),
        (lambda layer, x: layer(x[:, :0]), "one time step"),
        (lambda layer, x: layer([x, x]), "takes one input, got 2"),
        (lambda layer, x: layer(np.array([[["a"]]])), "expected numbers"),
        (lambda layer, x: layer(x, mask=np.ones((3, 6), bool)), r"mask: expected shape \(batch, time\)"),
        (lambda layer, x: layer(x, mask=np.full((3, 7), 2)), "mask: expected True and False"),
        (lambda layer, x: layer(x, lengths=[1, 2]), "lengths: expected one for each of the 3 rows"),
        (lambda layer, x: layer(x, lengths=[1, 2, -1]), "lengths: expected values from 0 to 7.*got -1"),
        (lambda layer, x: layer(x, lengths=[1, 2, 8]), "got 8"),
        (lambda layer, x: layer(x, lengths=[1.0, 2, 3]), "lengths: expected integers"),
        (lambda layer, x: layer(x, lengths=[1, 2, 3], mask=np.ones((3, 7))), "not both"),
        (lambda layer, x: layer(x, initial_state=[np.zeros((3, 4))]), r"expected 2 \(h, c\), got 1"),
        (lambda layer, x: layer(x, initial_state=[np.zeros((3, 9))] * 2), "initial_state h: expected shape"),
        (lambda layer, x: layer(x, initial=None), "its call knows no 'initial'"),
    ],
)
def test_bad_calls(x, call, message):
    layer, _ = made(nl.LSTM, x)
    with pytest.raises(ValueError, match=message):
        call(layer, x)


@pytest.mark.parametrize(
    "make",
    [
        nl.LSTM,
        nl.GRU,
        lambda n: nl.GRU(n, use_bias=False),
        lambda n: nl.LSTM(n, split_bias=True),
        lambda n: nl.LSTM(n, peephole=True),
    ],
)
def test_weights_are_kept_packed_for_inference_until_one_changes(x, make):
    layer = make(H)
    first = layer(x).numpy()
    kept = layer.running_weights()
    assert len(kept[-1].kept) == 1
    assert np.array_equal(layer(x).numpy(), first)
    assert layer.running_weights() is kept
    for changed in layer.weights:
        changed.assign(changed.numpy() * 0.5 + 0.1)
        after = layer(x).numpy()
        with nl.use_backend("reference"):
            assert np.allclose(after, layer(x).numpy(), atol=1e-6)
        assert not np.allclose(after, first, atol=1e-4)
        first = after
    with nl.GradientTape() as tape:  # what learns is made anew
        assert layer.running_weights()[-1] is None
        loss = layer(x).sum()
    tape.gradient(loss, layer.trainable_weights)
    copy = deepcopy(layer)
    assert np.array_equal(copy(x).numpy(), first)
    copy.kernel.assign(copy.kernel.numpy() + 1)
    assert not np.array_equal(copy(x).numpy(), first)
    assert np.array_equal(layer(x).numpy(), first)


def test_a_bias_that_is_another_variable_now_is_seen(x):
    layer = nl.LSTM(H)
    first = layer(x).numpy()
    layer.bias = nl.Variable(np.ones_like(layer.bias.numpy()), "bias")
    assert not np.allclose(layer(x).numpy(), first, atol=1e-3)
