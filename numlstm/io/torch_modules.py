"""PyTorch's recurrent modules as links of an `nn.Sequential`: what `to_torch` makes. Importing this imports torch.

They are nn.LSTM, nn.GRU and nn.RNN with `batch_first=True` and their parameters' names, but give a tensor and not a
tuple: the outputs of all steps (batch, time, features), or with `last` those of the last ones read (batch, features).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "GRU", "LSTM", "RNN", "Link"]


class Link(nn.RNNBase):
    """What the three share.

    Arguments:
        last: the last outputs alone; of two directions, the one that each read last.
        reverse: read the time axis from its end, and give the outputs in that order.
        merge: how two directions become one: "concat", "sum", "mul" or "ave".
        options: as the module of that name takes them.
    """

    last: bool
    reverse: bool
    merge: str

    def __init__(
        self, *sizes: Any, last: bool = False, reverse: bool = False, merge: str = "concat", **options: Any
    ) -> None:
        super().__init__(*sizes, batch_first=True, **options)
        self.last, self.reverse, self.merge = last, reverse, merge

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:  # type: ignore[override]
        """(batch, time, features) to the outputs."""
        y = super().forward(x.flip(1) if self.reverse else x, hx)[0]
        if not self.bidirectional:
            return y[:, -1] if self.last else y
        a, b = y.chunk(2, dim=-1)
        if self.last:
            a, b = a[:, -1], b[:, 0]
        match self.merge:
            case "sum":
                return a + b
            case "mul":
                return a * b
            case "ave":
                return (a + b) * 0.5
        return torch.cat([a, b], dim=-1)

    def extra_repr(self) -> str:
        """The options, for people."""
        return f"{super().extra_repr()}, last={self.last}, reverse={self.reverse}, merge={self.merge!r}"


class LSTM(Link, nn.LSTM):
    """nn.LSTM as a link."""


class GRU(Link, nn.GRU):
    """nn.GRU as a link."""


class RNN(Link, nn.RNN):
    """nn.RNN as a link."""


CLASSES: dict[str, type[Link]] = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}
