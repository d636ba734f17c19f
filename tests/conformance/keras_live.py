"""Keras' answers to the questions of keras_questions.py, over PyTorch, which differentiates them.

Keras takes its backend from the environment when it is first imported: `KERAS_BACKEND` is set to "torch" here unless
it says otherwise already. Keras lets every operation on double precision give single precision, as JAX does by
default; a table of its own, private to Keras, says so, and is changed while a question is asked.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras.src.backend.common import dtypes
from keras_questions import ONE_WAY, Question, answers


def in_keras_order(kind: str, weight: np.ndarray, units: int) -> np.ndarray:
    """Weights (or their gradients) of ours in Keras' order of gates, and back: both GRUs' r z n and z r h, that
    is, the first two change places. An LSTM's i f g o is Keras' i f c o."""
    if kind != "GRU":
        return weight
    r, z, n = (weight[..., k * units : (k + 1) * units] for k in range(3))
    return np.concatenate([z, r, n], axis=-1)


def keras_layer(q: Question, dtype: str) -> Any:
    """Not built."""
    layer = getattr(keras.layers, q.kind)(q.H, **q.options, dtype=dtype)
    if q.mode == ONE_WAY:
        return layer
    # by itself Keras makes a second layer that reads backwards, whichever way the first does
    other = {**q.options, "go_backwards": not q.backwards}
    backward = getattr(keras.layers, q.kind)(q.H, **other, name="backward", dtype=dtype)
    return keras.layers.Bidirectional(layer, q.mode, backward_layer=backward, dtype=dtype)


def theirs(q: Question, given: dict[str, Any], dtype: str = "float64") -> dict[str, np.ndarray]:
    """Outputs, last states, and the gradients of all that went in, in our layout."""
    layer = keras_layer(q, dtype)
    layer.build((q.B, q.T, q.I))
    layer.set_weights([in_keras_order(q.kind, w, q.H) for w in given["weights"]])
    leaf = lambda a: torch.tensor(a, dtype=getattr(torch, dtype), requires_grad=True)
    x, states = leaf(given["x"]), [leaf(s) for s in given["states"]] if q.starts else []
    mask = None if given["mask"] is None else torch.tensor(given["mask"])
    with mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, float64="float64"):
        results = list(layer(x, initial_state=states or None, mask=mask))
    wanted = given["doutputs"] + given["dstates"]
    loss = sum((r * torch.tensor(d, dtype=r.dtype)).sum() for r, d in zip(results, wanted, strict=True))
    loss.backward()
    of_weights = [in_keras_order(q.kind, w.value.grad.numpy(), q.H) for w in layer.trainable_weights]
    gradients = [x.grad.numpy(), *of_weights, *(s.grad.numpy() for s in states)]
    return answers(q, given, [r.detach().numpy() for r in results], gradients)
