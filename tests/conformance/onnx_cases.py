"""What the ONNX operators are asked: the options and shapes that onnx's own node tests leave out.

Those 18 know no lengths shorter than the sequence, no clip, no activations, no coupled gates, no initial states but
zeros. Inputs come from a NumPy seed, the question's name; they are float32 numbers, so that every precision is asked
the same.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, helper, numpy_helper

INPUTS = {
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}
OUTPUTS = {"LSTM": ("Y", "Y_h", "Y_c"), "GRU": ("Y", "Y_h"), "RNN": ("Y", "Y_h")}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = ("forward", "reverse", "bidirectional")
PARAMETERS = {  # activations and which of alpha and beta they have
    "Relu": "", "Tanh": "", "Sigmoid": "", "Affine": "ab", "LeakyRelu": "a", "ThresholdedRelu": "a",
    "ScaledTanh": "ab", "HardSigmoid": "ab", "Elu": "a", "Softsign": "", "Softplus": "",
}  # fmt: skip

# Where ONNX Runtime is not compared, and why; the live tests hold that it is so.
CLIP = "it does not clip the cell on its way to the activation h (microsoft/onnxruntime#27224)"
EMPTY = "a row of length 0 ends in zeros there, not in its initial state"
LAYOUT = "it refuses layout 1"
DEFAULTS = "alpha and beta that are not given are 0 there"


class Case(NamedTuple):
    """One node. `optional`: the inputs it has beside X, W and R. `lengths`: of its rows, None for none given.
    `not_compared`: why ONNX Runtime's answer is not the one expected. `fused`: whether the fused kernels are asked every
    time, or by the live tests alone: each cell takes a second or more to compile."""

    name: str
    op: str
    attributes: dict[str, Any]
    optional: tuple[str, ...] = ("B", "initial_h", "initial_c")
    lengths: tuple[int, ...] | None = None
    not_compared: str | None = None
    fused: bool = True
    T: int = 5
    B: int = 4
    I: int = 3
    H: int = 6

    @property
    def directions(self) -> int:
        return 2 if self.attributes.get("direction") == "bidirectional" else 1

    @property
    def layout(self) -> int:
        return self.attributes.get("layout", 0)

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS[self.op]


def rounded(*values: float) -> list[float]:
    """Attributes are stored as float32."""
    return [float(np.float32(v)) for v in values]


SHORT, EMPTY_ROW = (5, 3, 1, 4), (2, 5, 0, 3)
(LIMIT,) = rounded(0.3)


def _cases() -> list[Case]:
    found = []
    for op in INPUTS:
        found.append(Case(f"{op}-bare", op, {}, ()))
        for direction in DIRECTIONS:
            name, a = f"{op}-{direction}", {"direction": direction}
            found += [
                Case(f"{name}-states", op, a),
                Case(f"{name}-lengths", op, a, lengths=SHORT),
                Case(f"{name}-none-full", op, a, ("B",), lengths=(4, 2, 3, 1)),
                Case(f"{name}-empty-row", op, a, lengths=EMPTY_ROW, not_compared=EMPTY),
                Case(f"{name}-clip", op, a | {"clip": LIMIT}, lengths=SHORT,
                     not_compared=CLIP if op == "LSTM" else None),
            ]  # fmt: skip
        a = {"direction": "bidirectional", "layout": 1}
        found.append(Case(f"{op}-layout", op, a, lengths=EMPTY_ROW, not_compared=LAYOUT))
    found += _lstm() + _gru()
    for op in INPUTS:
        found += _activations(op)
    return found


def _lstm() -> list[Case]:
    full, found = ("B", "initial_h", "initial_c", "P"), []
    for direction in DIRECTIONS:
        name, a = f"LSTM-{direction}", {"direction": direction}
        found += [
            Case(f"{name}-peepholes", "LSTM", a, full, lengths=SHORT),
            Case(f"{name}-coupled", "LSTM", a | {"input_forget": 1}, lengths=SHORT),
            Case(f"{name}-coupled-peepholes", "LSTM", a | {"input_forget": 1}, full, fused=False),
        ]
    both = {"direction": "bidirectional", "clip": LIMIT}
    found += [
        Case("LSTM-peepholes-clip", "LSTM", both, full, not_compared=CLIP, fused=False),
        Case("LSTM-coupled-peepholes-clip", "LSTM", both | {"input_forget": 1}, full, lengths=EMPTY_ROW,
             not_compared=CLIP),
        Case("LSTM-peepholes-alone", "LSTM", {}, ("P",)),
        Case("LSTM-initial-c-alone", "LSTM", {}, ("initial_c",)),
    ]  # fmt: skip
    return found


def _gru() -> list[Case]:
    found = []
    for direction in DIRECTIONS:
        name, a = f"GRU-{direction}-linear", {"direction": direction, "linear_before_reset": 1}
        found += [
            Case(name, "GRU", a, lengths=SHORT),
            Case(f"{name}-clip", "GRU", a | {"clip": LIMIT}, fused=False),
            Case(f"{name}-empty-row", "GRU", a, lengths=EMPTY_ROW, not_compared=EMPTY),
        ]
    found.append(Case("GRU-linear-bare", "GRU", {"linear_before_reset": 1}, ()))
    return found


def _activations(op: str) -> list[Case]:
    """Every activation in every place, with values of its own for alpha and beta, a node for two directions; and in an
    RNN also with the defaults. Two LSTM nodes bring every activation to the fused kernels."""
    fused = {"LSTM": (1, 2), "GRU": (1,), "RNN": (3,)}[op]
    names, each = list(PARAMETERS), {"LSTM": 3, "GRU": 2, "RNN": 1}[op]
    chosen = [[names[(k + 3 * slot) % len(names)] for slot in range(each)] for k in range(len(names) + 1)]
    found = []
    for k, (first, second) in enumerate(zip(chosen[::2], chosen[1::2], strict=True)):
        both = first + second
        # no two alike, so that a value that goes to the wrong activation shows
        alphas = rounded(*(0.25 + 0.125 * k for k in range(sum("a" in PARAMETERS[n] for n in both))))
        betas = rounded(*(0.55 + 0.0625 * k for k in range(sum("b" in PARAMETERS[n] for n in both))))
        a = {"direction": "bidirectional", "activations": both}
        a |= {"activation_alpha": alphas} if alphas else {}
        a |= {"activation_beta": betas} if betas else {}
        a |= {"linear_before_reset": k % 2} if op == "GRU" else {}
        found.append(Case(f"{op}-{'-'.join(both)}", op, a, lengths=SHORT, fused=k in fused))
    if op == "RNN":
        for name in names:
            if name != "ScaledTanh":  # it has no defaults
                deviates = name in ("Affine", "ThresholdedRelu")
                found.append(
                    Case(f"RNN-{name}-defaults", op, {"activations": [name]}, ("B",),
                         not_compared=DEFAULTS if deviates else None, fused=False)
                )  # fmt: skip
        found.append(Case("RNN-schema-default", op, {"activations": ["Tanh", "Tanh"]}))
    return found


CASES = _cases()


def inputs(case: Case, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """The node's inputs by name."""
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))
    T, B, I, H, D, G = case.T, case.B, case.I, case.H, case.directions, GATES[case.op]
    shapes = {
        "X": (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H),
        "initial_h": (D, B, H), "initial_c": (D, B, H), "P": (D, 3 * H),
    }  # fmt: skip
    scale = {"X": 1.5, "R": 1.5 * H**-0.5, "initial_c": 1.5}
    found = {}
    for name in INPUTS[case.op]:
        if name in ("X", "W", "R", *case.optional):
            a = (draw.uniform(-1, 1, shapes[name]) * scale.get(name, 1)).astype(np.float32).astype(dtype)
            turned = case.layout and name in ("X", "initial_h", "initial_c")
            found[name] = np.ascontiguousarray(a.swapaxes(0, 1)) if turned else a
        elif name == "sequence_lens" and case.lengths is not None:
            found[name] = np.array(case.lengths, np.int32)
    return found


def model(
    case: Case, given: dict[str, np.ndarray], opset: int = 14, weights_fixed: bool = True
) -> ModelProto:
    """The node as a graph; weights are initializers or inputs."""
    names = [name if name in given else "" for name in INPUTS[case.op]]
    while not names[-1]:
        names.pop()
    node = helper.make_node(case.op, names, list(case.outputs), hidden_size=case.H, **case.attributes)
    fixed = ("W", "R", "B", "P") if weights_fixed else ()
    kind = lambda a: helper.np_dtype_to_tensor_dtype(a.dtype)
    graph = helper.make_graph(
        [node],
        case.name,
        [helper.make_tensor_value_info(n, kind(a), a.shape) for n, a in given.items() if n not in fixed],
        [
            helper.make_tensor_value_info(n, kind(given["X"]), [None] * (4 if n == "Y" else 3))
            for n in case.outputs
        ],
        [numpy_helper.from_array(a, n) for n, a in given.items() if n in fixed],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def error(ours: np.ndarray, answer: np.ndarray) -> float:
    """The largest difference over the answer's largest value."""
    assert ours.shape == answer.shape, (ours.shape, answer.shape)
    return float(np.abs(ours - answer).max() / max(np.abs(answer).max(), 1e-3))


__all__ = ["CASES", "INPUTS", "Case", "error", "inputs", "model"]
