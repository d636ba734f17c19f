"""Cells of several stages on the CPU: right for every mask, size and split, and the same bits for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zoo
from questions import PATTERNS, Question, answer, ask, assert_same_bits, check

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import sequence, threads

SPLITS = [(1, False), (2, False), (2, True), (3, True)]  # threads, units or batch
SIZES = [(5, 7, 3, 37), (1, 1, 1, 1), (2, 33, 3, 50), (6, 3, 20, 193)]
# Together they have all that a stage can be; the other cells of the zoo are made of the same parts.
NAMES = [
    "gru_before",
    "lstm_projected_zoneout",
    "lstm_normalized_projected_peephole",
    "elman_normalized",
    "odd",
]

every_cell = pytest.mark.parametrize("name", NAMES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def asked(name: str, size: tuple[int, ...], pattern: str) -> Question:
    """A question with everything in it: gradients of all states' sequences, and a recurrent mask where rows have holes."""
    question, draw = ask(zoo.STAGED[name], *size, pattern), np.random.default_rng(1)
    T, B, _, H = size
    question.dstates = tuple(draw.standard_normal((T, B, H)) for _ in question.cell.state[1:])
    if pattern != "all":
        question.recurrent_mask = draw.random(question.dh.shape)
    return question.cast("f").cast("d")


@every_cell
@every_pattern
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_every_split(name: str, pattern: str, size: tuple[int, ...], share_by: Callable) -> None:
    question = asked(name, size, pattern)
    found = []
    for split in SPLITS:
        share_by(*split)
        found.append(answer(question.cast("f")))
        out = question.cast("f").forward(training=False)
        assert out.residual is None and np.array_equal(out.h, found[0]["h"])
        for s, a in zip(question.cell.state, out.final, strict=True):
            assert np.array_equal(a, found[0][f"final {s}"])
    check(question, found[0])
    for other in found[1:]:
        assert_same_bits(found[0], other)


@every_cell
def test_the_input_product_apart_or_fused_gives_the_same_bits(name: str, monkeypatch, share_by) -> None:
    question = asked(name, (6, 3, 20, 37), "holes").cast("f")
    share_by(2, True)
    results = []
    for apart in (False, True):
        monkeypatch.setattr(sequence, "_apart", lambda *_, apart=apart: apart)
        results.append(answer(question))
        assert np.array_equal(question.forward(training=False).h, results[0]["h"])
    assert_same_bits(*results)


@every_cell
def test_what_may_be_left_out(name: str) -> None:
    full = asked(name, (4, 5, 3, 9), "all")
    x, kernel, recurrent, _, params, state, valid = full.arguments
    bare = replace(full, arguments=(x, kernel, recurrent, None, params, None, valid), dh=None, dstates=None)
    bare.dfinal = (None,) * (len(state) - 1) + (full.dfinal[-1],)
    found = check(bare)
    assert "dbias" not in found and found["dkernel"].any()
    assert_same_bits({k: a for k, a in found.items() if k != "dx"}, answer(bare.cast("f"), need_dx=False))


@every_cell
def test_nan_stays_in_its_row(name: str) -> None:
    """Neither padding nor a row's sums may carry one row's NaN to another."""
    question = asked(name, (4, 5, 3, 9), "all").cast("f")
    clean = answer(question)
    question.arguments[0][1, 2] = np.nan
    spoilt = answer(question)
    for part in ("h", "dx"):
        others = [0, 1, 3, 4]
        assert np.array_equal(spoilt[part][:, others], clean[part][:, others])
        assert np.isnan(spoilt[part][1:, 2]).any()


def test_nothing_to_project_to_is_refused() -> None:
    question = ask(cells.lstm(projection=True), 2, 2, 2, 4).cast("f")
    x, kernel, _, bias, params, _, valid = question.arguments
    none = replace(question, projection=np.zeros((4, 0), "f"))
    none.arguments = (x, kernel, np.zeros((0, 16), "f"), bias, params, None, valid)
    with pytest.raises(ValueError, match=r"at least 1.* and an output of 0"):
        none.forward(training=False)
    for kernels in (sequence, reference):
        with pytest.raises(
            ValueError, match=r"^projection: expected shape \(H, P\) for the cell lstm, got None"
        ):
            replace(question, projection=None).forward(kernels, training=False)
        with pytest.raises(ValueError, match=r"^projection: expected None for the cell elman"):
            plain = ask(cells.elman(), 2, 2, 2, 4)
            replace(plain, projection=np.zeros((4, 2))).forward(kernels, training=False)


# Several sequences at once


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("size", [(3, 4, 5, 6), (40, 16, 64, 128)], ids=["little work", "much"])
def test_sequences_at_once_are_what_they_are_alone(n: int, size: tuple[int, ...], keep_threads: None) -> None:
    threads.set_num_threads(n)
    questions = [ask(cells.lstm(), *size, pattern).cast("f") for pattern in ("all", "holes")]
    alone = [answer(q) for q in questions]
    options = {"training": True, "aux": (), "recurrent_mask": None, "projection": None}
    outs = sequence.forward_all([((q.cell, *q.arguments), options) for q in questions])
    gradients = sequence.backward_all(
        [((out.residual, q.dh, q.dfinal), {"need_dx": True}) for out, q in zip(outs, questions, strict=True)]
    )
    for right, out, g in zip(alone, outs, gradients, strict=True):
        assert np.array_equal(out.h, right["h"])
        for name, a in (
            ("dx", g.x),
            ("dkernel", g.kernel),
            ("drecurrent", g.recurrent_kernel),
            ("dc", g.state[1]),
        ):
            assert np.array_equal(a, right[name]), name
