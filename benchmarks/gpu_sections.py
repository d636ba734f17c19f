"""The sections of benchmarks.gpu, each run as `python -m benchmarks.gpu_sections NAME OUT`: see gpu.py for what they are.

Everything here works on the arrays of the CUDA backend, CuPy's on a device and NumPy's in the simulator, through the
backend's sequences: time-major arrays, what a layer computes and nothing around it. PyTorch's side is `nn.LSTM` and `nn.GRU`
on the same arrays, time-major too, so that cuDNN is not charged for a transposition.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from numlstm import backend as backends
from numlstm.kernels import cells, reference

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
SHAPES = [  # T, B, H; as many inputs as units
    (100, 64, 256), (512, 32, 512), (1000, 1, 1024), (256, 128, 1024), (128, 64, 2048), (1024, 16, 768), (200, 20, 650),
    (784, 128, 128),
]  # fmt: skip
TINY = [(3, 2, 5)]
PRECISIONS = ("float32", "tf32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 4e-2}  # of the largest value, against float64
REPEATS, IDENTICAL = (2, 2) if SIMULATED else (1000, 100)
EXCHANGE = 0.7e-6  # seconds: the hardest assumption for one exchange between blocks
FLASHRNN = {
    "forward": 4.87,
    "training": 13.61,
}  # ms at (1024, 16, 768) in bf16 on an H100: its README's figure, "fused"


class Report:
    """A section's findings; the file is whole after every `keep`."""

    def __init__(self, out: Path) -> None:
        self.out, self.found = out, {"lines": []}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def keep(self, **found: Any) -> None:
        self.found.update(found)
        common.write_json(self.out, self.found)


# ------------------------------------------------------------------------------------------------ the device


def cuda(precision: str = "float32") -> Any:
    """The backend "cuda" for products of a precision."""
    with backends.use_backend("cuda", precision=precision) as backend:
        return backend


def synchronize() -> None:
    if not SIMULATED:
        import cupy

        cupy.cuda.get_current_stream().synchronize()


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


# ------------------------------------------------------------------------------------------------ the sections


def machine(report: Report) -> None:
    """What the device is, and its own ceilings."""
    packages = (
        "numlstm",
        "numpy",
        "numba",
        "numba-cuda",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "torch",
        "nvidia-cudnn-cu13",
    )
    versions = {name: common.version(name) for name in packages if common.version(name)}
    if SIMULATED:
        report.keep(device="simulator", versions=versions)
        return
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name = properties["name"].decode() if isinstance(properties["name"], bytes) else properties["name"]
    report.keep(
        device=name,
        versions=versions,
        multiprocessors=properties["multiProcessorCount"],
        compute_capability=f"{properties['major']}.{properties['minor']}",
        memory_gib=properties["totalGlobalMem"] / 2**30,
        driver=cupy.cuda.runtime.driverGetVersion(),
        runtime=cupy.cuda.runtime.runtimeGetVersion(),
    )
    query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,driver_version"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        report.keep(nvidia_smi=dict(zip(query.split(","), answer.stdout.strip().split(", "), strict=False)))
    except (OSError, subprocess.SubprocessError) as error:
        report.keep(nvidia_smi=f"not to be had: {error}")
    peaks = ceilings(2**28, 8192)
    report.keep(peaks=peaks, launch=launch_cost())
    report.keep(
        lines=[
            f"{name}, {properties['multiProcessorCount']} multiprocessors, copy {peaks['copy_tbytes']:.2f} TB/s, products "
            + ", ".join(f"{p} {peaks[f'{p}_tflops']:.0f}" for p in PRECISIONS)
            + " TFLOP/s"
        ]
    )


def launch_cost() -> dict[str, float]:
    """Microseconds that a launch takes the host, and that a chain of them takes the device, by number of arrays."""
    import cupy
    from numba import cuda as numba_cuda

    @numba_cuda.jit
    def none() -> None:
        pass

    @numba_cuda.jit
    def four(a, b, c, d):
        i = numba_cuda.grid(1)
        if i < a.size:
            a[i] = b[i] + c[i] + d[i]

    arrays = [numba_cuda.as_cuda_array(cupy.zeros(1024, np.float32), sync=False) for _ in range(4)]
    found = {}
    for name, call in {
        "no arrays": lambda: none[1, 32](),
        "four arrays": lambda: four[8, 128](*arrays),
    }.items():
        call()
        synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            call()
        host = time.perf_counter() - start
        synchronize()
        found[f"{name}, host"] = host * 1e3
        found[f"{name}, device"] = seconds_of(call, 1000) * 1e6
    return found


def tests(report: Report) -> None:
    """The project's tests of the CUDA backend: on the device all of them, in the simulator one."""
    places = ["tests/gpu/test_device.py", "tests/kernels/cuda", "tests/backend/test_cuda.py"]
    selected = ["-k", "lstm", "--maxfail", "1"] if SIMULATED else ["-m", "gpu"]
    present = [p for p in places if Path(p).exists()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, *present],
        capture_output=True,
        text=True,
    )
    closing = [line for line in done.stdout.splitlines() if line.strip()][-25:]
    counts = {
        what: int(n)
        for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing[-1] if closing else "")
    }
    report.keep(status=done.returncode, counts=counts, closing=closing, lines=closing[-1:])
    if done.returncode:
        raise SystemExit(f"tests: pytest ended with {done.returncode}\n" + "\n".join(closing))


def errors_of(question: Question, options: dict[str, Any]) -> dict[str, float]:
    """The largest differences of a training step on the device from the float64 reference, of the largest value."""
    backend = cuda(question.precision)
    (plain,) = numbers(question)
    plain |= options
    wide = {
        name: tuple(a.astype(np.float64) for a in value) if isinstance(value, tuple)
        else value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value
        for name, value in plain.items()
    }  # fmt: skip
    cell = plain["cell"]
    places = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
    by_name = {k: v for k, v in wide.items() if k not in places}
    T, B, _ = question.shape
    dh = (
        np.random.default_rng(2)
        .standard_normal((T, B, plain["recurrent_kernel"].shape[0]))
        .astype(np.float32)
    )
    expected = reference.forward(*(wide[p] for p in places), training=True, **by_name)
    wanted = reference.backward(expected.residual, dh.astype(np.float64), (None,) * len(cell.state))
    out = backend.sequence_forward(**on_device(backend, plain), training=True)
    got = backend.sequence_backward(out.residual, backend.asarray(dh), (None,) * len(cell.state))
    host = backend.to_numpy
    pairs = {
        "h": (expected.h, out.h), "dx": (wanted.x, got.x), "dkernel": (wanted.kernel, got.kernel),
        "drecurrent": (wanted.recurrent_kernel, got.recurrent_kernel), "dbias": (wanted.bias, got.bias),
    }  # fmt: skip
    return {
        name: float(np.abs(host(b) - a).max() / max(np.abs(a).max(), 1e-30))
        for name, (a, b) in pairs.items()
        if a is not None
    }


def correct(report: Report) -> None:
    """Every cell of one stage and more, plain and with masks, in every precision."""
    shape = TINY[0] if SIMULATED else (24, 9, 200)
    T, B, H = shape
    random = np.random.default_rng(3)
    valid = random.random((T, B)) < 0.7
    valid[:, 0] = False  # a row without a step
    variants = {
        "plain": {},
        "mask": {"valid": valid},
        "recurrent dropout": {"recurrent_mask": (random.random((1, B, H)) < 0.8).astype(np.float32) / 0.8},
    }
    rows: list[dict[str, Any]] = []
    for cell, (variant, options), precision in itertools.product(CELLS, variants.items(), PRECISIONS):
        question = Question(shape, cell, 1, precision)
        found = errors_of(question, options)
        good = max(found.values()) <= TOLERANCE[precision]
        rows.append({"cell": cell, "variant": variant, "precision": precision, "errors": found, "good": good})
        report.keep(rows=rows)
    bad = [r for r in rows if not r["good"]]
    report.keep(
        lines=[f"{len(rows) - len(bad)} of {len(rows)} within their tolerance of the float64 reference"]
    )
    if bad:
        raise SystemExit(f"correct: {bad}")


def same(a: Any, b: Any) -> bool:
    """Whether two arrays of the device have the same bits."""
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def protocol(report: Report) -> None:
    """The persistent kernels again and again, bit by bit; and the time of one step, from two lengths."""
    rows = []
    for cell, precision in itertools.product(CELLS, PRECISIONS):
        T, B, H = TINY[0] if SIMULATED else (64, 16, 512)
        question = Question((T, B, H), cell, 1, precision)
        run = ours(question)
        outs, gradients = run["training"]()
        first = outs[0].h.copy(), gradients[0].recurrent_kernel.copy(), gradients[0].x.copy()
        different = 0
        for k in range(REPEATS):
            if k < IDENTICAL:  # forward and backward
                outs, gradients = run["training"]()
                now = outs[0].h, gradients[0].recurrent_kernel, gradients[0].x
            else:
                now = (run["inference"]()[0].h,)
            different += not all(same(a, b) for a, b in zip(first, now, strict=False))
        row = {
            "cell": cell,
            "precision": precision,
            "repeats": REPEATS,
            "different": different,
            "tier": tier_of(question),
        }
        if not SIMULATED:
            longer = ours(Question((4 * T, B, H), cell, 1, precision))
            for mode in ("inference", "training"):
                took = interleaved({"short": run[mode], "long": longer[mode]}, rounds=5)
                step = (statistics.median(took["long"]) - statistics.median(took["short"])) / (3 * T)
                row[f"{mode}_step_us"] = step * 1e6
        rows.append(row)
        report.keep(rows=rows)
    lines = [
        f"{r['cell']:5} {r['precision']:9} {r['different']} of {r['repeats']} runs differ"
        + (f", a step {r['inference_step_us']:.2f} us forward" if "inference_step_us" in r else "")
        + f"  [{r['tier']}]"
        for r in rows
    ]
    report.keep(lines=lines)
    if any(r["different"] for r in rows):
        raise SystemExit("protocol: some runs differ")


def tier_of(question: Question) -> str:
    """Which kernels serve a layer, and why, in the backend's own words."""
    from numlstm.kernels.cuda import sequence

    T, B, H = question.shape
    chosen = sequence.tier(
        CELLS[question.cell](), T, B, H, H, H, np.float32, question.precision, cuda(question.precision).index
    )
    return f"{chosen.name}: {chosen.why}"


def floor(question: Question, mode: str, peaks: dict[str, float]) -> float:
    """Seconds below which no kernel comes under the cost model: products at their measured peak, bytes at the measured
    bandwidth, and an exchange of `EXCHANGE` a step each way."""
    T, B, H = question.shape
    G = {"lstm": 4, "gru": 3}[question.cell]
    size = 2 if question.precision == "bfloat16" else 4
    rate, bandwidth = peaks[f"{question.precision}_tflops"] * 1e12, peaks["copy_tbytes"] * 1e12
    product = 2 * T * B * G * H * H / rate
    moved = T * B * H * size * (1 + 2 * G + 2)
    forward = max(product, moved / bandwidth) + product + T * EXCHANGE
    if mode == "inference":
        return forward * question.directions
    backward = max(3 * product, T * B * H * size * (3 * G + 4) / bandwidth) + product + T * EXCHANGE
    return (forward + backward) * question.directions


def questions() -> Iterator[Question]:
    """The table's rows; both directions at the shapes where they are not out of proportion."""
    for shape, cell, precision in itertools.product(TINY if SIMULATED else SHAPES, CELLS, PRECISIONS):
        for directions in (1, 2):
            yield Question(shape, cell, directions, precision)


def table(report: Report) -> None:
    """Our time over cuDNN's, at each shape, cell, precision, number of directions, forward and in training."""
    from benchmarks.gpu import goal_of

    peaks = None if SIMULATED else ceilings()
    rows: list[dict[str, Any]] = []
    for question in questions():
        mine = ours(question)
        theirs = torch_sides(question) if has_torch() else {}
        for mode in ("inference", "training"):
            sides = {"ours": mine[mode]} | ({"cudnn": theirs[mode]} if theirs else {})
            took = interleaved(sides, rounds=5, window=0.015)
            row: dict[str, Any] = {
                "place": question.place, "label": f"{question.place} {question.precision} {mode}", "shape": question.shape,
                "cell": question.cell, "directions": question.directions, "precision": question.precision, "mode": mode,
                "tier": tier_of(question), "us": {n: statistics.median(t) * 1e6 for n, t in took.items()},
                "spread": {n: common.relative_spread(t) for n, t in took.items()}, "ratio": None,
            }  # fmt: skip
            row["goal"] = goal_of(row)
            if theirs:
                row["ratio"] = statistics.median(
                    a / b for a, b in zip(took["ours"], took["cudnn"], strict=True)
                )
            if peaks:
                row["floor_us"] = floor(question, mode, peaks) * 1e6
            if question[:3] == ((1024, 16, 768), "lstm", 1) and question.precision == "bfloat16":
                row["flashrnn_ms"] = FLASHRNN["forward" if mode == "inference" else "training"]
            rows.append(row)
            report.keep(rows=rows)
            report.say(
                f"{row['label']:42} {row['us']['ours']:10.0f} us"
                + (f", cuDNN {row['us']['cudnn']:10.0f}, ratio {row['ratio']:.2f}" if theirs else "")
                + (f", floor {row['floor_us']:.0f}" if peaks else "")
            )
        del mine, theirs


def ceilings(floats: int = 2**27, n: int = 4096) -> dict[str, float]:
    """The device's copy bandwidth and products, in the process whose times they are set against."""
    import cupy

    a = cupy.empty(floats, np.float32)
    b = cupy.empty_like(a)
    took = statistics.median(interleaved({"copy": partial(cupy.copyto, b, a)})["copy"])
    peaks = {"copy_tbytes": 2 * a.nbytes / took / 1e12}
    for precision in PRECISIONS:
        backend = cuda(precision)
        left, right = (backend.asarray(np.random.default_rng(k).random((n, n), np.float32)) for k in (0, 1))
        product = partial(backend.matmul, left, right)
        took = statistics.median(interleaved({"product": product}, rounds=3)["product"])
        peaks[f"{precision}_tflops"] = 2 * n**3 / took / 1e12
    return peaks


def options(report: Report) -> None:
    """What masks, lengths, dropout, zoneout and peepholes cost, in training."""
    rows = []
    for shape, precision in itertools.product(
        TINY if SIMULATED else [(512, 32, 512), (100, 64, 256)], ("bfloat16", "float32")
    ):
        T, B, H = shape
        random = np.random.default_rng(4)
        valid = np.arange(T)[:, None] < lengths_of(T, B)
        keep = lambda *s: ((random.random(s) < 0.8) / 0.8).astype(np.float32)  # noqa: B023
        drop = lambda *s: (random.random(s) < 0.1).astype(np.float32)  # noqa: B023
        peephole, zoneout = cells.lstm(peephole=True), cells.zoneout(cells.lstm())
        draw = lambda n: tuple(random.standard_normal(H).astype(np.float32) * 0.1 for _ in range(n))  # noqa: B023
        variants: dict[str, dict[str, Any]] = {
            "plain": {},
            "lengths": {"valid": valid},
            "mask with holes": {"valid": random.random((T, B)) < 0.8},
            "recurrent dropout, a sequence": {"recurrent_mask": keep(1, B, H)},
            "recurrent dropout, a step": {"recurrent_mask": keep(T, B, H)},
            "peephole": {"cell": peephole, "params": draw(len(peephole.params))},
            "zoneout": {"cell": zoneout, "aux": tuple(drop(T, B, H) for _ in zoneout.aux)},
        }
        question = Question(shape, "lstm", 1, precision)
        sides = {name: ours(question, **variant)["training"] for name, variant in variants.items()}
        if has_torch():
            sides["cuDNN, plain"] = torch_sides(question)["training"]
            sides["cuDNN, packed"] = torch_sides(question, packed=True)["training"]
        took = interleaved(sides, rounds=5)
        plain = statistics.median(took["plain"])
        for name, times in took.items():
            mine = name in variants and name != "plain"
            rows.append(
                {
                    "label": f"{name}, {','.join(map(str, shape))} {precision}",
                    "us": statistics.median(times) * 1e6,
                    "over_plain": statistics.median(times) / plain,
                    "ratio": statistics.median(times) / plain if mine else None,
                }
            )
        report.keep(
            rows=rows,
            lines=[f"{r['label']:56} {r['us']:9.0f} us, {r['over_plain']:.2f} of plain" for r in rows],
        )


def learning(report: Report) -> None:
    """Some hundred steps of a character model on tiny Shakespeare, on the device and on the CPU: the losses beside."""
    import numlstm as nl
    from numlstm.data.text import read_text

    text = read_text("tinyshakespeare")[: 2_000 if SIMULATED else 300_000]
    vocabulary = sorted(set(text))
    index = {c: k for k, c in enumerate(vocabulary)}
    ids = np.array([index[c] for c in text], np.int64)
    T, units = (4, 6) if SIMULATED else (64, 256)
    count = (len(ids) - 1) // T
    if SIMULATED:
        count = 4
    x, y = (ids[k : k + count * T].reshape(count, T) for k in (0, 1))
    found: dict[str, Any] = {}
    for backend in ("cuda", "cpu"):
        nl.set_seed(0)
        with nl.use_backend(backend):
            model = nl.Sequential(
                [
                    nl.Embedding(len(vocabulary), 16, input_shape=(T,)),
                    nl.LSTM(units, return_sequences=True),
                    nl.Dense(len(vocabulary)),
                ]
            )
            loss = nl.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer=nl.optimizers.Adam(learning_rate=2e-3), loss=loss)
            start = time.perf_counter()
            history = model.fit(
                x, y, epochs=1 if SIMULATED else 3, batch_size=2 if SIMULATED else 64, verbose=0
            )
            found[backend] = {"losses": history.history["loss"], "seconds": time.perf_counter() - start}
        report.keep(**found)
    apart = abs(found["cuda"]["losses"][-1] - found["cpu"]["losses"][-1])
    report.keep(
        apart=apart,
        lines=[
            f"loss after {len(found['cuda']['losses'])} epochs: cuda {found['cuda']['losses'][-1]:.4f} "
            f"in {found['cuda']['seconds']:.1f} s, cpu {found['cpu']['losses'][-1]:.4f} in {found['cpu']['seconds']:.1f} s"
        ],
    )
    if apart > 0.02:
        raise SystemExit(f"learning: the losses are {apart:.3f} nats apart")


def main(argv: list[str]) -> int:
    name, out = argv
    {
        "machine": machine, "tests": tests, "correct": correct, "protocol": protocol, "table": table, "options": options,
        "learning": learning,
    }[name](Report(Path(out)))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
