"""compile(precision="bfloat16"): what it changes, what it leaves alone, and where else it can be asked for."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.kernels.cpu import gemm, sequence, threads

T, B, I, H = 12, 64, 5, 20
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, I)).astype("f")
Y = np.tanh(X.cumsum(1)[:, -1, :1])


def made(precision: str | None = None, **options) -> nl.Sequential:
    nl.set_seed(0)
    layers = [
        nl.LSTM(H, return_sequences=True, input_shape=(T, I), **options),
        nl.Bidirectional(nl.LSTM(H)),
        nl.Dense(1),
    ]
    model = nl.Sequential(layers)
    if precision is not None:
        model.compile(nl.optimizers.Adam(0.01), "mse", precision=precision)
    return model


def test_training_ends_where_float32_does() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = made(precision, recurrent_dropout=0.1)
        losses[precision] = model.fit(X, Y, epochs=15, verbose=0).history["loss"]
        assert {w.dtype.name for w in model.get_weights()} == {"float32"}
    full, half = losses["float32"], losses["bfloat16"]
    assert half[-1] < 0.3 * half[0]
    assert full != half and np.allclose(full, half, rtol=0.1, atol=0.005)


def test_predict_and_stream_follow_what_was_compiled() -> None:
    model = made("bfloat16")
    as_compiled = model.predict(X, verbose=0)
    assert as_compiled.dtype == np.float32
    model.compile("sgd", "mse")
    full = model.predict(X, verbose=0)
    off = np.abs(as_compiled - full).max()
    assert 1e-5 < off < 0.01
    with nl.use_backend(precision="bfloat16"):  # inference alone
        assert np.array_equal(model.predict(X, verbose=0), as_compiled)
    with nl.use_backend("reference", precision="bfloat16"):  # emulated
        assert np.abs(model.predict(X, verbose=0) - as_compiled).max() < 2e-3 * np.abs(full).max()
    assert np.array_equal(model.predict(X, verbose=0), full)
    nl.set_seed(0)
    streamed = nl.Sequential([nl.LSTM(H, input_shape=(None, I)), nl.Dense(1)])
    streamed.compile("sgd", "mse", precision="bfloat16")
    stream, right = streamed.stream(batch_size=B), streamed.predict(X, verbose=0)
    steps = [stream.step(X[:, t]) for t in range(T)]
    assert np.allclose(steps[-1], right, rtol=1e-5, atol=1e-6)  # a small dense product is NumPy's in predict


def test_the_choice_nests() -> None:
    with nl.use_backend(precision="bfloat16") as outer:
        assert str(outer) == "cpu, products in bfloat16"
        with nl.use_backend("reference", strict=True) as inner:
            assert (inner.name, inner.strict, inner.precision) == ("reference", True, "bfloat16")
        with nl.use_backend(None, precision="float32") as inner:
            assert (inner.name, inner.precision) == ("cpu", "float32")
        assert nl.get_backend("reference").precision == "bfloat16"
    assert nl.get_backend().precision == "float32"
    unknown = nl.use_backend(precision="half")
    with pytest.raises(ValueError, match="precision: expected float32 or bfloat16, got 'half'"), unknown:
        pass


def test_same_bits_whatever_the_threads(monkeypatch) -> None:
    monkeypatch.setattr(sequence, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(gemm, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(gemm, "SMALL", 0)
    before, found = threads.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            threads.set_num_threads(n)
            model = made("bfloat16", recurrent_dropout=0.1)
            model.fit(X, Y, epochs=2, verbose=0)
            found.append(model.get_weights())
    finally:
        threads.set_num_threads(before)
    for weights in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(weights, found[0], strict=True))


def test_explain_names_it() -> None:
    lines: list[str] = []
    rows = nl.explain(made("bfloat16"), print_fn=lines.append)
    assert lines[0].startswith("backend: cpu, products in bfloat16")
    assert [r["operation"] for r in rows] == ["sequence", "sequence", "sequence", "matmul"]
    assert all("; products in bfloat16, sums in float32" in r["why"] for r in rows)
    assert not any("bfloat16" in r["why"] for r in nl.explain(made("float32"), print_fn=lines.append))


def test_it_is_saved_and_loaded(tmp_path) -> None:
    model = made("bfloat16")
    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    assert again.get_compile_config()["precision"] == "bfloat16"
    assert np.array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    assert again.dtype == "float32"


def test_a_cell_of_several_stages_runs_in_it() -> None:
    x, model = np.ones((3, 4, 2), "f"), nl.Sequential([nl.GRU(5, reset_after=False)])
    full = model.predict(x, verbose=0)
    with nl.use_backend(precision="bfloat16", strict=True):
        off = np.abs(model.predict(x, verbose=0) - full).max()
    assert 1e-6 < off < 0.02
