"""A stack of layers stepped through in one native call: weights packed once, nothing allocated.

Nothing is compiled for a stack. Its plan is a table of calls, each the address of a kernel and that of the kernel's own
plan, and one small driver makes them in turn. A recurrent layer's call is its cell's forward kernel (fused.py, staged.py,
for int8 weights quantized.py) on a sequence of one step whose weights are packed already, so that cells, tiles and layouts
are those of `predict`; a dense layer is a cell without recurrence. The rest are kernels over the rows of (B, F), below.

Values between layers and states are float32, whatever the products read: in bfloat16 the states are rounded anew at each
step, since whoever holds them may have written others.

One thread runs a step: at batch 1 the weights come from the caches, and a second thread would take longer to wake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..cells import feedforward
from ..int8 import Quantized
from ..stream import Activation, Lookup, Masking, Normalization, Recurrence, Softmax, Step
from . import math as vector_math
from . import quantized, sequence
from .bfloat16 import round_rows
from .cache import compile_kernel
from .isa import LANES
from .layout import P
from .math import exp, log, maximum, sqrt
from .plan import SIGNATURE, get, make_plan
from .simd import (
    INNER_OPTIONS,
    K,
    caller,
    horizontal_max,
    horizontal_sum,
    keep_n,
    load_byte,
    load_int,
    load_n,
    load_n_else,
    load_scalar,
    splat,
    store_byte,
    store_n,
    where,
)
from .tiles import inline
from .workspace import aligned

__all__ = ["Stack"]

CALL_BYTES = 16  # of a call in the table: a kernel's address, then its plan's


class Rows(IntEnum):
    """Places in the plan of a kernel over rows."""

    B = 0
    F = auto()
    X = auto()
    X_ROW = auto()  # bytes between rows
    OUT = auto()
    OUT_ROW = auto()
    GAMMA = auto()  # 0: none
    BETA = auto()
    NUMBERS = auto()  # float32: the epsilon of a normalization, the value that masks
    VALID = auto()  # bytes [B], for what masks rows; 0: nothing does
    ALSO = auto()  # 1: a row that was masked before stays so
    LOGARITHM = auto()


call_kernel: Any = caller(3)  # a plan, the shard, how many shards there are


def _run(p, calls, _):
    """The driver; p: the table."""
    for k in range(calls):
        call_kernel(load_int(p + k * CALL_BYTES), load_int(p + k * CALL_BYTES + 8), 0, 1)


def _copy(p, shard, shards):
    F, x, out = get(p, Rows.F), get(p, Rows.X), get(p, Rows.OUT)
    for _ in range(get(p, Rows.B)):
        for q in range(0, F, LANES):
            store_n(out + q * 4, load_n(x + q * 4, F - q), F - q)
        x += get(p, Rows.X_ROW)
        out += get(p, Rows.OUT_ROW)


@njit(**INNER_OPTIONS)
def _mark(p, valid, counts):
    """Say whether a row counts."""
    if get(p, Rows.ALSO) != 0:
        counts = counts and load_byte(valid) != 0
    store_byte(valid, 1 if counts else 0)


def _round(p, shard, shards):
    """Rows in bfloat16."""
    x, out = get(p, Rows.X), get(p, Rows.OUT)
    round_rows(x, get(p, Rows.X_ROW), get(p, Rows.F), out, get(p, Rows.OUT_ROW), 0, get(p, Rows.B))


def _lookup(p, shard, shards):
    F, ids, out, valid = get(p, Rows.F), get(p, Rows.X), get(p, Rows.OUT), get(p, Rows.VALID)
    for b in range(get(p, Rows.B)):
        row = load_int(ids + 8 * b)
        x = get(p, Rows.GAMMA) + row * F * 4
        for q in range(0, F, LANES):
            store_n(out + q * 4, load_n(x + q * 4, F - q), F - q)
        out += get(p, Rows.OUT_ROW)
        if valid != 0:
            _mark(p, valid + b, row != 0)


def _masking(p, shard, shards):
    F, x, out, valid = get(p, Rows.F), get(p, Rows.X), get(p, Rows.OUT), get(p, Rows.VALID)
    value = splat(load_scalar(get(p, Rows.NUMBERS)))
    for b in range(get(p, Rows.B)):
        differs = K(0.0)
        for q in range(0, F, LANES):
            here = load_n_else(x + q * 4, F - q, value)
            same = where(here <= value, where(value <= here, K(0.0), K(1.0)), K(1.0))
            differs = maximum(differs, same)
        counts = horizontal_max(differs)
        for q in range(0, F, LANES):
            store_n(out + q * 4, load_n(x + q * 4, F - q) * splat(counts), F - q)
        x += get(p, Rows.X_ROW)
        out += get(p, Rows.OUT_ROW)
        _mark(p, valid + b, counts != np.float32(0))


def _softmax(p, shard, shards):
    F, x, out = get(p, Rows.F), get(p, Rows.X), get(p, Rows.OUT)
    for _ in range(get(p, Rows.B)):
        top = K(-np.inf)
        for q in range(0, F, LANES):
            top = maximum(top, load_n_else(x + q * 4, F - q, K(-np.inf)))
        largest, total = splat(horizontal_max(top)), K(0.0)
        for q in range(0, F, LANES):
            e = exp(load_n(x + q * 4, F - q) - largest)
            total = total + keep_n(e, F - q)
            store_n(out + q * 4, e, F - q)
        whole = splat(horizontal_sum(total))
        for q in range(0, F, LANES):
            if get(p, Rows.LOGARITHM) != 0:
                store_n(out + q * 4, load_n(x + q * 4, F - q) - largest - log(whole), F - q)
            else:
                store_n(out + q * 4, load_n(out + q * 4, F - q) / whole, F - q)
        x += get(p, Rows.X_ROW)
        out += get(p, Rows.OUT_ROW)


def _normalization(p, shard, shards):
    F, x, out, gamma, beta = (
        get(p, Rows.F),
        get(p, Rows.X),
        get(p, Rows.OUT),
        get(p, Rows.GAMMA),
        get(p, Rows.BETA),
    )
    epsilon, share_of_one = splat(load_scalar(get(p, Rows.NUMBERS))), splat(np.float32(1.0) / np.float32(F))
    for _ in range(get(p, Rows.B)):
        total = K(0.0)
        for q in range(0, F, LANES):
            total = total + load_n(x + q * 4, F - q)
        mean, total = splat(horizontal_sum(total)) * share_of_one, K(0.0)
        for q in range(0, F, LANES):
            off = load_n(x + q * 4, F - q) - mean
            total = total + keep_n(off * off, F - q)
        factor = K(1.0) / sqrt(splat(horizontal_sum(total)) * share_of_one + epsilon)
        for q in range(0, F, LANES):
            value = (load_n(x + q * 4, F - q) - mean) * factor
            if gamma != 0:
                value = value * load_n(gamma + q * 4, F - q)
            if beta != 0:
                value = value + load_n(beta + q * 4, F - q)
            store_n(out + q * 4, value, F - q)
        x += get(p, Rows.X_ROW)
        out += get(p, Rows.OUT_ROW)


def _activation_source(name: str) -> str:
    """The text of a kernel over rows that applies an activation, its equation as it is emitted for cells."""
    (stage,) = feedforward(name).stages
    indent = " " * 12
    statements = inline(
        stage.forward_source, stage.forward_args, ["y", *(f"s{k}" for k in range(stage.saved))], indent
    )
    return "\n".join([
        "def activation(p, shard, shards):",
        f"    F = get(p, {Rows.F:d}); x = get(p, {Rows.X:d}); out = get(p, {Rows.OUT:d})",
        f"    for _ in range(get(p, {Rows.B:d})):",
        f"        for q in range(0, F, {LANES}):",
        f"{indent}_{stage.pre[0]} = load_n(x + q * 4, F - q)",
        *statements,
        f"{indent}store_n(out + q * 4, _y, F - q)",
        f"        x += get(p, {Rows.X_ROW:d}); out += get(p, {Rows.OUT_ROW:d})\n",
    ])  # fmt: skip


@cache
def _activation(name: str) -> Any:
    source = _activation_source(name)
    scope = dict(vector_math.NAMES, K=K, get=get, load_n=load_n, store_n=store_n)
    exec(compile(source, f"<activation {name}>", "exec"), scope)
    return compile_kernel(scope["activation"], "rows_activation", source, SIGNATURE)


@cache
def _kernel(function: Callable[..., Any]) -> Any:
    return compile_kernel(function, f"stream{function.__name__}", "", SIGNATURE)


class Stack:
    """Layers of one model, or some of its neighbouring layers, stepped through together.

    Args:
        steps: the layers, first to last.
        batch: rows.
        features: of the input; nothing for a `Lookup`, which takes ids.
        masked: the input may have masked rows: the caller writes `valid` before each step.

    Attributes:
        x: the input, (batch, features) float32 or (batch,) int64, to be written before `run`.
        y: the output (batch, F), good until the next `run`.
        valid: which rows of the latest step count, (batch,) bool; None where all always do.
        masks: whether a layer among them masks rows.
        states: for each `Recurrence` that remembers, its states (batch, units), which may be written.

    Raises:
        ValueError: arrays whose shapes do not fit.

    >>> import numpy as np
    >>> from numlstm.kernels.stream import dense
    >>> stack = Stack([dense(np.eye(2, dtype=np.float32), None, "relu")], batch=1, features=2)
    >>> stack.x[...] = -1, 3
    >>> stack.run()
    >>> stack.y.tolist()
    [[0.0, 3.0]]
    """

    def __init__(
        self, steps: Sequence[Step], batch: int, features: int | None = None, *, masked: bool = False
    ) -> None:
        if batch < 1 or (features is None) != (bool(steps) and isinstance(steps[0], Lookup)):
            raise ValueError(
                f"stack: expected a batch of at least 1, and features unless it begins with a lookup, "
                f"got batch {batch} and features {features}"
            )
        self.batch = batch
        self._calls: list[tuple[int, int]] = []
        self._kept: list[Any] = []  # what plans point into, and kernels whose addresses they hold
        self.masks: bool = any(isinstance(s, Masking) or (isinstance(s, Lookup) and s.masks) for s in steps)
        self.valid: np.ndarray | None = np.ones(batch, np.bool_) if masked or self.masks else None
        self._marked = masked  # does anything before the next layer write `valid`?
        self.states: list[tuple[np.ndarray, ...]] = []
        self.x: np.ndarray = (
            np.zeros(batch, np.int64) if features is None else aligned((batch, features), zero=True)
        )
        value = self.x
        for step in steps:
            value = self._append(step, value)
        self.y: np.ndarray = value
        table = np.array(self._calls, np.int64).reshape(-1, 2)
        self._kept.append(table)
        self._arguments = table.ctypes.data, len(table), 0
        self._run = _kernel(_run)

    def run(self) -> None:
        """One step of all layers, from `x` to `y`."""
        self._run(*self._arguments)

    def _append(self, step: Step, x: np.ndarray) -> np.ndarray:
        """Add a layer's calls to the table; its output, from its input."""
        match step:
            case Recurrence():
                return self._recurrence(step, x)
            case Lookup():
                out = aligned((self.batch, step.table.shape[1]))
                table = np.ascontiguousarray(step.table, np.float32)
                marks = self._marks() if step.masks else ({}, {})
                return self._rows(
                    _kernel(_lookup), x, out, sizes=marks[0], arrays={Rows.GAMMA: table, **marks[1]}
                )
            case Activation():
                return self._rows(_activation(step.name), x)
            case Softmax():
                return self._rows(_kernel(_softmax), x, sizes={Rows.LOGARITHM: int(step.logarithm)})
            case Normalization():
                weights = {Rows.GAMMA: step.gamma, Rows.BETA: step.beta}
                arrays = {k: np.ascontiguousarray(w, np.float32) for k, w in weights.items() if w is not None}
                for w in arrays.values():
                    if w.shape != x.shape[1:]:
                        raise ValueError(
                            f"normalization: expected weights of shape {x.shape[1:]}, got {w.shape}"
                        )
                arrays[Rows.NUMBERS] = np.array([step.epsilon], np.float32)
                return self._rows(_kernel(_normalization), x, arrays=arrays)
            case Masking():
                numbers = np.array([step.value], np.float32)
                sizes, arrays = self._marks()
                return self._rows(_kernel(_masking), x, sizes=sizes, arrays={Rows.NUMBERS: numbers, **arrays})
        raise ValueError(f"stack: {type(step).__name__} is no step that it knows")

    def _marks(self) -> tuple[dict[Any, int], dict[Any, Any]]:
        """What the plan of a layer that masks rows says of it: sizes and arrays."""
        marked, self._marked = self._marked, True
        return {Rows.ALSO: int(marked)}, {Rows.VALID: self.valid}

    def _rows(
        self,
        kernel: Any,
        x: np.ndarray,
        out: np.ndarray | None = None,
        *,
        sizes: Any = None,
        arrays: Any = None,
    ) -> np.ndarray:
        """Add a kernel over rows."""
        if out is None:
            out = aligned(x.shape)
        rows = {
            Rows.B: self.batch,
            Rows.F: out.shape[1],
            Rows.X_ROW: x.strides[0],
            Rows.OUT_ROW: out.strides[0],
        }
        plan = make_plan(Rows, rows | (sizes or {}), {Rows.X: x, Rows.OUT: out, **(arrays or {})})
        self._call(kernel, plan)
        self._kept += [x, out, arrays]
        return out

    def _recurrence(self, step: Recurrence, x: np.ndarray) -> np.ndarray:
        """Add a cell: its kernel, then the new states into the places of the old ones."""
        if x.strides[0] != 4 * x.shape[1] and self.batch > 1:  # padded rows; sequences are read without gaps
            x = self._rows(_kernel(_copy), x, aligned(x.shape))
        arguments = (
            step.cell, x[None], step.kernel, step.recurrent_kernel, step.bias, step.params,
            self.valid[None] if step.remembers and self.valid is not None else None,
        )  # fmt: skip
        options = {"aux": step.aux, "projection": step.projection}
        if isinstance(step.kernel, Quantized):
            prepared = quantized.prepare_step(*arguments, **options)
        else:
            prepared = sequence.prepare_step(*arguments, **options, precision=step.precision)
        plan = prepared.plan.reshape(-1)
        plan[P.T] = 0  # no step yet, but the weights are packed
        prepared.kernel(plan.ctypes.data, 0, 1)
        plan[P.T] = 1
        plan[P.PACKED : len(step.cell.stages) * len(P) : len(P)] = 1
        width = step.recurrent_kernel.shape[0]
        units = width if step.projection is None else step.projection.shape[0]
        states = prepared.states()
        if step.remembers:
            for k, copy in prepared.rounded:
                before = states[k][0][:, : units if k else width]
                self._rows(_kernel(_round), before, copy[:, : before.shape[1]])
        self._call(prepared.kernel, plan)
        self._kept.append(prepared)
        output = states[0][1][:, :width]
        if step.remembers:
            for before, after in states:
                if before.ctypes.data != after.ctypes.data:
                    self._rows(_kernel(_copy), after, before)
            self.states.append(
                tuple(before[:, : units if k else width] for k, (before, _) in enumerate(states))
            )
        return output

    def _call(self, kernel: Any, plan: np.ndarray) -> None:
        self._calls.append((kernel.address, plan.ctypes.data))
        self._kept += [kernel, plan]
