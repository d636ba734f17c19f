"""The operators LSTM, GRU and RNN: how their conventions map to the cells here, and one node that runs.

Two tables say it: `GATES` for the order of weights, `ACTIVATIONS` for the names of functions and the defaults of their
parameters. `Recurrent` is one node. The texts are those of https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html
and onnx__RNN.html.

What those leave open is decided so: the output Y of a step beyond a row's length is zero; a row of length 0 ends in its
initial state; a value of `activation_alpha` or `activation_beta` goes to the next activation that has such a parameter,
as in ONNX Runtime; ThresholdedRelu is 0 at its threshold, as in the operator of that name. Needs no onnx package.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numlstm import activations, ops
from numlstm.autograd import Tensor, apply
from numlstm.io import conversion
from numlstm.io.conversion import gate_columns, gate_rows
from numlstm.kernels import cells
from numlstm.kernels.derive import Cell
from numlstm.layers import GRU, LSTM, IndRNN, SimpleRNN
from numlstm.layers.recurrent import Recurrent as RecurrentLayer

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "LAYERS",
    "PEEPHOLES",
    "WEIGHTS",
    "Recurrent",
    "activation_names",
    "gate_columns",
    "gate_rows",
    "layer_weights",
    "onnx_activations",
]

Array = np.ndarray

GATES = conversion.GATES["onnx"]
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
LAYERS: dict[type, str] = {LSTM: "LSTM", GRU: "GRU", SimpleRNN: "RNN", IndRNN: "RNN"}
_DEFAULT_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_DIRECTIONS = {
    "forward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}  # is it run backwards?

_INPUTS: dict[str, tuple[str, ...]] = {
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}
WEIGHTS = ("W", "R", "B", "P")
_DTYPES = ("float32", "float64")


def _columns(rows: Tensor, order: str, gates: Sequence[str]) -> Tensor:
    """`gate_columns` of a tensor, which a tape can follow."""
    units = rows.shape[0] // len(order)
    blocks = [rows[k * units : (k + 1) * units] for k in map(order.index, gates)]
    turned = ops.transpose(ops.concatenate(blocks, axis=0))
    return apply(np.ascontiguousarray(turned.data), (turned, lambda dy: dy))


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


def onnx_activations(names: Sequence[str]) -> tuple[list[str], list[float], list[float]]:
    """The inverse of `activation_names`: the operators' names, and every value of alpha and of beta.

    Raises:
        ValueError: an activation that the recurrent operators have not got.

    >>> onnx_activations(["tanh", "hard_sigmoid", "linear"])
    (['Tanh', 'HardSigmoid', 'Affine'], [0.16666666666666666, 1.0], [0.5, 0.0])
    """
    operators = {name: (operator, defaults) for operator, (name, defaults) in ACTIVATIONS.items()}
    found: list[str] = []
    values: dict[str, list[float]] = {"alpha": [], "beta": []}
    for name in names:
        plain, _, given = ("affine(" if name == "linear" else name).partition("(")
        if plain not in operators:
            known = ", ".join(sorted([*operators, "linear"]))
            raise ValueError(f"ONNX' recurrent operators have no {name!r}; they have {known}")
        operator, parameters = operators[plain]
        found.append(operator)
        options = activation_parameters(plain) | {
            key: float(value) for key, value in re.findall(r"(\w+)=([^,)\s]+)", given)
        }
        for parameter in parameters:
            values[parameter].append(options[parameter])
    return found, values["alpha"], values["beta"]


def activation_parameters(name: str) -> dict[str, float]:
    """What the parameters of an activation here are by default.

    >>> activation_parameters("leaky_relu")
    {'alpha': 0.2}
    """
    function = activations.get(f"{name}()")._function if name in _PARAMETRIC else activations.get(name)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name in ("alpha", "beta")}


_PARAMETRIC = frozenset(name for name, parameters in ACTIVATIONS.values() if parameters)


def layer_weights(layer: RecurrentLayer) -> dict[str, np.ndarray]:
    """The weights of a layer that is in `LAYERS` in ONNX' order: W (G * H, I), R (G * H, H), and if it has them B (2 * G *
    H) and P (3 * H). A coupled forget gate is turned into a coupled input gate by its sign.

    >>> layer = SimpleRNN(2, input_shape=(None, 3))
    >>> layer.build((None, None, 3))
    >>> {name: a.shape for name, a in layer_weights(layer).items()}
    {'W': (2, 3), 'R': (2, 2), 'B': (4,)}
    """
    op = LAYERS[type(layer)]
    H, gates = layer.units, list(layer.cell.gates)
    kernel = layer.kernel.numpy()
    recurrent = layer.recurrent_kernel.numpy()
    recurrent = np.diag(recurrent) if isinstance(layer, IndRNN) else recurrent
    bias = np.zeros((1, len(gates) * H), kernel.dtype)
    if layer.bias is not None:
        bias = layer.bias.numpy().reshape(-1, len(gates) * H)
    peepholes = {name.removeprefix("p_"): v.numpy() for name, v in layer.parameters.items()}
    if getattr(layer, "coupled", False) is True:  # f g o: with the signs of f turned round, it is i
        sign = np.where(np.arange(len(gates) * H) < H, -1, 1).astype(kernel.dtype)
        kernel, recurrent, bias = kernel * sign, recurrent * sign, bias * sign
        gates[0] = "i"
        peepholes = {
            ("i" if name == "f" else name): (-v if name == "f" else v) for name, v in peepholes.items()
        }
    order = GATES[op] if op != "RNN" else "".join(gates)
    found = {"W": gate_rows(kernel, gates, order), "R": gate_rows(recurrent, gates, order)}
    if layer.bias is not None:
        of_input = gate_rows(bias[0], gates, order)
        of_state = gate_rows(bias[1], gates, order) if len(bias) == 2 else np.zeros_like(of_input)
        found["B"] = np.concatenate([of_input, of_state])
    if peepholes:
        zeros = np.zeros(H, kernel.dtype)
        found["P"] = np.concatenate([peepholes.get(gate, zeros) for gate in PEEPHOLES])
    return found


class _Direction(NamedTuple):
    """The weights of one direction of a node, in the layout here."""

    cell: Cell
    kernel: Tensor
    recurrent_kernel: Tensor
    biases: tuple[Tensor, Tensor] | None  # of the input and of the recurrence
    peepholes: dict[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """As `ops.recurrent` takes them."""
        named, bias, H = dict(self.peepholes), None, self.recurrent_kernel.shape[0]
        split = "b_n" in self.cell.params  # the candidate's recurrent bias, which the reset gate multiplies
        zeros = Tensor(np.zeros(H, self.kernel.dtype))
        if split:
            named["b_n"] = zeros
        if self.biases is not None:
            bias, recurrent = self.biases
            if split:
                named["b_n"] = recurrent[-H:]
                recurrent = ops.concatenate([recurrent[:-H], zeros])
            bias = bias + recurrent
        return {
            "cell": self.cell,
            "kernel": self.kernel,
            "recurrent_kernel": self.recurrent_kernel,
            "bias": bias,
            "params": tuple(named[p] for p in self.cell.params),
        }


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

    op: str
    label: str
    order: str
    inputs: tuple[str, ...]

    def __init__(self, op: str, attributes: Mapping[str, Any] | None = None, label: str = "") -> None:
        if op not in GATES:
            raise ValueError(f"op: expected one of {', '.join(GATES)}, got {op!r}")
        self.op, self.label = op, label or op
        self.order, self.inputs = GATES[op], _INPUTS[op]
        rest = dict(attributes or {})
        self.hidden_size: int | None = rest.pop("hidden_size", None)
        self.reverse: Any = self._choice(rest, "direction", "forward", _DIRECTIONS)
        self.batch_first: bool = self._choice(rest, "layout", 0, {0: False, 1: True})
        self.clip: float | None = self._clip(rest.pop("clip", None))
        self.activations: list[tuple[str, ...]] = self._activations(rest)
        # that of each operator alone, as the cells' own option
        self.options: dict[str, Any] = {}
        if op == "LSTM":
            coupled = self._choice(rest, "input_forget", 0, {0: False, 1: "input"})
            self.options["coupled"] = coupled
        elif op == "GRU":
            self.options["reset_after"] = bool(rest.pop("linear_before_reset", 0))
        if rest:
            raise ValueError(f"{self.label}: {sorted(rest)[0]}: expected no such attribute, got {rest}")
        self.layers: tuple[RecurrentLayer, ...] = ()  # those that hold its weights, if they are its own

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

    def weights(self, W: Any, R: Any, B: Any = None, P: Any = None) -> tuple[_Direction, ...]:
        """The node's weights, direction by direction, as the cells here take them.

        Arguments:
            W: (D, G * H, I); R: (D, G * H, H); B: (D, 2 * G * H), input biases before recurrent ones; P: (D, 3 * H).
                D directions, G gates in the order of `GATES`, H units, I inputs; arrays, or tensors that a tape may
                follow.

        Raises:
            ValueError: shapes that do not fit each other or the attributes.
        """
        self.check(W, R, B, P)
        W, R, B, P = (None if w is None else ops.tensor(w) for w in (W, R, B, P))
        return tuple(
            self._direction(d, W[d], R[d], None if B is None else B[d], None if P is None else P[d])
            for d in range(len(self.reverse))
        )

    def check(self, W: Any, R: Any, B: Any = None, P: Any = None) -> None:
        """Raises ValueError unless the weights fit each other and the attributes."""
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

    def _direction(self, d: int, W: Tensor, R: Tensor, B: Tensor | None, P: Tensor | None) -> _Direction:
        cell, H = self.cell(d, peephole=P is not None), R.shape[1]
        turned = lambda rows: _columns(rows, self.order, cell.gates)
        peepholes = {}
        if P is not None:
            parts = {f"p_{gate}": P[k * H : (k + 1) * H] for k, gate in enumerate(PEEPHOLES)}
            peepholes = {name: parts[name] for name in cell.params if name in parts}
        biases = None
        if B is not None:
            half = len(self.order) * H
            biases = (turned(B[:half]), turned(B[half:]))
        return _Direction(cell, turned(W), turned(R), biases, peepholes)

    # Layers, which hold weights that are the node's own

    def make_layers(
        self, units: int, *, use_bias: bool, peephole: bool, dtype: str, name: str
    ) -> tuple[RecurrentLayer, ...]:
        """A recurrent layer for each direction, not built yet; the node runs them from now on."""
        made = []
        for d, reverse in enumerate(self.reverse):
            options: dict[str, Any] = {
                "use_bias": use_bias, "clip": self.clip, "dtype": dtype, "go_backwards": reverse,
                "return_sequences": True, "return_state": True, "zero_output_for_mask": True,
                "name": name if len(self.reverse) == 1 else f"{name}_{('forward', 'backward')[d]}",
            }  # fmt: skip
            names = self.activations[d]
            if self.op == "LSTM":
                f, g, h = names
                options |= {"output_activation": h, "peephole": peephole, "unit_forget_bias": False}
                made.append(LSTM(units, g, f, **options, **self.options))
            elif self.op == "GRU":
                made.append(GRU(units, names[1], names[0], **options, **self.options))
            else:
                made.append(SimpleRNN(units, names[0], **options))
        self.layers = tuple(made)
        return self.layers

    def fill(self, W: Any, R: Any, B: Any = None, P: Any = None) -> None:
        """Hand the weights over to the layers that were made for them; calls then don't look at theirs."""
        for layer, d in zip(self.layers, self.weights(W, R, B, P), strict=True):
            layer.kernel.assign(d.kernel)
            layer.recurrent_kernel.assign(d.recurrent_kernel)
            if d.biases is not None:
                apart = layer.bias.ndim == 2  # the input's and the recurrent one
                layer.bias.assign(
                    np.stack([b.data for b in d.biases]) if apart else d.biases[0] + d.biases[1]
                )
            for parameter, values in d.peepholes.items():
                layer.parameters[parameter].assign(values)

    def onnx_weights(self) -> dict[str, Array]:
        """What `fill` was given, from the layers as they are now; the two biases may be one."""
        each = [layer_weights(layer) for layer in self.layers]
        return {name: np.stack([weights[name] for weights in each]) for name in each[0]}

    # Running

    def __call__(self, *given: Any, outputs: Sequence[bool] = (True, True, True)) -> tuple[Any, ...]:
        """Run the node.

        Arguments:
            given: the inputs in the operator's order, None for one that is missing: X, W, R, B, sequence_lens,
                initial_h, and for an LSTM initial_c and P; arrays, or tensors that a tape may follow.
            outputs: which of Y, Y_h, Y_c are wanted; the others are None, as are those beyond the list's end.

        Returns the outputs, tensors if one of the inputs is: Y (T, D, B, H), Y_h (D, B, H), and for an LSTM Y_c (D, B,
        H), or with `layout` 1 the batch's axis first.

        Raises:
            ValueError: an input that is missing or of another dtype or shape than the operator says; it is named.
        """
        outputs = (*outputs, False, False, False)[:3]
        a = self._named_inputs(given)
        x, lengths = ops.tensor(a["X"]), a["sequence_lens"]
        if not self.batch_first:
            x = ops.transpose(x, (1, 0, 2))
        B, T, I = x.shape
        if not (B and T):
            raise ValueError(
                f"{self.label}: X: expected at least one step and one sequence, got shape {a['X'].shape}"
            )
        directions = None if self.layers else self.weights(*(a.get(name) for name in WEIGHTS))
        D, weights = len(self.reverse), (directions or self.layers)[0]
        if weights.kernel.shape[0] != I:
            raise ValueError(
                f"{self.label}: X: expected {weights.kernel.shape[0]} features, as W has, got shape {a['X'].shape}"
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
        states = self._states(a, (D, B, weights.recurrent_kernel.shape[0]))
        calls = []
        for d in range(D):
            state = None if states is None else [s[d] for s in states]
            if directions is None:
                calls.append(self.layers[d].question(x, state, mask))
            else:
                asked = {"x": x, "state": state, "mask": mask, "reverse": self.reverse[d]}
                calls.append(directions[d].arguments() | asked)
        results = [ops.recurrent(**calls[0])] if D == 1 else ops.recurrent_pair(*calls)
        found: list[Tensor | None] = [self._outputs(results, mask) if outputs[0] else None]
        for k, wanted in enumerate(outputs[1:]):
            if k < (2 if self.op == "LSTM" else 1):
                last = [final[k] for _, final, _ in results]
                found.append(ops.stack(last, axis=1 if self.batch_first else 0) if wanted else None)
        if any(isinstance(v, Tensor) for v in given):
            return tuple(found)
        return tuple(None if v is None else v.numpy() for v in found)

    def _named_inputs(self, given: Sequence[Any]) -> dict[str, Any]:
        """The inputs by name, None where missing, each of a dtype that the operator takes."""
        if len(given) > len(self.inputs):
            raise ValueError(f"{self.label}: expected at most {len(self.inputs)} inputs, got {len(given)}")
        a: dict[str, Any] = dict.fromkeys(self.inputs) | dict(zip(self.inputs, given, strict=False))
        for name in ("X",) if self.layers else ("X", "W", "R"):
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

    def _states(self, a: Mapping[str, Any], shape: tuple[int, int, int]) -> list[Tensor] | None:
        """The initial states, (D, B, H) each: h, and an LSTM's c; None where all are zeros."""
        D, B, H = shape
        names = ("initial_h", "initial_c")[: 2 if self.op == "LSTM" else 1]
        if all(a[name] is None for name in names):
            return None
        states = []
        for name in names:
            state = a[name]
            if state is None:
                state = np.zeros(shape, a["X"].dtype)
            else:
                self._expect(name, state, (B, D, H) if self.batch_first else shape)
                state = ops.transpose(state, (1, 0, 2)) if self.batch_first else state
            states.append(ops.tensor(state))
        return states

    def _outputs(self, results: Sequence[Any], mask: Array | None) -> Tensor:
        """Y: each direction's outputs at the place of their input, zero beyond a row's length."""
        found = []
        for (y, _, _), reverse in zip(
            results, self.reverse, strict=True
        ):  # (B, T, H), in the order they were made
            y = ops.flip(y, axis=1) if reverse else y
            y = y if mask is None else ops.where(mask[:, :, None], y, 0.0)
            found.append(y if self.batch_first else ops.transpose(y, (1, 0, 2)))
        return ops.stack(found, axis=2 if self.batch_first else 1)

    def _expect(self, name: str, a: Any, shape: tuple[int, ...]) -> None:
        if a is not None and a.shape != shape:
            raise ValueError(f"{self.label}: {name}: expected shape {shape}, got {a.shape}")
