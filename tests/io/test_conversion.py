"""The table of gate orders and layouts: against equations written with each library's own order, and back."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.io import conversion

I, H, T = 3, 4, 5
LIBRARIES = [library for library in conversion.GATES if library != "numlstm"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run(kind, order, kernel, recurrent, bias, x):
    """The operator's equations from the libraries' documentation, with gates looked up in `order` by their letters."""
    h, c = np.zeros(H), np.zeros(H)
    block = lambda a, gate: a[..., order.index(gate) * H : (order.index(gate) + 1) * H]
    for t in range(T):
        inputs, fed = x[t] @ kernel + bias[0], h @ recurrent + bias[1]
        both = inputs + fed
        if kind == "LSTM":
            i, f, o = (sigmoid(block(both, g)) for g in "ifo")
            c = f * c + i * np.tanh(block(both, "g"))
            h = o * np.tanh(c)
        elif kind == "GRU":
            r, z = (sigmoid(block(both, g)) for g in "rz")
            h = (1 - z) * np.tanh(block(inputs, "n") + r * block(fed, "n")) + z * h
        else:
            h = np.tanh(both)
    return h


# From the documents, written out once more: torch.nn.LSTM's (W_ii|W_if|W_ig|W_io) and GRU's (W_ir|W_iz|W_in); Keras'
# split into i f c o and z r h; ONNX' W[iofc] and W[zrh].
DOCUMENTED = {
    "torch": {"LSTM": "ifgo", "GRU": "rzn", "RNN": "a"},
    "keras": {"LSTM": "ifgo", "GRU": "zrn", "RNN": "a"},
    "onnx": {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"},
}
LAYERS = {"LSTM": nl.LSTM, "GRU": nl.GRU, "RNN": nl.SimpleRNN}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_of_another_order_give_the_same_sequence(library, kind):
    draw = np.random.default_rng(0)
    order = DOCUMENTED[library][kind]
    kernel, recurrent = (draw.standard_normal((n, len(order) * H)) for n in (I, H))
    bias = draw.standard_normal((2, len(order) * H))
    x = draw.standard_normal((T, I))
    split = {} if kind == "GRU" else {"split_bias": True}
    layer = LAYERS[kind](H, dtype="float64", input_shape=(None, I), **split)
    layer.build((None, None, I))
    if library == "torch":
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = conversion.from_torch(kind, dict(zip(names, (kernel.T, recurrent.T, *bias), strict=True)))
    elif library == "keras":
        weights = conversion.from_keras(kind, [kernel, recurrent, bias])
    else:
        here, theirs = conversion.GATES["numlstm"][kind], conversion.GATES["onnx"][kind]
        weights = [conversion.gate_columns(w.T, theirs, here) for w in (kernel, recurrent)]
        weights.append(np.stack([conversion.reordered(b, theirs, here) for b in bias]))
    layer.set_weights(weights)
    assert np.allclose(layer(x[None]).numpy()[0], run(kind, order, kernel, recurrent, bias, x), atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_there_and_back_keeps_every_bit(kind):
    draw = np.random.default_rng(1)
    gates = len(conversion.GATES["numlstm"][kind])
    torch = {
        "weight_ih": draw.standard_normal((gates * H, I)).astype(np.float32),
        "weight_hh": draw.standard_normal((gates * H, H)).astype(np.float32),
        "bias_ih": draw.standard_normal(gates * H).astype(np.float32),
        "bias_hh": draw.standard_normal(gates * H).astype(np.float32),
    }
    here = dict(zip(("kernel", "recurrent_kernel", "bias"), conversion.from_torch(kind, torch), strict=True))
    back = conversion.to_torch(kind, here)
    assert {k: a.tobytes() for k, a in back.items()} == {k: a.tobytes() for k, a in torch.items()}
    keras = [here["kernel"], here["recurrent_kernel"], here["bias"]]
    again = conversion.from_keras(kind, conversion.to_keras(kind, keras))
    assert [a.tobytes() for a in again] == [a.tobytes() for a in keras]
    for library in LIBRARIES:
        order, ours = conversion.GATES[library][kind], conversion.GATES["numlstm"][kind]
        rows = conversion.gate_rows(here["kernel"], ours, order)
        assert conversion.gate_columns(rows, order, ours).tobytes() == here["kernel"].tobytes()


def test_one_bias_stays_one():
    weights = {"weight_ih": np.ones((8, 3)), "weight_hh": np.ones((8, 2)), "bias_ih": np.arange(8.0)}
    assert conversion.from_torch("LSTM", {**weights, "bias_hh": np.zeros(8)})[2].shape == (8,)
    assert conversion.from_torch("LSTM", {**weights, "bias_hh": np.full(8, -0.0)})[2].shape == (2, 8)


def test_shapes_that_no_module_has():
    good = {"weight_ih": np.ones((8, 3)), "weight_hh": np.ones((8, 2))}
    assert conversion.torch_units(good) == ("LSTM", 2)
    assert conversion.torch_units({**good, "weight_hh": np.ones((8, 1)), "weight_hr": np.ones((1, 2))}) == (
        "LSTM",
        2,
    )
    for change in (
        {"weight_hh": np.ones((8, 4))},
        {"weight_ih": np.ones((6, 3))},
        {"bias_ih": np.ones(8)},
        {"bias_ih": np.ones(4), "bias_hh": np.ones(8)},
        {"weight_hr": np.ones((3, 2))},
    ):
        with pytest.raises(ValueError, match=r"weights: expected those of an nn\.LSTM"):
            conversion.torch_units({**good, **change})


@pytest.mark.parametrize(
    "layer", [nl.LSTM, nl.SimpleRNN, nl.SLSTM, lambda n, **o: nl.GRU(n, reset_after=False, **o)]
)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_split_bias_computes_what_its_sum_does(layer, layer_norm, tmp_path):
    draw = np.random.default_rng(0)
    models = [
        nl.Sequential([layer(3, split_bias=split, layer_norm=layer_norm, input_shape=(None, 2))])
        for split in (True, False)
    ]
    weights = [draw.standard_normal(w.shape).astype(np.float32) for w in models[0].get_weights()]
    models[0].set_weights(weights)
    models[1].set_weights([w.sum(axis=0) if k == 2 else w for k, w in enumerate(weights)])
    x = draw.standard_normal((2, 4, 2)).astype(np.float32)
    split, whole = (m.predict(x, verbose=0) for m in models)
    assert np.array_equal(split, whole)
    stream = models[0].stream(2)
    for t in range(4):
        last = stream.step(x[:, t])
    assert np.allclose(last, whole, atol=1e-6)
    models[0].save(tmp_path / "m.safetensors")
    assert np.array_equal(nl.load(tmp_path / "m.safetensors").predict(x, verbose=0), split)


def test_where_the_forget_gate_starts_with_a_split_bias():
    layer = nl.LSTM(2, split_bias=True)
    layer.build((None, None, 3))
    assert layer.get_weights()[2].tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]
    with pytest.raises(ValueError, match="split_bias: expected False where use_bias is False"):
        nl.LSTM(2, use_bias=False, split_bias=True)
