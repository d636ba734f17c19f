"""A graph as plain data: what `load_onnx` makes of a file, what a model file keeps of it, and what runs.

`Graph` holds nodes, inputs and outputs, small constants and the names of the weights; `to_config` and `from_config`
bring it to JSON and back. `Program` runs its nodes one after the other: floats are Tensors, which a tape may follow,
all else (integers, truth values) are arrays. Needs no onnx package.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numlstm.autograd import Tensor
from numlstm.io.onnx.operators import OPERATORS, Function, Node, operation
from numlstm.io.onnx.recurrent import WEIGHTS, Recurrent

__all__ = ["Graph", "Port", "Program", "WeightSpec"]

# The inputs of operators that are weights when they are constants: those that training changes. An operator that is
# not here has none.
TRAINED: dict[str, tuple[int, ...]] = {
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Gather": (0,),
    "GatherElements": (0,),
    "Conv": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
    "Add": (0, 1),
    "Mul": (0, 1),
}
# Operators that hand a weight on, rearranged.
REARRANGING = {
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Cast", "Flatten", "Expand",
}  # fmt: skip


class Port(NamedTuple):
    """An input or output of a graph. A shape's entries are numbers, names of free sizes, or None; a shape of None is
    any."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def spelled(self) -> str:
        """The shape for a message or a summary."""
        if self.shape is None:
            return "any shape"
        return (
            f"({', '.join('?' if n is None else str(n) for n in self.shape)}{',' * (len(self.shape) == 1)})"
        )


class WeightSpec(NamedTuple):
    """A float array that the model keeps as a weight."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool


class Graph:
    """A graph, without the values of its weights.

    Arguments:
        inputs, outputs: the ports.
        nodes: in an order in which they can run.
        constants: arrays by name.
        weights: `WeightSpec` by name.
        bound: by the number of a recurrent node, the options of `Recurrent.make_layers`, and the features of its input,
            where the node's weights are those of layers.
        opset: the operator set of the file it comes from.
        dtype: that of most floats, "float32" or "float64".
    """

    inputs: list[Port]
    outputs: list[Port]
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    weights: dict[str, WeightSpec]
    bound: dict[int, Mapping[str, Any]]
    opset: int
    dtype: str

    def __init__(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        nodes: Sequence[Node],
        constants: Mapping[str, np.ndarray],
        weights: Mapping[str, WeightSpec],
        bound: Mapping[int, Mapping[str, Any]],
        opset: int,
        dtype: str,
    ) -> None:
        self.inputs, self.outputs, self.nodes = list(inputs), list(outputs), list(nodes)
        self.constants, self.weights, self.bound = dict(constants), dict(weights), dict(bound)
        self.opset, self.dtype = opset, dtype

    def to_config(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "inputs": [list(p) for p in self.inputs],
            "outputs": [list(p) for p in self.outputs],
            "nodes": [
                [n.op, n.name, list(n.inputs), list(n.outputs), n.version, _plain(n.attributes)]
                for n in self.nodes
            ],
            "constants": {name: _packed(a) for name, a in self.constants.items()},
            "weights": {name: list(spec) for name, spec in self.weights.items()},
            "bound": {str(k): dict(options) for k, options in self.bound.items()},
            "opset": self.opset,
            "dtype": self.dtype,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Graph:
        """The inverse of `to_config`. Raises ValueError for what is no graph."""
        try:
            ports = {
                side: [
                    Port(name, dtype, None if shape is None else tuple(shape))
                    for name, dtype, shape in config[side]
                ]
                for side in ("inputs", "outputs")
            }
            nodes = [
                Node(op, name, tuple(inputs), tuple(outputs), version, _unpacked(attributes))
                for op, name, inputs, outputs, version, attributes in config["nodes"]
            ]
            weights = {
                name: WeightSpec(tuple(shape), dtype, trainable)
                for name, (shape, dtype, trainable) in config["weights"].items()
            }
            constants = {name: _unpacked(a) for name, a in config["constants"].items()}
            bound = {int(k): dict(options) for k, options in config["bound"].items()}
            return cls(nodes=nodes, constants=constants, weights=weights, bound=bound, opset=config["opset"],
                       dtype=config["dtype"], **ports)  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"graph: expected what OnnxModel.get_config gives, got something else: {error}"
            ) from error


def trained_names(nodes: Iterable[Node]) -> set[str]:
    """The values that, if they are constant floats, are weights to be trained."""
    names: set[str] = set()
    for node in reversed(list(nodes)):
        if node.op in REARRANGING and any(name in names for name in node.outputs):
            names |= set(node.inputs)
        names |= {node.inputs[k] for k in TRAINED.get(node.op, ()) if k < len(node.inputs)}
    return names - {""}


def _plain(value: Any) -> Any:
    """An attribute's value as JSON holds it."""
    if isinstance(value, np.ndarray):
        return _packed(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _packed(a: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(a.astype(a.dtype.newbyteorder("<")).tobytes())
    return {"array": a.dtype.name, "shape": list(a.shape), "data": data.decode()}


def _unpacked(value: Any) -> Any:
    if isinstance(value, Mapping) and "array" in value:
        dtype = np.dtype(value["array"]).newbyteorder("<")
        a = np.frombuffer(base64.b64decode(value["data"]), dtype).reshape(value["shape"])
        return frozen(a.astype(dtype.newbyteorder("=")))
    if isinstance(value, Mapping):
        return {k: _unpacked(v) for k, v in value.items()}
    return value


def frozen(a: Any) -> np.ndarray:
    """A constant: results that are the constant itself can't be written into."""
    a = np.asarray(a)
    if a.flags.writeable:
        a = a.copy()
        a.flags.writeable = False
    return a


class _Step(NamedTuple):
    node: Node
    function: Function
    wanted: list[bool]
    done_with: tuple[str, ...]  # what no later node needs


class Program:
    """The nodes of a graph, ready to run.

    Raises:
        NotImplementedError, ValueError: as `operators.operation`.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.floats: dict[
            str, str
        ] = {}  # a float dtype of the file -> the one to compute in, where they differ
        functions = [operation(node, self.floats) for node in graph.nodes]
        needed = {port.name for port in graph.outputs}
        steps = []
        for node, function in zip(reversed(graph.nodes), reversed(functions), strict=True):
            names = [*node.inputs, *node.outputs]
            last = tuple({name for name in names if name and name not in needed})
            steps.append(_Step(node, function, [bool(name) for name in node.outputs], last))
            needed |= set(node.inputs)
        self.steps: list[Any] = steps[::-1]

    def recurrent(self) -> dict[int, Recurrent]:
        """The recurrent nodes, by number."""
        return {k: s.function for k, s in enumerate(self.steps) if isinstance(s.function, Recurrent)}

    def run(self, values: dict[str, Any]) -> list[Any]:
        """The outputs, for the values of inputs, weights and constants by name. `values` is used up."""
        for step in self.steps:
            run_node(step.node, step.function, step.wanted, values)
            for name in step.done_with:
                values.pop(name, None)
        missing = [port.name for port in self.graph.outputs if port.name not in values]
        if missing:
            raise ValueError(f"outputs: no node gives {', '.join(missing)}")
        return [values[port.name] for port in self.graph.outputs]


def run_node(node: Node, function: Function, wanted: Sequence[bool], values: dict[str, Any]) -> None:
    """Compute a node's outputs from the values known so far, and put them there too. "" is what is missing."""
    if isinstance(function, Recurrent):
        held = WEIGHTS if function.layers else ()  # layers have them
        names = ["" if w in held else n for w, n in zip(function.inputs, node.inputs, strict=False)]
        found: Any = function(*(values[name] if name else None for name in names), outputs=wanted)
    else:
        found = function(*(values[name] if name else None for name in node.inputs))
    if not isinstance(found, tuple):
        found = (found,)
    for name, value in zip(node.outputs, found, strict=False):
        if name:
            values[name] = as_value(value)


def as_value(value: Any) -> Any:
    """Floats as Tensors, all else as arrays."""
    if isinstance(value, Tensor):
        return value if value.dtype.kind == "f" else value.data
    value = value if hasattr(value, "dtype") and hasattr(value, "ndim") else np.asarray(value)
    return Tensor(value) if value.dtype.kind == "f" else np.asarray(value)


assert set(TRAINED) <= set(OPERATORS) and set(OPERATORS) >= REARRANGING
