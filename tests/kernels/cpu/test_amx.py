"""AMX's tiles without AMX: their assembly for a processor that has it, and the whole of the kernels on emulated
instructions, which are held to the words of Intel's manual first.

Emulated, the same tiles, packing and passes run as with the instructions; only what an instruction does is a function.
Sums of pairs have another order than the vector tiles', so bfloat16 is held to the reference as in test_bfloat16.py; sums
of bytes have none, so int8 is held to the vector tiles bit for bit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from llvmlite import binding, ir
from questions import BOUND, answer, ask, assert_same_bits, error
from test_bfloat16 import CELLS, LOOSE, asked, call1, same, words
from test_microkernel import call2
from test_quantized import call_tile, held

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import amx, gemm, isa, microkernel, quantized, sequence, threads
from numlstm.kernels.cpu.amx import ROWS, UNIT
from numlstm.kernels.cpu.isa import LANES, TILE_COLUMNS
from numlstm.kernels.cpu.layout import Layout
from numlstm.kernels.cpu.stream import Stack
from numlstm.kernels.int8 import Quantized
from numlstm.kernels.remat import Remat
from numlstm.kernels.rounding import operand
from numlstm.kernels.stream import Recurrence

pytestmark = pytest.mark.skipif(LANES != 16, reason="the code around the tiles is AVX-512's")

HERE = Path(__file__).parent
EMULATED = "bfloat16_emulated"
SPLITS = [(1, False), (2, False), (2, True), (3, True)]  # threads, units or batch
# (T, B, I, H): rows of one register, of two, of two and one; k of one word, of two UNITs; blocks that fill no row's words
SIZES = [(4, 7, 3, 37), (2, 40, 33, 34), (2, 17, 1, 1), (2, 17, 3, 66)]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All products of bfloat16 and int8 in emulated tiles, however few their rows."""
    monkeypatch.setattr(isa, "tiles", lambda part: "emulated")
    monkeypatch.setattr(amx, "LEAST_ROWS", 1)
    yield
    begun, ended = amx.state("emulated")[[amx.BEGUN // 8, amx.ENDED // 8]]
    assert begun == ended  # whoever configures the registers gives them back


# The configuration, and the instructions


def test_the_configuration_is_sixteen_rows_of_sixty_four_bytes() -> None:
    """Palette 1; no row to start from; bytes a row, 16 bits each, at 16; rows at 48 (the manual's table of LDTILECFG)."""
    expected = bytes([1, 0, *[0] * 14, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
    assert amx.CONFIG.tobytes() == expected == amx.state("emulated").tobytes()[:64]


def tdpbf16ps(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The manual's pseudo-code, all columns at once: c (16, 16) float32, a and b (16, 32) as float32. A product of two
    bfloat16 is exact in float32, so that rounding after the sum is rounding once."""
    flush = lambda x: np.where(np.abs(x) < np.finfo("f").tiny, np.copysign(np.float32(0), x), x)
    a, b = flush(a), flush(b)
    temp = np.zeros((16, 32), "f")
    for m in range(16):
        for k in range(16):
            with np.errstate(all="ignore"):
                temp[m, 0::2] = flush(temp[m, 0::2] + a[m, 2 * k] * b[k, 0::2])
                temp[m, 1::2] = flush(temp[m, 1::2] + a[m, 2 * k + 1] * b[k, 1::2])
    return flush(flush(c) + flush(temp[:, 0::2] + temp[:, 1::2]))


def test_a_product_of_pairs_has_the_manuals_bits() -> None:
    draw = np.random.default_rng(0)
    a, b = (operand(draw.standard_normal((16, 32)).astype("f"), "bfloat16") for _ in "ab")
    c = draw.standard_normal((16, 16)).astype("f")
    a[1] *= 2.0**-110
    b[:, 2:4] *= 2.0**-30  # with a's second row: denormal products, and sums
    a[2, 5], c[3, 3], b[4, 9], a[5, 7], c[1, 1] = 1e-39, 1e-39, np.inf, np.nan, 0
    a = operand(a, "bfloat16")
    found = np.empty((16, 16), "f")
    left, right = words(a, 1), words(b.reshape(16, 16, 2).swapaxes(1, 2).reshape(32, 16), 0)
    call1(
        microkernel.plain_families(EMULATED)[0, 15], left.ctypes.data, left.strides[0], 4, UNIT, right.ctypes.data,
        right.strides[0], c.ctypes.data, 64, found.ctypes.data, 64,
    )  # fmt: skip
    right_bits = tdpbf16ps(c, a, b)
    assert same(found, right_bits)
    assert np.isnan(found[5]).all() and found[1, 1] == 0 and (found == 0).sum() == 1


# Tiles


def draw(*shape: int) -> np.ndarray:
    """Small whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype("f")


@pytest.mark.parametrize("depth", [0, 2 * UNIT, 6 * UNIT])
def test_every_tile_of_pairs(depth: int) -> None:
    """What it writes are whole UNITs of rows and no more."""
    table = microkernel.plain_families(EMULATED)
    assert (
        table.shape == (TILE_COLUMNS + 1, ROWS) and np.unique(table[:-1]).size == TILE_COLUMNS * ROWS // UNIT
    )
    for m in (1, 15, 16, 17, 32):
        for n in range(1, TILE_COLUMNS + 1):
            rows = -(-m // UNIT) * UNIT
            a, b, start = draw(rows, depth), draw(depth, n * LANES), draw(rows, n * LANES)
            left, right, c = words(a, 1), words(b, 0), np.full((rows + 1, n * LANES + 3), 7, "f")
            call1(
                table[n - 1, m - 1], left.ctypes.data, left.strides[0], 4, depth // 2, right.ctypes.data,
                n * LANES * 4, start.ctypes.data, n * LANES * 4, c.ctypes.data, c.strides[0],
            )  # fmt: skip
            assert np.array_equal(c[:rows, : n * LANES], start + a @ b), (m, n)
            assert np.all(c[rows:] == 7) and np.all(c[:, n * LANES :] == 7)


@pytest.mark.parametrize("cell", ["lstm", "gru", "wide"])
def test_two_products_over_windows(cell: str) -> None:
    for _, columns, windows in Layout.of(zoo.CELLS[cell].stages[0]).groups():
        (x0, x1), (h0, h1) = windows
        for m in (3, 20):
            for K, L in ((32, 64), (0, 32), (32, 0)):
                rows = -(-m // UNIT) * UNIT
                a, e, b, f = (
                    draw(rows, K),
                    draw(rows, L),
                    draw(K, (x1 - x0) * LANES),
                    draw(L, (h1 - h0) * LANES),
                )
                start, c = draw(columns * LANES), np.empty((rows, columns * LANES), "f")
                left, right, left2, right2 = words(a, 1), words(b, 0), words(e, 1), words(f, 0)
                call2(
                    microkernel.fused_family(columns, windows, EMULATED)[m - 1],
                    left.ctypes.data, left.strides[0], 4, K // 2, right.ctypes.data, (x1 - x0) * LANES * 4,
                    left2.ctypes.data, left2.strides[0], 4, L // 2, right2.ctypes.data, (h1 - h0) * LANES * 4,
                    start.ctypes.data, 0, c.ctypes.data, columns * LANES * 4,
                )  # fmt: skip
                expected = np.tile(start, (rows, 1))
                expected[:, x0 * LANES : x1 * LANES] += a @ b
                expected[:, h0 * LANES : h1 * LANES] += e @ f
                assert np.array_equal(c, expected), (m, windows)


def test_every_tile_of_bytes() -> None:
    """Exact sums, and no row written past the last; the largest sums wrap around on the way and come back."""
    random = np.random.default_rng(0)
    for m in (1, 16, 17, 31, 32):
        for n in range(1, TILE_COLUMNS + 1):
            for K in (1, 64, 200):
                values = random.integers(-127, 128, (K, n * LANES), dtype=np.int8)
                q = random.integers(-127, 128, (m, K), dtype=np.int8)
                check_bytes(
                    q, Quantized(values, np.ones(n * LANES, "f")), random.integers(-9, 9, (m, n * LANES))
                )
    q = np.repeat(np.int8([[127], [-127]]), 1000, 1)
    check_bytes(q, Quantized(np.full((1000, LANES), 127, np.int8), np.ones(LANES, "f")), np.zeros((2, LANES)))


def check_bytes(q: np.ndarray, w: Quantized, start: np.ndarray) -> None:
    (m, K), columns, start = q.shape, w.shape[1], start.astype("f")
    packed = quantized.pack(w, np.arange(columns).reshape(-1, LANES), (columns // LANES,), UNIT)
    a = np.full((ROWS, -(-K // 64) * 64), 99, np.uint8)  # what lies beyond K meets zeros
    a[:m, :K] = q.astype(np.int16) + 128
    c, scale = np.full((m + 1, columns + 3), 7, "f"), np.ones(m, "f")
    call_tile(
        quantized.tiles("emulated")[columns // LANES - 1, m - 1], a.ctypes.data, a.strides[0], a.shape[1] // 4,
        packed.values.ctypes.data, packed.first.ctypes.data, packed.scale.ctypes.data, scale.ctypes.data,
        start.ctypes.data, start.strides[0], c.ctypes.data, c.strides[0], m,
    )  # fmt: skip
    assert np.array_equal(c[:m, :columns], (start + q.astype(int) @ w.values.astype(int)).astype("f")), (m, K)
    assert np.all(c[m:] == 7) and np.all(c[:, columns:] == 7)


# Passes in bfloat16


@pytest.mark.parametrize("pattern", ["all", "holes"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", CELLS)
def test_training_against_the_reference(
    name: str, size: tuple[int, ...], pattern: str, emulated: None
) -> None:
    """As test_bfloat16.py asks it of the vector tiles: values next to a tie may round to the other side."""
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


def test_more_rows_than_one_block_of_the_weights_gradients(emulated: None) -> None:
    """Of time and batch: 300, where a block has 256."""
    question = asked("gru", (6, 50, 20, 18))
    right, found = answer(question, reference), answer(question.cast("f"))
    assert all(error(found[k], right[k]) <= LOOSE for k in right)
    assert error(found["dkernel"], right["dkernel"]) < 1e-3


@pytest.mark.parametrize("name", ["lstm", "gru_before"])
def test_threads_change_no_bit_and_each_configures_its_registers(
    name: str, share_by: Callable, emulated: None
) -> None:
    question, results = asked(name, (4, 21, 3, 69), "holes").cast("f"), []
    for split in SPLITS:
        share_by(*split)
        before = amx.state("emulated")[amx.BEGUN // 8]
        results.append(answer(question))
        assert amx.state("emulated")[amx.BEGUN // 8] - before == 2 * split[0]  # forward and back
        assert np.array_equal(question.forward(training=False).h, results[0]["h"])
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_nan_stays_in_its_row(emulated: None) -> None:
    """Though a tile reads past the last row, and past the last k."""
    for name in CELLS:
        question = asked(name, (3, 5, 3, 9)).cast("f")
        clean = answer(question)
        question.arguments[0][1, 2] = np.nan
        spoilt = answer(question)
        for part in ("h", "dx"):
            others = [0, 1, 3, 4]
            assert np.array_equal(spoilt[part][:, others], clean[part][:, others])
            assert np.isnan(spoilt[part][1:, 2]).any()


def test_saved_values_computed_again_are_the_same(emulated: None) -> None:
    question = asked("lstm", (9, 5, 5, 37), "holes").cast("f")
    rest = {"recurrent_mask": question.recurrent_mask, "precision": "bfloat16"}
    found = []
    for kernels in (sequence, Remat(sequence, 4)):
        out = kernels.forward(question.cell, *question.arguments, training=True, **rest)
        found.append((out.h.copy(), kernels.backward(out.residual, question.dh, question.dfinal)))
    (h, whole), (again, pieces) = found
    assert np.array_equal(h, again) and np.array_equal(whole.x, pieces.x)
    assert error(pieces.kernel, whole.kernel) < BOUND


@pytest.mark.parametrize("shape", [(40, 50, 70), (5, 33, 200), (17, 1200, 33), (100, 31, 16)], ids=str)
def test_dense_products(shape: tuple[int, int, int], emulated: None, keep_threads: None) -> None:
    (M, K, N), random = shape, np.random.default_rng(0)
    a, b, bias = (random.standard_normal(s).astype("f") for s in ((M, K), (K, N), (N,)))
    right = operand(a, "bfloat16").astype("d") @ operand(b, "bfloat16") + bias
    found = []
    for n in (1, 3):
        threads.set_num_threads(n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "ONE_THREAD_BELOW", 0)
            for left in (a, np.asfortranarray(a)):
                for other in (b, np.asfortranarray(b)):
                    found.append(gemm.matmul(left, other, bias=bias, precision="bfloat16"))
    assert error(found[0], right) < BOUND
    assert all(np.array_equal(c, found[0]) for c in found[1:])


def test_few_rows_stay_with_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "tiles", lambda part: "emulated")
    assert amx.precision_of("bfloat16", amx.LEAST_ROWS) == EMULATED and quantized.form_for(100) == "emulated"
    assert amx.precision_of("bfloat16", amx.LEAST_ROWS - 1) == "bfloat16"
    assert amx.precision_of("float32", 100) == "float32" and quantized.form_for(1) == quantized.FORM
    assert "emulated, 32 x 4" in quantized.explain(cells.lstm(), 5, 40, 3, 37)
    assert "32 x 4 vectors of 16, bfloat16 in tiles (emulated)" in sequence.explain(
        cells.lstm(), 5, 40, 3, 37, "bfloat16"
    )
    assert amx.words("bf16") == "AMX tiles (emulated) from 4 rows on"


# Passes in eight bits


def same_forward(a: Any, b: Any) -> None:
    assert a.h.tobytes() == b.h.tobytes()
    assert all(x.tobytes() == y.tobytes() for x, y in zip(a.final, b.final, strict=True))


@pytest.mark.parametrize("name", ["lstm", "gru", "wide", "lstm_normalized_projected_peephole"])
@pytest.mark.parametrize("size", [(5, 7, 3, 37), (2, 50, 70, 130), (3, 1, 1, 1)], ids=str)
def test_int8_has_the_bits_of_the_vectors(
    name: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = held(ask((zoo.CELLS | zoo.STAGED | {"lstm": cells.lstm()})[name], *size, "holes"))
    plain = question.forward(quantized, training=False)
    monkeypatch.setattr(isa, "tiles", lambda part: "emulated")
    monkeypatch.setattr(amx, "LEAST_ROWS", 1)
    for split in SPLITS:
        monkeypatch.setattr(quantized, "_split", lambda *_, split=split: split)
        before = amx.state("emulated")[amx.BEGUN // 8]
        same_forward(plain, question.forward(quantized, training=False))
        assert amx.state("emulated")[amx.BEGUN // 8] - before == split[0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 50, 193), (50, 7, 16), (40, 193, 200)], ids=str)
def test_int8_dense_products(shape: tuple[int, int, int], emulated: None) -> None:
    M, K, N = shape
    random = np.random.default_rng(M)
    a, w = random.standard_normal((M, K)).astype("f"), Quantized.of(random.standard_normal((K, N)))
    assert np.array_equal(quantized.matmul(a, w), a @ w)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_streams_have_the_bits_of_whole_sequences(kind: str, emulated: None) -> None:
    question = ask(cells.lstm(), 5, 6, 3, 37).cast("f")
    x, kernel, recurrent, bias, *_ = question.arguments
    if kind == "int8":
        kernel, recurrent = Quantized.of(kernel), Quantized.of(recurrent)
    stack = Stack([Recurrence(question.cell, kernel, recurrent, bias, precision="bfloat16")], 6, 3)
    kernels, options = (quantized, {}) if kind == "int8" else (sequence, {"precision": "bfloat16"})
    whole = kernels.forward(
        question.cell, x, kernel, recurrent, bias, (), None, None, training=False, **options
    )
    for t in range(5):
        stack.x[...] = x[t]
        stack.run()
        assert np.array_equal(stack.y, whole.h[t])


# Run in a process of its own: each array ends where the next page may not be touched.
GUARDED = """
import ctypes, mmap
import numpy as np
from numlstm.kernels.cpu import amx, blueprint, fused, gemm, isa, quantized, staged, workspace
PAGE, libc, kept = mmap.PAGESIZE, ctypes.CDLL(None), []
def aligned(shape, *, zero=False):
    n = int(np.prod(shape)) * 4
    size = -(-n // 64) * 64
    whole = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE)
    start = np.frombuffer(whole, np.uint8).ctypes.data
    assert libc.mprotect(ctypes.c_void_p(start + len(whole) - PAGE), PAGE, 0) == 0
    kept.append(whole)
    a = np.frombuffer(whole, np.uint8)[len(whole) - PAGE - size :][:n].view("f").reshape(shape)
    a[...] = 0 if zero else np.nan
    return a
for module in (workspace, blueprint, fused, gemm, quantized, staged):
    module.aligned = aligned
amx.LEAST_ROWS, isa.tiles = 1, lambda part: "emulated"
import test_amx as t
for name in t.CELLS:
    for size in ((2, 17, 3, 37), (2, 3, 33, 7)):
        found = t.answer(t.asked(name, size).cast("f"))
        found["int8"] = t.held(t.ask(t.CELLS[name], *size)).forward(quantized, training=False).h
        assert all(np.isfinite(a).all() for a in found.values())
for shape in ((40, 50, 70), (17, 700, 33)):
    a, b = np.ones(shape[:2], "f"), np.ones(shape[1:], "f")
    for left in (a, np.asfortranarray(a)):
        c = gemm.matmul(left, np.asfortranarray(b), precision="bfloat16")
        assert (c == shape[1]).all()
    quantized.matmul(a, t.Quantized.of(b))
assert len(kept) > 50
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
def test_nothing_is_touched_past_an_arrays_last_page(python: Callable) -> None:
    """Memory that nobody wrote is NaN there, so that nothing is computed of it either."""
    python(GUARDED, PYTHONPATH=f"{HERE}:{HERE.parent}")


# The instructions themselves, as assembly


def assembly(emit: Callable[[ir.Module], ir.Function]) -> str:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    emit(module).linkage = "external"
    machine = binding.Target.from_triple(module.triple).create_target_machine(cpu="sapphirerapids", opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, binding.create_pass_builder(machine, options)
    )
    return machine.emit_assembly(parsed)


def loops(text: str) -> list[list[str]]:
    """The instructions of each innermost loop, from a label to the jump back to it."""
    found, lines = [], [line.strip() for line in text.splitlines()]
    at = {line[:-1]: k for k, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    for k, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+\s+(\.L\w+)", line)
        if jump and at.get(jump[1], k) < k:
            found.append(lines[at[jump[1]] + 1 : k])
    return found


@pytest.mark.parametrize(("rows", "loads"), [(32, 4), (16, 5)])
def test_a_tile_of_pairs_in_assembly(rows: int, loads: int) -> None:
    """In each loop four products for 2 + 2 loads, or 1 + 4; sums never leave their registers, nor does anything else."""
    text = assembly(lambda module: amx.product_tile(module, "amx", rows, 4, ((0, 4), (0, 4))))
    products = 2 * 4 * rows // 16
    assert text.count("tdpbf16ps") == products
    tiles = 4 * rows // 16
    assert text.count("tilestored") == tiles and text.count("tilezero") == text.count("ldtilecfg") == 0
    of_products = [loop for loop in loops(text) if any("tdpbf16ps" in line for line in loop)]
    assert len(of_products) == products // 4
    for loop in of_products:
        assert sum("tdpbf16ps" in line for line in loop) == 4
        assert sum("tileloadd" in line for line in loop) == loads
        assert not any("rsp" in line for line in loop)  # nor is a general one spilt
    assert text.count("tileloadd") == tiles + loads * len(of_products)


def test_a_tile_of_bytes_in_assembly() -> None:
    text = assembly(lambda module: amx.int8_tile(module, "amx", 4))
    of_products = [loop for loop in loops(text) if any("tdpbusd" in line for line in loop)]
    assert text.count("tdpbusd") == 12 and len(of_products) == 3  # two of 2 x 2 tiles, one of 1 x 4
    assert all(sum("tdpbusd" in line for line in loop) == 4 for loop in of_products)
    assert not any("rsp" in line for loop in of_products for line in loop)
    assert "vcvtdq2ps" in text and "vfmadd" in text


FOR_AMX = """
import gc
from numlstm.kernels.cpu import amx, isa, microkernel, quantized
from numlstm.kernels.cpu.layout import Layout, product_tiles
from numlstm.kernels import cells
assert isa.LANES == 16 and {"amx-tile", "amx-bf16", "amx-int8"} <= isa.FEATURES
isa._permitted = lambda: True
assert amx.precision_of("bfloat16", 16) == "bfloat16_amx" and quantized.form_for(16) == "amx"
assert "AMX tiles (bf16, int8)" in isa.describe() and "AMX tiles from" in amx.words("int8")
assert microkernel.plain_families("bfloat16_amx")[:-1].all() and quantized.tiles("amx").all()
assert product_tiles(cells.lstm().stages[0], "bfloat16_amx")[0, :32].all()
assert amx.state("amx")[8:10].all()
compiled = [d for d in gc.get_objects() if type(d).__name__ == "CPUDispatcher"]
(begin,) = (d for d in compiled if "tiles_begin" in d.__qualname__)
(end,) = (d for d in compiled if "tiles_end" in d.__qualname__)
assert "ldtilecfg" in "".join(begin.inspect_asm().values())
assert "tilerelease" in "".join(end.inspect_asm().values())
isa._permitted = lambda: False
assert amx.precision_of("bfloat16", 16) == "bfloat16" and quantized.form_for(16) == quantized.FORM
assert isa.describe().endswith("AMX not permitted by the system") and amx.words("bf16") == "AMX not permitted by the system"
"""


def test_numba_compiles_them_where_the_processor_has_them(python: Callable) -> None:
    """Compiled, not run; what runs are a few stores of addresses."""
    features = ",".join(f"+{f}" for f in sorted(isa.FEATURES | {"amx-tile", "amx-bf16", "amx-int8"}))
    python(FOR_AMX, NUMBA_CPU_NAME="sapphirerapids", NUMBA_CPU_FEATURES=features, NUMLSTM_CACHE_DIR="")


@pytest.mark.parametrize("switch", ["0", "emulated", "yes"])
def test_the_switch(switch: str, python: Callable) -> None:
    source = "from numlstm.kernels.cpu import isa; print(isa.describe(), isa.tiles('bf16'))"
    done = python(source, check=False, NUMLSTM_AMX=switch)
    if switch == "yes":
        assert done.returncode != 0 and "NUMLSTM_AMX is 'yes'; expected 1" in done.stderr
        narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,-avx512f"}
        done = python(source, check=False, NUMLSTM_AMX="emulated", **narrow)
        assert "needs AVX-512's 16 lanes; this process has 8" in done.stderr
    elif switch == "0":
        assert done.stdout.endswith(" None\n") and "tiles (" not in done.stdout
    else:
        assert "AMX tiles emulated (bf16, int8) emulated" in done.stdout
