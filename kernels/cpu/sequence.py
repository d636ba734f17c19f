"""Recurrent sequences on the CPU, for any derived cell, in float32: how the work is shared, and the two kinds of kernel.

A cell of one stage runs fused (fused.py), one of several stages by stages (staged.py); both are one dispatch a pass.
Threads either split the batch (nothing shared but weights) or, where the recurrent weights outgrow a core's cache or the
batch is small, the units, with a barrier a step. Every sum has one fixed order, so neither choice changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..derive import Cell
from ..sequence import Forward, Gradients, Prepacked, check_backward, check_forward, check_precision
from . import amx, fused, staged, threads
from .isa import LANES, TILE_COLUMNS, TILE_ROWS
from .layout import Layout, Prepared, Residual, steps_and_rows
from .microkernel import rows_of
from .workspace import address, aligned

__all__ = ["backward", "backward_all", "explain", "forward", "forward_all", "prepare_step"]

# The rule that picks how threads share a sequence; read from the measurements in docs/decisions.md.
# Floating-point operations of a forward pass below which one thread does it: where the others must be woken first, which
# takes about 50 us, and where they are awake.
ONE_THREAD_BELOW, ONE_AWAKE_BELOW = 2e7, 4e6
CACHE_BYTES = 1 << 20  # packed weights above this are split over the threads
ROWS_FOR_BATCH_SPLIT = 4  # rows a thread
APART_FROM = 16  # inputs from which few rows have their input product computed apart


def _operations(cell: Cell, T: int, B: int, I: int, H: int) -> float:
    """Floating-point operations of a forward pass's products."""
    return 2.0 * T * B * (len(cell.gates) * I + len(cell.recurrent) * H) * H


def _worth_sharing(operations: float) -> bool:
    return operations >= ONE_THREAD_BELOW or (operations >= ONE_AWAKE_BELOW and threads.ready())


def _split(
    cell: Cell, T: int, B: int, I: int, H: int, at_once: int = 1, precision: str = "float32"
) -> tuple[int, bool]:
    """How many threads share the sequence, one of `at_once`, and whether by units (else by batch)."""
    n = max(1, threads.get_num_threads() // at_once)
    operations = _operations(cell, T, B, I, H)
    if n == 1 or not _worth_sharing(operations):
        return 1, False
    weights, blocks = operations / (2.0 * T * B), -(-H // Layout.of(cell.stages[0]).width)
    of_weights = weights * (4 if precision == "float32" else 2)
    if ROWS_FOR_BATCH_SPLIT * n <= B and of_weights <= CACHE_BYTES:
        return n, False
    if blocks >= n:
        return n, True
    return min(n, B), False


def _apart(shards: int, units: bool, B: int, I: int) -> bool:
    """Whether the input product of all steps is worth a pass of its own: where a step's tile would be thin.

    A thread must own all rows of its units. The sums are the same either way, bit for bit.
    """
    return (units or shards == 1) and 2 * B <= TILE_ROWS and I >= APART_FROM


def recomputes(cell: Cell) -> bool:
    """Whether `forward` takes `steps`: to keep, in training, the states at every so many steps only, and have the backward
    pass compute the saved values again, a piece at a time, with weights packed and gradients summed once for all."""
    return len(cell.stages) == 1


def explain(cell: Cell, T: int, B: int, I: int, H: int, precision: str = "float32") -> str:
    """Which kernel runs this shape, in words."""
    precision = amx.precision_of(precision, B)
    shards, units = _split(cell, T, B, I, H, precision=precision)
    how = "one thread" if shards == 1 else f"{shards} threads over the {'units' if units else 'batch'}"
    stages = f" of {len(cell.stages)} stages" if len(cell.stages) > 1 else ""
    form = amx.form_of(precision)
    products = (
        "" if precision == "float32" else ", bfloat16" + ("" if form is None else f" in tiles ({form})")
    )
    return f"fused {cell.name}{stages}, {rows_of(precision)} x {TILE_COLUMNS} vectors of {LANES}{products}, {how}"


_FLOAT32 = np.dtype(np.float32)


def _float32(a: Any) -> np.ndarray:
    if type(a) is np.ndarray and a.dtype is _FLOAT32 and a.flags.c_contiguous:
        return a
    a = np.asarray(a)
    if a.dtype == _FLOAT32 and a.flags.c_contiguous:
        return a
    copy = aligned(a.shape)
    copy[...] = a
    return copy


def forward(
    cell: Cell,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    params: tuple[np.ndarray, ...],
    state: tuple[np.ndarray, ...] | None,
    valid: np.ndarray | None,
    *,
    training: bool,
    aux: tuple[np.ndarray, ...] = (),
    recurrent_mask: np.ndarray | None = None,
    projection: np.ndarray | None = None,
    steps: int | None = None,
    precision: str = "float32",
    prepacked: Prepacked | None = None,
) -> Forward:
    """Run the sequence in float32, its products in `precision`; see ../sequence.py for arguments, shapes and meaning.

    `steps`: see `recomputes`. `prepacked`: where packed weights are kept for the next call of inference.

    Raises:
        ValueError: an array's shape does not fit the others, or an unknown precision.

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, kernel, recurrent_kernel = np.ones((3, 1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    >>> out = forward(cells.elman(), x, kernel, recurrent_kernel, None, (), None, None, training=False)
    >>> [round(float(h), 4) for h in out.h.ravel()]
    [0.7616, 0.7616, 0.7616]
    """
    job = _prepare(
        cell, x, kernel, recurrent_kernel, bias, params, state, valid, training=training, aux=aux,
        recurrent_mask=recurrent_mask, projection=projection, steps=steps, precision=precision, prepacked=prepacked,
    )  # fmt: skip
    return run([job])[0]


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def forward_all(calls: Sequence[Call]) -> list[Forward]:
    """Several sequences at once, such as the two directions of a layer: `forward(*args, **options)` of each call."""
    shapes = [(args[0], *args[1].shape, args[3].shape[0]) for args, _ in calls]
    at_once = len(calls) if _worth_sharing(sum(_operations(*shape) for shape in shapes)) else 1
    return run([_prepare(*args, **options, at_once=at_once) for args, options in calls], at_once > 1)


def backward_all(calls: Sequence[Call]) -> list[Gradients]:
    """The backward passes of several sequences at once: `backward(*args, **options)` of each call."""
    together = all(args[0].at_once > 1 for args, _ in calls)
    return run([_prepare_back(*args, **options) for args, options in calls], together)


def run(jobs: list[Prepared], together: bool = False) -> list[Any]:
    """Run passes that are ready, one after the other or all at once; their results."""
    work = [(job.kernel, address(job.plan), job.shards) for job in jobs]
    if together:
        threads.run_all(work)
    else:
        for one in work:
            threads.run(*one)
    return [job.finish() for job in jobs]


def _prepare(
    cell: Cell, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, params: Any, state: Any, valid: Any,
    *, training: bool, aux: Any = (), recurrent_mask: Any = None, projection: Any = None, steps: int | None = None,
    precision: str = "float32", prepacked: Prepacked | None = None, at_once: int = 1, alone: bool = False,
) -> Prepared:  # fmt: skip
    """A forward pass: arguments held to their shapes, memory laid out, the plan written; `alone`: for one thread."""
    T, B, I, H, Q = check_forward(
        cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, recurrent_mask, projection
    )
    check_precision(precision, ("float32", "bfloat16"))
    precision = amx.precision_of(precision, B)
    shards, units = (1, False) if alone else _split(cell, T, B, I, H, at_once, precision)
    apart = T > 1 and not amx.tiled(precision) and _apart(shards, units, B, I)
    one_stage = len(cell.stages) == 1
    as_it_lies = steps_and_rows(x, regular=apart) if one_stage and precision == "float32" else None
    if as_it_lies is None:
        x, as_it_lies = _float32(x), (4 * B * I, 4 * I)
    arrays = x, _float32(kernel), _float32(recurrent_kernel), None if bias is None else _float32(bias)
    if projection is not None:
        projection = _float32(projection)
    if valid is not None:
        valid = np.ascontiguousarray(valid, np.bool_)
    arguments = (
        cell, (T, B, I, H, Q), *arrays, params, state, valid, training, aux, recurrent_mask, projection,
        shards, units, apart, at_once, steps, precision,
    )  # fmt: skip
    if not one_stage:  # they pack anew in each call
        return staged.prepare(*arguments)
    return fused.prepare(*arguments, as_it_lies, prepacked)


def prepare_step(
    cell: Cell, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, params: Any, valid: Any, *, aux: Any,
    projection: Any, precision: str = "float32",
) -> Prepared:  # fmt: skip
    """One step of inference from states of zero, on one thread, ready to run: what stream.py repeats.

    Its plan reads x (1, B, I) and valid (1, B) where they are, if they are contiguous, float32 and bool.
    """
    arguments = (cell, x, kernel, recurrent_kernel, bias, params, None, valid)
    options = {"aux": aux, "projection": projection, "precision": precision}
    return _prepare(*arguments, training=False, **options, alone=True)


def backward(
    residual: Residual,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    *,
    need_dx: bool = True,
    dstates: tuple[Any, ...] | None = None,
) -> Gradients:
    """Gradients of `forward`; see ../sequence.py for arguments, shapes and meaning.

    Raises:
        ValueError: the residual has been used (its saved values have become gradients).
    """
    return run([_prepare_back(residual, dh, dfinal, need_dx=need_dx, dstates=dstates)])[0]


def _prepare_back(
    residual: Residual, dh: Any, dfinal: Any, *, need_dx: bool = True, dstates: Any = None
) -> Prepared:
    """A backward pass: upstream gradients held to their shapes, memory laid out, the plan written."""
    if residual.used:
        raise ValueError("residual: a forward pass serves one backward pass, and this one has had it")
    check_backward(residual.cell, residual.shape, dh, dfinal, dstates)
    residual.used = True
    if dh is not None and (dh.dtype != np.float32 or (dh.shape[2] > 1 and dh.strides[2] != 4)):
        dh = np.ascontiguousarray(dh, np.float32)
    module = staged if len(residual.cell.stages) > 1 else fused
    return module.prepare_back(residual, dh, dfinal, need_dx, dstates)
