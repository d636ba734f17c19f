"""`save_onnx`: what it writes gives the model's outputs, what ONNX can't express is refused, files are whole.

The graphs of onnx_models.py are run by onnx's reference evaluator, or, where that ignores what a node says (lengths, clip,
other activations than the defaults), compared with recorded answers of ONNX Runtime (record_exports.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import CASES, USUAL, I, beyond_the_reference, error

import numlstm as nl
from numlstm.io.onnx.exporter import to_proto

ANSWERS = Path(__file__).with_name("answers.npz")
name = lambda case: case.name


@pytest.fixture(scope="module")
def recorded():
    with np.load(ANSWERS) as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_graph_gives_the_models_outputs(case, recorded):
    """For two batches and lengths, as both sizes are free."""
    model = case.model()
    proto = case.proto(model)
    names = [v.name for v in proto.graph.input]
    evaluator = None if beyond_the_reference(proto) else ReferenceEvaluator(proto)
    for size in (0, 1):
        with nl.use_backend("reference"):
            expected = case.expected(model, size)
        if evaluator is None:
            found = [recorded[f"{case.name}/{size}/{k}"] for k in range(len(proto.graph.output))]
        else:
            found = [np.asarray(a) for a in evaluator.run(None, case.feed(names, size))]
        for a, b in zip(found, expected, strict=False):  # behind them the states, for cases that have them
            assert error(a, b) <= 1e-5
        assert len(found) >= len(expected)


def test_every_recorded_answer_has_its_question(recorded):
    expected = set()
    for case in CASES:
        proto = case.proto(case.model())
        if beyond_the_reference(proto):
            expected |= {f"{case.name}/{size}/{k}" for size in (0, 1) for k in range(len(proto.graph.output))}
    assert set(recorded) - {"version"} == expected and len(expected) > 150
    assert ANSWERS.stat().st_size < 150_000


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_graph_comes_back(case):
    """numlstm -> ONNX -> numlstm, and the same a second time."""
    model = case.model()
    proto = case.proto(model)
    again = nl.io.load_onnx(proto)
    twice = nl.io.load_onnx(to_proto(again))
    with nl.use_backend("reference"):
        for size in (0, 1):
            feed = case.feed(again.input_names, size)
            found, repeated = (
                [v.numpy() for v in (y if isinstance(y, list) else [y])] for y in (again(feed), twice(feed))
            )
            for a, b in zip(found, case.expected(model, size), strict=False):
                assert error(a, b) <= 2e-6
            for a, b in zip(found, repeated, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # two biases have become one


# Random models

UNITS = (1, 2, 3, 5)


def random_model(draw: np.random.Generator) -> nl.Sequential:
    """Layers in any order that fits."""
    flag = lambda: bool(draw.integers(2))
    units = lambda: int(draw.choice(UNITS))
    ids = flag()
    layers: list[Any] = [nl.Embedding(7, units() + 1, input_shape=(None,)) if ids else nl.Input((None, 4))]
    for _ in range(draw.integers(1, 4)):
        match draw.integers(9):
            case 0 | 1:
                coupled = draw.choice(["", "input", "forget"])
                layer: Any = nl.LSTM(
                    units(), peephole=flag(), coupled=coupled == "forget" or (coupled == "input" and "input"),
                    use_bias=flag(), go_backwards=flag(), return_sequences=True,
                )  # fmt: skip
            case 2 | 3:
                layer = nl.GRU(
                    units(), reset_after=flag(), use_bias=flag(), return_sequences=True, go_backwards=flag()
                )
            case 4:
                layer = nl.SimpleRNN(
                    units(), draw.choice(["tanh", "relu", "softsign"]), return_sequences=True
                )
            case 5 | 6:
                inner = [nl.LSTM, nl.GRU, nl.SimpleRNN][draw.integers(3)]
                mode = draw.choice(["concat", "sum", "mul", "ave"])
                layer = nl.Bidirectional(inner(units(), return_sequences=True), mode)
            case 7:
                layer = nl.LayerNormalization()
            case _:
                layer = nl.TimeDistributed(nl.Dense(units(), "tanh")) if flag() else nl.Dropout(0.3)
        layers.append(layer)
    ends: list[Any] = [
        nl.LSTM(units()),
        nl.GlobalAveragePooling1D(),
        nl.GlobalMaxPooling1D(),
        nl.Activation("tanh"),
    ]
    model = nl.Sequential([*layers, ends[draw.integers(4)], nl.Dense(units(), "sigmoid")])
    for variable in model.weights:
        variable.assign(draw.standard_normal(variable.shape) * 0.5)
    return model


def random_question(seed: int) -> tuple[nl.Sequential, bool, list[dict[str, np.ndarray]]]:
    """A model, whether it is asked with lengths, and two inputs of unlike sizes."""
    draw = np.random.default_rng(seed)
    model, lengths, feeds = random_model(draw), bool(draw.integers(2)), []
    for _ in range(2):
        B, T = draw.integers(1, 6, 2)
        ids = isinstance(model.layers[0], nl.Embedding)
        x = draw.integers(0, 7, (B, T)) if ids else draw.standard_normal((B, T, 4)).astype(np.float32)
        feeds.append({"x": x} | ({"lengths": draw.integers(1, T + 1, B).astype(np.int32)} if lengths else {}))
    return model, lengths, feeds


@pytest.mark.parametrize("part", range(4))
def test_a_hundred_random_models_go_there_and_back(part):
    for seed in range(25 * part, 25 * part + 25):
        model, lengths, feeds = random_question(seed)
        again = nl.io.load_onnx(to_proto(model, lengths=lengths))
        with nl.use_backend("reference"):
            for feed in feeds:
                expected = model(feed["x"], lengths=feed.get("lengths")).numpy()
                found = again(list(feed.values()) if lengths else feed["x"]).numpy()
                assert error(found, expected) <= 1e-5, seed


# What is in the graph


def nodes(model, **options):
    return Counter(node.op_type for node in to_proto(model, **options).graph.node)


def test_recurrent_layers_are_native_nodes():
    for case in CASES:
        count = Counter(node.op_type for node in case.proto(case.model()).graph.node)
        assert not {"Loop", "Scan", "If"} & set(count)
        if case.name.startswith(("lstm", "gru", "rnn", "indrnn")):
            assert sum(count[op] for op in USUAL) == 1
    stack = nl.Sequential(
        [nl.Bidirectional(nl.LSTM(3, return_sequences=True, input_shape=(None, 2))), nl.GRU(2)]
    )
    count = nodes(stack)
    assert (count["LSTM"], count["GRU"]) == (1, 1)
    (lstm,) = [n for n in to_proto(stack).graph.node if n.op_type == "LSTM"]
    assert {a.name: a.s for a in lstm.attribute}["direction"] == b"bidirectional"
    unlike = nl.Bidirectional(nl.LSTM(3), backward_layer=nl.LSTM(3, peephole=True, go_backwards=True))
    unlike.build((None, None, 2))
    assert nodes(unlike)["LSTM"] == 2


def test_names_and_origin(tmp_path):
    model = nl.Sequential(
        [nl.Input((10, 2), name="series"), nl.LSTM(3, name="memory"), nl.Dense(1)], name="forecaster"
    )
    path = tmp_path / "m.onnx"
    nl.io.save_onnx(model, path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.producer_name, proto.producer_version) == ("numlstm", nl.__version__)
    assert proto.graph.name == "forecaster" and [o.version for o in proto.opset_import] == [17]
    assert proto.ir_version == 8  # what operator set 17 asks for: older runtimes read it
    (given,) = proto.graph.input
    sizes = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, sizes) == ("series", ["batch", "time", 2])
    (result,) = proto.graph.output
    assert result.name == "output" and result.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {t.name for t in proto.graph.initializer} >= {"memory/W", "memory/R", "memory/B"}
    assert "memory" in {n.name for n in proto.graph.node}
    assert list(tmp_path.iterdir()) == [path]
    first = path.read_bytes()
    nl.io.save_onnx(model, path)
    assert path.read_bytes() == first  # same model, same bytes


def test_states_of_stateful_layers_are_inputs_and_outputs():
    """Fed back, they go on as the layer itself does."""
    model = nl.Sequential([nl.LSTM(3, stateful=True, name="a", input_shape=(None, 2)), nl.Dense(1)])
    evaluator = ReferenceEvaluator(proto := to_proto(model))
    assert [v.name for v in proto.graph.input] == ["input", "a.initial_h", "a.initial_c"]
    assert [v.name for v in proto.graph.output] == ["output", "a.final_h", "a.final_c"]
    x = np.random.default_rng(0).standard_normal((2, 6, 2)).astype(np.float32)
    h = c = np.zeros((2, 3), np.float32)
    for piece in (x[:, :4], x[:, 4:]):
        y, h, c = evaluator.run(None, {"input": piece, "a.initial_h": h, "a.initial_c": c})
        np.testing.assert_allclose(model(piece).numpy(), y, rtol=1e-5, atol=1e-6)


def test_a_row_of_length_zero_ends_where_it_began():
    """ONNX Runtime's node would give zeros; what stands behind the node puts that right."""
    layer = nl.GRU(2, name="r")
    layer.build((None, None, 3))
    proto = to_proto(layer, lengths=True, states=True)
    final = next(n for n in proto.graph.node if n.op_type == "Where")
    assert "r.initial_h" in final.input
    x, h = np.ones((2, 4, 3), np.float32), np.float32([[1, 2], [3, 4]])
    again = nl.io.load_onnx(proto)
    y, last = again({"input": x, "lengths": np.int32([0, 2]), "r.initial_h": h})
    np.testing.assert_array_equal(y.numpy()[0], h[0])
    np.testing.assert_array_equal(last.numpy(), y.numpy())
    np.testing.assert_allclose(y.numpy(), layer(x, lengths=[0, 2], initial_state=[h]).numpy(), rtol=1e-6)


def test_clip_is_an_attribute():
    """onnx's evaluator leaves it out, ONNX Runtime does so in one place of an LSTM; the import here follows the text."""
    layer = nl.LSTM(3, clip=0.25, return_sequences=True)
    layer.build((None, None, 2))
    layer.set_weights([np.random.default_rng(0).standard_normal(w.shape) for w in layer.weights])
    proto = to_proto(layer)
    (node,) = [n for n in proto.graph.node if n.op_type == "LSTM"]
    assert {a.name: a.f for a in node.attribute}["clip"] == 0.25
    x = np.random.default_rng(1).standard_normal((2, 5, 2)).astype(np.float32)
    again = nl.io.load_onnx(proto)
    with nl.use_backend("reference"):
        np.testing.assert_allclose(again(x).numpy(), layer(x).numpy(), rtol=1e-6)


def test_double_precision():
    layer = nl.LSTM(3, dtype="float64", return_sequences=True)
    x = np.random.default_rng(0).standard_normal((2, 5, 2))
    expected = layer(x).numpy()
    proto = to_proto(layer)
    (y,) = ReferenceEvaluator(proto).run(None, {"input": x})
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(nl.io.load_onnx(proto)(x).numpy(), expected, rtol=1e-12)


# What is refused


@nl.cell(gates=2, state=("h",))
def refused_cell(a, b, h):
    return h + nl.sigmoid(a) * (nl.tanh(b) - h)


def linear_twice(x):
    return x * 2


REFUSED = [
    (nl.LSTM(3, layer_norm=True), "layer_norm: the operator does not normalise"),
    (nl.LSTM(3, cell_clip=1.0), "cell_clip: the operator's clip holds the activations' inputs"),
    (nl.GRU(3, cell_clip=1.0), "cell_clip"),
    (nl.LSTM(3, projection=2), "projection: the operator's output"),
    (nl.LSTM(3, zoneout=[0.0, 0.1]), "zoneout: at inference"),
    (nl.GRU(3, zoneout=0.1), "zoneout"),
    (nl.LSTM(3, return_cell_sequence=True), "return_cell_sequence: the operator gives the last"),
    (nl.LSTM(3, coupled=True, recurrent_activation="tanh"), "coupled: the operator couples f = 1 - i.*coupled='input'"),
    (nl.GRU(3, "mish"), "activation: ONNX' recurrent operators have no 'mish'; they have affine"),
    (nl.LSTM(3, recurrent_activation="exponential"), "recurrent_activation: .*'exponential'"),
    (nl.LSTM(3, output_activation="silu"), "output_activation: .*'silu'"),
    (nl.SLSTM(3), "cell: ONNX has no operator for the equations of SLSTM"),
    (nl.RNN(refused_cell, 3), "cell refused_cell: ONNX has no operator"),
    (nl.Dense(3, linear_twice), "activation: it is a function of one's own"),
    (nl.Sequential([nl.Masking(), nl.LSTM(2)]), "lstm.*: mask: .*take lengths.*prefix_masks=True"),
    (nl.Sequential([nl.Masking(), nl.TimeDistributed(nl.LayerNormalization()), nl.GRU(2)]), "gru.*: mask"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_onnx_can_not_express_is_refused(layer, message, tmp_path):
    with nl.use_backend("reference"):
        layer(np.ones((1, 2, I), np.float32))
    with pytest.raises(ValueError, match=f"{message}.*can't be written as ONNX"):
        nl.io.save_onnx(layer, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_models_that_can_not_be_written(tmp_path):
    class Own(nl.Layer):
        def call(self, x):
            return x * 2

    path = tmp_path / "m.onnx"
    own = Own()
    own(np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match=r"Own computes by code of its own.*Sequential of Activation, Add"):
        nl.io.save_onnx(own, path)
    with pytest.raises(ValueError, match="is not built"):
        nl.io.save_onnx(nl.Sequential([nl.LSTM(2)]), path)
    built = nl.Sequential([nl.LSTM(2, input_shape=(None, 3)), nl.Dense(1)])
    with pytest.raises(ValueError, match="int8 weights"):
        nl.io.save_onnx(built.quantize("int8"), path)
    with pytest.raises(ValueError, match=r"path: ONNX models are saved as \.onnx files, got"):
        nl.io.save_onnx(built, tmp_path / "m.safetensors")
    for opset in (16, 99, True, "17"):
        with pytest.raises(ValueError, match="opset: expected a number from 17 to"):
            nl.io.save_onnx(built, path, opset=opset)
    with pytest.raises(ValueError, match="model: expected a model or a layer, got str"):
        nl.io.save_onnx("m", path)
    table = nl.Sequential([nl.Dense(2, input_shape=(3,))])
    with pytest.raises(ValueError, match=r"lengths: .* has no single input with a time axis"):
        nl.io.save_onnx(table, path, lengths=True)
    assert not list(tmp_path.iterdir())
