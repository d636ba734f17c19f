"""What a callback is, how `fit` calls several, and the two that everyone uses: the history and a few functions."""

from collections.abc import Callable as Function
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numlstm.progress import figure_text, html_table

Logs = dict[str, Any]


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
    comes_last = False  # it keeps what the others noted, and brings it back after these have started anew
    companions: Sequence["Callback"] = ()  # of one that comes last: the others

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
        self.callbacks.sort(key=lambda callback: callback.comes_last)
        others = [c for c in self.callbacks if not c.comes_last]
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

    def __rich__(self) -> Any:
        """What `rich.print(history)` shows: the first epoch, the best, and the last."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        heading, rows = self._chosen()
        table = Table(title=f"{len(self.epoch)} epochs", box=box.SIMPLE_HEAD, title_justify="left")
        for k, name in enumerate(heading):
            table.add_column(escape(name), justify="left" if k == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        return table

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        heading, rows = self._chosen()
        return html_table(f"{len(self.epoch)} epochs", heading, rows)

    def _chosen(self) -> tuple[list[str], list[list[str]]]:
        """A heading and rows of text: first and last epoch, and that of the lowest (validation) loss."""
        heading = ["Epoch", *self.history]
        chosen = {}
        if self.epoch:
            chosen = {0: "first", len(self.epoch) - 1: "last"}
            losses = self.history.get("val_loss") or self.history.get("loss") or []
            if len(losses) == len(self.epoch):
                chosen[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))] = "best"
        rows = []
        for k in sorted(chosen):
            # a figure that came later, or not in every epoch, can't be told its epoch
            values = [v[k] if len(v) == len(self.epoch) else "" for v in self.history.values()]
            rows.append(
                [f"{self.epoch[k] + 1} ({chosen[k]})", *(v if v == "" else figure_text(v) for v in values)]
            )
        return heading, rows

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

    functions: dict[str, Function[..., Any]]

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


def steps_or_epoch(argument: str, value: Any) -> Any:
    """ "epoch", or a number of steps. Raises ValueError naming the argument."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "epoch" and not (whole and value > 0):
        raise ValueError(f"{argument}: expected 'epoch' or a number of steps >= 1, got {value!r}")
    return value
