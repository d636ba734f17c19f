"""Cells as a user would write them: what the derivation and the kernels must serve like the library's own.

Together they have: per-unit parameters, one to six gates, one to four states, a split gate, exp, log, sqrt,
a division, a maximum and a minimum, a comparison, and more saved values than gates.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from numlstm.kernels import cells, reference
from numlstm.kernels.derive import (
    Cell,
    cell,
    exp,
    log,
    maximum,
    minimum,
    normalize,
    preactivation,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)

NAIVE: dict[str, Callable[..., Any]] = {}  # each cell's own function, on NumPy arrays


def kept(**options: Any) -> Callable[[Callable[..., Any]], Cell]:
    """`cell`, and the function beside it, bound to NumPy: the twin that no tracing has touched."""

    def decorate(function: Callable[..., Any]) -> Cell:
        NAIVE[function.__name__] = types.FunctionType(function.__code__, {**globals(), **reference.NAMES})
        return cell(**options)(function)

    return decorate


@kept(gates="ifgo", state=("h", "c"))
def peephole(i, f, g, o, c, p_i, p_f, p_o):
    """Gers and Schmidhuber 2000."""
    i, f = sigmoid(i + p_i * c), sigmoid(f + p_f * c)
    c = f * c + i * tanh(g)
    return sigmoid(o + p_o * c) * tanh(c), c


@kept(gates="fgo", state=("h", "c"))
def coupled(f, g, o, c):
    """Greff et al. 2017, CIFG: the input gate is one less the forget gate."""
    f = sigmoid(f)
    c = f * c + (1 - f) * tanh(g)
    return sigmoid(o) * tanh(c), c


@kept(gates="igo", state=("h", "c"))
def lstm97(i, g, o, c):
    """Hochreiter and Schmidhuber 1997: no forget gate; g in (-2, 2), h in (-1, 1)."""
    c = c + sigmoid(i) * (4 * sigmoid(g) - 2)
    return sigmoid(o) * (2 * sigmoid(c) - 1), c


@kept(gates="ifzo", state=("h", "c", "n", "m"))
def slstm(i, f, z, o, c, n, m):
    """Beck et al. 2024, exponential gates held by a running maximum; n must start positive."""
    log_f = -softplus(-f)
    m1_ = maximum(log_f + m, i)
    i, f = exp(i - m1_), exp(log_f + m - m1_)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, m1_


@kept(gates="fn", split="n")
def minimal(f, n_x, n_h, h):
    """Zhou et al. 2016, the minimal gated unit, with one recurrent product."""
    f = sigmoid(f)
    return (1 - f) * h + f * tanh(n_x + f * n_h)


@kept(gates=("a", "b", "p", "q", "u", "v"), state=("h", "c"), split=("u",))
def wide(a, b, p, q, u_x, u_h, v, h, c, shift, scale):
    """Seven pre-activations and no paper: every function and both orders of every operator."""
    gate = where(a < b * scale, sigmoid(p), sigmoid(q) / 2)
    root = sqrt(1 + u_x * u_x) + log(1.5 + minimum(abs(u_h), 3))
    c = gate * c + (1 - gate) * tanh(u_x * u_h + shift) - exp(-abs(v)) * h**2
    return maximum(tanh(c) / root, 0.1 * c), minimum(maximum(c, -4), 4)


def _lstm(i, f, g, o, c):
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def _gru(r, z, n_x, n_h, h, b_n):
    n = tanh(n_x + sigmoid(r) * (n_h + b_n))
    return (1 - sigmoid(z)) * n + sigmoid(z) * h


def _elman(a):
    return tanh(a)


def _gru_zoneout(r, z, n_x, n_h, h, b_n, z_h):
    n = tanh(n_x + sigmoid(r) * (n_h + b_n))
    return z_h * h + (1 - z_h) * ((1 - sigmoid(z)) * n + sigmoid(z) * h)


def _lstm_coupled_peephole(f, g, o, c, p_f, p_o):
    f = sigmoid(f + p_f * c)
    c = minimum(maximum(f * c + (1 - f) * tanh(g), -0.5), 0.5)
    return sigmoid(o + p_o * c) * tanh(c), c


for twin in (_lstm, _gru, _elman, _gru_zoneout, _lstm_coupled_peephole):
    NAIVE[twin.__name__[1:]] = types.FunctionType(twin.__code__, {**globals(), **reference.NAMES})

CELLS: dict[str, Cell] = {c.name: c for c in (cells.lstm(), cells.gru(), cells.elman())}
CELLS |= {c.name: c for c in (peephole, coupled, lstm97, slstm, minimal, wide)}

# The library's further forms; the kernels made of them are in cpu/test_options.py.
FORMS: dict[str, Cell] = {
    "gru_zoneout": cells.zoneout(cells.gru()),
    "lstm_coupled_peephole": cells.lstm(peephole=True, coupled=True, cell_clip=0.5),
}

# Cells of more than one stage: a second product, a projection, normalised values, and all of them together.
STAGED: dict[str, Cell] = {
    "gru_before": cells.gru(reset_after=False),
    "gru_before_zoneout": cells.zoneout(cells.gru(reset_after=False)),
    "gru_before_normalized": cells.gru(reset_after=False, layer_norm=True),
    "lstm_projected": cells.lstm(projection=True),
    "lstm_projected_zoneout": cells.zoneout(cells.lstm(projection=True, cell_clip=0.5)),
    "elman_normalized": cells.elman(layer_norm=True),
    "gru_normalized": cells.gru(layer_norm=True),
    "lstm_normalized": cells.lstm(layer_norm=True),
    "lstm_normalized_projected_peephole": cells.lstm(layer_norm=True, projection=True, peephole=True),
}


@cell(gates="abn", state=("h", "c"), recurrent="bn")
def odd(a, b, h, c, scale):
    """No paper: an input-only gate, a normalised old state, a value read two stages on, a state normalised last."""
    u, v = normalize(a * scale, c)
    n = preactivation("n", sigmoid(b) * u + h)
    new = normalize(tanh(n) + v * sigmoid(a))
    return tanh(new) + 0.1 * u, new


STAGED["odd"] = odd
