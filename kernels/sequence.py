"""What every backend's recurrent sequence takes and gives; time-major, (T, B, .) arrays.

    forward(cell, x, kernel, recurrent_kernel, bias, params, state, valid, *, training, aux, recurrent_mask, projection,
            precision) -> Forward
    backward(residual, dh, dfinal, *, need_dx=True, dstates=None) -> Gradients

H units; the output h has P columns, as many as the projection, or H where the cell has none. x (T, B, I); kernel (I, G H)
and recurrent_kernel (P, R H), columns in the order of the cell's gates and of its recurrent gates; bias (G H) or None;
projection (H, P) if the cell projects; params one (H,) array for each of `cell.params`; state one array a state, h (B, P),
the others (B, H), or None for zeros; valid (T, B) bool or None: a step that is not valid carries every state over, so that
the output repeats. aux one array for each of `cell.aux`, and recurrent_mask, which multiplies what enters a recurrent
product (dropout); both of a shape that broadcasts to (T, B, H), or (T, B, P) where they belong to h, and neither
differentiated. dh (T, B, P) or None; dfinal one array or None a state; dstates None, or for each state after the first the
gradient of its sequence, (T, B, H) or None. A residual serves one backward pass.

precision "bfloat16" rounds the operands of every product, forward and backward, to bfloat16 (nearest, ties to even): x,
weights, what a recurrent product reads (after the recurrent mask), the gates' gradients. Sums, gates, states, the bias's
gradient and the weights themselves stay as they are. "tf32" rounds the same operands to 11 significant bits: a GPU's
tensor cores do it as they read float32. The reference rounds to nearest, ties to even; the CPU's kernels have no such
products and refuse the word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = [
    "PRECISIONS",
    "Forward",
    "Gradients",
    "Prepacked",
    "aux_columns",
    "check_backward",
    "check_forward",
    "check_precision",
]

PRECISIONS = ("float32", "bfloat16", "tf32")  # of the products' operands; "float32" leaves them as they are


class Forward(NamedTuple):
    """A sequence's results: every output `h` (T, B, P), the last of each state, the other states' sequences
    (T, B, H) when training, and what the backward pass needs (None otherwise)."""

    h: Any
    final: tuple[Any, ...]
    states: tuple[Any, ...] | None
    residual: Any


class Prepacked:
    """Room for kernels to keep weights in an order of their own between calls of inference.

    Whoever hands one to `forward` says that the kernel, the recurrent kernel and the bias are what they were whenever it
    was handed over before.
    """

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}


class Gradients(NamedTuple):
    """The loss's gradients with respect to a sequence's inputs; `x` is None when it was not asked for."""

    x: Any
    kernel: Any
    recurrent_kernel: Any
    bias: Any
    params: tuple[Any, ...]
    state: tuple[Any, ...]
    projection: Any = None


def check_forward(
    cell: Any, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any,
    params: Sequence[Any], state: Sequence[Any] | None, valid: Any, aux: Sequence[Any] = (), recurrent_mask: Any = None,
    projection: Any = None,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """Hold every array to its shape, without empty ones: kernels work on addresses, and NumPy would broadcast in silence.

    Returns (T, B, I, H, P).

    Raises:
        ValueError: it names the argument, what came and what was expected.
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected shape (T, B, I), got {x.shape}")
    if recurrent_kernel.ndim != 2:
        raise ValueError(f"recurrent_kernel: expected shape (P, R H), got {recurrent_kernel.shape}")
    if cell.projects != (projection is not None):
        raise ValueError(
            f"projection: expected {'shape (H, P)' if cell.projects else 'None'} for the cell {cell.name}, "
            f"got {'None' if projection is None else projection.shape}"
        )
    (T, B, I), P, G, R = x.shape, recurrent_kernel.shape[0], len(cell.gates), len(cell.recurrent)
    H = P
    if projection is not None:
        if projection.ndim != 2:
            raise ValueError(f"projection: expected shape (H, P), got {projection.shape}")
        H = projection.shape[0]
        _expect("projection", projection, (H, P))
    _expect("kernel", kernel, (I, G * H))
    _expect("recurrent_kernel", recurrent_kernel, (P, R * H))
    if bias is not None:
        _expect("bias", bias, (G * H,))
    if len(params) != len(cell.params):
        raise ValueError(f"params: expected one array for each of {cell.params}, got {len(params)}")
    for name, a in zip(cell.params, params, strict=True):
        _expect(f"parameter {name}", a, (H,))
    if state is not None:
        if len(state) != len(cell.state):
            raise ValueError(f"state: expected one array for each of {cell.state}, got {len(state)}")
        for k, (name, a) in enumerate(zip(cell.state, state, strict=True)):
            _expect(f"state {name}", a, (B, H if k else P))
    if valid is not None:
        _expect("valid", valid, (T, B))
    if len(aux) != len(cell.aux):
        raise ValueError(f"aux: expected one array for each of {cell.aux}, got {len(aux)}")
    named = [(name, a, aux_columns(cell, name, H, P)) for name, a in zip(cell.aux, aux, strict=True)]
    if recurrent_mask is not None:
        named.append(("recurrent_mask", recurrent_mask, P))
    for name, a, columns in named:
        if a.ndim != 3 or any(n not in (1, m) for n, m in zip(a.shape, (T, B, columns), strict=True)):
            raise ValueError(f"{name}: expected a shape that broadcasts to {(T, B, columns)}, got {a.shape}")
    if min(T, B, I, H, P) < 1:
        raise ValueError(
            f"sequence: steps, batch, inputs and units must all be at least 1, got {(T, B, I, H)}"
            + (f" and an output of {P}" if cell.projects else "")
        )
    return T, B, I, H, P


def aux_columns(cell: Any, aux: str, H: int, P: int) -> int:
    """How many columns a step input has: those of the stage that reads it."""
    return P if any(s.projects and aux in s.aux for s in cell.stages) else H


def check_precision(precision: str, known: tuple[str, ...] = PRECISIONS) -> None:
    """Raises ValueError for a precision that is none of those known."""
    if precision not in known:
        where = " (tf32 is a GPU's)" if precision == "tf32" else ""
        raise ValueError(f"precision: expected {' or '.join(known)}, got {precision!r}{where}")


def check_backward(
    cell: Any, shape: tuple[int, int, int, int], dh: Any, dfinal: Sequence[Any], dstates: Sequence[Any] | None
) -> None:
    """Hold the upstream gradients to their shapes; `shape` is (T, B, H, P).

    Raises:
        ValueError: it names the argument, what came and what was expected.
    """
    T, B, H, P = shape
    if dh is not None:
        _expect("dh", dh, (T, B, P))
    if len(dfinal) != len(cell.state):
        raise ValueError(f"dfinal: expected an array or None for each of {cell.state}, got {len(dfinal)}")
    for k, (name, d) in enumerate(zip(cell.state, dfinal, strict=True)):
        if d is not None:
            _expect(f"dfinal of {name}", d, (B, H if k else P))
    if dstates is not None:
        if len(dstates) != len(cell.state) - 1:
            raise ValueError(
                f"dstates: expected an array or None for each of {cell.state[1:]}, got {len(dstates)}"
            )
        for name, d in zip(cell.state[1:], dstates, strict=True):
            if d is not None:
                _expect(f"dstates of {name}", d, (T, B, H))


def _expect(name: str, a: Any, shape: tuple[int, ...]) -> None:
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {a.shape}")
