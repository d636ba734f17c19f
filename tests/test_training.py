"""Training: fit against a loop written by hand, chunks against whole rows, runs taken up again against whole
runs."""

import copy
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import numlstm as nl
from numlstm import callbacks, ops
from numlstm.autograd import GradientTape

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6, 2)).astype(np.float32)
Y = X[:, -1:, 0] + 0.5 * X[:, :1, 1]
IDS = RNG.integers(0, 7, (6, 50))


def regression(units=8, seed=3, **options):
    nl.set_seed(seed)
    model = nl.Sequential([nl.LSTM(units, input_shape=(6, 2), **options), nl.Dense(1)])
    model.compile("adam", "mse")
    return model


def language(seed=3, dropout=0.0, optimizer="adam", metrics=()):
    nl.set_seed(seed)
    layers = [nl.Embedding(7, 5, input_shape=(None,)), nl.LSTM(9, return_sequences=True)]
    model = nl.Sequential([*layers, nl.Dropout(dropout), nl.Dense(7)])
    loss = nl.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=list(metrics))
    return model


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


def close(a, b, **tolerance):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# fit


def test_fit_is_the_loop_one_would_write():
    model, other = regression(), regression()
    history = model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    optimizer, losses = nl.optimizers.Adam(), []
    for _ in range(2):
        total = 0.0
        for start in range(0, 40, 16):
            x, y = X[start : start + 16], Y[start : start + 16]
            with GradientTape() as tape:
                loss = ops.mean(ops.square(other(x, training=True) - y))
            optimizer.apply(tape.gradient(loss, other.trainable_weights), other.trainable_weights)
            total += float(loss) * len(x)
        losses.append(total / 40)
    close(model, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-5)
    assert history.epoch == [0, 1]
    assert model.optimizer.iterations == 6


def test_three_epochs_are_those_of_keras():
    # From Keras' own test of schedules in fit: Adam, a decay at every step, losses averaged over batches
    model = nl.Sequential([nl.Dense(2, kernel_initializer="ones", bias_initializer="ones")])
    rate = nl.schedules.ExponentialDecay(initial_learning_rate=0.05, decay_steps=1, decay_rate=0.9)
    model.compile(optimizer=nl.optimizers.Adam(learning_rate=rate), loss="mse")
    x = np.arange(32).reshape((16, 2))
    history = model.fit(x, x, epochs=3, batch_size=4, shuffle=False, verbose=0)
    assert model.optimizer.iterations == 12
    expected = [230.79457092285156, 128.30319213867188, 79.33648681640625]
    np.testing.assert_allclose(history.history["loss"], expected, rtol=5e-5)


def test_it_learns():
    model = regression(16)
    history = model.fit(X, Y, epochs=150, batch_size=20, verbose=0)
    assert history.history["loss"][-1] < 0.1 * history.history["loss"][0]


def test_same_seed_same_bits_and_another_seed_others():
    models = []
    for seed in (5, 5, 6):
        model = regression(seed=3)
        nl.set_seed(seed)
        model.fit(X, Y, epochs=3, batch_size=8, verbose=0)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_validation_is_an_evaluation_of_the_last_rows():
    model = regression()
    model.compile("adam", "mse", metrics=["mae"])
    history = model.fit(X, Y, epochs=2, validation_split=0.25, verbose=0).history
    assert list(history) == ["loss", "mae", "val_loss", "val_mae"]
    loss, mae = model.evaluate(X[30:], Y[30:], verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss)
    assert history["val_mae"][-1] == pytest.approx(mae)
    for given in ((X[30:], Y[30:]), [X[30:], Y[30:]], {"x": X[30:], "y": Y[30:]}, iter_once(X[30:], Y[30:])):
        twin = regression()
        got = twin.fit(X[:30], Y[:30], epochs=2, validation_data=given, verbose=0).history
        np.testing.assert_allclose(got["val_loss"], history["val_loss"], rtol=1e-6)


def iter_once(x, y):
    return lambda: iter([(x, y)])


def test_validation_freq():
    history = regression().fit(X, Y, epochs=4, validation_data=(X, Y), validation_freq=2, verbose=0).history
    assert len(history["loss"]), len(history["val_loss"]) == (4, 2)
    history = regression().fit(X, Y, epochs=4, validation_data=(X, Y), validation_freq=[1], verbose=0).history
    assert len(history["val_loss"]) == 1


def test_evaluation_does_not_depend_on_the_batch_size():
    model, lengths = language(metrics=["accuracy"]), [50, 3, 0, 20, 7, 11]
    whole = model.evaluate(IDS, IDS, lengths=lengths, batch_size=6, verbose=0)
    parts = model.evaluate(IDS, IDS, lengths=lengths, batch_size=1, verbose=0)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    kept = np.arange(50) < np.array(lengths)[:, None]
    p = model.predict(IDS, lengths=lengths, verbose=0)
    assert whole[1] == pytest.approx((p.argmax(-1) == IDS)[kept].mean())


def test_names_results_and_dicts():
    model = regression()
    model.compile("sgd", "meanSquaredError", metrics=["mae", nl.metrics.MeanAbsoluteError(), "mse"])
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert list(logs) == ["loss", "mae", "mean_absolute_error", "mse"]
    assert logs["mse"] == pytest.approx(logs["loss"])
    assert model.evaluate(X, Y, verbose=0) == list(logs.values())
    model.compile("sgd", "mse")
    assert isinstance(model.evaluate(X, Y, verbose=0), float)


def test_one_batch_methods():
    model = regression()
    model.compile("sgd", "mse", metrics=["mae"])
    before = model.test_on_batch(X, Y)
    assert before == pytest.approx(model.evaluate(X, Y, verbose=0, batch_size=40))
    assert model.train_on_batch(X, Y) == pytest.approx(before)
    after = model.test_on_batch(X, Y, return_dict=True)
    assert after["loss"] < before[0]
    np.testing.assert_allclose(model.predict_on_batch(X), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    unbuilt = nl.Sequential([nl.LSTM(3), nl.Dense(1)])
    unbuilt.compile("sgd", "mse")
    assert unbuilt.train_on_batch(X, Y) > 0


def test_integer_inputs_are_fine_where_floats_are_meant():
    nl.set_seed(0)
    model = nl.Sequential([nl.LSTM(16, input_shape=(1, 1)), nl.Dense(1)])
    model.compile("adam", "meanSquaredError")
    model.fit(np.array([[[1]], [[2]]]), np.array([1, 2]), epochs=10, verbose=0)
    assert model.predict(np.array([[[3]]]), verbose=0).shape == (1, 1)


def test_subclassed_model_and_a_loss_of_ones_own():
    class Summing(nl.Model):
        def __init__(self):
            super().__init__()
            self.rnn = nl.LSTM(6)
            self.head = nl.Dense(1)

        def call(self, x):
            return self.head(self.rnn(x)) + ops.sum(x, axis=1)[:, :1]

    nl.set_seed(0)
    model = Summing()
    model.compile("adam", lambda y_true, y_pred: ops.log(1.0 + ops.square(y_true - y_pred)))
    history = model.fit(X, Y, epochs=20, verbose=0).history["loss"]
    assert history[-1] < history[0]


# Weights


def test_class_weights_are_sample_weights_by_class():
    labels = RNG.integers(0, 3, 40)
    table = {0: 0.25, 2: 4.0}
    weights = np.array([0.25, 1.0, 4.0], np.float32)[labels]
    for loss, y in (
        ("sparse_categorical_crossentropy", labels),
        ("categorical_crossentropy", np.eye(3)[labels]),
    ):
        models = []
        for options in ({"class_weight": table}, {"sample_weight": weights}):
            nl.set_seed(1)
            model = nl.Sequential([nl.LSTM(4, input_shape=(6, 2)), nl.Dense(3, activation="softmax")])
            model.compile("sgd", loss, weighted_metrics=["accuracy"])
            logs = model.fit(X, y, verbose=0, epochs=2, **options).history
            models.append((model, logs))
        close(models[0][0], models[1][0], rtol=1e-6)
        assert models[0][1] == models[1][1]


def test_weighted_metrics_are_weighted_and_others_not():
    model = regression()
    model.compile("sgd", "mse", metrics=["mse"], weighted_metrics=["mae"])
    weights = np.zeros(40)
    weights[:10] = 1.0
    logs = model.evaluate(X, Y, sample_weight=weights, verbose=0, return_dict=True)
    error = model.predict(X, verbose=0) - Y
    assert logs["loss"] == pytest.approx((error[:10] ** 2).sum() / 40, rel=1e-4)
    assert logs["mse"] == pytest.approx((error**2).mean(), rel=1e-4)
    assert logs["mae"] == pytest.approx(abs(error[:10]).mean(), rel=1e-4)


def test_weights_of_time_steps():
    model = language()
    weights = RNG.uniform(0, 2, IDS.shape)
    loss = model.evaluate(IDS, IDS, sample_weight=weights, verbose=0)
    p = model.predict(IDS, verbose=0).astype(np.float64)
    nats = np.log(np.exp(p).sum(-1)) - np.take_along_axis(p, IDS[..., None], -1)[..., 0]
    assert loss == pytest.approx((nats * weights).mean(), rel=1e-5)


def test_penalties_are_part_of_the_loss():
    nl.set_seed(0)
    model = nl.Sequential([nl.LSTM(3, kernel_regularizer="l2", activity_regularizer="l1"), nl.Dense(1)])
    model.compile("sgd", "mse")
    loss = model.train_on_batch(X, Y)
    model.optimizer.learning_rate = 0.0
    loss = model.train_on_batch(X, Y)
    h = model.layers[0](X).numpy()
    kernel = model.layers[0].kernel.numpy()
    bare = ((model.predict(X, verbose=0) - Y) ** 2).mean()
    assert loss == pytest.approx(bare + 0.01 * (kernel**2).sum() + 0.01 * abs(h).sum(), rel=1e-4)
    assert model.test_on_batch(X, Y) == pytest.approx(loss, rel=1e-5)


def test_frozen_layers_stay():
    model = regression()
    model.layers[0].trainable = False
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    after = model.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not np.array_equal(before[3], after[3])


# Data in other forms


def test_unequal_sequences_train_as_padded_ones_with_lengths():
    lengths = RNG.integers(1, 7, 40)
    sequences = [x[:n] for x, n in zip(X, lengths, strict=True)]
    model, other = regression(), regression()
    model.fit(sequences, Y, epochs=2, batch_size=8, verbose=0)
    nl.set_seed(3)
    regression()  # draws what the first model drew
    other.fit(X, Y, lengths=lengths, epochs=2, batch_size=8, verbose=0)
    np.testing.assert_allclose(
        model.predict(sequences, verbose=0),
        model.predict(X, lengths=lengths, verbose=0),
        rtol=1e-4,
        atol=1e-6,
    )
    loss = model.evaluate(sequences, Y, verbose=0)
    assert loss == pytest.approx(model.evaluate(X, Y, lengths=lengths, verbose=0), rel=1e-4)


def test_unequal_sequences_in_unequal_sequences_out():
    model = language()
    sequences = [row[:n] for row, n in zip(IDS, (5, 9, 0, 3, 3, 50), strict=True)]
    model.fit(sequences, sequences, batch_size=4, epochs=1, verbose=0)
    out = model.predict(sequences, batch_size=4, verbose=0)
    assert [o.shape for o in out] == [(n, 7) for n in (5, 9, 0, 3, 3, 50)]
    np.testing.assert_allclose(out[1], model.predict(sequences[1][None], verbose=0)[0], rtol=1e-4, atol=1e-6)


def test_sources_and_memmaps_train_as_arrays(tmp_path):
    plain = regression()
    plain.fit(X, Y, epochs=2, batch_size=10, shuffle=False, verbose=0)

    def batches():
        return ((X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10))

    def forever():
        while True:
            yield from batches()

    np.save(tmp_path / "x.npy", X)
    lazy = np.load(tmp_path / "x.npy", mmap_mode="r")
    for x, y, options in (
        (batches, None, {}),
        (list_of(batches), None, {}),
        (forever(), None, {"steps_per_epoch": 4}),
        (lazy, Y, {"batch_size": 10}),
        (X.astype(np.float64), Y.tolist(), {"batch_size": 10}),
    ):
        model = regression()
        model.fit(x, y, epochs=2, shuffle=False, verbose=0, **options)
        assert same(model, plain)


class list_of:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return self.batches()


def test_steps_per_epoch_goes_on_through_the_data():
    seen = []

    def batches():
        for i in range(3):
            seen.append(i)
            yield X[:4], Y[:4]

    model = regression()
    model.fit(batches, epochs=2, steps_per_epoch=2, verbose=0)
    assert seen[:4] == [0, 1, 2, 0]
    assert model.optimizer.iterations == 4
    for steps in (3, 5, 10):  # also where an epoch ends with the data, and where it needs them several times
        model = regression()
        model.fit(X, Y, batch_size=8, epochs=2, steps_per_epoch=steps, verbose=0)
        assert model.optimizer.iterations == 2 * steps


def test_steps_of_an_evaluation():
    model = regression()
    first = model.evaluate(X[:8], Y[:8], verbose=0)
    assert model.evaluate(X, Y, batch_size=4, steps=2, verbose=0) == pytest.approx(first)
    assert len(model.predict(X, batch_size=4, steps=2, verbose=0)) == 8
    endless = ((X[:8], Y[:8]) for _ in range(10**9))
    assert model.evaluate(endless, steps=2, verbose=0) == pytest.approx(first)
    history = model.fit(X, Y, validation_data=endless, validation_steps=1, epochs=3, verbose=0).history
    assert len(history["val_loss"]) == 3
    with pytest.raises(ValueError, match="steps: 2 pieces of 2 steps end within a batch"):
        model.predict(X, bptt_steps=2, steps=2, verbose=0)
    with pytest.raises(ValueError, match="needs 6 batches, but the source of batches ended after 5"):
        model.evaluate(X, Y, batch_size=8, steps=6, verbose=0)


def test_a_source_that_ends_too_early_says_so():
    source = ((X[:4], Y[:4]) for _ in range(3))
    with pytest.raises(ValueError, match=r"epoch 2 needs at least one batch.*ended after 0; give a function"):
        regression().fit(source, epochs=2, verbose=0)
    with pytest.raises(ValueError, match="epoch 1 needs 5 batches, but the source of batches ended after 2"):
        regression().fit(iter([(X, Y), (X, Y)]), steps_per_epoch=5, verbose=0)


def test_an_empty_source_says_so():
    model = nl.Sequential([nl.LSTM(3), nl.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"epoch 1 needs at least one batch, but .* ended after 0"):
        model.fit(iter([]), verbose=0)


def test_a_model_without_weights_yet_is_built_from_a_source():
    nl.set_seed(0)
    model = nl.Sequential([nl.LSTM(3), nl.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(iter([(X[:3], Y[:3]), (X, Y)]), verbose=0)
    assert model.optimizer.iterations == 2


# Chunks in time


def test_chunks_are_the_loop_one_would_write():
    model, other = language(), language()
    model.fit(IDS, IDS, batch_size=6, epochs=2, shuffle=False, bptt_steps=16, verbose=0)
    embedding, lstm, _, dense = other.layers
    optimizer = nl.optimizers.Adam()
    for _ in range(2):
        state = None
        for start in range(0, 50, 16):
            ids = IDS[:, start : start + 16]
            with GradientTape() as tape:
                h, final, _ = ops.recurrent(
                    lstm.cell, embedding(ids), lstm.kernel, lstm.recurrent_kernel, lstm.bias, state=state
                )
                loss = ops.mean(ops.sparse_categorical_crossentropy(ids, dense(h), from_logits=True))
            optimizer.apply(tape.gradient(loss, other.trainable_weights), other.trainable_weights)
            state = tuple(nl.Tensor(s.numpy().copy()) for s in final)
    close(model, other, rtol=2e-4, atol=2e-6)
    assert model.optimizer.iterations == 8


def test_evaluation_and_prediction_in_chunks_are_those_of_whole_rows():
    model = language(metrics=["accuracy", "perplexity"])
    lengths = [50, 3, 0, 20, 7, 11]
    for options in ({}, {"lengths": lengths}, {"batch_size": 4}):
        whole = model.evaluate(IDS, IDS, verbose=0, **options)
        np.testing.assert_allclose(
            model.evaluate(IDS, IDS, bptt_steps=8, verbose=0, **options), whole, rtol=1e-5
        )
        p = model.predict(IDS, verbose=0, **options)
        np.testing.assert_allclose(
            model.predict(IDS, bptt_steps=8, verbose=0, **options), p, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_ids_and_labels_of_any_integer_dtype(tmp_path, dtype):
    model, other = language(), language()
    np.save(tmp_path / "ids.npy", IDS.astype(dtype))
    ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    model.fit(ids, ids, bptt_steps=16, shuffle=False, verbose=0)
    other.fit(IDS, IDS, bptt_steps=16, shuffle=False, verbose=0)
    assert same(model, other)


def test_the_last_output_only_has_one_target_and_one_step():
    model = regression()
    model.fit(X, Y, batch_size=20, bptt_steps=2, epochs=1, verbose=0)
    assert model.optimizer.iterations == 2
    whole = model.evaluate(X, Y, verbose=0)
    assert model.evaluate(X, Y, bptt_steps=4, verbose=0) == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(
        model.predict(X, bptt_steps=4, verbose=0), model.predict(X, verbose=0), rtol=1e-4, atol=1e-6
    )


def test_as_many_outputs_as_steps_are_not_steps():
    nl.set_seed(0)
    model = nl.Sequential([nl.LSTM(4, input_shape=(6, 2)), nl.Dense(6)])
    model.compile("sgd", "mse")
    model.fit(X, X[:, :, 0], bptt_steps=3, batch_size=40, verbose=0)
    assert model.optimizer.iterations == 1


def test_layers_are_left_as_they_were():
    model = language()
    model.fit(IDS, IDS, bptt_steps=16, verbose=0, validation_data=(IDS[:2], IDS[:2]))
    assert not model.layers[1].carry
    assert model.layers[1].states is None


def test_stateful_layers_keep_states_over_batches_and_validation():
    def make():
        nl.set_seed(0)
        model = nl.Sequential([nl.LSTM(4, stateful=True, input_shape=(None, 2)), nl.Dense(1)])
        model.compile("sgd", "mse")
        return model

    model, other = make(), make()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, validation_data=(X[:3], Y[:3]))
    other.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert same(model, other)
    assert model.layers[0].states[0].shape == (8, 4)
    assert np.array_equal(model.layers[0].states[0], other.layers[0].states[0])


def test_backwards_layers_can_not_be_cut():
    model = regression(go_backwards=True)
    with pytest.raises(ValueError, match=r"bptt_steps: lstm.* reads time from its end"):
        model.fit(X, Y, bptt_steps=2, verbose=0)


# Interruption


class Stop(callbacks.Callback):
    def __init__(self, step, error=KeyboardInterrupt):
        self.left, self.error = step, error

    def on_train_batch_end(self, batch, logs):
        self.left -= 1
        if self.left == 0:
            raise self.error("stop here")


class Late(callbacks.Callback):
    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def on_epoch_end(self, epoch, logs):
        if time.monotonic() > self.end:
            raise RuntimeError("nothing has stopped this training")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_a_usable_model(error):
    model = language()
    with pytest.raises(error):
        model.fit(IDS, IDS, bptt_steps=8, verbose=0, epochs=3, callbacks=[Stop(4, error)])
    assert not model.layers[1].carry
    assert model.layers[1].states is None
    assert model.history.epoch == []
    assert np.isfinite(model.predict(IDS, verbose=0)).all()
    model.fit(IDS, IDS, bptt_steps=8, verbose=0)
    assert model.history.epoch == [0]


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also in a job that a shell has started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals to oneself differ there")
def test_a_real_interrupt_at_any_moment(interruptible):
    model = language()
    model.fit(IDS, IDS, bptt_steps=8, verbose=0)  # the kernels are there: an import must not be interrupted
    model.evaluate(IDS, IDS, verbose=0)
    for delay in (0.05, 0.08, 0.11):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):  # and not Late's error
            model.fit(IDS, IDS, bptt_steps=8, verbose=0, epochs=10**6, callbacks=[Late(60)])
        assert not model.layers[1].carry
        assert np.isfinite(model.evaluate(IDS, IDS, verbose=0))


@pytest.mark.parametrize("save_freq", ["epoch", 3])
@pytest.mark.parametrize("stop", [2, 8, 11])
@pytest.mark.parametrize("bptt_steps", [None, 16])
def test_a_run_taken_up_again_ends_in_the_same_bits(tmp_path, save_freq, stop, bptt_steps):
    options = {"batch_size": 3 if bptt_steps else 2, "epochs": 4, "bptt_steps": bptt_steps, "verbose": 0}
    watchers = lambda: [
        callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=0.5),
        callbacks.EarlyStopping(monitor="loss", patience=50, restore_best_weights=True),
    ]

    def make():
        return language(dropout=0.3, metrics=["accuracy"])

    whole = make()
    expected = whole.fit(IDS, IDS, callbacks=watchers(), **options).history
    interrupted = make()
    with pytest.raises(KeyboardInterrupt):
        backup = callbacks.BackupAndRestore(tmp_path, save_freq=save_freq)
        interrupted.fit(IDS, IDS, callbacks=[backup, *watchers(), Stop(stop)], **options)
    nl.set_seed(99)
    again = language(seed=17, dropout=0.3, metrics=["accuracy"])  # other weights, other randomness
    backup = callbacks.BackupAndRestore(tmp_path, save_freq=save_freq)
    if not backup.path.exists():  # stopped before the first backup: nothing to take up
        again = make()
    history = again.fit(IDS, IDS, callbacks=[backup, *watchers()], **options).history
    assert same(again, whole)
    assert history == expected
    assert again.optimizer.iterations == whole.optimizer.iterations
    assert not backup.path.exists()  # the run is over


def test_an_iterator_is_taken_up_where_it_was(tmp_path):
    def forever():
        for k in range(100):
            yield X[k % 30 : k % 30 + 8], Y[k % 30 : k % 30 + 8]

    whole = regression()
    whole.fit(forever(), epochs=3, steps_per_epoch=5, verbose=0)
    model = regression()
    backup = [callbacks.BackupAndRestore(tmp_path, save_freq=2)]
    with pytest.raises(KeyboardInterrupt):
        model.fit(forever(), epochs=3, steps_per_epoch=5, verbose=0, callbacks=[*backup, Stop(8)])
    again = regression(seed=8)
    again.fit(
        forever(), epochs=3, steps_per_epoch=5, verbose=0, callbacks=[callbacks.BackupAndRestore(tmp_path)]
    )
    assert same(again, whole)


# Settings


def test_float64_trains_in_float64():
    model = regression()
    model.compile("adam", "mse", precision="float64")
    model.fit(X, Y, verbose=0, epochs=2)
    assert all(w.dtype == np.float64 for w in model.get_weights())
    assert model.predict(X, verbose=0).dtype == np.float64
    other = regression()
    other.fit(X, Y, verbose=0, epochs=2)
    model32 = regression()
    model32.compile("adam", "mse")
    assert model32.predict(X, verbose=0).dtype == np.float32


def test_backends_agree():
    models = []
    for backend in ("cpu", "reference"):
        model = regression()
        model.compile("adam", "mse", backend=backend)
        model.fit(X, Y, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    close(*models, rtol=1e-4, atol=1e-5)


def share_right(y_true, y_pred):
    return (y_pred.argmax(-1) == y_true).astype(float)


def nats(y_true, y_pred):
    return ops.sparse_categorical_crossentropy(y_true.data.astype(int), y_pred, from_logits=True)


def test_compile_settings_survive_a_file(tmp_path):
    adam = nl.optimizers.Adam(nl.schedules.CosineDecay(0.01, 100), global_clipnorm=1.0)
    model = language(optimizer=adam)
    watched = ["accuracy", nl.metrics.Perplexity(True), share_right, nl.losses.get("scce")]
    model.compile(adam, nats, metrics=watched, weighted_metrics=["acc"])
    path = tmp_path / "m.safetensors"
    model.save(path)
    again = nl.load(path, custom_objects={"nats": nats, "share_right": share_right})
    assert again.get_compile_config() == model.get_compile_config()
    assert again.optimizer.learning_rate == 0.01
    model.compile(adam, nats, metrics=watched[:3])
    again.compile(adam, nats, metrics=watched[:3])
    assert again.evaluate(IDS, IDS, verbose=0) == model.evaluate(IDS, IDS, verbose=0)
    with pytest.raises(ValueError, match="the function 'nats' of this model is not known here"):
        nl.load(path)
    assert nl.load(path, compile=False).predict(IDS, verbose=0).shape == (6, 50, 7)


NAN = X.copy()
NAN[17, 3, 1] = np.nan


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda m: m.compile(precision="half"), "precision: 'half' is not known"),
        (lambda m: m.compile(optimizer="adaam"), "unknown optimizer"),
        (lambda m: m.compile(loss="msee"), "unknown loss"),
        (lambda m: m.compile(metrics=["maee"]), "unknown metric"),
        (lambda m: m.compile(metrics=3), "metrics: expected a list"),
        (lambda m: m.compile(backend="tpu"), "backend: 'tpu'"),
        (lambda m: m.compile(loss=nl.losses.MeanSquaredError(None)), "has no reduction"),
        (lambda m: nl.Sequential([nl.Dense(1)]).fit(X, Y), "fit: the model has not been compiled"),
        (lambda m: m.fit(NAN, Y, verbose=0), r"x: nan in row 17, at \(3, 1\) within it"),
        (lambda m: m.predict(NAN, verbose=0), "x: nan in row 17"),
        (lambda m: m.train_on_batch(NAN, Y), "x: nan in row 17"),
        (lambda m: m.fit(X, Y[:-1], verbose=0), "y: 39 rows came, expected 40"),
        (lambda m: m.fit(X, verbose=0), "y: no targets came, but the loss mean_squared_error needs them"),
        (lambda m: m.fit(X[:, :, 0], Y, verbose=0), "rank 3"),
        (lambda m: m.fit(X, np.zeros((40, 2)), verbose=0), r"targets of shape \(32, 2\)"),
        (lambda m: m.fit(X, Y, epochs=0, verbose=0), "epochs: expected an integer >= 1, got 0"),
        (lambda m: m.fit(X, Y, batch_size=-1, verbose=0), "batch_size"),
        (lambda m: m.fit(X, Y, bptt_steps=0, verbose=0), "bptt_steps: expected an integer >= 1"),
        (lambda m: m.fit(X, Y, shuffle="batch", verbose=0), "shuffle: expected True or False"),
        (lambda m: m.fit(X, Y, verbose=3), "verbose: expected 0, 1, 2 or 'auto'"),
        (lambda m: m.fit(X, Y, validation_split=1.5, verbose=0), "validation_split"),
        (lambda m: m.fit(X, Y, validation_split=0.1, validation_data=(X, Y), verbose=0), "not both"),
        (lambda m: m.fit(iter([]), validation_split=0.1, verbose=0), "validation_split: needs arrays"),
        (lambda m: m.fit(X, Y, validation_data=(X, Y[:3]), verbose=0), "validation_data: y: 3 rows"),
        (lambda m: m.fit(X, Y, validation_data=(X,), verbose=0), "validation_data: a tuple of 1"),
        (
            lambda m: m.fit(X, Y, class_weight={0: 2.0}, verbose=0),
            "class_weight: the loss mean_squared_error",
        ),
        (lambda m: m.fit(X, Y, callbacks=["x"], verbose=0), "callbacks: got a str"),
        (lambda m: m.fit(X, Y, validation_freq=0, verbose=0), "validation_freq"),
    ],
)
def test_errors_name_what_is_wrong(act, words):
    with pytest.raises(ValueError, match=words):
        act(regression())


def test_a_failed_compile_changes_nothing():
    model = regression()
    optimizer, loss = model.optimizer, model.loss
    with pytest.raises(ValueError, match="unknown metric"):
        model.compile("sgd", "mae", metrics=["nonsense"])
    assert model.optimizer is optimizer
    assert model.loss is loss


def test_cuda_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="cuda"):
        regression().compile(backend="cuda")


def test_strict_refuses_float64_on_the_cpu():
    model = regression()
    model.compile("adam", "mse", precision="float64", backend="cpu", strict=True)
    with pytest.raises(Exception, match="float64"):
        model.fit(X, Y, verbose=0)


def test_loss_and_gradients_are_those_of_a_step_and_leave_the_model_alone():
    nl.set_seed(0)
    model = nl.Sequential([nl.LSTM(3, input_shape=(4, 2)), nl.Dense(1, kernel_regularizer="l2", name="d")])
    model.compile(nl.optimizers.SGD(0.5), "mse")
    model.layers[0].trainable = False
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((5, 4, 2)).astype(np.float32), draw.standard_normal((5, 1)).astype(np.float32)
    before = model.get_weights()
    loss, gradients, outputs = model.loss_and_gradients(x, y)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(outputs, model.predict_on_batch(x))
    penalty = 0.01 * float((before[3] ** 2).sum())
    assert loss == pytest.approx(float(((outputs - y) ** 2).mean()) + penalty, rel=1e-5)
    assert all(np.abs(g).max() > 0 for g in gradients)  # the frozen layer's too
    assert model.train_on_batch(x, y) == pytest.approx(loss, rel=1e-6)
    after = model.get_weights()
    for k, (a, b, g) in enumerate(zip(before, after, gradients, strict=True)):
        np.testing.assert_allclose(b, a if k < 3 else a - 0.5 * g, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="loss_and_gradients: the model has not been compiled"):
        nl.Sequential([nl.Dense(1)]).loss_and_gradients(x, y)


# What `train_on_batch` finds in the model is kept from step to step; whatever changes in between must be seen.


def freeze(model):
    model.layers[0].trainable = False


def freeze_one(model):
    model.layers[0].kernel.trainable = False


def grow(model):
    model.add(nl.Dense(1))


def replace(model):
    model.pop()
    model.add(nl.Dense(1, use_bias=False))


def assign(model):
    model.set_weights([np.full(w.shape, 0.1, w.dtype) for w in model.get_weights()])


def regularize(model):
    model.layers[1].kernel.regularizer = nl.regularizers.L2(1.0)


def add_losses(model):
    model.layers[0].activity_regularizer = nl.regularizers.L2(1.0)


def compile_again(model):
    model.compile(nl.optimizers.SGD(0.5), "mae")


CHANGES = (freeze, freeze_one, grow, replace, assign, regularize, add_losses, compile_again)


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_sees_what_has_changed_since_the_last(change):
    model, as_it_was = regression(), regression()
    for m in (model, as_it_was):
        for _ in range(2):
            m.train_on_batch(X, Y)
    change(model)
    anew = copy.deepcopy(model)  # knows nothing of the steps before but what the optimizer does
    before = model.get_weights()
    losses = [m.train_on_batch(X, Y) for m in (model, anew, as_it_was)]
    assert losses[0] == losses[1]
    assert same(model, anew)
    assert len(model.weights) != len(as_it_was.weights) or not same(model, as_it_was)
    frozen = {freeze: [0, 1, 2], freeze_one: [0]}.get(change, [])
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert [k for k, m in enumerate(moved) if not m] == frozen


def test_a_frozen_layer_learns_again_once_it_is_set_free():
    model = regression()
    model.layers[0].trainable = False
    model.train_on_batch(X, Y)
    before = model.layers[0].get_weights()
    model.layers[0].trainable = True
    model.train_on_batch(X, Y)
    assert not any(map(np.array_equal, before, model.layers[0].get_weights()))


def test_int8_weights_that_come_later_are_refused():
    model = regression(units=32)
    model.train_on_batch(X, Y)
    small = model.quantize("int8")
    small.compile("adam", "mse")
    with pytest.raises(ValueError, match="int8"):
        small.train_on_batch(X, Y)
    model._layers[0] = small.layers[0]
    with pytest.raises(ValueError, match="int8"):
        model.train_on_batch(X, Y)
