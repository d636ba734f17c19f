"""What every backend's recurrent sequence takes and gives; time-major, (T, B, .) arrays.

    forward(cell, x, kernel, recurrent_kernel, bias, params, state, valid, *, training, aux, recurrent_mask) -> Forward
    backward(residual, dh, dfinal, *, need_dx=True) -> Gradients

x (T, B, I); kernel (I, G H); recurrent_kernel (H, G H), columns in the cell's gate order; bias (G H) or None; params one
(H,) array for each of `cell.params`; state one (B, H) array a state, or None for zeros; valid (T, B) bool or None: a step
that is not valid carries every state over, so that the output repeats. aux one array for each of `cell.aux`, and
recurrent_mask, which multiplies h on its way into the recurrent product (dropout), both of a shape that broadcasts to
(T, B, H) and neither differentiated. A residual serves one backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Forward", "Gradients", "check_backward", "check_forward"]


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


def check_forward(
    cell: Any, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any,
    params: Sequence[Any], state: Sequence[Any] | None, valid: Any, aux: Sequence[Any] = (), recurrent_mask: Any = None,
) -> None:  # fmt: skip
    """Hold every array to its shape: kernels work on addresses, and NumPy would broadcast in silence.

    Raises:
        ValueError: it names the argument, what came and what was expected.
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected shape (T, B, I), got {x.shape}")
    if recurrent_kernel.ndim != 2:
        raise ValueError(f"recurrent_kernel: expected shape (H, G H), got {recurrent_kernel.shape}")
    (T, B, I), H, G = x.shape, recurrent_kernel.shape[0], len(cell.gates)
    _expect("kernel", kernel, (I, G * H))
    _expect("recurrent_kernel", recurrent_kernel, (H, G * H))
    if bias is not None:
        _expect("bias", bias, (G * H,))
    if len(params) != len(cell.params):
        raise ValueError(f"params: expected one array for each of {cell.params}, got {len(params)}")
    for name, a in zip(cell.params, params, strict=True):
        _expect(f"parameter {name}", a, (H,))
    if state is not None:
        if len(state) != len(cell.state):
            raise ValueError(f"state: expected one array for each of {cell.state}, got {len(state)}")
        for name, a in zip(cell.state, state, strict=True):
            _expect(f"state {name}", a, (B, H))
    if valid is not None:
        _expect("valid", valid, (T, B))
    if len(aux) != len(cell.aux):
        raise ValueError(f"aux: expected one array for each of {cell.aux}, got {len(aux)}")
    named = [
        *zip(cell.aux, aux, strict=True),
        *([] if recurrent_mask is None else [("recurrent_mask", recurrent_mask)]),
    ]
    for name, a in named:
        if a.ndim != 3 or any(n not in (1, m) for n, m in zip(a.shape, (T, B, H), strict=True)):
            raise ValueError(f"{name}: expected a shape that broadcasts to {(T, B, H)}, got {a.shape}")


def check_backward(cell: Any, shape: tuple[int, int, int], dh: Any, dfinal: Sequence[Any]) -> None:
    """Hold the upstream gradients to their shapes; `shape` is (T, B, H).

    Raises:
        ValueError: it names the argument, what came and what was expected.
    """
    if dh is not None:
        _expect("dh", dh, shape)
    if len(dfinal) != len(cell.state):
        raise ValueError(f"dfinal: expected an array or None for each of {cell.state}, got {len(dfinal)}")
    for name, d in zip(cell.state, dfinal, strict=True):
        if d is not None:
            _expect(f"dfinal of {name}", d, shape[1:])


def _expect(name: str, a: Any, shape: tuple[int, ...]) -> None:
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {a.shape}")
