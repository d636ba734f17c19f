"""The persistent kernels in the emulator, forward and backward, against the float64 reference on operands rounded alike.

A value of h that lies near the middle between two bfloat16 numbers may be rounded to the other one, as gates are computed in
float32 here; what it then touches is off by half a unit of the operand's last place. So there are two bounds: all errors are
below MOST, half of them below TYPICAL, over the largest value of each array.
"""

from __future__ import annotations

import dataclasses
import math

import emulator
import numpy as np
import pytest
from emulator import Device, Hang, Misuse
from hosted import served
from questions import Question, answer, ask, assert_same_bits
from zoo import CELLS, FORMS

from numlstm.kernels import cells, reference
from numlstm.kernels.cuda.persistent import Plan, Sequences, choose, supports, table
from numlstm.kernels.cuda.persistent import sequence as module
from numlstm.kernels.cuda.persistent.emit import Options, forward_text
from numlstm.kernels.cuda.persistent.equations import inline
from numlstm.kernels.cuda.persistent.product import ABSENT, pack, unpack, words

PRECISIONS = ("bfloat16", "tf32", "float32")
MOST = {"bfloat16": 4e-3, "tf32": 5e-4, "float32": 1e-5}
TYPICAL = 1e-6
SERVED = {**CELLS, **FORMS, "lstm_zoneout": cells.zoneout(cells.lstm(peephole=True))}
NAN_WORD = np.array([ABSENT], np.uint32).view(np.float32)[0]  # a NaN that reads as a word not published yet


@pytest.fixture(autouse=True)
def reference_knows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle rounds operands to tf32 too: 11 binary digits, ties away from zero."""
    plain, check = reference.operand, reference.check_precision

    def operand(a: np.ndarray, precision: str) -> np.ndarray:
        if precision != "tf32":
            return plain(a, precision)
        return words(np.asarray(a, np.float32), "tf32", np).view(np.float32).reshape(a.shape).astype(a.dtype)

    monkeypatch.setattr(reference, "operand", operand)
    monkeypatch.setattr(reference, "check_precision", lambda p: None if p == "tf32" else check(p))


def compare(question: Question, found: dict[str, np.ndarray]) -> None:
    right = answer(question, reference)
    assert found.keys() == right.keys()
    for name, want in right.items():
        got = found[name]
        assert got.shape == want.shape and got.dtype == np.float32, name
        errors = np.abs(got - want) / max(np.max(np.abs(want)), 1e-3)
        assert np.max(errors) <= MOST[question.precision], f"{name}: {np.max(errors)}"
        assert np.median(errors) <= TYPICAL, f"{name}: median {np.median(errors)}"


def posed(cell, T, B, I, H, pattern="all", precision="bfloat16", masked="none", seed=0) -> Question:
    """A question with a recurrent mask, and upstream gradients of every state's sequence."""
    question = ask(cell, T, B, I, H, pattern, seed)
    draw = np.random.default_rng(seed + 1)
    shapes = {"step": (T, B, H), "sequence": (1, B, H), "number": (1, 1, 1)}
    if masked != "none":
        question.recurrent_mask = (draw.random(shapes[masked]) > 0.3) / 0.75
        question.recurrent_mask = question.recurrent_mask.astype("f").astype("d")
        question.dstates = tuple(
            draw.standard_normal((T, B, H)).astype("f").astype("d") for _ in cell.state[1:]
        )
    question.precision = precision
    return question


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SERVED)
def test_matches_reference(name: str, precision: str) -> None:
    """Every cell and precision, whole and with every option at once."""
    cell = SERVED[name]
    for question in (
        posed(cell, 3, 5, 4, 21, precision=precision),
        posed(cell, 4, 3, 2, 16, "holes", precision, "step", seed=1),
    ):
        compare(question, answer(question.cast("f"), served(sms=6)))


@pytest.mark.parametrize("masked", ["none", "step", "sequence", "number"])
@pytest.mark.parametrize("pattern", ["all", "holes", "lengths"])
@pytest.mark.parametrize("cell", [cells.lstm(), cells.zoneout(cells.gru())], ids=["lstm", "gru_zoneout"])
def test_masks_and_lengths(cell, pattern: str, masked: str) -> None:
    question = posed(cell, 4, 4, 3, 24, pattern, masked=masked, seed=2)
    if masked == "number":
        question.aux = tuple(np.full((1, 1, 1), 0.25) for _ in cell.aux)
    found = answer(question.cast("f"), served(sms=3))
    compare(question, found)
    if pattern != "all":  # the first row has no valid step
        state = question.cast("f").arguments[5]
        assert np.array_equal(found[f"final {cell.state[0]}"][0], state[0][0])
        assert (found["h"][:, 0] == state[0][0]).all()


# Units, rows of a tile, groups; loads in flight: one tile and chunk at a time takes the longest way through the text.
LAYOUTS = {
    "one block": (8, 8, 1, 16, 16),
    "pairs of loads": (8, 8, 2, 2, 2),
    "wide blocks": (32, 16, 1, 16, 16),
    "two tiles, one load each": (16, 16, 1, 1, 2),
    "three tiles": (16, 48, 1, 4, 4),
    "groups": (8, 16, 2, 2, 4),
}


def layout(cell, H: int, precision: str, name: str) -> Plan:
    U, tile, groups, in_flight, back = LAYOUTS[name]
    plan = choose(cell, tile * groups, H, precision=precision, sms=1000)
    assert isinstance(plan, Plan)
    from numlstm.kernels.cuda.persistent.plan import _layout

    made = _layout(cell, H, U, tile, groups, 1, precision)
    assert isinstance(made, Plan)
    return dataclasses.replace(made, in_flight=in_flight, back_in_flight=back)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layout(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, H = cells.lstm(peephole=True), 70 if precision == "bfloat16" else 37
    plan = layout(cell, H, precision, name)
    monkeypatch.setattr(module, "choose", lambda *_, **__: plan)
    question = posed(cell, 2, plan.rows - 3, 2, H, "lengths", precision, "step")
    compare(question, answer(question.cast("f"), served(sms=100)))


@pytest.mark.parametrize("name", ["gru", "elman", "minimal", "wide"])
def test_gates_that_do_not_fill_a_tile(name: str) -> None:
    """One, two, three and seven recurrent gates: rows padded to 16, words of gradients one, two or four at a time."""
    for precision in ("bfloat16", "float32"):
        question = posed(CELLS[name], 3, 9, 3, 26, precision=precision, seed=3)
        compare(question, answer(question.cast("f"), served(sms=5)))


def test_any_order_of_warps_gives_the_same_bits() -> None:
    question = posed(cells.lstm(), 5, 10, 3, 32, "holes", masked="step").cast("f")
    first = answer(question, Sequences(Device(sms=8)))
    for seed in range(1, 7):
        device = Device(sms=8, seed=seed, hold=(0.0, 0.5, 0.9)[seed % 3])
        assert_same_bits(first, answer(question, Sequences(device)))


def test_options_that_are_absent() -> None:
    """No bias, no initial state, no upstream gradient of h; and inference gives training's bits."""
    question = posed(cells.lstm(), 3, 4, 3, 16)
    x, kernel, recurrent, _, params, _, _ = question.arguments
    question.arguments = (x, kernel, recurrent, None, params, None, None)
    question.dh = None
    found = answer(question.cast("f"), served())
    compare(question, found)
    assert "dbias" not in found
    assert "dx" not in answer(question.cast("f"), served(), need_dx=False)
    out = question.cast("f").forward(served(), training=False)
    assert out.residual is None and out.states is None
    assert np.array_equal(out.h, found["h"]) and np.array_equal(out.final[1], found["final c"])


def test_two_directions_in_one_launch() -> None:
    cell, device = cells.zoneout(cells.gru()), Device(sms=6)
    asked = [posed(cell, 3, 6, 4, 20, "lengths", masked="step", seed=s) for s in (4, 5)]
    places = lambda q: (
        (q.cell, *q.arguments),
        {"training": True, "aux": q.aux, "recurrent_mask": q.recurrent_mask},
    )
    sequences = Sequences(device)
    calls = [places(q.cast("f")) for q in asked]
    for _, options in calls:
        options["precision"] = "bfloat16"
    outs = sequences.forward_all(calls)
    back = [
        ((o.residual, q.dh, q.dfinal), {"dstates": q.dstates})
        for o, q in zip(outs, [a.cast("f") for a in asked], strict=True)
    ]
    gradients = sequences.backward_all(back)
    assert len(device.launches) == 2
    for q, out, g in zip(asked, outs, gradients, strict=True):
        named = {
            "h": out.h,
            "dx": g.x,
            "dkernel": g.kernel,
            "drecurrent": g.recurrent_kernel,
            "dbias": g.bias,
        }
        named |= {f"final {s}": a for s, a in zip(cell.state, out.final, strict=True)}
        named |= {f"d{s}": a for s, a in zip(cell.state, g.state, strict=True)}
        named |= {f"d{p}": a for p, a in zip(cell.params, g.params, strict=True)}
        compare(q, named)


def test_sequences_that_do_not_fit_together_run_one_after_another() -> None:
    device = Device(sms=1)
    calls = [
        ((q.cell, *q.arguments), {"training": True, "precision": "bfloat16"})
        for q in (posed(cells.lstm(), 2, 3, 2, 20, seed=s).cast("f") for s in (0, 1))
    ]
    sequences = Sequences(device)
    outs = sequences.forward_all(calls)
    assert len(device.launches) == 2
    sequences.backward_all([((o.residual, o.h, (None, None)), {}) for o in outs])
    assert len(device.launches) == 4
    with pytest.raises(ValueError, match="has had it"):
        sequences.backward(outs[0].residual, outs[0].h, (None, None))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_travels_and_never_hangs(precision: str) -> None:
    """In x and in h0, also the NaN whose bits say "not published": rows without one are as they were."""
    question = posed(cells.elman("relu"), 4, 6, 3, 20, precision=precision)
    clean = answer(question.cast("f"), served())
    poisoned = question.cast("f")
    poisoned.arguments[0][1, 2, 0] = NAN_WORD
    poisoned.arguments[5][0][4, 3] = NAN_WORD
    found = answer(poisoned, served())
    bad = np.isnan(found["h"])
    assert bad[1:, 2].all() and not bad[0, 2].any()
    assert bad[:, 4].all()
    rest = [0, 1, 3, 5]
    assert np.array_equal(found["h"][:, rest], clean["h"][:, rest])
    assert np.array_equal(found["dx"][:, rest], clean["dx"][:, rest])
    assert np.isnan(found["dkernel"]).any() and np.isnan(found["drecurrent"]).all()


class Losing(emulator.Device):
    """A device that loses the words of one block's one step: what a block that is not resident would do to the others."""

    def __init__(self, step: int, **options) -> None:
        super().__init__(**options)
        self.step = step

    def launch(self, text, arguments, grid, warps, shared, label, look):
        if "forward" in label:
            text = text.replace(
                "if step + 1 < T:", f"if step + 1 < T and not (block == 1 and step + 1 == {self.step}):", 1
            )
        super().launch(text, arguments, grid, warps, shared, label, look)


def test_spins_are_bounded_and_the_error_names_step_and_block() -> None:
    question = posed(cells.lstm(), 5, 4, 3, 32).cast("f")
    with pytest.raises(
        RuntimeError, match=r"lstm forward: no progress at step 3 .*waited in vain.*blocks left"
    ):
        question.forward(Sequences(Losing(3, sms=2, patience=300), spins=200), training=True)
    with pytest.raises(Hang, match="wait for words that nobody publishes"):
        question.forward(Sequences(Losing(3, sms=2)), training=True)


def written(H: int = 16) -> tuple[str, Plan]:
    plan = choose(cells.lstm(), 8, H, precision="bfloat16", sms=2)
    assert isinstance(plan, Plan)
    return forward_text(cells.lstm(), plan, Options()), plan


class Changed(emulator.Device):
    """A device that runs a kernel with a line changed: the emulator must notice."""

    def __init__(self, old: str, new: str, **options) -> None:
        super().__init__(**options)
        self.change = old, new

    def launch(self, text, arguments, grid, warps, shared, label, look):
        assert self.change[0] in text
        super().launch(text.replace(*self.change), arguments, grid, warps, shared, label, look)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("red = step % 2 *", "red = step * 0 *", "without a barrier"),
        ("dead = cuda.syncthreads_or(failed)", "dead = 0", "shared memory"),
        ("leave(pool, p,", "leave(pool, p + 1,", "nothing has written"),
        ("load1(S0, ", "load1(S0, 100000 + ", "S0"),
        ("publish(F", "publish(F", None),
    ],
)
def test_the_emulator_notices(old: str, new: str, says: str | None) -> None:
    question = posed(cells.lstm(), 4, 8, 3, 64).cast("f")
    if says is None:  # room that was not filled with ABSENT
        device = Device(sms=4)
        device.launch = lambda text, arguments, *rest: Device.launch(  # type: ignore[method-assign]
            device, text, [(n, np.zeros_like(a) if n == "F" else a) for n, a in arguments], *rest
        )
        with pytest.raises(Misuse, match="published twice"):
            question.forward(Sequences(device), training=True)
        return
    with pytest.raises(Misuse, match=says):
        question.forward(Sequences(Changed(old, new, sms=4)), training=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("H", [21, 64])
def test_packing_round_trip(precision: str, H: int) -> None:
    """`unpack` finds what `pack` was given where the matrix instruction's figures have it, rounded, and zeros around it."""
    cell = cells.gru()
    plan = choose(cell, 8, H, precision=precision, sms=100)
    assert isinstance(plan, Plan)
    draw = np.random.default_rng(0)
    for back, shape in ((False, (plan.padded, plan.padded * 3)), (True, (plan.padded * 3, plan.padded))):
        weights = draw.standard_normal(shape).astype("f")
        found = unpack(plan, pack(plan, weights, np, back=back), np, back=back)
        K, columns = shape
        kept = found[:K, :, : columns // plan.blocks].reshape(K, -1)
        rounded = {"bfloat16": 2**-8, "tf32": 2**-11, "float32": 0.0}[precision]
        assert np.abs(kept - weights).max() <= rounded * np.abs(weights).max()
        assert not found[K:].any() and not found[:, :, columns // plan.blocks :].any()


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "softplus", "log"])
def test_functions_in_primitives(name: str) -> None:
    """Within 4e-6 of the float64 function, relative, and the right limits and NaN."""
    lines = inline(f"def f(x):\n    v0 = {name}(x)\n    return v0,\n", "p_")
    low, high = {"exp": (-80, 80), "log": (1e-3, 1e3)}.get(name, (-30, 30))
    x = np.concatenate([np.linspace(low, high, 4001), np.linspace(0.001, 0.5, 1001)]).astype("f")
    scope = {**emulator.NAMES, "p_x": x}
    with np.errstate(all="ignore"):
        exec("\n".join(lines.lines), scope)
        found = eval(lines.results[0], scope)
        want = reference.NAMES[name](x.astype("d"))
    absolute = 2e-7 if name in ("log", "tanh") else 0.0
    assert np.all(np.abs(found - want) <= 4e-6 * np.abs(want) + absolute)
    scope["p_x"] = np.array([np.inf, -np.inf, np.nan], "f")
    with np.errstate(all="ignore"):
        exec("\n".join(lines.lines), scope)
        found = eval(lines.results[0], scope)
    limits = {
        "exp": (math.inf, 0), "tanh": (1, -1), "sigmoid": (1, 0), "softplus": (math.inf, 0), "log": (math.inf, math.nan)
    }[name]  # fmt: skip
    assert np.array_equal(found, np.array([*limits, math.nan], "f"), equal_nan=True)


def test_supports_says_why_not() -> None:
    lstm = cells.lstm()
    ask_for = lambda cell, B, H, **k: supports(cell, 100, B, 64, H, sms=132, **k)
    assert ask_for(lstm, 32, 512, precision="bfloat16") is None
    assert ask_for(lstm, 1, 1024, precision="bfloat16") is None
    assert "stages" in ask_for(cells.gru(reset_after=False), 8, 64)
    assert "recurrent product" in ask_for(cells.indrnn(), 8, 64)
    assert "float64" in ask_for(lstm, 8, 64, dtype=np.dtype("d"))
    assert "float16" in ask_for(lstm, 8, 64, precision="float16")
    assert "7.5" in ask_for(lstm, 8, 64, capability=(7, 5))
    assert "does not fit on chip" in ask_for(lstm, 8, 2048, precision="bfloat16")
    assert "by the cost model" in ask_for(lstm, 64, 1024, precision="bfloat16")
    assert "nothing to compute" in supports(lstm, 0, 1, 1, 8, sms=132)
    lines = table(lstm, sizes=(256, 1024)).splitlines()
    assert len(lines) == 7 and "bfloat16" in lines[1] and "float32" in lines[-1]


def test_plans_stay_within_the_machine() -> None:
    for cell in (cells.lstm(), cells.gru(), cells.elman()):
        for H in (1, 8, 100, 256, 650, 1024):
            for B in (1, 7, 64, 200):
                for directions in (1, 2):
                    plan = choose(
                        cell,
                        B,
                        H,
                        precision="bfloat16",
                        sms=108,
                        shared_per_block=163 << 10,
                        directions=directions,
                    )
                    if isinstance(plan, str):
                        continue
                    assert plan.grid <= 108 and plan.rows >= B and plan.padded >= H
                    assert max(plan.shared, plan.back_shared) <= 163 << 10
                    assert (
                        plan.row_words * 2 >= plan.padded and plan.back_row_words * 2 >= plan.padded * plan.nh
                    )


def test_what_does_not_fit_is_refused() -> None:
    question = posed(cells.lstm(), 2, 2, 2, 64).cast("f")
    with pytest.raises(ValueError, match="does not fit on chip"):
        question.forward(Sequences(Device(sms=1)), training=True)
    question.precision = "float16"
    with pytest.raises(ValueError, match="precision"):
        question.forward(Sequences(Device()), training=True)
