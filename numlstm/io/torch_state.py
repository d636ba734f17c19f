"""PyTorch's state_dicts as layers with weights: from a file, without PyTorch.

A state_dict names tensors by module and parameter, `encoder.lstm.weight_ih_l0`. Which module a group of them belongs to
is seen from names and shapes, their layouts are in `io.conversion`, and where the features leave one chain of modules
only, `load_torch` makes it a model. What `from_torch` and `load_torch` build of arrays is built here, for both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numlstm.io import conversion
from numlstm.io.torch_file import is_state_dict, read_torch_file
from numlstm.layers import (
    GRU,
    LSTM,
    Bidirectional,
    Dense,
    Dropout,
    Embedding,
    Layer,
    LayerNormalization,
    Recurrent,
    SimpleRNN,
)
from numlstm.layers.base import blank_weights
from numlstm.models import Sequential

__all__ = [
    "NONLINEARITIES",
    "RECURRENT",
    "dense",
    "embedding",
    "layer_norm",
    "load_torch",
    "recurrent_layers",
    "sequential",
    "torch_layers",
    "torch_state_dict",
]

Array = np.ndarray

RECURRENT: dict[str, type[Recurrent]] = {"LSTM": LSTM, "GRU": GRU, "RNN": SimpleRNN}
NONLINEARITIES = ("tanh", "relu")
_LEAF = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?")
_ADVICE = (
    "nl.io.from_torch(module) takes the module itself, and nl.io.torch_layers(nl.io.torch_state_dict(path), name) "
    "gives the layers of one part, for a model of your own"
)


# Files


def torch_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Array]:
    """The tensors of a PyTorch file by their names; nothing in it is unpickled, and PyTorch is not needed.

    Arguments:
        path: a `.safetensors` file, or one that `torch.save` wrote (1.6 or later).
        key: in a checkpoint that holds other things too, the entry with the state_dict, such as "model".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another or a damaged file, one with other objects than tensors, or no state_dict in it.
    """
    if Path(path).suffix == ".safetensors":
        import safetensors

        try:
            held: Any = _safetensors(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: no safetensors file, or damaged: {error}") from None
    else:
        held = read_torch_file(path)
    found = held
    if key is not None:
        if not isinstance(held, Mapping) or key not in held:
            there = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
            raise ValueError(f"key: expected an entry of {path} ({there}), got {key!r}")
        found = held[key]
    if is_state_dict(found):
        return dict(found)
    inside = (
        [name for name, value in held.items() if is_state_dict(value)] if isinstance(held, Mapping) else []
    )
    hint = f"; give key={' or '.join(map(repr, inside))}" if inside else ""
    raise ValueError(f"{path}: expected a state_dict, tensors by name, got {_kind(found)}{hint}")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"entries {', '.join(map(str, list(value)[:10]))}"
    return type(value).__name__


def _safetensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Also bfloat16, which NumPy has not got: as float32."""
    import safetensors

    found = {}
    for name, entry in safetensors.deserialize(Path(path).read_bytes()):
        raw, kind = bytes(entry["data"]), entry["dtype"]
        if kind == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in _SAFETENSORS:
            values = np.frombuffer(raw, _SAFETENSORS[kind])
        else:
            raise ValueError(
                f"{path}: {name}: expected numbers of {', '.join(_SAFETENSORS)} or BF16, got {kind}"
            )
        found[name] = values.reshape(entry["shape"])
    return found


_SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip


def load_torch(
    path: str | os.PathLike[str],
    prefix: str = "",
    *,
    key: str | None = None,
    nonlinearity: str = "tanh",
    epsilon: float = 1e-5,
    return_sequences: bool = True,
) -> Sequential:
    """A model from a PyTorch state_dict, where its names and shapes leave one chain of layers only.

    It may hold nn.LSTM, GRU and RNN (any layers and directions, projections), Linear, Embedding and LayerNorm. A file
    of `torch.save` keeps the order in which the modules were made, which is taken for that in which they run; the
    order in a `.safetensors` file is lost, so that there the features must leave one order only. What a state_dict
    does not hold (activations, dropout) can't be seen: two Linear in a row, or a gap in the numbers of an
    nn.Sequential, are refused.

    Arguments:
        path: a `.safetensors` file or one that `torch.save` wrote; see `torch_state_dict`.
        prefix: only the tensors whose names start so, such as "encoder.".
        key: the entry of a checkpoint with the state_dict.
        nonlinearity: of an nn.RNN, "tanh" or "relu".
        epsilon: of every LayerNorm.
        return_sequences: False: the last recurrent layer gives its last output only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state_dict, or one that is no single chain; what was found is listed.
    """
    tensors = torch_state_dict(path, key)
    chosen = {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise ValueError(
            f"prefix: no tensor of {path} starts with {prefix!r}; there are {', '.join(tensors)}"
        )
    try:
        parts = _chain(_parts(chosen), ordered=Path(path).suffix != ".safetensors")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = [layer for part in parts for layer in part.layers(nonlinearity, epsilon)]
    return sequential(layers, return_sequences)


def torch_layers(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    kind: str | None = None,
    nonlinearity: str = "tanh",
    epsilon: float = 1e-5,
) -> list[Layer]:
    """The layers that one module of a state_dict becomes, with its weights: several for a stacked LSTM.

    Arguments:
        state_dict: arrays (or CPU tensors) by name, as `torch_state_dict` gives them.
        prefix: the module's name, such as "encoder.lstm".
        kind: "Linear" or "Embedding", where a matrix without bias could be either.
        nonlinearity, epsilon: as for `load_torch`.

    Raises:
        ValueError: no such module, several, or one that is not known.

    >>> ones = np.ones((8, 3)), np.ones((8, 2))
    >>> torch_layers({"rnn.weight_ih_l0": ones[0], "rnn.weight_hh_l0": ones[1]}, "rnn")[0].units
    2
    """
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    chosen = {n.removeprefix(start): np.asarray(a) for n, a in state_dict.items() if n.startswith(start)}
    parts = _parts(chosen)
    if len(parts) != 1:
        found = ", ".join(part.text for part in parts) or "nothing"
        raise ValueError(f"prefix: expected the name of one module, got {prefix!r}, where there is {found}")
    part = parts[0]
    if part.kind == "matrix":
        if kind not in ("Linear", "Embedding"):
            raise ValueError(
                f"kind: expected 'Linear' or 'Embedding' for {prefix}: {part.text}, got {kind!r}"
            )
        part = part._replace(kind=kind)
    elif kind not in (None, part.kind):
        raise ValueError(f"kind: {prefix} is {part.text}, got {kind!r}")
    return part.layers(nonlinearity, epsilon)


class _Part(NamedTuple):
    """One module's tensors. kind: LSTM, GRU, RNN, Linear, LayerNorm, Embedding, or a matrix that may be either."""

    path: str
    kind: str
    arrays: dict[str, Array]

    @property
    def text(self) -> str:
        """For messages."""
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        kind = "Linear or Embedding" if self.kind == "matrix" else self.kind
        return f"{self.path or 'the module itself'}: {kind} ({shapes})"

    def features(self) -> tuple[int | None, int]:
        """Of what goes in (None for ids) and of what comes out."""
        match self.kind:
            case "Linear":
                rows, columns = self.arrays["weight"].shape
                return columns, rows
            case "Embedding":
                return None, self.arrays["weight"].shape[1]
            case "LayerNorm":
                return self.arrays["weight"].shape[-1], self.arrays["weight"].shape[-1]
        stack = list(_stack(self.arrays).values())
        output = stack[-1][0]["weight_hh"].shape[1]
        return stack[0][0]["weight_ih"].shape[1], output * len(stack[-1])

    def layers(self, nonlinearity: str, epsilon: float) -> list[Layer]:
        """The layers here, with the weights."""
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity: expected one of {NONLINEARITIES}, got {nonlinearity!r}")
        match self.kind:
            case "Linear":
                return [dense(self.arrays["weight"], self.arrays.get("bias"))]
            case "Embedding":
                return [embedding(self.arrays["weight"])]
            case "LayerNorm":
                return [layer_norm(self.arrays["weight"].shape, epsilon, **self.arrays)]
        return recurrent_layers(self.arrays, activation=nonlinearity)


def _parts(tensors: Mapping[str, Array]) -> list[_Part]:
    """The modules of a state_dict, in its order."""
    modules: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = array
    return [_Part(path, _module_kind(path, arrays), arrays) for path, arrays in modules.items()]


def _module_kind(path: str, arrays: Mapping[str, Array]) -> str:
    if all(_LEAF.fullmatch(leaf) for leaf in arrays):
        return conversion.torch_units(_stack(arrays)[0][0])[0]
    weight, bias = arrays.get("weight"), arrays.get("bias")
    if weight is not None and set(arrays) <= {"weight", "bias"}:
        if weight.ndim == 2 and bias is None:
            return "matrix"
        if weight.ndim == 2 and bias is not None and bias.shape == weight.shape[:1]:
            return "Linear"
        if weight.ndim == 1 and bias is not None and bias.shape == weight.shape:
            return "LayerNorm"
    shapes = ", ".join(f"{leaf} {array.shape}" for leaf, array in arrays.items())
    raise ValueError(
        f"{path or 'the module itself'}: expected the tensors of an nn.LSTM, GRU, RNN, Linear, Embedding or LayerNorm "
        f"(with its bias), got {shapes}"
    )


def _stack(arrays: Mapping[str, Array]) -> dict[int, list[dict[str, Array]]]:
    """A recurrent module's tensors by layer, then direction."""
    found: dict[int, list[dict[str, Array]]] = {}
    for leaf, array in arrays.items():
        form = _LEAF.fullmatch(leaf)
        assert form is not None
        directions = found.setdefault(int(form[2]), [{}])
        if form[3] and len(directions) == 1:
            directions.append({})
        directions[bool(form[3])][form[1]] = array
    stack = dict(sorted(found.items()))
    if list(stack) != list(range(len(stack))) or len({len(d) for d in stack.values()}) != 1:
        raise ValueError(f"a recurrent module lacks layers or directions: there are {', '.join(arrays)}")
    for directions in stack.values():
        for one in directions:
            if not {"weight_ih", "weight_hh"} <= set(one):
                raise ValueError(
                    f"a recurrent module lacks weight_ih or weight_hh: there are {', '.join(arrays)}"
                )
    return stack


def _chain(parts: Sequence[_Part], ordered: bool) -> list[_Part]:
    """The parts in the one order that they can run in. Raises ValueError when there is none, or several."""
    numbers = [re.fullmatch(r"(.*?)(\d+)", part.path) for part in parts]
    numbered = all(numbers) and len({form[1] for form in numbers if form}) == 1 and len(parts) > 1
    if numbered:  # an nn.Sequential
        order = sorted(zip(parts, numbers, strict=True), key=lambda pair: int(pair[1][2]))  # type: ignore[index]
        parts, places = [part for part, _ in order], [int(form[2]) for _, form in order if form]
        if places != list(range(places[0], places[0] + len(places))):
            raise _no_chain(parts, f"numbers are missing among {places}, which may be activations or dropout")
        ordered = True
    found: list[list[_Part]] = []
    _extend([], list(parts), ordered, found)
    distinct = {tuple((part.path, part.kind) for part in chain): chain for chain in found}
    if len(distinct) > 1:
        named = [c for c in distinct.values() if (c[0].kind == "Embedding") == ("emb" in c[0].path.lower())]
        if len(named) == 1:
            return named[0]
        raise _no_chain(parts, "more than one chain fits these shapes")
    if not distinct:
        raise _no_chain(
            parts, "no chain of them fits, from the features that one gives to those the next takes"
        )
    return next(iter(distinct.values()))


def _extend(chain: list[_Part], rest: list[_Part], ordered: bool, found: list[list[_Part]]) -> None:
    """Every way to go on; more than two chains need not be told apart."""
    if not rest:
        found.append(chain)
        return
    for k, part in enumerate(rest[:1] if ordered else rest):
        if len(found) > 1:
            return
        kinds = ("Embedding", "Linear") if part.kind == "matrix" else (part.kind,)
        for kind in kinds:
            link = part._replace(kind=kind)
            if chain and (
                link.features()[0] != chain[-1].features()[1] or (kind == "Linear" == chain[-1].kind)
            ):
                continue
            _extend([*chain, link], rest[:k] + rest[k + 1 :], ordered, found)


def _no_chain(parts: Sequence[_Part], reason: str) -> ValueError:
    found = "; ".join(part.text for part in parts)
    return ValueError(f"no single chain of layers: {reason}. Found {found}. {_ADVICE}")


# Layers from arrays


def _dtype(array: Array) -> str:
    if array.dtype.kind != "f":
        raise ValueError(
            f"weights: expected floating-point tensors, got {array.dtype} of shape {array.shape}"
        )
    return "float64" if array.dtype == np.float64 else "float32"


def _filled(layer: Layer, shape: tuple[int | None, ...], arrays: Sequence[Array]) -> Layer:
    """The layer, built for inputs of this shape, with these weights."""
    with blank_weights():
        layer.build(shape)
    layer.set_weights(list(arrays))
    return layer


def dense(weight: Array, bias: Array | None) -> Layer:
    layer = Dense(weight.shape[0], use_bias=bias is not None, dtype=_dtype(weight))
    arrays = [np.ascontiguousarray(weight.T), *([] if bias is None else [bias])]
    return _filled(layer, (None, weight.shape[1]), arrays)


def embedding(weight: Array) -> Layer:
    return _filled(Embedding(*weight.shape, dtype=_dtype(weight)), (None, None), [weight])


def layer_norm(
    shape: Sequence[int],
    epsilon: float,
    weight: Array | None = None,
    bias: Array | None = None,
    dtype: Any = None,
) -> Layer:
    options = {"scale": weight is not None, "center": bias is not None}
    axis = list(range(-len(shape), 0)) if len(shape) > 1 else -1
    dtype = dtype if weight is None else _dtype(weight)
    layer = LayerNormalization(axis=axis, epsilon=epsilon, dtype=dtype, **options)
    return _filled(layer, (None, None, *shape), [a for a in (weight, bias) if a is not None])


def recurrent_layers(
    arrays: Mapping[str, Array],
    *,
    activation: str = "tanh",
    dropout: float = 0.0,
    merge: str = "concat",
    reverse: bool = False,
) -> list[Layer]:
    """The layers of a recurrent module, from the first; between them Dropout, as nn.LSTM applies it."""
    stack = _stack(arrays)
    kind, _ = conversion.torch_units(stack[0][0])
    weights = {k: [conversion.from_torch(kind, one) for one in stack[k]] for k in stack}
    biased = "bias_ih" in stack[0][0]
    split = kind != "GRU" and biased and any(w[2].ndim == 2 for both in weights.values() for w in both)
    layers: list[Layer] = []
    for k, both in weights.items():
        units = conversion.torch_units(stack[k][0])[1]
        features = stack[k][0]["weight_ih"].shape[1]
        options: dict[str, Any] = {"use_bias": biased, "return_sequences": True, "dtype": _dtype(both[0][0])}
        options["go_backwards"] = reverse
        if kind != "GRU":
            options["split_bias"] = split
        if kind == "RNN":
            options["activation"] = activation
        if "weight_hr" in stack[k][0]:
            options["projection"] = stack[k][0]["weight_hr"].shape[0]
        layer: Layer = RECURRENT[kind](units, **options)
        if len(both) == 2:
            layer = Bidirectional(layer, merge)
        for w in both:
            if split and w[2].ndim == 1:
                w[2] = np.stack([w[2], np.zeros_like(w[2])])
        if dropout and k:
            layers.append(Dropout(dropout))
        layers.append(_filled(layer, (None, None, features), [a for w in both for a in w]))
    return layers


def sequential(layers: Sequence[Layer], return_sequences: bool) -> Sequential:
    if not return_sequences:
        last = next((x for x in reversed(layers) if isinstance(x, (Recurrent, Bidirectional))), None)
        if last is None:
            raise ValueError("return_sequences: there is no recurrent layer, got False")
        for layer in (
            (last.forward_layer, last.backward_layer) if isinstance(last, Bidirectional) else (last,)
        ):
            layer.return_sequences = False
    return Sequential(list(layers))
