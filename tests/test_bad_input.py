"""Bad input, end to end through the public API: what a person does wrong, and what the error must say.

Each row is an action and the fragments that its one-line message must hold: the thing, what came, what was
expected. Errors are ValueError, on the command line exit code 2 and one line; nothing is half-written,
nothing lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numlstm as nl
from numlstm.data import text
from numlstm.layers.base import from_config

draw = np.random.default_rng(0)
X = draw.standard_normal((6, 4, 3), np.float32)
Y = draw.standard_normal((6, 1), np.float32)
IDS = draw.integers(0, 5, (6, 4))


def model(compiled: bool = True, **compile_options: Any) -> nl.Sequential:
    m = nl.Sequential([nl.LSTM(5, input_shape=(4, 3)), nl.Dense(1)])
    if compiled:
        m.compile(**{"optimizer": "adam", "loss": "mse", **compile_options})
    return m


def classifier() -> nl.Sequential:
    m = nl.Sequential([nl.Embedding(5, 3), nl.LSTM(4), nl.Dense(3)])
    m.compile(optimizer="adam", loss=nl.losses.SparseCategoricalCrossentropy(from_logits=True))
    return m


def fit(x: Any = X, y: Any = Y, m: Any = None, **options: Any) -> None:
    (m or model()).fit(x, y, **{"epochs": 1, "verbose": 0, **options})


def predict(x: Any = X, **options: Any) -> None:
    model().predict(x, verbose=0, **options)


def broken(value: float, like: np.ndarray = X) -> np.ndarray:
    """A copy with one entry replaced."""
    copy = like.copy()
    copy.reshape(-1)[7 % copy.size] = value
    return copy


def lstm(units: Any = 4, **options: Any) -> nl.LSTM:
    return nl.LSTM(units, **options)


def batches(*items: Any) -> Iterator[Any]:
    yield from items


def stateful_twice() -> None:
    m = nl.Sequential([nl.LSTM(4, stateful=True), nl.Dense(1)])
    m(X)
    m(X[:2])


Action = Callable[[], Any]
# name -> what the person does, and what the message must hold (upper and lower case are one)
TABLE: dict[str, tuple[Action, tuple[str, ...]]] = {
    # inputs: rank, shape, kind of numbers
    "x of rank 2": (partial(fit, X[:, :, 0]), ("(6, 4)", "(batch, time, features)")),
    "x of rank 4": (partial(fit, X[..., None]), ("(6, 4, 3, 1)", "(batch, time, features)")),
    "x of rank 2 in predict": (partial(predict, X[:, 0]), ("(6, 3)", "(batch, time, features)")),
    "another number of features": (partial(predict, X[..., :2]), ("lstm", "3 features", "(6, 4, 2)")),
    "another number of features in fit": (partial(fit, X[..., :2]), ("lstm", "3 features", "4, 2)")),
    "text for numbers": (partial(fit, np.array([["a", "b"]] * 6)), ("x", "number", "<U1")),
    "objects for numbers": (partial(predict, np.array([None] * 6)), ("x", "object")),
    "complex numbers": (partial(fit, X.astype(np.complex64)), ("x", "complex64")),
    "nothing at all": (partial(fit, None), ("x", "None")),
    "NaN in x": (partial(fit, broken(np.nan)), ("x", "NaN")),
    "NaN in y": (partial(fit, X, broken(np.nan, Y)), ("y", "NaN")),
    "infinity in x": (partial(fit, broken(np.inf)), ("x", "inf")),
    "NaN in predict": (partial(predict, broken(np.nan)), ("x", "NaN")),
    "no samples": (partial(fit, X[:0], Y[:0]), ("x", "empty", "(0, 4, 3)")),
    "no samples in predict": (partial(predict, X[:0]), ("x", "empty", "(0, 4, 3)")),
    "no time steps": (partial(predict, X[:, :0]), ("(6, 0, 3)",)),
    "x and y of unequal length": (partial(fit, X, Y[:5]), ("6", "5", "y")),
    "y of another shape": (partial(fit, X, np.zeros((6, 2))), ("(6, 2)", "(6, 1)")),
    "one value for x": (partial(fit, 3.0), ("x", "single value", "3")),
    "rows that differ in features": (partial(fit, [X[0], X[1][:, :2]], Y[:2]), ("x[1]", "(4, 2)", "3")),
    # masks and lengths
    "negative lengths": (partial(predict, lengths=[1, 2, -1, 4, 4, 4]), ("lengths", "-1", "0")),
    "lengths beyond the time axis": (partial(fit, lengths=[1, 2, 5, 4, 4, 4]), ("lengths", "5", "4")),
    "too few lengths": (partial(fit, lengths=[1, 2]), ("lengths", "2", "6")),
    "lengths with a fraction": (partial(predict, lengths=[1.5] * 6), ("lengths", "integer", "float")),
    "a mask of another shape": (partial(fit, mask=np.ones((6, 3), bool)), ("mask", "(6, 3)")),
    "a mask of other values": (partial(predict, mask=np.full((6, 4), 0.5)), ("mask", "float")),
    "mask and lengths": (partial(predict, mask=np.ones((6, 4), bool), lengths=[4] * 6), ("mask", "lengths")),
    # labels and ids
    "an id beyond the embedding": (
        lambda: fit(IDS + 3, np.zeros(6, int), classifier()),
        ("id", "0", "4"),
    ),
    "a negative id": (lambda: fit(IDS - 5, np.zeros(6, int), classifier()), ("id", "-")),
    "ids with a fraction": (lambda: fit(IDS + 0.5, np.zeros(6, int), classifier()), ("whole numbers",)),
    "a label beyond the classes": (lambda: fit(IDS, np.full(6, 3), classifier()), ("3", "class")),
    "a negative label": (lambda: fit(IDS, np.full(6, -2), classifier()), ("-2", "class")),
    "too few sample weights": (
        partial(fit, X, Y, None, sample_weight=np.ones(5)),
        ("sample_weight", "5", "6"),
    ),
    "a weight for a negative class": (
        lambda: fit(IDS, np.zeros(6, int), classifier(), class_weight={-1: 1.0}),
        ("class_weight", "-1"),
    ),
    "class weights for a regression": (partial(fit, class_weight={0: 2.0}), ("class_weight", "classes")),
    # arguments of training
    "fit before compile": (lambda: fit(X, Y, model(compiled=False)), ("compile",)),
    "no rows a batch": (partial(fit, batch_size=0), ("batch_size", "0", "1")),
    "a negative batch size": (partial(predict, batch_size=-2), ("batch_size", "-2")),
    "a negative number of epochs": (partial(fit, epochs=-1), ("epochs", "-1")),
    "nothing left to train on": (partial(fit, validation_split=1.0), ("validation_split", "1.0")),
    "a negative validation split": (partial(fit, validation_split=-0.1), ("validation_split", "-0.1")),
    "no step of truncated training": (partial(fit, bptt_steps=0), ("bptt_steps", "0")),
    "a generator that gives nothing": (partial(fit, batches(), None), ("x",)),
    "a generator of something else": (partial(fit, batches("ab", "cd"), None), ("batch", "0")),
    "a generator with unequal x and y": (partial(fit, batches((X, Y[:2])), None), ("batch", "6", "2")),
    # unknown names
    "an unknown loss": (partial(model, loss="mean_square"), ("loss", "mean_square", "MeanSquaredError")),
    "an unknown optimizer": (partial(model, optimizer="adan"), ("optimizer", "adan", "adam")),
    "an unknown metric": (partial(model, metrics=["acuracy"]), ("metric", "acuracy", "accuracy")),
    "an unknown precision": (partial(model, precision="float16"), ("precision", "float16", "float32")),
    "an unknown backend": (partial(model, backend="gpu"), ("backend", "gpu", "cpu")),
    "an unknown activation": (partial(lstm, activation="tahn"), ("activation", "tahn", "tanh")),
    "an activation no cell knows": (partial(lstm, activation="softmax"), ("activation", "softmax")),
    "an unknown initializer": (partial(lstm, kernel_initializer="glorot"), ("initializer", "glorot")),
    "an unknown regularizer": (partial(lstm, kernel_regularizer="l3"), ("regularizer", "l3")),
    "an unknown option": (partial(lstm, return_sequence=True), ("return_sequence", "return_sequences")),
    "an unknown layer": (
        partial(from_config, {"class_name": "LSTN", "config": {}}),
        ("layer", "LSTN", "LSTM"),
    ),
    # values out of range
    "no units": (partial(lstm, 0), ("units", "0")),
    "units with a fraction": (partial(lstm, 1.5), ("units", "1.5")),
    "all inputs dropped": (partial(lstm, dropout=1.0), ("dropout", "1.0")),
    "recurrent dropout": (
        partial(lstm, recurrent_dropout=1.0),
        ("recurrent_dropout", "1.0", "from 0"),
    ),
    "a negative dropout": (partial(nl.Dropout, -0.1), ("rate", "-0.1")),
    "a negative learning rate": (partial(nl.optimizers.Adam, learning_rate=-1.0), ("learning_rate", "-1.0")),
    "a learning rate that is NaN": (
        partial(nl.optimizers.SGD, learning_rate=np.nan),
        ("learning_rate", "nan"),
    ),
    "a momentum above one": (partial(nl.optimizers.SGD, momentum=1.5), ("momentum", "1.5")),
    "a negative clipnorm": (partial(nl.optimizers.Adam, clipnorm=-1.0), ("clipnorm", "-1.0")),
    "two ways of clipping": (partial(nl.optimizers.Adam, clipnorm=1.0, clipvalue=1.0), ("clip",)),
    "smoothing above one": (
        partial(nl.losses.BinaryCrossentropy, label_smoothing=1.5),
        ("label_smoothing", "1.5"),
    ),
    "a negative seed": (partial(nl.set_seed, -1), ("seed", "-1")),
    # layers and models
    "one initial state for two": (
        lambda: lstm()(X, initial_state=[np.zeros((6, 4), np.float32)]),
        ("initial_state", "2", "1"),
    ),
    "an initial state of other units": (
        lambda: lstm()(X, initial_state=[np.zeros((6, 3), np.float32)] * 2),
        ("initial_state", "(6, 4)", "(6, 3)"),
    ),
    "another batch on kept states": (stateful_twice, ("lstm", "6", "2", "reset_states")),
    "too few weights": (lambda: model().set_weights([Y]), ("5 weights", "1")),
    "a weight of another shape": (
        lambda: model().set_weights([w.T for w in model().get_weights()]),
        ("kernel", "(3, 20)", "(20, 3)"),
    ),
    "weights before building": (
        lambda: nl.Sequential([nl.LSTM(4)]).set_weights(model().get_weights()),
        ("built",),
    ),
    "a layer that is none": (lambda: nl.Sequential([nl.LSTM(4), "dense"]), ("layer", "dense")),
    "layers that do not fit": (
        lambda: nl.Sequential([nl.LSTM(4, input_shape=(4, 3)), nl.LSTM(4)]),
        ("(batch, time, features)", "return_sequences"),
    ),
    # text
    "a text shorter than its streams": (lambda: text.streams(np.arange(3), 8), ("3", "8")),
    "an empty text": (lambda: text.Vocabulary.fit(""), ("text", "empty")),
    "words or letters": (lambda: text.Vocabulary.fit("a", level="line"), ("level", "line", "char")),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_error_says_what_came_and_what_was_expected(name):
    action, fragments = TABLE[name]
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    missing = [f for f in fragments if f.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message.strip(), f"more than one line: {message}"
    assert "Traceback" not in message


def test_the_tensorflow_js_input_as_written_is_refused_clearly():
    """Rank 2 into an LSTM: TensorFlow.js refuses it too. The message says how to make it rank 3."""
    m = nl.Sequential([nl.LSTM(16), nl.Dense(1)])
    m.compile(optimizer="adam", loss="meanSquaredError")
    with pytest.raises(ValueError, match=r"rank 3, \(batch, time, features\).*\(\d, 1\)"):
        m.fit(np.array([[1.0], [2.0]]), np.array([[1.0], [2.0]]), epochs=1, verbose=0)


def test_an_unavailable_backend_says_why():
    reason = nl.backends()["cuda"]
    if reason is None:
        pytest.skip("CUDA is usable here")
    with pytest.raises(RuntimeError) as caught, nl.use_backend("cuda"):
        nl.get_backend()
    assert reason in str(caught.value)


def test_a_refused_batch_leaves_the_weights_alone():
    m = model()
    before = m.get_weights()
    for bad in (broken(np.nan), X[..., :2], X[:, :, 0]):
        with pytest.raises(ValueError):
            m.train_on_batch(bad, Y)
    for a, b in zip(before, m.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    m.train_on_batch(X, Y)  # and it still trains


def test_a_wrong_weight_leaves_all_others_alone():
    m = model()
    before = m.get_weights()
    with pytest.raises(ValueError):
        m.set_weights([*(w + 1 for w in before[:-1]), np.zeros(7)])
    for a, b in zip(before, m.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model().save(path)
    return path


def foreign(path: Path) -> None:
    """A file of tensors that another program wrote."""
    from safetensors.numpy import save_file

    save_file({"w": X}, path)


def with_unknown_layer(path: Path) -> None:
    """A file whose model uses a layer that nobody knows here."""
    path.write_bytes(path.read_bytes().replace(b"Dense", b"Dents"))


SPOILED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated in the tensors": (lambda p: p.write_bytes(p.read_bytes()[:-40]), ()),
    "truncated in the header": (lambda p: p.write_bytes(p.read_bytes()[:30]), ()),
    "empty": (lambda p: p.write_bytes(b""), ()),
    "no model but text": (lambda p: p.write_text("To be, or not to be"), ()),
    "no model but JSON": (lambda p: p.write_text(json.dumps({"layers": []})), ()),
    "another program's": (foreign, ("numlstm",)),
    "with an unknown layer": (with_unknown_layer, ("Dents", "layer")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_model_file_is_refused_by_name(saved, name):
    spoil, fragments = SPOILED[name]
    spoil(saved)
    with pytest.raises(ValueError) as caught:
        nl.load(saved)
    message = str(caught.value)
    for fragment in (saved.name, *fragments):
        assert fragment in message, message


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.safetensors"):
        nl.load(tmp_path / "nowhere.safetensors")


def test_saving_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        model().save(tmp_path / "nowhere" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, moment):
    """The disk fills up, or the rename is refused: the file of before is whole, no scratch file stays."""
    before = saved.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace" if moment == "replace" else "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        model().save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    nl.load(saved)


def test_a_model_that_cannot_be_rebuilt_is_not_saved(tmp_path):
    """A nameless activation could not be read back: refused before anything is written."""
    with pytest.raises(ValueError, match=r"activation|lambda"):
        m = nl.Sequential([nl.Dense(2, activation=lambda x: x * 2, input_shape=(3,))])
        m.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- the command line


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "numlstm", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with something wrong in each."""
    path = tmp_path_factory.mktemp("bad")
    (path / "short.txt").write_text("To be, or not to be, that is the question: " * 2)
    (path / "empty.txt").write_text("")
    (path / "binary.txt").write_bytes(bytes(range(256)))
    rows = "\n".join(f"{k},{k % 7}" for k in range(200))
    (path / "table.csv").write_text("month,value\n" + rows + "\n")
    (path / "few.csv").write_text("month,value\n1,2\n2,3\n")
    (path / "header.csv").write_text("month,value\n")
    (path / "words.csv").write_text("month,value\n" + "\n".join(f"{k},high" for k in range(200)) + "\n")
    (path / "foreign.safetensors").write_bytes(b"not a model")
    return path


COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a text shorter than a window": (("train", "text", "short.txt"), ("78 chars", "96")),
    "an empty text": (("train", "text", "empty.txt"), ("empty.txt", "empty")),
    "a text that is none": (("train", "text", "binary.txt"), ("binary.txt",)),
    "a missing text": (("train", "text", "missing.txt"), ("missing.txt",)),
    "no such level": (("train", "text", "short.txt", "--level", "line"), ("line", "char")),
    "a CSV without the column": (
        ("train", "forecast", "table.csv", "--target", "wert", "--horizon", "3"),
        ("wert", "month", "value"),
    ),
    "a CSV shorter than a window": (
        ("train", "forecast", "few.csv", "--target", "value", "--horizon", "3"),
        ("2",),
    ),
    "a CSV without rows": (
        ("train", "forecast", "header.csv", "--target", "value", "--horizon", "3"),
        ("header.csv",),
    ),
    "a column of words": (
        ("train", "forecast", "words.csv", "--target", "value", "--horizon", "3"),
        ("value", "high"),
    ),
    "no horizon": (
        ("train", "forecast", "table.csv", "--target", "value", "--horizon", "0"),
        ("--horizon", "1"),
    ),
    "a foreign model": (("generate", "foreign.safetensors", "--prompt", "To"), ("foreign.safetensors",)),
    "a missing model": (("predict", "missing.safetensors", "table.csv"), ("missing.safetensors",)),
    "an unknown backend": (("info", "--backend", "gpu"), ("gpu", "cpu")),
    "an unknown command": (("trian",), ("trian",)),
    "an unknown option": (("train", "text", "short.txt", "--epoch", "3"), ("--epoch",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_refuses_in_one_line(folder, name):
    arguments, fragments = COMMANDS[name]
    before = {p.name for p in folder.iterdir()}
    done = command(*arguments, cwd=folder)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    missing = [f for f in fragments if f.lower() not in lines[0].lower()]
    assert not missing, f"{missing} not in: {lines[0]}"
    assert {p.name for p in folder.iterdir()} == before, "something was left behind"


def test_with_json_the_error_is_an_object_too(folder):
    done = command("train", "text", "missing.txt", "--json", cwd=folder)
    assert done.returncode == 2
    assert "missing.txt" in json.loads(done.stdout)["error"]
