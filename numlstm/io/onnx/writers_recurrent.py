"""How the recurrent layers and Bidirectional become LSTM, GRU and RNN nodes.

The operators are time-major, so every node stands between transpositions, and they give zeros at the steps beyond a row's
length, where a layer here repeats its output: that is put right behind the node. Where padding stands in front, behind a
layer that goes backwards, the sequence is turned round and read the other way, as lengths count from its start. A coupled
forget gate (`coupled=True`, i = 1 - f) is turned into the operator's coupled input gate by the sign of its weights, as 1 -
sigmoid(f) = sigmoid(-f).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numlstm.io.onnx.exporter import Builder, Mask, Value, refuse, writer
from numlstm.io.onnx.recurrent import LAYERS, layer_weights, onnx_activations
from numlstm.layers import GRU, LSTM, RNN, SLSTM, Bidirectional, IndRNN, SimpleRNN
from numlstm.layers.recurrent import Recurrent

__all__: list[str] = []


class _Node(NamedTuple):
    """What a layer is as a node of one direction."""

    op: str
    activations: tuple[list[str], list[float], list[float]]
    attributes: dict[str, Any]
    weights: dict[str, np.ndarray]  # W, R, B, P without their first axis


def _node(layer: Recurrent) -> _Node:
    """Raises ValueError for options that the operators have not got."""
    if type(layer) not in LAYERS:
        what = f"cell {layer.cell.name}" if isinstance(layer, RNN) else "cell"
        raise refuse(layer, what, f"ONNX has no operator for the equations of {type(layer).__name__}")
    _check(layer)
    op, attributes = LAYERS[type(layer)], {}
    if getattr(layer, "clip", None) is not None:
        attributes["clip"] = layer.clip
    names = {
        "LSTM": ("recurrent_activation", "activation", "output_activation"),
        "GRU": ("recurrent_activation", "activation"),
        "RNN": ("activation",),
    }[op]
    used = [getattr(layer, name) or layer.activation for name in names]
    for name, activation in zip(names, used, strict=True):
        try:
            onnx_activations([activation])
        except ValueError as error:
            raise refuse(layer, name, str(error)) from error
    if op == "GRU":
        attributes["linear_before_reset"] = int(layer.reset_after)
    if op == "LSTM" and layer.coupled:
        attributes["input_forget"] = 1
    return _Node(op, onnx_activations(used), attributes, layer_weights(layer))


def _check(layer: Recurrent) -> None:
    rates = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,)
    for option, given, why in (
        ("layer_norm", layer.layer_norm, "the operator does not normalise its gates"),
        ("cell_clip", layer.cell_clip, "the operator's clip holds the activations' inputs, not the states"),
        ("projection", layer.projection, "the operator's output has as many columns as it has units"),
        ("zoneout", any(rates), "at inference it mixes the old state in, inside the recurrence"),
        ("return_cell_sequence", layer.return_cell_sequence, "the operator gives the last cell state alone"),
    ):
        if given:
            raise refuse(layer, option, why)
    if isinstance(layer, LSTM) and layer.coupled is True:
        alike = layer.recurrent_activation == "sigmoid" or (
            layer.recurrent_activation.startswith("hard_sigmoid")
            and onnx_activations([layer.recurrent_activation])[2] == [0.5]
        )
        if not alike:
            raise refuse(
                layer, "coupled", f"the operator couples f = 1 - i, and 1 - {layer.recurrent_activation}(x) is not "
                f"{layer.recurrent_activation}(-x); coupled='input' can be written"
            )  # fmt: skip


class _Direction(NamedTuple):
    """What came out for one layer."""

    outputs: str  # (batch, time, units), at the place of their inputs, zero beyond the lengths
    states: list[str]  # (batch, units)
    start: list[str]  # the states at first, (batch, units); empty for zeros


def _straight(b: Builder, x: Value) -> tuple[Value, bool]:
    """The sequence with its padding behind, and whether it had to be turned round for that."""
    if x.mask is None or not x.mask.turned:
        return x, False
    mask = Mask(b.flip(x.mask.steps, 1), x.mask.lengths)
    return Value(b.flip(x.name, 1), x.shape, mask), True


def _run(b: Builder, layers: list[Recurrent], backwards: list[bool], x: Value, name: str) -> list[_Direction]:
    """One node for a layer, or for two that are alike but for the direction; else two."""
    nodes = [_node(layer) for layer in layers]
    if len(layers) == 2:
        first, second = nodes
        alike = (first.op, first.attributes, first.weights.keys()) == (
            second.op,
            second.attributes,
            second.weights.keys(),
        ) and layers[0].units == layers[1].units
        if not alike:
            return [
                _run(b, [layer], [back], x, layer.name)[0]
                for layer, back in zip(layers, backwards, strict=True)
            ]
    order = sorted(range(len(layers)), key=lambda k: backwards[k])  # forward first
    node, H = nodes[0], layers[0].units
    lengths = "" if x.mask is None else b.lengths_of(x.mask, layers[0])
    starts = [_start(b, layer) for layer in layers]
    inputs = {"X": b.transpose(x.name, 1, 0, 2)}
    for w in nodes[0].weights:
        inputs[w] = b.array(np.stack([nodes[k].weights[w] for k in order]), f"{name}/{w}")
    inputs["sequence_lens"] = lengths
    for s, place in enumerate(("initial_h", "initial_c")):
        if starts[0][s : s + 1]:
            parts = [b.unsqueeze(starts[k][s], 0) for k in order]
            inputs[place] = parts[0] if len(parts) == 1 else b.node("Concat", *parts, axis=0)
    direction = "bidirectional" if len(layers) == 2 else "reverse" if backwards[0] else "forward"
    functions = [[v for k in order for v in nodes[k].activations[part]] for part in range(3)]
    attributes = {"hidden_size": H, "direction": direction, "activations": functions[0], **node.attributes}
    for option, values in (("activation_alpha", functions[1]), ("activation_beta", functions[2])):
        if values:
            attributes[option] = values
    places = ["X", "W", "R", "B", "sequence_lens", "initial_h"] + ["initial_c", "P"] * (node.op == "LSTM")
    given = [inputs.get(place, "") for place in places]
    while not given[-1]:
        given.pop()
    count = 3 if node.op == "LSTM" else 2
    y, *finals = b.nodes_of(node.op, given, count, name=name, **attributes)
    found = []
    for k in range(len(layers)):
        place = b.constant(order.index(k), "int64")
        steps = b.transpose(b.node("Gather", y, place, axis=1), 1, 0, 2)
        states = [b.node("Gather", final, place, axis=0) for final in finals]
        if lengths and starts[k]:  # a row of length 0 ends where it began; some runtimes give zeros
            some = b.unsqueeze(b.node("Greater", lengths, b.constant(0, "int32")), 1)
            states = [b.node("Where", some, s, at) for s, at in zip(states, starts[k], strict=True)]
        found.append(_Direction(steps, states, starts[k]))
    for layer, direction_ in zip(layers, found, strict=True):
        if layer.stateful or b.states:
            for letter, state in zip(layer.cell.state, direction_.states, strict=True):
                b.states_out.append((f"{layer.name}.final_{letter}", Value(state, (None, H))))
    return found


def _start(b: Builder, layer: Recurrent) -> list[str]:
    """The states to begin with, (batch, units) each, where they are not zeros: by default inputs of the graph."""
    if layer.name not in b.starts and (layer.stateful or b.states):
        b.starts[layer.name] = [
            b.input(f"{layer.name}.initial_{name}", b.dtype, (None, layer.units), ("batch",)).name
            for name in layer.cell.state
        ]
    return b.starts.get(layer.name, [])


def _in_order(b: Builder, y: str, mask: Mask | None, back: bool) -> tuple[str, Mask | None]:
    """Outputs and mask in the order of processing."""
    if not back:
        return y, mask
    return b.flip(y, 1), None if mask is None else Mask(b.flip(mask.steps, 1), mask.lengths, turned=True)


@writer(LSTM, GRU, SimpleRNN, IndRNN, SLSTM, RNN)
def _recurrent(b: Builder, layer: Recurrent, x: Value) -> list[Value]:
    x, turned = _straight(b, x)
    back = layer.go_backwards != turned
    (found,) = _run(b, [layer], [back], x, layer.name)
    H = layer.units
    if layer.return_sequences:
        y = found.outputs
        if x.mask is not None and not layer.zero_output_for_mask:
            kept = b.unsqueeze(x.mask.steps, 2)
            if not back:  # behind its end a row repeats its last output
                repeated = b.unsqueeze(found.states[0], 1)
            else:  # which is read first: nothing has happened yet
                repeated = b.unsqueeze(found.start[0], 1) if found.start else b.constant(0.0)
            y = b.node("Where", kept, y, repeated)
        y, mask = _in_order(b, y, x.mask, back)
        results = [Value(y, (None, None, H), mask)]
    else:
        results = [Value(found.states[0], (None, H))]
    if layer.return_state:
        results += [Value(state, (None, H)) for state in found.states]
    return results


@writer(Bidirectional)
def _bidirectional(b: Builder, layer: Bidirectional, x: Value) -> list[Value]:
    pair = [layer.forward_layer, layer.backward_layer]
    x, turned = _straight(b, x)
    backwards = [inner.go_backwards != turned for inner in pair]
    found = _run(b, pair, backwards, x, layer.name)
    lead: tuple[int | None, ...] = (None,)
    outputs, mask = [d.states[0] for d in found], None
    if layer.return_sequences:  # zero beyond the lengths, as it is here
        lead = (None, None)
        ordered = [_in_order(b, d.outputs, x.mask, backwards[0]) for d in found]
        outputs, mask = [y for y, _ in ordered], ordered[0][1]
    units = [inner.units for inner in pair]
    match layer.merge_mode:
        case "concat":
            merged, units = [b.node("Concat", *outputs, axis=-1)], [sum(units)]
        case "sum":
            merged = [b.node("Add", *outputs)]
        case "mul":
            merged = [b.node("Mul", *outputs)]
        case "ave":
            merged = [b.node("Mul", b.node("Add", *outputs), b.constant(0.5))]
        case _:
            merged = outputs
    results = [Value(y, (*lead, n), mask) for y, n in zip(merged, units, strict=False)]
    if layer.return_state:
        for inner, d in zip(pair, found, strict=True):
            results += [Value(state, (None, inner.units)) for state in d.states]
    return results
