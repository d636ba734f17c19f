"""The operators of imported graphs: onnx's own node tests, older operator sets, gradients."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case import node as node_tests
from onnx.backend.test.runner import Runner

import numlstm as nl
from numlstm.io.onnx import OPERATORS, Backend

# Node tests whose file is not called like their operator; those that take seconds to make
OTHER_FILES = ("reduce_log_sum", "and_", "not_", "or_")
SLOW = {"maxpool", "averagepool"}  # most of them over two axes; see test_pooling
EMPTY = "a maximum or minimum of nothing is refused"
NOT_FOLLOWED = {
    f"test_reduce_{kind}_empty_set{more}": EMPTY
    for kind, more in (("max", ""), ("max", "_bool"), ("min", ""), ("log_sum_exp", ""))
}


def cases():
    """The tests of the operators known here; onnx enters them in a list as their files are imported."""
    prefix = "onnx.backend.test.case.node."
    names = {op.lower() for op in OPERATORS}
    names |= {"".join(f"_{c.lower()}" if c.isupper() else c for c in op).lstrip("_") for op in OPERATORS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows on purpose
        for name in sorted((names | set(OTHER_FILES)) - SLOW):
            if importlib.util.find_spec(prefix + name):
                importlib.import_module(prefix + name)
    return [c for c in node_tests._NodeTestCases if all(n.op_type in OPERATORS for n in c.model.graph.node)]


def arrays(values):
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]


def test_onnx_node_tests():
    """What is not refused gives the answers expected; what is refused says so by a NotImplementedError."""
    counts, wrong, covered = Counter(), {}, set()
    for case in cases():
        try:
            prepared = Backend.prepare(case.model)
            with nl.use_backend("reference"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # logarithms of 0, and the like
                for given, expected in case.data_sets:
                    found = prepared.run(arrays(given))
                    Runner.assert_similar_outputs(arrays(expected), list(found), case.rtol, case.atol)
            counts["passed"] += 1
            covered |= {n.op_type for n in case.model.graph.node}
        except NotImplementedError:
            counts["refused"] += 1
        except Exception as error:
            wrong[case.name] = f"{type(error).__name__}: {error}"
    assert {name: why for name, why in wrong.items() if name not in NOT_FOLLOWED} == {}
    assert set(wrong) == set(NOT_FOLLOWED)  # else the list is out of date
    assert counts["passed"] > 600 and counts["refused"] < 300, counts
    missing = set(OPERATORS) - covered
    assert missing == {"MaxPool", "AveragePool", "Conv", "ReduceProd"}, missing  # over two axes, or of floats


# Older operator sets


def answer(op, inputs, opset, outputs=1, **attributes):
    node = helper.make_node(
        op, [f"i{k}" for k in range(len(inputs))], [f"o{k}" for k in range(outputs)], **attributes
    )
    return [np.asarray(a) for a in Backend.run_node(node, inputs, opset_version=opset)]


X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
I64 = lambda *v: np.array(v, np.int64)
OLD_AND_NEW = [
    ("Squeeze", (X[:, :1],), 7, {"axes": [1]}, (X[:, :1], I64(1)), 13, {}),
    ("Unsqueeze", (X,), 7, {"axes": [0, -1]}, (X, I64(0, -1)), 13, {}),
    ("Slice", (X,), 7, {"starts": [0, 1], "ends": [2, -1], "axes": [0, 2]}, (X, I64(0, 1), I64(2, -1), I64(0, 2)), 13, {}),
    ("Clip", (X,), 7, {"min": 3.0, "max": 9.0}, (X, np.float32(3), np.float32(9)), 13, {}),
    ("Pad", (X,), 7, {"pads": [0, 1, 0, 0, 0, 2], "value": 5.0}, (X, I64(0, 1, 0, 0, 0, 2), np.float32(5)), 13, {}),
    ("ReduceSum", (X,), 7, {"axes": [1]}, (X, I64(1)), 13, {}),
    ("ReduceMean", (X,), 7, {"axes": [1], "keepdims": 0}, (X, I64(1)), 18, {"keepdims": 0}),
    ("ReduceMax", (X,), 13, {"axes": [-1]}, (X, I64(-1)), 20, {}),
    ("TopK", (X,), 7, {"k": 2}, (X, I64(2)), 11, {}),
    ("Softmax", (X.reshape(2, 12),), 7, {}, (X.reshape(2, 12),), 13, {"axis": -1}),
    ("BatchNormalization", (X, *[np.float32([1, 2, 3])] * 4), 7, {}, (X, *[np.float32([1, 2, 3])] * 4), 15, {}),
    ("Dropout", (X,), 7, {"ratio": 0.5}, (X, np.float32(0.5)), 13, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "old", "before", "options", "new", "after", "others"),
    OLD_AND_NEW,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_that_became_inputs(op, old, before, options, new, after, others):
    outputs = 2 if op == "TopK" else 1
    for a, b in zip(
        answer(op, old, before, outputs, **options), answer(op, new, after, outputs, **others), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_an_old_split_and_softmax():
    first, second = answer("Split", (X,), 11, 2, axis=2, split=[1, 3])
    np.testing.assert_array_equal(np.concatenate([first, second], 2), X)
    uneven = answer("Split", (X,), 18, 2, axis=1, num_outputs=2)
    assert [a.shape[1] for a in uneven] == [2, 1]
    (flat,) = answer("Softmax", (X,), 11)  # over all axes from the second on, as one
    np.testing.assert_allclose(flat.sum((1, 2)), 1, rtol=1e-6)
    (log,) = answer("LogSoftmax", (X,), 11, axis=2)
    np.testing.assert_allclose(np.exp(log).sum(2), 1, rtol=1e-6)


def test_pooling():
    (top,) = answer("MaxPool", (X,), 12, kernel_shape=[2], strides=[2], pads=[1, 0])
    np.testing.assert_array_equal(top, np.stack([X[..., 0], X[..., 2]], -1))
    (mean,) = answer("AveragePool", (X,), 19, kernel_shape=[3], pads=[1, 1])
    expected = [X[..., max(k - 1, 0) : k + 2].mean(-1) for k in range(4)]
    np.testing.assert_allclose(mean, np.stack(expected, -1), rtol=1e-6)
    (padded,) = answer("AveragePool", (X,), 19, kernel_shape=[3], pads=[1, 1], count_include_pad=1)
    np.testing.assert_allclose(padded[..., 0], X[..., :2].sum(-1) / 3, rtol=1e-6)
    (spread,) = answer("MaxPool", (X,), 12, kernel_shape=[2], dilations=[3])
    np.testing.assert_array_equal(spread, X[..., 3:])


def test_convolution_over_time():
    """Each step of the result is a sum over what it sees."""
    w, b = (
        np.random.default_rng(0).standard_normal((6, 1, 2)).astype(np.float32),
        np.arange(6, dtype=np.float32),
    )
    (y,) = answer("Conv", (X, w, b), 11, group=3, dilations=[2], auto_pad="SAME_UPPER", strides=[2])
    x = np.pad(X, [(0, 0), (0, 0), (0, 1)])  # ceil(4 / 2) steps of 3 values, two apart: one is missing behind
    expected = [[w[o, 0] @ x[1, o // 2, [t, t + 2]] + b[o] for t in (0, 2)] for o in range(6)]
    np.testing.assert_allclose(y[1], expected, rtol=1e-5)
    assert answer("ReduceProd", (np.int64([[1, 2], [3, 4]]), I64(1)), 18)[0].ravel().tolist() == [2, 12]


# Gradients


def differentiable(op, shapes, opset=20, outputs=1, constants=(), **attributes):
    """A float64 graph of one node whose inputs are weights."""
    draw = np.random.default_rng(len(op) + len(shapes))
    arrays = {f"w{k}": draw.standard_normal(shape) for k, shape in enumerate(shapes)} | dict(constants)
    names = [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op, list(arrays), names, **attributes)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("o0", onnx.TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)  # the output's shape, which a model must say


GRADIENTS = [
    ("Erf", [(3, 4)], {}),
    ("HardSwish", [(3, 4)], {}),
    ("Celu", [(3, 4)], {"alpha": 0.7}),
    ("Gemm", [(3, 4), (5, 4), (5,)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Conv", [(2, 4, 6), (6, 2, 3), (6,)], {"group": 2, "pads": [1, 2], "strides": [2]}),
    ("Einsum", [(2, 3, 4), (2, 5, 4)], {"equation": "bqd,bkd->bqk"}),
    ("LayerNormalization", [(2, 3, 4), (3, 4), (3, 4)], {"axis": 1}),
    ("InstanceNormalization", [(2, 3, 4), (3,), (3,)], {}),
    ("ReduceLogSumExp", [(3, 4)], {"axes": [1]}),
    ("ReduceL2", [(3, 4)], {"axes": [0]}),
    ("MaxPool", [(2, 3, 6)], {"kernel_shape": [2], "strides": [2]}),
    ("AveragePool", [(2, 3, 6)], {"kernel_shape": [3], "pads": [1, 1]}),
    ("PRelu", [(3, 4), (4,)], {}),
    ("Shrink", [(3, 4)], {"lambd": 0.3, "bias": 0.1}),
    ("Concat", [(3, 4), (3, 2)], {"axis": 1}),
    ("Transpose", [(3, 4)], {}),
]


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"), GRADIENTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_gradients_are_those_of_small_steps(op, shapes, attributes):
    old = op.startswith("Reduce")
    graph, arrays = _read(differentiable(op, shapes, 13 if old else 22, **attributes))
    rng = np.random.default_rng(1)
    values = {name: nl.Variable(a, name=name) for name, a in arrays.items()}
    run = lambda given: _program(graph).run({**graph.constants, **given})[0]
    y = run(values)
    weights = rng.standard_normal(y.shape)
    with nl.GradientTape() as tape:
        loss = (run(values) * weights).sum()
    gradients = tape.gradient(loss, list(values.values()))
    for (name, a), gradient in zip(arrays.items(), gradients, strict=True):
        direction = rng.choice([-1.0, 1.0], a.shape)
        step = 1e-5
        up, down = (
            float((run({**values, name: nl.Tensor(a + s * step * direction)}) * weights).sum())
            for s in (1, -1)
        )
        np.testing.assert_allclose(
            (gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-8
        )


def _read(model):
    from numlstm.io.onnx.importer import read_graph

    graph, arrays = read_graph(model)
    return graph, {name: a for name, a in arrays.items() if a.dtype == np.float64}


def _program(graph):
    from numlstm.io.onnx.graph import Program

    return Program(graph)
