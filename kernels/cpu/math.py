"""Elementary functions on vectors, float32: what the names in emitted cell equations mean on the CPU.

Relative errors against float64 (tests/kernels/cpu/test_math.py): a few units in the last place for each. tanh is a
rational function (the minimax coefficients that Eigen and XLA use), accurate near zero where 1 - 2/(1+exp(2x)) is not;
exp is the polynomial of the Cephes library after reduction by ln 2 in two parts, and in a sigmoid, which needs it within
bounds only, a shorter one: gates are up to half of a small layer's time. NaN travels through all of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from . import isa
from .simd import (
    VECTOR,
    VECTOR_INT,
    call,
    const,
    fma,
    int_const,
    operation,
    vector_call,
    where,
)

__all__ = ["NAMES", "exp", "log", "maximum", "minimum", "sigmoid", "softplus", "sqrt", "tanh"]

LOG2E, LN2_HIGH, LN2_LOW = (
    1.4426950408889634,
    0.693359375,
    -2.12194440e-4,
)  # high + low = ln 2, high in 9 bits
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# 2**f on [-1/2, 1/2] with the least relative error, 8e-8 (Remez' exchange), the highest power first
POWER_OF_TWO = (1.32764725e-3, 9.67554096e-3, 5.55071309e-2, 2.40221202e-1, 6.93146944e-1, 1.0000001)
LOG2E_LOW = LOG2E - 1.44269502162933349609375  # what float32 leaves of it
# Added to y, |y| < 2**22, it leaves y's nearest whole number n in the lowest bits, n + 127 in fact: 2**n's exponent.
TO_EXPONENT = 1.5 * 2.0**23 + 127
TANH_ODD = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_LIMIT = 7.90531110763549805  # tanh is 1 in float32 from here on
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def _polynomial(b: ir.IRBuilder, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = const(coefficients[0])
    for c in coefficients[1:]:
        value = fma(b, value, x, const(c))
    return value


def _clamp(b: ir.IRBuilder, x: Any, low: float, high: float) -> Any:
    """By compare and select, one instruction each: minnum and maxnum would turn NaN into a limit."""
    x = b.select(b.fcmp_ordered("<", x, const(low)), const(low), x)
    return b.select(b.fcmp_ordered(">", x, const(high)), const(high), x)


def _times_power_of_two(b: ir.IRBuilder, x: Any, n: Any) -> Any:
    """x * 2**n for a float vector of whole numbers, -126 <= n <= 127."""
    bits = b.shl(b.add(b.fptosi(n, VECTOR_INT), int_const(127)), int_const(23))
    return b.fmul(x, b.bitcast(bits, VECTOR))


def _exp_reduced(b: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    """exp(x) as p * 2**n."""
    n = vector_call(b, "rint", b.fmul(x, const(LOG2E)))
    r = fma(b, n, const(-LN2_LOW), fma(b, n, const(-LN2_HIGH), x))
    p = _polynomial(b, r, EXP)
    return fma(b, b.fmul(p, r), r, b.fadd(r, const(1.0))), n


def _exp_bounded(b: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    """exp with the argument held within +-87, as the two factors p and 2**n: most callers add to the product."""
    x = _clamp(b, x, -87.0, 87.0)
    shifted = fma(b, x, const(LOG2E), const(TO_EXPONENT))
    n = b.fsub(shifted, const(TO_EXPONENT))
    f = fma(b, x, const(LOG2E_LOW), fma(b, x, const(LOG2E), b.fneg(n)))
    power = b.bitcast(b.shl(b.bitcast(shifted, VECTOR_INT), int_const(23)), VECTOR)
    return _polynomial(b, f, POWER_OF_TWO), power


def _reciprocal(b: ir.IRBuilder, x: Any) -> Any:
    """1 / x for finite normal x: the processor's estimate and one Newton step, or a division where there is no estimate."""
    if isa.LANES == 16:
        full = ir.Constant(ir.IntType(16), -1)
        estimate = call(b, "llvm.x86.avx512.rcp14.ps.512", VECTOR, x, const(0.0), full)
    elif isa.LANES == 8:
        estimate = call(b, "llvm.x86.avx.rcp.ps.256", VECTOR, x)
    else:
        return b.fdiv(const(1.0), x)
    return fma(b, fma(b, b.fneg(x), estimate, const(1.0)), estimate, estimate)


@operation("v(v)")
def exp(b, x):
    p, n = _exp_reduced(b, _clamp(b, x, -104.0, 89.0))
    half = vector_call(
        b, "floor", b.fmul(n, const(0.5))
    )  # in two steps: the ends reach infinity and the subnormals
    return _times_power_of_two(b, _times_power_of_two(b, p, half), b.fsub(n, half))


@operation("v(v)")
def sigmoid(b, x):
    p, power = _exp_bounded(b, b.fneg(x))
    return _reciprocal(b, fma(b, p, power, const(1.0)))


@operation("v(v)")
def tanh(b, x):
    x = _clamp(b, x, -TANH_LIMIT, TANH_LIMIT)
    square = b.fmul(x, x)
    numerator = b.fmul(x, _polynomial(b, square, TANH_ODD))
    return b.fmul(numerator, _reciprocal(b, _polynomial(b, square, TANH_EVEN)))


@operation("v(v)")
def softplus(b, x):
    """max(x, 0) + log(1 + exp(-|x|)); the logarithm as 2 atanh(t / (2 + t)), whose series is short for t <= 1."""
    t = b.fmul(*_exp_bounded(b, b.fneg(vector_call(b, "fabs", x))))
    s = b.fmul(t, _reciprocal(b, b.fadd(t, const(2.0))))
    series = _polynomial(b, b.fmul(s, s), tuple(2.0 / k for k in (15, 13, 11, 9, 7, 5, 3, 1)))
    return fma(b, series, s, vector_call(b, "maximum", x, const(0.0)))


@operation("v(v)")
def log(b, x):
    """Cephes' logf: x = m 2**e with m in [sqrt(1/2), sqrt(2)); 0 gives -infinity, below 0 NaN."""
    tiny = b.fcmp_ordered("<", x, const(1.17549435e-38))
    scaled = b.select(tiny, b.fmul(x, const(2.0**25)), x)  # subnormals
    bits = b.bitcast(scaled, VECTOR_INT)
    exponent = b.sub(b.lshr(bits, int_const(23)), int_const(126))
    mantissa = b.bitcast(b.or_(b.and_(bits, int_const(0x007FFFFF)), int_const(0x3F000000)), VECTOR)
    low = b.fcmp_ordered("<", mantissa, const(0.70710678118654752))
    e = b.sitofp(exponent, VECTOR)
    e = b.fsub(e, b.select(tiny, const(25.0), const(0.0)))
    e = b.fsub(e, b.select(low, const(1.0), const(0.0)))
    m = b.fadd(b.fsub(mantissa, const(1.0)), b.select(low, mantissa, const(0.0)))
    square = b.fmul(m, m)
    y = b.fmul(b.fmul(m, square), _polynomial(b, m, LOG))
    y = fma(b, e, const(LN2_LOW), y)
    y = fma(b, square, const(-0.5), y)
    y = fma(b, e, const(LN2_HIGH), b.fadd(m, y))
    infinity = float("inf")
    y = b.select(b.fcmp_ordered("==", x, const(infinity)), const(infinity), y)
    y = b.select(b.fcmp_ordered("==", x, const(0.0)), const(-infinity), y)
    return b.select(b.fcmp_unordered("<", x, const(0.0)), const(float("nan")), y)


@operation("v(v)")
def sqrt(b, x):
    return vector_call(b, "sqrt", x)


@operation("v(vv)")
def maximum(b, x, y):
    return vector_call(b, "maximum", x, y)  # IEEE 754-2019: a NaN on either side is the result


@operation("v(vv)")
def minimum(b, x, y):
    return vector_call(b, "minimum", x, y)


NAMES = {
    "exp": exp,
    "log": log,
    "sqrt": sqrt,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "maximum": maximum,
    "minimum": minimum,
    "where": where,
}
