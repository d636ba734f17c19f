"""A model run one time step at a time, on inputs that never end: sensors, speech, text as it is written.

A stream keeps the recurrent states itself, apart from the model's, so that several can run on one model.
After t steps its output is what `model.predict` would give for those t steps (with `return_sequences` in the
last layer: the last of them).

Where the backend has stepping kernels (the CPU's), neighbouring layers become one native call with their weights
packed beforehand, float32, bfloat16 or int8 as in `predict`; a model of known layers is one call as a whole. What has
no native form is called as in `predict`, and `Stream.explain` says which layers those are.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from numlstm import activations
from numlstm.autograd import QuantizedVariable, Tensor, Variable, latest_change
from numlstm.backend import IN_PRECISION, adopt, beside, chosen_backend, get_backend, moved, to_numpy
from numlstm.kernels import cells
from numlstm.kernels import stream as native
from numlstm.layers.base import Layer, brought, positive, to_tensor
from numlstm.layers.bidirectional import Bidirectional
from numlstm.layers.core import (
    Activation,
    Dense,
    Dropout,
    Embedding,
    InputLayer,
    LayerNormalization,
    Masking,
    TimeDistributed,
)
from numlstm.layers.recurrent import Recurrent, checked_rows
from numlstm.models import Model, Sequential
from numlstm.quantization import is_quantized

__all__ = ["Stream"]


class _Part(NamedTuple):
    """Neighbouring layers, by their numbers, that are stepped in one native call, or one layer that is not."""

    layers: range
    stack: Any  # the native call; None: the layer is called
    why: str  # it is not native


class Stream:
    """Step by step through a `Sequential`; made by `model.stream(batch_size)`.

    The layers up to the last recurrent one with `return_sequences=False` (or to the end) are stepped:
    recurrent layers, and layers whose output at a step depends on that step alone (Dense, Embedding, Dropout,
    LayerNormalization, ...). What comes after has no time axis and may be anything.

    Weights that change (`assign`, `set_weights`, training) are noticed at the next step and packed again. The
    backend is that of `compile`, or the one in use when the stream is made; a `with nl.use_backend(...)` around a
    step counts too. On a device the layers are called one by one, and each output is read back: for a step of a few
    rows the CPU's native call is faster. A stream serves one thread at a time.

    Arguments:
        model: a built Sequential.
        batch_size: how many independent rows are fed at each step.

    Raises:
        ValueError: another kind of model, one that is not built, or a layer that can't be stepped, with the
            reason.

    >>> from numlstm.layers import LSTM, Dense
    >>> model = Sequential([LSTM(4, input_shape=(None, 2)), Dense(1)])
    >>> stream, x = model.stream(batch_size=3), np.ones((3, 5, 2), np.float32)
    >>> steps = [stream.step(x[:, t]) for t in range(5)]
    >>> bool(np.allclose(steps[-1], model(x), atol=1e-6))
    True
    """

    batch_size: int

    def __init__(self, model: Model, batch_size: int = 1) -> None:
        self._model, self.batch_size = model, positive("batch_size", batch_size)
        if not isinstance(model, Sequential):
            raise ValueError(
                f"{model.name}: only a Sequential can be streamed; in a model of your own, keep the "
                f"states between calls with return_state and initial_state"
            )
        if not model.built:
            raise ValueError(f"{model.name} is not built: give input_shape, or call it once before stream()")
        layers = [layer for layer in _leaves(model) if not isinstance(layer, InputLayer)]
        if not layers:
            raise ValueError(f"{model.name}: has no layers to stream through")
        ends = [k for k, x in enumerate(layers) if isinstance(x, Recurrent) and not x.return_sequences]
        self._layers, self._cut = layers, ends[0] + 1 if ends else len(layers)
        self._open = not ends  # is there still a time axis at the end?
        for layer in layers[: self._cut]:
            _check_steppable(layer)
        self._takes_ids = isinstance(layers[0], Embedding)
        self._states: dict[int, tuple[np.ndarray, ...]] = {
            k: tuple(np.zeros((self.batch_size, width), layer.dtype) for width in layer.state_widths)
            for k, layer in enumerate(layers[: self._cut])
            if isinstance(layer, Recurrent)
        }
        self._backend: Any = None
        self._packed: list[tuple[Variable, int]] = []
        self._parts: list[_Part] = []
        self._arrange()

    def step(self, x: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Feed one time step; the output after it.

        Arguments:
            x: (batch, features), or integer ids (batch,) for a model that begins with an Embedding. One row
                may come without its batch axis when `batch_size` is 1.
            out: where to write the output, in place of a new array: of its shape, and of a float dtype.

        Returns (batch, ...): what `predict` gives for the steps so far; a new array, or `out`.

        Raises:
            ValueError: another shape of x or of out, or an id that the Embedding has not got.
        """
        if (
            latest_change() != self._change
            or chosen_backend() is not self._chosen
            or self._model._settings is not self._settings
        ):
            self._arrange()
        whole = self._whole
        if whole is None:
            y = self._step_by_parts(self._checked(x))
            return np.array(y) if out is None else _written(out, y)
        if (
            type(x) is np.ndarray
            and x.dtype == whole.x.dtype
            and x.shape == whole.x.shape
            and not self._takes_ids
        ):
            whole.x[...] = x
        else:
            self._fill(whole, 0, self._checked(x))
        if out is not None:
            _check_out(out, whole.y)  # before the states go on
        whole.run()
        if out is None:
            return whole.y.copy()
        out[...] = whole.y
        return out

    def explain(self, print_fn: Callable[[str], Any] | None = None) -> list[dict[str, str]]:
        """Print, layer by layer, what runs in a native call and what does not, and why.

        Arguments:
            print_fn: takes each line, in place of `print`.

        Returns what it printed, one dict a layer: layer, type, runs ("native call 1", ..., or "by itself"), why it is
        not native, and products: "bfloat16" or "int8" where the layer's are, else "float32".

        >>> from numlstm.layers import GRU, Dense
        >>> stream = Sequential([GRU(4, name="memory", input_shape=(None, 2)), Dense(1, name="head")]).stream()
        >>> rows = stream.explain()
        memory (GRU): native call 1
        head (Dense): native call 1
        """
        self._arrange()
        say, rows, calls = print_fn or print, [], 0
        for part in self._parts:
            calls += part.stack is not None
            for layer in (self._layers[k] for k in part.layers):
                runs = "by itself" if part.stack is None else f"native call {calls}"
                kind, products = type(layer).__name__, self._products(layer)
                rows.append(
                    {"layer": layer.name, "type": kind, "runs": runs, "why": part.why, "products": products}
                )
                reduced = "" if products == "float32" else f", products in {products}"
                say(f"{layer.name} ({kind}): {runs}{reduced}{part.why and f' ({part.why})'}")
        return rows

    def reset(self, rows: Any = None) -> None:
        """Back to the beginning: zero states, for all rows or for those given (an index, indices, or a bool
        mask)."""
        index: Any = slice(None) if rows is None else checked_rows(rows, self.batch_size)
        for states in self._states.values():
            for state in states:
                state[beside(index, state, "rows") if isinstance(index, np.ndarray) else index] = 0

    @property
    def states(self) -> list[tuple[np.ndarray, ...]]:
        """Copies of the states (batch, units) of each recurrent layer, to be put back with `set_states`."""
        return [tuple(np.array(to_numpy(s)) for s in states) for states in self._states.values()]

    def set_states(self, states: list[tuple[np.ndarray, ...]]) -> None:
        """Go on from states that another stream (or this one, earlier) had. Raises ValueError on a misfit."""
        mine = list(self._states.values())
        if [[np.shape(s) for s in group] for group in states] != [[s.shape for s in group] for group in mine]:
            raise ValueError("states: expected what `states` of a stream of this model and batch size gave")
        for group, values in zip(mine, states, strict=True):
            for state, value in zip(group, values, strict=True):
                state[...] = beside(value, state, "states")

    # Arranging

    def _arrange(self) -> None:
        """Pack the weights for the backend in use, unless that has been done."""
        self._change = latest_change()  # first: what changes from here on is noticed
        self._chosen, self._settings = chosen_backend(), self._model._settings
        with self._model._running(None):  # on the backend that `compile` chose, as in predict
            backend = get_backend()
        if backend is self._backend and all(v.version == version for v, version in self._packed):
            return
        weights = [
            [(v, v.version) for v in layer.weights] for layer in self._layers
        ]  # before they are packed
        if backend.xp is np:
            self._model.move(backend)
        self._backend = backend
        self._states = {
            k: tuple(moved(to_numpy(s), backend, "states") for s in states)
            for k, states in self._states.items()
        }
        self._parts = list(self._cut_up(backend))
        self._packed = [
            w for part in self._parts if part.stack is not None for k in part.layers for w in weights[k]
        ]
        first = self._parts[0]
        self._whole = first.stack if len(self._parts) == 1 else None
        for part in self._parts:
            if part.stack is not None:
                kept = [k for k in part.layers if k in self._states]
                for k, states in zip(kept, part.stack.states, strict=True):
                    for state, before in zip(states, self._states[k], strict=True):
                        state[...] = before
                    self._states[k] = states

    def _cut_up(self, backend: Any) -> Iterator[_Part]:
        """The layers as native calls, each as long as it can be, and single layers between them."""
        forms = [self._form(k) for k in range(len(self._layers))]
        k = 0
        while k < len(forms):
            end = k
            while end < len(forms) and not isinstance(forms[end], str):
                end += 1
                if end < len(forms) and isinstance(self._layers[end], Embedding):
                    break  # its ids can't come from the call's own values
            if end > k:
                steps = [step for form in forms[k:end] for step in form]
                stack = backend.stack(steps, self.batch_size, self._features(k), masked=k > 0)
                if stack is not None:
                    yield _Part(range(k, end), stack, "")
                else:
                    why = f"the backend {backend.name!r} has no stepping kernels"
                    yield from (_Part(range(j, j + 1), None, why) for j in range(k, end))
                k = end
            else:
                yield _Part(range(k, k + 1), None, str(forms[k]))
                k += 1

    def _features(self, k: int) -> int | None:
        """Columns of layer k's input; None for ids."""
        return None if isinstance(self._layers[k], Embedding) else self._layers[k].build_shape[-1]

    def _form(self, k: int) -> list[native.Step] | str:
        """A layer as the steps of a native call, or why it is none."""
        layer, rank = self._layers[k], 3 if k < self._cut else 2
        shape = layer.build_shape
        if self._backend.xp is not np:
            return f"the backend {self._backend.name!r} has no stepping kernels"
        if layer.dtype != "float32":
            return f"its dtype is {layer.dtype}, the kernels' is float32"
        if isinstance(layer, Embedding):
            rank -= 1
        if not isinstance(shape, tuple) or len(shape) != rank or (rank == 3 and shape[-1] is None):
            return f"its input's shape is {shape}, and not rows of a known length"
        if k >= self._cut and (isinstance(self._form(k - 1), str) or isinstance(layer, (Recurrent, Masking))):
            return "it comes after the last stepped layer, and not directly"
        return _native_form(layer, self._backend.precision)

    def _products(self, layer: Layer) -> str:
        """What the operands of a layer's products are."""
        if is_quantized(layer):
            return "int8"
        ours = any(operation in IN_PRECISION for operation, _ in layer.operations())
        return self._backend.precision if ours else "float32"

    # Stepping

    def _fill(self, stack: Any, k: int, x: np.ndarray) -> None:
        """Write the input of layer k, of the right rank, into the native call that begins there."""
        layer: Any = self._layers[k]
        if isinstance(layer, Embedding):
            one = x.item() if x.size == 1 and x.dtype.kind in "iu" else -1
            if not 0 <= one < layer.input_dim:
                layer.check_input(to_tensor(x, layer.dtype, "x", keeps_integers=True))
        else:
            x = to_tensor(x, layer.dtype, "x").data
            if x.shape[1] != stack.x.shape[1]:
                raise ValueError(
                    f"x: {layer.name} expected {stack.x.shape[1]} features (last axis), got shape {x.shape}"
                )
        stack.x[...] = x

    def _step_by_parts(self, x: np.ndarray) -> np.ndarray:
        y = to_tensor(x[:, None], self._layers[0].dtype, "x", keeps_integers=True)
        with self._model._running(None):
            self._model.move(self._backend)
            y = brought(y, self._backend, "x")
            for part in self._parts:
                k = part.layers[0]
                if part.stack is not None:
                    y = self._step_native(part, y)
                elif k in self._states:
                    y = self._step_recurrent(k, self._layers[k], y)
                else:
                    y = self._layers[k](y, training=False)
        return y.numpy()[:, 0] if self._open else y.numpy()

    def _step_native(self, part: _Part, y: Tensor) -> Tensor:
        """A native call on a tensor, with a time axis as long as there is one to be closed, and the mask."""
        first, end, stack = part.layers.start, part.layers.stop, part.stack
        rows = y.numpy()[:, 0] if first < self._cut else y.numpy()
        self._fill(stack, first, rows)
        if stack.valid is not None:
            stack.valid[...] = True if y.mask is None or first >= self._cut else y.mask[:, 0]
        stack.run()
        if end >= self._cut and not self._open:
            return Tensor(stack.y.copy())
        out = Tensor(stack.y[:, None].copy())
        if stack.masks or y.mask is not None:
            out.mask = stack.valid[:, None].copy()  # type: ignore[index]
        return out

    def _step_recurrent(self, k: int, layer: Any, x: Tensor) -> Tensor:
        layer.check_input(x)
        outputs, final, _ = layer.run(x, tuple(Tensor(s) for s in self._states[k]), x.mask)
        for state, value in zip(self._states[k], final, strict=True):
            state[...] = value.data
        if not layer.return_sequences:
            return final[0]
        outputs = layer.shown(outputs, x.mask)
        outputs.mask = x.mask
        return outputs

    def _checked(self, x: Any) -> np.ndarray:
        array, rank = to_numpy(adopt(x)), 1 if self._takes_ids else 2
        if self.batch_size == 1 and array.ndim == rank - 1:
            array = array[None]
        if array.ndim != rank or array.shape[0] != self.batch_size:
            wanted = (
                f"ids of shape ({self.batch_size},)" if rank == 1 else f"shape ({self.batch_size}, features)"
            )
            raise ValueError(f"x: expected one time step, {wanted}, got shape {np.shape(x)}")
        return array


def _check_out(out: Any, y: np.ndarray) -> None:
    if not isinstance(out, np.ndarray) or out.shape != y.shape or out.dtype.kind != "f":
        came = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out: expected an array of floats of shape {y.shape}, got {came}")


def _written(out: np.ndarray, y: np.ndarray) -> np.ndarray:
    _check_out(out, y)
    out[...] = y
    return out


def _native_form(layer: Any, precision: str) -> list[native.Step] | str:
    """A layer whose input is rows as the steps of a native call, or why it is none."""
    if isinstance(layer, Recurrent):
        return _recurrence(layer, precision)
    kind, values = type(layer), _held
    if kind is Dropout:
        return []
    if kind is Embedding:
        return [native.Lookup(layer.embeddings.data, layer.mask_zero)]
    if kind is TimeDistributed:
        inner = layer.layer
        if inner.has_children():
            return "it applies a layer with layers inside"
        return _native_form(inner, precision)
    if kind is LayerNormalization:
        if not layer.per_step:
            return "it normalises more than the last axis"
        return [native.Normalization(values(layer.gamma), values(layer.beta), layer.epsilon)]
    if kind is Masking:
        return [native.Masking(layer.mask_value)]
    if kind in (Dense, Activation):
        applied = _activation(layer.activation)
        if isinstance(applied, str) or kind is Activation:
            return applied
        if applied and isinstance(applied[0], native.Activation):  # in the dense layer's own equations
            return [native.dense(values(layer.kernel), values(layer.bias), applied[0].name, precision)]
        return [native.dense(values(layer.kernel), values(layer.bias), precision=precision), *applied]
    return f"a {kind.__name__} has no native form"


def _activation(function: Any) -> list[native.Step] | str:
    try:
        name = activations.name_of(function)
    except ValueError:
        return "its activation has no name"
    if name == "linear":
        return []
    if name in ("softmax", "log_softmax"):
        return [native.Softmax(logarithm=name == "log_softmax")]
    try:
        cells.activation_function(name)
    except ValueError:
        return f"the kernels have no {name}"
    return [native.Activation(name)]


def _held(weight: Any) -> Any:
    """What kernels are given of a weight."""
    if weight is None:
        return None
    return weight.matrix if isinstance(weight, QuantizedVariable) else weight.data


def _recurrence(layer: Recurrent, precision: str) -> list[native.Step] | str:
    """A recurrent layer at inference."""
    if layer.zero_output_for_mask:
        return "zero_output_for_mask has no native form"
    x = Tensor(np.zeros((1, 1, layer.kernel.shape[0]), layer.dtype))
    asked = layer.arguments(x, None, None)
    return [
        native.Recurrence(
            asked["cell"], _held(layer.kernel), _held(asked["recurrent_kernel"]), _held(asked["bias"]),
            tuple(p.data for p in asked["params"]), _held(asked["projection"]), asked["aux"], precision=precision,
        )
    ]  # fmt: skip


def _leaves(model: Sequential) -> Iterator[Layer]:
    """The layers in order, those of Sequentials inside included."""
    for layer in model.layers:
        if isinstance(layer, Sequential):
            yield from _leaves(layer)
        else:
            yield layer


def _check_steppable(layer: Layer) -> None:
    if isinstance(layer, Recurrent):
        if layer.go_backwards:
            raise ValueError(
                f"{layer.name}: can't be streamed: go_backwards begins at the end of the sequence"
            )
    elif isinstance(layer, Bidirectional):
        raise ValueError(
            f"{layer.name}: can't be streamed: a Bidirectional also reads from the end of the sequence"
        )
    elif not layer.per_step:
        raise ValueError(
            f"{layer.name}: a {type(layer).__name__} can't be streamed, as it may need more than one time "
            f"step at once; a layer of which that is not so sets per_step = True"
        )
