"""Cells of several stages against loops written by hand from the papers, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zoo
from numpy.testing import assert_allclose
from questions import Question, ask

from numlstm.kernels import cells, reference
from numlstm.kernels.derive import Norm, TraceError, cell, normalize, preactivation, project, tanh


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normalized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)


def run(question: Question) -> Any:
    return question.forward(reference, training=False).h


def test_gru_with_the_reset_before_the_product() -> None:
    """Cho et al. 2014, equations 5 to 8."""
    question = ask(cells.gru(reset_after=False), 6, 3, 4, 5)
    x, kernel, recurrent, bias, _, (h,), _ = question.arguments
    W, R, b = np.split(kernel, 3, 1), np.split(recurrent, 3, 1), np.split(bias, 3)
    right = []
    for x_t in x:
        r, z = (sigma(x_t @ W[k] + h @ R[k] + b[k]) for k in (0, 1))
        n = np.tanh(x_t @ W[2] + (r * h) @ R[2] + b[2])
        h = z * h + (1 - z) * n
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_lstm_with_a_projection() -> None:
    """Sak, Senior and Beaufays 2014, equations 7 to 13, without peepholes."""
    question = ask(cells.lstm(projection=True), 6, 3, 4, 6)
    x, kernel, recurrent, bias, _, (h, c), _ = question.arguments
    assert h.shape == (3, 3) and c.shape == (3, 6)
    right = []
    for x_t in x:
        i, f, g, o = np.split(x_t @ kernel + h @ recurrent + bias, 4, 1)
        c = sigma(f) * c + sigma(i) * np.tanh(g)
        h = (sigma(o) * np.tanh(c)) @ question.projection
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_normalized_lstm() -> None:
    """Ba, Kiros and Hinton 2016, equations 20 to 22."""
    question = ask(cells.lstm(layer_norm=True), 6, 3, 4, 5)
    x, kernel, recurrent, _, params, (h, c), _ = question.arguments
    question.arguments = (x, kernel, recurrent, None, *question.arguments[4:])
    gx, gh, b = (np.concatenate(params[k : k + 4]) for k in (0, 4, 8))
    g_c, b_c = params[12:]
    right = []
    for x_t in x:
        i, f, g, o = np.split(gx * normalized(x_t @ kernel) + gh * normalized(h @ recurrent) + b, 4, 1)
        c = sigma(f) * c + sigma(i) * np.tanh(g)
        h = sigma(o) * np.tanh(g_c * normalized(c) + b_c)
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_normalized_gru() -> None:
    question = ask(cells.gru(layer_norm=True), 6, 3, 4, 5)
    x, kernel, recurrent, _, params, (h,), _ = question.arguments
    question.arguments = (x, kernel, recurrent, None, *question.arguments[4:])
    gx, gh, b = (np.concatenate(params[k : k + 3]) for k in (0, 3, 6))
    right = []
    for x_t in x:
        x_r, x_z, x_n = np.split(gx * normalized(x_t @ kernel) + b, 3, 1)
        h_r, h_z, h_n = np.split(gh * normalized(h @ recurrent), 3, 1)
        n = np.tanh(x_n + sigma(x_r + h_r) * (h_n + params[9]))
        z = sigma(x_z + h_z)
        h = z * h + (1 - z) * n
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_normalized_gru_with_the_reset_before_the_product() -> None:
    question = ask(cells.gru(reset_after=False, layer_norm=True), 6, 3, 4, 5)
    x, kernel, recurrent, _, params, (h,), _ = question.arguments
    question.arguments = (x, kernel, recurrent, None, *question.arguments[4:])
    gx, gh, b = (np.concatenate(params[k : k + 3]) for k in (0, 3, 6))
    right = []
    for x_t in x:
        x_r, x_z, x_n = np.split(gx * normalized(x_t @ kernel) + b, 3, 1)
        h_r, h_z = np.split(gh[:10] * normalized(h @ recurrent[:, :10]), 2, 1)
        n = np.tanh(x_n + gh[10:] * normalized((sigma(x_r + h_r) * h) @ recurrent[:, 10:]))
        z = sigma(x_z + h_z)
        h = z * h + (1 - z) * n
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_independent_units() -> None:
    """Li et al. 2018: no recurrent product at all."""
    question = ask(cells.indrnn(), 6, 3, 4, 5)
    x, kernel, recurrent, bias, (u,), (h,), _ = question.arguments
    assert recurrent.shape == (5, 0)
    right = []
    for x_t in x:
        h = np.maximum(x_t @ kernel + u * h + bias, 0)
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-12)


def test_exponential_gates_from_zero_states_are_finite() -> None:
    """Beck et al. 2024: unstabilised, the same numbers (their appendix A.2)."""
    question = ask(cells.slstm(), 6, 3, 4, 5)
    x, kernel, recurrent, bias, _, _, _ = question.arguments
    question.arguments = (*question.arguments[:5], None, None)
    h = c = n = np.zeros((3, 5))
    right = []
    for x_t in x:
        i, f, z, o = np.split(x_t @ kernel + h @ recurrent + bias, 4, 1)
        c, n = sigma(f) * c + np.exp(i) * np.tanh(z), sigma(f) * n + np.exp(i)
        h = sigma(o) * c / n
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-9)


def test_an_odd_cell() -> None:
    question = ask(zoo.odd, 6, 3, 4, 5)
    x, kernel, recurrent, bias, (scale,), (h, c), _ = question.arguments
    W, b = np.split(kernel, 3, 1), np.split(bias, 3)
    R_b, R_n = np.split(recurrent, 2, 1)
    right = []
    for x_t in x:
        a = x_t @ W[0] + b[0]
        u, v = np.split(normalized(np.concatenate([a * scale, c], 1)), 2, 1)
        gate = sigma(x_t @ W[1] + h @ R_b + b[1])
        n = x_t @ W[2] + (gate * u + h) @ R_n + b[2]
        c = normalized(np.tanh(n) + v * sigma(a))
        h = np.tanh(c) + 0.1 * u
        right.append(h)
    assert_allclose(run(question), right, rtol=1e-11)


# How a cell is cut


def test_stages_and_what_they_hand_on() -> None:
    first, second = cells.gru(reset_after=False).stages
    assert (first.pre, first.source, second.pre) == (("r", "z"), "h", ("n",))
    assert second.source in first.made and second.made == ("h1",)
    lstm = cells.lstm(layer_norm=True).stages
    assert [len(s.norms) for s in lstm] == [0, 2, 1]
    assert all(n.inputs == n.outputs for n in lstm[1].norms), "normalised in place"
    (norm,) = lstm[2].norms
    assert norm == Norm(("c1",), norm.outputs) and norm.outputs != ("c1",), "a state is not overwritten"
    assert cells.lstm(projection=True).projects and not cells.lstm().projects
    assert len(cells.lstm().stages) == len(cells.slstm().stages) == 1


def test_what_passes_between_stages_is_not_computed_twice() -> None:
    for made in zoo.STAGED.values():
        for stage in made.stages:
            assert not any(call in stage.backward_source for call in ("exp(", "tanh(", "sigmoid(", "sqrt("))


# What can't be cut


def two_sources(a, b, h):
    return preactivation("c", tanh(a)) + preactivation("d", tanh(b))


def twice(a, b, h):
    return preactivation("b", a) + b


def split_gate(a_x, a_h, h):
    return preactivation("a", a_h)


def inner_projection(a, h):
    return project(a), project(a)


def after_projection(a, h, u):
    return project(a) * u + a


def mixed_widths(a, h):
    return project(a * h)


def number(a, h):
    return normalize(1.0) + a


def of_parameter(a, u):
    return normalize(a, u)[0]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (two_sources, {"gates": "abcd"}, "one stage has recurrent products of"),
        (twice, {"gates": "ab"}, "gate b is computed twice"),
        (split_gate, {"gates": "a", "split": "a"}, "gate a_h is computed twice"),
        (
            lambda a, b: preactivation("b", a) + b,
            {"gates": "ab", "recurrent": "a"},
            r"preactivation\('b', v\): expected a",
        ),
        (split_gate, {"gates": "a", "split": "a", "recurrent": ()}, "split, but have no recurrent part"),
        (inner_projection, {"gates": "a", "state": ("h", "c")}, "only the first state, the output"),
        (after_projection, {"gates": "a"}, "nothing can follow but the output"),
        (mixed_widths, {"gates": "a"}, "the old output h has fewer units than the cell"),
        (lambda a, h: project(normalize(a, h)[0]), {"gates": "a"}, "the old output h has fewer units"),
        (number, {"gates": "a"}, "normalize: expected traced values"),
        (of_parameter, {"gates": "a"}, r"normalize\(\) takes values that the cell computes"),
        (number, {"gates": "a", "recurrent": "b"}, "recurrent names"),
        (lambda a: (a, a), {"gates": "a", "state": ("h", "w")}, r"the states \['w'\] would be called"),
    ],
)
def test_refusals_say_why(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        cell(**options)(function)
