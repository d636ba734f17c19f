"""PyTorch's weights and modules, in and out.

    model = nl.io.load_torch("model.pt")             # a state_dict in a file; needs no PyTorch
    model = nl.io.from_torch(module)                 # an nn.LSTM, or an nn.Sequential of such modules
    module = nl.io.to_torch(model)                   # an nn.Sequential that computes the same
    nl.io.to_torch(model, module)                    # into a module there is

Inputs are (batch, time, features) here, whatever `batch_first` says there; a recurrent module hands on the outputs of
all steps, the first of its results. Weights go over bit by bit, and come back so: the two biases of an LSTM or RNN are
kept apart (`split_bias`). Their layouts are in `io.conversion`; state_dicts are read by `io.torch_state`.
float16 and bfloat16 become float32, without loss.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numlstm import activations
from numlstm.io import conversion
from numlstm.io.atomic import atomic_write
from numlstm.io.torch_state import (
    NONLINEARITIES,
    RECURRENT,
    dense,
    embedding,
    layer_norm,
    load_torch,
    recurrent_layers,
    sequential,
    torch_layers,
    torch_state_dict,
)
from numlstm.layers import (
    Activation,
    Bidirectional,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    InputLayer,
    Layer,
    LayerNormalization,
    Recurrent,
    TimeDistributed,
)
from numlstm.models import Model, Sequential
from numlstm.quantization import is_quantized

if TYPE_CHECKING:
    import torch

__all__ = ["from_torch", "load_torch", "save_torch", "to_torch", "torch_layers", "torch_state_dict"]

Array = np.ndarray


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("PyTorch is not installed: pip install numlstm[torch]") from error
    return torch


# Modules


def from_torch(module: torch.nn.Module, *, return_sequences: bool = True) -> Sequential:
    """A model that computes what a PyTorch module does, with its weights.

    A recurrent module hands on the outputs of all steps, (batch, time, features). A layer whose parameters all have
    `requires_grad=False` is not trained here either. An Embedding's `padding_idx` keeps its row, as the others, but
    here it would be trained; it makes no mask.

    Arguments:
        module: nn.LSTM, GRU, RNN (stacked, in both directions, with dropout or a projection), Linear, Embedding,
            LayerNorm, Dropout, Flatten, Identity or an activation, an nn.Sequential of them, or what `to_torch` gave.
        return_sequences: False: the last recurrent layer gives its last output only; of two directions, the one that
            each read last.

    Raises:
        ValueError: another module, or an option that has no counterpart here; it is named.
        ImportError: PyTorch is not installed.

    >>> from_torch(nn.Sequential(nn.LSTM(3, 8, num_layers=2), nn.Linear(8, 1)))  # doctest: +SKIP
    <Sequential 'sequential'>
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
    layers: list[Layer] = []
    for path, leaf in _leaves(module, torch.nn):
        made = _layers_of(path, leaf, torch)
        held = list(leaf.parameters())
        for layer in made:
            layer.trainable = not held or any(p.requires_grad for p in held)
        layers += made
    return sequential(layers, return_sequences)


def _leaves(module: Any, nn: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of nested nn.Sequential, in order, with their names."""
    if type(module) is nn.Sequential:
        for name, child in module.named_children():
            yield from _leaves(child, nn, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _arrays(module: Any) -> dict[str, Array]:
    """A module's parameters as arrays; those of half precision as float32."""
    return {name: _array(p) for name, p in module.named_parameters()}


def _array(tensor: Any) -> Array:
    t = tensor.detach().cpu()
    return (t.float() if t.element_size() < 4 else t).contiguous().numpy().copy()


def _no(path: str, module: Any, option: str, expected: Any, got: Any) -> ValueError:
    where = f"{path}: " if path else ""
    return ValueError(f"{where}{type(module).__name__}: {option}: expected {expected}, got {got}")


def _layers_of(path: str, module: Any, torch: Any) -> list[Layer]:
    nn = torch.nn
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return _from_recurrent(path, module)
    match module:
        case nn.Linear():
            return [dense(_array(module.weight), None if module.bias is None else _array(module.bias))]
        case nn.Embedding():
            for option, expected in (("max_norm", None), ("scale_grad_by_freq", False)):
                if getattr(module, option) != expected:
                    raise _no(path, module, option, expected, getattr(module, option))
            return [embedding(_array(module.weight))]
        case nn.LayerNorm():
            return [layer_norm(module.normalized_shape, module.eps, **_arrays(module))]
        case nn.Dropout():
            if not module.p < 1:
                raise _no(path, module, "p", "less than 1", module.p)
            return [Dropout(module.p)]
        case nn.Flatten():
            if (module.start_dim, module.end_dim) != (1, -1):
                raise _no(
                    path, module, "start_dim, end_dim", "1, -1", f"{module.start_dim}, {module.end_dim}"
                )
            return [Flatten()]
        case nn.Identity():
            return []
    name = _activation_name(path, module, nn)
    if name is None:
        kind, where = type(module).__name__, f" at {path}" if path else ""
        raise ValueError(
            f"module: {kind}{where}: expected an nn.LSTM, GRU, RNN, Linear, Embedding, LayerNorm, Dropout, Flatten, "
            f"Identity or activation, or an nn.Sequential of them; what another module computes can't be read off. "
            f"Build the model here and take the parts: nl.io.torch_layers(module.state_dict(), name)"
        )
    return [Activation(name)]


def _from_recurrent(path: str, module: Any) -> list[Layer]:
    link = {name: getattr(module, name) for name in ("merge", "reverse") if hasattr(module, name)}
    if module.dropout >= 1:
        raise _no(path, module, "dropout", "less than 1", module.dropout)
    options = {"dropout": module.dropout, "activation": getattr(module, "nonlinearity", "tanh"), **link}
    layers = recurrent_layers(_arrays(module), **options)
    return list(sequential(layers, False).layers) if getattr(module, "last", False) else layers


# nn's activations: the name here, and the attributes that must be so.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU": ("relu", {}),
    "ReLU6": ("relu6", {}),
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "LogSigmoid": ("log_sigmoid", {}),
    "SiLU": ("silu", {}),
    "SELU": ("selu", {}),
    "Mish": ("mish", {}),
    "Softsign": ("softsign", {}),
    "Hardsigmoid": ("hard_sigmoid", {}),
    "GELU": ("gelu", {"approximate": "none"}),
    "Softplus": ("softplus", {"beta": 1, "threshold": 20}),
    "Hardtanh": ("hard_tanh", {"min_val": -1, "max_val": 1}),
    "Softmax": ("softmax", {"dim": -1}),
    "LogSoftmax": ("log_softmax", {"dim": -1}),
}
_SLOPES = {
    "ELU": ("elu", "alpha"),
    "LeakyReLU": ("leaky_relu", "negative_slope"),
}  # with a parameter, our alpha


def _activation_name(path: str, module: Any, nn: Any) -> str | None:
    kind = type(module).__name__
    if type(module) is not getattr(nn, kind, None):
        return None
    if kind in _SLOPES:
        name, option = _SLOPES[kind]
        return f"{name}(alpha={getattr(module, option)!r})"
    if kind not in _ACTIVATIONS:
        return None
    name, fixed = _ACTIVATIONS[kind]
    for option, expected in fixed.items():
        if getattr(module, option) != expected:
            raise _no(path, module, option, expected, getattr(module, option))
    return name


# Out


def to_torch(model: Model, module: torch.nn.Module | None = None) -> torch.nn.Module:
    """A PyTorch module that computes what a model does, with its weights; or the weights into a module there is.

    A bias that is one becomes `bias_ih`, with zeros in `bias_hh`. Inputs are (batch, time, features): the recurrent
    modules made here have `batch_first=True` and give one tensor. Regularizers, constraints and `remat_steps` have no
    part in what is computed and stay behind.

    Arguments:
        model: a `Sequential` (of such, too) of LSTM, GRU, SimpleRNN, Bidirectional, Dense, Embedding,
            LayerNormalization, Dropout, Activation, Flatten, TimeDistributed of one of them.
        module: any nn.Module whose nn.LSTM, GRU, RNN, Linear, Embedding and LayerNorm modules, in the order in which
            they were made, have the kinds and sizes of the model's layers. Its weights are replaced, in place, all or
            none; how it computes with them is its own.

    Returns the new nn.Sequential, in evaluation mode, or `module`.

    Raises:
        ValueError: a layer or option that PyTorch's modules have not got; it is named. Or a module that doesn't fit.
        ImportError: PyTorch is not installed.
    """
    torch = _torch()
    if not isinstance(model, Model):
        raise ValueError(f"model: expected a numlstm model, got {type(model).__name__}")
    made = torch.nn.Sequential(*(m for layer in _flat_layers(model) for m in _modules(layer, torch))).eval()
    if module is None:
        return made
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
    _copy(made, module, torch)
    return module


def save_torch(model: Model, path: str | os.PathLike[str]) -> None:
    """Write the state_dict of `to_torch(model)` by `torch.save`, whole or not at all. Raises as `to_torch`."""
    torch = _torch()
    state = to_torch(model).state_dict()
    with atomic_write(path) as file:
        torch.save(state, file)


def _flat_layers(model: Model) -> Iterator[Layer]:
    if not isinstance(model, Sequential):
        raise ValueError(
            f"model: expected a Sequential, whose order is known, got {type(model).__name__} {model.name}"
        )
    if not model.built:
        raise ValueError(
            f"{model.name} is not built, so it has no weights: give input_shape, or call it once"
        )
    for layer in model.layers:
        if isinstance(layer, Model):
            yield from _flat_layers(layer)
        elif not isinstance(layer, InputLayer):
            yield layer


def _refused(layer: Layer, option: str, hint: str = "") -> ValueError:
    value = getattr(layer, option)
    return ValueError(f"{layer.name}: {option}={value!r} has no counterpart in PyTorch's modules{hint}")


def _modules(layer: Layer, torch: Any) -> list[Any]:
    nn = torch.nn
    if is_quantized(layer):
        raise ValueError(f"{layer.name}: has int8 weights, which PyTorch's modules have not got")
    dtype = getattr(torch, layer.dtype)
    if isinstance(layer, TimeDistributed) and isinstance(layer.layer, (Dense, Activation, Dropout)):
        layer = layer.layer  # works step by step anyway
    if isinstance(layer, (Recurrent, Bidirectional)):
        return [_recurrent_module(layer, torch)]
    match layer:
        case Dense():
            linear = nn.Linear(layer.kernel.shape[0], layer.units, bias=layer.use_bias, dtype=dtype)
            _assign(linear, {"weight": layer.kernel.numpy().T} | _optional(bias=layer.bias), torch)
            return [_frozen(layer, linear), *_activation(layer, nn)]
        case Embedding():
            if layer.mask_zero:
                raise _refused(layer, "mask_zero")
            table = nn.Embedding(layer.input_dim, layer.output_dim, dtype=dtype)
            _assign(table, {"weight": layer.embeddings.numpy()}, torch)
            return [_frozen(layer, table)]
        case LayerNormalization():
            if layer.center and not layer.scale:
                raise _refused(layer, "scale")
            count = 1 if isinstance(layer.axis, int) else len(layer.axis)
            shape = layer.build_shape[-count:]
            norm = nn.LayerNorm(
                shape, layer.epsilon, layer.scale, **({} if layer.center else {"bias": False}), dtype=dtype
            )
            _assign(norm, _optional(weight=layer.gamma, bias=layer.beta), torch)
            return [_frozen(layer, norm)]
        case Dropout():
            if layer.noise_shape is not None:
                raise _refused(layer, "noise_shape")
            return [nn.Dropout(layer.rate)]
        case Activation():
            return _activation(layer, nn)
        case Flatten():
            return [nn.Flatten()]
    raise ValueError(f"{layer.name}: a {type(layer).__name__} has no counterpart among PyTorch's modules")


def _optional(**variables: Any) -> dict[str, Array]:
    return {name: v.numpy() for name, v in variables.items() if v is not None}


def _assign(module: Any, arrays: Mapping[str, Array], torch: Any) -> None:
    with torch.no_grad():
        for name, array in arrays.items():
            getattr(module, name).copy_(torch.from_numpy(np.array(array, order="C")))


def _frozen(layer: Layer, module: Any) -> Any:
    for p in module.parameters():
        p.requires_grad_(layer.trainable)
    return module


def _activation(layer: Any, nn: Any) -> list[Any]:
    """The activation of a layer as a module, none for the identity."""
    name = activations.name_of(layer.activation)
    if name == "linear":
        return []
    plain, _, rest = name.partition("(alpha=")
    for kind, (here, option) in _SLOPES.items():
        if plain == here:
            default = {"elu": 1.0, "leaky_relu": 0.2}[plain]
            return [getattr(nn, kind)(**{option: float(rest.rstrip(")")) if rest else default})]
    for kind, (here, fixed) in _ACTIVATIONS.items():
        if name == here:
            return [getattr(nn, kind)(**fixed)]
    raise ValueError(f"{layer.name}: activation={name!r} has no counterpart in PyTorch's modules")


# What PyTorch's recurrent modules have not got, and the value that stands for its absence.
_ABSENT = {
    "layer_norm": False, "cell_clip": None, "clip": None, "peephole": False, "coupled": False, "zoneout": 0.0,
    "recurrent_activation": "sigmoid", "reset_after": True, "stateful": False, "return_state": False,
    "return_cell_sequence": False, "zero_output_for_mask": False,
}  # fmt: skip
_THINNING = ("dropout", "recurrent_dropout", "recurrent_dropconnect")  # in training alone


def _check_recurrent(layer: Any) -> str:
    """The operator's name. Raises ValueError, naming the option, when PyTorch has not got the like."""
    kind = next((k for k, cls in RECURRENT.items() if type(layer) is cls), None)
    if kind is None:
        raise ValueError(f"{layer.name}: a {type(layer).__name__} has no counterpart among PyTorch's modules")
    for option, absent in _ABSENT.items():
        if getattr(layer, option, absent) != absent:
            raise _refused(layer, option)
    for option in _THINNING:
        if getattr(layer, option):
            raise _refused(layer, option, f"; for inference, set layer.{option} = 0 first")
    if getattr(layer, "output_activation", None) not in (None, layer.activation):
        raise _refused(layer, "output_activation")
    if layer.activation not in (NONLINEARITIES if kind == "RNN" else ("tanh",)):
        raise _refused(layer, "activation")
    return kind


def _recurrent_module(layer: Any, torch: Any) -> Any:
    from numlstm.io.torch_modules import CLASSES

    pair = [layer.forward_layer, layer.backward_layer] if isinstance(layer, Bidirectional) else [layer]
    kinds = [_check_recurrent(one) for one in pair]
    first = pair[0]
    for option in ("units", "projection", "use_bias", "activation"):
        if len({getattr(one, option) for one in pair}) > 1 or len(set(kinds)) > 1:
            raise ValueError(
                f"{layer.name}: PyTorch's two directions are alike; expected layers of equal {option}"
            )
    options: dict[str, Any] = {"bias": first.use_bias, "bidirectional": len(pair) == 2}
    if first.projection:
        options["proj_size"] = first.projection
    if kinds[0] == "RNN":
        options["nonlinearity"] = first.activation
    if len(pair) == 2:
        if layer.merge_mode is None:
            raise _refused(layer, "merge_mode")
        options["merge"] = layer.merge_mode
    module = CLASSES[kinds[0]](
        first.kernel.shape[0], first.units, last=not first.return_sequences, reverse=first.go_backwards,
        dtype=getattr(torch, first.dtype), **options,
    )  # fmt: skip
    for one, suffix in zip(pair, ("", "_reverse"), strict=False):
        weights = _optional(
            kernel=one.kernel,
            recurrent_kernel=one.recurrent_kernel,
            bias=one.bias,
            projection=one.projection_kernel,
        )
        arrays = conversion.to_torch(kinds[0], weights)
        _assign(module, {f"{name}_l0{suffix}": a for name, a in arrays.items()}, torch)
    return _frozen(layer, module)


class _Slot(NamedTuple):
    """The parameters of one layer of a module, and what they belong to."""

    path: str
    kind: str
    parameters: dict[str, Any]


def _slots(module: Any, nn: Any) -> Iterator[_Slot]:
    for path, part in module.named_modules():
        if isinstance(part, (nn.LSTM, nn.GRU, nn.RNN)):
            kind = part.mode  # LSTM, GRU, RNN_TANH or RNN_RELU
            for k in range(part.num_layers):
                ending = re.compile(rf"_l{k}(_reverse)?$")
                held = {ending.sub(r"\1", n): p for n, p in part.named_parameters() if ending.search(n)}
                yield _Slot(f"{path}, layer {k}", kind, held)
        elif isinstance(part, (nn.Linear, nn.Embedding)):
            yield _Slot(path, type(part).__name__, dict(part.named_parameters()))
        elif isinstance(part, nn.LayerNorm):
            yield _Slot(path, f"LayerNorm of eps {part.eps}", dict(part.named_parameters()))


def _copy(source: Any, target: Any, torch: Any) -> None:
    """The weights of one module into another. Raises ValueError, before any is changed, unless all fit."""
    ours, theirs = list(_slots(source, torch.nn)), list(_slots(target, torch.nn))
    if len(ours) != len(theirs):
        raise ValueError(
            f"module: expected {len(ours)} layers with weights ({', '.join(s.kind for s in ours)}), "
            f"got {len(theirs)} ({', '.join(s.kind for s in theirs)})"
        )
    known = {id(p) for slot in theirs for p in slot.parameters.values()}
    for name, p in target.named_parameters():
        if id(p) not in known:
            raise ValueError(f"module: {name}: a parameter of no layer that is known; nothing was written")
    for a, b in zip(ours, theirs, strict=True):
        shapes = [{n: tuple(p.shape) for n, p in s.parameters.items()} for s in (a, b)]
        if a.kind != b.kind or shapes[0] != shapes[1]:
            raise ValueError(
                f"module: {b.path}: expected {a.kind} with {shapes[0]}, got {b.kind} with {shapes[1]}"
            )
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            for name, p in b.parameters.items():
                p.copy_(a.parameters[name])
