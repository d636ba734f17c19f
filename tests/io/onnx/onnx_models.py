"""Models for the tests of `save_onnx`: every layer and option that ONNX can hold, with inputs of two sizes.

Weights and inputs come from a NumPy seed, the case's name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx

import numlstm as nl
from numlstm.io.onnx.exporter import to_proto

I, V = 5, 9
SIZES = ((3, 7), (2, 4))  # batch and time
LENGTHS = ((7, 3, 5), (4, 1))


class Case(NamedTuple):
    """`make` gives a model or layer that is not built; `kind` says what it reads; `masked`: it is given lengths, or the
    padding that its mask finds; `start`: the layers whose initial states are inputs, with their states."""

    name: str
    make: Callable[[], Any]
    kind: str = "series"
    masked: bool = False
    options: Mapping[str, Any] = {}
    start: Mapping[str, str] = {}
    opset: int = 17

    def draw(self, what: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name}/{what}".encode()))

    def model(self) -> Any:
        """Built, with weights unlike those at the start."""
        model = self.make()
        with nl.use_backend("reference"):
            x, _ = self.given(0)
            model(x)
        draw = self.draw("weights")
        for variable in model.weights:
            variable.assign(draw.standard_normal(variable.shape) * 0.5)
        return model

    def given(self, size: int) -> tuple[Any, dict[str, Any]]:
        """What the model is called on, and with which options."""
        (B, T), draw, call = SIZES[size], self.draw(f"inputs {size}"), {}
        normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
        kept = np.arange(T) < np.array(LENGTHS[size])[:, None]
        match self.kind:
            case "series":
                x: Any = normal(B, T, I)
                if self.masked and self.options.get("lengths"):
                    call["lengths"] = np.array(LENGTHS[size], np.int32)
                elif self.masked:
                    x = x * kept[..., None]
            case "ids":
                x = draw.integers(1, V, (B, T)) * kept if self.masked else draw.integers(0, V, (B, T))
            case "table":
                x = normal(B, I)
            case "pair":
                x = [normal(B, T, I), normal(B, T + 2, I)]
            case "equal pair":
                x = [normal(B, T, I), normal(B, T, I)]
        if self.start:
            call["initial_state"] = [normal(B, 4) for states in self.start.values() for _ in states]
        return x, call

    def feed(self, names: list[str], size: int) -> dict[str, np.ndarray]:
        """The same for the graph, by the names of its inputs."""
        x, call = self.given(size)
        arrays = x if isinstance(x, list) else [x]
        fed = dict(zip(names, arrays, strict=False))
        if "lengths" in call:
            fed["lengths"] = call["lengths"]
        starts = [f"{layer}.initial_{state}" for layer, states in self.start.items() for state in states]
        return fed | dict(zip(starts, call.get("initial_state", ()), strict=True))

    def proto(self, model: Any) -> Any:
        return to_proto(model, opset=self.opset, **self.options)

    def expected(self, model: Any, size: int) -> list[np.ndarray]:
        x, call = self.given(size)
        y = model(x, **call)
        return [v.numpy() for v in (y if isinstance(y, list) else [y])]


KINDS = {"lstm": nl.LSTM, "gru": nl.GRU, "rnn": nl.SimpleRNN, "indrnn": nl.IndRNN}
WITH_LENGTHS: dict[str, Any] = {"masked": True, "options": {"lengths": True}}


def _recurrent() -> list[Case]:
    found = []
    shapes: dict[str, dict[str, Any]] = {
        "last": {},
        "sequences": {"return_sequences": True},
        "states": {"return_sequences": True, "return_state": True},
        "back": {"go_backwards": True},
        "back-sequences": {"go_backwards": True, "return_sequences": True},
        "zeros": {"return_sequences": True, "zero_output_for_mask": True},
        "no-bias": {"use_bias": False},
        "dropouts": {
            "dropout": 0.5,
            "recurrent_dropout": 0.5,
            "recurrent_dropconnect": 0.5,
            "remat_steps": 2,
        },
    }
    for kind, cls in KINDS.items():
        for name, options in shapes.items():
            if kind == "indrnn" and name != "states":
                continue
            make = lambda cls=cls, options=options: cls(4, **options)
            found.append(Case(f"{kind}-{name}", make))
            if name not in ("no-bias", "dropouts"):
                found.append(Case(f"{kind}-{name}-lengths", make, **WITH_LENGTHS))
        states = "hc" if kind == "lstm" else "h"
        for back in (False, True):
            options = {"return_sequences": True, "go_backwards": back, "name": "r"}
            make = lambda cls=cls, options=options: cls(4, **options)
            more = {"masked": True, "options": {"states": True, "lengths": True}, "start": {"r": states}}
            found.append(Case(f"{kind}-start-{'back' if back else 'forward'}", make, **more))
    lstms: dict[str, dict[str, Any]] = {
        "peephole": {"peephole": True},
        "coupled": {"coupled": True},
        "coupled-peephole": {"coupled": True, "peephole": True},
        "coupled-hard": {"coupled": True, "recurrent_activation": "hard_sigmoid"},
        "coupled-input": {"coupled": "input", "peephole": True},
        "activations": {
            "activation": "leaky_relu",
            "recurrent_activation": "hard_sigmoid",
            "output_activation": "elu(alpha=0.5)",
        },
        "linear": {"activation": "linear", "output_activation": "softsign"},
    }
    for name, options in lstms.items():
        make = lambda options=options: nl.LSTM(4, return_sequences=True, **options)
        found.append(Case(f"lstm-{name}", make, **WITH_LENGTHS))
    before = lambda: nl.GRU(4, reset_after=False, return_sequences=True)
    found.append(Case("gru-before", before, **WITH_LENGTHS))
    clips = {"gru-clip": lambda: nl.GRU(4, clip=0.3), "rnn-clip": lambda: nl.SimpleRNN(4, clip=0.3)}
    found += [Case(name, make) for name, make in clips.items()]
    found.append(Case("rnn-affine", lambda: nl.SimpleRNN(4, "affine(alpha=0.5, beta=0.1)")))
    return found


def _bidirectional() -> list[Case]:
    found = []
    for mode in ("concat", "sum", "mul", "ave", None):
        for options in ({}, {"return_sequences": True}, {"return_sequences": True, "go_backwards": True}):
            make = lambda mode=mode, o=options: nl.Bidirectional(
                nl.LSTM(4, return_state=True, **o), merge_mode=mode
            )
            found.append(Case(f"bidirectional-{mode}-{'-'.join(options) or 'last'}", make, **WITH_LENGTHS))
    unlike = lambda: nl.Bidirectional(
        nl.LSTM(4, peephole=True, return_sequences=True),
        backward_layer=nl.GRU(3, return_sequences=True, go_backwards=True),
    )
    alike = lambda: nl.Bidirectional(
        nl.GRU(4, "relu", return_sequences=True),
        backward_layer=nl.GRU(4, "elu(alpha=0.5)", "hard_sigmoid", return_sequences=True, go_backwards=True),
    )
    start = lambda: nl.Bidirectional(nl.LSTM(4, return_sequences=True, return_state=True, name="r"))
    found += [
        Case("bidirectional-unlike", unlike, **WITH_LENGTHS),
        Case("bidirectional-activations", alike, **WITH_LENGTHS),
        Case("bidirectional-start", start, masked=True, options={"states": True, "lengths": True},
             start={"forward_r": "hc", "backward_r": "hc"}),
    ]  # fmt: skip
    return found


ACTIVATIONS = (
    "affine(alpha=0.5, beta=0.25)", "elu", "exponential", "gelu", "hard_sigmoid", "hard_tanh", "leaky_relu(alpha=0.1)",
    "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6", "scaled_tanh(alpha=1.7, beta=0.6)", "selu", "sigmoid",
    "silu", "softmax", "softplus", "softsign", "tanh", "thresholded_relu(alpha=0.5)",
)  # fmt: skip


def _others() -> list[Case]:
    S = nl.Sequential
    layers: dict[str, Callable[[], Any]] = {
        "dense": lambda: nl.Dense(3, "relu", use_bias=False),
        "layer-norm": lambda: nl.LayerNormalization(),
        "layer-norm-plain": lambda: nl.LayerNormalization(center=False, scale=False),
        "sinusoids": lambda: nl.SinusoidalPositions(),
        "positions": lambda: nl.PositionEmbedding(9),
        "time-distributed": lambda: nl.TimeDistributed(nl.Dense(2, "tanh")),
        "average": lambda: nl.GlobalAveragePooling1D(),
        "average-kept": lambda: nl.GlobalAveragePooling1D(keepdims=True),
        "maximum": lambda: nl.GlobalMaxPooling1D(),
        "maximum-kept": lambda: nl.GlobalMaxPooling1D(keepdims=True),
        "transformer": lambda: nl.TransformerBlock(2, 8, key_dim=3, causal=True),
        "transformer-after": lambda: nl.TransformerBlock(1, 8, activation="gelu", normalize_first=False),
    }
    found = [Case(name, lambda make=make: S([make()])) for name, make in layers.items()]
    found += [
        Case(f"{name}-lengths", lambda m=make: S([m()]), **WITH_LENGTHS) for name, make in layers.items()
    ]
    found += [
        Case("flatten", lambda: S([nl.Flatten()])),
        Case("convolution", lambda: S([nl.Conv1D(4, 2, activation="relu", bias_initializer="uniform")])),
        Case("convolution-same", lambda: S([nl.Conv1D(4, 3, strides=2, padding="same"), nl.LSTM(2)])),
        Case("convolution-causal", lambda: S([nl.Conv1D(4, 2, padding="causal", dilation_rate=2, use_bias=False)])),
        Case("reshape", lambda: S([nl.Reshape((I, -1))])),
        Case("permute", lambda: S([nl.Permute((2, 1))])),
        Case("dense-table", lambda: S([nl.Input((I,)), nl.Dense(3, "softmax")]), "table"),
        Case("encoder-decoder", lambda: S([nl.LSTM(3), nl.RepeatVector(4), nl.Dropout(0.5),
                                           nl.GRU(3, return_sequences=True), nl.TimeDistributed(nl.Dense(2))])),
        Case("embedding", lambda: S([nl.Embedding(V, 4), nl.LSTM(3), nl.Dense(2, "softmax")]), "ids"),
        Case("embedding-mask", lambda: S([nl.Embedding(V, 4, mask_zero=True), nl.Bidirectional(nl.GRU(3)), nl.Dense(2)]),
             "ids", True, {"prefix_masks": True}),
        Case("embedding-average", lambda: S([nl.Embedding(V, 4, mask_zero=True), nl.GlobalAveragePooling1D()]), "ids", True),
        Case("masking", lambda: S([nl.Masking(), nl.LSTM(3, return_sequences=True), nl.GlobalMaxPooling1D()]), "series",
             True, {"prefix_masks": True}),
        Case("stack", lambda: S([nl.Bidirectional(nl.LSTM(4, return_sequences=True)), nl.LayerNormalization(),
                                 nl.GRU(3, return_sequences=True, go_backwards=True), nl.SimpleRNN(2)])),
        Case("turned", lambda: S([nl.GRU(4, return_sequences=True, go_backwards=True), nl.LSTM(3, return_sequences=True),
                                  nl.Bidirectional(nl.GRU(2, return_sequences=True, go_backwards=True)),
                                  nl.SimpleRNN(3, go_backwards=True, return_sequences=True), nl.LSTM(2)]), **WITH_LENGTHS),
        Case("turned-masking", lambda: S([nl.Masking(), nl.GRU(4, return_sequences=True, go_backwards=True),
                                          nl.LSTM(3, return_sequences=True), nl.GlobalAveragePooling1D()]), "series", True,
             {"prefix_masks": True}),
        Case("nested", lambda: S([S([nl.LSTM(4, return_sequences=True), nl.Dropout(0.2)]), nl.Dense(1)])),
        Case("opset-24", lambda: S([nl.LSTM(4, return_sequences=True), nl.LayerNormalization(),
                                    nl.GlobalAveragePooling1D(), nl.Dense(2, "gelu")]), masked=True,
             options={"lengths": True}, opset=24),
        Case("additive", lambda: nl.AdditiveAttention(), "pair"),
        Case("heads", lambda: nl.MultiHeadAttention(2, 3, value_dim=2), "pair"),
        Case("heads-shape", lambda: nl.MultiHeadAttention(2, 3, use_bias=False, output_shape=(2, 3)), "pair"),
        Case("concatenate", lambda: nl.Concatenate(), "equal pair"),
        Case("concatenate-time", lambda: nl.Concatenate(axis=1), "pair"),
        Case("add", lambda: nl.Add(), "equal pair"),
    ]  # fmt: skip
    for mode in ("dot", "general", "concat", "additive"):
        for scaled in (False, True):
            make = lambda mode=mode, scaled=scaled: nl.Attention(use_scale=scaled, score_mode=mode)
            found.append(Case(f"attention-{mode}{'-scaled' * scaled}", make, "pair"))
    for activation in ACTIVATIONS:
        found.append(Case(f"activation-{activation}", lambda a=activation: S([nl.Activation(a)])))
    return found


CASES = [*_recurrent(), *_bidirectional(), *_others()]
assert len({case.name for case in CASES}) == len(CASES)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the largest value expected, or 1."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1))


USUAL = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"], "RNN": [b"Tanh"]}


def beyond_the_reference(proto: Any) -> bool:
    """Does a node say what onnx's reference evaluator does not heed?"""
    for node in proto.graph.node:
        if node.op_type in USUAL:
            a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
            usual = USUAL[node.op_type]
            odd = a["activations"] != usual * (len(a["activations"]) // len(usual))
            plain = a.get("linear_before_reset", 1) and not a.get("input_forget") and "clip" not in a
            peephole = len(node.input) > 7
            if (
                odd
                or not plain
                or peephole
                or a["direction"] != b"forward"
                or (len(node.input) > 4 and node.input[4])
            ):
                return True
    return False
