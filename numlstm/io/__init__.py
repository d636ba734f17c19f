"""Reading and writing models, and the safe way to write any file.

`io.onnx`, `io.torch` and `io.keras`, and what they offer here, are imported when they are asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from numlstm.io.atomic import atomic_write, write_bytes, write_text
from numlstm.io.native import describe, load_model, save_model

if TYPE_CHECKING:
    from numlstm.io import keras as keras
    from numlstm.io import onnx as onnx
    from numlstm.io import torch as torch
    from numlstm.io.keras import load_keras, save_keras
    from numlstm.io.onnx import load_onnx, save_onnx
    from numlstm.io.torch import from_torch, load_torch, save_torch, to_torch, torch_layers, torch_state_dict

# What comes from a module that is imported when it is asked for.
_LAZY = {
    "from_torch": "torch",
    "load_keras": "keras",
    "load_onnx": "onnx",
    "load_torch": "torch",
    "save_keras": "keras",
    "save_onnx": "onnx",
    "save_torch": "torch",
    "to_torch": "torch",
    "torch_layers": "torch",
    "torch_state_dict": "torch",
}

__all__ = [
    "atomic_write",
    "describe",
    "from_torch",
    "load_keras",
    "load_model",
    "load_onnx",
    "load_torch",
    "save_keras",
    "save_model",
    "save_onnx",
    "save_torch",
    "to_torch",
    "torch_layers",
    "torch_state_dict",
    "write_bytes",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name in ("onnx", "torch", "keras"):
        return importlib.import_module(f"numlstm.io.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"numlstm.io.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
