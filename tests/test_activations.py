"""Activation names, and that a cell and a tensor mean the same by each name."""

import numpy as np
import pytest

from numlstm import activations, ops
from numlstm.autograd import Tensor
from numlstm.kernels.derive import ACTIVATIONS

X = np.linspace(-4, 8, 49)


def test_known_values():
    expected = {
        "linear": X,
        "exponential": np.exp(X),
        "relu6": np.clip(X, 0, 6),
        "hard_tanh": np.clip(X, -1, 1),
        "mish": X * np.tanh(np.log1p(np.exp(X))),
        "log_sigmoid": -np.log1p(np.exp(-X)),
        "hard_sigmoid": np.clip(X / 6 + 0.5, 0, 1),
        "leaky_relu": np.where(X > 0, X, 0.2 * X),
        "softsign": X / (1 + abs(X)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(activations.get(name)(Tensor(X)).numpy(), values, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_cell_and_a_tensor_agree(name):
    in_cell = [ACTIVATIONS[name](float(v)) for v in X]
    np.testing.assert_allclose(activations.get(name)(Tensor(X)).numpy(), in_cell, rtol=1e-12, atol=1e-15)


def test_names_and_functions():
    assert activations.get(None) is activations.linear
    assert activations.get("hardSigmoid") is activations.get("hard_sigmoid")
    assert activations.get(ops.tanh) is ops.tanh
    assert activations.name_of("swish") == activations.name_of(ops.silu) == "silu"
    with pytest.raises(ValueError, match="unknown activation 'tan'"):
        activations.get("tan")
    with pytest.raises(ValueError, match=r"nl\.cell"):
        activations.name_of(lambda x: x)
