"""Recurrent sequences that trade time for memory: any backend's sequence, its saved values computed again when needed.

A plain forward pass keeps the saved values of all T steps for the backward pass. Here it keeps the states at every k-th
step only, and the backward pass runs each piece of k steps once more before it differentiates it: memory for T / k states
and k steps of saved values, time for a second forward pass (Chen et al. 2016, "Training deep nets with sublinear memory
cost"). The pieces begin with the very states that the plain pass had, so that outputs agree bit for bit; a weight's gradient
is the sum of the pieces' gradients, last piece first, and agrees within rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .sequence import Forward, Gradients

__all__ = ["Remat"]


class Remat:
    """A sequence module (`forward`, `backward`; see sequence.py) that keeps the states at every `steps`-th step.

    >>> import numpy as np
    >>> from numlstm.kernels import cells, reference
    >>> x, kernel, recurrent_kernel = np.ones((5, 1, 1)), np.ones((1, 1)), np.ones((1, 1))
    >>> arguments = cells.elman(), x, kernel, recurrent_kernel, None, (), None, None
    >>> plain, short = (s.forward(*arguments, training=True) for s in (reference, Remat(reference, 2)))
    >>> bool((plain.h == short.h).all())
    True
    """

    serving: Any
    steps: int

    def __init__(self, serving: Any, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"remat_steps: expected an integer of at least 1, got {steps!r}")
        self.serving, self.steps = serving, int(steps)

    def forward(
        self,
        cell: Any,
        x: Any,
        kernel: Any,
        recurrent_kernel: Any,
        bias: Any,
        params: tuple[Any, ...],
        state: tuple[Any, ...] | None,
        valid: Any,
        *,
        training: bool,
        aux: tuple[Any, ...] = (),
        recurrent_mask: Any = None,
        keep_states: bool = False,
        **others: Any,
    ) -> Forward:
        """Run the sequence; see sequence.py. `states` is None unless `keep_states`: as long as h each, they are what is
        saved here. Without `training` this is the module's own forward pass; and a module that can keep pieces by
        itself (`recomputes`) is left to do so, with weights packed and gradients summed once for all pieces.

        Raises:
            ValueError: an array's shape does not fit the others.
        """
        T = x.shape[0]
        over_time = {"x": x, "valid": valid, "aux": aux, "recurrent_mask": recurrent_mask}
        fixed = {
            "cell": cell, "kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias, "params": params, **others,
        }  # fmt: skip
        if not training:
            return self.serving.forward(**over_time, **fixed, state=state, training=False)
        by_itself = getattr(self.serving, "recomputes", None)
        if by_itself is not None and by_itself(cell) and not keep_states:
            return self.serving.forward(**over_time, **fixed, state=state, training=True, steps=self.steps)
        pieces = [slice(t, min(t + self.steps, T)) for t in range(0, T, self.steps)]
        starts, h, states, final = [], None, None, state
        for piece in pieces:
            starts.append(final)
            out = self.serving.forward(
                **_during(piece, T, over_time), **fixed, state=final, training=keep_states
            )
            final = out.final
            if h is None:
                h = np.empty_like(out.h, shape=(T, *out.h.shape[1:]))
                states = [np.empty_like(s, shape=(T, *s.shape[1:])) for s in (out.states or ())]
            for whole, part in zip((h, *states), (out.h, *(out.states or ())), strict=True):
                whole[piece] = part
        residual = _Residual(pieces, starts, over_time, fixed, T)
        return Forward(h, final, tuple(states) if keep_states else None, residual)

    def backward(
        self,
        residual: _Residual,
        dh: Any,
        dfinal: tuple[Any, ...],
        *,
        need_dx: bool = True,
        dstates: tuple[Any, ...] | None = None,
    ) -> Gradients:
        """Gradients of `forward`, piece by piece from the last; see sequence.py.

        Raises:
            ValueError: the residual has been used, or a gradient's shape does not fit.
        """
        if not isinstance(residual, _Residual):  # the module's own
            return self.serving.backward(residual, dh, dfinal, need_dx=need_dx, dstates=dstates)
        if residual.pieces is None:
            raise ValueError("residual: a forward pass serves one backward pass, and this one has had it")
        pieces, T = residual.pieces, residual.T
        residual.pieces = None
        if dh is not None and dh.shape[0] != T:
            raise ValueError(f"dh: expected {T} steps, got shape {dh.shape}")
        total, dx = None, None
        for piece, start in zip(reversed(pieces), reversed(residual.starts), strict=True):
            again = self.serving.forward(
                **_during(piece, T, residual.over_time), **residual.fixed, state=start, training=True
            )
            d = None if dstates is None else tuple(None if s is None else s[piece] for s in dstates)
            g = self.serving.backward(
                again.residual, None if dh is None else dh[piece], dfinal, need_dx=need_dx, dstates=d
            )
            dfinal = g.state
            if need_dx:
                if dx is None:
                    dx = np.empty_like(g.x, shape=(T, *g.x.shape[1:]))
                dx[piece] = g.x
            total = g if total is None else _sum(total, g)
        return total._replace(x=dx, state=dfinal)


class _Residual:
    """What a forward pass keeps: its arguments, where the pieces lie, and the states that each began with."""

    starts: list[tuple[Any, ...] | None]
    over_time: dict[str, Any]
    fixed: dict[str, Any]

    def __init__(
        self,
        pieces: list[slice],
        starts: list[tuple[Any, ...] | None],
        over_time: dict[str, Any],
        fixed: dict[str, Any],
        T: int,
    ) -> None:
        self.pieces: list[slice] | None = pieces
        self.starts, self.over_time, self.fixed, self.T = starts, over_time, fixed, T


def _during(piece: slice, T: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that have a time axis, for a piece of it; those of length 1 stand for every step."""

    def cut(a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(cut(b) for b in a)
        return a if a is None or (a.shape[0] == 1 and T != 1) else a[piece]

    return {name: cut(a) for name, a in arguments.items()}


def _sum(total: Gradients, g: Gradients) -> Gradients:
    """The weights' gradients of two pieces, in the arrays of the first."""

    def add(a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(add(p, q) for p, q in zip(a, b, strict=True))
        if a is not None:
            a += b
        return a

    summed = {
        name: add(getattr(total, name), getattr(g, name)) for name in g._fields if name not in ("x", "state")
    }
    return total._replace(**summed)
