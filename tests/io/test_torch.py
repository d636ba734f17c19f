"""PyTorch's files, read without PyTorch: recorded ones give the outputs recorded with them, and what is damaged,
foreign or ambiguous is refused with the reason. (tests/io/test_torch_roundtrip.py asks PyTorch itself.)"""

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import numlstm as nl
from numlstm.io.torch_file import read_torch_file

FILES = Path(__file__).parent / "files"
ANSWERS = np.load(FILES / "answers.npz")


@pytest.mark.parametrize(("name", "key"), [("tagger.pt", "model"), ("projected.safetensors", None)])
def test_a_recorded_state_dict_computes_what_pytorch_did(name, key):
    model = nl.io.load_torch(FILES / name, key=key)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Embedding", "Bidirectional", "Bidirectional", "LayerNormalization", "Dense"]
    assert np.allclose(model.predict(ANSWERS["ids"], verbose=0), ANSWERS[name], atol=1e-5)


def test_one_part_of_a_state_dict():
    state = nl.io.torch_state_dict(FILES / "tagger.pt", "model")
    first, second = nl.io.torch_layers(state, "rnn")
    assert second.build_shape == (None, None, 8)
    assert np.array_equal(first.get_weights()[0].T, state["rnn.weight_ih_l0"])
    assert (first.get_weights()[2] == np.stack([state["rnn.bias_ih_l0"], state["rnn.bias_hh_l0"]])).all()
    (embedding,) = nl.io.torch_layers(state, "embed", kind="Embedding")
    assert (embedding.get_weights()[0] == state["embed.weight"]).all()
    with pytest.raises(ValueError, match="kind: expected 'Linear' or 'Embedding' for embed"):
        nl.io.torch_layers(state, "embed")
    with pytest.raises(ValueError, match="expected the name of one module, got 'rn', where there is nothing"):
        nl.io.torch_layers(state, "rn")
    part = nl.io.load_torch(FILES / "tagger.pt", "rnn.", key="model")
    assert len(part.layers) == 2
    assert part.predict(np.ones((1, 4, 3)), verbose=0).shape == (1, 4, 8)
    last = nl.io.load_torch(FILES / "tagger.pt", "rnn.", key="model", return_sequences=False)
    assert last.predict(np.ones((1, 4, 3)), verbose=0).shape == (1, 8)


def save(path, tensors):
    safetensors.numpy.save_file({k: np.asarray(a, np.float32) for k, a in tensors.items()}, path)
    return path


LSTM = {"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((8, 2))}
AMBIGUOUS = {
    "more than one chain": {"a.weight": np.ones((4, 4)), "a.bias": np.ones(4), "b.weight": np.ones(4), "b.bias": np.ones(4)},
    "no chain of them fits": {"a.weight": np.ones((5, 2)), "b.weight": np.ones((4, 3)), "b.bias": np.ones(4)},
    "numbers are missing": {"0.weight": np.ones((4, 3)), "0.bias": np.ones(4), "2.weight": np.ones(4), "2.bias": np.ones(4)},
    "expected the tensors of": {"norm.weight": np.ones(4)},
    "lacks layers or directions": {"rnn.weight_ih_l1": np.ones((8, 3)), "rnn.weight_hh_l1": np.ones((8, 2))},
    "expected those of an nn.LSTM": {"rnn.weight_ih_l0": np.ones((8, 3)), "rnn.weight_hh_l0": np.ones((8, 4))},
}  # fmt: skip


@pytest.mark.parametrize("message", AMBIGUOUS)
def test_what_is_no_single_chain_is_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        nl.io.load_torch(save(tmp_path / "m.safetensors", AMBIGUOUS[message]))


def test_features_and_names_settle_the_order(tmp_path):
    chain = {
        "zero.weight": np.ones((7, 3)),  # an Embedding: what follows takes 3 features
        "rnn.weight_ih_l0": LSTM["weight_ih_l0"],
        "rnn.weight_hh_l0": LSTM["weight_hh_l0"],
        "a.weight": np.ones((5, 2)),  # a Linear without bias
    }
    model = nl.io.load_torch(save(tmp_path / "m.safetensors", chain))
    assert [type(x).__name__ for x in model.layers] == ["Embedding", "LSTM", "Dense"]
    numbered = {
        "1.weight": np.ones((3, 3)),
        "1.bias": np.ones(3),
        "2.weight": np.ones(3),
        "2.bias": np.ones(3),
    }
    model = nl.io.load_torch(save(tmp_path / "n.safetensors", numbered))
    assert [type(x).__name__ for x in model.layers] == ["Dense", "LayerNormalization"]
    square = {"embedding.weight": np.ones((3, 3)), **{f"rnn.{k}": a for k, a in LSTM.items()}}
    model = nl.io.load_torch(save(tmp_path / "e.safetensors", square))
    assert type(model.layers[0]) is nl.Embedding
    rnn = {"weight_ih_l0": np.ones((2, 3)), "weight_hh_l0": np.ones((2, 2))}
    model = nl.io.load_torch(save(tmp_path / "r.safetensors", rnn), nonlinearity="relu")
    assert model.layers[0].activation == "relu"
    for change in ({"nonlinearity": "elu"}, {"prefix": "q."}):
        with pytest.raises(ValueError, match=r"nonlinearity: expected|prefix: no tensor"):
            nl.io.load_torch(tmp_path / "r.safetensors", **change)


def test_bfloat16_in_a_safetensors_file(tmp_path):
    upper = (np.array([1.5, -2.0, 0.25, 3.0], np.float32).view(np.uint32) >> 16).astype("<u2")
    header = b'{"weight":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'
    path = tmp_path / "b.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + upper.tobytes())
    assert nl.io.torch_state_dict(path)["weight"].tolist() == [[1.5, -2.0], [0.25, 3.0]]


# Files that torch.save did not write


def archive(path, pickled, **members):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", pickled)
        for name, content in members.items():
            file.writestr(f"m/{name}", content)
    return path


class Planted:
    """What unpickling would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    for protocol in (2, 3, 4, 5):
        path = archive(tmp_path / "x.pt", pickle.dumps({"w": Planted()}, protocol=protocol))
        with pytest.raises(ValueError, match=r"holds (__builtin__|builtins)\.exec, which is not read"):
            read_torch_file(path)
    with pytest.raises(ValueError, match=r"the instruction|is not read"):
        read_torch_file(archive(tmp_path / "y.pt", pickle.dumps({1, 2}, protocol=4)))
    with pytest.raises(ValueError, match="damaged"):
        read_torch_file(archive(tmp_path / "z.pt", b"\x80\x02}q\x00U"))
    with pytest.raises(ValueError, match=r"damaged: data.pkl can't be followed"):
        read_torch_file(archive(tmp_path / "z.pt", b"\x80\x02h\x05."))


def tensor_pickle(size, stride=(1,), numel=4, offset=0):
    """The instructions for one tensor of a storage of `numel` floats."""
    code = io.BytesIO()
    code.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n")
    code.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + numel.to_bytes(4, "little") + b"tQ")
    code.write(b"J" + offset.to_bytes(4, "little", signed=True))
    for numbers in (size, stride):
        code.write(b"(" + b"".join(b"J" + n.to_bytes(4, "little", signed=True) for n in numbers) + b"t")
    code.write(b"\x89ccollections\nOrderedDict\n)RtR.")
    return code.getvalue()


def test_a_tensor_lies_within_its_storage(tmp_path):
    four = np.arange(4, dtype="<f4").tobytes()
    path = tmp_path / "t.pt"
    found = read_torch_file(archive(path, tensor_pickle((2, 2), (1, 2)), **{"data/0": four}))
    assert found.tolist() == [[0, 2], [1, 3]]
    big = read_torch_file(
        archive(path, tensor_pickle((3,), offset=1), **{"data/0": four[::-1], "byteorder": b"big"})
    )
    assert big.tolist() == [2, 1, 0]
    for size, stride, offset in (
        ((5,), (1,), 0),
        ((2,), (4,), 0),
        ((2,), (1,), 3),
        ((2,), (-1,), 1),
        ((9, 9), (0, 0), 0),
    ):
        with pytest.raises(ValueError, match=r"damaged: a tensor of shape .* lies outside its storage"):
            read_torch_file(archive(path, tensor_pickle(size, stride, offset=offset), **{"data/0": four}))
    with pytest.raises(ValueError, match="damaged: it lacks data/0"):
        read_torch_file(archive(path, tensor_pickle((2,))))
    with pytest.raises(ValueError, match="data/0 has 4000 bytes, expected at most 16"):
        read_torch_file(archive(path, tensor_pickle((2,)), **{"data/0": bytes(4000)}))


def test_foreign_files(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"torch\.save wrote since PyTorch 1\.6"):
        nl.io.load_torch(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"not one that torch\.save wrote"):
        nl.io.load_torch(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        nl.io.load_torch(tmp_path / "none.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        nl.io.load_torch(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"expected a state_dict.*give key='model'"):
        nl.io.load_torch(FILES / "tagger.pt")
    with pytest.raises(ValueError, match=r"key: expected an entry of .* got 'weights'"):
        nl.io.load_torch(FILES / "tagger.pt", key="weights")


def test_the_library_imports_neither_torch_nor_keras():
    """Nor does reading their files."""
    program = (
        "import sys, numlstm as nl\n"
        "heavy = {'torch', 'keras', 'h5py', 'tensorflow', 'jax'}\n"
        "assert not heavy & set(sys.modules), 'import'\n"
        f"nl.io.load_torch({str(FILES / 'projected.safetensors')!r})\n"
        "assert not heavy & set(sys.modules), 'load_torch'\n"
        f"nl.io.load_keras({str(FILES / 'functional.keras')!r})\n"
        "assert heavy & set(sys.modules) == {'h5py'}, 'load_keras'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    model = nl.Sequential([nl.LSTM(2, input_shape=(None, 1))])
    for call in (lambda: nl.io.to_torch(model), lambda: nl.io.from_torch(model)):
        with pytest.raises(ImportError, match=r"pip install numlstm\[torch\]"):
            call()
