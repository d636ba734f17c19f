"""What every backend's recurrent sequence takes and gives; time-major, (T, B, .) arrays.

    forward(cell, x, kernel, recurrent_kernel, bias, params, state, valid, *, training) -> Forward
    backward(residual, dh, dfinal, *, need_dx=True) -> Gradients

x (T, B, I); kernel (I, G H); recurrent_kernel (H, G H), columns in the cell's gate order; bias (G H) or None; params one
(H,) array for each of `cell.params`; state one (B, H) array a state, or None for zeros; valid (T, B) bool or None: a step
that is not valid carries every state over, so that the output repeats. A residual serves one backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Forward", "Gradients"]


class Forward(NamedTuple):
    """A sequence's results: every output `h` (T, B, H), the last of each state (B, H), the other states' sequences
    (T, B, H) when training, and what the backward pass needs (None otherwise)."""

    h: Any
    final: tuple[Any, ...]
    states: tuple[Any, ...] | None
    residual: Any


class Gradients(NamedTuple):
    """The loss's gradients with respect to a sequence's inputs; `x` is None when it was not asked for."""

    x: Any
    kernel: Any
    recurrent_kernel: Any
    bias: Any
    params: tuple[Any, ...]
    state: tuple[Any, ...]
