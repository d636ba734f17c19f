"""Initializers against Keras' formulas: ranges and moments, seeds, shapes that don't fit."""

import inspect

import numpy as np
import pytest

from numlstm import initializers, random

CLASSES = initializers._registry.values()
DRAWN = [c for c in CLASSES if "seed" in inspect.signature(c.__init__).parameters]


def test_keras_names_are_there():
    names = (
        "zeros ones constant random_uniform random_normal truncated_normal uniform normal orthogonal "
        "identity "
        "glorot_uniform glorot_normal he_uniform he_normal lecun_uniform lecun_normal glorotUniform HeNormal"
    )
    for name in names.split():
        assert isinstance(initializers.get(name), initializers.Initializer), name
    with pytest.raises(ValueError, match="unknown initializer 'glorot_unform': did you mean 'GlorotUniform'"):
        initializers.get("glorot_unform")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_shape_dtype_and_config(cls):
    made = cls()
    for dtype in ("float32", "float64"):
        values = made((4, 6), dtype)
        assert values.shape == (4, 6) and values.dtype == dtype and values.flags.writeable
    saved = {"class_name": cls.__name__, "config": made.get_config()}
    again = initializers.get(saved)
    assert type(again) is cls and again.get_config() == made.get_config()


@pytest.mark.parametrize("cls", DRAWN, ids=lambda c: c.__name__)
def test_a_seed_fixes_the_numbers(cls):
    assert np.array_equal(cls(seed=3)((5, 4)), cls(seed=3)((5, 4)))
    assert not np.array_equal(cls(seed=3)((5, 4)), cls(seed=4)((5, 4)))
    assert initializers.get({"class_name": cls.__name__, "config": cls(seed=3).get_config()}).seed == 3


@pytest.mark.parametrize("cls", DRAWN, ids=lambda c: c.__name__)
def test_without_a_seed_the_library_seed_counts(cls):
    random.set_seed(5)
    first, second = cls()((5, 4)), cls()((5, 4))
    random.set_seed(5)
    assert np.array_equal(cls()((5, 4)), first)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "scale", "fan", "uniform"),
    [
        ("glorot_uniform", 1.0, (300 + 200) / 2, True),
        ("glorot_normal", 1.0, (300 + 200) / 2, False),
        ("he_uniform", 2.0, 300, True),
        ("he_normal", 2.0, 300, False),
        ("lecun_uniform", 1.0, 300, True),
        ("lecun_normal", 1.0, 300, False),
    ],
)
def test_variance_scaling(name, scale, fan, uniform):
    random.set_seed(1)
    values = initializers.get(name)((300, 200))
    assert np.isclose(values.var(), scale / fan, rtol=0.02)
    assert abs(values.mean()) < 4 * np.sqrt(scale / fan / values.size)
    limit = np.sqrt(3 * scale / fan) if uniform else 2 * np.sqrt(scale / fan) / 0.87962566103423978
    assert np.abs(values).max() <= limit * (1 + 1e-6)
    assert np.abs(values).max() > 0.99 * limit


def test_truncated_normal_stays_within_two_deviations():
    values = initializers.TruncatedNormal(mean=1.0, stddev=0.5, seed=0)((20000,))
    assert np.abs(values - 1).max() <= 1.0
    assert np.isclose(values.std(), 0.5 * 0.87962566103423978, rtol=0.02)


def test_keras_defaults():
    assert np.abs(initializers.get("uniform")((1000,))).max() <= 0.05
    assert np.isclose(initializers.RandomNormal(seed=0)((20000,)).std(), 0.05, rtol=0.03)


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (5, 5), (2, 3, 4)])
def test_orthogonal(shape):
    q = initializers.Orthogonal(gain=2.0, seed=0)(shape, "float64").reshape(-1, shape[-1])
    gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


def test_orthogonal_has_random_signs():
    # With LAPACK's own signs the diagonal of q would be negative nearly always.
    diagonals = np.concatenate([np.diag(initializers.Orthogonal(seed=s)((4, 4))) for s in range(50)])
    assert 60 < (diagonals > 0).sum() < 140


def test_constant_takes_an_array():
    table = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(initializers.Constant(table)((2, 3)), table)
    assert initializers.Constant(table).get_config()["value"] == table.tolist()
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the weight \(3, 2\)"):
        initializers.Constant(table)((3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.GlorotUniform(seed=-1), "seed"),
        (lambda: initializers.GlorotUniform(seed=0.5), "seed"),
        (lambda: initializers.RandomUniform(1, 0), "minval 1 is above maxval 0"),
        (lambda: initializers.RandomNormal(stddev=-1), "stddev"),
        (lambda: initializers.VarianceScaling(scale=0), "scale"),
        (lambda: initializers.VarianceScaling(mode="fan"), "mode"),
        (lambda: initializers.VarianceScaling(distribution="cauchy"), "distribution"),
        (lambda: initializers.Orthogonal()((4,)), "at least two axes"),
        (lambda: initializers.Identity()((4,)), "two axes"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fans():
    assert initializers.fans(()) == (1, 1)
    assert initializers.fans((7,)) == (7, 7)
    assert initializers.fans((3, 5)) == (3, 5)
    assert initializers.fans((2, 3, 5)) == (6, 10)
