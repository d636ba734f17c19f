"""Projected, normalised, clipped and other forms of the recurrent layers, against hand-written NumPy loops."""

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops
from numlstm.autograd import GradientTape
from numlstm.kernels import cells

B, T, I, H, P = 3, 7, 5, 6, 4


@pytest.fixture
def on_reference():
    with nl.use_backend("reference"):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normal(*parts):
    """The parts normalised jointly over their columns."""
    joined = np.concatenate(parts, -1)
    joined = (joined - joined.mean(-1, keepdims=True)) / np.sqrt(joined.var(-1, keepdims=True) + 1e-3)
    return np.split(joined, len(parts), -1)


def held(x, limit):
    return x if limit is None else np.clip(x, -limit, limit)


def products(layer, w, x, h):
    """Input's and recurrent product, normalised if the layer does so, the input's with the bias."""
    a, b = x @ w["kernel"], h @ w["recurrent_kernel"]
    if layer.layer_norm:
        a, b = normal(a)[0] * w["kernel_gamma"], normal(b)[0] * w["recurrent_gamma"]
    return a, b


ACTIVATIONS = {
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "softsign": lambda x: x / (1 + abs(x)),
    "scaled_tanh(alpha=1.5, beta=0.7)": lambda x: 1.5 * np.tanh(0.7 * x),
    "hard_sigmoid(alpha=0.2, beta=0.4)": lambda x: np.clip(0.2 * x + 0.4, 0, 1),
    "leaky_relu(alpha=0.1)": lambda x: np.where(x > 0, x, 0.1 * x),
}


def lstm(layer, w, x, h, c):
    squash, gate, out = (
        lambda v, name=name: ACTIVATIONS[name](held(v, layer.clip))
        for name in (
            layer.activation,
            layer.recurrent_activation,
            layer.output_activation or layer.activation,
        )
    )
    a, b = products(layer, w, x, h)
    parts = dict(zip(layer.cell.gates, np.split(a + b + w["bias"], len(layer.cell.gates), -1), strict=True))
    p = {g: w.get(f"p_{g}", 0.0) for g in "ifo"}
    if "i" in parts:
        i = gate(parts["i"] + p["i"] * c)
    if "f" in parts:
        f = gate(parts["f"] + p["f"] * c)
    i, f = (i if "i" in parts else 1 - f), (f if "f" in parts else 1 - i)
    c = held(f * c + i * squash(parts["g"]), layer.cell_clip)
    shown = normal(c)[0] * w["cell_gamma"] + w["cell_beta"] if layer.layer_norm else c
    h = gate(parts["o"] + p["o"] * c) * out(shown)
    return (h @ w["projection"] if layer.projection else h), c


def gru(layer, w, x, h):
    gate, squash = (lambda v: sigmoid(held(v, layer.clip))), (lambda v: np.tanh(held(v, layer.clip)))
    if not layer.reset_after:
        r, z, n = np.split(w["recurrent_kernel"], 3, -1)
        a, hr, hz, through = x @ w["kernel"], h @ r, h @ z, lambda v: v @ n
        if layer.layer_norm:  # the gates' product jointly, the candidate's by itself
            gr, gz, gn = np.split(w["recurrent_gamma"], 3)
            a, (hr, hz) = normal(a)[0] * w["kernel_gamma"], normal(hr, hz)
            hr, hz, through = hr * gr, hz * gz, lambda v: normal(v @ n)[0] * gn
        xr, xz, xn = np.split(a + w["bias"], 3, -1)
        z, r = gate(xz + hz), gate(xr + hr)
        new = squash(xn + through(r * h))
    else:
        a, b = products(layer, w, x, h)
        (xr, xz, xn), (hr, hz, hn) = np.split(a + w["bias"][0], 3, -1), np.split(b + w["bias"][1], 3, -1)
        z = gate(xz + hz)
        new = squash(xn + gate(xr + hr) * hn)
    return (held((1 - z) * new + z * h, layer.cell_clip),)


def elman(layer, w, x, h):
    a, b = products(layer, w, x, h)
    return (held(ACTIVATIONS[layer.activation](held(a + b + w["bias"], layer.clip)), layer.cell_clip),)


def indrnn(layer, w, x, h):
    a = x @ w["kernel"]
    if layer.layer_norm:
        a = normal(a)[0] * w["kernel_gamma"]
    return (held(np.maximum(a + w["bias"] + w["recurrent_kernel"] * h, 0), layer.cell_clip),)


def slstm(layer, w, x, h, c, n, m):
    a, b = products(layer, w, x, h)
    i, f, z, o = np.split(a + b + w["bias"], 4, -1)
    log_f = -np.log1p(np.exp(-f))
    new = np.maximum(log_f + m, i)
    i, f = np.exp(i - new), np.exp(log_f + m - new)
    c, n = f * c + i * np.tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, new


STEPS = {nl.LSTM: lstm, nl.GRU: gru, nl.SimpleRNN: elman, nl.IndRNN: indrnn, nl.SLSTM: slstm}
BY_NAME = {
    "coupled": "input",
    "peephole": True,
    "activation": "scaled_tanh(alpha=1.5, beta=0.7)",
    "recurrent_activation": "hard_sigmoid(alpha=0.2, beta=0.4)",
    "output_activation": "softsign",
    "clip": 0.9,
}
# On the cpu only cells that the gradient matrix compiles too, each by its numbers; on the reference all and everything.
ON_CPU = [
    (nl.LSTM, {"projection": P}),
    (nl.LSTM, {"layer_norm": True}),
    (nl.LSTM, BY_NAME),
    (nl.GRU, {"reset_after": False}),
    (nl.GRU, {"layer_norm": True}),
    (nl.GRU, {"clip": 0.7, "cell_clip": 0.4}),
    (nl.SimpleRNN, {"layer_norm": True}),
    (nl.SimpleRNN, {"clip": 0.9, "cell_clip": 0.6, "activation": "leaky_relu(alpha=0.1)"}),
    (nl.IndRNN, {}),
    (nl.SLSTM, {}),
]
VARIANTS = [
    *ON_CPU,
    (nl.LSTM, {"clip": 0.6}),
    (nl.LSTM, {"projection": P, "peephole": True, "cell_clip": 0.3, "clip": 0.8}),
    (nl.LSTM, {"layer_norm": True, "projection": P, "peephole": True}),
    (nl.LSTM, {"coupled": True, "output_activation": "softsign", "clip": 0.8}),
    (nl.GRU, {"reset_after": False, "clip": 0.5, "cell_clip": 0.2}),
    (nl.GRU, {"reset_after": False, "layer_norm": True, "clip": 0.5}),
    (nl.IndRNN, {"layer_norm": True, "cell_clip": 0.5}),
    (nl.SLSTM, {"layer_norm": True}),
]


def loop(layer, w, x, mask=None, states=None, keep=None, fed=lambda t, h: h):
    """Every h and the last states; `fed` turns h into what the recurrent product reads at step t."""
    if states is None:
        states = [np.zeros((len(x), width)) for width in layer.state_widths]
    ys = []
    for t in range(x.shape[1]):
        new = STEPS[type(layer)](layer, w, x[:, t], fed(t, states[0]), *states[1:])
        if keep is not None:
            new = [z * s + (1 - z) * n for z, s, n in zip(keep, states, new, strict=True)]
        valid = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        states = [np.where(valid, n, s) for n, s in zip(new, states, strict=True)]
        ys.append(states[0])
    return np.stack(ys, 1), states


def made(cls, x, units=H, **options):
    """A layer with weights that are not the tidy initial ones, and these weights by name, in float64."""
    nl.set_seed(0)
    own = (options.pop("cell"),) if "cell" in options else ()
    layer = cls(*own, units, **{"return_sequences": True, **options})
    layer.ensure_built(x.shape)
    generator = np.random.default_rng(2)
    layer.set_weights([generator.standard_normal(w.shape) * 0.8 for w in layer.weights])
    return layer, {w.name: w.numpy().astype(np.float64) for w in layer.weights}


def close(a, b, rtol=2e-5, atol=3e-6):
    np.testing.assert_allclose(np.asarray(a), b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_numbers(on_reference, x, holes, cls, options):
    numbers(x, holes, cls, options)


@pytest.mark.parametrize(("cls", "options"), ON_CPU, ids=str)
def test_numbers_on_the_cpu(x, holes, cls, options):
    with nl.use_backend("cpu"):
        numbers(x, holes, cls, options)


def numbers(x, holes, cls, options):
    layer, w = made(cls, x, return_state=True, **options)
    for mask in (None, holes):
        ys, states = loop(layer, w, x, mask)
        results = layer(x, mask=mask)
        for ours, theirs in zip(results, (ys, *states), strict=True):
            close(ours, theirs)
        assert [y.shape for y in results] == layer.compute_output_shape(x.shape)
    if layer.cell_clip is not None:
        assert np.abs(states[-1]).max() == layer.cell_clip  # the limit was reached


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_states_given_backwards_and_zoneout(on_reference, x, holes, cls, options):
    layer, w = made(cls, x, go_backwards=True, zoneout=0.3, return_state=True, **options)
    generator = np.random.default_rng(5)
    given = [np.abs(generator.standard_normal((B, n))) + 0.1 for n in layer.state_widths]
    keep = [0.3] * len(given)
    ys, states = loop(layer, w, x[:, ::-1], holes[:, ::-1], given, keep)
    for ours, theirs in zip(layer(x, initial_state=given, mask=holes), (ys, *states), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_stateful_streamed_saved_and_both_ways(on_reference, x, holes, cls, options, tmp_path):
    layer, w = made(cls, x, stateful=True, **options)
    ys, states = loop(layer, w, x)
    close(layer(x[:, :3]), ys[:, :3])
    close(layer(x[:, 3:]), ys[:, 3:])
    assert [s.shape for s in layer.states] == [s.shape for s in states]
    layer.reset_states()

    model = nl.Sequential([layer])
    stream = model.stream(batch_size=B)
    for t in range(T):
        close(stream.step(x[:, t]), ys[:, t])
    assert [s.shape for s in stream.states[0]] == [s.shape for s in states]
    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    layer.reset_states()
    assert np.array_equal(again(x).numpy(), layer(x).numpy())
    assert [w.name for w in again.weights] == [w.name for w in layer.weights]

    both = nl.Bidirectional(cls(H, return_sequences=True, return_state=True, **options))
    y, *last = both(x, mask=holes)
    forward, backward = (
        {v.name: v.numpy().astype(np.float64) for v in one.weights}
        for one in (both.forward_layer, both.backward_layer)
    )
    a, first = loop(layer, forward, x, holes)
    b, second = loop(layer, backward, x[:, ::-1], holes[:, ::-1])
    close(y, np.concatenate([a, b[:, ::-1]], -1) * holes[..., None])
    for ours, theirs in zip(last, (*first, *second), strict=True):
        close(ours, theirs)
    assert both.compute_output_shape(x.shape)[0] == y.shape == (B, T, 2 * layer.output_units)


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_in_pieces_the_bits_are_the_same(on_reference, x, holes, cls, options):
    found = []
    for steps in (None, 2, 100):
        layer, _ = made(cls, x, remat_steps=steps, dropout=0.3, zoneout=0.3, return_state=True, **options)
        assert not steps or f"every {steps} steps" in nl.explain(layer, print_fn=lambda _: None)[0]["why"]
        nl.set_seed(6)
        with GradientTape() as tape:
            results = layer(x, mask=holes, training=True)
            loss = sum((r * r).sum() for r in results)
        gradients = tape.gradient(loss, layer.trainable_weights)
        found.append(([r.numpy() for r in results], gradients))
        plain = layer(x).pop(0).numpy()  # nothing is recorded, so nothing is computed twice
        assert plain.shape == (B, T, layer.output_units)
    for results, gradients in found[1:]:
        for a, b in zip(results, found[0][0], strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(gradients, found[0][1], strict=True):
            close(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


# Weights


@pytest.mark.parametrize(
    ("make", "names", "shapes"),
    [
        (
            lambda: nl.LSTM(H, projection=P, peephole=True),
            ["kernel", "recurrent_kernel", "bias", "projection", "p_i", "p_f", "p_o"],
            [(I, 4 * H), (P, 4 * H), (4 * H,), (H, P), (H,), (H,), (H,)],
        ),
        (
            lambda: nl.LSTM(H, projection=P, peephole=True, coupled="input", layer_norm=True),
            ["kernel", "recurrent_kernel", "bias", "projection", "kernel_gamma", "recurrent_gamma",
             "cell_gamma", "cell_beta", "p_i", "p_o"],
            [(I, 3 * H), (P, 3 * H), (3 * H,), (H, P), (3 * H,), (3 * H,), (H,), (H,), (H,), (H,)],
        ),
        (
            lambda: nl.LSTM(H, layer_norm=True, use_bias=False),
            ["kernel", "recurrent_kernel", "kernel_gamma", "recurrent_gamma", "cell_gamma"],
            [(I, 4 * H), (H, 4 * H), (4 * H,), (4 * H,), (H,)],
        ),
        (
            lambda: nl.GRU(H, layer_norm=True),
            ["kernel", "recurrent_kernel", "bias", "kernel_gamma", "recurrent_gamma"],
            [(I, 3 * H), (H, 3 * H), (2, 3 * H), (3 * H,), (3 * H,)],
        ),
        (
            lambda: nl.GRU(H, reset_after=False),
            ["kernel", "recurrent_kernel", "bias"],
            [(I, 3 * H), (H, 3 * H), (3 * H,)],
        ),
        (lambda: nl.IndRNN(H), ["kernel", "recurrent_kernel", "bias"], [(I, H), (H,), (H,)]),
        (
            lambda: nl.IndRNN(H, layer_norm=True),
            ["kernel", "recurrent_kernel", "bias", "kernel_gamma"],
            [(I, H), (H,), (H,), (H,)],
        ),
        (lambda: nl.SLSTM(H), ["kernel", "recurrent_kernel", "bias"], [(I, 4 * H), (H, 4 * H), (4 * H,)]),
    ],
)  # fmt: skip
def test_weights_have_names_shapes_and_order(make, names, shapes):
    layer = make()
    layer.build((None, None, I))
    assert [w.name for w in layer.weights] == names and [w.shape for w in layer.weights] == shapes
    for w in layer.weights:  # gains start at one, what is added at zero
        if w.name.endswith("gamma"):
            assert (w.numpy() == 1).all()
        if w.name in ("cell_beta", "p_i", "p_o"):
            assert (w.numpy() == 0).all()


@pytest.mark.parametrize(
    ("make", "at", "value"),
    [
        (lambda: nl.LSTM(H, layer_norm=True), 1, 1.0),
        (lambda: nl.LSTM(H, projection=P), 1, 1.0),
        (lambda: nl.LSTM(H, coupled="input"), 0, -1.0),
        (lambda: nl.SLSTM(H), 1, 1.0),
    ],
)
def test_what_is_forgotten_starts_small(make, at, value):
    layer = make()
    layer.build((None, None, I))
    bias = np.split(layer.bias.numpy(), len(layer.cell.gates))
    assert all((part == (value if k == at else 0)).all() for k, part in enumerate(bias))


def test_the_recurrent_weights_of_an_indrnn_are_uniform_and_can_be_held():
    limit = 2 ** (1 / 20)
    layer = nl.IndRNN(500, recurrent_constraint=nl.constraints.MaxNorm(limit, axis=()))
    layer.build((None, None, I))
    u = layer.recurrent_kernel.numpy()
    assert 0 <= u.min() < 0.02 and 0.98 < u.max() <= 1
    held = layer.recurrent_kernel.constraint(np.linspace(-3, 3, 500, dtype=np.float32))
    assert abs(held).max() == pytest.approx(limit, rel=1e-5) and held[300] == pytest.approx(
        0.6072144, rel=1e-5
    )


def test_projection_has_options_of_its_own(x):
    layer = nl.LSTM(
        H, projection=P, projection_initializer="ones", projection_regularizer="l2",
        projection_constraint="non_neg",
    )  # fmt: skip
    layer(x)
    kernel = layer.weights[3]
    assert (kernel.numpy() == 1).all() and kernel.regularizer and kernel.constraint
    assert len(layer.losses) == 1 and float(layer.losses[0]) == pytest.approx(0.01 * H * P)


# Cell states of all steps


@pytest.mark.parametrize("options", [{}, {"remat_steps": 3}, {"projection": P}], ids=str)
@pytest.mark.parametrize("cls", [nl.LSTM, nl.SLSTM])
def test_cell_sequence_and_its_gradient(on_reference, x, holes, cls, options):
    if cls is nl.SLSTM and "projection" in options:
        options = {"layer_norm": True}
    layer, _ = made(cls, x, return_cell_sequence=True, **options)
    with GradientTape() as tape:
        _, cs = layer(x, mask=holes)
        loss = (cs[:, 2] * cs[:, 5]).sum()
    found = tape.gradient(loss, layer.trainable_weights)
    assert cs.shape == (B, T, H) == layer.compute_output_shape(x.shape)[1]
    double = cls(H, return_cell_sequence=True, return_sequences=True, dtype="float64", **options)
    double.ensure_built(x.shape)
    double.set_weights(layer.get_weights())
    generator = np.random.default_rng(1)
    for k, g in enumerate(found):  # along a random direction
        direction = generator.standard_normal(g.shape)
        values = []
        for step in (1e-6, -1e-6):
            moved = [w.copy() for w in double.get_weights()]
            moved[k] = moved[k] + step * direction
            before, _ = double.get_weights(), double.set_weights(moved)
            cs = double(x, mask=holes)[1]
            values.append(float((cs[:, 2] * cs[:, 5]).sum()))
            double.set_weights(before)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((g * direction).sum(), rel=1e-3, abs=1e-4)


# Dropout of the recurrence


@pytest.fixture
def handed(monkeypatch):
    """What layers hand to the sequence, call by call."""
    seen, original = [], ops.recurrent

    def recurrent(**options):
        seen.append(options)
        return original(**options)

    monkeypatch.setattr(ops, "recurrent", recurrent)
    return seen


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("cls", "options"), [(nl.LSTM, {"projection": P}), (nl.GRU, {}), (nl.SLSTM, {})])
def test_recurrent_dropout_of_each_step(on_reference, x, holes, handed, cls, options, backwards):
    layer, w = made(
        cls, x, recurrent_dropout=0.5, recurrent_dropout_per_step=True, go_backwards=backwards, **options
    )
    y = layer(x, mask=holes, training=True)
    mask = handed[0]["recurrent_mask"]
    assert mask.shape == (B, T, layer.output_units) and set(np.unique(mask)) == {0.0, 2.0}
    assert not np.array_equal(mask[:, 0], mask[:, 1])
    if cls is not nl.GRU:  # whose old state is mixed in as it is
        order = np.s_[:, :: -1 if backwards else 1]
        close(y, loop(layer, w, x[order], holes[order], fed=lambda t, h: h * mask[:, t])[0])
    once, _ = made(cls, x, recurrent_dropout=0.5, **options)
    once(x, training=True)
    assert handed[1]["recurrent_mask"].shape == (B, 1, layer.output_units)
    once(x)
    assert handed[2]["recurrent_mask"] is None


@pytest.mark.parametrize("cls", [nl.LSTM, nl.GRU, nl.IndRNN])
def test_dropconnect_thins_out_weights(on_reference, x, cls, handed):
    layer, w = made(cls, x, recurrent_dropconnect=0.4, units=40)
    close(layer(x), loop(layer, w, x)[0], rtol=1e-4, atol=1e-5)  # inference is untouched
    with GradientTape() as tape:
        y = layer(x, training=True)
        loss = (y * y).sum()
    (gradient,) = tape.gradient(loss, [layer.recurrent_kernel])
    used = handed[1]["params"][0] if cls is nl.IndRNN else handed[1]["recurrent_kernel"]
    scale = np.asarray(used) / w["recurrent_kernel"]
    assert set(np.unique(scale.round(4))) == {0.0, 1.6667}
    assert abs((scale == 0).mean() - 0.4) < (0.25 if cls is nl.IndRNN else 0.05)
    assert (gradient[scale == 0] == 0).all() and np.abs(gradient[scale > 0]).max() > 0
    close(y, loop(layer, w | {"recurrent_kernel": np.asarray(used, np.float64)}, x)[0], rtol=1e-4, atol=1e-5)
    layer(x, training=True)
    again = handed[2]["params"][0] if cls is nl.IndRNN else handed[2]["recurrent_kernel"]
    assert not np.array_equal(np.asarray(again), np.asarray(used))  # another draw


# sLSTM


def test_slstm_is_finite_from_zeros_and_where_nothing_is_valid(on_reference):
    layer = nl.SLSTM(H, return_sequences=True, return_state=True)
    x = np.random.default_rng(0).standard_normal((B, T, I)).astype(np.float32) * 30  # exponents of about 100
    mask = np.ones((B, T), bool)
    mask[1] = False
    with GradientTape() as tape:
        layer.ensure_built(x.shape)
        results = layer(x, mask=mask)
        loss = sum((r * r).sum() for r in results[:2])
    assert all(np.isfinite(r.numpy()).all() for r in results)
    assert all((np.asarray(r)[1] == 0).all() for r in results)  # the row keeps its initial states
    assert all(np.isfinite(g).all() for g in tape.gradient(loss, layer.trainable_weights))


def test_slstm_without_its_stabiliser_is_the_same(on_reference, x):
    layer, w = made(nl.SLSTM, x)
    h, c, n = (np.zeros((B, H)) for _ in range(3))
    for t in range(T):
        i, f, z, o = np.split(x[:, t] @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4, -1)
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
    close(layer(x)[:, -1], h)


# Cells of one's own with the words that look across units


@nl.cell(gates="zng", state=("h", "m"), recurrent="zn")
def reset_first(z, g, h, m, decay):
    z = nl.sigmoid(z)
    m = decay * m + nl.tanh(preactivation("n", z * h)) + g  # noqa: F821
    return normalize(m), m  # noqa: F821


@nl.cell(gates="ab", state=("h",), recurrent=())
def memoryless(a, b):
    return nl.tanh(a) * b


@nl.cell(gates="ab", state=("h", "m"), recurrent="a")
def narrowed(a, b, m):
    m = nl.sigmoid(a) * m + nl.tanh(b)
    return project(m), m  # noqa: F821


def test_a_second_product_normalised_values_and_gates_that_see_the_input_only(on_reference, x):
    layer, w = made(nl.RNN, x, cell=reset_first)
    assert w["kernel"].shape == (I, 3 * H) and w["recurrent_kernel"].shape == (H, 2 * H)
    h, m = np.zeros((B, H)), np.zeros((B, H))
    rz, rn = np.split(w["recurrent_kernel"], 2, -1)
    for t in range(T):
        z, n, g = np.split(x[:, t] @ w["kernel"] + w["bias"], 3, -1)
        m = w["decay"] * m + np.tanh(n + (sigmoid(z + h @ rz) * h) @ rn) + g
        h = normal(m)[0]
    close(layer(x)[:, -1], h)
    again = nl.layers.from_config(nl.layers.to_config(layer))
    assert again.cell is reset_first


def test_a_cell_without_recurrent_product_has_no_weights_for_it(on_reference, x):
    layer, w = made(nl.RNN, x, cell=memoryless)
    assert list(w) == ["kernel", "bias"]
    a, b = np.split(x @ w["kernel"] + w["bias"], 2, -1)
    close(layer(x), np.tanh(a) * b)


def test_a_projection_of_ones_own(on_reference, x):
    layer, w = made(
        nl.RNN, x, cell=narrowed, projection=P, layer_norm=True, cell_clip=0.4, zoneout=(0.1, 0.3)
    )
    assert list(w) == ["kernel", "recurrent_kernel", "bias", "projection", "kernel_gamma", "recurrent_gamma"]
    h, m = np.zeros((B, P)), np.zeros((B, H))
    for t in range(T):
        from_x = normal(x[:, t] @ w["kernel"])[0] * w["kernel_gamma"] + w["bias"]
        a, b = np.split(from_x, 2, -1)
        new = sigmoid(a + normal(h @ w["recurrent_kernel"])[0] * w["recurrent_gamma"]) * m + np.tanh(b)
        h = 0.1 * h + 0.9 * np.clip(new @ w["projection"], -0.4, 0.4)
        m = 0.3 * m + 0.7 * np.clip(new, -0.4, 0.4)
    close(layer(x)[:, -1], h)
    again = nl.layers.from_config(nl.layers.to_config(layer))
    assert again.cell is narrowed and again.equations == layer.equations != again.cell


# Activations with parameters


def test_activations_with_parameters(on_reference, x):
    layer, w = made(nl.SimpleRNN, x, activation="leakyRelu(alpha=.1)")
    assert layer.activation == "leaky_relu(alpha=0.1)"
    h = np.zeros((B, H))
    for t in range(T):
        a = x[:, t] @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"]
        h = np.where(a > 0, a, 0.1 * a)
    close(layer(x)[:, -1], h)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("leaky_relu(alpha=0.1)", lambda x: np.where(x > 0, x, 0.1 * x)),
        ("elu(alpha=0.5)", lambda x: np.where(x > 0, x, 0.5 * np.expm1(x))),
        ("hard_sigmoid(alpha=0.2, beta=0.4)", lambda x: np.clip(0.2 * x + 0.4, 0, 1)),
        ("hard_sigmoid(beta=0.4)", lambda x: np.clip(x / 6 + 0.4, 0, 1)),
        ("affine(alpha=2, beta=1)", lambda x: 2 * x + 1),
        ("scaled_tanh(alpha=1.5, beta=0.5)", lambda x: 1.5 * np.tanh(0.5 * x)),
        ("thresholded_relu(alpha=0.7)", lambda x: np.where(x > 0.7, x, 0)),
        ("thresholded_relu()", lambda x: np.where(x > 1, x, 0)),
    ],
)
def test_a_layer_and_a_cell_mean_the_same_by_a_name(name, function, tmp_path):
    points = np.linspace(-3.05, 3.05, 40)
    close(nl.activations.get(name)(nl.Tensor(points)), function(points), rtol=1e-12, atol=1e-15)
    in_cell = cells.activation_function(nl.activations.name_of(name))
    close([in_cell(float(p)) for p in points], function(points), rtol=1e-12, atol=1e-15)
    model = nl.Sequential([nl.Dense(3, name, input_shape=(4,)), nl.Activation(name)])
    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    sample = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert np.array_equal(again(sample).numpy(), model(sample).numpy())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaky(alpha=1)", "unknown activation 'leaky'"),
        ("tanh(alpha=1)", r"tanh has no parameters, got 'tanh\(alpha=1\)'; those that have: affine, elu"),
        ("elu(beta=1)", r"elu has no parameter 'beta', got 'elu\(beta=1\)'; known: alpha"),
        ("elu(alpha=x)", "alpha: expected a finite number, got 'x'"),
        ("elu(alpha=inf)", "alpha: expected a finite number, got 'inf'"),
        ("elu(0.5)", "elu has no parameter '0.5'"),
        ("elu(alpha=1", "expected a name such as"),
    ],
)
def test_bad_parameters(name, message):
    for use in (nl.activations.get, lambda n: nl.LSTM(3, n), lambda n: nl.Dense(3, n)):
        with pytest.raises(ValueError, match=message):
            use(name)


# Options that make no sense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nl.LSTM(4, projection=0), "projection: expected an integer of at least 1, got 0"),
        (lambda: nl.GRU(4, projection=2), "unknown option 'projection'"),
        (lambda: nl.LSTM(4, coupled="forget"), "coupled: expected True, False or 'input', got 'forget'"),
        (lambda: nl.LSTM(4, output_activation="softmax"), "softmax"),
        (lambda: nl.LSTM(4, clip=0), "clip: expected a finite number above 0, or None, got 0"),
        (lambda: nl.GRU(4, cell_clip=-1.0), "cell_clip: expected a finite number above 0"),
        (lambda: nl.SimpleRNN(4, clip=np.nan), "clip: expected a finite number above 0"),
        (lambda: nl.SLSTM(4, cell_clip=1.0), "cell_clip: the cell of an sLSTM .* expected None, got 1.0"),
        (lambda: nl.GRU(4, recurrent_dropconnect=1.0), "recurrent_dropconnect: expected a number from 0"),
        (lambda: nl.LSTM(4, remat_steps=0), "remat_steps: expected an integer of at least 1, got 0"),
        (lambda: nl.IndRNN(4, recurrent_dropout=0.1), "recurrent_dropout: the cell indrnn has no recurrent"),
        (lambda: nl.RNN(memoryless, 4, recurrent_dropout=0.1), "recurrent_dropout: the cell memoryless has"),
        (lambda: nl.RNN(memoryless, 4, recurrent_dropconnect=0.1), "recurrent_dropconnect: the cell memoryl"),
        (lambda: nl.RNN(narrowed, 4), "projection: the cell narrowed: expected the number of outputs"),
        (
            lambda: nl.RNN(memoryless, 4, projection=2),
            "projection: the cell memoryless: expected None, got 2",
        ),
        (lambda: nl.RNN(reset_first, 4, layer_norm=True), r"layer_norm: .* has a gate in preactivation\(\)"),
        (
            lambda: nl.Bidirectional(
                nl.LSTM(4, projection=2), "sum", backward_layer=nl.LSTM(4, go_backwards=True)
            ),
            "merge_mode: 'sum' takes layers of equal units, got 2 and 4",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_states_of_a_projected_layer_have_widths_of_their_own(x):
    layer = nl.LSTM(H, projection=P)
    with pytest.raises(ValueError, match=r"initial_state h: expected shape \(3, 4\), got \(3, 6\)"):
        layer(x, initial_state=[np.zeros((B, H))] * 2)
    with pytest.raises(ValueError, match=r"initial_state c: expected shape \(3, 6\), got \(3, 4\)"):
        layer(x, initial_state=[np.zeros((B, P))] * 2)


def test_merging_by_sum_goes_by_the_outputs(on_reference, x):
    forward, backward = nl.LSTM(H, projection=P), nl.GRU(P, go_backwards=True)
    both = nl.Bidirectional(forward, "sum", backward_layer=backward)
    assert both(x).shape == both.compute_output_shape(x.shape) == (B, P)


def test_training_goes_down(x):
    nl.set_seed(0)
    model = nl.Sequential([
        nl.SLSTM(12, return_sequences=True, recurrent_dropconnect=0.1, remat_steps=3),
        nl.IndRNN(12, return_sequences=True),
        nl.IndRNN(12, recurrent_dropconnect=0.1),
        nl.Dense(1),
    ])  # fmt: skip
    model.compile(nl.optimizers.Adam(0.01), "mse")
    history = model.fit(x, x[:, :1, 0], epochs=40, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
