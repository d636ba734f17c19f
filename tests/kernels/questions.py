"""Random sequences for any cell, and the comparison of a float32 kernel with the float64 reference.

A question is drawn from a seed; float32 holds its numbers exactly, so that both precisions see the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numlstm.kernels import reference
from numlstm.kernels.cpu import sequence
from numlstm.kernels.derive import Cell

# A kernel's error, over the largest value of the array in question.
BOUND = 1e-5
PATTERNS = ("all", "holes", "lengths")


@dataclass
class Question:
    """The arguments of `forward`, and upstream gradients; float64 arrays."""

    cell: Cell
    arguments: tuple[Any, ...]  # x, kernel, recurrent_kernel, bias, params, state, valid
    dh: Any
    dfinal: tuple[Any, ...]
    aux: tuple[Any, ...] = ()
    recurrent_mask: Any = None
    projection: Any = None
    dstates: Any = None
    precision: str = "float32"

    def cast(self, dtype: str) -> Question:
        rest = (
            self.arguments,
            self.dh,
            self.dfinal,
            self.aux,
            self.recurrent_mask,
            self.projection,
            self.dstates,
        )
        return Question(self.cell, *(_cast(a, dtype) for a in rest), self.precision)

    def forward(self, kernels: Any = sequence, *, training: bool) -> Any:
        """The sequence, by either module of kernels."""
        rest = {"aux": self.aux, "recurrent_mask": self.recurrent_mask, "projection": self.projection}
        if self.precision != "float32":
            rest["precision"] = self.precision
        return kernels.forward(self.cell, *self.arguments, training=training, **rest)


def _cast(a: Any, dtype: str) -> Any:
    if isinstance(a, tuple):
        return tuple(_cast(x, dtype) for x in a)
    return a if a is None or a.dtype == bool else a.astype(dtype)


def ask(
    cell: Cell, T: int, B: int, I: int, H: int, pattern: str = "all", seed: int = 0, spread: float = 1.0
) -> Question:
    """A question of that shape; with a pattern of valid steps, the first row has none. A projection halves the output."""
    draw, G, R = np.random.default_rng([seed, T, B, I, H]), len(cell.gates), len(cell.recurrent)
    P = max(1, H // 2) if cell.projects else H
    normal = lambda *shape: draw.standard_normal(shape) * spread
    state = [normal(B, H if k else P) * 0.5 for k in range(len(cell.state))]
    if "n" in cell.state:  # sLSTM divides by it
        state[cell.state.index("n")] = np.abs(normal(B, H)) + 1.0
    valid = None
    if pattern != "all":
        valid = draw.random((T, B)) > 0.3
        if pattern == "lengths":
            valid = np.arange(T)[:, None] < draw.integers(0, T + 1, B)
        valid[:, 0] = False
    arguments = (
        normal(T, B, I), normal(I, G * H) / I**0.5, normal(P, R * H) / P**0.5, normal(G * H),
        tuple(normal(H) for _ in cell.params), tuple(state), valid,
    )  # fmt: skip
    upstream = normal(T, B, P), tuple(normal(B, H if k else P) for k in range(len(cell.state)))
    aux = tuple((draw.random((T, B, P if a == "z_" + cell.state[0] else H)) < 0.3) * 1.0 for a in cell.aux)
    question = Question(cell, arguments, *upstream, aux)
    if cell.projects:
        question.projection = normal(H, P) / H**0.5
    return question.cast("f").cast("d")


def answer(question: Question, kernels: Any = sequence, need_dx: bool = True) -> dict[str, np.ndarray]:
    """Every result of a training pass by name."""
    cell = question.cell
    out = question.forward(kernels, training=True)
    g = kernels.backward(
        out.residual, question.dh, question.dfinal, need_dx=need_dx, dstates=question.dstates
    )
    named = {"h": out.h, "dx": g.x, "dkernel": g.kernel, "drecurrent": g.recurrent_kernel, "dbias": g.bias}
    named["dprojection"] = g.projection
    named |= {f"final {s}": a for s, a in zip(cell.state, out.final, strict=True)}
    named |= {f"all {s}": a for s, a in zip(cell.state[1:], out.states, strict=True)}
    named |= {f"d{s}": a for s, a in zip(cell.state, g.state, strict=True)}
    named |= {f"d{p}": a for p, a in zip(cell.params, g.params, strict=True)}
    return {k: np.array(a) for k, a in named.items() if a is not None}


def error(found: np.ndarray, right: np.ndarray) -> float:
    """Largest difference over the largest value; where all values are small, over a thousandth."""
    assert found.shape == right.shape
    if not right.size:
        return 0.0
    return float(np.max(np.abs(found.astype("d") - right)) / max(np.max(np.abs(right)), 1e-3))


def check(question: Question, found: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Hold the kernel's training pass to the float64 reference; gives what the kernel found."""
    right = answer(question, reference)
    found = answer(question.cast("f")) if found is None else found
    assert found.keys() == right.keys()
    assert {a.dtype.name for a in found.values()} == {"float32"}
    errors = {k: error(found[k], right[k]) for k in right}
    assert all(e <= BOUND for e in errors.values()), f"{question.cell.name}: {errors}"  # a NaN is not <=
    return found


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].tobytes() == b[k].tobytes(), f"{k} differs by {np.max(np.abs(a[k] - b[k]))}"
