"""What a person sees while a model trains: a bar on a terminal, plain lines elsewhere, nothing when silent.

`progress(verbose, ...)` picks one of three objects with the same four methods: `begin` and `end` around an
epoch, `step` after each batch, `close` at the end, whatever happened. A step costs two comparisons unless it
is time to redraw. rich is imported only when there is a terminal to draw on.
"""

import html
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Bar", "Lines", "Silent", "figure_text", "format_logs", "html_table", "progress"]

Logs = Mapping[str, Any]

_REFRESH = 0.1  # seconds between two drawings of the bar


class Silent:
    """Shows nothing: `verbose=0`, and the base of the other two."""

    def begin(self, title: str, total: int | None) -> None:
        """An epoch of `total` steps (None: unknown) starts."""

    def step(self, done: int, logs: Callable[[], Logs]) -> None:
        """`done` steps are finished; `logs()` gives the figures so far, and is called only when they are
        shown."""

    def end(self, logs: Logs) -> None:
        """The epoch is over; its figures."""

    def close(self) -> None:
        """Nothing more will come. May be called twice."""


class Lines(Silent):
    """One line an epoch, when it is over: for logs, pipes and `verbose=2`.

    >>> lines = Lines()
    >>> lines.begin("Epoch 1/2", 4)
    >>> lines.end({"loss": 0.5})  # doctest: +ELLIPSIS
    Epoch 1/2 - ...s - loss: 0.5000
    """

    title: str
    start: float

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream

    def begin(self, title: str, total: int | None) -> None:
        self.title, self.start = title, time.perf_counter()

    def end(self, logs: Logs) -> None:
        seconds = time.perf_counter() - self.start
        print(epoch_line(self.title, seconds, logs), file=self.stream or sys.stdout, flush=True)


class Bar(Silent):
    """A live bar with steps, time left and figures; each finished epoch leaves its line above it."""

    title: str
    start: float

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.display: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=console or Console(),
            auto_refresh=False,  # a thread of its own would take the interpreter from training
            transient=True,
        )
        self.task: Any = None
        self.next: float = 0.0

    def begin(self, title: str, total: int | None) -> None:
        if self.task is None:
            self.display.start()
        else:
            self.display.remove_task(self.task)
        self.task = self.display.add_task(title, total=total, figures="")
        self.title, self.start, self.next = title, time.perf_counter(), 0.0

    def step(self, done: int, logs: Callable[[], Logs]) -> None:
        now = time.perf_counter()
        if now < self.next:
            return
        self.next = now + _REFRESH
        self.display.update(self.task, completed=done, figures=format_logs(logs()), refresh=True)

    def end(self, logs: Logs) -> None:
        self.display.console.print(
            epoch_line(self.title, time.perf_counter() - self.start, logs), markup=False, highlight=False
        )

    def close(self) -> None:
        if self.task is not None:
            self.display.stop()


def progress(verbose: int | str, *, quiet_off_terminal: bool = False) -> Silent:
    """The display for `verbose`: 0 none, 1 or "auto" a bar on a terminal and lines elsewhere, 2 always lines.

    `quiet_off_terminal`: with "auto", nothing rather than lines where there is no terminal.

    Raises ValueError for another value.

    >>> type(progress(0)).__name__, type(progress(2)).__name__
    ('Silent', 'Lines')
    """
    if verbose not in (0, 1, 2, "auto") or isinstance(verbose, float):
        raise ValueError(f"verbose: expected 0, 1, 2 or 'auto', got {verbose!r}")
    if verbose == 0:
        return Silent()
    if verbose == 2:
        return Lines()
    if _on_terminal():
        return Bar()
    return Silent() if quiet_off_terminal and verbose == "auto" else Lines()


def _on_terminal() -> bool:
    return bool(getattr(sys.stdout, "isatty", lambda: False)())


def epoch_line(title: str, seconds: float, logs: Logs) -> str:
    """`Epoch 3/10 - 1.2s - loss: 0.1234 - val_loss: 0.2345`."""
    return " - ".join(part for part in (title, f"{seconds:.1f}s", format_logs(logs)) if part)


def format_logs(logs: Logs) -> str:
    """`loss: 0.1234 - learning_rate: 1.0000e-05`, as Keras writes it.

    >>> format_logs({"loss": 0.12344, "learning_rate": 1e-5, "precision": [0.5, 0.25]})
    'loss: 0.1234 - learning_rate: 1.0000e-05 - precision: [0.5, 0.25]'
    """
    return " - ".join(f"{name}: {figure_text(value)}" for name, value in logs.items())


def figure_text(value: Any) -> str:
    """A figure for people: four digits after the point, or in powers of ten where that would show none.

    >>> figure_text(0.12344), figure_text(1e-5), figure_text([1, 2])
    ('0.1234', '1.0000e-05', '[1, 2]')
    """
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 or value != value else f"{value:.4e}"


def html_table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]], notes: str = "") -> str:
    """A table for a notebook, the first column to the left and all others to the right; every text is escaped.

    >>> html_table("<Model>", ["Layer"], [["a & b"]]).count("&lt;Model&gt;")
    1
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        sides = ("left", *("right",) * (len(texts) - 1))
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(str(text))}</{tag}>'
            for side, text in zip(sides, texts, strict=True)
        )

    head = f"<thead><tr>{cells('th', heading)}</tr></thead>"
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    caption = f'<caption style="text-align: left">{html.escape(title)}</caption>'
    below = f"<p>{html.escape(notes)}</p>" if notes else ""
    return f"<div><table>{caption}{head}<tbody>{body}</tbody></table>{below}</div>"
