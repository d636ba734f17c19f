"""The layers that benchmarks.gpu measures, ours and PyTorch's, and how time is taken on a device.

Everything here works on the arrays of the CUDA backend, CuPy's on a device and NumPy's in the simulator, through the
backend's sequences: time-major arrays, what a layer computes and nothing around it. PyTorch's side is `nn.LSTM` and `nn.GRU`
on arrays of the same shapes, time-major too, so that cuDNN is not charged for a transposition. CuPy and PyTorch both work on
the legacy default stream, in order.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from numlstm import backend as backends
from numlstm.kernels import cells

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
SHAPES = [  # T, B, H; as many inputs as units
    (100, 64, 256), (512, 32, 512), (1000, 1, 1024), (256, 128, 1024), (128, 64, 2048), (1024, 16, 768), (200, 20, 650),
    (784, 128, 128),
]  # fmt: skip
TINY = [(3, 2, 5)]
OPTION_SHAPES, OPTION_PRECISIONS = [(512, 32, 512), (100, 64, 256)], ("bfloat16", "float32")
PROTOCOL_SHAPE, CORRECT_SHAPE = (TINY[0], TINY[0]) if SIMULATED else ((64, 16, 512), (24, 9, 200))
PRECISIONS = ("float32", "tf32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 4e-2}  # of the largest value, against float64
REPEATS, IDENTICAL = (2, 2) if SIMULATED else (1000, 100)
EXCHANGE = 0.7e-6  # seconds: the hardest assumption for one exchange between blocks
FLASHRNN = {
    "forward": 4.87,
    "training": 13.61,
}  # ms at (1024, 16, 768) in bf16 on an H100: its README's figure, "fused"


def cuda(precision: str = "float32") -> Any:
    """The backend "cuda" for products of a precision."""
    with backends.use_backend("cuda", precision=precision) as backend:
        return backend


def synchronize() -> None:
    """Wait for the device, and raise what went wrong in a persistent kernel."""
    if not SIMULATED:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
    cuda().finish()


def seconds_of(call: Callable[[], Any], calls: int) -> float:
    """The device's seconds a call, by events around `calls` of them; the clock's in the simulator."""
    if SIMULATED:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    import cupy

    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return cupy.cuda.get_elapsed_time(first, last) / 1e3 / calls


def interleaved(
    sides: dict[str, Callable[[], Any]], rounds: int = 7, window: float = 0.03
) -> dict[str, list[float]]:
    """Seconds a call of each side, one figure a round, A B A B; each has been called before."""
    if SIMULATED:
        rounds, window = 1, 0.0
    calls = {}
    for name, call in sides.items():
        for _ in range(1 if SIMULATED else 3):
            call()
        synchronize()
        once = seconds_of(call, 1)
        calls[name] = max(1, min(200, int(window / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(seconds_of(call, calls[name]))
    synchronize()
    return found


# ------------------------------------------------------------------------------------------------ both sides


class Question(NamedTuple):
    """A layer to be timed: shape (T, B, H), cell, one or two directions, precision of products."""

    shape: tuple[int, int, int]
    cell: str
    directions: int
    precision: str

    @property
    def place(self) -> str:
        return f"{','.join(map(str, self.shape))} {self.cell}{' bi' if self.directions == 2 else ''}"


CELLS = {"lstm": cells.lstm, "gru": cells.gru}


def numbers(question: Question) -> list[dict[str, Any]]:
    """The arrays of each direction, NumPy's, the scale that PyTorch begins with."""
    T, B, H = question.shape
    random = np.random.default_rng(0)
    x = random.standard_normal((T, B, H)).astype(np.float32)
    found = []
    for d in range(question.directions):
        cell = CELLS[question.cell]()
        draw = lambda *shape: (random.random(shape, np.float32) * 2 - 1) / np.float32(np.sqrt(H))
        G, R = len(cell.gates), len(cell.recurrent)
        found.append(
            {
                "cell": cell,
                "x": x[::-1] if d else x,
                "kernel": draw(H, G * H),
                "recurrent_kernel": draw(H, R * H),
                "bias": draw(G * H),
                "params": tuple(draw(H) for _ in cell.params),
                "state": None,
                "valid": None,
            }
        )
    return found


def on_device(backend: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with their arrays on the backend's device."""
    move = lambda a: backend.asarray(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a
    return {
        name: tuple(move(a) for a in value) if isinstance(value, tuple) else move(value)
        for name, value in call.items()
    }


def ours(question: Question, **options: Any) -> dict[str, Callable[[], Any]]:
    """Inference and training of our layer, by name."""
    backend = cuda(question.precision)
    calls = [on_device(backend, {**n, **options}) for n in numbers(question)]
    T, B, H = question.shape
    dh = backend.asarray(np.random.default_rng(1).standard_normal((T, B, H)).astype(np.float32))

    def inference() -> Any:
        return backend.sequence_forward_pair([{**c, "training": False} for c in calls])

    def training() -> Any:
        outs = backend.sequence_forward_pair([{**c, "training": True} for c in calls])
        asked = [{"residual": o.residual, "dh": dh, "dfinal": (None,) * len(o.final)} for o in outs]
        return outs, backend.sequence_backward_pair(asked)

    return {"inference": inference, "training": training}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN and cuBLAS may round float32 operands to TF32, inside PyTorch."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def torch_sides(question: Question, packed: bool = False) -> dict[str, Callable[[], Any]]:
    """Inference and training of PyTorch's layer on cuDNN; `packed`: rows of unequal length."""
    import torch

    T, B, H = question.shape
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[question.cell]
    dtype = torch.bfloat16 if question.precision == "bfloat16" else torch.float32
    layer = kind(H, H, bidirectional=question.directions == 2).to("cuda", dtype)
    layer.flatten_parameters()
    x: Any = torch.randn(T, B, H, device="cuda", dtype=dtype)
    dh = torch.randn(T, B, question.directions * H, device="cuda", dtype=dtype)
    if packed:
        lengths = lengths_of(T, B)
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False)
        dh = torch.randn(int(lengths.sum()), question.directions * H, device="cuda", dtype=dtype)
    else:
        x.requires_grad_(True)

    def inference() -> Any:
        with torch.no_grad(), tf32(question.precision != "float32"):
            return layer(x)

    def training() -> None:
        with tf32(question.precision != "float32"):
            for p in layer.parameters():
                p.grad = None
            out, _ = layer(x)
            (out.data if packed else out).backward(dh)

    return {"inference": inference, "training": training}


def lengths_of(T: int, B: int) -> np.ndarray:
    """From half of T to all of it, evenly."""
    return np.linspace(T // 2 + 1, T, B).astype(np.int64)


def has_torch() -> bool:
    if SIMULATED or common.version("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def correct_variants(T: int, B: int, H: int) -> dict[str, dict[str, Any]]:
    """The options that are compared with the reference, as arguments of a sequence."""
    random = np.random.default_rng(3)
    valid = random.random((T, B)) < 0.7
    valid[:, 0] = False  # a row without a step
    mask = (random.random((1, B, H)) < 0.8).astype(np.float32) / np.float32(0.8)
    return {"plain": {}, "mask": {"valid": valid}, "recurrent dropout": {"recurrent_mask": mask}}


def option_variants(T: int, B: int, H: int) -> dict[str, dict[str, Any]]:
    """The options that are timed over the plain layer, as arguments of a sequence."""
    random = np.random.default_rng(4)
    valid = np.arange(T)[:, None] < lengths_of(T, B)
    keep = lambda *s: ((random.random(s) < 0.8) / 0.8).astype(np.float32)
    drop = lambda *s: (random.random(s) < 0.1).astype(np.float32)
    draw = lambda n: tuple(random.standard_normal(H).astype(np.float32) * 0.1 for _ in range(n))
    peephole, zoneout = cells.lstm(peephole=True), cells.zoneout(cells.lstm())
    return {
        "plain": {},
        "lengths": {"valid": valid},
        "mask with holes": {"valid": random.random((T, B)) < 0.8},
        "recurrent dropout, a sequence": {"recurrent_mask": keep(1, B, H)},
        "recurrent dropout, a step": {"recurrent_mask": keep(T, B, H)},
        "peephole": {"cell": peephole, "params": draw(len(peephole.params))},
        "zoneout": {"cell": zoneout, "aux": tuple(drop(T, B, H) for _ in zoneout.aux)},
    }


def questions(shapes: list[tuple[int, int, int]]) -> Iterator[Question]:
    """The table's rows; both directions at the shapes where they are not out of proportion."""
    for shape, cell, precision in itertools.product(shapes, CELLS, PRECISIONS):
        for directions in (1, 2):
            yield Question(shape, cell, directions, precision)


def tier_of(question: Question) -> str:
    """Which kernels serve a layer, and why, in the backend's own words."""
    from numlstm.kernels.cuda import sequence

    T, B, H = question.shape
    with cuda().current():
        chosen = sequence.tier(
            CELLS[question.cell](),
            T,
            B,
            H,
            H,
            H,
            "float32",
            question.precision,
            directions=question.directions,
        )
    return f"{chosen.name}: {chosen.why}"
