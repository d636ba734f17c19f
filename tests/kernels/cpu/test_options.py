"""Step inputs (zoneout masks) and the recurrent mask (recurrent dropout) in the fused kernels, against the reference.

Masks come by step, by sequence or as one number; all of them with and without masked steps, and with every way of
sharing the work out, which must not change a bit.
"""

import numpy as np
import pytest

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import sequence

T, B, I, H = 6, 5, 3, 37
CELLS = {
    "zoneout lstm": cells.zoneout(cells.lstm()),
    "zoneout elman": cells.zoneout(cells.elman()),
    "peephole lstm, clipped": cells.lstm(peephole=True, cell_clip=0.5),
    "coupled lstm": cells.lstm(coupled=True),
    "coupled peephole lstm": cells.lstm(coupled=True, peephole=True),
    "gru": cells.gru(),
}


def question(cell, kind, masked):
    rng = np.random.default_rng(3)
    normal = rng.standard_normal
    G = len(cell.gates)
    arguments = [normal((T, B, I)), normal((I, G * H)), normal((H, G * H)) / 6, normal(G * H)]
    arguments += [tuple(normal(H) for _ in cell.params), tuple(normal((B, H)) / 2 for _ in cell.state)]
    arguments.append(rng.random((T, B)) > 0.3 if masked else None)
    shape = {"step": (T, B, H), "sequence": (1, B, H), "number": (1, 1, 1)}[kind]
    draw = (lambda: np.full(shape, 0.3)) if kind == "number" else (lambda: (rng.random(shape) > 0.5) * 1.0)
    options = {"aux": tuple(draw() for _ in cell.aux), "recurrent_mask": draw() * 2}
    upstream = normal((T, B, H)), tuple(normal((B, H)) for _ in cell.state)
    return arguments, options, upstream


def as_float32(value):
    if isinstance(value, tuple):
        return tuple(map(as_float32, value))
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value


def run(module, arguments, options, upstream):
    out = module.forward(*arguments, training=True, **options)
    h, final = out.h.copy(), out.final
    g = module.backward(out.residual, *upstream)
    return [h, *final, g.x, g.kernel, g.recurrent_kernel, g.bias, *g.params, *g.state]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", ["step", "sequence", "number"])
@pytest.mark.parametrize("name", CELLS)
def test_matches_reference_and_split_changes_no_bit(name, kind, masked, monkeypatch):
    cell = CELLS[name]
    arguments, options, upstream = question(cell, kind, masked)
    expected = run(reference, [cell, *arguments], options, upstream)
    options, upstream = {k: as_float32(v) for k, v in options.items()}, as_float32(upstream)
    results = []
    for split in ((1, False), (2, False), (2, True)):
        monkeypatch.setattr(sequence, "_split", lambda *_, split=split: split)
        results.append(run(sequence, [cell, *map(as_float32, arguments)], options, upstream))
    for got, want in zip(results[0], expected, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_zoneout_of_one_keeps_the_state_and_of_zero_changes_nothing():
    cell = cells.zoneout(cells.elman())
    rng = np.random.default_rng(0)
    x, kernel, recurrent = (rng.standard_normal(s).astype(np.float32) for s in ((4, 2, 3), (3, 5), (5, 5)))
    start = (np.full((2, 5), 0.5, np.float32),)
    common = (x, kernel, recurrent, None, (), start, None)
    still = sequence.forward(cell, *common, training=False, aux=(np.ones((1, 1, 1), np.float32),))
    assert (still.h == 0.5).all()
    plain = sequence.forward(cells.elman(), *common, training=False)
    zero = sequence.forward(cell, *common, training=False, aux=(np.zeros((1, 1, 1), np.float32),))
    assert np.array_equal(plain.h, zero.h)


@pytest.mark.parametrize("module", [reference, sequence], ids=["reference", "cpu"])
def test_bad_aux_and_masks_are_named(module):
    x, kernel, recurrent = np.zeros((4, 2, 3)), np.zeros((3, 5)), np.zeros((5, 5))
    common = (x, kernel, recurrent, None, (), None, None)
    with pytest.raises(ValueError, match=r"aux: expected one array for each of \('z_h',\), got 0"):
        module.forward(cells.zoneout(cells.elman()), *common, training=False)
    with pytest.raises(
        ValueError, match=r"z_h: expected a shape that broadcasts to \(4, 2, 5\), got \(2, 5\)"
    ):
        module.forward(cells.zoneout(cells.elman()), *common, training=False, aux=(np.zeros((2, 5)),))
    with pytest.raises(ValueError, match=r"recurrent_mask: .* \(4, 2, 5\), got \(3, 2, 5\)"):
        module.forward(cells.elman(), *common, training=False, recurrent_mask=np.zeros((3, 2, 5)))


@pytest.mark.parametrize("split", [(1, False), (2, True)], ids=["one thread", "units"])
@pytest.mark.parametrize("name", ["gru", "zoneout lstm"])
def test_the_input_product_apart_or_fused_gives_the_same_bits(name, split, monkeypatch):
    cell = CELLS[name]
    arguments, options, upstream = question(cell, "step", True)
    options = {k: as_float32(v) for k, v in options.items()}
    monkeypatch.setattr(sequence, "_split", lambda *_: split)
    results = []
    for apart in (False, True):
        monkeypatch.setattr(sequence, "_apart", lambda *_, apart=apart: apart)
        trained = run(sequence, [cell, *map(as_float32, arguments)], options, as_float32(upstream))
        inferred = sequence.forward(cell, *map(as_float32, arguments), training=False, **options)
        results.append([*trained, inferred.h, *inferred.final])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_the_input_product_is_apart_for_few_rows_only():
    assert sequence._apart(shards=1, units=False, B=1, I=64)
    assert sequence._apart(shards=2, units=True, B=3 if sequence.TILE_ROWS >= 6 else 1, I=64)
    assert not sequence._apart(shards=2, units=False, B=1, I=64)  # a thread must own all rows
    assert not sequence._apart(shards=1, units=False, B=32, I=64)
    assert not sequence._apart(shards=1, units=False, B=1, I=2)
