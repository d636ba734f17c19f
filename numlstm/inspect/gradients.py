"""The loss's gradient by time step: where it vanishes, and where it explodes.

A recurrent network learns what happened k steps ago from dLoss/dh at that step, which k products with the
step's Jacobian shrink or blow up (Hochreiter 1991; Bengio, Simard & Frasconi 1994). A fused kernel goes
through these gradients without handing them out. Here the same kernel runs the same sequence one step at a
time, so that what is passed from step to step can be read: exact, for every cell, option and backend, at the
price of a call a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm import backend as backends
from numlstm.autograd import GradientTape
from numlstm.layers.recurrent import Recurrent
from numlstm.training import Trainer, _Figures, _Penalties

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientNorms", "gradient_norms"]


@dataclass(frozen=True)
class GradientNorms:
    """What `gradient_norms` found.

    Attributes:
        norms: for each recurrent layer, by its path in the model ("encoder/lstm"), a float64 array (time,).
        loss: the loss that was differentiated, penalties included.
    """

    norms: dict[str, np.ndarray]
    loss: float

    def plot(self, path: str | Path | None = None, *, title: str = "Gradient by time step") -> Figure:
        """The norms by time step on a log scale, one line a layer. Zeros, which it can't show, break a line.

        Arguments:
            path: where to write the picture, a .png, .svg or .pdf file.
            title: what stands above it.

        Returns the matplotlib figure, in a notebook the picture itself.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another kind of file.
        """
        from matplotlib.figure import Figure

        from numlstm.data import plots

        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        for name, norms in self.norms.items():
            marker = "o" if len(norms) <= 30 else ""
            axes.plot(np.where(norms > 0, norms, np.nan), marker=marker, markersize=4, label=name)
        axes.set_yscale("log")
        axes.set(title=title, xlabel="time step t", ylabel="norm of dLoss/dh(t), mean of the rows")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        if path is not None:
            plots.save(figure, path)
        return figure


def gradient_norms(
    model: Trainer,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    mask: Any = None,
    lengths: Any = None,
    training: bool = False,
) -> GradientNorms:
    """For each recurrent layer the norm of dLoss/dh(t), by time step t, for one batch.

    dLoss/dh(t) is the total derivative with respect to the output state after step t: what reaches the loss
    from the step's own output and through all later steps. The norm is taken of each row's (units,) gradient
    and averaged over the batch; the loss is a mean over the batch already, so that each row's gradient holds
    a factor 1 / batch. Step t is that of the layer's input, also where `go_backwards` reads it from its end; at
    a masked step the state is the one carried over. A layer that runs several times, as a decoder does step by
    step, has its runs one after the other. The model, its states included, stays as it was.

    Arguments:
        model: a compiled model.
        x, y, sample_weight, mask, lengths: one batch, in the forms that `train_on_batch` takes.
        training: with dropout and the like, as in training, drawn anew.

    Raises:
        ValueError: a model that is not compiled or has no recurrent layer, data that do not fit, a recurrent
            sequence that belongs to no layer of the model.

    >>> import numlstm as nl
    >>> model = nl.Sequential([nl.LSTM(8, name="lstm"), nl.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> found = gradient_norms(model, np.ones((4, 50, 3)), np.ones((4, 1)))
    >>> found.norms["lstm"].shape
    (50,)
    >>> bool(found.norms["lstm"][0] < found.norms["lstm"][-1])  # it fades on its way back
    True
    """
    if not isinstance(model, Trainer):
        raise ValueError(f"model: expected a compiled model, got {type(model).__name__}")
    model._need_compiled("gradient_norms")
    batch = model._one_batch(x, y, sample_weight, mask, lengths)
    with model._running(None):
        if not model.built:
            model._build(batch)
        layers = {path: layer for path, layer in model.walk() if isinstance(layer, Recurrent)}
        if not layers:
            raise ValueError(f"model: {model.name} has no recurrent layer")
        variables = list({id(v): v for layer in layers.values() for v in layer.weights}.values())
        with _kept_states(layers.values()), _Stepwise(backends.get_backend(), layers) as stepwise:
            with GradientTape() as tape:
                for variable in variables:  # also frozen ones: without them nothing would be recorded
                    tape.watch(variable)
                y_pred = model(batch.x, training=bool(training), mask=batch.mask)
                total, _ = _Figures(model).objective(batch, y_pred)
                for penalty in _Penalties(model, model.trainable_weights)():
                    total = penalty if total is None else total + penalty
            if total is None:
                raise ValueError("loss: the model was compiled without one, and no layer adds any")
            tape.gradient(total, variables)
    return GradientNorms(stepwise.norms(), float(total.item()))


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
    """One sequence of a layer: the norms by step of processing, filled in by the backward pass."""

    path: str
    backwards: bool
    norms: np.ndarray


class _Stepwise:
    """A backend that runs each sequence of the given layers in steps of one, on another backend, and notes the
    gradients between the steps. Everything else is that backend's own.

    Sequences come without the layer they belong to; its `kernel` says which one that is.
    """

    def __init__(self, serving: Any, layers: dict[str, Recurrent]) -> None:
        self._serving, self._layers = serving, layers
        self._runs: list[_Run] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._serving, name)

    def __enter__(self) -> _Stepwise:
        self._token = backends._CHOSEN.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        backends._CHOSEN.reset(self._token)

    def norms(self) -> dict[str, np.ndarray]:
        """By path, each layer's runs one after the other, in the order of its input's steps."""
        found: dict[str, list[np.ndarray]] = {}
        for run in self._runs:
            found.setdefault(run.path, []).append(run.norms[::-1] if run.backwards else run.norms)
        return {path: np.concatenate(found[path]) for path in self._layers if path in found}

    def _begin(self, cell: Any, kernel: Any, steps: int) -> _Run:
        for path, layer in self._layers.items():
            if layer.built and layer.kernel.data is kernel:
                run = _Run(path, layer.go_backwards, np.zeros(steps))
                self._runs.append(run)
                return run
        raise ValueError(
            f"model: a sequence of the cell {cell.name} belongs to none of its recurrent layers "
            f"({', '.join(self._layers)}): its gradient would go unseen"
        )

    def sequence_forward(
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
        remat_steps: int | None = None,  # saves memory, changes no value: not needed step by step
        keep_states: bool = True,
        **others: Any,
    ) -> Any:
        run = self._begin(cell, kernel, x.shape[0])
        outs = []
        for t in range(x.shape[0]):
            here = slice(t, t + 1)
            out = self._serving.sequence_forward(
                cell, x[here], kernel, recurrent_kernel, bias, params, state,
                None if valid is None else valid[here],
                training=training, aux=tuple(_at(a, here) for a in aux),
                recurrent_mask=_at(recurrent_mask, here), **others,
            )  # fmt: skip
            state = out.final
            outs.append(out)
        states = None
        if outs[0].states is not None:
            states = tuple(_joined(parts) for parts in zip(*(o.states for o in outs), strict=True))
        return outs[-1]._replace(
            h=_joined([o.h for o in outs]), states=states, residual=(run, [o.residual for o in outs])
        )

    def sequence_backward(
        self,
        residual: tuple[_Run, list[Any]],
        dh: Any,
        dfinal: Sequence[Any],
        *,
        need_dx: bool = True,
        dstates: Sequence[Any] | None = None,
        **others: Any,
    ) -> Any:
        run, kept = residual
        arriving, total, dx = tuple(dfinal), None, []
        for t in range(len(kept) - 1, -1, -1):
            here = slice(t, t + 1)
            own = None if dh is None else dh[here]
            run.norms[t] = self._mean_row_norm(own, arriving[0])
            if dstates is not None:
                others["dstates"] = tuple(None if d is None else d[here] for d in dstates)
            g = self._serving.sequence_backward(kept[t], own, arriving, need_dx=need_dx, **others)
            kept[t] = None  # a residual serves once; this frees its memory
            arriving = g.state
            dx.append(g.x)
            total = g if total is None else type(g)(*map(_added, total, g))
        return total._replace(x=_joined(dx[::-1]) if need_dx else None, state=arriving)

    def _mean_row_norm(self, *parts: Any) -> float:
        """The mean over the rows of the norm of what arrives: (1, B, P) or (B, P) parts, None for nothing."""
        arrays = [
            np.asarray(self.to_numpy(a), np.float64).reshape(a.shape[-2:]) for a in parts if a is not None
        ]
        return float(np.linalg.norm(sum(arrays), axis=-1).mean()) if arrays else 0.0

    def sequence_forward_pair(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        return [self.sequence_forward(**call) for call in calls]

    def sequence_backward_pair(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        return [self.sequence_backward(**call) for call in calls]


def _at(a: Any, here: slice) -> Any:
    """The steps `here` of an array (T, B, H), or (1, B, H) when every step has the same."""
    return a if a is None or a.shape[0] == 1 else a[here]


def _joined(parts: Sequence[Any]) -> Any:
    """Parts (1, B, H) as one (T, B, H), on whatever device they are."""
    whole = np.empty_like(parts[0], shape=(len(parts), *parts[0].shape[1:]))
    for t, part in enumerate(parts):
        whole[t : t + 1] = part
    return whole


def _added(a: Any, b: Any) -> Any:
    """The sum of two gradients: arrays, tuples of them, or None for none."""
    if isinstance(b, tuple):
        return tuple(map(_added, a, b))
    return b if a is None else a if b is None else a + b
