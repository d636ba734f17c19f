"""Every gate, state and gradient of a model's recurrent layers, by time step, as named arrays.

The model runs as ever, on its own backend; beside it, the cell's equations give what a fused kernel keeps to
itself (kernels/gates.py), from the states that the kernel went through. Gradients by step are those of the
reference backend (kernels/reference.py), with what the loss sends back to the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm import backend as backends
from numlstm import ops
from numlstm.kernels import gates, reference
from numlstm.kernels.derive import Cell
from numlstm.kernels.int8 import Quantized
from numlstm.layers.recurrent import Recurrent
from numlstm.training import Trainer

if TYPE_CHECKING:
    import xarray

    from numlstm.models import Model

__all__ = ["LayerTrace", "Trace", "trace"]

PIECE = 2**21  # values of the gates' columns that are differentiated at a time


@dataclass(frozen=True)
class LayerTrace:
    """What one recurrent layer did. Arrays are (batch, time, units), in the order of the layer's input.

    Attributes:
        states: the values of each state after each step, "h" first (of as many columns as the output has).
        gates: each gate after its activation, and what else the equations name; NaN at masked steps.
        gradients: of the loss by each state after each step ("h", "c") and by each gate's pre-activation ("f"; 0
            at masked steps). States count as a step's results side by side: what c(t) does to the loss by way of
            h(t) belongs to h(t). Empty without a loss, zero where it sends nothing.
        initial: each state before the first step, (batch, units).
        valid: (batch, time), False at masked steps, or None.
        backwards: the layer reads from the end of time.
        cell: the cell as it was run.
    """

    states: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    initial: dict[str, np.ndarray]
    valid: np.ndarray | None
    backwards: bool
    cell: Cell

    @property
    def memory(self) -> str:
        """The name of the state that remembers: an LSTM's cell state, else the output."""
        return list(self.states)[min(1, len(self.states) - 1)]

    @property
    def remembered(self) -> np.ndarray:
        """Its values."""
        return self.states[self.memory]

    def arrays(self) -> dict[str, np.ndarray]:
        """States, gates and gradients by name; a gradient's name is "d_" and what it is taken by."""
        return self.states | self.gates | {f"d_{name}": g for name, g in self.gradients.items()}


class Trace(Mapping[str, np.ndarray]):
    """What `trace` found: arrays (batch, time, units) by "layer/name", such as "lstm/f".

    Attributes:
        layers: a `LayerTrace` by the layer's path in the model ("encoder/lstm").
        outputs: the model's outputs.
        loss: the loss that was differentiated, penalties included, or None.
    """

    layers: dict[str, LayerTrace]
    outputs: Any
    loss: float | None

    def __init__(self, layers: dict[str, LayerTrace], outputs: Any, loss: float | None) -> None:
        self.layers, self.outputs, self.loss = layers, outputs, loss
        self._arrays = {
            f"{path}/{name}": a for path, layer in layers.items() for name, a in layer.arrays().items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise KeyError(f"{name!r} is not in the trace; it has {', '.join(self._arrays)}")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in self.items())
        return f"Trace({shapes}{'' if self.loss is None else f'; loss {self.loss:.6g}'})"

    def to_xarray(self, layer: str | None = None) -> xarray.Dataset:
        """One layer's arrays as an `xarray.Dataset` with the dimensions batch, time and units.

        With a projection the states of the output's width have the dimension outputs in place of units.

        Arguments:
            layer: the layer's path; may be left out where there is one recurrent layer only.

        Raises:
            ImportError: xarray is not installed.
            ValueError: no such layer, or several and none named.
        """
        path = self._one(layer)
        return _dataset(self.layers[path])

    def to_datatree(self) -> xarray.DataTree:
        """All layers as an `xarray.DataTree`: a Dataset, as `to_xarray` gives it, at each layer's path.

        Raises:
            ImportError: xarray is not installed.
        """
        datasets = {path: _dataset(found) for path, found in self.layers.items()}
        return _xarray().DataTree.from_dict(datasets)

    def _one(self, layer: str | None) -> str:
        if layer is None and len(self.layers) == 1:
            return next(iter(self.layers))
        if layer not in self.layers:
            raise ValueError(f"layer: expected one of {', '.join(self.layers)}, got {layer!r}")
        return layer


def trace(
    model: Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    mask: Any = None,
    lengths: Any = None,
    training: bool = False,
) -> Trace:
    """Every gate and state of every recurrent layer at every step of one batch, and with `y` every gradient.

    For each layer, by its path: its states after each step ("lstm/h", "lstm/c"), its gates after their
    activation ("lstm/i"), and, where there are targets, the loss's gradients by each state after each step
    ("lstm/d_h": by the step's own output and through all later steps) and by each gate's pre-activation
    ("lstm/d_i"; a GRU's candidate has two, "d_n_x" and "d_n_h"). At a masked step a state is the one carried
    over, gates are NaN. Steps are those of the layer's input, also where it reads them from the end. A layer that
    runs several times, as a decoder does step by step, has its runs one after the other. The model, its states
    included, stays as it was.

    Arguments:
        model: a model; compiled, with a loss, if `y` is given.
        x, y, sample_weight, mask, lengths: one batch, in the forms that `train_on_batch` takes.
        training: with dropout and the like, as in training, drawn anew; takes `y`.

    Raises:
        ValueError: data that do not fit, a model without a recurrent layer, a recurrent sequence that belongs to
            no layer of the model, targets for a model that was not compiled.

    >>> import numlstm as nl
    >>> model = nl.Sequential([nl.LSTM(8, name="lstm"), nl.Dense(1)])
    >>> found = trace(model, np.ones((4, 50, 3)))
    >>> sorted(found)
    ['lstm/c', 'lstm/f', 'lstm/g', 'lstm/h', 'lstm/i', 'lstm/o']
    >>> found["lstm/f"].shape, bool((found["lstm/f"] > 0).all())
    ((4, 50, 8), True)
    """
    if not isinstance(model, Trainer):
        raise ValueError(f"model: expected a model, got {type(model).__name__}")
    if training and y is None:
        raise ValueError("training: expected False where no targets y are given, got True")
    return record(
        model, x, y, sample_weight=sample_weight, mask=mask, lengths=lengths, training=training,
        differentiate=y is not None,
    )  # fmt: skip


def record(
    model: Model, x: Any, y: Any, *, mask: Any, lengths: Any, differentiate: bool, values: bool = True,
    **options: Any,
) -> Trace:  # fmt: skip
    """`trace`, with the gradients asked for openly, and without gates and states where `values` is False."""

    def run() -> tuple[float | None, Any]:
        if not differentiate:
            return None, model.predict_on_batch(x, mask=mask, lengths=lengths)
        loss, _, outputs = model.loss_and_gradients(x, y, mask=mask, lengths=lengths, **options)
        return loss, outputs

    if not model.built:  # a first call makes the weights, by which each sequence's layer is told
        run()
        for _, layer in model.walk():
            if isinstance(layer, Recurrent):
                layer.reset_states()
    layers = {path: layer for path, layer in model.walk() if isinstance(layer, Recurrent)}
    if not layers:
        raise ValueError(f"model: {model.name} has no recurrent layer")
    recorder = _Recorder(layers, values)
    with _kept_states(layers.values()), ops.watched(recorder):
        loss, outputs = run()
    return Trace(recorder.found(differentiate), outputs, loss)


@contextmanager
def _kept_states(layers: Any) -> Iterator[None]:
    """Stateful layers are left as they were."""
    before = [(layer, layer.states) for layer in layers]
    for layer, states in before:
        layer.states = None if states is None else tuple(np.array(s) for s in states)
    try:
        yield
    finally:
        for layer, states in before:
            layer.states = states


@dataclass
class _Run:
    """One sequence of a layer, time-major, in the order of processing."""

    path: str
    arguments: dict[str, Any]
    precision: str
    backwards: bool
    states: dict[str, np.ndarray]  # after each step
    initial: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray] | None = None

    def differentiated(
        self, dh: np.ndarray | None, dfinal: Sequence[Any], dstates: Sequence[Any] | None
    ) -> dict[str, np.ndarray]:
        """The gradients by step, from those of the results. In pieces of time, each from the states that the kernel
        had before it, as the reference keeps everything of every step."""
        given = self.arguments
        steps, batch, _ = given["x"].shape
        piece = max(1, PIECE // (batch * given["kernel"].shape[1]))
        parts: list[dict[str, np.ndarray]] = []
        for start in reversed(range(0, steps, piece)):
            here = slice(start, start + piece)
            before = tuple(s[start - 1] if start else self.initial[n] for n, s in self.states.items())
            out = reference.forward(
                *(given["cell"], given["x"][here], given["kernel"], given["recurrent_kernel"]),
                *(given["bias"], given["params"], before, _at(given["valid"], here)),
                training=True,
                aux=tuple(_at(a, here) for a in given["aux"]),
                recurrent_mask=_at(given["recurrent_mask"], here),
                projection=given["projection"],
                precision=self.precision,
            )
            own = None if dstates is None else tuple(_at(d, here) for d in dstates)
            found, dfinal = reference.gradients_by_step(out.residual, _at(dh, here), tuple(dfinal), own)
            parts.append(found)
        return {name: np.concatenate([part[name] for part in reversed(parts)]) for name in parts[0]}


class _Recorder:
    """Notes what passes through the recurrent sequences of the given layers: see `ops.watched`."""

    def __init__(self, layers: dict[str, Recurrent], values: bool) -> None:
        self._layers, self._values = layers, values
        self._runs: list[_Run] = []

    def forward(self, kernel: Any, arguments: dict[str, Any], reverse: bool, out: Any) -> _Run:
        cell = arguments["cell"]
        path = next((p for p, layer in self._layers.items() if layer.built and layer.kernel is kernel), None)
        if path is None:
            raise ValueError(
                f"model: a sequence of the cell {cell.name} belongs to none of its recurrent layers "
                f"({', '.join(self._layers)}): what it does would go unseen"
            )
        arguments = {name: _numpy(a) for name, a in arguments.items()}
        after = [np.array(_numpy(a)) for a in (out.h, *out.states)]
        start = tuple(np.array(s) for s in arguments["state"] or [np.zeros_like(a[0]) for a in after])
        precision = getattr(backends.get_backend(), "precision", "float32")
        if isinstance(arguments["kernel"], Quantized):  # int8 weights have their own products
            precision = "float32"
        names = cell.state
        run = _Run(
            path, arguments, precision, reverse, dict(zip(names, after, strict=True)),
            dict(zip(names, start, strict=True)), {},
        )  # fmt: skip
        if self._values:
            before = tuple(np.concatenate([s[None], a[:-1]]) for s, a in zip(start, after, strict=True))
            names = ("x", "kernel", "recurrent_kernel", "bias", "params")
            options = ("aux", "recurrent_mask", "projection")
            run.gates = gates.gate_values(
                cell, *(arguments[n] for n in names), before,
                **{n: arguments[n] for n in options}, precision=precision,
            )  # fmt: skip
            if arguments["valid"] is not None:
                for a in run.gates.values():
                    a[~arguments["valid"]] = np.nan
        self._runs.append(run)
        return run

    def backward(self, seen: _Run, dh: Any, dfinal: Sequence[Any], dstates: Sequence[Any] | None) -> None:
        dh, dfinal = _numpy(dh), _numpy(tuple(dfinal))
        dstates = None if dstates is None else _numpy(tuple(dstates))
        seen.gradients = seen.differentiated(dh, dfinal, dstates)

    def found(self, differentiated: bool) -> dict[str, LayerTrace]:
        """By path, each layer's runs one after the other, in the order of its input's steps."""
        runs: dict[str, list[_Run]] = {}
        for run in self._runs:
            runs.setdefault(run.path, []).append(run)
        return {path: _layer_trace(path, runs[path], differentiated) for path in self._layers if path in runs}


def _layer_trace(path: str, runs: list[_Run], differentiated: bool) -> LayerTrace:
    """A layer's runs as one, batch-major."""
    batches = {run.arguments["x"].shape[1] for run in runs}
    if len(batches) > 1:
        raise ValueError(
            f"model: {path} runs on batches of {sorted(batches)} rows in one pass: expected one size"
        )
    for run in runs:
        if differentiated and run.gradients is None:  # the loss does not depend on it
            run.gradients = run.differentiated(None, (None,) * len(run.states), None)

    def joined(kind: str) -> dict[str, np.ndarray]:
        parts = [getattr(run, kind) or {} for run in runs]
        return {
            name: np.concatenate(
                [_in_time(p[name], run.backwards) for p, run in zip(parts, runs, strict=True)], 1
            )
            for name in parts[0]
        }

    valid = None
    if any(run.arguments["valid"] is not None for run in runs):
        valid = np.concatenate([_valid(run) for run in runs], 1)
    return LayerTrace(
        joined("states"), joined("gates"), joined("gradients"), runs[0].initial, valid, runs[0].backwards,
        runs[0].arguments["cell"],
    )  # fmt: skip


def _in_time(a: np.ndarray, backwards: bool) -> np.ndarray:
    """(T, B, ...) in the order of processing as (B, T, ...) in that of time."""
    return (a[::-1] if backwards else a).swapaxes(0, 1)


def _valid(run: _Run) -> np.ndarray:
    x, valid = run.arguments["x"], run.arguments["valid"]
    return _in_time(np.ones(x.shape[:2], bool) if valid is None else valid, run.backwards)


def _at(a: Any, here: slice) -> Any:
    """The steps `here` of an array (T, B, units), or (1, B, units) when every step has the same."""
    return a if a is None or a.shape[0] == 1 else a[here]


def _numpy(a: Any) -> Any:
    """Arrays of any device as NumPy arrays, in tuples too; all else as it is."""
    if isinstance(a, tuple):
        return tuple(map(_numpy, a))
    return backends.to_numpy(a) if hasattr(a, "ndim") and not isinstance(a, Quantized) else a


def _xarray() -> Any:
    try:
        import xarray
    except ImportError:
        raise ImportError("named arrays with dimensions take xarray: pip install 'numlstm[xarray]'") from None
    return xarray


def _dataset(layer: LayerTrace) -> Any:
    """A layer's arrays with their dimensions; the gates, or the last state, say how many units there are."""
    arrays = layer.arrays()
    units = next(reversed((layer.gates or layer.states).values())).shape[-1]
    variables: dict[str, Any] = {
        name: (("batch", "time", "units" if a.shape[-1] == units else "outputs"), a)
        for name, a in arrays.items()
    }
    if layer.valid is not None:
        variables["valid"] = (("batch", "time"), layer.valid)
    return _xarray().Dataset(variables)
