"""Constraints: what they allow is kept, what they forbid is moved to the nearest allowed."""

import numpy as np
import pytest

from numlstm import constraints
from numlstm.autograd import Variable

W = np.array([[3.0, 0.1], [4.0, 0.2]], np.float32)


def norms(w):
    return np.sqrt((w**2).sum(axis=0))


def test_max_norm_shortens_long_columns_only():
    out = constraints.MaxNorm(2.0)(W)
    np.testing.assert_allclose(norms(out), [2.0, norms(W)[1]], rtol=1e-5)
    assert out.dtype == np.float32


def test_unit_norm_and_axis():
    np.testing.assert_allclose(norms(constraints.UnitNorm()(W)), 1, rtol=1e-5)
    np.testing.assert_allclose(norms(constraints.UnitNorm(axis=1)(W).T), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(constraints.UnitNorm(axis=[0, 1])(W)), 1, rtol=1e-5)


def test_min_max_norm():
    np.testing.assert_allclose(norms(constraints.MinMaxNorm(1.0, 2.0)(W)), [2.0, 1.0], rtol=1e-5)
    half = constraints.MinMaxNorm(1.0, 2.0, rate=0.5)(W)
    np.testing.assert_allclose(norms(half)[0], (5.0 + 2.0) / 2, rtol=1e-5)


def test_non_neg_takes_a_variable():
    assert constraints.NonNeg()(Variable([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_zero_stays_finite():
    for c in (constraints.MaxNorm(), constraints.UnitNorm(), constraints.MinMaxNorm(0.5, 1.0)):
        assert np.isfinite(c(np.zeros((2, 2)))).all()


@pytest.mark.parametrize("cls", constraints._registry.values(), ids=lambda c: c.__name__)
def test_config_round_trip(cls):
    made = cls()
    again = constraints.get({"class_name": cls.__name__, "config": made.get_config()})
    assert type(again) is cls and again.get_config() == made.get_config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constraints.MaxNorm(-1), "max_value"),
        (lambda: constraints.MinMaxNorm(2.0, 1.0), "min_value <= max_value"),
        (lambda: constraints.MinMaxNorm(rate=2), "rate"),
        (lambda: constraints.get("short"), "unknown constraint 'short'"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
