"""How a gradient is checked: against numerical differentiation in float64, and float32 kernels against
float64.

The tape's gradient g must agree with the derivative along random directions d: four-point central differences
of the loss, whose error is of fourth order in the step, against <g, d>. A direction moves every entry at
once, so that a few of them see an error in any entry. The loss is a fixed random weighting of all outputs,
plus the penalties.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import numlstm as nl
from numlstm.backend import beside, to_numpy

STEP = 1e-3  # along a direction of length 1


# what one precision's evaluation differentiates: the leaves by name, and a function giving the output tensors
Prepared = tuple[dict[str, nl.Variable], Callable[[], list[nl.Tensor]]]


@dataclass
class Question:
    """A function to differentiate.

    `prepare(dtype, leaves)` makes variables of the given values and the computation on them. `groups` says in
    which column of the matrix a leaf's error is entered: "input", "weights" or "state".
    """

    row: str
    leaves: dict[str, np.ndarray]
    groups: dict[str, str]
    prepare: Callable[[str, dict[str, np.ndarray]], Prepared]
    numeric_bound: float = 1e-8
    cpu_bound: float = 2e-5
    directions: int = 3
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.seed = zlib.crc32(f"the loss of {self.row}".encode())  # not the seed of the leaves
        # numbers that float32 holds exactly, so that both precisions see the same question
        self.leaves = {k: a.astype(np.float32).astype(np.float64) for k, a in self.leaves.items()}


def loss_of(question: Question, dtype: str, backend: str, leaves: dict[str, np.ndarray]) -> float:
    """The weighted sum of the outputs, without a tape."""
    with nl.use_backend(backend):
        _, compute = question.prepare(dtype, leaves)
        nl.set_seed(11)  # every evaluation drops out the same entries
        return weighted(question, compute(), dtype).item()


def gradients_of(
    question: Question, dtype: str, backend: str
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The loss's gradients by leaf, and the outputs, in float64."""
    with nl.use_backend(backend):
        variables, compute = question.prepare(dtype, question.leaves)
        assert set(variables) == set(question.leaves)
        nl.set_seed(11)
        with nl.GradientTape() as tape:
            outputs = compute()
            loss = weighted(question, outputs, dtype)
        gradients = tape.gradient(loss, list(variables.values()))
    assert all(g.dtype == dtype for g in gradients), "a gradient changed its dtype"
    found = {k: np.asarray(to_numpy(g), np.float64) for k, g in zip(variables, gradients, strict=True)}
    return found, [np.asarray(o.numpy(), np.float64) for o in outputs]


def weighted(question: Question, outputs: list[nl.Tensor], dtype: str) -> nl.Tensor:
    draw = np.random.default_rng(question.seed)
    total = nl.Tensor(beside(np.zeros((), dtype), outputs[0].data, "total"))
    for output in outputs:
        assert output.dtype == dtype, f"{question.row}: an output is {output.dtype}, not {dtype}"
        factors = beside(draw.standard_normal(output.shape).astype(dtype), output.data, "factors")
        total = total + (output * factors).sum()
    return total


def numerical_error(question: Question, name: str, gradient: np.ndarray, least: float) -> float:
    """Largest difference between directional derivatives and <gradient, direction>, over what is typical."""
    draw = np.random.default_rng(question.seed + 1)
    worst = 0.0
    for _ in range(question.directions):
        direction = draw.choice([-1.0, 1.0], gradient.shape) / np.sqrt(gradient.size)

        def at(distance: float, direction: np.ndarray = direction) -> float:
            moved = {**question.leaves, name: question.leaves[name] + distance * direction}
            return loss_of(question, "float64", "reference", moved)

        slope = (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
        typical = np.sqrt((gradient**2).mean())  # of <gradient, direction>, for random signs
        worst = max(worst, abs(slope - (gradient * direction).sum()) / max(typical, least))
    return float(worst)


def relative(a: np.ndarray, b: np.ndarray, least: float = 1e-3) -> float:
    """Largest difference over the largest value, or over `least` where all are smaller."""
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), least))


def check(question: Question, record: Callable[[str, str, str, float], None]) -> None:
    """Enter the question's errors into the matrix and hold them to its bounds."""
    exact, outputs = gradients_of(question, "float64", "reference")
    single, outputs32 = gradients_of(question, "float32", "cpu")
    failures: list[str] = []

    def enter(against: str, column: str, error: float, bound: float, what: str) -> None:
        record(question.row, against, column, error)
        if not error <= bound:  # catches NaN too
            failures.append(f"{what}: {error:.1e} > {bound:.0e}")

    for a, b in zip(outputs32, outputs, strict=True):
        enter("cpu", "output", relative(a, b), question.cpu_bound, "cpu output")
    # what vanishes by nature, such as the gradient of a bias on attention's keys, is held to the others' size
    least = 1e-2 * max((np.max(np.abs(g), initial=0.0) for g in exact.values()), default=0.0)
    for name, gradient in exact.items():
        group = question.groups[name]
        assert np.isfinite(gradient).all(), f"{question.row}: {name} has a gradient that is not finite"
        error = numerical_error(question, name, gradient, least)
        enter("numeric", group, error, question.numeric_bound, f"{name} against numerical differentiation")
        error = relative(single[name], gradient, least)
        enter("cpu", group, error, question.cpu_bound, f"{name}, cpu float32 against reference float64")
    assert not failures, f"{question.row}: " + "; ".join(failures)
