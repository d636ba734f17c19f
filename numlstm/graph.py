"""A model that runs a stored graph: which layer is called on what, in order. What comes from Keras' functional models.

A graph of one's own is better written as a subclass of `nl.Model` with a `call`; this form exists because a file can
hold it. A call is a dict, JSON-able:

    {"name": "lstm", "node": 0, "args": [{"from": ["ids", 0, 0]}], "kwargs": {}}
    {"name": "sum", "node": 0, "op": "Add", "args": [{"from": ["lstm", 0, 0]}, 1.0], "kwargs": {}}

`{"from": [name, node, k]}` stands for the k-th result of the call `node` of the layer (operation, input) of that name;
{"slice": [start, stop, step]} for a slice. Arguments may be lists and dicts of such. Operations are those of
`OPERATIONS`; masks are computed by them like any other value, and travel with tensors as everywhere. A layer that is
called with "mask": None sees none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from numlstm import ops
from numlstm.autograd import Tensor
from numlstm.layers.base import Layer, from_config, registry
from numlstm.models import Model

__all__ = ["OPERATIONS", "Graph"]


def _values(x: Any) -> Any:
    """A tensor's array, for what is not differentiated."""
    return x.data if isinstance(x, Tensor) else x


def _compared(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda a, b: function(_values(a), _values(b))


def _both(on_arrays: Callable[..., Any], on_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """One function for arrays, which masks are, and one for tensors."""

    def run(*given: Any, **options: Any) -> Any:
        first = given[0][0] if isinstance(given[0], (list, tuple)) else given[0]
        function = on_tensors if isinstance(first, Tensor) else on_arrays
        return function(*given, **options)

    return run


def _merged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer that merges a list of inputs, with Keras' mask: where any of them counts, if all have masks."""

    def run(inputs: Sequence[Tensor], **options: Any) -> Tensor:
        masks = [x.mask for x in inputs]
        result = function(list(inputs), masks, **options)
        if result.mask is None and all(m is not None for m in masks):
            result.mask = reduce(np.logical_or, masks)  # type: ignore[arg-type]
        return result

    return run


def _where(mask: np.ndarray | None, x: Tensor, other: Any) -> Tensor:
    """`x` where the mask (batch, time) is True, and everywhere without one."""
    if mask is None:
        return x
    return ops.where(np.broadcast_to(mask[(...,) + (None,) * (x.ndim - mask.ndim)], x.shape), x, other)


def _product(inputs: list[Tensor], masks: list[Any]) -> Tensor:
    """A masked step of one input leaves the others as they are; one of all is zero."""
    result = reduce(ops.multiply, (_where(m, x, 1.0) for x, m in zip(inputs, masks, strict=True)))
    if all(m is not None for m in masks):
        return _where(reduce(np.logical_or, masks), result, 0.0)
    return result


def _extreme(function: Callable[[Any, Any], Tensor]) -> Callable[[list[Tensor], list[Any]], Tensor]:
    """A masked step of one input is that of the others."""

    def run(inputs: list[Tensor], masks: list[Any]) -> Tensor:
        result, seen = inputs[0], masks[0]
        for x, mask in zip(inputs[1:], masks[1:], strict=True):
            x = _where(mask, x, result)
            result = function(_where(seen, result, x), x)
            seen = None if mask is None or seen is None else seen | mask
        return result

    return run


def _side_by_side(inputs: list[Tensor], masks: list[Any], axis: int = -1) -> Tensor:
    """An input without a mask counts in full."""
    result = ops.concatenate(inputs, axis=axis)
    if any(m is not None for m in masks):
        full = [np.ones(x.shape[:2], bool) if m is None else m for x, m in zip(inputs, masks, strict=True)]
        along_time = axis % inputs[0].ndim == 1
        result.mask = np.concatenate(full, axis=1) if along_time else reduce(np.logical_or, full)
    return result


def _filled(value: int) -> Callable[..., Any]:
    def run(x: Any, dtype: str | None = None) -> np.ndarray:
        return np.full_like(_values(x), value, dtype=bool if dtype in (None, "bool") else dtype)

    return run


def _difference(inputs: list[Tensor], masks: list[Any]) -> Tensor:
    if len(inputs) != 2:
        raise ValueError(f"Subtract: expected two inputs, got {len(inputs)}")
    return inputs[0] - inputs[1]


# What a call with "op" may name: Keras' operations, and (with "Merge") its layers over lists that have no weights.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": ops.add,
    "Subtract": ops.subtract,
    "Multiply": ops.multiply,
    "Divide": ops.divide,
    "TrueDivide": ops.divide,
    "Negative": ops.negative,
    "Maximum": ops.maximum,
    "Minimum": ops.minimum,
    "Exp": ops.exp,
    "Log": ops.log,
    "Sqrt": ops.sqrt,
    "Square": ops.square,
    "Tanh": ops.tanh,
    "Sigmoid": ops.sigmoid,
    "Relu": ops.relu,
    "Softmax": ops.softmax,
    "Matmul": ops.matmul,
    "Mean": ops.mean,
    "Sum": ops.sum,
    "Max": ops.max,
    "ConvertToTensor": lambda x, **_: x,
    "GetItem": _both(lambda x, key: x[_key(key)], lambda x, key: ops.getitem(x, _key(key))),
    "Concatenate": _both(np.concatenate, ops.concatenate),
    "ExpandDims": _both(np.expand_dims, ops.expand_dims),
    "Squeeze": _both(np.squeeze, ops.squeeze),
    "Flip": _both(np.flip, ops.flip),
    "NotEqual": _compared(np.not_equal),
    "Equal": _compared(np.equal),
    "Greater": _compared(np.greater),
    "GreaterEqual": _compared(np.greater_equal),
    "Less": _compared(np.less),
    "LessEqual": _compared(np.less_equal),
    "LogicalAnd": _compared(np.logical_and),
    "LogicalOr": _compared(np.logical_or),
    "LogicalNot": lambda x: np.logical_not(_values(x)),
    "Any": lambda x, axis=None, keepdims=False: np.any(_values(x), _axes(axis), keepdims=keepdims),
    "All": lambda x, axis=None, keepdims=False: np.all(_values(x), _axes(axis), keepdims=keepdims),
    "ZerosLike": _filled(0),
    "OnesLike": _filled(1),
    "MergeAdd": _merged(lambda inputs, masks: reduce(ops.add, inputs)),
    "MergeSubtract": _merged(_difference),
    "MergeMultiply": _merged(_product),
    "MergeMaximum": _merged(_extreme(ops.maximum)),
    "MergeMinimum": _merged(_extreme(ops.minimum)),
    "MergeAverage": _merged(lambda inputs, masks: reduce(ops.add, inputs) * (1 / len(inputs))),
    "MergeConcatenate": _merged(_side_by_side),
}
_MASKS = ("mask", "query_mask", "value_mask", "key_mask", "attention_mask")


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _axes(axis: Any) -> Any:
    return tuple(axis) if isinstance(axis, list) else axis


@registry.register()
class Graph(Model):
    """Layers called in a stored order, on stored arguments; see the module's text for their form.

    Called on its input, or on several in a list, in their order, or in a dict by their names; gives tensors in the
    structure of `outputs`. `fit` and `predict` take models of one input.

    Arguments:
        layers: the layers, of different names.
        calls: in an order in which they can run.
        inputs: the names of the inputs.
        outputs: a reference `{"from": ...}`, or a list or dict of them.

    Raises:
        ValueError: a call of an unknown layer or operation, or on a value that is not there yet.

    >>> from numlstm.layers import Dense
    >>> one = {"name": "d", "node": 0, "args": [{"from": ["x", 0, 0]}], "kwargs": {}}
    >>> two = {"name": "+", "node": 0, "op": "Add", "args": [{"from": ["d", 0, 0]}, 1.0], "kwargs": {}}
    >>> model = Graph([Dense(2, name="d")], [one, two], ["x"], {"from": ["+", 0, 0]})
    >>> model(np.zeros((1, 3))).numpy().tolist()
    [[1.0, 1.0]]
    """

    def __init__(
        self, layers: Sequence[Any], calls: Sequence[Any], inputs: Sequence[str], outputs: Any, **options: Any
    ) -> None:
        super().__init__(**options)
        self._by_name: dict[str, Layer] = {}
        for layer in map(from_config, layers):
            if layer.name in self._by_name:
                raise ValueError(f"layers: expected different names, got {layer.name!r} twice")
            self._by_name[layer.name] = layer
        self._wiring = _Wiring([dict(call) for call in calls], list(inputs), outputs)
        self._wiring.check(self._by_name)

    @property
    def layers(self) -> list[Layer]:
        """The layers (a copy of the list)."""
        return list(self._by_name.values())

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What is called on what, in order."""
        return self._wiring.calls

    @property
    def inputs(self) -> list[str]:
        """The inputs' names."""
        return self._wiring.inputs

    @property
    def outputs(self) -> Any:
        """Where the results come from."""
        return self._wiring.outputs

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers, by their own names."""
        yield from self._by_name.items()

    def call(self, inputs: Any) -> Any:
        """The calls, one after the other."""
        values = {(name, 0): [x] for name, x in zip(self.inputs, self._given(inputs), strict=True)}
        for call in self.calls:
            args, kwargs = (_resolved(call[part], values) for part in ("args", "kwargs"))
            if "op" in call:
                found = OPERATIONS[call["op"]](*args, **kwargs)
            else:
                kwargs = {k: _mask(v) if k in _MASKS else v for k, v in kwargs.items()}
                if "mask" in kwargs and kwargs["mask"] is None:
                    args = [_unmasked(a) for a in args]
                found = self._by_name[call["name"]](*args, **kwargs)
            values[call["name"], call["node"]] = list(found) if isinstance(found, (list, tuple)) else [found]
        return _resolved(self.outputs, values)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shapes of the results. Raises NotImplementedError where an operation stands before them."""
        values = {(name, 0): [s] for name, s in zip(self.inputs, self._given(input_shape), strict=True)}
        for call in self.calls:
            name, args = call["name"], call["args"]
            if any((source, node) not in values for source, node, _ in references(args)) or "op" in call:
                continue
            shapes = [_resolved(a, values) for a in args]
            found = self._by_name[name].compute_output_shape(shapes[0] if len(shapes) == 1 else shapes)
            values[name, call["node"]] = found if isinstance(found, list) else [found]
        if any((source, node) not in values for source, node, _ in references(self.outputs)):
            raise NotImplementedError(f"{self.name}: only a call can tell the shape of its results")
        return _resolved(self.outputs, values)

    def _given(self, inputs: Any) -> list[Any]:
        names = self.inputs
        if isinstance(inputs, Mapping):
            if set(inputs) != set(names):
                raise ValueError(f"{self.name}: expected inputs {', '.join(names)}, got {', '.join(inputs)}")
            return [inputs[name] for name in names]
        given = list(inputs) if isinstance(inputs, list) else [inputs]
        if len(given) != len(names):
            raise ValueError(
                f"{self.name}: expected {len(names)} inputs ({', '.join(names)}), got {len(given)}"
            )
        return given


class _Wiring:
    """The calls, where the walk over a layer's attributes does not look into them."""

    def __init__(self, calls: list[dict[str, Any]], inputs: list[str], outputs: Any) -> None:
        self.calls, self.inputs, self.outputs = calls, inputs, outputs

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise ValueError unless every call can run when its turn comes."""
        there = {(name, 0) for name in self.inputs}
        for call in self.calls:
            name: Any = call.get("name")
            known = OPERATIONS if "op" in call else layers
            if call.get("op", name) not in known:
                raise ValueError(
                    f"calls: {name}: expected one of {', '.join(known)}, got {call.get('op', name)!r}"
                )
            self._check_sources(name, [call["args"], call["kwargs"]], there)
            there.add((name, call["node"]))
        self._check_sources("outputs", self.outputs, there)

    def _check_sources(self, name: Any, value: Any, there: set[tuple[str, int]]) -> None:
        for source, node, _ in references(value):
            if (source, node) not in there:
                raise ValueError(f"calls: {name} uses call {node} of {source!r}, which has not run by then")


def references(value: Any) -> Iterator[tuple[str, int, int]]:
    """All (name, node, k) that a structure refers to."""
    if isinstance(value, Mapping):
        if set(value) == {"from"}:
            yield tuple(value["from"])
        else:
            for item in value.values():
                yield from references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item)


def _resolved(value: Any, values: Mapping[tuple[str, int], list[Any]]) -> Any:
    """A structure with the values in the place of references."""
    if isinstance(value, Mapping):
        if set(value) == {"from"}:
            name, node, k = value["from"]
            return values[name, node][k]
        if set(value) == {"slice"}:
            return slice(*(_resolved(part, values) for part in value["slice"]))
        return {key: _resolved(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(item, values) for item in value]
    return value


def _unmasked(value: Any) -> Any:
    """A tensor without its mask; the one there is stays as it is, for others to use."""
    return value.reshape(value.shape) if isinstance(value, Tensor) and value.mask is not None else value


def _mask(value: Any) -> Any:
    """A mask that came as an input is a tensor."""
    return [_mask(v) for v in value] if isinstance(value, (list, tuple)) else _values(value)
