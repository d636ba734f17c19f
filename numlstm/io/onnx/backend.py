"""The interface of `onnx.backend`: graphs, and single nodes, run by this library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm import backend as backends
from numlstm.autograd import Tensor
from numlstm.backend import cuda
from numlstm.io.onnx.graph import Port, as_value, run_node
from numlstm.io.onnx.importer import model_of, need_onnx, read_graph, read_node
from numlstm.io.onnx.operators import operation

if TYPE_CHECKING:
    import onnx
    from onnx.backend.base import Backend as _Base
    from onnx.backend.base import BackendRep as _BaseRep
    from onnx.backend.base import namedtupledict
else:
    try:
        import onnx
        from onnx.backend.base import Backend as _Base
        from onnx.backend.base import BackendRep as _BaseRep
        from onnx.backend.base import namedtupledict
    except ImportError:  # said when it is needed
        onnx = None
        _Base = _BaseRep = object

__all__ = ["Backend", "Prepared"]

Array = np.ndarray


class Prepared(_BaseRep):
    """A model that is ready to run; `Backend.prepare` makes it."""

    def __init__(self, model: Any, device: str) -> None:
        self._device = device
        graph, arrays = read_graph(model, replaceable=True)
        self.model: Any = model_of(graph, arrays)
        names = {port.name for port in graph.inputs}
        self._defaults = {
            t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in names
        }

    def run(self, inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The outputs for some inputs.

        Arguments:
            inputs: arrays in the order of the graph's inputs, without or with those that have an initializer; or a
                dict of them by name. One array may stand for a list of one.

        Returns a named tuple of the graph's outputs.

        Raises:
            ValueError: an input is missing, unknown, or of another type or shape than the graph says.
        """
        _no_options(options)
        given = self._given(inputs)
        with _on(self._device):
            found = self.model.run({name: as_value(a) for name, a in given.items()})
        return namedtupledict("Outputs", self.model.output_names)(*map(_array, found))

    def _given(self, inputs: Any) -> dict[str, Array]:
        ports = {port.name: port for port in self.model.graph.inputs}
        required = [name for name in ports if name not in self._defaults]
        if isinstance(inputs, np.ndarray):
            inputs = [inputs]
        if not isinstance(inputs, Mapping):
            names = list(ports) if len(inputs) == len(ports) else required
            if len(inputs) != len(names):
                raise ValueError(
                    f"inputs: expected {len(names)} arrays ({', '.join(names)}), got {len(inputs)}"
                )
            inputs = dict(zip(names, inputs, strict=True))
        for name in required:
            if name not in inputs:
                raise ValueError(f"inputs: expected {', '.join(required)}, but {name} is missing")
        for name in inputs:
            if name not in ports:
                raise ValueError(f"inputs: expected {', '.join(ports)}, got {name}")
        return {**self._defaults, **{name: _checked(ports[name], a) for name, a in inputs.items()}}


def _checked(port: Port, given: Any) -> Array:
    """An input as an array of the graph's type and shape."""
    a = given if isinstance(given, np.ndarray) else np.asarray(given, port.dtype)
    if a.dtype != port.dtype:
        raise ValueError(f"inputs: {port.name}: expected {port.dtype}, got {a.dtype}")
    if port.shape is not None:
        fits = len(port.shape) == a.ndim
        if not fits or any(isinstance(n, int) and n != m for n, m in zip(port.shape, a.shape, strict=True)):
            raise ValueError(f"inputs: {port.name}: expected shape {port.spelled()}, got {a.shape}")
    return a


def _array(value: Any) -> Array:
    return value.numpy() if isinstance(value, Tensor) else value


# Devices


def _device(device: str) -> str | None:
    """The backend here that an ONNX device asks for: None for "CPU", which leaves the choice among those that run on it."""
    form = re.fullmatch(r"(CPU|CUDA)(?::(\d+))?", device) if isinstance(device, str) else None
    if form is None:
        raise ValueError(f"device: expected 'CPU', 'CUDA' or 'CUDA:1', got {device!r}")
    return None if form[1] == "CPU" else f"cuda:{form[2] or 0}"


def _on(device: str) -> AbstractContextManager[Any]:
    """Run on a device; on the CPU the chosen backend stays, so that `use_backend("reference")` is heeded."""
    name = _device(device)
    if name is None and backends.get_backend().device.startswith("cuda"):
        name = "cpu"
    return backends.use_backend(name)


def _no_options(options: Mapping[str, Any]) -> None:
    # The runner of onnx's own tests hands its tolerances on to the backend.
    for name in options:
        if name not in ("rtol", "atol"):
            raise ValueError(f"{name}: expected no such option, got {options[name]!r}")


class Backend(_Base):
    """The interface of `onnx.backend.base.Backend`: graphs of the operators in `OPERATORS`, run as `OnnxModel` runs them.

    Every attribute of the recurrent operators' versions 7, 14 and 22 is served, in float32 by the fused kernels and in
    float64 by NumPy (`numlstm.use_backend` chooses as ever). Install with `pip install numlstm[onnx]`.

    >>> import onnx
    >>> from onnx import TensorProto, helper
    >>> node = helper.make_node("RNN", ["X", "W", "R"], ["", "Y_h"], hidden_size=1)
    >>> one = np.ones((1, 1, 1), np.float32)
    >>> Backend.run_node(node, [one, one, one])[0].round(3)
    array([[[0.762]]], dtype=float32)
    """

    @classmethod
    def is_compatible(cls, model: Any, device: str = "CPU", **options: Any) -> bool:
        """Whether `prepare` takes the model."""
        try:
            cls.prepare(model, device, **options)
        except (NotImplementedError, ValueError):
            return False
        return True

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **options: Any) -> Prepared:
        """A model ready to run, again and again.

        Arguments:
            model: an `onnx.ModelProto`.
            device: "CPU" for the backend that is chosen here (`numlstm.use_backend`), "CUDA" or "CUDA:1".

        Raises:
            NotImplementedError: an operator, a version of it or an attribute is not supported; it is named.
            ValueError: the model is not valid, an attribute has a bad value, or the device is unknown.
            RuntimeError: the device can't be used.
            ImportError: onnx is not installed.
        """
        need_onnx()
        _no_options(options)
        name = _device(device)
        if name is not None:
            backends.get_backend(name)
        return Prepared(model, device)

    @classmethod
    def run_model(cls, model: Any, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Any, ...]:
        """`prepare` and run once. Raises as both."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: Any,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run one node.

        Arguments:
            node: an `onnx.NodeProto`.
            inputs: arrays in the order of the node's inputs, those that have an empty name left out or None.
            device: as in `prepare`.
            outputs_info: dtype and shape of each output, which the results are held to.
            opset_version: of which operator set the node is; by default the newest that onnx knows.

        Returns a named tuple of the outputs that have a name.

        Raises:
            NotImplementedError, ValueError, RuntimeError, ImportError: as `prepare`.
        """
        need_onnx()
        opset = options.pop("opset_version", None) or onnx.defs.onnx_opset_version()
        _no_options(options)
        context = onnx.checker.C.CheckerContext()
        context.ir_version, context.opset_imports = onnx.IR_VERSION, {"": opset}
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            raise ValueError(f"node: {error}") from error
        names = [name for name in node.input if name]
        arrays = [a for a in inputs if a is not None]
        if len(arrays) != len(names):
            raise ValueError(f"inputs: expected {len(names)} arrays ({', '.join(names)}), got {len(arrays)}")
        values = {name: as_value(np.asarray(a)) for name, a in zip(names, arrays, strict=True)}
        plain = read_node(node, opset)
        with _on(device):
            run_node(plain, operation(plain, {}), [bool(name) for name in node.output], values)
        found = {name: _array(values[name]) for name in node.output if name}
        if outputs_info is not None:
            expected = [(np.dtype(dtype), tuple(shape)) for dtype, shape in outputs_info]
            came = [(a.dtype, a.shape) for a in found.values()]
            if came != expected:
                raise ValueError(f"outputs_info: expected what the node gives, {came}, got {expected}")
        return namedtupledict("Outputs", list(found))(*found.values())

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether `prepare` takes the device: "CPU" always, "CUDA" where the CUDA backend is usable."""
        try:
            name = _device(device)
        except ValueError:
            return False
        return name is None or not cuda.unavailable(int(name.partition(":")[2]))
