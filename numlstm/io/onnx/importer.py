"""From an ONNX file to a model: `load_onnx`, and `read_graph`, which `Backend` uses too.

onnx itself does what it can: its checker looks at the model, its shape inference says types and sizes, its inliner
replaces functions (those of the file, and operators whose text is a function of others) by their nodes. What remains is
decided here: which constants are weights, which nodes are needed, which recurrent nodes become layers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from numlstm.io.onnx.graph import Graph, Port, WeightSpec, frozen, trained_names
from numlstm.io.onnx.model import OnnxModel
from numlstm.io.onnx.operators import DTYPES, NEWEST, OPERATORS, RECURRENT_VERSIONS, Node
from numlstm.io.onnx.recurrent import GATES, WEIGHTS, Recurrent
from numlstm.layers.base import blank_weights

try:
    import onnx
    import onnx.external_data_helper
    import onnx.inliner
except ImportError:  # said when it is needed
    onnx = None

__all__ = ["load_onnx", "need_onnx", "read_graph", "read_node"]

LARGE = 1024  # constants with more elements are kept with the weights, though they are not trained
OLDEST = 7
LARGEST = 2**31 - 1  # bytes that a protobuf message can have


def need_onnx() -> None:
    """Raises ImportError where the onnx package is missing."""
    if onnx is None:
        raise ImportError("numlstm.io.onnx: the onnx package is not installed: pip install numlstm[onnx]")


def load_onnx(path: Any, *, outputs: Sequence[str] | None = None) -> OnnxModel:
    """A model from an ONNX file, which predicts and can be trained; see `OnnxModel`.

    Float constants at the weights' places of their operators are weights to be trained (bias and gain included; so are
    tables that are added, such as positions). Dropout is left out. Operator sets from 7 on; float32 and float64.

    Arguments:
        path: a file, its bytes, or an `onnx.ModelProto`; up to 2 GB. Data in files beside it is read from within its
            folder only.
        outputs: the graph's outputs (or other values, by name) that the model gives; by default the graph's. What they do
            not need is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ONNX model, or one that onnx's checker refuses; data outside the file's folder; an unknown output.
        NotImplementedError: an operator, an option of one or a type that is not supported; node and option are named.
        ImportError: onnx is not installed.

    >>> import os, tempfile
    >>> model = nl.Sequential([nl.LSTM(4, input_shape=(None, 2)), nl.Dense(1)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "m.onnx")
    ...     nl.io.save_onnx(model, path)
    ...     again = nl.io.load_onnx(path)
    >>> x = np.ones((3, 5, 2), np.float32)
    >>> bool(np.allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6))
    True
    """
    need_onnx()
    return model_of(*read_graph(_read(path), outputs=outputs))


def model_of(graph: Graph, arrays: Mapping[str, np.ndarray]) -> OnnxModel:
    """The model of a graph, with its weights."""
    with blank_weights():
        model = OnnxModel(graph)
    for name, variable in model.values.items():
        variable.assign(arrays[name])
    for k, node in model.recurrent_nodes().items():
        if node.layers:
            given = dict(zip(node.inputs, graph.nodes[k].inputs, strict=False))
            node.fill(*(arrays[given[w]] if given.get(w) else None for w in WEIGHTS))
    return model


def _read(source: Any) -> Any:
    """The ModelProto of a path, bytes or itself, its external data loaded."""
    folder = None
    if isinstance(source, onnx.ModelProto):
        model, name = source, "model"
    else:
        try:
            if isinstance(source, (bytes, bytearray, memoryview)):
                name, content = "model", bytes(source)
            else:
                name, content = os.fspath(source), Path(source).read_bytes()
                folder = str(Path(source).resolve().parent)
            model = onnx.load_model_from_string(content)
        except TypeError as error:
            raise ValueError(
                f"path: expected a path, bytes or an onnx.ModelProto, got {type(source).__name__}"
            ) from error
        except Exception as error:
            if type(error).__name__ != "DecodeError":  # of protobuf, which onnx brings
                raise
            raise ValueError(f"{name}: not an ONNX model, or damaged: {error}") from error
    if folder is not None:
        try:
            onnx.external_data_helper.load_external_data_for_model(model, folder)
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise ValueError(f"{name}: its data in other files can't be read: {error}") from error
    return model


def read_graph(
    model: Any, *, outputs: Sequence[str] | None = None, replaceable: bool = False
) -> tuple[Graph, dict[str, np.ndarray]]:
    """A checked `onnx.ModelProto` as a `Graph`, and the arrays of its weights by name.

    Arguments:
        outputs: see `load_onnx`.
        replaceable: inputs that have an initializer stay inputs; else they are constants.

    Raises:
        NotImplementedError, ValueError: as `load_onnx`.
    """
    if not isinstance(model, onnx.ModelProto):
        raise ValueError(f"model: expected an onnx.ModelProto, got {type(model).__name__}")
    held = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in (*model.graph.initializer, *held):
        _check_here(tensor)
    if model.ByteSize() > LARGEST:
        raise ValueError(f"model: needs {model.ByteSize()} bytes, but onnx can check {LARGEST} at most")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"model: {error}") from error
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    _check_domains(model)
    model = onnx.shape_inference.infer_shapes(_inlined(model, opset), data_prop=True)
    if model.graph.sparse_initializer:
        raise NotImplementedError("sparse initializers are not supported")
    return _Reading(model.graph, opset, replaceable).graph(outputs)


def _check_domains(model: Any) -> None:
    own = {(f.domain, f.name) for f in model.functions}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in own:
            raise NotImplementedError(
                f"the operator {node.domain}.{node.op_type} is not supported (the node {node.name!r}), only those of ONNX "
                f"itself are"
            )


def _inlined(model: Any, opset: int) -> Any:
    """Functions, and operators that are functions of others, replaced by their nodes where they are not known here."""
    unknown = {n.op_type for n in model.graph.node if n.op_type not in OPERATORS}
    schemas = [onnx.defs.get_schema(op, opset) for op in unknown if onnx.defs.has(op)]
    if not model.functions and not any(s.has_function or s.has_context_dependent_function for s in schemas):
        return model
    typed = onnx.shape_inference.infer_shapes(model)  # a function's body may depend on types
    return onnx.inliner.inline_selected_functions(
        typed, [("", op) for op in OPERATORS], exclude=True, inline_schema_functions=True
    )


class _Reading:
    """A graph on its way."""

    def __init__(self, graph: Any, opset: int, replaceable: bool) -> None:
        self.opset = opset
        self.types = {v.name: v for v in [*graph.input, *graph.output, *graph.value_info]}
        self.kinds = {name: v.type.tensor_type.elem_type for name, v in self.types.items()}
        self.kinds |= {t.name: t.data_type for t in graph.initializer}
        inputs = [v.name for v in graph.input]
        self.constants = {
            t.name: t for t in graph.initializer if not (replaceable and t.name in inputs)
        }  # tensors of the file, then arrays
        self.defaults = {t.name: t for t in graph.initializer if replaceable and t.name in inputs}
        self.inputs = [name for name in inputs if name not in self.constants]
        self.outputs = [v.name for v in graph.output]
        self.nodes = self._nodes(graph)

    def _nodes(self, graph: Any) -> list[Node]:
        """The nodes, constants and other names for constants resolved."""
        nodes, names = [], {}
        for proto in graph.node:
            node = read_node(proto, self.opset)
            node = node._replace(inputs=tuple(names.get(name, name) for name in node.inputs))
            for name in node.inputs:
                self._check_kind(node, name)
            if node.op == "Constant":
                self.constants[node.outputs[0]] = node.attributes["value"]
            elif node.op == "Identity" and node.inputs[0] in self.constants:
                names[node.outputs[0]] = node.inputs[0]
            else:
                nodes.append(node)
                continue
            if node.outputs[0] in self.outputs and node.op == "Identity":
                nodes.append(node)
        return nodes

    def _check_kind(self, node: Node, name: str) -> None:
        kind = self.kinds.get(name, 0)
        if kind and kind not in DTYPES:
            supported = "FLOAT and DOUBLE are" if node.op in GATES else f"{', '.join(DTYPES.values())} are"
            where = name
            if node.op in GATES:
                where = Recurrent(node.op).inputs[node.inputs.index(name)]
            raise NotImplementedError(
                f"{node.label}: {where}: {onnx.TensorProto.DataType.Name(kind)} is not supported, {supported}"
            )

    def graph(self, outputs: Sequence[str] | None) -> tuple[Graph, dict[str, np.ndarray]]:
        """The graph of what the outputs need."""
        wanted = self.outputs if outputs is None else list(outputs)
        made = {name for node in self.nodes for name in node.outputs} | set(self.inputs) | set(self.constants)
        for name in wanted:
            if name not in made:
                raise ValueError(
                    f"outputs: expected names of values in the graph, such as {', '.join(self.outputs)}, got {name!r}"
                )
        kept, needed = [], set(wanted)
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                kept.append(node)
                needed |= set(node.inputs)
        nodes = kept[::-1]
        arrays = {name: _array(t) for name, t in self.constants.items() if name in needed}
        floats = Counter[str]()
        for a in [*arrays.values(), *(np.zeros(1, DTYPES.get(self.kinds[i], "bool")) for i in self.inputs)]:
            floats[a.dtype.name] += a.size
        dtype = "float64" if floats["float64"] > floats["float32"] else "float32"
        bound = self._bound(nodes, arrays, wanted, dtype)
        own = {nodes[k].inputs[j] for k in bound for j in (1, 2, 3, 7) if j < len(nodes[k].inputs)}
        trained = trained_names(nodes)
        weights, constants = {}, {}
        for name, a in arrays.items():
            train = name in trained and a.ndim > 0 and bool(np.isfinite(a).all())
            if name in own:
                continue
            if a.dtype.kind == "f" and (train or a.size > LARGE):
                weights[name] = WeightSpec(a.shape, a.dtype.name, train)
            else:
                constants[name] = a
        inputs = [self._port(name) for name in self.inputs]
        ports = [self._port(name) for name in wanted]
        graph = Graph(inputs, ports, nodes, constants, weights, bound, self.opset, dtype)
        return graph, arrays

    def _bound(
        self, nodes: Sequence[Node], arrays: Mapping[str, np.ndarray], wanted: Sequence[str], dtype: str
    ) -> dict[int, dict[str, Any]]:
        """The recurrent nodes whose weights are constants that nothing else uses: they become layers."""
        uses = Counter(name for node in nodes for name in node.inputs) + Counter(wanted)
        found = {}
        for k, node in enumerate(nodes):
            if node.op not in GATES:
                continue
            given = {
                w: node.inputs[j] for j, w in zip((1, 2, 3, 7), WEIGHTS, strict=True) if node.has_input(j)
            }
            if all(n in arrays and uses[n] == 1 and arrays[n].dtype == dtype for n in given.values()):
                weights = {w: arrays[n] for w, n in given.items()}
                Recurrent(node.op, node.attributes, node.label).check(**weights)
                found[k] = {
                    "units": weights["R"].shape[2],
                    "features": weights["W"].shape[2],
                    "use_bias": "B" in weights,
                    "peephole": "P" in weights,
                }
        return found

    def _port(self, name: str) -> Port:
        """What the file says of an input or output."""
        value = self.types.get(name)
        if value is None:
            kind, shape = self.kinds.get(name, 1), None
        elif value.type.WhichOneof("value") != "tensor_type":
            raise NotImplementedError(f"the input {name} is not a tensor; only tensors are supported")
        else:
            tensor = value.type.tensor_type
            kind = tensor.elem_type
            shape = tuple(_size(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
        if kind not in DTYPES:
            raise NotImplementedError(
                f"{name}: {onnx.TensorProto.DataType.Name(kind)} is not supported, {', '.join(DTYPES.values())} are"
            )
        return Port(name, DTYPES[kind], shape)


def _size(dimension: Any) -> int | str | None:
    kind = dimension.WhichOneof("value")
    return getattr(dimension, kind) if kind else None


def _check_here(tensor: Any) -> None:
    """Raises ValueError for data that are elsewhere: without a path there is no folder that they may come from."""
    if onnx.external_data_helper.uses_external_data(tensor):
        raise ValueError(f"model: the data of {tensor.name} is in another file: give the model's path")


def _array(tensor: Any) -> np.ndarray:
    return frozen(tensor if isinstance(tensor, np.ndarray) else onnx.numpy_helper.to_array(tensor))


# Nodes

_CONSTANTS = {
    "value": lambda v: v,
    "value_float": lambda v: np.asarray(v, np.float32),
    "value_floats": lambda v: np.asarray(v, np.float32),
    "value_int": lambda v: np.asarray(v, np.int64),
    "value_ints": lambda v: np.asarray(v, np.int64),
}


def read_node(proto: Any, opset: int) -> Node:
    """A node as plain data.

    Raises:
        NotImplementedError: an operator, a version or an attribute that is not supported; it is named.
    """
    op = proto.op_type
    node = Node(op, proto.name, tuple(proto.input), tuple(proto.output), 0, {})
    if proto.domain not in ("", "ai.onnx"):
        raise NotImplementedError(
            f"the operator {proto.domain}.{op} is not supported: {', '.join(sorted(OPERATORS))} are"
        )
    if op in OPERATORS:
        version = onnx.defs.get_schema(op, opset).since_version
        if op in GATES and version not in RECURRENT_VERSIONS:
            raise NotImplementedError(
                f"the operator {op} is supported in its versions {', '.join(map(str, RECURRENT_VERSIONS))}; operator set "
                f"{opset} has version {version}"
            )
        if version > NEWEST or version != onnx.defs.get_schema(op, max(opset, OLDEST)).since_version:
            raise NotImplementedError(
                f"the operator {op} is supported in operator sets {OLDEST} to {NEWEST}, got its version {version} of {opset}"
            )
        node = node._replace(version=version)
    attributes = {a.name: _attribute(node, a) for a in proto.attribute}
    if op == "Constant":
        ((name, value),) = attributes.items()
        if name not in _CONSTANTS:
            raise node.refuse(f"the attribute {name} is not supported: {', '.join(_CONSTANTS)} are")
        attributes = {"value": frozen(_CONSTANTS[name](value))}
    return node._replace(attributes=attributes)


def _attribute(node: Node, attribute: Any) -> Any:
    """An attribute's value as a number, string, list of them, or array."""
    value = onnx.helper.get_attribute_value(attribute)
    decoded = lambda v: v.decode() if isinstance(v, bytes) else v
    if isinstance(value, onnx.TensorProto):
        if value.data_type not in DTYPES:
            raise node.refuse(
                f"the attribute {attribute.name}: {onnx.TensorProto.DataType.Name(value.data_type)} is not supported"
            )
        _check_here(value)
        return _array(value)
    if isinstance(value, (onnx.GraphProto, onnx.SparseTensorProto, onnx.TypeProto)):
        if node.op in OPERATORS:
            raise node.refuse(f"the attribute {attribute.name} is not supported")
        return None  # the operator is refused by its name
    return [decoded(v) for v in value] if not isinstance(value, (bytes, str, int, float)) else decoded(value)
