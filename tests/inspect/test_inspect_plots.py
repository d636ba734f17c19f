"""Pictures of gates, gradients and models: what is drawn. How they look is checked by eye."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.inspect import plots, trace

pytest.importorskip("matplotlib")

X = np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    nl.set_seed(0)
    model = nl.Sequential(
        [
            nl.Bidirectional(nl.GRU(4, return_sequences=True), name="both"),
            nl.LSTM(5, name="lstm"),
            nl.Dense(1, activation="tanh"),
        ],
        name="reader",
    )
    model.compile("sgd", "mse")
    model(X)
    return model


def test_gates_are_drawn_as_they_are(model):
    found = trace(model, X, lengths=np.array([12, 7]))
    figure = plots.gates(found, "lstm", row=1)
    panels = {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes if axes.images}
    assert list(panels) == ["i", "f", "g", "o", "h", "c"]
    for name, axes in panels.items():
        drawn = axes.images[0].get_array()
        np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), found[f"lstm/{name}"][1].T)
        low, high = axes.images[0].get_clim()
        assert (low, high) == (0, 1) if name in "ifo" else low == -high
    assert panels["f"].images[0].get_array().mask[:, 7:].all()  # no gates after a row's end


def test_chosen_arrays_units_and_tokens(model):
    found = trace(model, X)
    figure = plots.gates(found, "lstm", names=["c"], units=[3, 1], tokens=list("ab cd\nefghij"), title="t")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), found["lstm/c"][0].T[[3, 1]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["3", "1"]
    assert "".join(t.get_text() for t in axes.get_xticklabels()) == "ab·cd↵efghij"
    for options, message in (
        ({"layer": "x"}, "layer: expected one of both/forward_layer, both/backward_layer, lstm, got 'x'"),
        ({"layer": "lstm", "names": ["z"]}, "names: expected some of h, c, i, f, g, o, got 'z'"),
        ({"row": 2}, "row: expected a number from 0 to 1, got 2"),
        ({"units": [4]}, "units: expected numbers from 0 to 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.gates(found, **options)


def test_gradients_by_state(model):
    found = trace(model, X, np.ones((2, 1), np.float32))
    (axes,) = plots.gradients(found).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert set(lines) == {"both/forward_layer: dh", "both/backward_layer: dh", "lstm: dh", "lstm: dc"}
    expected = nl.inspect.gradient_norms(model, X, np.ones((2, 1), np.float32)).norms["lstm"]
    np.testing.assert_allclose(lines["lstm: dh"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="expected a trace with gradients"):
        plots.gradients(trace(model, X))


def test_a_models_graph_names_every_layer(model):
    class Outer(nl.Model):
        def __init__(self):
            super().__init__(name="outer")
            self.inner, self.head = model, nl.Dense(2, name="head")

        def call(self, x):
            return self.head(self.inner(x))

    figure = plots.model_graph(model)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert "Bidirectional(GRU, 4 units: gates r z n), merged by concat" in texts
    assert "LSTM, 5 units: gates i f g o" in texts and "Dense, tanh" in texts and "(any, 12, 8)" in texts
    assert len([t for t in figure.axes[0].texts if t.get_text() == ""]) == 2  # arrows between three layers
    outer = plots.model_graph(Outer())
    assert len(outer.axes[0].patches) == 5 and not [t for t in outer.axes[0].texts if not t.get_text()]
    with pytest.raises(ValueError, match="expected a model with layers, got LSTM"):
        plots.model_graph(nl.LSTM(2))


def test_saving(model, tmp_path):
    path = plots.save(plots.model_graph(model), tmp_path / "model.svg")
    assert path.read_bytes().startswith(b"<?xml")
