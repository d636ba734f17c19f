"""`load_onnx`: graphs that PyTorch and Keras wrote, what a model made of one can do, what is refused.

The graphs under exported/ and the answers beside them are recorded (record_exports.py). The operators' numbers are checked
in test_onnx_operators_all.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import error

import numlstm as nl
from numlstm.io.onnx import OPERATORS, Backend, OnnxModel
from numlstm.io.onnx.exporter import to_proto

EXPORTED = sorted(Path(__file__).with_name("exported").glob("*.onnx"))
FLOAT = TensorProto.FLOAT
DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((6, 7, 3)).astype(np.float32)


def graph_of(nodes, inputs, outputs, initializers=(), opset=17, **options):
    """A model of float inputs and outputs by name and shape."""
    info = lambda name, shape: helper.make_tensor_value_info(name, FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "g",
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in dict(initializers).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **options)


@pytest.fixture(scope="module")
def original():
    return nl.Sequential(
        [
            nl.Bidirectional(
                nl.LSTM(4, return_sequences=True, input_shape=(None, 3), name="first"), name="both"
            ),
            nl.GRU(5, name="second"),
            nl.Dense(1, name="dense"),
        ]
    )


@pytest.fixture
def model(original):
    return nl.io.load_onnx(to_proto(original))


# Graphs of others


@pytest.mark.parametrize("path", EXPORTED, ids=lambda p: p.stem)
def test_graphs_that_others_wrote(path):
    with np.load(path.with_suffix(".npz")) as file:
        recorded = dict(file)
    inputs = [recorded[k] for k in sorted(recorded) if k.startswith("input")]
    expected = [recorded[k] for k in sorted(recorded) if k.startswith("output")]
    model = nl.io.load_onnx(path)
    assert model.trainable_weights
    with nl.use_backend("reference"):
        found = model(inputs if len(inputs) > 1 else inputs[0])
        found = found if isinstance(found, list) else [found]
        bound = 1e-12 if expected[0].dtype == np.float64 else 1e-5
        assert max(error(a.numpy(), b) for a, b in zip(found, expected, strict=True)) <= bound


def test_there_are_graphs_of_both_exporters_and_of_keras():
    names = {path.stem for path in EXPORTED}
    assert {"keras", "packed-script", "attending-dynamo", "lstm-both-script", "lstm-both-dynamo"} <= names
    assert len(names) == 18 and sum(p.stat().st_size for p in EXPORTED) < 160_000


def test_an_exported_module_has_its_parameters():
    """Weights are trained, whatever they are called; what PyTorch calls buffers is not."""
    by_name = {path.stem: path for path in EXPORTED}
    model = nl.io.load_onnx(by_name["gru-both-script"])
    assert (
        sum(v.size for v in model.trainable_weights)
        == 10 * 4 + 3 * 5 * (4 + 5 + 2) * 2 + 3 * 5 * (10 + 5 + 2) * 2 + 53
    )
    assert [type(layer).__name__ for layer in model.layers].count("GRU") == 4  # two layers, two directions
    convolved = nl.io.load_onnx(by_name["convolved-script"])
    assert (
        not convolved.non_trainable_weights
    )  # the norm's mean and variance were folded into the convolution
    assert convolved.count_params() == 6 * 4 * 3 + 6 + 2 * 3 * 5 * (6 + 5 + 2) + 22


# What a model made of a graph can do


def test_it_trains_as_the_model_it_comes_from(original, model):
    y = X.sum((1, 2))[:, None]
    twin = nl.io.load_onnx(to_proto(original))
    copy = nl.Sequential.from_config(original.get_config())
    copy.build((None, None, 3))
    copy.set_weights(original.get_weights())
    losses = []
    for one in (copy, twin):
        one.compile(nl.optimizers.Adam(0.01), "mse")
        losses.append(one.fit(X, y, epochs=4, batch_size=3, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_array_equal(
        model.predict(X, verbose=0), nl.io.load_onnx(to_proto(original)).predict(X, verbose=0)
    )


def test_it_is_saved_by_itself(model, tmp_path):
    """The file holds the graph: another process needs neither the ONNX file nor the onnx package."""
    path = tmp_path / "m.safetensors"
    model.compile("adam", "mse")
    model.fit(X, X[:, 0, :1], epochs=1, verbose=0)
    model.save(path, include_optimizer=True)
    expected = model.predict(X, verbose=0)
    again = nl.load(path)
    assert isinstance(again, OnnxModel)
    np.testing.assert_array_equal(again.predict(X, verbose=0), expected)
    more = [m.fit(X, X[:, 0, :1], epochs=2, verbose=0, shuffle=False).history["loss"] for m in (model, again)]
    assert more[0] == more[1]
    np.save(tmp_path / "x.npy", X)
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        f"import numpy as np, numlstm as nl; m = nl.load({str(path)!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, m.predict(np.load({str(tmp_path / 'x.npy')!r}), verbose=0))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


def test_all_constants_survive_the_native_file(tmp_path):
    """Integers, truth values, empty arrays, numbers that are none, and tensors in attributes."""
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.int64([0, 3]))),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node(
            "ConstantOfShape", ["one"], ["half"], value=numpy_helper.from_array(np.float32([0.5]))
        ),
        helper.make_node("Where", ["where", "r", "none"], ["w"]),
        helper.make_node("Add", ["w", "half"], ["a"]),
        helper.make_node("Mul", ["a", "scale"], ["m"]),
        helper.make_node("MatMul", ["m", "large"], ["y"]),
    ]
    large = DRAW.standard_normal((3, 400)).astype(np.float32)
    constants = {
        "one": np.int64([1]), "where": np.array([True, False, True]), "none": np.float32([0, -np.inf, 0]),
        "scale": np.float32(2), "large": large,
    }  # fmt: skip
    constants["none"][1] = -7
    model = nl.io.load_onnx(graph_of(nodes, {"x": (None, 3)}, {"y": (None, 400)}, constants))
    path = tmp_path / "m.safetensors"
    model.save(path)
    x = np.float32([[1, 2, 3]])
    expected = (np.float32([[1, -7, 3]]) + 0.5) * 2 @ large
    for one in (model, nl.load(path)):
        np.testing.assert_allclose(one(x).numpy(), expected, rtol=1e-5)
    assert [v.name for v in model.weights] == ["large"]


def test_precision_and_int8(original, model):
    expected = model.predict(X, verbose=0)
    small = model.quantize("int8")
    np.testing.assert_allclose(small.predict(X, verbose=0), expected, atol=0.02)
    assert np.abs(small.predict(X, verbose=0) - expected).max() > 0
    model.compile("sgd", "mse", precision="float64")
    found = model.predict(X, verbose=0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_summary(model):
    lines = []
    model.summary(print_fn=lines.append, width=120)
    text = "\n".join(lines)
    assert lines[:2] == ["Input input: float32 (batch, time, 3)", "Output output: float32 (batch, 1)"]
    assert (
        "second (GRU)" in text
        and "both_forward (LSTM)" in text
        and "dense_MatMul (OnnxMatMul)" in text
        and f"Total: {model.count_params():,}" in text
    )


def states_model():
    layer = nl.LSTM(4, return_sequences=True, name="r")
    layer.build((None, None, 3))
    return nl.io.load_onnx(to_proto(layer, states=True, lengths=True)), layer


def test_several_inputs_and_outputs():
    model, layer = states_model()
    assert model.input_names == ["input", "lengths", "r.initial_h", "r.initial_c"]
    assert model.output_names == ["output", "r.final_h", "r.final_c"]
    h, c = DRAW.standard_normal((2, 6, 4)).astype(np.float32)
    lengths = np.int32([7, 1, 2, 3, 4, 5])
    given = [X, lengths, h, c]
    y, *last = model(given)
    np.testing.assert_allclose(y.numpy(), layer(X, lengths=lengths, initial_state=[h, c]).numpy(), rtol=1e-6)
    by_name = model(dict(zip(model.input_names, given, strict=True)))
    for a, b in zip([y, *last], by_name, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for a, b in zip([y, *last], model.predict(given, batch_size=4), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-6, atol=1e-7)
    names = dict(zip(model.input_names, given, strict=True))
    np.testing.assert_array_equal(model.predict(names)[0], model.predict(given)[0])
    with nl.GradientTape() as tape:
        loss = (model(given)[1] ** 2).sum()
    gradients = tape.gradient(loss, model.trainable_weights)
    assert all(np.abs(g).max() > 0 for g in gradients) and len(gradients) == 3


def test_outputs_may_be_chosen(original):
    proto = to_proto(original)
    hidden = next(n.output[0] for n in proto.graph.node if n.op_type == "Concat")
    model = nl.io.load_onnx(proto, outputs=[hidden])
    assert model.output_names == [hidden]
    np.testing.assert_allclose(model(X).numpy(), original.layers[0](X).numpy(), rtol=1e-6, atol=1e-7)
    assert not any(isinstance(layer, nl.GRU) for layer in model.layers)  # what is not needed is left out
    with pytest.raises(
        ValueError, match="outputs: expected names of values in the graph, such as output, got 'nowhere'"
    ):
        nl.io.load_onnx(proto, outputs=["nowhere"])


def test_inputs_that_the_graph_does_not_take(model):
    several, _ = states_model()
    h = np.zeros((6, 4), np.float32)
    for call, message in (
        (lambda: model(X[0]), r"input input: expected shape \(batch, time, 3\), got \(7, 3\)"),
        (lambda: model(X[:, :, :2]), r"input input: expected shape \(batch, time, 3\), got \(6, 7, 2\)"),
        (lambda: model([X, X]), r"expected 1 inputs \(input\), got 2"),
        (lambda: model({"x": X}), "expected the inputs input, got x"),
        (lambda: model(X, lengths=[1] * 6), "mask, lengths: a graph takes no mask; it has the inputs input"),
        (lambda: several([X, np.ones(6), h[:5], h]), "expected batch 6, as in input, got shape"),
        (lambda: several([X, np.full(6, 0.5), h, h]), "input lengths: expected int32, got .* with fractions"),
        (lambda: several.predict([X, np.ones(5), h, h]), "expected as many rows in every input"),
        (lambda: several.predict([X, np.ones(6), h, h], steps=2), "steps: a graph of several inputs takes batch_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="bptt_steps: the states inside a graph"):
        model.fit(X, X[:, 0, :1], bptt_steps=2, verbose=0)


def test_weights_that_nodes_share_stay_one():
    """A matrix that serves twice is one weight; so is one behind other names."""
    nodes = [
        helper.make_node("Identity", ["w"], ["also"]),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "also"], ["y"]),
    ]
    model = nl.io.load_onnx(
        graph_of(nodes, {"x": (None, 2)}, {"y": (None, 2)}, {"w": np.float32([[0, 1], [2, 0]])})
    )
    assert [v.name for v in model.weights] == ["w"]
    np.testing.assert_array_equal(model(np.float32([[1, 3]])).numpy(), [[2, 6]])


def test_what_is_a_weight():
    """By the place in the operator: kernels, biases and gains are, limits, exponents and masks are not."""
    nodes = [
        helper.make_node("MatMul", ["x", "kernel"], ["a"]),
        helper.make_node("Transpose", ["turned"], ["gain"], perm=[0]),
        helper.make_node("Mul", ["a", "gain"], ["b"]),
        helper.make_node("Add", ["b", "scalar"], ["c"]),
        helper.make_node("Pow", ["c", "exponent"], ["d"]),
        helper.make_node("Where", ["mask", "d", "table"], ["e"]),
        helper.make_node("BatchNormalization", ["e", "scale", "shift", "mean", "variance"], ["y"]),
    ]
    ones = np.ones(2, np.float32)
    names = {name: ones for name in ("turned", "exponent", "scale", "shift", "mean", "variance")}
    constants = {
        "kernel": np.eye(2, dtype=np.float32), "scalar": np.float32(1), "mask": np.array([True, False]),
        "table": np.zeros((1200, 2), np.float32), **names,
    }  # fmt: skip
    model = nl.io.load_onnx(graph_of(nodes, {"x": (1200, 2)}, {"y": (1200, 2)}, constants))
    assert {v.name for v in model.trainable_weights} == {"kernel", "turned", "scale", "shift"}
    assert [v.name for v in model.non_trainable_weights] == [
        "table"
    ]  # large, so that it is kept with the weights


# Files


def external(tmp_path, location):
    proto = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (None, 2)}, {"y": (None, 2)},
                     {"w": np.float32([[0, 1], [2, 0]])})  # fmt: skip
    (tensor,) = proto.graph.initializer
    data = tensor.raw_data
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path = tmp_path / "models" / "m.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path, proto, data


def test_data_beside_the_model(tmp_path):
    path, proto, data = external(tmp_path, "w.bin")
    (path.parent / "w.bin").write_bytes(data)
    np.testing.assert_array_equal(nl.io.load_onnx(path)(np.float32([[1, 3]])).numpy(), [[6, 1]])
    for call in (nl.io.load_onnx, Backend.prepare, lambda m: nl.io.load_onnx(m.SerializeToString())):
        with pytest.raises(ValueError, match="the data of w is in another file: give the model's path"):
            call(proto)
    (tensor,) = (
        proto.graph.initializer
    )  # the same in an attribute, which onnx would look for in the working directory
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    hidden = graph_of([node, proto.graph.node[0]], {"x": (None, 2)}, {"y": (None, 2)})
    with pytest.raises(ValueError, match="the data of w is in another file"):
        nl.io.load_onnx(hidden)


def test_data_outside_the_models_folder_is_not_read(tmp_path):
    for location in ("../w.bin", str(tmp_path / "w.bin"), "link.bin", "missing.bin"):
        path, _, data = external(tmp_path, location)
        (tmp_path / "w.bin").write_bytes(data)
        if location == "link.bin":
            if sys.platform == "win32":  # which lets not everyone make links
                continue
            (path.parent / location).symlink_to(tmp_path / "w.bin")
        with pytest.raises(ValueError, match=r"m\.onnx: its data in other files can't be read"):
            nl.io.load_onnx(path)


def test_what_is_no_model(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"PK\x03\x04 no protobuf at all")
    with pytest.raises(ValueError, match=r"m\.onnx: not an ONNX model, or damaged"):
        nl.io.load_onnx(path)
    with pytest.raises(FileNotFoundError):
        nl.io.load_onnx(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"path: expected a path, bytes or an onnx.ModelProto, got int"):
        nl.io.load_onnx(3)
    with pytest.raises(ValueError, match="model: "):
        nl.io.load_onnx(b"")


def test_without_onnx_it_is_said_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "import numlstm as nl\n"
        "for call in (nl.io.load_onnx, lambda p: nl.io.save_onnx(nl.Dense(1), p)):\n"
        "    try:\n"
        f"        call({str(tmp_path / 'm.onnx')!r})\n"
        "    except ImportError as error:\n"
        "        assert 'pip install numlstm[onnx]' in str(error)\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# Operators: what is refused, and what is replaced by others


REFUSED = [
    (
        "NonMaxSuppression",
        ["x", "x"],
        {},
        r"the operator NonMaxSuppression is not supported \(the node 'here'\): Abs, Add",
    ),
    (
        "Conv",
        ["x", "k"],
        {"kernel_shape": [3, 3]},
        "Conv 'here': kernel_shape .* is not supported: expected one axis",
    ),
    (
        "ArgMax",
        ["x"],
        {"select_last_index": 1},
        "ArgMax 'here': the attribute select_last_index 1 is not supported, 0 are",
    ),
    ("MaxPool", ["x"], {"kernel_shape": [2], "ceil_mode": 1}, "MaxPool 'here': the attribute ceil_mode 1"),
    ("Einsum", ["x", "x"], {"equation": "bii,bij->bj"}, "Einsum 'here': the equation"),
    ("Cast", ["x"], {"to": TensorProto.FLOAT16}, "y: FLOAT16 is not supported, float32"),
]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_is_not_supported_is_named(op, inputs, attributes, message):
    node = helper.make_node(op, inputs, ["y"], name="here", **attributes)
    model = graph_of(
        [node],
        {"x": (2, 3, 3, 3) if op == "Conv" else (2, 3, 3)},
        {"y": None},
        {"k": np.ones((1, 3, 3, 3), np.float32)},
    )
    kinds = {"Cast": TensorProto.FLOAT16, "ArgMax": TensorProto.INT64, "NonMaxSuppression": TensorProto.INT64}
    model.graph.output[0].type.tensor_type.elem_type = kinds.get(op, FLOAT)
    model = onnx.shape_inference.infer_shapes(model)  # the output's shape, which a model must say
    with pytest.raises(NotImplementedError, match=message):
        nl.io.load_onnx(model)
    assert not Backend.is_compatible(model)


def test_functions_are_replaced_by_their_nodes():
    """Those of the file, and operators that ONNX defines by others."""
    own = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], domain="own"),
        helper.make_node("MeanVarianceNormalization", ["t"], ["y"], axes=[0]),
    ]
    assert "MeanVarianceNormalization" not in OPERATORS
    proto = graph_of(nodes, {"x": (4, 2)}, {"y": (4, 2)}, opset=18)
    proto.functions.append(own)
    proto.opset_import.append(helper.make_opsetid("own", 1))
    x = DRAW.standard_normal((4, 2)).astype(np.float32)
    expected = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(nl.io.load_onnx(proto)(x).numpy(), expected, rtol=1e-4, atol=1e-5)
    foreign = graph_of(
        [helper.make_node("Thrice", ["x"], ["y"], domain="own", name="here")], {"x": (1,)}, {"y": (1,)}
    )
    foreign.opset_import.append(helper.make_opsetid("own", 1))
    with pytest.raises(
        NotImplementedError, match=r"the operator own\.Thrice is not supported \(the node 'here'\)"
    ):
        nl.io.load_onnx(foreign)
