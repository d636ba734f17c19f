"""Sequences whose saved values are computed again: the plain run's results, in a fraction of its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from questions import ask

from numlstm.kernels import cells, reference, remat
from numlstm.kernels.cpu import sequence as cpu
from numlstm.kernels.cpu import workspace

# every kind of argument: peepholes and coupled gates, step inputs, states beside h, a split gate, a bare recurrence
CELLS = {
    "lstm": cells.lstm(),
    "peephole, zoneout": cells.zoneout(cells.lstm(peephole=True)),
    "gru": cells.gru(),
    "indrnn": cells.indrnn("tanh"),
    "slstm": cells.slstm(),
}
ON_REFERENCE = CELLS | {
    "projection, zoneout": cells.zoneout(cells.lstm(projection=True)),
    "layer_norm": cells.lstm(layer_norm=True),
    "reset before": cells.gru(reset_after=False),
}
RUNS = [(reference, "float64", name) for name in ON_REFERENCE] + [(cpu, "float32", name) for name in CELLS]


def flat(values):
    for v in values:
        if isinstance(v, tuple):
            yield from flat(v)
        elif v is not None:
            yield v


def both(module, question, steps, need_dx=True, keep_states=True):
    """Forward results and gradients, of the plain run and of the run in pieces."""
    found = []
    for kernels, options in ((module, {}), (remat.Remat(module, steps), {"keep_states": keep_states})):
        out = kernels.forward(
            question.cell, *question.arguments, training=True, aux=question.aux,
            recurrent_mask=question.recurrent_mask, projection=question.projection, **options,
        )  # fmt: skip
        g = kernels.backward(
            out.residual, question.dh, question.dfinal, need_dx=need_dx, dstates=question.dstates
        )
        found.append((out, g))
    return found


@pytest.mark.parametrize("steps", [1, 4, 11, 50])
@pytest.mark.parametrize(("module", "dtype", "name"), RUNS, ids=lambda v: getattr(v, "__name__", v))
def test_the_results_are_those_of_the_plain_run(module, dtype, name, steps):
    question = ask(ON_REFERENCE[name], 11, 3, 5, 17, pattern="holes", spread=0.5).cast(dtype)
    (plain, g), (short, again) = both(module, question, steps)
    for a, b in zip(
        flat((plain.h, plain.final, plain.states)), flat((short.h, short.final, short.states)), strict=True
    ):
        assert np.array_equal(a, b)
    bound = 1e-13 if dtype == "float64" else 5e-6
    for a, b in zip(flat(g), flat(again), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.max(np.abs(a - b), initial=0.0) <= bound * np.max(np.abs(a), initial=1e-3)


@pytest.mark.parametrize("pattern", ["all", "holes"])
@pytest.mark.parametrize("steps", [1, 4, 11, 50])
@pytest.mark.parametrize("name", CELLS)
def test_the_cpu_keeps_pieces_by_itself(name, steps, pattern, monkeypatch):
    """One kernel for all pieces: every split of the work gives the same bits, and the plain run's results."""
    question, draw = ask(CELLS[name], 11, 5, 20, 37, pattern, spread=0.5), np.random.default_rng(1)
    question.recurrent_mask = draw.random((11, 5, 37)) if question.cell.recurrent else None
    question.dstates = tuple(draw.standard_normal((11, 5, 37)) for _ in question.cell.state[1:])
    question, runs = question.cast("f"), []
    assert cpu.recomputes(question.cell)
    for split, apart in (((1, False), False), ((2, False), False), ((2, True), True), ((3, True), False)):
        monkeypatch.setattr(cpu, "_split", lambda *_, split=split: split)
        monkeypatch.setattr(cpu, "_apart", lambda *_, apart=apart: apart)
        runs.append(both(cpu, question, steps, keep_states=False))
    (plain, g), (short, again) = runs[0]
    assert short.states is None
    for a, b in zip(flat((plain.h, plain.final)), flat((short.h, short.final)), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(flat(g), flat(again), strict=True):
        assert np.max(np.abs(a - b), initial=0.0) <= 5e-6 * np.max(np.abs(a), initial=1e-3)
    for _, (out, others) in runs[1:]:
        for a, b in zip(flat((short.h, short.final, *again)), flat((out.h, out.final, *others)), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_masks_for_all_steps_and_gradients_that_are_missing(module):
    dtype = "float64" if module is reference else "float32"
    question = ask(CELLS["peephole, zoneout"], 9, 2, 3, 5).cast(dtype)
    question.aux = tuple(np.full((1, 1, 1), 0.25, dtype) for _ in question.aux)
    question.recurrent_mask = np.full((1, 2, 1), 0.5, dtype)
    question.dh, question.dfinal, question.dstates = None, (None, question.dfinal[1]), None
    (_, g), (short, again) = both(module, question, 4, need_dx=False, keep_states=False)
    assert short.states is None and again.x is None
    for a, b in zip(flat(g), flat(again), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_without_training_nothing_is_kept():
    question = ask(cells.lstm(), 6, 2, 3, 4)
    out = remat.Remat(reference, 2).forward(question.cell, *question.arguments, training=False)
    assert out.residual is None and out.states is None


def test_a_residual_serves_once_and_steps_are_counted():
    question = ask(cells.lstm(), 6, 2, 3, 4)
    twice = remat.Remat(reference, 2)
    out = twice.forward(question.cell, *question.arguments, training=True)
    twice.backward(out.residual, question.dh, question.dfinal)
    with pytest.raises(ValueError, match="serves one backward pass"):
        twice.backward(out.residual, question.dh, question.dfinal)
    out = twice.forward(question.cell, *question.arguments, training=True)
    with pytest.raises(ValueError, match=r"dh: expected 6 steps, got shape \(5, 2, 4\)"):
        twice.backward(out.residual, question.dh[1:], question.dfinal)
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match="remat_steps: expected an integer of at least 1"):
            remat.Remat(reference, steps)


def peak(module, question, kernels):
    """The most memory that a forward and backward pass hold beyond what they were given and what they give."""
    workspace.release()
    tracemalloc.start()
    out = kernels.forward(question.cell, *question.arguments, training=True)
    after = tracemalloc.get_traced_memory()[0] - out.h.nbytes
    g = kernels.backward(out.residual, question.dh, question.dfinal, need_dx=False)
    most = tracemalloc.get_traced_memory()[1] - out.h.nbytes
    tracemalloc.stop()
    workspace.release()
    del g
    return after, most


@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_memory_is_that_of_the_pieces(module):
    T, B, I, H, k = 1024, 4, 3, 64, 32
    question = ask(cells.lstm(), T, B, I, H, spread=0.3).cast("float64" if module is reference else "float32")
    item = question.dh.itemsize
    both(module, question, k, keep_states=False)  # compiled, and the tables made
    kept, most = peak(module, question, module)
    short, least = peak(module, question, remat.Remat(module, k))
    row = B * H * item
    # Plain: at least the four gates and the cell of every step. In pieces: two states for each, and what k steps
    # compute with, save and give back, weights and their gradients included; the workspace keeps some for reuse. The
    # CPU's forward pass leaves the saved values of the last piece, for which the backward pass then asks no memory.
    assert kept > 5 * T * row
    assert short < (2 * T // k + 16 * k) * row
    assert least < (2 * T // k + 40 * k) * row < most / 3
