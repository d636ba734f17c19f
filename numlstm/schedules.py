"""Learning-rate schedules: functions of the optimizer step, with Keras' names, defaults and formulas.

A schedule is passed as `learning_rate=` of an optimizer, which calls it with the number of steps taken so
far (0 at the first). All arithmetic is in Python floats: one call costs well under a microsecond.
Cosine and restarts: Loshchilov & Hutter, SGDR, https://arxiv.org/abs/1608.03983.
"""

import math
from collections.abc import Sequence
from typing import Any

from numlstm.registry import Configurable, Registry
from numlstm.registry import serialize as serialize

_registry: Registry[type["LearningRateSchedule"]] = Registry("learning-rate schedule")


class LearningRateSchedule(Configurable):
    """Base of all schedules: a callable from step to learning rate, with a JSON-able configuration.

    Subclass it and write `__call__(step)`; keep the constructor's arguments in attributes of their names.

    >>> class Halving(LearningRateSchedule):
    ...     def __call__(self, step):
    ...         return 0.1 * 0.5**step
    >>> Halving()(1)
    0.05
    """

    def __call__(self, step: int) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step)")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be > 0; got {value!r}")


@_registry.register()
class ExponentialDecay(LearningRateSchedule):
    """`initial_learning_rate * decay_rate ** (step / decay_steps)`; whole powers only when `staircase`.

    Raises ValueError unless `decay_steps > 0`.

    >>> ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5)(20)
    0.025
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        decay_rate: float,
        staircase: bool = False,
        name: str = "ExponentialDecay",
    ) -> None:
        _require_positive("decay_steps", decay_steps)
        self.initial_learning_rate = initial_learning_rate
        self.decay_steps = decay_steps
        self.decay_rate = decay_rate
        self.staircase = staircase
        self.name = name

    def __call__(self, step: int) -> float:
        power = step / self.decay_steps
        return self.initial_learning_rate * self.decay_rate ** (
            math.floor(power) if self.staircase else power
        )


@_registry.register()
class InverseTimeDecay(LearningRateSchedule):
    """`initial_learning_rate / (1 + decay_rate * step / decay_steps)`; whole quotients when `staircase`.

    Raises ValueError unless `decay_steps > 0`.

    >>> InverseTimeDecay(0.1, decay_steps=1, decay_rate=0.5)(2)
    0.05
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        decay_rate: float,
        staircase: bool = False,
        name: str = "InverseTimeDecay",
    ) -> None:
        _require_positive("decay_steps", decay_steps)
        self.initial_learning_rate = initial_learning_rate
        self.decay_steps = decay_steps
        self.decay_rate = decay_rate
        self.staircase = staircase
        self.name = name

    def __call__(self, step: int) -> float:
        quotient = step / self.decay_steps
        if self.staircase:
            quotient = math.floor(quotient)
        return self.initial_learning_rate / (1 + self.decay_rate * quotient)


@_registry.register()
class PiecewiseConstantDecay(LearningRateSchedule):
    """`values[0]` up to and including step `boundaries[0]`, then `values[1]`, and so on.

    Raises ValueError unless there is one value more than there are boundaries, and these rise.

    >>> rate = PiecewiseConstantDecay([100, 200], [1.0, 0.5, 0.1])
    >>> rate(100), rate(101), rate(10_000)
    (1.0, 0.5, 0.1)
    """

    def __init__(
        self, boundaries: Sequence[int], values: Sequence[float], name: str = "PiecewiseConstant"
    ) -> None:
        if len(values) != len(boundaries) + 1:
            raise ValueError(
                f"values must hold one more entry than boundaries; got {len(values)} values "
                f"and {len(boundaries)} boundaries"
            )
        if any(b <= a for a, b in zip(boundaries, list(boundaries)[1:], strict=False)):
            raise ValueError(f"boundaries must rise; got {list(boundaries)}")
        self.boundaries: list[int] = list(boundaries)
        self.values: list[float] = list(values)
        self.name = name

    def __call__(self, step: int) -> float:
        for boundary, value in zip(self.boundaries, self.values, strict=False):
            if step <= boundary:
                return value
        return self.values[-1]


@_registry.register()
class PolynomialDecay(LearningRateSchedule):
    """From `initial_learning_rate` to `end_learning_rate` over `decay_steps`, as `(1 - p) ** power`.

    With `cycle=True` the period is stretched to the next whole multiple of `decay_steps` instead of
    stopping at its end. Raises ValueError unless `decay_steps > 0`.

    >>> PolynomialDecay(1.0, decay_steps=10, end_learning_rate=0.5)(5)
    0.75
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        end_learning_rate: float = 0.0001,
        power: float = 1.0,
        cycle: bool = False,
        name: str = "PolynomialDecay",
    ) -> None:
        _require_positive("decay_steps", decay_steps)
        self.initial_learning_rate = initial_learning_rate
        self.decay_steps = decay_steps
        self.end_learning_rate = end_learning_rate
        self.power = power
        self.cycle = cycle
        self.name = name

    def __call__(self, step: int) -> float:
        period: float = self.decay_steps
        if self.cycle:
            period *= max(1, math.ceil(step / period))
        fraction = min(step, period) / period
        drop = self.initial_learning_rate - self.end_learning_rate
        return drop * (1 - fraction) ** self.power + self.end_learning_rate


@_registry.register()
class CosineDecay(LearningRateSchedule):
    """Half a cosine down to a fraction `alpha` of the start, after an optional linear warm-up.

    With `warmup_target`, the rate climbs from `initial_learning_rate` to it in `warmup_steps`, and the
    cosine of `decay_steps` begins there. Raises ValueError unless `decay_steps > 0`, or for `warmup_steps`
    without a `warmup_target`.

    >>> rate = CosineDecay(0.0, decay_steps=100, warmup_target=0.2, warmup_steps=10)
    >>> rate(5), rate(10), round(rate(60), 6), rate(110)
    (0.1, 0.2, 0.1, 0.0)
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: int,
        alpha: float = 0.0,
        name: str = "CosineDecay",
        warmup_target: float | None = None,
        warmup_steps: int = 0,
    ) -> None:
        _require_positive("decay_steps", decay_steps)
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0; got {warmup_steps!r}")
        if warmup_steps and warmup_target is None:
            raise ValueError(f"warmup_steps={warmup_steps} needs a warmup_target to climb to; got None")
        self.initial_learning_rate = initial_learning_rate
        self.decay_steps = decay_steps
        self.alpha = alpha
        self.name = name
        self.warmup_target = warmup_target
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        top = self.initial_learning_rate if self.warmup_target is None else self.warmup_target
        if step < self.warmup_steps:
            return self.initial_learning_rate + (top - self.initial_learning_rate) * step / self.warmup_steps
        fraction = min(step - self.warmup_steps, self.decay_steps) / self.decay_steps
        return top * ((1 - self.alpha) * 0.5 * (1 + math.cos(math.pi * fraction)) + self.alpha)


@_registry.register()
class CosineDecayRestarts(LearningRateSchedule):
    """Cosine decay that starts again: period i lasts `first_decay_steps * t_mul**i`, from `m_mul**i` the
    rate.

    Raises ValueError unless `first_decay_steps > 0`, `t_mul >= 1`.

    >>> rate = CosineDecayRestarts(1.0, first_decay_steps=10, m_mul=0.5)
    >>> rate(0), rate(10), rate(20)
    (1.0, 0.5, 0.25)
    """

    def __init__(
        self,
        initial_learning_rate: float,
        first_decay_steps: int,
        t_mul: float = 2.0,
        m_mul: float = 1.0,
        alpha: float = 0.0,
        name: str = "SGDRDecay",
    ) -> None:
        _require_positive("first_decay_steps", first_decay_steps)
        if t_mul < 1:
            raise ValueError(f"t_mul must be >= 1 (a period may not shrink to nothing); got {t_mul!r}")
        self.initial_learning_rate = initial_learning_rate
        self.first_decay_steps = first_decay_steps
        self.t_mul = t_mul
        self.m_mul = m_mul
        self.alpha = alpha
        self.name = name

    def __call__(self, step: int) -> float:
        # The period is found in closed form (a geometric series), and the fraction of it that has gone by.
        fraction = step / self.first_decay_steps
        if self.t_mul == 1.0:
            period = math.floor(fraction)
            fraction -= period
        else:
            period = math.floor(math.log(1 + fraction * (self.t_mul - 1)) / math.log(self.t_mul) + 1e-12)
            begun = (self.t_mul**period - 1) / (self.t_mul - 1)
            fraction = (fraction - begun) / self.t_mul**period
        height = 0.5 * self.m_mul**period * (1 + math.cos(math.pi * fraction))
        return self.initial_learning_rate * ((1 - self.alpha) * height + self.alpha)


def get(identifier: Any) -> LearningRateSchedule | None:
    """A schedule from its saved form or itself; None stays None. Raises ValueError for an unknown class.

    >>> get(serialize(CosineDecay(0.1, 100)))(50)
    0.05
    """
    return _registry.get(identifier)


deserialize = get
