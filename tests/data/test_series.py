"""A table as a forecasting task: scaling, its inverse, and what it keeps."""

import json

import numpy as np
import pytest

from numlstm.data.series import Series
from numlstm.data.tables import parse_csv, read_csv


def _table(values):
    return parse_csv("v\n" + "\n".join(map(str, values)) + "\n")


@pytest.mark.parametrize("predict", ["change", "value"])
def test_decoding_undoes_encoding(predict):
    table = read_csv("sunspots")
    series = Series.fit(table, "SUNACTIVITY", ["SUNACTIVITY"], rows=200, window=9, horizon=3, predict=predict)
    part = series.windows(table)
    encoded = series.encode(table, part)
    np.testing.assert_allclose(series.decode(encoded, table, part.origin), part.y, atol=1e-4)
    training = series.encode(table, part.part(0, 200))
    assert abs(training.std() - 1) < 0.15  # what the model learns has unit scale
    copy = Series.from_dict(json.loads(json.dumps(series.to_dict())))
    np.testing.assert_array_equal(copy.encode(table, part), encoded)


def test_no_statistic_comes_from_later_rows():
    values = np.random.default_rng(0).normal(size=60)
    wild = np.where(np.arange(60) < 40, values, 1e6)
    options = {"rows": 40, "window": 5, "horizon": 2, "predict": "auto"}
    tame = Series.fit(_table(values), "v", ["v"], **options)
    assert Series.fit(_table(wild), "v", ["v"], **options).to_dict() == tame.to_dict()


def test_auto_forecasts_changes_of_a_slow_series_only():
    random = np.random.default_rng(0)
    slow, noise = np.cumsum(random.normal(size=300)), random.normal(size=300)
    chosen = [
        Series.fit(_table(v), "v", ["v"], rows=300, window=5, horizon=1, predict="auto").predict
        for v in (slow, noise)
    ]
    assert chosen == ["change", "value"]


def test_a_season_that_is_not_known_yet_is_the_last_value():
    table = _table([1, 2, 3, 4, 5, 6])
    series = Series.fit(table, "v", ["v"], rows=6, window=2, horizon=1, season=4)
    trivial = series.trivial(table, np.array([1, 4]))
    assert {name: forecast.tolist() for name, forecast in trivial.items()} == {
        "last value": [[2], [5]],
        "4 rows before": [[2], [2]],
    }


def test_a_constant_series_is_no_division_by_zero():
    table = _table([3] * 20)
    series = Series.fit(table, "v", ["v"], rows=20, window=4, horizon=1)
    assert (series.encode(table, series.windows(table)) == 0).all()


@pytest.mark.parametrize("options, message", [({"predict": "both"}, "'both'"), ({"season": 0}, "season")])
def test_series_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Series.fit(_table(range(20)), "v", ["v"], rows=20, window=4, horizon=1, **options)
