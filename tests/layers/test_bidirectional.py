"""Bidirectional against two hand-written NumPy loops, one from each end: merging, masks, states, errors."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.autograd import GradientTape
from numlstm.kernels import cells

B, T, I, H = 3, 7, 5, 4
MODES = {
    "concat": lambda a, b: np.concatenate([a, b], -1),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(w, x, mask=None, state=None):
    """Every h, and the last (h, c), by the equations."""
    kernel, recurrent, bias = w
    h, c = (np.zeros((len(x), H)), np.zeros((len(x), H))) if state is None else state
    ys = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
        new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        new_h = sigmoid(o) * np.tanh(new_c)
        valid = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(valid, new_h, h), np.where(valid, new_c, c)
        ys.append(h)
    return np.stack(ys, 1), (h, c)


def both(w, x, mask=None, state=(None, None)):
    """The outputs of the two directions, each in the order of the inputs, and their last states."""
    ys, forward = lstm(w[:3], x, mask, state[0])
    back, backward = lstm(w[3:], x[:, ::-1], None if mask is None else mask[:, ::-1], state[1])
    return ys, back[:, ::-1], forward, backward


def made(x, merge_mode="concat", **options):
    """A layer with weights that are not the tidy initial ones, and these weights in float64."""
    nl.set_seed(0)
    layer = nl.Bidirectional(nl.LSTM(H, **options), merge_mode)
    layer.ensure_built((None, None, I))
    generator = np.random.default_rng(2)
    layer.set_weights([generator.standard_normal(w.shape) * 0.5 for w in layer.weights])
    return layer, [w.astype(np.float64) for w in layer.get_weights()]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_sequences(x, holes, mode, masked):
    layer, w = made(x, mode, return_sequences=True)
    mask = holes if masked else None
    y = layer(x, mask=mask)
    a, b, *_ = both(w, x, mask)
    kept = holes[..., None] if masked else 1  # as in Keras: zeros where the mask leaves a step out
    close(y, MODES[mode](a, b) * kept)
    assert y.mask is mask
    assert y.shape == layer.compute_output_shape((B, T, I))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_last_outputs_are_those_of_either_end(x, holes, mode, masked):
    layer, w = made(x, mode)
    mask = holes if masked else None
    y = layer(x, mask=mask)
    _, _, (forward, _), (backward, _) = both(w, x, mask)
    close(y, MODES[mode](forward, backward))
    assert y.mask is None and y.shape == layer.compute_output_shape((B, T, I))


def test_no_merging_gives_both(x, holes):
    layer, w = made(x, None, return_sequences=True)
    outputs = layer(x, mask=holes)
    for ours, theirs in zip(outputs, both(w, x, holes)[:2], strict=True):
        close(ours, theirs * holes[..., None])
        assert ours.mask is holes
    last, _ = made(x, None)
    assert [y.mask for y in last(x, mask=holes)] == [None, None]
    with pytest.raises(ValueError, match=r"gives 2 results.*merge_mode=None"):
        nl.Sequential([nl.Bidirectional(nl.LSTM(4, input_shape=(None, 3)), None)])


@pytest.mark.parametrize("sequences", [False, True])
def test_states_come_forward_first(x, holes, sequences):
    layer, w = made(x, return_state=True, return_sequences=sequences)
    _, *states = layer(x, mask=holes)
    _, _, forward, backward = both(w, x, holes)
    for ours, theirs in zip(states, (*forward, *backward), strict=True):
        close(ours, theirs)
    layer, _ = made(x, None, return_state=True, return_sequences=sequences)
    assert [y.shape for y in layer(x)] == layer.compute_output_shape((B, T, I))


def test_initial_states_are_split_in_halves(x):
    layer, w = made(x, return_sequences=True, return_state=True)
    states = list(np.random.default_rng(3).standard_normal((4, B, H)))
    y, *last = layer(x, initial_state=states)
    a, b, forward, backward = both(w, x, state=(states[:2], states[2:]))
    close(y, np.concatenate([a, b], -1))
    close(np.stack([s.numpy() for s in last]), np.stack([*forward, *backward]))
    for bad in (states[:2], states[0], [*states, states[0]]):
        with pytest.raises(
            ValueError, match=r"initial_state: expected 4 \(forward h, c, then backward h, c\)"
        ):
            layer(x, initial_state=bad)


def test_a_mask_travels_through(x, holes):
    x = x * holes[..., None]
    first, w = made(x, return_sequences=True)
    second = nl.LSTM(2)
    h = first(nl.Masking()(x))
    a, b, *_ = both(w, x, holes)
    close(h, np.concatenate([a, b], -1) * holes[..., None])
    assert np.array_equal(second(h).numpy(), second(h.numpy(), mask=holes).numpy())


def test_lengths_are_a_mask(x):
    layer, w = made(x, return_sequences=True)
    mask = np.arange(T) < np.array([T, 0, 3])[:, None]
    y = layer(x, lengths=[T, 0, 3])
    assert np.array_equal(y.numpy(), layer(x, mask=mask).numpy())
    alone, _ = lstm(w[3:], x[2:, :3][:, ::-1])  # the backward layer begins at a row's own end
    close(y.numpy()[2, :3, H:], alone[0, ::-1])


def test_a_backward_layer_of_another_kind(x):
    backward = nl.GRU(6, go_backwards=True, return_sequences=True, return_state=True, name="mine")
    forward = nl.LSTM(H, return_sequences=True, return_state=True)
    layer = nl.Bidirectional(forward, backward_layer=backward)
    outputs = layer(x, initial_state=[np.zeros((B, H)), np.zeros((B, H)), np.zeros((B, 6))])
    assert layer.backward_layer is backward
    assert [y.shape for y in outputs] == [(B, T, H + 6), (B, H), (B, H), (B, 6)]
    assert [y.shape for y in outputs] == layer.compute_output_shape((B, T, I))
    alone = nl.GRU(6, go_backwards=True, return_sequences=True)
    alone.ensure_built((None, None, I))
    alone.set_weights(backward.get_weights())
    close(outputs[0].numpy()[..., H:], alone(x).numpy()[:, ::-1])


def test_a_forward_layer_that_reads_backwards(x, holes):
    """The two layers' outputs come in the order in which the first reads."""
    options = {"return_sequences": True, "return_state": True, "zero_output_for_mask": True}
    turned = nl.Bidirectional(nl.LSTM(H, go_backwards=True, **options))
    y, *states = turned(x, mask=holes)
    assert turned.forward_layer.go_backwards and not turned.backward_layer.go_backwards
    usual = nl.Bidirectional(nl.LSTM(H, **options))
    usual.ensure_built(x.shape)
    usual.set_weights(turned.get_weights())
    theirs, *their_states = usual(x[:, ::-1], mask=holes[:, ::-1])
    close(y, theirs.numpy())
    assert np.array_equal(y.mask, holes[:, ::-1])
    for a, b in zip(states, their_states, strict=True):
        close(a, b.numpy())
    again = nl.layers.from_config(nl.layers.to_config(turned))
    assert again.forward_layer.go_backwards and not again.backward_layer.go_backwards


def test_names_and_weights():
    layer = nl.Bidirectional(nl.LSTM(H, name="memory"), name="two")
    layer.build((None, None, I))
    assert (layer.forward_layer.name, layer.backward_layer.name) == ("forward_memory", "backward_memory")
    kinds = ("kernel", "recurrent_kernel", "bias")
    assert list(layer.named_weights()) == [f"{d}_layer/{k}" for d in ("forward", "backward") for k in kinds]
    assert not np.array_equal(layer.weights[0].numpy(), layer.weights[3].numpy())
    again = nl.layers.from_config(nl.layers.to_config(layer))
    assert (again.forward_layer.name, again.backward_layer.name) == ("forward_memory", "backward_memory")


def test_the_layer_given_is_left_alone(x):
    given = nl.LSTM(H, name="given")
    layer = nl.Bidirectional(given)
    layer(x)
    assert not given.built and layer.forward_layer is not given and not given.go_backwards


def test_options_are_copied_as_they_are(x):
    def ones(shape, dtype):
        return np.ones(shape, dtype)

    cell = cells.elman("relu")  # of no name that a file could give
    layer = nl.Bidirectional(nl.RNN(cell, H, kernel_initializer=ones, zoneout=[0.2], dropout=0.1))
    layer.build((None, None, I))
    for one in (layer.forward_layer, layer.backward_layer):
        assert one.cell is cell and one.zoneout == (0.2,) and one.dropout == 0.1
        assert (one.kernel.numpy() == 1).all()


def test_stateful(x):
    layer, w = made(x, stateful=True, return_state=True)
    halves = [layer(x[:, :3]), layer(x[:, 3:])]
    _, _, *first = both(w, x[:, :3])
    _, _, *second = both(w, x[:, 3:], state=first)
    for (_, *ours), theirs in zip(halves, (first, second), strict=True):
        close(np.stack([s.numpy() for s in ours]), np.stack([s for pair in theirs for s in pair]))
    layer.reset_states(1)
    assert (layer.forward_layer.states[0][1] == 0).all() and (layer.backward_layer.states[0][1] == 0).all()
    assert layer.forward_layer.states[0][0].any()
    layer.reset_state()  # Keras 3's name
    close(layer(x[:, :3])[1], first[0][0])


def test_both_directions_are_one_call_of_the_backend(x, holes, monkeypatch):
    backend, calls = nl.get_backend(), []
    for name in ("sequence_forward", "sequence_forward_pair", "sequence_backward_pair"):
        served = getattr(backend, name)
        spy = lambda *a, name=name, served=served, **o: (calls.append(name), served(*a, **o))[1]
        monkeypatch.setattr(backend, name, spy, raising=False)
    layer, _ = made(x, return_sequences=True)
    with GradientTape() as tape:
        loss = (layer(x, mask=holes) ** 2).sum()
    tape.gradient(loss, layer.trainable_weights)
    assert calls == ["sequence_forward_pair", "sequence_backward_pair"]


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "recurrent_dropout": 0.3, "recurrent_dropconnect": 0.3, "zoneout": 0.3},
        {"activity_regularizer": "l2", "kernel_regularizer": "l1", "return_state": True},
        {"remat_steps": 2, "recurrent_dropout": 0.3, "recurrent_dropout_per_step": True},
    ],
    ids=str,
)
def test_one_call_is_the_two_layers_one_after_the_other(x, holes, options):
    layer, _ = made(x, None, return_sequences=True, **options)
    nl.set_seed(7)
    with GradientTape() as tape:
        results = layer(x, mask=holes, training=True)
        penalties = layer.losses
        loss = sum((r * r).sum() for r in [*results, *penalties])
    gradients = tape.gradient(loss, layer.trainable_weights)
    nl.set_seed(7)
    with GradientTape() as tape:
        pair, penalties_apart = [], []
        for one in (layer.forward_layer, layer.backward_layer):
            first, *states = nl.layers.base.flat(one(x, mask=holes, training=True))
            first = nl.ops.flip(first, 1) if one.go_backwards else first
            pair.append([first * holes[..., None].astype("float32"), *states])
            penalties_apart.append(one.losses)
        apart = [pair[0][0], pair[1][0], *pair[0][1:], *pair[1][1:]]
        loss = sum((r * r).sum() for r in [*apart, *penalties_apart[0], *penalties_apart[1]])
    assert sorted(float(p) for p in penalties) == sorted(float(p) for two in penalties_apart for p in two)
    for ours, theirs in zip(results, apart, strict=True):
        assert np.array_equal(ours.numpy(), theirs.numpy())
    for a, b in zip(gradients, tape.gradient(loss, layer.trainable_weights), strict=True):
        close(a, b)


def test_a_layer_with_a_call_of_its_own_is_called(x):
    class Doubled(nl.LSTM):
        def call(self, inputs, initial_state=None, mask=None, training=False):
            return super().call(inputs, initial_state, mask, training) * 2

    nl.set_seed(0)
    layer = nl.Bidirectional(Doubled(H, return_sequences=True))
    y = layer(x)
    plain = nl.Bidirectional(nl.LSTM(H, return_sequences=True))
    plain.ensure_built(x.shape)
    plain.set_weights(layer.get_weights())
    assert np.array_equal(y.numpy(), 2 * plain(x).numpy())


def test_dropout_thins_each_direction_by_itself():
    nl.set_seed(0)
    simple = nl.SimpleRNN(I, activation="linear", use_bias=False, dropout=0.5, return_sequences=True)
    layer = nl.Bidirectional(simple, None)
    layer.build((None, None, I))
    layer.set_weights([np.eye(I), np.zeros((I, I))] * 2)  # the outputs are the thinned-out inputs
    ones = np.ones((8, T, I), np.float32)
    assert all(np.array_equal(y.numpy(), ones) for y in layer(ones))
    a, b = (y.numpy() for y in layer(ones, training=True))
    assert set(np.unique(a)) == set(np.unique(b)) == {0.0, 2.0} and not np.array_equal(a, b)


def test_trainable_and_penalties(x):
    layer = nl.Bidirectional(nl.LSTM(H, kernel_regularizer="l2", activity_regularizer="l2"))
    layer(x)
    assert len(layer.trainable_weights) == 6 and len(layer.losses) == 4
    layer.trainable = False
    assert layer.trainable_weights == [] and len(layer.weights) == 6


def test_in_a_model_that_is_trained_saved_and_loaded(x, tmp_path):
    nl.set_seed(0)
    model = nl.Sequential([
        nl.Bidirectional(nl.LSTM(8, return_sequences=True), input_shape=(T, I)),
        nl.Bidirectional(nl.GRU(6), merge_mode="sum"),
        nl.Dense(1),
    ])  # fmt: skip
    assert model.built
    model.compile("adam", "mse")
    history = model.fit(x, x[:, 2, :1], epochs=40, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    rows = nl.explain(model, print_fn=lambda line: None)
    assert [row["option"] for row in rows[:4]] == ["lstm", "lstm", "gru", "gru"]


def test_every_weight_is_reached(x, holes):
    layer, _ = made(x, return_sequences=True)
    with GradientTape() as tape:
        loss = (layer(x, mask=holes) ** 2).sum()
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, layer.trainable_weights))


def test_float64_and_cast(x):
    layer = nl.Bidirectional(nl.LSTM(H, dtype="float64"))
    assert layer.dtype == "float64" and layer(x).dtype == np.float64
    layer.cast("float32")
    assert layer(x).dtype == np.float32
    with pytest.raises(ValueError, match="dtype: expected forward_l's, float32, got float64"):
        nl.Bidirectional(nl.LSTM(4, name="l"), dtype="float64")


def test_a_stream_and_cut_sequences_refuse_it(x):
    model = nl.Sequential([nl.Bidirectional(nl.LSTM(4, input_shape=(None, I)), name="two"), nl.Dense(1)])
    with pytest.raises(ValueError, match=r"two: can't be streamed: .* reads from the end of the sequence"):
        model.stream()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"bptt_steps: backward_.* reads time from its end"):
        model.fit(x, x[:, 0, :1], bptt_steps=3, verbose=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nl.Bidirectional(nl.Dense(3)), "layer: expected a recurrent layer.*got Dense"),
        (lambda: nl.Bidirectional(nl.LSTM), r"layer: expected a recurrent layer.*got the class LSTM"),
        (lambda: nl.Bidirectional(3), "layer: expected a recurrent layer.*got int"),
        (lambda: nl.Bidirectional(nl.LSTM(4), "max"), "merge_mode: expected one of .*'concat'.*, got 'max'"),
        (
            lambda: nl.Bidirectional(nl.LSTM(4), backward_layer=3),
            "backward_layer: expected a recurrent layer",
        ),
        (
            lambda: nl.Bidirectional(
                nl.LSTM(4, go_backwards=True), backward_layer=nl.LSTM(4, go_backwards=True)
            ),
            "go_backwards: .*got True and True",
        ),
        (
            lambda: nl.Bidirectional(nl.LSTM(4), backward_layer=nl.LSTM(4)),
            "go_backwards: expected True of one of layer and backward_layer and False of the other, got False and False",
        ),
        (
            lambda: nl.Bidirectional(nl.LSTM(4), backward_layer=nl.LSTM(4, go_backwards=True, stateful=True)),
            "stateful: expected the same of both layers, got False forward, True backward",
        ),
        (
            lambda: nl.Bidirectional(nl.LSTM(4), "sum", backward_layer=nl.LSTM(5, go_backwards=True)),
            "merge_mode: 'sum' takes layers of equal units, got 4 and 5",
        ),
        (
            lambda: nl.Bidirectional(nl.LSTM(4, return_cell_sequence=True)),
            "has return_cell_sequence, which Bidirectional does not give",
        ),
        (lambda: nl.Bidirectional(nl.LSTM(4), merge="sum"), "unknown option 'merge': did you mean"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_built_layer_is_refused(x):
    layer = nl.LSTM(4)
    layer(x)
    with pytest.raises(ValueError, match=r"is built already.*expected a layer without weights"):
        nl.Bidirectional(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x: layer(x[:, 0]), r"rank 3, \(batch, time, features\).*use x\[:, :, None\]"),
        (lambda layer, x: layer(x[..., :2]), "expected inputs with 5 features"),
        (lambda layer, x: layer(x[:0]), "at least one row"),
        (lambda layer, x: layer([x, x]), "takes one input, got 2"),
        (lambda layer, x: layer(x, mask=np.ones((3, 6), bool)), r"mask: expected shape \(batch, time\)"),
        (lambda layer, x: layer(x, lengths=[1, 2, 8]), "lengths: expected values from 0 to 7.*got 8"),
        (lambda layer, x: layer(x, initial_state=[np.zeros((3, 9))] * 4), "initial_state h: expected shape"),
        (lambda layer, x: layer(x, initial=None), "its call knows no 'initial'"),
    ],
)
def test_bad_calls(x, call, message):
    layer, _ = made(x)
    with pytest.raises(ValueError, match=message):
        call(layer, x)
