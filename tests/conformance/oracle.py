"""What the PyTorch oracle is asked, and how an answer is kept: shared by the recorder and by the tests.

Inputs come from a NumPy seed, so that only answers are stored; of a large array a digest is kept: 64 of its
entries at places drawn from a seed, its sum, and its Euclidean norm. Arrays are batch-major, (B, T, .), and
weights are in Keras' layout, (I, G H), gates in the order i f g o, which is PyTorch's order transposed.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ANSWERS = Path(__file__).with_name("torch.npz")
GATES = {"lstm": 4, "rnn_tanh": 1, "rnn_relu": 1}
STATES = {"lstm": 2, "rnn_tanh": 1, "rnn_relu": 1}


class Sequence(NamedTuple):
    """One recurrent question. `pattern`: every step valid ("full"), a valid prefix a row ("lengths", the last
    row empty), or any steps ("holes", the first row empty)."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.cell}-T{self.T}-B{self.B}-I{self.I}-H{self.H}-{self.pattern}"


# ten LSTM shapes of odd sizes: units 1, 7, 50, 193; batch 1, 3, 33; time 1, 2, 500
SEQUENCES = [
    Sequence("lstm", 1, 1, 1, 1, "full"),
    Sequence("lstm", 2, 3, 5, 7, "full"),
    Sequence("lstm", 500, 1, 2, 7, "full"),
    Sequence("lstm", 20, 33, 1, 50, "full"),
    Sequence("lstm", 2, 33, 17, 193, "full"),
    Sequence("lstm", 17, 3, 4, 50, "lengths"),
    Sequence("lstm", 9, 33, 3, 7, "holes"),
    Sequence("lstm", 31, 3, 2, 1, "holes"),
    Sequence("lstm", 500, 3, 1, 1, "lengths"),
    Sequence("lstm", 12, 3, 6, 193, "holes"),
    Sequence("rnn_tanh", 20, 33, 1, 50, "full"),
    Sequence("rnn_tanh", 9, 3, 3, 7, "holes"),
    Sequence("rnn_tanh", 500, 1, 2, 1, "full"),
    Sequence("rnn_relu", 6, 3, 4, 193, "lengths"),
    Sequence("rnn_relu", 2, 1, 3, 7, "full"),
]


def generator(name: str) -> np.random.Generator:
    """The random numbers of one question, from its name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def mask_of(pattern: str, draw: np.random.Generator, B: int, T: int) -> np.ndarray | None:
    """Which steps are valid, (B, T), or None for all."""
    if pattern == "full":
        return None
    if pattern == "lengths":
        lengths = draw.integers(1, T + 1, B)
        lengths[-1] = 0
        return np.arange(T) < lengths[:, None]
    mask = draw.random((B, T)) < 0.6
    mask[0] = False
    return mask


def inputs(s: Sequence) -> dict[str, Any]:
    """Input, weights, initial states, mask, and the upstream gradients of outputs and last states."""
    draw = generator(s.name)
    width, scale = GATES[s.cell] * s.H, s.H**-0.5
    return {
        "x": draw.standard_normal((s.B, s.T, s.I)),
        "kernel": draw.uniform(-1, 1, (s.I, width)) * scale,
        "recurrent_kernel": draw.uniform(-1, 1, (s.H, width)) * scale,
        "bias": draw.uniform(-1, 1, width) * scale,
        "state": [draw.standard_normal((s.B, s.H)) * 0.5 for _ in range(STATES[s.cell])],
        "mask": mask_of(s.pattern, draw, s.B, s.T),
        "dy": draw.standard_normal((s.B, s.T, s.H)),
        "dfinal": [draw.standard_normal((s.B, s.H)) for _ in range(STATES[s.cell])],
    }


ELEMENTS = {  # name of the element-wise function here -> expression over torch
    "tanh": "torch.tanh(x)",
    "sigmoid": "torch.sigmoid(x)",
    "relu": "F.relu(x)",
    "leaky_relu": "F.leaky_relu(x, 0.2)",
    "elu": "F.elu(x)",
    "selu": "F.selu(x)",
    "gelu": "F.gelu(x)",
    "silu": "F.silu(x)",
    "softplus": "F.softplus(x)",
    "softsign": "F.softsign(x)",
    "hard_sigmoid": "torch.clamp(x / 6 + 0.5, 0, 1)",  # F.hardsigmoid rounds 1/6 to float32
    "softmax": "F.softmax(x, -1)",
    "log_softmax": "F.log_softmax(x, -1)",
    "exp": "torch.exp(x)",
}

# losses: name here, options here, expression over torch of prediction p and target t
LOSSES = [
    ("mse", {}, "F.mse_loss(p, t)"),
    ("mae", {}, "F.l1_loss(p, t)"),
    ("huber", {}, "F.huber_loss(p, t)"),
    ("binary_crossentropy", {"from_logits": True}, "F.binary_cross_entropy_with_logits(p, (t > 0).double())"),
    ("categorical_crossentropy", {"from_logits": True}, "F.cross_entropy(p, F.softmax(t, -1))"),
    ("sparse_categorical_crossentropy", {"from_logits": True}, "F.cross_entropy(p, t.argmax(-1))"),
    ("categorical_crossentropy", {"from_logits": True, "label_smoothing": 0.1},
     "F.cross_entropy(p, F.softmax(t, -1), label_smoothing=0.1)"),
    ("kl_divergence", {}, "F.kl_div(F.log_softmax(p, -1), F.softmax(t, -1), reduction='batchmean')"),
    ("cosine_similarity", {}, "-F.cosine_similarity(p, t, dim=-1).mean()"),
]  # fmt: skip

OPTIMIZERS = [  # class and options here, class and options of torch.optim
    ("SGD", {"learning_rate": 0.1}, "SGD", {"lr": 0.1}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9}, "SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
     "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"learning_rate": 0.01}, "RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-7}),
    ("RMSprop", {"learning_rate": 0.01, "momentum": 0.5},
     "RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-7, "momentum": 0.5}),
    ("RMSprop", {"learning_rate": 0.01, "centered": True},
     "RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-7, "centered": True}),
    ("Adam", {"learning_rate": 0.01}, "Adam", {"lr": 0.01, "eps": 1e-7}),
    ("Adam", {"learning_rate": 0.01, "amsgrad": True}, "Adam", {"lr": 0.01, "eps": 1e-7, "amsgrad": True}),
    ("AdamW", {"learning_rate": 0.01, "weight_decay": 0.1},
     "AdamW", {"lr": 0.01, "eps": 1e-7, "weight_decay": 0.1}),
]  # fmt: skip


def label(name: str, options: dict[str, Any]) -> str:
    return "-".join([name, *(f"{k}={v}" for k, v in options.items())])


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and targets of a loss question, (6, 5)."""
    draw = generator(name)
    return draw.standard_normal((6, 5)) * 2, draw.standard_normal((6, 5))


def descent(name: str) -> tuple[np.ndarray, np.ndarray]:
    """First weights (7,), and the gradients of ten updates (10, 7)."""
    draw = generator(name)
    return draw.standard_normal(7), draw.standard_normal((10, 7)) + 0.5


# Keras adds Adam's epsilon before the bias correction, PyTorch after it: small enough, it matters to neither
EPSILON = 1e-10


def training() -> dict[str, np.ndarray]:
    """Data and first weights of a small regression: LSTM(8) and Dense(1) over (16, 12, 3)."""
    draw = generator("training")
    return {
        "x": draw.standard_normal((16, 12, 3)),
        "y": draw.standard_normal((16, 1)),
        "kernel": draw.uniform(-0.4, 0.4, (3, 32)),
        "recurrent_kernel": draw.uniform(-0.4, 0.4, (8, 32)),
        "bias": draw.uniform(-0.4, 0.4, 32),
        "dense": draw.uniform(-0.4, 0.4, (8, 1)),
    }


def digest(a: np.ndarray) -> np.ndarray:
    """`a` itself, flat, when small; else 64 of its entries, its sum and its norm."""
    flat = np.asarray(a, np.float64).ravel()
    if flat.size <= 66:
        return flat
    places = np.random.default_rng(flat.size).choice(flat.size, 64, replace=False)
    return np.concatenate([flat[places], [flat.sum(), np.sqrt((flat**2).sum())]])


def error(ours: np.ndarray, answer: np.ndarray) -> float:
    """Largest difference of the digests over the oracle's largest value (its norm, for the sum)."""
    ours = digest(ours)
    assert ours.shape == answer.shape, (ours.shape, answer.shape)
    difference = np.abs(ours - answer)
    scale = np.max(np.abs(answer[:64]), initial=1e-30)
    worst = difference[:64].max() / scale
    if answer.size > 64:  # sum and norm
        worst = max(worst, difference[64:].max() / max(answer[-1], 1e-30))
    return float(worst)
