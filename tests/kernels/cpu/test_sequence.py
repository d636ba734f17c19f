"""The fused sequences: right for every cell, split, mask, size, and layout of what comes in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import zoo
from questions import PATTERNS, Question, answer, ask, assert_same_bits, check, error

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import sequence, threads
from numlstm.kernels.cpu.layout import ALIASED
from numlstm.kernels.derive import Cell
from numlstm.kernels.sequence import Prepacked

SPLITS = [(1, False), (2, False), (2, True), (3, False), (3, True)]  # threads, units or batch
SIZES = [
    (1, 1, 1, 1),
    (2, 33, 3, 50),
    (6, 13, 10, 193),
    (5, 3, 200, 7),
    (300, 1, 2, 1),
    (3, 2, 1, 16),
    (2, 7, 16, 64),
]

every_cell = pytest.mark.parametrize("cell", zoo.CELLS.values(), ids=zoo.CELLS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def check_all_splits(question: Question, share_by: Callable[[int, bool], None]) -> None:
    found = []
    for split in SPLITS:
        share_by(*split)
        found.append(answer(question.cast("f")))
    check(question, found[0])
    for other in found[1:]:
        assert_same_bits(found[0], other)


@every_cell
@every_pattern
def test_every_cell(cell: Cell, pattern: str, share_by: Callable[[int, bool], None]) -> None:
    check_all_splits(ask(cell, 5, 7, 3, 37, pattern), share_by)


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru(), cells.elman(), zoo.wide], ids=lambda c: c.name)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_odd_sizes(cell: Cell, size: tuple[int, ...], share_by: Callable[[int, bool], None]) -> None:
    spread = 0.3 if size[0] > 100 else 1.0  # a chaotic cell forgets in 300 steps which precision it began in
    for pattern in ("all", "holes"):
        check_all_splits(ask(cell, *size, pattern, spread=spread), share_by)


@every_cell
@every_pattern
def test_inference_is_training_without_the_residual(cell: Cell, pattern: str, share_by) -> None:
    question = ask(cell, 4, 9, 2, 21, pattern).cast("f")
    trained = question.forward(training=True)
    for split in SPLITS[:3]:
        share_by(*split)
        out = question.forward(training=False)
        assert out.states is None and out.residual is None
        assert np.array_equal(out.h, trained.h)
        assert all(np.array_equal(a, b) for a, b in zip(out.final, trained.final, strict=True))


@pytest.mark.parametrize("cell", [cells.lstm(), zoo.CELLS["gru"]], ids=lambda c: c.name)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_packed_weights_that_are_kept_give_the_same_bits(cell: Cell, precision: str, share_by) -> None:
    kept = Prepacked()
    weights = ask(cell, 1, 1, 2, 21).cast("f").arguments[1:5]
    for size in ((4, 9, 2, 21), (3, 1, 2, 21)):
        question = ask(cell, *size, "holes").cast("f")
        arguments = cell, question.arguments[0], *weights, *question.arguments[5:]
        plain = sequence.forward(*arguments, training=False, precision=precision)
        for split in SPLITS[:3]:
            share_by(*split)
            for _ in range(2):
                out = sequence.forward(*arguments, training=False, precision=precision, prepacked=kept)
                assert np.array_equal(out.h, plain.h)
    assert len(kept.kept) <= 2  # a row by itself may want another order
    without = (
        cell,
        question.arguments[0],
        *weights[:2],
        None,
        weights[3],
        *question.arguments[5:],
    )  # other room
    plain = sequence.forward(*without, training=False, precision=precision)
    out = sequence.forward(*without, training=False, precision=precision, prepacked=kept)
    assert np.array_equal(out.h, plain.h)


@every_cell
def test_a_row_without_a_step_gives_its_initial_state(cell: Cell) -> None:
    question = ask(cell, 4, 3, 2, 5, "holes").cast("f")
    state, valid = question.arguments[5:]
    assert not valid[:, 0].any()
    out = question.forward(training=True)
    for s, a in zip(state, out.final, strict=True):
        assert np.array_equal(a[0], s[0])
    assert np.array_equal(out.h[:, 0], np.broadcast_to(state[0][0], (4, 5)))
    g = sequence.backward(out.residual, None, question.dfinal)
    assert not g.x[:, 0].any()
    for d, a in zip(question.dfinal, g.state, strict=True):
        assert np.array_equal(a[0], d[0])


# What may be left out


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru(), zoo.wide], ids=lambda c: c.name)
def test_without_bias_state_and_some_gradients(cell: Cell) -> None:
    full = ask(cell, 4, 5, 3, 9, "holes")
    x, kernel, recurrent, bias, params, state, valid = full.arguments
    question = Question(cell, (x, kernel, recurrent, None, params, None, valid), None, (None,) * len(state))
    found = check(question)
    assert "dbias" not in found and not found["dkernel"].any()
    zeros = (x, kernel, recurrent, np.zeros_like(bias), params, tuple(np.zeros_like(s) for s in state), valid)
    question.dh = full.dh
    with_zeros = check(Question(cell, zeros, full.dh, zeros[5]))
    del with_zeros["dbias"]
    assert_same_bits(check(question), with_zeros)


def test_dx_only_when_asked() -> None:
    question = ask(cells.lstm(), 4, 5, 3, 9).cast("f")
    full, part = answer(question), answer(question, need_dx=False)
    del full["dx"]
    assert_same_bits(full, part)


@pytest.mark.parametrize("missing", [0, 1])
def test_final_gradients_one_by_one(missing: int) -> None:
    question = ask(cells.lstm(), 3, 4, 2, 5)
    question.dfinal = tuple(None if k == missing else d for k, d in enumerate(question.dfinal))
    check(question)


# The mask that multiplies what is fed back (test_options.py has more, and values handed in at every step)


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "shape", [(5, 7, 37), (1, 7, 37), (5, 1, 37), (5, 7, 1), (1, 1, 37), (1, 1, 1)], ids=str
)
def test_recurrent_mask_of_any_shape(cell: Cell, shape: tuple[int, ...], share_by) -> None:
    question = ask(cell, 5, 7, 3, 37, "holes")
    question.recurrent_mask = ((np.random.default_rng(0).random(shape) < 0.6) / 0.6).astype("f").astype("d")
    check_all_splits(question, share_by)
    question = question.cast("f")
    assert np.array_equal(question.forward(training=False).h, question.forward(training=True).h)


def test_a_mask_of_ones_changes_nothing() -> None:
    question = ask(cells.lstm(), 4, 5, 3, 19, "holes").cast("f")
    right = answer(question)
    question.recurrent_mask = np.ones((1, 1, 1))
    assert_same_bits(right, answer(question))


# How arrays may lie in memory


def misaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
    out = raw.view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def locked(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float64": lambda a: a.astype("d"),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "Fortran order": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "batch-major": lambda a: np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) if a.ndim > 1 else a,
    "misaligned": misaligned,
    "rows further apart": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 5)])[..., :-5],
    "read-only": locked,
}


@pytest.mark.parametrize("by_row", [False, True], ids=["by step", "by row"])
def test_rows_that_would_share_sets_of_a_cache(by_row: bool) -> None:
    """Rows a multiple of ALIASED bytes apart, with no gaps and with some: read where they lie, and copied."""
    T, I = (4, 1024) if by_row else (2, 4096)
    question = ask(cells.lstm(), T, 3, I, 5, "all").cast("f")
    x, *rest = question.arguments
    if by_row:
        x = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    assert x.strides[1] % ALIASED == 0
    found = answer(Question(question.cell, (x, *rest), question.dh, question.dfinal))
    check(question, found)
    assert_same_bits(found, answer(question))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    question = ask(cells.gru(), 4, 5, 3, 19, "holes").cast("f")
    lay = LAYOUTS[layout]

    def laid(a):
        if isinstance(a, tuple):
            return tuple(map(laid, a))
        return (
            lay(a)
            if a.dtype != bool or layout not in ("float64", "other byte order")
            else a.astype(np.uint8) * 2
        )

    other = Question(question.cell, laid(question.arguments), laid(question.dh), laid(question.dfinal))
    assert_same_bits(answer(question), answer(other))


def test_one_gradient_for_all_steps() -> None:
    question = ask(cells.lstm(), 4, 5, 3, 19).cast("f")
    for shape in ((1, 1, 19), (4, 1, 19), (1, 5, 19), (1, 1, 1)):
        question.dh = np.broadcast_to(np.ones(shape, "f"), (4, 5, 19))
        spread = answer(question)
        question.dh = question.dh.copy()
        assert_same_bits(spread, answer(question))


def test_arguments_stay_as_they_were() -> None:
    question = ask(zoo.wide, 4, 5, 3, 19, "holes").cast("f")
    arrays = [*question.arguments[:4], *question.arguments[4], *question.arguments[5], question.arguments[6]]
    arrays += [question.dh, *question.dfinal]
    before = [a.copy() for a in arrays]
    answer(question)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_results_outlive_later_passes() -> None:
    """Memory comes back into use only when the last view of it is gone."""
    cell, question = cells.lstm(), ask(cells.lstm(), 20, 30, 10, 64).cast("f")
    out = question.forward(training=True)
    g = sequence.backward(out.residual, question.dh, question.dfinal)
    kept = [out.h, *out.final, *out.states, g.x, g.kernel, g.recurrent_kernel, g.bias, *g.state]
    before = [a.copy() for a in kept]
    del out, g
    for seed in range(3):
        answer(ask(cell, 20, 30, 10, 64, seed=seed).cast("f"))
    assert all(np.array_equal(a, b) for a, b in zip(kept, before, strict=True))


# NaN and infinity


@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru(), zoo.slstm, zoo.wide], ids=lambda c: c.name)
@pytest.mark.parametrize("where", ["x", "state", "dh"])
def test_nan_stays_in_its_row(cell: Cell, where: str, share_by: Callable[[int, bool], None]) -> None:
    question = ask(cell, 4, 14, 3, 21).cast("f")
    clean = answer(question)
    if where == "x":
        question.arguments[0][1, 6, 0] = np.nan
    elif where == "state":
        question.arguments[5][-1][6, 3] = np.nan
    else:
        question.dh[2, 6, 5] = np.nan
    others = np.arange(14) != 6
    for split in SPLITS[:3]:
        share_by(*split)
        found = answer(question)
        per_row = [
            "h",
            "dx",
            *(k for k in found if k.startswith(("final ", "all "))),
            *("d" + s for s in cell.state),
        ]
        for k in per_row:
            rows = -2 if found[k].ndim > 2 else 0
            assert np.array_equal(np.compress(others, found[k], rows), np.compress(others, clean[k], rows)), k
        assert np.isnan(found["dkernel"]).any()  # and it is not hidden
        assert np.isnan(found["h"][1:, 6]).any() == (where != "dh")


@pytest.mark.parametrize(
    "cell", [cells.lstm(), cells.gru(), cells.elman(), zoo.peephole], ids=lambda c: c.name
)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e30])
def test_infinity_is_honest(cell: Cell, value: float) -> None:
    """Where the reference has NaN or infinity, so has the kernel; numbers saturate to the same."""
    question = ask(cell, 3, 2, 1, 5)
    question.arguments[0][1, 0, 0] = value
    right = question.forward(reference, training=False).h
    found = question.cast("f").forward(training=False).h
    assert np.array_equal(np.isfinite(found), np.isfinite(right))
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_padding_does_not_leak() -> None:
    """A cell that is 0/0 on zeros gives NaN in the units that only fill up a vector."""
    question = ask(zoo.slstm, 3, 2, 2, 5)
    x, kernel, recurrent, bias, params, state, valid = question.arguments
    found = check(
        Question(zoo.slstm, (x, kernel, recurrent, bias, params, state, valid), question.dh, question.dfinal)
    )
    assert all(np.isfinite(a).all() for a in found.values())


# What is refused


def wrong(place: int, change: Callable) -> Callable[[list], None]:
    def apply(arguments: list) -> None:
        arguments[place] = change(arguments[place])

    return apply


REFUSED: dict[str, tuple[Callable[[list], None], str]] = {
    "x of rank 2": (wrong(0, lambda a: a[0]), r"x: expected shape \(T, B, I\), got \(5, 3\)"),
    "kernel for other inputs": (
        wrong(1, lambda a: a[:-1]),
        r"^kernel: expected shape \(3, 36\), got \(2, 36\)",
    ),
    "kernel for other gates": (wrong(1, lambda a: a[:, :-1]), r"^kernel: .*\(3, 35\)"),
    "recurrent kernel of rank 1": (wrong(2, lambda a: a[0]), r"^recurrent_kernel: expected shape \(P, R H\)"),
    "recurrent kernel not H by G H": (wrong(2, lambda a: a[:, :-4]), "^recurrent_kernel: "),
    "bias of one gate": (wrong(3, lambda a: a[:9]), r"^bias: expected shape \(36,\), got \(9,\)"),
    "bias as a row": (wrong(3, lambda a: a[None]), "^bias: "),
    "no params": (wrong(4, lambda a: ()), r"^params: .*p_i.*got 0"),
    "a param too many": (wrong(4, lambda a: (*a, a[0])), r"^params: .*got 4"),
    "param for one unit": (wrong(4, lambda a: (a[0][:1], *a[1:])), r"^parameter p_i: expected shape \(9,\)"),
    "one state of two": (wrong(5, lambda a: a[:1]), r"^state: .*'c'.*got 1"),
    "three states of two": (wrong(5, lambda a: (*a, a[0])), r"^state: .*got 3"),
    "state for all rows": (
        wrong(5, lambda a: (a[0], a[1][:1])),
        r"^state c: expected shape \(5, 9\), got \(1, 9\)",
    ),
    "state without a batch": (wrong(5, lambda a: (a[0][0], a[1])), r"^state h: "),
    "valid, batch-major": (wrong(6, lambda a: a.T), r"^valid: expected shape \(4, 5\), got \(5, 4\)"),
}


@pytest.mark.parametrize("kernels", [sequence, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_shapes_refused(case: str, kernels) -> None:
    change, message = REFUSED[case]
    arguments = list(ask(zoo.peephole, 4, 5, 3, 9, "holes").cast("f").arguments)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        kernels.forward(zoo.peephole, *arguments, training=True)


@pytest.mark.parametrize("kernels", [sequence, reference], ids=["cpu", "reference"])
def test_upstream_gradients_refused(kernels) -> None:
    question = ask(cells.lstm(), 4, 5, 3, 9).cast("f")
    dh, (d_h, d_c) = question.dh, question.dfinal
    residual = question.forward(kernels, training=True).residual
    for given, final, message in (
        (dh[:3], (d_h, d_c), r"^dh: expected shape \(4, 5, 9\), got \(3, 5, 9\)"),
        (dh[:, :1], (d_h, d_c), "^dh: "),
        (dh, (d_h,), r"^dfinal: .*got 1"),
        (dh, (d_h, d_c, d_c), r"^dfinal: .*got 3"),
        (dh, (d_h, d_c[0]), r"^dfinal of c: expected shape \(5, 9\), got \(9,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.backward(residual, given, final)
    kernels.backward(residual, dh, (d_h, d_c))  # an error does not use it up


def test_a_residual_serves_once() -> None:
    question = ask(cells.lstm(), 4, 5, 3, 9).cast("f")
    residual = question.forward(training=True).residual
    sequence.backward(residual, question.dh, question.dfinal)
    with pytest.raises(ValueError, match="residual: a forward pass serves one backward pass"):
        sequence.backward(residual, question.dh, question.dfinal)


@pytest.mark.parametrize("empty", range(4), ids=["steps", "batch", "inputs", "units"])
def test_nothing_to_do_is_refused(empty: int) -> None:
    sizes = [n if k != empty else 0 for k, n in enumerate((4, 5, 3, 9))]
    T, B, I, H = sizes
    zeros = lambda *shape: np.zeros(shape, "f")
    with pytest.raises(ValueError, match="at least 1"):
        sequence.forward(
            cells.elman(), zeros(T, B, I), zeros(I, H), zeros(H, H), None, (), None, None, training=False
        )


# The choice of threads


@pytest.mark.parametrize("awake", [False, True])
def test_little_work_is_shared_with_helpers_that_are_awake(
    awake: bool, keep_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads.set_num_threads(2)
    monkeypatch.setattr(threads, "ready", lambda: awake)
    assert sequence._split(cells.lstm(), 20, 32, 1, 50) == (2 if awake else 1, False)
    assert sequence._split(cells.lstm(), 5, 32, 1, 50) == (1, False)


def test_the_choice_of_split(keep_threads: None) -> None:
    lstm = cells.lstm()
    threads.set_num_threads(4)
    assert sequence._split(lstm, 5, 4, 8, 16) == (1, False)  # too little to share
    assert sequence._split(lstm, 100, 64, 64, 128) == (4, False)
    assert sequence._split(lstm, 100, 64, 512, 1024) == (4, True)  # the weights outgrow a core's cache
    assert sequence._split(lstm, 100, 1, 512, 1024) == (4, True)
    threads.set_num_threads(1)
    assert sequence._split(lstm, 100, 64, 512, 1024) == (1, False)
    assert "lstm" in sequence.explain(cells.lstm(), 100, 64, 512, 1024)


def test_the_same_bits_whatever_the_number_of_threads(keep_threads: None) -> None:
    question = ask(cells.lstm(), 30, 32, 64, 128).cast("f")
    found = []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(answer(question))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
    right = question.cast("d").forward(reference, training=False)
    assert error(found[0]["h"], right.h) < 1e-5
