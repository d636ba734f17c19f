"""Which way a sequence takes, and that it arrives: persistent kernels beside those of tier 0, each where it serves.

The persistent kernels run in their emulator (tests/gpu/emulator.py), beside tier 0 in Numba's simulator.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from questions import answer, ask, assert_same_bits, error
from zoo import CELLS, STAGED

import numlstm as nl
from numlstm.backend import get_backend, scalar, to_numpy
from numlstm.kernels import cells, reference
from numlstm.kernels.cuda import persistent, sequence, steps
from numlstm.kernels.cuda.device import SIMULATED, Simulator, current

sys.path.append(str(Path(__file__).parents[2] / "gpu"))

pytestmark = pytest.mark.skipif(not SIMULATED, reason="on a GPU tests/gpu/test_device.py has these questions")


@pytest.fixture
def chip(monkeypatch):
    """The simulator's device can run persistent kernels; gives the emulated one, where every plan that fits pays."""
    import emulator

    made = emulator.Device(sms=8)
    monkeypatch.setattr(Simulator, "persistent", True)
    monkeypatch.setattr(sequence, "_ON_CHIP", {})
    monkeypatch.setattr(persistent, "on_device", lambda index: persistent.Sequences(made))
    monkeypatch.setattr(persistent.plan, "per_step_costs", lambda plan, B: (1.0, 1.0))
    return made


def way(cell, B=2, H=8, dtype="float32", precision="float32", directions=1, P=None):
    return sequence.tier(cell, 3, B, 4, H, P or H, dtype, precision, directions=directions)


def test_the_simulator_takes_tier_0_and_says_so():
    assert way(cells.lstm()) == (
        "steps",
        f"a product and a fused kernel a step; {current().name} runs no persistent kernel",
    )
    assert sequence.dispatch_table(cells.lstm()) is None
    assert sequence._ON_CHIP == {}


def test_what_a_persistent_kernel_serves(chip):
    assert way(cells.lstm()) == ("persistent", "one launch for all steps, the recurrent weights on chip")
    assert way(cells.gru(), directions=2).why.startswith("one launch for all steps, 2 directions")
    refused = {
        "arrays of float64": way(cells.lstm(), dtype="float64"),
        "lstm projects its output": way(STAGED["lstm_projected"], P=4),
        "a cell of 2 stages": way(cells.gru(reset_after=False)),
        "does not fit on chip": way(cells.lstm(), H=2048),
    }
    for reason, found in refused.items():
        assert found.name == "steps" and reason in found.why


def test_what_does_not_pay_takes_tier_0(chip, monkeypatch):
    monkeypatch.setattr(persistent.plan, "per_step_costs", lambda plan, B: (0.0, 0.0))
    found = way(cells.lstm())
    assert found.name == "steps" and "by the cost model" in found.why


def test_an_old_card_takes_tier_0(chip, monkeypatch):
    monkeypatch.setattr(Simulator, "capability", (7, 5))
    found = way(cells.lstm(), precision="tf32")
    assert found.name == "steps" and "compute capability 7.5" in found.why and "tf32" in found.why


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_persistent_answers_through_the_dispatcher(chip, name, precision):
    question = ask(CELLS[name], 3, 2, 4, 8, "holes")
    question.precision = precision
    right, found = answer(question, reference), answer(question.cast("f"), sequence)
    assert chip.launches == [f"{question.cell.name} forward", f"{question.cell.name} backward"]
    bound = 1e-5 if precision == "float32" else 5e-3
    assert all(error(found[k], right[k]) <= bound for k in right)


def test_arrays_of_any_layout_and_type(chip):
    """What persistent kernels need of arrays is seen to: strided, or of other types, the same numbers give the same bits."""
    question = ask(CELLS["lstm"], 3, 2, 4, 8, "holes")
    plain = answer(question.cast("f"), sequence)
    x, kernel, recurrent, bias, params, state, valid = question.cast("f").arguments
    spread = lambda a: np.repeat(a, 2, axis=-1)[..., ::2]
    other = question.cast("f")
    other.arguments = (
        np.asfortranarray(x).astype("d"), np.asfortranarray(kernel), spread(recurrent), spread(bias), params,
        tuple(map(spread, state)), np.asfortranarray(valid),
    )  # fmt: skip
    other.dh = np.asfortranarray(other.dh)
    assert_same_bits(plain, answer(other, sequence))
    assert len(chip.launches) == 4


def pair(dtype="float32", precision="float32", **unlike):
    """The forward calls of two directions."""
    made = []
    for k in range(2):
        q = ask(CELLS["lstm"], 3, 2, 4, 8, seed=k).cast(dtype)
        names = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
        made.append(dict(zip(names, (q.cell, *q.arguments), strict=True)) | {"training": True})
    made[1] |= unlike
    return get_backend("cuda"), made


def gradients(backend, outs, upstream, need_dx=(True, True)):
    none = (None,) * 2
    return backend.sequence_backward_pair(
        [
            {"residual": o.residual, "dh": d, "dfinal": none, "need_dx": n}
            for o, d, n in zip(outs, upstream, need_dx, strict=True)
        ]
    )


def test_two_directions_are_one_launch(chip):
    backend, calls = pair()
    outs = backend.sequence_forward_pair(calls)
    dh = [np.ones_like(o.h) * (k + 1) for k, o in enumerate(outs)]
    found = gradients(backend, outs, dh, need_dx=(True, False))
    assert chip.launches == ["lstm forward", "lstm backward"]
    assert found[0].x is not None and found[1].x is None
    for call, out, d, g in zip(calls, outs, dh, found, strict=True):
        right = reference.forward(*(list(call.values())[:8]), training=True)
        wanted = reference.backward(right.residual, d, (None, None))
        assert error(out.h, right.h) <= 1e-5
        assert error(g.recurrent_kernel, wanted.recurrent_kernel) <= 2e-5


@pytest.mark.parametrize("used", [0, 1])
def test_one_direction_of_a_launch_alone(chip, used):
    """A loss that reads one direction only: the launch is differentiated whole, and the other's gradients are nobody's."""
    backend, calls = pair()
    d = np.random.default_rng(0).standard_normal((3, 2, 8)).astype("f")
    both = backend.sequence_forward_pair(calls)
    upstream = [d if k == used else np.zeros_like(d) for k in (0, 1)]
    right = gradients(backend, both, upstream)[used]
    alone = backend.sequence_forward_pair(calls)[used]
    found = backend.sequence_backward(alone.residual, d, (None, None))
    assert found.recurrent_kernel.tobytes() == right.recurrent_kernel.tobytes()
    assert found.x.tobytes() == right.x.tobytes()
    with pytest.raises(ValueError, match="has had it"):
        backend.sequence_backward(alone.residual, d, (None, None))


def test_directions_that_are_not_alike(chip):
    """A mask in one of them, or upstream gradients in one: launches of their own, or zeros where nothing came."""
    backend, calls = pair(valid=np.ones((3, 2), bool))
    outs = backend.sequence_forward_pair(calls)
    assert chip.launches == ["lstm forward"] * 2
    gradients(backend, outs, [np.ones_like(o.h) for o in outs])
    assert chip.launches[2:] == ["lstm backward"] * 2
    backend, calls = pair()
    outs = backend.sequence_forward_pair(calls)
    found = gradients(backend, outs, [np.ones_like(outs[0].h), None])
    assert found[0].kernel.any() and not found[1].kernel.any()


def test_float64_and_pieces_take_tier_0(chip):
    backend, calls = pair("float64")
    outs = backend.sequence_forward_pair(calls)
    assert all(o.residual[1].way is steps for o in outs)
    assert len(gradients(backend, outs, [np.ones_like(o.h) for o in outs])) == 2
    backend, (call, _) = pair()
    out = backend.sequence_forward(**call, remat_steps=2)
    assert backend.sequence_backward(out.residual, np.ones_like(out.h), (None, None)).x.shape == (3, 2, 4)
    assert chip.launches == []


def test_a_residual_serves_once(chip):
    question = ask(CELLS["lstm"], 2, 1, 2, 8).cast("f")
    out = question.forward(sequence, training=True)
    sequence.backward(out.residual, question.dh, question.dfinal)
    with pytest.raises(ValueError, match="has had it"):
        sequence.backward(out.residual, question.dh, question.dfinal)
    twice = question.forward(sequence, training=True).residual
    with pytest.raises(ValueError, match="came twice"):
        sequence.backward_all([((twice, question.dh, question.dfinal), {})] * 2)


def test_a_stuck_kernel_is_raised_where_results_reach_the_host(chip, monkeypatch):
    """Error words are looked at by `finish`; here as a GPU leaves them, after the launch."""
    said = []

    def finish():
        if said:
            raise RuntimeError(said.pop())

    monkeypatch.setattr(chip, "finish", finish)
    backend = get_backend("cuda")
    out = ask(CELLS["lstm"], 2, 1, 2, 8).cast("f").forward(sequence, training=False)
    assert backend.to_numpy(out.h) is out.h
    said.append("lstm forward: no progress at step 1")
    with pytest.raises(RuntimeError, match="no progress at step 1"):
        backend.to_numpy(out.h)
    backend.to_numpy(out.h)
    said.append("lstm backward: no progress")
    with pytest.raises(RuntimeError, match="lstm backward"):
        backend.finish()
    # Arrays that lie on the device, wherever they are read.
    place = type("Device", (), {"id": 0})()
    members = {"__module__": "cupy", "device": place, "get": lambda a: np.ones(1), "item": lambda a: 1.0}
    array = type("ndarray", (), members)()
    for read in (to_numpy, scalar):
        said.append("no progress")
        with pytest.raises(RuntimeError, match="no progress"):
            read(array)
        assert read(array) == 1


def test_a_device_without_packages_says_so(chip, monkeypatch):
    def missing(index):
        raise ImportError("persistent kernels need CuPy with cuBLAS, and numba-cuda")

    monkeypatch.setattr(persistent, "on_device", missing)
    with pytest.raises(ImportError, match="persistent kernels need"):
        way(cells.lstm())


def test_a_model_learns_by_persistent_kernels(chip):
    """Both directions, several steps of training: what tier 0 learns."""
    x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype("f")
    y = x.sum((1, 2))[:, None]
    found = {}
    for on in (True, False):
        Simulator.persistent = on  # put back by the fixture
        nl.set_seed(0)
        model = nl.Sequential([nl.Bidirectional(nl.LSTM(8), input_shape=(3, 5)), nl.Dense(1)])
        model.compile(optimizer="sgd", loss="mse", backend="cuda")
        history = model.fit(x, y, epochs=2, batch_size=4, verbose=0).history["loss"]
        found[on] = np.array(history), to_numpy(model.predict(x))
    assert chip.launches[:2] == ["lstm forward", "lstm backward"]
    for a, b in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


def test_explain_and_info_name_the_tier(chip):
    model = nl.Sequential(
        [
            nl.Bidirectional(nl.LSTM(8, return_sequences=True), input_shape=(3, 5)),
            nl.GRU(8, reset_after=False),
        ]
    )
    why = [row["why"] for row in nl.explain(model, backend="cuda", print_fn=lambda line: None)]
    assert all("tier 2, persistent: one launch for all steps, 2 directions" in w for w in why[:2])
    assert "tier 0: a product and 2 fused kernels a step; no persistent kernel: gru_before" in why[2]
    table = get_backend("cuda").dispatch_table()
    assert table.splitlines()[0].split()[:4] == ["H", "precision", "fits", "B"]
