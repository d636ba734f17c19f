"""scikit-learn's own checks, cloning, pickling, pipelines, searches, joblib's backends."""

import copy
import io
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from small import QUICK

import numlstm as nl

KINDS = ["LSTMClassifier", "LSTMRegressor", "LSTMForecaster", "LSTMAnomalyDetector"]

# With rows="steps" the rows of X are time steps of one series: what one row gets depends on those before it.
ROWS_IN_ORDER = (
    "a row is a time step, judged by the rows before it: rows alone, or in another order, are another series"
)
EXPECTED = {
    "check_methods_subset_invariance": ROWS_IN_ORDER,
    "check_methods_sample_order_invariance": ROWS_IN_ORDER,
    "check_fit1d": "a 1-D X is a series, which rows='steps' asks for",
}


def small(kind):
    """An estimator whose training on the checks' data takes milliseconds, and still learns them."""
    return getattr(nl.estimators, kind)(units=8, epochs=30, learning_rate=0.02)


def outcome(estimator, **options):
    """Every check's status by name, of those that did not pass."""
    results = check_estimator(estimator, on_fail=None, on_skip=None, **options)
    assert len(results) > 35
    return {r["check_name"]: (r["status"], r["exception"]) for r in results if r["status"] != "passed"}


@pytest.mark.filterwarnings("ignore")  # the checks feed what deserves warnings
@pytest.mark.parametrize("kind", KINDS)
def test_check_estimator_passes(kind):
    left = outcome(small(kind))
    # runs only where the variable SCIPY_ARRAY_API was set before SciPy was imported
    assert {name: status for name, (status, _) in left.items()} in (
        {},
        {"check_array_api_input": "skipped"},
    ), left


@pytest.mark.filterwarnings("ignore")
def test_check_estimator_with_rows_that_are_steps():
    """The only expected failures, and they must fail: a detector of steps that passed would look at nothing."""
    detector = small("LSTMAnomalyDetector").set_params(rows="steps")
    left = outcome(detector, expected_failed_checks=EXPECTED)
    left.pop("check_array_api_input", None)
    assert {name for name, (status, _) in left.items() if status == "xfail"} == set(left) == set(EXPECTED), (
        left
    )


def data(kind, rng):
    X = rng.normal(size=(24, 6))
    y = {"LSTMClassifier": np.array(["a", "b"] * 12), "LSTMRegressor": X.sum(axis=1)}.get(kind)
    return X, y


@pytest.mark.parametrize("kind", KINDS)
def test_clone_pickle_joblib_and_files_predict_the_same_bits(kind, tmp_path):
    X, y = data(kind, np.random.default_rng(0))
    estimator = getattr(nl.estimators, kind)(**QUICK)
    unfitted = clone(estimator)
    with pytest.raises(NotFittedError):
        unfitted.predict(X)
    with pytest.raises(NotFittedError):
        unfitted.save(tmp_path / "none.safetensors")
    expected = estimator.fit(X, y).predict(X)
    np.testing.assert_array_equal(clone(estimator).fit(X, y).predict(X), expected)  # same seed, same bits
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    buffer.seek(0)
    estimator.save(tmp_path / "e.safetensors")
    loaded = nl.estimators.load(tmp_path / "e.safetensors")
    for again in (
        pickle.loads(pickle.dumps(estimator)),
        joblib.load(buffer),
        copy.deepcopy(estimator),
        loaded,
    ):
        assert type(again) is type(estimator) and again.get_params() == estimator.get_params()
        np.testing.assert_array_equal(again.predict(X), expected)
    assert isinstance(nl.load(tmp_path / "e.safetensors"), nl.Sequential)  # the network alone
    assert estimator.model_.preprocessing is None


def test_a_pickle_holds_the_models_own_format():
    X, y = data("LSTMRegressor", np.random.default_rng(0))
    state = nl.estimators.LSTMRegressor(**QUICK).fit(X, y).__getstate__()
    assert isinstance(state["model_"], bytes) and b'"numlstm"' in state["model_"][:300]


def test_randomness_is_the_estimators_own():
    """`fit` with a seed neither follows nor disturbs the library's stream; without one, two fits differ."""
    X, y = data("LSTMRegressor", np.random.default_rng(0))
    nl.set_seed(5)
    before = nl.random.get_state()
    first = nl.estimators.LSTMRegressor(**QUICK).fit(X, y)
    assert nl.random.get_state() == before
    free = [nl.estimators.LSTMRegressor(units=6, epochs=1).fit(X, y).predict(X) for _ in range(2)]
    assert not np.array_equal(*free)
    rng = np.random.RandomState(3)
    nl.estimators.LSTMRegressor(units=6, epochs=1, random_state=rng).fit(X, y)
    np.testing.assert_array_equal(first.predict(X), nl.estimators.LSTMRegressor(**QUICK).fit(X, y).predict(X))


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_jobs_side_by_side_give_what_one_gives(backend):
    X, y = data("LSTMRegressor", np.random.default_rng(0))

    def fitted(seed):
        return nl.estimators.LSTMRegressor(units=6, epochs=2, random_state=seed).fit(X, y).predict(X)

    with joblib.parallel_config(backend=backend, n_jobs=2):
        together = joblib.Parallel()(joblib.delayed(fitted)(seed) for seed in range(4))
    for seed, prediction in enumerate(together):
        np.testing.assert_array_equal(prediction, fitted(seed))


def search(vowels, n_jobs):
    x, y, *_ = vowels
    some = np.arange(0, len(x), 3)  # 90 utterances, 10 a speaker
    grid = {"units": [8, 24], "learning_rate": [0.002, 0.02]}
    estimator = nl.estimators.LSTMClassifier(epochs=8, random_state=0)
    return GridSearchCV(estimator, grid, cv=2, n_jobs=n_jobs).fit([x[k] for k in some], y[some])


def test_grid_search_over_unequal_sequences_in_two_processes(vowels):
    once, again, alone = search(vowels, 2), search(vowels, 2), search(vowels, 1)
    for other in (again, alone):
        np.testing.assert_array_equal(
            once.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"]
        )
        assert once.best_params_ == other.best_params_
    assert once.best_params_ == {"learning_rate": 0.02, "units": 24}
    assert once.best_score_ > 0.7  # chance is 1/9
    *_, x, y = vowels
    assert once.score(x, y) > 0.7


@pytest.mark.peers
def test_joblibs_dask_backend(vowels):
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed] (extra: peers)")
    alone = search(vowels, 1)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        spread = search(vowels, -1)
    np.testing.assert_array_equal(alone.cv_results_["mean_test_score"], spread.cv_results_["mean_test_score"])


def test_pipelines_and_cross_validation():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 8)) * 50 + 7
    y = (X[:, 2:4].sum(axis=1) > 14).astype(int)
    pipeline = make_pipeline(
        StandardScaler(), nl.estimators.LSTMClassifier(units=8, epochs=40, learning_rate=0.02, random_state=0)
    )
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.7
    assert "lstmclassifier__units" in pipeline.get_params()
    assert pipeline.set_params(lstmclassifier__units=4).fit(X, y).predict(X[:2]).shape == (2,)


def test_a_forecaster_is_searched_by_time(waves):
    grid = {"predict_change": [True, False]}
    forecaster = nl.estimators.LSTMForecaster(
        rows="steps", window=8, coverage=(), epochs=4, units=8, random_state=0
    )
    found = GridSearchCV(forecaster, grid, cv=TimeSeriesSplit(2)).fit(waves)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    assert found.predict(waves).shape == (1, 2)


def test_without_scikit_learn_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numlstm as nl\n"
        "try:\n    nl.estimators\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'numlstm[sklearn]'" in done.stdout


def test_importing_numlstm_imports_no_sklearn():
    program = "import sys, numlstm; print(sorted({'sklearn', 'pandas', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
