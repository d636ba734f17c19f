"""The numbers in Keras 3's own tests of its recurrent layers, and Keras' recorded answers, from ours.

The numbers of the first part, and the questions they answer, are facts taken from keras-team/keras,
keras/src/layers/rnn/*_test.py and keras/src/layers/core/masking_test.py; each case names the file and the test. In
these tests all inputs count up from zero, and every kernel, recurrent kernel and bias is filled with one value each,
so that the units of a row come out equal and one number stands for a row; where the units start from different
states, all are written out.

The last part compares with keras.npz, which record_keras.py wrote with Keras 3.15.1: what those tests do not ask,
above all every gradient.

Keras itself is not needed. Ours must agree to 1e-5, on every backend and in single as in double precision: Keras'
numbers are single precision's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from keras_questions import ANSWERS, QUESTIONS, inputs, largest, ours

import numlstm as nl

BACKENDS = [("cpu", "float32"), ("reference", "float32"), ("reference", "float64")]
on_backends = pytest.mark.parametrize("backend, dtype", BACKENDS, ids=[f"{b}-{d}" for b, d in BACKENDS])


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def filled(kernel: float = 0.01, recurrent: float = 0.02, bias: float = 0.03) -> dict[str, Any]:
    """The initializers of nearly all of Keras' tests."""
    return {
        "kernel_initializer": nl.initializers.Constant(kernel),
        "recurrent_initializer": nl.initializers.Constant(recurrent),
        "bias_initializer": nl.initializers.Constant(bias),
    }


def agree(ours: Any, theirs: Any, units: int | None = None) -> None:
    """Within 1e-5. `units`: theirs lack the last axis, along which all numbers are equal."""
    wanted = np.asarray(theirs, np.float64)
    if units is not None:
        wanted = np.repeat(wanted[..., None], units, axis=-1)
    found = np.asarray(ours)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


class Case(NamedTuple):
    """One question: a layer, run `calls` times over the ramp of shape `x`; the last answer counts.

    `states`: the initial states. `answer`: one number for each row (or step), or all of them (`whole`).
    """

    source: str
    layer: type
    units: int
    options: dict[str, Any]
    x: tuple[int, int, int]
    answer: Any
    mask: Any = None
    states: Any = None
    calls: int = 1
    whole: bool = False

    @property
    def name(self) -> str:
        said = [f"{k}={v}" for k, v in self.options.items()] + (["mask"] if self.mask is not None else [])
        return "-".join([self.layer.__name__, self.source.split("::")[1], *said])


LONG, SHORT, WIDE = (3, 6, 4), (2, 4, 3), (2, 3, 4)
BACK, SEQUENCE, BEFORE = {"go_backwards": True}, {"return_sequences": True}, {"reset_after": False}
ZEROED = {"return_sequences": True, "zero_output_for_mask": True}
LENGTHS = [[True, True, True, False], [True, True, False, False]]
HOLES = [[True, True, False, True], [True, False, False, True]]
H0, H0_WIDE = ramp(2, 2), ramp(2, 4)  # states to begin with

LSTM, GRU, ELMAN = "lstm_test.py", "gru_test.py", "simple_rnn_test.py"
CASES = [
    Case(f"{LSTM}::test_correctness", nl.LSTM, 3, {}, LONG, [0.6288687, 0.86899155, 0.9460773]),
    Case(f"{LSTM}::test_correctness", nl.LSTM, 3, BACK, LONG, [0.35622165, 0.74789524, 0.8872726]),
    Case(
        f"{LSTM}::test_correctness", nl.LSTM, 3, {"unit_forget_bias": False}, LONG,
        [0.57019705, 0.8661914, 0.9459622],
    ),
    Case(
        f"{LSTM}::test_correctness", nl.LSTM, 3, {"use_bias": False}, LONG,
        [0.54986924, 0.86226785, 0.9443936],
    ),
    Case(
        f"{LSTM}::test_statefulness", nl.LSTM, 4, {"stateful": True}, WIDE, [0.3124785, 0.6863672], calls=2
    ),
    Case(
        f"{LSTM}::test_pass_initial_state", nl.LSTM, 2, {}, SHORT,
        [[0.20574439, 0.3558822], [0.64930826, 0.66276]], states=[H0, H0], whole=True,
    ),
    Case(
        f"{LSTM}::test_pass_initial_state", nl.LSTM, 2, BACK, SHORT,
        [[0.13281618, 0.2790356], [0.5839337, 0.5992567]], states=[H0, H0], whole=True,
    ),
    Case(f"{LSTM}::test_masking", nl.LSTM, 2, {}, SHORT, [0.11755939, 0.28556206], mask=LENGTHS),
    Case(
        f"{LSTM}::test_masking", nl.LSTM, 2, SEQUENCE, SHORT,
        [
            [0.01588910, 0.05552048, 0.11755939, 0.11755939],
            [0.14185596, 0.28556206, 0.28556206, 0.28556206],
        ],
        mask=LENGTHS,
    ),
    Case(
        f"{LSTM}::test_masking", nl.LSTM, 2, ZEROED, SHORT,
        [[0.01588910, 0.05552048, 0.11755939, 0.0], [0.14185596, 0.28556206, 0.0, 0.0]],
        mask=LENGTHS,
    ),
    Case(
        f"{LSTM}::test_masking", nl.LSTM, 2, BACK, SHORT, [0.15341201, 0.3844719],
        mask=[[False, True, True, True], [False, False, True, True]],
    ),
    Case(f"{GRU}::test_correctness", nl.GRU, 3, {}, LONG, [0.5217289, 0.6371659, 0.39384964]),
    Case(f"{GRU}::test_correctness", nl.GRU, 3, BACK, LONG, [0.24406259, 0.611516, 0.3928808]),
    Case(f"{GRU}::test_correctness", nl.GRU, 3, BEFORE, LONG, [0.51447755, 0.6426879, 0.40208298]),
    Case(
        f"{GRU}::test_correctness", nl.GRU, 3, {"use_bias": False}, LONG,
        [0.49988455, 0.64701194, 0.4103359],
    ),
    Case(
        f"{GRU}::test_statefulness", nl.GRU, 4, {"stateful": True}, WIDE, [0.29542392, 0.5885018], calls=2
    ),
    Case(
        f"{GRU}::test_pass_initial_state", nl.GRU, 2, {}, SHORT,
        [[0.23774096, 0.33508456], [0.83659905, 1.0227708]], states=H0, whole=True,
    ),
    Case(
        f"{GRU}::test_pass_initial_state", nl.GRU, 2, BACK, SHORT,
        [[0.13486053, 0.23261218], [0.78257304, 0.9691353]], states=H0, whole=True,
    ),
    Case(f"{GRU}::test_masking", nl.GRU, 2, {}, SHORT, [0.19393763, 0.30818558], mask=HOLES),
    Case(
        f"{GRU}::test_masking", nl.GRU, 2, SEQUENCE, SHORT,
        [
            [0.03606692, 0.09497581, 0.09497581, 0.19393763],
            [0.16051409, 0.16051409, 0.16051409, 0.30818558],
        ],
        mask=HOLES,
    ),
    Case(
        f"{GRU}::test_masking", nl.GRU, 2, ZEROED, SHORT,
        [[0.03606692, 0.09497581, 0.0, 0.19393763], [0.16051409, 0.0, 0.0, 0.30818558]],
        mask=HOLES,
    ),
    Case(f"{GRU}::test_masking", nl.GRU, 2, BACK, SHORT, [0.11669192, 0.28380975], mask=HOLES),
    Case(f"{ELMAN}::test_correctness", nl.SimpleRNN, 4, {}, WIDE, [0.405432, 0.73605347]),
    Case(f"{ELMAN}::test_correctness", nl.SimpleRNN, 4, BACK, WIDE, [0.11144729, 0.5528889]),
    Case(
        f"{ELMAN}::test_statefulness", nl.SimpleRNN, 4, {"stateful": True}, WIDE, [0.40559256, 0.7361247],
        calls=2,
    ),
    Case(
        f"{ELMAN}::test_pass_initial_state", nl.SimpleRNN, 4, {}, SHORT, [0.33621645, 0.6262637],
        states=H0_WIDE,
    ),
    Case(
        f"{ELMAN}::test_pass_initial_state", nl.SimpleRNN, 4, BACK, SHORT, [0.07344437, 0.43043602],
        states=H0_WIDE,
    ),
    Case(f"{ELMAN}::test_masking", nl.SimpleRNN, 4, {}, SHORT, [0.32951632, 0.61799484], mask=HOLES),
    Case(
        f"{ELMAN}::test_masking", nl.SimpleRNN, 2, SEQUENCE, SHORT,
        [[0.0599281, 0.15122814, 0.15122814, 0.32394567], [0.3969304, 0.3969304, 0.3969304, 0.608085]],
        mask=HOLES,
    ),
    Case(
        f"{ELMAN}::test_masking", nl.SimpleRNN, 2, ZEROED, SHORT,
        [[0.0599281, 0.15122814, 0.0, 0.32394567], [0.3969304, 0.0, 0.0, 0.608085]],
        mask=HOLES,
    ),
    Case(f"{ELMAN}::test_masking", nl.SimpleRNN, 4, BACK, SHORT, [0.07376196, 0.43645123], mask=HOLES),
]  # fmt: skip


@on_backends
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_recurrent_layer(case, backend, dtype):
    layer = case.layer(case.units, **filled(), **case.options, dtype=dtype)
    given = {k: v for k, v in {"mask": case.mask, "initial_state": case.states}.items() if v is not None}
    with nl.use_backend(backend):
        for _ in range(2 if layer.stateful else 1):  # Keras' tests ask again after forgetting the states
            layer.reset_state()  # Keras 3's name
            for _ in range(case.calls):
                output = layer(ramp(*case.x), **given)
            agree(output, case.answer, None if case.whole else case.units)


@on_backends
@pytest.mark.parametrize("case", [c for c in CASES if c.source == f"{GRU}::test_pass_initial_state"],
                         ids=lambda c: c.name)  # fmt: skip
def test_the_last_state_is_the_last_output(case, backend, dtype):
    """gru_test.py::test_pass_return_state."""
    layer = nl.GRU(case.units, **filled(), **case.options, return_state=True, dtype=dtype)
    with nl.use_backend(backend):
        output, state = layer(ramp(*case.x), initial_state=case.states)
    agree(output, case.answer)
    agree(state, case.answer)


# Both directions


def both(layer: nl.layers.Recurrent, x: tuple[int, ...], mode: Any = "concat", **given: Any) -> Any:
    backward = given.pop("backward_layer", None)
    return nl.Bidirectional(layer, mode, backward_layer=backward)(ramp(*x), **given)


FORWARD, BACKWARD = [0.39687276, 0.7237238], [0.10004295, 0.53391594]


@on_backends
def test_merge_modes(backend, dtype):
    """bidirectional_test.py::test_correctness."""
    rnn = nl.SimpleRNN(2, **filled(), dtype=dtype)
    backward = nl.SimpleRNN(2, **filled(0.03, 0.02, 0.01), go_backwards=True, dtype=dtype)
    gru = nl.GRU(2, **filled(), return_sequences=True, dtype=dtype)
    with nl.use_backend(backend):
        concatenated = both(rnn, WIDE)
        agree(concatenated[:, :2], FORWARD, 2)
        agree(concatenated[:, 2:], BACKWARD, 2)
        agree(both(rnn, WIDE, "ave"), [0.24845785, 0.6288199], 2)
        for output, wanted in zip(both(rnn, WIDE, None), (FORWARD, BACKWARD), strict=True):
            agree(output, wanted, 2)
        agree(both(rnn, WIDE, "mul", backward_layer=backward), [0.08374989, 0.6740834], 2)
        agree(
            both(gru, WIDE, "sum"),
            [[0.20937867, 0.34462988, 0.40290534], [0.59829646, 0.6734641, 0.6479671]],
            2,
        )


@on_backends
def test_both_directions_go_on_from_their_last_states(backend, dtype):
    """bidirectional_test.py::test_statefulness."""
    layer = nl.Bidirectional(nl.LSTM(2, **filled(), stateful=True, dtype=dtype))
    with nl.use_backend(backend):
        for _ in range(2):
            layer(ramp(*SHORT))
            output = layer(ramp(*SHORT))
            agree(output[:, :2], [0.26234663, 0.6137073], 2)
            agree(output[:, 2:], [0.16959146, 0.5381646], 2)
            layer.reset_state()


@on_backends
def test_both_directions_from_given_states(backend, dtype):
    """bidirectional_test.py::test_pass_initial_state."""
    with nl.use_backend(backend):
        output = both(
            nl.LSTM(2, **filled(), dtype=dtype), SHORT, initial_state=[H0 * k for k in (1, 2, 3, 4)]
        )
    agree(
        output,
        [[0.20794602, 0.4577124, 0.14046375, 0.48191673], [0.6682636, 0.6711909, 0.60943645, 0.60950446]],
    )


@on_backends
def test_both_directions_with_holes(backend, dtype):
    """bidirectional_test.py::test_masking."""
    with nl.use_backend(backend):
        output = both(nl.GRU(2, **filled(), dtype=dtype), SHORT, mask=HOLES)
    agree(output[:, :2], [0.19393763, 0.30818558], 2)
    agree(output[:, 2:], [0.11669192, 0.28380975], 2)


@on_backends
def test_the_last_states_of_both_directions(backend, dtype):
    """bidirectional_test.py::test_return_state."""
    with nl.use_backend(backend):
        output, *states = both(nl.LSTM(2, **filled(), return_state=True, dtype=dtype), SHORT)
    wanted = [
        [0.1990008, 0.52335435],
        [0.35567185, 1.0492687],
        [0.12659755, 0.44717982],
        [0.2501858, 0.941473],
    ]
    for state, numbers in zip(states, wanted, strict=True):
        agree(state, numbers, 2)
    agree(output[:, :2], wanted[0], 2)
    agree(output[:, 2:], wanted[2], 2)


@pytest.mark.parametrize("mode", ["concat", "ave", "mul", "sum", None])
@pytest.mark.parametrize("state", [True, False])
def test_shapes_are_known_beforehand(mode, state):
    """bidirectional_test.py::test_output_shape."""
    layer = nl.Bidirectional(nl.LSTM(2, return_state=state), mode)
    x = np.array([[[101, 202], [303, 404]]], np.float32)
    found, told = layer(x), layer.compute_output_shape(x.shape)
    if isinstance(told, list):
        assert [y.shape for y in found] == told
        assert len(told) == (2 if mode is None else 1) + 4 * state
    else:
        assert found.shape == told == ((1, 4) if mode == "concat" else (1, 2))


# Cells of one's own, and several layers in place of Keras' stacked cells


@nl.cell(gates=1, state=("h",))
def summing(a):
    """x kernel + h recurrent_kernel: OneStateRNNCell of rnn_test.py."""
    return a


def summed(units: int, dtype: str, **options: Any) -> nl.RNN:
    ones = {"kernel_initializer": "ones", "recurrent_initializer": "ones", "use_bias": False}
    return nl.RNN(summing, units, **ones, **options, dtype=dtype)


@on_backends
def test_a_cell_of_ones_own(backend, dtype):
    """rnn_test.py: test_forward_pass_single_state, test_passing_initial_state_single_state,
    test_statefulness_single_state, test_go_backwards."""
    ones = np.ones((1, 2, 3), np.float32)
    with nl.use_backend(backend):
        sequence, state = summed(2, dtype, return_sequences=True, return_state=True)(ones)
        agree(sequence, [[3.0, 9.0]], 2)
        agree(state, [9.0], 2)
        given = summed(2, dtype)(np.ones((2, 3, 2), np.float32), initial_state=np.ones((2, 2), np.float32))
        agree(given, [22.0, 22.0], 2)
        kept = summed(2, dtype, stateful=True)
        for wanted in (9.0, 45.0):
            agree(kept(ones), [wanted], 2)
        agree(summed(2, dtype, go_backwards=True)(ramp(*WIDE)), [202.0, 538.0], 2)
        kept = summed(2, dtype, stateful=True)
        kept(ramp(*WIDE))
        agree(kept(ramp(*WIDE)), [954.0, 3978.0], 2)


@on_backends
def test_two_cells_on_top_of_each_other(backend, dtype):
    """stacked_rnn_cells_test.py: test_correctness_single_state_stack, test_statefullness_single_state_stack."""
    with nl.use_backend(backend):
        hidden, below = summed(3, dtype, return_sequences=True, return_state=True)(ramp(*WIDE))
        sequence, above = summed(2, dtype, return_sequences=True, return_state=True)(hidden)
        agree(sequence, [[18.0, 156.0, 786.0], [162.0, 1020.0, 4386.0]], 2)
        agree(below, [158.0, 782.0], 3)
        agree(above, [786.0, 4386.0], 2)
        model = nl.Sequential(
            [summed(3, dtype, return_sequences=True, stateful=True), summed(2, dtype, stateful=True)]
        )
        model(ramp(*WIDE))
        agree(model(ramp(*WIDE)), [34092.0, 173196.0], 2)


# Layers about time steps


class MaskedDense(nl.layers.Layer):
    """A layer that wants the mask of its rows: the rows that are left out become zero."""

    supports_masking = True

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.units = units
        self.layer = dense(units, self.dtype)

    def call(self, inputs, mask=None):
        output = self.layer(inputs)
        return output if mask is None else output * mask[:, None]


def dense(units: int, dtype: Any) -> nl.Dense:
    constant = nl.initializers.Constant(0.01)
    return nl.Dense(units, kernel_initializer=constant, use_bias=False, dtype=dtype)


@on_backends
def test_time_distributed(backend, dtype):
    """time_distributed_test.py: test_correctness, test_masking."""
    x = ramp(3, 2, 4)
    mask = [[False, True], [True, False], [True, True]]
    with nl.use_backend(backend):
        plain = nl.TimeDistributed(dense(1, dtype), dtype=dtype)(x)
        masked = nl.TimeDistributed(MaskedDense(1, dtype=dtype), dtype=dtype)(x, mask=mask)
    agree(plain, [[0.06, 0.22], [0.38, 0.53999996], [0.7, 0.86]], 1)
    agree(masked, [[0.0, 0.22], [0.38, 0.0], [0.7, 0.86]], 1)
    assert np.array_equal(masked.mask, mask)


def test_time_distributed_refuses_a_mask_of_another_length():
    """time_distributed_test.py::test_mask_validation_with_mismatched_timesteps."""
    layer, x = nl.TimeDistributed(nl.Dense(5, activation="softmax")), np.zeros((4, 5, 3), np.float32)
    assert layer(x, mask=np.ones((4, 5), bool)).shape == (4, 5, 5)
    with pytest.raises(ValueError, match=r"mask: expected shape .* = \(4, 5\)"):
        layer(x, mask=np.ones((4, 6), bool))


def test_masking_makes_the_mask():
    """masking_test.py::test_masking_correctness."""
    x = np.array([[[0, 0], [1, 2], [0, 0]], [[2, 2], [0, 0], [2, 1]]], np.float32)
    wanted = [[False, True, False], [True, False, True]]
    output = nl.Masking(mask_value=0.0)(x)
    assert output.mask.tolist() == wanted
    lstm = nl.LSTM(1, **filled())
    np.testing.assert_array_equal(lstm(output).numpy(), lstm(x, mask=wanted).numpy())


# Recorded answers: outputs, last states, gradients


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(ANSWERS, allow_pickle=False) as stored:
        return dict(stored)


@pytest.mark.parametrize("q", QUESTIONS, ids=lambda q: q.name)
@on_backends
def test_recorded(recorded, q, backend, dtype):
    """Masks with holes and empty rows, given states, both GRUs, every merge mode."""
    wanted = {k.split("/")[1]: v for k, v in recorded.items() if k.startswith(f"{q.name}/")}
    with nl.use_backend(backend):
        found = ours(q, inputs(q), np.dtype(dtype).type)
    assert found.keys() == wanted.keys(), "keras.npz is stale: run tests/conformance/record_keras.py"
    errors = {name: largest(found[name], wanted[name]) for name in wanted}
    bound = 1e-6 if dtype == "float64" else 1e-5  # the answers were rounded to single precision
    assert max(errors.values()) <= bound, {k: f"{v:.1e}" for k, v in errors.items()}
