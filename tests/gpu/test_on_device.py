"""On a CUDA device, through the backend: cells, options and precisions by both ways of running a sequence, the gradient
matrix, arrays of other libraries, memory that runs out, and models that learn.

`make test` leaves these out; `pytest -m gpu` runs them where a device is, and skips them with the reason elsewhere. With
NUMBA_ENABLE_CUDASIM=1 those that need no device run in Numba's simulator, on smaller shapes: ../kernels/test_simulator.py
does that, so that what is asked here is known to be right before a device answers.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questions import Question, answer, ask, assert_same_bits
from zoo import CELLS, FORMS, STAGED

import numlstm as nl
from numlstm.backend import cuda, get_backend, place_of, to_numpy, use_backend
from numlstm.kernels import cells, reference

sys.path.append(str(Path(__file__).parent.parent / "gradients"))

REASON = cuda.unavailable()
SIMULATED = cuda.simulated()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=f"no CUDA device can be used: {REASON}"),
]
needs_device = pytest.mark.skipif(SIMULATED, reason="the simulator's arrays are NumPy's")

ALL = {
    **CELLS,
    **FORMS,
    **STAGED,
    "lstm_zoneout": cells.zoneout(cells.lstm(peephole=True)),
    "indrnn": cells.indrnn("tanh"),
}
# Of the largest value of each array: the most, and the median. An operand near the middle between two of its precision's
# numbers may be rounded to the other one here; cuBLAS may drop the digits that tf32 lacks instead of rounding them.
MOST = {"float32": 1e-5, "tf32": 4e-3, "bfloat16": 1e-2, "float64": 1e-10}
TYPICAL = {"float32": 1e-6, "tf32": 4e-4, "bfloat16": 1e-3, "float64": 1e-12}
SHAPE = (3, 2, 3, 5) if SIMULATED else (9, 20, 12, 72)  # T, B, I, H
FEW = ["lstm", "gru", "elman", "minimal", "lstm_zoneout"]
WAYS = ["steps", "persistent"]


class Through:
    """The backend's sequences as the modules of kernels are: NumPy arrays in and out."""

    def __init__(self, name: str = "cuda", precision: str = "float32") -> None:
        with use_backend(name, precision=precision) as backend:
            self.backend = backend

    def _up(self, a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(map(self._up, a))
        return self.backend.asarray(a) if isinstance(a, np.ndarray) else a

    def _down(self, a: Any) -> Any:
        if isinstance(a, tuple):
            parts = map(self._down, a)
            return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
        return self.backend.to_numpy(a) if hasattr(a, "shape") else a

    def forward(self, *places: Any, precision: str = "float32", **options: Any) -> Any:
        assert precision == self.backend.precision
        names = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
        given = dict(zip(names, places, strict=True)) | options
        out = self.backend.sequence_forward(**{k: self._up(v) for k, v in given.items()})
        return self._down(out._replace(residual=None))._replace(residual=out.residual)

    def backward(self, residual: Any, dh: Any, dfinal: Any, **options: Any) -> Any:
        given = {k: self._up(v) for k, v in options.items()}
        return self._down(self.backend.sequence_backward(residual, self._up(dh), self._up(dfinal), **given))


@pytest.fixture
def by(monkeypatch):
    """by(way) makes sequences go that way where they can: every plan that fits pays, or none is asked for."""

    def choose(way: str) -> None:
        from numlstm.kernels.cuda import device
        from numlstm.kernels.cuda.persistent import plan

        if way == "steps":
            monkeypatch.setattr(device.Gpu, "persistent", False)
        elif SIMULATED:
            pytest.skip("persistent kernels are inline PTX; their emulator's tests are test_persistent.py")
        else:
            monkeypatch.setattr(plan, "per_step_costs", lambda plan, B: (1.0, 1.0))

    return choose


def taken(question: Question, way: str) -> None:
    """The question goes that way; a cell that no persistent kernel serves is skipped, with the reason."""
    from numlstm.kernels.cuda import sequence

    (T, B, I), P = question.arguments[0].shape, question.dh.shape[2]
    H = question.arguments[1].shape[1] // len(question.cell.gates)
    with get_backend("cuda").current():
        found = sequence.tier(question.cell, T, B, I, H, P, "float32", question.precision)
    if found.name != way:
        assert way == "persistent"
        one_product = len(question.cell.stages) == 1 and question.cell.stages[0].h_gates
        assert not one_product, f"no persistent kernel: {found.why}"
        pytest.skip(found.why)


def posed(
    name: str, pattern: str = "all", masked: str = "none", precision: str = "float32", seed: int = 0
) -> Question:
    """A question with gradients from every state's sequence, and a mask on the recurrence."""
    T, B, I, H = SHAPE
    question = ask(ALL[name], T, B, I, H, pattern, seed)
    draw, P = np.random.default_rng([seed, 7]), question.dh.shape[2]
    single = lambda a: a.astype("f").astype("d")
    question.precision = precision
    if masked != "none":
        shape = {"step": (T, B, P), "sequence": (1, B, P), "number": (1, 1, 1)}[masked]
        question.recurrent_mask = single((draw.random(shape) > 0.3) / 0.75)
        question.dstates = tuple(single(draw.standard_normal((T, B, H))) for _ in question.cell.state[1:])
    return question


def compare(found: dict[str, np.ndarray], right: dict[str, np.ndarray], precision: str) -> None:
    assert found.keys() == right.keys()
    for name, want in right.items():
        got = found[name]
        assert got.shape == want.shape, name
        if not want.size:
            continue
        errors = np.abs(got.astype("d") - want) / max(np.max(np.abs(want)), 1e-3)
        assert np.max(errors) <= MOST[precision], f"{name}: {np.max(errors)}"
        assert np.median(errors) <= TYPICAL[precision], f"{name}: median {np.median(errors)}"


# ---------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_every_cell(by, name, way):
    """Whole, and with every option at once."""
    by(way)
    for question in (posed(name), posed(name, "holes", "none" if name == "indrnn" else "step", seed=1)):
        taken(question, way)
        compare(answer(question.cast("f"), Through()), answer(question, reference), "float32")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("name", FEW)
def test_every_precision(by, name, precision, way):
    by(way)
    for question in (posed(name, precision=precision), posed(name, "lengths", "sequence", precision, seed=2)):
        taken(question, way)
        compare(
            answer(question.cast("f"), Through(precision=precision)), answer(question, reference), precision
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", ["none", "step", "sequence", "number"])
@pytest.mark.parametrize("pattern", ["all", "holes", "lengths"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_masks_and_lengths(by, name, pattern, masked, way):
    by(way)
    question = posed(name, pattern, masked, seed=3)
    taken(question, way)
    found = answer(question.cast("f"), Through())
    compare(found, answer(question, reference), "float32")
    if pattern != "all":  # the first row has no valid step
        assert np.array_equal(found["final h"][0], question.cast("f").arguments[5][0][0])


@pytest.mark.parametrize("name", ["lstm", "gru_before_normalized", "lstm_projected"])
def test_float64(name):
    question = posed(name, "holes", "step")
    compare(answer(question, Through()), answer(question, reference), "float64")


@pytest.mark.parametrize("way", WAYS)
def test_pieces_that_are_computed_again(by, way):
    by(way)
    question = posed("lstm", "holes").cast("f")
    names = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
    device = Through()
    call = {k: device._up(v) for k, v in zip(names, (question.cell, *question.arguments), strict=True)}
    out = device.backend.sequence_forward(**call, training=True, remat_steps=2)
    found = device.backend.sequence_backward(
        out.residual, device._up(question.dh), device._up(question.dfinal)
    )
    right = answer(posed("lstm", "holes"), reference)
    compare(
        {"dx": to_numpy(found.x), "dkernel": to_numpy(found.kernel)},
        {k: right[k] for k in ("dx", "dkernel")},
        "float32",
    )


@pytest.mark.parametrize("way", WAYS)
def test_two_directions_at_once(by, way):
    by(way)
    device, questions = Through(), [posed("lstm", seed=k) for k in (0, 1)]
    taken(questions[0], way)
    names = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
    calls = [
        {k: device._up(v) for k, v in zip(names, (q.cell, *q.cast("f").arguments), strict=True)}
        | {"training": True}
        for q in questions
    ]
    outs = device.backend.sequence_forward_pair(calls)
    asked = [
        {"residual": o.residual, "dh": device._up(q.cast("f").dh), "dfinal": device._up(q.cast("f").dfinal)}
        for o, q in zip(outs, questions, strict=True)
    ]
    found = device.backend.sequence_backward_pair(asked)
    for q, out, g in zip(questions, outs, found, strict=True):
        right = answer(q, reference)
        got = {"h": out.h, "dx": g.x, "dkernel": g.kernel, "drecurrent": g.recurrent_kernel, "dbias": g.bias}
        compare({k: to_numpy(a) for k, a in got.items()}, {k: right[k] for k in got}, "float32")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_same_question_same_bits(by, precision, way):
    by(way)
    question = posed("lstm", "holes", "step", precision).cast("f")
    taken(question, way)
    device = Through(precision=precision)
    first = answer(question, device)
    for _ in range(1 if SIMULATED else 20):
        assert_same_bits(first, answer(question, device))


@needs_device
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize(("T", "B", "H"), [(50, 1, 256), (50, 16, 512), (40, 64, 1024), (30, 100, 650)])
def test_sizes_that_are_shipped(precision, T, B, H):
    """Whichever way the dispatcher takes; the recurrence is kept calm, so that differences do not grow with the steps."""
    question = ask(cells.lstm(), T, B, 64, H, spread=0.5)
    question.precision = precision
    compare(answer(question.cast("f"), Through(precision=precision)), answer(question, reference), precision)


# ---------------------------------------------------------------------------------------------- gradients


@needs_device  # the simulator's rows are tests/gradients/test_cuda_column.py
def test_the_gradient_matrix():
    """Every row of tests/gradients that asks the backend for operations, at any size: float32 here, float64 on the host."""
    from cuda_column import LAYERS, errors
    from test_gradient_matrix import CASES, layer_question

    rows = {q.row: errors(q) for q in (layer_question(c) for c in CASES if c.layer in LAYERS)}
    assert len(rows) > 100
    wrong = {row: e for row, e in rows.items() if not all(v <= 2e-5 for v in e.values())}
    assert not wrong, wrong  # a NaN is not <=


# ---------------------------------------------------------------------------------------------- arrays, memory, devices


@needs_device
def test_torch_tensors_are_taken_without_a_copy():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    backend = get_backend("cuda")
    tensor = torch.arange(6, dtype=torch.float32, device="cuda").reshape(2, 3)
    array = backend.asarray(tensor)
    assert array.data.ptr == tensor.data_ptr() and place_of(array) == "cuda:0"
    array *= 2
    back = torch.from_dlpack(array)
    assert back.data_ptr() == tensor.data_ptr() and back[1, 2].item() == 10.0
    wanted = tensor.clone().requires_grad_(True)
    assert backend.asarray(wanted).data.ptr == wanted.data_ptr()


def model(seed: int = 0, **options: Any) -> Any:
    nl.set_seed(seed)
    T, _, I, H = SHAPE
    made = nl.Sequential([nl.Bidirectional(nl.LSTM(H, dropout=0.1), input_shape=(T, I)), nl.Dense(1)])
    made.compile(optimizer="adam", loss="mse", backend="cuda", **options)
    return made


def data(rows: int = 4 if SIMULATED else 64) -> tuple[np.ndarray, np.ndarray]:
    T, _, I, _ = SHAPE
    x = np.random.default_rng(0).standard_normal((rows, T, I)).astype("f")
    return x, x.sum((1, 2))[:, None] / 10


@needs_device
def test_out_of_memory_leaves_the_model_usable():
    x, y = data()
    made = model()
    made.fit(x, y, epochs=1, verbose=0)
    before = made.predict(x)
    backend = get_backend("cuda")
    with backend.current():
        pool = backend.xp.get_default_memory_pool()
        gc.collect()
        pool.free_all_blocks()
        limit = pool.get_limit()
        try:
            pool.set_limit(size=pool.used_bytes() + (64 << 20))
            T, _, I, _ = SHAPE
            many = np.zeros((64, 200 * T, I), "f")
            with pytest.raises(MemoryError, match="out of memory"), use_backend("cuda"):
                nl.LSTM(1024, return_sequences=True)(backend.asarray(many))
        finally:
            pool.set_limit(size=limit)
    assert np.array_equal(made.predict(x), before)
    made.fit(x, y, epochs=1, verbose=0)


@needs_device
def test_a_second_device():
    if reason := cuda.unavailable(1):
        pytest.skip(reason)
    question = posed("lstm", "holes", "step")
    compare(answer(question.cast("f"), Through("cuda:1")), answer(question, reference), "float32")
    x, _ = data()
    with use_backend("cuda:1") as backend:
        assert place_of(nl.LSTM(8)(backend.asarray(x)).data) == "cuda:1"


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_learns_and_gives_what_it_was_given(by, precision, way):
    by(way)
    x, y = data()
    found = []
    for _ in range(2):  # the same seed, the same bits
        made = model(precision=precision)
        losses = made.fit(x, y, epochs=2 if SIMULATED else 10, batch_size=len(x) // 2, verbose=0).history[
            "loss"
        ]
        found.append((losses, made.predict(x), made.get_weights()))
    (first, out, weights), (again, out_again, weights_again) = found
    assert first[-1] < first[0]
    assert first == again and out.tobytes() == out_again.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(weights, weights_again, strict=True))
    assert type(out) is np.ndarray
    backend = get_backend("cuda")
    given = made.predict(backend.asarray(x))
    assert type(given) is backend.xp.ndarray
    np.testing.assert_array_equal(to_numpy(given), out)


def test_what_a_model_learns_is_what_the_host_learns():
    """Whichever way the dispatcher takes."""
    x, y = data()
    found = {}
    for name in ("cuda", "reference"):
        made = model()
        made.compile(optimizer="sgd", loss="mse", backend=name)
        found[name] = made.fit(x, y, epochs=2, batch_size=len(x) // 2, shuffle=False, verbose=0).history[
            "loss"
        ]
    np.testing.assert_allclose(found["cuda"], found["reference"], rtol=1e-4)


@needs_device
def test_explain_and_the_table_name_the_ways():
    assert importlib.util.find_spec("cupy") is not None
    (row,) = nl.explain(
        nl.Sequential([nl.LSTM(512, input_shape=(None, 64))]), backend="cuda", print_fn=lambda line: None
    )
    assert "tier 2, persistent" in row["why"] or "no persistent kernel" in row["why"]
    table = get_backend("cuda").dispatch_table()
    assert table is None or "fits B" in table
