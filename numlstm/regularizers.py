"""Penalties on weights or outputs, added to the loss: Keras' names, formulas and defaults.

A regularizer is called with a tensor and gives a scalar tensor, so the tape differentiates it like any other
loss.
"""

from typing import Any

from numlstm import ops
from numlstm.autograd import Tensor
from numlstm.registry import Configurable, Registry

_registry: Registry[type["Regularizer"]] = Registry("regularizer")


class Regularizer(Configurable):
    """Base class: write `__call__(x)` giving a scalar tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        """The penalty of `x` (any shape), a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x)")


@_registry.register("l1_l2")
class L1L2(Regularizer):
    """`l1 * sum(|x|) + l2 * sum(x**2)`.

    >>> float(L1L2(l1=1.0, l2=0.5)(Tensor([1.0, -2.0])))
    5.5
    """

    l1: float
    l2: float

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1, self.l2 = _strength("l1", l1), _strength("l2", l2)

    def __call__(self, x: Tensor) -> Tensor:
        terms = []
        if self.l1:
            terms.append(self.l1 * ops.sum(ops.abs(x)))
        if self.l2:
            terms.append(self.l2 * ops.sum(ops.square(x)))
        if not terms:
            return 0.0 * ops.sum(x)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


@_registry.register()
class L1(Regularizer):
    """`l1 * sum(|x|)`.

    >>> float(L1(0.5)(Tensor([1.0, -3.0])))
    2.0
    """

    def __init__(self, l1: float = 0.01) -> None:
        self.l1: float = _strength("l1", l1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.l1 * ops.sum(ops.abs(x))


@_registry.register()
class L2(Regularizer):
    """`l2 * sum(x**2)`.

    >>> float(L2(0.5)(Tensor([1.0, -3.0])))
    5.0
    """

    def __init__(self, l2: float = 0.01) -> None:
        self.l2: float = _strength("l2", l2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.l2 * ops.sum(ops.square(x))


def l1_l2(l1: float = 0.01, l2: float = 0.01) -> L1L2:
    """`L1L2` with both strengths at 0.01, as Keras' function of this name."""
    return L1L2(l1, l2)


l1 = L1
l2 = L2


def get(identifier: Any) -> Any:
    """A regularizer from its name ("l2"), its saved form, itself, or any function of a tensor; None stays
    None.

    >>> get("l2")
    L2(l2=0.01)
    """
    return _registry.get(identifier)


def _strength(name: str, value: float) -> float:
    if not value >= 0 or value == float("inf"):  # also refuses NaN
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    return float(value)
