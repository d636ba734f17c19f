"""Callbacks that write down how training goes: CSV, JSON lines, TensorBoard.

Lines are written whole and are on the disk after each epoch, so that a reader never meets half of one.
"""

import csv
import functools
import io
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from numlstm.callbacks.base import Callback, Logs, steps_or_epoch
from numlstm.io.atomic import write_bytes


class CSVLogger(Callback):
    """Write the figures of each epoch as a line of a CSV file; whole lines, on the disk after each epoch.

    `append`: go on with a file that is there (its header is kept), else it is written anew.

    >>> CSVLogger("log.csv").separator
    ','
    """

    filename: Path
    separator: str
    append: bool

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
        _append(self.filename, text.getvalue())


class JSONLogger(Callback):
    """Write the figures of each epoch as a line of a file of JSON lines: {"epoch": 0, "loss": 0.5, ...}.

    JSON has no NaN and no infinity: these are null. `append`: go on with a file that is there, else it is written
    anew.

    >>> JSONLogger("log.jsonl").append
    False
    """

    filename: Path
    append: bool

    def __init__(self, filename: str | os.PathLike[str], append: bool = False) -> None:
        self.filename, self.append = Path(filename), append

    def on_train_begin(self, logs: Logs) -> None:
        if not (self.append and self.filename.exists()):
            write_bytes(self.filename, b"")

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        figures = {"epoch": epoch, **{name: _json_able(value) for name, value in logs.items()}}
        _append(self.filename, json.dumps(figures, ensure_ascii=False, allow_nan=False) + "\n")


class TensorBoard(Callback):
    """Write the run for TensorBoard: figures, and histograms of the weights if asked for.

    As Keras does, in two folders of `log_dir`, "train" and "validation": "epoch_loss" and the like by epoch,
    "epoch_learning_rate", and by step "batch_loss" if asked for. The files are written by the tensorboard
    package's own writer (`pip install numlstm[tensorboard]`), which is imported when training begins;
    `tensorboard --logdir logs` shows them.

    Arguments:
        log_dir: where to; each run in a folder of its own can be told from the others.
        histogram_freq: write each weight's histogram every so many epochs; 0: never.
        write_steps_per_second: also "epoch_steps_per_second".
        update_freq: "epoch", or after how many steps the running figures are written too.

    Raises:
        ImportError: the tensorboard package is not installed.
        ValueError: an impossible option.

    >>> TensorBoard("logs/first", histogram_freq=1).log_dir.name
    'first'
    """

    log_dir: Path
    histogram_freq: int

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        histogram_freq: int = 0,
        write_steps_per_second: bool = False,
        update_freq: int | Literal["epoch"] = "epoch",
    ) -> None:
        if isinstance(histogram_freq, bool) or not isinstance(histogram_freq, int) or histogram_freq < 0:
            raise ValueError(f"histogram_freq: expected a number of epochs >= 0, got {histogram_freq!r}")
        self.log_dir, self.histogram_freq = Path(log_dir), histogram_freq
        self.write_steps_per_second: bool = bool(write_steps_per_second)
        self.update_freq: int | Literal["epoch"] = steps_or_epoch("update_freq", update_freq)
        self._writers: dict[str, Any] = {}
        self._steps = 0

    def needs(self, hook: str) -> bool:
        by_step = self.update_freq != "epoch" or self.write_steps_per_second
        return super().needs(hook) and (hook != "on_train_batch_end" or by_step)

    def get_state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def set_state(self, state: Any) -> None:
        self._steps = state["steps"]

    def on_train_begin(self, logs: Logs) -> None:
        _tensorboard()  # before any work is done
        self._close()
        self._steps = 0

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._began, self._first = time.perf_counter(), self._steps

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        self._steps += 1
        if self.update_freq != "epoch" and self._steps % self.update_freq == 0:
            self._scalars("train", {f"batch_{name}": value for name, value in logs.items()}, self._steps)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        seen = {f"epoch_{n}": v for n, v in logs.items() if not n.startswith("val_")}
        validation = {f"epoch_{n.removeprefix('val_')}": v for n, v in logs.items() if n.startswith("val_")}
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if isinstance(rate, (int, float)):
            seen.setdefault("epoch_learning_rate", rate)
        if self.write_steps_per_second:
            seconds = time.perf_counter() - self._began
            seen["epoch_steps_per_second"] = (self._steps - self._first) / max(seconds, 1e-9)
        self._scalars("train", seen, epoch)
        if validation:
            self._scalars("validation", validation, epoch)
        if self.histogram_freq and epoch % self.histogram_freq == 0:
            self._histograms(epoch)
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Logs) -> None:
        self._close()

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, part: str, summary: Any, step: int) -> None:
        tensorboard = _tensorboard()
        if part not in self._writers:
            folder = self.log_dir / part
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[part] = tensorboard.EventFileWriter(str(folder))
        event = tensorboard.Event(wall_time=time.time(), step=step, summary=summary)
        self._writers[part].add_event(event)

    def _scalars(self, part: str, figures: Logs, step: int) -> None:
        for name, value in figures.items():
            for tag, number in _numbers(name, value):
                self._write(part, _tensorboard().scalar_pb(tag, number), step)

    def _histograms(self, epoch: int) -> None:
        for name, variable in self.model.named_weights().items():
            self._write("train", _tensorboard().histogram_pb(name, variable.numpy()), epoch)


@functools.cache
def _tensorboard() -> Any:
    """What is used of the tensorboard package."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(
            f"TensorBoard takes the tensorboard package ({error}): pip install 'numlstm[tensorboard]'"
        ) from None
    return SimpleNamespace(
        Event=Event, EventFileWriter=EventFileWriter, histogram_pb=histogram_pb, scalar_pb=scalar_pb
    )


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    """A figure as scalars: one, or one for each of a list (a metric by class)."""
    if isinstance(value, (int, float, np.number)):
        return [(name, float(value))]
    return [(f"{name}/{k}", float(v)) for k, v in enumerate(np.ravel(value))]


def _json_able(value: Any) -> Any:
    """A figure in the types of JSON."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_json_able(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, text: str) -> None:
    """Add whole lines to a file, and wait until they are on the disk."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(text)  # one write: a reader meets whole lines
        file.flush()
        os.fsync(file.fileno())
