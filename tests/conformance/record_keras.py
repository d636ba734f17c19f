"""Ask Keras the questions of keras_questions.py and keep its answers: writes keras.npz.

Run it where Keras and PyTorch are installed, after changing the questions: `python tests/conformance/record_keras.py`.
"""

from __future__ import annotations

import keras_live
import numpy as np
from keras_questions import ANSWERS, QUESTIONS, inputs


def main() -> None:
    found = {"recorded_from": np.array(f"Keras {keras_live.keras.__version__}")}
    for q in QUESTIONS:
        for name, value in keras_live.theirs(q, inputs(q)).items():
            found[f"{q.name}/{name}"] = value.astype(np.float32)
    np.savez_compressed(ANSWERS, **found)
    print(
        f"{ANSWERS.name}: {len(found) - 1} answers to {len(QUESTIONS)} questions, {ANSWERS.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
