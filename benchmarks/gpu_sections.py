"""The sections of benchmarks.gpu, each run as `python -m benchmarks.gpu_sections NAME OUT`: see gpu.py for what they are,
and gpu_layers.py for the layers that they measure."""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, gpu_sanitizer
from benchmarks.gpu_layers import (
    CELLS,
    CORRECT_SHAPE,
    EXCHANGE,
    FLASHRNN,
    IDENTICAL,
    OPTION_PRECISIONS,
    OPTION_SHAPES,
    PRECISIONS,
    PROTOCOL_SHAPE,
    REPEATS,
    SHAPES,
    SIMULATED,
    TINY,
    TOLERANCE,
    Question,
    correct_variants,
    cuda,
    has_torch,
    interleaved,
    numbers,
    on_device,
    option_variants,
    ours,
    questions,
    seconds_of,
    synchronize,
    tier_of,
    torch_sides,
)
from numlstm.kernels import reference

SANITIZER_SECONDS = 25  # of the section "correct"


class Report:
    """A section's findings; the file is whole after every `keep`."""

    def __init__(self, out: Path) -> None:
        self.out, self.found = out, {"lines": []}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def keep(self, **found: Any) -> None:
        self.found.update(found)
        common.write_json(self.out, self.found)


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


class Recorder:
    """A device for the persistent sequences that compiles nothing and runs nothing: it notes what would be launched."""

    xp = np

    def __init__(self, sms: int, shared_per_block: int, capability: tuple[int, int]) -> None:
        self.sms, self.shared_per_block, self.capability = sms, shared_per_block, capability
        self.launches: dict[tuple[Any, ...], None] = {}  # an ordered set

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)

    def product(self, a: Any, b: Any, out: np.ndarray, precision: str) -> None:
        pass

    def launch(
        self, text: str, arguments: Any, grid: int, warps: int, shared: int, label: str, look: Any
    ) -> None:
        from numlstm.kernels.cuda.persistent.compile import kinds

        self.launches[text, kinds([n for n, _ in arguments]), warps, self.capability] = None


def wanted_kernels(recorder: Recorder, shapes: list[tuple[int, int, int]] = SHAPES) -> list[tuple[Any, ...]]:
    """The persistent kernels of the sections after this one, as arguments of `compile.build`. Their text does not depend
    on the number of steps: one is enough to ask for them."""
    from numlstm.kernels.cuda.persistent import Sequences

    asked: list[tuple[Question, dict[str, Any]]] = [(q, {}) for q in questions(shapes)]
    for cell, precision in itertools.product(CELLS, PRECISIONS):
        asked.append((Question(PROTOCOL_SHAPE, cell, 1, precision), {}))
        variants = correct_variants(1, *CORRECT_SHAPE[1:]).values()
        asked += [(Question(CORRECT_SHAPE, cell, 1, precision), v) for v in variants]
    for shape, precision in itertools.product(OPTION_SHAPES, OPTION_PRECISIONS):
        asked += [(Question(shape, "lstm", 1, precision), v) for v in option_variants(1, *shape[1:]).values()]
    sequences = Sequences(recorder)
    for question, variant in asked:
        _, B, H = question.shape
        one = question._replace(shape=(1, B, H))
        calls = [{**n, **variant, "precision": question.precision} for n in numbers(one)]
        if sequences.supports(
            calls[0]["cell"], 1, B, H, H, precision=question.precision, directions=question.directions
        ):
            continue
        places = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
        for training in (False, True):
            outs = sequences.forward_all(
                [
                    (
                        tuple(c[p] for p in places),
                        {k: v for k, v in c.items() if k not in places} | {"training": training},
                    )
                    for c in calls
                ]
            )
        none = (None,) * len(calls[0]["cell"].state)
        sequences.backward_all([((o.residual, o.h, none), {}) for o in outs])
    return list(recorder.launches)


def kernels(report: Report) -> None:
    """The persistent kernels that later sections run, compiled on all cores: seconds each, and hundreds of them."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from numlstm.kernels.cpu.cache import directory

    if directory() is None:
        raise SystemExit(
            "kernels: compiled kernels are kept nowhere (NUMLSTM_CACHE_DIR), so each section would compile"
        )
    if SIMULATED:
        jobs = wanted_kernels(Recorder(132, 227 << 10, (9, 0)), TINY)
        report.keep(wanted=len(jobs), lines=[f"{len(jobs)} kernels; none is compiled in the simulator"])
        return
    from numlstm.kernels.cuda import persistent

    device = persistent.on_device(0).device
    jobs = wanted_kernels(Recorder(device.sms, device.shared_per_block, device.capability))
    start, done = time.perf_counter(), 0
    with ProcessPoolExecutor(common.cores(), get_context("spawn")) as pool:
        for _ in pool.map(compiled, jobs, chunksize=1):
            done += 1
            took = time.perf_counter() - start
            report.keep(wanted=len(jobs), compiled=done, compile_seconds=took)
    report.keep(
        lines=[f"{done} kernels in {took:.0f} s on {common.cores()} cores" if done else "no kernel serves"]
    )


def compiled(job: tuple[Any, ...]) -> int:
    """Compile a kernel into the cache; gives its size."""
    from numlstm.kernels.cuda.persistent.compile import build

    return len(build(*job).cubin)


def tests(report: Report) -> None:
    """The project's tests of the CUDA backend: on the device all of them, in the simulator some."""
    places = ["tests/gpu/test_on_device.py", "tests/kernels/cuda"]
    selected = ["-k", "lstm", "--maxfail", "1"] if SIMULATED else []
    if not SIMULATED and common.version("pytest-xdist") is not None:
        selected += ["-n", str(min(8, common.cores()))]  # most of a test is compiling
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, *places],
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
    """LSTM and GRU, plain and with masks, in every precision (all other cells are the tests'); and under NVIDIA's
    compute-sanitizer, where it is installed, one sequence of each way to run one."""
    rows: list[dict[str, Any]] = []
    for cell, (variant, options), precision in itertools.product(
        CELLS, correct_variants(*CORRECT_SHAPE).items(), PRECISIONS
    ):
        question = Question(CORRECT_SHAPE, cell, 1, precision)
        found = errors_of(question, options)
        good = max(found.values()) <= TOLERANCE[precision]
        rows.append({"cell": cell, "variant": variant, "precision": precision, "errors": found, "good": good})
        report.keep(rows=rows)
    bad = [r for r in rows if not r["good"]]
    good = f"{len(rows) - len(bad)} of {len(rows)} within their tolerance of the float64 reference"
    report.keep(lines=[good])
    # The simulator's kernels are Python, in which there is nothing for the sanitizer.
    absent = {"path": None, "runs": [], "line": "compute-sanitizer: absent (simulated)"}
    sanitized = absent if SIMULATED else gpu_sanitizer.check(SANITIZER_SECONDS)
    report.keep(sanitizer=sanitized, lines=[good, sanitized["line"]])
    found = [r for r in sanitized["runs"] if r["outcome"] == "failed"]
    if bad or found:
        raise SystemExit(f"correct: {bad or ''} {found or ''}")


def same(a: Any, b: Any) -> bool:
    """Whether two arrays of the device have the same bits."""
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def protocol(report: Report) -> None:
    """The persistent kernels again and again, bit by bit; and the time of one step, from two lengths."""
    rows = []
    for cell, precision in itertools.product(CELLS, PRECISIONS):
        T, B, H = PROTOCOL_SHAPE
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


def table(report: Report) -> None:
    """Our time over cuDNN's, at each shape, cell, precision, number of directions, forward and in training."""
    from benchmarks.gpu import goal_of

    peaks = None if SIMULATED else ceilings()
    rows: list[dict[str, Any]] = []
    for question in questions(TINY if SIMULATED else SHAPES):
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
    for shape, precision in itertools.product(TINY if SIMULATED else OPTION_SHAPES, OPTION_PRECISIONS):
        variants = option_variants(*shape)
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
    count = 4 if SIMULATED else (len(ids) - 1) // T // 64 * 64  # whole batches: one shape, one set of kernels
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
    sections = (machine, kernels, tests, correct, protocol, table, options, learning)
    {section.__name__: section for section in sections}[name](Report(Path(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
