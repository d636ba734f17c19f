"""Callbacks: what happens between the epochs and batches of `fit`, with Keras' names and defaults.

A callback overrides the `on_...` methods it needs; only these are called, so an unused hook costs nothing.
`logs` holds the figures of the epoch (or the running ones of a batch). Files are written whole or not at all,
and without pickle. A callback that decides from what it saw (patience, best value) hands that over with
`get_state` and `set_state`, so that `BackupAndRestore` can take a run up again where it stopped.
"""

import contextlib
import csv
import io
import json
import math
import os
import string
from collections.abc import Callable as Function
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from numlstm import random
from numlstm.io.atomic import write_bytes

__all__ = [
    "BackupAndRestore",
    "CSVLogger",
    "Callback",
    "CallbackList",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "LearningRateScheduler",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "TerminateOnNaN",
]

Logs = dict[str, Any]
Mode = Literal["auto", "min", "max"]


class Callback:
    """Base of all callbacks. `self.model` is the model in training, `self.params` has epochs, steps and
    verbose.

    >>> class Shout(Callback):
    ...     def on_epoch_end(self, epoch, logs):
    ...         print(f"epoch {epoch}: {logs['loss']}!")
    >>> Shout().on_epoch_end(0, {"loss": 0.5})
    epoch 0: 0.5!
    """

    model: Any = None
    params: Mapping[str, Any] = {}  # replaced, never changed

    def set_model(self, model: Any) -> None:
        """Called before training starts."""
        self.model = model

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Called before training starts."""
        self.params = params

    def on_train_begin(self, logs: Logs) -> None:
        """`fit` starts."""

    def on_train_end(self, logs: Logs) -> None:
        """`fit` ends (not after an exception)."""

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """An epoch starts, the first is 0."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """An epoch ends; `logs` has its figures, "val_..." for those of the validation data."""

    def on_train_batch_begin(self, batch: int, logs: Logs) -> None:
        """A training step starts: a batch, or a chunk of one with `bptt_steps`."""

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """A training step ends; `logs` has the running figures of the epoch."""

    def on_test_begin(self, logs: Logs) -> None:
        """`evaluate`, or the validation in `fit`, starts."""

    def on_test_end(self, logs: Logs) -> None:
        """`evaluate`, or the validation in `fit`, ends."""

    def on_test_batch_begin(self, batch: int, logs: Logs) -> None:
        """A step of an evaluation starts."""

    def on_test_batch_end(self, batch: int, logs: Logs) -> None:
        """A step of an evaluation ends."""

    def on_predict_begin(self, logs: Logs) -> None:
        """`predict` starts."""

    def on_predict_end(self, logs: Logs) -> None:
        """`predict` ends."""

    def on_predict_batch_begin(self, batch: int, logs: Logs) -> None:
        """A step of a prediction starts."""

    def on_predict_batch_end(self, batch: int, logs: Logs) -> None:
        """A step of a prediction ends; `logs` has "outputs"."""

    def needs(self, hook: str) -> bool:
        """Is there anything to do at this hook? Figures are not put together for hooks that nobody needs."""
        return getattr(type(self), hook) is not getattr(Callback, hook)

    def get_state(self) -> dict[str, Any]:
        """What it has to remember if training is taken up again: JSON-able values and lists of arrays."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `get_state` gave."""


class CallbackList:
    """Calls every callback that overrides a hook. `wants(hook)` tells whether any does.

    Raises ValueError for what is no `Callback`.
    """

    def __init__(self, callbacks: Any, model: Any, params: Mapping[str, Any]) -> None:
        self.callbacks: list[Callback] = []
        given = (
            [] if callbacks is None else [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        )
        for callback in given:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks: got a {type(callback).__name__}, expected Callback objects")
            callback.set_model(model)
            callback.set_params(params)
            self.callbacks.append(callback)
        # Backups come last: they keep what the others noted, and bring it back after these have started anew.
        self.callbacks.sort(key=lambda callback: isinstance(callback, BackupAndRestore))
        others = [c for c in self.callbacks if not isinstance(c, BackupAndRestore)]
        for callback in self.callbacks[len(others) :]:
            callback.companions = others

    def _overriding(self, hook: str) -> list[Function[..., None]]:
        return [getattr(c, hook) for c in self.callbacks if c.needs(hook)]

    def hook(self, name: str) -> Function[..., None] | None:
        """One function that calls `name` of every callback that has it; None when none does."""
        found = self._overriding(name)
        if not found:
            return None

        def call(*args: Any) -> None:
            for function in found:
                function(*args)

        return call

    def __call__(self, name: str, *args: Any) -> None:
        for function in self._overriding(name):
            function(*args)


class History(Callback):
    """The figures of every epoch: `history` (a list for each name) and `epoch` (their numbers). `fit` returns
    one.

    >>> history = History()
    >>> history.on_epoch_end(0, {"loss": 0.5})
    >>> history.history, history.epoch
    ({'loss': [0.5]}, [0])
    """

    def __init__(self) -> None:
        self.history: dict[str, list[Any]] = {}
        self.epoch: list[int] = []

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)

    def get_state(self) -> dict[str, Any]:
        return {"history": self.history, "epoch": self.epoch}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.history, self.epoch = {k: list(v) for k, v in state["history"].items()}, list(state["epoch"])


class LambdaCallback(Callback):
    """A callback made of functions, given by the names of the hooks.

    Raises ValueError for a name that is no hook.

    >>> LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs)).on_epoch_end(1, {})
    1 {}
    """

    def __init__(self, **functions: Function[..., Any] | None) -> None:
        hooks = [name for name in dir(Callback) if name.startswith("on_")]
        unknown = sorted(set(functions) - set(hooks))
        if unknown:
            raise ValueError(f"LambdaCallback: unknown hook {unknown[0]!r}; known: {', '.join(hooks)}")
        self.functions = {name: function for name, function in functions.items() if function is not None}
        for name, function in self.functions.items():
            setattr(self, name, function)

    def needs(self, hook: str) -> bool:
        return hook in self.functions


class _Watcher(Callback):
    """What callbacks share that follow one figure: its name, which direction is better, the best so far."""

    def __init__(self, monitor: str, mode: Mode, min_delta: float, patience: int = 0) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode: expected auto, min or max; got {mode!r}")
        if patience < 0:
            raise ValueError(f"patience: expected an integer >= 0, got {patience!r}")
        self.monitor, self.mode, self.min_delta, self.patience = monitor, mode, abs(min_delta), patience
        self.best: float | None = None
        self.wait = 0

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
        self.cooling = 0

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
    """Stop as soon as the loss is not a finite number.

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
        self.save_freq = _save_freq(save_freq)
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


class CSVLogger(Callback):
    """Write the figures of each epoch as a line of a CSV file; whole lines, on the disk after each epoch.

    `append`: go on with a file that is there (its header is kept), else it is written anew.

    >>> CSVLogger("log.csv").separator
    ','
    """

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        self.filename, self.separator, self.append = Path(filename), separator, append
        self.keys: list[str] | None = None

    def on_train_begin(self, logs: Logs) -> None:
        self.keys = None
        if self.append and self.filename.exists() and self.filename.stat().st_size:
            with open(self.filename, newline="", encoding="utf-8") as file:
                self.keys = next(csv.reader(file, delimiter=self.separator))[1:]
        else:
            write_bytes(self.filename, b"")

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=self.separator, lineterminator="\n")
        if self.keys is None:
            self.keys = list(logs)
            writer.writerow(["epoch", *self.keys])
        writer.writerow([epoch, *(logs.get(key, "NA") for key in self.keys)])
        with open(self.filename, "a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())  # one write: a reader meets whole lines
            file.flush()
            os.fsync(file.fileno())


class BackupAndRestore(Callback):
    """Survive an interruption: back training up, and take it up again when `fit` is called the next time.

    Kept: weights, optimizer, random state, states of stateful layers, what other callbacks remember, the
    history. A run that was interrupted and taken up ends in the same bits as one that was not, provided that
    the data come in the same
    order again: arrays and functions that return iterators do (with `steps_per_epoch` only iterators do,
    whose first batches are drawn again and skipped).

    Arguments:
        backup_dir: a folder for the one file `backup.safetensors`.
        save_freq: "epoch", or a number of steps.
        delete_checkpoint: remove the file when training ends as planned.

    Raises ValueError for a file that belongs to another model, or is none.

    >>> BackupAndRestore("backup").path.name
    'backup.safetensors'
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        delete_checkpoint: bool = True,
    ) -> None:
        if not os.fspath(backup_dir):
            raise ValueError("backup_dir: got an empty path, expected a folder")
        self.path = Path(backup_dir) / "backup.safetensors"
        self.save_freq = _save_freq(save_freq)
        self.delete_checkpoint = delete_checkpoint
        self.companions: Sequence[Callback] = []
        self._steps = 0
        self._random_at_epoch: dict[str, int] = {}  # as it was before anything of this epoch was drawn

    def needs(self, hook: str) -> bool:
        return super().needs(hook) and (hook != "on_train_batch_end" or self.save_freq != "epoch")

    def on_train_begin(self, logs: Logs) -> None:
        if self.path.exists():
            self.restore()
        self._random_at_epoch = random.get_state()

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        if self.save_freq != "epoch":
            self._steps += 1
            if self._steps % self.save_freq == 0:
                self.save(self._epoch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self._random_at_epoch = random.get_state()
        self.save(epoch + 1, 0)

    def on_train_end(self, logs: Logs) -> None:
        if self.delete_checkpoint:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def _companions_by_name(self) -> dict[str, Callback]:
        """The other callbacks by class and number, so that one more or less does not shift what belongs to
        whom."""
        named: dict[str, Callback] = {}
        for callback in self.companions:
            name = type(callback).__name__
            number = sum(known.partition(" ")[0] == name for known in named)
            named[f"{name} {number}"] = callback
        return named

    def save(self, epoch: int, step: int) -> None:
        """Write the file from which training goes on at `step` of `epoch`."""
        from safetensors.numpy import save

        model = self.model
        optimizer = model.optimizer.state_dict()
        arrays = {f"weight.{i}": w for i, w in enumerate(model.get_weights())}
        arrays |= {f"optimizer.{name}": a for name, a in optimizer.pop("slots").items()}
        for i, layer in enumerate(model.recurrent_layers()):
            arrays |= {f"state.{i}.{j}": s for j, s in enumerate(layer.states or ())}
        companions = {
            name: _take_arrays(callback.get_state(), f"callback.{name}", arrays)
            for name, callback in self._companions_by_name().items()
        }
        about = {
            "epoch": epoch,
            "step": step,
            "optimizer": optimizer,
            "random": random.get_state(),
            "random_at_epoch": self._random_at_epoch,
            "callbacks": companions,
            "figures": model.training_figures() if step else None,
        }
        content = save(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()},
            {"numlstm_backup": json.dumps(about)},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, content)

    def restore(self) -> None:
        """Put the model, the optimizer, the randomness and the other callbacks where the file says."""
        from safetensors import SafetensorError, safe_open

        model = self.model
        try:
            with safe_open(self.path, framework="numpy") as file:
                about = json.loads((file.metadata() or {})["numlstm_backup"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"backup_dir: {self.path} is not a backup that can be read ({error}); remove it to start anew"
            ) from error
        model.set_weights(
            [arrays[f"weight.{i}"] for i in range(sum(n.startswith("weight.") for n in arrays))]
        )
        slots = {n.removeprefix("optimizer."): a for n, a in arrays.items() if n.startswith("optimizer.")}
        model.optimizer.load_state_dict({**about["optimizer"], "slots": slots})
        for i, layer in enumerate(model.recurrent_layers()):
            states = tuple(arrays[n] for n in sorted(arrays) if n.startswith(f"state.{i}."))
            layer.states = states or None
        for name, callback in self._companions_by_name().items():
            state = about["callbacks"].get(name)
            if state:
                callback.set_state(_put_arrays(state, f"callback.{name}", arrays))
        random.set_state(about["random_at_epoch"])
        model.resume_training(about["epoch"], about["step"], about["random"], about["figures"])


def _take_arrays(state: Mapping[str, Any], prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """`state` without its lists of arrays, which go into `arrays`; `_put_arrays` is the inverse."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            arrays |= {f"{prefix}.{name}.{i}": a for i, a in enumerate(value)}
            plain[name] = {"arrays": len(value)}
        else:
            plain[name] = value
    return plain


def _put_arrays(state: Mapping[str, Any], prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: [arrays[f"{prefix}.{name}.{i}"] for i in range(value["arrays"])]
        if isinstance(value, dict) and set(value) == {"arrays"}
        else value
        for name, value in state.items()
    }


def _save_freq(save_freq: Any) -> Any:
    whole = isinstance(save_freq, int) and not isinstance(save_freq, bool)
    if save_freq != "epoch" and not (whole and save_freq > 0):
        raise ValueError(f"save_freq: expected 'epoch' or a number of steps >= 1, got {save_freq!r}")
    return save_freq
