"""numlstm against other libraries on the CPU: the ratio of our time to the best of theirs, row by row.

`python -m benchmarks.cpu` has six sections, which `--only` selects:

- float32: inference and a training step with Adam, LSTM, GRU and a few simple RNNs, against PyTorch (eager), ONNX
  Runtime (inference), Keras on JAX (compiled) and, at LSTM(50) + Dense(1), TensorFlow.js in node;
- avx2: the same with both sides held to AVX2, against PyTorch;
- bf16: bfloat16 from 128 units on, against PyTorch's (autocast in training) and our own float32;
- int8: inference with int8 weights, against PyTorch's dynamic quantisation and our own float32;
- stream: one time step at batch 1, the states carried, called from Python, in microseconds;
- memory: how far a training step raises the resident memory, against PyTorch.

A ratio below 1 means that we are faster, or smaller. A row's share is what it reaches of the machine's measured peak of
fused multiply-adds, or of its bandwidth where reading the recurrent weights at each step is what binds. Shapes are
(T, B, I, H): time, batch, input, hidden; "x2" is two layers, "bi" both directions. A peer that is not installed is left
out, and said so. Results go to `benchmarks/results/cpu.json` and `cpu.png`; a partial run (any of `--quick`, `--only`,
`--shapes`, `--threads`) writes nothing unless `--out` says where. The exit status is 1 when a row failed to run or the
sides disagreed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, peers
from benchmarks.contenders import Case, ours, ours_kernel
from benchmarks.process import Preparation, Side, Unavailable

Shape = tuple[
    int, ...
]  # T, B, I, H, and for more than one plain layer also how many, and whether in both directions

SHAPES: list[Shape] = [
    (20, 32, 1, 50),
    (96, 32, 7, 100),
    (784, 32, 1, 128),
    (100, 64, 128, 128),
    (784, 1, 28, 128),
    (128, 1, 32, 160),
    (60, 33, 90, 193),
    (50, 32, 100, 200),
    (96, 48, 64, 256),
    (25, 128, 64, 256),
    (200, 8, 40, 384),
    (50, 32, 256, 512),
    (60, 1, 128, 512),
    (40, 64, 300, 600),
    (100, 1, 512, 1024),
    (50, 64, 1024, 1024),
    (35, 20, 200, 200, 2, False),
    (50, 16, 64, 256, 2, False),
    (60, 33, 90, 193, 1, True),
    (50, 32, 64, 128, 1, True),
]
RNN_SHAPES: list[Shape] = [(20, 32, 1, 50), (60, 33, 90, 193), (60, 1, 128, 512)]
AVX2_SHAPES: list[Shape] = [
    (20, 32, 1, 50),
    (96, 32, 7, 100),
    (128, 1, 32, 160),
    (60, 33, 90, 193),
    (96, 48, 64, 256),
    (200, 8, 40, 384),
    (50, 32, 256, 512),
    (40, 64, 300, 600),
]
BF16_SHAPES: list[Shape] = [
    (100, 64, 128, 128),
    (60, 33, 90, 193),
    (96, 48, 64, 256),
    (50, 32, 256, 512),
    (40, 64, 300, 600),
    (100, 1, 512, 1024),
]
INT8_SHAPES: list[Shape] = [
    (128, 1, 32, 160),
    (60, 1, 128, 512),
    (100, 1, 512, 1024),
    (60, 33, 90, 193),
    (50, 32, 256, 512),
]
MEMORY_SHAPES: list[Shape] = [
    (96, 32, 7, 100),
    (784, 32, 1, 128),
    (50, 32, 256, 512),
    (40, 64, 300, 600),
    (35, 20, 200, 200, 2, False),
]
QUICK: list[Shape] = [(20, 32, 1, 50), (128, 1, 32, 160), (60, 33, 90, 193)]
STREAM: Shape = (1, 1, 64, 128)
FIRST = Case("lstm", "training", 20, 32, 1, 50)  # LSTM(50) + Dense(1), which TensorFlow.js is asked for too

# seconds for a section's rows, after which they get no more rounds than they must have
BUDGETS = {"float32": 640.0, "avx2": 150.0, "bf16": 150.0, "int8": 60.0, "stream": 30.0, "memory": 60.0}
WAIT = 60.0  # seconds that the whole run may lose waiting for other processes
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.1}  # of the largest value, between two sides

# what holds our side to AVX2 on a processor that has more: the features of Haswell, the first that had it
OUR_AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt,+f16c",
}

# by section and mode, over all LSTM and GRU rows: the highest geometric mean and the highest row that will do
GOALS = {
    ("float32", "inference"): (0.65, 0.90),
    ("float32", "training"): (0.50, 0.85),
    ("avx2", "inference"): (0.60, 0.90),
    ("avx2", "training"): (0.60, 0.90),
    ("bf16", "inference"): (0.45, 0.80),
    ("bf16", "training"): (0.50, 0.80),
    ("int8", "inference"): (0.60, 1.0),
    ("memory", "training"): (0.70, 1.0),
}


def case_of(cell: str, mode: str, shape: Shape, precision: str = "float32") -> Case:
    return Case(cell, mode, *shape, precision=precision)  # type: ignore[arg-type,misc]


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest value: 1e-6 is rounding, 1e-2 is a bug in float32."""
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))


def paced(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The settings of a row for which `seconds` are left; one round is the least when the run is late."""
    least = settings["least"] if seconds > 1 else 1
    return settings | {"budget": min(settings["budget"], max(seconds, 0.0)), "least": least}


# --------------------------------------------------------------------------------------------- the run


@dataclass
class Row:
    """What is measured against what. The first contender is ours; those not called "ours ..." are the peers."""

    section: str
    case: Case
    threads: int
    isa: str
    contenders: dict[str, tuple[Side, Case]]


@dataclass
class Run:
    """One run's settings and what it has found so far."""

    say: Callable[[str], None]
    threads: list[int]
    window: float
    settings: dict[str, Any]
    shapes: list[Shape] | None = None  # in place of the sections' own
    quick: bool = False
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    patience: common.Patience = field(default_factory=lambda: common.Patience(WAIT))

    def chosen(self, own: list[Shape]) -> list[Shape]:
        """The shapes of a section."""
        return self.shapes or ([s for s in QUICK if s in own] or own[:1] if self.quick else own)

    def absent(self, what: str, reason: str) -> None:
        """Something is left out; its reason is printed once."""
        if what not in self.left_out:
            self.left_out[what] = reason
            self.say(f"left out: {what}: {reason}")

    def ceiling(self) -> None:
        """Measured again before each section: the first time other work may have been in the way."""
        found = common.peaks(sorted({1, *self.threads}))  # what is streamed runs on one
        self.ceilings = common.higher(self.ceilings, found) if self.ceilings else found

    @contextmanager
    def sides(self, threads: int, makers: dict[str, tuple[Preparation, dict[str, str]]]) -> Iterator[Any]:
        """The sides' processes, by name."""
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(Side(name, prepare, threads, self.window, environment))
                for name, (prepare, environment) in makers.items()
            }

    def measure(self, row: Row, seconds: float) -> dict[str, Any]:
        """Check that the sides compute the same, then time them in turn, in about so many seconds together. Raises
        Unavailable if ours can't be."""
        started = time.perf_counter()
        results: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {}
        for name, (side, case) in row.contenders.items():
            try:
                results[name], about = side.ask("prepare", name, case)
                facts |= {name: about} if about else {}
            except Unavailable as error:
                if name == "ours":
                    raise
                self.absent(f"{row.section}: {name}", str(error).removeprefix(f"{name}: "))
        errors = {n: agreement(results["ours"], r) for n, r in results.items() if n != "ours"}
        for name, error in errors.items():
            if not error < TOLERANCE[row.case.precision]:
                raise RuntimeError(f"{row.case}: ours and {name} differ by {error:.1e} of the largest value")
        turns = {name: row.contenders[name][0].turn(name) for name in results}
        rivals = [name for name in results if not name.startswith("ours")]
        pace = paced(self.settings, seconds - (time.perf_counter() - started))
        if seconds > 1:  # not late: one long row only takes from the others of its section
            pace["least"] = self.settings["least"]
        samples, noisy = common.interleave(turns, self.patience, rivals=rivals, **pace)
        return (
            found_row(row, samples, noisy)
            | {"difference": max(errors.values(), default=None)}
            | ({"about": facts} if facts else {})
        )

    def measure_all(self, rows: Iterable[Row], seconds: float) -> None:
        """All rows of a part of a section, each printed as it is known."""
        todo, started = list(rows), time.perf_counter()
        for number, row in enumerate(todo):
            left = seconds - (time.perf_counter() - started)
            try:
                found = self.measure(row, left / (len(todo) - number))
            except Unavailable as error:
                self.absent(
                    f"{row.section}, {row.case.cell} {row.case.mode}", str(error).removeprefix("ours: ")
                )
            except RuntimeError as error:  # one row that fails must not cost the others' figures
                where = f"{row.section}, {row.case.cell} {row.case.mode} {row.case.label}, {row.threads} thread(s)"
                self.failed.append(f"{where}: {error}")
                self.say(f"failed: {self.failed[-1]}")
            else:
                self.rows.append(found)
                self.say(line(with_share(found, self.ceilings)))


def found_row(row: Row, samples: dict[str, common.Samples], noisy: bool) -> dict[str, Any]:
    """The figures of a row; `ratio` is our time over the best peer's, round by round, and their median."""
    case = row.case
    seconds = {name: s.seconds for name, s in samples.items()}
    rivals = [name for name in seconds if not name.startswith("ours")]
    by_round = {name: common.ratios(samples["ours"], samples[name]) for name in seconds if name != "ours"}
    best = min(rivals, key=seconds.__getitem__, default=None)
    return {
        "section": row.section,
        "label": case.label,
        "cell": case.cell,
        "mode": case.mode,
        "threads": row.threads,
        "precision": case.precision,
        "isa": row.isa,
        "hidden": case.H,
        "batch": case.B,
        "ms": {name: s * 1e3 for name, s in seconds.items()},
        "best": best,
        "ratio": statistics.median(by_round[best]) if best else None,
        "ratios": {name: statistics.median(values) for name, values in by_round.items()},
        "spread": common.relative_spread(by_round[best]) if best else None,
        "flops": case.flops,
        "traffic": case.traffic,
        "weight_bytes": case.weight_bytes,
        "rounds": len(samples["ours"].windows),
        "noisy": noisy,
    }


def with_share(row: dict[str, Any], ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row with our share of the ceiling that binds, the best peer's, and which ceiling it is.

    The time that the products take at the peak, or that reading the recurrent weights takes at the bandwidth measured
    for that many bytes, whichever is longer, over the time taken. Where no peak of a precision was measured (int8)
    only bandwidth is known, and batches of more than 4 rows, which it does not bind, have no share.
    """
    if "flops" not in row:
        return row
    ceiling = ceilings[str(row["threads"])]
    peak = {
        "float32": "avx2_gflops" if row["isa"] == "avx2" else "fma_gflops",
        "bfloat16": "tile_gflops" if row["isa"] == "amx" else "bfloat16_gflops",
    }
    rate = ceiling.get(peak.get(row["precision"], ""))
    needed = {"bandwidth": row["traffic"] / common.read_rate(ceiling, row["weight_bytes"])}
    if rate:
        needed["fma"] = row["flops"] / rate
    elif row["batch"] > 4:
        return row | {"bound": None, "share": {}}
    bound = max(needed, key=needed.__getitem__)
    known = [name for name in ("ours", row["best"]) if name in row["ms"]]
    return row | {"bound": bound, "share": {name: needed[bound] / 1e6 / row["ms"][name] for name in known}}


# ---------------------------------------------------------------------------------------- the sections


def float32(run: Run, seconds: float) -> None:
    """All shapes against all peers."""
    makers: dict[str, tuple[Preparation, dict[str, str]]] = {"ours": (ours, {}), "torch": (peers.torch, {})}
    for name, prepare, environment, packages in (
        ("onnxruntime", peers.onnxruntime, {}, ("onnxruntime", "onnx")),
        ("keras", peers.keras, peers.KERAS, ("keras", "jax")),
        ("tfjs", peers.tfjs, {}, ()),
    ):
        missing = [package for package in packages if common.version(package) is None]
        if missing:
            run.absent(f"float32: {name}", f"not installed: {' '.join(missing)}")
        else:
            makers[name] = (prepare, environment)
    shapes = run.chosen(SHAPES)
    # what --quick asks for is whether everything runs; Keras' compilations are most of its time
    keras_shapes = shapes[:1] if run.quick else shapes
    for n in run.threads:
        with run.sides(n, makers) as sides:
            rows = []
            for cell, own in (("lstm", shapes), ("gru", shapes), ("rnn", run.chosen(RNN_SHAPES))):
                for shape in own:
                    for mode in ("inference", "training"):
                        case = case_of(cell, mode, shape)
                        asked = ["ours", "torch", "onnxruntime" if mode == "inference" else ""]
                        asked += ["keras"] if shape in keras_shapes else []
                        asked += ["tfjs"] if case == FIRST else []
                        here = {name: (sides[name], case) for name in asked if name in sides}
                        rows.append(Row("float32", case, n, "widest", here))
            run.measure_all(rows, seconds / len(run.threads))


def avx2(run: Run, seconds: float) -> None:
    """Both sides held to AVX2."""
    if not {"avx2", "avx512f"} <= common.host_features():
        run.absent("avx2", "this processor's widest vectors are those of the section float32")
        return
    for n in run.threads:
        makers = {"ours": (ours, OUR_AVX2), "torch": (peers.torch, peers.torch_avx2())}
        with run.sides(n, makers) as sides:
            lanes = sides["ours"].ask("ask", "", our_lanes)
            capability = sides["torch"].ask("ask", "", peers.torch_capability)
            if (lanes, capability) != (8, "AVX2"):
                raise RuntimeError(
                    f"expected both sides on AVX2, got {lanes} lanes and PyTorch's {capability}"
                )
            cases = [
                case_of(cell, mode, shape)
                for cell in ("lstm", "gru")
                for shape in run.chosen(AVX2_SHAPES)
                for mode in ("inference", "training")
            ]
            rows = [
                Row("avx2", c, n, "avx2", {name: (side, c) for name, side in sides.items()}) for c in cases
            ]
            run.measure_all(rows, seconds / len(run.threads))


def our_lanes() -> int:
    """How many float32 our vectors have in this process."""
    from numlstm.kernels.cpu import isa

    return isa.LANES


def reduced(section: str, precision: str, modes: tuple[str, ...], shapes: list[Shape]) -> Any:
    """A section of a lower precision: against PyTorch's, and our own float32."""

    def measured(run: Run, seconds: float) -> None:
        for n in run.threads:
            with run.sides(n, {"ours": (ours, {}), "torch": (peers.torch, {})}) as sides:
                rows = []
                for cell in ("lstm", "gru"):
                    for shape in run.chosen(shapes):
                        for mode in modes:
                            case = case_of(cell, mode, shape, precision)
                            plain = replace(case, precision="float32")
                            here = {
                                "ours": (sides["ours"], case),
                                "ours float32": (sides["ours"], plain),
                                "torch": (sides["torch"], case),
                            }
                            kind = "amx" if common.tiles(precision, case.B) else "widest"
                            rows.append(Row(section, case, n, kind, here))
                run.measure_all(rows, seconds / len(run.threads))

    return measured


def stream(run: Run, seconds: float) -> None:
    """One streamed step on one thread."""
    makers: dict[str, tuple[Preparation, dict[str, str]]] = {
        "ours": (ours, {}),
        "ours kernel": (ours_kernel, {}),
        "torch": (peers.torch, {}),
        "torch cell": (peers.torch_cell, {}),
    }
    if common.version("onnxruntime") and common.version("onnx"):
        makers["onnxruntime"] = (peers.onnxruntime, {})
    else:
        run.absent("stream: onnxruntime", "not installed: onnxruntime onnx")
    with run.sides(1, makers) as sides:
        rows = []
        for cell in ("lstm", "gru"):
            for shape in run.shapes or [STREAM]:
                case = case_of(cell, "stream", (1, *shape[1:4]))
                here = {name: (side, case) for name, side in sides.items()}
                rows.append(Row("stream", case, 1, "widest", here))
        run.measure_all(rows, seconds)


def memory(run: Run, seconds: float) -> None:
    """A training step's memory, on as many threads as the run's most, in processes used once."""
    threads, started = max(run.threads), time.perf_counter()
    for cell in ("lstm", "gru"):
        for shape in run.chosen(MEMORY_SHAPES):
            case = case_of(cell, "training", shape)
            small = replace(case, T=3, B=5, H=33)
            found: dict[str, Any] = {}
            if time.perf_counter() - started > 2 * seconds:
                run.absent(f"memory: {cell} {case.label}", "the section's time is over")
                continue
            try:
                for name, prepare in (("ours", ours), ("torch", peers.torch)):
                    # our first process compiles what the small case does not: the second only loads it
                    for _ in range(2 if name == "ours" else 1):
                        with Side(name, prepare, threads) as side:
                            found[name] = side.ask("memory", "", (small, case))
            except Unavailable as error:
                run.absent("memory", str(error))
                return
            # Linux counts a process's pages in batches of so much for each thread
            mib = {name: max(0.25, f["growth_mib"]) for name, f in found.items()}
            run.rows.append(
                {
                    "section": "memory",
                    "label": case.label,
                    "cell": cell,
                    "mode": "training",
                    "threads": threads,
                    "precision": "float32",
                    "isa": "widest",
                    "mib": mib,
                    "before_mib": {name: f["before_mib"] for name, f in found.items()},
                    "best": "torch",
                    "ratio": mib["ours"] / mib["torch"],
                    "noisy": False,
                }
            )
            run.say(line(run.rows[-1]))


SECTIONS: dict[str, tuple[str, Callable[[Run, float], None]]] = {
    "float32": ("float32, the widest vectors", float32),
    "avx2": ("both sides held to AVX2, float32", avx2),
    "bf16": ("bfloat16", reduced("bf16", "bfloat16", ("inference", "training"), BF16_SHAPES)),
    "int8": ("int8 weights", reduced("int8", "int8", ("inference",), INT8_SHAPES)),
    "stream": ("one streamed step, one thread", stream),
    "memory": ("memory of a training step beyond model and data", memory),
}

# ----------------------------------------------------------------------------------------- the summary


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and worst row, by section and mode over all LSTM and GRU rows, then by cell and thread count.

    Rows that other processes disturbed are left out, unless there are no others: they flatter whoever waits less at
    barriers. `goals` are those of the first kind of group. `at_peak` is what the mean would be if we ran every row at the
    whole of the ceiling that its share is of, with no gates and no Python: what exact arithmetic leaves to be won.
    """
    found = []
    counted = [r for r in rows if r["ratio"] is not None and r["section"] != "stream"]
    for whole in (True, False):
        keys: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for r in counted:
            if not whole or r["cell"] != "rnn":
                more = () if whole else (r["cell"], r["threads"])
                keys.setdefault((r["section"], r["mode"], *more), []).append(r)
        for (section, mode, *more), group in keys.items():
            quiet = [r for r in group if not r["noisy"]] or group
            worst = max(quiet, key=lambda r: r["ratio"])
            cell, threads = more or (None, None)
            shares = [r["share"]["ours"] for r in quiet if "ours" in r.get("share", {})]
            mean = common.geometric_mean(r["ratio"] for r in quiet)
            floors = [r["ratio"] * min(r["share"]["ours"], 1) for r in quiet if "ours" in r.get("share", {})]
            goals = GOALS[section, mode] if whole else None
            found.append(
                {
                    "section": section,
                    "mode": mode,
                    "precision": worst["precision"],
                    "isa": worst["isa"],
                    "cell": cell,
                    "threads": threads,
                    "rows": len(quiet),
                    "left_out": len(group) - len(quiet),
                    "geometric_mean": mean,
                    "worst": worst["ratio"],
                    "worst_row": f"{worst['cell']} {worst['label']}, {worst['threads']} thread(s)",
                    "faster": sum(r["ratio"] < 1 for r in quiet),
                    "median_share": statistics.median(shares) if shares else None,
                    "at_peak": common.geometric_mean(floors) if floors else None,
                    "goals": goals,
                    "met": goals and mean <= goals[0] and worst["ratio"] <= goals[1],
                }
            )
    return found


def checks(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that are about single figures; what was not measured is not there."""
    found: list[dict[str, Any]] = []

    def check(what: str, values: Iterable[float], goal: float | None, least: bool = False) -> None:
        if known := [v for v in values if v is not None]:
            value = common.geometric_mean(known)
            met = None if goal is None else value >= goal if least else value <= goal
            found.append({"what": what, "value": value, "goal": goal, "at_least": least, "met": met})

    def of(section: str, **fields: Any) -> list[dict[str, Any]]:
        here = [r for r in rows if r["section"] == section]
        return [r for r in here if all(r.get(name) == value for name, value in fields.items())]

    first = of("float32", cell="lstm", mode="training", label=FIRST.label)
    for peer, goal in (("torch", 0.12), ("tfjs", 0.004)):
        check(f"LSTM(50) + Dense(1), training step, over {peer}'s", ratios(first, peer), goal)
    large = [r for r in of("bf16", mode="training") if r["hidden"] >= 256]
    tiles = common.tiles("bfloat16", 16)
    name = "bfloat16 training over our float32, H >= 256"
    check(
        name + ("" if tiles else " (goal 0.40 where there is AMX)"),
        ratios(large, "ours float32"),
        0.40 if tiles else None,
    )
    one = of("int8", label="100,1,512,1024")
    check("int8 inference over our float32, batch 1, H 1024", ratios(one, "ours float32"), 0.35)
    for cell in ("lstm", "gru"):
        steps = of("stream", cell=cell, label="1,1,64,128")
        check(f"{cell}: streamed step, microseconds", [1e3 * r["ms"]["ours"] for r in steps], 8)
        kernel = [1e3 * r["ms"]["ours kernel"] for r in steps if "ours kernel" in r["ms"]]
        check(f"{cell}: its kernel call, microseconds", kernel, 4)
        check(f"{cell}: streamed step over nn.{cell.upper()}'s call", ratios(steps, "torch"), 0.1)
        check(f"{cell}: streamed step over onnxruntime's", ratios(steps, "onnxruntime"), 0.6)
    if {"1", "2"} <= set(ceilings):
        scaling = ceilings["2"]["fma_gflops"] / ceilings["1"]["fma_gflops"]
        check("the machine itself: two threads' pure FMA loops over one's", [scaling], None)
        for mode in ("inference", "training"):
            gains = [
                r["ms"]["ours"] / other["ms"]["ours"]
                for r in of("float32", mode=mode, threads=1)
                for other in of("float32", mode=mode, threads=2, cell=r["cell"], label=r["label"])
                if r["hidden"] >= 256
            ]
            # a machine whose own cores give less can't be asked for more
            check(
                f"our {mode}, H >= 256: two threads' speed over one's", gains, min(1.7, scaling), least=True
            )
    return found


def ratios(rows: list[dict[str, Any]], other: str) -> list[float]:
    """Our time over another contender's, in the rows that have it."""
    return [r["ratios"][other] for r in rows if other in r["ratios"]]


# ---------------------------------------------------------------------------------------- what is said

HEADER = (
    f"{'cell':5}{'mode':10}{'thr':>3} {'T,B,I,H':>18}{'ours':>11}{'best peer':>11} {'':12}{'ratio':>6}"
    f"{'spread':>8}{'share':>7}{'theirs':>7}  others: our time over theirs"
)


def line(r: dict[str, Any]) -> str:
    """A row as it is printed: milliseconds, microseconds in `stream`, MiB in `memory`."""
    start = f"{r['cell']:5}{r['mode']:10}{r['threads']:>3} {r['label']:>18}"
    if r["section"] == "memory":
        return (
            f"{start}{r['mib']['ours']:>11.1f}{r['mib']['torch']:>11.1f} {'torch, MiB':12}{r['ratio']:>6.2f}"
        )
    factor, digits = (1e3, 2) if r["section"] == "stream" else (1.0, 3)
    best = r["best"]
    theirs = f"{'':>24}{'':>20}" if best is None else (
        f"{factor * r['ms'][best]:>11.{digits}f} {best:12}{r['ratio']:>6.2f}{r['spread']:>8.0%}"
    )  # fmt: skip
    share, bound = r.get("share", {}), {"bandwidth": "b", "fma": " ", None: " "}[r.get("bound")]
    parts = "".join(f"{share[name]:>6.0%}{bound}" if name in share else f"{'':7}" for name in ("ours", best))
    others = ", ".join(f"{name} {value:.3g}" for name, value in r["ratios"].items() if name != best)
    return (
        f"{start}{factor * r['ms']['ours']:>11.{digits}f}{theirs}{parts}  {others}"
        f"{' noisy' if r['noisy'] else ''}"
    ).rstrip()


def summary_line(s: dict[str, Any]) -> str:
    who = "LSTM and GRU" if s["cell"] is None else f"{s['cell']}, {s['threads']} thread(s)"
    share = ""
    if s["median_share"] is not None:
        share = f", median share {s['median_share']:.0%}, {s['at_peak']:.2f} if it were whole"
    left_out = f", {s['left_out']} disturbed rows left out" if s["left_out"] else ""
    verdict = ""
    if s["goals"]:
        mean, worst = s["goals"]
        verdict = f" (goals {mean:.2f}, {worst:.2f}: {'met' if s['met'] else 'MISSED'})"
    return (
        f"{s['section']:8} {s['mode']:10} {who}: geometric mean {s['geometric_mean']:.2f}, worst {s['worst']:.2f} at "
        f"{s['worst_row']}{verdict}, below 1 in {s['faster']} of {s['rows']}{share}{left_out}"
    )


def check_line(c: dict[str, Any]) -> str:
    bound = ">=" if c["at_least"] else "<="
    verdict = "" if c["met"] is None else f" ({bound} {c['goal']:.3g}: {'met' if c['met'] else 'MISSED'})"
    return f"{c['what']}: {c['value']:.3g}{verdict}"


def measure(run: Run, sections: list[str]) -> dict[str, Any]:
    """Measure the sections; the report."""
    started, about, say = time.perf_counter(), common.machine(), run.say
    say(f"{about['cpu']}, {about['cores']} cores, {' '.join(about['features'])}, load {about['load']}")
    say(", ".join(f"{k} {v}" for k, v in about["packages"].items()) + f", Python {about['python']}")
    run.ceiling()
    for n, ceiling in run.ceilings.items():
        rates = ", ".join(f"{int(b) / 2**20:g} MiB {rate:.0f}" for b, rate in ceiling["read_gbytes"].items())
        peaks = [f"{k.removesuffix('_gflops')} {v:.0f}" for k, v in ceiling.items() if k.endswith("gflops")]
        say(f"{n} thread(s): {', '.join(peaks)} GFLOP/s; reading {rates} GB/s")
    say(
        "milliseconds; ratio: our time over the best peer's, below 1 is faster; share: of the FMA peak, b: of bandwidth"
    )
    spent = {}
    for number, name in enumerate(sections):
        title, measured = SECTIONS[name]
        say(f"\n{title}\n{HEADER}")
        if number:
            run.ceiling()
        before = time.perf_counter()
        measured(run, BUDGETS[name] * (0.2 if run.quick else 1.0))
        spent[name] = time.perf_counter() - before
    run.ceiling()
    rows = [with_share(r, run.ceilings) for r in run.rows]
    summaries, single = summary(rows), checks(rows, run.ceilings)
    say("\n" + "\n".join([summary_line(s) for s in summaries] + [check_line(c) for c in single]))
    seconds = time.perf_counter() - started
    disturbed = sum(r["noisy"] for r in rows)
    failed = f", {len(run.failed)} FAILED" if run.failed else ""
    say(f"{len(rows)} rows in {seconds:.0f} s; {disturbed} disturbed by other processes{failed}")
    return {
        "what": "numlstm against the best of its peers on the CPU; ratio = our time (or memory) over theirs",
        "machine": about,
        "peaks": run.ceilings,
        "settings": {"window_s": run.window, **run.settings},
        "seconds": seconds,
        "seconds_by_section": spent,
        "left_out": run.left_out,
        "failed": run.failed,
        "summary": summaries,
        "checks": single,
        "rows": rows,
    }


# ------------------------------------------------------------------------------------- the command line


def shape_list(text: str) -> list[tuple[int, ...]]:
    """ "20,32,1,50;50,64,1024,1024" as shapes."""
    try:
        shapes = [tuple(int(v) for v in part.split(",")) for part in text.split(";") if part.strip()]
    except ValueError:
        shapes = [()]
    if not shapes or any(len(s) != 4 or min(s) < 1 for s in shapes):
        raise argparse.ArgumentTypeError(f"expected T,B,I,H[;T,B,I,H...] of whole numbers >= 1, got {text!r}")
    return shapes


def thread_list(text: str) -> list[int]:
    """ "1,2" as thread counts that this machine can give."""
    counts = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(counts) != text.count(",") + 1 or not all(1 <= n <= common.cores() for n in counts):
        raise argparse.ArgumentTypeError(
            f"expected counts from 1 to {common.cores()} (the cores here), got {text!r}"
        )
    return counts


def section_list(text: str) -> list[str]:
    """ "float32,bf16" as sections."""
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(SECTIONS)}, got {','.join(unknown)!r}")
    return list(dict.fromkeys(names))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--only", type=section_list, help=f"some of {','.join(SECTIONS)}")
    parser.add_argument(
        "--quick", action="store_true", help="three shapes, three rounds, one thread, few minutes"
    )
    parser.add_argument(
        "--shapes", type=shape_list, help="T,B,I,H;... in place of the set ones, in all sections"
    )
    parser.add_argument("--threads", type=thread_list, help="thread counts given to all sides (default 1,2)")
    parser.add_argument(
        "--out", type=Path, help="folder for cpu.json and cpu.png (default benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if common.version("torch") is None:
        parser.error("the peer is missing: pip install torch (the project's extra is called peers)")
    settings: dict[str, Any] = {"rounds": 9, "least": 2, "budget": 3.0}
    if options.quick:
        settings = {"rounds": 3, "least": 2, "budget": 1.0}
    threads = (
        options.threads or [1]
        if options.quick
        else options.threads or [n for n in (1, 2) if n <= common.cores()]
    )
    run = Run(
        common.speaker(options.json),
        threads,
        0.03 if options.quick else 0.05,
        settings,
        options.shapes,
        options.quick,
    )
    report = measure(run, options.only or list(SECTIONS))
    from benchmarks.cpu_picture import picture

    partial = options.quick or options.only or options.shapes or options.threads
    common.deliver("cpu", report, picture, whole=not partial, out=options.out, as_json=options.json)
    return int(bool(report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
