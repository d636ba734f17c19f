"""More operators: shapes, indices, reductions, convolution and pooling over time. See operators.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numlstm import ops
from numlstm.autograd import Tensor, Variable, apply
from numlstm.io.onnx.operators import (
    DTYPES,
    OPERATORS,
    Function,
    Node,
    constant,
    integers,
    is_float,
    operator,
    raw,
)

__all__: list[str] = []


def _listed(node: Node, attribute: str, since: int, given: Sequence[Any], k: int = 0) -> list[int] | None:
    """Integers that are an attribute in texts before `since` and then the k-th of the optional inputs; None if missing."""
    if node.version < since:
        value = node.get(attribute)
        return None if value is None else list(value)
    value = given[k] if k < len(given) else None
    return None if value is None else integers(value)


# Constants


@operator("Constant")
def _constant(node: Node, floats: Mapping[str, str]) -> Function:
    (value,) = node.attributes.values()
    return lambda: _in(value, floats)


def _in(value: np.ndarray, floats: Mapping[str, str]) -> np.ndarray:
    """A constant in the dtype that is computed in; a view, as a constant is not to be written to."""
    name = floats.get(value.dtype.name)
    return value if name is None else value.astype(name)


def _dtype(number: int, node: Node, floats: Mapping[str, str]) -> str:
    if number not in DTYPES:
        raise node.refuse(f"the element type {number} is not supported, {', '.join(DTYPES.values())} are")
    return floats.get(DTYPES[number], DTYPES[number])


@operator("Cast")
def _cast(node: Node, floats: Mapping[str, str]) -> Function:
    _dtype(node.get("to"), node, floats)
    return lambda x: ops.astype(x, _dtype(node.get("to"), node, floats))


@operator("CastLike")
def _cast_like(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda x, like: ops.astype(x, like.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(node: Node, floats: Mapping[str, str]) -> Function:
    value = node.get("value", np.zeros(1, np.float32))
    return lambda shape: np.broadcast_to(_in(value, floats).reshape(()), integers(shape))


@operator("EyeLike")
def _eye_like(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda x: np.eye(
        *x.shape,
        k=node.get("k", 0),
        dtype=_dtype(node.get("dtype"), node, floats) if node.get("dtype") else x.dtype,
    )


@operator("Range")
def _range(node: Node, floats: Mapping[str, str]) -> Function:
    def run(start: Any, limit: Any, delta: Any) -> np.ndarray:
        dtype = start.dtype
        start, limit, delta = (np.asarray(raw(v)).item() for v in (start, limit, delta))
        count = max(math.ceil((limit - start) / delta), 0)
        return (start + np.arange(count) * delta).astype(dtype)

    return run


@operator("OneHot")
def _one_hot(node: Node, floats: Mapping[str, str]) -> Function:
    def run(places: Any, depth: Any, values: Any) -> np.ndarray:
        (count,), axis = integers(depth), node.get("axis", -1)
        places, (off, on) = raw(places).astype(np.int64), raw(values)
        hit = (places[..., None] % count == np.arange(count)) & ((places >= -count) & (places < count))[
            ..., None
        ]
        return np.where(np.moveaxis(hit, -1, axis), on, off)

    return run


# Shapes


@operator("Shape")
def _shape(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda x: np.array(x.shape[slice(node.get("start", 0), node.get("end"))], np.int64)


OPERATORS["Size"] = lambda node, floats: lambda x: np.array(x.size, np.int64)


@operator("Reshape")
def _reshape(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, shape: Any) -> Any:
        sizes = integers(shape)
        if not node.get("allowzero", 0):
            sizes = [x.shape[k] if n == 0 else n for k, n in enumerate(sizes)]
        return x.reshape(tuple(sizes))

    return run


@operator("Flatten")
def _flatten(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any) -> Any:
        axis = node.get("axis", 1)
        axis = axis + x.ndim if axis < 0 else axis
        return x.reshape((math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))

    return run


@operator("Transpose")
def _transpose(node: Node, floats: Mapping[str, str]) -> Function:
    perm = node.get("perm")
    return lambda x: ops.transpose(x, perm) if is_float(x) else np.transpose(x, perm)


@operator("Squeeze")
def _squeeze(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, *given: Any) -> Any:
        axes = _listed(node, "axes", 13, given)
        where = tuple(k for k, n in enumerate(x.shape) if n == 1) if axes is None else tuple(axes)
        return ops.squeeze(x, where) if is_float(x) else np.squeeze(x, where)

    return run


@operator("Unsqueeze")
def _unsqueeze(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, *given: Any) -> Any:
        axes = _listed(node, "axes", 13, given) or []
        rank = x.ndim + len(axes)
        new, sizes = {k % rank for k in axes}, iter(x.shape)
        return x.reshape(tuple(1 if k in new else next(sizes) for k in range(rank)))

    return run


@operator("Expand")
def _expand(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, shape: Any) -> Any:
        sizes = np.broadcast_shapes(x.shape, tuple(integers(shape)))
        return ops.broadcast_to(x, sizes) if is_float(x) else np.broadcast_to(x, sizes)

    return run


@operator("Tile")
def _tile(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, repeats: Any) -> Any:
        if not is_float(x):
            return np.tile(x, integers(repeats))
        for axis, n in enumerate(integers(repeats)):
            x = (
                x
                if n == 1
                else ops.concatenate([x] * n, axis=axis)
                if n
                else x[(slice(None),) * axis + (slice(0, 0),)]
            )
        return x

    return run


@operator("Concat")
def _concat(node: Node, floats: Mapping[str, str]) -> Function:
    axis = node.get("axis")
    return lambda *xs: ops.concatenate(xs, axis) if is_float(xs[0]) else np.concatenate(xs, axis)


@operator("Split")
def _split(node: Node, floats: Mapping[str, str]) -> Function:
    axis = node.get("axis", 0)

    def run(x: Any, *given: Any) -> tuple[Any, ...]:
        sizes = _listed(node, "split", 13, given)
        if sizes is None:
            count = node.get("num_outputs") or len(node.outputs)
            each = -(-x.shape[axis] // count)
            sizes = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
        ends = np.cumsum(sizes).tolist()
        at = (slice(None),) * (axis % x.ndim)
        return tuple(x[(*at, slice(end - n, end))] for n, end in zip(sizes, ends, strict=True))

    return run


@operator("Slice")
def _slice(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, *given: Any) -> Any:
        starts, ends, axes, steps = (
            _listed(node, name, 10, given, k) for k, name in enumerate(("starts", "ends", "axes", "steps"))
        )
        assert starts is not None and ends is not None  # the checker has seen to it
        index = [slice(None)] * x.ndim
        for start, end, axis, step in zip(
            starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
        ):
            n = x.shape[axis]
            start, end = (v + n if v < 0 else v for v in (start, end))
            if step > 0:
                index[axis] = slice(min(max(start, 0), n), min(max(end, 0), n), step)
            else:
                end = min(max(end, -1), n - 1)
                index[axis] = slice(min(max(start, 0), n - 1), None if end < 0 else end, step)
        return x[tuple(index)]

    return run


@operator("Pad")
def _pad(node: Node, floats: Mapping[str, str]) -> Function:
    mode = node.only("mode", "constant", "reflect", "edge")

    def run(x: Any, *given: Any) -> Any:
        pads = _listed(node, "pads", 11, given) or []
        value: Any = node.get("value", 0.0)
        if node.version >= 11:
            value = np.asarray(raw(given[1])).item() if len(given) > 1 and given[1] is not None else 0
        axes = integers(given[2]) if len(given) > 2 and given[2] is not None else range(x.ndim)
        widths = [(0, 0)] * x.ndim
        for k, axis in enumerate(axes):
            widths[axis] = (pads[k], pads[k + len(pads) // 2])
        if mode != "constant" or not is_float(x):
            places = (
                [np.pad(np.arange(n), w, mode) for n, w in zip(x.shape, widths, strict=True)]
                if mode != "constant"
                else []
            )
            return x[np.ix_(*places)] if places else np.pad(x, widths, constant_values=value)
        return _padded(x, widths, value)

    return run


def _padded(x: Tensor, widths: Sequence[tuple[int, int]], value: float) -> Tensor:
    """Negative widths cut."""
    index = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape, strict=True))
    return ops.pad(x[index], [(max(a, 0), max(b, 0)) for a, b in widths], value)


@operator("Trilu")
def _trilu(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, k: Any = None) -> Any:
        places = np.tri(
            *x.shape[-2:], k=(0 if k is None else integers(k)[0]) - node.get("upper", 1), dtype=bool
        )
        kept = ~places if node.get("upper", 1) else places
        return ops.where(kept, x, 0.0) if is_float(x) else np.where(kept, x, x.dtype.type(0))

    return run


# Indices


@operator("Gather")
def _gather(node: Node, floats: Mapping[str, str]) -> Function:
    axis = node.get("axis", 0)

    def run(x: Any, places: np.ndarray) -> Any:
        n = x.shape[axis]
        if places.size and not -n <= places.min() <= places.max() < n:
            raise ValueError(
                f"{node.label}: indices: expected {-n} to {n - 1}, got {places.min()} to {places.max()}"
            )
        if isinstance(x, Variable) and x.ndim == 2 and axis in (0, -2):
            return ops.embedding(x, np.where(places < 0, places + n, places))
        return x[(slice(None),) * (axis % x.ndim) + (int(places) if places.ndim == 0 else places,)]

    return run


@operator("GatherElements")
def _gather_elements(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, places: np.ndarray) -> Any:
        index = list(np.indices(places.shape, sparse=True))
        index[node.get("axis", 0)] = places
        return x[tuple(index)]

    return run


@operator("ScatterElements")
def _scatter_elements(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("reduction", "none")

    def run(x: Any, places: np.ndarray, updates: Any) -> Any:
        index = list(np.indices(places.shape, sparse=True))
        index[node.get("axis", 0)] = places
        at = tuple(index)

        def put(values: np.ndarray, what: Any) -> np.ndarray:
            values = np.array(values)
            values[at] = what
            return values

        if not is_float(x):
            return put(x, updates)
        return apply(put(x.data, updates.data), (x, lambda dy: put(dy, 0)), (updates, lambda dy: dy[at]))

    return run


@operator("GatherND")
def _gather_nd(node: Node, floats: Mapping[str, str]) -> Function:
    lead = node.get("batch_dims", 0)

    def run(x: Any, places: np.ndarray) -> Any:
        batch = np.indices(places.shape[:lead], sparse=True)
        batch = [b.reshape(b.shape + (1,) * (places.ndim - 1 - lead)) for b in batch]
        return x[(*batch, *np.moveaxis(places, -1, 0))]

    return run


@operator("ReverseSequence")
def _reverse_sequence(node: Node, floats: Mapping[str, str]) -> Function:
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    if {time, batch} != {0, 1}:
        raise node.refuse(f"time_axis {time} and batch_axis {batch} are not supported, 0 and 1 are")

    def run(x: Any, lengths: np.ndarray) -> Any:
        steps, rows = np.arange(x.shape[time])[:, None], np.arange(x.shape[batch])[None]
        places = np.where(steps < lengths, lengths - 1 - steps, steps)
        return x[places, rows] if time == 0 else x[rows.T, places.T]

    return run


# Reductions


def _log_sum_exp(x: Tensor, axes: Any, keepdims: bool) -> Tensor:
    top = constant(np.max(x.data, axis=axes, keepdims=True))
    y = ops.log(ops.sum(ops.exp(x - top), axes, keepdims=True)) + top
    return y if keepdims else ops.squeeze(y, axes)


_REDUCTIONS: dict[str, Function] = {
    "ReduceSum": ops.sum,
    "ReduceMean": ops.mean,
    "ReduceMax": ops.max,
    "ReduceMin": ops.min,
    "ReduceL1": lambda x, axes, keep: ops.sum(ops.abs(x), axes, keep),
    "ReduceL2": lambda x, axes, keep: ops.sqrt(ops.sum(ops.square(x), axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: ops.sum(ops.square(x), axes, keep),
    "ReduceLogSum": lambda x, axes, keep: ops.log(ops.sum(x, axes, keep)),
    "ReduceLogSumExp": _log_sum_exp,
}
_OF_INTEGERS = {"ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod}


@operator(*_REDUCTIONS, "ReduceProd")
def _reduction(node: Node, floats: Mapping[str, str]) -> Function:
    keep, since = bool(node.get("keepdims", 1)), 13 if node.op == "ReduceSum" else 18

    def run(x: Any, *given: Any) -> Any:
        axes = _listed(node, "axes", since, given)
        if not axes:
            if node.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        where = tuple(a % x.ndim for a in axes)
        if is_float(x) and node.op in _REDUCTIONS:
            return _REDUCTIONS[node.op](x, where, keep)
        if is_float(x) or node.op not in _OF_INTEGERS:
            raise node.refuse(f"an input of {x.dtype} is not supported")
        return _OF_INTEGERS[node.op](x, axis=where, keepdims=keep).astype(x.dtype)

    return run


@operator("ArgMax", "ArgMin")
def _arg(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("select_last_index", 0)
    function = np.argmax if node.op == "ArgMax" else np.argmin
    return lambda x: function(raw(x), axis=node.get("axis", 0), keepdims=bool(node.get("keepdims", 1)))


@operator("TopK")
def _top_k(node: Node, floats: Mapping[str, str]) -> Function:
    axis, largest = node.get("axis", -1), node.get("largest", 1)

    def run(x: Any, *given: Any) -> tuple[Any, np.ndarray]:
        (k,) = [node.get("k")] if node.version < 10 else integers(given[0])
        values = raw(x)
        turned = ~values if values.dtype.kind in "ub" else -values
        order = np.argsort(
            turned if largest else values, axis=axis, kind="stable"
        )  # equals: the first one first
        index = list(np.indices(x.shape, sparse=True))
        index[axis] = order
        first = (slice(None),) * (axis % x.ndim) + (slice(0, k),)
        return x[tuple(index)][first], order[first].astype(np.int64)

    return run


@operator("NonZero")
def _non_zero(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda x: np.array(np.nonzero(raw(x)), np.int64)


@operator("CumSum")
def _cumsum(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("exclusive", 0)
    node.only("reverse", 0)

    def run(x: Any, axis: Any) -> Any:
        (axis,) = integers(axis)
        if not is_float(x):
            return np.cumsum(x, axis, dtype=x.dtype)
        last = ops.matmul(
            ops.transpose(x, order := _last(axis, x.ndim)), np.triu(np.ones((x.shape[axis],) * 2, x.dtype))
        )
        return ops.transpose(last, np.argsort(order).tolist())

    return run


def _last(axis: int, rank: int) -> list[int]:
    """The axes with this one behind the others."""
    return [k for k in range(rank) if k != axis % rank] + [axis % rank]


# Convolution and pooling, over one axis beside batch and channels


def _one_axis(node: Node) -> None:
    if len(node.get("kernel_shape", [1])) != 1:
        raise node.refuse(
            f"kernel_shape {node.get('kernel_shape')} is not supported: expected one axis beside the channels"
        )


def _windows(node: Node, x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """x (B, C, T) as (B, C, steps, size): what each step of the result sees."""
    if x.ndim != 3:
        raise node.refuse(f"an input of shape {x.shape} is not supported, (batch, channels, time) is")
    stride, dilation = node.get("strides", [1])[0], node.get("dilations", [1])[0]
    span, kind = (size - 1) * dilation + 1, node.get("auto_pad", "NOTSET")
    before, after = node.get("pads", [0, 0])
    if kind.startswith("SAME"):
        total = max((-(-x.shape[2] // stride) - 1) * stride + span - x.shape[2], 0)
        before, after = (
            (total // 2, total - total // 2) if kind == "SAME_UPPER" else (total - total // 2, total // 2)
        )
    x = ops.pad(x, [(0, 0), (0, 0), (before, after)], value)
    if x.shape[2] < span:
        raise ValueError(
            f"{node.label}: expected at least {span - before - after} steps, got {x.shape[2] - before - after}"
        )
    starts = np.arange(0, x.shape[2] - span + 1, stride)
    return x[:, :, starts[:, None] + np.arange(size) * dilation]


@operator("Conv")
def _conv(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    _one_axis(node)
    groups = node.get("group", 1)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if w.ndim != 3:
            raise node.refuse(
                f"weights of shape {w.shape} are not supported: expected one axis beside the channels"
            )
        out, each, size = w.shape
        seen = ops.transpose(_windows(node, x, size), (0, 2, 1, 3))  # (B, steps, C, size)
        rows = seen.reshape((*seen.shape[:2], groups, each * size)).transpose(2, 0, 1, 3)
        kernel = w.reshape((groups, out // groups, each * size)).transpose(0, 2, 1)
        B, steps = seen.shape[:2]
        y = ops.matmul(
            rows.reshape((groups, B * steps, each * size)), kernel
        )  # (groups, B * steps, out / groups)
        y = y.reshape((groups, B, steps, out // groups)).transpose(1, 0, 3, 2).reshape((B, out, steps))
        return y if b is None else y + b.reshape((out, 1))

    return run


@operator("MaxPool", "AveragePool")
def _pool(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("auto_pad", "NOTSET", "VALID")
    node.only("ceil_mode", 0)
    node.only("storage_order", 0)
    if any(node.outputs[1:]):
        raise node.refuse("the output Indices is not supported, Y is")
    _one_axis(node)
    size = node.get("kernel_shape")[0]

    def run(x: Tensor) -> Tensor:
        if node.op == "MaxPool":
            return ops.max(_windows(node, x, size, -np.inf), axis=3)
        total = ops.sum(_windows(node, x, size), axis=3)
        if node.get("count_include_pad", 0):
            return total / size
        return total / ops.sum(_windows(node, constant(np.ones_like(x.data)), size), axis=3)

    return run


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: Node, floats: Mapping[str, str]) -> Function:
    function = ops.mean if node.op == "GlobalAveragePool" else ops.max
    return lambda x: function(x, axis=tuple(range(2, x.ndim)), keepdims=True)
