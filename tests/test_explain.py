"""explain says what the registry would serve, for each layer that computes."""

import pytest

import numlstm as nl
from numlstm import backend


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without one, whatever this one has."""
    monkeypatch.setattr(backend.cuda, "unavailable", lambda index=0: "no NVIDIA driver (of this test)")
    backend._auto.cache_clear()
    yield
    backend._auto.cache_clear()


@pytest.fixture
def model():
    return nl.Sequential(
        [
            nl.Embedding(9, 4, name="e"),
            nl.Sequential([nl.LSTM(3, return_sequences=True, name="l")], name="inner"),
            nl.TimeDistributed(nl.Dense(2, name="d"), name="each"),
            nl.Activation("relu", name="a"),
        ]
    )


def test_every_layer_that_computes_has_a_row(model, capsys):
    rows = nl.explain(model)
    assert [r["layer"] for r in rows] == ["e", "inner/l", "each/layer", "a"]
    assert [r["operation"] for r in rows] == ["embedding", "sequence", "matmul", "element-wise"]
    assert rows[1]["kernel"] == "numlstm.kernels.cpu.sequence" and rows[1]["option"] == "lstm"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "backend: cpu (no cuda: no NVIDIA driver (of this test))" and len(lines) == 5
    assert lines[2].startswith("inner/l (LSTM): sequence lstm -> numlstm.kernels.cpu.sequence (")


def test_it_follows_the_backend_and_the_dtype(model):
    quiet = {"print_fn": lambda line: None}
    assert nl.explain(model, backend="reference", **quiet)[1]["kernel"] == "numlstm.kernels.reference"
    with nl.use_backend("reference"):
        assert nl.explain(model, **quiet)[1]["kernel"] == "numlstm.kernels.reference"
    model.cast("float64")
    row = nl.explain(model, **quiet)[1]
    assert row["kernel"] == "numlstm.kernels.reference" and "no float64 kernel" in row["why"]


def test_it_says_where_reduced_products_run_in_tiles(model, monkeypatch):
    from numlstm.kernels.cpu import isa

    why = lambda model: [row["why"] for row in nl.explain(model, print_fn=lambda line: None)]
    with nl.use_backend("cpu", precision="bfloat16"):
        assert isa.tiles("bf16") is not None or not any("AMX tiles" in text for text in why(model))
        monkeypatch.setattr(isa, "_amx", lambda part: ("emulated", ""))
        assert ["AMX tiles (emulated) from 4 rows on" in text for text in why(model)] == [
            False,
            True,
            True,
            False,
        ]
        monkeypatch.setattr(isa, "_amx", lambda part: (None, "AMX not permitted by the system"))
        assert why(model)[1].endswith("; AMX not permitted by the system")
        assert "AMX not permitted by the system" in isa.describe()
    assert not any("AMX" in text for text in why(model))
    model(nl.Tensor([[1, 2]]))
    assert "AMX not permitted" in why(model.quantize("int8"))[1]


def test_it_follows_what_compile_chose(model):
    model.compile("adam", "mse", backend="reference")
    assert nl.explain(model, print_fn=lambda line: None)[1]["device"] == "reference"


def test_bad_input(model):
    with pytest.raises(ValueError, match="model: expected a model or a layer, got str"):
        nl.explain("model")
    with pytest.raises(ValueError, match="quick"):
        nl.explain(model, backend="quick")
