"""Where weights start: Keras' initializers, with its names, formulas and defaults.

An initializer is called with a shape and gives a NumPy array. The numbers come from `numlstm.random`: with
`seed=` always the same array, without it the next stream of the global generator, so that `nl.set_seed` fixes
every weight of a model. Sources: Glorot & Bengio 2010 (glorot), He et al. 2015 (he), LeCun et al. 1998
(lecun), Saxe et al. 2014 (orthogonal). In a formula, `fan_in` and `fan_out` are the numbers of input and
output units of the weight.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm import random
from numlstm.registry import Configurable, Registry

Shape = Sequence[int]

_registry: Registry[type["Initializer"]] = Registry("initializer")

# Standard deviation of a unit normal cut off at two of its own: dividing by it restores unit variance.
_TRUNCATED_STDDEV = 0.87962566103423978


class Initializer(Configurable):
    """Base class: write `__call__(shape, dtype="float32")` giving an array of that shape."""

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        """An array of `shape` and `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(shape, dtype)")


class _Drawn(Initializer):
    """An initializer that draws random numbers: keeps the seed and makes the generator."""

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise ValueError(f"seed: expected None or an integer >= 0, got {seed!r}")
        self.seed: int | None = None if seed is None else int(seed)

    def _generator(self) -> np.random.Generator:
        if self.seed is None:
            return random.generator()
        return np.random.Generator(np.random.Philox(self.seed))


@_registry.register("zero")
class Zeros(Initializer):
    """All zeros.

    >>> Zeros()((2,))
    array([0., 0.], dtype=float32)
    """

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        return np.zeros(tuple(shape), dtype)


@_registry.register("one")
class Ones(Initializer):
    """All ones.

    >>> Ones()((2,))
    array([1., 1.], dtype=float32)
    """

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        return np.ones(tuple(shape), dtype)


@_registry.register()
class Constant(Initializer):
    """One value everywhere, or a given array (pretrained embeddings). Raises ValueError when the array
    doesn't fit.

    >>> Constant(0.5)((2,))
    array([0.5, 0.5], dtype=float32)
    """

    def __init__(self, value: Any = 0.0) -> None:
        self.value: Any = value if np.isscalar(value) else np.array(value)

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        value = np.asarray(self.value, dtype)
        if value.ndim and value.shape != tuple(shape):
            raise ValueError(f"Constant: the value has shape {value.shape}, the weight {tuple(shape)}")
        return np.array(np.broadcast_to(value, tuple(shape)))


@_registry.register("uniform")
class RandomUniform(_Drawn):
    """Uniform between `minval` and `maxval`.

    >>> RandomUniform(-1, 1, seed=0)((3, 2)).shape
    (3, 2)
    """

    minval: float
    maxval: float

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        super().__init__(seed)
        if not minval <= maxval:
            raise ValueError(f"RandomUniform: minval {minval} is above maxval {maxval}")
        self.minval, self.maxval = minval, maxval

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        return self._generator().uniform(self.minval, self.maxval, tuple(shape)).astype(dtype)


@_registry.register("normal")
class RandomNormal(_Drawn):
    """Normal with the given mean and standard deviation.

    >>> RandomNormal(seed=0)((3, 2)).shape
    (3, 2)
    """

    mean: float
    stddev: float

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        super().__init__(seed)
        if stddev < 0:
            raise ValueError(f"RandomNormal: stddev must be >= 0, got {stddev}")
        self.mean, self.stddev = mean, stddev

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        return self._generator().normal(self.mean, self.stddev, tuple(shape)).astype(dtype)


@_registry.register()
class TruncatedNormal(_Drawn):
    """Normal, with values beyond two standard deviations drawn again.

    >>> bool(abs(TruncatedNormal(stddev=1.0, seed=0)((1000,))).max() <= 2)
    True
    """

    mean: float
    stddev: float

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        super().__init__(seed)
        if stddev < 0:
            raise ValueError(f"TruncatedNormal: stddev must be >= 0, got {stddev}")
        self.mean, self.stddev = mean, stddev

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        unit = _truncated_unit_normal(self._generator(), tuple(shape))
        return (self.mean + self.stddev * unit).astype(dtype)


@_registry.register()
class VarianceScaling(_Drawn):
    """Random numbers of variance `scale / fan`, where `fan` is `fan_in`, `fan_out` or (`fan_avg`) their mean.

    `distribution`: "truncated_normal", "untruncated_normal" or "uniform". The initializers named after
    Glorot, He and LeCun are settings of this one.

    >>> w = VarianceScaling(scale=2.0, mode="fan_in", distribution="uniform", seed=1)((50, 4))
    >>> bool(abs(w).max() <= (3 * 2 / 50) ** 0.5)
    True
    """

    scale: float

    MODES = ("fan_in", "fan_out", "fan_avg")
    DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        distribution = "truncated_normal" if distribution == "normal" else distribution
        if scale <= 0:
            raise ValueError(f"VarianceScaling: scale must be > 0, got {scale}")
        if mode not in self.MODES:
            raise ValueError(f"VarianceScaling: mode must be one of {self.MODES}, got {mode!r}")
        if distribution not in self.DISTRIBUTIONS:
            raise ValueError(
                f"VarianceScaling: distribution must be one of {self.DISTRIBUTIONS}, got {distribution!r}"
            )
        self.scale, self.mode, self.distribution = scale, mode, distribution

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        shape = tuple(shape)
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        variance = self.scale / max(1.0, fan)
        generator = self._generator()
        if self.distribution == "uniform":
            limit = math.sqrt(3 * variance)
            values = generator.uniform(-limit, limit, shape)
        elif self.distribution == "untruncated_normal":
            values = generator.normal(0.0, math.sqrt(variance), shape)
        else:
            values = math.sqrt(variance) / _TRUNCATED_STDDEV * _truncated_unit_normal(generator, shape)
        return values.astype(dtype)


if TYPE_CHECKING:

    class _Preset(VarianceScaling):
        """What type checkers know of the classes that `_preset` makes."""

        def __init__(self, seed: int | None = None) -> None: ...


def _preset(name: str, scale: float, mode: str, distribution: str, says: str) -> Any:
    """A named setting of VarianceScaling, whose only parameter is the seed."""

    def __init__(self: VarianceScaling, seed: int | None = None) -> None:
        VarianceScaling.__init__(self, scale, mode, distribution, seed)

    body = {"__init__": __init__, "__doc__": says, "__module__": __name__, "__qualname__": name}
    return _registry.add(name, type(name, (VarianceScaling,), body))


GlorotUniform: "type[_Preset]" = _preset(
    "GlorotUniform", 1.0, "fan_avg", "uniform", "Uniform within sqrt(6 / (fan_in + fan_out))."
)
GlorotNormal: "type[_Preset]" = _preset(
    "GlorotNormal", 1.0, "fan_avg", "truncated_normal", "Variance 2 / (fan_in + fan_out)."
)
HeUniform: "type[_Preset]" = _preset(
    "HeUniform", 2.0, "fan_in", "uniform", "Uniform within sqrt(6 / fan_in)."
)
HeNormal: "type[_Preset]" = _preset(
    "HeNormal", 2.0, "fan_in", "truncated_normal", "Truncated normal of variance 2 / fan_in."
)
LecunUniform: "type[_Preset]" = _preset(
    "LecunUniform", 1.0, "fan_in", "uniform", "Uniform within sqrt(3 / fan_in)."
)
LecunNormal: "type[_Preset]" = _preset(
    "LecunNormal", 1.0, "fan_in", "truncated_normal", "Truncated normal of variance 1 / fan_in."
)


@_registry.register()
class Orthogonal(_Drawn):
    """A matrix with orthonormal rows or columns (whichever are fewer), times `gain`.

    Weights of more than two axes are made as a matrix whose rows run over all axes but the last.

    >>> q = Orthogonal(seed=0)((3, 12))
    >>> bool(abs(q @ q.T - np.eye(3)).max() < 1e-6)
    True
    """

    def __init__(self, gain: float = 1.0, seed: int | None = None) -> None:
        super().__init__(seed)
        self.gain = gain

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        shape = tuple(shape)
        if len(shape) < 2:
            raise ValueError(f"Orthogonal: the weight must have at least two axes, got shape {shape}")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        normal = self._generator().standard_normal((max(rows, columns), min(rows, columns)))
        q, r = np.linalg.qr(normal)
        q *= np.where(
            np.diag(r) < 0, -1.0, 1.0
        )  # QR leaves the signs open; this makes q uniformly distributed
        return (self.gain * (q if rows >= columns else q.T)).reshape(shape).astype(dtype)


@_registry.register("eye")
class Identity(Initializer):
    """The identity matrix times `gain`; two-axis weights only.

    >>> Identity()((2, 2))
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, shape: Shape, dtype: Any = "float32") -> np.ndarray:
        if len(shape) != 2:
            raise ValueError(f"Identity: the weight must have two axes, got shape {tuple(shape)}")
        return self.gain * np.eye(shape[0], shape[1], dtype=dtype)


def get(identifier: Any) -> Any:
    """An initializer from its name, its saved form, itself, or any function of (shape, dtype).

    >>> get("glorot_uniform")
    GlorotUniform(seed=None)
    """
    return _registry.get(identifier)


def fans(shape: Shape) -> tuple[float, float]:
    """(fan_in, fan_out) of a weight of this shape, as Keras counts them."""
    shape = tuple(shape)
    if not shape:
        return 1.0, 1.0
    if len(shape) == 1:
        return float(shape[0]), float(shape[0])
    field = math.prod(shape[:-2])
    return float(shape[-2] * field), float(shape[-1] * field)


def _truncated_unit_normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = generator.standard_normal(math.prod(shape))
    outside = np.flatnonzero(np.abs(values) > 2)
    while outside.size:
        values[outside] = generator.standard_normal(outside.size)
        outside = outside[np.abs(values[outside]) > 2]
    return values.reshape(shape)


# Keras offers every initializer under a snake_case name as well.
zeros = Zeros
ones = Ones
constant = Constant
random_uniform = RandomUniform
random_normal = RandomNormal
truncated_normal = TruncatedNormal
variance_scaling = VarianceScaling
orthogonal = Orthogonal
identity = Identity
glorot_uniform: "type[_Preset]" = GlorotUniform
glorot_normal: "type[_Preset]" = GlorotNormal
he_uniform: "type[_Preset]" = HeUniform
he_normal: "type[_Preset]" = HeNormal
lecun_uniform: "type[_Preset]" = LecunUniform
lecun_normal: "type[_Preset]" = LecunNormal
