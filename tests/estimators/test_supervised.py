"""`LSTMClassifier` and `LSTMRegressor`: forms of input, what they learn, what they refuse."""

import numpy as np
import pytest
from small import QUICK

from numlstm.estimators import LSTMClassifier, LSTMRegressor
from numlstm.estimators.inputs import is_sequences

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6, 2))
Y = X[:, :, 0].sum(axis=1)


def test_the_forms_of_one_and_the_same_data_give_the_same_bits():
    expected = LSTMRegressor(**QUICK).fit(X, Y).predict(X)
    np.testing.assert_array_equal(LSTMRegressor(**QUICK).fit(list(X), Y).predict(list(X)), expected)
    table = X.reshape(40, -1)
    as_table = LSTMRegressor(features_per_step=2, **QUICK).fit(table, Y)
    np.testing.assert_array_equal(as_table.predict(table), expected)
    assert as_table.n_features_in_ == 12
    one = X[:, :, 0]
    univariate = LSTMRegressor(**QUICK).fit(one, Y).predict(one)
    np.testing.assert_array_equal(
        LSTMRegressor(**QUICK).fit(one[..., None], Y).predict(one[..., None]), univariate
    )
    single = LSTMRegressor(features_per_step="all", **QUICK).fit(one, Y)
    assert single.model_.weights[0].shape == (6, 24)  # a step of six features


def test_what_is_a_table_and_what_are_sequences():
    assert is_sequences(X) and is_sequences(list(X)) and is_sequences([[[1, 2]], [[3, 4]]])
    assert is_sequences([np.ones(3), np.ones(4)])
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.ones((3, 2)), np.ones((4, 2))]
    assert is_sequences(ragged)
    assert (
        not is_sequences([np.ones(3), np.ones(3)])
        and not is_sequences([[1, 2], [3, 4]])
        and not is_sequences(["a"])
    )


def test_unequal_lengths_do_not_depend_on_their_neighbours():
    sequences = [RNG.normal(size=(n, 2)) for n in (3, 9, 5, 7) * 5]
    y = np.array([s[:, 0].mean() for s in sequences])
    regressor = LSTMRegressor(**QUICK).fit(sequences, y)
    together = regressor.predict(sequences)
    alone = np.concatenate([regressor.predict([s]) for s in sequences])
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-7)


def test_the_vowels_speakers_are_told_apart(vowels):
    x, y, x_test, y_test = vowels
    classifier = LSTMClassifier(units=32, bidirectional=True, epochs=25, learning_rate=0.01, random_state=0)
    accuracy = classifier.fit(x, y).score(x_test, y_test)
    assert accuracy > 0.9  # majority: 0.238; Kudo et al. 1999 by rules: 0.941
    proba = classifier.predict_proba(x_test)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(classifier.classes_[proba.argmax(axis=1)], classifier.predict(x_test))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "slstm", "indrnn"])
def test_every_cell_and_stack_learns(cell):
    regressor = LSTMRegressor(
        units=(12, 8), cell=cell, dropout=0.05, epochs=40, learning_rate=0.01, batch_size=8, random_state=0
    ).fit(X, Y)
    assert regressor.score(X, Y) > 0.7
    assert regressor.n_iter_ == 40 == len(regressor.history_["loss"])


def test_several_outputs_and_losses():
    targets = np.column_stack([Y, X[:, -1, 1] * 1000 + 5000])
    for loss in ("squared_error", "absolute_error", "huber"):
        regressor = LSTMRegressor(units=16, loss=loss, epochs=60, learning_rate=0.01, random_state=0).fit(
            X, targets
        )
        assert regressor.predict(X).shape == (40, 2)
        assert regressor.score(X, targets) > 0.8, loss  # the second one's scale is learned, too


def test_early_stopping_keeps_the_best_epoch():
    noise = RNG.normal(size=40)
    regressor = LSTMRegressor(
        units=32,
        epochs=200,
        early_stopping=True,
        validation_fraction=0.25,
        n_iter_no_change=4,
        random_state=0,
    ).fit(X, noise)
    losses = regressor.history_["val_loss"]
    assert regressor.n_iter_ < 200 and regressor.n_iter_ == int(np.argmin(losses)) + 1 + 4


def test_scaling_is_by_the_training_samples_and_can_be_left_out():
    far = X * 1000 + 12345
    regressor = LSTMRegressor(**QUICK).fit(far, Y)
    np.testing.assert_allclose(regressor.feature_mean_, far.mean(axis=(0, 1)))
    np.testing.assert_allclose(
        regressor.predict(far), LSTMRegressor(**QUICK).fit(X, Y).predict(X), rtol=1e-3, atol=1e-4
    )
    plain = LSTMRegressor(scale=False, **QUICK).fit(X, Y)
    assert not hasattr(plain, "feature_mean_") and not np.allclose(plain.predict(X), regressor.predict(far))


def test_class_weights_move_the_decision():
    labels = np.array(["rare"] * 8 + ["usual"] * 32)
    noise = RNG.normal(size=(40, 5, 1))
    share = {}
    for weight in (None, "balanced", {"rare": 100.0, "usual": 1.0}):
        classifier = LSTMClassifier(units=4, epochs=15, class_weight=weight, random_state=0).fit(
            noise, labels
        )
        share[str(weight)] = np.mean(classifier.predict(noise) == "rare")
    assert share["None"] < share["balanced"] < share[str({"rare": 100.0, "usual": 1.0})] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "lstn"}, "cell: expected one of lstm, gru"),
        ({"units": 0}, "units: expected"),
        ({"units": ()}, "units: expected"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0"),
        ({"learning_rate": 1e30}, "training diverged"),
        ({"epochs": 0}, "epochs: expected an integer >= 1"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"features_per_step": 0}, "features_per_step: expected an integer >= 1 or 'all'"),
        ({"features_per_step": 4}, "columns of X can't be cut into steps of 4"),
        ({"early_stopping": True, "validation_fraction": 1.5}, "validation_fraction: expected"),
        ({"loss": "mse"}, "loss: expected one of squared_error"),
        ({"backend": "gpu"}, "gpu"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSTMRegressor(**{**QUICK, **options}).fit(X[:, :, 0], Y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([np.ones((3, 2)), np.ones((4, 3))], "2, 3 features, expected one number"),
        ([np.ones((3, 2)), np.ones((0, 2))], r"X\[1\]: is empty"),
        ([np.ones((3, 2)), np.full((4, 2), np.nan)], r"X\[1\] contains NaN"),
        (np.ones((4, 0, 2)), "X: is empty"),
        (np.ones((2, 3, 4, 5)), "dim"),
    ],
)
def test_sequences_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        LSTMRegressor(**QUICK).fit(x, np.ones(len(x)))


def test_what_predict_refuses_after_fit():
    regressor = LSTMRegressor(**QUICK).fit(X, Y)
    with pytest.raises(ValueError, match="a 2-D table came, but fit got sequences"):
        regressor.predict(X[:, :, 0])
    with pytest.raises(ValueError, match="X has 1 features, but LSTMRegressor is expecting 2 features"):
        regressor.predict(X[:, :, :1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        LSTMRegressor(**QUICK).fit(X, Y[:-1])
    with pytest.raises(ValueError, match="class_weight: expected"):
        LSTMClassifier(class_weight=3, **QUICK).fit(X, Y > 0)
