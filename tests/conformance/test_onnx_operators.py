"""The ONNX operators LSTM, GRU and RNN, option by option, against the operators' text and ONNX Runtime's answers.

Every question of onnx_cases.py is put to the reference in float64, all but some activations' also to the fused kernels
in float32, and held to onnx_oracle.py; where ONNX Runtime follows the text, also to what it answered (onnxruntime.npz).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_oracle
import pytest
from onnx_cases import CASES, Case, error, inputs, model

import numlstm as nl
from numlstm.io.onnx import ACTIVATIONS, Backend

ANSWERS = Path(__file__).with_name("onnxruntime.npz")
name = lambda case: case.name


def ours(case: Case, backend: str, dtype: type, **options) -> dict[str, np.ndarray]:
    given = inputs(case, dtype)
    graph = model(case, given, **options)
    fed = {i.name: given[i.name] for i in graph.graph.input}
    with nl.use_backend(backend, strict=True):
        found = Backend.run_model(graph, fed)
    assert all(a.dtype == dtype for a in found)
    return dict(zip(case.outputs, found, strict=True))


def agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float) -> None:
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, {name: f"{e:.1e}" for name, e in errors.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c.fused], ids=name)
def test_fused_kernels_follow_the_text(case):
    agree(ours(case, "cpu", np.float32), onnx_oracle.run(case.op, case.attributes, inputs(case)), 1e-5)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_reference_follows_the_text(case):
    expected = onnx_oracle.run(case.op, case.attributes, inputs(case))
    agree(ours(case, "reference", np.float64, weights_fixed=False), expected, 1e-12)


@pytest.fixture(scope="module")
def answers():
    with np.load(ANSWERS) as file:
        return dict(file)


@pytest.mark.parametrize("case", [c for c in CASES if c.not_compared is None], ids=name)
def test_recorded_answers_of_onnx_runtime(case, answers):
    expected = {name: answers[f"{case.name}/{name}"] for name in case.outputs}
    agree(ours(case, "reference", np.float64), expected, 1e-5)
    if case.fused:
        agree(
            ours(case, "cpu", np.float32), expected, 2e-5
        )  # two float32 results, apart by the bounds of both


def test_every_recorded_answer_has_its_question(answers):
    expected = {f"{c.name}/{name}" for c in CASES if c.not_compared is None for name in c.outputs}
    assert set(answers) - {"version"} == expected
    assert ANSWERS.stat().st_size < 200_000


def test_the_questions_hold_every_activation_in_every_place():
    each = {"LSTM": 3, "GRU": 2, "RNN": 1}
    for op, count in each.items():
        for slot in range(count):
            asked = {
                name_
                for c in CASES
                if c.op == op
                for name_ in c.attributes.get("activations", ())[slot::count]
            }
            assert asked >= set(ACTIVATIONS), (op, slot)
    fused = {name_ for c in CASES if c.fused for name_ in c.attributes.get("activations", ("Tanh",))}
    assert fused == set(ACTIVATIONS)


def test_padding_is_never_read():
    """What lies beyond a row's length changes nothing, not even if it is no number."""
    (case,) = (c for c in CASES if c.name == "LSTM-bidirectional-lengths")
    for backend, dtype in (("cpu", np.float32), ("reference", np.float64)):
        given = inputs(case, dtype)
        clean = Backend.run_model(model(case, given, weights_fixed=False), given)
        for b, n in enumerate(case.lengths):
            given["X"][n:, b] = np.nan
        with nl.use_backend(backend):
            dirty = Backend.run_model(model(case, given, weights_fixed=False), given)
        for a, b in zip(clean, dirty, strict=True):
            assert np.isfinite(b).all()
            np.testing.assert_allclose(a, b, atol=1e-6)
