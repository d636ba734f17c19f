"""Every public layer on a device: results, gradients and masks are the reference's, and nothing crosses over unasked."""

from pathlib import Path

import numpy as np
import pytest
from strict_arrays import StrictArray, reset_counts

import numlstm as nl
from numlstm import activations, layers, ops
from numlstm.kernels import cells
from numlstm.layers import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    Activation,
    Add,
    AdditiveAttention,
    Attention,
    Bidirectional,
    Concatenate,
    Conv1D,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalAveragePooling1D,
    GlobalMaxPooling1D,
    IndRNN,
    Input,
    LayerNormalization,
    Masking,
    MultiHeadAttention,
    Permute,
    PositionEmbedding,
    RepeatVector,
    Reshape,
    SimpleRNN,
    SinusoidalPositions,
    TimeDistributed,
    TransformerBlock,
)  # fmt: skip

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, 6)).astype(np.float32)
FLAT = RNG.normal(size=(4, 6)).astype(np.float32)
IDS = RNG.integers(0, 7, (4, 5))
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
ALL = {"return_sequences": True, "return_state": True}


@nl.cell(gates=2, state=("h",))
def leaky(a, b, h):
    return nl.sigmoid(a) * h + (1 - nl.sigmoid(a)) * nl.tanh(b)


RECURRENT = {
    "lstm": lambda: LSTM(3),
    "lstm all": lambda: LSTM(3, return_cell_sequence=True, **ALL),
    "lstm dropout": lambda: LSTM(3, dropout=0.3, recurrent_dropout=0.3, zoneout=(0.1, 0.2), return_sequences=True),
    "lstm dropout a step": lambda: LSTM(3, recurrent_dropout=0.3, recurrent_dropout_per_step=True),
    "lstm dropconnect": lambda: LSTM(3, recurrent_dropconnect=0.4, return_sequences=True),
    "lstm peephole": lambda: LSTM(3, peephole=True, coupled=True, cell_clip=0.5, return_sequences=True),
    "lstm norm": lambda: LSTM(3, layer_norm=True, use_bias=False, return_sequences=True),
    "lstm projection": lambda: LSTM(3, projection=2, return_sequences=True, zero_output_for_mask=True),
    "lstm backwards": lambda: LSTM(3, go_backwards=True, return_sequences=True),
    "lstm remat": lambda: LSTM(3, remat_steps=2, return_sequences=True),
    "lstm regularized": lambda: LSTM(3, kernel_regularizer="l1_l2", activity_regularizer="l2", kernel_constraint="max_norm"),
    "gru": lambda: GRU(3, return_sequences=True, zoneout=0.2),
    "gru before": lambda: GRU(3, reset_after=False, **ALL),
    "gru norm": lambda: GRU(3, layer_norm=True, return_sequences=True),
    "rnn": lambda: SimpleRNN(3, return_sequences=True),
    "indrnn": lambda: IndRNN(3, return_sequences=True),
    "slstm": lambda: SLSTM(3, return_sequences=True),
    "own": lambda: RNN(leaky, 3, return_sequences=True),
    "both ways": lambda: Bidirectional(LSTM(3, **ALL, dropout=0.2)),
    "both ways, sum": lambda: Bidirectional(GRU(3, return_sequences=True), merge_mode="sum"),
    "both ways, mul": lambda: Bidirectional(GRU(3), merge_mode="mul"),
}  # fmt: skip
SEQUENCES = {
    **RECURRENT,
    "dense": lambda: Dense(3, activation="gelu"),
    "dropout": lambda: Dropout(0.4, noise_shape=(None, 1, None)),
    "activation": lambda: Activation("softmax"),
    "average": lambda: GlobalAveragePooling1D(),
    "max": lambda: GlobalMaxPooling1D(),
    "convolution": lambda: Conv1D(4, 2, padding="same", groups=1),
    "norm": lambda: LayerNormalization(),
    "norm of two": lambda: LayerNormalization(axis=(1, 2), center=False),
    "masking": lambda: Masking(0.5),
    "flatten": lambda: Flatten(),
    "permute": lambda: Permute((2, 1)),
    "reshape": lambda: Reshape((3, -1)),
    "sines": lambda: SinusoidalPositions(),
    "positions": lambda: PositionEmbedding(9),
    "each step": lambda: TimeDistributed(Dense(2)),
    "transformer": lambda: TransformerBlock(2, 8, dropout=0.2, causal=True),
    "transformer after": lambda: TransformerBlock(2, 8, normalize_first=False),
}
ENDS_MASKS = {"flatten", "permute", "reshape", "norm of two"}
PAIRS = {
    "attention": lambda: Attention(use_scale=True, dropout=0.2),
    "general": lambda: Attention(score_mode="general"),
    "concat": lambda: Attention(score_mode="concat", use_scale=True, dropout=0.2),
    "additive": lambda: Attention(score_mode="additive", units=3),
    "additive, Keras'": lambda: AdditiveAttention(),
    "additive, unscaled": lambda: AdditiveAttention(use_scale=False),
    "heads": lambda: MultiHeadAttention(2, 3, dropout=0.2),
    "add": lambda: Add(),
    "side by side": lambda: Concatenate(),
    "one after another": lambda: Concatenate(axis=1),
}


def plain(value):
    """Tensors, and lists of them, as NumPy arrays."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return (
        None if value is None else nl.backend.to_numpy(value.data if isinstance(value, nl.Tensor) else value)
    )


def trained(backend, make, inputs, **options):
    """A layer's outputs, mask and gradients, dropout included, and its outputs at inference."""
    nl.set_seed(3)
    layer = make()
    with nl.use_backend(backend):
        layer(inputs, **options)  # makes the weights; what is counted comes next
        reset_counts()
        with nl.GradientTape() as tape:
            outputs = layer(inputs, training=True, **options)
            several = outputs if isinstance(outputs, list) else [outputs]
            loss = sum((ops.sum(o * o) for o in several), start=0.0)
            for penalty in layer.losses:
                loss = loss + penalty
        weights = layer.trainable_weights
        gradients = tape.gradient(loss, weights) if weights else []
        masks = [getattr(o, "mask", None) for o in several]
        if backend.startswith("strict"):
            for array in (*(o.data for o in several), *gradients, *(w.data for w in weights)):
                assert type(array) is StrictArray
        found = [plain(several), plain(gradients), plain(masks), plain(layer(inputs, **options))]
    return found


def same(a, b):
    if isinstance(a, list):
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            same(p, q)
    elif a is None or b is None:
        assert a is b
    else:
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def compare(counts, make, inputs, **options):
    same(trained("strict", make, inputs, **options), trained("reference", make, inputs, **options))
    return counts


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_layer_over_sequences(counts, name):
    compare(counts, SEQUENCES[name], X)


@pytest.mark.parametrize("name", [n for n in SEQUENCES if n not in ENDS_MASKS])
def test_a_layer_over_masked_sequences(counts, name):
    compare(counts, SEQUENCES[name], X, mask=MASK)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_over_lengths_and_from_a_state(counts, name):
    compare(counts, RECURRENT[name], X, lengths=[5, 3, 0, 1])
    layer = RECURRENT[name]()
    layer(X)
    widths = (
        [w for side in (layer.forward_layer, layer.backward_layer) for w in side.state_widths]
        if isinstance(layer, Bidirectional)
        else layer.state_widths
    )
    compare(counts, RECURRENT[name], X, initial_state=[np.full((4, w), 0.1, np.float32) for w in widths])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_over_several_inputs(counts, name, masked):
    options = {"mask": [MASK, MASK[::-1]]} if masked else {}
    compare(counts, PAIRS[name], [X, X[:, ::-1].copy()], **options)


def test_attention_with_masks_of_its_own(counts):
    given = RNG.random((4, 5, 5)) < 0.7
    compare(counts, lambda: MultiHeadAttention(2, 3), [X, X], attention_mask=given, use_causal_mask=True)
    given = RNG.random((4, 2, 5, 5)) < 0.7
    compare(counts, lambda: MultiHeadAttention(2, 3), [X, X], attention_mask=given.astype(float))
    compare(counts, lambda: Attention(), [X, X], return_attention_scores=True, use_causal_mask=True)


def test_layers_over_vectors_and_ids(counts):
    compare(counts, lambda: RepeatVector(3), FLAT)
    compare(counts, lambda: Dense(3, "leaky_relu"), FLAT)
    compare(counts, lambda: Embedding(7, 3), IDS)
    compare(counts, lambda: Embedding(7, 3, mask_zero=True), IDS)
    compare(counts, lambda: Embedding(7, 3, mask_zero=True), IDS.astype(np.float32))
    ids = RNG.integers(0, 7, (4, 5, 2))
    compare(
        counts,
        lambda: nl.Sequential([Embedding(7, 3, mask_zero=True), TimeDistributed(GRU(3)), LSTM(2)]),
        ids,
    )
    compare(counts, lambda: nl.Sequential([Input((5, 6)), LSTM(2)]), X)


def test_no_public_layer_is_left_out():
    here = Path(__file__).read_text(encoding="utf-8")
    bases = {"Layer", "Recurrent"}
    for name in layers.__all__:
        if isinstance(value := getattr(layers, name), type) and name not in bases | {"InputLayer"}:
            assert issubclass(value, layers.Layer) and f"{name}(" in here


@pytest.mark.parametrize("name", activations._registry.names())
def test_an_activation(counts, name):
    if name not in ("cell",):
        compare(counts, lambda: Activation(name), X[:2] * 3)


def test_ids_and_labels_out_of_range_are_refused_on_a_device(counts):
    layer = Embedding(7, 3)
    with nl.use_backend("strict"):
        with pytest.raises(ValueError, match="expected ids from 0 to 6"):
            layer(np.array([[7]]))
        with pytest.raises(ValueError, match="expected ids from 0 to 6"):
            layer(nl.get_backend().asarray(np.array([[-1]])))  # from the device: it is asked
        assert counts.scalars
        reset_counts()
        layer(np.array([[6]]))
        assert counts.scalars == 0  # known from the host


def test_where_a_layer_runs_follows_the_array(counts):
    layer = LSTM(3)
    there = nl.get_backend("strict").asarray(X)
    y = layer(there)
    assert type(y.data) is StrictArray and type(layer.kernel.data) is StrictArray
    same(plain(y), plain(layer(X)))  # a NumPy array takes the weights back
    assert type(layer.kernel.data) is np.ndarray
    assert not layer.kernel.data.flags.writeable


def test_weights_of_layers_called_by_themselves_come_along(counts):
    inner = Dense(3)
    model = nl.Sequential([inner, Dense(2)])
    with nl.use_backend("strict"):
        model(FLAT)
    y = inner(FLAT)  # never called on the host before, its weights lie on the device
    assert type(y.data) is np.ndarray and type(inner.kernel.data) is np.ndarray
    with nl.use_backend("strict"):
        assert type(model(FLAT).data) is StrictArray
        reset_counts()
        model(FLAT)
        assert counts.ins == 1 and counts.outs == 0  # the input


def test_arrays_of_two_devices_do_not_mix(counts):
    first, second = (nl.get_backend(name).asarray(X) for name in ("strict:0", "strict:1"))
    with pytest.raises(ValueError, match="strict:1 came, expected one of strict:0"), nl.use_backend("strict"):
        Dense(2, name="head")(second)
    with pytest.raises(ValueError, match="initial_state"):
        LSTM(3)(first, initial_state=[nl.get_backend("strict:1").asarray(np.zeros((4, 3), np.float32))] * 2)
    with pytest.raises(ValueError, match="mask: an array in the memory of strict:1"):
        LSTM(3)(first, mask=nl.get_backend("strict:1").asarray(MASK))
    for operation in (lambda a, b: a + b, ops.matmul, lambda a, b: ops.concatenate([a, b]), ops.maximum):
        with pytest.raises(ValueError, match=r"(b|xs\[1\]): an array of shape .* do not mix"):
            operation(nl.Tensor(first), nl.Tensor(X))
    with pytest.raises(ValueError, match="w: an array in the memory of strict:1"), nl.use_backend("strict"):
        ops.linear(first, nl.get_backend("strict:1").asarray(X[0].T))


OPERATIONS = {
    "linear": (lambda x, w: ops.linear(x, w), X, FLAT.T.copy()),
    "matmul": (lambda a, b: ops.matmul(a, b), X[0], FLAT.T.copy()),
    "batched": (ops.matmul, X, np.swapaxes(X, 1, 2).copy()),
    "softmax": (ops.softmax, X),
    "norm": (lambda x, g, b: ops.layer_norm(x, g, b), X, FLAT[0], FLAT[1]),
    "dropout": (lambda x: ops.dropout(x, 0.5, seed=3), X),
    "embedding": (lambda t: ops.embedding(t, IDS), RNG.normal(size=(7, 3)).astype(np.float32)),
    "cross-entropy": (lambda p: ops.sparse_categorical_crossentropy(IDS, p, from_logits=True), RNG.normal(size=(4, 5, 7))),
    "probabilities": (lambda p: ops.sparse_categorical_crossentropy(IDS, p), RNG.random((4, 5, 7)).astype(np.float32)),
    "attention": (lambda q, k: ops.attend(q, k, k, np.tri(5, dtype=bool))[0], X, X[:, ::-1].copy()),
    "scores": (lambda q, k: ops.additive_scores(q, k, np.ones(6, np.float32)), X, X[:, ::-1].copy()),
    "sequence": (
        lambda x, w, r: ops.recurrent(cells.elman(), x, w, r, mask=MASK, state=[np.ones((4, 3))])[0],
        X, FLAT[:3].T.copy(), FLAT[:3, :3].copy(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_its_operands_to_the_backend_in_use_and_gradients_home(counts, name):
    operation, *operands = OPERATIONS[name]
    found, kinds = [], {"strict": StrictArray, "reference": np.ndarray}
    for backend, kind in kinds.items():
        nl.set_seed(0)
        tensors = [nl.Variable(a) for a in operands]
        with nl.use_backend(backend), nl.GradientTape() as tape:
            y = operation(*tensors)
            loss = ops.sum(y * y)
        gradients = tape.gradient(loss, tensors)
        assert type(y.data) is kind and all(type(g) is np.ndarray for g in gradients)
        found.append([plain(y), plain(gradients)])
    same(*found)
    there = [nl.Tensor(nl.get_backend("strict").asarray(a)) for a in operands]
    with nl.use_backend("reference"):
        assert type(operation(*there).data) is np.ndarray
    assert type(operation(*there).data) is StrictArray  # nothing chosen: where they lie


def test_the_gradient_of_an_input_comes_back_to_where_it_lies(counts):
    found = []
    for backend in ("strict", "reference"):
        nl.set_seed(0)
        layer, x = GRU(3), nl.Tensor(X)
        with nl.use_backend(backend), nl.GradientTape() as tape:
            tape.watch(x)
            loss = ops.sum(layer(x))
        (g,) = tape.gradient(loss, [x])
        assert type(g) is np.ndarray
        found.append(g)
    np.testing.assert_array_equal(*found)


def test_indices_that_repeat_are_summed_in_order(counts):
    table = RNG.normal(size=(5, 3)).astype(np.float32)
    index, g = RNG.integers(0, 5, 40), RNG.normal(size=(40, 3)).astype(np.float32)
    found = []
    for backend in ("strict", "reference"):
        w = nl.Variable(table)
        w.move(nl.get_backend(backend))
        for take in (lambda w: w[index], lambda w: w[index, 1], lambda w: w[w.data[:, 0] > 0]):
            with nl.GradientTape() as tape:
                taken = take(w)
                weight = nl.get_backend(backend).asarray(
                    g[: taken.shape[0], : taken.shape[-1]].reshape(-1)[: taken.size]
                )
                loss = ops.sum(taken.reshape(taken.size) * weight)
            found.append(plain(tape.gradient(loss, [w])[0]))
    same(found[:3], found[3:])


def test_int8_weights_stay_on_the_host(counts):
    model = nl.Sequential([LSTM(8, input_shape=(None, 6)), Dense(2)])
    with nl.use_backend("strict"):
        model(X)
        small = model.quantize("int8")  # from weights that lie on the device
        with pytest.raises(ValueError, match="int8 weights run on the CPU"):
            small(X)
    np.testing.assert_allclose(small.predict(X, verbose=0), model.predict(X, verbose=0), atol=0.05)


def test_a_stream_steps_through_a_model_on_a_device(counts):
    nl.set_seed(0)
    model = nl.Sequential(
        [Masking(0.0, input_shape=(None, 6)), LSTM(4, return_sequences=True), GRU(3), Dense(2)]
    )
    expected = model.predict(X, verbose=0)
    with nl.use_backend("strict"):
        stream = model.stream(batch_size=4)
        assert all("has no stepping kernels" in row["why"] for row in stream.explain(print_fn=lambda _: None))
        for t in range(3):
            y = stream.step(X[:, t])
        states = stream.states
        assert all(type(s) is np.ndarray for group in states for s in group)
        stream.reset([0, 1])
        stream.set_states(states)
    for t in range(3, 5):  # and goes on where it was, on the host
        y = stream.step(X[:, t])
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_gradient_norms_of_a_model_on_a_device(counts):
    found = []
    for backend in ("strict", "reference"):
        nl.set_seed(0)
        model = nl.Sequential([Bidirectional(LSTM(3, return_sequences=True)), GRU(3), Dense(1)])
        model.compile("adam", "mse", backend=backend)
        found.append(nl.inspect.gradient_norms(model, X, np.ones((4, 1)), training=True))
    assert found[0].loss == found[1].loss
    for norms, expected in zip(found[0].norms.values(), found[1].norms.values(), strict=True):
        np.testing.assert_allclose(norms, expected, rtol=1e-6)
