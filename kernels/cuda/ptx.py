"""All inline PTX of the library, as intrinsics that kernels call by name.

Memory is addressed as (pointer, index): a pointer to a flat array and an element's number. Arrays of registers
(`cuda.local.array`) are addressed by literal numbers, so that each element is a register from the first pass of the
compiler on; as loops to be unrolled the same kernels took it minutes. What the text would repeat for each register is one
intrinsic that repeats itself: most of a compilation is Numba's work on each call in the text.

The same kernel text runs on a GPU, where a value is one thread's number, and in the emulator of the tests
(tests/gpu/emulator.py), which has a function of each name below for the 32 lanes of a warp at once.

Source: NVIDIA, PTX ISA, chapters on floating point, data movement, vote, warp-level matrix multiply-accumulate, and the
memory consistency model: a relaxed load or store of scope gpu is served by L2, is never torn within 32 bits, and orders
nothing else.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .persistent.places import left, multiplied, polled

__all__ = [
    "absent",
    "absolute",
    "bits",
    "clamp",
    "clean",
    "divide",
    "ex2",
    "fma",
    "leave",
    "lg2",
    "load1",
    "load2",
    "load4",
    "maximum",
    "minimum",
    "mma_bfloat16",
    "mma_float32",
    "mma_tf32",
    "pack_bf16",
    "poll",
    "publish1",
    "publish2",
    "publish4",
    "quotient",
    "rcp",
    "sqrt",
    "store2",
    "tf32",
    "weary",
    "weights",
    "where",
    "zero",
]

I1: Any = ir.IntType(1)
I32: Any = ir.IntType(32)
I64: Any = ir.IntType(64)
F32: Any = ir.FloatType()
f32: Any = types.float32
u32: Any = types.uint32
i64: Any = types.int64
_LOW_LEVEL = {f32: (F32, "f"), u32: (I32, "r")}
ABSENT = 0xFFFFFFFF  # the word that stands for "not published yet": the largest of all words


def _function(name: str, count: int, impl: Any, literal: tuple[int, ...] = ()) -> Any:
    """An intrinsic of `count` arguments; Numba reads their number from the Python signature.

    Numba asks twice, without and with the values of numbers written in the call; the first is declined where some of the
    arguments, those at the places `literal`, are the numbers of registers.
    """
    names = "".join(f", a{k}" for k in range(count))

    def typed(*arguments: Any) -> Any:
        known = all(isinstance(arguments[k], types.IntegerLiteral) for k in literal)
        return impl(*arguments) if known else None

    scope = {"impl": typed}
    exec(f"def {name}(context{names}):\n    return impl({names[2:]})\n", scope)
    return intrinsic(scope[name])


def _pack(context: Any, builder: Any, returned: Any, value: Any, count: int) -> Any:
    if count == 0:
        return context.get_dummy_value()
    if count == 1:
        return value
    return context.make_tuple(builder, returned, [builder.extract_value(value, k) for k in range(count)])


def _returned(outs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The Numba and the LLVM type of so many results."""
    if not outs:
        return types.void, ir.VoidType()
    if len(outs) == 1:
        return outs[0], _LOW_LEVEL[outs[0]][0]
    return types.UniTuple(outs[0], len(outs)), ir.LiteralStructType([_LOW_LEVEL[o][0] for o in outs])


def _register(name: str, text: str, outs: tuple[Any, ...], ins: tuple[Any, ...]) -> Any:
    """An instruction on values."""
    returned, low = _returned(outs)
    constraints = ",".join(["=" + _LOW_LEVEL[o][1] for o in outs] + [_LOW_LEVEL[i][1] for i in ins])

    def impl(*_: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            function = ir.FunctionType(low, [_LOW_LEVEL[i][0] for i in ins])
            value = builder.call(ir.InlineAsm(function, text, constraints, side_effect=False), arguments)
            return _pack(context, builder, returned, value, len(outs))

        return returned(*ins), codegen

    return _function(name, len(ins), impl)


def _memory(name: str, text: str, element: Any, outs: int, ins: int, effect: bool) -> Any:
    """An instruction on (pointer, index): `outs` words loaded, or `ins` stored. In its text the address follows what is
    loaded and precedes what is stored. `effect`: it must happen where it stands, and as often."""
    types_out, types_in = (element,) * outs, (element,) * ins
    returned, low = _returned(types_out)
    low_in = [_LOW_LEVEL[element][0]] * ins
    letter = _LOW_LEVEL[element][1]
    constraints = ",".join([*(["=" + letter] * outs), "l", *([letter] * ins), *(["~{memory}"] * effect)])

    def impl(pointer: Any, index: Any, *_: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = builder.ptrtoint(builder.gep(arguments[0], [arguments[1]]), I64)
            asm = ir.InlineAsm(ir.FunctionType(low, [I64, *low_in]), text, constraints, side_effect=effect)
            value = builder.call(asm, [address, *arguments[2:]])
            return _pack(context, builder, returned, value, outs)

        return returned(pointer, i64, *types_in), codegen

    return _function(name, 2 + ins, impl)


def _plain(name: str, returned: Any, ins: tuple[Any, ...], build: Any) -> Any:
    """A few LLVM instructions, which the compiler may share and move."""

    def impl(*_: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, *arguments)

        return returned(*ins), codegen

    return _function(name, len(ins), impl)


def _elements(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """The addresses of an array's elements by their numbers, which may be a register's or a value."""
    data = context.make_array(array_type)(context, builder, array).data
    return lambda i: builder.gep(data, [ir.Constant(I64, i) if isinstance(i, int) else i])


def _four(builder: Any, text: str, effect: bool, pointer: Any, index: Any, to: list[Any]) -> None:
    """Four words from memory into registers, whose addresses are `to`."""
    address = builder.ptrtoint(builder.gep(pointer, [index]), I64)
    function = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I64])
    constraints = "=r,=r,=r,=r,l" + ",~{memory}" * effect
    value = builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), [address])
    for k, place in enumerate(to):
        builder.store(builder.extract_value(value, k), place)


def _weights(registers: Any, count: Any, pointer: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _elements(context, builder, registers, arguments[0])
        for k in range(count.literal_value):
            at = builder.add(arguments[3], ir.Constant(I64, 128 * k))
            to = [element(4 * k + i) for i in range(4)]
            _four(builder, "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", False, arguments[2], at, to)
        return context.get_dummy_value()

    return types.void(registers, count, pointer, i64), codegen


def _poll(registers: Any, pointer: Any, index: Any, *shape: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _elements(context, builder, registers, arguments[0])
        for k, offset in enumerate(polled(*(n.literal_value for n in shape))):
            at = builder.add(arguments[2], ir.Constant(I64, offset))
            to = [element(4 * k + i) for i in range(4)]
            _four(builder, "ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [$4];", True, arguments[1], at, to)
        return context.get_dummy_value()

    return types.void(registers, pointer, i64, *shape), codegen


# weights(registers, count, pointer, index): `count` loads of four words, 128 words apart: a warp's lanes have four each.
# Nobody writes them while the kernel runs, and each is read once.
weights: Any = _function("weights", 4, _weights, (1,))
# poll(registers, pointer, index, tiles, chunks, halves, row words): loads of four words at the places `polled` gives.
# Exchange between blocks: relaxed, in L2; whether a word is there is read off the word itself.
poll: Any = _function("poll", 7, _poll, (3, 4, 5, 6))
publish1: Any = _memory("publish1", "st.relaxed.gpu.global.u32 [$0], $1;", u32, 0, 1, True)
publish2: Any = _memory("publish2", "st.relaxed.gpu.global.v2.u32 [$0], {$1,$2};", u32, 0, 2, True)
publish4: Any = _memory("publish4", "st.relaxed.gpu.global.v4.u32 [$0], {$1,$2,$3,$4};", u32, 0, 4, True)

# Memory that nobody writes while the kernel runs: inputs, what the forward pass saved. And results for later kernels.
load1: Any = _memory("load1", "ld.global.nc.f32 $0, [$1];", f32, 1, 0, False)
load2: Any = _memory("load2", "ld.global.nc.v2.f32 {$0,$1}, [$2];", f32, 2, 0, False)
load4: Any = _memory("load4", "ld.global.nc.v4.f32 {$0,$1,$2,$3}, [$4];", f32, 4, 0, False)
store2: Any = _memory("store2", "st.global.v2.f32 [$0], {$1,$2};", f32, 0, 2, True)


def _asm_part(text: str) -> Any:
    """A part of a float32 word, as a tf32 number. It stays in the step where it is used: the weights' parts do not change
    from step to step, and a compiler that kept them would need twice the registers."""

    def part(builder: Any, word: Any) -> Any:
        return builder.call(ir.InlineAsm(ir.FunctionType(I32, [I32]), text, "=r,r", side_effect=True), [word])

    return part


_high = _asm_part("and.b32 $0, $1, 0xFFFFE000;")  # the first 11 binary digits
_low = _asm_part(  # the next 11
    "{.reg .b32 h; and.b32 h, $1, 0xFFFFE000; sub.f32 h, $1, h; and.b32 $0, h, 0xFFFFE000;}"
)


def _whole(b: Any, word: Any) -> Any:
    return word


def _mma(name: str, shape: str, parts: tuple[tuple[Any, Any], ...]) -> Any:
    """name(sums, weights, words, first chunk, chunks, rows of sums, tiles, halves): the products at the places `multiplied`
    gives. Each adds to four sums that of a 16 x k tile, in four registers, and a k x 8 tile, in two; a register -1 is
    zeros. Once for each of `parts`, a pair of functions that make an operand of a word."""
    text = f"mma.sync.aligned.{shape} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    function = ir.FunctionType(ir.LiteralStructType([F32] * 4), [I32] * 6 + [F32] * 4)

    def impl(sums: Any, weights: Any, words: Any, *shape: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            acc, a, b = (
                _elements(context, builder, t, v)
                for t, v in zip((sums, weights, words), arguments, strict=False)
            )
            if shape[-1].literal_value:  # backward the words from other blocks are the first operand
                a, b = b, a
            load = lambda of, i: builder.load(of(i)) if i >= 0 else ir.Constant(I32, 0)
            asm = ir.InlineAsm(function, text, constraints, side_effect=False)
            for o, first, second in multiplied(*(n.literal_value for n in shape)):
                x, y = [load(a, i) for i in first], [load(b, i) for i in second]
                values = [builder.load(acc(o + k)) for k in range(4)]
                for of_x, of_y in parts:
                    operands = [*(of_x(builder, w) for w in x), *(of_y(builder, w) for w in y)]
                    made = builder.call(asm, [*operands, *values])
                    values = [builder.extract_value(made, k) for k in range(4)]
                for k, v in enumerate(values):
                    builder.store(v, acc(o + k))
            return context.get_dummy_value()

        return types.void(sums, weights, words, *shape), codegen

    return _function(name, 8, impl, (3, 4, 5, 6, 7))


def _zero(registers: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _elements(context, builder, registers, arguments[0])
        for k in range(count.literal_value):
            builder.store(ir.Constant(F32, 0.0), element(k))
        return context.get_dummy_value()

    return types.void(registers, count), codegen


def _leave(pool: Any, index: Any, sums: Any, *shape: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        acc = _elements(context, builder, sums, arguments[2])
        shared = _elements(context, builder, pool, arguments[0])
        for offset, k in left(*(n.literal_value for n in shape)):
            at = builder.add(arguments[1], ir.Constant(I64, offset))
            builder.store(builder.load(acc(k)), shared(at))
        return context.get_dummy_value()

    return types.void(pool, i64, sums, *shape), codegen


zero: Any = _function("zero", 2, _zero, (1,))  # zero(registers, count): the first `count` are 0.0
# leave(pool, index, sums, tiles, rows of sums, pitch, halves): sums into shared memory, at the places `left` gives.
leave: Any = _function("leave", 7, _leave, (3, 4, 5, 6))

# Products of a 16 x k and a k x 8 tile, k 16 or 8, held in a warp's registers; the sums are float32. A float32 product is
# three tf32 ones, the smallest first; the product of both low parts is beyond float32's digits.
mma_bfloat16: Any = _mma("mma_bfloat16", "m16n8k16.row.col.f32.bf16.bf16.f32", ((_whole, _whole),))
mma_tf32: Any = _mma("mma_tf32", "m16n8k8.row.col.f32.tf32.tf32.f32", ((_whole, _whole),))
mma_float32: Any = _mma(
    "mma_float32", "m16n8k8.row.col.f32.tf32.tf32.f32", ((_low, _high), (_high, _low), (_high, _high))
)

# Conversions. A bfloat16 pair has its first value in the lower half, which the instruction takes last.
pack_bf16: Any = _register("pack_bf16", "cvt.rn.bf16x2.f32 $0, $2, $1;", (u32,), (f32, f32))
tf32: Any = _register("tf32", "cvt.rna.tf32.f32 $0, $1;", (u32,), (f32,))
bits: Any = _plain("bits", u32, (f32,), lambda b, x: b.bitcast(x, I32))


def _within(b: Any, index: Any, count: Any) -> Any:
    last = b.sub(count, ir.Constant(I64, 1))
    return b.select(b.icmp_signed("<", index, last), index, last)


def _clean(b: Any, word: Any) -> Any:
    absent = b.icmp_unsigned("==", word, ir.Constant(I32, ABSENT))
    return b.select(absent, ir.Constant(I32, 0x7FFF7FFF), word)


clean: Any = _plain("clean", u32, (u32,), _clean)  # a NaN that reads as ABSENT becomes another NaN
clamp: Any = _plain(
    "clamp", i64, (i64, i64), lambda b, i, n: _within(b, i, n)
)  # an index below n: the last where it isn't
# quotient(i, n): of numbers of blocks, with 32 bits; 64 would call a function.
quotient: Any = _plain(
    "quotient", i64, (i64, i64), lambda b, i, n: b.zext(b.udiv(b.trunc(i, I32), b.trunc(n, I32)), I64)
)


def _absent(registers: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        worst = None  # the largest word
        element = _elements(context, builder, registers, arguments[0])
        for k in range(count.literal_value):
            word = builder.load(element(k))
            worst = (
                word
                if worst is None
                else builder.select(builder.icmp_unsigned(">", word, worst), word, worst)
            )
        return builder.zext(builder.icmp_unsigned("==", worst, ir.Constant(I32, ABSENT)), I32)

    return u32(registers, count), codegen


# absent(registers, count): whether one of the first registers has the word ABSENT. Each lane asks for itself, and the
# warp's lanes meet in mma.sync, which waits for all of them. A vote or bar.warp.sync would on 8.0 hold a call for lanes that
# have come apart, which is never taken, but around which registers are spilled.
absent: Any = _function("absent", 2, _absent, (1,))

EVERY = 64  # looks between glances at the other blocks' trouble


def _weary(spins: Any, limit: Any, failed: Any, errors: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        looks, most, gave_up, pointer = arguments
        text, zero = "ld.relaxed.gpu.global.u32 $0, [$1];", ir.Constant(I64, 0)
        spent = builder.icmp_signed(">=", looks, most)
        due = builder.icmp_signed("==", builder.and_(looks, ir.Constant(I64, EVERY - 1)), zero)
        before = builder.block
        with builder.if_then(builder.or_(spent, due)):
            asm = ir.InlineAsm(ir.FunctionType(I32, [I64]), text, "=r,l,~{memory}", side_effect=True)
            others = builder.call(asm, [builder.ptrtoint(pointer, I64)])
            bad = builder.icmp_unsigned("!=", others, ir.Constant(I32, 0))
            bad = builder.or_(bad, builder.or_(spent, builder.icmp_signed("!=", gave_up, zero)))
            word, glance = builder.zext(bad, I32), builder.block
        answer = builder.phi(I32)
        answer.add_incoming(ir.Constant(I32, 0), before)
        answer.add_incoming(word, glance)
        return answer

    return u32(i64, i64, i64, errors), codegen


# weary(spins, limit, failed, errors): whether to look no more, after `spins` looks: they are `limit`, this warp has failed
# before, or, at every 64th, another block has.
weary: Any = _function("weary", 4, _weary)

# Arithmetic: the special function unit's approximations (2 units in the last place, PTX ISA), and what keeps a NaN.
ex2: Any = _register("ex2", "ex2.approx.f32 $0, $1;", (f32,), (f32,))
lg2: Any = _register("lg2", "lg2.approx.f32 $0, $1;", (f32,), (f32,))
rcp: Any = _register("rcp", "rcp.approx.f32 $0, $1;", (f32,), (f32,))
sqrt: Any = _register("sqrt", "sqrt.approx.f32 $0, $1;", (f32,), (f32,))
divide: Any = _register("divide", "div.full.f32 $0, $1, $2;", (f32,), (f32, f32))
fma: Any = _register("fma", "fma.rn.f32 $0, $1, $2, $3;", (f32,), (f32, f32, f32))
absolute: Any = _register("absolute", "abs.f32 $0, $1;", (f32,), (f32,))
maximum: Any = _register("maximum", "max.NaN.f32 $0, $1, $2;", (f32,), (f32, f32))
minimum: Any = _register("minimum", "min.NaN.f32 $0, $1, $2;", (f32,), (f32, f32))


def _where(condition: Any, *_: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        truth = context.cast(builder, arguments[0], signature.args[0], types.boolean)
        return builder.select(builder.trunc(truth, I1) if truth.type != I1 else truth, *arguments[1:])

    return f32(condition, f32, f32), codegen


where: Any = _function("where", 3, _where)
