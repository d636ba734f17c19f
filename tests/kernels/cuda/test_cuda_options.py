"""Masks on the recurrence, precisions, gradients of all states: each with cells of one stage and of several."""

from __future__ import annotations

import numpy as np
import pytest
from device_questions import Kernels, check
from questions import answer, ask, error
from zoo import CELLS, STAGED

from numlstm.kernels import cells, reference

ALL = {**CELLS, **STAGED, "lstm_zoneout": cells.zoneout(cells.lstm())}
MASKS = {"one for all steps": (1, 2, 0), "by step": (3, 2, 0), "by step alone": (3, 1, 1)}


def asked(name: str, mask: str | None = None, precision: str = "float32", seed: int = 0):
    """A question with gradients from all states, under a mask with holes."""
    question = ask(ALL[name], 3, 2, 4, 5, "holes", seed)
    draw = np.random.default_rng([seed, 1])
    single = lambda a: a.astype("f").astype("d")
    question.precision = precision
    question.dstates = tuple(single(draw.standard_normal((3, 2, 5))) for _ in question.cell.state[1:])
    if mask:
        steps, rows, columns = MASKS[mask]
        kept = draw.random((steps, rows, columns or question.dh.shape[2])) < 0.7
        question.recurrent_mask = single(kept / 0.7)
    return question


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_before_zoneout", "lstm_projected", "odd"])
def test_a_mask_on_the_recurrence(name, mask):
    check(asked(name, mask), "float32" if mask == "by step" else "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
@pytest.mark.parametrize("name", ["lstm", "minimal", "lstm_projected", "gru_before_normalized"])
def test_a_precision(name, precision, dtype):
    """Operands are rounded where the reference rounds them; what float32 holds is what both round."""
    mask = "by step" if name in ("lstm", "lstm_projected") else None
    question = asked(name, mask, precision, seed=2)
    check(question, dtype)
    plain = answer(asked(name, mask, seed=2), reference)
    assert error(answer(question.cast(dtype), Kernels)["h"], plain["h"]) > 1e-5  # something was rounded


def test_a_step_input_that_broadcasts():
    for shape in ((1, 1, 1), (3, 1, 5), (1, 2, 1)):
        question = asked("lstm_zoneout")
        draw = np.random.default_rng(3)
        question.aux = tuple((draw.random(shape) < 0.5) * 1.0 for _ in question.cell.aux)
        check(question)
