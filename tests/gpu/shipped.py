"""Every configuration of the persistent kernels that the dispatcher takes, the kernels that they stand for, what each must
be as machine code, and the ledger of what was compiled.

A configuration is a row of the dispatch table (plan.py: its units, batches, precisions) for an LSTM or a GRU, one direction
or two, on an H100 or H200 and on an A100; each stands for five kernels: inference, forward and backward with no option, and
forward and backward with all of them. A few configurations of other cells stand beside. Many
share a kernel, so that it is the kernel, by its digest, that is compiled once and has a line in the ledger.

record_compiled.py compiles them all and writes the ledger. `make test` holds the ledger to the table as it is now, with no
compiler at hand; `make test-gpu` compiles some of them anew, others each day.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numlstm.kernels
from numlstm.kernels import cells
from numlstm.kernels.cuda.persistent import Plan, choose, supports
from numlstm.kernels.cuda.persistent.compile import kinds
from numlstm.kernels.cuda.persistent.emit import (
    Options,
    backward_arguments,
    backward_text,
    forward_arguments,
    forward_text,
)
from numlstm.kernels.cuda.persistent.plan import BATCHES, SIZES, WORDS
from numlstm.kernels.derive import Cell

LEDGER = Path(__file__).with_name("compiled.json")


class Machine(NamedTuple):
    """A GPU as the dispatcher sees it."""

    capability: tuple[int, int]
    sms: int
    shared_per_block: int


MACHINES = {
    "sm_90a": Machine((9, 0), 132, 227 << 10),  # H100, H200
    "sm_80": Machine((8, 0), 108, 163 << 10),  # A100
}
ALL_OPTIONS = cells.zoneout(cells.lstm(peephole=True))
# Cells beside the table: cell, H, B, precision.
OTHERS = (
    ("elman", cells.elman(), 1024, 32, "bfloat16"),
    ("elman", cells.elman(), 512, 32, "float32"),
    ("slstm", cells.slstm(), 512, 16, "bfloat16"),
    ("slstm", cells.slstm(), 256, 16, "tf32"),
    ("lstm_peephole_zoneout", ALL_OPTIONS, 512, 32, "bfloat16"),
    ("lstm_peephole_zoneout", ALL_OPTIONS, 650, 16, "bfloat16"),
    ("lstm_peephole_zoneout", ALL_OPTIONS, 512, 16, "tf32"),
    ("lstm_peephole_zoneout", ALL_OPTIONS, 512, 16, "float32"),
)


class Kernel(NamedTuple):
    """What is compiled, and what must come of it.

    Attributes:
        name: of the first configuration that it serves.
        text, arguments, warps, capability: as compile.py's `build` takes them.
        shared: bytes of shared memory that a launch asks for, and most: that a block of the machine may have.
        products: matrix instructions. loads: of the weights, before the first step.
    """

    name: str
    text: str
    arguments: str
    warps: int
    capability: tuple[int, int]
    shared: int
    most: int
    products: int
    loads: int


class Figures(NamedTuple):
    """What NVIDIA's tools say of a kernel's machine code, or the ledger. `shared` is what it reserves by itself; `spills`
    counts instructions on local memory, `fences` memory barriers and emptied caches, `loads` those of weights that come
    before the first look at another block's words."""

    registers: int
    stack: int
    local: int
    shared: int
    hmma: int
    spills: int
    fences: int
    loads: int


def configurations() -> Iterator[tuple[str, Cell, Machine, Plan]]:
    """Name, cell, machine and plan of each configuration."""
    yield from _rows("lstm", cells.lstm())
    for (name, cell, H, B, precision), (arch, machine) in product(OTHERS, MACHINES.items()):
        for plan in _plan(cell, machine, H, B, precision, 1):
            yield f"{name} H={H} B={B} {precision} {arch}", cell, machine, plan
    yield from _rows("gru", cells.gru())


def _rows(name: str, cell: Cell) -> Iterator[tuple[str, Cell, Machine, Plan]]:
    """A cell's rows of the dispatch table."""
    for arch, directions in product(MACHINES, (1, 2)):
        machine = MACHINES[arch]
        for H, precision, B in product(SIZES, WORDS, BATCHES):
            label = f"{name} H={H} B={B} {precision} {arch}" + " two directions" * (directions == 2)
            for plan in _plan(cell, machine, H, B, precision, directions):
                yield label, cell, machine, plan


def _plan(cell: Cell, machine: Machine, H: int, B: int, precision: str, directions: int) -> Iterator[Plan]:
    """The plan, if the dispatcher takes it."""
    capability, sms, shared = machine
    on: dict[str, Any] = {
        "precision": precision,
        "sms": sms,
        "shared_per_block": shared,
        "directions": directions,
    }
    if supports(cell, 1, B, 1, H, capability=capability, **on) is None:
        plan = choose(cell, B, H, **on)
        assert isinstance(plan, Plan)
        yield plan


def kernels() -> dict[str, Kernel]:
    """Every kernel by its digest."""
    found: dict[str, Kernel] = {}
    for label, cell, machine, plan in configurations():
        states = len(cell.state)
        plain = Options(upstream=(True,) + (False,) * (states - 1))
        every = Options(masked=True, dropout=True, upstream=(True,) * states)
        for options, which in (
            (Options(training=False), "inference"),
            (plain, "plain"),
            (every, "all options"),
        ):
            for back in (False, True) if options.training else (False,):
                name = f"{label}, {which}" + f" {'backward' if back else 'forward'}" * options.training
                kernel = _kernel(name, cell, machine, plan, options, back)
                found.setdefault(digest(kernel), kernel)
    return found


def _kernel(name: str, cell: Cell, machine: Machine, plan: Plan, options: Options, back: bool) -> Kernel:
    capability, _, most = machine
    times = 3 if plan.precision == "float32" else 1
    if back:
        text, arguments = backward_text(cell, plan, options), backward_arguments(cell, options)
        products, loads = plan.back_chunks * plan.U // 8 * 2 * plan.back_tiles, plan.back_chunks * plan.U // 8
        warps, shared = plan.back_warps, plan.back_shared
    else:
        text, arguments = forward_text(cell, plan, options), forward_arguments(cell, options)
        loads = plan.chunks * (plan.M // 16) * 2
        products, warps, shared = loads * (plan.tile // 8), plan.warps, plan.shared
    return Kernel(name, text, kinds(arguments), warps, capability, shared, most, products * times, loads)


def digest(kernel: Kernel) -> str:
    """Of all that the machine code is made from, besides the compilers: 16 hexadecimal digits."""
    made = (
        kernel.text,
        kernel.arguments,
        str(kernel.warps),
        "{}.{}".format(*kernel.capability),
        _compiling(),
    )
    return hashlib.sha256("\0".join(made).encode()).hexdigest()[:16]


@cache
def _compiling() -> str:
    """The code that makes machine code of a kernel's text, without its comments and docstrings."""
    folder = Path(numlstm.kernels.__file__).parent / "cuda"
    parts = [code_of(read(folder / n)) for n in ("ptx.py", "persistent/places.py", "persistent/compile.py")]
    compiler = read(folder / "compiler.py")
    linked = next(
        n for n in ast.parse(compiler).body if isinstance(n, ast.FunctionDef) and n.name == "linked"
    )
    parts.append(code_of("\n".join(compiler.split("\n")[linked.lineno - 1 : linked.end_lineno]) + "\n"))
    return "\0".join(parts)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_of(source: str) -> str:
    """Python source without comments, docstrings and empty lines, the same from every version of Python."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines[value.lineno - 1 : value.end_lineno] = [""] * (value.end_lineno - value.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def faults(kernel: Kernel, figures: Figures) -> list[str]:
    """What is wrong with a kernel's machine code, for people."""
    threads = 32 * kernel.warps
    expected = {
        "no stack": figures.stack == 0,
        "no local memory": figures.local == figures.spills == 0,
        "no memory barrier": figures.fences == 0,
        f"at most {min(255, 65536 // threads)} registers, for {threads} threads": (
            figures.registers <= min(255, 65536 // threads)
        ),
        f"at most {kernel.most} bytes of shared memory with the launch's {kernel.shared}": (
            figures.shared + kernel.shared <= kernel.most
        ),
        f"{kernel.products} matrix instructions": figures.hmma == kernel.products,
        f"{kernel.loads} loads of weights before the first step": figures.loads >= kernel.loads,
    }
    return [f"{kernel.name}: expected {what}, got {figures}" for what, right in expected.items() if not right]


class Ledger(NamedTuple):
    """The compilers' versions, and each kernel's name and figures by its digest."""

    compilers: dict[str, str]
    lines: dict[str, tuple[str, Figures]]


def load() -> Ledger:
    """The ledger as it was recorded; an empty one where there is none."""
    if not LEDGER.exists():
        return Ledger({}, {})
    held = json.loads(read(LEDGER))
    assert held["columns"] == columns()
    return Ledger(held["compilers"], {d: (name, Figures(*rest)) for d, name, *rest in held["kernels"]})


def columns() -> list[str]:
    return ["digest", "first configuration", *Figures._fields]


def written(ledger: Ledger) -> str:
    """The ledger's file: a line a kernel."""
    lines = [json.dumps([d, name, *figures]) for d, (name, figures) in ledger.lines.items()]
    head = f'{{"compilers": {json.dumps(ledger.compilers, sort_keys=True)},\n"columns": {json.dumps(columns())},\n'
    return head + '"kernels": [\n' + ",\n".join(lines) + "\n]}\n"
