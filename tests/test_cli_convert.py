"""`numlstm convert`: from every kind of file to every other, by their endings."""

import json
from pathlib import Path

import numpy as np
import pytest

import numlstm as nl
from numlstm import io
from numlstm.cli import main

FILES = Path(__file__).parent / "io" / "files"
ANSWERS = np.load(FILES / "answers.npz")


def call(*arguments):
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as exit:
        main(["convert", *map(str, arguments)])
    return exit.value.code


def same(a, b, x):
    return np.allclose(a.predict(x, verbose=0), b.predict(x, verbose=0), atol=1e-6)


def test_from_keras_to_ours_and_back(tmp_path, capsys):
    assert call(FILES / "sequential.h5", tmp_path / "m.safetensors", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    model = nl.load(tmp_path / "m.safetensors")
    assert said["layers"] == [type(layer).__name__ for layer in model.layers]
    assert said["weights"] == sum(w.size for w in model.weights)
    assert np.allclose(model.predict(ANSWERS["x"], verbose=0), ANSWERS["sequential/0"], atol=1e-5)
    for ending in ("keras", "h5"):
        assert call(tmp_path / "m.safetensors", tmp_path / f"m.{ending}") == 0
        assert same(io.load_keras(tmp_path / f"m.{ending}"), model, ANSWERS["x"])
    assert "Written: " in capsys.readouterr().out


def test_from_pytorch(tmp_path):
    assert call(FILES / "tagger.pt", tmp_path / "m.safetensors", "--key", "model") == 0
    model = nl.load(tmp_path / "m.safetensors")
    assert np.allclose(model.predict(ANSWERS["ids"], verbose=0), ANSWERS["tagger.pt"], atol=1e-5)
    # a .safetensors file that is not ours is a state_dict
    assert call(FILES / "projected.safetensors", tmp_path / "p.safetensors") == 0
    model = nl.load(tmp_path / "p.safetensors")
    assert np.allclose(model.predict(ANSWERS["ids"], verbose=0), ANSWERS["projected.safetensors"], atol=1e-5)
    assert call(FILES / "tagger.pt", tmp_path / "r.keras", "--key", "model", "--prefix", "rnn.") == 0
    assert len(io.load_keras(tmp_path / "r.keras").layers) == 3  # the input's, and two


@pytest.mark.peers
@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_to_pytorch_and_back(ending, tmp_path):
    pytest.importorskip("torch")
    target = tmp_path / f"m.{ending}"
    assert call(FILES / "tagger.pt", target, "--key", "model") == 0
    held = list(io.torch_state_dict(FILES / "tagger.pt", "model").values())
    written = list(io.torch_state_dict(target).values())
    assert [a.tobytes() for a in held] == [a.tobytes() for a in written]
    assert call(target, tmp_path / "again.safetensors") == 0


def test_onnx_goes_by_its_ending(tmp_path, monkeypatch):
    model = nl.Sequential([nl.LSTM(2, input_shape=(None, 1))])
    read, written = [], []
    monkeypatch.setattr(io, "load_onnx", lambda path: read.append(path) or model, raising=False)
    monkeypatch.setattr(io, "save_onnx", lambda given, path: written.append((given, path)), raising=False)
    assert call(tmp_path / "a.onnx", tmp_path / "b.onnx") == 0
    assert (read, written) == ([tmp_path / "a.onnx"], [(model, tmp_path / "b.onnx")])


def test_what_stays_behind_is_said(tmp_path, capsys):
    model = nl.Sequential([nl.LSTM(2, input_shape=(None, 1))])
    model.save(tmp_path / "m.safetensors", preprocessing={"kind": "text"})
    assert call(tmp_path / "m.safetensors", tmp_path / "m.keras", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left_behind"] == ["preprocessing"]


def test_bad_input_is_one_line(tmp_path, capsys):
    nl.Sequential([nl.LSTM(2, peephole=True, input_shape=(None, 1))]).save(tmp_path / "m.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678")
    cases = [
        ((tmp_path / "m.safetensors", tmp_path / "m.keras"), "peephole=True has no counterpart in Keras"),
        ((tmp_path / "m.safetensors", tmp_path / "m.txt"), "DST: expected a file that ends in"),
        ((tmp_path / "m.csv", tmp_path / "m.keras"), "SRC: expected a file that ends in"),
        ((tmp_path / "none.keras", tmp_path / "m.keras"), "No such file"),
        ((tmp_path / "damaged.safetensors", tmp_path / "m.keras"), "not a .safetensors file"),
        ((tmp_path / "m.safetensors", tmp_path / "m.safetensors"), "the same file"),
        ((FILES / "sequential.h5", tmp_path / "m.keras", "--key", "model"), "are for PyTorch's files"),
        ((FILES / "tagger.pt", tmp_path / "m.keras"), "give key='model'"),
    ]
    for arguments, message in cases:
        assert call(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "m.keras").exists()
