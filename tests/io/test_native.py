"""Model files: what is saved comes back bit for bit, and what is no model file is refused with the reason."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy

import numlstm as nl
from numlstm import ops
from numlstm.io import describe

X = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
Y = X[:, -1, :1]


class Encoder(nl.Model):
    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.layers_in_a_list = [nl.LSTM(units, return_sequences=True), nl.GRU(units)]
        self.head = nl.Dense(1, activation="tanh")

    def call(self, x):
        for layer in self.layers_in_a_list:
            x = layer(x)
        return self.head(x)


class Swish(nl.Layer):
    def build(self, input_shape):
        self.slope = self.add_weight("slope", (1,), "ones")

    def call(self, x):
        return x * ops.sigmoid(self.slope * x)


def double(x):
    return x * 2


def small(**options):
    nl.set_seed(0)
    return nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), nl.Dense(1)], **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def same(a, b):
    assert np.array_equal(a(X).numpy(), b(X).numpy())
    assert all(
        np.array_equal(v, w) and v.dtype == w.dtype
        for v, w in zip(a.get_weights(), b.get_weights(), strict=True)
    )


def test_a_sequential_comes_back(path):
    model = small(name="mine")
    model.save(path)
    again = nl.load(path)
    same(model, again)
    assert again.name == "mine" and [x.name for x in again.layers] == [x.name for x in model.layers]
    assert again.get_config() == model.get_config()


def test_a_model_built_by_its_first_call_comes_back(path):
    model = nl.Sequential([nl.Sequential([nl.SimpleRNN(4, return_sequences=True)]), nl.LSTM(3), nl.Dense(1)])
    model(X)
    model.save(path)
    same(model, nl.load(path))


def test_a_subclass_comes_back(path):
    model = Encoder(5)
    model(X)
    model.save(path)
    same(model, nl.load(path, custom_objects={"Encoder": Encoder}))
    with pytest.raises(ValueError, match=f"{path}: the model can't be rebuilt: unknown layer 'Encoder'"):
        nl.load(path)


def test_custom_layers_and_functions(path):
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), Swish(), nl.Dense(1, activation=double)])
    model(X)
    model.save(path)
    same(model, nl.load(path, custom_objects={"Swish": Swish, "double": double}))
    with pytest.raises(ValueError, match="can't be rebuilt: unknown"):
        nl.load(path)


def test_what_has_no_name_can_not_be_saved(path):
    model = nl.Sequential([nl.Dense(1, activation=lambda x: x, input_shape=(3,))])
    with pytest.raises(ValueError, match="can't be saved: give it a name"):
        model.save(path)
    assert not path.exists()


def test_the_compilation_comes_back(path):
    model = small()
    model.compile(nl.optimizers.SGD(0.05, momentum=0.9, clipnorm=1.0), loss="mse", metrics=["mae"])
    model.save(path)
    again = nl.load(path)
    assert again.get_compile_config() == model.get_compile_config()
    assert again.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)
    assert nl.load(path, compile=False).get_compile_config() is None


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", nl.optimizers.SGD(0.1, momentum=0.9)], ids=str)
def test_training_goes_on_from_a_file_in_identical_bits(path, optimizer):
    model = small()
    model.compile(optimizer, loss="mse")
    for _ in range(3):
        model.train_on_batch(X, Y)
    model.save(path, include_optimizer=True)
    again = nl.load(path)
    for _ in range(3):
        assert model.train_on_batch(X, Y) == again.train_on_batch(X, Y)
    same(model, again)


def test_without_its_state_the_optimizer_starts_over(path):
    model = small()
    model.compile("adam", loss="mse")
    model.train_on_batch(X, Y)
    model.save(path)
    assert nl.load(path).optimizer.iterations == 0
    with pytest.raises(ValueError, match="include_optimizer: the model has no optimizer"):
        small().save(path, include_optimizer=True)


def test_preprocessing_travels(path):
    model = small()
    model.save(path, preprocessing={"vocabulary": ["a", "ö"], "mean": np.float32(0.5), "scale": np.arange(2)})
    again = nl.load(path)
    assert again.preprocessing == {"vocabulary": ["a", "ö"], "mean": 0.5, "scale": [0, 1]}
    again.save(path)  # it stays with the model
    assert nl.load(path).preprocessing["vocabulary"] == ["a", "ö"]
    assert describe(path)["preprocessing"]["mean"] == 0.5


@pytest.mark.parametrize("bad", [{"f": object()}, {"x": float("nan")}], ids=["object", "nan"])
def test_preprocessing_must_be_json(path, bad):
    with pytest.raises(ValueError, match=f"{path}: the model can't be described as JSON"):
        small().save(path, preprocessing=bad)
    assert not path.exists()


def test_loading_draws_no_random_numbers(path):
    small().save(path)
    nl.set_seed(1)
    before = nl.random.get_state()
    nl.load(path)
    assert nl.random.get_state() == before


def test_float64_comes_back(path):
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3), dtype="float64"), nl.Dense(1, dtype="float64")])
    model.save(path)
    same(model, nl.load(path))
    assert nl.load(path)(X).dtype == np.float64


def test_it_is_an_ordinary_safetensors_file(path):
    model = small()
    model.save(path)
    tensors = safetensors.numpy.load_file(path)
    lstm, dense = (x.name for x in model.layers)
    assert set(tensors) == {f"weights/{lstm}/{w}" for w in ("kernel", "recurrent_kernel", "bias")} | {
        f"weights/{dense}/kernel",
        f"weights/{dense}/bias",
    }
    assert np.array_equal(tensors[f"weights/{lstm}/kernel"], model.get_weights()[0])


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = small()
    model.save(tmp_path / "a.safetensors")
    model.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_crash_while_saving_leaves_the_old_file(path, monkeypatch):
    model = small()
    model.save(path)
    before = path.read_bytes()
    model.set_weights([w + 1 for w in model.get_weights()])

    def crash(*_arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="Input/output"):
        model.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_what_can_not_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"path: models are saved as .safetensors files, got .*m.h5"):
        small().save(tmp_path / "m.h5")
    with pytest.raises(ValueError, match="is not built"):
        nl.Sequential([nl.LSTM(3)]).save(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder"):
        small().save(tmp_path / "missing" / "m.safetensors")


# Files that are not what they should be


def test_a_file_cut_off_anywhere_is_refused(path):
    small().save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{path}: .*(cut off|not a)") as caught:
            nl.load(path)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "zip archive, as .keras and PyTorch"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x80\x04\x95" + bytes(100), "pickle"),
        (b"hello world, this is text", "not a .safetensors file"),
        (struct.pack("<Q", 4) + b"oops", "no JSON header"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (bytes(64), "no JSON header"),
    ],
    ids=["zip", "hdf5", "pickle", "text", "garbage", "list", "zeros"],
)
def test_foreign_files_are_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        nl.load(path)


def rewritten(path, change, tensors=None):
    description = describe(path)
    tensors = safetensors.numpy.load_file(path) if tensors is None else tensors
    metadata = {"numlstm": json.dumps(change(description) or description)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=3), r"has format 3, this version reads up to 2: a newer numlstm wrote it"),
        (lambda d: d.pop("format") and None, "no format number"),
        (lambda d: d.pop("model") and None, "lacks 'model'"),
        (lambda d: d["model"].update(class_name="Nothing"), "unknown layer 'Nothing'"),
        (lambda d: d.update(model={"class_name": "Dense", "config": {"units": 1}}), "a layer, not a model"),
        (lambda d: d["model"]["config"]["layers"][0]["config"].update(units=6), r"shape|values"),
        (lambda d: d["model"]["config"]["layers"][0]["config"].update(unknown=6), "unknown option 'unknown'"),
        (lambda d: d["model"]["config"]["layers"].pop() and None, "the file has unknown .*kernel"),
    ],
    ids=["newer", "no-format", "no-model", "unknown-class", "layer", "misfit", "option", "missing-layer"],
)
def test_changed_descriptions_are_refused(path, change, message):
    small().save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"{path}: .*({message})"):
        nl.load(path)


def test_missing_tensors_are_named(path):
    model = small()
    model.save(path)
    tensors = safetensors.numpy.load_file(path)
    del tensors[f"weights/{model.layers[1].name}/bias"]
    rewritten(path, lambda d: None, tensors)
    with pytest.raises(ValueError, match=f"the file lacks {model.layers[1].name}/bias"):
        nl.load(path)


def test_other_peoples_safetensors(path):
    path.write_bytes(safetensors.numpy.save({"a": np.ones(3)}, metadata={"format": "pt"}))
    with pytest.raises(ValueError, match="a safetensors file, but not a model of numlstm"):
        nl.load(path)
    path.write_bytes(safetensors.numpy.save({"a": np.ones(3)}, metadata={"numlstm": "{"}))
    with pytest.raises(ValueError, match="description is no JSON"):
        nl.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        nl.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="a folder"):
        nl.load(tmp_path)


def test_a_weight_without_axes_comes_back(tmp_path):
    class Looks(nl.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.attention = nl.Attention(use_scale=True, score_mode="concat")

        def call(self, x):
            return self.attention([x, x])

    model = Looks()
    y = model(X).numpy()
    model.save(tmp_path / "m.safetensors")
    again = nl.io.load_model(tmp_path / "m.safetensors", custom_objects={"Looks": Looks})
    assert again(X).numpy().tobytes() == y.tobytes()
    assert [w.shape for w in again.weights] == [(), ()]


def test_a_model_as_bytes_is_its_file(tmp_path):
    from numlstm.io.native import model_bytes, model_from_bytes

    model = nl.Sequential([nl.LSTM(4, input_shape=(None, 3)), nl.Dense(1)])
    model.compile("adam", "mse")
    model.save(tmp_path / "m.safetensors")
    content = model_bytes(model)
    assert content == (tmp_path / "m.safetensors").read_bytes()
    again = model_from_bytes(content)
    np.testing.assert_array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    assert again.get_compile_config() == model.get_compile_config()
    with pytest.raises(ValueError, match="the model's bytes: cut off"):
        model_from_bytes(content[:-10])
    with pytest.raises(ValueError, match="a pickle, which is never read"):
        model_from_bytes(b"\x80\x04\x95" + bytes(20))
