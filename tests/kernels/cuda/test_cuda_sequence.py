"""Every cell's training pass on the device against the float64 reference, and what a sequence does at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from device_questions import Kernels, check, on_host
from questions import answer, ask, assert_same_bits
from zoo import CELLS, FORMS, STAGED

from numlstm.kernels import cells, reference
from numlstm.kernels.cuda import sequence, steps
from numlstm.kernels.cuda.device import current
from numlstm.kernels.remat import Remat

ALL = {**CELLS, **FORMS, **STAGED, "indrnn": cells.indrnn("tanh"), "slstm_own": cells.slstm()}


@pytest.mark.parametrize(("dtype", "pattern"), [("float32", "holes"), ("float64", "lengths")])
@pytest.mark.parametrize("name", ALL)
def test_every_cell_against_the_reference(name, dtype, pattern):
    check(ask(ALL[name], 3, 2, 3, 5, pattern, seed=1), dtype)


@pytest.mark.parametrize("name", ["lstm", "gru", "slstm", "lstm_projected_zoneout", "odd"])
def test_inference_gives_the_same_bits(name):
    question = ask(ALL[name], 3, 2, 3, 5, "holes").cast("f")
    training, inference = (question.forward(Kernels, training=t) for t in (True, False))
    assert inference.residual is None and inference.states is None
    assert inference.h.tobytes() == training.h.tobytes()
    for a, b in zip(inference.final, training.final, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("T", "B", "I", "H"), [(1, 1, 1, 1), (1, 3, 2, 7), (4, 1, 5, 3), (2, 2, 1, 130)])
def test_shapes_with_ones_and_more_columns_than_a_block(T, B, I, H):
    check(ask(ALL["gru"], T, B, I, H))


@pytest.mark.parametrize("name", ["lstm", "gru_before", "elman_normalized"])
def test_what_may_be_left_out(name):
    cell = ALL[name]
    x, kernel, recurrent_kernel, _, params, _, _ = ask(cell, 3, 2, 3, 5).arguments
    arguments = (cell, x, kernel, recurrent_kernel, None, params, None, None)
    dh = np.random.default_rng(0).standard_normal((3, 2, 5))
    nothing = (None,) * len(cell.state)
    for upstream in ((dh, nothing), (None, (dh[0], *nothing[1:]))):
        found = []
        for kernels in (Kernels, reference):
            out = kernels.forward(*arguments, training=True)
            found.append((out.h, kernels.backward(out.residual, *upstream, need_dx=False)))
        (h, g), (h_right, right) = found
        np.testing.assert_allclose(h, h_right, rtol=0, atol=1e-12)
        assert g.x is None and g.bias is None
        np.testing.assert_allclose(g.recurrent_kernel, right.recurrent_kernel, rtol=0, atol=1e-12)
        np.testing.assert_allclose(g.kernel, right.kernel, rtol=0, atol=1e-12)


def test_same_question_same_bits():
    question = ask(ALL["odd"], 3, 2, 3, 5, "holes").cast("f")
    assert_same_bits(answer(question, Kernels), answer(question, Kernels))


@pytest.mark.parametrize("name", ["slstm", "lstm_projected_zoneout", "gru_before_normalized", "odd"])
def test_nothing_is_read_before_it_is_written(name, monkeypatch):
    """New memory holds what was there before; here it holds NaN."""
    plain = steps._Sequence.empty

    def filled(self, *shape, dtype=None):
        made = plain(self, *shape, dtype=dtype)
        made.fill(0xFFFF if made.dtype == np.uint16 else np.nan)
        return made

    monkeypatch.setattr(steps._Sequence, "empty", filled)
    check(ask(ALL[name], 3, 2, 3, 5, "holes"))


def test_nan_and_infinity_travel_as_in_the_reference():
    question = ask(ALL["wide"], 3, 3, 3, 5)
    x = question.arguments[0].copy()
    x[1, 0, 0], x[0, 1, 1], x[0, 1, 2] = np.nan, np.inf, -np.inf
    question.arguments = (x, *question.arguments[1:])
    h, right = (question.forward(k, training=False).h for k in (Kernels, reference))
    assert np.isnan(h[1:, 0]).all() and not np.isnan(h[:, 2]).any()
    np.testing.assert_allclose(h, right, rtol=1e-10)


def test_kept_pieces_give_the_gradients():
    question = ask(ALL["lstm"], 5, 2, 3, 5, "holes").cast("f")
    whole, pieces = sequence, Remat(sequence, 2)
    out = [k.forward(question.cell, *question.arguments, training=True) for k in (whole, pieces)]
    assert on_host(out[0].h).tobytes() == on_host(out[1].h).tobytes()
    g = [
        on_host(k.backward(o.residual, question.dh, question.dfinal))
        for k, o in zip((whole, pieces), out, strict=True)
    ]
    np.testing.assert_allclose(g[0].kernel, g[1].kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g[0].x, g[1].x, rtol=1e-4, atol=1e-5)


def test_a_residual_serves_once():
    question = ask(ALL["lstm"], 2, 1, 2, 3)
    out = question.forward(sequence, training=True)
    sequence.backward(out.residual, question.dh, question.dfinal)
    with pytest.raises(ValueError, match="has had it"):
        sequence.backward(out.residual, question.dh, question.dfinal)


def test_bad_arguments_are_named():
    question = ask(ALL["lstm"], 2, 1, 2, 3)
    x, kernel, *rest = question.arguments
    run = lambda *a, **k: sequence.forward(question.cell, *a, training=False, **k)
    with pytest.raises(ValueError, match=r"kernel: expected shape \(2, 12\)"):
        run(x, kernel[:, :-1], *rest)
    with pytest.raises(ValueError, match="precision: expected float32 or bfloat16 or tf32, got 'half'"):
        run(x, kernel, *rest, precision="half")
    with pytest.raises(ValueError, match="kernel: expected float32 or float64, got float16"):
        run(x, kernel.astype(np.float16), *rest)
    with pytest.raises(ValueError, match="at least 1"):
        run(x[:0], kernel, *rest)
    out = question.forward(sequence, training=True)
    with pytest.raises(ValueError, match="dh: expected shape"):
        sequence.backward(out.residual, question.dh[1:], question.dfinal)


def test_the_tier_says_why():
    found = sequence.tier(ALL["odd"], 9, 4, 3, 5, 5, "float32", "float32", current())
    assert found.name == "steps" and "4 fused kernels a step" in found.why
