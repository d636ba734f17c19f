"""gradient_norms against numerical derivatives, closed forms, and itself on the other backend."""

import sys

import numpy as np
import pytest

import numlstm as nl
from numlstm.inspect import GradientNorms, gradient_norms

B, T, I, H = 3, 7, 2, 5
DRAW = np.random.default_rng(5)
X, Y = DRAW.standard_normal((B, T, I)), DRAW.standard_normal((B, T, 2))
HOLES = DRAW.random((B, T)) < 0.7
HOLES[1] = True


@nl.cell(gates="fn", state=("h",))
def minimal_gated(f, n, h):
    forget = nl.sigmoid(f)
    return (1.0 - forget) * h + forget * nl.tanh(n)


LAYERS = {
    "lstm": (nl.LSTM, {}),
    "peephole, zoneout": (nl.LSTM, {"peephole": True, "zoneout": 0.3}),
    "coupled, clipped": (nl.LSTM, {"coupled": True, "cell_clip": 0.5}),
    "gru": (nl.GRU, {}),
    "elman": (nl.SimpleRNN, {"activation": "relu"}),
    "backwards": (nl.GRU, {"go_backwards": True}),
    "user's": (lambda units, **o: nl.RNN(minimal_gated, units, **o), {}),
}


def compiled(*layers: nl.Layer, precision: str = "float64", loss: str = "mse") -> nl.Model:
    nl.set_seed(3)
    model = nl.Sequential(list(layers))
    model.compile("sgd", loss, precision=precision)
    return model


def loss_after(
    layer: nl.Layer, dense: nl.Dense, t: int, change: np.ndarray, mask: np.ndarray | None
) -> float:
    """The loss of `layer` (return_sequences, return_state) and `dense` with `change` added to h at step t of
    processing."""
    x, valid = X, np.ones((B, T), bool) if mask is None else mask
    if layer.go_backwards:
        x, valid = x[:, ::-1], valid[:, ::-1]
    turned, layer.go_backwards = layer.go_backwards, False
    try:
        first, h, *others = layer(x[:, : t + 1], mask=valid[:, : t + 1])
        outputs = [first.numpy()[:, :t], (h.numpy() + change)[:, None]]
        if t + 1 < T:
            state = [h.numpy() + change, *others]
            outputs.append(layer(x[:, t + 1 :], initial_state=state, mask=valid[:, t + 1 :])[0].numpy())
    finally:
        layer.go_backwards = turned
    error = (dense(np.concatenate(outputs, axis=1)).numpy() - Y) ** 2
    return float(error.mean(axis=-1)[valid].mean())


@pytest.mark.parametrize("masked", [False, True], ids=["all steps", "mask"])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_derivative_with_respect_to_a_perturbed_state(kind, masked):
    make, options = LAYERS[kind]
    layer, dense = make(H, return_sequences=True, name="r", input_shape=(T, I), **options), nl.Dense(2)
    model = compiled(layer, dense)
    mask = HOLES if masked else None
    found = gradient_norms(model, X, Y, mask=mask)
    layer.return_state = True
    with nl.use_backend("reference"):
        assert found.loss == pytest.approx(loss_after(layer, dense, 0, np.zeros((B, H)), mask), rel=1e-12)
        step = 1e-5
        for t in (0, 3, T - 1):
            gradient = np.zeros((B, H))
            for b, k in np.ndindex(B, H):
                change = np.zeros((B, H))
                change[b, k] = step
                up, down = (loss_after(layer, dense, t, s * change, mask) for s in (1, -1))
                gradient[b, k] = (up - down) / (2 * step)
            expected = np.linalg.norm(gradient, axis=1).mean()
            at = T - 1 - t if layer.go_backwards else t
            assert found.norms["r"][at] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("scale", [0.5, 1.3])
def test_a_linear_elman_cell_has_a_closed_form(scale):
    """h(t) = h(t-1) W + ..., loss from the last h: dLoss/dh(t) = W^(T-1-t) dLoss/dh(T-1)."""
    steps = 40
    layer = nl.SimpleRNN(H, activation="linear", name="r", input_shape=(steps, I))
    model = compiled(layer, nl.Dense(1))
    weight = scale * DRAW.standard_normal((H, H)) / np.sqrt(H)
    layer.recurrent_kernel.assign(weight)
    x, y = DRAW.standard_normal((B, steps, I)), DRAW.standard_normal((B, 1))
    found = gradient_norms(model, x, y).norms["r"]
    dense = model.layers[1].kernel.numpy()
    row = 2 / B * (model.predict(x, verbose=0) - y) @ dense.T
    for t in range(steps - 1, -1, -1):
        assert found[t] == pytest.approx(np.linalg.norm(row, axis=1).mean(), rel=1e-10)
        row = row @ weight.T
    assert found.shape == (steps,) and found.dtype == np.float64


@pytest.mark.parametrize("kind", ["lstm", "peephole, zoneout", "backwards"])  # each is compiled
def test_the_fused_kernels_give_the_same_with_dropout_and_masks(kind):
    make, options = LAYERS[kind]
    found = {}
    for precision in ("float32", "float64"):
        model = compiled(
            make(
                H,
                return_sequences=True,
                dropout=0.3,
                recurrent_dropout=0.4,
                input_shape=(T, I),
                name="a",
                **options,
            ),
            nl.Bidirectional(nl.LSTM(4, recurrent_dropout=0.2), name="both"),
            nl.Dense(1, kernel_regularizer="l2"),
            precision=precision,
        )
        nl.set_seed(9)
        found[precision] = gradient_norms(model, X, Y[:, 0, :1], mask=HOLES, training=True)
    single, double = found["float32"], found["float64"]
    assert list(single.norms) == ["a", "both/forward_layer", "both/backward_layer"]
    assert single.loss == pytest.approx(double.loss, rel=1e-5)
    for path, norms in double.norms.items():
        assert norms.shape == (T,)
        np.testing.assert_allclose(single.norms[path], norms, rtol=1e-4, atol=1e-8)
    # the backward direction's last step is input step 0: nothing comes after it, so its gradient is largest
    assert (
        np.argmax(double.norms["both/backward_layer"])
        < T // 2
        <= np.argmax(double.norms["both/forward_layer"])
    )


def test_the_model_stays_as_it_was_and_frozen_layers_show_too():
    layer = nl.LSTM(H, stateful=True, name="r", input_shape=(T, I))
    model = compiled(layer, nl.Dense(1), precision="float32")
    model.predict(X, verbose=0)
    kept, weights = [s.copy() for s in layer.states], model.get_weights()
    first = gradient_norms(model, X, Y[:, 0, :1])
    np.testing.assert_array_equal(kept, layer.states)
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for variable in layer.weights:
        variable.trainable = False
    again = gradient_norms(model, X, Y[:, 0, :1])
    np.testing.assert_array_equal(first.norms["r"], again.norms["r"])
    assert first.norms["r"].min() > 0
    assert model.train_on_batch(X, Y[:, 0, :1]) > 0  # the tape's marks do not get in the way of training


def test_a_decoder_that_runs_step_by_step():
    """With input feeding every decoder step is a run of its own; their gradients come as one sequence."""
    nl.set_seed(0)
    inner = nl.Seq2Seq(9, 9, 6, input_feeding=True, bidirectional=True)
    source, target = np.array([[3, 4, 5, 6], [5, 4, 6, 3]]), np.array([[1, 7, 8], [1, 6, 5]])

    class OneArray(nl.Model):
        """Source and decoder input side by side, as a batch of training has one array."""

        def __init__(self):
            super().__init__()
            self.inner = inner

        def call(self, x):
            return self.inner([x[:, :4], x[:, 4:]])

    model = OneArray()
    model.compile("adam", nl.losses.SparseCategoricalCrossentropy(from_logits=True))
    labels = np.array([[7, 8, 2], [6, 5, 2]])
    norms = gradient_norms(model, np.concatenate([source, target], axis=1), labels).norms
    layers = {path for path, layer in model.walk() if isinstance(layer, nl.LSTM)}
    assert set(norms) == layers and len(layers) == 3
    assert {len(norms[path]) for path in layers if "decoder" in path} == {3}
    assert {len(norms[path]) for path in layers if "decoder" not in path} == {4}
    assert all((n > 0).all() for n in norms.values())


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = GradientNorms({"a": np.array([0.0, 1e-9, 1.0]), "b": np.array([1e9, 1.0, 1e-3])}, 0.5)
    figure = found.plot(tmp_path / "norms.png", title="two layers")
    assert (tmp_path / "norms.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_title() == "two layers"
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    with pytest.raises(ValueError, match="png"):
        found.plot(tmp_path / "norms.txt")


def test_errors_name_what_is_wrong():
    dense = compiled(nl.Dense(1, input_shape=(I,)))
    with pytest.raises(ValueError, match="no recurrent layer"):
        gradient_norms(dense, X[:, 0], Y[:, 0, :1])
    with pytest.raises(ValueError, match="model: expected a compiled model, got LSTM"):
        gradient_norms(nl.LSTM(2), X, Y)
    with pytest.raises(ValueError, match="the model has not been compiled"):
        gradient_norms(nl.Sequential([nl.LSTM(2)]), X, Y)
    with pytest.raises(ValueError, match="y: no targets"):
        gradient_norms(compiled(nl.LSTM(2)), X)

    class Borrowing(nl.Model):
        def __init__(self):
            super().__init__()
            self.seen, self.hidden = nl.LSTM(2), [nl.LSTM(2)]

        def call(self, x):
            stranger = nl.SimpleRNN(2)
            return self.seen(x) + stranger(x)

    model = Borrowing()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="a sequence of the cell elman"):
        gradient_norms(model, X, Y[:, 0])


def test_matplotlib_is_not_imported_for_the_numbers():
    import subprocess

    code = "import sys, numlstm.inspect; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
