"""numlstm against PyTorch on the CPU: the ratio of our time to theirs, shape by shape.

`python -m benchmarks.cpu` times nn.LSTM and nn.RNN (tanh) against LSTM and SimpleRNN, inference and training
(forward and backward), both sides on one thread and on two, and a whole Adam step of LSTM(50) + Dense(1).
A ratio below 1 means that we are faster. Shapes are (T, B, I, H): time, batch, input, hidden. Results go to
`benchmarks/results/cpu.json` and `cpu.png`; a partial run (`--quick`, `--shapes`, `--threads`) writes nothing
unless `--out` says where.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.contenders import SIDES, Case, Worker

SHAPES = [
    (20, 32, 1, 50),
    (30, 16, 3, 40),
    (96, 32, 7, 100),
    (784, 32, 1, 128),
    (100, 64, 128, 128),
    (128, 1, 32, 160),
    (60, 33, 90, 193),
    (50, 32, 100, 200),
    (35, 20, 200, 200),
    (96, 48, 64, 256),
    (784, 1, 28, 128),
    (25, 128, 64, 256),
    (200, 8, 40, 384),
    (50, 32, 256, 512),
    (60, 1, 128, 512),
    (40, 64, 300, 600),
    (100, 1, 512, 1024),
    (50, 64, 1024, 1024),
]
RNN_SHAPES = [(20, 32, 1, 50), (784, 32, 1, 128), (60, 33, 90, 193), (96, 48, 64, 256), (60, 1, 128, 512)]
QUICK = [(20, 32, 1, 50), (96, 32, 7, 100), (128, 1, 32, 160), (60, 33, 90, 193), (50, 32, 256, 512)]
WAIT = 60.0  # seconds that the whole run may lose waiting for other processes
LIMIT = 540.0  # seconds after which rows get no more rounds than they must have
ADAM = Case("lstm", "adam step", 20, 32, 1, 50)


def cases(shapes: list[tuple[int, ...]], rnn_shapes: list[tuple[int, ...]]) -> list[Case]:
    found = [ADAM]
    for cell, chosen in (("lstm", shapes), ("rnn", rnn_shapes)):
        found += [Case(cell, mode, *shape) for shape in chosen for mode in ("inference", "training")]
    return found


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest value: 1e-6 is rounding, 1e-2 is a bug."""
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))


def row(
    case: Case, threads: int, sides: dict[str, Worker], patience: common.Patience, settings: dict[str, Any]
) -> dict[str, Any]:
    """Check that both sides compute the same, then time them in turn."""
    results = {name: worker.prepare(case) for name, worker in sides.items()}
    error = agreement(results["ours"], results["torch"])
    if not error < 1e-3:
        raise RuntimeError(f"{case}: ours and PyTorch's results differ by {error:.1e} of the largest value")
    turns = {name: worker.take for name, worker in sides.items()}
    samples, noisy = common.interleave(turns, patience, **settings)
    by_round = common.ratios(samples["ours"], samples["torch"])
    return {
        "label": case.label,
        "cell": case.cell,
        "mode": case.mode,
        "threads": threads,
        "series": f"{case.cell}, {threads} thread{'s' * (threads > 1)}",
        "ours_ms": samples["ours"].seconds * 1e3,
        "torch_ms": samples["torch"].seconds * 1e3,
        "ratio": statistics.median(by_round),
        "spread": common.relative_spread(by_round),
        "ours_gflops": case.flops / samples["ours"].seconds / 1e9,
        "torch_gflops": case.flops / samples["torch"].seconds / 1e9,
        "difference": error,
        "rounds": len(by_round),
        "noisy": noisy,
    }


def with_shares(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The rows with both sides' shares of the FMA peak of as many threads."""
    return [
        r
        | {f"{side}_share": r[f"{side}_gflops"] / ceilings[str(r["threads"])]["fma_gflops"] for side in SIDES}
        for r in rows
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each cell, mode and thread count: geometric mean, worst row, how many rows we win.

    Rows that other processes disturbed are left out, unless there are no others: they flatter whoever waits
    less at barriers.
    """
    found = []
    for key in dict.fromkeys((r["cell"], r["mode"], r["threads"]) for r in rows):
        group = [r for r in rows if (r["cell"], r["mode"], r["threads"]) == key]
        counted = [r for r in group if not r["noisy"]] or group
        worst = max(counted, key=lambda r: r["ratio"])
        found.append(
            {
                "cell": key[0],
                "mode": key[1],
                "threads": key[2],
                "rows": len(counted),
                "left_out": len(group) - len(counted),
                "geometric_mean": common.geometric_mean(r["ratio"] for r in counted),
                "worst": worst["ratio"],
                "worst_shape": worst["label"],
                "faster": sum(r["ratio"] < 1 for r in counted),
                "median_share": statistics.median(r["ours_share"] for r in counted),
            }
        )
    return found


HEADER = (
    f"{'cell':5}{'mode':11}{'thr':>3} {'T,B,I,H':>17}{'ours ms':>10}{'torch ms':>10}{'ratio':>7}"
    f"{'spread':>8}{'peak':>6}{'torch':>6}"
)


def line(r: dict[str, Any]) -> str:
    return (
        f"{r['cell']:5}{r['mode']:11}{r['threads']:>3} {r['label']:>17}"
        f"{r['ours_ms']:>10.3f}{r['torch_ms']:>10.3f}{r['ratio']:>7.2f}{r['spread']:>8.0%}"
        f"{r['ours_share']:>6.0%}{r['torch_share']:>6.0%}"
        f"{' noisy' if r['noisy'] else ''}"
    )


def summary_line(s: dict[str, Any]) -> str:
    left_out = f", {s['left_out']} disturbed rows left out" if s["left_out"] else ""
    return (
        f"{s['cell']:5}{s['mode']:11}{s['threads']:>3} thread{'s' if s['threads'] > 1 else ' '}: "
        f"geometric mean {s['geometric_mean']:.2f}, worst {s['worst']:.2f} at {s['worst_shape']}, "
        f"faster in {s['faster']} of {s['rows']}, median share of peak {s['median_share']:.0%}{left_out}"
    )


def paced(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The settings of a row for which `seconds` are left; one round is the least when the run is late."""
    least = settings["least"] if seconds > 1 else 1
    return settings | {"budget": min(settings["budget"], seconds), "least": least}


def run(
    chosen: list[Case], threads: list[int], window: float, settings: dict[str, Any], say: Any
) -> dict[str, Any]:
    """Measure everything; `say` gets each line as it is known."""
    started = time.perf_counter()
    about = common.machine()
    ceilings = common.peaks(threads)
    say(f"{about['cpu']}, {about['cores']} cores, {' '.join(about['features'])}, load {about['load']}")
    say(", ".join(f"{k} {v}" for k, v in about["packages"].items()) + f", Python {about['python']}")
    for n, ceiling in ceilings.items():
        say(
            f"{n} thread(s): FMA peak {ceiling['fma_gflops']:.0f} GFLOP/s, reading cache "
            f"{ceiling['cache_gbytes']:.0f} GB/s, memory {ceiling['memory_gbytes']:.0f} GB/s"
        )
    say(
        "\nratio: our time / PyTorch's, below 1 is faster; spread: quartiles of the ratio over the rounds\n"
        + HEADER
    )
    rows: list[dict[str, Any]] = []
    patience = common.Patience(WAIT)
    for n in threads:
        # measured again before each part: the first time other work may have been in the way
        ceilings = common.higher(ceilings, common.peaks(threads))
        with Worker("ours", n, window) as first, Worker("torch", n, window) as second:
            for case in chosen:
                left = LIMIT - (time.perf_counter() - started)
                pace = paced(settings, left / (len(chosen) * len(threads) - len(rows)))
                rows.append(row(case, n, {"ours": first, "torch": second}, patience, pace))
                say(line(with_shares(rows[-1:], ceilings)[0]))
    ceilings = common.higher(ceilings, common.peaks(threads))
    rows = with_shares(rows, ceilings)
    summaries = summary(rows)
    say("\n" + "\n".join(summary_line(s) for s in summaries))
    seconds = time.perf_counter() - started
    say(f"{len(rows)} rows in {seconds:.0f} s; {sum(r['noisy'] for r in rows)} disturbed by other processes")
    return {
        "what": "numlstm against PyTorch on the CPU, float32; ratio = our time / theirs",
        "machine": about,
        "peaks": ceilings,
        "settings": {"window_s": window, **settings},
        "seconds": seconds,
        "summary": summaries,
        "rows": rows,
    }


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


def save(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write cpu.json and, where matplotlib is installed, cpu.png."""
    wrote = [common.write_json(folder / "cpu.json", report)]
    if common.version("matplotlib"):
        about, rows = report["machine"], report["rows"]
        disturbed = sum(r["noisy"] for r in rows)
        note = f"hollow: {disturbed} of {len(rows)} rows disturbed by other work; " if disturbed else ""
        packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
        note += f"{about['cpu']}, {about['cores']} cores; {packages}"
        shown = [r for r in rows if r["mode"] != "adam step"]
        title = "One recurrent layer, float32, CPU"
        wrote.append(common.ratio_picture(folder / "cpu.png", shown, ["inference", "training"], title, note))
    return wrote


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--quick", action="store_true", help="five shapes, three rounds, under two minutes")
    parser.add_argument("--shapes", type=shape_list, help="T,B,I,H;... in place of the set ones, both cells")
    parser.add_argument("--threads", type=thread_list, help="thread counts given to both sides (default 1,2)")
    parser.add_argument(
        "--out", type=Path, help="folder for cpu.json and cpu.png (default benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if common.version("torch") is None:
        parser.error("the peer is missing: pip install torch (the project's extra is called peers)")
    threads = options.threads or [n for n in (1, 2) if n <= common.cores()]
    shapes, rnn_shapes = (QUICK, QUICK[:2]) if options.quick else (SHAPES, RNN_SHAPES)
    if options.shapes:
        shapes = rnn_shapes = options.shapes
    settings: dict[str, Any] = {"rounds": 9, "least": 3, "budget": 3.0}
    if options.quick:
        settings = {"rounds": 3, "least": 3, "budget": 1.0}
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    report = run(cases(shapes, rnn_shapes), threads, 0.03 if options.quick else 0.06, settings, say)
    if options.json:
        print(json.dumps(common.plain(report), indent=1))
    # a partial run must not replace the full one's files unless it is told where to write
    partial = options.quick or options.shapes or options.threads
    if folder := options.out or (None if partial else common.RESULTS):
        say("wrote " + ", ".join(str(path) for path in save(report, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
