"""What a person sees: lines off a terminal, a bar on one, in numbers of steps; closed whatever happens."""

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

import numlstm as nl
from numlstm import callbacks, progress

X = np.random.default_rng(0).normal(size=(12, 4, 2)).astype(np.float32)
Y = X[:, -1, :1]


def model():
    nl.set_seed(0)
    made = nl.Sequential([nl.LSTM(3, input_shape=(4, 2)), nl.Dense(1)])
    made.compile("sgd", "mse", metrics=["mae"])
    return made


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_line_an_epoch_off_a_terminal(capsys):
    model().fit(X, Y, epochs=2, validation_data=(X, Y))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    figures = " - ".join(rf"{n}: \d\.\d{{4}}" for n in ("loss", "mae", "val_loss", "val_mae"))
    assert re.fullmatch(rf"Epoch 1/2 - \d+\.\ds - {figures}", lines[0])


def test_silence_and_evaluation(capsys):
    made = model()
    made.fit(X, Y, verbose=0)
    made.evaluate(X, Y, verbose=0)
    made.predict(X)
    assert capsys.readouterr().out == ""
    made.evaluate(X, Y)
    assert re.fullmatch(r"\d\.\ds - loss: .* - mae: .*\n", capsys.readouterr().out)


def test_a_bar_on_a_terminal_counts_chunks(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(progress, "_REFRESH", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    made = model()
    made.fit(X, Y, epochs=2, batch_size=6, bptt_steps=1)
    shown = screen.getvalue()
    assert "3/8" in shown  # two batches of four chunks
    assert "8/8" in shown
    assert "loss: " in shown
    assert re.search(r"Epoch 2/2 - \d", shown)
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


def test_the_bar_is_closed_after_an_exception(monkeypatch):
    opened = []

    class Watched(progress.Bar):
        def __init__(self):
            super().__init__(Console(file=io.StringIO(), force_terminal=True))
            opened.append(self)

    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setattr(progress, "Bar", Watched)

    def stop(batch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model().fit(X, Y, callbacks=[callbacks.LambdaCallback(on_train_batch_end=stop)])
    assert not opened[0].display.live.is_started
    with pytest.raises(ValueError, match="targets of shape"):
        model().fit(X, Y[:, [0, 0]])
    assert not opened[1].display.live.is_started


def test_a_bar_without_a_known_end(monkeypatch):
    bar = progress.Bar(Console(file=io.StringIO(), force_terminal=True))
    bar.begin("Epoch 1/1", None)
    bar.step(3, lambda: {"loss": 0.5})
    bar.end({"loss": 0.5})
    bar.close()
    bar.close()
    assert "loss: 0.5000" in bar.display.console.file.getvalue()


def test_figures_are_not_computed_unless_shown():
    silent = progress.progress(0)
    silent.begin("x", 3)
    silent.step(1, lambda: pytest.fail("asked for figures"))
    silent.end({})
    silent.close()


@pytest.mark.parametrize("verbose", [3, -1, "yes", 1.0, None])
def test_other_values_are_refused(verbose):
    with pytest.raises(ValueError, match="verbose: expected 0, 1, 2 or 'auto'"):
        progress.progress(verbose)
