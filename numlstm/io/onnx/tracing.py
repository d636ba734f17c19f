"""A model whose `call` is Python of its own, as nodes: it is run on samples, and what its layers are called on is noted.

Between layers a traced tensor knows + - * / and indexing by numbers and slices; whatever else is computed with it is no
longer traced, and refused where it reaches a layer or the outputs. What `call` does with sizes is found by running it on two
samples of unlike sizes, which must give the same graph; a branch on values is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from numlstm.autograd import Tensor, Variable
from numlstm.io.onnx.exporter import WRITERS, Builder, Input, Value, refuse
from numlstm.io.onnx.writers import multi_head
from numlstm.layers import Embedding, Layer, MultiHeadAttention
from numlstm.layers.recurrent import Recurrent

__all__ = ["reads_ids", "write_traced"]

SAMPLES = ((2, 5), (3, 11))  # batch and time


class _Traced(Tensor):
    """A tensor that knows which value of the graph it is."""

    __slots__ = ("builder", "value")

    def __init__(self, tensor: Tensor, builder: Builder, value: Value) -> None:
        super().__init__(tensor.data)
        self.mask, self.builder, self.value = tensor.mask, builder, value

    def _with(self, other: Any, op: str, turned: bool, real: Callable[[Tensor, Any], Tensor]) -> Tensor:
        name = _operand(self.builder, other) if self.data.dtype.kind == "f" else None
        y = real(Tensor(self.data), Tensor(other.data) if isinstance(other, Tensor) else other)
        if name is None:
            return y
        names = (name, self.value.name) if turned else (self.value.name, name)
        return _Traced(y, self.builder, Value(self.builder.node(op, *names), _sizes(y, self, other)))

    def __add__(self, other: Any) -> Tensor:
        return self._with(other, "Add", False, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Tensor:
        return self._with(other, "Add", True, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Tensor:
        return self._with(other, "Sub", False, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Tensor:
        return self._with(other, "Sub", True, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Tensor:
        return self._with(other, "Mul", False, lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Tensor:
        return self._with(other, "Mul", True, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> Tensor:
        return self._with(other, "Div", False, lambda a, b: a / b)

    def __rtruediv__(self, other: Any) -> Tensor:
        return self._with(other, "Div", True, lambda a, b: b / a)

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __getitem__(self, index: Any) -> Tensor:
        y = Tensor(self.data)[index]
        parts = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(p, (int, slice)) for p in parts):
            return y
        b, name, sizes, gone = self.builder, self.value.name, list(self.value.shape), []
        for axis, part in enumerate(parts):
            if isinstance(part, int):
                name = b.slice(name, part, part + 1 or 2**63 - 1, axis)
                gone.append(axis)
            elif part != slice(None):
                step = part.step or 1
                first, last = (0, 2**63 - 1) if step > 0 else (-1, -(2**63) + 1)
                start = first if part.start is None else part.start
                name = b.slice(name, start, last if part.stop is None else part.stop, axis, step)
                sizes[axis] = None if sizes[axis] is None else len(range(*part.indices(self.shape[axis])))
        name = b.squeeze(name, *gone) if gone else name
        return _Traced(y, b, Value(name, tuple(n for k, n in enumerate(sizes) if k not in gone)))


def _operand(b: Builder, other: Any) -> str | None:
    """The name of what a traced tensor meets; None for a tensor that is not traced."""
    if isinstance(other, _Traced):
        return other.value.name
    if isinstance(other, Variable):
        return b.array(other.numpy(), other.name)
    return b.constant(other) if isinstance(other, (int, float, np.generic)) else None


def _sizes(y: Tensor, *operands: Any) -> tuple[int | None, ...]:
    """The result's shape; a size is free where that of an operand is."""
    free = set()
    for x in operands:
        if isinstance(x, _Traced):
            free |= {k - len(x.value.shape) for k, n in enumerate(x.value.shape) if n is None}
    return tuple(None if k - y.ndim in free else n for k, n in enumerate(y.shape))


def reads_ids(model: Layer, count: int) -> list[bool]:
    """Which of a model's inputs an Embedding reads: found by a first run."""
    seen: set[str] = set()
    builder = _builder(model)
    inputs = [builder.input(f"input_{k}", builder.dtype, shape) for k, shape in enumerate(_shapes(model))]
    _run(builder, model, inputs, 0, seen)
    return [value.name in seen for value in inputs][:count]


def _builder(model: Layer) -> Builder:
    return Builder(model, 17, states=False, prefix_masks=True)


def _shapes(model: Layer) -> list[tuple[int | None, ...]]:
    shapes = model.build_shape
    return [tuple(s) for s in shapes] if isinstance(shapes, list) else [tuple(shapes)]


def write_traced(b: Builder, model: Layer, x: Value | list[Value], ports: Sequence[Input]) -> list[Value]:
    """The outputs of a model, from its call."""
    given = x if isinstance(x, list) else [x]
    other = Builder(
        model, b.opset, b.states, b.prefix_masks
    )  # the same once more, on a sample of another size
    for value, port in zip(given, ports, strict=True):
        other.input(value.name, "int64" if port.ids else b.dtype, value.shape)
    other._taken |= b._taken
    before = (len(b.nodes), set(b.arrays))
    other._known, other.arrays = dict(b._known), dict(b.arrays)
    outputs = _run(b, model, given, 0)
    again = _run(other, model, given, 1)
    nodes = [n.SerializeToString() for n in b.nodes[before[0] :]]
    alike = nodes == [n.SerializeToString() for n in other.nodes] and outputs == again
    if not alike or any(not np.array_equal(a, other.arrays.get(name)) for name, a in b.arrays.items()):
        raise refuse(model, "call", "what it computes depends on the sizes of its input")
    return outputs


def _run(
    b: Builder, model: Layer, inputs: list[Value], sample: int, ids: set[str] | None = None
) -> list[Value]:
    batch, time = SAMPLES[sample]
    tensors = []
    for k, value in enumerate(inputs):
        free = [batch, time + k, *[time] * len(value.shape)]  # inputs of unlike length
        shape = [free[j] if n is None else n for j, n in enumerate(value.shape)]
        kind = np.int64 if value.name in b.ids else b.dtype
        tensors.append(_Traced(Tensor(np.zeros(shape, kind)), b, value))
        if value.mask is not None:
            tensors[-1].mask = np.ones(shape[:2], bool)
    with _watched(b, model, ids):
        found = type(model).call(model, tensors if isinstance(model.build_shape, list) else tensors[0])
    results = list(found) if isinstance(found, (list, tuple)) else [found]
    if not all(isinstance(y, _Traced) for y in results):
        raise _lost(model)
    return [y.value for y in results]


def _lost(layer: Layer) -> ValueError:
    return refuse(
        layer,
        "call",
        "a tensor is computed by other means than layers, + - * / and indexing by numbers and slices",
    )


@contextmanager
def _watched(b: Builder, model: Layer, ids: set[str] | None) -> Iterator[None]:
    """The layers inside that have writers note what they are called on."""
    inside = [False]
    watched = [layer for _, layer in model.walk() if layer is not model and type(layer) in WRITERS]
    kept = [(layer, layer.states) for _, layer in model.walk() if isinstance(layer, Recurrent)]
    for layer, _ in kept:
        layer.states = None
    for layer in watched:
        layer.__dict__["call"] = _noting(b, layer, inside, ids)
    try:
        yield
    finally:
        for layer in watched:
            del layer.__dict__["call"]
        for layer, states in kept:
            layer.states = states


def _noting(b: Builder, layer: Layer, inside: list[bool], ids: set[str] | None) -> Callable[..., Any]:
    def call(inputs: Any, *args: Any, **options: Any) -> Any:
        if inside[0]:  # a part of a layer that has been noted
            return type(layer).call(layer, inputs, *args, **options)
        tensors = inputs if isinstance(inputs, list) else [inputs]
        if not all(isinstance(x, _Traced) for x in tensors):
            raise _lost(layer)
        if ids is not None and isinstance(layer, Embedding):
            ids.add(tensors[0].value.name)
        masks = options.get("mask")
        given = masks if isinstance(masks, list) else [masks]
        if masks is not None and any(m is not x.mask for m, x in zip(given, tensors, strict=False)):
            raise refuse(layer, "mask", "it does not come with the input")
        values = [x.value for x in tensors]
        found = _note(b, layer, values if isinstance(inputs, list) else values[0], args, options)
        inside[0] = True
        try:
            results = type(layer).call(layer, inputs, *args, **options)
        finally:
            inside[0] = False
        if isinstance(results, list):
            return [_Traced(y, b, value) for y, value in zip(results, found, strict=True)]
        return _Traced(results, b, found[0])

    return call


def _note(b: Builder, layer: Layer, x: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Value]:
    """Write a layer's nodes. Masks go with the values; initial states may come with the call."""
    asked = {
        k: v for k, v in options.items() if k not in ("mask", "training") and v is not None and v is not False
    }
    if (
        isinstance(layer, MultiHeadAttention)
        and asked.pop("use_causal_mask", False)
        and not asked
        and not args
    ):
        return [multi_head(b, layer, x, causal=True)]
    start = asked.pop("initial_state", args[0] if args else None)
    if asked or len(args) > 1:
        raise refuse(layer, next(iter(asked), "call"), "it is an argument of the call")
    if start is not None:
        states = list(start) if isinstance(start, (list, tuple)) else [start]
        if not all(isinstance(s, _Traced) for s in states):
            raise refuse(layer, "initial_state", "it does not come from a layer")
        b.starts[layer.name] = [s.value.name for s in states]
    found = b.write(layer, x)
    if start is not None:
        del b.starts[layer.name]
    return found
