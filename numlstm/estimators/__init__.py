"""scikit-learn estimators: `LSTMClassifier`, `LSTMRegressor`, `LSTMForecaster`, `LSTMAnomalyDetector`, and `load`.

They have scikit-learn's ways (`fit`, `predict`, `score`, `get_params`, `clone`, pipelines, grid search), scale their data
from the training part alone, and save themselves to one `.safetensors` file. Classifier and regressor read sequences:
3-D arrays (samples, time, features), lists of arrays of unequal length, or a 2-D table, one sequence a row. Forecaster
and anomaly detector also read tables whose rows are time steps, as pandas' are. Needs `pip install "numlstm[sklearn]"`.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "numlstm.estimators needs scikit-learn, which is not installed: pip install 'numlstm[sklearn]'"
    ) from _error

from numlstm.estimators.anomalies import LSTMAnomalyDetector
from numlstm.estimators.files import load
from numlstm.estimators.forecaster import Backtest, LSTMForecaster
from numlstm.estimators.supervised import LSTMClassifier, LSTMRegressor

__all__ = ["Backtest", "LSTMAnomalyDetector", "LSTMClassifier", "LSTMForecaster", "LSTMRegressor", "load"]
