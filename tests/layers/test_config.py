"""Every layer that the library registers: config to JSON and back, saved weights, output shapes, explain. New
ones included."""

import json

import numpy as np
import pytest

import numlstm as nl
from numlstm.layers import from_config, registry, to_config
from numlstm.layers.base import batch_none, shape_of


@nl.cell(gates="ig", state=("h",))
def _gated(i, g, h, scale):
    return h + nl.sigmoid(i) * (nl.tanh(g) * scale - h)


@nl.cell(gates="ab", state=("h", "m"), recurrent="a")
def _thinner(a, b, m):
    m = nl.sigmoid(a) * m + nl.tanh(b)
    return project(m), m  # noqa: F821 (a word of the cell language)


SEQUENCE = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
VECTOR = SEQUENCE[:, 0]
RECURRENT = {
    "use_bias": True,
    "split_bias": True,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": nl.initializers.Orthogonal(gain=0.5, seed=1),
    "bias_initializer": "ones",
    "kernel_regularizer": "l2",
    "recurrent_regularizer": nl.regularizers.L1(0.1),
    "bias_regularizer": "l1_l2",
    "activity_regularizer": nl.regularizers.L2(0.3),
    "kernel_constraint": nl.constraints.MaxNorm(3.0),
    "recurrent_constraint": "unit_norm",
    "bias_constraint": "non_neg",
    "dropout": 0.25,
    "recurrent_dropout": 0.5,
    "recurrent_dropout_per_step": True,
    "recurrent_dropconnect": 0.25,
    "cell_clip": 0.6,
    "remat_steps": 3,
    "return_sequences": True,
    "go_backwards": True,
    "zero_output_for_mask": True,
    "stateful": True,
    "name": "named",
    "trainable": False,
    "dtype": "float64",
    "input_shape": (None, 3),
}


# One weight a unit, and no recurrent product.
BY_UNIT = {
    **RECURRENT,
    "recurrent_dropout": 0.0,
    "recurrent_dropout_per_step": False,
    "recurrent_initializer": "ones",
    "recurrent_constraint": nl.constraints.MaxNorm(1.5, axis=()),
}


class _Doubled(nl.Model):
    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units
        self.inner = nl.LSTM(units)

    def call(self, x):
        return self.inner(x) * 2


# For each class: layers with no option left at its default where that is possible, and an input.
EXAMPLES = {
    "LSTM": [
        (lambda: nl.LSTM(4, "relu", "hard_sigmoid", unit_forget_bias=False, **RECURRENT), SEQUENCE),
        (lambda: nl.LSTM(4, return_state=True, return_cell_sequence=True), SEQUENCE),
        (
            lambda: nl.LSTM(4, peephole=True, coupled=True, zoneout=(0.1, 0.2), **RECURRENT),
            SEQUENCE,
        ),
        (
            lambda: nl.LSTM(
                *(5, "elu(alpha=0.5)", "hard_sigmoid(alpha=0.2)"),
                output_activation="softsign",
                coupled="input",
                clip=2.0,
                layer_norm=True,
                projection=3,
                projection_initializer="ones",
                projection_regularizer="l2",
                projection_constraint="non_neg",
                **RECURRENT,
            ),
            SEQUENCE,
        ),
        (lambda: nl.LSTM(4, projection=3, return_state=True, return_cell_sequence=True), SEQUENCE),
        (lambda: nl.LSTM(4, peephole=True, zoneout=0.3), SEQUENCE),
    ],
    "GRU": [
        (lambda: nl.GRU(4, "relu", "hard_sigmoid", zoneout=0.1, **RECURRENT), SEQUENCE),
        (lambda: nl.GRU(4, reset_after=False, clip=2.0, **RECURRENT), SEQUENCE),
        (lambda: nl.GRU(4, layer_norm=True), SEQUENCE),
        (lambda: nl.GRU(4), SEQUENCE),
    ],
    "SimpleRNN": [
        (lambda: nl.SimpleRNN(4, "relu", clip=2.0, layer_norm=True, **RECURRENT), SEQUENCE),
        (lambda: nl.SimpleRNN(4), SEQUENCE),
    ],
    "IndRNN": [
        (
            lambda: nl.IndRNN(4, "tanh", layer_norm=True, **BY_UNIT),
            SEQUENCE,
        ),
        (lambda: nl.IndRNN(4), SEQUENCE),
    ],
    "SLSTM": [
        (
            lambda: nl.SLSTM(4, unit_forget_bias=False, layer_norm=True, **{**RECURRENT, "cell_clip": None}),
            SEQUENCE,
        ),
        (lambda: nl.SLSTM(4, return_state=True, return_cell_sequence=True), SEQUENCE),
    ],
    "RNN": [
        (lambda: nl.RNN(_gated, 4, parameter_initializer="ones", layer_norm=True, **RECURRENT), SEQUENCE),
        (lambda: nl.RNN(_thinner, 4, projection=2, projection_initializer="ones"), SEQUENCE),
    ],
    "Bidirectional": [
        (
            lambda: nl.Bidirectional(
                nl.LSTM(4, peephole=True, zoneout=(0.1, 0.2), **RECURRENT),
                "ave",
                name="both",
                trainable=False,
                input_shape=(None, 3),
            ),
            SEQUENCE,
        ),
        (
            lambda: nl.Bidirectional(
                nl.GRU(4), backward_layer=nl.RNN(_gated, 2, go_backwards=True, name="mine")
            ),
            SEQUENCE,
        ),
        (lambda: nl.Bidirectional(nl.LSTM(4, return_state=True), None), SEQUENCE),
    ],
    "Dense": [
        (
            lambda: nl.Dense(
                4, "relu", False, "orthogonal", "ones", "l1", "l2", "l1", "non_neg", "unit_norm"
            ),
            VECTOR,
        ),
        (lambda: nl.Dense(4), SEQUENCE),
    ],
    "Embedding": [
        (lambda: nl.Embedding(9, 4, "normal", "l2", "max_norm", mask_zero=True), np.array([[1, 0], [8, 3]]))
    ],
    "Dropout": [(lambda: nl.Dropout(0.5, noise_shape=(None, 1, None), seed=3), SEQUENCE)],
    "Activation": [(lambda: nl.Activation("softmax"), SEQUENCE)],
    "TimeDistributed": [(lambda: nl.TimeDistributed(nl.Dense(4, "tanh")), SEQUENCE)],
    "Masking": [(lambda: nl.Masking(0.5), SEQUENCE)],
    "LayerNormalization": [
        (lambda: nl.LayerNormalization([1, 2], 1e-5, True, False, "ones", "zeros", "l1", "l2"), SEQUENCE),
        (lambda: nl.LayerNormalization(beta_constraint="non_neg", gamma_constraint="non_neg"), VECTOR),
    ],
    "Attention": [
        (lambda: nl.Attention(True, "concat", 0.2, 3), [SEQUENCE, SEQUENCE[:, :2]]),
        (lambda: nl.Attention(score_mode="general", kernel_regularizer="l2"), [SEQUENCE, SEQUENCE[..., :2]]),
        (
            lambda: nl.Attention(
                True,
                "additive",
                units=5,
                kernel_initializer="orthogonal",
                kernel_constraint="max_norm",
            ),
            [SEQUENCE, SEQUENCE[..., :2], SEQUENCE[..., :1]],
        ),
    ],
    "AdditiveAttention": [
        (lambda: nl.AdditiveAttention(dropout=0.2, seed=3), [SEQUENCE, SEQUENCE]),
        (lambda: nl.AdditiveAttention(False), [SEQUENCE, SEQUENCE]),
    ],
    "MultiHeadAttention": [
        (
            lambda: nl.MultiHeadAttention(
                *(
                    2,
                    3,
                    4,
                    0.2,
                    True,
                    (7, 2),
                    "orthogonal",
                    "ones",
                    "l1",
                    "l2",
                    "l1",
                    "non_neg",
                    "unit_norm",
                    3,
                )
            ),
            [SEQUENCE, SEQUENCE[:, :2], SEQUENCE[:, :2, :2]],
        ),
        (lambda: nl.MultiHeadAttention(2, 3, use_bias=False), [SEQUENCE, SEQUENCE]),
    ],
    "TransformerBlock": [
        (
            lambda: nl.TransformerBlock(
                *(2, 6),
                key_dim=4,
                dropout=0.2,
                activation="gelu",
                normalize_first=False,
                causal=True,
                layer_norm_epsilon=1e-4,
                kernel_initializer="he_normal",
            ),
            SEQUENCE,
        ),
        (lambda: nl.TransformerBlock(3, 6, dtype="float64", trainable=False), SEQUENCE),
    ],
    "PositionEmbedding": [(lambda: nl.PositionEmbedding(7, "normal", "l2", "max_norm"), SEQUENCE)],
    "SinusoidalPositions": [(lambda: nl.SinusoidalPositions(1000.0), SEQUENCE)],
    "Graph": [
        (
            lambda: nl.graph.Graph(
                [nl.LSTM(2, name="lstm")],
                [{"name": "lstm", "node": 0, "args": [{"from": ["x", 0, 0]}], "kwargs": {}}],
                ["x"],
                {"from": ["lstm", 0, 0]},
                name="named",
            ),
            SEQUENCE,
        )
    ],
    "Seq2Seq": [
        (
            lambda: nl.Seq2Seq(
                *(9, 8, 4),
                embedding_units=3,
                bidirectional=False,
                score_mode="additive",
                input_feeding=True,
                dropout=0.2,
            ),
            [np.array([[3, 4, 0]]), np.array([[1, 5]])],
        ),
        (lambda: nl.Seq2Seq(9, 8, 4), [np.array([[3, 4, 0]]), np.array([[1, 5]])]),
    ],
    "Conv1D": [
        (lambda: nl.Conv1D(4, 3, padding="causal", dilation_rate=2), SEQUENCE),
        (lambda: nl.Conv1D(6, [2], strides=2, groups=3, activation="relu", ignore_mask=True), SEQUENCE),
    ],
    "Flatten": [(lambda: nl.Flatten(), SEQUENCE)],
    "Reshape": [(lambda: nl.Reshape((3, -1)), SEQUENCE)],
    "RepeatVector": [(lambda: nl.RepeatVector(3), VECTOR)],
    "Permute": [(lambda: nl.Permute((2, 1)), SEQUENCE)],
    "Concatenate": [(lambda: nl.Concatenate(axis=1), [SEQUENCE, SEQUENCE])],
    "Add": [(lambda: nl.Add(), [SEQUENCE, SEQUENCE])],
    "GlobalAveragePooling1D": [(lambda: nl.GlobalAveragePooling1D(keepdims=True), SEQUENCE)],
    "GlobalMaxPooling1D": [(lambda: nl.GlobalMaxPooling1D(keepdims=True), SEQUENCE)],
    "InputLayer": [(lambda: nl.Input((None, 3), batch_size=2, name="in"), SEQUENCE)],
    "Sequential": [
        (lambda: nl.Sequential([nl.LSTM(4, return_sequences=True), nl.Sequential([nl.Dense(2)])]), SEQUENCE)
    ],
}
LIBRARY = [  # io's models are made from files, and are not known before their module is imported
    c
    for c in registry.values()
    if c.__module__.startswith("numlstm.")
    and not c.__module__.startswith("numlstm.io.")
    and c is not nl.Model
]
CASES = [
    pytest.param(cls, *case, id=f"{cls.__name__}-{k}")
    for cls in LIBRARY
    for k, case in enumerate(EXAMPLES.get(cls.__name__, []))
]
# A Sequential hands on one tensor.
IN_SEQUENCE = [
    p
    for p in CASES
    if not isinstance(p.values[2], list) and not getattr(p.values[1](), "return_state", False)
]


def arrays(outputs):
    return [t.numpy() for t in (outputs if isinstance(outputs, list) else [outputs])]


def test_every_layer_has_an_example():
    missing = sorted({c.__name__ for c in LIBRARY} - set(EXAMPLES))
    assert not missing, f"add an example for {missing} above: it is what the tests below run on"


@pytest.mark.parametrize(("cls", "make", "x"), CASES)
def test_config_round_trip(cls, make, x):
    layer = make()
    expected = arrays(layer(x))
    saved = json.loads(json.dumps(to_config(layer)))
    assert saved["class_name"] == cls.__name__
    again = from_config(saved)
    assert type(again) is cls and to_config(again) == to_config(layer)
    again(x)
    again.set_weights(layer.get_weights())
    for inner in again.walk():
        if hasattr(inner[1], "reset_states"):
            inner[1].reset_states()
    for a, b in zip(arrays(again(x)), expected, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert [w.trainable for w in again.weights] == [w.trainable for w in layer.weights]
    assert len(again.trainable_weights) == len(layer.trainable_weights)


@pytest.mark.parametrize(("cls", "make", "x"), CASES)
def test_output_shape_is_what_comes_out(cls, make, x):
    layer = make()
    outputs = arrays(layer(x))
    told = layer.compute_output_shape(batch_none(shape_of(x)))
    for shape, y in zip(told if isinstance(told, list) else [told], outputs, strict=True):
        assert len(shape) == y.ndim and all(n in (None, m) for n, m in zip(shape, y.shape, strict=True))
        assert shape[1:] == y.shape[1:]


@pytest.mark.parametrize(("cls", "make", "x"), IN_SEQUENCE)
def test_saves_and_loads(cls, make, x, tmp_path):
    model = nl.Sequential([make()])
    y = model(x).numpy()
    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    assert np.array_equal(again(x).numpy(), y)


@pytest.mark.parametrize(("cls", "make", "x"), CASES)
def test_explains_itself(cls, make, x):
    lines = []
    rows = nl.explain(make(), print_fn=lines.append)
    assert rows and len(lines) == len(rows) + 1
    assert all(row["kernel"] and row["why"] for row in rows)


@pytest.mark.parametrize("cls", LIBRARY, ids=lambda c: c.__name__)
def test_an_unknown_option_is_named(cls):
    layer = EXAMPLES[cls.__name__][0][0]()
    with pytest.raises(ValueError, match=r"unknown option 'colour'.*Known: .*name"):
        cls.from_config({**layer.get_config(), "colour": "red"})
    with pytest.raises(ValueError, match="name: expected a string"):
        cls.from_config({**layer.get_config(), "name": 3})


def test_an_unknown_layer_lists_the_known():
    with pytest.raises(
        ValueError, match=r"unknown layer 'LTSM': did you mean 'LSTM'\? Known: Activation, Add, "
    ):
        from_config({"class_name": "LTSM", "config": {}})


def test_a_model_of_ones_own_needs_a_name():
    model = _Doubled(3)
    model(SEQUENCE)
    saved = to_config(model)
    with pytest.raises(ValueError, match="unknown layer '_Doubled'"):
        from_config(saved)
