"""How a `numlstm.graph.Graph`, the form of Keras' functional models, becomes nodes: call by call; see exporter.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from numlstm.graph import Graph, references
from numlstm.io.onnx.exporter import Builder, Input, Mask, Value, refuse, writer
from numlstm.layers import Embedding, Layer

__all__ = ["inputs_of_graph"]


def inputs_of_graph(model: Graph) -> list[Input]:
    """Its inputs, by their names; those that an Embedding reads are ids."""
    shapes, names = model.build_shape, model.inputs
    if isinstance(shapes, Mapping):
        shapes = [shapes[name] for name in names]
    elif not isinstance(shapes, list):
        shapes = [shapes]
    ids = {
        source
        for call in model.calls
        if "op" not in call and isinstance(model.get_layer(call["name"]), Embedding)
        for source, _, _ in references(call["args"])
    }
    return [Input(name, tuple(shape), name in ids) for name, shape in zip(names, shapes, strict=True)]


@writer(Graph)
def _graph(b: Builder, model: Graph, x: Value | list[Value]) -> list[Value]:
    given = x if isinstance(x, list) else [x]
    values = {(name, 0): [value] for name, value in zip(model.inputs, given, strict=True)}
    ids = {value.name for value, port in zip(given, inputs_of_graph(model), strict=True) if port.ids}
    for call in model.calls:
        args, kwargs = (_resolved(call[part], values) for part in ("args", "kwargs"))
        if "op" in call:
            found = [_operation(b, model, call["op"], args, kwargs, ids)]
        else:
            found = _call(b, model.get_layer(call["name"]), args, kwargs)
        values[call["name"], call["node"]] = found
    outputs = _resolved(model.outputs, values)
    if isinstance(outputs, Mapping):
        raise refuse(model, "outputs", "they have names of their own, and ONNX's have an order")
    return outputs if isinstance(outputs, list) else [outputs]


def _resolved(value: Any, values: Mapping[tuple[str, int], list[Value]]) -> Any:
    """A structure with the values in the place of references."""
    if isinstance(value, Mapping):
        if set(value) == {"from"}:
            name, node, k = value["from"]
            return values[name, node][k]
        if set(value) == {"slice"}:
            return slice(*value["slice"])
        return {key: _resolved(item, values) for key, item in value.items()}
    return [_resolved(item, values) for item in value] if isinstance(value, (list, tuple)) else value


def _call(b: Builder, layer: Layer, args: list[Any], kwargs: dict[str, Any]) -> list[Value]:
    """A layer's outputs; masks and initial states may come with the call."""
    x, *more = args
    options = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    if more and all(isinstance(v, Value) for v in more):  # attention(query, value)
        x, more = [x, *more], []
    start = options.pop("initial_state", None)
    for name, k in (("mask", 0), ("query_mask", 0), ("value_mask", 1), ("key_mask", 2)):
        mask = options.pop(name, None)
        if isinstance(mask, Value) and not isinstance(x, list):
            x = x._replace(mask=x.mask if x.mask and x.mask.steps == mask.name else Mask(mask.name))
        elif mask is not None and isinstance(x, list) and name != "mask" and k < len(x):
            x[k] = x[k]._replace(mask=Mask(mask.name))
        elif mask is not None:
            raise refuse(layer, name, "it is given in a form that has no nodes here")
    if options or more:
        raise refuse(layer, next(iter(options), "args"), "it is an argument of the call")
    if start is not None:
        b.starts[layer.name] = [v.name for v in (start if isinstance(start, list) else [start])]
    found = b.write(layer, x)
    b.starts.pop(layer.name, None)
    return found


# Operations

_PAIRS = {
    "Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "Divide": "Div", "TrueDivide": "Div", "Maximum": "Max",
    "Minimum": "Min", "MergeAdd": "Add", "MergeSubtract": "Sub", "MergeMultiply": "Mul", "MergeMaximum": "Max",
    "MergeMinimum": "Min", "MergeAverage": "Add", "Equal": "Equal", "Greater": "Greater", "GreaterEqual": "GreaterOrEqual",
    "Less": "Less", "LessEqual": "LessOrEqual", "LogicalAnd": "And", "LogicalOr": "Or",
}  # fmt: skip
_SINGLE = {
    "Negative": "Neg", "Exp": "Exp", "Log": "Log", "Sqrt": "Sqrt", "Tanh": "Tanh", "Sigmoid": "Sigmoid", "Relu": "Relu",
    "LogicalNot": "Not",
}  # fmt: skip
_REDUCTIONS = {"Mean": "ReduceMean", "Sum": "ReduceSum", "Max": "ReduceMax"}


def _operation(
    b: Builder, model: Graph, op: str, args: list[Any], kwargs: dict[str, Any], ids: set[str]
) -> Value:
    """An operation's result."""
    refused: Callable[[str], ValueError] = lambda why: refuse(model, op, why)
    if op in _PAIRS or op == "NotEqual":
        xs = args[0] if op.startswith("Merge") else args
        return _pairwise(b, op, xs, ids, refused)
    x = args[0]
    order = {"Concatenate": ["axis"], "MergeConcatenate": ["axis"], "GetItem": ["key"]}.get(
        op, ["axis", "keepdims"]
    )
    named = dict(zip(order, args[1:], strict=False)) | kwargs
    match op:
        case "ConvertToTensor":
            return x
        case "Concatenate" | "MergeConcatenate":
            axis = named.get("axis", -1)
            rank = len(x[0].shape)
            sizes = [v.shape[axis] for v in x]
            shape = list(x[0].shape)
            shape[axis] = None if None in sizes else sum(sizes)
            mask = _common(x, refused) if axis % rank != 1 else _none(x, refused)
            return Value(b.node("Concat", *(v.name for v in x), axis=axis % rank), tuple(shape), mask)
        case "Square":
            return Value(b.node("Mul", x.name, x.name), x.shape)
        case "Softmax":
            return Value(b.node("Softmax", x.name, axis=named.get("axis", -1)), x.shape)
        case "Matmul":
            return Value(b.node("MatMul", x.name, args[1].name), (*x.shape[:-1], args[1].shape[-1]))
        case "GetItem":
            return _item(b, x, named["key"], refused)
        case "ExpandDims":
            axis = named["axis"] % (len(x.shape) + 1)
            return Value(b.unsqueeze(x.name, axis), (*x.shape[:axis], 1, *x.shape[axis:]))
        case "Squeeze" if isinstance(named.get("axis"), int):
            axis = named["axis"] % len(x.shape)
            return Value(b.squeeze(x.name, axis), (*x.shape[:axis], *x.shape[axis + 1 :]))
        case "Flip" if isinstance(named.get("axis"), int):
            return Value(b.flip(x.name, named["axis"] % len(x.shape)), x.shape)
    if op in _SINGLE:
        return Value(b.node(_SINGLE[op], x.name), x.shape)
    axis = named.get("axis")
    if op in (*_REDUCTIONS, "Any") and isinstance(axis, int):
        keep, axis = bool(named.get("keepdims", False)), axis % len(x.shape)
        shape = (*x.shape[:axis], *([1] * keep), *x.shape[axis + 1 :])
        if op != "Any":
            return Value(b.reduce(_REDUCTIONS[op], x.name, axis, keep), shape)
        some = b.reduce("ReduceMax", b.cast(x.name, "int32"), axis, keep)
        return Value(b.node("Greater", some, b.constant(0, "int32")), shape)
    raise refused("the operation has no nodes here with these arguments")


def _pairwise(
    b: Builder, op: str, xs: list[Any], ids: set[str], refused: Callable[[str], ValueError]
) -> Value:
    dtype = "int64" if any(isinstance(v, Value) and v.name in ids for v in xs) else b.dtype
    tensors = [v if isinstance(v, Value) else Value(b.constant(v, dtype), np.shape(v)) for v in xs]
    mask = _common(tensors, refused) if op.startswith("Merge") else None
    if mask is not None and op != "MergeAdd" and op != "MergeAverage" and op != "MergeSubtract":
        raise refused("masked steps would have to be left out")
    total = tensors[0]
    for v in tensors[1:]:
        name = b.node("Equal" if op == "NotEqual" else _PAIRS[op], total.name, v.name)
        total = Value(name, _broadcast(total.shape, v.shape))
    if op == "NotEqual":
        return Value(b.node("Not", total.name), total.shape)
    if op == "MergeAverage":
        total = total._replace(name=b.node("Mul", total.name, b.constant(1 / len(xs))))
    return total._replace(mask=mask)


def _common(xs: list[Value], refused: Callable[[str], ValueError]) -> Mask | None:
    """The mask that all inputs have; none if one of them has none."""
    masks = {v.mask for v in xs}
    if None in masks:
        return None
    if len(masks) > 1:
        raise refused("its inputs have different masks")
    return masks.pop()


def _none(xs: list[Value], refused: Callable[[str], ValueError]) -> None:
    if any(v.mask is not None for v in xs):
        raise refused("its inputs have masks, which would be put one after the other")


def _item(b: Builder, x: Value, key: Any, refused: Callable[[str], ValueError]) -> Value:
    """Numbers and slices."""
    parts, name, shape, dropped = key if isinstance(key, list) else [key], x.name, list(x.shape), []
    if any(not isinstance(p, (int, slice)) for p in parts):
        raise refused("only numbers and slices have nodes here")
    for axis, part in enumerate(parts):
        if isinstance(part, int):
            name = b.slice(name, part, part + 1 or 2**63 - 1, axis)
            dropped.append(axis)
        elif part != slice(None):
            step = part.step or 1
            first, last = (0, 2**63 - 1) if step > 0 else (-1, -(2**63) + 1)
            start, stop = (
                (first if part.start is None else part.start),
                (last if part.stop is None else part.stop),
            )
            name = b.slice(name, start, stop, axis, step)
            n = shape[axis]
            shape[axis] = None if n is None else len(range(*part.indices(n)))
    if dropped:
        name = b.squeeze(name, *dropped)
    return Value(name, tuple(n for k, n in enumerate(shape) if k not in dropped))


def _broadcast(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> tuple[int | None, ...]:
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(n if m == 1 else m if n == 1 else n if m is None else m for n, m in pairs)
