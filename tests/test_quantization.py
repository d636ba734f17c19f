"""Models with int8 weights: every kind of layer, masks, states, streams, files; close to float32; training refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import numlstm as nl
from numlstm.autograd import QuantizedVariable
from numlstm.io.native import describe
from numlstm.quantization import is_quantized, quantized_weights

LENGTHS = [1, 11, 5, 3, 0]


@pytest.fixture(scope="module")
def model() -> nl.Sequential:
    """One of each kind; two directions, several layers one on the other."""
    nl.set_seed(0)
    made = nl.Sequential(
        [
            nl.Embedding(20, 16, input_shape=(None,), name="e"),
            nl.Bidirectional(nl.LSTM(13, return_sequences=True, name="both")),
            nl.GRU(7, return_sequences=True, name="gru"),
            nl.SimpleRNN(50, return_sequences=True, zoneout=0.1, name="simple"),
            nl.LSTM(24, peephole=True, name="last"),
            nl.Dense(6, name="dense"),
        ]
    )
    made.compile("adam", "mse", metrics=["mae"])
    return made


@pytest.fixture(scope="module")
def small(model: nl.Sequential) -> nl.Sequential:
    return model.quantize("int8")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (5, 11))


def test_which_weights_become_int8(model: nl.Sequential, small: nl.Sequential) -> None:
    directions = [f"bidirectional/{d}_layer" for d in ("forward", "backward")]
    found = quantized_weights(small)
    paths = [p for p in found if p not in ("gru", "simple", "last", "dense")]
    assert len(paths) == len(directions) and all(
        p.endswith(("forward_layer", "backward_layer")) for p in paths
    )
    assert all(names == ["kernel", "recurrent_kernel"] for path, names in found.items() if path != "dense")
    assert found["dense"] == ["kernel"]
    kinds = {name: v.dtype.name for name, v in small.named_weights().items()}
    assert kinds["last/kernel"] == "int8" and kinds["last/kernel_scale"] == "float32"
    assert kinds["e/embeddings"] == kinds["last/bias"] == kinds["last/p_i"] == "float32"
    assert not small.trainable_weights and not is_quantized(model) and is_quantized(small)
    assert {v.dtype.name for v in model.weights} == {"float32"} and len(model.trainable_weights) > 10


def test_close_to_float32_with_and_without_lengths(model, small, ids) -> None:
    for options in ({}, {"lengths": LENGTHS}, {"mask": np.arange(11) % 3 != 1 * np.ones((5, 1))}):
        right = model.predict(ids, verbose=0, **options)
        found = small.predict(ids, verbose=0, **options)
        off = np.abs(found - right).max()
        assert 0 < off < 0.03 * np.abs(right).max(), off


def test_the_reference_backend_agrees(small, ids) -> None:
    found = small(ids, lengths=LENGTHS).numpy()
    with nl.use_backend("reference"):
        right = small(ids, lengths=LENGTHS).numpy()
    assert right.dtype == np.float32 and np.allclose(found, right, atol=1e-5)


def test_evaluate_goes_on_with_what_compile_was_told(model, small, ids) -> None:
    y = np.zeros((5, 6), "f")
    assert np.allclose(small.evaluate(ids, y, verbose=0), model.evaluate(ids, y, verbose=0), rtol=0.05)


def test_a_file_is_smaller_and_gives_the_same_bits(model, small, ids, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small.preprocessing = {"vocabulary": ["a"]}
    small.save(path)
    again = nl.load(path)
    assert again.preprocessing == {"vocabulary": ["a"]} and quantized_weights(again) == quantized_weights(
        small
    )
    assert np.array_equal(again.predict(ids, verbose=0), small.predict(ids, verbose=0))
    assert not again.trainable_weights and again.get_weights()[1].dtype == np.int8
    assert describe(path)["format"] == 2 and "dense" in describe(path)["quantized"]
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    model.save(tmp_path / "float.safetensors")
    assert describe(tmp_path / "float.safetensors")["format"] == 1
    with pytest.raises(ValueError, match="fit: this model has int8 weights"):
        again.fit(ids, np.zeros((5, 6)), verbose=0)


def test_a_file_of_a_larger_model_is_a_quarter(tmp_path: Path) -> None:
    model = nl.Sequential([nl.LSTM(128, input_shape=(None, 64)), nl.Dense(64)])
    model.save(tmp_path / "a.safetensors")
    model.quantize().save(tmp_path / "b.safetensors")
    ratio = (tmp_path / "b.safetensors").stat().st_size / (tmp_path / "a.safetensors").stat().st_size
    assert 0.25 < ratio < 0.29


def test_summary_and_explain_say_int8(small) -> None:
    lines: list[str] = []
    small.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "gru (GRU, int8)" in text and "dense (Dense, int8)" in text and "e (Embedding)" in text
    rows = {r["layer"]: r for r in nl.explain(small, print_fn=lines.append)}
    assert rows["gru"]["operation"] == "quantized_sequence" and rows["gru"]["dtype"] == "int8"
    assert rows["gru"]["kernel"] == rows["dense"]["kernel"] == "numlstm.kernels.cpu.quantized"
    assert rows["e"]["dtype"] == "float32" and "int8 weights" in rows["dense"]["why"]
    with nl.use_backend("cpu", strict=True):
        small(np.zeros((1, 2), int))  # no fallback serves


@pytest.fixture(scope="module")
def plain() -> nl.Sequential:
    nl.set_seed(1)
    return nl.Sequential(
        [nl.LSTM(13, return_sequences=True, input_shape=(None, 3)), nl.GRU(7), nl.Dense(2)]
    ).quantize()


def test_a_stream_gives_what_predict_gives(plain) -> None:
    x = np.random.default_rng(0).standard_normal((4, 9, 3)).astype("f")
    stream = plain.stream(4)
    for t in range(9):
        y = stream.step(x[:, t])
    assert np.array_equal(y, plain.predict(x, verbose=0))


def test_states_in_and_out_and_stateful() -> None:
    layer = nl.LSTM(
        13, return_sequences=True, return_state=True, return_cell_sequence=True, input_shape=(None, 3)
    )

    class Opened(nl.Model):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.kept = nl.GRU(7, stateful=True, return_sequences=True)

        def call(self, x, start=None):
            y, h, c, cs = self.layer(x, initial_state=start)
            return [y, h, c, cs, self.kept(y)]

    model, x = Opened(), np.random.default_rng(0).standard_normal((4, 10, 3)).astype("f")
    model(x)
    small = model.quantize()
    assert small.kept.states is None  # kept states are not copied
    whole = [a.numpy() for a in small(x)]
    small.reset_states()
    first = small(x[:, :6])
    second = small(x[:, 6:], start=[first[1], first[2]])
    assert np.array_equal(second[0].numpy(), whole[0][:, 6:]) and np.array_equal(second[1].numpy(), whole[1])
    assert np.array_equal(first[3].numpy(), whole[3][:, :6]) and np.array_equal(second[2].numpy(), whole[2])
    assert np.array_equal(second[4].numpy(), whole[4][:, 6:])
    model.reset_states()
    assert np.abs(model(x)[0].numpy() - whole[0]).max() < 0.02


def test_a_cell_of_ones_own_and_layers_without_a_recurrent_matrix() -> None:
    @nl.cell(gates="ig", state=("h",))
    def leaky_quantized(i, g, h):
        return h + nl.sigmoid(i) * (nl.tanh(g) - h)

    nl.set_seed(0)
    model = nl.Sequential(
        [
            nl.RNN(leaky_quantized, units=9, return_sequences=True, input_shape=(None, 3)),
            nl.IndRNN(8, name="ind"),
        ]
    )
    small, x = model.quantize(), np.random.default_rng(0).standard_normal((2, 6, 3)).astype("f")
    assert quantized_weights(small)[
        "ind_rnn" if "ind_rnn" in quantized_weights(small) else small.layers[1].name
    ] == ["kernel"]
    assert np.abs(small(x).numpy() - model(x).numpy()).max() < 0.03


def test_a_subclass_that_computes_in_its_own_way_stays_float32() -> None:
    class Doubled(nl.Dense):
        def call(self, inputs):
            return nl.ops.matmul(inputs, self.kernel * 2.0)

    model = nl.Sequential([nl.SimpleRNN(4, input_shape=(None, 3)), Doubled(2)])
    small, x = model.quantize(), np.ones((1, 2, 3), "f")
    assert list(quantized_weights(small)) == [model.layers[0].name]
    assert np.abs(small(x).numpy() - model(x).numpy()).max() < 0.05


def test_the_original_stays_as_it_is_and_the_copy_follows_assignments(plain) -> None:
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 2)), nl.Dense(1)])
    before = model.get_weights()
    small, x = model.quantize(), np.ones((1, 3, 2), "f")
    first = small(x).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    weights = small.get_weights()
    assert [w.dtype.name for w in weights] == ["int8", "float32"] * 2 + [
        "float32",
        "int8",
        "float32",
        "float32",
    ]
    small.set_weights(
        [w * 0 if k == 6 else w for k, w in enumerate(weights)]
    )  # the dense scales: packed anew
    assert not small(x).numpy().any()
    small.set_weights(weights)
    assert np.array_equal(small(x).numpy(), first)
    kernel = small.layers[0].kernel
    assert isinstance(kernel, QuantizedVariable)
    with pytest.raises(ValueError, match="kernel: expected values from -127 to 127, got -128"):
        kernel.assign(np.full(kernel.shape, -128, np.int8))
    with pytest.raises(ValueError, match="dtype float32 came, expected int8"):
        kernel.assign(np.zeros(kernel.shape, "f"))


def test_training_is_refused(model, small, ids) -> None:
    y = np.zeros((5, 6), "f")
    for method in (small.fit, small.train_on_batch):
        with pytest.raises(
            ValueError, match=f"{method.__name__}: this model has int8 weights.*train the float32 model"
        ):
            method(ids, y)
    with pytest.raises(ValueError, match="int8 weights compute in float32, got float64"):
        small.compile("adam", "mse", precision="float64")
    layer = nl.Sequential([nl.LSTM(4, input_shape=(None, 3))]).quantize()
    dense = nl.Sequential([nl.Dense(4, input_shape=(3,))]).quantize()
    for one, shape in ((layer, (1, 2, 3)), (dense, (1, 3))):
        with nl.GradientTape() as tape:
            x = nl.Tensor(np.ones(shape, "f"))
            tape.watch(x)
            with pytest.raises(ValueError, match="a tape follows an input of int8 weights"):
                one(x)


def test_cells_of_several_stages() -> None:
    """A second product in the step, and a projection, whose matrix is int8 too."""
    nl.set_seed(0)
    layers = [
        nl.GRU(9, reset_after=False, return_sequences=True, input_shape=(None, 3), name="before"),
        nl.LSTM(8, projection=5, name="projected"),
    ]
    model, x = nl.Sequential(layers), np.random.default_rng(0).standard_normal((2, 6, 3)).astype("f")
    small = model.quantize()
    assert quantized_weights(small)["projected"] == ["kernel", "recurrent_kernel", "projection_kernel"]
    assert np.abs(small(x).numpy() - model(x).numpy()).max() < 0.02
    with nl.use_backend("reference"):
        assert np.abs(small(x).numpy() - model(x).numpy()).max() < 0.02
    stream = small.stream(2)
    for t in range(6):
        y = stream.step(x[:, t])
    assert np.array_equal(y, small(x).numpy())


def test_other_refusals(small) -> None:
    model = nl.Sequential([nl.LSTM(4, input_shape=(None, 3), name="it")])
    with pytest.raises(ValueError, match=r"scheme: expected one of \('int8',\), got 'int4'"):
        model.quantize("int4")
    with pytest.raises(ValueError, match="is quantized already"):
        small.quantize()
    with pytest.raises(ValueError, match="is not built"):
        nl.Sequential([nl.LSTM(4)]).quantize()
    with pytest.raises(ValueError, match="no recurrent or dense layer"):
        nl.Sequential([nl.Embedding(4, 2, input_shape=(3,))]).quantize()
    with pytest.raises(ValueError, match="it: int8 weights compute in float32, got a layer of dtype float64"):
        nl.Sequential([nl.LSTM(4, input_shape=(None, 3), dtype="float64", name="it")]).quantize()
    model.layers[0].kernel.assign(np.full((3, 16), np.nan))
    with pytest.raises(ValueError, match="it/kernel: matrix: expected finite values"):
        model.quantize()


def test_a_trained_character_model_is_within_two_hundredths_of_a_nat() -> None:
    """A few hundred steps on the bundled text: cross-entropy of the next character, float32 and int8."""
    text = np.frombuffer(
        (Path(nl.__file__).parent / "data/files/tinyshakespeare.txt").read_bytes()[:60_000], np.uint8
    )
    codes = np.unique(text, return_inverse=True)[1]
    x, y = (codes[k : k + 1000 * 48].reshape(1000, 48) for k in (0, 1))
    nl.set_seed(0)
    classes = int(codes.max()) + 1
    model = nl.Sequential(
        [
            nl.Embedding(classes, 24, input_shape=(None,)),
            nl.LSTM(64, return_sequences=True),
            nl.Dense(classes),
        ]
    )
    loss = nl.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(nl.optimizers.Adam(0.01), loss)
    model.fit(x[:800], y[:800], epochs=4, batch_size=40, verbose=0)
    right, found = (m.evaluate(x[800:], y[800:], verbose=0) for m in (model, model.quantize()))
    assert 1.5 < right < 2.6 and abs(found - right) < 0.02, (right, found)


def test_int8_weights_stay_int8_whatever_the_precision_of_other_products():
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    model = nl.Sequential([nl.Bidirectional(nl.LSTM(6), input_shape=(5, 4)), nl.Dense(2)])
    quantized = model.quantize("int8")
    right = quantized.predict(x, verbose=0)
    with nl.use_backend(None, precision="bfloat16"):
        assert np.array_equal(quantized(x).numpy(), right)
