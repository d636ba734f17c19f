"""numlstm: fast recurrent networks from plain Python. Used like Keras, opened like NumPy.

>>> import numlstm as nl
>>> model = nl.Sequential([nl.LSTM(16, input_shape=(1, 1)), nl.Dense(1)])
>>> model.compile(optimizer="adam", loss="mse")
"""

__version__ = "0.1.0"

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from numlstm import (
    activations,
    backend,
    callbacks,
    constraints,
    graph,
    initializers,
    inspect,
    io,
    layers,
    losses,
    metrics,
    models,
    ops,
    optimizers,
    random,
    regularizers,
    schedules,
    seq2seq,
)
from numlstm.autograd import GradientTape, Tensor, Variable
from numlstm.backend import backends, get_backend, use_backend
from numlstm.explain import explain
from numlstm.io import load_model as load
from numlstm.layers import (
    GRU,
    LSTM,
    RNN,
    SLSTM,
    Activation,
    Add,
    AdditiveAttention,
    Attention,
    Bidirectional,
    Concatenate,
    Conv1D,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalAveragePooling1D,
    GlobalMaxPooling1D,
    IndRNN,
    Input,
    Layer,
    LayerNormalization,
    Masking,
    MultiHeadAttention,
    Permute,
    PositionEmbedding,
    RepeatVector,
    Reshape,
    SimpleRNN,
    SinusoidalPositions,
    TimeDistributed,
    TransformerBlock,
    cell,
    register_layer,
)
from numlstm.models import Model, Sequential
from numlstm.ops import clip, exp, log, maximum, minimum, relu, sigmoid, softmax, softplus, sqrt, tanh, where
from numlstm.random import set_seed
from numlstm.seq2seq import Seq2Seq
from numlstm.streaming import Stream

if _TYPE_CHECKING:  # imported when it is asked for, at the end of this file
    from numlstm import estimators as estimators

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "Activation",
    "Add",
    "AdditiveAttention",
    "Attention",
    "Bidirectional",
    "Concatenate",
    "Conv1D",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "GlobalAveragePooling1D",
    "GlobalMaxPooling1D",
    "GradientTape",
    "IndRNN",
    "Input",
    "Layer",
    "LayerNormalization",
    "Masking",
    "Model",
    "MultiHeadAttention",
    "Permute",
    "PositionEmbedding",
    "RepeatVector",
    "Reshape",
    "Seq2Seq",
    "Sequential",
    "SimpleRNN",
    "SinusoidalPositions",
    "Stream",
    "Tensor",
    "TimeDistributed",
    "TransformerBlock",
    "Variable",
    "__version__",
    "activations",
    "backend",
    "backends",
    "callbacks",
    "cell",
    "clip",
    "constraints",
    "exp",
    "explain",
    "get_backend",
    "graph",
    "initializers",
    "inspect",
    "io",
    "layers",
    "load",
    "log",
    "losses",
    "maximum",
    "metrics",
    "minimum",
    "models",
    "ops",
    "optimizers",
    "random",
    "register_layer",
    "regularizers",
    "relu",
    "schedules",
    "seq2seq",
    "set_seed",
    "sigmoid",
    "softmax",
    "softplus",
    "sqrt",
    "tanh",
    "use_backend",
    "where",
]


def __getattr__(name: str) -> _Any:
    if name == "estimators":  # it imports scikit-learn
        return _importlib.import_module("numlstm.estimators")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
