"""Keras' files without Keras: recorded ones give the outputs recorded with them, files of ours come back, and what is not
known is refused by its name. (tests/io/test_keras_roundtrip.py asks Keras itself.)"""

import io
import json
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import numlstm as nl
from numlstm.graph import Graph
from numlstm.io import conversion

FILES = Path(__file__).parent / "files"
ANSWERS = np.load(FILES / "answers.npz")


def outputs(model, x):
    found = model(x)
    return [y.numpy() for y in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize(("name", "x"), [("sequential.h5", "x"), ("functional.keras", "ids")])
def test_a_recorded_model_computes_what_keras_did(name, x, tmp_path):
    model = nl.io.load_keras(FILES / name)
    assert isinstance(model, nl.Sequential if name == "sequential.h5" else Graph)
    expected = [ANSWERS[key] for key in ANSWERS.files if key.startswith(f"{name.partition('.')[0]}/")]
    found = outputs(model, ANSWERS[x])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b, atol=1e-5)
    model.save(tmp_path / "m.safetensors")
    for ending in ("keras", "h5", "safetensors"):
        path = tmp_path / f"m.{ending}"
        if ending != "safetensors":
            nl.io.save_keras(model, path)
        again = nl.load(path) if ending == "safetensors" else nl.io.load_keras(path)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(outputs(again, ANSWERS[x]), found, strict=True))


def test_the_configuration_comes_along():
    model = nl.io.load_keras(FILES / "sequential.h5")
    both, steps, lstm = model.layers[2:5]
    assert both.merge_mode == "ave"
    assert both.forward_layer.dropout == 0.1
    assert both.backward_layer.go_backwards
    assert steps.layer.kernel_regularizer.l2 == pytest.approx(0.01)
    assert (lstm.go_backwards, lstm.recurrent_activation) == (True, "hard_sigmoid")
    assert type(lstm.kernel_constraint) is nl.constraints.MaxNorm


def test_a_loaded_model_learns():
    model = nl.io.load_keras(FILES / "sequential.h5")
    model.compile(optimizer=nl.optimizers.Adam(0.05), loss="categorical_crossentropy")
    y = np.eye(2)[[0, 1]]
    before = model.evaluate(ANSWERS["x"], y, verbose=0)
    model.fit(ANSWERS["x"], y, epochs=30, verbose=0)
    assert model.evaluate(ANSWERS["x"], y, verbose=0) < 0.8 * before


OURS = {
    "gru": lambda: [nl.GRU(3, reset_after=False), nl.Dense(2, activation="elu")],
    "both": lambda: [nl.Bidirectional(nl.LSTM(3, return_sequences=True), "mul"), nl.GlobalMaxPooling1D()],
    "attributes": lambda: [nl.SimpleRNN(3, activation="relu", stateful=True), nl.Activation("leaky_relu(alpha=0.3)")],
    "shapes": lambda: [nl.Permute((2, 1)), nl.Reshape((-1, 2)), nl.Flatten(), nl.RepeatVector(2), nl.Dropout(0.1)],
    "nested": lambda: [nl.Sequential([nl.TimeDistributed(nl.Dense(3)), nl.LayerNormalization()]), nl.LSTM(2)],
}  # fmt: skip


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_goes_out_and_comes_back(name, ending, tmp_path):
    model = nl.Sequential([nl.Input((4, 3)), *OURS[name]()])
    draw = np.random.default_rng(0)
    model.set_weights([draw.standard_normal(w.shape) for w in model.get_weights()])
    path = tmp_path / f"m.{ending}"
    nl.io.save_keras(model, path)
    again = nl.io.load_keras(path)
    x = draw.standard_normal((2, 4, 3)).astype(np.float32)
    assert outputs(again, x)[0].tobytes() == outputs(model, x)[0].tobytes()
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(model.get_weights(), again.get_weights(), strict=True)
    )
    first = path.read_bytes()
    nl.io.save_keras(model, path)
    assert path.read_bytes() == first  # the same model, the same bytes


def keras_2(path, kernel, recurrent, bias):
    """A functional model as Keras 2 wrote it: calls as lists, shapes of the inputs only, another hard_sigmoid."""
    entry = lambda kind, name, config, *nodes: {
        "class_name": kind, "name": name, "config": {"name": name, "trainable": True, "dtype": "float32", **config},
        "inbound_nodes": list(nodes),
    }  # fmt: skip
    lstm = {"units": 2, "recurrent_activation": "hard_sigmoid", "implementation": 2, "unroll": False}
    config = {
        "name": "model",
        "layers": [
            entry(
                "InputLayer", "x", {"batch_input_shape": [None, None, 3], "sparse": False, "ragged": False}
            ),
            entry("InputLayer", "h", {"batch_input_shape": [None, 2], "sparse": False, "ragged": False}),
            entry("LSTM", "lstm", lstm, [["x", 0, 0, {}], ["h", 0, 0, {}], ["h", 0, 0, {}]]),
            entry("Add", "add", {}, [["lstm", 0, 0, {}], ["h", 0, 0, {}]]),
        ],
        "input_layers": [["x", 0, 0], ["h", 0, 0]],
        "output_layers": [["add", 0, 0]],
    }
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": config})
        group = file.create_group("model_weights/lstm")
        names = [f"lstm/lstm_cell/{name}:0" for name in ("kernel", "recurrent_kernel", "bias")]
        group.attrs["weight_names"] = [name.encode() for name in names]
        for name, array in zip(names, (kernel, recurrent, bias), strict=True):
            group[name] = array


def test_a_file_of_keras_2(tmp_path):
    draw = np.random.default_rng(0)
    kernel, recurrent, bias = (draw.standard_normal(s).astype(np.float32) for s in ((3, 8), (2, 8), (8,)))
    keras_2(tmp_path / "m.h5", kernel, recurrent, bias)
    model = nl.io.load_keras(tmp_path / "m.h5")
    x, h = draw.standard_normal((2, 4, 3)).astype(np.float32), draw.standard_normal((2, 2)).astype(np.float32)
    state, c = h, h
    for t in range(4):
        i, f, g, o = np.split(x[:, t] @ kernel + state @ recurrent + bias, 4, axis=-1)
        i, f, o = (np.clip(0.2 * gate + 0.5, 0, 1) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        state = o * np.tanh(c)
    assert np.allclose(model([x, h]).numpy(), state + h, atol=1e-6)
    assert np.array_equal(model({"x": x, "h": h}).numpy(), model([x, h]).numpy())
    with pytest.raises(ValueError, match=r"expected 2 inputs \(x, h\), got 1"):
        model(x)


REFUSED = {
    "peephole": lambda: nl.LSTM(3, peephole=True),
    "coupled": lambda: nl.LSTM(3, coupled="input"),
    "projection": lambda: nl.LSTM(3, projection=2),
    "layer_norm": lambda: nl.GRU(3, layer_norm=True),
    "cell_clip": lambda: nl.LSTM(3, cell_clip=1.0),
    "zoneout": lambda: nl.LSTM(3, zoneout=0.1),
    "recurrent_dropconnect": lambda: nl.LSTM(3, recurrent_dropconnect=0.1),
    "recurrent_dropout_per_step": lambda: nl.LSTM(3, recurrent_dropout=0.1, recurrent_dropout_per_step=True),
    "activation='scaled_tanh": lambda: nl.LSTM(3, activation="scaled_tanh(alpha=2.0)"),
    "IndRNN": lambda: nl.IndRNN(3),
    "SinusoidalPositions": lambda: nl.SinusoidalPositions(),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_keras_has_not_got_is_refused_by_its_name(named, tmp_path):
    model = nl.Sequential([nl.Input((4, 2)), REFUSED[named]()])
    with pytest.raises(ValueError, match=named):
        nl.io.save_keras(model, tmp_path / "m.keras")
    assert not list(tmp_path.iterdir())


def test_other_models_that_cannot_be_written(tmp_path):
    class Own(nl.Model):
        def call(self, x):
            return x

    own = Own()
    own(np.ones((1, 2)))
    masked = nl.Sequential([nl.Input((4, 2)), nl.Masking(), nl.GlobalMaxPooling1D()])
    general = Graph(
        [nl.Input((4, 2), name="x"), nl.Attention(score_mode="general", name="a")],
        [{"name": "a", "node": 0, "args": [[{"from": ["x", 0, 0]}] * 2], "kwargs": {}}], ["x"], {"from": ["a", 0, 0]},
    )  # fmt: skip
    general(np.ones((1, 4, 2)))
    small = nl.Sequential([nl.LSTM(3, input_shape=(4, 2))]).quantize("int8")
    cases = [(own, "is code"), (masked, "unmasked steps"), (general, "score_mode"), (small, "int8")]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            nl.io.save_keras(model, tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"path: expected a \.keras or \.h5 file"):
        nl.io.save_keras(masked, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="that is built"):
        nl.io.save_keras(nl.Sequential([nl.LSTM(2)]), tmp_path / "m.keras")


def changed(tmp_path, kind, place, value):
    """The recorded functional model with one thing in its configuration changed."""
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(FILES / "functional.keras") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                saved = json.loads(content)
                entry = next(e for e in saved["config"]["layers"] if e["class_name"] == kind)
                for key in place[:-1]:
                    entry = entry[key]
                entry[place[-1]] = value
                content = json.dumps(saved).encode()
            new.writestr(name, content)
    return path


def tensor_from(name):
    return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}


CHANGES = {  # the class of the entry to change, the place in it, what it becomes
    "Keras' Lambda is not known here": ("Embedding", ("class_name",), "Lambda"),
    "option 'spin': is not known here, got 2": ("LSTM", ("config", "spin"), 2),
    "option 'time_major': expected False, got True": ("LSTM", ("config", "time_major"), True),
    "option 'rms_scaling'": ("LayerNormalization", ("config", "rms_scaling"), True),
    "unknown activation 'swoosh'": ("LSTM", ("config", "activation"), "swoosh"),
    "expected the name of a function": ("LSTM", ("config", "activation"), {"class_name": "function", "config": [1]}),
    "unknown initializer 'Chaos'": ("Dense", ("config", "kernel_initializer"), {"class_name": "Chaos", "config": {}}),
    "__lambda__, which is not known": ("Dense", ("inbound_nodes", 0, "args"), [{"class_name": "__lambda__", "config": {}}]),
    "training=True": ("LSTM", ("inbound_nodes", 0, "kwargs"), {"training": True}),
    "has a loop": ("Embedding", ("inbound_nodes", 0, "args"), [tensor_from("head")]),
    "expected 2 weights, the file has 3": ("LSTM", ("config", "use_bias"), False),
    "operation Sort is not known": ("NotEqual", ("class_name",), "Sort"),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_what_is_not_known_is_refused_by_its_name(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        nl.io.load_keras(changed(tmp_path, *CHANGES[message]))


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "m.keras"
    whole = (FILES / "functional.keras").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "damaged"),
        (b"12345678", "expected a zip archive"),
        ((FILES / "sequential.h5").read_bytes()[:3000], "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            nl.io.load_keras(path)
    empty = io.BytesIO()
    with h5py.File(empty, "w") as file:
        file["numbers"] = np.ones(3)
    path.write_bytes(empty.getvalue())
    with pytest.raises(ValueError, match="no Keras model: it lacks"):
        nl.io.load_keras(path)
    with pytest.raises(FileNotFoundError):
        nl.io.load_keras(tmp_path / "none.keras")


def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install numlstm\[keras\]"):
        nl.io.load_keras(FILES / "functional.keras")


def test_a_gru_goes_over_in_keras_order(tmp_path):
    """The first two gates change places, in the file itself."""
    model = nl.Sequential([nl.GRU(2, input_shape=(None, 3))])
    nl.io.save_keras(model, tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
        kernel = np.asarray(file["layers/gru/cell/vars/0"])
    ours = model.get_weights()[0]
    assert np.array_equal(kernel, conversion.to_keras("GRU", [ours])[0])
    assert np.array_equal(kernel[:, :2], ours[:, 2:4])
