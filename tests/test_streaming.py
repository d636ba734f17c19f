"""A stream gives, step by step, what predict gives for the sequence so far."""

import numpy as np
import pytest

import numlstm as nl

B, T, I = 3, 8, 4
X = np.random.default_rng(0).standard_normal((B, T, I)).astype(np.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def models():
    nl.set_seed(0)
    start = {"input_shape": (None, I)}
    yield "one", nl.Sequential([nl.LSTM(5, **start), nl.Dense(2)])
    yield "deep", nl.Sequential([nl.LSTM(5, return_sequences=True, **start), nl.GRU(4), nl.Dense(2, "tanh")])
    yield (
        "sequences",
        nl.Sequential([nl.SimpleRNN(5, return_sequences=True, **start), nl.Dense(2, "softmax")]),
    )
    yield "layers by step", nl.Sequential([
        nl.Input((None, I)), nl.LayerNormalization(), nl.TimeDistributed(nl.Dense(3)), nl.Dropout(0.5),
        nl.LSTM(5, return_sequences=True), nl.Activation("relu"), nl.LSTM(4, return_sequences=True),
    ])  # fmt: skip
    yield (
        "masking",
        nl.Sequential(
            [nl.Masking(0.0, input_shape=(None, I)), nl.LSTM(5, return_sequences=True), nl.LSTM(3)]
        ),
    )
    zeroed = nl.LSTM(5, return_sequences=True, zero_output_for_mask=True)
    yield "masked outputs", nl.Sequential([nl.Masking(0.0, input_shape=(None, I)), zeroed, nl.Dense(2)])
    yield (
        "nested",
        nl.Sequential([nl.Sequential([nl.LSTM(5, return_sequences=True)]), nl.LSTM(4), nl.Dense(1)], **start),
    )
    yield (
        "after",
        nl.Sequential(
            [nl.LSTM(6, **start), nl.Reshape((2, 3)), nl.Flatten(), nl.RepeatVector(2), nl.LSTM(3)]
        ),
    )


MODELS = [pytest.param(model, id=name) for name, model in models()]


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_equals_predict_at_every_step(model):
    x = X.copy()
    if isinstance(model.layers[0], nl.Masking):
        x[0, 2:4] = x[1, 0] = x[2, -1] = 0
    stream = model.stream(batch_size=B)
    for t in range(T):
        y = stream.step(x[:, t])
        so_far = model.predict(x[:, : t + 1], verbose=0)
        close(y, so_far[:, -1] if y.ndim < so_far.ndim else so_far)


def test_ids():
    model = nl.Sequential(
        [nl.Embedding(9, 4, mask_zero=True), nl.LSTM(5, return_sequences=True), nl.Dense(9)]
    )
    ids = np.array([[1, 0, 3, 8], [2, 2, 0, 1]])
    whole = model(ids).numpy()
    stream = model.stream(batch_size=2)
    close(np.stack([stream.step(ids[:, t]) for t in range(4)], 1), whole)
    single = model.stream()
    close(np.stack([single.step(i) for i in ids[0]], 1), whole[:1])


def test_reset_of_all_and_of_some_rows():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I))])
    stream = model.stream(batch_size=B)
    first = stream.step(X[:, 0])
    second = stream.step(X[:, 1])
    stream.reset()
    close(stream.step(X[:, 0]), first)
    stream.reset(rows=[1])
    mixed = stream.step(X[:, 1])
    close(mixed[[0, 2]], second[[0, 2]])
    close(mixed[1], model(X[1:2, 1:2])[0])
    with pytest.raises(ValueError, match="rows: expected numbers of the 3 rows"):
        stream.reset(rows=[3])


def test_streams_do_not_disturb_each_other_or_the_model():
    model = nl.Sequential([nl.LSTM(5, stateful=True, input_shape=(None, I))])
    a, b = model.stream(B), model.stream(B)
    a.step(X[:, 0])
    close(b.step(X[:, 1]), model(X[:, 1:2]))
    kept = [s.copy() for s in model.layers[0].states]
    a.step(X[:, 2])
    assert all(np.array_equal(s, k) for s, k in zip(model.layers[0].states, kept, strict=True))


def test_states_can_be_put_aside():
    model = nl.Sequential([nl.LSTM(5, return_sequences=True, input_shape=(None, I)), nl.GRU(3)])
    stream = model.stream(B)
    stream.step(X[:, 0])
    states = stream.states
    after = stream.step(X[:, 1])
    assert [len(group) for group in states] == [2, 1]
    other = model.stream(B)
    other.set_states(states)
    assert np.array_equal(other.step(X[:, 1]), after)
    with pytest.raises(ValueError, match="states: expected what"):
        model.stream(1).set_states(states)


def test_one_row_may_come_without_its_batch_axis():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I))])
    assert np.array_equal(model.stream().step(X[0, 0]), model.stream().step(X[:1, 0]))


def test_the_result_is_the_callers():
    stream = nl.Sequential([nl.LSTM(5, input_shape=(None, I))]).stream(B)
    y = stream.step(X[:, 0])
    after = [s.copy() for s in stream.states[0]]
    y[...] = 99
    assert all(np.array_equal(a, b) for a, b in zip(stream.states[0], after, strict=True))


class _Smooth(nl.Layer):
    def call(self, x):
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


class Own(nl.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Own().stream(), "only a Sequential can be streamed"),
        (lambda: nl.Sequential([nl.LSTM(3)]).stream(), "is not built"),
        (
            lambda: nl.Sequential([nl.LSTM(3, go_backwards=True)], input_shape=(None, I)).stream(),
            "go_backwards",
        ),
        (
            lambda: nl.Sequential(
                [nl.LSTM(3, return_sequences=True), nl.Flatten()], input_shape=(6, I)
            ).stream(),
            "a Flatten can't be streamed",
        ),
        (lambda: nl.Sequential([_Smooth(), nl.LSTM(3)], input_shape=(6, I)).stream(), "per_step = True"),
        (lambda: nl.Sequential([nl.LSTM(3)], input_shape=(6, I)).stream(0), "batch_size: expected"),
        (
            lambda: nl.Sequential([nl.LSTM(3)], input_shape=(6, I)).stream(2).step(X[:, 0]),
            r"shape \(2, features\)",
        ),
        (lambda: nl.Sequential([nl.LSTM(3)], input_shape=(6, I)).stream(3).step(X), "expected one time step"),
        (lambda: nl.Sequential([nl.LSTM(3)], input_shape=(6, I)).stream(3).step(X[:, 0, :2]), "4 features"),
    ],
)
def test_what_can_not_be_streamed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
