"""Losses: the numbers of Keras' own tests, PyTorch's, gradients by differences, and what is refused."""

import json

import numpy as np
import pytest

from numlstm import losses, ops
from numlstm.autograd import GradientTape, Tensor, Variable

A = np.array([[1, 9, 2], [-5, -2, 6]])
B = np.array([[4, 8, 12], [8, 1, 3]], np.float32)
SIGNS = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.6, 0.4], [0.4, 0.6]])
BITS = np.array([[1, 0], [1, 0]]), np.array([[1, 1], [1, 0]], np.float32)
BIT_LOGITS = np.array([[1, 0, 1], [0, 1, 1]]), np.array([[10.0, -10.0, 10.0], [10.0, 10.0, -10.0]])
PROBS = np.array([[0.9, 0.05, 0.05], [0.5, 0.89, 0.6], [0.05, 0.01, 0.94]], np.float32)
LOGITS = np.array([[8.0, 1.0, 1.0], [0.0, 9.0, 1.0], [2.0, 3.0, 5.0]])
EYE = np.eye(3)
COLUMN = np.array([[1.2], [3.4], [5.6]])

KERAS = [
    (losses.MeanSquaredError(), A, B, None, 49.5),
    (losses.MeanSquaredError(), A, B, 2.3, 113.85),
    (losses.MeanSquaredError(), A, B, [[1.2], [3.4]], 767.8 / 6),
    (losses.MeanSquaredError(), A, B, [1.2, 3.4], 767.8 / 6),
    (losses.MeanSquaredError(reduction="sum"), A, B, 2.3, 227.69998),
    (
        losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        A,
        B,
        [1.2, 3.4],
        (44 + 187 / 3 * 3.4) / 4.6,
    ),
    (losses.MeanSquaredError(), A.reshape(2, 3, 1), B.reshape(2, 3, 1), [[3, 6, 5], [0, 4, 2]], 97.833336),
    (losses.MeanAbsoluteError(), A, B, None, 5.5),
    (losses.MeanAbsoluteError(), A.reshape(2, 3, 1), B.reshape(2, 3, 1), [[3, 6, 5], [0, 4, 2]], 13.833333),
    (losses.MeanAbsolutePercentageError(), A, B, None, 211.8518),
    (losses.MeanAbsolutePercentageError(), A, B, [1.2, 3.4], 422.8888),
    (losses.MeanSquaredLogarithmicError(), A, B, None, 1.4370),
    (losses.MeanSquaredLogarithmicError(), A, B, [1.2, 3.4], 3.7856),
    (losses.Hinge(), *SIGNS, None, 1.3),
    (losses.Hinge(), *SIGNS, [1, 0], 0.55),
    (losses.SquaredHinge(), *SIGNS, None, 1.86),
    (losses.CategoricalHinge(), *SIGNS, None, 1.4),
    (losses.CategoricalHinge(), *SIGNS, [1, 0], 0.6),
    (losses.BinaryCrossentropy(), *BITS, None, 3.98559),
    (losses.BinaryCrossentropy(), *BITS, [[1.2], [3.4]], 4.7827),
    (losses.BinaryCrossentropy(from_logits=True), *BIT_LOGITS, None, 3.3333),
    (losses.BinaryCrossentropy(from_logits=True), *BIT_LOGITS, [4, 3], 10.0),
    (losses.BinaryCrossentropy(True, 0.1), [[1, 0, 1]], [[10.0, -10.0, -10.0]], None, 10.5 / 3),
    (losses.CategoricalCrossentropy(), EYE, PROBS, None, 0.3239),
    (losses.CategoricalCrossentropy(), EYE, PROBS, COLUMN, 1.0696),
    (losses.CategoricalCrossentropy(from_logits=True), EYE, LOGITS, None, 0.0573),
    (losses.CategoricalCrossentropy(from_logits=True), EYE, LOGITS, 2.3, 0.1317),
    (losses.CategoricalCrossentropy(True, 0.1), [[1, 0, 0]], [[100.0, -100.0, -100.0]], None, 40 / 3),
    (losses.SparseCategoricalCrossentropy(), [0, 1, 2], PROBS, None, 0.3239),
    (losses.SparseCategoricalCrossentropy(), [[0], [1], [2]], PROBS, COLUMN, 1.0696),
    (losses.SparseCategoricalCrossentropy(from_logits=True), [0, 1, 2], LOGITS, None, 0.0573),
    (losses.SparseCategoricalCrossentropy(from_logits=True), [0.0, 1.0, 2.0], LOGITS, COLUMN, 0.31829),
]


@pytest.mark.parametrize("loss, y_true, y_pred, weight, expected", KERAS)
def test_keras_numbers(loss, y_true, y_pred, weight, expected):
    assert float(loss(y_true, y_pred, weight)) == pytest.approx(expected, abs=2e-3, rel=2e-4)


def test_values_without_reduction():
    mse = losses.MeanSquaredError(reduction=None)
    np.testing.assert_allclose(mse(A, B, 2.3).numpy(), [84.3333, 143.3666], rtol=1e-5)
    sparse = losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    np.testing.assert_allclose(sparse([0, 1, 2], LOGITS).numpy(), [0.001822, 0.000459, 0.169846], atol=1e-6)
    ignoring = losses.SparseCategoricalCrossentropy(True, ignore_class=-1, reduction=None)
    logits = [[[0.854, 0.698, 0.598], [0.088, 0.86, 0.018]]]
    np.testing.assert_allclose(ignoring([[-1, 2]], logits).numpy(), [[0.0, 1.480129]], rtol=1e-5)


def test_the_other_formulas():
    rng = np.random.default_rng(0)
    t, p = rng.uniform(0.1, 1, (5, 4)), rng.uniform(0.1, 1, (5, 4))
    e = p - t
    cosine = (t * p).sum(1) / np.linalg.norm(t, axis=1) / np.linalg.norm(p, axis=1)
    expected = {
        "log_cosh": np.log(np.cosh(e)).mean(1),
        "kl_divergence": (t * np.log(t / p)).sum(1),
        "poisson": (p - t * np.log(p + 1e-7)).mean(1),
        "cosine_similarity": -cosine,
        "huber": np.where(abs(e) < 0.3, e**2 / 2, 0.3 * abs(e) - 0.045).mean(1),
    }
    for name, values in expected.items():
        got = losses.huber(t, p, 0.3) if name == "huber" else losses.get(name).call(t, Tensor(p))
        np.testing.assert_allclose(got.numpy(), values, rtol=1e-9, err_msg=name)


def test_log_cosh_does_not_overflow():
    assert float(losses.LogCosh()([0.0, 0.0], [1000.0, -1000.0])) == pytest.approx(1000 - np.log(2))


@pytest.mark.peers
def test_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    rng = np.random.default_rng(0)
    x, y, labels = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), rng.integers(0, 5, 7)
    bits = rng.integers(0, 2, (7, 5)).astype(float)
    tx, ty, tb, tl = torch.tensor(x), torch.tensor(y), torch.tensor(bits), torch.tensor(labels)
    pairs = [
        (losses.MeanSquaredError()(y, x), f.mse_loss(tx, ty)),
        (losses.MeanAbsoluteError()(y, x), f.l1_loss(tx, ty)),
        (losses.Huber(0.7)(y, x), f.huber_loss(tx, ty, delta=0.7)),
        (losses.BinaryCrossentropy(True)(bits, x), f.binary_cross_entropy_with_logits(tx, tb)),
        (losses.SparseCategoricalCrossentropy(True)(labels, x), f.cross_entropy(tx, tl)),
        (
            losses.CategoricalCrossentropy(True, 0.1)(np.eye(5)[labels], x),
            f.cross_entropy(tx, tl, label_smoothing=0.1),
        ),
        (losses.SparseCategoricalCrossentropy(True, 2)(labels, x), f.cross_entropy(tx, tl, ignore_index=2)),
    ]
    for ours, theirs in pairs:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-9)


GRADIENTS = [
    *(
        losses.get(n)
        for n in (
            "mse",
            "mae",
            "mape",
            "msle",
            "huber",
            "log_cosh",
            "poisson",
            "cosine_similarity",
            "squared_hinge",
        )
    ),
    losses.KLDivergence(),
    losses.BinaryCrossentropy(),
    losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1),
    losses.CategoricalCrossentropy(label_smoothing=0.2),
    losses.CategoricalCrossentropy(from_logits=True),
    losses.SparseCategoricalCrossentropy(),
    losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
    losses.MeanSquaredError(reduction="sum"),
    losses.MeanSquaredError(reduction="mean_with_sample_weight"),
]


@pytest.mark.parametrize("loss", GRADIENTS, ids=lambda loss: loss.name)
@pytest.mark.parametrize("weighing", ["none", "rows", "steps", "mask", "mask and rows"])
def test_gradient_by_differences(loss, weighing):
    rng = np.random.default_rng(4)
    p = rng.uniform(0.15, 0.85, (3, 4, 5))
    t = rng.uniform(0.1, 0.9, (3, 4, 5))
    if isinstance(loss, losses.SparseCategoricalCrossentropy):
        t = rng.integers(0, 5, (3, 4))
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool) if "mask" in weighing else None
    weight = {"rows": rng.uniform(0, 2, 3), "steps": rng.uniform(0, 2, (3, 4))}.get(weighing.split()[-1])
    w = Variable(p)
    with GradientTape() as tape:
        value = loss(t, w * 1.0, weight, mask)
    gradient = tape.gradient(value, [w])[0]
    for _ in range(6):
        direction = rng.normal(size=p.shape)
        high, low = (float(loss(t, Tensor(p + s * direction), weight, mask)) for s in (1e-6, -1e-6))
        assert (gradient * direction).sum() == pytest.approx((high - low) / 2e-6, rel=2e-5, abs=1e-8)


def test_a_mask_averages_over_what_counts():
    y, p = np.zeros((2, 3, 1)), np.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]).reshape(2, 3, 1)
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert float(losses.MeanSquaredError()(y, p, mask=mask)) == pytest.approx((1 + 4 + 9) / 3)
    predicted = Tensor(p)
    predicted.mask = mask  # as a recurrent layer leaves it
    assert float(losses.MeanSquaredError()(y, predicted)) == pytest.approx((1 + 4 + 9) / 3)
    # Keras: weights multiply the values, the number of unmasked values divides
    assert float(losses.MeanSquaredError()(y, p, [1.0, 2.0], mask)) == pytest.approx((1 + 4 + 18) / 3)
    assert float(losses.MeanSquaredError()(y, p, mask=np.zeros((2, 3), bool))) == 0.0


def test_a_missing_last_axis_is_put_in():
    assert float(losses.MeanSquaredError()([1.0, 2.0], [[1.0], [4.0]])) == 2.0
    steps = losses.MeanSquaredError(reduction=None)(np.zeros((2, 3)), np.ones((2, 3, 1)))
    assert steps.shape == (2, 3)


def test_functions_and_names():
    def furthest(y_true, y_pred):
        return ops.max(ops.abs(y_true - y_pred), axis=-1)

    loss = losses.get(furthest)
    assert loss.name == "furthest"
    assert float(loss(np.zeros((2, 2), int), np.array([[1.0, -3.0], [5.0, 0.0]]))) == 4.0
    for spelling in ("mse", "MSE", "mean_squared_error", "MeanSquaredError", "meanSquaredError"):
        assert isinstance(losses.get(spelling), losses.MeanSquaredError)
    for spelling in ("sparseCategoricalCrossentropy", "sparse_categorical_crossentropy"):
        assert isinstance(losses.get(spelling), losses.SparseCategoricalCrossentropy)
    assert losses.get(None) is None
    assert losses.mse([1.0], [3.0]).numpy() == 4.0


def test_saved_form_comes_back():
    for original in GRADIENTS:
        again = losses.deserialize(json.loads(json.dumps(losses.serialize(original))))
        assert type(again) is type(original)
        assert again.get_config() == original.get_config()


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: losses.get("mean_square"), "unknown loss 'mean_square'.*did you mean"),
        (lambda: losses.get(3), "loss.*got 3"),
        (lambda: losses.MeanSquaredError("avg"), "reduction: expected one of.*got 'avg'"),
        (lambda: losses.Huber(delta=0), "delta: expected a number > 0"),
        (lambda: losses.BinaryCrossentropy(label_smoothing=1.5), "label_smoothing"),
        (
            lambda: losses.MeanSquaredError()(np.ones((3, 1)), np.ones((3, 2))),
            r"targets of shape \(3, 1\).*\(3, 2\)",
        ),
        (lambda: losses.MeanSquaredError()(np.ones(3), np.ones((3, 3))), "must have the same shape"),
        (
            lambda: losses.MeanSquaredError()(A, B, [1, 2, 3]),
            r"sample_weight: shape \(3,\) came, expected \(2,\)",
        ),
        (
            lambda: losses.SparseCategoricalCrossentropy()([0, 3], PROBS[:2]),
            "class number 3 came, expected 0 to 2",
        ),
        (lambda: losses.SparseCategoricalCrossentropy()([0, -1], PROBS[:2]), "class number -1 came"),
        (
            lambda: losses.SparseCategoricalCrossentropy()([0.5, 1], PROBS[:2]),
            "class numbers must be integers",
        ),
        (lambda: losses.SparseCategoricalCrossentropy()(EYE, PROBS), r"labels of shape \(3, 3\)"),
        (lambda: losses.CategoricalCrossentropy()([0, 1, 2], PROBS), r"targets of shape \(3,\)"),
        (
            lambda: losses.CategoricalCrossentropy()([[1.0]], [[0.5]]),
            "has one class; use binary_crossentropy",
        ),
        (lambda: losses.BinaryCrossentropy()([[2.0]], [[0.5]]), "2.0 came, expected labels from 0 to 1"),
        (lambda: losses.get(lambda y_true, y_pred: 3.0)([1.0], [1.0]), "gave a float, expected a Tensor"),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_pinball_is_scikit_learns_and_its_least_value_the_quantile():
    draw = np.random.default_rng(0)
    y, p = draw.normal(size=(50, 2)), draw.normal(size=(50, 6))
    metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn (extra: sklearn)")
    shares = [0.1, 0.5, 0.9]
    expected = np.mean([
        metrics.mean_pinball_loss(y[:, k], p[:, 3 * k + j], alpha=q) for k in range(2) for j, q in enumerate(shares)
    ])  # fmt: skip
    assert float(losses.Pinball(shares)(y, p)) == pytest.approx(expected, rel=1e-6)
    sample = draw.exponential(size=(2001, 1))
    guesses = np.sort(sample[:, 0])
    found = [float(losses.Pinball([0.8])(sample, np.full((2001, 1), g))) for g in guesses[::20]]
    assert guesses[::20][np.argmin(found)] == pytest.approx(np.quantile(sample, 0.8), rel=0.02)


def test_pinball_beside_a_point_forecast():
    y, p = np.array([[1.0], [2.0]]), np.array([[3.0, 0.0], [2.0, 2.0]])  # the point, then one quantile
    for point, first in (("mse", 4.0), ("mae", 2.0), ("huber", 1.5)):
        np.testing.assert_allclose(
            losses.Pinball([0.5], point=point).call(y, Tensor(p)).numpy(), [first + 0.5, 0]
        )
    again = losses.get(losses.serialize(losses.Pinball([0.25, 0.75], point="mae")))
    assert again.get_config()["quantiles"] == [0.25, 0.75] and again.point == "mae"
    for build, words in [
        (lambda: losses.Pinball([0.5, 1.0]), "quantiles: expected numbers between 0 and 1"),
        (lambda: losses.Pinball([]), "quantiles: expected"),
        (lambda: losses.Pinball([0.5], point="max"), "point: expected one of mse, mae, huber or None"),
        (lambda: losses.Pinball([0.1, 0.9])(y, np.ones((2, 3))), "expected 2 outputs a target"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
