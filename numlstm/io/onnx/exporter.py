"""From a model to an ONNX file: `save_onnx`, and the `Builder` that the layers' writers use.

A model is walked layer by layer; what a layer becomes is said by its writer, in writers.py and (the recurrent ones)
writers_recurrent.py. The finished graph goes through onnx's checker, shape inference included, before it is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numlstm.io.atomic import write_bytes
from numlstm.io.onnx.importer import LARGEST, need_onnx
from numlstm.io.onnx.model import OnnxModel
from numlstm.layers.base import Layer
from numlstm.models import Model
from numlstm.quantization import is_quantized

try:
    import onnx
    from onnx import helper, numpy_helper
except ImportError:  # said when it is needed
    onnx = None

__all__ = ["Builder", "Input", "Mask", "Value", "refuse", "save_onnx", "writer"]

SUFFIX = ".onnx"
OPSET = 17


class Mask(NamedTuple):
    """Which steps count: a bool (batch, time), by name; `lengths` int32 (batch,), if it is known that they are the first
    so many, or with `turned` (behind a layer that goes backwards) the last."""

    steps: str
    lengths: str | None = None
    turned: bool = False


class Value(NamedTuple):
    """What a node gives: its name, its shape (None: free) and the mask that goes with it."""

    name: str
    shape: tuple[int | None, ...]
    mask: Mask | None = None


Writer = Callable[["Builder", Any, Any], list[Value]]
WRITERS: dict[type, Writer] = {}


def writer(*classes: type) -> Callable[[Writer], Writer]:
    """Decorator: enter the writer of some classes of layers: of a builder, a layer and its input (a list, if it takes
    several) it makes the layer's outputs."""

    def enter(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(classes, function))
        return function

    return enter


def refuse(layer: Layer, option: str, why: str) -> ValueError:
    """The error for what ONNX can't express: layer, option, reason."""
    return ValueError(f"{layer.name}: {option}: {why}, so it can't be written as ONNX")


def save_onnx(
    model: Layer,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    lengths: bool = False,
    states: bool = False,
    prefix_masks: bool = False,
) -> None:
    """Write a model, or a layer, as an ONNX graph for inference, with native LSTM, GRU and RNN nodes; whole or not at all.

    The batch and the time axis are free. The input is called "input" (or by the name of an `Input`), the first output
    "output"; a layer over several inputs has "query", "value", "key" or "input_0", "input_1", .... Stateful layers have
    their states as inputs `<layer>.initial_<state>` and outputs `<layer>.final_<state>`, (batch, units) each. Dropout and
    what else serves training alone is left out.

    Arguments:
        model: a built `Sequential`, a built layer, an `OnnxModel`, or a subclass of `nl.Model` whose `call` is made of
            layers, + - * / and indexing by numbers and slices; it is run on two samples to see what it does.
        path: where to; must end in ".onnx".
        opset: the operator set, from 17 on (LayerNormalization).
        lengths: add an input "lengths", int32 (batch,): how many leading steps of each row count, as `lengths=` of a call.
        states: give every recurrent layer its states as inputs and outputs, as stateful ones have them.
        prefix_masks: promise that the padding that `Masking` or `Embedding(mask_zero=True)` finds stands behind each
            row's steps only. ONNX' recurrent nodes know lengths, not masks, so without the promise such layers are refused
            in front of a recurrent one.

    Raises:
        ValueError: a layer or an option that ONNX can't express; it is named. A model that is not built, has int8 weights,
            computes by Python code of its own or needs more than 2 GB.
        ImportError: onnx is not installed.

    >>> import os, tempfile
    >>> model = nl.Sequential([nl.LSTM(4, input_shape=(None, 2)), nl.Dense(1)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nl.io.save_onnx(model, os.path.join(folder, "m.onnx"))
    ...     nl.io.load_onnx(os.path.join(folder, "m.onnx")).output_names
    ['output']
    """
    need_onnx()
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"path: ONNX models are saved as {SUFFIX} files, got {str(path)!r}")
    proto = to_proto(model, opset=opset, lengths=lengths, states=states, prefix_masks=prefix_masks)
    if proto.ByteSize() > LARGEST:
        raise ValueError(
            f"{model.name}: needs {proto.ByteSize()} bytes, but an ONNX file holds at most {LARGEST}"
        )
    write_bytes(path, proto.SerializeToString(deterministic=True))


def to_proto(
    model: Layer,
    *,
    opset: int = OPSET,
    lengths: bool = False,
    states: bool = False,
    prefix_masks: bool = False,
) -> Any:
    """The `onnx.ModelProto` that `save_onnx` writes. Raises as it."""
    need_onnx()
    if not isinstance(model, Layer):
        raise ValueError(f"model: expected a model or a layer, got {type(model).__name__}")
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSET <= opset <= newest:
        raise ValueError(f"opset: expected a number from {OPSET} to {newest}, got {opset!r}")
    if not model.built:
        raise ValueError(
            f"{model.name} is not built, so it has no weights: give input_shape, or call it once"
        )
    if is_quantized(model):
        raise ValueError(
            f"{model.name}: has int8 weights: write the float32 model, and quantize it where it runs"
        )
    from numlstm.io.onnx import tracing, writers  # the writers enter themselves, and need this module

    builder = Builder(model, opset, states, prefix_masks)
    if isinstance(model, OnnxModel):
        if lengths or states or prefix_masks:
            raise ValueError(
                f"{model.name}: lengths, states, prefix_masks: a graph from a file keeps its inputs as they are"
            )
        writers.write_graph(builder, model)
    else:
        own = isinstance(model, Model) and type(model) not in WRITERS  # with a call of its own
        ports = writers.inputs_of(model)
        if own:
            ids = tracing.reads_ids(model, len(ports))
            ports = [port._replace(ids=k) for port, k in zip(ports, ids, strict=True)]
        inputs = _inputs(builder, model, ports, lengths)
        x = inputs if len(inputs) > 1 else inputs[0]
        outputs = tracing.write_traced(builder, model, x, ports) if own else builder.write(model, x)
        for k, value in enumerate(outputs):
            builder.output("output" if k == 0 else f"output_{k}", value)
        for name, value in builder.states_out:
            builder.output(name, value)
    return builder.proto()


class Input(NamedTuple):
    """An input that a model has: its name, the shape that it was built for, and whether it is ids."""

    name: str
    shape: tuple[int | None, ...]
    ids: bool


def _inputs(builder: Builder, model: Layer, ports: Sequence[Input], lengths: bool) -> list[Value]:
    """The graph's inputs for what the model was built for."""
    values = []
    for name, shape, ids in ports:
        timed = len(shape) > (1 if ids else 2)  # (batch, time), (batch, time, features)
        sizes = (None, None, *shape[2:]) if timed else (None, *shape[1:])
        free = ("batch", f"{name}_time" if len(ports) > 1 else "time")
        values.append(builder.input(name, "int64" if ids else builder.dtype, sizes, free))
    if lengths:
        if len(ports) > 1 or len(values[0].shape) < 2 or values[0].shape[1] is not None:
            raise ValueError(f"lengths: {model.name} has no single input with a time axis")
        given = builder.input("lengths", "int32", (None,), ("batch",)).name
        values[0] = values[0]._replace(mask=Mask(builder.steps(values[0], given), given))
    return values


class Builder:
    """A graph in the making. Methods give names of values.

    Arguments:
        model: whose name and dtype the graph has.
        opset, states, prefix_masks: see `save_onnx`.
    """

    model: Layer
    opset: int
    states: bool
    prefix_masks: bool

    def __init__(self, model: Layer, opset: int, states: bool, prefix_masks: bool) -> None:
        self.model, self.opset, self.states, self.prefix_masks = model, opset, states, prefix_masks
        self.dtype: str = model.dtype
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.ids: set[str] = set()  # those of them that are ids
        self.outputs: list[Any] = []
        self.starts: dict[str, list[str]] = {}  # the states that a recurrent layer begins with, by its name
        self.states_out: list[tuple[str, Value]] = []  # outputs that come after all others
        self.arrays: dict[str, np.ndarray] = {}
        self._taken: set[str] = set()
        self._known: dict[Any, str] = {}

    def write(self, layer: Layer, x: Value | list[Value]) -> list[Value]:
        """The outputs of a layer."""
        if type(layer) not in WRITERS:
            known = ", ".join(sorted(cls.__name__ for cls in WRITERS))
            raise ValueError(
                f"{layer.name}: the layer {type(layer).__name__} computes by code of its own, so it can't be written as "
                f"ONNX; models are written if they are a Sequential of {known}"
            )
        return WRITERS[type(layer)](self, layer, x)

    def one(self, layer: Layer, x: Value | list[Value]) -> Value:
        """The output of a layer that has one."""
        (value,) = self.write(layer, x)
        return value

    # Names

    def name(self, wish: str) -> str:
        """The wish, or with a number if it is taken."""
        name, k = wish, 1
        while name in self._taken:
            name, k = f"{wish}_{k}", k + 1
        self._taken.add(name)
        return name

    # Parts

    def input(self, name: str, dtype: str, shape: Sequence[int | None], free: Sequence[str] = ()) -> Value:
        """An input of the graph; `free` names the free sizes of the first axes."""
        name = self.name(name)
        if dtype == "int64":
            self.ids.add(name)
        sizes = [
            (free[k] if k < len(free) else f"{name}_size_{k}") if n is None else n
            for k, n in enumerate(shape)
        ]
        self.inputs.append(helper.make_tensor_value_info(name, _element(dtype), sizes))
        return Value(name, tuple(shape))

    def output(self, name: str, value: Value) -> None:
        """Make a value an output of the graph."""
        name = self.name(name)
        self.nodes.append(helper.make_node("Identity", [value.name], [name]))
        sizes = [("batch" if k == 0 else None) if n is None else n for k, n in enumerate(value.shape)]
        self.outputs.append(helper.make_tensor_value_info(name, _element(self.dtype), sizes))

    def array(self, array: Any, name: str) -> str:
        """A weight."""
        name = self.name(name)
        self.arrays[name] = np.array(array, order="C")
        return name

    def constant(self, value: Any, dtype: str | None = None) -> str:
        """A small constant of the graph's dtype, or of another; each once."""
        a = np.asarray(value, dtype or self.dtype)
        key = (a.dtype.name, a.shape, a.tobytes())
        if key not in self._known:
            self._known[key] = self.array(a, "constant")
        return self._known[key]

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self.nodes_of(op, inputs, 1, name=name, **attributes)[0]

    def nodes_of(
        self, op: str, inputs: Sequence[str], outputs: int, *, name: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        name = self.name(name or op)
        found = [self.name(f"{name}:{k}" if outputs > 1 else f"{name}:") for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), found, name=name, **attributes))
        return found

    # Phrases

    def transpose(self, x: str, *perm: int) -> str:
        """The axes in another order."""
        return self.node("Transpose", x, perm=list(perm))

    def reshape(self, x: str, *sizes: int) -> str:
        """Another shape; 0 keeps a size, -1 is what is left."""
        return self.node("Reshape", x, self.constant(sizes, "int64"))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """New axes of length 1."""
        return self.node("Unsqueeze", x, self.constant(axes, "int64"))

    def squeeze(self, x: str, *axes: int) -> str:
        """Without these axes."""
        return self.node("Squeeze", x, self.constant(axes, "int64"))

    def slice(self, x: str, start: int, end: int, axis: int = 0, step: int = 1) -> str:
        """A part along an axis."""
        return self.node("Slice", x, *(self.constant([v], "int64") for v in (start, end, axis, step)))

    def flip(self, x: str, axis: int) -> str:
        """The other way round along an axis."""
        return self.slice(x, -1, -(2**63) + 1, axis, -1)

    def cast(self, x: str, dtype: str | None = None) -> str:
        """To another element type."""
        return self.node("Cast", x, to=_element(dtype or self.dtype))

    def reduce(self, op: str, x: str, axis: int, keepdims: bool) -> str:
        """A reduction along an axis, which is an attribute or an input."""
        if op == "ReduceSum" or self.opset >= 18:
            return self.node(op, x, self.constant([axis], "int64"), keepdims=int(keepdims))
        return self.node(op, x, axes=[axis], keepdims=int(keepdims))

    def size(self, x: str, axis: int) -> str:
        """The length of an axis, int64 ()."""
        return self.node("Gather", self.node("Shape", x), self.constant(axis, "int64"), axis=0)

    def count(self, x: str, axis: int = 1) -> str:
        """0, 1, ... up to the length of an axis, int64."""
        return self.node("Range", self.constant(0, "int64"), self.size(x, axis), self.constant(1, "int64"))

    def steps(self, x: Value, lengths: str) -> str:
        """Bool (batch, time): the first so many of x's steps."""
        return self.node(
            "Less", self.unsqueeze(self.count(x.name), 0), self.unsqueeze(self.cast(lengths, "int64"), 1)
        )

    def lengths_of(self, mask: Mask, layer: Layer) -> str:
        """How many steps count, int32 (batch,), for a node that knows no masks. Raises ValueError where they need not be
        the first."""
        if mask.lengths is not None:
            return mask.lengths
        if not self.prefix_masks:
            raise refuse(
                layer, "mask", "ONNX' recurrent nodes take lengths, while a mask may leave out any step (if padding stands "
                "behind each row's steps only, say prefix_masks=True)"
            )  # fmt: skip
        counted = self.reduce("ReduceSum", self.cast(mask.steps, "int64"), 1, False)
        return self.cast(counted, "int32")

    def proto(self) -> Any:
        """The checked model."""
        from numlstm import __version__

        graph = helper.make_graph(
            self.nodes,
            self.model.name,
            self.inputs,
            self.outputs,
            [numpy_helper.from_array(a, name) for name, a in self.arrays.items()],
        )
        imports = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=helper.find_min_ir_version_for(imports),
            producer_name="numlstm",
            producer_version=__version__,
        )
        onnx.checker.check_model(proto, full_check=True)
        return proto


def _element(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
