"""Product tiles in AMX's registers: 16 rows by 16 columns of sums, and 16 x 16 x 16 words of products an instruction.

The operands are those of the vector tiles, packed alike: A in rows of 32-bit words, B [k][columns] of words, a word being
two bfloat16 (microkernel.py) or four bytes (quantized.py). Only the edges differ. A register has a fixed shape, 16 rows of
64 bytes, and another one between two products would cost as much as a product; so there is one configuration, which each
thread loads as it begins a pass, and what is multiplied is padded: k to a whole number of 16 words (zeros in both operands),
and rows in memory alone: A may be read, and in bfloat16 C read and written, up to 15 rows past the last, whatever lies
there. Eight registers hold 2 x 2 tiles of sums, two of A and two of B; where there are at most 16 rows, 1 x 4, one and
three.

The sums' order differs from that of the vector tiles: an instruction sums its 16 even and its 16 odd k apart, then adds both
to what was there, and takes denormals for zeros.

Two forms: "amx", the instructions; "emulated", functions that do what Intel's manual says of each (Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBF16PS, TDPBUSD, TILESTORED) on memory
that stands for the registers, to run the same tiles and drivers on processors without them. isa.py chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from . import isa
from .cache import compile_address
from .simd import (
    F32,
    I8,
    I32,
    I64,
    INNER_OPTIONS,
    VECTOR,
    VECTOR_INT,
    broadcast,
    call,
    caller,
    fma,
    high_of_pairs,
    int_const,
    load_int,
    low_of_pairs,
    operation,
    pointer,
)

__all__ = [
    "CONFIG",
    "ROWS",
    "UNIT",
    "begin_tiles",
    "end_tiles",
    "form_of",
    "int8_tile",
    "precision_of",
    "product_tile",
    "state",
    "state_of",
    "tiled",
    "words",
]

VERSION = 1  # of the tiles: stands in their names
UNIT = 16  # rows of a register, and words of k a product takes
ROWS = 2 * UNIT  # of a tile of sums
ROW_BYTES = 64
REGISTERS = 8
# The sums are in the registers from 0. A's first register; and by how many tiles of rows there are, B's registers, and how
# many tiles of columns are made at once.
A_REGISTER = 4
B_REGISTER: dict[int, tuple[int, ...]] = {2: (6, 7), 1: (5, 6, 7)}
ACROSS = {2: 2, 1: 4}
LEAST_ROWS = 4  # with fewer rows most of a register is empty, and a product is bound by reading B

# LDTILECFG's 64 bytes: palette 1, no row to start from, each register's bytes a row (16 bits each), then its rows.
CONFIG = np.zeros(64, np.uint8)
CONFIG[0] = 1
CONFIG[16 : 16 + 2 * REGISTERS : 2] = ROW_BYTES
CONFIG[48 : 48 + REGISTERS] = UNIT
CONFIG.flags.writeable = False

# Where functions and counts lie behind the configuration in `state`.
BEGIN, END, BEGUN, ENDED = 64, 72, 80, 88


def tiled(precision: str) -> bool:
    """Whether this is one of the precisions of `precision_of` whose products are made in these tiles."""
    return precision.startswith("bfloat16_")


def form_of(precision: str) -> str | None:
    """The form of a precision's tiles; None where it has none."""
    return precision.removeprefix("bfloat16_") if tiled(precision) else None


def precision_of(precision: str, rows: int) -> str:
    """What kernels are told where `precision` is asked of products of so many rows: "float32", "bfloat16", or, where these
    tiles serve, "bfloat16_" and their form.

    >>> precision_of("float32", 100), precision_of("bfloat16", 1)
    ('float32', 'bfloat16')
    """
    form = isa.tiles("bf16") if precision == "bfloat16" and rows >= LEAST_ROWS else None
    return precision if form is None else f"{precision}_{form}"


def words(part: str) -> str:
    """What `explain` says of "bf16" or "int8" products: that they run here, or why they do not where they could; or nothing.

    >>> isinstance(words("int8"), str)
    True
    """
    form = isa.tiles(part)
    if form is None:
        return isa.why_no_tiles(part)
    return f"AMX tiles{' (emulated)' if form == 'emulated' else ''} from {LEAST_ROWS} rows on"


# Instructions

Register = int


class Instructions:
    """The instructions on registers; `kind` of a product: "bf16" or "int8"."""

    PRODUCTS = {"bf16": "tdpbf16ps", "int8": "tdpbusd"}  # noqa: RUF012 (a constant)

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b = b

    def _emit(self, name: str, *args: Any) -> None:
        given = [I8(a) if isinstance(a, int) else a for a in args]
        call(self.b, f"llvm.x86.{name}", ir.VoidType(), *given)

    def load(self, register: Register, address: Any, step: Any) -> None:
        """16 rows of 64 bytes, `step` bytes apart."""
        self._emit("tileloadd64", register, pointer(self.b, address, I8), step)

    def multiply(self, kind: str, total: Register, a: Register, w: Register) -> None:
        """total += a w."""
        self._emit(self.PRODUCTS[kind], total, a, w)

    def store(self, register: Register, address: Any, step: Any) -> None:
        self._emit("tilestored64", register, pointer(self.b, address, I8), step)


class Emulation(Instructions):
    """The same on memory, register after register; made at the head of a function. Shapes are those of CONFIG."""

    def __init__(self, b: ir.IRBuilder) -> None:
        super().__init__(b)
        memory = b.alloca(ir.ArrayType(VECTOR, REGISTERS * UNIT))
        memory.align = ROW_BYTES
        self.memory: Any = b.ptrtoint(memory, I64)

    def _emit(self, name: str, *args: Any) -> None:
        places = [
            self.b.add(self.memory, I64(a * UNIT * ROW_BYTES)) if isinstance(a, int) else a for a in args
        ]
        places = [self.b.ptrtoint(a, I64) if isinstance(a.type, ir.PointerType) else a for a in places]
        rows, width = (_uniform(CONFIG[48:56]), _uniform(CONFIG[16:32].view(np.uint16)))
        if CONFIG[0] != 1 or width != ROW_BYTES:
            raise AssertionError("the emulation has rows of 64 bytes, as palette 1 has at most")
        self.b.call(_emulated(self.b.module, name, rows), places)


def _uniform(values: np.ndarray) -> int:
    (value,) = set(values.tolist())
    return value


def _emulated(module: ir.Module, name: str, rows: int) -> ir.Function:
    """A function that does what the instruction does, register after register by its address."""
    full = f"numlstm_emulated_{name}_{rows}_v{VERSION}"
    if full in module.globals:
        return module.globals[full]
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 3), full)
    f.linkage = "linkonce_odr"
    f.attributes.add("noinline")
    b = ir.IRBuilder(f.append_basic_block())
    first, second, third = f.args
    at = lambda base, k, kind: pointer(b, b.add(base, b.mul(k, I64(ROW_BYTES))), kind)
    with cgutils.for_range(b, I64(rows)) as row:
        m = row.index
        if name in ("tileloadd64", "tilestored64"):
            memory, register = (
                pointer(b, b.add(second, b.mul(third, m)), VECTOR_INT),
                at(first, m, VECTOR_INT),
            )
            source, target = (memory, register) if name == "tileloadd64" else (register, memory)
            b.store(b.load(source, align=1), target, align=1)
        elif name == "tdpbf16ps":
            total = at(first, m, VECTOR)
            even, odd = (cgutils.alloca_once_value(b, ir.Constant(VECTOR, [0.0] * isa.LANES)) for _ in "eo")
            with cgutils.for_range(b, I64(ROW_BYTES // 4)) as depth:
                k = depth.index
                word = b.load(
                    pointer(b, b.add(b.add(second, b.mul(m, I64(ROW_BYTES))), b.mul(k, I64(4))), F32)
                )
                a, w = broadcast(b, word), b.load(at(third, k, VECTOR), align=4)
                for half, part in ((even, low_of_pairs), (odd, high_of_pairs)):
                    product = fma(b, _flushed(b, part(b, a)), _flushed(b, part(b, w)), b.load(half))
                    b.store(_flushed(b, product), half)
            both = _flushed(b, b.fadd(b.load(even), b.load(odd)))
            before = _flushed(b, b.load(total, align=4))
            b.store(_flushed(b, b.fadd(before, both)), total, align=4)
        else:  # tdpbusd: unsigned bytes of A, signed ones of B, sums that wrap around
            total = at(first, m, VECTOR_INT)
            with cgutils.for_range(b, I64(ROW_BYTES // 4)) as depth:
                k = depth.index
                word = b.load(
                    pointer(b, b.add(b.add(second, b.mul(m, I64(ROW_BYTES))), b.mul(k, I64(4))), I32)
                )
                a, w = broadcast(b, word, VECTOR_INT), b.load(at(third, k, VECTOR_INT), align=4)
                value = b.load(total, align=4)
                for byte in range(4):
                    x = b.and_(b.lshr(a, int_const(8 * byte)), int_const(255))
                    y = b.ashr(b.shl(w, int_const(24 - 8 * byte)), int_const(24))
                    value = b.add(value, b.mul(x, y))
                b.store(value, total, align=4)
    b.ret_void()
    return f


def _flushed(b: ir.IRBuilder, x: Any) -> Any:
    """x with denormals turned into zeros of their sign."""
    bits = b.bitcast(x, VECTOR_INT)
    small = b.icmp_signed("==", b.and_(bits, int_const(0x7F800000)), int_const(0))
    return b.bitcast(b.select(small, b.and_(bits, int_const(0x80000000)), bits), VECTOR)


FORMS: dict[str, type[Instructions]] = {"amx": Instructions, "emulated": Emulation}


# Tiles


def _sums(
    b: ir.IRBuilder, f: ir.Function, on: Instructions, kind: str, down: int, columns: range,
    product: tuple[Any, Any, Any, Any, Any], window: tuple[int, int],
) -> None:  # fmt: skip
    """Emit the loop that adds a product to the sums of `down` tiles of rows and those tiles of `columns`, of which it
    reaches those in `window`. product: A, bytes between its rows, words of k, B, bytes between its k."""
    reached = [n for n in columns if window[0] <= n < window[1]]
    if not reached:
        return
    a, a_row, words, weights, step = product
    before, loop, end = b.block, f.append_basic_block(), f.append_basic_block()
    b.cbranch(b.icmp_signed(">", words, I64(0)), loop, end)
    b.position_at_end(loop)
    k, left, right = b.phi(I64), b.phi(I64), b.phi(I64)
    below = b.mul(a_row, I64(UNIT))
    for m in range(down):
        on.load(A_REGISTER + m, b.add(left, b.mul(below, I64(m))), a_row)
    for place, n in enumerate(reached):
        register = B_REGISTER[down][place % len(B_REGISTER[down])]
        on.load(register, b.add(right, I64((n - window[0]) * ROW_BYTES)), step)
        for m in range(down):
            on.multiply(kind, m * ACROSS[down] + n - columns[0], A_REGISTER + m, register)
    k_next = b.add(k, I64(UNIT))
    last = b.block
    for phi, initial, following in (
        (k, I64(0), k_next),
        (left, a, b.add(left, I64(ROW_BYTES))),
        (right, weights, b.add(right, b.mul(step, I64(UNIT)))),
    ):
        phi.add_incoming(initial, before)
        phi.add_incoming(following, last)
    b.cbranch(b.icmp_signed("<", k_next, words), loop, end)
    b.position_at_end(end)


def _each(
    on: Instructions,
    b: ir.IRBuilder,
    down: int,
    columns: range,
    do: Callable[..., None],
    base: Any,
    step: Any,
) -> None:
    """Load or store the sums from or to rows `step` bytes apart."""
    for m in range(down):
        row = b.add(base, b.mul(step, I64(UNIT * m)))
        for n in columns:
            do(m * ACROSS[down] + n - columns[0], b.add(row, I64(n * ROW_BYTES)), step)


def _function(module: ir.Module, name: str, arguments: int) -> ir.Function:
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    f.linkage = "linkonce_odr"
    f.attributes.add("noinline")
    return f


def product_tile(
    module: ir.Module, form: str, rows: int, columns: int, windows: tuple[tuple[int, int], ...]
) -> ir.Function:
    """The tile of microkernel.py for up to `rows` rows, in bfloat16: its arguments, and its sums. k in whole UNITs, A's
    words one behind the other; start and C are read and written in whole UNITs of rows."""
    down = -(-rows // UNIT)
    shape = "_".join(f"{a}to{z}" for a, z in windows)
    name = f"numlstm_tile_{form}_{down * UNIT}x{columns}_{shape}_v{VERSION}"
    if name in module.globals:
        return module.globals[name]
    f = _function(module, name, 6 * len(windows) + 4)
    b = ir.IRBuilder(f.append_basic_block())
    on = FORMS[form](b)
    start, start_step, out, out_step = f.args[-4:]
    for first in range(0, columns, ACROSS[down]):
        here = range(first, min(first + ACROSS[down], columns))
        _each(on, b, down, here, on.load, start, start_step)
        for k, window in enumerate(windows):
            a, a_row, _, words, weights, step = f.args[6 * k : 6 * (k + 1)]
            _sums(b, f, on, "bf16", down, here, (a, a_row, words, weights, step), window)
        _each(on, b, down, here, on.store, out, out_step)
    b.ret_void()
    return f


def int8_tile(module: ir.Module, form: str, columns: int) -> ir.Function:
    """The tile of quantized.py for up to ROWS rows: its arguments, and its bits. k in whole UNITs of four."""
    name = f"numlstm_dot_{form}_{columns}_v{VERSION}"
    if name in module.globals:
        return module.globals[name]
    f = _function(module, name, 12)
    a, a_row, quads, weights, first, scale_b, scale_a, start, start_step, out, out_step, rows = f.args
    b = ir.IRBuilder(f.append_basic_block())
    memory = b.alloca(ir.ArrayType(VECTOR_INT, ROWS * columns))
    memory.align = ROW_BYTES
    sums, step = b.ptrtoint(memory, I64), I64(columns * ROW_BYTES)
    on = FORMS[form](b)
    blocks = {down: f.append_basic_block() for down in (1, 2)}
    end = f.append_basic_block()
    b.cbranch(b.icmp_signed("<=", rows, I64(UNIT)), blocks[1], blocks[2])
    for down, block in blocks.items():
        b.position_at_end(block)
        for column in range(0, columns, ACROSS[down]):
            here = range(column, min(column + ACROSS[down], columns))
            _each(on, b, down, here, on.load, first, I64(0))
            _sums(b, f, on, "int8", down, here, (a, a_row, quads, weights, step), (0, columns))
            _each(on, b, down, here, on.store, sums, step)
        b.branch(end)
    b.position_at_end(end)
    at = lambda base, n, kind: pointer(b, b.add(base, I64(n * ROW_BYTES)), kind)
    of_column = [b.load(at(scale_b, n, VECTOR), align=4) for n in range(columns)]
    with cgutils.for_range(b, rows) as row:
        m = row.index
        of_row = broadcast(b, b.load(pointer(b, b.add(scale_a, b.mul(m, I64(4))), F32), align=4))
        for n in range(columns):
            total = b.load(at(b.add(sums, b.mul(m, step)), n, VECTOR_INT), align=4)
            base = b.load(at(b.add(start, b.mul(start_step, m)), n, VECTOR), align=4)
            value = fma(b, b.fmul(b.sitofp(total, VECTOR), of_row), of_column[n], base)
            b.store(value, at(b.add(out, b.mul(out_step, m)), n, VECTOR), align=4)
    b.ret_void()
    return f


# A thread's configuration

_call = caller(1)


@njit(**INNER_OPTIONS)
def begin_tiles(state: int) -> None:
    """Configure the calling thread's registers; state: the address of `state`'s array, or 0 where no tiles serve."""
    if state != 0:
        _call(load_int(state + BEGIN), state)


@njit(**INNER_OPTIONS)
def end_tiles(state: int) -> None:
    """Give the registers back, so that the system need not keep them when it switches threads."""
    if state != 0:
        _call(load_int(state + END), state)


@operation("0(i)")
def _configure(b, state):
    call(b, "llvm.x86.ldtilecfg", ir.VoidType(), pointer(b, state, I8))


@operation("0(i)")
def _release(b, state):
    call(b, "llvm.x86.tilerelease", ir.VoidType())


def _count(place: int) -> Any:
    @operation("0(i)")
    def count(b, state):
        b.atomic_rmw("add", pointer(b, b.add(state, I64(place)), I64), I64(1), "monotonic")

    return count


@cache
def state(form: str) -> np.ndarray:
    """What `begin_tiles` and `end_tiles` are given: the configuration, and the addresses of what loads it and of what gives
    the registers back. The emulation only counts how often it is called."""
    configure, release = (_configure, _release) if form == "amx" else (_count(BEGUN), _count(ENDED))

    def begin(state):
        configure(state)

    def end(state):
        release(state)

    signature = types.void(types.int64)
    made = np.zeros(12, np.int64)
    made.view(np.uint8)[:64] = CONFIG
    made[BEGIN // 8] = compile_address(begin, "tiles_begin", form, signature)
    made[END // 8] = compile_address(end, "tiles_end", form, signature)
    return made


def state_of(form: str | None) -> int:
    """The word of a plan that `begin_tiles` takes."""
    return 0 if form is None else state(form).ctypes.data
