"""The cells, as their papers write them: one scalar function each, from which every kernel and its gradient is derived.

Arguments are matched by name: gates' pre-activations first (W x + R h + b, in the order of the weights' columns), then the
old states that the equations use, then per-unit parameters. The first value returned is the output h. What is common to
all cells (zoneout, layer normalisation, a clipped state) is a function from cell to cell.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from .derive import (
    ACTIVATIONS,
    Cell,
    cell,
    clip,
    exp,
    in_language,
    maximum,
    named,
    normalize,
    preactivation,
    project,
    sigmoid,
    softplus,
    tanh,
)

__all__ = [
    "activation_function",
    "clipped",
    "elman",
    "feedforward",
    "gru",
    "indrnn",
    "layer_norm",
    "lstm",
    "slstm",
    "zoneout",
]

Scalar = Callable[[Any], Any]


@cache
def activation_function(name: str, limit: float | None = None) -> Scalar:
    """The element-wise activation called `name`, as a function of the cell language.

    Args:
        name: a key of `derive.ACTIVATIONS`, with parameters where it has them: "leaky_relu(alpha=0.1)".
        limit: its input is held within +-limit, as the ONNX operators' `clip` does.

    Raises:
        ValueError: no such activation, or not with these parameters.

    >>> activation_function("hard_sigmoid(alpha=0.2, beta=0.5)")(1.0)
    0.7
    """
    form = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", name)
    if form is None or form[1] not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} for a cell; known: {', '.join(sorted(ACTIVATIONS))}")
    function = ACTIVATIONS[form[1]]
    options = _options(name, form[2] or "", function)
    if options:
        function = partial(function, **options)
    return function if limit is None else lambda x: function(clip(x, -limit, limit))


def _options(name: str, text: str, function: Callable[..., Any]) -> dict[str, float]:
    """The parameters of an activation's name: "alpha=0.1, beta=2" as a dictionary."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    options = {}
    for part in filter(str.strip, text.split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        try:
            options[key] = float(value)
        except ValueError:
            raise ValueError(f"activation {name!r}: expected name=number, got {part.strip()!r}") from None
        if key not in known:
            raise ValueError(
                f"activation {name!r}: it has no parameter {key!r}; known: {', '.join(known) or 'none'}"
            )
    return options


def _held(limit: float | None) -> Scalar:
    """A value within +-limit, if there is one."""
    return (lambda x: x) if limit is None else (lambda x: clip(x, -limit, limit))


@cache
def lstm(
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    *,
    output_activation: str | None = None,
    peephole: bool = False,
    coupled: bool | str = False,
    cell_clip: float | None = None,
    clip: float | None = None,
    projection: bool = False,
    layer_norm: bool = False,
) -> Cell:
    """LSTM with a forget gate: Gers, Schmidhuber and Cummins 2000, equations 1 to 7.

    Args:
        output_activation: what is applied to the cell on its way out; `activation` unless given.
        peephole: the gates see the cell, the output gate the new one, by per-unit weights: Gers and Schmidhuber 2000.
        coupled: no input gate; what is forgotten is what is written, i = 1 - f: Greff et al. 2017, CIFG. With "input", no
            forget gate: f = 1 - i, as ONNX's `input_forget` has it.
        cell_clip: the new cell is held within +-cell_clip: Sak, Senior and Beaufays 2014.
        clip: the input of every activation is held within +-clip, as the ONNX operators have it.
        projection: the output is multiplied by a matrix, to fewer columns than units: Sak, Senior and Beaufays 2014.
        layer_norm: the two products and the cell on its way out are normalised: Ba, Kiros and Hinton 2016, equations 20-22.

    Raises:
        ValueError: an unknown activation, or another value of `coupled`.

    >>> lstm().gates, lstm().state
    (('i', 'f', 'g', 'o'), ('h', 'c'))
    >>> lstm(peephole=True, coupled=True).params
    ('p_f', 'p_o')
    """
    if coupled not in (False, True, "input"):
        raise ValueError(f"coupled: expected False, True or 'input', got {coupled!r}")
    squash, gate = activation_function(activation, clip), activation_function(recurrent_activation, clip)
    squash_out = activation_function(output_activation or activation, clip)
    held = _held(cell_clip)
    out = project if projection else lambda h: h

    def output(o, c):
        return out(gate(o) * squash_out(c)), c

    def output_normalized(o, c, g_c, b_c):
        return out(gate(o) * squash_out(g_c * normalize(c) + b_c)), c

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

    def lstm_input(i, g, o, c):
        i = gate(i)
        return output(o, held((1 - i) * c + i * squash(g)))

    def lstm_input_peephole(i, g, o, c, p_i, p_o):
        i = gate(i + p_i * c)
        new = held((1 - i) * c + i * squash(g))
        return output(o + p_o * new, new)

    forms = {
        (False, False): lstm,
        (True, False): lstm_peephole,
        (False, True): lstm_coupled,
        (True, True): lstm_coupled_peephole,
        (False, "input"): lstm_input,
        (True, "input"): lstm_input_peephole,
    }
    gates = {False: "ifgo", True: "fgo", "input": "igo"}[coupled]
    equations = forms[bool(peephole), coupled]
    if not layer_norm:
        return cell(gates=gates, state=("h", "c"))(equations)
    names = [*inspect.signature(equations).parameters, "g_c", "b_c"]

    def with_norm(*values: Any) -> tuple[Any, Any]:
        nonlocal output
        *rest, g_c, b_c = values
        plain, output = output, lambda o, c: output_normalized(o, c, g_c, b_c)
        try:
            return equations(*rest)
        finally:
            output = plain

    with_norm.__name__ = equations.__name__
    return _normalized(Cell(_signed(with_norm, names), gates, ("h", "c"), name=equations.__name__))


@cache
def elman(
    activation: str = "tanh",
    *,
    clip: float | None = None,
    cell_clip: float | None = None,
    layer_norm: bool = False,
) -> Cell:
    """The simple recurrent network: Elman 1990, h = tanh(W x + R h + b).

    Args:
        clip: the input of the activation is held within +-clip.
        cell_clip: the new state is held within +-cell_clip.
        layer_norm: both products are normalised: Ba, Kiros and Hinton 2016.
    """
    squash, held = activation_function(activation, clip), _held(cell_clip)

    @cell(gates="a")
    def elman(a):
        return held(squash(a))

    return _normalized(elman) if layer_norm else elman


@cache
def gru(
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    *,
    reset_after: bool = True,
    clip: float | None = None,
    cell_clip: float | None = None,
    layer_norm: bool = False,
) -> Cell:
    """Gated recurrent unit: Cho et al. 2014.

    Args:
        reset_after: cuDNN's form, with one recurrent product a step; `b_n` is the recurrent bias of the candidate, inside
            the reset gate's product. False is the paper's form: what is reset is the state, before a second product.
        clip: the input of every activation is held within +-clip.
        cell_clip: the new state is held within +-cell_clip.
        layer_norm: the input's and the recurrent products are normalised: Ba, Kiros and Hinton 2016.

    >>> len(gru(reset_after=False).stages), gru(reset_after=False).params
    (2, ())
    """
    squash, gate = activation_function(activation, clip), activation_function(recurrent_activation, clip)
    held = _held(cell_clip)

    def gru(r, z, n_x, n_h, h, b_n):
        z, n = gate(z), squash(n_x + gate(r) * (n_h + b_n))
        return held((1 - z) * n + z * h)

    def gru_before(r, z, h):
        z, n = gate(z), squash(preactivation("n", gate(r) * h))
        return held((1 - z) * n + z * h)

    def gru_before_layer_norm(
        r_x, z_x, n_x, r_h, z_h, gx_r, gx_z, gx_n, gh_r, gh_z, gh_n, bx_r, bx_z, bx_n, h
    ):  # fmt: skip
        r_x, z_x, n_x = normalize(r_x, z_x, n_x)
        r_h, z_h = normalize(r_h, z_h)  # the candidate's product is another, and normalised by itself
        r, z = gate(gx_r * r_x + bx_r + gh_r * r_h), gate(gx_z * z_x + bx_z + gh_z * z_h)
        n_h = normalize(preactivation("n", r * h))
        n = squash(gx_n * n_x + bx_n + gh_n * n_h)
        return held((1 - z) * n + z * h)

    if not reset_after:
        return (
            cell(gates="rzn", split="rzn")(gru_before_layer_norm)
            if layer_norm
            else cell(gates="rzn")(gru_before)
        )
    made = cell(gates="rzn", split="n")(gru)
    return _normalized(made) if layer_norm else made


@cache
def feedforward(activation: str = "linear") -> Cell:
    """A dense layer as a cell without recurrence, y = activation(W x + b), for stepping through it (stream.py)."""
    squash = activation_function(activation)

    @cell(gates="a", recurrent=())
    def feedforward(a):
        return squash(a)

    return feedforward


@cache
def indrnn(activation: str = "relu") -> Cell:
    """Independently recurrent network: Li et al. 2018, h = relu(W x + u h + b); u is one weight a unit."""
    squash = activation_function(activation)

    @cell(gates="a", recurrent=())
    def indrnn(a, h, u):
        return squash(a + u * h)

    return indrnn


@cache
def slstm() -> Cell:
    """LSTM with exponential gates: Beck et al. 2024, xLSTM, equations 8 to 17; m holds the exponents within range.

    The forget gate is a sigmoid, in logarithms; the normaliser n starts at zero and is one or more after a step.
    """

    @cell(gates="ifzo", state=("h", "c", "n", "m"))
    def slstm(i, f, z, o, c, n, m):
        log_f = -softplus(-f)
        m_new = maximum(log_f + m, i)
        i, f = named("i", exp(i - m_new)), named("f", exp(log_f + m - m_new))
        c, n = f * c + i * tanh(z), f * n + i
        return sigmoid(o) * c / n, c, n, m_new

    return slstm


# From cell to cell. Cells of the same equations are equal, whatever their names, so a cache of these knows them by both.


def zoneout(of: Cell) -> Cell:
    """`of` with zoneout: each new state is z old + (1 - z) new, z handed in at every step: Krueger et al. 2017.

    z is a random mask of zeros and ones in training, the constant rate in inference; one for each state, `z_` and its name.

    >>> zoneout(elman()).aux
    ('z_h',)
    """
    return _zoneout(of, of.name)


@cache
def _zoneout(of: Cell, name: str) -> Cell:
    taken = (*of.arguments, *of.gates)  # a normalised GRU has a gate's part called z_h
    aux = tuple(f"z_{s}" if f"z_{s}" not in taken else f"zoneout_{s}" for s in of.state)

    def mix(value: dict[str, Any], new: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            value[z] * value[s] + (1 - value[z]) * n for z, s, n in zip(aux, of.state, new, strict=True)
        )

    return _wrapped(of, f"{name}_zoneout", mix, needs=of.state, aux=aux)


def clipped(of: Cell, limit: float) -> Cell:
    """`of` with every new state held within +-limit.

    >>> clipped(elman("relu"), 1.0).name
    'elman_clipped'
    """
    return _clipped(of, of.name, limit)


@cache
def _clipped(of: Cell, name: str, limit: float) -> Cell:
    return _wrapped(of, f"{name}_clipped", lambda _, new: tuple(clip(n, -limit, limit) for n in new))


def layer_norm(of: Cell) -> Cell:
    """`of` with its two products normalised, each over all its gates: Ba, Kiros and Hinton 2016, equation 20.

    Parameters, before the cell's own: gains of the input's product `gx_` and each gate, of the recurrent one `gh_`, and the
    biases `bx_`, which take the place of the sequence's bias.

    >>> layer_norm(elman()).params
    ('gx_a', 'gh_a', 'bx_a')
    """
    return _normalized(of)


def _normalized(of: Cell) -> Cell:
    return _layer_norm(of, of.name)


@cache
def _layer_norm(of: Cell, name: str) -> Cell:
    if len(of.arguments) < len(of.gates) or any(
        g not in of.arguments and g not in of.split for g in of.gates
    ):
        raise ValueError(f"layer_norm: cell {name} has a gate in preactivation(), expected all as arguments")
    inner, names = in_language(of.function), of.arguments
    split = of.recurrent
    x_parts = [g + "_x" if g in split else g for g in of.gates]
    h_parts = [g + "_h" for g in split]
    gains = [*(f"gx_{g}" for g in of.gates), *(f"gh_{g}" for g in split), *(f"bx_{g}" for g in of.gates)]
    rest = [n for n in names if n not in (*of.gates, *(g + p for g in of.split for p in ("_x", "_h")))]
    arguments = [*x_parts, *h_parts, *gains, *rest]

    def with_layer_norm(*values: Any) -> Any:
        value = dict(zip(arguments, values, strict=True))
        as_tuple = lambda v: v if isinstance(v, tuple) else (v,)
        from_x = dict(zip(of.gates, as_tuple(normalize(*(value[n] for n in x_parts))), strict=True))
        from_h = {}
        if h_parts:
            from_h = dict(zip(split, as_tuple(normalize(*(value[n] for n in h_parts))), strict=True))
        given = {n: value[n] for n in rest}
        for g in of.gates:
            x = value["gx_" + g] * from_x[g] + value["bx_" + g]
            h = value["gh_" + g] * from_h[g] if g in from_h else None
            if g in of.split:
                given[g + "_x"], given[g + "_h"] = x, h
            else:
                given[g] = x if h is None else x + h
        return inner(*(given[n] for n in names))

    return Cell(
        _signed(with_layer_norm, arguments), of.gates, of.state, split,
        recurrent=of.recurrent, aux=of.aux, name=f"{name}_layer_norm",
    )  # fmt: skip


def _wrapped(
    of: Cell,
    name: str,
    change: Callable[[dict[str, Any], Sequence[Any]], tuple[Any, ...]],
    needs: Sequence[str] = (),
    aux: Sequence[str] = (),
) -> Cell:
    """`of` whose new states pass through `change`, which also sees the values of all arguments by name."""
    inner, names = in_language(of.function), of.arguments
    arguments = [*names, *(n for n in needs if n not in names), *aux]

    def wrapped(*values: Any) -> tuple[Any, ...]:
        value = dict(zip(arguments, values, strict=True))
        new = inner(*(value[n] for n in names))
        return change(value, new if isinstance(new, tuple) else (new,))

    return Cell(
        _signed(wrapped, arguments), of.gates, of.state, of.split,
        recurrent=of.recurrent, aux=(*of.aux, *aux), name=name,
    )  # fmt: skip


def _signed(function: Any, names: Sequence[str]) -> Any:
    """`function`, which takes *values, with the signature that a cell's names are read from."""
    parameter = inspect.Parameter
    function.__signature__ = inspect.Signature([parameter(n, parameter.POSITIONAL_OR_KEYWORD) for n in names])
    return function
