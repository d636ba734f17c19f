"""A model run one time step at a time, on inputs that never end: sensors, speech, text as it is written.

A stream keeps the recurrent states itself, apart from the model's, so that several can run on one model.
After t steps its output is what `model.predict` would give for those t steps (with `return_sequences` in the
last layer: the last of them).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from numlstm.autograd import Tensor
from numlstm.layers.base import Layer, positive, to_tensor
from numlstm.layers.bidirectional import Bidirectional
from numlstm.layers.core import Embedding, InputLayer
from numlstm.layers.recurrent import Recurrent, checked_rows
from numlstm.models import Model, Sequential

__all__ = ["Stream"]


class Stream:
    """Step by step through a `Sequential`; made by `model.stream(batch_size)`.

    The layers up to the last recurrent one with `return_sequences=False` (or to the end) are stepped:
    recurrent layers, and layers whose output at a step depends on that step alone (Dense, Embedding, Dropout,
    LayerNormalization, ...). What comes after has no time axis and may be anything.

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
        cut = ends[0] + 1 if ends else len(layers)
        self._stepped, self._rest = layers[:cut], layers[cut:]
        for layer in self._stepped:
            _check_steppable(layer)
        self._takes_ids = isinstance(layers[0], Embedding)
        self._states: dict[int, tuple[np.ndarray, ...]] = {}
        self.reset()

    def step(self, x: Any) -> np.ndarray:
        """Feed one time step; the output after it.

        Arguments:
            x: (batch, features), or integer ids (batch,) for a model that begins with an Embedding. One row
                may come without its batch axis when `batch_size` is 1.

        Returns (batch, ...): what `predict` gives for the steps so far.

        Raises:
            ValueError: another shape.
        """
        y = to_tensor(self._checked(x)[:, None], self._stepped[0].dtype, "x", keeps_integers=True)
        with self._model._running(None):  # on the backend that `compile` chose, as in predict
            for k, layer in enumerate(self._stepped):
                y = (
                    self._step_recurrent(k, layer, y)
                    if isinstance(layer, Recurrent)
                    else layer(y, training=False)
                )
            if self._open:
                y = y[:, 0]
            for layer in self._rest:
                y = layer(y, training=False)
        return np.array(y.numpy())

    def reset(self, rows: Any = None) -> None:
        """Back to the beginning: zero states, for all rows or for those given (an index, indices, or a bool
        mask)."""
        index: Any = slice(None) if rows is None else checked_rows(rows, self.batch_size)
        for k, layer in enumerate(self._stepped):
            if isinstance(layer, Recurrent):
                if k not in self._states:
                    self._states[k] = tuple(
                        np.zeros((self.batch_size, width), layer.dtype) for width in layer.state_widths
                    )
                for state in self._states[k]:
                    state[index] = 0

    @property
    def states(self) -> list[tuple[np.ndarray, ...]]:
        """Copies of the states (batch, units) of each recurrent layer, to be put back with `set_states`."""
        return [tuple(s.copy() for s in states) for states in self._states.values()]

    def set_states(self, states: list[tuple[np.ndarray, ...]]) -> None:
        """Go on from states that another stream (or this one, earlier) had. Raises ValueError on a misfit."""
        mine = list(self._states.values())
        if [[np.shape(s) for s in group] for group in states] != [[s.shape for s in group] for group in mine]:
            raise ValueError("states: expected what `states` of a stream of this model and batch size gave")
        for group, values in zip(mine, states, strict=True):
            for state, value in zip(group, values, strict=True):
                state[...] = value

    @property
    def _open(self) -> bool:
        """Is there still a time axis after the stepped layers?"""
        last = self._stepped[-1]
        return not (isinstance(last, Recurrent) and not last.return_sequences)

    def _step_recurrent(self, k: int, layer: Recurrent, x: Tensor) -> Tensor:
        layer.check_input(x)
        outputs, final, _ = layer.run(x, tuple(Tensor(s) for s in self._states[k]), x.mask)
        self._states[k] = tuple(np.array(f.numpy()) for f in final)
        if not layer.return_sequences:
            return final[0]
        outputs = layer.shown(outputs, x.mask)
        outputs.mask = x.mask
        return outputs

    def _checked(self, x: Any) -> np.ndarray:
        array, rank = np.asarray(x), 1 if self._takes_ids else 2
        if self.batch_size == 1 and array.ndim == rank - 1:
            array = array[None]
        if array.ndim != rank or array.shape[0] != self.batch_size:
            wanted = (
                f"ids of shape ({self.batch_size},)" if rank == 1 else f"shape ({self.batch_size}, features)"
            )
            raise ValueError(f"x: expected one time step, {wanted}, got shape {np.shape(x)}")
        return array


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
