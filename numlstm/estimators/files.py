"""Estimators as files: the network's `.safetensors` file, with parameters and what was fitted as JSON beside it.

JSON knows neither tuples, arrays, dates nor NaN; `encode` writes them as objects with one key that begins with "$",
and `decode` reads them. There is no pickle: loading a file runs no code of the file's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from numlstm.io.native import load_model

__all__ = ["KIND", "decode", "encode", "load", "save"]

KIND = "estimator"
"""How a model file's preprocessing says that it belongs to an estimator."""


def encode(value: Any, name: str = "value") -> Any:
    """`value` in the types of JSON.

    Raises ValueError, naming `name`, for what a file can't hold.

    >>> encode({"units": (8, 4), "scale": np.array([1.0, np.nan])})
    {'units': {'$tuple': [8, 4]}, 'scale': {'$array': ['float64', [2], [1.0, {'$float': 'nan'}]]}}
    """
    if isinstance(value, np.datetime64 | np.timedelta64):
        return {"$time": [value.dtype.str, int(value.astype(np.int64))]}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list | tuple):
        items = [encode(item, name) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "mM":
            return {"$times": [value.dtype.str, list(value.shape), value.astype(np.int64).ravel().tolist()]}
        # text's dtype is named without the machine's byte order, as those of numbers are
        kind = value.dtype.str.lstrip("<>=|") if value.dtype.kind == "U" else str(value.dtype)
        return {"$array": [kind, list(value.shape), encode(value.ravel().tolist(), name)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, f"{name}[{key!r}]") for key, item in value.items()}
        return {"$dict": [[encode(key, name), encode(item, name)] for key, item in value.items()]}
    raise ValueError(f"{name}: a {type(value).__name__} can't be kept in a file, got {value!r}")


def decode(value: Any) -> Any:
    """What `encode` was given.

    >>> decode(encode({1: (True, None)}))
    {1: (True, None)}
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, content),) = value.items()
        if key == "$tuple":
            return tuple(decode(content))
        if key == "$float":
            return float(content)
        if key == "$array":
            return np.array(decode(content[2]), dtype=content[0]).reshape(content[1])
        if key == "$dict":
            return {decode(name): decode(item) for name, item in content}
        if key == "$time":
            return np.array(content[1], np.int64).view(content[0])[()]
        if key == "$times":
            return np.array(content[2], np.int64).view(content[0]).reshape(content[1])
    return {key: decode(item) for key, item in value.items()}


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator. See `RecurrentEstimator.save`."""
    params = estimator.get_params(deep=False)
    fitted = {
        k: v for k, v in vars(estimator).items() if k.endswith("_") and k != "model_" and k not in params
    }
    kept = estimator.model_.preprocessing
    try:
        estimator.model_.save(
            path,
            preprocessing={
                "kind": KIND,
                "estimator": type(estimator).__name__,
                "params": {name: encode(value, name) for name, value in params.items()},
                "fitted": {name: encode(value, name) for name, value in fitted.items()},
            },
        )
    finally:
        estimator.model_.preprocessing = kept


def load(path: str | os.PathLike[str]) -> Any:
    """The estimator that `save` wrote. It predicts the same bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of an estimator of this library, or a damaged one.

    >>> import os, tempfile
    >>> from numlstm.estimators import LSTMRegressor
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> regressor = LSTMRegressor(units=2, epochs=1, random_state=0).fit(x, x.sum(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     regressor.save(os.path.join(folder, "r.safetensors"))
    ...     again = load(os.path.join(folder, "r.safetensors"))
    >>> bool((again.predict(x) == regressor.predict(x)).all())
    True
    """
    from numlstm import estimators

    model = load_model(path)
    description, model.preprocessing = model.preprocessing or {}, None
    if description.get("kind") != KIND:
        raise ValueError(
            f"{path}: a model, but not an estimator's (its file says: {description.get('kind') or 'none'})"
        )
    try:
        name = description["estimator"]
        known = {n: getattr(estimators, n) for n in estimators.__all__ if n.startswith("LSTM")}
        if name not in known:
            raise ValueError(f"it holds a {name}, expected one of {', '.join(known)}")
        estimator = known[name](**{k: decode(v) for k, v in description["params"].items()})
        for key, value in description["fitted"].items():
            setattr(estimator, key, decode(value))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the estimator can't be rebuilt: {error}") from error
    estimator.model_ = model
    return estimator
