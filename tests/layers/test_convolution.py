"""Conv1D: against its definition, window by window; masks, paddings, refusals."""

from __future__ import annotations

import numpy as np
import pytest

import numlstm as nl

X = np.random.default_rng(0).standard_normal((2, 9, 6)).astype(np.float32)
OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 4, "strides": 3},
    {"kernel_size": 3, "dilation_rate": 2},
    {"kernel_size": 3, "groups": 2, "activation": "tanh"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "same", "strides": 2},
    {"kernel_size": 2, "padding": "same", "dilation_rate": 3, "use_bias": False},
    {"kernel_size": 3, "padding": "causal", "groups": 3},
    {"kernel_size": 3, "padding": "causal", "strides": 2},
    {"kernel_size": [1], "strides": (2,)},
    {"kernel_size": 12, "padding": "causal"},
]


def by_definition(layer, x):
    """Every output step by itself, in float64."""
    kernel = layer.kernel.numpy().astype(np.float64)
    T, size, each = x.shape[1], kernel.shape[0], kernel.shape[1]
    reach = (size - 1) * layer.dilation_rate + 1
    if layer.padding == "valid":
        steps, before = (T - reach) // layer.strides + 1, 0
    else:
        steps = -(-T // layer.strides)
        missing = max((steps - 1) * layer.strides + reach - T, 0)
        before = reach - 1 if layer.padding == "causal" else missing // 2
    y = np.zeros((len(x), steps, layer.filters))
    per_group = layer.filters // layer.groups
    for t in range(steps):
        for f in range(layer.filters):
            first = f // per_group * each
            for k in range(size):
                at = t * layer.strides + k * layer.dilation_rate - before
                if 0 <= at < T:
                    y[:, t, f] += x[:, at, first : first + each].astype(np.float64) @ kernel[k, :, f]
    if layer.bias is not None:
        y += layer.bias.numpy()
    return np.tanh(y) if layer.activation.__name__ == "tanh" else y


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_its_definition(options):
    nl.set_seed(0)
    layer = nl.Conv1D(6, bias_initializer="uniform", **options)
    y = layer(X).numpy()
    expected = by_definition(layer, X)
    assert y.shape == expected.shape == layer.compute_output_shape(X.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert layer.compute_output_shape((None, None, 6)) == (None, None, 6)


def test_a_causal_convolution_does_not_look_ahead():
    layer = nl.Conv1D(3, 3, padding="causal", dilation_rate=2)
    later = X.copy()
    later[:, 5:] = 7
    assert np.array_equal(layer(X).numpy()[:, :5], layer(later).numpy()[:, :5])
    assert not np.array_equal(layer(X).numpy()[:, 5:], layer(later).numpy()[:, 5:])


MASK = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1, 0, 1]], bool)


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_masked_steps_are_zeros_and_the_mask_goes_on(padding):
    layer = nl.Conv1D(3, 3, padding=padding)
    plain = layer(X * MASK[..., None]).numpy()
    masked = layer(X, mask=MASK)
    np.testing.assert_array_equal(masked.numpy(), plain)
    expected = MASK[:, 2:] if padding == "valid" else MASK
    np.testing.assert_array_equal(masked.mask, expected)


def test_the_mask_of_strides_and_the_one_that_is_ignored():
    strided = nl.Conv1D(3, 3, padding="causal", strides=2)(X, mask=MASK)
    np.testing.assert_array_equal(strided.mask, MASK[:, ::2])
    same = nl.Conv1D(3, 3, padding="same", strides=2)(X, mask=MASK)
    assert same.shape[1] == same.mask.shape[1] == 5
    layer = nl.Conv1D(3, 3, padding="same", ignore_mask=True)
    ignored = layer(X, mask=MASK)
    assert ignored.mask is None
    np.testing.assert_array_equal(ignored.numpy(), layer(X).numpy())


def test_a_model_learns_with_it():
    nl.set_seed(1)
    model = nl.Sequential([nl.Conv1D(8, 3, activation="relu", input_shape=(9, 6)), nl.LSTM(8), nl.Dense(1)])
    model.compile(nl.optimizers.Adam(0.02), "mse")
    x = np.random.default_rng(2).standard_normal((64, 9, 6)).astype(np.float32)
    y = x[:, 3:6, 0].sum(1, keepdims=True)
    losses = model.fit(x, y, epochs=25, verbose=0).history["loss"]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "full"}, "padding: expected valid, same, causal, got 'full'"),
        ({"strides": 2, "dilation_rate": 2}, "strides: expected 1 where dilation_rate is above 1"),
        ({"groups": 4}, "groups: expected a divisor of the 6 filters"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": [2, 2]}, "kernel_size"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nl.Conv1D(6, **{"kernel_size": 3, **options})


def test_what_the_input_must_be():
    with pytest.raises(ValueError, match="at least 3 time steps"):
        nl.Conv1D(2, 3)(X[:, :2])
    with pytest.raises(ValueError, match="divisor of the 5 features"):
        nl.Conv1D(4, 3, groups=2)(X[..., :5])
    with pytest.raises(ValueError, match="rank 3"):
        nl.Conv1D(4, 3)(X[0])
