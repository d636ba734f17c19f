"""Callbacks that act on training by what they see: stop it, change its learning rate, keep its best model."""

import math
import os
import string
from collections.abc import Callable as Function
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from numlstm.callbacks.base import Callback, Logs, steps_or_epoch

Mode = Literal["auto", "min", "max"]


class _Watcher(Callback):
    """What callbacks share that follow one figure: its name, which direction is better, the best so far."""

    monitor: str
    min_delta: float
    patience: int

    def __init__(self, monitor: str, mode: Mode, min_delta: float, patience: int = 0) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode: expected auto, min or max; got {mode!r}")
        if patience < 0:
            raise ValueError(f"patience: expected an integer >= 0, got {patience!r}")
        self.monitor, self.mode, self.min_delta, self.patience = monitor, mode, abs(min_delta), patience
        self.best: float | None = None
        self.wait: int = 0

    @property
    def larger_is_better(self) -> bool:
        """By `mode`, or else by the name: accuracies, areas, precision, recall and scores should rise."""
        if self.mode != "auto":
            return self.mode == "max"
        name = self.monitor.removeprefix("val_").lower()
        rising = ("acc", "auc", "precision", "recall", "r2", "score", "top_k", "cosine_similarity")
        return any(part in name for part in rising)

    def improves(self, value: float, on: float | None) -> bool:
        """Is `value` better than `on` by more than `min_delta`?"""
        if on is None:
            return not math.isnan(value)
        return value - self.min_delta > on if self.larger_is_better else value + self.min_delta < on

    def look(self, logs: Logs) -> float | None:
        """The figure; None in an epoch without validation when `validation_freq` says that there are such.

        Raises ValueError, naming those there are, when it is not among `logs`.
        """
        if self.monitor not in logs:
            if self.monitor.startswith("val_") and self.params.get("validation_freq", 1) != 1:
                return None
            hint = "; give validation data" if self.monitor.startswith("val_") else ""
            raise ValueError(
                f"{type(self).__name__}: monitor {self.monitor!r} is not among "
                f"{', '.join(logs) or 'no figures'}{hint}"
            )
        return float(logs[self.monitor])

    def get_state(self) -> dict[str, Any]:
        return {"best": self.best, "wait": self.wait}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.wait = state["best"], state["wait"]


class EarlyStopping(_Watcher):
    """Stop when a figure has not improved for `patience` epochs.

    Arguments:
        monitor: the figure's name. mode: "min", "max", or "auto" (by the name).
        min_delta: smaller improvements do not count. patience: epochs without improvement that are borne.
        baseline: the figure has to get better than this.
        restore_best_weights: go back to the weights of the best epoch at the end.
        start_from_epoch: epochs before this one are not looked at.

    Raises ValueError when the figure is not there, or for an impossible option.

    >>> EarlyStopping(monitor="val_loss", patience=3).patience
    3
    """

    verbose: int
    baseline: float | None
    start_from_epoch: int
    wait: int
    best_epoch: int
    stopped_epoch: int

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: Mode = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        super().__init__(monitor, mode, min_delta, patience)
        self.verbose, self.baseline, self.start_from_epoch = verbose, baseline, start_from_epoch
        self.restore_best_weights = restore_best_weights
        self._forget()

    def _forget(self) -> None:
        self.best, self.wait, self.best_epoch, self.stopped_epoch = None, 0, 0, 0
        self.best_weights: list[np.ndarray] | None = None

    def on_train_begin(self, logs: Logs) -> None:
        self._forget()

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        value = self.look(logs)
        if value is None or epoch < self.start_from_epoch:
            return
        if self.restore_best_weights and self.best_weights is None:
            self.best_weights, self.best_epoch = self.model.get_weights(), epoch
        self.wait += 1
        if self.improves(value, self.best):
            self.best, self.best_epoch = value, epoch
            if self.restore_best_weights:
                self.best_weights = self.model.get_weights()
            if self.baseline is None or self.improves(value, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self, logs: Logs) -> None:
        if self.stopped_epoch > 0 and self.verbose:
            print(f"Epoch {self.stopped_epoch + 1}: early stopping")
        if self.restore_best_weights and self.best_weights is not None:
            if self.verbose:
                print(f"Restoring the weights of the best epoch: {self.best_epoch + 1}")
            self.model.set_weights(self.best_weights)

    def get_state(self) -> dict[str, Any]:
        kept = {"best_epoch": self.best_epoch, "best_weights": self.best_weights}
        return {**super().get_state(), **kept}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self.best_epoch, self.best_weights = state["best_epoch"], state["best_weights"]


class ReduceLROnPlateau(_Watcher):
    """Multiply the learning rate by `factor` when a figure has not improved for `patience` epochs.

    `cooldown` epochs are then not counted; the rate never falls below `min_lr`. Raises ValueError for `factor
    >= 1`, for an optimizer that follows a schedule, and when the figure is not there.

    >>> ReduceLROnPlateau(factor=0.5).factor
    0.5
    """

    factor: float
    verbose: int
    cooldown: int
    min_lr: float
    wait: int

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: Mode = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta, patience)
        if not 0 < factor < 1:
            raise ValueError(f"factor: expected a number between 0 and 1, got {factor!r}")
        self.factor, self.verbose, self.cooldown, self.min_lr = factor, verbose, cooldown, min_lr
        self.cooling: int = 0

    def on_train_begin(self, logs: Logs) -> None:
        self.best, self.wait, self.cooling = None, 0, 0

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        value = self.look(logs)
        rate = self.model.optimizer.learning_rate
        logs["learning_rate"] = rate
        if value is None:
            return
        if self.cooling > 0:
            self.cooling -= 1
            self.wait = 0
        if self.improves(value, self.best):
            self.best, self.wait = value, 0
        elif self.cooling <= 0:
            self.wait += 1
            if self.wait >= self.patience and rate > self.min_lr:
                rate = max(rate * self.factor, self.min_lr)
                self.model.optimizer.learning_rate = rate
                self.cooling, self.wait = self.cooldown, 0
                if self.verbose:
                    print(f"Epoch {epoch + 1}: the learning rate falls to {rate:g}")

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "cooling": self.cooling}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self.cooling = state["cooling"]


class LearningRateScheduler(Callback):
    """Set the learning rate of each epoch by a function `(epoch, learning_rate) -> learning_rate`.

    Raises ValueError when the function gives no number, or when the optimizer follows a schedule of its own.

    >>> LearningRateScheduler(lambda epoch, rate: rate * 0.9).verbose
    0
    """

    schedule: Function[[int, float], float]
    verbose: int

    def __init__(self, schedule: Function[[int, float], float], verbose: int = 0) -> None:
        if not callable(schedule):
            raise ValueError(f"schedule: expected a function (epoch, learning_rate), got {schedule!r}")
        self.schedule, self.verbose = schedule, verbose

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        rate = self.schedule(epoch, self.model.optimizer.learning_rate)
        if not isinstance(rate, (int, float, np.number)):
            raise ValueError(f"schedule: gave {rate!r} for epoch {epoch}, expected a number")
        self.model.optimizer.learning_rate = float(rate)
        if self.verbose:
            print(f"Epoch {epoch + 1}: the learning rate is {rate:g}")

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        logs["learning_rate"] = self.model.optimizer.learning_rate


class TerminateOnNaN(Callback):
    """Stop as soon as the loss is not a finite number. On a GPU looking at it after each step makes each step wait.

    >>> TerminateOnNaN().on_train_batch_end(0, {"loss": 0.5})
    """

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            print(f"Batch {batch}: the loss is {loss}, training stops")
            self.model.stop_training = True


class ModelCheckpoint(_Watcher):
    """Save the model after each epoch, or after every `save_freq` steps, by `model.save`.

    Arguments:
        filepath: the file; may name figures and the epoch, as "m-{epoch:02d}-{val_loss:.3f}.safetensors".
        monitor, mode, save_best_only, initial_value_threshold: save only when this figure gets better (than
            that).
        save_freq: "epoch", or a number of steps.
        include_optimizer: keep the optimizer's state in the file, to train on from it.
        preprocessing: what `model.save` should keep beside the weights (vocabulary, scaling).

    Raises ValueError for `save_weights_only=True` (the file holds the weights, and a few hundred bytes
    beside), or when the figure or a name in `filepath` is not there.

    >>> ModelCheckpoint("best.safetensors", save_best_only=True).monitor
    'val_loss'
    """

    filepath: str
    verbose: int
    save_best_only: bool
    options: dict[str, Any]

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Mode = "auto",
        save_freq: int | Literal["epoch"] = "epoch",
        initial_value_threshold: float | None = None,
        include_optimizer: bool = False,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(monitor, mode, 0.0)
        if save_weights_only:
            raise ValueError(
                "save_weights_only: the one kind of file holds weights and model; expected False"
            )
        self.filepath, self.verbose, self.save_best_only = os.fspath(filepath), verbose, save_best_only
        self.save_freq: int | Literal["epoch"] = steps_or_epoch("save_freq", save_freq)
        self.best = initial_value_threshold
        self.options = {"include_optimizer": include_optimizer, "preprocessing": preprocessing}
        self._epoch = self._steps = 0

    def needs(self, hook: str) -> bool:
        return super().needs(hook) and (hook != "on_train_batch_end" or self.save_freq != "epoch")

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "steps": self._steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self._steps = state["steps"]

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        self._steps += 1
        if self.save_freq != "epoch" and self._steps % self.save_freq == 0:
            self._save(self._epoch, logs, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        if self.save_freq == "epoch":
            self._save(epoch, logs, None)

    def _save(self, epoch: int, logs: Logs, batch: int | None) -> None:
        if self.save_best_only:
            value = self.look(logs)
            if value is None or not self.improves(value, self.best):
                return
            self.best = value
        names = {"epoch": epoch + 1, **({} if batch is None else {"batch": batch}), **logs}
        wanted = {field for _, field, _, _ in string.Formatter().parse(self.filepath) if field}
        missing = sorted(wanted - set(names))
        if missing:
            raise ValueError(f"filepath: {missing[0]!r} is not among {', '.join(names)}")
        path = self.filepath.format(**names)
        self.model.save(path, **self.options)
        if self.verbose:
            print(f"Epoch {epoch + 1}: saved {path}")
