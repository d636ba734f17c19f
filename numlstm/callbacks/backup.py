"""A training run that survives an interruption."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from numlstm import random
from numlstm.backend import to_numpy
from numlstm.callbacks.base import Callback, Logs, steps_or_epoch
from numlstm.io.atomic import write_bytes


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

    comes_last = True

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        delete_checkpoint: bool = True,
    ) -> None:
        if not os.fspath(backup_dir):
            raise ValueError("backup_dir: got an empty path, expected a folder")
        self.path: Path = Path(backup_dir) / "backup.safetensors"
        self.save_freq: int | Literal["epoch"] = steps_or_epoch("save_freq", save_freq)
        self.delete_checkpoint = delete_checkpoint
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
            arrays |= {f"state.{i}.{j}": to_numpy(s) for j, s in enumerate(layer.states or ())}
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
