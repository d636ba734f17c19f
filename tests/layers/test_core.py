"""The layers without memory, against plain NumPy; their masks; their errors."""

import numpy as np
import pytest

import numlstm as nl
from numlstm.autograd import GradientTape, Tensor

G = np.random.default_rng(0)
X2 = G.standard_normal((3, 4)).astype(np.float32)
X3 = G.standard_normal((3, 5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def close(a, b, **tolerance):
    np.testing.assert_allclose(np.asarray(a), b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def masked(x=X3, mask=MASK):
    t = Tensor(x)
    t.mask = mask
    return t


@pytest.mark.parametrize("x", [X2, X3, X3[..., None, :]], ids=["2", "3", "4"])
def test_dense(x):
    layer = nl.Dense(6, activation="relu", bias_initializer="ones")
    y = layer(x)
    kernel, bias = layer.get_weights()
    assert kernel.shape == (4, 6) and bias.tolist() == [1.0] * 6
    close(y, np.maximum(x @ kernel + bias, 0))


def test_dense_without_bias_and_softmax():
    layer = nl.Dense(6, activation="softmax", use_bias=False)
    y = layer(X3)
    assert len(layer.weights) == 1
    close(y.numpy().sum(axis=-1), 1)


def test_embedding():
    layer = nl.Embedding(10, 3)
    ids = np.array([[1, 2], [9, 0]])
    y = layer(ids)
    (table,) = layer.get_weights()
    assert np.array_equal(y.numpy(), table[ids]) and y.mask is None
    assert 0 < np.abs(table).max() <= 0.05
    assert np.array_equal(
        layer(ids.astype(np.float64)).numpy(), table[ids]
    )  # whole numbers, as Keras takes them
    assert layer([[1, 2]]).shape == (1, 2, 3)


def test_embedding_masks_zero():
    layer = nl.Embedding(10, 3, mask_zero=True)
    ids = np.array([[1, 0, 2], [0, 0, 3]])
    assert np.array_equal(layer(ids).mask, ids != 0)
    given = np.array([[1, 1, 0], [1, 1, 1]], bool)
    assert np.array_equal(layer(ids, mask=given).mask, (ids != 0) & given)
    assert np.array_equal(nl.Embedding(10, 3)(ids, mask=given).mask, given)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 10]], r"expected ids from 0 to 9 \(input_dim - 1\), got 10"),
        ([[-1, 3]], "got -1"),
        ([[0.5]], "whole numbers"),
        ([["a"]], "expected numbers"),
    ],
)
def test_embedding_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        nl.Embedding(10, 3)(ids)


def test_dropout():
    nl.set_seed(0)
    layer = nl.Dropout(0.25)
    x = np.ones((200, 100), np.float32)
    assert np.array_equal(layer(x).numpy(), x)
    y = layer(x, training=True).numpy()
    assert set(np.unique(y).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs((y == 0).mean() - 0.25) < 0.01
    assert not np.array_equal(layer(x, training=True).numpy(), y)


def test_dropout_noise_shape_and_seed():
    nl.set_seed(0)
    y = nl.Dropout(0.5, noise_shape=(None, 1, None))(np.ones((4, 6, 50)), training=True).numpy()
    assert (y == y[:, :1]).all() and 0 < y.mean() < 2

    def draw(library_seed):
        nl.set_seed(library_seed)
        return nl.Dropout(0.5, seed=7)(np.ones((4, 50)), training=True).numpy()

    assert np.array_equal(draw(1), draw(2))
    with pytest.raises(ValueError, match="noise_shape"):
        nl.Dropout(0.5, noise_shape=(1, 2))(X3, training=True)


def test_activation_takes_names_and_functions():
    close(nl.Activation("tanh")(X2), np.tanh(X2))
    close(nl.Activation(lambda x: x * 2)(X2), X2 * 2)


def test_time_distributed():
    inner = nl.Dense(2)
    y = nl.TimeDistributed(inner)(masked())
    close(y, X3 @ inner.get_weights()[0])
    assert np.array_equal(y.mask, MASK)
    assert nl.TimeDistributed(nl.Flatten())(np.ones((2, 3, 4, 5))).shape == (2, 3, 20)
    with pytest.raises(ValueError, match="rank 3 or more"):
        nl.TimeDistributed(nl.Dense(2))(X2)


def test_masking():
    x = X3.copy()
    x[0, 1] = x[2, 4] = -1.0
    x[1, 1, 0] = -1.0  # one feature alone masks nothing
    y = nl.Masking(mask_value=-1.0)(x)
    expected = np.ones((3, 5), bool)
    expected[0, 1] = expected[2, 4] = False
    assert np.array_equal(y.mask, expected)
    assert np.array_equal(y.numpy(), x * expected[..., None])
    assert np.array_equal(nl.Masking(mask_value=-1.0)(masked(x)).mask, expected & MASK)


def normalised(x, axes, eps=1e-3):
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def test_layer_normalization():
    layer = nl.LayerNormalization()
    close(layer(X3), normalised(X3, -1), atol=1e-5)
    gamma, beta = np.arange(1.0, 5.0), np.arange(4.0)
    layer.set_weights([gamma, beta])
    close(layer(X3), normalised(X3, -1) * gamma + beta, atol=1e-5)
    assert [w.name for w in layer.weights] == ["gamma", "beta"]


@pytest.mark.parametrize("axis", [(1, 2), (-2, -1), [2, 1]])
def test_layer_normalization_over_two_axes(axis):
    layer = nl.LayerNormalization(axis=axis, center=False, epsilon=1e-5)
    close(layer(X3), normalised(X3, (1, 2), 1e-5), atol=1e-5)
    assert [w.shape for w in layer.weights] == [(5, 4)]


@pytest.mark.parametrize("axis", [1, 0, (0, 2), 5])
def test_layer_normalization_refuses_other_axes(axis):
    with pytest.raises(ValueError, match="axis: expected the last axis or several trailing ones"):
        nl.LayerNormalization(axis=axis)(X3)


def test_shape_layers():
    close(nl.Flatten()(X3), X3.reshape(3, 20))
    close(nl.Reshape((4, 5))(X3), X3.reshape(3, 4, 5))
    close(nl.Reshape((2, -1))(X3), X3.reshape(3, 2, 10))
    close(nl.Permute((2, 1))(X3), X3.transpose(0, 2, 1))
    close(nl.RepeatVector(3)(X2), np.repeat(X2[:, None], 3, 1))


def test_shape_layers_keep_ids_whole():
    assert nl.Flatten()(np.array([[[2**25 + 1]]])).dtype.kind == "i"


@pytest.mark.parametrize("layer", [nl.Flatten(), nl.Reshape((20,)), nl.Permute((2, 1))], ids=lambda x: x.name)
def test_shape_layers_end_a_mask(layer):
    assert layer(masked()).mask is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nl.Reshape((3, 3))(X3), "20 numbers a sample"),
        (lambda: nl.Reshape((-1, -1)), "at most one of them -1"),
        (lambda: nl.Reshape((0,)), "target_shape"),
        (lambda: nl.Permute((0, 1)), "dims: expected an ordering of 1 .. 2"),
        (lambda: nl.Permute((1, 2, 3))(X3), "expected rank 4"),
        (lambda: nl.RepeatVector(2)(X3), "rank 2"),
        (lambda: nl.RepeatVector(0), "n: expected"),
        (lambda: nl.Dense(0), "units"),
        (lambda: nl.Dense(2, activation="tan"), "unknown activation"),
        (lambda: nl.Dense(2)(np.ones(3)), "rank 2 or more"),
        (lambda: nl.Dropout(-0.1), "rate"),
        (lambda: nl.Dropout(0.1, seed="a"), "seed"),
        (lambda: nl.Embedding(0, 2), "input_dim"),
        (lambda: nl.LayerNormalization(epsilon=0), "epsilon"),
        (lambda: nl.Concatenate(axis=0), "axis: 0 is the batch"),
        (lambda: nl.Concatenate()([X2, X3]), "one rank"),
        (lambda: nl.Concatenate()([X2, X2[:2]]), "one batch size"),
        (lambda: nl.Concatenate(axis=1)([X3, X3[..., :2]]), "may differ in axis 1"),
        (lambda: nl.Concatenate()(X2), "a list of at least two inputs"),
        (lambda: nl.Add()([X2, X2[:, :3]]), "can't be added"),
        (lambda: nl.TimeDistributed("dense"), "expected a layer"),
        (lambda: nl.GlobalMaxPooling1D()(X3[:, :0]), "at least one time step"),
        (lambda: nl.Input(), "shape: expected the shape of one sample"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dense_that_was_built_for_other_features():
    layer = nl.Dense(2, name="head")
    layer(X2)
    with pytest.raises(
        ValueError, match=r"head: expected inputs with 4 features \(last axis\), got shape \(3, 2\)"
    ):
        layer(X2[:, :2])


def test_concatenate_and_add():
    close(nl.Concatenate()([X3, X3 * 2]), np.concatenate([X3, X3 * 2], -1))
    close(nl.Concatenate(axis=1)([X3, X3[:, :2]]), np.concatenate([X3, X3[:, :2]], 1))
    close(nl.Add()([X3, X3, X3]), 3 * X3)
    close(nl.Add()([X3, X3[:, :1]]), X3 + X3[:, :1])


def test_merged_masks():
    other = ~MASK
    other[2] = True
    assert np.array_equal(nl.Add()([masked(), masked(mask=other)]).mask, MASK & other)
    assert np.array_equal(nl.Add()([masked(), X3]).mask, MASK)
    assert nl.Add()([X3, X3]).mask is None
    along_time = nl.Concatenate(axis=1)([masked(), X3[:, :2]]).mask
    assert np.array_equal(along_time, np.concatenate([MASK, np.ones((3, 2), bool)], 1))


def test_pooling():
    close(nl.GlobalAveragePooling1D()(X3), X3.mean(axis=1))
    close(nl.GlobalMaxPooling1D()(X3), X3.max(axis=1))
    assert nl.GlobalMaxPooling1D(keepdims=True)(X3).shape == (3, 1, 4)


def test_pooling_leaves_masked_steps_out():
    mean, top = nl.GlobalAveragePooling1D()(masked()), nl.GlobalMaxPooling1D()(masked())
    close(mean, [X3[0, [0, 1, 3]].mean(0), np.zeros(4), X3[2].mean(0)])
    close(top, [X3[0, [0, 1, 3]].max(0), np.zeros(4), X3[2].max(0)])
    assert mean.mask is None and top.mask is None


@pytest.mark.parametrize(
    "layer", [nl.GlobalAveragePooling1D(), nl.GlobalMaxPooling1D()], ids=lambda x: x.name
)
def test_pooling_gradients_stay_off_masked_steps(layer):
    x = Tensor(X3)
    with GradientTape() as tape:
        tape.watch(x)
        loss = layer(x, mask=MASK).sum()
    (gradient,) = tape.gradient(loss, [x])
    assert (gradient[~MASK] == 0).all() and np.isfinite(gradient).all()
    close(gradient[0].sum(0), np.ones(4))


@pytest.mark.parametrize(
    "layer",
    [
        nl.Dense(2),
        nl.Dropout(0.1),
        nl.Activation("relu"),
        nl.LayerNormalization(),
        nl.TimeDistributed(nl.Dense(1)),
    ],
    ids=lambda x: x.name,
)
def test_layers_by_step_pass_the_mask_on(layer):
    assert np.array_equal(layer(masked()).mask, MASK)
    assert np.array_equal(layer(X3, mask=MASK).mask, MASK)
