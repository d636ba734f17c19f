"""The recurrent layers: LSTM, GRU, SimpleRNN, IndRNN, SLSTM, and RNN for a cell of one's own.

All are one class, `Recurrent`, around one operation, `ops.recurrent`, which runs a cell's compiled equations
over a whole sequence; a new layer is a cell and its constructor. Inputs are (batch, time, features). Weights,
in Keras' layout: `kernel (features, gates * units)`, `recurrent_kernel (units, gates * units)`, `bias (gates
* units)`, `projection (units, outputs)` if there is one, the gains of `layer_norm`, then the cell's per-unit
parameters. Gate order: LSTM i f g o (f g o or i g o when coupled), GRU r z n, sLSTM i f z o. A masked step keeps
every state, so its output is a repeat, or zero with `zero_output_for_mask`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numlstm import activations, constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable, apply_joint, needs_gradient
from numlstm.backend import adopt, backend_of, beside, namespace, to_numpy
from numlstm.kernels import cells, derive
from numlstm.kernels.derive import Cell
from numlstm.kernels.sequence import Prepacked
from numlstm.layers.base import Layer, Shape, brought, fraction, positive, registry
from numlstm.registry import Registry

cell_registry: Registry[Cell] = Registry("cell")


class Recurrent(Layer):
    """What all recurrent layers share. Not used by itself.

    Arguments:
        units: size of the output (unless it is projected) and of each state.
        use_bias: whether there is a bias.
        split_bias: keep the bias in two rows (2, gates * units), the input's and the recurrent one, which are added
            up, as PyTorch and ONNX have it; models from there come with it. Both rows learn, so that their sum moves
            twice as far. A GRU with `reset_after` has two rows anyway.
        kernel_initializer, recurrent_initializer, bias_initializer: see `numlstm.initializers`.
        kernel_regularizer, recurrent_regularizer, bias_regularizer, activity_regularizer: see
            `numlstm.regularizers`.
        kernel_constraint, recurrent_constraint, bias_constraint: see `numlstm.constraints`.
        dropout: fraction of the inputs dropped in training; one mask for all steps of a row, as in Keras.
        recurrent_dropout: fraction of the outputs dropped, in training, on their way into the next step; also
            one mask for all steps of a row (Gal & Ghahramani 2016).
        recurrent_dropout_per_step: draw the mask of `recurrent_dropout` anew for each step.
        recurrent_dropconnect: fraction of the recurrent weights dropped in training, the rest scaled up by
            1 / (1 - rate); one mask for a whole batch (Merity et al. 2018, weight-dropped LSTM).
        zoneout: how likely a unit is to keep its old state instead of the new one, drawn for each step, in
            training; otherwise that share of the old state is mixed in (Krueger et al. 2017). One rate for all
            states, or a list with one for each.
        cell_clip: hold every new state between -cell_clip and cell_clip; in an LSTM the cell state alone.
        layer_norm: bring the input's and the recurrent product each to mean 0 and variance 1, over all gates of
            a row, and multiply them by gains that start at one: `kernel_gamma (gates * units)` and
            `recurrent_gamma`, weights that come before the cell's own parameters. The bias is added after it
            (Ba, Kiros & Hinton 2016).
        return_sequences: the outputs of all steps (batch, time, units) in place of the last (batch, units).
        return_state: a list of the output and every last state (batch, units).
        go_backwards: read the time axis from its end; outputs (and their mask) come in the order of
            processing.
        zero_output_for_mask: with `return_sequences` and a mask, the outputs of masked steps are zero in place of
            repeats of the last; the states still stay as they are.
        stateful: start each batch from the last states of the one before; `reset_states` forgets them.
        remat_steps: in training, keep the states at every so many steps only, and compute what else the
            gradient needs a second time (Chen et al. 2016): memory for time / remat_steps + remat_steps steps,
            for about a third more time. The outputs are the same bits.
    """

    recurrent_kernel: Variable | None
    kernel_gamma: Variable | None
    recurrent_gamma: Variable | None

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    cell: Cell  # as it was chosen
    equations: Cell  # the same with layer normalisation and limits, as it is run but for zoneout
    projection: int | None = None  # an option of layers whose output may have fewer columns than units
    return_cell_sequence = False  # an option of layers with a cell state c, the second

    def __init__(
        self,
        units: int,
        *,
        use_bias: bool = True,
        split_bias: bool = False,
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
        recurrent_dropout_per_step: bool = False,
        recurrent_dropconnect: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        cell_clip: float | None = None,
        layer_norm: bool = False,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        zero_output_for_mask: bool = False,
        stateful: bool = False,
        remat_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.units: int = positive("units", units)
        self.use_bias: bool = bool(use_bias)
        self.split_bias: bool = bool(split_bias)
        if self.split_bias and not self.use_bias:
            raise ValueError("split_bias: expected False where use_bias is False, got True")
        self.kernel_initializer: Any = initializers.get(kernel_initializer)
        self.recurrent_initializer: Any = initializers.get(recurrent_initializer)
        self.bias_initializer: Any = initializers.get(bias_initializer)
        self.kernel_regularizer: Any = regularizers.get(kernel_regularizer)
        self.recurrent_regularizer: Any = regularizers.get(recurrent_regularizer)
        self.bias_regularizer: Any = regularizers.get(bias_regularizer)
        self.activity_regularizer: Callable[[Tensor], Tensor] | None = regularizers.get(activity_regularizer)
        self.kernel_constraint: Any = constraints.get(kernel_constraint)
        self.recurrent_constraint: Any = constraints.get(recurrent_constraint)
        self.bias_constraint: Any = constraints.get(bias_constraint)
        self.dropout: float = fraction("dropout", dropout)
        self.recurrent_dropout: float = fraction("recurrent_dropout", recurrent_dropout)
        self.recurrent_dropout_per_step: bool = bool(recurrent_dropout_per_step)
        self.recurrent_dropconnect: float = fraction("recurrent_dropconnect", recurrent_dropconnect)
        self.zoneout: float | tuple[float, ...] = (
            tuple(fraction("zoneout", rate) for rate in zoneout)
            if isinstance(zoneout, (list, tuple))
            else fraction("zoneout", zoneout)
        )
        self.cell_clip: float | None = limit("cell_clip", cell_clip)
        self.layer_norm: bool = bool(layer_norm)
        self.return_sequences: bool = bool(return_sequences)
        self.return_state: bool = bool(return_state)
        self.go_backwards: bool = bool(go_backwards)
        self.zero_output_for_mask: bool = bool(zero_output_for_mask)
        self.stateful: bool = bool(stateful)
        self.remat_steps: int | None = None if remat_steps is None else positive("remat_steps", remat_steps)
        self.carry = (
            False  # set by training with bptt_steps: the states go on from one piece of a batch to the next
        )
        self.states: tuple[np.ndarray, ...] | None = (
            None  # kept when stateful or carry, one (batch, units) each
        )

    def use_cell(self, cell: Cell, equations: Cell | None = None) -> None:
        """Run this cell, or `equations`, what has become of it.

        Raises:
            ValueError: `zoneout` is a list, but not of one rate for each state; dropout is asked for on its way
                into a recurrent product that the cell has not got.
        """
        if isinstance(self.zoneout, tuple) and len(self.zoneout) != len(cell.state):
            raise ValueError(
                f"zoneout: expected one rate for all states, or a list of {len(cell.state)} "
                f"({', '.join(cell.state)}), got {len(self.zoneout)}"
            )
        if self.recurrent_dropout and not cell.recurrent:
            raise ValueError(
                f"recurrent_dropout: the cell {cell.name} has no recurrent product whose input it could thin "
                f"out: expected 0, got {self.recurrent_dropout}"
            )
        self.cell = cell
        self.equations = equations or cell

    def dressed(self, cell: Cell) -> Cell:
        """`cell` with the options that can be put round any cell: `layer_norm` and `cell_clip`."""
        if self.layer_norm:
            cell = cells.layer_norm(cell)
        return cell if self.cell_clip is None else cells.clipped(cell, self.cell_clip)

    # Sizes

    @property
    def output_units(self) -> int:
        """Columns of the output, the first state."""
        return self.projection or self.units

    @property
    def state_widths(self) -> tuple[int, ...]:
        """Columns of each state."""
        return (self.output_units, *(self.units for _ in self.cell.state[1:]))

    # Weights

    def build(self, input_shape: Shape) -> None:
        """Make the weights for inputs (batch, time, features)."""
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                f"{self.name}: expected inputs of rank 3, (batch, time, features), with a known number of "
                f"features, got shape {tuple(input_shape)}{self.rank_hint(input_shape)}"
            )
        width = len(self.cell.gates) * self.units
        self.kernel: Variable = self.add_weight(
            "kernel",
            (input_shape[-1], width),
            self.kernel_initializer,
            self.kernel_regularizer,
            self.kernel_constraint,
        )
        self.recurrent_kernel = self.build_recurrent((self.output_units, self.recurrent_width))
        self.bias: Variable | None = self.build_bias(width) if self.use_bias else None
        self.projection_kernel: Variable | None = self.build_projection()
        self.kernel_gamma = self.recurrent_gamma = None
        if self.layer_norm:
            self.kernel_gamma = self.add_weight("kernel_gamma", (width,), "ones")
            if self.recurrent_width:
                self.recurrent_gamma = self.add_weight("recurrent_gamma", (self.recurrent_width,), "ones")
        self.parameters: dict[str, Variable] = self.build_parameters()

    @property
    def recurrent_width(self) -> int:
        """Columns of the recurrent product."""
        return len(self.cell.recurrent) * self.units

    def build_recurrent(self, shape: tuple[int, ...]) -> Variable | None:
        """The recurrent weights; None where nothing is multiplied by them."""
        if 0 in shape:
            return None
        return self.add_weight(
            "recurrent_kernel",
            shape,
            self.recurrent_initializer,
            self.recurrent_regularizer,
            self.recurrent_constraint,
        )

    def build_bias(self, width: int) -> Variable:
        """The bias, `(width,)`, or in two rows; a gate of it may start apart."""
        initializer, special = self.bias_initializer, self.special_bias()
        if special is None:
            return self._bias((2, width) if self.split_bias else (width,), initializer)
        gate, value = special
        n = self.units
        before = self.cell.gates.index(gate) * n

        def with_special(shape: Any, dtype: Any) -> np.ndarray:
            parts = [
                initializer((size,), dtype) if size else np.zeros(0, dtype)
                for size in (before, width - n - before)
            ]
            whole = np.concatenate([parts[0], np.full(n, value, dtype), parts[1]])
            return np.stack([whole, initializer((width,), dtype)]) if self.split_bias else whole

        return self._bias((2, width) if self.split_bias else (width,), with_special)

    def special_bias(self) -> tuple[str, float] | None:
        """A gate whose bias starts at a value of its own, and the value."""
        return None

    def build_projection(self) -> Variable | None:
        """The projection, if there is one."""
        return None

    def build_parameters(self) -> dict[str, Variable]:
        """Weights for the cell's per-unit parameters, one (units,) each, by the parameters' names."""
        return {}

    def _per_unit(self, names: Sequence[str], initializer: Any) -> dict[str, Variable]:
        """One weight for each of the parameters named, of its name."""
        return {name: self.add_weight(name, (self.units,), initializer) for name in names}

    def _bias(self, shape: tuple[int, ...], initializer: Any) -> Variable:
        return self.add_weight("bias", shape, initializer, self.bias_regularizer, self.bias_constraint)

    # Weights as the cell's equations want them

    def biases(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The bias of all gates, and biases that the cell takes as parameters."""
        bias: Any = self.bias
        return bias[0] + bias[1] if self.split_bias else bias, {}

    def recurrent_weights(self, thinned: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The matrix of the recurrent product, and recurrent weights that the cell takes as parameters."""
        if thinned is None:
            return self._zeros((self.output_units, 0)), {}
        return thinned, {}

    def cell_weights(
        self, training: bool = False
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None]:
        """The recurrent matrix, the bias, the cell's per-unit parameters and the projection."""
        feedback = self.recurrent_kernel
        if training and self.recurrent_dropconnect and feedback is not None:
            feedback = ops.dropout(feedback, self.recurrent_dropconnect)
        matrix, values = self.recurrent_weights(feedback)
        bias, others = self.biases()
        if not self.equations.params:  # as in the usual LSTM and GRU
            return matrix, bias, (), self.projection_kernel
        values = values | others | self.parameters
        if self.layer_norm:
            gates, fed = self.cell.gates, self.cell.recurrent
            shift = self._zeros((len(gates) * self.units,)) if bias is None else bias
            values |= self._by_gate("gx_", gates, self.kernel_gamma)
            values |= self._by_gate("bx_", gates, shift)
            values |= self._by_gate("gh_", fed, self.recurrent_gamma)
            bias = None  # the products are normalised before it is added
        return matrix, bias, tuple(values[name] for name in self.equations.params), self.projection_kernel

    def running_weights(
        self, training: bool = False
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None, Prepacked | None]:
        """`cell_weights`, and room for kernels to keep them packed: in inference they are made once until a weight
        changes."""
        held = [v for v in (self.kernel, self.recurrent_kernel, self.bias, *self._variables) if v is not None]
        if training or needs_gradient(*held) or not all([isinstance(v, Variable) for v in held]):
            return *self.cell_weights(training), None
        return self.kernel.kept(held, lambda: (*self.cell_weights(), Prepacked()))

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """In place of a weight that there is not, where the others lie."""
        return Tensor(namespace(self.kernel.data).zeros(shape, self.dtype))

    def _by_gate(self, prefix: str, gates: Sequence[str], weight: Any) -> dict[str, Tensor]:
        """A weight of all gates as one parameter for each."""
        n = self.units
        return {f"{prefix}{gate}": weight[k * n : (k + 1) * n] for k, gate in enumerate(gates)}

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
        return self.results(*ops.recurrent(**self.question(inputs, initial_state, mask, training)), mask)

    def question(
        self, inputs: Tensor, initial_state: Any = None, mask: Any = None, training: bool = False
    ) -> dict[str, Any]:
        """What `call` asks of `ops.recurrent`: its arguments, by name."""
        state = self.start_states(inputs.shape[0], initial_state)
        if state is not None:
            here = type(inputs.data)
            if here is not np.ndarray or any(
                type(s.data if isinstance(s, Tensor) else s) is not here for s in state
            ):
                there = backend_of(inputs.data)
                state = tuple([brought(s, there, f"{self.name}: initial_state") for s in state])
        if training and self.dropout:
            inputs = ops.dropout(inputs, self.dropout, shape=(inputs.shape[0], 1, inputs.shape[2]))
        return self.arguments(inputs, state, mask, training)

    def results(
        self, outputs: Tensor, final: tuple[Tensor, ...], others: tuple[Tensor, ...] | None, mask: Any = None
    ) -> Tensor | list[Tensor]:
        """What `call` gives, from what `ops.recurrent` gives; the last states are kept if they are wanted."""
        if self.stateful or self.carry:
            self.states = tuple(f.data.copy() for f in final)  # free of the tape and of larger arrays
        result = [self.shown(outputs, mask) if self.return_sequences else final[0]]
        if self.return_state:
            result += final
        if self.return_cell_sequence and others:
            result.append(others[0])
        return result if len(result) > 1 else result[0]

    def shown(self, outputs: Tensor, mask: Any) -> Tensor:
        """The outputs of all steps as they are given: with `zero_output_for_mask`, zero where masked."""
        if mask is None or not self.zero_output_for_mask:
            return outputs
        valid = mask[:, ::-1] if self.go_backwards else mask  # in the order of processing, as the outputs are
        return outputs * Tensor(valid[..., None].astype(self.dtype))

    def run(
        self, inputs: Tensor, state: Any, mask: Any, training: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """The bare sequence: every output, the last states, the other states' sequences if asked for."""
        return ops.recurrent(**self.arguments(inputs, state, mask, training))

    def arguments(self, inputs: Tensor, state: Any, mask: Any, training: bool = False) -> dict[str, Any]:
        """The arguments of `ops.recurrent` for the bare sequence."""
        batch, time, _ = inputs.shape
        recurrent_mask = None
        if training and self.recurrent_dropout:
            steps = time if self.recurrent_dropout_per_step else 1
            shape = (steps, batch, self.output_units)  # time-major, as the kernel reads it
            recurrent_mask = self._thinning(shape, self.recurrent_dropout).swapaxes(0, 1)
        recurrent_kernel, bias, parameters, projection, prepacked = self.running_weights(training)
        cell, aux = self.equations, ()
        if rates := self._zoneout_rates():
            cell, widths = self.running_cell(), self.state_widths
            aux = tuple(
                self._zoneout_mask(rate, (time, batch, n), training)
                for rate, n in zip(rates, widths, strict=True)
            )
        return {
            "cell": cell,
            "x": inputs,
            "kernel": self.kernel,
            "recurrent_kernel": recurrent_kernel,
            "bias": bias,
            "params": parameters,
            "state": state,
            "mask": mask,
            "reverse": self.go_backwards,
            "training": self.return_cell_sequence,
            "aux": aux,
            "recurrent_mask": recurrent_mask,
            "projection": projection,
            "remat_steps": self.remat_steps,
            "prepacked": prepacked,
        }

    def running_cell(self) -> Cell:
        """The cell that is run: the layer's own, in zoneout if there is any."""
        return cells.zoneout(self.equations) if self._zoneout_rates() else self.equations

    def _zoneout_rates(self) -> tuple[float, ...]:
        """One for each state; empty when no state has zoneout."""
        if not self.zoneout:
            return ()
        rates = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * len(self.cell.state)
        return rates if any(rates) else ()

    def _zoneout_mask(self, rate: float, shape: tuple[int, int, int], training: bool) -> np.ndarray:
        """How much of a state's old value is kept: 0 or 1 at each step in training, else the rate itself."""
        if not training or not rate:
            return namespace(self.kernel.data).full((1, 1, 1), rate, self.dtype)
        dropped = self._thinning(shape, rate) == 0  # time-major, as the kernel reads it
        return dropped.swapaxes(0, 1)

    def _thinning(self, shape: tuple[int, ...], rate: float) -> np.ndarray:
        """A dropout mask: 0 with probability `rate`, else 1 / (1 - rate)."""
        return ops.dropout_mask(shape, rate, self.dtype)

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
        shape = inputs.shape
        if 0 in shape[:2]:
            raise ValueError(f"{self.name}: expected at least one row and one time step, got shape {shape}")
        self.check_features(shape)

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
        for name, width, state in zip(names, self.state_widths, states, strict=True):
            shape = tuple(state.shape) if hasattr(state, "shape") else np.shape(state)
            if shape != (batch, width):
                raise ValueError(
                    f"{self.name}: initial_state {name}: expected shape {(batch, width)}, got {shape}"
                )
        return tuple(s if isinstance(s, Tensor) else Tensor(s, self.dtype) for s in states)

    def reset_states(self, rows: Any = None) -> None:
        """Forget the kept states: of all rows, or of those given (an index, indices, or a bool mask)."""
        if rows is None:
            self.states = None
        elif self.states is not None:
            index = checked_rows(rows, self.states[0].shape[0])
            for state in self.states:
                state[beside(index, state, "rows") if isinstance(index, np.ndarray) else index] = 0

    def reset_state(self, rows: Any = None) -> None:
        """`reset_states` under Keras 3's name."""
        self.reset_states(rows)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """With `return_sequences` the mask goes on, in the order of the outputs."""
        if mask is None or not self.return_sequences:
            return None
        return mask[:, ::-1] if self.go_backwards else mask

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """(batch, time, units) or (batch, units), in a list if there are other results."""
        batch, time = input_shape[:2]
        outputs = (self.output_units,)
        shapes: list[Shape] = [(batch, time, *outputs) if self.return_sequences else (batch, *outputs)]
        if self.return_state:
            shapes += [(batch, width) for width in self.state_widths]
        if self.return_cell_sequence:
            shapes.append((batch, time, self.units))
        return shapes if len(shapes) > 1 else shapes[0]

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("sequence", self.running_cell().name)]


class Projected(Recurrent):
    """A recurrent layer whose output may be projected to fewer columns than it has units. Not used by itself.

    Arguments:
        projection: size of the output, and of the first state, h: what the cell gives is multiplied by
            `projection (units, projection)`, which comes after the bias among the weights, and `recurrent_kernel`
            has that many rows. None: no projection (Sak, Senior & Beaufays 2014).
        projection_initializer, projection_regularizer, projection_constraint: see `numlstm.initializers`,
            `numlstm.regularizers` and `numlstm.constraints`.
    """

    def __init__(
        self,
        units: int,
        *,
        projection: int | None = None,
        projection_initializer: Any = "glorot_uniform",
        projection_regularizer: Any = None,
        projection_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.projection: int | None = None if projection is None else positive("projection", projection)
        self.projection_initializer: Any = initializers.get(projection_initializer)
        self.projection_regularizer: Any = regularizers.get(projection_regularizer)
        self.projection_constraint: Any = constraints.get(projection_constraint)

    def build_projection(self) -> Variable | None:
        """(units, projection), if asked for."""
        if self.projection is None:
            return None
        return self.add_weight(
            "projection",
            (self.units, self.projection),
            self.projection_initializer,
            self.projection_regularizer,
            self.projection_constraint,
        )


class LSTM(Projected):
    """Long short-term memory: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    Per step: `c = sigmoid(f) c + sigmoid(i) tanh(g)`, `h = sigmoid(o) tanh(c)`, where `i f g o` are the four
        parts of
    `x kernel + h recurrent_kernel + bias`. States: h, c. Other arguments: see `Recurrent` and, for `projection`
    and what belongs to it, `Projected`.

    Arguments:
        units: size of the output (unless it is projected) and of each state.
        activation: the name of what stands as tanh above.
        recurrent_activation: the name of what stands as sigmoid above.
        output_activation: the name of what stands as the second tanh, of c on its way out; None: `activation`.
        unit_forget_bias: start the forget gate's bias at one (Jozefowicz et al. 2015); where there is no forget
            gate, `coupled="input"`, the input gate's at minus one, which is the same forgetting.
        peephole: the gates see the cell too: i and f the old one, o the new one, each by a weight a unit, which
            starts at zero: `p_i`, `p_f`, `p_o`, the last of the weights (Gers & Schmidhuber 2000).
        coupled: what is forgotten is what is written: 1 - sigmoid(f) in place of sigmoid(i). The gates are then
            f g o, 3 units columns wide, and there is no `p_i` (Greff et al. 2017, CIFG). "input": 1 - sigmoid(i)
            in place of sigmoid(f), gates i g o, no `p_f` (ONNX' `input_forget`).
        cell_clip: hold the new cell state between -cell_clip and cell_clip (Sak et al. 2014).
        clip: hold the input of every activation between -clip and clip (ONNX' `clip`).
        layer_norm: normalise as said of all recurrent layers, and the cell state on its way to the output, with
            a gain and a bias of its own: `cell_gamma` and (with `use_bias`) `cell_beta`, after
            `recurrent_gamma`.
        return_cell_sequence: append the cell states of all steps (batch, time, units) to what is returned.

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> LSTM(4, input_shape=(None, 3))(np.zeros((2, 5, 3))).shape
    (2, 4)
    >>> [y.shape for y in LSTM(4, projection=3, return_state=True)(np.zeros((2, 5, 3)))]
    [(2, 3), (2, 3), (2, 4)]
    """

    output_activation: str | None

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        *,
        output_activation: Any = None,
        unit_forget_bias: bool = True,
        peephole: bool = False,
        coupled: bool | str = False,
        clip: float | None = None,
        return_cell_sequence: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.activation: str = activations.name_of(activation)
        self.recurrent_activation: str = activations.name_of(recurrent_activation)
        self.output_activation = None if output_activation is None else activations.name_of(output_activation)
        self.unit_forget_bias: bool = bool(unit_forget_bias)
        self.peephole: bool = bool(peephole)
        if isinstance(coupled, str) and coupled != "input":
            raise ValueError(f"coupled: expected True, False or 'input', got {coupled!r}")
        self.coupled = coupled if isinstance(coupled, str) else bool(coupled)
        self.clip: float | None = limit("clip", clip)
        self.return_cell_sequence: bool = bool(return_cell_sequence)
        self.use_cell(
            cells.lstm(
                self.activation,
                self.recurrent_activation,
                output_activation=self.output_activation,
                peephole=self.peephole,
                coupled=self.coupled,
                cell_clip=self.cell_clip,
                clip=self.clip,
                projection=self.projection is not None,
                layer_norm=self.layer_norm,
            )
        )

    def special_bias(self) -> tuple[str, float] | None:
        """Ones at the forget gate, if asked for."""
        if not self.unit_forget_bias:
            return None
        return ("i", -1.0) if self.coupled == "input" else ("f", 1.0)

    def build_parameters(self) -> dict[str, Variable]:
        """The gain and bias of the normalised cell and the peepholes, if there are any."""
        found = {}
        if self.layer_norm:
            found["g_c"] = self.add_weight("cell_gamma", (self.units,), "ones")
            if self.use_bias:
                found["b_c"] = self.add_weight("cell_beta", (self.units,), "zeros")
        return found | self._per_unit([p for p in self.cell.params if p.startswith("p_")], "zeros")

    def biases(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The bias of all gates, and that of the normalised cell where it is not a weight."""
        bias, others = super().biases()
        return bias, others | ({"b_c": self._zeros((self.units,))} if self.layer_norm else {})


class GRU(Recurrent):
    """Gated recurrent unit: Cho et al. 2014, by default in the form with one recurrent product a step.

    Per step: `h = (1 - sigmoid(z)) tanh(n_x + sigmoid(r) n_h) + sigmoid(z) h`, where `r z n` are the three
        parts of
    `x kernel + bias[0]` (n_x) and `h recurrent_kernel + bias[1]` (n_h). One state, h; the bias is (2, 3
    units), the input's row first. Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of the state.
        activation: the name of what stands as tanh above.
        recurrent_activation: the name of what stands as sigmoid above.
        reset_after: the reset gate is applied after the recurrent product, as above. False: before it, as the
            paper has it, `tanh` of x kernel + (sigmoid(r) h) recurrent_kernel + bias in the third part, a second
            product in each step; the bias is then (3 units), and `layer_norm` normalises that product by itself.
        clip: hold the input of every activation between -clip and clip (ONNX' `clip`).

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
        clip: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.activation: str = activations.name_of(activation)
        self.recurrent_activation: str = activations.name_of(recurrent_activation)
        self.reset_after: bool = bool(reset_after)
        self.clip: float | None = limit("clip", clip)
        self.use_cell(
            cells.gru(
                self.activation,
                self.recurrent_activation,
                reset_after=self.reset_after,
                clip=self.clip,
                cell_clip=self.cell_clip,
                layer_norm=self.layer_norm,
            )
        )

    def build_bias(self, width: int) -> Variable:
        """(2, 3 units), the input's bias, then the recurrent one; (3 units) where the product is one sum."""
        if not self.reset_after:
            return super().build_bias(width)
        return self._bias((2, width), self.bias_initializer)

    def biases(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Both biases added up, but for the candidate's recurrent one, which the reset gate multiplies."""
        n = self.units
        if not self.reset_after:
            return super().biases()
        if self.bias is None:
            return None, {"b_n": self._zeros((n,))}
        bias, apart = _summed_rows(self.bias, 2 * n)
        return bias, {"b_n": apart}


def _summed_rows(rows: Tensor, upto: int) -> tuple[Tensor, Tensor]:
    """Of two rows the first, plus the second's columns below `upto`; and what is left of the second."""
    first, second = rows.data[0], rows.data[1]
    total = first.copy()
    total[:upto] += second[:upto]

    def vjp(dtotal: Any, dleft: Any) -> list[Any]:
        d = namespace(first).zeros_like(rows.data)
        if dtotal is not None:
            d[0], d[1, :upto] = dtotal, dtotal[:upto]
        if dleft is not None:
            d[1, upto:] = dleft
        return [d]

    total, left = apply_joint((total, second[upto:]), [rows], vjp)
    return total, left


class SimpleRNN(Recurrent):
    """The simple recurrent network: Elman 1990, `h = tanh(x kernel + h recurrent_kernel + bias)`.

    Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of the state.
        activation: the name of what stands as tanh above.
        clip: hold the input of the activation between -clip and clip (ONNX' `clip`).

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> SimpleRNN(4)(np.zeros((2, 5, 3))).shape
    (2, 4)
    """

    def __init__(
        self, units: int, activation: Any = "tanh", *, clip: float | None = None, **options: Any
    ) -> None:
        super().__init__(units, **options)
        self.activation: str = activations.name_of(activation)
        self.clip: float | None = limit("clip", clip)
        self.use_cell(
            cells.elman(self.activation, clip=self.clip, cell_clip=self.cell_clip, layer_norm=self.layer_norm)
        )


class IndRNN(Recurrent):
    """Independently recurrent network: Li et al. 2018, `h = relu(x kernel + recurrent_kernel h + bias)`.

    Each unit sees only its own output of the step before, by one weight: `recurrent_kernel (units,)`. What a unit
    remembers is mixed with that of others by the layer above, so these layers are stacked. The paper holds the
    recurrent weights within 2 ** (1 / steps), here `recurrent_constraint=nl.constraints.MaxNorm(limit, axis=())`.
    Other arguments: see `Recurrent`; `recurrent_dropout` has no place here, `recurrent_dropconnect` has.

    Arguments:
        units: size of the output and of the state.
        activation: the name of what stands as relu above.
        recurrent_initializer: by default uniform between 0 and 1.

    Raises:
        ValueError: an option that is unknown or out of range; an input that is not (batch, time, features).

    >>> layer = IndRNN(4, input_shape=(None, 3))
    >>> layer(np.zeros((2, 5, 3))).shape, layer.weights[1].shape
    ((2, 4), (4,))
    """

    def __init__(
        self, units: int, activation: Any = "relu", *, recurrent_initializer: Any = None, **options: Any
    ) -> None:
        if recurrent_initializer is None:
            recurrent_initializer = initializers.RandomUniform(0.0, 1.0)
        super().__init__(units, recurrent_initializer=recurrent_initializer, **options)
        self.activation: str = activations.name_of(activation)
        cell = cells.indrnn(self.activation)
        self.use_cell(cell, self.dressed(cell))

    def build_recurrent(self, shape: tuple[int, ...]) -> Variable | None:
        """One weight a unit."""
        return super().build_recurrent((self.units,))

    def recurrent_weights(self, thinned: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """No matrix: the cell multiplies each unit by itself."""
        return super().recurrent_weights(None)[0], {"u": thinned}  # type: ignore[dict-item]


class SLSTM(Recurrent):
    """sLSTM, an LSTM with an exponential input gate: Beck et al. 2024, xLSTM, equations 8 to 17.

    Per step: `m' = max(log sigmoid(f) + m, i)`, `c = exp(log sigmoid(f) + m - m') c + exp(i - m') tanh(z)`, the
    normaliser n likewise with 1 in place of `tanh(z)`, `h = sigmoid(o) c / n`. States: h, c, n, m; they start at
    zero. The exponents are held in range by m, which changes nothing else. Other arguments: see `Recurrent`.

    Arguments:
        units: size of the output and of each state.
        unit_forget_bias: start the forget gate's bias at one.
        return_cell_sequence: append the cell states of all steps (batch, time, units) to what is returned.

    Raises:
        ValueError: an option that is unknown or out of range; `cell_clip`, as c counts only relative to n; an
            input that is not (batch, time, features).

    >>> SLSTM(4, return_sequences=True)(np.zeros((2, 5, 3))).shape
    (2, 5, 4)
    """

    def __init__(
        self, units: int, *, unit_forget_bias: bool = True, return_cell_sequence: bool = False, **options: Any
    ) -> None:
        super().__init__(units, **options)
        if self.cell_clip is not None:
            raise ValueError(
                f"cell_clip: the cell of an sLSTM counts only relative to its normaliser, so a limit means "
                f"nothing: expected None, got {self.cell_clip}"
            )
        self.unit_forget_bias: bool = bool(unit_forget_bias)
        self.return_cell_sequence: bool = bool(return_cell_sequence)
        cell = cells.slstm()
        self.use_cell(cell, self.dressed(cell))

    def special_bias(self) -> tuple[str, float] | None:
        """Ones at the forget gate, if asked for."""
        return ("f", 1.0) if self.unit_forget_bias else None


class RNN(Projected):
    """A recurrent layer around a cell of one's own, compiled and differentiated like the built-in ones.

    A cell's per-unit parameters become weights of its names, the last ones. A cell none of whose gates is fed
    by the recurrence has no `recurrent_kernel`. Other arguments: see `Recurrent` and `Projected`. A saved model
    names its cell, which must have been defined, or be among `custom_objects`, when it is loaded.

    Arguments:
        cell: made by `nl.cell`, or the name of one.
        units: size of the output (unless it is projected) and of each state.
        parameter_initializer: how the per-unit parameters start.
        projection: size of the output of a cell that returns `project(...)`; None for all others.

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
        if found.projects != (self.projection is not None):
            wanted = "the number of outputs, as it projects them" if found.projects else "None"
            raise ValueError(f"projection: the cell {found.name}: expected {wanted}, got {self.projection}")
        if self.recurrent_dropconnect and not found.recurrent:
            raise ValueError(
                f"recurrent_dropconnect: the cell {found.name} has no recurrent product: expected 0, "
                f"got {self.recurrent_dropconnect}"
            )
        self.use_cell(found, self.dressed(found))
        self.parameter_initializer: Any = initializers.get(parameter_initializer)

    def build_parameters(self) -> dict[str, Variable]:
        """One (units,) weight for each of the cell's parameters."""
        return self._per_unit(self.cell.params, self.parameter_initializer)


def cell(
    gates: int | Sequence[str],
    state: Sequence[str] = ("h",),
    split: Sequence[str] = (),
    *,
    recurrent: Sequence[str] | None = None,
) -> Callable[[Callable[..., Any]], Cell]:
    """Decorator: a recurrent cell from its equations, written on scalars, for use in `nl.RNN`.

    Arguments of the function are matched by name: the gates' pre-activations, the old states that it uses,
        then per-unit
    parameters, which are trained. It returns the new states, the output first. Beside element-wise functions it
    may call three that look across units: `preactivation("n", v)`, the pre-activation of gate n with v in the
    place of h; `normalize(a, b)`, the values brought to mean 0 and variance 1 over a row; and `project(v)`, for
    the output alone, v times the projection matrix.

    Arguments:
        gates: the gates' names, in the order of the weights' columns, or how many of the first arguments are
            gates.
        state: the states' names, the output first.
        split: gates taken in two parts, `n_x` from the input and `n_h` from the recurrence.
        recurrent: the names of the gates that the recurrence feeds; the others see the input only. By default
            all.

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
        made = derive.cell(gates, state, split, recurrent=recurrent)(function)
        return cell_registry.add(made.name, made)

    return decorate


def limit(argument: str, value: Any) -> float | None:
    """`value` as a finite float above zero, or None. Raises ValueError naming the argument."""
    if value is None:
        return None
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0 < value < np.inf:
        raise ValueError(f"{argument}: expected a finite number above 0, or None, got {value!r}")
    return float(value)


def checked_rows(rows: Any, batch: int) -> np.ndarray:
    """Row numbers from an index, indices or a bool mask. Raises ValueError when one is not there."""
    array = np.atleast_1d(to_numpy(adopt(rows)))
    if array.dtype.kind == "b" and array.shape == (batch,):
        return np.flatnonzero(array)
    if array.size and (
        array.dtype.kind not in "iu" or array.ndim != 1 or array.min() < -batch or array.max() >= batch
    ):
        raise ValueError(f"rows: expected numbers of the {batch} rows (or one bool for each), got {rows!r}")
    return array.astype(np.intp)


for _layer in (LSTM, GRU, SimpleRNN, IndRNN, SLSTM, RNN):
    registry.add(_layer.__name__, _layer)
