"""What a backend's stepping kernels are made of: a stack of layers as arrays, run one time step at a time.

A `Stack` (cpu/stream.py) takes such descriptions in order and runs them all in one native call a step. Values between
layers are rows (B, F). Weights are float32 or `Quantized`, shapes as in sequence.py; they are packed when the stack is
made, so that a stack must be made anew when they change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import cells
from .derive import Cell
from .int8 import Quantized

__all__ = ["Activation", "Lookup", "Masking", "Normalization", "Recurrence", "Softmax", "Step", "dense"]


class Recurrence(NamedTuple):
    """A cell, (B, I) to (B, P); see sequence.py for its arrays. `aux` are (1, 1, 1) each, the same at all steps.

    Its matrices are float32, for products in `precision`, or all `Quantized`.
    """

    cell: Cell
    kernel: np.ndarray | Quantized
    recurrent_kernel: np.ndarray | Quantized
    bias: np.ndarray | None = None
    params: tuple[np.ndarray, ...] = ()
    projection: np.ndarray | Quantized | None = None
    aux: tuple[np.ndarray, ...] = ()
    remembers: bool = True  # False: it has no state to keep, and a masked row is computed like all others
    precision: str = "float32"


class Lookup(NamedTuple):
    """Rows of `table` (V, F) by ids (B,), int64, which the caller has held to 0..V-1; first in its stack.

    `masks`: a row whose id is 0 is masked.
    """

    table: np.ndarray
    masks: bool = False


class Activation(NamedTuple):
    """An element-wise activation of the cell language, by name."""

    name: str


class Softmax(NamedTuple):
    """exp(x) over its sum along a row; or its logarithm."""

    logarithm: bool = False


class Normalization(NamedTuple):
    """Rows to mean 0 and variance 1, times gamma (F,), plus beta (F,)."""

    gamma: np.ndarray | None
    beta: np.ndarray | None
    epsilon: float


class Masking(NamedTuple):
    """A row all of whose values are `value` is masked, and set to zero."""

    value: float


Step = Recurrence | Lookup | Activation | Softmax | Normalization | Masking


def dense(
    kernel: np.ndarray | Quantized,
    bias: np.ndarray | None,
    activation: str = "linear",
    precision: str = "float32",
) -> Recurrence:
    """activation(x kernel + bias), (B, I) to (B, F): a cell that nothing comes back to.

    >>> dense(np.ones((3, 2), np.float32), None, "tanh").cell.recurrent
    ()
    """
    none: Any = np.zeros((kernel.shape[1], 0), np.float32)
    if isinstance(kernel, Quantized):
        none = Quantized.of(none)
    cell = cells.feedforward(activation)
    return Recurrence(cell, kernel, none, bias, remembers=False, precision=precision)
