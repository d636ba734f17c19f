"""The contract of a sequence (kernels/sequence.py) served by the persistent kernels: arrays laid out, kernels launched.

Around each launch stand products of the whole sequence: before the forward kernel that of the input, after the backward
kernel those for the gradients of input, kernel and recurrent kernel. Weights' columns are put unit by unit, gates within a
unit side by side, and padded to whole blocks; the batch is padded to whole tiles. What the kernels exchanged is what these
products read: h times its mask, and the gates' gradients, rounded as the precision says.

What follows holds for any device that has arrays, products and launches (device.py on a GPU; the tests' emulator on NumPy).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ...derive import Cell
from ...rounding import bfloat16_bits
from ...sequence import Forward, Gradients, check_backward, check_forward
from .emit import Options, backward_arguments, backward_text, forward_arguments, forward_text, separate
from .plan import WORDS, Plan, choose, supports
from .product import ABSENT, pack

__all__ = ["Sequences"]

SPINS = (
    1 << 22
)  # looks at another block's words before a block gives up: seconds, where a step takes microseconds


def raise_if_stuck(label: str, plan: Plan, errors: np.ndarray) -> None:
    """Look at a kernel's error words: the first is 1 where some block gave up, then one a block, 64 step + warp + 1.

    Raises:
        RuntimeError: a block waited in vain; it names the earliest step.
    """
    if not errors[0]:
        return
    said = [(int(e - 1) // 64, b, int(e - 1) % 64) for b, e in enumerate(errors[1:]) if e]
    step, block, warp = min(said)
    raise RuntimeError(
        f"{label}: no progress at step {step} of the kernel: block {block} of {plan.grid}, warp {warp}, waited in vain for "
        f"another block's values, and {len(said)} blocks left; the results are void. The GPU may be shared with another "
        "process that keeps it from running all blocks at once"
    )


class Residual:
    """What a forward pass keeps for its backward pass; several sequences that ran in one launch share it."""

    def __init__(self, **kept: Any) -> None:
        self.__dict__.update(kept)
        self.used = False


class Sequences:
    """`forward`, `backward` and their twins for several sequences at once, on one device.

    Arguments:
        device: has `xp`, its array module; `sms` and `shared_per_block`; `empty(shape, dtype)`; `product(a, b, out,
            precision)`; and `launch(text, arguments, grid, warps, shared, label,
            look)`, which hands the kernel's error words to `look`.
        spins: how often a block looks for another's words before it gives up with an error.
    """

    def __init__(self, device: Any, spins: int = SPINS) -> None:
        self.device: Any = device
        self.spins: int = spins

    def supports(self, cell: Cell, T: int, B: int, I: int, H: int, **options: Any) -> str | None:
        """As `plan.supports`, for this device."""
        return supports(
            cell, T, B, I, H, sms=self.device.sms, shared_per_block=self.device.shared_per_block,
            capability=self.device.capability, **options,
        )  # fmt: skip

    def forward(self, *places: Any, **options: Any) -> Forward:
        """One sequence; arguments, shapes and meaning as in kernels/sequence.py, with the precision "tf32" besides.

        Raises:
            ValueError: an array's shape does not fit the others, or no plan fits the device: the message says why.
            RuntimeError: the blocks can't be resident together.
        """
        return self.forward_all([(places, options)])[0]

    def backward(self, *places: Any, **options: Any) -> Gradients:
        """The gradients of `forward`; see kernels/sequence.py.

        Raises:
            ValueError: the residual has served already, or an array's shape does not fit.
        """
        return self.backward_all([(places, options)])[0]

    def forward_all(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Forward]:
        """Several sequences, in one launch if they are alike and fit together, else one after another."""
        calls = [_Call(*places, **options) for places, options in calls]
        plans = [c.plan(self.device, len(calls)) for c in calls]
        together = len({c.alike() for c in calls}) == 1 and isinstance(plans[0], Plan)
        if len(calls) > 1 and not together:
            return [self._forward([c], c.plan(self.device, 1))[0] for c in calls]
        return self._forward(calls, plans[0])

    def _forward(self, calls: list[_Call], plan: Plan | str) -> list[Forward]:
        if isinstance(plan, str):
            raise ValueError(f"no persistent kernel for the cell {calls[0].cell.name}: {plan}")
        one, xp, device, D = calls[0], self.device.xp, self.device, len(calls)
        cell, (T, B, I, H) = one.cell, one.shape
        stage, Hp, rows, nx = cell.stages[0], plan.padded, plan.rows, plan.nx
        options = one.options
        # 1. What enters the products, rounded, and x W for all steps; columns unit by unit.
        inputs, kernels, recurrent = [], [], []
        X = device.empty((D, T * rows, Hp * nx), "float32")
        for d, c in enumerate(calls):
            x = _padded(xp, xp.asarray(c.x, xp.float32), (T, rows, I)).reshape(T * rows, I)
            kernel = _by_unit(
                xp, c.kernel, [cell.gates.index(n) for n in _plain(cell, stage.x_gates, "_x")], H, Hp
            )
            inputs.append(_operand(xp, x, plan.precision))
            kernels.append(_operand(xp, kernel, plan.precision))
            device.product(inputs[d], kernels[d], X[d], plan.precision)
            order = [cell.recurrent.index(n) for n in _plain(cell, stage.h_gates, "_h")]
            weights = _by_unit(xp, c.recurrent_kernel, order, H, Hp)
            recurrent.append(_padded(xp, weights, (Hp, Hp * plan.nh)))
        W = xp.stack([pack(plan, r, xp, back=False) for r in recurrent])
        # 2. Room for what the kernel writes.
        exchange = device.empty((D, T, rows, plan.row_words), "uint32")
        published = Hp // WORDS[plan.precision]
        exchange[..., :published] = xp.uint32(ABSENT)
        exchange[..., published:] = 0
        kept = range(len(cell.state) if options.training else 1)
        states = [device.empty((D, T + 1, rows, Hp), "float32") for _ in kept]
        saved = device.empty((D, T, rows, stage.saved, Hp), "float32") if options.training else None
        final = device.empty((D, len(cell.state), rows, Hp), "float32")
        bias = None
        if options.bias:
            order = [cell.gates.index(n) for n in _plain(cell, stage.x_gates, "_x")]
            bias = xp.stack([_by_unit(xp, c.bias[None], order, H, Hp)[0] for c in calls])
        params = None
        if cell.params:
            rows_of = [xp.stack([xp.asarray(p, xp.float32) for p in c.params]) for c in calls]
            params = xp.stack([_padded(xp, a, (len(cell.params), Hp)) for a in rows_of])
        start = xp.stack([_stacked(xp, c.state or (None,) * len(cell.state), (B, H)) for c in calls])
        valid = xp.stack([xp.asarray(c.valid).astype(xp.uint8) for c in calls]) if options.masked else None
        masks = _broadcast(xp, [c.recurrent_mask for c in calls]) if options.dropout else None
        aux = [_broadcast(xp, [c.aux[k] for c in calls]) for k in range(len(cell.aux))]
        # 3. The steps.
        given: dict[str, Any] = {"W": W, "X": X, "BIAS": bias, "PARAMS": params, "S0": start, "VALID": valid}
        given |= {"F": exchange, "FINAL": final, "SAVED": saved} | {f"Q{k}": states[k] for k in kept}
        given |= _step_inputs(masks, aux) | {"T": T, "B": B, "groups": plan.groups, "limit": self.spins}
        text, names = forward_text(cell, plan, options), forward_arguments(cell, options)
        self._launch(text, names, given, plan, plan.warps, plan.shared, f"{cell.name} forward")
        residual = None
        if options.training:
            residual = Residual(
                cell=cell, plan=plan, shape=one.shape, options=options, inputs=inputs, kernels=kernels,
                recurrent=recurrent, params=params, valid=valid, masks=masks, aux=aux, states=states, saved=saved,
                exchange=exchange, has_bias=options.bias,
            )  # fmt: skip
        cut = lambda a: xp.ascontiguousarray(a[..., :B, :H])
        return [
            Forward(
                cut(states[0][d, 1:]),
                tuple(cut(final[d, k]) for k in range(len(cell.state))),
                tuple(cut(s[d, 1:]) for s in states[1:]) if options.training else None,
                None if residual is None else (residual, d),
            )
            for d in range(D)
        ]

    def _launch(
        self, text: str, names: list[str], given: dict[str, Any], plan: Plan, warps: int, shared: int, label: str
    ) -> None:  # fmt: skip
        xp = self.device.xp
        given = given | {"E": xp.zeros(1 + plan.grid, xp.uint32)}
        arguments = [(n, given[n].reshape(-1) if hasattr(given[n], "reshape") else given[n]) for n in names]
        look = partial(raise_if_stuck, label, plan)
        self.device.launch(text, arguments, plan.grid, warps, shared, label, look)

    def backward_all(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Gradients]:
        """The gradients of several sequences: in one launch if one launch ran them all."""
        asked = [_Back(*places, **options) for places, options in calls]
        residual = asked[0].residual[0]
        whole = [(residual, d) for d in range(residual.plan.directions)]
        alike = len({(b.upstream(), b.need_dx) for b in asked}) == 1
        if [b.residual for b in asked] == whole and alike:
            return self._backward(residual, asked)
        if any(b.residual[0].plan.directions > 1 for b in asked):
            raise ValueError(
                "residual: sequences that ran in one launch are differentiated in one, in their order"
            )
        return [self._backward(b.residual[0], [b])[0] for b in asked]

    def _backward(self, r: Residual, asked: list[_Back]) -> list[Gradients]:
        if r.used:
            raise ValueError("residual: a forward pass serves one backward pass, and this one has had it")
        cell, plan, (T, B, I, H), xp, device = r.cell, r.plan, r.shape, self.device.xp, self.device
        for b in asked:
            check_backward(cell, (T, B, H, H), b.dh, b.dfinal, b.dstates)
        r.used = True
        stage, Hp, rows, nx, nh, D = cell.stages[0], plan.padded, plan.rows, plan.nx, plan.nh, len(asked)
        options = Options(True, r.has_bias, r.options.masked, r.options.dropout, asked[0].upstream())
        # 1. Room for what the kernel writes, and the upstream gradients.
        W = xp.stack([pack(plan, xp.ascontiguousarray(a.T), xp, back=True) for a in r.recurrent])
        per = WORDS[plan.precision]
        gates = device.empty((D, T, rows, plan.back_row_words), "uint32")
        published = Hp * nh // per
        gates[..., :published] = xp.uint32(ABSENT)
        gates[..., published:] = 0
        apart = device.empty((D, T, rows, Hp * nx // per), "uint32") if separate(cell) else None
        first = device.empty((D, len(cell.state), rows, Hp), "float32")
        dbias = device.empty((D, nx, rows, Hp), "float32") if options.bias else None
        dparams = device.empty((D, len(cell.params), rows, Hp), "float32") if cell.params else None
        given: dict[str, Any] = {
            "W": W,
            "PARAMS": r.params,
            "VALID": r.valid,
            "SAVED": r.saved,
            "DG": gates,
            "DX": apart,
        }
        given |= {f"Q{k}": s for k, s in enumerate(r.states)} | _step_inputs(r.masks, r.aux)
        given["DFINAL"] = xp.stack([_stacked(xp, b.dfinal, (B, H)) for b in asked])
        for k, there in enumerate(options.upstream):
            if there:
                given[f"UP{k}"] = xp.stack([xp.asarray(b.sequence(k), xp.float32) for b in asked])
        given |= {"D0": first, "DBIAS": dbias, "DPARAMS": dparams, "T": T, "B": B, "groups": plan.groups}
        given["limit"] = self.spins
        # 2. The steps, last to first.
        text, names = backward_text(cell, plan, options), backward_arguments(cell, options)
        self._launch(text, names, given, plan, plan.back_warps, plan.back_shared, f"{cell.name} backward")
        # 3. The products over all steps.
        results = []
        of_gates = _elements(xp, gates, plan.precision)
        of_inputs = _elements(xp, apart, plan.precision) if separate(cell) else of_gates
        fed = _elements(xp, r.exchange, plan.precision)
        x_order = [cell.gates.index(n) for n in _plain(cell, stage.x_gates, "_x")]
        h_order = [cell.recurrent.index(n) for n in _plain(cell, stage.h_gates, "_h")]
        for d, b in enumerate(asked):
            dx_gates, dh_gates = of_inputs[d, :, : Hp * nx], of_gates[d, :, : Hp * nh]
            dx = None
            if b.need_dx:
                dx = device.empty((T * rows, I), "float32")
                device.product(dx_gates, r.kernels[d].T, dx, plan.precision)
                dx = xp.ascontiguousarray(dx.reshape(T, rows, I)[:, :B])
            dkernel = device.empty((I, Hp * nx), "float32")
            device.product(r.inputs[d].T, dx_gates, dkernel, plan.precision)
            drecurrent = device.empty((Hp, Hp * nh), "float32")
            device.product(fed[d, :, :Hp].T, dh_gates, drecurrent, plan.precision)
            results.append(
                Gradients(
                    x=dx,
                    kernel=_by_gate(xp, dkernel, x_order, H),
                    recurrent_kernel=_by_gate(xp, drecurrent[:H], h_order, H),
                    bias=_by_gate(xp, dbias[d, :, :B, :H].sum(1).T[None], x_order, H)[0]
                    if options.bias
                    else None,
                    params=tuple(dparams[d, k, :B, :H].sum(0) for k in range(len(cell.params))),
                    state=tuple(xp.ascontiguousarray(first[d, k, :B, :H]) for k in range(len(cell.state))),
                )
            )
        return results


class _Call:
    """The arguments of `forward`."""

    def __init__(
        self, cell: Cell, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, params: Any, state: Any, valid: Any, *,
        training: bool, aux: Any = (), recurrent_mask: Any = None, projection: Any = None, precision: str = "float32",
    ) -> None:  # fmt: skip
        T, B, I, H, _ = check_forward(
            cell, x, kernel, recurrent_kernel, bias, params, state, valid, aux, recurrent_mask, projection
        )
        if precision not in WORDS:
            raise ValueError(f"precision: expected one of {', '.join(WORDS)}, got {precision!r}")
        if len(cell.stages) > 1 or not cell.stages[0].h_gates:
            reason = supports(cell, T, B, I, H, precision=precision, sms=1)
            raise ValueError(f"no persistent kernel for {reason}")
        self.cell, self.x, self.kernel, self.recurrent_kernel, self.bias = (
            cell,
            x,
            kernel,
            recurrent_kernel,
            bias,
        )
        self.params, self.state, self.valid, self.aux, self.recurrent_mask = (
            params,
            state,
            valid,
            aux,
            recurrent_mask,
        )
        self.precision, self.shape = precision, (T, B, I, H)
        self.options = Options(training, bias is not None, valid is not None, recurrent_mask is not None)

    def alike(self) -> tuple[Any, ...]:
        return self.cell, self.shape, self.precision, self.options

    def plan(self, device: Any, directions: int) -> Plan | str:
        _, B, _, H = self.shape
        return choose(
            self.cell, B, H, precision=self.precision, sms=device.sms, shared_per_block=device.shared_per_block,
            directions=directions,
        )  # fmt: skip


class _Back:
    """The arguments of `backward`."""

    def __init__(
        self, residual: Any, dh: Any, dfinal: Any, *, need_dx: bool = True, dstates: Any = None
    ) -> None:
        self.residual, self.dh, self.dfinal, self.need_dx, self.dstates = (
            residual,
            dh,
            dfinal,
            need_dx,
            dstates,
        )

    def sequence(self, k: int) -> Any:
        """The upstream gradient of a state's sequence, or None."""
        return self.dh if k == 0 else None if self.dstates is None else self.dstates[k - 1]

    def upstream(self) -> tuple[bool, ...]:
        return tuple(self.sequence(k) is not None for k in range(len(self.residual[0].cell.state)))


def _plain(cell: Cell, names: Sequence[str], part: str) -> list[str]:
    """Gates' names, also of those that a cell sees in two parts."""
    return [n.removesuffix(part) if n not in cell.gates else n for n in names]


def _padded(xp: Any, a: Any, shape: tuple[int, ...]) -> Any:
    """`a` with zeros behind it on every axis, up to `shape`."""
    if a.shape == shape:
        return a
    whole = xp.zeros(shape, a.dtype)
    whole[tuple(slice(n) for n in a.shape)] = a
    return whole


def _by_unit(xp: Any, a: Any, order: list[int], H: int, Hp: int) -> Any:
    """Columns gate by gate (., G H) to columns unit by unit with the gates of `order` in each (., Hp len(order))."""
    a = xp.asarray(a, xp.float32).reshape(a.shape[0], -1, H)
    a = xp.stack([a[:, k] for k in order], axis=2)
    return xp.ascontiguousarray(_padded(xp, a, (a.shape[0], Hp, len(order))).reshape(a.shape[0], -1))


def _by_gate(xp: Any, a: Any, order: list[int], H: int) -> Any:
    """The way back from `_by_unit`."""
    a = a.reshape(a.shape[0], -1, len(order))[:, :H]
    return xp.stack([a[:, :, k] for k in np.argsort(order)], axis=1).reshape(a.shape[0], -1)


def _operand(xp: Any, a: Any, precision: str) -> Any:
    return bfloat16_bits(a, xp) if precision == "bfloat16" else xp.ascontiguousarray(a)


def _elements(xp: Any, exchanged: Any, precision: str) -> Any:
    """Exchanged words (D, T, rows, words) as operands of a product (D, T rows, elements): uint16 bfloat16, or float32."""
    flat = exchanged.reshape(exchanged.shape[0], -1, exchanged.shape[-1])
    return flat.view(xp.uint16 if precision == "bfloat16" else xp.float32)


def _stacked(xp: Any, arrays: Sequence[Any], shape: tuple[int, ...]) -> Any:
    return xp.stack([xp.zeros(shape, xp.float32) if a is None else xp.asarray(a, xp.float32) for a in arrays])


def _broadcast(xp: Any, arrays: list[Any]) -> tuple[Any, list[int]]:
    """Step inputs of several sequences, stacked without being spread, and their strides; 0 along what is broadcast."""
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    whole = xp.stack([xp.broadcast_to(xp.asarray(a, xp.float32), shape) for a in arrays])
    full = [int(np.prod(whole.shape[k + 1 :])) for k in range(4)]
    return whole, [s if n > 1 else 0 for s, n in zip(full, whole.shape, strict=True)]


def _step_inputs(masks: Any, aux: list[Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in [("MASK", masks), *((f"AUX{k}", a) for k, a in enumerate(aux))]:
        if value is not None:
            given[name] = value[0]
            given |= {f"{name}_{axis}": s for axis, s in zip("dtbu", value[1], strict=True)}
    return given
