"""`save_onnx` of a `Graph`, the form of Keras' functional models: layers, operations, masks and states by reference."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

import numlstm as nl
from numlstm.graph import Graph
from numlstm.io.onnx.exporter import to_proto

DRAW = np.random.default_rng(0)
ref = lambda name, k=0, node=0: {"from": [name, node, k]}


def call(name, *args, op=None, **kwargs):
    made = {"name": name, "node": 0, "args": list(args), "kwargs": kwargs}
    return made if op is None else {**made, "op": op}


def checked(model, *inputs, **options):
    """The graph's outputs are the model's, for two batches."""
    given = list(inputs) if len(inputs) > 1 else inputs[0]
    with nl.use_backend("reference"):
        model(given)
    proto = to_proto(model, **options)
    evaluator = ReferenceEvaluator(proto)
    names = [v.name for v in proto.graph.input]
    for rows in (slice(None), slice(0, 1)):
        parts = [x[rows] for x in inputs]
        with nl.use_backend("reference"):
            y = model(parts if len(parts) > 1 else parts[0])
        found = evaluator.run(None, dict(zip(names, parts, strict=True)))
        for a, b in zip(found, y if isinstance(y, list) else [y], strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)
    return proto


def series(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def test_states_go_from_an_encoder_to_a_decoder():
    layers = [
        nl.LSTM(4, return_state=True, name="encoder"),
        nl.LSTM(4, return_sequences=True, name="decoder"),
    ]
    calls = [
        call("encoder", ref("past")),
        call("decoder", ref("future"), initial_state=[ref("encoder", 1), ref("encoder", 2)]),
    ]
    model = Graph(layers, calls, ["past", "future"], [ref("decoder"), ref("encoder")])
    proto = checked(model, series(3, 6, 2), series(3, 5, 3))
    assert [v.name for v in proto.graph.input] == ["past", "future"]
    sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert sizes == [["batch", "past_time", 2], ["batch", "future_time", 3]]


def test_operations_between_layers():
    layers = [nl.LSTM(4, return_sequences=True, name="a"), nl.SimpleRNN(4, return_sequences=True, name="b")]
    calls = [
        call("a", ref("x")),
        call("b", ref("x")),
        call("sum", [ref("a"), ref("b")], op="MergeAdd"),
        call("product", ref("sum"), ref("a"), op="Multiply"),
        call("wide", [ref("product"), ref("b")], op="MergeConcatenate", axis=-1),
        call("last", ref("wide"), [{"slice": [None, None, None]}, -1], op="GetItem"),
        call("part", ref("wide"), [{"slice": [None, None, None]}, {"slice": [1, None, 2]}], op="GetItem"),
        call("mean", ref("part"), op="Mean", axis=1),
        call("scaled", ref("mean"), 2.0, op="Multiply"),
        call("found", ref("scaled"), ref("last"), op="Subtract"),
        call("bent", ref("found"), op="Tanh"),
    ]
    checked(Graph(layers, calls, ["x"], ref("bent")), series(3, 6, 2))


def test_masks_by_reference():
    ids = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    layers = [nl.Embedding(9, 3, name="embedding"), nl.GlobalAveragePooling1D(name="pool")]
    calls = [
        call("embedding", ref("ids")),
        call("kept", ref("ids"), 0, op="NotEqual"),
        call("pool", ref("embedding"), mask=ref("kept")),
    ]
    checked(Graph(layers, calls, ["ids"], ref("pool")), ids)
    recurrent = [layers[0], nl.GRU(2, name="pool")]
    model = Graph(recurrent, calls, ["ids"], ref("pool"))
    model(ids)
    with pytest.raises(ValueError, match=r"pool: mask: .*prefix_masks=True"):
        to_proto(model)
    assert to_proto(model, prefix_masks=True)


def test_what_a_graph_can_not_hold():
    dense = nl.Dense(2, name="d")
    for calls, outputs, message in (
        (
            [
                call("d", ref("x")),
                call("ones", ref("d"), op="OnesLike"),
                call("o", ref("d"), ref("ones"), op="Add"),
            ],
            ref("o"),
            "OnesLike: the operation has no nodes",
        ),
        ([call("d", ref("x"))], {"y": ref("d")}, "outputs: they have names of their own"),
        (
            [call("d", ref("x")), call("i", ref("d"), [[0, 1]], op="GetItem")],
            ref("i"),
            "GetItem: only numbers and slices",
        ),
    ):
        model = Graph([dense], calls, ["x"], outputs)
        model(series(2, 3))
        with pytest.raises(ValueError, match=f"{message}.*can't be written as ONNX"):
            to_proto(model)
