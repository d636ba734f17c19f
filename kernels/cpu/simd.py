"""The LLVM level: a float vector type with operators, loads and stores by address, and the kernels' compiler options.

`vec` is LANES float32 values in one register. Memory is addressed by int64 byte addresses, so that kernels have few and
uniform argument types (half of Numba's compile time is type inference). Emitted cell equations run on `vec` unchanged.

Flags: `contract nsz arcp` and nothing else. The full `fast` set would break exp's range reduction and assume that no NaN
occurs; here NaN and infinity travel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .isa import LANES

FLAGS = ("contract", "nsz", "arcp")  # the only place where floating-point flags are named
JIT_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": set(FLAGS),
    "boundscheck": False,
}
# For functions that only kernels call: what Python would need to call them is not compiled.
INNER_OPTIONS: dict[str, Any] = {**JIT_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# llvmlite says nothing of its types
I8: Any
I16: Any
I32: Any
I64: Any
F32: Any
VECTOR: Any
VECTOR_INT: Any
HALVES: Any
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, VECTOR_INT, HALVES = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
VECTOR_BYTES = LANES * 4
CACHE_LINE = 64  # bytes


def _vector_type(name: str, llvm_type: ir.Type) -> types.Type:
    class Vector(types.Type):
        def __init__(self) -> None:
            super().__init__(name=name)

    @register_model(Vector)
    class Model(models.PrimitiveModel):
        def __init__(self, manager: Any, numba_type: Any) -> None:
            super().__init__(manager, numba_type, llvm_type)

    return Vector()


vec: types.Type = _vector_type(f"numlstm_f32x{LANES}", VECTOR)
mask: types.Type = _vector_type(f"numlstm_m1x{LANES}", ir.VectorType(ir.IntType(1), LANES))

_CODES = {"v": vec, "m": mask, "i": types.int64, "f": types.float32, "d": types.float64, "0": types.void}


def operation(spec: str) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function that builds LLVM IR into a Numba function of the type `spec`, as in "v(iv)": result, then arguments.

    v vector, m mask, i int64, f float32, d float64, 0 nothing.
    """
    result, arguments = _CODES[spec[0]], [_CODES[c] for c in spec[2:-1]]
    sig = result(*arguments)

    def decorate(build: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = build(builder, *args)
            return context.get_dummy_value() if spec[0] == "0" else value

        names = "".join(f", a{k}" for k in range(len(arguments)))  # Numba reads the arity off the signature
        scope = {"sig": sig, "generate": generate}
        exec(f"def typer(context{names}):\n    return sig, generate", scope)
        return intrinsic(scope["typer"])

    return decorate


def const(x: float) -> ir.Constant:
    """A vector of one value, rounded to float32."""
    import numpy as np

    return ir.Constant(VECTOR, [float(np.float32(x))] * LANES)


def int_const(x: int) -> ir.Constant:
    return ir.Constant(VECTOR_INT, [x] * LANES)


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    """A call of the LLVM intrinsic or C function `name`."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), args)


def vector_call(b: ir.IRBuilder, name: str, *args: Any) -> Any:
    """A call of the LLVM intrinsic `name` in its vector form."""
    return call(b, f"llvm.{name}.v{LANES}f32", VECTOR, *args)


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return vector_call(b, "fma", x, y, z)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def low_of_pairs(b: ir.IRBuilder, word: Any) -> Any:
    """The low bfloat16 of each 32-bit word as float32: exact, whatever it is."""
    return b.bitcast(b.shl(b.bitcast(word, VECTOR_INT), int_const(16)), VECTOR)


def high_of_pairs(b: ir.IRBuilder, word: Any) -> Any:
    return b.bitcast(b.and_(b.bitcast(word, VECTOR_INT), int_const(0xFFFF0000)), VECTOR)


def load_again(b: ir.IRBuilder) -> None:
    """No instructions, but what was loaded before is not known to be the same after: it need not stay in a register."""
    nothing = ir.FunctionType(ir.VoidType(), [])
    b.call(ir.InlineAsm(nothing, "", "~{memory}", side_effect=True), [])


def dot_pairs(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """z + x's low bfloat16 times y's + x's high one times y's, in float32; x and y hold two of them in each 32-bit lane.

    VDPBF16PS (AVX512_BF16, only where isa.DOT_BF16): it takes denormals for zeros, flushes denormal results and rounds to
    nearest even, whatever the float control register says.
    """
    kind = ir.VectorType(_BFloat(), 2 * LANES)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    return call(b, name, VECTOR, z, b.bitcast(x, kind), b.bitcast(y, kind))


def rounded_bits(b: ir.IRBuilder, value: Any) -> Any:
    """float32 to bfloat16, to nearest and ties to even, in the upper half of each lane's bits; what is below is left over.

    In integers, so that every processor gives the same bits; a NaN stays one (its quiet bit is set, lest rounding carry)."""
    bits = b.bitcast(value, VECTOR_INT)
    odd = b.and_(b.lshr(bits, int_const(16)), int_const(1))
    rounded = b.add(bits, b.add(odd, int_const(0x7FFF)))
    return b.select(b.fcmp_unordered("uno", value, value), b.or_(bits, int_const(0x400000)), rounded)


def broadcast(b: ir.IRBuilder, scalar: Any, kind: ir.VectorType = VECTOR) -> Any:
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(VECTOR_INT, [0] * LANES))


def pointer(b: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def lanes_below(b: ir.IRBuilder, n: Any) -> Any:
    """The mask of the lanes whose index is below n; held to LANES first, since n may not fit in 32 bits."""
    n = b.select(b.icmp_signed("<", n, I64(LANES)), n, I64(LANES))
    indices = ir.Constant(VECTOR_INT, list(range(LANES)))
    return b.icmp_signed("<", indices, broadcast(b, b.trunc(n, I32), VECTOR_INT))


def _operator(op: Any, result: types.Type, build: Callable[..., Any], arity: int = 2) -> None:
    @infer_global(op)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == arity and all(a is vec for a in args):
                return signature(result, *args)
            return None

    lower_builtin(op, *[vec] * arity)(lambda context, b, sig, args: build(b, *args))


_operator(operator.add, vec, lambda b, x, y: b.fadd(x, y, flags=FLAGS))
_operator(operator.sub, vec, lambda b, x, y: b.fsub(x, y, flags=FLAGS))
_operator(operator.mul, vec, lambda b, x, y: b.fmul(x, y, flags=FLAGS))
_operator(operator.truediv, vec, lambda b, x, y: b.fdiv(x, y, flags=FLAGS))
_operator(operator.neg, vec, lambda b, x: b.fneg(x, flags=FLAGS), 1)
_operator(operator.lt, mask, lambda b, x, y: b.fcmp_ordered("<", x, y))
_operator(operator.le, mask, lambda b, x, y: b.fcmp_ordered("<=", x, y))
_operator(operator.gt, mask, lambda b, x, y: b.fcmp_ordered(">", x, y))


def caller(count: int) -> Any:
    """An operation that calls the function of `count` int64s at an address: the address first, then those."""

    @operation("0(i" + "i" * count + ")")
    def call_address(b, address, *args):
        function_type = ir.FunctionType(ir.VoidType(), [I64] * count)
        b.call(b.inttoptr(address, function_type.as_pointer()), args)

    return call_address


@operation("v(i)")
def load(b, address):
    return b.load(pointer(b, address, VECTOR), align=4)


@operation("0(iv)")
def store(b, address, value):
    b.store(value, pointer(b, address, VECTOR), align=4)


@operation("v(ii)")
def load_n(b, address, n):
    """The first n floats at `address` (n may exceed the lanes); the other lanes are 0 and their memory is not touched."""
    zero = const(0.0)
    return call(
        b,
        f"llvm.masked.load.v{LANES}f32.p0",
        VECTOR,
        pointer(b, address, VECTOR),
        I32(4),
        lanes_below(b, n),
        zero,
    )


@operation("v(iiv)")
def load_n_else(b, address, n, other):
    """The first n floats at `address`; the other lanes from `other`."""
    return call(
        b,
        f"llvm.masked.load.v{LANES}f32.p0",
        VECTOR,
        pointer(b, address, VECTOR),
        I32(4),
        lanes_below(b, n),
        other,
    )


@operation("0(ivi)")
def store_n(b, address, value, n):
    """Store the first n lanes. All of them in a plain store: AVX2's masked one takes AMD's processors some 20 cycles."""
    target = pointer(b, address, VECTOR)
    with b.if_else(b.icmp_signed(">=", n, I64(LANES))) as (whole, part):
        with whole:
            b.store(value, target, align=4)
        with part:
            name = f"llvm.masked.store.v{LANES}f32.p0"
            call(b, name, ir.VoidType(), value, target, I32(4), lanes_below(b, n))


@operation("v(vi)")
def keep_n(b, value, n):
    """`value` with zeros from lane n on, whatever stood there."""
    return b.select(lanes_below(b, n), value, const(0.0))


@operation("v(d)")
def K(b, x):
    """A constant of emitted equations: every float64 literal passes here, so no double arithmetic creeps in."""
    return broadcast(b, b.fptrunc(x, F32))


@operation("v(f)")
def splat(b, x):
    return broadcast(b, x)


@operation("v(mvv)")
def where(b, c, x, y):
    return b.select(c, x, y)


@operation("f(i)")
def load_scalar(b, address):
    return b.load(pointer(b, address, F32), align=4)


@operation("0(if)")
def store_scalar(b, address, value):
    b.store(value, pointer(b, address, F32), align=4)


@operation("i(i)")
def load_int(b, address):
    return b.load(pointer(b, address, I64), align=8)


@operation("i(i)")
def load_byte(b, address):
    return b.zext(b.load(pointer(b, address, I8), align=1), I64)


@operation("0(ii)")
def store_byte(b, address, value):
    b.store(b.trunc(value, I8), pointer(b, address, I8), align=1)


@operation("0(ii)")
def zero_bytes(b, address, n):
    false = ir.Constant(ir.IntType(1), 0)
    call(b, "llvm.memset.p0.i64", ir.VoidType(), pointer(b, address, I8), I8(0), n, false)


@operation("0(i)")
def prefetch(b, address):
    """Have the cache line at `address` come to the second-level cache; the address may be any."""
    read, to_second_level, data = I32(0), I32(2), I32(1)
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer(b, address, I8), read, to_second_level, data)


@operation("f(v)")
def horizontal_sum(b, x):
    """The sum of the lanes, in one fixed order (pairs), so that it has the same bits everywhere."""
    step = LANES // 2
    while step:
        order = [(k + step) % LANES for k in range(LANES)]
        x = b.fadd(x, b.shuffle_vector(x, x, ir.Constant(VECTOR_INT, order)))
        step //= 2
    return b.extract_element(x, I32(0))


@operation("f(v)")
def horizontal_max(b, x):
    step = LANES // 2
    while step:
        order = [(k + step) % LANES for k in range(LANES)]
        x = vector_call(b, "maximum", x, b.shuffle_vector(x, x, ir.Constant(VECTOR_INT, order)))
        step //= 2
    return b.extract_element(x, I32(0))


@operation("v(vv)")
def join_pairs(b, low, high):
    """Two float32 vectors as one of pairs: `low` rounded to bfloat16 in the low half of each lane, `high` in the upper."""
    upper = b.and_(rounded_bits(b, high), int_const(0xFFFF0000))
    return b.bitcast(b.or_(upper, b.lshr(rounded_bits(b, low), int_const(16))), VECTOR)


@operation("0(iv)")
def store_bf16(b, address, value):
    """Store LANES values as bfloat16, 2 bytes each."""
    halves = b.trunc(b.lshr(rounded_bits(b, value), int_const(16)), HALVES)
    b.store(halves, pointer(b, address, HALVES), align=2)


@operation("0(ivi)")
def store_bf16_n(b, address, value, n):
    """Store the first n lanes as bfloat16."""
    halves = b.trunc(b.lshr(rounded_bits(b, value), int_const(16)), HALVES)
    call(
        b,
        f"llvm.masked.store.v{LANES}i16.p0",
        ir.VoidType(),
        halves,
        pointer(b, address, HALVES),
        I32(2),
        lanes_below(b, n),
    )


@operation("v(ii)")
def zip_bf16(b, low, high):
    """LANES bfloat16 at each of two addresses as pairs."""
    wide = [b.zext(b.load(pointer(b, a, HALVES), align=2), VECTOR_INT) for a in (low, high)]
    return b.bitcast(b.or_(wide[0], b.shl(wide[1], int_const(16))), VECTOR)
