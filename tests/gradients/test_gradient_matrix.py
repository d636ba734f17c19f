"""Every layer, loss, activation and option: the tape against numerical differentiation, float32 against 64.

A new layer, loss or activation without a row here fails `test_nothing_is_left_out`. See checking.py for the
method and conftest.py for the matrix that `pytest tests/gradients -s` prints.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from checking import Prepared, Question, check, gradients_of, numerical_error

import numlstm as nl
from numlstm import activations, losses
from numlstm.layers.base import flat, registry

# ---------------------------------------------------------------------------------------------- layers


@nl.cell(gates="ifgo", state=("h", "c"))
def peephole(i, f, g, o, c, p_i, p_f, p_o):
    """The LSTM of Gers and Schmidhuber 2000: a cell of a user's, with per-unit parameters."""
    new = nl.sigmoid(f + p_f * c) * c + nl.sigmoid(i + p_i * c) * nl.tanh(g)
    return nl.sigmoid(o + p_o * new) * nl.tanh(new), new


@nl.cell(gates="zng", state=("h", "m"), recurrent=("z", "n"))
def second_product(z, g, h, m, decay):
    """A second product, a normalised memory, and a gate that sees the input only."""
    z = nl.sigmoid(z)
    m = decay * m + nl.tanh(preactivation("n", z * h)) + g  # noqa: F821 (a word of the cell language)
    return nl.tanh(normalize(m)), m  # noqa: F821


@nl.cell(gates="zg", state=("h", "m"), recurrent=("z",))
def projected(z, g, m, decay):
    """A projected output."""
    m = nl.sigmoid(z) * m + nl.tanh(decay * g)
    return project(nl.tanh(m)), m  # noqa: F821


@dataclass
class Case:
    """One row: a layer, how it is made, and what it is called on.

    `inputs` are shapes of float inputs, with the batch (several: the layer gets a list), or arrays of ids;
    `call` are further arguments of the call; `states` is how many initial states are given, as leaves of
    their own.
    """

    layer: str
    option: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = (3, 4, 5)
    call: dict[str, Any] = field(default_factory=dict)
    states: int = 0
    make: Callable[..., Any] | None = None
    outputs: int | None = None  # how many of the outputs are differentiated; None: all
    numeric_bound: float = 1e-8
    cpu_bound: float = 2e-5
    directions: int = 3
    on_cpu: bool = True  # False: another row, or tests/kernels, holds the cpu to kernels of the same making

    @property
    def row(self) -> str:
        return f"{self.layer} {self.option}".strip()


def holes(batch: int, time: int, seed: int = 0) -> np.ndarray:
    """A mask with holes whose first row has no valid step at all."""
    mask = np.random.default_rng(seed).random((batch, time)) < 0.6
    mask[0] = False
    return mask


def dense(**options: Any) -> Any:
    return nl.Dense(3, **options)


def both_ways(layer: str, merge_mode: str | None, **options: Any) -> Any:
    return nl.Bidirectional(getattr(nl, layer)(**options), merge_mode)


REGULARIZED = {
    "kernel_regularizer": nl.regularizers.L1L2(0.01, 0.02),
    "bias_regularizer": "l1",
    "activity_regularizer": nl.regularizers.L2(0.1),
}
SEQ = {"return_sequences": True}
# ten shapes (batch, time, features, units), odd sizes: units 1, 7, 50, 193; batch 1, 3, 33; time 1, 2, 500
SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 5, 7),
    (33, 2, 3, 50),
    (1, 500, 2, 7),
    (3, 500, 1, 1),
    (3, 12, 6, 193),
    (33, 1, 17, 193),
    (33, 9, 1, 7),
    (1, 20, 3, 50),
    (3, 15, 65, 50),
]


def of_shapes(layer: str, shapes: list[tuple[int, int, int, int]] = SHAPES, **fixed: Any) -> list[Case]:
    """Odd shapes, each whole and under a mask with holes and an empty row."""
    found = []
    for B, T, features, units in shapes:
        long = {"directions": 1, "cpu_bound": 1e-4} if T == 500 else {}
        shape, options = (B, T, features), {"units": units, **SEQ, **fixed}
        found.append(Case(layer, f"B{B} T{T} I{features} H{units}", options, shape, **long))
        if T > 1:
            call = {"mask": holes(B, T) if B > 1 else holes(2, T)[1:]}
            found.append(Case(layer, f"B{B} T{T} I{features} H{units} holes", options, shape, call, **long))
    return found


def of_options(layer: str, states: int, *, fed_back: bool = True, **fixed: Any) -> list[Case]:
    """What all recurrent layers offer. Not `fed_back`: there is no recurrent product to drop anything from."""
    lengths, gaps = {"lengths": [0, 2, 4]}, {"mask": holes(3, 4)}
    options = {"units": 7, **fixed}
    sequences, both = {**options, **SEQ}, {**options, "return_state": True, **SEQ}
    dropped = {**sequences, "recurrent_dropout": 0.4}
    everything = {**both, "remat_steps": 3, "zoneout": 0.3, "dropout": 0.2}
    if fed_back:
        everything |= {"recurrent_dropout": 0.3, "recurrent_dropout_per_step": True}
    return [
        Case(layer, "last output", options),
        Case(layer, "last output, lengths", options, call=lengths),
        Case(layer, "state given and returned", both, states=states),
        Case(layer, "state, lengths", {**options, "return_state": True}, call=lengths, states=states),
        Case(layer, "no bias", {**sequences, "use_bias": False}),
        Case(layer, "backwards", {**sequences, "go_backwards": True}),
        Case(layer, "backwards, holes", {**sequences, "go_backwards": True}, call=gaps),
        Case(layer, "dropout", {**sequences, "dropout": 0.4}),
        Case(layer, "stateful", {**sequences, "stateful": True}),
        Case(layer, "zoneout", {**sequences, "zoneout": 0.4}),
        Case(
            layer,
            "zoneout, holes, backwards",
            {**sequences, "units": 50, "zoneout": 0.2, "go_backwards": True},
            call=gaps,
        ),
        Case(layer, "regularized", {**sequences, "recurrent_regularizer": "l2", **REGULARIZED}),
        *([
            Case(layer, "recurrent dropout", dropped),
            Case(layer, "recurrent dropout by step", {**dropped, "recurrent_dropout_per_step": True}),
            Case(layer, "recurrent dropout, state", {**dropped, "return_state": True}, states=states),
            Case(
                layer,
                "recurrent dropout by step, holes, backwards",
                {**dropped, "units": 50, "recurrent_dropout_per_step": True, "go_backwards": True},
                call=gaps,
            ),
        ] if fed_back else []),
        Case(layer, "dropconnect", {**sequences, "recurrent_dropconnect": 0.4}),
        Case(layer, "remat", {**sequences, "remat_steps": 2}, (3, 5, 5)),
        Case(layer, "remat, last output", {**options, "remat_steps": 9}),
        Case(
            layer, "remat, everything", everything, (3, 7, 5), {"mask": holes(3, 7)}, states=states
        ),
    ]  # fmt: skip


def of_variant(layer: str, name: str, states: int = 1, *, on_cpu: bool = True, **options: Any) -> list[Case]:
    """An option by itself: over sequences, backwards under a mask, with states."""
    return [
        Case(layer, name, {"units": 7, **options, **SEQ}, on_cpu=on_cpu),
        Case(layer, f"{name}, holes, backwards", {**options, "units": 50, "go_backwards": True, **SEQ},
             call={"mask": holes(3, 4)}, on_cpu=on_cpu),
        Case(layer, f"{name}, state, lengths", {"units": 7, **options, "return_state": True},
             call={"lengths": [0, 2, 4]}, states=states, on_cpu=on_cpu),
    ]  # fmt: skip


def of_forms() -> list[Case]:
    """The LSTM with peepholes, coupled gates and a clipped cell, each alone and together."""
    found = []
    # a limit that many cells reach, and none comes so near that a numerical step would carry it across
    for forms in (["peephole"], ["coupled"], ["cell_clip"], ["peephole", "coupled", "cell_clip"]):
        options = {"units": 7, **{form: 0.25 if form == "cell_clip" else True for form in forms}}
        name = ", ".join(forms)
        found += [
            Case("LSTM", name, {**options, **SEQ}),
            Case("LSTM", f"{name}, holes", {**options, "units": 50, **SEQ}, call={"mask": holes(3, 4)}),
            Case("LSTM", f"{name}, state", {**options, "return_state": True}, states=2),
        ]
    return found


def of_activations(layer: str, gates: bool) -> list[Case]:
    found = [
        Case(layer, f"activation {name}", {"units": 7, "activation": name, **SEQ})
        for name in ("linear", "relu", "softplus", "sigmoid", "hard_sigmoid")
    ]
    if gates:
        options = {"units": 7, "recurrent_activation": "hard_sigmoid", **SEQ}
        found.append(Case(layer, "gates hard_sigmoid", options))
    return found


def of_rows(layer: str, *rows: tuple[Any, ...]) -> list[Case]:
    """(option, options, inputs) a row."""
    return [Case(layer, *row) for row in rows]


PAIR = [(3, 4, 5), (3, 6, 5)]  # query, value
MASKS = [holes(3, 4, 1), holes(3, 6, 2)]
ids = np.array([[1, 3, 3, 0], [2, 1, 0, 0], [5, 3, 1, 6]])

# kinds of masks of attention's [query, value]; `holes` leaves a row without a single step
WHERE_TO_LOOK: dict[str, dict[str, Any]] = {
    "value holes": {"mask": [None, holes(3, 6)]},
    "query holes": {"mask": [holes(3, 4), None]},
    "both, weights": {"mask": MASKS, "return_attention_scores": True},
    "causal": {"use_causal_mask": True},
    "causal, both": {"use_causal_mask": True, "mask": MASKS},
}

BY_NAME = {
    "coupled": "input",
    "peephole": True,
    "activation": "scaled_tanh(alpha=1.5, beta=0.7)",
    "recurrent_activation": "hard_sigmoid(alpha=0.2, beta=0.4)",
    "output_activation": "softsign",
    "clip": 0.9,
}
CASES = [
    *of_shapes("LSTM"),
    *of_options("LSTM", 2),
    *of_activations("LSTM", gates=True),
    Case("LSTM", "cell sequence kept", {"units": 7, "return_cell_sequence": True, **SEQ}, outputs=1),
    Case("LSTM", "cell sequence", {"units": 7, "return_cell_sequence": True, "return_state": True, **SEQ},
         states=2),
    Case("LSTM", "cell sequence, holes, backwards",
         {"units": 50, "return_cell_sequence": True, "go_backwards": True}, call={"mask": holes(3, 4)}),
    Case("LSTM", "cell sequence, remat", {"units": 7, "return_cell_sequence": True, "remat_steps": 3},
         (3, 7, 5), call={"mask": holes(3, 7)}),
    Case("LSTM", "zero outputs, holes, backwards",
         {"units": 7, "zero_output_for_mask": True, "go_backwards": True, "return_state": True, **SEQ},
         call={"mask": holes(3, 4)}, states=2),
    Case("LSTM", "no forget ones", {"units": 7, "unit_forget_bias": False, **SEQ}),
    *of_forms(),
    Case("LSTM", "zoneout by state", {"units": 7, "zoneout": (0.0, 0.5), "return_state": True}, states=2),
    *of_variant("LSTM", "projection", 2, projection=3),
    *of_variant("LSTM", "layer_norm", 2, layer_norm=True),
    *of_variant("LSTM", "coupled input, activations with parameters", 2, **BY_NAME),
    Case("LSTM", "layer_norm, no bias", {"units": 7, "layer_norm": True, "use_bias": False, **SEQ}),
    Case("LSTM", "projection, recurrent dropouts, cell sequence",
         {"units": 7, "projection": 3, "projection_regularizer": "l2", "recurrent_dropout": 0.3,
          "recurrent_dropconnect": 0.3, "return_cell_sequence": True, "return_state": True},
         call={"mask": holes(3, 4)}, states=2),
    Case("LSTM", "projection, layer_norm, peephole, remat",
         {"units": 9, "projection": 4, "layer_norm": True, "peephole": True,
          "recurrent_dropout": 0.2, "recurrent_dropout_per_step": True, "remat_steps": 2,
          "return_state": True, **SEQ}, (3, 5, 5), call={"mask": holes(3, 5)}, states=2),
    *of_shapes("SimpleRNN"),
    *of_options("SimpleRNN", 1),
    *of_activations("SimpleRNN", gates=False),
    *of_variant("SimpleRNN", "layer_norm", layer_norm=True),
    *of_variant("SimpleRNN", "clip, cell_clip, leaky_relu", clip=0.9, cell_clip=0.6,
                activation="leaky_relu(alpha=0.1)"),
    *of_shapes("GRU"),
    *of_options("GRU", 1),
    *of_variant("GRU", "reset before", reset_after=False),
    *of_variant("GRU", "reset before, layer_norm", reset_after=False, layer_norm=True),
    *of_variant("GRU", "layer_norm", layer_norm=True),
    *of_variant("GRU", "clip, cell_clip", clip=0.7, cell_clip=0.4),
    Case("GRU", "layer_norm, no bias", {"units": 7, "layer_norm": True, "use_bias": False, **SEQ}),
    Case("GRU", "reset before, no bias, recurrent dropout",
         {"units": 7, "reset_after": False, "use_bias": False, "recurrent_dropout": 0.4, **SEQ}),
    Case("GRU", "reset before, zoneout, remat, dropconnect",
         {"units": 7, "reset_after": False, "zoneout": 0.3, "remat_steps": 2, "recurrent_dropconnect": 0.3,
          "return_state": True, **SEQ}, (3, 5, 5), call={"mask": holes(3, 5)}, states=1),
    # tanh, since some of many units come too near relu's kink; nothing is multiplied by a matrix on its way back,
    # so there is nothing for recurrent_dropout to thin out, and the layer refuses it
    *of_shapes("IndRNN", SHAPES[1:3] + SHAPES[5:9], activation="tanh"),
    *of_options("IndRNN", 1, fed_back=False, activation="tanh", bias_initializer="ones"),
    *of_variant("IndRNN", "layer_norm, cell_clip", on_cpu=False, layer_norm=True, cell_clip=0.8, activation="tanh"),
    Case("IndRNN", "relu", {"units": 7, "return_state": True, **SEQ}, states=1),
    *of_shapes("SLSTM", SHAPES[1:3] + SHAPES[5:9]),
    *of_options("SLSTM", 4),
    *of_variant("SLSTM", "layer_norm", 4, on_cpu=False, layer_norm=True),
    Case("SLSTM", "sequence of c", {"units": 7, "return_cell_sequence": True, **SEQ}, states=4),
    *of_options("RNN", 2, cell=peephole),
    *of_variant("RNN", "own cell, layer_norm, cell_clip", 2, on_cpu=False, cell=peephole, layer_norm=True, cell_clip=0.3),
    *of_variant("RNN", "own cell, second product", 2, on_cpu=False, cell=second_product, parameter_initializer="ones"),
    *of_variant("RNN", "own cell, projected", 2, cell=projected, projection=5, parameter_initializer="ones"),
    Case("RNN", "own cell, projected, zoneout, remat, recurrent dropout",
         {"cell": projected, "units": 9, "projection": 4, "zoneout": 0.3, "remat_steps": 2,
          "recurrent_dropout": 0.3, "return_state": True, **SEQ}, (3, 5, 5),
         call={"mask": holes(3, 5)}, states=2, on_cpu=False),
    Case("RNN", "own cell, peepholes", {"cell": peephole, "units": 7, **SEQ}),
    Case("RNN", "own cell, holes", {"cell": peephole, "units": 7, **SEQ}, call={"mask": holes(3, 4)}),
    Case("RNN", "own cell, states", {"cell": peephole, "units": 193, "return_state": True}, states=2),
    Case("RNN", "own cell, zoneout", {"cell": peephole, "units": 7, "zoneout": (0.3, 0.1), **SEQ}),
    *[
        Case("Bidirectional", f"{mode}{', holes' if call else ''}", {"units": 7}, call=call,
             make=lambda mode=mode, **o: both_ways("LSTM", mode, **SEQ, **o))
        for mode in ("concat", "sum", "mul", "ave", None)
        for call in ({}, {"mask": holes(3, 4)})
    ],
    Case("Bidirectional", "last output, holes", {"units": 7}, call={"mask": holes(3, 4)},
         make=lambda **o: both_ways("LSTM", "concat", **o)),
    Case("Bidirectional", "GRU, states", {"units": 7}, states=2,
         make=lambda **o: both_ways("GRU", "mul", return_state=True, **o)),
    Case("Bidirectional", "peephole, zoneout, dropout", {"units": 50},
         make=lambda **o: both_ways("LSTM", "concat", peephole=True, zoneout=0.2, dropout=0.3, **o)),
    *[
        Case("Bidirectional", f"{layer} {name}".strip(), {"units": 7}, call={"mask": holes(3, 4)},
             states=states,
             make=lambda layer=layer, options=options, **o: both_ways(
                 layer, "concat", return_state=True, **SEQ, **options, **o))
        for layer, name, states, options in [
            ("LSTM", "projection", 4, {"projection": 3}),
            ("LSTM", "layer_norm", 4, {"layer_norm": True}),
            ("LSTM", "coupled input, activations with parameters", 4, BY_NAME),
            ("LSTM", "remat, recurrent dropout by step", 4,
             {"remat_steps": 3, "recurrent_dropout": 0.3, "recurrent_dropout_per_step": True}),
            ("LSTM", "recurrent dropout, dropconnect, regularized", 4,
             {"recurrent_dropout": 0.3, "recurrent_dropconnect": 0.3, **REGULARIZED}),
            ("SimpleRNN", "layer_norm", 2, {"layer_norm": True}),
            ("GRU", "reset before", 2, {"reset_after": False}),
            ("GRU", "layer_norm", 2, {"layer_norm": True}),
            ("GRU", "clip, cell_clip", 2, {"clip": 0.7, "cell_clip": 0.4}),
            ("IndRNN", "", 2, {"activation": "tanh"}),
            ("SLSTM", "", 8, {}),
            ("RNN", "own cell, projected", 4, {"cell": projected, "projection": 5}),
        ]
    ],
    Case("Bidirectional", "one direction used", {"units": 7}, outputs=1,
         make=lambda **o: both_ways("LSTM", None, **SEQ, **o)),
    *of_rows(
        "Dense",
        ("", {"units": 3}, (5, 4)),
        ("rank 3", {"units": 65}, (3, 4, 130)),
        ("rank 4, relu", {"units": 3, "activation": "relu"}, (2, 3, 4, 5)),
        ("no bias", {"units": 3, "use_bias": False}, (5, 4)),
        ("softmax", {"units": 6, "activation": "softmax"}, (5, 4)),
        ("regularized", {"units": 3, **REGULARIZED}, (5, 4)),
    ),
    *of_rows(
        "Embedding",
        ("", {"input_dim": 7, "output_dim": 5}, ids),
        ("mask_zero", {"input_dim": 7, "output_dim": 5, "mask_zero": True}, ids),
        ("regularized", {"input_dim": 7, "output_dim": 5, "embeddings_regularizer": "l2"}, ids),
    ),
    *of_rows(
        "Dropout",
        ("", {"rate": 0.4}),
        ("noise_shape", {"rate": 0.4, "noise_shape": (None, 1, None)}),
        ("seed", {"rate": 0.4, "seed": 3}),
    ),
    *of_rows(
        "LayerNormalization",
        ("", {}, (3, 4, 9)),
        ("rank 2", {}, (6, 7)),
        ("no scale", {"scale": False}),
        ("no center", {"center": False}),
        ("neither", {"scale": False, "center": False}),
    ),
    Case("TimeDistributed", "Dense", make=lambda **o: nl.TimeDistributed(dense(**o), **o)),
    Case("TimeDistributed", "Dense, holes", make=lambda **o: nl.TimeDistributed(dense(**o), **o),
         call={"mask": holes(3, 4)}),
    Case("Masking", "", {"mask_value": 0.0}),
    *of_rows("Flatten", ("", {})),
    *of_rows(
        "Conv1D",
        ("", {"filters": 4, "kernel_size": 3}),
        ("same, stride 2", {"filters": 4, "kernel_size": 3, "padding": "same", "strides": 2}),
        ("causal, dilated", {"filters": 3, "kernel_size": 2, "padding": "causal", "dilation_rate": 2}),
        ("groups", {"filters": 4, "kernel_size": 2, "groups": 2}, (3, 4, 6)),
        ("a window of one step", {"filters": 2, "kernel_size": 1, "use_bias": False}),
    ),
    Case("Conv1D", "holes", {"filters": 4, "kernel_size": 3, "padding": "same"}, call={"mask": holes(3, 4)}),
    *of_rows("Reshape", ("", {"target_shape": (10, 2)}), ("-1", {"target_shape": (-1, 2)})),
    *of_rows("RepeatVector", ("", {"n": 4}, (3, 5))),
    *of_rows("Permute", ("", {"dims": (2, 1)})),
    *of_rows(
        "Concatenate",
        ("", {}, [(3, 4, 5), (3, 4, 2)]),
        ("axis 1", {"axis": 1}, [(3, 4, 5), (3, 2, 5)]),
    ),
    *of_rows("Add", ("", {}, [(3, 4, 5), (3, 4, 5)]), ("three", {}, [(3, 5), (3, 5), (3, 5)])),
    Case("GlobalAveragePooling1D", ""),
    Case("GlobalAveragePooling1D", "holes", call={"mask": holes(3, 4)}),
    Case("GlobalMaxPooling1D", ""),
    Case("InputLayer", "", {"input_shape": (4, 5)}),
    *[Case("Activation", name, {"activation": name}) for name in activations._registry.names()],
    *of_rows(
        "Attention",
        ("", {}, PAIR),
        ("with key", {}, [(3, 4, 5), (3, 6, 7), (3, 6, 5)]),
        ("scaled", {"use_scale": True}, PAIR),
        ("concat", {"score_mode": "concat", "use_scale": True}, PAIR),
        ("general", {"score_mode": "general"}, [(3, 4, 5), (3, 6, 7)]),
        ("additive", {"score_mode": "additive", "units": 4}, [(3, 4, 5), (3, 6, 7)]),
        ("dropout", {"dropout": 0.3}, PAIR),
        ("causal", {}, PAIR, {"use_causal_mask": True}),
        ("holes, weights", {}, PAIR, {"mask": MASKS, "return_attention_scores": True}),
    ),
    *[
        Case("Attention", f"{mode}, {kind}", {"score_mode": mode, "use_scale": True}, PAIR, call)
        for mode in ("dot", "general", "concat", "additive")
        for kind, call in WHERE_TO_LOOK.items()
    ],
    *of_rows(
        "AdditiveAttention",
        ("", {}, PAIR),
        ("no scale, holes", {"use_scale": False}, PAIR, {"mask": MASKS}),
    ),
    *of_rows(
        "MultiHeadAttention",
        ("", {"num_heads": 2, "key_dim": 3}, PAIR),
        ("values, no bias", {"num_heads": 3, "key_dim": 2, "value_dim": 4, "use_bias": False}, PAIR),
        ("output_shape", {"num_heads": 2, "key_dim": 3, "output_shape": (7,)}, PAIR),
        ("dropout", {"num_heads": 2, "key_dim": 3, "dropout": 0.3}, PAIR),
        ("causal, weights", {"num_heads": 2, "key_dim": 3}, PAIR,
         {"use_causal_mask": True, "return_attention_scores": True}),
        ("holes", {"num_heads": 2, "key_dim": 3}, PAIR, {"mask": MASKS}),
    ),
    *[
        Case("MultiHeadAttention", f"mask: {kind}", {"num_heads": 2, "key_dim": 3}, PAIR, call)
        for kind, call in {
            **WHERE_TO_LOOK,
            "any": {"attention_mask": holes(3, 24).reshape(3, 4, 6)},
            "any, by head": {"attention_mask": holes(3, 48).reshape(3, 2, 4, 6), "mask": MASKS},
        }.items()
    ],
    *of_rows(
        "TransformerBlock",
        ("", {"num_heads": 2, "intermediate_dim": 7}, (3, 4, 6)),
        ("norm last", {"num_heads": 2, "intermediate_dim": 7, "normalize_first": False}, (3, 4, 6)),
        ("causal", {"num_heads": 2, "intermediate_dim": 7, "causal": True}, (3, 4, 6)),
        ("holes, dropout", {"num_heads": 2, "intermediate_dim": 7, "dropout": 0.2}, (3, 4, 6),
         {"mask": holes(3, 4)}),
    ),
    *of_rows("PositionEmbedding", ("", {"sequence_length": 9}), ("full", {"sequence_length": 4})),
    Case("SinusoidalPositions", ""),
    *[
        Case("Seq2Seq", option, inputs=[ids, np.maximum(ids[:, :3], 1)],
             make=lambda options=options, **o: nl.seq2seq.Seq2Seq(7, 8, 6, **options, **o))
        for option, options in [
            ("", {}),
            ("input feeding", {"input_feeding": True}),
            ("one direction, dropout", {"bidirectional": False, "dropout": 0.2}),
        ]
    ],
    Case("Sequential", "LSTM, LayerNormalization, SimpleRNN, Dense",
         make=lambda **o: nl.Sequential([
             nl.LSTM(7, **SEQ, **o), nl.LayerNormalization(**o), nl.SimpleRNN(5, **o), nl.Dense(2, **o),
         ], **o)),
    Case("Sequential", "Embedding, masked LSTM, Dropout", inputs=ids,
         make=lambda **o: nl.Sequential([
             nl.Embedding(7, 4, mask_zero=True, **o), nl.LSTM(6, **o), nl.Dropout(0.3, **o), nl.Dense(2, **o),
         ], **o)),
    Case("Sequential", "Masking, LSTM with holes",
         make=lambda **o: nl.Sequential([
             nl.Masking(0.0, **o), nl.LSTM(7, **SEQ, **o), nl.Dense(2, **o),
         ], **o),
         call={"mask": holes(3, 4)}),
]  # fmt: skip

# in the registry, but nothing to differentiate: bases to be subclassed
WITHOUT_ROWS = {"Layer", "Model"}


def numbered(layer: Any) -> dict[str, nl.Variable]:
    """The layer's weights by number and name: automatic layer names differ from instance to instance."""
    return {f"{k} {variable.name}": variable for k, variable in enumerate(layer.weights)}


def state_widths(layer: Any) -> tuple[int, ...]:
    """Columns of each state; of both directions, if there are two."""
    if isinstance(layer, nl.Bidirectional):
        return layer.forward_layer.state_widths + layer.backward_layer.state_widths
    return layer.state_widths


def layer_question(case: Case) -> Question:
    """The layer's float inputs, weights and initial states as leaves, all its outputs and penalties as
    result."""
    draw = np.random.default_rng(zlib.crc32(case.row.encode()))
    many = isinstance(case.inputs, list)
    integer = isinstance(case.inputs[0], np.ndarray)
    shapes = [] if integer else case.inputs if many else [case.inputs]
    leaves = {f"x{k}": draw.standard_normal(shape) for k, shape in enumerate(shapes)}
    groups = dict.fromkeys(leaves, "input")

    def make(dtype: str) -> Any:
        nl.set_seed(3)
        layer = (case.make or getattr(nl.layers, case.layer))(dtype=dtype, **case.options)
        built_for = [(None, *np.shape(a)[1:]) for a in (first if many else [first])]
        layer.ensure_built(built_for if many else built_for[0])
        return layer

    first = case.inputs if integer else list(leaves.values())[: len(shapes)] if many else leaves["x0"]
    for k, width in enumerate(state_widths(make("float64")) if case.states else ()):
        leaves[f"state{k}"] = draw.standard_normal((shapes[0][0], width)) * 0.5
        groups[f"state{k}"] = "state"
    assert sum(group == "state" for group in groups.values()) == case.states
    for name, variable in numbered(make("float64")).items():
        # off their starting values, so that no bias is zero and no scale one
        leaves[name] = (
            variable.numpy() + draw.uniform(-0.3, 0.3, variable.shape) / max(*variable.shape[:1], 4, 1) ** 0.5
        )
        groups[name] = "weights"

    def prepare(dtype: str, values: dict[str, np.ndarray]) -> Prepared:
        layer = make(dtype)
        variables = numbered(layer)
        if case.options.get("stateful"):  # the batch before leaves states, which no gradient reaches
            for name, variable in variables.items():
                variable.assign(leaves[name])
            layer(first, training=True)
        for name, variable in variables.items():
            variable.assign(values[name])
        given = {k: nl.Variable(v, dtype=dtype) for k, v in values.items() if k not in variables}
        xs = [given[k] for k in given if k[0] == "x"]
        argument = case.inputs if integer else xs if many else xs[0]
        call = dict(case.call)
        if case.states:
            call["initial_state"] = [given[f"state{k}"] for k in range(case.states)]

        def compute() -> list[nl.Tensor]:
            outputs = flat(layer(argument, training=True, **call))[: case.outputs]
            return [*outputs, *layer.regularization_losses()]

        return {**given, **variables}, compute

    bounds = {"numeric_bound": case.numeric_bound, "cpu_bound": case.cpu_bound, "directions": case.directions}
    return Question(case.row, leaves, groups, prepare, **bounds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_layer(case, record):
    question = layer_question(case)
    if case.on_cpu:
        check(question, record)
        return
    exact, _ = gradients_of(question, "float64", "reference")
    least = 1e-2 * max(np.abs(g).max() for g in exact.values())
    for name, gradient in exact.items():
        error = numerical_error(question, name, gradient, least)
        record(question.row, "numeric", question.groups[name], error)
        assert error <= question.numeric_bound, f"{name} against numerical differentiation: {error:.1e}"


# ---------------------------------------------------------------------------------------------- losses

classes = np.array([[0, 2, 1], [1, 1, 0]])
one_hot = np.eye(4)[classes]
weights = np.array([[1.0, 0.5, 2.0], [0.0, 1.0, 0.3]])
kept = np.array([[True, False, True], [True, True, False]])
rng = np.random.default_rng(8)
values = rng.standard_normal((2, 3, 4))
soft = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
bits = (values > 0).astype(float)
signs = np.sign(values)

# loss class, option, options, targets, what the predictions are, arguments of the call
LOSSES: list[tuple[str, str, dict[str, Any], Any, str, dict[str, Any]]] = [
    *[("MeanSquaredError", *row) for row in [
        ("", {}, values, "any", {}),
        ("sample_weight", {}, values, "any", {"sample_weight": weights}),
        ("mask", {}, values, "any", {"mask": kept}),
        ("mask and weight", {}, values, "any", {"mask": kept, "sample_weight": weights}),
        ("sum", {"reduction": "sum"}, values, "any", {}),
        ("none", {"reduction": None}, values, "any", {}),
        ("mean with weight", {"reduction": "mean_with_sample_weight"}, values, "any",
         {"sample_weight": weights}),
    ]],
    ("MeanAbsoluteError", "", {}, values, "any", {}),
    ("MeanAbsolutePercentageError", "", {}, values, "any", {}),
    ("MeanSquaredLogarithmicError", "", {}, np.abs(values), "positive", {}),
    ("Huber", "", {}, values, "any", {}),
    ("Huber", "delta 0.3", {"delta": 0.3}, values, "any", {"mask": kept}),
    ("LogCosh", "", {}, values, "any", {}),
    ("KLDivergence", "", {}, soft, "probability", {}),
    ("Poisson", "", {}, np.abs(values), "positive", {}),
    ("Pinball", "one quantile", {"quantiles": [0.9]}, values, "any", {}),
    ("Pinball", "mean and quantiles, mask", {"quantiles": [0.1, 0.5, 0.8], "point": "mse"}, values[..., :1], "any",
     {"mask": kept}),
    ("CosineSimilarity", "", {}, values, "any", {}),
    ("Hinge", "", {}, signs, "any", {}),
    ("SquaredHinge", "", {}, signs, "any", {}),
    ("CategoricalHinge", "", {}, one_hot, "any", {}),
    ("BinaryCrossentropy", "", {}, bits, "unit", {}),
    ("BinaryCrossentropy", "logits", {"from_logits": True}, bits, "any", {}),
    ("BinaryCrossentropy", "logits, smoothed", {"from_logits": True, "label_smoothing": 0.2}, bits, "any",
     {"mask": kept}),
    ("BinaryCrossentropy", "smoothed", {"label_smoothing": 0.2}, bits, "unit", {}),
    ("CategoricalCrossentropy", "", {}, soft, "probability", {}),
    ("CategoricalCrossentropy", "logits", {"from_logits": True}, soft, "any", {"mask": kept}),
    ("CategoricalCrossentropy", "logits, smoothed", {"from_logits": True, "label_smoothing": 0.2}, one_hot,
     "any", {}),
    ("CategoricalCrossentropy", "smoothed", {"label_smoothing": 0.2}, one_hot, "probability", {}),
    ("SparseCategoricalCrossentropy", "", {}, classes, "probability", {}),
    ("SparseCategoricalCrossentropy", "logits", {"from_logits": True}, classes, "any", {}),
    ("SparseCategoricalCrossentropy", "logits, mask, weight", {"from_logits": True}, classes, "any",
     {"mask": kept, "sample_weight": weights}),
    ("SparseCategoricalCrossentropy", "logits, ignore_class", {"from_logits": True, "ignore_class": 1},
     classes, "any", {}),
]  # fmt: skip


def predictions(kind: str, draw: np.random.Generator) -> np.ndarray:
    """(2, 3, 4) numbers in the domain that the loss asks for."""
    x = draw.standard_normal((2, 3, 4)) * (1.0 if kind == "any" else 0.5)  # the rest away from their poles
    if kind == "probability":
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return {"any": x, "positive": np.exp(x), "unit": 1 / (1 + np.exp(-x))}[kind]


@pytest.mark.parametrize(
    "name, option, options, target, kind, call", LOSSES, ids=[f"{r[0]} {r[1]}" for r in LOSSES]
)
def test_loss(name, option, options, target, kind, call, record):
    row = f"{name} {option}".strip()
    leaves = {"predictions": predictions(kind, np.random.default_rng(zlib.crc32(row.encode())))}

    def prepare(dtype: str, given: dict[str, np.ndarray]) -> Prepared:
        variable = nl.Variable(given["predictions"], dtype=dtype)
        loss = getattr(losses, name)(**options)
        y_true = target if target.dtype.kind == "i" else target.astype(dtype)
        return {"predictions": variable}, lambda: [loss(y_true, variable, **call)]

    check(Question(row, leaves, {"predictions": "input"}, prepare), record)


# -------------------------------------------------------------------------------------- nothing left out


def own(names_and_classes: dict[str, Any]) -> set[str]:
    """Names of what the library itself registers: tests and doctests register things too."""
    apart = ("numlstm.io.", "numlstm.graph")  # models made from files
    return {
        n
        for n, thing in names_and_classes.items()
        if thing.__module__.split(".")[0] == "numlstm" and not thing.__module__.startswith(apart)
    }


def test_nothing_is_left_out():
    layers = own({name: registry.find(name) for name in registry.names()})
    assert layers - {case.layer for case in CASES} == set() | (layers & WITHOUT_ROWS), "a layer has no row"
    known = own({name: losses._registry.find(name) for name in losses._registry.names()})
    assert known - {row[0] for row in LOSSES} == set(), "a loss has no row"
