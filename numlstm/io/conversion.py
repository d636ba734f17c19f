"""Gate orders and layouts of recurrent weights: here, in PyTorch, in Keras and in ONNX. The one table of all three.

Here, as in Keras, a kernel is (inputs, G * units), gate after gate along the columns; PyTorch and ONNX have its
transpose, gate after gate along the rows. Gates are named by their letters here: LSTM i f g o (Keras and ONNX call g
"c"), GRU r z n (Keras and ONNX call n "h"), RNN a. A GRU's equations are the same everywhere, h = z h + (1 - z) n.
Sources: the documentation of torch.nn.LSTM, GRU and RNN; Keras' layers/rnn; the ONNX operators LSTM, GRU and RNN.

| | kernel | bias |
|---|---|---|
| here | (I, G H) | (G H); two rows (2, G H), the input's first, with `split_bias` and in a GRU with `reset_after` |
| PyTorch | weight_ih (G H, I), weight_hh (G H, H or P), weight_hr (P, H) | bias_ih (G H), bias_hh (G H), added up |
| Keras | (I, G H) | (G H); (2, G H) in a GRU with `reset_after` |
| ONNX | W (D, G H, I), R (D, G H, H) | B (D, 2 G H), both biases, added up |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = [
    "GATES",
    "from_keras",
    "from_torch",
    "gate_columns",
    "gate_rows",
    "reordered",
    "to_keras",
    "to_torch",
    "torch_units",
]

Array = np.ndarray

# Whose weights, which operator: the gates in the order of their columns (rows, in PyTorch and ONNX).
GATES: dict[str, dict[str, str]] = {
    "numlstm": {"LSTM": "ifgo", "GRU": "rzn", "RNN": "a"},
    "torch": {"LSTM": "ifgo", "GRU": "rzn", "RNN": "a"},
    "keras": {"LSTM": "ifgo", "GRU": "zrn", "RNN": "a"},
    "onnx": {"LSTM": "iofg", "GRU": "zrn", "RNN": "a"},
}


def gate_columns(rows: Array, order: str, gates: Sequence[str]) -> Array:
    """Weights whose gates are rows, in another library's order, as the columns of a kernel here.

    Arguments:
        rows: (G * H, ...), gate after gate in the order given.
        order: that order, by the letters here: a value of `GATES`.
        gates: the gates wanted, in the order of the columns; those left out are not used (a coupled gate).

    Returns (..., len(gates) * H), C-contiguous.

    >>> gate_columns(np.array([[1], [2], [3], [4]]), GATES["onnx"]["LSTM"], "ifgo")
    array([[1, 3, 4, 2]])
    """
    units = rows.shape[0] // len(order)
    blocks = [rows[k * units : (k + 1) * units] for k in map(order.index, gates)]
    return np.ascontiguousarray(np.concatenate(blocks).T)


def gate_rows(columns: Array, gates: Sequence[str], order: str) -> Array:
    """The inverse of `gate_columns`: (..., len(gates) * H) as (G * H, ...) in ONNX's order; a gate that is not
    among `gates` gets zeros.

    >>> gate_rows(np.array([[1, 3, 4, 2]]), "ifgo", GATES["onnx"]["LSTM"]).ravel()
    array([1, 2, 3, 4])
    """
    blocks = dict(zip(gates, np.split(columns.T, len(gates)), strict=True))
    missing = np.zeros_like(next(iter(blocks.values())))
    return np.concatenate([blocks.get(gate, missing) for gate in order])


def reordered(columns: Array, order: str, wanted: Sequence[str]) -> Array:
    """Weights (..., G * H) whose gates come in one order, in another.

    >>> reordered(np.array([1, 1, 2, 2, 3, 3]), GATES["keras"]["GRU"], "rzn").tolist()
    [2, 2, 1, 1, 3, 3]
    """
    units = columns.shape[-1] // len(order)
    blocks = [columns[..., k * units : (k + 1) * units] for k in map(order.index, wanted)]
    return np.concatenate(blocks, axis=-1)


# PyTorch


def torch_units(weights: Mapping[str, Array]) -> tuple[str, int]:
    """Which recurrent module the weights of one direction belong to, and its number of units.

    Arguments:
        weights: by PyTorch's names without layer and direction: weight_ih, weight_hh, and bias_ih, bias_hh,
            weight_hr where there are.

    Raises:
        ValueError: shapes that no LSTM, GRU or RNN has.

    >>> torch_units({"weight_ih": np.zeros((12, 5)), "weight_hh": np.zeros((12, 3))})
    ('LSTM', 3)
    """
    rows, fed_back = weights["weight_hh"].shape
    projection = weights.get("weight_hr")
    units = fed_back if projection is None else projection.shape[1]
    kinds = {4: "LSTM", 3: "GRU", 1: "RNN"} if projection is None else {4: "LSTM"}
    kind = kinds.get(rows // units) if rows % units == 0 else None
    expected = {
        "weight_ih": (rows, weights["weight_ih"].shape[-1]),
        "weight_hr": (fed_back, units),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
    }
    fits = all(weights[name].shape == shape for name, shape in expected.items() if name in weights)
    if kind is None or not fits or ("bias_ih" in weights) != ("bias_hh" in weights):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in weights.items())
        raise ValueError(
            f"weights: expected those of an nn.LSTM (4 gates), GRU (3) or RNN (1): weight_ih (G * H, I), "
            f"weight_hh (G * H, H), both biases (G * H,) or none, and weight_hr (P, H) of an LSTM; got {shapes}"
        )
    return kind, units


def from_torch(kind: str, weights: Mapping[str, Array]) -> list[Array]:
    """One layer and direction of a PyTorch module as the weights of a layer here, in `get_weights`' order.

    The two biases of an LSTM or RNN stay apart, in two rows, unless bias_hh is all zeros, as `to_torch` writes a bias
    that is one: so no bit is lost on the way back. Weights as for `torch_units`.

    >>> [w.shape for w in from_torch("GRU", {"weight_ih": np.zeros((6, 5)), "weight_hh": np.zeros((6, 2))})]
    [(5, 6), (2, 6)]
    """
    order, here = GATES["torch"][kind], GATES["numlstm"][kind]
    found = [gate_columns(weights[name], order, here) for name in ("weight_ih", "weight_hh")]
    if "bias_ih" in weights:
        pair = np.stack([reordered(weights[name], order, here) for name in ("bias_ih", "bias_hh")])
        one = kind != "GRU" and not pair[1].any() and not np.signbit(pair[1]).any()
        found.append(pair[0].copy() if one else pair)
    if "weight_hr" in weights:
        found.append(np.ascontiguousarray(weights["weight_hr"].T))
    return found


def to_torch(kind: str, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `from_torch`: weights by their names here (kernel, recurrent_kernel, bias, projection)."""
    here, order = GATES["numlstm"][kind], GATES["torch"][kind]
    found = {
        "weight_ih": gate_rows(weights["kernel"], here, order),
        "weight_hh": gate_rows(weights["recurrent_kernel"], here, order),
    }
    if "bias" in weights:
        bias = reordered(weights["bias"], here, order)
        both = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])
        found |= {"bias_ih": both[0], "bias_hh": both[1]}
    if "projection" in weights:
        found["weight_hr"] = np.ascontiguousarray(weights["projection"].T)
    return found


# Keras


def from_keras(kind: str, weights: Sequence[Array]) -> list[Array]:
    """A Keras layer's kernel, recurrent kernel and bias as the weights of a layer here.

    >>> from_keras("GRU", [np.array([[1, 2, 3]])])[0].tolist()
    [[2, 1, 3]]
    """
    order, here = GATES["keras"][kind], GATES["numlstm"][kind]
    return [reordered(w, order, here) for w in weights]


def to_keras(kind: str, weights: Sequence[Array]) -> list[Array]:
    """The inverse of `from_keras`."""
    here, order = GATES["numlstm"][kind], GATES["keras"][kind]
    return [reordered(w, here, order) for w in weights]
