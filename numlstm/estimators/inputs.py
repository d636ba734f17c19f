"""Sequences as people have them: 3-D arrays, lists of arrays of unequal length, tables with one sequence a row.

What comes out is what models take: an array (samples, time, features), or a list of arrays (time, features). Values
stay float64 here, so that scaling happens before they are rounded to float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_array, validate_data

from numlstm.data.tables import Scaler

__all__ = ["is_sequences", "read_samples", "scale"]

Samples = np.ndarray | list[np.ndarray]


def is_sequences(X: Any) -> bool:
    """A 3-D array, or a list of 2-D arrays or of sequences of unequal length (equal ones are a table's rows).

    >>> is_sequences(np.zeros((2, 3, 1))), is_sequences([[1, 2], [3]]), is_sequences([[1, 2], [3, 4]])
    (True, True, False)
    """
    if isinstance(X, np.ndarray) and X.dtype != object:
        return X.ndim == 3
    if not isinstance(X, list | tuple | np.ndarray):
        return False
    if isinstance(X, np.ndarray) and X.ndim != 1:
        return X.ndim == 3
    if len(X) == 0 or not all(hasattr(item, "__len__") and not isinstance(item, str | bytes) for item in X):
        return False
    deep = [
        np.ndim(item) if hasattr(item, "ndim") else 1 + (len(item) > 0 and hasattr(item[0], "__len__"))
        for item in X
    ]
    return max(deep) >= 2 or len({len(item) for item in X}) > 1


def read_samples(
    estimator: Any, X: Any, *, reset: bool, features_per_step: int | str = 1, allow_nan: bool = False
) -> Samples:
    """X as samples, checked; sets `n_features_in_` of the estimator if `reset`, else compares with it.

    `features_per_step` says how many columns of a table make a step ("all": the row is one step).

    Raises ValueError for what is empty, not finite, of the wrong rank or other features than `fit` had.
    """
    finite: Any = "allow-nan" if allow_nan else True
    if not is_sequences(X):
        if not reset:
            _same_kind(estimator, "table")
        X = validate_data(estimator, X, reset=reset, dtype=np.float64, ensure_all_finite=finite)
        estimator.input_kind_ = "table"
        width = X.shape[1] if features_per_step == "all" else features_per_step
        if isinstance(width, bool) or not isinstance(width, int | np.integer) or width < 1:
            raise ValueError(
                f"features_per_step: expected an integer >= 1 or 'all', got {features_per_step!r}"
            )
        if X.shape[1] % width:
            raise ValueError(
                f"features_per_step: the {X.shape[1]} columns of X can't be cut into steps of {width} features"
            )
        return X.reshape(len(X), -1, width)
    options: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": finite}
    samples: Samples
    if isinstance(X, np.ndarray) and X.dtype != object:
        block = check_array(X, allow_nd=True, input_name="X", **options)
        if 0 in block.shape:
            raise ValueError(f"X: is empty, its shape is {block.shape}")
        samples, features = block, {block.shape[2]}
    else:
        samples = [_sequence(item, row, options) for row, item in enumerate(X)]
        features = {sequence.shape[1] for sequence in samples}
    if len(features) > 1:
        raise ValueError(
            f"X: its sequences have {', '.join(map(str, sorted(features)))} features, expected one number"
        )
    (width,) = features
    if reset:
        estimator.n_features_in_, estimator.input_kind_ = width, "sequences"
    _same_kind(estimator, "sequences")
    if width != estimator.n_features_in_:
        raise ValueError(
            f"X has {width} features, but {type(estimator).__name__} is expecting {estimator.n_features_in_} "
            "features as input"
        )
    return samples


def _sequence(item: Any, row: int, options: dict[str, Any]) -> np.ndarray:
    """One sequence of a list as (time, features)."""
    array = np.asarray(item)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise ValueError(f"X[{row}]: shape {array.shape} came, expected (time, features) or (time,)")
    if 0 in array.shape:
        raise ValueError(f"X[{row}]: is empty, its shape is {array.shape}")
    return check_array(array, input_name=f"X[{row}]", **options)


def _same_kind(estimator: Any, kind: str) -> None:
    if estimator.input_kind_ != kind:
        words = {"table": "a 2-D table", "sequences": "sequences (3-D, or a list)"}
        raise ValueError(f"X: {words[kind]} came, but fit got {words[estimator.input_kind_]}")


def scale(scaler: Scaler | None, samples: Samples) -> Samples:
    """Scaled samples in float32, which is what a network takes."""

    def one(values: np.ndarray) -> np.ndarray:
        return (values if scaler is None else scaler.transform(values)).astype(np.float32)

    return [one(sequence) for sequence in samples] if isinstance(samples, list) else one(samples)
