"""Attention against its formulas in NumPy, Keras' numbers and PyTorch; masks; rows that may look nowhere."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops
from numlstm.autograd import GradientTape, Tensor, Variable
from numlstm.layers import AdditiveAttention, Attention, MultiHeadAttention, TransformerBlock

G = np.random.default_rng(0)
B, Q, V, D = 3, 4, 6, 8
QUERY, VALUE, KEY = (G.standard_normal((B, n, D)) for n in (Q, V, V))
QUERY_MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
VALUE_MASK = np.array([[1, 1, 0, 1, 0, 0], [0] * 6, [1] * 6], bool)
MODES = [
    {"score_mode": "dot"},
    {"score_mode": "dot", "use_scale": True},
    {"score_mode": "general"},
    {"score_mode": "concat", "use_scale": True},
    {"score_mode": "additive"},
    {"score_mode": "additive", "units": 5, "use_scale": True},
]


def close(a, b, bound=1e-10):
    np.testing.assert_allclose(np.asarray(a), b, rtol=bound, atol=bound)


def softmax(scores, allowed):
    """Row by row, with loops: the slow and obvious twin. No value allowed: zeros."""
    allowed = np.broadcast_to(allowed, scores.shape)
    weights = np.zeros_like(scores)
    for place in np.ndindex(scores.shape[:-1]):
        ok = allowed[place]
        if ok.any():
            e = np.exp(scores[place][ok] - scores[place][ok].max())
            weights[place][ok] = e / e.sum()
    return weights


def own_scores(mode, weights, query, key):
    """The scores as the papers write them, pair by pair."""
    use_scale, mode = mode.get("use_scale", False), mode["score_mode"]
    scale, rest = (weights[0], weights[1:]) if use_scale else (1.0, weights)
    scores = np.zeros((B, Q, V))
    for b, i, j in np.ndindex(B, Q, V):
        q, k = query[b, i], key[b, j]
        if mode == "dot":
            scores[b, i, j] = scale * (q @ k)
        elif mode == "general":
            scores[b, i, j] = scale * (q @ rest[0] @ k)
        elif mode == "concat":
            scores[b, i, j] = rest[0] * np.tanh(scale * (q + k)).sum()
        else:
            scores[b, i, j] = rest[2] @ np.tanh(scale * (q @ rest[0] + k @ rest[1]))
    return scores


def moved(layer):
    """The layer's weights, off their starting values."""
    layer.set_weights([w + 0.3 * G.standard_normal(w.shape) for w in layer.get_weights()])
    return layer.get_weights()


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(mode, masked, causal):
    layer = Attention(**mode, dtype="float64")
    layer.build([(None, None, D)] * 3)
    weights = moved(layer)
    mask = [QUERY_MASK, VALUE_MASK] if masked else None
    y, scores = layer([QUERY, VALUE, KEY], mask=mask, use_causal_mask=causal, return_attention_scores=True)
    allowed = np.tri(Q, V, dtype=bool)[None] if causal else np.ones((1, Q, V), bool)
    if masked:
        allowed = allowed & VALUE_MASK[:, None]
    right = softmax(own_scores(mode, weights, QUERY, KEY), allowed)
    close(scores, right)
    result = right @ VALUE
    close(y, result * QUERY_MASK[..., None] if masked else result)
    assert np.array_equal(y.mask, QUERY_MASK) if masked else y.mask is None


def test_additive_attention_of_keras():
    layer = AdditiveAttention(dtype="float64")
    layer.build([(None, None, D)] * 2)
    (scale,) = moved(layer)
    scores = (scale * np.tanh(QUERY[:, :, None] + VALUE[:, None])).sum(-1)
    close(layer([QUERY, VALUE]), softmax(scores, True) @ VALUE)
    plain = AdditiveAttention(use_scale=False, dtype="float64")
    scores = np.tanh(QUERY[:, :, None] + VALUE[:, None]).sum(-1)
    close(plain([QUERY, VALUE]), softmax(scores, True) @ VALUE)
    assert not plain.weights


def test_the_numbers_of_keras():
    """From keras/src/layers/attention/attention_test.py (Keras 3): test_attention_correctness,
    test_attention_with_mask."""
    query = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    key = np.array([[[0.0, 1.0], [1.0, 0.0]]])
    value = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    y, scores = Attention()([query, value, key], return_attention_scores=True)
    close(y, [[[2.462, 3.462], [1.538, 2.538]]], 1e-3)
    close(scores, [[[0.269, 0.731], [0.731, 0.269]]], 1e-3)
    y, scores = Attention(score_mode="concat")([query, value, key], return_attention_scores=True)
    close(y, [[[1.727, 2.727], [2.272, 3.272]]], 1e-3)
    close(scores, [[[0.636, 0.363], [0.363, 0.636]]], 1e-3)
    y, scores = Attention()(
        [query, np.ones((1, 2, 2))],
        mask=[np.array([[True, False]]), np.array([[True, False]])],
        return_attention_scores=True,
    )
    close(y, [[[1, 1], [0, 0]]])
    close(scores, [[[1, 0], [1, 0]]])


def own_heads(layer, query, value, key, allowed):
    """Multi-head attention head by head, and its weights (B, N, Q, V)."""
    wq, bq, wk, bk, wv, bv, wo, bo = layer.get_weights()
    total, weights = np.zeros((*query.shape[:2], wo.shape[-1])), []
    for n in range(wq.shape[1]):
        q, k, v = query @ wq[:, n] + bq[n], key @ wk[:, n] + bk[n], value @ wv[:, n] + bv[n]
        p = softmax(
            q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), allowed if allowed.ndim < 4 else allowed[:, n]
        )
        total += p @ v @ wo[n]
        weights.append(p)
    return total + bo, np.stack(weights, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "attention", "heads", "all"])
def test_multi_head_attention_is_its_formula(kind, causal):
    layer = MultiHeadAttention(2, 3, value_dim=5, output_shape=7, dtype="float64")
    layer.build([(None, None, D)] * 3)
    moved(layer)
    given = np.random.default_rng(1).random((B, 2, Q, V)) < 0.5
    call, allowed = {}, np.ones((B, Q, V), bool)
    if kind in ("padding", "all"):
        call |= {"query_mask": QUERY_MASK, "value_mask": VALUE_MASK}
        allowed = allowed & QUERY_MASK[..., None] & VALUE_MASK[:, None]
    if causal:
        allowed = allowed & np.tri(Q, V, dtype=bool)
    if kind == "attention":
        call["attention_mask"] = given[:, 0]
        allowed = allowed & given[:, 0]
    if kind in ("heads", "all"):
        call["attention_mask"] = given
        allowed = allowed[:, None] & given
    y, scores = layer(QUERY, VALUE, KEY, return_attention_scores=True, use_causal_mask=causal, **call)
    right, weights = own_heads(layer, QUERY, VALUE, KEY, allowed)
    close(y, right)
    close(scores, weights)
    close(layer([QUERY, VALUE, KEY], use_causal_mask=causal, **call), right)


def test_weights_of_multi_head_attention_are_those_of_keras():
    layer = MultiHeadAttention(2, 3, value_dim=5)
    layer(QUERY, VALUE[..., :6])
    found = [(w.name, w.shape) for w in layer.weights]
    assert found == [
        ("query_kernel", (8, 2, 3)), ("query_bias", (2, 3)), ("key_kernel", (6, 2, 3)), ("key_bias", (2, 3)),
        ("value_kernel", (6, 2, 5)), ("value_bias", (2, 5)),
        ("output_kernel", (2, 5, 8)), ("output_bias", (8,)),
    ]  # fmt: skip
    assert (
        len(MultiHeadAttention(2, 3, use_bias=False).from_config({"num_heads": 2, "key_dim": 3}).weights) == 0
    )


@pytest.mark.peers
@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention_of_torch(masked):
    """torch.nn.MultiheadAttention: outputs, weights and the gradients of inputs and weights."""
    torch = pytest.importorskip("torch")
    N, K = 2, D // 2
    module = torch.nn.MultiheadAttention(D, N, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(module.in_proj_bias)
    inputs = [torch.tensor(x, requires_grad=True) for x in (QUERY, KEY, VALUE)]
    pad = VALUE_MASK.copy()
    pad[1, 2] = True  # where no key is left torch gives NaN
    options = {"key_padding_mask": torch.tensor(~pad)} if masked else {}
    y, weights = module(*inputs, average_attn_weights=False, **options)
    dy = torch.tensor(G.standard_normal(y.shape))
    y.backward(dy)

    layer = MultiHeadAttention(N, K, dtype="float64")
    layer.build([(None, None, D)] * 3)
    array = lambda t: t.detach().numpy()

    def ours(kernel, bias, out_kernel, out_bias):
        parts = [x for w, b in zip(np.split(kernel, 3), np.split(bias, 3), strict=True)
                 for x in (w.T.reshape(D, N, K), b.reshape(N, K))]  # fmt: skip
        return [*parts, out_kernel.T.reshape(N, K, D), out_bias]

    parameters = [module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias]
    layer.set_weights(ours(*map(array, parameters)))
    query, key, value = (Variable(array(x)) for x in inputs)
    with GradientTape() as tape:
        call = {"value_mask": pad} if masked else {}
        found, scores = layer(query, value, key, return_attention_scores=True, **call)
    close(found, array(y))
    close(scores, array(weights))
    gradients = tape.gradient(found, [query, key, value, *layer.weights], output_gradient=array(dy))
    right = [array(x.grad) for x in inputs] + ours(*(array(p.grad) for p in parameters))
    for a, b in zip(gradients, right, strict=True):
        close(a, b)


def nowhere():
    """Query and value of which row 1 has no value and row 2 no query, as an Embedding would hand them on."""
    query, value = Variable(QUERY), Variable(VALUE)
    query.mask, value.mask = QUERY_MASK, VALUE_MASK
    return query, value


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [*[lambda m=m, **o: Attention(**m, **o) for m in MODES], lambda **o: MultiHeadAttention(2, 3, **o)],
)
def test_rows_without_a_value_give_zeros_and_no_gradient(make, dtype):
    query, value = nowhere()
    layer = make(dtype=dtype)
    with GradientTape() as tape, np.errstate(all="raise", under="ignore"):
        y, scores = layer([query, value], return_attention_scores=True)
        loss = (y * y).sum() + (scores * scores).sum()
    assert not y.numpy()[1].any() and not y.numpy()[2].any() and not scores.numpy()[1].any()
    dquery, dvalue, *rest = tape.gradient(loss, [query, value, *layer.trainable_weights])
    assert not dquery[1].any() and not dvalue[1].any() and not dvalue[0][~VALUE_MASK[0]].any()
    assert all(np.isfinite(g).all() for g in (dquery, dvalue, *rest)) and dvalue[0].any()


def test_masks_arrive_with_the_tensors():
    ids = np.array([[3, 1, 2, 0], [4, 0, 0, 0]])
    x = nl.Embedding(5, 8, mask_zero=True)(ids)
    layer = MultiHeadAttention(2, 4)
    y = layer(x, x)
    assert np.array_equal(y.mask, ids != 0)
    plain = x.numpy()
    close(y, layer(plain, plain, query_mask=ids != 0, value_mask=ids != 0).numpy(), 0)
    short = layer(x[:, :3], Tensor(plain[:, :3]), value_mask=(ids != 0)[:, :3], query_mask=(ids != 0)[:, :3])
    close(y.numpy()[:, :3], short.numpy(), 1e-6)  # padding more changes nothing
    block = nl.Sequential([nl.Embedding(5, 8, mask_zero=True), TransformerBlock(2, 16), nl.LSTM(3)])
    longer = np.concatenate([ids, np.zeros((2, 3), int)], axis=1)
    close(block(ids), block(longer).numpy(), 1e-6)


def test_the_causal_block_does_not_see_the_future():
    block = TransformerBlock(2, 16, causal=True, dtype="float64")
    whole = block(VALUE).numpy()
    for t in range(1, V):
        close(block(VALUE[:, :t]), whole[:, :t])
    assert not np.allclose(TransformerBlock(2, 16, dtype="float64")(VALUE).numpy()[:, 0], whole[:, 0])


@pytest.mark.parametrize("first", [True, False])
def test_transformer_block_is_its_formula(first):
    block = TransformerBlock(2, 16, normalize_first=first, dtype="float64")
    block.build((None, None, D))
    norm = lambda x, layer: layer(x).numpy()
    look = lambda x: own_heads(block.attention, x, x, x, np.ones((1, V, V), bool))[0]
    k1, b1, k2, b2 = block.expand.get_weights() + block.contract.get_weights()
    think = lambda x: np.maximum(x @ k1 + b1, 0) @ k2 + b2
    if first:
        x = VALUE + look(norm(VALUE, block.attention_norm))
        right = x + think(norm(x, block.feedforward_norm))
    else:
        x = norm(VALUE + look(VALUE), block.attention_norm)
        right = norm(x + think(x), block.feedforward_norm)
    close(block(VALUE), right)


def test_dropout_is_for_training_only_and_seeded():
    for layer in (
        Attention(dropout=0.5),
        MultiHeadAttention(2, 4, dropout=0.5),
        TransformerBlock(2, 8, dropout=0.5),
    ):
        x = VALUE if isinstance(layer, TransformerBlock) else [VALUE, VALUE]
        still = layer(x).numpy()
        assert np.array_equal(layer(x).numpy(), still)
        nl.set_seed(1)
        first = layer(x, training=True).numpy()
        nl.set_seed(1)
        assert np.array_equal(layer(x, training=True).numpy(), first) and not np.allclose(first, still)


def test_a_trained_scale_trains():
    """A weight of shape () goes through an optimizer and a file."""

    class Pool(nl.Model):
        def __init__(self):
            super().__init__()
            self.attention, self.head = Attention(use_scale=True), nl.Dense(1)

        def call(self, x):
            return self.head(self.attention([x, x])[:, 0])

    model = Pool()
    model.compile("adam", "mse")
    model.fit(VALUE, VALUE[:, 0, :1], epochs=2, verbose=0)
    assert model.attention.scale.item() != 1 and model.attention.get_weights()[0].shape == ()


def test_positions():
    table = nl.SinusoidalPositions(dtype="float64")(np.zeros((1, 50, 6))).numpy()[0]
    for t, i in np.ndindex(50, 3):
        angle = t / 10000 ** (2 * i / 6)
        close(table[t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)])
    layer = nl.PositionEmbedding(V, dtype="float64")
    close(layer(QUERY), QUERY + layer(np.zeros((1, Q, D))).numpy())
    close(layer.get_weights()[0], layer(np.zeros((1, V, D))).numpy()[0])
    with pytest.raises(ValueError, match=r"at most 6 time steps \(sequence_length\), got shape \(1, 7, 8\)"):
        layer(np.zeros((1, 7, D)))


X3 = QUERY.astype("f")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(score_mode="luong"), "score_mode: expected one of dot, general, concat, additive"),
        (lambda: Attention(units=3), "units: belongs to score_mode='additive'"),
        (lambda: Attention()(X3), r"expected a list \[query, value\]"),
        (lambda: Attention()([X3, X3, X3, X3]), r"expected a list \[query, value\]"),
        (lambda: Attention()([X3, X3[..., 0]]), "expected inputs of shape"),
        (lambda: Attention()([X3, X3[:2]]), "one batch size"),
        (lambda: Attention()([X3, X3[:, :0]]), "at least one"),
        (lambda: Attention()([X3, X3, X3[:, :2]]), "same number of time steps"),
        (lambda: Attention()([X3, X3[..., :3]]), "query and key of one size, got 8 and 3"),
        (lambda: Attention()([X3, X3], mask=QUERY_MASK), "one mask"),
        (lambda: Attention()([X3, X3], lengths=[1, 2, 3]), "give mask="),
        (lambda: Attention()([X3, X3], use_causal=True), "knows no 'use_causal'"),
        (lambda: Attention(dropout=1.5), "dropout: expected"),
        (lambda: MultiHeadAttention(0, 3), "num_heads: expected"),
        (lambda: MultiHeadAttention(2, 3)(X3), "value: expected query and value"),
        (
            lambda: MultiHeadAttention(2, 3)(X3, X3, attention_mask=np.ones((3, 9, 9))),
            "attention_mask: expected",
        ),
        (lambda: MultiHeadAttention(2, 3)(X3, X3, attention_mask=np.full((3, 4, 4), 7)), "True and False"),
        (lambda: MultiHeadAttention(2, 3)(X3, X3, value_mask=np.ones((3, 9))), "mask: expected shape"),
        (lambda: TransformerBlock(3, 8)(X3), "num_heads 3 divides"),
        (lambda: nl.SinusoidalPositions(1.0), "max_wavelength"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_features_than_at_first():
    layer = MultiHeadAttention(2, 3)
    layer(X3, X3)
    with pytest.raises(
        ValueError, match=r"expected a value with 8 features \(last axis\), got shape \(3, 4, 5\)"
    ):
        layer(X3, X3[..., :5])


# Operations


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operation_is_its_parts(dropout, masked):
    """Values and gradients of `attend` against softmax and products by the tape, the weights' too."""
    leaves = [Variable(x) for x in (QUERY, KEY, VALUE)]
    mask = VALUE_MASK[:, None] if masked else None
    dy, dw = G.standard_normal((B, Q, D)), G.standard_normal((B, Q, V))

    def parts(query, key, value):
        weights = ops.masked_softmax(ops.matmul(query, ops.transpose(key, (0, 2, 1))) * 0.3, mask)
        return ops.matmul(ops.dropout(weights, dropout), value), weights

    def fused(query, key, value):
        return ops.attend(query, key, value, mask, scale=0.3, dropout=dropout)

    for whole in (False, True):
        found = []
        for function in (parts, fused):
            nl.set_seed(4)
            with GradientTape() as tape:
                y, weights = function(*leaves)
                loss = (y * dy).sum() + ((weights * dw).sum() if whole else 0)
            found.append([y.numpy(), weights.numpy(), *tape.gradient(loss, leaves)])
        for a, b in zip(*found, strict=True):
            close(a, b)


def test_operations_refuse():
    with pytest.raises(ValueError, match="attend: query"):
        ops.attend(QUERY, KEY[..., :3], VALUE)
    with pytest.raises(ValueError, match="attend: query"):
        ops.attend(QUERY, KEY[:, :0], VALUE[:, :0])
    with pytest.raises(ValueError, match="mask: shape"):
        ops.attend(QUERY, KEY, VALUE, np.ones((B, Q, Q), bool))
    with pytest.raises(ValueError, match="dropout: 1"):
        ops.attend(QUERY, KEY, VALUE, dropout=1)
    with pytest.raises(ValueError, match="additive_scores: query"):
        ops.additive_scores(QUERY, KEY, np.ones(3))


PROGRAM = """
import hashlib, json, sys
import numpy as np
import numlstm as nl
nl.set_seed(0)
draw = np.random.default_rng(5)
x = draw.integers(0, 20, (48, 40))
model = nl.Sequential([
    nl.Embedding(20, 64, mask_zero=True), nl.SinusoidalPositions(),
    nl.TransformerBlock(4, 96, dropout=0.1), nl.TransformerBlock(2, 64, causal=True),
    nl.GlobalAveragePooling1D(), nl.Dense(1),
])
model.compile("adam", "mse")
model.fit(x, draw.standard_normal((48, 1)), epochs=2, batch_size=24, verbose=0)
translator = nl.Seq2Seq(20, 20, 64, dropout=0.1)
translator.compile()
sources = [row[row > 0] for row in x]
translator.fit(sources, [np.maximum(s, 3) for s in sources], batch_size=24, verbose=0)
arrays = [*model.get_weights(), *translator.get_weights(), *translator.beam_search(sources[:5], 4)]
total = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
print(json.dumps(total.hexdigest()))
"""


def test_same_bits_whatever_the_thread_count():
    """Ours and those of NumPy's BLAS, which serves none of these products."""
    digests = set()
    for ours, blas in ((1, 1), (2, 2), (3, 1)):
        environment = {
            **os.environ, "NUMLSTM_NUM_THREADS": str(ours), "OPENBLAS_NUM_THREADS": str(blas),
            "MKL_NUM_THREADS": str(blas), "OMP_NUM_THREADS": str(blas),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        digests.add(json.loads(done.stdout))
    assert len(digests) == 1
