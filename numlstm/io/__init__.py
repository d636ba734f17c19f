"""Reading and writing models, and the safe way to write any file. `io.onnx` is imported when it is asked for."""

import importlib
from typing import Any

from numlstm.io.atomic import atomic_write, write_bytes, write_text
from numlstm.io.native import describe, load_model, save_model

__all__ = [
    "atomic_write",
    "describe",
    "load_model",
    "load_onnx",
    "save_model",
    "save_onnx",
    "write_bytes",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name == "onnx":  # it imports the onnx package
        return importlib.import_module("numlstm.io.onnx")
    if name in ("load_onnx", "save_onnx"):
        return getattr(importlib.import_module("numlstm.io.onnx"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
