"""The cells, as their papers write them: one scalar function each, from which every kernel and its gradient is derived.

Arguments are matched by name: gates' pre-activations first (W x + R h + b, in the order of the weights' columns), then the
old states that the equations use, then per-unit parameters. The first value returned is the output h.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from .derive import ACTIVATIONS, Cell, cell, clip, in_language

__all__ = ["activation_function", "elman", "gru", "lstm", "zoneout"]


def activation_function(name: str):
    """The element-wise activation called `name`, as a function of the cell language.

    Raises:
        ValueError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} for a cell; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


@cache
def lstm(
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    *,
    peephole: bool = False,
    coupled: bool = False,
    cell_clip: float | None = None,
) -> Cell:
    """LSTM with a forget gate: Gers, Schmidhuber and Cummins 2000, equations 1 to 7.

    Args:
        peephole: the gates see the cell, the output gate the new one, by per-unit weights: Gers and Schmidhuber 2000.
        coupled: no input gate; what is forgotten is what is written, i = 1 - f: Greff et al. 2017, CIFG.
        cell_clip: the new cell is held within +-cell_clip: Sak, Senior and Beaufays 2014.

    >>> lstm().gates, lstm().state
    (('i', 'f', 'g', 'o'), ('h', 'c'))
    >>> lstm(peephole=True, coupled=True).params
    ('p_f', 'p_o')
    """
    squash, gate = activation_function(activation), activation_function(recurrent_activation)

    def output(o, c):
        return gate(o) * squash(c), c

    def held(c):
        return c if cell_clip is None else clip(c, -cell_clip, cell_clip)

    def lstm(i, f, g, o, c):
        return output(o, held(gate(f) * c + gate(i) * squash(g)))

    def lstm_peephole(i, f, g, o, c, p_i, p_f, p_o):
        new = held(gate(f + p_f * c) * c + gate(i + p_i * c) * squash(g))
        return output(o + p_o * new, new)

    def lstm_coupled(f, g, o, c):
        f = gate(f)
        return output(o, held(f * c + (1 - f) * squash(g)))

    def lstm_coupled_peephole(f, g, o, c, p_f, p_o):
        f = gate(f + p_f * c)
        new = held(f * c + (1 - f) * squash(g))
        return output(o + p_o * new, new)

    forms = {(0, 0): lstm, (1, 0): lstm_peephole, (0, 1): lstm_coupled, (1, 1): lstm_coupled_peephole}
    return cell(gates="fgo" if coupled else "ifgo", state=("h", "c"))(forms[peephole, coupled])


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
    """Gated recurrent unit: Cho et al. 2014, in cuDNN's form with one recurrent product a step (`reset_after`).

    `b_n` is the recurrent bias of the candidate, inside the reset gate's product.
    """
    squash, gate = activation_function(activation), activation_function(recurrent_activation)

    @cell(gates="rzn", split="n")
    def gru(r, z, n_x, n_h, h, b_n):
        z, n = gate(z), squash(n_x + gate(r) * (n_h + b_n))
        return (1 - z) * n + z * h

    return gru


def zoneout(of: Cell) -> Cell:
    """`of` with zoneout: each new state is z old + (1 - z) new, z handed in at every step: Krueger et al. 2017.

    z is a random mask of zeros and ones in training, the constant rate in inference; one for each state, `z_` and its name.

    >>> zoneout(elman()).aux
    ('z_h',)
    """
    return _zoneout(of, of.name)  # cells of the same equations are equal, whatever their names


@cache
def _zoneout(of: Cell, name: str) -> Cell:
    inner, names = in_language(of.function), list(inspect.signature(of.function).parameters)
    aux = tuple(f"z_{s}" for s in of.state)
    arguments = [*names, *(s for s in of.state if s not in names), *aux]

    def with_zoneout(*values: Any) -> tuple[Any, ...]:
        value = dict(zip(arguments, values, strict=True))
        new = inner(*(value[n] for n in names))
        new = new if isinstance(new, tuple) else (new,)
        return tuple(
            value[z] * value[s] + (1 - value[z]) * n for z, s, n in zip(aux, of.state, new, strict=True)
        )

    parameter = inspect.Parameter
    with_zoneout.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter(n, parameter.POSITIONAL_OR_KEYWORD) for n in arguments]
    )
    return Cell(with_zoneout, of.gates, of.state, of.split, aux=aux, name=f"{name}_zoneout")
