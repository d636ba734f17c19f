"""Keras side by side, for whoever has it (`make test-peers`): a hundred models drawn at random are read from both of its
formats and compute the same; written again, Keras reads them with the same bits."""

from __future__ import annotations

import os

import numpy as np
import pytest

import numlstm as nl

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # Keras' own, of which there are many
os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
L = keras.layers


def recurrent(pick, draw, sequences: bool):
    """A recurrent layer, or two directions of it."""
    kind = pick(L.LSTM, L.GRU, L.SimpleRNN)
    options = {
        "return_sequences": sequences,
        "use_bias": pick(True, True, False),
        "activation": pick("tanh", "tanh", "relu", "softsign", "elu"),
        "go_backwards": pick(False, False, True)
        and not sequences,  # a reversed mask would go on in a Sequential
        "dropout": pick(0.0, 0.2),
        "recurrent_dropout": pick(0.0, 0.1),
        "kernel_regularizer": pick(None, "l2"),
        "bias_initializer": "glorot_uniform",
        "zero_output_for_mask": pick(False, True),
    }
    if kind is not L.SimpleRNN:
        options["recurrent_activation"] = pick("sigmoid", "hard_sigmoid")
    if kind is L.GRU:
        options["reset_after"] = pick(True, False)
    layer = kind(int(draw.integers(2, 7)), **options)
    if pick(True, False) and not options["go_backwards"]:
        return L.Bidirectional(layer, merge_mode=pick("concat", "sum", "mul", "ave"))
    return layer


def beginning(pick, draw):
    """The first layers, and an input for them, in which steps are masked if they make masks."""
    batch, time = pick(1, 3), pick(4, 7)
    lengths = draw.integers(1, time + 1, batch)
    valid = np.arange(time) < lengths[:, None]
    if pick(True, False):
        ids = np.where(valid, draw.integers(1, 9, (batch, time)), 0)
        return keras.Input((None,)), [L.Embedding(9, 5, mask_zero=pick(True, False))], ids
    features = int(draw.integers(1, 5))
    x = (draw.standard_normal((batch, time, features)) * valid[..., None]).astype(np.float32)
    return keras.Input((pick(None, time), features)), pick([], [L.Masking()]), x


def random_sequential(seed: int):
    draw = np.random.default_rng(seed)
    pick = lambda *choices: choices[draw.integers(len(choices))]
    start, layers, x = beginning(pick, draw)
    for _ in range(pick(0, 1, 2)):
        layers.append(recurrent(pick, draw, True))
        if pick(True, False):
            layers.append(L.LayerNormalization(scale=pick(True, False), gamma_initializer="uniform"))
        if pick(True, False):
            layers.append(L.TimeDistributed(L.Dense(4, activation="relu")))
    layers.append(pick(recurrent(pick, draw, False), L.GlobalAveragePooling1D(), L.GlobalMaxPooling1D()))
    if pick(True, False):
        layers += [L.RepeatVector(2), L.SpatialDropout1D(0.1), L.Flatten()]
    layers.append(L.Dense(int(draw.integers(1, 5)), activation=pick(None, "gelu", "leaky_relu", "softplus")))
    layers.append(pick(L.Dropout(0.2), L.LeakyReLU(0.3), L.ReLU(), L.Activation("softmax"), L.ELU(0.5)))
    return keras.Sequential([start, *layers]), x


def random_functional(seed: int):
    draw = np.random.default_rng(seed)
    pick = lambda *choices: choices[draw.integers(len(choices))]
    start, layers, x = beginning(pick, draw)
    y = start
    for layer in layers:
        y = layer(y)
    y = L.Dense(6)(y)
    a, b = L.LSTM(6, return_sequences=True)(y), L.GRU(6, return_sequences=True)(y)
    y = pick(L.Add, L.Multiply, L.Average, L.Maximum)()([a, b]) if pick(True, False) else a * 0.5 + b
    several = pick(True, False)
    if several:
        attended = L.MultiHeadAttention(2, 3, value_dim=pick(None, 4))(
            y, y, use_causal_mask=pick(False, True)
        )
    elif pick(True, False):
        attended = L.Attention(use_scale=pick(False, True), score_mode=pick("dot", "concat"))([y, a])
    else:
        attended = L.AdditiveAttention()([y, a])
    # by layers, which keep masks: at a masked query MultiHeadAttention gives other values there than here
    y = pick(L.Concatenate(), L.Add())([y, attended])
    shared = L.Dense(4, activation="tanh")
    inner = keras.Sequential([keras.Input((None, y.shape[-1])), shared, L.LayerNormalization()])
    y = inner(y) if pick(True, False) else shared(y)
    outputs, *states = L.LSTM(4, return_state=True, return_sequences=pick(False, True))(y)
    # Keras shows a layer that is given states no mask, so that it would see such values
    second = L.GRU(4)(y, initial_state=states[0]) if pick(True, False) and not several else states[1]
    if len(outputs.shape) == 3:
        outputs = pick(lambda: outputs[:, -1], lambda: L.GlobalAveragePooling1D()(outputs))()
    results = pick([outputs, second], L.Concatenate()([outputs, second]))
    return keras.Model(start, results), x


def random_model(seed: int):
    keras.utils.set_random_seed(seed)
    model, x = (random_sequential if seed % 2 else random_functional)(seed)
    for w in model.weights:  # also what starts at zero or one
        w.assign(w + 0.1 * np.random.default_rng(seed).standard_normal(w.shape).astype(np.float32))
    return model, x


def arrays(outputs) -> list[np.ndarray]:
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [np.asarray(y.detach() if hasattr(y, "detach") else y.numpy()) for y in outputs]


def agree(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert float(np.abs(a - b).max()) <= 1e-5 * max(1.0, float(np.abs(b).max()))


@pytest.mark.parametrize("seed", range(100))
def test_a_random_model_is_read_and_written(seed, tmp_path):
    model, x = random_model(seed)
    expected = arrays(model(x))
    for ending in ("keras", "h5"):
        model.save(tmp_path / f"theirs.{ending}")
        ours = nl.io.load_keras(tmp_path / f"theirs.{ending}")
        agree(arrays(ours(x)), expected)
        nl.io.save_keras(ours, tmp_path / f"ours.{ending}")
        again = keras.saving.load_model(tmp_path / f"ours.{ending}", compile=False)
        agree(arrays(again(x)), expected)
        for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
            assert a.tobytes() == b.tobytes()
    ours.save(tmp_path / "m.safetensors")
    for a, b in zip(arrays(nl.load(tmp_path / "m.safetensors")(x)), arrays(ours(x)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_masks_and_states_as_inputs(tmp_path):
    x, m, h = keras.Input((6, 3)), keras.Input((6,), dtype="bool"), keras.Input((4,))
    y = L.GRU(4, return_sequences=True)(x, mask=m, initial_state=h)
    inner = keras.Model(a := keras.Input((4,)), L.Dense(2)(a))
    model = keras.Model([x, m, h], {"all": y, "last": inner(y[:, -1, :])})
    draw = np.random.default_rng(0)
    given = [
        draw.standard_normal((2, 6, 3)),
        np.array([6 * [True], 3 * [True] + 3 * [False]]),
        np.ones((2, 4)),
    ]
    given = [given[0].astype("float32"), given[1], given[2].astype("float32")]
    expected = model(given)
    for ending in ("keras", "h5"):
        model.save(tmp_path / f"m.{ending}")
        ours = nl.io.load_keras(tmp_path / f"m.{ending}")
        found = ours(given)
        nl.io.save_keras(ours, tmp_path / f"o.{ending}")
        again = keras.saving.load_model(tmp_path / f"o.{ending}", compile=False)(given)
        for name in expected:
            agree([found[name].numpy()], arrays(expected[name]))
            agree(arrays(again[name]), arrays(expected[name]))


def test_frozen_and_stateful_layers(tmp_path):
    model = keras.Sequential([keras.Input((5, 3), batch_size=2), L.LSTM(4, stateful=True), L.Dense(2)])
    model.layers[0].trainable = False
    frozen = keras.Sequential([L.Dense(3, trainable=False), L.Dense(3)])
    model.add(frozen)
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    model.build((2, 5, 3))
    for ending in ("keras", "h5"):
        model.save(tmp_path / f"m.{ending}")
        ours = nl.io.load_keras(tmp_path / f"m.{ending}")
        assert [layer.trainable for layer in ours.layers[1:]] == [False, True, True]
        model.layers[0].reset_states()
        for _ in range(2):  # the second call goes on from the states of the first
            agree(arrays(ours(x)), arrays(model(x)))


def test_a_model_of_ours_in_keras(tmp_path):
    model = nl.Sequential(
        [
            nl.Embedding(9, 4, mask_zero=True, input_shape=(None,)),
            nl.Bidirectional(nl.LSTM(3, split_bias=True, return_sequences=True), "ave"),
            nl.GRU(3, reset_after=False, split_bias=True, bias_initializer="glorot_uniform"),
            nl.Dense(2, kernel_constraint="max_norm", kernel_regularizer="l1_l2"),
            nl.Activation("elu(alpha=0.5)"),
        ]
    )
    draw = np.random.default_rng(0)
    model.set_weights([draw.standard_normal(w.shape) * 0.5 for w in model.get_weights()])
    ids = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    for ending in ("keras", "h5"):
        nl.io.save_keras(model, tmp_path / f"m.{ending}")
        theirs = keras.saving.load_model(tmp_path / f"m.{ending}", compile=False)
        agree(arrays(model(ids)), arrays(theirs(ids)))


def test_what_keras_has_and_we_have_not(tmp_path):
    cases = [
        (L.Conv2D(2, 1), (4, 4, 2), "Conv2D is not known here"),
        (
            L.LSTM(3, dtype="mixed_float16"),
            (4, 2),
            "'dtype': expected float32 or float64, got 'mixed_float16'",
        ),
        (L.Lambda(lambda x: x), (4, 2), "Lambda is not known here"),
        (L.Dense(3, activation="glu"), (4, 2), "unknown activation 'glu'"),
        (L.LayerNormalization(axis=1), (4, 2), "axis"),
    ]
    for layer, shape, message in cases:
        keras.Sequential([keras.Input(shape), layer]).save(tmp_path / "m.keras")
        with pytest.raises(ValueError, match=message):
            nl.io.load_keras(tmp_path / "m.keras")
    x = keras.Input((4, 2))
    keras.Model(x, keras.ops.cumsum(x, axis=1)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="operation Cumsum is not known here"):
        nl.io.load_keras(tmp_path / "m.keras")


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
@pytest.mark.parametrize(("strides", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_convolutions(tmp_path, padding, strides, dilation, groups):
    x = np.random.default_rng(0).standard_normal((2, 9, 6)).astype(np.float32)
    convolution = L.Conv1D(
        4,
        3,
        strides,
        padding,
        dilation_rate=dilation,
        groups=groups,
        activation="relu",
        bias_initializer="normal",
    )
    theirs = keras.Sequential([keras.Input((9, 6)), L.Masking(), convolution, L.LSTM(3)])
    theirs.save(tmp_path / "m.keras")
    ours = nl.io.load_keras(tmp_path / "m.keras")
    np.testing.assert_allclose(ours.predict(x, verbose=0), theirs.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    nl.io.save_keras(ours, tmp_path / "n.keras")
    again = keras.saving.load_model(tmp_path / "n.keras")
    for a, b in zip(again.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
