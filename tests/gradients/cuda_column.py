"""The gradient matrix's CUDA column, as JSON: {row: {column: error}}, float32 on the device against the float64 reference.

Run by test_cuda_column.py in a process where Numba's simulator is on, which takes rows of small shapes only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import numpy as np
from checking import Question, gradients_of, relative
from test_gradient_matrix import CASES, layer_question

# The layers that ask the backend for operations; the others are NumPy's functions on any backend.
LAYERS = {
    "LSTM", "GRU", "SimpleRNN", "IndRNN", "SLSTM", "RNN", "Bidirectional", "Dense", "Embedding", "Dropout",
    "LayerNormalization", "MultiHeadAttention",
}  # fmt: skip
LARGEST = 700  # numbers among the leaves of a row: a thread of the simulator is one of Python


def questions() -> Iterator[Question]:
    for case in CASES:
        if case.layer in LAYERS and case.options.get("units", 0) < 20:
            question = layer_question(case)
            if sum(a.size for a in question.leaves.values()) <= LARGEST:
                yield question


def errors(question: Question) -> dict[str, float]:
    """By column, the largest error over the largest value."""
    exact, outputs = gradients_of(question, "float64", "reference")
    found, single = gradients_of(question, "float32", "cuda")
    worst = {"output": max((relative(a, b) for a, b in zip(single, outputs, strict=True)), default=0.0)}
    least = 1e-2 * max((np.max(np.abs(g), initial=0.0) for g in exact.values()), default=0.0)
    for name, gradient in exact.items():
        group = question.groups[name]
        worst[group] = max(worst.get(group, 0.0), relative(found[name], gradient, least))
    return worst


if __name__ == "__main__":
    part, parts = int(sys.argv[1]), int(sys.argv[2])
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    json.dump({q.row: errors(q) for k, q in enumerate(questions()) if k % parts == part}, sys.stdout)
