"""Estimators' files: what JSON lacks comes back, and what is no estimator's file is refused."""

import numpy as np
import pytest
from small import QUICK

import numlstm as nl
from numlstm.estimators import LSTMClassifier, LSTMRegressor, load
from numlstm.estimators.files import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        (8, [4, (2,)], None, True, "text"),
        {"a": {1: "one", "$b": 2.5}},
        float("inf"),
        np.datetime64("2024-02-29T12:00", "m"),
        {"$array": 3},
    ],
)
def test_plain_values_come_back(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1.5, np.nan], [np.inf, -0.0]]),
        np.array([1, 2], dtype=np.int16),
        np.array(["rise", "fall"]),
        np.array(["a", None, 3.0], dtype=object),
        np.array([True, False]),
        np.array(["2024-01-01", "NaT"], dtype="datetime64[D]"),
        np.zeros((0, 3), np.float32),
    ],
)
def test_arrays_come_back_with_their_dtype(array):
    again = decode(encode({"x": array}))["x"]
    assert again.dtype == array.dtype and again.shape == array.shape
    np.testing.assert_array_equal(again, array)


def test_nan_comes_back():
    assert np.isnan(decode(encode(np.float32("nan"))))


def test_labels_and_parameters_come_back(tmp_path):
    X, y = np.random.default_rng(0).normal(size=(12, 4)), np.array(["left", "right", "straight"] * 4)
    classifier = LSTMClassifier(
        **{**QUICK, "units": (4, 3)}, class_weight={"left": 2.0, "right": 1, "straight": 1}
    ).fit(X, y)
    classifier.save(tmp_path / "c.safetensors")
    again = load(tmp_path / "c.safetensors")
    assert again.get_params() == classifier.get_params() and again.classes_.dtype == classifier.classes_.dtype
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))
    np.testing.assert_array_equal(
        again.fit(X, y).predict_proba(X), classifier.predict_proba(X)
    )  # it trains anew, too


def test_what_can_not_be_kept_is_named(tmp_path):
    X = np.random.default_rng(0).normal(size=(12, 4))
    regressor = LSTMRegressor(units=2, epochs=1, random_state=np.random.RandomState(0)).fit(X, X[:, 0])
    with pytest.raises(ValueError, match="random_state: a RandomState can't be kept in a file"):
        regressor.save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=r"path: models are saved as \.safetensors"):
        regressor.set_params(random_state=0).save(tmp_path / "r.pickle")


def test_files_that_are_no_estimators(tmp_path):
    model = nl.Sequential([nl.LSTM(2, input_shape=(None, 1))])
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"a model, but not an estimator's \(its file says: none\)"):
        load(tmp_path / "m.safetensors")
    for description, words in [
        (
            {"estimator": "Pipeline", "params": {}, "fitted": {}},
            "it holds a Pipeline, expected one of LSTMAnomalyDetector",
        ),
        ({"estimator": "LSTMRegressor", "params": {"unit": 3}, "fitted": {}}, "can't be rebuilt: .*unit"),
        ({"estimator": "LSTMRegressor"}, "can't be rebuilt: 'params'"),
    ]:
        model.save(tmp_path / "m.safetensors", preprocessing={"kind": "estimator", **description})
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "m.safetensors")
    (tmp_path / "p.safetensors").write_bytes(b"\x80\x04\x95" + bytes(30))
    with pytest.raises(ValueError, match="a pickle, which is never read"):
        load(tmp_path / "p.safetensors")
