"""Ask ONNX Runtime the questions of onnx_cases.py and keep its answers in onnxruntime.npz.

Run `python tests/conformance/record_onnxruntime.py` with onnxruntime installed, after a question has changed; the tests
then compare without it. What is not compared is not recorded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_oracle
from onnx_cases import CASES

ANSWERS = Path(__file__).with_name("onnxruntime.npz")


def main() -> None:
    flat = {
        f"{case.name}/{name}": a
        for case in CASES
        if case.not_compared is None
        for name, a in onnxruntime_oracle.run(case).items()
    }
    np.savez_compressed(ANSWERS, version=np.array(onnxruntime.__version__), **flat)
    size = ANSWERS.stat().st_size / 1e3
    print(f"{len(flat)} answers from ONNX Runtime {onnxruntime.__version__}, {size:.0f} kB")


if __name__ == "__main__":
    main()
