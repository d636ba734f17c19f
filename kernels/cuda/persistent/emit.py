"""The text of the persistent kernels, forward and backward, written for a cell, a plan and the options of a call.

A step, forward: each warp waits for its part of what enters the product, h_{t-1} times its mask, as the blocks publish it
(product.py), multiplies, and leaves partial sums in shared memory; one barrier; then the threads that own (pair of units,
row) cells add the sums in a fixed order, run the cell's equations, and publish h_t. Only after that, off the path on which
the other blocks wait, they store states and saved values and load the next step's inputs. States stay in registers for the
whole sequence. The sums' memory is there twice, by turns, so that one barrier a step is enough: nobody writes half A of
step t+2 before all have passed the barrier of step t+1, and so have read half A of step t.

Backward the blocks exchange gate gradients in place of h, and a block's product gives its own units' gradient of h.

The two passes share conventions: rows of the batch beyond it repeat the last one and publish zeros where a sum over rows
would see them; units beyond H publish zeros. Everything in time order lies as (direction, step, row, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ...derive import Cell
from .equations import inline
from .places import CHUNK
from .plan import WARP, WORDS, Plan
from .product import Text, declare, load_weights, wait_and_multiply

__all__ = ["Options", "backward_text", "forward_text"]


@dataclass(frozen=True)
class Options:
    """What of a call changes the kernels' text.

    Attributes:
        training: states and saved values are stored. bias: there is one.
        masked: some steps are not valid. dropout: there is a recurrent mask.
        upstream: which of the states have a gradient at every step (backward only).
    """

    training: bool = True
    bias: bool = True
    masked: bool = False
    dropout: bool = False
    upstream: tuple[bool, ...] = ()


class _Cells:
    """The cells a thread owns: pairs of neighbouring units, each pair in one row; `p` counts them, `e` the two units."""

    def __init__(self, plan: Plan, warps: int) -> None:
        self.plan, self.threads = plan, WARP * warps
        self.per_row = plan.U // 2
        self.count = plan.pairs(warps)
        self.active = [
            min(warps, max(0, -(-(self.per_row * plan.tile - p * self.threads) // WARP)))
            for p in range(self.count)
        ]

    def each(self) -> list[tuple[int, int]]:
        return [(p, e) for p in range(self.count) for e in range(2)]

    def declare(self, text: Text) -> None:
        """Where the thread's cells are: `unit` of the first of a pair, `row{p}` of the batch, `own{p}` within the tile."""
        rows = self.threads // self.per_row
        text(f"unit = j * {self.plan.U} + (w * {WARP} + lane) % {self.per_row} * 2")
        for p in range(self.count):
            text(f"own{p} = (w * {WARP} + lane) // {self.per_row} + {p * rows}")
            text(f"row{p} = first + own{p}", f"from{p} = clamp(row{p}, B)")
        for e in range(2):
            text(
                f"unit{e} = "
                + (f"clamp(unit + {e}, {self.plan.H})" if self.plan.padded != self.plan.H else f"unit + {e}")
            )


def _head(name: str, arguments: Sequence[str], plan: Plan) -> Text:
    text = Text()
    text.lines.append(f"def {name}({', '.join(arguments)}):")
    text(
        "lane = cuda.threadIdx.x",
        "w = cuda.threadIdx.y",
        "block = cuda.blockIdx.x",
        "g = lane // 4",
        "q = lane % 4",
        f"part = quotient(block, {plan.blocks})",
        f"j = block - part * {plan.blocks}",
        "d = quotient(part, groups)",
        f"first = (part - d * groups) * {plan.tile}",
        f"rows = groups * {plan.tile}",
        "step = 0",
    )
    text("pool = cuda.shared.array(0, float32)")
    return text


def _vector(function: str, pointer: str, at: str, names: Sequence[str]) -> list[str]:
    """Loads of consecutive float32 values, two or four at a time: `at` is even, or a multiple of four if their count is."""
    size = 4 if len(names) % 4 == 0 else 2
    return [
        f"{', '.join(names[k : k + size])} = load{size}({pointer}, {at} + {k})"
        for k in range(0, len(names), size)
    ]


def _per_step(name: str, step: str, p: int, e: int) -> str:
    """The place of a broadcast step input: strides of direction, step, row, unit follow its pointer."""
    return f"d * {name}_d + ({step}) * {name}_t + from{p} * {name}_b + unit{e} * {name}_u"


def _strided(name: str) -> list[str]:
    return [name, *(f"{name}_{axis}" for axis in "dtbu")]


def forward_arguments(cell: Cell, options: Options) -> list[str]:
    """Names of the kernel's arguments, in order; capitals are pointers."""
    names = ["W", "X", *(["BIAS"] if options.bias else []), *(["PARAMS"] if cell.params else []), "S0"]
    names += ["VALID"] if options.masked else []
    names += _strided("MASK") if options.dropout else []
    names += [n for k in range(len(cell.stages[0].aux)) for n in _strided(f"AUX{k}")]
    names += ["F", *(f"Q{k}" for k in range(len(cell.state)) if k == 0 or options.training), "FINAL"]
    return (
        names
        + (["SAVED"] if options.training and cell.stages[0].saved else [])
        + ["E", "T", "B", "groups", "limit"]
    )


@cache
def forward_text(cell: Cell, plan: Plan, options: Options) -> str:
    """The forward kernel, a function called `kernel`."""
    stage, cells = cell.stages[0], _Cells(plan, plan.warps)
    states, nx, nh, Hp = len(cell.state), plan.nx, plan.nh, plan.padded
    text = _head("kernel", forward_arguments(cell, options), plan)
    declare(text, plan, back=False)
    load_weights(text, plan, back=False)
    cells.declare(text)
    if options.bias:
        text(
            *_vector(
                "load",
                "BIAS",
                f"(d * {Hp} + unit) * {nx}",
                [f"bias{e}_{k}" for e in range(2) for k in range(nx)],
            )
        )
    for k in range(len(cell.params)):
        text(f"param0_{k}, param1_{k} = load2(PARAMS, (d * {len(cell.params)} + {k}) * {Hp} + unit)")
    fields = [f"x{{0}}{{1}}_{k}" for k in range(nx)] + [f"aux{{0}}{{1}}_{k}" for k in range(len(stage.aux))]
    fields += [f"s{{0}}{{1}}_{k}" for k in range(states)] + ["fed{0}{1}"] + ["mask{0}{1}"] * options.dropout
    for p, e in cells.each():
        text(*(f"{f.format(p, e)} = float32(0)" for f in fields))
    if options.masked:
        text(*(f"valid{p} = 1" for p in range(cells.count)))

    def load_inputs(p: int, step: str) -> None:
        at = f"((d * T + {step}) * rows + row{p}) * {Hp * nx} + unit * {nx}"
        text(*_vector("load", "X", at, [f"x{p}{e}_{k}" for e in range(2) for k in range(nx)]))
        if options.masked:
            text(f"valid{p} = VALID[(d * T + {step}) * B + from{p}]")
        for e in range(2):
            for k in range(len(stage.aux)):
                text(f"aux{p}{e}_{k} = load1(AUX{k}, {_per_step(f'AUX{k}', step, p, e)})")
            if options.dropout:  # of the next step: it multiplies what this one publishes
                text(f"mask{p}{e} = load1(MASK, {_per_step('MASK', f'clamp({step} + 1, T)', p, e)})")

    def publish(p: int, step: str) -> None:
        for e in range(2):
            fed = f"s{p}{e}_0 * mask{p}{e}" if options.dropout else f"s{p}{e}_0"
            if plan.padded != plan.H:
                fed = f"where(unit + {e} < {plan.H}, {fed}, float32(0))"
            text(f"fed{p}{e} = {fed}")
        at = f"((d * T + {step}) * rows + row{p}) * {plan.row_words} + unit // {WORDS[plan.precision]}"
        if plan.precision == "bfloat16":
            text(f"publish1(F, {at}, clean(pack_bf16(fed{p}0, fed{p}1)))")
        else:
            make = "tf32" if plan.precision == "tf32" else "bits"
            text(f"publish2(F, {at}, clean({make}(fed{p}0)), clean({make}(fed{p}1)))")

    for p in range(cells.count):
        with text.block(f"if w < {cells.active[p]}:"):
            for e in range(2):
                for k in range(states):
                    text(
                        f"s{p}{e}_{k} = load1(S0, ((d * {states} + {k}) * B + from{p}) * {plan.H} + unit{e})"
                    )
                if options.dropout:
                    text(f"mask{p}{e} = load1(MASK, {_per_step('MASK', '0', p, e)})")
            publish(p, "0")
            for k in range(states if options.training else 1):
                at = f"(d * (T + 1) * rows + row{p}) * {Hp} + unit"
                text(f"store2(Q{k}, {at}, s{p}0_{k}, s{p}1_{k})")
            load_inputs(p, "0")

    with text.block("for step in range(T):"):
        size = plan.shared // 8
        text(f"red = step % 2 * {size}")
        text(
            f"at = ((d * T + step) * rows + first + g) * {plan.row_words} + w * {plan.chunks * CHUNK} + q * 4"
        )
        wait_and_multiply(text, plan, "F", back=False)
        text("dead = cuda.syncthreads_or(failed)")
        with text.block("if dead != 0:"):
            text("return")
        for p in range(cells.count):
            with text.block(f"if w < {cells.active[p]}:"):
                _sums_forward(text, plan, p)
                kept = {}
                for e in range(2):
                    kept[e] = _cell_forward(text, cell, options, p, e)
                with text.block("if step + 1 < T:"):
                    publish(p, "step + 1")
                for k in range(states if options.training else 1):
                    at = f"((d * (T + 1) + step + 1) * rows + row{p}) * {Hp} + unit"
                    text(f"store2(Q{k}, {at}, s{p}0_{k}, s{p}1_{k})")
                if options.training:
                    for k in range(stage.saved):
                        at = f"(((d * T + step) * rows + row{p}) * {stage.saved} + {k}) * {Hp} + unit"
                        text(f"store2(SAVED, {at}, {kept[0][k]}, {kept[1][k]})")
                with text.block("if step + 1 < T:"):
                    load_inputs(p, "(step + 1)")
    for p in range(cells.count):
        with text.block(f"if w < {cells.active[p]}:"):
            for k in range(states):
                at = f"((d * {states} + {k}) * rows + row{p}) * {Hp} + unit"
                text(f"store2(FINAL, {at}, s{p}0_{k}, s{p}1_{k})")
    assert nh
    return str(text)


def _sums_forward(text: Text, plan: Plan, p: int) -> None:
    """sum{p}{e}_{k}: recurrent gate k of both units, over the warps in their order."""
    names = [f"sum{p}{e}_{k}" for e in range(2) for k in range(plan.nh)]
    text(*(f"{n} = float32(0)" for n in names))
    pitch = plan.tile + 1
    with text.block(f"for v in range({plan.warps}):"):
        text(f"p = red + (v * {plan.M} + (unit - j * {plan.U}) * {plan.nh}) * {pitch} + own{p}")
        text(*(f"{n} = {n} + pool[p + {k * pitch}]" for k, n in enumerate(names)))


def _cell_forward(text: Text, cell: Cell, options: Options, p: int, e: int) -> list[str]:
    """The cell's equations for one unit: its new states in s{p}{e}_*; gives the names of the saved values."""
    stage, me = cell.stages[0], f"{p}{e}"
    lines = inline(stage.forward_source, f"c{me}_")
    known = {n: f"s{me}_{k}" for k, n in enumerate(cell.state)}
    known |= {n: f"param{e}_{k}" for k, n in enumerate(cell.params)}
    known |= {n: f"aux{me}_{k}" for k, n in enumerate(stage.aux)}
    for name in stage.pre:
        terms = []
        if name in stage.x_gates:
            k = stage.x_gates.index(name)
            terms = [f"x{me}_{k} + bias{e}_{k}" if options.bias else f"x{me}_{k}"]
        if name in stage.h_gates:
            terms.append(f"sum{me}_{stage.h_gates.index(name)}")
        known[name] = " + ".join(terms)
    text(*(f"c{me}_{a} = {known[a]}" for a in stage.forward_args))
    text(*lines.lines)
    text(*(f"out{me}_{k} = {r}" for k, r in enumerate(lines.results)))
    for k, name in enumerate(cell.state):
        new = f"out{me}_{stage.made.index(name + '1')}"
        text(f"s{me}_{k} = " + (f"where(valid{p} != 0, {new}, s{me}_{k})" if options.masked else new))
    return [f"out{me}_{len(stage.made) + k}" for k in range(stage.saved)]


def backward_arguments(cell: Cell, options: Options) -> list[str]:
    stage = cell.stages[0]
    names = ["W", *(["PARAMS"] if cell.params else []), *(["VALID"] if options.masked else [])]
    names += _strided("MASK") if options.dropout else []
    names += [n for k in range(len(stage.aux)) for n in _strided(f"AUX{k}")]
    names += [f"Q{k}" for k in range(len(cell.state))] + (["SAVED"] if stage.saved else [])
    names += [f"UP{k}" for k, there in enumerate(options.upstream) if there]
    names += ["DFINAL", "DG", *(["DX"] if separate(cell) else []), "D0", *(["DBIAS"] if options.bias else [])]
    return names + (["DPARAMS"] if cell.params else []) + ["E", "T", "B", "groups", "limit"]


def separate(cell: Cell) -> bool:
    """Whether the gradients for the input's product are others than those for the recurrent one."""
    return cell.stages[0].x_gates != cell.stages[0].h_gates


@cache
def backward_text(cell: Cell, plan: Plan, options: Options) -> str:
    """The backward kernel, a function called `kernel`."""
    stage, cells = cell.stages[0], _Cells(plan, plan.back_warps)
    states, nx, nh, Hp = len(cell.state), plan.nx, plan.nh, plan.padded
    arguments = stage.backward_args
    saved = [a for a in arguments if a[0] == "y" and a[1:].isdigit()]
    old = [s for s in cell.state if s in arguments]
    new = [s for s in cell.state if s + "1" in arguments]
    aux = [n for n in stage.aux if n in arguments]
    text = _head("kernel", backward_arguments(cell, options), plan)
    declare(text, plan, back=True)
    load_weights(text, plan, back=True)
    cells.declare(text)
    for k in range(len(cell.params)):
        text(f"param0_{k}, param1_{k} = load2(PARAMS, (d * {len(cell.params)} + {k}) * {Hp} + unit)")
    fields = [f"y{{0}}{{1}}_{k}" for k in range(len(saved))]
    fields += [f"old{{0}}{{1}}_{s}" for s in old] + [f"new{{0}}{{1}}_{s}" for s in new]
    fields += [f"aux{{0}}{{1}}_{n}" for n in aux] + [
        f"up{{0}}{{1}}_{k}" for k, up in enumerate(options.upstream) if up
    ]
    fields += [f"carry{{0}}{{1}}_{k}" for k in range(states)] + ["fed{0}{1}", "mask{0}{1}", "before{0}{1}"]
    fields += [f"dx{{0}}{{1}}_{k}" for k in range(nx)] + [f"dh{{0}}{{1}}_{k}" for k in range(nh)]
    fields += [f"dbias{{0}}{{1}}_{k}" for k in range(nx if options.bias else 0)]
    fields += [f"dparam{{0}}{{1}}_{k}" for k in range(len(cell.params))]
    for p, e in cells.each():
        text(*(f"{f.format(p, e)} = float32(0)" for f in fields))
    if options.masked:
        text(*(f"valid{p} = 1" for p in range(cells.count)))
        text(*(f"after{p} = 1" for p in range(cells.count)))
    for p in range(cells.count):
        with text.block(f"if w < {cells.active[p]}:"):
            for e in range(2):
                for k in range(states):
                    at = f"((d * {states} + {k}) * B + from{p}) * {plan.H} + unit{e}"
                    text(f"carry{p}{e}_{k} = load1(DFINAL, {at})")

    def load_inputs(p: int) -> None:
        for k in range(len(saved)):
            at = f"(((d * T + t) * rows + row{p}) * {stage.saved} + {saved[k][1:]}) * {Hp} + unit"
            text(f"y{p}0_{k}, y{p}1_{k} = load2(SAVED, {at})")
        for which, names, shift in (("old", old, "t"), ("new", new, "t + 1")):
            for s in names:
                at = f"((d * (T + 1) + {shift}) * rows + row{p}) * {Hp} + unit"
                text(f"{which}{p}0_{s}, {which}{p}1_{s} = load2(Q{cell.state.index(s)}, {at})")
        if options.masked:
            text(f"after{p} = valid{p}", f"valid{p} = VALID[(d * T + t) * B + from{p}]")
        for e in range(2):
            for n in aux:
                k = stage.aux.index(n)
                text(f"aux{p}{e}_{n} = load1(AUX{k}, {_per_step(f'AUX{k}', 't', p, e)})")
            for k, there in enumerate(options.upstream):
                if there:
                    text(f"up{p}{e}_{k} = load1(UP{k}, ((d * T + t) * B + from{p}) * {plan.H} + unit{e})")
            if options.dropout:
                text(
                    f"mask{p}{e} = before{p}{e}",
                    f"before{p}{e} = load1(MASK, {_per_step('MASK', 't', p, e)})",
                )

    with text.block("for step in range(T + 1):"):
        text("t = T - 1 - step")
        with text.block("if t >= 0:"):
            for p in range(cells.count):
                with text.block(f"if w < {cells.active[p]}:"):
                    load_inputs(p)
        text(f"red = step % 2 * {plan.back_shared // 8}")
        with text.block("if step > 0:"):
            words, part = plan.back_row_words, plan.back_chunks * CHUNK
            text(f"at = ((d * T + t + 1) * rows + first + g) * {words} + w * {part} + q * 4")
            wait_and_multiply(text, plan, "DG", back=True)
        text("dead = cuda.syncthreads_or(failed)")
        with text.block("if dead != 0:"):
            text("return")
        for p in range(cells.count):
            with text.block(f"if w < {cells.active[p]}:"):
                with text.block("if step > 0:"):
                    _sums_backward(text, plan, options, p)
                with text.block("if t >= 0:"):
                    for e in range(2):
                        _cell_backward(text, cell, plan, options, p, e)
                    _publish_gradients(text, cell, plan, p)
    for p in range(cells.count):
        with text.block(f"if w < {cells.active[p]}:"):
            for k in range(states):
                at = f"((d * {states} + {k}) * rows + row{p}) * {Hp} + unit"
                text(f"store2(D0, {at}, carry{p}0_{k}, carry{p}1_{k})")
            for k in range(len(cell.params)):
                at = f"((d * {len(cell.params)} + {k}) * rows + row{p}) * {Hp} + unit"
                text(f"store2(DPARAMS, {at}, dparam{p}0_{k}, dparam{p}1_{k})")
            if options.bias:
                for k in range(nx):
                    at = f"((d * {nx} + {k}) * rows + row{p}) * {Hp} + unit"
                    text(f"store2(DBIAS, {at}, dbias{p}0_{k}, dbias{p}1_{k})")
    return str(text)


def _sums_backward(text: Text, plan: Plan, options: Options, p: int) -> None:
    """The product's gradient of h, over the warps in their order, into the first state's; masks are of step t + 1."""
    pitch = plan.U + 1
    text(f"fed{p}0 = float32(0)", f"fed{p}1 = float32(0)")
    with text.block(f"for v in range({plan.back_warps}):"):
        text(f"p = red + (v * {plan.tile} + own{p}) * {pitch} + unit - j * {plan.U}")
        text(f"fed{p}0 = fed{p}0 + pool[p]", f"fed{p}1 = fed{p}1 + pool[p + 1]")
    if options.dropout:  # at step 0's end `before` still holds what step 0 was masked with
        with text.block("if t < 0:"):
            text(f"mask{p}0 = before{p}0", f"mask{p}1 = before{p}1")
    if options.masked:
        with text.block("if t < 0:"):
            text(f"after{p} = valid{p}")
    for e in range(2):
        d = f"fed{p}{e} * mask{p}{e}" if options.dropout else f"fed{p}{e}"
        d = f"where(after{p} != 0, {d}, float32(0))" if options.masked else d
        text(f"carry{p}{e}_0 = carry{p}{e}_0 + {d}")


def _cell_backward(text: Text, cell: Cell, plan: Plan, options: Options, p: int, e: int) -> None:
    """One unit's gradients: of its gates in dx*, dh*, of its old states in carry*, added up in dbias* and dparam*."""
    stage, me = cell.stages[0], f"{p}{e}"
    lines = inline(stage.backward_source, f"c{me}_")
    for k, there in enumerate(options.upstream):
        if there:
            text(f"carry{me}_{k} = carry{me}_{k} + up{me}_{k}")
    saved = [a for a in stage.backward_args if a[0] == "y" and a[1:].isdigit()]
    known = {n: f"y{me}_{k}" for k, n in enumerate(saved)}
    known |= {s: f"old{me}_{s}" for s in cell.state} | {s + "1": f"new{me}_{s}" for s in cell.state}
    known |= {n: f"param{e}_{k}" for k, n in enumerate(cell.params)} | {n: f"aux{me}_{n}" for n in stage.aux}
    known |= {stage.gradient_of[s + "1"]: f"carry{me}_{k}" for k, s in enumerate(cell.state)}
    text(*(f"c{me}_{a} = {known[a]}" for a in stage.backward_args))
    text(*lines.lines)
    found = dict(zip((*stage.pre, *stage.given, *stage.params), lines.results, strict=True))
    counts = f"row{p} < B"
    for n, expression in found.items():
        if options.masked and n not in cell.state:
            expression = f"where(valid{p} != 0, {expression}, float32(0))"
        if n in stage.pre:
            expression = f"where({counts}, {expression}, float32(0))"
            if plan.padded != plan.H:
                expression = f"where(unit + {e} < {plan.H}, {expression}, float32(0))"
        text(f"found{me}_{n} = {expression}")
    for k, n in enumerate(stage.x_gates):
        text(f"dx{me}_{k} = found{me}_{n}")
        if options.bias:
            text(f"dbias{me}_{k} = dbias{me}_{k} + found{me}_{n}")
    for k, n in enumerate(stage.h_gates):
        text(f"dh{me}_{k} = found{me}_{n}")
    for k, n in enumerate(cell.params):
        if n in found:
            text(f"dparam{me}_{k} = dparam{me}_{k} + found{me}_{n}")
    for k, s in enumerate(cell.state):
        d = f"found{me}_{s}"
        text(f"carry{me}_{k} = " + (f"where(valid{p} != 0, {d}, carry{me}_{k})" if options.masked else d))


def _publish_gradients(text: Text, cell: Cell, plan: Plan, p: int) -> None:
    """A pair's gate gradients as operands, gate by gate within a unit: for the other blocks, and for the products after."""
    per = WORDS[plan.precision]
    for pointer, name, count, row_words in (
        ("DG", "dh", plan.nh, plan.back_row_words),
        *([("DX", "dx", plan.nx, plan.padded * plan.nx // per)] if separate(cell) else []),
    ):
        values = [f"{name}{p}{e}_{k}" for e in range(2) for k in range(count)]
        if per == 2:
            made = [f"clean(pack_bf16({a}, {b}))" for a, b in zip(values[::2], values[1::2], strict=True)]
        else:
            made = [f"clean({'tf32' if plan.precision == 'tf32' else 'bits'}({v}))" for v in values]
        at = f"((d * T + t) * rows + row{p}) * {row_words} + unit // 2 * {2 * count // per}"
        size = 4 if len(made) % 4 == 0 else 2 if len(made) % 2 == 0 else 1
        for k in range(0, len(made), size):
            text(f"publish{size}({pointer}, {at} + {k}, {', '.join(made[k : k + size])})")
