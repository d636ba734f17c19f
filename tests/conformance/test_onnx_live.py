"""ONNX Runtime side by side, for whoever has it (`make test-peers`), and onnx's own test runner."""

from __future__ import annotations

import unittest
import warnings

import numpy as np
import onnx_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_cases import CASES, EMPTY, Case, error, inputs
from test_onnx_operators import agree, ours

from numlstm.io.onnx import Backend

pytestmark = pytest.mark.peers
pytest.importorskip("onnxruntime")

import onnxruntime_oracle  # noqa: E402

name = lambda case: case.name


@pytest.mark.parametrize("case", [c for c in CASES if c.not_compared is None], ids=name)
def test_answers_of_onnx_runtime(case):
    theirs = onnxruntime_oracle.run(case)
    agree(ours(case, "cpu", np.float32), theirs, 2e-5)
    agree(theirs, onnx_oracle.run(case.op, case.attributes, inputs(case)), 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.not_compared], ids=name)
def test_what_is_not_compared_does_differ(case):
    """The table of questions says where ONNX Runtime goes its own way; a version that no longer does shows here."""
    expected = onnx_oracle.run(case.op, case.attributes, inputs(case))
    agree(ours(case, "cpu", np.float32), expected, 1e-5)
    try:
        theirs = onnxruntime_oracle.run(case)
    except Exception as refusal:
        assert "layout" in str(refusal) and case.layout
        return
    assert max(error(theirs[name], expected[name]) for name in case.outputs) > 1e-3
    if case.not_compared == EMPTY:  # it is the last states of that row, and nothing else
        assert error(theirs["Y"], expected["Y"]) < 1e-5
        row = case.lengths.index(0)
        for name in case.outputs[1:]:
            assert not theirs[name][:, row].any()
            kept = np.arange(case.B) != row
            assert error(theirs[name][:, kept], expected[name][:, kept]) < 1e-5


sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["LSTM", "GRU", "RNN"]),
    st.sampled_from(["forward", "reverse", "bidirectional"]),
    st.booleans(),
    sizes, sizes, sizes, st.integers(1, 40), st.data(),
)  # fmt: skip
def test_any_shape_and_lengths(op, direction, option, T, B, I, H, data):
    lengths = tuple(data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    attributes = {"direction": direction} | ({"linear_before_reset": int(option)} if op == "GRU" else {})
    optional = ("B", "initial_h", "initial_c") if option else ("B",)
    case = Case(f"{op}-{T}-{B}-{I}-{H}", op, attributes, optional, lengths, T=T, B=B, I=I, H=H)
    theirs = onnxruntime_oracle.run(case)
    agree(ours(case, "cpu", np.float32), theirs, 2e-5)
    agree(ours(case, "reference", np.float64), theirs, 1e-5)


def test_the_runner_of_onnx():
    """`onnx.backend.test.BackendTest` as others use it: 18 tests pass on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's own cases of other operators overflow on purpose
        from onnx.backend.test import BackendTest

        runner = BackendTest(Backend, __name__)
        runner.include(r"^test_(lstm|gru|rnn|simple_rnn)_.*_cpu$")
        result = unittest.TestResult()
        suite = runner.test_suite
        suite.run(result)
    assert result.wasSuccessful(), result.failures + result.errors
    assert result.testsRun - len(result.skipped) == 18
