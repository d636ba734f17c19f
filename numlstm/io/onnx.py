"""ONNX: the operators LSTM, GRU and RNN on this library's kernels, behind the interface of `onnx.backend`.

    import onnx
    from numlstm.io.onnx import Backend

    model = Backend.prepare(onnx.load("model.onnx"))
    (y, last) = model.run([x])

Two tables say how the operators' conventions map to the cells here: `GATES` for the order of weights, `ACTIVATIONS` for
the names of functions and the defaults of their parameters. `Recurrent` is one node; `OPERATORS` lists what a graph may
be made of. The texts are those of https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html.

What those leave open is decided so: the output Y of a step beyond a row's length is zero; a row of length 0 ends in its
initial state; a value of `activation_alpha` or `activation_beta` goes to the next activation that has such a parameter,
as in ONNX Runtime; ThresholdedRelu is 0 at its threshold, as in the operator of that name. Importing this module needs
no onnx; using `Backend` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from numlstm import backend as backends
from numlstm import ops
from numlstm.backend import cuda
from numlstm.kernels import cells
from numlstm.kernels.derive import Cell

try:
    import onnx
    from onnx.backend.base import Backend as _Base
    from onnx.backend.base import BackendRep as _BaseRep
    from onnx.backend.base import namedtupledict
except ImportError:  # the tables and `Recurrent` are of use without
    onnx = None
    _Base = _BaseRep = object

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "OPERATORS",
    "PEEPHOLES",
    "Backend",
    "Prepared",
    "Recurrent",
    "activation_names",
    "gate_columns",
]

Array = np.ndarray

# The gates in the order of ONNX's rows (i o f c, z r h, and the one of RNN), by their letters here.
GATES = {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"}
PEEPHOLES = "iof"


def _float32(value: float) -> float:
    """An attribute of ONNX is a float32, and so is its default."""
    return float(np.float32(value))


# ONNX's activations: the name here, and the default of each parameter; None where ONNX has none, so that it must be
# given (Affine and ScaledTanh were experimental operators once, the one with defaults, the other without).
ACTIVATIONS: dict[str, tuple[str, dict[str, float | None]]] = {
    "Relu": ("relu", {}),
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "Affine": ("affine", {"alpha": 1.0, "beta": 0.0}),
    "LeakyRelu": ("leaky_relu", {"alpha": _float32(0.01)}),
    "ThresholdedRelu": ("thresholded_relu", {"alpha": 1.0}),
    "ScaledTanh": ("scaled_tanh", {"alpha": None, "beta": None}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": _float32(0.2), "beta": 0.5}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Softsign": ("softsign", {}),
    "Softplus": ("softplus", {}),
}
_DEFAULT_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_DIRECTIONS = {
    "forward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}  # is it run backwards?

_INPUTS = {
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}
_WEIGHTS = ("W", "R", "B", "P")
_DTYPES = ("float32", "float64")


def gate_columns(rows: Array, order: str, gates: Sequence[str]) -> Array:
    """Weights with ONNX's gate rows as the columns of a kernel here.

    Arguments:
        rows: (G * H, ...), gate after gate in ONNX's order.
        order: that order, by the letters here: a value of `GATES`.
        gates: the gates wanted, in the order of the columns; those left out are not used (a coupled gate).

    Returns (..., len(gates) * H), C-contiguous.

    >>> gate_columns(np.array([[1], [2], [3], [4]]), GATES["LSTM"], "ifgo")
    array([[1, 3, 4, 2]])
    """
    units = rows.shape[0] // len(order)
    blocks = [rows[k * units : (k + 1) * units] for k in map(order.index, gates)]
    return np.ascontiguousarray(np.concatenate(blocks).T)


def activation_names(
    names: Sequence[str], alphas: Sequence[float] = (), betas: Sequence[float] = ()
) -> tuple[str, ...]:
    """ONNX's activations and their parameters as names of activations here.

    Arguments:
        names: of `ACTIVATIONS`, in any case; all of a node, direction after direction.
        alphas, betas: the values of `activation_alpha` and `activation_beta`. Each activation that has the parameter
            takes the next, and the default when none is left. Exporters that write one value for every activation are
            understood where this comes to the same.

    Raises:
        ValueError: an unknown name; more values than activations that take them; a parameter without default is missing.

    >>> activation_names(["Tanh", "HardSigmoid", "Elu"], [0.25], [0.75])
    ('tanh', 'hard_sigmoid(alpha=0.25, beta=0.75)', 'elu(alpha=1.0)')
    """
    known = {name.lower(): entry for name, entry in ACTIVATIONS.items()}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"activations: expected names among {', '.join(ACTIVATIONS)}, got {name!r}")
    found = [known[name.lower()] for name in names]
    given: list[dict[str, float]] = [{} for _ in names]
    for parameter, values in (("alpha", alphas), ("beta", betas)):
        takers = [k for k, (_, parameters) in enumerate(found) if parameter in parameters]
        if len(values) > len(takers) and not (
            len(values) == len(names) and all(values[k] == v for k, v in zip(takers, values, strict=False))
        ):
            raise ValueError(
                f"activation_{parameter}: expected at most {len(takers)} values, one for each of the activations "
                f"{list(names)} that has {parameter}, got {list(values)}"
            )
        for k, value in zip(takers, values, strict=False):
            given[k][parameter] = float(value)
    return tuple(_named(*entry, values) for entry, values in zip(found, given, strict=True))


def _named(name: str, defaults: Mapping[str, float | None], given: Mapping[str, float]) -> str:
    values = {**defaults, **given}
    for parameter, value in values.items():
        if value is None:
            raise ValueError(
                f"activation_{parameter}: expected a value for {name}, which has no default, got none"
            )
        if not math.isfinite(value):
            raise ValueError(f"activation_{parameter}: expected finite numbers, got {value}")
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})" if values else name


class _Direction(NamedTuple):
    """One direction of a node: its cell, and its weights as `ops.recurrent` takes them."""

    cell: Cell
    kernel: Array
    recurrent_kernel: Array
    bias: Array | None
    params: tuple[Array, ...]


class Recurrent:
    """One LSTM, GRU or RNN node: versions 7, 14 and 22 of the operators.

    Arguments:
        op: "LSTM", "GRU" or "RNN".
        attributes: the node's, by name, as Python values.
        label: how messages call the node.

    Raises:
        ValueError: an attribute that is unknown or has a value that the operator does not allow; it is named.

    >>> node = Recurrent("RNN", {"direction": "reverse"})
    >>> w = np.ones((1, 1, 1), np.float32)
    >>> y, last = node(np.float32([[[1]], [[2]], [[3]]]), w, 0 * w)
    >>> y.ravel().round(3), last.ravel().round(3)
    (array([0.762, 0.964, 0.995], dtype=float32), array([0.762], dtype=float32))
    """

    def __init__(self, op: str, attributes: Mapping[str, Any] | None = None, label: str = "") -> None:
        if op not in GATES:
            raise ValueError(f"op: expected one of {', '.join(GATES)}, got {op!r}")
        self.op, self.label = op, label or op
        self.order, self.inputs = GATES[op], _INPUTS[op]
        rest = dict(attributes or {})
        self.hidden_size = rest.pop("hidden_size", None)
        self.reverse = self._choice(rest, "direction", "forward", _DIRECTIONS)
        self.batch_first = self._choice(rest, "layout", 0, {0: False, 1: True})
        self.clip = self._clip(rest.pop("clip", None))
        self.activations = self._activations(rest)
        # that of each operator alone, as the cells' own option
        self.options: dict[str, Any] = {}
        if op == "LSTM":
            coupled = self._choice(rest, "input_forget", 0, {0: False, 1: "input"})
            self.options["coupled"] = coupled
        elif op == "GRU":
            self.options["reset_after"] = bool(rest.pop("linear_before_reset", 0))
        if rest:
            raise ValueError(f"{self.label}: {sorted(rest)[0]}: expected no such attribute, got {rest}")
        self._bound: tuple[_Direction, ...] | None = None

    # Attributes

    def _choice(self, rest: dict[str, Any], name: str, default: Any, choices: Mapping[Any, Any]) -> Any:
        value = rest.pop(name, default)
        if value not in choices:
            expected = " or ".join(repr(c) for c in choices)
            raise ValueError(f"{self.label}: {name}: expected {expected}, got {value!r}")
        return choices[value]

    def _clip(self, value: float | None) -> float | None:
        if value is None or value == math.inf:
            return None
        if not value > 0:  # NaN too
            raise ValueError(f"{self.label}: clip: expected a number above 0, got {value}")
        return float(value)

    def _activations(self, rest: dict[str, Any]) -> list[tuple[str, ...]]:
        """The activations of each direction, by their names here."""
        defaults = _DEFAULT_ACTIVATIONS[self.op]
        each, directions = len(defaults), len(self.reverse)
        names = list(rest.pop("activations", defaults * directions))
        alphas, betas = (rest.pop(f"activation_{p}", ()) for p in ("alpha", "beta"))
        if self.op == "RNN" and directions == 1 and names == ["Tanh", "Tanh"]:
            names = ["Tanh"]  # the attribute's default, which has two whatever the direction
        if len(names) != each * directions:
            raise ValueError(
                f"{self.label}: activations: expected {each * directions} names, {each} for each direction, got {names}"
            )
        try:
            found = activation_names(names, alphas, betas)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None
        return [found[d * each : (d + 1) * each] for d in range(directions)]

    # Weights

    def cell(self, direction: int, *, peephole: bool = False) -> Cell:
        """The cell that a direction runs."""
        names, clip = self.activations[direction], self.clip
        if self.op == "LSTM":
            f, g, h = names
            return cells.lstm(g, f, output_activation=h, peephole=peephole, clip=clip, **self.options)
        if self.op == "GRU":
            f, g = names
            return cells.gru(g, f, clip=clip, **self.options)
        return cells.elman(names[0], clip=clip)

    def weights(
        self, W: Array, R: Array, B: Array | None = None, P: Array | None = None
    ) -> tuple[_Direction, ...]:
        """The node's weights, direction by direction, as the cells here take them.

        Arguments:
            W: (D, G * H, I); R: (D, G * H, H); B: (D, 2 * G * H), input biases before recurrent ones; P: (D, 3 * H).
                D directions, G gates in the order of `GATES`, H units, I inputs.

        Raises:
            ValueError: shapes that do not fit each other or the attributes.
        """
        D, G = len(self.reverse), len(self.order)
        if R.ndim != 3 or W.ndim != 3:
            name, came = ("R", R) if R.ndim != 3 else ("W", W)
            raise ValueError(f"{self.label}: {name}: expected 3 dimensions, got shape {came.shape}")
        H = R.shape[2]
        if self.hidden_size not in (None, H):
            raise ValueError(
                f"{self.label}: hidden_size: expected {H}, the last of R's {R.shape}, got {self.hidden_size}"
            )
        self._expect("W", W, (D, G * H, W.shape[2]))
        self._expect("R", R, (D, G * H, H))
        self._expect("B", B, (D, 2 * G * H))
        self._expect("P", P, (D, 3 * H))
        return tuple(
            self._direction(d, W[d], R[d], None if B is None else B[d], None if P is None else P[d])
            for d in range(D)
        )

    def _direction(self, d: int, W: Array, R: Array, B: Array | None, P: Array | None) -> _Direction:
        cell, H = self.cell(d, peephole=P is not None), R.shape[1]
        named: dict[str, Array] = {}
        if P is not None:
            named = {f"p_{gate}": P[k * H : (k + 1) * H] for k, gate in enumerate(PEEPHOLES)}
        bias = None
        if B is not None:
            from_input, from_state = (gate_columns(half, self.order, cell.gates) for half in np.split(B, 2))
            bias = from_input + from_state
            if "b_n" in cell.params:  # the candidate's recurrent bias, which the reset gate multiplies
                bias[-H:], named["b_n"] = from_input[-H:], from_state[-H:]
        elif "b_n" in cell.params:
            named["b_n"] = np.zeros(H, W.dtype)
        return _Direction(
            cell,
            gate_columns(W, self.order, cell.gates),
            gate_columns(R, self.order, cell.gates),
            bias,
            tuple(named[p] for p in cell.params),
        )

    def bind(self, W: Array, R: Array, B: Array | None = None, P: Array | None = None) -> None:
        """Turn weights that never change once and for all; calls then don't look at theirs."""
        self._bound = self.weights(W, R, B, P)

    # Running

    def __call__(self, *given: Array | None, outputs: Sequence[bool] = (True, True, True)) -> tuple[Any, ...]:
        """Run the node.

        Arguments:
            given: the inputs in the operator's order, None for one that is missing: X, W, R, B, sequence_lens,
                initial_h, and for an LSTM initial_c and P.
            outputs: which of Y, Y_h, Y_c are wanted; the others are None, as are those beyond the list's end.

        Returns the outputs: Y (T, D, B, H), Y_h (D, B, H), and for an LSTM Y_c (D, B, H), or with `layout` 1 the
        batch's axis first.

        Raises:
            ValueError: an input that is missing or of another dtype or shape than the operator says; it is named.
        """
        outputs = (*outputs, False, False, False)[:3]
        a = self._named_inputs(given)
        x, lengths, dtype = a["X"], a["sequence_lens"], a["X"].dtype
        if not self.batch_first:
            x = x.swapaxes(0, 1)
        B, T, I = x.shape
        if not (B and T):
            raise ValueError(
                f"{self.label}: X: expected at least one step and one sequence, got shape {a['X'].shape}"
            )
        weights = self._bound or self.weights(*(a.get(name) for name in _WEIGHTS))
        D, H = len(weights), weights[0].recurrent_kernel.shape[0]
        if weights[0].kernel.shape[0] != I:
            raise ValueError(
                f"{self.label}: X: expected {weights[0].kernel.shape[0]} features, as W has, got shape {a['X'].shape}"
            )
        mask = None
        if lengths is not None:
            self._expect("sequence_lens", lengths, (B,))
            if lengths.size and not 0 <= lengths.min() <= lengths.max() <= T:
                raise ValueError(
                    f"{self.label}: sequence_lens: expected lengths from 0 to {T}, got {lengths.tolist()}"
                )
            if (lengths < T).any():
                mask = np.arange(T) < lengths[:, None]
        states = self._states(a, (D, B, H), dtype)
        backend = backends.get_backend()
        there = lambda v: None if v is None else backend.asarray(v)
        calls = [
            {
                "cell": w.cell,
                "x": there(x),
                "kernel": there(w.kernel),
                "recurrent_kernel": there(w.recurrent_kernel),
                "bias": there(w.bias),
                "params": [there(p) for p in w.params],
                "state": [there(s[d]) for s in states],
                "mask": mask,
                "reverse": self.reverse[d],
            }
            for d, w in enumerate(weights)
        ]
        results = [ops.recurrent(**calls[0])] if D == 1 else ops.recurrent_pair(*calls)
        found = [self._outputs(results, mask, backend) if outputs[0] else None]
        for k, wanted in enumerate(outputs[1:]):
            if k < len(states):
                last = [backend.to_numpy(final[k].data) for _, final, _ in results]
                found.append(np.stack(last, axis=1 if self.batch_first else 0) if wanted else None)
        return tuple(found)

    def _named_inputs(self, given: Sequence[Array | None]) -> dict[str, Array | None]:
        """The inputs by name, None where missing, each of a dtype that the operator takes."""
        if len(given) > len(self.inputs):
            raise ValueError(f"{self.label}: expected at most {len(self.inputs)} inputs, got {len(given)}")
        a: dict[str, Any] = dict.fromkeys(self.inputs) | dict(zip(self.inputs, given, strict=False))
        for name in ("X", "W", "R"):
            if a[name] is None:
                raise ValueError(f"{self.label}: {name}: expected an array, got none")
        dtype = a["X"].dtype
        for name, v in a.items():
            expected = ("int32",) if name == "sequence_lens" else _DTYPES if name == "X" else (dtype.name,)
            if v is not None and v.dtype.name not in expected:
                raise ValueError(
                    f"{self.label}: {name}: expected {' or '.join(expected)}, got {v.dtype.name}"
                )
        if a["X"].ndim != 3:
            raise ValueError(f"{self.label}: X: expected 3 dimensions, got shape {a['X'].shape}")
        return a

    def _states(self, a: Mapping[str, Any], shape: tuple[int, int, int], dtype: Any) -> list[Array]:
        """The initial states, (D, B, H) each: h, and an LSTM's c."""
        D, B, H = shape
        states = []
        for name in ("initial_h", "initial_c")[: 2 if self.op == "LSTM" else 1]:
            state = a[name]
            if state is None:
                states.append(np.zeros(shape, dtype))
                continue
            self._expect(name, state, (B, D, H) if self.batch_first else shape)
            states.append(state.swapaxes(0, 1) if self.batch_first else state)
        return states

    def _outputs(self, results: Sequence[Any], mask: Array | None, backend: Any) -> Array:
        """Y: each direction's outputs at the place of their input, zero beyond a row's length."""
        found = []
        for (h, _, _), reverse in zip(results, self.reverse, strict=True):
            y = backend.to_numpy(h.data)  # (B, T, H), in the order they were made
            y = y[:, ::-1] if reverse else y
            y = y if mask is None else np.where(mask[:, :, None], y, y.dtype.type(0))
            found.append(y if self.batch_first else y.swapaxes(0, 1))
        return np.stack(found, axis=2 if self.batch_first else 1)

    def _expect(self, name: str, a: Array | None, shape: tuple[int, ...]) -> None:
        if a is not None and a.shape != shape:
            raise ValueError(f"{self.label}: {name}: expected shape {shape}, got {a.shape}")


# Graphs


def _attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name, as Python values."""
    decoded = lambda v: v.decode() if isinstance(v, bytes) else v
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: [decoded(p) for p in v] if isinstance(v, list) else decoded(v) for k, v in values.items()}


def _label(node: Any) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type


def _recurrent(node: Any) -> Recurrent:
    return Recurrent(node.op_type, _attributes(node), _label(node))


_CONSTANTS: dict[str, Callable[[Any], Array]] = {
    "value": lambda v: onnx.numpy_helper.to_array(v),
    "value_float": lambda v: np.asarray(v, np.float32),
    "value_floats": lambda v: np.asarray(v, np.float32),
    "value_int": lambda v: np.asarray(v, np.int64),
    "value_ints": lambda v: np.asarray(v, np.int64),
}


def _constant(node: Any) -> Callable[..., tuple[Array]]:
    ((name, value),) = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}.items()
    if name not in _CONSTANTS:
        raise NotImplementedError(
            f"{_label(node)}: the attribute {name} is not supported: {', '.join(_CONSTANTS)} are"
        )
    array = _frozen(_CONSTANTS[name](value))
    return lambda outputs: (array,)


def _identity(node: Any) -> Callable[..., tuple[Array]]:
    return lambda x, outputs: (x,)


def _frozen(a: Array) -> Array:
    """A constant: results that are the constant itself can't be written into."""
    a = np.asarray(a)
    a.flags.writeable = False
    return a


# What a graph may be made of: operator -> (the versions of its text that are followed, None for all; what makes a
# function of a node: arrays in, and a flag for each output that says whether it is wanted).
OPERATORS: dict[str, tuple[tuple[int, ...] | None, Callable[[Any], Callable[..., tuple[Any, ...]]]]] = {
    "LSTM": ((7, 14, 22), _recurrent),
    "GRU": ((7, 14, 22), _recurrent),
    "RNN": ((7, 14, 22), _recurrent),
    "Constant": (None, _constant),
    "Identity": (None, _identity),
}


def _function(node: Any, opset: int) -> Callable[..., tuple[Any, ...]]:
    """What runs a node.

    Raises:
        NotImplementedError: an operator, a version or an attribute that is not supported; it is named.
        ValueError: a bad value of an attribute.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain or node.op_type not in OPERATORS:
        name = f"{domain}.{node.op_type}" if domain else node.op_type
        raise NotImplementedError(f"the operator {name} is not supported: {', '.join(OPERATORS)} are")
    versions, make = OPERATORS[node.op_type]
    version = onnx.defs.get_schema(node.op_type, opset).since_version
    if versions is not None and version not in versions:
        raise NotImplementedError(
            f"the operator {node.op_type} is supported in its versions {', '.join(map(str, versions))}; operator set "
            f"{opset} has version {version}"
        )
    return make(node)


class _Step(NamedTuple):
    function: Callable[..., tuple[Any, ...]]
    inputs: list[str]
    outputs: list[str]

    def run(self, values: dict[str, Any]) -> None:
        """Compute the outputs from the values known so far, and put them there too. "" is what is missing."""
        given = [values[name] if name else None for name in self.inputs]
        found = self.function(*given, outputs=[bool(name) for name in self.outputs])
        values.update((name, a) for name, a in zip(self.outputs, found, strict=False) if name)


class Prepared(_BaseRep):
    """A model that is ready to run; `Backend.prepare` makes it."""

    def __init__(self, model: Any, device: str) -> None:
        self._device, graph = device, model.graph
        opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        if graph.sparse_initializer:
            raise NotImplementedError("sparse initializers are not supported")
        self._inputs = {i.name: _tensor_type(i) for i in graph.input}
        self._outputs = [o.name for o in graph.output]
        self._constants = {i.name: _frozen(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
        types = {i.name: i.data_type for i in graph.initializer} | {
            n: t.elem_type for n, t in self._inputs.items()
        }
        self._steps: list[_Step] = []
        fixed = {n: a for n, a in self._constants.items() if n not in self._inputs}
        for node in graph.node:
            step = _Step(_function(node, opset), list(node.input), list(node.output))
            if isinstance(step.function, Recurrent):
                _check_types(step, types)
                names = dict(zip(step.function.inputs, step.inputs, strict=False))
                weights = {w: names.get(w, "") for w in _WEIGHTS}
                if all(n == "" or n in fixed for n in weights.values()):
                    step.function.bind(**{w: fixed[n] if n else None for w, n in weights.items()})
            elif all(n in fixed for n in step.inputs):
                step.run(fixed)  # a constant, or another name for one
                continue
            self._steps.append(step)
        self._constants |= fixed

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
        values = {**self._constants, **self._given(inputs)}
        with _on(self._device):
            for step in self._steps:
                step.run(values)
        return namedtupledict("Outputs", self._outputs)(*(values[name] for name in self._outputs))

    def _given(self, inputs: Any) -> dict[str, Array]:
        required = [name for name in self._inputs if name not in self._constants]
        if isinstance(inputs, np.ndarray):
            inputs = [inputs]
        if not isinstance(inputs, Mapping):
            names = list(self._inputs) if len(inputs) == len(self._inputs) else required
            if len(inputs) != len(names):
                raise ValueError(
                    f"inputs: expected {len(names)} arrays ({', '.join(names)}), got {len(inputs)}"
                )
            inputs = dict(zip(names, inputs, strict=True))
        for name in required:
            if name not in inputs:
                raise ValueError(f"inputs: expected {', '.join(required)}, but {name} is missing")
        for name in inputs:
            if name not in self._inputs:
                raise ValueError(f"inputs: expected {', '.join(self._inputs)}, got {name}")
        return {name: _checked(name, a, self._inputs[name]) for name, a in inputs.items()}


def _tensor_type(value: Any) -> Any:
    """The type of a graph's input."""
    if value.type.WhichOneof("value") != "tensor_type":
        raise NotImplementedError(f"the input {value.name} is not a tensor; only tensors are supported")
    return value.type.tensor_type


def _check_types(step: _Step, types: Mapping[str, int]) -> None:
    """Half precision is refused beforehand where the graph says so."""
    for name in step.inputs:
        kind = onnx.TensorProto.DataType.Name(types[name]) if name in types else None
        if kind in ("FLOAT16", "BFLOAT16"):
            raise NotImplementedError(
                f"{step.function.label}: {name}: {kind} is not supported, FLOAT and DOUBLE are"
            )


def _checked(name: str, given: Any, type_: Any) -> Array:
    """An input as an array of the graph's type and shape."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(type_.elem_type)
    a = given if isinstance(given, np.ndarray) else np.asarray(given, dtype)
    if a.dtype != dtype:
        raise ValueError(f"inputs: {name}: expected {dtype}, got {a.dtype}")
    if type_.HasField("shape"):
        dims = [(d.dim_value if d.HasField("dim_value") else None, d.dim_param) for d in type_.shape.dim]
        if len(dims) != a.ndim or any(n not in (None, m) for (n, _), m in zip(dims, a.shape, strict=True)):
            expected = ", ".join(symbol or "?" if n is None else str(n) for n, symbol in dims)
            raise ValueError(f"inputs: {name}: expected shape ({expected}), got {a.shape}")
    return a


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
    """The interface of `onnx.backend.base.Backend`: LSTM, GRU and RNN nodes, run by the kernels here.

    Every attribute of the operators' versions 7, 14 and 22 is served, in float32 by the fused kernels and in float64 by
    NumPy (`numlstm.use_backend` chooses as ever). Graphs may also hold initializers, Constant and Identity. Install
    with `pip install numlstm[onnx]`.

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
        _need_onnx()
        _no_options(options)
        name = _device(device)
        if name is not None:
            backends.get_backend(name)
        if not isinstance(model, onnx.ModelProto):
            raise ValueError(f"model: expected an onnx.ModelProto, got {type(model).__name__}")
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ValueError(f"model: {error}") from error
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
        _need_onnx()
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
        values = {name: np.asarray(a) for name, a in zip(names, arrays, strict=True)}
        step = _Step(_function(node, opset), list(node.input), list(node.output))
        with _on(device):
            step.run(values)
        found = {name: values[name] for name in node.output if name}
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


def _need_onnx() -> None:
    if onnx is None:
        raise ImportError("numlstm.io.onnx: the onnx package is not installed: pip install numlstm[onnx]")
