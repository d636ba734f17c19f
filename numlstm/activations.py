"""Activation functions by name: Keras 3's names (TensorFlow.js' spelling too) and definitions, from tensor to
tensor.

Any function of one tensor serves as an activation; these are the ones that have a name in a saved model. The
recurrent layers compile their activations into the cell, so they take names only: `name_of` gives a known
function's name. Those of the ONNX operators that have parameters take them in the name:
`"leaky_relu(alpha=0.1)"`, `"hard_sigmoid(alpha=0.2, beta=0.5)"`.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from numlstm import ops
from numlstm.autograd import Tensor
from numlstm.registry import Registry

Activation = Callable[[Tensor], Tensor]

_registry: Registry[Activation] = Registry("activation")


@_registry.register()
def linear(x: Tensor) -> Tensor:
    """`x` itself."""
    return x


@_registry.register()
def exponential(x: Tensor) -> Tensor:
    """`exp(x)`."""
    return ops.exp(x)


@_registry.register()
def relu6(x: Tensor) -> Tensor:
    """`x`, kept between 0 and 6."""
    return ops.clip(x, 0.0, 6.0)


@_registry.register()
def hard_tanh(x: Tensor) -> Tensor:
    """`x`, kept between -1 and 1."""
    return ops.clip(x, -1.0, 1.0)


@_registry.register()
def mish(x: Tensor) -> Tensor:
    """`x tanh(log(1 + exp(x)))`: Misra 2019."""
    return x * ops.tanh(ops.softplus(x))


@_registry.register()
def log_sigmoid(x: Tensor) -> Tensor:
    """`log(1 / (1 + exp(-x)))`, without overflow."""
    return -ops.softplus(-x)


@_registry.register()
def affine(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """`alpha x + beta`."""
    return ops.tensor(x) * alpha + beta


@_registry.register()
def scaled_tanh(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """`alpha tanh(beta x)`."""
    return ops.tanh(ops.tensor(x) * beta) * alpha


@_registry.register()
def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """`x` where it is above `alpha`, 0 elsewhere."""
    x = ops.tensor(x)
    return ops.where(x.data > alpha, x, 0.0)


def _leaky_relu(x: Tensor, alpha: float = 0.2) -> Tensor:
    return ops.leaky_relu(x, alpha)


def _hard_sigmoid(x: Tensor, alpha: float = 1 / 6, beta: float = 0.5) -> Tensor:
    return ops.clip(ops.tensor(x) * alpha + beta, 0.0, 1.0)


tanh: Activation = _registry.add("tanh", ops.tanh)
sigmoid: Activation = _registry.add("sigmoid", ops.sigmoid)
relu: Activation = _registry.add("relu", ops.relu)
leaky_relu: Activation = _registry.add("leaky_relu", ops.leaky_relu)
elu: Activation = _registry.add("elu", ops.elu)
selu: Activation = _registry.add("selu", ops.selu)
gelu: Activation = _registry.add("gelu", ops.gelu)
silu: Activation = _registry.add("silu", ops.silu, "swish")
softplus: Activation = _registry.add("softplus", ops.softplus)
softsign: Activation = _registry.add("softsign", ops.softsign)
hard_sigmoid: Activation = _registry.add("hard_sigmoid", ops.hard_sigmoid)
softmax: Activation = _registry.add("softmax", ops.softmax)
log_softmax: Activation = _registry.add("log_softmax", ops.log_softmax)


# What a name may carry in brackets: the parameters of these functions, which are those of the cells' activations.
_WITH_PARAMETERS: dict[str, Activation] = {
    "leaky_relu": _leaky_relu,
    "elu": ops.elu,
    "hard_sigmoid": _hard_sigmoid,
    "affine": affine,
    "scaled_tanh": scaled_tanh,
    "thresholded_relu": thresholded_relu,
}


class Parametric:
    """An activation with parameters of its own, made by `get` from a name that carries them.

    Arguments:
        name: such as "leaky_relu(alpha=0.1)"; parameters that are left out keep their defaults.

    Raises:
        ValueError: an unknown activation, one without parameters, an unknown parameter or no finite number.

    >>> Parametric("hardSigmoid( alpha=.2 )").name
    'hard_sigmoid(alpha=0.2)'
    """

    def __init__(self, name: str) -> None:
        form = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", name)
        if form is None:
            raise ValueError(f"activation: expected a name such as 'elu(alpha=0.5)', got {name!r}")
        plain = name_of(form[1])
        if plain not in _WITH_PARAMETERS:
            raise ValueError(
                f"activation: {plain} has no parameters, got {name!r}; those that have: "
                f"{', '.join(sorted(_WITH_PARAMETERS))}"
            )
        self._function = _WITH_PARAMETERS[plain]
        known = [p for p in inspect.signature(self._function).parameters if p != "x"]
        self._options: dict[str, float] = {}
        for part in filter(str.strip, form[2].split(",")):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known:
                raise ValueError(
                    f"activation: {plain} has no parameter {key!r}, got {name!r}; known: {', '.join(known)}"
                )
            try:
                self._options[key] = float(value)
            except ValueError:
                self._options[key] = math.nan
            if not math.isfinite(self._options[key]):
                raise ValueError(f"activation: {key}: expected a finite number, got {value!r} in {name!r}")
        values = ", ".join(f"{k}={self._options[k]!r}" for k in known if k in self._options)
        self.name: str = f"{plain}({values})" if values else plain

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of a tensor."""
        return self._function(x, **self._options)

    def get_config(self) -> dict[str, str]:
        """What a saved model keeps."""
        return {"name": self.name}

    def __repr__(self) -> str:
        return f"<activation {self.name}>"


@cache
def _parametric(name: str) -> Parametric:
    return Parametric(name)


def get(identifier: Any) -> Activation:
    """An activation from its name, or itself; None is `linear`.

    Raises:
        ValueError: an unknown name (the known ones are listed), or neither a name nor a function.

    >>> get("hardSigmoid").__name__
    'hard_sigmoid'
    >>> get("leaky_relu(alpha=0.5)")(ops.tensor([-2.0, 2.0]))
    Tensor([-1.,  2.], dtype=float32)
    """
    if isinstance(identifier, Mapping) and identifier.get("class_name") == "Parametric":
        identifier = dict(identifier.get("config") or {}).get("name")
    if isinstance(identifier, str) and "(" in identifier:
        return _parametric(identifier)
    return linear if identifier is None else _registry.get(identifier)


def name_of(identifier: Any) -> str:
    """The name of a known activation, given by name or as the function.

    Raises:
        ValueError: a function that has no name here.

    >>> name_of(None), name_of("hardSigmoid"), name_of(ops.tanh)
    ('linear', 'hard_sigmoid', 'tanh')
    >>> name_of("elu( alpha=2 )")
    'elu(alpha=2.0)'
    """
    function = get(identifier)
    if isinstance(function, Parametric):
        return function.name
    for name in _registry.names():
        if _registry.find(name) is function:
            return name
    raise ValueError(
        f"activation: {identifier!r} has no name; known: {', '.join(_registry.names())}. "
        f"A recurrent cell with equations of its own is written with nl.cell and used with nl.RNN"
    )
