"""From a cell's stages to one fused kernel a stage and direction, as text; and what a step back through time does.

A kernel's thread takes one unit of one row: it reads its pre-activations, old states, vectors, parameters and step inputs,
calls the stage's emitted equations (derive.py), and writes states, vectors and saved values; on the way back it reads the
gradients of what the stage made and writes those of its pre-activations, vectors and old states, and adds up those of
biases and parameters in cells that only it touches, so that no sum depends on an order of threads. Rows that are not
valid carry their states over, and hand their states' gradients on.

Names of arrays: `X` (T, B, G H) the input's products; `R` (B, n W) this stage's recurrent product; `S_h` a state at all
steps (or at two of them, without training); `V_w0` a vector; `P_p` a parameter; `A_z` a step input; `Y` (T, S, B, W) what
the stage saves; `F1` (T, B, W) what stage 1's product reads, where it is not a vector itself: masked, or rounded. Backward:
`D_h` (2, B, W) the gradient of a state after and before the step; `U_h` (T, B, W) what comes from above; `E_w0` (B, W) the
gradient of a vector; `DX` (T, B, G H) and `DR` (T, B, n W) those of the pre-activations, by the input and by the recurrent
product; `DB` (B, G H) and `DP_p` (B, W) the sums over the steps. An array that is not given is one element, read with a
stride of 0 (`bias_s`, `valid_s`, `U_h_s`).

`t` is the step, `f` is 1 if all steps are kept and 0 if only the last; `o` and `n` say which of two slots is before the step
and which after it: of states when only the last are kept, and of their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from ..derive import NORM_EPSILON, Cell, Stage
from .compiler import Kernel, Parameter, from_text, parameters
from .device import ROW_THREADS, SIMULATED

__all__ = [
    "Form",
    "Step",
    "all_kernels",
    "backward_kernel",
    "backward_steps",
    "column_sum_kernel",
    "feed_kernel",
    "forward_kernel",
    "masked_kernel",
    "norm_backward_kernel",
    "norm_kernel",
    "one_gradient",
    "operand_kernel",
    "producers",
]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """Which of its forms a cell's kernels take.

    Attributes:
        dtype: the float type.
        rounding: how operands of products are stored: "none" as they are, "bits" as the uint16 of bfloat16, "bfloat16"
            or "tf32" rounded to those in the float type itself.
        feeds: the stages whose product reads a copy (`F1`).
        bias: whether its gradient is asked for.
        training: whether values are saved.
    """

    dtype: str
    rounding: str = "none"
    feeds: tuple[int, ...] = ()
    bias: bool = False
    training: bool = True

    @property
    def operand(self) -> str:
        """The kind of an array of operands."""
        return "bits" if self.rounding == "bits" else "real"

    def rounded(self, text: str) -> str:
        """`text` as an operand is stored."""
        names = {"none": "", "bits": "round_bits", "bfloat16": "round_bfloat16", "tf32": "round_tf32"}
        return f"{names[self.rounding]}({text})"


def producers(cell: Cell) -> dict[int, int | None]:
    """For each stage with a recurrent product the stage that makes what it reads; None where a `normalize` does."""
    made = {name: k for k, stage in enumerate(cell.stages) for name in stage.made}
    return {
        k: made.get(stage.source + "1" if stage.source in cell.state else stage.source)
        for k, stage in enumerate(cell.stages)
        if stage.h_gates
    }


class _Text:
    """A kernel under construction: its lines, and the arrays and numbers that they name, each once."""

    def __init__(self, cell: Cell, form: Form) -> None:
        self.cell, self.form = cell, form
        self.arrays: dict[str, str] = {}
        self.numbers: dict[str, None] = {}
        self.lines: list[str] = []

    def array(self, name: str, kind: str = "real") -> str:
        self.arrays[name] = kind
        return name

    def say(self, line: str) -> None:
        self.lines.append(line)

    def value(self, name: str) -> str:
        """Where the value of a state, a new state or a vector lies at this step."""
        states = self.cell.state
        if name in states:
            at = "t" if name == states[0] or self.form.training else "o"
            return f"{self.array('S_' + name)}[{at} * B * W + e]"
        if name[:-1] in states and name[-1] == "1":
            at = "(t + 1)" if name[:-1] == states[0] or self.form.training else "n"
            return f"{self.array('S_' + name[:-1])}[{at} * B * W + e]"
        return f"{self.array('V_' + name)}[t * f * B * W + e]"

    def gradient(self, name: str) -> str:
        """Where the gradient of such a value lies."""
        states = self.cell.state
        if name in states:
            return f"{self.array('D_' + name)}[o * B * W + e]"
        if name[:-1] in states and name[-1] == "1":
            return f"{self.array('D_' + name[:-1])}[n * B * W + e]"
        return f"{self.array('E_' + name)}[e]"

    def broadcast(self, prefix: str, step: str) -> str:
        """An element of an array that broadcasts to (T, B, W)."""
        self.numbers |= dict.fromkeys((f"{prefix}_t", f"{prefix}_b", f"{prefix}_j"))
        return f"{self.array(prefix)}[{step} * {prefix}_t + b * {prefix}_b + j * {prefix}_j]"

    def live(self) -> str:
        self.numbers["valid_s"] = None
        return f"{self.array('valid', 'flag')}[(t * B + b) * valid_s] != 0"

    def given(self, stage: Stage, name: str) -> str:
        """The value of an argument of a stage's functions, other than a pre-activation."""
        if name in stage.params:
            return f"{self.array('P_' + name)}[j]"
        return self.broadcast("A_" + name, "t") if name in stage.aux else self.value(name)

    def over_rows(self, name: str, functions: str) -> Kernel:
        """The kernel, with a thread a column and blocks that stride over rows."""
        head = ["j = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x", "b = cuda.blockIdx.y"]
        body = ["e = b * W + j", *self.lines, "b += cuda.gridDim.y"]  # no range(): it divides by its step
        return self.kernel(
            name, functions, [*head, "while j < W and b < B:", *("    " + line for line in body)]
        )

    def by_row(self, name: str, functions: str) -> Kernel:
        """The kernel, with a block a row."""
        head = [f"part = {SHARED}", "i = cuda.threadIdx.x"]
        body = [*self.lines, "b += cuda.gridDim.x"]
        head += ["b = cuda.blockIdx.x", "while b < B:"]
        return self.kernel(name, functions, [*head, *("    " + line for line in body)])

    def kernel(self, name: str, functions: str, body: list[str]) -> Kernel:
        numbers = [*self.numbers, "T", "B", "W", "H", "f", "t", "o", "n"]
        named = (
            *(Parameter(n, kind) for n, kind in self.arrays.items()), *(Parameter(n, "int") for n in numbers)
        )  # fmt: skip
        head = f"def kernel({', '.join(p.name for p in named)}):"
        text = "\n".join([head, *("    " + line for line in body)]) + "\n"
        full = f"{self.cell.name}_{name}"
        return from_text(full, functions + "\n\n" + text, named, self.form.dtype)


def _unpack(count: int, prefix: str) -> str:
    return ", ".join(f"{prefix}{k}" for k in range(count)) + ("," if count == 1 else "")


def _zeros(source: str) -> list[bool]:
    """Which of the values that an emitted function returns are the constant 0."""
    line = source.rstrip().rpartition("\n")[2].strip().removeprefix("return ")
    parts, depth, part = [], 0, ""
    for ch in line:
        depth += (ch == "(") - (ch == ")")
        if ch == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += ch
    return [p == "K(0.0)" for p in (*parts, part.strip()) if p]


def _feed(text: _Text, k: int, value: str, step: str) -> str:
    """The line that stores what stage k's product reads at `step`."""
    if not text.cell.stages[k].projects:
        value = f"{value} * {text.broadcast('mask', step)}"
    slot = text.array(f"F{k}", text.form.operand)
    return f"{slot}[{step} * f * B * W + e] = {text.form.rounded(value)}"


def forward_kernel(cell: Cell, k: int, form: Form) -> Kernel:
    """Stage k's forward pass."""
    stage, text = cell.stages[k], _Text(cell, form)
    feeding = [p for p, maker in producers(cell).items() if maker == k and p in form.feeds]
    for i, name in enumerate(stage.pre):
        parts = []
        if name in stage.x_gates:
            gate = cell.gates.index(name if name in cell.gates else name.removesuffix("_x"))
            text.numbers["bias_s"] = None
            parts.append(f"{text.array('X')}[((t * B + b) * {len(cell.gates)} + {gate}) * H + j]")
            parts.append(f"{text.array('bias')}[({gate} * H + j) * bias_s]")
        if name in stage.h_gates:
            at = stage.h_gates.index(name)
            parts.append(f"{text.array('R')}[(b * {len(stage.h_gates)} + {at}) * W + j]")
        text.say(f"p{i} = {' + '.join(parts)}")
    arguments = [
        f"p{stage.pre.index(a)}" if a in stage.pre else text.given(stage, a) for a in stage.forward_args
    ]
    made, count = stage.made, len(stage.made) + stage.saved
    text.say(f"{_unpack(count, 'r')} = forward({', '.join(arguments)})")
    new_states = [m for m in made if m[:-1] in cell.state and m[-1] == "1"]
    if new_states:
        text.say(f"live = {text.live()}")
    for i, m in enumerate(made):
        if m in new_states:
            text.say(f"r{i} = r{i} if live else {text.value(m[:-1])}")
        text.say(f"{text.value(m)} = r{i}")
    if form.training:
        for i in range(stage.saved):
            text.say(f"{text.array('Y')}[((t * {stage.saved} + {i}) * B + b) * W + j] = r{len(made) + i}")
    for p in feeding:
        source = cell.stages[p].source
        if source in cell.state:  # what the next step reads
            text.say("if t + 1 < T:")
            text.say("    " + _feed(text, p, f"r{made.index(source + '1')}", "(t + 1)"))
        else:
            text.say(_feed(text, p, f"r{made.index(source)}", "t"))
    return text.over_rows(f"forward{k}", "@jit\n" + stage.forward_source)


def feed_kernel(cell: Cell, k: int, form: Form) -> Kernel:
    """What stage k's product reads at step t, where no stage's kernel stores it: at the first step, and behind a
    `normalize`."""
    text = _Text(cell, form)
    text.say(_feed(text, k, text.value(cell.stages[k].source), "t"))
    return text.over_rows(f"feed{k}", "")


# A number for each thread of a block. The simulator makes such arrays when a thread first asks, and of two that ask at once
# each may get its own; blocks run one after another there, so that one array serves them all.
SHARED = "shared_part" if SIMULATED else f"cuda.shared.array({ROW_THREADS}, real)"

# A sum over the threads of a block, the same to all of them, in an order that is always the same.
BLOCK_SUM = f"""
@jit
def block_sum(value, part, i):
    cuda.syncthreads()
    part[i] = value
    cuda.syncthreads()
    half = {ROW_THREADS // 2}
    while half > 0:
        if i < half:
            part[i] = part[i] + part[i + half]
        cuda.syncthreads()
        half = half // 2
    return part[0]
"""


def norm_kernel(cell: Cell, k: int, index: int, form: Form) -> Kernel:
    """The forward pass of one of stage k's norms: Ba, Kiros and Hinton 2016, equation 4, jointly over its vectors."""
    norm, text = cell.stages[k].norms[index], _Text(cell, form)
    inputs = [text.value(v) for v in norm.inputs]
    total, many = " + ".join(f"x{i}" for i in range(len(inputs))), f"K({len(inputs)} * W)"
    load = [f"    x{i} = {v}" for i, v in enumerate(inputs)]
    loop = [f"for j in range(i, W, {ROW_THREADS}):", "    e = b * W + j", *load]
    squares = " + ".join(f"(x{i} - mean) * (x{i} - mean)" for i in range(len(inputs)))
    scale = text.array("scale")
    text.lines += [
        "total = K(0)", *loop, f"    total += {total}", f"mean = block_sum(total, part, i) / {many}",
        "total = K(0)", *loop, f"    total += {squares}",
        f"factor = K(1) / sqrt(block_sum(total, part, i) / {many} + K({NORM_EPSILON}))",
        "if i == 0:", f"    {scale}[t * f * B + b] = factor",
        *loop, *(f"    {text.value(v)} = (x{i} - mean) * factor" for i, v in enumerate(norm.outputs)),
    ]  # fmt: skip
    return text.by_row(f"norm{k}_{index}", BLOCK_SUM)


def norm_backward_kernel(
    cell: Cell, k: int, index: int, form: Form, known: tuple[str, ...], adds: tuple[str, ...]
) -> Kernel:
    """Its backward pass; `known`: the outputs that have a gradient, `adds`: the inputs whose gradients have begun."""
    norm, text = cell.stages[k].norms[index], _Text(cell, form)
    count = len(norm.outputs)
    many = f"K({count} * W)"
    load = [f"    y{i} = {text.value(v)}" for i, v in enumerate(norm.outputs)]
    load += [f"    d{i} = {text.gradient(v) if v in known else 'K(0)'}" for i, v in enumerate(norm.outputs)]
    loop = [f"for j in range(i, W, {ROW_THREADS}):", "    e = b * W + j", *load]
    text.lines += [
        "total = K(0)", "weighted = K(0)", *loop,
        *(f"    total += d{i}" for i in range(count)), *(f"    weighted += d{i} * y{i}" for i in range(count)),
        f"mean = block_sum(total, part, i) / {many}", f"along = block_sum(weighted, part, i) / {many}",
        f"factor = {text.array('scale')}[t * f * B + b]",
        *loop,
    ]  # fmt: skip
    for i, v in enumerate(norm.inputs):
        sign = "+=" if v in adds else "="
        text.say(f"    {text.gradient(v)} {sign} factor * (d{i} - mean - y{i} * along)")
    return text.by_row(f"norm_backward{k}_{index}", BLOCK_SUM)


def backward_kernel(cell: Cell, k: int, form: Form, known: tuple[str, ...], adds: tuple[str, ...]) -> Kernel:
    """Stage k's backward pass; `known`: the vectors it made that have a gradient, `adds`: those of what it was given whose
    gradients have begun."""
    stage, text = cell.stages[k], _Text(cell, form)
    new_states = [m for m in stage.made if m[:-1] in cell.state and m[-1] == "1"]
    arriving = {}
    for i, m in enumerate(stage.made):
        if m in new_states:
            s = m[:-1]
            text.numbers[f"U_{s}_s"] = None
            above = f"{text.array('U_' + s)}[((t * B + b) * W + j) * U_{s}_s]"
            text.say(f"d{i} = {text.gradient(m)} + {above}")
            arriving[stage.gradient_of[m]] = f"d{i}"
        else:
            arriving[stage.gradient_of[m]] = text.gradient(m) if m in known else "K(0)"
    arguments = []
    for a in stage.backward_args:
        if a in arriving:
            arguments.append(arriving[a])
        elif a[0] == "y" and a[1:].isdigit():
            arguments.append(f"{text.array('Y')}[((t * {stage.saved} + {a[1:]}) * B + b) * W + j]")
        else:
            arguments.append(text.given(stage, a))
    zero = _zeros(stage.backward_source)
    text.say(f"live = {text.live()}")
    text.say(f"{_unpack(len(zero), 'r')} = backward({', '.join(arguments)})")
    found = (*stage.pre, *stage.given, *stage.params)
    for i in range(len(found)):
        if not zero[i]:
            text.say(f"r{i} = r{i} if live else K(0)")
    for i, name in enumerate(stage.pre):
        stored = form.rounded(f"r{i}")
        if name in stage.x_gates:
            gate = cell.gates.index(name if name in cell.gates else name.removesuffix("_x"))
            place = f"{len(cell.gates)} + {gate}) * H + j]"
            text.say(f"{text.array('DX', form.operand)}[((t * B + b) * {place} = {stored}")
            if form.bias:
                text.say(f"{text.array('DB')}[(b * {place} += r{i}")
        if name in stage.h_gates and not one_gradient(cell):
            at = stage.h_gates.index(name)
            place = f"((t * B + b) * {len(stage.h_gates)} + {at}) * W + j"
            text.say(f"{text.array('DR', form.operand)}[{place}] = {stored}")
    for i, name in enumerate(stage.given, len(stage.pre)):
        value = f"r{i}"
        if name + "1" in new_states:  # a step that is not valid hands the state's gradient on
            value = f"({value} if live else d{stage.made.index(name + '1')})"
        elif zero[i] and name in adds:
            continue
        text.say(f"{text.gradient(name)} {'+=' if name in adds else '='} {value}")
    for m in new_states:
        s = m[:-1]
        if s not in stage.given:
            value = f"(K(0) if live else d{stage.made.index(m)})"
            text.say(f"{text.gradient(s)} {'+=' if s in adds else '='} {value}")
    for i, p in enumerate(stage.params, len(stage.pre) + len(stage.given)):
        text.say(f"{text.array('DP_' + p)}[e] += r{i}")
    return text.over_rows(f"backward{k}", "@jit\n" + stage.backward_source)


def one_gradient(cell: Cell) -> bool:
    """Whether the gradients by the input's and by the recurrent product are one array: LSTM's are."""
    stage = cell.stages[0]
    return len(cell.stages) == 1 and stage.x_gates == stage.h_gates == cell.gates


def masked_kernel(cell: Cell, k: int, form: Form, adds: bool) -> Kernel:
    """From `M` (B, W), the gradient of what stage k's product read, to that of its source: times the mask."""
    text = _Text(cell, form)
    value = f"{text.array('M')}[e] * {text.broadcast('mask', 't')}"
    text.say(f"{text.gradient(cell.stages[k].source)} {'+=' if adds else '='} {value}")
    return text.over_rows(f"masked{k}", "")


@dataclass(frozen=True)
class Step:
    """One thing that a step back through time does.

    Attributes:
        kind: "stage" (its backward kernel), "product" (of the gradients with the recurrent weights, into the source's
            gradient) or "norm" (the backward pass of its `index`-th norm).
        known: the names whose gradients there are.
        adds: the names whose gradients have begun, so that this adds to them; for a product, its source.
    """

    kind: str
    stage: int
    index: int = 0
    known: tuple[str, ...] = ()
    adds: tuple[str, ...] = field(default=())


def backward_steps(cell: Cell) -> tuple[Step, ...]:
    """What a step back does, in order. Which gradients have begun is known beforehand: the first who writes one sets
    it, and nothing has to be cleared."""
    steps: list[Step] = []
    begun = {s + "1" for s in cell.state}

    for k, stage in reversed(list(enumerate(cell.stages))):
        known = tuple(m for m in stage.made if m in begun)
        adds = tuple(n for n in dict.fromkeys((*stage.given, *cell.state)) if n in begun)
        steps.append(Step("stage", k, known=known, adds=adds))
        begun -= {m for m in stage.made if m[:-1] not in cell.state}
        begun |= {*stage.given, *(m[:-1] for m in stage.made if m[:-1] in cell.state)}
        if stage.h_gates:
            source = stage.source
            steps.append(Step("product", k, adds=(source,) if source in begun else ()))
            begun.add(source)
        for index, norm in enumerate(stage.norms):
            known = tuple(n for n in norm.outputs if n in begun)
            begun -= set(norm.outputs)
            adds = tuple(n for n in norm.inputs if n in begun)
            steps.append(Step("norm", k, index, known, adds))
            begun |= set(norm.inputs)
    return tuple(steps)


@cache
def operand_kernel(form: Form) -> Kernel:
    """`target` gets the elements of `source` as operands are stored."""
    text = f"""
def kernel(source, target, size):
    e = cuda.grid(1)
    while e < size:
        target[e] = {form.rounded("source[e]")}
        e += cuda.gridsize(1)
"""
    kinds = (*parameters(real="source"), Parameter("target", form.operand), *parameters(index="size"))
    return from_text(f"operand_{form.rounding}", text, kinds, form.dtype)


@cache
def column_sum_kernel(dtype: str) -> Kernel:
    """`total` (N,) gets the sums of the columns of `source` (B, N), each in the order of the rows."""
    text = """
def kernel(source, total, B, N):
    j = cuda.grid(1)
    while j < N:
        value = K(0)
        for b in range(B):
            value += source[b * N + j]
        total[j] = value
        j += cuda.gridsize(1)
"""
    return from_text("column_sum", text, parameters(real="source total", index="B N"), dtype)


def all_kernels(cell: Cell, form: Form) -> list[Kernel]:
    """Every kernel of a cell in one form, for who checks what they compile to."""
    found = []
    for k, stage in enumerate(cell.stages):
        found.append(forward_kernel(cell, k, form))
        found += [norm_kernel(cell, k, index, form) for index in range(len(stage.norms))]
        if k in form.feeds:
            found.append(feed_kernel(cell, k, form))
    for step in backward_steps(cell):
        if step.kind == "stage":
            found.append(backward_kernel(cell, step.stage, form, step.known, step.adds))
        elif step.kind == "norm":
            found.append(norm_backward_kernel(cell, step.stage, step.index, form, step.known, step.adds))
        elif step.stage in form.feeds:
            found.append(masked_kernel(cell, step.stage, form, bool(step.adds)))
    return found
