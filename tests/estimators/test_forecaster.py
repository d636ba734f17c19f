"""`LSTMForecaster`: windows, tables in and out, known futures, intervals, what it learns and refuses."""

import numpy as np
import pandas as pd
import pytest

import numlstm as nl
from numlstm.data.sliding import SlidingWindows
from numlstm.data.tables import windows
from numlstm.estimators import LSTMForecaster
from numlstm.estimators.panels import continuation, continued

QUICK = {"units": 8, "epochs": 4, "learning_rate": 0.01, "random_state": 0}


def frame(waves):
    return pd.DataFrame(
        waves, pd.date_range("2024-01-01", periods=len(waves), freq="h", name="when"), ["slow", "fast"]
    )


def test_sliding_windows_are_those_of_the_table():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 3)).astype(np.float32)
    expected = windows(values, values[:, 0].astype(float), window=5, horizon=2)
    source = SlidingWindows(values, expected.origin, window=5, horizon=2, targets=values[:, :1], batch_size=7)
    batches = list(source.epoch())
    assert len(batches) == source.steps == 4
    np.testing.assert_array_equal(np.concatenate([b.x for b in batches]), expected.x)
    np.testing.assert_array_equal(np.concatenate([b.y for b in batches]), expected.y)
    nl.set_seed(0)
    shuffled = np.concatenate([b.y for b in source.epoch(shuffle=True)])
    assert not np.array_equal(shuffled, expected.y)
    np.testing.assert_array_equal(np.sort(shuffled[:, 0]), np.sort(expected.y[:, 0].astype(np.float32)))
    with pytest.raises(ValueError, match="bptt_steps"):
        next(source.epoch(chunk=2))


def test_known_inputs_of_the_rows_ahead_come_behind_the_window():
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    source = SlidingWindows(values, np.array([2]), window=2, horizon=2, targets=values[:, :1], base=values[:, :1],
                            known=np.array([False, True]))  # fmt: skip
    batch = next(source.epoch())
    np.testing.assert_array_equal(batch.x[0], [[2, 3, 0], [4, 5, 0], [0, 7, 1], [0, 9, 1]])
    np.testing.assert_array_equal(batch.y[0], [[0], [0], [2], [4]])
    np.testing.assert_array_equal(batch.sample_weight[0], [0, 0, 1, 1])


def test_a_frame_goes_in_and_comes_out(waves):
    table = frame(waves)
    forecaster = LSTMForecaster(horizon=3, window=12, **QUICK).fit(table)
    forecast = forecaster.predict()
    assert list(forecast.columns) == ["slow", "fast"] and forecast.index.name == "when"
    assert list(forecast.index) == list(pd.date_range(table.index[-1], periods=4, freq="h")[1:])
    pd.testing.assert_frame_equal(forecaster.predict(table), forecast)  # what fit remembered is enough
    pd.testing.assert_frame_equal(forecaster.predict(2), forecast[:2])
    pd.testing.assert_frame_equal(forecaster.predict(table, horizon=1), forecast[:1])
    earlier = forecaster.predict(table[:100])
    assert earlier.index[0] == table.index[100]
    bounds = forecaster.predict_interval(coverage=0.9)
    assert list(bounds.columns) == [(n, e) for n in ("slow", "fast") for e in ("lower", "upper")]
    assert (bounds["slow"]["lower"] <= bounds["slow"]["upper"]).all()


def test_one_series_and_one_target(waves):
    table = frame(waves)
    series = LSTMForecaster(horizon=2, **QUICK).fit(table["slow"]).predict()
    assert isinstance(series, pd.Series) and series.name == "slow"
    one = LSTMForecaster(horizon=2, target="slow", **QUICK).fit(table)  # fast is read, not forecast
    assert list(one.predict().columns) == ["slow"] and one.model_.weights[0].shape[0] == 2
    assert list(one.predict_interval().columns) == ["lower", "upper"]
    array = LSTMForecaster(horizon=2, target=0, rows="steps", **QUICK).fit(waves)
    np.testing.assert_allclose(array.predict(), one.predict())  # the same table, otherwise given
    assert array.predict_interval().shape == (2, 1, 2)


def test_several_tables_each_by_its_own_scale(waves):
    small, large = frame(waves), frame(waves * 1000 + 1e5)
    forecaster = LSTMForecaster(horizon=2, target="slow", **QUICK)
    both = forecaster.fit({"small": small, "large": large}).predict()
    assert list(both) == ["small", "large"]
    np.testing.assert_allclose(both["large"], both["small"] * 1000 + 1e5, rtol=1e-4)
    again = forecaster.predict([small[:150], large])
    assert isinstance(again, list) and again[0].index[0] == small.index[150]
    np.testing.assert_allclose(again[1], both["large"], rtol=1e-6)


def test_arrays_of_series(waves):
    series = np.stack([waves[k : k + 60, 0] for k in range(0, 60, 10)])
    forecaster = LSTMForecaster(horizon=4, window=10, **QUICK).fit(series)
    assert forecaster.predict(series).shape == (6, 4) and forecaster.predict_interval(series).shape == (
        6,
        4,
        2,
    )
    tables = LSTMForecaster(horizon=4, window=10, **QUICK).fit(series[..., None])
    np.testing.assert_array_equal(tables.predict(series[..., None])[..., 0], forecaster.predict(series))
    ragged = [waves[:50], waves[:80]]
    assert LSTMForecaster(horizon=4, window=10, **QUICK).fit(ragged).predict().shape == (2, 4, 2)


def test_a_known_future_is_used_and_the_unknown_one_is_not():
    """The target is what the plan says for the same row, so only a plan for the rows ahead tells it."""
    rng = np.random.default_rng(0)
    plan = rng.choice([-1.0, 1.0], 400)
    table = pd.DataFrame({"sold": plan * 3 + 10 + rng.normal(0, 0.1, 400), "plan": plan})
    options = {
        "horizon": 3,
        "window": 4,
        "target": "sold",
        "units": 12,
        "epochs": 15,
        "learning_rate": 0.02,
        "random_state": 0,
    }
    informed = LSTMForecaster(known_future=["plan"], **options).fit(table[:300])
    result = informed.backtest(table, start=300)
    assert result.errors()["LSTM"]["rmse"] < 0.5  # 3 without the plan
    future = pd.DataFrame({"plan": [1.0, -1.0, 1.0]})
    np.testing.assert_allclose(informed.predict(future=future)["sold"], [13, 7, 13], atol=1)
    blind = LSTMForecaster(**options).fit(table[:300]).backtest(table, start=300)
    assert blind.errors()["LSTM"]["rmse"] > 2
    changed = table.copy()
    changed.loc[350:, "sold"] = 99.0  # what lies ahead of row 349 must not move what is forecast from there
    before, after = (informed.backtest(t, start=350).forecast[0] for t in (table, changed))
    np.testing.assert_array_equal(before, after)
    with pytest.raises(ValueError, match="future: needed for the 3 rows ahead of: plan"):
        informed.predict()
    with pytest.raises(ValueError, match="future: 2 rows of 'plan' came, expected 3"):
        informed.predict(future=future[:2])
    with pytest.raises(ValueError, match="expected pandas tables with the column 'plan'"):
        informed.predict(future=pd.DataFrame({"plans": [1, 2, 3]}))
    array = LSTMForecaster(known_future=[1], rows="steps", **{**options, "target": 0, "epochs": 2}).fit(
        table.to_numpy()
    )
    assert array.predict(future=np.ones((3, 1))).shape == (3, 1)


def test_gaps_and_text(waves):
    table = frame(waves).assign(sky=["clear", "cloudy", None] * 80)
    table.iloc[50:60, 0] = np.nan
    table.iloc[-1, 1] = np.nan
    forecaster = LSTMForecaster(horizon=2, window=6, target="slow", **QUICK).fit(table)
    assert (
        forecaster.model_.weights[0].shape[0] == 2 + 1 + 2
    )  # slow has gaps in the training rows; two kinds of sky
    result = forecaster.backtest(table)
    assert np.isfinite(result.truth).all() and np.isfinite(result.forecast).all()
    assert not set(range(48, 59)) & set(result.origin.tolist())  # none forecasts a gap
    pd.testing.assert_frame_equal(forecaster.predict(), forecaster.predict(table))


def test_it_beats_the_last_value_where_there_is_something_to_learn(waves):
    forecaster = LSTMForecaster(
        horizon=6,
        window=16,
        rows="steps",
        units=16,
        epochs=60,
        learning_rate=0.01,
        early_stopping=False,
        random_state=0,
    ).fit(waves[:200])
    result = forecaster.backtest(waves, start=200, season=25)
    errors = result.errors()
    assert set(errors) == {"LSTM", "last value", "25 rows before"}
    assert errors["LSTM"]["rmse"] < 0.5 * errors["last value"]["rmse"]
    assert forecaster.score(waves[170:]) > 0.7
    assert result.origin[0] == 199 and result.truth.shape == (len(result.origin), 6, 2)
    np.testing.assert_allclose(result.truth[0], waves[200:206])
    np.testing.assert_allclose(result.trivial["last value"][0], np.repeat(waves[199:200], 6, axis=0))
    np.testing.assert_allclose(result.trivial["25 rows before"][0], waves[175:181])


def test_intervals_hold_about_the_share_that_was_meant():
    """Noise whose width follows a column: intervals must be calibrated, and wider where there is more of it."""
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.choice([0.2, 2.0], 150), 20)
    table = np.column_stack([rng.normal(0, loud), loud])
    forecaster = LSTMForecaster(
        rows="steps", target=0, window=4, coverage=(0.8, 0.5), predict_change=False, units=8, epochs=15,
        learning_rate=0.01, random_state=0,
    ).fit(table[:2000])  # fmt: skip
    result = forecaster.backtest(table, start=2000)
    for meant, found in result.coverage().items():
        assert abs(found - meant) < 0.06, (meant, found)
    assert result.width()[0.8] > result.width()[0.5]
    width = np.diff(result.bounds[0.8][:, 0, 0])[:, 0]
    calm = table[result.origin, 1] < 1
    assert width[~calm].mean() > 3 * width[calm].mean()
    with pytest.raises(
        ValueError, match=r"coverage: expected one that was trained \(\(0.8, 0.5\)\), got 0.9"
    ):
        forecaster.predict_interval(coverage=0.9)


def test_nothing_of_the_held_out_rows_reaches_scaling_or_training(waves):
    spoiled = waves.copy()
    spoiled[-20:] += 1e6
    options = {
        "rows": "steps",
        "window": 8,
        "early_stopping": True,
        "validation_fraction": 20 / 240,
        "epochs": 2,
        "coverage": (),
    }
    clean, dirty = (LSTMForecaster(**{**QUICK, **options}).fit(x) for x in (waves, spoiled))
    assert clean.inputs_ == dirty.inputs_
    assert clean.history_["loss"] == dirty.history_["loss"]
    assert clean.history_["val_loss"] != dirty.history_["val_loss"]


def test_the_change_or_the_value_by_what_varies_less():
    rng = np.random.default_rng(0)
    table = np.column_stack([np.cumsum(rng.normal(size=300)), rng.normal(size=300)])
    forecaster = LSTMForecaster(rows="steps", window=4, **QUICK).fit(table)
    assert forecaster.change_.tolist() == [True, False]


def test_files_keep_everything(waves, tmp_path):
    table = frame(waves).assign(sky=["clear", "cloudy"] * 120)
    forecaster = LSTMForecaster(horizon=3, target=["slow", "fast"], **QUICK).fit(
        {"a": table, "b": table[:100]}
    )
    forecaster.save(tmp_path / "f.safetensors")
    again = nl.estimators.load(tmp_path / "f.safetensors")
    for key, expected in forecaster.predict_interval().items():
        pd.testing.assert_frame_equal(again.predict_interval()[key], expected)


@pytest.mark.parametrize(
    ("index", "following"),
    [
        (
            pd.date_range("2024-01-31", periods=5, freq="ME"),
            pd.date_range("2024-06-30", periods=2, freq="ME"),
        ),
        (pd.date_range("2024-03-30", periods=5, freq="D", tz="Europe/Berlin"), None),
        (pd.DatetimeIndex(["2024-01-01", "2024-01-03"]), pd.DatetimeIndex(["2024-01-05", "2024-01-07"])),
        (pd.period_range("1999", periods=5, freq="Y"), pd.period_range("2004", periods=2, freq="Y")),
        (pd.Index([1700, 1701, 1702]), pd.Index([1703, 1704])),
        (pd.Index([0.5, 1.0, 1.5]), pd.Index([2.0, 2.5])),
        (pd.Index(["a", "b"]), pd.RangeIndex(1, 3)),
        (pd.DatetimeIndex(["2024-01-01", "2024-01-03", "2024-01-04", "2024-02-09"]), pd.RangeIndex(1, 3)),
    ],
)
def test_an_index_goes_on_by_its_rule(index, following):
    if following is None:  # a day is a day, whatever the clock does on the 31st
        following = pd.date_range("2024-04-04", periods=2, freq="D", tz="Europe/Berlin")
    assert list(continued(continuation(index), 2)) == list(following)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: expected an integer >= 1"),
        ({"window": 0}, "window: expected an integer >= 1"),
        ({"window": 300}, "216 rows to train on .* are too few: window 300"),
        ({"coverage": 1.5}, "coverage: expected numbers between 0 and 1"),
        ({"target": "quick"}, "target: X has no column 'quick'; it has: slow, fast"),
        ({"known_future": "quick"}, "known_future: X has no column 'quick'"),
        (
            {"target": "slow", "known_future": ["slow"]},
            "target: expected columns that are not in known_future",
        ),
        ({"early_stopping": "maybe"}, "early_stopping: expected True, False or 'auto'"),
        ({"rows": "columns"}, "rows: expected one of auto, steps, samples"),
        ({"rows": "samples"}, "a pandas table's rows are time steps"),
        ({"loss": "pinball"}, "loss: expected one of squared_error"),
    ],
)
def test_options_that_are_refused(waves, options, message):
    with pytest.raises(ValueError, match=message):
        LSTMForecaster(**{**QUICK, **options}).fit(frame(waves))


def test_tables_that_are_refused(waves):
    table = frame(waves)
    forecaster = LSTMForecaster(**QUICK)
    for spoil, message in [
        (lambda t: t[::-1], "its index must grow"),
        (lambda t: t.assign(when=t.index), "column 'when' holds times"),
        (lambda t: t.assign(slow=np.inf), "column 'slow' contains infinity in row 0"),
        (lambda t: t[:0], r"0 sample\(s\)"),
        (lambda t: t.assign(slow=np.nan), "no known value"),
        (lambda t: {"a": t.to_numpy()}, "a dict must hold pandas tables, got ndarray"),
        (lambda t: t["slow"].to_numpy(), "Expected 2D array, got 1D array"),
    ]:
        with pytest.raises(ValueError, match=message):
            forecaster.fit(spoil(table))
    with pytest.raises(ValueError, match="is not numeric: it holds 'a'"):
        LSTMForecaster(target="sky", **QUICK).fit(table.assign(sky=["a", "b"] * 120))
    forecaster.fit(table)
    with pytest.raises(ValueError, match="feature names should match"):
        forecaster.predict(table.rename(columns={"slow": "slower"}))
    with pytest.raises(ValueError, match="a table of 5 rows came; the network reads 24"):
        forecaster.predict(table[:5])
    with pytest.raises(ValueError, match="horizon: expected 1 to 1"):
        forecaster.predict(2)
    with pytest.raises(ValueError, match="future: came, but known_future names no columns"):
        forecaster.predict(future=table)
    with pytest.raises(ValueError, match="no row can be forecast"):
        forecaster.backtest(table, start=240)
    with pytest.raises(ValueError, match="stride >= 1"):
        forecaster.backtest(table, stride=0)
    ends_in_gaps = table.copy()
    ends_in_gaps.loc[:, "slow"] = np.nan
    with pytest.raises(ValueError, match="slow has no known value to start from"):
        LSTMForecaster(predict_change=True, **QUICK).fit(table).predict(ends_in_gaps)
