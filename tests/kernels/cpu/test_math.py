"""The vector functions against float64 over the whole range, with NaN, infinity, zeros and subnormals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numba import njit

from numlstm.kernels.cpu import isa, math, simd
from numlstm.kernels.cpu.simd import JIT_OPTIONS, LANES, load, store

TINY, LARGEST = float(np.finfo("f").tiny), float(np.finfo("f").max)
ULP = 2.0**-23


def _loops() -> dict[str, Callable]:
    """All functions in one kernel, so that one compilation serves: function k on n floats."""
    exp, log, sqrt, tanh, sigmoid, softplus = (math.NAMES[n] for n in UNARY)

    @njit(**JIT_OPTIONS)
    def run(k, x, y, n):
        for i in range(0, n * 4, LANES * 4):
            v = load(x + i)
            if k == 0:
                v = exp(v)
            elif k == 1:
                v = log(v)
            elif k == 2:
                v = sqrt(v)
            elif k == 3:
                v = tanh(v)
            elif k == 4:
                v = sigmoid(v)
            else:
                v = softplus(v)
            store(y + i, v)

    return run


UNARY = ("exp", "log", "sqrt", "tanh", "sigmoid", "softplus")


@pytest.fixture(scope="module")
def on() -> Callable[[str, np.ndarray], np.ndarray]:
    """on(name, x): the function on an array of float32."""
    run = _loops()

    def apply(name: str, x) -> np.ndarray:
        x = np.asarray(x, "f")
        padded = np.zeros(-(-x.size // LANES) * LANES, "f")
        padded[: x.size] = x
        out = np.empty_like(padded)
        run(UNARY.index(name), padded.ctypes.data, out.ctypes.data, padded.size)
        return out[: x.size]

    return apply


def sigmoid(x: np.ndarray) -> np.ndarray:
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, t) / (1 + t)


def over(low: float, high: float) -> np.ndarray:
    """Many floats of both signs between low and high: evenly spaced ones, and evenly spaced exponents."""
    small = np.logspace(-37, np.log10(max(abs(low), abs(high))), 60000)
    x = np.concatenate([np.linspace(low, high, 200000), small, -small])
    return np.unique(x[(x >= low) & (x <= high)].astype("f"))


# name -> float64 function, range, bound on the relative error in units of the last place (2**-23)
RELATIVE = {
    "exp": (np.exp, over(-87.3, 88.72), 2),
    "log": (np.log, np.unique(np.concatenate([over(TINY, LARGEST), over(0.5, 2), over(0.999, 1.001)])), 2),
    "sqrt": (np.sqrt, over(0, LARGEST), 1),
    "tanh": (np.tanh, over(-100, 100), 4),
    "sigmoid": (sigmoid, over(-87, 1e30), 4),
    "softplus": (lambda x: np.logaddexp(x, 0), over(-87, 1e30), 4),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_error(name: str, on) -> None:
    function, x, bound = RELATIVE[name]
    found, right = on(name, x).astype("d"), function(x.astype("d"))
    normal = np.abs(right) >= 1e-35  # below, terms in between are subnormal
    off = np.abs(found - right)[normal] / np.abs(right[normal])
    assert off.max() <= bound * ULP, f"{off.max() / ULP:.2f} ulp at {x[normal][off.argmax()]}"
    assert np.all(np.abs(found - right)[~normal] <= 1e-40)


INF, NAN = np.inf, np.nan
SPECIAL = {
    "exp": (
        [0, -0.0, INF, -INF, NAN, 88.7, 89, 500, -120, -500],
        [1, 1, INF, 0, NAN, np.exp(np.float32(88.7).astype("d")), INF, INF, 0, 0],
    ),
    "log": ([1, 0, -0.0, INF, NAN, -1, -INF, -TINY], [0, -INF, -INF, INF, NAN, NAN, NAN, NAN]),
    "sqrt": ([0, -0.0, 4, INF, NAN, -1, -INF], [0, -0.0, 2, INF, NAN, NAN, NAN]),
    "tanh": ([0, -0.0, INF, -INF, NAN, 20, -20, LARGEST], [0, -0.0, 1, -1, NAN, 1, -1, 1]),
    "sigmoid": ([0, INF, -INF, NAN, 100, -1000, LARGEST, -LARGEST], [0.5, 1, 0, NAN, 1, 0, 1, 0]),
    "softplus": ([0, INF, -INF, NAN, LARGEST, -LARGEST, 200], [np.log(2), INF, 0, NAN, LARGEST, 0, 200]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str, on) -> None:
    x, right = SPECIAL[name]
    found = on(name, x)
    # sigmoid and softplus end at exp(-87) = 1.6e-38, not at 0: absolute error no gate can see
    np.testing.assert_allclose(found, np.array(right), rtol=2e-6, atol=2e-38)
    assert np.array_equal(np.isnan(found), np.isnan(right))


def test_subnormals(on) -> None:
    x = np.array([1e-45, 1e-42, 1e-40, TINY / 2, TINY], "f")
    np.testing.assert_allclose(on("log", x), np.log(x.astype("d")), rtol=4 * ULP)
    np.testing.assert_allclose(on("sqrt", x), np.sqrt(x.astype("d")), rtol=4 * ULP)
    np.testing.assert_allclose(on("tanh", x), x, rtol=4 * ULP, atol=1e-42)
    low = np.array([-87.5, -90, -95, -100, -103.2], "f")
    np.testing.assert_allclose(on("exp", low), np.exp(low.astype("d")), rtol=1e-6, atol=1.5e-45)


def test_bounded_functions_stay_in_bounds(on) -> None:
    x = over(-1e30, 1e30)
    assert np.all(np.abs(on("tanh", x)) <= 1)
    assert np.all((on("sigmoid", x) >= 0) & (on("sigmoid", x) <= 1))
    assert np.all(on("softplus", x) >= np.maximum(x, 0))
    assert np.array_equal(on("tanh", x), -on("tanh", -x))


def test_a_lane_does_not_depend_on_its_neighbours(on) -> None:
    x = np.linspace(-5, 5, 97).astype("f")
    for name in ("exp", "tanh", "sigmoid", "softplus"):
        whole = on(name, np.concatenate([x, [NAN, INF, -INF]]))[: x.size]
        assert np.array_equal(whole, np.concatenate([on(name, [v]) for v in x]))


# The operations that emitted equations call beside functions


@pytest.fixture(scope="module")
def pairs() -> Callable[[int, np.ndarray, np.ndarray], np.ndarray]:
    maximum, minimum, where, K, keep_n = math.maximum, math.minimum, simd.where, simd.K, simd.keep_n

    @njit(**JIT_OPTIONS)
    def run(k, x, y, z):
        a, b = load(x), load(y)
        if k == 0:
            c = maximum(a, b)
        elif k == 1:
            c = minimum(a, b)
        elif k == 2:
            c = where(a < b, K(1.0), K(0.0))
        elif k == 3:
            c = where(a <= b, K(1.0), K(0.0))
        elif k == 4:
            c = where(a > b, K(1.0), K(0.0))
        elif k == 5:
            c = (a + b) * a - b / (-a)
        else:
            c = keep_n(a, k - 100)
        store(z, c)

    def apply(k: int, a, b=0.0) -> np.ndarray:
        x, y, z = np.full(LANES, a, "f"), np.full(LANES, b, "f"), np.empty(LANES, "f")
        run(k, x.ctypes.data, y.ctypes.data, z.ctypes.data)
        return z

    return apply


@pytest.mark.parametrize("a", [1.0, -1.0, 0.0, INF, -INF, NAN])
@pytest.mark.parametrize("b", [2.0, -2.0, 1.0, INF, -INF, NAN])
def test_two_arguments(a: float, b: float, pairs) -> None:
    """As NumPy and IEEE 754-2019: NaN on either side is the maximum; no comparison with NaN holds."""
    with np.errstate(all="ignore"):
        right = [np.maximum(a, b), np.minimum(a, b), a < b, a <= b, a > b]
        right.append((np.float32(a) + np.float32(b)) * np.float32(a) - np.float32(b) / -np.float32(a))
    for k, want in enumerate(right):
        np.testing.assert_array_equal(pairs(k, a, b), np.full(LANES, want, "f"), err_msg=str(k))


@pytest.mark.parametrize(
    "n", [0, 1, LANES - 1, LANES, LANES + 1, 2**31, 2**32, 2**32 + 1, 2**40, -1, -(2**31)]
)
def test_lanes_are_counted_in_64_bits(n: int, pairs) -> None:
    assert np.count_nonzero(pairs(100 + n, 1.0)) == min(max(n, 0), LANES)


def test_flags_keep_nan_and_infinity() -> None:
    assert set(simd.FLAGS) <= {"contract", "nsz", "arcp"} and JIT_OPTIONS["fastmath"] == set(simd.FLAGS)
    assert isa.LANES == LANES
