"""Conditions that a weight must satisfy after each update: Keras' names, formulas and defaults.

A constraint is called with an array (or tensor) and gives the nearest allowed array; the optimizer assigns
it. `axis` is the axis along which norms are taken: 0, the default, is the input axis of a `(features, units)`
kernel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from numlstm.backend import adopt
from numlstm.registry import Configurable, Registry

Axis = int | Sequence[int]

_registry: Registry[type["Constraint"]] = Registry("constraint")

_EPSILON = 1e-7  # Keras' epsilon: keeps the division by a norm of zero finite


class Constraint(Configurable):
    """Base class: write `__call__(w)` giving an array of the same shape and dtype."""

    def __call__(self, w: Any) -> np.ndarray:
        """`w` moved to where the condition holds."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(w)")


@_registry.register()
class MaxNorm(Constraint):
    """Norms of at most `max_value`: longer vectors are shortened.

    >>> MaxNorm(1.0)(np.array([[3.0, 0.0], [4.0, 0.5]])).round(3).tolist()
    [[0.6, 0.0], [0.8, 0.5]]
    """

    max_value: float
    axis: int | tuple[int, ...]

    def __init__(self, max_value: float = 2.0, axis: Axis = 0) -> None:
        if max_value < 0:
            raise ValueError(f"MaxNorm: max_value must be >= 0, got {max_value}")
        self.max_value, self.axis = max_value, _axis(axis)

    def __call__(self, w: Any) -> np.ndarray:
        w = adopt(w)
        norms = _norms(w, self.axis)
        return (w * (np.clip(norms, 0, self.max_value) / (_EPSILON + norms))).astype(w.dtype)


@_registry.register()
class NonNeg(Constraint):
    """Nothing below zero.

    >>> NonNeg()(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __call__(self, w: Any) -> np.ndarray:
        return np.maximum(adopt(w), 0)


@_registry.register()
class UnitNorm(Constraint):
    """Norms of one.

    >>> UnitNorm()(np.array([3.0, 4.0])).round(3).tolist()
    [0.6, 0.8]
    """

    def __init__(self, axis: Axis = 0) -> None:
        self.axis: int | tuple[int, ...] = _axis(axis)

    def __call__(self, w: Any) -> np.ndarray:
        w = adopt(w)
        return (w / (_EPSILON + _norms(w, self.axis))).astype(w.dtype)


@_registry.register()
class MinMaxNorm(Constraint):
    """Norms between `min_value` and `max_value`, approached at `rate` (1.0: enforced at once).

    >>> MinMaxNorm(2.0, 3.0)(np.array([0.6, 0.8])).round(3).tolist()
    [1.2, 1.6]
    """

    min_value: float
    max_value: float
    rate: float
    axis: int | tuple[int, ...]

    def __init__(
        self, min_value: float = 0.0, max_value: float = 1.0, rate: float = 1.0, axis: Axis = 0
    ) -> None:
        if not 0 <= min_value <= max_value:
            raise ValueError(
                f"MinMaxNorm: expected 0 <= min_value <= max_value, got {min_value} and {max_value}"
            )
        if not 0 <= rate <= 1:
            raise ValueError(f"MinMaxNorm: rate must be between 0 and 1, got {rate}")
        self.min_value, self.max_value, self.rate, self.axis = min_value, max_value, rate, _axis(axis)

    def __call__(self, w: Any) -> np.ndarray:
        w = adopt(w)
        norms = _norms(w, self.axis)
        wanted = self.rate * np.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        return (w * (wanted / (_EPSILON + norms))).astype(w.dtype)


max_norm = MaxNorm
non_neg = NonNeg
unit_norm = UnitNorm
min_max_norm = MinMaxNorm


def get(identifier: Any) -> Any:
    """A constraint from its name ("non_neg"), its saved form, itself, or any function of an array.

    >>> get("max_norm")
    MaxNorm(max_value=2.0, axis=0)
    """
    return _registry.get(identifier)


def _axis(axis: Axis) -> int | tuple[int, ...]:
    return int(axis) if isinstance(axis, (int, np.integer)) else tuple(int(a) for a in axis)


def _norms(w: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    return np.sqrt(np.sum(np.square(w), axis=axis, keepdims=True))
