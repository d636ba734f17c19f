"""Models: layers put together, with everything that is done to the whole: training, saving, streaming,
summary.

`Sequential` is a list of layers; any other graph is a subclass of `Model` whose `call` is ordinary Python
over tensors. `compile`, `fit`, `evaluate` and `predict` come from `training.Trainer`.
"""

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numlstm.autograd import Tensor
from numlstm.io.native import load_model
from numlstm.layers.base import Layer, Shape, from_config, registry, to_config
from numlstm.layers.recurrent import Recurrent
from numlstm.progress import html_table
from numlstm.quantization import is_quantized, quantize
from numlstm.registry import serialize
from numlstm.training import Trainer

__all__ = ["Model", "Sequential", "load_model"]


@registry.register()
class Model(Trainer, Layer):
    """A layer made of layers, which can be trained and saved.

    A subclass makes its layers in `__init__` (as attributes, or in lists) and computes with them in
    `call(self, x)`; the tape differentiates whatever it does. Constructor arguments kept in attributes of the
    same name make it savable; `nl.register_layer`, or `custom_objects=` when loading, makes the class known
    to `nl.load`.

    >>> import numpy as np
    >>> from numlstm.layers import LSTM, Dense
    >>> class Classifier(Model):
    ...     def __init__(self, units, classes):
    ...         super().__init__()
    ...         self.units, self.classes = units, classes
    ...         self.encoder = LSTM(units)
    ...         self.head = Dense(classes, activation="softmax")
    ...     def call(self, x):
    ...         return self.head(self.encoder(x))
    >>> Classifier(8, 3)(np.zeros((2, 5, 4))).shape
    (2, 3)
    """

    keeps_integers = True  # the layers inside convert what they need to
    preprocessing: dict[str, Any] | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers directly inside."""
        return [layer for _, layer in self.children()]

    def get_layer(self, name: str | None = None, index: int | None = None) -> Layer:
        """A layer inside, by its name or its place. Raises ValueError when there is none."""
        layers = self.layers
        if (name is None) == (index is None):
            raise ValueError("get_layer: expected either name or index")
        if index is not None:
            if not -len(layers) <= index < len(layers):
                raise ValueError(f"index: {self.name} has {len(layers)} layers, got {index}")
            return layers[index]
        for layer in layers:
            if layer.name == name:
                return layer
        raise ValueError(
            f"name: no layer {name!r} in {self.name}; there are {', '.join(x.name for x in layers)}"
        )

    def prepare(self, input_shape: Any) -> None:
        """Only a `build` that the subclass defines is run; the layers inside build themselves."""
        if type(self).build is not Layer.build:
            self.ensure_built(input_shape)

    def check_input(self, inputs: Any) -> None:
        """The layers inside check what reaches them."""

    # Recurrent states

    def recurrent_layers(self) -> list[Recurrent]:
        """Every recurrent layer inside, at any depth."""
        return [layer for _, layer in self.walk() if isinstance(layer, Recurrent)]

    def reset_states(self, rows: Any = None) -> None:
        """Forget the states that stateful layers keep: of all rows, or of those given."""
        for layer in self.recurrent_layers():
            layer.reset_states(rows)

    def reset_state(self, rows: Any = None) -> None:
        """`reset_states` under Keras 3's name."""
        self.reset_states(rows)

    def carry_states(self, carry: bool) -> None:
        """Let all recurrent layers go on from their last states (True), or start from zeros again (False)."""
        for layer in self.recurrent_layers():
            layer.carry = carry
            if not carry and not layer.stateful:
                layer.reset_states()

    def stream(self, batch_size: int = 1) -> Any:
        """Run step by step on endless inputs: see `numlstm.streaming.Stream`.

        Raises:
            ValueError: a layer that needs the whole sequence at once, a model that is not built or not
                Sequential.
        """
        from numlstm.streaming import Stream

        return Stream(self, batch_size)

    def quantize(self, scheme: str = "int8") -> "Model":
        """A copy for inference whose recurrent and dense layers have int8 weights; this model stays as it is.

        Weights take a quarter of the memory, in files too, and products run several times faster. Each column
        of a matrix has a float32 scale; what it is multiplied by is brought to int8 as it comes, row by row, and
        sums are whole numbers (kernels/int8.py says how far a product may be off). All else is float32.
        Everything but training works: masks, states, streaming, saving.

        Arguments:
            scheme: "int8".

        Raises:
            ValueError: another scheme; a model that is not built, is quantized already or has no such layer; a
                layer of float64; weights that are not finite.

        >>> import numpy as np
        >>> from numlstm.layers import LSTM, Dense
        >>> model = Sequential([LSTM(32, input_shape=(None, 3)), Dense(1)])
        >>> small, x = model.quantize("int8"), np.ones((2, 5, 3), np.float32)
        >>> bool(np.allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=0.02))
        True
        """
        return quantize(self, scheme)

    # Files

    def save(
        self,
        path: str | os.PathLike[str],
        include_optimizer: bool = False,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model to one `.safetensors` file, whole or not at all; `nl.load` reads it.

        Arguments:
            path: where to; must end in ".safetensors".
            include_optimizer: also what the optimizer knows, so that training can go on from the file.
            preprocessing: JSON-able, for whoever prepares inputs (vocabulary, scaling); by default what the
                model has in its attribute `preprocessing`, where it is put back on loading.

        Raises:
            ValueError: another file ending, a model that is not built, or one that could not be rebuilt from
                a file.
        """
        from numlstm.io.native import save_model

        save_model(self, path, include_optimizer=include_optimizer, preprocessing=preprocessing)

    # For people

    def summary(self, print_fn: Callable[[str], Any] | None = None, width: int | None = None) -> None:
        """Print the layers with output shapes and numbers of weights, or hand each line to `print_fn`."""
        from rich.console import Console

        buffer = io.StringIO()
        console = Console(file=buffer, width=width or 80, color_system=None)
        console.print(self)
        for line in buffer.getvalue().rstrip().splitlines():
            (print_fn or print)(line.rstrip())

    def __rich__(self) -> Any:
        """What `rich.print(model)` shows, and `summary` in plain text."""
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        title, heading, rows, notes = self._described()
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
        for k, name in enumerate(heading):
            table.add_column(name, justify="right" if k == len(heading) - 1 else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        return Group(table, *map(Text, notes))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        title, heading, rows, notes = self._described()
        return html_table(title, heading, rows, " ".join(notes))

    def _described(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Title, heading, a row for each layer, and notes below."""
        rows = []
        for layer in self.layers:
            kind = type(layer).__name__ + (", int8" if is_quantized(layer) else "")
            count = f"{layer.count_params():,}" if layer.built else "not built"
            rows.append([f"{layer.name} ({kind})", output_shape(layer), count])
        notes = [
            f"Total: {_amount(self.weights)}",
            f"Trained: {_amount(self.trainable_weights)}. Fixed: {_amount(self.non_trainable_weights)}.",
        ]
        return (
            f"{type(self).__name__} {self.name!r}",
            ["Layer (type)", "Output shape", "Weights"],
            rows,
            notes,
        )


@registry.register()
class Sequential(Model):
    """Layers one after the other.

    With `input_shape` in the first layer (or an `Input` before it) the weights are made at once; otherwise at
    the first call. Declared numbers of time steps are not enforced: recurrent layers take sequences of any
    length.

    Arguments:
        layers: the layers, in order.

    Raises:
        ValueError: something that is not a layer, a name used twice, or layers whose shapes don't fit each
            other.

    >>> from numlstm.layers import LSTM, Dense
    >>> model = Sequential([LSTM(50, input_shape=(10, 1)), Dense(1)])
    >>> [w.shape for w in model.weights]
    [(1, 200), (50, 200), (200,), (50, 1), (1,)]
    """

    def __init__(self, layers: Sequence[Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if layers is not None and not isinstance(layers, (list, tuple)):
            raise ValueError(f"layers: expected a list of layers, got {type(layers).__name__}")
        self._layers: list[Layer] = []
        # Output shape so far: None until an input shape is known, or past a layer whose output only a call
        # can tell.
        self._shape: Shape | None = None
        for layer in layers or ():
            self.add(
                layer if isinstance(layer, Layer) or not isinstance(layer, Mapping) else from_config(layer)
            )

    @property
    def layers(self) -> list[Layer]:
        """The layers, in order (a copy of the list)."""
        return list(self._layers)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers, by their own names."""
        for layer in self._layers:
            yield layer.name, layer

    def add(self, layer: Layer) -> None:
        """Append a layer; builds it when the shape of its input is known."""
        if isinstance(layer, type):
            raise ValueError(
                f"layer: got the class {layer.__name__}, expected a layer: {layer.__name__}(...)"
            )
        if not isinstance(layer, Layer):
            raise ValueError(f"layer: expected a layer, got {layer!r} of type {type(layer).__name__}")
        if any(layer.name == other.name for other in self._layers):
            raise ValueError(
                f"layer: {self.name} has a layer named {layer.name!r} already: names must differ"
            )
        self._append(layer)

    def _append(self, layer: Layer) -> None:
        shape = self._shape
        if not self._layers:
            declared = layer.input_shape or self.input_shape
            shape = (None, *declared) if declared is not None else layer.build_shape
        after = None if shape is None else self._pass(layer, shape)
        self._layers.append(layer)
        if len(self._layers) == 1:
            self._first_shape = shape
        self._shape = after
        self.built: bool = shape is not None
        self.build_shape: Any = self._first_shape if self.built else None

    def _pass(self, layer: Layer, shape: Shape) -> Shape | None:
        """Build `layer` for this input; the shape of its output, None if it can't tell."""
        layer.ensure_built(shape)
        try:
            after = layer.compute_output_shape(shape)
        except NotImplementedError:
            return None
        if isinstance(after, list):
            raise ValueError(
                f"{layer.name}: gives {len(after)} results, but a Sequential hands on one: leave out "
                f"return_state, return_cell_sequence and merge_mode=None, or subclass nl.Model"
            )
        return after

    def pop(self) -> Layer:
        """Take the last layer away, and give it back. Raises ValueError when there is none."""
        if not self._layers:
            raise ValueError(f"{self.name}: pop from a model without layers")
        *kept, last = self._layers
        self._layers, self._shape, self.built, self.build_shape = [], None, False, None
        for layer in kept:
            self._append(layer)
        return last

    def build(self, input_shape: Shape) -> None:
        """Build every layer for this input shape, batch first. Raises ValueError if that takes a call."""
        shape: Shape | None = tuple(input_shape)
        for layer in self._layers:
            if shape is None:
                raise ValueError(
                    f"{self.name}: {layer.name} can only be built by a call on data: see compute_output_shape"
                )
            shape = self._pass(layer, shape)
        self._shape = shape

    def prepare(self, input_shape: Any) -> None:
        """Nothing: at a first call each layer is built for what reaches it."""

    def call(self, inputs: Tensor) -> Tensor:
        """Each layer on the output of the one before."""
        self._check_layers()
        for layer in self._layers:
            inputs = layer(inputs)
        return inputs

    def _check_layers(self) -> None:
        if not self._layers:
            raise ValueError(f"{self.name}: has no layers; add some first")

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """The last layer's."""
        for layer in self._layers:
            input_shape = layer.compute_output_shape(input_shape)
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Name and layers."""
        options = {
            name: serialize(getattr(self, name)) for name in ("name", "trainable", "dtype", "input_shape")
        }
        return {**options, "layers": [to_config(layer) for layer in self._layers]}


def output_shape(layer: Layer) -> str:
    """The shape of a layer's output for people: "(any, 10, 50)", or "?" where only a call can tell."""
    if not layer.built:
        return "?"
    try:
        shape = layer.compute_output_shape(layer.build_shape)
    except NotImplementedError:
        return "?"
    return ", ".join(map(_shape_text, shape if isinstance(shape, list) else [shape]))


def _shape_text(shape: Shape) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"


def _amount(variables: Sequence[Any]) -> str:
    """ "41 (164 B)"."""
    count, size = sum(v.size for v in variables), float(sum(v.data.nbytes for v in variables))
    step = min(int(math.log(size, 1024)), 3) if size else 0
    return f"{count:,} ({size / 1024**step:.{2 if step else 0}f} {('B', 'KB', 'MB', 'GB')[step]})"
