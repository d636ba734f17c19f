"""The ONNX operators LSTM, GRU and RNN, as the operators' text reads: loops over directions, rows and steps, in
float64 NumPy.

Slow and plain on purpose, and without a line of numlstm: what the tests hold `numlstm.io.onnx` to. Names are those
of the text (https://onnx.ai/onnx/operators/onnx__LSTM.html). Where the text says nothing: a step beyond a row's
length has a Y of zeros, a row of length 0 ends in its initial state, and a value of activation_alpha or
activation_beta goes to the next activation that has such a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]

FLOAT = lambda value: float(np.float32(value))  # attributes are float32, the schemas' defaults too
# name: the function, its alpha and its beta where they are not given: those of the operators LeakyRelu, ThresholdedRelu,
# HardSigmoid, Elu, and of Affine while it was one; NaN for ScaledTanh, which had none; None: no such parameter.
# At its threshold ThresholdedRelu is 0, as in the operator of that name; the text here says x >= alpha.
ACTIVATIONS: dict[str, tuple[Callable[..., np.ndarray], float | None, float | None]] = {
    "Relu": (lambda x, a, b: np.maximum(0, x), None, None),
    "Tanh": (lambda x, a, b: np.tanh(x), None, None),
    "Sigmoid": (lambda x, a, b: 1 / (1 + np.exp(-x)), None, None),
    "Affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "LeakyRelu": (lambda x, a, b: np.where(x >= 0, x, a * x), FLOAT(0.01), None),
    "ThresholdedRelu": (lambda x, a, b: np.where(x > a, x, 0), 1.0, None),
    "ScaledTanh": (lambda x, a, b: a * np.tanh(b * x), np.nan, np.nan),
    "HardSigmoid": (lambda x, a, b: np.minimum(np.maximum(a * x + b, 0), 1), FLOAT(0.2), 0.5),
    "Elu": (lambda x, a, b: np.where(x >= 0, x, a * (np.exp(x) - 1)), 1.0, None),
    "Softsign": (lambda x, a, b: x / (1 + np.abs(x)), None, None),
    "Softplus": (lambda x, a, b: np.log(1 + np.exp(x)), None, None),
}
DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def run(op: str, attributes: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of one node by name, in float64.

    Arguments:
        op: "LSTM", "GRU" or "RNN".
        attributes: those of the node; what is missing has the operator's default.
        given: the inputs by their names in the operator's text; optional ones may be missing.
    """
    direction, layout = attributes.get("direction", "forward"), attributes.get("layout", 0)
    a = {name: np.asarray(v, np.float64) for name, v in given.items() if name != "sequence_lens"}
    x = a["X"].swapaxes(0, 1) if layout else a["X"]  # (time, batch, input)
    T, B, _ = x.shape
    D, H = a["W"].shape[0], a["R"].shape[2]
    lengths = given.get("sequence_lens", np.full(B, T))
    functions = _activations(op, attributes, D)
    start = {}
    for name in ("initial_h", "initial_c"):
        state = a.get(name, np.zeros((B, D, H) if layout else (D, B, H)))
        start[name] = state.swapaxes(0, 1) if layout else state  # (direction, batch, hidden)
    y, y_h, y_c = np.zeros((T, D, B, H)), np.zeros((D, B, H)), np.zeros((D, B, H))
    for d in range(D):
        step = _STEPS[op](a, d, H, functions[d], attributes)
        backwards = direction == "reverse" or d == 1
        for b in range(B):
            h, c = start["initial_h"][d, b], start["initial_c"][d, b]
            times = range(int(lengths[b]))
            for t in reversed(times) if backwards else times:
                h, c = step(x[t, b], h, c)
                y[t, d, b] = h
            y_h[d, b], y_c[d, b] = h, c
    if layout:
        y, y_h, y_c = y.transpose(2, 0, 1, 3), y_h.swapaxes(0, 1), y_c.swapaxes(0, 1)
    return {"Y": y, "Y_h": y_h} | ({"Y_c": y_c} if op == "LSTM" else {})


def _activations(op: str, attributes: Mapping[str, Any], directions: int) -> list[list[Function]]:
    """The functions f, g, h of each direction, their inputs clipped."""
    names = list(attributes.get("activations", DEFAULTS[op] * directions))
    alphas, betas = list(attributes.get("activation_alpha", ())), list(attributes.get("activation_beta", ()))
    clip = attributes.get("clip", np.inf)
    functions = []
    for name in names:
        function, alpha, beta = ACTIVATIONS[name]
        if alpha is not None and alphas:
            alpha = alphas.pop(0)
        if beta is not None and betas:
            beta = betas.pop(0)
        functions.append(
            lambda x, function=function, alpha=alpha, beta=beta: function(
                np.clip(x, -clip, clip), alpha, beta
            )
        )
    each = len(DEFAULTS[op])
    return [functions[d * each : (d + 1) * each] for d in range(directions)]


def _parts(a: Mapping[str, np.ndarray], d: int, H: int, letters: str) -> tuple[dict[str, Any], ...]:
    """W, R, Wb and Rb of one direction, by gate."""
    G = len(letters)
    bias = a["B"][d] if "B" in a else np.zeros(2 * G * H)
    cut = lambda m: {letter: m[k * H : (k + 1) * H] for k, letter in enumerate(letters)}
    return cut(a["W"][d]), cut(a["R"][d]), cut(bias[: G * H]), cut(bias[G * H :])


def _lstm(a: Mapping[str, np.ndarray], d: int, H: int, functions: list[Function], attributes: Any) -> Any:
    f, g, h = functions
    W, R, Wb, Rb = _parts(a, d, H, "iofc")
    Pi, Po, Pf = (a["P"][d] if "P" in a else np.zeros(3 * H)).reshape(3, H)
    coupled = attributes.get("input_forget", 0)

    def step(x: np.ndarray, H_, C_) -> tuple[np.ndarray, np.ndarray]:
        product = lambda gate: W[gate] @ x + R[gate] @ H_ + Wb[gate] + Rb[gate]
        it = f(product("i") + Pi * C_)
        ft = 1 - it if coupled else f(product("f") + Pf * C_)
        ct = g(product("c"))
        Ct = ft * C_ + it * ct
        ot = f(product("o") + Po * Ct)
        return ot * h(Ct), Ct

    return step


def _gru(a: Mapping[str, np.ndarray], d: int, H: int, functions: list[Function], attributes: Any) -> Any:
    f, g = functions
    W, R, Wb, Rb = _parts(a, d, H, "zrh")
    linear_before_reset = attributes.get("linear_before_reset", 0)

    def step(x: np.ndarray, H_, C_) -> tuple[np.ndarray, np.ndarray]:
        zt = f(W["z"] @ x + R["z"] @ H_ + Wb["z"] + Rb["z"])
        rt = f(W["r"] @ x + R["r"] @ H_ + Wb["r"] + Rb["r"])
        if linear_before_reset:
            ht = g(W["h"] @ x + rt * (R["h"] @ H_ + Rb["h"]) + Wb["h"])
        else:
            ht = g(W["h"] @ x + R["h"] @ (rt * H_) + Rb["h"] + Wb["h"])
        return (1 - zt) * ht + zt * H_, C_

    return step


def _rnn(a: Mapping[str, np.ndarray], d: int, H: int, functions: list[Function], attributes: Any) -> Any:
    (f,) = functions
    W, R, Wb, Rb = _parts(a, d, H, "i")

    def step(x: np.ndarray, H_, C_) -> tuple[np.ndarray, np.ndarray]:
        return f(W["i"] @ x + R["i"] @ H_ + Wb["i"] + Rb["i"]), C_

    return step


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}
