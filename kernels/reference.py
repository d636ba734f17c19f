"""Every recurrent sequence in plain NumPy, for any float dtype: the oracle that the fused kernels are held against.

Steps through time with two matrix products and the cell's emitted equations; nothing here is clever on purpose.
The contract is in sequence.py.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .derive import Cell
from .sequence import Forward, Gradients, check_backward, check_forward

__all__ = ["backward", "forward"]


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

_FUNCTIONS: weakref.WeakKeyDictionary[Cell, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def functions(cell: Cell) -> tuple[Any, Any]:
    """The cell's emitted `forward` and `backward`, bound to NumPy."""
    if cell not in _FUNCTIONS:
        scope = dict(NAMES)
        exec(compile(cell.forward_source + cell.backward_source, f"<cell {cell.name}>", "exec"), scope)
        _FUNCTIONS[cell] = scope["forward"], scope["backward"]
    return _FUNCTIONS[cell]


class Residual:
    """What a forward pass keeps: its inputs, every state, and the cell's saved values by step."""

    def __init__(self, **kept: Any) -> None:
        self.__dict__.update(kept)


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
) -> Forward:
    """Run the sequence; see sequence.py for arguments, shapes and meaning.

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, kernel, recurrent_kernel = np.ones((3, 1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    >>> out = forward(cells.elman(), x, kernel, recurrent_kernel, None, (), None, None, training=False)
    >>> out.h.ravel().round(4).tolist()
    [0.7616, 0.7616, 0.7616]
    """
    check_forward(cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, recurrent_mask)
    (T, B, _), H, G = x.shape, recurrent_kernel.shape[0], len(cell.gates)
    dtype = np.result_type(x, kernel, recurrent_kernel)
    step = functions(cell)[0]
    if state is None:
        state = tuple(np.zeros((B, H), dtype) for _ in cell.state)
    states = [np.empty((T + 1, B, H), dtype) for _ in cell.state]
    for s, s0 in zip(states, state, strict=True):
        s[0] = s0
    saved: list[Any] = [None] * T
    projected = x @ kernel if bias is None else x @ kernel + bias
    gate = {g: slice(k * H, (k + 1) * H) for k, g in enumerate(cell.gates)}
    aux = tuple(np.broadcast_to(a, (T, B, H)) for a in aux)
    masks = None if recurrent_mask is None else np.broadcast_to(recurrent_mask, (T, B, H))
    for t in range(T):
        fed = states[0][t] if masks is None else states[0][t] * masks[t]
        recurrent = fed @ recurrent_kernel
        values = _pre_activations(cell, gate, projected[t], recurrent)
        values.update({s: seq[t] for s, seq in zip(cell.state, states, strict=True)})
        values.update(zip(cell.params, params, strict=True))
        values.update(zip(cell.aux, (a[t] for a in aux), strict=True))
        out = step(*(values[a] for a in cell.forward_args))
        for s, new in zip(states, out, strict=False):
            s[t + 1] = new if valid is None else np.where(valid[t][:, None], new, s[t])
        if training:
            saved[t] = [np.broadcast_to(v, (B, H)) for v in out[len(cell.state) :]]
    final = tuple(s[T].copy() for s in states)
    if not training:
        return Forward(states[0][1:], final, None, None)
    residual = Residual(
        cell=cell, x=x, kernel=kernel, recurrent_kernel=recurrent_kernel, bias=bias, params=params,
        states=states, saved=saved, valid=valid, shape=(T, B, H, G), dtype=dtype, aux=aux, masks=masks,
    )  # fmt: skip
    return Forward(states[0][1:], final, tuple(s[1:] for s in states[1:]), residual)


def _pre_activations(
    cell: Cell, gate: dict[str, slice], x: np.ndarray, h: np.ndarray
) -> dict[str, np.ndarray]:
    """The pre-activations by name: W x + R h, or its two parts where the cell asks for them apart."""
    values = {}
    for name, columns in gate.items():
        if name in cell.split:
            values[name + "_x"], values[name + "_h"] = x[:, columns], h[:, columns]
        else:
            values[name] = x[:, columns] + h[:, columns]
    return values


@np.errstate(all="ignore")
def backward(
    residual: Any, dh: np.ndarray | None, dfinal: tuple[Any, ...], *, need_dx: bool = True
) -> Gradients:
    """Gradients of `forward`; `dh` (T, B, H) or None, `dfinal` one (B, H) or None for each state."""
    r, cell = residual, residual.cell
    T, B, H, G = r.shape
    check_backward(cell, (T, B, H), dh, dfinal)
    step = functions(cell)[1]
    ds = [np.zeros((B, H), r.dtype) if d is None else np.array(d, r.dtype) for d in dfinal]
    dx_gates, dh_gates = np.zeros((T, B, G * H), r.dtype), np.zeros((T, B, G * H), r.dtype)
    dparams = [np.zeros(H, r.dtype) for _ in cell.params]
    for t in reversed(range(T)):
        if dh is not None:
            ds[0] = ds[0] + dh[t]
        values: dict[str, Any] = {f"y{k}": v for k, v in enumerate(r.saved[t])}
        for k, s in enumerate(cell.state):
            values[s], values[s + "1"], values["d_" + s] = r.states[k][t], r.states[k][t + 1], ds[k]
        values.update(zip(cell.params, r.params, strict=True))
        values.update(zip(cell.aux, (a[t] for a in r.aux), strict=True))
        out = [np.broadcast_to(v, (B, H)) for v in step(*(values[a] for a in cell.backward_args))]
        if r.valid is not None:  # an invalid step hands the states' gradients on and takes none itself
            live = r.valid[t][:, None]
            n = len(cell.pre)
            out = [np.where(live, v, ds[k - n] if n <= k < n + len(ds) else 0) for k, v in enumerate(out)]
        pre = dict(zip(cell.pre, out, strict=False))
        for k, g in enumerate(cell.gates):
            columns = slice(k * H, (k + 1) * H)
            dx_gates[t][:, columns] = pre[g + "_x" if g in cell.split else g]
            dh_gates[t][:, columns] = pre[g + "_h" if g in cell.split else g]
        ds = [np.array(v, r.dtype) for v in out[len(cell.pre) : len(cell.pre) + len(cell.state)]]
        from_gates = dh_gates[t] @ r.recurrent_kernel.T
        ds[0] = ds[0] + (from_gates if r.masks is None else from_gates * r.masks[t])
        for d, v in zip(dparams, out[len(cell.pre) + len(cell.state) :], strict=True):
            d += v.sum(0)
    flat = dx_gates.reshape(T * B, G * H)
    fed = r.states[0][:-1] if r.masks is None else r.states[0][:-1] * r.masks
    return Gradients(
        x=dx_gates @ r.kernel.T if need_dx else None,
        kernel=r.x.reshape(T * B, -1).T @ flat,
        recurrent_kernel=fed.reshape(T * B, H).T @ dh_gates.reshape(T * B, G * H),
        bias=None if r.bias is None else flat.sum(0),
        params=tuple(dparams),
        state=tuple(ds),
    )
