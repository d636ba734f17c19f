"""bfloat16: rounding and packing, tiles of pairs, and whole sequences against the reference with rounded operands.

A value that the kernel computes next to a tie may round down there and up in the reference, 2**-8 apart, and all that
follows differs with it. Such are few; so a sequence is asked for with several seeds, and for each result the nearest answer
must be right as in float32. None may be off by more than LOOSE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from numba import njit
from questions import BOUND, Question, answer, ask, assert_same_bits, error

from numlstm.kernels import cells, reference, rounding
from numlstm.kernels.cpu import bfloat16, isa, microkernel, sequence
from numlstm.kernels.cpu.isa import LANES, TILE_COLUMNS, TILE_ROWS
from numlstm.kernels.cpu.microkernel import plain_families, tile1
from numlstm.kernels.cpu.simd import JIT_OPTIONS
from numlstm.kernels.derive import cell, normalize, preactivation, tanh
from numlstm.kernels.remat import Remat

LOOSE = 2**-6  # one rounding of 2**-8 carried through a few steps
UNROUNDED = 0.02  # from the reference without rounding: 2**-9 an operand, summed and carried over the steps
SPLITS = [(1, False), (2, False), (2, True), (3, True)]  # threads, units or batch
SIZES = [(5, 7, 3, 37), (1, 1, 1, 1), (3, 2, 1, 50), (2, 3, 5, 193), (9, 2, 7, 7)]
CELLS = {
    "lstm": cells.lstm(),
    "gru": zoo.CELLS["gru"],
    "gru_before": zoo.STAGED["gru_before"],
    "lstm_projected": cells.zoneout(cells.lstm(projection=True)),  # without a clip, whose gradient jumps
}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]


def values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal, the sign of zeros too; NaN at the same places."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b))


# Rounding and packing


@njit(**JIT_OPTIONS)
def round_all(source, source_step, count, out, out_step, rows):
    bfloat16.round_rows(source, source_step, count, out, out_step, 0, rows)


@njit(**JIT_OPTIONS)
def pair_all(source, step, rows, out):
    bfloat16.pair_rows(source, step, rows, out)


@njit(**JIT_OPTIONS)
def zip_all(source, step, count, rows, zeros, out, out_step):
    bfloat16.zip_rows(source, step, count, rows, zeros, out, out_step)


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    found = values(rounding.bfloat16_bits(SPECIAL))
    assert same(
        found, np.array([0, -0.0, np.inf, -np.inf, np.nan, found[5], np.inf, 1, 1 + 2**-6, 1 + 2**-7], "f")
    )
    assert 0 < found[5] < 2e-40  # denormals stay
    payload = np.array([0x7FFFFFFF, 0xFF800001], np.uint32).view(
        "f"
    )  # whose rounding would carry into the sign, or be inf
    assert np.isnan(values(rounding.bfloat16_bits(payload))).all()
    numbers = np.random.default_rng(0).standard_normal(10000).astype("f")
    torch = pytest.importorskip("torch")
    assert np.array_equal(
        values(rounding.bfloat16_bits(numbers)), torch.from_numpy(numbers).bfloat16().float().numpy()
    )


@pytest.mark.parametrize("count", [1, 2, 7, LANES, 2 * LANES + 5])
def test_rows_rounded_in_a_kernel(count: int) -> None:
    source = np.random.default_rng(count).standard_normal((3, count)).astype("f")
    source.ravel()[: len(SPECIAL)] = SPECIAL[: source.size]
    out = np.full((3, count + count % 2 + 4), 7, np.uint16)
    round_all(source.ctypes.data, source.strides[0], count, out.ctypes.data, out.strides[0], 3)
    assert same(values(out[:, :count]), values(rounding.bfloat16_bits(source)))
    assert not out[:, count : count + count % 2].any() and (out[:, count + count % 2 :] == 7).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_pairs_of_rows(rows: int) -> None:
    """From floats, and from values that are rounded already; an odd row's partner is zero."""
    count = 2 * LANES
    source = np.random.default_rng(rows).standard_normal((rows, count)).astype("f")
    source.ravel()[: len(SPECIAL)] = SPECIAL
    out, again = np.empty(((rows + 1) // 2, count), np.uint32), np.empty(((rows + 1) // 2, count), np.uint32)
    pair_all(source.ctypes.data, source.strides[0], rows, out.ctypes.data)
    halves, zeros = rounding.bfloat16_bits(source), np.zeros(count, np.uint16)
    zip_all(
        halves.ctypes.data,
        halves.strides[0],
        count,
        rows,
        zeros.ctypes.data,
        again.ctypes.data,
        again.strides[0],
    )
    padded = np.concatenate([halves, zeros[None]])[: 2 * len(out)]
    for words in (out, again):
        assert same(values(words & 0xFFFF), values(padded[::2]))
        assert same(values(words >> 16), values(padded[1::2]))


# Tiles


@njit(**JIT_OPTIONS)
def call1(address, a, a_row, a_k, k, b, b_k, start, start_row, c, c_row):
    tile1(address, a, a_row, a_k, k, b, b_k, start, start_row, c, c_row)


def words(a: np.ndarray, axis: int) -> np.ndarray:
    """Pairs along an axis of even length, the first in the low half."""
    halves = np.moveaxis(rounding.bfloat16_bits(a).astype(np.uint32), axis, 0)
    return np.ascontiguousarray(np.moveaxis(halves[::2] | halves[1::2] << 16, 0, axis))


def product(m: int, n: int, a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    left, right, c = words(a, 1), words(b, 0), np.full((m + 1, n * LANES + 3), 7, "f")
    call1(
        plain_families("bfloat16")[n - 1, m - 1], left.ctypes.data, *left.strides, left.shape[1],
        right.ctypes.data, n * LANES * 4, start.ctypes.data, n * LANES * 4, c.ctypes.data, c.strides[0],
    )  # fmt: skip
    assert np.all(c[m:] == 7) and np.all(c[:, n * LANES :] == 7)
    return c[:m, : n * LANES]


@pytest.mark.parametrize("depth", [0, 2, 4, 38])
def test_every_tile_of_pairs(depth: int) -> None:
    draw = lambda *shape: (
        np.random.default_rng(depth).integers(-8, 9, shape).astype("f")
    )  # sums are exact in any order
    for m in range(1, TILE_ROWS + 1):
        for n in range(1, TILE_COLUMNS + 1):
            a, b, start = draw(m, depth), draw(depth, n * LANES), draw(m, n * LANES)
            assert np.array_equal(product(m, n, a, b, start), start + a @ b), (m, n)


def test_a_row_has_the_same_bits_in_every_tile() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype("f") for s in ((TILE_ROWS, 50), (50, TILE_COLUMNS * LANES)))
    rows = [
        product(m, n, a[:m], np.ascontiguousarray(b[:, : n * LANES]), np.zeros((m, n * LANES), "f"))[
            0, :LANES
        ]
        for m in range(1, TILE_ROWS + 1)
        for n in range(1, TILE_COLUMNS + 1)
    ]
    assert all(np.array_equal(r, rows[0]) for r in rows)
    exact = values(rounding.bfloat16_bits(a[0])).astype("d") @ values(
        rounding.bfloat16_bits(b[:, :LANES])
    ).astype("d")
    assert error(rows[0], exact) < BOUND


def test_nan_and_infinity_pass_through_a_product() -> None:
    a, b = np.ones((2, 4), "f"), np.ones((4, LANES), "f")
    a[0, 1], b[2, 3], b[1, 5] = np.nan, np.inf, -np.inf
    c = product(2, 1, a, b, np.zeros((2, LANES), "f"))
    assert np.isnan(c[0]).all() and c[1, 3] == np.inf and c[1, 5] == -np.inf and c[1, 0] == 4


def test_names_tell_the_precisions_apart() -> None:
    from llvmlite import ir

    tiles = [microkernel._tile(ir.Module(), 2, 1, ((0, 1),), p).name for p in ("float32", "bfloat16")]
    assert tiles[0] != tiles[1] and ("_dot_" in tiles[1]) == isa.DOT_BF16


@pytest.mark.skipif(not isa.IS_X86, reason="the features named are x86's")
def test_tiles_without_the_instruction(python: Callable) -> None:
    """Where words are expanded to float32: the same products."""
    source = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_bfloat16 as t\n"
        "assert t.LANES == 8 and not t.isa.DOT_BF16\n"
        "t.test_every_tile_of_pairs(38); t.test_a_row_has_the_same_bits_in_every_tile()\n"
        "t.test_nan_and_infinity_pass_through_a_product(); t.test_rows_rounded_in_a_kernel(7)"
    )
    features = "+avx,+avx2,+fma,-avx512f"
    python(
        source, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features, NUMBA_ENABLE_AVX=None, NUMLSTM_AMX=None
    )


# Sequences


def asked(name: str, size: tuple[int, ...], pattern: str = "all", seed: int = 0) -> Question:
    """A question with everything in it, with a recurrent mask where rows have holes."""
    question, draw = ask(CELLS[name], *size, pattern, seed), np.random.default_rng(1)
    T, B, _, H = size
    question.dstates = tuple(draw.standard_normal((T, B, H)) for _ in question.cell.state[1:])
    if pattern != "all":
        question.recurrent_mask = draw.random(question.dh.shape)
    return replace(question.cast("f").cast("d"), precision="bfloat16")


@pytest.mark.parametrize("pattern", ["all", "holes"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", CELLS)
def test_against_the_reference_on_rounded_operands(name: str, size: tuple[int, ...], pattern: str) -> None:
    nearest: dict[str, float] = {}
    for seed in range(4):
        question = asked(name, size, pattern, seed)
        right, found = answer(question, reference), answer(question.cast("f"))
        assert found.keys() == right.keys() and {a.dtype.name for a in found.values()} == {"float32"}
        for k in right:
            off = error(found[k], right[k])
            assert off <= LOOSE, (k, seed, off)
            nearest[k] = min(nearest.get(k, np.inf), off)
    assert all(e <= BOUND for e in nearest.values()), nearest


@pytest.mark.parametrize("name", CELLS)
def test_how_far_from_float32(name: str) -> None:
    """As near as rounding allows, and no nearer: it is not float32 under another name."""
    for size in ((5, 7, 3, 37), (20, 4, 30, 100)):
        question = asked(name, size)
        found, exact = answer(question.cast("f")), answer(replace(question, precision="float32"), reference)
        off = {k: error(found[k], exact[k]) for k in exact}
        assert all(1e-4 < e < UNROUNDED for e in off.values()), off


@pytest.mark.parametrize("name", CELLS)
def test_neither_threads_nor_a_product_apart_change_a_bit(
    name: str, share_by: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, results = asked(name, (6, 5, 3, 69), "holes").cast("f"), []
    for split in SPLITS:
        for apart in (False, True)[: 2 if split[1] or split[0] == 1 else 1]:
            share_by(*split)
            monkeypatch.setattr(sequence, "_apart", lambda *_, apart=apart: apart)
            results.append(answer(question))
            assert np.array_equal(question.forward(training=False).h, results[0]["h"])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("name", CELLS)
def test_nan_stays_in_its_row(name: str) -> None:
    """Nor does what pads an odd number of units, or of inputs, or of rows, let one in."""
    question = asked(name, (3, 5, 3, 9)).cast("f")
    clean = answer(question)
    question.arguments[0][1, 2] = np.nan
    spoilt = answer(question)
    for part in ("h", "dx"):
        others = [0, 1, 3, 4]
        assert np.array_equal(spoilt[part][:, others], clean[part][:, others])
        assert np.isnan(spoilt[part][1:, 2]).any()


@pytest.mark.parametrize("name", ["lstm", "gru_before"])  # recomputed inside the kernel, and around it
def test_saved_values_computed_again_are_the_same(name: str) -> None:
    question = asked(name, (9, 3, 5, 37), "holes").cast("f")
    rest = {"recurrent_mask": question.recurrent_mask, "precision": "bfloat16"}
    found = []
    for kernels in (sequence, Remat(sequence, 4)):
        out = kernels.forward(question.cell, *question.arguments, training=True, **rest)
        found.append((out.h.copy(), kernels.backward(out.residual, question.dh, question.dfinal)))
    (h, whole), (again, pieces) = found
    assert np.array_equal(h, again) and np.array_equal(whole.x, pieces.x)
    assert (
        error(pieces.kernel, whole.kernel) < BOUND
        and error(pieces.recurrent_kernel, whole.recurrent_kernel) < BOUND
    )


@cell(gates="an", state=("h",), recurrent="n")
def bare(a, h):
    """A product that reads a normalised vector as it is."""
    return tanh(preactivation("n", normalize(h)) + a)


@pytest.mark.parametrize(("masked", "precision"), [(True, "float32"), (False, "bfloat16")])
def test_what_no_tile_can_round_or_mask_is_refused(masked: bool, precision: str) -> None:
    question = replace(ask(bare, 2, 2, 2, 4).cast("f"), precision=precision)
    if masked:
        question.recurrent_mask = np.ones((2, 2, 4), "f")
    with pytest.raises(
        ValueError, match=r"^(recurrent_mask|precision): .* can't be had for bare, where a product reads"
    ):
        question.forward(training=False)


@pytest.mark.parametrize("kernels", [sequence, reference], ids=["cpu", "reference"])
def test_an_unknown_precision_is_named(kernels) -> None:
    question = replace(ask(cells.elman(), 2, 2, 2, 4).cast("f"), precision="float16")
    with pytest.raises(
        ValueError, match=r"precision: expected float32 or bfloat16( or tf32)?, got 'float16'"
    ):
        question.forward(kernels, training=False)
