"""PyTorch modules and their export to ONNX. Only the recorder and the live tests import this file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn


class Tagger(nn.Module):
    """Embedding, a recurrent stack, norm, a dense layer on the last step."""

    def __init__(self, recurrent: Any, **options: Any) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(10, 4), recurrent(4, 5, 2, batch_first=True, **options)
        width = 10 if options.get("bidirectional") else 5
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, _ = self.recurrent(self.embedding(ids))
        return torch.softmax(self.out(self.norm(torch.relu(y[:, -1]))), -1)


class States(nn.Module):
    """States in and out, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 5)

    def forward(self, x: Any, h: Any, c: Any) -> Any:
        y, (h, c) = self.recurrent(x, (h, c))
        return y, h, c


class Packed(nn.Module):
    """Packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 5, batch_first=True, bidirectional=True)

    def forward(self, x: Any, lengths: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = self.recurrent(packed)
        return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0], h


class Convolved(nn.Module):
    """Convolution, norm and pooling over time in front of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.MaxPool1d(2)
        self.recurrent, self.drop = nn.GRU(6, 5, batch_first=True, bidirectional=True), nn.Dropout(0.5)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Any) -> Any:
        x = self.pool(torch.relu(self.norm(self.conv(x.transpose(1, 2))))).transpose(1, 2)
        _, h = self.recurrent(x)
        return self.out(self.drop(torch.cat([h[0], h[1]], -1)))


class Attending(nn.Module):
    """Causal self-attention and a gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
        )

    def forward(self, x: Any) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, src_mask=mask, is_causal=True)


def modules() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], int]]:
    """Module, inputs and the operator set to export to, by name."""
    torch.manual_seed(0)
    ids = torch.randint(0, 10, (3, 6))
    normal = torch.randn
    found = {
        "lstm": (Tagger(nn.LSTM), (ids,), 17),
        "lstm-both": (Tagger(nn.LSTM, bidirectional=True), (ids,), 9),
        "gru-both": (Tagger(nn.GRU, bidirectional=True), (ids,), 13),
        "rnn": (Tagger(nn.RNN, nonlinearity="relu", bias=False), (ids,), 20),
        "states": (States(), (normal(6, 3, 4), normal(1, 3, 5), normal(1, 3, 5)), 17),
        "packed": (Packed(), (normal(3, 6, 4), torch.tensor([6, 2, 4])), 17),
        "convolved": (Convolved(), (normal(3, 8, 4),), 17),
        "attending": (Attending(), (normal(3, 5, 8),), 18),
        "double": (nn.LSTM(4, 5).double(), (normal(6, 3, 4).double(),), 17),
    }
    for module, *_ in found.values():
        for parameter in module.parameters():  # no two alike: the exporter would merge them
            parameter.data += 0.1 * normal(parameter.shape).to(parameter.dtype)
    return {name: (module.eval(), *rest) for name, (module, *rest) in found.items()}


def export(module: nn.Module, arguments: tuple[torch.Tensor, ...], opset: int, dynamo: bool) -> Any:
    """The ModelProto; None where PyTorch can't export the module."""
    names = [f"input_{k}" for k in range(len(arguments))]
    if dynamo:
        if isinstance(module, Packed):
            return None  # torch.export does not follow packed sequences
        program = torch.onnx.export(
            module, arguments, dynamo=True, opset_version=max(opset, 18), input_names=names, verbose=False
        )
        return program.model_proto
    buffer = io.BytesIO()
    axes = {
        name: {k: f"{name}_{k}" for k in range(min(2, a.ndim))}
        for name, a in zip(names, arguments, strict=True)
    }
    torch.onnx.export(
        module, arguments, buffer, dynamo=False, opset_version=opset, input_names=names, dynamic_axes=axes
    )
    return onnx.load_model_from_string(buffer.getvalue())


def answers(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """What the module itself gives, one array an output."""

    def flat(value: Any) -> list[np.ndarray]:
        return [a for v in value for a in flat(v)] if isinstance(value, tuple) else [value.detach().numpy()]

    with torch.no_grad():
        return flat(module(*arguments))
