"""Peephole, coupled and clipped LSTM, and zoneout of any layer, against hand-written NumPy loops."""

import itertools

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops

B, T, I, H = 3, 7, 5, 4
FORMS = [
    {"peephole": peephole, "coupled": coupled, "cell_clip": clip}
    for peephole, coupled, clip in itertools.product((False, True), (False, True), (None, 0.3))
]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_step(layer, w, x, h, c):
    """The new h and c, by the equations of the papers."""
    p = dict(zip(layer.cell.params, w[3:], strict=True))
    p_i, p_f, p_o = (p.get(name, np.zeros(H)) for name in ("p_i", "p_f", "p_o"))
    *i, f, g, o = np.split(x @ w[0] + h @ w[1] + w[2], len(layer.cell.gates), axis=1)
    f = sigmoid(f + p_f * c)
    i = 1 - f if layer.coupled else sigmoid(i[0] + p_i * c)
    c = f * c + i * np.tanh(g)
    if layer.cell_clip is not None:
        c = np.clip(c, -layer.cell_clip, layer.cell_clip)
    return sigmoid(o + p_o * c) * np.tanh(c), c


def gru_step(layer, w, x, h):
    xr, xz, xn = np.split(x @ w[0] + w[2][0], 3, axis=1)
    hr, hz, hn = np.split(h @ w[1] + w[2][1], 3, axis=1)
    z = sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * h,)


def elman_step(layer, w, x, h):
    return (np.tanh(x @ w[0] + h @ w[1] + w[2]),)


STEPS = {nl.LSTM: lstm_step, nl.GRU: gru_step, nl.SimpleRNN: elman_step}


def loop(layer, w, x, mask=None, keep=None, state=None):
    """Every h and the last states; `keep` has, for each state, what part of the old one stays, (B, T, H)."""
    states = [np.zeros((len(x), H)) for _ in layer.cell.state] if state is None else list(state)
    ys = []
    for t in range(x.shape[1]):
        new = STEPS[type(layer)](layer, w, x[:, t], *states)
        if keep is not None:
            new = [z[:, t] * s + (1 - z[:, t]) * n for z, s, n in zip(keep, states, new, strict=True)]
        valid = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        states = [np.where(valid, n, s) for n, s in zip(new, states, strict=True)]
        ys.append(states[0])
    return np.stack(ys, 1), states


def made(cls, x, **options):
    """A layer with weights that are not the tidy initial ones, and these weights in float64."""
    nl.set_seed(0)
    layer = cls(H, **{"return_sequences": True, **options})
    layer.ensure_built(x.shape)
    generator = np.random.default_rng(2)
    layer.set_weights([generator.standard_normal(w.shape) * 0.8 for w in layer.weights])
    return layer, [w.astype(np.float64) for w in layer.get_weights()]


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=2e-6)


@pytest.fixture
def handed(monkeypatch):
    """The aux arrays that layers hand to the sequence, call by call."""
    seen, original = [], ops.recurrent

    def recurrent(*args, aux=(), **options):
        seen.append([np.asarray(a, np.float64) for a in aux])
        return original(*args, aux=aux, **options)

    monkeypatch.setattr(ops, "recurrent", recurrent)
    return seen


# Peepholes, coupled gates, clipped cells


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers(x, holes, form):
    layer, w = made(nl.LSTM, x, return_state=True, **form)
    for mask in (None, holes):
        ys, states = loop(layer, w, x, mask)
        for ours, theirs in zip(layer(x, mask=mask), (ys, *states), strict=True):
            close(ours, theirs)
    if form["cell_clip"]:
        assert np.abs(states[1]).max() == 0.3  # the limit was reached


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_backwards(x, holes, form):
    layer, w = made(nl.LSTM, x, go_backwards=True, **form)
    close(layer(x, mask=holes), loop(layer, w, x[:, ::-1], holes[:, ::-1])[0])


def test_weights_have_names_shapes_and_order():
    both = nl.LSTM(H, peephole=True)
    both.build((None, None, I))
    assert [w.name for w in both.weights] == ["kernel", "recurrent_kernel", "bias", "p_i", "p_f", "p_o"]
    assert [w.shape for w in both.weights] == [(I, 4 * H), (H, 4 * H), (4 * H,), (H,), (H,), (H,)]
    assert all((w == 0).all() for w in both.get_weights()[3:])
    coupled = nl.LSTM(H, peephole=True, coupled=True, use_bias=False)
    coupled.build((None, None, I))
    assert [w.name for w in coupled.weights] == ["kernel", "recurrent_kernel", "p_f", "p_o"]
    assert coupled.cell.gates == ("f", "g", "o") and coupled.kernel.shape == (I, 3 * H)


@pytest.mark.parametrize("initializer", ["zeros", "normal"])
def test_the_forget_gate_starts_at_one_wherever_it_stands(initializer):
    for coupled, at in ((False, H), (True, 0)):
        layer = nl.LSTM(H, coupled=coupled, bias_initializer=initializer)
        layer.build((None, None, I))
        bias = layer.bias.numpy()
        assert (bias[at : at + H] == 1).all() and bias.shape == ((3 if coupled else 4) * H,)
        assert (np.delete(bias, np.s_[at : at + H]) != 1).all()


def test_without_options_the_cell_is_the_plain_lstm():
    plain = nl.LSTM(H)
    assert plain.cell.name == plain.running_cell().name == "lstm" and plain.cell.params == ()


@pytest.mark.parametrize("clip", [0, -1.0, np.nan, np.inf, "3", True])
def test_bad_clips(clip):
    with pytest.raises(ValueError, match="cell_clip: expected a finite number above 0, or None, got"):
        nl.LSTM(4, cell_clip=clip)


# Zoneout


@pytest.mark.parametrize(
    ("cls", "rates"),
    [(nl.LSTM, 0.3), (nl.LSTM, (0.05, 0.5)), (nl.LSTM, [0.0, 0.5]), (nl.GRU, 0.4), (nl.SimpleRNN, (0.4,))],
)
def test_zoneout_in_inference_mixes_by_the_rate(x, holes, cls, rates):
    layer, w = made(cls, x, zoneout=rates, return_state=True)
    each = rates if isinstance(rates, (list, tuple)) else [rates] * len(layer.cell.state)
    keep = [np.full((B, T, H), rate) for rate in each]
    for mask in (None, holes):
        ys, states = loop(layer, w, x, mask, keep)
        for ours, theirs in zip(layer(x, mask=mask), (ys, *states), strict=True):
            close(ours, theirs)
    layer.go_backwards = True
    close(layer(x, mask=holes)[0], loop(layer, w, x[:, ::-1], holes[:, ::-1], keep)[0])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nl.LSTM, {"zoneout": (0.2, 0.6)}),
        (nl.LSTM, {"zoneout": 0.5, "peephole": True, "coupled": True, "cell_clip": 0.5}),
        (nl.GRU, {"zoneout": 0.5}),
        (nl.SimpleRNN, {"zoneout": 0.5}),
    ],
)
def test_zoneout_in_training_keeps_single_units(x, holes, handed, cls, options, backwards):
    layer, w = made(cls, x, go_backwards=backwards, **options)
    y = layer(x, mask=holes, training=True)
    (keep,) = handed
    assert all(k.shape == (B, T, H) and set(np.unique(k)) == {0.0, 1.0} for k in keep)
    if len(keep) == 2:
        assert not np.array_equal(*keep)  # each state has a mask of its own
    order = np.s_[:, :: -1 if backwards else 1]  # the masks are in the order of processing
    close(y, loop(layer, w, x[order], holes[order], keep)[0])


def test_zoneout_keeps_as_often_as_asked_and_anew_at_each_step(handed):
    layer = nl.LSTM(50, zoneout=(0.1, 0.7))
    z = np.zeros((8, 30, 2), np.float32)
    nl.set_seed(1)
    layer(z, training=True)
    for keep, rate in zip(handed[0], (0.1, 0.7), strict=True):
        assert abs(keep.mean() - rate) < 0.02
        assert abs(keep.mean(axis=1).std() - np.sqrt(rate * (1 - rate) / 30)) < 0.03  # independent steps
    layer(z, training=True)
    assert not np.array_equal(handed[0][0], handed[1][0])


def test_a_seed_repeats_zoneout(x):
    layer, _ = made(nl.GRU, x, zoneout=0.5)
    runs = []
    for _ in range(2):
        nl.set_seed(4)
        runs.append(layer(x, training=True).numpy())
    assert np.array_equal(*runs)


def test_a_state_without_zoneout_has_no_mask(x, handed):
    layer, w = made(nl.LSTM, x, zoneout=(0.5, 0.0))
    y = layer(x, training=True)
    keep = handed[0]
    assert keep[1].shape == (1, 1, 1) and keep[1] == 0
    close(y, loop(layer, w, x, keep=[keep[0], np.zeros((B, T, H))])[0])
    assert nl.LSTM(4, zoneout=(0, 0)).running_cell().name == "lstm"


def test_zoneout_with_other_dropout(x, handed):
    layer, _ = made(nl.LSTM, x, zoneout=0.5, dropout=0.5, recurrent_dropout=0.5)
    a, b = (layer(x, training=True).numpy() for _ in range(2))
    assert a.shape == (B, T, H) and not np.array_equal(a, b) and len(handed[0]) == 2


@pytest.mark.parametrize("options", [{"zoneout": (0.2, 0.4)}, {"peephole": True, "coupled": True}])
def test_stateful(x, options):
    layer, w = made(nl.LSTM, x, stateful=True, **options)
    rates = options.get("zoneout", (0.0, 0.0))
    ys = loop(layer, w, x, keep=[np.full((B, T, H), rate) for rate in rates])[0]
    close(layer(x[:, :3]), ys[:, :3])
    close(layer(x[:, 3:]), ys[:, 3:])


@pytest.mark.parametrize(
    "options", [{"zoneout": (0.2, 0.4)}, {"peephole": True, "cell_clip": 0.2}, {"coupled": True}]
)
def test_streaming(x, options):
    layer, _ = made(nl.LSTM, x, **options)
    model = nl.Sequential([layer, nl.GRU(3, zoneout=0.3)])
    model(x)
    stream = model.stream(batch_size=B)
    for t in range(T):
        close(stream.step(x[:, t]), model.predict(x[:, : t + 1], verbose=0))


def test_a_cell_of_ones_own_in_zoneout(x):
    @nl.cell(gates="ig", state=("h",))
    def written(i, g, h):
        return h + nl.sigmoid(i) * (nl.tanh(g) - h)

    nl.set_seed(0)
    layer = nl.RNN(written, H, zoneout=0.25, return_sequences=True)
    y = layer(x)
    kernel, recurrent, bias = layer.get_weights()
    h = np.zeros((B, H))
    for t in range(T):
        i, g = np.split(x[:, t] @ kernel + h @ recurrent + bias, 2, axis=1)
        h = 0.25 * h + 0.75 * (h + sigmoid(i) * (np.tanh(g) - h))
    close(y[:, -1], h)
    assert layer.cell is written and nl.layers.from_config(nl.layers.to_config(layer)).cell is written


def test_explain_names_the_cell_that_runs(capsys):
    (row,) = nl.explain(nl.LSTM(4, peephole=True, zoneout=0.1))
    assert row["option"] == "lstm_peephole_zoneout"


def test_training_goes_down(x):
    model = nl.Sequential([nl.LSTM(8, peephole=True, cell_clip=3.0, zoneout=0.1), nl.Dense(1)])
    nl.set_seed(0)
    model.compile("adam", "mse")
    history = model.fit(x, x[:, :1, 0], epochs=40, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize(
    ("cls", "rates", "message"),
    [
        (nl.LSTM, 1.0, "zoneout: expected a number from 0 up to, not including, 1, got 1.0"),
        (nl.GRU, -0.1, "zoneout: expected a number"),
        (nl.LSTM, (0.1, 1.5), "zoneout: expected a number.*got 1.5"),
        (nl.LSTM, "0.1", "zoneout: expected a number"),
        (nl.LSTM, [0.1], r"zoneout: expected one rate for all states, or a list of 2 \(h, c\), got 1"),
        (nl.GRU, [0.1, 0.2], r"a list of 1 \(h\), got 2"),
        (nl.SimpleRNN, [], r"a list of 1 \(h\), got 0"),
    ],
)
def test_bad_rates(cls, rates, message):
    with pytest.raises(ValueError, match=message):
        cls(4, zoneout=rates)
