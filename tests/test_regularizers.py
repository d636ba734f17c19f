"""Penalties: values, gradients through the tape, names."""

import numpy as np
import pytest

from numlstm import regularizers
from numlstm.autograd import GradientTape, Variable


@pytest.mark.parametrize(
    ("regularizer", "value", "gradient"),
    [
        (regularizers.L1(0.1), lambda w: 0.1 * abs(w).sum(), lambda w: 0.1 * np.sign(w)),
        (regularizers.L2(0.1), lambda w: 0.1 * (w**2).sum(), lambda w: 0.2 * w),
        (
            regularizers.L1L2(0.1, 0.2),
            lambda w: 0.1 * abs(w).sum() + 0.2 * (w**2).sum(),
            lambda w: 0.1 * np.sign(w) + 0.4 * w,
        ),
        (regularizers.L1L2(), lambda w: 0.0, lambda w: 0 * w),
    ],
    ids=["l1", "l2", "l1_l2", "none"],
)
def test_value_and_gradient(regularizer, value, gradient):
    w = Variable(np.array([[1.0, -2.0], [0.5, 3.0]]))
    with GradientTape() as tape:
        penalty = regularizer(w)
    assert np.isclose(float(penalty), value(w.data))
    np.testing.assert_allclose(tape.gradient(penalty, [w])[0], gradient(w.data))


def test_names_and_configs():
    assert regularizers.get(None) is None
    for name in ("l1", "L2", "l1_l2", "L1L2"):
        made = regularizers.get(name)
        again = regularizers.get({"class_name": type(made).__name__, "config": made.get_config()})
        assert again.get_config() == made.get_config()
    assert regularizers.l1_l2().get_config() == {"l1": 0.01, "l2": 0.01}
    with pytest.raises(ValueError, match="unknown regularizer 'l3'"):
        regularizers.get("l3")


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_must_be_a_number_from_zero(strength):
    with pytest.raises(ValueError, match="l2: expected a number >= 0"):
        regularizers.L2(strength)
