"""What each side of the CPU comparison runs, and the process it runs in.

Each contender lives in a process of its own, started once, told over a pipe what to time, silent in between:
no shared allocator, no shared OpenMP runtime, and `settle()` before the answer makes sure that none of its
threads spins on into the other's turn. A case is (cell, mode, T, B, I, H): one recurrent layer over a
sequence, all outputs returned. Both sides get the same numbers and hand back a part of their result, so that
a wrong kernel can't win. Each side gets its own natural order of axes: PyTorch (T, B, I), numlstm (B, T, I).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Window, measure, settle

GATES = {"lstm": 4, "rnn": 1}
MODES = ("inference", "training", "adam step")


@dataclass(frozen=True)
class Case:
    """One thing to time. `mode`: "inference", "training" (forward and backward) or "adam step" (a whole
    training step of the layer and Dense(1): loss, gradients, update, loss value read back)."""

    cell: str
    mode: str
    T: int
    B: int
    I: int
    H: int

    @property
    def label(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H}"

    @property
    def flops(self) -> float:
        """Multiply-adds of the products, times two; a training step counts three products for one."""
        forward = 2 * self.T * self.B * GATES[self.cell] * self.H * (self.I + self.H)
        return forward * (1 if self.mode == "inference" else 3)


@dataclass
class Numbers:
    """The case's input (B, T, I), weights in Keras' layout, upstream gradient (B, T, H), targets (B, 1)."""

    x: np.ndarray
    kernel: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray
    dy: np.ndarray
    dense: np.ndarray
    target: np.ndarray


def numbers(case: Case) -> Numbers:
    draw = np.random.default_rng(0)
    width, scale = GATES[case.cell] * case.H, case.H**-0.5

    def uniform(*shape: int) -> np.ndarray:
        return draw.uniform(-scale, scale, shape).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32)

    return Numbers(
        normal(case.B, case.T, case.I),
        uniform(case.I, width),
        uniform(case.H, width),
        uniform(width),
        normal(case.B, case.T, case.H) / np.float32(case.T * case.B),
        uniform(case.H, 1),
        normal(case.B, 1),
    )


# a contender's case: what to time, and a part of its result for the comparison
Prepared = tuple[Callable[[], Any], Callable[[], np.ndarray]]


def ours(case: Case, threads: int) -> Prepared:
    """numlstm through its public layers, as a user's program runs it."""
    import numlstm as nl
    from numlstm.kernels.cpu.threads import set_num_threads

    set_num_threads(threads)
    n = numbers(case)
    kind = {"lstm": nl.LSTM, "rnn": nl.SimpleRNN}[case.cell]
    if case.mode == "adam step":
        model = nl.Sequential([kind(case.H, input_shape=(case.T, case.I)), nl.Dense(1)])
        model.compile(optimizer="adam", loss="mse")
        model.set_weights([n.kernel, n.recurrent, n.bias, n.dense, np.zeros(1, np.float32)])
        first = float(np.asarray(model.train_on_batch(n.x, n.target)).ravel()[0])
        return lambda: model.train_on_batch(n.x, n.target), lambda: np.array([first])
    layer = kind(case.H, return_sequences=True, input_shape=(case.T, case.I))
    layer.build((None, case.T, case.I))
    layer.set_weights([n.kernel, n.recurrent, n.bias])
    if case.mode == "inference":
        return lambda: layer(n.x), lambda: np.asarray(layer(n.x).numpy())[:, -1]
    x = nl.Variable(n.x)
    sources = [x, *layer.trainable_weights]

    def step() -> list[Any]:
        with nl.GradientTape() as tape:
            y = layer(x, training=True)
        return tape.gradient(y, sources, output_gradient=n.dy)

    return step, lambda: np.asarray(step()[2])


def torch(case: Case, threads: int) -> Prepared:
    """PyTorch's own layer, time-major (its fastest order), in inference mode where no gradient is asked."""
    import torch as pt

    pt.set_num_threads(threads)
    n = numbers(case)
    layer = {"lstm": pt.nn.LSTM, "rnn": pt.nn.RNN}[case.cell](case.I, case.H)
    with pt.no_grad():
        layer.weight_ih_l0.copy_(pt.from_numpy(n.kernel.T.copy()))
        layer.weight_hh_l0.copy_(pt.from_numpy(n.recurrent.T.copy()))
        layer.bias_ih_l0.copy_(pt.from_numpy(n.bias))
        layer.bias_hh_l0.zero_()
    x = pt.from_numpy(n.x.transpose(1, 0, 2).copy())
    if case.mode == "adam step":
        dense = pt.nn.Linear(case.H, 1)
        with pt.no_grad():
            dense.weight.copy_(pt.from_numpy(n.dense.T.copy()))
            dense.bias.zero_()
        parameters = [*layer.parameters(), *dense.parameters()]
        optimizer = pt.optim.Adam(parameters, lr=1e-3, eps=1e-7)
        target = pt.from_numpy(n.target)

        def update() -> float:
            optimizer.zero_grad()
            loss = pt.nn.functional.mse_loss(dense(layer(x)[0][-1]), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        first = update()
        return update, lambda: np.array([first])
    if case.mode == "inference":
        layer.eval()

        def infer() -> Any:
            with pt.inference_mode():
                return layer(x)[0]

        return infer, lambda: infer()[-1].numpy()
    x.requires_grad_(True)
    dy = pt.from_numpy(n.dy.transpose(1, 0, 2).copy())

    def step() -> Any:
        layer.zero_grad()
        x.grad = None
        layer(x)[0].backward(dy)
        return layer.weight_hh_l0.grad

    return step, lambda: step().numpy().T


SIDES = {"ours": ours, "torch": torch}

# --------------------------------------------------------------------------------------- the process


def serve(pipe: Any, side: str, threads: int) -> None:
    """Answer ("prepare", case) with a part of the result, ("measure", seconds) with a Window, until None."""
    call: Callable[[], Any] = lambda: None
    while (message := pipe.recv()) is not None:
        what, value = message
        try:
            if what == "prepare":
                call, result = SIDES[side](value, threads)
                answer: Any = np.array(result())  # the first call compiles; it is never timed
                call()
            else:
                answer = measure(call, value)
            settle()
        except Exception as error:
            answer = RuntimeError(f"{side}: {type(error).__name__}: {error}")
        pipe.send(answer)


class Worker:
    """A contender's process. Use it as a context manager; `prepare` a case, then `take` windows."""

    def __init__(self, side: str, threads: int, window: float = 0.06) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.window = window
        self.process = context.Process(target=serve, args=(theirs, side, threads), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(10)

    def _ask(self, what: str, value: Any) -> Any:
        self.pipe.send((what, value))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def prepare(self, case: Case) -> np.ndarray:
        return self._ask("prepare", case)

    def take(self) -> Window:
        return self._ask("measure", self.window)
