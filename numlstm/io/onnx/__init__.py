"""ONNX: graphs in and out, and the interface of `onnx.backend`.

    import numlstm as nl

    model = nl.io.load_onnx("model.onnx")     # runs, trains, is saved like any other
    nl.io.save_onnx(model, "again.onnx")      # with native LSTM, GRU and RNN nodes

    from numlstm.io.onnx import Backend
    y, last = Backend.prepare(onnx.load("model.onnx")).run([x])

`recurrent` holds the tables that map the recurrent operators' conventions, `operators` and `operators_shape` the other
operators, `graph` a graph as plain data and how it runs, `model` the model made of one, `importer` the way in, `exporter`
the way out, with `writers` and `writers_recurrent` for the layers and `tracing` for models whose `call` is Python.
Importing this package needs no onnx; reading or writing a graph does (`pip install numlstm[onnx]`).
"""

from numlstm.io.onnx.backend import Backend, Prepared
from numlstm.io.onnx.exporter import save_onnx
from numlstm.io.onnx.importer import load_onnx
from numlstm.io.onnx.model import OnnxModel
from numlstm.io.onnx.operators import OPERATORS
from numlstm.io.onnx.recurrent import (
    ACTIVATIONS,
    GATES,
    PEEPHOLES,
    Recurrent,
    activation_names,
    gate_columns,
    gate_rows,
    onnx_activations,
)

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "OPERATORS",
    "PEEPHOLES",
    "Backend",
    "OnnxModel",
    "Prepared",
    "Recurrent",
    "activation_names",
    "gate_columns",
    "gate_rows",
    "load_onnx",
    "onnx_activations",
    "save_onnx",
]
