"""All inline PTX of the library, as intrinsics that kernels call by name.

Memory is addressed as (pointer, index): a pointer to a flat array and an element's number. Arrays of registers
(`cuda.local.array`) are addressed by literal numbers, so that each element is a register from the first pass of the
compiler on; as loops to be unrolled the same kernels took it minutes.

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

__all__ = [
    "absent",
    "absolute",
    "bits",
    "clamp",
    "clean",
    "divide",
    "ex2",
    "fma",
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
    "peek",
    "poll4",
    "publish1",
    "publish2",
    "publish4",
    "rcp",
    "sqrt",
    "store2",
    "tf32",
    "weights4",
    "where",
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


def _element(context: Any, builder: Any, array_type: Any, array: Any, i: int) -> Any:
    """The address of an array of registers' element."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [ir.Constant(I64, i)])


def _into_registers(name: str, text: str, effect: bool) -> Any:
    """name(registers, i, pointer, index): four words from memory into registers i to i + 3."""
    constraints = "=r,=r,=r,=r,l" + ",~{memory}" * effect

    def impl(registers: Any, i: Any, pointer: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = builder.ptrtoint(builder.gep(arguments[2], [arguments[3]]), I64)
            function = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I64])
            value = builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), [address])
            for k in range(4):
                to = _element(context, builder, signature.args[0], arguments[0], i.literal_value + k)
                builder.store(builder.extract_value(value, k), to)
            return context.get_dummy_value()

        return types.void(registers, i, pointer, i64), codegen

    return _function(name, 4, impl, (1,))


# Weights: nobody writes them while the kernel runs, and each is read once.
weights4: Any = _into_registers("weights4", "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", False)
# Exchange between blocks: relaxed, in L2; whether a word is there is read off the word itself.
poll4: Any = _into_registers("poll4", "ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [$4];", True)
peek: Any = _memory("peek", "ld.relaxed.gpu.global.u32 $0, [$1];", u32, 1, 0, True)
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
    """name(sums, o, x, i0, i1, i2, i3, y, k0, k1): registers o to o + 3 of `sums` += the product of a 16 x k tile, in
    registers i0 to i3 of x, and a k x 8 tile, in k0 and k1 of y; a register -1 is zeros. Once for each of `parts`, a pair of
    functions that make an operand of a word."""
    text = f"mma.sync.aligned.{shape} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    function = ir.FunctionType(ir.LiteralStructType([F32] * 4), [I32] * 6 + [F32] * 4)

    def impl(sums: Any, o: Any, x: Any, i0: Any, i1: Any, i2: Any, i3: Any, y: Any, k0: Any, k1: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def words(which: int, places: tuple[Any, ...]) -> list[Any]:
                return [
                    builder.load(
                        _element(context, builder, signature.args[which], arguments[which], n.literal_value)
                    )
                    if n.literal_value >= 0
                    else ir.Constant(I32, 0)
                    for n in places
                ]

            first, second = words(2, (i0, i1, i2, i3)), words(7, (k0, k1))
            to = [_element(context, builder, sums, arguments[0], o.literal_value + k) for k in range(4)]
            values = [builder.load(p) for p in to]
            for of_first, of_second in parts:
                operands = [*(of_first(builder, w) for w in first), *(of_second(builder, w) for w in second)]
                asm = ir.InlineAsm(function, text, constraints, side_effect=False)
                made = builder.call(asm, [*operands, *values])
                values = [builder.extract_value(made, k) for k in range(4)]
            for p, v in zip(to, values, strict=True):
                builder.store(v, p)
            return context.get_dummy_value()

        return types.void(sums, o, x, i0, i1, i2, i3, y, k0, k1), codegen

    return _function(name, 10, impl, (1, 3, 4, 5, 6, 8, 9))


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


def _absent(registers: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        worst = None  # the largest word
        for k in range(count.literal_value):
            word = builder.load(_element(context, builder, registers, arguments[0], k))
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
