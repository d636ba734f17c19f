"""The derivation: what can be traced, what it says when something can't, and that it changes no value."""

from __future__ import annotations

import inspect
import math
import operator
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import zoo
from numba import njit
from numpy.testing import assert_allclose

from numlstm.kernels import cells, derive, reference
from numlstm.kernels.derive import ACTIVATIONS, LANGUAGE, Cell, TraceError, cell

DEAR_CALLS = ("exp(", "log(", "sqrt(", "tanh(", "sigmoid(", "softplus(")


EVERY = zoo.CELLS | zoo.FORMS


def unary(function: Callable) -> Cell:
    """The cell h = function(a)."""

    @cell(gates="a")
    def made(a):
        return function(a)

    return made


def forward_and_slope(made: Cell, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A one-gate cell's value and derivative at each of `a`, by its emitted equations in float64."""
    ((forward, backward),) = reference.functions(made)
    with np.errstate(all="ignore"):
        h, *saved = forward(*(a for _ in made.arguments))
        names = {"a": a, "h1": h, "d_h": np.ones_like(a)} | {f"y{k}": y for k, y in enumerate(saved)}
        slope = backward(*(names[n] for n in made.stages[0].backward_args))[0]
    return np.broadcast_to(h, a.shape), np.broadcast_to(slope, a.shape)


# What is traced


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_the_emitted_equations_are_the_cell(made: Cell) -> None:
    values = np.random.default_rng(0).standard_normal((len(made.arguments), 50)) * 0.5 + 1
    right = zoo.NAIVE[made.name](*values)
    found = reference.functions(made)[0][0](*values)[: len(made.state)]
    for a, b in zip(found, right if isinstance(right, tuple) else (right,), strict=True):
        assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# float64 closed forms of the activations and their slopes
KERAS = {
    "linear": (lambda x: x, lambda x: 1 + 0 * x),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (sigma, lambda x: sigma(x) * (1 - sigma(x))),
    "relu": (lambda x: np.maximum(x, 0), lambda x: x > 0),
    "relu6": (lambda x: np.clip(x, 0, 6), lambda x: (x > 0) & (x < 6)),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.2 * x), lambda x: np.where(x > 0, 1, 0.2)),
    "hard_sigmoid": (lambda x: np.clip(x / 6 + 0.5, 0, 1), lambda x: (np.abs(x) < 3) / 6),
    "hard_tanh": (lambda x: np.clip(x, -1, 1), lambda x: np.abs(x) < 1),
    "softplus": (lambda x: np.logaddexp(x, 0), sigma),
    "softsign": (lambda x: x / (1 + np.abs(x)), lambda x: 1 / (1 + np.abs(x)) ** 2),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x))),
    "selu": (
        lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
        lambda x: 1.0507009873554805 * np.where(x > 0, 1, 1.6732632423543772 * np.exp(x)),
    ),
    "exponential": (np.exp, np.exp),
    "silu": (lambda x: x * sigma(x), lambda x: sigma(x) * (1 + x * (1 - sigma(x)))),
    "mish": (
        lambda x: x * np.tanh(np.logaddexp(x, 0)),
        lambda x: np.tanh(np.logaddexp(x, 0)) + x * sigma(x) * (1 - np.tanh(np.logaddexp(x, 0)) ** 2),
    ),
    "log_sigmoid": (lambda x: -np.logaddexp(-x, 0), lambda x: sigma(-x)),
}
KERAS["swish"] = KERAS["silu"]

# Those of the ONNX operators, and parameters in a name: onnx.ai/onnx/operators/onnx__LSTM.html
ONNX = {
    "affine(alpha=2, beta=-1)": (lambda x: 2 * x - 1, lambda x: 2 + 0 * x),
    "leaky_relu(alpha=0.01)": (lambda x: np.where(x > 0, x, 0.01 * x), lambda x: np.where(x > 0, 1, 0.01)),
    "thresholded_relu(alpha=2)": (lambda x: np.where(x > 2, x, 0), lambda x: x > 2),
    "scaled_tanh(alpha=1.5, beta=0.3)": (
        lambda x: 1.5 * np.tanh(0.3 * x),
        lambda x: 0.45 * (1 - np.tanh(0.3 * x) ** 2),
    ),
    "hard_sigmoid(alpha=0.2, beta=0.5)": (
        lambda x: np.clip(0.2 * x + 0.5, 0, 1),
        lambda x: 0.2 * (np.abs(x) < 2.5),
    ),
    "elu(alpha=0.7)": (
        lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)),
        lambda x: np.where(x > 0, 1, 0.7 * np.exp(x)),
    ),
    "affine": (lambda x: x, lambda x: 1 + 0 * x),
    "scaled_tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "thresholded_relu": (lambda x: np.where(x > 1, x, 0), lambda x: x > 1),
}


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *ONNX}))
def test_activations_are_keras_and_onnx_ones(name: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 801) + 0.003, [-30.0, -2.503, 30.0]])
    value, slope = (KERAS | ONNX)[name]
    found, found_slope = forward_and_slope(unary(cells.activation_function(name)), x)
    assert_allclose(found, value(x), rtol=1e-12, atol=1e-14)
    assert_allclose(found_slope, slope(x), rtol=1e-12, atol=1e-14)


def test_operators_in_every_order() -> None:
    f = lambda a: (
        (3 - a) / (2 + a * a) + 2 * a - (-a) / 4 - 1 / (5 + a**2) + (+a) ** 3 - (1 - a) + (a - 1) * 2
    )
    x = np.linspace(-1, 1, 101)
    value, slope = forward_and_slope(unary(f), x)
    assert_allclose(value, f(x), rtol=1e-13, atol=1e-14)
    assert_allclose(slope, (f(x + 1e-5) - f(x - 1e-5)) / 2e-5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.float64(0.5)], ids=lambda n: type(n).__name__)
def test_comparisons_on_both_sides(compare: Callable, number: float) -> None:
    x = np.array([0.0, 0.5, 1.0])
    value, _ = forward_and_slope(unary(lambda a: LANGUAGE["where"](compare(a, number), 1.0, 0.0) * a), x)
    assert value.tolist() == (compare(x, 0.5) * x).tolist()
    value, _ = forward_and_slope(unary(lambda a: LANGUAGE["where"](compare(number, a), 1.0, 0.0) * a), x)
    assert value.tolist() == (compare(0.5, x) * x).tolist()


def test_numpy_functions_and_scalars_are_traced() -> None:
    f = lambda a: np.tanh(a) * np.float32(2) + np.float64(1) / np.exp(np.negative(a)) - np.maximum(a, 0.5)
    value, _ = forward_and_slope(unary(f), np.linspace(-1, 1, 11))
    assert_allclose(value, f(np.linspace(-1, 1, 11)), rtol=1e-14)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e300, -0.1, 1e-320])
def test_constants_survive_emission(number: float) -> None:
    """Python has no literal for infinity; the text must still be Python."""
    value, _ = forward_and_slope(unary(lambda a: LANGUAGE["where"](a > 0, a, number)), np.array([-1.0, 2.0]))
    assert_allclose(value, [number, 2.0], rtol=0)


def test_ties_send_the_gradient_to_the_second() -> None:
    x = np.array([-1.0, 0.0, 1.0])
    assert forward_and_slope(unary(lambda a: derive.maximum(2 * a, a)), x)[1].tolist() == [1, 1, 2]
    assert forward_and_slope(unary(lambda a: derive.minimum(2 * a, a)), x)[1].tolist() == [2, 1, 1]
    assert forward_and_slope(unary(derive.relu), x)[1].tolist() == [0, 0, 1]
    assert forward_and_slope(unary(abs), x)[1].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("choose", [derive.maximum, derive.minimum])
@pytest.mark.parametrize("other", [1.0, -1.0, math.inf, -math.inf])
def test_nan_travels_through_maximum_and_minimum(choose: Callable, other: float) -> None:
    x = np.array([math.nan])
    assert np.isnan(forward_and_slope(unary(lambda a: choose(a, other)), x)[0])
    assert np.isnan(forward_and_slope(unary(lambda a: choose(other, a)), x)[0])


@pytest.mark.parametrize("f", [lambda a: a * 0, lambda a: a - a, lambda a: a / a, lambda a: 0 / a])
def test_nothing_is_simplified_that_changes_a_value(f: Callable) -> None:
    x = np.array([math.nan, math.inf, 0.0, 1.0])
    with np.errstate(invalid="ignore"):
        assert_allclose(forward_and_slope(unary(f), x)[0], f(x))


def test_a_name_changes_nothing() -> None:
    assert LANGUAGE["named"]("f", 0.5) == 0.5
    tanh, named = LANGUAGE["tanh"], LANGUAGE["named"]
    functions = (lambda a: tanh(a) * 2, lambda a: named("t", tanh(a)) * 2)
    plain, told = (Cell(f, "a", name="c") for f in functions)
    assert plain == told and told.graph.names["t"].op == "tanh" and not plain.graph.names


@pytest.mark.parametrize("name", sorted(LANGUAGE.keys() - derive.ACROSS - {"named"}))
def test_the_language_on_numbers(name: str) -> None:
    """A helper that a cell calls with plain numbers gets plain numbers, at the ends of the range too."""
    pairs = {
        "maximum": [(1.0, 2.0)],
        "minimum": [(1.0, 2.0)],
        "where": [(1.0, 2.0, 3.0)],
        "clip": [(5.0, 0.0, 1.0)],
    }
    ends = {"exp": (-1e4, 700.0), "log": (1e-300, 1e4), "sqrt": (0.0, 1e4)}.get(name, (-1e4, 1e4))
    right = {**{k: f for k, (f, _) in KERAS.items()}, **reference.NAMES, "clip": np.clip}[name]
    for given in pairs.get(name, [(0.5,), *((e,) for e in ends)]):
        assert_allclose(LANGUAGE[name](*given), right(*map(np.float64, given)), rtol=1e-12, atol=1e-15)


def test_a_cell_needs_no_import() -> None:
    scope: dict = {"cell": cell}
    exec("@cell(gates='a')\ndef plain(a, h):\n    return softplus(clip(a, -1, 1)) * hard_sigmoid(h)\n", scope)
    assert scope["plain"].state == ("h",)


# What a cell says about itself


def test_arguments_are_matched_by_name() -> None:
    @cell(gates=("z", "n"), state=("h", "c"), split=("n",))
    def odd(bias, c, n_h, z, n_x):
        return z + n_x * n_h + bias, c

    assert (odd.gates, odd.state, odd.params) == (("z", "n"), ("h", "c"), ("bias",))
    assert odd.stages[0].pre == ("n_x", "z", "n_h")
    assert odd.stages[0].x_gates == ("n_x", "z") and odd.stages[0].h_gates == ("z", "n_h")


def test_gates_by_count() -> None:
    assert cell(gates=2)(zoo_pair).gates == ("a", "b")


def zoo_pair(a, b, h):
    return a * b + h


def test_equal_equations_are_one_cell() -> None:
    first, second = cell(gates=2)(zoo_pair), cell(gates="ab")(zoo_pair)
    assert (
        first == second
        and hash(first) == hash(second)
        and len({first, second, pickle.loads(pickle.dumps(first))}) == 1
    )
    other = cell(gates=2)(lambda a, b, h: a * b - h)
    assert other != first and other.digest != first.digest
    assert cells.lstm() is cells.lstm() and cells.lstm("relu") != cells.lstm()


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_nothing_dear_is_computed_twice(made: Cell) -> None:
    """The backward pass holds no transcendental, and saves no more than it must."""
    assert not any(call in made.stages[0].backward_source for call in DEAR_CALLS)
    limits = {
        "lstm": 5,
        "gru": 4,
        "elman": 0,
        "peephole": 5,
        "coupled": 4,
        "slstm": 6,
        "lstm97": 4,
        "minimal": 3,
    }
    assert made.saved <= limits.get(made.name, 11)


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_gradient_of_one_step(made: Cell) -> None:
    """Every partial derivative of the emitted backward pass against central differences."""
    draw = np.random.default_rng(1)
    ((forward, backward),) = reference.functions(made)
    values = {n: draw.standard_normal(300) * 0.8 for n in made.arguments}
    if "n" in made.state:
        values["n"] = np.abs(values["n"]) + 0.7
    seeds = [draw.standard_normal(300) for _ in made.state]
    out = forward(*values.values())
    loss = lambda v: sum(s * o for s, o in zip(seeds, forward(*v.values())[: len(seeds)], strict=True))
    names = values | {f"y{k}": y for k, y in enumerate(out[len(seeds) :])}
    names |= {s + "1": o for s, o in zip(made.state, out, strict=False)}
    names |= {"d_" + s: d for s, d in zip(made.state, seeds, strict=True)}
    gradients = backward(*(names[n] for n in made.stages[0].backward_args))
    for name, gradient in zip(
        (*made.stages[0].pre, *made.state, *made.params), gradients, strict=True
    ):  # none for aux
        if name not in values:
            assert np.all(np.asarray(gradient) == 0)
            continue
        slope = (
            loss({**values, name: values[name] + 1e-6}) - loss({**values, name: values[name] - 1e-6})
        ) / 2e-6
        off = np.abs(slope - gradient) / (1 + np.abs(slope))
        assert np.quantile(off, 0.98) < 1e-8, name  # the rest may straddle a kink


# What can't be traced


def given_a_jitted_function(a):
    return jitted(a)


@njit
def jitted(x):
    return x * 2


REFUSED = {
    "if": (lambda a: a if a > 0 else -a, r"where\(condition"),
    "and": (lambda a: derive.where(a > 0 and a < 1, a, 0.0), r"where\(condition"),
    "chain": (lambda a: derive.where(0 < a < 1, a, 0.0), r"where\(condition"),
    "==": (lambda a: derive.where(a == 0, a, 1.0), "equality"),
    "!=": (lambda a: derive.where(a != 0, a, 1.0), "equality"),
    "in": (lambda a: a * (a in (a + 1, 2)), "equality"),
    "min": (lambda a: min(a, 1.0), r"minimum\(a, b\)"),
    "max": (lambda a: max(a, 1.0), r"maximum\(a, b\)"),
    "math.tanh": (lambda a: math.tanh(a), "cell language.*tanh"),
    "float": (lambda a: float(a), "cell language"),
    "int": (lambda a: int(a) * a, "cell language"),
    "numpy.arctan": (lambda a: np.arctan(a), r"numpy\.arctan"),
    "numpy.power": (lambda a: np.float64(2) ** a, r"numpy\.power"),
    "numpy.where": (lambda a: np.where(a > 0, a, 0), r"where\(condition"),
    "numpy.tanh with out": (lambda a: np.tanh(a, out=np.zeros(1)), r"numpy\.tanh"),
    "array": (lambda a: a + np.ones(3), "scalars"),
    "string": (lambda a: a * "2", "a str came"),
    "None": (lambda a: None, "a NoneType came"),
    "bool": (lambda a: derive.where(True, a, 0.0), "a bool came"),
    "jitted": (given_a_jitted_function, "can be traced"),
    "modulo": (lambda a: a % 2, "TypeError"),
    "power of a symbol": (lambda a: 2**a, "TypeError"),
    "broken power": (lambda a: a**0.5, "whole powers"),
    "zeroth power": (lambda a: a**0, "whole powers"),
    "index": (lambda a: a[0], "TypeError"),
    "a misspelt name": (lambda a: sigmiod(a), "sigmiod"),  # noqa: F821
    "no arithmetic on comparisons": (lambda a: (a > 0) * a, "comparison"),
    "no number as condition": (lambda a: derive.where(a, a, 0.0), "must be a comparison"),
    "comparison returned": (lambda a: a > 0, "comparison"),
    "too many arguments": (lambda a: derive.tanh(a, a), "takes 1"),
    "too few arguments": (lambda a: derive.maximum(a), "takes 2"),
    "two states": (lambda a: (a, a), "returns 2 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    function, message = REFUSED[case]
    with pytest.raises(TraceError, match=message) as caught:
        cell(gates="a")(function)
    assert "cell" in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_symbols_of_two_cells_do_not_mix() -> None:
    kept: list = []
    cell(gates="a")(lambda a: kept.append(a) or a)
    with pytest.raises(TraceError, match="another cell"):
        cell(gates="a")(lambda a: a + kept[0])


SIGNATURES = {
    "missing gate": (lambda a, h: a, {"gates": "ab"}, "no argument for the gates"),
    "varargs": (lambda *a: a[0], {"gates": "a"}, "matched by name"),
    "keyword arguments": (lambda a, **k: a, {"gates": "a"}, "matched by name"),
    "default": (lambda a, alpha=0.5: a * alpha, {"gates": "a"}, "alpha has a default"),
    "keyword only": (lambda a, *, h: a * h, {"gates": "a"}, "keyword-only"),
    "gate twice": (lambda a, h: a, {"gates": "aa"}, "twice"),
    "gate and state": (lambda a, h: a, {"gates": "ah"}, "twice"),
    "no gate": (lambda h: h, {"gates": ""}, "at least one gate"),
    "no state": (lambda a: (), {"gates": "a", "state": ()}, "at least one"),
    "count too high": (lambda a, h: a, {"gates": 3}, "gates=3"),
    "count of none": (lambda a, h: a, {"gates": 0}, "gates=0"),
    "split of no gate": (lambda a: a, {"gates": "a", "split": "b"}, "split names"),
    "split gate taken whole": (lambda a: a, {"gates": "a", "split": "a"}, "no argument"),
    "name of a saved value": (lambda a, y0: a * y0, {"gates": "a"}, "y0"),
    "name of a shared value": (lambda a, v1: a * v1, {"gates": "a"}, "v1"),
    "name of a new state": (lambda a, h1: a * h1, {"gates": "a"}, "h1"),
    "name of a gradient": (lambda a, d_h: a * d_h, {"gates": "a"}, "d_h"),
    "name of a function": (lambda a, tanh: a * tanh, {"gates": "a"}, "tanh"),
    "name of the constants": (lambda a, K: a * K * 2, {"gates": "a"}, "K"),
    "too few states": (
        lambda a, h, c: a,
        {"gates": "a", "state": ("h", "c")},
        "returns 1 values for its 2 states",
    ),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signatures_refused(case: str) -> None:
    function, options, message = SIGNATURES[case]
    with pytest.raises(TraceError, match=message):
        cell(**options)(function)


@pytest.mark.parametrize(
    "thing", [jitted, math.tanh, lambda: 0, 3], ids=["jitted", "builtin", "no argument", "number"]
)
def test_what_is_not_a_function_of_scalars(thing: object) -> None:
    with pytest.raises(TraceError):
        cell(gates="a")(thing)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'tahn'.*tanh"):
        cells.lstm("tahn")


def test_trace_errors_are_value_errors() -> None:
    assert issubclass(TraceError, ValueError) and inspect.getdoc(TraceError)
