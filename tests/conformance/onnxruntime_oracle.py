"""ONNX Runtime's answers to the questions of onnx_cases.py. Only the recorder and the live tests import this file."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx_cases import Case, inputs, model


def run(case: Case, given: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The node's outputs by name, in float32."""
    given = inputs(case, np.float32) if given is None else given
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model(case, given, weights_fixed=False).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return dict(zip(case.outputs, session.run(None, given), strict=True))
