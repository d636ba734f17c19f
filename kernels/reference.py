"""Every recurrent sequence in plain NumPy, for any float dtype: the oracle that the fused kernels are held against.

Steps through time with two matrix products and the cell's emitted equations; nothing here is clever on purpose.
The contract is in sequence.py.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .derive import NORM_EPSILON, Cell, Norm
from .rounding import operand
from .sequence import Forward, Gradients, check_backward, check_forward, check_precision

__all__ = ["backward", "forward", "gradients_by_step"]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    t = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1 / (1 + t), t / (1 + t))


# The names that emitted equations use, bound to NumPy.
NAMES: dict[str, Any] = {
    "K": float,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda x: np.logaddexp(x, 0),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "where": np.where,
}

_FUNCTIONS: weakref.WeakKeyDictionary[Cell, list[tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def functions(cell: Cell) -> list[tuple[Any, Any]]:
    """The emitted `forward` and `backward` of each of the cell's stages, bound to NumPy."""
    if cell not in _FUNCTIONS:
        pairs = []
        for stage in cell.stages:
            scope = dict(NAMES)
            exec(compile(stage.forward_source + stage.backward_source, f"<cell {cell.name}>", "exec"), scope)
            pairs.append((scope["forward"], scope["backward"]))
        _FUNCTIONS[cell] = pairs
    return _FUNCTIONS[cell]


class Residual:
    """What a forward pass keeps: its inputs, and by step the values of every vector and what each stage saved."""

    def __init__(self, **kept: Any) -> None:
        self.__dict__.update(kept)


class _Weights:
    """The columns that each stage's products use: of the kernel's result, and the recurrent weights themselves."""

    def __init__(self, cell: Cell, recurrent_kernel: Any, projection: Any, H: int) -> None:
        def columns(names: tuple[str, ...], part: str, used: tuple[str, ...]) -> np.ndarray:
            gates = [names.index(n.removesuffix(part) if n not in names else n) for n in used]
            return (np.array(gates, int)[:, None] * H + np.arange(H)).reshape(-1)

        self.x = [columns(cell.gates, "_x", s.x_gates) for s in cell.stages]
        self.h = [columns(cell.recurrent, "_h", () if s.projects else s.h_gates) for s in cell.stages]
        self.recurrent = [
            projection if s.projects else recurrent_kernel[:, h]
            for s, h in zip(cell.stages, self.h, strict=True)
        ]


def _split(values: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Equal parts of the columns, by name."""
    return dict(zip(names, np.split(values, len(names), axis=-1), strict=True)) if names else {}


@np.errstate(all="ignore")  # as in a kernel, NaN and infinity travel without a word
def forward(
    cell: Cell,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    params: tuple[np.ndarray, ...],
    state: tuple[np.ndarray, ...] | None,
    valid: np.ndarray | None,
    *,
    training: bool,
    aux: tuple[np.ndarray, ...] = (),
    recurrent_mask: np.ndarray | None = None,
    projection: np.ndarray | None = None,
    precision: str = "float32",
) -> Forward:
    """Run the sequence; see sequence.py for arguments, shapes and meaning. With another `precision` than "float32"
    operands are rounded and products of what was rounded are taken in the arrays' own dtype: the oracle for such kernels.

    Raises:
        ValueError: an array's shape does not fit the others, or an unknown precision.

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, kernel, recurrent_kernel = np.ones((3, 1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    >>> out = forward(cells.elman(), x, kernel, recurrent_kernel, None, (), None, None, training=False)
    >>> out.h.ravel().round(4).tolist()
    [0.7616, 0.7616, 0.7616]
    """
    T, B, _, H, P = check_forward(
        cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, recurrent_mask, projection
    )
    check_precision(precision)
    dtype = np.result_type(x.dtype, kernel.dtype, recurrent_kernel.dtype)
    x, kernel, recurrent_kernel = (operand(a, precision) for a in (x, kernel, recurrent_kernel))
    projection = None if projection is None else operand(projection, precision)
    weights = _Weights(cell, recurrent_kernel, projection, H)
    states = [np.zeros((T + 1, B, H if k else P), dtype) for k in range(len(cell.state))]
    for s, s0 in zip(states, state or (), strict=False):
        s[0] = s0
    projected = x @ kernel if bias is None else x @ kernel + bias
    constant = dict(zip(cell.params, params, strict=True))
    by_step = {a: np.broadcast_to(v, (T, *v.shape[1:])) for a, v in zip(cell.aux, aux, strict=True)}
    masks = None if recurrent_mask is None else np.broadcast_to(recurrent_mask, (T, B, P))
    steps: list[Any] = []
    for t in range(T):
        values = constant | {a: v[t] for a, v in by_step.items()}
        values |= {s: seq[t] for s, seq in zip(cell.state, states, strict=True)}
        kept: list[Any] = []
        for k, (stage, (function, _)) in enumerate(zip(cell.stages, functions(cell), strict=True)):
            scales = [_normalize(values, norm) for norm in stage.norms]
            fed = values[stage.source]
            if masks is not None and not stage.projects:
                fed = fed * masks[t]
            fed = operand(fed, precision)
            from_x = _split(projected[t][:, weights.x[k]], stage.x_gates)
            from_h = _split(fed @ weights.recurrent[k], stage.h_gates)
            for name in stage.pre:
                values[name] = from_x.get(name, 0)
                if name in from_h:
                    values[name] = values[name] + from_h[name]
            out = function(*(values[a] for a in stage.forward_args))
            shape = (B, P if stage.projects else H)
            out = [np.broadcast_to(np.asarray(v, dtype), shape) for v in out]
            values |= zip(stage.made, out, strict=False)
            kept.append((fed, scales, dict(enumerate(out[len(stage.made) :]))))
        for s, seq in zip(cell.state, states, strict=True):
            new = values[s + "1"]
            seq[t + 1] = new if valid is None else np.where(valid[t][:, None], new, seq[t])
            values[s + "1"] = seq[t + 1]
        if training:
            steps.append((values, kept))
    final = tuple(s[T].copy() for s in states)
    if not training:
        return Forward(states[0][1:], final, None, None)
    residual = Residual(
        cell=cell, x=x, kernel=kernel, weights=weights, bias=bias, steps=steps, valid=valid, shape=(T, B, H, P),
        dtype=dtype, masks=masks, precision=precision,
    )  # fmt: skip
    return Forward(states[0][1:], final, tuple(s[1:] for s in states[1:]), residual)


def _normalize(values: dict[str, Any], norm: Norm) -> np.ndarray:
    """Normalise the vectors jointly over all units of each row; the factor (B, 1) is given back."""
    joined = np.concatenate([values[n] for n in norm.inputs], axis=-1)
    scale = 1 / np.sqrt(joined.var(axis=-1, keepdims=True) + NORM_EPSILON)
    joined = (joined - joined.mean(axis=-1, keepdims=True)) * scale
    values |= zip(norm.outputs, np.split(joined, len(norm.outputs), axis=-1), strict=True)
    return scale


def backward(
    residual: Any,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    *,
    need_dx: bool = True,
    dstates: tuple[Any, ...] | None = None,
) -> Gradients:
    """Gradients of `forward`; see sequence.py for arguments, shapes and meaning."""
    return _backward(residual, dh, dfinal, need_dx, dstates, {})


def gradients_by_step(
    residual: Any,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    dstates: tuple[Any, ...] | None = None,
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """What `backward` goes through, by name: the loss's gradients with respect to each state after each step, by its own
    results and through all later steps, (T, B, units), and to each pre-activation, 0 at steps that are not valid.
    And those of the initial state, as `backward` gives them.

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, one, half = np.zeros((3, 1, 1)), np.ones((1, 1)), np.full((1, 1), 0.5)
    >>> out = forward(cells.elman("linear"), x, one, half, None, (), None, None, training=True)
    >>> found, (first,) = gradients_by_step(out.residual, None, (np.ones((1, 1)),))
    >>> found["h"].ravel().tolist(), found["a"].ravel().tolist(), first.item()
    ([0.25, 0.5, 1.0], [0.25, 0.5, 1.0], 0.125)
    """
    T, B, H, P = residual.shape
    cell = residual.cell
    found = {s: np.zeros((T, B, H if k else P), residual.dtype) for k, s in enumerate(cell.state)}
    gates = dict.fromkeys(name for s in cell.stages if not s.projects for name in s.pre)
    found |= {name: np.zeros((T, B, H), residual.dtype) for name in gates}
    return found, _backward(residual, dh, dfinal, False, dstates, found).state


@np.errstate(all="ignore")
def _backward(
    residual: Any,
    dh: np.ndarray | None,
    dfinal: tuple[Any, ...],
    need_dx: bool,
    dstates: tuple[Any, ...] | None,
    seen: dict[str, np.ndarray],
) -> Gradients:
    """`backward`, which writes the gradients of the states and pre-activations that have a place in `seen` there."""
    r, cell, weights = residual, residual.cell, residual.weights
    T, B, H, P = r.shape
    check_backward(cell, r.shape, dh, dfinal, dstates)
    upstream = dict(zip(cell.state, (dh, *(dstates or (None,) * (len(cell.state) - 1))), strict=True))
    dgates = np.zeros((T, B, r.kernel.shape[1]), r.dtype)
    dproducts = [np.zeros((T, B, w.shape[1]), r.dtype) for w in weights.recurrent]
    dparams = {p: np.zeros(H, r.dtype) for p in cell.params}
    zeros = {s: np.zeros((B, H if k else P), r.dtype) for k, s in enumerate(cell.state)}
    d_new = {
        s: z if d is None else np.array(d, r.dtype) for (s, z), d in zip(zeros.items(), dfinal, strict=True)
    }
    for t in reversed(range(T)):
        values, kept = r.steps[t]
        live = None if r.valid is None else r.valid[t][:, None]
        for s in cell.state:
            if upstream[s] is not None:
                d_new[s] = d_new[s] + upstream[s][t]
            if s in seen:
                seen[s][t] = d_new[s]
        gradient: dict[str, Any] = {s + "1": d for s, d in d_new.items()}  # by vector; what is missing is 0
        for k, stage, (_, function), (_, scales, saved) in reversed(
            list(zip(range(len(kept)), cell.stages, functions(cell), kept, strict=True))
        ):
            shape = (B, P if stage.projects else H)
            known = values | {f"y{k}": v for k, v in saved.items()}
            for m in stage.made:
                known[stage.gradient_of[m]] = gradient.get(m, np.zeros(shape, r.dtype))
            out = [
                np.broadcast_to(np.asarray(v, r.dtype), shape)
                for v in function(*(known[a] for a in stage.backward_args))
            ]
            if live is not None:
                out = [np.where(live, v, 0) for v in out]
            found = dict(zip((*stage.pre, *stage.given, *stage.params), out, strict=True))
            for name in stage.pre:
                if name in seen:
                    seen[name][t] = found[name]
            for m in stage.made:
                gradient.pop(m, None)  # a vector that takes another's place begins anew
            for n in stage.given:
                gradient[n] = gradient.get(n, 0) + found[n]
            for p in stage.params:
                dparams[p] += found[p].sum(0)
            if stage.x_gates:
                dgates[t][:, weights.x[k]] = np.concatenate([found[g] for g in stage.x_gates], axis=1)
            if stage.h_gates:
                d = np.concatenate([found[g] for g in stage.h_gates], axis=1, out=dproducts[k][t])
                d[...] = operand(d, r.precision)
                d_fed = d @ weights.recurrent[k].T
                if r.masks is not None and not stage.projects:
                    d_fed = d_fed * r.masks[t]
                gradient[stage.source] = gradient.get(stage.source, 0) + d_fed
            for norm, scale in zip(stage.norms, scales, strict=True):
                _normalize_backward(gradient, values, norm, scale)
        d_old = {s: gradient.get(s, zeros[s]) for s in cell.state}
        if live is not None:  # a step that is not valid hands the states' gradients on
            d_old = {s: np.where(live, d, d_new[s]) for s, d in d_old.items()}
        d_new = d_old
    dbias = None if r.bias is None else dgates.reshape(T * B, -1).sum(0)
    dgates = operand(dgates, r.precision)
    flat = dgates.reshape(T * B, -1)
    drecurrent, dprojection = np.zeros((P, len(cell.recurrent) * H), r.dtype), None
    for k, (stage, columns, d) in enumerate(zip(cell.stages, weights.h, dproducts, strict=True)):
        if stage.h_gates:
            fed = np.stack([kept[k][0] for _, kept in r.steps]).reshape(T * B, -1)
            product = fed.T @ d.reshape(T * B, -1)
            if stage.projects:
                dprojection = product
            else:
                drecurrent[:, columns] = product
    return Gradients(
        x=dgates @ r.kernel.T if need_dx else None,
        kernel=r.x.reshape(T * B, -1).T @ flat,
        recurrent_kernel=drecurrent,
        bias=dbias,
        params=tuple(dparams.values()),
        state=tuple(d_new.values()),
        projection=dprojection,
    )


def _normalize_backward(
    gradient: dict[str, Any], values: dict[str, Any], norm: Norm, scale: np.ndarray
) -> None:
    """From the gradients of normalised vectors to those of what was normalised."""
    shape = values[norm.outputs[0]].shape
    d = np.concatenate([np.broadcast_to(gradient.pop(n, 0.0), shape) for n in norm.outputs], axis=-1)
    y = np.concatenate([values[n] for n in norm.outputs], axis=-1)
    d = scale * (d - d.mean(-1, keepdims=True) - y * (d * y).mean(-1, keepdims=True))
    for n, part in zip(norm.inputs, np.split(d, len(norm.inputs), axis=-1), strict=True):
        gradient[n] = gradient.get(n, 0) + part
