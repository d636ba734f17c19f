"""Questions to the CUDA kernels, answered in NumPy arrays wherever they ran."""

from __future__ import annotations

from typing import Any

import numpy as np
from questions import Question, answer, error

from numlstm.backend import to_numpy
from numlstm.kernels import reference
from numlstm.kernels.cuda import sequence

BOUNDS = {"float32": 1e-5, "float64": 1e-10}


def on_host(value: Any) -> Any:
    """Device arrays as NumPy arrays, within tuples too; the rest as it is."""
    if isinstance(value, tuple) and not isinstance(value, sequence.Residual):
        parts = [on_host(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return to_numpy(value) if hasattr(value, "shape") else value


class Kernels:
    """The CUDA sequence as the other modules of kernels are: NumPy arrays in and out."""

    @staticmethod
    def forward(*arguments: Any, **options: Any) -> Any:
        return on_host(sequence.forward(*arguments, **options))

    @staticmethod
    def backward(residual: Any, *arguments: Any, **options: Any) -> Any:
        return on_host(sequence.backward(residual, *arguments, **options))


def check(question: Question, dtype: str = "float32", **options: Any) -> dict[str, np.ndarray]:
    """Hold a training pass in `dtype` to the float64 reference; gives what it found."""
    right = answer(question, reference, **options)
    found = answer(question.cast(dtype), Kernels, **options)
    assert found.keys() == right.keys()
    assert {a.dtype.name for a in found.values()} == {dtype}
    errors = {k: error(found[k], right[k]) for k in right}
    assert all(e <= BOUNDS[dtype] for e in errors.values()), f"{question.cell.name}, {dtype}: {errors}"
    return found
