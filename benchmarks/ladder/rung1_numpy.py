"""Rung 1, a NumPy loop: the equations as a person writes them down.

The input product of all steps is one large product, which BLAS does well. The recurrent product must wait for the step
before it, so there are T small ones. What costs beside them: every line of `step` reads and writes whole arrays in memory
and makes new ones, NumPy's exp and tanh are called apart from all else, and Python comes back between any two calls.
"""

from __future__ import annotations

import numpy as np

TITLE = "NumPy loop"
THREADED = False  # BLAS is held to one thread, so that rungs 1 to 4 compare like with like
TOLERANCE = 1e-5


def unusable() -> str | None:
    """Why this processor can't run it."""
    return None


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def forward(x, kernel, recurrent_kernel, bias):
    """The outputs (T, B, H)."""
    (T, B, _), H = x.shape, recurrent_kernel.shape[0]
    from_input = x @ kernel + bias
    h, c = np.zeros((B, H), np.float32), np.zeros((B, H), np.float32)
    outputs = np.empty((T, B, H), np.float32)
    for t in range(T):
        i, f, g, o = np.split(from_input[t] + h @ recurrent_kernel, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = outputs[t] = sigmoid(o) * np.tanh(c)
    return outputs
