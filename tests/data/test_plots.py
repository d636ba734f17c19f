"""Pictures: what is drawn, and that gaps stay gaps. How they look is checked by eye."""

import numpy as np
import pytest

plots = pytest.importorskip("numlstm.data.plots")
if not plots.available():
    pytest.skip("pictures take matplotlib", allow_module_level=True)


@pytest.mark.parametrize("kind", ["number", "date"])
def test_a_gap_in_time_breaks_the_lines(kind):
    rows = np.array([0, 1, 2, 6, 7])
    times = (
        rows.astype(float)
        if kind == "number"
        else np.datetime64("2020-01-01", "s") + rows * np.timedelta64(86400, "s")
    )
    truth = np.arange(10.0).reshape(5, 2)
    figure = plots.forecast_figure(
        truth, truth + 1, truth - 1, times, target="v", trivial_name="last value", time_name="t"
    )
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(drawn["truth"], [1, 3, 5, np.nan, 7, 9])
    np.testing.assert_array_equal(drawn["LSTM forecast"], [2, 4, 6, np.nan, 8, 10])
    errors = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    np.testing.assert_allclose(errors["LSTM"], [1, 1])


def test_an_interval_is_a_band_that_gaps_break():
    rows = np.array([0.0, 1, 2, 6, 7])
    truth = np.arange(10.0).reshape(5, 2)
    options = {"target": "v", "trivial_name": "last", "time_name": "t"}
    figure = plots.forecast_figure(
        truth, truth, truth, rows, interval=(truth - 2, truth + 3), interval_name="80 %", **options
    )
    (band,) = figure.axes[0].collections
    assert band.get_label() == "80 %"
    assert len(band.get_paths()) == 2  # before the gap, and after it
    top = max(path.vertices[:, 1].max() for path in band.get_paths())
    assert top == truth[-1, -1] + 3
    with pytest.raises(ValueError, match="interval must hold two bounds of shape"):
        plots.forecast_figure(truth, truth, truth, rows, interval=(truth[:, 0], truth), **options)


def test_the_curve_marks_the_best_epoch():
    figure = plots.learning_curve(
        {"loss": [3.0, 2.0, 1.0], "val_loss": [3.0, 1.5, 2.0]},
        title="t",
        unit="nats",
        reference=("5-gram", 1.669),
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.5"]
    assert len(figure.axes[0].lines) == 3


def test_saving(tmp_path):
    figure = plots.learning_curve({"loss": [1.0, 0.5]}, title="t", unit="nats")
    for name, start in (("c.png", b"\x89PNG"), ("c.svg", b"<?xml"), ("c.pdf", b"%PDF")):
        assert plots.save(figure, tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"got 'c\.bmp'"):
        plots.save(figure, tmp_path / "c.bmp")


def test_anomalies_are_marked():
    values = np.arange(20.0).reshape(10, 2)
    figure = plots.anomaly_figure(
        np.arange(10), values, np.ones(10), np.array([3, 7]), names=["load", "rpm"], time_name="minute"
    )
    assert [axes.get_ylabel() for axes in figure.axes] == ["load", "rpm", "surprise"]
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), [7.0, 15.0])
    with pytest.raises(ValueError, match="must fit; got 10"):
        plots.anomaly_figure(
            np.arange(10), values, np.ones(9), np.array([3]), names=["a", "b"], time_name="t"
        )


def test_pictures_that_cannot_be():
    with pytest.raises(ValueError, match="history must hold 'loss'"):
        plots.learning_curve({}, title="t", unit="u")
    with pytest.raises(ValueError, match="one shape"):
        plots.forecast_figure(
            np.zeros((2, 1)),
            np.zeros((2, 2)),
            np.zeros((2, 1)),
            np.zeros(2),
            target="v",
            trivial_name="",
            time_name="",
        )
