"""What Keras is asked about recurrent layers, and how ours are asked the same: shared by the recorder
(record_keras.py), the recorded answers' test (test_keras_goldens.py) and the live comparison (test_keras_live.py).

Keras itself is not needed here. Inputs come from a NumPy seed, so that only answers are stored.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import numlstm as nl

ANSWERS = Path(__file__).with_name("keras.npz")
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}
ONE_WAY = "one way"
MERGE_MODES = ("concat", "sum", "mul", "ave", None)


class Question(NamedTuple):
    """One layer over one batch.

    `pattern`: every step valid ("full"), any steps ("holes", the first row empty), or no mask (""). `mode`: a
    `Bidirectional`'s merge mode, or "one way" for the layer by itself. `starts`: initial states are given.
    """

    kind: str
    T: int
    B: int
    I: int
    H: int
    pattern: str = ""
    mode: str | None = ONE_WAY
    sequences: bool = True
    backwards: bool = False
    starts: bool = False
    reset_after: bool = True

    @property
    def name(self) -> str:
        said = [self.kind, *(f"{k}{getattr(self, k)}" for k in "TBIH"), self.pattern, str(self.mode)]
        flags = [k for k in ("sequences", "backwards", "starts") if getattr(self, k)]
        before = ["before"] if self.kind == "GRU" and not self.reset_after else []
        return "-".join(filter(None, [*said, *before, *flags])).replace(" ", "_")

    @property
    def directions(self) -> int:
        return 1 if self.mode == ONE_WAY else 2

    @property
    def options(self) -> dict[str, Any]:
        """The layer's, under names that both have."""
        found = {"return_sequences": self.sequences, "return_state": True, "go_backwards": self.backwards}
        return {**found, "reset_after": self.reset_after} if self.kind == "GRU" else found


# every kind, both GRUs and every merge mode, with holes, from given states, as sequences and last outputs
QUESTIONS = [
    *(
        Question(kind, 7, 4, 3, 5, "holes", sequences=s, backwards=b, reset_after=r)
        for kind, r in (("LSTM", True), ("GRU", True), ("GRU", False), ("SimpleRNN", True))
        for s, b in ((True, False), (True, True), (False, True))
    ),
    *(
        Question(kind, 6, 3, 2, 9, "holes", starts=True, sequences=s, reset_after=r)
        for kind, r in (("LSTM", True), ("GRU", True), ("GRU", False), ("SimpleRNN", True))
        for s in (True, False)
    ),
    *(
        Question(kind, 5, 3, 2, 4, "holes", mode, sequences=s, starts=s, reset_after=r)
        for kind, r, mode in (
            ("LSTM", True, "concat"),
            ("LSTM", True, "mul"),
            ("LSTM", True, None),
            ("GRU", True, "sum"),
            ("GRU", False, "ave"),
            ("SimpleRNN", True, "concat"),
        )
        for s in (True, False)
    ),
    Question("LSTM", 25, 2, 3, 17, ""),
    Question("GRU", 25, 2, 3, 17, "", reset_after=False),
]


def inputs(q: Question) -> dict[str, Any]:
    """Everything that goes in, in double precision: weights in our layout, the gradients of what comes out."""
    draw = np.random.default_rng(zlib.crc32(q.name.encode()))
    G, twice = GATES[q.kind], q.kind == "GRU" and q.reset_after
    shapes = [(q.I, G * q.H), (q.H, G * q.H), (2, G * q.H) if twice else (G * q.H,)] * q.directions
    number = lambda *shape: draw.standard_normal(shape)
    given = {
        "x": number(q.B, q.T, q.I),
        "weights": [number(*shape) / np.sqrt(shape[0] if len(shape) > 1 else 2) for shape in shapes],
        "mask": None,
        "states": [number(q.B, q.H) for _ in range(STATES[q.kind] * q.directions)],
        "dstates": [number(q.B, q.H) for _ in range(STATES[q.kind] * q.directions)],
    }
    if q.pattern:
        given["mask"] = draw.random((q.B, q.T)) < 0.6
        given["mask"][0] = False
    wide = 2 * q.H if q.mode == "concat" else q.H
    outputs = 2 if q.mode is None else 1
    shape = (q.B, q.T, wide) if q.sequences else (q.B, wide)
    counts = compared(q, given["mask"])
    given["doutputs"] = [number(*shape) * counts for _ in range(outputs)]
    return given


def compared(q: Question, mask: np.ndarray | None) -> np.ndarray:
    """1 where the outputs must be the same, 0 where they mean to differ: in steps before a row's first valid one, of
    a layer that was given initial states, Keras' output is zero and ours the state, as everywhere else."""
    if not q.starts or mask is None:
        return np.ones(1)
    if not q.sequences:
        return mask.any(axis=1)[:, None].astype(float)
    if q.mode != ONE_WAY:
        return np.ones(1)  # a Bidirectional's outputs are zero wherever the mask is
    read = mask[:, ::-1] if q.backwards else mask
    return np.logical_or.accumulate(read, axis=1)[..., None].astype(float)


def our_layer(q: Question, dtype: Any) -> nl.layers.Layer:
    """Not built."""
    layer = getattr(nl, q.kind)(q.H, **q.options, dtype=dtype)
    return layer if q.mode == ONE_WAY else nl.Bidirectional(layer, q.mode)


def ours(q: Question, given: dict[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    """Outputs, last states, and the gradients of all that went in."""
    layer = our_layer(q, dtype)
    layer.build((None, q.T, q.I))
    layer.set_weights(given["weights"])
    x = nl.Variable(given["x"].astype(dtype))
    states = [nl.Variable(s.astype(dtype)) for s in given["states"]] if q.starts else []
    with nl.GradientTape() as tape:
        results = layer(x, initial_state=states or None, mask=given["mask"])
        loss = 0.0
        for result, d in zip(results, given["doutputs"] + given["dstates"], strict=True):
            loss = loss + (result * d.astype(dtype)).sum()
    gradients = tape.gradient(loss, [x, *layer.weights, *states])
    return answers(q, given, [r.numpy() for r in results], [np.asarray(g) for g in gradients])


def answers(q: Question, given: dict, results: list, gradients: list) -> dict[str, np.ndarray]:
    """Under names. `gradients`: of x, the weights and, where there were any, the initial states."""
    outputs, counts = len(given["doutputs"]), compared(q, given["mask"])
    found = {f"output{k}": y * counts for k, y in enumerate(results[:outputs])}
    found |= {f"state{k}": y for k, y in enumerate(results[outputs:])}
    weights = len(given["weights"])
    names = [
        "dx",
        *(f"dweight{k}" for k in range(weights)),
        *(f"dstate{k}" for k in range(len(given["states"]))),
    ]
    return found | dict(zip(names[: len(gradients)], gradients, strict=True))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """The largest error, relative to the largest number of what it should be (0.1 where all are smaller)."""
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 0.1))
