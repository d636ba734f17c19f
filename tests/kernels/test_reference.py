"""The oracle itself: held to an unrolled loop over the untraced cells, and to numerical differentiation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import questions
import zoo
from numpy.testing import assert_allclose
from questions import PATTERNS, Question, ask

from numlstm.kernels import cells, reference
from numlstm.kernels.derive import Cell

EVERY = zoo.CELLS | zoo.FORMS
ALL = EVERY | zoo.STAGED


def unrolled(question: Question) -> list[np.ndarray]:
    """Every state's sequence (T, B, H), step by step, by the cell's own function."""
    cell = question.cell
    x, kernel, recurrent, bias, params, state, valid = question.arguments
    H = len(recurrent)
    states = dict(zip(cell.state, state, strict=True))
    out = []
    for t in range(len(x)):
        fed = states[cell.state[0]] * (1 if question.recurrent_mask is None else question.recurrent_mask[t])
        from_x, from_h = x[t] @ kernel + bias, fed @ recurrent
        values = states | dict(zip(cell.params, params, strict=True))
        values |= {name: a[t] for name, a in zip(cell.aux, question.aux, strict=True)}
        for k, gate in enumerate(cell.gates):
            part = slice(k * H, (k + 1) * H)
            if gate in cell.split:
                values |= {gate + "_x": from_x[:, part], gate + "_h": from_h[:, part]}
            else:
                values[gate] = (from_x + from_h)[:, part]
        new = zoo.NAIVE[cell.name](*(values[a] for a in cell.arguments))
        new = dict(zip(cell.state, new if isinstance(new, tuple) else (new,), strict=True))
        for b in range(x.shape[1]):
            for s in cell.state:
                if valid is not None and not valid[t, b]:
                    new[s][b] = states[s][b]
        states = new
        out.append(list(new.values()))
    return [np.stack(sequence) for sequence in zip(*out, strict=True)]


@pytest.mark.parametrize("cell", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_is_the_unrolled_loop(cell: Cell, pattern: str) -> None:
    question = ask(cell, 6, 5, 3, 4, pattern)
    if pattern != "all":
        question.recurrent_mask = np.random.default_rng(0).random((6, 5, 4))
    out = question.forward(reference, training=True)
    right = unrolled(question)
    for found, want in zip((out.h, *out.states), right, strict=True):
        assert_allclose(found, want, rtol=1e-12, atol=1e-13)
    for found, want in zip(out.final, right, strict=True):
        assert_allclose(found, want[-1], rtol=1e-12, atol=1e-13)
    inference = question.forward(reference, training=False)
    assert inference.residual is None and inference.states is None
    assert np.array_equal(inference.h, out.h)


def loss(question: Question) -> float:
    out = question.forward(reference, training=False)
    total = (out.h * question.dh).sum()
    if question.dstates is not None:
        states = question.forward(reference, training=True).states
        total += sum((a * d).sum() for a, d in zip(states, question.dstates, strict=True))
    return float(total + sum((a * d).sum() for a, d in zip(out.final, question.dfinal, strict=True)))


@pytest.mark.parametrize("cell", ALL.values(), ids=ALL)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_the_differences(cell: Cell, pattern: str) -> None:
    """Central differences along random directions of each argument."""
    question, draw = ask(cell, 5, 3, 2, 4, pattern, seed=2, spread=0.5), np.random.default_rng(3)
    if pattern != "all":
        question.recurrent_mask = np.random.default_rng(0).random(question.dh.shape)
        question.dstates = tuple(draw.standard_normal((5, 3, 4)) for _ in cell.state[1:])
    residual = question.forward(reference, training=True).residual
    g = reference.backward(residual, question.dh, question.dfinal, dstates=question.dstates)

    def moved(place: int | str, member: int | None, change: np.ndarray) -> Question:
        if isinstance(place, str):
            return replace(question, **{place: getattr(question, place) + change})
        arguments: list[Any] = list(question.arguments)
        if member is None:
            arguments[place] = arguments[place] + change
        else:
            arguments[place] = tuple(a + change if k == member else a for k, a in enumerate(arguments[place]))
        return replace(question, arguments=tuple(arguments))

    targets = [(0, None, g.x), (1, None, g.kernel), (2, None, g.recurrent_kernel), (3, None, g.bias)]
    targets += [("projection", None, g.projection)] if cell.projects else []
    targets += [(4, k, a) for k, a in enumerate(g.params)] + [(5, k, a) for k, a in enumerate(g.state)]
    for place, member, gradient in targets:
        for _ in range(3):
            direction = draw.standard_normal(gradient.shape)
            steps = [loss(moved(place, member, e * direction)) for e in (1e-4, -1e-4, 2e-4, -2e-4)]
            slope = (8 * (steps[0] - steps[1]) - (steps[2] - steps[3])) / 12e-4
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction) + 1e-3
            assert abs(slope - (gradient * direction).sum()) < 1e-7 * scale, (place, member)


def test_dtype_is_kept() -> None:
    question = ask(cells.gru(), 3, 2, 2, 3, "holes")
    for dtype in ("float32", "float64"):
        found = questions.answer(question.cast(dtype), reference)
        assert {a.dtype.name for a in found.values()} == {dtype}


@pytest.mark.parametrize("training", [False, True])
def test_no_warning_where_numbers_leave_the_range(training: bool) -> None:
    """Warnings are errors here: a masked row or a diverging run must not fill a user's screen."""
    question = ask(zoo.slstm, 3, 2, 2, 3, "holes")
    x, *rest, _, valid = question.arguments
    zero = tuple(np.zeros((2, 3)) for _ in zoo.slstm.state)  # 0/0 in the masked row
    reference.forward(zoo.slstm, x * np.inf, *rest, zero, valid, training=training)
    out = reference.forward(
        cells.elman("exponential"), *ask(cells.elman(), 9, 2, 2, 3).arguments, training=True
    )
    reference.backward(out.residual, out.h * 1e300, (None,))
