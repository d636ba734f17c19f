"""What all estimators share: the network that their parameters describe, its training, pickling and saving.

The fitted network is `model_`, an ordinary `nl.Sequential`. Pickles hold it as the bytes of the library's own file
format; nothing else of the library is ever pickled, and nothing here reads a pickle.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

import numlstm as nl
from numlstm import random
from numlstm.backend import use_backend
from numlstm.callbacks import EarlyStopping, TerminateOnNaN
from numlstm.data.batches import Batches
from numlstm.io.native import model_bytes, model_from_bytes

__all__ = ["CELLS", "RecurrentEstimator", "build"]

CELLS: dict[str, Any] = {
    "lstm": nl.LSTM,
    "gru": nl.GRU,
    "rnn": nl.SimpleRNN,
    "slstm": nl.SLSTM,
    "indrnn": nl.IndRNN,
}
"""The recurrent layers by the name that `cell=` takes."""


def build(
    inputs: int,
    outputs: int,
    *,
    cell: str = "lstm",
    units: int | Sequence[int] = 32,
    bidirectional: bool = False,
    dropout: float = 0.0,
    sequences: bool = False,
    zeros: bool = False,
) -> nl.Sequential:
    """Recurrent layers, dropout after each, and a dense output: (batch, time, inputs) to (batch, [time,] outputs).

    `sequences`: an output at every step, else at the end. `zeros`: an untrained network puts out zeros.

    >>> [type(layer).__name__ for layer in build(3, 1, units=(8, 4), dropout=0.1).layers[1:]]
    ['LSTM', 'Dropout', 'LSTM', 'Dropout', 'Dense']
    """
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}; got {cell!r}")
    widths = [units] if isinstance(units, (int, np.integer)) else list(units)
    if not widths or any(isinstance(n, bool) or int(n) != n or n < 1 for n in widths):
        raise ValueError(f"units: expected a number of units >= 1, or one for each layer; got {units!r}")
    layers: list[Any] = [nl.Input((None, inputs))]
    for number, width in enumerate(widths):
        layer = CELLS[cell](int(width), return_sequences=sequences or number < len(widths) - 1)
        layers.append(nl.Bidirectional(layer) if bidirectional else layer)
        if dropout:
            layers.append(nl.Dropout(dropout))
    layers.append(nl.Dense(outputs, kernel_initializer="zeros" if zeros else "glorot_uniform"))
    return nl.Sequential(layers)


class RecurrentEstimator(BaseEstimator):
    """Base of the estimators. Subclasses list the shared parameters in their own `__init__`, as scikit-learn asks.

    After `fit`: `model_`, the network; `history_`, its figures by epoch; `n_iter_`, how many epochs were run.
    """

    # names only: every subclass sets them in its __init__
    cell: str
    units: Any
    bidirectional: bool
    dropout: float
    learning_rate: float
    epochs: int
    batch_size: int
    early_stopping: Any
    validation_fraction: float
    n_iter_no_change: int
    random_state: Any
    backend: str | None
    verbose: Any

    model_: nl.Sequential
    history_: dict[str, list[float]]
    n_iter_: int

    def _seed(self) -> int:
        """A seed for everything that one `fit` draws."""
        return int(check_random_state(self.random_state).randint(0, 2**31 - 1))

    def _fraction(self) -> float:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: expected a number between 0 and 1, got {self.validation_fraction!r}"
            )
        return float(self.validation_fraction)

    def _network(self, inputs: int, outputs: int, **options: Any) -> nl.Sequential:
        return build(
            inputs,
            outputs,
            cell=self.cell,
            units=self.units,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            **options,
        )

    def _train(
        self,
        inputs: int,
        outputs: int,
        loss: Any,
        seed: int,
        *,
        validation: Any,
        options: dict[str, Any],
        **data: Any,
    ) -> None:
        """Make the network and train it on `data`, arguments of `Model.fit`.

        With `validation` the weights of the best epoch are kept, and training ends after `n_iter_no_change` epochs
        without a better one. `options` are those of `build` that the kind of estimator decides.

        Raises ValueError when the loss stops being a finite number.
        """
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number > 0, got {self.learning_rate!r}")
        # training that diverges is an error of its own, and needs no warning from NumPy before it
        with use_backend(self.backend), random.within(seed), np.errstate(over="ignore", invalid="ignore"):
            model = self._network(inputs, outputs, **options)
            model.compile(nl.optimizers.Adam(self.learning_rate, global_clipnorm=1.0), loss)
            callbacks: list[Any] = [_Finite()]
            if validation is not None:
                callbacks.append(EarlyStopping(patience=self.n_iter_no_change, restore_best_weights=True))
            history = model.fit(
                **data,
                batch_size=None if isinstance(data["x"], Batches) else self.batch_size,
                epochs=self.epochs,
                verbose=int(self.verbose) if isinstance(self.verbose, bool) else self.verbose,
                callbacks=callbacks,
                validation_data=validation,
            )
        self.model_, self.history_, self.n_iter_ = model, history.history, len(history.epoch)

    def _output(self, x: Any, **options: Any) -> np.ndarray:
        """The network's outputs; `options` are those of `Model.predict`."""
        check_is_fitted(self)
        with use_backend(self.backend):
            return self.model_.predict(
                x, batch_size=None if isinstance(x, Batches) else 256, verbose=0, **options
            )

    # Pickles and files

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[arg-type]
        if "model_" in state:
            state["model_"] = model_bytes(state["model_"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "model_" in state:
            state["model_"] = model_from_bytes(state["model_"])
        super().__setstate__(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one `.safetensors` file, whole or not at all; `estimators.load` reads it.

        The file is also a model's: `nl.load` gives the network alone.

        Raises:
            ValueError: another file ending, or a parameter that a file can't hold (a RandomState, for one).
            NotFittedError: there is nothing to save yet.
        """
        from numlstm.estimators.files import save

        check_is_fitted(self)
        save(self, path)


class _Finite(TerminateOnNaN):
    """Training that diverges is an error, not a model."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        if not math.isfinite(logs["loss"]):
            raise ValueError(f"training diverged (the loss became {logs['loss']}): lower learning_rate")
