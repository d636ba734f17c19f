"""What is timed on the CPU, the numbers that go in, and our side of it; `peers.py` has the others.

A case is a stack of recurrent layers at a shape, in a mode and a precision. All sides get the same numbers and hand
back a part of their result, so that a wrong kernel can't win. Each gets its own natural order of axes and gates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.process import Prepared, Unavailable

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODES = ("inference", "training", "stream")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
LEARNING_RATE, EPSILON = 1e-3, 1e-10


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        cell: "lstm", "gru" (the reset gate after the recurrent product) or "rnn" (tanh).
        mode: "inference" (a sequence, all outputs returned), "training" (a whole step of the layers and Dense(1) on
            the last output: loss, gradients, Adam's update, loss value read back) or "stream" (one time step, the
            states carried).
        T, B, I, H: time, batch, input, hidden.
        layers: how many, one on the other. both: in both directions.
        precision: "float32", "bfloat16" or "int8" (weights, inference only).
    """

    cell: str
    mode: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    both: bool = False
    precision: str = "float32"

    @property
    def label(self) -> str:
        several = f" x{self.layers}" if self.layers > 1 else ""
        return f"{self.T},{self.B},{self.I},{self.H}{several}{' bi' if self.both else ''}"

    @property
    def inputs(self) -> list[int]:
        """The width of each layer's input."""
        return [self.I] + [self.H * (1 + self.both)] * (self.layers - 1)

    @property
    def flops(self) -> float:
        """Multiply-adds of the products, times two. A training step counts three products for one, but needs no
        gradient of the first layer's input."""
        each = 2 * self.T * self.B * GATES[self.cell] * self.H * (1 + self.both)
        forward = each * sum(width + self.H for width in self.inputs)
        return forward if self.mode != "training" else 3 * forward - each * self.I

    @property
    def weight_bytes(self) -> float:
        """Size of one recurrent matrix, which every step reads."""
        return GATES[self.cell] * self.H * self.H * BYTES[self.precision]

    @property
    def traffic(self) -> float:
        """Bytes of recurrent weights that a call reads if nothing stays in registers: each step once, in training
        once more on the way back."""
        passes = 2 if self.mode == "training" else 1
        return passes * self.T * self.layers * (1 + self.both) * self.weight_bytes


@dataclass
class Numbers:
    """Input (B, T, I), targets (B, 1), the weights of Dense(1), and of each layer and direction in turn kernel,
    recurrent kernel and bias, in PyTorch's and our order of gates: LSTM i f g o, GRU r z n."""

    x: np.ndarray
    target: np.ndarray
    dense: np.ndarray
    layers: list[list[np.ndarray]]


def numbers(case: Case) -> Numbers:
    draw = np.random.default_rng(0)
    width, scale = GATES[case.cell] * case.H, case.H**-0.5

    def uniform(*shape: int) -> np.ndarray:
        return draw.uniform(-scale, scale, shape).astype(np.float32)

    # a GRU has one bias for the input's part and one for the recurrent part
    bias = (2, width) if case.cell == "gru" else (width,)
    layers = [
        [uniform(n, width), uniform(case.H, width), uniform(*bias)]
        for n in case.inputs
        for _ in range(1 + case.both)
    ]
    return Numbers(
        draw.standard_normal((case.B, case.T, case.I), np.float32),
        draw.standard_normal((case.B, 1), np.float32),
        uniform(case.H * (1 + case.both), 1),
        layers,
    )


def reordered(case: Case, weights: list[np.ndarray], order: str) -> list[np.ndarray]:
    """A layer's arrays with the gates, last axis, in another order: "zrh" for a GRU, "iofc" for an LSTM."""
    mine = {"lstm": "ifco", "gru": "rzh", "rnn": "h"}[case.cell]
    if len(order) != len(mine):
        raise ValueError(f"order: expected {len(mine)} gates of {mine}, got {order!r}")
    columns = np.concatenate([np.arange(case.H) + mine.index(gate) * case.H for gate in order])
    return [np.ascontiguousarray(w[..., columns]) for w in weights]


def losses(step: Callable[[], float]) -> Callable[[], np.ndarray]:
    """Two steps' losses: the second tells whether gradients and updates are right."""
    return lambda: np.array([step() for _ in range(2)])


# ------------------------------------------------------------------------------------------------- ours


def our_model(case: Case, n: Numbers) -> Any:
    """The case as a Sequential with its weights."""
    import numlstm as nl

    kind = {"lstm": nl.LSTM, "gru": nl.GRU, "rnn": nl.SimpleRNN}[case.cell]
    training = case.mode == "training"
    model = nl.Sequential()
    for k in range(case.layers):
        # what is streamed or returned whole keeps its time axis; Dense(1) takes the last output
        layer = kind(case.H, return_sequences=not training or k < case.layers - 1)
        model.add(nl.Bidirectional(layer) if case.both else layer)
    weights = [w for layer in n.layers for w in layer]
    if training:
        model.add(nl.Dense(1))
        weights += [n.dense, np.zeros(1, np.float32)]
    model.build((None, case.T, case.I))
    model.set_weights(weights)
    return model


def ours(case: Case) -> Prepared:
    """numlstm through its public layers and models, as a user's program runs it."""
    import numlstm as nl

    n = numbers(case)
    model = our_model(case, n)
    if case.precision == "bfloat16" or case.mode == "training":
        optimizer = nl.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON)
        try:
            model.compile(optimizer, "mse", precision=case.precision)
        except ValueError as error:
            if case.precision == "bfloat16" and "not available" in str(error):
                raise Unavailable(str(error)) from None
            raise
    if case.precision == "int8":
        if not hasattr(model, "quantize"):
            raise Unavailable("model.quantize is not there yet")
        model = model.quantize("int8")
    if case.mode == "training":
        step = lambda: float(model.train_on_batch(n.x, n.target))
        return Prepared(step, losses(step))
    if case.mode == "stream":
        stream, x = model.stream(case.B), n.x[:, 0].copy()
        return Prepared(lambda: stream.step(x), lambda: several_steps(lambda: stream.step(x), stream.reset))
    # a layer is called as such, here as with the peers
    called = model.layers[0] if len(model.layers) == 1 else model
    if case.precision != "bfloat16":
        infer = lambda: called(n.x)
    elif "precision" in inspect.signature(nl.use_backend).parameters:

        def infer() -> Any:
            with nl.use_backend(None, precision="bfloat16"):
                return called(n.x)

    else:
        infer = lambda: nl.Tensor(model.predict_on_batch(n.x))  # the one way in which the precision holds
    return Prepared(infer, lambda: infer().numpy()[:, -1])


def several_steps(step: Callable[[], Any], reset: Callable[[], Any]) -> np.ndarray:
    """The output (B, H) after four streamed steps from zero states."""
    reset()
    for _ in range(4):
        y = step()
    return np.asarray(y, np.float32)


def ours_kernel(case: Case) -> Prepared:
    """The native call below `stream.step`, without the check of the input and the copies in and out."""
    n = numbers(case)
    stream, x = our_model(case, n).stream(case.B), n.x[:, 0].copy()
    stack = getattr(stream, "_whole", None)  # not public: nobody but this comparison needs it by itself
    if stack is None:
        raise Unavailable("this stream's layers are not one native call")
    return Prepared(stack.run, lambda: several_steps(lambda: stream.step(x), stream.reset))
