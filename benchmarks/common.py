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
    pushed out of the caches. In a long call that is a small part, so it counts. A call that works in another
    process has an attribute `cpu_seconds`, a clock of the processor time that is its own.
    """
    own = getattr(call, "cpu_seconds", time.process_time)
    clocks = _Clocks(own)
    call()
    if clocks.wall() > 0.2:
        return Window(clocks.wall(), 1, clocks.foreign())
    clocks = _Clocks(own)
    times: list[float] = []
    while len(times) < 3 or clocks.wall() < window:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return Window(statistics.median(times), len(times), clocks.foreign())


class _Clocks:
    """Time since it was made, and how much of it other processes had a core."""

    def __init__(self, own: Callable[[], float]) -> None:
        self.clock = own
        self.busy, self.own, self.start = busy_seconds(), own(), time.perf_counter()

    def wall(self) -> float:
        return time.perf_counter() - self.start

    def foreign(self) -> float:
        if self.busy is None:
            return 0.0
        # /proc/stat counts ticks of 10 ms, so a short window sees other work coarsely: one tick is forgiven
        others = (busy_seconds() or 0.0) - self.busy - (self.clock() - self.own)
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


BEATEN = 1.4  # how many times the best rival's time shows that another won't be the best


class Patience:
    """How many seconds a run may wait, in all, for other processes to leave the machine; for one window, not so long
    that a busy hour uses up at its beginning what later rows would need."""

    WINDOW = 1.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def take(self, window: Callable[[], Window]) -> Window:
        """A window in which others used less than a tenth of a core, or the last one tried."""
        spent = 0.0
        while (found := window()).foreign > 0.1 and spent < min(self.WINDOW, self.seconds):
            started = time.perf_counter()
            time.sleep(0.1)
            spent += time.perf_counter() - started + found.seconds * found.calls
        self.seconds -= spent
        return found


def interleave(
    contenders: dict[str, Callable[[], Window]],
    patience: Patience,
    *,
    rounds: int = 7,
    least: int = 3,
    budget: float = 4.0,
    rivals: Iterable[str] = (),
) -> tuple[dict[str, Samples], bool]:
    """Measure the contenders in turn, A B A B, and return their samples and whether the run was disturbed.

    `rounds` at most, `least` at least, and no new round once `budget` seconds are spent. Of `rivals` only the best
    counts: one that takes BEATEN times the best one's time is spared the rounds that follow.
    """
    samples = {name: Samples() for name in contenders}
    rivals = [name for name in rivals if name in contenders]
    beaten: set[str] = set()
    started = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - started > budget:
            break
        for name, take in contenders.items():
            if name not in beaten:
                samples[name].windows.append(patience.take(take))
        best = min((samples[name].seconds for name in rivals), default=0.0)
        beaten.update(name for name in rivals if samples[name].seconds > BEATEN * best)
    return samples, any(w.foreign > 0.1 for s in samples.values() for w in s.windows)


def ratios(ours: Samples, peer: Samples) -> list[float]:
    """Our time over the peer's, round by round: neighbours in time share the machine's mood. A beaten peer has the
    first rounds only."""
    return [a.seconds / b.seconds for a, b in zip(ours.windows, peer.windows, strict=False)]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


# --------------------------------------------------------------------------------------------- the machine

FEATURES = ("avx2", "fma", "avx512f", "avx512vnni", "avx512bf16", "amx-bf16", "amx-int8", "neon", "sve")
PACKAGES = ("numlstm", "numpy", "numba", "llvmlite", "torch", "onnxruntime", "keras", "jax")


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


Shape = tuple[
    int, int
]  # float32 lanes of a vector, and how many independent sums fill the units without spilling


def _widest() -> Shape:
    present = host_features()
    if "avx512f" in present:
        return 16, 24
    return AVX2 if "avx2" in present else (4, 24)


AVX2: Shape = (8, 12)


def _fma_kernel(shape: Shape, bfloat16: bool = False) -> tuple[Callable[[int], float], int]:
    """A compiled loop of nothing but fused multiply-adds on registers, and its flops per turn.

    With `bfloat16` the instruction is AVX-512-BF16's vdpbf16ps: two products of bfloat16 added to each float32.
    """
    import llvmlite.binding as llvm
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    llvm.initialize_native_asmparser()
    lanes, chains = shape
    vector = ir.VectorType(ir.FloatType(), lanes)
    kind = ir.FunctionType(vector, [vector] * 3)

    @intrinsic
    def multiply_add(typingctx: Any, turns: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if bfloat16:
                # as assembly: llvmlite's IR builder has no such type; the accumulator is the third operand
                fma = ir.InlineAsm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0")
            else:
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
                    old = builder.load(slot)
                    given = [y, y, old] if bfloat16 else [old, y, y]
                    builder.store(builder.call(fma, given), slot)
            total = builder.load(sums[0])
            for slot in sums[1:]:
                total = builder.fadd(total, builder.load(slot))
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.int64), emit

    @njit(nogil=True)
    def spin(turns: int) -> float:
        return multiply_add(turns)

    return spin, 2 * lanes * chains * (1 + bfloat16)


def tiles(precision: str, batch: int) -> bool:
    """Whether our products in "bfloat16" or "int8" of so many rows run in AMX's tiles."""
    from numlstm.kernels.cpu import amx, isa

    return batch >= amx.LEAST_ROWS and isa.tiles({"bfloat16": "bf16"}.get(precision, precision)) == "amx"


def _tile_kernel(form: str = "amx") -> tuple[Callable[[int], float], int]:
    """A compiled loop of nothing but AMX's products of bfloat16 tiles, four sums in turn, and its flops per turn."""
    from numba import njit, types
    from numba.core import cgutils

    from numlstm.kernels.cpu import amx
    from numlstm.kernels.cpu.simd import operation

    @operation("0(i)")
    def multiply(b: Any, turns: Any) -> None:
        on = amx.FORMS[form](b)
        with cgutils.for_range(b, turns):
            for total in range(4):
                on.multiply("bf16", total, 4 + total % 2, 6 + total // 2)

    state = amx.state_of(form)
    begin, end = amx.begin_tiles, amx.end_tiles

    @njit(types.float64(types.int64), nogil=True)
    def spin(turns: int) -> float:
        begin(state)
        multiply(turns)
        end(state)
        return 0.0

    return spin, 4 * 2 * 16 * 16 * 32


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


TRIES = 60  # short and many: some fall between the turns of other processes


def _best_rate(work: Callable[..., Any], arguments: list[tuple[Any, ...]], amount: float) -> float:
    """`amount` per second with one thread per entry of `arguments`; the best of many, as it is a ceiling."""

    def timed(given: tuple[Any, ...]) -> tuple[float, float]:
        started = time.perf_counter()
        work(*given)
        return started, time.perf_counter()

    best = float("inf")
    with ThreadPoolExecutor(len(arguments)) as pool:
        for _ in range(TRIES):
            starts, ends = zip(*pool.map(timed, arguments), strict=True)
            best = min(best, max(ends) - min(starts))
            time.sleep(0.003)
    return amount / best


READ_SIZES = (2**22, 2**24, 2**26)  # bytes; before them 256 KiB a thread, inside most second-level caches


def peaks(threads: Iterable[int] = (1, 2)) -> dict[str, dict[str, Any]]:
    """Measured ceilings by thread count.

    `fma_gflops` of the widest vectors, `avx2_gflops` where there is AVX2, `bfloat16_gflops` of AVX-512-BF16,
    `tile_gflops` of AMX in bfloat16 where we use it, `read_gbytes` by how many bytes are read again and again, all
    threads together; `cache_gbytes` and `memory_gbytes` are the first and the last of those.
    """
    present = host_features()
    loops = {"fma_gflops": _fma_kernel(_widest())}
    if "avx2" in present:
        loops["avx2_gflops"] = _fma_kernel(AVX2)
    if "avx512bf16" in present:
        loops["bfloat16_gflops"] = _fma_kernel(_widest(), bfloat16=True)
    if tiles("bfloat16", 16):
        loops["tile_gflops"] = _tile_kernel()
    read = _read_kernel()
    for spin, _ in loops.values():
        spin(1)
    read(np.ones(64, np.float32), 1)
    turns = 200_001
    found: dict[str, dict[str, Any]] = {}
    for n in threads:
        mine: dict[str, Any] = {
            name: _best_rate(spin, [(turns,)] * n, n * turns * flops) / 1e9
            for name, (spin, flops) in loops.items()
        }
        rates = {}
        for size in (n * 2**18, *READ_SIZES):
            times = max(1, 2**24 // size)
            arrays = [(np.ones(size // 4 // n, np.float32), times) for _ in range(n)]
            rates[str(size)] = _best_rate(read, arrays, times * size) / 1e9
        known = list(rates.values())
        found[str(n)] = mine | {"read_gbytes": rates, "cache_gbytes": known[0], "memory_gbytes": known[-1]}
    return found


def read_rate(ceiling: dict[str, Any], size: float) -> float:
    """GB/s at which so many bytes are read again and again: that of the next larger size measured."""
    rates = {int(bytes_): rate for bytes_, rate in ceiling["read_gbytes"].items()}
    return rates[min((s for s in rates if s >= size), default=max(rates))]


def higher(a: Any, b: Any) -> Any:
    """The higher of two measurements of the ceilings, figure by figure."""
    return {name: higher(value, b[name]) for name, value in a.items()} if isinstance(a, dict) else max(a, b)


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


def speaker(quiet: bool) -> Callable[[str], None]:
    """What prints a line at once, or nothing when stdout belongs to the report."""
    return (lambda text: None) if quiet else (lambda text: print(text, flush=True))


def deliver(
    name: str,
    report: dict[str, Any],
    picture: Callable[[dict[str, Any], Path], Path],
    *,
    whole: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """How a script ends: the report on stdout if asked for, NAME.json and, where matplotlib is installed, NAME.png.

    They go to `out`, else to the results' folder if the run was `whole`: a run with other settings must not replace
    the set ones' files unless it is told where to write.
    """
    if as_json:
        print(json.dumps(plain(report), indent=1))
    if folder := out or (RESULTS if whole else None):
        wrote = [write_json(folder / f"{name}.json", report)]
        if version("matplotlib"):
            wrote.append(picture(report, folder / f"{name}.png"))
        speaker(as_json)("wrote " + ", ".join(map(str, wrote)))
