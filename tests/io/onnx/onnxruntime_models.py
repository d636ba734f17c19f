"""ONNX Runtime on the graphs of onnx_models.py. Only the recorder and the live tests import this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime


def session(proto: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(proto: Any, feeds: Sequence[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    """The outputs for each feed."""
    running = session(proto)
    return [running.run(None, feed) for feed in feeds]
