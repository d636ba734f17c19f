"""Record what `make test` compares with: ONNX Runtime's answers on graphs that onnx's reference evaluator can't run, and
graphs that PyTorch and Keras wrote, with their own answers.

Run `KERAS_BACKEND=torch python tests/io/onnx/record_exports.py` with torch, onnxscript, keras and onnxruntime installed,
after a case has changed: it writes answers.npz and the folder exported/.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_models
from onnx_models import CASES, beyond_the_reference

HERE = Path(__file__).parent
EXPORTED = HERE / "exported"


def answers() -> None:
    found = {}
    for case in CASES:
        proto = case.proto(case.model())
        if beyond_the_reference(proto):
            names = [v.name for v in proto.graph.input]
            outputs = onnxruntime_models.run(proto, [case.feed(names, size) for size in (0, 1)])
            found |= {f"{case.name}/{size}/{k}": a for size, o in enumerate(outputs) for k, a in enumerate(o)}
    path = HERE / "answers.npz"
    np.savez_compressed(path, version=np.array(onnxruntime.__version__), **found)
    print(
        f"{len(found)} answers from ONNX Runtime {onnxruntime.__version__}, {path.stat().st_size / 1e3:.0f} kB"
    )


def exported() -> None:
    import keras
    import torch
    import torch_models

    EXPORTED.mkdir(exist_ok=True)
    for name, (module, arguments, opset) in torch_models.modules().items():
        for dynamo in (False, True):
            proto = torch_models.export(module, arguments, opset, dynamo)
            if proto is not None:
                _keep(
                    f"{name}-{'dynamo' if dynamo else 'script'}",
                    proto,
                    arguments,
                    torch_models.answers(module, arguments),
                )
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3, 4)),
            keras.layers.LSTM(5, return_sequences=True),
            keras.layers.GRU(3),
            keras.layers.Dense(2),
        ]
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    path = EXPORTED / "keras.onnx"
    model.export(path, format="onnx", verbose=False)
    _keep("keras", onnx.load(path), (torch.from_numpy(x),), [expected])


def _keep(name: str, proto: onnx.ModelProto, arguments: tuple, expected: list[np.ndarray]) -> None:
    for node in proto.graph.node:  # where in the exporter's program it came from, with paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    proto.graph.doc_string = proto.doc_string = ""
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    onnx.save(proto, EXPORTED / f"{name}.onnx")
    inputs = {f"input_{k}": a.numpy() for k, a in enumerate(arguments)}
    np.savez_compressed(
        EXPORTED / f"{name}.npz", **inputs, **{f"output_{k}": a for k, a in enumerate(expected)}
    )
    print(name, (EXPORTED / f"{name}.onnx").stat().st_size)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    answers()
    exported()
