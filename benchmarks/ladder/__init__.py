"""The LSTM kernel's story in rungs: one small file each, from a NumPy loop to what runs in `kernels/`.

Read them in order: each opens with what changed from the rung below and why that helps. All compute the same thing, the
outputs (T, B, H) of an LSTM over x (T, B, I) from states of zero, with weights in Keras' layout (gates i f g o), and each
is held to `kernels/reference.py` before it is timed. `python -m benchmarks.ladder` does both.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NamedTuple

# Rungs 1 to 4 have one thread; read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

RUNGS = (
    "rung1_numpy",
    "rung2_njit",
    "rung3_fused",
    "rung4_tiles",
    "rung5_threads",
    "rung6_bfloat16",
    "rung7_library",
)


class Question(NamedTuple):
    """One LSTM over one batch, float32."""

    x: np.ndarray  # (T, B, I)
    kernel: np.ndarray  # (I, 4 H)
    recurrent_kernel: np.ndarray  # (H, 4 H)
    bias: np.ndarray  # (4 H,)

    @property
    def operations(self) -> float:
        """Floating-point operations of the products."""
        (T, B, I), H = self.x.shape, self.recurrent_kernel.shape[0]
        return 2.0 * T * B * (I + H) * 4 * H


def rung(name: str) -> Any:
    """The module of a rung: TITLE, THREADED, TOLERANCE, unusable() and forward(x, kernel, recurrent_kernel, bias)."""
    return import_module(f"benchmarks.ladder.{name}")


def question(T: int, B: int, I: int, H: int, seed: int = 0) -> Question:
    """Inputs and weights as a trained network has them: gates neither all shut nor all open."""
    draw = np.random.default_rng(seed).standard_normal
    weights = draw((I, 4 * H)) / np.sqrt(I), draw((H, 4 * H)) / np.sqrt(H), draw(4 * H) * 0.1
    return Question(draw((T, B, I)).astype(np.float32), *(w.astype(np.float32) for w in weights))


def right_answer(asked: Question) -> np.ndarray:
    """What the reference gives, in float64."""
    from numlstm.kernels import cells, reference

    x, *weights = (a.astype(np.float64) for a in asked)
    return reference.forward(cells.lstm(), x, *weights, (), None, None, training=False).h


def error(answer: np.ndarray, right: np.ndarray) -> float:
    """The largest difference; outputs lie between -1 and 1."""
    if answer.shape != right.shape:
        raise ValueError(f"answer: expected shape {right.shape}, got {answer.shape}")
    return float(np.abs(answer - right).max())
