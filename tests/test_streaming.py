"""A stream gives, step by step, what predict gives for the sequence so far."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.backend import use_backend

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


NATIVE = {"one", "deep", "sequences", "layers by step", "masking", "nested"}


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, model in models()], ids=lambda v: str(v)[:20]
)
def test_what_runs_natively(name, model):
    lines = []
    rows = model.stream().explain(lines.append)
    assert [row["layer"] in line and row["runs"] in line for row, line in zip(rows, lines, strict=True)]
    native = {row["runs"] for row in rows} == {"native call 1"}
    assert native == (name in NATIVE)
    assert all(bool(row["why"]) == (row["runs"] == "by itself") for row in rows)
    on_numpy = _on_numpy(model)
    assert all(
        "'reference' has no stepping kernels" in row["why"] for row in on_numpy if row["layer"] in _able(rows)
    )


def _on_numpy(model):
    with use_backend("reference"):
        return model.stream().explain(lambda line: None)


def _able(rows):
    return {row["layer"] for row in rows if row["runs"] != "by itself"}


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_may_change_its_backend_midway(model):
    stream, same = model.stream(B), model.stream(B)
    for t in range(4):
        with use_backend("reference" if t in (1, 2) else "cpu"):
            y = stream.step(X[:, t])
        close(y, same.step(X[:, t]))


def test_wide_layers_equal_predict():
    model = nl.Sequential(
        [
            nl.LSTM(193, return_sequences=True, input_shape=(None, I)),
            nl.GRU(128, return_sequences=True),
            nl.GRU(40, reset_after=False),
            nl.Dense(70, "elu"),
            nl.Dense(9, "log_softmax"),
        ]
    )
    stream, x = model.stream(B), np.random.default_rng(1).standard_normal((B, 30, I)).astype(np.float32)
    for t in range(30):
        y = stream.step(x[:, t])
    np.testing.assert_allclose(y, model.predict(x, verbose=0), rtol=1e-6, atol=1e-6)


def trained(model):
    model.compile("sgd", "mse")
    model.train_on_batch(X, np.ones((B, 2), np.float32))


CHANGES = {
    "assign": lambda model: model.layers[0].bias.assign(np.ones(20)),
    "set_weights": lambda model: model.set_weights([w + 0.1 for w in model.get_weights()]),
    "training": trained,
    "writable": lambda model: model.layers[1].kernel.writable().fill(0.3),
    "data": lambda model: setattr(model.layers[1].kernel, "data", np.full((5, 2), 0.3, np.float32)),
    "cast": lambda model: model.cast("float64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change):
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I)), nl.Dense(2)])
    stream = model.stream(B)
    stream.step(X[:, 0])
    stale = stream.step(X[:, 1])
    states = stream.states
    CHANGES[change](model)
    before = model.stream(B)
    before.set_states(states)
    y = stream.step(X[:, 2])
    assert np.array_equal(y, before.step(X[:, 2])) and not np.array_equal(y, stale)
    _, h, c = _with_states(model.layers[0], X[:, 2:3], states[0])
    close(y, model.layers[1](h))
    close(stream.states[0][1], c)


def _with_states(layer, x, states):
    layer.return_state = True
    try:
        return layer(x, initial_state=list(states))
    finally:
        layer.return_state = False


def test_training_another_model_packs_nothing_anew():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I)), nl.Dense(2)])
    stream = model.stream(B)
    parts = stream._parts
    nl.Variable([1.0]).assign([2.0])
    stream.step(X[:, 0])
    assert stream._parts is parts
    model.layers[1].bias.assign([1.0, 2.0])
    stream.step(X[:, 0])
    assert stream._parts is not parts


def test_out():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I)), nl.Dense(2)])
    stream, other, out = model.stream(B), model.stream(B), np.empty((B, 2))
    assert stream.step(X[:, 0], out=out) is out
    close(out, other.step(X[:, 0]))
    first = stream.step(X[:, 1])
    kept = first.copy()
    stream.step(X[:, 2])
    assert np.array_equal(first, kept)  # the result is the caller's to keep
    for wrong in (np.empty((B, 3)), np.empty((B, 2), int), [[0.0, 0.0]] * B):
        with pytest.raises(ValueError, match=r"out: expected an array of floats of shape \(3, 2\), got"):
            stream.step(X[:, 3], out=wrong)
    other.step(X[:, 1]), other.step(X[:, 2])
    assert np.array_equal(stream.step(X[:, 3]), other.step(X[:, 3]))  # the states had not gone on


def test_inputs_of_other_dtypes():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, I))])
    x = np.arange(B * I).reshape(B, I) % 3
    expected = model.stream(B).step(x.astype(np.float32))
    for given in (x, x.astype(np.float64), x.tolist(), x.astype(np.float32)[:, ::-1][:, ::-1], nl.Tensor(x)):
        assert np.array_equal(model.stream(B).step(given), expected)
    with pytest.raises(ValueError, match="expected numbers"):
        model.stream(B).step(x.astype(complex))


def test_ids_that_the_table_has_not_got_change_nothing():
    model = nl.Sequential([nl.Embedding(9, 4), nl.LSTM(5)])
    model(np.array([[1]]))
    for batch, wrong in ((1, [9]), (1, [-1]), (2, [3, 9]), (1, [0.5])):
        stream = model.stream(batch)
        with pytest.raises(ValueError, match="expected ids"):
            stream.step(np.array(wrong))
        assert not stream.states[0][0].any()
    assert np.array_equal(model.stream().step(2.0), model.stream().step([2]))


class _PerStep(nl.Layer):
    per_step = True

    def call(self, x):
        return x * 2

    def compute_output_shape(self, input_shape):
        return input_shape


class _Ids(_PerStep):
    def call(self, x):
        return nl.Tensor((x.data[..., 0] > 0).astype(np.int64) * 9)

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]


def test_ids_in_the_middle_are_held_to_the_table():
    model = nl.Sequential([_Ids(), nl.Embedding(9, 4), nl.LSTM(5)], input_shape=(None, I))
    stream, low = model.stream(), -np.ones((1, I), np.float32)
    assert [row["runs"] for row in stream.explain(lambda line: None)] == ["by itself"] + ["native call 1"] * 2
    close(stream.step(low), model(low[:, None]))
    with pytest.raises(ValueError, match="expected ids from 0 to 8"):
        stream.step(-low)


def test_a_layer_of_ones_own_between_native_calls():
    model = nl.Sequential(
        [nl.LSTM(5, return_sequences=True), _PerStep(), nl.GRU(4, return_sequences=True), nl.Dense(2)],
        input_shape=(None, I),
    )
    stream = model.stream(B)
    runs = [row["runs"] for row in stream.explain(lambda line: None)]
    assert runs == ["native call 1", "by itself", "native call 2", "native call 2"]
    close(np.stack([stream.step(X[:, t]) for t in range(T)], 1), model(X))


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


def reduced(model, kind):
    """The model with int8 weights, or to be run in bfloat16."""
    if kind == "int8":
        return model.quantize("int8")
    model.compile(optimizer="sgd", loss="mse", precision="bfloat16")
    return model


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", sorted(NATIVE))
def test_reduced_precision_streams_natively_as_predict_does(name, kind):
    model, x = reduced(dict(models())[name], kind), X.copy()
    if name == "masking":
        x[0, 2:4] = x[1, 0] = x[2, -1] = 0
    stream = model.stream(batch_size=B)
    steps = [stream.step(x[:, t]) for t in range(T)]
    assert np.allclose(
        steps[-1], model.predict(x, verbose=0).reshape(B, -1, steps[-1].shape[-1])[:, -1], atol=1e-6
    )
    lines = []
    rows = stream.explain(lines.append)
    assert {row["runs"] for row in rows} == {"native call 1"} and not any(row["why"] for row in rows)
    with_products = [row for row in rows if row["type"] in ("LSTM", "GRU", "SimpleRNN", "Dense")]
    assert with_products and {row["products"] for row in with_products} == {kind}
    assert (
        sum(f"products in {kind}" in line for line in lines) == sum(r["products"] == kind for r in rows) < 9
    )


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_states_of_reduced_precision_may_be_written(kind):
    """Whoever writes them, the next step reads them."""
    model = reduced(
        nl.Sequential([nl.LSTM(37, return_sequences=True, input_shape=(None, I)), nl.GRU(5)]), kind
    )
    stream, other = model.stream(B), model.stream(B)
    first = [stream.step(X[:, t]) for t in range(3)]
    states = stream.states
    after = stream.step(X[:, 3])
    other.set_states(states)
    assert np.array_equal(other.step(X[:, 3]), after)
    stream.reset()
    assert np.array_equal(np.stack([stream.step(X[:, t]) for t in range(3)]), np.stack(first))
    model.layers[1].bias.assign(np.ones((2, 15)))  # packed anew, the states kept
    assert not np.allclose(stream.step(X[:, 3]), after)


def test_a_stream_follows_the_precision_asked_for():
    model = nl.Sequential([nl.LSTM(50, input_shape=(None, I))])
    stream = model.stream(B)
    whole = stream.step(X[:, 0])
    stream.reset()
    with use_backend("cpu", precision="bfloat16"):
        rounded = stream.step(X[:, 0])
    assert 1e-5 < np.abs(rounded - whole).max() < 1e-2
