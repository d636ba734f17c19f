"""onnx's own node tests of the recurrent operators, 18 in all: its graphs, inputs, answers and tolerances."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
from onnx.backend.test.case import node as node_tests
from onnx.backend.test.runner import Runner

import numlstm as nl
from numlstm.io.onnx import Backend

for _module in (
    "gru",
    "lstm",
    "rnn",
):  # each enters its cases in the list; the loader would make all of onnx's 1,884
    importlib.import_module(f"onnx.backend.test.case.node.{_module}")
OPERATORS = {"LSTM", "GRU", "RNN"}
CASES = [c for c in node_tests._NodeTestCases if any(n.op_type in OPERATORS for n in c.model.graph.node)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_node(case, backend):
    assert Backend.is_compatible(case.model)
    with nl.use_backend(backend, strict=True):
        prepared = Backend.prepare(case.model)
        assert case.data_sets
        for given, expected in case.data_sets:
            found = prepared.run(given)
            Runner.assert_similar_outputs(expected, found, case.rtol, case.atol)
            for ours, answer in zip(found, expected, strict=True):  # closer than the suite asks for
                np.testing.assert_allclose(ours, answer, rtol=1e-5, atol=1e-7)


def test_there_are_18_of_them():
    """Counted with onnx 1.23, so that none is missed by the way they are gathered."""
    counts = Counter(c.model.graph.node[0].op_type for c in CASES)
    assert counts == {"LSTM": 6, "GRU": 6, "RNN": 6}
    assert all(len(c.model.graph.node) == 1 for c in CASES)
