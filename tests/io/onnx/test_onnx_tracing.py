"""`save_onnx` of models whose `call` is Python of their own."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

import numlstm as nl
from numlstm.io.onnx.exporter import to_proto

DRAW = np.random.default_rng(0)


def series(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def checked(model, *inputs, **options):
    """The graph's outputs are the model's, for two batches and lengths; the model is left as it was."""
    cuts = [inputs, [x[:1, : x.shape[1] - 1] for x in inputs]]
    with nl.use_backend("reference"):
        answers = [model(list(x) if len(x) > 1 else x[0]) for x in cuts]
    proto = to_proto(model, **options)
    assert not any("call" in vars(layer) for _, layer in model.walk())
    evaluator, names = ReferenceEvaluator(proto), [v.name for v in proto.graph.input]
    for given, y in zip(cuts, answers, strict=True):
        found = evaluator.run(None, dict(zip(names, given, strict=True)))
        for a, b in zip(found, y if isinstance(y, list) else [y], strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)
    return proto


class Residual(nl.Model):
    """Arithmetic, indexing, a weight of its own, a model inside."""

    def __init__(self):
        super().__init__()
        self.first = nl.LSTM(4, return_sequences=True)
        self.inner = nl.Sequential([nl.Dense(4, "tanh"), nl.Dropout(0.5)])
        self.attention = nl.MultiHeadAttention(2, 3)
        self.block = nl.TransformerBlock(2, 8, causal=True)
        self.join = nl.Concatenate()

    def build(self, input_shape):
        self.gain = self.add_weight("gain", (4,), "ones")

    def call(self, x):
        h = self.first(x)
        h = 1 - (h + self.inner(h) * self.gain) / 2 - 0.25
        h = self.block(h + self.attention(h, h, use_causal_mask=True))
        return self.join([h[:, -1], -h[:, 0, :], h[:, ::-1][:, 0]])


class Decoder(nl.Model):
    """States from layer to layer, two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nl.LSTM(4, return_state=True)
        self.decoder = nl.LSTM(4, return_sequences=True)

    def call(self, inputs):
        past, future = inputs
        y, *states = self.encoder(past)
        return [self.decoder(future, initial_state=states), y]


class Words(nl.Model):
    """Ids in."""

    def __init__(self):
        super().__init__()
        self.embedding, self.pool, self.rest = (
            nl.Embedding(9, 4, mask_zero=True),
            nl.GlobalAveragePooling1D(),
            Residual(),
        )

    def call(self, ids):
        e = self.embedding(ids)
        return self.rest(e * 0.5) + 0.0, self.pool(e)


def test_what_a_call_does():
    proto = checked(Residual(), series(3, 6, 2))
    assert sum(n.op_type == "LSTM" for n in proto.graph.node) == 1
    assert any(t.name == "gain" for t in proto.graph.initializer)
    checked(Residual(), series(3, 6, 2), opset=20)


def test_states_and_several_inputs():
    proto = checked(Decoder(), series(3, 6, 2), series(3, 5, 3))
    sizes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert sizes == [["batch", "input_0_time", 2], ["batch", "input_1_time", 3]]


def test_ids_and_a_model_within():
    model, ids = Words(), np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    with nl.use_backend("reference"):
        rest, pooled = model(ids)
    proto = to_proto(model)
    assert proto.graph.input[0].type.tensor_type.elem_type == 7  # int64
    found = ReferenceEvaluator(proto).run(None, {"input": ids})
    np.testing.assert_allclose(found[0], rest.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], pooled.numpy(), rtol=1e-6)


def test_lengths_masks_and_kept_states():
    """The model's own states are left alone; masks go with the tensors, and end where they end here."""

    class Kept(nl.Model):
        def __init__(self):
            super().__init__()
            self.first = nl.LSTM(3, return_sequences=True, stateful=True, name="first")
            self.both = nl.Bidirectional(nl.GRU(3, return_sequences=True))
            self.pool = nl.GlobalAveragePooling1D()

        def call(self, x):
            h = self.both(self.first(x))
            return self.pool(h), self.pool(h * 1.0)  # the product has no mask

    model, x, lengths = Kept(), series(2, 5, 2), np.int32([5, 2])
    zeros = np.zeros((2, 3), np.float32)
    with nl.use_backend("reference"):
        expected = [y.numpy() for y in model(x, lengths=lengths)]
    states = model.first.states
    proto = to_proto(model, lengths=True)
    assert model.first.states is states
    assert not np.allclose(*expected)
    again = nl.io.load_onnx(proto)
    assert again.input_names == ["input", "lengths", "first.initial_h", "first.initial_c"]
    with nl.use_backend("reference"):
        found = again([x, lengths, zeros, zeros])
    for a, b in zip(found, expected, strict=False):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda self, x: self.inside(x) + np.ones(2, np.float32), "call: a tensor is computed by other means"),
        (lambda self, x: nl.tanh(self.inside(x)), "call: a tensor is computed by other means"),
        (lambda self, x: self.inside(nl.tanh(x)), "lstm.*: call: a tensor is computed by other means"),
        (lambda self, x: self.inside(x)[[0, 1]], "call: a tensor is computed by other means"),
        (lambda self, x: self.inside(x) * x.shape[1], "call: what it computes depends on the sizes of its input"),
        (lambda self, x: self.inside(x[:, : x.shape[1] // 2]), "call: what it computes depends on the sizes"),
        (lambda self, x: self.inside(x, initial_state=[np.zeros((len(x), 2))] * 2), "initial_state: it does not come from"),
        (lambda self, x: self.inside(x, mask=np.ones(x.shape[:2], bool)), "mask: it does not come with"),
    ],
)  # fmt: skip
def test_what_can_not_be_seen_is_refused(compute, message):
    class Own(nl.Model):
        def __init__(self):
            super().__init__()
            self.inside = nl.LSTM(2)

        def call(self, x):
            return compute(self, x)

    model = Own()
    with nl.use_backend("reference"):
        model(series(2, 6, 3))
        with pytest.raises(ValueError, match=f"{message}.*can't be written as ONNX"):
            to_proto(model)
    assert "call" not in vars(model.inside)
