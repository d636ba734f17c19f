"""The recurrent sequence on a GPU: the contract of ../sequence.py, and the choice of the way to run it.

Two ways there are. steps.py, tier 0, serves every cell, option, size and float type by a product and fused kernels a step.
persistent/, tier 2, keeps the recurrent weights on chip and runs all steps in one launch, where they fit and where its cost
model says that it pays. `tier` chooses and says why; a backward pass goes the way that its forward pass went.

A persistent kernel that gets stuck gives up, and leaves a word about it; `finish` raises that as an error. Whoever hands
results to the host calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..derive import Cell
from ..sequence import Forward, Gradients, check_forward, check_precision
from . import persistent, steps
from .device import Device, current

__all__ = [
    "Residual", "Tier", "backward", "backward_all", "batches", "dispatch_table", "finish", "forward", "forward_all",
    "pieces", "tier",
]  # fmt: skip

_BATCHES = (1, 8, 16, 32, 64, 128, 256)  # that `batches` asks about
_ON_CHIP: dict[int, persistent.Sequences] = {}  # by device: the persistent sequences that have been asked for
_Call = tuple[tuple[Any, ...], dict[str, Any]]
pieces = (
    steps  # which module runs a sequence piece by piece (kernels/remat.py): memory counts there, not time
)


class Tier(NamedTuple):
    """How a sequence is run, "steps" or "persistent", and why so."""

    name: str
    why: str


class Residual(NamedTuple):
    """What a forward pass keeps: the way it went, and what that way keeps."""

    way: Any
    kept: Any


def tier(
    cell: Cell, T: int, B: int, I: int, H: int, P: int, dtype: str, precision: str, device: Device | None = None,
    directions: int = 1,
) -> Tier:  # fmt: skip
    """Which way a sequence of that shape takes on `device`, by default this thread's.

    Arguments:
        dtype: of the weights; precision: of the products' operands.
        directions: sequences of this shape that may run in one launch.

    >>> from numlstm.kernels import cells
    >>> from types import SimpleNamespace
    >>> old = SimpleNamespace(capability=(7, 0), persistent=True)
    >>> tier(cells.lstm(), 9, 4, 3, 8, 8, "float32", "float32", old).why
    'a product and a fused kernel a step; compute capability 7.0: persistent kernels need 8.0'
    """
    device = device or current()
    how = f"a product and {'a fused kernel' if len(cell.stages) == 1 else f'{len(cell.stages)} fused kernels'} a step"
    if device.capability < (8, 0):
        rounded = {"tf32": " and tf32", "bfloat16": " and products of bfloat16"}.get(precision, "")
        found = ".".join(map(str, device.capability))
        return Tier(
            "steps", f"{how}; compute capability {found}: persistent kernels{rounded} need 8.0"
            + (", its products are float32's" if rounded else ""),
        )  # fmt: skip
    if not device.persistent:
        return Tier("steps", f"{how}; {device.name} runs no persistent kernel")
    if cell.projects:
        return Tier("steps", f"{how}; no persistent kernel: {cell.name} projects its output")
    name = np.dtype(dtype).name
    reason = _on_chip(device).supports(
        cell, T, B, I, H, dtype=name, precision=precision, directions=directions
    )
    if reason is not None:
        return Tier("steps", f"{how}; no persistent kernel: {reason}")
    together = f", {directions} directions" if directions > 1 else ""
    return Tier("persistent", f"one launch for all steps{together}, the recurrent weights on chip")


def _on_chip(device: Device) -> persistent.Sequences:
    if device.index not in _ON_CHIP:
        _ON_CHIP[device.index] = persistent.on_device(device.index)
    return _ON_CHIP[device.index]


def batches(cell: Cell, H: int, dtype: str, precision: str, directions: int = 1) -> str:
    """For people, which way sequences of a cell take by their batch, on this thread's device."""
    P = max(1, H // 2) if cell.projects else H  # a cell that projects takes one way at any width
    found = [tier(cell, 1, B, 1, H, P, dtype, precision, directions=directions) for B in _BATCHES]
    served = [B for B, t in zip(_BATCHES, found, strict=True) if t.name == "persistent"]
    steps_why = next((t.why for t in found if t.name == "steps"), "")
    if not served:
        return f"tier 0: {steps_why}"
    on_chip = f"tier 2, persistent: {found[_BATCHES.index(served[0])].why}"
    if len(served) == len(_BATCHES):
        return on_chip
    # Those that it serves need not be all up to some number: where products a step pay is for the model to say.
    sizes = f"up to {served[-1]}" if served == list(_BATCHES[: len(served)]) else ", ".join(map(str, served))
    return f"{on_chip}, for a batch of {sizes}; else tier 0: {steps_why}"


def dispatch_table(cell: Cell) -> str | None:
    """The persistent kernels' table (`persistent.table`) for this thread's device; None where it runs none of them."""
    device = current()
    if not device.persistent or device.capability < (8, 0):
        return None
    chip = _on_chip(device).device
    return persistent.table(cell, sms=chip.sms, shared_per_block=chip.shared_per_block)


def finish(index: int = 0) -> None:
    """Wait for the persistent kernels of device `index` and raise what went wrong in them; nothing if none has run.

    Raises:
        RuntimeError: a kernel made no progress and gave up.
    """
    if index in _ON_CHIP:
        _ON_CHIP[index].device.finish()


def forward(
    cell: Cell, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, params: tuple[Any, ...], state: Any, valid: Any,
    **options: Any,
) -> Forward:  # fmt: skip
    """Run one sequence; see ../sequence.py for arguments, shapes and meaning. float32 or float64, that of `kernel`.

    Raises:
        ValueError: an array's shape does not fit the others, a float type other than float32 and float64, or an unknown
            precision. RuntimeError: an earlier persistent kernel has given up.
    """
    return forward_all([((cell, x, kernel, recurrent_kernel, bias, params, state, valid), options)])[0]


def forward_all(calls: Sequence[_Call]) -> list[Forward]:
    """Several sequences that do not depend on each other, in one launch where a persistent kernel serves them together.

    Raises:
        As `forward`.
    """
    device = current()
    asked = [_question(*c) for c in calls]
    if len(set(asked)) == 1 and tier(*asked[0], device, len(calls)).name == "persistent":
        way = _on_chip(device)
        outs = way.forward_all([_float32(device, c) for c in calls])
        return [_kept(way, out) for out in outs]
    if len(calls) > 1:
        return [forward_all([c])[0] for c in calls]
    ((places, options),) = calls
    return [_kept(steps, steps.forward(*places, **options))]


def _kept(way: Any, out: Forward) -> Forward:
    return out if out.residual is None else out._replace(residual=Residual(way, out.residual))


def _question(places: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What `tier` asks of a call, up to its precision."""
    cell, kernel = places[0], places[2]
    rest = (options.get("aux", ()), options.get("recurrent_mask"), options.get("projection"))
    shape = check_forward(*places, *rest)
    precision = options.get("precision", "float32")
    check_precision(precision)
    dtype = np.dtype(kernel.dtype).name
    if dtype not in steps.DTYPES:
        raise ValueError(f"kernel: expected float32 or float64, got {dtype}")
    return (cell, *shape, dtype, precision)


def _float32(device: Device, call: _Call) -> _Call:
    """A call as the persistent kernels want it: contiguous float32 arrays of the device, and truth values."""
    (cell, *arrays, valid), options = call
    take = lambda a: _each(a, lambda b: device.array(b, "float32"))
    options = {k: take(v) if k in ("aux", "recurrent_mask") else v for k, v in options.items()}
    return (cell, *map(take, arrays), None if valid is None else device.array(valid, np.bool_)), options


def _each(a: Any, take: Any) -> Any:
    """An array, or a tuple of them, or None, with each array taken."""
    return tuple(_each(b, take) for b in a) if isinstance(a, tuple) else None if a is None else take(a)


def backward(residual: Residual, dh: Any, dfinal: tuple[Any, ...], **options: Any) -> Gradients:
    """Gradients of `forward`; see ../sequence.py for arguments, shapes and meaning.

    Raises:
        ValueError: the residual has been used, or a gradient's shape does not fit.
    """
    return backward_all([((residual, dh, dfinal), options)])[0]


def backward_all(calls: Sequence[_Call]) -> list[Gradients]:
    """The gradients of several sequences: those that ran in one launch, in one launch, and so must come together.

    Raises:
        As `backward`.
    """
    residuals = [places[0] for places, _ in calls]
    if len({id(r.way) for r in residuals}) > 1 or residuals[0].way is steps:
        return [
            r.way.backward(r.kept, *places[1:], **options)
            if r.way is steps
            else backward_all([((r, *places[1:]), options)])[0]
            for r, (places, options) in zip(residuals, calls, strict=True)
        ]
    launches: dict[int, dict[int, _Call]] = {}  # by launch: its sequences' calls by their places in it
    for r, call in zip(residuals, calls, strict=True):
        launch, place = r.kept
        if place in launches.setdefault(id(launch), {}):
            raise ValueError("residual: a forward pass serves one backward pass, and this one came twice")
        launches[id(launch)][place] = call
    found = {
        key: residuals[0].way.backward_all(_whole_launch(current(), given)) for key, given in launches.items()
    }
    answers = [found[id(r.kept[0])][r.kept[1]] for r in residuals]
    return [
        g if options.get("need_dx", True) else g._replace(x=None)
        for g, (_, options) in zip(answers, calls, strict=True)
    ]


def _whole_launch(device: Device, given: dict[int, _Call]) -> list[_Call]:
    """The backward calls of all sequences of a launch, alike: what nobody asks for has gradients of zero upstream."""
    ((residual, *_), _) = next(iter(given.values()))
    launch = residual.kept[0]
    (T, B, _, H), states = launch.shape, len(launch.cell.state)
    take = lambda a: _each(a, lambda b: device.array(b, "float32"))
    upstream, finals, need_dx = {}, {}, False
    for place, ((_, dh, dfinal), options) in given.items():
        upstream[place] = take((dh, *(options.get("dstates") or (None,) * (states - 1))))
        finals[place] = take(tuple(dfinal))
        need_dx |= options.get("need_dx", True)
    there = [any(u[k] is not None for u in upstream.values()) for k in range(states)]
    calls: list[_Call] = []
    for place in range(launch.plan.directions):
        of = upstream.get(place, (None,) * states)
        of = [
            device.xp.zeros((T, B, H), "float32") if wanted and a is None else a
            for a, wanted in zip(of, there, strict=True)
        ]
        options = {"need_dx": need_dx, "dstates": tuple(of[1:])}
        calls.append((((launch, place), of[0], finals.get(place, (None,) * states)), options))
    return calls
