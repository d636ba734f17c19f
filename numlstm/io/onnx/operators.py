"""The operators that a graph may be made of, beside the recurrent ones: what each computes, from operator set 7 on.

`OPERATORS` is the table; an entry is a function of a node that gives the function that runs it, and says by an error
what it does not support. Values are as `graph.Program` has them: floats are Tensors, all else arrays. `Node.version` is
that of the operator's text (https://onnx.ai/onnx/operators), which decides where arguments are found (attribute or
input) and what defaults mean. Shapes, indices and reductions are in operators_shape.py. Needs no onnx package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from numlstm import ops
from numlstm.autograd import Tensor, Variable, apply
from numlstm.io.onnx.recurrent import Recurrent
from numlstm.kernels.reference_pointwise import erf

__all__ = ["DTYPES", "OPERATORS", "Function", "Node", "integers", "operation", "operator", "raw"]

Function = Callable[..., Any]

# ONNX's numbers of element types that a graph here may hold.
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 11: "float64",
    12: "uint32", 13: "uint64",
}  # fmt: skip


class Node(NamedTuple):
    """A node of a graph; `version` is since which operator set its text holds."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    version: int
    attributes: dict[str, Any]

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.op} {self.name!r}" if self.name else self.op

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def has_input(self, k: int) -> bool:
        """Is the k-th input there?"""
        return k < len(self.inputs) and bool(self.inputs[k])

    def refuse(self, what: str) -> NotImplementedError:
        """The error that says what is not supported."""
        return NotImplementedError(f"{self.label}: {what}")

    def only(self, name: str, *values: Any) -> Any:
        """An attribute of which these values are supported, the first by default."""
        value = self.get(name, values[0])
        if value not in values:
            raise self.refuse(
                f"the attribute {name} {value!r} is not supported, {' and '.join(map(repr, values))} are"
            )
        return value


Maker = Callable[[Node, Mapping[str, str]], Function]
OPERATORS: dict[str, Maker] = {}
RECURRENT_VERSIONS = (7, 14, 22)
NEWEST = 28  # the latest operator set whose texts were read


def operator(*names: str) -> Callable[[Maker], Maker]:
    """Decorator: enter a maker under the names of operators."""

    def enter(maker: Maker) -> Maker:
        OPERATORS.update(dict.fromkeys(names, maker))
        return maker

    return enter


def operation(node: Node, floats: Mapping[str, str]) -> Function:
    """What runs a node.

    Arguments:
        floats: see `graph.Program`; read whenever the function is called.

    Raises:
        NotImplementedError: an operator, a version or an attribute that is not supported; node and option are named.
        ValueError: a bad value of an attribute.
    """
    if node.op not in OPERATORS:
        where = f" (the node {node.name!r})" if node.name else ""
        raise NotImplementedError(
            f"the operator {node.op} is not supported{where}: {', '.join(sorted(OPERATORS))} are"
        )
    return OPERATORS[node.op](node, floats)


# Values


def raw(value: Any) -> np.ndarray:
    """The array of a value."""
    return value.data if isinstance(value, Tensor) else value


def integers(value: Any) -> list[int]:
    """A value that says axes, sizes or the like."""
    return [int(v) for v in np.asarray(raw(value)).reshape(-1)]


def is_float(value: Any) -> bool:
    """Is it a Tensor of floats?"""
    return isinstance(value, Tensor)


def constant(array: np.ndarray) -> Tensor:
    """A result that does not depend, differentiably, on anything."""
    return Tensor(np.asarray(array))


# Recurrent nodes


@operator("LSTM", "GRU", "RNN")
def _recurrent(node: Node, floats: Mapping[str, str]) -> Function:
    return Recurrent(node.op, node.attributes, node.label)


# Element by element


def _erf(x: Any) -> Tensor:
    x = ops.tensor(x)
    u = x.data
    slope = 2 / math.sqrt(math.pi)
    return apply(np.asarray(erf(u), u.dtype), (x, lambda dy: dy * (slope * np.exp(-u * u)).astype(u.dtype)))


def _either(of_floats: Function, of_others: Function) -> Maker:
    """A function for floats and one for arrays of other kinds."""
    return lambda node, floats: lambda *x: (of_floats if any(map(is_float, x)) else of_others)(*x)


def _steps(function: Function) -> Maker:
    """A function whose gradient is zero everywhere."""
    return lambda node, floats: lambda x: constant(function(x.data)) if is_float(x) else function(x)


def _comparison(function: Function) -> Maker:
    return lambda node, floats: lambda *x: function(*map(raw, x))


def _hard_swish(x: Any) -> Tensor:
    return x * ops.clip(x / 6 + 0.5, 0.0, 1.0)


_UNARY: dict[str, Function] = {
    "Cos": ops.cos, "Erf": _erf, "Exp": ops.exp, "HardSwish": _hard_swish, "Identity": lambda x: x, "Log": ops.log,
    "Mish": lambda x: x * ops.tanh(ops.softplus(x)), "Reciprocal": lambda x: 1 / x, "Sigmoid": ops.sigmoid,
    "Sin": ops.sin, "Softplus": ops.softplus, "Softsign": ops.softsign, "Sqrt": ops.sqrt, "Tanh": ops.tanh,
    "Tan": lambda x: ops.sin(x) / ops.cos(x), "Sinh": lambda x: (ops.exp(x) - ops.exp(-x)) / 2,
    "Cosh": lambda x: (ops.exp(x) + ops.exp(-x)) / 2,
}  # fmt: skip
OPERATORS |= {name: lambda node, floats, f=f: f for name, f in _UNARY.items()}  # type: ignore[misc]


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers are divided as in C: towards zero."""
    return (a - np.fmod(a, b)) // b


def _power(a: Any, b: Any) -> Any:
    """The result has the type of the base."""
    if not is_float(a):
        return np.power(a, raw(b)).astype(a.dtype)
    exponent = np.asarray(raw(b))
    return (
        ops.square(a)
        if exponent.size == 1 and exponent.item() == 2 and exponent.ndim == 0
        else ops.power(a, b)
    )


OPERATORS |= {
    "Abs": _either(ops.abs, np.abs),
    "Add": _either(ops.add, np.add),
    "Sub": _either(ops.subtract, np.subtract),
    "Mul": _either(ops.multiply, np.multiply),
    "Div": _either(ops.divide, _quotient),
    "Neg": _either(ops.negative, np.negative),
    "Relu": _either(ops.relu, lambda x: np.maximum(x, 0)),
    "Pow": lambda node, floats: _power,
    "Ceil": _steps(np.ceil),
    "Floor": _steps(np.floor),
    "Round": _steps(np.round),
    "Sign": _steps(np.sign),
    "And": _comparison(np.logical_and),
    "Or": _comparison(np.logical_or),
    "Xor": _comparison(np.logical_xor),
    "Not": _comparison(np.logical_not),
    "Equal": _comparison(np.equal),
    "Less": _comparison(np.less),
    "Greater": _comparison(np.greater),
    "LessOrEqual": _comparison(np.less_equal),
    "GreaterOrEqual": _comparison(np.greater_equal),
    "IsNaN": _comparison(np.isnan),
}


@operator("IsInf")
def _is_inf(node: Node, floats: Mapping[str, str]) -> Function:
    low, high = node.get("detect_negative", 1), node.get("detect_positive", 1)
    return lambda x: np.isinf(raw(x)) & ((raw(x) < 0) & bool(low) | (raw(x) > 0) & bool(high))


@operator("Mod")
def _mod(node: Node, floats: Mapping[str, str]) -> Function:
    function = np.fmod if node.get("fmod", 0) else np.mod
    return lambda a, b: constant(function(a.data, b.data)) if is_float(a) else function(a, b)


def _folded(of_floats: Function, of_others: Function) -> Maker:
    """Two-argument functions over any number of inputs."""
    pair = lambda a, b: (of_floats if is_float(a) else of_others)(a, b)
    return lambda node, floats: lambda *x: reduce(pair, x)


OPERATORS |= {
    "Max": _folded(ops.maximum, np.maximum),
    "Min": _folded(ops.minimum, np.minimum),
    "Sum": _folded(ops.add, np.add),
}


@operator("Mean")
def _mean(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda *x: reduce(ops.add, x) / len(x)


@operator("Where")
def _where(node: Node, floats: Mapping[str, str]) -> Function:
    return lambda c, a, b: ops.where(c, a, b) if is_float(a) else np.where(c, a, b)


@operator("Clip")
def _clip(node: Node, floats: Mapping[str, str]) -> Function:
    bounds = (node.get("min"), node.get("max")) if node.version < 11 else (None, None)

    def run(x: Any, *given: Any) -> Any:
        low, high = (*given, None, None)[:2] if node.version >= 11 else bounds
        low, high = (None if v is None else np.asarray(raw(v)).item() for v in (low, high))
        if not is_float(x):
            return np.clip(x, low, high)
        low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
        return ops.clip(x, low, high) if low <= high else constant(np.full(x.shape, high, x.dtype))

    return run


# Activations that have parameters


@operator(
    "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "HardSigmoid", "PRelu", "Gelu", "Swish", "Shrink"
)
def _activation(node: Node, floats: Mapping[str, str]) -> Function:
    def alpha(default: float) -> float:
        return float(node.get("alpha", default))

    match node.op:
        case "LeakyRelu":
            return lambda x: ops.leaky_relu(x, alpha(0.01))
        case "ThresholdedRelu":
            return lambda x: ops.where(x.data > alpha(1.0), x, 0.0)
        case "Elu":
            return lambda x: ops.elu(x, alpha(1.0))
        case "Celu":
            return lambda x: ops.maximum(x, 0.0) + ops.elu(ops.minimum(x, 0.0) / alpha(1.0)) * alpha(1.0)
        case "Selu":
            gamma = float(node.get("gamma", 1.0507010221481323))
            return lambda x: ops.elu(x, alpha(1.6732631921768188)) * gamma
        case "HardSigmoid":
            beta = float(node.get("beta", 0.5))
            return lambda x: ops.clip(x * alpha(0.2) + beta, 0.0, 1.0)
        case "PRelu":
            return lambda x, slope: ops.where(x.data > 0, x, x * slope)
        case "Gelu":
            tanh = node.only("approximate", "none", "tanh") == "tanh"
            return lambda x: ops.gelu(x, approximate=tanh)
        case "Swish":
            return lambda x: x * ops.sigmoid(x * alpha(1.0))
    lambd, bias = float(node.get("lambd", 0.5)), float(node.get("bias", 0.0))
    return lambda x: ops.where(x.data < -lambd, x + bias, ops.where(x.data > lambd, x - bias, 0.0))


@operator("Softmax", "LogSoftmax")
def _softmax(node: Node, floats: Mapping[str, str]) -> Function:
    function = ops.softmax if node.op == "Softmax" else ops.log_softmax
    if node.version >= 13:
        return lambda x: function(x, axis=node.get("axis", -1))

    def run(x: Tensor) -> Tensor:  # over all axes from `axis` on, as one
        axis = node.get("axis", 1) % max(x.ndim, 1)
        rows = x.reshape((math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
        return function(rows).reshape(x.shape)

    return run


@operator("Dropout")
def _dropout(node: Node, floats: Mapping[str, str]) -> Function:
    def run(x: Any, ratio: Any = None, training: Any = None) -> tuple[Any, np.ndarray]:
        if training is not None and np.asarray(raw(training)).any():
            raise node.refuse("training_mode is not supported: a graph is run for inference")
        return x, np.ones(x.shape, bool)

    return run


# Products


@operator("MatMul")
def _matmul(node: Node, floats: Mapping[str, str]) -> Function:
    def run(a: Any, b: Any) -> Any:
        if not is_float(a):
            return np.matmul(a, b)
        return ops.linear(a, b) if isinstance(b, Variable) and b.ndim == 2 else ops.matmul(a, b)

    return run


@operator("Gemm")
def _gemm(node: Node, floats: Mapping[str, str]) -> Function:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = ops.transpose(a) if node.get("transA", 0) else a
        b = ops.transpose(b) if node.get("transB", 0) else b
        y = ops.matmul(a, b)
        y = y if alpha == 1 else y * alpha
        return y if c is None else y + (c if beta == 1 else c * beta)

    return run


@operator("Einsum")
def _einsum(node: Node, floats: Mapping[str, str]) -> Function:
    """Of two operands whose letters stand once each: what attention is written with."""
    equation = node.get("equation").replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    plain = arrow and len(terms) == 2 and all(t.isalpha() and len(set(t)) == len(t) for t in (*terms, out))
    if (
        not plain
        or not set(out) <= set(left)
        or any(set(t) - set(out) - set(u) for t, u in (terms, terms[::-1]))
    ):
        raise node.refuse(
            f"the equation {equation!r} is not supported: expected two operands without repeated letters"
        )
    first, second = terms

    def run(a: Tensor, b: Tensor) -> Tensor:
        u, v = a.data, b.data
        return apply(
            np.einsum(equation, u, v, optimize=True),
            (a, lambda dy: np.einsum(f"{out},{second}->{first}", dy, v, optimize=True)),
            (b, lambda dy: np.einsum(f"{first},{out}->{second}", u, dy, optimize=True)),
        )

    return run


# Norms


@operator("LayerNormalization", "RMSNormalization")
def _layer_norm(node: Node, floats: Mapping[str, str]) -> Function:
    axis, eps = node.get("axis", -1), node.get("epsilon", 1e-5)
    centred, alone = node.op == "LayerNormalization", not any(node.outputs[1:])

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        count = -axis if axis < 0 else x.ndim - axis
        whole = scale.shape == x.shape[x.ndim - count :] and (bias is None or bias.shape == scale.shape)
        if centred and count == 1 and whole and alone:
            return (ops.layer_norm(x, scale, bias, eps),)
        axes = tuple(range(x.ndim - count, x.ndim))
        mean = ops.mean(x, axes, keepdims=True) if centred else 0.0
        x = x - mean
        inverse = 1 / ops.sqrt(ops.mean(ops.square(x), axes, keepdims=True) + eps)
        y = x * inverse * scale
        return y if bias is None else y + bias, mean, inverse

    return run


def _by_channel(v: Tensor, rank: int) -> Tensor:
    return v.reshape((v.shape[0], *[1] * (rank - 2)))


@operator("BatchNormalization")
def _batch_norm(node: Node, floats: Mapping[str, str]) -> Function:
    node.only("training_mode", 0)
    node.only("spatial", 1)
    if any(node.outputs[1:]):
        raise node.refuse("outputs beside Y are not supported: a graph is run for inference")
    eps = node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale, bias, mean, var = (_by_channel(v, x.ndim) for v in (scale, bias, mean, var))
        return (x - mean) * (scale / ops.sqrt(var + eps)) + bias

    return run


@operator("InstanceNormalization")
def _instance_norm(node: Node, floats: Mapping[str, str]) -> Function:
    eps = node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        axes = tuple(range(2, x.ndim))
        x = x - ops.mean(x, axes, keepdims=True)
        x = x / ops.sqrt(ops.mean(ops.square(x), axes, keepdims=True) + eps)
        return x * _by_channel(scale, x.ndim) + _by_channel(bias, x.ndim)

    return run


# Entered in the table by being imported
from numlstm.io.onnx import operators_shape as operators_shape  # noqa: E402
