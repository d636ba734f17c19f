"""Reading tables, filling gaps, scaling, windows: above all, that nothing looks forward in time."""

import gzip
import json

import numpy as np
import pytest

from numlstm.data.tables import (
    Features,
    Scaler,
    carry_forward,
    default_features,
    forecast_errors,
    parse_csv,
    read_csv,
    split_rows,
    trivial_forecast,
    windows,
)


def test_columns_get_their_kind():
    table = parse_csv("when,value,sky,\n2020-01-05,1,clear,x\n,NA,,y\n2020/1/7 10:30,-3e2, cloudy ,\n")
    assert list(table.columns) == ["when", "value", "sky", "column_4"]
    assert table["when"].astype(str).tolist() == ["2020-01-05T00:00:00", "NaT", "2020-01-07T10:30:00"]
    np.testing.assert_array_equal(table["value"], [1, np.nan, -300])
    assert table["sky"].tolist() == ["clear", "", "cloudy"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_headers(separator):
    table = parse_csv(f"a{separator}b\n1{separator}2\n")
    assert list(table.columns) == ["a", "b"] and table["b"].tolist() == [2]


def test_quoted_cells_and_blank_lines():
    table = parse_csv('a,b\r\n"1","x, y"\r\n\r\n2,z\r\n')
    assert table["a"].tolist() == [1, 2] and table["b"].tolist() == ["x, y", "z"]


def test_gzip_and_bundled_names(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress("\ufeffa\n1\n2\n".encode()))
    assert read_csv(path)["a"].tolist() == [1, 2]
    sunspots = read_csv("sunspots")
    assert len(sunspots) == 309 and sunspots.time_column() == "YEAR"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("a,b\n", "no data rows"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells, but the header names 2"),
        ("a,a\n1,2\n", "'a' more than once"),
        ("1,2\n3,4\n", "must name the columns"),
    ],
)
def test_a_broken_csv_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_csv(text)


def test_a_broken_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="bundled tables: sunspots"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a\n" + b"1\n" * 1000)[:30])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_csv(tmp_path / "cut.gz")
    (tmp_path / "latin.csv").write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_csv(tmp_path / "latin.csv")


def test_asking_a_table_for_what_it_does_not_have():
    table = parse_csv("a,b,c\n1,x,1\n2,y,inf\n")
    with pytest.raises(ValueError, match="no column 'z'; it has: a, b, c"):
        table["z"]
    with pytest.raises(ValueError, match="'b' of the text is not numeric: it holds 'x'"):
        table.numbers("b")
    with pytest.raises(ValueError, match="'c' of the text is infinite in data row 2"):
        table.numbers("c")


def test_time_must_run_forward():
    assert parse_csv("v,day\n1,2020-01-01\n2,2020-01-02\n").time_column() == "day"
    assert parse_csv("v\n1\n2\n").time_column() is None
    assert parse_csv("year,v\n2010,1\n2010,2\n").time_column() is None  # the year of an hourly table
    with pytest.raises(ValueError, match="must grow from row to row, but data row 2"):
        parse_csv("day,v\n2020-01-02,1\n2020-01-01,2\n").time_column()
    with pytest.raises(ValueError, match="neither dates nor numbers"):
        parse_csv("day,v\nMon,1\nTue,2\n").time_column("day")


def test_scaling():
    values = np.array([[1.0, 7.0], [3.0, 7.0], [np.nan, 7.0]])
    scaler = Scaler.fit(values)
    scaled = scaler.transform(values)
    np.testing.assert_allclose(scaled, [[-1, 0], [1, 0], [np.nan, 0]])
    np.testing.assert_allclose(scaler.inverse(scaled), values)
    copy = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(copy.transform(values), scaled)
    with pytest.raises(ValueError, match="column 0 of the training rows has no known value"):
        Scaler.fit(np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match=r"\(rows, features\)"):
        Scaler.fit(np.zeros(3))


def _table(values, sky):
    rows = "".join(f"{'' if np.isnan(v) else v},{s}\n" for v, s in zip(values, sky, strict=True))
    return parse_csv("v,sky\n" + rows)


def test_features_use_training_rows_only_and_the_past_only():
    values = np.array([np.nan, 1.0, np.nan, 3.0, 100.0, np.nan])
    sky = ["a", "b", "a", "b", "c", "a"]
    features = Features.fit(_table(values, sky), ["v", "sky"], rows=4)
    assert features.names == ["v", "v missing", "sky=a", "sky=b"]
    x = features.transform(_table(values, sky))
    np.testing.assert_allclose(x[:, 0], [0, -1, -1, 1, 98, 98])  # mean 2, deviation 1, of the first four
    np.testing.assert_array_equal(x[:, 1], [1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(x[4, 2:], [0, 0])  # "c" was never seen in training
    # Changing the future changes nothing before it.
    later = np.where(np.arange(6) >= 3, 7.0, values)
    np.testing.assert_array_equal(features.transform(_table(later, sky))[:3], x[:3])
    copy = Features.from_dict(json.loads(json.dumps(features.to_dict())))
    np.testing.assert_array_equal(copy.transform(_table(values, sky)), x)
    assert any("3 missing of 6" in note for note in features.notes)


def test_features_that_cannot_be():
    table = parse_csv("a,b,day\n,x,2020-01-01\n1,y,2020-01-02\n")
    with pytest.raises(ValueError, match="no known value in the 1 training rows"):
        Features.fit(table, ["a"], rows=1)
    with pytest.raises(ValueError, match="'day' of the text is not numeric"):
        Features.fit(table, ["day"], rows=2)
    with pytest.raises(ValueError, match="names is empty"):
        Features.fit(table, [], rows=2)
    many = parse_csv("a,b\n" + "".join(f"{i},n{i}\n" for i in range(60)))
    with pytest.raises(ValueError, match="60 different values"):
        Features.fit(many, ["b"], rows=60)


def test_default_features_leave_out_counters_and_constants():
    rows = "".join(f"{i},2020-01-{i + 1:02},{i * i % 7},5,{'ns'[i % 2]},id{i}\n" for i in range(20))
    many = parse_csv("No,day,v,c,wind,name\n" + rows)
    names, notes = default_features(many, "v", 20)
    assert names == ["v", "wind", "name"]  # 20 names can be a category; see below for 51
    assert [note.split(":")[0] for note in notes] == ["No", "day", "c"]


def test_windows_match_a_plain_loop():
    random = np.random.default_rng(0)
    features, target = random.normal(size=(40, 3)).astype(np.float32), random.normal(size=40)
    target[[0, 17, 18]] = np.nan
    x, y, origin = windows(features, target, window=5, horizon=3)
    expected = [o for o in range(4, 37) if not np.isnan(target[o + 1 : o + 4]).any()]
    assert origin.tolist() == expected
    for row, o in enumerate(expected):
        np.testing.assert_array_equal(x[row], features[o - 4 : o + 1])
        np.testing.assert_array_equal(y[row], target[o + 1 : o + 4])


def test_parts_do_not_share_targets():
    values = np.arange(30.0)
    all_windows = windows(values[:, None], values, window=4, horizon=2)
    train, valid = all_windows.part(0, 20), all_windows.part(20, 30)
    assert train.y.max() == 19 and valid.y.min() == 20
    assert valid.x.min() == 16  # inputs may reach back: they are known at that time
    assert all_windows.part(0, 3).x.shape == (0, 4, 1)


@pytest.mark.parametrize(
    "window, horizon, message",
    [(0, 1, "window must be at least 1, got 0"), (1, 0, "horizon"), (9, 2, "10 rows are too few")],
)
def test_windows_that_cannot_be(window, horizon, message):
    with pytest.raises(ValueError, match=message):
        windows(np.zeros((10, 1)), np.zeros(10), window, horizon)


@pytest.mark.parametrize(
    "split, message",
    [
        ((0.5, 0.5), "three"),
        ((0, 0.5, 0.5), "first above 0"),
        ((0.5, 0.2, 0.2), "sum to 1"),
        ((9, 9, 9), "at most 20"),
    ],
)
def test_splits_that_cannot_be(split, message):
    with pytest.raises(ValueError, match=message):
        split_rows(20, split)


def test_trivial_forecasts_know_only_the_past():
    target = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(trivial_forecast(target, np.array([2, 4]), 2), [[2, 2], [5, 5]])
    season = trivial_forecast(target, np.array([1, 4]), 4, season=3)
    np.testing.assert_array_equal(season, [[np.nan, 1, 2, np.nan], [2, 4, 5, 2]])
    for origin in range(6):  # whatever comes after the origin is not used
        changed = np.where(np.arange(6) > origin, -1.0, target)
        args = (np.array([origin]), 5, 2)
        np.testing.assert_array_equal(trivial_forecast(changed, *args), trivial_forecast(target, *args))


def test_errors_in_the_datas_unit():
    errors = forecast_errors(np.array([[1.0, 2.0]]), np.array([[4.0, -2.0]]))
    assert errors == {"rmse": pytest.approx(12.5**0.5), "mae": 3.5}
    with pytest.raises(ValueError, match="one shape"):
        forecast_errors(np.zeros((1, 2)), np.zeros((2, 1)))


def test_carrying_forward():
    np.testing.assert_array_equal(carry_forward(np.array([np.nan, 3, np.nan, 1])), [np.nan, 3, 3, 1])
