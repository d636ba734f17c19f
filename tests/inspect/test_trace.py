"""trace against the equations written out by hand, the fused kernels' own outputs, and the weights' gradients."""

import builtins
import re

import numpy as np
import pytest

import numlstm as nl
from numlstm.inspect import trace, tracing

B, T, I, H = 3, 9, 2, 5
DRAW = np.random.default_rng(7)
X = DRAW.standard_normal((B, T, I)).astype(np.float32)
Y = DRAW.standard_normal((B, T, 1)).astype(np.float32)
HOLES = DRAW.random((B, T)) < 0.7
HOLES[1] = True


def logistic(v):
    return 1 / (1 + np.exp(-v))


@nl.cell(gates="fn", state=("h",))
def traced_minimal(f, n, h):
    forget = nl.sigmoid(f)
    return (1.0 - forget) * h + forget * nl.tanh(n)


@nl.cell(gates="ab", state=("s", "k"))
def traced_twofold(a, b, s, k):
    """Two states and no paper; what `b` becomes has a name of its own, and so has what is between."""
    open_ = named("b", sigmoid(b + k) * 2)  # noqa: F821  (of the cell language)
    inner = named("inner", tanh(a) * open_)  # noqa: F821
    new = 0.5 * k + inner
    return s * 0.25 + tanh(new), new  # noqa: F821


def lstm(a, before, **_):
    c = a["f"] * before["c"] + a["i"] * a["g"]
    return {"h": a["o"] * np.tanh(c), "c": c}


def coupled(a, before, **_):
    c = np.clip(a["f"] * before["c"] + (1 - a["f"]) * a["g"], -0.5, 0.5)
    return {"h": a["o"] * np.tanh(c), "c": c}


def coupled_input(a, before, **_):
    c = (1 - a["i"]) * before["c"] + a["i"] * a["g"]
    return {"h": a["o"] * np.tanh(c), "c": c}


def zoneout(a, before, **_):
    new = lstm(a, before)
    return {name: 0.3 * before[name] + 0.7 * v for name, v in new.items()}


def projected(a, before, layer):
    new = lstm(a, before)
    return new | {"h": new["h"] @ layer.projection_kernel.numpy()}


def normalized(a, before, layer):
    c = a["f"] * before["c"] + a["i"] * a["g"]
    scaled = (c - c.mean(-1, keepdims=True)) / np.sqrt(c.var(-1, keepdims=True) + 1e-3)
    return {"h": a["o"] * np.tanh(scaled), "c": c}  # its gain is one and its bias zero to begin with


def gru(a, before, **_):
    return {"h": (1 - a["z"]) * a["n"] + a["z"] * before["h"]}


def slstm(a, before, **_):
    c, n = a["f"] * before["c"] + a["i"] * a["z"], a["f"] * before["n"] + a["i"]
    return {"h": a["o"] * c / n, "c": c, "n": n}


def twofold(a, before, **_):
    k = 0.5 * before["k"] + a["inner"]
    return {"s": before["s"] * 0.25 + np.tanh(k), "k": k}


CELLS = {
    "lstm": (nl.LSTM, {}, lstm),
    "lstm, peephole": (nl.LSTM, {"peephole": True}, lstm),
    "lstm, coupled, clipped": (nl.LSTM, {"coupled": True, "cell_clip": 0.5, "peephole": True}, coupled),
    "lstm, coupled by input": (nl.LSTM, {"coupled": "input"}, coupled_input),
    "lstm, other activations": (nl.LSTM, {"recurrent_activation": "hard_sigmoid"}, lstm),
    "lstm, zoneout": (nl.LSTM, {"zoneout": 0.3}, zoneout),
    "lstm, projection": (nl.LSTM, {"projection": 3}, projected),
    "lstm, layer norm": (nl.LSTM, {"layer_norm": True}, normalized),
    "gru": (nl.GRU, {}, gru),
    "gru, reset before": (nl.GRU, {"reset_after": False}, gru),
    "gru, layer norm": (nl.GRU, {"layer_norm": True}, gru),
    "gru, layer norm, reset before": (nl.GRU, {"layer_norm": True, "reset_after": False}, gru),
    "simple": (nl.SimpleRNN, {}, lambda a, before, **_: {"h": a["a"]}),
    "independent": (nl.IndRNN, {}, lambda a, before, **_: {"h": a["a"]}),
    "slstm": (nl.SLSTM, {}, slstm),
    "user's": (
        lambda units, **o: nl.RNN(traced_minimal, units, **o),
        {},
        lambda a, before, **_: {"h": (1 - a["f"]) * before["h"] + a["f"] * a["n"]},
    ),
    "user's, two states": (lambda units, **o: nl.RNN(traced_twofold, units, **o), {}, twofold),
}


def scattered(model):
    """Weights that are nowhere zero, peepholes and biases too, but for the gains and shifts of normalisation."""
    for variable in model.weights:
        if "gamma" not in variable.name and "beta" not in variable.name:
            variable.assign(DRAW.normal(0, 0.5, variable.shape))


def made(kind, **options):
    make, own, _ = CELLS[kind]
    nl.set_seed(1)
    model = nl.Sequential(
        [make(H, return_sequences=True, name="r", input_shape=(T, I), **own, **options), nl.Dense(1)]
    )
    model.compile("sgd", "mse")
    scattered(model)
    return model


@pytest.mark.parametrize("kind", CELLS)
def test_gates_and_states_satisfy_the_equations_of_the_paper(kind):
    """From the gates and the old states the new ones follow, as the fused kernel made them."""
    model = made(kind)
    layer = model.layers[0]
    found = trace(model, X, mask=HOLES).layers["r"]
    fused = layer(X, mask=HOLES).numpy()
    output = next(iter(found.states))
    assert np.abs(found.states[output] - fused).max() <= 1e-6
    before = {
        name: np.concatenate([found.initial[name][:, None], a[:, :-1]], axis=1)
        for name, a in found.states.items()
    }
    expected = CELLS[kind][2](found.gates, before, layer=layer)
    for name, values in expected.items():
        carried = np.where(HOLES[..., None], values, before[name])
        np.testing.assert_allclose(found.states[name], carried, rtol=0, atol=1e-6)
    assert all(np.isnan(a[~HOLES]).all() and np.isfinite(a[HOLES]).all() for a in found.gates.values())
    np.testing.assert_array_equal(found.valid, HOLES)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_preactivations_add_up_to_those_of_the_weights(kind):
    model = made(kind)
    layer = model.layers[0]
    found = trace(model, X, Y, mask=HOLES)
    loss, gradients, _ = model.loss_and_gradients(X, Y, mask=HOLES)
    assert found.loss == loss
    of = dict(zip((v.name for v in layer.weights), gradients, strict=False))
    by_gate = np.split(of["kernel"], len(layer.cell.gates), axis=1)
    for gate, expected in zip(layer.cell.gates, by_gate, strict=True):
        named = [n for n in (f"r/d_{gate}", f"r/d_{gate}_x") if n in found]
        assert len(named) == 1
        total = np.einsum("bti,btu->iu", X, found[named[0]])
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)
        assert not found[named[0]][~HOLES].any()


@pytest.mark.parametrize(
    "kind", ["lstm, projection", "gru, reset before", "lstm, zoneout", "user's, two states"]
)
def test_pieces_of_time_give_what_the_whole_gives(kind, monkeypatch):
    model = made(kind, recurrent_dropout=0.3)
    found = []
    for piece in (2**21, 1, B * 20 * 4):
        monkeypatch.setattr(tracing, "PIECE", piece)
        nl.set_seed(3)
        found.append(trace(model, X, Y, mask=HOLES, training=True).layers["r"].gradients)
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, d in other.items():
            np.testing.assert_allclose(d, found[0][name], rtol=1e-4, atol=1e-7)


def test_the_cells_gradient_goes_through_the_forget_gate():
    """dL/dc(t) = dL/dh(t) o (1 - tanh^2 c) + dL/dc(t+1) f(t+1): the constant error carousel, with its gate."""
    found = trace(made("lstm"), X, Y).layers["r"]
    g, a, s = found.gradients, found.gates, found.states
    later = np.zeros_like(g["c"])
    later[:, :-1] = g["c"][:, 1:] * a["f"][:, 1:]
    inner = g["h"] * a["o"] * (1 - np.tanh(s["c"]) ** 2)
    # what is noted at a step has what comes back from later ones, and not yet what h(t) sends into c(t)
    np.testing.assert_allclose(g["c"], later_of(g, a, s, inner), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(g["f"][:, 1:], ((g["c"] + inner) * a["f"] * (1 - a["f"]))[:, 1:] * s["c"][:, :-1],
                               rtol=1e-4, atol=1e-7)  # fmt: skip


def later_of(g, a, s, inner):
    total = g["c"] + inner
    expected = np.zeros_like(total)
    expected[:, :-1] = total[:, 1:] * a["f"][:, 1:]
    return expected


@pytest.mark.parametrize("kind", ["lstm", "gru", "simple", "user's"])
def test_both_directions_are_those_of_the_layers_alone(kind):
    make, own, _ = CELLS[kind]
    nl.set_seed(2)
    both = nl.Bidirectional(make(H, return_sequences=True, name="r", **own), name="both")
    model = nl.Sequential([both, nl.Dense(1)])
    lengths = np.array([T, 4, 1])
    found = trace(model, X, lengths=lengths)
    assert set(found.layers) == {"both/forward_layer", "both/backward_layer"}
    valid = np.arange(T) < lengths[:, None]
    out = both(X, mask=valid).numpy()
    forward, backward = (found[f"both/{d}_layer/h"] for d in ("forward", "backward"))
    merged = np.concatenate([forward, backward], axis=-1)
    np.testing.assert_allclose(np.where(valid[..., None], merged, 0), out, rtol=0, atol=1e-6)
    assert found.layers["both/backward_layer"].backwards
    np.testing.assert_array_equal(found.layers["both/backward_layer"].valid, valid)


def test_the_graph_of_a_model_of_ones_own_and_kept_states():
    model = nl.Sequential([nl.GRU(4, stateful=True, name="g", input_shape=(T, I)), nl.Dense(2)])
    first = trace(model, X)
    assert model.layers[0].states is None  # left as it was
    model.predict(X, verbose=0)
    kept = [np.array(s) for s in model.layers[0].states]
    again = trace(model, X)
    np.testing.assert_array_equal(again.layers["g"].initial["h"], kept[0])
    np.testing.assert_array_equal(model.layers[0].states[0], kept[0])
    assert not np.array_equal(first["g/h"], again["g/h"])
    np.testing.assert_array_equal(again.outputs, model.predict_on_batch(X))


def test_dropout_of_training_is_in_the_trace():
    model = made("lstm", recurrent_dropout=0.5, dropout=0.2)
    nl.set_seed(4)
    found = trace(model, X, Y, training=True).layers["r"]
    nl.set_seed(4)
    np.testing.assert_array_equal(trace(model, X, Y, training=True).layers["r"].gates["f"], found.gates["f"])
    before = np.concatenate([found.initial["c"][:, None], found.states["c"][:, :-1]], axis=1)
    c = found.gates["f"] * before + found.gates["i"] * found.gates["g"]
    np.testing.assert_allclose(found.states["c"], c, rtol=0, atol=1e-6)
    assert not np.allclose(found.gates["f"], trace(model, X).layers["r"].gates["f"])


def test_int8_weights_and_bfloat16_products():
    model = made("lstm")
    small = model.quantize("int8")
    found = trace(small, X).layers["r"]
    np.testing.assert_allclose(found.states["h"], lstm(found.gates, shifted(found))["h"], atol=1e-6)
    np.testing.assert_array_equal(found.states["h"], small.layers[0](X).numpy())
    with nl.use_backend(precision="bfloat16"):
        found = trace(nl.Sequential(model.layers), X).layers["r"]
    np.testing.assert_allclose(found.states["h"], lstm(found.gates, shifted(found))["h"], atol=1e-5)


def shifted(found):
    return {
        n: np.concatenate([found.initial[n][:, None], a[:, :-1]], axis=1) for n, a in found.states.items()
    }


def test_a_layer_that_the_loss_does_not_reach_has_gradients_of_zero():
    class Beside(nl.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.head = nl.LSTM(2), nl.GRU(3), nl.Dense(1)

        def call(self, x):
            self.unused(x)
            return self.head(self.used(x))

    model = Beside()
    model.compile("sgd", "mse")
    found = trace(model, X, Y[:, 0])
    assert found["used/d_h"].any() and not found["unused/d_h"].any() and not found["unused/d_z"].any()
    assert found["unused/d_h"].shape == (B, T, 3)


def test_errors_and_texts():
    model = made("lstm")
    found = trace(model, X)
    with pytest.raises(KeyError, match=r"'r/x' is not in the trace; it has r/h, r/c, r/i"):
        found["r/x"]
    assert repr(found).startswith("Trace(r/h (3, 9, 5), r/c") and "loss" not in repr(found)
    with pytest.raises(ValueError, match="model: expected a model, got LSTM"):
        trace(nl.LSTM(3), X)
    with pytest.raises(ValueError, match="training: expected False"):
        trace(model, X, training=True)
    with pytest.raises(ValueError, match="no recurrent layer"):
        trace(nl.Sequential([nl.Dense(3)]), X)
    with pytest.raises(ValueError, match="has not been compiled"):
        trace(nl.Sequential([nl.LSTM(3)]), X, Y[:, 0])
    two = nl.Sequential([nl.LSTM(3, return_sequences=True, name="a"), nl.LSTM(2, name="b")])
    with pytest.raises(ValueError, match="layer: expected one of a, b, got None"):
        trace(two, X).to_xarray()


def test_without_xarray_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest, **options):
        if name == "xarray":
            raise ImportError("no xarray")
        return real(name, *rest, **options)

    found = trace(made("gru"), X)
    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ImportError, match=re.escape("pip install 'numlstm[xarray]'")):
        found.to_xarray()


@pytest.mark.peers
def test_xarray_has_the_same_arrays_with_named_dimensions():
    pytest.importorskip("xarray")
    model = nl.Sequential(
        [nl.LSTM(4, projection=3, return_sequences=True, name="a"), nl.GRU(6, name="b"), nl.Dense(1)]
    )
    model.compile("sgd", "mse")
    found = trace(model, X, Y[:, 0], mask=HOLES)
    data = found.to_xarray("a")
    assert data["f"].dims == ("batch", "time", "units") and data["h"].dims == ("batch", "time", "outputs")
    assert dict(data.sizes) == {"batch": B, "time": T, "outputs": 3, "units": 4}
    np.testing.assert_array_equal(data["d_c"], found["a/d_c"])
    np.testing.assert_array_equal(data["valid"], HOLES)
    tree = found.to_datatree()
    assert tree["b"]["z"].shape == (B, T, 6)
