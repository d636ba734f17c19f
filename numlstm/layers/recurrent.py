"""The recurrent layers: LSTM, GRU, SimpleRNN, and RNN for a cell of one's own.

All are one class, `Recurrent`, around one operation, `ops.recurrent`, which runs a cell's compiled equations
over a whole sequence; a new layer is a cell and its constructor. Inputs are (batch, time, features). Weights,
in Keras' layout: `kernel (features, gates * units)`, `recurrent_kernel (units, gates * units)`, `bias (gates
* units)`, then the cell's per-unit parameters. Gate order: LSTM i f g o (f g o when coupled), GRU r z n. A
masked step keeps every state, so its output is a repeat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numlstm import activations, constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable
from numlstm.kernels import cells, derive
from numlstm.kernels.derive import Cell
from numlstm.layers.base import Layer, Shape, fraction, positive, registry
from numlstm.registry import Registry

cell_registry: Registry[Cell] = Registry("cell")


class Recurrent(Layer):
    """What all recurrent layers share. Not used by itself.

    Arguments:
        units: size of the output and of each state.
        use_bias: whether there is a bias.
        kernel_initializer, recurrent_initializer, bias_initializer: see `numlstm.initializers`.
        kernel_regularizer, recurrent_regularizer, bias_regularizer, activity_regularizer: see
            `numlstm.regularizers`.
        kernel_constraint, recurrent_constraint, bias_constraint: see `numlstm.constraints`.
        dropout: fraction of the inputs dropped in training; one mask for all steps of a row, as in Keras.
        recurrent_dropout: fraction of the outputs dropped, in training, on their way into the next step; also
            one mask for all steps of a row.
        zoneout: how likely a unit is to keep its old state instead of the new one, drawn for each step, in
            training; otherwise that share of the old state is mixed in (Krueger et al. 2017). One rate for all
            states, or a list with one for each.
        return_sequences: the outputs of all steps (batch, time, units) in place of the last (batch, units).
        return_state: a list of the output and every last state (batch, units).
        go_backwards: read the time axis from its end; outputs (and their mask) come in the order of
            processing.
        stateful: start each batch from the last states of the one before; `reset_states` forgets them.
    """

    input_ndim = 3
    input_axes = "(batch, time, features)"
    cell: Cell
    return_cell_sequence = False  # an option of the LSTM, whose second state is of interest

    def __init__(
        self,
        units: int,
        *,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.units = positive("units", units)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.recurrent_initializer = initializers.get(recurrent_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.recurrent_regularizer = regularizers.get(recurrent_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.activity_regularizer = regularizers.get(activity_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.recurrent_constraint = constraints.get(recurrent_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.dropout = fraction("dropout", dropout)
        self.recurrent_dropout = fraction("recurrent_dropout", recurrent_dropout)
        self.zoneout: float | tuple[float, ...] = (
            tuple(fraction("zoneout", rate) for rate in zoneout)
            if isinstance(zoneout, (list, tuple))
            else fraction("zoneout", zoneout)
        )
        self.return_sequences = bool(return_sequences)
        self.return_state = bool(return_state)
        self.go_backwards = bool(go_backwards)
        self.stateful = bool(stateful)
        self.carry = (
            False  # set by training with bptt_steps: the states go on from one piece of a batch to the next
        )
        self.states: tuple[np.ndarray, ...] | None = (
            None  # kept when stateful or carry, one (batch, units) each
        )

    def use_cell(self, cell: Cell) -> None:
        """Run this cell. Raises ValueError when `zoneout` is a list, but not of one rate for each state."""
        if isinstance(self.zoneout, tuple) and len(self.zoneout) != len(cell.state):
            raise ValueError(
                f"zoneout: expected one rate for all states, or a list of {len(cell.state)} "
                f"({', '.join(cell.state)}), got {len(self.zoneout)}"
            )
        self.cell = cell

    # Weights

    def build(self, input_shape: Shape) -> None:
        """Make the weights for inputs (batch, time, features)."""
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                f"{self.name}: expected inputs of rank 3, (batch, time, features), with a known number of "
                f"features, got shape {tuple(input_shape)}{self.rank_hint(input_shape)}"
            )
        width = len(self.cell.gates) * self.units
        self.kernel = self.add_weight(
            "kernel",
            (input_shape[-1], width),
            self.kernel_initializer,
            self.kernel_regularizer,
            self.kernel_constraint,
        )
        self.recurrent_kernel = self.add_weight(
            "recurrent_kernel",
            (self.units, width),
            self.recurrent_initializer,
            self.recurrent_regularizer,
            self.recurrent_constraint,
        )
        self.bias = self.build_bias(width) if self.use_bias else None
        self.parameters = self.build_parameters()

    def build_bias(self, width: int) -> Variable:
        """The bias, `(width,)` unless the layer says otherwise."""
        return self._bias((width,), self.bias_initializer)

    def build_parameters(self) -> tuple[Variable, ...]:
        """Weights for the cell's per-unit parameters, one (units,) each."""
        return ()

    def _per_unit(self, initializer: Any) -> tuple[Variable, ...]:
        """One weight for each of the cell's parameters, of its name."""
        return tuple(self.add_weight(name, (self.units,), initializer) for name in self.cell.params)

    def _bias(self, shape: tuple[int, ...], initializer: Any) -> Variable:
        return self.add_weight("bias", shape, initializer, self.bias_regularizer, self.bias_constraint)

    def cell_weights(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The bias and the per-unit parameters as the cell's equations want them."""
        return self.bias, self.parameters

    # Running

    def call(
        self, inputs: Tensor, initial_state: Any = None, mask: Any = None, training: bool = False
    ) -> Tensor | list[Tensor]:
        """Run over a batch of sequences.

        Arguments:
            inputs: (batch, time, features).
            initial_state: one (batch, units) for each state, in a list; by default zeros, or the kept states.
            mask: bool (batch, time): where it is False the states stay as they are.
            training: whether dropout is applied.

        Returns the output, or with `return_state` a list: the output, then the last states.
        """
        state = self.start_states(inputs.shape[0], initial_state)
        if training and self.dropout:
            inputs = ops.dropout(inputs, self.dropout, shape=(inputs.shape[0], 1, inputs.shape[2]))
        outputs, final, others = self.run(inputs, state, mask, training)
        if self.stateful or self.carry:
            self.states = tuple(
                np.array(f.numpy()) for f in final
            )  # copies: free of the tape and of larger arrays
        result = [outputs if self.return_sequences else final[0]]
        if self.return_state:
            result += final
        if self.return_cell_sequence and others:
            result.append(others[0])
        return result if len(result) > 1 else result[0]

    def run(
        self, inputs: Tensor, state: Any, mask: Any, training: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """The bare sequence: every output, the last states, the other states' sequences if asked for."""
        batch, time, _ = inputs.shape
        recurrent_mask = None
        if training and self.recurrent_dropout:
            recurrent_mask = self._thinning((batch, 1, self.units), self.recurrent_dropout)
        bias, parameters = self.cell_weights()
        return ops.recurrent(
            self.running_cell(),
            inputs,
            self.kernel,
            self.recurrent_kernel,
            bias,
            parameters,
            state=state,
            mask=mask,
            reverse=self.go_backwards,
            training=self.return_cell_sequence,
            aux=tuple(self._zoneout_mask(rate, batch, time, training) for rate in self._zoneout_rates()),
            recurrent_mask=recurrent_mask,
        )

    def running_cell(self) -> Cell:
        """The cell that is run: the layer's own, in zoneout if there is any."""
        return cells.zoneout(self.cell) if self._zoneout_rates() else self.cell

    def _zoneout_rates(self) -> tuple[float, ...]:
        """One for each state; empty when no state has zoneout."""
        rates = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * len(self.cell.state)
        return rates if any(rates) else ()

    def _zoneout_mask(self, rate: float, batch: int, time: int, training: bool) -> np.ndarray:
        """How much of a state's old value is kept: 0 or 1 at each step in training, else the rate itself."""
        if not training or not rate:
            return np.full((1, 1, 1), rate, self.dtype)
        dropped = self._thinning((time, batch, self.units), rate) == 0  # time-major, as the kernel reads it
        return dropped.swapaxes(0, 1)

    def _thinning(self, shape: tuple[int, ...], rate: float) -> np.ndarray:
        """A dropout mask: 0 with probability `rate`, else 1 / (1 - rate)."""
        return ops.dropout(Tensor(np.ones(shape, self.dtype)), rate).data

    def rank_hint(self, shape: Sequence[int | None]) -> str:
        """What a person who forgot an axis most likely wants."""
        if len(shape) != 2 or shape[-1] is None:
            return ""
        return (
            f". If its {shape[-1]} columns are time steps, use x[:, :, None]; if features, x[:, None, :]; "
            f"if it comes from a recurrent layer, give that one return_sequences=True"
        )

    def check_input(self, inputs: Tensor) -> None:
        """The features must be those of the weights, and there must be a batch and a time step."""
        if 0 in inputs.shape[:2]:
            raise ValueError(
                f"{self.name}: expected at least one row and one time step, got shape {inputs.shape}"
            )
        self.check_features(inputs.shape)

    def start_states(self, batch: int, given: Any = None) -> tuple[Any, ...] | None:
        """The states to begin with: the given, the kept, or None for zeros. Raises ValueError on a misfit."""
        if given is None:
            if not (self.stateful or self.carry) or self.states is None:
                return None
            if self.states[0].shape[0] != batch:
                raise ValueError(
                    f"{self.name}: keeps states for {self.states[0].shape[0]} rows, got a batch of {batch}: "
                    f"call reset_states() before a batch of another size"
                )
            return self.states
        names = self.cell.state
        states = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(states) != len(names):
            raise ValueError(
                f"{self.name}: initial_state: expected {len(names)} ({', '.join(names)}), got {len(states)}"
            )
        for name, state in zip(names, states, strict=True):
            if np.shape(getattr(state, "data", state)) != (batch, self.units):
                raise ValueError(
                    f"{self.name}: initial_state {name}: expected shape {(batch, self.units)}, "
                    f"got {np.shape(getattr(state, 'data', state))}"
                )
        return tuple(s if isinstance(s, Tensor) else Tensor(s, self.dtype) for s in states)

    def reset_states(self, rows: Any = None) -> None:
        """Forget the kept states: of all rows, or of those given (an index, indices, or a bool mask)."""
        if rows is None:
            self.states = None
        elif self.states is not None:
            index = checked_rows(rows, self.states[0].shape[0])
            for state in self.states:
                state[index] = 0

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """With `return_sequences` the mask goes on, in the order of the outputs."""
        if mask is None or not self.return_sequences:
            return None
        return mask[:, ::-1] if self.go_backwards else mask

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """(batch, time, units) or (batch, units), in a list if there are other results."""
        last, sequence = (input_shape[0], self.units), (*input_shape[:2], self.units)
        shapes = [sequence if self.return_sequences else last]
        if self.return_state:
            shapes += [last] * len(self.cell.state)
        if self.return_cell_sequence:
            shapes.append(sequence)
        return shapes if len(shapes) > 1 else shapes[0]

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("sequence", self.running_cell().name)]


class LSTM(Recurrent):
    """Long short-term memory: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    Per step: `c = sigmoid(f) c + sigmoid(i) tanh(g)`, `h = sigmoid(o) tanh(c)`, where `i f g o` are the four
        parts of
    `x kernel + h recurrent_kernel + bias`. States: h, c. Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of each state.
        activation: the name of what stands as tanh above.
        recurrent_activation: the name of what stands as sigmoid above.
        unit_forget_bias: start the forget gate's bias at one (Jozefowicz et al. 2015).
        peephole: the gates see the cell too: i and f the old one, o the new one, each by a weight a unit, which
            starts at zero: `p_i`, `p_f`, `p_o`, after the bias (Gers & Schmidhuber 2000).
        coupled: what is forgotten is what is written: 1 - sigmoid(f) in place of sigmoid(i). The gates are then
            f g o, 3 units columns wide, and there is no `p_i` (Greff et al. 2017, CIFG).
        cell_clip: hold the new cell state between -cell_clip and cell_clip (Sak et al. 2014).
        return_cell_sequence: append the cell states of all steps (batch, time, units) to what is returned.

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> LSTM(4, input_shape=(None, 3))(np.zeros((2, 5, 3))).shape
    (2, 4)
    """

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        *,
        unit_forget_bias: bool = True,
        peephole: bool = False,
        coupled: bool = False,
        cell_clip: float | None = None,
        return_cell_sequence: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.activation = activations.name_of(activation)
        self.recurrent_activation = activations.name_of(recurrent_activation)
        self.unit_forget_bias = bool(unit_forget_bias)
        self.peephole, self.coupled = bool(peephole), bool(coupled)
        self.cell_clip = None if cell_clip is None else limit("cell_clip", cell_clip)
        self.return_cell_sequence = bool(return_cell_sequence)
        self.use_cell(
            cells.lstm(
                self.activation,
                self.recurrent_activation,
                peephole=self.peephole,
                coupled=self.coupled,
                cell_clip=self.cell_clip,
            )
        )

    def build_bias(self, width: int) -> Variable:
        """(gates * units,), ones at the forget gate if asked for."""
        if not self.unit_forget_bias:
            return super().build_bias(width)
        n, initializer = self.units, self.bias_initializer
        before = self.cell.gates.index("f") * n

        def with_forget_ones(shape: Any, dtype: Any) -> np.ndarray:
            parts = [
                initializer((size,), dtype) if size else np.zeros(0, dtype)
                for size in (before, width - n - before)
            ]
            return np.concatenate([parts[0], np.ones(n, dtype), parts[1]])

        return self._bias((width,), with_forget_ones)

    def build_parameters(self) -> tuple[Variable, ...]:
        """The peepholes, if there are any."""
        return self._per_unit("zeros")


class GRU(Recurrent):
    """Gated recurrent unit: Cho et al. 2014, in the form with one recurrent product a step.

    Per step: `h = (1 - sigmoid(z)) tanh(n_x + sigmoid(r) n_h) + sigmoid(z) h`, where `r z n` are the three
        parts of
    `x kernel + bias[0]` (n_x) and `h recurrent_kernel + bias[1]` (n_h). One state, h; the bias is (2, 3
    units), the input's row first. Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of the state.
        activation: the name of what stands as tanh above.
        recurrent_activation: the name of what stands as sigmoid above.
        reset_after: the reset gate is applied after the recurrent product; False is not available yet.

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> GRU(4, return_sequences=True)(np.zeros((2, 5, 3))).shape
    (2, 5, 4)
    """

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        *,
        reset_after: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        if not reset_after:
            raise ValueError(
                "reset_after: the form with reset_after=False is not available yet, expected True"
            )
        self.activation = activations.name_of(activation)
        self.recurrent_activation = activations.name_of(recurrent_activation)
        self.reset_after = True
        self.use_cell(cells.gru(self.activation, self.recurrent_activation))

    def build_bias(self, width: int) -> Variable:
        """(2, 3 units): the input's bias, then the recurrent one."""
        return self._bias((2, width), self.bias_initializer)

    def cell_weights(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Both biases added up, but for the candidate's recurrent one, which the reset gate multiplies."""
        n = self.units
        if self.bias is None:
            return None, (Tensor(np.zeros(n, self.dtype)),)
        recurrent = self.bias[1]
        shared = ops.concatenate([recurrent[: 2 * n], Tensor(np.zeros(n, self.dtype))], axis=0)
        return self.bias[0] + shared, (recurrent[2 * n :],)


class SimpleRNN(Recurrent):
    """The simple recurrent network: Elman 1990, `h = tanh(x kernel + h recurrent_kernel + bias)`.

    Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of the state.
        activation: the name of what stands as tanh above.

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> SimpleRNN(4)(np.zeros((2, 5, 3))).shape
    (2, 4)
    """

    def __init__(self, units: int, activation: Any = "tanh", **options: Any) -> None:
        super().__init__(units, **options)
        self.activation = activations.name_of(activation)
        self.use_cell(cells.elman(self.activation))


class RNN(Recurrent):
    """A recurrent layer around a cell of one's own, compiled and differentiated like the built-in ones.

    A cell's per-unit parameters become weights of its names, after kernel, recurrent_kernel and bias. Other
    arguments: see `Recurrent`. A saved model names its cell, which must have been defined, or be among
    `custom_objects`, when it is loaded.

    Arguments:
        cell: made by `nl.cell`, or the name of one.
        units: size of the output and of each state.
        parameter_initializer: how the per-unit parameters start.

    Raises:
        ValueError: an unknown cell or option; an input that is not (batch, time, features).

    >>> from numlstm.layers import cell
    >>> @cell(gates="ig", state=("h",))
    ... def gated(i, g, h):
    ...     return h + sigmoid(i) * (tanh(g) - h)
    >>> RNN(gated, units=4)(np.zeros((2, 5, 3))).shape
    (2, 4)
    """

    def __init__(
        self, cell: Cell | str, units: int, *, parameter_initializer: Any = "zeros", **options: Any
    ) -> None:
        super().__init__(units, **options)
        found = cell_registry.find(cell) if isinstance(cell, str) else cell
        if not isinstance(found, Cell):
            raise ValueError(f"cell: expected a cell made by nl.cell, or the name of one, got {cell!r}")
        if found.aux:
            raise ValueError(
                f"cell: {found.name} takes {', '.join(found.aux)} at every step, which RNN can't give it"
            )
        self.use_cell(found)
        self.parameter_initializer = initializers.get(parameter_initializer)

    def build_parameters(self) -> tuple[Variable, ...]:
        """One (units,) weight for each of the cell's parameters."""
        return self._per_unit(self.parameter_initializer)


def cell(
    gates: int | Sequence[str], state: Sequence[str] = ("h",), split: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Cell]:
    """Decorator: a recurrent cell from its equations, written on scalars, for use in `nl.RNN`.

    Arguments of the function are matched by name: the gates' pre-activations, the old states that it uses,
        then per-unit
    parameters, which are trained. It returns the new states, the output first.

    Arguments:
        gates: the gates' names, in the order of the weights' columns, or how many of the first arguments are
            gates.
        state: the states' names, the output first.
        split: gates taken in two parts, `n_x` from the input and `n_h` from the recurrence.

    Raises:
        ValueError: (a TraceError) the function branches on a value, calls what the cell language lacks, or
            returns another number of states.

    >>> @cell(gates=4, state=("h", "c"))
    ... def my_lstm(i, f, g, o, c):
    ...     c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    ...     return sigmoid(o) * tanh(c), c
    >>> my_lstm.gates
    ('i', 'f', 'g', 'o')
    """
    if callable(gates):
        raise ValueError("cell: takes the gates first, @nl.cell(gates=...), got the function itself")

    def decorate(function: Callable[..., Any]) -> Cell:
        made = derive.cell(gates, state, split)(function)
        return cell_registry.add(made.name, made)

    return decorate


def limit(argument: str, value: Any) -> float:
    """`value` as a finite float above zero. Raises ValueError naming the argument."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0 < value < np.inf:
        raise ValueError(f"{argument}: expected a finite number above 0, or None, got {value!r}")
    return float(value)


def checked_rows(rows: Any, batch: int) -> np.ndarray:
    """Row numbers from an index, indices or a bool mask. Raises ValueError when one is not there."""
    array = np.atleast_1d(np.asarray(rows))
    if array.dtype.kind == "b" and array.shape == (batch,):
        return np.flatnonzero(array)
    if array.size and (
        array.dtype.kind not in "iu" or array.ndim != 1 or array.min() < -batch or array.max() >= batch
    ):
        raise ValueError(f"rows: expected numbers of the {batch} rows (or one bool for each), got {rows!r}")
    return array.astype(np.intp)


for _layer in (LSTM, GRU, SimpleRNN, RNN):
    registry.add(_layer.__name__, _layer)
