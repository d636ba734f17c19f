"""A stored graph of layers: what it computes, what it learns, and that a graph that can't run is refused."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.graph import OPERATIONS, Graph

X = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)


def ref(name, node=0, k=0):
    return {"from": [name, node, k]}


def call(name, *args, node=0, op=None, **kwargs):
    return {
        "name": name,
        "node": node,
        "args": list(args),
        "kwargs": kwargs,
        **({} if op is None else {"op": op}),
    }


def shared():
    """One Dense twice, an LSTM with its states, and operations between."""
    layers = [nl.Dense(3, name="dense"), nl.LSTM(4, return_state=True, name="lstm")]
    calls = [
        call("dense", ref("x")),
        call("dense", ref("dense"), node=1),
        call("lstm", ref("dense", 1)),
        call("part", ref("dense", 1), [{"slice": [None, None, None]}, -1], op="GetItem"),
        call("joined", [ref("part"), ref("lstm", 0, 2)], op="Concatenate", axis=-1),
    ]
    return Graph(layers, calls, ["x"], [ref("joined"), ref("lstm", 0, 1)])


def test_it_computes_what_the_calls_say(tmp_path):
    model = shared()
    joined, h = model(X)
    dense, lstm = model.get_layer("dense"), model.get_layer("lstm")
    twice = dense(dense(X))
    _, state, c = lstm(twice)
    assert np.array_equal(joined.numpy(), np.concatenate([twice.numpy()[:, -1], c.numpy()], axis=1))
    assert np.array_equal(h.numpy(), state.numpy())
    model.save(tmp_path / "m.safetensors")
    for a, b in zip(nl.load(tmp_path / "m.safetensors")(X), (joined, h), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    with pytest.raises(NotImplementedError, match="only a call can tell"):
        model.compute_output_shape((None, 5, 3))
    assert [name for name in model.named_weights()][:2] == ["dense/kernel", "dense/bias"]


def test_it_learns():
    layers = [nl.LSTM(4, name="lstm"), nl.Dense(1, name="dense")]
    calls = [call("lstm", ref("x")), call("dense", ref("lstm")), call("shift", ref("dense"), 1.0, op="Add")]
    model = Graph(layers, calls, ["x"], ref("shift"))
    model.compile(optimizer=nl.optimizers.Adam(0.05), loss="mse")
    history = model.fit(X, X[:, 0, :1], epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


def test_merging_under_masks():
    """A masked step of one input does not enter a product or a maximum; one of all is masked in the result."""
    a, b = nl.Tensor(X[:2, :3, :1]), nl.Tensor(X[2:, :3, :1])
    a.mask, b.mask = np.array([[1, 1, 0], [1, 0, 0]], bool), np.array([[1, 0, 1], [1, 1, 0]], bool)
    either = a.mask | b.mask
    first, second, p, q = a.mask[..., None], b.mask[..., None], a.numpy(), b.numpy()
    product = OPERATIONS["MergeMultiply"]([a, b])
    expected = np.where(first, p, 1) * np.where(second, q, 1) * either[..., None]
    assert np.allclose(product.numpy(), expected)
    assert np.array_equal(product.mask, either)
    largest = OPERATIONS["MergeMaximum"]([a, b]).numpy()
    expected = np.where(first & second, np.maximum(p, q), np.where(first, p, q))
    assert np.allclose(largest[either], expected[either])
    plain = nl.Tensor(q)
    assert OPERATIONS["MergeAdd"]([a, plain]).mask is None
    assert OPERATIONS["MergeConcatenate"]([a, plain], axis=-1).mask.all()
    assert np.array_equal(
        OPERATIONS["MergeConcatenate"]([a, b], axis=1).mask, np.concatenate([a.mask, b.mask], axis=1)
    )
    with pytest.raises(ValueError, match="Subtract: expected two inputs, got 3"):
        OPERATIONS["MergeSubtract"]([a, b, plain])


def test_a_layer_may_be_shown_no_mask():
    layers = [nl.Masking(name="masking"), nl.LSTM(2, name="lstm")]
    calls = [
        call("masking", ref("x")),
        call("lstm", ref("masking")),
        call("lstm", ref("masking"), node=1, mask=None),
    ]
    model = Graph(layers, calls, ["x"], [ref("lstm"), ref("lstm", 1)])
    x = X.copy()
    x[:, 3:] = 0
    masked, unmasked = model(x)
    lstm = model.get_layer("lstm")
    assert np.allclose(masked.numpy(), lstm(x[:, :3]).numpy(), atol=1e-6)
    assert np.array_equal(unmasked.numpy(), lstm(x).numpy())


def test_graphs_that_cannot_run():
    dense = nl.Dense(2, name="dense")
    cases = [
        ([call("dens", ref("x"))], ref("x"), "dens: expected one of dense, got 'dens'"),
        ([call("a", ref("x"), op="Sort")], ref("x"), "a: expected one of Add"),
        ([call("dense", ref("y"))], ref("x"), "dense uses call 0 of 'y'"),
        ([call("dense", ref("x"))], ref("dense", 1), "outputs uses call 1 of 'dense'"),
    ]
    for calls, outputs, message in cases:
        with pytest.raises(ValueError, match=message):
            Graph([dense], calls, ["x"], outputs)
    with pytest.raises(ValueError, match="different names, got 'dense' twice"):
        Graph([dense, nl.Dense(1, name="dense")], [], ["x"], ref("x"))
    model = Graph([dense], [call("dense", ref("x"))], ["x"], ref("dense"))
    with pytest.raises(ValueError, match="expected inputs x, got y"):
        model({"y": X})
