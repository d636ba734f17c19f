"""The loss's gradient by time step: where it vanishes, and where it explodes.

A recurrent network learns what happened k steps ago from dLoss/dh at that step, which k products with the
step's Jacobian shrink or blow up (Hochreiter 1991; Bengio, Simard & Frasconi 1994). A fused kernel goes
through these gradients without handing them out; `trace` computes them once more (tracing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numlstm.inspect.tracing import record
from numlstm.training import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from numlstm.models import Model

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
        from numlstm.data import plots

        figure, (axes,) = plots.panels(1, 7.0, 4.2)
        for name, norms in self.norms.items():
            marker = "o" if len(norms) <= 30 else ""
            axes.plot(np.where(norms > 0, norms, np.nan), marker=marker, markersize=4, label=name)
        axes.set_yscale("log")
        axes.set(title=title, xlabel="time step t", ylabel="norm of dLoss/dh(t), mean of the rows")
        plots.whole_numbers(axes.xaxis)
        axes.legend(frameon=False)
        if path is not None:
            plots.save(figure, path)
        return figure


def gradient_norms(
    model: Model,
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
    found = record(
        model, x, y, sample_weight=sample_weight, mask=mask, lengths=lengths, training=training,
        differentiate=True, values=False,
    )  # fmt: skip
    # "h" or whatever else a cell calls its output: the first state
    outputs = {path: layer.gradients[next(iter(layer.states))] for path, layer in found.layers.items()}
    norms = {path: np.linalg.norm(d.astype(np.float64), axis=-1).mean(axis=0) for path, d in outputs.items()}
    assert found.loss is not None  # it was asked for
    return GradientNorms(norms, found.loss)
