"""Int8 kernels: sums exact in every form of the instruction, sequences held step by step to the NumPy oracle.

A state that differs in its last bit may round to the next whole number, so that a sequence as a whole is not
comparable to 1e-5: each step is, from the states that the kernel itself had before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zoo
from numba import njit
from questions import BOUND, Question, ask, error

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import quantized, sequence, threads
from numlstm.kernels.cpu.isa import FEATURES, IS_X86, LANES, TILE_COLUMNS, TILE_ROWS
from numlstm.kernels.cpu.simd import JIT_OPTIONS
from numlstm.kernels.derive import Cell
from numlstm.kernels.int8 import DEEPEST, Quantized, quantize_rows

SPLITS = [(1, False), (2, False), (2, True), (3, True)]  # threads, units or batch
CELLS: dict[str, Cell] = {
    c.name: c for c in (cells.lstm(), cells.gru(), cells.elman(), cells.indrnn(), zoo.wide, zoo.slstm)
}
STAGED = {name: zoo.STAGED[name] for name in ("gru_before", "lstm_normalized_projected_peephole", "odd")}


def forms() -> list[str]:
    """Those that this processor can run."""
    pairs = IS_X86 and quantized._PAIRS[LANES][0] in FEATURES
    return list(dict.fromkeys([quantized.FORM, *(["pairs"] if pairs else []), "plain"]))


@pytest.fixture
def split_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """split_by(threads, units) makes every sequence run on so many threads, split by units or by batch."""
    return lambda *split: monkeypatch.setattr(quantized, "_split", lambda *_: split)


@njit(**JIT_OPTIONS)
def call_tile(address, a, a_row, quads, b, first, scale_b, scale_a, start, start_row, c, c_row, rows):
    quantized.dot_tile(address, a, a_row, quads, b, first, scale_b, scale_a, start, start_row, c, c_row, rows)


def by_tile(form: str, q: np.ndarray, w: Quantized, start: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows q (m, K) times w (K, vectors LANES), from `start`, in what surrounds the tile 7."""
    (m, K), n = q.shape, w.shape[1] // LANES
    packed = quantized.pack(w, np.arange(w.shape[1]).reshape(-1, LANES), (n,))
    a = np.full((m, -(-K // 4) * 4 + 5), 99, np.uint8)  # what lies beyond K meets zeros
    a[:, :K] = q.astype(np.int16) + 128
    c = np.full((m + 1, w.shape[1] + 3), 7, "f")
    call_tile(
        quantized.tiles(form)[n - 1, m - 1], a.ctypes.data, a.strides[0], -(-K // 4), packed.values.ctypes.data,
        packed.first.ctypes.data, packed.scale.ctypes.data, scale.ctypes.data, start.ctypes.data, start.strides[0],
        c.ctypes.data, c.strides[0], m,
    )  # fmt: skip
    assert np.all(c[m:] == 7) and np.all(c[:, w.shape[1] :] == 7)
    return c[:m, : w.shape[1]]


@pytest.mark.parametrize("form", forms())
def test_sums_are_exact_in_every_shape_of_the_tile(form: str) -> None:
    assert np.unique(quantized.tiles(form)).size == TILE_COLUMNS * TILE_ROWS
    draw = np.random.default_rng(0)
    for m in range(1, TILE_ROWS + 1):
        for n in range(1, TILE_COLUMNS + 1):
            for K in (1, 4, 7, 50, 193):
                q = draw.integers(-127, 128, (m, K), dtype=np.int8)
                w = Quantized(
                    draw.integers(-127, 128, (K, n * LANES), dtype=np.int8), np.ones(n * LANES, "f")
                )
                start = draw.integers(-99, 99, (m, n * LANES)).astype("f")
                right = start + q.astype(int) @ w.values.astype(int)  # below 2^24: exact in float32
                assert np.array_equal(by_tile(form, q, w, start, np.ones(m, "f")), right), (m, n, K)


@pytest.mark.parametrize("form", forms())
def test_the_largest_sums_fit(form: str) -> None:
    """Unsigned bytes times the deepest matrix pass 2^31 on the way; what is subtracted brings the sum back."""
    q = np.full((2, DEEPEST), 127, np.int8)
    q[1] = -127
    w = Quantized(np.full((DEEPEST, LANES), 127, np.int8), np.ones(LANES, "f"))
    found = by_tile(form, q, w, np.zeros((2, LANES), "f"), np.ones(2, "f"))
    right = np.float32(127 * 127 * DEEPEST)
    assert np.all(found[0] == right) and np.all(found[1] == -right)


@njit(**JIT_OPTIONS)
def call_rows(x, x_row, rows, n, out, out_row, scale):
    for r in range(rows):
        quantized.quantize_row(x + r * x_row, n, out + r * out_row, scale + r * 4)


@pytest.mark.parametrize("n", [1, 7, LANES, 50, 193])
def test_rows_become_the_same_bits_as_in_numpy(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((12, n + 2)).astype("f") * 3
    x[:, n:] = 1e9  # beyond the row
    x[1] = 0
    x[2] *= 1e-38
    x[3, :n] *= 1e30
    x[4, 0], x[5, n - 1], x[6, n // 2] = np.nan, np.inf, -np.inf
    x[7, :n] = np.resize(np.float32([127, 2.5, 3.5, -2.5, -0.5]), n)
    out, scale = np.zeros((12, n + 2 * LANES), np.uint8), np.zeros(12, "f")
    call_rows(x.ctypes.data, x.strides[0], 12, n, out.ctypes.data, out.strides[0], scale.ctypes.data)
    right, right_scale = quantize_rows(x[:, :n])
    assert np.array_equal(scale, right_scale, equal_nan=True)
    finite = np.isfinite(right_scale)
    assert finite.sum() == 9
    assert np.array_equal(out[finite, :n].astype(np.int16) - 128, right[finite])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 50, 193), (1, 193, 7), (50, 7, 16), (13, 193, 200)], ids=str
)
def test_dense_products(shape: tuple[int, int, int], keep_threads: None) -> None:
    M, K, N = shape
    draw = np.random.default_rng(M)
    a, w = draw.standard_normal((M, K)).astype("f"), Quantized.of(draw.standard_normal((K, N)))
    bias = draw.standard_normal(N).astype("f")
    right = a @ w
    found = quantized.matmul(a, w)
    assert found.dtype == np.float32 and np.array_equal(found, right)
    assert np.array_equal(quantized.matmul(np.asfortranarray(a), w), right)
    assert np.array_equal(quantized.matmul(np.repeat(a, 2, 0)[::2], w), right)
    assert error(quantized.matmul(a, w, bias=bias), right + bias) < 1e-6
    assert quantized.matmul(a[:0], w).shape == (0, N)
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized, "MATMUL_ONE_THREAD_BELOW", 0)
            assert np.array_equal(quantized.matmul(a, w), right)


def held(question: Question) -> Question:
    """The question in float32, its matrices in eight bits."""
    q = question.cast("f")
    x, kernel, recurrent, *rest = q.arguments
    q.arguments = (x, Quantized.of(kernel), Quantized.of(recurrent), *rest)
    q.projection = None if q.projection is None else Quantized.of(q.projection)
    return q


def check_steps(question: Question, out: Any) -> None:
    """Each step of `out` against the oracle in float64, from the states that the kernel had before it.

    Between two stages of a step the kernel's last bits may be others than the oracle's, and a value round to the next whole
    number: a few rows are let off to the size of that.
    """
    cell, (x, kernel, recurrent, bias, params, state, valid) = question.cell, question.arguments
    T, B = x.shape[:2]
    sequences = (out.h, *out.states)
    before = [np.concatenate([s[None], a[:-1]]) for s, a in zip(state, sequences, strict=True)]
    flat = lambda a: a.reshape(1, T * B, -1).astype("d")
    right = reference.forward(
        cell, flat(x), kernel, recurrent, bias.astype("d"), tuple(p.astype("d") for p in params),
        tuple(flat(s)[0] for s in before), None if valid is None else valid.reshape(1, -1), training=True,
        aux=tuple(flat(np.broadcast_to(a, (T, B, a.shape[2]))) for a in question.aux), projection=question.projection,
    )  # fmt: skip
    for name, a, b in zip(cell.state, sequences, (right.h, *right.states), strict=True):
        off = np.abs(a.reshape(b.shape)[0].astype("d") - b[0]).max(1) / np.abs(b).max()
        several = len(cell.stages) > 1
        assert np.mean(off <= BOUND) >= (0.9 if several else 1.0), f"{cell.name}: {name}, {off.max()}"
        assert off.max() <= (0.02 if several else BOUND)
    for a, b in zip(out.final, sequences, strict=True):
        assert np.array_equal(a, b[-1])


def same(a: Any, b: Any) -> None:
    assert a.h.tobytes() == b.h.tobytes()
    assert all(x.tobytes() == y.tobytes() for x, y in zip(a.final, b.final, strict=True))


@pytest.mark.parametrize("cell", (CELLS | STAGED).values(), ids=CELLS | STAGED)
@pytest.mark.parametrize("pattern", ["all", "holes", "lengths"])
def test_every_cell_step_by_step_and_the_same_bits_however_it_is_split(
    cell: Cell, pattern: str, split_by: Callable[[int, bool], None]
) -> None:
    question = held(ask(cell, 5, 7, 3, 37, pattern))
    found = []
    for split in SPLITS:
        split_by(*split)
        found.append(question.forward(quantized, training=True))
        same(found[0], question.forward(quantized, training=False))
    check_steps(question, found[0])
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (3, 2, 50, 7), (2, 33, 7, 50), (3, 5, 193, 193), (70, 1, 20, 16), (9, 20, 1, 64)],
    ids=str,
)
def test_odd_sizes(cell: Cell, size: tuple[int, ...], split_by: Callable[[int, bool], None]) -> None:
    question = held(ask(cell, *size, "holes"))
    split_by(1, False)
    one = question.forward(quantized, training=True)
    check_steps(question, one)
    split_by(2, True)
    same(one, question.forward(quantized, training=True))


def test_inputs_as_they_lie(split_by: Callable[[int, bool], None]) -> None:
    """Batch-major, backwards in time, every other feature, float64: the values count."""
    question = held(ask(cells.lstm(), 6, 4, 10, 20))
    x, *rest = question.arguments
    right = question.forward(quantized, training=False)
    wide = np.repeat(x, 2, 2)[:, :, ::2]
    views = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1), x[::-1].copy()[::-1], wide, x.astype("d")]
    for view in views:
        question.arguments = (view, *rest)
        same(right, question.forward(quantized, training=False))


def test_zoneout_and_no_state() -> None:
    question = held(ask(zoo.FORMS["gru_zoneout"], 4, 5, 3, 18, "holes"))
    check_steps(question, question.forward(quantized, training=True))
    x, kernel, recurrent, bias, params, state, valid = question.arguments
    zeros = tuple(np.zeros_like(s) for s in state)
    question.arguments = (x, kernel, recurrent, bias, params, zeros, valid)
    right = question.forward(quantized, training=False)
    question.arguments = (x, kernel, recurrent, bias, params, None, valid)
    same(right, question.forward(quantized, training=False))


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru()], ids=lambda c: c.name)
def test_close_to_float32(cell: Cell) -> None:
    """Weights of unit gain, 40 steps: within 0.05 at worst and 0.01 in the mean, of outputs between -1 and 1."""
    question = ask(cell, 40, 16, 30, 64)
    right = question.cast("f").forward(sequence, training=False)
    off = np.abs(held(question).forward(quantized, training=False).h - right.h)
    assert off.max() < 0.05 and off.mean() < 0.01
    assert off.max() > 1e-5  # it is not float32 under another name


def test_nan_stays_in_its_row() -> None:
    question = held(ask(cells.lstm(), 3, 4, 5, 9))
    clean = question.forward(quantized, training=False)
    question.arguments[0][1, 2, 0] = np.nan
    found = question.forward(quantized, training=False)
    assert np.isnan(found.h[1:, 2]).all() and np.isfinite(found.h[0]).all()
    others = [0, 1, 3]
    assert np.array_equal(found.h[:, others], clean.h[:, others])


def test_weights_are_packed_once() -> None:
    question = held(ask(cells.lstm(), 2, 2, 3, 9))
    kernel = question.arguments[1]
    question.forward(quantized, training=False)
    (packed,) = kernel.packed.values()
    question.forward(quantized, training=False)
    assert next(iter(kernel.packed.values())) is packed and packed.values.dtype == np.int8


def test_two_sequences_at_once(keep_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.set_num_threads(2)
    monkeypatch.setattr(quantized, "ONE_THREAD_BELOW", 0)
    questions = [held(ask(cells.lstm(), 5, 7, 3, 37, "holes", seed=k)) for k in range(2)]
    calls = [((q.cell, *q.arguments), {"training": False}) for q in questions]
    for q, out in zip(questions, quantized.forward_all(calls), strict=True):
        same(out, q.forward(quantized, training=False))


def test_the_split_rule(keep_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.set_num_threads(2)
    cell = cells.lstm()
    for awake, shards in ((False, 1), (True, 2)):  # little work is shared only with helpers that are awake
        monkeypatch.setattr(threads, "ready", lambda awake=awake: awake)
        assert quantized._split(cell, 20, 32, 1, 50) == (shards, False)
        assert quantized._split(cell, 5, 4, 8, 16) == (1, False)
    assert quantized._split(cell, 60, 33, 90, 193) == (2, False)
    assert quantized._split(cell, 100, 1, 512, 1024) == (2, True)
    assert quantized._split(cell, 50, 32, 256, 512) == (2, True)
    assert "2 threads over the units" in quantized.explain(cell, 100, 1, 512, 1024)


def test_refusals() -> None:
    question = held(ask(cells.lstm(), 2, 2, 3, 9))
    question.recurrent_mask = np.ones((1, 2, 9), "f")
    with pytest.raises(ValueError, match="recurrent_mask"):
        question.forward(quantized, training=False)
    with pytest.raises(ValueError, match=r"matmul: expected \(M, K\) and \(K, N\)"):
        quantized.matmul(np.ones((2, 4), "f"), question.arguments[1])
    with pytest.raises(ValueError, match="matmul: expected a bias"):
        quantized.matmul(np.ones((2, 3), "f"), question.arguments[1], bias=np.zeros(1, "f"))


# Run in a process of its own for each set of features: the product's bits, and the form and lanes that made them.
SAME_BITS = """
import hashlib, json
import numpy as np
from numlstm.kernels.cpu import quantized
from numlstm.kernels.cpu.isa import LANES
from numlstm.kernels.int8 import Quantized
draw = np.random.default_rng(0)
a, w = draw.standard_normal((13, 193)).astype("f"), Quantized.of(draw.standard_normal((193, 70)))
c = quantized.matmul(a, w, bias=draw.standard_normal(70).astype("f"))
print(json.dumps([LANES, quantized.FORM, hashlib.sha256(c.tobytes()).hexdigest()]))
"""


@pytest.mark.skipif(not IS_X86, reason="the features named are x86's")
def test_the_same_bits_on_processors_with_less(python: Callable[..., Any]) -> None:
    bare = dict.fromkeys(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMLSTM_AMX"))
    less = [
        {},
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,-avx512f"},
        {"NUMBA_CPU_NAME": "generic"},
    ]
    found = [json.loads(python(SAME_BITS, **bare | environment).stdout) for environment in less]
    assert found[0][:2] == [LANES, quantized.FORM] and [f[0] for f in found[1:]] == [8, 4]
    assert [f[1] for f in found[1:]] == ["pairs", "plain"]
    assert len({f[2] for f in found}) == 1
