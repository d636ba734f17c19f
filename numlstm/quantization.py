"""Models with int8 weights, for inference: `model.quantize("int8")`, and what saving and loading need of it.

The matrices of recurrent and dense layers are kept as whole numbers with a scale a column (kernels/int8.py says
how, and what it costs in accuracy); biases, per-unit parameters, embeddings and all other weights stay float32, and so do
states and outputs. Which layers and which weights is one table, `MATRICES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numlstm.autograd import QuantizedVariable, Variable
from numlstm.io.native import rebuilt
from numlstm.kernels.int8 import Quantized
from numlstm.layers.base import Layer, to_config
from numlstm.layers.core import Dense
from numlstm.layers.recurrent import Recurrent
from numlstm.registry import custom_objects_scope

if TYPE_CHECKING:
    from numlstm.models import Model

__all__ = ["SCHEMES", "hold_int8", "is_quantized", "quantize", "quantized_weights"]

SCHEMES = ("int8",)

# The weights that become int8, by kind of layer, and the methods that must be the library's own: in a subclass that
# computes with its weights in another way they stay float32.
MATRICES: tuple[tuple[type[Layer], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        Recurrent,
        ("kernel", "recurrent_kernel", "projection_kernel"),
        ("call", "run", "arguments", "cell_weights"),
    ),
    (Dense, ("kernel",), ("call",)),
)


def quantize(model: Model, scheme: str = "int8") -> Model:
    """A copy of a model for inference, with int8 weights; see `Model.quantize`."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {SCHEMES}, got {scheme!r}")
    if not model.built:
        raise ValueError(
            f"{model.name} is not built, so it has no weights: give input_shape, or call it once"
        )
    if is_quantized(model):
        raise ValueError(f"{model.name}: is quantized already")
    chosen = {path: names for path, layer in model.walk() if (names := _matrices(layer))}
    for path, layer in model.walk():
        if path in chosen:
            _check(path, layer)
    if not chosen:
        raise ValueError(f"{model.name}: has no recurrent or dense layer whose weights could become {scheme}")

    own = {type(layer).__name__: type(layer) for _, layer in model.walk()}
    own |= {layer.cell.name: layer.cell for _, layer in model.walk() if isinstance(layer, Recurrent)}
    with custom_objects_scope(own):  # a user's own classes need not be registered to be copied
        copy: Any = rebuilt(
            to_config(model), {path: layer.build_shape for path, layer in model.walk() if layer.built}
        )
    given = model.named_weights()
    for path, variable in copy.named_weights().items():
        variable.assign(given[path].data)
    hold_int8(copy, chosen)
    copy.preprocessing = model.preprocessing
    settings = model.get_compile_config()
    if settings is not None:
        copy.compile_from_config({**settings, "precision": "float32"})
    return copy


def hold_int8(model: Layer, chosen: Mapping[str, Any]) -> None:
    """Turn the weights `chosen`, names by layer's path, into int8, in place; nothing in the model is trained any more.

    Raises:
        ValueError: a layer or weight that is not there, or one that holds NaN or infinity.
    """
    layers = dict(model.walk())
    for path, names in chosen.items():
        layer: Any = layers.get(path)
        for name in names:
            weight = getattr(layer, name, None)
            if not isinstance(weight, Variable) or weight.ndim != 2 or isinstance(weight, QuantizedVariable):
                raise ValueError(f"{path}: has no matrix {name!r} that could be int8")
            try:
                held = QuantizedVariable(Quantized.of(weight.data), weight.name)
            except ValueError as error:
                raise ValueError(f"{path}/{name}: {error}") from error
            place = next(k for k, v in enumerate(layer._variables) if v is weight)
            layer._variables[place : place + 1] = [held, held.scale]
            setattr(layer, name, held)
    for variable in model.weights:
        variable.trainable = False


def quantized_weights(model: Layer) -> dict[str, list[str]]:
    """The names of the int8 weights, by the path of their layer."""
    found = {
        path: [name for name, value in vars(layer).items() if isinstance(value, QuantizedVariable)]
        for path, layer in model.walk()
    }
    return {path: names for path, names in found.items() if names}


def is_quantized(layer: Layer) -> bool:
    """Whether this layer, or one inside, has int8 weights."""
    return any(isinstance(variable, QuantizedVariable) for variable in layer.weights)


def _matrices(layer: Layer) -> list[str]:
    """The weights of this layer that can become int8."""
    for kind, names, methods in MATRICES:
        if isinstance(layer, kind) and all(getattr(type(layer), m) is getattr(kind, m) for m in methods):
            held = {id(v) for v in layer._variables}  # not one that another layer lends
            found: Any = ((name, getattr(layer, name, None)) for name in names)
            return [name for name, v in found if id(v) in held and v.ndim == 2]
    return []


def _check(path: str, layer: Layer) -> None:
    """Raise ValueError where the int8 kernels can't serve a layer."""
    if layer.dtype != "float32":
        raise ValueError(f"{path}: int8 weights compute in float32, got a layer of dtype {layer.dtype}")
