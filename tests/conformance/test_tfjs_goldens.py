"""The numbers in TensorFlow.js' own tests of its recurrent layers, training included, from ours.

The numbers and the questions they answer are facts taken from tensorflow/tfjs, tfjs-layers/src/layers/
recurrent_test.ts and wrappers_test.ts; each test names those it stands for. Most were recorded there from Keras 1
and TensorFlow 1.5. Ours must agree to 1e-5, on every backend and in single as in double precision.

What TensorFlow.js has as its defaults and Keras 3 has not is said here in so many words: gates pass
through clip(0.2 x + 0.5, 0, 1), Keras 3's hard sigmoid being clip(x / 6 + 0.5, 0, 1), and a GRU's reset gate comes
before the recurrent product. Its GRU keeps the gates in the order z r h, ours is r z n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import numlstm as nl

GATE = "hard_sigmoid(alpha=0.2, beta=0.5)"
ONES = {"kernel_initializer": "ones", "recurrent_initializer": "ones"}
ZEROS = {"kernel_initializer": "zeros", "recurrent_initializer": "zeros"}
IDS = np.array([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0]])


@pytest.fixture(
    params=[("cpu", "float32"), ("reference", "float32"), ("reference", "float64")],
    ids="-".join,
    autouse=True,
)
def js(request):
    """TensorFlow.js' layers, in a float type, on a backend."""
    backend, dtype = request.param
    with nl.use_backend(backend):
        yield Layers(dtype)


class Layers:
    """numlstm's layers under TensorFlow.js' defaults."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def lstm(self, units: int, **options: Any) -> nl.LSTM:
        return nl.LSTM(units, recurrent_activation=GATE, dtype=self.dtype, **options)

    def gru(self, units: int, **options: Any) -> nl.GRU:
        return nl.GRU(units, recurrent_activation=GATE, reset_after=False, dtype=self.dtype, **options)

    def rnn(self, units: int, **options: Any) -> nl.SimpleRNN:
        return nl.SimpleRNN(units, dtype=self.dtype, **options)

    def dense(self, units: int, kernel: str = "ones", **options: Any) -> nl.Dense:
        return nl.Dense(units, kernel_initializer=kernel, dtype=self.dtype, **options)

    def embedding(self, ids: int, size: int) -> nl.Embedding:
        return nl.Embedding(ids, size, mask_zero=True, embeddings_initializer="ones", dtype=self.dtype)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def agree(ours: Any, theirs: Any, units: int | None = None, atol: float = 1e-6) -> None:
    """Within 1e-5. `units`: theirs lack the last axis, along which all numbers are equal."""
    wanted = np.asarray(theirs, np.float64)
    if units is not None:
        wanted = np.repeat(wanted[..., None], units, axis=-1)
    found = np.asarray(ours)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


def compiled(*layers: nl.layers.Layer, optimizer: Any = "sgd") -> nl.Sequential:
    model = nl.Sequential(list(layers))
    model.compile(loss="meanSquaredError", optimizer=optimizer)
    return model


def predict(model: nl.Sequential, x: np.ndarray) -> np.ndarray:
    return model.predict(x, verbose=0)


def losses(model: nl.Sequential, x: Any, y: Any, **options: Any) -> list[float]:
    return model.fit(x, np.asarray(y, np.float32), verbose=0, **options).history["loss"]


# SimpleRNN Tensor


@pytest.mark.parametrize("activation, answer", [("linear", 3.0), ("tanh", np.tanh(3.0))])
def test_one_step_of_a_simple_rnn(js, activation, answer):
    """returnSequences=false, returnState=false, useBias=true."""
    layer = js.rnn(5, activation=activation, bias_initializer="ones", **ONES)
    agree(layer(ones(4, 1, 2)), [answer] * 4, 5)


def test_two_steps_of_a_simple_rnn(js):
    """returnSequences=true, useBias=true, linear."""
    layer = js.rnn(
        5, activation="linear", bias_initializer="ones", return_sequences=True, return_state=True, **ONES
    )
    outputs, state = layer(ones(4, 2, 2))
    agree(outputs, [[3.0, 18.0]] * 4, 5)
    agree(state, [18.0] * 4, 5)


STATEFUL = [  # the layer's kind, its options, the answers to twice the same question
    ("rnn", {"activation": "linear", **ONES}, (62.0, 7812.0)),
    ("gru", {"activation": "linear", "kernel_initializer": "ones", "recurrent_initializer": "zeros"},
     (0.542, 0.9371182)),
    ("lstm", {"bias_initializer": "ones", **ONES}, (0.995, 0.99998766)),
]  # fmt: skip


@pytest.mark.parametrize("kind, options, answers", STATEFUL, ids=[s[0] for s in STATEFUL])
def test_stateful_forward(js, kind, options, answers):
    """stateful forward, stateful forward: only RNN layer."""
    model = nl.Sequential([getattr(js, kind)(5, stateful=True, **options)])
    for _ in range(2):
        for answer in answers:
            agree(predict(model, ones(4, 3, 2)), [answer] * 4, 5)
        model.reset_states()


def test_a_stateful_layer_goes_on_from_prediction_to_training(js):
    """stateful forward: RNN and dense layers."""
    model = compiled(js.rnn(5, activation="linear", stateful=True, **ONES), js.dense(1))
    for _ in range(2):
        model.reset_states()
        for answer in (310.0, 39060.0):
            agree(predict(model, ones(4, 3, 2)), [answer] * 4, 1)
    agree(losses(model, ones(4, 3, 2), ones(4, 1), epochs=1, batch_size=4), [23841822736384.0])


# stateful BPTT. The Python programs in the tests' comments, from which the numbers come, have zeros for the second
# batch of the first two; the tests ask with ones, and 2 digits.
STATEFUL_TRAINING = [
    ("rnn", ONES, "zeros", [-1, -2, 0, 1, 1, 2, 0, -1], 0.0, 1.5262475),
    ("gru", ONES, "zeros", [-1, -2, 0, 1, 1, 2, 0, -1], 0.0, 1.501),
    ("lstm", {"bias_initializer": "ones", **ONES}, "ones", [1, 2, 3, 4, 5, 6, 7, 8], 1.0, 5.8377),
]


@pytest.mark.parametrize(
    "kind, options, kernel, y, second, answer", STATEFUL_TRAINING, ids=[s[0] for s in STATEFUL_TRAINING]
)
def test_stateful_training(js, kind, options, kernel, y, second, answer):
    """stateful BPTT: the loss of two batches, of which the second goes on from the first's states and weights."""
    model = compiled(
        getattr(js, kind)(5, stateful=True, **options), js.dense(1, kernel=kernel, use_bias=False)
    )
    x = np.concatenate([ones(4, 3, 2), second * ones(4, 3, 2)])
    agree(losses(model, x, np.array(y)[:, None], batch_size=4, shuffle=False), [answer])


TRAINING = [  # kind, initializers, learning rate, target, the weights after two epochs
    ("rnn", ONES, 5.0, 0.0, [0.8484658], [0.8484799], 80.967026),
    ("gru", ZEROS, 1.0, 1.0, [0.0, -0.03750037, 1.7500007], [0.0, -1.562513e-02, 2.086183e-07], 1.2187521),
    ("lstm", ZEROS, 1.0, 1.0, [0.11455188, 0.06545822, 0.8760446, 0.18237013],
     [0.02831176, 0.01934617, 0.00025817, 0.05784169], 1.4559253),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, options, rate, target, kernel, recurrent, head", TRAINING, ids=[t[0] for t in TRAINING]
)
def test_training(js, kind, options, rate, target, kernel, recurrent, head):
    """BPTT: the weights after two epochs of gradient descent (the GRU's in our order of gates)."""
    model = compiled(
        getattr(js, kind)(1, use_bias=False, input_shape=(3, 4), **options),
        js.dense(1, use_bias=False),
        optimizer=nl.optimizers.SGD(rate),
    )
    losses(model, ones(5, 3, 4), np.full((5, 1), target), epochs=2)
    found = model.get_weights()
    # what the numbers show of 0.00025817, and of the GRU's 2e-7, is 1e-8
    for weight, wanted in zip(found, ([kernel] * 4, [recurrent], [[head]]), strict=True):
        agree(weight, wanted, atol=1e-7)


# GRU Tensor


def test_gru_step_by_step(js):
    """implementation=1 and 2, returnSequences, returnState."""
    layer = js.gru(5, bias_initializer="ones", return_sequences=True, return_state=True, **ONES)
    outputs, state = layer(np.zeros((4, 3, 2), np.float32))
    agree(outputs, [[0.22847827, 0.2813754, 0.29444352]] * 4, 5)
    agree(state, [0.29444352] * 4, 5)


def test_gru_from_the_output_of_a_dense_layer(js):
    """SymbolicTensor as initialState thru kwargs; Save & Load."""
    start = js.dense(2)(np.array([[0.1, 0.2, 0.3, 0.4, 0.5]], np.float32))
    agree(start, [[1.5, 1.5]])
    x = np.array([[[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, -0.3, -0.4], [0.3, 0.4, 0.5, 0.6]]], np.float32)
    agree(js.gru(2, **ONES)(x, initial_state=start), [[1.4435408, 1.4435408]])


# LSTM Tensor


def test_lstm_step_by_step(js):
    """implementation=1 and 2, returnSequences, returnState."""
    layer = js.lstm(5, bias_initializer="ones", return_sequences=True, return_state=True, **ONES)
    outputs, h, c = layer(ones(4, 2, 2))
    agree(outputs, [[0.7595095, 0.96367633]] * 4, 5)
    agree(h, [0.96367633] * 4, 5)
    agree(c, [1.99505234] * 4, 5)


@pytest.mark.parametrize("nested", [False, True])
def test_lstm_with_a_mask(js, nested):
    """With mask; With mask and a nested model."""
    layers = [js.embedding(10, 4), js.lstm(3, **ONES)]
    inside = [nl.Reshape((6,)), nl.Sequential(layers)] if nested else layers
    model = nl.Sequential([*inside, js.dense(1)])
    agree(predict(model, IDS), [[0.0], [2.283937], [2.891939], [2.9851441]])


def test_lstm_with_a_mask_backwards(js):
    """With mask, goBackwards = true."""
    embedding, lstm = js.embedding(4, 2), js.lstm(2, go_backwards=True)
    model = nl.Sequential([embedding, lstm, js.dense(1)])
    model.build((None, 3))
    embedding.set_weights([np.array([[0.1, 0.2], [0.3, 0.4], [-0.1, -0.2], [-0.3, -0.4]])])
    upward = np.arange(1.0, 9.0)
    lstm.set_weights([np.stack([upward, -upward]), np.stack([upward, -upward]), upward])
    agree(predict(model, IDS[:, :3]), [[0.0], [1.2876499], [1.8165315], [1.9599037]])


def test_lstm_training_with_a_mask(js):
    """BPTT with mask: correctness and no leak. The losses are the third and the fourth epoch's."""
    model = compiled(js.embedding(10, 4), js.lstm(3, **ONES), js.dense(1))
    y = [[1], [2], [3], [4]]
    losses(model, IDS, y, epochs=2, batch_size=4)
    agree(losses(model, IDS, y, epochs=2, batch_size=4), [0.503677, 0.492173])


def test_lstm_states_with_a_mask(js):
    """With mask, returnStates = true."""
    output, h, c = js.lstm(3, return_state=True, **ONES)(js.embedding(10, 4)(IDS))
    for found in (output, h):
        agree(found, [0.0, 0.76131237, 0.9639796, 0.99504817], 3)
    agree(c, [0.0, 0.9993292, 1.9993222, 2.9993203], 3)


def test_lstm_sequences_with_a_mask(js):
    """With mask, returnSequences = true."""
    model = nl.Sequential([js.embedding(10, 4), js.lstm(3, return_sequences=True, **ONES), js.dense(1)])
    one, two, three = 2.283937, 2.8919387, 2.9851446
    agree(predict(model, IDS[:, :3]), [[0.0] * 3, [one] * 3, [one, two, two], [one, two, three]], 1)


def test_stacked_layers_with_a_mask(js):
    """Stacked RNNs with masking: correctness and no leak."""
    model = nl.Sequential([js.embedding(10, 4), js.rnn(3, return_sequences=True, **ONES), js.lstm(3, **ONES)])
    agree(predict(model, IDS[:, :3]), [0.0, 0.75950104, 0.96367145, 0.9950049], 3)


def test_three_kinds_of_cells_on_top_of_each_other(js):
    """StackedRNNCells Tensor: Forward pass."""
    first = np.array([[0.1, -0.1, 0.2, -0.2], [-0.1, 0.1, -0.2, 0.2], [0.1, 0.1, -0.2, -0.2]], np.float32)
    plain = {"use_bias": False, **ONES}
    model = nl.Sequential(
        [
            js.rnn(3, return_sequences=True, **plain),
            js.gru(2, return_sequences=True, **plain),
            js.lstm(1, **plain),
        ]
    )
    agree(predict(model, np.stack([first, first / 2])), [[-0.07715216], [-0.05906887]])


# wrappers_test.ts: TimeDistributed


def test_time_distributed(js):
    """3D input: Dense; LayersModel as constituent layer."""
    upward = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    layer = nl.TimeDistributed(js.dense(1, use_bias=False), dtype=js.dtype)
    agree(layer(np.stack([upward, -upward])), [[3.0, 7.0, 11.0, 15.0], [-3.0, -7.0, -11.0, -15.0]], 1)
    inside = nl.Sequential([js.dense(3, activation="softmax")])
    agree(nl.TimeDistributed(inside, dtype=js.dtype)(ones(1, 2, 5)), [[0.33333334] * 2], 3)


def test_time_distributed_behind_masks(js):
    """With masking: two masked LSTMs, their products, and both through one Dense layer."""

    class Products(nl.Model):
        def __init__(self) -> None:
            super().__init__()
            options = {"return_sequences": True, **ONES}
            self.left = nl.Sequential([js.embedding(10, 3), js.lstm(3, **options)])
            self.right = nl.Sequential([js.embedding(10, 3), js.lstm(3, **options)])
            self.together = nl.Concatenate()
            self.head = nl.TimeDistributed(js.dense(1), dtype=js.dtype)

        def call(self, inputs):
            left, right = self.left(inputs[:, 0]), self.right(inputs[:, 1])
            products = nl.ops.matmul(left, nl.ops.transpose(right, (0, 2, 1)))
            return self.head(self.together([left, products]))

    one, two, three = 10.7489796, 13.6384077, 14.0818386
    pairs = np.stack([IDS[:, :4], np.ones((4, 4), int)], axis=1)
    agree(
        predict(Products(), pairs), [[0.0] * 4, [one] * 4, [one, two, two, two], [one, two, three, three]], 1
    )


# wrappers_test.ts: Bidirectional

WAVES = np.repeat(np.array([0.05, -0.05, 0.1, -0.1], np.float32), 2).reshape(1, 4, 2)
FORWARD, BACKWARD = [[0.9440416] * 3], [[-0.9842659] * 3]


@pytest.mark.parametrize(
    "mode, answer",
    [
        (None, [FORWARD, BACKWARD]),
        ("concat", [FORWARD[0] + BACKWARD[0]]),
        ("mul", [[-0.929188] * 3]),
    ],
)
def test_merge_modes(js, mode, answer):
    """No returnState, mergeMode."""
    found = nl.Bidirectional(js.rnn(3, use_bias=False, **ONES), mode)(WAVES)
    agree(np.stack([np.asarray(y) for y in found]) if mode is None else found, answer)


def test_states_of_both_directions(js):
    """returnState, with mergeMode ave."""
    answers = [[[-0.02011216] * 3], FORWARD, BACKWARD]
    found = nl.Bidirectional(js.rnn(3, use_bias=False, return_state=True, **ONES), "ave")(WAVES)
    for output, answer in zip(found, answers, strict=True):
        agree(output, answer)


BOTH = [  # targets, prediction, loss, prediction afterwards
    ("concat", [[0.3, 0.5]], [[0.69299805, 0.66088]], 0.0901649, [[0.6927189, 0.66077083]]),
    ("ave", [[0.4]], [[0.676939]], 0.0766952, [[0.6767467]]),
]


@pytest.mark.parametrize("mode, y, before, loss, after", BOTH, ids=[b[0] for b in BOTH])
def test_training_in_both_directions(js, mode, y, before, loss, after):
    """Backwards LSTM: predict and fit."""
    x = np.array([[[0.1, 0.2], [-0.1, 0.1]]], np.float32)
    lstm = js.lstm(1, bias_initializer="ones", go_backwards=True, **ONES)
    model = compiled(nl.Bidirectional(lstm, mode))
    agree(predict(model, x), before)
    agree(losses(model, x, np.array(y)), [loss])
    agree(predict(model, x), after)


def test_both_directions_from_given_states(js):
    """Bidirectional with initial state: apply() with concrete tensors."""
    layer = nl.Bidirectional(js.gru(3, bias_initializer="ones", **ZEROS), None)
    forward, backward = layer(ones(1, 4, 2), initial_state=[-ones(1, 3), ones(1, 3)])
    agree(forward, [0.33863544], 3)
    agree(backward, [0.8188354], 3)


def test_a_state_too_few_is_refused(js):
    """Incorrect number of initial-state tensors leads to error."""
    layer = nl.Bidirectional(js.gru(3), None)
    with pytest.raises(ValueError, match=r"initial_state: expected 2 \(forward h, then backward h\), got 1"):
        layer(ones(1, 4, 2), initial_state=[ones(1, 3)])
