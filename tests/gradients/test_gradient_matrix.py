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
from checking import Prepared, Question, check

import numlstm as nl
from numlstm import activations, losses
from numlstm.layers.base import flat, registry

# ---------------------------------------------------------------------------------------------- layers


@nl.cell(gates="ifgo", state=("h", "c"))
def peephole(i, f, g, o, c, p_i, p_f, p_o):
    """The LSTM of Gers and Schmidhuber 2000: a cell of a user's, with per-unit parameters."""
    new = nl.sigmoid(f + p_f * c) * c + nl.sigmoid(i + p_i * c) * nl.tanh(g)
    return nl.sigmoid(o + p_o * new) * nl.tanh(new), new


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


def of_shapes(layer: str) -> list[Case]:
    """Ten odd shapes, each whole and under a mask with holes and an empty row."""
    found = []
    for B, T, features, units in SHAPES:
        long = {"directions": 1, "cpu_bound": 1e-4} if T == 500 else {}
        shape, options = (B, T, features), {"units": units, **SEQ}
        found.append(Case(layer, f"B{B} T{T} I{features} H{units}", options, shape, **long))
        if T > 1:
            call = {"mask": holes(B, T) if B > 1 else holes(2, T)[1:]}
            found.append(Case(layer, f"B{B} T{T} I{features} H{units} holes", options, shape, call, **long))
    return found


def of_options(layer: str, states: int) -> list[Case]:
    """What all recurrent layers offer."""
    lengths = {"lengths": [0, 2, 4]}
    return [
        Case(layer, "last output", {"units": 7}),
        Case(layer, "last output, lengths", {"units": 7}, call=lengths),
        Case(layer, "state given and returned", {"units": 7, "return_state": True, **SEQ}, states=states),
        Case(layer, "state, lengths", {"units": 7, "return_state": True}, call=lengths, states=states),
        Case(layer, "no bias", {"units": 7, "use_bias": False, **SEQ}),
        Case(layer, "backwards", {"units": 7, "go_backwards": True, **SEQ}),
        Case(
            layer, "backwards, holes", {"units": 7, "go_backwards": True, **SEQ}, call={"mask": holes(3, 4)}
        ),
        Case(layer, "dropout", {"units": 7, "dropout": 0.4, **SEQ}),
        Case(layer, "stateful", {"units": 7, "stateful": True, **SEQ}),
        Case(layer, "zoneout", {"units": 7, "zoneout": 0.4, **SEQ}),
        Case(
            layer,
            "zoneout, holes, backwards",
            {"units": 50, "zoneout": 0.2, "go_backwards": True, **SEQ},
            call={"mask": holes(3, 4)},
        ),
        Case(layer, "regularized", {"units": 7, "recurrent_regularizer": "l2", **REGULARIZED, **SEQ}),
    ]


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

CASES = [
    *of_shapes("LSTM"),
    *of_options("LSTM", 2),
    *of_activations("LSTM", gates=True),
    Case("LSTM", "cell sequence kept", {"units": 7, "return_cell_sequence": True, **SEQ}, outputs=1),
    Case("LSTM", "no forget ones", {"units": 7, "unit_forget_bias": False, **SEQ}),
    *of_forms(),
    Case("LSTM", "zoneout by state", {"units": 7, "zoneout": (0.0, 0.5), "return_state": True}, states=2),
    *of_shapes("SimpleRNN"),
    *of_options("SimpleRNN", 1),
    *of_activations("SimpleRNN", gates=False),
    *of_options("GRU", 1),
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


def layer_question(case: Case) -> Question:
    """The layer's float inputs, weights and initial states as leaves, all its outputs and penalties as
    result."""
    draw = np.random.default_rng(zlib.crc32(case.row.encode()))
    many = isinstance(case.inputs, list)
    integer = isinstance(case.inputs[0], np.ndarray)
    shapes = [] if integer else case.inputs if many else [case.inputs]
    leaves = {f"x{k}": draw.standard_normal(shape) for k, shape in enumerate(shapes)}
    groups = dict.fromkeys(leaves, "input")
    for k in range(case.states):
        leaves[f"state{k}"] = draw.standard_normal((shapes[0][0], case.options["units"])) * 0.5
        groups[f"state{k}"] = "state"

    def make(dtype: str) -> Any:
        nl.set_seed(3)
        layer = (case.make or getattr(nl.layers, case.layer))(dtype=dtype, **case.options)
        built_for = [(None, *np.shape(a)[1:]) for a in (first if many else [first])]
        layer.ensure_built(built_for if many else built_for[0])
        return layer

    first = case.inputs if integer else list(leaves.values())[: len(shapes)] if many else leaves["x0"]
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
    check(layer_question(case), record)


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
    return {n for n, thing in names_and_classes.items() if thing.__module__.split(".")[0] == "numlstm"}


def test_nothing_is_left_out():
    layers = own({name: registry.find(name) for name in registry.names()})
    assert layers - {case.layer for case in CASES} == set() | (layers & WITHOUT_ROWS), "a layer has no row"
    known = own({name: losses._registry.find(name) for name in losses._registry.names()})
    assert known - {row[0] for row in LOSSES} == set(), "a loss has no row"
