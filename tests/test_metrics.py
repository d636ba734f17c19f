"""Metrics: the numbers of Keras' documentation and tests, streaming over batches, names and refusals."""

import json

import numpy as np
import pytest

from numlstm import losses, metrics

YES, P4, W4 = [0, 0, 1, 1], [0, 0.5, 0.3, 0.9], [1, 2, 3, 4]
ONE_HOT, SCORES = [[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0]]

KERAS = [
    (metrics.Accuracy(), [[1], [2], [3], [4]], [[0], [2], [3], [4]], None, 0.75),
    (metrics.Accuracy(), [[1], [2], [3], [4]], [[0], [2], [3], [4]], [1, 1, 0, 0], 0.5),
    (metrics.BinaryAccuracy(), [[1], [1], [0], [0]], [[0.98], [1], [0], [0.6]], None, 0.75),
    (metrics.BinaryAccuracy(), [[1], [1], [0], [0]], [[0.98], [1], [0], [0.6]], [1, 0, 0, 1], 0.5),
    (metrics.CategoricalAccuracy(), ONE_HOT, SCORES, None, 0.5),
    (metrics.CategoricalAccuracy(), ONE_HOT, SCORES, [0.7, 0.3], 0.3),
    (metrics.SparseCategoricalAccuracy(), [2, 1], [[0.1, 0.6, 0.3], [0.05, 0.95, 0]], None, 0.5),
    (metrics.SparseCategoricalAccuracy(), [[2], [1]], [[0.1, 0.6, 0.3], [0.05, 0.95, 0]], [0.7, 0.3], 0.3),
    (metrics.TopKCategoricalAccuracy(k=1), ONE_HOT, SCORES, None, 0.5),
    (metrics.TopKCategoricalAccuracy(k=1), ONE_HOT, SCORES, [0.7, 0.3], 0.3),
    (metrics.SparseTopKCategoricalAccuracy(k=1), [2, 1], SCORES, None, 0.5),
    (metrics.MeanSquaredError(), [[0, 1], [0, 0]], [[1, 1], [0, 0]], None, 0.25),
    (metrics.MeanSquaredError(), [[0, 1], [0, 0]], [[1, 1], [0, 0]], [1, 0], 0.5),
    (metrics.MeanAbsoluteError(), [[0, 1], [0, 0]], [[1, 1], [0, 0]], None, 0.25),
    (metrics.RootMeanSquaredError(), [[0, 1], [0, 0]], [[1, 1], [0, 0]], None, 0.5),
    (metrics.RootMeanSquaredError(), [[0, 1], [0, 0]], [[1, 1], [0, 0]], [1, 0], 0.70710677),
    (metrics.CosineSimilarity(), [[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]], None, 0.5),
    (metrics.R2Score(), [[1], [4], [3]], [[2], [4], [4]], None, 0.57142854),
    (metrics.Precision(), [0, 1, 1, 1], [1, 0, 1, 1], None, 2 / 3),
    (metrics.Precision(), [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], 1.0),
    (metrics.Precision(top_k=2), [0, 0, 1, 1], [1, 1, 1, 1], None, 0.5),
    (metrics.Recall(), [0, 1, 1, 1], [1, 0, 1, 1], None, 2 / 3),
    (metrics.Recall(), [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], 1.0),
    (metrics.Recall(class_id=1), [[0, 1], [1, 1]], [[0.9, 0.9], [0.9, 0.1]], None, 0.5),
    (metrics.AUC(num_thresholds=3), YES, P4, None, 0.75),
    (metrics.AUC(num_thresholds=3), YES, P4, [1, 0, 0, 1], 1.0),
    (metrics.AUC(num_thresholds=3), YES, P4, W4, 0.7855),
    (metrics.AUC(num_thresholds=3, summation_method="majoring"), YES, P4, W4, 1.0),
    (metrics.AUC(num_thresholds=3, summation_method="minoring"), YES, P4, W4, 0.571),
    (metrics.AUC(num_thresholds=3, curve="PR"), YES, P4, W4, 2.416 / 7 + 4 / 7),
    (metrics.AUC(num_thresholds=3, curve="PR", summation_method="majoring"), YES, P4, W4, 1.0),
    (metrics.AUC(num_thresholds=3, curve="PR", summation_method="minoring"), YES, P4, W4, 0.7 * 0.429),
    (metrics.AUC(thresholds=[0.5]), YES, P4, None, 0.75),
    (metrics.AUC(), YES, YES, None, 1.0),
    (metrics.LossMetric("huber"), [[0.0, 0.0]], [[1.0, 3.0]], None, 1.5),
]


@pytest.mark.parametrize("metric, y_true, y_pred, weight, expected", KERAS)
def test_keras_numbers(metric, y_true, y_pred, weight, expected):
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred, np.float32)
    metric.reset_state()
    metric.update_state(y_true, y_pred, weight)
    assert metric.result() == pytest.approx(expected, abs=6e-4)
    # The same in two batches, and with a pause between
    metric.reset_state()
    state = None
    for part in (slice(0, 1), slice(1, None)):
        if state is not None:
            metric.reset_state()
            metric.set_state(json.loads(json.dumps(state)))
        if isinstance(metric, metrics.Precision) and metric.top_k:
            return  # what is among the top depends on the batch, where there is one axis only
        metric.update_state(y_true[part], y_pred[part], None if weight is None else weight[part])
        state = metric.get_state()
    assert metric.result() == pytest.approx(expected, abs=6e-4)


def test_auc_from_logits_is_that_of_their_probabilities():
    rng = np.random.default_rng(0)
    logits, yes = rng.normal(size=200), rng.integers(0, 2, 200)
    a, b = metrics.AUC(from_logits=True), metrics.AUC()
    assert a(yes, logits) == pytest.approx(b(yes, 1 / (1 + np.exp(-logits))))


def test_auc_approaches_the_exact_area():
    rng = np.random.default_rng(1)
    yes = rng.integers(0, 2, 4000)
    scores = np.clip(0.25 * yes + rng.uniform(0, 0.75, 4000), 0, 1)
    wins = scores[yes == 1][:, None] > scores[yes == 0][None]
    assert metrics.AUC(num_thresholds=1000)(yes, scores) == pytest.approx(wins.mean(), abs=2e-3)


def test_perplexity_and_masked_steps():
    labels, logits = np.array([[1, 0, 2]]), np.random.default_rng(0).normal(size=(1, 3, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    metric = metrics.Perplexity(from_logits=True)
    metric.update_state(labels, logits, np.array([[True, True, False]]))
    assert metric.result() == pytest.approx(np.exp(-np.log([p[0, 0, 1], p[0, 1, 0]]).mean()))
    ignoring = metrics.Perplexity(from_logits=True, ignore_class=2)
    assert ignoring(labels, logits) == pytest.approx(metric.result())


def test_r2_over_batches_and_outputs():
    rng = np.random.default_rng(2)
    y, p = rng.normal(size=(30, 2)), rng.normal(size=(30, 2))
    scores = 1 - ((y - p) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    metric = metrics.R2Score()
    for part in (slice(0, 7), slice(7, 30)):
        metric.update_state(y[part], p[part])
    assert metric.result() == pytest.approx(scores.mean())
    spread = ((y - y.mean(0)) ** 2).sum(0)
    assert metrics.R2Score("variance_weighted_average")(y, p) == pytest.approx(
        (scores * spread).sum() / spread.sum()
    )


def test_accuracy_is_resolved_by_shape_as_in_keras():
    def kind(y_true, y_pred, word="acc", loss=None):
        return metrics.resolve(word, loss, np.zeros(y_true), np.zeros(y_pred))

    assert isinstance(kind((4, 1), (4, 1)), metrics.BinaryAccuracy)
    assert isinstance(kind((4,), (4, 3)), metrics.SparseCategoricalAccuracy)
    assert isinstance(kind((4, 1), (4, 3)), metrics.SparseCategoricalAccuracy)
    assert isinstance(kind((4, 3), (4, 3)), metrics.CategoricalAccuracy)
    assert isinstance(kind((4, 5), (4, 5, 3)), metrics.SparseCategoricalAccuracy)
    assert kind((4, 1), (4, 1), "accuracy").name == "accuracy"
    # Logits: the threshold is where the probability is a half
    assert kind((4, 1), (4, 1), loss=losses.BinaryCrossentropy(from_logits=True)).threshold == 0.0
    perplexity = kind((4,), (4, 3), "perplexity", losses.SparseCategoricalCrossentropy(from_logits=True))
    assert perplexity.loss.from_logits
    crossentropy = kind((4, 3), (4, 3), "ce")
    assert isinstance(crossentropy.loss, losses.CategoricalCrossentropy)


def test_names_losses_and_functions():
    assert isinstance(metrics.get("meanAbsoluteError"), metrics.MeanAbsoluteError)
    assert metrics.get("kl_divergence").name == "kl_divergence"
    assert metrics.get(losses.Huber(2.0))([0.0], [3.0]) == 4.0

    def bias(y_true, y_pred):
        return y_pred - y_true

    assert metrics.get(bias).name == "bias"
    assert metrics.get(bias)(np.zeros(2), np.array([1.0, 2.0])) == 1.5


def test_saved_form_comes_back():
    for original in (
        metrics.Precision(thresholds=[0.3, 0.6]),
        metrics.AUC(curve="PR"),
        metrics.Perplexity(True),
    ):
        again = metrics.deserialize(json.loads(json.dumps(metrics.serialize(original))))
        assert type(again) is type(original)
        assert again.get_config() == original.get_config()


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: metrics.get("acuracy"), "unknown metric 'acuracy'.*did you mean 'Accuracy'"),
        (lambda: metrics.AUC(num_thresholds=1), "num_thresholds: expected an integer > 1"),
        (lambda: metrics.AUC(curve="XY"), "curve: expected ROC or PR"),
        (lambda: metrics.AUC(summation_method="x"), "summation_method"),
        (lambda: metrics.AUC()([0, 1], [-3.0, 2.0]), "predictions outside"),
        (lambda: metrics.Precision(thresholds=1.5), "thresholds: expected numbers from 0 to 1"),
        (lambda: metrics.TopKCategoricalAccuracy(k=0), "k: expected an integer >= 1"),
        (lambda: metrics.MeanSquaredError()(np.ones(3), np.ones((3, 2))), "targets of shape"),
        (lambda: metrics.Mean()([1.0, 2.0], [1.0, 2.0, 3.0]), "sample_weight: shape"),
        (lambda: metrics.R2Score("mean"), "class_aggregation"),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()
