"""The cells, as their papers write them: one scalar function each, from which every kernel and its gradient is derived.

Arguments are matched by name: gates' pre-activations first (W x + R h + b, in the order of the weights' columns), then the
old states that the equations use, then per-unit parameters. The first value returned is the output h.
"""

from __future__ import annotations

from functools import cache

from .derive import ACTIVATIONS, Cell, cell

__all__ = ["activation_function", "elman", "gru", "lstm"]


def activation_function(name: str):
    """The element-wise activation called `name`, as a function of the cell language.

    Raises:
        ValueError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} for a cell; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


@cache
def lstm(activation: str = "tanh", recurrent_activation: str = "sigmoid") -> Cell:
    """LSTM with a forget gate: Gers, Schmidhuber and Cummins 2000, equations 1 to 7.

    >>> lstm().gates, lstm().state
    (('i', 'f', 'g', 'o'), ('h', 'c'))
    """
    squash, gate = activation_function(activation), activation_function(recurrent_activation)

    @cell(gates="ifgo", state=("h", "c"))
    def lstm(i, f, g, o, c):
        c = gate(f) * c + gate(i) * squash(g)
        return gate(o) * squash(c), c

    return lstm


@cache
def elman(activation: str = "tanh") -> Cell:
    """The simple recurrent network: Elman 1990, h = tanh(W x + R h + b)."""
    squash = activation_function(activation)

    @cell(gates="a")
    def elman(a):
        return squash(a)

    return elman


@cache
def gru(activation: str = "tanh", recurrent_activation: str = "sigmoid") -> Cell:
    """Gated recurrent unit, the form with one recurrent product a step (`reset_after`): Cho et al. 2014, as cuDNN computes it.

    `b_n` is the recurrent bias of the candidate, inside the reset gate's product.
    """
    squash, gate = activation_function(activation), activation_function(recurrent_activation)

    @cell(gates="rzn", split="n")
    def gru(r, z, n_x, n_h, h, b_n):
        z, n = gate(z), squash(n_x + gate(r) * (n_h + b_n))
        return (1 - z) * n + z * h

    return gru


