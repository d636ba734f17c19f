"""How benchmarks take time, describe the machine and keep results.

A time says nothing by itself on a shared machine; what is reported is the ratio of two contenders measured
A B A B in one run, the median over the rounds, its spread, and the machine's own ceilings (FMA from
registers, reading memory), measured in the same run. A window during which other processes used the machine
is measured again while the retry allowance lasts; what could not be measured in peace is marked as noisy.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

# --------------------------------------------------------------------------------------------- the clock


@dataclass(frozen=True)
class Window:
    """One burst of calls: the median call in seconds, how many calls, and the share of the machine that other
    processes took meanwhile (0: none, 1: one whole core)."""

    seconds: float
    calls: int
    foreign: float


@dataclass
class Samples:
    """The windows of one contender, one a round."""

    windows: list[Window] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(w.seconds for w in self.windows)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the windows over their median."""
        return relative_spread([w.seconds for w in self.windows])

    @property
    def foreign(self) -> float:
        return statistics.median(w.foreign for w in self.windows)


def relative_spread(values: Sequence[float]) -> float:
    """Distance between the quartiles over the median: 0.05 means the middle half lies within 5 %."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def busy_seconds() -> float | None:
    """CPU seconds that all processes of this machine used since it started; None where Linux does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system = (int(v) for v in stat.readline().split()[1:4])
    except OSError:
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measure(call: Callable[[], Any], window: float = 0.06) -> Window:
    """Time `call` for about `window` seconds, at least three calls; a call of over 0.2 s is made only once.

    One call goes first, untimed: it wakes the threads and fetches the weights that the other contender's turn
    pushed out of the caches. In a long call that is a small part, so it counts.
    """
    clocks = _Clocks()
    call()
    if clocks.wall() > 0.2:
        return Window(clocks.wall(), 1, clocks.foreign())
    clocks = _Clocks()
    times: list[float] = []
    while len(times) < 3 or clocks.wall() < window:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return Window(statistics.median(times), len(times), clocks.foreign())


class _Clocks:
    """Time since it was made, and how much of it other processes had a core."""

    def __init__(self) -> None:
        self.busy, self.own, self.start = busy_seconds(), time.process_time(), time.perf_counter()

    def wall(self) -> float:
        return time.perf_counter() - self.start

    def foreign(self) -> float:
        if self.busy is None:
            return 0.0
        # /proc/stat counts ticks of 10 ms, so a short window sees other work coarsely: one tick is forgiven
        others = (busy_seconds() or 0.0) - self.busy - (time.process_time() - self.own)
        return max(0.0, others - 0.01) / self.wall()


def settle(limit: float = 0.5, step: float = 0.01) -> None:
    """Return once this process's threads have stopped spinning, or after `limit` seconds.

    Worker threads of an OpenMP runtime keep a core busy for a while after the last parallel region (Intel's
    for 200 ms) and would run on into the next contender's time. A fixed pause guesses how long; the process's
    own CPU clock, which counts all its threads, knows.
    """
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(step)
        if time.process_time() - used < 0.1 * step:
            return


class Patience:
    """How many seconds a run may wait, in all, for other processes to leave the machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def take(self, window: Callable[[], Window]) -> Window:
        """A window in which others used less than a tenth of a core, or the last one tried."""
        while (found := window()).foreign > 0.1 and self.seconds > 0:
            started = time.perf_counter()
            time.sleep(0.1)
            self.seconds -= time.perf_counter() - started + found.seconds * found.calls
        return found


def interleave(
    contenders: dict[str, Callable[[], Window]],
    patience: Patience,
    *,
    rounds: int = 7,
    least: int = 3,
    budget: float = 4.0,
) -> tuple[dict[str, Samples], bool]:
    """Measure the contenders in turn, A B A B, and return their samples and whether the run was disturbed.

    `rounds` at most, `least` at least, and no new round once `budget` seconds are spent.
    """
    samples = {name: Samples() for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - started > budget:
            break
        for name, take in contenders.items():
            samples[name].windows.append(patience.take(take))
    return samples, any(w.foreign > 0.1 for s in samples.values() for w in s.windows)


def ratios(ours: Samples, peer: Samples) -> list[float]:
    """Our time over the peer's, round by round: neighbours in time share the machine's mood."""
    return [a.seconds / b.seconds for a, b in zip(ours.windows, peer.windows, strict=True)]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


# --------------------------------------------------------------------------------------------- the machine

FEATURES = ("avx2", "fma", "avx512f", "avx512vnni", "avx512bf16", "amx-bf16", "amx-int8", "neon", "sve")
PACKAGES = ("numlstm", "numpy", "numba", "llvmlite", "torch", "keras", "jax")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def host_features() -> set[str]:
    import llvmlite.binding as llvm

    return {name for name, present in llvm.get_host_cpu_features().items() if present}


def machine() -> dict[str, Any]:
    """What a reader needs to know to place a number: processor, features, caches, cores, versions."""
    present = host_features()
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "features": [f for f in FEATURES if f in present],
        "cores": cores(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "load": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
    }


# ------------------------------------------------------------------------------------------- its ceilings


def _lanes_and_chains() -> tuple[int, int]:
    """float32 lanes of a vector register, and how many independent sums fill the units without spilling."""
    present = host_features()
    if "avx512f" in present:
        return 16, 24
    return (8, 12) if "avx2" in present else (4, 24)


def _fma_kernel() -> tuple[Callable[[int], float], int]:
    """A compiled loop of nothing but fused multiply-adds on registers, and its flops per turn."""
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes, chains = _lanes_and_chains()
    vector = ir.VectorType(ir.FloatType(), lanes)

    @intrinsic
    def multiply_add(typingctx: Any, turns: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f32")
            # the factor depends on an argument, so that nothing can be computed at compile time
            factor = builder.uitofp(builder.and_(args[0], ir.Constant(args[0].type, 1)), ir.FloatType())
            y = ir.Constant(vector, ir.Undefined)
            for lane in range(lanes):
                y = builder.insert_element(y, factor, ir.Constant(ir.IntType(32), lane))
            sums = [
                cgutils.alloca_once_value(builder, ir.Constant(vector, [float(i)] * lanes))
                for i in range(chains)
            ]
            with cgutils.for_range(builder, args[0]):
                for slot in sums:
                    builder.store(builder.call(fma, [builder.load(slot), y, y]), slot)
            total = builder.load(sums[0])
            for slot in sums[1:]:
                total = builder.fadd(total, builder.load(slot))
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.int64), emit

    @njit(nogil=True)
    def spin(turns: int) -> float:
        return multiply_add(turns)

    return spin, 2 * lanes * chains


def _read_kernel() -> Callable[[np.ndarray, int], float]:
    from numba import njit

    @njit(nogil=True, fastmath=True)
    def read(a: np.ndarray, times: int) -> float:
        total = np.float32(0)
        for turn in range(times):
            part = np.float32(turn)
            for i in range(a.size):
                part += a[i]
            total += part
        return total

    return read


def _best_rate(work: Callable[..., Any], arguments: list[tuple[Any, ...]], amount: float) -> float:
    """`amount` per second with one thread per entry of `arguments`; the best of many, as it is a ceiling."""
    best = float("inf")
    with ThreadPoolExecutor(len(arguments)) as pool:
        for _ in range(60):  # short and many: some fall between the turns of other processes
            started = time.perf_counter()
            for job in [pool.submit(work, *a) for a in arguments]:
                job.result()
            best = min(best, time.perf_counter() - started)
            time.sleep(0.005)
    return amount / best


def peaks(threads: Iterable[int] = (1, 2)) -> dict[str, dict[str, float]]:
    """Measured ceilings by thread count: `fma_gflops`, `cache_gbytes` (256 KiB a thread), `memory_gbytes`."""
    spin, flops = _fma_kernel()
    read = _read_kernel()
    turns = 800_001
    spin(1)
    small, large = 2**16, 2**24  # float32 values: 256 KiB, inside most second-level caches, and 64 MiB
    found: dict[str, dict[str, float]] = {}
    for n in threads:
        arrays = {size: [np.ones(size, np.float32) for _ in range(n)] for size in (small, large)}
        read(arrays[small][0], 1)
        found[str(n)] = {
            "fma_gflops": _best_rate(spin, [(turns,)] * n, n * turns * flops) / 1e9,
            "cache_gbytes": _best_rate(read, [(a, 100) for a in arrays[small]], n * small * 400) / 1e9,
            "memory_gbytes": _best_rate(read, [(a, 1) for a in arrays[large]], n * large * 4) / 1e9,
        }
    return found


def higher(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The higher of two measurements of the ceilings, figure by figure."""
    return {n: {name: max(value, b[n][name]) for name, value in found.items()} for n, found in a.items()}


# ------------------------------------------------------------------------------------------- the results


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses, NumPy scalars and tuples made plain, floats to six digits."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_json(path: Path, report: dict[str, Any]) -> Path:
    """Write `report` whole or not at all: a run cut short leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(plain(report), indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    return path


def ratio_picture(
    path: Path, rows: list[dict[str, Any]], modes: Sequence[str], title: str, footnote: str = ""
) -> Path:
    """One panel a mode: our time over the peer's (log scale) for each shape, a dot per cell and thread count.

    Each row holds `label`, `mode`, `series`, `ratio` and `noisy`. Left of the line at 1 we are faster; rows
    that other processes disturbed are drawn hollow.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    labels = list(dict.fromkeys(r["label"] for r in rows))
    series = sorted({r["series"] for r in rows})
    height = 1.6 + 0.28 * len(labels)
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5.2 * len(modes), height), sharey=True, squeeze=False
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for number, name in enumerate(series):
            points = [r for r in rows if r["mode"] == mode and r["series"] == name]
            offset = 0.12 * (number - (len(series) - 1) / 2)
            for noisy in (False, True):
                shown = [r for r in points if r["noisy"] == noisy]
                panel.plot(
                    [r["ratio"] for r in shown],
                    [labels.index(r["label"]) + offset for r in shown],
                    "os^v"[number % 4],
                    color=f"C{number}",
                    markersize=5,
                    fillstyle="none" if noisy else "full",
                    label=None if noisy else name,
                )
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks([0.1, 0.2, 0.5, 1, 2, 5])
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="both", alpha=0.3)
        panel.set_title(mode)
        panel.set_xlabel("our time / PyTorch's (left of 1: faster)")
    panels[0][0].set_yticks(range(len(labels)), labels)
    panels[0][0].invert_yaxis()
    panels[0][0].set_ylabel("time, batch, input, hidden")
    panels[0][-1].legend(fontsize=8, loc="best")
    figure.suptitle(title)
    figure.text(0.01, 0.005, footnote, fontsize=7)
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
