"""Activation functions by name: Keras 3's names (TensorFlow.js' spelling too) and definitions, from tensor to
tensor.

Any function of one tensor serves as an activation; these are the ones that have a name in a saved model. The
recurrent layers compile their activations into the cell, so they take names only: `name_of` gives a known
function's name.
"""

from collections.abc import Callable
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


tanh = _registry.add("tanh", ops.tanh)
sigmoid = _registry.add("sigmoid", ops.sigmoid)
relu = _registry.add("relu", ops.relu)
leaky_relu = _registry.add("leaky_relu", ops.leaky_relu)
elu = _registry.add("elu", ops.elu)
selu = _registry.add("selu", ops.selu)
gelu = _registry.add("gelu", ops.gelu)
silu = _registry.add("silu", ops.silu, "swish")
softplus = _registry.add("softplus", ops.softplus)
softsign = _registry.add("softsign", ops.softsign)
hard_sigmoid = _registry.add("hard_sigmoid", ops.hard_sigmoid)
softmax = _registry.add("softmax", ops.softmax)
log_softmax = _registry.add("log_softmax", ops.log_softmax)


def get(identifier: Any) -> Activation:
    """An activation from its name, or itself; None is `linear`.

    Raises:
        ValueError: an unknown name (the known ones are listed), or neither a name nor a function.

    >>> get("hardSigmoid").__name__
    'hard_sigmoid'
    """
    return linear if identifier is None else _registry.get(identifier)


def name_of(identifier: Any) -> str:
    """The name of a known activation, given by name or as the function.

    Raises:
        ValueError: a function that has no name here.

    >>> name_of(None), name_of("hardSigmoid"), name_of(ops.tanh)
    ('linear', 'hard_sigmoid', 'tanh')
    """
    function = get(identifier)
    for name in _registry.names():
        if _registry.find(name) is function:
            return name
    raise ValueError(
        f"activation: {identifier!r} has no name; known: {', '.join(_registry.names())}. "
        f"A recurrent cell with equations of its own is written with nl.cell and used with nl.RNN"
    )
