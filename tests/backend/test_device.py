"""Whole models on a device: trained, evaluated and saved as on the host, with the data staged once.

The device is strict_arrays.py's: arrays that refuse what CuPy's refuse, kernels that are the reference's. So results must
be the reference backend's, and the counts say what crossed over.
"""

import copy
import importlib.util

import numpy as np
import pytest
from strict_arrays import _FUNCTIONS, _MAKERS, StrictArray, StrictBackend, failing_at, reset_counts

import numlstm as nl
from numlstm import callbacks, losses, metrics, optimizers
from numlstm.backend import adopt, backend_of, beside, get_backend, namespace, place_of, to_numpy
from numlstm.layers import GRU, LSTM, Bidirectional, Dense, Embedding, Masking

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 5, 3)).astype(np.float32)
Y = RNG.normal(size=(20, 2)).astype(np.float32)
CLASSES = RNG.integers(0, 4, 20)
WEIGHTS = RNG.random(20).astype(np.float32)
LENGTHS = RNG.integers(1, 6, 20)
STEPS = 3  # of a batch of 8


def small(*head, **options):
    """A model whose every run is the same."""
    nl.set_seed(1)
    layers = [LSTM(4, dropout=0.2, recurrent_dropout=0.2, input_shape=(None, 3), **options)]
    return nl.Sequential([*layers, *(head or (Dense(2),))])


def there(a):
    return get_backend("strict").asarray(a)


def equal_weights(a, b):
    for p, q in zip(a.get_weights(), b.get_weights(), strict=True):
        assert type(p) is np.ndarray
        np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-6)


def on_both(make, x=X, y=Y, compiled=None, **options):
    """The models and figures of a fit on the device and on the host."""
    found = []
    for backend in ("strict", "reference"):
        model = make()
        model.compile(
            **{"optimizer": "adam", "loss": "mse", **copy.deepcopy(compiled or {}), "backend": backend}
        )
        fitted = {"batch_size": 8, "epochs": 2, "verbose": 0} | options
        fitted = {k: v() if callable(v) and k == "callbacks" else v for k, v in fitted.items()}
        found.append((model, model.fit(x, y, **fitted).history))
    (a, first), (b, second) = found
    equal_weights(a, b)
    assert list(first) == list(second)
    for name in first:
        assert all(type(v) in (float, list) for v in first[name])
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, atol=1e-7, err_msg=name)
    return a, b


# The device itself


def test_the_strict_device_refuses_what_cupy_refuses(counts):
    a = there(np.ones((2, 3), np.float32))
    for act in (
        lambda: np.asarray(a), lambda: a + np.ones(3), lambda: np.ones(3) * a, lambda: np.add.reduce(a),
        lambda: np.matmul(a, a.T), lambda: a[np.array([0, 1])], lambda: np.concatenate([a, np.ones((1, 3))]),
        lambda: np.vander(a[0]), lambda: a.flags.writeable, lambda: a.__setitem__(0, np.ones(3)),
    ):  # fmt: skip
        with pytest.raises((TypeError, AttributeError)):
            act()
    assert type(np.exp(a)) is type(2 * a) is type(np.float32(2) * a) is type(np.sum(a, axis=0)) is StrictArray
    assert (a * np.float32(2)).dtype == np.float32 and (a @ a.T).shape == (2, 2)
    reset_counts()
    assert float(a.sum()) == 6 and counts.scalars == 1 and counts.outs == 0


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.filterwarnings("ignore")
def test_cupy_has_every_function_that_the_strict_device_has():
    import cupy

    assert [n for n in (*_FUNCTIONS, *_MAKERS) if not hasattr(cupy, n)] == []
    methods = [n for n in vars(StrictArray) if not n.startswith("_") and n != "place"]
    assert [n for n in methods if not hasattr(cupy.ndarray, n)] == []
    assert cupy.ndarray.__array_priority__ == StrictArray.__array_priority__
    assert hasattr(cupy.add, "at") and not hasattr(cupy._core.flags.Flags, "writeable")


def test_where_arrays_lie(counts):
    a = there(np.arange(3))
    assert place_of(a) == "strict:0" and place_of(np.ones(1)) is place_of([1]) is place_of(2.0) is None
    assert namespace(a) is StrictBackend.xp and namespace(np.ones(1)) is np
    assert backend_of(a).place == "strict:0" and get_backend(like=a).name == "strict:0"
    assert get_backend("cpu", like=a).name == "cpu"  # an argument comes before the array's device
    assert type(beside([True, False], a, "mask")) is StrictArray
    assert type(beside(a, np.ones(1), "mask", np.float32)) is np.ndarray
    assert to_numpy(a).tolist() == [0, 1, 2]
    with nl.use_backend("reference"):
        assert get_backend(like=a).name == "reference"


class Foreign:
    """An array of another library that offers its memory by DLPack: device kind 99 stands for a GPU."""

    def __init__(self, held, kind):
        self._held, self.kind, self.shape, self.dtype = held, kind, held.shape, "float32"

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **_):
        raise AssertionError("the backend asks for it")

    def __array__(self, *_, **__):
        assert self.kind == 1, "a GPU array was copied to the host"
        return self._held


def test_arrays_of_other_libraries_are_taken_without_a_copy(counts):
    x = Foreign(X, 99)
    assert adopt(x)._held is X
    assert adopt(Foreign(X, 1)) is X
    model = small()
    y = model.predict(x, verbose=0)
    assert type(y) is StrictArray and counts.ins == len(model.weights) and counts.outs == 0
    reset_counts()
    assert type(model(x).data) is StrictArray and counts.ins == counts.outs == 0
    assert type(model.predict(Foreign(X, 1), verbose=0)) is np.ndarray


# Training


def test_a_whole_life_of_a_model(counts, tmp_path):
    model, reference = on_both(
        lambda: small(kernel_regularizer="l2", recurrent_constraint="max_norm"),
        compiled={"metrics": ["mae", "r2_score"]}, validation_split=0.2, sample_weight=WEIGHTS,
    )  # fmt: skip
    assert all(type(v.data) is StrictArray for v in model.weights)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(reference.evaluate(X, Y, verbose=0), rel=1e-6)
    p = model.predict(X, verbose=0)
    assert type(p) is np.ndarray
    np.testing.assert_array_equal(p, reference.predict(X, verbose=0))
    np.testing.assert_array_equal(p[:3], model.predict_on_batch(X[:3]))
    assert type(model.predict_on_batch(there(X[:3]))) is StrictArray
    model.save(tmp_path / "m.safetensors", include_optimizer=True)
    again = nl.load(tmp_path / "m.safetensors")
    assert again._settings.backend == "strict"
    for m in (again, reference):  # the optimizer goes on from its slots
        nl.set_seed(5)
        m.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    equal_weights(again, reference)
    model.set_weights(again.get_weights())
    assert type(model.weights[0].data) is StrictArray
    np.testing.assert_array_equal(model.predict(X, verbose=0), again.predict(X, verbose=0))
    for act in ("train_on_batch", "test_on_batch"):
        nl.set_seed(6)
        first = getattr(again, act)(X[:4], Y[:4])
        nl.set_seed(6)
        assert first == pytest.approx(getattr(reference, act)(X[:4], Y[:4]), rel=1e-6)
    assert "total" in " ".join(_lines(model)).lower()
    nl.explain(model, print_fn=lambda _: None)
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(twin.predict(X, verbose=0), model.predict(X, verbose=0))


def _lines(model):
    lines = []
    model.summary(print_fn=lines.append)
    return lines


def test_data_are_staged_once_and_a_step_moves_nothing(counts):
    model = small()
    model.compile(
        "adam", "mse", metrics=["mae", "cosine_similarity"], weighted_metrics=["mse"], backend="strict"
    )
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0)  # weights, slots and class tables go over here
    reset_counts()
    model.fit(X, Y, batch_size=8, epochs=3, sample_weight=WEIGHTS, lengths=LENGTHS, verbose=0)
    order = 3 * 8 * len(X)
    assert counts.ins == 4 + 3  # x, y, weights, lengths; the order of each epoch
    assert counts.in_bytes == X.nbytes + Y.nbytes + WEIGHTS.nbytes + 8 * len(X) + order
    assert counts.outs == 0
    assert counts.scalars == 3 * (
        1 + 2 + 2
    )  # an epoch's sums: the loss, what is averaged, and the sum of weights
    seen = []
    reset_counts()
    watch = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0, callbacks=[watch])
    assert len(seen) == STEPS and counts.scalars > 8  # who looks at each step is shown each step


def test_what_does_not_fit_goes_over_batch_by_batch(counts, tmp_path, monkeypatch):
    memory = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=X.shape)
    memory[:] = X
    staged, _ = on_both(small)
    monkeypatch.setattr(StrictBackend, "memory", X.nbytes)
    for x in (X, memory):
        model = small()
        model.compile("adam", "mse", backend="strict")
        reset_counts()
        model.fit(x, Y, batch_size=8, epochs=2, verbose=0)
        per_step = 2 * STEPS * 2  # x and y, two epochs
        assert per_step <= counts.ins <= per_step + len(model.weights)
        equal_weights(model, staged)


def test_sources_of_batches_and_unequal_sequences(counts):
    ragged = [row[:n] for row, n in zip(X, LENGTHS, strict=True)]
    a, b = on_both(small, x=ragged)
    np.testing.assert_array_equal(a.predict(ragged, verbose=0), b.predict(ragged, verbose=0))
    source = lambda: iter([(X[:8], Y[:8]), (X[8:], Y[8:], WEIGHTS[8:])])
    on_both(small, x=source, y=None, batch_size=None, validation_data=source)
    model = small()
    model.compile("adam", "mse")
    out = model.predict(lambda: iter([there(X[:8]), there(X[8:])]), verbose=0)
    assert type(out) is StrictArray or type(out) is np.ndarray


def test_arrays_of_the_device_train_where_they_lie(counts):
    a, b = small(), small()
    a.compile("adam", "mse", metrics=["mae"])  # no backend named: the data's device counts
    b.compile("adam", "mse", metrics=["mae"], backend="reference")
    reset_counts()
    options = {"batch_size": 8, "epochs": 2, "verbose": 0, "validation_split": 0.2}
    nl.set_seed(2)
    first = a.fit(there(X), there(Y), sample_weight=there(WEIGHTS), **options)
    assert type(a.weights[0].data) is StrictArray and counts.outs == 0
    nl.set_seed(2)
    second = b.fit(X, Y, sample_weight=WEIGHTS, **options)
    assert {k: pytest.approx(v) for k, v in first.history.items()} == second.history
    equal_weights(a, b)
    assert type(a.predict(there(X), verbose=0)) is StrictArray
    np.testing.assert_array_equal(to_numpy(a.predict(there(X), verbose=0)), b.predict(X, verbose=0))
    assert a.evaluate(there(X), there(Y), verbose=0) == pytest.approx(b.evaluate(X, Y, verbose=0))
    # A NumPy array takes the weights home again, and a device's array goes where `backend` says.
    assert type(a.predict(X, verbose=0)) is np.ndarray and type(a.weights[0].data) is np.ndarray
    p = b.predict(there(X), verbose=0)
    assert type(p) is StrictArray and type(b.weights[0].data) is np.ndarray


def test_data_of_two_devices_and_bad_data_are_named(counts):
    model = small()
    model.compile("adam", "mse", backend="strict")
    elsewhere = get_backend("strict:1").asarray
    with pytest.raises(
        ValueError, match=r"^y: an array in the memory of strict:1 came, expected one of strict:0"
    ):
        model.fit(there(X), elsewhere(Y), verbose=0)
    with pytest.raises(ValueError, match=r"^sample_weight: an array in the memory of strict:1"):
        model.train_on_batch(X, Y, sample_weight=elsewhere(WEIGHTS))
    with pytest.raises(ValueError, match=r"^x: an array in the memory of strict:1"):
        model.predict(elsewhere(X), verbose=0)
    with pytest.raises(ValueError, match=r"validation_data: y: an array in the memory of strict:1"):
        model.fit(X, Y, validation_data=(X, elsewhere(Y)), verbose=0)
    bad = X.copy()
    bad[3, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"x: nan in row 3, at \(1, 2\)"):
        model.fit(there(bad), Y, verbose=0)
    with pytest.raises(ValueError, match="x: is empty"):
        model.fit(there(X[:0]), Y[:0], verbose=0)


LOSSES = {
    **{name: (Dense, Y) for name in ("mse", "mae", "mape", "huber", "logcosh", "cosine_similarity")},
    "msle": ("relu", np.abs(Y)),
    "poisson": ("softplus", np.abs(Y)),
    "kld": ("softmax", np.abs(Y) / np.abs(Y).sum(-1, keepdims=True)),
    "hinge": ("tanh", (Y > 0).astype(np.float32)),
    "squared_hinge": ("tanh", np.sign(Y)),
    "categorical_hinge": ("softmax", np.eye(2, dtype=np.float32)[CLASSES % 2]),
    "binary_crossentropy": ("sigmoid", (Y > 0).astype(np.float32)),
    "categorical_crossentropy": ("softmax", np.eye(2, dtype=np.float32)[CLASSES % 2]),
}  # fmt: skip


def test_no_loss_is_left_out():
    covered = {type(losses.get(name)) for name in LOSSES} | {
        losses.SparseCategoricalCrossentropy,
        losses.Pinball,  # as those below
        losses.FunctionLoss,
    }
    assert covered >= {getattr(losses, n) for n in losses.__all__ if isinstance(getattr(losses, n), type)} - {
        losses.Loss
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss(counts, name, weighted):
    kind, y = LOSSES[name]
    head = lambda: Dense(2, None if kind is Dense else kind)
    options = {"sample_weight": WEIGHTS, "lengths": LENGTHS} if weighted else {}
    on_both(lambda: small(head()), y=y, compiled={"loss": name}, epochs=1, **options)


@pytest.mark.parametrize(
    "loss",
    [
        losses.SparseCategoricalCrossentropy(from_logits=True),
        losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        losses.SparseCategoricalCrossentropy(),
        losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1),
        losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.1, reduction="mean_with_sample_weight"
        ),
        losses.MeanSquaredError(reduction="sum"),
        losses.Pinball([0.75]),
        losses.FunctionLoss(lambda y_true, y_pred: nl.ops.mean(nl.ops.abs(y_true - y_pred))),
    ],
    ids=lambda loss: loss.name,
)
def test_a_loss_with_options(counts, loss):
    sparse = isinstance(loss, losses.SparseCategoricalCrossentropy)
    y = CLASSES if sparse else np.eye(4, dtype=np.float32)[CLASSES]
    head = lambda: Dense(4, "softmax" if sparse and not loss.from_logits else None)
    options = {"class_weight": {1: 2.0, 3: 0.5}} if "categorical" in loss.name else {}
    on_both(lambda: small(head()), y=y, compiled={"loss": loss, "metrics": ["accuracy"]}, **options)


def test_labels_that_came_on_the_host_are_never_asked_of_the_device(counts):
    ids = RNG.integers(0, 9, (20, 6))
    model = nl.Sequential([Embedding(9, 4, mask_zero=True), LSTM(4, return_sequences=True), Dense(9)])
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy", "perplexity"], backend="strict")
    model.fit(ids, ids, batch_size=8, epochs=1, verbose=0)
    reset_counts()
    model.fit(ids, ids, batch_size=8, epochs=1, verbose=0)
    assert (
        counts.scalars == 2 * 3 and counts.outs == 0 and counts.ins == 3
    )  # the epoch's figures; x, y and the order
    ids[7, 2] = 9
    with pytest.raises(ValueError, match="expected ids from 0 to 8"):
        model.fit(ids, ids, batch_size=8, epochs=1, verbose=0)


METRICS = {
    "numbers": (None, Y, ["mse", "mae", "mape", "rmse", "r2", "cosine_similarity", "huber", "accuracy"]),
    "one hot": (
        "softmax",
        np.eye(2, dtype=np.float32)[CLASSES % 2],
        ["accuracy", "categorical_accuracy", "crossentropy", "auc", metrics.AUC(curve="PR"), metrics.Precision(top_k=1),
         metrics.Precision(thresholds=[0.3, 0.6]), metrics.Recall(class_id=1), metrics.TopKCategoricalAccuracy(k=1)],
    ),
    "classes": (
        "softmax",
        CLASSES % 2,
        ["accuracy", "sparse_categorical_accuracy", metrics.SparseTopKCategoricalAccuracy(k=1), "perplexity"],
    ),
    "yes or no": ("sigmoid", (Y > 0).astype(np.float32), ["binary_accuracy", metrics.AUC(num_thresholds=20), "precision"]),
    "a function": (None, Y, [lambda y_true, y_pred: np.abs(y_true - y_pred) < 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_are_summed_on_the_device(counts, name, weighted):
    activation, y, names = METRICS[name]
    loss = "sparse_categorical_crossentropy" if name == "classes" else "mse"
    compiled = {"loss": loss, "metrics": names}
    if weighted:
        compiled = {"loss": loss, "weighted_metrics": names}
    model, _ = on_both(
        lambda: small(Dense(2, activation)),
        y=y,
        compiled=compiled,
        epochs=1,
        sample_weight=WEIGHTS if weighted else None,
    )
    before = counts.scalars + counts.outs
    model.fit(X, y, batch_size=2, epochs=1, verbose=0)
    often = counts.scalars + counts.outs - before
    before = counts.scalars + counts.outs
    model.fit(X, y, batch_size=20, epochs=1, verbose=0)
    assert often == counts.scalars + counts.outs - before  # as often for ten steps as for one


def test_mean_and_sum_take_arrays_of_the_device(counts):
    for metric in (metrics.Mean(), metrics.Sum()):
        metric.update_state(there(np.arange(4.0)))
        metric.update_state(there(np.arange(4.0)), sample_weight=there(np.array([0.0, 1, 1, 0])))
        state = metric.get_state()
        assert all(type(v) in (float, int) for v in state.values())
        assert metric.result() == {"mean": 1.5, "sum": 9.0}[metric.name]
    bad = metrics.AUC()
    bad.update_state(there(np.array([0.0, 1.0])), there(np.array([0.5, 1.5])))
    with pytest.raises(ValueError, match="predictions outside"):
        bad.result()


OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adam": lambda: optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.01),
    "clip value": lambda: optimizers.Adam(0.01, clipvalue=0.01),
    "clip norm": lambda: optimizers.SGD(0.1, clipnorm=0.05),
    "clip all": lambda: optimizers.SGD(0.1, global_clipnorm=0.05),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer(counts, name):
    ids = RNG.integers(0, 9, (20, 6))
    make = lambda: nl.Sequential([Embedding(9, 4, embeddings_constraint="unit_norm"), LSTM(4), Dense(2)])

    def seeded():
        nl.set_seed(2)
        return make()

    model, _ = on_both(seeded, x=ids, compiled={"optimizer": OPTIMIZERS[name]()})
    assert all(type(s) is StrictArray for slots in model.optimizer._slots for s in slots)
    state = model.optimizer.state_dict()
    assert all(type(a) is np.ndarray for a in state["slots"].values())
    model.optimizer.load_state_dict(state)
    reset_counts()
    model.fit(ids, Y, batch_size=8, epochs=1, verbose=0)
    assert counts.scalars == 1 and counts.outs == 0  # the loss; clipping asks the device for no norm


def test_slots_and_states_follow_a_model_that_moves(counts):
    moving, staying = small(stateful=True), small(stateful=True)
    for model in (moving, staying):
        model.compile("adam", "mse")
        nl.set_seed(9)
        for backend in ("strict", "reference", "strict"):
            with nl.use_backend(backend if model is moving else "reference"):
                model.fit(X, Y, batch_size=10, epochs=1, shuffle=False, verbose=0)
    equal_weights(moving, staying)
    layer = moving.layers[0]
    assert all(type(s) is StrictArray for s in layer.states)
    layer.reset_states([0])
    assert not to_numpy(layer.states[0])[0].any()


def test_gradients_by_hand(counts):
    found = []
    for place in (there, lambda a: a):
        model, optimizer = small(), optimizers.Adam(0.1)
        for _ in range(2):
            with nl.GradientTape() as tape:
                loss = nl.ops.mean(nl.ops.square(model(place(X)) - nl.Tensor(place(Y))))
            optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
        found.append(model)
    assert type(found[0].weights[0].data) is StrictArray
    np.testing.assert_allclose(found[0].get_weights()[0], found[1].get_weights()[0], rtol=1e-4, atol=1e-5)


def test_nothing_assumes_the_first_device(counts):
    second = get_backend("strict:1").asarray
    a, b = (
        small(kernel_constraint="max_norm", kernel_regularizer="l2"),
        small(kernel_constraint="max_norm", kernel_regularizer="l2"),
    )
    for model, backend in ((a, "strict:1"), (b, "reference")):
        model.compile(optimizers.Adam(0.01, clipnorm=1.0), "mse", metrics=["mae"], backend=backend)
        nl.set_seed(2)
        model.fit(X, Y, batch_size=8, epochs=2, validation_split=0.2, verbose=0)
        model.train_on_batch(X[:4], Y[:4])
    equal_weights(a, b)
    assert {v.data.place for v in a.weights} == {1}
    np.testing.assert_array_equal(a.predict(X, verbose=0), b.predict(X, verbose=0))
    model = small()
    assert model(second(X)).data.place == 1  # no backend named, and none in use around the call
    with nl.GradientTape() as tape:
        y = model(second(X))
        with nl.use_backend("strict:1"):
            loss = nl.ops.mean(y * y)
    optimizers.SGD(0.1).apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
    assert model.predict(second(X), verbose=0).place == model.predict_on_batch(second(X)).place == 1
    model(there(X))  # the weights go from device to device
    assert {v.data.place for v in model.weights} == {0}


# Kinds of models


def test_masks_lengths_both_ways_and_pieces(counts):
    mask = RNG.random((20, 5)) < 0.7
    both = lambda: small(
        Bidirectional(GRU(3, return_sequences=True, zoneout=0.1)),
        Dense(2),
        return_sequences=True,
        remat_steps=2,
    )
    y = RNG.normal(size=(20, 5, 2)).astype(np.float32)
    a, b = on_both(both, y=y, mask=mask, compiled={"metrics": ["mae"]})
    np.testing.assert_array_equal(a.predict(X, mask=mask, verbose=0), b.predict(X, mask=mask, verbose=0))
    np.testing.assert_array_equal(
        a.predict(X, lengths=LENGTHS, verbose=0), b.predict(X, lengths=LENGTHS, verbose=0)
    )
    cut = lambda: small(GRU(3, return_sequences=True), Dense(2), return_sequences=True)
    a, b = on_both(cut, y=y, bptt_steps=2, mask=mask, sample_weight=WEIGHTS)
    np.testing.assert_array_equal(
        a.predict(X, bptt_steps=2, verbose=0), b.predict(X, bptt_steps=2, verbose=0)
    )
    a, b = on_both(cut, y=y, bptt_steps=2, lengths=LENGTHS)
    assert a.evaluate(X, y, bptt_steps=3, verbose=0) == pytest.approx(
        b.evaluate(X, y, bptt_steps=3, verbose=0)
    )
    on_both(lambda: small(Dense(2), stateful=True), batch_size=10, shuffle=False)


def test_a_model_of_ones_own_with_attention(counts):
    class Looks(nl.Model):
        def __init__(self):
            super().__init__()
            self.read, self.look, self.head = (
                LSTM(4, return_sequences=True),
                nl.MultiHeadAttention(2, 3),
                Dense(2),
            )

        def call(self, x, training=False):
            h = self.read(x)
            return self.head(nl.GlobalAveragePooling1D()(h + self.look(h, h, use_causal_mask=True)))

    def make():
        nl.set_seed(4)
        return Looks()

    on_both(make)


@pytest.mark.parametrize("feeding", [False, True])
def test_seq2seq(counts, feeding):
    sources = [RNG.integers(1, 9, n) for n in (3, 5, 2, 4, 5)]
    targets = [RNG.integers(3, 8, n) for n in (2, 3, 4, 2, 3)]
    found = []
    for backend in ("strict", "reference"):
        nl.set_seed(0)
        model = nl.Seq2Seq(9, 8, units=4, dropout=0.1, input_feeding=feeding)
        model.compile("adam", backend=backend, metrics=["accuracy"])
        history = model.fit(sources, targets, epochs=2, batch_size=3, verbose=0, validation_split=0.4)
        found.append((model, history.history))
    (a, first), (b, second) = found
    assert type(a.weights[0].data) is StrictArray
    equal_weights(a, b)
    assert {k: pytest.approx(v, rel=1e-5) for k, v in first.items()} == second
    same = lambda p, q: all(np.array_equal(s, t) for s, t in zip(p, q, strict=True))
    assert same(a.greedy(sources, max_length=4), b.greedy(sources, max_length=4))
    assert same(a.beam_search(sources, width=3, max_length=4), b.beam_search(sources, width=3, max_length=4))


def test_float64_and_bfloat16(counts):
    a, _ = on_both(small, compiled={"precision": "float64"})
    assert a.weights[0].dtype == np.float64 and a.predict(X, verbose=0).dtype == np.float64
    a, _ = on_both(small, compiled={"precision": "bfloat16"})
    assert a.weights[0].dtype == np.float32  # master weights


def test_an_epoch_in_float64_on_the_cpu_is_said_to_run_on_numpy(counts):
    model = small()
    model.compile("adam", "mse", precision="float64")
    lines = []
    rows = nl.explain(model, print_fn=lines.append)
    assert rows[0]["kernel"] == "numlstm.kernels.reference"
    assert "cpu has no float64 kernel for this with a gradient: plain NumPy" in lines[1]


# Callbacks


def test_callbacks(counts, tmp_path):
    make = lambda: [
        callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True),
        callbacks.ReduceLROnPlateau("loss", patience=1), callbacks.TerminateOnNaN(),
        callbacks.ModelCheckpoint(tmp_path / "m.safetensors", monitor="loss", include_optimizer=True),
        callbacks.CSVLogger(tmp_path / "log.csv"), callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
    ]  # fmt: skip
    on_both(small, epochs=3, callbacks=make)
    assert nl.load(tmp_path / "m.safetensors").optimizer.iterations == 9


def test_a_run_that_was_interrupted_ends_in_the_same_bits(counts, tmp_path):
    class Stop(callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            if batch == 1:
                raise KeyboardInterrupt

    whole, cut = small(stateful=True), small(stateful=True)
    for model in (whole, cut):
        model.compile("adam", "mse", metrics=["mae", "r2"], backend="strict")
    options = {"batch_size": 5, "epochs": 2, "verbose": 0}
    nl.set_seed(8)
    expected = whole.fit(X, Y, **options).history
    nl.set_seed(8)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(X, Y, callbacks=[callbacks.BackupAndRestore(tmp_path, save_freq=1), Stop()], **options)
    fresh = small(stateful=True)
    fresh.compile("adam", "mse", metrics=["mae", "r2"], backend="strict")
    history = fresh.fit(
        X, Y, callbacks=[callbacks.BackupAndRestore(tmp_path, save_freq=1)], **options
    ).history
    assert history == expected
    equal_weights(fresh, whole)


def test_predictions_that_outgrow_what_may_wait_are_read_back_in_between(counts, monkeypatch):
    model = small()
    model.compile("adam", "mse", backend="strict")
    expected = model.predict(X, verbose=0)
    for limit, times in ((2**20, 1), (0, 5)):
        monkeypatch.setattr(nl.training, "_HELD", limit)
        reset_counts()
        np.testing.assert_array_equal(model.predict(X, batch_size=4, verbose=0), expected)
        assert counts.outs == times
    shown = []
    watch = callbacks.LambdaCallback(on_predict_batch_end=lambda batch, logs: shown.extend(logs["outputs"]))
    model.predict(X, batch_size=10, callbacks=[watch], verbose=0)
    assert [type(a) for a in shown] == [np.ndarray] * 2


# Out of memory


def test_a_step_that_runs_out_of_memory_leaves_everything_usable(counts):
    make = lambda: small(Dense(2, kernel_constraint="max_norm"), kernel_regularizer="l2")

    def compiled():
        model = make()
        model.compile(optimizers.Adam(0.01, global_clipnorm=1.0), "mse", metrics=["mae"], backend="strict")
        return model

    def step(model):
        nl.set_seed(3)
        model.train_on_batch(X[:4], Y[:4])

    model = compiled()
    reset_counts()
    step(model)
    operations = counts.operations
    before, after = compiled().get_weights(), model.get_weights()
    whole = 0
    for n in range(0, operations, 3):
        model = compiled()
        with failing_at(n), pytest.raises(MemoryError, match=r"(Try a smaller batch_size|Out of memory)"):
            step(model)
        assert not nl.autograd.is_recording()
        weights = model.get_weights()
        unchanged = all(map(np.array_equal, weights, before))
        updated = all(np.allclose(w, a, atol=1e-6) for w, a in zip(weights, after, strict=True))
        assert unchanged or updated
        assert model.optimizer.iterations == int(updated)
        whole += updated
        if unchanged:
            step(model)
            for w, a in zip(model.get_weights(), after, strict=True):
                np.testing.assert_array_equal(w, a)
        else:
            step(model)
            assert model.optimizer.iterations == 2
    assert 0 < whole < operations / 6  # it was tried before and after the update


def test_out_of_memory_says_what_the_sizes_are_and_what_to_try(counts):
    model = small()
    model.compile("adam", "mse", backend="strict")
    model.fit(X, Y, batch_size=8, verbose=0)
    reset_counts()
    model.train_on_batch(X, Y)
    n = counts.operations // 2
    with failing_at(n), pytest.raises(MemoryError) as caught:
        model.train_on_batch(X, Y)
    for part in (
        "(20, 5, 3)",
        "weights of",
        "are free on strict:0",
        "Try a smaller batch_size",
        "can still be used",
    ):
        assert part in str(caught.value)
    model.fit(X, Y, batch_size=8, verbose=0)


def test_masking_by_value_comes_before_the_device_is_asked(counts):
    x = X.copy()
    x[3:, 2] = 0

    def make():
        nl.set_seed(1)
        return nl.Sequential([Masking(input_shape=(None, 3)), LSTM(4, return_sequences=True), Dense(1)])

    on_both(make, x=x, y=RNG.normal(size=(20, 5, 1)).astype(np.float32), compiled={"metrics": ["mae"]})
