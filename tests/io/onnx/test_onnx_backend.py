"""The ONNX backend: what it takes and gives as `onnx.backend` has it, its tables, and what it refuses.

The operators' numbers are checked in tests/conformance (test_onnx_*.py).
"""

import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import numlstm as nl
from numlstm.io.onnx import ACTIVATIONS, GATES, OPERATORS, Backend, Recurrent, activation_names, gate_columns

T, B, I, H = 3, 2, 4, 5
GATE_COUNT = {"LSTM": 4, "GRU": 3, "RNN": 1}
FLOAT = TensorProto.FLOAT


def arrays(op="LSTM", directions=1, dtype=np.float32):
    draw = np.random.default_rng(0)
    G = GATE_COUNT[op]
    shapes = {"X": (T, B, I), "W": (directions, G * H, I), "R": (directions, G * H, H)}
    return {name: draw.standard_normal(shape).astype(dtype) * 0.5 for name, shape in shapes.items()}


def tensor(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes, inputs, outputs, initializers=(), opset=22, domains=()):
    """A graph of float inputs by name and shape, and of outputs by name and rank."""
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor(name, FLOAT, shape) for name, shape in inputs.items()],
        [tensor(name, FLOAT, [None] * rank) for name, rank in outputs.items()],
        [numpy_helper.from_array(a, name) for name, a in dict(initializers).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def lstm_model(opset=22, outputs=("Y", "Y_h", "Y_c"), **attributes):
    a = arrays()
    node = helper.make_node("LSTM", ["X", "W", "R"], outputs, hidden_size=H, **attributes)
    ranks = {name: 4 if name == "Y" else 3 for name in outputs if name}
    return model_of([node], {"X": (None, None, I)}, ranks, {"W": a["W"], "R": a["R"]}, opset)


X = arrays()["X"]


# The package


def test_importing_numlstm_leaves_onnx_alone_until_it_is_asked_for():
    program = (
        "import sys, numlstm as nl; assert not {'onnx', 'numlstm.io.onnx'} & set(sys.modules); "
        "assert nl.io.onnx.Backend.supports_device('CPU'); assert 'onnx' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_without_onnx_the_backend_says_what_to_install():
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "from numlstm.io.onnx import GATES, Backend\n"
        "for call in (Backend.prepare, Backend.is_compatible, lambda m: Backend.run_node(m, [])):\n"
        "    try:\n"
        "        call(None)\n"
        "    except ImportError as error:\n"
        "        assert 'pip install numlstm[onnx]' in str(error)\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_it_is_a_backend_of_onnx():
    assert issubclass(Backend, onnx.backend.base.Backend)
    assert isinstance(Backend.prepare(lstm_model()), onnx.backend.base.BackendRep)


# Tables


def test_gates_go_from_onnx_order_to_ours():
    rows = np.repeat(np.arange(4), H)[:, None] * np.ones((1, I))  # i o f c
    columns = gate_columns(rows, GATES["LSTM"], nl.kernels.cells.lstm().gates)  # i f g o
    np.testing.assert_array_equal(columns[0].reshape(4, H)[:, 0], [0, 2, 3, 1])
    assert columns.shape == (I, 4 * H) and columns.flags.c_contiguous
    rows = np.repeat(np.arange(3), H)[:, None]  # z r h
    columns = gate_columns(rows, GATES["GRU"], nl.kernels.cells.gru().gates)  # r z n
    np.testing.assert_array_equal(columns[0].reshape(3, H)[:, 0], [1, 0, 2])
    coupled = nl.kernels.cells.lstm(coupled="input").gates  # i g o: the forget gate is not read
    np.testing.assert_array_equal(gate_columns(np.arange(4)[:, None], GATES["LSTM"], coupled), [[0, 3, 1]])


@pytest.mark.parametrize("name", ["LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Elu"])
def test_defaults_are_those_of_the_operators(name):
    schema = onnx.defs.get_schema(name)
    assert ACTIVATIONS[name][1] == {a: v.default_value.f for a, v in schema.attributes.items()}


def test_every_activation_of_the_text_is_known():
    text = onnx.defs.get_schema("LSTM").doc
    assert (
        set(ACTIVATIONS) == set(re.findall(r"^\* (\w+)\(x\) ", text, re.MULTILINE)) and len(ACTIVATIONS) == 11
    )


def test_alpha_and_beta_go_to_the_activations_that_have_them():
    names = ["HardSigmoid", "Tanh", "LeakyRelu", "Affine", "Elu"]
    assert activation_names(names, [0.5, 0.25, 2.0], [1.0]) == (
        "hard_sigmoid(alpha=0.5, beta=1.0)",
        "tanh",
        "leaky_relu(alpha=0.25)",
        "affine(alpha=2.0, beta=0.0)",
        "elu(alpha=1.0)",
    )
    assert activation_names(["tanh", "RELU"]) == ("tanh", "relu")
    # one value for every activation, as some exporters write, where there are no two ways to read it
    assert activation_names(["Elu", "Tanh"], [0.5, 1.0]) == ("elu(alpha=0.5)", "tanh")
    with pytest.raises(ValueError, match=r"activation_alpha: expected at most 1 values.*\[1.0, 0.5\]"):
        activation_names(["Tanh", "Elu"], [1.0, 0.5])
    with pytest.raises(ValueError, match="activation_beta: expected at most 0"):
        activation_names(["Tanh", "Elu"], [], [0.5])
    with pytest.raises(ValueError, match="activation_beta: expected a value for scaled_tanh"):
        activation_names(["ScaledTanh"], [1.0])
    with pytest.raises(ValueError, match="activation_alpha: expected finite"):
        activation_names(["Elu"], [float("nan")])
    with pytest.raises(ValueError, match=r"activations: expected names among Relu.*'Swish'"):
        activation_names(["Swish"])


# Graphs


def test_the_ways_to_hand_inputs_over():
    prepared = Backend.prepare(lstm_model())
    by_position = prepared.run([X])
    assert by_position._fields == ("Y", "Y_h", "Y_c")
    for given in (X, (X,), {"X": X}, [X.tolist()]):
        for a, b in zip(by_position, prepared.run(given), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(by_position["Y_h"], by_position.Y[-1])
    np.testing.assert_array_equal(Backend.run_model(lstm_model(), [X]).Y, by_position.Y)


@pytest.mark.parametrize("outputs", [("Y",), ("", "Y_h"), ("", "", "Y_c"), ("Y", "", "Y_c")])
def test_outputs_that_are_not_wanted(outputs):
    everything = Backend.run_model(lstm_model(), [X])
    found = Backend.run_model(lstm_model(outputs=outputs), [X])
    assert found._fields == tuple(name for name in outputs if name)
    for name in found._fields:
        np.testing.assert_array_equal(found[name], everything[name])


def test_a_chain_with_constants_and_identities():
    """RNN -> Identity -> RNN, weights by Constant nodes and through an Identity: Y_h feeds X."""
    a = arrays("RNN")
    w2, r = np.float32(np.ones((1, H, H)) / H), a["R"]
    nodes = [
        helper.make_node("Constant", [], ["W1"], value=numpy_helper.from_array(a["W"])),
        helper.make_node("Identity", ["R"], ["R1"]),
        helper.make_node("RNN", ["X", "W1", "R1"], ["", "h1"], hidden_size=H),
        helper.make_node("Identity", ["h1"], ["x2"]),
        helper.make_node("RNN", ["x2", "W2", "R1"], ["", "h2"], hidden_size=H),
    ]
    model = model_of(nodes, {"X": (T, B, I)}, {"h2": 3, "h1": 3}, {"R": r, "W2": w2})
    last, first = Backend.run_model(model, [a["X"]])
    h = np.zeros((B, H))
    for x in a["X"]:
        h = np.tanh(x @ a["W"][0].T + h @ r[0].T)
    np.testing.assert_allclose(first[0], h, rtol=1e-5)
    np.testing.assert_allclose(last[0], np.tanh(h @ w2[0].T), rtol=1e-5)


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("value_float", 1.5, np.float32(1.5)),
        ("value_floats", [1.5, 2.0], np.float32([1.5, 2])),
        ("value_int", 3, np.int64(3)),
        ("value_ints", [3, 4], np.int64([3, 4])),
    ],
)
def test_constants(attribute, value, expected):
    (found,) = Backend.run_node(helper.make_node("Constant", [], ["c"], **{attribute: value}), [])
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert not found.flags.writeable  # writing into it would change the model


def test_weights_that_never_change_are_turned_once(monkeypatch):
    calls = []
    turned = Recurrent.weights
    monkeypatch.setattr(Recurrent, "weights", lambda self, *a: calls.append(1) or turned(self, *a))
    prepared = Backend.prepare(lstm_model())
    prepared.run([X])
    prepared.run([X])
    assert len(calls) == 1


def test_an_initializer_that_is_an_input_can_be_replaced():
    a = arrays()
    node = helper.make_node("LSTM", ["X", "W", "R"], ["", "Y_h"], hidden_size=H)
    shapes = {"X": (T, B, I), "W": a["W"].shape}
    model = model_of([node], shapes, {"Y_h": 3}, {"W": a["W"], "R": a["R"]})
    prepared = Backend.prepare(model)
    (default,) = prepared.run([X])
    np.testing.assert_array_equal(prepared.run([X, a["W"]])[0], default)
    (other,) = prepared.run({"X": X, "W": -a["W"]})
    assert np.abs(other - default).max() > 0.1
    np.testing.assert_array_equal(prepared.run([X])[0], default)


def test_operator_sets():
    expected = Backend.run_model(lstm_model(22), [X])
    for opset in (7, 13, 14, 21):
        for a, b in zip(Backend.run_model(lstm_model(opset), [X]), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(
        NotImplementedError, match="LSTM is supported in its versions 7, 14, 22; operator set 6"
    ):
        Backend.prepare(lstm_model(6))
    with pytest.raises(ValueError, match="layout"):  # not yet an attribute
        Backend.prepare(lstm_model(13, layout=1))


def test_an_unknown_operator_is_named():
    nodes = [
        helper.make_node("LSTM", ["X", "W", "R"], ["y"], hidden_size=H),
        helper.make_node("DepthToSpace", ["y"], ["z"], blocksize=1),
    ]
    a = arrays()
    model = model_of(nodes, {"X": (T, B, I)}, {"z": 4}, {"W": a["W"], "R": a["R"]})
    with pytest.raises(
        NotImplementedError, match=f"DepthToSpace is not supported: {', '.join(sorted(OPERATORS))} are"
    ):
        Backend.prepare(model)
    assert not Backend.is_compatible(model)
    assert Backend.is_compatible(lstm_model())
    foreign = helper.make_node("LSTM", ["X"], ["y"], domain="com.example")
    with pytest.raises(NotImplementedError, match=r"com\.example\.LSTM is not supported"):
        Backend.prepare(model_of([foreign], {"X": (T, B, I)}, {"y": 3}, domains=["com.example"]))
    text = helper.make_node("Constant", [], ["c"], value_string="text")
    with pytest.raises(NotImplementedError, match="attribute value_string is not supported"):
        Backend.run_node(text, [])


def test_half_precision_is_refused():
    a = arrays(dtype=np.float16)
    node = helper.make_node("LSTM", ["X", "W", "R"], ["Y"], hidden_size=H, name="first")
    model = model_of([node], {"X": (T, B, I)}, {"Y": 4}, {"W": a["W"], "R": a["R"]})
    with pytest.raises(NotImplementedError, match="LSTM 'first': W: FLOAT16 is not supported"):
        Backend.prepare(model)
    with pytest.raises(ValueError, match="X: expected float32 or float64, got float16"):
        Backend.run_node(node, [a["X"], a["W"], a["R"]])


def test_what_is_no_model():
    with pytest.raises(ValueError, match=r"model: expected an onnx\.ModelProto, got bytes"):
        Backend.prepare(b"")
    with pytest.raises(ValueError, match="model: "):
        Backend.prepare(onnx.ModelProto())
    assert not Backend.is_compatible(onnx.ModelProto())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"inputs: expected 1 arrays \(X\), got 0"),
        ([X, X], r"inputs: expected 1 arrays \(X\), got 2"),
        ({}, "inputs: expected X, but X is missing"),
        ({"X": X, "Z": X}, "inputs: expected X, got Z"),
        ([X.astype(np.float64)], "inputs: X: expected float32, got float64"),
        ([X[0]], r"inputs: X: expected shape \(\?, \?, 4\), got \(2, 4\)"),
        ([X[:, :, :3]], r"inputs: X: expected shape \(\?, \?, 4\), got \(3, 2, 3\)"),
    ],
)
def test_inputs_that_the_graph_does_not_take(given, message):
    with pytest.raises(ValueError, match=message):
        Backend.prepare(lstm_model()).run(given)


def test_options():
    Backend.prepare(lstm_model(), rtol=1e-3, atol=1e-7)  # onnx's own runner hands these over
    for call in (Backend.prepare, Backend.run_model):
        with pytest.raises(ValueError, match="graph_optimization: expected no such option"):
            call(lstm_model(), *([[X]] if call == Backend.run_model else []), graph_optimization=1)
    with pytest.raises(ValueError, match="threads: expected no such option"):
        Backend.prepare(lstm_model()).run([X], threads=1)


# Nodes


def run(op="LSTM", inputs=None, opset=None, **attributes):
    """A node on its inputs by name: those of `arrays`, and what is given."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    a = {**arrays(op, directions), **(inputs or {})}
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    names = [n if n in a else "" for n in order]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    node = helper.make_node(op, names, outputs, **attributes)
    options = {} if opset is None else {"opset_version": opset}
    return Backend.run_node(node, [a[n] for n in names if n], **options)


def test_run_node():
    expected = Backend.run_model(lstm_model(), [X])
    for opset in (None, 7, 22):
        for a, b in zip(run(opset=opset), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    a = arrays()
    node = helper.make_node("LSTM", ["X", "W", "R", "", "", "h", "h"], ["", "Y_h"])
    h = np.ones((1, B, H), np.float32)  # one input in two places
    found = Backend.run_node(node, [a["X"], a["W"], a["R"], None, None, h, h])
    assert found._fields == ("Y_h",)
    np.testing.assert_array_equal(found[0], run(inputs={"initial_h": h, "initial_c": h}).Y_h)
    info = [(np.float32, (1, B, H))]
    Backend.run_node(node, [a["X"], a["W"], a["R"], h, h], outputs_info=info)
    with pytest.raises(ValueError, match="outputs_info: expected what the node gives"):
        Backend.run_node(node, [a["X"], a["W"], a["R"], h, h], outputs_info=[(np.float64, (1, B, H))])
    with pytest.raises(ValueError, match=r"inputs: expected 5 arrays \(X, W, R, h, h\), got 3"):
        Backend.run_node(node, [a["X"], a["W"], a["R"]])
    with pytest.raises(ValueError, match="node: "):
        Backend.run_node(helper.make_node("LSTM", ["X"], ["Y"]), [X])
    with pytest.raises(ValueError, match="verbose: expected no such option"):
        Backend.run_node(node, [a["X"], a["W"], a["R"], h, h], verbose=True)


BAD_ATTRIBUTES = [
    ("LSTM", {"direction": "backwards"}, "direction: expected 'forward' or 'reverse' or 'bidirectional'"),
    ("LSTM", {"layout": 2}, "layout: expected 0 or 1, got 2"),
    ("LSTM", {"input_forget": 2}, "input_forget: expected 0 or 1, got 2"),
    ("LSTM", {"hidden_size": 7}, "hidden_size: expected 5.*got 7"),
    ("GRU", {"clip": 0.0}, "clip: expected a number above 0, got 0.0"),
    ("GRU", {"clip": -1.0}, "clip: expected a number above 0, got -1.0"),
    ("RNN", {"clip": float("nan")}, "clip: expected a number above 0, got nan"),
    ("LSTM", {"activations": ["Tanh"]}, "activations: expected 3 names, 3 for each direction"),
    ("GRU", {"activations": ["Tanh", "Tanh"], "direction": "bidirectional"}, "activations: expected 4 names"),
    ("RNN", {"activations": ["Relu", "Relu"]}, "activations: expected 1 names"),
    ("RNN", {"activations": ["Gelu"]}, "RNN: activations: expected names among .* got 'Gelu'"),
    ("RNN", {"activation_alpha": [0.5]}, None),  # one value for an activation without: no two ways to read it
    ("RNN", {"activation_alpha": [0.5, 0.5]}, "RNN: activation_alpha: expected at most 0 values"),
    ("LSTM", {"output_sequence": 1}, "output_sequence"),
    ("GRU", {"input_forget": 1}, "input_forget"),
]


@pytest.mark.parametrize(("op", "attributes", "message"), BAD_ATTRIBUTES)
def test_attributes_that_the_operator_does_not_allow(op, attributes, message):
    if message is None:
        run(op, **attributes)
        return
    with pytest.raises(ValueError, match=message):
        run(op, **attributes)


def test_a_node_by_itself():
    """`Recurrent` is of use without a graph, and checks what onnx's checker would have."""
    with pytest.raises(ValueError, match="op: expected one of LSTM, GRU, RNN, got 'Conv'"):
        Recurrent("Conv")
    with pytest.raises(ValueError, match="GRU: input_forget: expected no such attribute"):
        Recurrent("GRU", {"input_forget": 1})
    a = arrays("GRU")
    y, last = Recurrent("GRU")(*a.values())
    np.testing.assert_array_equal(y, run("GRU").Y)
    np.testing.assert_array_equal(last, run("GRU").Y_h)
    assert Recurrent("GRU")(*a.values(), outputs=()) == (None, None)
    y, last = Recurrent("GRU")(*a.values(), outputs=(True,))
    assert y.shape == (T, 1, B, H) and last is None
    with pytest.raises(ValueError, match="W: expected an array, got none"):
        Recurrent("GRU")(a["X"], None, a["R"])
    with pytest.raises(ValueError, match="expected at most 6 inputs, got 7"):
        Recurrent("GRU")(*a.values(), *[None] * 4)


ONES = lambda *shape: np.ones(shape, np.float32)
LENGTHS = lambda *n: np.array(n, np.int32)
BAD_INPUTS = [
    ({"X": ONES(T, B)}, r"X: expected 3 dimensions, got shape \(3, 2\)"),
    ({"X": ONES(T, B, I + 1)}, r"X: expected 4 features, as W has, got shape \(3, 2, 5\)"),
    ({"X": ONES(0, B, I)}, "X: expected at least one step and one sequence"),
    ({"X": ONES(T, 0, I)}, "X: expected at least one step and one sequence"),
    ({"X": np.ones((T, B, I), np.int64)}, "X: expected float32 or float64, got int64"),
    ({"X": np.ones((T, B, I))}, "W: expected float64, got float32"),
    ({"W": ONES(4 * H, I)}, r"W: expected 3 dimensions, got shape \(20, 4\)"),
    ({"W": ONES(2, 4 * H, I)}, r"W: expected shape \(1, 20, 4\), got \(2, 20, 4\)"),
    ({"W": ONES(1, 3 * H, I)}, r"W: expected shape \(1, 20, 4\), got \(1, 15, 4\)"),
    ({"R": ONES(1, 3 * H, H)}, r"R: expected shape \(1, 20, 5\), got \(1, 15, 5\)"),
    ({"R": ONES(4 * H, H)}, r"R: expected 3 dimensions, got shape \(20, 5\)"),
    ({"B": ONES(1, 4 * H)}, r"B: expected shape \(1, 40\), got \(1, 20\)"),
    ({"P": ONES(1, 4 * H)}, r"P: expected shape \(1, 15\), got \(1, 20\)"),
    ({"initial_h": ONES(B, H)}, r"initial_h: expected shape \(1, 2, 5\), got \(2, 5\)"),
    ({"initial_c": ONES(1, 1, H)}, r"initial_c: expected shape \(1, 2, 5\), got \(1, 1, 5\)"),
    ({"initial_c": np.ones((1, B, H))}, "initial_c: expected float32, got float64"),
    ({"sequence_lens": LENGTHS(1)}, r"sequence_lens: expected shape \(2,\), got \(1,\)"),
    ({"sequence_lens": LENGTHS(1, 4)}, r"sequence_lens: expected lengths from 0 to 3, got \[1, 4\]"),
    ({"sequence_lens": LENGTHS(-1, 2)}, r"sequence_lens: expected lengths from 0 to 3, got \[-1, 2\]"),
    ({"sequence_lens": np.array([1, 2])}, "sequence_lens: expected int32, got int64"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS)
def test_inputs_that_the_operator_does_not_allow(inputs, message):
    with pytest.raises(ValueError, match=message):
        run(inputs=inputs)


# Devices


def test_devices():
    usable = nl.backends()["cuda"] is None
    assert Backend.supports_device("CPU") and Backend.supports_device("CPU:0")
    assert Backend.supports_device("CUDA") == usable
    for device in ("TPU", "cpu", "CUDA:x", "", None):
        assert not Backend.supports_device(device)
        with pytest.raises(ValueError, match="device: expected 'CPU', 'CUDA' or 'CUDA:1'"):
            Backend.prepare(lstm_model(), device)
    if not usable:
        with pytest.raises(RuntimeError, match=r"cuda:0.*can't be used here"):
            Backend.prepare(lstm_model(), "CUDA")
        with pytest.raises(RuntimeError, match=r"cuda:1.*can't be used here"):
            Backend.run_node(helper.make_node("Identity", ["X"], ["Y"]), [X], "CUDA:1")


def test_the_chosen_backend_is_heeded():
    a = arrays(dtype=np.float64)
    node = helper.make_node("LSTM", ["X", "W", "R"], ["Y"])
    with nl.use_backend("cpu", strict=True), pytest.raises(RuntimeError, match="float64"):
        Backend.run_node(node, list(a.values()))  # the fused kernels are float32
    with nl.use_backend("reference", strict=True):
        (y,) = Backend.run_node(node, list(a.values()))
    assert y.dtype == np.float64
    (fallback,) = Backend.run_node(node, list(a.values()))
    np.testing.assert_array_equal(y, fallback)
