"""`LSTMAnomalyDetector`: what it finds, in series and among sequences, and what it refuses."""

import numpy as np
import pandas as pd
import pytest

import numlstm as nl
from numlstm.estimators import LSTMAnomalyDetector

QUICK = {"units": 12, "epochs": 15, "learning_rate": 0.01, "random_state": 0}


def series():
    """600 rows of a wave with a spike at row 300 and a still stretch from 450 to 459."""
    x = np.sin(np.arange(600) / 3)
    x[300] += 2
    x[450:460] = x[450]
    return x


def test_rows_of_a_series_by_pandas():
    index = pd.date_range("2024-01-01", periods=600, freq="min")
    table = pd.Series(series(), index, name="load")
    detector = LSTMAnomalyDetector(contamination=0.02, **QUICK).fit(table)
    labels, scores = detector.predict(table), detector.score_samples(table)
    assert labels.index.equals(index) and set(labels) == {-1, 1} and (labels == -1).sum() == 12
    assert scores.idxmin() == index[300] and labels.iloc[450:462].min() == -1
    found = set(np.flatnonzero(labels == -1))
    # nothing else is called abnormal, but for the first rows, which have nothing before them to be told by
    assert found <= set(range(4)) | set(range(300, 306)) | set(range(450, 466))
    np.testing.assert_allclose(detector.decision_function(table), scores - detector.offset_)
    np.testing.assert_array_equal(detector.fit_predict(table), labels)
    several = detector.predict({"a": table, "b": table[:100]})
    assert list(several) == ["a", "b"] and len(several["b"]) == 100
    pd.testing.assert_series_equal(several["a"], labels)


def test_arrays_of_steps_are_the_same_series():
    x = series()
    by_array = LSTMAnomalyDetector(rows="steps", **QUICK).fit(x).score_samples(x)
    by_frame = LSTMAnomalyDetector(**QUICK).fit(pd.DataFrame({"v": x})).score_samples(pd.DataFrame({"v": x}))
    np.testing.assert_array_equal(by_array, by_frame)
    np.testing.assert_array_equal(
        LSTMAnomalyDetector(rows="steps", **QUICK).fit(x[:, None]).score_samples(x), by_array
    )


def test_a_rows_score_is_told_by_the_rows_before_it_alone():
    x = series()
    detector = LSTMAnomalyDetector(window=16, rows="steps", **QUICK).fit(x)
    whole = detector.score_samples(x)
    for end in (1, 15, 16, 17, 100, 331):
        np.testing.assert_allclose(detector.score_samples(x[:end]), whole[:end], rtol=1e-4, atol=1e-5)


def test_sequences_among_others():
    rng = np.random.default_rng(0)
    normal = [np.sin(np.arange(n) / 2 + rng.uniform(0, 6))[:, None] for n in rng.integers(20, 40, 80)]
    odd = [np.sin(np.arange(30) / 2 * 3)[:, None], rng.normal(size=(25, 1))]
    detector = LSTMAnomalyDetector(
        contamination="auto", units=16, epochs=40, learning_rate=0.01, random_state=0
    ).fit(normal)
    scores = detector.score_samples(normal + odd)
    assert scores.shape == (82,) and set(np.argsort(scores)[:2]) == {80, 81}
    assert detector.predict(odd).tolist() == [-1, -1]
    assert np.mean(detector.predict(normal) == 1) > 0.9


def test_many_columns_and_a_constant_one():
    rng = np.random.default_rng(0)
    t = np.arange(400)
    table = np.column_stack([np.sin(t / 3), np.cos(t / 5) * 100 + rng.normal(size=400), np.full(400, 7.0)])
    detector = LSTMAnomalyDetector(rows="steps", **QUICK).fit(table)
    assert np.isfinite(detector.score_samples(table)).all()
    moved = table.copy()
    moved[200, 2] = 8.0  # what never changed changes
    assert detector.score_samples(moved).argmin() == 200


def test_early_stopping_holds_the_end_of_a_series_out():
    spoiled = series()
    spoiled[-60:] = 50.0
    options = {**QUICK, "early_stopping": True, "epochs": 3, "rows": "steps"}
    clean, dirty = (LSTMAnomalyDetector(**options).fit(x) for x in (series(), spoiled))
    assert "val_loss" in clean.history_
    assert clean.history_["val_loss"] != dirty.history_["val_loss"]
    sequences = LSTMAnomalyDetector(**{**options, "rows": "auto"}).fit(
        np.random.default_rng(0).normal(size=(20, 8))
    )
    assert "val_loss" in sequences.history_


def test_files_keep_everything(tmp_path):
    x = series()
    detector = LSTMAnomalyDetector(rows="steps", **QUICK).fit(x)
    detector.save(tmp_path / "d.safetensors")
    again = nl.estimators.load(tmp_path / "d.safetensors")
    np.testing.assert_array_equal(again.decision_function(x), detector.decision_function(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "bidirectional: a network that has read a row"),
        ({"window": 0}, "window: expected an integer >= 1"),
        ({"contamination": 0.6}, "contamination: expected 'auto' or a number above 0, at most 0.5; got 0.6"),
        ({"contamination": "none"}, "contamination: expected"),
        ({"early_stopping": True, "validation_fraction": 0.9999}, "needs rows to hold out"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSTMAnomalyDetector(**{**QUICK, "rows": "steps", **options}).fit(series())


def test_data_that_are_refused():
    x = pd.DataFrame({"a": series()})
    with pytest.raises(ValueError, match="column 'a' contains NaN in row 0"):
        LSTMAnomalyDetector(**QUICK).fit(x.assign(a=np.nan))
    with pytest.raises(ValueError, match="column 'a' holds text"):
        LSTMAnomalyDetector(**QUICK).fit(x.assign(a="b"))
    with pytest.raises(ValueError, match="sequences came, but fit got series"):
        LSTMAnomalyDetector(rows="steps", **{**QUICK, "epochs": 1}).fit(x.to_numpy()).predict([x.to_numpy()])
