"""`OnnxModel`: a model whose layers are the nodes of an ONNX graph.

What `numlstm.io.load_onnx` gives, what `numlstm.load` makes of it again from a native file (the graph is kept there, so
neither the ONNX file nor the onnx package is needed), and what `Backend` runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from numlstm.autograd import Tensor, Variable
from numlstm.io.onnx.graph import Graph, Port, Program
from numlstm.io.onnx.recurrent import Recurrent as RecurrentNode
from numlstm.layers.base import Layer, Shape, mark_built, registry
from numlstm.models import Model

__all__ = ["OnnxModel"]


class _Weights(Layer):
    """The weights of one node, or of one that other nodes share; a subclass a kind of node gives summaries its name."""

    def __init__(self, variables: Sequence[Variable], name: str, dtype: str) -> None:
        super().__init__(name=name, dtype=dtype)
        self._variables = list(variables)
        mark_built(self, (None,))


@registry.register()
class OnnxModel(Model):
    """A model made of an ONNX graph; `nl.io.load_onnx` makes it. Predicts, trains, and is saved in the native format.

    It is called on the graph's inputs: one array, or several in a list or in a dict by name; it gives a tensor, or a list
    of them in the order of `output_names`. Free sizes are free; fixed ones are held to. `fit` and `predict` cut
    arrays along their first axis, which should therefore be the batch's. An LSTM, GRU or RNN node that has its weights to
    itself becomes a layer of that kind (two, if it is bidirectional); the weights of other nodes keep their names.

    Arguments:
        graph: a `Graph`, or what its `to_config` gave.

    Raises:
        ValueError: inputs that the graph does not take.
        NotImplementedError: an operator, or an option of one, that is not supported.

    >>> from numlstm.io.onnx.graph import Graph, Port
    >>> from numlstm.io.onnx.operators import Node
    >>> ports = [Port("x", "float32", ("batch", 2))], [Port("y", "float32", ("batch", 2))]
    >>> model = OnnxModel(Graph(*ports, [Node("Relu", "", ("x",), ("y",), 14, {})], {}, {}, {}, 17, "float32"))
    >>> model(np.float32([[-1, 2]])).numpy().tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, graph: Graph | Mapping[str, Any], **options: Any) -> None:
        self._graph = graph if isinstance(graph, Graph) else Graph.from_config(graph)
        super().__init__(**{"dtype": self._graph.dtype, **options})
        self._program = Program(self._graph)
        self._constants: tuple[str, dict[str, Any]] = ("", {})
        self.values: dict[str, Variable] = {
            name: Variable(np.zeros(spec.shape, spec.dtype), name=name, trainable=spec.trainable)
            for name, spec in self._graph.weights.items()
        }
        self._inside = list(self._layers())
        mark_built(self, [tuple(p.shape or ()) for p in self._graph.inputs])

    # What it is made of

    @property
    def graph(self) -> Graph:
        """The nodes, ports and constants."""
        return self._graph

    @property
    def input_names(self) -> list[str]:
        """The graph's inputs, in order."""
        return [port.name for port in self._graph.inputs]

    @property
    def output_names(self) -> list[str]:
        """The graph's outputs, in order."""
        return [port.name for port in self._graph.outputs]

    def recurrent_nodes(self) -> dict[int, RecurrentNode]:
        """The recurrent nodes by their numbers in the graph."""
        return self._program.recurrent()

    def _layers(self) -> Iterator[Layer]:
        """A layer for each recurrent node whose weights are its own, and for each other node that has weights."""
        names: set[str] = set()
        held: set[str] = set()
        recurrent = self.recurrent_nodes()
        for k, node in enumerate(self._graph.nodes):
            stem = re.sub(r"\W+", "_", node.name).strip("_") or node.op.lower()
            if k in self._graph.bound:
                options = {**self._graph.bound[k], "dtype": self.dtype}
                features = options.pop("features")
                layers = recurrent[k].make_layers(name=_unique(stem, names), **options)
                for layer in layers:
                    layer.build((None, None, features))
                yield from layers
                continue
            own = [self.values[name] for name in node.inputs if name in self.values and name not in held]
            held |= set(node.inputs)
            if own:
                yield type(f"Onnx{node.op}", (_Weights,), {})(own, _unique(stem, names), self.dtype)
        rest = [v for name, v in self.values.items() if name not in held]
        if rest:  # outputs of the graph that never change
            yield type("OnnxConstant", (_Weights,), {})(rest, _unique("constants", names), self.dtype)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers that hold weights, by their names."""
        for layer in self._inside:
            yield layer.name, layer

    def own_variables(self) -> list[Variable]:
        """None: the layers inside have them."""
        return []

    def get_config(self) -> dict[str, Any]:
        """Name and graph."""
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": self.dtype,
            "graph": self._graph.to_config(),
        }

    def prepare(self, input_shape: Any) -> None:
        """Nothing: the weights are there from the start."""

    # Running

    def call(self, inputs: Any, mask: Any = None) -> Tensor | list[Tensor]:
        """The graph's outputs for its inputs: one, several in a list, or a dict by name."""
        if mask is not None:
            raise ValueError(
                f"{self.name}: mask, lengths: a graph takes no mask; it has the inputs {', '.join(self.input_names)}"
            )
        outputs = [v if isinstance(v, Tensor) else Tensor(v) for v in self.run(self._named(inputs))]
        return outputs if len(outputs) > 1 else outputs[0]

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """The outputs (floats as Tensors, else arrays) for inputs that are known to fit."""
        floats = {} if self.dtype == self._graph.dtype else {self._graph.dtype: self.dtype}
        self._program.floats.clear()
        self._program.floats.update(floats)
        return self._program.run({**self._in_dtype(), **self.values, **values})

    def _in_dtype(self) -> dict[str, Any]:
        """The constants, in the dtype to compute in."""
        if self._constants[0] != self.dtype:
            turned = {}
            for name, a in self._graph.constants.items():
                a = a.astype(self.dtype) if a.dtype.name == self._graph.dtype else a
                turned[name] = Tensor(a) if a.dtype.kind == "f" else a
            self._constants = (self.dtype, turned)
        return self._constants[1]

    def _named(self, inputs: Any) -> dict[str, Any]:
        ports = self._graph.inputs
        if isinstance(inputs, Mapping):
            if set(inputs) != set(self.input_names):
                raise ValueError(
                    f"{self.name}: expected the inputs {', '.join(self.input_names)}, got {', '.join(inputs)}"
                )
            given = [inputs[port.name] for port in ports]
        else:
            given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(given) != len(ports):
            raise ValueError(
                f"{self.name}: expected {len(ports)} inputs ({', '.join(self.input_names)}), got {len(given)}"
            )
        sizes: dict[str, tuple[int, str]] = {}
        return {port.name: self._input(port, value, sizes) for port, value in zip(ports, given, strict=True)}

    def _input(self, port: Port, given: Tensor, sizes: dict[str, tuple[int, str]]) -> Any:
        """An input in the dtype of its port, of a shape that the port takes."""
        where = f"{self.name}: input {port.name}"
        if port.shape is not None:
            fits = len(port.shape) == given.ndim
            for n, m in zip(port.shape, given.shape, strict=False):
                if isinstance(n, str):
                    size, first = sizes.setdefault(n, (m, port.name))
                    if size != m:
                        raise ValueError(
                            f"{where}: expected {n} {size}, as in {first}, got shape {given.shape}"
                        )
                fits = fits and (not isinstance(n, int) or n == m)
            if not fits:
                raise ValueError(f"{where}: expected shape {port.spelled()}, got {given.shape}")
        dtype = self.dtype if port.dtype == self._graph.dtype else port.dtype
        if np.dtype(dtype).kind == "f":
            return given if given.dtype == dtype else given.astype(dtype)
        values = given.data
        if values.dtype.kind == "f" and not (values == np.floor(values)).all():
            raise ValueError(f"{where}: expected {dtype}, got {values.dtype} with fractions")
        return values.astype(dtype)

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: int | str = "auto", **options: Any
    ) -> Any:
        """The outputs for data: as in every model, and for several inputs a list, or a dict by name, of arrays that are cut
        along their first axis.

        Raises ValueError for data that do not fit, or options beside `batch_size` where there are several inputs.
        """
        if len(self._graph.inputs) == 1:
            return super().predict(x, batch_size, verbose, **options)
        if options:
            raise ValueError(f"{next(iter(options))}: a graph of several inputs takes batch_size alone")
        given = [x[name] for name in self.input_names] if isinstance(x, Mapping) else list(x)
        rows = {len(a) for a in given}
        if len(rows) != 1:
            raise ValueError(f"x: expected as many rows in every input, got {[len(a) for a in given]}")
        (count,), size, found = rows, batch_size or 32, []
        for start in range(0, count, size):
            out = self([np.asarray(a)[start : start + size] for a in given])
            found.append([o.numpy() for o in (out if isinstance(out, list) else [out])])
        joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        return joined if len(joined) > 1 else joined[0]

    @contextmanager
    def _running(self, chunk: int | None, data: Any = None) -> Iterator[None]:
        if chunk:
            raise ValueError("bptt_steps: the states inside a graph can't be carried from piece to piece")
        with super()._running(None, data):
            yield

    # Shapes

    def compute_output_shape(self, input_shape: Any) -> Any:
        """As the graph declares them; NotImplementedError where it does not."""
        shapes: list[Shape] = []
        for port in self._graph.outputs:
            if port.shape is None:
                raise NotImplementedError(f"{self.name}: the graph does not say the shape of {port.name}")
            shapes.append(tuple(n if isinstance(n, int) else None for n in port.shape))
        return shapes if len(shapes) > 1 else shapes[0]

    def summary(self, print_fn: Callable[[str], Any] | None = None, width: int | None = None) -> None:
        """The inputs and outputs, then the layers that hold weights."""
        for what, ports in (("Input", self._graph.inputs), ("Output", self._graph.outputs)):
            for port in ports:
                (print_fn or print)(f"{what} {port.name}: {port.dtype} {port.spelled()}")
        super().summary(print_fn, width)


def _unique(stem: str, taken: set[str]) -> str:
    name, k = stem, 1
    while name in taken:
        name, k = f"{stem}_{k}", k + 1
    taken.add(name)
    return name
