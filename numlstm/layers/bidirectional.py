"""Bidirectional: a recurrent layer and its mirror image, one from each end of the sequence (Schuster & Paliwal
1997), with the semantics of Keras 3.

Two layers of equal options, but for the direction, and each with weights of its own, run in one call of the
backend; the second one's outputs are turned round in time, so that both speak of the same step where they are
merged. With a mask, the steps that it leaves out have outputs of zero, unlike those of a recurrent layer by itself,
which repeat the last unless it has `zero_output_for_mask`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from numlstm import ops
from numlstm.autograd import Tensor
from numlstm.layers.base import Layer, Shape, flat, from_config, registry
from numlstm.layers.recurrent import Recurrent
from numlstm.registry import constructor_parameters

MERGE_MODES = ("concat", "sum", "mul", "ave", None)


@registry.register()
class Bidirectional(Layer):
    """A recurrent layer over a sequence in both directions.

    Weights: the forward layer's, then the backward one's. `initial_state` and, with the layer's `return_state`,
    the last states come in the same order. The options `return_sequences`, `return_state`, `stateful`, dropout
    and the like are the layer's.

    Arguments:
        layer: a recurrent layer, not built; two copies of it are made, `forward_<name>` and `backward_<name>`,
            which reads the other way. With `go_backwards=True` it is the first that reads the time axis from its
            end, and the outputs of all steps (and their mask) come in its order, as without Bidirectional.
        merge_mode: how the two outputs become one: "concat" along the features, "sum", "mul", "ave", or None
            for both, in a list.
        backward_layer: in place of the second copy; its `go_backwards` is the other of the layer's.

    Raises:
        ValueError: not a recurrent layer, an unknown merge mode, or two layers that don't go together.

    >>> from numlstm.layers import LSTM
    >>> layer = Bidirectional(LSTM(4, return_sequences=True, name="lstm"))
    >>> layer(np.zeros((2, 5, 3))).shape, layer.backward_layer.name
    ((2, 5, 8), 'backward_lstm')
    """

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"

    def __init__(
        self, layer: Any, merge_mode: str | None = "concat", *, backward_layer: Any = None, **options: Any
    ) -> None:
        layer = checked_layer("layer", layer)
        if layer.built:
            raise ValueError(
                f"layer: {layer.name} is built already, but only its options are copied, for both directions: "
                f"expected a layer without weights"
            )
        if options.get("input_shape") is None:
            options["input_shape"] = layer.input_shape
        if options.get("dtype") is None:
            options["dtype"] = layer.dtype
        super().__init__(**options)
        if merge_mode not in MERGE_MODES:
            raise ValueError(f"merge_mode: expected one of {MERGE_MODES}, got {merge_mode!r}")
        self.merge_mode = merge_mode
        self.forward_layer: Recurrent = copied(layer, "forward")
        if backward_layer is None:
            self.backward_layer: Recurrent = copied(layer, "backward", go_backwards=not layer.go_backwards)
        else:
            self.backward_layer = checked_layer("backward_layer", backward_layer)
        self._check_pair()

    def _check_pair(self) -> None:
        forward, backward = self.forward_layer, self.backward_layer
        if forward.go_backwards == backward.go_backwards:
            raise ValueError(
                f"go_backwards: expected True of one of layer and backward_layer and False of the other, got "
                f"{forward.go_backwards} and {backward.go_backwards}"
            )
        for option in ("return_sequences", "return_state", "stateful"):
            a, b = getattr(forward, option), getattr(backward, option)
            if a != b:
                raise ValueError(f"{option}: expected the same of both layers, got {a} forward, {b} backward")
        if self.merge_mode not in ("concat", None) and forward.output_units != backward.output_units:
            raise ValueError(
                f"merge_mode: {self.merge_mode!r} takes layers of equal units, got {forward.output_units} and "
                f"{backward.output_units}"
            )
        for layer in (forward, backward):
            if layer.dtype != self.dtype:
                raise ValueError(f"dtype: expected {layer.name}'s, {layer.dtype}, got {self.dtype}")

    # What is asked of a wrapper is asked of its layers

    @property
    def layer(self) -> Recurrent:
        """The forward layer, from which the configuration is taken."""
        return self.forward_layer

    @property
    def return_sequences(self) -> bool:
        """The outputs of all steps, or of the last ones read."""
        return self.forward_layer.return_sequences

    @property
    def return_state(self) -> bool:
        """The last states too: the forward layer's, then the backward one's."""
        return self.forward_layer.return_state

    @property
    def stateful(self) -> bool:
        """Both layers go on from their last states."""
        return self.forward_layer.stateful

    def reset_states(self, rows: Any = None) -> None:
        """Forget the kept states: of all rows, or of those given (an index, indices, or a bool mask)."""
        self.forward_layer.reset_states(rows)
        self.backward_layer.reset_states(rows)

    def reset_state(self, rows: Any = None) -> None:
        """`reset_states` under Keras 3's name."""
        self.reset_states(rows)

    def rank_hint(self, shape: Sequence[int | None]) -> str:
        """What a person who forgot an axis most likely wants."""
        return self.forward_layer.rank_hint(shape)

    # Running

    def build(self, input_shape: Shape) -> None:
        """Make both layers' weights for inputs (batch, time, features)."""
        self.forward_layer.ensure_built(input_shape)
        self.backward_layer.ensure_built(input_shape)

    def call(
        self, inputs: Tensor, initial_state: Any = None, mask: Any = None, training: bool = False
    ) -> Tensor | list[Tensor]:
        """Run over a batch of sequences in both directions.

        Arguments:
            inputs: (batch, time, features).
            initial_state: the forward layer's states, then the backward one's, (batch, units) each, in a list;
                by default zeros, or the kept states.
            mask: bool (batch, time): where it is False the states stay as they are, and the output is zero.
            training: whether dropout is applied.

        Returns the merged output (two, with `merge_mode=None`), and with `return_state` a list: the output,
        then the last states.
        """
        forward, backward = self._run(inputs, self._halves(initial_state), mask, training)
        outputs = self._merge(forward[0], backward[0])
        for output in outputs:
            output.mask = self.compute_mask(inputs, mask)
        results = [*outputs, *forward[1:], *backward[1:]]
        return results if len(results) > 1 else results[0]

    def _halves(self, given: Any) -> tuple[Any, Any]:
        """The states to begin with, for each direction."""
        if given is None:
            return None, None
        forward, backward = self.forward_layer.cell.state, self.backward_layer.cell.state
        states = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(states) != len(forward) + len(backward):
            raise ValueError(
                f"{self.name}: initial_state: expected {len(forward) + len(backward)} "
                f"(forward {', '.join(forward)}, then backward {', '.join(backward)}), got {len(states)}"
            )
        return states[: len(forward)], states[len(forward) :]

    def _run(self, inputs: Tensor, starts: tuple[Any, Any], mask: Any, training: bool) -> list[list[Tensor]]:
        """Each direction's output in the forward layer's order, then its states asked for."""
        layers = (self.forward_layer, self.backward_layer)
        if all(type(layer).call is Recurrent.call and type(layer).run is Recurrent.run for layer in layers):
            found = self._run_together(inputs, starts, mask, training)
        else:  # a layer with a call of its own
            found = [
                layer(inputs, initial_state=start, mask=mask)
                for layer, start in zip(layers, starts, strict=True)
            ]
        return [self._as_read(layer, y, mask) for layer, y in zip(layers, found, strict=True)]

    def _run_together(self, inputs: Tensor, starts: tuple[Any, Any], mask: Any, training: bool) -> list[Any]:
        """What the calls of both layers give, but in one call of the backend."""
        layers, questions = (self.forward_layer, self.backward_layer), []
        for layer, start in zip(layers, starts, strict=True):
            layer.check_input(inputs)
            layer._start_losses(self._root)
            questions.append(layer.question(inputs, start, mask, training))
        found = []
        for layer, answer in zip(layers, ops.recurrent_pair(*questions), strict=True):
            results = layer.results(*answer, mask)
            if layer.activity_regularizer is not None:
                for output in flat(results):
                    layer.add_loss(layer.activity_regularizer(output))
            found.append(results)
        return found

    def _as_read(self, layer: Recurrent, results: Any, mask: Any) -> list[Tensor]:
        """The output of one direction in the forward layer's order, then the states asked for."""
        output, *states = flat(results)
        if layer.return_sequences:
            if layer is not self.forward_layer:
                output = ops.flip(output, axis=1)
            if mask is not None:
                valid = self.compute_mask(None, mask)
                output = output * Tensor(valid[..., None].astype(self.dtype))
        return [output, *states]

    def _merge(self, a: Tensor, b: Tensor) -> list[Tensor]:
        match self.merge_mode:
            case "concat":
                return [ops.concatenate([a, b], axis=-1)]
            case "sum":
                return [a + b]
            case "mul":
                return [a * b]
            case "ave":
                return [(a + b) * 0.5]
        return [ops.reshape(a, a.shape), ops.reshape(b, b.shape)]  # tensors of our own, to carry our mask

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """With `return_sequences` the mask goes on, in the order of the outputs."""
        return self.forward_layer.compute_mask(inputs, mask)

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """The merged output's shape, in a list if there are other results."""
        pair = []
        for layer in (self.forward_layer, self.backward_layer):
            shapes = layer.compute_output_shape(input_shape)
            pair.append(shapes if isinstance(shapes, list) else [shapes])
        (a, *forward), (b, *backward) = pair
        merged = {"concat": [(*a[:-1], a[-1] + b[-1])], None: [a, b]}.get(self.merge_mode, [a])
        shapes = [*merged, *forward, *backward]
        return shapes if len(shapes) > 1 else shapes[0]


def checked_layer(argument: str, layer: Any) -> Recurrent:
    """A recurrent layer, or a saved one. Raises ValueError when it can't be run in both directions."""
    layer = from_config(layer) if isinstance(layer, Mapping) else layer
    if not isinstance(layer, Recurrent):
        found = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        raise ValueError(f"{argument}: expected a recurrent layer, such as nl.LSTM(units), got {found}")
    if layer.return_cell_sequence:
        raise ValueError(
            f"{argument}: {layer.name} has return_cell_sequence, which Bidirectional does not give"
        )
    return layer


def copied(layer: Recurrent, direction: str, **changes: Any) -> Recurrent:
    """A layer of the same options, with no weights yet, under the name of its direction."""
    options = {name: getattr(layer, name) for name in constructor_parameters(type(layer))}
    options["name"] = f"{direction}_{layer.name.removeprefix(f'{direction}_')}"
    return type(layer)(**{**options, **changes})
