"""Layers, under Keras' names: made with options, built at the first call, differentiated by the tape."""

from numlstm.layers.attention import AdditiveAttention, Attention, MultiHeadAttention, TransformerBlock
from numlstm.layers.base import Layer, from_config, register_layer, registry, to_config
from numlstm.layers.bidirectional import Bidirectional
from numlstm.layers.convolution import Conv1D
from numlstm.layers.core import (
    Activation,
    Add,
    Concatenate,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalAveragePooling1D,
    GlobalMaxPooling1D,
    Input,
    InputLayer,
    LayerNormalization,
    Masking,
    Permute,
    RepeatVector,
    Reshape,
    TimeDistributed,
)
from numlstm.layers.positions import PositionEmbedding, SinusoidalPositions
from numlstm.layers.recurrent import GRU, LSTM, RNN, SLSTM, IndRNN, Recurrent, SimpleRNN, cell

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
    "IndRNN",
    "Input",
    "InputLayer",
    "Layer",
    "LayerNormalization",
    "Masking",
    "MultiHeadAttention",
    "Permute",
    "PositionEmbedding",
    "Recurrent",
    "RepeatVector",
    "Reshape",
    "SimpleRNN",
    "SinusoidalPositions",
    "TimeDistributed",
    "TransformerBlock",
    "cell",
    "from_config",
    "register_layer",
    "registry",
    "to_config",
]
