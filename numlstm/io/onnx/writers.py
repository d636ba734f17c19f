"""How the layers without memory, attention and whole models become nodes; see exporter.py."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from numlstm import activations
from numlstm.graph import Graph
from numlstm.io.onnx.exporter import Builder, Input, Mask, Value, refuse, writer
from numlstm.io.onnx.model import OnnxModel
from numlstm.io.onnx.recurrent import ACTIVATIONS, WEIGHTS, activation_parameters
from numlstm.layers import (
    Activation,
    Add,
    AdditiveAttention,
    Attention,
    Concatenate,
    Conv1D,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalAveragePooling1D,
    GlobalMaxPooling1D,
    InputLayer,
    Layer,
    LayerNormalization,
    Masking,
    MultiHeadAttention,
    Permute,
    PositionEmbedding,
    RepeatVector,
    Reshape,
    SinusoidalPositions,
    TimeDistributed,
    TransformerBlock,
)
from numlstm.models import Sequential

from . import writers_graph as writers_graph
from . import writers_recurrent as writers_recurrent  # they enter themselves

__all__ = ["inputs_of", "takes_ids", "write_graph"]


def inputs_of(model: Layer) -> list[Input]:
    """What a model or layer is called on. Raises ValueError for inputs by name."""
    if isinstance(model, Graph):
        return writers_graph.inputs_of_graph(model)
    shapes = model.build_shape
    if isinstance(shapes, dict):
        raise ValueError(f"{model.name}: a model of inputs by name can't be written as ONNX")
    if not isinstance(shapes, list):
        first = next((layer for _, layer in model.walk() if not layer.has_children()), model)
        name = first.name if isinstance(first, InputLayer) else "input"
        return [Input(name, tuple(shapes), takes_ids(model))]
    attention = isinstance(model, (Attention, AdditiveAttention, MultiHeadAttention))
    names = ["query", "value", "key"] if attention else [f"input_{k}" for k in range(len(shapes))]
    return [Input(name, tuple(shape), False) for name, shape in zip(names, shapes, strict=False)]


def takes_ids(layer: Layer) -> bool:
    """Is the input integers, for an Embedding?"""
    if isinstance(layer, Sequential):
        for inner in layer.layers:
            if not isinstance(inner, (InputLayer, Flatten, Reshape, Permute, RepeatVector)):
                return takes_ids(inner)
        return False
    return takes_ids(layer.layer) if isinstance(layer, TimeDistributed) else isinstance(layer, Embedding)


@writer(Sequential)
def _sequential(b: Builder, model: Sequential, x: Value) -> list[Value]:
    for layer in model.layers:
        x = b.one(layer, x)
    return [x]


@writer(InputLayer, Dropout)
def _same(b: Builder, layer: Layer, x: Value) -> list[Value]:
    return [x]


# Activations

_PLAIN = {
    "exponential": "Exp", "log_softmax": "LogSoftmax", "relu": "Relu", "sigmoid": "Sigmoid", "softmax": "Softmax",
    "softplus": "Softplus", "softsign": "Softsign", "tanh": "Tanh", "selu": "Selu",
}  # fmt: skip
_WITH_PARAMETERS = {
    name: operator for operator, (name, parameters) in ACTIVATIONS.items() if list(parameters) and operator not in (
        "Affine", "ScaledTanh")
}  # fmt: skip


def activate(b: Builder, layer: Layer, x: str) -> str:
    """The activation of a layer, on x."""
    try:
        name = activations.name_of(layer.activation)
    except ValueError as error:
        raise refuse(layer, "activation", "it is a function of one's own") from error
    plain, _, given = name.partition("(")
    if plain in _PLAIN:
        return b.node(_PLAIN[plain], x, **({"axis": -1} if "softmax" in plain else {}))
    if plain in ("affine", "scaled_tanh") or plain in _WITH_PARAMETERS:
        values = activation_parameters(plain)
        values |= {key: float(v) for key, v in re.findall(r"(\w+)=([^,)\s]+)", given)}
        if plain in _WITH_PARAMETERS:
            return b.node(_WITH_PARAMETERS[plain], x, **values)
        alpha, beta = b.constant(values["alpha"]), b.constant(values["beta"])
        if plain == "affine":
            return b.node("Add", b.node("Mul", x, alpha), beta)
        return b.node("Mul", b.node("Tanh", b.node("Mul", x, beta)), alpha)
    match plain:
        case "linear":
            return x
        case "relu6":
            return b.node("Clip", x, b.constant(0.0), b.constant(6.0))
        case "hard_tanh":
            return b.node("Clip", x, b.constant(-1.0), b.constant(1.0))
        case "silu":
            return b.node("Mul", x, b.node("Sigmoid", x))
        case "mish":
            return b.node("Mul", x, b.node("Tanh", b.node("Softplus", x)))
        case "log_sigmoid":
            return b.node("Neg", b.node("Softplus", b.node("Neg", x)))
        case "gelu":
            cdf = b.node("Erf", b.node("Mul", x, b.constant(1 / math.sqrt(2))))
            return b.node("Mul", b.node("Mul", x, b.node("Add", cdf, b.constant(1.0))), b.constant(0.5))
    raise refuse(layer, "activation", f"{name} has no form there")


@writer(Activation)
def _activation(b: Builder, layer: Activation, x: Value) -> list[Value]:
    return [x._replace(name=activate(b, layer, x.name))]


# Products, tables, norms


def linear(b: Builder, x: str, kernel: Any, bias: Any, name: str) -> str:
    """x times the kernel, plus the bias."""
    y = b.node("MatMul", x, b.array(kernel, f"{name}kernel"), name=f"{name}MatMul")
    return y if bias is None else b.node("Add", y, b.array(bias, f"{name}bias"), name=f"{name}Add")


@writer(Dense)
def _dense(b: Builder, layer: Dense, x: Value) -> list[Value]:
    bias = None if layer.bias is None else layer.bias.numpy()
    y = linear(b, x.name, layer.kernel.numpy(), bias, f"{layer.name}/")
    return [Value(activate(b, layer, y), (*x.shape[:-1], layer.units), x.mask)]


@writer(Embedding)
def _embedding(b: Builder, layer: Embedding, x: Value) -> list[Value]:
    table = b.array(layer.embeddings.numpy(), f"{layer.name}/embeddings")
    ids = x.name if x.name in b.ids else b.cast(x.name, "int64")
    mask = x.mask
    if layer.mask_zero:
        kept = b.node("Not", b.node("Equal", ids, b.constant(0, "int64")))
        mask = _both(b, kept, mask)
    return [Value(b.node("Gather", table, ids, axis=0, name=layer.name), (*x.shape, layer.output_dim), mask)]


def _both(b: Builder, kept: str, mask: Any) -> Any:
    """The steps that a layer keeps, together with the mask that came."""
    return Mask(kept) if mask is None else Mask(b.node("And", kept, mask.steps), None, mask.turned)


@writer(Masking)
def _masking(b: Builder, layer: Masking, x: Value) -> list[Value]:
    padding = b.node("Equal", x.name, b.constant(layer.mask_value))
    some = b.reduce("ReduceMax", b.cast(b.node("Not", padding), "int32"), 2, True)
    kept = b.node("Greater", some, b.constant(0, "int32"))
    y = b.node("Mul", x.name, b.cast(kept))
    return [Value(y, x.shape, _both(b, b.squeeze(kept, 2), x.mask))]


@writer(LayerNormalization)
def _layer_norm(b: Builder, layer: LayerNormalization, x: Value) -> list[Value]:
    count = layer._count(len(x.shape))
    gamma = np.ones(x.shape[-count:], b.dtype) if layer.gamma is None else layer.gamma.numpy()
    given = [x.name, b.array(gamma, f"{layer.name}/gamma")]
    if layer.beta is not None:
        given.append(b.array(layer.beta.numpy(), f"{layer.name}/beta"))
    return [
        x._replace(
            name=b.node("LayerNormalization", *given, axis=-count, epsilon=layer.epsilon, name=layer.name)
        )
    ]


@writer(SinusoidalPositions)
def _sinusoids(b: Builder, layer: SinusoidalPositions, x: Value) -> list[Value]:
    """In double precision until the angle is small, as steps may be many."""
    features = np.arange(x.shape[-1])
    scale = layer.max_wavelength ** -(2 * (features // 2) / x.shape[-1])
    step = b.unsqueeze(b.cast(b.count(x.name), "float64"), 1)
    angle = b.node("Mul", step, b.array(scale, f"{layer.name}/frequencies"))
    angle = b.node("Add", angle, b.array(np.where(features % 2, math.pi / 2, 0.0), f"{layer.name}/phases"))
    angle = b.node("Mod", angle, b.constant(2 * math.pi, "float64"), fmod=1)
    return [x._replace(name=b.node("Add", x.name, b.node("Sin", b.cast(angle))))]


@writer(PositionEmbedding)
def _position_embedding(b: Builder, layer: PositionEmbedding, x: Value) -> list[Value]:
    table = b.array(layer.embeddings.numpy(), f"{layer.name}/embeddings")
    rows = b.node("Gather", table, b.count(x.name), axis=0)
    return [x._replace(name=b.node("Add", x.name, rows))]


# Shapes; masks end here


@writer(Flatten)
def _flatten(b: Builder, layer: Flatten, x: Value) -> list[Value]:
    rest = x.shape[1:]
    size = None if None in rest else math.prod(n for n in rest if n is not None)
    return [Value(b.node("Flatten", x.name, axis=1), (x.shape[0], size))]


@writer(Reshape)
def _reshape(b: Builder, layer: Reshape, x: Value) -> list[Value]:
    shape = layer.compute_output_shape(x.shape)
    return [Value(b.reshape(x.name, 0, *layer.target_shape), shape)]


@writer(Permute)
def _permute(b: Builder, layer: Permute, x: Value) -> list[Value]:
    return [Value(b.transpose(x.name, 0, *layer.dims), layer.compute_output_shape(x.shape))]


@writer(RepeatVector)
def _repeat_vector(b: Builder, layer: RepeatVector, x: Value) -> list[Value]:
    y = b.node("Expand", b.unsqueeze(x.name, 1), b.constant([1, layer.n, 1], "int64"))
    return [Value(y, (x.shape[0], layer.n, x.shape[1]))]


@writer(TimeDistributed)
def _time_distributed(b: Builder, layer: TimeDistributed, x: Value) -> list[Value]:
    if x.mask is not None and layer._heeds_masks():
        raise refuse(layer, "mask", f"the layer inside, {layer.layer.name}, would have to be told of it")
    sizes = b.node("Shape", x.name)
    inside = b.node("Concat", b.constant([-1], "int64"), b.slice(sizes, 2, len(x.shape)), axis=0)
    rows = Value(b.node("Reshape", x.name, inside), (None, *x.shape[2:]))
    y = b.one(layer.layer, rows)
    last = b.slice(b.node("Shape", y.name), 1, len(y.shape))
    outside = b.node("Concat", b.slice(sizes, 0, 2), last, axis=0)
    return [Value(b.node("Reshape", y.name, outside), (*x.shape[:2], *y.shape[1:]), x.mask)]


@writer(Concatenate)
def _concatenate(b: Builder, layer: Concatenate, xs: list[Value]) -> list[Value]:
    shape = layer.compute_output_shape([x.shape for x in xs])
    return [Value(b.node("Concat", *(x.name for x in xs), axis=layer._axis(len(shape))), shape)]


@writer(Add)
def _add(b: Builder, layer: Add, xs: list[Value]) -> list[Value]:
    total = xs[0].name
    for x in xs[1:]:
        total = b.node("Add", total, x.name)
    return [Value(total, layer.compute_output_shape([x.shape for x in xs]))]


# Convolution and pooling


@writer(Conv1D)
def _convolution(b: Builder, layer: Conv1D, x: Value) -> list[Value]:
    if x.mask is not None and not layer.ignore_mask:
        raise refuse(layer, "mask", "its masked steps are zeros to it, and the mask of its output is its own")
    weights = [b.array(layer.kernel.numpy().transpose(2, 1, 0), f"{layer.name}/kernel")]
    if layer.bias is not None:
        weights.append(b.array(layer.bias.numpy(), f"{layer.name}/bias"))
    reach = (layer.kernel_size - 1) * layer.dilation_rate
    pads = (
        {"auto_pad": "SAME_UPPER"}
        if layer.padding == "same"
        else {"pads": [reach, 0] if layer.padding == "causal" else [0, 0]}
    )
    sizes = {"strides": [layer.strides], "dilations": [layer.dilation_rate], "group": layer.groups}
    y = b.node("Conv", b.transpose(x.name, 0, 2, 1), *weights, **sizes, **pads)
    return [Value(activate(b, layer, b.transpose(y, 0, 2, 1)), layer.compute_output_shape(x.shape))]


@writer(GlobalAveragePooling1D)
def _average(b: Builder, layer: GlobalAveragePooling1D, x: Value) -> list[Value]:
    shape = layer.compute_output_shape(x.shape)
    if x.mask is None:
        return [Value(b.reduce("ReduceMean", x.name, 1, layer.keepdims), shape)]
    kept = b.unsqueeze(b.cast(x.mask.steps), 2)
    count = b.node("Max", b.reduce("ReduceSum", kept, 1, layer.keepdims), b.constant(1.0))
    total = b.reduce("ReduceSum", b.node("Mul", x.name, kept), 1, layer.keepdims)
    return [Value(b.node("Div", total, count), shape)]


@writer(GlobalMaxPooling1D)
def _maximum(b: Builder, layer: GlobalMaxPooling1D, x: Value) -> list[Value]:
    shape = layer.compute_output_shape(x.shape)
    if x.mask is None or layer.ignore_mask:  # as models from Keras have it
        return [Value(b.reduce("ReduceMax", x.name, 1, layer.keepdims), shape)]
    kept = b.unsqueeze(x.mask.steps, 2)
    seen = b.node("Where", kept, x.name, b.constant(np.finfo(b.dtype).min))
    some = b.node(
        "Greater", b.reduce("ReduceMax", b.cast(kept, "int32"), 1, layer.keepdims), b.constant(0, "int32")
    )
    top = b.reduce("ReduceMax", seen, 1, layer.keepdims)
    return [Value(b.node("Where", some, top, b.constant(0.0)), shape)]


# Attention


def _softmax(b: Builder, scores: str, allowed: str | None) -> str:
    """Along the last axis, where it is allowed; a query that may look nowhere has zeros."""
    if allowed is None:
        return b.node("Softmax", scores, axis=-1)
    weights = b.node("Softmax", b.node("Where", allowed, scores, b.constant(-1e30)), axis=-1)
    return b.node("Where", allowed, weights, b.constant(0.0))


@writer(Attention, AdditiveAttention)
def _attention(b: Builder, layer: Attention | AdditiveAttention, xs: list[Value]) -> list[Value]:
    query, value, key = xs[0], xs[1], xs[-1]
    q, k, mode = query.name, key.name, getattr(layer, "score_mode", "keras")
    path = f"{layer.name}/"
    array = lambda v, name: b.array(v.numpy(), path + name)
    if mode == "general":
        q = b.node("MatMul", q, array(layer.kernel, "kernel"))
    elif mode == "additive":
        q = b.node("MatMul", q, array(layer.query_kernel, "query_kernel"))
        k = b.node("MatMul", k, array(layer.key_kernel, "key_kernel"))
    if mode != "keras" and layer.scale is not None:
        scale = array(layer.scale, "scale")
        q = b.node("Mul", q, scale)
        k = k if mode in ("dot", "general") else b.node("Mul", k, scale)
    if mode in ("dot", "general"):
        scores = b.node("MatMul", q, b.transpose(k, 0, 2, 1))
    else:
        sums = b.node("Tanh", b.node("Add", b.unsqueeze(q, 2), b.unsqueeze(k, 1)))
        weight = {
            "keras": lambda: layer.scale,
            "additive": lambda: layer.score,
            "concat": lambda: layer.concat_score_weight,
        }[mode]()
        weighed = sums if weight is None else b.node("Mul", sums, array(weight, "score"))
        scores = b.reduce("ReduceSum", weighed, 3, False)
    y = b.node("MatMul", _softmax(b, scores, None), value.name)
    return [Value(y, (*query.shape[:2], value.shape[-1]))]


@writer(MultiHeadAttention)
def _multi_head(b: Builder, layer: MultiHeadAttention, xs: list[Value]) -> list[Value]:
    return [multi_head(b, layer, xs, causal=False)]


def multi_head(b: Builder, layer: MultiHeadAttention, xs: list[Value], causal: bool) -> Value:
    """Several heads; the values' mask is heeded."""
    query, value, key = xs[0], xs[1], xs[-1]

    def heads(x: Value, what: str) -> str:
        kernel, bias = getattr(layer, f"{what}_kernel").numpy(), getattr(layer, f"{what}_bias")
        F, N, K = kernel.shape
        bias = None if bias is None else bias.numpy().reshape(N * K)
        y = linear(b, x.name, kernel.reshape(F, N * K), bias, f"{layer.name}/{what}_")
        return b.reshape(y, 0, 0, N, K)

    q, v = (b.transpose(heads(x, what), 0, 2, 1, 3) for x, what in ((query, "query"), (value, "value")))
    k = b.transpose(heads(key, "key"), 0, 2, 3, 1)
    scores = b.node("Mul", b.node("MatMul", q, k), b.constant(1 / math.sqrt(layer.key_dim)))
    allowed = None
    if causal:
        later = b.node("Greater", b.unsqueeze(b.count(value.name), 0), b.unsqueeze(b.count(query.name), 1))
        allowed = b.unsqueeze(b.node("Not", later), 0, 1)
    if value.mask is not None:
        seen = b.unsqueeze(value.mask.steps, 1, 2)
        allowed = seen if allowed is None else b.node("And", allowed, seen)
    if query.mask is not None:
        looking = b.unsqueeze(query.mask.steps, 1, 3)
        allowed = looking if allowed is None else b.node("And", allowed, looking)
    gathered = b.transpose(b.node("MatMul", _softmax(b, scores, allowed), v), 0, 2, 1, 3)
    N, V, *out = layer.output_kernel.shape
    side_by_side = b.reshape(gathered, 0, 0, N * V)
    bias = None if layer.output_bias is None else layer.output_bias.numpy().reshape(-1)
    kernel = layer.output_kernel.numpy().reshape(N * V, math.prod(out))
    y = linear(b, side_by_side, kernel, bias, f"{layer.name}/output_")
    y = y if len(out) == 1 else b.reshape(y, 0, 0, *out)
    return Value(y, (*query.shape[:2], *out), query.mask)


@writer(TransformerBlock)
def _transformer(b: Builder, layer: TransformerBlock, x: Value) -> list[Value]:
    def look(v: Value) -> str:
        return multi_head(b, layer.attention, [v, v], layer.causal).name

    def think(v: Value) -> str:
        return b.one(layer.contract, b.one(layer.expand, v)).name

    def plus(v: Value, name: str) -> Value:
        return v._replace(name=b.node("Add", v.name, name))

    if layer.normalize_first:
        x = plus(x, look(b.one(layer.attention_norm, x)))
        return [plus(x, think(b.one(layer.feedforward_norm, x)))]
    x = b.one(layer.attention_norm, plus(x, look(x)))
    return [b.one(layer.feedforward_norm, plus(x, think(x)))]


# A graph that came from a file


def write_graph(b: Builder, model: OnnxModel) -> None:
    """The nodes as they were, with the weights as they are now."""
    from onnx import helper, numpy_helper

    graph, nodes = model.graph, model.recurrent_nodes()
    b.opset, b.dtype = graph.opset, graph.dtype
    for side, ports in ((b.inputs, graph.inputs), (b.outputs, graph.outputs)):
        for port in ports:
            element = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
            side.append(helper.make_tensor_value_info(port.name, element, port.shape))
    b.arrays |= graph.constants
    b.arrays |= {name: v.numpy().astype(graph.weights[name].dtype) for name, v in model.values.items()}
    for k, node in enumerate(graph.nodes):
        if k in graph.bound:
            held = nodes[k].onnx_weights()
            for place, name in zip(nodes[k].inputs, node.inputs, strict=False):
                if place in WEIGHTS and name:
                    b.arrays[name] = held[place].astype(graph.dtype)
        attributes = {
            name: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
            for name, v in node.attributes.items()
            if not (isinstance(v, list) and not v)  # as good as not given
        }
        b.nodes.append(helper.make_node(node.op, node.inputs, node.outputs, name=node.name, **attributes))
