"""Stacks stepped through in one native call: what the reference gives for the whole sequence, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import zoo

from numlstm.kernels import cells, reference
from numlstm.kernels.cpu import quantized, sequence
from numlstm.kernels.cpu.stream import Stack
from numlstm.kernels.int8 import Quantized
from numlstm.kernels.rounding import operand
from numlstm.kernels.stream import Activation, Lookup, Masking, Normalization, Recurrence, Softmax, dense

T = 6
CELLS = {
    "lstm": cells.lstm(),
    "gru": cells.gru(),
    "gru_before": zoo.STAGED["gru_before"],
    "projected": zoo.STAGED["lstm_normalized_projected_peephole"],
    "zoneout": cells.zoneout(cells.lstm()),
}


def draw(*shape: int, scale: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * scale).astype(np.float32)


def recurrence(cell, I: int, H: int, Q: int) -> Recurrence:
    """A layer of random weights; Q outputs if the cell projects."""
    Q = Q if cell.projects else H
    return Recurrence(
        cell, draw(I, len(cell.gates) * H), draw(Q, len(cell.recurrent) * H), draw(len(cell.gates) * H),
        tuple(draw(H + k) [:H] for k in range(len(cell.params))), draw(H, Q) if cell.projects else None,
        tuple(np.full((1, 1, 1), 0.2, np.float32) for _ in cell.aux),
    )  # fmt: skip


def whole(step: Recurrence, x: np.ndarray, valid: np.ndarray | None = None):
    """The reference on the whole sequence, in float64."""
    wide = lambda a: None if a is None else np.asarray(a, np.float64)
    return reference.forward(
        step.cell, wide(x), wide(step.kernel), wide(step.recurrent_kernel), wide(step.bias),
        tuple(map(wide, step.params)), None, valid, training=False, aux=tuple(map(wide, step.aux)),
        projection=wide(step.projection),
    )  # fmt: skip


def run(stack: Stack, x: np.ndarray) -> np.ndarray:
    out = []
    for row in x:
        stack.x[...] = row
        stack.run()
        out.append(stack.y.copy())
    return np.stack(out)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, batch: int) -> None:
    x, step = draw(T, batch, 5), recurrence(CELLS[name], 5, 37, 11)
    stack, expected = Stack([step], batch, 5), whole(step, x)
    np.testing.assert_allclose(run(stack, x), expected.h, rtol=1e-5, atol=1e-6)
    for state, last in zip(stack.states[0], expected.final, strict=True):
        np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "gru_before"])
def test_a_masked_row_keeps_its_states(name: str) -> None:
    x, step, valid = (
        draw(T, 3, 5),
        recurrence(CELLS[name], 5, 37, 11),
        np.arange(3 * T).reshape(T, 3) % 4 != 1,
    )
    stack = Stack([step], 3, 5, masked=True)
    for t, expected in enumerate(whole(step, x, valid).h):
        stack.x[...], stack.valid[...] = x[t], valid[t]
        stack.run()
        np.testing.assert_allclose(stack.y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_deep_stack(batch: int) -> None:
    """Two cells of widths that are no multiple of a vector, normalised between, and a softmax at the end."""
    first, second = recurrence(CELLS["lstm"], 5, 37, 0), recurrence(CELLS["gru"], 37, 21, 0)
    gamma, beta, last, bias = draw(37) + 1, draw(37), draw(21, 70), draw(70)
    steps = [first, Normalization(gamma, beta, 1e-2), second, dense(last, bias), Softmax()]
    x = draw(T, batch, 5)
    y = whole(first, x).h
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-2) * gamma + beta
    y = np.exp(whole(second, y).h @ last + bias)
    np.testing.assert_allclose(
        run(Stack(steps, batch, 5), x), y / y.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6
    )


def reduced(step: Recurrence, kind: str) -> Recurrence:
    """The layer in bfloat16, or its matrices in eight bits."""
    if kind == "bfloat16":
        return step._replace(precision=kind)
    names = ("kernel", "recurrent_kernel", "projection")
    matrices = {name: getattr(step, name) for name in names}
    return step._replace(**{name: None if m is None else Quantized.of(m) for name, m in matrices.items()})


def predicted(step: Recurrence, kind: str, x: np.ndarray, valid: np.ndarray | None = None):
    """The whole sequence by the kernel that serves `predict`."""
    kernels, options = (quantized, {}) if kind == "int8" else (sequence, {"precision": kind})
    return kernels.forward(
        step.cell, x, step.kernel, step.recurrent_kernel, step.bias, step.params, None, valid, training=False,
        aux=step.aux, projection=step.projection, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_reduced_precision_gives_the_bits_of_a_whole_sequence(name: str, batch: int, kind: str) -> None:
    """An odd number of inputs and of units; some steps masked in the larger batch."""
    x, step = draw(T, batch, 5), reduced(recurrence(CELLS[name], 5, 37, 11), kind)
    valid = np.arange(batch * T).reshape(T, batch) % 4 != 1 if batch > 1 else None
    stack, expected = Stack([step], batch, 5, masked=batch > 1), predicted(step, kind, x, valid)
    for t in range(T):
        if valid is not None:
            stack.valid[...] = valid[t]
        np.testing.assert_array_equal(run(stack, x[t : t + 1])[0], expected.h[t])
    for state, last in zip(stack.states[0], expected.final, strict=True):
        np.testing.assert_array_equal(state, last)
    assert np.abs(expected.h - whole(recurrence(CELLS[name], 5, 37, 11), x, valid).h).max() > 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_deep_stack_of_reduced_precision(kind: str) -> None:
    first, second = (
        reduced(recurrence(CELLS[n], i, h, 0), kind) for n, i, h in (("lstm", 5, 37), ("gru", 37, 21))
    )
    last, bias = draw(21, 70), draw(70)
    matrix = Quantized.of(last) if kind == "int8" else last
    steps = [first, second, dense(matrix, bias, "tanh", "float32" if kind == "int8" else kind)]
    x = draw(T, 3, 5)
    y = predicted(second, kind, predicted(first, kind, x).h).h
    y = np.tanh(y @ matrix + bias if kind == "int8" else operand(y, kind) @ operand(last, kind) + bias)
    stack = Stack(steps, 3, 5)
    np.testing.assert_allclose(run(stack, x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_step_allocates_nothing(kind: str) -> None:
    step = recurrence(CELLS["lstm"], 5, 37, 0)
    stack = Stack([step if kind == "float32" else reduced(step, kind)], 3, 5)
    stack.run()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            stack.run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before < 512  # bytes: of Python's own call, none of 3 x 37 floats


def test_states_can_be_written_and_rows_do_not_touch_each_other() -> None:
    x, step = draw(T, 3, 5), recurrence(CELLS["gru_before"], 5, 37, 0)
    stack = Stack([step], 3, 5)
    before = run(stack, x)
    stack.states[0][0][1] = 0  # row 1 begins again, the others go on
    x2 = draw(T + 1, 3, 5)[1:]
    again = run(stack, x2)
    np.testing.assert_array_equal(again[:, 1], run(Stack([step], 3, 5), x2)[:, 1])
    np.testing.assert_allclose(
        again[:, 0], whole(step, np.concatenate([x, x2])).h[T:, 0], rtol=1e-5, atol=1e-6
    )
    assert before.shape == (T, 3, 37)


def test_lookup_masks_zeros_for_all_that_follows() -> None:
    table, step, ids = (
        draw(9, 5),
        recurrence(CELLS["lstm"], 5, 37, 0),
        np.array([[1, 0, 8], [0, 0, 3], [4, 2, 0]]),
    )
    stack = Stack([Lookup(table, masks=True), step], 3)
    np.testing.assert_allclose(run(stack, ids), whole(step, table[ids], ids != 0).h, rtol=1e-5, atol=1e-6)
    assert stack.valid.tolist() == [True, True, False]
    assert np.array_equal(run(Stack([Lookup(table)], 3), ids), table[ids])


def test_masking() -> None:
    x, step = draw(T, 3, 19), recurrence(CELLS["lstm"], 19, 37, 0)
    x[1, 0], x[2, 1, :18], x[3] = 2, 2, 2
    valid = (x != 2).any(-1)
    stack = Stack([Masking(2.0), step], 3, 19)
    np.testing.assert_allclose(
        run(stack, x), whole(step, x * valid[..., None], valid).h, rtol=1e-5, atol=1e-6
    )
    nan = Stack([Masking(0.0)], 1, 2)
    assert (
        np.isnan(run(nan, np.array([[[np.nan, 0]]]))).any() and nan.valid.all()
    )  # NaN is a value like others
    both = Stack([Masking(2.0)], 3, 19, masked=True)
    both.valid[...] = False
    run(both, x[:1])
    assert not both.valid.any()  # what is masked stays so


@pytest.mark.parametrize(
    "steps", [[Activation("elu(alpha=0.5)")], [dense(np.eye(21, dtype="f"), None, "elu(alpha=0.5)")]]
)
def test_activations(steps) -> None:
    x = draw(2, 3, 21, scale=3)
    np.testing.assert_allclose(
        run(Stack(steps, 3, 21), x), np.where(x > 0, x, 0.5 * np.expm1(x)), rtol=1e-5, atol=1e-6
    )


def test_softmax_far_out() -> None:
    x = np.array([[[1000.0, 1000.0, -1000.0]], [[-2000.0, -2000.0, -np.inf]]])
    np.testing.assert_allclose(run(Stack([Softmax()], 1, 3), x)[:, 0], [[0.5, 0.5, 0]] * 2)
    logarithms = run(Stack([Softmax(logarithm=True)], 1, 3), x[:1])[0, 0]
    np.testing.assert_allclose(logarithms, [-np.log(2), -np.log(2), -2000 - np.log(2)], rtol=1e-6)


def test_a_stack_holds_on_to_all_that_its_plan_points_into() -> None:
    x = draw(T, 1, 5)
    expected = whole(recurrence(CELLS["gru"], 5, 37, 0), x).h
    stack = Stack([recurrence(CELLS["gru"], 5, 37, 0)], 1, 5)  # nobody else has these arrays
    rubbish = [np.full((5, 3 * 37), np.nan, np.float32) for _ in range(50)]
    np.testing.assert_allclose(run(stack, x), expected, rtol=1e-5, atol=1e-6)
    assert len(rubbish) == 50


def test_a_kernel_from_the_cache_has_an_address(tmp_path) -> None:
    """The second process calls what the first one compiled."""
    program = (
        "import numpy as np\nfrom numlstm.kernels.cpu.stream import Stack\nfrom numlstm.kernels.stream import Softmax\n"
        "stack = Stack([Softmax()], 1, 2)\nstack.run()\nprint(stack.y.tolist())"
    )
    environment = {**os.environ, "NUMLSTM_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[[0.5, 0.5]]"
        files = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.nbc")}
        assert len(files) == 2  # the driver and the softmax


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack([Softmax()], 0, 3), "batch of at least 1"),
        (lambda: Stack([Lookup(draw(3, 2))], 1, 3), "features unless it begins with a lookup"),
        (lambda: Stack([Softmax()], 1), "features unless it begins with a lookup"),
        (lambda: Stack([recurrence(CELLS["lstm"], 5, 37, 0)], 1, 4), "kernel: expected shape"),
        (lambda: Stack([Normalization(draw(3), None, 1e-3)], 1, 4), "weights of shape"),
        (lambda: Stack([object()], 1, 4), "object is no step"),
    ],
)
def test_what_does_not_fit(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
